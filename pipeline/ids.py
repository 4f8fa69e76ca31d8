"""Semantic IDs of a changed catalogue, as ``adsid ids assign`` and ``adsid ids refit`` make them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.artifacts import (
    MANIFEST,
    Manifest,
    atomic_directory,
    fingerprint,
    hash_directory,
    hash_file,
    to_plain,
)
from data.errors import UserError
from data.log import load_log
from pipeline.config import recompose
from pipeline.dataset import config_of
from pipeline.engine import Effort
from semantic_ids.change import TOLERANCE, IdArtifact, assign, refit

KIND = "semantic_ids"
DATA = "data"


def assign_file(file: Path, ids: Path, out: Path, *, skip_known: bool = False) -> Manifest:
    """Give the entities of a Parquet file IDs beside those of an artifact.

    Args:
        file: of the new ones: ``advertiser_id``, ``name``, ``text``, and what else the artifact's sources read.
        ids: the artifact, or the run directory it lies in; only read.
        out: folder of the grown artifact, written whole or not at all.
        skip_known: leave out those that have an ID already; else they are an error.

    Returns:
        The manifest of the grown artifact.

    Raises:
        UserError: the file cannot be read, ``out`` holds something else, and everything `semantic_ids.change.assign`
            raises.
    """
    ids = ids_directory(ids)
    frame = _read(file)

    def work(output: Path, scratch: Path) -> dict[str, Any]:
        return assign(ids, frame, output, skip_known=skip_known, cache_dir=scratch)

    inputs = {KIND: hash_directory(ids), "new": hash_file(file)}
    return _write(out, ids, work, inputs=inputs, config={"skip_known": skip_known})


def refit_directory(
    ids: Path, data: Path, out: Path, overrides: Sequence[str] = (), *, tolerance: float = TOLERANCE
) -> Manifest:
    """Fit the tokenizer of an artifact to the log as it is today, and keep its IDs wherever the geometry allows.

    Args:
        ids: the artifact, or the run directory it lies in; only read.
        data: the five tables of today.
        out: folder of the new artifact, written whole or not at all.
        overrides: of ``semantic_ids`` and ``data``, beside what the manifests of both say.
        tolerance: extra squared error that keeping an old ID may cost; see `semantic_ids.change`.

    Returns:
        The manifest of the new artifact.

    Raises:
        UserError: ``out`` holds something else, and everything that reading the tables and `semantic_ids.change.refit`
            raise.
    """
    ids = ids_directory(ids)
    of_data = [one for one in overrides if one.split(".")[0].lstrip("+") == DATA]
    data_cfg = config_of(data, of_data).data
    plain = {"semantic_ids": to_plain(IdArtifact.load(ids).cfg)}
    cfg = recompose(plain, [one for one in overrides if one not in of_data]).semantic_ids
    log = load_log(data, data_cfg, evaluate="validation", entity=cfg.entity)

    def work(output: Path, scratch: Path) -> dict[str, Any]:
        return refit(ids, log, output, work_dir=scratch, cfg=cfg, tolerance=tolerance, cache_dir=scratch)

    inputs = {KIND: hash_directory(ids), DATA: hash_directory(data)}
    config = {"data": to_plain(data_cfg), "semantic_ids": to_plain(cfg), "tolerance": tolerance}
    return _write(out, ids, work, inputs=inputs, config=config)


def ids_directory(path: Path) -> Path:
    """The artifact that a user means: the folder itself, or the one of a run directory.

    Raises:
        UserError: there is none.
    """
    for directory in (path, path / KIND):
        if (directory / "ids.json").is_file():
            return directory
    raise UserError(
        f"{path}, without semantic IDs",
        expected="the folder of a finished stage semantic_ids, e.g. runs/quickstart/semantic_ids",
        action="give such a folder, or make one: adsid run run.until=semantic_ids",
    )


def to_console(manifest: Manifest, out: Path) -> Group:
    """What was done, for the terminal."""
    if "assigned" in manifest.metrics:
        return _assigned(manifest.metrics["assigned"], out)
    return _refitted(manifest.metrics["refit"], out)


def _assigned(figures: dict[str, Any], out: Path) -> Group:
    lines = [f"{figures['new']:,} new IDs beside {figures['before']:,}, of which none changed"]
    if figures["nothing_known"]:
        lines.append(
            f"{figures['nothing_known']:,} of the new ones have neither text nor vectors: their ID says nothing"
        )
    rows = zip(
        figures["neighbour_share"], figures["neighbour_share_before"], figures["neighbour_share_random"], strict=True
    )
    table = _table("of the ten nearest old ones, with the same", "new", "old", "by chance")
    for levels, shares in enumerate(rows, 1):
        table.add_row(_prefix(levels), *(_share(share) for share in shares))
    return Group(*(Text(line) for line in lines), table, Text(f"ids: {out}"))


def _refitted(figures: dict[str, Any], out: Path) -> Group:
    lines = [
        f"{figures['in_both']:,} IDs before and after, {figures['new']:,} new, {figures['gone']:,} gone",
        f"reconstruction error {figures['reconstruction_error_ids']:.3f}, of greedy codes "
        f"{figures['reconstruction_error_greedy']:.3f}",
    ]
    table = _table("kept", "this refit", "from scratch")
    rows = list(zip(figures["kept_share_by_level"], figures["scratch_kept_share_by_level"], strict=True))
    for levels, shares in enumerate(rows, 1):
        name = "whole IDs" if levels == len(rows) else _prefix(levels)
        table.add_row(name, *(_share(share) for share in shares))
    note = "A prior LM fitted on the old IDs refuses these, unless every ID was kept and nothing else changed."
    return Group(*(Text(line) for line in lines), table, Text(note, style="dim"), Text(f"ids: {out}"))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(columns):
        table.add_column(Text(column, style="dim"), justify="right" if place else "left")
    return table


def _prefix(levels: int) -> str:
    return "first code" if levels == 1 else f"first {levels} codes"


def _share(share: float | None) -> str:
    return "none" if share is None else f"{share:.1%}"


def _read(file: Path) -> pl.DataFrame:
    expected = "a Parquet file with advertiser_id, name and text, one row a new advertiser"
    if not file.is_file():
        raise UserError(f"{file}", expected=expected, action="give the path of such a file")
    try:
        return pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"{file} ({str(error).splitlines()[0]})",
            expected=expected,
            action="write it with write_parquet or to_parquet",
        ) from error


def _write(
    out: Path,
    ids: Path,
    work: Callable[[Path, Path], dict[str, Any]],
    *,
    inputs: dict[str, str],
    config: dict[str, Any],
) -> Manifest:
    """Make an artifact whole or not at all, with its manifest."""
    _check_out(out, ids)
    effort, key = Effort(), fingerprint([KIND, config, inputs])
    with atomic_directory(out) as output, tempfile.TemporaryDirectory() as scratch:
        metrics = work(output, Path(scratch))
        return effort.sign(output, KIND, key=key, config=config, inputs=inputs, metrics=metrics)


def _check_out(out: Path, ids: Path) -> None:
    """Refuse to write over what is read, or over what no command of this module wrote.

    Raises:
        UserError: ``out`` is such a place.
    """
    if out.resolve() == ids.resolve():
        raise UserError(
            f"--out {out}, the folder of the old IDs",
            expected="another folder: the old IDs stay, for the prior LMs that were fitted on them",
            action="name another folder with --out",
        )
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not _is_ours(out)):
        raise UserError(
            f"--out {out}, which holds something else than IDs that `adsid ids` wrote",
            expected="a folder that is empty or not there yet, or earlier IDs of `adsid ids`",
            action="name another folder with --out",
        )


def _is_ours(out: Path) -> bool:
    if not (out / MANIFEST).is_file():
        return False
    manifest = Manifest.read(out)
    return manifest.kind == KIND and bool({"assigned", "refit"} & {*manifest.metrics})
