"""From a log to unique IDs: quality, determinism, resume, no leak, and bad input."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

from data.errors import UserError
from data.log import Log, load_log
from data.writer import write_tables
from models.rqvae import RQVAEConfig, RQVAEModule
from models.training import TrainerConfig
from semantic_ids import tokenize
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.config import EmbeddingConfig, EncoderConfig, PrecomputedConfig, RQKMeansConfig, SemanticIdsConfig
from semantic_ids.tokenize import (
    ENTITIES,
    FACTS,
    TOKENIZER,
    VECTORS,
    build_ids,
    embed_new,
    entity_embeddings,
    precomputed_content,
)
from semantic_ids.tokenizer import load_tokenizer, quantize
from semantic_ids.unique import sizes_that_hold
from tests.logs import tiny_config, tiny_log, tiny_tables


def config(*, sizes: tuple[int, ...] = (6, 6, 6), epochs: int = 4) -> SemanticIdsConfig:
    return SemanticIdsConfig(
        embedding=EmbeddingConfig(encoder=EncoderConfig(max_tokens=8), collaborative_dim=8),
        rqvae=RQVAEConfig(level_sizes=list(sizes), latent=8, hidden=16, batch_size=16),
        trainer=TrainerConfig(max_epochs=epochs, patience=None, accelerator="cpu", progress_bar=False),
    )


@pytest.fixture(autouse=True)
def words(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the encoder, which has tests of its own: bags of words."""

    def bag(texts: list[str], cfg: EncoderConfig, **_: object) -> np.ndarray:
        vocabulary = sorted({word for text in texts for word in text.split()})
        return np.array([[float(word in text.split()) for word in vocabulary] or [0.0] for text in texts])

    monkeypatch.setattr(tokenize, "text_embeddings", bag)


