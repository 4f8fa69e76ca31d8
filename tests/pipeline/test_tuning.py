"""A sweep of one stage: its grid, the figure that chooses, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import cli
from data.artifacts import Manifest
from data.errors import UserError
from data.writer import write_tables
from pipeline.ablation_page import JSON, MARKDOWN
from pipeline.commands.terminal import USER_MISTAKE
from pipeline.stages import RANKERS
from pipeline.tuning import ARMS, grid_study
from tests.logs import tiny_tables
from tests.pipeline.test_stages import TINY


def test_a_grid_is_the_product_of_the_values() -> None:
    study, shared = grid_study(
        "ranker", ["experiment=smoke", "ranker=dlrm,dcn_v2", "ranker.learning_rate=range(1,4)", "ranker.seeds=[0,1]"]
    )
    assert shared == ["experiment=smoke", "ranker.seeds=[0,1]"]
    assert list(study.arms.values()) == [
        (f"ranker={model}", f"ranker.learning_rate={rate}") for model in ("dlrm", "dcn_v2") for rate in (1, 2, 3)
    ]
    assert next(iter(study.arms)) == "ranker=dlrm, learning_rate=1"


def test_trials_are_drawn_once_and_for_all() -> None:
    sweep = ["prior.lora.rank=4,8,16", "prior.head.learning_rate=1e-4,1e-3"]
    whole, drawn = grid_study("prior", sweep)[0].arms, grid_study("prior", sweep, trials=3)[0]
    assert len(drawn.arms) == 3
    assert drawn.arms.items() <= whole.items()
    assert drawn.arms == grid_study("prior", sweep, trials=3)[0].arms
    assert "3 of 6" in drawn.about
    assert grid_study("prior", sweep, trials=9)[0].arms == whole


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        (["prior.lora.learning_rate=1,2", "prior.head.learning_rate=3"], ["learning_rate=1", "learning_rate=2"]),
        (
            ["prior.lora.learning_rate=1,2", "prior.head.learning_rate=3,3.5"],
            [f"prior.lora.learning_rate={a}, prior.head.learning_rate={b}" for a in "12" for b in ("3", "3.5")],
        ),
        (["ranker.seeds=[0],[1]", "prior.base.name='/a/b'"], ["seeds=0", "seeds=1"]),
        (["retrieval.model.context=[],[market]"], ["context=none", "context=market"]),
        (["prior.base.name='/a/b','/c'"], ["name=-a-b", "name=-c"]),
    ],
)
def test_names_are_short_and_can_be_folders(sweep: list[str], names: list[str]) -> None:
    assert list(grid_study("ranker", sweep)[0].arms) == names


@pytest.mark.parametrize(
    ("stage", "overrides", "message"),
    [
        ("rankr", ["ranker=dlrm,dcn_v2"], "the stage rankr.*prior, two_tower, ranker"),
        ("ranker", [], "no override.*several values"),
        ("ranker", ["ranker=dlrm"], "ranker=dlrm.*several values"),
        ("ranker", ["ranker.learning_rate=interval(0,1)"], r"interval.*values that can be counted"),
        ("ranker", ["ranker=glob(*)"], r"glob.*values that can be counted"),
        ("rankr", ["ranker", "seed=interval(0,1)"], "(?s)the stage rankr.*'ranker'.*interval"),
    ],
)
def test_a_grid_that_cannot_be_is_told(stage: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        grid_study(stage, overrides)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("source")
    write_tables(tiny_tables(), directory)
    return f"data.path={directory}"


def tune(folder: Path, *arguments: str) -> tuple[dict[tuple[str, str], float], str]:
    told = CliRunner().invoke(cli.app, ["tune", *arguments, "--out", str(folder)])
    assert told.exit_code == 0, told.output
    rows = json.loads((folder / JSON).read_text())["rows"]
    return {(row["metric"], row["arm"]): row["value"] for row in rows}, (folder / MARKDOWN).read_text()


def test_the_best_setting_of_each_stage_is_that_of_its_selection_span(source: str, tmp_path: Path) -> None:
    prior, ranker = tmp_path / "prior", tmp_path / "ranker"
    found, markdown = tune(prior, "prior", *TINY, source, "prior.anchor.kind=none,popularity", "prior.prompts=8")
    values = [found["select_nll", f"kind={kind} / lm"] for kind in ("none", "popularity")]
    assert values[1] < values[0], "without counts a forecast of a few prompts is worse"
    assert "Take kind=popularity: prior.anchor.kind=popularity" in markdown
    assert not (prior / "kind=none" / "seed=0" / "forecasts").exists(), "nothing of the evaluated span is made"

    reused = str(prior / "kind=popularity" / "seed=0")
    options = [*TINY, source, "prior.anchor.kind=popularity", "prior.prompts=8", "--reuse", reused]
    found, markdown = tune(ranker, "ranker", *options, "ranker.learning_rate=1e-12,0.01")
    arms = ("learning_rate=1e-12", "learning_rate=0.01")
    losses = {
        arm: np.mean(
            [Manifest.read(ranker / arm / "seed=0" / "ranker" / RANKERS / f"{of}-0").metrics["val_loss"] for of in ARMS]
        )
        for arm in arms
    }
    for arm in arms:
        assert found["val_loss", f"{arm} / mean of the arms"] == pytest.approx(losses[arm])
    assert f"Take {min(arms, key=losses.__getitem__)}" in markdown

    found, markdown = tune(tmp_path / "towers", "two_tower", *options, "retrieval.model.layers=0,1")
    recalls = {arm: found["val_recall", f"{arm} / towers"] for arm in ("layers=0", "layers=1")}
    assert f"Take {max(recalls, key=recalls.__getitem__)}" in markdown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ranker", "ranker=dlrm"], "several values"),
        (["ranker", "ranker=dlrm,dnc_v2"], "dnc_v2"),
        (["ranker", "ranker=dlrm,dcn_v2", "run.dir=x"], "--out"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(cli.app, ["tune", *arguments])
    assert told.exit_code == USER_MISTAKE
    assert message in told.stderr
    assert not list(tmp_path.iterdir())
