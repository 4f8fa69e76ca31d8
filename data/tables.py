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

``data.writer`` writes tables, ``data.validation`` checks them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
BROWSING = ("click", "search", "visit", "coupon")
"""Kinds of what a user does without buying."""
ENTITIES = ("advertiser", "item")
"""What later stages take for an advertiser: the advertisers of the tables, or every ad (`Tables.of_items`)."""
NAME_LETTERS = 60
"""Of an ad's text, that an item is called by."""
EARLIEST, LATEST = datetime(1990, 1, 1), datetime(2100, 1, 1)

Family = Literal["id", "text", "category", "number", "timestamp", "kind"]

FAMILIES: dict[Family, tuple[str, tuple[type[pl.DataType], ...]]] = {
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
"""What a family is called, and its dtypes."""


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
        above: a number that every value is above.
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
    above: float | None = None
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
        Column(
            "advertiser_id",
            "id",
            "the advertiser concerned; empty beside an ad: the ad's own",
            nullable=True,
            references="advertisers",
        ),
        Column("value", "number", "money spent", "the source's currency", nullable=True, minimum=0),
        Column("market_id", "id", "where: store, region or site", nullable=True),
        Column("sample_weight", "number", "rows of the full log this one stands for", "rows", above=0),
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
        Column("action", "category", "what kind of visit it was", required=False, nullable=True),
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

    def rows(self) -> dict[str, int]:
        """Number of rows of each table."""
        return {schema.name: int(frame.select(pl.len()).collect().item()) for schema, frame in self}

    def of_items(self) -> Tables:
        """The same log, with every ad an advertiser of its own.

        Its text is the ad's, behind the name of who advertises it, which is told nowhere else any more; its name is the
        beginning of the ad's text. An event without an ad has no advertiser.
        """
        own = pl.col("ad_id").alias("advertiser_id")
        owner, text = (pl.col(name).cast(pl.String).replace("", None) for name in ("name", "text"))
        owners = self.advertisers.select("advertiser_id", owner.alias("owner"))
        return replace(
            self,
            advertisers=self.ads.join(owners, on="advertiser_id", how="left", maintain_order="left").select(
                own,
                text.fill_null("").str.head(NAME_LETTERS).alias("name"),
                pl.concat_str("owner", text, separator=", ", ignore_nulls=True).alias("text"),
            ),
            ads=self.ads.with_columns(own),
            events=self.events.with_columns(own),
        )

    def labels(self, kinds: Sequence[str]) -> pl.LazyFrame:
        """Events of the kinds that are conversions."""
        return self.events.filter(pl.col("kind").cast(pl.String).is_in(list(kinds)))

    @classmethod
    def open(cls, directory: Path) -> Tables:
        """Opens a directory of tables; the values are not validated, ``data.validation`` does that.

        Args:
            directory: holds ``<table>.parquet`` of all five.

        Raises:
            UserError: files are missing or no Parquet. All are told at once.
        """
        frames, errors = scan(directory)
        if errors:
            raise UserError.collect(errors)
        small = {name: frames[name].collect() for name in ("advertisers", "ads", "users")}
        return cls(events=frames["events"], placements=frames["placements"], **small)


def scan(directory: Path) -> tuple[dict[str, pl.LazyFrame], list[UserError]]:
    """The tables of a directory that can be opened, and an error for each that cannot."""
    errors: list[UserError] = []
    frames: dict[str, pl.LazyFrame] = {}
    for name in SCHEMAS:
        path = directory / f"{name}.parquet"
        try:
            frame = pl.scan_parquet(path, glob=False)
            frame.collect_schema()
        except FileNotFoundError:
            errors.append(
                UserError(
                    f"{directory} without {path.name}",
                    expected=f"the files {', '.join(f'{table}.parquet' for table in SCHEMAS)}",
                    action="run `adsid data prepare`, or give the directory it wrote",
                )
            )
        except (pl.exceptions.PolarsError, OSError) as error:
            errors.append(unreadable(path, error))
        else:
            frames[name] = frame
    return frames, errors


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that is no sound Parquet."""
    return UserError(
        f"{path}: {str(error).splitlines()[0]}",
        expected="a readable Parquet file",
        action=f"write {path.name} again, e.g. with `adsid data prepare`",
    )
