"""Rows on disk come back as they were, each once an epoch, in an order that seed and epoch decide."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

import ranking.stored as stored
from data.errors import UserError
from ranking.rows import Bags, Design
from ranking.stored import AheadLoader, BlockShuffle, StoredRows, batch_of, share, write_rows


def design_of(rows: int, seed: int = 0) -> Design:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 4, 9)
    shared = Bags(
        rng.integers(0, 99, lengths.sum()), np.concatenate([[0], np.cumsum(lengths)]), rng.integers(0, 9, rows)
    )
    return Design(
        dense_NF=rng.normal(size=(rows, 3)).astype(np.float32),
        bags={"ad": Bags.single(np.where(np.arange(rows) % 7, np.arange(rows), -1)), "history": shared},
        label_NT=(np.arange(rows) % 5 == 0).astype(np.float32)[:, None],
        weight_N=np.arange(1, rows + 1).astype(np.float32),
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "BLOCK_ROWS", 16)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    design = design_of(75)
    write_rows([design], tmp_path / "rows")
    assert StoredRows(tmp_path / "rows").block_sizes == [16, 16, 16, 16, 11]
    loader = AheadLoader(StoredRows(tmp_path / "rows"), BlockShuffle([16, 16, 16, 16, 11], 10, seed=0, window=2))
    seen = []
    for batch in loader:
        row_B = batch.weight_B.numpy().astype(np.int64) - 1  # the weight is the row's number plus one
        expected = batch_of(design, row_B)
        np.testing.assert_array_equal(batch.dense_BN, expected.dense_BN)
        np.testing.assert_array_equal(batch.label_BT, expected.label_BT)
        for key in ("ad", "history"):
            assert batch.sparse[key].values().tolist() == expected.sparse[key].values().tolist()
            assert batch.sparse[key].lengths().tolist() == expected.sparse[key].lengths().tolist()
        seen += row_B.tolist()
    assert sorted(seen) == list(range(75))


def test_several_designs_make_one_file(tmp_path: Path) -> None:
    write_rows([design_of(32), design_of(20, seed=1)], tmp_path / "rows")
    assert len(StoredRows(tmp_path / "rows")) == 52
    with pytest.raises(ValueError, match="in blocks of 16"):
        write_rows([design_of(20), design_of(32)], tmp_path / "rows")


@pytest.mark.parametrize("sizes", [[16], [16, 3], [16] * 9, [16] * 8 + [1]])
@pytest.mark.parametrize("batch", [1, 5, 16, 100])
def test_an_epoch_has_as_many_batches_as_every_other(sizes: list[int], batch: int) -> None:
    order = BlockShuffle(sizes, batch, seed=3, window=4)
    for epoch in range(5):
        order.set_epoch(epoch)
        asked = list(order)
        assert sum(len(window.batches) for window in asked) == order.n_batches
        rows = [(blocks, row) for blocks, batches in asked for row_B in batches for row in row_B.tolist()]
        assert len(set(rows)) == len(rows) == sum(sizes)
        assert all(len(row_B) <= batch for window in asked for row_B in window.batches)
        assert all(len(window.blocks) <= 4 for window in asked)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list:
        shuffle = BlockShuffle([16] * 9, 8, seed=seed, window=4)
        shuffle.set_epoch(epoch)
        return [(blocks, [row_B.tolist() for row_B in batches]) for blocks, batches in shuffle]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("rows", [1, 2, 7, 12])
def test_processes_share_a_batch_and_none_comes_off_empty(
    monkeypatch: pytest.MonkeyPatch, world: int, rows: int
) -> None:
    parts = []
    for rank in range(world):
        monkeypatch.setattr(stored, "rank_of_world", lambda rank=rank: (rank, world))
        parts.append(share(np.arange(rows)))
    assert all(len(part) for part in parts)
    assert sorted(set(np.concatenate(parts).tolist())) == list(range(rows))
    if rows >= world:
        assert sum(len(part) for part in parts) == rows


def test_an_epoch_that_is_left_early_leaves_no_thread(tmp_path: Path) -> None:
    write_rows([design_of(400)], tmp_path / "rows")
    before = threading.active_count()
    rows = StoredRows(tmp_path / "rows")
    batches = iter(AheadLoader(rows, BlockShuffle(rows.block_sizes, 4, seed=0)))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert threading.active_count() == before


def test_an_error_of_the_thread_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows([design_of(40)], tmp_path / "rows")
    rows = StoredRows(tmp_path / "rows")
    monkeypatch.setattr(StoredRows, "__getitem__", lambda rows, window: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(AheadLoader(rows, BlockShuffle(rows.block_sizes, 4, seed=0)))


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_damaged_file_is_an_error_that_says_so(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rows"
    write_rows([design_of(40)], path)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 100])
    with pytest.raises(UserError, match="training rows as the ranker stage stored them"):
        StoredRows(path)


@pytest.mark.parametrize("changes", [{"block_sizes": []}, {"block_sizes": [0]}, {"batch_size": 0}, {"window": 0}])
def test_impossible_orders_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="expected positive sizes"):
        BlockShuffle(**({"block_sizes": [4], "batch_size": 2, "seed": 0, "window": 1} | changes))


def test_nothing_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected rows"):
        write_rows([], tmp_path / "rows")
