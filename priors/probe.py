"""Fits the head on hidden states of the frozen base model, before the adapters are trained.

Linear probing, then fine-tuning (Kumar et al. 2022, arXiv 2202.10054): the adapters start from a head that reads what
the base model already says, instead of from one that says nothing. A frozen model needs no backward pass, and its
hidden states are computed once for all epochs, so a prompt costs a sixth of a training step and is read many times.

    prompts ─► frozen LM ─► hidden states at all decisions ─► level 1 of the head ─► stop by the selection prompts
                                                          ├─► level 2 …
                                                          └─► level 3 …

The head of interests is one more level, of its own.

The levels share no weights, so each is fitted by itself and keeps its own best epoch; one that never beats the base on
the selection prompts stays at zero, and its forecast stays the base.

*Period effects.* What is promoted changes from period to period, and a head can learn the periods it was shown instead
of the users. So each period has a free bias a code while the head is fitted, which takes up what all its users have in
common (fixed effects of a panel: Wooldridge 2010, ch. 10), and is thrown away after.

Shapes: N decisions of one level, R rows of states, S what the head reads (`models.prior_lm`), V codes of that level, Y
targets that decide there, P periods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from models.prior_lm import Decisions, HeadConfig, IdHead, PriorLM, TreeBatch
from priors.config import ProbeConfig
from priors.dataset import PromptDataset, TreeCollator


@dataclass(frozen=True)
class LevelStates:
    """All decisions of one level.

    Attributes:
        state_RS: what the head reads there.
        base_NV: base score of each code, ``-inf`` where illegal.
        period_N: as-of period of the decision's prompt.
        decision_Y, code_Y, weight_Y: decision, code and weight of each target.
        n_prompts: prompts that they are of.
        row_N: row of ``state_RS`` of each decision, where several share one; None: each has its own.
        repeat_NV: part of each code that is the user's own purchases; None: no head asks for it.
    """

    state_RS: Tensor
    base_NV: Tensor
    period_N: Tensor
    decision_Y: Tensor
    code_Y: Tensor
    weight_Y: Tensor
    n_prompts: int
    row_N: Tensor | None = None
    repeat_NV: Tensor | None = None

    def __len__(self) -> int:
        return len(self.base_NV)

    def states(self, decisions: Tensor) -> Tensor:
        """What the head reads at some of the decisions."""
        return self.state_RS[decisions if self.row_N is None else self.row_N[decisions]]

    def scores(self, head: IdHead, level: int, decisions: Tensor, device: torch.device) -> Tensor:
        """What a head and the base say at some of the decisions, ``(n, V)``.

        Args:
            head: reads the states.
            level: theirs.
            decisions: which of them.
            device: the head's.
        """
        repeat_NV = None if self.repeat_NV is None else self.repeat_NV[decisions].to(device)
        said_NV = head(self.states(decisions).to(device), level, repeat_NV)
        return said_NV + self.base_NV[decisions].to(device)

    def target_weights(self) -> Tensor:
        """Weight of each code among the targets of each decision."""
        target_NV = torch.zeros(len(self), self.base_NV.shape[1])
        return target_NV.index_put((self.decision_Y, self.code_Y), self.weight_Y, accumulate=True)


@torch.no_grad()  # not inference_mode: what is read is trained on
def read_states(
    model: PriorLM,
    dataset: PromptDataset,
    collator: TreeCollator,
    *,
    rows: list[int],
    batch_size: int,
    adapted: bool = False,
) -> list[LevelStates]:
    """Hidden states of the base model at all decisions of some prompts.

    Args:
        model: in evaluation mode.
        dataset: the prompts with their targets.
        collator: builds their trees.
        rows: rows of ``dataset`` to read; they are read in the order of their prompts' lengths.
        batch_size: prompts of a forward pass.
        adapted: read with the adapters; without them it is quicker, and the same where they are untrained.

    Returns:
        One entry a level of the head, then one of the head of interests where the prompts are asked for them.
    """
    decoder: Any = model.decoder
    device = next(model.parameters()).device
    plain = isinstance(decoder, PeftModel) and not adapted

    def read(batch: TreeBatch) -> Callable[[Decisions], tuple[Tensor, None]]:
        on_device = batch.to(device)
        with decoder.disable_adapter() if plain else nullcontext():
            hidden_BTH = model.hidden(on_device)
        return lambda decisions: (on_device.states(hidden_BTH, decisions.to(device)).cpu(), None)

    return joined_states(in_batches(dataset, collator, rows=rows, batch_size=batch_size), read)


def in_batches(
    dataset: PromptDataset, collator: TreeCollator, *, rows: list[int], batch_size: int
) -> Iterable[TreeBatch]:
    """Prompts of a data set, those of like length together."""
    examples = sorted((dataset[row] for row in rows), key=lambda example: len(example.token_ids))
    return (collator(examples[start : start + batch_size]) for start in range(0, len(examples), batch_size))


def joined_states(
    batches: Iterable[TreeBatch], read: Callable[[TreeBatch], Callable[[Decisions], tuple[Tensor, Tensor | None]]]
) -> list[LevelStates]:
    """All decisions of some batches.

    Args:
        batches: the prompts.
        read: gives for a batch what the head reads at decisions of it, and which row of that, as of
            :class:`LevelStates`.

    Returns:
        One entry a level of the head, then one of the head of interests where the prompts are asked for them.
    """
    parts: list[list[LevelStates]] = []
    for batch in batches:
        states_of, levels = read(batch), []
        for asked in (batch,) if batch.interests is None else (batch, batch.interests):
            for decisions in asked.levels:
                decided = decisions.target_node_Y >= 0
                state_RS, row_N = states_of(decisions)
                levels.append(
                    LevelStates(
                        state_RS=state_RS,
                        base_NV=decisions.base_NV,
                        period_N=batch.period_B[decisions.row_N],
                        decision_Y=decisions.target_node_Y[decided],
                        code_Y=decisions.target_code_Y[decided],
                        weight_Y=asked.target_weight_Y[decided],
                        n_prompts=round(float(asked.target_weight_Y.sum())),
                        row_N=row_N,
                        repeat_NV=decisions.repeat_NV,
                    )
                )
        parts.append(levels)
    return [_joined([part[level] for part in parts]) for level in range(len(parts[0]))]


def fit_probe(
    model: PriorLM,
    train: list[LevelStates],
    select: list[LevelStates],
    cfg: ProbeConfig,
    head: HeadConfig,
    *,
    seed: int,
) -> dict[str, Any]:
    """Fit the head, level by level; the rest of the model is not touched.

    Args:
        model: whose head is fitted in place; its standardisation is set from ``train``.
        train: decisions of training prompts.
        select: decisions of selection prompts, that choose each level's epoch.
        cfg: passes.
        head: rates of the head and of the period effects.
        seed: of the order of the decisions.

    Returns:
        For each level its part of the selection prompts' NLL before and after, and the epoch chosen (0 where the head
        stays at zero); the same of the interests under ``interests``.
    """
    heads = levels_by_head(model, train)
    for head_of, of_train in heads:
        head_of.standardise_by([level.state_RS for level in of_train])
    return fit_levels(heads, [part for _, part in levels_by_head(model, select)], cfg, head, seed=seed)


def fit_levels(
    heads: Sequence[tuple[IdHead, list[LevelStates]]],
    select: Sequence[list[LevelStates]],
    cfg: ProbeConfig,
    rates: HeadConfig,
    *,
    seed: int,
    patience: int | None = None,
) -> dict[str, Any]:
    """Fit heads level by level; those without trainable weights are left out.

    Args:
        heads: that of advertisers, then that of interests where there is one; each with decisions of training prompts.
        select: decisions of selection prompts of each.
        cfg: passes.
        rates: of the head and of the period effects.
        seed: of the order of the decisions.
        patience: passes without a gain after which a level is left; None makes them all.

    Returns:
        As of :func:`fit_probe`.
    """
    torch.manual_seed(seed)
    reports: list[dict[str, Any]] = []
    for (fitted, of_train), stop_by in zip(heads, select, strict=True):
        reports.append({"nll_before": [], "nll_after": [], "epoch": []})
        if not any(weight.requires_grad for weight in fitted.parameters()):
            continue
        for level, states in enumerate(of_train):
            before, after, epoch = _fit_level(fitted, level, states, stop_by[level], cfg, rates, patience)
            for name, value in (("nll_before", before), ("nll_after", after), ("epoch", epoch)):
                reports[-1][name].append(value)
    report = reports[0]
    if len(reports) > 1:
        report["interests"] = reports[1]
    return report


def nll_by_level(head: IdHead, levels: Sequence[LevelStates]) -> list[float]:
    """Each level's part of the prompts' mean NLL."""
    device = next(head.parameters()).device
    return [_nll(head, level, states, device) for level, states in enumerate(levels)]


def levels_by_head(model: PriorLM, states: list[LevelStates]) -> list[tuple[IdHead, list[LevelStates]]]:
    """Each head of a model with its part of what :func:`read_states` gave."""
    n_levels = model.head.n_levels
    parts = [(model.head, states[:n_levels])]
    if model.interest_head is not None and len(states) > n_levels:
        parts.append((model.interest_head, states[n_levels:]))
    return parts


def _fit_level(
    head: IdHead,
    level: int,
    train: LevelStates,
    select: LevelStates,
    cfg: ProbeConfig,
    rates: HeadConfig,
    patience: int | None,
) -> tuple[float, float, int]:
    named = head.named_parameters()
    weights = [weight for name, weight in named if name.endswith(f".{level}") and weight.requires_grad]
    if not len(train) or not len(select):
        return 0.0, 0.0, 0
    device = weights[0].device
    before = best = _nll(head, level, select, device)
    kept, best_epoch = [weight.detach().clone() for weight in weights], 0
    period_PV = torch.zeros(int(train.period_N.max()) + 1, train.base_NV.shape[1], device=device, requires_grad=True)
    groups = [{"params": weights, "lr": rates.learning_rate}]
    if rates.period_learning_rate:
        groups.append({"params": [period_PV], "lr": rates.period_learning_rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=cfg.weight_decay)
    weight_NV = train.target_weights()
    for epoch in range(1, cfg.epochs + 1):
        head.train()
        for rows_B in torch.randperm(len(train)).split(cfg.batch_size):
            scores_BV = train.scores(head, level, rows_B, device) + period_PV[train.period_N[rows_B].to(device)]
            loss = _cross_entropy(scores_BV, weight_NV[rows_B].to(device)) / len(rows_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        head.eval()
        nll = _nll(head, level, select, device)
        if nll < best:
            best, best_epoch, kept = nll, epoch, [weight.detach().clone() for weight in weights]
        elif patience is not None and epoch - best_epoch >= patience:
            break
    with torch.no_grad():
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
    return before, best, best_epoch


@torch.no_grad()
def _nll(head: IdHead, level: int, states: LevelStates, device: torch.device) -> float:
    total, target_NV = 0.0, states.target_weights()
    for rows in torch.arange(len(states)).split(4096):
        total += float(_cross_entropy(states.scores(head, level, rows, device), target_NV[rows].to(device)))
    return total / max(states.n_prompts, 1)


def _cross_entropy(scores_BV: Tensor, target_BV: Tensor) -> Tensor:
    """Summed over the batch; illegal codes have no weight, and no say in the sum."""
    log_probs_BV = scores_BV.log_softmax(-1).masked_fill(scores_BV.isneginf(), 0.0)
    return -(target_BV * log_probs_BV).sum()


def _joined(parts: list[LevelStates]) -> LevelStates:
    decision = [part.decision_Y + offset for part, offset in zip(parts, _starts(map(len, parts)), strict=True)]
    starts = _starts(len(part.state_RS) for part in parts)
    rows = [part.row_N + start for part, start in zip(parts, starts, strict=True) if part.row_N is not None]
    names = ["state_RS", "base_NV", "period_N", "code_Y", "weight_Y"]
    names += ["repeat_NV"] if parts[0].repeat_NV is not None else []
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    n_prompts = sum(part.n_prompts for part in parts)
    return LevelStates(
        decision_Y=torch.cat(decision), n_prompts=n_prompts, row_N=torch.cat(rows) if rows else None, **joined
    )


def _starts(lengths: Iterable[int]) -> list[int]:
    return list(accumulate(lengths, initial=0))[:-1]
