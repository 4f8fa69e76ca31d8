from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.errors import UserError
from data.log import Log
from priors.anchor import Anchor, AnchorConstants, Counts, TunedAnchor, path_log_probs
from priors.config import AnchorConfig
from priors.constants import choose_constants
from semantic_ids.trie import Trie
from tests.logs import tiny_log
from tests.priors.conftest import random_ids

CONSTANTS = AnchorConstants(own_weight=0.6, own_decay=0.9, popularity_decay=0.8, smoothing=0.5)
SHRUNK = replace(CONSTANTS, own_shrinkage=3.0)
ONCE = replace(CONSTANTS, repeat_factor=0.1)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("anchor"))


def by_hand(log: Log, user: int, period: int, c: AnchorConstants) -> np.ndarray:
    """The formula of the module, event by event."""
    n, events = len(log.advertiser_ids), log.events
    popularity, own = np.full(n, c.smoothing), np.zeros(n)
    promoted, bought = np.zeros(n), np.zeros(n)
    for i in range(len(events)):
        a, ago = events.advertiser[i], period - events.period[i]
        if a < 0 or ago <= 0:
            continue
        if log.is_label[i]:
            popularity[a] += c.popularity_decay**ago
            promoted[a] += 1
        if log.is_purchase[i]:
            bought[a] += 1
            own[a] += c.own_decay**ago if events.user[i] == user else 0.0
    floor = 0.5 / promoted.sum()
    g = np.sqrt(np.maximum((promoted / promoted.sum()) / (bought / bought.sum()), floor))
    weight = c.own_weight * own.sum() / max(own.sum() + c.own_shrinkage, 1e-9)
    again = np.where(own > 0, c.repeat_factor, 1.0)
    own *= g
    popularity /= popularity.sum()
    q = again * (popularity if own.sum() == 0 else weight * own / own.sum() + (1 - weight) * popularity)
    return q / q.sum()


@pytest.mark.parametrize("constants", [CONSTANTS, SHRUNK, ONCE])
def test_probabilities_follow_the_formula(log: Log, constants: AnchorConstants) -> None:
    anchor = Anchor(Counts.of(log), constants)
    users, periods = np.array([0, 3, 7]), np.array([4, 8, 8])
    expected = [by_hand(log, user, period, constants) for user, period in zip(users, periods, strict=True)]
    np.testing.assert_allclose(anchor.probabilities(users, periods), expected, rtol=1e-9)


def test_a_user_without_history_gets_popularity(log: Log) -> None:
    anchor = Anchor(Counts.of(log), SHRUNK)
    first = np.array([1])
    np.testing.assert_allclose(anchor.probabilities(np.array([0]), first), anchor.popularity(first))
    np.testing.assert_allclose(anchor.popularity(first), 1 / len(log.advertiser_ids))


def test_counts_end_before_the_period(log: Log) -> None:
    """Events of period 6 and after change nothing of what is said at the start of period 6."""
    period = 6
    early = replace(log, events=log.events.select(log.events.period < period))
    users, when = np.arange(len(log.user_ids)), np.full(len(log.user_ids), period)
    whole = Anchor(Counts.of(log), CONSTANTS).probabilities(users, when)
    np.testing.assert_array_equal(Anchor(Counts.of(early), CONSTANTS).probabilities(users, when), whole)


def test_the_weight_of_promotion_is_what_was_promoted_over_what_was_bought(log: Log) -> None:
    anchor, n = Anchor(Counts.of(log), CONSTANTS), len(log.advertiser_ids)
    for period in (0, 1, 2, 7, 12, 99):
        before = (log.events.period < period) & (log.events.advertiser >= 0)
        promoted, bought = (
            np.bincount(log.events.advertiser[before & mask], minlength=n) for mask in (log.is_label, log.is_purchase)
        )
        expected = np.ones(n)
        for a in np.flatnonzero(bought):
            ratio = promoted[a] / promoted.sum() / (bought[a] / bought.sum())
            expected[a] = np.sqrt(max(ratio, 0.5 / promoted.sum()))
        np.testing.assert_allclose(anchor.promotion(np.array([period]))[0], expected, rtol=1e-12)


