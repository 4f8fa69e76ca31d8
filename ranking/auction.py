"""Ad auctions of many visits on budgets: who is shown where, and at what price.

    chance · bid ─► paced, and capped by what is left of the budget ─► generalised second price ─► slots, prices
                      ▲                                                                              │
                      └── spent so far ◄─────────────────────────────────────────────────────────────┘

An advertiser bids money for a conversion and pays for the impression. The best ``S`` scores (predicted chance times
bid) fill the slots in order, and who stands in slot ``j`` pays ``attention[j]`` times the next lower score: what it
had to beat, were the predicted chances right (Edelman, Ostrovsky & Schwarz, Internet Advertising and the Generalized
Second-Price Auction, AER 2007). So an advertiser whose rivals are predicted too high pays too much.

A budget is paced by one number an advertiser, by which it shades its bids: after every visit to a market in which it
runs it falls by the rate, and rises by the rate times the price over the even spend a visit (Balseiro & Gur, Learning
in Repeated Auctions with Budgets, Management Science 2019: adaptive pacing). No score is above what is left of the
budget, and no price above its score, so no budget is overspent.

Shapes: V visits, R requests (visits of one user, market and period share one), N entrants of all requests, A
advertisers, S slots, I impressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.rules import SEED, broken

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass
class AuctionConfig:
    """The market of a simulated A/B test.

    Args:
        bid_share: smallest and largest share of a conversion's value that an advertiser bids for it.
        budgets: money of an advertiser over what its part of the logged traffic is worth at its bid; main figures are
            of the first, the others tell how much hangs on it.
        pacing_rate: step by which bids are shaded; 0: nobody paces, budgets end abruptly.
        seeds: draws of bids and of what converts.
        oracle: also let rankers compete that are trained on a forecast which has this share of what the anchor lacks of
            the exact P(advertiser | user), in log-odds; 1: on the exact one.
        draws: bootstrap draws over users and seeds.

    Raises:
        UserError: a value is out of range. All problems are told at once.
    """

    bid_share: list[float] = field(default_factory=lambda: [0.2, 0.5])
    budgets: list[float] = field(default_factory=lambda: [1.0, 0.5, 100.0])
    pacing_rate: float = 0.01
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    oracle: list[float] = field(default_factory=lambda: [0.25, 0.5, 1.0])
    draws: int = 1000

    def __post_init__(self) -> None:
        errors = []
        if len(self.bid_share) != 2 or not 0 < self.bid_share[0] <= self.bid_share[1]:
            errors.append(_wrong("bid_share", self.bid_share, "[smallest, largest], both positive"))
        if not self.budgets or min(self.budgets) <= 0 or len(set(self.budgets)) != len(self.budgets):
            errors.append(_wrong("budgets", self.budgets, "at least one positive number, each named once"))
        if not 0 <= self.pacing_rate < 1:
            errors.append(_wrong("pacing_rate", self.pacing_rate, "at least 0 and below 1"))
        errors += broken(self, "auction", {"seeds": SEED.each()})
        if any(not 0 < share <= 1 for share in self.oracle) or len(set(self.oracle)) != len(self.oracle):
            errors.append(_wrong("oracle", self.oracle, "shares above 0 and up to 1, each named once"))
        if self.draws < 1:
            errors.append(_wrong("draws", self.draws, "a whole number, at least 1"))
        if errors:
            raise UserError.collect(errors)


def _wrong(name: str, value: object, expected: str) -> UserError:
    return UserError(f"auction.{name}={value}", expected=expected, action=f"set auction.{name} to {expected}")


@dataclass(frozen=True)
class Entrants:
    """Who takes part in the auctions of each request: an advertiser with its best candidate.

    Attributes:
        ptr_R1: request ``r`` has the entrants ``ptr_R1[r]:ptr_R1[r + 1]``.
        advertiser_N: distinct within a request.
        chance_N: predicted chance of a conversion in the first slot.
    """

    ptr_R1: Ints
    advertiser_N: Ints
    chance_N: Floats


@dataclass(frozen=True)
class Sold:
    """Impressions in order of sale.

    Attributes:
        visit_I: index of the visit.
        slot_I: from 0.
        entrant_I: index of `Entrants`.
        price_I: money paid.
    """

    visit_I: Ints
    slot_I: Ints
    entrant_I: Ints
    price_I: Floats


def second_price(score_N: Floats, attention_S: Floats) -> tuple[Ints, Floats]:
    """One generalised second-price auction.

    Args:
        score_N: what each entrant would pay for an impression in a slot of attention 1; 0 stays out.
        attention_S: of each slot, falling, 1 at the most.

    Returns:
        The entrants that are shown, slot by slot, and what each pays; equal scores keep their order. Nothing is paid
        where no other score is left.
    """
    order = np.argsort(-score_N, kind="stable")[: len(attention_S) + 1]
    order = order[score_N[order] > 0]
    shown = order[: len(attention_S)]
    to_beat = np.append(score_N[order[1:]], 0.0)[: len(shown)]
    return shown, attention_S[: len(shown)] * to_beat


def sell(
    request_V: Ints,
    entrants: Entrants,
    running_R: Sequence[NDArray[np.integer]],
    *,
    bid_A: Floats,
    budget_A: Floats,
    attention_S: Floats,
    pacing_rate: float,
) -> Sold:
    """The auctions of all visits, one after the other.

    Args:
        request_V: request of each visit, in order of time.
        entrants: of each request.
        running_R: advertisers that run in each request's market and period: their pacing moves on.
        bid_A: money for a conversion.
        budget_A: money for all visits.
        attention_S: of each slot.
        pacing_rate: of `AuctionConfig`.
    """
    worth_N = entrants.chance_N * bid_A[entrants.advertiser_N]
    visits_A = np.zeros(len(bid_A))
    for request, times in enumerate(np.bincount(request_V, minlength=len(running_R))):
        visits_A[running_R[request]] += times
    even_A = budget_A / np.maximum(visits_A, 1)
    spent_A, shade_A, paid_A = np.zeros((3, len(bid_A)))
    slots, found, prices = [], [], []
    for request in request_V.tolist():
        first, end = entrants.ptr_R1[request : request + 2]
        advertiser_n = entrants.advertiser_N[first:end]
        left_n = np.maximum(budget_A[advertiser_n] - spent_A[advertiser_n], 0.0)
        score_n = np.minimum(worth_N[first:end] / (1 + shade_A[advertiser_n]), left_n)
        shown, price = second_price(score_n, attention_S)
        paid_A[advertiser_n[shown]] = price
        spent_A += paid_A
        running = running_R[request]
        pace = paid_A[running] / np.maximum(even_A[running], 1e-300) - 1
        shade_A[running] = np.maximum(shade_A[running] + pacing_rate * pace, 0.0)
        paid_A[advertiser_n[shown]] = 0.0
        slots.append(np.arange(len(shown)))
        found.append(first + shown)
        prices.append(price)
    empty = np.zeros(0, np.int64)
    visit_I = np.repeat(np.arange(len(request_V)), [len(part) for part in slots])
    return Sold(
        visit_I,
        np.concatenate([empty, *slots]),
        np.concatenate([empty, *found]),
        np.concatenate([empty.astype(np.float64), *prices]),
    )


def best_of_advertisers(request_N: Ints, advertiser_N: NDArray[np.integer], chance_N: Floats) -> Ints:
    """The likeliest candidate of each advertiser of each request.

    Args:
        request_N: of each candidate.
        advertiser_N: of each candidate; those of no advertiser (-1) are left out.
        chance_N: predicted.

    Returns:
        Their rows, by request and advertiser; of equal chances the first.
    """
    order = np.lexsort((-chance_N, advertiser_N, request_N))
    order = order[advertiser_N[order] >= 0]
    same = (np.diff(request_N[order], prepend=-1) == 0) & (np.diff(advertiser_N[order], prepend=-1) == 0)
    return order[~same]
