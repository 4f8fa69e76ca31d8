"""`adsid data`: a log is written, checked and described, or one is told all that is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner, Result

import cli
from data.artifacts import MANIFEST, Manifest, hash_directory
from data.writer import write_tables
from pipeline.commands.terminal import USER_MISTAKE
from tests.logs import tiny_tables

COLUMNS = ["data.ad_columns=[category]", "data.profile_columns=[age]"]
TABLES = {f"{name}.parquet" for name in ("advertisers", "ads", "users", "events", "placements")}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The five tables of the tiny log, in a folder without a manifest; the current folder is empty."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    directory = tmp_path / "source"
    directory.mkdir()
    write_tables(tiny_tables(), directory)
    return directory


def adsid(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["data", *arguments])


def prepare(source: Path, *arguments: str) -> Result:
    return adsid("prepare", "data=parquet", f"data.path={source}", *COLUMNS, *arguments)


def test_what_was_prepared_is_sound_and_says_where_it_came_from(source: Path) -> None:
    made = prepare(source)
    assert made.exit_code == 0, made.output
    directory = Path("runs/data/parquet")
    assert {path.name for path in directory.iterdir()} == {*TABLES, MANIFEST}
    manifest = Manifest.read(directory)
    assert (manifest.kind, manifest.config["path"]) == ("data", str(source))
    assert manifest.content_hash == hash_directory(directory)
    assert manifest.metrics["users"] == 60
    assert manifest.metrics["split"]["test"][1] == 12
    checked = adsid("validate", str(directory))
    assert checked.exit_code == 0
    assert "users 60" in checked.output
    assert prepare(source).exit_code == 0  # over an earlier data set
    assert Manifest.read(directory).content_hash == manifest.content_hash


def test_a_folder_with_something_else_in_it_is_left_alone(source: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    refused = prepare(source, "--out", str(precious))
    assert refused.exit_code == USER_MISTAKE
    assert "holds something else" in refused.stderr
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]


def test_all_problems_at_once_and_nothing_half_written(source: Path) -> None:
    users, events = source / "users.parquet", source / "events.parquet"
    pl.concat([pl.read_parquet(users)] * 2).write_parquet(users)
    pl.read_parquet(events).with_columns(value=-1.0, sample_weight=float("nan")).write_parquet(events)
    told = ["users.user_id", "events.value", "events.sample_weight", "offending rows", "what to do"]
    for result in (prepare(source), adsid("validate", str(source))):
        assert result.exit_code == USER_MISTAKE
        assert all(text in result.stderr for text in told)
        assert "Traceback" not in result.output
    assert not any(Path().rglob("*.parquet"))
    assert not any(Path().rglob("*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", "nowhere"], "expected: a directory with advertisers.parquet"),
        (["describe", "nowhere"], "expected: a directory with advertisers.parquet"),
        (["validate", "SOURCE", "data.ad_columns=[colour]"], "data.ad_columns names colour"),
        (["validate", "SOURCE", "data.split.by=periods"], "no conversion in"),
        (["validate", "SOURCE", "data.split.by=weeks"], "one of periods, dates, quantiles, leave_one_out"),
        (["validate", "SOURCE", "data.label_kinds=[impression]"], "some of click, click_conversion, view_conversion"),
        (["validate", "SOURCE", "data.orign=2024-01-01"], "did you mean data.origin"),
        (["prepare", "data=parquet"], "data=parquet without a path"),
        (["prepare", "data=parkett"], "did you mean parquet"),
    ],
)
def test_mistakes_are_told_with_what_is_valid(arguments: list[str], message: str, source: Path) -> None:
    result = adsid(*[str(source) if argument == "SOURCE" else argument for argument in arguments])
    assert result.exit_code == USER_MISTAKE
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_a_choice_cannot_be_made_again(source: Path) -> None:
    prepare(source)
    result = adsid("validate", "runs/data/parquet", "data=complete_journey")
    assert result.exit_code == USER_MISTAKE
    assert "overrides of single keys" in result.stderr


def test_description_as_a_table_a_page_and_json(source: Path, tmp_path: Path) -> None:
    prepare(source)
    shown = adsid("describe", "runs/data/parquet")
    assert shown.exit_code == 0, shown.output
    page = Path("runs/data/parquet.html").read_text()
    assert "<svg" in page
    assert {path.name for path in Path("runs/data/parquet").iterdir()} == {*TABLES, MANIFEST}, "its hash stays"
    figures = json.loads(adsid("describe", str(source), *COLUMNS, "--json").output)
    assert "60" in json.dumps(figures)
    named = tmp_path / "log.html"
    assert adsid("describe", str(source), *COLUMNS, "--page", str(named)).exit_code == 0
    assert "<svg" in named.read_text()
    users = pl.read_parquet(source / "users.parquet")["user_id"]
    told = shown.output + page + json.dumps(figures)
    assert not [user for user in users if user in told]


def test_the_test_span_is_described_only_on_demand(source: Path) -> None:
    prepare(source)
    closed, opened = (
        json.loads(adsid("describe", "runs/data/parquet", "--json", *asked).output) for asked in ([], ["evaluate=test"])
    )
    assert [span["conversions"] for span in closed["spans"]][-1] is None
    assert [span["conversions"] for span in opened["spans"]][-1] > 0


def test_tables_that_nobody_checked_are_checked_before_they_are_described(source: Path) -> None:
    (source / "ads.parquet").unlink()
    result = adsid("describe", str(source))
    assert result.exit_code == USER_MISTAKE
    assert "without ads.parquet" in result.stderr
