"""A small log with something to learn in it, for the tests of every package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from data.config import DataConfig
from data.log import Log, load_log
from data.split import SplitConfig
from data.tables import KINDS, Tables
from data.writer import write_tables

TINY_SPLIT = SplitConfig(
    prior_fit=(1, 5),
    prior_select=(6, 6),
    ranker_fit=(7, 8),
    ranker_stop=(9, 9),
    validation=(10, 11),
    test=(12, 12),
)
"""Spans of the tiny log's 12 periods."""

_GOODS = ("coffee", "bread", "soap", "cheese", "pasta", "juice", "snacks", "candles", "tissues", "yogurt")
_STYLES = ("organic", "family size", "premium", "light", "classic")


def tiny_config(**changes: object) -> DataConfig:
    """The config of ``tiny_log``."""
    values: dict[str, object] = {
        "origin": "2024-01-01",
        "split": TINY_SPLIT,
        "profile_columns": ["age"],
        "ad_columns": ["category"],
        "impressions_per_visit": 8,
    }
    return DataConfig(**(values | changes))  # type: ignore[arg-type]


def tiny_tables(
    *, n_users: int = 60, n_advertisers: int = 30, n_ads: int = 200, n_markets: int = 3, seed: int = 0
) -> Tables:
    """Twelve weeks of shopping in which each user likes two of ten goods.

    Advertiser ``a`` sells good ``a % 10``, ad ``i`` is of advertiser ``i % n_advertisers``, user ``u`` likes
    goods ``u % 10`` and ``(u + 1) % 10`` (its column ``age`` tells the first), and each week a third of the ads
    run in a market. Most purchases are of liked goods, many of them of the user's own favourite advertiser; so
    counts, words and profile all help to forecast.
    """
    rng = np.random.default_rng(seed)
    goods_A = np.arange(n_advertisers) % len(_GOODS)
    advertiser_I = np.arange(n_ads) % n_advertisers
    good_I = goods_A[advertiser_I]
    origin = np.datetime64("2024-01-01", "us")
    week, minute = np.timedelta64(7, "D"), np.timedelta64(1, "m")
    favourite_U = np.array([rng.choice(np.flatnonzero(goods_A == user % len(_GOODS))) for user in range(n_users)])

    placements: list[tuple[object, ...]] = []
    events: list[tuple[object, ...]] = []
    request = 0
    for period in range(1, 13):
        start = origin + (period - 1) * week
        running = [np.sort(rng.choice(n_ads, n_ads // 3, replace=False)) for _ in range(n_markets)]
        display = [rng.choice(["shelf", "front"], len(ads)) for ads in running]
        for market, ads in enumerate(running):
            for ad, place in zip(ads, display[market], strict=True):
                placements.append((int(ad), market, start.item(), (start + week).item(), str(place)))
        for user in range(n_users):
            if rng.random() < 0.15:
                continue
            market, time = (
                (user + int(rng.random() < 0.1)) % n_markets,
                start + int(rng.integers(9000)) * minute,
            )
            liked_I = np.isin(good_I, [user % len(_GOODS), (user + 1) % len(_GOODS)])
            taste_I = np.where(liked_I, 4.0 / liked_I.sum(), 1.0 / n_ads)
            taste_I[advertiser_I == favourite_U[user]] *= 3.0
            bought = np.unique(rng.choice(n_ads, 4, p=taste_I / taste_I.sum()))
            promoted = np.isin(bought, running[market])
            for ad, is_promoted in zip(bought, promoted, strict=True):
                place = str(display[market][np.searchsorted(running[market], ad)]) if is_promoted else None
                kind = "view_conversion" if is_promoted else "organic"
                price = float(1 + good_I[ad])
                events.append(
                    _event(time, user, kind, market, request, int(ad), int(advertiser_I[ad]), price, place, 1.0)
                )
            others = np.setdiff1d(running[market], bought)
            for ad in np.sort(rng.choice(others, 8, replace=False)):
                place = str(display[market][np.searchsorted(running[market], ad)])
                weight = len(others) / 8
                shown = _event(
                    time,
                    user,
                    "impression",
                    market,
                    request,
                    int(ad),
                    int(advertiser_I[ad]),
                    None,
                    place,
                    weight,
                )
                events.append(shown)
            request += 1

    columns: dict[str, pl.DataType | type[pl.DataType]] = {
        "timestamp": pl.Datetime("us"),
        "user_id": pl.String,
        "kind": pl.Enum(KINDS),
        "market_id": pl.Int32,
        "request_id": pl.Int64,
        "ad_id": pl.Int32,
        "advertiser_id": pl.Int32,
        "value": pl.Float32,
        "display": pl.String,
        "sample_weight": pl.Float32,
        "quantity": pl.Float32,
        "discount": pl.Float32,
        "category": pl.String,
    }
    frame = pl.DataFrame(events, schema=columns, orient="row").sort("timestamp", "request_id", "kind", "ad_id")
    where: dict[str, pl.DataType | type[pl.DataType]] = {
        "ad_id": pl.Int32,
        "market_id": pl.Int32,
        "start": pl.Datetime("us"),
        "end": pl.Datetime("us"),
    }
    return Tables(
        advertisers=pl.DataFrame(
            {
                "advertiser_id": pl.Series(np.arange(100, 100 + n_advertisers), dtype=pl.Int32),
                "name": [f"advertiser {number}" for number in range(n_advertisers)],
                "text": [f"{_STYLES[number % len(_STYLES)]} {_GOODS[good]}" for number, good in enumerate(goods_A)],
            }
        ),
        ads=pl.DataFrame(
            {
                "ad_id": pl.Series(np.arange(1000, 1000 + n_ads), dtype=pl.Int32),
                "advertiser_id": pl.Series(100 + advertiser_I, dtype=pl.Int32),
                "text": [f"{_STYLES[number % len(_STYLES)]} {_GOODS[good]}" for number, good in enumerate(good_I)],
                "category": [_GOODS[good] for good in good_I],
            }
        ),
        users=pl.DataFrame(
            {
                "user_id": [f"u{user:03d}" for user in range(n_users)],
                "age": [None if user % 7 == 0 else f"group {user % len(_GOODS)}" for user in range(n_users)],
            }
        ),
        events=frame.with_row_index("event_id").cast({"event_id": pl.Int64}).lazy(),
        placements=pl.DataFrame(placements, schema=where | {"display": pl.String}, orient="row")
        .with_columns(pl.col("ad_id") + 1000, pl.lit(None, pl.String).alias("mailer"))
        .sort("start", "market_id", "ad_id")
        .lazy(),
    )


def tiny_log(
    tmp_path: Path, *, evaluate: str = "validation", entity: str = "advertiser", seed: int = 0, **sizes: int
) -> Log:
    """Writes ``tiny_tables`` to ``tmp_path / "tables"`` and loads them.

    Args:
        tmp_path: an existing directory.
        evaluate: ``"test"`` opens period 12.
        entity: ``"item"`` makes every ad an advertiser.
        seed: of the tables.
        sizes: ``n_users`` (60), ``n_advertisers`` (30), ``n_ads`` (200), ``n_markets`` (3).
    """
    directory = tmp_path / "tables"
    directory.mkdir(exist_ok=True)
    write_tables(tiny_tables(seed=seed, **sizes), directory)
    return load_log(directory, tiny_config(), evaluate=evaluate, entity=entity)


def _event(
    time: np.datetime64,
    user: int,
    kind: str,
    market: int,
    request: int,
    ad: int,
    advertiser: int,
    value: float | None,
    display: str | None,
    weight: float,
) -> tuple[object, ...]:
    """A row of events; a discount of a tenth and one piece go with every purchase."""
    bought = value is not None
    good = _GOODS[advertiser % len(_GOODS)] if bought else None
    discount = value / 10 if value is not None else None
    quantity = 1.0 if bought else None
    user_id, ids = f"u{user:03d}", (1000 + ad, 100 + advertiser)
    return (
        time.item(),
        user_id,
        kind,
        market,
        request,
        *ids,
        value,
        display,
        weight,
        quantity,
        discount,
        good,
    )
