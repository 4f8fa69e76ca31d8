from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import polars as pl
import pytest

from data.log import Log, load_log
from data.writer import write_tables
from priors.anchor import Anchor, AnchorConstants, Counts
from priors.baselines import Planned, Scored, fit_baselines
from priors.config import AnchorConfig, BaselineConfig
from priors.constants import choose_constants
from priors.interests import InterestSpace
from priors.plan import planned, running_ads
from priors.sasrec import SasRecForecast
from tests.logs import tiny_config, tiny_log, tiny_tables

CONSTANTS = AnchorConstants(own_weight=0.6, own_decay=0.9, popularity_decay=0.8, smoothing=0.5, co_weight=0.2)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("plan"))


def by_hand(log: Log, period: int) -> np.ndarray:
    running = np.zeros(len(log.advertiser_ids))
    for market in range(len(log.market_ids)):
        for ad in log.active_ads(market, period).ad:
            running[log.ad_advertiser[ad]] += log.ad_advertiser[ad] >= 0
    return running


def test_ads_are_counted_in_every_market_they_run_in(log: Log) -> None:
    expected = [by_hand(log, period) for period in range(1, 12)]
    np.testing.assert_array_equal(running_ads(log, 12)[1:], expected)


def test_a_plan_compares_a_period_with_those_before_it(log: Log) -> None:
    plan_PA = planned(log, 12)
    assert plan_PA is not None
    np.testing.assert_array_equal(plan_PA[:2], 0.0)
    before = np.mean([by_hand(log, period) for period in range(1, 7)], axis=0)
    np.testing.assert_allclose(plan_PA[7], np.log((by_hand(log, 7) + 1) / (before + 1)))


def test_the_period_after_the_log_has_the_plan_that_is_booked_and_those_after_it_none(log: Log, tmp_path: Path) -> None:
    """A validation run's log ends before the test span; what is served is a forecast of that span's first period."""
    plan_PA, opened = planned(log, 15), tiny_log(tmp_path, evaluate="test")
    assert plan_PA is not None
    before = np.mean([by_hand(log, period) for period in range(1, 12)], axis=0)
    np.testing.assert_allclose(plan_PA[12], np.log((by_hand(opened, 12) + 1) / (before + 1)))
    assert plan_PA[12].any()
    np.testing.assert_array_equal(plan_PA[13:], 0.0)
    counted = Counts.of(log).plan_PA
    assert counted is not None
    np.testing.assert_array_equal(counted[-1], plan_PA[12])


def test_what_runs_later_changes_no_plan_of_before(log: Log, tmp_path: Path) -> None:
    tables, cut = tiny_tables(), log.calendar.start(8)
    early = replace(tables, placements=tables.placements.filter(pl.col("start") < cut))
    write_tables(early, tmp_path)
    plan_PA, of_early = planned(log, 12), planned(load_log(tmp_path, tiny_config(), evaluate="validation"), 12)
    assert plan_PA is not None
    assert of_early is not None
    np.testing.assert_array_equal(of_early[:8], plan_PA[:8])


def test_ads_that_always_run_are_no_plan(log: Log) -> None:
    placements = log.placements
    first = placements.market_ptr[:-1]
    rows = [np.arange(placements.ptr[stretch], placements.ptr[stretch + 1]) for stretch in first]
    always = replace(
        placements,
        market_ptr=np.arange(len(first) + 1),
        first=placements.first[first],
        ptr=np.concatenate(([0], np.cumsum([len(part) for part in rows]))),
        ad=placements.ad[np.concatenate(rows)],
    )
    fixed = replace(log, placements=always, next_ads=always.ad)
    assert running_ads(fixed, 12)[1:].any()
    assert planned(fixed, 12) is None
    counts = Counts.of(fixed)
    grid = AnchorConfig(own_weight=[0.5], own_decay=[0.9], popularity_decay=[0.9], smoothing=[1.0], plan_exponent=[1.0])
    assert choose_constants(counts, fixed.advertiser_targets("prior_select"), grid).constants.plan_exponent == 0


def test_interests_have_no_plan(log: Log) -> None:
    assert InterestSpace.of(log, "category").counts.plan_PA is None


def test_the_plan_weighs_shares_and_leaves_a_distribution(log: Log) -> None:
    counts, users, when = Counts.of(log), np.arange(12), np.full(12, 8)
    assert counts.plan_PA is not None
    without = Anchor(counts, CONSTANTS).probabilities(users, when)
    found = Anchor(counts, replace(CONSTANTS, plan_exponent=0.5)).probabilities(users, when)
    expected = without * np.exp(0.5 * counts.plan_PA[8])
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), rtol=1e-12)


