"""The reward stage on the tiny log: it learns, it starts from where it was, and it is taken for what it is good for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import UserError
from data.statistics import Interval
from models.prior_lm import target_log_prob
from models.prior_reward import RewardModule, list_log_prob, tree_divergence
from models.training import TrainerConfig
from priors.artifact import PriorModel, read_plain
from priors.config import AnchorConfig, HistoryConfig, PriorConfig, RewardConfig
from priors.dataset import PromptDataset
from priors.fit import fit_prior, sample_rows
from priors.reward import ListDrawer, accepted_for, fit_reward, judge, own_copy, rewards
from tests.priors.conftest import Fitted, tiny_prior_config
from tests.priors.worlds import World, brute_force

BRIEF = TrainerConfig(max_epochs=2, patience=None, progress_bar=False, checkpoint_every=2)
SMALL = RewardConfig(prompts=24, lists=4, length=6, batch_size=4)


def rewarded_config(reward: RewardConfig = SMALL) -> PriorConfig:
    return tiny_prior_config(trainer=BRIEF, reward=reward, select_prompts=16)


def module_of(fitted: Fitted, reward: RewardConfig = SMALL) -> tuple[RewardModule, list[Any], PromptDataset]:
    prior = fitted.prior
    model = own_copy(prior.model)
    module = RewardModule(
        model,
        own_copy(prior.model),
        ListDrawer(model, prior.base, prior.calibration, prior.collator, reward),
        lm_weights=prior.calibration.lm_weight,
        base_exponents=prior.calibration.base_exponent,
        kl_weight=reward.kl_weight,
    )
    prompts = PromptDataset(fitted.log.advertiser_targets("prior_fit"), prior.compiler)
    return module, [prompts[row] for row in range(40, 46)], prompts


def all_log_probs(fitted: Fitted, examples: list[Any]) -> np.ndarray:
    prior = fitted.prior
    user, period = (np.array([getattr(one, name) for one in examples]) for name in ("user", "period"))
    asked = World(
        prior.model, prior.base, prior.calibration, examples, user, period,
        np.random.default_rng(0),
    )  # fmt: skip
    return brute_force(asked)


def test_several_targets_earn_the_sum_and_a_miss_nothing() -> None:
    lists = np.array([[3, 1, 2], [2, 3, 1], [4, 5, 6]])
    np.testing.assert_allclose(rewards(lists, np.array([3, 2, 9])), [4.0 + 3.8, 4.0 + 3.9, 0.0])


def test_a_tree_gives_the_probability_that_lists_were_drawn_with(fitted: Fitted) -> None:
    """The group's tree, teacher-forced, against every advertiser by a sequence of its own; and the KL at the start."""
    module, examples, _ = module_of(fitted)
    torch.manual_seed(3)
    drawn = module.draw(examples)
    truth_BA = torch.from_numpy(all_log_probs(fitted, examples))
    torch.manual_seed(3)
    sampled = module.draw._sampler.sample(  # type: ignore[attr-defined]
        examples,
        np.array([one.user for one in examples]), np.array([one.period for one in examples]), lists=4, length=6,
    )  # fmt: skip
    with torch.no_grad():
        ours = module.log_probs(module.model, drawn.tree)
        found = list_log_prob(target_log_prob(drawn.tree, ours)[drawn.target_BGK])
        theirs = module.log_probs(module.reference, drawn.tree)
    expected = torch.stack([list_log_prob(truth_BA[row][torch.from_numpy(sampled[row])]) for row in range(6)])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (tree_divergence(drawn.tree, ours, theirs) == 0).all()
    reward = np.stack([rewards(sampled[row], examples[row].targets) for row in range(6)])
    np.testing.assert_allclose(drawn.reward_BG.numpy(), reward)


def test_the_divergence_of_a_whole_tree_is_that_of_the_distributions(fitted: Fitted) -> None:
    """With every advertiser drawn, no prefix is left out."""
    n = len(fitted.log.advertiser_ids)
    module, examples, _ = module_of(fitted, replace(SMALL, lists=2, length=20))
    everyone = [replace(example, targets=np.arange(n)) for example in examples]
    tree = fitted.prior.collator(everyone)
    for weight in (one for one in module.model.head.parameters() if one.requires_grad):  # what is frozen is shared
        torch.nn.init.normal_(weight, std=0.3, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = (module.log_probs(model, tree) for model in (module.model, module.reference))
        p, q = (target_log_prob(tree, levels).view(len(examples), n) for levels in (ours, theirs))
        found = tree_divergence(tree, ours, theirs)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(1), atol=1e-4, rtol=1e-4)
    assert (found > 0.01).all()
    with torch.no_grad():
        drawn = module.draw(examples).tree
        part = tree_divergence(drawn, *(module.log_probs(model, drawn) for model in (module.model, module.reference)))
    assert (part <= found + 1e-5).all()


