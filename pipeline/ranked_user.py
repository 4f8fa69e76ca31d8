"""What `adsid rank` shows: the ads of a user's visit in order of their chance of a conversion, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

_NAMES = 3
"""Ids of one feature that the terminal shows."""


@dataclass(frozen=True)
class RankedAd:
    """One ad of the list.

    Attributes:
        place: from 1.
        ad, advertiser: ids of the tables; no advertiser for None.
        name: of the advertiser, where the tables have one.
        probability: of a conversion.
        influences: the features that matter most to it; of sparse ones the values as the tables name them.
    """

    place: int
    ad: str
    advertiser: str | None
    name: str | None
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
    return configuration.load_run(directory, action="give a finished run, or make one with `adsid run`")


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
            names = _Names(opened, user)
            shown = [
                RankedAd(
                    place,
                    ad=str(log.ad_ids[ad]),
                    advertiser=names.advertiser_id(ad),
                    name=names.of_advertiser(ad),
                    probability=float(chance),
                    influences=[names.readable(reason, ad) for reason in reasons],
                )
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
        table.add_row(str(ad.place), ad.ad, ad.name or ad.advertiser or "", f"{ad.probability:.4f}", Text(reasons))
    head = f"market {ranked.market}, period {ranked.period}: {len(ranked.ads)} of {ranked.candidates} ads"
    return Group(Text(head), table)


def _reason(influence: Influence) -> str:
    value = influence.value
    if isinstance(value, list):
        more = f" and {len(value) - _NAMES} more" if len(value) > _NAMES else ""
        told = f" {', '.join(str(one) or 'none' for one in value[:_NAMES])}{more}" if value else " none"
    else:
        told = "" if value is None else f" {number(value, 2)}"
    return f"{influence.feature}{told} ({number(influence.effect, 2, signed=True)})"


class _Names:
    """What ids are called.

    Args:
        opened: the ranker with its log.
        user: the id that was asked for; a ranker knows its hash.
    """

    def __init__(self, opened: OpenRanker, user: str) -> None:
        self.log, self.ids, self.user = opened.log, opened.builder.ids, user
        advertisers = self.log.tables.advertisers
        given = advertisers["name"].to_list() if "name" in advertisers.columns else [None] * len(advertisers)
        self.names = dict(zip(self.log.advertiser_ids.tolist(), given, strict=True))

    def advertiser_id(self, ad: int) -> str | None:
        index = int(self.log.ad_advertiser[ad])
        return str(self.log.advertiser_ids[index]) if index >= 0 else None

    def of_advertiser(self, ad: int) -> str | None:
        index = int(self.log.ad_advertiser[ad])
        return self.names[self.log.advertiser_ids[index].item()] if index >= 0 else None

    def readable(self, influence: Influence, ad: int) -> Influence:
        """The same with names for ids: advertisers by name, the user as asked for, a semantic ID by its codes."""
        ids = influence.value
        if not isinstance(ids, list):
            return influence
        match influence.feature:
            case "user":
                names: list[int | str] = [self.user]
            case "advertiser" | "history":
                names = [self.names[one] or one for one in ids]
            case "semantic_id":
                names = list(self.ids.tokens(int(self.log.ad_advertiser[ad]))) if ids else []
            case _:
                names = ids
        return replace(influence, value=names)
