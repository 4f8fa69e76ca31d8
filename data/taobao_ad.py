"""Taobao display ads: eight days of impressions and 22 days of what the same users browsed and bought.

Source: ``Ali_Display_Ad_Click`` (tianchi.aliyun.com/dataset/56), four CSV files as published, plain or packed with
gzip: ``raw_sample`` (26M impressions), ``ad_feature`` (847k ads), ``user_profile`` (1.06M users) and ``behavior_log``
(723M rows). All ids are anonymous numbers, so "words" are such as "category 6406".

===================  =====================================================================================
advertiser           a ``customer``
ad                   an ``adgroup_id``
market               the site, 0
impression, click    a row of ``raw_sample``; a click stands for its impression
organic              ``buy``: something bought on the site, of which category and brand are known
visit                ``pv``, ``cart``, ``fav``: something looked at, put in the basket or marked; see ``action``
placement            every ad runs on the site on all eight days of impressions
===================  =====================================================================================

The clock is the site's: Shanghai, UTC+8, as the published split by days has it. Impressions of one user in one second
are one request. What was browsed or bought has an advertiser where all ads of its brand have the same one.

What is known at all times is the catalogue: ads with advertiser, category, brand and price, the places ads stand at
(``pid``), and profiles. When an ad runs is not in the source. To take it from the impressions of a day would tell what
happened on that day, so an ad is taken to run on all of them.

Nobody is left out for what happens later: to keep only the behaviour of users with an impression, say, would tell from
day 1 on who will see one on day 20. Users are all that are in any of the files.
"""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl

from data.config import DataConfig
from data.duck import STATE, CsvFile, Field, batches, choice, keep_on_disk, load, no_room, number, offence, whole, word
from data.errors import UserError
from data.sampling import choose_users
from data.tables import KINDS
from data.writer import TableWriter

logger = logging.getLogger(__name__)

FIRST, FIRST_SHOWN, END = datetime(2017, 4, 22), datetime(2017, 5, 6), datetime(2017, 5, 14)
"""Where the behaviour and the impressions begin and where both end, by the site's clock."""
PROFILE = (
    *("cms_segid", "cms_group_id", "final_gender_code", "age_level"),
    *("pvalue_level", "shopping_level", "occupation", "new_user_class_level"),
)
ACTIONS = ("pv", "cart", "fav", "buy")
MARKET = 0
_UTC_OFFSET = timedelta(hours=8)
_STRAY = 1e-3
"""Share of behaviour at a time outside the log that is left out; the published file has negative times."""
_MOST_PLACES = 100
_TEXT_PHRASES = 12
_EVENT_KINDS = ("impression", "click", "visit", "visit", "visit", "organic")
_EVENT_ACTIONS = (None, None, *ACTIONS)
"""Kind and action by an event's code: 0 shown, 1 clicked, 2 and on an action."""


def _second(moment: datetime) -> int:
    """Seconds since 1970, UTC, of a moment of the site's clock."""
    return int((moment - _UTC_OFFSET - datetime(1970, 1, 1)).total_seconds())


def _time(first: datetime, *, tolerated: float = 0.0) -> Field:
    low, high = _second(first), _second(END) - 1
    days = f"{first:%Y-%m-%d} to {END - timedelta(days=1):%Y-%m-%d} in Shanghai"
    return whole("time_stamp", low, high, rule=f"seconds since 1970 from {low} to {high}, {days}", tolerated=tolerated)


RAW_SAMPLE = CsvFile(
    "raw_sample",
    (
        whole("user", private=True),
        _time(FIRST_SHOWN),
        whole("adgroup_id"),
        word("pid"),
        whole("nonclk", 0, 1),
        whole("clk", 0, 1),
    ),
)
AD_FEATURE = CsvFile(
    "ad_feature",
    (
        whole("adgroup_id"),
        whole("cate_id"),
        whole("campaign_id"),
        whole("customer"),
        whole("brand", nullable=True),
        number("price"),
    ),
    key="adgroup_id",
)
USER_PROFILE = CsvFile(
    "user_profile",
    (whole("userid", private=True), *(whole(name, nullable=True) for name in PROFILE)),
    key="userid",
)
BEHAVIOR_LOG = CsvFile(
    "behavior_log",
    (
        whole("user", private=True),
        _time(FIRST, tolerated=_STRAY),
        choice("btag", ACTIONS),
        whole("cate"),
        whole("brand", nullable=True),
    ),
)
FILES = (RAW_SAMPLE, AD_FEATURE, USER_PROFILE, BEHAVIOR_LOG)


