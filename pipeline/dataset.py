"""Data sets on their own: what ``adsid data`` does with them, before any stage of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.artifacts import MANIFEST, Manifest, atomic_directory, fingerprint, hash_directory, to_plain
from data.config import DataConfig
from data.errors import UserError
from data.prepare import prepare
from data.tables import SCHEMAS, Tables
from data.validation import validate_directory
from data.writer import Tracker, untracked
from pipeline.config import AdsidConfig, compose, recompose
from pipeline.engine import Effort

KIND = "data"


def prepare_directory(cfg: DataConfig, directory: Path, *, track: Tracker = untracked) -> Manifest:
    """Write a source as the five tables, whole or not at all.

    Args:
        cfg: names the source.
        directory: to be made; an earlier data set there is replaced once the new one is whole.
        track: makes progress bars.

    Returns:
        The manifest that lies beside the tables.

    Raises:
        UserError: the directory holds something else, and everything `data.prepare.prepare` raises.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir()) and not _is_data(directory)):
        raise UserError(
            f"{directory}, which holds something else than tables that `adsid data prepare` wrote",
            expected="a folder that is empty or not there yet, or an earlier data set",
            action="name another folder with --out",
        )
    effort, config = Effort(), to_plain(cfg)
    with atomic_directory(directory) as output:
        metrics = prepare(cfg, output, track=track)
        return effort.sign(output, KIND, key=fingerprint([KIND, config]), config=config, inputs={}, metrics=metrics)


def check_directory(directory: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Check the tables of a directory, and whether the split and the feature columns of its config fit them.

    Args:
        directory: holds the five tables.
        overrides: of ``data``, beside what the directory's manifest says.

    Returns:
        Rows of each table, the start of period 1 and the split.

    Raises:
        UserError: everything that is wrong with the tables; or, where they are sound, with the config.
    """
    cfg = config_of(directory, overrides).data
    validate_directory(directory)
    tables = Tables.open(directory)
    cfg.check_columns(tables)
    calendar, split = cfg.timeline(tables.labels(cfg.label_kinds))
    return {**tables.rows(), "origin": calendar.origin, "split": split.spans()}


def open_directory(directory: Path, overrides: Sequence[str] = ()) -> tuple[Tables, AdsidConfig]:
    """The tables of a directory and their config; tables that no manifest vouches for are checked first.

    Args:
        directory: holds the five tables.
        overrides: of ``data``, and ``evaluate``.

    Raises:
        UserError: as of `check_directory`.
    """
    if not _is_data(directory) or Manifest.read(directory).content_hash != hash_directory(directory):
        check_directory(directory, overrides)
    config, tables = config_of(directory, overrides), Tables.open(directory)
    config.data.check_columns(tables)
    return tables, config


def config_of(directory: Path, overrides: Sequence[str] = ()) -> AdsidConfig:
    """The config of a directory of tables: its manifest's, else that of ``data=parquet``; overrides go before both.

    Raises:
        UserError: the directory is not there, or everything `pipeline.config.compose` raises.
    """
    if not directory.is_dir():
        raise UserError(
            f"{directory}",
            expected=f"a directory with {', '.join(f'{name}.parquet' for name in SCHEMAS)}",
            action="give the folder of a data set, e.g. one that `adsid data prepare` wrote, or runs/<name>/data",
        )
    if (directory / MANIFEST).exists():
        return recompose({"data": Manifest.read(directory).config}, overrides)
    return compose(["data=parquet", f'data.path="{directory}"', *overrides])


def _is_data(directory: Path) -> bool:
    try:
        return Manifest.read(directory).kind == KIND
    except UserError:
        return False
