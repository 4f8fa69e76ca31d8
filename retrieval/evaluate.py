"""What the forecast adds to retrieval, at the same total number of candidates.

Every arm gets ``budget`` candidates a request out of the ads that are active in the visited market and
period. In the arm ``none`` the channels without a forecast have all places; in ``anchor`` and ``lm`` the
forecast channels get a quota of them. Shares, quota and weight of the forecast are chosen by
`retrieval.tuning` before the evaluated span.

Shapes: R requests, K budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.log import Log, Targets
from data.statistics import Row, bootstrap_mean, paired_bootstrap
from priors.forecast import Forecast
from retrieval.blend import Blend, Blended, merge
from retrieval.channels import Ads, Request
from retrieval.config import FORECAST, RetrievalConfig
from retrieval.metrics import (
    coverage,
    gini,
    hits,
    ndcg_at_k,
    place_values,
    recall_at_k,
    reciprocal_rank,
    value_recall_at_k,
)
from retrieval.retriever import Retriever, with_forecast
from retrieval.tuning import Plan, as_matrix, choose_plan, choose_shares, tuning_targets, with_quota

SECTION = "retrieval"
NONE = "none"
DIFFERENCES = (("lm", "anchor"), ("lm", NONE), ("anchor", NONE))
TIERS = ("sparse users", "middle users", "heavy users")
Values = dict[tuple[str, str, int], NDArray[np.float64]]


@dataclass
class RetrievalEvaluation:
    """Figures of retrieval.

    Attributes:
        rows: tidy rows of section ``retrieval``.
        plans: blend, quota and prior weight chosen for each arm.
        sweep: recall and concentration by quota on the evaluated span, as plain dicts for the plot.
    """

    rows: list[Row] = field(default_factory=list)
    plans: dict[str, Plan] = field(default_factory=dict)
    sweep: list[dict[str, Any]] = field(default_factory=list)


class Requests:
    """Requests of a span with what the channels find for each, asked once however many arms and blends look at it.

    Args:
        retriever: asks the channels.
        targets: of the requests.
    """

    def __init__(self, retriever: Retriever, targets: Targets) -> None:
        self.retriever, self.targets = retriever, targets
        self.requests: list[Request] = retriever.requests(targets)
        self.base = retriever.lists(self.requests)

    def __len__(self) -> int:
        return len(self.targets)

    def lists(self, forecast: Forecast | None, prior_weight: float = 0.0) -> list[dict[str, Ads]]:
        """Lists of all channels of an arm, by name, one dict a request."""
        names = self.retriever.cfg.forecast_channels
        if forecast is None or not names:
            return self.base
        asked = with_forecast(self.requests, forecast, prior_weight)
        return [base | own for base, own in zip(self.base, self.retriever.lists(asked, names), strict=True)]

    def by_weight(self, forecast: Forecast | None) -> dict[float, list[dict[str, Ads]]]:
        """`lists` under each prior weight that the configuration chooses from."""
        cfg = self.retriever.cfg
        chosen = forecast is not None and FORECAST in cfg.channels
        return {weight: self.lists(forecast, weight) for weight in (cfg.forecast.prior_weights if chosen else [0.0])}

    def merged(self, lists_R: Sequence[Mapping[str, Ads]], blend: Blend) -> list[Blended]:
        """One list a request."""
        return [merge(lists, blend, self.retriever.limits) for lists in lists_R]


class Judge:
    """Measures candidate lists of the same requests.

    Args:
        log: the log.
        targets: of the requests.
        cfg: list lengths, budget, who is a sparse user.
    """

    def __init__(self, log: Log, targets: Targets, cfg: RetrievalConfig) -> None:
        self.log, self.targets, self.cfg = log, targets, cfg
        self.new = _of_new_advertisers(log, targets)
        self.tier_R = _tiers(log, targets, cfg.sparse_quantile)
        self.eligible = _eligible_advertisers(log, targets)

    def values(self, blended: Sequence[Blended]) -> Values:
        """Every per-request measure, by (measure, segment, list length); NaN where a request is not of the segment."""
        ads_RK, cfg, found = as_matrix(blended, self.cfg.budget), self.cfg, Values()
        for segment, targets in (("all", self.targets), ("new", self.new)):
            hit_RK, count_R = hits(ads_RK, targets.ptr, targets.item), np.diff(targets.ptr)
            for k in cfg.ks:
                found["recall", segment, k] = recall_at_k(hit_RK, count_R, k)
                found["ndcg", segment, k] = ndcg_at_k(hit_RK, count_R, k)
            found["mrr", segment, cfg.budget] = reciprocal_rank(hit_RK, count_R, cfg.budget)
        value_RK = place_values(ads_RK, self.targets.ptr, self.targets.item, self.targets.value)
        for k in cfg.ks:
            found["value_recall", "all", k] = value_recall_at_k(value_RK, self.targets.ptr, self.targets.value, k)
            for tier, name in enumerate(TIERS):
                found["recall", name, k] = np.where(self.tier_R == tier, found["recall", "all", k], np.nan)
        return found

    def lists_rows(self, arm: str, blended: Sequence[Blended]) -> list[Row]:
        """Coverage and concentration of advertisers, and hits by the channel that alone found them."""
        shown = self.shown(blended)

        def row(metric: str, value: float, segment: str = "all") -> Row:
            return Row(SECTION, metric, arm, segment, None, value, None, None, len(self.targets))

        rows = [row("coverage", coverage(shown, self.eligible)), row("gini", self.gini(blended))]
        alone: dict[str, int] = {}
        total = 0
        for names in self._hits(blended):
            total += 1
            if len(names) == 1:
                alone[names[0]] = alone.get(names[0], 0) + 1
        return rows + [row("hits_found_alone", count / max(total, 1), name) for name, count in sorted(alone.items())]

    def gini(self, blended: Sequence[Blended]) -> float:
        """Concentration of the candidates on advertisers, of all that were eligible."""
        shown = self.shown(blended)
        return gini(np.bincount(shown, minlength=len(self.log.advertiser_ids))[self.eligible])

    def shown(self, blended: Sequence[Blended]) -> NDArray[np.int32]:
        """Advertiser of every candidate that has one."""
        ads = np.concatenate([np.zeros(0, np.int32), *(one.ads for one in blended)])
        shown = self.log.ad_advertiser[ads]
        return shown[shown >= 0]

    def _hits(self, blended: Sequence[Blended]) -> Iterator[tuple[str, ...]]:
        for request, one in enumerate(blended):
            wanted = set(self.targets.of(request).tolist())
            for ad, names in zip(one.ads.tolist(), one.found_by, strict=True):
                if ad in wanted:
                    yield names

    def mean_rows(self, arms: Mapping[str, Values], differences: Sequence[tuple[str, str]]) -> list[Row]:
        """Means of arms with intervals over users, and paired differences of arms.

        Args:
            arms: values of each arm.
            differences: pairs of arms; those not measured are left out.
        """
        users, rows = self.targets.user, []
        for key in next(iter(arms.values()), {}):
            metric, segment, k = key
            name: dict[str, Any] = {"section": SECTION, "metric": metric, "segment": segment, "k": k}
            rows += [Row.of(bootstrap_mean(values[key], users), arm=arm, **name) for arm, values in arms.items()]
            rows += [
                Row.of(paired_bootstrap(arms[a][key], arms[b][key], users), arm=f"{a} - {b}", **name)
                for a, b in differences
                if a in arms and b in arms
            ]
        return rows


def evaluate_retrieval(
    retriever: Retriever,
    forecasts: Mapping[str, Forecast | None],
    *,
    users: NDArray[np.integer],
) -> RetrievalEvaluation:
    """Compare the arms on the requests with a conversion.

    Args:
        retriever: channels and configuration.
        forecasts: forecast of each arm; None for ``none``.
        users: the panel.

    Returns:
        Rows, chosen plans and the sweep.
    """
    log, cfg = retriever.log, retriever.cfg
    evaluated = Requests(retriever, log.ad_targets(log.evaluate, users))
    tuning = Requests(retriever, tuning_targets(log, users, cfg))
    judge, evaluation = Judge(log, evaluated.targets, cfg), RetrievalEvaluation()
    limits = retriever.limits
    shares = choose_shares(tuning.base, tuning.targets, cfg, limits)
    values: dict[str, Values] = {}
    for arm, forecast in forecasts.items():
        plan = choose_plan(
            tuning.by_weight(forecast), tuning.targets, cfg, limits, base_shares=shares, forecast=forecast is not None
        )
        lists_R = evaluated.lists(forecast, plan.prior_weight)
        blended = evaluated.merged(lists_R, plan.blend)
        evaluation.plans[arm], values[arm] = plan, judge.values(blended)
        evaluation.rows += judge.lists_rows(arm, blended)
        if forecast is not None and cfg.forecast_channels:
            evaluation.sweep += sweep(evaluated, lists_R, judge, shares, arm)
    evaluation.rows += judge.mean_rows(values, DIFFERENCES)
    return evaluation


def sweep(
    evaluated: Requests, lists_R: Sequence[Mapping[str, Ads]], judge: Judge, shares: Mapping[str, float], arm: str
) -> list[dict[str, Any]]:
    """Recall and concentration by the forecast channels' quota; the paper warns that a large one over-concentrates."""
    points, cfg = [], judge.cfg
    for quota in cfg.quotas:
        blended = evaluated.merged(lists_R, with_quota(shares, quota, cfg, forecast=True))
        interval = bootstrap_mean(judge.values(blended)["recall", "all", max(cfg.ks)], judge.targets.user)
        points.append({
            "arm": arm, "quota": quota, "recall": interval.value, "ci_low": interval.low, "ci_high": interval.high,
            "gini": judge.gini(blended),
        })  # fmt: skip
    return points


