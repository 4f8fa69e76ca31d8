"""The three arms at one budget: a forecast that is right gains, and what is chosen is chosen before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from data.log import Log
from retrieval.blend import QuotaBlend
from retrieval.config import BlendConfig
from retrieval.evaluate import Arms, evaluate_retrieval
from retrieval.tuning import STEPS, Plan, ascend, choose_plan, choose_weight, limits_of, tuning_span
from retrieval.two_tower import TrainedTwoTower
from tests.logs import tiny_log
from tests.ranking.common import KnownForecast
from tests.retrieval.common import retriever_of, tiny_retrieval, train_tiny

EVERYBODY = np.arange(60)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("retrieval"))


@pytest.fixture(scope="module")
def towers(log: Log, tmp_path_factory: pytest.TempPathFactory) -> TrainedTwoTower:
    return train_tiny(log, tiny_retrieval(), tmp_path_factory.mktemp("towers"))[0]


def knowing(log: Log, *spans: str) -> KnownForecast:
    """Knows what each user converts with in some spans."""
    log_prob = np.full((len(log.user_ids), len(log.advertiser_ids)), -8.0)
    for span in spans:
        targets = log.advertiser_targets(span)
        log_prob[targets.user[targets.row], targets.item] = 0.0
    return KnownForecast(log_softmax(log_prob, axis=1).astype(np.float32))


def uniform(log: Log) -> KnownForecast:
    n = len(log.advertiser_ids)
    return KnownForecast(np.full((len(log.user_ids), n), -np.log(n), dtype=np.float32))


@pytest.mark.parametrize("kind", ["quota", "rrf", "calibrated"])
def test_an_oracle_gains_over_every_blend(log: Log, towers: TrainedTwoTower, kind: str) -> None:
    cfg = tiny_retrieval(blend=BlendConfig(kind=kind))
    knows = knowing(log, "ranker_fit", "ranker_stop", "validation")
    arms = {"none": None, "anchor": uniform(log), "lm": knows}
    evaluation = evaluate_retrieval(retriever_of(log, towers, cfg), arms, users=EVERYBODY)
    recall = {row.arm: row for row in evaluation.rows if (row.metric, row.segment, row.k) == ("recall", "all", 20)}
    assert recall["lm - none"].ci_low > 0  # type: ignore[operator]
    assert recall["lm - anchor"].ci_low > 0  # type: ignore[operator]
    assert recall["lm - none"].value == pytest.approx(recall["lm"].value - recall["none"].value)
    metrics = {row.metric for row in evaluation.rows}
    assert {"coverage", "gini", "hits_found_alone", "ndcg", "mrr", "value_recall"} <= metrics
    assert {row.segment for row in evaluation.rows} >= {"all", "new", "sparse users", "middle users", "busy users"}
    assert all(Plan.of(plan.to_plain()) == plan for plan in evaluation.plans.values())


def test_the_quota_is_chosen_before_the_evaluated_span(log: Log, towers: TrainedTwoTower) -> None:
    """A forecast that is right on the evaluated span alone earns no quota by it."""
    cfg = tiny_retrieval()
    arms = {"none": None, "lm": knowing(log, "validation")}
    evaluation = evaluate_retrieval(retriever_of(log, towers, cfg), arms, users=EVERYBODY)
    swept = {point["quota"]: point["recall"] for point in evaluation.sweep}
    assert set(swept) == set(cfg.quotas)
    quota = evaluation.plans["lm"].quota
    assert quota is not None
    assert quota < max(swept, key=lambda point: swept[point])
    recall = next(r for r in evaluation.rows if (r.metric, r.arm, r.segment, r.k) == ("recall", "lm", "all", 20))
    assert recall.value == pytest.approx(swept[quota])


def test_where_no_quota_pays_the_forecasts_weight_is_still_the_best_one(log: Log) -> None:
    """Under a quota of 0 every weight finds the same; what the sweep shows hangs on it."""
    cfg = tiny_retrieval(channels=["own", "forecast"])
    targets = log.ad_targets("validation", EVERYBODY)
    right = [targets.of(row)[:20] for row in range(len(targets))]
    wrong = [
        np.setdiff1d(np.arange(len(log.ad_ids), dtype=np.int32), targets.of(row))[:20] for row in range(len(targets))
    ]
    nothing = np.zeros(0, np.int32)
    lists = {
        weight: [
            {"own": own, "forecast": found, "popularity": nothing} for own, found in zip(right, of_weight, strict=True)
        ]
        for weight, of_weight in ((0.0, wrong), (0.5, right))
    }
    limits = limits_of(cfg, log)
    plan = choose_plan(lists, targets, cfg, limits, base_shares={"own": 1.0}, forecast=True)
    assert (plan.quota, plan.prior_weight) == (0.0, 0.5)
    assert choose_weight(lists, "forecast", targets, limits) == 0.5
    assert choose_weight(lists, "own", targets, limits) == 0.0


def test_shares_are_tuned_on_from_a_channel_that_has_them_all() -> None:
    """Also where rounding leaves it a hair less than 1."""
    for own in (1.0, np.nextafter(1.0, 0.0), np.nextafter(1.0, 2.0)):
        tried: list[dict[str, float]] = []

        def value(shares: dict[str, float], tried: list[dict[str, float]] = tried) -> float:
            tried.append(shares)
            return QuotaBlend(shares).shares["own"]

        found = ascend({"two_tower": 0.0, "own": float(own), "popularity": 0.0}, value)
        assert found["own"] == pytest.approx(1.0)
        assert len(tried) > 2 * len(STEPS)


def test_a_cap_leaves_no_place_empty_while_an_advertiser_has_an_ad(log: Log, towers: TrainedTwoTower) -> None:
    cfg = tiny_retrieval(blend=BlendConfig(per_advertiser=1))
    arms = Arms(retriever_of(log, towers, cfg), {"none": None, "lm": knowing(log, "validation")}, EVERYBODY)
    for arm in ("none", "lm"):
        for request, one in zip(arms.evaluated.requests, arms.judged(arm, cfg).blended, strict=True):
            own = log.ad_advertiser[one.ads]
            active = np.unique(log.ad_advertiser[request.active])
            assert len(np.unique(own)) == len(own) == min(20, len(active))


def test_other_towers_may_answer_what_blends_are_chosen_on(log: Log, towers: TrainedTwoTower, tmp_path: Path) -> None:
    cfg, arms = tiny_retrieval(), {"none": None, "lm": knowing(log, "ranker_fit", "validation")}
    older = train_tiny(log, tiny_retrieval(seed=1), tmp_path)[0]
    measured, tuned = retriever_of(log, towers, cfg), retriever_of(log, older, cfg)
    chosen = evaluate_retrieval(tuned, arms, users=EVERYBODY)
    found = evaluate_retrieval(measured, arms, users=EVERYBODY, tuned=tuned)
    assert found.plans == chosen.plans
    expected = Arms(measured, arms, EVERYBODY).judged_by("lm", chosen.plans["lm"]).values["recall", "all", 20]
    recall = next(r for r in found.rows if (r.metric, r.arm, r.segment, r.k) == ("recall", "lm", "all", 20))
    assert recall.value == pytest.approx(np.nanmean(expected))
    assert found.rows != chosen.rows


def test_blends_are_chosen_on_the_last_periods_before_the_evaluated_ones(log: Log, tmp_path_factory: object) -> None:
    assert tuning_span(log) == (7, 9)
    opened = tiny_log(tmp_path_factory.mktemp("opened"), evaluate="test")  # type: ignore[attr-defined]
    assert tuning_span(opened) == (10, 11)


def test_every_arm_has_the_same_budget_and_no_forecast_means_no_forecast(log: Log, towers: TrainedTwoTower) -> None:
    evaluation = evaluate_retrieval(
        retriever_of(log, towers, tiny_retrieval(channels=["own", "popularity"])),
        {"none": None, "lm": knowing(log, "validation")},
        users=EVERYBODY,
    )
    differences = [row.value for row in evaluation.rows if row.arm == "lm - none" and not np.isnan(row.value)]
    assert differences
    assert not any(differences)
    assert evaluation.sweep == []
