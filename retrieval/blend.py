"""One candidate list out of several channels under one total budget.

    quota        each channel owns a share of the places. They are dealt one after another to the channel furthest
                 behind its share, which puts in its best ad that is not in the list yet: a duplicate costs no place
    rrf          an ad scores  Σ over channels of  weight / (constant + its place there)
                 (reciprocal-rank fusion: Cormack et al., SIGIR 2009)
    calibrated   a logistic regression on an ad's places in all channels says how likely it is to be converted with

What the channels leave free is filled by a fallback. A cap keeps one advertiser from taking the whole list: an ad
above it costs no place either. A shorter budget gives a prefix of the same list, so one blend serves every length.

Shapes: C channels, N candidates of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

Ads = NDArray[np.int32]
Lists = Mapping[str, Ads]


@dataclass(frozen=True)
class Blended:
    """A blended list.

    Attributes:
        ads: distinct ads in order, at most the budget.
        source: channel that each ad owes its place to.
        found_by: channels that have the ad among their own first ``budget`` ads, and the one it came from.
    """

    ads: Ads
    source: tuple[str, ...]
    found_by: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.ads)


@dataclass(frozen=True)
class Limits:
    """What holds for every blend.

    Attributes:
        budget: places.
        fallback: channel that fills what the others leave free.
        per_advertiser: most ads of one advertiser; None for any number. Ads of no advertiser are not counted.
        ad_advertiser: advertiser of every ad, -1 for none; needed with a cap.
    """

    budget: int
    fallback: str | None = None
    per_advertiser: int | None = None
    ad_advertiser: NDArray[np.int32] | None = None


class Blend(Protocol):
    """Decides which ads of the channels' lists get a place."""

    kind: ClassVar[str]

    @property
    def channels(self) -> tuple[str, ...]:
        """Whose lists it reads."""

    def fill(self, places: _Places, lists: Mapping[str, list[int]]) -> None:
        """Put ads into places until they are full or no ad is left."""

    def to_plain(self) -> dict[str, Any]:
        """Plain types; `blend_of` reads them back."""


