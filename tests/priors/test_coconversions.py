from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.log import Log
from priors.anchor import Anchor, AnchorConstants, Counts, choose_constants
from priors.coconversions import SHRINKAGE, CoConversions
from priors.config import AnchorConfig
from tests.logs import tiny_log

DECAY = 0.8


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("coconversions"))


def history(log: Log, user: int, period: int) -> np.ndarray:
    share_A, events = np.zeros(len(log.advertiser_ids)), log.events
    for i in range(*log.history(user, period).indices(len(events))):
        if log.is_purchase[i] and events.advertiser[i] >= 0:
            share_A[events.advertiser[i]] += DECAY ** (period - events.period[i])
    return share_A / max(share_A.sum(), 1e-12)


def by_hand(log: Log, user: int, period: int) -> np.ndarray:
    """The formula, user-period by user-period."""
    n = len(log.advertiser_ids)
    pairs_AA, targets = np.zeros((n, n)), log.advertiser_targets((1, period - 1))
    for row in range(len(targets)):
        before_A = history(log, int(targets.user[row]), int(targets.period[row]))
        for a in targets.of(row):
            pairs_AA[:, a] += before_A / len(targets.of(row))
    np.fill_diagonal(pairs_AA, 0.0)
    share_AA = pairs_AA / (pairs_AA.sum(1, keepdims=True) + SHRINKAGE)
    mass_A = history(log, user, period) @ share_AA
    return mass_A / max(mass_A.sum(), 1e-12)


def test_shares_follow_the_formula(log: Log) -> None:
    users, periods = np.array([0, 3, 7, 3]), np.array([4, 8, 8, 5])
    shares_BA = CoConversions(Counts.of(log), decay=DECAY).shares(users, periods)
    expected = [by_hand(log, user, period) for user, period in zip(users, periods, strict=True)]
    np.testing.assert_allclose(shares_BA, expected, atol=1e-12)


def test_what_is_asked_for_is_not_known(log: Log) -> None:
    """Events of period 6 and after change nothing at the start of period 6, in all kinds of the anchor."""
    early = replace(log, events=log.events.select(log.events.period < 6))
    users, when = np.arange(len(log.user_ids)), np.full(len(log.user_ids), 6)
    constants = AnchorConstants(0.3, 0.9, 0.9, 0.5, co_weight=0.4)
    whole = Anchor(Counts.of(log), constants).probabilities(users, when)
    np.testing.assert_array_equal(Anchor(Counts.of(early), constants).probabilities(users, when), whole)
    np.testing.assert_allclose(whole.sum(1), 1.0)


def test_only_the_nearest_are_kept(log: Log) -> None:
    counts, users, periods = Counts.of(log), np.arange(20), np.full(20, 8)
    few = CoConversions(counts, decay=DECAY, neighbours=1)
    assert max(np.diff(few._neighbours_of(8).indptr)) == 1
    all_BA = CoConversions(counts, decay=DECAY).shares(users, periods)
    assert (few.shares(users, periods) > 0).sum() < (all_BA > 0).sum()


def test_nothing_is_known_in_the_first_period(log: Log) -> None:
    shares_BA = CoConversions(Counts.of(log), decay=DECAY).shares(np.arange(5), np.full(5, 1))
    assert not shares_BA.any()
    constants = AnchorConstants(0.3, 0.9, 0.9, 0.5, co_weight=0.4)
    anchor = Anchor(Counts.of(log), constants)
    first = np.full(5, 1)
    np.testing.assert_allclose(anchor.probabilities(np.arange(5), first), anchor.popularity(first))


@pytest.mark.parametrize("kind", ["popularity", "popularity+history", "popularity+history+cooccurrence"])
def test_weights_are_the_best_of_the_grid(log: Log, kind: str) -> None:
    targets, counts = log.advertiser_targets("prior_select"), Counts.of(log)
    grid = AnchorConfig(
        kind=kind, own_weight=[0.2, 0.6], co_weight=[0.1, 0.3, 0.5], own_decay=[0.9], popularity_decay=[0.9],
        smoothing=[0.1, 1.0],
    )  # fmt: skip
    chosen, trials = choose_constants(counts, targets, grid)
    q = Anchor(counts, chosen).probabilities(targets.user, targets.period)
    nll = -np.bincount(targets.row, np.log(q[targets.row, targets.item])) / np.diff(targets.ptr)
    last = {"popularity": 2, "popularity+history": 2, "popularity+history+cooccurrence": 5}[kind]
    assert nll.mean() == pytest.approx(min(trial["nll"] for trial in trials[-last:]))
    assert (chosen.own_weight > 0) == ("history" in kind)
    assert (chosen.co_weight > 0) == ("cooccurrence" in kind)
