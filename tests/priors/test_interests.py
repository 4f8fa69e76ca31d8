"""Interests: what is counted and asked, a distribution whatever stores it, and forecasters without any."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from data.errors import UserError
from data.log import Log, load_log
from models.prior_lm import PriorLMModule, mean_nll, target_log_prob, with_history
from models.training import TrainerConfig
from priors.anchor import Anchor, AnchorConstants
from priors.artifact import PriorModel, load_interests
from priors.config import InterestConfig, ProbeConfig
from priors.dataset import PromptDataset
from priors.decode import TreeDecoder
from priors.fit import batches, fit_prior
from priors.forecast import TableForecast
from priors.generate import generate_priors
from priors.interests import (
    TOP_INTERESTS,
    Interests,
    InterestSpace,
    fit_interest_anchor,
    interest_column,
    shares,
)
from priors.lookup import PriorLookup
from priors.table import PriorTable, read_frame, shard_files
from tests.logs import tiny_config, tiny_log
from tests.priors.conftest import Fitted, tiny_prior_config

BRIEF = TrainerConfig(max_epochs=1, patience=None, progress_bar=False)


@pytest.fixture(scope="module")
def space(fitted: Fitted) -> InterestSpace:
    return InterestSpace.of(fitted.log, "category")


@pytest.fixture(scope="module")
def interests(fitted: Fitted) -> Interests:
    assert fitted.prior.interests is not None
    return fitted.prior.interests


def without_columns(log: Log) -> Log:
    return replace(log, ad_features={}, ad_vocabularies={})


def plain_model(fitted: Fitted, directory: Path, **interests: object) -> tuple[PriorModel, dict[str, object]]:
    cfg = tiny_prior_config(prompts=16, trainer=BRIEF, interests=InterestConfig(**interests))  # type: ignore[arg-type]
    return fit_prior(fitted.log, fitted.ids, cfg, work_dir=directory)


# --- which column ------------------------------------------------------------------------------------------


def test_the_usual_column_is_taken_where_the_data_has_it(fitted: Fitted) -> None:
    assert interest_column(fitted.log, InterestConfig()) == "category"
    assert interest_column(fitted.log, InterestConfig(column="category")) == "category"
    assert interest_column(fitted.log, InterestConfig(column=None)) is None
    assert interest_column(without_columns(fitted.log), InterestConfig()) is None
    alone = replace(fitted.log, ad_vocabularies={"category": ("", "bread")})
    assert interest_column(alone, InterestConfig()) is None  # one category: nothing to forecast


@pytest.mark.parametrize(("column", "told"), [("colour", "category"), ("text", "category"), ("", "category")])
def test_a_column_that_is_not_open_is_told_with_those_that_are(fitted: Fitted, column: str, told: str) -> None:
    with pytest.raises(UserError, match=rf"prior\.interests\.column={column}") as error:
        interest_column(fitted.log, InterestConfig(column=column))
    assert told in str(error.value)
    with pytest.raises(UserError, match="there is none"):
        interest_column(without_columns(fitted.log), InterestConfig(column=column))


@pytest.mark.parametrize("weight", [-0.1, float("nan")])
def test_a_weight_is_not_below_zero(weight: float) -> None:
    with pytest.raises(UserError, match=r"prior\.interests\.weight"):
        InterestConfig(weight=weight)


# --- what is counted and asked -----------------------------------------------------------------------------


def test_targets_are_the_categories_of_the_conversions_by_share(fitted: Fitted, space: InterestSpace) -> None:
    log, events = fitted.log, fitted.log.events
    category_I = log.ad_features["category"] - 1
    asked = [(user, period) for user in (0, 3, 17) for period in (0, 2, 6, 9, 99)]
    found = space.targets_of(*np.array(asked).T)
    share_T, n_empty = shares(found), 0
    for row, (user, period) in enumerate(asked):
        own = log.is_label & (events.user == user) & (events.period == period)
        counts = np.bincount(category_I[events.ad[own]], minlength=len(space))
        part = slice(found.ptr[row], found.ptr[row + 1])
        assert found.item[part].tolist() == np.flatnonzero(counts).tolist()
        n_empty += part.start == part.stop
        if counts.any():
            np.testing.assert_allclose(share_T[part], counts[counts > 0] / counts.sum(), rtol=1e-6)
    assert 0 < n_empty < len(asked)


def test_counts_are_of_categories(fitted: Fitted, space: InterestSpace) -> None:
    log, events = fitted.log, fitted.log.events
    names = np.array(["", *space.names])
    assert sorted(names) == sorted(log.ad_vocabularies["category"])
    bought = log.is_purchase & (events.period == 3)
    expected = np.bincount(log.ad_features["category"][events.ad[bought]] - 1, minlength=len(space))
    np.testing.assert_array_equal(space.counts.bought_PA[3], expected)


def test_categories_that_a_forecaster_does_not_know_are_as_if_missing(fitted: Fitted, space: InterestSpace) -> None:
    known = (*space.names[1:], "never seen")
    grown = InterestSpace.of(fitted.log, "category", known)
    assert grown.names == known
    first = fitted.log.ad_features["category"] == 1
    assert (grown.interest_I[first] == -1).all()
    np.testing.assert_array_equal(grown.interest_I[~first], space.interest_I[~first] - 1)
    with pytest.raises(UserError, match="without the ads' column category"):
        InterestSpace.of(without_columns(fitted.log), "category", known)


def test_nothing_after_the_selection_span_changes_the_anchor(fitted: Fitted) -> None:
    log, cfg = fitted.log, fitted.cfg.anchor
    late = log.events.period > log.split.prior_select[1]
    moved = np.where(late, (log.events.ad * 7 + 1) % len(log.ad_ids), log.events.ad).astype(np.int32)
    changed = replace(log, events=replace(log.events, ad=moved))
    made = [
        fit_interest_anchor(
            InterestSpace.of(one, "category"),
            one.advertiser_targets("prior_fit"),
            one.advertiser_targets("prior_select"),
            cfg,
        )[0]
        for one in (log, changed)
    ]
    assert made[0].to_plain() == made[1].to_plain()
    user, period = np.arange(20), np.full(20, log.split.prior_select[1] + 1)
    np.testing.assert_array_equal(made[0].base.log_probs(user, period), made[1].base.log_probs(user, period))


def test_conversions_without_a_category_are_told(fitted: Fitted, space: InterestSpace) -> None:
    nothing = replace(space, targets=space.targets.select(np.zeros(0, np.int64)))
    select = fitted.log.advertiser_targets("prior_select")
    with pytest.raises(UserError, match=r"which no converted ad of data\.split\.prior_select has"):
        fit_interest_anchor(nothing, select, select, fitted.cfg.anchor)


# --- training ----------------------------------------------------------------------------------------------


def test_both_losses_are_reported(fitted: Fitted) -> None:
    metrics, head = fitted.metrics["interests"], fitted.prior.model.interest_head
    assert isinstance(metrics, dict)
    assert head is not None
    assert metrics["column"] == "category"
    assert metrics["categories"] == 10
    assert len(metrics["select_nll_by_part"]) == len(fitted.metrics["select_nll_by_part"]) == 2  # type: ignore[arg-type]
    assert metrics["select_nll_anchor"] < np.log(10)


def test_the_loss_is_the_exact_likelihood_of_the_shares(fitted: Fitted, interests: Interests) -> None:
    model, log = copy.deepcopy(fitted.prior.model).eval(), fitted.log
    assert model.interest_head is not None
    torch.nn.init.normal_(model.interest_head.rows["0"], std=0.3, generator=torch.Generator().manual_seed(0))
    dataset = PromptDataset(log.advertiser_targets("prior_select").select(np.arange(9)), fitted.prior.compiler)
    batch = next(iter(batches(dataset, fitted.prior.collator, 9)))
    assert batch.interests is not None
    with torch.inference_mode():
        hidden_BTH = model.hidden(batch)
        log_probs = model.interest_log_probs(batch, hidden_BTH)
        nll = float(mean_nll(batch.interests, target_log_prob(batch.interests, log_probs)))
    by_hand = []
    for row in range(9):
        example = dataset[row]
        with torch.inference_mode():
            alone = model.embed(torch.from_numpy(example.token_ids)[None])
            end_H = model.decoder(inputs_embeds=alone, use_cache=False).last_hidden_state[0, -1]
            rows_CH, bias_C = model.interest_head.affine(0)
            assert model.interest_head.history is not None
            assert example.history_F is not None
            of_history_C = model.interest_head.history(torch.from_numpy(example.history_F)[None], 0)[0]
            of_history_C = of_history_C * bool(example.history_F.any())
        score_C = (rows_CH @ end_H + bias_C + of_history_C).detach().numpy() + interests.base.child_scores(
            np.array([example.user]), np.array([example.period])
        )[0][0]
        log_prob_C = score_C - np.logaddexp.reduce(score_C)
        wanted = interests.space.targets_of(np.array([example.user]), np.array([example.period]))
        by_hand.append(-(shares(wanted) * log_prob_C[wanted.item]).sum())
    assert nll == pytest.approx(np.mean(by_hand), abs=1e-4)


def test_the_weight_is_of_the_interests_part(fitted: Fitted) -> None:
    dataset = PromptDataset(fitted.log.advertiser_targets("prior_select"), fitted.prior.compiler)
    batch = next(iter(batches(dataset, fitted.prior.collator, 6)))
    loss = {}
    for weight in (0.0, 0.5, 1.0):
        module = PriorLMModule(copy.deepcopy(fitted.prior.model), interest_weight=weight).eval()
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        loss[weight] = float(module.training_step(batch, 0).detach())
    assert loss[1.0] - loss[0.5] == pytest.approx(loss[0.5] - loss[0.0], rel=1e-4)
    assert loss[0.5] > loss[0.0]


def test_without_a_weight_advertisers_are_learned_as_if_there_were_no_interests(fitted: Fitted, tmp_path: Path) -> None:
    unweighted, metrics = plain_model(fitted, tmp_path / "zero", weight=0.0)
    none, expected = plain_model(fitted, tmp_path / "none", column=None)
    assert metrics["select_nll_by_part"] == expected["select_nll_by_part"]
    assert none.interests is None
    assert expected["interests"] is None
    assert unweighted.interests is not None
    assert unweighted.model.interest_head is not None
    assert not unweighted.model.interest_head.rows["0"].any()


def test_the_probe_fits_the_head_of_interests_too(fitted: Fitted, tmp_path: Path) -> None:
    cfg = tiny_prior_config(prompts=16, trainer=BRIEF, probe=ProbeConfig(prompts=32, epochs=2))
    _, metrics = fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path)
    start = metrics["start"]
    assert len(start["nll_after"]) == 3
    assert len(start["interests"]["nll_after"]) == 1
    assert start["interests"]["nll_after"][0] <= start["interests"]["nll_before"][0] < np.log(10)
    assert start["select_nll"] == pytest.approx(sum(start["nll_after"]))


# --- artifact ----------------------------------------------------------------------------------------------


def test_what_is_loaded_forecasts_the_same(fitted: Fitted, tmp_path: Path) -> None:
    fitted.prior.save(tmp_path)
    loaded = PriorModel.load(tmp_path, fitted.log, fitted.ids, fitted.cfg)
    user, period = np.arange(4), np.full(4, 9)
    prompts = [fitted.prior.compiler.compile(one, 9) for one in range(4)]
    ours, theirs = (
        TreeDecoder(one.model, one.base, one.calibration, fitted.cfg.decode, interests=one.interests).decode(
            prompts, user, period
        )
        for one in (fitted.prior, loaded)
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.interest_I, other.interest_I)
        np.testing.assert_allclose(one.interest_log_prob_I, other.interest_log_prob_I, atol=1e-6)
    assert load_interests(tmp_path, fitted.log).to_plain() == fitted.prior.interests.to_plain()  # type: ignore[union-attr]


def test_an_artifact_from_before_there_were_interests_is_loaded(fitted: Fitted, tmp_path: Path) -> None:
    prior, _ = plain_model(fitted, tmp_path / "work", column=None)
    prior.save(tmp_path)
    plain = json.loads((tmp_path / "prior.json").read_text())
    del plain["interests"]
    (tmp_path / "prior.json").write_text(json.dumps(plain))
    loaded = PriorModel.load(tmp_path, fitted.log, fitted.ids, fitted.cfg)
    assert loaded.interests is None
    assert loaded.model.interest_head is None
    assert load_interests(tmp_path, fitted.log) is None
    generate_priors(loaded, fitted.log, fitted.cfg, out_dir=tmp_path, work_dir=tmp_path / ".work")
    table = PriorTable.load(tmp_path, fitted.log)
    assert table.interests == ()
    forecast = TableForecast(table, loaded.base, arm="lm")
    assert not forecast.has_interests
    assert np.isnan(forecast.interest_match(table.user_R, table.period_R, np.arange(len(table)))).all()


def test_a_log_without_the_column_is_told(fitted: Fitted, tmp_path: Path) -> None:
    fitted.prior.save(tmp_path)
    tiny_log(tmp_path)
    poor = load_log(tmp_path / "tables", tiny_config(ad_columns=[]), evaluate="validation")
    with pytest.raises(UserError, match="without the ads' column category"):
        PriorModel.load(tmp_path, poor, fitted.ids, fitted.cfg)


# --- forecasts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_of_interests_sum_to_one(fitted: Fitted, interests: Interests, seed: int) -> None:
    rng, model = np.random.default_rng(seed), copy.deepcopy(fitted.prior.model)
    assert model.interest_head is not None
    torch.nn.init.normal_(model.interest_head.rows["0"], generator=torch.Generator().manual_seed(seed))
    constants = AnchorConstants(rng.random() * 0.9, 0.9, 0.8, float(rng.random()) + 0.01)
    random = replace(
        Interests.untuned(interests.space, Anchor(interests.space.counts, constants)),
        calibration=replace(interests.calibration, lm_weight=(rng.random(),), base_exponent=(rng.random() * 2,)),
    )
    user, period = rng.integers(0, 60, 7), rng.integers(0, 12, 7)
    end_BH = torch.from_numpy(rng.normal(size=(7, 64)).astype(np.float32)) * 30
    for log_prob_BC in random.log_probs(model, end_BH, user, period):
        np.testing.assert_allclose(log_prob_BC.exp().sum(1), 1.0, atol=1e-9)


def test_a_forecast_lists_the_likeliest_interests_at_no_token_more(fitted: Fitted, interests: Interests) -> None:
    prior, user, period = fitted.prior, np.arange(6), np.full(6, 9)
    prompts = [prior.compiler.compile(int(one), 9) for one in user]
    parts = (prior.model, prior.base, prior.calibration, fitted.cfg.decode)
    plain = TreeDecoder(*parts).decode(prompts, user, period)
    for exact in (False, True):
        cfg = replace(fitted.cfg.decode, exact=exact)
        asked = TreeDecoder(*parts[:3], cfg, interests=interests).decode(prompts, user, period)
        for row, (one, other) in enumerate(zip(plain, asked, strict=True)):
            assert exact or one.tokens == other.tokens
            assert not len(one.interest_I)
            with torch.inference_mode():
                embedded = prior.model.embed(torch.from_numpy(prompts[row].token_ids)[None])
                end_H = prior.model.decoder(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, -1]
            history_F = prompts[row].history_F
            assert history_F is not None
            end_H = with_history(end_H, torch.from_numpy(history_F)[None])
            ours, anchor = interests.log_probs(prior.model, end_H, user[row : row + 1], period[row : row + 1])
            best = np.argsort(-ours[0].numpy(), kind="stable")[:TOP_INTERESTS]
            np.testing.assert_array_equal(other.interest_I, best)
            np.testing.assert_allclose(other.interest_log_prob_I, ours[0].numpy()[best], atol=1e-5)
            np.testing.assert_allclose(other.interest_anchor_log_prob_I, anchor[0].numpy()[best], atol=1e-9)


def test_the_table_keeps_them(fitted: Fitted, interests: Interests, directory: Path) -> None:
    frame, table, lookup = read_frame(directory), PriorTable.load(directory, fitted.log), PriorLookup(directory)
    assert (frame["interest"].list.len() == TOP_INTERESTS).all()
    assert set(table.interests) <= set(interests.space.names)
    for row in range(len(table)):
        found = lookup.find(
            str(fitted.log.user_ids[table.user_R[row]]), fitted.log.calendar.start(int(table.period_R[row]))
        )
        assert found is not None
        assert found.interests.tolist() == [table.interests[index] for index in table.interest_RI[row]]
        np.testing.assert_array_equal(found.interest_log_prob_I, table.interest_log_prob_RI[row])
        assert (np.diff(found.interest_log_prob_I) <= 0).all()
        assert len(found.interest_anchor_log_prob_I) == TOP_INTERESTS


@pytest.mark.parametrize("arm", ["lm", "anchor"])
def test_what_a_list_leaves_is_shared_as_the_anchor_shares_it(
    fitted: Fitted, interests: Interests, directory: Path, arm: str
) -> None:
    table = PriorTable.load(directory, fitted.log)
    forecast = TableForecast(table, fitted.prior.base, arm=arm, interests=interests)
    log_prob_BC = forecast.interest_log_probs(table.user_R, table.period_R)
    np.testing.assert_allclose(np.exp(log_prob_BC).sum(1), 1.0, atol=1e-9)
    anchor_BC = interests.base.log_probs(table.user_R, table.period_R)
    if arm == "anchor":
        np.testing.assert_array_equal(log_prob_BC, anchor_BC)
        return
    place = {name: index for index, name in enumerate(interests.space.names)}
    for row in range(len(table)):
        listed = [place[table.interests[index]] for index in table.interest_RI[row]]
        np.testing.assert_allclose(log_prob_BC[row, listed], table.interest_log_prob_RI[row])
        others = np.setdiff1d(np.arange(len(interests.space)), listed)
        ratio = log_prob_BC[row, others] - anchor_BC[row, others]
        np.testing.assert_allclose(ratio, ratio[0], atol=1e-9)


def test_an_ad_is_matched_by_its_category(fitted: Fitted, interests: Interests, directory: Path) -> None:
    table = PriorTable.load(directory, fitted.log)
    forecast = TableForecast(table, fitted.prior.base, arm="lm", interests=interests)
    rng = np.random.default_rng(0)
    outsider = np.setdiff1d(np.arange(60), table.user_R)[:1]
    user = np.concatenate([rng.choice(table.user_R, 300), outsider])
    period, ad = rng.integers(7, 12, 301), rng.integers(0, len(fitted.log.ad_ids), 301)
    match_N = forecast.interest_match(user, period, ad)
    expected = forecast.interest_log_probs(user, period)[np.arange(301), interests.space.interest_I[ad]]
    np.testing.assert_allclose(match_N, expected, rtol=1e-6)
    anchor = interests.base.log_probs(outsider, period[-1:])[0]
    assert match_N[-1] == pytest.approx(anchor[interests.space.interest_I[ad[-1]]], rel=1e-6)
    bare = replace(interests.space, interest_I=np.full(len(fitted.log.ad_ids), -1))
    nothing = TableForecast(table, fitted.prior.base, arm="lm", interests=replace(interests, space=bare))
    assert np.isnan(nothing.interest_match(user, period, ad)).all()


def test_shards_from_before_there_were_interests_are_read(
    fitted: Fitted, interests: Interests, directory: Path
) -> None:
    names = ["interest", "interest_log_prob", "interest_anchor_log_prob"]
    folder = directory / "older"
    for number, file in enumerate(shard_files(directory)):
        frame = pl.read_parquet(file)
        older = folder / file.relative_to(directory)
        older.parent.mkdir(parents=True)
        (frame if number else frame.drop(names)).write_parquet(older)
    table = PriorTable.load(folder, fitted.log)
    whole = PriorTable.load(directory, fitted.log)
    np.testing.assert_array_equal(table.log_prob_RK, whole.log_prob_RK)
    old = table.period_R == table.period_R.min()
    assert (table.interest_RI[old] == -1).all()
    assert (table.interest_RI[~old] >= 0).all()
    forecast = TableForecast(table, fitted.prior.base, arm="lm", interests=interests)
    log_prob_BC = forecast.interest_log_probs(table.user_R, table.period_R)
    anchor_BC = interests.base.log_probs(table.user_R, table.period_R)
    np.testing.assert_allclose(log_prob_BC[old], anchor_BC[old])
    np.testing.assert_allclose(np.exp(log_prob_BC).sum(1), 1.0, atol=1e-9)
