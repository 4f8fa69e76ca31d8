"""What the sources of reviews share: a shop whose items are ads, whose brands are advertisers, and nothing else.

=================  =======================================================================================
advertiser         a brand
ad                 an item of the catalogue; without a brand it is an ad of no advertiser
market             the one site, :data:`MARKET`
placement          every item runs on the site from period 1 on, without an end
click_conversion   a user bought or reviewed the item
organic            the same of an item that is not in the catalogue; it has neither ad nor advertiser
impression         an item the user could have been shown in a period and was not converted by (sampled)
=================  =======================================================================================

The catalogue is taken as known at all times, as ads are set up before they run. When an item came onto the site
is not in these sources, and must not be derived from its first review: an item that appears in week ``w`` would
then be known to be reviewed in week ``w``.

A *visit* is a user in a period. Its events have a number in common that depends on the user and the period alone,
so that no other event can change it.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import numpy as np
import polars as pl

from data.config import DataConfig
from data.sampling import hash_ids, sample_impressions
from data.tables import KINDS, LATEST
from data.writer import TableWriter

MARKET = 0
LEVELS = " > "
"""Stands between the levels of an item's category."""
_KINDS = pl.Enum(KINDS)
_PHRASES = 12
_TITLE_WORDS = 8
_CANDIDATES = 2_000_000
"""Candidates for impressions held in memory at a time; their number changes no draw."""


def ads_of(items: pl.DataFrame) -> pl.DataFrame:
    """The table of ads.

    Args:
        items: ``item_id``, ``advertiser_id`` (null for none), ``title`` and ``categories`` (a path joined by
            :data:`LEVELS`), both ``""`` where unknown; ``brand`` is left out, further columns are kept.

    Returns:
        Ads in order of ``ad_id``; the path of categories is the categorical column ``category``.
    """
    words = [pl.col("title"), pl.col("categories").str.replace_all(LEVELS, ", ", literal=True)]
    known = {"item_id", "advertiser_id", "brand", "title", "categories"}
    return items.sort("item_id").select(
        pl.col("item_id").alias("ad_id"),
        "advertiser_id",
        pl.concat_str([word.replace("", None) for word in words], separator=", ", ignore_nulls=True).alias("text"),
        pl.col("categories").replace("", None).alias("category"),
        *(name for name in items.columns if name not in known),
    )


def advertisers_of(items: pl.DataFrame) -> pl.DataFrame:
    """The table of advertisers.

    The name is the brand's most frequent spelling in the catalogue. The text lists what the brand sells: its
    categories, the most items first, then, as far as there is room, titles.

    Args:
        items: as in :func:`ads_of`, with ``brand``, the spelling.

    Returns:
        Advertisers in order of ``advertiser_id``.
    """
    branded = items.filter(pl.col("advertiser_id").is_not_null())
    category = pl.col("categories").str.split(LEVELS).list.last().str.to_lowercase().str.strip_chars()
    title = pl.col("title").str.split(" ").list.head(_TITLE_WORDS).list.join(" ").str.replace_all(",", "", literal=True)
    phrases = (
        pl.concat(
            [
                branded.select("advertiser_id", category.alias("phrase"), pl.lit(0).alias("rank")),
                branded.select("advertiser_id", title.alias("phrase"), pl.lit(1).alias("rank")),
            ]
        )
        .filter(pl.col("phrase") != "")
        .group_by("advertiser_id", "rank", "phrase")
        .len()
        .sort(["advertiser_id", "rank", "len", "phrase"], descending=[False, False, True, False])
        .group_by("advertiser_id", maintain_order=True)
        .agg(pl.col("phrase").head(_PHRASES).str.join(", ").alias("text"))
    )
    return (
        branded.group_by("advertiser_id", "brand")
        .len()
        .sort(["advertiser_id", "len", "brand"], descending=[False, True, False])
        .group_by("advertiser_id", maintain_order=True)
        .agg(pl.col("brand").first().alias("name"))
        .join(phrases, on="advertiser_id", how="left", maintain_order="left")
        .with_columns(pl.col("text").fill_null(""))
    )


