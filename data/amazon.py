"""Amazon reviews of one category, as their publishers offer them (McAuley Lab): 2014, 2018 and 2023.

====  =======================================  =================================  =============================
year  reviews                                  items                              times
====  =======================================  =================================  =============================
2014  ``reviews_<Category>[_5].json[.gz]``     ``meta_<Category>.json[.gz]``      ``unixReviewTime``, days
2018  ``<Category>[_5].json[.gz]``             ``meta_<Category>.json[.gz]``      ``unixReviewTime``, days
2023  ``<Category>.jsonl[.gz]``, ``.parquet``  ``meta_<Category>`` with the same  ``timestamp``, milliseconds
====  =======================================  =================================  =============================

``data.path`` is a directory with one file of each. A line is JSON or, in the items of 2014, a Python literal. What is
read: ``reviewerID`` (2023: ``user_id``), ``asin`` (2023: ``parent_asin``) and the time of a review; the item's
``title``, ``brand`` (2023: ``details.Brand``, else ``store``), ``categories`` (2014: the first of its paths; 2018:
``category``), ``main_category`` where there are none, and ``price``.

Brand = advertiser, item = ad, review = ``click_conversion``; see :mod:`data.catalogue` for the rest. A brand is known
by its letters without case and surplus blanks. Times are UTC. The same review twice (user, item and time; 2018 has
many) counts once. A review has no ``value``: ``price`` is what the catalogue said when it was crawled, years after most
reviews, and stands in ``ads`` as such, in dollars.

No k-core is made here: the publishers offer 5-core files. With one of them (``_5`` in its name) the ads are the items
that occur in it, since the publisher's choice of items is what the data set *is*; with all reviews they are all items
of the catalogue, reviewed or not. The former choice was made with all reviews at hand, later ones too: that belongs to
the published data, and holds for every model alike.

Reviews pass through in batches; they are sorted and joined on disk.
"""

from __future__ import annotations

import ast
import html
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from data.catalogue import LEVELS, ads_of, advertisers_of, placements_of, write_events
from data.config import DataConfig
from data.duck import batches
from data.errors import UserError
from data.rawfile import Findings, read_lines
from data.sampling import trial_users
from data.split import Calendar
from data.tables import EARLIEST, LATEST
from data.writer import TableWriter

_SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")
_META = ("meta_", "raw_meta_")
_CORE = re.compile(r"_\d+\.json(\.gz)?$")
_EPOCH = datetime(1970, 1, 1)
_BATCH = 1 << 17
"""Rows of a batch, read or written."""
_DEPTH = 4
"""Levels of a category that are kept; 2018 has facts about the item (``100% cotton``) behind them."""
_NO_BRAND = {"", "unknown", "n/a", "none", "null"}
_ELEMENTS = (
    "a b body br center dd div dl dt em embed font form h1 h2 h3 h4 h5 h6 head hr html i iframe img input li link "
)
_ELEMENTS += "meta object ol p param pre script small span strong style sub sup table tbody td th title tr tt u ul"
_MARKUP = re.compile(
    rf"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?(?:{_ELEMENTS.replace(' ', '|')})\b[^<>]*>", re.IGNORECASE | re.DOTALL
)
"""Tags of HTML by name, so that what only looks like a tag (a model's ``<unk>`` or ``</s>``) stays text."""
_SCRIPT = re.compile(r"getTime\(|[.#][\w-]+\s*\{[^}]*:")
"""A page's script or style sheet that was crawled in place of a text."""
_PRICE = re.compile(r"\$?\s*(\d[\d,]*(?:\.\d+)?)")


@dataclass(frozen=True)
class Format:
    """Fields of one generation of the files.

    Args:
        user, item, time: fields of a review; ``item`` is one of an item too.
        unit: microseconds of one unit of ``time``.
        time_unit: its name.
    """

    user: str
    item: str
    time: str
    unit: int
    time_unit: str


FORMAT_2014 = Format("reviewerID", "asin", "unixReviewTime", 1_000_000, "seconds")
"""2014 and 2018."""
FORMAT_2023 = Format("user_id", "parent_asin", "timestamp", 1_000, "milliseconds")


@dataclass(frozen=True)
class Files:
    """What lies in ``data.path``."""

    reviews: Path
    items: Path
    format: Format

    @property
    def is_core(self) -> bool:
        """The publisher chose users and items that occur often."""
        return bool(_CORE.search(self.reviews.name))


