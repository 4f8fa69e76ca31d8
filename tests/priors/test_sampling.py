"""Lists drawn without replacement, against the probabilities of all ordered lists."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.stats import chisquare, kstest

from models.prior_reward import list_log_prob
from priors.config import DecodeConfig
from priors.sampling import TreeSampler, conditional_gumbel
from tests.priors.test_decode import codes_of, worlds
from tests.priors.worlds import World, brute_force, world


def sampler(w: World) -> TreeSampler:
    return TreeSampler(w.model, w.base, w.calibration, DecodeConfig())


@pytest.mark.parametrize(("n", "length"), [(5, 2), (4, 4), (6, 3)])
def test_lists_are_as_frequent_as_plackett_and_luce_say(n: int, length: int) -> None:
    w = world(codes_of(n, (2, 3, 2), seed=n), (2, 3, 2), seed=n, lengths=(5, 3))
    truth_BA = torch.from_numpy(brute_force(w))
    draws = 4000
    torch.manual_seed(0)
    lists_BGK = sampler(w).sample(*w.asked, lists=draws, length=length)
    every = list(permutations(range(n), length))
    for truth_A, lists_GK in zip(truth_BA, lists_BGK, strict=True):
        expected = list_log_prob(truth_A[torch.tensor(every)]).exp().numpy()
        assert expected.sum() == pytest.approx(1.0, abs=1e-5)
        number = {one: index for index, one in enumerate(every)}
        seen = np.bincount([number[tuple(one)] for one in lists_GK.tolist()], minlength=len(every))
        common = expected * draws >= 5
        seen, expected = (np.append(x[common], x[~common].sum()) for x in (seen, expected))
        kept = expected > 0
        expected = expected[kept] / expected[kept].sum()
        assert chisquare(seen[kept], expected * draws).pvalue > 1e-3


@given(worlds())
@settings(max_examples=20, deadline=None)
def test_a_list_is_full_and_names_nobody_twice(w: World) -> None:
    lists_BGK = sampler(w).sample(*w.asked, lists=3, length=7)
    assert lists_BGK.shape == (len(w.prompts), 3, min(7, w.n_advertisers))
    for lists_K in lists_BGK.reshape(-1, lists_BGK.shape[-1]):
        assert len(set(lists_K)) == len(lists_K)
        assert 0 <= lists_K.min() <= lists_K.max() < w.n_advertisers


def test_the_same_random_state_draws_the_same_lists() -> None:
    w = world(codes_of(30, (4, 4, 4)), (4, 4, 4))
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(sampler(w).sample(*w.asked, lists=4, length=10))
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_children_of_a_gumbel_variable_have_it_as_their_largest() -> None:
    """And where it is a Gumbel variable of their sum, each of them is one of its own location."""
    torch.manual_seed(0)
    n = 3000
    log_prob = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64).log()
    item = torch.arange(n).repeat_interleave(3)
    largest = -torch.empty(n, dtype=torch.float64).exponential_().log()
    found = conditional_gumbel(log_prob.repeat(n), item, largest).view(n, 3)
    torch.testing.assert_close(found.max(1).values, largest)
    for child, location in enumerate(log_prob.tolist()):
        assert kstest(found[:, child].numpy(), "gumbel_r", args=(location, 1)).pvalue > 1e-3
