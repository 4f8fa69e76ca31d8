"""The tuned anchor's scores of the children of a few prefixes, at a cost that does not grow with the advertisers.

:class:`~priors.anchor.TunedAnchor` gives the scores of all nodes, ``(B, N)``. Decoding asks for the children of the
prefixes it follows. The mass below a node is

    q_u(node) = λ_u · own(node) + (1 - λ_u) · pop(node)

pop(node) is the same for all users: added up once a period (and set of active advertisers), then looked up.
own(node) is not 0 on the paths of the user's own advertisers only: those of a batch are one sorted list. The plan of
campaigns weighs both, advertiser by advertiser, so that masses need not sum to 1: only their ratios are read.

    period ─► pop of every node, once          ─┐
    users  ─► own mass of (row, node), sparse  ─┴─► log mass of child and of parent ─► score of the child

A counting model with further terms is asked for the mass of every advertiser instead, at a cost that grows with them.

Among active advertisers only, q is what is left of it there: masses below a node count active advertisers alone.

Shapes: B rows, N nodes of all depths, H own nodes of a batch, E prefixes, M their children.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from priors.anchor import Anchor, TunedAnchor, trust
from priors.flat_trie import ActiveSets, FlatTrie

_KEPT_PERIODS = 8


class AnchorTree:
    """The tuned anchor over a flat trie.

    Args:
        base: the tuned anchor.
        flat: its trie.
        repeats: tell with each score what of the node is the user's own purchases.
    """

    def __init__(self, base: TunedAnchor, flat: FlatTrie, *, repeats: bool = False) -> None:
        self.base, self.flat, self.repeats = base, flat, repeats
        self.sparse = type(base.anchor) is Anchor and base.anchor.constants.of_few
        device = flat.leaf_N.device
        self.exponent_L = torch.from_numpy(np.asarray(base.exponent_L, dtype=np.float64)).to(device)
        bias = [bias_V[code_N] for bias_V, code_N in zip(base.bias_LV, flat.trie.child_code, strict=True)]
        self.bias_N = torch.from_numpy(np.concatenate([np.zeros(1), *bias])).to(device)
        self._popularity: OrderedDict[int, NDArray[np.float64]] = OrderedDict()
        self._nodes: OrderedDict[int, Tensor] = OrderedDict()

    def open(
        self, user_B: NDArray[np.integer], period_B: NDArray[np.integer], active: ActiveSets
    ) -> OpenAnchor | DenseAnchor:
        """What the scores of a batch are looked up in.

        Args:
            user_B: user indexes.
            period_B: periods whose start is the as-of time.
            active: the advertisers that count.
        """
        device = self.flat.leaf_N.device
        if not self.sparse:

            def nodes(mass_BA: NDArray[np.float64]) -> Tensor:
                mass_BA = mass_BA[:, self.flat.trie.leaf_advertiser]
                if active.leaf_mask_GA is not None:
                    mass_BA = mass_BA * active.leaf_mask_GA[active.group_B.cpu().numpy()]
                return torch.stack([self._add_up(mass_A) for mass_A in mass_BA])

            whole_BA, own_BA = self.base.anchor.parts(user_B, period_B)
            return DenseAnchor(self, nodes(whole_BA), nodes(own_BA) if self.repeats else None)
        row_H, advertiser_H, mass_H, trust_B = self._own(user_B, period_B)
        weight_B = self.base.anchor.constants.own_weight * trust_B
        mass_H = weight_B[row_H] * mass_H * self._plan_of(period_B, row_H, advertiser_H)
        if active.leaf_mask_GA is not None:
            leaf_H = self.flat.trie.advertiser_leaf[advertiser_H]
            kept_H = active.leaf_mask_GA[active.group_B.cpu().numpy()[row_H], leaf_H]
            row_H, advertiser_H, mass_H = row_H[kept_H], advertiser_H[kept_H], mass_H[kept_H]
        # Mass of every node on the way: the root's too, which is 1 where everyone is active.
        node_HD = np.column_stack([np.zeros(len(row_H), np.int64), self.flat.path_nodes(advertiser_H)])
        key_HD = row_H[:, None] * self.flat.n_nodes + node_HD
        key_U, inverse = np.unique(key_HD, return_inverse=True)
        own_U = np.bincount(inverse.reshape(-1), np.repeat(mass_H, node_HD.shape[1]), minlength=len(key_U))
        groups = active.group_B.cpu().numpy()
        kinds, kind_B = np.unique(np.stack([period_B, groups]), axis=1, return_inverse=True)
        popularity = [self._popularity_nodes(int(period), int(group), active) for period, group in kinds.T]
        return OpenAnchor(
            tree=self,
            key_U=torch.from_numpy(key_U).to(device),
            own_U=torch.from_numpy(own_U).to(device),
            weight_B=torch.from_numpy(weight_B).to(device),
            popularity=popularity,
            kind_B=torch.from_numpy(kind_B.reshape(-1)).to(device),
        )

    def scores(self, mass_M: Tensor, mass_E: Tensor, node_E: Tensor, entry_M: Tensor, child_M: Tensor) -> Tensor:
        """Scores of children from the mass below them and below their parents, ``(M,)``."""
        exponent_E = self.exponent_L[self.flat.depth_N[node_E].long()]
        return exponent_E[entry_M] * (mass_M.log() - mass_E.log()[entry_M]) + self.bias_N[child_M]

    def _own(
        self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
        """Row, advertiser and share of the row's own purchases, each pair once; and how far each row's are trusted."""
        anchor, counts = self.base.anchor, self.base.anchor.counts
        user_B, period_B = np.asarray(user_B, dtype=np.int64), np.asarray(period_B, dtype=np.int64)
        row_R, index_R, ago_R = counts.history(user_B, period_B)
        weight_R = counts.count_R[index_R] * anchor.constants.own_decay**ago_R
        cell_H, inverse = np.unique(row_R * counts.n_advertisers + counts.advertiser_R[index_R], return_inverse=True)
        row_H, advertiser_H = np.divmod(cell_H, counts.n_advertisers)
        mass_H = np.bincount(inverse.reshape(-1), weight_R, minlength=len(cell_H))
        trust_B = trust(np.bincount(row_H, mass_H, minlength=len(user_B)), anchor.constants.own_shrinkage)
        kinds, kind_B = np.unique(period_B, return_inverse=True)
        mass_H = mass_H * anchor.promotion(kinds)[kind_B[row_H], advertiser_H]
        total_B = np.bincount(row_H, mass_H, minlength=len(user_B))
        return row_H, advertiser_H, mass_H / total_B[row_H], trust_B

    def _plan_of(
        self, period_B: NDArray[np.integer], row_H: NDArray[np.int64], advertiser_H: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """r(a)^γ of advertisers in the periods of their rows."""
        kinds, kind_B = np.unique(period_B, return_inverse=True)
        plan_KA = np.broadcast_to(self.base.anchor.plan(kinds), (len(kinds), self.flat.trie.n_advertisers))
        return np.exp(plan_KA[kind_B[row_H], advertiser_H])

    def _popularity_nodes(self, period: int, group: int, active: ActiveSets) -> Tensor:
        """pop below every node at the start of a period, weighed by its plan, ``(N,)``; of active advertisers alone."""
        if period not in self._popularity:
            of_period = np.array([period])
            anchor = self.base.anchor
            popularity_A = (anchor.popularity(of_period) * np.exp(anchor.plan(of_period)))[0]
            _remember(self._popularity, period, popularity_A[self.flat.trie.leaf_advertiser])
        leaf_A = self._popularity[period]
        if active.leaf_mask_GA is not None:
            return self._add_up(leaf_A * active.leaf_mask_GA[group])
        if period not in self._nodes:
            _remember(self._nodes, period, self._add_up(leaf_A))
        return self._nodes[period]

    def _add_up(self, leaf_A: NDArray[np.float64]) -> Tensor:
        starts = [ptr[:-1] for ptr in self.flat.trie.leaf_ptr]
        masses = [np.add.reduceat(leaf_A, start) for start in starts[:-1]]
        return torch.from_numpy(np.concatenate([*masses, leaf_A])).to(self.flat.leaf_N.device)


def _remember(cache: OrderedDict, key: int, value: object) -> None:
    cache[key] = value
    while len(cache) > _KEPT_PERIODS:
        cache.popitem(last=False)


@dataclass(frozen=True)
class OpenAnchor:
    """The anchor of the rows of one batch.

    Attributes:
        tree: constants of the scores.
        key_U: row · N + node of every node with own mass, rising.
        own_U: that mass, times its weight λ_u.
        weight_B: λ_u of each row; 0 without a history.
        popularity: mass of every node, ``(N,)`` for each kind of row.
        kind_B: which of them each row has.
    """

    tree: AnchorTree
    key_U: Tensor
    own_U: Tensor
    weight_B: Tensor
    popularity: list[Tensor]
    kind_B: Tensor

    def scores(self, row_E: Tensor, node_E: Tensor, entry_M: Tensor, child_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """Base score of children given their parents, as :meth:`TunedAnchor.child_scores` has them.

        Args:
            row_E, node_E: the parents.
            entry_M: parent of each child.
            child_M: the children.

        Returns:
            ``(M,)``, and the part of the mass below each child that is the user's own purchases, as of
            :meth:`TunedAnchor.repeat_shares`; None where the tree was made without ``repeats``.
        """
        mass_M, own_M = self._mass(row_E[entry_M], child_M)
        mass_E, _ = self._mass(row_E, node_E)
        repeat_M = own_M / mass_M if self.tree.repeats else None
        return self.tree.scores(mass_M, mass_E, node_E, entry_M, child_M), repeat_M

    def _mass(self, row_M: Tensor, node_M: Tensor) -> tuple[Tensor, Tensor]:
        """q_u below nodes, and λ_u · own of it, ``(M,)`` each."""
        if len(self.popularity) == 1:
            popularity_M = self.popularity[0][node_M]
        else:
            popularity_M = torch.empty(len(node_M), dtype=torch.float64, device=node_M.device)
            kind_M = self.kind_B[row_M]
            for kind, popularity_N in enumerate(self.popularity):
                here = kind_M == kind
                popularity_M[here] = popularity_N[node_M[here]]
        own_M = self._own(row_M, node_M)
        return (1 - self.weight_B[row_M]) * popularity_M + own_M, own_M

    def _own(self, row_M: Tensor, node_M: Tensor) -> Tensor:
        if not len(self.key_U):
            return torch.zeros(len(node_M), dtype=torch.float64, device=node_M.device)
        key_M = row_M * self.tree.flat.n_nodes + node_M
        place_M = torch.searchsorted(self.key_U, key_M).clamp_max(len(self.key_U) - 1)
        return torch.where(self.key_U[place_M] == key_M, self.own_U[place_M], 0.0)


@dataclass(frozen=True)
class DenseAnchor:
    """The same of a counting model that tells the mass of every advertiser only.

    Attributes:
        tree: constants of the scores.
        mass_BN: q_u below every node.
        own_BN: λ · own below every node; None: the tree was made without ``repeats``.
    """

    tree: AnchorTree
    mass_BN: Tensor
    own_BN: Tensor | None = None

    def scores(self, row_E: Tensor, node_E: Tensor, entry_M: Tensor, child_M: Tensor) -> tuple[Tensor, Tensor | None]:
        """As of :meth:`OpenAnchor.scores`."""
        mass_M, mass_E = self.mass_BN[row_E[entry_M], child_M], self.mass_BN[row_E, node_E]
        repeat_M = None if self.own_BN is None else self.own_BN[row_E[entry_M], child_M] / mass_M
        return self.tree.scores(mass_M, mass_E, node_E, entry_M, child_M), repeat_M
