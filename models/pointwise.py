"""What every pointwise ranker shares: its batch, its embedding tables and its LightningModule.

A ranker is an ``nn.Module`` with ``forward(dense_BN, sparse) -> logits_BT``; one file a ranker, this file for what
would otherwise be copied from file to file. A ranker of one task ends in a head of its own; for several it is given
`Heads` over its representation, a file each too (`models.shared_bottom`, `models.mmoe`). The TorchRec names used by the
rankers are imported here once, with the one log line silenced that TorchRec's own first forward causes.

    RankerBatch ──► ranker(dense_BN, sparse) ──► logits_BT ──► weighted BCE, a sum over tasks

Shapes: B rows, T tasks, N dense features, F sparse features, D width of an embedding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.models.dlrm import OverArch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

Heads = Callable[[int], nn.Module]
"""Makes what turns a representation of some width, ``(B, width)``, into a logit a task, ``(B, T)``."""
_LARGEST_LOGIT = 30.0
"""Log-odds beyond this are as good as certain; the level is not set by how far beyond they are."""
_TINY = 1e-12
"""Keeps a task without a row of known label in a batch from dividing by nothing."""


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
        label_BT: of each task 1.0 where the row has its outcome, 0.0 where not, NaN where that is not known.
        weight_B: rows of the log that each row stands for.
    """

    dense_BN: Tensor
    sparse: KeyedJaggedTensor
    label_BT: Tensor
    weight_B: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> RankerBatch:
        """The batch on a device; Lightning calls it."""
        return RankerBatch(
            dense_BN=self.dense_BN.to(device, non_blocking=non_blocking),
            sparse=self.sparse.to(device, non_blocking=non_blocking),
            label_BT=self.label_BT.to(device, non_blocking=non_blocking),
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


def rows_of_features(ranker: nn.Module) -> dict[str, int]:
    """Rows of the table that each sparse feature of a ranker, not sharded, is looked up in."""
    collections = [part for part in ranker.modules() if isinstance(part, EmbeddingBagCollection)]
    tables = [table for part in collections for table in part.embedding_bag_configs()]
    return {feature: table.num_embeddings for table in tables for feature in table.feature_names}


def check_sizes(cfg: object, sizes: Sequence[int], *, n_dense: int | None = None) -> None:
    """Refuses a ranker with a layer of no width or without dense features.

    Args:
        cfg: named in the error.
        sizes: of its layers.
        n_dense: dense features, for a module that reads them.

    Raises:
        ValueError: a size is not positive.
    """
    if min(sizes, default=1) < 1 or (n_dense is not None and n_dense < 1):
        read = "" if n_dense is None else f" with {n_dense} dense features"
        raise ValueError(f"{cfg}{read}: expected positive sizes")


def single_head(layers: Sequence[int], base_rate: float) -> Heads:
    """The head of one task: TorchRec's ``OverArch``, an MLP that ends in a logit.

    Args:
        layers: hidden widths, at least one.
        base_rate: share of rows with the outcome; the untrained logit is about its log-odds.
    """

    def head(width: int) -> nn.Module:
        over = OverArch(width, [*layers, 1])
        start_at_(over.model[-1].bias, base_rate)
        return over

    return head


def start_at_(bias_1: nn.Parameter, base_rate: float) -> None:
    """Sets the last layer's bias so that an untrained ranker predicts about the base rate.

    Args:
        bias_1: bias of the layer that gives the logit.
        base_rate: share of rows that convert; no step is spent on learning the mean.

    Raises:
        ValueError: the base rate is no probability strictly inside (0, 1).
    """
    if not 0.0 < base_rate < 1.0:
        raise ValueError(f"base rate {base_rate}: expected a probability strictly inside (0, 1)")
    with torch.no_grad():
        bias_1.fill_(torch.logit(torch.tensor(base_rate)))


def _uniform_but_row_0(weight_RD: Tensor) -> None:
    bound = max(len(weight_RD), 1) ** -0.5  # a shard of a table may be empty
    with torch.no_grad():
        weight_RD.uniform_(-bound, bound)[:1] = 0.0


def level_shift(logit_N: Tensor, label_N: Tensor, weight_N: Tensor) -> float:
    """What to add to all logits so that the mean prediction is the mean outcome.

    The level of the probabilities is settled last and by few rows of large weight, so that two rankers may
    differ by it more than by what they know. It is therefore set on held-out rows. The order of the rows
    stays as it is.

    Args:
        logit_N: log-odds, float64.
        label_N: zeros and ones, NaN where unknown.
        weight_N: rows of the log that each row stands for.

    Returns:
        The shift in log-odds; 0 where the rows are of one class. Rows of an unknown label do not count.
    """
    known_N = ~label_N.isnan()
    label, weight = label_N[known_N].double(), weight_N[known_N].double()
    if not len(label) or label.min() == label.max():
        return 0.0
    logit = logit_N[known_N].detach().clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)

    def excess(shift: float) -> float:
        return float(weight @ (torch.sigmoid(logit + shift) - label))

    return float(brentq(excess, -2 * _LARGEST_LOGIT, 2 * _LARGEST_LOGIT))


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Count numbers too small for their exponent as zero, within.

    Moments of ids that are seldom met fade to such numbers, on which a CPU's step is many times slower. The setting is
    the process's, so it goes back to its default after.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


