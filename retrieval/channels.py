"""Where candidates come from: each channel ranks the active ads of a request in its own way.

    two_tower     ads nearest to the user's vector, with the towers' weight for popularity
    own           ads the user bought before, and ads of advertisers the user bought from
    popularity    most converted ads lately, those of the visited market first; answers every request
    item_knn      ads that the buyers of the user's ads bought too
    advertiser    ads of the advertiser tower's first advertisers, chosen as `forecast` does: what the same rule finds
                  without a language model
    forecast      of the ads of the forecast's first advertisers those with the best two-tower score, the
                  paper's rule (arXiv 2605.27856); with a prior weight w > 0 its soft form, in which an ad's
                  share of the forecast counts too:  score + w · log(P(advertiser) / its active ads)
    seeded        ads nearest to the forecast advertisers' own vectors, or those of advertisers with their ID
                  prefix, in turn, the likeliest first: it also reaches advertisers that the forecast does not name

`build_channels` makes those that a configuration names. A channel of one's own is a class with `candidates`, named
in ``BUILDERS``.

Shapes: K list length, M active ads, S seeds, D width, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from data.log import Log
from data.split import Span
from retrieval.config import ADVERTISER, FORECAST, ITEM_KNN, OWN, POPULARITY, SEEDED, TWO_TOWER, RetrievalConfig
from retrieval.counts import Popularity, Purchases, sum_at
from retrieval.index import NO_AD, AdIndex
from retrieval.neighbours import Neighbours

Ads = NDArray[np.int32]
CountsOf = Callable[[Ads, int, int], NDArray[np.floating]]
"""From rising ads, a market and a period to how much each was converted with before, on some scale."""
AdvertisersOf = Callable[[NDArray[np.float32], int, int], NDArray[np.float32]]
"""From a user's vector, a market and a period to the log-probability of each advertiser."""
OVERSAMPLED = 4
UNSEEN = 1e-3
"""Conversions that an ad without any is taken to have, against the others of its advertiser."""


@dataclass(frozen=True)
class Request:
    """What the channels answer.

    Attributes:
        user: index.
        market: index, -1 for none.
        period: as-of time.
        active: ads that run in the visited market in that period, ascending.
        vector_D: the user's, None for a user without a history.
        log_prob_A: the forecast over advertisers; None in the arm without, and for a user without one.
        prior_weight: w of the forecast channel.
    """

    user: int
    market: int
    period: int
    active: Ads
    vector_D: NDArray[np.float32] | None
    log_prob_A: NDArray[np.float32] | None
    prior_weight: float = 0.0


class Channel(Protocol):
    """A source of candidates."""

    def candidates(self, request: Request, k: int) -> Ads:
        """Up to ``k`` distinct active ads, best first; empty where the channel has nothing to say."""


@dataclass(frozen=True)
class Sources:
    """What channels are built from.

    Attributes:
        log: ads, purchases, conversions.
        scores: of the two-tower.
        codes_AL: semantic IDs of the advertisers.
        cfg: the channels' settings.
        counted: span of the purchases that item-kNN counts.
        advertisers: of the advertiser tower; called by the channel that reads it alone.
    """

    log: Log
    scores: TowerScores
    codes_AL: NDArray[np.int64]
    cfg: RetrievalConfig
    counted: str | Span
    advertisers: Callable[[], AdvertisersOf]


class TowerScores:
    """The two-tower's score of ads: ``similarity / temperature + weight · log popularity``, up to a constant.

    Among few ads each is scored. In a larger set the index finds those of the largest similarity, several times as
    many as asked for, and these are scored.

    Args:
        index: ad vectors.
        temperature: of the towers' softmax.
        weight: of popularity; 0 leaves it out.
        popularity: log of an ad's conversions before a request.
    """

    def __init__(
        self, index: AdIndex, *, temperature: float = 1.0, weight: float = 0.0, popularity: CountsOf | None = None
    ) -> None:
        self.index, self.temperature = index, temperature
        self.weight, self.popularity = weight, popularity

    def of(self, request: Request, ads_M: Ads) -> tuple[Ads, NDArray[np.floating]]:
        """Those of rising ads that the index holds now, and their scores; both ``(M,)``.

        Raises:
            ValueError: the user of the request has no vector.
        """
        if request.vector_D is None:
            raise ValueError(f"user {request.user} has no vector before period {request.period}")
        ads_M, vectors_MD = self.index.held(ads_M)
        score_M = vectors_MD @ request.vector_D / self.temperature
        if self.popularity is None or not self.weight:
            return ads_M, score_M
        return ads_M, score_M + self.weight * self.popularity(ads_M, request.market, request.period)

    def best(self, request: Request, k: int, among: Ads) -> Ads:
        """The ``k`` best of some ads; none for a user without a vector."""
        if request.vector_D is None or not len(among):
            return among[:0]
        if self.popularity is None or not self.weight:
            found = self.index.search(request.vector_D[None], k, among=among)[0][0]
            return found[found != NO_AD]
        if len(among) > self.index.cfg.exact_up_to:
            found = self.index.search(request.vector_D[None], OVERSAMPLED * k, among=among)[0][0]
            among = np.sort(found[found != NO_AD])
        return best(*self.of(request, among), k)


