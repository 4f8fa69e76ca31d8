"""The one fit: a resumed run equals an undisturbed one, and a bad loss never reaches a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from data.errors import UserError
from models.training import EpochSampler, FitResult, TokenBatchSampler, TrainerConfig, fit, starting_helpers

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(64, 4, generator=GENERATOR)
Y = X.sum(1, keepdim=True)


class Noisy(L.LightningModule):
    """A regression with dropout, so that a lost random state would show."""

    def __init__(self, *, dies_in: int | None = None, nan_in: int | None = None, infinite: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer, self.dropout = nn.Linear(4, 1), nn.Dropout(0.3)
        self.dies_in, self.nan_in, self.infinite = dies_in, nan_in, infinite
        self.losses: dict[tuple[int, int], float] = {}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.current_epoch == self.dies_in and batch_idx == 2:
            raise RuntimeError("killed")
        loss = (self.layer(self.dropout(batch[0])) - batch[1]).square().mean()
        self.losses[self.current_epoch, batch_idx] = float(loss.detach())
        if self.current_epoch != self.nan_in:
            return loss
        # The root of zero is zero, and its slope infinite.
        return (loss * 0).sqrt() if self.infinite else loss * torch.nan

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", (self.layer(batch[0]) - batch[1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.05)


def run(module: Noisy, directory: Path, *, monitor: str | None = "val", **changes: object) -> FitResult:
    cfg = TrainerConfig(**({"max_epochs": 5, "progress_bar": False} | changes))  # type: ignore[arg-type]
    data = TensorDataset(X, Y)
    loader: DataLoader = DataLoader(data, 8, sampler=EpochSampler(data, seed=1, per_epoch=40))
    val = None if monitor is None else DataLoader(data, 64)
    return fit(
        module, loader, val, cfg, work_dir=directory, seed=1, monitor=monitor,
        describe=lambda batch: f"a batch of {len(batch[0])}",
    )  # fmt: skip


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
    for _ in range(2):  # started again, it stays stopped
        again = Noisy()
        assert run(again, tmp_path, max_epochs=60, patience=2) == result
        assert not again.losses
        torch.testing.assert_close(again.layer.weight, module.layer.weight, atol=0, rtol=0)


def test_epochs_without_a_gain_are_not_trained_again(tmp_path: Path) -> None:
    expected = run(Noisy(), tmp_path / "whole", max_epochs=60, patience=4)
    with pytest.raises(RuntimeError, match="killed"):
        run(Noisy(dies_in=expected.epochs - 1), tmp_path / "killed", max_epochs=60, patience=4)
    resumed = Noisy()
    assert run(resumed, tmp_path / "killed", max_epochs=60, patience=4) == expected
    assert {epoch for epoch, _ in resumed.losses} == {expected.epochs - 1}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_fit_killed_within_an_epoch_goes_on_with_the_next_batch(tmp_path: Path, every: int, accumulate: int) -> None:
    whole, killed, resumed = Noisy(), Noisy(dies_in=3), Noisy()
    changes: dict[str, Any] = {"checkpoint_every": every, "accumulate": accumulate, "max_epochs": 5}
    expected = run(whole, tmp_path / "whole", **changes)
    with pytest.raises(RuntimeError, match="killed"):
        run(killed, tmp_path / "killed", **changes)
    result = run(resumed, tmp_path / "killed", **changes)
    assert result == expected
    # Five batches an epoch, killed in the third of epoch 3: no step before the newest checkpoint is taken again.
    steps_an_epoch = -(-5 // accumulate)
    within = [n for n in range(1, 2 // accumulate + 1) if (3 * steps_an_epoch + n) % every == 0]
    first = max(within, default=0) * accumulate
    assert list(resumed.losses) == [key for key in whole.losses if key >= (3, first)]
    assert killed.losses | resumed.losses == whole.losses
    logged = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert logged[0] == logged[1]
    assert len(logged[0].splitlines()) == 5
    torch.testing.assert_close(resumed.layer.weight, whole.layer.weight, atol=0, rtol=0)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_no_number_stops_with_the_last_good_checkpoint(tmp_path: Path, what: str) -> None:
    module = Noisy(nan_in=2, infinite=what == "gradient")
    with pytest.raises(FloatingPointError, match=rf"{what}.* is (nan|inf) at epoch 2, batch 0 \(a batch of 8\)"):
        run(module, tmp_path)
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["epoch"] == 1
    for name, value in state["state_dict"].items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(module.state_dict()[name], value, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_epochs", 0),
        ("accumulate", 0),
        ("devices", 0),
        ("checkpoint_every", 0),
        ("accelerator", "fast"),
        ("precision", "fp16"),
    ],
)
def test_what_no_training_can_have_is_told(name: str, value: object) -> None:
    with pytest.raises(UserError, match=f"trainer.{name}={value}"):
        TrainerConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(?s)accelerator=gpu where torch sees no CUDA device.*trainer=cpu"):
        run(Noisy(), tmp_path, accelerator="gpu")


def test_checkpoints_within_an_epoch_need_one_device_or_a_sampler_that_shares(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.checkpoint_every=2 with trainer\.devices=2"):
        run(Noisy(), tmp_path, devices=2, checkpoint_every=2)


def test_several_devices_are_refused_where_a_command_does_more_than_train_one_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match=r"(?s)devices=2 in a command.*train\.py stage=prior"):
        run(Noisy(), tmp_path, devices=2)


def test_fewer_batches_than_devices_are_told(tmp_path: Path) -> None:
    loader: DataLoader = DataLoader(LENGTHS, batch_sampler=TokenBatchSampler(LENGTHS, budget=30_000, seed=0))  # type: ignore[arg-type]
    with starting_helpers(), pytest.raises(UserError, match=r"trainer\.devices=2 for 1 batches an epoch"):
        fit(Noisy(), loader, None, TrainerConfig(devices=2), work_dir=tmp_path, seed=0)


@pytest.mark.parametrize(("devices", "accumulate", "steps"), [(1, 1, 30), (2, 1, 15), (2, 2, 9), (4, 1, 6), (20, 1, 3)])
def test_steps_are_of_all_devices_together(devices: int, accumulate: int, steps: int) -> None:
    assert TrainerConfig(max_epochs=3, devices=devices, accumulate=accumulate).steps(10) == steps


LENGTHS = torch.randint(3, 40, (500,), generator=GENERATOR).tolist()


def batches_of(sampler: TokenBatchSampler, epochs: int) -> list[list[list[int]]]:
    found = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def test_batches_keep_the_budget_and_waste_little_of_it() -> None:
    sampler = TokenBatchSampler(LENGTHS, budget=200, seed=3)
    [epoch] = batches_of(sampler, 1)
    padded = [len(batch) * max(LENGTHS[row] for row in batch) for batch in epoch]
    assert max(padded) <= 200
    assert sum(padded) < 1.05 * sum(LENGTHS)
    assert sorted(row for batch in epoch for row in batch) == list(range(500))
    assert sampler.mean_batch == pytest.approx(500 / len(epoch))


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    parts = batches_of(TokenBatchSampler(LENGTHS, budget=200, seed=3, parts=4), 6)
    again = TokenBatchSampler(LENGTHS, budget=200, seed=3, parts=4)
    again.set_epoch(5)
    assert list(again) == parts[5]
    assert batches_of(TokenBatchSampler(LENGTHS, budget=200, seed=4, parts=4), 1)[0] != parts[0]
    assert {len(part) for part in parts} == {len(again)}
    in_first_pass = [row for part in parts[:4] for batch in part for row in batch]
    assert len(set(in_first_pass)) == len(in_first_pass)
    assert len(in_first_pass) > 480


def test_devices_share_the_batches_of_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = batches_of(TokenBatchSampler(LENGTHS, budget=200, seed=3, parts=2), 1)[0]
    shares = []
    for rank in range(3):
        monkeypatch.setattr("models.training.rank_of_world", lambda rank=rank: (rank, 3))
        sampler = TokenBatchSampler(LENGTHS, budget=200, seed=3, parts=2)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == len(whole) // 3
    assert [batch for together in zip(*shares, strict=True) for batch in together] == whole[: len(whole) // 3 * 3]


@pytest.mark.parametrize(("lengths", "match"), [([], "empty"), ([3, 201], "201 tokens does not fit")])
def test_what_cannot_be_batched_is_told(lengths: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TokenBatchSampler(lengths, budget=200, seed=0)


def test_any_seed_is_one(tmp_path: Path) -> None:
    data, seed = TensorDataset(X, Y), 2**62
    loader: DataLoader = DataLoader(data, 8, sampler=EpochSampler(data, seed=seed))
    cfg = TrainerConfig(max_epochs=1, progress_bar=False)
    assert fit(Noisy(), loader, None, cfg, work_dir=tmp_path, seed=seed).steps == 8


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
