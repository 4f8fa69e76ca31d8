"""The log as arrays over contiguous indexes: what every later stage reads.

Ids of the tables become indexes here and nowhere else: row ``i`` of ``advertiser_ids`` is advertiser ``i``
of every array, artifact and model, and the frames of ``Log.tables`` are in the same order. An index of -1
says "none". The as-of time of anything in period ``w`` is the start of ``w``; ``Log.history`` and
``Log.is_new`` read periods below ``w`` only. Unless loaded with ``evaluate="test"`` the log holds nothing
of the test span.

Shapes: N events, R rows of targets, T targets, P placements, U users, A advertisers, I ads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.config import DataConfig
from data.errors import UserError
from data.sampling import hash_ids
from data.split import EVALUATE, Calendar, Span, TimeSplit
from data.tables import BROWSING, ENTITIES, KINDS, Tables

__all__ = ["KINDS", "Events", "Log", "Placements", "Requests", "Targets", "Visits", "load_log"]

I8 = NDArray[np.int8]
I16 = NDArray[np.int16]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]
F32 = NDArray[np.float32]
Bool = NDArray[np.bool_]
MISSING = ""


@dataclass(frozen=True)
class Events:
    """Events as a struct of arrays, in order of (user, period, timestamp, event id).

    Args:
        user, ad, advertiser, market: indexes, -1 for none; a user is always there.
        kind: index in ``KINDS``.
        timestamp: microseconds since 1970 in the tables' own clock.
        period: see ``data.split``; below 1 before the calendar's origin, see ``counted_period``.
        value, discount: money spent and money taken off; quantity: pieces; NaN for none.
        weight: rows of the full log the row stands for.
        request: the visit the event belongs to, -1 for none; the same number in all events of a visit.
        display, mailer, category: codes, 0 for none, see ``Log.display_names`` and its like.
    """

    user: I32
    ad: I32
    advertiser: I32
    kind: I8
    timestamp: I64
    period: I32
    market: I32
    value: F32
    quantity: F32
    discount: F32
    weight: F32
    request: I64
    display: I16
    mailer: I16
    category: I32

    @property
    def counted_period(self) -> I32:
        """Periods to count by, in arrays from 0 on: all that lies before the calendar is in 0, just before it."""
        return np.maximum(self.period, 0)

    def __len__(self) -> int:
        return len(self.user)

    def select(self, rows: NDArray[Any] | slice) -> Events:
        """The events of a mask, an index array or a slice."""
        return Events(**{column.name: getattr(self, column.name)[rows] for column in fields(self)})


@dataclass(frozen=True)
class Targets:
    """What each row converted with; row ``r`` has the targets ``ptr[r]:ptr[r + 1]``.

    Args:
        user, period: of each row, shape ``(R,)``; rows are in order of (user, period, market).
        market: of each row, -1 where a row is a user-period.
        ptr: shape ``(R + 1,)``.
        item: index of an advertiser or an ad, distinct and rising within a row, shape ``(T,)``.
        weight: label conversions behind the target, shape ``(T,)``.
        value: money spent in them, 0 where unknown, shape ``(T,)``.
    """

    user: I32
    period: I32
    market: I32
    ptr: I64
    item: I32
    weight: F32
    value: F32

    def __len__(self) -> int:
        return len(self.user)

    @property
    def row(self) -> I64:
        """Row of each target, shape ``(T,)``."""
        return np.repeat(np.arange(len(self)), np.diff(self.ptr))

    def of(self, row: int) -> I32:
        """Targets of one row."""
        return self.item[self.ptr[row] : self.ptr[row + 1]]

    def keep(self, keep_T: NDArray[np.bool_]) -> Targets:
        """The same rows with some of their targets; a row may end without any."""
        counts = np.bincount(self.row[keep_T], minlength=len(self))
        return Targets(
            self.user, self.period, self.market, np.concatenate([[0], np.cumsum(counts)]),
            self.item[keep_T], self.weight[keep_T], self.value[keep_T],
        )  # fmt: skip

    def select(self, rows: NDArray[Any]) -> Targets:
        """Some rows, by mask or index, with their targets."""
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
        sizes = np.diff(self.ptr)[rows]
        ptr = np.concatenate(([0], np.cumsum(sizes)))
        items = np.arange(ptr[-1]) + np.repeat(self.ptr[rows] - ptr[:-1], sizes)
        return Targets(
            self.user[rows],
            self.period[rows],
            self.market[rows],
            ptr,
            self.item[items],
            self.weight[items],
            self.value[items],
        )


class Requests(NamedTuple):
    """Visits, distinct, in order of (user, period, market); shapes ``(R,)``."""

    user: I32
    market: I32
    period: I32


class Visits(NamedTuple):
    """Single visits in order of time, those of one time by number; shapes ``(V,)``."""

    user: I32
    market: I32
    period: I32
    request: I64


class ActiveAds(NamedTuple):
    """Ads that run in one market in one period, in order of index; shapes ``(n,)``."""

    ad: I32
    display: I16
    mailer: I16


@dataclass(frozen=True)
class Placements:
    """Running ads, by stretches of time in which a market's ads do not change.

    A placement that runs for years takes one row, however many periods it spans.

    Args:
        market_ptr: stretches of market ``m`` are ``market_ptr[m]:market_ptr[m + 1]``, shape ``(M + 1,)``.
        first: first period of each stretch, rising within a market, shape ``(S,)``; it lasts until the next one.
        ptr: rows of stretch ``s`` are ``ptr[s]:ptr[s + 1]``, shape ``(S + 1,)``.
        ad: rising within a stretch, shape ``(P,)``.
        display, mailer: context codes, shape ``(P,)``.
    """

    market_ptr: I64
    first: I32
    ptr: I64
    ad: I32
    display: I16
    mailer: I16

    def rows(self, market: int, period: int) -> slice:
        """Rows of a market in a period, empty where nothing is known to run."""
        if not 0 <= market < len(self.market_ptr) - 1:
            return slice(0, 0)
        begin, end = self.market_ptr[market], self.market_ptr[market + 1]
        stretch = int(begin + np.searchsorted(self.first[begin:end], period, side="right")) - 1
        if stretch < begin:
            return slice(0, 0)
        return slice(int(self.ptr[stretch]), int(self.ptr[stretch + 1]))


@dataclass(frozen=True)
class Log:
    """A validated log over contiguous indexes; made by ``load_log``.

    Args:
        tables: advertisers, ads and users in order of index; events and placements lazily.
        split: the spans.
        calendar: timestamps to periods.
        evaluate: ``"validation"`` or ``"test"``.
        entity: what its advertisers are, one of `data.tables.ENTITIES`.
        user_ids, ad_ids, advertiser_ids, market_ids: id of each index, rising.
        ad_advertiser: advertiser of each ad, -1 for none, shape ``(I,)``.
        ad_features, user_features: codes of the config's categorical columns, 0 = missing.
        ad_vocabularies, user_vocabularies: value of each code; the first is ``""`` for missing.
        display_names, mailer_names, category_names: value of each context code; the first is ``""`` for none.
        events: all events, in order of (user, period, timestamp, event id).
        user_ptr: events of user ``u`` are ``user_ptr[u]:user_ptr[u + 1]``.
        label_kinds: codes of the kinds that are labels.
        placements: running ads by market and period.
        next_ads: ads that run in the period after the last, once for each market: what is booked when that period is
            forecast, before anything has happened in it.
    """

    tables: Tables
    split: TimeSplit
    calendar: Calendar
    evaluate: str
    entity: str
    user_ids: NDArray[Any]
    ad_ids: NDArray[Any]
    advertiser_ids: NDArray[Any]
    market_ids: NDArray[Any]
    ad_advertiser: I32
    ad_features: Mapping[str, I32]
    ad_vocabularies: Mapping[str, tuple[str, ...]]
    user_features: Mapping[str, I32]
    user_vocabularies: Mapping[str, tuple[str, ...]]
    display_names: tuple[str, ...]
    mailer_names: tuple[str, ...]
    category_names: tuple[str, ...]
    events: Events
    user_ptr: I64
    label_kinds: tuple[int, ...]
    placements: Placements
    next_ads: I32

    @property
    def last_period(self) -> int:
        """The last period that may have events."""
        return _last_period(self.split, self.evaluate)

    @property
    def purchase_kinds(self) -> tuple[int, ...]:
        """Codes of the kinds that are purchases: the labels and organic ones."""
        return (*self.label_kinds, KINDS.index("organic"))

    @cached_property
    def is_label(self) -> Bool:
        """True for events of a label kind, shape ``(N,)``."""
        return np.isin(self.events.kind, self.label_kinds)

    @cached_property
    def is_purchase(self) -> Bool:
        """True for events of a purchase kind, shape ``(N,)``."""
        return np.isin(self.events.kind, self.purchase_kinds)

    @cached_property
    def is_browsing(self) -> Bool:
        """True for events of the kinds ``BROWSING`` that are no labels, shape ``(N,)``."""
        kinds = [code for code in map(KINDS.index, BROWSING) if code not in self.label_kinds]
        return np.isin(self.events.kind, kinds)

    def history(self, user: int, period: int) -> slice:
        """Rows of ``events`` of one user before the start of a period."""
        first, last = self.user_ptr[user], self.user_ptr[user + 1]
        return slice(int(first), int(first + np.searchsorted(self.events.period[first:last], period)))

    def active_ads(self, market: int, period: int) -> ActiveAds:
        """Ads that run in a market in a period, with their context codes.

        Raises:
            UserError: the period is of the test span and the log was not loaded for it.
        """
        self.split.span((period, period), evaluate=self.evaluate)
        rows = self.placements.rows(market, period)
        return ActiveAds(self.placements.ad[rows], self.placements.display[rows], self.placements.mailer[rows])

    def active_advertisers(self, market: int, period: int) -> I32:
        """Advertisers with an ad that runs in a market in a period, rising."""
        advertisers = np.unique(self.ad_advertiser[self.active_ads(market, period).ad])
        return advertisers[advertisers >= 0]

    def advertiser_targets(self, span: str | Span, users: NDArray[Any] | None = None) -> Targets:
        """Advertisers each user converted with in each period of a span.

        Args:
            span: name of a span or first and last period.
            users: indexes of users to keep; ``None`` keeps all.

        Returns:
            One row per user and period with at least one label conversion.

        Raises:
            UserError: the span is unknown or is of the test span without ``evaluate="test"``.
        """
        events = self._span_events(span, users, self.is_label & (self.events.advertiser >= 0))
        return _targets(events, events.advertiser, by_market=False)

    def ad_targets(self, span: str | Span, users: NDArray[Any] | None = None) -> Targets:
        """Ads converted with in each visit (user, market, period) of a span, as ``advertiser_targets`` has them."""
        known = self.is_label & (self.events.ad >= 0) & (self.events.market >= 0)
        events = self._span_events(span, users, known)
        return _targets(events, events.ad, by_market=True)

    def requests(self, span: str | Span, users: NDArray[Any] | None = None) -> Requests:
        """Every visit of a span: a user in a market in a period, with or without a conversion."""
        events = self._span_events(span, users, self.events.market >= 0)
        rows = np.unique(np.stack([events.user, events.period, events.market]), axis=1)
        return Requests(rows[0], rows[2], rows[1])

    def visits(self, span: str | Span, users: NDArray[Any] | None = None) -> Visits:
        """Each visit of a span by itself, where `requests` tells those of one user, market and period as one."""
        events = self._span_events(span, users, (self.events.market >= 0) & (self.events.request >= 0))
        order = np.lexsort((events.request, events.timestamp))
        _, first = np.unique(events.request[order], return_index=True)
        rows = order[np.sort(first)]
        return Visits(events.user[rows], events.market[rows], events.period[rows], events.request[rows])

    def outcomes(
        self, span: str | Span, users: NDArray[Any] | None = None, *, kinds: Sequence[int] = ()
    ) -> tuple[Events, I32]:
        """Rows for the ranker, sampled impressions and each conversion once a visit and ad, and what became of each.

        Args:
            span: name of a span or first and last period.
            users: indexes of users to keep; ``None`` keeps all.
            kinds: codes of further kinds, such as clicks, of which each event stands for its impression as well.

        Returns:
            Events whose kind tells the label (``Log.label_kinds``) and whose ``weight`` undoes the sampling; an
            impression whose ad was converted with in the same visit is left out: the conversion stands for it. And for
            each the kinds of all events of the same visit and ad as bits, ``1 << kind``; of the label kinds,
            impressions and ``kinds`` alone.
        """
        shown = KINDS.index("impression")
        wanted = np.isin(self.events.kind, (*self.label_kinds, *kinds, shown)) & (self.events.ad >= 0)
        events = self._span_events(span, users, wanted)
        label, impression = np.isin(events.kind, self.label_kinds), events.kind == shown
        last_of = 2 * impression + ~(label | impression)  # labels first, then what else happened, then impressions
        order = np.lexsort((last_of, events.ad, events.request, events.period, events.user))
        key = np.stack([events.user, events.period, events.request, events.ad])[:, order]
        first = np.ones(len(events), bool)
        first[1:] = (key[:, 1:] != key[:, :-1]).any(0)
        group, start = np.cumsum(first) - 1, np.flatnonzero(first)
        bits = (
            np.bitwise_or.reduceat(np.int32(1) << events.kind[order].astype(np.int32), start) if len(start) else start
        )
        kept = first | impression[order[start]][group]
        rows = np.argsort(order[kept], kind="stable")
        return events.select(order[kept][rows]), bits[group][kept][rows].astype(np.int32)

    def is_new(self, user_N: NDArray[Any], period_N: NDArray[Any], advertiser_N: NDArray[Any]) -> Bool:
        """True where the user has no purchase of any kind with the advertiser before the period."""
        key = np.asarray(user_N, np.int64) * len(self.advertiser_ids) + advertiser_N
        first_key, first_period = self._first_purchase
        if not len(first_key):
            return np.ones(len(key), bool)
        position = np.minimum(np.searchsorted(first_key, key), len(first_key) - 1)
        return ~((first_key[position] == key) & (first_period[position] < period_N))

    def panel(self, n: int | None, seed: int = 0) -> I32:
        """A fixed subset of users, chosen by a hash of the id alone.

        Args:
            n: how many; ``None`` for all.
            seed: of the hash.

        Returns:
            Rising indexes of the ``n`` users with the smallest hash among those with a purchase in the prior's
            fit span, so that nothing later can change the choice.
        """
        first, last = self.split.prior_fit
        seen = self.is_purchase & (self.events.period >= first) & (self.events.period <= last)
        users = np.unique(self.events.user[seen])
        if n is None or n >= len(users):
            return users
        return np.sort(users[np.argsort(hash_ids(self.user_ids[users], seed=seed), kind="stable")[:n]])

    def _span_events(self, span: str | Span, users: NDArray[Any] | None, wanted: Bool) -> Events:
        first, last = self.split.span(span, evaluate=self.evaluate)
        wanted = wanted & (self.events.period >= first) & (self.events.period <= last)
        if users is not None:
            chosen = np.zeros(len(self.user_ids), bool)
            chosen[users] = True
            wanted &= chosen[self.events.user]
        return self.events.select(np.flatnonzero(wanted))

    @cached_property
    def _first_purchase(self) -> tuple[I64, I32]:
        rows = np.flatnonzero(self.is_purchase & (self.events.advertiser >= 0))
        key = self.events.user[rows].astype(np.int64) * len(self.advertiser_ids) + self.events.advertiser[rows]
        unique, first = np.unique(key, return_index=True)  # rows of a user are in order of time
        return unique, self.events.period[rows[first]]


def load_log(tables_dir: Path, cfg: DataConfig, *, evaluate: str, entity: str = ENTITIES[0]) -> Log:
    """Reads a directory of tables into arrays.

    Args:
        tables_dir: holds the five Parquet files that ``data.prepare.prepare`` wrote.
        cfg: the config they were prepared with.
        evaluate: ``"validation"``, or ``"test"`` to open the test span.
        entity: ``"item"`` makes every ad an advertiser of its own, see `Tables.of_items`; nothing else changes.

    Returns:
        The log; without ``evaluate="test"`` its events and placements end before the test span, and of the test span
        it knows what is booked for the first period alone.

    Raises:
        UserError: files or columns are missing, an id is dangling, ``evaluate`` or ``entity`` is unknown, or items are
            asked of a log whose conversions name none.
    """
    if evaluate not in EVALUATE:
        raise UserError(f"evaluate={evaluate}", expected=f"one of {', '.join(EVALUATE)}", action="set evaluate")
    if entity not in ENTITIES:
        raise UserError(f"entity={entity}", expected=f"one of {', '.join(ENTITIES)}", action="set entity")
    tables = Tables.open(tables_dir)
    cfg.check_columns(tables)
    if entity == "item":
        tables = tables.of_items()
    calendar, split = cfg.timeline(tables.labels(cfg.label_kinds))
    tables = replace(
        tables,
        advertisers=tables.advertisers.sort("advertiser_id"),
        ads=tables.ads.sort("ad_id"),
        users=tables.users.sort("user_id"),
    )
    booked = tables.placements
    if evaluate != "test":
        closed = calendar.start(split.test[0])
        tables = replace(
            tables,
            events=tables.events.filter(pl.col("timestamp") < closed),
            placements=tables.placements.filter(pl.col("start") < closed),
        )
    advertiser_ids, ad_ids = tables.advertisers["advertiser_id"], tables.ads["ad_id"]
    market_ids = _market_ids(tables)
    display, mailer = _vocabulary(tables, "display"), _vocabulary(tables, "mailer")
    category = _vocabulary(replace(tables, placements=tables.placements.limit(0)), "category")
    ad_advertiser = tables.ads.select(_index("advertiser_id", advertiser_ids)).to_series().to_numpy()
    events = _load_events(
        tables, calendar, market_ids, ad_advertiser, display=display, mailer=mailer, category=category
    )
    label_kinds = tuple(KINDS.index(kind) for kind in cfg.label_kinds)
    if entity == "item" and not (np.isin(events.kind, label_kinds) & (events.ad >= 0)).any():
        raise UserError(
            f"semantic_ids.entity=item for {tables_dir}, where no {' or '.join(cfg.label_kinds)} names an ad",
            expected="conversions with an ad_id: an item is an ad",
            action="set semantic_ids.entity=advertiser",
        )
    last = _last_period(split, evaluate)
    ad_features, ad_vocabularies = _features(tables.ads, cfg.ad_columns)
    user_features, user_vocabularies = _features(tables.users, cfg.profile_columns)
    return Log(
        tables=tables,
        split=split,
        calendar=calendar,
        evaluate=evaluate,
        entity=entity,
        user_ids=tables.users["user_id"].to_numpy(),
        ad_ids=ad_ids.to_numpy(),
        advertiser_ids=advertiser_ids.to_numpy(),
        market_ids=market_ids.to_numpy(),
        ad_advertiser=ad_advertiser,
        ad_features=ad_features,
        ad_vocabularies=ad_vocabularies,
        user_features=user_features,
        user_vocabularies=user_vocabularies,
        display_names=(MISSING, *display),
        mailer_names=(MISSING, *mailer),
        category_names=(MISSING, *category),
        events=events,
        user_ptr=np.searchsorted(events.user, np.arange(len(tables.users) + 1)).astype(np.int64),
        label_kinds=label_kinds,
        placements=_load_placements(tables, calendar, market_ids, ad_ids, display=display, mailer=mailer, last=last),
        next_ads=_load_running(booked, calendar, ad_ids, last + 1),
    )


def _last_period(split: TimeSplit, evaluate: str) -> int:
    return split.test[1] if evaluate == "test" else split.test[0] - 1


def _index(column: str, ids: pl.Series) -> pl.Expr:
    """Indexes of a column's ids as int32, -1 for null, null where the id is unknown."""
    positions = pl.int_range(len(ids), dtype=pl.Int32, eager=True)
    value = pl.col(column).cast(ids.dtype)
    index = value.replace_strict(ids, positions, default=None, return_dtype=pl.Int32)
    return pl.when(value.is_null()).then(pl.lit(-1, pl.Int32)).otherwise(index).alias(column)


