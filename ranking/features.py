"""What a ranker reads of a user, an ad and a visit, as of the start of the visit's period.

    Rows ─► FeatureBuilder ─► Features ─────────────────► FeatureSpec.apply ─► Design ─► batches
                               ▲    └─► FeatureSpec.fit ──────┘
            Forecast ─► prior_columns

Sparse features become bags of ids for a ``KeyedJaggedTensor``, dense ones columns of a matrix. Without a
forecast there are the user's own counts and recencies with the ad, its advertiser and its categories: what
a forecast adds, it adds to those. The arms of the ablation differ in the values of the prior features only:
an arm without a forecast has the same columns, all missing, so that arms of one seed begin with the same
weights and see the same batches.

Shapes: N rows, E events, A advertisers, L levels of a semantic ID.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import LineageError, UserError
from data.log import Log
from data.sampling import hash_ids
from priors.plan import compared, running_ads
from ranking.config import FeatureConfig
from ranking.history import History, pair
from ranking.prior import GROUPS
from ranking.rows import Bags, Features, Floats, Ints, Rows, SparseFeature
from semantic_ids.advertiser_ids import AdvertiserIds


class FeatureBuilder:
    """Builds features of any rows of a log, each as of the start of its own period.

    Args:
        log: the log; events of all users are counted, those before its calendar as just before it, as the anchor does.
        ids: semantic IDs of its advertisers.
        cfg: which features.

    Raises:
        UserError: a feature or ad column is unknown.
        LineageError: the IDs are of other advertisers.
    """

    def __init__(self, log: Log, ids: AdvertiserIds, cfg: FeatureConfig) -> None:
        self.log, self.ids, self.cfg = log, ids, cfg
        self.ad_columns = list(log.ad_features) if cfg.ad_columns is None else list(cfg.ad_columns)
        errors = [
            *_unknown("sparse", cfg.sparse, SPARSE),
            *_unknown("dense", cfg.dense, DENSE),
            *_unknown("prior", cfg.prior, GROUPS),
            *_unknown("ad_columns", self.ad_columns, log.ad_features),
        ]
        if not cfg.sparse and not self.ad_columns:
            errors.append(
                UserError(
                    "ranker.features without a sparse feature",
                    expected=f"some of {', '.join(SPARSE)}",
                    action="name at least one in ranker.features.sparse",
                )
            )
        if errors:
            raise UserError.collect(errors)
        if not np.array_equal(ids.advertiser_ids, log.advertiser_ids):
            raise LineageError(
                f"semantic IDs of {len(ids)} advertisers for a log of {len(log.advertiser_ids)} others",
                expected="semantic IDs made from this log",
                action="make the IDs again: train.py stage=semantic_ids",
            )
        self._period = log.events.counted_period
        self._bought, self._converted = np.flatnonzero(log.is_purchase), np.flatnonzero(log.is_label)
        self._histories: dict[tuple[str, bool], History] = {}

    def build(self, rows: Rows) -> Features:
        """Features of rows, without those of a forecast.

        Args:
            rows: at least one.

        Returns:
            The features that the config names; nothing of a row's own period or later is in them, but
            which ads are placed in the period, and where.
        """
        sparse = {name: SPARSE[name](self, rows) for name in self.cfg.sparse}
        for name in self.ad_columns:
            codes = self.log.ad_features[name][rows.ad]
            sparse[f"ad_{name}"] = SparseFeature(f"ad_{name}", Bags.single(codes), list(self.log.ad_vocabularies[name]))
        dense: dict[str, Floats] = {}
        for group in self.cfg.dense:
            dense |= {name: np.asarray(column, np.float32) for name, column in DENSE[group](self, rows).items()}
        return Features(rows, sparse, dense, self.ids.codes_AL.shape[1])

    def history(self, of: str, *, converted: bool = False) -> History:
        """Purchases, or conversions alone, by a key.

        Args:
            of: ``user``, ``ad``, ``advertiser``, ``user+ad``, ``user+advertiser``, or ``user+`` and an ad column.
            converted: count label conversions only.
        """
        if (of, converted) not in self._histories:
            events = self._converted if converted else self._bought
            self._histories[of, converted] = History(self._event_key(of, events), self._period[events])
        return self._histories[of, converted]

    def key(self, of: str, rows: Rows) -> Ints:
        """Key of each row in ``history(of)``."""
        return self._key(of, rows.user, rows.ad, rows.advertiser)

    def _event_key(self, of: str, events: Ints) -> Ints:
        log = self.log.events
        return self._key(of, log.user[events], log.ad[events], log.advertiser[events])

    def _key(self, of: str, user: NDArray[np.int32], ad: NDArray[np.int32], advertiser: NDArray[np.int32]) -> Ints:
        part = of.removeprefix("user+")
        if part == "user":
            return np.asarray(user, np.int64)
        if part in ("ad", "advertiser"):
            second, n = (ad, len(self.log.ad_ids)) if part == "ad" else (advertiser, len(self.log.advertiser_ids))
        else:
            code = np.where(ad >= 0, self.log.ad_features[part][ad], 0)
            second, n = np.where(code > 0, code, -1), len(self.log.ad_vocabularies[part])
        return pair(user, second, n) if of.startswith("user+") else np.asarray(second, np.int64)

    @cached_property
    def visits(self) -> tuple[History, History]:
        """Visits (user, market, period) by user and by user and market."""
        events = self.log.events
        seen = np.flatnonzero(events.market >= 0)
        at_market = pair(events.user[seen], events.market[seen], len(self.log.market_ids))
        since_first = events.period[seen] - int(events.period.min(initial=0))  # told apart before the calendar too
        _, visit = np.unique(at_market * (int(since_first.max(initial=0)) + 1) + since_first, return_index=True)
        user, period = events.user[seen[visit]], self._period[seen[visit]]
        return History(user, period), History(at_market[visit], period)

    @cached_property
    def browsing(self) -> dict[str, tuple[History, History]]:
        """Visits, searches, clicks and coupons by user and value of an ad column, and by user, of each such column.

        An event's category is the value of an ad column that is called the same; columns without any are left out.
        """
        log, found = self.log, {}
        browsed = np.flatnonzero(log.is_browsing)
        for column in self.ad_columns:
            code_of = {name: code for code, name in enumerate(log.ad_vocabularies[column]) if code > 0}
            code_C = np.array([code_of.get(name, -1) for name in log.category_names], np.int64)
            if (code_C >= 0).any():
                user, period = log.events.user[browsed], self._period[browsed]
                key = pair(user, code_C[log.events.category[browsed]], len(log.ad_vocabularies[column]))
                found[column] = History(key, period), History(np.where(key < 0, -1, user), period)
        return found

    @cached_property
    def unit_price(self) -> tuple[History, Floats, Floats]:
        """Purchases with a known price, by ad: their history, price of a piece and share of it taken off."""
        events = self.log.events
        bought = self._bought
        with np.errstate(divide="ignore", invalid="ignore"):
            pieces = np.where(events.quantity[bought] > 0, events.quantity[bought], 1.0)
            price = events.value[bought] / pieces
            off = np.nan_to_num(events.discount[bought])
            discount = np.where(off > 0, off / (events.value[bought] + off), 0.0)
        key = np.where(np.isfinite(price), events.ad[bought], -1)
        order = np.argsort(events.timestamp[bought], kind="stable")
        history = History(key[order], self._period[bought][order])
        return history, price[order].astype(np.float32), discount[order].astype(np.float32)

    @cached_property
    def plan(self) -> tuple[Ints, NDArray[np.float64]] | None:
        """Running ads and log r of `priors.plan` by period and advertiser, ``(P, A)``; None where there is no plan."""
        n_periods = int(self.log.events.period.max(initial=0)) + 2
        running_PA = running_ads(self.log, n_periods)
        plan_PA = compared(running_PA)
        return None if plan_PA is None else (running_PA, plan_PA)

    @cached_property
    def prefixes(self) -> tuple[Bags, list[int]]:
        """The prefixes of each advertiser's semantic ID: their numbers, one bag an advertiser and an empty one.

        A prefix is numbered by its codes alone, so that the number means the same to every ranker of these IDs.
        (Zheng et al., Enhancing Embedding Representation Stability in Recommendation Systems with Semantic ID,
        2025, https://arxiv.org/abs/2504.02137, section 4: prefix n-grams.)
        """
        codes_AL, sizes = np.asarray(self.ids.codes_AL, np.int64), self.ids.level_sizes
        number_A, first, columns = np.zeros(len(codes_AL), np.int64), 0, []
        for level, size in enumerate(sizes):
            number_A = number_A * size + codes_AL[:, level]
            columns.append(first + number_A)
            first += int(np.prod(sizes[: level + 1], dtype=np.int64))
        prefix, position = np.unique(np.stack(columns, 1), return_inverse=True)
        n_advertisers, levels = codes_AL.shape
        ptr = np.append(np.arange(n_advertisers + 1) * levels, n_advertisers * levels)
        return Bags(position.reshape(-1), ptr, np.arange(n_advertisers + 1)), prefix.tolist()


def _own_counts(builder: FeatureBuilder, rows: Rows, of: str, name: str) -> dict[str, NDArray[Any]]:
    """The user's own past with something: how often, how often lately, how often on promotion, how long ago."""
    key, period = builder.key(of, rows), rows.period
    bought, converted = builder.history(of), builder.history(of, converted=True)
    count = bought.count(key, period)
    total = builder.history("user").count(rows.user, period)
    since = bought.periods_since(key, period)
    return {
        f"own_{name}_purchases": np.log1p(count),
        f"own_{name}_recent": np.log1p(bought.count(key, period, window=builder.cfg.recent_periods)),
        f"own_{name}_conversions": np.log1p(converted.count(key, period)),
        f"own_{name}_share": np.log1p(100.0 * count / np.maximum(total, 1)),
        f"own_{name}_freshness": np.divide(1.0, since, out=np.zeros(len(rows)), where=since > 0),
    }


def _popularity(builder: FeatureBuilder, rows: Rows, of: str) -> dict[str, NDArray[Any]]:
    """How often all users bought something, overall and lately, and how often on promotion."""
    key, period, window = builder.key(of, rows), rows.period, builder.cfg.recent_periods
    bought, converted = builder.history(of), builder.history(of, converted=True)
    return {
        f"{of}_purchases": np.log1p(bought.count(key, period)),
        f"{of}_purchases_recent": np.log1p(bought.count(key, period, window=window)),
        f"{of}_conversions": np.log1p(converted.count(key, period)),
        f"{of}_conversions_recent": np.log1p(converted.count(key, period, window=window)),
    }


def _price(builder: FeatureBuilder, rows: Rows) -> dict[str, NDArray[Any]]:
    """Price of a piece and discount when anybody last bought the ad's product, and how long ago that was."""
    history, price, discount = builder.unit_price
    event = history.last_event(rows.ad, rows.period)
    since = history.periods_since(rows.ad, rows.period).astype(np.float64)
    unknown = event < 0
    if unknown.all():
        nothing = np.full(len(rows), np.nan)
        return {"price": nothing, "discount": nothing, "price_age": nothing, "price_missing": unknown}
    return {
        "price": np.where(unknown, np.nan, np.log1p(price[event])),
        "discount": np.where(unknown, np.nan, discount[event]),
        "price_age": np.where(unknown, np.nan, np.log1p(since)),
        "price_missing": unknown,
    }


def _own_columns(builder: FeatureBuilder, rows: Rows) -> dict[str, NDArray[Any]]:
    groups = [_own_counts(builder, rows, f"user+{column}", column) for column in builder.ad_columns]
    return {name: column for group in groups for name, column in group.items()}


def _activity(builder: FeatureBuilder, rows: Rows) -> dict[str, NDArray[Any]]:
    """How much the user buys, how much of it on promotion, and how often it came, here and anywhere."""
    window = builder.cfg.recent_periods
    bought, converted = builder.history("user"), builder.history("user", converted=True)
    visits, visits_here = builder.visits
    here = pair(rows.user, rows.market, len(builder.log.market_ids))
    purchases, conversions = bought.count(rows.user, rows.period), converted.count(rows.user, rows.period)
    return {
        "user_purchases": np.log1p(purchases),
        "user_purchases_recent": np.log1p(bought.count(rows.user, rows.period, window=window)),
        "user_promoted_share": conversions / np.maximum(purchases, 1),
        "user_visits_recent": np.log1p(visits.count(rows.user, rows.period, window=window)),
        "user_visits_here": np.log1p(visits_here.count(here, rows.period)),
    }


def _browsing(builder: FeatureBuilder, rows: Rows) -> dict[str, NDArray[Any]]:
    """How often the user looked at the ad's category, lately too, and its share; nothing where no category is known."""
    found: dict[str, NDArray[Any]] = {}
    for column, (history, of_user) in builder.browsing.items():
        code = builder.log.ad_features[column][rows.ad]
        key = pair(rows.user, np.where(code > 0, code, -1), len(builder.log.ad_vocabularies[column]))
        count, total = history.count(key, rows.period), of_user.count(rows.user, rows.period)
        found |= {
            f"browsed_{column}": np.log1p(count),
            f"browsed_{column}_recent": np.log1p(history.count(key, rows.period, window=builder.cfg.recent_periods)),
            f"browsed_{column}_share": count / np.maximum(total, 1),
        }
    return found


def _plan(builder: FeatureBuilder, rows: Rows) -> dict[str, NDArray[Any]]:
    """How many ads of the advertiser run in the period, and how many more than used to; nothing without a plan."""
    if builder.plan is None:
        return {}
    running_PA, plan_PA = builder.plan
    at, known = (np.minimum(rows.period, len(plan_PA) - 1), rows.advertiser), rows.advertiser >= 0
    return {
        "advertiser_running": np.log1p(np.where(known, running_PA[at], 0)),
        "advertiser_plan": np.where(known, plan_PA[at], 0.0),
    }


def _recent_advertisers(builder: FeatureBuilder, rows: Rows) -> SparseFeature:
    """The advertisers the user bought from last before the period, latest first, each once."""
    log, length = builder.log, builder.cfg.history_length
    events = builder._bought[log.events.advertiser[builder._bought] >= 0]
    user, period, advertiser = (x[events] for x in (log.events.user, builder._period, log.events.advertiser))
    asked, bag_N = np.unique(np.stack([rows.user, rows.period]), axis=1, return_inverse=True)
    start_R = np.searchsorted(user, asked[0])
    cell = user.astype(np.int64) << 32 | period
    stop_R = np.searchsorted(cell, asked[0].astype(np.int64) << 32 | asked[1])
    values, lengths = [], []
    for first in range(0, len(start_R), 1024):  # a block's whole histories are held at once
        part = np.arange(first, min(first + 1024, len(start_R)))
        size = stop_R[part] - start_R[part]
        row = np.repeat(np.arange(len(part)), size)
        event = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size, size) + start_R[part][row]
        latest = np.lexsort((-event, row))
        row, bought = row[latest], advertiser[event[latest]].astype(np.int64)
        _, once = np.unique(row * len(log.advertiser_ids) + bought, return_index=True)
        once.sort()
        row, bought = row[once], bought[once]
        count = np.bincount(row, minlength=len(part))
        place = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        values.append(bought[place < length])
        lengths.append(np.minimum(count, length))
    ptr = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    bags = Bags(np.concatenate(values), ptr, bag_N.reshape(-1))
    return SparseFeature("advertiser", bags, log.advertiser_ids.tolist())


