"""The one fit: a resumed run equals an undisturbed one, and a bad loss never reaches a checkpoint."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from models.training import EpochSampler, FitResult, TrainerConfig, fit

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 4, generator=GENERATOR)
Y = X.sum(1, keepdim=True)


class Noisy(L.LightningModule):
    """A regression with dropout, so that a lost random state would show."""

    def __init__(self, *, dies_in: int | None = None, nan_in: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.dropout = nn.Linear(4, 1), nn.Dropout(0.3)
        self.dies_in, self.nan_in = dies_in, nan_in

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.current_epoch == self.dies_in and batch_idx == 2:
            raise RuntimeError("killed")
        loss = (self.layer(self.dropout(batch[0])) - batch[1]).square().mean()
        return loss * torch.nan if self.current_epoch == self.nan_in else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", (self.layer(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.05)


def run(module: Noisy, directory: Path, *, monitor: str | None = "val", **changes: object) -> FitResult:
    cfg = TrainerConfig(**({"max_epochs": 5, "progress_bar": False} | changes))  # type: ignore[arg-type]
    data = TensorDataset(X, Y)
    loader: DataLoader = DataLoader(data, 8, sampler=EpochSampler(data, seed=1, per_epoch=40))
    val = None if monitor is None else DataLoader(data, 64)
    return fit(module, loader, val, cfg, work_dir=directory, seed=1, monitor=monitor)


@pytest.mark.parametrize("monitor", ["val", None])
def test_a_killed_fit_ends_like_an_undisturbed_one(tmp_path: Path, monitor: str | None) -> None:
    whole, resumed = Noisy(), Noisy()
    expected = run(whole, tmp_path / "whole", monitor=monitor)
    with pytest.raises(RuntimeError, match="killed"):
        run(Noisy(dies_in=3), tmp_path / "killed", monitor=monitor)
    result = run(resumed, tmp_path / "killed", monitor=monitor)
    assert result == expected
    torch.testing.assert_close(resumed.layer.weight, whole.layer.weight, atol=0, rtol=0)


def test_a_finished_fit_started_again_changes_nothing(tmp_path: Path) -> None:
    first, second = Noisy(), Noisy()
    expected = run(first, tmp_path)
    assert run(second, tmp_path) == expected
    torch.testing.assert_close(second.layer.weight, first.layer.weight, atol=0, rtol=0)


def test_the_best_epoch_is_kept_and_patience_ends_the_fit(tmp_path: Path) -> None:
    module = Noisy()
    result = run(module, tmp_path, max_epochs=60, patience=2)
    assert result.epochs < 60
    assert result.best_score == min(result.history)
    assert result.best_epoch == result.history.index(min(result.history))
    assert float((module.layer(X) - Y).square().mean()) == pytest.approx(result.best_score, rel=1e-5)


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match=r"(?s)epoch 2, batch 0.*epoch before"):
        run(Noisy(nan_in=2), tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["epoch"] == 1
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())


def test_epochs_walk_through_whole_passes() -> None:
    sampler = EpochSampler(10, seed=5, per_epoch=4)
    seen = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        seen += list(sampler)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    sampler.set_epoch(3)
    assert list(sampler) == seen[12:16]


def test_nothing_to_sample_from_is_told() -> None:
    with pytest.raises(ValueError, match="empty"):
        EpochSampler(0, seed=0)
