"""Ads that the same users buy: cosine neighbours, shrunk where few users speak for them.

    similarity(i, j) = users of both / (sqrt(users of i · users of j) + shrinkage)

(Sarwar et al., *Item-based Collaborative Filtering Recommendation Algorithms*, WWW 2001; the shrinkage as in Bell &
Koren, ICDM 2007.) Counted over a span that ends before what they answer, so that they never depend on what comes later.

Shapes: U users, I ads, N neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from data.log import Log
from data.split import Span

BLOCK = 1024


@dataclass(frozen=True)
class Neighbours:
    """The nearest of every ad; those of ad ``i`` are rows ``ptr[i]:ptr[i + 1]``.

    Attributes:
        ptr: shape ``(I + 1,)``.
        ad: neighbours.
        similarity: theirs.
    """

    ptr: NDArray[np.int64]
    ad: NDArray[np.int32]
    similarity: NDArray[np.float32]

    @classmethod
    def fit(cls, log: Log, span: str | Span, *, neighbours: int, shrinkage: float, per_user: int) -> Self:
        """Count the purchases of a span.

        Args:
            log: its events.
            span: of the purchases counted.
            neighbours: N.
            shrinkage: added to the denominator.
            per_user: latest distinct ads of a user that count, which bounds the work of a heavy buyer.
        """
        first, last = log.split.span(span, evaluate=log.evaluate)
        events = log.events
        rows = np.flatnonzero(log.is_purchase & (events.ad >= 0) & (events.period >= first) & (events.period <= last))
        user, ad = _latest(events.user[rows], events.ad[rows], per_user)
        n_ads = len(log.ad_ids)
        bought_UI = csr_array((np.ones(len(user), np.float32), (user, ad)), shape=(len(log.user_ids), n_ads))
        return cls.of(bought_UI, neighbours=neighbours, shrinkage=shrinkage)

    @classmethod
    def of(cls, bought_UI: csr_array, *, neighbours: int, shrinkage: float) -> Self:
        """Neighbours of the columns of a matrix of zeros and ones."""
        n_ads = bought_UI.shape[1]
        users_I = np.asarray(bought_UI.sum(0)).reshape(-1)
        by_ad_IU = csr_array(bought_UI.T)
        sizes, ads, values = [np.zeros(1, np.int64)], [], []
        for start in range(0, n_ads, BLOCK):
            both = csr_array(by_ad_IU[start : start + BLOCK] @ bought_UI)
            row = np.repeat(np.arange(both.shape[0]), np.diff(both.indptr))
            ad, other = row + start, both.indices
            similarity = both.data / (np.sqrt(users_I[ad] * users_I[other]) + shrinkage)
            similarity[ad == other] = 0.0
            order = np.lexsort((other, -similarity, row))
            rank = np.arange(len(order)) - np.repeat(both.indptr[:-1], np.diff(both.indptr))
            kept = order[(rank < neighbours) & (similarity[order] > 0)]
            sizes.append(np.bincount(row[kept], minlength=both.shape[0]))
            ads.append(other[kept])
            values.append(similarity[kept])
        ptr = np.cumsum(np.concatenate(sizes))
        return cls(ptr, _joined(ads, np.int32), _joined(values, np.float32))

    def scores(
        self, ads_N: NDArray[np.integer], weight_N: NDArray[np.floating]
    ) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Neighbours of a user's ads, with weight times similarity; an ad may stand there several times."""
        sizes_N = self.ptr[ads_N + 1] - self.ptr[ads_N]
        rows = np.arange(sizes_N.sum()) + np.repeat(self.ptr[ads_N] - (np.cumsum(sizes_N) - sizes_N), sizes_N)
        return self.ad[rows], np.repeat(weight_N, sizes_N) * self.similarity[rows]


def _latest(
    user_N: NDArray[np.int32], ad_N: NDArray[np.int32], per_user: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Distinct (user, ad) pairs, of each user the ones bought last; the input is in order of (user, time)."""
    key = user_N[::-1].astype(np.int64) << 32 | ad_N[::-1]
    _, last = np.unique(key, return_index=True)
    last = np.sort(last)  # users from the last to the first, of each the latest ad first
    user = user_N[::-1][last]
    starts = np.flatnonzero(np.diff(user, prepend=-1))
    rank = np.arange(len(user)) - np.repeat(starts, np.diff(starts, append=len(user)))
    return user[rank < per_user], ad_N[::-1][last][rank < per_user]


def _joined(parts: list[NDArray], dtype: type) -> NDArray:
    return np.concatenate([*parts, np.zeros(0)]).astype(dtype)
