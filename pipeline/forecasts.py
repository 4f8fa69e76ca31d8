"""Forecasts of many users from a finished run, as ``adsid priors generate`` makes them.

    <run>/data, semantic_ids, prior ─► PriorModel ─► shards, here or on Ray ─► <out>/period=…  the table
                                                                               <out>/lookup     its index
                                                                               <out>/job.json   what it is of, and cost

Every worker of Ray reads the run for itself and makes whole shards of the one directory, which all of them reach. So a
shard is the same wherever it was made.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table

from data.artifacts import atomic_write_text, to_plain
from data.errors import LineageError, UserError
from data.log import Log, load_log
from pipeline.config import CONFIG_FILE, AdsidConfig, load
from pipeline.engine import locked
from pipeline.prompts import period_of
from priors.artifact import PriorModel
from priors.generate import Cost, Engine, Shard, ShardMaker, as_of_periods, run_job
from priors.lookup import write_lookup
from semantic_ids.advertiser_ids import AdvertiserIds

ENGINES = ("local", "ray")
JOB = "job.json"
PANEL = ("prior.panel", "prior.seed")
"""What says which users are forecast."""
_NEEDED = ("data", "semantic_ids", "prior")


@dataclass(frozen=True)
class JobConfig:
    """One batch job.

    Attributes:
        out: directory of the table; as-of periods that it has stay.
        as_of: as-of times, dates or periods; empty: those of the run's schedule.
        engine: ``local``, or ``ray``, which makes shards on the workers of a Ray cluster.
        workers: of Ray.
        incremental: carry over rows of users without an event since the table's last as-of before.
        price: of an hour of the machine, in the currency of the cost sheet.
        progress_bar: show one.
    """

    out: Path
    as_of: tuple[str, ...] = ()
    engine: str = "local"
    workers: int = 2
    incremental: bool = False
    price: float = 1.0
    progress_bar: bool = False

    def __post_init__(self) -> None:
        errors = []
        if self.engine not in ENGINES:
            errors.append(
                UserError(f"--engine {self.engine}", expected=" or ".join(ENGINES), action="choose one of them")
            )
        if self.workers < 1 or self.price < 0:
            errors.append(
                UserError(
                    f"--workers {self.workers}, --price {self.price}",
                    expected="at least one worker, and a price of at least 0",
                    action="correct them",
                )
            )
        if errors:
            raise UserError.collect(errors)


@dataclass(frozen=True)
class CostSheet:
    """What a job took.

    Attributes:
        users, periods: asked for.
        decoded, carried: rows made, and rows carried over.
        kept_shards, damaged_shards: shards that were there already, and those made anew since they were cut short or
            of something else.
        reinferred: share of the rows made now that were decoded.
        seconds: of all shards, added up over the workers.
        users_per_second: of one worker.
        tokens_per_user: prompt and beams.
        mass_in_list, certified: mean probability covered, share of lists proven.
        seconds_per_million, price_per_million: of as many decoded users, at the price of an hour.
    """

    users: int
    periods: int
    decoded: int
    carried: int
    kept_shards: int
    damaged_shards: int
    reinferred: float | None
    seconds: float
    users_per_second: float | None
    tokens_per_user: float | None
    mass_in_list: float | None
    certified: float | None
    seconds_per_million: float | None
    price_per_million: float | None

    @classmethod
    def of(cls, cost: Cost, *, users: int, periods: int, price: float) -> CostSheet:
        """From the cost of the shards made."""
        n, seconds = cost.decoded, cost.seconds
        return cls(
            users=users,
            periods=periods,
            decoded=n,
            carried=cost.carried,
            kept_shards=cost.kept,
            damaged_shards=cost.damaged,
            reinferred=n / (n + cost.carried) if n + cost.carried else None,
            seconds=seconds,
            users_per_second=n / seconds if n else None,
            tokens_per_user=cost.tokens / n if n else None,
            mass_in_list=cost.mass / n if n else None,
            certified=cost.certified / n if n else None,
            seconds_per_million=1e6 * seconds / n if n else None,
            price_per_million=1e6 * seconds / n / 3600 * price if n else None,
        )


def generate(run: Path, job: JobConfig, overrides: Sequence[str] = ()) -> CostSheet:
    """Forecast the panel of a run into a table.

    Args:
        run: directory of a run whose stage prior is done.
        job: where, when and how.
        overrides: of single keys, e.g. ``prior.decode.beam=50`` or ``prior.panel=null`` for all users.

    Returns:
        What it took.

    Raises:
        UserError: no such run or time, another job works in the directory, or the disk is full.
        LineageError: the table is of another forecaster or another way of decoding.
    """
    maker = _maker(run, tuple(overrides), incremental=job.incremental)
    log, cfg = maker.log, maker.cfg
    periods = sorted({period_of(log, moment) for moment in job.as_of}) or as_of_periods(log, cfg.decode.every)
    users = log.panel(cfg.panel, cfg.seed)
    with locked(job.out):
        _check_job(job.out, maker)
        engine = _ray(run.absolute(), tuple(overrides), job) if job.engine == "ray" else None
        cost = run_job(maker, users, periods, job.out.absolute(), engine=engine, progress_bar=job.progress_bar)
        write_lookup(job.out)
        sheet = CostSheet.of(cost, users=len(users), periods=len(periods), price=job.price)
        _write_job(job.out, maker, sheet)
    return sheet


def _maker(run: Path, overrides: tuple[str, ...], *, incremental: bool) -> ShardMaker:
    config, log, prior = open_prior(run, overrides, read=("prior.decode.", *PANEL, "evaluate"))
    return ShardMaker(prior, log, config.prior, incremental)


def open_prior(
    run: Path, overrides: Sequence[str] = (), *, read: Sequence[str] = ()
) -> tuple[AdsidConfig, Log, PriorModel]:
    """Configuration, log and fitted forecaster of a run.

    Args:
        run: its directory.
        overrides: of single keys, beside its configuration.
        read: those that are read of it, as of `pipeline.config.load`.

    Raises:
        UserError: the run has no fitted forecaster, or an override is not read.
    """
    config = load(run / CONFIG_FILE, overrides, read=read)
    missing = [name for name in _NEEDED if not (run / name).is_dir()]
    if missing:
        raise UserError(
            f"{run}, without {', '.join(missing)}",
            expected="a run whose stage prior is done",
            action="adsid run run.until=prior, with the configuration of the run",
        )
    log = load_log(run / "data", config.data, evaluate=config.evaluate, entity=config.semantic_ids.entity)
    ids = AdvertiserIds.load(run / "semantic_ids")
    return config, log, PriorModel.load(run / "prior", log, ids, config.prior)


def _check_job(out: Path, maker: ShardMaker) -> None:
    """A table is of one forecaster, decoded in one way."""
    path = out / JOB
    if not path.exists():
        return _write_job(out, maker, None)
    settings, ours = json.loads(path.read_text())["settings"], to_plain(maker.settings)
    if settings != ours:
        changed = [name for name in ours if settings.get(name) != ours[name]]
        raise LineageError(
            f"{out}, a table of another {' and another '.join(changed)}",
            expected="a table of this forecaster, decoded in the same way",
            action="choose another folder with --out, or remove this one",
        )
    return None


def _write_job(out: Path, maker: ShardMaker, sheet: CostSheet | None) -> None:
    plain = {"settings": to_plain(maker.settings), "cost": to_plain(sheet)}
    atomic_write_text(out / JOB, json.dumps(plain, indent=1) + "\n")


def _ray(run: Path, overrides: tuple[str, ...], job: JobConfig) -> Engine:
    """Makes shards with Ray Data: each of its workers holds the forecaster and takes shard after shard.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--engine ray, without the package ray",
            expected="Ray, which is no part of the pinned set",
            action='pip install "adsid[ray]", or leave out --engine',
        ) from error
    threads = torch.get_num_threads()

    class Worker:
        def __init__(self) -> None:
            torch.set_num_threads(threads)
            self.maker = _maker(run, overrides, incremental=job.incremental)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            costs = []
            for period, number, users, key, out in zip(*(batch[name] for name in _COLUMNS), strict=True):
                shard = Shard(int(period), int(number), np.frombuffer(users, dtype=np.int64))
                costs.append(json.dumps(to_plain(self.maker.make(shard, Path(out), key))))
            return {"cost": costs}

    def engine(shards: Sequence[tuple[Shard, str]], directory: Path) -> Iterator[Cost]:
        if not shards:
            return
        rows = [
            dict(
                zip(
                    _COLUMNS,
                    (s.period, s.number, s.user_R.astype(np.int64).tobytes(), key, str(directory)),
                    strict=True,
                )
            )
            for s, key in shards
        ]
        ray.data.DataContext.get_current().enable_progress_bars = job.progress_bar
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            Worker, batch_size=1, concurrency=min(job.workers, len(rows))
        )
        for row in made.iter_rows():
            yield Cost(**json.loads(row["cost"]))

    return engine