def _market_ids(tables: Tables) -> pl.Series:
    parts = [frame.select(pl.col("market_id").unique()).collect() for frame in (tables.events, tables.placements)]
    return pl.concat(parts, how="vertical_relaxed").to_series().drop_nulls().unique().sort()


def _vocabulary(tables: Tables, column: str) -> list[str]:
    """Values of a context column in events and placements; codes follow its order, or the enum's own."""
    values: set[str] = set()
    for frame in (tables.events, tables.placements):
        dtype = frame.collect_schema().get(column)
        if isinstance(dtype, pl.Enum):
            return dtype.categories.to_list()
        if dtype is not None:
            values |= set(frame.select(pl.col(column).cast(pl.String).unique()).collect().to_series().drop_nulls())
    return sorted(values)


def _code(column: str, vocabulary: list[str], dtype: type[pl.DataType], schema: Mapping[str, Any]) -> pl.Expr:
    """Codes of a categorical column: 1 + position in the vocabulary, 0 for none."""
    if column not in schema:
        return pl.lit(0, dtype).alias(column)
    position = pl.col(column).cast(pl.Enum(vocabulary)).to_physical().cast(dtype)
    return (position + 1).fill_null(0).alias(column)


def _features(frame: pl.DataFrame, columns: Sequence[str]) -> tuple[dict[str, I32], dict[str, tuple[str, ...]]]:
    codes: dict[str, I32] = {}
    vocabularies: dict[str, tuple[str, ...]] = {}
    for column in columns:
        texts = frame.select(pl.col(column).cast(pl.String))  # numbers and flags are categories too
        values = texts[column].drop_nulls().unique().sort().to_list()
        codes[column] = texts.select(_code(column, values, pl.Int32, texts.schema)).to_series().to_numpy()
        vocabularies[column] = (MISSING, *values)
    return codes, vocabularies


