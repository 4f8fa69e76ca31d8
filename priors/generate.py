"""The batch job: forecasts of all panel users at every as-of period, one file an as-of, resumable.

A finished file is never made again, so a job that was killed goes on with the as-of it was at.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from data.log import Log
from priors.config import PriorConfig
from priors.decode import Decoded, TreeDecoder
from priors.fit import PriorModel
from priors.table import trie_version, write_shard


def as_of_periods(log: Log, every: int) -> list[int]:
    """Periods at whose start forecasts are made: from the ranker's first to the end of the evaluated span."""
    first, _ = log.split.span("ranker_fit", evaluate=log.evaluate)
    _, last = log.split.span(log.evaluate, evaluate=log.evaluate)
    return list(range(first, last + 1, every))


def generate_priors(prior: PriorModel, log: Log, cfg: PriorConfig, *, out_dir: Path, work_dir: Path) -> dict[str, Any]:
    """Decode the panel's forecasts into ``out_dir``.

    Args:
        prior: the fitted forecaster.
        log: the events; each forecast reads what lies before its as-of period.
        cfg: panel, schedule and beam.
        out_dir: an existing directory, for ``as_of=<period>.parquet``.
        work_dir: finished files of an interrupted job.

    Returns:
        Cost and coverage: forecasts, tokens and seconds each, users an hour, mean mass covered.
    """
    users = log.panel(cfg.panel, cfg.seed)
    shards = work_dir / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    decoder = TreeDecoder(prior.model, prior.base, prior.calibration, cfg.decode)
    version = trie_version(prior.base.trie)
    seconds, tokens, mass = 0.0, [], []
    with Progress(transient=True, disable=not cfg.trainer.progress_bar) as progress:
        for period in as_of_periods(log, cfg.decode.every):
            path = shards / f"as_of={period:04d}.parquet"
            if not path.exists():
                started = time.perf_counter()
                task = progress.add_task(f"forecasts as of period {period}", total=len(users))
                rows: list[Decoded] = [None] * len(users)  # type: ignore[list-item]
                prompts = [prior.compiler.compile(int(user), period).token_ids for user in users]
                # Prompts of like length share a batch, so that little of it is padding.
                by_length = np.argsort([len(prompt) for prompt in prompts], kind="stable")
                for start in range(0, len(users), cfg.decode.batch_size):
                    batch = by_length[start : start + cfg.decode.batch_size]
                    made = decoder.decode([prompts[i] for i in batch], users[batch], np.full(len(batch), period))
                    for index, one in zip(batch, made, strict=True):
                        rows[index] = one
                    progress.advance(task, len(batch))
                write_shard(path, log, users, period, rows, trie=version)
                seconds += time.perf_counter() - started
                tokens += [one.tokens for one in rows]
                mass += [one.mass for one in rows]
            shutil.copy2(path, out_dir / path.name)
    n_made = len(tokens)
    return {
        "users": len(users),
        "as_of_periods": len(as_of_periods(log, cfg.decode.every)),
        "forecasts_made": n_made,
        "tokens_per_forecast": float(np.mean(tokens)) if n_made else None,
        "seconds_per_forecast": seconds / n_made if n_made else None,
        "users_per_hour": 3600 * n_made / seconds if n_made else None,
        "mass_in_list": float(np.mean(mass)) if n_made else None,
    }