def content(ids: AdvertiserIds, directory: Path) -> dict[str, bytes]:
    directory.mkdir()
    ids.save(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_every_advertiser_has_an_id_of_its_own_and_those_alike_share_prefixes(tmp_path: Path) -> None:
    log = tiny_log(tmp_path, n_advertisers=60)
    built = build_ids(log, config(epochs=10), work_dir=tmp_path / "work")
    ids, embeddings, report = built.ids, built.embeddings, built.report
    assert ids.advertiser_ids.tolist() == log.advertiser_ids.tolist()
    assert len(np.unique(ids.codes_AL, axis=0)) == len(log.advertiser_ids) == 60
    assert ids.level_sizes == (6, 6, 6)
    assert embeddings.source_names == ("text", "collaborative")
    assert report["dead_codes"] == [0, 0, 0]
    assert report["entropy_ratio"][0] >= 0.9
    assert report["neighbour_preservation"][0] > 0.3


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    log = tiny_log(tmp_path)
    one, two = (build_ids(log, config(), work_dir=tmp_path / name).ids for name in ("one", "two"))
    other = build_ids(log, replace(config(), seed=1), work_dir=tmp_path / "three").ids
    assert content(one, tmp_path / "a") == content(two, tmp_path / "b")
    assert one.version != other.version


def test_a_stopped_training_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tiny_log(tmp_path)
    whole = build_ids(log, config(), work_dir=tmp_path / "whole").ids

    def stop(module: RQVAEModule) -> None:
        if module.current_epoch == 2:
            raise ConnectionAbortedError

    with monkeypatch.context() as patched:
        patched.setattr(RQVAEModule, "on_train_epoch_start", stop)
        with pytest.raises(ConnectionAbortedError):
            build_ids(log, config(), work_dir=tmp_path / "cut")
    resumed = build_ids(log, config(), work_dir=tmp_path / "cut").ids
    assert content(whole, tmp_path / "a") == content(resumed, tmp_path / "b")


def test_nothing_after_the_fit_span_changes_a_byte(tmp_path: Path) -> None:
    tables = tiny_tables()
    (tmp_path / "all").mkdir()
    write_tables(tables, tmp_path / "all")
    log = load_log(tmp_path / "all", tiny_config(), evaluate="validation")
    end = log.calendar.start(log.split.prior_fit[1] + 1)
    late = pl.col("timestamp") >= end
    reversed_late = tables.events.with_columns(
        advertiser_id=pl.when(late).then(229 - pl.col("advertiser_id")).otherwise(pl.col("advertiser_id")),
    ).filter(~late | (pl.col("event_id") % 3 > 0))
    (tmp_path / "changed").mkdir()
    write_tables(replace(tables, events=reversed_late), tmp_path / "changed")
    changed = load_log(tmp_path / "changed", tiny_config(), evaluate="validation")
    assert len(changed.events) < len(log.events)
    before = build_ids(log, config(), work_dir=tmp_path / "w1").ids
    after = build_ids(changed, config(), work_dir=tmp_path / "w2").ids
    assert content(before, tmp_path / "a") == content(after, tmp_path / "b")


def test_an_advertiser_without_an_event_still_has_an_id_from_its_text(tmp_path: Path) -> None:
    tables = tiny_tables()
    quiet = tables.events.filter((pl.col("advertiser_id") != 107) | (pl.col("timestamp") > pl.datetime(2024, 2, 20)))
    (tmp_path / "tables").mkdir()
    write_tables(replace(tables, events=quiet), tmp_path / "tables")
    log = load_log(tmp_path / "tables", tiny_config(), evaluate="validation")
    embeddings = entity_embeddings(log, config())
    text_dim = embeddings.source_dims[0]
    assert not embeddings.vectors_AD[7, text_dim:].any()
    assert embeddings.vectors_AD[7, :text_dim].any()
    ids = build_ids(log, config(), work_dir=tmp_path / "work").ids
    assert len(ids.tokens(7)) == 3


def with_texts(tmp_path: Path, texts: list[str], **sizes: int) -> Log:
    tables = tiny_tables(**sizes)
    advertisers = tables.advertisers.with_columns(
        text=pl.Series((texts * len(tables.advertisers))[: len(tables.advertisers)])
    )
    (tmp_path / "tables").mkdir()
    write_tables(replace(tables, advertisers=advertisers), tmp_path / "tables")
    return load_log(tmp_path / "tables", tiny_config(), evaluate="validation")


@pytest.mark.parametrize(
    ("texts", "collaborative_weight"),
    [
        pytest.param(["coffee"], 0.0, id="identical embeddings"),
        pytest.param([""], 0.0, id="zero vectors for all"),
        pytest.param(["", "coffee", "organic bread"], 1.0, id="some texts empty"),
    ],
)
def test_advertisers_that_nothing_tells_apart_still_get_unique_ids(
    texts: list[str], collaborative_weight: float, tmp_path: Path
) -> None:
    log = with_texts(tmp_path, texts, n_advertisers=50)
    cfg = config(sizes=(4, 4, 8))
    cfg = replace(cfg, embedding=replace(cfg.embedding, collaborative_weight=collaborative_weight))
    built = build_ids(log, cfg, work_dir=tmp_path / "work")
    ids, report = built.ids, built.report
    assert len(np.unique(ids.codes_AL, axis=0)) == 50
    assert np.isfinite(report["reconstruction_error"])


def test_fewer_advertisers_than_codes_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tiny_log(tmp_path, n_advertisers=10)
    with caplog.at_level(logging.WARNING, logger="semantic_ids.tokenize"):
        built = build_ids(log, config(sizes=(16, 16)), work_dir=tmp_path / "work")
        ids, report = built.ids, built.report
    assert "10 advertisers cannot use all of [16, 16] codes" in caplog.text
    assert len(ids) == 10
    assert report["dead_codes"][0] >= 6


def test_more_advertisers_than_ids_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tiny_log(tmp_path)
    monkeypatch.setattr(tokenize, "text_embeddings", lambda *_, **__: pytest.fail("texts were encoded"))
    with pytest.raises(UserError) as refused:
        build_ids(log, config(sizes=(3, 3, 3)), work_dir=tmp_path / "work")
    assert "30 advertisers for semantic_ids.rqvae.level_sizes=[3, 3, 3]" in refused.value.given
    assert str(sizes_that_hold(30, 3)) in refused.value.action


def test_embeddings_that_are_no_numbers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tiny_log(tmp_path)
    monkeypatch.setattr(tokenize, "text_embeddings", lambda texts, *_, **__: np.full((len(texts), 4), np.nan))
    with pytest.raises(UserError, match="30 text embeddings with NaN"):
        build_ids(log, config(), work_dir=tmp_path / "work")


def test_items_have_ids_from_the_texts_and_co_conversions_of_ads(tmp_path: Path) -> None:
    log = tiny_log(tmp_path, entity="item")
    built = build_ids(log, replace(config(sizes=(8, 8, 16)), entity="item"), work_dir=tmp_path / "work")
    assert built.ids.entity == "item"
    assert built.ids.advertiser_ids.tolist() == log.ad_ids.tolist()
    assert len(np.unique(built.ids.codes_AL, axis=0)) == len(log.ad_ids)
    known = built.embeddings.known()
    assert known["text"] == 1
    bought = np.unique(log.events.ad[log.is_purchase & (log.events.period <= log.split.prior_fit[1])])
    assert 0 < known["collaborative"] <= (bought >= 0).sum() / len(log.ad_ids)


def test_ids_of_items_are_not_made_from_a_log_of_advertisers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="IDs of items from a log of advertisers"):
        build_ids(tiny_log(tmp_path), replace(config(), entity="item"), work_dir=tmp_path / "work")


