"""Fits inside the softmax: exponents, biases and temperatures that keep a forecast a distribution.

    log P(child | prefix) = log_softmax over siblings of ( τ_l · LM logit + α_l · base + b_l[code] )

The tuned anchor (no LM) fits b on the user-periods of the LM's own training prompts and α on the selection span. The
trained LM is calibrated on prompts of the same selection span, and so is, once more, the anchor alone: else an LM that
learned nothing would differ from it by that last fit.

Shapes: N decisions of one level, V codes of that level, Y targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.prior_lm import Targeted, row_nll, target_log_prob, weighted_log_softmax
from priors.anchor import TunedAnchor

WEIGHT_DEVIATION, EXPONENT_DEVIATION = 1.0, 0.05
"""Standard deviations of the normal priors around 1 of τ and α: how far they go on the word of few prompts."""


@dataclass(frozen=True)
class Calibration:
    """Weights of the two parts of a score, a level.

    Attributes:
        lm_weight: τ, the inverse temperature of the LM's logits.
        base_exponent: α, the exponent of the base.
    """

    lm_weight: tuple[float, ...]
    base_exponent: tuple[float, ...]

    @classmethod
    def identity(cls, n_levels: int) -> Calibration:
        """Logits and base as they are."""
        return cls((1.0,) * n_levels, (1.0,) * n_levels)

    def over(self, exponent_L: Sequence[float]) -> Calibration:
        """The same forecast over a base that was itself raised to exponents (`priors.anchor.TunedAnchor.raised`)."""
        exponents = zip(self.base_exponent, exponent_L, strict=True)
        return Calibration(self.lm_weight, tuple(alpha / raised for alpha, raised in exponents))

    @classmethod
    def from_plain(cls, plain: dict[str, list[float]]) -> Calibration:
        """Back from :func:`~data.artifacts.to_plain`."""
        return cls(**{name: tuple(values) for name, values in plain.items()})


def calibrated_nll(
    batches: Sequence[Targeted],
    lm_logits: Sequence[list[Tensor]] | None,
    lm_weight_L: Tensor,
    base_exponent_L: Tensor,
    bias_LV: Sequence[Tensor] | None = None,
) -> Tensor:
    """NLL of every prompt under given weights, one after the other, ``(prompts,)``.

    Args:
        batches: decisions with base scores.
        lm_logits: the head's scores at the decisions, ``(N, V)`` a level; None: without the LM.
        lm_weight_L: τ.
        base_exponent_L: α.
        bias_LV: b.
    """
    log_probs = calibrated_log_prob(batches, lm_logits, lm_weight_L, base_exponent_L, bias_LV)
    return torch.cat([row_nll(batch, log_prob_Y) for batch, log_prob_Y in zip(batches, log_probs, strict=True)])


def calibrated_log_prob(
    batches: Sequence[Targeted],
    lm_logits: Sequence[list[Tensor]] | None,
    lm_weight_L: Tensor,
    base_exponent_L: Tensor,
    bias_LV: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Log-probability of every target, ``(Y,)`` a batch; arguments as of :func:`calibrated_nll`."""
    found = []
    for number, batch in enumerate(batches):
        log_probs = [
            weighted_log_softmax(
                decisions.base_NV,
                base_exponent_L[level],
                logit_NV=None if lm_logits is None else lm_logits[number][level],
                lm_weight=lm_weight_L[level],
                bias_V=None if bias_LV is None else bias_LV[level],
            )
            for level, decisions in enumerate(batch.levels)
        ]
        found.append(target_log_prob(batch, log_probs))
    return found


def fit_calibration(batches: Sequence[Targeted], lm_logits: Sequence[list[Tensor]]) -> Calibration:
    """τ and α of a trained LM, on prompts it has not learned from.

    Both are drawn to 1, by priors whose weight falls with the number of prompts.

    Args:
        batches: prompts of the selection span.
        lm_logits: the head's scores at their decisions.

    Returns:
        Weights; τ is not below 0.
    """
    n_levels = len(batches[0].levels)
    n_prompts = sum(batch.n_prompts for batch in batches)
    weight = torch.ones(n_levels, requires_grad=True)
    exponent = torch.ones(n_levels, requires_grad=True)

    def loss() -> Tensor:
        nll = calibrated_nll(batches, lm_logits, weight, exponent).mean()
        return nll + _prior(weight, WEIGHT_DEVIATION, n_prompts) + _prior(exponent, EXPONENT_DEVIATION, n_prompts)

    _minimise(loss, [weight, exponent])
    if (weight < 0).any():
        # An LM that points the wrong way at a level is left out there, and the exponents fitted again.
        fixed = weight.detach().clamp_min(0.0)

        def loss_without() -> Tensor:
            nll = calibrated_nll(batches, lm_logits, fixed, exponent).mean()
            return nll + _prior(exponent, EXPONENT_DEVIATION, n_prompts)

        _minimise(loss_without, [exponent])
        return Calibration(tuple(fixed.tolist()), tuple(exponent.detach().tolist()))
    return Calibration(tuple(weight.detach().tolist()), tuple(exponent.detach().tolist()))


