"""Tokenizers: code → vector → code, the same after saving, residual k-means by definition, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data.errors import UserError
from data.rules import MAX_SEED
from models.rqvae import CODEBOOKS, DISTANCES, RQVAEConfig
from models.training import TrainerConfig
from semantic_ids.config import RQKMeansConfig, SemanticIdsConfig
from semantic_ids.embeddings import Embeddings
from semantic_ids.tokenizer import (
    DESCRIPTION,
    WEIGHTS,
    RQKMeansTokenizer,
    Tokenizer,
    fit_tokenizer,
    load_tokenizer,
    quantize,
)

SIZES = [6, 5, 4]
FITTED = ("rqvae", "rqkmeans")
"""Tokenizers that are trained; names have tests of their own."""


def embeddings(n: int = 150, *, seed: int = 0) -> Embeddings:
    """Clustered vectors of two sources; the second knows nothing of every fifth entity."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((8, 14))
    vectors = centres[np.arange(n) % 8] + 0.3 * rng.standard_normal((n, 14))
    vectors[::5, 10:] = 0
    return Embeddings(vectors.astype(np.float32), ("text", "collaborative"), (10, 4))


def config(tokenizer: str, **rqvae: Any) -> SemanticIdsConfig:
    settings: dict[str, Any] = {"level_sizes": SIZES, "hidden": 16, "batch_size": 64, **rqvae}
    return SemanticIdsConfig(
        tokenizer=tokenizer,
        rqvae=RQVAEConfig(**settings),
        rqkmeans=RQKMeansConfig(level_sizes=SIZES),
        trainer=TrainerConfig(max_epochs=3, patience=None, accelerator="cpu", progress_bar=False),
    )


@pytest.fixture(scope="module", params=FITTED)
def fitted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return fit_tokenizer(embeddings(), config(request.param), work_dir=tmp_path_factory.mktemp("work"))


def test_a_seed_of_any_size_fits(tmp_path: Path) -> None:
    tokenizer = fit_tokenizer(embeddings(60), replace(config("rqkmeans"), seed=MAX_SEED), work_dir=tmp_path)
    assert [len(book) for book in tokenizer.codebooks] == SIZES


def encoded(tokenizer: Tokenizer, x_AD: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return quantize(tokenizer.latent(x_AD), tokenizer.codebooks)


def test_every_level_takes_the_nearest_vector_to_what_is_left(fitted: Tokenizer) -> None:
    latent, books = fitted.latent(embeddings().vectors_AD), fitted.codebooks
    codes, quantized = quantize(latent, books)
    residual = latent.astype(np.float64)
    for level, book in enumerate(books):
        distance = ((residual[:, None] - book[None]) ** 2).sum(-1)
        np.testing.assert_allclose(distance[np.arange(len(codes)), codes[:, level]], distance.min(1), atol=1e-4)
        residual = residual - book[codes[:, level]]
    np.testing.assert_allclose(latent - quantized, residual, atol=1e-4)


def test_codes_to_vectors_to_codes_where_levels_are_far_apart() -> None:
    rng = np.random.default_rng(0)
    books = [
        (rng.permutation(np.eye(7, 7)[:size]) * scale).astype(np.float32)
        for size, scale in zip(SIZES, (100, 10, 1), strict=True)
    ]
    codes = np.stack(np.unravel_index(np.arange(np.prod(SIZES)), SIZES), axis=1)
    vectors = np.sum([book[codes[:, level]] for level, book in enumerate(books)], axis=0)
    again, quantized = quantize(vectors, books)
    assert (again == codes).all()
    np.testing.assert_allclose(quantized, vectors, atol=1e-4)


def test_quantising_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch, fitted: Tokenizer) -> None:
    from semantic_ids import tokenizer

    whole = encoded(fitted, embeddings().vectors_AD)
    monkeypatch.setattr(tokenizer, "_BLOCK", 7)
    parts = encoded(fitted, embeddings().vectors_AD)
    assert (whole[0] == parts[0]).all()
    np.testing.assert_allclose(whole[1], parts[1], atol=1e-5)


