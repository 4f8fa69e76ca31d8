"""Training rows on disk: a Parquet file that is read in blocks, shuffled, and cut into batches in bounded memory.

    Design ─► rows.parquet (row groups = blocks)        a column a dense feature, a list a sparse one
                   │
    BlockShuffle ──┤ blocks in random order, some at a time (a window); the rows of a window in random order
                   ▼
    StoredRows[window, rows] ─► RankerBatch             all by Arrow and NumPy, no Python a row

Two windows at the most are in memory, however many rows there are: the one that is trained on, and the next. What
fits into one window is shuffled as a whole. Batches are functions of ``(seed, epoch)``; where several processes train
together, each takes every so many-th row of the same batches.

Shapes: N rows, W rows of a window, B rows of a batch, F dense features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from data.errors import UserError
from models.pointwise import RankerBatch
from models.training import rank_of_world
from ranking.rows import Bags, Design

BLOCK_ROWS, WINDOW_BLOCKS = 4096, 16
_AHEAD = 4
"""Batches that are made before they are asked for."""
_DENSE, _SPARSE, _LABEL, _WEIGHT = "dense.", "sparse.", "label", "weight"


class Rows(NamedTuple):
    """Rows of one window, as `BlockShuffle` asks for them and `StoredRows` answers.

    Attributes:
        blocks: of the window, in the order in which they are put together.
        row_B: rows of the window.
    """

    blocks: tuple[int, ...]
    row_B: NDArray[np.int64]


def write_rows(designs: Iterable[Design], path: Path) -> None:
    """Stores rows for training, a design at a time.

    Args:
        designs: of the same features, one after the other; all but the last of whole blocks (`BLOCK_ROWS`).
        path: of the Parquet file; an old one is replaced once the new one is whole.

    Raises:
        ValueError: no rows, or a design ends within a block.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    writer: pq.ParquetWriter | None = None
    whole = True
    for design in designs:
        if not whole or not len(design):
            raise ValueError(f"{len(design)} rows after a cut block; expected rows, in blocks of {BLOCK_ROWS}")
        whole = len(design) % BLOCK_ROWS == 0
        for start in range(0, len(design), BLOCK_ROWS * WINDOW_BLOCKS):
            rows = np.arange(start, min(start + BLOCK_ROWS * WINDOW_BLOCKS, len(design)))
            table = _table(design, rows)
            writer = writer or pq.ParquetWriter(
                unfinished, table.schema, compression="none", use_dictionary=False, write_statistics=False
            )
            writer.write_table(table, row_group_size=BLOCK_ROWS)
    if writer is None:
        raise ValueError("nothing to store; expected rows")
    writer.close()
    unfinished.rename(path)


def _table(design: Design, rows: NDArray[np.int64]) -> pa.Table:
    columns: dict[str, Any] = {f"{_DENSE}{n}": column for n, column in enumerate(design.dense_NF[rows].T)}
    for name, bags in design.bags.items():
        value, length_B = bags.of_rows(rows)
        ptr = np.concatenate([[0], np.cumsum(length_B)]).astype(np.int32)
        columns[f"{_SPARSE}{name}"] = pa.ListArray.from_arrays(pa.array(ptr), pa.array(value))
    return pa.table({**columns, _LABEL: design.label_N[rows], _WEIGHT: design.weight_N[rows]})


