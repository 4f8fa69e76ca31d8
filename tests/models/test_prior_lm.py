"""The head of the prior LM: zero before training, and free rows where a codebook says nothing."""

from __future__ import annotations

import pytest
import torch

from models.prior_lm import IdHead, PriorLM

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


@pytest.mark.parametrize("kind", ["tied", "free", "tied+free"])
def test_a_level_is_a_linear_layer_of_the_hidden_state(kind: str) -> None:
    head = IdHead(books(extra=3), HIDDEN, kind)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    head.standardise_by([torch.randn(20, HIDDEN) * 3 + 5 for _ in range(3)])
    hidden = torch.randn(5, HIDDEN)
    for level in range(3):
        rows, bias = head.affine(level)
        torch.testing.assert_close(hidden @ rows.T + bias, head(hidden, level), atol=1e-4, rtol=1e-4)


def test_input_rows_that_do_not_fit_are_told() -> None:
    decoder = torch.nn.Module()
    decoder.get_input_embeddings = lambda: torch.nn.Embedding(7, HIDDEN)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"\(10, 5\) input rows of ID tokens; codes and decoder ask \(10, 12\)"):
        PriorLM(decoder, codebooks=books(), id_rows=torch.zeros(10, 5), first_id_token=7)
