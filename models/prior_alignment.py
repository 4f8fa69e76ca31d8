"""Alignment of words and semantic IDs, as a warm-up of the forecaster (after arXiv 2311.09049, LC-Rec).

A new ID token means nothing to a language model. Two tasks about advertisers, without any user, tie it to words:

    words ─► ID     "Sells yogurt, cheese. Advertiser:"  ─► c1 c2 c3      the tree loss of `models.prior_lm`
    ID ─► words     "Advertiser c1 c2 c3 sells"  ─► " yogurt, cheese"     the base model's own vocabulary head

The vocabulary head is frozen, and multiplied at the positions before words alone.

Shapes: B advertisers, T tokens, M positions before words, V words of the vocabulary, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.prior_lm import PriorLM, PriorLMModule, TreeBatch, row_nll, target_log_prob

IGNORED = -100
"""Label of a position that no word is asked of."""


@dataclass(frozen=True)
class AlignmentBatch:
    """Advertisers, both ways.

    Attributes:
        advertiser_B: which.
        to_id: words with the ID as the one target.
        input_ids_BT: tokens of the other way, padding last.
        label_BT: the word after each token, `IGNORED` where none is asked.
    """

    advertiser_B: Tensor
    to_id: TreeBatch
    input_ids_BT: Tensor
    label_BT: Tensor

    def to(self, device: torch.device) -> AlignmentBatch:
        """The batch on another device."""
        return AlignmentBatch(*(value.to(device) for value in vars(self).values()))


def id_nll(model: PriorLM, batch: AlignmentBatch) -> Tensor:
    """Negative log-likelihood of each advertiser's ID given its words, ``(B,)``."""
    return row_nll(batch.to_id, target_log_prob(batch.to_id, model.log_probs(batch.to_id)))


def text_nll(model: PriorLM, batch: AlignmentBatch, vocabulary_VH: Tensor) -> Tensor:
    """Negative log-likelihood of each advertiser's words given its ID, the mean over its words, ``(B,)``.

    Args:
        model: the forecaster; its head has no part in it.
        batch: the advertisers, each with at least one word.
        vocabulary_VH: rows that score words.
    """
    # Padding comes last, so that plain causal attention hides it.
    hidden_BTH = model.run_decoder(inputs_embeds=model.embed(batch.input_ids_BT), use_cache=False).last_hidden_state
    row_M, position_M = (batch.label_BT != IGNORED).nonzero(as_tuple=True)
    score_MV = (hidden_BTH[row_M, position_M].to(vocabulary_VH.dtype) @ vocabulary_VH.T).float()
    nll_M = torch.nn.functional.cross_entropy(score_MV, batch.label_BT[row_M, position_M], reduction="none")
    count_B = torch.bincount(row_M, minlength=len(batch.label_BT))
    return torch.zeros(len(count_B), device=nll_M.device).index_add(0, row_M, nll_M) / count_B


class AlignmentModule(PriorLMModule):
    """Trains a :class:`~models.prior_lm.PriorLM` on both tasks.

    Args:
        model: the forecaster.
        vocabulary_VH: rows that score words; not trained.
        text_weight: weight of ID → words against words → ID.
        **rates: as of :class:`~models.prior_lm.PriorLMModule`.
    """

    vocabulary_VH: Tensor

    def __init__(self, model: PriorLM, vocabulary_VH: Tensor, *, text_weight: float, **rates: Any) -> None:
        super().__init__(model, **rates)
        self.register_buffer("vocabulary_VH", vocabulary_VH, persistent=False)
        self.text_weight = text_weight

    def training_step(self, batch: AlignmentBatch, batch_idx: int) -> Tensor:  # type: ignore[override]
        to_id, to_text = id_nll(self.model, batch).mean(), text_nll(self.model, batch, self.vocabulary_VH).mean()
        for name, value in (("train_to_id", to_id.detach()), ("train_to_text", to_text.detach())):
            self.log(name, value, batch_size=len(batch.label_BT), prog_bar=True)
        return to_id + self.text_weight * to_text
