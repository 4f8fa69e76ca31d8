"""A log in which every ad is an advertiser of its own: nothing but the entity changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data.errors import UserError
from data.log import Events, Log, Placements, load_log
from data.tables import NAME_LETTERS, Tables
from data.writer import write_tables
from tests.data.test_no_leak import CASES, both, check_logs
from tests.logs import tiny_config, tiny_log, tiny_tables


def some_without() -> Tables:
    """The tiny log, where a fifth of the ads are nobody's, and what is bought of them names the ad alone."""
    tables = tiny_tables()
    nobodys = pl.col("ad_id") % 5 == 0
    owner = pl.when(nobodys).then(None).otherwise("advertiser_id").alias("advertiser_id")
    lost = pl.when(pl.col("event_id") % 7 == 0).then(None).otherwise("ad_id").alias("ad_id")
    return replace(
        tables,
        ads=tables.ads.with_columns(owner),
        events=tables.events.with_columns(owner).with_columns(lost),
    )


def logs(tmp_path: Path, tables: Tables) -> tuple[Log, Log]:
    (tmp_path / "tables").mkdir()
    write_tables(tables, tmp_path / "tables")
    advertisers, items = (
        load_log(tmp_path / "tables", tiny_config(), evaluate="validation", entity=entity)
        for entity in ("advertiser", "item")
    )
    return advertisers, items


@pytest.mark.parametrize("made", [tiny_tables, some_without])
def test_nothing_but_the_entity_changes(made: Callable[[], Tables], tmp_path: Path) -> None:
    log, items = logs(tmp_path, made())
    for one in fields(Events):
        expected = log.events.ad if one.name == "advertiser" else getattr(log.events, one.name)
        np.testing.assert_array_equal(getattr(items.events, one.name), expected)
    for one in fields(Placements):
        np.testing.assert_array_equal(getattr(items.placements, one.name), getattr(log.placements, one.name))
    np.testing.assert_array_equal(items.advertiser_ids, log.ad_ids)
    np.testing.assert_array_equal(items.ad_advertiser, np.arange(len(log.ad_ids)))
    kept = {one.name for one in fields(Log)} - {
        "entity", "advertiser_ids", "ad_advertiser", "events", "placements", "tables",
    }  # fmt: skip
    for name in kept:
        np.testing.assert_equal(getattr(items, name), getattr(log, name))
    assert items.tables.ads.drop("advertiser_id").equals(log.tables.ads.drop("advertiser_id"))
    assert items.tables.users.equals(log.tables.users)


@pytest.mark.parametrize("made", [tiny_tables, some_without])
def test_an_item_is_told_by_its_text_and_by_whose_it_is(made: Callable[[], Tables], tmp_path: Path) -> None:
    log, items = logs(tmp_path, made())
    owners = log.tables.advertisers["name"].to_list()
    words = items.tables.advertisers
    assert words["advertiser_id"].to_list() == log.ad_ids.tolist()
    for ad, (name, text) in enumerate(words.select("name", "text").iter_rows()):
        title, owner = log.tables.ads["text"][ad], log.ad_advertiser[ad]
        assert name == title[:NAME_LETTERS]
        assert text == (title if owner < 0 else f"{owners[owner]}, {title}")


def test_targets_are_the_ads_converted_with(tmp_path: Path) -> None:
    items = tiny_log(tmp_path, entity="item")
    targets, of_ads = items.advertiser_targets("validation"), items.ad_targets("validation")
    keys = {
        (user, period, item)
        for user, period, item in zip(
            of_ads.user[of_ads.row].tolist(), of_ads.period[of_ads.row].tolist(), of_ads.item.tolist(), strict=True
        )
    }
    row = targets.row
    found = set(zip(targets.user[row].tolist(), targets.period[row].tolist(), targets.item.tolist(), strict=True))
    assert found == keys


@pytest.mark.parametrize("name", ["parquet", "sequences"])
def test_no_event_before_the_cut_depends_on_a_later_one(name: str, tmp_path: Path) -> None:
    ours, theirs, cfg = both(name, tmp_path)
    check_logs(*(load_log(one, cfg, evaluate="test", entity="item") for one in (ours, theirs)), cut=CASES[name].cut)


def no_ads(tables: Tables) -> Tables:
    return replace(tables, events=tables.events.with_columns(pl.lit(None, pl.Int32).alias("ad_id")))


def same(tables: Tables) -> Tables:
    return tables


@pytest.mark.parametrize(
    ("change", "entity", "message"),
    [
        (no_ads, "item", r"entity=item for .*no click_conversion or view_conversion names an ad"),
        (same, "brand", "entity=brand"),
    ],
)
def test_what_has_no_items_is_refused(
    change: Callable[[Tables], Tables], entity: str, message: str, tmp_path: Path
) -> None:
    write_tables(change(tiny_tables(n_users=10)), tmp_path)
    with pytest.raises(UserError, match=message):
        load_log(tmp_path, tiny_config(), evaluate="validation", entity=entity)
