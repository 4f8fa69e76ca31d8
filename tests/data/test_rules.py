"""Rules of settings: what holds, and how several broken ones are told."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from data.errors import UserError
from data.rules import DROPOUT, MAX_SEED, NOT_NEGATIVE, POSITIVE, POSITIVE_SHARE, SEED, SHARE, Rule, at_least, check

NAN = math.nan


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        (SEED, [0, MAX_SEED], [-1, MAX_SEED + 1]),
        (SHARE, [0, 0.5, 1], [-0.1, 1.1, NAN]),
        (POSITIVE_SHARE, [0.1, 1], [0, 1.1, NAN]),
        (DROPOUT, [0, 0.9], [-0.1, 1, 1.5, NAN]),
        (POSITIVE, [1e-9, 5], [0, -1, math.inf, NAN]),
        (NOT_NEGATIVE, [0, 5], [-1e-9, math.inf, NAN]),
        (at_least(2), [2, 3], [1, -1]),
        (at_least(1).or_null(), [None, 1], [0]),
        (SEED.each(), [[0], [2, 1]], [[], [-1], [0, 0]]),
    ],
)
def test_what_holds(rule: Rule, good: list, bad: list) -> None:
    assert all(map(rule.holds, good))
    assert not any(map(rule.holds, bad))


def test_all_broken_rules_are_told_by_their_keys() -> None:
    settings = SimpleNamespace(rank=-1, dropout=2.0, seed=1)
    with pytest.raises(UserError) as caught:
        check(settings, "prior.lora", {"rank": at_least(0), "dropout": DROPOUT, "seed": SEED})
    assert [problem.given for problem in caught.value.problems] == ["prior.lora.rank=-1", "prior.lora.dropout=2.0"]
    assert "set prior.lora.rank to a whole number, at least 0" in str(caught.value)


def test_collected_errors_are_collected_flat() -> None:
    errors = [UserError(given, expected="another", action="correct it") for given in "abc"]
    both = UserError.collect([UserError.collect(errors[:2]), errors[2]])
    assert [problem.given for problem in both.problems] == ["a", "b", "c"]
    assert all(f"[{n}] given: {given}" in str(both) for n, given in enumerate("abc", 1))
