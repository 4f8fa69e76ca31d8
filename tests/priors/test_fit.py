"""Fitting the LM: exact after a kill, equal by whatever path, and clear about what cannot be fitted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, LlamaConfig, PretrainedConfig, Qwen2Config

from data.errors import LineageError, UserError
from data.statistics import paired_bootstrap
from models.block import last_layer
from models.prior_lm import PriorLMModule, TreeBatch, row_nll, target_log_prob
from models.training import TrainerConfig
from priors.anchor import Counts
from priors.artifact import PriorModel
from priors.base_model import load_base_model
from priors.config import AnchorConfig, BaseModelConfig, PriorConfig, PromptConfig
from priors.dataset import Example, PromptDataset
from priors.fit import batches, build_model, fit_anchor, fit_prior
from priors.judge import Measure, load_requests
from priors.prompt import Prompt, PromptCompiler
from semantic_ids.trie import Trie
from tests.priors.conftest import Fitted, random_ids, tiny_prior_config

BRIEF = TrainerConfig(max_epochs=2, patience=None, progress_bar=False, checkpoint_every=2)

KILLED = """
import os, signal, sys
from pathlib import Path
from priors.dataset import TreeCollator
from priors.fit import fit_prior
from tests.logs import tiny_log
from tests.priors.conftest import random_ids
from tests.priors.test_fit import resumed_config

folder, last_step = Path(sys.argv[1]), int(sys.argv[2])
from models.prior_lm import PriorLMModule
step = PriorLMModule.training_step

def dies(self, batch, batch_idx):
    if self.global_step == last_step:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch, batch_idx)

PriorLMModule.training_step = dies
log = tiny_log(folder)
fit_prior(log, random_ids(log), resumed_config(), work_dir=folder / "work")
"""


def resumed_config() -> PriorConfig:
    return tiny_prior_config(trainer=BRIEF, batch_size=6)


class _EnoughError(Exception):
    """The anchor is fitted, and the rest of the fit is not asked for."""


def test_the_anchor_is_fitted_without_a_word(fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the user-periods and the drawn targets of the training prompts, of which none is compiled for it."""
    cfg = tiny_prior_config(max_targets=2, seed=3)
    compiled, written = PromptCompiler.compile, []

    def compile_(self: PromptCompiler, user: int, period: int) -> Prompt:
        written.append((user, period))
        return compiled(self, user, period)

    def watched(counts: Counts, trie: Trie, train: PromptDataset, select: PromptDataset, anchor: AnchorConfig) -> None:
        base, metrics = fit_anchor(counts, trie, train, select, anchor)
        assert not written
        in_words = (
            PromptDataset(train.targets, fitted.prior.compiler, max_targets=2, seed=3),
            PromptDataset(select.targets, fitted.prior.compiler),
        )
        expected, figures = fit_anchor(counts, trie, *in_words, anchor)
        assert len(written) == len(train) + len(select)
        assert base.to_plain() == expected.to_plain()
        assert metrics == figures
        raise _EnoughError

    monkeypatch.setattr(PromptCompiler, "compile", compile_)
    monkeypatch.setattr("priors.fit.fit_anchor", watched)
    with pytest.raises(_EnoughError):
        fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path)


