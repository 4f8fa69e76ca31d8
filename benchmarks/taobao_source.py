"""A synthetic log in the shape of Taobao's display-ad files, of any size, for measuring `adsid data prepare`.

    python benchmarks/taobao_source.py /tmp/taobao --behaviours 30000000 --impressions 1000000
    adsid data prepare data=taobao_ad data.path=/tmp/taobao

Numbers of ads, customers, campaigns, categories, brands and users, their skew, and shares of clicks, actions and
missing values are about those of the published files, scaled to the number of impressions, or in full with
``--full-catalogue``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

IMPRESSIONS, USERS, ADS = 26_557_961, 1_141_729, 846_811
CUSTOMERS, CAMPAIGNS, CATEGORIES, BRANDS = 255_875, 423_436, 12_968, 460_561
WITHOUT_PROFILE, WITHOUT_BRAND, CLICKED = 0.058, 0.29, 0.051
ACTIONS, SHARE_OF_ACTIONS = ("pv", "cart", "fav", "buy"), (0.9525, 0.022, 0.0129, 0.0126)
PLACES = ("430539_1007", "430548_1007")
PROFILE = {
    "cms_segid": 97,
    "cms_group_id": 13,
    "final_gender_code": 3,
    "age_level": 7,
    "pvalue_level": 4,
    "shopping_level": 4,
    "occupation": 2,
    "new_user_class_level ": 5,
}
"""Columns and number of values; the blank at the end of the last name is the publisher's."""
MISSING = {"pvalue_level": 0.54, "new_user_class_level ": 0.32}
FIRST, FIRST_SHOWN, END = 1_492_790_400, 1_494_000_000, 1_494_691_200
"""Midnight in Shanghai before 2017-04-22, 2017-05-06 and 2017-05-14, in seconds since 1970, UTC."""
BATCH = 1 << 20


@dataclass
class Shop:
    """What there is to see and to buy, and who sees it.

    Args:
        n_users, n_ads: how many.
        rng: draws everything.
    """

    n_users: int
    n_ads: int
    rng: np.random.Generator

    def __post_init__(self) -> None:
        share = min(1.0, self.n_ads / ADS)
        self.n_brands = max(100, round(BRANDS * share))
        self.n_categories = max(20, round(CATEGORIES * share))
        self.category_of_brand = 1 + self.skewed(self.n_categories, self.n_brands)

    def skewed(self, n: int, size: int, power: float = 3.0) -> NDArray[np.int64]:
        """Numbers below ``n``, the small ones more often."""
        return (n * self.rng.random(size) ** power).astype(np.int64)

    def moments(self, first: int, size: int) -> NDArray[np.int64]:
        """Seconds from ``first`` to the end, in no order, few at night."""
        days = (END - first) // 86_400
        hour = self.rng.triangular(0, 20, 24, size) * 3600
        return first + self.rng.integers(0, days, size) * 86_400 + hour.astype(np.int64).clip(max=86_399)

    def ads(self) -> pl.DataFrame:
        n = self.n_ads
        brand = self.skewed(self.n_brands, n)
        customers, campaigns = max(10, round(n * CUSTOMERS / ADS)), max(10, round(n * CAMPAIGNS / ADS))
        of_brand = self.rng.integers(0, customers, self.n_brands)[brand]
        elsewhere = self.rng.random(n) < 0.3
        return pl.DataFrame(
            {
                "adgroup_id": 1 + self.rng.permutation(n),
                "cate_id": self.category_of_brand[brand],
                "campaign_id": 1 + self.rng.integers(0, campaigns, n),
                "customer": 1 + np.where(elsewhere, self.rng.integers(0, customers, n), of_brand),
                "brand": np.where(self.rng.random(n) < WITHOUT_BRAND, "NULL", (1 + brand).astype(str)),
                "price": self.rng.lognormal(5, 1.3, n).round(1),
            }
        )

    def profiles(self) -> pl.DataFrame:
        users = 1 + np.flatnonzero(self.rng.random(self.n_users) >= WITHOUT_PROFILE)
        columns = {name: self.rng.integers(0, values, len(users)) for name, values in PROFILE.items()}
        frame = pl.DataFrame({"userid": self.rng.permutation(users), **columns})
        drop = {name: pl.Series(self.rng.random(len(users)) < share) for name, share in MISSING.items()}
        return frame.with_columns(pl.when(~missing).then(name).alias(name) for name, missing in drop.items())

    def impressions(self, size: int) -> pl.DataFrame:
        clicked = (self.rng.random(size) < CLICKED).astype(np.int64)
        return pl.DataFrame(
            {
                "user": 1 + self.skewed(self.n_users, size, 2),
                "time_stamp": self.moments(FIRST_SHOWN, size),
                "adgroup_id": 1 + self.skewed(self.n_ads, size),
                "pid": pl.Series(PLACES).gather(self.rng.integers(0, 2, size)),
                "nonclk": 1 - clicked,
                "clk": clicked,
            }
        )

    def behaviour(self, size: int) -> pl.DataFrame:
        brand = self.skewed(self.n_brands, size)
        action = np.searchsorted(np.cumsum(SHARE_OF_ACTIONS)[:-1], self.rng.random(size))
        return pl.DataFrame(
            {
                "user": 1 + self.skewed(self.n_users, size, 2),
                "time_stamp": self.moments(FIRST, size),
                "btag": pl.Series(ACTIONS).gather(action),
                "cate": self.category_of_brand[brand],
                "brand": 1 + brand,
            }
        )


def write_log(
    directory: Path, *, behaviours: int, impressions: int, full_catalogue: bool = False, seed: int = 0
) -> None:
    """Write the four files; the same arguments give the same bytes.

    Args:
        directory: is made where it is not there.
        behaviours, impressions: rows of ``behavior_log`` and ``raw_sample``.
        full_catalogue: as many users and ads as published, however few impressions there are.
        seed: of all draws.
    """
    share = 1.0 if full_catalogue else min(1.0, impressions / IMPRESSIONS)
    shop = Shop(max(100, round(USERS * share)), max(100, round(ADS * share)), np.random.default_rng(seed))
    directory.mkdir(parents=True, exist_ok=True)
    shop.ads().write_csv(directory / "ad_feature.csv")
    shop.profiles().write_csv(directory / "user_profile.csv")
    _write(directory / "raw_sample.csv", (shop.impressions(size) for size in _sizes(impressions)))
    _write(directory / "behavior_log.csv", (shop.behaviour(size) for size in _sizes(behaviours)))


def _sizes(rows: int) -> Iterator[int]:
    for first in range(0, rows, BATCH):
        yield min(BATCH, rows - first)


def _write(path: Path, frames: Iterator[pl.DataFrame]) -> None:
    with path.open("wb") as file:
        for number, frame in enumerate(frames):
            frame.write_csv(file, include_header=number == 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--behaviours", type=int, default=1_000_000, help="rows of behavior_log")
    parser.add_argument("--impressions", type=int, default=1_000_000, help="rows of raw_sample")
    parser.add_argument("--full-catalogue", action="store_true", help="as many users and ads as published")
    parser.add_argument("--seed", type=int, default=0)
    write_log(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
