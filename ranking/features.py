"""What a ranker reads of a user, an ad and a visit, and how it is scaled.

Features are *built* from the log, the semantic IDs and a forecast, as of the start of the row's period,
and then *applied* through a `FeatureSpec` that was fitted on the training rows alone: which ids have an
embedding of their own, and the mean and scale of every number. The spec is saved with the ranker.

    Rows ─► FeatureBuilder ─► Features ─────────────────► FeatureSpec.apply ─► Design ─► batches
                               ▲    └─► FeatureSpec.fit ──────┘
            Forecast ─► prior_columns

Sparse features become bags of ids for a ``KeyedJaggedTensor``; an id that was rare or absent in training
shares row 0 of its table. Dense features become one matrix; what is unknown takes the training mean, with
a flag of its own beside it, and what was constant in training is zero for ever.

The arms of the ablation differ in the values of `PRIOR_FEATURES` only: an arm without a forecast has the
same columns, all missing, so that arms of one seed begin with the same weights and see the same batches.

Shapes: N rows, R bags, V ids in all bags, F dense features, A advertisers, L levels of a semantic ID.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from data.log import Log, hash_ids
from data.split import Span
from models.pointwise import SparseTable
from priors.forecast import PRIOR_FEATURES, Forecast
from ranking.config import FeatureConfig
from ranking.history import History, Ints, pair

if TYPE_CHECKING:
    from semantic_ids.advertiser_ids import AdvertiserIds

Floats = NDArray[np.float32]

NULLABLE = frozenset({"price", "discount", "price_age", *PRIOR_FEATURES})
"""Dense features that may be unknown (NaN); each has a flag beside it that says so."""


@dataclass(frozen=True)
class Rows:
    """(visit, ad) pairs to be ranked, all arrays of shape ``(N,)``.

    Attributes:
        user, ad, advertiser, market: indexes of the log; advertiser -1 for none.
        period: of the visit.
        display, mailer: placement codes of the log.
        label: 1.0 where the user converted, else 0.0; NaN where it is not known yet.
        weight: impressions of the log that the row stands for.
    """

    user: NDArray[np.int32]
    ad: NDArray[np.int32]
    advertiser: NDArray[np.int32]
    market: NDArray[np.int32]
    period: NDArray[np.int32]
    display: NDArray[np.int8]
    mailer: NDArray[np.int8]
    label: Floats
    weight: Floats

    def __len__(self) -> int:
        return len(self.user)

    @classmethod
    def of_span(cls, log: Log, span: str | Span, users: NDArray[np.integer] | None = None) -> Rows:
        """The sampled impressions and the conversions of a span.

        Args:
            log: the log.
            span: name of a span, or its first and last period.
            users: users to keep; None keeps all.

        Raises:
            UserError: the span has no impressions of these users, or it is closed.
        """
        events = log.impressions(span, users)
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
            label=np.isin(events.kind, log.label_kinds).astype(np.float32),
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
        active, ads = log.active_ads(market, period), np.asarray(ads, np.int32)
        slot = np.searchsorted(active.ad, ads)
        runs = np.append(active.ad, -1)[slot] == ads
        return cls(
            user=np.full(len(ads), user, np.int32),
            ad=ads,
            advertiser=log.ad_advertiser[ads],
            market=np.full(len(ads), market, np.int32),
            period=np.full(len(ads), period, np.int32),
            display=np.where(runs, np.append(active.display, 0)[slot], 0).astype(np.int8),
            mailer=np.where(runs, np.append(active.mailer, 0)[slot], 0).astype(np.int8),
            label=np.full(len(ads), np.nan, np.float32),
            weight=np.ones(len(ads), np.float32),
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
    """

    rows: Rows
    sparse: Mapping[str, SparseFeature]
    dense: Mapping[str, Floats]

    def with_prior(self, forecast: Forecast | None) -> Features:
        """The same features beside those of a forecast; see `prior_columns`."""
        return replace(self, dense={**self.dense, **prior_columns(self.rows, forecast)})


@dataclass(frozen=True)
class Design:
    """Rows as a model reads them.

    Attributes:
        dense_NF: scaled dense features.
        bags: rows of the embedding tables, by sparse feature.
        label_N, weight_N: of `Rows`.
    """

    dense_NF: Floats
    bags: Mapping[str, Bags]
    label_N: Floats
    weight_N: Floats

    def __len__(self) -> int:
        return len(self.label_N)


