"""One candidate list out of several channels under one total budget.

Each channel owns a share of the places. Places are dealt one after another to the channel furthest
behind its share, which puts in its best ad that is not in the list yet: a duplicate costs no place, the
channel just goes on to its next ad. What a channel that ran dry leaves free is filled by the others.

A shorter budget gives a prefix of the same list, so one blend serves every list length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Blended:
    """A blended list.

    Attributes:
        ads: distinct ads in order of dealing, at most the budget.
        source: channel whose place each ad stands in.
        found_by: channels that have the ad among their own first ``budget`` ads, and the one it came from.
    """

    ads: NDArray[np.int32]
    source: tuple[str, ...]
    found_by: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.ads)


def blend(
    lists: Mapping[str, NDArray[np.int32]],
    shares: Mapping[str, float],
    *,
    budget: int,
    fallback: str | None = None,
) -> Blended:
    """Deal a budget of places to channels.

    Args:
        lists: ads of each channel, distinct, best first; -1 and what follows it is ignored. A list of twice
            the budget never runs dry on account of duplicates.
        shares: share of the places of each channel in ``lists``; they add up to 1.
        budget: places.
        fallback: channel without a share that fills what the others leave free.

    Returns:
        The list and where each ad came from; shorter than the budget where all channels ran dry.

    Raises:
        ValueError: shares are negative, do not add up to 1, or name a channel without a list.
    """
    missing = [name for name in (*shares, *([fallback] if fallback else [])) if name not in lists]
    if missing:
        raise ValueError(f"no list of channel {', '.join(missing)}; there are {', '.join(lists)}")
    if min(shares.values(), default=0) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        raise ValueError(f"shares {dict(shares)} must not be negative and must add up to 1")
    plain = {name: _valid(ads) for name, ads in lists.items() if name in shares or name == fallback}
    chosen, source = _deal(plain, shares, budget)
    if fallback is not None:
        _fill(chosen, source, fallback, plain[fallback], budget)
    members = {name: set(ads[:budget]) for name, ads in plain.items()}
    found_by = tuple(
        tuple(name for name, ads in members.items() if ad in ads or name == via)
        for ad, via in zip(chosen, source, strict=True)
    )
    return Blended(np.array(chosen, dtype=np.int32), tuple(source), found_by)


def _valid(ads: NDArray[np.int32]) -> list[int]:
    end = np.flatnonzero(ads < 0)
    return ads[: end[0] if len(end) else len(ads)].tolist()


def _deal(lists: Mapping[str, list[int]], shares: Mapping[str, float], budget: int) -> tuple[list[int], list[str]]:
    chosen: list[int] = []
    source: list[str] = []
    taken: set[int] = set()
    given = dict.fromkeys(shares, 0)
    position = dict.fromkeys(shares, 0)
    alive = [name for name in shares if shares[name] > 0]
    while len(chosen) < budget and alive:
        place = len(chosen) + 1
        name = max(alive, key=lambda name: shares[name] * place - given[name])
        ads, at = lists[name], position[name]
        while at < len(ads) and ads[at] in taken:
            at += 1
        if at == len(ads):
            alive.remove(name)
            continue
        position[name] = at + 1
        given[name] += 1
        taken.add(ads[at])
        chosen.append(ads[at])
        source.append(name)
    for name, share in shares.items():
        if share == 0:  # owns no place, but may fill one that the others leave free
            _fill(chosen, source, name, lists[name], budget)
    return chosen, source


def _fill(chosen: list[int], source: list[str], name: str, ads: list[int], budget: int) -> None:
    taken = set(chosen)
    for ad in ads:
        if len(chosen) == budget:
            return
        if ad not in taken:
            taken.add(ad)
            chosen.append(ad)
            source.append(name)
