"""How a forecaster ages: frozen at the end of its selection span, and followed through the periods after.

    selection span ─► step ─► step ─► … ─► end of the validation span
                      │ frozen: popularity, anchor, forecast, and the LM's on a sample of prompts
                      │ learned from what lies before the step: forecast reweighted and recalibrated,
                      │ anchor and forecast refit
                      ▼
       exact NLL and calibration error of each, and paired differences with intervals over users

What is frozen is what was learned. Counts and history vectors end at the start of each period, as they do in serving.
``forecast`` is the forecast by anchor and history (`priors.judge.HISTORY_ALONE`), exact for all advertisers. The first
step is the selection span itself, by which all that is frozen was chosen. The test span is never read.

Shapes: R user-periods of a step, U users, B user-periods of a chunk, A advertisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from time import process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.log import Log, Targets
from data.split import Span
from data.statistics import Interval, Row, bootstrap_mean, bootstrap_statistic, paired_bootstrap
from priors.anchor import TunedAnchor, mean_target_nll
from priors.artifact import PriorModel
from priors.dataset import PromptDataset
from priors.evaluate import anchor_log_prob, constant_log_probs, exact_log_prob
from priors.fit import batches, rows_of, sample_rows
from priors.judge import Scorer
from priors.metrics import calibration_pairs, chunks, error_of_mass, mass_by_bin
from priors.refit import recalibrate, refit

Float = NDArray[np.float64]

SECTION = "drift"
POPULARITY, ANCHOR, FORECAST, LM = "popularity", "anchor", "forecast", "lm"
REWEIGHTED, RECALIBRATED = "forecast, reweighted", "forecast, recalibrated"
ANCHOR_REFIT, REFIT = "anchor, refit", "forecast, refit"
AGAINST = (
    *((arm, ANCHOR) for arm in (POPULARITY, FORECAST, REWEIGHTED, RECALIBRATED, ANCHOR_REFIT, REFIT)),
    *((arm, FORECAST) for arm in (REWEIGHTED, RECALIBRATED, REFIT)),
    (REFIT, ANCHOR_REFIT),
)
"""Pairs that are compared."""
_SAMPLE = 0


@dataclass(frozen=True)
class DriftStep:
    """Figures of some periods.

    Attributes:
        periods: first and last.
        requests, users: user-periods with a conversion, and whose they are.
        rows: of `SECTION`: ``nll`` and ``ece`` of each arm and of the pairs of `AGAINST`.
        seconds: of processor time that recalibration and refit took; empty for the selection span.
        learned: what they chose.
    """

    periods: Span
    requests: int
    users: int
    rows: list[Row]
    seconds: dict[str, float]
    learned: dict[str, Any]


def follow(prior: PriorModel, log: Log, *, every: int, lm_prompts: int = 0) -> list[DriftStep]:
    """Follow a forecaster from its selection span to the end of the validation span.

    Args:
        prior: the fitted forecaster; its configuration names the panel.
        log: the events.
        every: periods of a step, after which it is recalibrated and refitted.
        lm_prompts: prompts of each step that the LM is asked with; 0 leaves it out.

    Raises:
        UserError: a step of no period, a forecaster without history vectors, or one without a trained LM to ask.
    """
    _check(prior, every, lm_prompts)
    panel = log.panel(prior.cfg.panel, prior.cfg.seed)
    found = []
    for number, span in enumerate(spans(log, every)):
        scorers: dict[str, Scorer] = frozen(prior)
        seconds: dict[str, float] = {}
        chosen: dict[str, Any] = {}
        if number:
            fresh, seconds, chosen = learned(prior, log, before=span[0])
            scorers |= fresh
        targets = rows_of(log.advertiser_targets(span), panel)
        if not len(targets):
            continue
        rows = [*measure(scorers, targets), *_lm_rows(prior, sample_rows(targets, lm_prompts, _SAMPLE))]
        found.append(DriftStep(span, len(targets), len(np.unique(targets.user)), rows, seconds, chosen))
    return found


def spans(log: Log, every: int) -> list[Span]:
    """The selection span, then the periods after it, so many at a time, up to the end of the validation span."""
    first, last = log.split.prior_select[1] + 1, log.split.validation[1]
    after = [(start, min(start + every - 1, last)) for start in range(first, last + 1, every)]
    return [log.split.prior_select, *after]


def frozen(prior: PriorModel) -> dict[str, Scorer]:
    """The arms that learn nothing any more."""
    popularity = TunedAnchor.untuned(prior.base.anchor.popularity_alone(), prior.base.trie)
    return {
        POPULARITY: popularity.log_probs,
        ANCHOR: prior.base.log_probs,
        FORECAST: _history_alone(prior),
    }


def learned(prior: PriorModel, log: Log, *, before: int) -> tuple[dict[str, Scorer], dict[str, float], dict[str, Any]]:
    """The arms that learn up to a period.

    Returns:
        The arms, the seconds of processor time that each way of learning took, and what it chose.
    """
    began = process_time()
    recalibrated = recalibrate(prior, log, before=before)
    between = process_time()
    refitted = refit(prior, log, before=before)
    seconds = {RECALIBRATED: between - began, REFIT: process_time() - between}
    chosen = {
        RECALIBRATED: {
            "calibration": vars(recalibrated.prior.calibration),
            "exponent": recalibrated.exponent_L.tolist(),
            "largest_bias": [float(np.abs(bias_V).max()) for bias_V in recalibrated.bias_LV],
        },
        REFIT: {
            "constants": vars(refitted.base.anchor.constants),
            "calibration": vars(refitted.calibration),
            "exponent": refitted.base.exponent_L.tolist(),
            "largest_bias": [float(np.abs(bias_V).max()) for bias_V in refitted.base.bias_LV],
        },
    }
    arms: dict[str, Scorer] = {
        REWEIGHTED: _history_alone(recalibrated.prior),
        RECALIBRATED: recalibrated.log_probs,
        ANCHOR_REFIT: refitted.base.log_probs,
        REFIT: _history_alone(refitted),
    }
    return arms, seconds, chosen


def measure(scorers: Mapping[str, Scorer], targets: Targets) -> list[Row]:
    """NLL and calibration error of forecasters on the same user-periods, and the differences of `AGAINST`.

    The bins of a calibration error are those of all user-periods in every draw of users.

    Args:
        scorers: forecasters by name.
        targets: the user-periods.
    """
    users, user_R = np.unique(targets.user, return_inverse=True)
    nll: dict[str, Float] = {}
    mass: dict[str, tuple[Float, Float]] = {}
    for arm, scorer in scorers.items():
        nlls, pairs, start = [], [], 0
        for part in chunks(targets):
            log_prob_BA = np.asarray(scorer(part.user, part.period), dtype=np.float64)
            nlls.append(mean_target_nll(log_prob_BA[part.row, part.item], part))
            predicted, observed, row = calibration_pairs(log_prob_BA, part)
            pairs.append((predicted, observed, user_R[start + row]))
            start += len(part)
        nll[arm] = np.concatenate(nlls)
        predicted, observed, of_user = (np.concatenate(side) for side in zip(*pairs, strict=True))
        mass[arm] = mass_by_bin(predicted, observed, of_user, n_groups=len(users))
    rows = []
    for arm in scorers:
        error = Interval(error_of_mass(*(side_UB.sum(0) for side_UB in mass[arm])), np.nan, np.nan, len(targets))
        rows.append(Row.of(bootstrap_mean(nll[arm], targets.user), section=SECTION, metric="nll", arm=arm))
        rows.append(Row.of(error, section=SECTION, metric="ece", arm=arm))
    for arm, other in AGAINST:
        if arm in nll and other in nll:
            name, change = f"{arm} - {other}", paired_bootstrap(nll[arm], nll[other], targets.user)
            rows.append(Row.of(change, section=SECTION, metric="nll", arm=name))
            rows.append(Row.of(_error_change(mass[arm], mass[other]), section=SECTION, metric="ece", arm=name))
    return rows


def _error_change(ours: tuple[Float, Float], theirs: tuple[Float, Float]) -> Interval:
    def change(weight_U: Float) -> float:
        of_ours, of_theirs = (error_of_mass(*(weight_U @ side_UB for side_UB in one)) for one in (ours, theirs))
        return of_ours - of_theirs

    return bootstrap_statistic(change, np.arange(len(ours[0])))


def _history_alone(prior: PriorModel) -> Scorer:
    return lambda user_B, period_B: constant_log_probs(prior, user_B, period_B, own_history=True)


def _lm_rows(prior: PriorModel, targets: Targets) -> list[Row]:
    """NLL of the frozen LM, and what it is over anchor and forecast on the same prompts."""
    if not len(targets):
        return []
    asked = list(batches(PromptDataset(targets, prior.compiler), prior.collator, prior.cfg.batch_size))
    alone: dict[str, Any] = {"constant_LH": prior.constant_hidden, "own_history": True}
    log_prob_T = {
        LM: exact_log_prob(prior.model, asked, prior.calibration),
        FORECAST: exact_log_prob(prior.model, asked, prior.calibration, **alone),
        ANCHOR: anchor_log_prob(prior.base, targets),
    }
    nll = {arm: mean_target_nll(values_T, targets) for arm, values_T in log_prob_T.items()}
    rows = [Row.of(bootstrap_mean(nll[LM], targets.user), section=SECTION, metric="nll", arm=LM)]
    for other in (ANCHOR, FORECAST):
        change = paired_bootstrap(nll[LM], nll[other], targets.user)
        rows.append(Row.of(change, section=SECTION, metric="nll", arm=f"{LM} - {other}"))
    return rows


def _check(prior: PriorModel, every: int, lm_prompts: int) -> None:
    errors = []
    if every < 1:
        errors.append(UserError(f"--every {every}", expected="at least one period", action="raise it, e.g. to 4"))
    if prior.compiler.history is None:
        errors.append(
            UserError(
                "a forecaster without history vectors",
                expected="one with them: what is followed is the forecast by anchor and history",
                action="fit it with prior.history.prompts above 0: train.py stage=prior",
            )
        )
    if lm_prompts < 0:
        errors.append(
            UserError(
                f"--lm {lm_prompts}",
                expected="a number of prompts, at least 0",
                action="raise it, or leave it out: then the LM is not asked",
            )
        )
    trained = (*prior.model.head.projections, *prior.model.head.rows.values())
    if lm_prompts > 0 and not any(bool(weight.any()) for weight in trained):
        errors.append(
            UserError(
                f"--lm {lm_prompts} of a forecaster that ended where it started, with anchor and history alone",
                expected="one that kept a trained LM",
                action="leave out --lm: the forecast is the LM's own",
            )
        )
    if errors:
        raise UserError.collect(errors)
