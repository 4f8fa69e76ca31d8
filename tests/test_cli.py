"""The `adsid` command and `train.py`: exit codes, messages, and any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli
import train
from data.errors import UserError
from pipeline.commands.terminal import INTERRUPTED, OUR_MISTAKE, USER_MISTAKE, guarded, show_page

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, so that nothing is found by accident and nothing is written elsewhere."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def adsid(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["report", "--help"], ["doctor", "--help"]])
def test_help_has_examples(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0
    assert "Example" in result.output
    assert "adsid " in result.output


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, cli; cli.app(['--help'], standalone_mode=False);"
        "print(sorted({'torch', 'polars', 'hydra'} & {*sys.modules}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip().endswith("[]")


def test_version() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    assert result.output.startswith("adsid ")


def test_a_users_mistake_from_another_folder(folder: Path) -> None:
    """The installed command finds its configs from any folder; one message, exit code 2, nothing written."""
    command = [str(Path(sys.executable).parent / "adsid"), "run", "experiment=smok", "prior.promts=3"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == USER_MISTAKE
    assert "did you mean smoke" in result.stderr
    assert "did you mean prior.prompts" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(folder.iterdir()) == []


def test_a_run_writes_below_the_current_folder(folder: Path) -> None:
    """The data stage refuses the path given, after the default run directory was made here."""
    result = adsid("run", "experiment=smoke", "data.path=missing", "run.until=data")
    assert result.exit_code == USER_MISTAKE
    assert "missing" in result.stderr
    config = (folder / "runs" / "smoke" / "config.yaml").read_text()
    assert config.startswith("# adsid run experiment=smoke data.path=missing run.until=data\n")
    assert not (folder / "runs" / "smoke" / "data").exists()


def test_a_place_that_is_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    result = adsid("run", "run.dir=file/run")
    assert result.exit_code == USER_MISTAKE
    assert "a file is in the way" in result.stderr


def test_report_of_no_run() -> None:
    result = adsid("report", "nowhere")
    assert result.exit_code == USER_MISTAKE
    assert "a run directory, with a config.yaml" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["report", "~/none"],
        ["rank", "~/none", "--user", "1"],
        ["export", "~/none", "--out", "out"],
        ["results", "A run=~/none", "--out", "out"],
        ["data", "describe", "~/none"],
        ["ids", "report", "~/none"],
        ["priors", "drift", "--run", "~/none"],
    ],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_a_home_folder_that_no_shell_expanded(
    arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    result = adsid(*arguments)
    assert result.exit_code == USER_MISTAKE
    assert str(folder / "home" / "none") in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["priors", "drift", "--run", "none", "--lm", "-1"], ["priors", "drift", "--run", "none", "--every", "0"]],
)
def test_numbers_that_are_too_small_are_refused_at_once(arguments: list[str]) -> None:
    result = adsid(*arguments)
    assert result.exit_code == USER_MISTAKE
    assert arguments[-2] in result.stderr


@pytest.mark.parametrize(
    ("directory", "page"),
    [("log", "log.html"), ("v1.5", "v1.5.html"), ("log/", "log.html"), ("a/../v1.5", "v1.5.html")],
)
def test_a_page_lies_beside_its_folder(directory: str, page: str, folder: Path) -> None:
    written: list[Path] = []
    show_page("", Path(directory), None, write=lambda _, path: written.append(path), to_console=str)
    assert written == [folder / page]


def test_one_stage_without_the_ones_before(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(["stage=prior", "experiment=smoke"])
    assert caught.value.code == USER_MISTAKE
    assert "run.until=semantic_ids" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["experiment=smoke"], ["stage=report"], ["stage=prior", "stage=ranker"]])
def test_train_names_the_stages(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train.main(arguments)
    assert caught.value.code == USER_MISTAKE
    assert "stage=semantic_ids, stage=prior, stage=two_tower, stage=ranker" in capsys.readouterr().err


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("x=1", expected="x=2", action="set x"), USER_MISTAKE, "what to do: set x"),
        (RuntimeError("odd\nmore"), OUR_MISTAKE, "adsid failed: RuntimeError: odd; --debug shows where"),
        (KeyboardInterrupt(), INTERRUPTED, "the same command goes on"),
    ],
)
def test_exit_codes(error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        guarded(lambda: fail(error), debug=False)
    assert caught.value.code == code
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        guarded(lambda: fail(RuntimeError("odd")), debug=True)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["stage=ranker"], ["stage=prior", "strategy=torchrec"], ["stage=semantic_ids"]])
def test_several_processes_are_for_the_sharded_ranker_alone(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        train.main([*arguments, "experiment=smoke"])
    assert ended.value.code == 2
    assert "stage=ranker strategy=torchrec" in capsys.readouterr().err
