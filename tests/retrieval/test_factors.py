"""Both factors of a forecast's ads, on vectors one can follow by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.log import Log
from retrieval.channels import TowerScores
from retrieval.factors import KNOWN_ADS, KNOWN_ADVERTISERS, PRODUCT, RANKED, TOP, TOWER, Factors
from retrieval.retriever import Retriever
from tests.logs import tiny_log
from tests.ranking.common import KnownForecast, tastes
from tests.retrieval.common import retriever_of, tiny_retrieval, train_tiny

BUDGET = 5


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def retriever(log: Log, tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    cfg = tiny_retrieval()
    return retriever_of(log, train_tiny(log, cfg, tmp_path_factory.mktemp("towers"))[0], cfg)


@pytest.fixture(scope="module")
def factors(log: Log, retriever: Retriever) -> Factors:
    targets = log.ad_targets("validation")
    return Factors(log, retriever.scores, retriever.requests(targets), targets, BUDGET)


def best_advertisers(log: Log, factors: Factors, score_RA: list[np.ndarray]) -> list[float]:
    """Recall of a visit's advertisers, written out; every ad of the tiny log has a vector."""
    found = []
    for row, (request, score_A) in enumerate(zip(factors.requests, score_RA, strict=True)):
        active = np.unique(log.ad_advertiser[request.active])
        active = active[active >= 0]
        wanted = set(log.ad_advertiser[factors.targets.of(row)].tolist()) & set(active.tolist())
        listed = active[np.argsort(-score_A[active], kind="stable")[:TOP]]
        found.append(len(wanted & set(listed.tolist())) / min(len(wanted), TOP) if wanted else np.nan)
    return found


def test_advertisers_are_ranked_among_those_active_in_the_visit(log: Log, factors: Factors) -> None:
    forecast = tastes(log)
    values = factors.advertisers({"lm": forecast})
    assert list(values) == [TOWER, "lm"]
    by_forecast = [forecast.log_prob_UA[request.user] for request in factors.requests]
    with_vector = np.array([request.vector_D is not None for request in factors.requests])
    expected = np.where(with_vector, best_advertisers(log, factors, by_forecast), np.nan)
    np.testing.assert_allclose(values["lm"][RANKED, "all", TOP], expected)
    summed = []
    for request in factors.requests:
        score_A = np.full(len(log.advertiser_ids), -np.inf)
        owner = log.ad_advertiser[request.active]
        if request.vector_D is not None:
            np.logaddexp.at(score_A, owner[owner >= 0], factors.scores.of(request, request.active)[1][owner >= 0])
        summed.append(score_A)
    expected = np.where(with_vector, best_advertisers(log, factors, summed), np.nan)
    np.testing.assert_allclose(values[TOWER][RANKED, "all", TOP], expected)


def test_a_known_factor_never_costs_recall(log: Log, factors: Factors) -> None:
    values = factors.product("lm", tastes(log))
    recall = {name: np.nanmean(found[PRODUCT, "all", BUDGET]) for name, found in values.items()}
    assert set(recall) == {"lm", f"lm, {KNOWN_ADVERTISERS}", f"lm, {KNOWN_ADS}"}
    assert recall["lm"] < recall[f"lm, {KNOWN_ADVERTISERS}"] <= 1
    assert recall["lm"] < recall[f"lm, {KNOWN_ADS}"] <= 1


def test_knowing_advertisers_and_ads_alike_finds_every_ad_that_fits(log: Log, retriever: Retriever) -> None:
    """A forecast that names the advertisers converted with needs to know its ads alone."""
    targets = log.ad_targets("validation")
    targets = targets.select(np.array([0]))
    log_prob_UA = np.full((len(log.user_ids), len(log.advertiser_ids)), -50.0, np.float32)
    log_prob_UA[int(targets.user[0]), log.ad_advertiser[targets.of(0)]] = -1.0
    one = Factors(log, retriever.scores, retriever.requests(targets), targets, BUDGET)
    found = one.product("lm", KnownForecast(log_prob_UA))[f"lm, {KNOWN_ADS}"]
    assert found[PRODUCT, "all", BUDGET].tolist() == [1.0]


NOTHING_KNOWN: list[dict[str, object]] = [{"vector_D": None}, {"active": np.zeros(0, np.int32)}]


@pytest.mark.parametrize("change", NOTHING_KNOWN, ids=["no vector of the user", "no ad with a vector runs"])
def test_a_visit_that_nothing_is_known_of_is_passed_over(log: Log, factors: Factors, change: dict[str, object]) -> None:
    row = next(row for row, request in enumerate(factors.requests) if request.vector_D is not None)
    targets = factors.targets.select(np.array([row]))
    scores: TowerScores = factors.scores
    unknown = Factors(log, scores, [replace(factors.requests[row], **change)], targets, BUDGET)  # type: ignore[arg-type]
    measured = [*unknown.advertisers({"lm": tastes(log)}).values(), *unknown.product("lm", tastes(log)).values()]
    assert all(np.isnan(values_R).all() for values in measured for values_R in values.values())
