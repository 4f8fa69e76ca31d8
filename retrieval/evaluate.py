"""What the forecast adds to retrieval, at the same total number of candidates.

Every arm gets ``budget`` candidates a request out of the ads that are active in the visited market and
period. In the arm ``none`` the channels without a forecast have all places; in ``anchor`` and ``lm`` the
forecast channels get a quota of them. Shares, quota and weight of the forecast are chosen by
`retrieval.tuning` before the evaluated span.

Shapes: R requests, K budget.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.log import Log, Targets
from data.statistics import TIERS, Row, activity_tiers, bootstrap_mean, paired_bootstrap
from priors.forecast import Forecast
from retrieval.blend import Blend, Blended, QuotaBlend, merge
from retrieval.channels import Ads, AdvertiserChannel, Request
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
from retrieval.tuning import Plan, as_matrix, choose_plan, choose_shares, choose_weight, tuning_targets, with_quota

SECTION = "retrieval"
NONE = "none"
DIFFERENCES = (("lm", "anchor"), ("lm", NONE), ("anchor", NONE))
Values = dict[tuple[str, str, int], NDArray[np.float64]]
_Variant = tuple[str, str, tuple[str, ...]]
"""An arm, a kind of blend and the channels it merges."""


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
        forecasts: of each arm, None for an arm without.
    """

    def __init__(self, retriever: Retriever, targets: Targets, forecasts: Mapping[str, Forecast | None]) -> None:
        self.retriever, self.targets, self.forecasts = retriever, targets, forecasts
        self.requests: list[Request] = retriever.requests(targets)
        self._asked: dict[str, list[Request]] = {}
        self._lists: dict[tuple[str, float | None], list[dict[str, Ads]]] = {}

    def __len__(self) -> int:
        return len(self.targets)

    @cached_property
    def base(self) -> list[dict[str, Ads]]:
        """Lists of the channels without a forecast."""
        return self.retriever.lists(self.requests)

    def lists(self, arm: str, prior_weight: float = 0.0) -> list[dict[str, Ads]]:
        """Lists of all channels of an arm, by name, one dict a request."""
        steady_R = self.steady(arm)
        if self.forecasts[arm] is None or FORECAST not in self.retriever.cfg.channels:
            return steady_R
        return _joined(steady_R, self._found(arm, [FORECAST], prior_weight))

    def steady(self, arm: str) -> list[dict[str, Ads]]:
        """Those of `lists` that are the same under every prior weight."""
        names = [name for name in self.retriever.cfg.forecast_channels if name != FORECAST]
        if self.forecasts[arm] is None or not names:
            return self.base
        return _joined(self.base, self._found(arm, names, None))

    def by_weight(self, arm: str) -> dict[float, list[dict[str, Ads]]]:
        """`lists` under each prior weight that the configuration chooses from."""
        cfg = self.retriever.cfg
        chosen = self.forecasts[arm] is not None and FORECAST in cfg.channels
        return {weight: self.lists(arm, weight) for weight in (cfg.forecast.prior_weights if chosen else [0.0])}

    def alone_by_weight(self, arm: str, name: str, weights: Sequence[float]) -> dict[float, list[dict[str, Ads]]]:
        """Lists of one channel, those that read no prior weight beside it, under each of some weights.

        A channel that reads none has the weight 0 alone.
        """
        if name == FORECAST:
            return {weight: self.lists(arm, weight) for weight in weights}
        channel, retriever = self.retriever.channels[name], self.retriever
        if not isinstance(channel, AdvertiserChannel):
            return {0.0: self.steady(arm)}
        return {
            weight: _joined(self.steady(arm), retriever.ask({name: channel.weighing(weight)}, self.requests))
            for weight in weights
        }

    def _found(self, arm: str, names: Sequence[str], weight: float | None) -> list[dict[str, Ads]]:
        """What channels find by an arm's forecast; under no weight, those that read none."""
        if (arm, weight) not in self._lists:
            forecast = self.forecasts[arm]
            if arm not in self._asked and forecast is not None:
                self._asked[arm] = with_forecast(self.requests, forecast)
            asked = [replace(request, prior_weight=weight or 0.0) for request in self._asked[arm]]
            self._lists[arm, weight] = self.retriever.lists(asked, names)
        return self._lists[arm, weight]

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


@dataclass(frozen=True)
class Judged:
    """An arm's lists under its plan.

    Attributes:
        plan: what was chosen.
        blended: its list of every request.
        values: measures of these lists.
    """

    plan: Plan
    blended: list[Blended]
    values: Values