def curve(work_dir: Path) -> list[float]:
    lines = [json.loads(line) for line in (work_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train_nll"] for line in lines if "train_nll" in line]


def test_a_fit_ended_by_kill_9_has_the_loss_curve_of_an_undisturbed_one(fitted: Fitted, tmp_path: Path) -> None:
    """Killed in the second part, three steps after its last checkpoint."""
    whole, _ = fit_prior(fitted.log, fitted.ids, resumed_config(), work_dir=tmp_path / "whole")
    expected = curve(tmp_path / "whole")
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "7"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]
    assert len(curve(tmp_path / "work")) == 7 < len(expected)
    resumed, metrics = fit_prior(fitted.log, fitted.ids, resumed_config(), work_dir=tmp_path / "work")
    np.testing.assert_allclose(curve(tmp_path / "work"), expected, atol=1e-5)
    assert metrics["steps"] == len(expected)
    [requests] = load_requests(tmp_path / "work")
    trained, start = (requests.values[Measure("select_nll", arm)] for arm in ("lm", "start"))
    for_one_part = paired_bootstrap(trained, start, requests.user_R)
    assert metrics["start"]["select_change"]["low"] < for_one_part.low, "the best of two parts was chosen on them"
    for ours, theirs in (
        (whole.model.head, resumed.model.head),
        (whole.model.interest_head, resumed.model.interest_head),
    ):
        assert ours is not None
        assert theirs is not None
        for name, value in ours.state_dict().items():
            torch.testing.assert_close(theirs.state_dict()[name], value, atol=1e-6, rtol=0)


def untrained(fitted: Fitted, **base: Any) -> tuple[PriorLMModule, list[TreeBatch]]:
    """A module with a head that is not zero, and batches for it."""
    head = replace(fitted.cfg.head, dropout=0.0)
    cfg = replace(fitted.cfg, base=replace(fitted.cfg.base, **base), head=head)
    compiler = fitted.prior.compiler
    model = build_model(load_base_model(cfg.base), fitted.ids, fitted.log, compiler, cfg)
    model.head.load_state_dict(fitted.prior.model.head.state_dict())
    dataset = PromptDataset(fitted.log.advertiser_targets("prior_select"), compiler)
    return PriorLMModule(model.train()), list(batches(dataset, fitted.prior.collator, 8))[:2]


def gradients(module: PriorLMModule, batch: TreeBatch) -> dict[str, torch.Tensor]:
    module.zero_grad()
    log_probs = module.model.log_probs(batch)
    row_nll(batch, target_log_prob(batch, log_probs)).mean().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(fitted: Fitted) -> None:
    plain, tree = untrained(fitted)
    checkpointed, _ = untrained(fitted, gradient_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict(), strict=False)
    expected, found = gradients(plain, tree[0]), gradients(checkpointed, tree[0])
    assert expected.keys() == found.keys()
    assert any("lora_A" in name for name in expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)


def test_every_prompt_weighs_the_same_whatever_its_batch(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    """A divisor for all batches: the sum over batches of their losses is the sum over prompts."""
    module, _ = untrained(fitted)
    module.prompts_per_batch = 5.0
    monkeypatch.setattr(module, "log", lambda *args, **kwargs: None)
    dataset = PromptDataset(fitted.log.advertiser_targets("prior_select"), fitted.prior.compiler)
    losses = {
        size: sum(float(module.training_step(batch, 0)) for batch in batches(dataset, fitted.prior.collator, size))
        for size in (3, 16)
    }
    assert losses[3] == pytest.approx(losses[16], rel=1e-5)


def test_a_row_is_prompt_tree_and_padding(fitted: Fitted) -> None:
    collator, compiler = fitted.prior.collator, fitted.prior.compiler
    everyone = np.arange(len(fitted.log.advertiser_ids))
    long, short = (compiler.compile(user, period).token_ids for user, period in ((0, 9), (1, 1)))
    examples = [Example(0, 9, long, everyone[:1]), Example(1, 1, short, everyone)]
    batch = collator(examples)
    lengths = [collator.length(example) for example in examples]
    assert batch.input_ids_BT.shape == (2, max(lengths))
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        seen = batch.visible_BTT[row].sum(1)
        n_prompt = len(example.token_ids)
        assert seen[:n_prompt].tolist() == list(range(1, n_prompt + 1))
        # A code of level l sees the prompt and l codes, its own among them; padding itself alone.
        depth = batch.position_ids_BT[row, n_prompt:length] - n_prompt + 1
        assert torch.equal(seen[n_prompt:length], n_prompt + depth)
        assert (seen[length:] == 1).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"train": "full"},
        {"base": BaseModelConfig("packaged:tiny", dtype="float32", random_weights=True), "seed": 3},
        {"base": BaseModelConfig("packaged:tiny", random_weights=True), "train": "full", "seed": 3},
    ],
    ids=["full", "lora on random weights", "full from random weights"],
)
def test_what_is_trained_is_kept(fitted: Fitted, tmp_path: Path, changes: dict[str, Any]) -> None:
    cfg = tiny_prior_config(prompts=16, select_prompts=8, trainer=replace(BRIEF, max_epochs=1), **changes)
    prior, metrics = fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path / "work")
    with torch.no_grad():  # as if the fit had ended with what it learned
        for weight in prior.model.decoder.parameters():
            if weight.requires_grad:
                weight.add_(0.01)
    (tmp_path / "out").mkdir()
    prior.save(tmp_path / "out")
    loaded = PriorModel.load(tmp_path / "out", fitted.log, fitted.ids, cfg)
    batch = fitted.prior.collator([PromptDataset(fitted.log.advertiser_targets("prior_select"), prior.compiler)[0]])
    with torch.no_grad():
        for ours, theirs in zip(prior.model.log_probs(batch), loaded.model.log_probs(batch), strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)
    base, now = (model.decoder.state_dict() for model in (fitted.prior.model, prior.model))
    same = {name.split("model.")[-1]: value for name, value in base.items() if "lora" not in name}
    changed = [
        name for name, value in now.items()
        if "mlp" in name and not torch.equal(value.float(), same[name.split("model.")[-1]].float())
    ]  # fmt: skip
    assert changed
    in_full = sum(p.numel() for p in prior.model.decoder.parameters())
    assert (metrics["trainable_parameters"] >= in_full) == (cfg.train == "full")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_appended_layer_is_trained_and_kept(fitted: Fitted, tmp_path: Path, dtype: str) -> None:
    """Whatever the fit ends with, the weights of the layer are those that are loaded."""
    base = BaseModelConfig("packaged:tiny", dtype=dtype, appended_layer=True, id_rows="words+codebook")
    lora = replace(fitted.cfg.lora, rank=0, learning_rate=1e-3)
    cfg = tiny_prior_config(prompts=16, select_prompts=8, trainer=replace(BRIEF, max_epochs=1), base=base, lora=lora)
    prior, _ = fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path / "work")
    with torch.no_grad():  # as if the fit had ended with what it learned
        for parameter in [*last_layer(prior.model.decoder).parameters(), *prior.model.head.parameters()]:
            parameter.add_(0.05 * torch.randn_like(parameter))
    (tmp_path / "out").mkdir()
    prior.save(tmp_path / "out")
    loaded = PriorModel.load(tmp_path / "out", fitted.log, fitted.ids, cfg)
    ours, theirs = (last_layer(model.decoder).state_dict() for model in (prior.model, loaded.model))
    assert all(torch.equal(theirs[name], value) for name, value in ours.items())
    batch = prior.collator([PromptDataset(fitted.log.advertiser_targets("prior_select"), prior.compiler)[0]])
    with torch.no_grad():
        for mine, again in zip(prior.model.log_probs(batch), loaded.model.log_probs(batch), strict=True):
            torch.testing.assert_close(again, mine, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for name, p in prior.model.decoder.named_parameters() if "layers.0." in name)


