"""A causal LM that forecasts advertisers as semantic IDs, level by level, on top of given base scores.

The idea (arXiv 2605.27856, with semantic IDs instead of names): the LM reads a prompt about a user
and scores the codes of an advertiser's ID one level after the other. It is given *base scores* for
every legal code, the log-probabilities of a counting model (the anchor), and learns the residual:

    log P(code | prefix, user) = log_softmax over legal codes of ( LM logit + base score )

    prompt tokens ─► t1 ─► … ─► tP          hidden of tP        → level-1 codes
                                 ├─► <adv_1_7> ─┬─► …            hidden of a code → codes of the next level
                                 │              └─► <adv_2_3>
                                 └─► <adv_1_9> ───► <adv_2_0>   one row: a tree mask lets a token see
                                                                the prompt, its own prefix and itself

All target advertisers of a prompt hang below it as one tree, so the prompt is computed once. The
head is tied to the RQ-VAE's codebook, ``logit_c = (P_l · ĥ) · z_c`` (plus a free row a code by
config; free rows alone where a codebook is zero), and starts at zero: the untrained forecast *is* the
base. ``ĥ`` is the hidden state standardised by constants of the training prompts: hidden states of an
LM point almost all one way (Ethayarajh 2019, arXiv 1909.00512), and without the common part what a
prompt says is learned first.

A prompt tells a few of the advertisers a user bought; the *history vector* beside it tells all of them, as a mean of
their code vectors (`priors.history`). Where a forecaster has one, the head reads it beside the hidden state, through
weights of its own: ``logit_c = (P_l · ĥ + Q_l · û) · z_c``. To buy again and to try something new are two things
(RepeatNet, Ren et al. 2019, arXiv 1812.02646), so a forecaster may have two such weights: with ``r_c`` the part of a
code's base mass that is the user's own purchases, ``Q_l`` weighs ``1 - r_c`` and the weights of repeats ``r_c``.

A prompt may be asked a second thing at the same token: the user's *interests*, the categories of the conversions to
come (the paper's second output). They are a tree of one level with base scores and a head of their own.

Shapes: B prompts, T tokens of a row (prompt, tree, padding), N decisions of one level, V codes of
that level, H hidden size, F history features, S = H + F what the head reads, D codebook dimension, K query tokens,
Y target advertisers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from data.errors import UserError
from data.rules import DROPOUT, NOT_NEGATIVE, POSITIVE, at_least, broken, check

HEAD_KINDS = ("tied", "free", "tied+free")


@dataclass(frozen=True)
class Decisions:
    """The choices of one level that a batch makes, and the targets' way through them.

    Attributes:
        row_N: prompt of each decision.
        position_N: token of that row whose hidden state decides.
        base_NV: base score of each code, ``-inf`` where illegal.
        target_node_Y: decision each target takes at this level; -1 where its prefix leaves one code only.
        target_code_Y: the code it takes there.
        repeat_NV: part of each code's base mass that is the user's own purchases, 0 to 1; None: no head asks for it.
    """

    row_N: Tensor
    position_N: Tensor
    base_NV: Tensor
    target_node_Y: Tensor
    target_code_Y: Tensor
    repeat_NV: Tensor | None = None

    def to(self, device: torch.device) -> Decisions:
        """The same on another device."""
        return Decisions(**{name: value.to(device) for name, value in vars(self).items() if value is not None})


@dataclass(frozen=True)
class InterestTargets:
    """The interests that the prompts of a batch are asked for, in order of the prompts.

    Attributes:
        levels: one entry, whose decisions are taken at the last token of each prompt.
        target_row_Y: prompt of each target; a prompt may be without any.
        target_weight_Y: share of the target among those of its prompt.
        n_prompts: prompts of the batch.
    """

    levels: list[Decisions]
    target_row_Y: Tensor
    target_weight_Y: Tensor
    n_prompts: int

    def to(self, device: torch.device) -> InterestTargets:
        """The same on another device."""
        levels = [level.to(device) for level in self.levels]
        return replace(
            self,
            levels=levels,
            target_row_Y=self.target_row_Y.to(device),
            target_weight_Y=self.target_weight_Y.to(device),
        )


@dataclass(frozen=True)
class TreeBatch:
    """Prompts with the trees of their targets.

    Attributes:
        user_B: whose prompts they are.
        period_B: as-of period of each.
        input_ids_BT: prompt, tree, padding; ID tokens are numbered after the base vocabulary.
        position_ids_BT: a tree token's position is its depth below the prompt's end.
        visible_BTT: True where a query token (second axis) sees a key token (third).
        levels: the decisions, one entry a level.
        target_row_Y: prompt of each target.
        target_weight_Y: 1 / number of targets of that prompt.
        interests: what else the prompts are asked for; None: nothing.
        history_BF: history vector of each; None: the forecaster has none.
    """

    user_B: Tensor
    period_B: Tensor
    input_ids_BT: Tensor
    position_ids_BT: Tensor
    visible_BTT: Tensor
    levels: list[Decisions]
    target_row_Y: Tensor
    target_weight_Y: Tensor
    interests: InterestTargets | None = None
    history_BF: Tensor | None = None

    @property
    def n_prompts(self) -> int:
        return self.input_ids_BT.shape[0]

    def to(self, device: torch.device) -> TreeBatch:
        """The batch on another device; Lightning calls it through ``transfer_batch_to_device``."""
        levels = [level.to(device) for level in self.levels]
        rest = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        interests = None if self.interests is None else self.interests.to(device)
        return replace(self, levels=levels, interests=interests, **rest)

    def states(self, hidden_BTH: Tensor, decisions: Decisions) -> Tensor:
        """What the head reads at decisions of these prompts, ``(N, S)``: hidden states, then history vectors.

        Args:
            hidden_BTH: hidden states of all tokens.
            decisions: of one level, or of the interests.
        """
        hidden_NH = hidden_BTH[decisions.row_N, decisions.position_N]
        return hidden_NH if self.history_BF is None else with_history(hidden_NH, self.history_BF[decisions.row_N])


def with_history(hidden_NH: Tensor, history_NF: Tensor) -> Tensor:
    """Hidden states and the history vectors beside them, as the head reads them, ``(N, S)``."""
    return torch.cat([hidden_NH.float(), history_NF], -1)


Targeted = TreeBatch | InterestTargets
"""Prompts with targets in one space: what a likelihood is taken of."""


@dataclass
class HeadConfig:
    """How hidden states become scores of codes.

    Attributes:
        kind: ``tied`` to the codebook, a ``free`` row a code, or ``tied+free``.
        learning_rate: of the head; the LoRA weights have their own.
        dropout: share of a standardised hidden state's features that are hidden from the head in training.
        period_learning_rate: of a free bias for each period and code, which takes up what all users of a period have
            in common (a fixed effect) while the LM is trained, and is thrown away after; 0 has none.
    """

    kind: str = "tied"
    learning_rate: float = 1e-3
    dropout: float = 0.1
    period_learning_rate: float = 1e-2

    def __post_init__(self) -> None:
        errors = broken(
            self,
            "prior.head",
            {"learning_rate": POSITIVE, "dropout": DROPOUT, "period_learning_rate": NOT_NEGATIVE},
        )
        if self.kind not in HEAD_KINDS:
            errors.append(
                UserError(
                    f"prior.head.kind={self.kind}",
                    expected=f"one of {', '.join(HEAD_KINDS)}",
                    action="set prior.head.kind to one of them",
                )
            )
        if errors:
            raise UserError.collect(errors)


@dataclass
class LoraSettings:
    """Low-rank adapters of the attention (LoRA, arXiv 2106.09685).

    Attributes:
        rank: rank; 0 trains the head alone.
        alpha: scale of the adapters.
        layers: adapt the last so many layers only, so that the gradient ends there; None adapts all.
        targets: names of the linear layers that are adapted.
        learning_rate: of the decoder's trained weights: adapters, an appended layer, or all of them.
    """

    rank: int = 16
    alpha: float = 32.0
    layers: int | None = None
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        check(
            self,
            "prior.lora",
            {
                "rank": at_least(0),
                "alpha": POSITIVE,
                "layers": at_least(1).or_null(),
                "learning_rate": POSITIVE,
            },
        )


class IdHead(nn.Module):
    """Scores of the codes of one level from hidden states; zero before training.

    A level whose vectors are all zero (the extra one that tells apart colliding IDs) has free rows whatever the
    kind: tied ones would be zero for good.

    Args:
        codebooks: vectors of each level's codes, ``(V_l, D)`` each.
        hidden_size: H.
        kind: see :class:`HeadConfig`.
        dropout: likewise.
        history_size: F; 0: it reads hidden states alone.
        repeats: read history vectors apart for what the user bought before; see :class:`HistoryHead`.

    Example:
        >>> head = IdHead([torch.randn(4, 8), torch.randn(6, 8)], hidden_size=16)
        >>> head(torch.randn(3, 16), level=1).shape
        torch.Size([3, 6])
    """

    def __init__(
        self,
        codebooks: list[Tensor],
        hidden_size: int,
        kind: str = "tied",
        *,
        dropout: float = 0.0,
        history_size: int = 0,
        repeats: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size, self.dropout = hidden_size, nn.Dropout(dropout)
        self.history: HistoryHead | None = None
        if history_size:
            self.history = HistoryHead(codebooks, history_size, kind, dropout=dropout, repeats=repeats)
        self.tied, self.free = "tied" in kind, "free" in kind
        self.n_levels, self.level_sizes = len(codebooks), [len(codes_VD) for codes_VD in codebooks]
        for level, codes_VD in enumerate(codebooks):
            # One length for all levels: residuals shrink with depth, the rate of learning should not.
            length = codes_VD.norm(dim=-1).mean().clamp_min(1e-8)
            self.register_buffer(f"codes_{level}", codes_VD.float() / length)
        self.projections = nn.ParameterList(
            nn.Parameter(torch.zeros(codes.shape[1], hidden_size)) for codes in codebooks if self.tied
        )
        self.rows = nn.ParameterDict(
            {
                str(level): nn.Parameter(torch.zeros(codes.shape[0], hidden_size))
                for level, codes in enumerate(codebooks)
                if self.free or not codes.any()
            }
        )
        self.register_buffer("mean_LH", torch.zeros(self.n_levels, hidden_size))
        self.register_buffer("scale_L", torch.ones(self.n_levels))

    def standardise_by(self, hidden_by_level: list[Tensor]) -> None:
        """Fix the mean and the scale that hidden states are standardised by.

        Args:
            hidden_by_level: hidden states of training prompts at each level's decisions, ``(N, H)`` each, or
                ``(N, S)``, of which the history has constants of its own; a level without any keeps those of the
                level before.
        """
        for level, hidden_NH in enumerate(hidden_by_level):
            source = hidden_NH[:, : self.hidden_size].float()
            if len(source) < 2:
                if level:
                    self.mean_LH[level], self.scale_L[level] = (
                        self.mean_LH[level - 1],
                        self.scale_L[level - 1],
                    )
                continue
            self.mean_LH[level] = source.mean(0)
            self.scale_L[level] = (source - self.mean_LH[level]).norm(dim=-1).mean().clamp_min(1e-6)

    mean_LH: Tensor
    scale_L: Tensor

    def affine(self, level: int) -> tuple[Tensor, Tensor]:
        """The scores of a level as a plain linear layer of the hidden state: ``(V, H)`` rows and ``(V,)`` biases.

        What the history vector adds is no part of them.
        """
        codes_VD = getattr(self, f"codes_{level}")
        rows_VH = codes_VD @ self.projections[level] if self.tied else torch.zeros(len(codes_VD), len(self.mean_LH[0]))
        if str(level) in self.rows:
            rows_VH = rows_VH + self.rows[str(level)]
        rows_VH = rows_VH / self.scale_L[level]
        return rows_VH, -rows_VH @ self.mean_LH[level]

    @property
    def reads_hidden(self) -> bool:
        """Whether any weight lets a hidden state change a score; where none does, none need be computed."""
        return any(bool(weight.any()) for weight in [*self.projections, *self.rows.values()])

    @property
    def repeats(self) -> bool:
        """Whether it asks what of a code is the user's own purchases."""
        return self.history is not None and self.history.repeat is not None

    def forward(self, state_NS: Tensor, level: int, repeat_NV: Tensor | None = None) -> Tensor:
        """Scores ``(N, V_level)`` in float32.

        Args:
            state_NS: hidden states, and history vectors after them; without those, or where a user bought nothing yet,
                the history says nothing.
            level: from 0.
            repeat_NV: part of each code that is the user's own purchases; None: nothing is. Read where
                :attr:`repeats`.
        """
        scores_NV, change_NV = self.apart(state_NS, level)
        return scores_NV if change_NV is None or repeat_NV is None else scores_NV + repeat_NV * change_NV

    def apart(self, state_NS: Tensor, level: int) -> tuple[Tensor, Tensor | None]:
        """Scores where nothing of a code is the user's own purchases, and what they change by where all of it is.

        Args:
            state_NS, level: as of :meth:`forward`.

        Returns:
            ``(N, V_level)`` each, in float32; the second is None where nothing is read apart.
        """
        hidden_NH, history_NF = state_NS[:, : self.hidden_size], state_NS[:, self.hidden_size :]
        unit_NH = self.dropout((hidden_NH.float() - self.mean_LH[level]) / self.scale_L[level])
        codes_VD = getattr(self, f"codes_{level}")
        scores_NV = torch.zeros(len(unit_NH), len(codes_VD), device=unit_NH.device)
        if self.tied:
            scores_NV = scores_NV + unit_NH @ self.projections[level].T @ codes_VD.T
        if str(level) in self.rows:
            scores_NV = scores_NV + unit_NH @ self.rows[str(level)].T
        if self.history is None or not history_NF.shape[1]:
            return scores_NV, None
        new_NV, change_NV = self.history.apart(history_NF, level)
        return scores_NV + new_NV, change_NV


