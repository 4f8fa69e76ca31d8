"""Fits the forecaster: anchor, then the LM's residual over it, then the calibration of the two.

    prior_select user-periods ► constants of the anchor, penalty of its biases, exponents ─┐
    prior_fit user-periods ───► its biases ────────────────────────────────────────────────┴─► base scores ─┐
    prior_fit user-periods ───► what all a user bought says of it ◄─────────────────────────────────────────┤
    prior_fit prompts ────────► LM learns what is left ◄────────────────────────────────────────────────────┘
    prior_select prompts ─────► stop at the best part; temperatures of the LM over the anchor, exponents of the anchor

The biases are of the user-periods of the LM's training prompts, and of the same targets of each.

What is fitted is a `priors.artifact.PriorModel`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from data.artifacts import atomic_file, to_plain
from data.errors import UserError
from data.log import Log, Targets
from data.statistics import DRAWS, LEVEL, Interval, paired_bootstrap
from models.block import balance, last_layer
from models.prior_lm import (
    InterestTargets,
    LoraSettings,
    PriorLM,
    PriorLMModule,
    TreeBatch,
    base_log_prob,
    row_nll,
)
from models.training import EpochSampler, FitResult, History, TokenBatchSampler, fit, token_budget
from priors.anchor import Anchor, Counts, TunedAnchor
from priors.artifact import PriorModel, check_advertisers, heads_of, history_vectors
from priors.base_model import BaseModel, load_base_model, quick_attention
from priors.calibration import calibrate, calibrated_nll, fit_anchor_levels
from priors.config import AnchorConfig, PriorConfig
from priors.constants import choose_constants
from priors.dataset import PromptDataset, TreeCollator
from priors.history import Categories, fit_history, freeze_history, history_states
from priors.interests import Interests, InterestSpace, fit_interest_anchor, interest_column
from priors.judge import Measure, RequestValues, save_requests
from priors.probe import LevelStates, fit_probe, levels_by_head, nll_by_level, read_states
from priors.prompt import PromptCompiler, Wordless
from priors.tree_reader import takes_tree_mask
from priors.warm_up import warm_up
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.trie import Trie

START = "start.safetensors"
_SELECT = 0
_STANDARDISE = 32
"""Prompts that the head's constants are taken from where there is no probe."""


@dataclass(frozen=True)
class Scores:
    """What a model's heads say at the decisions of some prompts.

    Attributes:
        batches: of the prompts.
        logits: of advertisers, ``(N, V)`` a level, for each batch.
        interest_logits: of interests, for each batch that asks for any.
        constant_LH: mean of what the head reads at each level.
    """

    batches: list[TreeBatch]
    logits: list[list[Tensor]]
    interest_logits: list[Tensor]
    constant_LH: Tensor


