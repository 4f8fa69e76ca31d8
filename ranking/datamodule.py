"""Batches of a ranker: shuffled ones from disk to train on, ordered ones from memory to stop and to predict.

Shapes: B rows of a batch, N all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning as L
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from data.errors import UserError
from models.pointwise import RankerBatch
from models.sharded import is_leader, wait_for_all
from ranking.rows import Design
from ranking.stored import AheadLoader, BlockShuffle, StoredRows, batch_of, share, write_rows


class RankerDataset(Dataset[RankerBatch]):
    """Rows of a design in memory, asked for a batch at a time.

    Args:
        design: the rows.
    """

    def __init__(self, design: Design) -> None:
        self.design = design

    def __len__(self) -> int:
        return len(self.design)

    def __getitem__(self, row_B: NDArray[np.int64]) -> RankerBatch:
        return batch_of(self.design, row_B)


class _InOrder(Sampler[NDArray[np.int64]]):
    """All rows in order, a batch at a time; where several processes work together, each has its share of a batch."""

    def __init__(self, n_rows: int, *, shared: bool) -> None:
        self.n_rows, self.shared = n_rows, shared

    def __len__(self) -> int:
        return -(-self.n_rows // _EVALUATION_BATCH)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for start in range(0, self.n_rows, _EVALUATION_BATCH):
            row_B = np.arange(start, min(start + _EVALUATION_BATCH, self.n_rows))
            yield share(row_B) if self.shared else row_B


class RankerData(L.LightningDataModule):
    """The rows a ranker learns from and those that stop it.

    Args:
        fit: training rows.
        stop: rows of the later span that early stopping looks at.
        batch_size: rows of a training step, of all processes together.
        seed: of the order of the training rows.
        path: of a file for the training rows; written by the first process, where it is not there.

    Raises:
        UserError: the training rows are all of one class, so that there is nothing to learn, or a label is unknown.
    """

    def __init__(self, fit: Design, stop: Design, *, batch_size: int, seed: int, path: Path) -> None:
        super().__init__()
        self.fit, self.stop, self.batch_size, self.seed, self.path = fit, stop, batch_size, seed, path
        classes = np.unique(np.concatenate([np.unique(fit.label_N), np.unique(stop.label_N)]))
        if not np.isin(classes, (0.0, 1.0)).all():
            raise UserError(
                f"labels {classes.tolist()}",
                expected="0 and 1",
                action="train on impressions, whose outcome is known, not on the candidates of a request",
            )
        if len(np.unique(fit.label_N)) < 2:
            raise UserError(
                f"{len(fit)} training rows, all with label {fit.label_N[0]:g}",
                expected="conversions and impressions without one in the span ranker_fit",
                action="choose more users (prior.panel), a longer data.split.ranker_fit, or other data.label_kinds",
            )

    def train_dataloader(self) -> AheadLoader:
        """Shuffled batches; the order is a function of (seed, epoch)."""
        if is_leader() and not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_rows([self.fit], self.path)
        wait_for_all()
        rows = StoredRows(self.path)
        return AheadLoader(rows, BlockShuffle(rows.block_sizes, self.batch_size, self.seed))

    def val_dataloader(self) -> DataLoader[RankerBatch]:
        """Batches in order."""
        return _loader(self.stop, shared=True)


_EVALUATION_BATCH = 8192


def batches(design: Design) -> DataLoader[RankerBatch]:
    """All rows of a design in order, for prediction; every process predicts all of them."""
    return _loader(design, shared=False)


def _loader(design: Design, *, shared: bool) -> DataLoader[RankerBatch]:
    order = _InOrder(len(design), shared=shared)
    return DataLoader(RankerDataset(design), sampler=order, batch_size=None)
