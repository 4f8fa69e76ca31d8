"""What the LM reads: prompts once, then prefixes of IDs as further tokens of the prompts' own rows.

    cache of row b   p1 p2 … pT │ <adv_1_7> <adv_1_4> │ <adv_2_9> …      one column a token, whatever it continues
    visible          the prompt, the prefix above, itself

The tokens of a prefix are told apart by the attention mask alone (tree attention, arXiv 2305.09781), so the keys and
values of the prompt are never copied. A prefix that all prompts of a job begin with is read once for the job.

What is given back is what the head reads: hidden states, and beside them the history vector of a prompt that has one.

Where no head reads a hidden state (`PriorLM.reads_prompt`: no training was kept), nothing is computed.

A model that takes no 4-D mask (positions by ALiBi, for example) is noticed when the reader is made. For it every
prefix gets a copy of its prompt's cache, in groups of prompts of equal length.

Shapes: B prompts, T tokens, E prefixes to read, Q of one row at the most, S columns of the cache, H features that the
head reads.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from models.prior_lm import PriorLM, with_history
from priors.dataset import Example, history_of
from priors.prompt import Prompt

Prompts = Sequence[Prompt | Example]


class Reading(Protocol):
    """The prompts of a batch, read."""

    end_BH: Tensor
    """What the head reads at the end of each prompt."""
    computes: bool
    """Whether the LM runs."""

    def read(self, row_E: Tensor, path_ED: Tensor, chain_ED: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        """Read prefixes.

        Args:
            row_E: prompt of each, rising.
            path_ED: tokens of each prefix, -1 after its end.
            chain_ED: columns of the cache that hold the prefixes above; -1 for none.
            keep: longer prefixes will be read later.

        Returns:
            What the head reads at each, ``(E, H)``, and its column ``(E,)``.
        """

    def only(self, rows: Tensor) -> Reading:
        """The same for some of the rows."""


def reader_of(model: PriorLM) -> TreeReader | CopyReader:
    """The fastest reader that a model's answers are right with."""
    return TreeReader(model) if takes_tree_mask(model) else CopyReader(model)


@torch.inference_mode()
def takes_tree_mask(model: PriorLM) -> bool:
    """Whether two continuations of a prompt, side by side under a mask, get the hidden states each gets alone."""
    device = model.word_embedding.weight.device
    prompt = torch.arange(1, 5, device=device)[None] % model.first_id_token
    branch = model.id_token(0, torch.zeros(1, 2, dtype=torch.long, device=device))
    branch[0, 1] += min(1, model.id_rows.num_embeddings - 1)
    position = torch.full((1, 2), 4, device=device)
    visible = torch.cat([torch.ones(1, 2, 4, dtype=torch.bool), torch.eye(2, dtype=torch.bool)[None]], -1).to(device)
    alone = [_causal(model, torch.cat([prompt, branch[:, i : i + 1]], 1))[:, -1] for i in range(2)]
    try:
        cache = DynamicCache()
        model.run_decoder(inputs_embeds=model.embed(prompt), past_key_values=cache, use_cache=True)
        together = model.extend(cache, branch, position, visible)[0].float()
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False
    difference = (together - torch.cat(alone).float()).norm()
    return bool(difference < 0.05 * together.norm())


def _causal(model: PriorLM, input_ids: Tensor) -> Tensor:
    return model.run_decoder(inputs_embeds=model.embed(input_ids), use_cache=False).last_hidden_state