def fit_prior(log: Log, ids: AdvertiserIds, cfg: PriorConfig, *, work_dir: Path) -> tuple[PriorModel, dict[str, Any]]:
    """Fit anchor and LM.

    Args:
        log: only periods of ``prior_fit`` and ``prior_select`` are read.
        ids: the advertiser IDs.
        cfg: everything else.
        work_dir: checkpoints; an interrupted fit goes on from there. At the end it also holds the NLL of each selection
            prompt, at the start and after the best part, as of :func:`priors.judge.load_requests`.

    Returns:
        The forecaster, and its metrics: the trials of the anchor, the NLL by part, the calibration.

    Raises:
        UserError: the fit or the selection span has no conversion, or a prompt with its tree is longer than the base
            model's window or than a batch may be, or the base model takes no tree.
        LineageError: the IDs are not those of the log's advertisers.
        FloatingPointError: the loss became NaN or infinite; the error names users and periods of the batch.
    """
    check_advertisers(log, ids)
    trie, counts = Trie.from_codes(ids.codes_AL, ids.level_sizes), Counts.of(log)
    fit_targets = log.advertiser_targets(cfg.prompt_span(log.split.prior_fit))
    train_rows = sample_rows(fit_targets, cfg.prompts, cfg.seed)
    select = log.advertiser_targets("prior_select")
    select_rows = selection_rows(select, cfg)
    for name, rows in (("prior_fit", train_rows), ("prior_select", select_rows)):
        if not len(rows):
            raise UserError(
                f"data.split.{name} without any conversion",
                expected="conversions to learn from",
                action=f"widen data.split.{name}, or lower prior.first_period",
            )
    anchor_rows = sample_rows(select, cfg.anchor.select_rows, cfg.seed)
    base_model = load_base_model(cfg.base, trained=cfg.train == "full", seed=cfg.seed)
    history = history_vectors(cfg.history, counts, ids, log, Categories.of(log, cfg.history))
    compiler = PromptCompiler(log, ids, base_model.tokenizer, cfg.prompt, window=base_model.window, history=history)
    train_set = PromptDataset(train_rows, compiler, max_targets=cfg.max_targets, seed=cfg.seed)
    select_set = PromptDataset(select_rows, compiler)
    wordless = PromptDataset(train_rows, Wordless(), max_targets=cfg.max_targets, seed=cfg.seed)
    base, anchor_metrics = fit_anchor(counts, trie, wordless, PromptDataset(anchor_rows, Wordless()), cfg.anchor)
    interests: Interests | None = None
    interest_metrics: dict[str, Any] = {}
    if (column := interest_column(log, cfg.interests)) is not None:
        space = InterestSpace.of(log, column)
        interests, interest_metrics = fit_interest_anchor(space, train_rows, anchor_rows, cfg.anchor)

    model = build_model(base_model, ids, log, compiler, cfg, interests=interests)
    collator = TreeCollator(
        base, first_id_token=compiler.first_id_token, interests=interests, repeats=model.head.repeats
    )
    if not takes_tree_mask(model):
        raise UserError(
            f"prior.base.name={cfg.base.name}, which takes no 4-D attention mask or is no causal LM",
            expected="a causal LM under which all targets of a prompt can hang as one tree",
            action="take one with positions of its tokens' own, of the kind of Llama, Qwen, Gemma, GPT-2 or OPT",
        )
    warmed = warm_up(model, base_model, compiler, counts, trie, cfg, work_dir=work_dir / "warm_up")
    probe_set, history_set = (
        PromptDataset(sample_rows(fit_targets, n, cfg.seed), compiler, max_targets=cfg.max_targets, seed=cfg.seed)
        for n in (cfg.probe.prompts, cfg.history.prompts)
    )
    history_select = PromptDataset(anchor_rows, compiler)  # more than the LM could read
    interest_history = History(None if interests is None else "select_interest_nll")
    result, sampler, start, scores = fit_lm(
        model, train_set, select_set, collator, cfg, probe=probe_set, history=(history_set, history_select),
        user_ids=log.user_ids, work_dir=work_dir, callbacks=(interest_history,),
    )  # fmt: skip
    base, calibration, alone_L = calibrate(base, scores.batches, scores.logits)
    zeros, ones = torch.zeros(trie.n_levels), torch.ones(trie.n_levels)
    select_anchor = float(calibrated_nll(scores.batches, None, zeros, ones).mean())
    if interests is not None:
        asked = [batch.interests for batch in scores.batches if batch.interests is not None]
        raised, weights, _ = calibrate(interests.base, asked, [[one] for one in scores.interest_logits])
        interests = replace(interests, base=raised, calibration=weights)
        interest_metrics |= {
            "column": interests.space.column,
            "categories": len(interests.space),
            "weight": cfg.interests.weight,
            "select_nll_by_part": interest_history.values,
            "select_nll_anchor": _interest_anchor_nll(asked),
            "calibration": to_plain(interests.calibration),
        }
    fitted = PriorModel(
        model.eval(), base, calibration, compiler, scores.constant_LH, cfg, base_model.reference, ids, interests,
        anchor_calibration=alone_L,
    )  # fmt: skip
    metrics = {
        **anchor_metrics,
        "prompts": len(train_rows),
        "prompt_tokens_mean": float(
            np.mean([len(train_set[row].token_ids) for row in range(min(100, len(train_set)))])
        ),
        "steps": result.steps,
        "batches_a_part": sampler.per_epoch,
        "prompts_a_part": round(sampler.per_epoch * sampler.mean_batch),
        "batch_tokens": sampler.budget,
        "best_part": result.best_epoch,
        "warm_up": warmed,
        "start": start,
        "select_nll_by_part": result.history,
        "select_nll_anchor": select_anchor,
        "calibration": to_plain(calibration),
        "anchor_calibration": list(alone_L),
        "interests": interest_metrics or None,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return fitted, metrics


def fit_anchor(
    counts: Counts, trie: Trie, train: PromptDataset, select: PromptDataset, cfg: AnchorConfig
) -> tuple[TunedAnchor, dict[str, Any]]:
    """The tuned anchor: biases fitted on the training rows; constants, penalty and exponents on the selection rows.

    No prompt is read: data sets of `priors.prompt.Wordless` prompts will do.

    Args:
        counts: of the log.
        trie: of the advertisers' IDs.
        train: whose targets the biases are fitted on.
        select: whose targets the constants and the penalty of the biases are chosen by, and the exponents fitted on.
        cfg: the constants and penalties to choose from.

    Returns:
        The anchor and its metrics: terms, constants, their trials, and those of the biases' penalty.
    """
    chosen = choose_constants(counts, select.targets, cfg)
    metrics: dict[str, Any] = {**chosen.to_plain(), "anchor_level_trials": []}
    if cfg.kind == "none":
        return TunedAnchor.uniform(Anchor(counts, chosen.constants), trie), metrics
    untuned = TunedAnchor.untuned(Anchor(counts, chosen.constants), trie)
    collator = TreeCollator(untuned, first_id_token=0)
    exponent, bias, level_trials = fit_anchor_levels(
        list(batches(train, collator, 64)), list(batches(select, collator, 64)), cfg.bias_penalty
    )
    return TunedAnchor(untuned.anchor, trie, exponent, bias), metrics | {"anchor_level_trials": level_trials}


def build_model(
    base_model: BaseModel,
    ids: AdvertiserIds,
    log: Log,
    compiler: PromptCompiler,
    cfg: PriorConfig,
    *,
    interests: Interests | None = None,
) -> PriorLM:
    """The untrained forecaster: LoRA in the base model, heads of zeros, ID rows from words."""
    decoder: Any = base_model.decoder
    torch.manual_seed(cfg.seed)
    if cfg.base.gradient_checkpointing:
        decoder.gradient_checkpointing_enable({"use_reentrant": False})
    if cfg.train == "lora" and cfg.lora.rank > 0:
        adapter = LoraConfig(
            r=cfg.lora.rank,
            lora_alpha=cfg.lora.alpha,  # type: ignore[arg-type]
            target_modules=adapted_modules(decoder, cfg.lora, appended=cfg.base.appended_layer),
        )
        decoder = get_peft_model(decoder, adapter)
        if cfg.base.appended_layer:
            last_layer(decoder).requires_grad_(True)  # peft freezes all that is not its own
    model = PriorLM(
        decoder,
        codebooks=[torch.from_numpy(vectors_VD) for vectors_VD in ids.code_vectors],
        id_rows=input_rows(base_model, ids, log, cfg.base.id_rows),
        first_id_token=compiler.first_id_token,
        head=cfg.head.kind,
        dropout=cfg.head.dropout,
        train_input_rows=cfg.base.train_input_rows,
        n_interests=None if interests is None else len(interests.space),
        history_size=0 if compiler.history is None else compiler.history.size,
        repeats=cfg.history.repeats,
    )
    if model.interest_head is not None:
        model.interest_head.requires_grad_(cfg.interests.weight > 0)
    return model


def adapted_modules(decoder: torch.nn.Module, cfg: LoraSettings, *, appended: bool = False) -> list[str]:
    """Full names of the linear layers that get an adapter: the configured ones of the last layers.

    Args:
        decoder: the decoder.
        cfg: which layers.
        appended: the last layer was appended, and needs none.

    Raises:
        UserError: the decoder has no such layer.
    """
    linear = [name for name, module in decoder.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    layer_of = {name: next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in linear}
    stop = max(layer_of.values(), default=0) + (0 if appended else 1)
    first = 0 if cfg.layers is None else stop - cfg.layers
    names = [name for name in linear if name.split(".")[-1] in cfg.targets and first <= layer_of[name] < stop]
    if not names:
        raise UserError(
            f"prior.lora.targets={list(cfg.targets)}, prior.lora.layers={cfg.layers}",
            expected=f"some of {sorted({name.split('.')[-1] for name in linear})}, at least one layer",
            action="name the linear layers of this base model, or set prior.lora.rank=0 to train the head alone",
        )
    return names


def input_rows(base_model: BaseModel, ids: AdvertiserIds, log: Log, kind: str) -> Tensor:
    """Input rows of the ID tokens.

    Args:
        base_model: whose words the rows stand beside.
        ids: the codes.
        log: what the advertisers sell.
        kind: as of `priors.config.BaseModelConfig.id_rows`.

    Returns:
        ``(sum V_l, H)``, levels after one another.
    """
    rows_VH = word_rows(base_model, ids, log)
    if "codebook" not in kind:
        return rows_VH
    codes_VD = torch.cat([torch.from_numpy(codebook) for codebook in ids.codebooks]).float()
    width, hidden = codes_VD.shape[1], rows_VH.shape[1]
    generator = torch.Generator().manual_seed(0)
    directions_DH = torch.nn.init.orthogonal_(torch.empty(width, hidden), generator=generator)
    words_VH = base_model.decoder.get_input_embeddings().weight.detach().float()  # type: ignore[operator]
    # The longest level gets the length of a word, so that the residuals keep their sizes against each other.
    length = torch.from_numpy(ids.codebooks[0]).float().norm(dim=-1).mean().clamp_min(1e-8)
    codes_VD = codes_VD * (words_VH - words_VH.mean(0)).norm(dim=-1).mean() / length
    return rows_VH + codes_VD @ directions_DH


def word_rows(base_model: BaseModel, ids: AdvertiserIds, log: Log) -> Tensor:
    """Input rows of the ID tokens: the mean word embedding of what the advertisers under a code sell.

    Returns:
        ``(sum V_l, H)``, levels after one another; a code that nobody has gets the mean of all words seen.
    """
    embedding = base_model.decoder.get_input_embeddings()
    assert isinstance(embedding, torch.nn.Embedding)
    table = embedding.weight.detach().float()
    texts = log.tables.advertisers["text"].fill_null("").to_list()
    encoded = base_model.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    text_AH = torch.stack([table[tokens].mean(0) if tokens else table.new_zeros(table.shape[1]) for tokens in encoded])
    rows = []
    for level, size in enumerate(ids.level_sizes):
        code_A = torch.from_numpy(ids.codes_AL[:, level])
        count_V = torch.bincount(code_A, minlength=size)
        sum_VH = torch.zeros(size, text_AH.shape[1]).index_add(0, code_A, text_AH)
        mean_VH = sum_VH / count_V.clamp_min(1)[:, None]
        rows.append(torch.where(count_V[:, None] > 0, mean_VH, text_AH.mean(0)))
    return torch.cat(rows)


def batches(dataset: PromptDataset, collator: TreeCollator, batch_size: int) -> DataLoader[TreeBatch]:
    """A data set as batches, in order."""
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collator)  # type: ignore[arg-type]


def sample_rows(targets: Targets, n: int, seed: int) -> Targets:
    """At most ``n`` rows, drawn by seed, in their own order."""
    if len(targets) <= n:
        return targets
    return targets.select(np.sort(np.random.default_rng(seed).choice(len(targets), n, replace=False)))


def selection_rows(select: Targets, cfg: PriorConfig) -> Targets:
    """The user-periods of the selection prompts, the same for every training seed, so that fits can be compared."""
    return sample_rows(select, cfg.select_prompts, _SELECT)


def _sampler(train: PromptDataset, collator: TreeCollator, cfg: PriorConfig) -> TokenBatchSampler:
    """Training batches of like length, within the budget of tokens.

    Raises:
        UserError: a prompt with its tree is longer than a batch may be.
    """
    lengths = np.array([collator.length(train[row]) for row in range(len(train))])
    budget = cfg.batch_tokens or token_budget(lengths, cfg.batch_size)
    if lengths.max() > budget:
        raise UserError(
            f"prior.batch_tokens={budget}",
            expected=f"at least {lengths.max()}, the tokens of the longest prompt with its tree",
            action="raise prior.batch_tokens, or lower prior.prompt.max_tokens or prior.max_targets",
        )
    return TokenBatchSampler(lengths, budget=budget, seed=cfg.seed, parts=cfg.trainer.max_epochs)


def fit_lm(
    model: PriorLM,
    train: PromptDataset,
    select: PromptDataset,
    collator: TreeCollator,
    cfg: PriorConfig,
    *,
    user_ids: NDArray[np.generic],
    work_dir: Path,
    probe: PromptDataset | None = None,
    history: tuple[PromptDataset, PromptDataset] | None = None,
    callbacks: tuple[Callback, ...] = (),
) -> tuple[FitResult, TokenBatchSampler, dict[str, Any], Scores]:
    """Train the LM on trees of targets; it ends with the weights of the best part, or with those it started from.

    The best of several parts on some hundred prompts looks better than the start by chance alone, so it is kept only
    where the interval of the change of the selection prompts' NLL, over users, lies below zero. Its level allows for
    the choice (Bonferroni): 95 % that none of the parts seems better than the start without being so.

    Args:
        model: trained in place.
        train: prompts, each seen once.
        select: prompts that the best part is chosen by.
        collator: makes the trees over their base scores.
        cfg: batches, rates, parts.
        user_ids: of the log, to name the users of a bad batch.
        work_dir: checkpoints; an interrupted fit goes on from there.
        probe: prompts that the head is fitted on before the adapters are trained; None starts from a head of zeros.
        history: user-periods that the weights of the history vectors are fitted on, and those that they are chosen by,
            before all else; None leaves them at zero.
        callbacks: further Lightning callbacks.

    Returns:
        What the fit did (``best_epoch`` -1: it ends where it started), the sampler of its batches, what it started
        from, and the scores of the selection prompts that it ends with. What it started from: ``select_nll``, with
        ``history`` and ``probe``, of each level, the NLL before and after and the epoch chosen, and under
        ``select_change`` what the best part is over it, with its interval over users.

    Raises:
        UserError: a prompt with its tree is longer than a batch may be.
        FloatingPointError: loss or gradient became NaN or infinite.
    """
    sampler = _sampler(train, collator, cfg)
    start = _start(model, train, select, collator, cfg, probe=probe, history=history, work_dir=work_dir)
    module = PriorLMModule(
        model.train(),
        lora_learning_rate=cfg.lora.learning_rate,
        head_learning_rate=cfg.head.learning_rate,
        total_steps=cfg.trainer.steps(sampler.per_epoch),
        prompts_per_batch=sampler.mean_batch,
        interest_weight=cfg.interests.weight,
        periods=int(train.targets.period.max()) + 1,
        period_learning_rate=cfg.head.period_learning_rate,
    )
    train_loader: DataLoader = DataLoader(train, batch_sampler=sampler, collate_fn=collator)

    def describe(batch: TreeBatch) -> str:
        users, periods = user_ids[batch.user_B.cpu().numpy()].tolist(), batch.period_B.tolist()
        prompts = (f"{user} as of period {period}" for user, period in zip(users, periods, strict=True))
        return f"prompts of users {', '.join(prompts)}"

    with quick_attention(model.decoder, cfg.trainer):
        result = fit(
            module, train_loader, batches(select, collator, cfg.batch_size), cfg.trainer,
            work_dir=work_dir, seed=cfg.seed, monitor="select_nll", callbacks=callbacks, describe=describe,
        )  # fmt: skip
    change, scores = _judge_best(model, select, collator, cfg, parts=len(result.history), work_dir=work_dir)
    start["select_change"] = to_plain(change)
    if not change.high < 0:
        result = replace(result, best_epoch=-1)
    return result, sampler, start, scores


def _judge_best(
    model: PriorLM, select: PromptDataset, collator: TreeCollator, cfg: PriorConfig, *, parts: int, work_dir: Path
) -> tuple[Interval, Scores]:
    """What training changed in the selection prompts' NLL; the model ends with its weights, or those of the start.

    Args:
        model: with the weights of the best part.
        select: the selection prompts.
        collator: makes their trees.
        cfg: batches.
        parts: how many the best one was chosen from.
        work_dir: has the start, and gets the NLL of each prompt, before and after.

    Returns:
        The change and its interval over users, and the scores that the model ends with.
    """
    select_batches = list(batches(select, collator, cfg.batch_size))
    ones = torch.ones(model.head.n_levels)

    def nll_of(scores: Scores) -> NDArray[np.float64]:
        return calibrated_nll(select_batches, scores.logits, ones, ones).double().numpy()

    trained = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    scores = logits_at_decisions(model, select_batches)
    of_trained_R = nll_of(scores)
    _load_start(model, work_dir)
    of_start = logits_at_decisions(model, select_batches)
    of_start_R = nll_of(of_start)
    level = 1 - (1 - LEVEL) / parts
    change = paired_bootstrap(of_trained_R, of_start_R, select.targets.user, draws=parts * DRAWS, level=level)
    if change.high < 0:
        model.load_state_dict(trained, strict=False)
    else:
        scores = of_start
    values = {Measure("select_nll", "lm"): of_trained_R, Measure("select_nll", "start"): of_start_R}
    save_requests([RequestValues(select.targets.user, select.targets.period, values)], work_dir)
    return change, scores


def _start(
    model: PriorLM,
    train: PromptDataset,
    select: PromptDataset,
    collator: TreeCollator,
    cfg: PriorConfig,
    *,
    probe: PromptDataset | None,
    history: tuple[PromptDataset, PromptDataset] | None,
    work_dir: Path,
) -> dict[str, Any]:
    """The head's constants, and the head as history vectors and the frozen model's hidden states fit it.

    Kept in ``work_dir``, so that a fit that goes on starts from the same bytes.
    """
    if not (work_dir / START).exists():
        model.eval()
        size, warmed = 4 * cfg.batch_size, cfg.warm_up.prompts > 0

        def states(source: PromptDataset, n_read: int) -> list[LevelStates]:
            rows = list(EpochSampler(source, seed=cfg.seed + 1, per_epoch=n_read))
            return read_states(model, source, collator, rows=rows, batch_size=size, adapted=warmed)

        report: dict[str, Any] = {}
        if model.head.history is not None and history is not None:
            report["history"] = fit_history(model, *history, collator, cfg.history, cfg.head, seed=cfg.seed)
        if cfg.base.appended_layer:
            balance(model.decoder, lambda: states(train, min(len(train), _STANDARDISE)))
        if probe is not None and len(probe) > 0:
            of_select = read_states(
                model, select, collator, rows=list(range(len(select))), batch_size=size, adapted=warmed
            )
            report |= fit_probe(model, states(probe, len(probe)), of_select, cfg.probe, cfg.head, seed=cfg.seed)
            report["select_nll"] = sum(report["nll_after"])
        else:
            read = states(train, min(len(train), _STANDARDISE))
            for head, of_head in levels_by_head(model, read):
                head.standardise_by([level.state_RS for level in of_head])
            if model.head.history is not None:
                of_select = history_states(select, collator)[: model.head.n_levels]
                report["select_nll"] = sum(nll_by_level(model.head.history, of_select))
            else:  # the head's zeros leave the base as it is
                base_B = [row_nll(batch, base_log_prob(batch)) for batch in batches(select, collator, size)]
                report["select_nll"] = float(torch.cat(base_B).mean())
        work_dir.mkdir(parents=True, exist_ok=True)
        trained = {name: value.detach().contiguous() for name, value in model.named_parameters() if value.requires_grad}
        with atomic_file(work_dir / START) as path:  # processes that train together write it at the same time
            save_file(trained | heads_of(model), path, {"report": json.dumps(report)})
    return _load_start(model, work_dir)


def _load_start(model: PriorLM, work_dir: Path) -> dict[str, Any]:
    with safe_open(work_dir / START, framework="pt") as file:
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()}, strict=False)  # noqa: SIM118
        report: dict[str, Any] = json.loads(file.metadata()["report"])
    freeze_history(model)  # the LM learns what is left
    return report


