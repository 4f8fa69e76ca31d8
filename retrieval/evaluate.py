"""What the forecast adds to retrieval, at the same total number of candidates.

Every arm gets ``budget`` candidates a request out of the ads that are active in the visited market and
period. In the arm ``none`` the two-tower has all places; in ``anchor`` and ``lm`` the forecast channels get
a quota of them. Quota and weight of the forecast are chosen for each arm on the ranker's spans, from which
neither towers nor forecast have learned and which end before the evaluated one.

Shapes: R requests, K budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.log import Log, Targets
from data.statistics import Row, bootstrap_mean, paired_bootstrap
from priors.forecast import Forecast
from retrieval.blend import Blended, blend
from retrieval.channels import (
    FORECAST,
    POPULARITY,
    SEEDED,
    TWO_TOWER,
    Channel,
    ForecastChannel,
    PopularityChannel,
    Request,
    SeededChannel,
    TwoTowerChannel,
)
from retrieval.config import RetrievalConfig
from retrieval.index import NO_AD
from retrieval.metrics import coverage, gini, hits, ndcg_at_k, recall_at_k, reciprocal_rank
from retrieval.two_tower import TrainedTwoTower

SECTION = "retrieval"
NONE = "none"
DIFFERENCES = (("lm", "anchor"), ("lm", NONE), ("anchor", NONE))


@dataclass
class RetrievalEvaluation:
    """Figures of retrieval.

    Attributes:
        rows: tidy rows of section ``retrieval``.
        quotas: quota chosen for each arm.
        prior_weights: weight of the forecast chosen for each arm.
        sweep: recall and concentration by quota on the evaluated span, as plain dicts for the plot.
    """

    rows: list[Row] = field(default_factory=list)
    quotas: dict[str, float] = field(default_factory=dict)
    prior_weights: dict[str, float] = field(default_factory=dict)
    sweep: list[dict[str, Any]] = field(default_factory=list)


class Retriever:
    """Answers requests of one arm.

    Args:
        log: ads, placements and histories.
        two_tower: user vectors and the ad index.
        forecast: of the arm; None for the arm without.
        cfg: budget and channels.
        prior_weight: of the forecast in its channel's score.
    """

    def __init__(
        self,
        log: Log,
        two_tower: TrainedTwoTower,
        forecast: Forecast | None,
        cfg: RetrievalConfig,
        *,
        prior_weight: float = 0.0,
    ) -> None:
        self.log, self.forecast, self.cfg = log, forecast, cfg
        self.embed = two_tower.embedder(log, cfg.pairs)
        index, own = two_tower.index, log.ad_advertiser
        self.channels: list[Channel] = [TwoTowerChannel(index), PopularityChannel(log)]
        if forecast is not None:
            self.channels += [
                ForecastChannel(
                    index,
                    own,
                    cfg.forecast.advertisers,
                    prior_weight=prior_weight,
                    temperature=two_tower.cfg.temperature,
                ),
                SeededChannel(index, own, cfg.forecast.seed_advertisers),
            ]

    def lists(
        self, user_R: NDArray[np.integer], market_R: NDArray[np.integer], period_R: NDArray[np.integer]
    ) -> list[dict[str, NDArray[np.int32]]]:
        """What each channel finds for each request, twice the budget long so that no duplicate costs a place.

        Returns:
            One dict a request, from channel to ads.
        """
        vector_RD = self.embed(user_R, period_R)
        found = []
        for row in range(len(user_R)):
            user, period = user_R[row : row + 1], period_R[row : row + 1]
            request = Request(
                period=int(period[0]),
                active=np.sort(self.log.active_ads(int(market_R[row]), int(period[0])).ad),
                vector_D=None if np.isnan(vector_RD[row]).any() else vector_RD[row],
                log_prob_A=None if self.forecast is None else self.forecast.log_probs(user, period)[0],
            )
            found.append({channel.name: channel.candidates(request, 2 * self.cfg.budget) for channel in self.channels})
        return found

    def blend(self, lists: Mapping[str, NDArray[np.int32]], quota: float) -> Blended:
        """One list of ``budget`` ads; what no channel can fill is filled by popularity.

        Args:
            lists: of one request.
            quota: share of the budget that the forecast channels get.
        """
        shares = {TWO_TOWER: 1.0}
        if FORECAST in lists:
            seeded = quota * self.cfg.forecast.seeded_share
            shares = {TWO_TOWER: 1.0 - quota, FORECAST: quota - seeded, SEEDED: seeded}
        return blend(lists, shares, budget=self.cfg.budget, fallback=POPULARITY)

    def candidates(self, user: int, market: int, period: int, quota: float) -> Blended:
        """Candidates of one request, with the channels that found each."""
        lists = self.lists(np.array([user]), np.array([market]), np.array([period]))
        return self.blend(lists[0], quota)


def evaluate_retrieval(
    log: Log,
    two_tower: TrainedTwoTower,
    forecasts: Mapping[str, Forecast | None],
    cfg: RetrievalConfig,
    *,
    users: NDArray[np.integer],
) -> RetrievalEvaluation:
    """Compare the arms on the requests with a conversion.

    Args:
        log: the log.
        two_tower: trained towers.
        forecasts: forecast of each arm; None for ``none``.
        cfg: budget, quotas, list lengths.
        users: the panel.

    Returns:
        Rows, chosen quotas and the sweep.
    """
    evaluation = RetrievalEvaluation()
    targets, choosing = log.ad_targets(log.evaluate, users), _choosing(log, users, cfg)
    new = _of_new_advertisers(log, targets)
    sparse_R = _sparse(log, targets, cfg.sparse_quantile)
    values: dict[tuple[str, str, int], dict[str, NDArray[np.float64]]] = {}
    for arm, forecast in forecasts.items():
        weights = [0.0] if forecast is None else list(cfg.forecast.prior_weights)
        quotas = [0.0] if forecast is None else list(cfg.quotas)
        retrievers = {weight: Retriever(log, two_tower, forecast, cfg, prior_weight=weight) for weight in weights}
        evaluation.prior_weights[arm], evaluation.quotas[arm] = _choose(retrievers, choosing, quotas)
        retriever = retrievers[evaluation.prior_weights[arm]]
        lists = retriever.lists(targets.user, targets.market, targets.period)
        by_quota = {quota: [retriever.blend(found, quota) for found in lists] for quota in quotas}
        if forecast is not None:
            evaluation.sweep += [_sweep_point(arm, q, blended, log, targets, cfg) for q, blended in by_quota.items()]
        chosen = by_quota[evaluation.quotas[arm]]
        ads_RK = _matrix(chosen, cfg.budget)
        evaluation.rows += _list_rows(arm, chosen, ads_RK, log, targets)
        for segment, of_segment in (("all", targets), ("new", new)):
            hit_RK = hits(ads_RK, of_segment.ptr, of_segment.item)
            count_R = np.diff(of_segment.ptr)
            for k in cfg.ks:
                values.setdefault(("recall", segment, k), {})[arm] = recall_at_k(hit_RK, count_R, k)
                values.setdefault(("ndcg", segment, k), {})[arm] = ndcg_at_k(hit_RK, count_R, k)
            values.setdefault(("mrr", segment, cfg.budget), {})[arm] = reciprocal_rank(hit_RK, count_R, cfg.budget)
            if segment == "all":
                for k in cfg.ks:
                    recall = np.where(sparse_R, values["recall", "all", k][arm], np.nan)
                    values.setdefault(("recall", "sparse users", k), {})[arm] = recall
    for (metric, segment, k), arms in values.items():
        name = {"section": SECTION, "metric": metric, "segment": segment, "k": k}
        evaluation.rows += [
            Row.of(bootstrap_mean(value, targets.user), arm=arm, **name)  # type: ignore[arg-type]
            for arm, value in arms.items()
        ]
        evaluation.rows += [
            Row.of(paired_bootstrap(arms[a], arms[b], targets.user), arm=f"{a} - {b}", **name)  # type: ignore[arg-type]
            for a, b in DIFFERENCES
            if a in arms and b in arms
        ]
    return evaluation


def _choosing(log: Log, users: NDArray[np.integer], cfg: RetrievalConfig) -> Targets:
    """Requests of the ranker's spans that quota and weight are chosen on."""
    targets = log.ad_targets((log.split.ranker_fit[0], log.split.ranker_stop[1]), users)
    rng = np.random.default_rng(cfg.seed)
    return targets.select(np.sort(rng.permutation(len(targets))[: cfg.quota_requests]))


