"""The typed schema of ``configs/data/``."""

from __future__ import annotations

from dataclasses import dataclass, field

from data.errors import UserError
from data.split import Calendar, TimeSplit
from data.tables import KINDS


@dataclass
class DataConfig:
    """Where the log comes from and how it is read.

    Args:
        source: name of the adapter, see ``data.prepare.SOURCES``.
        path: directory of the source's files; ``None``: the source's installed package, where it has one.
        seed: seed of the sampling of impressions and of nothing else.
        impressions_per_visit: impressions without a conversion that are sampled per visit; their
            ``sample_weight`` is the number of eligible ones over the number sampled.
        max_users: keep this many users in all tables (the smallest hashes of the id among those seen in
            ``split.prior_fit``), for quick trials; ``None`` keeps all.
        label_kinds: kinds of events that are conversions of an ad.
        label_window_days: length of the label window and with it of a period, in days.
        origin: start of period 1, ISO 8601, in the tables' own clock.
        split: spans of periods.
        profile_columns: columns of ``users`` that may be used; none unless named here.
        ad_columns: categorical columns of ``ads`` that are features.

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
    origin: str = "2016-12-26"
    split: TimeSplit = field(default_factory=TimeSplit)
    profile_columns: list[str] = field(default_factory=list)
    ad_columns: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        errors = []
        if self.impressions_per_visit < 1:
            errors.append(
                UserError(
                    f"data.impressions_per_visit={self.impressions_per_visit}",
                    expected="a whole number, at least 1",
                    action="set data.impressions_per_visit, e.g. to 20",
                )
            )
        if self.max_users is not None and self.max_users < 1:
            errors.append(
                UserError(
                    f"data.max_users={self.max_users}",
                    expected="a whole number, at least 1, or null for all users",
                    action="set data.max_users, e.g. to 300",
                )
            )
        allowed = [kind for kind in KINDS if kind.endswith("conversion")]
        if not self.label_kinds or set(self.label_kinds) - set(allowed):
            errors.append(
                UserError(
                    f"data.label_kinds={list(self.label_kinds)}",
                    expected=f"some of {', '.join(allowed)}",
                    action="name the conversion kinds that count as labels",
                )
            )
        try:
            self.calendar()
        except UserError as error:
            errors.append(error)
        if errors:
            raise UserError.collect(errors)

    def calendar(self) -> Calendar:
        """The mapping of timestamps to periods."""
        return Calendar(self.origin, self.label_window_days)