class HistoryHead(IdHead):
    """The part of an :class:`IdHead` that reads history vectors; it says nothing of who bought nothing yet.

    With ``repeats`` it has two sets of weights. A taste lifts everybody who sells to it, but of whom a user buys from
    every week the counts know more: the weights of repeats learn how little it says of them.

    Args:
        codebooks, kind, dropout: as of :class:`IdHead`.
        history_size: F.
        repeats: have weights of their own for what the user bought before.
    """

    def __init__(
        self, codebooks: list[Tensor], history_size: int, kind: str, *, dropout: float, repeats: bool = False
    ) -> None:
        super().__init__(codebooks, history_size, kind, dropout=dropout)
        self.repeat = HistoryHead(codebooks, history_size, kind, dropout=dropout) if repeats else None

    def standardise_by(self, hidden_by_level: list[Tensor]) -> None:
        super().standardise_by(hidden_by_level)
        if self.repeat is not None:
            self.repeat.standardise_by(hidden_by_level)

    def freeze(self) -> None:
        """Leave its weights as they are, in training too."""
        self.requires_grad_(False)
        self.drop(0.0)

    def drop(self, share: float) -> None:
        """Hide so much of the vectors' features from it in training."""
        self.dropout.p = share
        if self.repeat is not None:
            self.repeat.drop(share)

    def apart(self, state_NS: Tensor, level: int) -> tuple[Tensor, Tensor | None]:
        """As of :meth:`IdHead.apart`; zeros where a history vector is."""
        new_NV = super().apart(state_NS, level)[0] * state_NS.any(-1, keepdim=True)
        return new_NV, None if self.repeat is None else self.repeat(state_NS, level) - new_NV


