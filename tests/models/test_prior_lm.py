"""The head of the prior LM: zero before training, and free rows where a codebook says nothing."""

from __future__ import annotations

import pytest
import torch

from models.prior_lm import IdHead

HIDDEN = 12


def books(*, extra: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 8), torch.randn(6, 8), *([torch.zeros(extra, 8)] if extra else [])]


@pytest.mark.parametrize("kind", ["tied", "free", "tied+free"])
@pytest.mark.parametrize("extra", [0, 3])
def test_scores_are_zero_before_training(kind: str, extra: int) -> None:
    head = IdHead(books(extra=extra), HIDDEN, kind)
    for level, codes in enumerate(books(extra=extra)):
        scores = head(torch.randn(5, HIDDEN), level)
        assert scores.shape == (5, len(codes))
        assert not scores.any()


@pytest.mark.parametrize("kind", ["tied", "free", "tied+free"])
def test_every_level_learns_an_extra_one_of_zero_vectors_too(kind: str) -> None:
    head = IdHead(books(extra=3), HIDDEN, kind)
    hidden = torch.randn(5, HIDDEN)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for level in range(3):
        optimizer.zero_grad()
        (-head(hidden, level).log_softmax(-1)[:, 0].mean()).backward()
        optimizer.step()
        assert (
            head(hidden, level).log_softmax(-1)[:, 0].mean() > -torch.tensor(head(hidden, level).shape[1]).log()
        ).all()


def test_names_of_the_weights_stay_those_of_earlier_artifacts() -> None:
    """With an extra level its rows come in addition; without one, nothing changes."""
    constants = {"mean_LH", "scale_L"}

    def names(kind: str, extra: int) -> set[str]:
        state = IdHead(books(extra=extra), HIDDEN, kind).state_dict()
        return {name for name in state if not name.startswith("codes_")} - constants

    assert names("tied", 0) == {"projections.0", "projections.1"}
    assert names("free", 0) == {"rows.0", "rows.1"}
    assert names("tied+free", 0) == names("tied", 0) | names("free", 0)
    assert names("tied", 3) == names("tied", 0) | {"projections.2", "rows.2"}
