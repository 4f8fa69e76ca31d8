"""Whether forecasts still say what happens: predicted against observed mass, period by period, and calibration.

A request's targets share an observed mass of 1. Of the requests of a period, the mean of what was predicted and the
mean of what was observed are compared for the whole list and for every level-1 prefix. What was predicted is what is
served: the stored forecast with the plan of campaigns of the request's period, so that another plan alone is no drift.

    z = mean(observed - predicted) / (deviation of it / sqrt(requests))

A period has *drifted* where a z is beyond what chance gives once in a thousand periods, all prefixes together.

Shapes: R requests (user-periods with targets), B of one chunk, T targets, N level-1 prefixes, A advertisers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from data.log import Targets
from priors.artifact import PriorModel
from priors.calibration import Calibration
from priors.config import PriorConfig
from priors.decode import TreeDecoder
from priors.evaluate import chunks
from priors.forecast import TableForecast
from priors.metrics import FLOOR, reliability

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


def drift(forecast: TableForecast, targets: Targets) -> list[PeriodDrift]:
    """Compare a table's forecasts with what happened.

    Args:
        forecast: the forecasts as they are served; each row of targets takes the newest one at or before its period.
        targets: what happened; rows without a forecast are left out.

    Returns:
        One entry a period with at least one request.
    """
    table, trie = forecast.table, forecast.base.trie
    row_R = table.find(targets.user, targets.period)
    found = []
    for period in np.unique(targets.period[row_R >= 0]):
        here = np.flatnonzero((targets.period == period) & (row_R >= 0))
        part, row = targets.select(here), row_R[here]
        share_T = np.repeat(1 / np.diff(part.ptr), np.diff(part.ptr))
        listed_T = (table.advertiser_RK[row[part.row]] == part.item[:, None]).any(1)
        observed_R = np.bincount(part.row, share_T * listed_T, minlength=len(part))
        predicted_R, predicted_RN = _predicted(forecast, part)
        observed_RN = np.zeros((len(part), trie.n_nodes(1)))
        np.add.at(observed_RN, (part.row, trie.path_AL[part.item, 0]), share_T)
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


def _predicted(forecast: TableForecast, targets: Targets) -> tuple[Float, Float]:
    """Mass that is served of the advertisers of a list, ``(R,)``, and of every level-1 prefix, ``(R, N)``."""
    table, trie = forecast.table, forecast.base.trie
    of_lists, of_prefixes = [], []
    for part in chunks(targets):
        prob_BA = np.exp(forecast.log_probs(part.user, part.period).astype(np.float64))
        listed_BK = table.advertiser_RK[table.find(part.user, part.period)]
        prob_BK = np.take_along_axis(prob_BA, np.maximum(listed_BK, 0), axis=1)
        of_lists.append(np.where(listed_BK >= 0, prob_BK, 0.0).sum(1))
        of_prefixes.append(trie.node_mass(prob_BA, 1))
    return np.concatenate(of_lists), np.concatenate(of_prefixes)


def _z(observed_RN: NDArray, predicted_RN: NDArray) -> Float:
    difference_RN = observed_RN - predicted_RN
    if len(difference_RN) < 2:
        return np.zeros(difference_RN.shape[1])
    deviation_N = difference_RN.std(0, ddof=1) / np.sqrt(len(difference_RN))
    return difference_RN.mean(0) / np.maximum(deviation_N, 1e-12)


def calibration_curves(prior: PriorModel, targets: Targets, cfg: PriorConfig) -> dict[str, dict[str, list[float]]]:
    """Reliability with the temperatures and exponents of the last calibration, and without.

    Args:
        prior: the fitted forecaster.
        targets: of prompts it has not learned from.
        cfg: says how many prompts are read at once.

    Returns:
        ``before`` and ``after``: curves as of :func:`priors.metrics.reliability`. For an older artifact, which does not
        tell the anchor's exponents, ``before`` has the anchor as it is after.
    """
    ways = {"before": prior.uncalibrated, "after": prior.calibration}
    return {name: reliability(_log_probs(prior, way, targets, cfg), targets) for name, way in ways.items()}


def _log_probs(prior: PriorModel, calibration: Calibration, targets: Targets, cfg: PriorConfig) -> Float:
    """Exact log-probability of every advertiser above the floor of the curve, ``(R, A)``; of some below it ``-inf``."""
    decoder = TreeDecoder(prior.model, prior.base, calibration, cfg.decode)
    everyone_A, found = np.arange(prior.base.trie.n_advertisers), []
    for start in range(0, len(targets), cfg.decode.batch_size):
        asked = slice(start, start + cfg.decode.batch_size)
        user_B, period_B = targets.user[asked], targets.period[asked]
        prompts = [prior.compiler.compile(int(u), int(p)) for u, p in zip(user_B, period_B, strict=True)]
        # A little lower, so that rounding takes no advertiser at the floor out.
        scored = decoder.score(prompts, user_B, period_B, [everyone_A] * len(prompts), floor=0.99 * FLOOR)
        found += [log_prob_A for log_prob_A, _ in scored]
    return np.stack(found) if found else np.zeros((0, len(everyone_A)))
