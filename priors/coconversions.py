"""Co-conversions: what those who had bought from b went on to convert with (item-kNN, counted as time goes by).

    N_t[b, a] = Σ over user-periods before t of  h(b) / |targets|  for each target a ≠ b of the period,
                and of these REVERSE to N_t[a, b]: two that are bought one after the other belong together either way
    C_t[b, a] = N_t[b, a] / (Σ over a of N_t[b, a] + κ)      the largest K of each b
    co(a)     = Σ over b of  h(b) · C_t[b, a]                h: the user's own decayed purchases, as shares

So co sums to less than 1, and to the less the fewer conversions have been seen after what the user bought; the rest is
popularity's. This is the smoothing of a language model's bigrams by a Dirichlet prior of mass κ (Zhai & Lafferty 2004,
doi 10.1145/984321.984322).

A pair is counted at the period of its target, with the history *before* that period, and is used from the next
period on. So nobody's neighbours know what is asked for: not in training either.

Shapes: B user-periods, U users, A advertisers, K neighbours.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array

if TYPE_CHECKING:
    from priors.anchor import Counts

Float = NDArray[np.float64]

NEIGHBOURS = 200
REVERSE = 0.3


class CoConversions:
    """The co-conversion term of the anchor.

    Args:
        counts: of the log.
        decay: of the histories, a period.
        neighbours: K.
    """

    def __init__(self, counts: Counts, *, decay: float, neighbours: int = NEIGHBOURS) -> None:
        self.counts, self.decay, self.neighbours = counts, decay, neighbours

    def mass(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer], *, shrinkage: float) -> Float:
        """co(a) of each user at the start of each period.

        Args:
            user_B, period_B: whose, and as of when.
            shrinkage: κ, in user-periods: an advertiser seen less often than this says little about others.

        Returns:
            ``(B, A)``, rows of sums below 1; a row of zeros where nothing is known.
        """
        user_B, period_B = np.asarray(user_B, dtype=np.int64), np.asarray(period_B, dtype=np.int64)
        history_BA = self._history(user_B, period_B)
        mass_BA = np.zeros(history_BA.shape)
        for period in np.unique(period_B):
            rows = np.flatnonzero(period_B == period)
            pairs_AA, seen_A = self._by_period[min(max(int(period), 0), len(self._by_period) - 1)]
            mass_BA[rows] = (history_BA[rows] @ diags_array(1 / (seen_A + shrinkage)) @ pairs_AA).toarray()
        return mass_BA

    def _history(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> csr_array:
        """h: shares of the advertisers in a user's purchases before a period, decayed; rows of zeros without any."""
        row_R, index_R, ago_R = self.counts.history(user_B, period_B)
        first_B = np.full(len(user_B), np.iinfo(np.int64).max)
        np.minimum.at(first_B, row_R, ago_R)  # shares are the same from the latest purchase on, and never underflow
        weight_R = self.counts.count_R[index_R] * self.decay ** (ago_R - first_B[row_R])
        shape = (len(user_B), self.counts.n_advertisers)
        history_BA = csr_array((weight_R, (row_R, self.counts.advertiser_R[index_R])), shape=shape)
        total_B = np.maximum(history_BA.sum(1), 1e-12)
        return (diags_array(1 / total_B) @ history_BA).tocsr()

    @cached_property
    def _by_period(self) -> list[tuple[csr_array, Float]]:
        """The largest K of each row of N at the start of each period, and the rows' sums."""
        counts, n = self.counts, self.counts.n_advertisers
        pairs_AA = csr_array((n, n))
        found = [(pairs_AA, np.zeros(n))]
        for period in range(len(counts.promoted_PA)):
            targets = slice(*np.searchsorted(counts.target_period_T, [period, period + 1]))
            user_T, advertiser_T = counts.target_user_T[targets], counts.target_advertiser_T[targets]
            if not len(user_T):
                found.append(found[-1])
                continue
            user_B, row_T, size_B = np.unique(user_T, return_inverse=True, return_counts=True)
            target_BA = csr_array((1 / size_B[row_T], (row_T, advertiser_T)), shape=(len(user_B), n))
            new_AA = self._history(user_B, np.full(len(user_B), period)).T @ target_BA
            new_AA = (new_AA - diags_array(new_AA.diagonal())).tocsr()
            pairs_AA = pairs_AA + new_AA + REVERSE * new_AA.T
            found.append((self._nearest(pairs_AA), np.asarray(pairs_AA.sum(1)).reshape(-1)))
        return found

    def _nearest(self, pairs_AA: csr_array) -> csr_array:
        """The largest of each row, and those as large as the last of them."""
        near_AA = pairs_AA.copy()
        for row in np.flatnonzero(np.diff(near_AA.indptr) > self.neighbours):
            values = near_AA.data[near_AA.indptr[row] : near_AA.indptr[row + 1]]  # a view
            values[values < np.partition(values, -self.neighbours)[-self.neighbours]] = 0.0
        near_AA.eliminate_zeros()
        return near_AA
