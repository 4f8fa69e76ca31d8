"""Rows that are ranked, and their features on the way to a model, as arrays.

Shapes: N rows, T tasks, R bags, V ids in all bags, F dense features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.log import Log
from data.split import Span
from priors.forecast import INTEREST_MATCH, Forecast
from ranking.prior import MISSING, columns_of_groups
from ranking.tasks import LABEL, kinds_of, labels_of

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """(visit, ad) pairs to be ranked, arrays of shape ``(N,)`` but for the labels.

    Attributes:
        user, ad, advertiser, market: indexes of the log; advertiser -1 for none.
        period: of the visit.
        display, mailer: placement codes of the log.
        label_NT: of each task 1.0 where the user did it, else 0.0; NaN where it is not known.
        weight: impressions of the log that the row stands for.
    """

    user: NDArray[np.int32]
    ad: NDArray[np.int32]
    advertiser: NDArray[np.int32]
    market: NDArray[np.int32]
    period: NDArray[np.int32]
    display: NDArray[np.int16]
    mailer: NDArray[np.int16]
    label_NT: Floats
    weight: Floats

    def __len__(self) -> int:
        return len(self.user)

    @property
    def label(self) -> Floats:
        """Labels of the first task, by which ads are ranked, ``(N,)``."""
        return self.label_NT[:, 0]

    @classmethod
    def of_span(
        cls,
        log: Log,
        span: str | Span,
        users: NDArray[np.integer] | None = None,
        *,
        tasks: Sequence[str] = (LABEL,),
    ) -> Rows:
        """The sampled impressions of a span and what became of them.

        Args:
            log: the log.
            span: name of a span, or its first and last period.
            users: users to keep; None keeps all.
            tasks: of `ranking.tasks.TASKS`; the first is what ads are ranked by.

        Raises:
            UserError: the span has no impressions of these users, or it is closed.
        """
        events, happened = log.outcomes(span, users, kinds=[kind for task in tasks for kind in kinds_of(task, log)])
        if not len(events):
            raise UserError(
                f"span {span} without an impression of the chosen users",
                expected="impressions to train or evaluate a ranker on",
                action="choose more users (prior.panel), or a span of data.split in which they were active",
            )
        return cls(
            user=events.user,
            ad=events.ad,
            advertiser=log.ad_advertiser[events.ad],
            market=events.market,
            period=events.period,
            display=events.display,
            mailer=events.mailer,
            label_NT=labels_of(tasks, log, happened, events.period),
            weight=events.weight,
        )

    @classmethod
    def of_request(cls, log: Log, ads: NDArray[np.integer], *, user: int, market: int, period: int) -> Rows:
        """The candidates of one request, whose labels are not known.

        Args:
            log: the log.
            ads: indexes of the candidates.
            user: who asks.
            market: where.
            period: when; nothing of this period is read but where its ads are placed.
        """
        active, ad = log.active_ads(market, period), np.asarray(ads).astype(np.int32)
        slot = np.searchsorted(active.ad, ad)
        runs = np.append(active.ad, -1)[slot] == ad
        return cls(
            user=np.full(len(ad), user, np.int32),
            ad=ad,
            advertiser=log.ad_advertiser[ad],
            market=np.full(len(ad), market, np.int32),
            period=np.full(len(ad), period, np.int32),
            display=np.where(runs, np.append(active.display, 0)[slot], 0).astype(np.int16),
            mailer=np.where(runs, np.append(active.mailer, 0)[slot], 0).astype(np.int16),
            label_NT=np.full((len(ad), 1), np.nan, np.float32),
            weight=np.ones(len(ad), np.float32),
        )


@dataclass(frozen=True)
class Bags:
    """A bag of numbers for each row; rows may share a bag.

    Attributes:
        value_V: the numbers of all bags.
        ptr_R1: bag ``r`` is ``value_V[ptr_R1[r]:ptr_R1[r + 1]]``, shape ``(R + 1,)``.
        bag_N: bag of each row.
    """

    value_V: Ints
    ptr_R1: Ints
    bag_N: Ints

    @classmethod
    def single(cls, value_N: NDArray[np.integer]) -> Bags:
        """One number a row; a negative one leaves the bag empty."""
        value = np.asarray(value_N, np.int64)
        known = value >= 0
        return cls(value[known], np.concatenate([[0], np.cumsum(known)]), np.arange(len(value)))

    def of_rows(self, row_B: Ints) -> tuple[Ints, Ints]:
        """The bags of some rows: all their numbers, row after row, and how many each row has."""
        bag_B = self.bag_N[row_B]
        start_B = self.ptr_R1[bag_B]
        length_B = self.ptr_R1[bag_B + 1] - start_B
        skipped_B = start_B - (np.cumsum(length_B) - length_B)
        return self.value_V[np.arange(length_B.sum()) + np.repeat(skipped_B, length_B)], length_B

    def counts(self, n: int) -> Ints:
        """In how many rows each of the numbers ``0 .. n - 1`` stands, once for every time it stands in a bag."""
        rows_R = np.bincount(self.bag_N, minlength=len(self.ptr_R1) - 1)
        times_V = np.repeat(rows_R, np.diff(self.ptr_R1))
        return np.bincount(self.value_V, times_V, minlength=n).astype(np.int64)


@dataclass(frozen=True)
class SparseFeature:
    """Bags of ids.

    Attributes:
        table: the embedding table that they are looked up in.
        bags: positions in ``ids``.
        ids: the id at each position, numbers or strings that do not depend on the log's indexes.
    """

    table: str
    bags: Bags
    ids: list[int] | list[str]


@dataclass(frozen=True)
class Features:
    """Features of rows before scaling.

    Attributes:
        rows: what they are of.
        sparse: bags of ids, by feature.
        dense: numbers of shape ``(N,)``, by feature; NaN where unknown.
        levels: codes of the semantic IDs.
    """

    rows: Rows
    sparse: Mapping[str, SparseFeature]
    dense: Mapping[str, Floats]
    levels: int

    def with_prior(self, forecast: Forecast | None, groups: Sequence[str]) -> Features:
        """The same features beside those of a forecast; see `prior_columns`.

        Args:
            forecast: None, or one that says nothing of a row, leaves the row's features unknown.
            groups: of `ranking.prior.GROUPS`.
        """
        names = columns_of_groups(groups, levels=self.levels)
        return replace(self, dense={**self.dense, **prior_columns(self.rows, forecast, names)})


@dataclass(frozen=True)
class Design:
    """Rows as a model reads them.

    Attributes:
        dense_NF: scaled dense features.
        bags: rows of the embedding tables, by sparse feature.
        label_NT, weight_N: of `Rows`.
    """

    dense_NF: Floats
    bags: Mapping[str, Bags]
    label_NT: Floats
    weight_N: Floats

    def __len__(self) -> int:
        return len(self.label_NT)

    def check_ids(self, rows_of: Mapping[str, int]) -> None:
        """Refuses rows outside the embedding tables; `ranking.spec.FeatureSpec.apply` makes none.

        Args:
            rows_of: rows of the table of each sparse feature.

        Raises:
            UserError: a row is outside its table, or a feature has none.
        """
        errors = []
        for name, bags in self.bags.items():
            n_rows = rows_of.get(name, 0)
            outside = (bags.value_V < 0) | (bags.value_V >= n_rows)
            if outside.any():
                errors.append(
                    UserError(
                        f"feature {name}: row {bags.value_V[outside.argmax()]} of a table of {n_rows}",
                        expected="rows of the ranker's own tables, 0 for an unseen id",
                        action="look the ids up with the ranker's own feature spec",
                    )
                )
        if errors:
            raise UserError.collect(errors)


def prior_columns(rows: Rows, forecast: Forecast | None, names: Sequence[str]) -> dict[str, Floats]:
    """Features that a forecast gives to rows.

    Args:
        rows: the rows; each gets the newest forecast at or before its period.
        forecast: None, or one that says nothing of a row, leaves the row's features unknown.
        names: columns of `ranking.prior.columns_of_groups`.

    Returns:
        One column a name; where ``prior_missing`` is 1, all others are NaN; the interests' column also where the
        forecaster has none, or the ad no category.

    Raises:
        UserError: the forecast lacks a feature.
    """
    if not names:
        return {}
    if forecast is None:
        unknown = {name: np.full(len(rows), np.nan, np.float32) for name in names}
        return {**unknown, MISSING: np.ones(len(rows), np.float32)}
    given = forecast.features(rows.user, rows.period, rows.advertiser)
    if INTEREST_MATCH in names:
        given = {**given, INTEREST_MATCH: forecast.interest_match(rows.user, rows.period, rows.ad)}
    if "prior_log_prob" in given:
        given = {**given, "prior_prob": np.exp(given["prior_log_prob"])}
    lacking = [name for name in names if name not in given]
    if lacking:
        raise UserError(
            f"a forecast without {', '.join(lacking)}",
            expected=f"all of {', '.join(names)}",
            action="make the priors again with this version of adsid, or leave the group out of ranker.features.prior",
        )
    missing = given[MISSING] > 0
    known = {name: np.where(missing, np.nan, given[name]).astype(np.float32) for name in names}
    return {**known, MISSING: missing.astype(np.float32)}
