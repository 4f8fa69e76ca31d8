from __future__ import annotations

import numpy as np
import pytest
from ir_measures import RR, Qrel, R, ScoredDoc, iter_calc, nDCG

from retrieval.metrics import (
    coverage,
    gini,
    hits,
    ndcg_at_k,
    place_values,
    recall_at_k,
    reciprocal_rank,
    value_recall_at_k,
)

LISTS = np.array([[4, 7, 1, 9], [2, 3, -1, -1], [5, 6, 7, 8]], dtype=np.int32)
PTR, ITEMS = np.array([0, 2, 3, 3]), np.array([1, 4, 9], dtype=np.int32)


def test_measures_by_hand() -> None:
    hit, count = hits(LISTS, PTR, ITEMS), np.diff(PTR)
    assert hit.tolist() == [[True, False, True, False], [False] * 4, [False] * 4]
    np.testing.assert_allclose(recall_at_k(hit, count, 1), [1.0, 0.0, np.nan])
    np.testing.assert_allclose(recall_at_k(hit, count, 2), [0.5, 0.0, np.nan])
    np.testing.assert_allclose(recall_at_k(hit, count, 4), [1.0, 0.0, np.nan])
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(ndcg_at_k(hit, count, 4), [(1 + 1 / np.log2(4)) / ideal, 0.0, np.nan])
    np.testing.assert_allclose(reciprocal_rank(hit, count, 4), [1.0, 0.0, np.nan])


def test_against_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    lists = np.stack([rng.permutation(30)[:12] for _ in range(40)]).astype(np.int32)
    wanted = [np.sort(rng.choice(30, rng.integers(0, 6), replace=False)) for _ in range(40)]
    ptr = np.concatenate([[0], np.cumsum([len(w) for w in wanted])])
    hit, count = hits(lists, ptr, np.concatenate(wanted).astype(np.int32)), np.diff(ptr)
    for k in (1, 3, 12):
        loop = [
            len(set(row[:k]) & set(w)) / min(k, len(w)) if len(w) else np.nan
            for row, w in zip(lists, wanted, strict=True)
        ]
        np.testing.assert_allclose(recall_at_k(hit, count, k), loop)
        gain = [
            sum(1 / np.log2(place + 2) for place, ad in enumerate(row[:k]) if ad in w)
            / sum(1 / np.log2(place + 2) for place in range(min(k, len(w))))
            if len(w)
            else np.nan
            for row, w in zip(lists, wanted, strict=True)
        ]
        np.testing.assert_allclose(ndcg_at_k(hit, count, k), gain)


def random_lists(n: int, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    lists = np.stack([rng.permutation(30)[:12] for _ in range(n)]).astype(np.int32)
    return lists, [np.sort(rng.choice(30, rng.integers(1, 6), replace=False)) for _ in range(n)]


def test_against_ir_measures() -> None:
    """The library's recall divides by all targets, ours by min(k, targets): the same where k is no less."""
    lists, wanted = random_lists(50, 2)
    ptr, k = np.concatenate([[0], np.cumsum([len(w) for w in wanted])]), 8
    hit, count = hits(lists, ptr, np.concatenate(wanted).astype(np.int32)), np.diff(ptr)
    relevant = [Qrel(str(row), str(ad), 1) for row, ads in enumerate(wanted) for ad in ads]
    run = [ScoredDoc(str(row), str(ad), -place) for row, ads in enumerate(lists) for place, ad in enumerate(ads)]
    ours = {
        R @ k: recall_at_k(hit, count, k),
        nDCG @ k: ndcg_at_k(hit, count, k),
        RR @ 12: reciprocal_rank(hit, count, 12),
    }
    theirs = {(one.measure, int(one.query_id)): one.value for one in iter_calc(list(ours), relevant, run)}
    for measure, values in ours.items():
        np.testing.assert_allclose(values, [theirs[measure, row] for row in range(50)], atol=1e-9)


def test_recall_by_value() -> None:
    value = np.array([3.0, 5.0, 0.0], dtype=np.float32)
    places = place_values(LISTS, PTR, ITEMS, value)
    assert places.tolist() == [[5.0, 0.0, 3.0, 0.0], [0.0] * 4, [0.0] * 4]
    np.testing.assert_allclose(value_recall_at_k(places, PTR, value, 1), [1.0, np.nan, np.nan])  # its target is free
    np.testing.assert_allclose(value_recall_at_k(places, PTR, value, 2), [5 / 8, np.nan, np.nan])
    np.testing.assert_allclose(value_recall_at_k(places, PTR, value, 4), [1.0, np.nan, np.nan])
    lists, wanted = random_lists(40, 3)
    ptr, items = np.concatenate([[0], np.cumsum([len(w) for w in wanted])]), np.concatenate(wanted).astype(np.int32)
    alike = np.ones(len(items), dtype=np.float32)
    hit = hits(lists, ptr, items)
    for k in (1, 4, 12):
        by_value = value_recall_at_k(place_values(lists, ptr, items, alike), ptr, alike, k)
        np.testing.assert_allclose(by_value, recall_at_k(hit, np.diff(ptr), k))


def test_a_list_that_names_an_item_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        hits(np.array([[3, 3]], dtype=np.int32), np.array([0, 1]), np.array([3], dtype=np.int32))


def test_coverage_and_concentration() -> None:
    assert coverage(LISTS, np.arange(10, dtype=np.int32)) == pytest.approx(0.9)
    assert gini(np.array([5, 5, 5, 5])) == pytest.approx(0.0)
    assert gini(np.array([0, 0, 0, 20])) == pytest.approx(0.75)
    assert np.isnan(gini(np.zeros(3)))
