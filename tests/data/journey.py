"""A small directory in the shape of The Complete Journey's files."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from data.config import DataConfig
from data.split import SplitConfig

WEEKS = 12
SPLIT = SplitConfig(
    prior_fit=(1, 5), prior_select=(6, 6), ranker_fit=(7, 8), ranker_stop=(9, 9), validation=(10, 11), test=(12, 12)
)


def journey_config(path: Path, **changes: object) -> DataConfig:
    """The adapter's config for a directory of :func:`write_journey`."""
    values: dict[str, object] = {
        "path": str(path),
        "split": SPLIT,
        "impressions_per_visit": 5,
        "profile_columns": ["age"],
        "ad_columns": ["department", "category"],
    }
    return DataConfig(**(values | changes))  # type: ignore[arg-type]


def journey_frames(*, seed: int = 0, households: int = 30) -> dict[str, pl.DataFrame]:
    """The eight tables: 60 products of 10 manufacturers (the last one's are private labels), 3 stores, 12 weeks."""
    rng = np.random.default_rng(seed)
    products = pl.DataFrame(
        {
            "product_id": np.arange(1000, 1060),
            "manufacturer_id": 1 + np.arange(60) % 10,
            "department": ["GROCERY" if i % 2 else "DRUG GM" for i in range(60)],
            "brand": ["Private" if i % 10 == 9 else "National" for i in range(60)],
            "product_category": [None if i == 3 else f"KIND {i % 7}/X" for i in range(60)],
            "product_type": [f"TYPE {i % 5}" for i in range(60)],
            "package_size": [None if i % 3 else "12 OZ" for i in range(60)],
        }
    )
    promotions = [
        (1000 + int(product), 300 + store, str(rng.integers(0, 3)), "A", week)
        for week in range(1, WEEKS + 1)
        for store in range(3)
        for product in np.sort(rng.choice(60, 40, replace=False))
    ]
    # Week 1 begins Monday 2016-12-26 midnight in the stores' clock, which is 05:00 UTC.
    start = datetime(2016, 12, 26, 5)
    transactions = []
    for week in range(1, WEEKS + 1):
        for household in range(1, households + 1):
            if rng.random() < 0.2:
                continue
            store, minute = 300 + int(rng.integers(3)), int(rng.integers(7 * 24 * 60 - 60))
            for product in rng.choice(60, 4, replace=False):
                when = start + timedelta(days=7 * (week - 1), minutes=minute)
                price = float(rng.integers(1, 9))
                transactions.append(
                    (
                        household,
                        store,
                        week * 1000 + household,
                        1000 + int(product),
                        1,
                        price,
                        0.5,
                        0.0,
                        0.0,
                        week,
                        when,
                    )
                )
    names = ["household_id", "store_id", "basket_id", "product_id", "quantity", "sales_value", "retail_disc"]
    names += ["coupon_disc", "coupon_match_disc", "week", "transaction_timestamp"]
    return {
        "products": products,
        "promotions": pl.DataFrame(
            promotions, schema=["product_id", "store_id", "display_location", "mailer_location", "week"], orient="row"
        ),
        "transactions": pl.DataFrame(transactions, schema=names, orient="row").with_columns(
            pl.col("transaction_timestamp").cast(pl.Datetime("ns"))
        ),
        "demographics": pl.DataFrame(
            {
                "household_id": [1, 2, 3],
                "age": ["65+", "45-54", None],
                "income": ["35-49K"] * 3,
                **{name: ["x"] * 3 for name in ("home_ownership", "marital_status", "household_size")},
                **{name: ["y"] * 3 for name in ("household_comp", "kids_count")},
            }
        ),
        "campaigns": pl.DataFrame({"campaign_id": [1, 1, 2], "household_id": [1, 2, 99]}),
        "campaign_descriptions": pl.DataFrame(
            {
                "campaign_id": [1, 2],
                "campaign_type": ["Type A", "Type B"],
                "start_date": [datetime(2017, 1, 10), datetime(2017, 2, 20)],
                "end_date": [datetime(2017, 2, 1), datetime(2017, 3, 1)],
            }
        ),
        "coupons": pl.DataFrame(
            {"coupon_upc": [7, 7, 8, 8], "product_id": [1000, 1010, 1001, 1002], "campaign_id": [1, 1, 1, 1]}
        ),
        "coupon_redemptions": pl.DataFrame(
            {
                "household_id": [1, 2],
                "coupon_upc": [7, 8],
                "campaign_id": [1, 1],
                "redemption_date": [datetime(2017, 1, 12), datetime(2017, 1, 13)],
            }
        ),
    }


def write_journey(directory: Path, frames: dict[str, pl.DataFrame]) -> Path:
    """Write the tables as the source's Parquet files."""
    directory.mkdir(exist_ok=True)
    for name, frame in frames.items():
        frame.write_parquet(directory / f"{name}.parquet")
    return directory


def changed_journey(week: int) -> dict[str, pl.DataFrame]:
    """The source with all that happened from a week on rewritten: other products, prices, households, or nothing."""
    frames = journey_frames()
    late = pl.col("week") >= week
    transactions = frames["transactions"]
    rewritten = transactions.filter(late).with_columns(
        product_id=1000 + (pl.col("product_id") * 7 + 13) % 60,
        sales_value=pl.col("sales_value") * 3 + 1,
        quantity=pl.lit(4, pl.Int64),
        store_id=300 + (pl.col("store_id") + 1) % 3,
    )
    kept = rewritten.filter(pl.col("household_id") % 4 != 0)  # some stay at home
    frames["transactions"] = pl.concat([transactions.filter(~late), kept])
    return frames