class Arms:
    """Arms on one panel: plans, lists and figures, each made once whichever study asks for it.

    Args:
        retriever: channels and configuration.
        forecasts: forecast of each arm; None for ``none``.
        users: the panel.
        tuned: answers the requests that plans are chosen on, where another does than those that are measured.
    """

    def __init__(
        self,
        retriever: Retriever,
        forecasts: Mapping[str, Forecast | None],
        users: NDArray[np.integer],
        tuned: Retriever | None = None,
    ) -> None:
        log, self.cfg = retriever.log, retriever.cfg
        self.retriever, self.forecasts = retriever, forecasts
        self.targets = log.ad_targets(log.evaluate, users)
        self.judge = Judge(log, self.targets, self.cfg)
        self.tuning = Requests(tuned or retriever, tuning_targets(log, users, self.cfg), forecasts)
        self._plans: dict[_Variant, Plan] = {}
        self._judged: dict[_Variant, Judged] = {}
        self._shares: dict[_Variant, dict[str, float]] = {}

    @cached_property
    def evaluated(self) -> Requests:
        """The requests that are measured."""
        return Requests(self.retriever, self.targets, self.forecasts)

    def plan(self, arm: str, cfg: RetrievalConfig) -> Plan:
        """Of an arm under a kind of blend and some of the channels."""
        key = _variant(arm, cfg, cfg.channels)
        if key not in self._plans:
            self._plans[key] = choose_plan(
                self.tuning.by_weight(arm),
                self.tuning.targets,
                cfg,
                self.retriever.limits,
                base_shares=self.shares(cfg),
                forecast=self.forecasts[arm] is not None,
            )
        return self._plans[key]

    def shares(self, cfg: RetrievalConfig) -> dict[str, float]:
        """Of the channels without a forecast."""
        key = _variant(NONE, cfg, cfg.base_channels)
        if key not in self._shares:
            self._shares[key] = choose_shares(self.tuning.base, self.tuning.targets, cfg, self.retriever.limits)
        return self._shares[key]

    def judged(self, arm: str, cfg: RetrievalConfig) -> Judged:
        """Of an arm under its plan for a kind of blend and some of the channels."""
        key = _variant(arm, cfg, cfg.channels)
        if key not in self._judged:
            self._judged[key] = self.judged_by(arm, self.plan(arm, cfg))
        return self._judged[key]

    def judged_by(self, arm: str, plan: Plan) -> Judged:
        """Of an arm under any plan."""
        return self._judge(plan, self.evaluated.lists(arm, plan.prior_weight))

    def _judge(self, plan: Plan, lists_R: Sequence[Mapping[str, Ads]]) -> Judged:
        blended = self.evaluated.merged(lists_R, plan.blend)
        return Judged(plan, blended, self.judge.values(blended))

    def alone(self, arm: str, name: str) -> Judged:
        """Of an arm whose places are all one channel's, under the weight that finds most of the tuning requests."""
        limits, weights = self.retriever.limits, self.cfg.forecast.prior_weights
        tried = self.tuning.alone_by_weight(arm, name, weights)
        weight = choose_weight(tried, name, self.tuning.targets, limits)
        lists_R = self.evaluated.alone_by_weight(arm, name, [weight])[weight]
        return self._judge(Plan(QuotaBlend({name: 1.0}), prior_weight=weight), lists_R)

    def compare(self) -> RetrievalEvaluation:
        """All arms, and their differences."""
        evaluation, values = RetrievalEvaluation(), dict[str, Values]()
        for arm, forecast in self.forecasts.items():
            judged = self.judged(arm, self.cfg)
            evaluation.plans[arm], values[arm] = judged.plan, judged.values
            evaluation.rows += self.judge.lists_rows(arm, judged.blended)
            if forecast is not None and self.cfg.forecast_channels:
                lists_R = self.evaluated.lists(arm, judged.plan.prior_weight)
                evaluation.sweep += sweep(self.evaluated, lists_R, self.judge, self.shares(self.cfg), arm)
        evaluation.rows += self.judge.mean_rows(values, DIFFERENCES)
        return evaluation


def evaluate_retrieval(
    retriever: Retriever,
    forecasts: Mapping[str, Forecast | None],
    *,
    users: NDArray[np.integer],
    tuned: Retriever | None = None,
) -> RetrievalEvaluation:
    """Compare the arms on the requests with a conversion; arguments as of `Arms`."""
    return Arms(retriever, forecasts, users, tuned).compare()


def _joined(one_R: Sequence[dict[str, Ads]], other_R: Sequence[dict[str, Ads]]) -> list[dict[str, Ads]]:
    return [one | other for one, other in zip(one_R, other_R, strict=True)]


def _variant(arm: str, cfg: RetrievalConfig, channels: Sequence[str]) -> _Variant:
    return arm, cfg.blend.kind, tuple(channels)


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
    """Tier of each request: that of its user, among users with a request, by purchases before the evaluated span."""
    if not len(targets):
        return np.zeros(0, dtype=np.int64)
    first = int(targets.period.min())
    users, row_R = np.unique(targets.user, return_inverse=True)
    purchases = np.array([int(log.is_purchase[log.history(int(user), first)].sum()) for user in users])
    return activity_tiers(purchases, lowest=quantile, highest=max(1.0 - quantile, quantile))[row_R]
