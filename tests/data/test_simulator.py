"""The simulated log against the truth it states, and what must not depend on what."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from data import simulator
from data.config import DataConfig
from data.errors import UserError
from data.log import load_log
from data.prepare import prepare
from data.split import SplitConfig
from data.tables import SCHEMAS, Tables
from data.truth import MAX_CELLS, TRUTH, Segments, SimulatorConfig, Truth
from data.writer import TableWriter

ORIGIN = datetime(2024, 1, 1)
SMALL = SimulatorConfig(
    users=150,
    advertisers=40,
    days=28,
    markets=3,
    cold_share=0.4,
    cold_periods=[2, 3],
    drift_day=14,
    visits_per_week=2.0,
)
WORLD = SimulatorConfig(
    users=1500,
    advertisers=150,
    days=56,
    markets=4,
    visits_per_week=4.0,
    cold_share=0.3,
    cold_periods=[3, 6],
    drift_day=30,
    drift_share=0.5,
    budget=1.5,
)
DRIFT_PERIOD = 6
"""The first period that begins on day 30 or later."""
TOO_UNLIKELY = 4.5
"""Standard errors; by chance one test in 150,000 is beyond."""
LABELS = ("click_conversion", "view_conversion")


def config(cfg: SimulatorConfig, **changes: Any) -> DataConfig:
    return DataConfig(source="simulator", simulator=cfg, **{"origin": "2024-01-01", **changes})


def simulate(directory: Path, cfg: SimulatorConfig, **changes: Any) -> Path:
    directory.mkdir()
    with TableWriter(directory) as out:
        simulator.read(config(cfg, **changes), out)
    return directory


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return simulate(tmp_path_factory.mktemp("world") / "tables", WORLD)


@pytest.fixture(scope="module")
def truth(world: Path) -> Truth:
    return Truth.load(world / TRUTH)


@pytest.fixture(scope="module")
def events(world: Path) -> pl.DataFrame:
    period = (pl.col("timestamp") - ORIGIN).dt.total_days() // 7 + 1
    return pl.read_parquet(world / "events.parquet").with_columns(period.alias("period"))


def of_kind(events: pl.DataFrame, *kinds: str) -> pl.DataFrame:
    return events.filter(pl.col("kind").is_in(kinds))


# The truth by itself

ODD: dict[str, dict[str, Any]] = {
    "default": {},
    "one taste": {"tastes": 1, "tastes_per_user": 1, "tastes_per_advertiser": 1},
    "many tastes": {"tastes": 100, "tastes_per_user": 6, "tastes_per_advertiser": 4},
    "nobody is loyal": {"loyalties": 0},
    "broad traffic alone": {"broad_share": 1.0, "interest_share": 0.0},
    "retargeting alone": {"broad_share": 0.0, "interest_share": 0.0, "loyalties": 8},
    "more markets than advertisers": {"markets": 9, "advertisers": 3, "market_reach": 0.2},
    "no budget suffices": {"budget": 0.01},
    "no propensity but the base": {"affinity": 0.0, "loyalty": 0.0},
}


@pytest.mark.parametrize("name", ODD)
def test_probabilities_sum_to_one_and_are_what_is_shown_times_what_converts(name: str) -> None:
    truth = Truth.draw(replace(SMALL, **ODD[name]), seed=3, period_days=7)
    users, everyone = np.arange(truth.n_users)[:, None], np.arange(truth.n_advertisers)
    for period in (1, 3, 60):
        shown = truth.exposure(users, everyone, period)
        np.testing.assert_allclose(shown.sum(1), 1.0, rtol=1e-12)
        converts = truth.conversion_probability(users, everyone, 1, period)
        assert converts.min() > 0
        assert converts.max() <= 1
        score = truth.score_all(users[:, 0], period)
        np.testing.assert_allclose(score.sum(1), 1.0, rtol=1e-12)
        product = shown * converts
        np.testing.assert_allclose(score, product / product.sum(1, keepdims=True), rtol=1e-9, atol=1e-15)
        runs = truth.running(period)[truth.latents.market_U]
        assert (score[~runs] == 0).all()
        assert (score[runs] > 0).mean() > 0.99 or name == "retargeting alone"


def test_scores_broadcast_users_advertisers_and_periods() -> None:
    truth = Truth.draw(SMALL, seed=0, period_days=7)
    users, period = np.array([5, 7, 5]), np.array([2, 2, 4])
    dense = truth.score_all(users, period)
    assert dense.shape == (3, 40)
    pairs = truth.score(users[:, None], np.array([[3, 9], [9, 3], [0, 39]]), period[:, None])
    np.testing.assert_array_equal(pairs, np.take_along_axis(dense, np.array([[3, 9], [9, 3], [0, 39]]), axis=1))
    assert float(truth.score(7, 9, 2)) == dense[1, 9]
    assert truth.score([], [], 1).shape == (0,)


def test_a_truth_comes_back_from_its_file(tmp_path: Path) -> None:
    truth = Truth.draw(SMALL, seed=4, period_days=7)
    truth.save(tmp_path / "a")
    again = Truth.load(tmp_path / "a")
    assert (again.cfg, again.seed, again.period_days) == (SMALL, 4, 7)
    np.testing.assert_array_equal(truth.score_all(np.arange(150), 3), again.score_all(np.arange(150), 3))
    again.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with pytest.raises(UserError, match=r"(?s)nothing.*data=simulator"):
        Truth.load(tmp_path / "nothing")
    (tmp_path / "c").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"(?s)the truth in"):
        Truth.load(tmp_path / "c")


def test_what_does_not_exist_is_told() -> None:
    truth = Truth.draw(SMALL, seed=0, period_days=7)
    with pytest.raises(UserError) as caught:
        truth.score([0, 150], -1, 0)
    assert all(text in str(caught.value) for text in ("users from 0 to 150", "advertisers from -1", "periods from 0"))
    with pytest.raises(UserError, match=r"(?s)250001 users and 40 advertisers.*at most 10,000,000 cells"):
        truth.score_all(np.zeros(MAX_CELLS // 40 + 1, int), 1)
    with pytest.raises(UserError, match=r"(?s)positions from 0 to 6.*1 to 5"):
        truth.conversion_probability(0, 0, [0, 6], 1)
    with pytest.raises(UserError, match=r"(?s)kinds organic"):
        truth.conversion_probability(0, 0, 1, 1, kinds=("organic",))


def test_more_users_leave_the_first_ones_as_they_were() -> None:
    few, many = (Truth.draw(replace(SMALL, users=users), seed=1, period_days=7).latents for users in (150, 400))
    for name in ("market_U", "visits_U", "age_U", "taste_UT", "theta_UT", "later_theta_UT", "loyal_UL"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:150])
    np.testing.assert_array_equal(few.size_A, many.size_A)


def test_entries_are_drawn_by_weight_from_their_segment() -> None:
    weight = np.array([3.0, 0.0, 1.0, 5.0, 1e-9, 2.0])
    segments = Segments.of(np.array([2, 0, 0, 2, 0, 4]), weight, 5)
    uniform = (np.arange(8000) + 0.5) / 8000
    drawn = np.bincount(segments.pick(np.full(8000, 2), uniform), minlength=6)
    np.testing.assert_array_equal(drawn, [3000, 0, 0, 5000, 0, 0])
    assert set(segments.pick(np.zeros(8000, int), uniform)) == {2}
    assert set(segments.pick(np.array([0, 4]), np.full(2, np.nextafter(1.0, 0.0)))) <= {2, 4, 5}
    np.testing.assert_array_equal(segments.pick(np.array([1, 3]), np.array([0.5, 0.0])), [-1, -1])
    assert Segments.of(np.zeros(0, int), np.zeros(0), 2).pick(np.array([1]), np.array([0.3])) == [-1]


# The log against the truth


def z_of_rates(happened: np.ndarray, chance: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Standardised difference between what happened and its chance, in each group that is not too small for it."""
    difference, variance = np.bincount(group, happened - chance), np.bincount(group, chance * (1 - chance))
    return (difference / np.sqrt(np.maximum(variance, 1e-300)))[variance > 5]


