"""The page of several runs' headline figures: what it shows is what their stages left, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

import cli
from data.artifacts import Manifest, to_plain
from data.errors import UserError
from data.statistics import Row
from pipeline.commands.terminal import USER_MISTAKE
from pipeline.results import MARKDOWN, PICTURE, picture, read_runs, sections, write_results
from pipeline.stages import ROWS

PRIOR = {"prompts": 3000, "best_part": -1}
FORECASTS = {"users": 1234, "forecasts_made": 5000, "seconds_per_forecast": 0.125}


def run_of(
    directory: Path,
    *,
    ranking: Sequence[tuple[str, float]] = (),
    best_part: int = -1,
    gain: float = -0.2,
    made_from: Mapping[str, str] | None = None,
) -> Path:
    """A run directory as its stages leave it.

    Args:
        directory: of the run.
        ranking: stages with an AUC of the LM over the anchor.
        best_part: of the fit.
        gain: NLL of the LM over the anchor.
        made_from: hash of the forecasts that a stage was made from.
    """
    made_from = made_from or {}

    def stage(name: str, metrics: Mapping[str, object], rows: Sequence[Row]) -> None:
        (directory / name).mkdir(parents=True)
        base = {"name": "packaged:tiny", "random_weights": best_part >= 0}
        config = {"data": {"source": "simulator"}, "evaluate": "validation", "prior": {"base": base}}
        inputs = {"forecasts": made_from[name]} if name in made_from else {}
        manifest = Manifest(
            name, "key", config, inputs=inputs, content_hash=f"of {name}", versions={"torch": "9.9"},
            metrics=dict(metrics), seconds=60.0,
        )  # fmt: skip
        manifest.write(directory / name)
        (directory / name / ROWS).write_text(json.dumps([to_plain(row) for row in rows]), encoding="utf-8")

    def row(metric: str, arm: str, value: float, k: int | None = None, section: str = "forecast") -> Row:
        return Row(section, metric, arm, "all", k, value, value - 0.1, value + 0.1, 77, 3)

    nll = [("anchor", 5.0), ("lm", 5.0 + gain), ("lm - anchor", gain), ("lm - popularity", -1.0)]
    stage("prior", {**PRIOR, "best_part": best_part}, [])
    stage(
        "forecasts",
        FORECASTS,
        [*(row("nll", arm, value) for arm, value in nll), row("recall", "lm - anchor", 0.05, 5)],
    )
    for name, value in ranking:
        stage(name, {"rankers": 12}, [row("auc", "lm - anchor", value, section="ranking")])
    return directory


def cells(page: str, title: str) -> list[list[str]]:
    """Lines of the table below a title."""
    table = page.split(f"**{title}.**")[1].split("\n\n")[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_page_shows_what_the_stages_left(tmp_path: Path) -> None:
    run_of(tmp_path / "one")
    run_of(tmp_path / "two=2", best_part=2, ranking=[("ranker", 0.3), ("ranker_ablation", 0.4)])
    write_results(read_runs([f"One={tmp_path / 'one'}", f"Two={tmp_path / 'two=2'}"]), tmp_path / "out")
    page = (tmp_path / "out" / MARKDOWN).read_text(encoding="utf-8")
    nll = ["NLL", "5.000", "4.800", "−0.2000 [−0.3000, −0.1000]", "−1.0000 [−1.1000, −0.9000]", ""]
    assert cells(page, "One") == [nll]  # recall@5 is no headline, and does not stand in for recall@10
    assert cells(page, "Two") == [nll, ["ranking, AUC", "", "", "+0.4000 [+0.3000, +0.5000]", "", ""]]
    assert cells(page, "At a glance") == [["One", "−0.2000 ▲", ""], ["Two", "−0.2000 ▲", "+0.4000 ▲"]]
    assert "| forecast − none | NLL |" in page  # of the ranker there is no row without a forecast
    assert cells(page, "What it cost") == [
        ["One", "3,000", "tiny, not kept", "60 s", "0.0 GiB", "5,000", "0.125 s", ""],
        ["Two", "3,000", "tiny, random weights, kept", "60 s", "0.0 GiB", "5,000", "0.125 s", "12, 60 s"],
    ]
    assert "torch 9.9" in page
    assert "simulator, span validation, forecasts of 1,234 users, NLL of 77 user-periods" in page
    assert f"]({PICTURE})" in page
    assert (tmp_path / "out" / PICTURE).exists()


def test_the_picture_marks_what_is_shown(tmp_path: Path) -> None:
    names = {"gain": -0.2, "even": 0.05, "loss": 0.2}
    runs = read_runs([f"{name} & co={run_of(tmp_path / name, gain=gain)}" for name, gain in names.items()])
    drawn = picture(runs)
    assert [element.text for element in ElementTree.fromstring(drawn).iter() if "& co" in (element.text or "")] == [
        f"{name} & co" for name in names
    ]
    dots = re.findall(r'<circle cx="([\d.]+)" cy="[\d.]+" r="4" class="dot (\w+)"', drawn)
    assert [style for _, style in dots] == ["gain", "not_shown", "loss"]
    places = [float(x) for x, _ in dots]
    assert places == sorted(places)  # lower is better, and stands on the left


def test_stages_of_other_forecasts_are_left_out_or_told(tmp_path: Path) -> None:
    ranking = [("ranker", 0.3), ("ranker_ablation", 0.4)]
    fresh = run_of(tmp_path / "fresh", ranking=ranking, made_from={"ranker_ablation": "of earlier forecasts"})
    (run,) = read_runs([f"One={fresh}"])
    assert "ranker_ablation" not in run.manifests
    assert [row.value for row in run.rows if row.metric == "auc"] == [0.3]
    stale = run_of(tmp_path / "stale", ranking=ranking[:1], made_from={"ranker": "of earlier forecasts"})
    with pytest.raises(UserError, match=r"(?s)ranker \(made from forecasts of earlier.*run\.until=ranker"):
        read_runs([f"One={stale}"])


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["{run}"], "NAME=RUN_DIR"),
        (["={run}"], "NAME=RUN_DIR"),
        (["One={run}", "One={run}"], "each name once"),
        (["One={run}", "Other={run}/nowhere", "just a name"], r"(?s)nowhere, which holds no figures.*NAME=RUN_DIR"),
    ],
)
def test_what_is_no_run_is_told(tmp_path: Path, named: list[str], message: str) -> None:
    directory = run_of(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        read_runs([one.format(run=directory) for one in named])


def test_the_command(tmp_path: Path) -> None:
    directory = run_of(tmp_path / "run")
    done = CliRunner().invoke(cli.app, ["results", f"One={directory}", "--out", str(tmp_path / "docs")])
    assert done.exit_code == 0, done.output
    assert "−0.2000" in done.output
    assert (tmp_path / "docs" / MARKDOWN).exists()
    wrong = CliRunner().invoke(cli.app, ["results", str(directory), "--out", str(tmp_path / "docs")])
    assert wrong.exit_code == USER_MISTAKE
    assert [section.id for section in sections(read_runs([f"One={directory}"]))] == ["glance", "One", "cost"]
