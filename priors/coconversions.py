"""Co-conversions: what those who had bought from b went on to convert with (item-kNN, counted as time goes by).

    N_t[b, a] = Σ over user-periods before t of  h(b) / |targets|  for each target a ≠ b of the period
    C_t[b, a] = N_t[b, a] / (Σ over a of N_t[b, a] + κ)      the largest K of each b
    co(a)     ∝ Σ over b of  h(b) · C_t[b, a]                 h: the user's own decayed purchases, as shares

A pair is counted at the period of its target, with the history *before* that period, and is used from the next
period on. So nobody's neighbours know what is asked for: not in training either.

Shapes: B user-periods, U users, A advertisers, K neighbours.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array, vstack

if TYPE_CHECKING:
    from priors.anchor import Counts

Float = NDArray[np.float64]

NEIGHBOURS = 200
SHRINKAGE = 1.0
"""κ, in user-periods: an advertiser seen less often than this says little about others."""
_ROWS = 1024


class CoConversions:
    """The co-conversion term of the anchor.

    Args:
        counts: of the log.
        decay: δ of the histories, a period.
        neighbours: K.
    """

    def __init__(self, counts: Counts, *, decay: float, neighbours: int = NEIGHBOURS) -> None:
        self.counts, self.decay, self.neighbours = counts, decay, neighbours

    def shares(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> Float:
        """co(a) of each user at the start of each period, ``(B, A)``; a zero row where nothing is known."""
        user_B, period_B = np.asarray(user_B, dtype=np.int64), np.asarray(period_B, dtype=np.int64)
        history_BA = self._history(user_B, period_B)
        mass_BA = np.zeros(history_BA.shape)
        for period in np.unique(period_B):
            rows = np.flatnonzero(period_B == period)
            mass_BA[rows] = (history_BA[rows] @ self._neighbours_of(int(period))).toarray()
        total_B1 = mass_BA.sum(1, keepdims=True)
        return np.divide(mass_BA, total_B1, out=np.zeros_like(mass_BA), where=total_B1 > 0)

    def _history(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> csr_array:
        """h: shares of the advertisers in a user's purchases before a period, decayed; rows of zeros without any."""
        row_R, index_R, ago_R = self.counts.history(user_B, period_B)
        weight_R = self.counts.count_R[index_R] * self.decay**ago_R
        shape = (len(user_B), self.counts.n_advertisers)
        history_BA = csr_array((weight_R, (row_R, self.counts.advertiser_R[index_R])), shape=shape)
        total_B = np.maximum(history_BA.sum(1), 1e-12)
        return (diags_array(1 / total_B) @ history_BA).tocsr()

    def _neighbours_of(self, period: int) -> csr_array:
        """C at the start of a period."""
        return self._by_period[min(max(period, 0), len(self._by_period) - 1)]

    @cached_property
    def _by_period(self) -> list[csr_array]:
        counts, n = self.counts, self.counts.n_advertisers
        pairs_AA, found = csr_array((n, n)), [csr_array((n, n))]
        for period in range(len(counts.promoted_PA)):
            targets = slice(*np.searchsorted(counts.target_period_T, [period, period + 1]))
            user_T, advertiser_T = counts.target_user_T[targets], counts.target_advertiser_T[targets]
            if len(user_T):
                user_B, row_T, size_B = np.unique(user_T, return_inverse=True, return_counts=True)
                cells = (row_T, advertiser_T)
                target_BA = csr_array((1 / size_B[row_T], cells), shape=(len(user_B), n))
                pairs_AA = pairs_AA + self._history(user_B, np.full(len(user_B), period)).T @ target_BA
            found.append(self._nearest(pairs_AA) if len(user_T) else found[-1])
        return found

    def _nearest(self, pairs_AA: csr_array) -> csr_array:
        """The largest of each row but for the diagonal, as shares of the row's mass and κ."""
        parts, n = [], pairs_AA.shape[1]
        kept = min(self.neighbours, n)
        for start in range(0, n, _ROWS):
            block_BA = pairs_AA[start : start + _ROWS].toarray()
            rows_B1 = np.arange(len(block_BA))[:, None]
            block_BA[rows_B1[:, 0], start + rows_B1[:, 0]] = 0.0
            best_BK = np.argpartition(-block_BA, kept - 1, axis=1)[:, :kept]
            share_BK = block_BA[rows_B1, best_BK] / (block_BA.sum(1, keepdims=True) + SHRINKAGE)
            cells = (np.repeat(rows_B1[:, 0], kept), best_BK.ravel())
            part = csr_array((share_BK.ravel(), cells), shape=block_BA.shape)
            part.eliminate_zeros()
            parts.append(part)
        return vstack(parts, format="csr")