def impressions_with_outcome(events: pl.DataFrame, truth: Truth) -> tuple[pl.DataFrame, np.ndarray, np.ndarray]:
    """Impressions, and for each whether it converted and the chance of that."""
    key = ["request_id", "display"]
    shown = of_kind(events, "impression").join(
        of_kind(events, *LABELS).select(*key, pl.lit(1.0).alias("converted")), on=key, how="left"
    )
    where = shown["user_id"].to_numpy(), shown["advertiser_id"].to_numpy()
    position = shown["display"].to_physical().to_numpy() + 1
    chance = truth.conversion_probability(*where, position, shown["period"].to_numpy())
    return shown, shown["converted"].fill_null(0.0).to_numpy(), chance


def test_conversion_rates_are_the_stated_ones(events: pl.DataFrame, truth: Truth) -> None:
    shown, converted, chance = impressions_with_outcome(events, truth)
    assert converted.sum() > 8000
    position = shown["display"].to_physical().to_numpy().astype(int)
    bucket = np.searchsorted(np.quantile(chance, np.linspace(0, 1, 21)[1:-1]), chance)
    for group in (np.zeros_like(position), position, bucket, shown["advertiser_id"].to_numpy()):
        assert np.abs(z_of_rates(converted, chance, group)).max() < TOO_UNLIKELY
    rate = np.bincount(position, converted) / np.bincount(position)
    assert (np.diff(rate) < 0).all()


