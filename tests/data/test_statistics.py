from __future__ import annotations

import numpy as np
import pytest

from data.statistics import (
    activity_tiers,
    bootstrap_mean,
    bootstrap_over_seeds,
    bootstrap_statistic,
    draw,
    paired_bootstrap,
    percentiles,
    sample_and_draws,
)

RNG = np.random.default_rng(0)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 data sets whose users differ, about 95 % of the intervals hold the true mean of zero."""
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(40), 5)
        values = rng.normal(size=40)[groups] + rng.normal(size=200)
        interval = bootstrap_mean(values, groups, draws=400, seed=seed)
        covered += interval.low <= 0 <= interval.high
    assert 176 <= covered <= 199


def test_requests_of_one_user_are_not_independent() -> None:
    users = np.repeat(np.arange(20), 10)
    values = RNG.normal(size=20)[users]
    by_user, by_row = bootstrap_mean(values, users), bootstrap_mean(values, np.arange(200))
    assert by_user.high - by_user.low > 2 * (by_row.high - by_row.low)


def test_pairing_cancels_what_both_arms_find_hard() -> None:
    users = np.arange(300)
    hard = RNG.normal(scale=10, size=300)
    a, b = hard + 0.5 + RNG.normal(scale=0.1, size=300), hard + RNG.normal(scale=0.1, size=300)
    difference = paired_bootstrap(a, b, users)
    assert 0.4 < difference.low < difference.value < difference.high < 0.6
    assert bootstrap_mean(a, users).low < 0 < bootstrap_mean(a, users).high
    wider = paired_bootstrap(a, b, users, level=0.99)
    assert wider.low < difference.low < difference.high < wider.high


def test_undefined_requests_are_left_out() -> None:
    interval = bootstrap_mean([1.0, np.nan, 3.0], [0, 1, 2])
    assert (interval.value, interval.n) == (2.0, 2)
    assert paired_bootstrap([1.0, np.nan], [0.0, 0.0], [0, 1]).n == 1
    assert bootstrap_mean([], []).n == 0
    assert np.isnan(bootstrap_mean([np.nan], [0]).value)


def test_any_statistic_by_weights() -> None:
    values, users = RNG.normal(size=200), np.repeat(np.arange(50), 4)
    mean = bootstrap_statistic(lambda weight: float(np.average(values, weights=weight)), users, draws=1000)
    plain = bootstrap_mean(values, users)
    assert mean.value == pytest.approx(plain.value)
    assert (mean.low, mean.high) == pytest.approx((plain.low, plain.high), abs=0.02)


def test_unequal_lengths_are_told() -> None:
    with pytest.raises(ValueError, match="two equal lengths"):
        bootstrap_mean([1.0, 2.0], [0])


def test_one_seed_is_the_bootstrap_over_users() -> None:
    users = np.repeat(np.arange(30), 3)
    values = RNG.normal(size=90)
    values[5] = np.nan
    assert bootstrap_over_seeds([values], [users]) == bootstrap_mean(values, users)


def test_seeds_widen_the_interval_by_how_much_they_differ() -> None:
    users = np.arange(200)
    values = RNG.normal(size=200)
    alike = bootstrap_over_seeds([values, values, values], [users] * 3)
    apart = bootstrap_over_seeds([values - 1, values, values + 1], [users] * 3)
    assert alike.value == pytest.approx(apart.value) == pytest.approx(values.mean())
    assert apart.high - apart.low > 3 * (alike.high - alike.low)


def test_seeds_may_have_other_users_or_none() -> None:
    interval = bootstrap_over_seeds([[1.0, 3.0], [5.0], [np.nan]], [[0, 1], [2], [0]])
    assert interval.value == pytest.approx(3.5)
    assert interval.n == 3
    assert interval.low <= interval.value <= interval.high
    assert bootstrap_over_seeds([[]], [[]]).n == 0


def test_draws_are_counts_of_groups_and_the_sample_comes_first() -> None:
    """The stream of a seed is a part of every published interval."""
    drawn = draw(7, 5, np.random.default_rng(0))
    assert drawn.shape == (5, 7)
    assert (drawn.sum(1) == 7).all()
    np.testing.assert_array_equal(drawn, np.random.default_rng(0).multinomial(7, np.full(7, 1 / 7), size=5))
    whole = sample_and_draws(7, 5, np.random.default_rng(0))
    np.testing.assert_array_equal(whole, np.vstack([np.ones(7), drawn]))


def test_percentiles_hold_the_level_in_their_middle() -> None:
    assert percentiles(np.arange(101.0)) == pytest.approx((2.5, 97.5))
    assert percentiles(np.arange(101.0), 0.5) == pytest.approx((25.0, 75.0))
    assert all(np.isnan(end) for end in percentiles(np.zeros(0)))


def test_tiers_are_thirds_by_purchases_and_equals_share_one() -> None:
    assert activity_tiers(np.array([9, 0, 4, 1, 5, 8])).tolist() == [2, 0, 1, 0, 1, 2]
    assert activity_tiers(np.array([1, 1, 1, 1, 7])).tolist() == [0, 0, 0, 0, 2]
    assert activity_tiers(np.arange(10), lowest=0.1, highest=0.9).tolist() == [0, *[1] * 8, 2]
    assert activity_tiers(np.zeros(0)).tolist() == []