def read(cfg: DataConfig, out: TableWriter) -> None:
    """Write the tables of a category.

    Args:
        cfg: ``path`` is the directory of the files.
        out: where to.

    Raises:
        UserError: no path, other than one file of reviews and one of items, rules of the format that are broken (all
            problems of both files at once), or items that are not those of the reviews.
    """
    files = find(cfg)
    items_path, items_findings = _to_parquet(files.items, _item_of(files.format), _ITEM, out)
    reviews_path, findings = _to_parquet(files.reviews, _review_of(files.format), _REVIEW, out)
    if items_findings or findings:
        raise UserError.collect([*items_findings.errors(), *findings.errors()])
    reviews = pl.scan_parquet(reviews_path, glob=False)
    items = _items(pl.scan_parquet(items_path, glob=False), reviews if files.is_core else None)
    _check_overlap(files, reviews, items)

    ads = ads_of(items)
    known = reviews.join(ads.lazy().select(item_id="ad_id"), on="item_id", how="semi")
    users = None
    if cfg.max_users is not None:
        users = trial_users(cfg, known, reviews)
        known = known.filter(pl.col("user_id").is_in(users.implode()))
    calendar = cfg.calendar(known.select(pl.col("timestamp").min()).collect(engine="streaming").item())

    out.write("advertisers", advertisers_of(items))
    out.write("ads", ads)
    with out.duckdb() as connection:
        by_user = batches(connection, _sorted(reviews_path, ("user_id", "timestamp", "item_id")))
        placed, total = _place(out, by_user, ads, users, calendar)
        by_time = batches(connection, _sorted(placed, ("timestamp", "user_id", "item_id")))
        write_events(out, by_time, ads, cfg, total=total)
    out.write("placements", placements_of(ads, calendar.start(1)))


def files(directory: Path) -> list[Path]:
    """The files of a directory that can be ones of reviews or items, none where there is no such directory."""
    entries = sorted(directory.iterdir()) if directory.is_dir() else []
    return [path for path in entries if path.is_file() and path.name.endswith(_SUFFIXES)]


def find(cfg: DataConfig) -> Files:
    """The two files of ``cfg.path``.

    Raises:
        UserError: there is not exactly one of each, or they are of different years.
    """
    wanted = (
        "one file of reviews and one of items: reviews_<Category>_5.json.gz or <Category>_5.json.gz and "
        "meta_<Category>.json.gz, or <Category>.jsonl.gz and meta_<Category>.jsonl.gz (or .parquet)"
    )
    if cfg.path is None:
        raise UserError(
            "data=amazon without a path",
            expected=f"a directory with {wanted}",
            action="set data.path to the directory of the files you downloaded",
        )
    directory = Path(cfg.path).expanduser()
    found = files(directory)
    items = [path for path in found if path.name.startswith(_META)]
    reviews = [path for path in found if path not in items]
    in_lines = {path: path.name.endswith((".json", ".json.gz")) for path in found}
    if len(items) != 1 or len(reviews) != 1 or in_lines[items[0]] != in_lines[reviews[0]]:
        names = ", ".join(path.name for path in found) or (
            "nothing of the kind" if directory.is_dir() else "no such directory"
        )
        raise UserError(
            f"data.path={directory} with {names}",
            expected=wanted,
            action="leave one file of reviews and the file of items that belongs to it, of the same year",
        )
    return Files(reviews[0], items[0], FORMAT_2014 if in_lines[items[0]] else FORMAT_2023)


Record = Mapping[str, Any]
Note = Callable[[str, str, object], None]
Row = tuple[Any, ...]

_ITEM = pl.Schema(dict.fromkeys(("item_id", "advertiser_id", "brand", "title", "categories"), pl.String()))
_ITEM["price"] = pl.Float32()
_REVIEW = pl.Schema([("user_id", pl.String()), ("item_id", pl.String()), ("timestamp", pl.Datetime("us"))])
_PLACED = pl.Schema([*_REVIEW.items(), ("ad", pl.Int64()), ("period", pl.Int32()), ("bought", pl.List(pl.Int64))])