def test_the_stage_raises_the_reward_and_leaves_the_fine_tuned_lm_alone(fitted: Fitted, tmp_path: Path) -> None:
    reward = RewardConfig(
        prompts=1000, lists=16, length=6, batch_size=2, kl_weight=0.01, lora_learning_rate=5e-4, head_learning_rate=2e-2
    )
    cfg = rewarded_config(reward)
    # Without history vectors and the plan of campaigns, that leave two random layers little to learn.
    plain_cfg = replace(cfg, history=HistoryConfig(prompts=0), anchor=AnchorConfig(plan_exponent=[0.0]))
    plain, _ = fit_prior(fitted.log, fitted.ids, plain_cfg, work_dir=tmp_path / "prior")
    kept = {name: value.clone() for name, value in plain.model.state_dict().items()}
    prior, metrics = fit_reward(plain, fitted.log, cfg, work_dir=tmp_path)
    assert metrics is not None
    assert all(torch.equal(value, kept[name]) for name, value in plain.model.state_dict().items())
    assert metrics["accepted_for"] == prior.reward
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    kl = [line["train_kl"] for line in lines if "train_kl" in line]
    assert kl[0] == 0.0
    assert kl[-1] > 0.0
    # On the prompts that it learned from: a list's reward, before and after.
    trained = PromptDataset(sample_rows(fitted.log.advertiser_targets("prior_fit"), 200, 0), prior.compiler)
    model = own_copy(plain.model)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items()}, strict=False)
    before, after = (judge(one, plain, trained, cfg)["reward"].mean() for one in (plain.model, model))
    assert after > before + 0.05


def test_a_stage_that_was_cut_short_goes_on_where_it_was(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curve(folder: str) -> list[float]:
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        return [line["train_reward"] for line in lines if "train_reward" in line]

    _, whole = fit_reward(fitted.prior, fitted.log, rewarded_config(), work_dir=tmp_path / "whole")
    step = RewardModule.training_step

    def dies(self: RewardModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(RewardModule, "training_step", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit_reward(fitted.prior, fitted.log, rewarded_config(), work_dir=tmp_path / "cut")
    monkeypatch.setattr(RewardModule, "training_step", step)
    _, resumed = fit_reward(fitted.prior, fitted.log, rewarded_config(), work_dir=tmp_path / "cut")
    np.testing.assert_allclose(curve("cut"), curve("whole"), atol=1e-6)
    assert resumed == whole


def test_a_loss_that_is_no_number_names_its_prompts(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = RewardModule.training_step
    monkeypatch.setattr(RewardModule, "training_step", lambda *args: step(*args) * torch.nan)
    with pytest.raises(FloatingPointError, match=r"lists for users u\d+ as of period \d"):
        fit_reward(fitted.prior, fitted.log, rewarded_config(), work_dir=tmp_path)


@pytest.mark.parametrize(
    ("recall", "nll", "taken"),
    [
        ((0.02, 0.01, 0.03), (0.1, 0.05, 0.2), "lists"),
        ((0.02, 0.01, 0.03), (-0.01, -0.05, 0.03), "all"),
        ((0.02, 0.01, 0.03), (0.0, -0.05, 0.05), "all"),
        ((0.02, -0.01, 0.03), (-0.1, -0.2, -0.05), "none"),
        ((0.02, 0.0, 0.03), (-0.1, -0.2, -0.05), "none"),
        ((-0.02, -0.03, -0.01), (0.1, 0.05, 0.2), "none"),
        ((np.nan, np.nan, np.nan), (np.nan, np.nan, np.nan), "none"),
    ],
)
def test_what_a_result_is_taken_for(
    recall: tuple[float, float, float], nll: tuple[float, float, float], taken: str
) -> None:
    differences = (Interval(value, low, high, n=9) for value, low, high in (recall, nll))
    assert accepted_for(recall=next(differences), nll=next(differences)) == taken


def test_lists_of_another_lm_are_kept_beside_the_artifact(fitted: Fitted, tmp_path: Path) -> None:
    other = own_copy(fitted.prior.model)
    with torch.no_grad():
        for weight in other.head.parameters():
            weight.add_(1.0)
    replace(fitted.prior, reward="lists", list_model=other).save(tmp_path)
    assert read_plain(tmp_path)["reward"] == {"accepted_for": "lists"}
    for lists, model in ((False, fitted.prior.model), (True, other)):
        loaded = PriorModel.load(tmp_path, fitted.log, fitted.ids, fitted.cfg, lists=lists)
        assert loaded.reward == "lists"
        for name, value in model.head.state_dict().items():
            torch.testing.assert_close(loaded.model.head.state_dict()[name], value)


def test_lists_asked_of_an_artifact_that_has_no_lm_for_them_are_told(fitted: Fitted, tmp_path: Path) -> None:
    fitted.prior.save(tmp_path)
    with pytest.raises(UserError, match="without one for lists"):
        PriorModel.load(tmp_path, fitted.log, fitted.ids, fitted.cfg, lists=True)


def test_no_prompts_leave_the_stage_out(fitted: Fitted, tmp_path: Path) -> None:
    prior, metrics = fit_reward(fitted.prior, fitted.log, fitted.cfg, work_dir=tmp_path / "work")
    assert prior is fitted.prior
    assert metrics is None
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompts": -1}, r"reward\.prompts=-1.*at least 0"),
        ({"lists": 1}, r"reward\.lists=1.*at least 2"),
        ({"length": 0}, r"reward\.length=0.*at least 1"),
        ({"length": 21}, r"reward\.length=21.*at most 20"),
        ({"batch_size": 0}, r"reward\.batch_size=0"),
        ({"kl_weight": -0.1}, r"reward\.kl_weight=-0\.1"),
        ({"kl_weight": float("nan")}, r"reward\.kl_weight=nan"),
        ({"lists": 0, "head_learning_rate": -1.0}, r"(?s)2 problems.*|lists=0.*head_learning_rate=-1"),
    ],
)
def test_a_config_that_cannot_be_is_told(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=f"(?s){match}"):
        RewardConfig(**changes)
