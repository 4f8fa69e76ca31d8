"""Chooses the anchor's constants on the selection span: the best of a grid, term by term, again until nothing changes.

    ρ, s, γ of popularity alone ─► λ, δ, ν of own purchases ─► λ, μ, κ and the decay of co-conversions ─┐
         ▲                                                                                 └─► ω ──────┤
         └──────────────────── the same with the other terms as they are ◄─────────────────────────────┘

What is best for popularity alone need not be beside own purchases, and the first round does not know what comes next:
it would keep the wrong ones. A round costs no counting that was done before.

Which terms there are is chosen there too (``prior.anchor.kind=auto``): more constants always fit the rows that they
were chosen on, so co-conversions are kept only where their gain is certain (`choose_constants`).

Shapes: R user-periods, T targets, B rows, A advertisers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.artifacts import to_plain
from data.log import Targets
from data.statistics import Interval, paired_bootstrap
from priors.anchor import Anchor, AnchorConstants, Counts, mean_target_nll, trust
from priors.coconversions import CoConversions
from priors.config import AUTO_ANCHOR, AUTO_ANCHORS, AnchorConfig

Float = NDArray[np.float64]
_ROUNDS = 10


@dataclass(frozen=True)
class ChosenConstants:
    """What the selection rows ask for.

    Attributes:
        constants: of the counting formula.
        kind: the terms that they belong to, ``auto`` resolved.
        trials: constants that were tried, each with its NLL, in order.
        nll_R: NLL of each row with the constants.
        gain: NLL with co-conversions less that without, with its interval over users; None where ``prior.anchor.kind``
            names the terms.
    """

    constants: AnchorConstants
    kind: str
    trials: list[dict[str, float]]
    nll_R: Float
    gain: Interval | None = None

    def to_plain(self) -> dict[str, Any]:
        """For the metrics of a stage."""
        return {
            "anchor_kind": self.kind,
            "anchor_constants": vars(self.constants),
            "anchor_trials": self.trials,
            "anchor_cooccurrence_gain": None if self.gain is None else to_plain(self.gain),
        }


def choose_constants(
    counts: Counts, targets: Targets, cfg: AnchorConfig, *, share_T: Float | None = None
) -> ChosenConstants:
    """The constants with the lowest NLL on the given targets.

    The grid's order settles ties. What popularity would have for itself is kept beside them. Where the plan says
    nothing, its exponent is 0.

    Of kind ``auto`` they are chosen with and without co-conversions. Those are kept only where the interval (95 %, over
    users) of what they change of the NLL lies below zero: three constants more gain something on these rows by choice
    alone.

    Args:
        counts: of the log; each row of targets uses those before its period only.
        targets: user-periods of the selection span.
        cfg: which terms, and the grid.
        share_T: weight of each target among those of its row; None: all weigh the same.

    Returns:
        The constants, the terms, and the trials with their NLL.
    """
    parts = _Parts(counts, targets, apart=_chooses_repeats(cfg))
    if cfg.kind != AUTO_ANCHOR:
        return _chosen(parts, cfg, share_T)
    without, with_co = (_chosen(parts, replace(cfg, kind=kind), share_T) for kind in AUTO_ANCHORS)
    gain = change_of_nll(with_co, without, targets)
    kept = with_co if gain.high < 0 else without
    return replace(kept, trials=without.trials + with_co.trials, gain=gain)


def change_of_nll(found: ChosenConstants, other: ChosenConstants, targets: Targets) -> Interval:
    """The NLL of the targets that both were chosen on, of one less the other's, with its interval over users."""
    return paired_bootstrap(found.nll_R, other.nll_R, targets.user)


def _chosen(parts: _Parts, cfg: AnchorConfig, share_T: Float | None) -> ChosenConstants:
    """:func:`choose_constants` for the terms that are named."""
    trials: list[dict[str, float]] = []
    terms = _terms(cfg, planned=parts.counts.plan_PA is not None)

    def of_rows(constants: AnchorConstants) -> Float:
        return mean_target_nll(np.log(parts.probability(constants)), parts.targets, share_T)

    def nll(constants: AnchorConstants) -> float:
        value = float(of_rows(constants).mean())
        trials.append({**vars(constants), "nll": value})
        return value

    best, lowest = AnchorConstants(0.0, 1.0, 1.0, 1.0), np.inf
    for _ in range(_ROUNDS):
        before = lowest
        for term in terms:
            tried = [replace(best, **values) for values in term]
            of_tried = [(nll(one), one) for one in tried if one.own_weight + one.co_weight < 1]
            lowest, best = min(of_tried, key=itemgetter(0))
            if best.alone_decay is None:  # popularity's, before there is anything else
                best = replace(
                    best,
                    alone_decay=best.popularity_decay,
                    alone_smoothing=best.smoothing,
                    alone_plan_exponent=best.plan_exponent,
                )
        if len(terms) == 1 or not lowest < before:
            break
    return ChosenConstants(best, cfg.kind, trials, of_rows(best))


def _terms(cfg: AnchorConfig, *, planned: bool) -> list[list[dict[str, float]]]:
    """What is chosen together, in order."""

    def grid(**values: Sequence[float]) -> list[dict[str, float]]:
        return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]

    exponents = cfg.plan_exponent if planned else [0.0]
    popularity = grid(popularity_decay=cfg.popularity_decay, smoothing=cfg.smoothing, plan_exponent=exponents)
    own = grid(own_decay=cfg.own_decay, own_shrinkage=cfg.own_shrinkage, own_weight=cfg.own_weight)
    co = grid(co_decay=cfg.co_decay, co_shrinkage=cfg.co_shrinkage, own_weight=cfg.own_weight, co_weight=cfg.co_weight)
    terms = [popularity, *([own] if "history" in cfg.kind else []), *([co] if "cooccurrence" in cfg.kind else [])]
    return [*terms, grid(repeat_factor=cfg.repeat_factor)] if _chooses_repeats(cfg) else terms