def placements_of(ads: pl.DataFrame, start: datetime) -> pl.DataFrame:
    """Every ad on the site, from a moment on."""
    moment = pl.Datetime("us")
    return ads.select(
        "ad_id",
        pl.lit(MARKET, pl.Int32).alias("market_id"),
        pl.lit(start, moment).alias("start"),
        pl.lit(LATEST, moment).alias("end"),
    )


def write_events(
    out: TableWriter, conversions: Iterable[pl.DataFrame], ads: pl.DataFrame, cfg: DataConfig, *, total: int
) -> None:
    """Writes conversions and, right after the conversion that opens a visit, the visit's sampled impressions.

    Args:
        out: where to.
        conversions: in order of time, in batches of any size: ``user_id``, ``timestamp``, ``period`` (null before
            period 1), ``ad`` (row of ``ads``, null for none), and ``bought``: in the row that opens a visit all ads of
            the visit's conversions, null in others.
        ads: the table of ads.
        cfg: number and seed of the impressions.
        total: number of conversions, for the progress bar.
    """
    ids, advertisers = ads["ad_id"], ads["advertiser_id"]
    pool = pl.int_range(len(ads), dtype=pl.Int64, eager=True)
    rows = max(1, _CANDIDATES // (4 * (2 * cfg.impressions_per_visit + 16)))
    with out.track("writing events", total) as advance:
        for batch in conversions:
            for part in batch.iter_slices(rows):
                events = _with_impressions(part, pool, cfg)
                out.write(
                    "events",
                    events.select(
                        "user_id",
                        "timestamp",
                        "kind",
                        ids.gather(events["ad"]).alias("ad_id"),
                        advertisers.gather(events["ad"]).alias("advertiser_id"),
                        pl.lit(None, pl.Float32).alias("value"),
                        pl.lit(MARKET, pl.Int32).alias("market_id"),
                        "sample_weight",
                        "request_id",
                    ),
                )
                advance(len(part))


def _with_impressions(part: pl.DataFrame, pool: pl.Series, cfg: DataConfig) -> pl.DataFrame:
    part = part.with_columns(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("place"),
        pl.col("ad").cast(pl.Int64),
        _request(part),
        pl.when(pl.col("ad").is_null())
        .then(pl.lit("organic", _KINDS))
        .otherwise(pl.lit("click_conversion", _KINDS))
        .alias("kind"),
        pl.lit(1.0, pl.Float32).alias("sample_weight"),
    )
    visits = part.filter(pl.col("bought").is_not_null()).with_columns(
        pl.lit(0, pl.Int64).alias("first"), pl.lit(len(pool), pl.Int64).alias("eligible")
    )
    bought = visits.select("request_id", pl.col("bought").cast(pl.List(pl.Int64)).alias("ad_id")).explode("ad_id")
    drawn = sample_impressions(visits, pool, bought, per_visit=cfg.impressions_per_visit, seed=cfg.seed)
    impressions = visits[drawn["visit"]].with_columns(
        drawn["row"].alias("ad"), drawn["sample_weight"], pl.lit("impression", _KINDS).alias("kind")
    )
    columns = ("place", "user_id", "timestamp", "kind", "ad", "sample_weight", "request_id")
    shown_last = pl.col("kind") == "impression"
    return pl.concat([part.select(columns), impressions.select(columns)]).sort("place", shown_last, "ad")


def _request(part: pl.DataFrame) -> pl.Series:
    """Number of each row's visit; a function of user and period alone. None before period 1."""
    key = part.select(pl.format("{} {}", "period", "user_id")).to_series()
    number = (hash_ids(key.drop_nulls().to_numpy(), seed=0) >> np.uint64(1)).astype(np.int64)
    rows = pl.Series(np.flatnonzero(key.is_not_null().to_numpy()))
    return pl.repeat(None, len(part), dtype=pl.Int64, eager=True).scatter(rows, pl.Series(number)).alias("request_id")
