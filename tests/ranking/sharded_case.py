"""What `test_sharded` runs, alone in its own process and in two under ``torchrun``.

    torchrun --nproc-per-node 2 -m tests.ranking.sharded_case DIRECTORY

In ``DIRECTORY/both``: trains. In ``both_killed``: dies in the second epoch. In ``one_killed``: goes on. In
``both_<name>``: trains another of the `OTHERS`.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch.distributed as dist

from data.log import Log
from models.pointwise import PointwiseModule
from models.sharded import is_leader, join_processes
from ranking.config import RankerConfig
from ranking.features import FeatureBuilder
from ranking.ranker import ArmRows, RankerSpans, predict, train_ranker
from tests.logs import tiny_log
from tests.ranking.common import tastes, tiny_ids, tiny_ranker

CFG = tiny_ranker(strategy="torchrec", sharded_learning_rate=0.05, batch_size=128)
OTHERS = {
    "deepfm": replace(CFG, model="deepfm"),
    "mmoe": replace(CFG, model="dcn_v2", multi_task="mmoe", tasks=["label", "view_conversion"]),
}


def train(log: Log, directory: Path, cfg: RankerConfig = CFG, *, die_in_epoch: int | None = None) -> None:
    """Train; the first process leaves ``losses.json``, of every step, and ``probabilities.npy``.

    Args:
        log: the tiny log.
        directory: for all of it.
        cfg: of the ranker.
        die_in_epoch: raise KeyboardInterrupt at the end of this epoch, counted from 0.
    """
    losses: list[float] = []
    step, end = PointwiseModule.training_step, PointwiseModule.on_validation_epoch_end

    def kept(self: PointwiseModule, batch: object, batch_idx: int) -> object:
        loss = step(self, batch, batch_idx)  # type: ignore[arg-type]
        losses.append(float(self.trainer.strategy.reduce(loss.detach())))
        return loss

    def dying(self: PointwiseModule) -> None:
        if self.current_epoch == die_in_epoch:
            raise KeyboardInterrupt
        end(self)

    PointwiseModule.training_step, PointwiseModule.on_validation_epoch_end = kept, dying  # type: ignore[method-assign, assignment]
    try:
        spans = RankerSpans.of(FeatureBuilder(log, tiny_ids(log), cfg.features), None, tasks=cfg.tasks)
        rows = ArmRows.of(spans, tastes(log), cfg)
        ranker = train_ranker(rows, seed=0, cfg=cfg, directory=directory / "ranker")
    finally:
        PointwiseModule.training_step = step  # type: ignore[method-assign]
        PointwiseModule.on_validation_epoch_end = end  # type: ignore[method-assign]
    if is_leader():
        (directory / "losses.json").write_text(json.dumps(losses))
        np.save(directory / "probabilities", predict(ranker.module, rows.evaluation))


def main(directory: Path) -> None:
    """The part of two processes."""
    join_processes()
    with TemporaryDirectory() as tables:
        log = tiny_log(Path(tables))
        train(log, directory / "both")
        with suppress(KeyboardInterrupt, SystemExit):
            train(log, directory / "both_killed", die_in_epoch=1)
        train(log, directory / "one_killed")
        for name, cfg in OTHERS.items():
            train(log, directory / f"both_{name}", cfg)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
