"""Which blend an arm gets: chosen by recall at the budget, on requests before the evaluated ones.

With ``evaluate=validation`` these are requests of the ranker's spans, with ``evaluate=test`` of the validation span:
always the last ones before the evaluated span, from which neither towers nor forecast have learned.

    shares of the channels without a forecast ── coordinate by coordinate, in the arm without
                                   └─ (1 - quota) of them + quota to the forecast channels ── the best quota and
                                                                                              prior weight an arm
    calibrated: a logistic regression on places, an arm

Shapes: R requests, C channels, N candidates of all requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from data.log import Log, Targets
from retrieval.blend import Blend, Blended, CalibratedBlend, FusionBlend, Limits, Lists, QuotaBlend, blend_of, merge
from retrieval.config import POPULARITY, SEEDED, RetrievalConfig
from retrieval.index import NO_AD
from retrieval.metrics import hits, recall_at_k

STEPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
ROUNDS = 2
RIDGE, NEWTON_STEPS = 1.0, 12


@dataclass(frozen=True)
class Plan:
    """What an arm does with its channels' lists.

    Attributes:
        blend: makes one list of them.
        quota: share of the places, or of the weight, that the forecast channels have; None where none is set.
        prior_weight: of the forecast in the score of its ads; 0 is the paper's rule.
    """

    blend: Blend
    quota: float | None = None
    prior_weight: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        """Plain types for a JSON file."""
        return {"blend": self.blend.to_plain(), "quota": self.quota, "prior_weight": self.prior_weight}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """Back from :meth:`to_plain`."""
        return cls(blend_of(plain["blend"]), plain["quota"], plain["prior_weight"])


def limits_of(cfg: RetrievalConfig, log: Log) -> Limits:
    """Budget, fallback and cap of a configuration."""
    return Limits(cfg.budget, POPULARITY, cfg.blend.per_advertiser, log.ad_advertiser)


def tuning_span(log: Log) -> tuple[int, int]:
    """Periods whose requests blends are chosen on."""
    if log.evaluate == "test":
        return log.split.validation
    return log.split.ranker_fit[0], log.split.ranker_stop[1]


def tuning_targets(log: Log, users: NDArray[np.integer], cfg: RetrievalConfig) -> Targets:
    """A sample of the tuning span's requests."""
    targets = log.ad_targets(tuning_span(log), users)
    rng = np.random.default_rng(cfg.seed)
    return targets.select(np.sort(rng.permutation(len(targets))[: cfg.quota_requests]))


def mean_recall(lists_R: Sequence[Lists], targets: Targets, blend: Blend, limits: Limits) -> float:
    """Mean recall at the budget; 0 without a request."""
    if not len(targets):
        return 0.0
    ads_RK = as_matrix([merge(lists, blend, limits) for lists in lists_R], limits.budget)
    hit_RK = hits(ads_RK, targets.ptr, targets.item)
    return float(np.nanmean(recall_at_k(hit_RK, np.diff(targets.ptr), limits.budget)))


def as_matrix(blended: Sequence[Blended], budget: int) -> NDArray[np.int32]:
    """Ads of the lists, ``(R, budget)``, `NO_AD` where a list is shorter."""
    ads_RK = np.full((len(blended), budget), NO_AD, dtype=np.int32)
    for row, one in enumerate(blended):
        ads_RK[row, : len(one)] = one.ads
    return ads_RK


def choose_plan(
    lists_by_weight: Mapping[float, Sequence[Lists]],
    targets: Targets,
    cfg: RetrievalConfig,
    limits: Limits,
    *,
    base_shares: Mapping[str, float],
    forecast: bool,
) -> Plan:
    """The best plan of an arm; of equal ones that with the smallest quota.

    Under a quota of 0 no weight of the forecast changes anything. Then the weight is the one that is best over the
    other quotas, so that whoever looks at the forecast's channel all the same sees it as well set as it can be.

    Args:
        lists_by_weight: the channels' lists of the tuning requests under each prior weight.
        targets: of these requests.
        cfg: kind of blend, quotas.
        limits: budget, fallback and cap.
        base_shares: of the channels without a forecast; of `choose_shares`.
        forecast: whether the arm has a forecast.
    """
    trials: list[tuple[tuple[float, ...], Plan]] = []
    channels = cfg.channels if forecast else cfg.base_channels
    quotas = sorted(cfg.quotas) if forecast and cfg.forecast_channels else [0.0]
    blends = {quota: with_quota(base_shares, quota, cfg, forecast=forecast) for quota in quotas}
    for weight, lists_R in sorted(lists_by_weight.items()):
        if cfg.blend.kind == "calibrated":
            plan = Plan(fit_calibrated(lists_R, targets, channels), None, weight)
            trials.append(((mean_recall(lists_R, targets, plan.blend, limits), -weight), plan))
            continue
        recall_by = {quota: mean_recall(lists_R, targets, blend, limits) for quota, blend in blends.items()}
        elsewhere = [recall for quota, recall in recall_by.items() if quota]
        worth = float(np.mean(elsewhere)) if elsewhere else 0.0
        trials += [
            ((recall, -quota, worth, -weight), Plan(blends[quota], quota, weight))
            for quota, recall in recall_by.items()
        ]
    return max(trials, key=lambda trial: trial[0])[1]