@pytest.mark.parametrize("kind", ["popularity", "popularity+history", "popularity+history+cooccurrence"])
def test_the_exponent_is_chosen_by_what_followed(log: Log, kind: str) -> None:
    """Ads that run are the ones that are bought here, so the plan is worth its weight."""
    targets, counts = log.advertiser_targets("prior_select"), Counts.of(log)
    grid = AnchorConfig(
        kind=kind, own_weight=[0.2, 0.6], co_weight=[0.1], own_decay=[0.9], co_decay=[0.9], co_shrinkage=[1.0],
        popularity_decay=[1.0], smoothing=[1.0], plan_exponent=[0.0, 1.0],
    )  # fmt: skip
    chosen = choose_constants(counts, targets, grid)
    assert chosen.constants.plan_exponent == 1.0
    q = Anchor(counts, chosen.constants).probabilities(targets.user, targets.period)
    nll = -np.bincount(targets.row, np.log(q[targets.row, targets.item])) / np.diff(targets.ptr)
    assert nll.mean() == pytest.approx(min(trial["nll"] for trial in chosen.trials))


def test_baselines_are_told_the_plan(log: Log, tmp_path: Path) -> None:
    counts, users, when = Counts.of(log), np.arange(12), np.full(12, 8)
    cfg = BaselineConfig(names=["own"], own_count=[0.2])
    popularity = Anchor(counts, replace(CONSTANTS, own_weight=0.0, co_weight=0.0, plan_exponent=1.0))
    told = fit_baselines(log, popularity, cfg, seed=0, work_dir=tmp_path)[0]["own"]
    found = told.log_probs(users, when)
    assert counts.plan_PA is not None
    assert isinstance(told, Scored)
    expected = told.scores(users, when) * np.exp(counts.plan_PA[8])
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    for row, wanted in zip(found, expected, strict=True):  # what was not bought is told apart by popularity alone
        some = np.flatnonzero(wanted)
        assert (np.diff(row[some][np.argsort(wanted[some])]) >= 0).all()
        assert row[wanted == 0].max() < row[some].min()
    np.testing.assert_allclose(np.exp(found).sum(1), 1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_forecast_of_before_gets_the_plan_of_today(log: Log, dtype: type) -> None:
    """As if what was known then had been asked with today's plan; a forecast of today stays as it is, byte for byte."""
    counts, users = Counts.of(log), np.arange(12)
    made, period = np.full(12, 7), np.where(users % 2, 9, 7)
    anchor, without = Anchor(counts, replace(CONSTANTS, plan_exponent=0.5)), Anchor(counts, CONSTANTS)
    log_prob: np.ndarray = np.log(anchor.probabilities(users, made)).astype(dtype)
    found = anchor.replanned(log_prob, made, period)
    assert counts.plan_PA is not None
    expected = without.probabilities(users, made) * np.exp(0.5 * counts.plan_PA[period])
    np.testing.assert_allclose(np.exp(found), expected / expected.sum(1, keepdims=True), rtol=1e-5)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[::2], log_prob[::2])
    assert np.abs(found[1::2] - log_prob[1::2]).max() > 0.1
    assert without.replanned(log_prob, made, period) is log_prob


def test_baselines_of_before_get_the_plan_of_today(log: Log, tmp_path: Path) -> None:
    """Scores and popularity as of then, of whom the plan speaks today."""
    counts, users, made, today = Counts.of(log), np.arange(12), np.full(12, 2), np.full(12, 9)
    popularity = Anchor(counts, replace(CONSTANTS, own_weight=0.0, co_weight=0.0, plan_exponent=1.0))
    own = fit_baselines(log, popularity, BaselineConfig(names=["own"], own_count=[0.2]), seed=0, work_dir=tmp_path)
    told = own[0]["own"]
    assert isinstance(told, Scored)
    found, plan_PA = told.log_probs(users, made, today), counts.plan_PA
    assert plan_PA is not None
    expected = told.scores(users, made) * np.exp(plan_PA[9])
    some = (told.scores(users, made) > 0).any(1)
    assert 0 < some.sum() < len(users)
    np.testing.assert_array_equal(found[some].argmax(1), expected[some].argmax(1))
    alone = Anchor(counts, replace(CONSTANTS, own_weight=0.0, co_weight=0.0)).probabilities(users, made)
    alone = alone * np.exp(plan_PA[9])
    np.testing.assert_allclose(np.exp(found[~some]), (alone / alone.sum(1, keepdims=True))[~some], rtol=1e-9)
    np.testing.assert_array_equal(told.log_probs(users, made, made), told.log_probs(users, made))


def test_a_network_is_told_the_plan(log: Log) -> None:
    counts, users, when = Counts.of(log), np.arange(12), np.full(12, 8)
    popularity = Anchor(counts, replace(CONSTANTS, plan_exponent=1.0))
    untold = Anchor(counts, CONSTANTS).probabilities
    network = SimpleNamespace(log_probs=lambda user_B, period_B: np.log(untold(user_B, period_B)))
    told = Planned(cast(SasRecForecast, network), popularity)
    np.testing.assert_allclose(np.exp(told.log_probs(users, when)), popularity.probabilities(users, when), rtol=1e-9)
    later = popularity.replanned(np.log(popularity.probabilities(users, when)), when, when + 1)
    np.testing.assert_allclose(told.log_probs(users, when, when + 1), later, rtol=1e-9)
