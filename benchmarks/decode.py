"""Decoding beside its peers: Hugging Face `generate` under `prefix_allowed_tokens_fn`, and the prefill alone.

    python -m benchmarks.decode                 all
    python -m benchmarks.decode ours            without Hugging Face, whose beams take minutes
    python -m benchmarks.decode ours processor  on one core, in seconds of the processor: where others work too;
                                                two rounds, without beam 200

SmolLM2-135M in bf16, three levels, distinct prompts of 200 tokens, batches of 16, the same weights on all sides. Tries
are full, so that no beam is spared and a step does the same whatever their size: 50·10·2 advertisers, 50·50·40 and
100·100·100, each out of codebooks of 256. Users have 40 purchases each, whose advertisers the anchor counts. The peer
has the ID tokens in its vocabulary and walks a dictionary of prefixes.

    prefill             the decoder on the same prompts with a cache, no head: what no decoder can beat
    prompts/s           all of it: prompts read, beams, probabilities, lists, frontier, as numpy arrays
    constraint work     what is neither the decoder nor the head, as a share of all
    step                all but the prefill, a level below the first: there are two
    ceiling             200 / (200 + 2 · beam): every token at the price of a prompt's

Sides of a comparison are measured in turns, and the best of four rounds counts, for the machine may be shared. The
peer is measured once a row, after a warm-up: a call takes half a minute.

Bars: 0.75 of the prefill at beam 20 and 0.5 at beam 50, 30 times the peer at beam 20, a step at a million at most 1.2
times one at a thousand, constraint work at most 3 %.

Shapes: A advertisers, B prompts, T tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from time import perf_counter, process_time
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import row
from models.prior_lm import PriorLM
from pipeline.quiet import quiet_libraries
from priors.anchor import Anchor, AnchorConstants, Counts, TunedAnchor
from priors.base_model import load_base_model
from priors.calibration import Calibration
from priors.config import BaseModelConfig, DecodeConfig
from priors.decode import TreeDecoder
from priors.prompt import Prompt
from semantic_ids.trie import Trie

LENGTH, BATCH, ROUNDS, CODES, LEVELS = 200, 16, 4, 256, 3
FANOUT = {1_000: (50, 10, 2), 100_000: (50, 50, 40), 1_000_000: (100, 100, 100)}
BEAMS = (20, 50, 200)
PEER_BATCHES = (1, 2, 4, 8, 16)
USERS, PURCHASES, PERIOD = 64, 40, 3

Prompts = list[Prompt]


def main() -> None:
    """Measure ours in turns with the prefill, then the peer."""
    quiet_libraries()
    if _shares_the_machine():
        torch.set_num_threads(1)
    model, vocabulary = _model()
    rng = np.random.default_rng(0)
    prompts = [Prompt(rng.integers(1000, vocabulary - 1, LENGTH)) for _ in range(BATCH)]
    rates = _ours(model, prompts)
    _shared(model, prompts, rng)
    if "ours" not in sys.argv[1:]:
        _peer(model, prompts, vocabulary, rates)


def name_of(n: int) -> str:
    """A number of advertisers in words."""
    return f"{n // 1_000_000}M" if n >= 1_000_000 else f"{n // 1000}k"


def _ours(model: PriorLM, prompts: Prompts) -> dict[int, float]:
    """Rows of ours and of the prefill; returns prompts a second of each beam at 100k."""
    tries = {n: _trie(n) for n in FANOUT}
    clock = _Clock(model)
    prefill = _best({"prefill": lambda: _prefill(model, prompts)})["prefill"]
    rates = {}
    for beam in BEAMS[:2] if _shares_the_machine() else BEAMS:
        decoders = {n: _decoder(model, trie, beam) for n, trie in tries.items()}
        sides: dict[str, Callable[[], Any]] = {"prefill": partial(_prefill, model, prompts)}
        sides |= {name_of(n): partial(clock.watch, name_of(n), decoder, prompts) for n, decoder in decoders.items()}
        seconds = _best(sides)
        prefill = seconds["prefill"]
        row(f"prefill alone, beside beam {beam}", BATCH / prefill, "prompts/s")
        row(f"ceiling, beam {beam}", LENGTH / (LENGTH + (LEVELS - 1) * beam), "of the prefill")
        steps = {}
        for n in tries:
            name = name_of(n)
            rate = BATCH / seconds[name]
            row(f"{name} advertisers, beam {beam}", rate, "prompts/s", ratio=prefill / seconds[name])
            row(f"{name} advertisers, beam {beam}, constraint work", 100 * min(clock.share.pop(name)), "%")
            steps[n] = (seconds[name] - prefill) / (LEVELS - 1)
            row(f"{name} advertisers, beam {beam}, step", 1000 * steps[n], "ms")
            if n == 100_000:
                rates[beam] = rate
        row(
            f"step at 1M over step at 1k, beam {beam}",
            1000 * steps[1_000_000],
            "ms",
            ratio=steps[1_000_000] / steps[1000],
        )
        certified = np.mean([one.certified for one in _decode(decoders[100_000], prompts)])
        row(f"100k advertisers, beam {beam}, lists certified", float(certified), "share")
    return rates


def _shared(model: PriorLM, prompts: Prompts, rng: np.random.Generator) -> None:
    """Half of every prompt in common, read once for the job or with every prompt."""
    common = rng.integers(1000, 2000, LENGTH // 2)
    alike = [Prompt(np.concatenate([common, prompt.token_ids[LENGTH // 2 :]])) for prompt in prompts]
    once, each = (_decoder(model, _trie(100_000), 20) for _ in range(2))
    once.reader.share(common)
    seconds = _best({"once": lambda: _decode(once, alike), "each": lambda: _decode(each, alike)})
    row("100k advertisers, beam 20, 100 shared tokens read once", BATCH / seconds["once"], "prompts/s",
        ratio=seconds["each"] / seconds["once"])  # fmt: skip


def _peer(model: PriorLM, prompts: Prompts, vocabulary: int, rates: dict[int, float]) -> None:
    """Hugging Face's constrained beam search on the same weights."""
    peer = _causal_lm(model, vocabulary)
    for n in (1_000, 100_000):
        allowed = _allowed(_trie(n), model)
        _generate(peer, prompts[:1], allowed, beams=2)
        for beam in (20, 50):
            rate = BATCH / _seconds(partial(_generate, peer, prompts, allowed, beams=beam))
            row(f"Hugging Face, {name_of(n)} advertisers, beam {beam}, batches of {BATCH}", rate, "prompts/s")
            if n == 100_000:
                row(f"ours over Hugging Face, beam {beam}", rates[beam], "prompts/s", ratio=rates[beam] / rate)
    best = max(
        (batch / _seconds(partial(_generate, peer, prompts[:batch], allowed, beams=20)), batch)
        for batch in PEER_BATCHES
    )
    row(f"Hugging Face, 100k advertisers, beam 20, its best batches, of {best[1]}", best[0], "prompts/s")
    row("ours over Hugging Face at its best batches, beam 20", rates[20], "prompts/s", ratio=rates[20] / best[0])


