"""The reward of a list, its probability, and the gradient that raises it."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from models.prior_reward import group_advantages, list_log_prob, position_rewards


def test_places_are_paid_as_the_paper_says() -> None:
    """0.1 (20 - i) + 2 [i <= 4] of arXiv 2605.27856, i counted from 0."""
    paid = position_rewards(21).tolist()
    expected = {0: 4.0, 4: 3.6, 5: 1.5, 19: 0.1, 20: 0.0}
    assert {place: pytest.approx(paid[place]) for place in expected} == expected


@pytest.mark.parametrize("length", [1, 2, 4])
def test_probabilities_of_all_ordered_lists_sum_to_one(length: int) -> None:
    log_prob = torch.tensor([0.7, 0.2, 0.06, 0.04], dtype=torch.float64).log()
    every = torch.tensor(list(permutations(range(4), length)))
    assert float(list_log_prob(log_prob[every]).exp().sum()) == pytest.approx(1.0)


def test_a_list_after_all_mass_is_drawn_has_a_number() -> None:
    """Float32 logarithms of a forecast that is all but certain: what is left is rounding."""
    log_prob = torch.tensor([0.0, -20.0, -21.0], requires_grad=True)
    value = list_log_prob(log_prob)
    value.backward()
    assert value.isfinite()
    assert log_prob.grad is not None
    assert log_prob.grad.isfinite().all()


def test_the_policy_gradient_is_that_of_the_expected_reward() -> None:
    """Against finite differences of the reward expected over all ordered lists."""
    every = torch.tensor(list(permutations(range(5), 3)))
    wanted = torch.tensor([0, 1, 0, 0, 1], dtype=torch.float64)
    reward = (wanted[every] * position_rewards(3)).sum(-1)
    logits = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def expected(values: torch.Tensor) -> torch.Tensor:
        return (list_log_prob(values.log_softmax(0)[every]).exp() * reward).sum()

    log_prob = list_log_prob(logits.log_softmax(0)[every])
    (log_prob.exp().detach() * (reward - reward.mean()) * log_prob).sum().backward()
    step = 1e-5
    differences = [
        (expected(logits.detach() + step * unit) - expected(logits.detach() - step * unit)) / (2 * step)
        for unit in torch.eye(5, dtype=torch.float64)
    ]
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), torch.stack(differences).numpy(), atol=1e-8)


def test_advantages_are_of_a_group_and_none_where_all_earn_the_same() -> None:
    advantage = group_advantages(torch.tensor([[1.0, 2.0, 3.0, 2.0], [0.3, 0.3, 0.3, 0.3]], dtype=torch.float64))
    np.testing.assert_allclose(advantage[0].numpy(), [-1.2246, 0, 1.2246, 0], atol=1e-3)
    np.testing.assert_allclose(advantage[1].numpy(), 0, atol=1e-9)