def test_random_weights_are_those_of_their_seed() -> None:
    cfg = BaseModelConfig("packaged:tiny", random_weights=True)
    first, again, other = (load_base_model(cfg, seed=seed).decoder.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def saved_base(folder: Path, config: PretrainedConfig) -> str:
    """A model directory as ``prior.base.name`` takes it: random weights, the words of ``packaged:tiny``, no padding."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer = load_base_model(BaseModelConfig("packaged:tiny")).tokenizer
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return str(folder)


SIZES: dict[str, Any] = {"vocab_size": 30_522, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ATTENTION = ["q_proj", "v_proj"]
BASES: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "tied": (Qwen2Config(**SIZES, intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=True), ATTENTION),
    "untied": (LlamaConfig(**SIZES, intermediate_size=64, tie_word_embeddings=False), ATTENTION),
    "convolutions for linear layers": (GPT2Config(**SIZES), ["c_attn"]),
}


@pytest.mark.parametrize("name", BASES)
def test_a_model_directory_without_pad_token_is_fitted_and_loaded(fitted: Fitted, tmp_path: Path, name: str) -> None:
    config, targets = BASES[name]
    base = BaseModelConfig(saved_base(tmp_path / "base", config), dtype="float32")
    brief = {"prompts": 8, "select_prompts": 8, "trainer": replace(BRIEF, max_epochs=1)}
    cfg = tiny_prior_config(base=base, lora=replace(fitted.cfg.lora, targets=targets), **brief)
    prior, metrics = fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path / "work")
    assert prior.compiler.tokenizer.pad_token is None
    assert np.isfinite(metrics["select_nll_by_part"]).all()
    (tmp_path / "out").mkdir()
    prior.save(tmp_path / "out")
    loaded = PriorModel.load(tmp_path / "out", fitted.log, fitted.ids, cfg)
    batch = prior.collator([PromptDataset(fitted.log.advertiser_targets("prior_select"), prior.compiler)[0]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.hidden(batch), prior.model.hidden(batch))


def test_a_base_model_that_takes_no_tree_is_told_before_training(fitted: Fitted, tmp_path: Path) -> None:
    """Bloom's positions come from ALiBi over the columns, whatever a mask says."""
    bloom = BloomConfig(vocab_size=30_522, hidden_size=32, n_layer=2, n_head=4)
    base = BaseModelConfig(saved_base(tmp_path / "base", bloom), dtype="float32")
    cfg = tiny_prior_config(base=base, lora=replace(fitted.cfg.lora, targets=["query_key_value"]))
    with pytest.raises(UserError, match=r"prior\.base\.name=.*takes no 4-D attention mask"):
        fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path / "work")