def test_no_entities_give_no_codes(fitted: Tokenizer) -> None:
    codes, quantized = encoded(fitted, np.zeros((0, 14), dtype=np.float32))
    assert codes.shape == (0, 3)
    assert fitted.decode(quantized).shape == (0, 14)


def test_what_was_saved_encodes_and_decodes_the_same(fitted: Tokenizer, tmp_path: Path) -> None:
    fitted.save(tmp_path / "tokenizer")
    loaded, new = load_tokenizer(tmp_path / "tokenizer"), embeddings(40, seed=1).vectors_AD
    codes, quantized = encoded(fitted, new)
    again, same = encoded(loaded, new)
    assert (codes == again).all()
    assert (fitted.decode(quantized) == loaded.decode(same)).all()
    assert {path.name for path in (tmp_path / "tokenizer").iterdir()} == {DESCRIPTION, WEIGHTS}


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_every_kind_of_codebook_is_saved(codebook: str, distance: str, tmp_path: Path) -> None:
    cfg = config("rqvae", codebook=codebook, distance=distance)
    tokenizer = fit_tokenizer(embeddings(), cfg, work_dir=tmp_path / "work")
    tokenizer.save(tmp_path / "saved")
    x_AD = embeddings().vectors_AD
    assert (encoded(tokenizer, x_AD)[0] == encoded(load_tokenizer(tmp_path / "saved"), x_AD)[0]).all()


@pytest.mark.parametrize("name", FITTED)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(name: str, tmp_path: Path) -> None:
    for run, seed in (("one", 0), ("two", 0), ("other", 1)):
        cfg = replace(config(name), seed=seed)
        fit_tokenizer(embeddings(), cfg, work_dir=tmp_path / "work" / run).save(tmp_path / run)
    one, two, other = ((tmp_path / run / WEIGHTS).read_bytes() for run in ("one", "two", "other"))
    assert one == two
    assert one != other


def test_rqkmeans_is_kmeans_on_what_the_levels_before_left(tmp_path: Path) -> None:
    """At a fixed point of Lloyd's algorithm every vector is the mean of its members' residuals."""
    cfg = replace(config("rqkmeans"), rqkmeans=RQKMeansConfig(level_sizes=SIZES, iterations=200))
    tokenizer = fit_tokenizer(embeddings(), cfg, work_dir=tmp_path)
    residual = tokenizer.latent(embeddings().vectors_AD)
    codes, _ = quantize(residual, tokenizer.codebooks)
    np.testing.assert_allclose(residual.mean(0), 0, atol=1e-5)
    for level, book in enumerate(tokenizer.codebooks):
        for code in np.unique(codes[:, level]):
            np.testing.assert_allclose(book[code], residual[codes[:, level] == code].mean(0), atol=1e-4)
        residual = residual - book[codes[:, level]]


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize(
    "vectors",
    [
        pytest.param(np.ones((3000, 14)), id="thousands of identical embeddings"),
        pytest.param(np.zeros((50, 14)), id="zero vectors alone"),
        pytest.param(np.random.default_rng(0).standard_normal((3, 14)), id="fewer entities than codes"),
        pytest.param(np.ones((1, 14)), id="one entity"),
    ],
)
def test_odd_sets_of_embeddings_have_a_tokenizer(name: str, vectors: NDArray[np.float64], tmp_path: Path) -> None:
    odd = replace(embeddings(), vectors_AD=vectors.astype(np.float32))
    tokenizer = fit_tokenizer(odd, config(name), work_dir=tmp_path)
    codes, quantized = encoded(tokenizer, odd.vectors_AD)
    assert len(np.unique(codes, axis=0)) == len(np.unique(odd.vectors_AD, axis=0))
    np.testing.assert_allclose(tokenizer.decode(quantized), odd.vectors_AD, atol=0.6)
    assert all(np.isfinite(book).all() for book in tokenizer.codebooks)