def _chooses_repeats(cfg: AnchorConfig) -> bool:
    """Whether there is a factor to choose; popularity by itself knows nothing of what a user bought."""
    return cfg.kind not in ("none", "popularity") and list(cfg.repeat_factor) != [1.0]


@dataclass
class _Parts:
    """The terms of the anchor at all targets, each counted once.

    Attributes:
        counts, targets: as of :func:`choose_constants`.
        apart: the sums of what was bought before will be asked for; else they are left at 0.
        known: what was counted.
        pairs: the co-conversions counted last; those of every decay would take memory.
    """

    counts: Counts
    targets: Targets
    apart: bool
    known: dict[tuple[Any, ...], NDArray[Any]] = field(default_factory=dict)
    pairs: CoConversions | None = None

    def probability(self, constants: AnchorConstants) -> Float:
        """q_u of every target, ``(T,)``."""
        c, zero, gamma = constants, np.zeros((1, 4)), constants.plan_exponent
        popularity_T4 = self._once(("popularity", c.popularity_decay, c.smoothing, gamma), self._popularity, c)
        own_T4 = co_T4 = zero
        if c.own_weight > 0:
            trust_T = trust(self._once(("purchases", c.own_decay), self._purchases, c), c.own_shrinkage)
            own_T4 = trust_T[:, None] * self._once(("own", c.own_decay, gamma), self._own, c)
        if c.co_weight > 0:
            co_T4 = self._once(("co", c.co_decay, c.co_shrinkage, gamma), self._co, c)
        known_T4 = c.own_weight * own_T4 + c.co_weight * co_T4
        mixed_T4 = known_T4 + (1 - known_T4[:, 1:2]) * popularity_T4
        mixed_T, total_T = mixed_T4[:, 0], mixed_T4[:, 2]
        if c.repeat_factor != 1:
            bought_T = self._once(("bought",), self._bought, c)
            mixed_T = np.where(bought_T, c.repeat_factor, 1.0) * mixed_T
            total_T = total_T - (1 - c.repeat_factor) * mixed_T4[:, 3]
        probability_T: Float = mixed_T / total_T
        return probability_T

    def _popularity(self, constants: AnchorConstants) -> Float:
        anchor = Anchor(self.counts, constants)
        return self._at_targets(lambda user, period: anchor.popularity(period), anchor)

    def _own(self, constants: AnchorConstants) -> Float:
        anchor = Anchor(self.counts, replace(constants, own_shrinkage=0.0))
        return self._at_targets(anchor.own, anchor)

    def _purchases(self, constants: AnchorConstants) -> Float:
        row_N, index_N, ago_N = self.counts.history(self.targets.user, self.targets.period)
        weight_N = self.counts.count_R[index_N] * constants.own_decay**ago_N
        n_R: Float = np.bincount(row_N, weight_N, minlength=len(self.targets)).astype(np.float64)
        return n_R[self.targets.row]

    def _bought(self, constants: AnchorConstants) -> NDArray[np.bool_]:
        row_N, index_N, _ = self.counts.history(self.targets.user, self.targets.period)
        n = self.counts.n_advertisers
        bought_N = row_N * n + self.counts.advertiser_R[index_N]
        return np.isin(self.targets.row * n + self.targets.item, bought_N)

    def _co(self, constants: AnchorConstants) -> Float:
        if self.pairs is None or self.pairs.decay != constants.co_decay:
            self.pairs = CoConversions(self.counts, decay=constants.co_decay)
        mass = partial(self.pairs.mass, shrinkage=constants.co_shrinkage)
        return self._at_targets(mass, Anchor(self.counts, constants))

    def _once(
        self, key: tuple[Any, ...], count: Callable[[AnchorConstants], NDArray[Any]], constants: AnchorConstants
    ) -> NDArray[Any]:
        if key not in self.known:
            self.known[key] = count(constants)
        return self.known[key]

    def _at_targets(self, values: Callable[[NDArray[Any], NDArray[Any]], Float], anchor: Anchor) -> Float:
        """Values of a ``(B, A)`` function at every target, weighted by the plan, and the sums of its row: ``(T, 4)``.

        The first sum is of the values, the second of the weighted ones, the third of those of what was bought before.
        """
        targets, row_T, picked = self.targets, self.targets.row, []
        for rows in np.array_split(np.arange(len(targets)), max(1, len(targets) // 256)):
            inside = (row_T >= rows[0]) & (row_T <= rows[-1])
            dense_BA = values(targets.user[rows], targets.period[rows])
            weighted_BA = dense_BA * np.exp(anchor.plan(targets.period[rows]))
            bought_B = np.zeros(len(rows))
            if self.apart:
                bought_B = weighted_BA.sum(1, where=anchor.bought(targets.user[rows], targets.period[rows]))
            row_B = row_T[inside] - rows[0]
            at_target = weighted_BA[row_B, targets.item[inside]]
            sums = [sum_B[row_B] for sum_B in (dense_BA.sum(1), weighted_BA.sum(1), bought_B)]
            picked.append(np.stack([at_target, *sums], axis=1))
        return np.concatenate(picked)