@pytest.mark.parametrize("kinds", [("click",), ("click_conversion",), ("view_conversion",)])
def test_each_kind_has_its_own_rate(kinds: tuple[str, ...], events: pl.DataFrame, truth: Truth) -> None:
    shown = of_kind(events, "impression")
    where = shown["user_id"].to_numpy(), shown["advertiser_id"].to_numpy()
    position = shown["display"].to_physical().to_numpy() + 1
    chance = truth.conversion_probability(*where, position, shown["period"].to_numpy(), kinds=kinds)
    happened = len(of_kind(events, *kinds))
    assert abs(happened - chance.sum()) < TOO_UNLIKELY * np.sqrt((chance * (1 - chance)).sum())
    twice = truth.conversion_probability(0, 0, 1, 1, kinds=("click", "click_conversion"))
    assert twice == truth.conversion_probability(0, 0, 1, 1, kinds=("click",))


def check_draws(probability_NA: np.ndarray, drawn_N: np.ndarray) -> None:
    """Draws from rows of probabilities: how often each advertiser came, and how likely what came was."""
    n_advertisers = probability_NA.shape[1]
    expected, variance = probability_NA.sum(0), (probability_NA * (1 - probability_NA)).sum(0)
    often = variance > 5
    z = (np.bincount(drawn_N, minlength=n_advertisers) - expected)[often] / np.sqrt(variance[often])
    assert often.sum() > 100
    assert np.abs(z).max() < TOO_UNLIKELY
    assert abs((z**2).mean() - 1) < TOO_UNLIKELY * np.sqrt(2 / len(z))
    log_NA = np.log(np.maximum(probability_NA, 1e-300))
    mean_N = (probability_NA * log_NA).sum(1)
    spread = np.sqrt(((probability_NA * log_NA**2).sum(1) - mean_N**2).sum())
    drawn = np.take_along_axis(log_NA, drawn_N[:, None], axis=1)[:, 0]
    assert abs((drawn - mean_N).sum()) < TOO_UNLIKELY * spread


def test_advertisers_are_converted_with_as_the_score_says(events: pl.DataFrame, truth: Truth) -> None:
    for first, last in ((1, DRIFT_PERIOD - 1), (DRIFT_PERIOD, 8)):
        chosen = of_kind(events, *LABELS).filter(pl.col("period").is_between(first, last))
        assert len(chosen) > 3000
        score = truth.score_all(chosen["user_id"].to_numpy(), chosen["period"].to_numpy())
        check_draws(score, chosen["advertiser_id"].to_numpy())


