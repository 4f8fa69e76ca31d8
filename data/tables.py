"""The five tables every source is turned into: their columns, and the rules they must obey.

=============  =======================================  ==================================================
table          key                                      a row is
=============  =======================================  ==================================================
advertisers    ``advertiser_id``                        somebody who advertises, and what it sells in words
ads            ``ad_id``                                an ad, or a product that is advertised
users          ``user_id``                              a user with profile columns
events         ``event_id``                             something a user saw, did or received
placements     ``ad_id, market_id, start, end``         an ad that runs in a market for a while
=============  =======================================  ==================================================

Each lies in ``<directory>/<table>.parquet``. Ids are whole numbers or strings; ``data.log`` alone turns them
into contiguous indexes. Columns beyond the schema are allowed in ``advertisers``, ``ads`` and ``users``: they
are categorical or text features, which the data config names before anything reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

import polars as pl

from data.errors import UserError

KINDS = (
    "impression",
    "click",
    "click_conversion",
    "view_conversion",
    "organic",
    "search",
    "visit",
    "coupon",
    "campaign",
)
EARLIEST, LATEST = datetime(1990, 1, 1), datetime(2100, 1, 1)

Family = Literal["id", "text", "category", "number", "timestamp", "kind"]

_FAMILIES: dict[Family, tuple[str, tuple[type[pl.DataType], ...]]] = {
    "id": (
        "whole number or string",
        (pl.Int64, pl.Int32, pl.Int16, pl.Int8, pl.UInt32, pl.UInt16, pl.UInt8, pl.String),
    ),
    "text": ("string", (pl.String, pl.Categorical, pl.Enum)),
    "category": ("string", (pl.String, pl.Categorical, pl.Enum)),
    "number": ("number", (pl.Float64, pl.Float32, pl.Int64, pl.Int32, pl.Int16, pl.Int8)),
    "timestamp": ("timestamp without time zone", (pl.Datetime,)),
    "kind": (f"string, one of {', '.join(KINDS)}", (pl.String, pl.Categorical, pl.Enum)),
}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: name in the Parquet file.
        family: what its dtype may be.
        meaning: what a value says.
        unit: unit of a number or timestamp.
        required: the column must be there.
        nullable: a value may be missing.
        minimum: smallest value of a number, included.
        references: table whose key the value must be in.
        private: values identify a person and stay out of messages.
    """

    name: str
    family: Family
    meaning: str
    unit: str = ""
    required: bool = True
    nullable: bool = False
    minimum: float | None = None
    references: str | None = None
    private: bool = False


@dataclass(frozen=True)
class Schema:
    """The columns of one table and the rules between them.

    Args:
        name: name of the table and stem of its file.
        key: columns that together are unique.
        columns: the columns.
        sorted_by: column in whose order the rows must be, if any.
        optional_rows: the table may be empty.
    """

    name: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    sorted_by: str | None = None
    optional_rows: bool = False


ADVERTISERS = Schema(
    "advertisers",
    ("advertiser_id",),
    (
        Column("advertiser_id", "id", "the advertiser"),
        Column("name", "text", "what people call it"),
        Column("text", "text", "what it sells, in words"),
    ),
)
ADS = Schema(
    "ads",
    ("ad_id",),
    (
        Column("ad_id", "id", "the ad"),
        Column("advertiser_id", "id", "whose ad it is", nullable=True, references="advertisers"),
        Column("text", "text", "what the ad shows, in words"),
    ),
)
USERS = Schema("users", ("user_id",), (Column("user_id", "id", "the user", private=True),))
EVENTS = Schema(
    "events",
    ("event_id",),
    (
        Column("event_id", "id", "the event"),
        Column("user_id", "id", "who it happened to", references="users", private=True),
        Column("timestamp", "timestamp", "when, by the source's own clock", "µs since 1970, no time zone"),
        Column("kind", "kind", "what happened"),
        Column("ad_id", "id", "the ad shown, clicked or converted with", nullable=True, references="ads"),
        Column("advertiser_id", "id", "the advertiser concerned", nullable=True, references="advertisers"),
        Column("value", "number", "money spent", "the source's currency", nullable=True, minimum=0),
        Column("market_id", "id", "where: store, region or site", nullable=True),
        Column("sample_weight", "number", "rows of the full log this one stands for", "rows", minimum=0),
        Column("request_id", "id", "the visit the event belongs to", nullable=True),
        Column("quantity", "number", "how much was bought", "pieces", required=False, nullable=True, minimum=0),
        Column(
            "discount",
            "number",
            "money taken off",
            "the source's currency",
            required=False,
            nullable=True,
            minimum=0,
        ),
        Column("display", "category", "where in the market the ad stood", required=False, nullable=True),
        Column("mailer", "category", "where in the leaflet the ad stood", required=False, nullable=True),
        Column("category", "category", "what was bought or received, in words", required=False, nullable=True),
    ),
    sorted_by="timestamp",
)
PLACEMENTS = Schema(
    "placements",
    ("ad_id", "market_id", "start", "end"),
    (
        Column("ad_id", "id", "the ad that runs", references="ads"),
        Column("market_id", "id", "where it runs"),
        Column("start", "timestamp", "first moment it runs", "µs since 1970, no time zone"),
        Column("end", "timestamp", "first moment it no longer runs", "µs since 1970, no time zone"),
        Column("display", "category", "where in the market it stands", required=False, nullable=True),
        Column("mailer", "category", "where in the leaflet it stands", required=False, nullable=True),
    ),
    sorted_by="start",
    optional_rows=True,
)
SCHEMAS: dict[str, Schema] = {schema.name: schema for schema in (ADVERTISERS, ADS, USERS, EVENTS, PLACEMENTS)}


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    Args:
        table: where.
        column: columns concerned, ``""`` for the whole table.
        rule: what must hold.
        rows: number of offending rows.
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


