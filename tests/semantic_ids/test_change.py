"""What became of an ID table: growth is told from change."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.change import compare
from tests.semantic_ids.test_advertiser_ids import small_ids


def grown(old: AdvertiserIds, **changes: object) -> AdvertiserIds:
    """The old table with one more advertiser, and its rows in another order."""
    row = np.array([[2, 2, *([0] * (old.codes_AL.shape[1] - 2))]])
    values = {
        "advertiser_ids": np.append(old.advertiser_ids, 55)[::-1],
        "codes_AL": np.concatenate([old.codes_AL, row])[::-1],
        "codebooks": old.codebooks,
        "extra_level": old.extra_level,
        "entity": old.entity,
    }
    return AdvertiserIds(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("extra", [False, True])
def test_a_table_with_further_rows_grew_from_the_old_one(extra: bool) -> None:
    old = small_ids(extra=extra)
    assert compare(old, grown(old)).only_grew
    assert compare(old, old).only_grew
    assert not compare(grown(old), old).only_grew


def test_names_as_text_grow_too() -> None:
    old = small_ids(np.array(["a", "b", "ç", "d"]))
    assert compare(old, grown(old, advertiser_ids=np.array(["e", "d", "ç", "b", "a"]))).only_grew
    assert not compare(old, grown(old, advertiser_ids=np.array(["e", "d", "x", "b", "a"]))).only_grew


CHANGED = {
    "one row with another code": lambda old: {"codes_AL": np.array([[2, 2], [3, 1], [0, 2], [1, 2], [1, 1]])},
    "two rows swapped": lambda old: {"advertiser_ids": np.array([55, 12, 40, 9, 7])},
    "an old one missing": lambda old: {"advertiser_ids": np.array([55, 40, 12, 9, 8])},
    "another vector": lambda old: {"codebooks": [old.codebooks[0], old.codebooks[1] + 1e-3]},
    "one more code": lambda old: {"codebooks": [old.codebooks[0], np.vstack([old.codebooks[1], np.ones(5)])]},
    "another entity": lambda old: {"entity": "item"},
    "names as text": lambda old: {"advertiser_ids": np.array(["55", "40", "12", "9", "7"])},
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED.keys())
def test_a_table_whose_codes_changed_did_not_grow(change: Callable[[AdvertiserIds], dict[str, object]]) -> None:
    old = small_ids()
    assert not compare(old, grown(old, **change(old))).only_grew


def test_a_table_that_gained_the_extra_level_did_not_grow() -> None:
    assert not compare(small_ids(), small_ids(extra=True)).only_grew


def test_what_changed_is_told_with_an_example() -> None:
    old = small_ids()
    told = compare(old, grown(old, codes_AL=np.array([[2, 2], [3, 1], [0, 2], [1, 2], [1, 1]]))).in_words()
    assert "existing IDs changed" in told
    assert "<adv_1_" in told
    assert compare(old, grown(old)).in_words() == "1 new entities, nothing else"