def test_advertisers_are_shown_as_stated(events: pl.DataFrame, truth: Truth) -> None:
    shown = of_kind(events, "impression")
    shown = shown[np.sort(np.random.default_rng(0).choice(len(shown), 30_000, replace=False))]
    everyone = np.arange(truth.n_advertisers)
    exposure = truth.exposure(shown["user_id"].to_numpy()[:, None], everyone, shown["period"].to_numpy()[:, None])
    check_draws(exposure, shown["advertiser_id"].to_numpy())


def test_the_test_would_notice_another_truth(events: pl.DataFrame, truth: Truth) -> None:
    chosen = of_kind(events, *LABELS)
    score = truth.score_all(chosen["user_id"].to_numpy(), chosen["period"].to_numpy() + 1)
    with pytest.raises(AssertionError):
        check_draws(score, chosen["advertiser_id"].to_numpy())


def test_expected_spend_keeps_to_the_budgets_and_is_what_is_spent(events: pl.DataFrame, truth: Truth) -> None:
    latents, share_of_market = truth.latents, np.zeros((4, truth.n_advertisers))
    visits_M = np.bincount(latents.market_U, latents.visits_U)
    reached_AM = (latents.phase_AM >= 0) * visits_M
    share_of_market = (reached_AM / np.maximum(reached_AM.sum(1, keepdims=True), 1e-300)).T
    shown = of_kind(events, "impression").group_by("period", "market_id", "advertiser_id").len()
    throttled = 0
    for period in range(1, 9):
        state, here = truth.period(period), shown.filter(pl.col("period") == period)
        spent_MA, budget_MA = np.zeros(state.running_MA.shape), share_of_market * latents.budget_A
        cost = latents.bid_A[here["advertiser_id"]] / 1000
        spent_MA[here["market_id"], here["advertiser_id"]] = here["len"].to_numpy() * cost
        full = state.running_MA & (state.throttle_MA < 0.999) & (state.throttle_MA > 0.011)
        throttled += full.sum()
        noise_MA = np.sqrt(budget_MA * latents.bid_A / 1000)  # of as many impressions as the budget buys
        z = (spent_MA - budget_MA)[full] / noise_MA[full]
        assert abs(z.mean()) < TOO_UNLIKELY * 1.2 / np.sqrt(len(z)) + 0.1
        free = state.running_MA & (state.throttle_MA >= 0.999)
        assert ((spent_MA - budget_MA)[free] < 5 * noise_MA[free]).all()
    assert throttled > 200


def test_with_ample_budgets_nobody_is_throttled() -> None:
    ample = Truth.draw(replace(WORLD, budget=1e6), seed=0, period_days=7).period(4)
    assert (ample.throttle_MA[ample.running_MA] == 1).all()


# Time


def test_cold_advertisers_do_nothing_before_they_launch(events: pl.DataFrame, truth: Truth) -> None:
    launch = truth.latents.launch_A
    late = launch > 1
    assert 20 < late.sum() < 70
    assert (launch[late] >= 3).all()
    known = events.filter(pl.col("advertiser_id").is_not_null())
    assert (known["period"].to_numpy() >= launch[known["advertiser_id"].to_numpy()]).all()
    seen = of_kind(events, "impression")["advertiser_id"].unique()
    assert np.isin(np.flatnonzero(late), seen).mean() > 0.9


def test_every_impression_is_of_an_ad_that_runs_there_and_then(world: Path, events: pl.DataFrame) -> None:
    placements = pl.read_parquet(world / "placements.parquet")
    shown = of_kind(events, "impression", "click", *LABELS)
    runs = shown.join(placements, on=["ad_id", "market_id"], how="left")
    runs = runs.filter((pl.col("start") <= pl.col("timestamp")) & (pl.col("timestamp") < pl.col("end")))
    assert len(runs) == len(shown)
    assert runs["event_id"].n_unique() == len(shown)
    ads = pl.read_parquet(world / "ads.parquet").select("ad_id", pl.col("advertiser_id").alias("owner"))
    owned = shown.join(ads, on="ad_id")
    assert (owned["owner"] == owned["advertiser_id"]).all()


