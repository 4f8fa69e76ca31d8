"""The typed schema of ``configs/data/``, and the timeline it gives a log."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

import numpy as np
import polars as pl

from data.errors import UserError
from data.rules import SEED, at_least, broken
from data.split import Calendar, SplitConfig, TimeSplit
from data.tables import KINDS, Tables
from data.truth import SimulatorConfig

LABELS = tuple(kind for kind in KINDS if kind == "click" or kind.endswith("conversion"))
"""Kinds that may be labels: what a user does with an ad."""


class Timeline(NamedTuple):
    """Where period 1 begins and which periods are for what."""

    calendar: Calendar
    split: TimeSplit


@dataclass
class DataConfig:
    """Where the log comes from and how it is read.

    Args:
        source: name of the adapter, see ``data.prepare.SOURCES``.
        path: directory of the source's files; ``None``: the source's installed package, where it has one.
        seed: seed of the sampling of impressions, of ``max_users`` and of the simulator.
        impressions_per_visit: impressions without a conversion that are sampled per visit, where the source does not
            log them; their ``sample_weight`` is the number of eligible ones over the number sampled.
        max_users: keep this many users in all tables (the smallest hashes of the id among those seen in
            ``split.prior_fit``), for quick trials; ``None`` keeps all.
        label_kinds: kinds of events that are conversions of an ad.
        label_window_days: length of the label window and with it of a period, in days.
        origin: start of period 1, ISO 8601, in the tables' own clock; ``None``: the first of ``split.dates``, else
            midnight before the first conversion.
        split: spans of periods.
        profile_columns: columns of ``users`` that may be used; none unless named here.
        ad_columns: categorical columns of ``ads`` that are features.
        simulator: read by ``source=simulator`` alone.

    Raises:
        UserError: a value is out of range. All problems are told at once.
    """

    source: str = "complete_journey"
    path: str | None = None
    seed: int = 0
    impressions_per_visit: int = 20
    max_users: int | None = None
    label_kinds: list[str] = field(default_factory=lambda: ["click_conversion", "view_conversion"])
    label_window_days: int = 7
    origin: str | None = "2016-12-26"
    split: SplitConfig = field(default_factory=SplitConfig)
    profile_columns: list[str] = field(default_factory=list)
    ad_columns: list[str] = field(default_factory=list)
    simulator: SimulatorConfig = field(default_factory=SimulatorConfig)

    def __post_init__(self) -> None:
        rules = {"seed": SEED, "impressions_per_visit": at_least(1), "max_users": at_least(1).or_null()}
        errors = broken(self, "data", rules)
        if not self.label_kinds or set(self.label_kinds) - set(LABELS):
            errors.append(
                UserError(
                    f"data.label_kinds={list(self.label_kinds)}",
                    expected=f"some of {', '.join(LABELS)}",
                    action="name the kinds that count as labels",
                )
            )
        try:
            self.calendar(datetime(2000, 1, 1))
        except UserError as error:
            errors.append(error)
        if errors:
            raise UserError.collect(errors)

    def calendar(self, first: datetime | None = None) -> Calendar:
        """The mapping of timestamps to periods.

        Args:
            first: the first conversion, for a config that says nothing of where period 1 begins.

        Raises:
            UserError: neither the config nor ``first`` says where period 1 begins.
        """
        given = self.origin if self.origin is not None else self.split.origin
        if given is None and first is None:
            raise UserError(
                "data.origin=null and no conversion in the log",
                expected=f"events of a kind in data.label_kinds: {', '.join(self.label_kinds)}",
                action="check data.label_kinds, or set data.origin",
            )
        return Calendar(given if given is not None else f"{first:%Y-%m-%d}", self.label_window_days)

    def timeline(self, labels: pl.LazyFrame) -> Timeline:
        """Calendar and split of a log.

        Args:
            labels: its conversions; only the column ``timestamp`` is read, one at a time.

        Raises:
            UserError: there is no conversion, or the split does not fit the log; see `SplitConfig.resolve`.
        """
        moment = pl.col("timestamp").dt.cast_time_unit("us")
        first = labels.select(moment.min()).collect(engine="streaming").item()
        calendar = self.calendar(first)
        periods = (
            labels.select(calendar.period_expr(moment.to_physical()).alias("period"))
            .group_by("period")
            .len()
            .filter(pl.col("period") > 0)
            .collect(engine="streaming")
        )
        period, count = periods["period"].to_numpy(), periods["len"].to_numpy()
        labels_P = np.zeros(int(period.max(initial=0)), np.int64)
        labels_P[period - 1] = count
        return Timeline(calendar, self.split.resolve(calendar, labels_P))

    def check_columns(self, tables: Tables) -> None:
        """Whether tables have the columns that the config and every reader of tables want.

        Raises:
            UserError: columns are missing; all are told at once.
        """
        errors = [
            UserError(
                f"{schema.name} without the column {column.name}",
                expected="every required column of data.tables",
                action="run `adsid data prepare` again",
            )
            for schema, frame in tables
            for column in schema.columns
            if column.required and column.name not in frame.collect_schema()
        ]
        for key, names, frame in (
            ("ad_columns", self.ad_columns, tables.ads),
            ("profile_columns", self.profile_columns, tables.users),
        ):
            unknown = [name for name in names if name not in frame.columns]
            if unknown:
                errors.append(
                    UserError(
                        f"data.{key} names {', '.join(unknown)}",
                        expected=f"some of {', '.join(frame.columns[1:]) or 'no columns: the table has none'}",
                        action=f"correct data.{key}",
                    )
                )
        if errors:
            raise UserError.collect(errors)