class StoredRows(Dataset[RankerBatch]):
    """The rows of a file, asked for by window.

    Args:
        path: of the file that `write_rows` wrote.

    Raises:
        UserError: there is no such file, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise UserError(
                f"{path} ({error})",
                expected="training rows as the ranker stage stored them",
                action="remove the file and train the ranker again",
            ) from error
        self._window: tuple[tuple[int, ...], Design] | None = None
        metadata = self._file.metadata
        self.block_sizes = [metadata.row_group(block).num_rows for block in range(metadata.num_row_groups)]

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def __getitem__(self, rows: Rows) -> RankerBatch:
        """The batch of some rows of a window; the window stays in memory until another one is asked for."""
        if self._window is None or self._window[0] != rows.blocks:
            self._window = None
            self._window = (rows.blocks, self._read(rows.blocks))
        return batch_of(self._window[1], rows.row_B)

    def _read(self, blocks: tuple[int, ...]) -> Design:
        table = self._file.read_row_groups(list(blocks), use_threads=False).combine_chunks()
        dense = [table[name].chunk(0).to_numpy() for name in table.column_names if name.startswith(_DENSE)]
        bags = {}
        for name in table.column_names:
            if name.startswith(_SPARSE):
                lists = table[name].chunk(0)
                ptr = lists.offsets.to_numpy().astype(np.int64)
                values = lists.values.to_numpy()
                bags[name.removeprefix(_SPARSE)] = Bags(values, ptr, np.arange(len(lists)))
        label, weight = (table[name].chunk(0).to_numpy() for name in (_LABEL, _WEIGHT))
        return Design(np.stack(dense, axis=1), bags, label, weight)


@dataclass
class BlockShuffle(Sampler[Rows]):
    """Batches in an order that is a function of ``(seed, epoch)``.

    Attributes:
        block_sizes: rows of each block.
        batch_size: rows of a batch, of all processes together.
        seed: of the order.
        window: blocks that are in memory at once.
    """

    block_sizes: Sequence[int]
    batch_size: int
    seed: int
    window: int = WINDOW_BLOCKS

    def __post_init__(self) -> None:
        if not self.block_sizes or min(self.block_sizes) < 1 or self.batch_size < 1 or self.window < 1:
            raise ValueError(f"{self}: expected positive sizes and at least one block")
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it at the start of every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(-(-rows // self.batch_size) for _, rows in self._windows(np.random.default_rng(0)))

    def __iter__(self) -> Iterator[Rows]:
        rng = np.random.default_rng((self.seed, self.epoch))
        for blocks, n_rows in self._windows(rng):
            row_W = rng.permutation(n_rows)
            for start in range(0, n_rows, self.batch_size):
                yield Rows(blocks, share(row_W[start : start + self.batch_size]))

    def _windows(self, rng: np.random.Generator) -> list[tuple[tuple[int, ...], int]]:
        """Blocks and number of rows of each window; the last block, which may be short, is always in the last one."""
        last = len(self.block_sizes) - 1
        order = np.append(rng.permutation(last), last)
        parts = [order[start : start + self.window] for start in range(0, len(order), self.window)]
        return [(tuple(part.tolist()), int(sum(self.block_sizes[block] for block in part))) for part in parts]


def share(row_B: NDArray[np.int64]) -> NDArray[np.int64]:
    """The rows of a batch that are this process's: every so many-th.

    One that comes off empty-handed repeats a row, for no process may stay behind the others.
    """
    rank, world = rank_of_world()
    mine = row_B[rank::world]
    return mine if len(mine) else row_B[:1]


class AheadLoader(DataLoader[RankerBatch]):
    """Batches of `StoredRows`, a few of them made by a thread while the model is busy.

    Args:
        rows: what to read.
        order: which, and when.
    """

    def __init__(self, rows: StoredRows, order: BlockShuffle) -> None:
        super().__init__(rows, sampler=order, batch_size=None)

    def __iter__(self) -> Iterator[RankerBatch]:  # type: ignore[override]
        batches: Queue[Any] = Queue(_AHEAD)
        stopped = Event()

        def work() -> None:
            try:
                for batch in super(AheadLoader, self).__iter__():
                    batches.put(batch)
                    if stopped.is_set():
                        return
                batches.put(None)
            except BaseException as error:  # told where the batch is asked for
                batches.put(error)

        thread = Thread(target=work, daemon=True)
        thread.start()
        try:
            while (batch := batches.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stopped.set()
            while thread.is_alive():  # it may wait for a free place
                while not batches.empty():
                    batches.get()
                thread.join(0.01)


def batch_of(design: Design, row_B: NDArray[np.int64]) -> RankerBatch:
    """The batch of some rows of a design, in that order."""
    values, lengths = zip(*(bags.of_rows(row_B) for bags in design.bags.values()), strict=True)
    return RankerBatch(
        dense_BN=torch.from_numpy(design.dense_NF[row_B]),
        sparse=KeyedJaggedTensor(
            keys=list(design.bags),
            values=torch.from_numpy(np.concatenate(values)),
            lengths=torch.from_numpy(np.concatenate(lengths)),
        ),
        label_B=torch.from_numpy(design.label_N[row_B]),
        weight_B=torch.from_numpy(design.weight_N[row_B]),
    )