def _choose(retrievers: Mapping[float, Retriever], choosing: Targets, quotas: Sequence[float]) -> tuple[float, float]:
    """Weight and quota with the best recall at the budget; of equal ones the smallest."""
    if len(retrievers) * len(quotas) == 1 or not len(choosing):
        return min(retrievers), min(quotas)
    count_R, recall = np.diff(choosing.ptr), {}
    for weight, retriever in sorted(retrievers.items()):
        lists, budget = retriever.lists(choosing.user, choosing.market, choosing.period), retriever.cfg.budget
        for quota in sorted(quotas):
            ads_RK = _matrix([retriever.blend(found, quota) for found in lists], budget)
            hit_RK = hits(ads_RK, choosing.ptr, choosing.item)
            recall[weight, quota] = float(np.nanmean(recall_at_k(hit_RK, count_R, budget)))
    return max(recall, key=lambda pair: (recall[pair], -pair[1], -pair[0]))


def _sweep_point(
    arm: str, quota: float, blended: list[Blended], log: Log, targets: Targets, cfg: RetrievalConfig
) -> dict[str, Any]:
    ads_RK = _matrix(blended, cfg.budget)
    recall_R = recall_at_k(hits(ads_RK, targets.ptr, targets.item), np.diff(targets.ptr), cfg.budget)
    interval = bootstrap_mean(recall_R, targets.user)
    return {
        "arm": arm, "quota": quota, "recall": interval.value, "ci_low": interval.low, "ci_high": interval.high,
        "gini": gini(_exposures(ads_RK, log, targets)),
    }  # fmt: skip


