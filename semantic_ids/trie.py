"""The prefix tree of all advertisers' semantic IDs, as flat tensors.

Nodes of one depth are numbered in the lexicographic order of their prefixes. So the children of a
node are neighbours, and so are all advertisers below it:

    depth 0      root                     child_ptr[0] = [0, 3]
    depth 1      1        4       7       child_code[0] = [1, 4, 7]
    depth 2    2   9      0     5   6     child_ptr[1] = [0, 2, 3, 5]
    leaves     a3  a0     a4    a2  a1    leaf_ptr[1] = [0, 2, 3, 5]

The mass of any distribution below a prefix is then a difference of two entries of its cumulative
sum over the leaves, and a step of decoding is a gather: nothing is walked in Python.

A million advertisers take about 50 MB at three levels (:attr:`Trie.nbytes`): nodes and leaves are 32-bit numbers.
Only ``child_code`` and ``leaf_advertiser`` are 64-bit, since decoding gathers by them in torch, which takes no other.

Shapes: A advertisers (= leaves), L levels, N_d nodes of depth d (N_0 = 1, N_L = A).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Trie:
    """All advertisers' IDs as compressed sparse rows, one array a depth.

    Attributes:
        level_sizes: codes of each level's codebook, length L.
        child_ptr: at depth d the children of node n are nodes ``child_ptr[d][n]:child_ptr[d][n + 1]`` of
            depth d + 1; int32 ``(N_d + 1,)``, one array for each d < L.
        child_code: code that leads to each node of depth d + 1, int64 ``(N_{d+1},)``.
        parent: node of depth d above each node of depth d + 1, int32 ``(N_{d+1},)``.
        leaf_ptr: leaves below node n of depth d are ``leaf_ptr[d][n]:leaf_ptr[d][n + 1]``; int32 ``(N_d + 1,)``,
            one array for each d <= L.
        leaf_advertiser: advertiser index at each leaf, int64 ``(A,)``.
        path_AL: node of depth l + 1 on the way to each advertiser, int32 ``(A, L)``.
    """

    level_sizes: tuple[int, ...]
    child_ptr: tuple[NDArray[np.int32], ...]
    child_code: tuple[NDArray[np.int64], ...]
    parent: tuple[NDArray[np.int32], ...]
    leaf_ptr: tuple[NDArray[np.int32], ...]
    leaf_advertiser: NDArray[np.int64]
    path_AL: NDArray[np.int32]

    @classmethod
    def from_codes(cls, codes_AL: NDArray[np.integer], level_sizes: tuple[int, ...]) -> Trie:
        """Build the tree of unique IDs.

        Args:
            codes_AL: the code of each advertiser at each level.
            level_sizes: size of each level's codebook.

        Returns:
            The tree.

        Raises:
            ValueError: no advertiser, two with one ID, or a code outside its level.
        """
        codes = np.asarray(codes_AL)
        if codes.ndim != 2 or not len(codes) or codes.shape[1] != len(level_sizes):
            raise ValueError(f"codes of shape {codes.shape}; expected (advertisers >= 1, {len(level_sizes)} levels)")
        if (codes < 0).any() or (codes >= np.array(level_sizes)).any():
            raise ValueError(f"a code lies outside its level; the sizes are {level_sizes}")
        n, n_levels = codes.shape
        order = np.lexsort(codes.T[::-1])
        child_code, parent, leaf_ptr = [], [], [np.array([0, n], dtype=np.int32)]
        # One level a row, so that the path of one level is one piece of memory.
        path_LA = np.empty((n_levels, n), dtype=np.int32)
        new_node, node = np.arange(n) == 0, np.zeros(n, dtype=np.int32)
        for level in range(n_levels):
            sorted_code = codes[order, level]
            new_node[1:] |= sorted_code[1:] != sorted_code[:-1]  # leaf i is the first below its prefix
            first = np.flatnonzero(new_node)
            child_code.append(sorted_code[first].astype(np.int64))
            parent.append(node[first])
            leaf_ptr.append(np.append(first, n).astype(np.int32))
            node = np.cumsum(new_node, dtype=np.int32) - np.int32(1)
            path_LA[level, order] = node
        if not new_node.all():
            one = order[int(np.argmin(new_node))]
            raise ValueError(f"advertiser {one} shares its ID {codes[one].tolist()} with another one")
        child_ptr = tuple(np.searchsorted(leaf_ptr[d + 1], leaf_ptr[d]).astype(np.int32) for d in range(n_levels))
        return cls(
            level_sizes=tuple(int(size) for size in level_sizes),
            child_ptr=child_ptr,
            child_code=tuple(child_code),
            parent=tuple(parent),
            leaf_ptr=tuple(leaf_ptr),
            leaf_advertiser=order.astype(np.int64, copy=False),
            path_AL=path_LA.T,
        )

    @property
    def advertiser_leaf(self) -> NDArray[np.int32]:
        """Leaf of each advertiser, ``(A,)``: a view of the end of its path."""
        return self.path_AL[:, -1]

    @property
    def nbytes(self) -> int:
        """Memory of all arrays together."""
        by_depth = (self.child_ptr, self.child_code, self.parent, self.leaf_ptr)
        arrays = [*(array for arrays in by_depth for array in arrays), self.leaf_advertiser, self.path_AL]
        return sum(array.nbytes for array in arrays)

    @property
    def n_levels(self) -> int:
        return len(self.level_sizes)

    @property
    def n_advertisers(self) -> int:
        return len(self.leaf_advertiser)

    def n_nodes(self, depth: int) -> int:
        """Number of prefixes of ``depth`` codes."""
        return len(self.leaf_ptr[depth]) - 1

    def node_mass(self, mass_BA: NDArray[np.floating], depth: int) -> NDArray[np.float64]:
        """Mass below every prefix of one depth.

        Args:
            mass_BA: non-negative mass of each advertiser, in advertiser order.
            depth: number of codes of the prefixes.

        Returns:
            ``(B, N_depth)``, float64.
        """
        leaves_BA = np.asarray(mass_BA, dtype=np.float64)[:, self.leaf_advertiser]
        if depth == self.n_levels:
            return leaves_BA
        return np.add.reduceat(leaves_BA, self.leaf_ptr[depth][:-1], axis=1)
