"""``adsid priors generate`` and ``explain`` on a finished run of a tiny forecaster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

import cli
from data.errors import LineageError, UserError
from pipeline.config import AdsidConfig, save
from pipeline.engine import locked
from pipeline.forecasts import JobConfig, generate, open_prior
from priors.base_model import load_base_model
from priors.config import BaseModelConfig, DecodeConfig
from priors.decode import TreeDecoder
from priors.fit import fit_prior
from priors.lookup import PriorLookup
from priors.table import shard_files
from tests.logs import tiny_config, tiny_log
from tests.priors.conftest import random_ids, tiny_prior_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stage prior is done, for 20 users at three as-of times."""
    directory = tmp_path_factory.mktemp("run")
    log = tiny_log(directory)
    (directory / "tables").rename(directory / "data")
    cfg = tiny_prior_config(
        base=BaseModelConfig("packaged:tiny", dtype="float32"),
        decode=DecodeConfig(beam=4, top_k=6, batch_size=8, shard_users=6, every=2),
    )
    ids = random_ids(log)
    prior, _ = fit_prior(log, ids, cfg, work_dir=directory / "work")
    for name in ("semantic_ids", "prior"):
        (directory / name).mkdir()
    ids.save(directory / "semantic_ids")
    prior.save(directory / "prior")
    save(AdsidConfig(experiment="smoke", data=tiny_config(), prior=cfg), directory / "config.yaml")
    return directory


@pytest.fixture(scope="module")
def table(run: Path) -> Path:
    generate(run, JobConfig(run / "table"))
    return run / "table"


def adsid(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["priors", *map(str, arguments)])


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in shard_files(directory)}


def test_generate_says_what_it_cost_and_leaves_a_table_with_its_lookup(run: Path, table: Path, tmp_path: Path) -> None:
    result = adsid("generate", "--run", run, "--out", tmp_path / "out", "--price", 3.6, "--json")
    assert result.exit_code == 0, result.output
    sheet = json.loads(result.stdout)
    assert (sheet["users"], sheet["periods"], sheet["decoded"], sheet["kept_shards"]) == (20, 3, 60, 0)
    assert sheet["price_per_million"] == pytest.approx(sheet["seconds_per_million"] / 1000)
    assert sheet["tokens_per_user"] == 0, "such short training is not kept, so no prompt is read"
    assert bytes_of(tmp_path / "out") == bytes_of(table)
    assert len(PriorLookup(tmp_path / "out")) == 60
    again = adsid("generate", "--run", run, "--out", tmp_path / "out")
    assert again.exit_code == 0
    assert "12" in again.output  # shards that were there


