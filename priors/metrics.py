"""Measures of a forecast: recall, NDCG and calibration over advertisers (DESIGN §4).

Shapes: R user-periods, A advertisers, T targets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.log import Targets

Float = NDArray[np.float64]


def target_ranks(
    score_RA: NDArray[np.floating], targets: Targets, allowed_RA: NDArray[np.bool_] | None = None
) -> NDArray[np.int64]:
    """Zero-based rank of every target in its row's list; of equal scores the lower index comes first.

    Args:
        score_RA: the higher, the better.
        targets: rows as in ``score_RA``.
        allowed_RA: False takes an advertiser out of the list; a target outside it gets rank A.

    Returns:
        ``(T,)``.
    """
    score = np.asarray(score_RA, dtype=np.float64)
    if allowed_RA is not None:
        score = np.where(allowed_RA, score, -np.inf)
    order = np.argsort(-score, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.arange(score.shape[1])[None], axis=1)
    rank_T = rank[targets.row, targets.item]
    return np.where(np.isfinite(score[targets.row, targets.item]), rank_T, score.shape[1])


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


def reliability(
    log_prob_RA: NDArray[np.floating], targets: Targets, *, bins: int = 15, floor: float = 1e-4
) -> dict[str, list[float]]:
    """Predicted against observed share, in bins that hold the same predicted mass.

    Args:
        log_prob_RA: the forecast.
        targets: each target's observed share is 1 / number of targets of its row.
        bins: number of bins.
        floor: pairs below this probability are left out.

    Returns:
        ``predicted`` and ``observed``: mean of each bin; ``mass``: predicted mass of each, a mean over rows.
    """
    share = np.zeros(log_prob_RA.shape)
    share[targets.row, targets.item] = np.repeat(1 / np.diff(targets.ptr), np.diff(targets.ptr))
    probability = np.exp(np.asarray(log_prob_RA, dtype=np.float64))
    pairs = probability > floor
    predicted, observed = probability[pairs], share[pairs]
    order = np.argsort(predicted, kind="stable")
    predicted, observed = predicted[order], observed[order]
    cumulative = np.cumsum(predicted)
    edge = np.searchsorted(cumulative, np.linspace(0, cumulative[-1], bins + 1)[1:-1])
    parts = [part for part in zip(np.split(predicted, edge), np.split(observed, edge), strict=True) if len(part[0])]
    return {
        "predicted": [float(p.mean()) for p, _ in parts],
        "observed": [float(o.mean()) for _, o in parts],
        "mass": [float(p.sum() / len(targets)) for p, _ in parts],
    }


def expected_calibration_error(curve: dict[str, list[float]]) -> float:
    """Mean over the predicted mass of |predicted - observed| / predicted; .1 is ten percent off."""
    predicted, observed, mass = (np.array(curve[name]) for name in ("predicted", "observed", "mass"))
    return float((mass * np.abs(predicted - observed) / predicted).sum() / mass.sum())