@dataclass(frozen=True)
class Tables:
    """The five tables; the two large ones are lazy.

    Args:
        advertisers: one row an advertiser.
        ads: one row an ad.
        users: one row a user.
        events: one row an event.
        placements: one row an ad, market and time.
    """

    advertisers: pl.DataFrame
    ads: pl.DataFrame
    users: pl.DataFrame
    events: pl.LazyFrame
    placements: pl.LazyFrame

    def __iter__(self) -> Iterator[tuple[Schema, pl.LazyFrame]]:
        for schema in SCHEMAS.values():
            yield schema, getattr(self, schema.name).lazy()

    def write(self, directory: Path) -> None:
        """Writes ``<table>.parquet`` of all five tables into an existing directory."""
        for schema, frame in self:
            frame.collect().write_parquet(directory / f"{schema.name}.parquet", compression="zstd", statistics=True)

    @classmethod
    def open(cls, directory: Path) -> Tables:
        """Opens a directory of tables; the values are not validated, ``validate`` does that.

        Args:
            directory: holds ``<table>.parquet`` of all five.

        Raises:
            UserError: files are missing or no Parquet. All are told at once.
        """
        errors: list[UserError] = []
        frames: dict[str, pl.LazyFrame] = {}
        for name in SCHEMAS:
            path = directory / f"{name}.parquet"
            try:
                frames[name] = pl.scan_parquet(path)
                frames[name].collect_schema()
            except FileNotFoundError:
                errors.append(
                    UserError(
                        f"{directory} without {path.name}",
                        expected=f"the files {', '.join(f'{table}.parquet' for table in SCHEMAS)}",
                        action="run `adsid data prepare`, or give the directory it wrote",
                    )
                )
            except (pl.exceptions.PolarsError, OSError) as error:
                errors.append(
                    UserError(
                        f"{path}: {error}",
                        expected="a readable Parquet file",
                        action="run `adsid data prepare` again",
                    )
                )
        if errors:
            raise UserError.collect(errors)
        small = {name: frames[name].collect() for name in ("advertisers", "ads", "users")}
        return cls(events=frames["events"], placements=frames["placements"], **small)


def validate(tables: Tables) -> None:
    """Checks every rule of the schemas and tells all that is broken in one error.

    Args:
        tables: the five tables.

    Raises:
        UserError: names table, column, rule, number of offending rows and an example of each problem.
    """
    problems = find_problems(tables)
    if problems:
        raise UserError.collect([problem.error() for problem in problems])


def find_problems(tables: Tables) -> list[Problem]:
    """All broken rules, in the order of tables and columns."""
    keys: dict[str, pl.Series] = {}
    for name in ("advertisers", "ads", "users"):
        small: pl.DataFrame = getattr(tables, name)
        key = SCHEMAS[name].key[0]
        if key in small.columns:
            keys[name] = small[key].drop_nulls().unique()
    problems: list[Problem] = []
    for schema, frame in tables:
        problems += _table_problems(schema, frame, keys)
    return problems


