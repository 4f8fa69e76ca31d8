"""``adsid priors prompt`` on a run of which only tables, IDs and the configuration are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli
from data.log import load_log
from data.split import TimeSplit
from data.writer import write_tables
from pipeline.commands.terminal import USER_MISTAKE
from pipeline.config import compose, save
from priors.base_model import load_base_model
from priors.prompt import PromptCompiler
from semantic_ids.advertiser_ids import AdvertiserIds
from tests.logs import tiny_config, tiny_tables
from tests.priors.conftest import random_ids

CONFIG = (
    "experiment=smoke", "data=parquet", "data.origin='2024-01-01'", "data.profile_columns=[age]",
    "data.ad_columns=[category]", "data.split.by=periods",
    *(f"data.split.{name}={list(getattr(tiny_config().split, name))}" for name in TimeSplit.names()),
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run")
    for stage in ("data", "semantic_ids"):
        (directory / stage).mkdir()
    write_tables(tiny_tables(), directory / "data")
    save(compose([*CONFIG, f"run.dir={directory}"]), directory / "config.yaml")
    log = load_log(directory / "data", tiny_config(), evaluate="validation")
    random_ids(log).save(directory / "semantic_ids")
    return directory


def prompt(run: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["priors", "prompt", "--run", str(run), *arguments])


def test_json_says_what_the_model_reads(run: Path) -> None:
    result = prompt(run, "--user", "u003", "--as-of", "9", "--json")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    log = load_log(run / "data", tiny_config(), evaluate="validation")
    config = compose(CONFIG).prior
    tokenizer = load_base_model(config.base).tokenizer
    compiler = PromptCompiler(log, AdvertiserIds.load(run / "semantic_ids"), tokenizer, config.prompt)
    made = compiler.compile(3, 9)
    assert shown["token_ids"] == made.token_ids.tolist()
    assert shown["text"] == compiler.text(made)
    assert {one["name"]: one["tokens"] for one in shown["sections"]} == made.sections
    assert sum(one["tokens"] for one in shown["sections"]) == shown["tokens"] <= shown["max_tokens"] == 48
    assert (shown["period"], shown["as_of"], shown["window"]) == (9, "2024-02-26", 1024)


@pytest.mark.parametrize("as_of", ["9", "2024-02-26", "2024-03-03", "2024-03-03T23:59"])
def test_a_date_means_the_last_start_of_a_period_up_to_it(run: Path, as_of: str) -> None:
    shown = json.loads(prompt(run, "--user", "u003", "--as-of", as_of, "--json").stdout)
    assert shown["as_of"] == "2024-02-26"


def test_people_see_text_ids_and_budgets(run: Path) -> None:
    more = [f"prior.prompt.{one}" for one in ("max_tokens=90", "search.show=true", "conversions.show=true")]
    more.append("prior.prompt.conversions.entries=20")
    result = prompt(run, "--user", "u003", "--as-of", "9", *more)
    assert result.exit_code == 0
    for part in ("user u003, as of 2024-02-26 (start of period 9)", "of 90 tokens", "token ids:", "next :", "last :"):
        assert part in result.stdout
    rows = {line.split("│")[1].strip(): line.split("│")[2:5] for line in result.stdout.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["search"]] == ["-", "-", "24"], "a log without searches"
    tokens, wanted, budget = map(int, rows["conversions"])
    assert tokens <= budget == 48 < wanted


def test_a_user_without_history_is_told(run: Path) -> None:
    result = prompt(run, "--user", "u003", "--as-of", "1")
    assert "no event before it" in result.stdout
    assert "bought : nothing yet" in result.stdout


BAD_INPUT = [
    (("--user", "u999", "--as-of", "9"), ["--user u999", "one of the 60 users", "u000, u001"]),
    (("--user", "u003", "--as-of", "0"), ["--as-of 0", "a period from 1 to 12", "2024-01-01"]),
    (("--user", "u003", "--as-of", "13"), ["--as-of 13", "evaluate=test"]),
    (("--user", "u003", "--as-of", "2023-12-31"), ["--as-of 2023-12-31", "the first begins on 2024-01-01"]),
    (("--user", "u003", "--as-of", "2031-01-01"), ["--as-of 2031-01-01", "the last on 2024-03-18"]),
    (("--user", "u003", "--as-of", "soon"), ["--as-of soon", "a date in one of them"]),
    (("--user", "u003", "--as-of", "9", "prior.prompt.max_tokens=3"), ["prior.prompt.max_tokens=3", "more than 5"]),
    (("--user", "u003", "--as-of", "9", "prior.prompt.max_tokens=1024"), ["1024 positions", "at most 1022"]),
    (("--user", "u003", "--as-of", "9", "prior.prompt.serch.show=true"), ["did you mean prior.prompt.search"]),
    (("--user", "u003", "--as-of", "9", "prior=tiny"), ["overrides of single keys"]),
]


@pytest.mark.parametrize(("arguments", "told"), BAD_INPUT)
def test_bad_input_is_told(run: Path, arguments: tuple[str, ...], told: list[str]) -> None:
    result = prompt(run, *arguments)
    assert result.exit_code == USER_MISTAKE
    assert all(part in result.stderr for part in told), result.stderr


def test_a_folder_that_is_no_run(run: Path, tmp_path: Path) -> None:
    arguments = ("--user", "u003", "--as-of", "9")
    assert "config.yaml of a run directory" in prompt(tmp_path, *arguments).stderr
    save(compose(CONFIG), tmp_path / "config.yaml")
    assert "without tables" in prompt(tmp_path, *arguments).stderr
    (tmp_path / "data").symlink_to(run / "data")
    assert "without semantic IDs" in prompt(tmp_path, *arguments).stderr
