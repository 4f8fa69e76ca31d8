"""The batch job: forecasts of users at as-of times, shard by shard.

    users × as-of periods ─► shards ─► prompts, by length ─► decoder ─► period=<period>/<shard>.parquet
                                └──── nothing new since the last as-of: the row of then is carried over

A shard is written whole or not at all and names in its metadata what it was made of: forecaster, trie, decoding,
users, the events before its as-of time and the plan of campaigns up to it. So a job that was killed goes on with the
shards that are missing, cut short, or of something else, and ends with the same bytes. As-of periods come one after the
other, since a later one may carry rows over from an earlier one; the shards of one are independent, wherever they are
made.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from peft import PeftModel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.artifacts import fingerprint, to_plain
from data.log import Log
from models.block import last_layer
from models.prior_lm import PriorLM
from priors.artifact import PriorModel
from priors.config import PriorConfig
from priors.decode import Decoded, TreeDecoder
from priors.sources import Sources
from priors.table import frame_of, is_shard, read_frame, shard_files, trie_version, write_shard


@dataclass(frozen=True)
class Shard:
    """Some users at one as-of time.

    Attributes:
        period: its start is the as-of time.
        number: of the shard among those of the period.
        user_R: the users, rising.
    """

    period: int
    number: int
    user_R: NDArray[np.integer]

    @property
    def path(self) -> Path:
        """Where it lies in the table."""
        return Path(_folder(self.period)) / f"{self.number:05d}.parquet"


def _folder(period: int) -> str:
    """Of a period's shards."""
    return f"period={period:04d}"


@dataclass
class Cost:
    """What shards took.

    Attributes:
        decoded: forecasts made.
        carried: rows carried over.
        kept: shards that were there already.
        damaged: shards that were there but cut short, or of something else.
        tokens: tokens computed.
        seconds: making the shards, each in its own process.
        mass: probability covered by the lists, added up.
        certified: lists proven to be the best.
    """

    decoded: int = 0
    carried: int = 0
    kept: int = 0
    damaged: int = 0
    tokens: int = 0
    seconds: float = 0.0
    mass: float = 0.0
    certified: int = 0

    def add(self, other: Cost) -> None:
        """Add up."""
        for column in fields(self):
            setattr(self, column.name, getattr(self, column.name) + getattr(other, column.name))


