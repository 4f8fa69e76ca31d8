"""The forecaster before and after training, against plain computations of the same thing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import LineageError, UserError
from models.prior_lm import TreeBatch, base_log_prob, target_log_prob
from priors.anchor import Anchor, mean_target_nll
from priors.artifact import PriorModel
from priors.base_model import load_base_model
from priors.calibration import Calibration, calibrated_nll, fit_calibration
from priors.config import BaseModelConfig, DecodeConfig, PriorConfig
from priors.dataset import Example, PromptDataset, TreeCollator
from priors.decode import TreeDecoder
from priors.evaluate import anchor_log_prob, exact_log_prob
from priors.fit import batches, build_model, fit_prior, selection_rows
from priors.forecast import PRIOR_FEATURES, TableForecast, prefix_feature
from priors.generate import as_of_periods, generate_priors
from priors.prompt import Prompt
from priors.table import PriorTable
from tests.priors.conftest import Fitted, random_ids, tiny_prior_config


def decoder_of(fitted: Fitted, **changes: object) -> TreeDecoder:
    cfg = DecodeConfig(**({"beam": 64, "top_k": 100} | changes))  # type: ignore[arg-type]
    return TreeDecoder(fitted.prior.model, fitted.prior.base, fitted.prior.calibration, cfg)


def prompts_of(fitted: Fitted, users: np.ndarray, period: int) -> list[Prompt]:
    return [fitted.prior.compiler.compile(int(user), period) for user in users]


def every_advertiser(fitted: Fitted, users: np.ndarray, period: int) -> TreeBatch:
    everyone = np.arange(len(fitted.log.advertiser_ids))
    examples = [
        Example(int(user), period, prompt.token_ids, everyone, prompt.history_F)
        for user, prompt in zip(users, prompts_of(fitted, users, period), strict=True)
    ]
    return fitted.prior.collator(examples)


@torch.no_grad()
def teacher_forced(fitted: Fitted, users: np.ndarray, period: int) -> np.ndarray:
    """Log-probability of every advertiser through the training path, ``(B, A)``."""
    batch, model, cal = every_advertiser(fitted, users, period), fitted.prior.model, fitted.prior.calibration
    hidden = model.hidden(batch)
    log_probs = []
    for level, d in enumerate(batch.levels):
        legal = d.base_NV.isfinite()
        score = cal.lm_weight[level] * model.scores(batch.states(hidden, d), level, d)
        score = score + cal.base_exponent[level] * d.base_NV.masked_fill(~legal, 0.0)
        log_probs.append(score.masked_fill(~legal, -torch.inf).log_softmax(-1))
    return target_log_prob(batch, log_probs).view(len(users), -1).numpy()


def test_before_training_the_forecast_is_the_empirical_prior(fitted: Fitted) -> None:
    """The head starts at zero, so that the untrained LM adds nothing to q_u."""
    untrained = build_model(load_base_model(fitted.cfg.base), fitted.ids, fitted.log, fitted.prior.compiler, fitted.cfg)
    untuned = replace(fitted.prior.base, exponent_L=np.ones(3), bias_LV=[np.zeros(4)] * 3)
    decoder = TreeDecoder(untrained, untuned, Calibration.identity(3), DecodeConfig(beam=64, top_k=100))
    users, period = np.arange(6), 8
    q_BA = untuned.anchor.probabilities(users, np.full(6, period))
    for row, one in enumerate(decoder.decode(prompts_of(fitted, users, period), users, np.full(6, period))):
        np.testing.assert_allclose(np.exp(one.log_prob_K), q_BA[row, one.advertiser_K], rtol=1e-5)


def test_a_wide_beam_finds_everyone_with_the_probability_of_teacher_forcing(fitted: Fitted) -> None:
    users, period = np.arange(12), 9
    forced_BA = teacher_forced(fitted, users, period)
    np.testing.assert_allclose(np.exp(forced_BA).sum(1), 1.0, atol=1e-5)
    decoded = decoder_of(fitted).decode(prompts_of(fitted, users, period), users, np.full(12, period))
    for row, one in enumerate(decoded):
        assert sorted(one.advertiser_K) == list(range(len(fitted.log.advertiser_ids)))
        np.testing.assert_allclose(one.log_prob_K, forced_BA[row, one.advertiser_K], atol=1e-4)
        assert one.mass == pytest.approx(1.0, abs=1e-6)


def test_a_narrow_beam_is_exact_about_what_it_finds_and_prunes(fitted: Fitted) -> None:
    users, period, trie = np.arange(12), 9, fitted.prior.base.trie
    prob_BA = np.exp(teacher_forced(fitted, users, period))
    decoder = decoder_of(fitted, beam=2, frontier_floor=1e-9)
    for row, one in enumerate(decoder.decode(prompts_of(fitted, users, period), users, np.full(12, period))):
        assert len(set(one.advertiser_K)) == len(one.advertiser_K) > 0
        np.testing.assert_allclose(np.exp(one.log_prob_K), prob_BA[row, one.advertiser_K], atol=1e-5)
        np.testing.assert_allclose(
            np.exp(one.level1_log_prob_N), trie.node_mass(prob_BA[row : row + 1], 1)[0], atol=1e-5
        )
        for depth, node, log_prob in zip(
            one.frontier_depth_F, one.frontier_node_F, one.frontier_log_prob_F, strict=True
        ):
            mass = trie.node_mass(prob_BA[row : row + 1], int(depth))[0, node]
            assert np.exp(log_prob) == pytest.approx(mass, abs=1e-5)


def test_the_order_and_company_of_prompts_change_nothing(fitted: Fitted) -> None:
    users, period = np.arange(5), 7
    together = decoder_of(fitted, beam=3).decode(prompts_of(fitted, users, period), users, np.full(5, period))
    for row, user in enumerate(users):
        one = np.array([user])
        alone = decoder_of(fitted, beam=3).decode(prompts_of(fitted, one, period), one, np.array([period]))[0]
        np.testing.assert_array_equal(alone.advertiser_K, together[row].advertiser_K)
        np.testing.assert_allclose(alone.log_prob_K, together[row].log_prob_K, atol=1e-4)


def test_an_empty_batch_gives_nothing_and_an_empty_prompt_an_error(fitted: Fitted) -> None:
    assert decoder_of(fitted).decode([], np.zeros(0, int), np.zeros(0, int)) == []
    with pytest.raises(UserError, match="empty prompt"):
        decoder_of(fitted).decode([Prompt(np.zeros(0, np.int64))], np.array([0]), np.array([7]))


def test_nan_logits_are_told_with_their_prompt(fitted: Fitted) -> None:
    decoder = decoder_of(fitted)
    broken = torch.nn.Parameter(torch.full_like(decoder.model.head.projections[0], torch.nan))
    sound, decoder.model.head.projections[0] = decoder.model.head.projections[0], broken
    try:
        with pytest.raises(FloatingPointError, match="prompt 0 of the batch at level 1"):
            decoder.decode(prompts_of(fitted, np.array([0]), 7), np.array([0]), np.array([7]))
    finally:
        decoder.model.head.projections[0] = sound


def test_tree_batch_gives_each_target_what_it_gets_alone(fitted: Fitted) -> None:
    """Targets that share a tree do not see each other."""
    targets = fitted.log.advertiser_targets("prior_select")
    dataset = PromptDataset(targets, fitted.prior.compiler)
    row = int(np.argmax(np.diff(targets.ptr)))
    example, collator = dataset[row], fitted.prior.collator
    model = fitted.prior.model
    with torch.no_grad():
        batch = collator([example])
        together = target_log_prob(batch, model.log_probs(batch))
        for index, advertiser in enumerate(example.targets):
            alone = collator([replace(example, targets=np.array([advertiser]))])
            torch.testing.assert_close(
                target_log_prob(alone, model.log_probs(alone))[0], together[index], atol=1e-5, rtol=1e-5
            )


def test_targets_beyond_the_limit_are_drawn_by_row_alone(fitted: Fitted) -> None:
    targets = fitted.log.advertiser_targets("prior_fit")
    limited = PromptDataset(targets, fitted.prior.compiler, max_targets=1, seed=3)
    again = PromptDataset(targets, fitted.prior.compiler, max_targets=1, seed=3)
    for row in (0, 5, 9):
        assert len(limited[row].targets) == 1
        assert limited[row].targets[0] in targets.of(row)
        np.testing.assert_array_equal(limited[row].targets, again[row].targets)


def test_calibration_leaves_the_sum_at_one_and_never_worsens_its_own_span(fitted: Fitted) -> None:
    targets = fitted.log.advertiser_targets("prior_select")
    select = list(batches(PromptDataset(targets, fitted.prior.compiler), fitted.prior.collator, 16))
    rng = torch.Generator().manual_seed(0)
    noise = [[torch.randn(d.base_NV.shape, generator=rng) * 3 for d in batch.levels] for batch in select]
    calibration = fit_calibration(select, noise)
    weight, exponent = torch.tensor(calibration.lm_weight), torch.tensor(calibration.base_exponent)
    fitted_nll = calibrated_nll(select, noise, weight, exponent).mean()
    assert fitted_nll < calibrated_nll(select, noise, torch.ones(3), torch.ones(3)).mean()
    # An LM of pure noise is all but left out.
    assert max(calibration.lm_weight) < 0.3
    assert min(calibration.lm_weight) >= 0.0


def test_an_lm_that_learned_nothing_is_its_anchor(fitted: Fitted, tmp_path: Path) -> None:
    """Both get the last fit of the selection prompts, so neither looks better than the other by it."""
    cfg = tiny_prior_config(train="lora")
    cfg.lora.learning_rate = cfg.head.learning_rate = 1e-12
    cfg.history.prompts = cfg.probe.prompts = 0
    prior, _ = fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path)
    targets = fitted.log.advertiser_targets("prior_select")
    tree = list(batches(PromptDataset(targets, prior.compiler), prior.collator, 16))
    log_prob_T = exact_log_prob(prior.model, tree, prior.calibration)
    np.testing.assert_allclose(log_prob_T, anchor_log_prob(prior.base, targets), atol=1e-3)


def test_a_raised_anchor_is_the_same_base_under_the_calibration_over_it(fitted: Fitted) -> None:
    exponent_L, calibration = (0.9, 1.2, 0.7), Calibration((0.5, 1.0, 2.0), (1.1, 0.8, 1.3))
    targets = fitted.log.advertiser_targets("prior_select")
    raised = replace(fitted.prior, base=fitted.prior.base.raised(exponent_L), calibration=calibration.over(exponent_L))
    plain = replace(fitted.prior, calibration=calibration)
    of_raised, of_plain = (
        exact_log_prob(p.model, list(batches(PromptDataset(targets, p.compiler), p.collator, 16)), p.calibration)
        for p in (raised, plain)
    )
    np.testing.assert_allclose(of_raised, of_plain, atol=1e-5)


def test_training_moves_the_forecast_and_validation_reports_it(fitted: Fitted) -> None:
    assert fitted.metrics["steps"] == 6
    assert len(fitted.metrics["select_nll_by_part"]) == 2  # type: ignore[arg-type]
    targets = fitted.log.advertiser_targets("prior_select")
    tree = list(batches(PromptDataset(targets, fitted.prior.compiler), fitted.prior.collator, 16))
    base = torch.cat([-base_log_prob(batch) for batch in tree])
    log_prob = exact_log_prob(fitted.prior.model, tree, fitted.prior.calibration)
    assert np.abs(log_prob + base.numpy()).max() > 1e-6


def test_a_killed_fit_ends_like_an_undisturbed_one(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collate, calls, dies_at = TreeCollator.__call__, 0, 0

    def counted(self: TreeCollator, examples: Sequence[Example]) -> TreeBatch:
        nonlocal calls
        calls += 1
        if calls == dies_at:
            raise RuntimeError("killed")
        return collate(self, examples)

    monkeypatch.setattr(TreeCollator, "__call__", counted)
    whole, _ = fit_prior(fitted.log, fitted.ids, fitted.cfg, work_dir=tmp_path / "whole")
    # The second part has three training batches; after them come the selection prompts, twice four batches.
    dies_at, calls = calls - 4 - 4 - 1, 0
    with pytest.raises(RuntimeError, match="killed"):
        fit_prior(fitted.log, fitted.ids, fitted.cfg, work_dir=tmp_path / "killed")
    assert (tmp_path / "killed" / "checkpoints" / "last.ckpt").exists()
    dies_at = 0
    resumed, metrics = fit_prior(fitted.log, fitted.ids, fitted.cfg, work_dir=tmp_path / "killed")
    assert metrics["steps"] == 6
    for name, value in whole.model.head.state_dict().items():
        torch.testing.assert_close(resumed.model.head.state_dict()[name], value, atol=0, rtol=0)
    assert resumed.calibration == whole.calibration


def test_saved_and_loaded_it_forecasts_the_same(fitted: Fitted, tmp_path: Path) -> None:
    fitted.prior.save(tmp_path)
    loaded = PriorModel.load(tmp_path, fitted.log, fitted.ids, fitted.cfg)
    users, period = np.arange(4), 8
    ours = decoder_of(fitted).decode(prompts_of(fitted, users, period), users, np.full(4, period))
    theirs = TreeDecoder(loaded.model, loaded.base, loaded.calibration, DecodeConfig(beam=64, top_k=100)).decode(
        [loaded.compiler.compile(int(user), period) for user in users], users, np.full(4, period)
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.advertiser_K, other.advertiser_K)
        np.testing.assert_array_equal(one.log_prob_K, other.log_prob_K)
    tokens = json.loads((tmp_path / "tokenizer" / "tokenizer.json").read_text())["added_tokens"]
    named = {token["content"]: token["id"] for token in tokens}
    offset = loaded.compiler.first_id_token
    assert [named["<adv_1_0>"], named["<adv_2_0>"], named["<adv_3_3>"]] == [offset, offset + 4, offset + 11]


def test_what_was_said_before_the_last_calibration_is_kept(fitted: Fitted, tmp_path: Path) -> None:
    """Its NLL on the selection prompts is the one that the fit ended with, before their calibration."""
    prior, metrics = fit_prior(fitted.log, fitted.ids, fitted.cfg, work_dir=tmp_path / "work")
    prior.save(tmp_path)
    loaded = PriorModel.load(tmp_path, fitted.log, fitted.ids, fitted.cfg)
    assert loaded.anchor_calibration == tuple(metrics["anchor_calibration"])
    select = selection_rows(fitted.log.advertiser_targets("prior_select"), fitted.cfg)
    tree = list(batches(PromptDataset(select, loaded.compiler), loaded.collator, 16))
    log_prob_T = exact_log_prob(loaded.model, tree, loaded.uncalibrated)
    best = metrics["best_part"]
    expected = metrics["start"]["select_nll"] if best < 0 else metrics["select_nll_by_part"][best]
    assert mean_target_nll(log_prob_T, select).mean() == pytest.approx(expected, abs=1e-4)
    plain = json.loads((tmp_path / "prior.json").read_text())
    del plain["anchor_calibration"]
    (tmp_path / "prior.json").write_text(json.dumps(plain))
    older = PriorModel.load(tmp_path, fitted.log, fitted.ids, fitted.cfg)
    assert older.uncalibrated == Calibration.identity(3)


def test_other_advertiser_ids_are_refused(fitted: Fitted, tmp_path: Path) -> None:
    fitted.prior.save(tmp_path)
    with pytest.raises(LineageError, match=fitted.ids.version[:12]):
        PriorModel.load(tmp_path, fitted.log, random_ids(fitted.log, seed=1), fitted.cfg)


@pytest.mark.parametrize(
    ("every", "evaluate", "expected"),
    [
        (1, "validation", [7, 8, 9, 10, 11]),
        (2, "validation", [7, 9, 10]),
        (2, "test", [7, 9, 11, 12]),
        (9, "test", [7, 12]),
    ],
)
def test_the_evaluated_span_has_forecasts_of_its_own(
    fitted: Fitted, every: int, evaluate: str, expected: list[int]
) -> None:
    assert as_of_periods(replace(fitted.log, evaluate=evaluate), every) == expected


@pytest.fixture(scope="module")
def table(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> PriorTable:
    directory = tmp_path_factory.mktemp("table")
    (directory / "out").mkdir()
    metrics = generate_priors(
        fitted.prior, fitted.log, fitted.cfg, out_dir=directory / "out", work_dir=directory / "work"
    )
    assert metrics["forecasts_made"] == 20 * len(as_of_periods(fitted.log, 2))
    return PriorTable.load(directory / "out", fitted.log)


@pytest.mark.parametrize("arm", ["lm", "anchor"])
def test_every_users_probabilities_sum_to_one(fitted: Fitted, table: PriorTable, arm: str) -> None:
    forecast = TableForecast(table, fitted.prior.base, arm=arm)
    users = fitted.log.panel(20, fitted.cfg.seed)
    for period in (7, 8, 11):
        log_prob = forecast.log_probs(users, np.full(len(users), period))
        assert log_prob.shape == (20, forecast.n_advertisers)
        np.testing.assert_allclose(np.exp(log_prob.astype(float)).sum(1), 1.0, atol=1e-5)


def test_back_off_keeps_what_was_decoded_and_shares_the_rest_by_the_anchor(fitted: Fitted, table: PriorTable) -> None:
    forecast = TableForecast(table, fitted.prior.base, arm="lm")
    row = 4
    user, period = table.user_R[row : row + 1], table.period_R[row : row + 1]
    log_prob = forecast.log_probs(user, period)[0]
    found = table.advertiser_RK[row][table.advertiser_RK[row] >= 0]
    np.testing.assert_allclose(log_prob[found], table.log_prob_RK[row, : len(found)], atol=1e-5)
    forced = teacher_forced(fitted, user, int(period[0]))
    trie = fitted.prior.base.trie
    np.testing.assert_allclose(
        trie.node_mass(np.exp(log_prob[None].astype(float)), 1), trie.node_mass(np.exp(forced), 1), atol=1e-4
    )


def test_in_beam_are_the_advertisers_that_were_decoded_whatever_the_back_off_gives_others(
    fitted: Fitted, table: PriorTable
) -> None:
    row, n = 4, len(fitted.log.advertiser_ids)
    beam = table.advertiser_RK[row].copy()
    beam[1:] = np.setdiff1d(np.arange(n), beam)[: len(beam) - 1][::-1]  # as a narrow beam may leave likely ones out
    beam[-1] = -1
    advertiser_RK = table.advertiser_RK.copy()
    advertiser_RK[row] = beam
    narrow = replace(table, advertiser_RK=advertiser_RK)
    user, period, every = np.full(n, table.user_R[row]), np.full(n, table.period_R[row]), np.arange(n)
    lm, anchor = (TableForecast(narrow, fitted.prior.base, arm=arm) for arm in ("lm", "anchor"))
    said = lm.features(user, period, every)
    assert set(np.flatnonzero(said["prior_in_beam"])) == set(beam[beam >= 0])
    np.testing.assert_allclose(said["prior_mass"], np.exp(said["prior_log_prob"][beam[beam >= 0]]).sum(), rtol=1e-5)
    likeliest = anchor.features(user, period, every)
    np.testing.assert_array_equal(likeliest["prior_in_beam"], np.expm1(likeliest["prior_rank"]).round() < len(beam))


def test_a_request_takes_the_newest_forecast_before_it(fitted: Fitted, table: PriorTable) -> None:
    user = table.user_R[:1]
    rows = [table.find(user, np.array([period]))[0] for period in (6, 7, 8, 9, 99)]
    assert rows[0] == -1
    assert [table.period_R[row] for row in rows[1:]] == [7, 7, 9, 10]


@pytest.mark.parametrize("arm", ["lm", "anchor"])
def test_a_forecast_of_before_is_weighed_by_the_plan_of_the_period_asked_for(
    fitted: Fitted, table: PriorTable, arm: str
) -> None:
    counts, constants = fitted.prior.base.anchor.counts, fitted.prior.base.anchor.constants
    base = replace(fitted.prior.base, anchor=Anchor(counts, replace(constants, plan_exponent=0.5)))
    forecast = TableForecast(table, base, arm=arm)
    users = np.unique(table.user_R)
    made, later = (forecast.log_probs(users, np.full(len(users), period)).astype(float) for period in (7, 8))
    assert counts.plan_PA is not None
    expected = np.exp(made + 0.5 * (counts.plan_PA[8] - counts.plan_PA[7]))
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(np.exp(later), expected, rtol=1e-3)
    assert np.abs(later - made).max() > 0.1
    advertiser = np.arange(len(users)) % forecast.n_advertisers
    said = forecast.features(users, np.full(len(users), 8), advertiser)
    np.testing.assert_allclose(said["prior_log_prob"], later[np.arange(len(users)), advertiser], rtol=1e-5)
    anchor = TableForecast(table, base, arm="anchor").log_probs(users, np.full(len(users), 8)).astype(float)
    lift = (later - anchor)[np.arange(len(users)), advertiser]
    np.testing.assert_allclose(said["prior_lift"], lift, atol=1e-3)


def test_a_user_without_a_forecast_falls_back_to_the_anchor_and_is_flagged(fitted: Fitted, table: PriorTable) -> None:
    forecast = TableForecast(table, fitted.prior.base, arm="lm")
    outsider = np.setdiff1d(np.arange(len(fitted.log.user_ids)), table.user_R)[:1]
    np.testing.assert_allclose(
        forecast.log_probs(outsider, np.array([8])), fitted.prior.base.log_probs(outsider, np.array([8])), rtol=1e-5
    )
    features = forecast.features(np.r_[outsider, table.user_R[:2]], np.array([8, 8, 8]), np.array([0, 0, -1]))
    levels = fitted.prior.base.trie.n_levels
    assert set(features) == {*PRIOR_FEATURES, *(prefix_feature(depth) for depth in range(1, levels))}
    assert features["prior_missing"].tolist() == [1.0, 0.0, 1.0]
    assert all(np.isfinite(values).all() for values in features.values())


def test_a_finished_as_of_file_is_not_made_again_and_counts_as_before(fitted: Fitted, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    arguments = {"out_dir": tmp_path / "out", "work_dir": tmp_path / "work"}
    whole = generate_priors(fitted.prior, fitted.log, fitted.cfg, **arguments)
    first = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.parquet")}
    (tmp_path / "work" / "shards" / "period=0009" / "00000.parquet").unlink()
    metrics = generate_priors(fitted.prior, fitted.log, fitted.cfg, **arguments)
    for name in ("users", "as_of_periods", "forecasts_made", "mass_in_list", "certified_share"):
        assert metrics[name] == whole[name], name
    assert metrics["tokens_per_forecast"] > 0, "of the 20 that were made now"
    assert generate_priors(fitted.prior, fitted.log, fitted.cfg, **arguments)["seconds_per_forecast"] is None
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.parquet")} == first


BAD_CONFIGS = [
    ({"panel": 0}, "prior.panel=0"),
    ({"prompts": -1}, "prior.prompts=-1"),
    ({"base": BaseModelConfig("packaged:gpt9")}, "packaged:gpt9"),
    ({"base": BaseModelConfig(dtype="int4")}, "prior.base.dtype=int4"),
    ({"base": BaseModelConfig("/nowhere/at/all")}, "/nowhere/at/all"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_CONFIGS)
def test_bad_configuration_is_told(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_base_model(PriorConfig(**changes).base)  # type: ignore[arg-type]


def test_several_problems_are_told_together() -> None:
    with pytest.raises(UserError, match=r"(?s)prior\.panel=0.*prior\.prompts=-1"):
        PriorConfig(panel=0, prompts=-1)
    with pytest.raises(UserError, match=r"(?s)prior\.decode\.beam=0.*prior\.decode\.top_k=0"):
        DecodeConfig(beam=0, top_k=0)
