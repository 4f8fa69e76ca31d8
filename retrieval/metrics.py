"""Measures of candidate lists against what was converted with.

Every per-request measure is a vector over requests, NaN where a request has no target of the kind asked
for, so that intervals and paired differences can be taken of it.

Shapes: R requests, K list length, T targets, I ads or advertisers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def hits(lists_RK: NDArray[np.int32], ptr: NDArray[np.int64], item_T: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which places of the lists hold a target of their request.

    Args:
        lists_RK: candidates, best first; -1 where a list is shorter.
        ptr: request ``r`` has the targets ``item_T[ptr[r]:ptr[r + 1]]``, distinct.
        item_T: targets.

    Returns:
        Shape ``(R, K)``.

    Raises:
        ValueError: a list names an item twice, or the number of requests differs.
    """
    if len(lists_RK) != len(ptr) - 1:
        raise ValueError(f"{len(lists_RK)} lists for the targets of {len(ptr) - 1} requests")
    ordered = np.sort(lists_RK, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise ValueError("a list names an item twice; hits would be counted twice")
    n_items = 1 + max(int(lists_RK.max(initial=-1)), int(item_T.max(initial=-1)))
    wanted = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr)) * n_items + item_T
    listed = np.arange(len(lists_RK))[:, None] * n_items + lists_RK
    return np.isin(listed, wanted) & (lists_RK >= 0)


def recall_at_k(hit_RK: NDArray[np.bool_], targets_R: NDArray[np.int64], k: int) -> Floats:
    """``hits among the first k / min(k, targets)``, NaN without targets."""
    return _ratio(hit_RK[:, :k].sum(1), np.minimum(targets_R, k))


def ndcg_at_k(hit_RK: NDArray[np.bool_], targets_R: NDArray[np.int64], k: int) -> Floats:
    """Discounted gain of the first k with binary relevance over that of a perfect list, NaN without targets."""
    discount_K = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.concatenate(([0.0], np.cumsum(discount_K)))[np.minimum(targets_R, k)]
    found = hit_RK[:, :k]
    return _ratio((found * discount_K[: found.shape[1]]).sum(1), ideal)


def reciprocal_rank(hit_RK: NDArray[np.bool_], targets_R: NDArray[np.int64], k: int) -> Floats:
    """One over the place of the first hit among the first k, 0 without a hit, NaN without targets."""
    found = hit_RK[:, :k]
    first = np.where(found.any(1), 1.0 / (1 + found.argmax(1)), 0.0)
    return np.where(targets_R > 0, first, np.nan)


def place_values(
    lists_RK: NDArray[np.int32], ptr: NDArray[np.int64], item_T: NDArray[np.int32], value_T: NDArray[np.floating]
) -> Floats:
    """Value of the target in each place of the lists, 0 where it holds none; arguments as of `hits`."""
    n_items = 1 + max(int(lists_RK.max(initial=-1)), int(item_T.max(initial=-1)))
    wanted_T = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr)) * n_items + item_T
    order_T = np.argsort(wanted_T)
    listed = np.arange(len(lists_RK))[:, None] * n_items + lists_RK
    if not len(item_T):
        return np.zeros(lists_RK.shape)
    place = np.minimum(np.searchsorted(wanted_T[order_T], listed), len(item_T) - 1)
    hit_RK = (wanted_T[order_T][place] == listed) & (lists_RK >= 0)
    return np.where(hit_RK, value_T[order_T][place], 0.0).astype(np.float64)


def value_recall_at_k(value_RK: Floats, ptr: NDArray[np.int64], value_T: NDArray[np.floating], k: int) -> Floats:
    """Value of the hits among the first k over the largest that k places can hold, NaN without a target of value.

    Args:
        value_RK: of `place_values`.
        ptr: targets of each request.
        value_T: value of each target, at least 0.
        k: list length.
    """
    row_T = np.repeat(np.arange(len(ptr) - 1), np.diff(ptr))
    order = np.lexsort((-value_T, row_T))
    rank = np.arange(len(order)) - np.repeat(ptr[:-1], np.diff(ptr))
    best = np.bincount(row_T[order][rank < k], value_T[order][rank < k], minlength=len(ptr) - 1)
    return _ratio(value_RK[:, :k].sum(1), best)


def coverage(lists_RK: NDArray[np.int32], eligible: NDArray[np.int32]) -> float:
    """Share of the eligible items (distinct) that stand in at least one list.

    Args:
        lists_RK: items, -1 for none.
        eligible: items that could have stood in a list.
    """
    if not len(eligible):
        return float("nan")
    listed = np.unique(lists_RK)
    return float(np.isin(np.unique(eligible), listed).mean())


def gini(exposures_I: NDArray[np.int64] | Floats) -> float:
    """Gini coefficient of exposures: 0 = all items alike, towards 1 = one item has them all.

    Args:
        exposures_I: how often each *eligible* item was shown, zeros included.
    """
    ordered = np.sort(np.asarray(exposures_I, dtype=np.float64))
    total = ordered.sum()
    if not len(ordered) or total == 0:
        return float("nan")
    n = len(ordered)
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))


def _ratio(numerator_R: NDArray, denominator_R: NDArray) -> Floats:
    result = np.full(len(numerator_R), np.nan)
    np.divide(numerator_R, denominator_R, out=result, where=denominator_R > 0)
    return result
