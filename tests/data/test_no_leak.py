"""No byte of what happened before a cut depends on what happens after it: on every source.

Each source is written twice, the second time with everything from the cut on rewritten. The events before the cut,
their numbers included, and all that the log says of earlier periods must be the same; and so must be what the ranker,
the anchor, the history vector and the user tower read of it, up to the moment of the cut itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data.config import DataConfig
from data.log import Log, Targets, load_log
from data.prepare import SOURCES, prepare
from data.truth import SimulatorConfig
from data.writer import write_tables
from priors.anchor import Anchor, AnchorConstants, Counts
from priors.history import HistoryVectors
from ranking.config import FeatureConfig
from ranking.features import FeatureBuilder
from ranking.rows import Features, Rows
from retrieval.config import PairsConfig
from retrieval.two_tower_data import UserInputs
from semantic_ids.advertiser_ids import AdvertiserIds
from tests.data import reviews_source, taobao_source
from tests.data.journey import changed_journey, journey_config, journey_frames, write_journey
from tests.logs import tiny_config, tiny_tables


@dataclass(frozen=True)
class Case:
    """How a source is written, and what of it changes.

    Args:
        config: of a source in a directory, which it writes; with or without the rewritten future.
        cut: first moment that is rewritten.
    """

    config: Callable[[Path, bool], DataConfig]
    cut: datetime


JOURNEY_CUT = 9


def journey(directory: Path, changed: bool) -> DataConfig:
    frames = changed_journey(JOURNEY_CUT) if changed else journey_frames()
    return journey_config(write_journey(directory, frames))


PARQUET_CUT = datetime(2024, 1, 1) + timedelta(days=7 * 8)


def parquet(directory: Path, changed: bool) -> DataConfig:
    tables = tiny_tables()
    write_tables(tables, directory)
    if changed:
        late, value = pl.col("timestamp") >= PARQUET_CUT, pl.col("value")
        events = tables.events.collect().with_columns(
            kind=pl.when(late, pl.col("kind") == "organic").then(pl.lit("view_conversion")).otherwise("kind"),
            value=pl.when(late).then(value * 3).otherwise(value),
            ad_id=pl.when(late).then(1000 + (pl.col("ad_id") * 7 + 1) % 200).otherwise("ad_id").cast(pl.Int32),
        )
        events.filter(~late | (pl.col("event_id") % 5 != 0)).write_parquet(directory / "events.parquet")
    return tiny_config(source="parquet", path=str(directory))


LAST_PERIOD = max(map(len, reviews_source.sequences().values())) + 2


def sequences(directory: Path, changed: bool) -> DataConfig:
    """Everybody's last item is another one."""
    reviews_source.write_sequences(directory)
    if changed:
        reviews_source.change_future_sequences(directory)
    return reviews_source.sequences_config(directory)


AMAZON_CUT = reviews_source.START + timedelta(days=reviews_source.DAYS * 9)


def amazon(directory: Path, changed: bool) -> DataConfig:
    reviews_source.write_amazon(directory)
    if changed:
        reviews_source.change_future_amazon(directory, AMAZON_CUT)
    return reviews_source.amazon_config(directory)


TAOBAO_CUT = datetime(2017, 4, 22) + timedelta(days=21)


def taobao_ad(directory: Path, changed: bool) -> DataConfig:
    taobao_source.write_taobao(directory)
    if changed:
        taobao_source.change_future(directory, TAOBAO_CUT)
    return taobao_source.taobao_config(directory)


SIMULATOR_CUT = datetime(2024, 1, 1) + timedelta(days=7 * 8)


def simulator(directory: Path, changed: bool) -> DataConfig:
    """Tastes drift at the cut, or never."""
    world = SimulatorConfig(
        users=60, advertisers=30, days=84, markets=2, drift_day=10_000 if changed else 56, drift_share=1.0
    )
    return tiny_config(source="simulator", simulator=world)


CASES = {
    "sequences": Case(sequences, datetime(2000, 1, 1) + timedelta(days=LAST_PERIOD - 1)),
    "amazon": Case(amazon, AMAZON_CUT),
    "taobao_ad": Case(taobao_ad, TAOBAO_CUT),
    "simulator": Case(simulator, SIMULATOR_CUT),
    "complete_journey": Case(journey, datetime(2016, 12, 26) + timedelta(days=7 * (JOURNEY_CUT - 1))),
    "parquet": Case(parquet, PARQUET_CUT),
}


def both(name: str, directory: Path) -> tuple[Path, Path, DataConfig]:
    """The tables of a source, those with another future, and the config."""
    made = []
    for changed in (False, True):
        source, tables = directory / f"source-{changed}", directory / f"tables-{changed}"
        source.mkdir()
        tables.mkdir()
        cfg = CASES[name].config(source, changed)
        prepare(cfg, tables)
        made.append(tables)
    return made[0], made[1], cfg


def test_every_source_is_tested() -> None:
    assert set(CASES) == set(SOURCES)


@pytest.mark.parametrize("name", CASES)
def test_no_event_before_the_cut_depends_on_a_later_one(name: str, tmp_path: Path) -> None:
    ours, theirs, cfg = both(name, tmp_path)
    frames = [pl.read_parquet(directory / "events.parquet") for directory in (ours, theirs)]
    early, other = (frame.filter(pl.col("timestamp") < CASES[name].cut) for frame in frames)
    assert len(early) > 100
    assert early.equals(other)
    assert not frames[0].equals(frames[1])
    for table in ("advertisers", "ads"):  # the catalogue is known at all times
        assert (ours / f"{table}.parquet").read_bytes() == (theirs / f"{table}.parquet").read_bytes()
    seen = early["user_id"].unique().implode()
    users, others = (
        pl.read_parquet(directory / "users.parquet").filter(pl.col("user_id").is_in(seen))
        for directory in (ours, theirs)
    )
    assert users.equals(others)
    check_logs(*(load_log(directory, cfg, evaluate="test") for directory in (ours, theirs)), cut=CASES[name].cut)


