"""The figures of the forecast against plain computations of the same thing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.errors import UserError
from priors.dataset import PromptDataset
from priors.evaluate import (
    ForecastEvaluation,
    constant_log_probs,
    evaluate_forecast,
    evaluated_rows,
    exact_log_prob,
    judge_interests,
)
from priors.fit import batches
from priors.forecast import TableForecast
from priors.generate import generate_priors
from priors.judge import CONTROL_ARMS, Measure, Segments, judge_lists, load_requests, save_requests
from priors.table import PriorTable
from tests.priors.conftest import Fitted

SEGMENTS = {"all", "new", "active", "sparse users", "middle users", "busy users"}


@pytest.fixture(scope="module")
def forecasts(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TableForecast]:
    directory = tmp_path_factory.mktemp("table")
    (directory / "out").mkdir()
    generate_priors(fitted.prior, fitted.log, fitted.cfg, out_dir=directory / "out", work_dir=directory / "work")
    table = PriorTable.load(directory / "out", fitted.log)
    return {arm: TableForecast(table, fitted.prior.base, arm=arm) for arm in ("anchor", "lm")}


@pytest.fixture(scope="module")
def evaluation(fitted: Fitted, forecasts: dict[str, TableForecast]) -> ForecastEvaluation:
    baselines = {"untuned": lambda user_B, as_of_B, _: untuned(fitted)(user_B, as_of_B)}
    return evaluate_forecast(fitted.prior, forecasts, fitted.log, fitted.cfg, baselines)


@pytest.mark.parametrize("carried", [False, True])
def test_baselines_are_no_fresher_than_the_forecast_and_know_the_same_plan(
    fitted: Fitted, forecasts: dict[str, TableForecast], carried: bool
) -> None:
    """A row that an incremental job carried over is as old as its decoding."""
    table = forecasts["lm"].table
    if carried:
        table = replace(table, decoded_R=table.period_R - table.user_R % 2)
        base = fitted.prior.base
        forecasts = {arm: TableForecast(table, base, arm=arm) for arm in ("anchor", "lm")}
    asked: list[np.ndarray] = []

    def watched(user_B: np.ndarray, as_of_B: np.ndarray, period_B: np.ndarray) -> np.ndarray:
        asked.append(np.stack([user_B, as_of_B, period_B]))
        return np.zeros((len(user_B), len(fitted.log.advertiser_ids)))

    evaluate_forecast(fitted.prior, forecasts, fitted.log, replace(fitted.cfg, controls=[]), {"watched": watched})
    user_B, as_of_B, period_B = np.concatenate(asked, axis=1)
    targets = evaluated_rows(fitted.log, fitted.cfg)
    np.testing.assert_array_equal(np.stack([user_B, period_B]), np.stack([targets.user, targets.period]))
    np.testing.assert_array_equal(as_of_B, table.decoded_R[table.find(user_B, period_B)])
    assert (as_of_B < period_B).any()


def test_a_panel_that_nobody_of_converts_is_told(fitted: Fitted) -> None:
    targets = fitted.log.advertiser_targets("validation")
    alone = (replace(fitted.cfg, panel=1, seed=seed) for seed in range(100))
    cfg = next(one for one in alone if not np.isin(targets.user, fitted.log.panel(1, one.seed)).any())
    with pytest.raises(UserError, match=r"(?s)prior\.panel=1.*validation span.*raise prior\.panel"):
        evaluated_rows(fitted.log, cfg)


def untuned(fitted: Fitted):  # type: ignore[no-untyped-def]
    return lambda user_B, period_B: np.log(fitted.prior.base.anchor.probabilities(user_B, period_B))


def test_every_arm_control_segment_and_difference_is_there(evaluation: ForecastEvaluation) -> None:
    found = {(row.metric, row.arm, row.segment): row for row in evaluation.rows}
    for segment in SEGMENTS:
        for arm in ("lm", "anchor", "popularity", "lm, other prompt", "lm, constant hidden"):
            assert ("nll", arm, segment) in found
        compared = ("lm - popularity", "lm - untuned") if segment in ("all", "new") else ()
        for arm in ("lm", "anchor", "popularity", "untuned", "lm - anchor", *compared):
            assert {("recall", arm, segment), ("ndcg", arm, segment), ("listed_nll", arm, segment)} <= set(found)
    for control in ("lm, other prompt", "lm, constant hidden"):
        assert {
            ("recall", control, "all"),
            ("recall", f"lm - {control}", "all"),
            ("nll", f"lm - {control}", "all"),
        } <= set(found)
    assert {segment for metric, arm, segment in found if (metric, arm) == ("ece", "lm")} == {"all", "new", "active"}
    assert found["nll", "anchor", "all"].value < found["nll", "popularity", "all"].value
    assert found["nll", "lm - anchor", "all"].value == pytest.approx(
        found["nll", "lm", "all"].value - found["nll", "anchor", "all"].value
    )
    assert set(evaluation.curves["reliability"]) == {"anchor", "lm"}
    for metric in ("interest_nll", "interest_recall"):
        arms = ("lm", "anchor", "popularity", "lm - anchor", "lm - popularity")
        assert {(metric, arm, "all") for arm in arms} == {key for key in found if key[0] == metric}
    assert found["interest_nll", "anchor", "all"].value < found["interest_nll", "popularity", "all"].value


def test_interests_are_judged_by_the_shares_of_conversions(fitted: Fitted, evaluation: ForecastEvaluation) -> None:
    """The anchor's, whose forecast needs no LM, request by request."""
    exact, interests = evaluation.requests[0], fitted.prior.interests
    assert interests is not None
    wanted = interests.space.targets_of(exact.user_R, exact.period_R)
    log_prob_RC = interests.base.log_probs(exact.user_R, exact.period_R)
    for row in range(0, len(wanted), 3):
        items, weight = wanted.of(row), wanted.weight[wanted.ptr[row] : wanted.ptr[row + 1]]
        nll = -(weight / weight.sum() * log_prob_RC[row, items]).sum()
        assert exact.values[Measure("interest_nll", "anchor")][row] == pytest.approx(nll)
        top = np.argsort(-log_prob_RC[row], kind="stable")[:5]
        recall = len(np.intersect1d(top, items)) / min(5, len(items))
        assert exact.values[Measure("interest_recall", "anchor", "all", 5)][row] == pytest.approx(recall)


