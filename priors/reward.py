"""The reward stage: after the fine-tuning, the forecaster is trained on the reward of its own lists.

    prior_fit prompts ─► lists drawn from the forecaster ─► reward ─► policy gradient     (`models.prior_reward`)
                              └───────── KL to the fine-tuned one ─────────┘
    prior_select prompts ─► lists and likelihood of both, prompt by prompt ─► what the result is taken for

A list is paid for every advertiser in it that the user converted with in the period: with several of them it earns the
sum, as the one true advertiser of arXiv 2605.27856 earns its place. The stage ends with its last weights; none are
chosen on the selection prompts, so that these can judge. Probabilities and ranking features stay those of before the
stage, unless the likelihood after it is no worse:

    recall@20 of its exact list, after - before, 95 % interval over users      NLL, after - before      taken for
    not above 0                                                                any                      none
    above 0                                                                    above 0                  lists
    above 0                                                                    not above 0              all

Shapes: B prompts, G lists of each, K advertisers of a list, R prompts that judge, T targets.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from data.artifacts import to_plain
from data.log import Log
from data.statistics import Interval, bootstrap_mean, paired_bootstrap
from models.prior_lm import PriorLM
from models.prior_reward import PAID, DrawnLists, RewardModule, position_rewards
from models.training import TokenBatchSampler, fit, token_budget
from priors.anchor import TunedAnchor, mean_target_nll
from priors.artifact import ALL, FOR_LISTS, NOTHING, PriorModel
from priors.base_model import quick_attention
from priors.calibration import Calibration
from priors.config import DecodeConfig, PriorConfig, RewardConfig
from priors.dataset import Example, PromptDataset, TreeCollator
from priors.decode import TreeDecoder
from priors.evaluate import exact_log_prob
from priors.fit import batches, logits_at_decisions, sample_rows, selection_rows
from priors.metrics import recall_at_k
from priors.sampling import TreeSampler

Float = NDArray[np.float64]
_SEED = 7
"""Added to the seed, so that the prompts are others than those of the fine-tuning where there are more."""


def fit_reward(
    prior: PriorModel, log: Log, cfg: PriorConfig, *, work_dir: Path
) -> tuple[PriorModel, dict[str, Any] | None]:
    """Train a copy of a fine-tuned forecaster on the reward of its lists, and say what it is good for.

    Args:
        prior: the fine-tuned forecaster; its LM stays as it is.
        log: only periods of ``prior_fit`` and ``prior_select`` are read.
        cfg: ``reward`` and the trainer; no prompts leave the stage out.
        work_dir: checkpoints; an interrupted stage goes on from there.

    Returns:
        The forecaster, with the LM that was trained where that is taken, and the stage's metrics; None where it is
        left out.

    Raises:
        FloatingPointError: loss or gradient became NaN or infinite; the error names users and periods of the batch.
    """
    if not cfg.reward.prompts:
        return prior, None
    fit_targets = log.advertiser_targets(cfg.prompt_span(log.split.prior_fit))
    train = PromptDataset(sample_rows(fit_targets, cfg.reward.prompts, cfg.seed + _SEED), prior.compiler)
    select = PromptDataset(selection_rows(log.advertiser_targets("prior_select"), cfg), prior.compiler)
    model = own_copy(prior.model)
    steps = _train(model, prior, train, cfg, user_ids=log.user_ids, work_dir=work_dir)
    before, after = (judge(one, prior, select, cfg) for one in (prior.model, model))
    users = select.targets.user
    figures = {
        name: {
            "before": bootstrap_mean(before[name], users),
            "after": bootstrap_mean(after[name], users),
            "difference": paired_bootstrap(after[name], before[name], users),
        }
        for name in before
    }
    taken = accepted_for(recall=figures[f"recall@{PAID}"]["difference"], nll=figures["nll"]["difference"])
    metrics = {"prompts": len(train), "steps": steps, "accepted_for": taken, "select": to_plain(figures)}
    if taken == ALL:
        scores = logits_at_decisions(model, list(batches(select, prior.collator, cfg.batch_size)))
        return replace(prior, model=model, constant_LH=scores.constant_LH, reward=taken), metrics
    return replace(prior, reward=taken, list_model=model if taken == FOR_LISTS else None), metrics


def accepted_for(*, recall: Interval, nll: Interval) -> str:
    """What the trained LM is taken for: ``none``, ``lists`` or ``all``.

    Args:
        recall: recall of its lists less that of the lists before, on the same prompts.
        nll: the same of the NLL.
    """
    if not recall.low > 0:
        return NOTHING
    return ALL if nll.value <= 0 else FOR_LISTS


def own_copy(model: PriorLM) -> PriorLM:
    """A copy with trained weights of its own; what is frozen is shared, so that it costs little memory."""
    frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    return copy.deepcopy(model, frozen)


@dataclass
class ListDrawer:
    """Draws lists for prompts from a model as it is, and pays them.

    Attributes:
        model, base, calibration: the policy.
        collator: builds the trees.
        cfg: how many lists, and how long.
    """

    model: PriorLM
    base: TunedAnchor
    calibration: Calibration
    collator: TreeCollator
    cfg: RewardConfig
    _sampler: TreeSampler | None = None

    def __call__(self, examples: Sequence[Example]) -> DrawnLists:
        """Lists of a batch, by torch's random state."""
        if self._sampler is None:  # not before the model is on its device
            self._sampler = TreeSampler(self.model, self.base, self.calibration, DecodeConfig())
        lists_BGK = self._sampler.sample(
            examples,
            np.array([example.user for example in examples]),
            np.array([example.period for example in examples]),
            lists=self.cfg.lists,
            length=self.cfg.length,
        )
        # Weights that were cast while no gradient was asked for would be used again without one.
        torch.clear_autocast_cache()
        drawn = [np.unique(lists_GK) for lists_GK in lists_BGK]
        offset_B = np.cumsum([0, *(len(one) for one in drawn[:-1])])
        place = [
            np.searchsorted(one, lists_GK) + start
            for one, lists_GK, start in zip(drawn, lists_BGK, offset_B, strict=True)
        ]
        paid = [rewards(lists_GK, example.targets) for lists_GK, example in zip(lists_BGK, examples, strict=True)]
        return DrawnLists(
            tree=self.collator([replace(example, targets=one) for example, one in zip(examples, drawn, strict=True)]),
            target_BGK=torch.from_numpy(np.stack(place)),
            reward_BG=torch.from_numpy(np.stack(paid)),
        )


