"""Metrics against TorchRec and torchmetrics, against counting pairs, and draws against recomputing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import binary_auroc, binary_average_precision
from torchrec.metrics.auc import compute_auc
from torchrec.metrics.auprc import compute_auprc
from torchrec.metrics.ne import compute_cross_entropy, compute_ne

from ranking.metrics import METRICS, Sample, evaluate, interval


def make(rows: int = 400, *, users: int = 12, draws: int = 20, tied: bool = False, seed: int = 0) -> tuple:
    rng = np.random.default_rng(seed)
    probability = rng.uniform(0.01, 0.9, rows)
    if tied:
        probability = np.round(probability, 1) + 0.05
    label = (rng.uniform(size=rows) < probability).astype(float)
    weight = np.where(label > 0, 1.0, rng.integers(1, 6, rows)).astype(float)
    sample = Sample.of(label, weight, rng.integers(0, users, rows) * 7, draws=draws, seed=1)
    return sample, probability


def test_weighted_auc_and_pr_auc_equal_torchrec() -> None:
    sample, probability = make()
    rows = [torch.tensor(x)[None] for x in (probability, sample.label_N, sample.weight_N)]
    figures = evaluate(sample, probability)
    expected = compute_auc(1, [rows[0]], [rows[1]], [rows[2]]).item()
    assert figures["auc"][0] == pytest.approx(expected, abs=1e-6)
    # TorchRec interpolates the curve, average precision steps along it; on 400 rows they are this close
    assert figures["pr_auc"][0] == pytest.approx(compute_auprc(1, *rows).item(), abs=5e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_auc_and_pr_auc_equal_torchmetrics_on_rows_repeated_by_their_weight(tied: bool) -> None:
    sample, probability = make(tied=tied)
    times = sample.weight_N.astype(int)
    scores = torch.tensor(np.repeat(probability, times))
    labels = torch.tensor(np.repeat(sample.label_N, times)).long()
    figures = evaluate(sample, probability)
    assert figures["auc"][0] == pytest.approx(binary_auroc(scores, labels).item(), abs=1e-5)
    assert figures["pr_auc"][0] == pytest.approx(binary_average_precision(scores, labels).item(), abs=1e-5)


def test_normalized_entropy_and_log_loss_equal_torchrec() -> None:
    sample, probability = make()
    label, weight, predicted = map(torch.tensor, (sample.label_N, sample.weight_N, probability))
    entropy = compute_cross_entropy(label, predicted, weight, 1e-12).sum()
    positive, total = (weight * label).sum(), weight.sum()
    expected = compute_ne(entropy[None], total[None], positive[None], (total - positive)[None], 1e-12)
    figures = evaluate(sample, probability)
    assert figures["normalized_entropy"][0] == pytest.approx(expected.item(), rel=1e-6)
    weighted = torch.nn.functional.binary_cross_entropy(predicted, label, weight, reduction="sum") / total
    assert figures["log_loss"][0] == pytest.approx(weighted.item(), rel=1e-9)


@pytest.mark.parametrize("tied", [False, True])
def test_gauc_equals_counting_pairs_within_each_user(tied: bool) -> None:
    sample, probability = make(150, users=6, tied=tied)
    total, mass = 0.0, 0.0
    for user in range(6):
        own = sample.user_N == user
        label, weight, score = sample.label_N[own], sample.weight_N[own], probability[own]
        wins = (score[:, None] > score) + 0.5 * (score[:, None] == score)
        pairs = np.outer(weight * label, weight * (1 - label))
        total += weight.sum() * (wins * pairs).sum() / pairs.sum()
        mass += weight.sum()
    assert evaluate(sample, probability)["gauc"][0] == pytest.approx(total / mass)


def test_gauc_leaves_out_users_with_one_class_and_does_not_see_the_level_of_a_user() -> None:
    label, user = np.array([1, 0, 1, 0, 0, 0]), np.array([0, 0, 1, 1, 2, 2])
    score = np.array([0.9, 0.8, 0.2, 0.1, 0.99, 0.98])
    sample = Sample.of(label, np.ones(6), user, draws=5, seed=0)
    assert evaluate(sample, score)["gauc"][0] == 1.0
    assert evaluate(sample, score)["auc"][0] < 1.0


def test_ece_is_zero_for_calibrated_bins_and_the_gap_for_a_constant_shift() -> None:
    label = np.tile([0.0, 1.0], 1500)
    sample = Sample.of(label, np.ones(3000), np.arange(3000) % 50, draws=3, seed=0)
    assert evaluate(sample, np.full(3000, 0.5))["ece"][0] == pytest.approx(0.0, abs=1e-12)
    assert evaluate(sample, np.full(3000, 0.7))["ece"][0] == pytest.approx(0.2)


def test_ece_reads_weights_as_impressions_and_keeps_equal_predictions_together() -> None:
    label, weight = np.array([1.0] * 30 + [0.0] * 30), np.array([1.0] * 30 + [9.0] * 30)
    sample = Sample.of(label, weight, np.arange(60), draws=2, seed=0)
    assert evaluate(sample, np.full(60, 0.1))["ece"][0] == pytest.approx(0.0, abs=1e-12)
    assert evaluate(sample, np.full(60, 0.5))["ece"][0] == pytest.approx(0.4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("tied", [False, True])
def test_a_draw_equals_the_metric_of_its_users_rows_repeated(metric: str, tied: bool) -> None:
    sample, probability = make(tied=tied)
    figures_D = METRICS[metric](sample, probability)
    if metric == "ece":  # its bins are fixed on the whole sample
        return
    for draw in (1, 7, 20):
        times = sample.times_DU[draw][sample.user_N].astype(int)
        repeated = Sample(
            np.repeat(sample.label_N, times),
            np.repeat(sample.weight_N, times),
            np.repeat(sample.user_N, times),
            sample.times_DU[:1],
        )
        assert figures_D[draw] == pytest.approx(METRICS[metric](repeated, np.repeat(probability, times))[0], rel=1e-9)


def test_evaluate_gives_every_metric_as_its_own_function_does() -> None:
    sample, probability = make()
    for name, figures_D in evaluate(sample, probability).items():
        np.testing.assert_array_equal(figures_D, METRICS[name](sample, probability))


def test_a_difference_of_equal_arms_is_zero_in_every_draw() -> None:
    sample, probability = make()
    a, b = evaluate(sample, probability), evaluate(sample, probability.copy())
    for name in METRICS:
        difference = interval(a[name] - b[name], len(probability))
        assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_alone_has_no_auc_but_a_log_loss(label: float) -> None:
    sample = Sample.of(np.full(20, label), np.ones(20), np.arange(20) % 4, draws=10, seed=0)
    figures = evaluate(sample, np.linspace(0.1, 0.9, 20))
    assert np.isnan(figures["auc"]).all()
    assert np.isnan(figures["gauc"]).all()
    assert np.isnan(figures["normalized_entropy"]).all()
    assert np.isfinite(figures["log_loss"]).all()
    assert np.isnan(interval(figures["auc"], 20).low)


@pytest.mark.parametrize(
    ("label", "weight", "user"),
    [
        ([], [], []),
        ([0, 1], [1.0], [0, 0]),
        ([0, 2], [1, 1], [0, 0]),
        ([0, 1], [1, 0], [0, 0]),
        ([0, 1], [1, np.nan], [0, 0]),
    ],
)
def test_impossible_samples_are_refused(label: list, weight: list, user: list) -> None:
    with pytest.raises(ValueError, match=r"expected|must be"):
        Sample.of(np.array(label), np.array(weight), np.array(user), draws=2, seed=0)


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1])
def test_predictions_that_are_no_probabilities_are_refused(bad: float) -> None:
    sample, probability = make()
    probability[3] = bad
    with pytest.raises(ValueError, match="expected probabilities"):
        evaluate(sample, probability)