def calibrate(
    base: TunedAnchor, batches: Sequence[Targeted], lm_logits: Sequence[list[Tensor]]
) -> tuple[TunedAnchor, Calibration, tuple[float, ...]]:
    """The last fit of a base alone and of the LM over it, on the same prompts, so that their difference is the LM's.

    Args:
        base: whose scores the decisions have.
        batches, lm_logits: as of :func:`fit_calibration`.

    Returns:
        The base raised to its exponents, the weights of the LM over it, and those exponents.
    """
    alone_L = fit_exponents(batches)
    return base.raised(alone_L), fit_calibration(batches, lm_logits).over(alone_L), alone_L


def fit_exponents(batches: Sequence[Targeted], bias_LV: Sequence[Tensor] | None = None) -> tuple[float, ...]:
    """α of the base alone: what :func:`fit_calibration` is without an LM.

    Args:
        batches: prompts of the selection span.
        bias_LV: b.
    """
    n_levels, n_prompts = len(batches[0].levels), sum(batch.n_prompts for batch in batches)
    zeros, exponent = torch.zeros(n_levels), torch.ones(n_levels, requires_grad=True)

    def loss() -> Tensor:
        nll = calibrated_nll(batches, None, zeros, exponent, bias_LV).mean()
        return nll + _prior(exponent, EXPONENT_DEVIATION, n_prompts)

    _minimise(loss, [exponent])
    return tuple(exponent.detach().tolist())


def fit_anchor_levels(
    train: Sequence[Targeted], select: Sequence[Targeted], penalties: Sequence[float]
) -> tuple[np.ndarray, list[np.ndarray], list[dict[str, float]]]:
    """α and b of the tuned anchor.

    Biases are fitted on the training prompts, their penalty is chosen on the selection span, and there the
    exponents are fitted too, as the trained LM's are.

    Args:
        train: the LM's training prompts with their untuned base.
        select: prompts of the selection span.
        penalties: values of the L2 penalty on the biases to choose from.

    Returns:
        Exponents ``(L,)``, biases ``(V_l,)`` a level, and the trials. Where no penalty beats no bias at all on
        the selection span, the biases are zeros.
    """
    sizes = [decisions.base_NV.shape[1] for decisions in train[0].levels]
    zero, ones = torch.zeros(len(sizes)), torch.ones(len(sizes))
    best = [torch.zeros(size) for size in sizes]
    best_nll = float(calibrated_nll(select, None, zero, ones).mean())
    trials: list[dict[str, Any]] = [{"penalty": None, "nll": best_nll}]
    for penalty in penalties:
        bias = [torch.zeros(size, requires_grad=True) for size in sizes]

        def loss(bias: list[Tensor] = bias, penalty: float = penalty) -> Tensor:
            squares = torch.stack([b.square().sum() for b in bias]).sum()
            return calibrated_nll(train, None, zero, ones, bias).mean() + penalty * squares

        _minimise(loss, bias)
        with torch.no_grad():
            nll = float(calibrated_nll(select, None, zero, ones, bias).mean())
        trials.append({"penalty": penalty, "nll": nll})
        if nll < best_nll:
            best_nll, best = nll, [b.detach() for b in bias]
    return np.array(fit_exponents(select, best)), [b.double().numpy() for b in best], trials


def _prior(values: Tensor, deviation: float, n_prompts: int) -> Tensor:
    """Negative logarithm of a normal prior around 1, on the scale of a mean over prompts."""
    return (values - 1).square().sum() / (2 * deviation**2 * n_prompts)


def _minimise(loss: Callable[[], Tensor], parameters: list[Tensor], steps: int = 60) -> None:
    optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
