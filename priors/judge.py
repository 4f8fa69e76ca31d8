"""Forecasters judged on the same user-periods: recall, NDCG, likelihood and calibration, by segment.

    scorer: (user, period) ─► log-probabilities of all advertisers
        │  among all, among those new to the user, among the active ones
        ▼
    a value of every measure for every user-period ─► means, and paired differences, with intervals over users

``listed_nll`` and ``ece`` are of the distribution as it is given, restricted to the segment's advertisers. The values
of single user-periods are kept for whoever compares with a forecaster of another run.

Shapes: R user-periods, T targets, A advertisers, B user-periods of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from data.artifacts import atomic_file
from data.errors import UserError
from data.log import Log, Targets
from data.statistics import TIERS, Interval, Row, activity_tiers, bootstrap_mean, paired_bootstrap
from priors import config
from priors.metrics import (
    calibration_pairs,
    chunks,
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
"""A forecast is compared with the anchor in every segment, with all others in these."""
OTHER_PROMPT, CONSTANT_HIDDEN, HISTORY_ALONE = "lm, other prompt", "lm, constant hidden", "lm, history alone"
CONTROLS = (OTHER_PROMPT, CONSTANT_HIDDEN, HISTORY_ALONE)
"""What the LM has to beat, if it has read anything: another user's prompt, a hidden state that is the same for all, and
that beside the user's own history vector."""
CONTROL_ARMS = dict(zip(config.CONTROLS, CONTROLS, strict=True))
"""Arm of each control, by its name in ``prior.controls``."""
REQUESTS = "requests.safetensors"


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
                wanted = chunk if allowed_BA is None else chunk.keep(allowed_BA[chunk.row, chunk.item])
                kept = np.flatnonzero(np.diff(wanted.ptr))
                pairs.setdefault(name, []).append(calibration_pairs(within_BA[kept], wanted.select(kept))[:2])
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
    of the *user-periods* by purchases before the period, so one user can be in several. (Retrieval and ranking sort
    *users* by purchases before the evaluated span.)

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
        tier_R = activity_tiers(np.array([log.is_purchase[rows].sum() for rows in history], dtype=float))
        self.masks: dict[str, tuple[NDArray[np.bool_], str]] = {
            "all": (everyone_T, "all"),
            "new": (log.is_new(targets.user[row_T], targets.period[row_T], targets.item), "new"),
            "active": (self._has_active[row_T], "active"),
            **{name: ((tier_R == tier)[row_T], "all") for tier, name in enumerate(TIERS)},
        }

    def targets_of(self, segment: str) -> Targets:
        """The same user-periods with the targets of a segment; a row may be without any."""
        return self.targets.keep(self.masks[segment][0])

    def mean_over_targets(self, value_T: Float, segment: str) -> Float:
        """Mean of each user-period over its targets in a segment, NaN where there is none, ``(R,)``."""
        counted_T = self.masks[segment][0] & ~np.isnan(value_T)
        row_T, n = self.targets.row[counted_T], len(self.targets)
        count_R = np.bincount(row_T, minlength=n)
        total_R = np.bincount(row_T, value_T[counted_T], minlength=n)
        return np.where(count_R > 0, total_R / np.maximum(count_R, 1), np.nan)

    def chunks(self) -> Iterator[tuple[Targets, dict[str, NDArray[np.bool_] | None]]]:
        """Some user-periods at a time, with the advertisers of each list, ``(B, A)``; None for everyone."""
        start = 0
        for part in chunks(self.targets):
            new_BA = np.ones((len(part), len(self.log.advertiser_ids)), dtype=bool)
            active_BA = np.zeros_like(new_BA)
            for place, row in enumerate(range(start, start + len(part))):
                bought = self._bought[row]
                new_BA[place, bought[bought >= 0]] = False
                for advertisers in self._active[row]:
                    active_BA[place, advertisers] = True
            yield part, {"all": None, "new": new_BA, "active": active_BA}
            start += len(part)

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


def save_requests(requests: Sequence[RequestValues], directory: Path) -> None:
    """Write the values of single user-periods into an existing directory."""
    arrays: dict[str, NDArray[Any]] = {}
    for number, part in enumerate(requests):
        arrays |= {f"{number}|user": part.user_R, f"{number}|period": part.period_R}
        for measure, value_R in part.values.items():
            name = "|".join("" if field is None else str(field) for field in measure)
            arrays[f"{number}|{name}"] = value_R.astype(np.float32)
    with atomic_file(directory / REQUESTS) as path:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def load_requests(directory: Path) -> list[RequestValues]:
    """Back from :func:`save_requests`.

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
