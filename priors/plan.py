"""The plan of campaigns: who runs how many ads in a period, against what each used to run.

An advertiser converts while its ads run, and an ad system knows before a period what will run in it: budgets, flights
and leaflets are booked ahead. What users did tells the demand, the plan tells how much of it can be met:

    r_t(a) = (ads of a running in t + 1) / (ads of a running in a period before t, on average, + 1)

An ad counts once in each market it runs in. The plan of a period is taken as known at its start, that of the first one
after the log too: that is the one to be served. No event is read.

Shapes: P periods, A advertisers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.log import Log

Float = NDArray[np.float64]


def running_ads(log: Log, n_periods: int) -> NDArray[np.int64]:
    """Running ads of each advertiser in each period, added up over markets.

    Args:
        log: its placements.
        n_periods: P; the periods are those before this one.

    Returns:
        ``(P, A)``; period 0 has none.
    """
    placements, n_advertisers = log.placements, len(log.advertiser_ids)
    advertiser_P = log.ad_advertiser[placements.ad]
    stretch_P = np.repeat(np.arange(len(placements.first)), np.diff(placements.ptr))
    known_P = advertiser_P >= 0
    advertiser_P, stretch_P = advertiser_P[known_P].astype(np.int64), stretch_P[known_P]
    # A stretch lasts until the next one of its market, the last one of a market for good.
    until = np.append(placements.first[1:].astype(np.int64), n_periods)
    until[placements.market_ptr[1:][np.diff(placements.market_ptr) > 0] - 1] = n_periods

    def at(period_S: NDArray[np.integer]) -> NDArray[np.int64]:
        cell_P = np.clip(period_S, 1, n_periods)[stretch_P] * n_advertisers + advertiser_P
        return np.bincount(cell_P, minlength=(n_periods + 1) * n_advertisers).reshape(-1, n_advertisers)

    return np.cumsum(at(placements.first) - at(until), axis=0)[:-1]


def planned(log: Log, n_periods: int) -> Float | None:
    """:func:`compared` of the running ads of a log, as of :func:`running_ads`, and of the period after it."""
    running_PA = running_ads(log, n_periods)
    if log.last_period + 1 < n_periods:
        advertiser_P = log.ad_advertiser[log.next_ads]
        running_PA[log.last_period + 1] = np.bincount(advertiser_P[advertiser_P >= 0], minlength=running_PA.shape[1])
    return compared(running_PA)


def compared(running_PA: NDArray[np.int64]) -> Float | None:
    """log r of each advertiser in each period.

    Args:
        running_PA: running ads, as of :func:`running_ads`.

    Returns:
        ``(P, A)``, with rows of zeros for the first period and where nothing at all is known to run; None where the
        plan says nothing, for the same ads run in every period.
    """
    known_P = running_PA.sum(1) > 0
    if not known_P.any() or not np.ptp(running_PA[known_P], axis=0).any():
        return None
    before_PA = np.zeros(running_PA.shape)
    before_PA[1:] = np.cumsum(running_PA[:-1], axis=0) / np.maximum(np.cumsum(known_P[:-1]), 1)[:, None]
    known_P[: int(np.argmax(known_P)) + 1] = False  # before the first there is nothing to compare with
    return np.where(known_P[:, None], np.log1p(running_PA) - np.log1p(before_PA), 0.0)