def test_without_interests_none_are_judged(fitted: Fitted) -> None:
    targets = fitted.log.advertiser_targets("validation").select(np.arange(3))
    assert judge_interests(replace(fitted.prior, interests=None), targets, fitted.cfg) == {}


@pytest.mark.parametrize("controls", [[], ["constant_hidden"], ["other_prompt", "history_alone"]])
def test_the_controls_asked_for_are_computed(
    fitted: Fitted, forecasts: dict[str, TableForecast], evaluation: ForecastEvaluation, controls: list[str]
) -> None:
    cfg = replace(fitted.cfg, controls=controls)
    found = evaluate_forecast(fitted.prior, forecasts, fitted.log, cfg).requests[0].values
    named = {"lm, other prompt", "lm, constant hidden", "lm, history alone"}
    for metric in ("nll", "recall"):
        arms = {measure.arm for measure in found if measure.metric == metric}
        assert arms & named == {CONTROL_ARMS[name] for name in controls}
    for measure, value_R in found.items():  # the others' figures are what they were
        np.testing.assert_allclose(value_R, evaluation.requests[0].values[measure], rtol=1e-6)


def test_one_figure_of_each_kind(evaluation: ForecastEvaluation) -> None:
    keys = [(row.metric, row.arm, row.segment, row.k) for row in evaluation.rows]
    assert len(set(keys)) == len(keys)


def test_values_of_single_user_periods_are_kept(evaluation: ForecastEvaluation, tmp_path: Path) -> None:
    save_requests(evaluation.requests, tmp_path)
    for ours, theirs in zip(evaluation.requests, load_requests(tmp_path), strict=True):
        np.testing.assert_array_equal(ours.user_R, theirs.user_R)
        np.testing.assert_array_equal(ours.period_R, theirs.period_R)
        assert set(ours.values) == set(theirs.values)
        for measure, value_R in ours.values.items():
            np.testing.assert_allclose(value_R, theirs.values[measure], rtol=1e-6)
    with pytest.raises(UserError, match=r"run\.until=forecasts"):
        load_requests(tmp_path / "nowhere")


def test_segments_by_hand(fitted: Fitted) -> None:
    """Recall and likelihood of one forecaster in every segment, row by row."""
    log, targets = fitted.log, fitted.log.advertiser_targets("validation")
    lists, _, errors = judge_lists({"untuned": untuned(fitted)}, log, targets)
    segments, k, n = Segments(log, targets), 5, len(log.advertiser_ids)
    purchases = [log.is_purchase[log.history(u, p)].sum() for u, p in zip(targets.user, targets.period, strict=True)]
    low, high = np.quantile(purchases, [1 / 3, 2 / 3])
    for row in range(0, len(targets), 7):
        user, period, wanted = int(targets.user[row]), int(targets.period[row]), set(targets.of(row).tolist())
        q_A = fitted.prior.base.anchor.probabilities(np.array([user]), np.array([period]))[0]
        history = log.history(user, period)
        bought = set(log.events.advertiser[history][log.is_purchase[history]].tolist())
        visited = log.requests((period, period), np.array([user])).market
        active = {a for market in visited for a in log.active_advertisers(int(market), period).tolist()}
        for segment, (allowed, of_segment) in {
            "all": (set(range(n)), wanted),
            "new": (set(range(n)) - bought, wanted - bought),
            "active": (active, wanted if active else set()),
            "sparse users": (set(range(n)), wanted if purchases[row] <= low else set()),
            "busy users": (set(range(n)), wanted if purchases[row] > high else set()),
        }.items():
            top = sorted(allowed, key=lambda a: (-q_A[a], a))[:k]
            recall = len(of_segment & set(top)) / min(k, len(of_segment)) if of_segment else np.nan
            assert lists.values[Measure("recall", "untuned", segment, k)][row] == pytest.approx(recall, nan_ok=True)
            total = sum(q_A[a] for a in allowed)
            nll = [-np.log(q_A[a] / total) for a in of_segment & allowed]
            expected = np.mean(nll) if nll else np.nan
            assert lists.values[Measure("listed_nll", "untuned", segment)][row] == pytest.approx(expected, nan_ok=True)
    assert all(0 <= error.value < 5 for error in errors)
    assert segments.targets_of("all").ptr[-1] == len(targets.item)


def test_the_constant_control_is_exact_over_all_advertisers(fitted: Fitted) -> None:
    """The dense form, a bias a code, gives what teacher forcing of the same control gives."""
    targets, prior = fitted.log.advertiser_targets("prior_select"), fitted.prior
    tree = list(batches(PromptDataset(targets, prior.compiler), prior.collator, 16))
    forced_T = exact_log_prob(prior.model, tree, prior.calibration, constant_LH=prior.constant_LH)
    dense_RA = constant_log_probs(prior, targets.user, targets.period)
    np.testing.assert_allclose(np.exp(dense_RA).sum(1), 1.0, atol=1e-9)
    np.testing.assert_allclose(dense_RA[targets.row, targets.item], forced_T, atol=1e-4)