def _dangling(table: str, columns: Sequence[str]) -> UserError:
    return UserError(
        f"{table}: unknown ids in {', '.join(columns)}",
        expected="ids that are keys of their tables",
        action="run `adsid data validate` on the directory to see the rows",
    )


def _micros(column: str) -> pl.Expr:
    return pl.col(column).dt.cast_time_unit("us").to_physical()


def _load_events(
    tables: Tables,
    calendar: Calendar,
    market_ids: pl.Series,
    ad_advertiser: I32,
    *,
    display: list[str],
    mailer: list[str],
    category: list[str],
) -> Events:
    """Events in order; one that names an ad and no advertiser is of the ad's advertiser."""
    schema = tables.events.collect_schema()

    def number(column: str) -> pl.Expr:
        if column not in schema:
            return pl.lit(np.nan, pl.Float32).alias(column)
        return pl.col(column).cast(pl.Float32).fill_null(np.nan)

    kinds = pl.int_range(len(KINDS), dtype=pl.Int8, eager=True)
    request = pl.col("request_id")
    if not schema["request_id"].is_integer():
        request = request.cast(pl.Categorical).to_physical()
    frame = tables.events.select(
        _index("user_id", tables.users["user_id"]),
        _index("ad_id", tables.ads["ad_id"]),
        _index("advertiser_id", tables.advertisers["advertiser_id"]),
        pl.col("kind").cast(pl.String).replace_strict(list(KINDS), kinds, return_dtype=pl.Int8),
        _micros("timestamp"),
        calendar.period_expr(_micros("timestamp")).alias("period"),
        _index("market_id", market_ids),
        number("value"),
        number("quantity"),
        number("discount"),
        pl.col("sample_weight").cast(pl.Float32),
        request.cast(pl.Int64).fill_null(-1),
        _code("display", display, pl.Int16, schema),
        _code("mailer", mailer, pl.Int16, schema),
        _code("category", category, pl.Int32, schema),
        pl.col("event_id"),
    ).collect()
    unknown = [name for name in ("user_id", "ad_id", "advertiser_id") if frame[name].null_count()]
    if unknown:
        raise _dangling("events", unknown)
    user, timestamp = frame["user_id"].to_numpy(), frame["timestamp"].to_numpy()
    step = np.diff(timestamp)
    if not ((step > 0) | ((step == 0) & (frame["event_id"].diff()[1:] > 0).to_numpy())).all():
        frame = frame.sort("timestamp", "event_id")
        user = frame["user_id"].to_numpy()
    order = np.argsort(user, kind="stable")
    columns = [series.to_numpy()[order] for series in frame.drop("event_id")]
    events = Events(**{column.name: values for column, values in zip(fields(Events), columns, strict=True)})
    unsaid = (events.advertiser < 0) & (events.ad >= 0)
    if not unsaid.any():
        return events
    return replace(events, advertiser=np.where(unsaid, ad_advertiser[events.ad], events.advertiser))


