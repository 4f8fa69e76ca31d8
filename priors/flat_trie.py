"""The trie as decoding reads it: one numbering of the nodes of all depths, as tensors on the model's device.

    node        0        1 2 3        4 5 6 7 8 …          children of a node are neighbours, as in the trie
    depth       0        1 1 1        2 2 2 2 2 …
    first       1        4 6 8        …                    node n has the children first[n] … first[n + 1] - 1

So prefixes of different depths stand in one list, and a step of decoding is a few gathers over the children of the
prefixes in it, however many advertisers there are. A set of active advertisers is a bitmap over the leaves: its
cumulative sum tells how many are below any node, and the trie stays as it is.

Shapes: N nodes of all depths, A advertisers (leaves), G sets of active advertisers, E prefixes, M their children.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.errors import UserError
from semantic_ids.trie import Trie


@dataclass(frozen=True)
class FlatTrie:
    """Nodes of all depths in one numbering.

    Attributes:
        trie: what it was made of.
        offset: number of the first node of each depth, and of all nodes at the end.
        depth_N: codes of each node's prefix.
        code_N: last code of it.
        parent_N: the node above; the root's is itself.
        first_N: first child of each node, ``(N + 1,)``; a leaf has none.
        leaf_N: first leaf below each node; those below it end at ``leaf_stop_N``.
        leaf_stop_N: see ``leaf_N``.
        advertiser_A: advertiser of each leaf.
    """

    trie: Trie
    offset: tuple[int, ...]
    depth_N: Tensor
    code_N: Tensor
    parent_N: Tensor
    first_N: Tensor
    leaf_N: Tensor
    leaf_stop_N: Tensor
    advertiser_A: Tensor

    @classmethod
    def of(cls, trie: Trie, device: torch.device) -> FlatTrie:
        """Number the nodes of a trie; nodes of one depth stay in their order."""
        counts = [trie.n_nodes(depth) for depth in range(trie.n_levels + 1)]
        offset = np.concatenate([[0], np.cumsum(counts)])

        def tensor(parts: list[NDArray[np.integer]]) -> Tensor:
            return torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device)

        root = np.zeros(1, np.int32)
        first = [trie.child_ptr[depth][:-1] + offset[depth + 1] for depth in range(trie.n_levels)]
        return cls(
            trie=trie,
            offset=tuple(offset.tolist()),
            depth_N=torch.from_numpy(np.repeat(np.arange(len(counts), dtype=np.int8), counts)).to(device),
            code_N=tensor([root, *trie.child_code]),
            parent_N=tensor([root, *(parent + offset[depth] for depth, parent in enumerate(trie.parent))]),
            first_N=tensor([*first, np.full(counts[-1] + 1, offset[-1])]),
            leaf_N=tensor([ptr[:-1] for ptr in trie.leaf_ptr]),
            leaf_stop_N=tensor([ptr[1:] for ptr in trie.leaf_ptr]),
            advertiser_A=torch.from_numpy(trie.leaf_advertiser).to(device),
        )

    @property
    def n_nodes(self) -> int:
        return self.offset[-1]

    @property
    def n_levels(self) -> int:
        return self.trie.n_levels

    def children(self, node_E: Tensor) -> tuple[Tensor, Tensor]:
        """Children of some nodes, one after the other.

        Returns:
            Which of the nodes each child is of, rising, and its own number, both int64 ``(M,)``.
        """
        first_E = self.first_N[node_E].long()
        count_E = self.first_N[node_E + 1].long() - first_E
        end_E = count_E.cumsum(0)
        entry_M = torch.repeat_interleave(torch.arange(len(node_E), device=node_E.device), count_E)
        child_M = torch.arange(len(entry_M), device=node_E.device) + (first_E - end_E + count_E)[entry_M]
        return entry_M, child_M

    def path_nodes(self, advertiser_T: NDArray[np.integer]) -> NDArray[np.int64]:
        """Nodes of depth 1 to L on the way to advertisers, ``(T, L)``."""
        return self.trie.path_AL[advertiser_T].astype(np.int64) + np.array(self.offset[1:-1])

    def within_depth(self, node_E: Tensor) -> tuple[Tensor, Tensor]:
        """Depth of nodes, and their number among those of it, which is the trie's own."""
        depth_E = self.depth_N[node_E].long()
        return depth_E, node_E - torch.tensor(self.offset, device=node_E.device)[depth_E]


