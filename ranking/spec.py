"""What a ranker learned about its features: which ids have an embedding, the mean and scale of every number.

Fitted on the training rows alone and saved with the ranker. An id that was rare or absent in training
shares row 0 of its table. What is unknown takes the training mean, with a flag of its own beside it, and
what was constant in training is zero for ever: so is the flag of what training knew of every row. Where a forecast
covered all training rows, a row without one later is an average one in all prior features, and no flag tells it apart.

Shapes: N rows, F dense features, U ids of the log.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError
from models.pointwise import SparseTable
from priors.forecast import INTEREST_MATCH
from ranking.config import FeatureConfig
from ranking.prior import MISSING
from ranking.rows import Bags, Design, Features, SparseFeature

NULLABLE = frozenset({"price", "discount", "price_age"})
"""Dense features that, beside those of a forecast, may be unknown (NaN); each has a flag beside it that says so."""


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
    def fit(cls, features: Features, cfg: FeatureConfig, *, semantic_ids: str) -> FeatureSpec:
        """Learns ids and scales.

        Args:
            features: of the training rows, with those of a forecast.
            cfg: what they were built with.
            semantic_ids: version of the IDs.

        Returns:
            The spec.

        Raises:
            UserError: there is no dense feature, one is of another type, a number is infinite, or unknown where that
                cannot be.
        """
        if not features.dense:
            raise UserError(
                "a ranker without any dense feature",
                expected="at least one: rankers weigh numbers beside the embeddings of ids",
                action="name some in ranker.features.dense or ranker.features.prior",
            )
        _check(features)
        tables: dict[str, list[Any]] = {}
        for table in dict.fromkeys(feature.table for feature in features.sparse.values()):
            sharing = [feature for feature in features.sparse.values() if feature.table == table]
            counts = sum(feature.bags.counts(len(feature.ids)) for feature in sharing)
            kept = np.flatnonzero(counts >= cfg.min_count)
            tables[table] = [sharing[0].ids[position] for position in kept.tolist()]
        mean, scale = [], []
        for column in features.dense.values():
            known = column[~np.isnan(column)].astype(np.float64)
            spread = float(known.std()) if len(known) else 0.0
            mean.append(float(known.mean()) if len(known) else 0.0)
            scale.append(1.0 / spread if spread > 1e-6 else 0.0)
        return cls(
            config=cfg,
            semantic_ids=semantic_ids,
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
            UserError: features are missing or too many, a feature or an id is of another type, a number is infinite,
                or unknown where that cannot be.
        """
        expected, given = {*self.features, *self.dense}, {*features.sparse, *features.dense}
        if expected != given:
            raise UserError(
                f"features without {_names(expected - given)} and with {_names(given - expected)} beyond the spec's",
                expected="the features this ranker was trained on",
                action="build them with the ranker's own feature config, or train a ranker on these",
            )
        _check(features)
        dense_NF = np.stack([features.dense[name] for name in self.dense], axis=1)
        dense_NF = (dense_NF - np.array(self.mean, np.float32)) * np.array(self.scale, np.float32)
        dense_NF = np.clip(np.nan_to_num(dense_NF, nan=0.0), -self.config.clip, self.config.clip)
        bags = {name: self._look_up(features.sparse[name]) for name in self.features}
        return Design(
            dense_NF.astype(np.float32), bags, features.rows.label_NT.astype(np.float32), features.rows.weight
        )

    def _look_up(self, feature: SparseFeature) -> Bags:
        known = self.tables[feature.table]
        if known and feature.ids and type(known[0]) is not type(feature.ids[0]):
            raise UserError(
                f"ids of table {feature.table} like {feature.ids[0]!r}, of type {type(feature.ids[0]).__name__}",
                expected=f"ids of type {type(known[0]).__name__}, like {known[0]!r}, as the ranker was trained on",
                action="prepare the data as for the training, or train a ranker on these",
            )
        row_of = self._row_of[feature.table]
        row_U = np.array([row_of.get(given, 0) for given in feature.ids], np.int64)
        return replace(feature.bags, value_V=row_U[feature.bags.value_V])

    @cached_property
    def _row_of(self) -> dict[str, dict[Any, int]]:
        """The row of each id that has one, by table."""
        return {table: {given: row for row, given in enumerate(ids, 1)} for table, ids in self.tables.items()}

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

    def rows_of(self) -> dict[str, int]:
        """Rows of the table of each sparse feature."""
        return {feature: len(self.tables[table]) + 1 for feature, table in self.features.items()}

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


def _check(features: Features) -> None:
    """Refuses features that no model can read, all of them at once."""
    missing = features.dense.get(MISSING)
    given_N = np.zeros(len(features.rows), np.bool_) if missing is None else missing == 0
    errors = [
        *(error for name, column in features.dense.items() for error in _wrong_numbers(name, column, given_N)),
        *(error for name, feature in features.sparse.items() for error in _wrong_positions(name, feature)),
    ]
    if errors:
        raise UserError.collect(errors)


def _wrong_numbers(name: str, column: NDArray[Any], given_N: NDArray[np.bool_]) -> Iterator[UserError]:
    """What is wrong with a dense feature.

    Args:
        name: of the feature.
        column: its values.
        given_N: True where there is a forecast of the row, which then gives all that it is asked for but an interest.
    """
    if not np.issubdtype(column.dtype, np.floating):
        yield UserError(
            f"feature {name} of type {column.dtype}, e.g. {column[:1].tolist()}",
            expected="floating-point numbers",
            action="encode text as a sparse feature and give all else as float32",
        )
        return
    of_forecast = name.startswith("prior_") and name != MISSING
    nullable = name in NULLABLE or of_forecast
    wrong = np.isinf(column) if nullable else ~np.isfinite(column)
    if of_forecast and name != INTEREST_MATCH:
        wrong |= np.isnan(column) & given_N
    if wrong.any():
        row = int(wrong.argmax())
        unknown = f" or NaN where {MISSING} is 1" if of_forecast else " or NaN for unknown"
        yield UserError(
            f"feature {name}: {int(wrong.sum())} values that are no number, e.g. {column[row]} in row {row}",
            expected="finite numbers" + (unknown if nullable else ""),
            action="make the forecasts again: adsid run run.until=forecasts"
            if of_forecast
            else "look at the events it is counted from with `adsid data validate`",
        )


def _wrong_positions(name: str, feature: SparseFeature) -> Iterator[UserError]:
    position_V = feature.bags.value_V
    outside = (position_V < 0) | (position_V >= len(feature.ids))
    if outside.any():
        yield UserError(
            f"feature {name}: position {position_V[outside.argmax()]} in a list of {len(feature.ids)} ids",
            expected="bags of positions in the feature's own ids",
            action="build the features with FeatureBuilder",
        )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"
