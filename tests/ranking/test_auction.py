"""Auctions: nobody pays more than it bids, no budget is overspent, and the price is what there was to beat."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from data.errors import UserError
from pipeline.config import compose
from ranking.auction import AuctionConfig, Entrants, best_of_advertisers, second_price, sell

ATTENTION = np.array([1.0, 0.7, 0.5])
SCORES = arrays(np.float64, st.integers(0, 8), elements=st.floats(0, 10))


@given(SCORES)
def test_the_best_scores_win_and_pay_the_next_one(score_N: np.ndarray) -> None:
    shown, price = second_price(score_N, ATTENTION)
    assert len(set(shown.tolist())) == len(shown) == min((score_N > 0).sum(), 3)
    best = np.sort(score_N)[::-1]
    np.testing.assert_array_equal(score_N[shown], best[: len(shown)])
    np.testing.assert_array_equal(price, ATTENTION[: len(shown)] * np.append(best, np.zeros(4))[1 : len(shown) + 1])
    assert (price <= score_N[shown]).all()


@given(SCORES.filter(len), st.data())
def test_who_scores_more_is_not_shown_lower_and_makes_nobody_pay_less(score_N: np.ndarray, data: st.DataObject) -> None:
    who = data.draw(st.integers(0, len(score_N) - 1))
    raised_N = score_N.copy()
    raised_N[who] += data.draw(st.floats(0, 5))
    place = [shown.tolist().index(who) if who in shown else 3 for shown, _ in map(_auction, (score_N, raised_N))]
    assert place[1] <= place[0]
    (_, before), (_, after) = _auction(score_N), _auction(raised_N)
    assert (after[: len(before)] >= before).all()


def _auction(score_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return second_price(score_N, ATTENTION)


def market(seed: int, *, n_requests: int = 6, n_advertisers: int = 7) -> tuple[Entrants, list[np.ndarray], np.ndarray]:
    """Requests of some advertisers each, who runs, and 60 visits."""
    rng = np.random.default_rng(seed)
    entering = [np.flatnonzero(rng.random(n_advertisers) < 0.7) for _ in range(n_requests)]
    ptr = np.cumsum([0, *map(len, entering)])
    entrants = Entrants(ptr, np.concatenate(entering), rng.random(ptr[-1]))
    return entrants, entering, rng.integers(n_requests, size=60)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 99), st.floats(0, 20), st.sampled_from([0.0, 0.01, 0.5]))
def test_no_budget_is_overspent_and_no_price_above_what_was_bid(seed: int, money: float, pacing_rate: float) -> None:
    entrants, running, request_V = market(seed)
    rng = np.random.default_rng(seed)
    bid_A, budget_A = rng.random(7), money * rng.random(7)
    sold = sell(
        request_V, entrants, running, bid_A=bid_A, budget_A=budget_A, attention_S=ATTENTION, pacing_rate=pacing_rate
    )
    advertiser_I = entrants.advertiser_N[sold.entrant_I]
    assert (np.bincount(advertiser_I, sold.price_I, 7) <= budget_A + 1e-9).all()
    assert (sold.price_I <= entrants.chance_N[sold.entrant_I] * bid_A[advertiser_I]).all()
    first_I = entrants.ptr_R1[request_V[sold.visit_I]]
    assert ((sold.entrant_I >= first_I) & (sold.entrant_I < entrants.ptr_R1[request_V[sold.visit_I] + 1])).all()
    assert len({*zip(sold.visit_I.tolist(), sold.slot_I.tolist(), strict=True)}) == len(sold.visit_I)


def test_without_end_of_money_or_pacing_visits_are_auctions_of_their_own() -> None:
    entrants, running, request_V = market(0)
    bid_A = np.linspace(1, 2, 7)
    sold = sell(
        request_V, entrants, running, bid_A=bid_A, budget_A=np.full(7, 1e9), attention_S=ATTENTION, pacing_rate=0.0
    )
    for visit, request in enumerate(request_V):
        part = slice(*entrants.ptr_R1[request : request + 2])
        shown, price = second_price(entrants.chance_N[part] * bid_A[entrants.advertiser_N[part]], ATTENTION)
        mine = sold.visit_I == visit
        np.testing.assert_array_equal(sold.entrant_I[mine], part.start + shown)
        np.testing.assert_array_equal(sold.price_I[mine], price)


def test_pacing_spreads_a_budget_over_the_visits() -> None:
    """The money of a budget that is gone after a third of the visits lasts to the last third."""
    entrants = Entrants(np.array([0, 2]), np.array([0, 1]), np.array([0.5, 0.4]))
    spent = {}
    for rate in (0.0, 0.05):
        sold = sell(
            np.zeros(300, np.int64), entrants, [np.array([0, 1])], bid_A=np.ones(2), budget_A=np.array([40.0, 1e9]),
            attention_S=np.ones(1), pacing_rate=rate,
        )  # fmt: skip
        of_first = sold.entrant_I == 0
        spent[rate] = np.bincount(sold.visit_I[of_first] // 100, sold.price_I[of_first], 3)
    assert spent[0.0][0] == pytest.approx(40.0)
    assert spent[0.05].min() > 5
    assert spent[0.05].sum() > 25


def test_an_advertiser_enters_with_its_likeliest_ad() -> None:
    request, advertiser = np.array([0, 0, 0, 1, 1, 1]), np.array([4, 2, 4, 4, -1, 4])
    rows = best_of_advertisers(request, advertiser, np.array([0.1, 0.3, 0.2, 0.5, 0.9, 0.5]))
    assert rows.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"bid_share": [0.5, 0.2]}, "auction.bid_share=[0.5, 0.2]"),
        ({"bid_share": [0.5]}, "auction.bid_share=[0.5]"),
        ({"budgets": []}, "auction.budgets=[]"),
        ({"budgets": [1.0, 0.0]}, "auction.budgets=[1.0, 0.0]"),
        ({"pacing_rate": 1.0}, "auction.pacing_rate=1.0"),
        ({"oracle": [0.0, 1.0]}, "auction.oracle=[0.0, 1.0]"),
        ({"seeds": [1, 1], "draws": 0}, "auction.draws=0"),
    ],
)
def test_a_market_that_cannot_be_is_told(wrong: dict[str, list[float]], told: str) -> None:
    with pytest.raises(UserError) as error:
        AuctionConfig(**wrong)  # type: ignore[arg-type]
    assert told in str(error.value)


def test_a_run_without_a_market_gets_the_one_of_the_file() -> None:
    assert compose([]).auction == AuctionConfig()
