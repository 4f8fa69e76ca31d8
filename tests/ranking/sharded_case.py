"""What `test_sharded` runs, alone in its own process and in two under ``torchrun``.

    torchrun --nproc-per-node 2 -m tests.ranking.sharded_case DIRECTORY

In ``DIRECTORY/both``: trains. In ``both_killed``: dies in the second epoch. In ``one_killed``: goes on.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch.distributed as dist

from models.pointwise import PointwiseModule
from models.sharded import is_leader, join_processes
from ranking.features import FeatureBuilder
from ranking.prior import GROUPS
from ranking.ranker import ArmRows, RankerSpans, train_ranker
from tests.logs import tiny_log
from tests.ranking.common import tastes, tiny_ids, tiny_ranker

CFG = tiny_ranker(strategy="torchrec", sharded_learning_rate=0.05, batch_size=128)


def train(spans: RankerSpans, directory: Path, *, die_in_epoch: int | None = None) -> None:
    """Train; the first process leaves ``losses.json``, of every step, and ``probabilities.npy``.

    Args:
        spans: of the tiny log.
        directory: for all of it.
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
        forecast = tastes(spans.log)
        ranker = train_ranker(ArmRows.of(spans, forecast, CFG), seed=0, cfg=CFG, directory=directory / "ranker")
    finally:
        PointwiseModule.training_step = step  # type: ignore[method-assign]
        PointwiseModule.on_validation_epoch_end = end  # type: ignore[method-assign]
    if is_leader():
        (directory / "losses.json").write_text(json.dumps(losses))
        np.save(directory / "probabilities", ranker.probabilities(spans.evaluation.with_prior(forecast, GROUPS)))


def main(directory: Path) -> None:
    """The part of two processes."""
    join_processes()
    with TemporaryDirectory() as tables:
        log = tiny_log(Path(tables))
        spans = RankerSpans.of(FeatureBuilder(log, tiny_ids(log), CFG.features), None)
    train(spans, directory / "both")
    with suppress(KeyboardInterrupt, SystemExit):
        train(spans, directory / "both_killed", die_in_epoch=1)
    train(spans, directory / "one_killed")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
