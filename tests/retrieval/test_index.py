"""The ad index against exact search, how it changes while it serves, and what it refuses."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import UserError
from retrieval.index import KINDS, NO_AD, AdIndex, IndexConfig

RNG = np.random.default_rng(0)
VECTORS = RNG.normal(size=(400, 16)).astype(np.float32)
ADS = np.sort(RNG.choice(1000, 400, replace=False)).astype(np.int32)
QUERIES = RNG.normal(size=(5, 16)).astype(np.float32)


def config(kind: str, **changes: object) -> IndexConfig:
    """Search as wide as the few vectors here deserve."""
    values: dict[str, object] = {"kind": kind, "ivf_lists": 16, "ivf_probes": 16, "pq_bits": 6}
    return IndexConfig(**(values | changes))  # type: ignore[arg-type]


def exact(k: int, among: np.ndarray | None = None) -> np.ndarray:
    scores = QUERIES @ VECTORS.T
    if among is not None:
        scores[:, ~np.isin(ADS, among)] = -np.inf
    return ADS[np.argsort(-scores, axis=1, kind="stable")[:, :k]]


def overlap(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, expected, strict=True)]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filtered", [False, True])
def test_search_equals_exact_search_on_small_sets(kind: str, filtered: bool) -> None:
    index = AdIndex.build(VECTORS, ADS, config(kind))
    among = ADS[::3] if filtered else None
    found, scores = index.search(QUERIES, 10, among=among)
    share = overlap(found, exact(10, among))
    if kind == "pq":
        assert share >= 0.5
    else:
        assert share == 1.0 if kind != "hnsw" or filtered else share >= 0.8
    assert (np.diff(scores, axis=1) <= 1e-6).all()


@pytest.mark.parametrize("kind", ["exact", "hnsw", "ivf"])
def test_a_wide_filter_goes_through_the_index_and_holds(kind: str) -> None:
    index = AdIndex.build(VECTORS, ADS, config(kind, exact_up_to=10))
    found, _ = index.search(QUERIES, 10, among=ADS[::2])
    assert set(found.ravel()) <= set(ADS[::2])
    assert overlap(found, exact(10, ADS[::2])) >= 0.8


@pytest.mark.parametrize("kind", KINDS)
def test_ads_come_and_go_without_a_rebuild(kind: str) -> None:
    index = AdIndex.build(VECTORS[:300], ADS[:300], config(kind))
    index.add(VECTORS[300:], ADS[300:], until=7)
    assert len(index) == 400
    assert overlap(index.search(QUERIES, 10)[0], exact(10)) >= (0.5 if kind == "pq" else 0.8)

    gone = ADS[:300:2]
    assert index.remove(np.append(gone, 99_999).astype(np.int32)) == 150
    left = np.setdiff1d(ADS, gone)
    found = index.search(QUERIES, 10)[0]
    assert not np.isin(found, gone).any()
    assert overlap(found, exact(10, left)) >= (0.4 if kind == "pq" else 0.8)
    assert (index.search(QUERIES, 3, among=gone)[0] == NO_AD).all()
    assert not index.holds(gone).any()

    assert index.expire(6).tolist() == []
    assert index.expire(7).tolist() == ADS[300:].tolist()
    assert index.ads.tolist() == np.setdiff1d(left, ADS[300:]).tolist()
    assert len(index) == 150


def test_an_ad_that_is_added_again_has_its_new_vector_only() -> None:
    index = AdIndex.build(VECTORS, ADS, config("exact"))
    moved = (100 * QUERIES[:1]).astype(np.float32)
    index.add(moved, ADS[:1])
    found = index.search(QUERIES[:1], 400)[0][0]
    assert found[0] == ADS[0]
    assert sorted(found.tolist()) == ADS.tolist()
    np.testing.assert_array_equal(index.vectors(ADS[:1]), moved)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_index_finds_nothing_and_can_be_filled(kind: str) -> None:
    index = AdIndex.build(np.zeros((0, 16), np.float32), np.zeros(0, np.int32), config(kind, pq_bits=1))
    assert len(index) == 0
    assert (index.search(QUERIES, 3)[0] == NO_AD).all()
    index.add(VECTORS, ADS)
    assert len(index) == 400
    assert (index.search(QUERIES, 3)[0] != NO_AD).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_filled_later_finds_what_one_built_of_the_same_ads_does(kind: str) -> None:
    later = AdIndex.build(VECTORS[:0], ADS[:0], config(kind))
    later.add(VECTORS[:0], ADS[:0])
    later.add(VECTORS, ADS)
    built = AdIndex.build(VECTORS, ADS, config(kind))
    np.testing.assert_array_equal(later.search(QUERIES, 10)[0], built.search(QUERIES, 10)[0])


def test_an_index_that_no_gpu_knows_is_searched_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    def refuses(index: object) -> object:
        raise RuntimeError("this index type is not implemented on the GPU")

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", refuses, raising=False)
    index = AdIndex.build(VECTORS, ADS, config("exact"))
    np.testing.assert_array_equal(index.search(QUERIES, 10)[0], exact(10))


class OneAtATime:
    """Stands for an index on a GPU, which bears one search at a time and few neighbours."""

    def __init__(self, index: Any) -> None:
        self.index, self.busy, self.asked = index, threading.Lock(), list[int]()

    def search(self, queries: np.ndarray, k: int) -> Any:
        assert self.busy.acquire(blocking=False), "two searches at once"
        self.asked.append(k)
        time.sleep(0.001)
        found = self.index.search(queries, k)
        self.busy.release()
        return found


def test_searches_of_a_gpu_take_turns_and_long_lists_are_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    made: list[OneAtATime] = []

    def copied(index: Any) -> OneAtATime:
        made.append(OneAtATime(index))
        return made[-1]

    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", copied, raising=False)
    monkeypatch.setattr("retrieval.index._GPU_MAX_K", 20)
    index = AdIndex.build(VECTORS, ADS, config("exact"))
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: index.search(QUERIES, 10)[0], range(16)):
            np.testing.assert_array_equal(found, exact(10))
    assert made[-1].asked == [10] * 16
    np.testing.assert_array_equal(index.search(QUERIES, 30)[0], exact(30))
    assert made[-1].asked == [10] * 16


def test_concurrent_searches_see_the_index_before_or_after_a_change() -> None:
    index = AdIndex.build(VECTORS[:100], ADS[:100], config("hnsw"))
    failures: list[BaseException] = []
    done = threading.Event()

    def search() -> None:
        try:
            while not done.is_set():
                found, scores = index.search(QUERIES, 20)
                assert np.isin(found, ADS).all()
                assert (np.diff(scores, axis=1) <= 1e-6).all()
                index.search(QUERIES, 5, among=ADS[50:150])
                index.vectors(ADS[10:20])
                assert index.holds(ADS[:20]).all()
                held, vectors = index.held(ADS[:100])
                np.testing.assert_array_equal(vectors, VECTORS[:100][np.isin(ADS[:100], held)])
                assert np.isin(index.ads, ADS).all()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(4)]
    for thread in threads:
        thread.start()
    for start in range(100, 400, 10):
        index.add(VECTORS[start : start + 10], ADS[start : start + 10], until=start)
        assert len(index.expire(start - 10)) == (10 if start > 100 else 0)
    index.remove(ADS[20:60])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(index) == 70


def test_what_is_not_there_is_padded() -> None:
    index = AdIndex.build(VECTORS, ADS, config("exact"))
    found, scores = index.search(QUERIES[:1], 5, among=np.array([ADS[3], ADS[7], 999_999], dtype=np.int32))
    assert set(found[0, :2]) == {ADS[3], ADS[7]}
    assert found[0, 2:].tolist() == [NO_AD] * 3
    assert np.isneginf(scores[0, 2:]).all()
    assert index.search(QUERIES, 1000)[0].shape == (5, 1000)
    assert (index.search(QUERIES, 3, among=np.zeros(0, np.int32))[0] == NO_AD).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mapped", [False, True])
def test_saved_and_loaded_it_finds_the_same(tmp_path: Path, kind: str, mapped: bool) -> None:
    index = AdIndex.build(VECTORS, ADS, config(kind))
    index.remove(ADS[:50])
    index.save(tmp_path / "index")
    again = AdIndex.load(tmp_path / "index", config(kind, mapped=mapped), dim=16)
    np.testing.assert_array_equal(again.search(QUERIES, 7)[0], index.search(QUERIES, 7)[0])
    among = ADS[::2]
    np.testing.assert_array_equal(again.search(QUERIES, 7, among=among)[0], index.search(QUERIES, 7, among=among)[0])
    assert again.remove(ADS[50:60]) == 10  # a removed row is only passed over, so a mapped index can do it too
    if mapped:
        with pytest.raises(UserError, match="memory-mapped"):
            again.add(VECTORS[:1], ADS[:1])
    else:
        again.add(VECTORS[:1], ADS[:1])
        assert again.holds(ADS[:1]).all()


def nan_at(row: int) -> np.ndarray:
    vectors = VECTORS.copy()
    vectors[row, 3] = np.nan
    return vectors


BAD_VECTORS = [
    (nan_at(5), ADS, f"first is ad {ADS[5]}"),
    (VECTORS[:10], ADS, "one vector an ad"),
    (VECTORS[:2], np.array([3, 3], np.int32), "distinct"),
    (VECTORS[:2], np.array([3, -1], np.int32), "not negative"),
]


@pytest.mark.parametrize(("vectors", "ads", "message"), BAD_VECTORS)
def test_bad_vectors_are_told(vectors: np.ndarray, ads: np.ndarray, message: str) -> None:
    index = AdIndex.build(VECTORS, ADS, config("exact"))
    with pytest.raises(ValueError, match=message):
        AdIndex.build(vectors, ads, config("exact"))
    with pytest.raises(ValueError, match=message):
        index.add(vectors, ads)
    assert len(index) == 400


def test_bad_queries_and_ads_are_told() -> None:
    index = AdIndex.build(VECTORS, ADS, config("exact"))
    with pytest.raises(ValueError, match="width 16"):
        index.search(QUERIES[:, :8], 3)
    with pytest.raises(ValueError, match="NaN"):
        index.search(QUERIES * np.nan, 3)
    with pytest.raises(ValueError, match="k=0"):
        index.search(QUERIES, 0)
    with pytest.raises(ValueError, match="no vector"):
        index.vectors(np.array([999_999], dtype=np.int32))
    with pytest.raises(ValueError, match="width 8"):
        index.add(VECTORS[:, :8], ADS)


BAD_SETTINGS = [
    (lambda: IndexConfig(kind="annoy"), "kind=annoy"),
    (lambda: IndexConfig(device="tpu", ivf_lists=0), "(?s)device=tpu.*ivf_lists=0"),
    (lambda: IndexConfig(pq_bits=20), "pq_bits=20"),
    (lambda: AdIndex.build(VECTORS, ADS, IndexConfig(kind="pq", pq_segments=5)), "pq_segments=5.*width 16"),
]


@pytest.mark.parametrize(("make", "message"), BAD_SETTINGS)
def test_bad_settings_are_told(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


def test_another_index_than_asked_for_is_refused(tmp_path: Path) -> None:
    AdIndex.build(VECTORS, ADS, IndexConfig()).save(tmp_path / "index")
    with pytest.raises(UserError, match="ad index"):
        AdIndex.load(tmp_path / "index", IndexConfig(), dim=32)
    with pytest.raises(UserError, match="ad index"):
        AdIndex.load(tmp_path / "index", IndexConfig(kind="hnsw"), dim=16)
    assert AdIndex.saved_build(tmp_path / "index") == IndexConfig().build


def test_an_index_of_another_metric_is_refused(tmp_path: Path) -> None:
    import faiss

    AdIndex.build(VECTORS, ADS, IndexConfig()).save(tmp_path / "index")
    other = faiss.IndexFlatL2(16)
    other.add(VECTORS)
    faiss.write_index(other, str(tmp_path / "index" / "index.faiss"))
    with pytest.raises(UserError, match="another metric"):
        AdIndex.load(tmp_path / "index", IndexConfig(), dim=16)


@pytest.mark.parametrize("name", ["index.faiss", "ads.npy", "index.json"])
def test_a_damaged_index_is_told(tmp_path: Path, name: str) -> None:
    AdIndex.build(VECTORS, ADS, IndexConfig()).save(tmp_path / "index")
    (tmp_path / "index" / name).write_bytes(b"cut")
    with pytest.raises(UserError, match="ad index"):
        AdIndex.load(tmp_path / "index", IndexConfig(), dim=16)
