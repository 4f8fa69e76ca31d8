"""Forecasts as the stages after them see them: a whole distribution over advertisers, and ranker features.

An advertiser outside the beam backs off to its frontier prefix: the prefix's exact mass is shared among
the advertisers below it in proportion to the anchor. So every advertiser has a probability, and the
probabilities of a user sum to one.

Shapes: B user-periods, R rows of the table, A advertisers, C categories, I listed interests, N rows of the ranker.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from priors.anchor import TunedAnchor, path_log_probs
from priors.interests import Interests
from priors.table import PriorTable
from semantic_ids.trie import Trie

PRIOR_FEATURES = (
    "prior_log_prob",
    "prior_lift",
    "prior_rank",
    "prior_in_beam",
    "prior_prefix_log_prob",
    "prior_entropy",
    "prior_mass",
    "prior_age",
    "prior_missing",
)
"""What every forecast says of a user, a period and an advertiser; `prefix_feature` names those of longer prefixes."""


INTEREST_MATCH = "prior_interests"
"""Name of what :meth:`Forecast.interest_match` says of an ad."""


def prefix_feature(depth: int) -> str:
    """Name of the log-probability of an advertiser's prefix of so many codes, from 1 to one less than an ID has."""
    return "prior_prefix_log_prob" if depth == 1 else f"prior_prefix_{depth}_log_prob"


