"""Batches hold the rows asked for, in an order that depends on (seed, epoch) alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.errors import UserError
from ranking.datamodule import RankerData, batches
from ranking.rows import Bags, Design
from ranking.stored import batch_of

ROWS = 50


@pytest.fixture
def design() -> Design:
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 4, 7)
    return Design(
        dense_NF=rng.normal(size=(ROWS, 3)).astype(np.float32),
        bags={
            "ad": Bags.single(np.arange(ROWS)),
            "history": Bags(
                np.arange(lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]), rng.integers(0, 7, ROWS)
            ),
        },
        label_NT=(np.arange(ROWS) % 5 == 0).astype(np.float32)[:, None],
        weight_N=np.linspace(1, 9, ROWS).astype(np.float32),
    )


def test_a_batch_holds_the_rows_asked_for(design: Design) -> None:
    rows = [7, 3, 7, 49]
    batch = batch_of(design, np.array(rows))
    torch.testing.assert_close(batch.dense_BN, torch.from_numpy(design.dense_NF[rows]))
    torch.testing.assert_close(batch.weight_B, torch.from_numpy(design.weight_N[rows]))
    assert batch.label_BT.tolist() == design.label_NT[rows].tolist()
    assert batch.sparse["ad"].to_dense()[0].tolist() == [7]
    history = [part.tolist() for part in batch.sparse["history"].to_dense()]
    bags = design.bags["history"]
    assert history == [bags.value_V[bags.ptr_R1[bag] : bags.ptr_R1[bag + 1]].tolist() for bag in bags.bag_N[rows]]


def test_every_row_comes_once_an_epoch_in_an_order_of_seed_and_epoch(design: Design, tmp_path: Path) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = RankerData(design, design, batch_size=8, seed=seed, path=tmp_path / "rows").train_dataloader()
        loader.sampler.set_epoch(epoch)
        assert len(list(loader)) == len(loader) == 7
        return torch.cat([batch.sparse["ad"].values() for batch in loader]).tolist()

    assert sorted(order(0, 0)) == list(range(ROWS))
    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


def test_evaluation_keeps_the_order(design: Design) -> None:
    labels = torch.cat([batch.label_BT for batch in batches(design)])
    assert labels.tolist() == design.label_NT.tolist()


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_training_rows_of_one_class_are_refused(design: Design, label: float) -> None:
    one_class = replace(design, label_NT=np.full((ROWS, 1), label, np.float32))
    with pytest.raises(UserError, match=f"50 training rows, all with label {label:g}"):
        RankerData(one_class, design, batch_size=8, seed=0, path=Path())
    RankerData(
        design, one_class, batch_size=8, seed=0, path=Path()
    )  # days that only stop the ranker may be of one class


def test_rows_whose_outcome_is_not_known_are_refused(design: Design) -> None:
    unknown = replace(design, label_NT=np.full((ROWS, 1), np.nan, np.float32))
    with pytest.raises(UserError, match="all with label nan"):
        RankerData(unknown, design, batch_size=8, seed=0, path=Path())
