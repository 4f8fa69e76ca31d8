"""Timestamps become periods, and the test span stays closed."""

from __future__ import annotations

from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import UserError
from data.split import Calendar, Span, SplitConfig, TimeSplit

MINUTE_US = 60_000_000
EPOCH = datetime(1970, 1, 1)
MOMENTS = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1))


@given(origin=MOMENTS, moment=MOMENTS, days=st.integers(1, 400))
def test_a_moment_lies_in_its_period(origin: datetime, moment: datetime, days: int) -> None:
    calendar = Calendar(origin.isoformat(), days)
    micros = np.array([(moment - EPOCH) // timedelta(microseconds=1)])
    period = int(calendar.period(micros)[0])
    assert calendar.start(period) <= moment < calendar.start(period + 1)
    assert calendar.start(period + 1) - calendar.start(period) == timedelta(days=days)


def test_period_1_begins_at_the_origin_and_0_lies_before_it() -> None:
    calendar = Calendar("2016-12-26", 7)
    assert calendar.start(1) == datetime(2016, 12, 26)
    micros = calendar.origin_us + np.array([-1, 0, 7 * 24 * 60 * MINUTE_US - 1, 7 * 24 * 60 * MINUTE_US])
    assert calendar.period(micros).tolist() == [0, 1, 1, 2]
    assert calendar.period(micros).dtype == np.int32


@pytest.mark.parametrize(
    ("origin", "days", "message"),
    [
        ("26.12.2016", 7, r"data\.origin='26\.12\.2016'"),
        ("2016-12-26T00:00:00+00:00", 7, "without a time zone"),
        ("2016-12-26", 0, r"data\.label_window_days=0"),
    ],
)
def test_a_calendar_that_is_none(origin: str, days: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Calendar(origin, days)


def test_spans_in_order_of_time_do_not_touch() -> None:
    split = TimeSplit()
    spans = [split.span(name, evaluate="test") for name in TimeSplit.names()]
    assert all(before[1] < after[0] for before, after in pairwise(spans))
    assert split.span((3, 9), evaluate="validation") == (3, 9)


def test_lists_become_pairs() -> None:
    """A configuration file has lists; two splits of the same spans are the same value."""
    assert TimeSplit(prior_fit=[1, 30]) == TimeSplit()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spans", "messages"),
    [
        ({"prior_fit": (30, 1)}, [r"data.split.prior_fit=[30, 1]", "first not above last"]),
        ({"prior_fit": (1, 2, 3)}, [r"data.split.prior_fit=[1, 2, 3]"]),
        ({"prior_fit": (0, 30)}, [r"data.split.prior_fit=[0, 30]", "begins at least 1"]),
        ({"prior_select": (30, 34)}, ["data.split.prior_select=[30, 34]", "prior_fit, which ends with 30"]),
        ({"validation": (48, 49)}, ["data.split.test=[47, 53]", "validation, which ends with 49"]),
        ({"prior_fit": (9, 1), "ranker_stop": (1, 1)}, ["data.split.prior_fit", "data.split.ranker_stop"]),
    ],
)
def test_spans_out_of_order_are_told_together(spans: dict[str, Span], messages: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        TimeSplit(**spans)
    assert all(message in str(caught.value) for message in messages)


@given(st.tuples(st.integers(1, 60), st.integers(1, 60)).map(sorted), st.sampled_from(["validation", "test"]))
def test_only_evaluate_test_opens_the_test_span(pair: list[int], evaluate: str) -> None:
    split, span = TimeSplit(), (pair[0], pair[1])
    if evaluate == "test" or span[1] < split.test[0]:
        assert split.span(span, evaluate=evaluate) == span
    else:
        with pytest.raises(UserError, match="evaluate=test"):
            split.span(span, evaluate=evaluate)


def test_an_unknown_span_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="prior_fit, prior_select, ranker_fit, ranker_stop, validation, test"):
        TimeSplit().span("valid", evaluate="validation")


WEEKS = Calendar("2024-01-01", 7)


def spans(split: TimeSplit) -> list[Span]:
    return list(split.spans().values())


def test_dates_become_periods() -> None:
    dates = ["2024-01-01", "2024-02-05", "2024-02-12", "2024-02-26", "2024-03-04", "2024-03-11", "2024-03-25"]
    cfg = SplitConfig(by="dates", dates=dates)
    assert cfg.origin == "2024-01-01"
    split = cfg.resolve(WEEKS, np.ones(12, np.int64))
    assert spans(split) == [(1, 5), (6, 6), (7, 8), (9, 9), (10, 10), (11, 12)]


@given(
    labels=st.lists(st.integers(1, 50), min_size=6, max_size=60),
    shares=st.lists(st.floats(0.01, 0.99), min_size=5, max_size=5, unique=True).map(sorted),
)
def test_quantiles_give_six_spans_that_cover_all_periods(labels: list[int], shares: list[float]) -> None:
    split = SplitConfig(by="quantiles", quantiles=shares).resolve(WEEKS, np.array(labels))
    parts = spans(split)
    assert parts[0][0] == 1
    assert parts[-1][1] == len(labels)
    assert all(before[1] + 1 == after[0] for before, after in pairwise(parts))
    for (_, end), share, left in zip(parts, shares, range(5, 0, -1), strict=False):
        held_back = end == len(labels) - left  # the spans after it have a period each left
        assert sum(labels[:end]) >= share * sum(labels) * (1 - 1e-9) or held_back


def test_leave_one_out_counts_from_the_end() -> None:
    split = SplitConfig(by="leave_one_out").resolve(Calendar("2000-01-01", 1), np.ones(20, np.int64))
    assert spans(split) == [(1, 15), (16, 16), (17, 17), (18, 18), (19, 19), (20, 20)]


EVERY_WEEK, NOT_THE_LAST = np.ones(53, np.int64), np.r_[np.ones(46, np.int64), np.zeros(7, np.int64)]
WRONG_SPLITS = [
    ({"by": "weeks"}, EVERY_WEEK, ["data.split.by=weeks", "periods, dates, quantiles, leave_one_out"]),
    ({"by": "dates", "dates": ["2024-01-01"]}, EVERY_WEEK, ["7 rising ISO dates", "prior_select, ranker_fit"]),
    ({"by": "dates", "dates": ["2024-01-01"] * 7}, EVERY_WEEK, ["7 rising ISO dates"]),
    (
        {"by": "dates", "dates": [f"2024-0{month}-01" for month in range(1, 8)]},
        EVERY_WEEK,
        ["data.split.dates: 2024-02-01, 2024-03-01", "7-day periods from 2024-01-01"],
    ),
    ({"by": "quantiles", "quantiles": [0.5, 0.4, 0.6, 0.7, 0.8]}, EVERY_WEEK, ["5 rising shares"]),
    ({"by": "quantiles", "quantiles": [0.5, 0.6]}, EVERY_WEEK, ["5 rising shares"]),
    ({"by": "quantiles"}, np.ones(5, np.int64), ["5 periods", "at least 6 periods"]),
    ({"by": "leave_one_out"}, np.ones(3, np.int64), ["3 periods", "at least 6 periods"]),
    ({"prior_fit": (30, 1)}, EVERY_WEEK, ["data.split.prior_fit=[30, 1]"]),
    ({}, NOT_THE_LAST, ["no conversion in test=[47, 53]", "they lie in periods 1-46"]),
    ({}, np.zeros(53, np.int64), ["prior_fit=[1, 30], prior_select", "they lie in periods none"]),
]


@pytest.mark.parametrize(("keys", "labels_P", "messages"), WRONG_SPLITS)
def test_a_split_that_does_not_fit_is_told(keys: dict[str, object], labels_P: np.ndarray, messages: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        SplitConfig(**keys).resolve(WEEKS, labels_P)  # type: ignore[arg-type]
    assert all(message in str(caught.value) for message in messages)