def test_ads_run_pause_and_run_again(world: Path, truth: Truth) -> None:
    placements = pl.read_parquet(world / "placements.parquet").sort("ad_id", "market_id", "start")
    gap = pl.col("start") - pl.col("end").shift(1).over("ad_id", "market_id")
    days = placements.select(gap.dt.total_days()).to_series().drop_nulls().to_numpy()
    assert days.min() == 0
    assert days.max() > 7
    first_ad = truth.latents.ad_ptr[:-1]
    for period in range(1, 9):
        start = ORIGIN + timedelta(days=7 * (period - 1))
        now = placements.filter((pl.col("start") <= start) & (start < pl.col("end")))
        running = np.zeros((4, len(pl.read_parquet(world / "ads.parquet"))), bool)
        running[now["market_id"], now["ad_id"]] = True
        np.testing.assert_array_equal(running[:, first_ad], truth.running(period))


def test_tastes_drift_with_the_first_period_after_the_day(truth: Truth) -> None:
    steady = Truth(replace(truth.cfg, seasonality=0.0), truth.seed, 7, truth.latents)
    users = np.arange(truth.n_users)
    theta = [steady.audience(users, period).theta_BK for period in (1, DRIFT_PERIOD - 1, DRIFT_PERIOD, 30)]
    np.testing.assert_array_equal(theta[0], theta[1])
    np.testing.assert_array_equal(theta[2], theta[3])
    changed = np.abs(theta[1] - theta[2]).sum(1) > 1e-6
    assert abs(changed.mean() - 0.5) < 0.06
    assert not truth.period(DRIFT_PERIOD - 1).drifted
    assert truth.period(DRIFT_PERIOD).drifted


