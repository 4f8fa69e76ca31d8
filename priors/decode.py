"""From prompts to advertisers with exact probabilities, at about the cost of the prompts alone.

The prompts of a batch are prefilled once. The beams of a user are further query tokens of the user's
own row under a tree mask, never copies of the cache, and only the rows of one level of the head are
multiplied:

    level 1   hidden of the prompt's end            → all level-1 codes of the user
    level 2   best K prefixes as K query tokens     → the legal codes below each
    level 3   best K of those as K query tokens     → advertisers

A prefix with a single advertiser below it needs no token: its probability is the advertiser's. Every
probability is a product of softmaxes over legal children, as in training; what a beam leaves behind
is kept as the *frontier*: pruned prefixes with their exact mass. Frontier and advertisers found are
disjoint and together sum to one.

Shapes: B prompts, T prompt tokens, K beams, C children of a prefix, Q query tokens, N_d nodes of
depth d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from data.errors import UserError
from models.prior_lm import PriorLM
from priors.anchor import TunedAnchor
from priors.calibration import Calibration
from priors.config import DecodeConfig


@dataclass(frozen=True)
class Decoded:
    """The forecast of one user-period.

    Attributes:
        advertiser_K: advertisers found, best first.
        log_prob_K: their exact log-probabilities.
        level1_log_prob_N: log-probability of every level-1 prefix, in trie order.
        frontier_depth_F: depth of each stored pruned prefix, at least 2.
        frontier_node_F: its node of the trie.
        frontier_log_prob_F: its log-probability.
        tokens: tokens computed for it, the prompt's included.
    """

    advertiser_K: NDArray[np.int64]
    log_prob_K: NDArray[np.float64]
    level1_log_prob_N: NDArray[np.float64]
    frontier_depth_F: NDArray[np.int64]
    frontier_node_F: NDArray[np.int64]
    frontier_log_prob_F: NDArray[np.float64]
    tokens: int

    @property
    def mass(self) -> float:
        """Probability covered by the advertisers found."""
        return float(np.exp(self.log_prob_K).sum())


class TreeDecoder:
    """Decodes prompts under a trie.

    Args:
        model: the fine-tuned LM.
        base: base scores and the trie.
        calibration: temperature of the logits and exponent of the base, a level.
        cfg: beam, length of the list, floor of the frontier.
    """

    def __init__(self, model: PriorLM, base: TunedAnchor, calibration: Calibration, cfg: DecodeConfig) -> None:
        self.model, self.base, self.trie, self.cfg = model.eval(), base, base.trie, cfg
        self.calibration = calibration
        device = self.device = next(model.parameters()).device
        trie = self.trie
        self._child_ptr = [torch.from_numpy(ptr).to(device) for ptr in trie.child_ptr]
        self._child_code = [torch.from_numpy(code).to(device) for code in trie.child_code]
        self._parent = [torch.from_numpy(parent).to(device) for parent in trie.parent]
        self._leaf_ptr = [torch.from_numpy(ptr).to(device) for ptr in trie.leaf_ptr]
        self._leaf_advertiser = torch.from_numpy(trie.leaf_advertiser).to(device)
        self._widest = [int(np.diff(ptr).max()) for ptr in trie.child_ptr]

    @torch.inference_mode()
    def decode(
        self, prompts: Sequence[NDArray[np.int64]], user_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> list[Decoded]:
        """Forecast a batch.

        Args:
            prompts: token ids of each prompt.
            user_B: whose anchor is the base of each.
            period_B: as-of periods.

        Returns:
            One forecast a prompt, in their order; none for no prompt.

        Raises:
            UserError: an empty prompt.
            FloatingPointError: the model gives no number for a prompt.
        """
        if not len(prompts):
            return []
        if min(len(prompt) for prompt in prompts) == 0:
            raise UserError("an empty prompt", expected="at least one token", action="raise prior.prompt.max_tokens")
        base = [torch.from_numpy(score).to(self.device) for score in self.base.child_scores(user_B, period_B)]
        state = self._prefill(prompts)
        node_BK = torch.zeros(len(prompts), 1, dtype=torch.long, device=self.device)
        log_prob_BK = torch.zeros(len(prompts), 1, dtype=torch.float64, device=self.device)
        found: list[tuple[Tensor, Tensor]] = []
        frontier: list[tuple[int, Tensor, Tensor]] = []
        level1 = torch.empty(0)
        for depth in range(self.trie.n_levels):
            child_BKC, child_log_prob_BKC = self._expand(depth, node_BK, log_prob_BK, state, base[depth])
            if depth == 0:
                level1 = child_log_prob_BKC[:, 0]
            flat_node, flat_log_prob = child_BKC.flatten(1), child_log_prob_BKC.flatten(1)
            if depth + 1 == self.trie.n_levels:
                found.append((self._leaf_advertiser[flat_node], flat_log_prob))
                break
            keep = min(self.cfg.beam, flat_log_prob.shape[1])
            ranked, order = flat_log_prob.sort(dim=1, descending=True, stable=True)
            node_BK, log_prob_BK = flat_node.gather(1, order[:, :keep]), ranked[:, :keep]
            if depth > 0:
                frontier.append((depth + 1, flat_node.gather(1, order[:, keep:]), ranked[:, keep:]))
            self._read(depth + 1, node_BK, log_prob_BK, state)
        return self._collect(found[0], level1, frontier, state)

    def _prefill(self, prompts: Sequence[NDArray[np.int64]]) -> _State:
        lengths = np.array([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        input_ids = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in enumerate(prompts):
            input_ids[row, : len(prompt)] = prompt
        length_B = torch.from_numpy(lengths).to(self.device)
        real_BT = torch.arange(width, device=self.device) < length_B[:, None]
        causal_TT = torch.ones(width, width, dtype=torch.bool, device=self.device).tril()
        itself_TT = torch.eye(width, dtype=torch.bool, device=self.device)
        cache = DynamicCache()
        hidden_BTH = self.model.extend(
            cache,
            torch.from_numpy(input_ids).to(self.device),
            torch.arange(width, device=self.device).expand(len(prompts), width),
            (causal_TT & real_BT[:, None]) | itself_TT,
        )
        hidden_BKH = hidden_BTH.gather(1, (length_B - 1)[:, None, None].expand(-1, 1, hidden_BTH.shape[-1]))
        return _State(
            cache=cache,
            length_B=length_B,
            visible_BT=real_BT,
            hidden_BKH=hidden_BKH,
            seen_BKT=real_BT[:, None],
            tokens_B=length_B.clone(),
            nodes_BK=torch.zeros(len(prompts), 1, dtype=torch.long, device=self.device),
        )

    def _expand(
        self, depth: int, node_BK: Tensor, log_prob_BK: Tensor, state: _State, base_BN: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Children of every beam with their log-probabilities; ``-inf`` past a prefix's last child."""
        first_BK, stop_BK = self._child_ptr[depth][node_BK], self._child_ptr[depth][node_BK + 1]
        child_BKC = first_BK[..., None] + torch.arange(self._widest[depth], device=self.device)
        legal_BKC = (child_BKC < stop_BK[..., None]) & log_prob_BK.isfinite()[..., None]
        child_BKC = child_BKC.clamp_max(len(self._child_code[depth]) - 1)
        logits_BKV = self.model.head(state.hidden_BKH.flatten(0, 1), depth).view(*node_BK.shape, -1)
        if not logits_BKV.isfinite().all():
            row = int((~logits_BKV.isfinite()).flatten(1).any(1).nonzero()[0])
            raise FloatingPointError(f"the LM gives no number for prompt {row} of the batch at level {depth + 1}")
        lm_BKC = logits_BKV.gather(2, self._child_code[depth][child_BKC]).double()
        base_BKC = base_BN.gather(1, child_BKC.flatten(1)).view_as(child_BKC)
        score_BKC = self.calibration.lm_weight[depth] * lm_BKC + self.calibration.base_exponent[depth] * base_BKC
        score_BKC = score_BKC.masked_fill(~legal_BKC, -torch.inf)
        total_BK1 = score_BKC.logsumexp(-1, keepdim=True)
        conditional_BKC = torch.where(legal_BKC, score_BKC - total_BK1, -torch.inf)
        return child_BKC, log_prob_BK[..., None] + conditional_BKC

    def _read(self, depth: int, node_BK: Tensor, log_prob_BK: Tensor, state: _State) -> None:
        """Let the LM read the beams that have something to decide; the others' hidden state is zero."""
        leaves_BK = self._leaf_ptr[depth][node_BK + 1] - self._leaf_ptr[depth][node_BK]
        asks_BK = (leaves_BK > 1) & log_prob_BK.isfinite()
        n_beams, n_query = node_BK.shape[1], max(1, int(asks_BK.sum(1).max()))
        # The beams that ask, moved to the front, are the query tokens; the rest of a row is padding.
        query_BQ = asks_BK.long().argsort(dim=1, descending=True, stable=True)[:, :n_query]
        real_BQ = asks_BK.gather(1, query_BQ)
        code_BQ = self._child_code[depth - 1][node_BK.gather(1, query_BQ)]
        parent_BK = self._beam_parents(depth, node_BK, state)
        context_BQT = state.seen_BKT.gather(
            1, parent_BK.gather(1, query_BQ)[..., None].expand(-1, -1, state.seen_BKT.shape[-1])
        )
        itself_BQQ = torch.eye(n_query, dtype=torch.bool, device=self.device).expand(len(node_BK), -1, -1)
        visible_BQT = torch.cat([context_BQT, itself_BQQ], -1)
        position_BQ = (state.length_B[:, None] + depth - 1).expand_as(code_BQ)
        hidden_BQH = self.model.extend(state.cache, self.model.id_token(depth - 1, code_BQ), position_BQ, visible_BQT)
        shape = (len(node_BK), n_beams, hidden_BQH.shape[-1])
        hidden_BKH = hidden_BQH.new_zeros(shape)
        seen_BKT = torch.zeros(*shape[:2], visible_BQT.shape[-1], dtype=torch.bool, device=self.device)
        state.hidden_BKH = hidden_BKH.scatter(
            1, query_BQ[..., None].expand_as(hidden_BQH), hidden_BQH * real_BQ[..., None]
        )
        state.seen_BKT = seen_BKT.scatter(
            1, query_BQ[..., None].expand_as(visible_BQT), visible_BQT & real_BQ[..., None]
        )
        state.nodes_BK = node_BK
        state.tokens_B = state.tokens_B + real_BQ.sum(1)

    def _beam_parents(self, depth: int, node_BK: Tensor, state: _State) -> Tensor:
        """Index of each beam's parent among the beams of the level before."""
        parent_BK = self._parent[depth - 1][node_BK]
        return (parent_BK[:, :, None] == state.nodes_BK[:, None, :]).long().argmax(-1)

    def _collect(
        self,
        found: tuple[Tensor, Tensor],
        level1: Tensor,
        frontier: list[tuple[int, Tensor, Tensor]],
        state: _State,
    ) -> list[Decoded]:
        advertiser, log_prob = (part.cpu().numpy() for part in found)
        pruned = [(depth, node.cpu().numpy(), value.cpu().numpy()) for depth, node, value in frontier]
        floor = np.log(self.cfg.frontier_floor)
        decoded = []
        for row in range(len(advertiser)):
            order = np.argsort(-log_prob[row], kind="stable")[: self.cfg.top_k]
            order = order[np.isfinite(log_prob[row, order])]
            kept = [(depth, node[row], value[row], value[row] > floor) for depth, node, value in pruned]
            decoded.append(
                Decoded(
                    advertiser_K=advertiser[row, order],
                    log_prob_K=log_prob[row, order],
                    level1_log_prob_N=level1[row].cpu().numpy(),
                    frontier_depth_F=np.concatenate(
                        [np.full(int(mask.sum()), depth) for depth, _, _, mask in kept] or [np.zeros(0, np.int64)]
                    ),
                    frontier_node_F=np.concatenate(
                        [node[mask] for _, node, _, mask in kept] or [np.zeros(0, np.int64)]
                    ),
                    frontier_log_prob_F=np.concatenate([value[mask] for _, _, value, mask in kept] or [np.zeros(0)]),
                    tokens=int(state.tokens_B[row]),
                )
            )
        return decoded


@dataclass
class _State:
    """What decoding carries from level to level.

    Attributes:
        cache: keys and values of prompts and beams.
        length_B: tokens of each prompt.
        visible_BT: real tokens of the prompts.
        hidden_BKH: hidden state at each beam.
        seen_BKT: cached tokens that each beam sees, itself included.
        tokens_B: tokens computed so far.
        nodes_BK: nodes of the beams.
    """

    cache: DynamicCache
    length_B: Tensor
    visible_BT: Tensor
    hidden_BKH: Tensor
    seen_BKT: Tensor
    tokens_B: Tensor
    nodes_BK: Tensor
