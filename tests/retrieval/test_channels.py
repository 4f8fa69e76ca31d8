"""Channels and the retriever, on vectors one can follow by hand and on the tiny log."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.special import log_softmax

from data.errors import UserError
from data.log import Log
from retrieval.blend import QuotaBlend
from retrieval.channels import (
    BUILDERS,
    AdvertiserChannel,
    Channel,
    ForecastChannel,
    ItemKnnChannel,
    OwnChannel,
    PopularityChannel,
    Request,
    SeededChannel,
    TowerScores,
    TwoTowerChannel,
)
from retrieval.config import CHANNELS, FORECAST, ITEM_KNN, OWN, POPULARITY, SEEDED, TWO_TOWER, RetrievalConfig
from retrieval.counts import Popularity, Purchases, sum_at
from retrieval.index import AdIndex, IndexConfig
from retrieval.neighbours import Neighbours
from retrieval.retriever import Retriever
from retrieval.tuning import Plan
from retrieval.two_tower import TrainedTwoTower
from tests.logs import tiny_log
from tests.priors.conftest import random_ids
from tests.ranking.common import KnownForecast
from tests.retrieval.common import retriever_of, tiny_retrieval, train_tiny

ANGLES = np.deg2rad(np.arange(12) * 10.0)
VECTORS = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1).astype(np.float32)
OWNER = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, -1], dtype=np.int32)
CODES = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
INDEX = AdIndex.build(VECTORS, np.arange(12, dtype=np.int32), IndexConfig())
SCORES = TowerScores(INDEX)
ALONG_X = np.array([1.0, 0.0], dtype=np.float32)


def request(
    log_prob: list[float] | None, active: list[int] | None = None, *, vector: bool = True, weight: float = 0.0
) -> Request:
    return Request(
        user=0,
        market=0,
        period=3,
        active=np.array(range(12) if active is None else active, dtype=np.int32),
        vector_D=ALONG_X if vector else None,
        log_prob_A=None if log_prob is None else np.array(log_prob, dtype=np.float32),
        prior_weight=weight,
    )


def test_two_tower_takes_the_nearest_active_ads() -> None:
    assert TwoTowerChannel(SCORES).candidates(request(None, [2, 5, 7, 11]), 3).tolist() == [2, 5, 7]


def counted(_: np.ndarray, market: int, period: int) -> np.ndarray:
    raise AssertionError(f"no popularity of market {market}, period {period} was asked for")


def test_towers_add_popularity_to_similarity_before_they_choose() -> None:
    popular = np.zeros(12, np.float32)
    popular[8] = 8.0
    scores = TowerScores(INDEX, temperature=0.5, weight=0.3, popularity=lambda ads, *_: popular[ads])
    found = TwoTowerChannel(scores).candidates(request(None), 12)
    expected = VECTORS @ ALONG_X / 0.5 + 0.3 * popular
    assert found.tolist() == np.argsort(-expected, kind="stable").tolist()
    # Among more ads than are scored one by one, the index brings the nearest, and popularity orders these.
    wide = AdIndex.build(VECTORS, np.arange(12, dtype=np.int32), IndexConfig(exact_up_to=5))
    near = TowerScores(wide, temperature=0.5, weight=0.3, popularity=lambda ads, *_: popular[ads])
    assert TwoTowerChannel(near).candidates(request(None), 2).tolist() == [0, 1]
    assert TwoTowerChannel(near).candidates(request(None), 3).tolist()[0] == 8
    unweighted = TowerScores(INDEX, weight=0.0, popularity=counted)
    assert TwoTowerChannel(unweighted).candidates(request(None), 2).tolist() == [0, 1]


def test_ads_removed_during_a_request_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    index = AdIndex.build(VECTORS, np.arange(12, dtype=np.int32), IndexConfig(exact_up_to=5))
    search = index.search

    def removed_meanwhile(*asked: Any, **how: Any) -> Any:
        found = search(*asked, **how)
        index.remove(np.array([0, 2], dtype=np.int32))
        return found

    monkeypatch.setattr(index, "search", removed_meanwhile)
    scores = TowerScores(index, weight=0.3, popularity=lambda ads, *_: np.zeros(len(ads), np.float32))
    assert TwoTowerChannel(scores).candidates(request(None), 3).tolist() == [1, 3, 4]


def test_the_papers_rule_takes_forecast_advertisers_ads_by_two_tower_score() -> None:
    channel = ForecastChannel(SCORES, OWNER, 2)
    assert channel.candidates(request([-5.0, -1.0, -0.5, -9.0]), 4).tolist() == [3, 4, 5, 6]
    # Advertiser 2 runs nothing here: the next one of the forecast takes its place.
    assert channel.candidates(request([-5.0, -1.0, -0.5, -9.0], [0, 4, 9]), 4).tolist() == [0, 4]


def test_the_soft_form_adds_an_ads_share_of_the_forecast() -> None:
    log_prob = [-3.0, -2.0, -0.1, -4.0]
    channel = ForecastChannel(SCORES, OWNER, 4)
    expected = VECTORS[:11] @ ALONG_X
    expected += 0.5 * (np.array(log_prob)[OWNER[:11]] - np.log(np.array([3, 3, 3, 2])[OWNER[:11]]))
    found = channel.candidates(request(log_prob, weight=0.5), 11)
    assert found.tolist() == np.argsort(-expected, kind="stable").tolist()
    assert found.tolist() != channel.candidates(request(log_prob), 11).tolist()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_ad_without_a_vector_is_passed_over(weight: float) -> None:
    known = np.arange(0, 12, 2, dtype=np.int32)
    index = AdIndex.build(VECTORS[known], known, IndexConfig())
    scores = TowerScores(index, weight=weight, popularity=lambda ads, *_: np.ones(len(ads), np.float32))
    for channel in (TwoTowerChannel(scores), ForecastChannel(scores, OWNER, 4)):
        found = channel.candidates(request([-1.0] * 4, weight=weight), 12)
        assert sorted(found.tolist()) == known.tolist()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_advertiser_tower_is_followed_by_the_forecasts_rule(weight: float) -> None:
    log_prob = [-3.0, -2.0, -0.1, -4.0]
    asked_for = []

    def tower(vector: np.ndarray, market: int, period: int) -> np.ndarray:
        asked_for.append((vector.tolist(), market, period))
        return np.array(log_prob, dtype=np.float32)

    rule = ForecastChannel(SCORES, OWNER, 2)
    channel = AdvertiserChannel(tower, rule, weight)
    misled = request([-0.1, -9.0, -9.0, -9.0], weight=9.0)  # the arm's own forecast is not read
    assert channel.candidates(misled, 9).tolist() == rule.candidates(request(log_prob, weight=weight), 9).tolist()
    assert asked_for == [([1.0, 0.0], 0, 3)]
    assert channel.candidates(request(None, vector=False), 9).tolist() == []


def test_seeds_give_their_neighbours_in_turn_without_duplicates() -> None:
    found = SeededChannel(INDEX, OWNER, 2).candidates(request([-9.0, -1.0, -9.5, -0.5]), 12).tolist()
    assert found[0] in (9, 10)  # the likeliest advertiser's own two ads lie equally near their mean
    assert found[1] == 4  # the middle one of the other's three
    assert len(found) == len(set(found)) == 12
    assert 11 in found  # an ad that no forecast advertiser owns


def test_seeds_look_among_the_advertisers_that_share_their_prefix() -> None:
    channel = SeededChannel(INDEX, OWNER, 1, codes_AL=CODES, prefix_levels=1)
    assert sorted(channel.candidates(request([-9.0, -9.0, -9.0, -0.5]), 12).tolist()) == [6, 7, 8, 9, 10]


def test_a_cold_advertiser_seeds_from_its_prefix() -> None:
    """None of its ads has a vector; the one that shares its first code lends its own."""
    warm = np.setdiff1d(np.arange(12), [9, 10]).astype(np.int32)
    index = AdIndex.build(VECTORS[warm], warm, IndexConfig())
    asked = request([-9.0, -9.0, -9.0, -0.5])
    assert SeededChannel(index, OWNER, 1, codes_AL=CODES).candidates(asked, 3).tolist()[0] == 7
    assert SeededChannel(index, OWNER, 1).candidates(asked, 3).tolist() == []


def bought_before(log: Log, user: int, period: int) -> np.ndarray:
    events = log.events.select(log.is_purchase & (log.events.ad >= 0))
    return events.ad[(events.user == user) & (events.period < period)]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("retrieval"))


def asked_of(log: Log, user: int, period: int, market: int = 0) -> Request:
    every = np.arange(len(log.ad_ids), dtype=np.int32)
    return Request(user=user, market=market, period=period, active=every, vector_D=None, log_prob_A=None)


def test_popularity_counts_conversions_before_the_period_only(log: Log) -> None:
    channel = PopularityChannel(Popularity(log, decay=1.0, market_weight=0.0))
    found = channel.candidates(asked_of(log, 0, 5), 10)
    before = log.events.select(log.is_label & (log.events.period < 5))
    counts = np.bincount(before.ad, minlength=len(log.ad_ids))
    assert counts[found].tolist() == np.sort(counts)[::-1][:10].tolist()


def test_popularity_decays_and_counts_its_market_more(log: Log) -> None:
    scores = Popularity(log, decay=0.5, market_weight=3.0)(np.arange(len(log.ad_ids), dtype=np.int32), 1, 6)
    before = log.events.select(log.is_label & (log.events.period < 6))
    weight = 0.5 ** (6.0 - before.period) * np.where(before.market == 1, 4.0, 1.0)
    np.testing.assert_allclose(scores, np.bincount(before.ad, weight, minlength=len(log.ad_ids)))


def test_own_takes_ads_bought_before_then_their_advertisers(log: Log) -> None:
    purchases, popularity = Purchases(log), Popularity(log, decay=1.0, market_weight=0.0)
    very = OwnChannel(purchases, popularity, log.ad_advertiser, decay=1.0, advertiser_weight=0.0)
    user, period = 4, 7
    bought = bought_before(log, user, period)
    found = very.candidates(asked_of(log, user, period), 200)
    counts = np.bincount(bought, minlength=len(log.ad_ids))
    assert set(found) == set(bought)
    assert (np.diff(counts[found]) <= 0).all()
    wide = OwnChannel(purchases, popularity, log.ad_advertiser, decay=1.0, advertiser_weight=0.3)
    found = wide.candidates(asked_of(log, user, period), 200)
    assert set(log.ad_advertiser[found]) == set(log.ad_advertiser[bought])
    assert set(found) > set(bought)


def test_neighbours_are_the_cosine_of_who_bought_both() -> None:
    dense = (np.random.default_rng(0).random((40, 15)) < 0.3).astype(np.float32)
    neighbours = Neighbours.of(csr_array(dense), neighbours=14, shrinkage=2.0)
    users = dense.sum(0)
    expected = dense.T @ dense / (np.sqrt(np.outer(users, users)) + 2.0)
    np.fill_diagonal(expected, 0.0)
    for ad in range(15):
        ads, scores = neighbours.scores(np.array([ad]), np.ones(1))
        np.testing.assert_allclose(scores, expected[ad, ads], rtol=1e-6)
        assert (np.diff(scores) <= 0).all()
        assert set(ads) == set(np.flatnonzero(expected[ad]))
    assert len(Neighbours.of(csr_array(dense), neighbours=3, shrinkage=2.0).ad) <= 45


def test_item_knn_adds_up_what_the_users_ads_are_near_to(log: Log) -> None:
    neighbours = Neighbours.fit(log, "prior_fit", neighbours=20, shrinkage=1.0, per_user=50)
    channel = ItemKnnChannel(neighbours, Purchases(log), decay=1.0, history=100)
    score = np.zeros(len(log.ad_ids))
    for ad in bought_before(log, 3, 8):
        rows = slice(neighbours.ptr[ad], neighbours.ptr[ad + 1])
        np.add.at(score, neighbours.ad[rows], neighbours.similarity[rows])
    found = channel.candidates(asked_of(log, 3, 8), 20)
    np.testing.assert_allclose(score[found], np.sort(score)[::-1][: len(found)])


def test_neighbours_read_their_span_only(log: Log) -> None:
    early = replace(log, events=log.events.select(log.events.period <= log.split.prior_fit[1]))
    ours, theirs = (Neighbours.fit(one, "prior_fit", neighbours=9, shrinkage=1.0, per_user=9) for one in (log, early))
    np.testing.assert_array_equal(ours.ad, theirs.ad)


def test_neighbours_are_counted_in_the_span_of_the_retriever(log: Log, towers: TrainedTwoTower) -> None:
    cfg = tiny_retrieval(channels=["item_knn"])
    later = Retriever(log, towers, random_ids(log).codes_AL, cfg, counted=(1, 9)).channels["item_knn"]
    counted = Neighbours.fit(
        log,
        (1, 9),
        neighbours=cfg.item_knn.neighbours,
        shrinkage=cfg.item_knn.shrinkage,
        per_user=cfg.item_knn.per_user,
    )
    assert isinstance(later, ItemKnnChannel)
    np.testing.assert_array_equal(later.neighbours.similarity, counted.similarity)


def test_sum_at_adds_what_is_active() -> None:
    active, items = np.array([2, 5, 9]), np.array([5, 1, 9, 5, 10])
    assert sum_at(active, items, np.array([1.0, 2.0, 3.0, 4.0, 5.0])).tolist() == [0.0, 5.0, 3.0]
    assert len(sum_at(np.zeros(0, int), items, np.ones(5))) == 0


NOTHING: list[tuple[Channel, Request]] = [
    (TwoTowerChannel(SCORES), request(None, vector=False)),
    (TwoTowerChannel(SCORES), request(None, [])),
    (ForecastChannel(SCORES, OWNER, 2), request(None)),
    (ForecastChannel(SCORES, OWNER, 2), request([-1.0] * 4, vector=False)),
    (ForecastChannel(SCORES, OWNER, 2), request([-1.0] * 4, [11])),
    (SeededChannel(INDEX, OWNER, 2), request(None)),
    (SeededChannel(INDEX, OWNER, 2), request([-1.0] * 4, [])),
]


@pytest.mark.parametrize(("channel", "asked"), NOTHING)
def test_a_channel_with_nothing_to_say_says_nothing(channel: Channel, asked: Request) -> None:
    assert channel.candidates(asked, 5).tolist() == []


@pytest.fixture(scope="module")
def towers(log: Log, tmp_path_factory: pytest.TempPathFactory) -> TrainedTwoTower:
    return train_tiny(log, tiny_retrieval(), tmp_path_factory.mktemp("towers"))[0]


def oracle(log: Log) -> KnownForecast:
    """Knows what each user converts with in the evaluated span."""
    targets = log.advertiser_targets(log.evaluate)
    log_prob = np.full((len(log.user_ids), len(log.advertiser_ids)), -8.0)
    log_prob[targets.user[targets.row], targets.item] = 0.0
    return KnownForecast(log_softmax(log_prob, axis=1).astype(np.float32))


PLANS = [
    Plan(QuotaBlend({TWO_TOWER: 0.5, OWN: 0.5})),
    Plan(QuotaBlend({TWO_TOWER: 0.2, ITEM_KNN: 0.2, FORECAST: 0.4, SEEDED: 0.2}), 0.6, 0.5),
    Plan(QuotaBlend({FORECAST: 1.0}), 1.0),
]


@pytest.mark.parametrize("plan", PLANS)
def test_equal_budget_under_every_plan_and_only_active_ads(log: Log, towers: TrainedTwoTower, plan: Plan) -> None:
    cfg = tiny_retrieval()
    retriever, targets = retriever_of(log, towers, cfg), log.ad_targets("validation")
    for row in range(0, len(targets), 9):
        user, market, period = (int(x[row]) for x in (targets.user, targets.market, targets.period))
        found = retriever.candidates(user, market, period, plan, oracle(log))
        assert len(found) == cfg.budget == len(set(found.ads.tolist()))
        assert np.isin(found.ads, log.active_ads(market, period).ad).all()
        assert {name for names in found.found_by for name in names} <= set(CHANNELS)
        assert all(source in names for source, names in zip(found.source, found.found_by, strict=True))


def test_a_user_without_history_or_forecast_is_answered_by_popularity(log: Log, towers: TrainedTwoTower) -> None:
    first = 1  # nobody has bought anything before period 1
    found = retriever_of(log, towers, tiny_retrieval()).candidates(0, 0, first, PLANS[1])
    assert len(found) > 0
    assert set(found.source) == {POPULARITY}


def test_a_market_without_active_ads_has_no_candidates(log: Log, towers: TrainedTwoTower) -> None:
    found = retriever_of(log, towers, tiny_retrieval()).candidates(0, -1, 8, PLANS[1], oracle(log))
    assert len(found) == 0
    assert found.source == ()


@pytest.mark.parametrize("channels", [["own"], ["popularity"], ["two_tower", "forecast"], ["item_knn", "seeded"]])
def test_the_configuration_names_the_channels(log: Log, towers: TrainedTwoTower, channels: list[str]) -> None:
    retriever = retriever_of(log, towers, tiny_retrieval(channels=channels))
    assert list(retriever.channels) == list(dict.fromkeys([*channels, POPULARITY]))


BAD_CHANNELS = [
    ({"channels": ["two_towers"]}, "correct two_towers"),
    ({"channels": ["own", "own"]}, "named twice"),
    ({"channels": ["forecast"]}, "follows no forecast"),
    ({"channels": ["advertiser"]}, "advertiser_weight=null"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CHANNELS)
def test_bad_channels_are_told(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RetrievalConfig(**changes)  # type: ignore[arg-type]


def test_every_channel_of_the_schema_can_be_built() -> None:
    assert set(BUILDERS) == set(CHANNELS)