class PriorLM(nn.Module):
    """A decoder without its vocabulary head, input rows for the ID tokens, and the head over codes.

    Args:
        decoder: any Hugging Face decoder that takes a 4-D attention mask (``AutoModel``), LoRA already in it.
        codebooks: vectors of each level's codes.
        id_rows: input embedding of every ID token, all levels after one another, ``(sum V_l, H)``.
        first_id_token: number of the first ID token.
        head: kind of the head.
        dropout: of the head.
        train_input_rows: let the ID tokens' input rows learn. The gradient then goes through all layers.
        n_interests: categories that the second head scores; None: there is no second head.
        history_size: F, features of the history vectors that the heads read beside; 0: they read none.
        repeats: the head of advertisers reads them apart for what the user bought before.

    Raises:
        ValueError: input rows and codebooks disagree in number, or input rows and decoder in width.
    """

    def __init__(
        self,
        decoder: nn.Module,
        *,
        codebooks: list[Tensor],
        id_rows: Tensor,
        first_id_token: int,
        head: str = "tied",
        dropout: float = 0.0,
        train_input_rows: bool = False,
        n_interests: int | None = None,
        history_size: int = 0,
        repeats: bool = False,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.first_id_token = first_id_token
        if self.dtype == torch.bfloat16:
            # Else peft casts every activation to the adapters' float32 and back.
            for module in decoder.modules():
                if hasattr(module, "cast_input_dtype_enabled"):
                    setattr(module, "cast_input_dtype_enabled", False)  # noqa: B010
        expected = (sum(len(codes_VD) for codes_VD in codebooks), self.word_embedding.embedding_dim)
        if tuple(id_rows.shape) != expected:
            raise ValueError(f"{tuple(id_rows.shape)} input rows of ID tokens; codes and decoder ask {expected}")
        self.id_rows = nn.Embedding.from_pretrained(id_rows.float(), freeze=not train_input_rows)
        sizes: dict[str, Any] = {"hidden_size": id_rows.shape[1], "history_size": history_size, "dropout": dropout}
        self.head = IdHead(codebooks, kind=head, repeats=repeats, **sizes)
        self.interest_head: IdHead | None = None
        if n_interests is not None:  # categories have no codebook: a row each
            self.interest_head = IdHead([torch.zeros(n_interests, 1)], kind="free", **sizes)
        self.level_offset = [0]
        for codes_VD in codebooks[:-1]:
            self.level_offset.append(self.level_offset[-1] + len(codes_VD))

    @property
    def word_embedding(self) -> nn.Embedding:
        base: Any = getattr(self.decoder, "base_model", self.decoder)
        return base.get_input_embeddings()

    @property
    def dtype(self) -> torch.dtype:
        return self.word_embedding.weight.dtype

    def id_token(self, level: int, codes: Tensor) -> Tensor:
        """Token numbers of codes of one level."""
        return codes + self.first_id_token + self.level_offset[level]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input vectors of base tokens and of ID tokens."""
        is_id = input_ids >= self.first_id_token
        words = self.word_embedding(input_ids.masked_fill(is_id, 0))
        if not is_id.any():
            return words
        ids = self.id_rows((input_ids - self.first_id_token).clamp_min(0)).to(words.dtype)
        return torch.where(is_id[..., None], ids, words)

    @property
    def reads_prompt(self) -> bool:
        """Whether a prompt can change a forecast: not where training was not kept and every head is of zeros."""
        heads = (self.head, self.interest_head)
        return any(head is not None and head.reads_hidden for head in heads)

    def hidden(self, batch: TreeBatch) -> Tensor:
        """Last hidden states of all tokens, ``(B, T, H)``."""
        return self.run_decoder(
            inputs_embeds=self.embed(batch.input_ids_BT),
            attention_mask=self.additive_mask(batch.visible_BTT),
            position_ids=batch.position_ids_BT,
            use_cache=False,
        ).last_hidden_state

    def hidden_read(self, batch: TreeBatch) -> Tensor:
        """:meth:`hidden`, or zeros at no cost where no head reads it (:attr:`reads_prompt`): scores are the same."""
        if self.reads_prompt:
            return self.hidden(batch)
        width = self.id_rows.embedding_dim
        return torch.zeros(*batch.input_ids_BT.shape, width, device=batch.input_ids_BT.device)

    def extend(self, cache: DynamicCache, input_ids_BK: Tensor, position_ids_BK: Tensor, visible_BKT: Tensor) -> Tensor:
        """Hidden states of further tokens on top of what the cache holds, which grows by them.

        Args:
            cache: keys and values of the tokens before; empty for a prefill.
            input_ids_BK: the new tokens.
            position_ids_BK: their positions.
            visible_BKT: what each sees, among cached and new tokens.

        Returns:
            ``(B, K, H)``.
        """
        return self.run_decoder(
            inputs_embeds=self.embed(input_ids_BK),
            attention_mask=self.additive_mask(visible_BKT),
            position_ids=position_ids_BK,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def run_decoder(self, **inputs: Any) -> Any:
        """What the decoder gives; float32 adapters on a bfloat16 decoder multiply in bfloat16, as it does."""
        if self.dtype == torch.bfloat16:
            with torch.autocast(inputs["inputs_embeds"].device.type, dtype=self.dtype):
                return self.decoder(**inputs)
        return self.decoder(**inputs)

    def additive_mask(self, visible: Tensor) -> Tensor:
        """0 where visible and a very negative number elsewhere, with an axis for the attention heads."""
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        return mask.masked_fill(~visible, torch.finfo(self.dtype).min)[:, None]

    def log_probs(self, batch: TreeBatch, hidden_BTH: Tensor | None = None) -> list[Tensor]:
        """Log-probabilities of the codes at every decision, one ``(N, V)`` a level.

        Args:
            batch: prompts with trees.
            hidden_BTH: hidden states to use instead of computing them.
        """
        hidden = self.hidden(batch) if hidden_BTH is None else hidden_BTH
        return [
            (self.scores(batch.states(hidden, decisions), level, decisions) + decisions.base_NV).log_softmax(-1)
            for level, decisions in enumerate(batch.levels)
        ]

    def scores(self, state_NS: Tensor, level: int, decisions: Decisions) -> Tensor:
        """The head's scores at the decisions of a level, ``(N, V)``.

        Args:
            state_NS: what the head reads there, :meth:`TreeBatch.states`.
            level: from 0.
            decisions: of that level.
        """
        return self.head(state_NS, level, decisions.repeat_NV)

    def interest_log_probs(self, batch: TreeBatch, hidden_BTH: Tensor) -> list[Tensor]:
        """Log-probabilities of all interests of each prompt, as of :meth:`log_probs`.

        Args:
            batch: prompts that are asked for interests.
            hidden_BTH: hidden states of its tokens.

        Raises:
            ValueError: the batch asks for none, or the model has no head for them.
        """
        if self.interest_head is None or batch.interests is None:
            raise ValueError("a batch that asks for interests goes with a model that has a head for them")
        decisions = batch.interests.levels[0]
        logits_NV = self.interest_head(batch.states(hidden_BTH, decisions), 0)
        return [(logits_NV + decisions.base_NV).log_softmax(-1)]


def target_log_prob(batch: Targeted, log_probs: list[Tensor]) -> Tensor:
    """Log-probability of every target advertiser: the sum over its levels, ``(Y,)``.

    Args:
        batch: the decisions.
        log_probs: log-probabilities at the decisions, one ``(N, V)`` a level.
    """
    total_Y = torch.zeros(len(batch.target_row_Y), device=batch.target_weight_Y.device)
    for decisions, log_probs_NV in zip(batch.levels, log_probs, strict=True):
        decided = decisions.target_node_Y >= 0
        taken = log_probs_NV[decisions.target_node_Y[decided], decisions.target_code_Y[decided]]
        total_Y = total_Y.index_add(0, decided.nonzero()[:, 0], taken)
    return total_Y


def row_nll(batch: Targeted, log_prob_Y: Tensor) -> Tensor:
    """Negative log-likelihood of each prompt, the mean over its target advertisers, ``(B,)``."""
    weighted = -log_prob_Y * batch.target_weight_Y
    return torch.zeros(batch.n_prompts, device=weighted.device).index_add(0, batch.target_row_Y, weighted)


def mean_nll(batch: Targeted, log_prob_Y: Tensor) -> Tensor:
    """Mean of :func:`row_nll` over the prompts with targets; 0 where none has."""
    return row_nll(batch, log_prob_Y).sum() / batch.target_weight_Y.sum().clamp_min(1e-6)


HEADS = ("head.", "interest_head.")
"""What names of a model's state begin with where they are of a head."""


class PriorLMModule(L.LightningModule):
    """Fits a :class:`PriorLM` to the targets of its prompts.

    The loss of a prompt is the mean over its target advertisers of the exact negative log-likelihood
    over legal children, so a user with many conversions weighs as much as one with few.

    Args:
        model: the forecaster.
        lora_learning_rate: of the decoder's trainable weights.
        head_learning_rate: of the head and the input rows.
        total_steps: optimiser steps of the whole fit; the rate warms up over a tenth and falls as a cosine.
        prompts_per_batch: what a batch's sum over its prompts is divided by; None: its own number. Where batches
            differ in number, one divisor for all lets every prompt weigh the same.
        interest_weight: of the interests' NLL beside the advertisers'; 0 leaves their head untrained.
        periods: number of periods that have a bias of their own; 0: none has.
        period_learning_rate: of these biases.
        weight_decay: AdamW's.
    """

    strict_loading = False  # a checkpoint holds what was trained, not the base model

    def __init__(
        self,
        model: PriorLM,
        *,
        lora_learning_rate: float = 2e-4,
        head_learning_rate: float = 1e-3,
        total_steps: int = 100,
        prompts_per_batch: float | None = None,
        interest_weight: float = 0.0,
        periods: int = 0,
        period_learning_rate: float = 0.0,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.model = model
        self.rates = (lora_learning_rate, head_learning_rate, period_learning_rate)
        effects = bool(periods and period_learning_rate)
        sizes = model.head.level_sizes if effects else []
        self.period_PV = nn.ParameterList(nn.Parameter(torch.zeros(periods, size)) for size in sizes)
        self.interest_weight = interest_weight if model.interest_head is not None else 0.0
        sizes = model.interest_head.level_sizes if model.interest_head and effects and interest_weight else []
        self.interest_period_PV = nn.ParameterList(nn.Parameter(torch.zeros(periods, size)) for size in sizes)
        self.total_steps, self.weight_decay = max(1, total_steps), weight_decay
        self.prompts_per_batch = prompts_per_batch

    def training_step(self, batch: TreeBatch, batch_idx: int) -> Tensor:
        hidden_BTH = self.model.hidden(batch)
        log_probs = self.model.log_probs(self._with_period_effects(batch), hidden_BTH)
        nll_B = row_nll(batch, target_log_prob(batch, log_probs))
        base_B = row_nll(batch, base_log_prob(batch))
        self.log("train_nll", nll_B.detach().mean(), batch_size=batch.n_prompts)
        self.log("train_residual", (nll_B.detach() - base_B).mean(), batch_size=batch.n_prompts, prog_bar=True)
        return (nll_B.sum() + self._interest_loss(batch, hidden_BTH)) / (self.prompts_per_batch or batch.n_prompts)

    def _interest_loss(self, batch: TreeBatch, hidden_BTH: Tensor) -> Tensor:
        """The interests' part of the loss, summed over the prompts."""
        asked = batch.interests
        if asked is None or not self.interest_weight:
            return hidden_BTH.new_zeros(())
        with_effects = replace(asked, levels=_shifted(asked.levels, self.interest_period_PV, batch.period_B))
        log_probs = self.model.interest_log_probs(replace(batch, interests=with_effects), hidden_BTH)
        log_prob_Y = target_log_prob(asked, log_probs)
        self._log_interests("train", asked, log_prob_Y.detach())
        return self.interest_weight * row_nll(asked, log_prob_Y).sum()

    def _log_interests(self, step: str, asked: InterestTargets, log_prob_Y: Tensor) -> None:
        n_asked = max(1, round(float(asked.target_weight_Y.sum())))
        self.log(f"{step}_interest_nll", mean_nll(asked, log_prob_Y), batch_size=n_asked)
        residual = mean_nll(asked, log_prob_Y - base_log_prob(asked))
        self.log(f"{step}_interest_residual", residual, batch_size=n_asked)

    def _with_period_effects(self, batch: TreeBatch) -> TreeBatch:
        return replace(batch, levels=_shifted(batch.levels, self.period_PV, batch.period_B))

    def validation_step(self, batch: TreeBatch, batch_idx: int) -> None:
        hidden_BTH = self.model.hidden(batch)
        nll_B = row_nll(batch, target_log_prob(batch, self.model.log_probs(batch, hidden_BTH)))
        if batch.interests is not None and self.model.interest_head is not None:
            interest_log_probs = self.model.interest_log_probs(batch, hidden_BTH)
            self._log_interests("select", batch.interests, target_log_prob(batch.interests, interest_log_probs))
        residual_B = nll_B - row_nll(batch, base_log_prob(batch))
        self.log("select_nll", nll_B.mean(), batch_size=batch.n_prompts, prog_bar=True)
        self.log("select_residual", residual_B.mean(), batch_size=batch.n_prompts, prog_bar=True)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)

    def configure_optimizers(self) -> Any:
        lora = [p for p in self.model.decoder.parameters() if p.requires_grad]
        head = [p for p in self.model.head.parameters() if p.requires_grad]
        head += [p for p in self.model.id_rows.parameters() if p.requires_grad]
        if self.model.interest_head is not None and self.interest_weight:
            head += [p for p in self.model.interest_head.parameters() if p.requires_grad]
        effects = [*self.period_PV, *self.interest_period_PV]
        groups = [
            {"params": params, "lr": rate}
            for params, rate in zip((lora, head, effects), self.rates, strict=True)
            if params
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=self.weight_decay)
        warm_up = max(1, self.total_steps // 10)

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            done = min(1.0, (step - warm_up) / max(1, self.total_steps - warm_up))
            return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Trained weights and the head's constants; the frozen base stays where it came from."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state = super().state_dict(*args, **kwargs)
        return {
            name: value
            for name, value in state.items()
            if name in trained or name.removeprefix("model.").startswith(HEADS)
        }


def _shifted(levels: list[Decisions], period_PV: nn.ParameterList, period_B: Tensor) -> list[Decisions]:
    """Decisions with the period effects of each level in their base scores; as they are where there are no effects."""
    if not len(period_PV):
        return levels
    return [
        replace(decisions, base_NV=decisions.base_NV + effects_PV[period_B[decisions.row_N]])
        for decisions, effects_PV in zip(levels, period_PV, strict=True)
    ]


def base_log_prob(batch: Targeted) -> Tensor:
    """Log-probability of every target under the base scores alone, ``(Y,)``."""
    return target_log_prob(batch, [decisions.base_NV.log_softmax(-1) for decisions in batch.levels])


def weighted_log_softmax(
    base_NV: Tensor,
    base_exponent: Tensor | float,
    *,
    logit_NV: Tensor | None = None,
    lm_weight: Tensor | float = 1.0,
    bias_V: Tensor | None = None,
) -> Tensor:
    """Log-probabilities of a level's codes where base and logits are weighted, ``(N, V)``; ``-inf`` where illegal.

    Args:
        base_NV: base scores, ``-inf`` where illegal.
        base_exponent: weight of the base.
        logit_NV: the head's scores; None: without the LM.
        lm_weight: weight of the logits.
        bias_V: added to every code.
    """
    illegal_NV = ~base_NV.isfinite()
    score_NV = base_exponent * base_NV.masked_fill(illegal_NV, 0.0)
    if logit_NV is not None:
        score_NV = score_NV + lm_weight * logit_NV
    if bias_V is not None:
        score_NV = score_NV + bias_V
    return score_NV.masked_fill(illegal_NV, -torch.inf).log_softmax(-1)
