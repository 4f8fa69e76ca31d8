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


def small_ids(names: NDArray | None = None) -> AdvertiserIds:
    rng = np.random.default_rng(0)
    codes = np.array([[1, 0], [1, 2], [0, 2], [3, 1]], dtype=np.int64)
    names = np.array([7, 9, 12, 40]) if names is None else names
    return AdvertiserIds(names, codes, [rng.normal(size=(n, 5)).astype(np.float32) for n in (4, 3)])


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
    assert len({ids.version, *(other.version for other in others)}) == 4


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


def other_format(directory: Path) -> None:
    facts = json.loads((directory / "ids.json").read_text())
    (directory / "ids.json").write_text(json.dumps(facts | {"format": 99}))


def other_version(directory: Path) -> None:
    codes = pl.read_parquet(directory / "codes.parquet")
    codes.with_columns(advertiser_id=pl.col("advertiser_id") + 1).write_parquet(directory / "codes.parquet")


def truncated(directory: Path) -> None:
    path = directory / "codebooks.safetensors"
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_format, "expected: format 1"),
        (other_version, "with version"),
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