def _semantic_id(builder: FeatureBuilder, rows: Rows) -> SparseFeature:
    bags, prefixes = builder.prefixes
    none = len(bags.ptr_R1) - 2  # the last bag, which is empty
    bag_N = np.where(rows.advertiser < 0, none, rows.advertiser).astype(np.int64)
    return SparseFeature("semantic_id", replace(bags, bag_N=bag_N), prefixes)


def _user(builder: FeatureBuilder, rows: Rows) -> SparseFeature:
    """The user under a hash of its id, so that a ranker's files name nobody."""
    hashes = hash_ids(builder.log.user_ids, seed=0).tolist()
    return SparseFeature("user", Bags.single(rows.user), hashes)


SPARSE: Mapping[str, Callable[[FeatureBuilder, Rows], SparseFeature]] = {
    "user": _user,
    "ad": lambda b, rows: SparseFeature("ad", Bags.single(rows.ad), b.log.ad_ids.tolist()),
    "advertiser": lambda b, rows: SparseFeature(
        "advertiser", Bags.single(rows.advertiser), b.log.advertiser_ids.tolist()
    ),
    "market": lambda b, rows: SparseFeature("market", Bags.single(rows.market), b.log.market_ids.tolist()),
    "display": lambda b, rows: SparseFeature("display", Bags.single(rows.display), list(b.log.display_names)),
    "mailer": lambda b, rows: SparseFeature("mailer", Bags.single(rows.mailer), list(b.log.mailer_names)),
    "semantic_id": _semantic_id,
    "history": _recent_advertisers,
}
"""Sparse features by name; ``history`` shares the table of ``advertiser``."""

DENSE: Mapping[str, Callable[[FeatureBuilder, Rows], dict[str, NDArray[Any]]]] = {
    "price": _price,
    "own_advertiser": lambda b, rows: _own_counts(b, rows, "user+advertiser", "advertiser"),
    "own_ad": lambda b, rows: _own_counts(b, rows, "user+ad", "ad"),
    "own_columns": _own_columns,
    "ad_popularity": lambda b, rows: _popularity(b, rows, "ad"),
    "advertiser_popularity": lambda b, rows: _popularity(b, rows, "advertiser"),
    "activity": _activity,
    "plan": _plan,
    "browsing": _browsing,
}
"""Groups of dense features by name."""


def _unknown(key: str, given: Iterable[str], choices: Iterable[str]) -> list[UserError]:
    wrong = [name for name in given if name not in set(choices)]
    if not wrong:
        return []
    return [
        UserError(
            f"ranker.features.{key} names {', '.join(wrong)}",
            expected=f"some of {', '.join(choices) or 'nothing: the data config opens none'}",
            action=f"correct ranker.features.{key}",
        )
    ]