def test_little_history_is_trusted_little(log: Log) -> None:
    """What a purchase of today says of a user falls with ν, and the more so the fewer there are."""
    counts, period = Counts.of(log), 8
    users, when = np.arange(len(log.user_ids)), np.full(len(log.user_ids), period)
    bought = np.bincount(counts.history(users, when)[0], minlength=len(users))
    light, heavy = np.argsort(bought)[[0, -1]]
    share = {
        nu: Anchor(counts, replace(CONSTANTS, own_decay=1.0, own_shrinkage=nu)).own(users, when).sum(1)
        for nu in (0.0, 3.0)
    }
    np.testing.assert_allclose(share[0.0][bought > 0], 1.0)
    assert 0 < share[3.0][light] < share[3.0][heavy] < 1


def test_untuned_scores_are_the_conditionals_of_q_and_sum_to_one(log: Log) -> None:
    ids = random_ids(log)
    trie = Trie.from_codes(ids.codes_AL, ids.level_sizes)
    anchor = Anchor(Counts.of(log), CONSTANTS)
    untuned = TunedAnchor.untuned(anchor, trie)
    users, periods = np.arange(10), np.full(10, 7)
    q = anchor.probabilities(users, periods)
    np.testing.assert_allclose(np.exp(untuned.log_probs(users, periods)), q, rtol=1e-6)
    tuned = replace(untuned, exponent_L=np.array([0.7, 1.3, 0.9]), bias_LV=[np.linspace(0, 0.9, 4)] * 3)
    np.testing.assert_allclose(np.exp(tuned.log_probs(users, periods)).sum(1), 1.0, rtol=1e-9)
    assert np.abs(np.exp(tuned.log_probs(users, periods)) - q).max() > 1e-3
    prefixes = path_log_probs(trie, tuned.child_scores(users, periods))
    np.testing.assert_allclose(np.exp(prefixes[0]), trie.node_mass(np.exp(tuned.log_probs(users, periods)), 1))


@pytest.mark.parametrize("kind", ["popularity", "popularity+history", "popularity+history+cooccurrence"])
def test_no_term_has_better_constants_beside_the_others(log: Log, kind: str) -> None:
    targets, counts = log.advertiser_targets("prior_select"), Counts.of(log)
    terms: dict[str, dict[str, list[float]]] = {
        "popularity": {"popularity_decay": [0.6, 0.9, 1.0], "smoothing": [0.1, 1.0, 5.0], "plan_exponent": [0.0, 0.7]},
        "history": {"own_weight": [0.2, 0.6], "own_decay": [0.7, 1.0], "own_shrinkage": [0.0, 5.0]},
        "cooccurrence": {"co_weight": [0.1, 0.3], "co_decay": [0.6, 0.9], "co_shrinkage": [1.0, 10.0]},
        "history again": {"repeat_factor": [0.3, 1.0, 2.0]},
    }
    terms = {name: values for name, values in terms.items() if name.split()[0] in kind}
    grid: dict[str, Any] = {name: values for term in terms.values() for name, values in term.items()}
    found = choose_constants(counts, targets, AnchorConfig(kind=kind, **grid))
    chosen = found.constants

    def nll(constants: AnchorConstants) -> float:
        q = Anchor(counts, constants).probabilities(targets.user, targets.period)
        by_row = np.bincount(targets.row, -np.log(q[targets.row, targets.item])) / np.diff(targets.ptr)
        return float(by_row.mean())

    popularity = choose_constants(counts, targets, AnchorConfig(kind="popularity", **grid)).constants
    alone = Anchor(counts, chosen).popularity_alone().constants
    for name in ("popularity_decay", "smoothing", "plan_exponent"):
        assert getattr(alone, name) == getattr(popularity, name)
    assert chosen.alone_plan_exponent == popularity.plan_exponent
    assert (alone.own_weight, alone.co_weight, alone.repeat_factor) == (0, 0, 1)
    lowest = nll(chosen)
    assert lowest == pytest.approx(min(trial["nll"] for trial in found.trials))
    for values in terms.values():
        for other in product(*values.values()):
            assert nll(replace(chosen, **dict(zip(values, other, strict=True)))) >= lowest - 1e-9