class TwoTowerChannel:
    """The user's best active ads by two-tower score."""

    def __init__(self, scores: TowerScores) -> None:
        self.scores = scores

    def candidates(self, request: Request, k: int) -> Ads:
        return self.scores.best(request, k, request.active)


class PopularityChannel:
    """The most converted active ads before the period, all of them in order."""

    def __init__(self, popularity: Popularity) -> None:
        self.popularity = popularity

    def candidates(self, request: Request, k: int) -> Ads:
        return best(request.active, self.popularity(request.active, request.market, request.period), k)


class OwnChannel:
    """Active ads that the user bought, and active ads of advertisers that the user bought from.

    ``score(ad) = own(ad) + weight · own(advertiser) · the ad's share of its advertiser's conversions``, with own
    counts that decay by period.

    Args:
        purchases: of all users.
        popularity: shares out an advertiser's part among its active ads.
        ad_advertiser: advertiser of every ad, -1 for none.
        decay: of a purchase, a period.
        advertiser_weight: 0 takes the very ads bought before only.
    """

    def __init__(
        self,
        purchases: Purchases,
        popularity: Popularity,
        ad_advertiser: NDArray[np.int32],
        *,
        decay: float,
        advertiser_weight: float,
    ) -> None:
        self.purchases, self.popularity, self.ad_advertiser = purchases, popularity, ad_advertiser
        self.decay, self.advertiser_weight = decay, advertiser_weight

    def candidates(self, request: Request, k: int) -> Ads:
        bought = self.purchases.of(request.user, request.period)
        if not len(bought.ad):
            return request.active[:0]
        weight_N = self.decay ** bought.ago.astype(float)
        score_M = sum_at(request.active, bought.ad, weight_N)
        if self.advertiser_weight:
            advertisers, own_M = np.unique(self.ad_advertiser[request.active], return_inverse=True)
            known_A = sum_at(advertisers, bought.advertiser, weight_N) * (advertisers >= 0)
            popular_M = self.popularity(request.active, request.market, request.period) + UNSEEN
            total_A = np.bincount(own_M, popular_M, minlength=len(advertisers))
            score_M += self.advertiser_weight * known_A[own_M] * popular_M / total_A[own_M]
        return best(request.active, score_M, k, above=0.0)


class ItemKnnChannel:
    """Active ads near to what the user bought last, by who else bought both.

    Args:
        neighbours: of every ad.
        purchases: of all users.
        decay: of a purchase, a period.
        history: purchases of the user that count.
    """

    def __init__(self, neighbours: Neighbours, purchases: Purchases, *, decay: float, history: int) -> None:
        self.neighbours, self.purchases, self.decay, self.history = neighbours, purchases, decay, history

    def candidates(self, request: Request, k: int) -> Ads:
        bought = self.purchases.of(request.user, request.period)
        rows = np.flatnonzero(bought.ad >= 0)[-self.history :]
        ads, similarity = self.neighbours.scores(bought.ad[rows], self.decay ** bought.ago[rows].astype(float))
        return best(request.active, sum_at(request.active, ads, similarity), k, above=0.0)


class ForecastChannel:
    """The active ads of the forecast's first advertisers, by two-tower score and their share of the forecast.

    Args:
        scores: of the two-tower.
        ad_advertiser: advertiser of every ad, -1 for none.
        n_advertisers: how many active advertisers of the forecast.
    """

    def __init__(self, scores: TowerScores, ad_advertiser: NDArray[np.int32], n_advertisers: int) -> None:
        self.scores, self.ad_advertiser, self.n_advertisers = scores, ad_advertiser, n_advertisers

    def candidates(self, request: Request, k: int) -> Ads:
        chosen = forecast_advertisers(request, self.ad_advertiser, self.n_advertisers)
        if request.vector_D is None or request.log_prob_A is None:
            return request.active[:0]
        chosen_A = np.zeros(len(request.log_prob_A) + 1, dtype=bool)
        chosen_A[chosen] = True
        among = request.active[chosen_A[self.ad_advertiser[request.active]]]
        if request.prior_weight == 0:
            return self.scores.best(request, k, among)
        among, score_M = self.scores.of(request, among)
        own = self.ad_advertiser[among]
        share = request.log_prob_A[own] - np.log(np.bincount(own, minlength=len(request.log_prob_A))[own])
        return best(among, score_M + request.prior_weight * share, k)


