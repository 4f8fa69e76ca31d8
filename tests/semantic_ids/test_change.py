"""IDs of a changed catalogue: growth is told from change, new ones find a place, a refit keeps what it can."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from data.artifacts import hash_directory
from data.errors import UserError
from data.log import Log, load_log
from data.writer import write_tables
from models.rqvae import RQVAEConfig
from models.training import TrainerConfig
from pipeline.ids_quality import quality_of
from semantic_ids import change, tokenize
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.change import (
    IdArtifact,
    assign,
    compare,
    kept_shares,
    match_codebooks,
    prefix_share,
    refit,
    renumbered,
    turned,
)
from semantic_ids.config import EmbeddingConfig, EncoderConfig, PrecomputedConfig, RQKMeansConfig, SemanticIdsConfig
from semantic_ids.embeddings import Embeddings, unit_rows
from semantic_ids.tokenize import build_ids, entities
from semantic_ids.tokenizer import quantize
from tests.logs import TINY_SPLIT, tiny_config, tiny_log, tiny_tables
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


# New entities

STYLES = ("organic", "family", "size", "premium", "light", "classic")
WORDS = (*STYLES, "coffee", "bread", "soap", "cheese", "pasta", "juice", "snacks", "candles", "tissues", "yogurt")


def bag(texts: list[str], cfg: EncoderConfig, **_: object) -> NDArray[np.float32]:
    """A stand-in for the encoder, which has tests of its own: bags of words."""
    return unit_rows(
        np.array([[float(word in text.split()) for word in WORDS] for text in texts]).reshape(-1, len(WORDS))
    )


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "text_embeddings", bag)
    monkeypatch.setattr(change, "text_embeddings", bag)


def config(tokenizer: str = "rqvae", sizes: tuple[int, ...] = (6, 6, 8), **changes: Any) -> SemanticIdsConfig:
    return SemanticIdsConfig(
        tokenizer=tokenizer,
        embedding=EmbeddingConfig(encoder=EncoderConfig(max_tokens=8), collaborative_dim=8),
        rqvae=RQVAEConfig(level_sizes=list(sizes), latent=8, hidden=16, batch_size=16),
        rqkmeans=RQKMeansConfig(level_sizes=list(sizes)),
        trainer=TrainerConfig(max_epochs=3, patience=None, accelerator="cpu", progress_bar=False),
        **changes,
    )


def make(log: Log, cfg: SemanticIdsConfig, directory: Path) -> Path:
    """The artifact of the stage."""
    directory.mkdir()
    built = build_ids(log, cfg, work_dir=directory.with_suffix(".work"))
    built.save(directory, log, cfg)
    texts = entities(log)["text"].to_list()
    save_file({"text_AE": bag(texts, cfg.embedding.encoder)}, directory / change.TEXT_VECTORS)
    return directory


@dataclass(frozen=True)
class Artifacts:
    log: Log
    rqvae: Path
    rqkmeans: Path
    folder: Path

    def of(self, kind: str) -> Path:
        return self.rqvae if kind == "rqvae" else self.rqkmeans


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    folder = tmp_path_factory.mktemp("ids")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tokenize, "text_embeddings", bag)
        log = tiny_log(folder, n_advertisers=60)
        rqvae, rqkmeans = (make(log, config(kind), folder / kind) for kind in ("rqvae", "rqkmeans"))
    return Artifacts(log, rqvae, rqkmeans, folder)


def some(
    ids: Sequence[Any] = (99, 130, 500), texts: Sequence[str | None] | None = None, **columns: Any
) -> pl.DataFrame:
    """New entities: one before all ids of the tiny log, one among them would be taken, one after."""
    texts = texts or ["organic coffee", "premium soap", "light bread"][: len(ids)]
    base = {
        "advertiser_id": pl.Series(ids, dtype=pl.Int32 if ids and isinstance(ids[0], int) else None),
        "name": [f"new {number}" for number in range(len(ids))],
        "text": list(texts),
    }
    return pl.DataFrame(base | columns)


NEW = some((99, 300, 500))


def assigned(directory: Path, frame: pl.DataFrame, output: Path, **options: Any) -> dict[str, Any]:
    output.mkdir()
    return assign(directory, frame, output, **options)


@pytest.mark.parametrize("kind", ["rqvae", "rqkmeans"])
def test_new_entities_get_ids_and_no_old_one_changes(kind: str, made: Artifacts, tmp_path: Path) -> None:
    directory = made.of(kind)
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    report = assigned(directory, NEW, tmp_path / "grown")
    old, new = AdvertiserIds.load(directory), AdvertiserIds.load(tmp_path / "grown")
    assert compare(old, new).only_grew
    assert len(new) == 63
    codes = [pl.read_parquet(folder / "codes.parquet") for folder in (directory, tmp_path / "grown")]
    assert codes[1].filter(~pl.col("advertiser_id").is_in([99, 300, 500])).equals(codes[0])
    assert codes[1]["advertiser_id"].is_sorted()
    for name in ("codebooks.safetensors", "tokenizer/tokenizer.json", "tokenizer/weights.safetensors"):
        assert (tmp_path / "grown" / name).read_bytes() == (directory / name).read_bytes()
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    assert report["assigned"]["new"] == 3
    assert report["assigned"]["before"] == 60
    assert report["advertisers"] == 63


def test_the_grown_artifact_is_whole_and_in_one_order(made: Artifacts, tmp_path: Path) -> None:
    assigned(made.rqvae, NEW, tmp_path / "grown")
    old, new = IdArtifact.load(made.rqvae), IdArtifact.load(tmp_path / "grown")
    kept = np.isin(new.ids.advertiser_ids, old.ids.advertiser_ids)
    assert np.flatnonzero(~kept).tolist() == [0, 61, 62]
    assert new.entities.filter(pl.Series(kept)).equals(old.entities)
    assert new.entities.filter(pl.Series(~kept))["text"].to_list() == NEW["text"].to_list()
    for name in ("greedy_AL", "reconstruction_AD", "text_AE"):
        assert np.array_equal(getattr(new, name)[kept], getattr(old, name))
    assert new.text_AE is not None
    np.testing.assert_allclose(new.text_AE[~kept], bag(NEW["text"].to_list(), new.cfg.embedding.encoder), atol=1e-6)
    assert np.array_equal(new.embeddings.vectors_AD[kept], old.embeddings.vectors_AD)
    text_dim = new.embeddings.source_dims[0]
    assert not new.embeddings.vectors_AD[~kept, text_dim:].any()  # cold: nobody has bought from them
    assert quality_of(tmp_path / "grown").entities == 63


def test_assigning_twice_or_at_once_keeps_growing(made: Artifacts, tmp_path: Path) -> None:
    assigned(made.rqvae, NEW.head(2), tmp_path / "one")
    assigned(tmp_path / "one", NEW.tail(1), tmp_path / "two")
    first, old = AdvertiserIds.load(tmp_path / "one"), AdvertiserIds.load(made.rqvae)
    assert compare(first, AdvertiserIds.load(tmp_path / "two")).only_grew
    assert compare(old, first).only_grew


def test_the_order_of_the_rows_changes_no_id(made: Artifacts, tmp_path: Path) -> None:
    assigned(made.rqvae, NEW, tmp_path / "one")
    assigned(made.rqvae, NEW.reverse(), tmp_path / "two")
    assert AdvertiserIds.load(tmp_path / "one").version == AdvertiserIds.load(tmp_path / "two").version


def test_known_ones_are_skipped_where_that_is_asked_for(made: Artifacts, tmp_path: Path) -> None:
    everyone = pl.concat([made.log.tables.advertisers.select(NEW.columns), NEW])
    report = assigned(made.rqvae, everyone, tmp_path / "grown", skip_known=True)
    assert report["assigned"]["new"] == 3
    assert compare(AdvertiserIds.load(made.rqvae), AdvertiserIds.load(tmp_path / "grown")).only_grew


def test_a_cold_one_lands_among_its_kind(made: Artifacts, tmp_path: Path) -> None:
    """Twins in words of old ones: as many of their nearest share their first code as among the old ones, or so."""
    twins = some(range(1000, 1030), made.log.tables.advertisers["text"].to_list()[:30])
    figures = assigned(made.rqvae, twins, tmp_path / "grown")["assigned"]
    assert figures["neighbour_share"][0] > 0.7 * figures["neighbour_share_before"][0]
    assert figures["neighbour_share"][0] > 2 * figures["neighbour_share_random"][0]


def test_nothing_known_is_counted_and_still_gets_an_id(made: Artifacts, tmp_path: Path) -> None:
    report = assigned(made.rqvae, some((99, 300), ["", None]), tmp_path / "grown")
    assert report["assigned"]["nothing_known"] == 2
    assert len(AdvertiserIds.load(tmp_path / "grown")) == 62


WHOLE_NUMBERS = [pl.Int64, pl.UInt16, pl.Int16]


@pytest.mark.parametrize("dtype", WHOLE_NUMBERS)
def test_whole_numbers_of_another_width_are_taken(dtype: Any, made: Artifacts, tmp_path: Path) -> None:
    assigned(made.rqvae, NEW.with_columns(pl.col("advertiser_id").cast(dtype)), tmp_path / "grown")
    assert pl.read_parquet_schema(tmp_path / "grown" / "codes.parquet")["advertiser_id"] == pl.Int32


BAD_FRAMES: dict[str, tuple[pl.DataFrame, list[str]]] = {
    "an id that is there": (some((99, 100, 101)), ["2 of 3 that have an ID already, e.g. 100", "--skip-known"]),
    "an id twice": (some((99, 99, 500)), ["1 ids in more than one row, e.g. 99"]),
    "no text": (NEW.drop("text"), ["without text", "name and text may be empty"]),
    "no column at all": (pl.DataFrame(), ["without advertiser_id, name, text"]),
    "ids as text": (NEW.with_columns(pl.col("advertiser_id").cast(pl.String)), ["of type String", "Int32", "e.g. 100"]),
    "ids as fractions": (NEW.with_columns(pl.col("advertiser_id").cast(pl.Float64)), ["of type Float64"]),
    "ids out of range": (NEW.with_columns(pl.col("advertiser_id").cast(pl.Int64) + 2**40), ["1099511627875", "Int32"]),
    "no id in a row": (some((99, None, 500)), ["1 rows without advertiser_id"]),
    "texts as numbers": (NEW.with_columns(text=pl.lit(1)), ["text of type Int32"]),
    "no row": (NEW.clear(), ["0 rows, none of them new"]),
    "several at once": (
        some((99, 99, None)).with_columns(text=pl.lit(1)).drop("name"),
        ["[4]", "without name", "text of type", "more than one row", "1 rows without"],
    ),
}


@pytest.mark.parametrize(("frame", "told"), BAD_FRAMES.values(), ids=BAD_FRAMES.keys())
def test_a_frame_that_cannot_be_used_is_refused(
    frame: pl.DataFrame, told: list[str], made: Artifacts, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as refused:
        assigned(made.rqvae, frame, tmp_path / "grown")
    assert all(part in str(refused.value) for part in told), str(refused.value)
    assert not list((tmp_path / "grown").iterdir())


def test_only_known_ones_are_nothing_to_do(made: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of them new"):
        assigned(made.rqvae, some((100, 101)), tmp_path / "grown", skip_known=True)


@pytest.mark.parametrize("missing", ["tokenizer", "embeddings.safetensors", "embeddings.json", "entities.parquet"])
def test_an_artifact_of_an_older_version_is_told(missing: str, made: Artifacts, tmp_path: Path) -> None:
    shutil.copytree(made.rqvae, tmp_path / "old")
    path = tmp_path / "old" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=f"without {missing}"):
        assigned(tmp_path / "old", NEW, tmp_path / "grown")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "embeddings cut off": lambda folder: os.truncate(folder / "embeddings.safetensors", 100),
    "no JSON": lambda folder: (folder / "embeddings.json").write_text("{"),
    "a setting that is none": lambda folder: (folder / "embeddings.json").write_text(
        (folder / "embeddings.json").read_text().replace('"seed"', '"seeed"')
    ),
    "other entities": lambda folder: NEW.write_parquet(folder / "entities.parquet"),
    "entities that are no table": lambda folder: (folder / "entities.parquet").write_text("no"),
    "texts cut off": lambda folder: os.truncate(folder / "text_embeddings.safetensors", 100),
    "a tokenizer cut off": lambda folder: os.truncate(folder / "tokenizer" / "weights.safetensors", 100),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_artifact_is_told(damage: Callable[[Path], object], made: Artifacts, tmp_path: Path) -> None:
    shutil.copytree(made.rqvae, tmp_path / "old")
    damage(tmp_path / "old")
    with pytest.raises(UserError, match="make the IDs again"):
        assigned(tmp_path / "old", NEW, tmp_path / "grown")


def test_an_encoder_that_changed_is_told(made: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tokenize, "text_embeddings", lambda *given, **options: np.roll(bag(*given, **options), 1, axis=1)
    )
    with pytest.raises(UserError, match="gives the old texts other vectors"):
        assigned(made.rqvae, NEW, tmp_path / "grown")


def test_more_than_there_are_ids_is_refused(made: Artifacts, tmp_path: Path) -> None:
    many = some(range(1000, 1000 + 6 * 6 * 8), ["organic coffee"] * (6 * 6 * 8))
    with pytest.raises(UserError, match="level_sizes"):
        assigned(made.rqvae, many, tmp_path / "grown")


def test_ids_as_text_keep_their_order(tmp_path: Path) -> None:
    """The grown table is in the order of a log with the new ones in it."""
    tables = tiny_tables()
    ids = (pl.lit("ä") + pl.col("advertiser_id").cast(pl.String)).alias("advertiser_id")
    frame = tables.advertisers.with_columns(ids)
    new = pl.DataFrame({"advertiser_id": ["b", "ä115x", "ö"], "name": ["b", "", "ö"], "text": ["light soap"] * 3})
    tables = replace(
        tables, advertisers=frame, ads=tables.ads.with_columns(ids), events=tables.events.with_columns(ids)
    )
    (tmp_path / "tables").mkdir()
    write_tables(tables, tmp_path / "tables")
    log = load_log(tmp_path / "tables", tiny_config(), evaluate="validation")
    directory = make(log, config(), tmp_path / "ids")
    assigned(directory, new, tmp_path / "grown")
    grown_ids = AdvertiserIds.load(tmp_path / "grown").advertiser_ids.tolist()
    assert grown_ids == pl.concat([frame, new.select(frame.columns)]).sort("advertiser_id")["advertiser_id"].to_list()


@pytest.mark.parametrize("id_column", ["advertiser_id", "ad_id"])
def test_items_grow_too(id_column: str, tmp_path: Path) -> None:
    log = tiny_log(tmp_path, entity="item")
    directory = make(log, config(sizes=(8, 8, 8), entity="item"), tmp_path / "ids")
    frame = NEW.rename({"advertiser_id": id_column})
    report = assigned(directory, frame, tmp_path / "grown")
    assert report["assigned"]["new"] == 3
    assert compare(AdvertiserIds.load(directory), AdvertiserIds.load(tmp_path / "grown")).only_grew


def with_images(made: Artifacts, folder: Path) -> Path:
    ids = made.log.advertiser_ids
    vectors = np.random.default_rng(0).normal(size=(len(ids), 4)).tolist()
    pl.DataFrame({"advertiser_id": ids, "vector": vectors}).write_parquet(folder / "images.parquet")
    images = PrecomputedConfig(path=str(folder / "images.parquet"))
    cfg = config()
    return make(made.log, replace(cfg, embedding=replace(cfg.embedding, precomputed=[images])), folder / "ids")


def test_precomputed_vectors_come_with_the_new_ones_or_from_their_file(made: Artifacts, tmp_path: Path) -> None:
    directory = with_images(made, tmp_path)
    vectors = pl.Series("images", [[1.0, 0.0, 0.0, 0.0], None, [0.0, 0.0, 2.0, 0.0]], dtype=pl.List(pl.Float32))
    assigned(directory, NEW.with_columns(vectors), tmp_path / "grown")
    new = IdArtifact.load(tmp_path / "grown")
    start = sum(new.embeddings.source_dims[: new.embeddings.source_names.index("images")])
    rows = np.isin(new.ids.advertiser_ids, NEW["advertiser_id"].to_numpy())
    assert new.embeddings.vectors_AD[rows, start : start + 4].tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assigned(directory, NEW, tmp_path / "without")
    assert not IdArtifact.load(tmp_path / "without").embeddings.vectors_AD[rows, start : start + 4].any()


def test_vectors_that_are_no_numbers_are_refused(made: Artifacts, tmp_path: Path) -> None:
    directory = with_images(made, tmp_path)
    bad = [[1.0, 0.0, float("nan"), 0.0]] * 2 + [[0.0] * 4]
    with pytest.raises(UserError, match="2 values of images that are NaN"):
        assigned(directory, NEW.with_columns(images=pl.Series(bad)), tmp_path / "grown")
    with pytest.raises(UserError, match="images"):
        assigned(directory, NEW.with_columns(images=pl.Series([[1.0]] * 3)), tmp_path / "narrow")


# After drift


def refitted(directory: Path, log: Log, output: Path, **options: Any) -> dict[str, Any]:
    output.mkdir()
    report = refit(directory, log, output, work_dir=output.with_suffix(".work"), **options)
    return dict(report["refit"])


def drifted(made: Artifacts, folder: Path, *, span: tuple[int, int] = (1, 4)) -> Log:
    """The log of other weeks."""
    split = replace(TINY_SPLIT, prior_fit=span, prior_select=(span[1] + 1, 6))
    return load_log(made.folder / "tables", tiny_config(split=split), evaluate="validation")


@pytest.mark.parametrize("kind", ["rqvae", "rqkmeans"])
def test_a_refit_on_the_same_log_keeps_nearly_all(kind: str, made: Artifacts, tmp_path: Path) -> None:
    figures = refitted(made.of(kind), made.log, tmp_path / "new")
    assert figures["kept_share"] >= 0.85
    assert (figures["in_both"], figures["new"], figures["gone"]) == (60, 0, 0)


@pytest.mark.parametrize("kind", ["rqvae", "rqkmeans"])
def test_after_drift_ids_are_unique_and_more_are_kept_than_from_scratch(
    kind: str, made: Artifacts, tmp_path: Path
) -> None:
    figures = refitted(made.of(kind), drifted(made, tmp_path), tmp_path / "new")
    old, new = IdArtifact.load(made.of(kind)), IdArtifact.load(tmp_path / "new")
    kept = kept_shares(old.ids.codes_AL, new.ids.codes_AL)
    assert figures["kept_share_by_level"] == pytest.approx(kept)
    assert kept == sorted(kept, reverse=True)
    assert figures["kept_share"] > figures["scratch_kept_share"]
    assert all(np.array_equal(*books) for books in zip(new.books, new.tokenizer.codebooks, strict=True))
    assert np.array_equal(new.greedy_AL, quantize(new.tokenizer.latent(new.embeddings.vectors_AD), new.books)[0])
    assert quality_of(tmp_path / "new").entities == 60


def test_the_tolerance_is_what_keeping_may_cost(made: Artifacts, tmp_path: Path) -> None:
    log, figures = drifted(made, tmp_path), {}
    for tolerance in (0.0, 0.05, 1e9):
        figures[tolerance] = refitted(made.rqvae, log, tmp_path / f"{tolerance}", tolerance=tolerance)
    shares = [figures[tolerance]["kept_share"] for tolerance in (0.0, 0.05, 1e9)]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert figures[0.0]["kept_as_greedy"] <= shares[0]
    errors = [figures[tolerance]["reconstruction_error_ids"] for tolerance in (0.0, 0.05, 1e9)]
    assert errors[0] <= errors[-1]
    before, after = (AdvertiserIds.load(folder).codes_AL for folder in (made.rqvae, tmp_path / "1000000000.0"))
    assert np.array_equal(before, after)


def test_the_rule_of_keeping_holds_for_every_entity(made: Artifacts) -> None:
    """Against its words: the longest prefix within the tolerance, whole IDs first."""
    old, tolerance = IdArtifact.load(made.rqvae), 0.02
    rng = np.random.default_rng(0)
    latent, x = old.tokenizer.latent(old.embeddings.vectors_AD), old.embeddings.vectors_AD
    codes = rng.permutation(old.greedy_AL)
    codes[:30] = old.greedy_AL[:30]
    kept_codes, kept = change.keep(old.tokenizer, old.embeddings, latent, codes, tolerance=tolerance)
    parts = [slice(0, old.embeddings.source_dims[0]), slice(old.embeddings.source_dims[0], x.shape[1])]

    def error(row: int, chosen: Sequence[int]) -> float:
        summed = sum(book[code] for book, code in zip(old.books, chosen, strict=True))
        made_of = old.tokenizer.decode(summed[None])[0]
        return float(sum(((x[row, part] - made_of[part]) ** 2).sum() for part in parts if x[row, part].any()))

    variance = sum(
        x[known, part].var(0).sum() * known.sum() for part in parts if (known := x[:, part].any(1)).any()
    ) / len(x)  # fmt: skip
    for row in range(len(x)):
        limit = error(row, old.greedy_AL[row]) + tolerance * variance
        expected = 0
        for levels in range(1, 4):
            rest = latent[row] - sum(book[code] for book, code in zip(old.books, codes[row, :levels], strict=False))
            tail = quantize(rest[None], old.books[levels:])[0][0].tolist() if levels < 3 else []
            if error(row, [*codes[row, :levels], *tail]) <= limit + 1e-6:
                expected = levels
        assert kept[row] == expected
        assert kept_codes[row, :expected].tolist() == codes[row, :expected].tolist()
    assert (kept[:30] == 3).all()
    assert (kept[30:] < 3).sum() > 0


def test_new_and_gone_entities(made: Artifacts, tmp_path: Path) -> None:
    tables = tiny_tables(n_advertisers=60)
    gone = tables.advertisers["advertiser_id"].to_list()[:5]
    here = ~pl.col("advertiser_id").is_in(gone)
    both = pl.concat([tables.advertisers.filter(here), NEW.with_columns(pl.col("advertiser_id").cast(pl.Int32))])
    ads = tables.ads.filter(here)
    placed = pl.col("ad_id").is_in(ads["ad_id"].implode())
    changed = replace(
        tables,
        advertisers=both,
        ads=ads,
        events=tables.events.filter(here),
        placements=tables.placements.filter(placed),
    )
    (tmp_path / "tables").mkdir()
    write_tables(changed, tmp_path / "tables")
    log = load_log(tmp_path / "tables", tiny_config(), evaluate="validation")
    figures = refitted(made.rqvae, log, tmp_path / "new")
    assert (figures["before"], figures["in_both"], figures["new"], figures["gone"]) == (60, 55, 3, 5)
    assert AdvertiserIds.load(tmp_path / "new").advertiser_ids.tolist() == log.advertiser_ids.tolist()


def test_a_refit_is_the_same_every_time(made: Artifacts, tmp_path: Path) -> None:
    log = drifted(made, tmp_path)
    for name in ("one", "two"):
        refitted(made.rqvae, log, tmp_path / name)
    assert AdvertiserIds.load(tmp_path / "one").version == AdvertiserIds.load(tmp_path / "two").version
    assert hash_directory(tmp_path / "one") == hash_directory(tmp_path / "two")


REFUSED: dict[str, tuple[Callable[[SemanticIdsConfig], SemanticIdsConfig], str]] = {
    "another tokenizer": (lambda cfg: replace(cfg, tokenizer="rqkmeans"), "semantic_ids.tokenizer=rqkmeans"),
    "other sizes": (
        lambda cfg: replace(cfg, rqvae=replace(cfg.rqvae, level_sizes=[4, 4, 8])),
        r"level_sizes=\[4, 4, 8\] for IDs made with \[6, 6, 8\]",
    ),
    "another entity": (lambda cfg: replace(cfg, entity="item"), "semantic_ids.entity=item"),
    "another source": (
        lambda cfg: replace(cfg, embedding=replace(cfg.embedding, collaborative_dim=4)),
        "the features of the sources",
    ),
}


@pytest.mark.parametrize(("other", "told"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_id_can_be_kept_under_is_refused(
    other: Callable[[SemanticIdsConfig], SemanticIdsConfig], told: str, made: Artifacts, tmp_path: Path
) -> None:
    cfg = IdArtifact.load(made.rqvae).cfg
    with pytest.raises(UserError, match=told):
        refitted(made.rqvae, made.log, tmp_path / "new", cfg=other(cfg))


@pytest.mark.parametrize("tolerance", [-0.1, float("nan")])
def test_a_tolerance_that_is_none_is_refused(tolerance: float, made: Artifacts, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tolerance"):
        refitted(made.rqvae, made.log, tmp_path / "new", tolerance=tolerance)


def test_the_log_of_others_is_refused(made: Artifacts, tmp_path: Path) -> None:
    tables = tiny_tables()
    ids = pl.col("advertiser_id") + 5000
    moved = replace(
        tables,
        advertisers=tables.advertisers.with_columns(ids),
        ads=tables.ads.with_columns(ids),
        events=tables.events.with_columns(ids),
    )
    (tmp_path / "tables").mkdir()
    write_tables(moved, tmp_path / "tables")
    log = load_log(tmp_path / "tables", tiny_config(), evaluate="validation")
    with pytest.raises(UserError, match=r"none of the 60 that have an ID, e\.g\. 100"):
        refitted(made.rqvae, log, tmp_path / "new")


def test_matching_finds_codes_that_were_dealt_out_anew() -> None:
    rng = np.random.default_rng(0)
    books = [rng.normal(size=(7, 5)) * length for length in (4.0, 1.0)]
    codes = np.stack([rng.integers(0, 7, 300), rng.integers(0, 7, 300)], axis=1)
    latent = books[0][codes[:, 0]] + books[1][codes[:, 1]] + rng.normal(size=(300, 5)) * 0.01
    order = [rng.permutation(7) for _ in books]
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]  # the new latent space may be turned as a whole
    new_books = [book[number] @ turn for book, number in zip(books, order, strict=True)]
    numbers = match_codebooks(latent @ turn, codes, books, new_books)
    for number, dealt in zip(numbers, order, strict=True):
        assert dealt[number].tolist() == list(range(7))


def test_a_code_without_members_takes_what_is_left_near_its_vector() -> None:
    old, new = [np.array([[0.0], [5.0], [9.0]])], [np.array([[8.8], [0.2], [5.2]])]
    codes = np.zeros((10, 1), dtype=np.int64)
    assert match_codebooks(np.full((10, 1), 0.1), codes, old, new)[0].tolist() == [1, 2, 0]


@pytest.mark.parametrize("kind", ["rqvae", "rqkmeans"])
def test_renumbering_moves_codes_and_changes_no_description(kind: str, made: Artifacts) -> None:
    artifact = IdArtifact.load(made.of(kind))
    rng = np.random.default_rng(1)
    numbers = [rng.permutation(len(book)) for book in artifact.books]
    other = renumbered(artifact.tokenizer, numbers)
    latent = artifact.tokenizer.latent(artifact.embeddings.vectors_AD)
    (codes, summed), (moved, again) = quantize(latent, artifact.books), quantize(latent, other.codebooks)
    assert all((number[moved[:, level]] == codes[:, level]).all() for level, number in enumerate(numbers))
    np.testing.assert_allclose(again, summed, atol=1e-6)
    assert all(np.array_equal(*books) for books in zip(artifact.tokenizer.codebooks, artifact.books, strict=True))


def test_turning_undoes_a_rotation_of_the_co_conversions_and_moves_nothing_else(made: Artifacts) -> None:
    old = IdArtifact.load(made.rqvae).embeddings
    start, turn = old.source_dims[0], np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    vectors = old.vectors_AD.copy()
    vectors[:, start:] = vectors[:, start:] @ turn.astype(np.float32)
    rows = np.arange(len(vectors))
    back = turned(replace(old, vectors_AD=vectors), old, rows, rows)
    np.testing.assert_allclose(back.vectors_AD, old.vectors_AD, atol=1e-5)
    assert np.array_equal(back.vectors_AD[:, :start], old.vectors_AD[:, :start])


def test_prefix_share_is_that_of_a_plain_computation() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 6)).astype(np.float32)
    vectors[:10, 4:] = 0  # unknown to the second source
    codes = rng.integers(0, 3, size=(40, 2))
    catalogue = Embeddings(vectors, ("text", "collaborative"), (4, 2))
    query, query_codes = rng.normal(size=(15, 6)).astype(np.float32), rng.integers(0, 3, size=(15, 2))
    query[:7, 4:] = 0
    query[14] = 0

    def plain(rows: NDArray, of: NDArray, itself: bool) -> list[float]:
        found = []
        for row in range(len(rows)):
            columns = [0, 1, 2, 3] * bool(rows[row, :4].any()) + [4, 5] * bool(rows[row, 4:].any())
            if not columns:
                continue
            distance = ((vectors[:, columns] - rows[row, columns]) ** 2).sum(1)
            distance[row if itself else []] = np.inf
            near = np.argsort(distance)[:10]
            found.append(np.logical_and.accumulate(codes[near] == of[row], axis=1).mean(0))
        return np.mean(found, axis=0).tolist()

    assert prefix_share(catalogue, codes, query, query_codes) == pytest.approx(plain(query, query_codes, False))
    assert prefix_share(catalogue, codes) == pytest.approx(plain(vectors, codes, True))
    assert all(np.isnan(prefix_share(catalogue, codes, query[14:], query_codes[14:])))
