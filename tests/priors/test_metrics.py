from __future__ import annotations

import numpy as np
import pytest

from data.log import Targets
from priors.metrics import expected_calibration_error, ndcg_at_k, recall_at_k, reliability, target_ranks


def targets_of(rows: list[list[int]]) -> Targets:
    sizes, n = [len(row) for row in rows], len(rows)
    item = np.array([item for row in rows for item in row], dtype=np.int32)
    zeros = np.zeros(n, dtype=np.int32)
    ones = np.ones(len(item), dtype=np.float32)
    return Targets(
        np.arange(n, dtype=np.int32), zeros, zeros, np.concatenate([[0], np.cumsum(sizes)]), item, ones, ones
    )


SCORES = np.array([[0.1, 0.4, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])


def test_ranks_of_targets() -> None:
    targets = targets_of([[0, 2], [3], [1]])
    assert target_ranks(SCORES, targets).tolist() == [3, 1, 3, 1]
    allowed = SCORES.copy()
    allowed[0, 1] = allowed[1, 3] = -np.inf
    assert target_ranks(allowed, targets).tolist() == [2, 0, 4, 1]


def test_recall_and_ndcg_by_hand() -> None:
    targets = targets_of([[0, 2], [3], []])
    rank = target_ranks(SCORES, targets)
    np.testing.assert_allclose(recall_at_k(rank, targets, 1), [0.0, 0.0, np.nan])
    np.testing.assert_allclose(recall_at_k(rank, targets, 2), [0.5, 0.0, np.nan])
    np.testing.assert_allclose(recall_at_k(rank, targets, 4), [1.0, 1.0, np.nan])
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(ndcg_at_k(rank, targets, 4)[0], (1 / np.log2(3) + 1 / np.log2(5)) / ideal)


def test_calibration_of_a_true_forecast_is_near_zero_and_of_a_sharpened_one_is_not() -> None:
    rng = np.random.default_rng(0)
    true = rng.dirichlet(np.full(20, 0.3), size=4000)
    drawn = [[int(rng.choice(20, p=row))] for row in true]
    targets = targets_of(drawn)
    good = reliability(np.log(np.maximum(true, 1e-12)), targets)
    sharp = true**3 / (true**3).sum(1, keepdims=True)
    bad = reliability(np.log(np.maximum(sharp, 1e-12)), targets)
    assert expected_calibration_error(good) < 0.06
    assert expected_calibration_error(bad) > 0.15
    assert sum(good["mass"]) == pytest.approx(1.0, abs=0.02)
