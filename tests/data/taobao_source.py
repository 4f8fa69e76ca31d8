"""A small directory in the shape of Taobao's display-ad files."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

from data.config import DataConfig
from data.split import SplitConfig
from data.taobao_ad import ACTIONS, END, FIRST, FIRST_SHOWN, PROFILE

PLACES = ("430539_1007", "430548_1007")
N_USERS, N_ADS = 60, 80
FIRST_USER = 9_400_001
"""Ids no other number of the source looks like, so that a test sees one that gets into a message."""
SPLIT = SplitConfig(
    prior_fit=(1, 16),
    prior_select=(17, 17),
    ranker_fit=(18, 19),
    ranker_stop=(20, 20),
    validation=(21, 21),
    test=(22, 22),
)
_UTC_OFFSET = timedelta(hours=8)


def taobao_config(path: Path, **changes: object) -> DataConfig:
    """The adapter's config for a directory of :func:`write_taobao`."""
    values: dict[str, object] = {
        "source": "taobao_ad",
        "path": str(path),
        "label_kinds": ["click"],
        "label_window_days": 1,
        "origin": "2017-04-22",
        "split": SPLIT,
        "profile_columns": ["age_level"],
        "ad_columns": ["category", "brand"],
    }
    return DataConfig(**(values | changes))  # type: ignore[arg-type]


def second_of(moment: datetime) -> int:
    """Seconds since 1970, UTC, of a moment of the site's clock."""
    return int((moment - _UTC_OFFSET - datetime(1970, 1, 1)).total_seconds())


def taobao_frames(*, seed: int = 0, behaviours: int = 900, impressions: int = 800) -> dict[str, pl.DataFrame]:
    """The four files: 80 ads of 12 customers; the last 6 of 60 users have no profile, the first 3 no impression.

    Some rows are there twice, and some differ from another in their last column alone.
    """
    rng = np.random.default_rng(seed)
    users = np.arange(FIRST_USER, FIRST_USER + N_USERS)
    ad = np.arange(N_ADS)
    ads = pl.DataFrame(
        {
            "adgroup_id": 1 + ad,
            "cate_id": 4000 + ad % 9,
            "campaign_id": 70_000 + ad // 2,
            "customer": 1 + ad % 12,
            "brand": [None if i % 10 == 3 else 95_000 + i % 24 for i in range(N_ADS)],  # 24 = 2 · 12: one customer each
            "price": rng.integers(10, 9000, N_ADS) / 10,
        }
    ).with_columns(brand=pl.when(pl.col("adgroup_id").is_in([5, 6])).then(95_099).otherwise("brand"))  # one of two
    n = impressions
    clicked = (np.arange(n) % 7 == 0).astype(np.int64)
    shown = pl.DataFrame(
        {
            "user": rng.choice(users[3:], n),
            "time_stamp": np.sort(rng.integers(second_of(FIRST_SHOWN), second_of(END), n)),
            "adgroup_id": rng.integers(1, 1 + N_ADS, n),
            "pid": rng.choice(PLACES, n),
            "nonclk": 1 - clicked,
            "clk": clicked,
        }
    )
    shown = pl.concat([shown, shown[10:12], shown[10:11].with_columns(adgroup_id=1 + pl.col("adgroup_id") % N_ADS)])
    behaviour = pl.DataFrame(
        {
            "user": rng.choice(users, behaviours),
            "time_stamp": rng.integers(second_of(FIRST), second_of(END), behaviours),
            "btag": rng.choice(ACTIONS, behaviours, p=[0.7, 0.1, 0.1, 0.1]),
            "cate": rng.integers(4000, 4015, behaviours),
            "brand": rng.choice([*ads["brand"].drop_nulls(), 99_999], behaviours),
        }
    )
    behaviour = pl.concat([behaviour, behaviour[:2], behaviour[:9].with_columns(brand=95_000 + pl.col("brand") % 24)])
    profile = {name: rng.integers(0, 5, N_USERS - 6) for name in PROFILE}
    profiles = pl.DataFrame({"userid": users[:-6], **profile}).with_columns(
        pvalue_level=pl.when(pl.col("userid") % 2 == 0).then("pvalue_level")
    )
    return {"raw_sample": shown, "ad_feature": ads, "user_profile": profiles, "behavior_log": behaviour}


def write_frames(directory: Path, frames: dict[str, pl.DataFrame]) -> Path:
    """Write the tables as the published files: brands spelled NULL, a blank after the last name of profiles."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        if name == "ad_feature":
            frame = frame.with_columns(pl.col("brand").cast(pl.String).fill_null("NULL"))
        if name == "user_profile":
            frame = frame.rename({PROFILE[-1]: f"{PROFILE[-1]} "})
        frame.write_csv(directory / f"{name}.csv")
    return directory


def write_taobao(directory: Path, **options: int) -> Path:
    """Write a small source; options as of :func:`taobao_frames`."""
    return write_frames(directory, taobao_frames(**options))


def change_future(directory: Path, cut: datetime) -> None:
    """Rewrite every row of impressions and behaviour at or after a moment of the site's clock: other users, one of them
    new, other ads, clicks where there were none, other categories and brands, other times, and a third of them gone."""
    for name in ("raw_sample", "behavior_log"):
        path = directory / f"{name}.csv"
        frame = pl.read_csv(path)
        late = pl.col("time_stamp") >= second_of(cut)
        changed = (
            frame.filter(late)[::3]
            .vstack(frame.filter(late)[1::3])
            .with_columns(
                user=FIRST_USER + (pl.col("user") * 7 + 5) % (N_USERS + 1),
                time_stamp=second_of(END) - 1 - (pl.col("time_stamp") - second_of(cut)) // 2,
            )
        )
        if name == "raw_sample":
            changed = changed.with_columns(
                adgroup_id=1 + (pl.col("adgroup_id") * 11 + 3) % N_ADS,
                pid=pl.lit(PLACES[0]),
                nonclk="clk",
                clk="nonclk",
            )
        else:
            changed = changed.with_columns(
                cate=4100 + pl.col("cate") % 7, brand=95_000 + pl.col("brand") % 30, btag=pl.lit("buy")
            )
        pl.concat([frame.filter(~late), changed]).write_csv(path)