def test_searches_follow_the_tastes_of_the_time(events: pl.DataFrame, truth: Truth) -> None:
    searches = of_kind(events, "search")
    word = searches["category"].to_physical().to_numpy().astype(int) - truth.cfg.tastes
    for drifted in (False, True):
        rows = np.flatnonzero((searches["period"].to_numpy() >= DRIFT_PERIOD) == drifted)
        for period in np.unique(searches["period"].to_numpy()[rows]):
            now = rows[searches["period"].to_numpy()[rows] == period]
            theta = truth.audience(searches["user_id"].to_numpy()[now], int(period)).theta_BK
            z = (np.bincount(word[now] // 12, minlength=16) - theta.sum(0)) / np.sqrt((theta * (1 - theta)).sum(0))
            assert np.abs(z).max() < TOO_UNLIKELY


def test_seasons_come_back_after_a_year() -> None:
    truth = Truth.draw(replace(SMALL, drift_day=0), seed=0, period_days=73)
    seasons = np.array([truth.period(period).season_K for period in range(1, 11)])
    np.testing.assert_allclose(seasons[:5], seasons[5:])
    np.testing.assert_allclose(seasons[:5].mean(0), 1.0)
    assert np.abs(seasons - 1).max() > 0.45


# Bytes


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first, again, other = (simulate(tmp_path / name, SMALL, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    names = {f"{table}.parquet" for table in SCHEMAS} | {TRUTH}
    assert {path.name for path in first.iterdir()} == names
    for name in names:
        assert (first / name).read_bytes() == (again / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()


LATER: dict[str, dict[str, Any]] = {
    "the log goes on": {"days": 40},
    "the log ends earlier": {"days": 15},
    "tastes drift later": {"drift_day": 21},
    "tastes drift in the far future": {"drift_day": 10_000},
    "advertisers launch later": {"cold_periods": [3, 4]},
}


@pytest.mark.parametrize("name", LATER)
def test_what_acts_after_a_day_changes_no_byte_before_it(name: str, tmp_path: Path) -> None:
    """Day 14 is the start of period 3, where tastes drift and the first cold advertisers launch."""
    base = replace(SMALL, cold_periods=[3, 3])
    changed = replace(base, **LATER[name])
    cut, parts = ORIGIN + timedelta(days=14), []
    for directory in (simulate(tmp_path / "a", base), simulate(tmp_path / "b", changed)):
        tables = {table: pl.read_parquet(directory / f"{table}.parquet") for table in SCHEMAS}
        assert len(tables["events"].filter(pl.col("timestamp") >= cut)) > 0
        before = {
            **tables,
            "events": tables["events"].filter(pl.col("timestamp") < cut),
            "placements": tables["placements"].filter(pl.col("start") < cut),
        }
        parts.append((tables, before))
    (tables, before), (tables_after, before_after) = parts
    for table in SCHEMAS:
        assert before[table].equals(before_after[table])
    assert not tables["events"].equals(tables_after["events"])


@pytest.mark.parametrize("name", [column.name for column in fields(SimulatorConfig)])
def test_every_parameter_acts(name: str, small_bytes: bytes, tmp_path: Path) -> None:
    value = asdict(SMALL)[name]
    if isinstance(value, list):
        changed: Any = {"flight_periods": [1, 2], "flight_duty": [0.1, 0.2], "cold_periods": [2, 4]}[name]
    elif isinstance(value, int):
        changed = value + 1
    else:
        changed = value * 0.5
    assert everything(simulate(tmp_path / "changed", replace(SMALL, **{name: changed}))) != small_bytes


def everything(directory: Path) -> bytes:
    return b"".join((directory / f"{table}.parquet").read_bytes() for table in SCHEMAS)


@pytest.fixture(scope="module")
def small_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return everything(simulate(tmp_path_factory.mktemp("small") / "tables", SMALL))


# The tables


def test_the_tables_obey_the_rules_and_load(tmp_path: Path) -> None:
    split = SplitConfig("periods", (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6))
    cfg = config(
        replace(SMALL, days=42), split=split, profile_columns=["age", "region"], ad_columns=["category"], max_users=100
    )
    counts = prepare(cfg, tmp_path)
    assert (counts["users"], counts["advertisers"]) == (100, 40)
    tables = Tables.open(tmp_path)
    kinds = tables.events.select(pl.col("kind").unique()).collect().to_series()
    assert kinds.n_unique() == 9
    log = load_log(tmp_path, cfg, evaluate="test")
    np.testing.assert_array_equal(log.user_ids, np.arange(100))
    np.testing.assert_array_equal(log.advertiser_ids, np.arange(40))
    truth = Truth.load(tmp_path / TRUTH)
    targets = log.advertiser_targets("test")
    assert len(targets) > 20
    assert (truth.score(targets.user[targets.row], targets.item, targets.period[targets.row]) > 0).all()
    for market in range(3):
        np.testing.assert_array_equal(log.active_advertisers(market, 6), np.flatnonzero(truth.running(6)[market]))
    assert log.tables.users["age"].null_count() > 10
    assert {"bid", "category"} <= set(log.tables.ads.columns)


def test_a_conversion_has_its_impression_before_it_and_its_click(events: pl.DataFrame) -> None:
    key = ["request_id", "display"]
    times = {
        kind: of_kind(events, kind).select(*key, "ad_id", pl.col("timestamp").alias(f"{kind}_at"))
        for kind in ("impression", "click", *LABELS)
    }
    for later, earlier in (("click_conversion", "click"), ("view_conversion", "impression"), ("click", "impression")):
        both = times[later].join(times[earlier], on=[*key, "ad_id"])
        assert len(both) == len(times[later])
        assert (both[f"{later}_at"] > both[f"{earlier}_at"]).all()
    assert not len(times["view_conversion"].join(times["click"], on=key))
    assert of_kind(events, *LABELS, "organic")["value"].is_not_null().all()
    days = (
        events.filter(pl.col("request_id").is_not_null())
        .group_by("request_id")
        .agg(pl.col("timestamp").dt.date().n_unique(), pl.col("user_id").n_unique(), pl.col("market_id").n_unique())
    )
    assert (days.drop("request_id") == 1).select(pl.all_horizontal(pl.all())).to_series().all()


def test_texts_are_of_the_tastes_and_names_are_distinct(world: Path, truth: Truth) -> None:
    words = simulator.Words(truth.cfg)
    taste_of = {product: number // words.per_taste for number, product in enumerate(words.products)}
    advertisers, ads = pl.read_parquet(world / "advertisers.parquet"), pl.read_parquet(world / "ads.parquet")
    for text, tastes in zip(advertisers["text"], truth.latents.taste_AT, strict=True):
        assert {taste_of[word] for word in text.split(", ")} <= set(tastes.tolist())
    assert advertisers["name"].n_unique() == len(advertisers)
    texts = dict(zip(advertisers["advertiser_id"], advertisers["text"], strict=True))
    for advertiser, text in ads.select("advertiser_id", "text").iter_rows():
        assert set(text.split(", ")) <= set(texts[advertiser].split(", "))
    assert len({simulator.made_up_name(number) for number in range(50_000)}) == 50_000
    assert simulator.made_up_name(1_000_003) == f"{simulator.made_up_name(3)} 2"


def test_the_largest_vocabulary_has_no_word_twice() -> None:
    words = simulator.Words(replace(SMALL, tastes=128, words_per_taste=60))
    assert len(words.tastes) == 128
    assert len(words.categories.categories) == 128 * 61


def test_without_an_origin_the_first_conversion_has_to_tell_it(tmp_path: Path) -> None:
    directory = simulate(tmp_path / "a", SMALL, origin=None)
    first = pl.read_parquet(directory / "events.parquet")["timestamp"].min()
    assert isinstance(first, datetime)
    assert first.date() == simulator.ORIGIN.date()
    with pytest.raises(UserError, match=r"(?s)data\.origin=null.*set data\.origin"):
        simulate(tmp_path / "b", replace(SMALL, users=1, visits_per_week=0.001), origin=None)


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"users": 0}, ["users=0", "at least 1"]),
    ({"days": -3, "markets": 0}, ["days=-3", "markets=0"]),
    ({"slots": 51}, ["slots=51", "from 1 to 50"]),
    ({"tastes": 129}, ["tastes=129", "from 1 to 128"]),
    ({"words_per_taste": 61}, ["words_per_taste=61"]),
    ({"tastes": 2}, ["tastes_per_user=3", "from 1 to 2"]),
    ({"cold_share": 1.5, "click": -0.1}, ["cold_share=1.5", "click=-0.1", "a share, from 0 to 1"]),
    ({"budget": 0.0}, ["budget=0.0", "positive number"]),
    ({"base": 0.0}, ["base=0.0", "positive number"]),
    ({"popularity_skew": float("nan")}, ["popularity_skew=nan"]),
    ({"seasonality": 1.0}, ["seasonality=1.0", "below 1"]),
    ({"ads_per_advertiser": 0.5}, ["ads_per_advertiser=0.5"]),
    ({"flight_periods": [4, 3]}, ["flight_periods=[4, 3]", "smallest not above largest"]),
    ({"flight_duty": [0.5, 1.5]}, ["flight_duty=[0.5, 1.5]"]),
    ({"cold_periods": [3]}, ["cold_periods=[3]"]),
    ({"broad_share": 0.6, "interest_share": 0.6}, ["broad_share=0.6", "interest_share=0.6", "together at most 1"]),
    ({"affinity": 0.8, "loyalty": 0.3}, ["affinity=0.8", "loyalty=0.3", "together at most 1"]),
    ({"click": 0.9, "view_conversion": 0.2}, ["click=0.9", "view_conversion=0.2"]),
]


@pytest.mark.parametrize(("changes", "told"), BAD)
def test_a_bad_value_is_told_with_what_would_be_right(changes: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        SimulatorConfig(**changes)
    assert all(text in str(caught.value) for text in told)