def check_logs(log: Log, other: Log, *, cut: datetime) -> None:
    """What the logs say of periods before the cut is the same."""
    micros = np.array([cut]).astype("datetime64[us]").astype(np.int64)
    last = int(log.calendar.period(micros)[0]) - 1
    assert log.calendar.start(last + 1) == cut
    span = (1, last)
    assert min(len(log.advertiser_targets(span)), len(log.ad_targets(span)), len(log.outcomes(span)[0])) > 0
    for name, columns in (
        ("advertiser_targets", ("period", "market", "item", "weight", "value")),
        ("ad_targets", ("period", "market", "item", "weight", "value")),
        ("outcomes", ("ad", "kind", "weight")),
    ):
        ours, theirs = (getattr(one, name)(span) for one in (log, other))
        ours, theirs = (ours[0], theirs[0]) if name == "outcomes" else (ours, theirs)
        np.testing.assert_array_equal(log.user_ids[ours.user], other.user_ids[theirs.user])
        for column in columns:
            np.testing.assert_array_equal(getattr(ours, column), getattr(theirs, column))
    check_ranker(*(latest_rows(one, last) for one in (log, other)))
    for name, ours, theirs in zip(FORECAST_AND_TOWER, *(read_of_users(one, last) for one in (log, other)), strict=True):
        assert np.any(ours), name
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, err_msg=name)


def ids_of(log: Log) -> AdvertiserIds:
    """IDs of two codes, whose vectors say something."""
    number = np.arange(len(log.advertiser_ids))
    codes_AL = np.stack([number % 10, number // 10], axis=1).astype(np.int64)
    rng = np.random.default_rng(0)
    books = [rng.normal(size=(size, 4)).astype(np.float32) for size in codes_AL.max(0) + 1]
    return AdvertiserIds(log.advertiser_ids, codes_AL, books)


def latest_rows(log: Log, last: int) -> Features:
    """All but the forecast that the ranker reads of the latest rows before the cut, then and as of the cut."""
    rows = Rows.of_span(log, (1, last))
    latest = np.argsort(-rows.period, kind="stable")[:1000]
    rows = Rows(**{column.name: np.tile(getattr(rows, column.name)[latest].T, 2).T for column in fields(Rows)})
    rows.period[len(latest) :] = last + 1
    return FeatureBuilder(log, ids_of(log), FeatureConfig()).build(rows)


def check_ranker(ours: Features, theirs: Features) -> None:
    """Numbers are the same, and so is what the ids stand for."""
    assert ours.dense.keys() == theirs.dense.keys()
    for name in ours.dense:
        np.testing.assert_array_equal(ours.dense[name], theirs.dense[name], err_msg=name)
    for name in ours.sparse:
        mine, others = (
            (np.array(one.ids)[values].tolist(), lengths.tolist())
            for one in (ours.sparse[name], theirs.sparse[name])
            for values, lengths in [one.bags.of_rows(np.arange(len(ours.rows)))]
        )
        assert mine == others, name


FORECAST_AND_TOWER = ("anchor", "history vector", "context_BF", "history_BH", "age_BH", "count_BH")
"""Codes of profiles are left out: the users' table is compared by itself."""


def read_of_users(log: Log, last: int) -> list[np.ndarray]:
    """`FORECAST_AND_TOWER` of the latest visits with a conversion before the cut, in their period and as of the cut."""
    targets: Targets = log.ad_targets((1, last))
    latest = np.argsort(-targets.period, kind="stable")[:200]
    user_B, market_B = np.tile(targets.user[latest], 2), np.tile(targets.market[latest], 2)
    period_B = np.concatenate([targets.period[latest], np.full(len(latest), last + 1, np.int32)])
    counts, ids = Counts.of(log), ids_of(log)
    anchor = Anchor(counts, AnchorConstants(co_weight=0.2, plan_exponent=0.5, own_shrinkage=1.0))
    inputs = UserInputs(log, PairsConfig(), context={"market": log.market_ids.tolist()})(user_B, market_B, period_B)
    return [
        anchor.probabilities(user_B, period_B),
        HistoryVectors(counts, ids, decays=(0.9, 1.0))(user_B, period_B),
        *(inputs[name].numpy() for name in FORECAST_AND_TOWER[2:]),
    ]


def test_no_price_of_a_week_is_known_in_that_week(tmp_path: Path) -> None:
    """On The Complete Journey: without any transaction of week 9, all prices as of week 9 are as they were."""
    frames, week = journey_frames(), JOURNEY_CUT
    without = frames | {"transactions": frames["transactions"].filter(pl.col("week") != week)}
    logs = []
    for name, source in (("all", frames), ("without", without)):
        (tmp_path / name).mkdir()
        cfg = journey_config(write_journey(tmp_path / f"source-{name}", source))
        cfg.split = replace(cfg.split, ranker_fit=(7, 7), ranker_stop=(8, 8))  # week 9 may be empty
        prepare(cfg, tmp_path / name)
        logs.append(load_log(tmp_path / name, cfg, evaluate="validation"))
    shown = Rows.of_span(logs[0], (week, week))
    assert len(shown) > 50
    builders = [FeatureBuilder(log, ids_of(log), FeatureConfig(sparse=["ad"], dense=["price"])) for log in logs]
    ours, theirs = (builder.build(shown).dense for builder in builders)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    later = replace(shown, period=np.full(len(shown), week + 1, np.int32))
    age, other_age = (builder.build(later).dense["price_age"] for builder in builders)
    assert not np.array_equal(age, other_age)
