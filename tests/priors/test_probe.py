"""The head on hidden states of the frozen model."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.prior_lm import HeadConfig, PriorLM, PriorLMModule, row_nll, target_log_prob
from priors.config import ProbeConfig
from priors.dataset import PromptDataset
from priors.fit import batches
from priors.probe import LevelStates, fit_probe, read_states
from tests.priors.conftest import Fitted

N, H, V, PERIODS = 600, 6, 5, 4


@pytest.fixture
def model(fitted: Fitted) -> PriorLM:
    model = copy.deepcopy(fitted.prior.model)
    for weight in model.head.parameters():
        torch.nn.init.zeros_(weight)
    return model.eval()


def made_up(model: PriorLM, *, of_period: float, of_hidden: float, seed: int) -> list[LevelStates]:
    """Decisions whose codes depend on the period, and on the hidden state, by so much."""
    generator = torch.Generator().manual_seed(seed)
    width = model.id_rows.weight.shape[1]
    directions = torch.Generator().manual_seed(7)
    states = []
    for size in model.head.level_sizes:
        taste_HV = torch.randn(width, size, generator=directions)
        period_PV = torch.randn(PERIODS, size, generator=directions)
        hidden_NH = torch.randn(N, width, generator=generator)
        period_N = torch.randint(PERIODS, (N,), generator=generator)
        hidden_NH += 3 * of_period * period_N[:, None]  # a hidden state tells its period, as a prompt's month does
        scores_NV = of_period * period_PV[period_N] + of_hidden * (hidden_NH @ taste_HV) / width**0.5
        code_N = torch.multinomial(scores_NV.softmax(-1), 1, generator=generator)[:, 0]
        states.append(LevelStates(hidden_NH, torch.zeros(N, size), period_N, torch.arange(N), code_N, torch.ones(N), N))
    return states


def test_what_is_read_gives_the_same_likelihood_as_the_model(fitted: Fitted, model: PriorLM) -> None:
    for weight in model.head.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    dataset = PromptDataset(fitted.log.advertiser_targets("prior_select"), fitted.prior.compiler)
    rows = np.arange(min(12, len(dataset)))
    levels = read_states(model, dataset, fitted.prior.collator, rows=rows.tolist(), batch_size=5, adapted=True)
    summed = 0.0
    for level, states in enumerate(levels[:-1]):  # the last is of the interests
        every = torch.arange(len(states))
        log_probs_NV = states.scores(model.head, level, every, torch.device("cpu")).log_softmax(-1)
        summed -= float(log_probs_NV[states.decision_Y, states.code_Y] @ states.weight_Y) / states.n_prompts
    subset = PromptDataset(dataset.targets.select(rows), fitted.prior.compiler)
    with torch.inference_mode():
        nll = [
            row_nll(batch, target_log_prob(batch, model.log_probs(batch)))
            for batch in batches(subset, fitted.prior.collator, 5)
        ]
    assert summed == pytest.approx(float(torch.cat(nll).mean()), rel=1e-4)


def test_a_head_that_helps_nobody_stays_at_zero(model: PriorLM) -> None:
    train = made_up(model, of_period=0.0, of_hidden=0.0, seed=0)
    select = made_up(model, of_period=0.0, of_hidden=0.0, seed=1)
    flipped = [replace(states, code_Y=(states.base_NV.shape[1] - 1 - states.code_Y)) for states in select]
    report = fit_probe(model, train, flipped, ProbeConfig(prompts=N, epochs=2), HeadConfig(), seed=0)
    for level, epoch in enumerate(report["epoch"]):
        assert report["nll_after"][level] <= report["nll_before"][level]
        if epoch == 0:
            assert not model.head(select[level].state_RS, level).any()


def test_what_users_say_is_learned(model: PriorLM) -> None:
    train = made_up(model, of_period=0.0, of_hidden=2.0, seed=0)
    select = made_up(model, of_period=0.0, of_hidden=2.0, seed=1)
    head = HeadConfig(learning_rate=0.01)
    report = fit_probe(model, train, select, ProbeConfig(prompts=N, epochs=5), head, seed=0)
    gains = [before - after for before, after in zip(report["nll_before"], report["nll_after"], strict=True)]
    assert min(gains) > 0.05
    assert min(report["epoch"]) > 0


def test_a_period_is_not_learned_as_if_it_were_a_user(model: PriorLM) -> None:
    """In a new period, whose codes are others, a head without period effects does more harm."""
    train = made_up(model, of_period=2.0, of_hidden=0.0, seed=0)
    moved = {}
    for rate in (0.0, 0.1):
        copied = copy.deepcopy(model)
        head = HeadConfig(learning_rate=0.003, period_learning_rate=rate, dropout=0.0)
        fit_probe(copied, train, train, ProbeConfig(prompts=N, epochs=3), head, seed=0)
        scores_NV = copied.head(train[0].state_RS, 0).detach()
        moved[rate] = float((scores_NV - scores_NV.mean(0)).norm(dim=-1).mean())
    assert moved[0.1] < 0.8 * moved[0.0]


def test_period_effects_are_of_training_alone(fitted: Fitted) -> None:
    module = PriorLMModule(copy.deepcopy(fitted.prior.model), periods=60, period_learning_rate=0.1).eval()
    dataset = PromptDataset(fitted.log.advertiser_targets("prior_select"), fitted.prior.compiler)
    batch = next(iter(batches(dataset, fitted.prior.collator, 4)))
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    before = float(module.training_step(batch, 0))
    plain = module.model.log_probs(batch)
    for period_PV in module.period_PV:
        torch.nn.init.normal_(period_PV)
    assert float(module.training_step(batch, 0)) != before
    assert all(torch.equal(one, other) for one, other in zip(plain, module.model.log_probs(batch), strict=True))
