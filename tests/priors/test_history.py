"""The history vector: what it is the mean of, that it knows nothing of the future, and what the head makes of it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import UserError
from data.log import Log
from data.tables import KINDS
from models.prior_lm import HeadConfig, HistoryHead, IdHead, row_nll, target_log_prob, with_history
from priors.anchor import Counts
from priors.artifact import PriorModel
from priors.config import HistoryConfig, ProbeConfig
from priors.dataset import PromptDataset, TreeCollator, history_of
from priors.decode import TreeDecoder
from priors.evaluate import another_user, constant_log_probs, exact_log_prob
from priors.fit import _load_start, batches, fit_prior, sample_rows
from priors.history import Categories, HistoryVectors, fit_history, history_size
from priors.probe import LevelStates, fit_levels
from semantic_ids.advertiser_ids import AdvertiserIds
from tests.priors.conftest import Fitted, tiny_prior_config
from tests.priors.worlds import N_PERIODS, N_USERS, counts


def ids_of(n: int, rng: np.random.Generator, *, extra_level: bool = False) -> AdvertiserIds:
    sizes = (4, 5, n)
    codes_AL = np.stack([rng.integers(0, 4, n), rng.integers(0, 5, n), np.arange(n)], 1)
    codebooks = [rng.normal(size=(size, 3)).astype(np.float32) for size in sizes]
    if extra_level:
        codebooks[-1] = np.zeros_like(codebooks[-1])
    return AdvertiserIds(np.arange(n), codes_AL, codebooks, extra_level=extra_level)


# --- the vector --------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), extra=st.booleans(), decay=st.sampled_from([0.5, 0.97, 1.0]))
def test_it_is_the_mean_of_code_vectors_of_all_that_was_bought(seed: int, extra: bool, decay: float) -> None:
    rng = np.random.default_rng(seed)
    ids, of_log = ids_of(12, rng, extra_level=extra), counts(12, rng)
    decays = [decay, 0.8]
    vectors = HistoryVectors(of_log, ids, decays=decays)
    assert vectors.size == history_size(ids, decays) == 2 * (6 if extra else 9)
    user_B, period_B = rng.integers(0, N_USERS, 9), rng.integers(0, N_PERIODS + 2, 9)
    for user, period, ours in zip(user_B, period_B, vectors(user_B, period_B), strict=True):
        means = []
        for one in decays:
            weight_A = np.zeros(12)
            for row in range(of_log.user_ptr[user], of_log.user_ptr[user + 1]):
                if of_log.period_R[row] < period:
                    weight = of_log.count_R[row] * one ** (period - of_log.period_R[row])
                    weight_A[of_log.advertiser_R[row]] += weight
            summed = [
                np.log1p(weight_A) @ (book / np.linalg.norm(book, axis=1).mean())[ids.codes_AL[:, level]]
                for level, book in enumerate(ids.codebooks)
                if book.any()
            ]
            mean = np.concatenate(summed)
            means.append(mean / np.linalg.norm(mean) if weight_A.any() else mean)
        np.testing.assert_allclose(ours, np.concatenate(means), atol=1e-6)


def test_it_knows_nothing_of_its_period_or_later(fitted: Fitted) -> None:
    log, period = fitted.log, 6
    late = log.events.period >= period
    moved = np.where(late, (log.events.advertiser + 1) % len(log.advertiser_ids), log.events.advertiser)
    changed = replace(log, events=replace(log.events, advertiser=moved.astype(log.events.advertiser.dtype)))
    users = np.arange(len(log.user_ids))
    before, same = (
        HistoryVectors(Counts.of(one), fitted.ids, decays=[0.97])(users, np.full(len(users), period))
        for one in (log, changed)
    )
    np.testing.assert_array_equal(before, same)
    after = HistoryVectors(Counts.of(changed), fitted.ids, decays=[0.97])(users, np.full(len(users), period + 2))
    assert not np.allclose(before, after)


CATEGORIES = ("bread", "milk")
BOUGHT = Categories(bought=CATEGORIES)


def with_categories(log: Log, *, shift: int = 0, since: int = 0) -> Log:
    """Three of four purchases have one of two categories, from a period on another one."""
    events = log.events
    later = np.where(events.period >= since, shift, 0)
    category = np.where(events.request % 4 == 0, 0, 1 + (events.advertiser + later) % 2)
    return replace(log, events=replace(events, category=category.astype(np.int32)), category_names=("", *CATEGORIES))


def test_categories_stand_beside_the_mean(fitted: Fitted) -> None:
    log, users, period = with_categories(fitted.log), np.arange(len(fitted.log.user_ids)), 6
    decays, counts_ = [0.5, 1.0], Counts.of(fitted.log)
    whole = HistoryVectors(counts_, fitted.ids, decays=decays, log=log, categories=Categories(bought=("milk", "beer")))
    plain = HistoryVectors(counts_, fitted.ids, decays=decays)
    asked = users, np.full(len(users), period)
    vectors = whole(*asked)
    assert vectors.shape == (len(users), whole.size) == (len(users), plain.size + 4)
    np.testing.assert_array_equal(vectors[:, : plain.size], plain(*asked))
    milk = log.is_purchase & (log.events.category == 2) & (log.events.period < period)
    drinks = np.bincount(log.events.user[milk], minlength=len(users)) > 0
    np.testing.assert_array_equal(vectors[:, plain.size :: 2], np.repeat(drinks[:, None], 2, 1).astype(np.float32))
    assert not vectors[:, plain.size + 1 :: 2].any(), "nobody buys what the log does not know"


def test_of_two_categories_each_weighs_by_what_was_bought_of_it(fitted: Fitted) -> None:
    log, users, period, decay = with_categories(fitted.log), np.arange(len(fitted.log.user_ids)), 7, 0.8
    vectors = HistoryVectors(Counts.of(log), fitted.ids, decays=[decay], log=log, categories=BOUGHT)
    bought = log.is_purchase & (log.events.category > 0) & (log.events.period < period)
    cell = log.events.user[bought] * 2 + log.events.category[bought] - 1
    weight = np.bincount(cell, decay ** (period - log.events.period[bought]), minlength=2 * len(users))
    expected = np.log1p(weight.reshape(-1, 2))
    expected /= np.maximum(np.linalg.norm(expected, axis=1, keepdims=True), 1e-9)
    np.testing.assert_allclose(vectors(users, np.full(len(users), period))[:, -2:], expected, atol=1e-6)


def test_categories_know_nothing_of_the_period_or_later(fitted: Fitted) -> None:
    users, period = np.arange(len(fitted.log.user_ids)), 6
    read = [
        HistoryVectors(Counts.of(fitted.log), fitted.ids, decays=[0.97], log=log, categories=BOUGHT)
        for log in (with_categories(fitted.log), with_categories(fitted.log, shift=1, since=period))
    ]
    before, same = (vectors(users, np.full(len(users), period)) for vectors in read)
    np.testing.assert_array_equal(before, same)
    after, other = (vectors(users, np.full(len(users), period + 2)) for vectors in read)
    assert not np.allclose(after, other)


def with_browsing(log: Log, *, shift: int = 0, since: int = 0) -> Log:
    """The log, whose impressions are visits and searches by turns, each of one of two categories."""
    events = with_categories(log).events
    shown = events.kind == KINDS.index("impression")
    assert shown.any()
    kind = np.where(shown, np.array([KINDS.index("visit"), KINDS.index("search")])[events.request % 2], events.kind)
    later = np.where(events.period >= since, shift, 0)
    category = np.where(shown, 1 + (events.ad + later) % 2, events.category).astype(np.int32)
    events = replace(events, kind=kind.astype(events.kind.dtype), category=category)
    return replace(with_categories(log), events=events)


def test_browsing_stands_beside_purchases_and_tells_who_bought_nothing_yet(fitted: Fitted) -> None:
    log, users, period = with_browsing(fitted.log), np.arange(len(fitted.log.user_ids)), 6
    bought = log.is_purchase & (log.events.user % 2 == 0)  # every other user has bought nothing ever
    events = replace(log.events, advertiser=np.where(log.is_purchase & ~bought, -1, log.events.advertiser))
    log = replace(log, events=replace(events, category=np.where(log.is_purchase & ~bought, 0, events.category)))
    told = Categories(bought=CATEGORIES, browsed=("milk", "beer"))
    whole = HistoryVectors(Counts.of(log), fitted.ids, decays=[0.5, 1.0], log=log, categories=told)
    plain = HistoryVectors(Counts.of(log), fitted.ids, decays=[0.5, 1.0], log=log, categories=BOUGHT)
    vectors, without = (read(users, np.full(len(users), period)) for read in (whole, plain))
    assert vectors.shape == (len(users), whole.size) == (len(users), plain.size + 4)
    np.testing.assert_array_equal(vectors[:, : plain.size], without)
    browsed = np.isin(log.events.kind, [KINDS.index(kind) for kind in ("visit", "search")])
    milk = browsed & (log.events.category == 2) & (log.events.period < period)
    looked = np.bincount(log.events.user[milk], minlength=len(users)) > 0
    np.testing.assert_array_equal(vectors[:, plain.size :: 2], np.repeat(looked[:, None], 2, 1).astype(np.float32))
    assert not without[1::2].any()
    assert vectors[1::2][looked[1::2]].any(1).all()
    assert looked[1::2].any()


def test_browsing_knows_nothing_of_the_period_or_later(fitted: Fitted) -> None:
    users, period = np.arange(len(fitted.log.user_ids)), 6
    told = Categories(browsed=CATEGORIES)
    read = [
        HistoryVectors(Counts.of(fitted.log), fitted.ids, decays=[0.97], log=log, categories=told)
        for log in (with_browsing(fitted.log), with_browsing(fitted.log, shift=1, since=period))
    ]
    before, same = (vectors(users, np.full(len(users), period)) for vectors in read)
    np.testing.assert_array_equal(before, same)
    after, other = (vectors(users, np.full(len(users), period + 2)) for vectors in read)
    assert not np.allclose(after, other)


def test_what_is_told_are_categories_of_its_own_events_up_to_the_selection_span(fitted: Fitted) -> None:
    log, last = with_browsing(fitted.log), fitted.log.split.prior_select[1]
    asked = HistoryConfig(categories=True, browsing=True)
    assert Categories.of(log, asked) == Categories(bought=CATEGORIES, browsed=CATEGORIES)
    assert Categories.of(log, HistoryConfig()) == Categories()
    assert Categories.of(log, replace(asked, prompts=0)) == Categories()
    assert Categories.of(with_categories(fitted.log), asked) == BOUGHT, "impressions are not a user's own"
    # Bread is bought from the last period of selection on, or after it; milk is not looked at.
    for since, bought in ((last, CATEGORIES), (last + 1, ("milk",))):
        bread = log.is_purchase & (log.events.category == 1) & (log.events.period < since)
        milk = ~log.is_purchase & (log.events.category == 2)
        category = np.where(bread | milk, 0, log.events.category).astype(np.int32)
        late = replace(log, events=replace(log.events, category=category))
        assert Categories.of(late, asked) == Categories(bought=bought, browsed=("bread",))
    clicks = replace(log, label_kinds=(KINDS.index("search"), *log.label_kinds))
    visits = log.events.kind == KINDS.index("visit")
    assert set(Categories.of(clicks, asked).browsed) == {
        log.category_names[code] for code in np.unique(log.events.category[visits]) if code > 0
    }


def test_categories_without_a_log_are_told(fitted: Fitted) -> None:
    with pytest.raises(ValueError, match="2 categories to tell, and no log"):
        HistoryVectors(Counts.of(fitted.log), fitted.ids, decays=[0.97], categories=BOUGHT)


def test_another_users_prompt_brings_the_history_of_that_user(fitted: Fitted) -> None:
    targets = fitted.log.advertiser_targets("prior_select")
    other = another_user(targets)
    read = PromptDataset(targets, fitted.prior.compiler, prompt_of=other)
    vectors = fitted.prior.compiler.history
    assert vectors is not None
    for row in range(5):
        expected = vectors(other[row : row + 1], targets.period[row : row + 1])[0]
        np.testing.assert_array_equal(read[row].history_F, expected)


# --- the head ----------------------------------------------------------------------------------------------


def test_who_bought_nothing_yet_is_told_nothing_by_the_history() -> None:
    generator = torch.Generator().manual_seed(0)
    head = IdHead([torch.randn(5, 3, generator=generator)], 4, "tied+free", history_size=6)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    assert head.history is not None
    head.history.standardise_by([torch.randn(9, 6, generator=generator) + 1])
    hidden_NH = torch.randn(7, 4, generator=generator)
    without = head(hidden_NH, 0)
    torch.testing.assert_close(head(with_history(hidden_NH, torch.zeros(7, 6)), 0), without)
    assert not torch.allclose(head(with_history(hidden_NH, torch.ones(7, 6)), 0), without)


def test_decisions_that_share_a_row_learn_as_those_with_a_row_each() -> None:
    """What a history says is learned, whether its decisions share its vector or each has a copy."""
    generator = torch.Generator().manual_seed(0)
    n, size, taste = 200, 6, torch.randn(8, 6, generator=torch.Generator().manual_seed(1))

    def made(seed: int) -> tuple[LevelStates, LevelStates]:
        drawn = torch.Generator().manual_seed(seed)
        history_RF = torch.randn(n, 8, generator=drawn)
        row_N = torch.arange(n).repeat_interleave(2)
        code_N = torch.multinomial((2 * history_RF @ taste).softmax(-1)[row_N], 1, generator=drawn)[:, 0]
        rest: dict[str, Any] = {
            "base_NV": torch.zeros(2 * n, size), "period_N": torch.zeros(2 * n, dtype=torch.long),
            "decision_Y": torch.arange(2 * n), "code_Y": code_N, "weight_Y": torch.full((2 * n,), 0.5), "n_prompts": n,
        }  # fmt: skip
        return LevelStates(history_RF, row_N=row_N, **rest), LevelStates(history_RF[row_N], **rest)

    reports = []
    for shared, select in zip(made(2), made(3), strict=True):
        head = IdHead([torch.randn(size, 5, generator=generator.manual_seed(4))], 8)
        rates = HeadConfig(learning_rate=1e-2, period_learning_rate=0.0)
        reports.append(fit_levels([(head, [shared])], [[select]], ProbeConfig(epochs=4), rates, seed=0))
    assert reports[0]["nll_after"][0] < reports[0]["nll_before"][0] - 0.1
    for name, value in reports[0].items():
        assert value == pytest.approx(reports[1][name]), name


def collator_of_the_fit(prior: PriorModel, metrics: dict[str, Any]) -> TreeCollator:
    """Over the anchor as it was before its own calibration, which comes last."""
    base = prior.base.raised([1 / exponent for exponent in metrics["anchor_calibration"]])
    return prior.collator_of(base)


@pytest.mark.parametrize(("probe", "repeats"), [(0, False), (16, False), (0, True)])
def test_a_fit_starts_from_what_it_says_with_users_who_bought_nothing_yet(
    fitted: Fitted, tmp_path: Path, probe: int, repeats: bool
) -> None:
    """What is told of the start is the NLL of the forecaster as it is served."""
    log = fitted.log
    # A third of the users come in the last period to learn from, another third in the selection span.
    comes_U = np.array([0, log.split.prior_fit[1], log.split.prior_select[0]])[np.arange(len(log.user_ids)) % 3]
    early = log.events.period < comes_U[log.events.user]
    events = replace(log.events, advertiser=np.where(early, -1, log.events.advertiser).astype(np.int32))
    thin = replace(log, events=events)
    history = HistoryConfig(epochs=20, learning_rate=0.05, dropout=0.0, batch_size=32, repeats=repeats)
    cfg = tiny_prior_config(history=history, probe=ProbeConfig(prompts=probe, epochs=2))
    prior, metrics = fit_prior(thin, fitted.ids, cfg, work_dir=tmp_path)
    vectors = prior.compiler.history
    assert vectors is not None
    for targets in (thin.advertiser_targets(thin.split.prior_fit), thin.advertiser_targets("prior_select")):
        assert 0.05 < (~vectors(targets.user, targets.period).any(1)).mean() < 0.95
    start: Any = metrics["start"]
    model = prior.model
    _load_start(model, tmp_path)
    select = PromptDataset(
        sample_rows(thin.advertiser_targets("prior_select"), cfg.select_prompts, cfg.seed), prior.compiler
    )
    model.eval()
    with torch.inference_mode():
        nll = [
            row_nll(batch, target_log_prob(batch, model.log_probs(batch)))
            for batch in batches(select, collator_of_the_fit(prior, metrics), cfg.batch_size)
        ]
    assert start["select_nll"] == pytest.approx(float(torch.cat(nll).mean()), abs=1e-4)


@pytest.mark.parametrize("repeats", [False, True])
def test_it_is_fitted_first_and_then_left_as_it_is(fitted: Fitted, tmp_path: Path, repeats: bool) -> None:
    history = HistoryConfig(epochs=20, learning_rate=0.01, dropout=0.0, batch_size=32, repeats=repeats)
    cfg = tiny_prior_config(history=history)
    prior, metrics = fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path)
    start: Any = metrics["start"]
    assert sum(start["history"]["nll_after"]) < sum(start["history"]["nll_before"])
    assert start["select_nll"] < metrics["select_nll_anchor"]
    head = prior.model.head.history
    assert head is not None
    assert not any(weight.requires_grad for weight in head.parameters())
    # What it learned is what it learns by itself: the LM's training has not touched it.
    model = copy.deepcopy(prior.model)
    assert model.head.history is not None
    for weight in model.head.history.parameters():
        torch.nn.init.zeros_(weight).requires_grad_(True)
    targets = fitted.log.advertiser_targets(cfg.prompt_span(fitted.log.split.prior_fit))
    train = PromptDataset(targets, prior.compiler, max_targets=cfg.max_targets, seed=cfg.seed)
    select = PromptDataset(
        sample_rows(fitted.log.advertiser_targets("prior_select"), cfg.anchor.select_rows, cfg.seed), prior.compiler
    )
    fit_history(model, train, select, collator_of_the_fit(prior, metrics), cfg.history, cfg.head, seed=cfg.seed)
    for name, value in head.state_dict().items():
        torch.testing.assert_close(model.head.history.state_dict()[name], value)


# --- repeats -----------------------------------------------------------------------------------------------


def test_what_is_bought_again_is_learned_apart_from_what_is_new() -> None:
    """A taste that draws users to new things, and says nothing of those they know: two sets of weights tell it."""
    n, size, taste = 600, 6, 2 * torch.randn(8, 6, generator=torch.Generator().manual_seed(1))

    def made(seed: int) -> LevelStates:
        drawn = torch.Generator().manual_seed(seed)
        history_NF = torch.randn(n, 8, generator=drawn)
        repeat_NV = (torch.rand(n, size, generator=drawn) < 0.5).float()
        code_N = torch.multinomial(((1 - repeat_NV) * (history_NF @ taste)).softmax(-1), 1, generator=drawn)[:, 0]
        return LevelStates(
            history_NF, torch.zeros(n, size), torch.zeros(n, dtype=torch.long), torch.arange(n), code_N, torch.ones(n),
            n, repeat_NV=repeat_NV,
        )  # fmt: skip

    train, select, nll = made(2), made(3), {}
    for repeats in (False, True):
        head = HistoryHead([torch.randn(size, 6, generator=torch.Generator().manual_seed(4))], 8, "free", dropout=0.0,
                           repeats=repeats)  # fmt: skip
        rates = HeadConfig(learning_rate=3e-2, period_learning_rate=0.0)
        report = fit_levels([(head, [train])], [[select]], ProbeConfig(epochs=30), rates, seed=0)
        nll[repeats] = report["nll_after"][0]
    true_NV = ((1 - select.repeat_NV) * (select.state_RS @ taste)).log_softmax(-1)  # type: ignore[operator]
    least = -float(true_NV[torch.arange(n), select.code_Y].mean())
    assert least < nll[True] < least + 0.3 * (nll[False] - least)


def test_the_share_of_repeats_is_that_of_own_purchases_below_a_node(fitted: Fitted) -> None:
    base, log = fitted.prior.base, fitted.log
    targets = log.advertiser_targets("prior_select").select(np.arange(20))
    anchor, users, periods = base.anchor, targets.user, targets.period
    constants = anchor.constants
    own_BA = constants.own_weight * anchor.own(users, periods) * np.exp(anchor.plan(periods))
    whole_BA = anchor.probabilities(users, periods)
    bought_BA = own_BA > 0
    assert 0 < bought_BA.mean() < 1
    for depth, share_BN in enumerate(base.repeat_shares(users, periods), 1):
        assert ((share_BN >= 0) & (share_BN < 1)).all()
        np.testing.assert_array_equal(share_BN > 0, base.trie.node_mass(bought_BA.astype(float), depth) > 0)
    leaf_BA = share_BN[:, base.trie.advertiser_leaf]
    factor_P = own_BA[bought_BA] / (leaf_BA * whole_BA)[bought_BA]
    row = np.nonzero(bought_BA)[0]
    first = np.searchsorted(row, row)
    np.testing.assert_allclose(factor_P, factor_P[first], rtol=1e-9)  # what probabilities were divided by
    for share_BN in base.repeat_shares(users, np.zeros_like(periods)):  # before anything was bought
        assert not share_BN.any()


def test_a_forecaster_that_reads_repeats_apart_says_the_same_however_it_is_asked(
    fitted: Fitted, tmp_path: Path
) -> None:
    history = HistoryConfig(epochs=20, learning_rate=0.05, dropout=0.0, batch_size=32, repeats=True)
    cfg = tiny_prior_config(prompts=16, history=history)
    prior, _ = fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path / "work")
    head = prior.model.head.history
    assert head is not None
    assert head.repeat is not None
    assert not torch.equal(head.projections[0], head.repeat.projections[0])
    targets = fitted.log.advertiser_targets("prior_select").select(np.arange(9))
    asked = targets.user, targets.period
    tree = list(batches(PromptDataset(targets, prior.compiler), prior.collator, 4))
    forced_T = exact_log_prob(prior.model, tree, prior.calibration)
    prompts = [prior.compiler.compile(int(user), int(period)) for user, period in zip(*asked, strict=True)]
    decoder = TreeDecoder(prior.model, prior.base, prior.calibration, cfg.decode)
    wanted = np.split(targets.item, targets.ptr[1:-1])
    scored_T = np.concatenate([ours for ours, _ in decoder.score(prompts, *asked, wanted)])
    np.testing.assert_allclose(scored_T, forced_T, atol=1e-4)
    alone_BA = constant_log_probs(prior, *asked, own_history=True)
    forced_T = exact_log_prob(prior.model, tree, prior.calibration, constant_LH=prior.constant_hidden, own_history=True)
    np.testing.assert_allclose(alone_BA[targets.row, targets.item], forced_T, atol=1e-4)
    (tmp_path / "out").mkdir()
    prior.save(tmp_path / "out")
    loaded = PriorModel.load(tmp_path / "out", fitted.log, fitted.ids, cfg)
    np.testing.assert_allclose(constant_log_probs(loaded, *asked, own_history=True), alone_BA, atol=1e-5)


def test_an_artifact_from_before_repeats_were_told_apart_says_what_it_said(fitted: Fitted, tmp_path: Path) -> None:
    history = HistoryConfig(epochs=5, learning_rate=0.05, dropout=0.0, batch_size=32, repeats=False)
    cfg = tiny_prior_config(prompts=16, history=history)
    prior, _ = fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path / "work")
    (tmp_path / "out").mkdir()
    prior.save(tmp_path / "out")
    plain = json.loads((tmp_path / "out" / "prior.json").read_text())
    del plain["history"]["repeats"]
    (tmp_path / "out" / "prior.json").write_text(json.dumps(plain))
    loaded = PriorModel.load(tmp_path / "out", fitted.log, fitted.ids, cfg)
    assert loaded.model.head.history is not None
    assert not loaded.model.head.repeats
    asked = np.arange(9), np.full(9, 8)
    ours, theirs = (constant_log_probs(one, *asked, own_history=True) for one in (prior, loaded))
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


# --- controls ----------------------------------------------------------------------------------------------


def told(fitted: Fitted) -> PriorModel:
    """The fitted forecaster with weights of the history that say something."""
    model = copy.deepcopy(fitted.prior.model)
    assert model.head.history is not None
    for weight in model.head.history.parameters():
        torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(0))
    return replace(fitted.prior, model=model)


def test_a_forecaster_keeps_the_categories_it_was_fitted_on(fitted: Fitted, tmp_path: Path) -> None:
    log = with_browsing(fitted.log)
    told = HistoryConfig(prompts=200, epochs=2, categories=True, browsing=True)
    cfg = tiny_prior_config(prompts=16, select_prompts=8, history=told)
    prior, _ = fit_prior(log, fitted.ids, cfg, work_dir=tmp_path / "work")
    assert prior.model.head.history is not None
    (tmp_path / "out").mkdir()
    prior.save(tmp_path / "out")
    # In a later log there is another category, before the others.
    later = replace(log.events, category=np.where(log.events.category, log.events.category + 1, 0).astype(np.int32))
    grown = replace(log, events=later, category_names=("", "beer", *CATEGORIES))
    loaded = PriorModel.load(tmp_path / "out", grown, fitted.ids, cfg)
    users = np.arange(len(log.user_ids)), np.full(len(log.user_ids), 8)
    ours, theirs = (one.compiler.history for one in (prior, loaded))
    assert ours is not None
    assert theirs is not None
    assert theirs.categories == ours.categories == Categories(bought=CATEGORIES, browsed=CATEGORIES)
    np.testing.assert_array_equal(theirs(*users), ours(*users))
    found = [constant_log_probs(one, *users, own_history=True) for one in (prior, loaded)]
    np.testing.assert_allclose(found[1], found[0], atol=1e-5)


def test_the_control_by_history_alone_is_exact_and_not_the_constant_one(fitted: Fitted) -> None:
    prior = told(fitted)
    targets = fitted.log.advertiser_targets("prior_select").select(np.arange(9))
    alone_BA = constant_log_probs(prior, targets.user, targets.period, own_history=True)
    np.testing.assert_allclose(np.exp(alone_BA).sum(1), 1.0, atol=1e-5)
    tree = list(batches(PromptDataset(targets, prior.compiler), prior.collator, 4))
    forced_T = exact_log_prob(prior.model, tree, prior.calibration, constant_LH=prior.constant_hidden, own_history=True)
    np.testing.assert_allclose(alone_BA[targets.row, targets.item], forced_T, atol=1e-4)
    constant_BA = constant_log_probs(prior, targets.user, targets.period)
    forced_T = exact_log_prob(prior.model, tree, prior.calibration, constant_LH=prior.constant_LH)
    np.testing.assert_allclose(constant_BA[targets.row, targets.item], forced_T, atol=1e-4)
    assert np.abs(alone_BA - constant_BA).max() > 0.01


def test_prompts_of_which_some_have_no_vector_are_told(fitted: Fitted) -> None:
    compiled = [fitted.prior.compiler.compile(user, 6) for user in (0, 1)]
    with pytest.raises(ValueError, match="1 of 2 prompts with a history vector"):
        history_of([compiled[0], replace(compiled[1], history_F=None)])


def test_a_forecaster_without_it_has_no_such_control(fitted: Fitted, tmp_path: Path) -> None:
    cfg = tiny_prior_config(prompts=16, history=HistoryConfig(prompts=0))
    prior, metrics = fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path / "work")
    assert "history" not in metrics["start"]
    assert prior.compiler.compile(3, 9).history_F is None
    assert prior.model.head.history is None
    with pytest.raises(ValueError, match="without history vectors"):
        constant_log_probs(prior, np.arange(2), np.full(2, 9), own_history=True)
    prior.save(tmp_path)
    plain = json.loads((tmp_path / "prior.json").read_text())
    del plain["history"]  # an artifact from before there were any
    (tmp_path / "prior.json").write_text(json.dumps(plain))
    loaded = PriorModel.load(tmp_path, fitted.log, fitted.ids, fitted.cfg)
    assert loaded.model.head.history is None
    np.testing.assert_array_equal(loaded.compiler.compile(3, 9).token_ids, prior.compiler.compile(3, 9).token_ids)


# --- bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"prompts": -1}, r"history\.prompts=-1.*at least 0"),
        ({"epochs": 0}, r"history\.epochs=0.*at least 1"),
        ({"batch_size": 0}, r"history\.batch_size=0.*at least 1"),
        ({"decays": [0.97, 0.0]}, r"history\.decays=\[0\.97, 0\.0\].*above 0"),
        ({"decays": [1.5]}, r"history\.decays=\[1\.5\].*at most 1"),
        ({"decays": []}, r"history\.decays=\[\].*at least one"),
        ({"dropout": 1.0}, r"history\.dropout=1\.0.*below 1"),
        ({"epochs": 0, "decays": [2.0]}, r"(?s)history\.epochs=0.*history\.decays=\[2\.0\]"),
    ],
)
def test_settings_that_mean_nothing_are_told(changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=f"(?s){expected}"):
        HistoryConfig(**changes)
