"""An ablation runs every arm once, shares what arms have in common, and compares them request by request."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

import cli
from data.artifacts import Manifest
from data.errors import UserError
from data.writer import write_tables
from pipeline.ablation import Cost, Result, Study, arm_configs, load_study, run_study
from pipeline.ablation_page import JSON, MARKDOWN, PAGE, render, to_markdown, write_ablation
from pipeline.ablation_prior import PRIOR, recommend_prompt
from pipeline.commands.terminal import USER_MISTAKE
from priors.judge import Measure, RequestValues, load_requests, save_requests
from tests.logs import tiny_tables
from tests.pipeline.test_stages import TINY

STUDY = Study(
    name="head",
    about="What ties <b>rows</b>",
    overrides=("prior.evaluation_prompts=20",),
    arms={"tied": ("prior.head.kind=tied",), "no anchor": ("prior.anchor.kind=none",)},
    seeds=(0, 1),
)
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("source")
    write_tables(tiny_tables(), directory)
    return f"data.path={directory}"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ablation")


@pytest.fixture(scope="module")
def result(out: Path, source: str) -> Result:
    found = run_study(STUDY, PRIOR, out, [*TINY, source], console=QUIET)
    write_ablation(found, out)
    return found


def test_arms_share_what_they_have_in_common(result: Result, out: Path) -> None:
    runs = [
        out / "tied" / "seed=0",
        out / "tied" / "seed=1",
        out / "no_anchor" / "seed=0",
        out / "no_anchor" / "seed=1",
    ]
    for stage in ("data", "semantic_ids"):
        assert len({(run / stage / "manifest.json").stat().st_ino for run in runs}) == 1
    assert len({Manifest.read(run / "prior").key for run in runs}) == 4


def test_a_finished_arm_is_not_trained_again(result: Result, out: Path, source: str) -> None:
    trained = {path: path.stat().st_mtime_ns for path in out.rglob("prior/manifest.json")}
    wider = replace(STUDY, arms=STUDY.arms | {"free": ("prior.head.kind=free",)}, seeds=(0,))
    again = run_study(wider, PRIOR, out, [*TINY, source], console=QUIET)
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    assert set(again.costs) == {"tied", "no anchor", "free"}


def test_differences_are_those_of_the_same_requests(result: Result, out: Path) -> None:
    rows = {(row.metric, row.arm, row.segment, row.k): row for row in result.rows}

    def values(arm: str, measure: Measure, part: int) -> np.ndarray:
        runs = [load_requests(out / arm / f"seed={seed}" / "forecasts")[part] for seed in STUDY.seeds]
        return np.array([np.nanmean(run.values[measure]) for run in runs])

    nll, recall = Measure("nll", "lm"), Measure("recall", "lm", "all", 5)
    tied, without = values("tied", nll, 0), values("no_anchor", nll, 0)
    row = rows["nll", "no anchor / lm - tied / lm", "all", None]
    assert row.value == pytest.approx((without - tied).mean())
    assert row.seeds == 2
    assert row.ci_low is not None and row.ci_high is not None and row.ci_low <= row.value <= row.ci_high  # noqa: PT018
    assert row.value > 0, "without an anchor the forecast of a few prompts is worse"
    row = rows["recall", "no anchor / lm - tied / lm", "all", 5]
    assert row.value == pytest.approx((values("no_anchor", recall, 1) - values("tied", recall, 1)).mean())
    row = rows["nll", "tied / lm - tied / anchor", "all", None]
    assert row.value == pytest.approx((tied - values("tied", Measure("nll", "anchor"), 0)).mean())


def test_what_was_trained_is_shown_where_the_forecaster_went_back_to_its_start(result: Result, out: Path) -> None:
    rows = {(row.metric, row.arm): row for row in result.rows}
    runs = [out / "tied" / f"seed={seed}" / "prior" for seed in STUDY.seeds]
    changes = [Manifest.read(run).metrics["start"]["select_change"]["value"] for run in runs]
    row = rows["select_nll", "tied / lm - tied / start"]
    assert row.value == pytest.approx(np.mean(changes), abs=1e-5)
    assert row.value != 0
    assert any(Manifest.read(run).metrics["best_part"] == -1 for run in runs), "an arm that keeps its start"


def test_tables_page_and_json_say_the_same(result: Result, out: Path) -> None:
    document = json.loads((out / JSON).read_text())
    assert document["arms"] == {arm: list(own) for arm, own in STUDY.arms.items()}
    assert len(document["rows"]) == len(result.rows)
    markdown, page = (out / MARKDOWN).read_text(), (out / PAGE).read_text()
    assert markdown == to_markdown(result)
    assert page == render(result)
    shown = {line.split(" | ")[0]: line for line in markdown.splitlines() if line.startswith("| ")}
    for title in ("recall@10", "NLL, LM − anchor", "NLL, LM − other prompt"):
        figures = [cell.strip() for cell in shown[f"| {title}"].strip("|").split("|")[1:]]
        assert len(figures) > 0
        assert "none" not in figures
        assert all(figure in page for figure in figures)
    assert markdown.count("| NLL |") == 2, "of every arm, and less the first"
    assert "<svg" in page
    assert "<b>rows</b>" not in page, "texts of a study are escaped"


def test_the_shortest_prompt_that_is_not_worse_is_recommended(tmp_path: Path) -> None:
    rng, user_R = np.random.default_rng(0), np.arange(200)
    base_R = rng.normal(5, 1, 200)
    noise = {"long": np.zeros(200), "middle": rng.normal(0.001, 0.1, 200), "short": rng.normal(0.2, 0.1, 200)}
    tokens = {"long": 90.0, "middle": 60.0, "short": 30.0}
    for arm, noise_R in noise.items():
        directory = tmp_path / arm / "prior"
        directory.mkdir(parents=True)
        save_requests([RequestValues(user_R, user_R, {Measure("select_nll", "lm"): base_R + noise_R})], directory)
        Manifest("prior", "", metrics={"prompt_tokens_mean": tokens[arm]}).write(directory)
    runs = {arm: [tmp_path / arm] for arm in noise}
    chosen = {limit: recommend_prompt(runs, limit) for limit in (None, 60, 59, 29)}
    assert {limit: found and found.arm for limit, found in chosen.items()} == {
        None: "middle", 60: "middle", 59: "short", 29: None
    }  # fmt: skip
    found = chosen[None]
    assert found is not None
    assert found.less_best["short"].low > 0
    study = Study("s", "which", (), {arm: (f"prior.prompt.next={arm}",) for arm in noise})
    markdown = to_markdown(
        Result(study, PRIOR, (), [], {arm: Cost({"prior": 1, "forecasts": 1}) for arm in noise}, found)
    )
    assert "Take middle: prior.prompt.next=middle" in markdown
    assert "| → middle | 60.0 |" in markdown
    assert recommend_prompt({"long": runs["long"]}) is None, "no question where there is one length"


def test_all_arms_are_checked_before_any_runs(tmp_path: Path) -> None:
    study = replace(STUDY, arms={"a": ("prior.prompts=x",), "b": ("prior.prompt.dtae.show=true",)})
    with pytest.raises(UserError, match=r"(?s)arm a.*prior\.prompts.*arm b.*prior\.prompt\.date"):
        run_study(study, PRIOR, tmp_path, TINY, console=QUIET)
    assert not list(tmp_path.iterdir())


def test_what_is_no_run_to_take_from_is_told_with_the_rest(tmp_path: Path) -> None:
    study = replace(STUDY, arms={"a": ("prior.prompts=x",), "b": ()})
    with pytest.raises(UserError, match=r"(?s)--reuse .*nowhere, which holds no artifact.*arm a.*prior\.prompts"):
        run_study(study, PRIOR, tmp_path / "out", TINY, console=QUIET, reuse=[tmp_path / "nowhere"])
    assert not list(tmp_path.iterdir())


def test_arms_judged_on_other_requests_are_refused(result: Result, tmp_path: Path, source: str, out: Path) -> None:
    study = replace(STUDY, arms={"all": (), "few": ("prior.panel=10",)}, seeds=(0,))
    with pytest.raises(UserError, match=r"(?s)arms few and all.*same user-periods"):
        run_study(study, PRIOR, tmp_path, [*TINY, source], console=QUIET, reuse=[out / "tied" / "seed=0"])


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "ablation").glob("*.yaml"))
)
def test_the_studies_of_the_project_compose(name: str, tmp_path: Path) -> None:
    study = load_study(name)
    assert study.about
    assert len(study.arms) > 1
    if name.startswith("prior_"):
        assert len(arm_configs(study, PRIOR, tmp_path, ["experiment=quickstart"])) == len(study.arms)


def test_arms_of_one_folder_are_refused_before_any_runs(tmp_path: Path) -> None:
    """However the study came about; `adsid tune` makes its own."""
    with pytest.raises(UserError, match=r"(?s)'a b' and 'a_b'.*name one of them differently"):
        arm_configs(Study("mine", "", (), {"a b": (), "a_b": ()}), PRIOR, tmp_path, ["experiment=smoke"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "a mapping with about and arms"),
        ("about: x", "at least one arm"),
        ("arms: {a: [x=1]}\nseed: 3", "the key seed"),
        ("arms: {a - b: []}", "an arm named 'a - b'"),
        ("arms: {a/b: []}", "an arm named 'a/b'"),
        ("arms: {a: x=1}", r"arms.a='x=1'.*a list of overrides"),
        ("arms: {a b: [], a_b: [], c: []}", "the arms 'a b' and 'a_b'.*one folder each; all of these have a_b"),
        ("arms: {..: []}", r"an arm named '\.\.'.*a name that a folder can have"),
        ("arms: {a: []}\nseeds: [x]", r"seeds=\['x'\]"),
        ("arms: {a: []}\nseeds: []", r"seeds=\[\]"),
        ("arms: {a: []}\nseeds: [-1]", r"seeds=\[-1\]"),
        ("arms: {a: []}\nseeds: [1, 1]", r"seeds=\[1, 1\].*each named once"),
        ("arms: {a: [}", "a YAML file"),
    ],
)
def test_a_bad_study_is_told(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match=f"(?s){message}"):
        load_study(str(tmp_path / "study.yaml"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prior_hed"], "did you mean prior_head"),
        (["nowhere.yaml"], "No such file"),
        (["prior_head", "--seeds", "0,1"], "valid integer"),
        (["prior_head", "run.dir=x"], "--out"),
        (["prior_head", "prior.seed=3"], "no prior.seed: every arm is trained with each seed of the study"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(cli.app, ["ablate", "prior", *arguments])
    assert told.exit_code == USER_MISTAKE
    assert message in told.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_runs_a_study_of_ones_own(
    result: Result, out: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("arms: {one: [prior.head.kind=tied]}\noverrides: [prior.evaluation_prompts=20]\n")
    arguments = ["mine.yaml", *TINY, source, "--reuse", str(out / "tied" / "seed=0")]
    told = CliRunner().invoke(cli.app, ["ablate", "prior", *arguments])
    assert told.exit_code == 0, told.output
    assert "ablation.html" in told.output
    mine = tmp_path / "runs" / "ablation" / "mine"
    assert json.loads((mine / JSON).read_text())["seeds"] == [0]
    assert (mine / "one" / "seed=0" / "prior" / "manifest.json").stat().st_nlink > 1, "taken over"