def test_killed_it_goes_on_and_ends_with_the_same_bytes(run: Path, table: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "priors", "generate", "--run", str(run), "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while child.poll() is None and len(shard_files(tmp_path)) < 2:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert 2 <= len(shard_files(tmp_path)) < 12
    sheet = generate(run, JobConfig(tmp_path))
    assert 2 <= sheet.kept_shards < 12
    assert bytes_of(tmp_path) == bytes_of(table)


def test_as_of_times_are_added_to_a_table(run: Path, table: Path, tmp_path: Path) -> None:
    generate(run, JobConfig(tmp_path, as_of=("7",)))
    sheet = generate(run, JobConfig(tmp_path, as_of=("2024-02-26",), incremental=True))
    assert {file.parent.name for file in shard_files(tmp_path)} == {"period=0007", "period=0009"}
    assert sheet.decoded + sheet.carried == 20
    assert len(PriorLookup(tmp_path)) == 40


def test_a_second_job_on_one_table_is_refused(run: Path, tmp_path: Path) -> None:
    with locked(tmp_path):
        result = adsid("generate", "--run", run, "--out", tmp_path)
    assert result.exit_code == 2
    assert str(os.getpid()) in result.stderr


def test_a_table_of_another_decoding_is_not_mixed(run: Path, table: Path) -> None:
    with pytest.raises(LineageError, match="another decode"):
        generate(run, JobConfig(table), ["prior.decode.beam=7"])


BAD = [
    (["generate", "--engine", "spark"], "--engine spark"),
    (["generate", "--workers", "0"], "--workers 0"),
    (["generate", "--as-of", "77"], "--as-of 77"),
    (["explain", "--user", "u001", "--as-of", "9", "--top-k", "0"], "--top-k 0"),
    (["explain", "--user", "nobody", "--as-of", "9"], "--user nobody"),
    (["explain", "--user", "u001", "--as-of", "soon"], "--as-of soon"),
    (["explain", "--user", "u001", "--as-of", "9", "prior.panel=5"], "read here: prior.decode.*, evaluate"),
    (["generate", "prior.prompts=5", "prior.decode.beam=9"], "prior.prompts=5 beside"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_requests_are_told(run: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    extra = ["--out", tmp_path] if arguments[0] == "generate" else []
    result = adsid(arguments[0], "--run", run, *extra, *arguments[1:])
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_run_without_a_forecaster_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    with pytest.raises(UserError, match="without data, semantic_ids, prior"):
        generate(tmp_path, JobConfig(tmp_path / "out"))


@torch.no_grad()
def teacher_forced(run: Path, user: str, period: int, token_ids: list[int]) -> np.ndarray:
    """Log-probability of every advertiser through the base model with its adapter, as anybody loads them.

    One sequence a prefix, the head from its file by hand, legal children from the table of codes.
    """
    plain, state = json.loads((run / "prior" / "prior.json").read_text()), load_file(run / "prior" / "head.safetensors")
    base_decoder = load_base_model(BaseModelConfig("packaged:tiny", dtype="float32")).decoder
    decoder = PeftModel.from_pretrained(base_decoder, str(run / "prior" / "adapter")).eval()
    _, log, prior = open_prior(run)
    codes_AL, sizes = prior.compiler.ids.codes_AL, prior.compiler.ids.level_sizes
    index = np.flatnonzero(log.user_ids == user)
    base = prior.base.child_scores(index, np.array([period]))
    q_A, own_A = (part_BA[0] for part_BA in prior.base.anchor.parts(index, np.array([period])))
    history_F = torch.from_numpy(prior.compiler.compile(int(index[0]), period).history_F)
    words = base_decoder.get_input_embeddings()(torch.tensor(token_ids))
    log_prob_A = np.zeros(len(codes_AL))
    for level, size in enumerate(sizes):
        for prefix in np.unique(codes_AL[:, :level], axis=0):
            below = np.flatnonzero((codes_AL[:, :level] == prefix).all(1))
            rows = torch.from_numpy(prefix + np.cumsum([0, *sizes])[:level])
            sequence = torch.cat([words, state["id_rows"][rows]])[None]
            hidden_H = decoder(inputs_embeds=sequence).last_hidden_state[0, -1]
            unit_H = (hidden_H - state["head.mean_LH"][level]) / state["head.scale_L"][level]
            taste_D = state[f"head.projections.{level}"] @ unit_H
            logit_V = (state[f"head.codes_{level}"] @ taste_D).numpy()
            new_V, again_V = (
                (state[f"{head}.codes_{level}"] @ state[f"{head}.projections.{level}"]).numpy()
                @ ((history_F - state[f"{head}.mean_LH"][level]) / state[f"{head}.scale_L"][level]).numpy()
                for head in ("head.history", "head.history.repeat")
            )
            legal, score = np.unique(codes_AL[below, level]), np.full(size, -np.inf)
            for code in legal:
                under = below[codes_AL[below, level] == code]
                node, repeat = prior.base.trie.path_AL[under[0], level], own_A[under].sum() / q_A[under].sum()
                said = logit_V[code] + (1 - repeat) * new_V[code] + repeat * again_V[code]
                score[code] = plain["calibration"]["lm_weight"][level] * said
                score[code] += plain["calibration"]["base_exponent"][level] * base[level][0, node]
            log_prob_A[below] += (score - np.logaddexp.reduce(score))[codes_AL[below, level]]
    return log_prob_A


def test_explain_agrees_with_teacher_forcing_by_hand(run: Path) -> None:
    for user, period in (("u003", 9),):
        result = adsid("explain", "--run", run, "--user", user, "--as-of", period, "--top-k", "all", "--json")
        assert result.exit_code == 0, result.output
        explained = json.loads(result.stdout)
        forced_A = teacher_forced(run, user, period, explained["token_ids"])
        assert np.exp(forced_A).sum() == pytest.approx(1.0, abs=1e-5)
        assert explained["mass"] == pytest.approx(1.0, abs=1e-5)
        listed = [one["advertiser_id"] for one in explained["advertisers"]]
        assert sorted(listed) == list(range(100, 130))
        for one in explained["advertisers"]:
            assert one["log_prob"] == pytest.approx(forced_A[one["advertiser_id"] - 100], abs=1e-4)
        best = json.loads(adsid("explain", "--run", run, "--user", user, "--as-of", period, "--json").stdout)
        assert best["certified"]
        assert [one["advertiser_id"] for one in best["advertisers"]] == listed[:10]
        assert best["advertisers"][0].keys() == explained["advertisers"][0].keys() >= {
            "advertiser_id", "name", "id_tokens", "token_ids", "log_prob", "anchor_log_prob"
        }  # fmt: skip
        assert best["interests"] == explained["interests"]
        assert [set(one) for one in best["interests"]] == [{"interest", "log_prob", "anchor_log_prob"}] * 5
        assert 0 < sum(np.exp(one["log_prob"]) for one in best["interests"]) < 1


def test_interests_agree_with_the_head_by_hand(run: Path) -> None:
    """The head's row of each category times the standardised hidden state of the prompt's end, and the anchor."""
    explained = json.loads(adsid("explain", "--run", run, "--user", "u003", "--as-of", 9, "--json").stdout)
    _, _, prior = open_prior(run)
    plain, state = json.loads((run / "prior" / "prior.json").read_text()), load_file(run / "prior" / "head.safetensors")
    decoder = PeftModel.from_pretrained(
        load_base_model(BaseModelConfig(**plain["base_model"])).decoder, str(run / "prior" / "adapter")
    )
    with torch.no_grad():
        words = prior.model.embed(torch.tensor([explained["token_ids"]]))
        hidden_H = decoder(inputs_embeds=words).last_hidden_state[0, -1]
    unit_H = (hidden_H - state["interest_head.mean_LH"][0]) / state["interest_head.scale_L"][0]
    user = prior.compiler.log.user_ids.tolist().index("u003")
    history_F = torch.from_numpy(prior.compiler.compile(user, 9).history_F)
    unit_F = (history_F - state["interest_head.history.mean_LH"][0]) / state["interest_head.history.scale_L"][0]
    logit_C = state["interest_head.rows.0"] @ unit_H + state["interest_head.history.rows.0"] @ unit_F
    logit_C = logit_C.numpy()
    assert prior.interests is not None
    base_C = prior.interests.base.child_scores(np.array([user]), np.array([9]))[0][0]
    weights = plain["interests"]["calibration"]
    score_C = weights["lm_weight"][0] * logit_C + weights["base_exponent"][0] * base_C
    log_prob_C = score_C - np.logaddexp.reduce(score_C)
    best = np.argsort(-log_prob_C)[:5]
    assert [one["interest"] for one in explained["interests"]] == [plain["interests"]["names"][c] for c in best]
    np.testing.assert_allclose([one["log_prob"] for one in explained["interests"]], log_prob_C[best], atol=1e-4)


def test_explain_tells_the_lms_part_from_the_historys(run: Path) -> None:
    """The anchor, times the history, times the LM; where the head reads the history alone, the LM has no part."""
    explained = json.loads(
        adsid("explain", "--run", run, "--user", "u003", "--as-of", 9, "--top-k", "all", "--json").stdout
    )
    config, log, prior = open_prior(run)
    user = log.user_ids.tolist().index("u003")
    asked = np.array([user]), np.array([9])
    with torch.no_grad():
        for name, weight in prior.model.head.named_parameters():
            weight.mul_(1.0 if name.startswith("history") else 0.0)
    compiled = [prior.compiler.compile(user, 9)]
    decoder = TreeDecoder(prior.model, prior.base, prior.calibration, config.prior.decode)
    without_lm_A = decoder.score(compiled, *asked, [np.arange(30)])[0][0]
    for one in explained["advertisers"]:
        assert one["history_log_prob"] == pytest.approx(without_lm_A[one["advertiser_id"] - 100], abs=0.02)
        assert one["lm_share"] == pytest.approx(one["log_prob"] - one["history_log_prob"])
    assert any(abs(one["history_log_prob"] - one["anchor_log_prob"]) > 1e-3 for one in explained["advertisers"])
    assert explained["lm_divergence"] < explained["divergence"]


def test_explain_shows_words_ids_and_whether_the_list_is_proven(run: Path) -> None:
    result = adsid("explain", "--run", run, "--user", "u003", "--as-of", "2024-02-26", "--top-k", 3)
    assert result.exit_code == 0, result.output
    assert "3 advertisers, proven to be the most probable" in result.output
    assert "bought :" in result.output
    assert "interest" in result.output


def test_monitor_compares_a_table_with_what_happened(run: Path, table: Path) -> None:
    result = adsid("monitor", "--run", run, "--priors", table, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [one["period"] for one in found["periods"]] == [10, 11]
    assert not any(one["drifted"] for one in found["periods"])  # fewer requests than tell anything
    assert set(found["ece"]) == set(found["curves"]) == {"before", "after"}
    shown = adsid("monitor", "--run", run, "--priors", table)
    assert "no period is farther off than chance" in shown.output


def test_drift_shows_writes_and_draws_how_the_forecaster_ages(run: Path, tmp_path: Path) -> None:
    result = adsid("drift", "--run", run, "--every", 5, "--out", tmp_path, "prior.history.epochs=2")
    assert result.exit_code == 0, result.output
    assert "Calibration error" in result.output
    found = json.loads((tmp_path / "drift.json").read_text())
    assert [step["periods"] for step in found["steps"]] == [[6, 6], [7, 11]]
    page = (tmp_path / "drift.html").read_text()
    assert "<svg" in page
    assert "7–11" in page
    assert "forecast, refit − forecast" in page
    bad = adsid("drift", "--run", run, "--every", 0, "--out", tmp_path)
    assert bad.exit_code == 2
    assert "--every" in bad.stderr


@pytest.mark.slow
def test_ray_makes_the_same_table(run: Path, table: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        sheet = generate(run, JobConfig(tmp_path, engine="ray", workers=2))
        assert (sheet.decoded, sheet.kept_shards) == (60, 0)
        assert bytes_of(tmp_path) == bytes_of(table)
        assert generate(run, JobConfig(tmp_path, engine="ray", workers=2)).kept_shards == 12
    finally:
        ray.shutdown()
