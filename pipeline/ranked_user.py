"""What `adsid rank` shows: the ads of a user's visit in order of their chance of a conversion, and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.errors import UserError
from pipeline import config as configuration
from pipeline.config import AdsidConfig
from pipeline.prompts import user_of
from pipeline.stages import OpenRanker, load_ranker, open_ranker
from pipeline.verdict import number
from ranking.rank import Influence, influences, rank
from ranking.ranker import Ranker


@dataclass(frozen=True)
class RankedAd:
    """One ad of the list.

    Attributes:
        place: from 1.
        ad, advertiser: ids of the tables; no advertiser for None.
        probability: of a conversion.
        influences: the features that matter most to it.
    """

    place: int
    ad: str
    advertiser: str | None
    probability: float
    influences: list[Influence]


@dataclass(frozen=True)
class RankedUser:
    """A ranked visit.

    Attributes:
        market: where, by its id.
        period: when.
        candidates: number of ads that ran there then.
        ads: the first of them, best first.
    """

    market: str
    period: int
    candidates: int
    ads: list[RankedAd]


def open_run(directory: Path, *, arm: str, seed: int | None) -> OpenRanker:
    """The ranker of a run directory.

    Args:
        directory: of a finished run.
        arm: of the ranker.
        seed: of the ranker; None takes the first of the run.

    Raises:
        UserError: there is no such run or ranker.
    """
    config = _config(directory)
    return open_ranker(config, directory, arm=arm, seed=config.ranker.seeds[0] if seed is None else seed)


def ranker_of(directory: Path, *, arm: str, seed: int | None) -> Ranker:
    """As of `open_run`, the ranker alone."""
    return load_ranker(directory, arm=arm, seed=_config(directory).ranker.seeds[0] if seed is None else seed)


def _config(directory: Path) -> AdsidConfig:
    return configuration.load_run(directory, action="give a run, e.g. runs/quickstart")


def rank_user(opened: OpenRanker, user: str, *, period: int | None, top: int, features: int) -> RankedUser:
    """Ranks the ads that ran where and when a user came.

    Args:
        opened: of `open_run`.
        user: its id in the tables.
        period: of the visit; None takes the last one known.
        top: ads to return.
        features: of each, those that matter most.

    Raises:
        UserError: the user is unknown, or came to no market with ads.
    """
    log = opened.log
    index, events = user_of(log, user), log.events
    seen = (events.user == index) & (events.market >= 0) & (events.period >= 1)
    visits = np.unique(np.stack([events.period[seen], events.market[seen]]), axis=1).T
    visits = visits[visits[:, 0] == period] if period is not None else visits
    for when, market in visits[::-1].tolist():
        ads = log.active_ads(market, when).ad
        if len(ads):
            ranking = rank(opened.ranker, opened.builder, opened.forecast, ads, user=index, market=market, period=when)
            why = influences(opened.ranker, ranking, candidates=top, features=features)
            shown = [
                RankedAd(place, str(log.ad_ids[ad]), _advertiser(opened, ad), float(chance), reasons)
                for place, (ad, chance, reasons) in enumerate(
                    zip(ranking.ad_N[:top].tolist(), ranking.probability_N[:top], why, strict=True), 1
                )
            ]
            return RankedUser(str(log.market_ids[market]), int(when), len(ads), shown)
    raise UserError(
        f"user {user}{'' if period is None else f' in period {period}'} without a visit to a market with ads",
        expected="a visit while ads ran",
        action="name another user or period",
    )


def to_console(ranked: RankedUser) -> Group:
    """The list for the terminal."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, side in (("", "right"), ("ad", "left"), ("advertiser", "left"), ("chance", "right")):
        table.add_column(Text(column, style="dim"), justify=side)  # type: ignore[arg-type]
    table.add_column(Text("what matters: value (change of the log-odds)", style="dim"))
    for ad in ranked.ads:
        reasons = ", ".join(_reason(influence) for influence in ad.influences)
        table.add_row(str(ad.place), ad.ad, ad.advertiser or "", f"{ad.probability:.4f}", Text(reasons))
    head = f"market {ranked.market}, period {ranked.period}: {len(ranked.ads)} of {ranked.candidates} ads"
    return Group(Text(head), table)


def _reason(influence: Influence) -> str:
    value = "" if influence.value is None else f" {number(influence.value, 2)}"
    return f"{influence.feature}{value} ({number(influence.effect, 2, signed=True)})"


def _advertiser(opened: OpenRanker, ad: int) -> str | None:
    index = int(opened.log.ad_advertiser[ad])
    return str(opened.log.advertiser_ids[index]) if index >= 0 else None
