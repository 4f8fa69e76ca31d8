"""Brings a fitted forecaster up to date without training its LM.

    weeks after the fit, up to the step ─► weights, exponents and biases over the forecast as it is    recalibrate
    fit span moved up to the step ───────► constants, exponents and biases of the anchor,
                                           weights of the history vector, calibration                  refit

*Before* is the first period that is served with what is learned; nothing of it or later is read. Counts need no fit:
they end at the as-of time of each forecast, as ever.

Both are of the forecast by anchor and history (`priors.judge.HISTORY_ALONE`), which no prompt is read for.

Shapes: B user-periods, A advertisers, L levels, V codes of a level.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, tensor

from data.log import Log, Targets
from data.split import Span
from models.prior_lm import TreeBatch, weighted_log_softmax
from priors.anchor import path_log_probs
from priors.artifact import PriorModel
from priors.calibration import Calibration, calibrate, fit_anchor_levels, fit_calibration
from priors.config import PriorConfig
from priors.dataset import PromptDataset
from priors.evaluate import constant_scores, head_logits
from priors.fit import batches, fit_anchor, sample_rows, selection_rows
from priors.history import fit_history, forget_history
from priors.prompt import Wordless

Float = NDArray[np.float64]
_AT_ONCE = 256


@dataclass(frozen=True)
class Recalibrated:
    """A forecast by anchor and history, calibrated once more.

    Attributes:
        prior: the forecaster, with the weights of its two parts fitted anew.
        exponent_L: of its probabilities, a level.
        bias_LV: added to the score of each code, a level.
    """

    prior: PriorModel
    exponent_L: Float
    bias_LV: Sequence[Float]

    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> Float:
        """Log-probabilities of all advertisers at the start of each period, ``(B, A)``."""
        trie = self.prior.base.trie
        scores = [
            self.exponent_L[level] * score_BN + self.bias_LV[level][trie.child_code[level]]
            for level, score_BN in enumerate(constant_scores(self.prior, user_B, period_B, own_history=True))
        ]
        return path_log_probs(trie, scores)[-1][:, trie.advertiser_leaf]


def recalibrate(prior: PriorModel, log: Log, *, before: int) -> Recalibrated:
    """Fit the calibration on all user-periods from the selection span on, which no weight was learned from.

    The weights of anchor and history are fitted on all of them. Then the biases are, on all but the last period that
    has any, which chooses their penalty and gives the exponents.

    Args:
        prior: with history vectors.
        log: the events.
        before: see above.
    """
    targets = log.advertiser_targets((log.split.prior_select[0], before - 1))
    newest = targets.period == targets.period.max()
    parts = [_tree_batches(prior, targets.select(rows)) for rows in (~newest, newest)]
    logits = [_logits(prior, part) for part in parts]
    calibration = fit_calibration([*parts[0], *parts[1]], [*logits[0], *logits[1]])
    fitted, chosen_by = (_scored(*part, calibration) for part in zip(parts, logits, strict=True))
    # Of a single period nothing is left to fit biases on.
    penalties = prior.cfg.anchor.bias_penalty if fitted else []
    exponent_L, bias_LV, _ = fit_anchor_levels(fitted or chosen_by, chosen_by, penalties)
    return Recalibrated(replace(prior, calibration=calibration), exponent_L, bias_LV)


def refit(prior: PriorModel, log: Log, *, before: int) -> PriorModel:
    """Fit anchor and history once more, as `priors.fit` does, with the fit span moved up; the LM stays as it is.

    Args:
        prior: with history vectors; its configuration says on how many user-periods, and what to choose from.
        log: the events.
        before: see above; the periods before it that choose are as many as the selection span has.
    """
    cfg, trie = prior.cfg, prior.base.trie
    learned, choosing = (log.advertiser_targets(span) for span in spans_before(log, cfg, before))
    asked = Wordless(prior.compiler.history)
    train, history = (
        PromptDataset(sample_rows(learned, n, cfg.seed), asked, max_targets=cfg.max_targets, seed=cfg.seed)
        for n in (cfg.prompts, cfg.history.prompts)
    )
    chosen_by = PromptDataset(sample_rows(choosing, cfg.anchor.select_rows, cfg.seed), asked)
    base, _ = fit_anchor(prior.base.anchor.counts, trie, train, chosen_by, cfg.anchor)
    decoder = prior.model.decoder
    model = copy.deepcopy(prior.model, {id(decoder): decoder})  # its weights are not touched
    forget_history(model)
    collator = prior.collator_of(base)
    fit_history(model, history, chosen_by, collator, cfg.history, cfg.head, seed=cfg.seed)
    fitted = replace(prior, base=base, model=model.eval())
    tree_batches = _tree_batches(fitted, selection_rows(choosing, cfg))
    base, calibration, alone_L = calibrate(base, tree_batches, _logits(fitted, tree_batches))
    return replace(fitted, base=base, calibration=calibration, anchor_calibration=alone_L)


def spans_before(log: Log, cfg: PriorConfig, before: int) -> tuple[Span, Span]:
    """Periods that a refit learns from and chooses by: those of the fit, moved up; the first one stays."""
    first, last = log.split.prior_select
    select = before - (last - first + 1)
    return (cfg.prompt_span(log.split.prior_fit)[0], select - 1), (select, before - 1)


def _tree_batches(prior: PriorModel, targets: Targets) -> list[TreeBatch]:
    collator = prior.collator_of(prior.base)
    return list(batches(PromptDataset(targets, Wordless(prior.compiler.history)), collator, _AT_ONCE))


def _logits(prior: PriorModel, tree_batches: list[TreeBatch]) -> list[list[Tensor]]:
    return head_logits(prior.model, tree_batches, constant_LH=prior.constant_hidden, own_history=True)


def _scored(tree_batches: list[TreeBatch], logits: list[list[Tensor]], calibration: Calibration) -> list[TreeBatch]:
    """The same decisions with the calibrated forecast as their base."""
    weight, exponent = tensor(calibration.lm_weight), tensor(calibration.base_exponent)
    return [
        replace(
            batch,
            levels=[
                replace(
                    asked,
                    base_NV=weighted_log_softmax(
                        asked.base_NV, exponent[level], logit_NV=of_batch[level], lm_weight=weight[level]
                    ),
                )
                for level, asked in enumerate(batch.levels)
            ],
        )
        for batch, of_batch in zip(tree_batches, logits, strict=True)
    ]
