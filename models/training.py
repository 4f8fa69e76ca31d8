"""One way to fit a LightningModule: checkpoints, early stopping, and a resume that changes no figure.

An *epoch* is the unit of work that survives a crash. The order of an epoch's batches and every
random number drawn in it are functions of ``(seed, epoch)`` alone, so a run that was killed and
started again from its last checkpoint takes the same steps as one that was left alone. A stage
whose pass over the data is long (the LM) declares an epoch to be a number of steps instead.

    work_dir/checkpoints/last.ckpt    after every epoch: weights, optimiser, schedule, stopping state
    work_dir/checkpoints/best.ckpt    the epoch with the best monitored figure
    work_dir/metrics.csv              every logged figure
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import Strategy
from torch.utils.data import DataLoader, Sampler


@dataclass
class TrainerConfig:
    """How long and on what a stage is trained.

    Attributes:
        max_epochs: epochs at the most.
        patience: epochs without a better monitored figure before stopping; None trains to the end.
        accelerator: Lightning's name; ``auto`` takes the GPU where there is one.
        precision: Lightning's name, or ``auto``: bf16 autocast on a GPU, plain fp32 on a CPU.
        gradient_clip: largest norm of the gradient; None does not clip.
        accumulate: batches whose gradients are added before a step.
        devices: number of devices; more than one trains with Lightning's DDP.
        progress_bar: show one.
    """

    max_epochs: int = 10
    patience: int | None = 2
    accelerator: str = "auto"
    precision: str = "auto"
    gradient_clip: float | None = 1.0
    accumulate: int = 1
    devices: int = 1
    progress_bar: bool = True


@dataclass(frozen=True)
class FitResult:
    """What a fit did.

    Attributes:
        epochs: epochs trained, earlier attempts included.
        steps: optimiser steps, likewise.
        best_epoch: zero-based epoch whose weights the module now holds.
        best_score: its monitored figure; None without a monitor.
        checkpoint: of that epoch, as the strategy wrote it.
        history: monitored figure of every epoch.
    """

    epochs: int
    steps: int
    best_epoch: int
    best_score: float | None
    checkpoint: Path = field(compare=False)
    history: list[float] = field(default_factory=list)


class EpochSampler(Sampler[int]):
    """A shuffle that is a pure function of ``(seed, epoch)``.

    Lightning calls :meth:`set_epoch` at the start of every epoch, after a resume too.

    Args:
        data: what is sampled from, or its length.
        seed: seed of the shuffle.
        per_epoch: samples in one epoch; None is one pass over the data. With fewer, successive epochs
            walk through successive parts of one shuffled pass, then of the next.
    """

    def __init__(self, data: Sized | int, *, seed: int, per_epoch: int | None = None) -> None:
        self.length = data if isinstance(data, int) else len(data)
        if self.length < 1:
            raise ValueError("nothing to sample from: the training set is empty")
        self.seed, self.epoch = seed, 0
        self.per_epoch = self.length if per_epoch is None else per_epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.per_epoch

    def __iter__(self) -> Iterator[int]:
        position, left = self.epoch * self.per_epoch, self.per_epoch
        while left:
            lap, offset = divmod(position, self.length)
            taken = self._lap(lap)[offset : offset + left]
            yield from taken
            position, left = position + len(taken), left - len(taken)

    def _lap(self, lap: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + lap)
        return torch.randperm(self.length, generator=generator).tolist()


class _SeededBatches(Callback):
    """Seeds torch from (seed, epoch, batch), so that no random state has to survive a crash.

    Not once an epoch: a loader draws from torch's generator when it is made, which a resumed run does
    at another moment.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        torch.manual_seed((self.seed * 1_000_003 + trainer.current_epoch) * 1_000_003 + batch_idx)


class _History(Callback):
    """The monitored figure of every epoch, kept in the checkpoint."""

    def __init__(self, monitor: str | None) -> None:
        self.monitor, self.values = monitor, []  # type: ignore[var-annotated]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is not None and not trainer.sanity_checking:
            self.values.append(float(trainer.callback_metrics[self.monitor]))

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = list(state_dict["values"])


