"""Described logs: the counts are those of the log itself, whatever the size of the parts and whatever comes later."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import describe as module
from data.artifacts import to_plain
from data.config import DataConfig
from data.describe import Description, Distribution, describe
from data.errors import UserError
from data.log import KINDS, Targets, load_log
from data.prepare import prepare
from data.split import SplitConfig
from data.tables import Tables
from data.writer import write_tables
from tests.logs import tiny_config, tiny_tables

SOUND = tiny_tables()
ORIGIN, WEEK = datetime(2024, 1, 1), timedelta(days=7)
TEST = ORIGIN + 11 * WEEK
"""Start of the tiny log's test span."""


def plain(description: Description) -> dict[str, Any]:
    """As JSON knows it; NaN and infinity are refused."""
    made: dict[str, Any] = json.loads(json.dumps(to_plain(description), allow_nan=False))
    return made


def with_events(change: Callable[[pl.DataFrame], pl.DataFrame], tables: Tables = SOUND) -> Tables:
    return replace(tables, events=change(tables.events.collect()).lazy())


def purchases(rows: Sequence[tuple[str, int, int, str]]) -> Tables:
    """The tiny tables with other events: (user, period, number of the advertiser, kind), one a minute."""
    made = [
        {
            "timestamp": ORIGIN + (period - 1) * WEEK + timedelta(minutes=number),
            "user_id": user,
            "kind": kind,
            "advertiser_id": 100 + advertiser,
        }
        for number, (user, period, advertiser, kind) in enumerate(rows)
    ]
    schema = SOUND.events.collect_schema()
    frame = pl.DataFrame(made, schema={name: schema[name] for name in made[0]}).with_columns(
        pl.lit(None, dtype).alias(name) for name, dtype in schema.items() if name not in made[0]
    )
    frame = frame.with_columns(pl.lit(1.0, schema["sample_weight"]).alias("sample_weight")).sort("timestamp")
    return replace(SOUND, events=frame.select(schema.names()).with_columns(event_id=pl.int_range(pl.len())).lazy())


EVERY_SPAN = [("u000", period, 0, "view_conversion") for period in (1, 6, 7, 9, 10, 12)]
"""A conversion in each span of the split, always with the same advertiser."""


# The counts


@pytest.mark.parametrize("evaluate", ["validation", "test"])
@pytest.mark.parametrize("origin", ["2024-01-01", "2024-01-22"])
def test_counts_are_those_of_the_log(evaluate: str, origin: str, tmp_path: Path) -> None:
    """With the later origin three weeks belong to no span, and are history all the same."""
    split = {} if origin == "2024-01-01" else {"split": SplitConfig(by="quantiles")}
    cfg = tiny_config(origin=origin, **split)
    write_tables(SOUND, tmp_path)
    log = load_log(tmp_path, cfg, evaluate=evaluate)
    found = describe(SOUND, cfg, evaluate=evaluate)

    everything = (int(log.events.period.min()), int(log.events.period.max()))
    visits = log.requests(everything)
    assert found.visits is not None
    assert found.visits.total == len(visits.user)
    cells = list(zip(visits.market.tolist(), visits.period.tolist(), strict=True))
    ads = [len(log.active_ads(*cell).ad) for cell in cells]
    advertisers = [len(log.active_advertisers(*cell)) for cell in cells]
    assert found.visits.eligible_ads == distribution(ads)
    assert found.visits.active_advertisers == distribution(advertisers)
    assert found.visits.without_ads == ads.count(0)

    bought = log.events.select(np.flatnonzero(log.is_purchase))
    assert found.baskets == len(set(zip(bought.user.tolist(), bought.timestamp.tolist(), strict=True)))
    counted = log.advertiser_targets(everything)
    assert (found.user_periods, found.targets) == (len(counted), len(counted.item))
    assert found.new_targets == is_new(log, counted).sum() > 0
    assert [period.period for period in found.periods] == list(range(everything[0], everything[1] + 1))
    for period in found.periods:
        own = log.advertiser_targets((period.period, period.period))
        assert (period.user_periods, period.targets) == (len(own), len(own.item))
        assert period.new_targets == is_new(log, own).sum()
        assert period.start == f"{log.calendar.start(period.period):%Y-%m-%d}"

    seen = set(log.advertiser_targets((everything[0], 0)).item.tolist())
    for span in found.spans:
        if span.name == "test" and evaluate != "test":
            assert span.targets is span.conversions is span.cold_advertisers is None
            continue
        own = log.advertiser_targets(span.name)
        kept = set(own.item.tolist())
        assert (span.user_periods, span.targets) == (len(own), len(own.item))
        assert span.new_targets == is_new(log, own).sum()
        assert (span.advertisers, span.cold_advertisers) == (len(kept), len(kept - seen))
        assert span.conversions == (log.is_label & np.isin(log.events.period, range(span.first, span.last + 1))).sum()
        seen |= kept

    label = log.events.select(np.flatnonzero(log.is_label))
    shown = log.events.weight[log.events.kind == KINDS.index("impression")].sum(dtype=float)
    assert found.conversions == len(label) == sum(period.conversions for period in found.periods)
    assert found.label_rate == pytest.approx(len(label) / (shown + len(label)))
    assert found.users.conversions == distribution(np.unique(label.user, return_counts=True)[1])
    assert found.advertisers.conversions == distribution(np.unique(label.advertiser, return_counts=True)[1])
    assert found.pairs == len(set(zip(label.user.tolist(), label.advertiser.tolist(), strict=True)))
    assert found.density == pytest.approx(found.pairs / (60 * 30))
    running = {ad for cell in set(cells) for ad in log.active_ads(*cell).ad.tolist()}
    assert found.ads.running == len(running)
    assert found.advertisers.with_running_ad == len({int(log.ad_advertiser[ad]) for ad in running})
    assert found.markets == 3