def rewards(lists_GK: NDArray[np.integer], wanted: NDArray[np.integer]) -> Float:
    """Reward of each list: the sum over the true advertisers in it of what their places earn, ``(G,)``."""
    return np.isin(lists_GK, wanted) @ position_rewards(lists_GK.shape[1]).numpy()


def _train(
    model: PriorLM,
    prior: PriorModel,
    train: PromptDataset,
    cfg: PriorConfig,
    *,
    user_ids: NDArray[np.generic],
    work_dir: Path,
) -> int:
    """Steps taken; the model is trained in place."""
    lengths = np.array([len(train[row].token_ids) for row in range(len(train))])
    budget = token_budget(lengths, cfg.reward.batch_size)
    sampler = TokenBatchSampler(lengths, budget=budget, seed=cfg.seed + _SEED, parts=cfg.trainer.max_epochs)
    reference = own_copy(prior.model)
    module = RewardModule(
        model,
        reference,
        ListDrawer(model, prior.base, prior.calibration, prior.collator, cfg.reward),
        lm_weights=prior.calibration.lm_weight,
        base_exponents=prior.calibration.base_exponent,
        kl_weight=cfg.reward.kl_weight,
        lora_learning_rate=cfg.reward.lora_learning_rate,
        head_learning_rate=cfg.reward.head_learning_rate,
        total_steps=cfg.trainer.steps(sampler.per_epoch),
    )
    loader: DataLoader = DataLoader(train, batch_sampler=sampler, collate_fn=list)

    def describe(examples: Sequence[Example]) -> str:
        prompts = (f"{user_ids[example.user]} as of period {example.period}" for example in examples)
        return f"lists for users {', '.join(prompts)}"

    with quick_attention(model.decoder, cfg.trainer), quick_attention(reference.decoder, cfg.trainer):
        result = fit(module, loader, None, cfg.trainer, work_dir=work_dir, seed=cfg.seed, describe=describe)
    return result.steps


def judge(model: PriorLM, prior: PriorModel, select: PromptDataset, cfg: PriorConfig) -> dict[str, Float]:
    """Recall and reward of a model's exact lists, and its exact NLL, ``(R,)`` each.

    Args:
        model: the LM that is judged.
        prior: gives base and calibration.
        select: the prompts.
        cfg: batch size.
    """
    targets = select.targets
    decode = DecodeConfig(beam=PAID, top_k=PAID, exact=True)
    decoder = TreeDecoder(model, prior.base, prior.calibration, decode)
    place_T = np.full(len(targets.item), prior.base.trie.n_advertisers)
    for start in range(0, len(targets), cfg.batch_size):
        rows = np.arange(start, min(start + cfg.batch_size, len(targets)))
        prompts = [select[row] for row in rows.tolist()]
        for row, one in zip(rows, decoder.decode(prompts, targets.user[rows], targets.period[rows]), strict=True):
            of_row = slice(targets.ptr[row], targets.ptr[row + 1])
            place_A = np.full(prior.base.trie.n_advertisers, prior.base.trie.n_advertisers)
            place_A[one.advertiser_K] = np.arange(len(one.advertiser_K))
            place_T[of_row] = place_A[targets.item[of_row]]
    paid_K = np.append(position_rewards(PAID).numpy(), 0.0)
    log_prob_T = exact_log_prob(model, list(batches(select, prior.collator, cfg.batch_size)), prior.calibration)
    return {
        "recall@10": recall_at_k(place_T, targets, 10),
        f"recall@{PAID}": recall_at_k(place_T, targets, PAID),
        "reward": np.bincount(targets.row, paid_K[np.minimum(place_T, PAID)], minlength=len(targets)).astype(float),
        "nll": mean_target_nll(log_prob_T, targets),
    }
