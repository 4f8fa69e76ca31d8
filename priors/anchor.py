"""The anchor: how often, and how lately, users have converted with advertisers.

    q_u(a) ∝ (λ · own(a) + μ · co(a) + the rest · pop(a)) · r(a)^γ · ω where the user bought a before t
             pop alone where the user has no history
    pop(a) ∝ s + Σ over promoted conversions with a before t of  ρ^(periods ago)
    own(a) ∝ g(a) · Σ over the user's purchases of a before t of  δ^(periods ago);   adds up to n / (n + ν)
    n      = Σ over the user's purchases before t of  δ^(periods ago)
    g(a)   = sqrt(a's share of promoted conversions / a's share of all purchases)
    co(a)    co-conversions with what the user bought, the less the fewer were seen: `priors.coconversions`
    r(a)     how much of a runs in the period asked for, against what it used to run: `priors.plan`

``prior.anchor.kind`` says which terms there are: λ and μ are 0 for ``popularity``, μ is 0 for
``popularity+history``, and ``none`` is uniform over the legal children of every prefix.
Of a user who bought little, little is known: the share of own purchases grows with their number, as the mean of a
Dirichlet prior around popularity would have it, but no further than λ. Where hardly anybody buys a thing twice, ω is
near 0 (``prior=items``); else it is 1.
Everything is counted up to the as-of time, the start of the period asked for: never the period itself, of which only
the plan is known.

The *tuned* anchor puts an exponent on q and a bias on each code, level by level, inside the softmax
over a prefix's legal children, so that it stays a distribution:

    log P(child | prefix, u) = log_softmax over siblings of ( α_l · log q_u(child | prefix) + b_l[code] )

These scores are the base on which the LM learns its residual. A correction that holds for all users
is thus the anchor's, and no credit to the LM.

Shapes: B user-periods, A advertisers, N_d trie nodes of depth d, V codes of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from data.log import Log, Targets
from priors.coconversions import CoConversions
from priors.plan import planned
from semantic_ids.trie import Trie

Float = NDArray[np.float64]
F = TypeVar("F", np.float32, np.float64)


@dataclass(frozen=True)
class AnchorConstants:
    """The constants of the counting formula.

    Attributes:
        own_weight: λ.
        own_decay: δ.
        own_shrinkage: ν, in purchases; 0 trusts the first one as much as the thousandth.
        popularity_decay: ρ.
        smoothing: s.
        co_weight: μ.
        co_decay: by which a purchase's weight falls a period, for what it says of others.
        co_shrinkage: κ.
        plan_exponent: γ.
        repeat_factor: ω, what the mass of all that a user bought before is multiplied by.
        alone_decay, alone_smoothing, alone_plan_exponent: ρ, s and γ of popularity where it stands alone; None: the
            same.
    """

    own_weight: float = 0.5
    own_decay: float = 0.97
    popularity_decay: float = 1.0
    smoothing: float = 0.3
    co_weight: float = 0.0
    co_decay: float = 0.97
    co_shrinkage: float = 1.0
    plan_exponent: float = 0.0
    own_shrinkage: float = 0.0
    repeat_factor: float = 1.0
    alone_decay: float | None = None
    alone_smoothing: float | None = None
    alone_plan_exponent: float | None = None

    @property
    def of_few(self) -> bool:
        """Whether all that it knows of a user is a weighted sum over the few advertisers that the user bought from."""
        return not self.co_weight and self.repeat_factor == 1


@dataclass(frozen=True)
class Counts:
    """Conversions and purchases, added up by period.

    Attributes:
        promoted_PA: label conversions of each advertiser in each period; row p is period p, row 0 empty.
        bought_PA: purchases of each advertiser in each period, promoted or not.
        user_ptr: rows of user u below are ``user_ptr[u]:user_ptr[u + 1]``.
        period_R, advertiser_R, count_R: purchases by (user, period, advertiser), in that order.
        target_period_T, target_user_T, target_advertiser_T: distinct label conversions, in that order.
        plan_PA: log r of each advertiser, of one period more; None where the plan says nothing.
    """

    promoted_PA: Float
    bought_PA: Float
    user_ptr: NDArray[np.int64]
    period_R: NDArray[np.int64]
    advertiser_R: NDArray[np.int64]
    count_R: Float
    target_period_T: NDArray[np.int64]
    target_user_T: NDArray[np.int64]
    target_advertiser_T: NDArray[np.int64]
    plan_PA: Float | None = None

    @classmethod
    def of(cls, log: Log) -> Counts:
        """Count the events of a log, and compare the ads that run."""
        events, n_advertisers = log.events, len(log.advertiser_ids)
        n_periods = int(events.counted_period.max(initial=0)) + 1
        known = events.advertiser >= 0
        bought, promoted = known & log.is_purchase, known & log.is_label
        period = events.counted_period

        def by_period(mask: NDArray[np.bool_]) -> Float:
            cell = period[mask].astype(np.int64) * n_advertisers + events.advertiser[mask]
            return (
                np.bincount(cell, minlength=n_periods * n_advertisers).reshape(n_periods, n_advertisers).astype(float)
            )

        user = events.user[bought].astype(np.int64)
        key = (user * n_periods + period[bought]) * n_advertisers + events.advertiser[bought]
        cells, counts = np.unique(key, return_counts=True)
        rest, advertiser = np.divmod(cells, n_advertisers)
        row_user, row_period = np.divmod(rest, n_periods)
        user = events.user[promoted].astype(np.int64)
        key = (period[promoted].astype(np.int64) * len(log.user_ids) + user) * n_advertisers + events.advertiser[
            promoted
        ]
        rest, target_advertiser = np.divmod(np.unique(key), n_advertisers)
        target_period, target_user = np.divmod(rest, len(log.user_ids))
        return cls(
            promoted_PA=by_period(promoted),
            bought_PA=by_period(bought),
            user_ptr=np.searchsorted(row_user, np.arange(len(log.user_ids) + 1)),
            period_R=row_period,
            advertiser_R=advertiser,
            count_R=counts.astype(float),
            target_period_T=target_period,
            target_user_T=target_user,
            target_advertiser_T=target_advertiser,
            plan_PA=planned(log, n_periods + 1),
        )

    @property
    def n_advertisers(self) -> int:
        return self.promoted_PA.shape[1]

    def history(
        self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Purchases of users before periods.

        Returns:
            Of each purchase its row of ``user_B``, its row of ``count_R``, and how many periods ago it was.
        """
        start_B, stop_B = self.user_ptr[user_B], self.user_ptr[user_B + 1]
        length_B = stop_B - start_B
        row_R = np.repeat(np.arange(len(user_B)), length_B)
        index_R = np.arange(length_B.sum()) - np.repeat(np.cumsum(length_B) - length_B, length_B) + start_B[row_R]
        ago_R = period_B[row_R] - self.period_R[index_R]
        before_R = ago_R > 0
        return row_R[before_R], index_R[before_R], ago_R[before_R]