def is_new(log: Any, targets: Targets) -> np.ndarray:
    new: np.ndarray = log.is_new(targets.user[targets.row], targets.period[targets.row], targets.item)
    return new


def distribution(counts: Sequence[int] | np.ndarray) -> Distribution:
    """By definition: the smallest count that a share of the cases does not exceed."""
    ordered = sorted(int(count) for count in counts)
    levels = [next(c for n, c in enumerate(ordered, 1) if n >= share * len(ordered)) for share in (0.1, 0.5, 0.9, 0.99)]
    mean = pytest.approx(sum(ordered) / len(ordered))
    return Distribution(len(ordered), mean, *levels)  # type: ignore[arg-type]


def test_a_new_advertiser_was_never_bought_before_the_period() -> None:
    rows = [
        ("u001", 2, 1, "organic"),
        ("u001", 3, 1, "view_conversion"),  # bought before
        ("u001", 3, 2, "organic"),
        ("u001", 3, 2, "view_conversion"),  # in the same period only: as of its start it is new
        ("u001", 4, 2, "view_conversion"),
        ("u002", 4, 1, "impression"),
        ("u002", 5, 1, "click_conversion"),  # seen, never bought
        ("u002", 5, 1, "click_conversion"),
    ]
    found = describe(purchases(EVERY_SPAN + rows), tiny_config())
    by_period = {period.period: period for period in found.periods}
    counts = {period: (by_period[period].targets, by_period[period].new_targets) for period in (3, 4, 5)}
    assert counts == {3: (2, 1), 4: (1, 0), 5: (1, 1)}
    assert by_period[5].conversions == 2


def test_cold_advertisers_and_those_with_one_conversion() -> None:
    rows = [("u001", 10, 1, "view_conversion"), ("u002", 11, 1, "view_conversion"), ("u003", 11, 2, "view_conversion")]
    before = [("u004", 8, 2, "view_conversion"), ("u004", 8, 3, "view_conversion"), ("u005", 11, 4, "organic")]
    found = describe(purchases(EVERY_SPAN + rows + before), tiny_config())
    validation = next(span for span in found.spans if span.name == "validation")
    assert (validation.advertisers, validation.cold_advertisers) == (3, 1)
    assert (found.advertisers.with_conversion, found.advertisers.with_one_conversion) == (4, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_an_ad_that_pauses_or_is_placed_twice_is_one_eligible_ad(seed: int, tmp_path: Path) -> None:
    """Placements of any length that overlap, touch or pause; ads without an advertiser; a market without an ad."""
    rng, n = np.random.default_rng(seed), 400
    start_P = rng.integers(0, 80, n)
    days_P = np.where(rng.random(n) < 0.1, 5000, rng.integers(1, 40, n))
    placements = pl.DataFrame(
        {
            "ad_id": pl.Series(rng.integers(1000, 1020, n), dtype=pl.Int32),
            "market_id": pl.Series(rng.integers(0, 2, n), dtype=pl.Int32),
            "start": [ORIGIN + timedelta(days=int(start)) for start in start_P],
            "end": [ORIGIN + timedelta(days=int(start + days)) for start, days in zip(start_P, days_P, strict=True)],
        }
    )
    ads = SOUND.ads.with_columns(pl.when(pl.col("ad_id") % 3 > 0).then("advertiser_id").alias("advertiser_id"))
    tables = replace(SOUND, ads=ads, placements=placements.unique().sort("start").lazy())
    found = describe(tables, tiny_config()).visits
    write_tables(tables, tmp_path)
    log = load_log(tmp_path, tiny_config(), evaluate="validation")
    visits = log.requests((1, 11))
    cells = list(zip(visits.market.tolist(), visits.period.tolist(), strict=True))
    assert found is not None
    assert found.eligible_ads == distribution([len(log.active_ads(*cell).ad) for cell in cells])
    assert found.active_advertisers == distribution([len(log.active_advertisers(*cell)) for cell in cells])
    assert found.without_ads == visits.market.tolist().count(2) > 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
def test_head_and_tail(counts: list[int]) -> None:
    rows = [("u000", 1, advertiser, "view_conversion") for advertiser, n in enumerate(counts) for _ in range(n)]
    rest = [("u000", period, 0, "view_conversion") for period in (6, 7, 9, 10)]  # every span has one
    late = [("u000", 12, 0, "view_conversion")]
    found = describe(purchases(rows + rest + late), tiny_config()).concentration
    assert found is not None
    held = sorted([counts[0] + 4, *counts[1:], *[0] * (30 - len(counts))], reverse=True)
    total = sum(held)
    assert found.top_1_percent == pytest.approx(held[0] / total)
    assert found.top_10_percent == pytest.approx(sum(held[:3]) / total)
    pairs = sum(abs(a - b) for a in held for b in held)
    assert found.gini == pytest.approx(pairs / (2 * 30 * total))
    assert found.curve[0] == (0, 0)
    assert found.curve[-1] == (1, 1)
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(found.curve)]
    assert all(x > 0 and y >= 0 for x, y in steps)
    slopes = [y / x for x, y in steps]
    assert all(a >= b - 1e-9 for a, b in pairwise(slopes))