@pytest.mark.parametrize("entity", ["advertiser", "item"])
@pytest.mark.parametrize("tokenizer", ["rqvae", "rqkmeans"])
def test_the_artifact_encodes_and_tells_what_it_was_made_of(entity: str, tokenizer: str, tmp_path: Path) -> None:
    log = tiny_log(tmp_path, entity=entity)
    cfg = replace(config(sizes=(8, 8, 16)), entity=entity, tokenizer=tokenizer)
    built = build_ids(log, cfg, work_dir=tmp_path / "work")
    (tmp_path / "out").mkdir()
    built.save(tmp_path / "out", log, cfg)
    loaded, arrays = load_tokenizer(tmp_path / "out" / TOKENIZER), load_file(tmp_path / "out" / VECTORS)
    codes_AL, quantized_AE = quantize(loaded.latent(arrays["vectors_AD"]), loaded.codebooks)
    assert (codes_AL == arrays["greedy_AL"]).all()
    np.testing.assert_allclose(loaded.decode(quantized_AE), arrays["reconstruction_AD"], atol=1e-2)
    facts = json.loads((tmp_path / "out" / FACTS).read_text())
    assert (facts["entity"], facts["config"]["tokenizer"]) == (entity, tokenizer)
    assert sum(facts["source_dims"]) == arrays["vectors_AD"].shape[1]
    words = pl.read_parquet(tmp_path / "out" / ENTITIES)
    assert words.columns == ["advertiser_id", "name", "text"]
    assert words["advertiser_id"].to_list() == AdvertiserIds.load(tmp_path / "out").advertiser_ids.tolist()


def with_images(log: Log, path: Path, *, shift: float = 0.0) -> SemanticIdsConfig:
    vectors = np.random.default_rng(0).standard_normal((len(log.advertiser_ids), 5)) + shift
    pl.DataFrame({"advertiser_id": log.advertiser_ids, "vector": vectors}).write_parquet(path)
    cfg = config()
    return replace(cfg, embedding=replace(cfg.embedding, precomputed=[PrecomputedConfig(str(path), weight=0.5)]))


def test_precomputed_vectors_are_a_source_between_text_and_co_conversions(tmp_path: Path) -> None:
    log = tiny_log(tmp_path)
    embeddings = entity_embeddings(log, with_images(log, tmp_path / "images.parquet"))
    assert embeddings.source_names == ("text", "images", "collaborative")
    start = embeddings.source_dims[0]
    block = embeddings.vectors_AD[:, start : start + 5]
    np.testing.assert_allclose(np.linalg.norm(block, axis=1), 0.5, atol=1e-5)


def test_what_is_wrong_with_several_files_is_told_together(tmp_path: Path) -> None:
    log = tiny_log(tmp_path)
    missing = [PrecomputedConfig(str(tmp_path / name)) for name in ("one.parquet", "two.parquet")]
    cfg = replace(config(), embedding=replace(config().embedding, precomputed=missing))
    with pytest.raises(UserError) as refused:
        build_ids(log, cfg, work_dir=tmp_path / "work")
    assert "one.parquet" in str(refused.value)
    assert "two.parquet" in str(refused.value)


def test_the_stage_sees_another_content_of_a_precomputed_file(tmp_path: Path) -> None:
    log = tiny_log(tmp_path)
    before = precomputed_content(with_images(log, tmp_path / "images.parquet").embedding)
    after = precomputed_content(with_images(log, tmp_path / "images.parquet", shift=1.0).embedding)
    assert before != after
    assert precomputed_content(replace(config().embedding, precomputed=[PrecomputedConfig("none.parquet")])) == [None]


def test_new_entities_have_the_embedding_that_they_would_have_had(tmp_path: Path) -> None:
    log = tiny_log(tmp_path)
    cfg = with_images(log, tmp_path / "images.parquet")
    old = entity_embeddings(log, cfg)
    frame = log.tables.advertisers.select("advertiser_id", "text")
    new = embed_new(frame, cfg, source_names=old.source_names, source_dims=old.source_dims)
    assert (new.source_names, new.source_dims) == (old.source_names, old.source_dims)
    cold = old.source_dims[-1]
    np.testing.assert_allclose(new.vectors_AD[:, :-cold], old.vectors_AD[:, :-cold], atol=1e-6)
    assert not new.vectors_AD[:, -cold:].any()


def test_new_entities_that_the_files_lack_are_zero_there_and_another_encoder_is_refused(tmp_path: Path) -> None:
    log = tiny_log(tmp_path)
    cfg = with_images(log, tmp_path / "images.parquet")
    old = entity_embeddings(log, cfg)
    frame = log.tables.advertisers.select(pl.col("advertiser_id") + 5000, "text")
    new = embed_new(frame, cfg, source_names=old.source_names, source_dims=old.source_dims)
    assert not new.vectors_AD[:, old.source_dims[0] :].any()
    with pytest.raises(UserError, match="use the encoder the IDs were made with"):
        embed_new(frame, cfg, source_names=["text"], source_dims=[3])


def test_more_entities_than_ids_names_the_sizes_of_the_tokenizer_in_use(tmp_path: Path) -> None:
    log = tiny_log(tmp_path)
    cfg = replace(config(), tokenizer="rqkmeans", rqkmeans=RQKMeansConfig(level_sizes=[2, 2]))
    with pytest.raises(UserError, match=r"semantic_ids\.rqkmeans\.level_sizes=\[2, 2\]"):
        build_ids(log, cfg, work_dir=tmp_path / "work")
