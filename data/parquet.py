"""A directory that holds the five tables already: the door for any log."""

from __future__ import annotations

from pathlib import Path

from data.config import DataConfig
from data.errors import UserError
from data.tables import Tables


def read(cfg: DataConfig) -> Tables:
    """Open ``cfg.path``.

    Raises:
        UserError: no path, or files that are missing or no Parquet.
    """
    if cfg.path is None:
        raise UserError(
            "data=parquet without a path",
            expected="a directory with advertisers, ads, users, events and placements as .parquet",
            action="set data.path; data/tables.py says what the columns mean",
        )
    return Tables.open(Path(cfg.path).expanduser())
