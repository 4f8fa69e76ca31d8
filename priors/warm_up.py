"""The warm-up before the fine-tuning: what an advertiser sells to its semantic ID, and back (`models.prior_alignment`).

It trains what the fine-tuning will train below the head: the adapters (all weights with ``prior.train=full``), and the
ID tokens' input rows where ``prior.base.train_input_rows`` lets them learn. The head that it needs for words ─► ID is
thrown away after: the forecaster's has to start at zero, where the forecast is anchor and history. There is no anchor
here either, for there is no user: all legal children are equally likely before the LM has spoken.

Some advertisers are held out, to tell whether a *new* ID means something: both losses on them are reported before and
after.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.errors import UserError
from models.prior_alignment import IGNORED, AlignmentBatch, AlignmentModule, id_nll, text_nll
from models.prior_lm import PriorLM
from models.training import TokenBatchSampler, fit, token_budget
from priors.anchor import Anchor, AnchorConstants, Counts, TunedAnchor
from priors.base_model import BaseModel, quick_attention, vocabulary_head
from priors.config import ID_WORDS, PriorConfig, WarmUpConfig
from priors.dataset import Example, TreeCollator
from priors.pieces import InertTokenizer, one_line
from priors.prompt import PromptCompiler
from semantic_ids.trie import Trie

_STANDARDISED_BY = 64
"""Advertisers that the head's constants are taken from, at the most."""


@dataclass(frozen=True)
class AlignedAdvertiser:
    """One advertiser, both ways.

    Attributes:
        to_id: its words, and itself as the target.
        tokens: its ID in words around it, then its words.
        words: how many tokens at the end are its words.
    """

    to_id: Example
    tokens: NDArray[np.int64]
    words: int

    @property
    def length(self) -> int:
        """Tokens of the longer way."""
        return max(len(self.to_id.token_ids), len(self.tokens))


class AlignedAdvertisers(Dataset[AlignedAdvertiser]):
    """Advertisers by row.

    Args:
        found: those with words, by number.
        advertiser_R: advertiser of each row.
    """

    def __init__(self, found: dict[int, AlignedAdvertiser], advertiser_R: NDArray[np.int64]) -> None:
        self.found, self.advertiser_R = found, advertiser_R

    def __len__(self) -> int:
        return len(self.advertiser_R)

    def __getitem__(self, row: int) -> AlignedAdvertiser:
        return self.found[int(self.advertiser_R[row])]


def align(compiler: PromptCompiler, cfg: WarmUpConfig) -> dict[int, AlignedAdvertiser]:
    """Both ways of every advertiser with a text, or a name at least.

    Args:
        compiler: gives the log, the tokenizer and the ID tokens; text of data is as inert as in prompts.
        cfg: patterns and budget.
    """
    encode, table = InertTokenizer(compiler.tokenizer), compiler.log.tables.advertisers
    columns = [table[name].to_list() for name in ("text", "name") if name in table.columns]
    before, after = cfg.to_id.split("{words}")
    matched = re.fullmatch(ID_WORDS, cfg.to_text, re.DOTALL)
    assert matched is not None, "checked by the config"
    head, middle, blank = matched.groups()
    found = {}
    for advertiser, texts in enumerate(zip(*columns, strict=True)):
        text = next((line for line in map(one_line, texts) if line), "")
        words = encode.shortened(text, cfg.max_tokens)
        tokens = encode(blank + words) if words else []
        if not tokens:
            continue
        prompt = np.array([*encode(before + words), *encode(after)], dtype=np.int64)
        given = [*encode(head), *compiler.id_tokens(advertiser), *encode(middle)]
        found[advertiser] = AlignedAdvertiser(
            to_id=Example(0, 0, prompt, np.array([advertiser], dtype=np.int64)),
            tokens=np.array([*given, *tokens], dtype=np.int64),
            words=len(tokens),
        )
    return found


class AlignmentCollator:
    """Builds :class:`~models.prior_alignment.AlignmentBatch`.

    Args:
        trees: makes the trees of words ─► ID.
    """

    def __init__(self, trees: TreeCollator) -> None:
        self.trees = trees

    def __call__(self, advertisers: Sequence[AlignedAdvertiser]) -> AlignmentBatch:
        """One batch."""
        shape = (len(advertisers), max(len(one.tokens) for one in advertisers))
        input_ids, labels = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        for row, one in enumerate(advertisers):
            n, given = len(one.tokens), len(one.tokens) - one.words
            input_ids[row, :n] = one.tokens
            labels[row, given - 1 : n - 1] = one.tokens[given:]
        return AlignmentBatch(
            advertiser_B=torch.tensor([int(one.to_id.targets[0]) for one in advertisers]),
            to_id=self.trees([one.to_id for one in advertisers]),
            input_ids_BT=torch.from_numpy(input_ids),
            label_BT=torch.from_numpy(labels),
        )


