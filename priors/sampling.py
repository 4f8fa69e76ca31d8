"""Lists of advertisers drawn from the forecast without replacement, at the price of a few beams.

Stochastic beam search (Kool et al. 2019, arXiv 1903.06059). To draw K advertisers one after the other, each in
proportion to its probability among those left, is to add a Gumbel variable to every log-probability and to take the K
largest sums. The largest sum below a prefix is itself a Gumbel variable of the prefix's log-probability, so it can be
drawn top-down, and a beam of K prefixes a level never loses one of the K:

    prefix      log P   + Gumbel   ─► its children: Gumbel variables of their own log-probabilities,
                                      shifted so that the largest of them is the prefix's

All lists of a prompt are drawn at once: the prefixes that any of them follows are read once, as further tokens of the
prompt's row (`priors.decode`).

Shapes: B prompts, G lists of each, K advertisers of a list, E prefixes read, I prefixes followed (by a list each), C
children of theirs, A advertisers.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from priors.decode import TreeDecoder, rank_within
from priors.tree_reader import Prompts


class TreeSampler(TreeDecoder):
    """Draws lists under a trie; made as a :class:`~priors.decode.TreeDecoder` is."""

    @torch.inference_mode()
    def sample(
        self, prompts: Prompts, user_B: NDArray[np.integer], period_B: NDArray[np.integer], *, lists: int, length: int
    ) -> NDArray[np.int64]:
        """Draw lists by torch's random state.

        Args:
            prompts: what the LM reads for each.
            user_B: whose anchor is the base of each.
            period_B: as-of periods.
            lists: G, drawn independently for each prompt.
            length: advertisers of each; all of them where there are fewer.

        Returns:
            Distinct advertisers in the order they were drawn, ``(B, G, K)``.

        Raises:
            UserError: an empty prompt.
            FloatingPointError: the model gives no number for a prompt.
        """
        length = min(length, self.flat.trie.n_advertisers)
        n_lists = len(prompts) * lists
        search = self._begin(prompts, user_B, period_B, None, None)
        entries, hidden_EH = search.root(), search.reading.end_BH
        list_I = torch.arange(n_lists, device=self.device)
        entry_I, gumbel_I = list_I // lists, torch.zeros(n_lists, dtype=torch.float64, device=self.device)
        found_list, found_advertiser = list_I[:0], list_I[:0]
        found_gumbel = gumbel_I[:0]
        for depth in range(self.flat.n_levels):
            children, alone = self._expand(search, entries, hidden_EH, range(depth, depth + 1))
            item_C, child_C = _children_of(self.flat.children(entries.node_E)[0], len(entries), entry_I)
            gumbel_C = conditional_gumbel(children.log_prob_E[child_C], item_C, gumbel_I)
            # The best of what a list has found and of what it may follow further.
            list_P = torch.cat([found_list, list_I[item_C]])
            gumbel_P = torch.cat([found_gumbel, gumbel_C])
            child_P = torch.cat([torch.full_like(found_list, -1), child_C])
            advertiser_M = search.active.only_advertiser(children.row_E, children.node_E)
            advertiser_M = torch.where(alone, advertiser_M, -1)
            advertiser_P = torch.cat([found_advertiser, advertiser_M[child_C]])
            order = gumbel_P.argsort(descending=True, stable=True)
            order = order[list_P[order].argsort(stable=True)]
            order = order[rank_within(list_P[order]) < length]
            ended = advertiser_P[order] >= 0
            found, followed = order[ended], order[~ended]
            found_list, found_advertiser, found_gumbel = list_P[found], advertiser_P[found], gumbel_P[found]
            if not len(followed):
                break
            chosen, entry_I = child_P[followed].unique(return_inverse=True)
            list_I, gumbel_I = list_P[followed], gumbel_P[followed]
            entries = children.select(chosen)
            hidden_EH = self._read(search, entries, keep=depth + 2 < self.flat.n_levels)
        return found_advertiser.view(len(prompts), lists, length).cpu().numpy()


def _children_of(parent_M: Tensor, n_entries: int, entry_I: Tensor) -> tuple[Tensor, Tensor]:
    """Children of the prefixes that lists follow, where several may follow one.

    Args:
        parent_M: prefix that each child is of, rising.
        n_entries: number of prefixes.
        entry_I: prefix of each item.

    Returns:
        Item of each, rising, and which of the children it is, ``(C,)`` each.
    """
    count_E = torch.bincount(parent_M, minlength=n_entries)
    first_I, count_I = (count_E.cumsum(0) - count_E)[entry_I], count_E[entry_I]
    item_C = torch.repeat_interleave(torch.arange(len(entry_I), device=entry_I.device), count_I)
    within_C = torch.arange(len(item_C), device=entry_I.device) - (count_I.cumsum(0) - count_I)[item_C]
    return item_C, first_I[item_C] + within_C


def conditional_gumbel(log_prob_C: Tensor, item_C: Tensor, largest_I: Tensor) -> Tensor:
    """Gumbel variables of log-probabilities, given the largest of each item (arXiv 1903.06059, appendix B.3).

    Args:
        log_prob_C: locations.
        item_C: item of each.
        largest_I: what the largest of each item is.

    Returns:
        ``(C,)``, float64.
    """
    free_C = log_prob_C - torch.empty_like(log_prob_C).exponential_().log()
    top_I = free_C.new_full((len(largest_I),), -torch.inf).scatter_reduce(0, item_C, free_C, "amax")
    below_C = largest_I[item_C] - free_C + torch.log(-torch.expm1(free_C - top_I[item_C]))
    return largest_I[item_C] - below_C.clamp_min(0.0) - torch.log1p(torch.exp(-below_C.abs()))