class AdvertiserChannel:
    """The forecast channel's rule, with the advertiser tower for a forecast.

    Args:
        scores: log-probability of each advertiser from the user's vector, the market and the period.
        rule: the forecast channel that is asked.
        prior_weight: of the tower's probabilities in the score of an ad; 0 is the paper's rule.
    """

    def __init__(self, scores: AdvertisersOf, rule: ForecastChannel, prior_weight: float) -> None:
        self.scores, self.rule, self.prior_weight = scores, rule, prior_weight

    def candidates(self, request: Request, k: int) -> Ads:
        if request.vector_D is None:
            return request.active[:0]
        log_prob_A = self.scores(request.vector_D, request.market, request.period)
        return self.rule.candidates(replace(request, log_prob_A=log_prob_A, prior_weight=self.prior_weight), k)

    def weighing(self, prior_weight: float) -> AdvertiserChannel:
        """The same channel under another weight."""
        return AdvertiserChannel(self.scores, self.rule, prior_weight)


class SeededChannel:
    """Ads nearest to the forecast advertisers, one of each in turn.

    An advertiser's vector is the mean of its active ads'. One whose ads have no vector yet, a cold one, takes the
    mean of those that share its longest ID prefix.

    Args:
        index: ad vectors.
        ad_advertiser: advertiser of every ad, -1 for none.
        n_advertisers: how many active advertisers of the forecast.
        codes_AL: semantic IDs; None where there are none.
        prefix_levels: look among the ads of advertisers that share so many codes with the seed; 0 looks among all.
    """

    def __init__(
        self,
        index: AdIndex,
        ad_advertiser: NDArray[np.int32],
        n_advertisers: int,
        *,
        codes_AL: NDArray[np.int64] | None = None,
        prefix_levels: int = 0,
    ) -> None:
        self.index, self.ad_advertiser, self.n_advertisers = index, ad_advertiser, n_advertisers
        self.codes_AL, self.prefix_levels = codes_AL, prefix_levels

    def candidates(self, request: Request, k: int) -> Ads:
        seeds = forecast_advertisers(request, self.ad_advertiser, self.n_advertisers)
        if not len(seeds):
            return request.active[:0]
        known, vectors = self.index.held(request.active)
        own = self.ad_advertiser[known]
        found = self._means(seeds, own, vectors)
        if not found:
            return known[:0]
        # Turn by turn each seed gives its next ad; k / S of each would do but for the duplicates.
        depth = min(len(known), 2 * (k // len(found) + 1))
        if self.prefix_levels and self.codes_AL is not None:
            lists = []
            for seed, mean in found:
                allowed = known[self._shares(int(seed), own, self.prefix_levels)]
                lists.append(self.index.search(mean[None], depth, among=allowed)[0][0])
            lists_SK = np.stack(lists)
        else:
            lists_SK, _ = self.index.search(np.stack([mean for _, mean in found]), depth, among=known)
        in_turn = lists_SK.T.reshape(-1)
        in_turn = in_turn[in_turn != NO_AD]
        _, first = np.unique(in_turn, return_index=True)
        return in_turn[np.sort(first)][:k]

    def _means(
        self, seeds_S: NDArray[np.int32], own_M: NDArray[np.int32], vectors_MD: NDArray[np.float32]
    ) -> list[tuple[int, NDArray[np.float32]]]:
        """Seeds with the mean of their ads' vectors; those left out have none, and share no prefix with an ad."""
        seed_N, row_N = np.nonzero(own_M == seeds_S[:, None])
        size_S = np.bincount(seed_N, minlength=len(seeds_S))
        mean_SD = np.zeros((len(seeds_S), vectors_MD.shape[1]), dtype=np.float32)
        warm_S = size_S > 0
        if warm_S.any():
            sums = np.add.reduceat(vectors_MD[row_N], (np.cumsum(size_S) - size_S)[warm_S])
            mean_SD[warm_S] = sums / size_S[warm_S, None]
        means = (
            (int(seed), mean_SD[place] if warm_S[place] else self._mean_of_prefix(int(seed), own_M, vectors_MD))
            for place, seed in enumerate(seeds_S)
        )
        return [(seed, mean) for seed, mean in means if mean is not None]

    def _mean_of_prefix(
        self, seed: int, own_M: NDArray[np.int32], vectors_MD: NDArray[np.float32]
    ) -> NDArray[np.float32] | None:
        for levels in range(0 if self.codes_AL is None else self.codes_AL.shape[1] - 1, 0, -1):
            chosen_M = self._shares(seed, own_M, levels)
            if chosen_M.any():
                mean_D: NDArray[np.float32] = vectors_MD[chosen_M].mean(0)
                return mean_D
        return None

    def _shares(self, seed: int, own_M: NDArray[np.int32], levels: int) -> NDArray[np.bool_]:
        """Ads whose advertiser has the seed's first codes."""
        assert self.codes_AL is not None
        same_A = (self.codes_AL[:, :levels] == self.codes_AL[seed, :levels]).all(1)
        return np.append(same_A, False)[own_M]  # -1, no advertiser, reads the last


def _own(s: Sources, purchases: Purchases, popularity: Popularity) -> Channel:
    cfg = s.cfg.own
    return OwnChannel(
        purchases, popularity, s.log.ad_advertiser, decay=cfg.decay, advertiser_weight=cfg.advertiser_weight
    )


def _item_knn(s: Sources, purchases: Purchases, _: Popularity) -> Channel:
    cfg = s.cfg.item_knn
    neighbours = Neighbours.fit(
        s.log, s.counted, neighbours=cfg.neighbours, shrinkage=cfg.shrinkage, per_user=cfg.per_user
    )
    return ItemKnnChannel(neighbours, purchases, decay=cfg.decay, history=cfg.history)


def _advertiser(s: Sources, *_: object) -> Channel:
    cfg = s.cfg.advertiser
    rule = ForecastChannel(s.scores, s.log.ad_advertiser, cfg.advertisers)
    return AdvertiserChannel(s.advertisers(), rule, cfg.prior_weight)


def _forecast(s: Sources, *_: object) -> Channel:
    return ForecastChannel(s.scores, s.log.ad_advertiser, s.cfg.forecast.advertisers)


def _seeded(s: Sources, *_: object) -> Channel:
    cfg = s.cfg.forecast
    return SeededChannel(
        s.scores.index,
        s.log.ad_advertiser,
        cfg.seed_advertisers,
        codes_AL=s.codes_AL,
        prefix_levels=min(cfg.seed_prefix_levels, s.codes_AL.shape[1] - 1),
    )


BUILDERS: Mapping[str, Callable[[Sources, Purchases, Popularity], Channel]] = {
    TWO_TOWER: lambda s, *_: TwoTowerChannel(s.scores),
    OWN: _own,
    POPULARITY: lambda _, __, popularity: PopularityChannel(popularity),
    ITEM_KNN: _item_knn,
    ADVERTISER: _advertiser,
    FORECAST: _forecast,
    SEEDED: _seeded,
}


def build_channels(sources: Sources) -> dict[str, Channel]:
    """The channels that the configuration names, and popularity, which answers where they do not."""
    cfg = sources.cfg
    purchases = Purchases(sources.log)
    popularity = Popularity(sources.log, decay=cfg.popularity.decay, market_weight=cfg.popularity.market_weight)
    names = dict.fromkeys([*cfg.channels, POPULARITY])
    return {name: BUILDERS[name](sources, purchases, popularity) for name in names}


def forecast_advertisers(request: Request, ad_advertiser: NDArray[np.int32], n: int) -> NDArray[np.int32]:
    """The forecast's first ``n`` advertisers with an active ad, the likeliest first; empty without a forecast."""
    if request.log_prob_A is None:
        return np.zeros(0, dtype=np.int32)
    running_A = np.zeros(len(request.log_prob_A) + 1, dtype=bool)
    running_A[ad_advertiser[request.active]] = True  # -1, no advertiser, is the last
    active = np.flatnonzero(running_A[:-1]).astype(np.int32)
    return active[np.argsort(-request.log_prob_A[active], kind="stable")[:n]]


def best(ads_M: Ads, score_M: NDArray[np.floating], k: int, *, above: float = -np.inf) -> Ads:
    """The ``k`` ads with the highest scores, the first of equal ones; those at or below ``above`` never."""
    if above > -np.inf:
        kept = score_M > above
        ads_M, score_M = ads_M[kept], score_M[kept]
    return ads_M[np.argsort(-score_M, kind="stable")[:k]]