def prior_columns(rows: Rows, forecast: Forecast | None) -> dict[str, Floats]:
    """`PRIOR_FEATURES` of rows.

    Args:
        rows: the rows; each gets the newest forecast at or before its period.
        forecast: None, or one that says nothing of a row, leaves the row's features unknown.

    Returns:
        One column a feature; where ``prior_missing`` is 1, all others are NaN.

    Raises:
        UserError: the forecast lacks a feature.
    """
    if forecast is None:
        columns = {name: np.full(len(rows), np.nan, np.float32) for name in PRIOR_FEATURES}
        return {**columns, "prior_missing": np.ones(len(rows), np.float32)}
    given = forecast.features(rows.user, rows.period, rows.advertiser)
    lacking = [name for name in PRIOR_FEATURES if name not in given]
    if lacking:
        raise UserError(
            f"a forecast without {', '.join(lacking)}",
            expected=f"all of {', '.join(PRIOR_FEATURES)}",
            action="make the priors again with this version of adsid",
        )
    missing = given["prior_missing"] > 0
    columns = {name: np.where(missing, np.nan, given[name]).astype(np.float32) for name in PRIOR_FEATURES}
    return {**columns, "prior_missing": missing.astype(np.float32)}


class FeatureBuilder:
    """Builds features of any rows of a log, each as of the start of its own period.

    Args:
        log: the log; events of all users are counted.
        ids: semantic IDs of its advertisers.
        cfg: which features.

    Raises:
        UserError: a feature or ad column is unknown, or the IDs are of other advertisers.
    """

    def __init__(self, log: Log, ids: AdvertiserIds, cfg: FeatureConfig) -> None:
        self.log, self.ids, self.cfg = log, ids, cfg
        self.ad_columns = list(log.ad_features) if cfg.ad_columns is None else list(cfg.ad_columns)
        errors = [
            *_unknown("sparse", cfg.sparse, SPARSE),
            *_unknown("dense", cfg.dense, DENSE),
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
        if len(ids.codes_AL) != len(log.advertiser_ids):
            errors.append(
                UserError(
                    f"semantic IDs of {len(ids.codes_AL)} advertisers for a log of {len(log.advertiser_ids)}",
                    expected="semantic IDs made from this log",
                    action="run the semantic_ids stage on this data again",
                )
            )
        if errors:
            raise UserError.collect(errors)
        events = log.events
        self._bought = np.flatnonzero(log.is_purchase & (events.period >= 0))
        self._converted = np.flatnonzero(log.is_label & (events.period >= 0))
        self._histories: dict[tuple[str, bool], History] = {}

    def build(self, rows: Rows) -> Features:
        """Features of rows, without those of a forecast.

        Args:
            rows: at least one.

        Returns:
            The features that the config names; nothing of a row's own period or later is in them, but
            where the ads of the period are placed.
        """
        sparse = {name: SPARSE[name](self, rows) for name in self.cfg.sparse}
        for name in self.ad_columns:
            codes = self.log.ad_features[name][rows.ad]
            sparse[f"ad_{name}"] = SparseFeature(f"ad_{name}", Bags.single(codes), list(self.log.ad_vocabularies[name]))
        dense: dict[str, Floats] = {}
        for group in self.cfg.dense:
            dense |= {name: np.asarray(column, np.float32) for name, column in DENSE[group](self, rows).items()}
        return Features(rows, sparse, dense)

    def history(self, of: str, *, converted: bool = False) -> History:
        """Purchases, or conversions alone, by a key.

        Args:
            of: ``user``, ``ad``, ``advertiser``, ``user+ad``, ``user+advertiser``, or ``user+`` and an ad column.
            converted: count label conversions only.
        """
        if (of, converted) not in self._histories:
            events = self._converted if converted else self._bought
            key, period = self._event_key(of, events), self.log.events.period[events]
            self._histories[of, converted] = History(key, period)
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
        seen = np.flatnonzero((events.market >= 0) & (events.period >= 0))
        visit = np.unique(np.stack([events.user[seen], events.market[seen], events.period[seen]]), axis=1)
        at_market = pair(visit[0], visit[1], len(self.log.market_ids))
        return History(visit[0], visit[2]), History(at_market, visit[2])

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
        history = History(key[order], events.period[bought][order])
        return history, price[order].astype(np.float32), discount[order].astype(np.float32)

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


def _recent_advertisers(builder: FeatureBuilder, rows: Rows) -> SparseFeature:
    """The advertisers the user bought from last before the period, latest first, each once."""
    log, length = builder.log, builder.cfg.history_length
    events = builder._bought[log.events.advertiser[builder._bought] >= 0]
    user, period, advertiser = (x[events] for x in (log.events.user, log.events.period, log.events.advertiser))
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
}
"""Groups of dense features by name."""


