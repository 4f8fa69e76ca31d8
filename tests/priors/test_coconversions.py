from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.log import Log
from priors.anchor import Anchor, AnchorConstants, Counts
from priors.coconversions import REVERSE, CoConversions
from priors.config import AUTO_ANCHORS, AnchorConfig
from priors.constants import choose_constants
from tests.logs import tiny_log

DECAY, SHRINKAGE = 0.8, 3.0


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
    pairs_AA = pairs_AA + REVERSE * pairs_AA.T
    np.fill_diagonal(pairs_AA, 0.0)
    return history(log, user, period) @ (pairs_AA / (pairs_AA.sum(1, keepdims=True) + SHRINKAGE))


def test_mass_follows_the_formula(log: Log) -> None:
    users, periods = np.array([0, 3, 7, 3]), np.array([4, 8, 8, 5])
    mass_BA = CoConversions(Counts.of(log), decay=DECAY).mass(users, periods, shrinkage=SHRINKAGE)
    expected = [by_hand(log, user, period) for user, period in zip(users, periods, strict=True)]
    np.testing.assert_allclose(mass_BA, expected, atol=1e-12)
    assert (mass_BA.sum(1) < 1).all()


def test_what_was_seldom_seen_says_less(log: Log) -> None:
    """The more a pair must have been seen, and the fewer pairs were, the more is popularity's."""
    co, users = CoConversions(Counts.of(log), decay=DECAY), np.arange(20)
    little, much = (co.mass(users, np.full(20, 8), shrinkage=kappa).sum(1) for kappa in (100.0, 1.0))
    assert (little[little > 0] < much[little > 0]).all()
    assert co.mass(users, np.full(20, 3), shrinkage=10.0).sum() < co.mass(users, np.full(20, 8), shrinkage=10.0).sum()


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
    all_BA = CoConversions(counts, decay=DECAY).mass(users, periods, shrinkage=SHRINKAGE)
    few_BA = few.mass(users, periods, shrinkage=SHRINKAGE)
    assert (few_BA > 0).sum() < (all_BA > 0).sum()
    assert (few_BA <= all_BA).all()


def test_nothing_is_known_in_the_first_period(log: Log) -> None:
    mass_BA = CoConversions(Counts.of(log), decay=DECAY).mass(np.arange(5), np.full(5, 1), shrinkage=SHRINKAGE)
    assert not mass_BA.any()
    constants = AnchorConstants(0.3, 0.9, 0.9, 0.5, co_weight=0.4)
    anchor = Anchor(Counts.of(log), constants)
    first = np.full(5, 1)
    np.testing.assert_allclose(anchor.probabilities(np.arange(5), first), anchor.popularity(first))


@pytest.mark.parametrize("kind", ["popularity", "popularity+history", "popularity+history+cooccurrence"])
def test_weights_are_the_best_of_the_grid(log: Log, kind: str) -> None:
    targets, counts = log.advertiser_targets("prior_select"), Counts.of(log)
    grid = AnchorConfig(
        kind=kind, own_weight=[0.2, 0.6], co_weight=[0.1, 0.3, 0.5], own_decay=[0.9], own_shrinkage=[0.0],
        popularity_decay=[0.9], smoothing=[0.1, 1.0], co_decay=[0.6, 0.9], co_shrinkage=[1.0, 10.0],
    )  # fmt: skip
    found = choose_constants(counts, targets, grid)
    chosen = found.constants
    q = Anchor(counts, chosen).probabilities(targets.user, targets.period)
    nll = -np.bincount(targets.row, np.log(q[targets.row, targets.item])) / np.diff(targets.ptr)
    last = {"popularity": 2, "popularity+history": 2, "popularity+history+cooccurrence": 4 * 5}[kind]
    assert nll.mean() == pytest.approx(min(trial["nll"] for trial in found.trials[-last:]))
    assert (chosen.own_weight > 0) == ("history" in kind)
    assert (chosen.co_weight > 0) == ("cooccurrence" in kind)


def relabelled(log: Log, *, chained: bool) -> Log:
    """Each user goes through the advertisers in turn, or buys from one of them for good."""
    events, n = log.events, len(log.advertiser_ids)
    steps = events.period if chained else 0
    advertiser = (events.user.astype(np.int64) * 7 + steps) % n
    known = np.where(events.advertiser >= 0, advertiser, -1).astype(events.advertiser.dtype)
    return replace(log, events=replace(events, advertiser=known))


@pytest.mark.parametrize(
    ("chained", "kind"), [(True, "popularity+history+cooccurrence"), (False, "popularity+history")]
)
def test_auto_counts_co_conversions_where_they_tell_more_than_own_purchases(log: Log, chained: bool, kind: str) -> None:
    log = relabelled(log, chained=chained)
    targets, counts = log.advertiser_targets("prior_select"), Counts.of(log)
    auto = choose_constants(counts, targets, AnchorConfig())
    named = {kind: choose_constants(counts, targets, AnchorConfig(kind=kind)) for kind in AUTO_ANCHORS}
    assert auto.kind == kind
    assert auto.constants == named[kind].constants
    assert len(auto.trials) == sum(len(one.trials) for one in named.values())
    assert auto.gain is not None
    assert (auto.gain.high < 0) == chained
    without, with_co = (named[kind].nll_R.mean() for kind in AUTO_ANCHORS)
    assert auto.gain.value == pytest.approx(with_co - without)
    assert all(one.gain is None for one in named.values())


def test_a_gain_that_is_not_certain_is_not_taken(log: Log) -> None:
    """Here co-conversions have the lower NLL on a few rows, and their interval includes zero."""
    targets, counts = log.advertiser_targets("prior_select"), Counts.of(log)
    chosen = choose_constants(counts, targets, AnchorConfig())
    assert chosen.gain is not None
    assert chosen.gain.value < 0 < chosen.gain.high
    assert chosen.kind == "popularity+history"
    assert not chosen.constants.co_weight
