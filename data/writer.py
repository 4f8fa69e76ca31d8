"""Tables on disk, written batch by batch, so that a log of any size passes through a bounded memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from data.tables import SCHEMAS, Tables

ROW_GROUP = 1 << 19
"""Rows of a Parquet row group; rows that a table's last group does not fill wait in memory."""
SORT_MEMORY = "1500MB"
"""What DuckDB may hold before it sorts on disk."""

Advance = Callable[[int], None]
Tracker = Callable[[str, int | None], AbstractContextManager[Advance]]


@contextmanager
def untracked(what: str, total: int | None) -> Iterator[Advance]:
    """The tracker that shows nothing."""
    yield lambda steps: None


class TableWriter:
    """Writes the five tables of one source into a directory; the same rows give the same bytes.

    Row groups are cut by row number alone, wherever the caller's batches end. Nothing is checked here:
    ``data.validation`` reads what was written.

    Args:
        directory: an existing directory, for ``<table>.parquet``.
        track: makes a progress bar of a text and the number of steps, if known.

    Attributes:
        directory: where the tables are written.
        track: ``with out.track("reading", total) as advance: advance(n)`` shows progress.
    """

    def __init__(self, directory: Path, *, track: Tracker = untracked) -> None:
        self.directory, self.track = directory, track
        self._sinks: dict[str, _Sink] = {}
        self._files: list[Path] = []

    @property
    def scratch(self) -> Path:
        """A directory for temporary files; it goes when the writer is closed."""
        path = self.directory / ".scratch"
        path.mkdir(exist_ok=True)
        return path

    def beside(self, name: str) -> Path:
        """The path of a file that a source leaves beside the tables."""
        self._files.append(self.directory / name)
        return self._files[-1]

    def discard(self) -> None:
        """Remove all that was written."""
        for path in [*self._files, *(sink.path for sink in self._sinks.values())]:
            path.unlink(missing_ok=True)

    def write(self, table: str, frame: pl.DataFrame) -> None:
        """Append rows.

        Args:
            table: name of a table.
            frame: rows in the order of ``Schema.sorted_by`` over all calls; every call's dtypes are the first's. Events
                without ``event_id`` are numbered.

        Raises:
            ValueError: no such table, or a frame with another schema than the one before it.
        """
        if table not in SCHEMAS:
            raise ValueError(f"no table {table!r}, only {', '.join(SCHEMAS)}")
        if table not in self._sinks:
            self._sinks[table] = _Sink(self.directory / f"{table}.parquet", numbered=table == "events")
        self._sinks[table].write(frame)

    def write_all(self, tables: Tables) -> None:
        """Write whole tables, the lazy ones in batches."""
        for schema, frame in tables:
            with self.track(f"writing {schema.name}", None) as advance:
                empty = True
                for batch in frame.collect_batches(chunk_size=ROW_GROUP, maintain_order=True):
                    self.write(schema.name, batch)
                    advance(len(batch))
                    empty = False
                if empty:
                    self.write(schema.name, frame.limit(0).collect())

    def duckdb(self) -> duckdb.DuckDBPyConnection:
        """A connection that sorts and joins on disk where its memory does not suffice."""
        connection = duckdb.connect()
        connection.execute(f"set memory_limit='{SORT_MEMORY}'")
        connection.execute("set temp_directory=?", [str(self.scratch / "duckdb")])
        return connection

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for sink in self._sinks.values():
            sink.close(flush=kind is None)
        shutil.rmtree(self.directory / ".scratch", ignore_errors=True)


def write_tables(tables: Tables, directory: Path) -> None:
    """Write ``<table>.parquet`` of all five tables into an existing directory."""
    with TableWriter(directory) as out:
        out.write_all(tables)


class _Sink:
    """One Parquet file with row groups of a fixed size."""

    def __init__(self, path: Path, *, numbered: bool) -> None:
        self.path, self.numbered = path, numbered
        self.schema: pl.Schema | None = None
        self.file: pq.ParquetWriter | None = None
        self.waiting: list[pl.DataFrame] = []
        self.rows = self.n_waiting = 0

    def write(self, frame: pl.DataFrame) -> None:
        if self.schema is None:
            self.schema = frame.schema
        elif frame.schema != self.schema:
            raise ValueError(f"{self.path.name} was begun with {self.schema} and is given {frame.schema}")
        if self.numbered and "event_id" not in frame.columns:
            ids = pl.int_range(self.rows, self.rows + len(frame), dtype=pl.Int64, eager=True).alias("event_id")
            frame = frame.select(ids, pl.all())
        self.rows += len(frame)
        self.waiting.append(frame)
        self.n_waiting += len(frame)
        while self.n_waiting >= ROW_GROUP:
            whole = pl.concat(self.waiting)
            self._put(whole[:ROW_GROUP])
            self.waiting, self.n_waiting = [whole[ROW_GROUP:]], self.n_waiting - ROW_GROUP

    def close(self, *, flush: bool) -> None:
        if flush and (self.n_waiting or self.file is None):
            self._put(pl.concat(self.waiting))
        if self.file is not None:
            self.file.close()

    def _put(self, frame: pl.DataFrame) -> None:
        table: pa.Table = frame.rechunk().to_arrow()
        if self.file is None:
            self.file = pq.ParquetWriter(self.path, table.schema, compression="zstd")
        self.file.write_table(table, row_group_size=ROW_GROUP)
