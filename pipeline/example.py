"""One user's way through the system: prompt, forecast, candidates and final ranking, as text."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.log import Log
from pipeline.report import UserExample
from priors.artifact import PriorModel
from priors.forecast import Forecast
from ranking.features import FeatureBuilder
from ranking.rank import rank
from ranking.ranker import Ranker
from retrieval.retriever import Retriever
from retrieval.tuning import Plan

ADVERTISERS = 20
MIN_TARGETS = 3


def user_example(
    log: Log,
    *,
    prior: PriorModel,
    forecasts: Mapping[str, Forecast | None],
    lists: Forecast | None,
    retriever: Retriever,
    plan: Plan,
    ranker: Ranker,
    builder: FeatureBuilder,
    users: NDArray[np.integer],
) -> UserExample | None:
    """What the system does for one request of the evaluated span.

    The request is the first, by the panel's order, with at least three converted ads (or the most there are): it
    is chosen without a look at how well the system does on it. The user is not named.

    Args:
        log: the events.
        prior: writes the prompt.
        forecasts: of the arms ``anchor`` and ``lm``.
        lists: the forecast that retrieval reads.
        retriever: asks the channels.
        plan: of the arm ``lm``.
        ranker: of the arm ``lm``.
        builder: of the ranker's features.
        users: the panel.

    Returns:
        The example; None where nobody converted where an ad ran.
    """
    anchor, lm = forecasts["anchor"], forecasts["lm"]
    targets = log.ad_targets(log.evaluate, users)
    if not len(targets) or anchor is None or lm is None:
        return None
    sizes = np.diff(targets.ptr)
    place = {int(user): place for place, user in enumerate(users)}
    enough_R = sizes >= min(MIN_TARGETS, int(sizes.max()))
    order = sorted(
        range(len(targets)),
        key=lambda row: (not enough_R[row], place[int(targets.user[row])], targets.period[row]),
    )
    offered = (row for row in order if len(log.active_ads(int(targets.market[row]), int(targets.period[row])).ad))
    row = next(offered, None)
    if row is None:
        return None
    user, market, period = (int(column[row]) for column in (targets.user, targets.market, targets.period))
    bought = set(targets.of(row).tolist())
    bought_from = {int(log.ad_advertiser[ad]) for ad in bought} - {-1}

    request = (np.array([user]), np.array([period]))
    lm_A, anchor_A = np.exp(lm.log_probs(*request)[0]), np.exp(anchor.log_probs(*request)[0])
    candidates = retriever.candidates(user, market, period, plan, lists)
    ranking = rank(ranker, builder, lm, candidates.ads, user=user, market=market, period=period)
    advertiser = _names(log.tables.advertisers, "advertiser_id")
    ad_text = _names(log.tables.ads, "ad_id")

    def advertiser_of(ad: int) -> str | None:
        index = int(log.ad_advertiser[ad])
        return advertiser[index] if index >= 0 else None

    return {
        "as_of": f"the start of period {period}",
        "prompt": prior.compiler.text(prior.compiler.compile(user, period)),
        "forecast": [
            {
                "advertiser": advertiser[index],
                "lm": float(lm_A[index]),
                "anchor": float(anchor_A[index]),
                "converted": index in bought_from,
            }
            for index in np.argsort(-lm_A, kind="stable")[:ADVERTISERS].tolist()
        ],
        "candidates": [
            {"ad": ad_text[ad], "advertiser": advertiser_of(ad), "channels": list(channels), "converted": ad in bought}
            for ad, channels in zip(candidates.ads.tolist(), candidates.found_by, strict=True)
        ],
        "ranking": [
            {"ad": ad_text[ad], "advertiser": advertiser_of(ad), "score": float(score), "converted": ad in bought}
            for ad, score in zip(ranking.ad_N.tolist(), ranking.probability_N, strict=True)
        ],
    }


def _names(table: pl.DataFrame, key: str) -> list[str]:
    """How a row is called: its name where it has one, else its id, with the beginning of its text."""
    name = pl.col("name") if "name" in table.columns else pl.lit(None, pl.String)
    called = pl.coalesce(name, pl.col(key).cast(pl.String))
    text = pl.col("text").fill_null("").str.slice(0, 80)
    joined = pl.when(text == "").then(called).otherwise(pl.concat_str(called, pl.lit(": "), text))
    return table.select(joined).to_series().to_list()
