"""Forecasters of random weights over random IDs, and what they say by plain computation: one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.log import Placements
from models.prior_lm import PriorLM
from priors.anchor import Anchor, AnchorConstants, Counts, TunedAnchor
from priors.base_model import load_base_model
from priors.calibration import Calibration
from priors.config import BaseModelConfig, DecodeConfig
from priors.decode import TreeDecoder
from priors.prompt import Prompt
from semantic_ids.trie import Trie

N_USERS, N_PERIODS, HISTORY = 6, 5, 4
NOTHING_RUNS = Placements(
    market_ptr=np.zeros(1, np.int64),
    first=np.zeros(0, np.int32),
    ptr=np.zeros(1, np.int64),
    ad=np.zeros(0, np.int32),
    display=np.zeros(0, np.int16),
    mailer=np.zeros(0, np.int16),
)


@dataclass
class World:
    """A forecaster and prompts to ask it.

    Attributes:
        model, base, calibration: the forecaster.
        prompts, user_B, period_B: what it is asked.
    """

    model: PriorLM
    base: TunedAnchor
    calibration: Calibration
    prompts: list[Prompt]
    user_B: NDArray[np.int64]
    period_B: NDArray[np.int64]
    rng: np.random.Generator = field(repr=False)

    @property
    def n_advertisers(self) -> int:
        return self.base.trie.n_advertisers

    def decoder(self, **changes: Any) -> TreeDecoder:
        return TreeDecoder(self.model, self.base, self.calibration, DecodeConfig(**changes))

    @property
    def asked(self) -> tuple[list[Prompt], NDArray[np.int64], NDArray[np.int64]]:
        return self.prompts, self.user_B, self.period_B


@cache
def tiny_decoder() -> Any:
    return load_base_model(BaseModelConfig("packaged:tiny", dtype="float32")).decoder


def world(
    codes_AL: NDArray[np.integer],
    sizes: tuple[int, ...],
    *,
    seed: int = 0,
    lengths: tuple[int, ...] = (5, 1, 12),
    decoder: Any = None,
) -> World:
    """A forecaster whose LM, anchor, exponents, biases and temperatures are all random."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    decoder = tiny_decoder() if decoder is None else decoder
    width, vocabulary = decoder.config.hidden_size, decoder.config.vocab_size
    model = PriorLM(
        decoder,
        codebooks=[torch.randn(size, 6, generator=generator) for size in sizes],
        id_rows=torch.randn(sum(sizes), width, generator=generator),
        first_id_token=vocabulary,
        head="tied+free",
        history_size=HISTORY,
        repeats=True,
    ).eval()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    trie = Trie.from_codes(codes_AL, sizes)
    base = TunedAnchor(
        anchor=Anchor(
            with_plan(counts(len(codes_AL), rng), rng),
            AnchorConstants(0.4, 0.9, 0.8, 0.3, plan_exponent=0.7, own_shrinkage=4.0),
        ),
        trie=trie,
        exponent_L=rng.uniform(0.5, 1.5, len(sizes)),
        bias_LV=[rng.normal(size=size) for size in sizes],
    )
    calibration = Calibration(tuple(rng.uniform(0.5, 1.5, len(sizes))), tuple(rng.uniform(0.5, 1.5, len(sizes))))
    prompts = [
        Prompt(rng.integers(0, vocabulary, length), history_F=rng.normal(size=HISTORY).astype(np.float32))
        for length in lengths
    ]
    user_B, period_B = rng.integers(0, N_USERS, len(lengths)), rng.integers(0, N_PERIODS + 2, len(lengths))
    return World(model, base, calibration, prompts, user_B, period_B, rng)


def counts(n_advertisers: int, rng: np.random.Generator) -> Counts:
    """Random purchases, six in ten of them promoted; user 0 has none."""
    n_events = rng.poisson(N_USERS * N_PERIODS * n_advertisers * 0.2)
    user, period = np.sort(rng.integers(1, N_USERS, n_events)), rng.integers(1, N_PERIODS, n_events)
    log: Any = SimpleNamespace(
        events=SimpleNamespace(
            user=user,
            counted_period=period,
            advertiser=rng.integers(0, n_advertisers, n_events),
        ),
        is_purchase=np.ones(n_events, bool),
        is_label=rng.random(n_events) < 0.6,
        advertiser_ids=np.arange(n_advertisers),
        user_ids=np.arange(N_USERS),
        ad_advertiser=np.zeros(0, np.int32),
        placements=NOTHING_RUNS,
        last_period=N_PERIODS,
        next_ads=np.zeros(0, np.int32),
    )
    return Counts.of(log)


def with_plan(counted: Counts, rng: np.random.Generator) -> Counts:
    """The same counts beside a random plan of campaigns."""
    n_periods, n_advertisers = counted.promoted_PA.shape
    return replace(counted, plan_PA=rng.normal(size=(n_periods + 1, n_advertisers)))


@torch.inference_mode()
def brute_force(w: World, active_BA: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Log-probability of every advertiser, ``(B, A)``: every prefix is a sequence of its own, without a cache."""
    trie, n_rows = w.base.trie, len(w.prompts)
    active_BA = np.ones((n_rows, trie.n_advertisers), bool) if active_BA is None else active_BA
    with np.errstate(divide="ignore", invalid="ignore"):
        q_BA, own_BA = (part_BA * active_BA for part_BA in w.base.anchor.parts(w.user_B, w.period_B))
        scores = w.base.scores_of(q_BA)
    log_prob_BN = np.zeros((n_rows, 1))
    paths = np.zeros((1, 0), np.int64)
    for depth in range(trie.n_levels):
        below_BN = np.full((n_rows, trie.n_nodes(depth + 1)), -np.inf)
        legal_BN = trie.node_mass(active_BA.astype(float), depth + 1) > 0
        for row, prompt in enumerate(w.prompts):
            sequences = torch.from_numpy(np.column_stack([np.tile(prompt.token_ids, (len(paths), 1)), paths]))
            hidden = w.model.decoder(inputs_embeds=w.model.embed(sequences), use_cache=False).last_hidden_state[:, -1]
            if prompt.history_F is not None:
                history_NF = torch.from_numpy(np.tile(prompt.history_F, (len(paths), 1)))
                hidden = torch.cat([hidden, history_NF], 1)
            ends = [w.model.head(hidden, depth, torch.full((1, 1), share)).double().numpy() for share in (0.0, 1.0)]
            for node in range(trie.n_nodes(depth)):
                children = np.arange(trie.child_ptr[depth][node], trie.child_ptr[depth][node + 1])
                children = children[legal_BN[row, children]]
                if not len(children):
                    continue
                below = [np.flatnonzero(trie.path_AL[:, depth] == child) for child in children]
                repeat = np.array([own_BA[row, part].sum() / q_BA[row, part].sum() for part in below])
                new, bought = (end_NV[node, trie.child_code[depth][children]] for end_NV in ends)
                score = w.calibration.lm_weight[depth] * ((1 - repeat) * new + repeat * bought)
                score = score + w.calibration.base_exponent[depth] * scores[depth][row, children]
                total = np.log(np.exp(score - score.max()).sum()) + score.max()
                below_BN[row, children] = log_prob_BN[row, node] + score - total
        tokens = w.model.id_token(depth, torch.from_numpy(trie.child_code[depth])).numpy()
        paths = np.column_stack([paths[trie.parent[depth]], tokens])
        log_prob_BN = below_BN
    return log_prob_BN[:, trie.advertiser_leaf]