def test_texts_and_profiles() -> None:
    texts = ["", "  ", "fresh bread", "fresh bread", "soap and more", *(f"text {number}" for number in range(25))]
    users = SOUND.users.with_columns(
        pl.Series("city", ["", None, " "] + ["x"] * 57), pl.when(pl.int_range(pl.len()) > 0).then("age").alias("age")
    )
    tables = replace(SOUND, advertisers=SOUND.advertisers.with_columns(pl.Series("text", texts)), users=users)
    found = describe(tables, tiny_config())
    one = found.texts["advertisers"]
    assert (one.total, one.filled, one.shared) == (30, 28, 2)
    assert one.mean_words == pytest.approx((2 + 2 + 3 + 25 * 2) / 28)
    assert found.users.profile["city"] == pytest.approx(57 / 60)
    assert found.users.with_profile == 59  # the first has neither


# What does not change them


@pytest.mark.parametrize("batch", [100, 997, 3000])
def test_the_size_of_the_parts_changes_nothing(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = describe(SOUND, tiny_config())
    monkeypatch.setattr(module, "BATCH", batch)
    assert describe(SOUND, tiny_config()) == whole


def test_ids_may_be_strings_or_numbers_of_another_width() -> None:
    keys = ["user_id", "ad_id", "advertiser_id", "market_id"]
    frames = {schema.name: frame.collect() for schema, frame in SOUND}

    def cast(dtype: type[pl.DataType], columns: list[str]) -> dict[str, pl.DataFrame]:
        return {
            name: frame.with_columns(pl.col(column).cast(dtype) for column in columns if column in frame.columns)
            for name, frame in frames.items()
        }

    text = cast(pl.String, keys)
    wide = cast(pl.Int64, keys[1:]) | {name: frames[name] for name in ("ads", "events")}
    for made in (text, wide):
        tables = Tables(
            made["advertisers"], made["ads"], made["users"], made["events"].lazy(), made["placements"].lazy()
        )
        assert describe(tables, tiny_config()) == describe(SOUND, tiny_config())


def test_nothing_of_the_closed_test_span_is_counted() -> None:
    """Whatever happens or runs from its start on: other users, kinds, markets, advertisers, more of them or fewer."""
    late = pl.col("timestamp") >= TEST
    rng = np.random.default_rng(3)

    def scramble(frame: pl.DataFrame) -> pl.DataFrame:
        shuffled = frame.filter(late).select(
            pl.col(name).sample(fraction=1.0, shuffle=True, seed=int(rng.integers(99)))
            if name in ("user_id", "kind", "advertiser_id", "ad_id", "market_id", "sample_weight")
            else pl.col(name)
            for name in frame.columns
        )
        return pl.concat([frame.filter(~late), shuffled[::2]])

    elsewhere = pl.when(pl.col("start") >= TEST).then(pl.lit(77, pl.Int32)).otherwise("market_id").alias("market_id")
    changed = replace(with_events(scramble), placements=SOUND.placements.with_columns(elsewhere))
    before, after = describe(SOUND, tiny_config()), describe(changed, tiny_config())
    assert before.rows != after.rows
    assert after == replace(before, rows=after.rows, last_day=after.last_day)
    assert describe(SOUND, tiny_config(), evaluate="test") != replace(before, evaluate="test")


# What a log does not have


def test_what_is_not_there_is_none_and_never_a_division_by_zero() -> None:
    rows = [(f"u{number:03d}", period, 3, "view_conversion") for number, period in enumerate((1, 6, 7, 9, 10, 12))]
    tables = replace(purchases(rows), placements=SOUND.placements.limit(0))
    found = describe(tables, tiny_config())
    assert found.visits is found.label_rate is found.advertisers.with_running_ad is found.ads.running is None
    assert found.markets == 0
    assert all(period.label_rate is None for period in found.periods)
    assert found.baskets == found.targets == found.new_targets == 5
    assert plain(found)["visits"] is None

    no_placements = describe(replace(SOUND, placements=SOUND.placements.limit(0)), tiny_config()).visits
    assert no_placements is not None
    assert no_placements.total > 0
    assert no_placements.eligible_ads is no_placements.active_advertisers is no_placements.without_ads is None

    unknown = with_events(lambda frame: frame.with_columns(market_id=pl.lit(None), advertiser_id=pl.lit(None)))
    nobody = describe(replace(unknown, users=SOUND.users.select("user_id")), tiny_config(profile_columns=[]))
    assert nobody.visits is nobody.concentration is nobody.advertisers.conversions is None
    assert (nobody.targets, nobody.pairs, nobody.density) == (0, 0, 0.0)
    assert (nobody.users.with_profile, nobody.users.profile) == (0, {})
    assert nobody.users.with_conversion > 0

    no_text = SOUND.ads.with_columns(text=pl.lit(" "))
    assert describe(replace(SOUND, ads=no_text), tiny_config()).texts["ads"].mean_words is None
    plain(nobody)


def test_a_log_of_ordinals_says_so() -> None:
    cfg = tiny_config(split=SplitConfig(by="leave_one_out"))
    found = describe(SOUND, cfg)
    assert found.ordinal
    assert found.spans[-1].first == found.spans[-1].last == 12
    assert not describe(SOUND, tiny_config()).ordinal


def test_nobody_is_named() -> None:
    text = json.dumps(plain(describe(SOUND, tiny_config(), evaluate="test")))
    assert not any(user in text for user in SOUND.users["user_id"])
    assert "group" not in text  # of the values of the profile column
    assert "age" in text


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="one of validation, test"):
        describe(SOUND, tiny_config(), evaluate="tomorrow")
    with pytest.raises(UserError, match="events without the column kind"):
        describe(replace(SOUND, events=SOUND.events.drop("kind")), tiny_config())
    with pytest.raises(UserError, match="no conversion"):
        describe(with_events(lambda frame: frame.filter(pl.col("kind") == "impression")), tiny_config())


