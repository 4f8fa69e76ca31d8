"""What every part of retrieval is worth, at one total budget.

    arms      none, anchor, LM: what the forecast adds
    alone     each channel has the whole budget; popularity fills what it leaves free. With an advertiser tower its
              channel is the rival of the forecast's: one rule, one budget, no language model. Either has the weight
              with which it finds most by itself on the tuning requests
    without   all channels but one, tuned again: what that one adds beside the others
    blends    quota, rrf, calibrated, each tuned: what the way of merging is worth
    sweep     recall and concentration by the forecast channels' quota
    factors   whether a forecast's ads are lost in the advertiser or in its ad, see `retrieval.factors`
    latency   one request at a time, from the user's vector to the list

``alone``, ``without``, ``blends`` and the product in ``factors`` are of the *head arm*, the one with the best-informed
forecast. Everything that is chosen is chosen before the evaluated span; every difference is of the same requests, with
an interval over users.

Shapes: R requests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from data.errors import UserError
from data.statistics import Row
from priors.forecast import Forecast
from retrieval.blend import merge
from retrieval.channels import Ads
from retrieval.config import ADVERTISER, BLENDS, FORECAST, POPULARITY, RetrievalConfig
from retrieval.evaluate import Arms, Values
from retrieval.factors import TOWER, Factors
from retrieval.retriever import Retriever, with_forecast
from retrieval.tuning import tuning_span

ALONE, WITHOUT, BLEND, ALL = "alone", "without", "blends", "all channels"
ADVERTISERS, PRODUCT = "factors", "product"
PARTS = ("latency", "arms", "channels", "blends", "factors")
"""Latency first, while no look-up is warm."""
RIVALS = (FORECAST, ADVERTISER)
"""Channels of one rule: what a language model's forecast finds beyond the towers' own."""
PERCENTILES = (50, 95, 99)
LATENCY_REQUESTS = 300


@dataclass
class RetrievalBenchmark:
    """Figures of one configuration.

    Attributes:
        rows: tidy rows; their section is ``retrieval`` for arms, or ``alone``, ``without``, ``blends``, ``factors``
            and ``product``.
        plans: blend, quota and prior weight of each arm, and of each channel left out, in plain types.
        sweep: recall and concentration by quota and arm.
        latency: milliseconds of each step by percentile, and requests a second in all.
        facts: what the figures are of.
    """

    rows: list[Row] = field(default_factory=list)
    plans: dict[str, Any] = field(default_factory=dict)
    sweep: list[dict[str, Any]] = field(default_factory=list)
    latency: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def bench_retrieval(
    retriever: Retriever,
    forecasts: Mapping[str, Forecast | None],
    *,
    users: NDArray[np.integer],
    tuned: Retriever | None = None,
    parts: Sequence[str] = PARTS,
) -> RetrievalBenchmark:
    """Measure a configuration.

    Args:
        retriever: channels and configuration.
        forecasts: forecast of each arm, the head arm last; None for the arm without.
        users: whose requests are measured.
        tuned: as of `Arms`.
        parts: what is measured, out of `PARTS`.
    """
    bench = _Bench(Arms(retriever, forecasts, users, tuned))
    measures = (
        bench.time_requests,
        bench.compare_arms,
        bench.compare_channels,
        bench.compare_blends,
        bench.compare_factors,
    )
    for part, measure in zip(PARTS, measures, strict=True):
        if part in parts:
            measure()
    return bench.found


def check_parts(parts: Sequence[str]) -> None:
    """Raise UserError for a part that there is not."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise UserError(
            f"--part {' '.join(unknown)}", expected=f"some of {', '.join(PARTS)}", action="name one of these."
        )


