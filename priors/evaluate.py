"""How good the forecast is, on the evaluated span: LM, tuned anchor, controls and simple baselines.

*Likelihood* is exact: the targets are forced through the tree of their own prompt, as of the start of
their own period. The two controls (DESIGN §5) answer whether the LM has read anything: ``other prompt``
shows another user's prompt with one's own anchor, ``constant hidden`` gives the head the mean hidden
state. *Lists* are those that retrieval and ranking get: the newest forecast of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.log import Log, Targets
from data.statistics import Interval, Row, bootstrap_mean, paired_bootstrap
from models.prior_lm import PriorLM, TreeBatch
from priors.anchor import Anchor, AnchorConstants, TunedAnchor
from priors.calibration import Calibration, calibrated_nll
from priors.config import PriorConfig
from priors.dataset import PromptDataset
from priors.fit import PriorModel, batches, rows_of, sample_rows
from priors.forecast import TableForecast
from priors.metrics import expected_calibration_error, ndcg_at_k, recall_at_k, reliability, target_ranks

KS = (1, 5, 10, 20, 50)
_CHUNK = 512


@dataclass
class ForecastEvaluation:
    """Figures of the forecast.

    Attributes:
        rows: tidy rows of section ``forecast``.
        curves: reliability of each arm, for the plot.
    """

    rows: list[Row] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)


def evaluate_forecast(
    prior: PriorModel, forecasts: dict[str, TableForecast], log: Log, cfg: PriorConfig
) -> ForecastEvaluation:
    """Measure the forecast on the evaluated span of the panel.

    Args:
        prior: the fitted forecaster.
        forecasts: arms ``anchor`` and ``lm``.
        log: the events.
        cfg: panel and number of prompts.

    Returns:
        Rows and curves.
    """
    targets = rows_of(log.advertiser_targets(log.evaluate), log.panel(cfg.panel, cfg.seed))
    evaluation = ForecastEvaluation()
    evaluation.rows += likelihood_rows(prior, sample_rows(targets, cfg.evaluation_prompts, cfg.seed), cfg)
    list_rows, evaluation.curves = _lists(prior.base, forecasts, log, targets)
    evaluation.rows += list_rows
    return evaluation


def likelihood_rows(prior: PriorModel, targets: Targets, cfg: PriorConfig) -> list[Row]:
    """Exact NLL of LM, anchors and controls on the same prompts, and their paired differences."""
    own = PromptDataset(targets, prior.compiler)
    other = PromptDataset(targets, prior.compiler, prompt_of=another_user(targets))
    untuned = TunedAnchor.untuned(prior.base.anchor, prior.base.trie)
    popularity = TunedAnchor.untuned(_popularity_alone(prior.base.anchor), prior.base.trie)
    tree_batches = list(batches(own, prior.collator, cfg.batch_size))
    nll = {
        "lm": exact_nll(prior.model, tree_batches, prior.calibration),
        "lm, other prompt": exact_nll(
            prior.model, list(batches(other, prior.collator, cfg.batch_size)), prior.calibration
        ),
        "lm, constant hidden": exact_nll(prior.model, tree_batches, prior.calibration, constant_LH=prior.constant_LH),
        "anchor": _base_nll(prior.base, targets),
        "anchor, untuned": _base_nll(untuned, targets),
        "popularity": _base_nll(popularity, targets),
    }
    users = targets.user
    rows = [
        Row.of(bootstrap_mean(values, users), section="forecast", metric="nll", arm=arm) for arm, values in nll.items()
    ]
    for other_arm in ("anchor", "lm, other prompt", "lm, constant hidden", "popularity"):
        difference = paired_bootstrap(nll["lm"], nll[other_arm], users)
        rows.append(Row.of(difference, section="forecast", metric="nll", arm=f"lm - {other_arm}"))
    return rows


@torch.inference_mode()
def exact_nll(
    model: PriorLM,
    tree_batches: list[TreeBatch],
    calibration: Calibration,
    *,
    constant_LH: torch.Tensor | None = None,
) -> NDArray[np.float64]:
    """Calibrated NLL of each prompt by teacher forcing.

    Args:
        model: the LM.
        tree_batches: prompts with their targets.
        calibration: weights of logits and base.
        constant_LH: hidden state to give the head at each level instead of the LM's.

    Returns:
        ``(prompts,)``.
    """
    model.eval()
    logits = []
    for batch in tree_batches:
        if constant_LH is None:
            hidden = model.hidden(batch)
            at = [hidden[decisions.row_N, decisions.position_N] for decisions in batch.levels]
        else:
            at = [constant_LH[level].expand(len(d.row_N), -1) for level, d in enumerate(batch.levels)]
        logits.append([model.head(hidden_NH, level) for level, hidden_NH in enumerate(at)])
    weight, exponent = torch.tensor(calibration.lm_weight), torch.tensor(calibration.base_exponent)
    return calibrated_nll(tree_batches, logits, weight, exponent).double().numpy()


def another_user(targets: Targets) -> NDArray[np.int64]:
    """For each row another user of the same targets, the next one in a fixed order."""
    users = np.unique(targets.user)
    return users[(np.searchsorted(users, targets.user) + 1) % len(users)].astype(np.int64)


def _base_nll(base: TunedAnchor, targets: Targets) -> NDArray[np.float64]:
    nll = np.zeros(len(targets))
    for start in range(0, len(targets), _CHUNK):
        part = targets.select(np.arange(start, min(start + _CHUNK, len(targets))))
        log_prob = base.log_probs(part.user, part.period)[part.row, part.item]
        nll[start : start + len(part)] = -np.bincount(part.row, log_prob) / np.diff(part.ptr)
    return nll


def _popularity_alone(anchor: Anchor) -> Anchor:
    constants = AnchorConstants(**{**vars(anchor.constants), "own_weight": 0.0})
    return Anchor(anchor.counts, constants)


def _lists(
    base: TunedAnchor, forecasts: dict[str, TableForecast], log: Log, targets: Targets
) -> tuple[list[Row], dict[str, Any]]:
    """Recall, NDCG and calibration of what the stages after get, all arms on the same rows."""
    as_of = _as_of(forecasts, targets)
    popularity = TunedAnchor.untuned(_popularity_alone(base.anchor), base.trie)
    schedule = np.unique(as_of)

    def popular(user: NDArray, period: NDArray) -> NDArray:
        made = schedule[np.maximum(np.searchsorted(schedule, period, side="right") - 1, 0)]
        return popularity.log_probs(user, made)

    scorers: dict[str, Callable[[NDArray, NDArray], NDArray]] = {
        **{name: forecast.log_probs for name, forecast in forecasts.items()},
        "popularity": popular,
    }

    segments = _segments(log, targets)
    values: dict[tuple[str, str, int, str], NDArray[np.float64]] = {}
    curves: dict[str, Any] = {}
    for arm, scorer in scorers.items():
        parts = []
        for start in range(0, len(targets), _CHUNK):
            index = np.arange(start, min(start + _CHUNK, len(targets)))
            parts.append(np.asarray(scorer(targets.user[index], targets.period[index]), dtype=np.float64))
        log_prob = np.concatenate(parts)
        if arm in forecasts:
            curves[arm] = reliability(log_prob, targets)
        for segment, (of_segment, allowed) in segments.items():
            rank = target_ranks(log_prob, of_segment, allowed)
            for k in KS:
                values["recall", segment, k, arm] = recall_at_k(rank, of_segment, k)
                values["ndcg", segment, k, arm] = ndcg_at_k(rank, of_segment, k)
    rows: list[Row] = []
    for (metric, segment, k, arm), value in values.items():
        interval = bootstrap_mean(value, targets.user)
        rows.append(Row.of(interval, section="forecast", metric=metric, arm=arm, segment=segment, k=k))
        for other in ("anchor", "popularity"):
            if arm == "lm" and (metric, segment, k, other) in values:
                difference = paired_bootstrap(value, values[metric, segment, k, other], targets.user)
                rows.append(
                    Row.of(
                        difference,
                        section="forecast",
                        metric=metric,
                        arm=f"lm - {other}",
                        segment=segment,
                        k=k,
                    )
                )
    for arm, curve in curves.items():
        error = Interval(expected_calibration_error(curve), np.nan, np.nan, len(targets))
        rows.append(Row.of(error, section="forecast", metric="ece", arm=arm))
    return rows, {"reliability": curves}


def _as_of(forecasts: dict[str, TableForecast], targets: Targets) -> NDArray[np.int64]:
    table = next(iter(forecasts.values())).table
    row = table.find(targets.user, targets.period)
    return np.where(row >= 0, table.period_R[np.maximum(row, 0)], targets.period)


def _segments(log: Log, targets: Targets) -> dict[str, tuple[Targets, NDArray[np.bool_] | None]]:
    """Targets and allowed advertisers of each segment; all have the rows of ``targets``.

    ``new``: advertisers the user never bought from before. ``active``: those that run ads in the
    markets visited in that period. ``sparse``: users in the lowest third by purchases before.
    """
    n_advertisers = len(log.advertiser_ids)
    is_new = log.is_new(targets.user[targets.row], targets.period[targets.row], targets.item)
    active = np.zeros((len(targets), n_advertisers), dtype=bool)
    bought = np.zeros((len(targets), n_advertisers), dtype=bool)
    visits = log.requests((int(targets.period.min()), int(targets.period.max())), np.unique(targets.user))
    row_of = {key: row for row, key in enumerate(zip(targets.user.tolist(), targets.period.tolist(), strict=True))}
    for user, market, period in zip(visits.user.tolist(), visits.market.tolist(), visits.period.tolist(), strict=True):
        row = row_of.get((user, period))
        if row is not None:
            active[row, log.active_advertisers(market, period)] = True
    purchases = np.zeros(len(targets))
    for row, (user, period) in enumerate(zip(targets.user.tolist(), targets.period.tolist(), strict=True)):
        history = log.history(user, period)
        advertiser = log.events.advertiser[history][log.is_purchase[history]]
        bought[row, advertiser[advertiser >= 0]] = True
        purchases[row] = len(advertiser)
    sparse = purchases <= np.quantile(purchases, 1 / 3)
    return {
        "all": (targets, None),
        "new": (_only(targets, is_new), ~bought),
        "active": (targets, active),
        "sparse users": (_only(targets, sparse[targets.row]), None),
    }


def _only(targets: Targets, keep_T: NDArray[np.bool_]) -> Targets:
    """The same rows with some of their targets; a row may end without any."""
    counts = np.bincount(targets.row[keep_T], minlength=len(targets))
    return Targets(
        targets.user, targets.period, targets.market, np.concatenate([[0], np.cumsum(counts)]),
        targets.item[keep_T], targets.weight[keep_T], targets.value[keep_T],
    )  # fmt: skip
