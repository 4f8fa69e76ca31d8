"""The oracle is the simulator's truth in a forecast's clothes, and nothing ranks better than the true chance."""

from __future__ import annotations

import numpy as np
import pytest

from data.log import Log, load_log
from data.prepare import prepare
from data.truth import TRUTH, Truth
from pipeline.config import compose
from ranking.metrics import Sample, evaluate
from ranking.oracle import OracleForecast, true_chance
from ranking.prior import GROUPS, columns_of_groups
from ranking.rows import Rows, prior_columns
from semantic_ids.advertiser_ids import AdvertiserIds
from tests.ranking.common import KnownForecast, tiny_ids


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, Truth, AdvertiserIds]:
    directory = tmp_path_factory.mktemp("simulated")
    cfg = compose(["data=simulator", "data.simulator.users=400", "data.simulator.advertisers=40"]).data
    prepare(cfg, directory)
    log = load_log(directory, cfg, evaluate="validation")
    return log, Truth.load(directory / TRUTH), tiny_ids(log)


@pytest.fixture(scope="module")
def oracle(world: tuple[Log, Truth, AdvertiserIds]) -> OracleForecast:
    log, truth, ids = world
    even = np.full((len(log.user_ids), len(log.advertiser_ids)), -np.log(len(log.advertiser_ids)), np.float32)
    interests = np.tile(np.arange(len(log.ad_ids), dtype=np.float32), (len(log.user_ids), 1))
    return OracleForecast(truth, log, ids, anchor=KnownForecast(even, interest_UI=interests), top=10)


def test_it_says_what_the_truth_says(world: tuple[Log, Truth, AdvertiserIds], oracle: OracleForecast) -> None:
    _, truth, _ = world
    user, period = np.array([3, 3, 77]), np.array([18, 22, 22])
    log_prob_BA = oracle.log_probs(user, period)
    np.testing.assert_allclose(np.exp(log_prob_BA), truth.score_all(user, period), atol=1e-5)
    np.testing.assert_allclose(np.exp(log_prob_BA).sum(1), 1.0, atol=1e-5)


def test_half_the_way_is_half_the_log_odds(world: tuple[Log, Truth, AdvertiserIds], oracle: OracleForecast) -> None:
    log, truth, ids = world
    half = OracleForecast(truth, log, ids, anchor=oracle.anchor, top=10, share=0.5)
    user, period = np.array([3, 77]), np.array([18, 22])
    exact_BA, half_BA = (one.log_probs(user, period) for one in (oracle, half))
    np.testing.assert_allclose(np.diff(half_BA), np.diff(exact_BA) / 2, atol=1e-4)  # this anchor is even
    np.testing.assert_allclose(np.exp(half_BA).sum(1), 1.0, atol=1e-5)


def test_its_features_are_those_of_a_forecast(world: tuple[Log, Truth, AdvertiserIds], oracle: OracleForecast) -> None:
    log, _, ids = world
    rows = Rows.of_span(log, "ranker_fit")
    names = columns_of_groups(GROUPS, levels=ids.codes_AL.shape[1])
    columns = prior_columns(rows, oracle, names)
    assert set(columns) == set(names)
    assert all(np.isfinite(column).all() for column in columns.values())
    for n in (0, len(rows) // 2, len(rows) - 1):
        log_prob_A = oracle.log_probs(rows.user[n : n + 1], rows.period[n : n + 1])[0]
        own = log_prob_A[rows.advertiser[n]]
        same_prefix = ids.codes_AL[:, 0] == ids.codes_AL[rows.advertiser[n], 0]
        expected = {
            "prior_prob": np.exp(own),
            "prior_lift": own + np.log(len(log_prob_A)),
            "prior_rank": np.log1p((log_prob_A > own).sum()),
            "prior_prefix_log_prob": np.log(np.exp(log_prob_A[same_prefix]).sum()),
            "prior_entropy": -(np.exp(log_prob_A) * log_prob_A).sum(),
            "prior_mass": np.sort(np.exp(log_prob_A))[-10:].sum(),
            "prior_age": 0.0,
            "prior_interests": rows.ad[n],  # the anchor's: the truth is of advertisers
        }
        for name, value in expected.items():
            assert columns[name][n] == pytest.approx(value, abs=1e-4), name


def test_the_true_chance_is_calibrated_and_ranks_best(
    world: tuple[Log, Truth, AdvertiserIds], oracle: OracleForecast
) -> None:
    log, truth, _ = world
    rows = Rows.of_span(log, (14, 23))
    chance = true_chance(truth, log, rows)
    assert np.average(chance[:, 0], weights=rows.weight) == pytest.approx(
        np.average(rows.label, weights=rows.weight), rel=0.1
    )
    sample = Sample.of(rows.label, rows.weight, rows.user, draws=1, seed=0)
    best = evaluate(sample, chance[:, 0])
    prior = prior_columns(rows, oracle, ("prior_prob",))["prior_prob"].astype(np.float64)
    assert best["auc"][0] > evaluate(sample, prior)["auc"][0] > 0.5
    assert best["ece"][0] < 0.01
