"""Sequences of items: the academic format of sequential recommendation, without timestamps.

Two files in one directory:

``sequences.txt``
    a line a user: ``user item item …``, oldest first, parted by blanks. Ids are strings, numbers too.
``items.tsv``
    parted by tabs, nothing quoted: ``item_id``, ``brand``, ``categories`` (a path, ``Skin Care > Face``), ``title``;
    further columns, e.g. ``description``, are text and become columns of ``ads`` as they are.

Brand = advertiser (each spelling its own, as the publishers count them), item = ad, each interaction = a
``click_conversion``; see :mod:`data.catalogue` for the rest. Nothing is filtered: published subsets are 5-core
already. An item without a brand stays, as an ad of no advertiser.

Only the order is known, so timestamps are ordinals: one period (a day) a step, counted back from each user's last
event. The **last** event is the test, the **last but one** validation; everything before it is what a retriever may
learn from, as in the standard protocol (leave-one-out, full ranking over all items). The event before those two is
the ranker's, and what is older is the prior's. Each of the two has a span of its own to stop and choose by, and a
user has but one event to give, so one user in ten gives it to that span (by a hash of the user's id)::

    from the end   …    6    5  |  4 of nine  4 of one  |  3 of nine  3 of one |   2         1
                                |  in ten     in ten    |  in ten     in ten   |
    period       …  P-7  P-6    |  P-5        P-4       |  P-3        P-2      |   P-1       P
    span         ──── prior_fit ───────────►  prior_     ranker_     ranker_      validation test
                                              select     fit         stop

Every user's order is kept and no two events of a user share a period. ``P`` is two more than the longest sequence, so
that its first item lies in period 1. A user with fewer items has those that are there, the test first.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl

from data.catalogue import ads_of, advertisers_of, placements_of, write_events
from data.config import DataConfig
from data.errors import UserError
from data.rawfile import Findings, read_lines
from data.sampling import hash_ids, trial_users
from data.split import TimeSplit
from data.tables import LATEST
from data.writer import TableWriter

FILES = ("sequences.txt", "items.tsv")
COLUMNS = ("item_id", "brand", "categories", "title")
"""Columns ``items.tsv`` must have."""
RESERVED = ("ad_id", "advertiser_id", "text", "category")
"""Columns of ``ads`` that are made here."""
ORIGIN = datetime(2000, 1, 1)
"""Start of period 1 where the config says nothing."""
SELECT = 10
"""One user in so many gives an event to the prior's selection span, and one in so many to the ranker's."""
_RANKER_STOP, _PRIOR_SELECT = 3, 4
"""Seeds of the two choices; not ``cfg.seed``, so that every seed of a study has the same split."""


def read(cfg: DataConfig, out: TableWriter) -> None:
    """Write the tables of two text files.

    Args:
        cfg: ``path`` is their directory.
        out: where to.

    Raises:
        UserError: no path, a missing file, or rules of the format that are broken; all problems of both at once.
    """
    directory = _directory(cfg)
    items, items_findings = _read_items(directory / "items.tsv")
    known = None if items is None else set(items["item_id"])
    sequences, findings = _read_sequences(directory / "sequences.txt", known)
    if items is None or items_findings or findings:
        raise UserError.collect([*items_findings.errors(), *findings.errors()])

    calendar = cfg.calendar(ORIGIN)
    ads = ads_of(items)
    conversions = _conversions(sequences, ads)
    step = pl.duration(microseconds=calendar.length_us)
    first = pl.lit(calendar.start(1), pl.Datetime("us"))
    conversions = conversions.with_columns((first + (pl.col("period").cast(pl.Int64) - 1) * step).alias("timestamp"))
    if conversions["timestamp"].max() >= LATEST:  # type: ignore[operator]
        longest = sequences["item"].list.len().max()
        raise UserError(
            f"{directory / 'sequences.txt'}: a sequence of {longest!r} items",
            expected=f"one step of {calendar.days} days an item from {calendar.origin}, before {LATEST:%Y}",
            action="set data.label_window_days=1 and an earlier data.origin",
        )
    if cfg.max_users is not None:
        users = trial_users(cfg, conversions.lazy(), conversions.lazy())
        conversions = conversions.filter(pl.col("user_id").is_in(users.implode()))
    conversions = conversions.sort("timestamp", "user_id")

    out.write("advertisers", advertisers_of(items))
    out.write("ads", ads)
    out.write("users", conversions.select(pl.col("user_id").unique().sort()))
    write_events(out, [conversions], ads, cfg, total=len(conversions))
    out.write("placements", placements_of(ads, calendar.start(1)))


def periods_of(from_end: pl.Expr, user: pl.Series, last: int) -> pl.Expr:
    """The period of each event; see the diagram above.

    Args:
        from_end: 1 for a user's last event, 2 for the one before it.
        user: the user of each event.
        last: the last period.

    Returns:
        Periods, for a frame of as many rows as ``user`` has.
    """
    of_one_in_ten = {
        seed: pl.Series(hash_ids(user.to_numpy(), seed=seed) % np.uint64(SELECT) == 0)
        for seed in (_RANKER_STOP, _PRIOR_SELECT)
    }
    back = (
        pl.when(from_end <= 2)
        .then(from_end - 1)
        .when(from_end == 3)
        .then(pl.when(pl.lit(of_one_in_ten[_RANKER_STOP])).then(2).otherwise(3))
        .when(from_end == 4)
        .then(pl.when(pl.lit(of_one_in_ten[_PRIOR_SELECT])).then(4).otherwise(5))
        .otherwise(from_end + 1)
    )
    return (last - back).cast(pl.Int32)


def _conversions(sequences: pl.DataFrame, ads: pl.DataFrame) -> pl.DataFrame:
    """One row an interaction, each of them a visit: ``user_id``, ``period``, ``ad``, ``bought``."""
    lengths = sequences["item"].list.len()
    last = max(int(lengths.max()) + 2, len(TimeSplit.names()))  # type: ignore[arg-type]
    rows = ads.select(pl.col("ad_id").alias("item")).with_row_index("ad").cast({"ad": pl.Int64})
    events = (
        sequences.with_columns(pl.int_ranges(lengths.cast(pl.Int64), 0, -1).alias("from_end"))
        .explode("item", "from_end")
        .join(rows, on="item", how="left", maintain_order="left")
    )
    return events.select(
        "user_id",
        periods_of(pl.col("from_end"), events["user_id"], last).alias("period"),
        "ad",
        pl.concat_list("ad").alias("bought"),
    )


def files(directory: Path) -> list[Path]:
    """The files that are read of a directory."""
    return [directory / name for name in FILES]


def _directory(cfg: DataConfig) -> Path:
    if cfg.path is None:
        raise UserError(
            "data=sequences without a path",
            expected=f"a directory with {' and '.join(FILES)}",
            action="set data.path; data/sequences.py describes the files",
        )
    directory = Path(cfg.path).expanduser()
    missing = [path.name for path in files(directory) if not path.is_file()]
    if missing:
        raise UserError(
            f"data.path={directory} without {' and '.join(missing)}",
            expected=f"a directory with {' and '.join(FILES)}",
            action="set data.path to the directory of these files; data/sequences.py describes them",
        )
    return directory


def _read_items(path: Path) -> tuple[pl.DataFrame | None, Findings]:
    """The catalogue as :func:`data.catalogue.ads_of` reads it, None where the header cannot be used."""
    findings = Findings(path)
    lines = read_lines(path, findings)
    header = next(lines, (0, ""))[1].removeprefix("\ufeff").split("\t")
    if not findings:
        _check_header(header, findings)
    if findings:
        return None, findings
    rows: list[list[str]] = []
    seen: set[str] = set()
    key = header.index("item_id")
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) != len(header):
            findings.note("", f"must have {len(header)} fields parted by tabs, as the header has", number, len(fields))
            fields = (fields + [""] * len(header))[: len(header)]
        item = fields[key].strip()
        if not item or any(char.isspace() for char in item):
            findings.note("item_id", "must be an id without blanks", number, fields[key])
        elif item in seen:
            findings.note("item_id", "must be unique", number, item)
        seen.add(item)
        rows.append([*fields[:key], item, *fields[key + 1 :]])
    if not rows and not findings:
        findings.tell("", "must have items", "it has a header alone")
    items = pl.DataFrame(rows, schema=dict.fromkeys(header, pl.String), orient="row")
    brand = pl.col("brand").str.strip_chars()
    return (
        items.with_columns(
            brand,
            brand.replace("", None).alias("advertiser_id"),
            pl.col("categories", "title").str.strip_chars(),
        ),
        findings,
    )


def _check_header(header: list[str], findings: Findings) -> None:
    shown = f"it has {', '.join(header)}"
    for name in COLUMNS:
        if name not in header:
            findings.tell(name, "must be a column of the header", shown)
    for name in RESERVED:
        if name in header:
            findings.tell(name, "must not be a column: the table of ads has one of this name", shown)
    for name in sorted({name for name in header if not name or header.count(name) > 1}):
        findings.tell(name or "header", "must name every column, each once", shown)


def _read_sequences(path: Path, known: set[str] | None) -> tuple[pl.DataFrame, Findings]:
    """``user_id`` and the list ``item`` of each user; items are not checked where the catalogue is None."""
    findings = Findings(path)
    users: list[str] = []
    items: list[list[str]] = []
    seen: set[str] = set()
    for number, line in read_lines(path, findings):
        user, *sequence = line.split() or [""]
        if not sequence:
            findings.note("", "must be a user and at least one item", number)
            continue
        if user in seen:
            findings.note("user", "must be unique: a line holds all items of a user", number)
        seen.add(user)
        if known is not None and not known.issuperset(sequence):
            findings.note("item", "must be an item_id of items.tsv", number)  # unnamed: it may be a user
        users.append(user)
        items.append(sequence)
    return pl.DataFrame(
        {"user_id": users, "item": items}, schema={"user_id": pl.String, "item": pl.List(pl.String)}
    ), findings