def choose_weight(
    lists_by_weight: Mapping[float, Sequence[Lists]], channel: str, targets: Targets, limits: Limits
) -> float:
    """The weight under which a channel recalls most with the whole budget; of equal ones the smallest.

    Args:
        lists_by_weight: with the channel's lists of the tuning requests under each.
        channel: its name.
        targets: of these requests.
        limits: budget, fallback and cap.
    """
    if len(lists_by_weight) == 1:
        return next(iter(lists_by_weight))
    alone = QuotaBlend({channel: 1.0})
    return max(sorted(lists_by_weight), key=lambda weight: mean_recall(lists_by_weight[weight], targets, alone, limits))


def with_quota(base_shares: Mapping[str, float], quota: float, cfg: RetrievalConfig, *, forecast: bool) -> Blend:
    """The blend that gives the forecast channels a quota and the others the rest."""
    names = cfg.forecast_channels if forecast else []
    if not names:
        return weighted(dict(base_shares), cfg)
    seeded = cfg.forecast.seeded_share if SEEDED in names and len(names) > 1 else float(SEEDED in names)
    shares = {name: (1.0 - quota) * share for name, share in base_shares.items()}
    shares |= {name: quota * (seeded if name == SEEDED else 1.0 - seeded) for name in names}
    return weighted(shares, cfg)


def weighted(shares: dict[str, float], cfg: RetrievalConfig) -> Blend:
    """The configuration's kind of blend with given shares; quotas where the kind takes none."""
    if cfg.blend.kind == "rrf":
        return FusionBlend(shares, cfg.blend.rrf_constant)
    return QuotaBlend(shares)


def choose_shares(lists_R: Sequence[Lists], targets: Targets, cfg: RetrievalConfig, limits: Limits) -> dict[str, float]:
    """Shares of the channels without a forecast: the configuration's, or tuned ones.

    Each channel's share in turn takes the value with the best recall, the others keeping their proportions.
    """
    names = cfg.base_channels
    if cfg.blend.shares:
        total = sum(cfg.blend.shares.values())
        return {name: cfg.blend.shares.get(name, 0.0) / total for name in names}
    shares = dict.fromkeys(names, 1.0 / len(names))
    if len(names) == 1 or not len(targets):
        return shares

    def recall(trial: dict[str, float]) -> float:
        return mean_recall(lists_R, targets, weighted(trial, cfg), limits)

    return ascend(shares, recall)


def ascend(shares: dict[str, float], value: Callable[[dict[str, float]], float]) -> dict[str, float]:
    """Shares that are worth most, channel by channel from those given; they add up to 1 throughout."""
    best = value(shares)
    for _ in range(ROUNDS):
        before = best
        for name in shares:
            others = {other: share for other, share in shares.items() if other != name}
            rest = sum(others.values())  # not 1 less its own: rounding would leave a rest where nobody has any
            if not rest:
                continue
            for step in STEPS:
                trial = shares | {other: share * (1.0 - step) / rest for other, share in others.items()} | {name: step}
                if (found := value(trial)) > best:
                    best, shares = found, trial
        if best == before:
            break
    return shares


def fit_calibrated(lists_R: Sequence[Lists], targets: Targets, channels: Sequence[str]) -> CalibratedBlend:
    """Logistic regression of "was converted with" on the places of every candidate, by Newton's method.

    Args:
        lists_R: of each request.
        targets: what each converted with.
        channels: whose places are read.
    """
    design, label = [], []
    for row, lists in enumerate(lists_R):
        ads_of = {name: lists[name][lists[name] >= 0] for name in channels}
        ads = np.unique(np.concatenate([*ads_of.values(), np.zeros(0, np.int32)]))
        features = np.zeros((len(ads), 2 * len(channels) + 1))
        features[:, -1] = 1.0
        for column, name in enumerate(channels):
            at = np.searchsorted(ads, ads_of[name])
            features[at, 2 * column] = 1.0
            features[at, 2 * column + 1] = np.log1p(np.arange(len(at)))
        design.append(features)
        label.append(np.isin(ads, targets.of(row)))
    x_NF = np.concatenate([*design, np.zeros((0, 2 * len(channels) + 1))])
    y_N = np.concatenate([*label, np.zeros(0, bool)]).astype(float)
    weights_F = np.zeros(x_NF.shape[1])
    penalty_F = np.full(len(weights_F), RIDGE)
    penalty_F[-1] = 1e-9
    for _ in range(NEWTON_STEPS):
        p_N = 1.0 / (1.0 + np.exp(-np.clip(x_NF @ weights_F, -30, 30)))
        gradient_F = x_NF.T @ (y_N - p_N) - penalty_F * weights_F
        hessian_FF = (x_NF * (p_N * (1 - p_N) + 1e-9)[:, None]).T @ x_NF + np.diag(penalty_F)
        weights_F = weights_F + np.linalg.solve(hessian_FF, gradient_F)
    return CalibratedBlend(
        found={name: float(weights_F[2 * column]) for column, name in enumerate(channels)},
        per_log_place={name: float(weights_F[2 * column + 1]) for column, name in enumerate(channels)},
    )