class ActiveSets:
    """Sets of advertisers that decoding may end at, as bitmaps over the leaves.

    Args:
        flat: the trie.
        mask_GA: True for the advertisers of each set; ``(A,)`` is one set for all rows; None: everyone.
        group_B: set of each row; None: row b has set b, or the only one.
        n_rows: rows of the batch.

    Raises:
        UserError: shapes that do not fit, or a set without an advertiser.
    """

    def __init__(
        self,
        flat: FlatTrie,
        mask_GA: NDArray[np.bool_] | None,
        group_B: NDArray[np.integer] | None,
        n_rows: int,
    ) -> None:
        self.flat, self.everyone = flat, mask_GA is None
        device = flat.leaf_N.device
        if mask_GA is None:
            self.group_B = torch.zeros(n_rows, dtype=torch.long, device=device)
            self.leaf_mask_GA: NDArray[np.bool_] | None = None
            return
        mask = np.asarray(mask_GA, dtype=bool).reshape(-1, np.shape(mask_GA)[-1])
        group = np.arange(n_rows) % len(mask) if group_B is None else np.asarray(group_B)
        fits = len(mask) in (1, n_rows) if group_B is None else len(group) == n_rows
        if not fits or mask.shape[1] != flat.trie.n_advertisers or (group >= len(mask)).any():
            raise UserError(
                f"masks of shape {mask.shape} for {n_rows} prompts and {flat.trie.n_advertisers} advertisers",
                expected="one mask for all prompts, one for each, or the number of its mask for each",
                action="give masks over all advertisers, in the order of the log",
            )
        empty = mask.sum(1) == 0
        if empty[group].any():
            raise UserError(
                f"no active advertiser for prompt {int(np.flatnonzero(empty[group])[0])}",
                expected="at least one advertiser to forecast",
                action="leave out prompts of markets in which nothing runs",
            )
        self.group_B = torch.from_numpy(group.astype(np.int64)).to(device)
        leaf_mask_GA: NDArray[np.bool_] = mask[:, flat.trie.leaf_advertiser]
        self.leaf_mask_GA = leaf_mask_GA
        n_leaves = mask.shape[1]
        count = np.zeros((len(mask), n_leaves + 1), dtype=np.int32)
        np.cumsum(leaf_mask_GA, axis=1, out=count[:, 1:])
        # The first active leaf at or after each.
        place = np.where(leaf_mask_GA, np.arange(n_leaves, dtype=np.int32), np.int32(n_leaves - 1))
        following = np.minimum.accumulate(place[:, ::-1], axis=1)[:, ::-1]
        self._count_GA = torch.from_numpy(count).to(device)
        self._next_GA = torch.from_numpy(following.copy()).to(device)

    def n_leaves(self, row_E: Tensor, node_E: Tensor) -> Tensor:
        """Active advertisers below each node."""
        start_E, stop_E = self.flat.leaf_N[node_E], self.flat.leaf_stop_N[node_E]
        if self.everyone:
            return stop_E - start_E
        group_E = self.group_B[row_E]
        return self._count_GA[group_E, stop_E] - self._count_GA[group_E, start_E]

    def only_advertiser(self, row_E: Tensor, node_E: Tensor) -> Tensor:
        """The first active advertiser below each node."""
        leaf_E = self.flat.leaf_N[node_E]
        if not self.everyone:
            leaf_E = self._next_GA[self.group_B[row_E], leaf_E]
        return self.flat.advertiser_A[leaf_E]

    def n_active(self) -> NDArray[np.int64]:
        """Active advertisers of each row, ``(B,)``."""
        root = torch.zeros_like(self.group_B)
        return self.n_leaves(torch.arange(len(root), device=root.device), root).cpu().numpy().astype(np.int64)
