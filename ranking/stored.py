"""Training rows on disk: a Parquet file that is read in blocks, shuffled, and cut into batches in bounded memory.

    Design ─► rows.parquet (row groups = blocks)        all dense features in one column, a list a sparse one
                   │
    BlockShuffle ──┤ blocks in random order, some at a time (a window); the rows of a window in random order
                   ▼
    StoredRows[window] ─► Design ─► RankerBatch         all by Arrow and NumPy, no Python a row

Two windows at the most are in memory, however many rows there are: the one that is trained on, and the next, which a
thread reads meanwhile. Batches are cut where they are asked for: a thread that did it would take the interpreter from
the model. What fits into one window is shuffled as a whole. Batches are functions of ``(seed, epoch)``; where several
processes train together, each takes every so many-th row of the same batches.

Shapes: N rows, W rows of a window, B rows of a batch, F numbers of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
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
_DENSE, _SPARSE, _LABEL, _WEIGHT = "dense", "sparse.", "label", "weight"


class Window(NamedTuple):
    """Blocks that are in memory together, as `BlockShuffle` asks for them, and the batches that are cut out of them.

    Attributes:
        blocks: in the order in which they are put together.
        batches: rows of the window, ``(B,)`` a batch.
    """

    blocks: tuple[int, ...]
    batches: list[NDArray[np.int64]]


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
    columns: dict[str, Any] = {_DENSE: _packed(design.dense_NF[rows])}
    for name, bags in design.bags.items():
        value, length_B = bags.of_rows(rows)
        ptr = np.concatenate([[0], np.cumsum(length_B)]).astype(np.int32)
        columns[f"{_SPARSE}{name}"] = pa.ListArray.from_arrays(pa.array(ptr), pa.array(value))
    return pa.table({**columns, _LABEL: _packed(design.label_NT[rows]), _WEIGHT: design.weight_N[rows]})


def _packed(number_NF: NDArray[np.float32]) -> pa.FixedSizeBinaryArray:
    """The numbers of a row as one value: a column a number takes three times as long to read."""
    n_rows, width = number_NF.shape
    buffers = [None, pa.py_buffer(np.ascontiguousarray(number_NF, np.float32))]
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(4 * width), n_rows, buffers)


def _unpacked(column: pa.FixedSizeBinaryArray) -> NDArray[np.float32]:
    """What `_packed` was given, ``(N, F)``."""
    width = column.type.byte_width // 4
    return np.frombuffer(column.buffers()[1], np.float32).reshape(-1, width)[column.offset :][: len(column)]


class StoredRows(Dataset[Design]):
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
        metadata = self._file.metadata
        self.block_sizes = [metadata.row_group(block).num_rows for block in range(metadata.num_row_groups)]

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def __getitem__(self, window: Window) -> Design:
        """The rows of a window, block after block."""
        table = self._file.read_row_groups(list(window.blocks), use_threads=False).combine_chunks()
        columns = {name: table[name].chunk(0) for name in table.column_names}
        bags = {}
        for name, lists in columns.items():
            if name.startswith(_SPARSE):
                ptr = lists.offsets.to_numpy().astype(np.int64)
                bags[name.removeprefix(_SPARSE)] = Bags(lists.values.to_numpy(), ptr, np.arange(len(lists)))
        dense_WF, label_WT = _unpacked(columns[_DENSE]), _unpacked(columns[_LABEL])
        return Design(dense_WF, bags, label_WT, columns[_WEIGHT].to_numpy())


@dataclass
class BlockShuffle(Sampler[Window]):
    """Windows and their batches in an order that is a function of ``(seed, epoch)``.

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

    @property
    def n_batches(self) -> int:
        """Batches of an epoch."""
        return sum(-(-rows // self.batch_size) for _, rows in self._windows(np.random.default_rng(0)))

    def __iter__(self) -> Iterator[Window]:
        rng = np.random.default_rng((self.seed, self.epoch))
        for blocks, n_rows in self._windows(rng):
            cuts = np.arange(self.batch_size, n_rows, self.batch_size)
            yield Window(blocks, [share(row_B) for row_B in np.split(rng.permutation(n_rows), cuts)])

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
    """Batches of `StoredRows`; the next window is read by a thread while the model is busy with this one.

    Args:
        rows: what to read.
        order: which, and when.
    """

    sampler: BlockShuffle

    def __init__(self, rows: StoredRows, order: BlockShuffle) -> None:
        super().__init__(rows, sampler=order, batch_size=None)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.sampler.n_batches

    def __iter__(self) -> Iterator[RankerBatch]:  # type: ignore[override]
        windows = iter(self.sampler)
        window: Window | None = next(windows)
        with ThreadPoolExecutor(max_workers=1) as thread:
            reading = thread.submit(self.dataset.__getitem__, window)
            while window is not None:
                design: Any = reading.result()
                following = next(windows, None)
                if following is not None:
                    reading = thread.submit(self.dataset.__getitem__, following)
                for row_B in window.batches:
                    yield batch_of(design, row_B)
                window, design = following, None  # its memory is the next one's


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
        label_BT=torch.from_numpy(design.label_NT[row_B]),
        weight_B=torch.from_numpy(design.weight_N[row_B]),
    )
