"""Channels, their blend and the retriever, on vectors one can follow by hand and on the tiny log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from data.log import Log
from retrieval.blend import blend
from retrieval.channels import (
    FORECAST,
    POPULARITY,
    SEEDED,
    TWO_TOWER,
    ForecastChannel,
    PopularityChannel,
    Request,
    SeededChannel,
    TwoTowerChannel,
)
from retrieval.evaluate import Retriever, evaluate_retrieval
from retrieval.index import AdIndex, IndexConfig
from retrieval.two_tower import TrainedTwoTower
from tests.logs import tiny_log
from tests.ranking.common import KnownForecast
from tests.retrieval.common import tiny_retrieval, train_tiny

ANGLES = np.deg2rad(np.arange(12) * 10.0)
VECTORS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
OWNER = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, -1], dtype=np.int32)
INDEX = AdIndex.build(VECTORS, np.arange(12, dtype=np.int32), IndexConfig())
ALONG_X = np.array([1.0, 0.0], dtype=np.float32)


def request(log_prob: list[float] | None, active: list[int] | None = None, *, vector: bool = True) -> Request:
    return Request(
        period=3,
        active=np.array(range(12) if active is None else active, dtype=np.int32),
        vector_D=ALONG_X if vector else None,
        log_prob_A=None if log_prob is None else np.array(log_prob, dtype=np.float32),
    )


def test_two_tower_takes_the_nearest_active_ads() -> None:
    assert TwoTowerChannel(INDEX).candidates(request(None, [2, 5, 7, 11]), 3).tolist() == [2, 5, 7]


def test_the_papers_rule_takes_forecast_advertisers_ads_by_two_tower_score() -> None:
    channel = ForecastChannel(INDEX, OWNER, 2)
    assert channel.candidates(request([-5.0, -1.0, -0.5, -9.0]), 4).tolist() == [3, 4, 5, 6]
    # Advertiser 2 runs nothing here: the next one of the forecast takes its place.
    assert channel.candidates(request([-5.0, -1.0, -0.5, -9.0], [0, 4, 9]), 4).tolist() == [0, 4]


def test_the_soft_form_adds_an_ads_share_of_the_forecast() -> None:
    log_prob = [-3.0, -2.0, -0.1, -4.0]
    channel = ForecastChannel(INDEX, OWNER, 4, prior_weight=0.5, temperature=1.0)
    expected = VECTORS[:11] @ ALONG_X
    expected += 0.5 * (np.array(log_prob)[OWNER[:11]] - np.log(np.array([3, 3, 3, 2])[OWNER[:11]]))
    found = channel.candidates(request(log_prob), 11)
    assert found.tolist() == np.argsort(-expected, kind="stable").tolist()
    assert found.tolist() != ForecastChannel(INDEX, OWNER, 4).candidates(request(log_prob), 11).tolist()


def test_seeds_give_their_neighbours_in_turn_without_duplicates() -> None:
    found = SeededChannel(INDEX, OWNER, 2).candidates(request([-9.0, -1.0, -9.5, -0.5]), 12).tolist()
    assert found[0] in (9, 10)  # the likeliest advertiser's own two ads lie equally near their mean
    assert found[1] == 4  # the middle one of the other's three
    assert len(found) == len(set(found)) == 12
    assert 11 in found  # an ad that no forecast advertiser owns


def test_popularity_counts_conversions_before_the_period_only(tmp_path: Path) -> None:
    log = tiny_log(tmp_path)
    active = np.arange(len(log.ad_ids), dtype=np.int32)
    asked = Request(period=5, active=active, vector_D=None, log_prob_A=None)
    found = PopularityChannel(log).candidates(asked, 10)
    before = log.events.select(log.is_label & (log.events.period < 5))
    counts = np.bincount(before.ad, minlength=len(log.ad_ids))
    assert counts[found].tolist() == np.sort(counts)[::-1][:10].tolist()


NOTHING = [
    (TwoTowerChannel(INDEX), request(None, vector=False)),
    (TwoTowerChannel(INDEX), request(None, [])),
    (ForecastChannel(INDEX, OWNER, 2), request(None)),
    (ForecastChannel(INDEX, OWNER, 2), request([-1.0] * 4, vector=False)),
    (ForecastChannel(INDEX, OWNER, 2), request([-1.0] * 4, [11])),
    (SeededChannel(INDEX, OWNER, 2), request(None)),
    (SeededChannel(INDEX, OWNER, 2), request([-1.0] * 4, [])),
]


@pytest.mark.parametrize(("channel", "asked"), NOTHING)
def test_a_channel_with_nothing_to_say_says_nothing(channel: TwoTowerChannel, asked: Request) -> None:
    assert channel.candidates(asked, 5).tolist() == []


def ads(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int32)


def test_blend_deals_places_by_share_and_a_shorter_budget_is_a_prefix() -> None:
    lists = {"a": ads(*range(0, 20)), "b": ads(*range(100, 120))}
    whole = blend(lists, {"a": 0.7, "b": 0.3}, budget=10)
    assert whole.source.count("b") == 3
    for budget in range(1, 10):
        assert blend(lists, {"a": 0.7, "b": 0.3}, budget=budget).ads.tolist() == whole.ads[:budget].tolist()


def test_blend_frees_duplicates_and_keeps_who_found_them() -> None:
    blended = blend({"a": ads(1, 2, 3, 4), "b": ads(2, 1, 9, 8)}, {"a": 0.5, "b": 0.5}, budget=6)
    assert sorted(blended.ads.tolist()) == [1, 2, 3, 4, 8, 9]
    found = dict(zip(blended.ads.tolist(), blended.found_by, strict=True))
    assert found[1] == ("a", "b")
    assert found[9] == ("b",)


def test_blend_fills_dry_channels_from_the_others_then_the_fallback() -> None:
    blended = blend({"a": ads(1), "b": ads(5, 6), "p": ads(1, 7, 8, 9)}, {"a": 0.5, "b": 0.5}, budget=5, fallback="p")
    assert blended.ads.tolist()[:3] == [1, 5, 6]
    assert blended.ads.tolist()[3:] == [7, 8]
    assert blended.source[3:] == ("p", "p")


BAD_SHARES = [
    ({"a": 0.5}, "add up to 1"),
    ({"a": 1.5, "b": -0.5}, "must not be negative"),
    ({"c": 1.0}, "no list of channel c"),
]


@pytest.mark.parametrize(("shares", "message"), BAD_SHARES)
def test_bad_shares_are_told(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blend({"a": ads(1), "b": ads(2)}, shares, budget=2)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="module")
def towers(log: Log, tmp_path_factory: pytest.TempPathFactory) -> TrainedTwoTower:
    return train_tiny(log, tiny_retrieval(), tmp_path_factory.mktemp("towers"))[0]


def oracle(log: Log) -> KnownForecast:
    """Knows what each user converts with in the evaluated span."""
    targets = log.advertiser_targets(log.evaluate)
    log_prob = np.full((len(log.user_ids), len(log.advertiser_ids)), -8.0)
    log_prob[targets.user[targets.row], targets.item] = 0.0
    return KnownForecast(log_softmax(log_prob, axis=1).astype(np.float32))


def uniform(log: Log) -> KnownForecast:
    n = len(log.advertiser_ids)
    return KnownForecast(np.full((len(log.user_ids), n), -np.log(n), dtype=np.float32))


def test_equal_budget_in_every_arm_and_only_active_ads(log: Log, towers: TrainedTwoTower) -> None:
    cfg = tiny_retrieval()
    targets = log.ad_targets("validation")
    for forecast, quota in ((None, 0.0), (uniform(log), 0.5), (oracle(log), 1.0)):
        retriever = Retriever(log, towers, forecast, cfg)
        for row in range(0, len(targets), 7):
            user, market, period = (int(x[row]) for x in (targets.user, targets.market, targets.period))
            found = retriever.candidates(user, market, period, quota)
            assert len(found) == cfg.budget == len(set(found.ads.tolist()))
            assert np.isin(found.ads, log.active_ads(market, period).ad).all()
            assert {name for names in found.found_by for name in names} <= {TWO_TOWER, FORECAST, SEEDED, POPULARITY}


def test_a_user_without_history_or_forecast_is_answered_by_popularity(log: Log, towers: TrainedTwoTower) -> None:
    first = 1  # nobody has bought anything before period 1
    found = Retriever(log, towers, None, tiny_retrieval()).candidates(0, 0, first, 0.0)
    assert len(found) > 0
    assert set(found.source) == {POPULARITY}


def test_an_oracle_gains_and_a_uniform_forecast_does_not_lose(log: Log, towers: TrainedTwoTower) -> None:
    cfg = tiny_retrieval(quotas=[0.5])
    arms = {"none": None, "anchor": uniform(log), "lm": oracle(log)}
    rows = evaluate_retrieval(log, towers, arms, cfg, users=np.arange(len(log.user_ids))).rows
    recall = {row.arm: row for row in rows if (row.metric, row.segment, row.k) == ("recall", "all", 20)}
    assert recall["lm - none"].ci_low > 0  # type: ignore[operator]
    assert recall["lm - anchor"].ci_low > 0  # type: ignore[operator]
    assert recall["lm - none"].value == pytest.approx(recall["lm"].value - recall["none"].value)
    assert {"coverage", "gini", "hits_found_alone", "ndcg", "mrr"} <= {row.metric for row in rows}


def test_the_quota_is_chosen_before_the_evaluated_span(log: Log, towers: TrainedTwoTower) -> None:
    """A forecast that is right on the evaluated span alone earns no quota by it."""
    cfg = tiny_retrieval()
    evaluation = evaluate_retrieval(log, towers, {"none": None, "lm": oracle(log)}, cfg, users=np.arange(60))
    swept = {point["quota"]: point["recall"] for point in evaluation.sweep}
    assert set(swept) == set(cfg.quotas)
    assert evaluation.quotas["none"] == 0.0
    recall = next(r for r in evaluation.rows if (r.metric, r.arm, r.segment, r.k) == ("recall", "lm", "all", 20))
    assert recall.value == pytest.approx(swept[evaluation.quotas["lm"]])
