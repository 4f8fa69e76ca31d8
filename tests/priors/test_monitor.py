"""The monitor on forecasts whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from data.errors import LineageError
from data.log import Targets
from priors.monitor import drift
from priors.table import PriorTable, trie_version
from semantic_ids.trie import Trie

N_USERS, N_ADVERTISERS = 800, 64
TRIE = Trie.from_codes(np.stack(np.unravel_index(np.arange(N_ADVERTISERS), (4, 4, 4)), axis=1), (4, 4, 4))


def forecasts(prob_UA: np.ndarray, top_k: int = 10) -> PriorTable:
    """A table of distributions over all advertisers, as of period 1."""
    order = np.argsort(-prob_UA, axis=1)[:, :top_k]
    log_prob = np.log(np.take_along_axis(prob_UA, order, 1))
    one = np.ones(len(prob_UA), np.int64)
    none = np.zeros((len(prob_UA), 1), np.int64)
    level1, nothing = np.log(TRIE.node_mass(prob_UA, 1)), np.full((len(prob_UA), 1), -np.inf)
    return PriorTable(
        np.arange(len(prob_UA)), one, one, order, log_prob, level1, none, none, nothing, trie_version(TRIE),
    )  # fmt: skip


def happened(prob_UA: np.ndarray, rng: np.random.Generator, period: int = 1, n_targets: int = 2) -> Targets:
    items = np.concatenate([np.sort(rng.choice(N_ADVERTISERS, n_targets, replace=False, p=p)) for p in prob_UA])
    n = len(prob_UA)
    return Targets(
        np.arange(n, dtype=np.int32), np.full(n, period, np.int32), np.full(n, -1, np.int32),
        np.arange(n + 1) * n_targets, items.astype(np.int32), np.ones(n * n_targets, np.float32),
        np.zeros(n * n_targets, np.float32),
    )  # fmt: skip


def tastes(rng: np.random.Generator) -> np.ndarray:
    return rng.dirichlet(np.full(N_ADVERTISERS, 0.5), N_USERS)


@pytest.mark.parametrize("seed", range(5))
def test_what_happens_as_forecast_has_not_drifted(seed: int) -> None:
    rng = np.random.default_rng(seed)
    prob_UA = tastes(rng)
    (found,) = drift(forecasts(prob_UA), happened(prob_UA, rng, n_targets=1), TRIE)
    assert found.requests == N_USERS
    assert not found.drifted
    assert found.predicted == pytest.approx(found.observed, abs=0.06)


def test_a_kind_of_advertiser_that_wins_favour_is_named() -> None:
    rng = np.random.default_rng(0)
    prob_UA = tastes(rng)
    favoured_UA = prob_UA * np.where(TRIE.path_AL[:, 0] == 2, 1.6, 1.0)
    favoured_UA /= favoured_UA.sum(1, keepdims=True)
    before, after = happened(prob_UA, rng, n_targets=1), happened(favoured_UA, rng, period=2, n_targets=1)
    both = {name: np.concatenate([value, getattr(after, name)]) for name, value in vars(before).items()}
    both["ptr"] = np.concatenate([before.ptr, after.ptr[1:] + before.ptr[-1]])
    targets = Targets(**both)
    first, second = drift(forecasts(prob_UA), targets, TRIE)
    assert not first.drifted
    assert second.drifted
    assert second.code == 2
    assert second.code_observed > second.code_predicted


def test_lists_that_promise_too_much_are_noticed() -> None:
    rng = np.random.default_rng(0)
    prob_UA = tastes(rng)
    sharper_UA = prob_UA**1.5 / (prob_UA**1.5).sum(1, keepdims=True)
    (found,) = drift(forecasts(sharper_UA), happened(prob_UA, rng, n_targets=1), TRIE)
    assert found.drifted
    assert found.predicted > found.observed


def test_few_requests_tell_nothing_and_users_without_a_forecast_are_left_out() -> None:
    rng = np.random.default_rng(0)
    prob_UA = tastes(rng)
    targets = happened(prob_UA, rng).select(np.arange(20))
    (found,) = drift(forecasts(prob_UA**3 / (prob_UA**3).sum(1, keepdims=True)), targets, TRIE)
    assert (found.requests, found.drifted) == (20, False)
    (found,) = drift(forecasts(prob_UA[:5]), targets, TRIE)
    assert found.requests == 5
    (found,) = drift(forecasts(prob_UA[:1]), targets, TRIE)
    assert found.z == 0.0
    assert drift(forecasts(prob_UA[:0]), targets, TRIE) == []


def test_another_trie_is_refused() -> None:
    other = Trie.from_codes(np.arange(N_ADVERTISERS)[:, None], (N_ADVERTISERS,))
    rng = np.random.default_rng(0)
    with pytest.raises(LineageError):
        drift(forecasts(tastes(rng)), happened(tastes(rng), rng), other)
