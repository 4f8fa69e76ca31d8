"""The ad index against exact search, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.errors import UserError
from retrieval.index import NO_AD, AdIndex, IndexConfig

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(400, 16)).astype(np.float32)
ADS = np.sort(RNG.choice(1000, 400, replace=False)).astype(np.int32)
QUERIES = RNG.normal(size=(5, 16)).astype(np.float32)


def exact(k: int, among: np.ndarray | None = None) -> np.ndarray:
    scores = QUERIES @ VECTORS.T
    if among is not None:
        scores[:, ~np.isin(ADS, among)] = -np.inf
    return ADS[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivf"])
@pytest.mark.parametrize("filtered", [False, True])
def test_search_equals_exact_search_on_small_sets(kind: str, filtered: bool) -> None:
    index = AdIndex.build(VECTORS, ADS, IndexConfig(kind=kind, ivf_probes=64))
    among = ADS[::3] if filtered else None
    found, scores = index.search(QUERIES, 10, among=among)
    overlap = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, exact(10, among), strict=True)])
    assert overlap == 1.0 if kind == "exact" or filtered else overlap >= 0.8
    assert (np.diff(scores, axis=1) <= 1e-6).all()


def test_what_is_not_there_is_padded() -> None:
    index = AdIndex.build(VECTORS, ADS, IndexConfig())
    found, scores = index.search(QUERIES[:1], 5, among=np.array([ADS[3], ADS[7], 999_999], dtype=np.int32))
    assert set(found[0, :2]) == {ADS[3], ADS[7]}
    assert found[0, 2:].tolist() == [NO_AD] * 3
    assert np.isneginf(scores[0, 2:]).all()
    assert index.search(QUERIES, 1000)[0].shape == (5, 1000)
    assert (index.search(QUERIES, 3, among=np.zeros(0, np.int32))[0] == NO_AD).all()


def test_an_empty_index_finds_nothing() -> None:
    index = AdIndex.build(np.zeros((0, 16), np.float32), np.zeros(0, np.int32), IndexConfig())
    assert len(index) == 0
    assert (index.search(QUERIES, 3)[0] == NO_AD).all()


def test_saved_and_loaded_it_finds_the_same(tmp_path: Path) -> None:
    index = AdIndex.build(VECTORS, ADS, IndexConfig())
    index.save(tmp_path / "index")
    again = AdIndex.load(tmp_path / "index", IndexConfig(), dim=16)
    np.testing.assert_array_equal(again.search(QUERIES, 7)[0], index.search(QUERIES, 7)[0])


def nan_at(row: int) -> np.ndarray:
    vectors = VECTORS.copy()
    vectors[row, 3] = np.nan
    return vectors


BAD_BUILDS = [
    (nan_at(5), ADS, f"first is ad {ADS[5]}"),
    (VECTORS[:10], ADS, "one vector an ad"),
    (VECTORS, ADS[::-1], "ascending"),
]


@pytest.mark.parametrize(("vectors", "ads", "message"), BAD_BUILDS)
def test_bad_vectors_are_told(vectors: np.ndarray, ads: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdIndex.build(vectors, ads, IndexConfig())


def test_bad_queries_and_ads_are_told() -> None:
    index = AdIndex.build(VECTORS, ADS, IndexConfig())
    with pytest.raises(ValueError, match="width 16"):
        index.search(QUERIES[:, :8], 3)
    with pytest.raises(ValueError, match="NaN"):
        index.search(QUERIES * np.nan, 3)
    with pytest.raises(ValueError, match="k=0"):
        index.search(QUERIES, 0)
    with pytest.raises(ValueError, match="no vector"):
        index.vectors(np.array([999_999], dtype=np.int32))


def test_another_index_than_asked_for_is_refused(tmp_path: Path) -> None:
    AdIndex.build(VECTORS, ADS, IndexConfig()).save(tmp_path / "index")
    with pytest.raises(UserError, match="ad index"):
        AdIndex.load(tmp_path / "index", IndexConfig(), dim=32)
    with pytest.raises(UserError, match="ad index"):
        AdIndex.load(tmp_path / "index", IndexConfig(kind="hnsw"), dim=16)
    (tmp_path / "index" / "index.faiss").write_bytes(b"cut")
    with pytest.raises(UserError, match="ad index"):
        AdIndex.load(tmp_path / "index", IndexConfig(), dim=16)
