"""The real stages, all of them, on the tiny log of `tests.logs`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from typer.testing import CliRunner

import cli
from data.artifacts import Manifest
from data.errors import LineageError
from data.log import load_log
from data.split import TimeSplit
from data.writer import write_tables
from pipeline import config as configuration
from pipeline.commands.terminal import USER_MISTAKE
from pipeline.config import AdsidConfig, compose
from pipeline.engine import Outcome, Run
from pipeline.run import report_again
from pipeline.stages import ROWS, caveats, stages
from pipeline.verdict import METRICS
from priors.artifact import PriorModel
from priors.config import BaseModelConfig
from priors.forecast import TableForecast
from priors.table import PriorTable
from semantic_ids.advertiser_ids import AdvertiserIds
from tests.logs import tiny_config, tiny_tables

TINY = (
    "experiment=smoke", "data=parquet", "data.max_users=null", "data.origin='2024-01-01'", "data.profile_columns=[age]",
    "data.ad_columns=[category]", "data.impressions_per_visit=8", "prior.first_period=2", "prior.panel=30",
    "prior.prompts=24", "prior.decode.every=1", "retrieval.budget=20", "retrieval.ks=[5,20]",
    "retrieval.trainer.max_epochs=1", "trainer.progress_bar=false",
    "data.split.by=periods",
    *(f"data.split.{name}={list(getattr(tiny_config().split, name))}" for name in TimeSplit.names()),
)  # fmt: skip
NAMES = ["data", "semantic_ids", "prior", "forecasts", "two_tower", "retrieval", "ranker", "report"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The override that names the tiny log."""
    directory = tmp_path_factory.mktemp("source")
    write_tables(tiny_tables(), directory)
    return f"data.path={directory}"


def tiny(directory: Path, *overrides: str) -> AdsidConfig:
    return compose([*TINY, f"run.dir={directory}", *overrides])


def asked_for(directory: Path, source: str) -> list[str]:
    """What a command line that makes the tiny run says."""
    return [*TINY, source, f"run.dir={directory}"]


def execute(config: AdsidConfig, **options: Any) -> list[Outcome]:
    return Run(configuration.run_directory(config), stages(), config).execute(**options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, source: str) -> Path:
    directory = tmp_path_factory.mktemp("run")
    config = tiny(directory, source)
    configuration.save(config, directory / "config.yaml", asked_for(directory, source))
    outcomes = execute(config)
    assert [(outcome.stage, outcome.status) for outcome in outcomes] == [(name, "done") for name in NAMES]
    return directory


def test_a_second_run_does_nothing(finished: Path, source: str) -> None:
    assert {outcome.status for outcome in execute(tiny(finished, source))} == {"skipped"}


def test_another_process_finds_it_up_to_date_too(finished: Path, source: str) -> None:
    command = [sys.executable, "-m", "cli", "run", *asked_for(finished, source)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "nothing was done" in told
    assert "report.html" in told


def test_every_measure_of_a_run_has_a_name(finished: Path) -> None:
    document = json.loads((finished / "report" / "report.json").read_text())
    assert {row["metric"] for row in document["rows"]} <= METRICS.keys()


def test_the_report_tells_the_whole_command_and_that_weights_are_random(finished: Path, source: str) -> None:
    told = json.loads((finished / "report" / "report.json").read_text())["run"]
    assert shlex.split(told["command"]) == ["adsid", "run", *asked_for(finished, source)]
    assert "packaged:tiny" in told["caveats"][0]


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (BaseModelConfig("packaged:tiny"), ["(packaged:tiny)"]),
        (BaseModelConfig("packaged:smollm2", random_weights=True), ["(prior.base.random_weights=true)"]),
        (BaseModelConfig("packaged:smollm2"), []),
    ],
)
def test_random_weights_are_told_whatever_made_them(base: BaseModelConfig, told: list[str]) -> None:
    assert [reason in caveat for caveat, reason in zip(caveats(base), told, strict=True)] == [True] * len(told)


def test_the_report_compares_the_three_arms(finished: Path) -> None:
    document = json.loads((finished / "report" / "report.json").read_text())
    found = {(row["section"], row["metric"], row["arm"]) for row in document["rows"]}
    for arm in ("none", "anchor", "lm", "lm - anchor", "lm - none", "anchor - none"):
        assert ("retrieval", "recall", arm) in found
        for metric in ("auc", "gauc", "pr_auc", "normalized_entropy"):
            assert ("ranking", metric, arm) in found
    for arm in ("lm", "anchor", "lm, other prompt", "lm, constant hidden", "lm - anchor"):
        assert ("forecast", "nll", arm) in found
    assert {stage["name"] for stage in document["run"]["stages"]} == set(NAMES) - {"report"}
    assert all(stage["peak_memory_mb"] > 0 for stage in document["run"]["stages"])
    assert document["run"]["config"]["prior"]["prompts"] == 24
    assert "<html" in (finished / "report" / "report.html").read_text()


