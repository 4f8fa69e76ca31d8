"""What was known about a key before a period: counts, last times and last events, for many rows at once.

Every question is asked as of the *start* of a period: events of that period are not seen. Keys are
numbers, those of a pair (user, ad) are built by :func:`pair`. All answers are binary searches in one
sorted array of (key, period), so a million rows cost a sort and no Python a row.

Shapes: E events, N rows that ask.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
_PERIODS = 1 << 20
"""More periods than any log has; (key, period) is one number, ``key * _PERIODS + period``."""


def pair(first_N: NDArray[np.integer], second_N: NDArray[np.integer], n_second: int) -> Ints:
    """One number a pair; negative where the second is unknown (negative).

    Args:
        first_N: numbers of the first kind, not negative.
        second_N: numbers in ``[0, n_second)``, negative where unknown.
        n_second: how many of the second kind there are.
    """
    second = np.asarray(second_N, np.int64)
    return np.where(second < 0, -1, np.asarray(first_N, np.int64) * n_second + second)


class History:
    """Events by key and period.

    Args:
        key_E: key of each event; events with a negative key are left out.
        period_E: period of each event, in ``[0, 2**20)``.

    Raises:
        ValueError: lengths differ, or a key or period is too large to be kept in one number.
    """

    def __init__(self, key_E: NDArray[np.integer], period_E: NDArray[np.integer]) -> None:
        key, period = np.asarray(key_E, np.int64), np.asarray(period_E, np.int64)
        if key.shape != period.shape:
            raise ValueError(f"{key.shape} keys for {period.shape} periods; expected one a key")
        known = np.flatnonzero(key >= 0)
        if len(known) and (key.max() >= np.iinfo(np.int64).max // _PERIODS - 1 or not _fits(period[known])):
            raise ValueError("keys must stay below 2**43 and periods in [0, 2**20)")
        cell = key[known] * _PERIODS + period[known]
        order = np.argsort(cell, kind="stable")
        self._cell_E, self._event_E = cell[order], known[order]

    def count(self, key_N: NDArray[np.integer], period_N: NDArray[np.integer], *, window: int | None = None) -> Ints:
        """Events of each key in the periods before.

        Args:
            key_N: keys; a negative one has no events.
            period_N: the period asked for; it is not counted itself.
            window: count the last so many periods only; None counts all.
        """
        start, stop = self._before(key_N, period_N)
        if window is not None:
            first_N = np.maximum(np.asarray(period_N, np.int64) - window, 0)
            start = np.searchsorted(self._cell_E, np.asarray(key_N, np.int64) * _PERIODS + first_N)
        return np.where(np.asarray(key_N) < 0, 0, np.maximum(stop - start, 0))

    def last_event(self, key_N: NDArray[np.integer], period_N: NDArray[np.integer]) -> Ints:
        """Position, in the arrays given to the constructor, of the last event before; -1 where there is none.

        Of several events in one period the one given last is taken, so events must be given in order of time.
        """
        start, stop = self._before(key_N, period_N)
        some = (stop > start) & (np.asarray(key_N) >= 0)
        found = np.full(len(stop), -1, np.int64)
        found[some] = self._event_E[stop[some] - 1]
        return found

    def periods_since(self, key_N: NDArray[np.integer], period_N: NDArray[np.integer]) -> Ints:
        """How many periods ago the last event was, at least 1; 0 where there is none."""
        start, stop = self._before(key_N, period_N)
        some = (stop > start) & (np.asarray(key_N) >= 0)
        since = np.zeros(len(stop), np.int64)
        since[some] = np.asarray(period_N, np.int64)[some] - self._cell_E[stop[some] - 1] % _PERIODS
        return since

    def _before(self, key_N: NDArray[np.integer], period_N: NDArray[np.integer]) -> tuple[Ints, Ints]:
        first_N = np.asarray(key_N, np.int64) * _PERIODS
        start = np.searchsorted(self._cell_E, first_N)
        return start, np.searchsorted(self._cell_E, first_N + np.asarray(period_N, np.int64))


def _fits(period: Ints) -> bool:
    return bool(period.min() >= 0 and period.max() < _PERIODS)