def _load_placements(
    tables: Tables,
    calendar: Calendar,
    market_ids: pl.Series,
    ad_ids: pl.Series,
    *,
    display: list[str],
    mailer: list[str],
    last: int,
) -> Placements:
    schema = tables.placements.collect_schema()
    frame = tables.placements.select(
        calendar.period_expr(_micros("start")).alias("first"),
        calendar.period_expr(_micros("end") - 1).alias("last"),
        _index("market_id", market_ids),
        _index("ad_id", ad_ids),
        _code("display", display, pl.Int16, schema),
        _code("mailer", mailer, pl.Int16, schema),
    ).collect()
    if frame["ad_id"].null_count():
        raise _dangling("placements", ["ad_id"])
    first, until, market, ad, display_P, mailer_P = (series.to_numpy() for series in frame)
    # Rows come in order of time; sorted by market too, the searches below run along memory.
    kept = np.flatnonzero(first <= last)
    narrow = market[kept].astype(np.uint16) if len(market_ids) < 1 << 16 else market[kept]  # 16 bits: a radix sort
    kept = kept[np.argsort(narrow, kind="stable")]
    first, market, ad, display_P, mailer_P = (values[kept] for values in (first, market, ad, display_P, mailer_P))
    end = np.minimum(until[kept], last) + 1

    # A market's stretches begin where an ad begins or has ended; what runs between is the same throughout.
    earliest = int(first.min(initial=0))
    begins, ends = (market.astype(np.int64) << 32 | (period - earliest) for period in (first, end))
    stretches = np.unique(np.concatenate([values[np.diff(values, prepend=-1) != 0] for values in (begins, ends)]))
    start = np.searchsorted(stretches, begins)
    runs = np.searchsorted(stretches, ends) - start
    row = np.repeat(np.arange(len(ad)), runs)
    at = start[row] + np.arange(len(row)) - np.repeat(np.cumsum(runs) - runs, runs)
    key = at * len(ad_ids) + ad[row]
    if (np.diff(key) <= 0).any():
        key, chosen = np.unique(key, return_index=True)
        row, at = row[chosen], at[chosen]
    return Placements(
        market_ptr=np.searchsorted(stretches >> 32, np.arange(len(market_ids) + 1)),
        first=((stretches & 0xFFFFFFFF) + earliest).astype(np.int32),
        ptr=np.concatenate(([0], np.cumsum(np.bincount(at, minlength=len(stretches))))),
        ad=ad[row],
        display=display_P[row],
        mailer=mailer_P[row],
    )