def _model() -> tuple[PriorLM, int]:
    """SmolLM2 with a head and input rows of random numbers."""
    base = load_base_model(BaseModelConfig(dtype="bfloat16"))
    generator = torch.Generator().manual_seed(0)
    width = base.decoder.config.hidden_size
    model = PriorLM(
        base.decoder,
        codebooks=[torch.randn(CODES, 32, generator=generator) for _ in range(LEVELS)],
        id_rows=0.1 * torch.randn(LEVELS * CODES, width, generator=generator),
        first_id_token=len(base.tokenizer),
    ).eval()
    for projection in model.head.projections:
        nn.init.normal_(projection, std=0.05, generator=generator)
    return model, len(base.tokenizer)


def _trie(n: int) -> Trie:
    """A full trie of the fan-outs of a size, its codes scattered over the codebooks."""
    rng = np.random.default_rng(n)
    codes_LA = np.unravel_index(np.arange(n), FANOUT[n])
    codes = [
        np.sort(rng.choice(CODES, fan, replace=False))[code] for fan, code in zip(FANOUT[n], codes_LA, strict=True)
    ]
    return Trie.from_codes(np.stack(codes, axis=1), (CODES,) * LEVELS)


def _decoder(model: PriorLM, trie: Trie, beam: int) -> TreeDecoder:
    n, rng = trie.n_advertisers, np.random.default_rng(1)
    of_users, of_others = USERS * PURCHASES, 2 * n
    log: Any = SimpleNamespace(
        events=SimpleNamespace(
            user=np.concatenate([np.repeat(np.arange(USERS), PURCHASES), np.full(of_others, USERS)]),
            period=np.concatenate([np.ones(of_users, np.int64), rng.integers(1, PERIOD, of_others)]),
            advertiser=rng.integers(0, n, of_users + of_others),
        ),
        is_purchase=np.ones(of_users + of_others, bool),
        is_label=rng.random(of_users + of_others) < 0.5,
        advertiser_ids=np.arange(n),
        user_ids=np.arange(USERS + 1),
    )
    counts = Counts.of(log)
    base = TunedAnchor.untuned(Anchor(counts, AnchorConstants()), trie)
    cfg = DecodeConfig(beam=beam, top_k=min(50, beam))
    return TreeDecoder(model, base, Calibration.identity(LEVELS), cfg)


