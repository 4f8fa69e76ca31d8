"""A forecaster that is followed, recalibrated and refitted on the tiny log."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import UserError
from data.log import Log
from priors.anchor import mean_target_nll
from priors.artifact import PriorModel
from priors.config import AnchorConfig, HistoryConfig
from priors.drift import (
    ANCHOR,
    ANCHOR_REFIT,
    FORECAST,
    LM,
    POPULARITY,
    RECALIBRATED,
    REFIT,
    REWEIGHTED,
    follow,
    frozen,
    learned,
    measure,
    spans,
)
from priors.evaluate import constant_log_probs
from priors.judge import Scorer
from priors.metrics import expected_calibration_error, reliability
from priors.refit import recalibrate, refit
from tests.priors.conftest import Fitted, tiny_prior_config

BEFORE = 9
"""First period that is served with what is learned here."""
Fresh = tuple[dict[str, Scorer], dict[str, float], dict[str, Any]]


@pytest.fixture(scope="module")
def prior(fitted: Fitted) -> PriorModel:
    """The fitted forecaster, quick to fit once more, with a history that says something."""
    cfg = tiny_prior_config(
        anchor=AnchorConfig(own_weight=[0.2, 0.5], own_decay=[0.9], popularity_decay=[0.9, 1.0], smoothing=[0.3]),
        history=HistoryConfig(epochs=8, learning_rate=0.02, dropout=0.0, batch_size=32),
    )
    model = copy.deepcopy(fitted.prior.model)
    for weight in model.head.parameters():
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return replace(fitted.prior, model=model, cfg=cfg)


def moved(log: Log, period: int) -> Log:
    """The log with other advertisers in all events from a period on."""
    late = log.events.period >= period
    advertiser = np.where(late, (log.events.advertiser + 7) % len(log.advertiser_ids), log.events.advertiser)
    return replace(log, events=replace(log.events, advertiser=advertiser.astype(np.int32)))


def of_log(prior: PriorModel, log: Log, fitted: Fitted, directory: Path) -> PriorModel:
    """The same artifact, over another log."""
    directory.mkdir()
    prior.save(directory)
    return PriorModel.load(directory, log, fitted.ids, prior.cfg)


@pytest.fixture(scope="module")
def fresh(fitted: Fitted, prior: PriorModel) -> Fresh:
    return learned(prior, fitted.log, before=BEFORE)


def test_what_serves_a_period_knows_nothing_of_it_or_later(
    fitted: Fitted, prior: PriorModel, tmp_path: Path, fresh: Fresh
) -> None:
    """Neither what was learned nor what is counted; of the period before it both know."""
    users = np.arange(len(fitted.log.user_ids))
    asked, later = (users, np.full(len(users), BEFORE)), (users, np.full(len(users), BEFORE + 1))
    expected = frozen(prior) | fresh[0]
    for first_changed in (BEFORE, BEFORE - 1):
        changed = moved(fitted.log, first_changed)
        same = of_log(prior, changed, fitted, tmp_path / str(first_changed))
        arms, _, chosen = learned(same, changed, before=BEFORE)
        for arm, score in (frozen(same) | arms).items():
            if first_changed == BEFORE:
                np.testing.assert_array_equal(score(*asked), expected[arm](*asked), err_msg=arm)
                assert not np.allclose(score(*later), expected[arm](*later)), arm
            else:
                assert not np.allclose(score(*asked), expected[arm](*asked)), arm
        assert (chosen == fresh[2]) is (first_changed == BEFORE)


def test_fresh_arms_are_distributions_and_the_frozen_forecaster_stays(
    fitted: Fitted, prior: PriorModel, fresh: Fresh
) -> None:
    users, served = np.arange(20), np.full(20, BEFORE)
    for arm, score in fresh[0].items():
        np.testing.assert_allclose(np.exp(score(users, served)).sum(1), 1.0, atol=1e-5, err_msg=arm)
    assert set(fresh[1]) == set(fresh[2]) == {RECALIBRATED, REFIT}
    before = {name: value.clone() for name, value in prior.model.state_dict().items()}
    refit(prior, fitted.log, before=BEFORE)
    for name, value in prior.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert prior.model.head.history is not None
    assert not any(weight.requires_grad for weight in prior.model.head.history.parameters())


def test_a_refit_at_the_end_of_the_selection_span_is_the_fit(fitted: Fitted, prior: PriorModel) -> None:
    """The same spans, user-periods and seeds give the same anchor."""
    again = refit(replace(prior, cfg=fitted.cfg), fitted.log, before=fitted.log.split.prior_select[1] + 1)
    assert again.base.anchor.constants == fitted.prior.base.anchor.constants
    for ours, theirs in zip(again.base.bias_LV, fitted.prior.base.bias_LV, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_allclose(again.base.exponent_L, fitted.prior.base.exponent_L, atol=1e-4)


def test_a_forecast_that_is_too_sharp_is_mended(fitted: Fitted, prior: PriorModel) -> None:
    log = fitted.log
    sharp = replace(prior, base=replace(prior.base, exponent_L=3 * prior.base.exponent_L))
    targets = log.advertiser_targets((6, BEFORE - 1))

    def nll(log_prob_BA: np.ndarray) -> float:
        return float(mean_target_nll(log_prob_BA[targets.row, targets.item], targets).mean())

    asked = targets.user, targets.period
    as_it_is = nll(constant_log_probs(sharp, *asked, own_history=True))
    mended = recalibrate(sharp, log, before=BEFORE)
    reweighted = nll(constant_log_probs(mended.prior, *asked, own_history=True))
    assert reweighted < as_it_is - 0.3
    assert nll(mended.log_probs(*asked)) < reweighted + 0.01


def test_figures_are_those_of_the_measures(fitted: Fitted, prior: PriorModel) -> None:
    targets, arms = fitted.log.advertiser_targets((7, 9)), frozen(prior)
    rows = {(row.metric, row.arm): row for row in measure(arms, targets)}
    for arm, score in arms.items():
        log_prob_RA = np.asarray(score(targets.user, targets.period), dtype=np.float64)
        expected = expected_calibration_error(reliability(log_prob_RA, targets))
        assert rows["ece", arm].value == pytest.approx(expected)
        nll_R = mean_target_nll(log_prob_RA[targets.row, targets.item], targets)
        assert rows["nll", arm].value == pytest.approx(nll_R.mean())
    for metric in ("nll", "ece"):
        change = rows[metric, f"{FORECAST} - {ANCHOR}"]
        assert change.value == pytest.approx(rows[metric, FORECAST].value - rows[metric, ANCHOR].value)
        assert change.ci_low is not None
        assert change.ci_high is not None
        assert change.ci_low < change.value < change.ci_high


def test_it_is_followed_to_the_end_of_validation(fitted: Fitted, prior: PriorModel) -> None:
    assert spans(fitted.log, 2) == [(6, 6), (7, 8), (9, 10), (11, 11)]
    steps = follow(prior, fitted.log, every=3, lm_prompts=8)
    assert [step.periods for step in steps] == [(6, 6), (7, 9), (10, 11)]
    still = {POPULARITY, ANCHOR, FORECAST, LM}
    for number, step in enumerate(steps):
        arms = {row.arm for row in step.rows if " - " not in row.arm}
        assert arms == (still | {REWEIGHTED, RECALIBRATED, ANCHOR_REFIT, REFIT} if number else still)
        assert bool(step.seconds) == bool(number)
        assert {row.n for row in step.rows if row.arm == LM} == {8}


@pytest.mark.parametrize(
    ("every", "lm_prompts", "change", "message"),
    [
        (0, 0, {}, "--every 0"),
        (4, -1, {}, "(?s)--lm -1.*at least 0"),
        (0, -2, {}, "(?s)--every 0.*--lm -2"),
        (4, 0, {"history": None}, "without history vectors"),
        (4, 5, {"head": 0.0}, "--lm 5"),
    ],
)
def test_bad_requests_are_told(
    fitted: Fitted, prior: PriorModel, every: int, lm_prompts: int, change: dict[str, Any], message: str
) -> None:
    if "history" in change:
        compiler = copy.copy(prior.compiler)
        compiler.history = None
        prior = replace(prior, compiler=compiler)
    if "head" in change:
        model = copy.deepcopy(prior.model)
        for weight in model.head.projections:
            torch.nn.init.zeros_(weight)
        prior = replace(prior, model=model)
    with pytest.raises(UserError, match=message):
        follow(prior, fitted.log, every=every, lm_prompts=lm_prompts)
