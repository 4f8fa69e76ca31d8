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
from data.log import KINDS, Log, load_log
from data.prepare import prepare
from data.tables import Tables, validate
from tests.data.journey import journey_config, journey_frames, write_journey

FRAMES = journey_frames()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_journey(tmp_path_factory.mktemp("journey"), FRAMES)


@pytest.fixture(scope="module")
def tables(source: Path) -> Tables:
    return complete_journey.read(journey_config(source))


@pytest.fixture(scope="module")
def events(tables: Tables) -> pl.DataFrame:
    return tables.events.collect()


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


def test_every_eligible_ad_can_be_drawn(source: Path) -> None:
    """Over seeds, the mean number of draws of each placed ad is near what uniform sampling gives."""
    drawn: dict[int, int] = {}
    for seed in range(30):
        events = complete_journey.read(journey_config(source, seed=seed)).events.collect()
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


def test_users_are_limited_by_hash_in_every_table(source: Path) -> None:
    few = complete_journey.read(journey_config(source, max_users=7))
    users = set(few.users["user_id"])
    assert len(users) == 7
    assert set(few.events.collect()["user_id"]) <= users
    again = complete_journey.read(journey_config(source, max_users=5))
    assert set(again.users["user_id"]) < users


def test_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = prepared(FRAMES, tmp_path / "a"), prepared(FRAMES, tmp_path / "b")
    for name in ("advertisers", "ads", "users", "events", "placements"):
        assert (first / f"{name}.parquet").read_bytes() == (second / f"{name}.parquet").read_bytes()


CUT = 9


def changed_from(week: int) -> dict[str, pl.DataFrame]:
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


def test_no_leak_in_the_tables(tmp_path: Path) -> None:
    """Rewriting every transaction from week 9 on changes no event before it, their ids included."""
    before = pl.read_parquet(prepared(FRAMES, tmp_path / "a") / "events.parquet")
    after = pl.read_parquet(prepared(changed_from(CUT), tmp_path / "b") / "events.parquet")
    cut = datetime(2016, 12, 26) + (CUT - 1) * (datetime(2017, 1, 2) - datetime(2016, 12, 26))
    early, early_after = (frame.filter(pl.col("timestamp") < cut) for frame in (before, after))
    assert len(early) > 500
    assert early.equals(early_after)
    assert not before.equals(after)


def test_no_leak_in_what_the_log_says_before_the_cut(tmp_path: Path) -> None:
    def log_of(frames: dict[str, pl.DataFrame], name: str) -> Log:
        directory = prepared(frames, tmp_path / name)
        return load_log(directory, journey_config(tmp_path / name / "source"), evaluate="validation")

    log, changed = log_of(FRAMES, "a"), log_of(changed_from(CUT), "b")
    np.testing.assert_array_equal(log.panel(10), changed.panel(10))
    for span in ("prior_fit", "prior_select", "ranker_fit"):
        for targets, other in (
            (log.advertiser_targets(span), changed.advertiser_targets(span)),
            (log.ad_targets(span), changed.ad_targets(span)),
        ):
            for field in ("user", "period", "market", "ptr", "item", "weight", "value"):
                np.testing.assert_array_equal(getattr(targets, field), getattr(other, field))
        shown, other_shown = log.impressions(span), changed.impressions(span)
        np.testing.assert_array_equal(shown.ad, other_shown.ad)
        np.testing.assert_array_equal(shown.weight, other_shown.weight)
    ads, when = np.arange(len(log.ad_ids)), np.full(len(log.ad_ids), CUT)
    for ours, theirs in zip(log.last_prices(ads, when), changed.last_prices(ads, when), strict=True):
        np.testing.assert_array_equal(ours, theirs)


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
def test_the_real_source_has_the_counts_of_the_design(tmp_path: Path) -> None:
    """DESIGN §6: 2,469 households, about 3,400 advertisers, 88k visits, 166k household-week-advertiser positives."""
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
