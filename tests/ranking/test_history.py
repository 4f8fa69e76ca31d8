"""As-of answers equal looking through all events, and never see the period asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ranking.history import History, pair

EVENTS = st.lists(st.tuples(st.integers(-1, 4), st.integers(0, 9)), max_size=40)
ROWS = st.lists(st.tuples(st.integers(-1, 5), st.integers(0, 11)), min_size=1, max_size=10)


@given(events=EVENTS, rows=ROWS, window=st.one_of(st.none(), st.integers(1, 12)))
def test_equals_looking_through_all_events(
    events: list[tuple[int, int]], rows: list[tuple[int, int]], window: int | None
) -> None:
    events.sort(key=lambda event: event[1])  # in order of time
    key_E, period_E = np.array(events, dtype=np.int64).reshape(-1, 2).T
    key_N, period_N = np.array(rows).T
    history = History(key_E, period_E)
    counts = history.count(key_N, period_N, window=window)
    last, since = history.last_event(key_N, period_N), history.periods_since(key_N, period_N)
    for n, (key, period) in enumerate(rows):
        before = [i for i, (k, p) in enumerate(events) if k == key >= 0 and p < period]
        assert counts[n] == sum(window is None or events[i][1] >= period - window for i in before)
        assert last[n] == (before[-1] if before else -1)
        assert since[n] == (period - events[before[-1]][1] if before else 0)


@given(events=EVENTS, rows=ROWS)
def test_events_of_the_period_and_later_change_nothing(
    events: list[tuple[int, int]], rows: list[tuple[int, int]]
) -> None:
    key_E, period_E = np.array(events, dtype=np.int64).reshape(-1, 2).T
    for key, period in rows:
        asked = np.array([key]), np.array([period])
        earlier = period_E < period
        whole, cut = History(key_E, period_E), History(key_E[earlier], period_E[earlier])
        assert whole.count(*asked) == cut.count(*asked)
        assert whole.periods_since(*asked) == cut.periods_since(*asked)


def test_a_pair_with_an_unknown_second_is_no_key() -> None:
    assert pair(np.array([0, 2, 2]), np.array([3, -1, 0]), 5).tolist() == [3, -1, 10]


@pytest.mark.parametrize(("key", "period"), [([1], [1, 2]), ([1], [-1]), ([1], [1 << 20]), ([1 << 50], [1])])
def test_what_cannot_be_kept_in_one_number_is_refused(key: list[int], period: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected|must stay"):
        History(np.array(key), np.array(period))