def _table_problems(schema: Schema, frame: pl.LazyFrame, keys: Mapping[str, pl.Series]) -> list[Problem]:
    dtypes = frame.collect_schema()
    problems: list[Problem] = []
    usable: list[Column] = []
    for column in schema.columns:
        if column.name not in dtypes:
            if column.required:
                problems.append(Problem(schema.name, column.name, "the column must be there", 0, "it is missing"))
            continue
        dtype, (wanted, allowed) = dtypes[column.name], _FAMILIES[column.family]
        if isinstance(dtype, allowed) and getattr(dtype, "time_zone", None) is None:
            usable.append(column)
        else:
            problems.append(Problem(schema.name, column.name, f"dtype must be {wanted}", 0, f"it is {dtype}"))
    for name in set(dtypes) - {column.name for column in schema.columns}:
        if isinstance(dtypes[name], pl.String):
            usable.append(Column(name, "text", "", nullable=True, required=False))
    usable.sort(key=lambda column: list(dtypes).index(column.name))

    rules = [rule for column in usable for rule in _rules(column, dtypes[column.name], keys)]
    names = {column.name for column in usable}
    if {"start", "end"} <= names:
        rules.append(_Rule("start, end", "end must be after start", pl.col("end") <= pl.col("start"), "end"))
    if schema.sorted_by is not None and schema.sorted_by in names:
        step = pl.col(schema.sorted_by) < pl.col(schema.sorted_by).shift(1)
        rules.append(_Rule(schema.sorted_by, f"rows must be in order of {schema.sorted_by}", step, schema.sorted_by))
    expressions = [pl.len().alias("rows")]
    for number, rule in enumerate(rules):
        broken = rule.broken.fill_null(False)
        expressions += [broken.sum().alias(f"count_{number}"), broken.arg_max().alias(f"row_{number}")]
    found = frame.select(expressions).collect().row(0, named=True)
    if found["rows"] == 0 and not schema.optional_rows:
        problems.append(Problem(schema.name, "", "the table must have rows", 0, "it is empty"))
    for number, rule in enumerate(rules):
        count, row = found[f"count_{number}"], found[f"row_{number}"]
        if count:
            example = f"e.g. row {row}"
            if not rule.private:
                value = frame.select(pl.col(rule.example).slice(row, 1)).collect().item()
                example += f": {value!r}"
            problems.append(Problem(schema.name, rule.column, rule.rule, count, example))
    if set(schema.key) <= names:
        problems += _duplicate_keys(schema, frame)
    return problems


@dataclass(frozen=True)
class _Rule:
    column: str
    rule: str
    broken: pl.Expr
    example: str
    private: bool = field(default=False)


def _rules(column: Column, dtype: pl.DataType, keys: Mapping[str, pl.Series]) -> Iterator[_Rule]:
    """The rules of one column as expressions that are true where a row breaks them."""

    def rule(text: str, broken: pl.Expr) -> _Rule:
        return _Rule(column.name, text, broken, column.name, column.private)

    value = pl.col(column.name)
    if not column.nullable:
        yield rule("must not be null", value.is_null())
    if column.family == "number":
        if dtype.is_float():
            yield rule("must be a finite number", ~value.is_finite())
        if column.minimum is not None:
            yield rule(f"must not be below {column.minimum:g}", value < column.minimum)
    if column.family == "timestamp":
        text = f"must lie between {EARLIEST:%Y-%m-%d} and {LATEST:%Y-%m-%d}"
        yield rule(text, ~value.is_between(EARLIEST, LATEST))
    if column.family == "kind":
        yield rule(f"must be one of {', '.join(KINDS)}", ~value.cast(pl.String).is_in(list(KINDS)))
    if isinstance(dtype, pl.String):
        yield rule("must not hold a NUL character", value.str.contains("\0", literal=True))
    if column.references is not None and column.references in keys:
        known = keys[column.references]
        text = f"must be a key of {column.references}"
        if known.dtype.is_integer() != dtype.is_integer():
            yield rule(f"{text}, whose dtype is {known.dtype}", value.is_not_null())
        else:
            common = pl.Int64 if dtype.is_integer() else pl.String
            yield rule(text, ~value.cast(common).is_in(known.cast(common).implode()))


def _duplicate_keys(schema: Schema, frame: pl.LazyFrame) -> list[Problem]:
    """Rows whose key another row has too; rows in order of the key need no hash table."""
    key = [pl.col(name) for name in schema.key]
    repeated = frame.select(key).group_by(key).len().filter(pl.col("len") > 1)
    summary = repeated.select(pl.col("len").sum().alias("rows"), *[part.first() for part in key]).collect()
    rows = int(summary["rows"][0] or 0)
    if not rows:
        return []
    private = any(column.private for column in schema.columns if column.name in schema.key)
    example = "the value identifies a person" if private else f"e.g. {summary.select(key).row(0)}"
    return [Problem(schema.name, ", ".join(schema.key), "must be unique", rows, example)]
