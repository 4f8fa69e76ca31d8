"""IDs spelled by names: words and prefixes, numbers for namesakes, the order of rows, new names, and bad input."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray

from data.errors import UserError
from data.log import Log
from semantic_ids import tokenize
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.change import IdArtifact, assign, refit
from semantic_ids.config import EncoderConfig, NamesConfig, SemanticIdsConfig
from semantic_ids.embeddings import unit_rows
from semantic_ids.names import spell
from semantic_ids.tokenize import BuiltIds, build_ids
from semantic_ids.tokenizer import fit_tokenizer
from tests.logs import tiny_log

CFG = SemanticIdsConfig(tokenizer="names")
NAMES = (
    "Faber-Castell", "Faber", "Faber-Castell Premium", "CRAYOLA", "3M", "3M Post-it Notes (office)", "3M Post it Notes",
    None,
)  # fmt: skip
NAMESAKES = (5, 6)
"""Rows that agree in their first three words."""


def hashed(texts: Sequence[str], cfg: EncoderConfig, **_: object) -> NDArray[np.float32]:
    """A stand-in for the encoder, which has tests of its own: any word has a direction of its own."""
    vectors = [
        np.random.default_rng(zlib.crc32(text.encode())).standard_normal(12) if text else np.zeros(12) for text in texts
    ]
    return unit_rows(np.array(vectors).reshape(-1, 12))


@pytest.fixture(autouse=True)
def encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "text_embeddings", hashed)


@cache
def whole_log() -> Log:
    with tempfile.TemporaryDirectory() as folder:
        return tiny_log(Path(folder))


def named(names: Sequence[str | None] = NAMES) -> Log:
    """The first advertisers of the tiny log under other names; who bought what has no say here."""
    log, n = whole_log(), len(names)
    advertisers = log.tables.advertisers.head(n).with_columns(name=pl.Series(names, dtype=pl.String))
    tables = replace(log.tables, advertisers=advertisers)
    return replace(log, tables=tables, advertiser_ids=log.advertiser_ids[:n])


def built(names: Sequence[str | None] = NAMES, cfg: SemanticIdsConfig = CFG) -> BuiltIds:
    return build_ids(named(names), cfg, work_dir=Path("not used"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Faber-Castell", ["faber", "castell", ""]),
        ("  L'Oréal  PARIS ", ["l", "oréal", "paris"]),
        ("one two three four", ["one", "two", "three"]),
        ("--", ["", "", ""]),
        (None, ["", "", ""]),
    ],
)
def test_a_name_is_split_into_lower_case_words(name: str | None, words: list[str]) -> None:
    assert spell([name], 3) == [words]


def test_names_share_the_codes_of_the_words_they_begin_with_and_namesakes_are_numbered() -> None:
    made = built()
    ids, words = made.ids, spell(NAMES, 3)
    assert len(np.unique(ids.codes_AL, axis=0)) == len(NAMES)
    assert (made.greedy_AL == ids.codes_AL[:, :3]).all()
    for one in range(len(NAMES)):
        for other in range(len(NAMES)):
            same = [a == b for a, b in zip(words[one], words[other], strict=True)]
            assert (ids.codes_AL[one, :3] == ids.codes_AL[other, :3]).tolist() == same
    assert ids.extra_level
    assert ids.codes_AL[list(NAMESAKES), 3].tolist() == [0, 1]
    assert ids.level_sizes == (4, 3, 3, 2)  # the words of each place and none; the numbers
    assert not ids.codes_AL[-1].any()  # nothing is known


def test_a_code_has_the_vector_of_its_word() -> None:
    made = built()
    for level in range(3):
        book = made.ids.codebooks[level].reshape(-1, 3, 12)
        assert not np.delete(book, level, axis=1).any()
        own = hashed([words[level] for words in spell(NAMES, 3)], EncoderConfig())
        np.testing.assert_allclose(book[made.ids.codes_AL[:, level], level], own, atol=1e-6)
    assert [vectors.shape[1] for vectors in made.ids.code_vectors] == [12, 12, 12, 36]
    np.testing.assert_allclose(made.reconstruction_AD, made.embeddings.vectors_AD, atol=1e-6)


def test_the_order_of_the_names_changes_no_id() -> None:
    unique = [name for row, name in enumerate(NAMES) if row not in NAMESAKES[1:]]
    one, two = (built(names) for names in (unique, unique[::-1]))
    assert not one.ids.extra_level
    assert np.array_equal(one.ids.codes_AL, two.ids.codes_AL[::-1])
    assert all(map(np.array_equal, one.ids.codebooks, two.ids.codebooks))


def test_one_level_has_first_words_and_numbers() -> None:
    ids = built(cfg=replace(CFG, names=NamesConfig(levels=1))).ids
    assert ids.level_sizes == (4, 3)
    assert len(np.unique(ids.codes_AL, axis=0)) == len(NAMES)


def test_items_are_spelled_by_what_they_are_called(tmp_path: Path) -> None:
    log = tiny_log(tmp_path, entity="item")
    ids = build_ids(log, replace(CFG, entity="item"), work_dir=tmp_path / "work").ids
    words = spell(log.tables.advertisers["name"].to_list(), 3)
    assert len(np.unique(ids.codes_AL[:, :3], axis=0)) == len({tuple(found) for found in words})


def test_without_any_name_there_is_nothing_to_spell() -> None:
    with pytest.raises(UserError, match="6 names without a word"):
        built(["", None, " - ", "", "", ""])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    log = named()
    directory = tmp_path / "old"
    directory.mkdir()
    build_ids(log, CFG, work_dir=tmp_path / "work").save(directory, log, CFG)
    return directory


def new(names: Sequence[str | None]) -> dict[str, Any]:
    return {"advertiser_id": range(9001, 9001 + len(names)), "name": names, "text": "any"}


def test_a_new_name_takes_the_codes_of_the_words_that_are_known(old: Path, tmp_path: Path) -> None:
    names = ["Crayola Notes", "Faber Post Premium", "3M", "unheard of"]
    frame = pl.DataFrame(new(names), schema_overrides={"advertiser_id": pl.Int32})
    (tmp_path / "grown").mkdir()
    report = assign(old, frame, tmp_path / "grown")
    before, after = AdvertiserIds.load(old), AdvertiserIds.load(tmp_path / "grown")
    assert (after.codes_AL[: len(before)] == before.codes_AL).all()
    crayola, faber, three_m, unheard = after.codes_AL[len(before) :]
    assert crayola[0] == before.codes_AL[NAMES.index("CRAYOLA"), 0]
    assert faber[:3].tolist() == [before.codes_AL[1, 0], before.codes_AL[5, 1], before.codes_AL[2, 2]]
    assert three_m.tolist() == [*before.codes_AL[NAMES.index("3M"), :3], 1]  # a namesake: the next number
    assert (unheard < after.level_sizes).all()
    assert report["assigned"]["nothing_known"] == 0


def test_a_refit_is_refused_with_what_to_do(old: Path, tmp_path: Path) -> None:
    (tmp_path / "next").mkdir()
    with pytest.raises(UserError, match="adsid ids assign"):
        refit(old, named(), tmp_path / "next", work_dir=tmp_path / "scratch")
    artifact = IdArtifact.load(old)
    with pytest.raises(ValueError, match="not trained"):
        fit_tokenizer(artifact.embeddings, CFG, work_dir=tmp_path, start=artifact.tokenizer)
