"""What a ranker may read of a forecast, in groups that are switched on and off by name.

    probability    chance of the advertiser, and its logarithm
    lift           log-probability against the tuned anchor's
    rank           its place in the forecast, as log(1 + place)
    in_beam        whether the LM's beam found it; of the anchor, whether it is among as many of the likeliest
    prefixes       log-probability of each prefix of its semantic ID, one column a level
    entropy        of the whole forecast: how sure it is of this user
    mass           probability of all advertisers that are in the beam
    age            periods since the forecast was made
    interests      log-probability of the ad's category among the user's interests, where the forecaster has any

Beside any of them stands ``prior_missing``: 1 where there is no forecast of the user, and all else is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

from priors.forecast import prefix_feature

MISSING = "prior_missing"
GROUPS = ("probability", "lift", "rank", "in_beam", "prefixes", "entropy", "mass", "age", "interests")


def columns_of(group: str, *, levels: int) -> tuple[str, ...]:
    """Columns of one group.

    Args:
        group: one of `GROUPS`.
        levels: codes of a semantic ID; its last prefix is the advertiser itself, and has the group ``probability``.
    """
    if group == "probability":
        return ("prior_prob", "prior_log_prob")
    if group == "prefixes":
        return tuple(prefix_feature(depth) for depth in range(1, levels))
    return (f"prior_{group}",)


def columns_of_groups(groups: Sequence[str], *, levels: int) -> tuple[str, ...]:
    """Columns of some groups in the order of `GROUPS`, with the flag where there is any."""
    chosen = [name for group in GROUPS if group in groups for name in columns_of(group, levels=levels)]
    return (*chosen, MISSING) if chosen else ()