def test_lists_of_the_reward_stage_serve_retrieval_alone(
    finished: Path, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is taken for them; probabilities, features and the figures of the LM stay as they were."""
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    monkeypatch.setattr("priors.reward.accepted_for", lambda **_: "lists")
    reward = "prior.reward.prompts=16"
    execute(tiny(directory, source, reward, "prior.reward.head_learning_rate=0.05", "run.until=report"))
    card = (directory / "prior" / "README.md").read_text()
    assert "its lists serve retrieval" in card
    assert "recall@20" in card
    told = json.loads((directory / "prior" / "manifest.json").read_text())["metrics"]["reward"]
    assert {"recall@10", "recall@20", "reward", "nll"} == set(told["select"])
    log = load_log(directory / "data", tiny(directory, source).data, evaluate="validation")
    before, lm = (PriorTable.load(run / "forecasts", log) for run in (finished, directory))
    np.testing.assert_allclose(lm.log_prob_RK, before.log_prob_RK, atol=1e-5)
    lists = PriorTable.load(directory / "forecasts" / "lists", log)
    assert len(lists) == len(lm)
    assert (lists.log_prob_RK != lm.log_prob_RK).any()
    arms = {row["arm"] for row in json.loads((directory / "forecasts" / ROWS).read_text())}
    assert {"lm", "lm, reward", "lm - lm, reward"} <= arms


def test_no_user_is_named_outside_the_tables(finished: Path, source: str) -> None:
    """Not in a prompt, the report, a manifest or any figure; the tables and the forecasts are keyed by the id."""
    config = tiny(finished, source)
    log = load_log(finished / "data", config.data, evaluate="validation")
    named = re.compile(r"\bu\d{3}\b")
    assert all(named.fullmatch(user) for user in log.user_ids)
    prior = PriorModel.load(finished / "prior", log, AdvertiserIds.load(finished / "semantic_ids"), config.prior)
    texts = {f"prompt {user}": prior.compiler.text(prior.compiler.compile(user, 10)) for user in range(20)}
    assert any("group" in text for text in texts.values()), "the profile column that the config names is there"
    written = [path for path in finished.rglob("*") if path.suffix in (".json", ".html", ".yaml", ".jinja", ".md")]
    assert {"manifest.json", "report.html", "report.json"} <= {path.name for path in written}
    texts |= {str(path): path.read_text() for path in written}
    assert [name for name, text in texts.items() if named.search(text)] == []


def test_ids_are_unique_and_forecasts_are_advertisers_that_sum_to_one(finished: Path, source: str) -> None:
    config = tiny(finished, source)
    log = load_log(finished / "data", config.data, evaluate="validation")
    ids = AdvertiserIds.load(finished / "semantic_ids")
    assert len(np.unique(ids.codes_AL, axis=0)) == len(log.advertiser_ids)
    table = PriorTable.load(finished / "forecasts", log)
    assert set(pl.read_parquet(finished / "forecasts" / "period=*" / "*.parquet")["advertiser_id"].explode()) <= set(
        log.advertiser_ids.tolist()
    )
    prior = PriorModel.load(finished / "prior", log, ids, config.prior)
    for arm in ("anchor", "lm"):
        log_prob_BA = TableForecast(table, prior.base, arm=arm).log_probs(table.user_R, table.period_R)
        np.testing.assert_allclose(np.exp(log_prob_BA.astype(np.float64)).sum(1), 1.0, atol=1e-3)


def test_items_are_forecast_as_advertisers_are(source: str, tmp_path: Path) -> None:
    """With ``semantic_ids.entity=item`` IDs, anchor, prompt, lists and figures are of ads."""
    config = tiny(
        tmp_path, source, "semantic_ids.entity=item", "run.until=forecasts", "prior.panel=10",
        "prior.evaluation_prompts=8", "prior.anchor.kind=popularity+history+cooccurrence",
        "semantic_ids.trainer.max_epochs=1",
    )  # fmt: skip
    execute(config)
    log = load_log(tmp_path / "data", config.data, evaluate="validation", entity="item")
    ids = AdvertiserIds.load(tmp_path / "semantic_ids")
    assert (ids.entity, ids.advertiser_ids.tolist()) == ("item", log.ad_ids.tolist())
    prior = PriorModel.load(tmp_path / "prior", log, ids, config.prior)
    table = PriorTable.load(tmp_path / "forecasts", log)
    users = log.panel(10)
    log_prob_BA = TableForecast(table, prior.base, arm="lm").log_probs(users, np.full(len(users), 10))
    assert log_prob_BA.shape == (10, len(log.ad_ids))
    np.testing.assert_allclose(np.exp(log_prob_BA).sum(1), 1.0, atol=1e-4)
    figures = {(row["metric"], row["arm"]) for row in json.loads((tmp_path / "forecasts" / ROWS).read_text())}
    assert {("recall", arm) for arm in ("lm", "anchor", "lm - anchor", "item_knn")} <= figures
    prompts = [prior.compiler.compile(int(user), 10) for user in users]
    told = [str(prior.compiler.tokenizer.decode(prompt.token_ids)) for prompt in prompts]
    assert any(re.search(r"advertiser \d+, ", text) for text in told)  # whose item it is, before what it is


def test_only_what_depends_on_a_value_runs_again(finished: Path, source: str) -> None:
    statuses = {outcome.stage: outcome.status for outcome in execute(tiny(finished, source, "ranker.draws=60"))}
    assert [name for name, status in statuses.items() if status == "done"] == ["ranker", "report"]
    assert {outcome.status for outcome in execute(tiny(finished, source))} == {
        "done",
        "skipped",
    }  # back, for the other tests


def test_a_changed_source_under_the_same_path_is_noticed(tmp_path: Path) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    source.mkdir()
    write_tables(tiny_tables(), source)
    config = tiny(run, f"data.path={source}", "run.until=data")
    assert [outcome.status for outcome in execute(config, until="data")] == ["done"]
    assert [outcome.status for outcome in execute(config, until="data")] == ["skipped"]
    events = pl.read_parquet(source / "events.parquet")
    events.head(-500).write_parquet(source / "events.parquet")
    (outcome,) = execute(config, until="data")
    assert (outcome.status, outcome.manifest.metrics["events"]) == ("done", len(events) - 500)


def test_the_files_of_a_model_directory_tell_a_forecaster(tmp_path: Path) -> None:
    of = {stage.name: stage.outside for stage in stages()}
    packaged = tiny(tmp_path / "run")
    assert (of["prior"](packaged), of["semantic_ids"](packaged), of["data"](packaged)) == ({}, {}, {})
    assert of["prior"](tiny(tmp_path / "run", f"prior.base.name={tmp_path}/gone")) is None
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "README.md").write_text("a card")
    config = tiny(tmp_path / "run", f"prior.base.name={model}", f"semantic_ids.embedding.encoder.name={model}")
    before = of["prior"](config), of["semantic_ids"](config)
    assert [list(content) for content in before if content] == [
        ["prior.base/model.safetensors"], ["encoder/model.safetensors"]
    ]  # fmt: skip
    (model / "model.safetensors").write_bytes(b"others!")
    after = of["prior"](config), of["semantic_ids"](config)
    assert not any(old == new for old, new in zip(before, after, strict=True))


def test_one_stage_refuses_another_lineage(finished: Path, source: str) -> None:
    config = tiny(finished, source, "semantic_ids.rqvae.hidden=48")
    with pytest.raises(LineageError, match="hidden was 32, is 48"):
        Run(finished, stages(), config).execute_one("ranker")


def test_the_ids_are_reported_on_as_a_table_a_page_and_json(finished: Path, tmp_path: Path) -> None:
    runner, directory, page = CliRunner(), str(finished / "semantic_ids"), tmp_path / "ids.html"
    shown = runner.invoke(cli.app, ["ids", "report", directory, "--page", str(page)])
    assert shown.exit_code == 0, shown.output
    assert "<svg" in page.read_text()
    figures = json.loads(runner.invoke(cli.app, ["ids", "report", directory, "--json"]).output)
    assert figures["entities"] == 30
    refused = runner.invoke(cli.app, ["ids", "report", str(finished)])
    assert refused.exit_code == USER_MISTAKE
    assert "semantic_ids" in refused.stderr


def test_retrieval_is_measured_beside_the_run_in_all_arms(finished: Path, tmp_path: Path) -> None:
    overrides = ["retrieval=paper", "retrieval.budget=20", "retrieval.ks=[5,20]", "retrieval.quotas=[0.0,0.5]"]
    command = ["bench", "retrieval", "--run", str(finished), "--out", str(tmp_path), "--json", *overrides]
    shown = CliRunner().invoke(cli.app, command)
    assert shown.exit_code == 0, shown.output
    document = json.loads(shown.stdout)
    arms = {row["arm"] for row in document["rows"] if (row["section"], row["metric"]) == ("retrieval", "recall")}
    assert arms == {"none", "anchor", "lm", "lm - anchor", "lm - none", "anchor - none"}
    assert {(point["arm"], point["quota"]) for point in document["sweep"]} == {
        (arm, quota) for arm in ("anchor", "lm") for quota in (0.0, 0.5)
    }


def test_the_report_can_be_written_again(finished: Path) -> None:
    from rich.console import Console

    page = finished / "report" / "report.html"
    before = page.read_text()
    page.unlink()
    assert report_again(finished, console=Console(quiet=True)) == page
    assert page.read_text() == before


def test_killed_in_training_a_run_ends_with_the_same_figures(finished: Path, source: str, tmp_path: Path) -> None:
    """A child is killed with SIGKILL after the LM's first checkpoint; going on gives the undisturbed run's rows."""
    code = """
import os, signal, sys
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from pipeline.config import compose
from pipeline.engine import Run
from pipeline.stages import stages

save = ModelCheckpoint.on_train_epoch_end

def save_and_die(self, trainer, module):
    save(self, trainer, module)
    if "prior-" in str(self.dirpath) and self.filename == "last":
        os.kill(os.getpid(), signal.SIGKILL)

ModelCheckpoint.on_train_epoch_end = save_and_die
Run(Path(sys.argv[1]), stages(), compose(sys.argv[2:])).execute()
"""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path), *TINY, source, f"run.dir={tmp_path}"]
    killed = subprocess.run(command, check=False, cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".work/prior-*/checkpoints/last.ckpt"))) == 1
    assert not (tmp_path / "prior").exists()

    statuses = [outcome.status for outcome in execute(tiny(tmp_path, source), until="forecasts")]
    assert statuses == ["skipped", "skipped", "done", "done"]
    assert (
        Manifest.read(tmp_path / "prior").metrics["select_nll_by_part"]
        == (Manifest.read(finished / "prior").metrics["select_nll_by_part"])
    )
    assert figures(tmp_path / "forecasts") == figures(finished / "forecasts")


def test_two_processes_train_a_stage_and_the_run_goes_on_after_it(finished: Path, source: str, tmp_path: Path) -> None:
    """Lightning starts the command of the first process once more for the second."""
    root, run = Path(__file__).parents[2], tmp_path / "run"
    shutil.copytree(finished, run)
    devices = ("prior.trainer.devices=2", "prior.trainer.accelerator=cpu", "prior.batch_size=2")
    command = [sys.executable, "train.py", "stage=prior", *TINY, source, f"run.dir={run}", *devices]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = Manifest.read(run / "prior").metrics
    assert len(metrics["select_nll_by_part"]) == 2
    assert metrics["steps"] == 2 * (metrics["batches_a_part"] // 2), "two batches a step"
    assert not list(run.glob(".work/prior-*"))
    statuses = [outcome.status for outcome in execute(tiny(run, source, *devices), until="prior")]
    assert statuses == ["skipped"] * 3


def figures(artifact: Path) -> list[dict[str, Any]]:
    """The rows of an artifact, without what was measured with a clock."""
    return [row for row in json.loads((artifact / ROWS).read_text()) if row["section"] != "cost"]


def test_an_ablation_of_the_ranker_reads_the_run_and_makes_each_ranker_once(finished: Path, source: str) -> None:
    """Seeds, groups and models in one command; one seed more trains that one alone."""
    settings = ["ranker.ablation.models=[dlrm,logistic]", "ranker.ablation.groups=false"]
    command = ["ablate", "ranker", *TINY, source, f"run.dir={finished}", *settings]
    told = CliRunner().invoke(cli.app, command)
    assert told.exit_code == 0, told.output
    assert "LM \N{MINUS SIGN} anchor" in told.output
    assert "Control, another user's forecast" in told.output
    directory = finished / "ranker_ablation"
    page = (directory / "ablation.html").read_text()
    assert "Models" in page
    assert "logistic, lm" in page
    rankers = finished / ".work" / "ranker_ablation_rankers"
    first = {path.name: path.stat().st_mtime_ns for path in rankers.iterdir()}
    assert len(first) == 4 + 3
    more = CliRunner().invoke(cli.app, [*command, "--seeds", "2", "--json"])
    assert more.exit_code == 0, more.output
    assert {row["seeds"] for row in json.loads(more.stdout)} == {2}
    second = {path.name: path.stat().st_mtime_ns for path in rankers.iterdir()}
    assert len(second) == 2 * len(first)
    assert first.items() <= second.items()
    assert Manifest.read(directory).metrics["rankers"] == 14
    shutil.rmtree(directory)


def test_two_processes_train_the_rankers_of_a_run(finished: Path, source: str, tmp_path: Path) -> None:
    """``torchrun --nproc-per-node 2 train.py stage=ranker strategy=torchrec`` leaves ordinary rankers."""
    directory, root = tmp_path / "run", Path(__file__).parents[2]
    shutil.copytree(finished, directory)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    overrides = [
        "stage=ranker",
        "strategy=torchrec",
        *TINY,
        source,
        f"run.dir={directory}",
        "ranker.shuffled_control=false",
    ]
    done = subprocess.run(
        [*torchrun, "train.py", *overrides],
        cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in (directory / "ranker" / "rankers").iterdir()) == ["anchor-0", "lm-0", "none-0"]
    assert Manifest.read(directory / "ranker").config["ranker"]["strategy"] == "torchrec"
    arms = {row["arm"] for row in figures(directory / "ranker") if row["metric"] == "auc" and row["value"] is not None}
    assert {"none", "anchor", "lm", "lm - none"} <= arms
    told = CliRunner().invoke(cli.app, ["rank", str(directory), "--user", "u003", "--top", "1"])
    assert told.exit_code == 0, told.output


def test_an_ablation_without_forecasts_says_what_to_run(tmp_path: Path, source: str) -> None:
    told = CliRunner().invoke(cli.app, ["ablate", "ranker", *TINY, source, f"run.dir={tmp_path}"])
    assert told.exit_code == USER_MISTAKE
    assert "run.until=forecasts" in told.output


def test_a_users_ads_are_ranked_and_the_ranker_is_exported(finished: Path, source: str, tmp_path: Path) -> None:
    runner = CliRunner()
    told = runner.invoke(cli.app, ["rank", str(finished), "--user", "u003", "--top", "3"])
    assert told.exit_code == 0, told.output
    assert "3 of" in told.output
    listed = runner.invoke(cli.app, ["rank", str(finished), "--user", "u003", "--top", "2", "--json", "--arm", "none"])
    assert listed.exit_code == 0, listed.output
    ads = json.loads(listed.stdout)["ads"]
    assert ads[0]["probability"] >= ads[1]["probability"]
    assert all(reason["effect"] for ad in ads for reason in ad["influences"])
    config = tiny(finished, source)
    log = load_log(finished / "data", config.data, evaluate="validation")
    known = log.user_ids[log.panel(config.prior.panel, config.prior.seed)[0]]  # to the ranker, by a hash
    every = runner.invoke(cli.app, ["rank", str(finished), "--user", known, "--top=1", "--features=99", "--json"])
    best = json.loads(every.stdout)["ads"][0]
    told_of = {reason["feature"]: reason["value"] for reason in best["influences"]}
    assert told_of["user"] == [known]
    assert told_of["advertiser"] == [best["name"]] == [f"advertiser {int(best['advertiser']) - 100}"]
    assert all(name.startswith("advertiser ") for name in told_of["history"])
    assert [token[:6] for token in told_of["semantic_id"][:2]] == ["<adv_1", "<adv_2"]
    assert isinstance(told_of["user_purchases"], float)
    exported = runner.invoke(cli.app, ["export", str(finished), "--out", str(tmp_path / "served")])
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "served" / "ranker.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--user", "nobody"], "user nobody"),
        (["--user", "u003", "--arm", "llm"], "arm llm with seed 0"),
        (["--user", "u003", "--seed", "9"], "one of anchor-0"),
        (["--user", "u003", "--period", "99"], "in period 99 without a visit"),
    ],
)
def test_what_cannot_be_ranked_is_told(finished: Path, arguments: list[str], message: str) -> None:
    told = CliRunner().invoke(cli.app, ["rank", str(finished), *arguments])
    assert told.exit_code == USER_MISTAKE
    assert message in told.output


def test_a_folder_that_is_no_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for where, name in (([], "runs/quickstart"), ([str(tmp_path)], tmp_path.name)):
        told = CliRunner().invoke(cli.app, ["rank", *where, "--user", "u003"])
        assert told.exit_code == USER_MISTAKE
        assert f"{name}\nexpected: a run directory" in told.output
        assert "adsid run" in told.output


def test_stacks_compete_on_simulated_data_alone(finished: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(cli.app, ["bench", "ab", "--run", str(finished), "--out", str(tmp_path)])
    assert told.exit_code == USER_MISTAKE
    assert "data=simulator" in told.output
