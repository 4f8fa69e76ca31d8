"""What was bought before a period: the counts under the channels that learn nothing.

Every look-up takes the period whose start is its as-of time and reads what lies before it. Weights decay by
period, so that "how much" and "how lately" are one number:

    Σ over earlier purchases of  decay^(periods ago)

Shapes: N purchases, I ads, M active ads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.log import Log

F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
CACHED_PERIODS = 64


class Bought(NamedTuple):
    """Purchases of one user, oldest first; shapes ``(N,)``."""

    ad: I32
    advertiser: I32
    ago: NDArray[np.int32]


class Purchases:
    """Purchases of every user, of ads and of advertisers without an ad.

    Args:
        log: its events.
    """

    def __init__(self, log: Log) -> None:
        events = log.events
        self.log = log
        self._rows = np.flatnonzero(log.is_purchase & ((events.ad >= 0) | (events.advertiser >= 0)))
        self._ptr = np.searchsorted(events.user[self._rows], np.arange(len(log.user_ids) + 1))

    def of(self, user: int, period: int) -> Bought:
        """What a user bought before a period."""
        events, rows = self.log.events, self._rows[self._ptr[user] : self._ptr[user + 1]]
        rows = rows[: np.searchsorted(events.period[rows], period)]
        return Bought(events.ad[rows], events.advertiser[rows], (period - events.period[rows]).astype(np.int32))


class Popularity:
    """Decayed label conversions of ads, or of advertisers, everywhere and in one market.

    Args:
        log: its events.
        decay: weight that a conversion keeps from one period to the next.
        market_weight: how many conversions elsewhere one in the asked-for market is worth, beyond itself.
        of_advertisers: count advertisers instead of ads.
    """

    def __init__(self, log: Log, *, decay: float, market_weight: float, of_advertisers: bool = False) -> None:
        item_N = log.events.advertiser if of_advertisers else log.events.ad
        rows = np.flatnonzero(log.is_label & (item_N >= 0))
        rows = rows[np.lexsort((log.events.period[rows], log.events.market[rows]))]
        self._item, self._period = item_N[rows], log.events.period[rows]
        self._market_ptr = np.searchsorted(log.events.market[rows], np.arange(len(log.market_ids) + 1))
        self._n_items = len(log.advertiser_ids) if of_advertisers else len(log.ad_ids)
        self.decay, self.market_weight = decay, market_weight
        self._everywhere: dict[int, F64] = {}

    def __call__(self, active_M: I32, market: int, period: int) -> F64:
        """Score of items at the start of a period, ``(M,)``; ``active_M`` rises."""
        score_M = self._all(period)[active_M]
        if self.market_weight and 0 <= market < len(self._market_ptr) - 1:
            here = slice(self._market_ptr[market], self._market_ptr[market + 1])
            stop = here.start + int(np.searchsorted(self._period[here], period))
            items, ago = self._item[here.start : stop], period - self._period[here.start : stop]
            score_M = score_M + self.market_weight * sum_at(active_M, items, self.decay ** ago.astype(float))
        return score_M

    def _all(self, period: int) -> F64:
        if period not in self._everywhere:
            before = self._period < period
            ago = (period - self._period[before]).astype(float)
            if len(self._everywhere) == CACHED_PERIODS:
                self._everywhere.pop(next(iter(self._everywhere)))
            counts_I = np.bincount(self._item[before], self.decay**ago, minlength=self._n_items)
            self._everywhere[period] = counts_I.astype(np.float64)
        return self._everywhere[period]


def sum_at(active_M: NDArray[np.integer], item_N: NDArray[np.integer], weight_N: NDArray[np.floating]) -> F64:
    """Sum of the weights of each active item, ``(M,)``.

    Args:
        active_M: rising and distinct.
        item_N: items, active or not.
        weight_N: their weights.
    """
    if not len(active_M):
        return np.zeros(0)
    place_N = np.minimum(np.searchsorted(active_M, item_N), len(active_M) - 1)
    found_N = active_M[place_N] == item_N
    return np.bincount(place_N[found_N], weight_N[found_N], minlength=len(active_M)).astype(np.float64)