class Forecast(Protocol):
    """A distribution over all advertisers for every user and period."""

    @property
    def n_advertisers(self) -> int:
        """A."""

    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        """Log-probabilities of the newest forecast at or before each period, by its plan of campaigns, ``(B, A)``."""

    def features(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], advertiser_N: NDArray[np.integer]
    ) -> dict[str, NDArray[np.float32]]:
        """:data:`PRIOR_FEATURES` and every :func:`prefix_feature` of each row, ``(N,)`` each; an advertiser of -1
        has none."""

    @property
    def has_interests(self) -> bool:
        """Whether it says anything of categories."""

    def interest_match(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], ad_N: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Log-probability of each ad's category among the user's interests, ``(N,)``; NaN for an ad of no category."""


class TableForecast:
    """The forecasts of a :class:`~priors.table.PriorTable`, or the tuned anchor's on the same schedule.

    Both arms answer a request with their newest forecast at or before it, made at the same times, so that
    neither is fresher, with the plan of campaigns of the period asked for in the place of its own. A user
    without a forecast gets the tuned anchor's of that period, marked as missing.

    Args:
        table: the LM's forecasts.
        base: the tuned anchor and the trie.
        arm: ``lm`` or ``anchor``.
        interests: the categories and the tuned anchor over them; None: the forecasts have none.
        keep: hold distributions in memory once they were asked for, to give them again.

    Raises:
        LineageError: the forecasts were decoded in another trie.
    """

    def __init__(
        self,
        table: PriorTable,
        base: TunedAnchor,
        *,
        arm: str,
        interests: Interests | None = None,
        keep: bool = True,
    ) -> None:
        if arm not in ("lm", "anchor"):
            raise ValueError(f"arm={arm!r}; expected 'lm' or 'anchor'")
        table.check_trie(base.trie)
        self.table, self.base, self.arm, self.interests = table, base, arm, interests
        self._keep, self._dense = keep, dict[tuple[int, int], NDArray[np.float32]]()

    @property
    def n_advertisers(self) -> int:
        return self.base.trie.n_advertisers

    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        user_B, period_B = np.asarray(user_B, dtype=np.int64), np.asarray(period_B, dtype=np.int64)
        row_B, as_of_B = self.table.newest(user_B, period_B)
        keys = list(zip(user_B.tolist(), as_of_B.tolist(), strict=True))
        missing = sorted(
            {key: row for key, row in zip(keys, row_B.tolist(), strict=True) if key not in self._dense}.items()
        )
        for start in range(0, len(missing), 256):
            chunk = missing[start : start + 256]
            user, as_of = np.array([key for key, _ in chunk]).T
            dense = self._complete(user, as_of, np.array([row for _, row in chunk]))
            self._dense.update((key, values) for (key, _), values in zip(chunk, dense, strict=True))
        if not keys:
            return np.zeros((0, self.n_advertisers), np.float32)
        dense_BA = np.stack([self._dense[key] for key in keys])
        if not self._keep:
            self._dense.clear()
        return self.base.anchor.replanned(dense_BA, as_of_B, period_B)

    def features(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], advertiser_N: NDArray[np.integer]
    ) -> dict[str, NDArray[np.float32]]:
        user_N, period_N = np.asarray(user_N, dtype=np.int64), np.asarray(period_N, dtype=np.int64)
        advertiser_N = np.asarray(advertiser_N, dtype=np.int64)
        pairs, inverse = np.unique(np.stack([user_N, period_N]), axis=1, return_inverse=True)
        inverse = inverse.reshape(-1)
        row_P, as_of_P = self.table.newest(*pairs)
        names = (*PRIOR_FEATURES, *(prefix_feature(depth) for depth in range(2, self.base.trie.n_levels)))
        values = {name: np.zeros(len(user_N), dtype=np.float32) for name in names}
        has = advertiser_N >= 0
        for start in range(0, pairs.shape[1], 256):
            part = slice(start, min(start + 256, pairs.shape[1]))
            rows = np.flatnonzero((inverse >= part.start) & (inverse < part.stop) & has)
            local, advertiser = inverse[rows] - part.start, advertiser_N[rows]
            dense = self.log_probs(pairs[0, part], pairs[1, part]).astype(np.float64)
            found, as_of = row_P[part] >= 0, as_of_P[part]
            anchor = dense if self.arm == "anchor" else self._anchor(pairs[0, part], as_of, pairs[1, part])
            beam_BK = np.where(found[:, None], self.table.advertiser_RK[row_P[part]], -1)
            said = distribution_features(
                dense,
                anchor,
                self.base.trie,
                top=beam_BK.shape[1],
                beam_BK=beam_BK if self.arm == "lm" else None,
                row_N=local,
                advertiser_N=advertiser,
            )
            for name, column in said.items():
                values[name][rows] = column
            values["prior_age"][rows] = (pairs[1, part] - as_of)[local]
            values["prior_missing"][rows] = ~found[local]
        values["prior_missing"][~has] = 1.0
        return values

    @property
    def has_interests(self) -> bool:
        """Whether the forecaster has interests."""
        return self.interests is not None

    def interest_match(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], ad_N: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        match_N = np.full(len(ad_N), np.nan, np.float32)
        if self.interests is None:
            return match_N
        interest_N = self.interests.space.interest_I[np.asarray(ad_N, dtype=np.int64)]
        pairs, inverse_N = np.unique(np.stack([user_N, period_N]).astype(np.int64), axis=1, return_inverse=True)
        inverse_N = inverse_N.reshape(-1)
        order = np.argsort(inverse_N, kind="stable")
        for start in range(0, pairs.shape[1], 256):
            part = slice(start, min(start + 256, pairs.shape[1]))
            rows = order[slice(*np.searchsorted(inverse_N, [part.start, part.stop], sorter=order))]
            rows = rows[interest_N[rows] >= 0]
            log_prob_BC = self.interest_log_probs(*pairs[:, part])
            match_N[rows] = log_prob_BC[inverse_N[rows] - start, interest_N[rows]]
        return match_N

    def interest_log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float64]:
        """Log-probability of every interest by the newest forecast at or before each period, ``(B, C)``.

        What a stored list leaves is shared among the other categories in proportion to the anchor.

        Raises:
            ValueError: the forecaster has none.
        """
        if self.interests is None:
            raise ValueError("a forecaster without interests")
        row_B, as_of_B = self.table.newest(user_B, period_B)
        anchor_BC = self.interests.base.log_probs(user_B, as_of_B)
        if self.arm == "anchor" or not self.table.interests:
            return anchor_BC
        names = {name: index for index, name in enumerate(self.interests.space.names)}
        index_T = np.array([names.get(name, -1) for name in self.table.interests] + [-1])  # -1 pads a list
        interest_BI = index_T[self.table.interest_RI[row_B]]
        kept = (row_B >= 0)[:, None] & (interest_BI >= 0)
        listed_BC = np.full(anchor_BC.shape, -np.inf)
        row, place = np.nonzero(kept)
        listed_BC[row, interest_BI[row, place]] = self.table.interest_log_prob_RI[row_B[row], place]
        prob_BC, listed = np.exp(anchor_BC), np.isfinite(listed_BC)
        rest_B = np.maximum(1.0 - np.exp(listed_BC).sum(1), 1e-15)
        others_B = np.where(listed, 0.0, prob_BC).sum(1)
        rest_BC = anchor_BC + np.log(rest_B / np.where(others_B > 0, others_B, 1.0))[:, None]
        return np.where(listed.any(1, keepdims=True), np.where(listed, listed_BC, rest_BC), anchor_BC)

    def _anchor(self, user: NDArray, as_of: NDArray, period: NDArray) -> NDArray[np.float64]:
        return self.base.anchor.replanned(self.base.log_probs(user, as_of), as_of, period)

    def _complete(self, user: NDArray, as_of: NDArray, row: NDArray) -> NDArray[np.float32]:
        trie = self.base.trie
        leaf_BA = path_log_probs(trie, self.base.child_scores(user, as_of))[-1]
        if self.arm == "lm":
            for index in np.flatnonzero(row >= 0):
                leaf_BA[index] = complete_distribution(self.table, int(row[index]), leaf_BA[index], self.base)
        return leaf_BA[:, trie.advertiser_leaf].astype(np.float32)


def distribution_features(
    log_prob_BA: NDArray[np.float64],
    anchor_BA: NDArray[np.float64],
    trie: Trie,
    *,
    top: int,
    beam_BK: NDArray[np.integer] | None = None,
    row_N: NDArray[np.integer],
    advertiser_N: NDArray[np.integer],
) -> dict[str, NDArray[np.float64]]:
    """What whole distributions say of single advertisers: the prior features but for age and missing.

    Args:
        log_prob_BA: log-probability of every advertiser.
        anchor_BA: what the lift is against.
        trie: of the semantic IDs.
        top: advertisers that a forecast names where it has no beam: the likeliest ones.
        beam_BK: advertisers that a beam found, -1 pads; these are named, and the mass covered is theirs.
        row_N: distribution that each row asks.
        advertiser_N: advertiser that it asks for.

    Returns:
        Features of each row, ``(N,)`` each.
    """
    rank_BA = np.empty(log_prob_BA.shape, dtype=np.int64)
    order_BA = np.argsort(-log_prob_BA, axis=1, kind="stable")
    np.put_along_axis(rank_BA, order_BA, np.arange(log_prob_BA.shape[1])[None], axis=1)
    prob_BA = np.exp(log_prob_BA)
    rank_N = rank_BA[row_N, advertiser_N]
    named_BA = rank_BA < top if beam_BK is None else _members(beam_BK, n=log_prob_BA.shape[1])
    prefixes = {
        prefix_feature(depth): np.log(trie.node_mass(prob_BA, depth)[row_N, trie.path_AL[advertiser_N, depth - 1]])
        for depth in range(1, trie.n_levels)
    }
    return {
        "prior_log_prob": log_prob_BA[row_N, advertiser_N],
        "prior_lift": (log_prob_BA - anchor_BA)[row_N, advertiser_N],
        "prior_rank": np.log1p(rank_N),
        "prior_in_beam": named_BA[row_N, advertiser_N].astype(np.float64),
        "prior_entropy": -(prob_BA * log_prob_BA).sum(1)[row_N],
        "prior_mass": np.where(named_BA, prob_BA, 0.0).sum(1)[row_N],
        **prefixes,
    }


def _members(beam_BK: NDArray[np.integer], *, n: int) -> NDArray[np.bool_]:
    """Which of ``n`` advertisers are in each beam, ``(B, n)``; -1 pads a beam."""
    member_BA = np.zeros((len(beam_BK), n + 1), np.bool_)  # the last column is that of the padding
    np.put_along_axis(member_BA, beam_BK, True, axis=1)
    return member_BA[:, :-1]


def among_active(log_prob_BA: NDArray[np.floating], active_BA: NDArray[np.bool_]) -> NDArray[np.float64]:
    """A forecast among the advertisers that are active, e.g. in the market of a request.

    Args:
        log_prob_BA: of all advertisers, those outside the beam by back-off (:meth:`TableForecast.log_probs`).
        active_BA: True where active, ``(B, A)`` or ``(A,)`` for all rows.

    Returns:
        ``(B, A)``; ``-inf`` for others. The exponentials of a row sum to 1, but for one without anyone active.
    """
    kept_BA = np.where(active_BA, log_prob_BA.astype(np.float64), -np.inf)
    total_B1 = np.logaddexp.reduce(kept_BA, axis=1, keepdims=True)
    return kept_BA - np.where(np.isfinite(total_B1), total_B1, 0.0)


def complete_distribution(
    table: PriorTable, row: int, anchor_A: NDArray[np.float64], base: TunedAnchor
) -> NDArray[np.float64]:
    """Log-probability of every advertiser from one row of the table.

    Args:
        table: the forecasts.
        row: which one.
        anchor_A: the anchor's log-probability of each leaf, in trie order.
        base: gives the trie.

    Returns:
        ``(A,)`` in trie order; the exponentials sum to 1.
    """
    trie = base.trie
    level1 = table.level1_log_prob_RN[row, : trie.n_nodes(1)]
    cell_A = np.repeat(np.arange(trie.n_nodes(1)), np.diff(trie.leaf_ptr[1]))
    level1_A = cell_A.copy()
    mass = list(np.exp(level1))
    # Deeper prefixes last: a cell is what its smallest stored prefix leaves of it.
    for depth, node, log_prob in zip(
        table.frontier_depth_RF[row],
        table.frontier_node_RF[row],
        table.frontier_log_prob_RF[row],
        strict=True,
    ):
        if depth == 0:
            continue
        leaves = slice(trie.leaf_ptr[depth][node], trie.leaf_ptr[depth][node + 1])
        mass[level1_A[leaves.start]] -= np.exp(log_prob)
        cell_A[leaves] = len(mass)
        mass.append(np.exp(log_prob))
    found = table.advertiser_RK[row] >= 0
    leaf_K = trie.advertiser_leaf[table.advertiser_RK[row, found]]
    prob_K = np.exp(table.log_prob_RK[row, found])
    mass_C = np.array(mass)
    np.subtract.at(mass_C, level1_A[leaf_K], prob_K)
    rest_A = np.exp(anchor_A)
    rest_A[leaf_K] = 0.0
    total_C = np.bincount(cell_A, rest_A, minlength=len(mass_C))
    share_C = np.maximum(mass_C, 1e-15) / np.where(total_C > 0, total_C, 1.0)
    complete_A = rest_A * share_C[cell_A]
    complete_A[leaf_K] = prob_K
    return np.log(np.maximum(complete_A, 1e-30)) - np.log(complete_A.sum())