@dataclass
class ShardMaker:
    """Makes shards.

    Attributes:
        prior: the fitted forecaster.
        log: the events; each forecast reads what lies before its as-of period.
        cfg: how they are decoded.
        incremental: carry over rows of users without an event since the table's last as-of before.
    """

    prior: PriorModel
    log: Log
    cfg: PriorConfig
    incremental: bool = False
    _versions: tuple[str, str] = field(init=False)
    _sources: Sources = field(init=False)
    _decoder: TreeDecoder | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._versions = trie_version(self.prior.base.trie), model_version(self.prior)
        self._sources = Sources(self.log, self.prior.base.anchor)

    @property
    def settings(self) -> dict[str, Any]:
        """What rows of one table have in common."""
        decode = {key: value for key, value in to_plain(self.cfg.decode).items() if key not in ("every", "shard_users")}
        return {"trie": self._versions[0], "model": self._versions[1], "decode": decode}

    def key(self, shard: Shard, directory: Path) -> str:
        """Fingerprint of what a shard is made of."""
        previous = self._previous(shard.period, directory) if self.incremental else None
        users = self.log.user_ids[shard.user_R].tolist()  # their numbers in the log change when users come in
        read = [self._sources.before(shard.period), self._sources.profiles(shard.user_R)]
        return fingerprint([self.settings, shard.period, users, read, previous])

    def make(self, shard: Shard, directory: Path, key: str) -> Cost:
        """Decode a shard and write it.

        Args:
            shard: which users, and when.
            directory: of the table.
            key: :meth:`key` of the shard.

        Returns:
            What it took.
        """
        started = time.perf_counter()
        carried = self._carried(shard, directory)
        user_R = shard.user_R
        if len(carried):
            user_R = user_R[~np.isin(self.log.user_ids[user_R], carried["user_id"].to_numpy())]
        decoded = list(self._decode(user_R, shard.period))
        trie, model = self._versions
        frame = frame_of(
            self.log, user_R, shard.period, decoded, trie=trie, model=model, interests=self._interest_names
        )
        if len(carried):
            order = pl.DataFrame(
                {"user_id": self.log.user_ids[shard.user_R]}, schema={"user_id": frame["user_id"].dtype}
            )
            frame = order.join(pl.concat([frame, carried.select(frame.columns)]), on="user_id", maintain_order="left")
        write_shard(directory / shard.path, frame, key=key)
        return Cost(
            decoded=len(decoded),
            carried=len(carried),
            tokens=sum(one.tokens for one in decoded),
            seconds=time.perf_counter() - started,
            mass=sum(one.mass for one in decoded),
            certified=sum(one.certified for one in decoded),
        )

    @property
    def _interest_names(self) -> tuple[str, ...]:
        return () if self.prior.interests is None else self.prior.interests.space.names

    def _decode(self, user_R: NDArray[np.integer], period: int) -> Sequence[Decoded]:
        cfg = self.cfg.decode
        if self._decoder is None:
            model = merged(self.prior.model) if cfg.merge_adapter else self.prior.model
            self._decoder = TreeDecoder(
                model, self.prior.base, self.prior.calibration, cfg, interests=self.prior.interests
            )
        prompts = [self.prior.compiler.compile(int(user), period) for user in user_R]
        self._decoder.reader.share(common_beginning([prompt.token_ids for prompt in prompts]))
        rows: list[Decoded] = [None] * len(prompts)  # type: ignore[list-item]
        # Prompts of like length share a batch, so that little of it is padding.
        by_length = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        for start in range(0, len(prompts), cfg.batch_size):
            batch = by_length[start : start + cfg.batch_size]
            made = self._decoder.decode([prompts[i] for i in batch], user_R[batch], np.full(len(batch), period))
            for index, one in zip(batch, made, strict=True):
                rows[index] = one
        return rows

    def _previous(self, period: int, directory: Path) -> int | None:
        """The table's last as-of before a period."""
        found = {int(file.parent.name.removeprefix("period=")) for file in shard_files(directory)}
        return max((one for one in found if one < period), default=None)

    def _carried(self, shard: Shard, directory: Path) -> pl.DataFrame:
        """Rows of the last as-of of users without an event since, as rows of this one."""
        previous = self._previous(shard.period, directory) if self.incremental else None
        if previous is None:
            return pl.DataFrame()
        events = self.log.events
        lately = (events.period >= previous) & (events.period < shard.period)
        quiet = np.setdiff1d(shard.user_R, events.user[lately])
        rows = read_frame(directory, _folder(previous))
        return rows.filter(pl.col("user_id").is_in(self.log.user_ids[quiet].tolist())).with_columns(
            pl.lit(shard.period, pl.Int32).alias("period"),
            pl.lit(self.log.calendar.start(shard.period), pl.Datetime("us")).alias("as_of"),
        )


Engine = Callable[[Sequence[tuple[Shard, str]], Path], Iterable[Cost]]
"""Makes shards with their keys in a directory, in any order, and tells the cost of each as it is done."""


def run_job(
    maker: ShardMaker,
    users: NDArray[np.integer],
    periods: Sequence[int],
    directory: Path,
    *,
    engine: Engine | None = None,
    progress_bar: bool = False,
) -> Cost:
    """Make all shards of a table that are not there yet; of each period asked for, others than these are removed.

    Args:
        maker: makes them.
        users: who is forecast, rising.
        periods: as-of periods.
        directory: of the table; made if missing.
        engine: where shards are made; None: here, one after the other.
        progress_bar: show one, with the time left.

    Returns:
        What was made now.

    Raises:
        UserError: the disk is full, or the directory cannot be written to.
    """
    cost, size = Cost(), maker.cfg.decode.shard_users
    parts = [users[start : start + size] for start in range(0, len(users), size)]
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, transient=True, disable=not progress_bar) as progress:
        task = progress.add_task("forecasts", total=len(users) * len(periods))
        for period in sorted(periods):
            missing = []
            shards = [Shard(period, number, part) for number, part in enumerate(parts)]
            for shard in shards:
                key, path = maker.key(shard, directory), directory / shard.path
                if is_shard(path, key=key):
                    cost.kept += 1
                    progress.advance(task, len(shard.user_R))
                else:
                    cost.damaged += path.exists()
                    missing.append((shard, key))
            for made in (engine or _here(maker))(missing, directory):
                cost.add(made)
                progress.advance(task, made.decoded + made.carried)
            asked_for = {directory / shard.path for shard in shards}
            for file in shard_files(directory, _folder(period)):
                if file not in asked_for:  # of another split, or of users who are no longer asked for
                    file.unlink()
    return cost