PROBLEMS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "window": ({"prompt": PromptConfig(max_tokens=2000)}, UserError, r"max_tokens=2000.*1024 positions.*at most 1022"),
    "budget": ({"batch_tokens": 20}, UserError, r"batch_tokens=20.*longest prompt"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_cannot_be_fitted_is_told(fitted: Fitted, tmp_path: Path, name: str) -> None:
    changes, error, match = PROBLEMS[name]
    with pytest.raises(error, match=f"(?s){match}"):
        fit_prior(fitted.log, fitted.ids, tiny_prior_config(**changes), work_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train": "some"}, r"prior\.train=some"),
        ({"train": "full", "base": BaseModelConfig(dtype="bfloat16")}, r"train=full with prior\.base\.dtype=bfloat16"),
        ({"batch_tokens": 0}, r"prior\.batch_tokens=0"),
        ({"base": BaseModelConfig(id_rows="free")}, r"prior\.base\.id_rows=free"),
        ({"controls": ["constant_hidden", "mine"]}, r"(?s)prior\.controls=\[.constant_hidden., .mine.\].*correct mine"),
    ],
)
def test_a_config_that_cannot_be_is_told(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        PriorConfig(**changes)


def test_an_advertiser_without_an_id_is_told(fitted: Fitted, tmp_path: Path) -> None:
    ids = random_ids(fitted.log)
    fewer = replace(ids, advertiser_ids=ids.advertiser_ids[1:], codes_AL=ids.codes_AL[1:])
    with pytest.raises(LineageError, match=r"1 of the log without an ID, e\.g\. 100"):
        fit_prior(fitted.log, fewer, fitted.cfg, work_dir=tmp_path)


def test_an_artifact_whose_rows_do_not_fit_its_ids_is_told(fitted: Fitted, tmp_path: Path) -> None:
    fitted.prior.save(tmp_path)
    state = load_file(tmp_path / "head.safetensors")
    save_file(state | {"id_rows": state["id_rows"][:-1].contiguous()}, tmp_path / "head.safetensors")
    with pytest.raises(LineageError, match=r"\(11, 64\) input rows of ID tokens; codes and decoder ask \(12, 64\)"):
        PriorModel.load(tmp_path, fitted.log, fitted.ids, fitted.cfg)


def test_a_prompt_without_a_target_is_told(fitted: Fitted) -> None:
    example = Example(4, 7, np.array([5, 6]), np.zeros(0, np.int64))
    with pytest.raises(UserError, match="without a target: user 4, period 7"):
        fitted.prior.collator([example])


def test_a_tokenizer_without_pad_token_and_a_user_without_history_train_like_any(fitted: Fitted) -> None:
    """Padding is masked, so it needs no token; an empty history is a prompt that says so."""
    compiler = fitted.prior.compiler
    empty = Example(0, 1, compiler.compile(0, 1).token_ids, np.array([3]))
    full = Example(1, 9, compiler.compile(1, 9).token_ids, np.array([4, 5]))
    collator, model = fitted.prior.collator, fitted.prior.model
    pad, compiler.tokenizer.pad_token = compiler.tokenizer.pad_token, None
    try:
        with torch.no_grad():
            together = row_nll(batch := collator([empty, full]), target_log_prob(batch, model.log_probs(batch)))
            alone = row_nll(batch := collator([empty]), target_log_prob(batch, model.log_probs(batch)))
    finally:
        compiler.tokenizer.pad_token = pad
    assert together.isfinite().all()
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=1e-5)


def test_a_loss_that_is_no_number_names_its_prompts(fitted: Fitted, tmp_path: Path, monkeypatch: Any) -> None:
    step = PriorLMModule.training_step

    def broken(self: PriorLMModule, batch: TreeBatch, batch_idx: int) -> torch.Tensor:
        return step(self, batch, batch_idx) * (torch.nan if self.global_step == 4 else 1.0)

    monkeypatch.setattr(PriorLMModule, "training_step", broken)
    with pytest.raises(FloatingPointError, match=r"batch \d+ \(prompts of users u\d+ as of period \d, u\d+ as of"):
        fit_prior(fitted.log, fitted.ids, resumed_config(), work_dir=tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 4
    assert all(value.isfinite().all() for value in state["state_dict"].values())
