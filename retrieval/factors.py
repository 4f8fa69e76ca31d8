"""Where the ads of a forecast are lost: in the advertiser, or in the ad of the right advertiser.

    P(ad | user) = P(advertiser | user) · P(ad | advertiser, user)

with the forecast among the active advertisers for the first factor, and for the second the softmax of the two-tower's
scores over the advertiser's active ads. The product is one ranking of all active ads, and either factor can be known:

    advertisers known    the first is spread over the advertisers that were converted with, evenly
    ads known            the second is spread over the ads that were, evenly; of other advertisers it is the softmax

Beside it stands what the two-tower alone says of advertisers, ``Σ exp(scores of its active ads)``: it sees the store
and what runs there, which no forecast of a user's week does. A forecast that ranks the advertisers of a visit worse
than that has little to add to the ads that the two-tower finds.

Shapes: R requests, M active ads with a vector and an advertiser, A the active advertisers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from data.log import Log, Targets
from priors.forecast import Forecast
from retrieval.channels import Ads, Request, TowerScores, best
from retrieval.retriever import with_forecast

TOP = 20
"""Advertisers of a visit that are counted."""
RANKED, PRODUCT = "advertiser_recall", "recall"
TOWER, KNOWN_ADVERTISERS, KNOWN_ADS = "two_tower", "advertisers known", "ads known"
NEVER = -1e9
F64 = NDArray[np.float64]
Values = dict[tuple[str, str, int], F64]


class Factors:
    """Measures both factors on requests.

    Args:
        log: advertisers of ads, and who is new to whom.
        scores: of the two-tower.
        requests: asked; one of a user without a vector, or where no ad with a vector runs, is passed over.
        targets: of these requests.
        budget: places of the list of ads.
    """

    def __init__(self, log: Log, scores: TowerScores, requests: list[Request], targets: Targets, budget: int) -> None:
        self.log, self.scores, self.budget = log, scores, budget
        self.requests, self.targets = requests, targets

    def advertisers(self, forecasts: Mapping[str, Forecast]) -> dict[str, Values]:
        """Recall of a visit's advertisers by the two-tower and by each forecast, of all and of new ones."""
        found: dict[str, Values] = {}
        for name, forecast in [(TOWER, None), *forecasts.items()]:
            all_R, new_R = np.full((2, len(self.requests)), np.nan)
            for row, request in enumerate(self._asked(forecast)):
                visit = self._visits[row]
                if visit is None:
                    continue
                score_A = visit.tower_A if request.log_prob_A is None else request.log_prob_A[visit.advertiser_A]
                all_R[row] = _recall(score_A, visit.wanted_A, TOP)
                new_R[row] = _recall(score_A[visit.new_A], visit.wanted_A[visit.new_A], TOP)
            found[name] = {(RANKED, "all", TOP): all_R, (RANKED, "new", TOP): new_R}
        return found

    def product(self, name: str, forecast: Forecast) -> dict[str, Values]:
        """Recall of ads by the product of a forecast, and with either factor known."""
        recall_R = np.full((3, len(self.requests)), np.nan)
        for row, request in enumerate(self._asked(forecast)):
            visit = self._visits[row]
            if visit is None or request.log_prob_A is None:
                continue
            prior_A = log_softmax(request.log_prob_A[visit.advertiser_A].astype(np.float64))
            known_A = np.where(visit.wanted_A, -np.log(max(visit.wanted_A.sum(), 1)), NEVER)
            hits_A = np.bincount(visit.own_M, visit.wanted_M, minlength=len(prior_A))
            evenly_M = np.where(visit.wanted_M, -np.log(np.maximum(hits_A, 1.0))[visit.own_M], NEVER)
            known_M = np.where(visit.wanted_A[visit.own_M], evenly_M, visit.share_M)
            lists = (
                prior_A[visit.own_M] + visit.share_M,
                known_A[visit.own_M] + visit.share_M,
                prior_A[visit.own_M] + known_M,
            )
            for place, score_M in enumerate(lists):
                recall_R[place, row] = _recall(score_M, visit.wanted_M, self.budget, len(self.targets.of(row)))
        names = (name, f"{name}, {KNOWN_ADVERTISERS}", f"{name}, {KNOWN_ADS}")
        return {one: {(PRODUCT, "all", self.budget): values_R} for one, values_R in zip(names, recall_R, strict=True)}

    @cached_property
    def _visits(self) -> list[_Visit | None]:
        """What no forecast changes of each request; None for one that is passed over."""
        return [self._visit(request, self.targets.of(row)) for row, request in enumerate(self.requests)]

    def _visit(self, request: Request, targets: Ads) -> _Visit | None:
        if request.vector_D is None:
            return None
        owned = request.active[self.log.ad_advertiser[request.active] >= 0]
        ads_M, score_M = self.scores.of(request, owned)
        return _Visit(self.log, request, ads_M, score_M.astype(np.float64), targets) if len(ads_M) else None

    def _asked(self, forecast: Forecast | None) -> list[Request]:
        return self.requests if forecast is None else with_forecast(self.requests, forecast)


class _Visit:
    """The active ads of one request that have a vector and an advertiser, and what the two-tower says of them."""

    def __init__(self, log: Log, request: Request, ads_M: Ads, score_M: F64, targets: Ads) -> None:
        self.advertiser_A, self.own_M = np.unique(log.ad_advertiser[ads_M], return_inverse=True)
        top_A = np.full(len(self.advertiser_A), -np.inf)
        np.maximum.at(top_A, self.own_M, score_M)
        self.tower_A = top_A + np.log(np.bincount(self.own_M, np.exp(score_M - top_A[self.own_M])))
        self.share_M = score_M - self.tower_A[self.own_M]
        self.wanted_M = np.isin(ads_M, targets)
        self.wanted_A = np.bincount(self.own_M, self.wanted_M, minlength=len(self.advertiser_A)) > 0
        asked = np.full(len(self.advertiser_A), request.user), np.full(len(self.advertiser_A), request.period)
        self.new_A = log.is_new(*asked, self.advertiser_A)


def _recall(score_N: NDArray[np.floating], wanted_N: NDArray[np.bool_], k: int, targets: int | None = None) -> float:
    """Hits among the ``k`` best over min(k, targets), NaN without a target."""
    wanted = int(wanted_N.sum()) if targets is None else targets
    if not wanted:
        return float("nan")
    return float(wanted_N[best(np.arange(len(score_N), dtype=np.int32), score_N, k)].sum() / min(k, wanted))
