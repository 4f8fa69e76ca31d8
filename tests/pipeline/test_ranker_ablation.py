"""What an ablation of the ranker says in words."""

from __future__ import annotations

import pytest

from data.statistics import Row
from pipeline.ranker_ablation import findings


def difference(metric: str, low: float, high: float) -> Row:
    return Row("ranking", metric, "shuffled prior - none", "all", None, (low + high) / 2, low, high, 100)


@pytest.mark.parametrize(
    ("rows", "gains"),
    [
        ([difference("auc", -0.01, 0.01), difference("normalized_entropy", -0.01, 0.01)], []),
        ([difference("auc", -0.01, 0.01), difference("normalized_entropy", -0.02, -0.01)], ["NE"]),
        ([difference("auc", 0.01, 0.02), difference("pr_auc", 0.01, 0.02)], ["AUC", "PR-AUC"]),
        ([difference("auc", -0.02, -0.01)], []),
    ],
)
def test_a_control_that_gains_by_any_measure_is_told(rows: list[Row], gains: list[str]) -> None:
    told = findings(rows)
    assert len(told) == len(rows)
    assert [one.split(",")[2].split(":")[0].strip() for one in told if "The control gains" in one] == gains
