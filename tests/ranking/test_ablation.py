"""The ablation credits what a forecast adds and nothing else, and keeps what was finished."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ranking.ablation as ablation
from data.errors import UserError
from data.statistics import Row
from priors.forecast import PRIOR_FEATURES
from ranking.ablation import (
    SHUFFLED,
    RememberedForecast,
    ShuffledForecast,
    arms,
    compare,
    grid,
    run_ablation,
    segments,
)
from ranking.config import MODELS, AblationConfig
from ranking.features import FeatureBuilder, Features
from ranking.metrics import METRICS, Sample, evaluate
from ranking.prior import GROUPS
from ranking.ranker import RankerSpans
from tests.logs import tiny_log
from tests.ranking.common import KnownForecast, tastes, tiny_ids, tiny_ranker

CFG = tiny_ranker(seeds=[0, 1])


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> RankerSpans:
    log = tiny_log(tmp_path_factory.mktemp("log"))
    return RankerSpans.of(FeatureBuilder(log, tiny_ids(log), CFG.features), None)


def find(rows: list[Row], metric: str, arm: str, segment: str = "all") -> Row:
    return next(row for row in rows if (row.metric, row.arm, row.segment) == (metric, arm, segment))


@pytest.fixture(scope="module")
def rows(spans: RankerSpans, tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    forecasts = {"none": None, "anchor": tastes(spans.log, strength=2.0), "lm": tastes(spans.log)}
    return run_ablation(spans, forecasts, CFG, tmp_path_factory.mktemp("ablation"))


def test_every_metric_of_every_arm_and_difference_by_segment(rows: list[Row]) -> None:
    arms = {"none", "anchor", "lm", SHUFFLED, "lm - anchor", "lm - none", "anchor - none"}
    arms |= {f"{SHUFFLED} - none", f"lm - {SHUFFLED}"}
    expected = {(m, a, s) for m in METRICS for a in arms for s in ("all", "new", "sparse users")}
    assert {(row.metric, row.arm, row.segment) for row in rows} == expected
    assert len(rows) == len(expected)
    assert {(row.section, row.seeds, row.k) for row in rows} == {("ranking", 2, None)}
    for row in rows:
        assert row.ci_low is not None
        assert row.ci_high is not None
        assert row.ci_low <= row.ci_high


def test_differences_are_those_of_the_arms(rows: list[Row]) -> None:
    for metric in METRICS:
        lm, none = (find(rows, metric, arm).value for arm in ("lm", "none"))
        assert find(rows, metric, "lm - none").value == pytest.approx(lm - none)


def test_equal_arms_show_no_difference_at_all(spans: RankerSpans) -> None:
    probability = np.random.default_rng(0).uniform(0.01, 0.5, len(spans.evaluation.rows))
    rows = compare(spans, {"none": [probability[:, None]], "lm": [probability[:, None]]}, replace(CFG, seeds=[0]))
    assert {(r.value, r.ci_low, r.ci_high) for r in rows if r.arm == "lm - none"} == {(0.0, 0.0, 0.0)}


def test_the_figure_of_an_arm_is_the_mean_over_its_seeds(spans: RankerSpans) -> None:
    rng = np.random.default_rng(0)
    first, second = (rng.uniform(0.01, 0.5, (len(spans.evaluation.rows), 1)) for _ in range(2))
    one, other = (find(compare(spans, {"lm": [p]}, CFG), "auc", "lm").value for p in (first, second))
    both = find(compare(spans, {"lm": [first, second]}, CFG), "auc", "lm").value
    assert both == pytest.approx((one + other) / 2)


def test_intervals_widen_by_what_the_seeds_differ(spans: RankerSpans) -> None:
    rng = np.random.default_rng(0)
    label = spans.evaluation.rows.label_NT
    good = np.clip(0.3 * label + rng.uniform(0.01, 0.5, label.shape), 0, 1)
    bad = rng.uniform(0.01, 0.5, label.shape)

    def width(predictions: list) -> float:
        row = find(compare(spans, {"lm": predictions}, replace(CFG, draws=200)), "auc", "lm")
        assert row.ci_low is not None
        assert row.ci_high is not None
        return row.ci_high - row.ci_low

    assert width([good, bad]) > 2 * max(width([good, good]), width([bad, bad]))


def test_segments_are_what_they_say(spans: RankerSpans) -> None:
    log, rows = spans.log, spans.evaluation.rows
    found = segments(spans)
    bought = log.is_purchase
    for n in np.random.default_rng(0).choice(len(rows), 30, replace=False):
        own = bought & (log.events.user == rows.user[n])
        same = own & (log.events.advertiser == rows.advertiser[n]) & (log.events.period < rows.period[n])
        assert found["new"][n] == (not same.any())
    assert 0.2 < len(np.unique(rows.user[found["sparse users"]])) / len(np.unique(rows.user)) < 0.5


def test_figures_of_a_segment_are_those_of_its_rows_alone(spans: RankerSpans) -> None:
    rows = spans.evaluation.rows
    probability = np.random.default_rng(0).uniform(0.01, 0.5, len(rows))
    figures = compare(spans, {"lm": [probability[:, None]]}, replace(CFG, seeds=[0]))
    masks = {segment: mask_N for segment, mask_N in segments(spans).items() if mask_N.any()}
    assert len(masks) >= 3
    for segment, mask_N in masks.items():
        alone = Sample.of(rows.label[mask_N], rows.weight[mask_N], rows.user[mask_N], draws=1, seed=0)
        for metric, expected_D in evaluate(alone, probability[mask_N]).items():
            row = find(figures, metric, "lm", segment)
            assert (row.value, row.n) == (pytest.approx(expected_D[0]), mask_N.sum()), (metric, segment)


def test_a_segment_without_rows_is_left_out(spans: RankerSpans, monkeypatch: pytest.MonkeyPatch) -> None:
    probability = np.full((len(spans.evaluation.rows), 1), 0.1)
    nothing = {"all": np.ones(len(probability), bool), "new": np.zeros(len(probability), bool)}
    monkeypatch.setattr(ablation, "segments", lambda spans: nothing)
    assert {row.segment for row in compare(spans, {"none": [probability]}, CFG)} == {"all"}


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_span_of_one_class_has_a_loss_and_no_auc(spans: RankerSpans, label: float) -> None:
    rows = spans.evaluation.rows
    one_class = replace(rows, label_NT=np.full_like(rows.label_NT, label))
    probability = np.random.default_rng(0).uniform(0.01, 0.5, (len(rows), 1))
    of_class = replace(spans, evaluation=replace(spans.evaluation, rows=one_class))
    figures = compare(of_class, {"none": [probability], "lm": [probability]}, replace(CFG, seeds=[0]))
    known = {row.metric for row in figures if np.isfinite(row.value)}
    assert known == {"log_loss", "ece"} | ({"pr_auc"} if label else set())  # all of a list of conversions are right
    assert {row.metric for row in figures} == set(METRICS)


def test_in_the_shuffle_everybody_has_the_forecast_of_somebody_else(spans: RankerSpans) -> None:
    forecast = tastes(spans.log)
    users = np.array([3, 8, 5, 41, 3])
    shuffled = ShuffledForecast(forecast, users)
    assert sorted(shuffled.other(users[:4]).tolist()) == sorted(users[:4].tolist())
    assert (shuffled.other(users) != users).all()
    period, advertiser = np.full(5, 10), np.arange(5)
    expected = forecast.features(shuffled.other(users), period, advertiser)
    given = shuffled.features(users, period, advertiser)
    for name in PRIOR_FEATURES:
        np.testing.assert_array_equal(given[name], expected[name])
    ads = np.arange(5)
    assert shuffled.has_interests
    np.testing.assert_array_equal(
        shuffled.interest_match(users, period, ads), forecast.interest_match(shuffled.other(users), period, ads)
    )
    np.testing.assert_array_equal(shuffled.log_probs(users, period), forecast.log_probs(shuffled.other(users), period))
    with pytest.raises(ValueError, match="not among those"):
        shuffled.other(np.array([4]))
    with pytest.raises(ValueError, match="at least two"):
        ShuffledForecast(forecast, np.array([3, 3]))


def test_a_control_of_one_user_is_told(spans: RankerSpans) -> None:
    def of_one(part: Features) -> Features:
        return replace(part, rows=replace(part.rows, user=np.full(len(part.rows), 3)))

    alone = replace(spans, fit=of_one(spans.fit), stop=of_one(spans.stop), evaluation=of_one(spans.evaluation))
    with pytest.raises(UserError, match=r"(?s)at least two users.*prior\.panel.*ranker\.shuffled_control=false"):
        arms(alone, {"none": None, "lm": tastes(spans.log)}, CFG)


def test_killed_between_arms_it_keeps_the_finished_ones(
    spans: RankerSpans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Row]
) -> None:
    forecasts = {"none": None, "lm": tastes(spans.log)}
    cfg = replace(CFG, shuffled_control=False)
    train = ablation.train_ranker
    trained: list[str] = []

    def train_until_killed(*args: object, directory: Path, **kwargs: object) -> object:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append(directory.name)
        return train(*args, directory=directory, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ablation, "train_ranker", train_until_killed)
        with pytest.raises(KeyboardInterrupt):
            run_ablation(spans, forecasts, cfg, tmp_path)
    assert trained == ["none-0", "none-1", "lm-0"]
    before = {name: (tmp_path / name / "weights.safetensors").stat().st_mtime_ns for name in trained}
    again = run_ablation(spans, forecasts, cfg, tmp_path)
    assert {name: (tmp_path / name / "weights.safetensors").stat().st_mtime_ns for name in trained} == before
    for metric in METRICS:  # the undisturbed run trained the same rankers
        assert find(again, metric, "lm - none") == find(rows, metric, "lm - none")


def test_the_grid_takes_each_group_away_and_leaves_it_alone(spans: RankerSpans) -> None:
    forecasts = {"none": None, "anchor": tastes(spans.log, strength=2.0), "lm": tastes(spans.log)}
    variants, pairs = grid(spans, forecasts, replace(CFG, ablation=AblationConfig(groups=True, models=[])))
    by_name = {variant.name: variant for variant in variants}
    for group in GROUPS:
        without, only = by_name[f"lm, without {group}"], by_name[f"lm, only {group}"]
        assert set(without.cfg.features.prior) == set(GROUPS) - {group}
        assert only.cfg.features.prior == [group]
        assert {("lm", without.name), (only.name, "none")} <= set(pairs)
    assert len({variant.slug for variant in variants}) == len(variants) == 4 + 2 * len(GROUPS)
    assert all(variant.cfg.model == "dlrm" for variant in variants)


def test_the_grid_leaves_out_a_group_that_says_nothing(spans: RankerSpans) -> None:
    bare = KnownForecast(tastes(spans.log).log_prob_UA)  # without interests
    cfg = replace(CFG, ablation=AblationConfig(groups=True, models=[]))
    variants, _ = grid(spans, {"none": None, "anchor": bare, "lm": bare}, cfg)
    assert len(variants) == 4 + 2 * (len(GROUPS) - 1)
    assert not any("interests" in variant.name for variant in variants)


def test_the_grid_trains_the_other_models_in_three_arms(spans: RankerSpans) -> None:
    forecasts = {"none": None, "anchor": tastes(spans.log, strength=2.0), "lm": tastes(spans.log)}
    cfg = replace(CFG, model="dcn_v2", ablation=AblationConfig(groups=False))
    variants, pairs = grid(spans, forecasts, cfg)
    models = {(variant.cfg.model, variant.name) for variant in variants}
    others = {(model, f"{model}, {arm}") for model in MODELS if model != "dcn_v2" for arm in forecasts}
    assert models == others | {("dcn_v2", arm) for arm in (*forecasts, SHUFFLED)}
    assert ("logistic, lm", "logistic, anchor") in pairs
    assert ("logistic, lm", "lm") in pairs


def test_a_forecast_is_asked_once_for_the_same_rows(spans: RankerSpans) -> None:
    asked = []

    class Counted(KnownForecast):
        def features(self, *args: object) -> dict:
            asked.append(1)
            return super().features(*args)  # type: ignore[arg-type]

        def interest_match(self, *args: object) -> np.ndarray:
            matched.append(1)
            return super().interest_match(*args)  # type: ignore[arg-type]

    known, matched = tastes(spans.log), list[int]()
    remembered = RememberedForecast(Counted(known.log_prob_UA, interest_UI=known.interest_UI))
    first = spans.fit.with_prior(remembered, GROUPS)
    again = spans.fit.with_prior(remembered, ["rank"])
    spans.stop.with_prior(remembered, GROUPS)
    spans.fit.with_prior(remembered, ["interests"])
    assert len(asked) == len(matched) == 2
    np.testing.assert_array_equal(again.dense["prior_rank"], first.dense["prior_rank"])
