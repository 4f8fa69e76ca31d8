"""The history vector: all that a user bought, as one mean of code vectors, and how the head learns to read it.

A prompt has room for a few advertisers; a user of years has bought from hundreds. What the rest says of the next
purchase is not in any order of theirs, but in their sum: a mean of item embeddings forecasts well by itself (YouTube's
candidate generation, Covington et al. 2016, doi 10.1145/2959100.2959190). So the head reads such a mean beside the
hidden state:

    purchases of a ─► w_a = log(1 + Σ decay^ago) ─► Σ_a w_a · [z_1(c_1(a)); …; z_L(c_L(a))], of length one  =  u

with the RQ-VAE's code vectors ``z_l`` that the head itself is tied to, every level at one mean length. An advertiser
that shares codes with what a user bought gains, whoever bought it before; a new one too. The levels that only tell
colliding IDs apart have no vectors and no part in it. Several decays give several means, of what was bought last and of
what was ever bought, which the head reads after one another.

With ``categories`` the weights of the categories bought, from an advertiser or from none, stand beside each mean, at
length one too. With ``browsing`` so do those of the categories that the user visited, searched for, clicked or redeemed
a coupon for, and a user who browsed but never bought has a vector too.

With ``repeats`` the head reads the vector apart for what the user bought before: of each code it is given the part of
the anchor's mass that is the user's own purchases (`models.prior_lm.HistoryHead`).

The weights that read the vector are fitted first, on all user-periods of the fit span, which needs no LM and takes
about a minute; then they stay as they are, and the LM learns what is left. So its own share is told apart: forecasts
by anchor and history alone are a control of their own.

Shapes: B user-periods, F features, L levels with vectors, V codes and D features of a level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.log import Log
from data.tables import KINDS
from models.prior_lm import Decisions, HeadConfig, HistoryHead, PriorLM, TreeBatch
from priors.anchor import Counts
from priors.config import HistoryConfig, ProbeConfig
from priors.dataset import PromptDataset, TreeCollator
from priors.interests import in_place_of_advertisers, index_of_code
from priors.probe import LevelStates, fit_levels, in_batches, joined_states, levels_by_head
from semantic_ids.advertiser_ids import AdvertiserIds

_AT_ONCE = 64
"""Prompts of a batch."""
_PATIENCE = 3
"""Passes without a gain after which a level is left."""


@dataclass(frozen=True)
class Categories:
    """Names of the categories that history vectors tell beside the mean of code vectors.

    Attributes:
        bought: of purchases.
        browsed: of visits, searches, clicks and coupons (`data.log.Log.is_browsing`).
    """

    bought: tuple[str, ...] = ()
    browsed: tuple[str, ...] = ()

    @classmethod
    def of(cls, log: Log, cfg: HistoryConfig) -> Categories:
        """Those that a config tells, of the events that a forecaster is fitted and chosen by."""
        known_N = log.events.period <= log.split.prior_select[1]

        def named(rows_N: NDArray[np.bool_]) -> tuple[str, ...]:
            seen = np.unique(log.events.category[rows_N & known_N])
            return tuple(log.category_names[code] for code in seen if code > 0)

        return cls(
            bought=named(log.is_purchase) if cfg.prompts and cfg.categories else (),
            browsed=named(log.is_browsing) if cfg.prompts and cfg.browsing else (),
        )

    def __len__(self) -> int:
        return len(self.bought) + len(self.browsed)


NO_CATEGORIES = Categories()


@dataclass(frozen=True)
class _Told:
    """One kind of thing that a user's events are of, and the vectors that tell it.

    Attributes:
        counts: events by user, period and thing; the purchases of `Counts`.
        levels: of each level with vectors the things' codes and the codes' vectors; None: every thing is a feature of
            its own.
    """

    counts: Counts
    levels: list[tuple[NDArray[np.int64], NDArray[np.float64]]] | None

    @classmethod
    def advertisers(cls, counts: Counts, ids: AdvertiserIds) -> _Told:
        """The advertisers of the purchases, by their codes."""
        levels = []
        for level, vectors_VD in enumerate(ids.code_vectors):
            if vectors_VD.any():
                length = np.linalg.norm(vectors_VD, axis=1).mean()
                levels.append((ids.codes_AL[:, level], vectors_VD.astype(np.float64) / length))
        return cls(counts, levels)

    @classmethod
    def categories(cls, log: Log, names: Sequence[str], told_N: NDArray[np.bool_]) -> _Told:
        """The categories of some of the events; others than ``names`` are as if missing."""
        category_N = index_of_code(log.category_names, names)[log.events.category]
        as_advertisers = in_place_of_advertisers(log, np.where(told_N, category_N, -1), len(names))
        return cls(Counts.of(replace(as_advertisers, label_kinds=tuple(range(len(KINDS))))), None)

    def vectors(
        self, user_B: NDArray[np.integer], period_B: NDArray[np.integer], decays: Sequence[float]
    ) -> Iterator[NDArray[np.float32]]:
        """Of each decay what weights ``log(1 + Σ decay^ago)`` add up to, at length one."""
        n, n_things, counts = len(user_B), self.counts.n_advertisers, self.counts
        row_R, index_R, ago_R = counts.history(np.asarray(user_B, np.int64), np.asarray(period_B, np.int64))
        pair_R = row_R * n_things + counts.advertiser_R[index_R]
        pair_P, place_R = np.unique(pair_R, return_inverse=True)
        row_P, thing_P = np.divmod(pair_P, n_things)
        for decay in decays:
            weight_P = np.log1p(np.bincount(place_R, counts.count_R[index_R] * decay**ago_R))
            sum_BF = self._sum(weight_P, row_P, thing_P, n)
            length_B1 = np.linalg.norm(sum_BF, axis=1, keepdims=True)
            yield np.divide(sum_BF, length_B1, out=np.zeros_like(sum_BF), where=length_B1 > 1e-9).astype(np.float32)

    def _sum(
        self, weight_P: NDArray[np.float64], row_P: NDArray[np.int64], thing_P: NDArray[np.int64], n: int
    ) -> NDArray[np.float64]:
        """What things P of rows P weigh, as one vector a row."""

        def weights(code_P: NDArray[np.int64], size: int) -> NDArray[np.float64]:
            weight_C = np.bincount(row_P * size + code_P, weight_P, minlength=n * size)
            return weight_C.astype(np.float64, copy=False).reshape(n, size)

        if self.levels is None:
            return weights(thing_P, self.counts.n_advertisers)
        parts = [weights(codes_A[thing_P], len(vectors_VD)) @ vectors_VD for codes_A, vectors_VD in self.levels]
        return np.concatenate(parts, axis=1) if parts else np.zeros((n, 0))


class HistoryVectors:
    """History vectors of users at the start of periods.

    Args:
        counts: purchases by user, period and advertiser.
        ids: codes of the advertisers and the codes' vectors.
        decays: by which a purchase's weight falls a period; each gives a mean of its own.
        log: whose events have categories; not read where no category is told.
        categories: those that are told; as of `Categories.of`, or those that a forecaster was fitted on.

    Raises:
        ValueError: categories without a log.
    """

    def __init__(
        self,
        counts: Counts,
        ids: AdvertiserIds,
        *,
        decays: Sequence[float],
        log: Log | None = None,
        categories: Categories = NO_CATEGORIES,
    ) -> None:
        if log is None and len(categories):
            raise ValueError(f"{len(categories)} categories to tell, and no log whose events have any")
        self.decays, self.categories = tuple(decays), categories
        self._parts = [_Told.advertisers(counts, ids)]
        if log is not None and categories.bought:
            self._parts.append(_Told.categories(log, categories.bought, log.is_purchase))
        if log is not None and categories.browsed:
            self._parts.append(_Told.categories(log, categories.browsed, log.is_browsing))
        self.size = history_size(ids, self.decays, categories)

    def __call__(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        """Vectors, of length one for each part and decay, ``(B, F)``; zeros where nothing was done before."""
        vectors = [vector_BF for part in self._parts for vector_BF in part.vectors(user_B, period_B, self.decays)]
        return np.concatenate(vectors, axis=1)


def history_size(ids: AdvertiserIds, decays: Sequence[float], categories: Categories = NO_CATEGORIES) -> int:
    """F of a vector of these decays and categories."""
    of_codes = sum(vectors_VD.shape[1] for vectors_VD in ids.code_vectors if vectors_VD.any())
    return len(decays) * (of_codes + len(categories))


def fit_history(
    model: PriorLM,
    train: PromptDataset,
    select: PromptDataset,
    collator: TreeCollator,
    cfg: HistoryConfig,
    head: HeadConfig,
    *,
    seed: int,
) -> dict[str, Any]:
    """Fit what the heads read in the history vectors, level by level; afterwards it is frozen.

    Args:
        model: whose heads are fitted in place.
        train: user-periods of the fit span.
        select: user-periods of the selection span, that choose each level's epoch.
        collator: makes the decisions, over the anchor's scores.
        cfg: passes, rates.
        head: rate of the period effects.
        seed: of the order of the decisions.

    Returns:
        As of :func:`priors.probe.fit_probe`.
    """
    of_train, of_select = (_readers(model, history_states(dataset, collator)) for dataset in (train, select))
    for reader, levels in of_train:
        reader.drop(cfg.dropout)
        reader.standardise_by([level.state_RS[level.state_RS.any(-1)] for level in levels])
    probe = ProbeConfig(epochs=cfg.epochs, weight_decay=cfg.weight_decay, batch_size=cfg.batch_size)
    rates = HeadConfig(learning_rate=cfg.learning_rate, period_learning_rate=head.period_learning_rate)
    select_levels = [levels for _, levels in of_select]
    report = fit_levels(of_train, select_levels, probe, rates, seed=seed, patience=_PATIENCE)
    freeze_history(model)
    return report


def freeze_history(model: PriorLM) -> None:
    """Leave what the heads read in the history vectors as it is, in training too."""
    for head in (model.head, model.interest_head):
        if head is not None and head.history is not None:
            head.history.freeze()


def forget_history(model: PriorLM) -> None:
    """Weights of zeros where the head of advertisers reads history vectors, free to learn once more."""
    if model.head.history is not None:
        for weight in model.head.history.parameters():
            torch.nn.init.zeros_(weight).requires_grad_(True)


def history_states(dataset: PromptDataset, collator: TreeCollator) -> list[LevelStates]:
    """All decisions of some prompts, where the head reads history vectors alone; as of `priors.probe.read_states`."""

    def read(batch: TreeBatch) -> Callable[[Decisions], tuple[Tensor, Tensor]]:
        if batch.history_BF is None:
            raise ValueError("prompts without history vectors: their compiler has none")
        history_BF = batch.history_BF
        return lambda decisions: (history_BF, decisions.row_N)

    rows = list(range(len(dataset)))
    return joined_states(in_batches(dataset, collator, rows=rows, batch_size=_AT_ONCE), read)


def _readers(model: PriorLM, states: list[LevelStates]) -> list[tuple[HistoryHead, list[LevelStates]]]:
    """What reads the history in each head of a model, with its part of the decisions."""
    return [(head.history, part) for head, part in levels_by_head(model, states) if head.history is not None]
