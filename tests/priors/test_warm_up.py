"""Words and IDs of advertisers, both ways, before the fine-tuning."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import UserError
from models.prior_alignment import IGNORED, AlignmentModule, id_nll, text_nll
from models.prior_lm import LoraSettings, PriorLM
from models.training import TrainerConfig
from priors.anchor import Anchor, AnchorConstants, TunedAnchor
from priors.base_model import BaseModel, load_base_model, vocabulary_head
from priors.config import BaseModelConfig, PriorConfig, WarmUpConfig
from priors.dataset import TreeCollator
from priors.fit import build_model, fit_prior
from priors.prompt import PromptCompiler
from priors.warm_up import AlignmentCollator, align, warm_up
from tests.priors.conftest import Fitted, tiny_prior_config

BRIEF = TrainerConfig(max_epochs=2, patience=None, progress_bar=False, checkpoint_every=2)
LORA = LoraSettings(rank=8, learning_rate=3e-3)


def warm_config(warm: WarmUpConfig | None = None, **changes: Any) -> PriorConfig:
    warm = WarmUpConfig(prompts=48, held_out=6, batch_size=8) if warm is None else warm
    return tiny_prior_config(**({"trainer": BRIEF, "lora": LORA, "warm_up": warm} | changes))


def built(fitted: Fitted, cfg: PriorConfig) -> tuple[PriorLM, BaseModel, PromptCompiler]:
    base_model, compiler = load_base_model(cfg.base), fitted.prior.compiler
    return build_model(base_model, fitted.ids, fitted.log, compiler, cfg), base_model, compiler


def run(fitted: Fitted, cfg: PriorConfig, work_dir: Path) -> tuple[PriorLM, Any]:
    model, base_model, compiler = built(fitted, cfg)
    anchor = fitted.prior.base
    told = warm_up(model, base_model, compiler, anchor.anchor.counts, anchor.trie, cfg, work_dir=work_dir)
    return model, told


def collator_of(fitted: Fitted) -> AlignmentCollator:
    anchor = Anchor(fitted.prior.base.anchor.counts, AnchorConstants(own_weight=0.0))
    uniform = TunedAnchor.uniform(anchor, fitted.prior.base.trie)
    return AlignmentCollator(TreeCollator(uniform, first_id_token=fitted.prior.compiler.first_id_token))


def test_both_ways_are_words_and_the_id(fitted: Fitted) -> None:
    compiler = fitted.prior.compiler
    found = align(compiler, WarmUpConfig(prompts=1, to_text="One{id} sells {words}"))
    one = found[3]
    text = fitted.log.tables.advertisers["text"][3]
    assert compiler.tokenizer.decode(one.to_id.token_ids) == f"sells {text}. advertiser :"
    assert one.to_id.targets.tolist() == [3]
    ids = compiler.id_tokens(3)
    at = one.tokens.tolist().index(ids[0])
    assert one.tokens[at : at + len(ids)].tolist() == ids
    assert compiler.tokenizer.decode(one.tokens[:at]) == "one"
    assert compiler.tokenizer.decode(one.tokens[-one.words :]) == text
    batch = collator_of(fitted)([found[3], found[4]])
    asked = batch.label_BT[0] != IGNORED
    assert batch.label_BT[0][asked].tolist() == one.tokens[-one.words :].tolist()
    assert batch.input_ids_BT[0][asked][1:].tolist() == one.tokens[-one.words : -1].tolist()


def test_a_text_is_cut_to_its_budget_and_none_leaves_the_name(fitted: Fitted) -> None:
    compiler = copy.copy(fitted.prior.compiler)
    table = fitted.log.tables.advertisers
    texts = [None, " ", *table["text"].to_list()[2:]]
    names = ["the name", None, *table["name"].to_list()[2:]]
    advertisers = table.with_columns(type(table["text"])("text", texts), type(table["name"])("name", names))
    tables = replace(fitted.log.tables, advertisers=advertisers)
    compiler.log = copy.copy(fitted.log)
    object.__setattr__(compiler.log, "tables", tables)
    found = align(compiler, WarmUpConfig(prompts=1, max_tokens=2))
    assert compiler.tokenizer.decode(found[0].tokens[-found[0].words :]) == "the name"
    assert 1 not in found, "it has no words at all"
    assert max(one.words for one in found.values()) == 2


def test_losses_are_those_of_one_advertiser_at_a_time(fitted: Fitted) -> None:
    cfg = warm_config()
    model, base_model, compiler = built(fitted, cfg)
    for weight in model.head.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(0))
    found, collator, rows_VH = align(compiler, cfg.warm_up), collator_of(fitted), vocabulary_head(base_model)
    few = [found[advertiser] for advertiser in (0, 1, 7)]
    with torch.no_grad():
        together = collator(few)
        to_id, to_text = id_nll(model.eval(), together), text_nll(model, together, rows_VH)
        for row, one in enumerate(few):
            alone = collator([one])
            torch.testing.assert_close(id_nll(model, alone)[0], to_id[row], atol=1e-5, rtol=1e-5)
            hidden = model.decoder(inputs_embeds=model.embed(torch.from_numpy(one.tokens)[None])).last_hidden_state[0]
            log_probs = (hidden @ rows_VH.T).log_softmax(-1)
            asked = np.arange(len(one.tokens) - one.words, len(one.tokens))
            expected = -log_probs[asked - 1, torch.from_numpy(one.tokens)[asked]].mean()
            torch.testing.assert_close(to_text[row], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("train_input_rows", [False, True])
def test_it_trains_what_is_below_the_head_and_nothing_else(
    fitted: Fitted, tmp_path: Path, train_input_rows: bool
) -> None:
    base = BaseModelConfig("packaged:tiny", dtype="float32", train_input_rows=train_input_rows)
    cfg = warm_config(WarmUpConfig(prompts=240, held_out=6, batch_size=8), base=base)
    before, _, _ = built(fitted, cfg)
    model, told = run(fitted, cfg, tmp_path)
    changed = {name for name, value in before.state_dict().items() if not torch.equal(value, model.state_dict()[name])}
    assert changed
    assert {name for name in changed if "lora_" not in name} == ({"id_rows.weight"} if train_input_rows else set())
    assert not model.training
    assert told["advertisers"] == len(fitted.log.advertiser_ids) - 6
    assert told["held_out"] == 6
    assert told["held_out_to_text_nll"]["after"] < told["held_out_to_text_nll"]["before"] - 0.1


def test_one_that_was_cut_short_goes_on_where_it_was(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = run(fitted, warm_config(), tmp_path / "whole")
    step = AlignmentModule.training_step

    def dies(self: AlignmentModule, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 3:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(AlignmentModule, "training_step", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(fitted, warm_config(), tmp_path / "cut")
    monkeypatch.setattr(AlignmentModule, "training_step", step)
    resumed, told = run(fitted, warm_config(), tmp_path / "cut")
    assert told == expected
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)


@pytest.mark.parametrize("probe", [0, 16])
def test_the_fine_tuning_starts_from_it_at_the_anchor(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: int
) -> None:
    """Its adapters are there; its head is not, so that nothing is said yet beyond the anchor."""
    cfg = warm_config(prompts=16, select_prompts=8)
    cfg.probe.prompts, cfg.history.prompts = probe, 0
    prior, metrics = fit_prior(fitted.log, fitted.ids, cfg, work_dir=tmp_path)
    assert metrics["warm_up"]["prompts"] == 48
    if not probe:
        assert metrics["start"]["select_nll"] == pytest.approx(metrics["select_nll_anchor"], abs=1e-5)
    lora = [value for name, value in prior.model.named_parameters() if "lora_B" in name]
    assert any(value.abs().max() > 1e-3 for value in lora)


def test_a_loss_that_is_no_number_names_its_advertisers(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = AlignmentModule.training_step
    monkeypatch.setattr(AlignmentModule, "training_step", lambda *args: step(*args) * torch.nan)
    with pytest.raises(FloatingPointError, match=r"\(advertisers 1\d\d, 1\d\d"):
        run(fitted, warm_config(), tmp_path)


def test_no_prompts_leave_it_out(fitted: Fitted, tmp_path: Path) -> None:
    _, told = run(fitted, warm_config(WarmUpConfig()), tmp_path / "work")
    assert told is None
    assert not (tmp_path / "work").exists()


def test_advertisers_without_words_are_told(fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("priors.warm_up.align", lambda *_: {})
    with pytest.raises(UserError, match=r"0 advertisers that have a text or a name"):
        run(fitted, warm_config(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prompts": -1}, r"warm_up\.prompts=-1"),
        ({"max_tokens": 0}, r"warm_up\.max_tokens=0"),
        ({"held_out": 0}, r"warm_up\.held_out=0"),
        ({"text_weight": -1.0}, r"warm_up\.text_weight=-1"),
        ({"to_id": "Sells things:"}, r"warm_up\.to_id='Sells things:'"),
        ({"to_id": "Advertiser of {words}"}, r"warm_up\.to_id=.*words after it"),
        ({"to_text": "{words} from {id}"}, r"warm_up\.to_text=.*at the end"),
        ({"to_text": "{id} is {name}, sells {words}"}, r"warm_up\.to_text="),
    ],
)
def test_a_config_that_cannot_be_is_told(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=f"(?s){match}"):
        WarmUpConfig(**changes)


def test_a_warm_up_that_would_leave_nothing_behind_is_told() -> None:
    with pytest.raises(UserError, match=r"warm_up\.prompts=8 with prior\.lora\.rank=0"):
        PriorConfig(warm_up=WarmUpConfig(prompts=8), lora=LoraSettings(rank=0))