class _Bench:
    def __init__(self, arms: Arms) -> None:
        log, cfg, targets = arms.retriever.log, arms.cfg, arms.targets
        self.arms, self.cfg = arms, cfg
        self.head = list(arms.forecasts)[-1]
        self.found = RetrievalBenchmark(
            facts={
                "requests": len(targets),
                "users": len(np.unique(targets.user)),
                "targets": len(targets.item),
                "periods": list(log.split.span(log.evaluate, evaluate=log.evaluate)),
                "tuned_on": list(tuning_span(log)),
                "evaluate": log.evaluate,
                "head": self.head,
                "budget": cfg.budget,
                "channels": list(cfg.channels),
                "blend": cfg.blend.kind,
                "index": cfg.index.kind,
                "k": max(cfg.ks),
            }
        )

    def compare_arms(self) -> None:
        evaluation = self.arms.compare()
        self.found.rows += evaluation.rows
        self.found.sweep = evaluation.sweep
        self.found.plans |= {arm: plan.to_plain() for arm, plan in evaluation.plans.items()}
        active = [len(request.active) for request in self.arms.evaluated.requests]
        self.found.facts["active_ads"] = float(np.mean(active)) if active else 0.0

    def compare_channels(self) -> None:
        whole = self.arms.judged(self.head, self.cfg)
        names = self._of_head()
        alone: dict[str, Values] = {}
        for name in names:
            judged = self.arms.alone(self.head, name)
            alone[name] = judged.values
            if name in RIVALS:
                self.found.plans[f"{self.head}, {name} alone"] = judged.plan.to_plain()
        differences = [(ALL, name) for name in names] + [RIVALS] * set(RIVALS).issubset(names)
        self._add(ALONE, {ALL: whole.values} | alone, differences)
        without: dict[str, Values] = {}
        for name in names:
            shares = {other: share for other, share in self.cfg.blend.shares.items() if other != name}
            left = [other for other in self.cfg.channels if other != name]
            if not any(other in self.cfg.base_channels for other in left):
                continue
            if not sum(shares.values()):  # this channel had them all: the others' are tuned
                shares = {}
            cfg = replace(self.cfg, channels=left, blend=replace(self.cfg.blend, shares=shares))
            without[name] = self._kept(f"{self.head}, without {name}", cfg)
        self._add(WITHOUT, {ALL: whole.values} | without, [(ALL, name) for name in without])

    def compare_blends(self) -> None:
        chosen = self.cfg.blend.kind
        values = {
            kind: self._kept(f"{self.head}, {kind}", replace(self.cfg, blend=replace(self.cfg.blend, kind=kind)))
            for kind in BLENDS
        }
        self._add(BLEND, values, [(kind, chosen) for kind in BLENDS if kind != chosen])

    def compare_factors(self) -> None:
        """Of the forecasts' advertisers and ads; nothing where no arm has a forecast."""
        arms = self.arms
        forecasts = {arm: forecast for arm, forecast in arms.forecasts.items() if forecast is not None}
        if not forecasts:
            return
        scores = arms.retriever.scores
        factors = Factors(arms.retriever.log, scores, arms.evaluated.requests, arms.targets, self.cfg.budget)
        names = [TOWER, *forecasts]
        differences = [(a, b) for place, a in enumerate(names) for b in names[:place]]
        studies: tuple[tuple[str, dict[str, Values], list[tuple[str, str]]], ...] = (
            (ADVERTISERS, factors.advertisers(forecasts), differences),
            (PRODUCT, factors.product(self.head, forecasts[self.head]), []),
        )
        for section, values, pairs in studies:
            self.found.rows += [replace(row, section=section) for row in arms.judge.mean_rows(values, pairs)]

    def _kept(self, name: str, cfg: RetrievalConfig) -> Values:
        """Values of the head arm under a variation, whose plan is kept under a name."""
        judged = self.arms.judged(self.head, cfg)
        self.found.plans[name] = judged.plan.to_plain()
        return judged.values

    def _add(self, section: str, arms: Mapping[str, Values], differences: Sequence[tuple[str, str]]) -> None:
        """Rows of the longest list only."""
        k = max(self.cfg.ks)
        kept = {arm: {key: value for key, value in values.items() if key[2] == k} for arm, values in arms.items()}
        self.found.rows += [replace(row, section=section) for row in self.arms.judge.mean_rows(kept, differences)]

    def _of_head(self) -> list[str]:
        return self.cfg.channels if self.arms.forecasts[self.head] is not None else self.cfg.base_channels

    def time_requests(self) -> None:
        """Each step of single requests on one thread, as a service would answer them."""
        plan, forecast = self.arms.plan(self.head, self.cfg), self.arms.forecasts[self.head]
        retriever, targets, steps = self.arms.retriever, self.arms.targets, _Steps()
        rng = np.random.default_rng(self.cfg.seed)
        chosen = rng.permutation(len(targets))[:LATENCY_REQUESTS]
        threads = torch.get_num_threads(), faiss.omp_get_max_threads()
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        try:
            for row in chosen:
                asked = steps.time("user vector", retriever.requests, targets.select(np.array([row])))
                if forecast is not None:
                    asked = steps.time("forecast", with_forecast, asked, forecast, plan.prior_weight)
                lists: dict[str, Ads] = {}
                for name in dict.fromkeys([*self._of_head(), POPULARITY]):
                    lists |= steps.time(name, retriever.lists, asked, [name])[0]
                steps.time("blend", merge, lists, plan.blend, retriever.limits)
                steps.end()
        finally:
            torch.set_num_threads(threads[0])
            faiss.omp_set_num_threads(threads[1])
        self.found.latency = steps.percentiles()
        self.found.facts["latency_requests"] = len(chosen)


class _Steps:
    """Seconds of named steps, request by request."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._request = 0.0

    def time(self, name: str, work: Callable[..., Any], *arguments: Any) -> Any:
        began = perf_counter()
        result = work(*arguments)
        self.seconds.setdefault(name, []).append(perf_counter() - began)
        self._request += self.seconds[name][-1]
        return result

    def end(self) -> None:
        self.seconds.setdefault("request", []).append(self._request)
        self._request = 0.0

    def percentiles(self) -> dict[str, dict[str, float]]:
        figures = {
            name: {f"p{p}": float(np.percentile(values, p) * 1e3) for p in PERCENTILES}
            for name, values in self.seconds.items()
        }
        if "request" in figures:
            figures["request"]["per_second"] = len(self.seconds["request"]) / sum(self.seconds["request"])
        return figures
