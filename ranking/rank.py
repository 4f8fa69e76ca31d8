"""Ranking one request: the candidates of a visit in order of their chance of a conversion.

Shapes: N candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import LineageError, UserError
from priors.forecast import Forecast
from ranking.features import FeatureBuilder
from ranking.ranker import Ranker
from ranking.rows import Rows


@dataclass(frozen=True)
class Ranking:
    """Candidates, best first.

    Attributes:
        ad_N: indexes of the ads.
        probability_N: chance of a conversion, falling.
        dense: dense features before scaling, by name, ``(N,)`` each; NaN where unknown.
    """

    ad_N: NDArray[np.int32]
    probability_N: NDArray[np.float64]
    dense: dict[str, NDArray[np.float32]]


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
    return Ranking(features.rows.ad[order], probability[order], dense)