class TreeReader:
    """Reads under a tree attention mask.

    Args:
        model: the LM.
    """

    copies = False

    def __init__(self, model: PriorLM) -> None:
        self.model = model
        self.device = model.word_embedding.weight.device
        self._shared: tuple[list[int], DynamicCache] | None = None

    @torch.inference_mode()
    def share(self, prefix: NDArray[np.integer]) -> None:
        """Read once what all further prompts begin with; an empty prefix forgets it.

        Args:
            prefix: token ids.
        """
        self._shared = None
        if len(prefix) and self.model.reads_prompt:
            cache = DynamicCache()
            ids = torch.from_numpy(np.asarray(prefix, dtype=np.int64))[None].to(self.device)
            self.model.run_decoder(inputs_embeds=self.model.embed(ids), past_key_values=cache, use_cache=True)
            self._shared = ([int(token) for token in prefix], cache)

    def prefill(self, prompts: Prompts) -> Reading:
        """Read the prompts of a batch."""
        if not self.model.reads_prompt:
            return Unread.of(prompts, self.model)
        shared, cache = self._prefix_of(prompts)
        rest = [prompt.token_ids[len(shared) :] for prompt in prompts]
        length_B = torch.tensor([len(prompt) for prompt in rest], device=self.device)
        input_ids = np.zeros((len(rest), max(len(prompt) for prompt in rest)), dtype=np.int64)
        for row, prompt in enumerate(rest):
            input_ids[row, : len(prompt)] = prompt
        ids_BT = torch.from_numpy(input_ids).to(self.device)
        position_T = torch.arange(len(shared), len(shared) + ids_BT.shape[1], device=self.device)
        # Padding comes last, so that plain causal attention hides it from every real token.
        hidden_BTH = self.model.run_decoder(
            inputs_embeds=self.model.embed(ids_BT),
            position_ids=position_T.expand_as(ids_BT),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        visible_BS = torch.arange(len(shared) + ids_BT.shape[1], device=self.device) < length_B[:, None] + len(shared)
        end_BH = hidden_BTH[torch.arange(len(rest), device=self.device), length_B - 1]
        history_BF = _history(prompts, self.device)
        return TreeReading(
            self.model, cache, length_B + len(shared), visible_BS, _beside(end_BH, history_BF), history_BF
        )

    def _prefix_of(self, prompts: Prompts) -> tuple[list[int], DynamicCache]:
        if self._shared is None:
            return [], DynamicCache()
        tokens, once = self._shared
        fits = all(
            len(prompt) > len(tokens) and prompt.token_ids[: len(tokens)].tolist() == tokens for prompt in prompts
        )
        if not fits:
            return [], DynamicCache()
        cache = copy.deepcopy(once)
        cache.batch_repeat_interleave(len(prompts))
        return tokens, cache


class TreeReading:
    """Prompts in a cache, and the prefixes read on top of them."""

    computes = True

    def __init__(
        self,
        model: PriorLM,
        cache: DynamicCache,
        length_B: Tensor,
        visible_BS: Tensor,
        end_BH: Tensor,
        history_BF: Tensor | None,
    ) -> None:
        self.model, self.cache, self.length_B, self.visible_BS, self.end_BH = model, cache, length_B, visible_BS, end_BH
        self.history_BF, self.device = history_BF, end_BH.device

    def read(self, row_E: Tensor, path_ED: Tensor, chain_ED: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        n_rows, n_columns = self.visible_BS.shape
        count_B = torch.bincount(row_E, minlength=n_rows)
        place_E = torch.arange(len(row_E), device=self.device) - (count_B.cumsum(0) - count_B)[row_E]
        n_query = int(count_B.max())
        depth_E = (path_ED >= 0).sum(1)
        ids_BQ = torch.zeros(n_rows, n_query, dtype=torch.long, device=self.device)
        ids_BQ[row_E, place_E] = path_ED.gather(1, depth_E[:, None] - 1)[:, 0]
        position_BQ = self.length_B[:, None].repeat(1, n_query)
        position_BQ[row_E, place_E] += depth_E - 1
        visible_BQS = self.visible_BS[:, None].repeat(1, n_query, 1)
        for column_E in chain_ED.unbind(1):
            above = column_E >= 0
            visible_BQS[row_E[above], place_E[above], column_E[above]] = True
        itself_BQQ = torch.eye(n_query, dtype=torch.bool, device=self.device).expand(n_rows, -1, -1)
        hidden_BQH = self.model.extend(self.cache, ids_BQ, position_BQ, torch.cat([visible_BQS, itself_BQQ], -1))
        if keep:
            self.visible_BS = torch.nn.functional.pad(self.visible_BS, (0, n_query))
        else:
            self.cache.crop(-n_query)
        return _beside(hidden_BQH[row_E, place_E], self.history_BF, row_E), n_columns + place_E

    def only(self, rows: Tensor) -> TreeReading:
        self.cache.batch_select_indices(rows)
        history_BF = None if self.history_BF is None else self.history_BF[rows]
        end_BH = self.end_BH[rows]
        return TreeReading(self.model, self.cache, self.length_B[rows], self.visible_BS[rows], end_BH, history_BF)


class CopyReader:
    """Reads with a copy of the prompt's cache for every prefix, for models without a tree mask.

    Args:
        model: the LM.
    """

    copies = True

    def __init__(self, model: PriorLM) -> None:
        self.model = model
        self.device = model.word_embedding.weight.device

    def share(self, prefix: NDArray[np.integer]) -> None:
        """Nothing is shared between batches."""

    def prefill(self, prompts: Prompts) -> Reading:
        """Read the prompts of a batch, those of one length at a time."""
        if not self.model.reads_prompt:
            return Unread.of(prompts, self.model)
        length_B = np.array([len(prompt) for prompt in prompts])
        groups, end = [], dict[int, Tensor]()
        for length in np.unique(length_B):
            rows = np.flatnonzero(length_B == length)
            stacked = np.stack([prompts[row].token_ids for row in rows.tolist()]).astype(np.int64)
            ids_BT = torch.from_numpy(stacked).to(self.device)
            cache = DynamicCache()
            hidden_BTH = self.model.run_decoder(
                inputs_embeds=self.model.embed(ids_BT), past_key_values=cache, use_cache=True
            ).last_hidden_state
            groups.append((torch.from_numpy(rows).to(self.device), cache))
            end.update(zip(rows.tolist(), hidden_BTH[:, -1].unbind(0), strict=True))
        history_BF = _history(prompts, self.device)
        end_BH = torch.stack([end[row] for row in range(len(prompts))])
        return CopyReading(self.model, groups, _beside(end_BH, history_BF), history_BF)


class CopyReading:
    """Prompts in caches, one for each length."""

    computes = True

    def __init__(
        self,
        model: PriorLM,
        groups: list[tuple[Tensor, DynamicCache]],
        end_BH: Tensor,
        history_BF: Tensor | None,
    ) -> None:
        self.model, self.groups, self.end_BH, self.history_BF = model, groups, end_BH, history_BF

    def read(self, row_E: Tensor, path_ED: Tensor, chain_ED: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        hidden_EH = self.end_BH.new_zeros(len(row_E), self.model.id_rows.embedding_dim)
        depth_E = (path_ED >= 0).sum(1)
        for rows, cache in self.groups:
            for depth in depth_E.unique().tolist():
                here = (torch.isin(row_E, rows) & (depth_E == depth)).nonzero()[:, 0]
                if not len(here):
                    continue
                copied = copy.deepcopy(cache)
                copied.batch_select_indices(torch.searchsorted(rows, row_E[here]))
                hidden_BTH = self.model.run_decoder(
                    inputs_embeds=self.model.embed(path_ED[here, :depth]), past_key_values=copied, use_cache=True
                ).last_hidden_state
                hidden_EH[here] = hidden_BTH[:, -1].to(hidden_EH.dtype)
        return _beside(hidden_EH, self.history_BF, row_E), torch.full_like(row_E, -1)

    def only(self, rows: Tensor) -> CopyReading:
        kept = []
        for of_group, cache in self.groups:
            place = torch.isin(of_group, rows).nonzero()[:, 0]
            if len(place):
                cache.batch_select_indices(place)
                kept.append((torch.searchsorted(rows, of_group[place]), cache))
        history_BF = None if self.history_BF is None else self.history_BF[rows]
        return CopyReading(self.model, kept, self.end_BH[rows], history_BF)


@dataclass
class Unread:
    """Prompts that no head reads: zeros for hidden states, and the history vectors.

    Attributes:
        end_BH: what the head reads at the end of each prompt, and at every prefix below it.
    """

    end_BH: Tensor
    computes = False

    @classmethod
    def of(cls, prompts: Prompts, model: PriorLM) -> Unread:
        """Prompts of a model."""
        device = model.word_embedding.weight.device
        zeros_BH = torch.zeros(len(prompts), model.id_rows.embedding_dim, device=device)
        return cls(_beside(zeros_BH, _history(prompts, device)))

    def read(self, row_E: Tensor, path_ED: Tensor, chain_ED: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
        return self.end_BH[row_E], torch.full_like(row_E, -1)

    def only(self, rows: Tensor) -> Unread:
        return Unread(self.end_BH[rows])


def _history(prompts: Prompts, device: torch.device) -> Tensor | None:
    history_BF = history_of(prompts)
    return None if history_BF is None else history_BF.to(device)


def _beside(hidden_EH: Tensor, history_BF: Tensor | None, row_E: Tensor | None = None) -> Tensor:
    """Hidden states with the history vectors of their prompts beside them, where these have any."""
    if history_BF is None:
        return hidden_EH
    return with_history(hidden_EH, history_BF if row_E is None else history_BF[row_E])