def _here(maker: ShardMaker) -> Engine:
    def engine(shards: Sequence[tuple[Shard, str]], directory: Path) -> Iterator[Cost]:
        for shard, key in shards:
            yield maker.make(shard, directory, key)

    return engine


def common_beginning(prompts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """What all prompts begin with, at least one token less than the shortest; nothing where one prompt is alone."""
    if len(prompts) < 2:
        return np.zeros(0, np.int64)
    length = min(len(prompt) for prompt in prompts) - 1
    stacked = np.stack([prompt[:length] for prompt in prompts])
    same = (stacked == stacked[0]).all(0)
    return prompts[0][: length if same.all() else int(np.argmin(same))]


def merged(model: PriorLM) -> PriorLM:
    """A copy whose LoRA weights are added into the base weights; a model without LoRA as it is."""
    if not isinstance(model.decoder, PeftModel):
        return model
    copied = copy.deepcopy(model)
    copied.decoder = copied.decoder.merge_and_unload()  # type: ignore[operator]
    return copied


def model_version(prior: PriorModel) -> str:
    """What tells one fitted forecaster from another: base model, prompts, anchor, calibration, trained weights."""
    model = prior.model
    trained = {
        name: value.float().cpu().numpy()
        for name, value in model.state_dict().items()
        if not name.startswith("decoder.") or "lora_" in name
    }
    # An appended layer and full fine-tuning change the decoder's own weights; its last layer tells.
    last = {name: value.float().cpu().numpy() for name, value in last_layer(model.decoder).state_dict().items()}
    trained |= {f"last.{name}": value for name, value in last.items() if "lora_" not in name}
    prompt = to_plain(prior.compiler.cfg)
    history = prior.compiler.history
    if history is not None:
        prompt["history_decays"], prompt["history_categories"] = list(history.decays), to_plain(history.categories)
    parts = [prior.base_reference, prompt, prior.base.to_plain(), to_plain(prior.calibration), trained]
    return fingerprint(parts if prior.interests is None else [*parts, prior.interests.to_plain()])


def as_of_periods(log: Log, every: int) -> list[int]:
    """Periods at whose start forecasts are made: from the ranker's first to the end of the evaluated span.

    The schedule begins anew with the evaluated span: where that is one period, it is judged by forecasts of its own.
    """
    first, _ = log.split.span("ranker_fit", evaluate=log.evaluate)
    evaluated, last = log.split.span(log.evaluate, evaluate=log.evaluate)
    return [*range(first, evaluated, every), *range(evaluated, last + 1, every)]


def generate_priors(prior: PriorModel, log: Log, cfg: PriorConfig, *, out_dir: Path, work_dir: Path) -> dict[str, Any]:
    """The forecasts of a run: of the panel, at every as-of period of its schedule, all decoded anew.

    Args:
        prior: the fitted forecaster.
        log: the events; each forecast reads what lies before its as-of period.
        cfg: panel, schedule and beam.
        out_dir: an existing directory, for ``period=<period>/<shard>.parquet``.
        work_dir: finished shards of an interrupted job.

    Returns:
        Cost and coverage: forecasts, mean mass covered; tokens and seconds each, of those that this attempt made, None
        where an earlier one had made all.
    """
    users, periods = log.panel(cfg.panel, cfg.seed), as_of_periods(log, cfg.decode.every)
    shards = work_dir / "shards"
    cost = run_job(ShardMaker(prior, log, cfg), users, periods, shards, progress_bar=cfg.trainer.progress_bar)
    shutil.copytree(shards, out_dir, dirs_exist_ok=True)
    found = pl.read_parquet(shard_files(out_dir), columns=["mass", "certified"])
    n_made = cost.decoded
    return {
        "users": len(users),
        "as_of_periods": len(periods),
        "forecasts_made": len(found),
        "tokens_per_forecast": cost.tokens / n_made if n_made else None,
        "seconds_per_forecast": cost.seconds / n_made if n_made else None,
        "users_per_hour": 3600 * n_made / cost.seconds if n_made else None,
        "mass_in_list": float(found["mass"].to_numpy().mean()),
        "certified_share": float(found["certified"].to_numpy().mean()),
    }
