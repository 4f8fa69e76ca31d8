"""Requests in, candidates out: towers, channels and blend put together.

    user, market, period ─► Request: user vector, active ads, forecast ─► a list a channel ─► blend ─► candidates

Shapes: R requests.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from data.log import Log, Requests, Targets
from data.split import Span
from priors.forecast import Forecast
from retrieval.blend import Blended, merge
from retrieval.channels import Ads, Channel, Request, Sources, TowerScores, build_channels
from retrieval.config import FORECASTING, POPULARITY, RetrievalConfig
from retrieval.tuning import Plan, limits_of
from retrieval.two_tower import TrainedTwoTower
from retrieval.two_tower_data import log_popularity


class Retriever:
    """Answers requests.

    Args:
        log: ads, placements and histories.
        two_tower: user vectors and the ad index.
        codes_AL: semantic IDs of the log's advertisers.
        cfg: budget and channels.
        counted: span of the purchases that item-kNN counts.
    """

    def __init__(
        self,
        log: Log,
        two_tower: TrainedTwoTower,
        codes_AL: NDArray[np.int64],
        cfg: RetrievalConfig,
        *,
        counted: str | Span = "prior_fit",
    ) -> None:
        self.log, self.cfg, self.limits = log, cfg, limits_of(cfg, log)
        self.embed = two_tower.embedder(log, cfg.pairs)
        self.scores = TowerScores(
            two_tower.index,
            temperature=two_tower.cfg.temperature,
            weight=two_tower.popularity_weight,
            popularity=log_popularity(log, cfg.pairs),
        )
        self.channels = build_channels(
            Sources(log, self.scores, codes_AL, cfg, counted, lambda: two_tower.advertiser_scores(log, cfg.pairs))
        )

    def requests(self, targets: Targets | Requests) -> list[Request]:
        """Requests without a forecast, one a row."""
        vector_RD = self.embed(targets.user, targets.market, targets.period)
        asked = zip(targets.user.tolist(), targets.market.tolist(), targets.period.tolist(), vector_RD, strict=True)
        return [self._request(*one) for one in asked]

    def lists(self, requests: Sequence[Request], names: Sequence[str] | None = None) -> list[dict[str, Ads]]:
        """What channels find for each request, twice the budget long so that no duplicate costs a place.

        Under a cap of an advertiser's ads popularity, which fills what the others leave free, has all that are active.

        Args:
            requests: asked.
            names: of the channels; None for those without a forecast, and popularity.
        """
        if names is None:
            names = [name for name in self.channels if name not in FORECASTING]
        return self.ask({name: self.channels[name] for name in names}, requests)

    def ask(self, channels: Mapping[str, Channel], requests: Sequence[Request]) -> list[dict[str, Ads]]:
        """`lists` of any channels, by the names they are given."""
        return [
            {name: channel.candidates(request, self._depth(name, request)) for name, channel in channels.items()}
            for request in requests
        ]

    def _depth(self, name: str, request: Request) -> int:
        twice = 2 * self.cfg.budget
        return max(twice, len(request.active)) if name == POPULARITY and self.limits.per_advertiser else twice

    def candidates(self, user: int, market: int, period: int, plan: Plan, forecast: Forecast | None = None) -> Blended:
        """Candidates of one request, with the channels that found each.

        A channel without anything to say (no history, no forecast, no placed ad of the advertisers) leaves its places
        to the others, in the end to popularity; ``found_by`` tells which answered.
        """
        one = Requests(*(np.array([index], np.int32) for index in (user, market, period)))
        return self.answers(one, plan, forecast)[0]

    def answers(self, asked: Requests, plan: Plan, forecast: Forecast | None = None) -> list[Blended]:
        """`candidates` of each of many requests."""
        requests = self.requests(asked)
        if forecast is not None:
            requests = with_forecast(requests, forecast, plan.prior_weight)
        names = list(dict.fromkeys([*self.cfg.channels, POPULARITY]))
        return [merge(lists, plan.blend, self.limits) for lists in self.lists(requests, names)]

    def _request(self, user: int, market: int, period: int, vector_D: NDArray[np.float32]) -> Request:
        return Request(
            user=user,
            market=market,
            period=period,
            active=self.log.active_ads(market, period).ad,
            vector_D=None if np.isnan(vector_D).any() else vector_D,
            log_prob_A=None,
        )


def with_forecast(requests: Sequence[Request], forecast: Forecast, prior_weight: float = 0.0) -> list[Request]:
    """The same requests, answered with a forecast."""
    if not requests:
        return []
    user_R, period_R = (np.array([getattr(one, name) for one in requests]) for name in ("user", "period"))
    log_prob_RA = forecast.log_probs(user_R, period_R)
    return [
        replace(one, log_prob_A=log_prob_A, prior_weight=prior_weight)
        for one, log_prob_A in zip(requests, log_prob_RA, strict=True)
    ]