class _Places:
    """The list under way: refuses duplicates and what is above the cap."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.ads: list[int] = []
        self.source: list[str] = []
        self._taken: set[int] = set()
        self._of_advertiser: dict[int, int] = {}
        if limits.per_advertiser is not None and limits.ad_advertiser is None:
            raise ValueError(f"per_advertiser={limits.per_advertiser} needs the advertiser of every ad")

    @property
    def full(self) -> bool:
        return len(self.ads) >= self.limits.budget

    def put(self, ad: int, source: str) -> bool:
        """Whether the ad got a place."""
        if ad in self._taken:
            return False
        if self.limits.per_advertiser is not None:
            advertiser = int(self.limits.ad_advertiser[ad])  # type: ignore[index]
            shown = self._of_advertiser.get(advertiser, 0)
            if advertiser >= 0 and shown >= self.limits.per_advertiser:
                return False
            self._of_advertiser[advertiser] = shown + 1
        self._taken.add(ad)
        self.ads.append(ad)
        self.source.append(source)
        return True


@dataclass(frozen=True)
class QuotaBlend:
    """Shares of the places.

    Attributes:
        shares: of each channel; they add up to 1. A channel with a share of 0 fills what the others leave free.

    Raises:
        ValueError: shares are negative or do not add up to 1.
    """

    shares: Mapping[str, float]
    kind: ClassVar[str] = "quota"

    def __post_init__(self) -> None:
        if min(self.shares.values(), default=0) < 0 or abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares {dict(self.shares)} must not be negative and must add up to 1")

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.shares)

    def fill(self, places: _Places, lists: Mapping[str, list[int]]) -> None:
        given, position = dict.fromkeys(self.shares, 0), dict.fromkeys(self.shares, 0)
        alive = [name for name, share in self.shares.items() if share > 0]
        while alive and not places.full:
            place = len(places.ads) + 1
            name = max(alive, key=lambda name: self.shares[name] * place - given[name])
            ads, at = lists[name], position[name]
            while at < len(ads) and not places.put(ads[at], name):
                at += 1
            position[name] = at + 1
            if at == len(ads):
                alive.remove(name)
            else:
                given[name] += 1
        for name, share in self.shares.items():
            if share == 0:
                _fill(places, lists[name], name)

    def to_plain(self) -> dict[str, Any]:
        return {"kind": self.kind, "shares": dict(self.shares)}


@dataclass(frozen=True)
class FusionBlend:
    """Reciprocal-rank fusion.

    Attributes:
        weights: of each channel.
        constant: added to the place, so that first places do not count for everything.

    Raises:
        ValueError: a weight is negative, or the constant is not positive.
    """

    weights: Mapping[str, float]
    constant: float
    kind: ClassVar[str] = "rrf"

    def __post_init__(self) -> None:
        if min(self.weights.values(), default=0) < 0 or self.constant <= 0:
            raise ValueError(f"weights {dict(self.weights)} and constant {self.constant} must not be negative")

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.weights)

    def fill(self, places: _Places, lists: Mapping[str, list[int]]) -> None:
        parts = {
            name: weight / (self.constant + 1 + np.arange(len(lists[name])))
            for name, weight in self.weights.items()
            if weight > 0
        }
        _fill_by_score(places, {name: lists[name] for name in parts}, parts)

    def to_plain(self) -> dict[str, Any]:
        return {"kind": self.kind, "weights": dict(self.weights), "constant": self.constant}


@dataclass(frozen=True)
class CalibratedBlend:
    """Log-odds of a conversion from an ad's places, up to what all ads have in common.

    Attributes:
        found: log-odds that a channel adds to an ad that it found.
        per_log_place: and for each unit of the logarithm of its place there.
    """

    found: Mapping[str, float]
    per_log_place: Mapping[str, float]
    kind: ClassVar[str] = "calibrated"

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.found)

    def fill(self, places: _Places, lists: Mapping[str, list[int]]) -> None:
        parts = {
            name: self.found[name] + self.per_log_place[name] * np.log1p(np.arange(len(lists[name])))
            for name in self.found
        }
        _fill_by_score(places, {name: lists[name] for name in parts}, parts)

    def to_plain(self) -> dict[str, Any]:
        return {"kind": self.kind, "found": dict(self.found), "per_log_place": dict(self.per_log_place)}


KINDS: dict[str, type[QuotaBlend] | type[FusionBlend] | type[CalibratedBlend]] = {
    "quota": QuotaBlend,
    "rrf": FusionBlend,
    "calibrated": CalibratedBlend,
}


def blend_of(plain: Mapping[str, Any]) -> Blend:
    """A blend from what its ``to_plain`` gave."""
    return KINDS[plain["kind"]](**{key: value for key, value in plain.items() if key != "kind"})


def merge(lists: Lists, blend: Blend, limits: Limits) -> Blended:
    """One list out of the channels'.

    Args:
        lists: ads of each channel, distinct, best first; -1 and what follows it is ignored. A list of twice the
            budget never runs dry on account of duplicates.
        blend: says which ads get the places.
        limits: budget, fallback and cap.

    Returns:
        The list and where each ad came from; shorter than the budget where all channels ran dry.

    Raises:
        ValueError: the blend or the fallback names a channel without a list.
    """
    wanted = dict.fromkeys([*blend.channels, *([limits.fallback] if limits.fallback else [])])
    missing = [name for name in wanted if name not in lists]
    if missing:
        raise ValueError(f"no list of channel {', '.join(missing)}; there are {', '.join(lists)}")
    plain = {name: _valid(lists[name]) for name in wanted}
    places = _Places(limits)
    blend.fill(places, plain)
    if limits.fallback is not None:
        _fill(places, plain[limits.fallback], limits.fallback)
    members = {name: set(ads[: limits.budget]) for name, ads in plain.items()}
    found_by = tuple(
        tuple(name for name, ads in members.items() if ad in ads or name == via)
        for ad, via in zip(places.ads, places.source, strict=True)
    )
    return Blended(np.array(places.ads, dtype=np.int32), tuple(places.source), found_by)


def _valid(ads: Ads) -> list[int]:
    end = np.flatnonzero(ads < 0)
    return ads[: end[0] if len(end) else len(ads)].tolist()


def _fill(places: _Places, ads: list[int], name: str) -> None:
    for ad in ads:
        if places.full:
            return
        places.put(ad, name)


def _fill_by_score(places: _Places, lists: Mapping[str, list[int]], parts: Mapping[str, NDArray[np.floating]]) -> None:
    """Ads in order of the sum of their parts; each owes its place to the channel with its largest part."""
    if not any(lists.values()):
        return
    names = list(lists)
    ad_N = np.concatenate([np.array(lists[name], dtype=np.int64) for name in names])
    part_N = np.concatenate([parts[name] for name in names])
    channel_N = np.repeat(np.arange(len(names)), [len(lists[name]) for name in names])
    ads, row_N = np.unique(ad_N, return_inverse=True)
    score = np.bincount(row_N, part_N)
    best_first = np.lexsort((-part_N, row_N))
    via = channel_N[best_first[np.searchsorted(row_N[best_first], np.arange(len(ads)))]]
    for place in np.argsort(-score, kind="stable").tolist():
        if places.full:
            return
        places.put(int(ads[place]), names[via[place]])