_COLUMNS = ("period", "number", "users", "key", "out")


def cost_to_console(sheet: CostSheet, job: JobConfig) -> Group:
    """The cost sheet for people."""
    table = Table("", "", show_header=False, title=f"{job.out}", title_style="")
    table.columns[1].justify = "right"

    def line(name: str, value: float | None, form: str = ",.0f", unit: str = "") -> None:
        table.add_row(name, "-" if value is None else f"{value:{form}}{unit}")

    line("users × as-of periods", sheet.users * sheet.periods)
    line("decoded", sheet.decoded)
    line("carried over", sheet.carried)
    line("shards that were there", sheet.kept_shards)
    line("shards made anew, cut short or of something else", sheet.damaged_shards)
    line("re-inferred", None if sheet.reinferred is None else 100 * sheet.reinferred, ".1f", " %")
    line("users a second and worker", sheet.users_per_second, ".2f")
    line("tokens a user", sheet.tokens_per_user, ".1f")
    line("probability in the list", sheet.mass_in_list, ".3f")
    line("lists proven to be the best", None if sheet.certified is None else 100 * sheet.certified, ".1f", " %")
    line("seconds per million users", sheet.seconds_per_million)
    line(f"price per million users at {job.price:g} an hour", sheet.price_per_million, ",.2f")
    return Group(table)
