"""The adapter on a small source, and that nothing of it depends on what comes later."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data import complete_journey
from data.config import DataConfig
from data.errors import UserError
from data.log import KINDS, load_log
from data.prepare import prepare
from data.tables import SCHEMAS, Tables
from data.validation import validate
from data.writer import TableWriter
from tests.data.journey import journey_config, journey_frames, write_journey

FRAMES = journey_frames()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_journey(tmp_path_factory.mktemp("journey"), FRAMES)


@pytest.fixture(scope="module")
def tables(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return read(journey_config(source), tmp_path_factory.mktemp("tables"))


@pytest.fixture(scope="module")
def events(tables: Tables) -> pl.DataFrame:
    return tables.events.collect()


def read(cfg: DataConfig, directory: Path) -> Tables:
    with TableWriter(directory) as out:
        complete_journey.read(cfg, out)
    return Tables.open(directory)


def prepared(frames: dict[str, pl.DataFrame], directory: Path, **changes: object) -> Path:
    directory.mkdir(exist_ok=True)
    out = directory / "tables"
    out.mkdir()
    prepare(journey_config(write_journey(directory / "source", frames), **changes), out)
    return out


def test_tables_obey_their_rules(tables: Tables) -> None:
    validate(tables)


def test_private_labels_are_no_advertisers(tables: Tables, events: pl.DataFrame) -> None:
    assert sorted(tables.advertisers["advertiser_id"]) == list(range(1, 10))
    private = FRAMES["products"].filter(pl.col("brand") == "Private")["product_id"]
    assert not tables.ads["ad_id"].is_in(private.cast(pl.Int32).implode()).any()
    bought = events.filter(pl.col("kind") == "organic", pl.col("advertiser_id").is_null())
    assert len(bought) == FRAMES["transactions"]["product_id"].is_in(private.implode()).sum()
    assert bought["ad_id"].null_count() == len(bought)
    assert bought["category"].null_count() == 0


def test_a_purchase_is_a_conversion_exactly_if_the_product_was_placed_there_and_then(events: pl.DataFrame) -> None:
    placed = {
        (product, store, week) for product, store, _, _, week in FRAMES["promotions"].iter_rows() if product % 10 != 9
    }
    expected = sum(
        (row["product_id"], row["store_id"], row["week"]) in placed
        for row in FRAMES["transactions"].iter_rows(named=True)
    )
    assert (events["kind"] == "view_conversion").sum() == expected > 0
    purchases = events["kind"].is_in(["view_conversion", "organic"]).sum()
    assert purchases == len(FRAMES["transactions"])


def test_impressions_stand_for_all_placed_ads_that_were_not_bought(tables: Tables, events: pl.DataFrame) -> None:
    placements = tables.placements.with_columns(
        week=((pl.col("start") - datetime(2016, 12, 26)).dt.total_days() // 7 + 1)
    ).collect()
    shown = events.filter(pl.col("kind") == "impression")
    converted = events.filter(pl.col("kind") == "view_conversion")
    assert not shown.select("request_id", "ad_id").is_duplicated().any()
    assert shown.join(converted, on=["request_id", "ad_id"], how="semi").is_empty()
    for request, rows in shown.group_by("request_id"):
        week, store = int(request[0]) % 100, int(request[0]) // 100 % 1_000_000
        eligible = placements.filter(pl.col("week") == week, pl.col("market_id") == store)
        bought = converted.filter(pl.col("request_id") == request[0])["ad_id"].n_unique()
        assert rows["ad_id"].is_in(eligible["ad_id"].implode()).all()
        assert len(rows) == 5
        assert rows["sample_weight"].sum() == pytest.approx(len(eligible) - bought, rel=1e-5)


def test_every_eligible_ad_can_be_drawn(source: Path, tmp_path: Path) -> None:
    """Over seeds, the mean number of draws of each placed ad is near what uniform sampling gives."""
    drawn: dict[int, int] = {}
    for seed in range(30):
        events = read(journey_config(source, seed=seed), tmp_path).events.collect()
        one = events.filter(
            pl.col("kind") == "impression", pl.col("request_id") == events["request_id"].drop_nulls()[0]
        )
        for ad in one["ad_id"]:
            drawn[ad] = drawn.get(ad, 0) + 1
    assert len(drawn) > 25  # of about 36, five at a time
    assert max(drawn.values()) < 15


def test_coupons_and_campaigns(events: pl.DataFrame) -> None:
    coupons = events.filter(pl.col("kind") == "coupon")
    assert coupons.sort("user_id")["advertiser_id"].to_list() == [1, None]  # coupon 8 is of two manufacturers
    campaigns = events.filter(pl.col("kind") == "campaign")
    assert campaigns["user_id"].to_list() == [1, 2]
    assert campaigns["category"].to_list() == ["type a", "type a"]


def test_what_an_advertiser_sells_in_words(tables: Tables) -> None:
    texts = dict(tables.advertisers.select("advertiser_id", "text").iter_rows())
    assert {"grocery", "kind 6 x"} <= set(texts[4].split(", "))  # a product without a category has its department
    assert "/" not in "".join(texts.values())
    assert all(len(set(text.split(", "))) == len(text.split(", ")) for text in texts.values())


def test_users_are_limited_by_hash_in_every_table(source: Path, tmp_path: Path) -> None:
    few = read(journey_config(source, max_users=7), tmp_path)
    users = set(few.users["user_id"])
    assert len(users) == 7
    assert set(few.events.collect()["user_id"]) <= users
    again = read(journey_config(source, max_users=5), tmp_path)
    assert set(again.users["user_id"]) < users


def test_the_same_source_gives_the_same_bytes_in_any_order_of_its_rows(tmp_path: Path) -> None:
    """Two coupons of one moment and a product placed twice in one week have nothing but their values to go by."""
    frames, week = dict(FRAMES), FRAMES["promotions"]["week"]
    frames["coupon_redemptions"] = pl.concat(
        [FRAMES["coupon_redemptions"], FRAMES["coupon_redemptions"].with_columns(coupon_upc=15 - pl.col("coupon_upc"))]
    )
    frames["promotions"] = pl.concat(
        [FRAMES["promotions"], FRAMES["promotions"].filter(week == 3).with_columns(display_location=pl.lit("9"))]
    )
    shuffled = {name: frame.sample(fraction=1.0, shuffle=True, seed=5) for name, frame in frames.items()}
    first, second = prepared(frames, tmp_path / "a"), prepared(shuffled, tmp_path / "b")
    for name, schema in SCHEMAS.items():
        table = first / f"{name}.parquet"
        assert table.read_bytes() == (second / f"{name}.parquet").read_bytes()
        if name in ("events", "placements"):
            assert set(pl.read_parquet_schema(table)) <= {column.name for column in schema.columns}


def test_the_test_span_is_closed_unless_asked_for(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "tables"
    out.mkdir()
    prepare(journey_config(source), out)
    closed = load_log(out, journey_config(source), evaluate="validation")
    assert closed.events.period.max() == 11
    with pytest.raises(UserError, match="evaluate=test"):
        closed.advertiser_targets("test")
    opened = load_log(out, journey_config(source), evaluate="test")
    assert len(opened.advertiser_targets("test")) > 0


BAD = [
    (lambda path: DataConfig(source="amazoon", path=str(path)), "data.source=amazoon"),
    (lambda path: DataConfig(path=str(path / "nowhere")), r"transactions.parquet, promotions.parquet"),
    (lambda path: journey_config(path, origin="2016-12-27"), "data.origin=2016-12-27"),
    (lambda path: journey_config(path, label_window_days=6), "data.label_window_days=6"),
]


@pytest.mark.parametrize(("config", "message"), BAD)
def test_bad_input_is_told_and_leaves_nothing(config: object, message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        prepare(config(source), tmp_path)  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_real_source_has_its_counts(tmp_path: Path) -> None:
    """2,469 households, about 3,400 advertisers, 88k visits, 166k household-week-advertiser positives."""
    cfg = DataConfig()
    prepare(cfg, tmp_path)
    log = load_log(tmp_path, cfg, evaluate="test")
    assert len(log.user_ids) == 2469
    assert len(log.advertiser_ids) == pytest.approx(3385, rel=0.02)
    assert len(log.ad_ids) == pytest.approx(48_500, rel=0.01)
    assert int(log.is_purchase.sum()) == 1_469_307
    visits = log.requests((1, 53))
    assert len(visits.user) == pytest.approx(88_000, rel=0.01)
    eligible = [len(log.active_ads(m, p).ad) for m, p in zip(visits.market[::50], visits.period[::50], strict=True)]
    assert np.mean(eligible) == pytest.approx(2679, rel=0.03)
    assert len(log.advertiser_targets((1, 53)).item) == pytest.approx(166_000, rel=0.01)
    assert set(KINDS) >= {"impression", "view_conversion", "organic", "coupon", "campaign"}