class _StopOnNaN(Callback):
    """A loss that is no number ends the fit before it reaches the weights of a checkpoint."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        if loss is not None and not torch.isfinite(loss).all():
            raise FloatingPointError(
                f"the loss is {float(loss)} at epoch {trainer.current_epoch}, batch {batch_idx}; the last "
                f"checkpoint is of the epoch before. Lower the learning rate or look at that batch."
            )


def fit(
    module: L.LightningModule,
    train_loader: DataLoader,
    val_loader: DataLoader | None,
    cfg: TrainerConfig,
    *,
    work_dir: Path,
    seed: int,
    monitor: str | None = None,
    mode: Literal["min", "max"] = "min",
    callbacks: tuple[Callback, ...] = (),
    strategy: Strategy | None = None,
) -> FitResult:
    """Train, resuming from ``work_dir`` where an earlier attempt left a checkpoint.

    Args:
        module: trained in place; ends with the best epoch's weights (the last epoch's without a monitor).
        train_loader: its order must be a function of the epoch (see :class:`EpochSampler`).
        val_loader: evaluated after every epoch; None for stages without a selection span.
        cfg: epochs, precision, devices.
        work_dir: checkpoints and logs of this very configuration; made if missing.
        seed: seeds every batch.
        monitor: logged figure that early stopping and the choice of the best epoch look at.
        mode: whether a smaller or a larger monitored figure is better.
        callbacks: further Lightning callbacks.
        strategy: of a fit by the processes that ``torchrun`` started, whose loaders share the rows themselves. Such a
            module is left as the last epoch left it, the best epoch's weights in ``FitResult.checkpoint``.

    Returns:
        Epochs, steps and the monitored figure's history.

    Raises:
        FloatingPointError: the loss became NaN or infinite.
    """
    checkpoints = work_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    best = ModelCheckpoint(
        dirpath=checkpoints, filename="best", monitor=monitor, mode=mode, save_last=True, save_top_k=1,
        enable_version_counter=False, save_on_train_epoch_end=True,
    )  # fmt: skip
    history = _History(monitor)
    used: list[Callback] = [best, history, _SeededBatches(seed), _StopOnNaN(), *callbacks]
    if monitor is not None and cfg.patience is not None:
        used.append(EarlyStopping(monitor=monitor, mode=mode, patience=cfg.patience, check_on_train_epoch_end=True))
    if cfg.progress_bar:
        used.append(TQDMProgressBar(refresh_rate=10, leave=False))
    trainer = L.Trainer(
        max_epochs=cfg.max_epochs,
        accelerator=cfg.accelerator,
        devices=cfg.devices if strategy is None else int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        strategy="auto" if strategy is None else strategy,
        precision=resolve_precision(cfg),  # type: ignore[arg-type]
        gradient_clip_val=cfg.gradient_clip,
        accumulate_grad_batches=cfg.accumulate,
        callbacks=used,
        logger=CSVLogger(work_dir, name="", version=""),
        enable_progress_bar=cfg.progress_bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        deterministic="warn",
        use_distributed_sampler=cfg.devices > 1 and strategy is None,
    )
    torch.manual_seed(seed)
    last = checkpoints / "last.ckpt"
    trainer.fit(module, train_loader, val_loader, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    chosen = Path(best.best_model_path) if best.best_model_path else last
    if strategy is None:
        state = torch.load(chosen, map_location="cpu", weights_only=True)
        module.load_state_dict(state["state_dict"], strict=module.strict_loading)
    else:
        state = strategy.load_checkpoint(chosen, weights_only=True)
    module.eval()
    return FitResult(
        epochs=trainer.current_epoch,
        steps=trainer.global_step,
        best_epoch=int(state["epoch"]),
        best_score=None if best.best_model_score is None else float(best.best_model_score),
        checkpoint=chosen,
        history=history.values,
    )


def resolve_precision(cfg: TrainerConfig) -> str:
    """Lightning's precision name for ``cfg.precision``; ``auto`` autocasts to bf16 on a GPU alone."""
    if cfg.precision != "auto":
        return cfg.precision
    on_gpu = cfg.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu else "32-true"


def default_workers() -> int:
    """Loader processes worth starting: none on two cores, where they take time from the model."""
    return 0 if (os.cpu_count() or 1) <= 4 else 2
