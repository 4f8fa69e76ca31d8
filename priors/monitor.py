"""Whether forecasts still say what happens: predicted against observed mass, period by period, and calibration.

A request's targets share an observed mass of 1. Of the requests of a period, the mean of what was predicted and the
mean of what was observed are compared for the whole list and for every level-1 prefix, which are stored in the table:

    z = mean(observed - predicted) / (deviation of it / sqrt(requests))

A period has *drifted* where a z is beyond what chance gives once in a thousand periods, all prefixes together.

Shapes: R requests (user-periods with targets), T targets, N level-1 prefixes, A advertisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from data.log import Targets
from priors.artifact import PriorModel
from priors.calibration import Calibration
from priors.config import PriorConfig
from priors.decode import TreeDecoder
from priors.metrics import reliability
from priors.table import PriorTable
from semantic_ids.trie import Trie

CHANCE = 1e-3
"""Of a false alarm a period, all comparisons together."""
_FEWEST_REQUESTS, _FEWEST_TARGETS = 30, 5.0

Float = NDArray[np.float64]


@dataclass(frozen=True)
class PeriodDrift:
    """Predicted and observed mass of one period.

    Attributes:
        period: of the targets.
        requests: with a forecast.
        predicted, observed: mass of the lists, and the targets' share in them.
        z: of their difference.
        code: level-1 code that is farthest off; None where no prefix has enough mass to tell.
        code_predicted, code_observed, code_z: the same of it.
        drifted: whether one of them is beyond chance.
    """

    period: int
    requests: int
    predicted: float
    observed: float
    z: float
    code: int | None
    code_predicted: float
    code_observed: float
    code_z: float
    drifted: bool


def drift(table: PriorTable, targets: Targets, trie: Trie) -> list[PeriodDrift]:
    """Compare a table's forecasts with what happened.

    Args:
        table: the forecasts; each row of targets takes the newest one at or before its period.
        targets: what happened; rows without a forecast are left out.
        trie: that the table was decoded in.

    Returns:
        One entry a period with at least one request.

    Raises:
        LineageError: the table was decoded in another trie.
    """
    table.check_trie(trie)
    row_R = table.find(targets.user, targets.period)
    found = []
    for period in np.unique(targets.period[row_R >= 0]):
        here = np.flatnonzero((targets.period == period) & (row_R >= 0))
        part, row = targets.select(here), row_R[here]
        share_T = np.repeat(1 / np.diff(part.ptr), np.diff(part.ptr))
        listed_T = (table.advertiser_RK[row[part.row]] == part.item[:, None]).any(1)
        observed_R = np.bincount(part.row, share_T * listed_T, minlength=len(part))
        predicted_R = np.exp(table.log_prob_RK[row]).sum(1)
        observed_RN = np.zeros((len(part), trie.n_nodes(1)))
        np.add.at(observed_RN, (part.row, trie.path_AL[part.item, 0]), share_T)
        predicted_RN = np.exp(table.level1_log_prob_RN[row, : trie.n_nodes(1)])
        z, z_N = float(_z(observed_R[:, None], predicted_R[:, None])[0]), _z(observed_RN, predicted_RN)
        # Of a prefix with hardly a target the deviation is not known.
        enough_N = np.minimum(observed_RN.sum(0), predicted_RN.sum(0)) >= _FEWEST_TARGETS
        z_N = np.where(enough_N, z_N, 0.0)
        worst = int(np.argmax(np.abs(z_N)))
        limit = norm.isf(CHANCE / 2 / (1 + int(enough_N.sum())))
        found.append(
            PeriodDrift(
                period=int(period),
                requests=len(part),
                predicted=float(predicted_R.mean()),
                observed=float(observed_R.mean()),
                z=z,
                code=int(trie.child_code[0][worst]) if enough_N.any() else None,
                code_predicted=float(predicted_RN[:, worst].mean()),
                code_observed=float(observed_RN[:, worst].mean()),
                code_z=float(z_N[worst]),
                drifted=bool(len(part) >= _FEWEST_REQUESTS and max(abs(z), abs(z_N[worst])) > limit),
            )
        )
    return found


def _z(observed_RN: NDArray, predicted_RN: NDArray) -> Float:
    difference_RN = observed_RN - predicted_RN
    if len(difference_RN) < 2:
        return np.zeros(difference_RN.shape[1])
    deviation_N = difference_RN.std(0, ddof=1) / np.sqrt(len(difference_RN))
    return difference_RN.mean(0) / np.maximum(deviation_N, 1e-12)


def calibration_curves(prior: PriorModel, targets: Targets, cfg: PriorConfig) -> dict[str, dict[str, list[float]]]:
    """Reliability with the temperatures and exponents fitted, and without.

    Args:
        prior: the fitted forecaster.
        targets: of prompts it has not learned from.
        cfg: of decoding; the list is made long enough for every advertiser above the floor of the curve.

    Returns:
        ``before`` and ``after``: curves as of :func:`priors.metrics.reliability`.
    """
    n_levels, n_advertisers = prior.base.trie.n_levels, prior.base.trie.n_advertisers
    ways: Mapping[str, Calibration] = {"before": Calibration.identity(n_levels), "after": prior.calibration}
    wide = replace(cfg.decode, beam=max(cfg.decode.beam, 64), top_k=n_advertisers)
    prompts = [
        prior.compiler.compile(int(user), int(period))
        for user, period in zip(targets.user, targets.period, strict=True)
    ]
    curves = {}
    for name, calibration in ways.items():
        decoder = TreeDecoder(prior.model, prior.base, calibration, wide)
        log_prob_RA = np.full((len(targets), n_advertisers), -np.inf)
        for start in range(0, len(targets), wide.batch_size):
            rows = np.arange(start, min(start + wide.batch_size, len(targets)))
            decoded = decoder.decode([prompts[row] for row in rows], targets.user[rows], targets.period[rows])
            for row, one in zip(rows, decoded, strict=True):
                log_prob_RA[row, one.advertiser_K] = one.log_prob_K
        curves[name] = reliability(log_prob_RA, targets)
    return curves
