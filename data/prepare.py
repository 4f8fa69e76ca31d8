"""From a source to the five tables on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl

from data import complete_journey, parquet
from data.config import DataConfig
from data.errors import UserError
from data.tables import Tables, validate

SOURCES: dict[str, Callable[[DataConfig], Tables]] = {
    "complete_journey": complete_journey.read,
    "parquet": parquet.read,
}
"""Adapters by name; each turns a :class:`~data.config.DataConfig` into tables."""


def prepare(cfg: DataConfig, out_dir: Path) -> dict[str, Any]:
    """Read a source, validate its tables and write them.

    Args:
        cfg: names the source.
        out_dir: an existing directory, for ``<table>.parquet`` of all five tables.

    Returns:
        Number of rows of each table.

    Raises:
        UserError: unknown source, or tables that break a rule of :mod:`data.tables`; all problems at once.
    """
    if cfg.source not in SOURCES:
        raise UserError(
            f"data.source={cfg.source}",
            expected=f"one of {', '.join(sorted(SOURCES))}",
            action="set data to a config of configs/data, e.g. data=complete_journey",
        )
    tables = SOURCES[cfg.source](cfg)
    validate(tables)
    tables.write(out_dir)
    return {schema.name: int(frame.select(pl.len()).collect().item()) for schema, frame in tables}