class PointwiseModule(L.LightningModule):
    """Fits a ranker by weighted binary cross-entropy and watches the loss of held-out rows.

    Negatives are a sample of the impressions; weighting each row by the impressions it stands for
    makes the loss an unbiased estimate of the loss over all impressions, so the fitted probabilities
    are those of the whole log.

    Embeddings have a learning rate of their own. AdamW steps the row of a rare id as far as that of a
    frequent one, so at the rate of the dense layers a small log's ids are memorised within three
    epochs. Both rates fall linearly to zero: a few rows of large weight otherwise move the level of
    all probabilities from epoch to epoch.

    With several tasks the loss is the sum of theirs by ``task_weights``, each a mean over the rows whose label of the
    task is known; a row without one moves nothing of that task.

    Args:
        ranker: maps ``(dense_BN, sparse)`` to ``logits_BT``.
        learning_rate: of AdamW at the first step.
        embedding_learning_rate: the same for the embedding tables.
        weight_decay: of AdamW, on everything but biases.
        task_weights: of each task's loss, one a task.
    """

    def __init__(
        self,
        ranker: nn.Module,
        *,
        learning_rate: float,
        embedding_learning_rate: float,
        weight_decay: float,
        task_weights: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self.ranker = ranker
        self.intercept: Tensor
        self.register_buffer("intercept", torch.zeros(len(task_weights)))
        self.task_weights = list(task_weights)
        self.learning_rate, self.embedding_learning_rate = learning_rate, embedding_learning_rate
        self.weight_decay = weight_decay
        self._validated: list[tuple[Tensor, Tensor]] = []

    def forward(self, batch: RankerBatch) -> Tensor:
        """Logits of a batch, shape ``(B, T)``; ``intercept``, zero while training, is added to all of them."""
        return self.ranker(batch.dense_BN, batch.sparse) + self.intercept

    def training_step(self, batch: RankerBatch, batch_idx: int) -> Tensor:
        loss_T, weight_T = self._weighted_loss(batch)
        loss = self._over_tasks(loss_T / _mean_over_processes(weight_T).clamp(min=_TINY))
        self.log("train_loss", loss.detach(), prog_bar=True, batch_size=len(batch.label_BT))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._validated = []

    def validation_step(self, batch: RankerBatch, batch_idx: int) -> None:
        self._validated.append((self(batch).double().cpu(), batch.label_BT.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Logs ``val_loss``, the loss of the held-out rows, each counted once, with its level set on them.

        Up to that level it is the likelihood of the outcomes given which rows were sampled. Weighted, it would
        be the loss of the few sampled negatives that look like conversions, and say little of the rest.
        """
        logit_NT, label_NT = (_of_all_processes(torch.cat(parts)) for parts in zip(*self._validated, strict=True))
        loss_T = torch.stack([_held_out_loss(*task) for task in zip(logit_NT.T, label_NT.T, strict=True)])
        self.log("val_loss", self._over_tasks(loss_T), prog_bar=True)  # the same in all processes already

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # Under autocast Lightning refuses to clip the gradients of a fused optimiser.
        optimizer = self.optimizer(fused=not str(self.trainer.precision).endswith("mixed"))
        steps = int(self.trainer.estimated_stepping_batches)
        decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay, "interval": "step"}}

    def optimizer(self, *, fused: bool = True) -> torch.optim.AdamW:
        """AdamW over the `parameter_groups`.

        Args:
            fused: one kernel a step where torch has one; elsewhere it is several in any case.
        """
        on = {parameter.device.type for parameter in self.parameters()}
        return torch.optim.AdamW(self.parameter_groups(), fused=fused and on <= {"cpu", "cuda"})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Embedding tables, other matrices, biases; each with its learning rate and weight decay.

        Sharded tables are in none: TorchRec steps them itself, in the backward pass.
        """
        tables = {
            id(parameter)
            for part in self.ranker.modules()
            if isinstance(part, EmbeddingBagCollection)
            for parameter in part.parameters()
        }
        groups: dict[str, list[nn.Parameter]] = {"tables": [], "matrices": [], "biases": []}
        for _, parameter in in_backward_optimizer_filter(self.ranker.named_parameters()):
            kind = "tables" if id(parameter) in tables else "matrices" if parameter.ndim > 1 else "biases"
            groups[kind].append(parameter)
        return [
            {"params": groups["tables"], "lr": self.embedding_learning_rate, "weight_decay": self.weight_decay},
            {"params": groups["matrices"], "lr": self.learning_rate, "weight_decay": self.weight_decay},
            {"params": groups["biases"], "lr": self.learning_rate, "weight_decay": 0.0},
        ]

    def _weighted_loss(self, batch: RankerBatch) -> tuple[Tensor, Tensor]:
        """Of each task the loss and the weight of the rows whose label is known, summed, ``(T,)`` both."""
        weight_BT = torch.where(batch.label_BT.isnan(), 0.0, batch.weight_B.unsqueeze(1))
        label_BT = batch.label_BT.nan_to_num()
        loss_BT = binary_cross_entropy_with_logits(self(batch), label_BT, weight_BT, reduction="none")
        return loss_BT.sum(0), weight_BT.sum(0)

    def _over_tasks(self, loss_T: Tensor) -> Tensor:
        return (loss_T * loss_T.new_tensor(self.task_weights)).sum()


def _held_out_loss(logit_N: Tensor, label_N: Tensor) -> Tensor:
    """Mean loss of one task's rows of known label, at their own level; 0 where there are none."""
    known_N = ~label_N.isnan()
    logit, label = logit_N[known_N], label_N[known_N].double()
    if not len(label):
        return logit_N.new_zeros(())
    return binary_cross_entropy_with_logits(logit + level_shift(logit, label, torch.ones_like(label)), label)


def _mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a number over the processes that train together.

    Their gradients are averaged, so a loss over the mean weight is one over the weight of the whole batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _of_all_processes(value_N: Tensor) -> Tensor:
    """The rows of all processes, those of the first one first."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value_N
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value_N)
    return torch.cat(parts)