def warm_up(
    model: PriorLM,
    base_model: BaseModel,
    compiler: PromptCompiler,
    counts: Counts,
    trie: Trie,
    cfg: PriorConfig,
    *,
    work_dir: Path,
) -> dict[str, Any] | None:
    """Train on both tasks; the model ends in evaluation mode, its head as it was.

    Args:
        model: trained in place.
        base_model: gives the vocabulary head.
        compiler: gives words and tokens.
        counts: of the log; nothing of them is used but their number.
        trie: of the IDs.
        cfg: ``warm_up``, rates and the trainer; no prompts leave the warm-up out.
        work_dir: checkpoints; an interrupted one goes on from there.

    Returns:
        Its metrics: both losses on advertisers held out, before and after; None where it is left out.

    Raises:
        UserError: fewer than two advertisers have words, or the longest do not fit in the base model's window.
        FloatingPointError: loss or gradient became NaN or infinite; the error names advertisers of the batch.
    """
    if not cfg.warm_up.prompts:
        return None
    found = align(compiler, cfg.warm_up)
    _check(found, base_model.window)
    rng = np.random.default_rng(cfg.seed)
    held, learned = np.split(rng.permutation(list(found)), [min(cfg.warm_up.held_out, len(found) // 2)])
    laps = -(-cfg.warm_up.prompts // len(learned))
    rows = np.concatenate([rng.permutation(learned) for _ in range(laps)])[: cfg.warm_up.prompts]
    train, select = AlignedAdvertisers(found, rows), AlignedAdvertisers(found, np.sort(held))
    uniform = TunedAnchor.uniform(Anchor(counts, AnchorConstants(own_weight=0.0)), trie)
    collator = AlignmentCollator(TreeCollator(uniform, first_id_token=compiler.first_id_token))
    vocabulary_VH = vocabulary_head(base_model)

    kept = copy.deepcopy(model.head.state_dict())
    _standardise(model, collator, [train[row] for row in range(min(len(train), _STANDARDISED_BY))])
    before = _losses(model, select, collator, vocabulary_VH, cfg)
    lengths = np.array([train[row].length for row in range(len(train))])
    budget = token_budget(lengths, cfg.warm_up.batch_size)
    sampler = TokenBatchSampler(lengths, budget=budget, seed=cfg.seed, parts=cfg.trainer.max_epochs)
    module = AlignmentModule(
        model.train(),
        vocabulary_VH,
        text_weight=cfg.warm_up.text_weight,
        lora_learning_rate=cfg.lora.learning_rate,
        head_learning_rate=cfg.head.learning_rate,
        total_steps=cfg.trainer.steps(sampler.per_epoch),
    )
    loader: DataLoader = DataLoader(train, batch_sampler=sampler, collate_fn=collator)
    names = compiler.log.advertiser_ids

    def describe(batch: AlignmentBatch) -> str:
        return f"advertisers {', '.join(str(name) for name in names[batch.advertiser_B.cpu().numpy()])}"

    with quick_attention(model.decoder, cfg.trainer):
        result = fit(module, loader, None, cfg.trainer, work_dir=work_dir, seed=cfg.seed, describe=describe)
    after = _losses(model, select, collator, vocabulary_VH, cfg)
    model.head.load_state_dict(kept)
    return {
        "prompts": len(train),
        "steps": result.steps,
        "advertisers": len(learned),
        "held_out": len(held),
        **{f"held_out_{name}": {"before": before[name], "after": after[name]} for name in before},
    }


def _check(found: dict[int, AlignedAdvertiser], window: int | None) -> None:
    if len(found) < 2:
        raise UserError(
            f"prior.warm_up with {len(found)} advertisers that have a text or a name",
            expected="at least two",
            action="set prior.warm_up.prompts=0, or give the table of advertisers a column name or text",
        )
    longest = max(one.length for one in found.values())
    if window is not None and longest > window:
        raise UserError(
            f"an advertiser of {longest} tokens in prior.warm_up, in a window of {window}",
            expected="a text that fits in the base model's window",
            action="lower prior.warm_up.max_tokens",
        )


@torch.no_grad()
def _standardise(model: PriorLM, collator: AlignmentCollator, advertisers: Sequence[AlignedAdvertiser]) -> None:
    """The head's constants, from hidden states of these prompts."""
    model.eval()
    tree = collator(advertisers).to_id
    hidden_BTH = model.hidden(tree)
    model.head.standardise_by([hidden_BTH[level.row_N, level.position_N] for level in tree.levels])


@torch.no_grad()
def _losses(
    model: PriorLM, select: AlignedAdvertisers, collator: AlignmentCollator, vocabulary_VH: Tensor, cfg: PriorConfig
) -> dict[str, float]:
    """Mean losses of both tasks."""
    model.eval()
    batches = DataLoader(select, batch_size=cfg.warm_up.batch_size, collate_fn=collator)
    losses = [(id_nll(model, batch), text_nll(model, batch, vocabulary_VH)) for batch in batches]
    to_id, to_text = (float(torch.cat(parts).mean()) for parts in zip(*losses, strict=True))
    return {"to_id_nll": to_id, "to_text_nll": to_text}
