"""The monitor on forecasts whose truth is known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from data.errors import LineageError
from data.log import Targets
from priors.anchor import Anchor, AnchorConstants, TunedAnchor
from priors.artifact import PriorModel
from priors.calibration import Calibration
from priors.config import DecodeConfig
from priors.forecast import TableForecast
from priors.metrics import FLOOR, reliability
from priors.monitor import PeriodDrift, calibration_curves, drift
from priors.prompt import Prompt
from priors.table import PriorTable, trie_version
from semantic_ids.trie import Trie
from tests.priors.conftest import tiny_prior_config
from tests.priors.worlds import N_PERIODS, brute_force, counts, world

N_USERS, N_ADVERTISERS = 800, 64
TRIE = Trie.from_codes(np.stack(np.unravel_index(np.arange(N_ADVERTISERS), (4, 4, 4)), axis=1), (4, 4, 4))


def forecasts(prob_UA: np.ndarray, top_k: int = 10) -> PriorTable:
    """A table of distributions over all advertisers, as of period 1."""
    order = np.argsort(-prob_UA, axis=1)[:, :top_k]
    log_prob = np.log(np.take_along_axis(prob_UA, order, 1))
    one = np.ones(len(prob_UA), np.int64)
    none = np.zeros((len(prob_UA), 1), np.int64)
    level1, nothing = np.log(TRIE.node_mass(prob_UA, 1)), np.full((len(prob_UA), 1), -np.inf)
    return PriorTable(
        np.arange(len(prob_UA)), one, one, order, log_prob, level1, none, none, nothing, trie_version(TRIE),
    )  # fmt: skip


def compared(
    table: PriorTable, targets: Targets, *, plan_PA: np.ndarray | None = None, trie: Trie = TRIE
) -> list[PeriodDrift]:
    """The table as it is served over popularity, with a plan of campaigns where one is given."""
    counted = replace(counts(N_ADVERTISERS, np.random.default_rng(0)), plan_PA=plan_PA)
    anchor = Anchor(counted, AnchorConstants(own_weight=0.0, plan_exponent=1.0))
    return drift(TableForecast(table, TunedAnchor.untuned(anchor, trie), arm="lm", keep=False), targets)


def happened(prob_UA: np.ndarray, rng: np.random.Generator, period: int = 1, n_targets: int = 2) -> Targets:
    items = np.concatenate([np.sort(rng.choice(N_ADVERTISERS, n_targets, replace=False, p=p)) for p in prob_UA])
    n = len(prob_UA)
    return Targets(
        np.arange(n, dtype=np.int32), np.full(n, period, np.int32), np.full(n, -1, np.int32),
        np.arange(n + 1) * n_targets, items.astype(np.int32), np.ones(n * n_targets, np.float32),
        np.zeros(n * n_targets, np.float32),
    )  # fmt: skip


def tastes(rng: np.random.Generator) -> np.ndarray:
    return rng.dirichlet(np.full(N_ADVERTISERS, 0.5), N_USERS)


@pytest.mark.parametrize("seed", range(5))
def test_what_happens_as_forecast_has_not_drifted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prob_UA = tastes(rng)
    (found,) = compared(forecasts(prob_UA), happened(prob_UA, rng, n_targets=1))
    assert found.requests == N_USERS
    assert not found.drifted
    assert found.predicted == pytest.approx(found.observed, abs=0.06)


def test_a_kind_of_advertiser_that_wins_favour_is_named() -> None:
    rng = np.random.default_rng(0)
    prob_UA = tastes(rng)
    favoured_UA = prob_UA * np.where(TRIE.path_AL[:, 0] == 2, 1.6, 1.0)
    favoured_UA /= favoured_UA.sum(1, keepdims=True)
    before, after = happened(prob_UA, rng, n_targets=1), happened(favoured_UA, rng, period=2, n_targets=1)
    both = {name: np.concatenate([value, getattr(after, name)]) for name, value in vars(before).items()}
    both["ptr"] = np.concatenate([before.ptr, after.ptr[1:] + before.ptr[-1]])
    targets = Targets(**both)
    first, second = compared(forecasts(prob_UA), targets)
    assert not first.drifted
    assert second.drifted
    assert second.code == 2
    assert second.code_observed > second.code_predicted


def test_lists_that_promise_too_much_are_noticed() -> None:
    rng = np.random.default_rng(0)
    prob_UA = tastes(rng)
    sharper_UA = prob_UA**1.5 / (prob_UA**1.5).sum(1, keepdims=True)
    (found,) = compared(forecasts(sharper_UA), happened(prob_UA, rng, n_targets=1))
    assert found.drifted
    assert found.predicted > found.observed


def test_few_requests_tell_nothing_and_users_without_a_forecast_are_left_out() -> None:
    rng = np.random.default_rng(0)
    prob_UA = tastes(rng)
    targets = happened(prob_UA, rng).select(np.arange(20))
    (found,) = compared(forecasts(prob_UA**3 / (prob_UA**3).sum(1, keepdims=True)), targets)
    assert (found.requests, found.drifted) == (20, False)
    (found,) = compared(forecasts(prob_UA[:5]), targets)
    assert found.requests == 5
    (found,) = compared(forecasts(prob_UA[:1]), targets)
    assert found.z == 0.0
    assert compared(forecasts(prob_UA[:0]), targets) == []


def test_another_trie_is_refused() -> None:
    other = Trie.from_codes(np.arange(N_ADVERTISERS)[:, None], (N_ADVERTISERS,))
    rng = np.random.default_rng(0)
    with pytest.raises(LineageError):
        compared(forecasts(tastes(rng)), happened(tastes(rng), rng), trie=other)


def test_another_plan_of_campaigns_is_no_drift() -> None:
    """What is served in the next period has its plan in the place of the one that the table was made with."""
    rng = np.random.default_rng(0)
    prob_UA, plan_PA = tastes(rng), np.zeros((N_PERIODS + 1, N_ADVERTISERS))
    plan_PA[2] = rng.normal(size=N_ADVERTISERS)
    planned_UA = prob_UA * np.exp(plan_PA[2])
    planned_UA /= planned_UA.sum(1, keepdims=True)
    table, targets = forecasts(prob_UA, top_k=N_ADVERTISERS), happened(planned_UA, rng, period=2, n_targets=1)
    (as_stored,) = compared(table, targets)
    assert as_stored.drifted
    (as_served,) = compared(table, targets, plan_PA=plan_PA)
    assert not as_served.drifted
    short = replace(table, advertiser_RK=table.advertiser_RK[:, :10], log_prob_RK=table.log_prob_RK[:, :10])
    (found,) = compared(short, targets, plan_PA=plan_PA)
    listed_UA = np.zeros(prob_UA.shape, bool)
    np.put_along_axis(listed_UA, short.advertiser_RK, True, axis=1)
    assert 0 < found.predicted < 1
    assert found.observed == pytest.approx(listed_UA[np.arange(N_USERS), targets.item].mean())


def test_the_curves_are_those_of_every_advertiser_before_and_after_the_last_calibration() -> None:
    """More prefixes than any beam, against brute force; what was said before has neither temperatures nor exponents."""
    rng, sizes = np.random.default_rng(0), (12, 12, 3)
    codes_AL = np.stack(np.unravel_index(np.sort(rng.choice(432, 300, replace=False)), sizes), axis=1)
    w = world(codes_AL, sizes, lengths=(5, 1, 12, 3))
    flat = replace(w.base, bias_LV=[0.2 * bias_V for bias_V in w.base.bias_LV])
    w = replace(w, base=flat, user_B=np.arange(1, 5), period_B=np.full(4, 4))
    with torch.no_grad():
        for weight in w.model.head.parameters():
            weight.mul_(0.3)
    raised_L = (0.5, 1.4, 0.8)
    before = replace(w, calibration=Calibration.identity(3))
    after = replace(w, base=w.base.raised(raised_L))
    prompts = dict(zip(w.user_B.tolist(), w.prompts, strict=True))

    def compile_(user: int, period: int) -> Prompt:
        assert period == 4
        return prompts[user]

    cfg = tiny_prior_config(decode=DecodeConfig(beam=2, top_k=3, batch_size=3))
    unused = {"constant_LH": None, "cfg": cfg, "base_reference": "", "fitted_ids": None}
    compiler = SimpleNamespace(compile=compile_)
    prior = PriorModel(
        model=w.model, base=after.base, calibration=w.calibration, compiler=cast(Any, compiler),
        anchor_calibration=raised_L, **cast(dict[str, Any], unused),
    )  # fmt: skip
    items = np.concatenate([np.sort(rng.choice(300, 3, replace=False)) for _ in range(4)])
    targets = Targets(
        w.user_B.astype(np.int32), w.period_B.astype(np.int32), np.full(4, -1, np.int32), np.arange(5) * 3,
        items.astype(np.int32), np.ones(12, np.float32), np.zeros(12, np.float32),
    )  # fmt: skip
    found = calibration_curves(prior, targets, cfg)
    for name, said in (("before", before), ("after", after)):
        log_prob_BA = brute_force(said)
        for log_prob_A, beam in zip(log_prob_BA, said.decoder(beam=64, top_k=300).decode(*said.asked), strict=True):
            assert np.exp(np.delete(log_prob_A, beam.advertiser_K)).max() > FLOOR, "a beam drops some"
        expected = reliability(log_prob_BA, targets)
        assert found[name].keys() == expected.keys()
        for side, values in expected.items():
            np.testing.assert_allclose(found[name][side], values, rtol=1e-3, atol=1e-6, err_msg=f"{name} {side}")
    older = calibration_curves(replace(prior, anchor_calibration=None), targets, cfg)
    assert older["after"] == found["after"]
    expected = reliability(brute_force(replace(after, calibration=before.calibration)), targets)
    np.testing.assert_allclose(older["before"]["observed"], expected["observed"], atol=1e-6)
