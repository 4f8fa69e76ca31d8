"""Time as periods, and which periods may be used for what.

A *period* is a whole number: period 1 begins at the calendar's origin and every period lasts the label
window. The as-of time of anything in period ``w`` is the start of ``w``: a feature, history or count of
period ``w`` reads events of periods below ``w`` only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError

_US_PER_DAY = 86_400_000_000
_EPOCH = datetime(1970, 1, 1)

Span = tuple[int, int]
EVALUATE = ("validation", "test")


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
        try:
            parsed = datetime.fromisoformat(self.origin)
        except ValueError:
            parsed = None
        if parsed is None or parsed.tzinfo is not None:
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

    def start(self, period: int) -> datetime:
        """First moment of a period, its as-of time."""
        return datetime.fromisoformat(self.origin) + timedelta(days=self.days * (period - 1))


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