def read(cfg: DataConfig, out: TableWriter) -> None:
    """Read the four files and write the tables.

    Args:
        cfg: ``path`` is the directory of the files.
        out: takes the tables.

    Raises:
        UserError: files are missing, or hold anything but what their columns' rules say; all problems at once.
    """
    connection = out.duckdb()
    try:
        keep_on_disk(connection, out.scratch / "taobao_ad.duckdb")
        _load(cfg, out, connection)
        catalogue = connection.sql("from ad_feature order by adgroup_id").pl().drop(STATE)
        out.write("advertisers", _advertisers(catalogue))
        out.write("ads", _ads(catalogue))
        _choose_users(cfg, connection)
        for frame in batches(connection, _USERS):
            out.write("users", frame.cast(dict.fromkeys(PROFILE, pl.String)))
        _write_events(cfg, out, connection, catalogue)
        _write_placements(out, catalogue)
    except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
        raise no_room(error) from error
    finally:
        connection.close()


def _load(cfg: DataConfig, out: TableWriter, connection: duckdb.DuckDBPyConnection) -> None:
    """The files as tables of DuckDB, once all of them are sound."""
    paths, errors = _locate(cfg.path)
    for file in FILES:
        if file.name not in paths:
            continue
        with out.track(f"reading {paths[file.name].name}", None):
            loaded = load(connection, file, paths[file.name])
        errors += loaded.errors
        if loaded.left_out and not loaded.errors:
            logger.warning(
                "%s: left out %d lines whose time_stamp is not of %s to %s",
                *(paths[file.name].name, loaded.left_out, FIRST.date(), (END - timedelta(days=1)).date()),
            )
    if not errors:
        errors = _inconsistencies(connection, paths[RAW_SAMPLE.name])
    if errors:
        raise UserError.collect(errors)


def files(directory: Path) -> list[Path]:
    """The files that are read of a directory."""
    return [path for file in FILES if (path := file.locate(directory)) is not None]


def _locate(path: str | None) -> tuple[dict[str, Path], list[UserError]]:
    """The files that are there, and an error for those that are not."""
    names = ", ".join(f"{file.name}.csv" for file in FILES)
    expected = f"a directory with {names}, or the same with .csv.gz"
    action = "download Ali_Display_Ad_Click from tianchi.aliyun.com/dataset/56, unpack it and set data.path"
    if path is None:
        raise UserError("data=taobao_ad without a path", expected=expected, action=action)
    found = {file.name: file.locate(Path(path).expanduser()) for file in FILES}
    missing = [f"{name}.csv" for name, place in found.items() if place is None]
    errors = [UserError(f"data.path={path} without {', '.join(missing)}", expected=expected, action=action)]
    return {name: place for name, place in found.items() if place is not None}, errors if missing else []


def _inconsistencies(connection: duckdb.DuckDBPyConnection, path: Path) -> list[UserError]:
    """What no column of ``raw_sample`` tells alone."""
    unlike = connection.sql("select count(*) from raw_sample where nonclk + clk <> 1").fetchall()[0][0]
    unknown, example = connection.sql(
        "select count(*), min(adgroup_id) from raw_sample anti join ad_feature using (adgroup_id)"
    ).fetchall()[0]
    places = connection.sql("select count(distinct pid) from raw_sample").fetchall()[0][0]
    errors = []
    if unlike:
        errors.append(offence(path, "nonclk, clk", "one of the two to be 1, the other 0", unlike, ""))
    if unknown:
        errors.append(offence(path, "adgroup_id", "an adgroup_id of ad_feature", unknown, str(example)))
    if places > _MOST_PLACES:
        rule = f"at most {_MOST_PLACES} places where ads stand, not {places}"
        errors.append(offence(path, "pid", rule, places - _MOST_PLACES, ""))
    return errors


