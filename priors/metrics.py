"""Measures of a forecast: recall, NDCG and calibration over advertisers.

Shapes: R user-periods, A advertisers, T targets.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data.log import Targets

Float = NDArray[np.float64]

FLOOR, BINS = 1e-4, 15
"""Pairs of a user-period and an advertiser below this probability are left out of calibration's bins."""
_TARGETS, _CHUNK = 4096, 512


def target_ranks(score_RA: NDArray[np.floating], targets: Targets) -> NDArray[np.int64]:
    """Zero-based rank of every target in its row's list; of equal scores the lower index comes first.

    Args:
        score_RA: the higher, the better; ``-inf`` takes an advertiser out of the list, and such a target gets rank A.
        targets: rows as in ``score_RA``.

    Returns:
        ``(T,)``.
    """
    n, rank_T = score_RA.shape[1], np.empty(len(targets.item), dtype=np.int64)
    index_A, row_T = np.arange(n), targets.row
    for start in range(0, len(rank_T), _TARGETS):
        part = slice(start, start + _TARGETS)
        row_C, item_C = row_T[part], targets.item[part]
        score_CA = score_RA[row_C].astype(np.float64)
        own_C1 = score_CA[np.arange(len(row_C)), item_C][:, None]
        ahead_CA = (score_CA > own_C1) | ((score_CA == own_C1) & (index_A < item_C[:, None]))
        rank_T[part] = np.where(np.isfinite(own_C1[:, 0]), ahead_CA.sum(1), n)
    return rank_T


def chunks(targets: Targets) -> Iterator[Targets]:
    """Some user-periods at a time, in order, for distributions over all advertisers."""
    for start in range(0, len(targets), _CHUNK):
        yield targets.select(np.arange(start, min(start + _CHUNK, len(targets))))


def recall_at_k(rank_T: NDArray[np.int64], targets: Targets, k: int) -> Float:
    """Hits among the first k over min(k, targets) of each row, ``(R,)``; NaN for a row without targets."""
    hits = np.bincount(targets.row, rank_T < k, minlength=len(targets))
    possible = np.minimum(k, np.diff(targets.ptr))
    return np.where(possible > 0, hits / np.maximum(possible, 1), np.nan)


def ndcg_at_k(rank_T: NDArray[np.int64], targets: Targets, k: int) -> Float:
    """NDCG with gain 1 a target (Järvelin & Kekäläinen 2002), ``(R,)``; NaN for a row without targets."""
    gain_T = np.where(rank_T < k, 1 / np.log2(rank_T + 2.0), 0.0)
    gain = np.bincount(targets.row, gain_T, minlength=len(targets))
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(k) + 2.0))])
    possible = np.minimum(k, np.diff(targets.ptr))
    return np.where(possible > 0, gain / np.maximum(ideal[possible], 1e-12), np.nan)


def reliability(log_prob_RA: NDArray[np.floating], targets: Targets) -> dict[str, list[float]]:
    """:func:`reliability_of_pairs` of a whole forecast.

    Args:
        log_prob_RA: the forecast.
        targets: each target's observed share is 1 / number of targets of its row.
    """
    predicted, observed, _ = calibration_pairs(log_prob_RA, targets)
    return reliability_of_pairs(predicted, observed, n_rows=len(targets))


def calibration_pairs(log_prob_RA: NDArray[np.floating], targets: Targets) -> tuple[Float, Float, NDArray[np.integer]]:
    """Predicted and observed share, and row, of every pair of a row and an advertiser above `FLOOR`, in no order."""
    probability = np.exp(np.asarray(log_prob_RA, dtype=np.float64))
    share = np.zeros(log_prob_RA.shape)
    size_R = np.diff(targets.ptr)
    share[targets.row, targets.item] = 1 / size_R[targets.row]
    pairs = probability > FLOOR
    return probability[pairs], share[pairs], np.nonzero(pairs)[0]


def reliability_of_pairs(predicted: Float, observed: Float, *, n_rows: int) -> dict[str, list[float]]:
    """Predicted against observed share, in `BINS` bins that hold the same predicted mass.

    Args:
        predicted, observed: of :func:`calibration_pairs`.
        n_rows: user-periods they are of.

    Returns:
        ``predicted`` and ``observed``: mean of each bin; ``mass``: predicted mass of each, a mean over rows.
    """
    if not len(predicted):
        return {"predicted": [], "observed": [], "mass": []}
    order = np.argsort(predicted, kind="stable")
    predicted, observed = predicted[order], observed[order]
    edge = _edges(predicted)
    parts = [part for part in zip(np.split(predicted, edge), np.split(observed, edge), strict=True) if len(part[0])]
    return {
        "predicted": [float(p.mean()) for p, _ in parts],
        "observed": [float(o.mean()) for _, o in parts],
        "mass": [float(p.sum() / n_rows) for p, _ in parts],
    }


def _edges(rising: Float) -> NDArray[np.integer]:
    """Where bins of the same mass end, all but the last, in pairs in rising order."""
    cumulative = np.cumsum(rising)
    return np.searchsorted(cumulative, np.linspace(0, cumulative[-1], BINS + 1)[1:-1])


def mass_by_bin(predicted: Float, observed: Float, group: NDArray[np.integer], *, n_groups: int) -> tuple[Float, Float]:
    """Predicted and observed mass of groups of pairs in the bins of :func:`reliability_of_pairs`, ``(G, BINS)`` each.

    Args:
        predicted, observed: of :func:`calibration_pairs`, at least one pair.
        group: of each pair, such as its user.
        n_groups: G.

    Returns:
        Sums, from which :func:`error_of_mass` makes the error of any draw of groups.
    """
    order = np.argsort(predicted, kind="stable")
    place = np.searchsorted(_edges(predicted[order]), np.arange(len(order)), side="right")
    cell, n = group[order] * BINS + place, n_groups * BINS
    sums = [np.bincount(cell, side[order], n).reshape(-1, BINS).astype(np.float64) for side in (predicted, observed)]
    return sums[0], sums[1]


def error_of_mass(predicted_B: Float, observed_B: Float) -> float:
    """:func:`expected_calibration_error` of the masses in each bin."""
    return float(np.abs(predicted_B - observed_B).sum() / predicted_B.sum())


def expected_calibration_error(curve: dict[str, list[float]]) -> float:
    """Mean over the predicted mass of |predicted - observed| / predicted; .1 is ten percent off, NaN without a pair."""
    predicted, observed, mass = (np.array(curve[name]) for name in ("predicted", "observed", "mass"))
    if not len(mass):
        return float("nan")
    return float((mass * np.abs(predicted - observed) / predicted).sum() / mass.sum())