def _list_rows(arm: str, blended: list[Blended], ads_RK: NDArray[np.int32], log: Log, targets: Targets) -> list[Row]:
    """Coverage and concentration of advertisers, and hits that one channel alone found."""
    n = len(targets)
    eligible = _eligible_advertisers(log, targets)
    shown_RK = np.where(ads_RK >= 0, log.ad_advertiser[ads_RK], -1)

    def row(metric: str, value: float, segment: str = "all") -> Row:
        return Row(SECTION, metric, arm, segment, None, value, None, None, n)

    rows = [row("coverage", coverage(shown_RK, eligible)), row("gini", gini(_exposures(ads_RK, log, targets)))]
    alone: dict[str, int] = {}
    total = 0
    for request, one in enumerate(blended):
        wanted = set(targets.of(request).tolist())
        for ad, channels in zip(one.ads.tolist(), one.found_by, strict=True):
            if ad in wanted:
                total += 1
                if len(channels) == 1:
                    alone[channels[0]] = alone.get(channels[0], 0) + 1
    rows += [row("hits_found_alone", count / max(total, 1), name) for name, count in sorted(alone.items())]
    return rows


def _matrix(blended: Sequence[Blended], budget: int) -> NDArray[np.int32]:
    ads_RK = np.full((len(blended), budget), NO_AD, dtype=np.int32)
    for row, one in enumerate(blended):
        ads_RK[row, : len(one)] = one.ads
    return ads_RK


def _eligible_advertisers(log: Log, targets: Targets) -> NDArray[np.int32]:
    visits = np.unique(np.stack([targets.market, targets.period]), axis=1).T
    active = [log.active_advertisers(int(market), int(period)) for market, period in visits]
    return np.unique(np.concatenate(active)) if active else np.zeros(0, np.int32)


def _exposures(ads_RK: NDArray[np.int32], log: Log, targets: Targets) -> NDArray[np.int64]:
    """How often each eligible advertiser was shown."""
    shown = log.ad_advertiser[ads_RK[ads_RK >= 0]]
    counts = np.bincount(shown[shown >= 0], minlength=len(log.advertiser_ids))
    return counts[_eligible_advertisers(log, targets)]


def _of_new_advertisers(log: Log, targets: Targets) -> Targets:
    """The same requests with the targets whose advertiser the user never bought from before."""
    row_T, advertiser_T = targets.row, log.ad_advertiser[targets.item]
    keep_T = (advertiser_T >= 0) & log.is_new(targets.user[row_T], targets.period[row_T], advertiser_T)
    ptr = np.concatenate([[0], np.cumsum(np.bincount(row_T[keep_T], minlength=len(targets)))])
    return Targets(
        targets.user, targets.period, targets.market, ptr,
        targets.item[keep_T], targets.weight[keep_T], targets.value[keep_T],
    )  # fmt: skip


def _sparse(log: Log, targets: Targets, quantile: float) -> NDArray[np.bool_]:
    """Requests of the users with the fewest purchases before the evaluated span."""
    if not len(targets):
        return np.zeros(0, dtype=bool)
    first = int(targets.period.min())
    users, row_R = np.unique(targets.user, return_inverse=True)
    purchases = np.array([int(log.is_purchase[log.history(int(user), first)].sum()) for user in users])
    return (purchases <= np.quantile(purchases, quantile))[row_R]
