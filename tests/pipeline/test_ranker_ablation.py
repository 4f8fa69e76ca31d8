"""What an ablation of the ranker says in words, and that it finds a signal that is there, and no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.artifacts import Manifest
from data.log import load_log
from data.prepare import prepare
from data.statistics import Row
from data.truth import TRUTH, Truth
from pipeline import stages
from pipeline.config import compose
from pipeline.engine import Context
from pipeline.ranker_ablation import findings
from ranking.oracle import OracleForecast
from tests.ranking.common import KnownForecast, tiny_ids


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


def test_a_planted_signal_is_found_and_that_of_another_user_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LM's forecast lies on the way to the simulator's truth; the oracle's, and the true chance, lie beyond it."""
    cfg = compose([
        "experiment=smoke", "data=simulator", "data.simulator.users=400", "data.simulator.advertisers=40",
        "data.max_users=null", "prior.panel=400", "ranker.draws=100", "ranker.ablation.groups=false",
        "ranker.ablation.models=[]", "ranker.model=logistic", "ranker.learning_rate=0.02",
        "ranker.features.prior=[probability]", "trainer.progress_bar=false",
    ])  # fmt: skip
    inputs = {name: tmp_path / name for name in ("data", "semantic_ids")}
    for directory in (*inputs.values(), tmp_path / "output", tmp_path / "work" / "stage"):
        directory.mkdir(parents=True)
    prepare(cfg.data, inputs["data"])
    log, truth = load_log(inputs["data"], cfg.data, evaluate="validation"), Truth.load(inputs["data"] / TRUTH)
    ids = tiny_ids(log)
    ids.save(inputs["semantic_ids"])
    for name, directory in inputs.items():
        Manifest(kind=name, key=name).write(directory)
    even = KnownForecast(np.full((len(log.user_ids), len(ids)), -np.log(len(ids)), np.float32))
    planted = OracleForecast(truth, log, ids, anchor=even, top=10, share=0.7)
    monkeypatch.setattr(stages, "_forecasts", lambda context: {"none": None, "anchor": even, "lm": planted})
    context = Context(cfg, inputs, tmp_path / "output", tmp_path / "work" / "stage", {})
    assert stages.make_ranker_ablation(context)["rankers"] == 5
    rows = {row.arm: row for row in stages.read_rows(context.output) if (row.metric, row.segment) == ("auc", "all")}
    for gain in ("lm - none", "lm - anchor", "lm - shuffled prior", "oracle - none"):
        assert rows[gain].ci_low > 0, rows[gain]  # type: ignore[operator]
    assert rows["shuffled prior - none"].ci_low <= 0, rows["shuffled prior - none"]  # type: ignore[operator]
    assert rows["none"].value < rows["lm"].value < rows["true chance"].value
