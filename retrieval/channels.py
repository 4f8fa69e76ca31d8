"""Where candidates come from: each channel ranks the active ads of a request in its own way.

    two_tower     ads nearest to the user's vector
    forecast      of the ads of the forecast's first advertisers those with the best two-tower score, the
                  paper's rule (arXiv 2605.27856); with a prior weight w > 0 its soft form, in which an ad's
                  share of the forecast counts too:  sim / temperature + w · log(P(advertiser) / its active ads)
    seeded        ads nearest to the forecast advertisers' own vectors, in turn, the likeliest first: it also
                  reaches ads of advertisers that the forecast does not name
    popularity    most converted ads so far; for users that have no vector

Shapes: K list length, S seeds, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.log import Log
from retrieval.index import NO_AD, AdIndex

Ads = NDArray[np.int32]
TWO_TOWER, FORECAST, SEEDED, POPULARITY = "two_tower", "forecast", "seeded", "popularity"


@dataclass(frozen=True)
class Request:
    """What the channels answer.

    Attributes:
        period: as-of time.
        active: ads that run in the visited market in that period, ascending.
        vector_D: the user's, None for a user without a history.
        log_prob_A: the forecast over advertisers; None in the arm without, and for a user without one.
    """

    period: int
    active: Ads
    vector_D: NDArray[np.float32] | None
    log_prob_A: NDArray[np.float32] | None


class Channel(Protocol):
    """A source of candidates."""

    name: str

    def candidates(self, request: Request, k: int) -> Ads:
        """Up to ``k`` distinct active ads, best first; empty where the channel has nothing to say."""


class TwoTowerChannel:
    """The user's nearest active ads."""

    name = TWO_TOWER

    def __init__(self, index: AdIndex) -> None:
        self.index = index

    def candidates(self, request: Request, k: int) -> Ads:
        return _nearest(self.index, request.vector_D, k, request.active)


class ForecastChannel:
    """The active ads of the forecast's first advertisers, by two-tower score and their share of the forecast.

    Args:
        index: ad vectors.
        ad_advertiser: advertiser of every ad, -1 for none.
        n_advertisers: how many active advertisers of the forecast.
        prior_weight: w; 0 is the paper's rule.
        temperature: of the two-tower's softmax, which makes its similarity a log-likelihood.
    """

    name = FORECAST

    def __init__(
        self,
        index: AdIndex,
        ad_advertiser: NDArray[np.int32],
        n_advertisers: int,
        *,
        prior_weight: float = 0.0,
        temperature: float = 1.0,
    ) -> None:
        self.index, self.ad_advertiser, self.n_advertisers = index, ad_advertiser, n_advertisers
        self.prior_weight, self.temperature = prior_weight, temperature

    def candidates(self, request: Request, k: int) -> Ads:
        chosen = forecast_advertisers(request, self.ad_advertiser, self.n_advertisers)
        among = request.active[np.isin(self.ad_advertiser[request.active], chosen)]
        if request.vector_D is None or request.log_prob_A is None:
            return among[:0]
        if self.prior_weight == 0:
            return _nearest(self.index, request.vector_D, k, among)
        among = among[self.index.holds(among)]
        own = self.ad_advertiser[among]
        share = request.log_prob_A[own] - np.log(np.bincount(own, minlength=len(request.log_prob_A))[own])
        score = self.index.vectors(among) @ request.vector_D / self.temperature + self.prior_weight * share
        return among[np.argsort(-score, kind="stable")[:k]]


class SeededChannel:
    """Ads nearest to the forecast advertisers, one of each in turn.

    An advertiser's vector is the mean of its active ads'.

    Args:
        index: ad vectors.
        ad_advertiser: advertiser of every ad, -1 for none.
        n_advertisers: how many active advertisers of the forecast.
    """

    name = SEEDED

    def __init__(self, index: AdIndex, ad_advertiser: NDArray[np.int32], n_advertisers: int) -> None:
        self.index, self.ad_advertiser, self.n_advertisers = index, ad_advertiser, n_advertisers

    def candidates(self, request: Request, k: int) -> Ads:
        seeds = forecast_advertisers(request, self.ad_advertiser, self.n_advertisers)
        known = request.active[self.index.holds(request.active)]
        own = self.ad_advertiser[known]
        vectors = self.index.vectors(known)
        means = [vectors[own == seed].mean(0) for seed in seeds if (own == seed).any()]
        if not means:
            return known[:0]
        # Turn by turn each seed gives its next ad; k / S of each would do but for the duplicates.
        depth = min(len(known), 2 * (k // len(means) + 1))
        lists_SK, _ = self.index.search(np.stack(means), depth, among=known)
        in_turn = lists_SK.T.reshape(-1)
        in_turn = in_turn[in_turn != NO_AD]
        _, first = np.unique(in_turn, return_index=True)
        return in_turn[np.sort(first)][:k]


class PopularityChannel:
    """The most converted active ads of all users before the period.

    Args:
        log: its label conversions are counted.
    """

    name = POPULARITY

    def __init__(self, log: Log) -> None:
        events = log.events.select(log.is_label & (log.events.ad >= 0))
        order = np.argsort(events.period, kind="stable")
        self._ad, self._period, self._n_ads = events.ad[order], events.period[order], len(log.ad_ids)
        self._counts: dict[int, NDArray[np.int64]] = {}

    def candidates(self, request: Request, k: int) -> Ads:
        if request.period not in self._counts:
            before = self._ad[: np.searchsorted(self._period, request.period)]
            self._counts[request.period] = np.bincount(before, minlength=self._n_ads)
        counts = self._counts[request.period][request.active]
        return request.active[np.argsort(-counts, kind="stable")[:k]]


def forecast_advertisers(request: Request, ad_advertiser: NDArray[np.int32], n: int) -> NDArray[np.int32]:
    """The forecast's first ``n`` advertisers with an active ad, the likeliest first; empty without a forecast."""
    if request.log_prob_A is None:
        return np.zeros(0, dtype=np.int32)
    active = np.unique(ad_advertiser[request.active])
    active = active[active >= 0]
    return active[np.argsort(-request.log_prob_A[active], kind="stable")[:n]]


def _nearest(index: AdIndex, vector_D: NDArray[np.float32] | None, k: int, among: Ads) -> Ads:
    if vector_D is None or not len(among):
        return among[:0]
    found = index.search(vector_D[None], k, among=among)[0][0]
    return found[found != NO_AD]
