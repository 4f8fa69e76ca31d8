"""Batches of a ranker, cut from arrays without Python a row.

Shapes: B rows of a batch, N all rows, F dense features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.errors import UserError
from models.pointwise import RankerBatch
from models.training import EpochSampler
from ranking.rows import Design


class RankerDataset(Dataset[RankerBatch]):
    """Rows of a design; asked for many rows at once, it answers with their batch.

    Args:
        design: the rows.
    """

    def __init__(self, design: Design) -> None:
        self.design = design
        self._dense_NF = torch.from_numpy(design.dense_NF)
        self._label_N, self._weight_N = torch.from_numpy(design.label_N), torch.from_numpy(design.weight_N)

    def __len__(self) -> int:
        return len(self.design)

    def __getitem__(self, row: int) -> RankerBatch:
        return self.batch(np.array([row]))

    def __getitems__(self, rows: Sequence[int]) -> RankerBatch:
        """The batch of some rows; ``DataLoader`` calls it once a batch."""
        return self.batch(np.asarray(rows, np.int64))

    def batch(self, row_B: NDArray[np.int64]) -> RankerBatch:
        """The batch of some rows.

        Args:
            row_B: which, in any order.

        Returns:
            Dense features, bags, labels and weights in that order.
        """
        values, lengths = zip(*(bags.of_rows(row_B) for bags in self.design.bags.values()), strict=True)
        rows = torch.from_numpy(row_B)
        return RankerBatch(
            dense_BN=self._dense_NF[rows],
            sparse=KeyedJaggedTensor(
                keys=list(self.design.bags),
                values=torch.from_numpy(np.concatenate(values)),
                lengths=torch.from_numpy(np.concatenate(lengths)),
            ),
            label_B=self._label_N[rows],
            weight_B=self._weight_N[rows],
        )


class RankerData(L.LightningDataModule):
    """The rows a ranker learns from and those that stop it.

    Args:
        fit: training rows.
        stop: rows of the later span that early stopping looks at.
        batch_size: rows of a training step.
        seed: of the order of the training rows.

    Raises:
        UserError: the training rows are all of one class, so that there is nothing to learn, or a label is unknown.
    """

    def __init__(self, fit: Design, stop: Design, *, batch_size: int, seed: int) -> None:
        super().__init__()
        self.fit, self.stop, self.batch_size, self.seed = fit, stop, batch_size, seed
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

    def train_dataloader(self) -> DataLoader[RankerBatch]:
        """Shuffled batches; the order is a function of (seed, epoch)."""
        data = RankerDataset(self.fit)
        return _loader(data, self.batch_size, EpochSampler(len(data), seed=self.seed))

    def val_dataloader(self) -> DataLoader[RankerBatch]:
        """Batches in order."""
        return _loader(RankerDataset(self.stop), _EVALUATION_BATCH, None)


_EVALUATION_BATCH = 8192


def batches(design: Design) -> DataLoader[RankerBatch]:
    """All rows of a design in order, for prediction."""
    return _loader(RankerDataset(design), _EVALUATION_BATCH, None)


def _loader(data: RankerDataset, batch_size: int, sampler: EpochSampler | None) -> DataLoader[RankerBatch]:
    return DataLoader(data, batch_size=batch_size, sampler=sampler, collate_fn=_whole)


def _whole(batch: Any) -> Any:
    """`RankerDataset.__getitems__` has collated already."""
    return batch