@pytest.mark.parametrize(("told", "expected"), [(None, 0.7), (0.0, 0.0), (1.5, 1.5)])
def test_popularity_alone_has_a_plan_exponent_of_its_own(log: Log, told: float | None, expected: float) -> None:
    """An artifact from before it was kept has the anchor's, as it had then, and the same plain form."""
    ids = random_ids(log)
    trie, counts = Trie.from_codes(ids.codes_AL, ids.level_sizes), Counts.of(log)
    constants = replace(CONSTANTS, plan_exponent=0.7, alone_plan_exponent=told)
    plain = TunedAnchor.untuned(Anchor(counts, constants), trie).to_plain()
    assert ("alone_plan_exponent" in plain["constants"]) == (told is not None)
    again = TunedAnchor.from_plain(plain, counts, trie).anchor
    assert again.constants == constants
    alone, users, when = again.popularity_alone(), np.arange(5), np.full(5, 8)
    assert alone.constants.plan_exponent == expected
    assert counts.plan_PA is not None
    weighed = again.popularity(when) * np.exp(expected * counts.plan_PA[8])
    np.testing.assert_allclose(alone.probabilities(users, when), weighed / weighed.sum(1, keepdims=True), rtol=1e-9)


def test_plain_form_gives_the_same_anchor_back(log: Log, tmp_path: Path) -> None:
    ids = random_ids(log)
    trie, counts = Trie.from_codes(ids.codes_AL, ids.level_sizes), Counts.of(log)
    for constants in (CONSTANTS, ONCE):
        tuned = TunedAnchor(
            Anchor(counts, constants), trie, np.array([0.5, 1.0, 2.0]), [np.ones(4), np.zeros(4), np.ones(4)]
        )
        # A constant of later stays out where it says nothing, so that forecasts of before keep their version.
        assert ("repeat_factor" in tuned.to_plain()["constants"]) == (constants is ONCE)
        again = TunedAnchor.from_plain(tuned.to_plain(), counts, trie)
        users, periods = np.arange(5), np.full(5, 5)
        np.testing.assert_array_equal(again.log_probs(users, periods), tuned.log_probs(users, periods))


def test_without_an_anchor_every_legal_child_is_as_likely(log: Log) -> None:
    ids = random_ids(log)
    trie = Trie.from_codes(ids.codes_AL, ids.level_sizes)
    uniform = TunedAnchor.uniform(Anchor(Counts.of(log), CONSTANTS), trie)
    probability_BA = np.exp(uniform.log_probs(np.arange(5), np.full(5, 7)))
    expected = np.ones(len(ids))
    for advertiser, path in enumerate(trie.path_AL):
        for depth, node in enumerate([0, *path[:-1]]):
            expected[advertiser] /= np.diff(trie.child_ptr[depth])[node]
    np.testing.assert_allclose(probability_BA, np.broadcast_to(expected, probability_BA.shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "everything"}, "prior.anchor.kind=everything"),
        ({"co_weight": []}, r"prior\.anchor\.co_weight=\[\]"),
        ({"own_weight": [0.7], "co_weight": [0.3, 0.5]}, "leaves popularity a weight"),
        ({"smoothing": [0.0, 1.0]}, r"(?s)prior\.anchor\.smoothing=\[0\.0, 1\.0\].*above 0"),
        ({"own_decay": [1.5]}, r"(?s)prior\.anchor\.own_decay=\[1\.5\].*at most 1"),
        ({"own_shrinkage": [-1.0]}, r"(?s)prior\.anchor\.own_shrinkage=\[-1\.0\].*at least 0"),
        ({"co_shrinkage": [-1.0]}, r"(?s)prior\.anchor\.co_shrinkage=\[-1\.0\].*at least 0"),
        ({"repeat_factor": [0.0]}, r"(?s)prior\.anchor\.repeat_factor=\[0\.0\].*buying again possible"),
        ({"select_rows": 0}, r"prior\.anchor\.select_rows=0"),
    ],
)
def test_a_bad_grid_is_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AnchorConfig(**changes)
