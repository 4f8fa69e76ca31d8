"""From a source to the five tables on disk."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data import amazon, complete_journey, parquet, sequences, simulator, taobao_ad
from data.artifacts import contents
from data.config import DataConfig
from data.errors import UserError
from data.tables import Tables
from data.validation import validate_directory
from data.writer import TableWriter, Tracker, untracked

SOURCES: dict[str, Callable[[DataConfig, TableWriter], None]] = {
    "complete_journey": complete_journey.read,
    "amazon": amazon.read,
    "sequences": sequences.read,
    "taobao_ad": taobao_ad.read,
    "simulator": simulator.read,
    "parquet": parquet.read,
}
"""Adapters by name; each reads what a :class:`~data.config.DataConfig` names and writes tables."""

FILES: dict[str, Callable[[Path], list[Path]]] = {
    "complete_journey": complete_journey.files,
    "amazon": amazon.files,
    "sequences": sequences.files,
    "taobao_ad": taobao_ad.files,
    "parquet": parquet.files,
}
"""What each adapter reads of ``data.path``; the simulator reads nothing."""


def source_content(cfg: DataConfig) -> dict[str, str] | None:
    """What tells the source as it is from another under the same config.

    Args:
        cfg: names the source.

    Returns:
        `data.artifacts.contents` of the files under ``data.path``; of a package its version, unless it is the one that
        the config means; nothing for a source that reads neither. None where the directory is gone.
    """
    if cfg.path is None and cfg.source == "complete_journey":
        try:
            version = importlib.metadata.version(complete_journey.PACKAGE)
        except importlib.metadata.PackageNotFoundError:
            return None
        return {} if version == complete_journey.VERSION else {complete_journey.PACKAGE: version}
    if cfg.path is None or cfg.source not in FILES:
        return {}
    directory = Path(cfg.path).expanduser()
    if not directory.is_dir():
        return None
    return {f"data.path/{name}": content for name, content in contents(FILES[cfg.source](directory)).items()}


def prepare(cfg: DataConfig, out_dir: Path, *, track: Tracker = untracked) -> dict[str, Any]:
    """Read a source, write its tables and check them.

    Args:
        cfg: names the source.
        out_dir: an existing directory, for ``<table>.parquet`` of all five tables. An error leaves none of them.
        track: makes progress bars.

    Returns:
        Number of rows of each table, the first day of period 1 and the spans of the split.

    Raises:
        UserError: unknown source, tables that break a rule of :mod:`data.tables`, or a config whose split or columns
            do not fit them; all problems of the tables at once.
    """
    if cfg.source not in SOURCES:
        raise UserError(
            f"data.source={cfg.source}",
            expected=f"one of {', '.join(sorted(SOURCES))}",
            action="set data to a config of configs/data, e.g. data=complete_journey",
        )
    out = TableWriter(out_dir, track=track)
    try:
        with out:
            SOURCES[cfg.source](cfg, out)
        with track("checking the tables", None):
            validate_directory(out_dir)
            tables = Tables.open(out_dir)
            cfg.check_columns(tables)
            calendar, split = cfg.timeline(tables.labels(cfg.label_kinds))
    except BaseException:
        out.discard()
        raise
    return {**tables.rows(), "origin": calendar.origin, "split": split.spans()}
