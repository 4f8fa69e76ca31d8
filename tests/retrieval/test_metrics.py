from __future__ import annotations

import numpy as np
import pytest

from retrieval.metrics import coverage, gini, hits, ndcg_at_k, recall_at_k, reciprocal_rank

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


def test_a_list_that_names_an_item_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        hits(np.array([[3, 3]], dtype=np.int32), np.array([0, 1]), np.array([3], dtype=np.int32))


def test_coverage_and_concentration() -> None:
    assert coverage(LISTS, np.arange(10, dtype=np.int32)) == pytest.approx(0.9)
    assert gini(np.array([5, 5, 5, 5])) == pytest.approx(0.0)
    assert gini(np.array([0, 0, 0, 20])) == pytest.approx(0.75)
    assert np.isnan(gini(np.zeros(3)))
