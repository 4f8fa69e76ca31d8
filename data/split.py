"""Time as periods, and which periods may be used for what.

A *period* is a whole number: period 1 begins at the calendar's origin and every period lasts the label
window. The as-of time of anything in period ``w`` is the start of ``w``: a feature, history or count of
period ``w`` reads events of periods below ``w`` only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime, timedelta
from itertools import pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.errors import UserError

_US_PER_DAY = 86_400_000_000
_EPOCH = datetime(1970, 1, 1)

Span = tuple[int, int]
EVALUATE = ("validation", "test")
SPLITS = ("periods", "dates", "quantiles", "leave_one_out")


@dataclass(frozen=True)
class Calendar:
    """Maps timestamps to periods.

    Args:
        origin: start of period 1, ISO 8601, in the tables' own clock (no time zone), e.g. ``"2016-12-26"``.
        days: length of a period in days.

    Raises:
        UserError: ``origin`` is no date or ``days`` is not positive.
    """

    origin: str
    days: int

    def __post_init__(self) -> None:
        if _moment(self.origin) is None:
            raise UserError(
                f"data.origin={self.origin!r}",
                expected="an ISO 8601 date or time without a time zone, e.g. 2016-12-26",
                action="set data.origin to the start of the first period",
            )
        if self.days < 1:
            raise UserError(
                f"data.label_window_days={self.days}",
                expected="a whole number of days, at least 1",
                action="set data.label_window_days to the length of the label window",
            )

    @property
    def length_us(self) -> int:
        """Length of a period in microseconds."""
        return self.days * _US_PER_DAY

    @property
    def origin_us(self) -> int:
        """The origin in microseconds since 1970."""
        return (datetime.fromisoformat(self.origin) - _EPOCH) // timedelta(microseconds=1)

    def period(self, timestamp_N: NDArray[np.int64]) -> NDArray[np.int32]:
        """Periods of timestamps.

        Args:
            timestamp_N: microseconds since 1970 in the tables' own clock.

        Returns:
            ``floor((timestamp - origin) / length) + 1``.
        """
        return ((timestamp_N - self.origin_us) // self.length_us + 1).astype(np.int32)

    def period_expr(self, micros: pl.Expr) -> pl.Expr:
        """``period`` as an expression over microseconds since 1970."""
        return ((micros - self.origin_us) // self.length_us + 1).cast(pl.Int32)

    def start(self, period: int) -> datetime:
        """First moment of a period, its as-of time."""
        return datetime.fromisoformat(self.origin) + timedelta(days=self.days * (period - 1))

    def season(self, period: int) -> int:
        """Quarter of the year that a period begins in, 0 from December on."""
        return self.start(period).month % 12 // 3


@dataclass(frozen=True)
class TimeSplit:
    """Spans of periods, both ends included; every trained part has a fit span and a selection span after it.

    Args:
        prior_fit: embeddings, RQ-VAE, prior LM and two-tower learn here.
        prior_select: early stopping, calibration and tuning of the prior and its anchor.
        ranker_fit: the ranker learns here, with priors of the frozen LM.
        ranker_stop: early stopping of the ranker.
        validation: everything a report shows by default.
        test: read with ``evaluate=test`` only.

    Raises:
        UserError: a span is no pair, is empty, or does not lie after the one before it. All are told at once.
    """

    prior_fit: Span = (1, 30)
    prior_select: Span = (31, 34)
    ranker_fit: Span = (35, 41)
    ranker_stop: Span = (42, 42)
    validation: Span = (43, 46)
    test: Span = (47, 53)

    def __post_init__(self) -> None:
        errors, previous, previous_end = [], "", 0
        for name in self.names():
            span = tuple(int(period) for period in getattr(self, name))
            object.__setattr__(self, name, span)  # Hydra hands over lists
            if len(span) != 2 or span[0] > span[1]:
                errors.append(
                    UserError(
                        f"data.split.{name}={list(span)}",
                        expected="[first period, last period], first not above last",
                        action=f"give data.split.{name} two whole numbers in order",
                    )
                )
                continue
            if span[0] <= previous_end:
                after = f"after data.split.{previous}, which ends with {previous_end}" if previous else "at least 1"
                errors.append(
                    UserError(
                        f"data.split.{name}={list(span)}",
                        expected=f"a span that begins {after}",
                        action=f"move data.split.{name} so that no two spans share a period",
                    )
                )
            previous, previous_end = name, span[1]
        if errors:
            raise UserError.collect(errors)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Names of the spans in order of time."""
        return tuple(field.name for field in fields(cls))

    def spans(self) -> dict[str, Span]:
        """First and last period of each span, in order of time."""
        return {name: getattr(self, name) for name in self.names()}

    def span(self, span: str | Span, *, evaluate: str) -> Span:
        """First and last period of a span, given by name or as a pair.

        Args:
            span: a name of ``names()`` or ``(first, last)``.
            evaluate: ``"validation"`` or ``"test"``; only the latter opens the test span.

        Returns:
            ``(first, last)``, both included.

        Raises:
            UserError: the name is unknown, or the span touches ``test`` without ``evaluate="test"``.
        """
        if isinstance(span, str):
            if span not in self.names():
                raise UserError(
                    f"span {span!r}",
                    expected=f"one of {', '.join(self.names())}",
                    action="name one of these spans",
                )
            first, last = getattr(self, span)
        else:
            first, last = span
        if last >= self.test[0] and evaluate != "test":
            raise UserError(
                f"periods {first}-{last} with evaluate={evaluate}",
                expected=f"periods below {self.test[0]}, where the test span begins",
                action="choose an earlier span, or set evaluate=test, which is recorded in the manifest",
            )
        return first, last


