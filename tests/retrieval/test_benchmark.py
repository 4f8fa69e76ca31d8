"""The benchmark's studies on the tiny log: same budget, differences that add up, and every step timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from data.log import Log
from models.two_tower import TwoTowerConfig
from retrieval import evaluate
from retrieval.benchmark import ADVERTISERS, ALL, ALONE, BLEND, PRODUCT, WITHOUT, RetrievalBenchmark, bench_retrieval
from retrieval.blend import QuotaBlend
from retrieval.channels import Request
from retrieval.config import CHANNELS, POPULARITY, AdvertiserChannelConfig, BlendConfig, ForecastChannelConfig
from retrieval.retriever import Retriever
from retrieval.tuning import mean_recall
from retrieval.two_tower import TrainedTwoTower
from tests.logs import tiny_log
from tests.ranking.common import tastes
from tests.retrieval.common import retriever_of, tiny_retrieval, train_tiny


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("log"))


EVERYTHING = tiny_retrieval(
    model=TwoTowerConfig(dim=16, hidden=32, advertiser_weight=0.5),
    advertiser=AdvertiserChannelConfig(advertisers=8),
    channels=list(CHANNELS),
)


@pytest.fixture(scope="module")
def towers(log: Log, tmp_path_factory: pytest.TempPathFactory) -> TrainedTwoTower:
    return train_tiny(log, EVERYTHING, tmp_path_factory.mktemp("towers"))[0]


@pytest.fixture(scope="module")
def found(log: Log, towers: TrainedTwoTower) -> RetrievalBenchmark:
    arms = {"none": None, "lm": tastes(log)}
    return bench_retrieval(retriever_of(log, towers, EVERYTHING), arms, users=np.arange(30))


def recall(found: RetrievalBenchmark, section: str, k: int = 20) -> dict[str, float]:
    rows = [row for row in found.rows if (row.section, row.metric, row.segment, row.k) == (section, "recall", "all", k)]
    return {row.arm: row.value for row in rows}


def test_every_channel_stands_alone_and_is_left_out(found: RetrievalBenchmark) -> None:
    alone, without = recall(found, ALONE), recall(found, WITHOUT)
    assert alone.pop("forecast - advertiser") == pytest.approx(alone["forecast"] - alone["advertiser"])
    for study in (alone, without):
        assert set(study) == {ALL, *CHANNELS, *(f"{ALL} - {name}" for name in CHANNELS)}
        for name in CHANNELS:
            assert study[f"{ALL} - {name}"] == pytest.approx(study[ALL] - study[name])
    assert alone[ALL] == without[ALL] == recall(found, "retrieval")["lm"]


def test_rivals_stand_alone_under_the_weights_that_find_most(
    found: RetrievalBenchmark, log: Log, towers: TrainedTwoTower
) -> None:
    assert {"lm, forecast alone", "lm, advertiser alone"} <= set(found.plans)
    weights = [0.0, 0.3, 3.0]
    cfg = replace(
        EVERYTHING,
        forecast=ForecastChannelConfig(advertisers=30, prior_weights=weights, seed_advertisers=4),
        advertiser=AdvertiserChannelConfig(advertisers=30),
    )
    retriever = retriever_of(log, towers, cfg)
    arms = evaluate.Arms(retriever, {"lm": tastes(log)}, np.arange(30))
    for name in ("forecast", "advertiser"):
        plan, blend = arms.alone("lm", name).plan, QuotaBlend({name: 1.0})
        assert plan.blend == blend
        recalls = {
            weight: mean_recall(lists, arms.tuning.targets, blend, retriever.limits)
            for weight, lists in arms.tuning.alone_by_weight("lm", name, weights).items()
        }
        assert recalls[plan.prior_weight] == max(recalls.values()) > min(recalls.values())


def test_every_blend_is_compared_with_the_configured(found: RetrievalBenchmark) -> None:
    blends = recall(found, BLEND)
    assert {"quota", "rrf", "calibrated", "rrf - quota", "calibrated - quota"} == set(blends)
    assert blends["quota"] == recall(found, "retrieval")["lm"]


def test_every_step_is_timed(found: RetrievalBenchmark) -> None:
    assert set(found.latency) == {"user vector", "forecast", *CHANNELS, "blend", "request"}
    for figures in found.latency.values():
        assert 0 < figures["p50"] <= figures["p95"] <= figures["p99"]
    assert found.latency["request"]["per_second"] > 0


def test_plans_and_the_sweep_are_there(found: RetrievalBenchmark) -> None:
    assert {"none", "lm", "lm, without own", "lm, calibrated"} <= set(found.plans)
    assert [point["quota"] for point in found.sweep] == tiny_retrieval().quotas
    assert found.facts["requests"] > 0
    assert found.facts["tuned_on"] == [7, 9]


def test_parts_are_measured_alone(log: Log, towers: TrainedTwoTower) -> None:
    retriever, arms = retriever_of(log, towers, EVERYTHING), {"none": None, "lm": tastes(log)}
    found = bench_retrieval(retriever, arms, users=np.arange(30), parts=["factors"])
    assert {row.section for row in found.rows} == {ADVERTISERS, PRODUCT}
    assert {row.arm for row in found.rows} >= {"two_tower", "lm", "lm - two_tower"}
    assert found.latency == found.plans == {}


def test_the_others_are_tuned_without_a_channel_that_had_all_shares(log: Log, towers: TrainedTwoTower) -> None:
    cfg = tiny_retrieval(channels=["two_tower", "own"], blend=BlendConfig(shares={"two_tower": 1.0, "own": 0.0}))
    found = bench_retrieval(retriever_of(log, towers, cfg), {"none": None}, users=np.arange(20), parts=["channels"])
    assert found.plans["none, without two_tower"]["blend"]["shares"] == {"own": 1.0}
    assert set(recall(found, WITHOUT)) >= {ALL, "two_tower", "own"}


def test_an_arm_is_planned_and_judged_once(log: Log, towers: TrainedTwoTower, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms, blends and channels look at the head arm; steady channels answer once, whatever the prior weight."""
    planned, asked = [], []
    choose, find = evaluate.choose_plan, Retriever.lists

    def chooses(*arguments: object, **named: object) -> object:
        planned.append(arguments)
        return choose(*arguments, **named)  # type: ignore[arg-type]

    def finds(self: Retriever, requests: Sequence[Request], names: Sequence[str] | None = None) -> object:
        asked.append((len(requests), names))
        return find(self, requests, names)

    monkeypatch.setattr(evaluate, "choose_plan", chooses)
    monkeypatch.setattr(Retriever, "lists", finds)
    cfg = tiny_retrieval(channels=["own", "forecast", "seeded"])
    arms = evaluate.Arms(retriever_of(log, towers, cfg), {"none": None, "lm": tastes(log)}, np.arange(30))
    for _ in range(3):
        arms.compare()
    assert len(planned) == 2
    tuned = len(arms.tuning)
    assert asked.count((tuned, ["seeded"])) == 1
    assert asked.count((tuned, ["forecast"])) == len(cfg.forecast.prior_weights)


def test_without_a_forecast_there_is_one_arm(log: Log, towers: TrainedTwoTower) -> None:
    retriever = retriever_of(log, towers, tiny_retrieval(channels=["own", POPULARITY]))
    found = bench_retrieval(retriever, {"none": None}, users=np.arange(20))
    assert set(recall(found, "retrieval")) == {"none"}
    assert set(recall(found, WITHOUT)) == {ALL, "own", POPULARITY, f"{ALL} - own", f"{ALL} - {POPULARITY}"}
    assert found.sweep == []