@torch.no_grad()
def logits_at_decisions(model: PriorLM, select: list[TreeBatch]) -> Scores:
    """What a model's heads say at all decisions of some batches."""
    model.eval()
    interests = []
    logits, sums = [], [torch.zeros(()) for _ in range(model.head.n_levels)]
    counts = torch.zeros(model.head.n_levels)
    for batch in select:
        hidden, levels = model.hidden_read(batch), []
        for level, decisions in enumerate(batch.levels):
            state_NS = batch.states(hidden, decisions)
            levels.append(model.scores(state_NS, level, decisions))
            sums[level] = sums[level] + state_NS.float().sum(0).cpu()
            counts[level] += len(state_NS)
        logits.append(levels)
        if batch.interests is not None and model.interest_head is not None:
            asked = batch.interests.levels[0]
            interests.append(model.interest_head(batch.states(hidden, asked), 0))
    return Scores(select, logits, interests, torch.stack(sums) / counts.clamp_min(1)[:, None])


def _interest_anchor_nll(asked: Sequence[InterestTargets]) -> float:
    """NLL of the interests by their anchor alone, the mean over the prompts that have any."""
    total = sum(float(row_nll(one, base_log_prob(one)).sum()) for one in asked)
    return total / sum(float(one.target_weight_Y.sum()) for one in asked)


def rows_of(targets: Targets, users: NDArray[np.integer]) -> Targets:
    """The rows of some users."""
    return targets.select(np.isin(targets.user, users))