class Anchor:
    """The smoothed empirical prior of every user.

    Args:
        counts: of the log.
        constants: λ, μ, δ, ρ, s, γ and those of co-conversions.
    """

    def __init__(self, counts: Counts, constants: AnchorConstants) -> None:
        self.counts, self.constants = counts, constants
        n_periods, n_advertisers = counts.promoted_PA.shape
        # Row p: the state at the start of period p. One row past the last period, which may be forecast.
        self._popularity_PA = np.zeros((n_periods + 1, n_advertisers))
        for period in range(1, n_periods + 1):
            before = self._popularity_PA[period - 1] + counts.promoted_PA[period - 1]
            self._popularity_PA[period] = constants.popularity_decay * before
        self._promotion_PA = np.vstack([np.ones((1, n_advertisers)), _promotion(counts)])
        exponent = constants.plan_exponent
        self._plan_PA = None if counts.plan_PA is None or exponent == 0 else exponent * counts.plan_PA
        self.co_conversions = CoConversions(counts, decay=constants.co_decay)  # counted when first asked for

    def popularity_alone(self) -> Anchor:
        """The anchor without what it knows of the user, with the constants that are best for that."""
        c = self.constants
        decay = c.popularity_decay if c.alone_decay is None else c.alone_decay
        smoothing = c.smoothing if c.alone_smoothing is None else c.alone_smoothing
        exponent = c.plan_exponent if c.alone_plan_exponent is None else c.alone_plan_exponent
        alone = replace(
            c,
            own_weight=0.0,
            co_weight=0.0,
            repeat_factor=1.0,
            popularity_decay=decay,
            smoothing=smoothing,
            plan_exponent=exponent,
        )
        return Anchor(self.counts, alone)

    def plan(self, period_B: NDArray[np.integer]) -> Float:
        """log r(a)^γ of each period, ``(B, A)``, or ``(B, 1)`` of zeros where the plan has no say."""
        if self._plan_PA is None:
            return np.zeros((len(period_B), 1))
        return self._plan_PA[self._clip(period_B)]

    def replanned(
        self, log_prob_BA: NDArray[F], made_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> NDArray[F]:
        """Forecasts made for a period, with the plan of another in the place of its own: times r_t(a)^γ / r_made(a)^γ.

        Args:
            log_prob_BA: log-probabilities of all advertisers.
            made_B: periods whose plan they hold.
            period_B: periods they are asked for.

        Returns:
            ``(B, A)``, distributions again; the same bytes where nothing changes.
        """
        stale_B = np.asarray(made_B) != np.asarray(period_B)
        if self._plan_PA is None or not stale_B.any():
            return log_prob_BA
        found_BA = log_prob_BA.copy()
        change_BA = self.plan(period_B[stale_B]) - self.plan(made_B[stale_B])
        found_BA[stale_B] = log_softmax(log_prob_BA[stale_B] + change_BA, axis=1)
        return found_BA

    def popularity(self, period_B: NDArray[np.integer]) -> Float:
        """pop(a) at the start of each period, ``(B, A)``; uniform before the first conversion."""
        mass_BA = self._popularity_PA[self._clip(period_B)] + self.constants.smoothing
        return mass_BA / mass_BA.sum(1, keepdims=True)

    def promotion(self, period_B: NDArray[np.integer]) -> Float:
        """g(a) at the start of each period, ``(B, A)``; 1 where nothing of an advertiser was bought yet."""
        return self._promotion_PA[self._clip(period_B)]

    def own(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> Float:
        """own(a) of each user at the start of each period, ``(B, A)``; rows of sums below 1, of 0 without a history."""
        counts, user_B = self.counts, np.asarray(user_B, dtype=np.int64)
        row_R, index_R, ago_R = counts.history(user_B, np.asarray(period_B, dtype=np.int64))
        weight_R = counts.count_R[index_R] * self.constants.own_decay**ago_R
        cell_R = row_R * counts.n_advertisers + counts.advertiser_R[index_R]
        mass_BA = np.bincount(cell_R, weight_R, minlength=len(user_B) * counts.n_advertisers)
        mass_BA = mass_BA.reshape(len(user_B), counts.n_advertisers)
        known_B1 = trust(mass_BA.sum(1, keepdims=True), self.constants.own_shrinkage)
        promoted_BA = mass_BA * self.promotion(period_B)
        total_B1 = promoted_BA.sum(1, keepdims=True)
        return known_B1 * np.divide(promoted_BA, total_B1, out=np.zeros_like(promoted_BA), where=total_B1 > 0)

    def bought(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Whether each user bought a before the start of each period, ``(B, A)``."""
        counts, user_B = self.counts, np.asarray(user_B, dtype=np.int64)
        row_R, index_R, _ = counts.history(user_B, np.asarray(period_B, dtype=np.int64))
        bought_BA = np.zeros((len(user_B), counts.n_advertisers), dtype=bool)
        bought_BA[row_R, counts.advertiser_R[index_R]] = True
        return bought_BA

    def co(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> Float:
        """co(a) of each user at the start of each period, ``(B, A)``; rows of sums below 1."""
        return self.co_conversions.mass(user_B, period_B, shrinkage=self.constants.co_shrinkage)

    def probabilities(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> Float:
        """q_u(a) at the start of each period.

        Args:
            user_B: user indexes.
            period_B: periods whose start is the as-of time.

        Returns:
            ``(B, A)``; each row sums to 1.
        """
        return self.parts(user_B, period_B)[0]

    def parts(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> tuple[Float, Float]:
        """:meth:`probabilities`, and what of them is the user's own purchases, λ · own(a).

        Returns:
            ``(B, A)`` each; the second is nowhere more than the first.
        """
        constants = self.constants
        popularity_BA = self.popularity(period_B)
        own_BA = self.own(user_B, period_B) if constants.own_weight > 0 else np.zeros((1, 1))
        co_BA = self.co(user_B, period_B) if constants.co_weight > 0 else np.zeros((1, 1))
        q_BA = mixture(own_BA, co_BA, popularity_BA, constants.own_weight, constants.co_weight)
        own_BA = np.broadcast_to(constants.own_weight * own_BA, q_BA.shape)
        if self._plan_PA is None and constants.repeat_factor == 1:
            return q_BA, own_BA
        factor_BA = np.exp(self.plan(period_B))
        if constants.repeat_factor != 1:
            factor_BA = np.where(self.bought(user_B, period_B), constants.repeat_factor, 1.0) * factor_BA
        total_B1 = (q_BA * factor_BA).sum(1, keepdims=True)
        return q_BA * factor_BA / total_B1, own_BA * factor_BA / total_B1

    def _clip(self, period_B: NDArray[np.integer]) -> NDArray[np.int64]:
        return np.clip(np.asarray(period_B, dtype=np.int64), 0, len(self._popularity_PA) - 1)


def _promotion(counts: Counts) -> Float:
    """g(a) of each advertiser after each period, ``(P, A)``."""
    promoted_PA, bought_PA = (np.cumsum(x, axis=0) for x in (counts.promoted_PA, counts.bought_PA))
    with np.errstate(invalid="ignore", divide="ignore"):
        share_PA = promoted_PA / promoted_PA.sum(1, keepdims=True)
        ratio_PA = share_PA / (bought_PA / bought_PA.sum(1, keepdims=True))
    # Without a promoted conversion so far an advertiser keeps a little of its weight.
    floor = 0.5 / np.maximum(promoted_PA.sum(1, keepdims=True), 1.0)
    return np.sqrt(np.where(np.isfinite(ratio_PA), np.maximum(ratio_PA, floor), 1.0))


def trust(purchases: NDArray[Any], shrinkage: float) -> Float:
    """n / (n + ν), how far a user's own purchases are trusted; 0 without any."""
    return np.divide(purchases, purchases + shrinkage, out=np.zeros(purchases.shape), where=purchases > 0)


def mixture(own: Float, co: Float, popularity: Float, own_weight: float, co_weight: float) -> Float:
    """q_u before the plan; what a part leaves of its weight, all where it knows nothing of a user, is popularity's."""
    known = own_weight * own + co_weight * co
    return known + (1 - known.sum(-1, keepdims=True)) * popularity


@dataclass(frozen=True)
class TunedAnchor:
    """The anchor as a distribution over the trie, with its exponents and biases a level.

    Attributes:
        anchor: the counting model.
        trie: the advertisers' IDs.
        exponent_L: α of each level; ones leave q as it is.
        bias_LV: b of each level's codes; zeros leave q as it is.
    """

    anchor: Anchor
    trie: Trie
    exponent_L: Float
    bias_LV: list[Float] = field(default_factory=list)

    @classmethod
    def untuned(cls, anchor: Anchor, trie: Trie) -> TunedAnchor:
        """q itself."""
        return cls(anchor, trie, np.ones(trie.n_levels), [np.zeros(size) for size in trie.level_sizes])

    @classmethod
    def uniform(cls, anchor: Anchor, trie: Trie) -> TunedAnchor:
        """No anchor: the same score for every legal child."""
        return replace(cls.untuned(anchor, trie), exponent_L=np.zeros(trie.n_levels))

    def raised(self, exponent_L: Sequence[float]) -> TunedAnchor:
        """Its scores of each level times an exponent: flatter below 1, sharper above."""
        scales = np.asarray(exponent_L)
        biases = [scale * bias_V for scale, bias_V in zip(scales, self.bias_LV, strict=True)]
        return replace(self, exponent_L=scales * self.exponent_L, bias_LV=biases)

    def child_scores(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> list[Float]:
        """Base score of every node given its parent, before the softmax over siblings.

        Returns:
            One ``(B, N_{d+1})`` for each depth d < L; equal to ``log q(child | prefix)`` where untuned.
        """
        return self.scores_of(self.anchor.probabilities(user_B, period_B))

    def scores_of(self, q_BA: Float) -> list[Float]:
        """:meth:`child_scores` of a distribution given as ``(B, A)``."""
        trie, scores = self.trie, []
        parent_BN = np.ones((len(q_BA), 1))
        for depth in range(trie.n_levels):
            mass_BN = trie.node_mass(q_BA, depth + 1)
            conditional_BN = np.log(mass_BN) - np.log(parent_BN)[:, trie.parent[depth]]
            bias_N = self.bias_LV[depth][trie.child_code[depth]]
            scores.append(self.exponent_L[depth] * conditional_BN + bias_N)
            parent_BN = mass_BN
        return scores

    def repeat_shares(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> list[Float]:
        """Part of the mass below every node that is the user's own purchases, λ · own.

        Returns:
            One ``(B, N_{d+1})`` for each depth d < L, of 0 to 1; exponents and biases have no part in it.
        """
        return self.shares_of(*self.anchor.parts(user_B, period_B))

    def shares_of(self, whole_BA: Float, own_BA: Float) -> list[Float]:
        """:meth:`repeat_shares` of :meth:`Anchor.parts`."""
        depths = range(1, self.trie.n_levels + 1)
        return [self.trie.node_mass(own_BA, depth) / self.trie.node_mass(whole_BA, depth) for depth in depths]

    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> Float:
        """Log-probability of every advertiser, ``(B, A)``; the exponentials of a row sum to 1."""
        leaf_BA = path_log_probs(self.trie, self.child_scores(user_B, period_B))[-1]
        return leaf_BA[:, self.trie.advertiser_leaf]

    def to_plain(self) -> dict[str, Any]:
        """Plain types for a manifest or JSON file."""
        # A constant that an older artifact does not know stays out, so that its forecasts keep their version.
        given = self.anchor.constants
        constants = {name: value for name, value in vars(given).items() if value is not None}
        if given.repeat_factor == 1:
            del constants["repeat_factor"]
        return {
            "constants": constants,
            "exponent": self.exponent_L.tolist(),
            "bias": [bias.tolist() for bias in self.bias_LV],
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any], counts: Counts, trie: Trie) -> TunedAnchor:
        """Back from :meth:`to_plain`."""
        anchor = Anchor(counts, AnchorConstants(**plain["constants"]))
        return cls(anchor, trie, np.array(plain["exponent"]), [np.array(bias) for bias in plain["bias"]])


def path_log_probs(trie: Trie, scores: list[Float]) -> list[Float]:
    """Log-probability of every prefix from the scores of its codes.

    Args:
        trie: the prefixes.
        scores: score of every node given its parent, ``(B, N_{d+1})`` for each depth d.

    Returns:
        One ``(B, N_{d+1})`` for each depth; the last is over the leaves.
    """
    above_BN, paths = np.zeros((len(scores[0]), 1)), []
    for depth, score_BN in enumerate(scores):
        starts, parent = trie.child_ptr[depth][:-1], trie.parent[depth]
        top_BN = np.maximum.reduceat(score_BN, starts, axis=1)
        total_BN = np.add.reduceat(np.exp(score_BN - top_BN[:, parent]), starts, axis=1)
        above_BN = above_BN[:, parent] + score_BN - (top_BN + np.log(total_BN))[:, parent]
        paths.append(above_BN)
    return paths


def mean_target_nll(log_prob_T: Float, targets: Targets, share_T: Float | None = None) -> Float:
    """NLL of each row of targets: the mean over its targets, weighted by shares where they are given, ``(R,)``.

    With shares a row may be without any target, and is 0.
    """
    if share_T is not None:
        return np.bincount(targets.row, -share_T * log_prob_T, minlength=len(targets)).astype(np.float64)
    return -np.add.reduceat(log_prob_T, targets.ptr[:-1]) / np.diff(targets.ptr)
