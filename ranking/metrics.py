"""How good a ranker's probabilities are, for the sample as it is and for every bootstrap draw at once.

A draw of the bootstrap changes nothing but how often each *user* counts (see ``data.statistics``). So a
metric here takes a matrix of multiplicities, one draw a row, and returns one figure a draw; what does
not depend on the draw, sorting above all, is done once. Since all arms are given the same draws, the
difference of two arms in a draw is the difference of their figures: the bootstrap is paired.

Every figure is weighted: a sampled negative stands for ``weight`` impressions of the log.

Shapes: N rows, U users, D draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.statistics import Interval, percentiles, sample_and_draws

Floats = NDArray[np.float64]

ECE_BINS = 15
_BLOCK = 1 << 22
"""Numbers held at once where a metric needs a row of the sample for each draw."""


@dataclass(frozen=True)
class Sample:
    """The rows that all arms are evaluated on.

    Attributes:
        label_N: 1.0 where the row converted, else 0.0.
        weight_N: impressions of the log that the row stands for, positive.
        user_N: user of the row, numbers in ``[0, U)``.
        times_DU: how often each user counts in each draw.
    """

    label_N: Floats
    weight_N: Floats
    user_N: NDArray[np.int64]
    times_DU: Floats

    @classmethod
    def of(cls, label_N: NDArray, weight_N: NDArray, user_N: NDArray, *, draws: int, seed: int) -> Sample:
        """A sample whose draw 0 is the data as it is, followed by bootstrap draws over its users.

        Args:
            label_N: zeros and ones.
            weight_N: positive weights.
            user_N: any integers.
            draws: number of bootstrap draws.
            seed: of the draws.

        Raises:
            ValueError: lengths differ, there is no row, or a label or weight is impossible.
        """
        label, weight = np.asarray(label_N, np.float64), np.asarray(weight_N, np.float64)
        if not len(label) == len(weight) == len(user_N) or not len(label):
            raise ValueError(f"{len(label)} labels, {len(weight)} weights, {len(user_N)} users; expected equal, not 0")
        if not np.isin(label, (0.0, 1.0)).all() or not (np.isfinite(weight) & (weight > 0)).all():
            raise ValueError("labels must be 0 or 1, weights positive and finite")
        users, user = np.unique(user_N, return_inverse=True)
        times_DU = sample_and_draws(len(users), draws, np.random.default_rng(seed))
        return cls(label, weight, user.astype(np.int64), times_DU)

    def part(self, mask_N: NDArray[np.bool_]) -> Sample:
        """The rows of a segment, under the same draws."""
        return Sample(self.label_N[mask_N], self.weight_N[mask_N], self.user_N[mask_N], self.times_DU)

    def sum_by_user(self, value_N: Floats) -> Floats:
        """Sum of values per user, shape ``(U,)``."""
        sums_U: Floats = np.bincount(self.user_N, value_N, self.times_DU.shape[1]).astype(np.float64)
        return sums_U


def auc(sample: Sample, score_N: Floats) -> Floats:
    """Area under the ROC curve: the chance that a conversion outscores an impression; ties count half.

    Args:
        sample: the rows.
        score_N: any score that grows with the chance of a conversion.

    Returns:
        One figure a draw, shape ``(D,)``; NaN where a draw holds one class only.
    """
    return _ranked(sample, score_N)[0]


def pr_auc(sample: Sample, score_N: Floats) -> Floats:
    """Area under the precision-recall curve as average precision: the mean precision at a conversion's score.

    Args:
        sample: the rows.
        score_N: any score that grows with the chance of a conversion.

    Returns:
        One figure a draw, shape ``(D,)``; NaN where a draw holds no conversion.
    """
    return _ranked(sample, score_N)[1]


def gauc(sample: Sample, score_N: Floats) -> Floats:
    """AUC of each user's own rows, averaged over users by their impressions.

    Users with one class only have no AUC and are left out. (Zhou et al., Deep Interest Network for
    Click-Through Rate Prediction, 2018, https://arxiv.org/abs/1706.06978, eq. 7.)

    Args:
        sample: the rows.
        score_N: any score that grows with the chance of a conversion.

    Returns:
        One figure a draw, shape ``(D,)``; NaN where a draw has no user with both classes.
    """
    order = np.lexsort((score_N, sample.user_N))
    user, score = sample.user_N[order], score_N[order]
    positive = (sample.weight_N * sample.label_N)[order]
    negative = (sample.weight_N * (1 - sample.label_N))[order]
    new_user = np.diff(user, prepend=-1) > 0
    tied = np.flatnonzero(new_user | (np.diff(score, prepend=np.nan) != 0))  # first rows of equal scores of one user
    positive_T, negative_T = np.add.reduceat(positive, tied), np.add.reduceat(negative, tied)
    below_T = np.cumsum(negative_T) - negative_T
    first_T = np.maximum.accumulate(np.where(new_user[tied], np.arange(len(tied)), 0))
    below_T = below_T - below_T[first_T]  # negatives of the same user that score lower
    n_users = sample.times_DU.shape[1]
    wins_U = np.bincount(user[tied], weights=positive_T * (below_T + negative_T / 2), minlength=n_users)
    positive_U, negative_U = np.bincount(user, positive, n_users), np.bincount(user, negative, n_users)
    both_U = (positive_U > 0) & (negative_U > 0)
    auc_U = np.divide(wins_U, positive_U * negative_U, out=np.zeros(n_users), where=both_U)
    mass_U = np.where(both_U, positive_U + negative_U, 0.0)
    return _ratio(sample.times_DU @ (mass_U * auc_U), sample.times_DU @ mass_U)


def log_loss(sample: Sample, probability_N: Floats) -> Floats:
    """Mean negative log-likelihood in nats an impression, shape ``(D,)``."""
    loss_U = sample.sum_by_user(sample.weight_N * _cross_entropy(sample.label_N, probability_N))
    return _ratio(sample.times_DU @ loss_U, sample.times_DU @ sample.sum_by_user(sample.weight_N))


def normalized_entropy(sample: Sample, probability_N: Floats) -> Floats:
    """Log loss over the log loss of always predicting the mean; below 1 is better than that.

    He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, 2014, section 2.1.

    Args:
        sample: the rows.
        probability_N: predicted probabilities.

    Returns:
        One figure a draw, shape ``(D,)``; NaN where a draw holds one class only.
    """
    weight_D = sample.times_DU @ sample.sum_by_user(sample.weight_N)
    rate_D = _ratio(sample.times_DU @ sample.sum_by_user(sample.weight_N * sample.label_N), weight_D)
    both_D = (rate_D > 0) & (rate_D < 1)
    inside_D = np.where(both_D, rate_D, 0.5)
    entropy_D = -(inside_D * np.log(inside_D) + (1 - inside_D) * np.log1p(-inside_D))
    return np.where(both_D, log_loss(sample, probability_N) / entropy_D, np.nan)


def expected_calibration_error(sample: Sample, probability_N: Floats) -> Floats:
    """Mean distance of predicted and actual rate over `ECE_BINS` bins of equal impressions.

    The bins are those of the sample as it is, for every draw; equal predictions share a bin.

    Args:
        sample: the rows.
        probability_N: predicted probabilities.

    Returns:
        One figure a draw, shape ``(D,)``.
    """
    order = np.argsort(probability_N, kind="stable")
    first_T = np.flatnonzero(np.diff(probability_N[order], prepend=np.nan) != 0)  # first rows of equal predictions
    weight_T = np.add.reduceat(sample.weight_N[order], first_T)
    middle_T = (np.cumsum(weight_T) - weight_T / 2) / weight_T.sum()
    bin_T = np.minimum((middle_T * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    bin_N = np.empty(len(order), np.int64)
    bin_N[order] = np.repeat(bin_T, np.diff(first_T, append=len(order)))
    n_users = sample.times_DU.shape[1]
    gap_UK = np.bincount(
        sample.user_N * ECE_BINS + bin_N,
        weights=sample.weight_N * (probability_N - sample.label_N),
        minlength=n_users * ECE_BINS,
    ).reshape(n_users, ECE_BINS)
    weight_D = sample.times_DU @ sample.sum_by_user(sample.weight_N)
    return _ratio(np.abs(sample.times_DU @ gap_UK).sum(1), weight_D)


METRICS: Mapping[str, Callable[[Sample, Floats], Floats]] = {
    "auc": auc,
    "gauc": gauc,
    "pr_auc": pr_auc,
    "normalized_entropy": normalized_entropy,
    "log_loss": log_loss,
    "ece": expected_calibration_error,
}
"""Every ranking metric by the name it is reported under; all take predicted probabilities."""


def evaluate(sample: Sample, probability_N: Floats) -> dict[str, Floats]:
    """All of `METRICS`, each with one figure a draw.

    Args:
        sample: the rows.
        probability_N: predicted probabilities of the same rows.

    Returns:
        Name of the metric to figures, shape ``(D,)``.

    Raises:
        ValueError: a prediction is missing or no probability.
    """
    probability = np.asarray(probability_N, np.float64)
    if probability.shape != sample.label_N.shape:
        raise ValueError(f"{probability.shape} predictions for {sample.label_N.shape} rows; expected one a row")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("a prediction is NaN or outside [0, 1]; expected probabilities")
    area_D, precision_D = _ranked(sample, probability)
    shared = {"auc": area_D, "pr_auc": precision_D}  # one sort for both
    return {name: shared[name] if name in shared else metric(sample, probability) for name, metric in METRICS.items()}


def interval(figures_D: Floats, n: int) -> Interval:
    """Draw 0 as the value, the percentiles of the finite other draws as its interval.

    Args:
        figures_D: a metric, or a difference of two, as `evaluate` gives them.
        n: number of rows behind the figure.
    """
    low, high = percentiles(figures_D[1:][np.isfinite(figures_D[1:])])
    return Interval(float(figures_D[0]), low, high, n)


def _ranked(sample: Sample, score_N: Floats) -> tuple[Floats, Floats]:
    """AUC and average precision of every draw, by cumulative sums over the rows in order of falling score."""
    order = np.argsort(-score_N, kind="stable")
    score, user = score_N[order], sample.user_N[order]
    positive = (sample.weight_N * sample.label_N)[order]
    negative = (sample.weight_N * (1 - sample.label_N))[order]
    last_T = np.flatnonzero(np.append(np.diff(score) != 0, True))  # last rows of equal scores
    draws = len(sample.times_DU)
    area_D, precision_D = np.empty(draws), np.empty(draws)
    step = max(1, _BLOCK // len(order))
    for start in range(0, draws, step):
        times_BN = sample.times_DU[start : start + step][:, user]
        hits_BT = np.cumsum(times_BN * positive, axis=1)[:, last_T]
        misses_BT = np.cumsum(times_BN * negative, axis=1)[:, last_T]
        gained_BT = np.diff(hits_BT, axis=1, prepend=0.0)
        lost_BT = np.diff(misses_BT, axis=1, prepend=0.0)
        hits_B, misses_B = hits_BT[:, -1], misses_BT[:, -1]
        area_B = (lost_BT * (hits_BT - gained_BT / 2)).sum(1)
        area_D[start : start + step] = _ratio(area_B, hits_B * misses_B)
        shown_BT = hits_BT + misses_BT
        found_B = np.divide(gained_BT * hits_BT, shown_BT, out=np.zeros_like(hits_BT), where=shown_BT > 0).sum(1)
        precision_D[start : start + step] = _ratio(found_B, hits_B)
    return area_D, precision_D


def _cross_entropy(label_N: Floats, probability_N: Floats) -> Floats:
    tiny = np.finfo(np.float64).tiny
    likelihood = np.where(label_N > 0, probability_N, 1 - probability_N)
    return -np.log(np.maximum(likelihood, tiny))


def _ratio(over_D: Floats, under_D: Floats) -> Floats:
    return np.divide(over_D, under_D, out=np.full(len(over_D), np.nan), where=under_D > 0)
