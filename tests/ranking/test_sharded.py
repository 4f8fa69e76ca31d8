"""Two processes that share the tables learn what one learns, and each reads the other's checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from models.dlrm import DLRM, DLRMConfig
from models.pointwise import PointwiseModule
from models.sharded import as_leader_says, join_processes, shard
from models.training import rank_of_world
from tests.logs import tiny_log
from tests.models.test_dlrm import TABLES, random_sparse
from tests.ranking.sharded_case import OTHERS, train

RUNS = [
    f"{processes}{what}" for processes in ("one", "both") for what in ("", "_killed", *(f"_{name}" for name in OTHERS))
]


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A group of this one process, which no other test shall see."""
    join_processes()
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(alone: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, undisturbed, and killed and resumed by the others."""
    root = tmp_path_factory.mktemp("sharded")
    for name in (*RUNS, "log"):
        (root / name).mkdir()
    log = tiny_log(root / "log")
    train(log, root / "one")
    with suppress(KeyboardInterrupt, SystemExit):
        train(log, root / "one_killed", die_in_epoch=1)
    for name, cfg in OTHERS.items():
        train(log, root / f"one_{name}", cfg)
    assert not (root / "one_killed" / "ranker").exists()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, "-m", "tests.ranking.sharded_case", str(root)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (root / "both_killed" / "ranker").exists()
    train(log, root / "both_killed")
    return root


def losses(directory: Path) -> list[float]:
    found: list[float] = json.loads((directory / "losses.json").read_text())
    return found


def probabilities(directory: Path) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.load(directory / "probabilities.npy")
    return found


@pytest.mark.parametrize("ranker", ["", *(f"_{name}" for name in OTHERS)], ids=["dlrm", *OTHERS])
def test_two_processes_take_the_steps_of_one(directory: Path, ranker: str) -> None:
    one, both = directory / f"one{ranker}", directory / f"both{ranker}"
    assert len(losses(one)) == len(losses(both)) > 10
    np.testing.assert_allclose(losses(both), losses(one), atol=1e-4)
    assert losses(one)[-1] < losses(one)[0]
    np.testing.assert_allclose(probabilities(both), probabilities(one), atol=1e-4)


@pytest.mark.parametrize("killed", ["one_killed", "both_killed"])
def test_the_others_go_on_from_a_checkpoint_as_if_nothing_had_been(directory: Path, killed: str) -> None:
    """One process goes on where two were killed, and the other way round."""
    undisturbed = losses(directory / "one")
    np.testing.assert_allclose(losses(directory / killed), undisturbed[len(undisturbed) // 2 :], atol=1e-4)
    np.testing.assert_allclose(probabilities(directory / killed), probabilities(directory / "one"), atol=1e-4)


def test_nothing_is_left_but_the_ranker(directory: Path) -> None:
    for name in RUNS:
        left = {path.name for path in (directory / name).iterdir()}
        assert left == {"ranker", "losses.json", "probabilities.npy"}


def test_a_sharded_ranker_computes_what_the_whole_one_did(alone: None) -> None:
    torch.manual_seed(0)
    cfg = DLRMConfig(embedding_dim=8, dense_layers=[16], over_layers=[16])
    whole = DLRM(TABLES, n_dense=3, cfg=cfg)
    other = DLRM(TABLES, n_dense=3, cfg=cfg)
    other.load_state_dict(whole.state_dict())
    sharded = shard(other, device=torch.device("cpu"), table_learning_rate=0.1)
    generator = torch.Generator().manual_seed(0)
    dense_BN, sparse = torch.randn(9, 3, generator=generator), random_sparse(9, generator)
    torch.testing.assert_close(sharded(dense_BN, sparse), whole(dense_BN, sparse))


def test_sharded_tables_are_left_to_torchrec(alone: None) -> None:
    ranker = shard(
        DLRM(TABLES, n_dense=3, cfg=DLRMConfig(embedding_dim=8)), device=torch.device("cpu"), table_learning_rate=0.1
    )
    module = PointwiseModule(ranker, learning_rate=0.1, embedding_learning_rate=0.1, weight_decay=0.0)
    tables, matrices, biases = module.parameter_groups()
    assert tables["params"] == []
    assert len(matrices["params"]) == len(biases["params"]) == 5
    names = set(ranker.fused_optimizer.state_dict()["state"])
    assert {name.split(".")[-2] for name in names} == {"ad", "advertiser"}


@pytest.mark.parametrize(("accelerator", "backend"), [("auto", "nccl"), ("gpu", "nccl"), ("cpu", "gloo")])
def test_processes_talk_over_what_they_train_on(
    monkeypatch: pytest.MonkeyPatch, accelerator: str, backend: str
) -> None:
    """On a machine with GPUs."""
    joined = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **_: joined.append(backend))
    join_processes(accelerator)
    assert joined == [backend]


def test_alone_there_is_nobody_to_ask() -> None:
    assert rank_of_world() == (0, 1)
    assert as_leader_says("this") == "this"
