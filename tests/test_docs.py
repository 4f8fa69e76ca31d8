"""The commands that the docs show: each exists, and its configuration composes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import cli
from pipeline.config import compose
from pipeline.tuning import grid_study

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def commands(page: Path) -> list[str]:
    """Commands in a page's bash blocks and in its inline code, but for those with placeholders."""
    text = page.read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:adsid|python train\.py|make) [^`]*)`", text)
    found = [line.split("  #")[0].strip() for line in lines]
    return [line for line in found if line.startswith(("adsid ", "python ", "make ")) and not set(line) & set("<…")]


SHOWN = [(page.relative_to(ROOT).as_posix(), command) for page in PAGES for command in commands(page)]


def test_the_docs_show_commands() -> None:
    assert {"README.md", "docs/data.md"} <= {page for page, _ in SHOWN}


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_a_command_of_the_docs_is_valid(page: str, command: str) -> None:
    program, *rest = shlex.split(command)
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
        assert rest[0] in targets
    elif program == "python" and rest[0] == "-m":
        assert (ROOT / rest[1].replace(".", "/")).with_suffix(".py").exists()
    elif program == "python":
        assert (ROOT / rest[0]).exists()
    else:
        group = typer.main.get_command(cli.app)
        while rest and hasattr(group, "commands") and rest[0] in group.commands:
            group, rest = group.commands[rest[0]], rest[1:]
        assert not hasattr(group, "commands") or not rest, f"{page}: no command {command!r}"
        options = {name for parameter in group.params for name in parameter.opts}
        assert {word for word in rest if word.startswith("--")} <= {*options, "--help"}
    overrides = [word for word in rest if re.match(r"[a-z_.]+=[^=]", word) and not word.startswith("stage=")]
    if command.startswith("adsid tune "):
        study, shared = grid_study(rest[0], overrides)
        for point in study.arms.values():
            compose([*shared, *point])
    elif program != "make":
        compose(overrides)


def test_help_is_there_for_every_command() -> None:
    for names in (
        ["data"],
        ["data", "prepare"],
        ["data", "validate"],
        ["data", "describe"],
        ["ids"],
        ["ids", "report"],
        ["ids", "assign"],
        ["ids", "refit"],
        ["priors"],
        ["priors", "prompt"],
        ["ablate"],
        ["ablate", "ranker"],
        ["ablate", "prior"],
        ["bench"],
        ["bench", "retrieval"],
        ["bench", "ab"],
        ["priors", "export"],
        ["priors", "explain"],
        ["priors", "generate"],
        ["priors", "monitor"],
        ["tune"],
        ["rank"],
        ["export"],
    ):
        result = CliRunner().invoke(cli.app, [*names, "--help"])
        assert result.exit_code == 0
        assert "Example" in result.output


def test_what_stands_in_brackets_is_not_lost_in_the_help() -> None:
    for names, shown in (
        (["bench", "retrieval"], "retrieval.channels=[own,popularity,forecast]"),
        (["ablate", "ranker"], "ranker.ablation.models=[logistic]"),
        (["data", "validate"], "data.label_kinds=[click]"),
        (["priors", "generate"], "'adsid[ray]'"),
    ):
        assert shown in CliRunner().invoke(cli.app, [*names, "--help"]).output