def _decode(decoder: TreeDecoder, prompts: Prompts) -> Any:
    return decoder.decode(prompts, np.arange(len(prompts)), np.full(len(prompts), PERIOD))


@torch.inference_mode()
def _prefill(model: PriorLM, prompts: Prompts) -> Any:
    ids = torch.from_numpy(np.stack([prompt.token_ids for prompt in prompts]))
    return model.decoder(input_ids=ids, past_key_values=DynamicCache(), use_cache=True).last_hidden_state


class _Clock:
    """Tells what the decoder and the head take from what is left."""

    def __init__(self, model: PriorLM) -> None:
        self.share: dict[str, list[float]] = {}
        self.inside, self._began = 0.0, 0.0
        for module in (model.decoder, model.head):
            module.register_forward_pre_hook(lambda *_: self._begin())
            module.register_forward_hook(lambda *_: self._end())

    def _begin(self) -> None:
        self._began = _now()

    def _end(self) -> None:
        self.inside += _now() - self._began

    def watch(self, name: str, decoder: TreeDecoder, prompts: Prompts) -> None:
        """Decode, and note under a name what share of the time is neither."""
        self.inside = 0.0
        seconds = _seconds(partial(_decode, decoder, prompts))
        self.share.setdefault(name, []).append(1 - self.inside / seconds)


def _best(sides: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Least seconds of each side, measured in turns after a warm-up."""
    for side in sides.values():
        side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(2 if _shares_the_machine() else ROUNDS):
        for name, side in sides.items():
            found[name].append(_seconds(side))
    return {name: min(values) for name, values in found.items()}


def _seconds(work: Callable[[], Any]) -> float:
    began = _now()
    work()
    return _now() - began


def _now() -> float:
    return process_time() if _shares_the_machine() else perf_counter()


def _shares_the_machine() -> bool:
    return "processor" in sys.argv[1:]


def _causal_lm(model: PriorLM, vocabulary: int) -> Any:
    """The same weights with a vocabulary head that knows the ID tokens."""
    decoder: Any = model.decoder
    peer: Any = LlamaForCausalLM(LlamaConfig(**decoder.config.to_dict() | {"tie_word_embeddings": True}))
    peer = peer.to(torch.bfloat16)
    peer.model.load_state_dict(decoder.state_dict())
    peer.resize_token_embeddings(vocabulary + LEVELS * CODES, mean_resizing=False)
    with torch.no_grad():
        peer.get_input_embeddings().weight[vocabulary:] = model.id_rows.weight.to(torch.bfloat16)
    return peer.eval()


def _allowed(trie: Trie, model: PriorLM) -> Callable[[int, torch.Tensor], list[int]]:
    """The peer's function: tokens that continue a prefix, from a dictionary."""
    following: dict[tuple[int, ...], set[int]] = {}
    tokens_LA = [
        model.id_token(level, torch.from_numpy(trie.child_code[level][trie.path_AL[:, level]])).tolist()
        for level in range(LEVELS)
    ]
    for path in zip(*tokens_LA, strict=True):
        for depth in range(LEVELS):
            following.setdefault(path[:depth], set()).add(path[depth])
    lists = {prefix: sorted(tokens) for prefix, tokens in following.items()}
    return lambda _, ids: lists.get(tuple(ids[LENGTH:].tolist()), [0])


@torch.inference_mode()
def _generate(peer: Any, prompts: Prompts, allowed: Any, *, beams: int) -> Any:
    ids = torch.from_numpy(np.stack([prompt.token_ids for prompt in prompts]))
    return peer.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=LEVELS,
        min_new_tokens=LEVELS,
        do_sample=False,
        prefix_allowed_tokens_fn=allowed,
        pad_token_id=0,
    )


if __name__ == "__main__":
    main()