@dataclass(frozen=True)
class SplitConfig:
    """How the log is split; turned into a `TimeSplit` by ``resolve``, once the log's conversions are known.

    Args:
        by: ``periods``: the six spans are given. ``dates``: ``dates`` are. ``quantiles``: each span ends with the
            first period by whose end the share in ``quantiles`` of all conversions has happened. ``leave_one_out``: for
            logs whose timestamps are ordinals counted back from each user's last event (see ``data.sequences``): the
            last period is the test, the one before it validation, then ranker_stop, ranker_fit, prior_select, and the
            rest is prior_fit.
        prior_fit, prior_select, ranker_fit, ranker_stop, validation, test: see `TimeSplit`; read by ``periods`` alone.
        dates: ISO 8601, rising: first moment of each of the six spans and the first moment after the last; each a
            whole number of periods after the first, which is where period 1 begins unless ``data.origin`` says so.
        quantiles: five rising shares in (0, 1), one for the end of each span but the last.

    Raises:
        UserError: an unknown ``by``, or spans, dates or shares out of order or of the wrong number.
    """

    by: str = "periods"
    prior_fit: Span = (1, 30)
    prior_select: Span = (31, 34)
    ranker_fit: Span = (35, 41)
    ranker_stop: Span = (42, 42)
    validation: Span = (43, 46)
    test: Span = (47, 53)
    dates: list[str] = field(default_factory=list)
    quantiles: list[float] = field(default_factory=lambda: [0.55, 0.65, 0.8, 0.83, 0.91])

    def __post_init__(self) -> None:
        if self.by not in SPLITS:
            raise UserError(f"data.split.by={self.by}", expected=f"one of {', '.join(SPLITS)}", action="choose one")
        for name in TimeSplit.names():
            object.__setattr__(self, name, tuple(getattr(self, name)))  # Hydra hands over lists
        spans = len(TimeSplit.names())
        if self.by == "periods":
            self._given()
        elif self.by == "dates":
            moments = [_moment(date) for date in self.dates]
            rising = None not in moments and all(a < b for a, b in pairwise(moments))  # type: ignore[operator]
            if len(moments) != spans + 1 or not rising:
                raise UserError(
                    f"data.split.dates={list(self.dates)}",
                    expected=f"{spans + 1} rising ISO dates without a time zone: where each of "
                    f"{', '.join(TimeSplit.names())} begins, and where the last ends",
                    action="correct data.split.dates",
                )
        elif self.by == "quantiles":
            shares = [0.0, *self.quantiles, 1.0]
            if len(shares) != spans + 1 or not all(a < b for a, b in pairwise(shares)):
                raise UserError(
                    f"data.split.quantiles={list(self.quantiles)}",
                    expected=f"{spans - 1} rising shares between 0 and 1: where {', '.join(TimeSplit.names()[:-1])} "
                    "end",
                    action="correct data.split.quantiles",
                )

    @property
    def origin(self) -> str | None:
        """Where period 1 begins by this split alone."""
        return self.dates[0] if self.by == "dates" else None

    def resolve(self, calendar: Calendar, labels_P: NDArray[np.integer]) -> TimeSplit:
        """The spans in periods.

        Args:
            calendar: timestamps to periods.
            labels_P: number of label conversions in periods 1, 2, …; it decides for quantiles and leave-one-out.

        Raises:
            UserError: dates are not at the beginning of periods, there are too few periods, or a span has no
                conversion. Spans without one are all told at once.
        """
        if self.by == "dates":
            split = self._by_dates(calendar)
        elif self.by == "quantiles":
            split = self._by_quantiles(labels_P)
        elif self.by == "leave_one_out":
            split = self._by_leave_one_out(labels_P)
        else:
            split = self._given()
        empty = [
            f"{name}={[first, last]}"
            for name, (first, last) in split.spans().items()
            if not labels_P[first - 1 : last].any()
        ]
        if empty:
            raise UserError(
                f"data.split with no conversion in {', '.join(empty)}",
                expected=f"conversions in every span; they lie in periods {_runs(labels_P)}, of {calendar.days} days "
                f"from {calendar.origin}",
                action="move the spans of data.split, or check data.origin and data.label_kinds",
            )
        return split

    def _given(self) -> TimeSplit:
        return TimeSplit(**{name: getattr(self, name) for name in TimeSplit.names()})

    def _by_dates(self, calendar: Calendar) -> TimeSplit:
        moments = np.array([(_moment(date) - _EPOCH) // timedelta(microseconds=1) for date in self.dates])  # type: ignore[operator]
        off = [
            date
            for date, rest in zip(self.dates, (moments - calendar.origin_us) % calendar.length_us, strict=True)
            if rest
        ]
        if off:
            raise UserError(
                f"data.split.dates: {', '.join(off)}",
                expected=f"dates that are a whole number of {calendar.days}-day periods from {calendar.origin}",
                action="move these dates, or set data.origin or data.label_window_days",
            )
        return _consecutive(calendar.period(moments))

    def _by_quantiles(self, labels_P: NDArray[np.integer]) -> TimeSplit:
        _enough(len(labels_P), "conversions")
        share_P = np.cumsum(labels_P) / max(labels_P.sum(), 1)
        spans, starts = len(TimeSplit.names()), [1]
        for number, share in enumerate(self.quantiles, 1):
            end = int(np.searchsorted(share_P, share)) + 1
            starts.append(min(max(end, starts[-1]), len(labels_P) - (spans - number)) + 1)
        return _consecutive([*starts, len(labels_P) + 1])

    def _by_leave_one_out(self, labels_P: NDArray[np.integer]) -> TimeSplit:
        _enough(len(labels_P), "events a user")
        last = len(labels_P)
        return _consecutive([1, last - 4, last - 3, last - 2, last - 1, last, last + 1])


def _consecutive(starts: Sequence[int] | NDArray[np.integer]) -> TimeSplit:
    """Spans of which each begins where the one before it ends."""
    spans = {name: (int(a), int(b) - 1) for name, (a, b) in zip(TimeSplit.names(), pairwise(starts), strict=True)}
    return TimeSplit(**spans)


def _enough(periods: int, what: str) -> None:
    spans = len(TimeSplit.names())
    if periods < spans:
        raise UserError(
            f"{what} in {periods} periods",
            expected=f"at least {spans} periods, one for each of {', '.join(TimeSplit.names())}",
            action="lower data.label_window_days, or give a longer log",
        )


def _moment(date: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return None
    return None if moment.tzinfo else moment


def _runs(labels_P: NDArray[np.integer]) -> str:
    """The periods with conversions, as ``3-7, 9``."""
    periods = np.flatnonzero(labels_P) + 1
    if not len(periods):
        return "none"
    parts = np.split(periods, np.flatnonzero(np.diff(periods) > 1) + 1)
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
