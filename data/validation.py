"""Whether tables obey the rules of ``data.tables``; all that is broken is told at once.

Pandera checks a table batch by batch, so that memory does not grow with the log. What it cannot see from one batch
is added here: the order of rows across batches, keys that repeat, and ids that no other table knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandera.polars as pa
import polars as pl
from pandera.api.polars.types import PolarsData
from pandera.errors import SchemaErrorReason, SchemaErrors

from data.errors import UserError
from data.tables import EARLIEST, FAMILIES, KINDS, LATEST, SCHEMAS, Column, Schema, Tables, scan, unreadable

BATCH = 1 << 20
"""Rows checked at a time."""


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    Args:
        table: where.
        column: columns concerned, ``""`` for the whole table.
        rule: what must hold.
        rows: number of offending rows, 0 where the rule is not of rows.
        example: one offending value with its row, or the row alone where the value identifies a person.
    """

    table: str
    column: str
    rule: str
    rows: int
    example: str

    def error(self) -> UserError:
        """The problem as an error."""
        where = f"{self.table}.{self.column}" if self.column else self.table
        count = f": {self.rows} offending row{'s' if self.rows != 1 else ''}" if self.rows else ""
        return UserError(
            f"{where}{count}, {self.example}" if count else f"{where}: {self.example}",
            expected=self.rule,
            action=f"mend {where} at its source and prepare the data again",
        )


def validate(tables: Tables) -> None:
    """Checks every rule of the schemas.

    Args:
        tables: the five tables.

    Raises:
        UserError: names table, column, rule, number of offending rows and an example of each problem.
    """
    problems = find_problems({schema.name: frame for schema, frame in tables})
    if problems:
        raise UserError.collect([problem.error() for problem in problems])


def validate_directory(directory: Path) -> None:
    """Checks the tables of a directory; the sound ones are checked though others are missing or cannot be read.

    Raises:
        UserError: files are missing or no Parquet, or rules are broken; all at once.
    """
    frames, errors = scan(directory)
    errors += [problem.error() for problem in find_problems(frames, directory)]
    if errors:
        raise UserError.collect(errors)


def find_problems(frames: Mapping[str, pl.LazyFrame], directory: Path | None = None) -> list[Problem]:
    """All broken rules, in the order of tables and columns.

    Args:
        frames: tables by name; rules that concern a table that is not among them are left out.
        directory: where they lie, for messages.
    """
    keys: dict[str, pl.Series] = {}
    problems: list[Problem] = []
    for name, frame in frames.items():
        schema = SCHEMAS[name]
        try:
            problems += _Check(schema, frame, keys).problems()
            if schema.key[0] in frame.collect_schema() and len(schema.key) == 1 and name != "events":
                keys[name] = frame.select(schema.key[0]).collect().to_series().drop_nulls().unique()
        except (pl.exceptions.PolarsError, OSError) as error:
            path = (directory or Path()) / f"{name}.parquet"
            problems.append(Problem(name, "", "a readable Parquet file", 0, unreadable(path, error).given))
    return problems + _market_problems(frames)


def _market_problems(frames: Mapping[str, pl.LazyFrame]) -> list[Problem]:
    """Markets of events and placements are compared, so they are of one family."""
    dtypes = [frames[name].collect_schema().get("market_id") for name in ("events", "placements") if name in frames]
    if len(dtypes) < 2 or None in dtypes or pl.Null in dtypes or dtypes[0].is_integer() == dtypes[1].is_integer():  # type: ignore[union-attr]
        return []
    rule = f"dtype must go with that of events.market_id, {dtypes[0]}"
    return [Problem("placements", "market_id", rule, 0, f"it is {dtypes[1]}")]


@dataclass
class _Finding:
    """Rows that break one rule, over the batches so far."""

    rows: int
    example: str


