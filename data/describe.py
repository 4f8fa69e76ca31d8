"""What a log holds: counts, sparsity, head and tail, new advertisers, label rate, coverage of texts.

A log of any size is described in a bounded memory. Every count of distinct things here has a user in it, so it is a
sum over parts of the users, and a part is small enough to hold; ads that run are counted over parts of the
advertisers in the same way. No user's id or profile value leaves this module.

Without ``evaluate="test"`` events and placements from the start of the test span on are not looked at, but for the
number of rows of the tables, the first and last day of the log, and where the split puts its spans.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.config import DataConfig, Timeline
from data.errors import UserError
from data.split import EVALUATE, TimeSplit
from data.tables import Tables

BATCH = 1 << 22
"""Rows of events or placements that are held at a time."""
CURVE_POINTS = 200
_PERIODS = 1 << 20
"""More periods, of either sign, than there are days in the years of a timestamp (`data.tables`)."""


@dataclass(frozen=True)
class Distribution:
    """Counts over cases, of which there is at least one.

    Args:
        n: number of cases.
        mean: of the counts.
        p10, median, p90, p99: the smallest count that this share of the cases does not exceed.
    """

    n: int
    mean: float
    p10: float
    median: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Period:
    """One period; ``new_targets`` are targets whose user had no purchase with the advertiser before the period.

    Args:
        period: its number.
        start: its first day, ISO 8601.
        events: of all kinds.
        conversions: events of a label kind.
        user_periods: users with a conversion.
        targets: distinct (user, advertiser) with a conversion.
        new_targets: targets with no purchase of any kind (label kinds and organic) before the period.
        label_rate: conversions over impressions and conversions, each weighted by ``sample_weight``; None without an
            impression.
    """

    period: int
    start: str
    events: int
    conversions: int
    user_periods: int
    targets: int
    new_targets: int
    label_rate: float | None


@dataclass(frozen=True)
class SpanCounts:
    """One span of the split; its counts are None where it is closed.

    Args:
        name: of the span.
        first, last: periods, both included.
        start, end: first and last day, ISO 8601.
        conversions, user_periods, targets, new_targets: sums of those of its periods.
        advertisers: with a conversion in it.
        cold_advertisers: of these, those without a conversion before it.
    """

    name: str
    first: int
    last: int
    start: str
    end: str
    conversions: int | None = None
    user_periods: int | None = None
    targets: int | None = None
    new_targets: int | None = None
    advertisers: int | None = None
    cold_advertisers: int | None = None


@dataclass(frozen=True)
class Users:
    """Users.

    Args:
        total: rows of the table.
        with_profile: with a value in any profile column.
        profile: share of users with a value, by profile column.
        with_conversion: with a conversion.
        conversions: per user with a conversion.
    """

    total: int
    with_profile: int
    profile: dict[str, float]
    with_conversion: int
    conversions: Distribution | None


@dataclass(frozen=True)
class Advertisers:
    """Advertisers.

    Args:
        total: rows of the table.
        with_ad: who have an ad.
        with_running_ad: who have an ad in the placements; None without placements.
        with_conversion: with a conversion.
        with_one_conversion: with exactly one.
        conversions: per advertiser with a conversion.
    """

    total: int
    with_ad: int
    with_running_ad: int | None
    with_conversion: int
    with_one_conversion: int
    conversions: Distribution | None


@dataclass(frozen=True)
class Ads:
    """Ads.

    Args:
        total: rows of the table.
        with_advertiser: whose advertiser is known.
        running: in the placements; None without placements.
    """

    total: int
    with_advertiser: int
    running: int | None


@dataclass(frozen=True)
class Visits:
    """Visits: distinct (user, market, period) with an event of any kind.

    Args:
        total: number of visits.
        without_ads: visits without an eligible ad; None without placements.
        eligible_ads: per visit, distinct ads that run in its market at a time of its period; None without placements.
        active_advertisers: per visit, distinct advertisers of these; None without placements.
    """

    total: int
    without_ads: int | None
    eligible_ads: Distribution | None
    active_advertisers: Distribution | None


@dataclass(frozen=True)
class Concentration:
    """How conversions spread over all advertisers of the table, with or without a conversion.

    Args:
        top_1_percent, top_10_percent: share of the conversions that the advertisers with the most of them hold.
        gini: 0 where all have the same, towards 1 where one has all.
        curve: (share of advertisers, most conversions first; share of the conversions that they hold), rising.
    """

    top_1_percent: float
    top_10_percent: float
    gini: float
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Texts:
    """Texts of a table.

    Args:
        total: rows.
        filled: rows with a text that is not blank.
        mean_words: per such row; None without one.
        shared: such rows whose very text another row has too.
    """

    total: int
    filled: int
    mean_words: float | None
    shared: int


@dataclass(frozen=True)
class Description:
    """A described log; every figure not said to be of the whole log ends where the closed test span begins.

    Args:
        source: adapter of the data config.
        evaluate: ``"test"`` where the test span is counted.
        ordinal: days and periods are no calendar time but the order of each user's events.
        label_kinds: kinds that are conversions.
        purchase_kinds: kinds after which an advertiser is no longer new to the user.
        period_days: length of a period.
        origin: first day of period 1.
        rows: of each table, of the whole log.
        first_day, last_day: of the events, of the whole log.
        users, advertisers, ads: see their classes.
        markets: distinct markets of events and placements.
        events: number of events by kind, those that occur.
        conversions: events of a label kind.
        baskets: distinct (user, timestamp) of purchases.
        visits: None where no event has a market.
        user_periods: distinct (user, period) with a target.
        targets: distinct (user, period, advertiser) with a conversion.
        new_targets: see `Period`.
        pairs: distinct (user, advertiser) with a conversion.
        density: pairs over users × advertisers.
        label_rate: see `Period`.
        concentration: None without a conversion.
        texts: of ``advertisers`` and ``ads``.
        spans: in order of time.
        periods: all from the first to the last with an event.
    """

    source: str
    evaluate: str
    ordinal: bool
    label_kinds: tuple[str, ...]
    purchase_kinds: tuple[str, ...]
    period_days: int
    origin: str
    rows: dict[str, int]
    first_day: str
    last_day: str
    users: Users
    advertisers: Advertisers
    ads: Ads
    markets: int
    events: dict[str, int]
    conversions: int
    baskets: int
    visits: Visits | None
    user_periods: int
    targets: int
    new_targets: int
    pairs: int
    density: float | None
    label_rate: float | None
    concentration: Concentration | None
    texts: dict[str, Texts]
    spans: tuple[SpanCounts, ...]
    periods: tuple[Period, ...]


def describe(tables: Tables, cfg: DataConfig, *, evaluate: str = "validation") -> Description:
    """Count what a log holds.

    Args:
        tables: the five tables; events and placements are read in parts.
        cfg: the config they were prepared with.
        evaluate: ``"test"`` counts the test span too.

    Raises:
        UserError: ``evaluate`` is unknown, columns are missing, or the split does not fit the log.
    """
    if evaluate not in EVALUATE:
        raise UserError(f"evaluate={evaluate}", expected=f"one of {', '.join(EVALUATE)}", action="set evaluate")
    cfg.check_columns(tables)
    timeline = cfg.timeline(tables.labels(cfg.label_kinds))
    first_day, last_day = _days(tables.events)
    events, placements = tables.events, tables.placements
    if evaluate != "test":
        closed = timeline.calendar.start(timeline.split.test[0])
        events = events.filter(pl.col("timestamp") < closed)
        placements = placements.filter(pl.col("start") < closed)

    labels, purchases = tuple(cfg.label_kinds), (*cfg.label_kinds, "organic")
    by_kind = _by_kind(events, timeline)
    tally = _tally(events, by_kind, timeline, labels=labels, purchases=purchases)
    by_advertiser = tally.by_advertiser()
    running = _running(placements, tables.ads, timeline)
    periods = _periods(by_kind, tally, timeline, labels)
    total = {
        name: sum(getattr(period, name) for period in periods)
        for name in ("conversions", "user_periods", "targets", "new_targets")
    }
    pairs = int(by_advertiser["users"].sum())
    return Description(
        source=cfg.source,
        evaluate=evaluate,
        ordinal=cfg.split.by == "leave_one_out",
        label_kinds=labels,
        purchase_kinds=purchases,
        period_days=timeline.calendar.days,
        origin=_day(timeline, 1),
        rows=tables.rows(),
        first_day=first_day,
        last_day=last_day,
        users=_users(tables.users, tally),
        advertisers=_advertisers(tables, by_advertiser, running),
        ads=_ads(tables.ads, running),
        markets=_markets(events, placements),
        events=_events(by_kind),
        baskets=tally.baskets,
        visits=_visits(tally, running),
        **total,
        pairs=pairs,
        density=_ratio(pairs, len(tables.users) * len(tables.advertisers)),
        label_rate=_label_rate(by_kind, labels),
        concentration=_concentration(by_advertiser, len(tables.advertisers)),
        texts={"advertisers": _texts(tables.advertisers), "ads": _texts(tables.ads)},
        spans=tuple(_spans(periods, tally, by_advertiser, timeline, evaluate=evaluate)),
        periods=periods,
    )


# Events, summed over parts of the users


@dataclass
class _Tally:
    """Sums over parts of the users.

    Attributes:
        baskets: distinct (user, timestamp) of purchases.
        conversions_U: of each user with one, an array a part.
        visits: ``market``, ``period``, ``visits``.
        periods: ``period``, ``user_periods``, ``targets``, ``new_targets``.
        advertisers: ``advertiser``, ``users`` and ``conversions`` with it, ``first`` period with one.
        span_advertisers: distinct ``span``, ``advertiser`` with a conversion.
    """

    baskets: int = 0
    conversions_U: list[NDArray[np.int64]] = field(default_factory=list)
    visits: list[pl.DataFrame] = field(default_factory=list)
    periods: list[pl.DataFrame] = field(default_factory=list)
    advertisers: list[pl.DataFrame] = field(default_factory=list)
    span_advertisers: list[pl.DataFrame] = field(default_factory=list)

    def add(self, rows: pl.DataFrame) -> None:
        """Count one part of the users.

        Args:
            rows: ``user``, ``market``, ``advertiser``, ``moment``, ``period``, ``span``, ``label``, ``purchase``.
        """
        visits = rows.select("user", "market", "period").drop_nulls("market").unique()
        self.visits.append(visits.group_by("market", "period").len("visits"))
        bought = rows.filter("purchase")
        self.baskets += bought.select("user", "moment").unique().height
        labels = bought.filter("label")
        self.conversions_U.append(labels.group_by("user").len()["len"].to_numpy().astype(np.int64))

        targets = labels.select("user", "period", "span", "advertiser").drop_nulls("advertiser").unique()
        self.span_advertisers.append(targets.select("span", "advertiser").drop_nulls().unique())
        pairs = (
            bought.drop_nulls("advertiser")
            .group_by("user", "advertiser")
            .agg(
                pl.col("period").min().alias("first_purchase"),
                pl.when("label").then("period").min().alias("first"),
                pl.col("label").sum().alias("conversions"),
            )
            .drop_nulls("first")
        )
        self.advertisers.append(
            pairs.group_by("advertiser").agg(
                pl.len().alias("users"), pl.col("conversions").sum(), pl.col("first").min()
            )
        )
        by_user = targets.group_by("user", "period").len("targets")
        by_period = by_user.group_by("period").agg(pl.len().alias("user_periods"), pl.col("targets").sum())
        # A pair is new once at most: in the period of its first purchase, if that period has a conversion.
        new = pairs.filter(pl.col("first") == pl.col("first_purchase")).group_by(period="first").len("new_targets")
        new_targets = pl.col("new_targets").fill_null(0)
        self.periods.append(by_period.join(new, on="period", how="left").with_columns(new_targets))

    def by_advertiser(self) -> pl.DataFrame:
        """``advertisers`` over all parts."""
        groups = pl.concat(self.advertisers).group_by("advertiser")
        return groups.agg(pl.col("users", "conversions").sum(), pl.col("first").min())


def _by_kind(events: pl.LazyFrame, timeline: Timeline) -> pl.DataFrame:
    """Events by ``period`` and ``kind``: ``events``, their ``weight``, how many are ``placed`` in a market."""
    return (
        events.select(
            timeline.calendar.period_expr(_micros("timestamp")).alias("period"),
            pl.col("kind").cast(pl.String),
            pl.col("sample_weight").cast(pl.Float64),
            "market_id",
        )
        .group_by("period", "kind")
        .agg(
            pl.len().alias("events"),
            pl.col("sample_weight").sum().alias("weight"),
            pl.col("market_id").count().alias("placed"),
        )
        .collect(engine="streaming")
    )


def _tally(
    events: pl.LazyFrame,
    by_kind: pl.DataFrame,
    timeline: Timeline,
    *,
    labels: tuple[str, ...],
    purchases: tuple[str, ...],
) -> _Tally:
    schema, kind = events.collect_schema(), pl.col("kind").cast(pl.String)
    period = timeline.calendar.period_expr(_micros("timestamp"))
    rows = events.filter(kind.is_in(purchases) | pl.col("market_id").is_not_null()).select(
        pl.col("user_id").alias("user"),
        _id("market_id", schema).alias("market"),
        _id("advertiser_id", schema).alias("advertiser"),
        _micros("timestamp").alias("moment"),
        period.alias("period"),
        _span(period, timeline.split).alias("span"),
        kind.is_in(labels).alias("label"),
        kind.is_in(purchases).alias("purchase"),
    )
    is_purchase = pl.col("kind").is_in(purchases)
    n = int(by_kind.select(pl.when(is_purchase).then("events").otherwise("placed").sum()).item())
    tally = _Tally()
    for part in _parts(n, pl.col("user")):
        tally.add(rows.filter(part).collect(engine="streaming"))
    return tally


def _parts(rows: int, key: pl.Expr) -> Iterator[pl.Expr]:
    """Filters that part a table by the hash of a key, into parts of about ``BATCH`` rows."""
    n = max(1, -(-rows // BATCH))
    for part in range(n):
        yield key.hash() % n == part if n > 1 else pl.lit(True)


def _id(column: str, schema: Mapping[str, pl.DataType]) -> pl.Expr:
    """Ids in one dtype a family, so that those of two tables can be compared."""
    return pl.col(column).cast(pl.Int64 if schema[column].is_integer() else pl.String)


def _micros(column: str) -> pl.Expr:
    return pl.col(column).dt.cast_time_unit("us").to_physical()


def _span(period: pl.Expr, split: TimeSplit) -> pl.Expr:
    """Number of the span that a period is in, null for none."""
    number = pl.lit(None, pl.Int8)
    for position, (first, last) in enumerate(split.spans().values()):
        number = pl.when(period.is_between(first, last)).then(pl.lit(position, pl.Int8)).otherwise(number)
    return number


def _days(events: pl.LazyFrame) -> tuple[str, str]:
    moment = pl.col("timestamp")
    first, last = (
        events.select(moment.min().alias("first"), moment.max().alias("last")).collect(engine="streaming").row(0)
    )
    return f"{first:%Y-%m-%d}", f"{last:%Y-%m-%d}"


def _day(timeline: Timeline, period: int, *, days: int = 0) -> str:
    """The first day of a period, or some days from it."""
    return f"{timeline.calendar.start(period) + timedelta(days=days):%Y-%m-%d}"


def _events(by_kind: pl.DataFrame) -> dict[str, int]:
    summed = by_kind.group_by("kind").agg(pl.col("events").sum()).sort("events", "kind", descending=[True, False])
    return dict(summed.iter_rows())


def _label_rate(by_kind: pl.DataFrame, labels: tuple[str, ...]) -> float | None:
    shown = by_kind.filter(pl.col("kind") == "impression")["weight"].to_numpy().sum()
    converted = by_kind.filter(pl.col("kind").is_in(labels))["weight"].to_numpy().sum()
    return _ratio(converted, shown + converted) if shown else None


def _periods(by_kind: pl.DataFrame, tally: _Tally, timeline: Timeline, labels: tuple[str, ...]) -> tuple[Period, ...]:
    counted = pl.concat(tally.periods).group_by("period").agg(pl.col("user_periods", "targets", "new_targets").sum())
    targets = {period: counts for period, *counts in counted.iter_rows()}
    groups = {period: rows for (period,), rows in by_kind.group_by("period")}
    periods = []
    for period in range(min(groups, default=0), max(groups, default=-1) + 1):
        rows = groups.get(period, by_kind[:0])
        user_periods, n_targets, new_targets = targets.get(period, (0, 0, 0))
        periods.append(
            Period(
                period=period,
                start=_day(timeline, period),
                events=int(rows["events"].sum()),
                conversions=int(rows.filter(pl.col("kind").is_in(labels))["events"].sum()),
                user_periods=user_periods,
                targets=n_targets,
                new_targets=new_targets,
                label_rate=_label_rate(rows, labels),
            )
        )
    return tuple(periods)


def _spans(
    periods: tuple[Period, ...], tally: _Tally, by_advertiser: pl.DataFrame, timeline: Timeline, *, evaluate: str
) -> Iterator[SpanCounts]:
    seen = pl.concat(tally.span_advertisers).unique()["span"]
    for number, (name, (first, last)) in enumerate(timeline.split.spans().items()):
        counts: dict[str, int] = {}
        if name != "test" or evaluate == "test":
            own = [period for period in periods if first <= period.period <= last]
            for key in ("conversions", "user_periods", "targets", "new_targets"):
                counts[key] = sum(getattr(period, key) for period in own)
            counts["advertisers"] = int((seen == number).sum())
            counts["cold_advertisers"] = int(by_advertiser["first"].is_between(first, last).sum())
        yield SpanCounts(name, first, last, _day(timeline, first), _day(timeline, last + 1, days=-1), **counts)


# Ads that run


@dataclass(frozen=True)
class _Running:
    """Ads and advertisers that run.

    Attributes:
        ads, advertisers: how many do at all.
        level: ``market``, ``period``, and how many ``ads`` and ``advertisers`` run there from that period on until the
            next one of the market.
    """

    ads: int
    advertisers: int
    level: pl.DataFrame


def _running(placements: pl.LazyFrame, ads: pl.DataFrame, timeline: Timeline) -> _Running | None:
    """What runs where and when; None without placements.

    A placement that runs for years is one row, however many periods it spans.
    """
    n = _height(placements)
    if not n:
        return None
    schema, period = placements.collect_schema(), timeline.calendar.period_expr
    rows = placements.select(
        _id("market_id", schema),
        _id("ad_id", schema),
        period(_micros("start")).alias("first"),
        (period(_micros("end") - 1) + 1).alias("end"),
    )
    owner = pl.col("advertiser_id").rank("dense")
    catalogue = ads.select(_id("ad_id", ads.schema), owner.alias("owner")).with_row_index("ad")
    markets = rows.select(pl.col("market_id").unique()).collect(engine="streaming").with_row_index("market")
    n_ads = n_owners = 0
    changes = []
    for part in _parts(n, pl.coalesce("owner", "ad")):
        found = rows.join(catalogue.filter(part).lazy(), on="ad_id").join(markets.lazy(), on="market_id")
        own = found.select("market", "ad", "owner", "first", "end").collect(engine="streaming")
        n_ads += own["ad"].n_unique()
        n_owners += own["owner"].drop_nulls().n_unique()
        changes += [_changes(own, "ad", "ads"), _changes(own.drop_nulls("owner"), "owner", "advertisers")]
    summed = pl.concat(changes, how="diagonal").group_by("market", "period").agg(pl.col("ads", "advertisers").sum())
    level = summed.sort("market", "period").with_columns(pl.col("ads", "advertisers").cum_sum().over("market"))
    named = level.join(markets, on="market").drop("market").rename({"market_id": "market"})
    return _Running(n_ads, n_owners, named)


def _changes(rows: pl.DataFrame, item: str, name: str) -> pl.DataFrame:
    """By how many the distinct items that run in a market change with a period.

    Args:
        rows: indexes of ``market`` and item, ``first`` period it runs in and ``end``, the first one it no longer does.
        item: a column.
        name: of the column of changes.
    """
    n_items = int(rows.select(pl.col(item).max().fill_null(0)).item()) + 1
    # All periods of a market and item have numbers of their own, so that the runs of all lie on one line.
    place = (pl.col("market").cast(pl.Int64) * n_items + pl.col(item)) * _PERIODS + _PERIODS // 2
    begin_P, end_P = (
        np.sort(rows.select(place + pl.col(moment)).to_series().to_numpy()) for moment in ("first", "end")
    )
    # Nothing runs, and a run opens, where as many placements have ended as had begun; one that touches goes on.
    opens_P = np.append(True, end_P[:-1] < begin_P[1:])[: len(begin_P)]
    closes_P = np.append(opens_P[1:], True)[: len(end_P)]
    parts = []
    for moment_P, change in ((begin_P[opens_P], 1), (end_P[closes_P], -1)):
        market_P, period_P = moment_P // _PERIODS // n_items, moment_P % _PERIODS - _PERIODS // 2
        columns = {"market": market_P.astype(np.uint32), "period": period_P.astype(np.int32)}
        parts.append(pl.DataFrame(columns).with_columns(pl.lit(change, pl.Int64).alias(name)))
    return pl.concat(parts).group_by("market", "period").agg(pl.col(name).sum())


def _visits(tally: _Tally, running: _Running | None) -> Visits | None:
    visits = pl.concat(tally.visits).group_by("market", "period").agg(pl.col("visits").sum())
    if visits.is_empty():
        return None
    total = int(visits["visits"].sum())
    if running is None:
        return Visits(total, None, None, None)
    seen = visits.sort("period").join_asof(
        running.level.sort("period"), on="period", by="market", check_sortedness=False
    )
    weight_C = seen["visits"].to_numpy()
    ads_C, advertisers_C = (seen[name].fill_null(0).to_numpy() for name in ("ads", "advertisers"))
    without_ads = int(weight_C[ads_C == 0].sum())
    return Visits(total, without_ads, _distribution(ads_C, weight_C), _distribution(advertisers_C, weight_C))


def _markets(events: pl.LazyFrame, placements: pl.LazyFrame) -> int:
    found: set[object] = set()
    for frame in (events, placements):
        market = _id("market_id", frame.collect_schema()).drop_nulls().unique()
        found |= set(frame.select(market).collect(engine="streaming").to_series())
    return len(found)


# Users, advertisers, ads, texts


def _users(users: pl.DataFrame, tally: _Tally) -> Users:
    known = {name: users[name].is_not_null() & ~_blank(users[name]) for name in users.columns if name != "user_id"}
    conversions = np.concatenate(tally.conversions_U)
    return Users(
        total=len(users),
        with_profile=int(users.select(pl.any_horizontal(known.values()).sum()).item()) if known else 0,
        profile={name: _ratio(int(values.sum()), len(users)) or 0.0 for name, values in known.items()},
        with_conversion=len(conversions),
        conversions=_distribution(conversions),
    )


def _blank(values: pl.Series) -> pl.Series:
    if values.dtype not in (pl.String, pl.Categorical, pl.Enum):
        return values.is_null()
    return values.cast(pl.String).str.strip_chars().fill_null("") == ""


def _advertisers(tables: Tables, by_advertiser: pl.DataFrame, running: _Running | None) -> Advertisers:
    conversions = by_advertiser["conversions"].to_numpy()
    return Advertisers(
        total=len(tables.advertisers),
        with_ad=tables.ads["advertiser_id"].drop_nulls().n_unique(),
        with_running_ad=running.advertisers if running else None,
        with_conversion=len(conversions),
        with_one_conversion=int((conversions == 1).sum()),
        conversions=_distribution(conversions),
    )


def _ads(ads: pl.DataFrame, running: _Running | None) -> Ads:
    known = len(ads) - ads["advertiser_id"].null_count()
    return Ads(len(ads), known, running.ads if running else None)


def _texts(frame: pl.DataFrame) -> Texts:
    texts = frame["text"].filter(~_blank(frame["text"])).cast(pl.String)
    words = texts.str.count_matches(r"\S+").to_numpy()
    mean_words = _rounded(words.mean()) if len(words) else None
    return Texts(len(frame), len(texts), mean_words, int(texts.is_duplicated().sum()))


def _concentration(by_advertiser: pl.DataFrame, total: int) -> Concentration | None:
    counts = np.zeros(total, np.int64)
    counts[: len(by_advertiser)] = np.sort(by_advertiser["conversions"].to_numpy())[::-1]
    if not counts.any():
        return None
    held = np.concatenate(([0.0], np.cumsum(counts) / counts.sum()))
    ranks = np.unique(np.round(total * np.linspace(0, 1, CURVE_POINTS + 1) ** 2).astype(int))  # dense at the head
    rank = np.arange(1, total + 1)
    return Concentration(
        top_1_percent=_rounded(held[-(-total // 100)]),
        top_10_percent=_rounded(held[-(-total // 10)]),
        gini=_rounded((total + 1 - 2 * rank) @ counts / (total * counts.sum())),
        curve=tuple((_rounded(rank / total), _rounded(held[rank])) for rank in ranks.tolist()),
    )


def _distribution(counts: NDArray[np.integer], weight: NDArray[np.integer] | None = None) -> Distribution | None:
    """Distribution of counts, each of ``weight`` cases; None without a case."""
    weight = np.ones(len(counts), np.int64) if weight is None else weight
    if not weight.sum():
        return None
    levels = np.quantile(counts, (0.1, 0.5, 0.9, 0.99), weights=weight, method="inverted_cdf")
    mean = counts.astype(np.float64) @ weight / weight.sum()
    return Distribution(int(weight.sum()), _rounded(mean), *(_rounded(level) for level in levels))


def _height(frame: pl.LazyFrame) -> int:
    return int(frame.select(pl.len()).collect(engine="streaming").item())


def _ratio(part: float, whole: float) -> float | None:
    return _rounded(part / whole) if whole else None


def _rounded(value: float) -> float:
    """A figure without the digits that depend on the order in which threads add."""
    return float(f"{value:.12g}")
