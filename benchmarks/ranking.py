"""How fast a ranker trains and answers, and how much memory its input takes.

    python -m benchmarks.ranking              everything
    python -m benchmarks.ranking 200000       rows of the training measurements; else 400,000
    python -m benchmarks.ranking processes 5  the ranker of two processes against that of one, with so many seeds

Made-up rows of the shapes of The Complete Journey's ranker: 60 numbers, nine sparse features, tables of up to 50,000
rows. Prints one JSON object a row. Rows with ``ratio`` compare two sides that take turns, a slice of batches each:

    end to end / bare step      batches from Parquet, shuffled and read ahead, against batches in memory
    DLRM / plain DLRM           TorchRec's modules against ``nn.EmbeddingBag`` and linear layers of the same shapes

The peak memory is that of one pass over 1M and 10M stored rows, each in a process of its own. Two processes and one
train the sharded DLRM on a simulated log; their figures of the validation span are paired by the seed, and ``ratio`` is
the largest difference over the standard deviation of the seeds of one process.

Shapes: N rows, B rows of a batch, N dense and F sparse features.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice, pairwise
from math import comb
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from benchmarks.measure import in_own_process, row, serve
from data.config import DataConfig
from data.log import load_log
from data.prepare import prepare
from models.dlrm import DLRM, DLRMConfig
from models.pointwise import PointwiseModule, RankerBatch, SparseTable, denormals_as_zero
from models.sharded import join_processes
from models.training import TrainerConfig, rank_of_world
from pipeline.config import compose
from pipeline.quiet import quiet_libraries
from ranking.config import SHARDED, RankerConfig
from ranking.features import FeatureBuilder
from ranking.metrics import Sample, evaluate
from ranking.ranker import ArmRows, RankerSpans, predict, train_ranker
from ranking.rows import Bags, Design
from ranking.stored import BLOCK_ROWS, AheadLoader, BlockShuffle, StoredRows, batch_of, write_rows
from semantic_ids.advertiser_ids import AdvertiserIds

N_DENSE, BATCH = 60, 512
TABLES = (
    SparseTable("user", 2_500, ("user",)),
    SparseTable("ad", 50_000, ("ad",)),
    SparseTable("advertiser", 3_400, ("advertiser", "history")),
    SparseTable("semantic_id", 7_000, ("semantic_id",)),
    *(SparseTable(name, 300, (name,)) for name in ("market", "display", "mailer", "category")),
)
BAG = {"history": 10, "semantic_id": 3}
SLICE = 100
"""Batches before the other side has its turn."""
TURNS = 5
CANDIDATES, REQUESTS = 1_000, 300
CHUNK = BLOCK_ROWS * 64


def main(rows: int) -> None:
    """Measure and print."""
    quiet_libraries()
    torch.manual_seed(0)
    with TemporaryDirectory() as directory:
        path = Path(directory) / "rows.parquet"
        write_rows(list(_designs(rows)), path)
        ready = list(islice(_batches(path), 2 * SLICE))
        ours = _step(_module(DLRM(TABLES, n_dense=N_DENSE, cfg=DLRMConfig())))
        end_to_end, bare = _take_turns((ours, _forever(path)), (ours, cycle(ready)))
    row("ranking: training end to end, from Parquet", end_to_end, "rows/s", ratio=end_to_end / bare)
    row("ranking: bare step on batches in memory", bare, "rows/s")
    plain = _step(_module(PlainDLRM(TABLES, n_dense=N_DENSE, cfg=DLRMConfig())))
    with_torchrec, without = _take_turns((ours, cycle(ready)), (plain, cycle(ready)))
    row("ranking: DLRM of TorchRec's modules", with_torchrec, "rows/s", ratio=with_torchrec / without)
    row("ranking: DLRM of nn.EmbeddingBag", without, "rows/s")
    _inference()
    peak = {}
    for millions in (1, 10):
        figures = in_own_process("benchmarks.ranking", "pass", str(millions * 1_000_000))
        peak[millions] = figures["gib"]
        row(f"ranking: reading {millions}M stored rows", millions * 1e6 / figures["reading"], "rows/s")
        row(f"ranking: peak memory over {millions}M rows", figures["gib"], "GiB")
    row("ranking: peak memory at 10M rows against 1M", peak[10], "GiB", ratio=peak[10] / peak[1])


def processes(seeds: int) -> None:
    """Train with one process and with two, and print how far apart they are."""
    with TemporaryDirectory() as directory:
        data = Path(directory) / "data"
        data.mkdir()
        prepare(_simulated(), data)
        one, two = (
            in_own_process("benchmarks.ranking", "train", f"{seeds}:{directory}", processes=number) for number in (1, 2)
        )
    for metric in ("auc", "log_loss"):
        first, second = (np.array([figures[f"{metric}-{seed}"] for seed in range(seeds)]) for figures in (one, two))
        apart, spread = float(np.abs(second - first).max()), float(first.std(ddof=1))
        row(f"ranking: {metric} by one process, mean of {seeds} seeds", first.mean(), metric)
        row(f"ranking: {metric} by two processes", second.mean(), metric)
        row(f"ranking: {metric}, standard deviation of the seeds", 1e6 * spread, "1e-6")
        row(f"ranking: {metric}, largest difference of a seed", 1e6 * apart, "1e-6", ratio=apart / spread)


def _simulated() -> DataConfig:
    return compose(["data=simulator", "data.simulator.users=2000"]).data


def _train(argument: str) -> dict[str, Any]:
    """Figures of each seed's ranker on the validation span, trained by all processes of the group."""
    seeds, directory = argument.split(":", 1)
    quiet_libraries()
    join_processes()
    log = load_log(Path(directory) / "data", _simulated(), evaluate="validation")
    number = np.arange(len(log.advertiser_ids))
    codes_AL = np.stack([number // 32, number % 32], axis=1)
    ids = AdvertiserIds(log.advertiser_ids, codes_AL, [np.zeros((size, 1), np.float32) for size in codes_AL.max(0) + 1])
    cfg = RankerConfig(strategy=SHARDED, trainer=TrainerConfig(max_epochs=3, patience=None, progress_bar=False))
    spans = RankerSpans.of(FeatureBuilder(log, ids, cfg.features), None)
    rows, shown = ArmRows.of(spans, None, cfg), spans.evaluation.rows
    figures: dict[str, Any] = {}
    sample = Sample.of(shown.label, shown.weight, shown.user, draws=1, seed=0)
    for seed in range(int(seeds)):
        place = Path(directory) / f"{rank_of_world()[1]}-processes" / str(seed)
        place.parent.mkdir(exist_ok=True)
        ranker = train_ranker(rows, seed=seed, cfg=cfg, directory=place)
        told = evaluate(sample, predict(ranker.module, rows.evaluation)[:, 0])
        figures |= {f"{metric}-{seed}": float(told[metric][0]) for metric in ("auc", "log_loss")}
    dist.destroy_process_group()
    return figures


class PlainDLRM(nn.Module):
    """The same network without TorchRec: an ``nn.EmbeddingBag`` a table, a Python loop over the features."""

    def __init__(self, tables: Sequence[SparseTable], *, n_dense: int, cfg: DLRMConfig) -> None:
        super().__init__()
        dim = cfg.embedding_dim
        self.bags = nn.ModuleDict({table.name: nn.EmbeddingBag(table.rows, dim, mode="mean") for table in tables})
        self.table_of = {feature: table.name for table in tables for feature in table.features}
        n_sparse = len(self.table_of)
        self.dense = _mlp([n_dense, *cfg.dense_layers, dim], last_relu=True)
        self.over = _mlp([dim + n_sparse + comb(n_sparse, 2), *cfg.over_layers, 1], last_relu=False)
        self.first, self.second = torch.triu_indices(n_sparse + 1, n_sparse + 1, offset=1)

    def forward(self, dense_BN: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        dense_BD = self.dense(dense_BN)
        parts = [dense_BD]
        for feature, table in self.table_of.items():
            bag = sparse[feature]
            parts.append(self.bags[table](bag.values(), bag.offsets()[:-1]))
        field_BFD = torch.stack(parts, 1)
        dots_BFF = field_BFD @ field_BFD.transpose(1, 2)
        found: Tensor = self.over(torch.cat([dense_BD, dots_BFF[:, self.first, self.second]], 1))
        return found


def _mlp(sizes: Sequence[int], *, last_relu: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*(layers if last_relu else layers[:-1]))


def _designs(rows: int) -> Iterator[Design]:
    """Made-up rows, some at a time."""
    sizes = {feature: table.rows for table in TABLES for feature in table.features}
    for start in range(0, rows, CHUNK):
        rng, n = np.random.default_rng(start), min(CHUNK, rows - start)
        bags = {}
        for feature, size in sizes.items():
            length = BAG.get(feature, 1)
            values = (size * rng.random(n * length) ** 3).astype(np.int64)  # a few ids are frequent
            bags[feature] = Bags(values, np.arange(n + 1) * length, np.arange(n))
        label = (rng.random((n, 1)) < 0.05).astype(np.float32)
        yield Design(rng.standard_normal((n, N_DENSE), np.float32), bags, label, np.ones(n, np.float32))


def _batches(path: Path, *, epoch: int = 0) -> Iterator[RankerBatch]:
    rows = StoredRows(path)
    order = BlockShuffle(rows.block_sizes, BATCH, seed=0)
    order.set_epoch(epoch)
    yield from AheadLoader(rows, order)


def _forever(path: Path) -> Iterator[RankerBatch]:
    epoch = 0
    while True:
        yield from _batches(path, epoch=epoch)
        epoch += 1


def _module(ranker: nn.Module) -> PointwiseModule:
    return PointwiseModule(ranker, learning_rate=2e-3, embedding_learning_rate=2e-4, weight_decay=0.01)


def _step(module: PointwiseModule) -> Callable[[RankerBatch], None]:
    optimizer = module.optimizer()

    def step(batch: RankerBatch) -> None:
        loss, weight = module._weighted_loss(batch)
        optimizer.zero_grad()
        (loss / weight).backward()
        optimizer.step()

    return step


@denormals_as_zero()
def _take_turns(*sides: tuple[Callable[[RankerBatch], None], Iterator[RankerBatch]]) -> list[float]:
    """Rows a second of each side; the first turn of each warms up."""
    seconds, done = [0.0] * len(sides), [0] * len(sides)
    for turn in range(TURNS + 1):
        for place, (step, source) in enumerate(sides):
            began = time.perf_counter()
            rows = 0
            for batch in islice(source, SLICE):
                step(batch)
                rows += len(batch.label_BT)
            if turn:
                seconds[place] += time.perf_counter() - began
                done[place] += rows
    return [rows / spent for rows, spent in zip(done, seconds, strict=True)]


def _inference() -> None:
    design = next(_designs(CANDIDATES))
    module = _module(DLRM(TABLES, n_dense=N_DENSE, cfg=DLRMConfig())).eval()
    milliseconds = []
    with torch.inference_mode():
        for _ in range(REQUESTS + 20):
            began = time.perf_counter()
            torch.sigmoid(module(batch_of(design, np.arange(CANDIDATES))))
            milliseconds.append(1e3 * (time.perf_counter() - began))
    for quantile in (50, 99):
        value = float(np.percentile(milliseconds[20:], quantile))
        row(f"ranking: {CANDIDATES:,} candidates, p{quantile}", value, "ms")


def _pass(argument: str) -> dict[str, Any]:
    """One pass over stored rows; the peak is that of this process when the rows have been written."""
    from pipeline.engine import PeakMemory

    with TemporaryDirectory() as directory:
        path = Path(directory) / "rows.parquet"
        write_rows(_designs(int(argument)), path)
        memory, began, rows = PeakMemory(), time.perf_counter(), 0
        for batch in _batches(path):
            rows += len(batch.label_BT)
        if rows != int(argument):
            raise RuntimeError(f"{rows} rows read of {argument}")
        return {"gib": memory.peak_mb() / 1024, "reading": time.perf_counter() - began}


if __name__ == "__main__":
    if sys.argv[1:2] == ["processes"]:
        processes(int(sys.argv[2]) if len(sys.argv) > 2 else 5)
    elif not serve({"pass": _pass, "train": _train}):
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 400_000)
