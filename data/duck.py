"""CSV files of any size, read strictly into DuckDB.

A cast in a database is lenient: it reads ``1.5`` as 2 and ``1_000`` as 1000. So a file is read as text, a value is
taken only if it is what writing the number again would give, and every line is either loaded or told: a file's
problems come together, each with the number of lines it concerns and the first of them.

No message holds a value of a private column, nor, in a file that has one, a value that could be an id which stands in
a wrong column.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import polars as pl

from data.errors import UserError
from data.writer import ROW_GROUP

MAX_ID = 2**31 - 1
"""The largest id that is read."""
STATE = "_state"
"""A column that loaded tables have besides their own."""
_SOUND, _STRAY, _BROKEN = 0, 1, 2
_MOST_REJECTS = 100_000
"""Lines of a broken file that are looked at closely."""
_HEADER_BYTES = 1 << 16
_CHUNK = 1 << 20
_SHOWN = 60
"""Characters of an offending value in a message."""


@dataclass(frozen=True)
class Field:
    """A column of a CSV file, and the rule of its values.

    Args:
        name: as the header has it.
        dtype: DuckDB's type of it.
        rule: the rule in words.
        valid: SQL predicate over ``{c}``, the value as text; it is not asked of a missing value.
        nullable: the value may be missing: empty or ``NULL``.
        private: values identify a person and stay out of messages.
        tolerated: share of the lines that may break the rule, but not ``shape``, and are then left out.
        shape: SQL predicate like ``valid``, of what a value must be in any case.
    """

    name: str
    dtype: str
    rule: str
    valid: str
    nullable: bool = False
    private: bool = False
    tolerated: float = 0.0
    shape: str = ""

    @property
    def sound(self) -> str:
        """SQL predicate, never null: a line obeys the rule."""
        return self._asked(self.valid)

    @property
    def shaped(self) -> str:
        """SQL predicate, never null: a line is sound or may be tolerated."""
        return self._asked(self.shape) if self.tolerated else self.sound

    def _asked(self, predicate: str) -> str:
        column = quoted(self.name)
        holds = f"coalesce({predicate.format(c=column)}, false)"
        return f"({column} is null or {holds})" if self.nullable else f"({column} is not null and {holds})"


def whole(name: str, least: int = 0, most: int = MAX_ID, *, rule: str = "", **options: Any) -> Field:
    """A column of whole numbers from ``least`` to ``most``, at most `MAX_ID`, in plain digits."""
    value = "try_cast({c} as INTEGER)"  # as it is loaded, so that DuckDB casts once
    shape = f"{value}::varchar = {{c}}"
    valid = f"{shape} and {value} between {least} and {most}"
    return Field(name, "INTEGER", rule or f"a whole number from {least} to {most}", valid, shape=shape, **options)


def number(name: str, **options: Any) -> Field:
    """A column of numbers that are finite and not negative."""
    valid = "regexp_full_match({c}, '[0-9]+([.][0-9]+)?([eE][+-]?[0-9]+)?') and isfinite(try_cast({c} as double))"
    return Field(name, "DOUBLE", "a finite number, not negative", valid, **options)


def choice(name: str, values: Sequence[str], **options: Any) -> Field:
    """A column of a few known values, in their order."""
    listed = ", ".join(map(_literal, values))
    return Field(name, f"ENUM ({listed})", f"one of {', '.join(values)}", f"{{c}} in ({listed})", **options)


def word(name: str, **options: Any) -> Field:
    """A column of letters, digits and underscores."""
    return Field(name, "VARCHAR", "letters, digits and _", "regexp_full_match({c}, '[0-9A-Za-z_]{{1,64}}')", **options)


@dataclass(frozen=True)
class CsvFile:
    """A CSV file with a header and one line a row, and the table it is read into.

    Args:
        name: of the table, and of the file before ``.csv`` or ``.csv.gz``.
        fields: the columns in their order.
        key: column whose values are unique, if any.
    """

    name: str
    fields: tuple[Field, ...]
    key: str | None = None

    def locate(self, directory: Path) -> Path | None:
        """The file in a directory; where it is there packed and unpacked, the latter."""
        return next((path for end in (".csv", ".csv.gz") if (path := directory / f"{self.name}{end}").is_file()), None)

    @property
    def private(self) -> bool:
        """A column identifies a person."""
        return any(field.private for field in self.fields)


@dataclass(frozen=True)
class Loaded:
    """What became of a file.

    Args:
        errors: all its problems; a file without any is a table of the connection.
        left_out: lines left out under ``Field.tolerated``.
    """

    errors: list[UserError]
    left_out: int = 0


def keep_on_disk(connection: duckdb.DuckDBPyConnection, path: Path) -> None:
    """Make the tables of a connection from now on in a file, where they are packed, and not in memory."""
    connection.execute(f"attach {_literal(str(path))} as on_disk")
    connection.execute("use on_disk")


def quoted(name: str) -> str:
    """A name as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def load(connection: duckdb.DuckDBPyConnection, file: CsvFile, path: Path) -> Loaded:
    """Read a file into the table ``file.name``.

    Args:
        connection: holds the table.
        file: its columns and rules.
        path: the file, packed with gzip if it ends with ``.gz``.

    Returns:
        All problems of the file; nothing is raised for them.

    Raises:
        duckdb.Error: memory or disk ran out, see `no_room`.
    """
    damage = _find_damage(path) or _find_wrong_header(path, file)
    if damage is not None:
        return Loaded([damage])
    sound = " and ".join(field.sound for field in file.fields)
    shaped = " and ".join(field.shaped for field in file.fields)
    columns = ", ".join(
        f"try_cast({quoted(field.name)} as {field.dtype}) as {quoted(field.name)}" for field in file.fields
    )
    try:
        connection.execute("set preserve_insertion_order=false")
        connection.execute(
            f"create table {quoted(file.name)} as select {columns}, case when {sound} then {_SOUND} "
            f"when {shaped} then {_STRAY} else {_BROKEN} end::utinyint as {STATE} "
            f"from {_scan(file, rejects=f'rejects_{file.name}')}",
            [str(path)],
        )
    except (duckdb.OutOfMemoryException, duckdb.IOException):
        raise
    except duckdb.Error:  # its message quotes the line
        rule = "lines that all end in the same way, with LF or with CR LF"
        return Loaded([_mend(path, f"{path.name}: it is no sound CSV", rule)])
    counts = f"count(*), count(*) filter ({STATE} = {_BROKEN}), count(*) filter ({STATE} = {_STRAY})"
    total, broken, left_out = _row(connection, f"select {counts} from {quoted(file.name)}")
    errors = _rejects(connection, file, path)
    too_many = left_out > max(field.tolerated for field in file.fields) * total
    if broken or too_many:
        errors += _broken_rules(connection, file, path, tolerant=not too_many)
    if not total and not errors:
        errors.append(_mend(path, f"{path.name}: no line after the header", "at least one line"))
    if file.key is not None and not errors:
        errors += _repeated(connection, file, path)
    if left_out and not errors:
        connection.execute(f"delete from {quoted(file.name)} where {STATE} = {_STRAY}")
    return Loaded(errors, left_out)


