"""`adsid bench`: what it makes, what it takes as it is, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import cli
from data.artifacts import Manifest
from data.split import TimeSplit
from data.statistics import Row
from data.writer import write_tables
from pipeline.bench_page import render
from pipeline.commands.terminal import USER_MISTAKE
from pipeline.config import compose, load_run
from pipeline.verdict import figure
from retrieval.benchmark import ADVERTISERS, PRODUCT, RetrievalBenchmark
from retrieval.factors import RANKED, TOP
from tests.logs import tiny_config, tiny_tables

TINY = [
    "experiment=smoke", "data=parquet", "data.max_users=null", "data.origin='2024-01-01'", "data.profile_columns=[age]",
    "data.ad_columns=[category]", "data.impressions_per_visit=8", "prior.panel=20", "retrieval.budget=20",
    "retrieval.ks=[5,20]", "retrieval.trainer.max_epochs=1", "retrieval.channels=[two_tower,own,popularity]",
    "data.split.by=periods",
    *(f"data.split.{name}={list(getattr(tiny_config().split, name))}" for name in TimeSplit.names()),
]  # fmt: skip


def bench(*arguments: str, of: str = "retrieval") -> Result:
    return CliRunner().invoke(cli.app, ["bench", of, *arguments])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the benchmark made itself, without any forecast."""
    source, directory = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("run")
    write_tables(tiny_tables(), source)
    shown = bench(*TINY, f"data.path={source}", f"run.dir={directory}")
    assert shown.exit_code == 0, shown.output
    assert "Without a channel" in shown.output
    return directory


def test_it_makes_what_it_needs_and_writes_a_page_and_json(run: Path) -> None:
    assert (run / "two_tower").is_dir()
    assert not (run / "prior").exists(), "no channel follows a forecast"
    document = json.loads((run / "bench" / "retrieval.json").read_text())
    assert document["retrieval"]["channels"] == ["two_tower", "own", "popularity"]
    assert document["facts"]["head"] == "none"
    page = (run / "bench" / "retrieval.html").read_text()
    assert "<svg" in page
    assert "Channels alone" in page


def test_a_run_keeps_the_configuration_that_it_was_made_with(run: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(run, tmp_path / "run")
    before, source = (copied / "config.yaml").read_text(), load_run(copied, action="").data.path
    others = [override for override in TINY if "channels" not in override]
    shown = bench(*others, f"data.path={source}", f"run.dir={copied}", "retrieval.channels=[own]")
    assert shown.exit_code == 0, shown.output
    assert (copied / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["retrieval.blend.kind=rrf"], {"blend": "rrf", "index": "exact"}),
        (["retrieval=counts"], {"channels": ["own", "popularity"]}),
        (["retrieval.index.kind=hnsw", "retrieval.budget=10", "retrieval.ks=[10]"], {"index": "hnsw", "k": 10}),
    ],
)
def test_configurations_swap_beside_the_same_towers(
    run: Path, tmp_path: Path, overrides: list[str], expected: dict[str, object]
) -> None:
    before = Manifest.read(run / "two_tower")
    shown = bench("--run", str(run), "--out", str(tmp_path), "--json", *overrides)
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)["facts"]
    assert {key: facts[key] for key in expected} == expected
    assert Manifest.read(run / "two_tower") == before
    assert (tmp_path / "retrieval.html").exists()


def test_towers_are_refit_before_the_span_that_they_answer(run: Path, tmp_path: Path) -> None:
    config = load_run(run, action="")
    asked = [*TINY, f"data.path={config.data.path}", f"run.dir={tmp_path}", "retrieval.refit=true"]
    asked += ["retrieval.channels=[two_tower,item_knn]"]
    shown = bench(*asked, "--part", "arms", "--json")
    assert shown.exit_code == 0, shown.output
    towers = {path.name: (path / "model.safetensors").read_bytes() for path in (tmp_path / "two_tower").glob("towers*")}
    assert set(towers) == {"towers", "towers_tuning", "towers_evaluated"}
    assert len(set(towers.values())) == len(towers), "each has learned from other periods"
    first = (run / "two_tower" / "towers" / "model.safetensors").read_bytes()
    assert towers["towers"] == first, "the epoch is chosen as without"
    opened = bench(*asked, "evaluate=test", "--part", "arms", "--json")
    assert opened.exit_code == 0, opened.output
    evaluated = (tmp_path / "two_tower" / "towers_tuning" / "model.safetensors").read_bytes()
    assert evaluated == towers["towers_evaluated"], "what answered the validation span chooses the test span's blends"


def test_the_same_figures_twice(run: Path, tmp_path: Path) -> None:
    shown = bench("--run", str(run), "--out", str(tmp_path), "--json")
    assert json.loads(shown.stdout)["rows"] == json.loads((run / "bench" / "retrieval.json").read_text())["rows"]


def test_a_part_alone_has_a_page_too(run: Path, tmp_path: Path) -> None:
    shown = bench("--run", str(run), "--out", str(tmp_path), "--part", "blends", "--json")
    assert shown.exit_code == 0, shown.output
    assert {row["section"] for row in json.loads(shown.stdout)["rows"]} == {"blends"}
    assert "Blends" in (tmp_path / "retrieval.html").read_text()


def test_the_page_shows_both_factors() -> None:
    facts = {"periods": [10, 12], "tuned_on": [7, 9], "budget": 20, "k": 20, "blend": "quota", "evaluate": "validation"}
    row = Row(ADVERTISERS, RANKED, "lm - two_tower", "new", TOP, -0.125, -0.25, -0.0625, 9)
    found = RetrievalBenchmark(
        rows=[row, replace(row, section=PRODUCT, metric="recall", arm="lm, ads known", segment="all", k=20, value=0.5)],
        facts=facts | {"requests": 9, "users": 5},
    )
    page = render(compose(["experiment=smoke"]), found)
    assert figure(row, 3) in page
    assert figure(found.rows[1], 3) in page


REFUSED = [
    (["--run", "/nowhere"], "config.yaml"),
    (["--run", "RUN", "prior.prompts=3"], "prior.prompts=3"),
    (["--run", "RUN", "--part", "blend"], "latency, arms, channels, blends, factors"),
    (["--run", "RUN", "retrieval.model.dim=8"], "retrieval.model.dim=8"),
    (["--run", "RUN", "retrieval.refit=true"], "retrieval.refit=true"),
    (["--run", "RUN", "retrieval.channels=[forecast,own]"], "without prior, forecasts"),
    (["--run", "RUN", "retrieval.channels=[tower]"], "two_tower"),
    (["--run", "RUN", "retrieval=advertiser_tower"], "advertiser_weight=null"),
    (["--run", "RUN", "retrieval=papers"], "paper"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED)
def test_what_cannot_be_measured_is_told(run: Path, arguments: list[str], message: str) -> None:
    refused = bench(*(str(run) if word == "RUN" else word for word in arguments))
    assert refused.exit_code == USER_MISTAKE
    assert message in refused.stderr


AB_REFUSED = [
    (["--run", "/nowhere"], "config.yaml"),
    (["--run", "RUN", "retrieval.budget=3"], "retrieval.budget=3"),
    (["--run", "RUN", "auction.budget=1"], "did you mean auction.budgets"),
    (["--run", "RUN"], "without prior, forecasts"),
]


@pytest.mark.parametrize(("arguments", "message"), AB_REFUSED)
def test_stacks_that_cannot_compete_are_told(run: Path, arguments: list[str], message: str) -> None:
    refused = bench(*(str(run) if word == "RUN" else word for word in arguments), of="ab")
    assert refused.exit_code == USER_MISTAKE
    assert message in refused.stderr