def _choose_users(cfg: DataConfig, connection: duckdb.DuckDBPyConnection) -> None:
    """The table ``chosen``: all users, or ``max_users`` of those who did or saw something in the prior's fit span."""
    if cfg.max_users is None:
        connection.execute(
            'create table chosen as select "user" from raw_sample union select userid from user_profile '
            'union select "user" from behavior_log'
        )
        return
    clicks = connection.sql("select time_stamp from raw_sample where clk = 1").pl()
    if "click" not in cfg.label_kinds:
        clicks = clicks.clear()
    calendar, split = cfg.timeline(clicks.lazy().select(_clock("time_stamp").alias("timestamp")))
    first, last = _second(calendar.start(split.prior_fit[0])), _second(calendar.start(split.prior_fit[1] + 1)) - 1
    within = f"where time_stamp between {first} and {last}"
    seen = connection.sql(f'select "user" from raw_sample {within} union select "user" from behavior_log {within}').pl()
    users = choose_users(seen["user"], cfg.max_users, seed=cfg.seed).to_frame().to_arrow()
    connection.register("chosen_users", users)
    connection.execute("create table chosen as from chosen_users")


_USERS = f"""
select chosen."user" as user_id, {", ".join(PROFILE)}
from chosen left join user_profile on chosen."user" = user_profile.userid
order by user_id
"""
_PACKED = f"""
    ((time_stamp - {_second(FIRST)})::bigint << 34) + ("user"::bigint << 3) + code as moment,
    (what::bigint << 32) + coalesce(detail::bigint + 1, 0) as subject
"""
"""An event as two numbers, by which events are sorted: all there is of it, so that the order is one, in few bytes.

``moment`` is second (21 bits), user (31) and code (3); ``subject`` is what it is about (31), an ad or a category, and
below that 1 + the place or the brand, 0 for none.
"""
_SHOWN = f"""
with place as (select pid, rank() over (order by pid) - 1 as place from (select distinct pid from raw_sample)),
event as (
    select time_stamp, "user", clk as code, adgroup_id as what, place as detail from raw_sample join place using (pid)
)
select {_PACKED} from event
"""
_DONE = f"""
with event as (
    select time_stamp, "user", 2 + enum_code(btag) as code, cate as what, brand as detail from behavior_log
)
select {_PACKED} from event
"""


def _clock(seconds: str) -> pl.Expr:
    """Seconds since 1970, UTC, as a moment of the site's clock."""
    micros = pl.col(seconds).cast(pl.Int64) * 1_000_000 + _UTC_OFFSET // timedelta(microseconds=1)
    return micros.cast(pl.Datetime("us"))


def _write_events(
    cfg: DataConfig, out: TableWriter, connection: duckdb.DuckDBPyConnection, catalogue: pl.DataFrame
) -> None:
    only = "" if cfg.max_users is None else 'semi join chosen using ("user")'
    with out.track("gathering events", None):
        connection.execute(f"create table event as {_SHOWN} {only}")
        # One after the other: to sort a union, DuckDB 2.0 needs memory that grows with its rows.
        connection.execute(f"insert into event {_DONE} {only}")
    places = connection.sql("select distinct pid from raw_sample order by pid").pl()["pid"]
    ads = catalogue.select(
        pl.col("adgroup_id").alias("ad_id"), pl.col("customer").alias("advertiser_id"), pl.col("cate_id").alias("cate")
    )
    owners = (
        catalogue.drop_nulls("brand")
        .group_by("brand")
        .agg(pl.col("customer").first().alias("owner"), pl.col("customer").n_unique().alias("owners"))
        .filter(pl.col("owners") == 1)
        .select("brand", "owner")
    )
    connection.execute("drop table raw_sample")
    connection.execute("drop table behavior_log")
    rows = connection.sql("select count(*) from event").fetchall()[0][0]
    with out.track("writing events", rows) as advance:
        for frame in batches(connection, "from event order by moment, subject"):
            out.write("events", _events(frame, ads, owners, pl.Enum(places)))
            advance(len(frame))


