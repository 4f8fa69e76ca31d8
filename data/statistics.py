"""Intervals of means and of differences, resampled over users, and the tidy row every figure is reported in.

One user's requests are not independent, so the bootstrap draws *users* with replacement and keeps
all of a drawn user's values together (Efron & Tibshirani, An Introduction to the Bootstrap, 1993,
ch. 8). A difference of two arms is drawn with the same users on both sides: what both arms find
hard cancels out. All draws of users and all percentiles of them are made here.

Shapes: N values, G users, D bootstrap draws, U users or user-periods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 1000
LEVEL = 0.95
TIERS = ("sparse users", "middle users", "busy users")
"""Segments by how much was bought before; what is sorted into them, users or user-periods, is each section's own."""


@dataclass(frozen=True)
class Interval:
    """A figure with its percentile bootstrap interval, at the 95 % level unless told otherwise.

    Attributes:
        value: the figure on the data as it is.
        low: lower end of the interval; NaN when no value was there.
        high: upper end.
        n: number of values behind the figure.
    """

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Row:
    """One figure of ``report.json``.

    Attributes:
        section: ``data``, ``semantic_ids``, ``forecast``, ``retrieval``, ``ranking`` or ``cost``.
        metric: name of the measure, e.g. ``recall``, ``nll``, ``auc``.
        arm: ``none``, ``anchor``, ``lm``, a control, or a difference such as ``lm - anchor``.
        segment: part of the data the figure is of; ``all`` for the whole.
        k: list length of a ranked measure, else None.
        value: the figure.
        ci_low: lower end of its 95 % interval, None where none was computed.
        ci_high: upper end.
        n: number of requests, rows or pairs behind it.
        seeds: number of training seeds averaged over.
    """

    section: str
    metric: str
    arm: str
    segment: str
    k: int | None
    value: float
    ci_low: float | None
    ci_high: float | None
    n: int
    seeds: int = 1

    @classmethod
    def of(
        cls,
        interval: Interval,
        *,
        section: str,
        metric: str,
        arm: str,
        segment: str = "all",
        k: int | None = None,
        seeds: int = 1,
    ) -> Row:
        """The row of an interval."""
        return cls(section, metric, arm, segment, k, interval.value, interval.low, interval.high, interval.n, seeds)


def bootstrap_mean(
    values_N: ArrayLike, groups_N: ArrayLike, *, draws: int = DRAWS, seed: int = 0, level: float = LEVEL
) -> Interval:
    """Mean of values with an interval that resamples groups.

    Args:
        values_N: one value a request; NaN means "not defined here" and is left out.
        groups_N: the user of each value, any integers.
        draws: number of bootstrap draws.
        seed: seed of the draws; the same seed draws the same users.
        level: of the interval.

    Returns:
        The mean over values (not over groups) and its interval.

    Raises:
        ValueError: the two arrays differ in length.
    """
    values, groups = _aligned(values_N, groups_N)
    defined = ~np.isnan(values)
    values, groups = values[defined], groups[defined]
    if not len(values):
        return Interval(np.nan, np.nan, np.nan, 0)
    sums_G, counts_G = _by_group(values, groups)
    weights_DG = _draw(len(sums_G), draws, seed)
    means_D = (weights_DG @ sums_G) / (weights_DG @ counts_G)
    low, high = percentiles(means_D, level)
    return Interval(float(values.mean()), low, high, len(values))


