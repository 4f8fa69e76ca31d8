"""What every pointwise ranker shares: its batch, its embedding tables and its LightningModule.

A ranker is an ``nn.Module`` with ``forward(dense_BN, sparse) -> logits_B``; one file a ranker, this
file for what would otherwise be copied from file to file. The TorchRec names used by the rankers
are imported here once, with the one log line silenced that TorchRec's own first forward causes.

    RankerBatch ──► ranker(dense_BN, sparse) ──► logits_B ──► weighted BCE

Shapes: B rows, N dense features, F sparse features, D width of an embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


def _is_news(record: logging.LogRecord) -> bool:
    """False for PyTorch's advice to authors of FX tracers, logged once on TorchRec 1.8's first lookup."""
    return not record.getMessage().startswith("is_fx_tracing will return true")


logging.getLogger("torch.fx._symbolic_trace").addFilter(_is_news)


@dataclass(frozen=True)
class SparseTable:
    """One embedding table and the sparse features that look rows up in it.

    Attributes:
        name: of the table.
        rows: number of embeddings.
        features: keys of the ``KeyedJaggedTensor`` that share the table.
        pooling: ``sum`` or ``mean`` over the ids of one row's bag; an empty bag gives zeros.
    """

    name: str
    rows: int
    features: tuple[str, ...]
    pooling: str = "mean"


@dataclass
class RankerBatch:
    """Rows as a ranker reads them.

    Attributes:
        dense_BN: standardised dense features, float32.
        sparse: the sparse features of the same rows, one bag a row and key.
        label_B: 1.0 where the row converted, else 0.0.
        weight_B: rows of the log that each row stands for.
    """

    dense_BN: Tensor
    sparse: KeyedJaggedTensor
    label_B: Tensor
    weight_B: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> RankerBatch:
        """The batch on a device; Lightning calls it."""
        return RankerBatch(
            dense_BN=self.dense_BN.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            label_B=self.label_B.to(device, non_blocking=non_blocking),
            weight_B=self.weight_B.to(device, non_blocking=non_blocking),
        )


def embedding_bags(tables: Sequence[SparseTable], dim: int) -> EmbeddingBagCollection:
    """TorchRec's collection of pooled embeddings, all of one width, fp32.

    Row 0 of a table, which stands for ids without a row of their own, starts at zero: an id of a kind that
    training never saw adds nothing. The others start as TorchRec's default has it.

    Args:
        tables: at least one table; names and features must differ.
        dim: width D of every embedding.

    Returns:
        A collection whose pooled output is ``(B, F, D)`` once put through TorchRec's ``SparseArch``.

    Raises:
        ValueError: no table, or one feature in two tables.
    """
    features = [feature for table in tables for feature in table.features]
    if not features or len(set(features)) != len(features):
        raise ValueError(f"features {features}: expected at least one, and each in one table only")
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=table.name,
                embedding_dim=dim,
                num_embeddings=table.rows,
                feature_names=list(table.features),
                pooling=PoolingType[table.pooling.upper()],
                init_fn=_uniform_but_row_0,
            )
            for table in tables
        ]
    )


def _uniform_but_row_0(weight_RD: Tensor) -> None:
    bound = len(weight_RD) ** -0.5
    with torch.no_grad():
        weight_RD.uniform_(-bound, bound)[0] = 0.0


class PointwiseModule(L.LightningModule):
    """Fits a ranker by weighted binary cross-entropy and watches the same loss on held-out rows.

    Negatives are a sample of the impressions; weighting each row by the impressions it stands for
    makes the loss an unbiased estimate of the loss over all impressions, so the fitted probabilities
    are those of the whole log and need no correction afterwards.

    Args:
        ranker: maps ``(dense_BN, sparse)`` to ``logits_B``.
        learning_rate: of AdamW.
        weight_decay: of AdamW, on everything but biases.
    """

    def __init__(self, ranker: nn.Module, *, learning_rate: float, weight_decay: float) -> None:
        super().__init__()
        self.ranker = ranker
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self._val_loss, self._val_weight = 0.0, 0.0

    def forward(self, batch: RankerBatch) -> Tensor:
        """Logits of a batch, shape ``(B,)``."""
        return self.ranker(batch.dense_BN, batch.sparse)

    def training_step(self, batch: RankerBatch, batch_idx: int) -> Tensor:
        loss, weight = self._weighted_loss(batch)
        loss = loss / weight
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch.label_B))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._val_loss, self._val_weight = 0.0, 0.0

    def validation_step(self, batch: RankerBatch, batch_idx: int) -> None:
        loss, weight = self._weighted_loss(batch)
        self._val_loss += float(loss)
        self._val_weight += float(weight)

    def on_validation_epoch_end(self) -> None:
        self.log("val_loss", self._val_loss / self._val_weight, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.ranker.parameters() if p.ndim > 1]
        plain = [p for p in self.ranker.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate)

    def _weighted_loss(self, batch: RankerBatch) -> tuple[Tensor, Tensor]:
        loss = binary_cross_entropy_with_logits(self(batch), batch.label_B, batch.weight_B, reduction="sum")
        return loss, batch.weight_B.sum()
