"""Batches of a ranker: shuffled ones from disk to train on, ordered ones from memory to stop and to predict.

Shapes: B rows of a batch, N all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from data.errors import UserError
from models.pointwise import RankerBatch
from models.sharded import is_leader
from models.training import wait_for_all
from ranking.rows import Design
from ranking.stored import AheadLoader, BlockShuffle, StoredRows, batch_of, share, write_rows
from ranking.tasks import LABEL


class RankerData(L.LightningDataModule):
    """The rows a ranker learns from and those that stop it.

    Args:
        fit: training rows.
        stop: rows of the later span that early stopping looks at.
        batch_size: rows of a training step, of all processes together.
        seed: of the order of the training rows.
        path: of a file for the training rows; written by the first process, where it is not there.
        tasks: what the labels are of.

    Raises:
        UserError: the training rows of a task are all of one class, so that there is nothing to learn.
    """

    def __init__(
        self,
        fit: Design,
        stop: Design,
        *,
        batch_size: int,
        seed: int,
        path: Path,
        tasks: Sequence[str] = (LABEL,),
    ) -> None:
        super().__init__()
        self.fit, self.stop, self.batch_size, self.seed, self.path = fit, stop, batch_size, seed, path
        errors = []
        for number, task in enumerate(tasks):
            given, held_out = (np.unique(part.label_NT[:, number]) for part in (fit, stop))
            known = given[~np.isnan(given)]
            if not {*known, *held_out[~np.isnan(held_out)]} <= {0.0, 1.0}:
                errors.append(
                    UserError(
                        f"labels {sorted({*given.tolist(), *held_out.tolist()})} of task {task}",
                        expected="0 and 1, NaN where unknown",
                        action="prepare the rows again",
                    )
                )
            elif len(known) < 2:
                errors.append(
                    UserError(
                        f"{len(fit)} training rows, all with label {given[0]:g} of task {task}",
                        expected="impressions with and without its outcome in the span ranker_fit",
                        action="choose more users (prior.panel), a longer data.split.ranker_fit, or other "
                        "data.label_kinds or ranker.tasks",
                    )
                )
        if errors:
            raise UserError.collect(errors)

    def train_dataloader(self) -> AheadLoader:
        """Shuffled batches; the order is a function of (seed, epoch)."""
        if is_leader() and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_rows([self.fit], self.path)
        wait_for_all()
        rows = StoredRows(self.path)
        return AheadLoader(rows, BlockShuffle(rows.block_sizes, self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader[RankerBatch]:
        """Batches in order; where several processes work together, each has its share of a batch."""
        rows = [share(row_B) for row_B in _in_order(len(self.stop))]
        return DataLoader(rows, batch_size=None, collate_fn=lambda row_B: batch_of(self.stop, row_B))  # type: ignore[arg-type]


_EVALUATION_BATCH = 8192


def batches(design: Design) -> Iterator[RankerBatch]:
    """All rows of a design in order, for prediction; every process predicts all of them."""
    return (batch_of(design, row_B) for row_B in _in_order(len(design)))


def _in_order(n_rows: int) -> list[NDArray[np.int64]]:
    return np.split(np.arange(n_rows), range(_EVALUATION_BATCH, n_rows, _EVALUATION_BATCH))
