"""A fitted forecaster as a plain Hugging Face causal LM: ID tokens with ordinary rows, adapters merged.

    artifact (compact)                                   export (plain)
    base model by reference  ─┐
    adapter/ or decoder/      ├─► merged, float32 ─────► model.safetensors, config.json
    head: codebook · P_l      ├─► one row a code ──────► rows of lm_head
    its standardisation       ├─► one bias a code ─────► id_bias/, an adapter of lm_head
    input rows of ID tokens  ─┘                  ──────► rows of the input embedding
    tokenizer with <adv_l_c> ──────────────────────────► tokenizer.json …

The head scores standardised hidden states: ``W (h - mean) / scale`` is ``W' h + b``, with ``W' = W / scale`` and
``b = -W' mean``. Causal LMs have no bias in ``lm_head``, so ``b`` is the bias of a LoRA layer (peft's ``lora_bias``)
whose matrices are zero: any software that loads adapters adds it, and nothing else does it exactly.

The logits of ID tokens are the LM's residual. A forecast adds the anchor's scores, which differ from user to user,
weighs the two, and normalises over the legal children of a prefix; ``prior.json`` has the constants. What the history
vector adds (`priors.history`) is no function of the tokens, and not in the export.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from data.artifacts import Manifest, atomic_directory
from models.prior_lm import PriorLM
from priors.artifact import IDS, load_model, read_plain, with_id_tokens
from priors.base_model import vocabulary_head
from priors.card import model_card
from semantic_ids.advertiser_ids import AdvertiserIds

ID_BIAS = "id_bias"


def export_prior(artifact: Path, output: Path) -> None:
    """Write the artifact of the stage ``prior`` as a causal LM that ``transformers`` and ``peft`` load.

        model = AutoModelForCausalLM.from_pretrained(output)
        model = PeftModel.from_pretrained(model, f"{output}/id_bias")

    Args:
        artifact: directory of the stage, with its manifest.
        output: written whole or not at all.

    Raises:
        UserError: it is no finished artifact of that stage.
        LineageError: its parts do not fit each other.
    """
    manifest, plain = Manifest.read(artifact), read_plain(artifact)
    ids = AdvertiserIds.load(artifact / IDS)
    model, base_model, _ = load_model(artifact, plain, ids)
    plain_lm, bias_V = as_causal_lm(model, vocabulary_head(base_model))
    with atomic_directory(output) as directory:
        plain_lm.save_pretrained(directory)
        with_id_tokens(base_model.tokenizer, ids.level_sizes).save_pretrained(directory)
        _bias_adapter(plain_lm, bias_V).save_pretrained(str(directory / ID_BIAS), save_embedding_layers=False)
        shutil.copy2(artifact / "prior.json", directory / "prior.json")
        shutil.copytree(artifact / IDS, directory / IDS)
        card = model_card(manifest.config, manifest.metrics, manifest.versions, plain, exported=True)
        (directory / "README.md").write_text(card, encoding="utf-8")


def as_causal_lm(model: PriorLM, head_VH: Tensor) -> tuple[PreTrainedModel, Tensor]:
    """The forecaster with ordinary rows, in float32.

    Args:
        model: the forecaster; it is left as it is.
        head_VH: vocabulary head of the base model.

    Returns:
        The causal LM, and the bias of each of its logits, zero but for ID tokens.
    """
    decoder: Any = copy.deepcopy(model.decoder).float()
    if isinstance(decoder, PeftModel):
        decoder = decoder.merge_and_unload()
    words_VH = decoder.get_input_embeddings().weight.detach()
    first, n_ids = model.first_id_token, model.id_rows.num_embeddings
    config = copy.deepcopy(decoder.config)
    config.vocab_size, config.tie_word_embeddings = max(len(words_VH), first + n_ids), False
    causal: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    affine = [model.head.affine(level) for level in range(model.head.n_levels)]
    rows = {
        "input": (words_VH, model.id_rows.weight),
        "output": (head_VH.float(), torch.cat([rows_VH for rows_VH, _ in affine])),
    }
    for side, (of_words, of_ids) in rows.items():
        whole = torch.zeros(config.vocab_size, of_words.shape[1])
        whole[: len(of_words)] = of_words
        whole[first : first + n_ids] = of_ids.detach()
        layer = causal.get_input_embeddings() if side == "input" else causal.get_output_embeddings()
        layer.weight.data.copy_(whole)
    embedding = _name_of(decoder, decoder.get_input_embeddings())
    inner = {name: value for name, value in decoder.state_dict().items() if name != f"{embedding}.weight"}
    causal.base_model.load_state_dict(inner, strict=False)
    bias_V = torch.zeros(config.vocab_size)
    bias_V[first : first + n_ids] = torch.cat([bias for _, bias in affine]).detach()
    return causal.eval(), bias_V


def _bias_adapter(causal: PreTrainedModel, bias_V: Tensor) -> PeftModel:
    """An adapter that adds a bias to each logit and nothing else."""
    head = _name_of(causal, causal.get_output_embeddings())
    config = LoraConfig(r=1, lora_alpha=1, target_modules=[head], lora_bias=True, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(causal, config)
    layer = adapted.get_output_embeddings()
    with torch.no_grad():
        layer.lora_A["default"].weight.zero_()
        layer.lora_B["default"].weight.zero_()
        layer.lora_B["default"].bias.copy_(bias_V)
    return adapted


def _name_of(model: torch.nn.Module, wanted: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