@pytest.mark.parametrize("name", FITTED)
def test_a_warm_start_keeps_most_codes_where_a_cold_one_does_not(name: str, tmp_path: Path) -> None:
    old = fit_tokenizer(embeddings(), config(name), work_dir=tmp_path / "old")
    today = embeddings(170)
    shared = today.vectors_AD[:150]
    cfg = replace(config(name), seed=7)
    warm = fit_tokenizer(today, cfg, work_dir=tmp_path / "warm", start=old)
    cold = fit_tokenizer(today, cfg, work_dir=tmp_path / "cold")
    before = encoded(old, shared)[0][:, 0]
    assert (encoded(warm, shared)[0][:, 0] == before).mean() > 0.8
    assert (encoded(cold, shared)[0][:, 0] == before).mean() < 0.8


def test_samples_beyond_the_epoch_and_the_start_are_seen_in_turn(tmp_path: Path) -> None:
    cfg = config("rqvae", samples_per_epoch=50, initial_samples=60)
    tokenizer = fit_tokenizer(embeddings(), cfg, work_dir=tmp_path)
    assert len(np.unique(encoded(tokenizer, embeddings().vectors_AD)[0], axis=0)) > 8


WRONG_STARTS: dict[str, Callable[[], tuple[SemanticIdsConfig, Embeddings]]] = {
    "another kind": lambda: (config("rqvae"), embeddings()),
    "other level sizes": lambda: (
        replace(config("rqkmeans"), rqkmeans=RQKMeansConfig(level_sizes=[6, 5])),
        embeddings(),
    ),
    "other features": lambda: (config("rqkmeans"), replace(embeddings(), vectors_AD=np.ones((9, 3), np.float32))),
}


@pytest.mark.parametrize("case", WRONG_STARTS.values(), ids=WRONG_STARTS.keys())
def test_a_start_that_does_not_fit_is_refused(
    case: Callable[[], tuple[SemanticIdsConfig, Embeddings]], tmp_path: Path
) -> None:
    start = RQKMeansTokenizer(np.zeros(14, np.float32), tuple(np.ones((size, 14), np.float32) for size in SIZES))
    cfg, today = case()
    with pytest.raises(UserError, match="train from scratch"):
        fit_tokenizer(today, cfg, work_dir=tmp_path, start=start)


def test_no_entities_and_other_features_are_refused(fitted: Tokenizer, tmp_path: Path) -> None:
    nobody = replace(embeddings(), vectors_AD=np.zeros((0, 14), dtype=np.float32))
    with pytest.raises(UserError, match="no entities"):
        fit_tokenizer(nobody, config("rqkmeans"), work_dir=tmp_path)
    with pytest.raises(UserError, match="14 features"):
        fitted.latent(np.ones((3, 9), dtype=np.float32))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "as they were written"),
    "broken weights": (lambda path: (path / WEIGHTS).write_bytes(b"broken"), "as they were written"),
    "broken description": (lambda path: (path / DESCRIPTION).write_text("{"), "as they were written"),
    "another format": (
        lambda path: (path / DESCRIPTION).write_text(json.dumps({"format": 99, "kind": "rqvae"})),
        "of format 1",
    ),
    "another kind": (
        lambda path: (path / DESCRIPTION).write_text(json.dumps({"format": 1, "kind": "opq"})),
        "rqvae or rqkmeans",
    ),
}


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_folder_is_refused(damage: Callable[[Path], Any], expected: str, tmp_path: Path) -> None:
    books = tuple(np.ones((size, 14), dtype=np.float32) for size in SIZES)
    RQKMeansTokenizer(np.zeros(14, dtype=np.float32), books).save(tmp_path / "tokenizer")
    damage(tmp_path / "tokenizer")
    with pytest.raises(UserError, match=expected):
        load_tokenizer(tmp_path / "tokenizer")