def paired_bootstrap(
    a_N: ArrayLike,
    b_N: ArrayLike,
    groups_N: ArrayLike,
    *,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """``mean(a) - mean(b)`` over the same requests, resampling users.

    Args:
        a_N: values of the one arm.
        b_N: values of the other arm on the same requests, in the same order.
        groups_N: the user of each request.
        draws: number of bootstrap draws.
        seed: seed of the draws.
        level: of the interval.

    Returns:
        The difference and its interval; requests undefined (NaN) in either arm are left out.

    Raises:
        ValueError: the arrays differ in length.
    """
    a, groups = _aligned(a_N, groups_N)
    b, _ = _aligned(b_N, groups_N)
    return bootstrap_mean(a - b, groups, draws=draws, seed=seed, level=level)


def bootstrap_over_seeds(
    values_SN: Sequence[ArrayLike], groups_SN: Sequence[ArrayLike], *, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Mean over training seeds of a mean over requests, resampling users and seeds.

    So the interval tells how far other users and other training runs would have moved the figure. Of one seed it is
    `bootstrap_mean`.

    Args:
        values_SN: for each seed one value a request; NaN is left out.
        groups_SN: for each seed the user of each value.
        draws: number of bootstrap draws.
        seed: seed of the draws.

    Returns:
        The mean and its interval; ``n`` counts the values of all seeds.

    Raises:
        ValueError: arrays differ in length.
    """
    seeds = [_aligned(values, groups) for values, groups in zip(values_SN, groups_SN, strict=True)]
    seeds = [(values[~np.isnan(values)], groups[~np.isnan(values)]) for values, groups in seeds]
    seeds = [(values, groups) for values, groups in seeds if len(values)]
    if not seeds:
        return Interval(np.nan, np.nan, np.nan, 0)
    users = np.unique(np.concatenate([groups for _, groups in seeds]))
    sums_SG, counts_SG = np.zeros((2, len(seeds), len(users)))
    for number, (values, groups) in enumerate(seeds):
        place = np.searchsorted(users, groups)
        sums_SG[number] = np.bincount(place, values, len(users))
        counts_SG[number] = np.bincount(place, minlength=len(users))
    weights_DG = _draw(len(users), draws, seed)
    with np.errstate(invalid="ignore", divide="ignore"):
        means_DS = (weights_DG @ sums_SG.T) / (weights_DG @ counts_SG.T)
    drawn_DS = np.random.default_rng(seed).integers(len(seeds), size=means_DS.shape)
    means_D = np.take_along_axis(means_DS, drawn_DS, axis=1).mean(1)
    low, high = percentiles(means_D[np.isfinite(means_D)])
    value = float(np.mean([values.mean() for values, _ in seeds]))
    return Interval(value, low, high, sum(len(values) for values, _ in seeds))


def bootstrap_statistic(
    statistic: Callable[[NDArray[np.float64]], float], groups_N: ArrayLike, *, draws: int = 200, seed: int = 0
) -> Interval:
    """Interval of a figure that is no mean, such as an AUC or a difference of two.

    Args:
        statistic: from a weight a value (how often its user was drawn, shape ``(N,)``) to the figure.
        groups_N: the user of each value.
        draws: number of bootstrap draws; each calls ``statistic`` once.
        seed: seed of the draws.

    Returns:
        The figure at weight one and the percentile interval of the draws; draws whose figure is not
        finite (one class only, say) are left out.
    """
    groups = np.asarray(groups_N)
    unique, inverse = np.unique(groups, return_inverse=True)
    point = statistic(np.ones(len(groups)))
    drawn = np.array([statistic(weights[inverse]) for weights in _draw(len(unique), draws, seed)])
    low, high = percentiles(drawn[np.isfinite(drawn)])
    return Interval(float(point), low, high, len(groups))


def _aligned(values: ArrayLike, groups: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    values_N, groups_N = np.asarray(values, dtype=np.float64), np.asarray(groups)
    if values_N.shape != groups_N.shape or values_N.ndim != 1:
        raise ValueError(f"{values_N.shape} values for {groups_N.shape} groups; expected two equal lengths")
    return values_N, groups_N


def _by_group(values: NDArray, groups: NDArray) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    _, inverse = np.unique(groups, return_inverse=True)
    return np.bincount(inverse, weights=values).astype(np.float64), np.bincount(inverse).astype(np.float64)


@lru_cache(maxsize=2)  # a report draws the same users hundreds of times
def _draw(n_groups: int, draws: int, seed: int) -> NDArray[np.float64]:
    drawn_DG = draw(n_groups, draws, np.random.default_rng(seed))
    drawn_DG.flags.writeable = False
    return drawn_DG


def draw(n_groups: int, draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """How often each group counts in each bootstrap draw, as many groups as there are, with replacement.

    Args:
        n_groups: number of groups, at least 1.
        draws: number of draws.
        rng: whose next numbers are taken.

    Returns:
        Whole numbers, ``(D, G)``; each row adds up to G.
    """
    return rng.multinomial(n_groups, np.full(n_groups, 1.0 / n_groups), size=draws).astype(np.float64)


def sample_and_draws(n_groups: int, draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """:func:`draw` below a row of ones, so that draw 0 is the data as it is; ``(1 + D, G)``."""
    return np.concatenate([np.ones((1, n_groups)), draw(n_groups, draws, rng)])


def activity_tiers(
    purchases_U: NDArray[np.number], *, lowest: float = 1 / 3, highest: float = 2 / 3
) -> NDArray[np.int64]:
    """Tier of users, or of user-periods, by what each had bought before, as an index of `TIERS`.

    Equal numbers of purchases share a tier, the lower one, so the tiers are thirds but for ties.

    Args:
        purchases_U: number of purchases before.
        lowest: quantile up to which one is sparse.
        highest: quantile above which one is busy, not below ``lowest``.

    Returns:
        0, 1 or 2 of each, shape ``(U,)``.
    """
    if not len(purchases_U):
        return np.zeros(0, np.int64)
    low, high = np.quantile(purchases_U, [lowest, highest])
    return np.where(purchases_U <= low, 0, np.where(purchases_U <= high, 1, 2))


def percentiles(values_D: NDArray, level: float = LEVEL) -> tuple[float, float]:
    """Ends of the interval in the middle of a figure's draws.

    Args:
        values_D: the figure in each draw, none of them NaN.
        level: share of the draws inside.

    Returns:
        Lower and upper end; NaN where there is no draw.
    """
    if not len(values_D):
        return float("nan"), float("nan")
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(values_D, [tail, 100 - tail])
    return float(low), float(high)
