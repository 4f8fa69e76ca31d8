"""The exported causal LM: plain transformers and peft give our scores, and the card says what the manifest says."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import cli
from data.artifacts import Manifest, to_plain
from priors.export import as_causal_lm
from tests.logs import tiny_config
from tests.priors.conftest import Fitted


@pytest.fixture(scope="module")
def fitted(fitted: Fitted) -> Fitted:
    """Whatever the fit ended with, a head and adapters that say something."""
    model, generator = copy.deepcopy(fitted.prior.model), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    return replace(fitted, prior=replace(fitted.prior, model=model))


@pytest.fixture(scope="module")
def exported(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run")
    (run / "prior").mkdir()
    fitted.prior.save(run / "prior")
    config = {"prior": to_plain(fitted.cfg), "data": to_plain(tiny_config())}
    Manifest("prior", "", config=config, metrics=fitted.metrics, versions={"torch": "2"}).write(run / "prior")
    result = CliRunner().invoke(cli.app, ["priors", "export", "--run", str(run), "--out", str(run / "out")])
    assert result.exit_code == 0, result.output
    return run / "out"


@pytest.fixture(scope="module")
def loaded(exported: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(exported), exported / "id_bias").eval()


@torch.no_grad()
def test_logits_of_id_tokens_are_ours(fitted: Fitted, exported: Path, loaded: Any) -> None:
    """After the prompt, after a code, and after two."""
    tokenizer, model = AutoTokenizer.from_pretrained(exported), fitted.prior.model
    codes = fitted.ids.codes_AL[5]
    names = [f"<adv_{level + 1}_{code}>" for level, code in enumerate(codes[:2])]
    prompt = fitted.prior.compiler.compile(3, 9).token_ids.tolist()
    ids_BT = torch.tensor([prompt + tokenizer.convert_tokens_to_ids(names)])
    T = ids_BT.shape[1]
    hidden_TH = model.decoder(inputs_embeds=model.embed(ids_BT), use_cache=False).last_hidden_state[0]
    logits_TV = loaded(input_ids=ids_BT).logits[0]
    assert logits_TV.shape[1] == len(tokenizer) == model.first_id_token + sum(fitted.ids.level_sizes)
    start = model.first_id_token
    for level, size in enumerate(fitted.ids.level_sizes):
        at = T - 3 + level
        ours_V = model.head(hidden_TH[at : at + 1], level)[0]
        torch.testing.assert_close(logits_TV[at, start : start + size], ours_V, atol=1e-4, rtol=0)
        assert ours_V.abs().max() > 1e-3
        start += size


def test_names_of_ids_are_tokens_and_words_are_what_they_were(fitted: Fitted, exported: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported)
    text = "bread and coffee<adv_2_3>"
    assert tokenizer(text, add_special_tokens=False)["input_ids"][-1] == fitted.prior.compiler.first_id_token + 4 + 3
    base = fitted.prior.compiler.tokenizer
    assert tokenizer("bread and coffee")["input_ids"] == base("bread and coffee")["input_ids"]


@torch.no_grad()
@pytest.mark.parametrize("padded", [0, 5, 40])
def test_rows_that_the_vocabulary_has_to_spare_are_taken(fitted: Fitted, padded: int) -> None:
    """Many models have more rows than tokens: IDs are numbered after the tokens, in rows nobody used."""
    model = fitted.prior.model
    wide = replace_embedding(model, padded)
    causal, bias_V = as_causal_lm(wide, torch.zeros(model.first_id_token + padded, 64))
    n_ids = sum(fitted.ids.level_sizes)
    rows: Any = causal.get_input_embeddings().weight
    assert len(rows) == len(bias_V) == model.first_id_token + max(n_ids, padded)
    torch.testing.assert_close(rows[model.first_id_token :][:n_ids], model.id_rows.weight)
    assert not bias_V[: model.first_id_token].any()


def replace_embedding(model: Any, padded: int) -> Any:
    wide = copy.deepcopy(model)
    words = wide.word_embedding.weight.data
    base = wide.decoder.get_base_model()
    base.set_input_embeddings(torch.nn.Embedding.from_pretrained(torch.cat([words, torch.ones(padded, 64)])))
    base.config.vocab_size = len(words) + padded
    return wide


def test_the_card_says_what_the_manifest_says(fitted: Fitted, exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "`packaged:tiny`" in card
    assert "prior_fit [1, 5], prior_select [6, 6]" in card
    assert f"{fitted.metrics['select_nll_anchor']:.4f}" in card
    assert "adsid priors export" in card
    assert "nan" not in card
    assert "from random weights of its architecture" in card
    assert f"{fitted.metrics['start']['select_change']['value']:+.4f}" in card  # type: ignore[index]
    kept = "| Kept | the weights that training started from" in card
    assert kept == (fitted.metrics["best_part"] == -1)
    gain = fitted.metrics["anchor_cooccurrence_gain"]["value"]  # type: ignore[index]
    told = f"| Anchor | `{fitted.metrics['anchor_kind']}`: co-conversions change the NLL on the selection span by"
    assert f"{told} {gain:+.4f} (" in card
    assert "What the history vector adds" in card  # a forecast by these logits alone is not the forecaster's


def test_what_is_no_artifact_is_told(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["priors", "export", "--run", str(tmp_path), "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "manifest.json" in result.output
    assert not (tmp_path / "out").exists()
