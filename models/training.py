"""One way to fit a LightningModule: checkpoints, early stopping, and a resume that changes no figure.

The order of an epoch's batches and every random number drawn in it are functions of ``(seed, epoch)``
alone, so a run that was killed and started again from its last checkpoint takes the same steps as one
that was left alone. A checkpoint is written after every epoch and, by ``checkpoint_every``, within:

    epoch 0                     epoch 1
    b0 b1 b2 b3 b4 b5 ─ select ─ b0 b1 b2 b3 … killed     a resume reads b0 b1 without training on them
             │        │              │                     and goes on with b2
    last.ckpt┴────────┴──────────────┘

    work_dir/checkpoints/last.ckpt    newest: weights, optimiser, schedule, stopping state, place in the epoch
    work_dir/checkpoints/best.ckpt    the epoch with the best monitored figure
    work_dir/metrics.jsonl            every logged figure, one object a step; a resume drops what it does again
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from data.errors import UserError
from data.rules import POSITIVE, at_least, broken

TRAINER_STATE = "trainer.pt"
"""Of a checkpoint that several processes wrote: all but the weights."""
_STARTS_HELPERS: ContextVar[bool] = ContextVar("starts_helpers", default=False)
_SEEDS = 1 << 63
"""So many seeds a torch generator takes."""
_WINDOW_BATCHES = 32
"""Batches whose samples are sorted by length together: enough that little is padding, few enough to stay mixed."""


ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
"""Lightning's names of what stages train on, and in. Weights that learn are float32; what is frozen has a dtype of its
own (``prior.base.dtype``)."""


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
        devices: number of devices; more than one trains with Lightning's DDP, which starts the command once more for
            each, so the command has to be one that trains one stage alone.
        checkpoint_every: steps between two checkpoints within an epoch; None writes one after each epoch alone.
        progress_bar: show one.
    """

    max_epochs: int = 10
    patience: int | None = 2
    accelerator: str = "auto"
    precision: str = "auto"
    gradient_clip: float | None = 1.0
    accumulate: int = 1
    devices: int = 1
    checkpoint_every: int | None = None
    progress_bar: bool = True

    def __post_init__(self) -> None:
        one = at_least(1)
        rules = {
            "max_epochs": one,
            "patience": at_least(0).or_null(),
            "gradient_clip": POSITIVE.or_null(),
            "accumulate": one,
            "devices": one,
            "checkpoint_every": one.or_null(),
        }
        errors = broken(self, "trainer", rules)
        for name, value, known in (
            ("accelerator", self.accelerator, ACCELERATORS),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                errors.append(
                    UserError(
                        f"trainer.{name}={value}",
                        expected=f"one of {', '.join(known)}",
                        action=f"set trainer.{name} to one of them, or leave it at auto",
                    )
                )
        if errors:
            raise UserError.collect(errors)

    @property
    def on_gpu(self) -> bool:
        """Whether a fit runs on a CUDA device here."""
        return self.accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()

    def steps(self, batches: int) -> int:
        """Optimiser steps of a fit whose epochs have so many batches, which the devices share."""
        return self.max_epochs * -(-max(1, batches // self.devices) // self.accumulate)


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
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + lap) % _SEEDS)
        return torch.randperm(self.length, generator=generator).tolist()


def token_budget(lengths: np.ndarray, batch_size: int) -> int:
    """Tokens of a batch of so many samples on average; enough for the longest sample."""
    return max(int(lengths.max()), round(batch_size * float(lengths.mean())))


class TokenBatchSampler(Sampler[list[int]]):
    """Batches of samples of like length, none above a budget of padded tokens; a function of ``(seed, epoch)``.

    A pass over the data is shuffled, then sorted by length within windows of some batches, cut, and its batches are
    shuffled again. Epochs walk through successive parts of a pass, then of the next, and all have the same number of
    batches, so a pass leaves out less than one batch an epoch.

    Args:
        lengths: tokens of each sample, ``(samples,)``.
        budget: the most tokens of a batch: its samples times the longest of them.
        seed: of the shuffles.
        parts: epochs that one pass is cut into.

    Raises:
        ValueError: no sample, or one longer than the budget.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, *, budget: int, seed: int, parts: int = 1) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self.lengths):
            raise ValueError("nothing to sample from: the training set is empty")
        if self.lengths.max() > budget:
            raise ValueError(f"a sample of {self.lengths.max()} tokens does not fit into a batch of {budget}")
        self.budget, self.seed, self.epoch = budget, seed, 0
        self._window = _WINDOW_BATCHES * max(1, budget // max(1, int(self.lengths.mean())))
        in_pass = len(self._lap(0))
        self.per_epoch = max(1, in_pass // parts)
        self.mean_batch = len(self.lengths) / in_pass
        """Samples of a batch, on average over a pass."""

    @property
    def sampler(self) -> TokenBatchSampler:
        """Itself: where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.per_epoch // rank_of_world()[1]

    def __iter__(self) -> Iterator[list[int]]:
        rank, world = rank_of_world()
        yield from self._batches()[rank : len(self) * world : world]

    def _batches(self) -> list[list[int]]:
        """All batches of the epoch, before they are shared among devices."""
        first, lap, start = self.epoch * self.per_epoch, 0, 0
        batches: list[list[int]] = []
        while len(batches) < self.per_epoch:
            of_lap = self._lap(lap)
            stop = start + len(of_lap)
            if stop > first:
                batches += of_lap[max(0, first - start) :][: self.per_epoch - len(batches)]
            lap, start = lap + 1, stop
        return batches

    def _lap(self, lap: int) -> list[list[int]]:
        rng = np.random.default_rng((self.seed, lap))
        order = rng.permutation(len(self.lengths))
        batches: list[list[int]] = []
        for start in range(0, len(order), self._window):
            rows = order[start : start + self._window]
            batch: list[int] = []
            for row in rows[np.argsort(self.lengths[rows], kind="stable")].tolist():
                if (len(batch) + 1) * self.lengths[row] > self.budget:
                    batches.append(batch)
                    batch = []
                batch.append(row)
            batches.append(batch)
        return [batches[index] for index in rng.permutation(len(batches))]


class _ResumableLoader:
    """A loader that Lightning can set to the middle of an epoch: what was trained on is read and let go.

    Args:
        loader: its order must be a function of the epoch.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader, self.sampler, self.batch_sampler = loader, loader.sampler, loader.batch_sampler
        self._skip = self._taken = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        self._taken, self._skip = self._skip, 0
        for batch in islice(self.loader, self._taken, None):
            self._taken += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"taken": self._taken % len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._skip = state["taken"]


class _CheckpointEvery(Callback):
    """Writes the newest checkpoint every so many optimiser steps."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Gradients that wait for a step are in no checkpoint; the end of an epoch has one of its own.
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch
        if stepped and trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.path)


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
        torch.manual_seed(((self.seed * 1_000_003 + trainer.current_epoch) * 1_000_003 + batch_idx) % _SEEDS)


