"""An appended layer: evenly over what a token sees, and a plain decoder still."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

from models.block import append_layer, last_layer

TOKENS = torch.tensor([[3, 7, 1, 9, 4]])


def llama() -> LlamaModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaModel(config).eval()


def test_what_it_adds_is_the_mean_of_the_values_of_all_tokens_so_far() -> None:
    decoder = llama()
    layer: Any = append_layer(decoder)
    seen: dict[str, torch.Tensor] = {}
    layer.input_layernorm.register_forward_hook(lambda module, given, out: seen.update(normed=out, before=given[0]))
    layer.register_forward_hook(lambda module, given, out: seen.update(after=out))
    with torch.no_grad():
        decoder(input_ids=TOKENS)
        values = layer.self_attn.v_proj(seen["normed"])[0].view(5, 2, 4).repeat_interleave(2, 1).view(5, 16)
        means = values.cumsum(0) / torch.arange(1, 6)[:, None]
        torch.testing.assert_close((seen["after"] - seen["before"])[0], layer.self_attn.o_proj(means))


def test_layers_below_are_as_they_were_and_it_is_saved_as_a_plain_decoder(tmp_path: Path) -> None:
    decoder = llama()
    before = copy.deepcopy(decoder.state_dict())
    append_layer(decoder)
    assert all(torch.equal(decoder.state_dict()[name], value) for name, value in before.items())
    decoder.save_pretrained(tmp_path)
    again = LlamaModel.from_pretrained(tmp_path).eval()
    assert again.config.num_hidden_layers == 3
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS).last_hidden_state, decoder(TOKENS).last_hidden_state)


def test_it_reads_a_cache_as_it_reads_the_whole() -> None:
    decoder = llama()
    append_layer(decoder)
    with torch.no_grad():
        cache = decoder(TOKENS[:, :3], use_cache=True).past_key_values
        rest = decoder(TOKENS[:, 3:], past_key_values=cache, use_cache=True).last_hidden_state
        torch.testing.assert_close(rest, decoder(TOKENS).last_hidden_state[:, 3:])


def test_only_it_learns_where_the_rest_is_frozen() -> None:
    decoder: Any = llama().requires_grad_(False)
    append_layer(decoder)
    decoder(TOKENS).last_hidden_state.square().sum().backward()
    learns = {id(parameter) for parameter in last_layer(decoder).parameters()}
    assert {id(p) for p in decoder.parameters() if p.grad is not None and p.grad.any()} <= learns


def test_a_decoder_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no down_proj, o_proj, q_proj, v_proj"):
        append_layer(GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11)))
