"""How good the forecast is, on the evaluated span: LM, tuned anchor, controls and baselines.

*Likelihood* is exact: the targets are forced through the tree of their own prompt, as of the start of
their own period. The two controls (DESIGN §5) answer whether the LM has read anything: ``other prompt``
shows another user's prompt with one's own anchor, ``constant hidden`` gives the head the mean hidden
state. *Lists* are those that retrieval and ranking get: the newest forecast of the schedule, and at the
same times that of every baseline.

    evaluation prompts ─► exact log-probability of every target ─► nll
                       ─► lists of the controls ─────────────────► recall, ndcg     as of the own period
    all user-periods ───► lists of LM, anchor, baselines ────────► recall, ndcg, listed_nll, ece

``listed_nll`` and ``ece`` are of the distribution that the stages after see, restricted to the segment's
advertisers. Values of single user-periods are kept for whoever compares this forecast with another run's.

Shapes: R user-periods, T targets, A advertisers, B user-periods of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from data.errors import UserError
from data.log import Log, Targets
from data.statistics import Interval, Row, bootstrap_mean, paired_bootstrap
from models.prior_lm import PriorLM, TreeBatch
from priors.anchor import Anchor, AnchorConstants, TunedAnchor, path_log_probs
from priors.calibration import Calibration, calibrated_log_prob
from priors.config import PriorConfig
from priors.dataset import PromptDataset
from priors.decode import TreeDecoder
from priors.fit import PriorModel, batches, rows_of, sample_rows
from priors.forecast import TableForecast
from priors.metrics import (
    calibration_pairs,
    expected_calibration_error,
    ndcg_at_k,
    recall_at_k,
    reliability_of_pairs,
    target_ranks,
)

Float = NDArray[np.float64]
Scorer = Callable[[NDArray[np.integer], NDArray[np.integer]], NDArray[np.floating]]
"""From users and periods, ``(B,)`` each, to log-probabilities of all advertisers, ``(B, A)``."""

KS = (1, 5, 10, 20, 50)
HEADLINE, COMPARED = "anchor", ("all", "new")
"""The LM is compared with the anchor in every segment, with all others in these."""
AGAINST = (HEADLINE, "lm, other prompt", "lm, constant hidden")
"""What the LM is compared with, beside popularity and the baselines."""
REQUESTS = "requests.safetensors"
_CHUNK, _SAMPLE = 512, 0


class Measure(NamedTuple):
    """A figure that every user-period has a value of."""

    metric: str
    arm: str
    segment: str = "all"
    k: int | None = None


@dataclass(frozen=True)
class RequestValues:
    """Values of single user-periods.

    Attributes:
        user_R, period_R: the user-periods.
        values: ``(R,)`` of each measure; NaN where a user-period has none.
    """

    user_R: NDArray[np.integer]
    period_R: NDArray[np.integer]
    values: dict[Measure, Float]


@dataclass
class ForecastEvaluation:
    """Figures of the forecast.

    Attributes:
        rows: tidy rows of section ``forecast``.
        curves: reliability of each arm, for the plot.
        requests: the values behind the rows: of the evaluation prompts, and of all user-periods.
    """

    rows: list[Row] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)
    requests: list[RequestValues] = field(default_factory=list)

    def save_requests(self, directory: Path) -> None:
        """Write the values of single user-periods into an existing directory."""
        arrays: dict[str, NDArray[Any]] = {}
        for number, requests in enumerate(self.requests):
            arrays |= {f"{number}|user": requests.user_R, f"{number}|period": requests.period_R}
            for measure, value_R in requests.values.items():
                name = "|".join("" if part is None else str(part) for part in measure)
                arrays[f"{number}|{name}"] = value_R.astype(np.float32)
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, directory / REQUESTS)


def load_requests(directory: Path) -> list[RequestValues]:
    """Back from :meth:`ForecastEvaluation.save_requests`.

    Raises:
        UserError: there is no such file.
    """
    path = directory / REQUESTS
    if not path.is_file():
        raise UserError(
            f"{directory} without {REQUESTS}",
            expected="forecasts with the figures of single user-periods",
            action="make them again: adsid run run.until=forecasts",
        )
    found: dict[int, RequestValues] = {}
    for name, array in sorted(load_file(path).items()):
        number, *parts = name.split("|")
        requests = found.setdefault(int(number), RequestValues(np.zeros(0, int), np.zeros(0, int), {}))
        if len(parts) == 1:
            found[int(number)] = RequestValues(**(vars(requests) | {f"{parts[0]}_R": array}))
        else:
            metric, arm, segment, k = parts
            requests.values[Measure(metric, arm, segment, int(k) if k else None)] = array.astype(np.float64)
    return [found[number] for number in sorted(found)]


def evaluate_forecast(
    prior: PriorModel,
    forecasts: Mapping[str, TableForecast],
    log: Log,
    cfg: PriorConfig,
    baselines: Mapping[str, Scorer] | None = None,
) -> ForecastEvaluation:
    """Measure the forecast on the evaluated span of the panel.

    Args:
        prior: the fitted forecaster.
        forecasts: arms ``anchor`` and ``lm``.
        log: the events.
        cfg: panel and number of prompts.
        baselines: other forecasters by name.

    Returns:
        Rows, curves and the values behind them.
    """
    targets = rows_of(log.advertiser_targets(log.evaluate), log.panel(cfg.panel, cfg.seed))
    # Drawn by a seed of its own: forecasters of other training seeds are judged on the same prompts.
    prompts = sample_rows(targets, cfg.evaluation_prompts, _SAMPLE)
    popularity = TunedAnchor.untuned(popularity_alone(prior.base.anchor), prior.base.trie)
    as_of = _Schedule(forecasts, targets)
    scorers: dict[str, Scorer] = {name: forecast.log_probs for name, forecast in forecasts.items()}
    scorers |= {
        name: as_of.kept(scorer) for name, scorer in {"popularity": popularity.log_probs, **(baselines or {})}.items()
    }
    lists, curves, errors = judge_lists(scorers, log, targets, curves_of=tuple(forecasts))
    exact = RequestValues(prompts.user, prompts.period, {})
    exact.values.update(_likelihood(prior, popularity, log, prompts, cfg))
    exact.values.update(_control_lists(prior, prompts, cfg))
    against = (*AGAINST, "popularity", *(baselines or {}))
    rows = [*compared(exact, "lm", against), *compared(lists, "lm", against), *errors]
    found: dict[tuple[str, str, str, int | None], Row] = {}
    for row in rows:  # where a figure is of both, the exact prompts' is only there to be compared with
        found[row.metric, row.arm, row.segment, row.k] = row
    return ForecastEvaluation(list(found.values()), {"reliability": curves}, [exact, lists])


def compared(requests: RequestValues, arm: str, against: tuple[str, ...]) -> list[Row]:
    """A row of every measure, and of an arm's paired differences with others.

    Args:
        requests: the values.
        arm: which is compared.
        against: with which, as far as they are there.
    """
    rows, users = [], requests.user_R
    for measure, value_R in requests.values.items():
        metric, of_arm, segment, k = measure
        rows.append(
            Row.of(bootstrap_mean(value_R, users), section="forecast", metric=metric, arm=of_arm, segment=segment, k=k)
        )
        for other in against if of_arm == arm else ():
            other_R = requests.values.get(Measure(metric, other, segment, k))
            if other_R is not None and (other == HEADLINE or segment in COMPARED):
                difference, name = paired_bootstrap(value_R, other_R, users), f"{arm} - {other}"
                rows.append(Row.of(difference, section="forecast", metric=metric, arm=name, segment=segment, k=k))
    return rows


# --- likelihood and controls, on the evaluation prompts ----------------------------------------------------


def _likelihood(
    prior: PriorModel, popularity: TunedAnchor, log: Log, targets: Targets, cfg: PriorConfig
) -> dict[Measure, Float]:
    """Exact NLL of LM, anchors and controls on the same prompts, by segment."""
    own = PromptDataset(targets, prior.compiler)
    other = PromptDataset(targets, prior.compiler, prompt_of=another_user(targets))
    untuned = TunedAnchor.untuned(prior.base.anchor, prior.base.trie)
    tree_batches = list(batches(own, prior.collator, cfg.batch_size))
    other_batches = list(batches(other, prior.collator, cfg.batch_size))
    log_prob_T = {
        "lm": exact_log_prob(prior.model, tree_batches, prior.calibration),
        "lm, other prompt": exact_log_prob(prior.model, other_batches, prior.calibration),
        "lm, constant hidden": exact_log_prob(
            prior.model, tree_batches, prior.calibration, constant_LH=prior.constant_LH
        ),
        "anchor": _base_log_prob(prior.base, targets),
        "anchor, untuned": _base_log_prob(untuned, targets),
        "popularity": _base_log_prob(popularity, targets),
    }
    segments = Segments(log, targets)
    return {
        Measure("nll", arm, name): segments.mean_over_targets(-values_T, name)
        for name in segments.masks
        for arm, values_T in log_prob_T.items()
    }


@torch.inference_mode()
def exact_log_prob(
    model: PriorLM,
    tree_batches: list[TreeBatch],
    calibration: Calibration,
    *,
    constant_LH: torch.Tensor | None = None,
) -> Float:
    """Calibrated log-probability of each target by teacher forcing.

    Args:
        model: the LM.
        tree_batches: prompts with their targets.
        calibration: weights of logits and base.
        constant_LH: hidden state to give the head at each level instead of the LM's.

    Returns:
        ``(T,)``, in the order of the prompts' targets.
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
    return torch.cat(calibrated_log_prob(tree_batches, logits, weight, exponent)).double().numpy()


