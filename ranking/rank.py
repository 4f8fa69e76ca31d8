"""Ranking one request: the candidates of a visit in order of their chance of a conversion, and what moved each.

A feature matters to a candidate as far as the log-odds change when it is taken away: a number is set to its mean
in training, a bag of ids is emptied. Any ranker can be asked so, whatever its layers.

Shapes: N candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import LineageError, UserError
from priors.forecast import Forecast
from ranking.features import FeatureBuilder
from ranking.ranker import Ranker, predict
from ranking.rows import Bags, Design, Features, Rows


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first.

    Attributes:
        ad_N: indexes of the ads.
        probability_N: chance of a conversion, falling.
        dense: dense features before scaling, by name, ``(N,)`` each; NaN where unknown.
        features: of the candidates in the order given, and ``order_N``, which puts them in this one.
    """

    ad_N: NDArray[np.int32]
    probability_N: NDArray[np.float64]
    dense: dict[str, NDArray[np.float32]]
    features: Features
    order_N: NDArray[np.int64]


@dataclass(frozen=True)
class Influence:
    """What one feature does to one candidate.

    Attributes:
        feature: its name.
        value: a number before scaling, None where unknown; of ids, those of the bag.
        effect: log-odds with it minus log-odds without it.
    """

    feature: str
    value: float | list[int | str] | None
    effect: float


def influences(ranker: Ranker, ranking: Ranking, *, candidates: int, features: int) -> list[list[Influence]]:
    """The features that matter most to the first candidates.

    Args:
        ranker: that ranked them.
        ranking: the candidates.
        candidates: how many of them.
        features: how many for each.

    Returns:
        One list a candidate, the largest effect first; a feature without any effect is in none.
    """
    design = ranker.spec.apply(ranking.features)
    found: list[list[Influence]] = []
    dense_names, sparse_names = ranker.spec.dense, list(design.bags)
    names = [*dense_names, *sparse_names]
    for place in range(min(candidates, len(ranking.ad_N))):
        row = int(ranking.order_N[place])
        copies = len(names) + 1  # the last one is whole
        dense_CF = np.repeat(design.dense_NF[row : row + 1], copies, axis=0)
        dense_CF[np.arange(len(dense_names)), np.arange(len(dense_names))] = 0.0
        bags = {}
        for number, name in enumerate(sparse_names, len(dense_names)):
            value, length = design.bags[name].of_rows(np.array([row]))
            which = np.zeros(copies, np.int64)
            which[number] = 1  # the empty bag
            bags[name] = Bags(value, np.array([0, length[0], length[0]]), which)
        nothing = np.zeros(copies, np.float32)
        chance_C = predict(ranker.module, Design(dense_CF, bags, nothing[:, None], nothing))[:, 0]
        log_odds_C = np.log(chance_C) - np.log1p(-chance_C)
        effect = log_odds_C[-1] - log_odds_C[:-1]
        top = [n for n in np.argsort(-np.abs(effect), kind="stable")[:features].tolist() if effect[n] != 0]
        found.append([Influence(names[n], _value(ranking.features, names[n], row), float(effect[n])) for n in top])
    return found


def _value(features: Features, name: str, row: int) -> float | list[int | str] | None:
    if name in features.dense:
        value = float(features.dense[name][row])
        return None if np.isnan(value) else value
    feature = features.sparse[name]
    return [feature.ids[position] for position in feature.bags.of_rows(np.array([row]))[0].tolist()]


def rank(
    ranker: Ranker,
    builder: FeatureBuilder,
    forecast: Forecast | None,
    ads: NDArray[np.integer],
    *,
    user: int,
    market: int,
    period: int,
) -> Ranking:
    """Ranks the candidates of one request.

    Args:
        ranker: a trained ranker.
        builder: of the log, with the ranker's own feature config; made once for many requests.
        forecast: of the ranker's arm, None for the arm without.
        ads: indexes of the candidates, at least one, each once.
        user: who asks.
        market: where.
        period: when; purchases of this period are not looked at.

    Returns:
        The candidates, the likeliest first; equal chances stay in the order given.

    Raises:
        UserError: no candidate, or an index outside the log.
        LineageError: the ranker was trained with other features or semantic IDs.
    """
    log = builder.log
    wrong = [
        f"{name} {index}"
        for name, given, known in (
            ("user", [user], log.user_ids),
            ("market", [market], log.market_ids),
            ("ad", np.asarray(ads).tolist(), log.ad_ids),
        )
        for index in given
        if not 0 <= index < len(known)
    ]
    if wrong or not len(ads):
        raise UserError(
            f"a request with {', '.join(wrong[:5]) or 'no candidate'}",
            expected="at least one ad, and indexes of this log",
            action="take candidates, user and market from the log that the ranker's features are built from",
        )
    if ranker.spec.config != builder.cfg or ranker.spec.semantic_ids != builder.ids.version:
        raise LineageError(
            "a feature builder with another config or other semantic IDs than the ranker's",
            expected="FeatureBuilder(log, ids, ranker.spec.config) with the IDs that the ranker was trained with",
            action="build the features with the ranker's own spec",
        )
    rows = Rows.of_request(log, ads, user=user, market=market, period=period)
    features = builder.build(rows).with_prior(forecast, ranker.spec.config.prior)
    probability = ranker.probabilities(features)
    order = np.argsort(-probability, kind="stable")
    dense = {name: column[order] for name, column in features.dense.items()}
    return Ranking(features.rows.ad[order], probability[order], dense, features, order)