def _eligible_advertisers(log: Log, targets: Targets) -> NDArray[np.int32]:
    visits = np.unique(np.stack([targets.market, targets.period]), axis=1).T
    active = [log.active_advertisers(int(market), int(period)) for market, period in visits]
    return np.unique(np.concatenate(active)) if active else np.zeros(0, np.int32)


def _of_new_advertisers(log: Log, targets: Targets) -> Targets:
    """The same requests with the targets whose advertiser the user never bought from before."""
    row_T, advertiser_T = targets.row, log.ad_advertiser[targets.item]
    keep_T = (advertiser_T >= 0) & log.is_new(targets.user[row_T], targets.period[row_T], advertiser_T)
    return targets.keep(keep_T)


def _tiers(log: Log, targets: Targets, quantile: float) -> NDArray[np.int64]:
    """0 for requests of the users with the fewest purchases before the evaluated span, 2 for those with the most."""
    if not len(targets):
        return np.zeros(0, dtype=np.int64)
    first = int(targets.period.min())
    users, row_R = np.unique(targets.user, return_inverse=True)
    purchases = np.array([int(log.is_purchase[log.history(int(user), first)].sum()) for user in users])
    low, high = np.quantile(purchases, [quantile, max(1.0 - quantile, quantile)])
    return np.where(purchases <= low, 0, np.where(purchases <= high, 1, 2))[row_R]