@dataclass
class _Check:
    """The check of one table.

    Args:
        schema: its rules.
        frame: its rows.
        keys: values of the keys of tables checked before, for references.
    """

    schema: Schema
    frame: pl.LazyFrame
    keys: Mapping[str, pl.Series]
    found: dict[tuple[str, str], _Finding] = field(default_factory=dict)

    def problems(self) -> list[Problem]:
        dtypes = self.frame.collect_schema()
        problems, usable = self._structure(dtypes)
        rules = pa.DataFrameSchema({column.name: self._rules(column, dtypes[column.name]) for column in usable})
        self.private = {column.name for column in usable if column.private}
        names = {column.name for column in usable}
        previous: Any = None
        rising, previous_key, rows = len(self.schema.key) == 1, None, 0
        for batch in _batches(self.frame.select(column.name for column in usable)):
            self._check_values(rules, batch, rows)
            if {"start", "end"} <= names:
                wrong = batch.select((pl.col("end") <= pl.col("start")).fill_null(False)).to_series()
                self._note("start, end", "end must be after start", wrong, batch["end"], rows)
            if self.schema.sorted_by in names:
                moment = batch[self.schema.sorted_by]
                step = (moment < moment.shift(1, fill_value=previous)).fill_null(False)
                self._note(
                    self.schema.sorted_by, f"rows must be in order of {self.schema.sorted_by}", step, moment, rows
                )
                previous = moment[-1]
            if rising := rising and self.schema.key[0] in names:
                key = batch[self.schema.key[0]]
                rising = bool((key > key.shift(1, fill_value=previous_key)).fill_null(rows == 0).all())
                previous_key = key[-1]
            rows += len(batch)
        if not rows and not self.schema.optional_rows:
            problems.append(Problem(self.schema.name, "", "the table must have rows", 0, "it is empty"))
        order = {name: place for place, name in enumerate(dtypes)}
        for (column, rule), finding in sorted(self.found.items(), key=lambda item: order.get(item[0][0], len(order))):
            problems.append(Problem(self.schema.name, column, rule, finding.rows, finding.example))
        if set(self.schema.key) <= names and not rising:
            problems += self._repeated_keys()
        return problems

    def _structure(self, dtypes: pl.Schema) -> tuple[list[Problem], list[Column]]:
        """Columns that are missing or of a wrong dtype, and those whose values can be checked."""
        problems, usable = [], []
        for column in self.schema.columns:
            wanted, allowed = FAMILIES[column.family]
            dtype = dtypes.get(column.name)
            sound = isinstance(dtype, allowed) and getattr(dtype, "time_zone", None) is None
            expected = pa.Column(dtype if sound else allowed[0], required=column.required, nullable=True)
            for reason in _failures(pa.DataFrameSchema({column.name: expected}), pl.DataFrame(schema=dtypes)):
                if reason is SchemaErrorReason.COLUMN_NOT_IN_DATAFRAME:
                    problems.append(
                        Problem(self.schema.name, column.name, "the column must be there", 0, "it is missing")
                    )
                else:
                    problems.append(
                        Problem(self.schema.name, column.name, f"dtype must be {wanted}", 0, f"it is {dtype}")
                    )
            if sound:
                usable.append(column)
        known = {column.name for column in self.schema.columns}
        usable += [
            Column(name, "text", "a feature", nullable=True, required=False)
            for name, dtype in dtypes.items()
            if name not in known and dtype == pl.String
        ]
        return problems, usable

    def _rules(self, column: Column, dtype: pl.DataType) -> pa.Column:
        """The rules of a column's values."""
        checks = []
        if column.family == "number":
            if dtype.is_float():
                checks.append(_check("must be a finite number", pl.col(column.name).is_finite()))
            if column.minimum is not None:
                rule = f"must not be below {column.minimum:g}"
                checks.append(pa.Check.ge(column.minimum, error=rule))
            if column.above is not None:
                checks.append(pa.Check.gt(column.above, error=f"must be above {column.above:g}"))
        if column.family == "timestamp":
            rule = f"must lie between {EARLIEST:%Y-%m-%d} and {LATEST:%Y-%m-%d}"
            checks.append(pa.Check.in_range(EARLIEST, LATEST, error=rule))
        if column.family == "kind":
            value = pl.col(column.name).cast(pl.String)
            checks.append(_check(f"must be one of {', '.join(KINDS)}", value.is_in(list(KINDS))))
        if dtype == pl.String:
            without = ~pl.col(column.name).str.contains("\0", literal=True)
            checks.append(_check("must not hold a NUL character", without))
        if column.references is not None and column.references in self.keys:
            known = self.keys[column.references]
            rule = f"must be a key of {column.references}"
            if known.dtype.is_integer() != dtype.is_integer():
                checks.append(_check(f"{rule}, whose dtype is {known.dtype}", pl.col(column.name).is_null()))
            else:
                common = pl.Int64 if dtype.is_integer() else pl.String
                value = pl.col(column.name).cast(common)
                checks.append(_check(rule, value.is_in(known.cast(common).implode())))
        return pa.Column(None, checks=checks, nullable=column.nullable, description=column.meaning)

    def _check_values(self, rules: pa.DataFrameSchema, batch: pl.DataFrame, offset: int) -> None:
        try:
            rules.validate(batch, lazy=True)
        except SchemaErrors as errors:
            for error in errors.schema_errors:
                column = error.schema.name
                if error.reason_code is SchemaErrorReason.SERIES_CONTAINS_NULLS:
                    self._note(column, "must not be null", batch[column].is_null(), batch[column], offset)
                elif error.reason_code is SchemaErrorReason.DATAFRAME_CHECK:
                    passed = error.check_output.lazy().select(pl.last()).collect().to_series()
                    self._note(column, error.check.error, ~passed, batch[column], offset)
                else:
                    raise TypeError(f"pandera could not check {self.schema.name}.{column}: {error}") from error

    def _note(self, column: str, rule: str, broken: pl.Series, values: pl.Series, offset: int) -> None:
        count = int(broken.sum())
        if not count:
            return
        if (column, rule) in self.found:
            self.found[column, rule].rows += count
            return
        first = int(broken.arg_true()[0])
        example = f"e.g. row {offset + first}"
        if column not in self.private:
            example += f": {values[first]!r}"
        self.found[column, rule] = _Finding(count, example)

    def _repeated_keys(self) -> list[Problem]:
        """Rows whose key another row has too; single keys that rise all the way never come here."""
        key = [pl.col(name) for name in self.schema.key]
        repeated = self.frame.select(key).group_by(key).len().filter(pl.col("len") > 1)
        summary = repeated.select(pl.col("len").sum().alias("rows"), *[part.first() for part in key])
        result = summary.collect(engine="streaming")
        rows = int(result["rows"][0] or 0)
        if not rows:
            return []
        private = set(self.schema.key) & self.private
        example = "the value identifies a person" if private else f"e.g. {result.select(key).row(0)}"
        return [Problem(self.schema.name, ", ".join(self.schema.key), "must be unique", rows, example)]


def _batches(frame: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    rows = frame.select(pl.len()).collect().item()
    for offset in range(0, rows, BATCH):
        yield frame.slice(offset, BATCH).collect()


def _check(rule: str, passed: pl.Expr) -> pa.Check:
    """A rule of rows; a null passes, since whether it may be there is another rule's matter."""

    def passes(data: PolarsData) -> pl.LazyFrame:
        return data.lazyframe.select(passed)

    return pa.Check(passes, error=rule)


def _failures(schema: pa.DataFrameSchema, frame: pl.DataFrame) -> list[SchemaErrorReason]:
    try:
        schema.validate(frame, lazy=True)
    except SchemaErrors as errors:
        return [error.reason_code for error in errors.schema_errors]
    return []
