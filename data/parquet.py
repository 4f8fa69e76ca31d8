"""A directory that holds the five tables already: the door for any log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl

from data.config import DataConfig
from data.errors import UserError
from data.sampling import trial_users
from data.tables import SCHEMAS, Tables
from data.writer import TableWriter


def read(cfg: DataConfig, out: TableWriter) -> None:
    """Copy the tables of ``cfg.path``, of all users or of ``cfg.max_users``.

    Raises:
        UserError: no path, or files that are missing or no Parquet.
    """
    if cfg.path is None:
        raise UserError(
            "data=parquet without a path",
            expected="a directory with advertisers, ads, users, events and placements as .parquet",
            action="set data.path; data/tables.py says what the columns mean",
        )
    tables = Tables.open(Path(cfg.path).expanduser())
    if cfg.max_users is not None:
        tables = _of_some_users(tables, cfg)
    out.write_all(tables)


def files(directory: Path) -> list[Path]:
    """The files that are read of a directory."""
    return [directory / f"{name}.parquet" for name in SCHEMAS]


def _of_some_users(tables: Tables, cfg: DataConfig) -> Tables:
    """The tables without the other users and what they did; catalogue and placements stay."""
    users = trial_users(cfg, tables.labels(cfg.label_kinds), tables.events)
    return replace(
        tables,
        users=tables.users.filter(pl.col("user_id").is_in(users.implode())),
        events=tables.events.filter(pl.col("user_id").is_in(users.implode())),
    )
