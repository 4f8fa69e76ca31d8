"""The artifact: codes → tokens, a round trip through files, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from data.errors import UserError
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.trie import Trie


def small_ids(names: NDArray | None = None, *, extra: bool = False, entity: str = "advertiser") -> AdvertiserIds:
    rng = np.random.default_rng(0)
    codes = np.array([[1, 0], [1, 2], [0, 2], [3, 1]], dtype=np.int64)
    names = np.array([7, 9, 12, 40]) if names is None else names
    books = [rng.normal(size=(n, 5)).astype(np.float32) for n in (4, 3)]
    if extra:
        codes, books = np.column_stack([codes, [0, 0, 1, 0]]), [*books, np.zeros((2, 5), np.float32)]
    return AdvertiserIds(names, codes, books, extra_level=extra, entity=entity)


@pytest.mark.parametrize("names", [np.array([7, 9, 12, 40]), np.array(["a", "b", "ç", "<adv_1_0>"])])
def test_saved_and_loaded_is_the_same(names: NDArray, tmp_path: Path) -> None:
    ids = small_ids(names)
    ids.save(tmp_path)
    back = AdvertiserIds.load(tmp_path)
    assert back.advertiser_ids.tolist() == names.tolist()
    assert (back.codes_AL == ids.codes_AL).all()
    assert all(np.array_equal(a, b) for a, b in zip(back.codebooks, ids.codebooks, strict=True))
    assert back.version == ids.version
    assert back.level_sizes == (4, 3)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("entity", ["advertiser", "item"])
def test_what_ids_json_says_comes_back(extra: bool, entity: str, tmp_path: Path) -> None:
    ids = small_ids(extra=extra, entity=entity)
    ids.save(tmp_path)
    facts = json.loads((tmp_path / "ids.json").read_text())
    assert facts == {
        "format": 2,
        "level_sizes": [4, 3, 2] if extra else [4, 3],
        "version": ids.version,
        "extra_level": extra,
        "entity": entity,
    }
    back = AdvertiserIds.load(tmp_path)
    assert (back.extra_level, back.entity, back.n_quantised) == (extra, entity, 2)
    assert back.version == ids.version


def test_the_same_ids_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        small_ids().save(tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_tokens_name_level_and_code() -> None:
    assert small_ids().tokens(1) == ["<adv_1_1>", "<adv_2_2>"]


def test_codes_lead_back_to_their_advertiser() -> None:
    ids = small_ids()
    trie = Trie.from_codes(ids.codes_AL, ids.level_sizes)
    assert trie.leaf_advertiser[trie.advertiser_leaf].tolist() == list(range(len(ids)))


def test_the_version_depends_on_every_part() -> None:
    ids = small_ids()
    codes = ids.codes_AL.copy()
    codes[0] = (0, 0)
    books = [book.copy() for book in ids.codebooks]
    books[1][0, 0] += 1
    others = [
        AdvertiserIds(np.array([7, 9, 12, 41]), ids.codes_AL, ids.codebooks),
        AdvertiserIds(ids.advertiser_ids, codes, ids.codebooks),
        AdvertiserIds(ids.advertiser_ids, ids.codes_AL, books),
    ]
    others.append(AdvertiserIds(ids.advertiser_ids, ids.codes_AL, ids.codebooks, entity="item"))
    zeros = [ids.codebooks[0], np.zeros_like(ids.codebooks[1])]
    others += [AdvertiserIds(ids.advertiser_ids, ids.codes_AL, zeros, extra_level=extra) for extra in (False, True)]
    assert len({ids.version, *(other.version for other in others)}) == 7


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        ([[0, 0], [0, 0], [1, 1], [2, 2]], "1 advertisers with the ID of another"),
        ([[0, 0], [0, 1], [4, 1], [2, 2]], "codes outside their codebooks"),
        ([[0, 0], [0, -1], [1, 1], [2, 2]], "codes outside their codebooks"),
        ([[0, 0], [0, 1]], "2) for 4 advertisers"),
        ([[0], [1], [2], [3]], "one row an advertiser, 2 levels"),
    ],
)
def test_codes_that_are_no_ids_are_refused(codes: list[list[int]], message: str) -> None:
    ids = small_ids()
    with pytest.raises(UserError) as refused:
        AdvertiserIds(ids.advertiser_ids, np.array(codes), ids.codebooks)
    assert message in str(refused.value)


def test_an_extra_level_must_not_quantise_or_stand_alone() -> None:
    ids = small_ids()
    for codes, books in ((ids.codes_AL, ids.codebooks), (np.arange(4)[:, None], [np.zeros((4, 5), np.float32)])):
        with pytest.raises(UserError, match="a last codebook of zero vectors"):
            AdvertiserIds(ids.advertiser_ids, codes, books, extra_level=True)


def test_an_unknown_entity_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="one of advertiser, item"):
        small_ids(entity="shop")


def other_format(directory: Path) -> None:
    facts = json.loads((directory / "ids.json").read_text())
    (directory / "ids.json").write_text(json.dumps(facts | {"format": 99}))


def first_format(directory: Path) -> None:
    """As it was before there were extra levels."""
    facts = json.loads((directory / "ids.json").read_text())
    old = {name: facts[name] for name in ("level_sizes", "version")}
    (directory / "ids.json").write_text(json.dumps({"format": 1} | old))


def other_entity(directory: Path) -> None:
    facts = json.loads((directory / "ids.json").read_text())
    (directory / "ids.json").write_text(json.dumps(facts | {"entity": "item"}))


def other_version(directory: Path) -> None:
    codes = pl.read_parquet(directory / "codes.parquet")
    codes.with_columns(advertiser_id=pl.col("advertiser_id") + 1).write_parquet(directory / "codes.parquet")


def truncated(directory: Path) -> None:
    path = directory / "codebooks.safetensors"
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_format, "expected: format 2"),
        (first_format, "advertiser IDs of format 1 in"),
        (other_version, "with version"),
        (other_entity, "with version"),
        (truncated, "as they were written"),
        (lambda directory: (directory / "codes.parquet").unlink(), "as they were written"),
        (lambda directory: (directory / "ids.json").write_text("{"), "as they were written"),
    ],
)
def test_a_damaged_or_foreign_table_is_refused(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    small_ids().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as refused:
        AdvertiserIds.load(tmp_path)
    assert message in str(refused.value)
    assert "stage=semantic_ids" in refused.value.action