def _events(frame: pl.DataFrame, ads: pl.DataFrame, owners: pl.DataFrame, places: pl.Enum) -> pl.DataFrame:
    """A batch of events.

    Args:
        frame: ``moment`` and ``subject`` of `_PACKED`.
        ads: ``ad_id``, ``advertiser_id``, ``cate``.
        owners: ``brand``, and ``owner``, the one advertiser of all its ads.
        places: where ads stand.
    """
    moment, subject, code = pl.col("moment"), pl.col("subject"), pl.col("code")
    kinds, actions = pl.Series(_EVENT_KINDS, dtype=pl.Enum(KINDS)), pl.Series(_EVENT_ACTIONS, dtype=pl.Enum(ACTIONS))
    what, detail = (subject // 2**32).cast(pl.Int32), subject % 2**32 - 1
    parts = frame.select(
        (moment // 2**34 + _second(FIRST)).alias("second"),
        (moment // 8 % 2**31).cast(pl.Int32).alias("user_id"),
        (moment % 8).cast(pl.UInt8).alias("code"),
        what.alias("what"),
        detail.alias("detail"),
    ).with_columns(
        pl.when(code < 2).then("what").alias("ad_id"),
        pl.when(code >= 2, pl.col("detail") >= 0).then("detail").cast(pl.Int32).alias("brand"),
    )
    known = parts.join(ads, on="ad_id", how="left", maintain_order="left").join(
        owners, on="brand", how="left", maintain_order="left"
    )
    return known.select(
        "user_id",
        _clock("second").alias("timestamp"),
        pl.lit(kinds).gather(code).alias("kind"),
        "ad_id",
        pl.coalesce("advertiser_id", "owner").alias("advertiser_id"),
        pl.lit(None, pl.Float32).alias("value"),
        pl.lit(MARKET, pl.Int32).alias("market_id"),
        pl.lit(1.0, pl.Float32).alias("sample_weight"),
        pl.when(code < 2).then(pl.col("user_id").cast(pl.Int64) * 2**32 + pl.col("second")).alias("request_id"),
        pl.when(code < 2).then("detail").cast(pl.UInt8).cat.to(places).alias("display"),
        pl.format("category {}", pl.coalesce("cate", "what")).alias("category"),
        pl.lit(actions).gather(code).alias("action"),
    )


def _write_placements(out: TableWriter, catalogue: pl.DataFrame) -> None:
    out.write(
        "placements",
        catalogue.select(
            pl.col("adgroup_id").alias("ad_id"),
            pl.lit(MARKET, pl.Int32).alias("market_id"),
            pl.lit(FIRST_SHOWN, pl.Datetime("us")).alias("start"),
            pl.lit(END, pl.Datetime("us")).alias("end"),
        ),
    )


def _ads(catalogue: pl.DataFrame) -> pl.DataFrame:
    category, brand = pl.format("category {}", "cate_id"), pl.format("brand {}", "brand")
    return catalogue.select(
        pl.col("adgroup_id").alias("ad_id"),
        pl.col("customer").alias("advertiser_id"),
        pl.concat_str(category, brand, separator=", ", ignore_nulls=True).alias("text"),
        category.alias("category"),
        brand.alias("brand"),
        pl.format("campaign {}", "campaign_id").alias("campaign"),
        pl.col("price"),
    )


def _advertisers(catalogue: pl.DataFrame) -> pl.DataFrame:
    """One row a customer; its text lists the categories and brands of its ads, the most frequent first."""
    phrases = pl.concat(
        catalogue.select("customer", pl.lit(what).alias("what"), pl.col(column).alias("id"))
        for what, column in (("category", "cate_id"), ("brand", "brand"))
    )
    texts = (
        phrases.drop_nulls()
        .group_by("customer", "what", "id")
        .len()
        .sort(["customer", "len", "what", "id"], descending=[False, True, True, False])
        .group_by("customer", maintain_order=True)
        .agg(pl.format("{} {}", "what", "id").head(_TEXT_PHRASES).str.join(", ").alias("text"))
    )
    return texts.select(
        pl.col("customer").alias("advertiser_id"), pl.format("customer {}", "customer").alias("name"), "text"
    )