def batches(connection: duckdb.DuckDBPyConnection, query: str) -> Iterator[pl.DataFrame]:
    """The rows of a query, in batches."""
    for batch in connection.sql(query).to_arrow_reader(ROW_GROUP):
        frame = pl.from_arrow(batch)
        if isinstance(frame, pl.DataFrame):
            yield frame


def no_room(error: duckdb.Error) -> UserError:
    """The error for memory or disk that ran out while files are read and sorted."""
    return UserError(
        str(error).splitlines()[0],
        expected="room for temporary files where the tables are written, about as much as the source's files take",
        action="free disk space, or write the tables elsewhere",
    )


def offence(path: Path, column: str, rule: str, rows: int, example: str, *, at_least: bool = False) -> UserError:
    """The error for rows of a file that break a rule.

    Args:
        path: the file.
        column: the column or columns concerned, ``""`` for whole lines.
        rule: what was expected.
        rows: how many break it.
        example: one of them, ``""`` for none.
        at_least: there may be more of them.
    """
    where = f"{path.name}, column {column}" if column else path.name
    count = f"{rows}{' or more' if at_least else ''} offending row{'s' if rows != 1 else ''}"
    return _mend(path, f"{where}: {count}{f', e.g. {example}' if example else ''}", rule)


def _scan(file: CsvFile, *, rejects: str) -> str:
    """A table function that reads a file, given as parameter, as text."""
    columns = ", ".join(f"{_literal(field.name)}: 'VARCHAR'" for field in file.fields)
    return (
        f"read_csv(?, header=true, auto_detect=false, columns={{{columns}}}, delim=',', quote='', escape='', "
        f"nullstr=['', 'NULL'], store_rejects=true, rejects_table={_literal(rejects)}, "
        f"rejects_scan={_literal(f'{rejects}_scan')}, rejects_limit={_MOST_REJECTS})"
    )


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _row(connection: duckdb.DuckDBPyConnection, query: str, parameters: Sequence[object] = ()) -> tuple[Any, ...]:
    row = connection.execute(query, parameters).fetchone()
    if row is None:
        raise ValueError(f"no row from {query}")
    return row