def _review_of(fmt: Format) -> Callable[[Record, Note], Row | None]:
    first, last = ((moment - _EPOCH) // timedelta(microseconds=1) for moment in (EARLIEST, LATEST))
    in_range = f"must be {fmt.time_unit} since 1970, between {EARLIEST:%Y} and {LATEST:%Y}"

    def review(record: Record, note: Note) -> Row | None:
        user = _id(record, fmt.user, note, private=True)
        item = _id(record, fmt.item, note, private=True)  # it may be a user, where fields are mixed up
        time = record.get(fmt.time)
        if not isinstance(time, int) or isinstance(time, bool):
            note(fmt.time, "must be there" if time is None else "must be a whole number", None)
            return None
        moment = time * fmt.unit
        if not first <= moment < last:
            note(fmt.time, in_range, time)
            return None
        return (user, item, moment) if user and item else None

    return review


def _item_of(fmt: Format) -> Callable[[Record, Note], Row | None]:
    def item(record: Record, note: Note) -> Row | None:
        key = _id(record, fmt.item, note)
        texts = {name: _text(record, name, note) for name in ("title", "brand", "store", "main_category")}
        brand = clean(texts["brand"] or _detail(record) or texts["store"])
        path = [name for name in map(clean, _categories(record, note) or [texts["main_category"]]) if name]
        if key is None:
            return None
        advertiser = brand.casefold()
        known = advertiser not in _NO_BRAND
        return (
            key,
            advertiser if known else None,
            brand if known else None,
            clean(texts["title"]),
            LEVELS.join(path[:_DEPTH]),
            _price(record.get("price")),
        )

    return item


def _id(record: Record, name: str, note: Note, *, private: bool = False) -> str | None:
    value = record.get(name)
    shown = None if private else value
    if value is None:
        note(name, "must be there", None)
    elif not isinstance(value, str):
        note(name, "must be a string", shown)
    elif not value.strip():
        note(name, "must not be empty", shown)
    elif "\0" in value:
        note(name, "must not hold a NUL character", shown)
    else:
        return value.strip()
    return None


def _text(record: Record, name: str, note: Note) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        note(name, "must be a string", value)
        return ""
    if "\0" in value:
        note(name, "must not hold a NUL character", value)
    return value


def _detail(record: Record) -> str:
    """The brand among the details of 2023, which Parquet files hold as JSON."""
    details = record.get("details")
    if isinstance(details, str):
        details = parse(details)
    brand = details.get("Brand") if isinstance(details, dict) else None
    return brand if isinstance(brand, str) and "\0" not in brand else ""


def _categories(record: Record, note: Note) -> list[str]:
    """The path of an item's category; 2014 has a list of paths."""
    name = "category" if "categories" not in record else "categories"
    path = record.get(name)
    if isinstance(path, list) and path and isinstance(path[0], list):
        path = path[0]
    if path is None:
        return []
    if not isinstance(path, list) or not all(isinstance(level, str) for level in path):
        note(name, "must be a list of strings", path)
        return []
    if any("\0" in level for level in path):
        note(name, "must not hold a NUL character", path)
    return path


def _price(value: object) -> float | None:
    """Dollars, where the catalogue has one price; a range and crawled markup are none."""
    if isinstance(value, str):
        match = _PRICE.fullmatch(value.strip())
        value = float(match[1].replace(",", "")) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        return None
    return float(value)


def clean(text: str) -> str:
    """A crawled text without HTML, entities resolved, on one line; ``""`` where a script was crawled instead."""
    if "<" in text:
        text = _MARKUP.sub(" ", text)
    if _SCRIPT.search(text):
        return ""
    return " ".join(html.unescape(text).split())


def parse(line: str) -> Any:
    """The value of a line of JSON or, failing that, of a Python literal; None where it is neither."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(line)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _records(path: Path, findings: Findings, out: TableWriter) -> Iterator[tuple[int, Record]]:
    """The rows of a file with their numbers."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path, findings, out)
        return
    for number, line in read_lines(path, findings, track=out.track):
        if not line.strip():
            continue
        record = parse(line)
        if isinstance(record, dict):
            yield number, record
        else:
            findings.note("", "must be a JSON object or the Python literal of one", number)


def _parquet_rows(path: Path, findings: Findings, out: TableWriter) -> Iterator[tuple[int, Record]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            fields = [name for name in file.schema_arrow.names if name in _FIELDS]
            with out.track(f"reading {path.name}", file.metadata.num_rows) as advance:
                for batch in file.iter_batches(_BATCH, columns=fields):
                    for record in batch.to_pylist():
                        number += 1
                        yield number, record
                    advance(len(batch))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        findings.tell("", "must be a sound Parquet file", f"after {number} rows: {str(error).splitlines()[0]}")
    else:
        if not number:
            findings.tell("", "must have rows", "it is empty")


_FIELDS = {FORMAT_2023.user, FORMAT_2023.item, FORMAT_2023.time, "title", "store", "main_category", "categories"}
_FIELDS |= {"details", "price"}


def _to_parquet(
    path: Path, row_of: Callable[[Record, Note], Row | None], schema: pl.Schema, out: TableWriter
) -> tuple[Path, Findings]:
    """A file's rows as a Parquet file of the scratch directory; once a problem is found it only looks for more."""
    findings = Findings(path, unit="row" if path.suffix == ".parquet" else "line")
    parquet = out.scratch / f"{path.name}.rows"
    rows: list[Row] = []
    with pq.ParquetWriter(parquet, schema.to_frame().to_arrow().schema) as writer, warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # of backslashes in a literal's texts
        for number, record in _records(path, findings, out):
            row = row_of(record, partial(_note, findings, number))
            if row is not None and not findings:
                rows.append(row)
            if len(rows) == _BATCH:
                writer.write_table(pl.DataFrame(rows, schema, orient="row").to_arrow())
                rows.clear()
        writer.write_table(pl.DataFrame(rows, schema, orient="row").to_arrow())
    return parquet, findings


def _note(findings: Findings, number: int, column: str, rule: str, value: object) -> None:
    findings.note(column, rule, number, value)


def _items(items: pl.LazyFrame, reviews: pl.LazyFrame | None) -> pl.DataFrame:
    """The catalogue as :func:`data.catalogue.ads_of` reads it, each item once: of several rows the fullest one.

    Args:
        items: rows of the file.
        reviews: keep their items only; None keeps all.
    """
    if reviews is not None:
        items = items.join(reviews.select("item_id").unique(), on="item_id", how="semi")
    fullest = ("item_id", pl.col("brand").is_null(), pl.col("title") == "", "title", "brand", "categories", "price")
    return items.sort(*fullest).unique("item_id", keep="first", maintain_order=True).collect()


def _check_overlap(files: Files, reviews: pl.LazyFrame, items: pl.DataFrame) -> None:
    known = pl.col("item_id").is_in(items["item_id"].implode())
    total, unknown = reviews.select(pl.len(), (~known).sum()).collect(engine="streaming").row(0)
    if 2 * unknown > total:
        raise UserError(
            f"{files.reviews}: {unknown} of {total} reviews are of items that {files.items.name} does not have",
            expected="the items of the same category and year as the reviews",
            action=f"get the file of items that belongs to {files.reviews.name}",
        )


def _place(
    out: TableWriter, by_user: Iterator[pl.DataFrame], ads: pl.DataFrame, users: pl.Series | None, calendar: Calendar
) -> tuple[Path, int]:
    """Writes the users, and each of their reviews once as :func:`data.catalogue.write_events` reads it.

    Args:
        out: where to.
        by_user: reviews in order of user, time and item.
        ads: the table of ads.
        users: whom to keep; None keeps all.
        calendar: tells the periods.

    Returns:
        A file in the scratch directory, in that order, and the number of its rows.
    """
    rows = ads.select(pl.col("ad_id").alias("item_id")).with_row_index("ad").cast({"ad": pl.Int64})
    path, total = out.scratch / "placed.rows", 0
    with pq.ParquetWriter(path, _PLACED.to_frame().to_arrow().schema) as writer:
        for frame in _whole_users(by_user):
            if users is not None:
                frame = frame.filter(pl.col("user_id").is_in(users.implode()))
            frame = frame.unique(maintain_order=True).join(rows, on="item_id", how="left", maintain_order="left")
            placed = _with_visits(frame, calendar)
            writer.write_table(placed.to_arrow())
            out.write("users", placed.select(pl.col("user_id").unique(maintain_order=True)))
            total += len(placed)
    return path, total


def _whole_users(by_user: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """The same rows in batches that no user lies in two of."""
    rest = pl.DataFrame(schema=_REVIEW)
    for frame in by_user:
        frame = pl.concat([rest, frame.select(_REVIEW.names())])
        ends = pl.col("user_id") == frame["user_id"][-1]
        rest = frame.filter(ends)
        yield frame.filter(~ends)
    yield rest


def _with_visits(frame: pl.DataFrame, calendar: Calendar) -> pl.DataFrame:
    """Adds the period, and to the row that opens a visit the ads of the visit."""
    period = calendar.period_expr(pl.col("timestamp").to_physical())
    frame = frame.with_columns(pl.when(period > 0).then(period).alias("period"))
    visits = (
        frame.drop_nulls(["period", "ad"])
        .group_by("user_id", "period", maintain_order=True)
        .agg(pl.col("timestamp", "ad").first(), pl.col("ad").unique(maintain_order=True).alias("bought"))
        .drop("period")
    )
    return frame.join(visits, on=["user_id", "timestamp", "ad"], how="left", maintain_order="left").select(
        _PLACED.names()
    )


def _sorted(path: Path, keys: Sequence[str]) -> str:
    """A query for the rows of a Parquet file in order."""
    literal = re.sub(r"([*?\[])", r"[\1]", str(path)).replace("'", "''")
    return f"select * from read_parquet('{literal}') order by {', '.join(keys)}"