@dataclass(frozen=True)
class FeatureSpec:
    """How features become a model's input; fitted on training rows, saved with the ranker.

    Attributes:
        config: what the features were built with.
        semantic_ids: version of the IDs.
        tables: ids that have a row of their own, by table; id ``i`` has row ``i + 1``, row 0 is for all others.
        features: sparse features in order, each with its table.
        dense: dense features in order.
        mean, scale: a number ``x`` becomes ``(x - mean) * scale``; a scale of 0 silences what was constant.
    """

    config: FeatureConfig
    semantic_ids: str
    tables: dict[str, list[int] | list[str]]
    features: dict[str, str]
    dense: list[str]
    mean: list[float]
    scale: list[float]

    @classmethod
    def fit(cls, features: Features, builder: FeatureBuilder) -> FeatureSpec:
        """Learns ids and scales.

        Args:
            features: of the training rows, with those of a forecast.
            builder: what built them.

        Returns:
            The spec.

        Raises:
            UserError: a number is infinite, or unknown where that cannot be.
        """
        _check_finite(features)
        tables: dict[str, list[Any]] = {}
        for table in dict.fromkeys(feature.table for feature in features.sparse.values()):
            sharing = [feature for feature in features.sparse.values() if feature.table == table]
            counts = sum(feature.bags.counts(len(feature.ids)) for feature in sharing)
            kept = np.flatnonzero(counts >= builder.cfg.min_count)
            tables[table] = [sharing[0].ids[position] for position in kept.tolist()]
        mean, scale = [], []
        for column in features.dense.values():
            known = column[~np.isnan(column)].astype(np.float64)
            spread = float(known.std()) if len(known) else 0.0
            mean.append(float(known.mean()) if len(known) else 0.0)
            scale.append(1.0 / spread if spread > 1e-6 else 0.0)
        return cls(
            config=builder.cfg,
            semantic_ids=builder.ids.version,
            tables=tables,
            features={name: feature.table for name, feature in features.sparse.items()},
            dense=list(features.dense),
            mean=mean,
            scale=scale,
        )

    def apply(self, features: Features) -> Design:
        """Scales features and looks ids up.

        Args:
            features: built with this spec's config.

        Returns:
            The model's input; ids without a row of their own have row 0.

        Raises:
            UserError: features are missing or too many, a number is infinite, or unknown where that cannot be.
        """
        expected, given = {*self.features, *self.dense}, {*features.sparse, *features.dense}
        if expected != given:
            raise UserError(
                f"features without {_names(expected - given)} and with {_names(given - expected)} beyond the spec's",
                expected="the features this ranker was trained on",
                action="build them with the ranker's own feature config, or train a ranker on these",
            )
        _check_finite(features)
        dense_NF = np.stack([features.dense[name] for name in self.dense], axis=1)
        dense_NF = (dense_NF - np.float32(self.mean)) * np.float32(self.scale)
        dense_NF = np.clip(np.nan_to_num(dense_NF, nan=0.0), -self.config.clip, self.config.clip)
        bags = {name: self._look_up(features.sparse[name]) for name in self.features}
        return Design(dense_NF.astype(np.float32), bags, features.rows.label.astype(np.float32), features.rows.weight)

    def _look_up(self, feature: SparseFeature) -> Bags:
        row_of = {known: row for row, known in enumerate(self.tables[feature.table], 1)}
        row_U = np.array([row_of.get(given, 0) for given in feature.ids], np.int64)
        return replace(feature.bags, value_V=row_U[feature.bags.value_V])

    def sparse_tables(self) -> list[SparseTable]:
        """The embedding tables that a model of this spec needs."""
        return [
            SparseTable(
                name=table,
                rows=len(ids) + 1,
                features=tuple(feature for feature, of in self.features.items() if of == table),
            )
            for table, ids in self.tables.items()
        ]

    def to_json(self) -> str:
        """The spec as JSON text."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> FeatureSpec:
        """The spec that `to_json` wrote.

        Raises:
            UserError: it cannot be understood.
        """
        try:
            fields = json.loads(text)
            return cls(**{**fields, "config": FeatureConfig(**fields["config"])})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"a feature spec that cannot be understood ({error})",
                expected="the spec as the ranker stage wrote it",
                action="train the ranker again",
            ) from error


def _check_finite(features: Features) -> None:
    errors = []
    for name, column in features.dense.items():
        wrong = np.isinf(column) if name in NULLABLE else ~np.isfinite(column)
        if wrong.any():
            row = int(wrong.argmax())
            errors.append(
                UserError(
                    f"feature {name}: {int(wrong.sum())} values that are no number, e.g. {column[row]} in row {row}",
                    expected="finite numbers" + (" or NaN for unknown" if name in NULLABLE else ""),
                    action="look at the events it is counted from with `adsid data validate`",
                )
            )
    if errors:
        raise UserError.collect(errors)


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


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