def another_user(targets: Targets) -> NDArray[np.int64]:
    """For each row another user of the same targets, the next one in a fixed order."""
    users = np.unique(targets.user)
    return users[(np.searchsorted(users, targets.user) + 1) % len(users)].astype(np.int64)


def popularity_alone(anchor: Anchor) -> Anchor:
    """The anchor without what it knows of the user."""
    return Anchor(anchor.counts, AnchorConstants(**{**vars(anchor.constants), "own_weight": 0.0, "co_weight": 0.0}))


def _base_log_prob(base: TunedAnchor, targets: Targets) -> Float:
    parts = [base.log_probs(part.user, part.period)[part.row, part.item] for part in _chunks(targets)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _control_lists(prior: PriorModel, targets: Targets, cfg: PriorConfig) -> dict[Measure, Float]:
    """Recall and NDCG of the LM and its controls, all as of the period asked for."""
    decoder = TreeDecoder(prior.model, prior.base, prior.calibration, cfg.decode)
    ranks: dict[str, list[NDArray[np.int64]]] = {}
    reader: dict[str, NDArray[np.integer]] = {"lm": targets.user, "lm, other prompt": another_user(targets)}
    for start in range(0, len(targets), cfg.decode.batch_size):
        rows = np.arange(start, min(start + cfg.decode.batch_size, len(targets)))
        part = targets.select(rows)
        anchor_BA = prior.base.log_probs(part.user, part.period)
        scores = {"lm, constant hidden": constant_log_probs(prior, part.user, part.period), "anchor": anchor_BA}
        for arm, user_R in reader.items():
            prompts = [
                prior.compiler.compile(int(user), int(period)).token_ids
                for user, period in zip(user_R[rows], part.period, strict=True)
            ]
            # Beyond the list, where no probability was decoded, the anchor decides the order.
            scores[arm] = anchor_BA - 1e6
            for row, decoded in enumerate(decoder.decode(prompts, part.user, part.period)):
                scores[arm][row, decoded.advertiser_K] = decoded.log_prob_K
        for arm, score_BA in scores.items():
            ranks.setdefault(arm, []).append(target_ranks(score_BA, part))
    rank_T = {arm: np.concatenate(parts) for arm, parts in ranks.items()}
    return {
        Measure(metric, arm, "all", k): at_k(rank_T[arm], targets, k)
        for arm in rank_T
        for metric, at_k in (("recall", recall_at_k), ("ndcg", ndcg_at_k))
        for k in KS
    }


@torch.inference_mode()
def constant_log_probs(prior: PriorModel, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> Float:
    """Log-probabilities where the head is given the mean hidden state, ``(B, A)``: a bias a code on the anchor."""
    trie, scores = prior.base.trie, []
    for level, base_BN in enumerate(prior.base.child_scores(user_B, period_B)):
        logit_V = prior.model.head(prior.constant_LH[level][None], level)[0].double().numpy()
        calibration = prior.calibration
        bias_N = calibration.lm_weight[level] * logit_V[trie.child_code[level]]
        scores.append(calibration.base_exponent[level] * base_BN + bias_N)
    return path_log_probs(trie, scores)[-1][:, trie.advertiser_leaf]


# --- lists, on all user-periods ----------------------------------------------------------------------------


class _Schedule:
    """Baselines are asked at the times the forecasts were made at, so that no arm is fresher."""

    def __init__(self, forecasts: Mapping[str, TableForecast], targets: Targets) -> None:
        table = next(iter(forecasts.values())).table
        row = table.find(targets.user, targets.period)
        as_of = np.where(row >= 0, table.period_R[np.maximum(row, 0)], targets.period) if len(table) else targets.period
        self._made = dict(
            zip(zip(targets.user.tolist(), targets.period.tolist(), strict=True), as_of.tolist(), strict=True)
        )

    def kept(self, scorer: Scorer) -> Scorer:
        """The scorer, as of the newest forecast."""

        def score(user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.floating]:
            pairs = zip(user_B.tolist(), period_B.tolist(), strict=True)
            return scorer(user_B, np.array([self._made[pair] for pair in pairs], dtype=np.int64))

        return score


def judge_lists(
    scorers: Mapping[str, Scorer], log: Log, targets: Targets, *, curves_of: tuple[str, ...] = ()
) -> tuple[RequestValues, dict[str, dict[str, list[float]]], list[Row]]:
    """Recall, NDCG, NLL and calibration of forecasters on the same user-periods, by segment.

    Args:
        scorers: forecasters by name.
        log: says what is new and active.
        targets: the user-periods.
        curves_of: whose reliability over all advertisers is returned.

    Returns:
        The values of every user-period; reliability curves; rows of the calibration error.
    """
    segments = Segments(log, targets)
    requests = RequestValues(targets.user, targets.period, {})
    curves, rows = {}, []
    for arm, scorer in scorers.items():
        rank: dict[str, list[NDArray]] = {}
        log_prob: dict[str, list[NDArray]] = {}
        pairs: dict[str, list[tuple[Float, Float]]] = {}
        for chunk, allowed in segments.chunks():
            score_BA = np.asarray(scorer(chunk.user, chunk.period), dtype=np.float64)
            for name, allowed_BA in allowed.items():
                within_BA = _renormalised(score_BA, allowed_BA)
                rank.setdefault(name, []).append(target_ranks(within_BA, chunk))
                log_prob.setdefault(name, []).append(within_BA[chunk.row, chunk.item])
                wanted = chunk if allowed_BA is None else _only(chunk, allowed_BA[chunk.row, chunk.item])
                kept = np.flatnonzero(np.diff(wanted.ptr))
                pairs.setdefault(name, []).append(calibration_pairs(within_BA[kept], wanted.select(kept)))
        for segment, (_, allowed_by) in segments.masks.items():
            rank_T, log_prob_T = np.concatenate(rank[allowed_by]), np.concatenate(log_prob[allowed_by])
            of_segment = segments.targets_of(segment)
            inside_T = segments.masks[segment][0]
            for k in KS:
                for metric, at_k in (("recall", recall_at_k), ("ndcg", ndcg_at_k)):
                    requests.values[Measure(metric, arm, segment, k)] = at_k(rank_T[inside_T], of_segment, k)
            known_T = np.where(np.isfinite(log_prob_T), -log_prob_T, np.nan)
            requests.values[Measure("listed_nll", arm, segment)] = segments.mean_over_targets(known_T, segment)
        for name, parts in pairs.items():
            predicted, observed = (np.concatenate(side) for side in zip(*parts, strict=True))
            curve = reliability_of_pairs(predicted, observed, n_rows=len(targets))
            error = Interval(expected_calibration_error(curve), np.nan, np.nan, len(targets))
            rows.append(Row.of(error, section="forecast", metric="ece", arm=arm, segment=name))
            if name == "all" and arm in curves_of:
                curves[arm] = curve
    return requests, curves, rows


def _renormalised(log_prob_BA: Float, allowed_BA: NDArray[np.bool_] | None) -> Float:
    """The distribution among some advertisers."""
    if allowed_BA is None:
        return log_prob_BA
    within_BA = np.where(allowed_BA, log_prob_BA, -np.inf)
    top_B1 = within_BA.max(1, keepdims=True)
    top_B1 = np.where(np.isfinite(top_B1), top_B1, 0.0)
    total_B1 = np.exp(within_BA - top_B1).sum(1, keepdims=True)
    return within_BA - top_B1 - np.log(np.maximum(total_B1, 1e-300))


class Segments:
    """Parts of the targets that figures are of.

    ``all``; ``new``: advertisers the user never bought from before, among those alone; ``active``: among the
    advertisers that run ads in the markets visited in that period; ``sparse``, ``middle`` and ``busy users``: thirds
    of the user-periods by purchases before.

    Args:
        log: the events.
        targets: the user-periods.

    Attributes:
        masks: of each segment its targets ``(T,)``, and by which advertisers its lists are limited: ``all``,
            ``new`` or ``active``.
    """

    def __init__(self, log: Log, targets: Targets) -> None:
        self.log, self.targets = log, targets
        row_T, everyone_T = targets.row, np.ones(len(targets.item), dtype=bool)
        history = [
            log.history(int(user), int(period)) for user, period in zip(targets.user, targets.period, strict=True)
        ]
        self._bought = [np.unique(log.events.advertiser[rows][log.is_purchase[rows]]) for rows in history]
        purchases = np.array([log.is_purchase[rows].sum() for rows in history], dtype=float)
        low, high = np.quantile(purchases, [1 / 3, 2 / 3]) if len(purchases) else (0.0, 0.0)
        self.masks: dict[str, tuple[NDArray[np.bool_], str]] = {
            "all": (everyone_T, "all"),
            "new": (log.is_new(targets.user[row_T], targets.period[row_T], targets.item), "new"),
            "active": (self._has_active[row_T], "active"),
            "sparse users": ((purchases <= low)[row_T], "all"),
            "middle users": (((purchases > low) & (purchases <= high))[row_T], "all"),
            "busy users": ((purchases > high)[row_T], "all"),
        }

    def targets_of(self, segment: str) -> Targets:
        """The same user-periods with the targets of a segment; a row may be without any."""
        return _only(self.targets, self.masks[segment][0])

    def mean_over_targets(self, value_T: Float, segment: str) -> Float:
        """Mean of each user-period over its targets in a segment, NaN where there is none, ``(R,)``."""
        counted_T = self.masks[segment][0] & ~np.isnan(value_T)
        row_T, n = self.targets.row[counted_T], len(self.targets)
        count_R = np.bincount(row_T, minlength=n)
        total_R = np.bincount(row_T, value_T[counted_T], minlength=n)
        return np.where(count_R > 0, total_R / np.maximum(count_R, 1), np.nan)

    def chunks(self) -> Iterator[tuple[Targets, dict[str, NDArray[np.bool_] | None]]]:
        """Some user-periods at a time, with the advertisers of each list, ``(B, A)``; None for everyone."""
        for start in range(0, len(self.targets), _CHUNK):
            rows = np.arange(start, min(start + _CHUNK, len(self.targets)))
            new_BA = np.ones((len(rows), len(self.log.advertiser_ids)), dtype=bool)
            active_BA = np.zeros_like(new_BA)
            for place, row in enumerate(rows):
                bought = self._bought[row]
                new_BA[place, bought[bought >= 0]] = False
                for advertisers in self._active[row]:
                    active_BA[place, advertisers] = True
            yield self.targets.select(rows), {"all": None, "new": new_BA, "active": active_BA}

    @cached_property
    def _active(self) -> list[list[NDArray[np.integer]]]:
        """Advertisers that run ads in each market a user-period visits."""
        targets, log = self.targets, self.log
        found: list[list[NDArray[np.integer]]] = [[] for _ in range(len(targets))]
        if not len(targets):
            return found
        visits = log.requests((int(targets.period.min()), int(targets.period.max())), np.unique(targets.user))
        rows = {key: row for row, key in enumerate(zip(targets.user.tolist(), targets.period.tolist(), strict=True))}
        running: dict[tuple[int, int], NDArray[np.integer]] = {}
        for user, market, period in zip(*(column.tolist() for column in visits), strict=True):
            row = rows.get((user, period))
            if row is not None:
                if (market, period) not in running:
                    running[market, period] = log.active_advertisers(market, period)
                found[row].append(running[market, period])
        return found

    @property
    def _has_active(self) -> NDArray[np.bool_]:
        return np.array([any(len(some) for some in row) for row in self._active], dtype=bool)


def _chunks(targets: Targets) -> Iterator[Targets]:
    for start in range(0, len(targets), _CHUNK):
        yield targets.select(np.arange(start, min(start + _CHUNK, len(targets))))


def _only(targets: Targets, keep_T: NDArray[np.bool_]) -> Targets:
    """The same rows with some of their targets; a row may end without any."""
    counts = np.bincount(targets.row[keep_T], minlength=len(targets))
    return Targets(
        targets.user, targets.period, targets.market, np.concatenate([[0], np.cumsum(counts)]),
        targets.item[keep_T], targets.weight[keep_T], targets.value[keep_T],
    )  # fmt: skip