def _find_damage(path: Path) -> UserError | None:
    """Whether a file cannot be read or unpacked to its end; DuckDB does not compare the checksum of a packed one."""
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as stream:
                while stream.read(_CHUNK):
                    pass
        else:
            with path.open("rb") as stream:
                stream.read(1)
    except (OSError, EOFError, zlib.error) as error:
        what = "a file that gzip unpacks to its end" if path.suffix == ".gz" else "a file that can be read"
        return UserError(f"{path.name}: {error}", expected=what, action=f"download {path.name} again")
    return None


def _find_wrong_header(path: Path, file: CsvFile) -> UserError | None:
    expected = [field.name for field in file.fields]
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        start = stream.read(_HEADER_BYTES)
    if not start:
        return _mend(path, f"{path.name}: it is empty", f"the header {','.join(expected)} and lines below it")
    text = start.splitlines()[0].decode("utf-8-sig", errors="replace")
    names = [name.strip() for name in text.split(",")]
    if names == expected:
        return None
    if not all(name.isidentifier() for name in names):  # a line of values, which may be somebody's
        given = "its first line is no header"
    elif missing := [name for name in expected if name not in names]:
        given = f"a header without {', '.join(missing)}"
    elif unknown := [name for name in names if name not in expected]:
        given = f"a header with {', '.join(name[:_SHOWN] for name in unknown)}"
    else:
        given = f"the header {','.join(names)[: 4 * _SHOWN]}"
    return _mend(path, f"{path.name}: {given}", f"the header {','.join(expected)}")


def _rejects(connection: duckdb.DuckDBPyConnection, file: CsvFile, path: Path) -> list[UserError]:
    """Lines that are no row of the file at all."""
    found = connection.execute(
        f"""select case error_type
                when 'INVALID ENCODING' then 'text in UTF-8'
                when 'LINE SIZE OVER MAXIMUM' then 'lines of less than 2 MB'
                else '{len(file.fields)} values in every line, separated by commas' end as rule,
            count(distinct line), min(line), sum(count(*)) over () >= {_MOST_REJECTS}
        from {quoted(f"rejects_{file.name}")} group by rule order by rule"""
    ).fetchall()
    return [offence(path, "", rule, rows, f"line {line}", at_least=cut) for rule, rows, line, cut in found]


def _broken_rules(
    connection: duckdb.DuckDBPyConnection, file: CsvFile, path: Path, *, tolerant: bool
) -> list[UserError]:
    """The rules that lines break; the file is read once more, with the lines' numbers."""
    parts = []
    for field in file.fields:
        broken = f"filter (not {field.shaped if tolerant else field.sound})"
        parts.append(f"count(*) {broken}, min(row) {broken}, arg_min_null({quoted(field.name)}, row) {broken}")
    connection.execute("set preserve_insertion_order=true")  # without it, rows are numbered as they come
    rows = f"select row_number() over () as row, * from {_scan(file, rejects=f'again_{file.name}')}"
    found = _row(connection, f"select {', '.join(parts)} from ({rows})", [str(path)])
    rejected = connection.execute(
        f"select distinct line from {quoted(f'rejects_{file.name}')} order by line"
    ).fetchall()
    errors = []
    for place, field in enumerate(file.fields):
        count, row, value = found[3 * place : 3 * place + 3]
        if count:
            example = f"line {_line(row, [line for (line,) in rejected])}{_shown(value, field, file)}"
            rule = field.rule + (f" in all but {field.tolerated:.1%} of the lines" if field.tolerated else "")
            errors.append(offence(path, field.name, rule, count, example))
    return errors


def _line(row: int, rejected: Sequence[int]) -> int:
    """Line of a file's ``row``-th row, of a file with rejected lines."""
    line = row + 1
    for other in rejected:
        if other > line:
            break
        line += 1
    return line


def _shown(value: str | None, field: Field, file: CsvFile) -> str:
    """An offending value, unless it is or may be somebody's id."""
    if value is None:
        return ": it is missing"
    if field.private or (file.private and value.strip().isdigit()):
        return ""
    return f": {value[:_SHOWN]!r}"


def _repeated(connection: duckdb.DuckDBPyConnection, file: CsvFile, path: Path) -> list[UserError]:
    key = next(field for field in file.fields if field.name == file.key)
    name = quoted(key.name)
    rows, example = _row(
        connection,
        f"select coalesce(sum(n), 0)::bigint, min({name}) from (select {name}, count(*) as n from {quoted(file.name)} "
        f"group by {name} having n > 1)",
    )
    if not rows:
        return []
    return [offence(path, key.name, "unique values", rows, "" if key.private else str(example))]


def _mend(path: Path, given: str, expected: str) -> UserError:
    return UserError(given, expected=expected, action=f"download or write {path.name} again")