class History(Callback):
    """A figure of every epoch's validation, kept in the checkpoint.

    Args:
        monitor: the logged figure; None keeps nothing.
    """

    def __init__(self, monitor: str | None) -> None:
        self.monitor, self.values = monitor, []  # type: ignore[var-annotated]

    @property
    def state_key(self) -> str:
        return f"History of {self.monitor}"

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is not None and not trainer.sanity_checking:
            self.values.append(float(trainer.callback_metrics[self.monitor]))

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.values = list(state_dict["values"])


class _Patience(EarlyStopping):
    """Early stopping that also holds for a fit that is started again after it had stopped."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.stopped_epoch:
            trainer.should_stop = True


class _StepLog(Logger):
    """Every logged figure, one JSON object a step; on disk at once, so that a kill leaves all but the last.

    Args:
        path: the file, appended to.
        steps: steps that the checkpoint knows of; lines of later ones are dropped, for they are done again.
    """

    name, version = "", ""

    def __init__(self, path: Path, steps: int) -> None:
        super().__init__()
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < steps]
        path.write_text("".join(kept))
        self.path = path

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration is in the manifest."""


class _StopOnNaN(Callback):
    """A loss or a gradient that is no number ends the fit before it changes a weight.

    Args:
        describe: says what a batch holds.
    """

    def __init__(self, describe: Callable[[Any], str] | None) -> None:
        self.describe, self.batch, self.index = describe, None, 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batch, self.index = batch, batch_idx

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if not torch.isfinite(loss).all():
            self._stop(trainer, f"the loss is {float(loss)}")

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.precision == "16-mixed":
            return  # its loss scaler meets infinite gradients by design, and leaves out those steps itself
        gradients = [
            p.grad.coalesce().values() if p.grad.is_sparse else p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not torch.isfinite(norm):
            self._stop(trainer, f"the gradient's norm is {float(norm)}")

    def _stop(self, trainer: L.Trainer, what: str) -> None:
        holds = "" if self.describe is None else f" ({self.describe(self.batch)})"
        raise FloatingPointError(
            f"{what} at epoch {trainer.current_epoch}, batch {self.index}{holds}; it changed no weight, and the "
            f"last checkpoint is from before it. Lower the learning rate or look at that batch."
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
    describe: Callable[[Any], str] | None = None,
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
        describe: says what a batch holds, for the error that names a bad one.
        strategy: of a fit by the processes that ``torchrun`` started, whose loaders share the rows themselves. Such a
            module is left as the last epoch left it, the best epoch's weights in ``FitResult.checkpoint``.

    Returns:
        Epochs, steps and the monitored figure's history.

    Raises:
        FloatingPointError: loss or gradient became NaN or infinite; the error names the batch.
        UserError: a GPU is asked for and there is none; checkpoints within an epoch on several devices, of a loader
            that is not shared by its own sampler; several devices in a command that does more than train one stage,
            or more of them than batches.
    """
    if cfg.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(
            f"trainer.accelerator={cfg.accelerator} where torch sees no CUDA device",
            expected="a device of that kind; `adsid doctor` tells what there is",
            action="set trainer.accelerator=auto or trainer=cpu, or install a CUDA build of torch",
        )
    shares_itself = isinstance(train_loader.batch_sampler, TokenBatchSampler)
    if cfg.checkpoint_every is not None and cfg.devices > 1 and not shares_itself:
        raise UserError(
            f"trainer.checkpoint_every={cfg.checkpoint_every} with trainer.devices={cfg.devices}",
            expected="one device, where Lightning shares the samples among devices",
            action="set trainer.checkpoint_every=null: this stage goes on from its last epoch",
        )
    if cfg.devices > 1 and strategy is None and "LOCAL_RANK" not in os.environ and not _STARTS_HELPERS.get():
        raise UserError(
            f"trainer.devices={cfg.devices} in a command that does more than train one stage",
            expected="one device; several train a stage by a command of its own, which each of them runs",
            action=f"train it first, e.g. python train.py stage=prior prior.trainer.devices={cfg.devices}, with the "
            "same overrides; this command then goes on after it",
        )
    sampler = train_loader.batch_sampler
    if isinstance(sampler, TokenBatchSampler) and sampler.per_epoch < cfg.devices:
        raise UserError(
            f"trainer.devices={cfg.devices} for {sampler.per_epoch} batches an epoch",
            expected="at least one batch for each device",
            action="lower trainer.devices, trainer.max_epochs or the size of a batch, or train on more samples",
        )
    checkpoints = work_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    checkpoint = partial(
        ModelCheckpoint, dirpath=checkpoints, enable_version_counter=False, save_on_train_epoch_end=True
    )
    best, newest = checkpoint(filename="best", monitor=monitor, mode=mode), checkpoint(filename="last")
    history = History(monitor)
    last = checkpoints / "last.ckpt"
    # The newest comes after the best, whose state it holds.
    kept: list[Callback] = [newest] if monitor is None else [best, newest]
    used: list[Callback] = [history, _SeededBatches(seed), _StopOnNaN(describe), *callbacks, *kept]
    if cfg.checkpoint_every is not None:
        used.append(_CheckpointEvery(last, cfg.checkpoint_every))
    if monitor is not None and cfg.patience is not None:
        used.append(_Patience(monitor=monitor, mode=mode, patience=cfg.patience, check_on_train_epoch_end=True))
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
        logger=_StepLog(work_dir / "metrics.jsonl", _steps_in(last)),
        enable_progress_bar=cfg.progress_bar,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        deterministic="warn",
        use_distributed_sampler=cfg.devices > 1 and strategy is None and not shares_itself,
    )
    torch.manual_seed(seed)
    as_it_is = strategy is not None or (cfg.devices > 1 and not shares_itself)
    resumable = train_loader if as_it_is else _ResumableLoader(train_loader)
    trainer.fit(module, resumable, val_loader, ckpt_path=str(last) if last.exists() else None, weights_only=True)
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
    return "bf16-mixed" if cfg.on_gpu else "32-true"


def _steps_in(checkpoint: Path) -> int:
    """Optimiser steps behind a checkpoint, a folder where processes share the weights; 0 where there is none."""
    if not checkpoint.exists():
        return 0
    if checkpoint.is_dir():
        checkpoint = checkpoint / TRAINER_STATE
    return int(torch.load(checkpoint, map_location="cpu", weights_only=True)["global_step"])


@contextmanager
def starting_helpers() -> Iterator[None]:
    """Within, a fit on several devices may run this process's command once more for each of the others."""
    token = _STARTS_HELPERS.set(True)
    try:
        yield
    finally:
        _STARTS_HELPERS.reset(token)


def wait_for_all() -> None:
    """Returns when every process that trains with this one has come here."""
    if rank_of_world()[1] > 1:
        torch.distributed.barrier()


def rank_of_world() -> tuple[int, int]:
    """Number of this process and of all that train together; 0 of 1 alone."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
