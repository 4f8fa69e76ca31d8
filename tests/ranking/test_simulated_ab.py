"""Stacks in competition: what they are given decides, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.config import DataConfig
from data.errors import UserError
from data.log import load_log
from data.prepare import prepare
from data.statistics import Row
from data.truth import TRUTH, Truth
from pipeline.config import compose
from ranking.auction import AuctionConfig, Entrants, sell
from ranking.features import FeatureBuilder
from ranking.ranker import Ranker, build_module
from ranking.rows import Rows
from ranking.simulated_ab import (
    ALL_ADS,
    TRUE_CHANCE,
    Market,
    Stack,
    compare_stacks,
    correlations,
    divergences,
    run_ab,
)
from ranking.spec import FeatureSpec
from retrieval.blend import Blended
from retrieval.metrics import gini
from tests.ranking.common import KnownForecast, tiny_ids, tiny_ranker

CFG = AuctionConfig(budgets=[1.0, 100.0], seeds=[0, 1], draws=50)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("simulated")
    prepare(config(), directory)
    return directory


def config() -> DataConfig:
    return compose(["data=simulator", "data.simulator.users=150", "data.simulator.advertisers=30"]).data


@pytest.fixture(scope="module")
def market(world: Path) -> Market:
    log = load_log(world, config(), evaluate="validation")
    return Market.of(log, Truth.load(world / TRUTH), np.arange(0, len(log.user_ids), 2))


def noisy(entrants: Entrants, seed: int) -> Entrants:
    """Right on average, wrong on each by a factor of two or so."""
    noise_N = np.exp(0.7 * np.random.default_rng(seed).standard_normal(len(entrants.chance_N)) - 0.7**2 / 2)
    return replace(entrants, chance_N=entrants.chance_N * noise_N)


@pytest.fixture(scope="module")
def rows(market: Market) -> dict[tuple[str, str, str], Row]:
    best = market.everybody
    arms = {
        "none": [noisy(best, 0), noisy(best, 1)],
        "anchor": [noisy(best, 0), noisy(best, 1)],
        "lm": [replace(best, chance_N=2 * best.chance_N)] * 2,
        TRUE_CHANCE: [best],
        ALL_ADS: [best],
    }
    return {(row.metric, row.arm, row.segment): row for row in compare_stacks(market, arms, CFG)}


def test_visits_are_those_of_the_span_in_order_of_time(market: Market) -> None:
    log = market.log
    events = log.events
    shown = (events.request >= 0) & (events.period >= 22) & (events.period <= 23) & (events.user % 2 == 0)
    assert sorted(market.visits.request.tolist()) == np.unique(events.request[shown]).tolist()
    assert (np.diff(market.visits.period) >= 0).all()
    for name in ("user", "market", "period"):
        asked = getattr(market, f"{name}_R")[market.request_V]
        np.testing.assert_array_equal(asked, getattr(market.visits, name))


def test_the_same_stack_twice_differs_in_nothing(rows: dict[tuple[str, str, str], Row]) -> None:
    same = [row for (metric, arm, _), row in rows.items() if arm == "anchor - none" and "recovered" not in metric]
    assert len(same) > 40
    assert {(row.value, row.ci_low, row.ci_high) for row in same} == {(0.0, 0.0, 0.0)}


def test_who_knows_the_chance_gets_more_for_the_same_money(rows: dict[tuple[str, str, str], Row]) -> None:
    for metric in ("conversions", "value"):
        gain = rows[metric, f"{TRUE_CHANCE} - none", "all"]
        assert gain.ci_low is not None
        assert gain.ci_low > 0, metric
        assert rows[f"{metric}_recovered", "anchor - none", "all"].value == 0
    assert rows["agreement", TRUE_CHANCE, "all"].value == pytest.approx(1)
    assert rows["agreement", "none", "all"].value < 0.9
    assert rows["calibration", "none", "all"].value > 1.1, "the winner's curse"
    assert rows["offered_calibration", "none", "all"].value == pytest.approx(1, abs=0.1)


def test_predicting_twice_the_chance_only_doubles_prices(rows: dict[tuple[str, str, str], Row]) -> None:
    """Where nobody runs out of money: the same ads are shown."""
    figures = {metric: rows[metric, "lm", "budget 100"].value for metric in ("spend", "conversions", "roas")}
    right = {metric: rows[metric, ALL_ADS, "budget 100"].value for metric in figures}
    assert figures["conversions"] == pytest.approx(right["conversions"], rel=0.02)
    assert figures["spend"] == pytest.approx(2 * right["spend"], rel=0.05)
    assert rows["calibration", "lm", "budget 100"].value == pytest.approx(2)


def test_the_books_balance(market: Market, rows: dict[tuple[str, str, str], Row]) -> None:
    """Every total of an arm again, from its impressions one by one."""
    best = market.everybody
    conversions, spend, spread = [], [], []
    for seed in CFG.seeds:
        bid_A = market.bids(CFG, seed)
        assert (bid_A >= CFG.bid_share[0] * market.value).all()
        assert (bid_A <= CFG.bid_share[1] * market.value).all()
        budget_A = market.logged_conversions * bid_A
        sold = sell(
            market.request_V, best, market.running, bid_A=bid_A, budget_A=budget_A,
            attention_S=market.truth.attention, pacing_rate=CFG.pacing_rate,
        )  # fmt: skip
        assert sold.price_I.sum() <= budget_A.sum()
        advertiser_I = best.advertiser_N[sold.entrant_I]
        chance_I = market.truth.conversion_probability(
            market.visits.user[sold.visit_I], advertiser_I, 1 + sold.slot_I, market.visits.period[sold.visit_I]
        )
        conversions.append(chance_I.sum())
        spend.append(sold.price_I.sum())
        spread.append(gini(np.bincount(advertiser_I, minlength=len(market.value))[market.eligible]))
    assert rows["conversions", ALL_ADS, "all"].value == pytest.approx(np.mean(conversions))
    assert rows["cpa", ALL_ADS, "all"].value == pytest.approx(np.sum(spend) / np.sum(conversions))
    assert rows["gini", ALL_ADS, "all"].value == pytest.approx(np.mean(spread))
    drawn = rows["drawn_conversions", ALL_ADS, "all"].value
    assert drawn == pytest.approx(np.mean(conversions), abs=4 * np.sqrt(np.mean(conversions)))
    low, high = rows["gini", ALL_ADS, "all"].ci_low, rows["gini", ALL_ADS, "all"].ci_high
    assert low is not None
    assert high is not None
    assert low < np.mean(spread) < high


def test_budgets_are_worth_what_the_log_shows(market: Market) -> None:
    """Conversions to be expected of the logged impressions, which are one draw of that traffic."""
    logged, _ = market.log.outcomes("validation", market.users)
    chance = market.truth.conversion_probability(logged.user, logged.advertiser, logged.display, logged.period)
    assert market.logged_conversions.sum() == pytest.approx(chance.sum(), rel=0.15)


def test_what_comes_after_the_evaluated_span_changes_nothing(world: Path, market: Market) -> None:
    opened = load_log(world, config(), evaluate="test")
    with pytest.raises(UserError, match="test"):
        market.log.visits("test")
    again = Market.of(replace(opened, evaluate="validation"), market.truth, market.users)
    assert again.visits.request.tolist() == market.visits.request.tolist()
    np.testing.assert_array_equal(again.logged_conversions, market.logged_conversions)


def test_values_have_the_mean_that_the_truth_tells(market: Market) -> None:
    events = market.log.events
    bought = np.flatnonzero(~np.isnan(events.value))
    ratio = events.value[bought] / market.value[events.advertiser[bought]]
    assert ratio.mean() == pytest.approx(1, abs=0.03)


def test_a_forecast_is_as_far_off_as_it_says(market: Market) -> None:
    """The truth itself not at all, one that knows nothing by what is left of the entropy."""
    log_prob_RA = np.full((len(market.log.user_ids), len(market.log.advertiser_ids)), -9.0, np.float32)
    off_R = divergences(market, KnownForecast(log_prob_RA))
    for request in (0, len(off_R) - 1):
        running = market.running[request]
        true = market.truth.score(market.user_R[request], running, market.period_R[request])
        assert off_R[request] == pytest.approx(np.log(len(running)) + (true * np.log(true)).sum())


@pytest.fixture(scope="module")
def builder(market: Market) -> FeatureBuilder:
    return FeatureBuilder(market.log, tiny_ids(market.log), tiny_ranker().features)


@pytest.fixture(scope="module")
def ranker(market: Market, builder: FeatureBuilder) -> Ranker:
    """As it comes, of two tasks: three in ten for the first and one in a thousand for the second."""
    cfg = tiny_ranker(tasks=["click", "label"])
    features = builder.build(Rows.of_span(market.log, "ranker_stop", market.users)).with_prior(None, cfg.features.prior)
    spec = FeatureSpec.fit(features, cfg.features, semantic_ids=builder.ids.version)
    module = build_module(spec, cfg, base_rates=[0.3, 0.001], seed=0).eval()
    return Ranker(module, spec, cfg.model, tuple(cfg.tasks))


def test_what_is_bid_with_is_the_chance_of_a_conversion(
    market: Market, builder: FeatureBuilder, ranker: Ranker
) -> None:
    """Also where rankers rank by clicks."""
    asked = zip(market.requests.market, market.requests.period, strict=True)
    ads = [market.log.active_ads(int(place), int(period)).ad[:5] for place, period in asked]
    candidates = [Blended(one, ("own",) * len(one), (("own",),) * len(one)) for one in ads]
    predicted = []
    for tasks in (("click", "label"), ("label", "click")):
        stacks = {"none": Stack(candidates, None, [replace(ranker, tasks=tasks)])}
        found = run_ab(market, stacks, builder, replace(CFG, budgets=[1.0], seeds=[0], draws=2), facts={})
        predicted += [row.value for row in found.rows if (row.metric, row.arm) == ("offered_calibration", "none")]
    assert 100 * predicted[0] < predicted[1]


def test_rankers_without_a_task_of_conversions_are_refused(ranker: Ranker) -> None:
    with pytest.raises(UserError, match=r"(?s)tasks=\[click\].*label among.*add label"):
        Stack([], None, [replace(ranker, tasks=("click",))])


def test_correlations_are_those_of_each_group() -> None:
    rng = np.random.default_rng(0)
    group, a, b = np.repeat([0, 2], [5, 7]), rng.random(12), rng.random(12)
    found = correlations(group, a, b, 3)
    expected = [np.corrcoef(a[:5], b[:5])[0, 1], np.nan, np.corrcoef(a[5:], b[5:])[0, 1]]
    np.testing.assert_allclose(found, expected)
