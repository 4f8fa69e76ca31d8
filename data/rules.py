"""What a setting may be: rules that configurations share, told with the setting's key."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from data.errors import UserError

MAX_SEED = 1 << 62
"""What hashes and generators of 64 bits take, also with a level or a lap added."""


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Args:
        expected: in words.
        holds: whether a value is so; false for what is no number.
    """

    expected: str
    holds: Callable[[Any], bool]

    def or_null(self) -> Rule:
        """The same for a value that may be left out."""
        return Rule(f"{self.expected}, or null", lambda value: value is None or self.holds(value))

    def each(self) -> Rule:
        """The same for every one of a list, in which no value stands twice."""

        def holds(values: Any) -> bool:
            return bool(values) and len(set(values)) == len(values) and all(map(self.holds, values))

        return Rule(f"at least one value, each named once, each {self.expected}", holds)


def at_least(least: int) -> Rule:
    """A whole number that is not below another."""
    return Rule(f"a whole number, at least {least}", lambda value: value >= least)


SEED = Rule(f"a whole number from 0 to {MAX_SEED}", lambda value: 0 <= value <= MAX_SEED)
SHARE = Rule("a share, from 0 to 1", lambda value: 0 <= value <= 1)
POSITIVE_SHARE = Rule("a share above 0, at most 1", lambda value: 0 < value <= 1)
DROPOUT = Rule("a share of at least 0, below 1", lambda value: 0 <= value < 1)
POSITIVE = Rule("a number above 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Rule("a number, at least 0", lambda value: 0 <= value < math.inf)


def broken(settings: object, section: str, rules: Mapping[str, Rule]) -> list[UserError]:
    """The settings that break their rule, one error each.

    Args:
        settings: holds them as attributes.
        section: key of the settings, e.g. ``"prior.probe"``; ``""`` at the root.
        rules: of each by its name, in the order in which they are told.
    """
    prefix = f"{section}." if section else ""
    return [
        UserError(
            f"{prefix}{name}={_plain(getattr(settings, name))}",
            expected=rule.expected,
            action=f"set {prefix}{name} to {rule.expected}",
        )
        for name, rule in rules.items()
        if not rule.holds(getattr(settings, name))
    ]


def check(settings: object, section: str, rules: Mapping[str, Rule]) -> None:
    """Refuse settings that break a rule.

    Raises:
        UserError: tells all of them at once.
    """
    errors = broken(settings, section, rules)
    if errors:
        raise UserError.collect(errors)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value
