"""The reward stage: the forecaster is paid for its lists, and held near what it was before.

Group-relative policy optimisation (GRPO, arXiv 2402.03300) of the forecaster of `models.prior_lm`, with the position
reward of arXiv 2605.27856. The policy is the forecast as it is served, weights of LM and base included:

    prompt ─► G lists of K advertisers, drawn from the policy without replacement
           ─► reward of a list = sum over true advertisers in it of  0.1 (20 - i) + 2 [i <= 4],  i the zero-based place
           ─► advantage = (reward - mean of the G) / deviation of the G
    loss   =  - advantage · log P(list)  +  weight · KL(policy ‖ forecaster before the stage)

An ordered list drawn without replacement has the probability of Plackett and Luce,

    P(a_1 … a_K) = Π_j  P(a_j) / (1 - P(a_1) - … - P(a_{j-1}))

and each P(a) is the exact product of softmaxes down the trie. All advertisers of a prompt's G lists form one tree below
it, so prompt and shared prefixes are computed once for the whole group. Lists are drawn by the very weights that are
then changed, one step a draw: the ratio of GRPO's clipped objective is 1, and what is left is the policy gradient.

The KL is exact at every prefix of the tree, over all legal children, weighted by the probability of the prefix:

    KL(P ‖ Q) = Σ over prefixes of  P(prefix) · KL( P(· | prefix) ‖ Q(· | prefix) )

Prefixes outside the tree are left out, the unlikely ones; so it is at most the KL over all advertisers.

Shapes: B prompts, G lists of each, K advertisers of a list, Y advertisers of the trees, N decisions of one level, V
codes of that level.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.prior_lm import PriorLM, PriorLMModule, TreeBatch, target_log_prob, weighted_log_softmax

PAID, FIRST, BONUS = 20, 5, 2.0
"""Places of a list that are paid, those of them that are paid more, and how much more."""
_DEVIATION = 1e-4
"""Added to the deviation of a group, so that lists of one reward have no advantage."""


@dataclass(frozen=True)
class DrawnLists:
    """Lists drawn for the prompts of a batch.

    Attributes:
        tree: the prompts with one tree of all advertisers drawn for each.
        target_BGK: which of the tree's advertisers stands at each place of each list.
        reward_BG: of each list.
    """

    tree: TreeBatch
    target_BGK: Tensor
    reward_BG: Tensor

    def to(self, device: torch.device) -> DrawnLists:
        """The lists on another device."""
        return DrawnLists(self.tree.to(device), self.target_BGK.to(device), self.reward_BG.to(device))


def position_rewards(length: int) -> Tensor:
    """What a true advertiser earns at each place, ``0.1 (20 - i) + 2 [i <= 4]``; 0 past the twentieth. ``(length,)``"""
    place_K = torch.arange(length, dtype=torch.float64)
    return 0.1 * (PAID - place_K).clamp_min(0.0) + BONUS * (place_K < FIRST)


def list_log_prob(log_prob_GK: Tensor) -> Tensor:
    """Log-probability of ordered lists drawn without replacement.

    Args:
        log_prob_GK: of the advertisers of each list, in its order.

    Returns:
        ``(G,)``; the exponentials over all ordered lists of one length sum to 1. Float64, since 1 minus the mass drawn
        before may be small.
    """
    log_prob_GK = log_prob_GK.double()
    before_GK = log_prob_GK.exp().cumsum(-1).roll(1, -1)
    before_GK = torch.cat([torch.zeros_like(before_GK[..., :1]), before_GK[..., 1:]], -1)
    # What is left holds the advertiser drawn from it, whatever rounding says.
    left_GK = torch.maximum(1.0 - before_GK, log_prob_GK.exp())
    return (log_prob_GK - left_GK.log()).sum(-1)


def group_advantages(reward_BG: Tensor) -> Tensor:
    """How much better each list is than the others of its prompt, in deviations, ``(B, G)``."""
    centred_BG = reward_BG - reward_BG.mean(-1, keepdim=True)
    return centred_BG / (reward_BG.std(-1, keepdim=True) + _DEVIATION)


def tree_divergence(tree: TreeBatch, ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """KL(ours ‖ theirs) over the prefixes of each prompt's tree, ``(B,)``.

    Args:
        tree: the decisions; every one of them is on the way to a target.
        ours: log-probabilities of the codes at every decision, ``(N, V)`` a level.
        theirs: what they are compared with.
    """
    reached_Y = torch.zeros(len(tree.target_row_Y), device=tree.target_row_Y.device)
    total_B = torch.zeros(tree.n_prompts, device=reached_Y.device)
    for decisions, ours_NV, theirs_NV in zip(tree.levels, ours, theirs, strict=True):
        decided_D = (decisions.target_node_Y >= 0).nonzero()[:, 0]
        node_D = decisions.target_node_Y[decided_D]
        # Targets below one prefix agree in how it is reached: any of them tells.
        of_node_N = torch.zeros(len(ours_NV), dtype=torch.long, device=node_D.device).scatter(0, node_D, decided_D)
        legal_NV = decisions.base_NV.isfinite()
        difference_NV = (ours_NV - theirs_NV).masked_fill(~legal_NV, 0.0)
        divergence_N = (ours_NV.exp() * difference_NV).sum(-1)
        total_B = total_B.index_add(0, decisions.row_N, reached_Y[of_node_N].exp() * divergence_N)
        taken_D = ours_NV[node_D, decisions.target_code_Y[decided_D]]
        reached_Y = reached_Y.index_add(0, decided_D, taken_D)
    return total_B


class RewardModule(PriorLMModule):
    """Trains a :class:`~models.prior_lm.PriorLM` on the reward of its own lists.

    The model stays in evaluation mode: lists have to come from the very distribution whose gradient is taken, so no
    feature is dropped.

    Args:
        model: the forecaster, trained in place.
        reference: the same before the stage; its weights are not touched.
        draw: draws lists for the prompts of a batch from the model as it is.
        lm_weights, base_exponents: of each level, as the forecast is served.
        kl_weight: of the KL to the reference.
        **rates: as of :class:`~models.prior_lm.PriorLMModule`.
    """

    def __init__(
        self,
        model: PriorLM,
        reference: PriorLM,
        draw: Callable[[Any], DrawnLists],
        *,
        lm_weights: tuple[float, ...],
        base_exponents: tuple[float, ...],
        kl_weight: float,
        **rates: Any,
    ) -> None:
        super().__init__(model.eval(), **rates)
        self.reference = reference.eval().requires_grad_(False)
        self.draw, self.kl_weight = draw, kl_weight
        self.lm_weights, self.base_exponents = lm_weights, base_exponents

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        drawn = self.draw(batch).to(self.device)
        ours = self.log_probs(self.model, drawn.tree)
        with torch.no_grad():
            theirs = self.log_probs(self.reference, drawn.tree)
        log_prob_BG = list_log_prob(target_log_prob(drawn.tree, ours)[drawn.target_BGK])
        gain = (group_advantages(drawn.reward_BG) * log_prob_BG).mean()
        divergence = tree_divergence(drawn.tree, ours, theirs).mean()
        for name, value in (("train_reward", drawn.reward_BG.mean()), ("train_kl", divergence.detach())):
            self.log(name, value, batch_size=drawn.tree.n_prompts, prog_bar=True)
        return self.kl_weight * divergence - gain

    def log_probs(self, model: PriorLM, tree: TreeBatch) -> list[Tensor]:
        """Log-probabilities of the codes at every decision as they are served, ``(N, V)`` a level."""
        hidden_BTH, found = model.hidden(tree), []
        for level, decisions in enumerate(tree.levels):
            logit_NV = model.scores(tree.states(hidden_BTH, decisions), level, decisions)
            exponent, weight = self.base_exponents[level], self.lm_weights[level]
            found.append(weighted_log_softmax(decisions.base_NV, exponent, logit_NV=logit_NV, lm_weight=weight))
        return found

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # prompts on the CPU; the lists drawn for them are moved
