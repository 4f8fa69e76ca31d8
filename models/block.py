"""A layer appended to a decoder, which looks at the whole prompt evenly.

A forecaster asks for something else than the next word: not what a prompt ends with, but all that it lists. Block
expansion (LLaMA Pro, arXiv 2401.02415) appends layers to a decoder and trains them alone. The queries of this one are
zero at the start, so its attention is the mean over everything a token sees, and what it finds is added to the token
through a projection of random directions:

    h_t ─► norm ─► values ─► mean over the prompt, the prefix and t ─► output projection ─┬─► h'_t
      └───────────────────────────────────────────────────────────────────────────────────┘

The head over it starts at zero, so the untrained forecast stays the base. Below the layer nothing needs a gradient: a
prompt costs little more than a forward pass. The result is a plain decoder of the same family with one layer more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_QUERIES, _VALUES, _OUTPUT, _MLP_OUTPUT = "q_proj", "v_proj", "o_proj", "down_proj"


def append_layer(decoder: Any, *, seed: int = 0) -> nn.Module:
    """Append a layer, in place.

    Args:
        decoder: a Hugging Face decoder of Llama's kind: its layers have ``q_proj``, ``v_proj``, ``o_proj`` and
            ``down_proj``.
        seed: of its random directions.

    Returns:
        The layer, in float32 and trainable.

    Raises:
        ValueError: the decoder has no list of layers, or a layer has no such modules.
    """
    stack = _layers(decoder)
    layer = copy.deepcopy(stack[-1]).float().requires_grad_(True)
    linear = _linear(layer)
    missing = {_QUERIES, _VALUES, _OUTPUT, _MLP_OUTPUT} - linear.keys()
    if missing:
        raise ValueError(
            f"a layer of this decoder has no {', '.join(sorted(missing))}, but {', '.join(sorted(linear))}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name in (_QUERIES, _MLP_OUTPUT):
            for parameter in linear[name].parameters():
                parameter.zero_()
        for name in (_VALUES, _OUTPUT):
            nn.init.orthogonal_(linear[name].weight, generator=generator)
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, "layer_idx", len(stack))  # noqa: B010
    stack.append(layer)
    decoder.config.num_hidden_layers = len(stack)
    if getattr(decoder.config, "layer_types", None):
        decoder.config.layer_types = [*decoder.config.layer_types, decoder.config.layer_types[-1]]
    return layer


def balance(decoder: Any, read: Callable[[], object]) -> float:
    """Scale what the last layer adds until it is as long as what it is added to.

    The vectors of a trained decoder are hundreds of times as long as what a layer of random directions adds, so the
    head above would not see it.

    Args:
        decoder: whose last layer was appended and is not trained yet.
        read: lets the decoder read some prompts.

    Returns:
        The factor.
    """
    layer, lengths = last_layer(decoder), torch.zeros(2)

    def measure(module: nn.Module, args: Any, kwargs: Any, after: Tensor) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        added = after.float() - before.float()
        lengths.add_(torch.stack([before.float().norm(dim=-1).mean(), added.norm(dim=-1).mean()]).cpu())

    handle = layer.register_forward_hook(measure, with_kwargs=True)
    try:
        read()
    finally:
        handle.remove()
    factor = float(lengths[0] / lengths[1].clamp_min(1e-12))
    with torch.no_grad():
        _linear(layer)[_OUTPUT].weight.mul_(factor)
    return factor


def last_layer(decoder: Any) -> nn.Module:
    """The last layer of a decoder."""
    return _layers(decoder)[-1]


def _linear(layer: nn.Module) -> dict[str, nn.Linear]:
    named = layer.named_modules()
    return {path.split(".")[-1]: module for path, module in named if isinstance(module, nn.Linear)}


def _layers(decoder: Any) -> nn.ModuleList:
    n_layers = decoder.config.num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise ValueError(f"the decoder has no list of its {n_layers} layers")
