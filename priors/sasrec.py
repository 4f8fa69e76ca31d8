"""The SASRec baseline (`models.sasrec`) on the log: sequences, fit, and forecasts as of any period.

A user's sequence has every advertiser bought from, once a period, in order of time. Long ones are cut into windows that
overlap by half, so that each decision is made once and sees at least half a window of what came before it.

Shapes: B user-periods, A advertisers, S items of all sequences, N decisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from data.errors import UserError
from data.log import Log, Targets
from models.sasrec import SasRec, SasRecConfig, SasRecModule, SequenceBatch
from models.training import EpochSampler, FitResult, fit

_BATCH = 256


@dataclass(frozen=True)
class Sequences:
    """Advertisers of each user in order of time.

    Attributes:
        ptr: items of user u are ``ptr[u]:ptr[u + 1]``.
        advertiser_S, period_S: of each item.
    """

    ptr: NDArray[np.int64]
    advertiser_S: NDArray[np.int64]
    period_S: NDArray[np.int64]

    @classmethod
    def of(cls, log: Log) -> Sequences:
        """Purchases of a log, each advertiser once a user and period."""
        events = log.events
        rows = np.flatnonzero((events.advertiser >= 0) & log.is_purchase)
        key = np.stack([events.user[rows], events.period[rows], events.advertiser[rows]])
        rows = rows[np.sort(np.unique(key, axis=1, return_index=True)[1])]
        user = events.user[rows].astype(np.int64)
        return cls(
            np.searchsorted(user, np.arange(len(log.user_ids) + 1)),
            events.advertiser[rows].astype(np.int64),
            events.period[rows].astype(np.int64),
        )

    def before(self, user: int, period: int) -> int:
        """How many items a user has before a period."""
        rows = slice(self.ptr[user], self.ptr[user + 1])
        return int(np.searchsorted(self.period_S[rows], period))


@dataclass(frozen=True)
class Window:
    """A stretch of one user's sequence.

    Attributes:
        items: advertiser + 1.
        positions: of the decisions; 0 is the start, before the first item.
        targets: advertisers that follow each.
    """

    items: NDArray[np.int64]
    positions: list[int]
    targets: list[NDArray[np.int64]]


class WindowDataset(Dataset[Window]):
    """Windows that make every decision of some targets once.

    Args:
        sequences: of the log.
        targets: user-periods and what followed; each is a decision at the end of what came before its period.
        max_length: items of a window.
    """

    def __init__(self, sequences: Sequences, targets: Targets, max_length: int) -> None:
        self.sequences, self.targets, self.length = sequences, targets, max_length
        half = max(1, max_length // 2)
        windows: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for row, (user, period) in enumerate(zip(targets.user.tolist(), targets.period.tolist(), strict=True)):
            place = sequences.before(user, period)
            start = max(0, -(-(place - max_length) // half)) * half
            windows.setdefault((user, start), []).append((place - start, row))
        self._windows = list(windows.items())

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Window:
        (user, start), decisions = self._windows[index]
        begin = self.sequences.ptr[user] + start
        items = self.sequences.advertiser_S[begin : begin + max(place for place, _ in decisions)] + 1
        return Window(
            items, [place for place, _ in decisions], [self.targets.of(row).astype(np.int64) for _, row in decisions]
        )


def collate(windows: Sequence[Window]) -> SequenceBatch:
    """Windows as a batch, padded behind their ends."""
    length = 1 + max(len(window.items) for window in windows)
    item_BT = np.zeros((len(windows), length), dtype=np.int64)
    for row, window in enumerate(windows):
        item_BT[row, 1 : 1 + len(window.items)] = window.items
    decisions = [
        (row, place, wanted)
        for row, w in enumerate(windows)
        for place, wanted in zip(w.positions, w.targets, strict=True)
    ]
    sizes = np.array([len(wanted) for _, _, wanted in decisions])
    decision_Y = np.repeat(np.arange(len(decisions)), sizes)
    return SequenceBatch(
        item_BT=torch.from_numpy(item_BT),
        row_N=torch.tensor([row for row, _, _ in decisions]),
        position_N=torch.tensor([place for _, place, _ in decisions]),
        decision_Y=torch.from_numpy(decision_Y),
        advertiser_Y=torch.from_numpy(np.concatenate([wanted for _, _, wanted in decisions])),
        weight_Y=torch.from_numpy((1 / sizes)[decision_Y].astype(np.float32)),
    )


class SasRecForecast:
    """Forecasts of a fitted :class:`~models.sasrec.SasRec`.

    Args:
        model: the network.
        sequences: what it reads; items of a period or later are not looked at.
        max_length: items read at the most.
    """

    def __init__(self, model: SasRec, sequences: Sequences, max_length: int) -> None:
        self.model, self.sequences, self.length = model.eval(), sequences, max_length

    @torch.inference_mode()
    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        """Log-probabilities of all advertisers at the start of each period, ``(B, A)``."""
        device, found = self.model.bias.device, []
        for start in range(0, len(user_B), _BATCH):
            pairs = zip(user_B[start : start + _BATCH].tolist(), period_B[start : start + _BATCH].tolist(), strict=True)
            read = [self._read(user, period) for user, period in pairs]
            item_BT = np.zeros((len(read), 1 + max(map(len, read))), dtype=np.int64)
            for row, items in enumerate(read):
                item_BT[row, 1 : 1 + len(items)] = items
            hidden_BTH = self.model(torch.from_numpy(item_BT).to(device))
            hidden_BH = hidden_BTH[torch.arange(len(read)), torch.tensor([len(items) for items in read])]
            found.append(self.model.log_probs(hidden_BH).float().cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, len(self.model.bias)), np.float32)

    def _read(self, user: int, period: int) -> NDArray[np.int64]:
        begin, count = self.sequences.ptr[user], self.sequences.before(user, period)
        return self.sequences.advertiser_S[begin + max(0, count - self.length) : begin + count] + 1


def fit_sasrec(log: Log, cfg: SasRecConfig, *, seed: int, work_dir: Path) -> tuple[SasRecForecast, FitResult]:
    """Fit on the prior's fit span, stop on its selection span.

    Args:
        log: only purchases before a decision and conversions of the two spans are read.
        cfg: size and training.
        seed: of weights and order.
        work_dir: checkpoints; an interrupted fit goes on from there.

    Raises:
        UserError: one of the spans has no conversion.
    """
    sequences = Sequences.of(log)
    spans = {name: log.advertiser_targets(name) for name in ("prior_fit", "prior_select")}
    for name, targets in spans.items():
        if not len(targets):
            raise UserError(
                f"data.split.{name} without any conversion",
                expected="conversions that the baseline sasrec learns from",
                action=f"widen data.split.{name}, or leave sasrec out of prior.baselines.names",
            )
    train, select = (WindowDataset(sequences, targets, cfg.max_length) for targets in spans.values())
    count_A = np.bincount(spans["prior_fit"].item, minlength=len(log.advertiser_ids)) + 0.5
    torch.manual_seed(seed)
    model = SasRec(len(log.advertiser_ids), cfg, torch.from_numpy(np.log(count_A / count_A.sum())).float())
    module = SasRecModule(model.train(), learning_rate=cfg.learning_rate)
    loader: DataLoader = DataLoader(
        train, batch_size=cfg.batch_size, sampler=EpochSampler(train, seed=seed), collate_fn=collate
    )
    select_loader: DataLoader = DataLoader(select, batch_size=cfg.batch_size, collate_fn=collate)
    result = fit(module, loader, select_loader, cfg.trainer, work_dir=work_dir, seed=seed, monitor="select_nll")
    return SasRecForecast(module.model, sequences, cfg.max_length), result