# The Complete Journey

HOUSEHOLDS, TRANSACTIONS, BASKETS, WITH_PROFILE = 2469, 1_469_307, 155_764, 801
ADVERTISERS, ADS, VISITS, ELIGIBLE, TARGETS, PLACEMENTS = 3385, 48_500, 88_000, 2679, 166_000, 15_394_519
"""Counts of another preparation, which shares no code with this one; rounded there in the second row, but for the
placements. Transactions are the rows of the package's transactions.parquet."""
NEW_SHARE = 0.25
"""A quarter of them are new to the household. So it is once half a year has gone by; of the whole year it is .35,
since at first every advertiser is new."""


@pytest.mark.slow
def test_the_complete_journey_has_these_counts(tmp_path: Path) -> None:
    cfg = DataConfig(profile_columns=["age", "income"], origin="2016-12-26")
    prepare(cfg, tmp_path)
    found = describe(Tables.open(tmp_path), cfg, evaluate="test")
    assert (found.users.total, found.users.with_profile) == (HOUSEHOLDS, WITH_PROFILE)
    assert found.events["view_conversion"] + found.events["organic"] == TRANSACTIONS
    assert found.baskets == BASKETS
    assert found.rows["placements"] == PLACEMENTS
    assert found.advertisers.total == pytest.approx(ADVERTISERS, rel=0.011)
    assert found.ads.total == pytest.approx(ADS, rel=0.004)
    assert found.visits is not None
    assert found.visits.eligible_ads is not None
    assert found.visits.total == pytest.approx(VISITS, rel=0.004)
    assert found.visits.eligible_ads.mean == pytest.approx(ELIGIBLE, rel=0.008)
    assert found.targets == pytest.approx(TARGETS, rel=0.003)
    late = {span.name: span for span in found.spans}
    for name in ("ranker_fit", "validation", "test"):
        targets, new = late[name].targets, late[name].new_targets
        assert targets is not None
        assert new is not None
        assert new / targets == pytest.approx(NEW_SHARE, abs=0.02)