def _load_running(placements: pl.LazyFrame, calendar: Calendar, ad_ids: pl.Series, period: int) -> I32:
    """Indexes of the ads that run in a period, rising, once for each market."""
    begins, ends = (calendar.period_expr(expr) for expr in (_micros("start"), _micros("end") - 1))
    running = placements.filter(begins <= period, ends >= period).select("market_id", "ad_id").unique().collect()
    found = running.select(_index("ad_id", ad_ids)).to_series()
    if found.null_count():
        raise _dangling("placements", ["ad_id"])
    return np.sort(found.to_numpy())


def _targets(events: Events, item: I32, *, by_market: bool) -> Targets:
    """Groups events into rows of (user, period[, market]) and their distinct items."""
    market = events.market if by_market else np.full(len(events), -1, np.int32)
    order = np.lexsort((item, market, events.period, events.user))
    key = np.stack([events.user, events.period, market, item])[:, order]
    new = np.ones(key.shape, bool)
    new[:, 1:] = key[:, 1:] != key[:, :-1]
    starts = np.flatnonzero(new.any(0))
    row_starts = np.any(new[:3], axis=0)[starts]
    weight = np.add.reduceat(events.weight[order], starts) if len(starts) else np.empty(0)
    value = np.add.reduceat(np.nan_to_num(events.value[order]), starts) if len(starts) else np.empty(0)
    rows = key[:, starts[row_starts]]
    return Targets(
        user=rows[0],
        period=rows[1],
        market=rows[2],
        ptr=np.append(np.flatnonzero(row_starts), len(starts)).astype(np.int64),
        item=key[3, starts],
        weight=weight.astype(np.float32),
        value=value.astype(np.float32),
    )
