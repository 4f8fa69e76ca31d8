"""Interests: the categories of the conversions to come, the second thing that a forecaster is asked (arXiv 2605.27856).

    category of every ad ─► the log with categories in place of advertisers ─► counts, anchor, targets
                                                                             ─► a trie of one level

What counts, tunes and decodes advertisers is given that log and that trie, so nothing of it is written twice. The
decision is taken at the prompt's last token, where level 1 of an advertiser's ID is decided too: it costs a product
with one row a category, and no token.

``P(c | u, t)`` is the share of category ``c`` among the conversions of user ``u`` in ``(t, t + window]`` whose ad has a
category, given that there is one.

Shapes: B user-periods, C categories, I ads, Y targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.artifacts import to_plain
from data.errors import UserError
from data.log import Log, Targets
from models.prior_lm import Decisions, InterestTargets, PriorLM
from priors.anchor import Anchor, Counts, TunedAnchor
from priors.calibration import Calibration, fit_anchor_levels
from priors.config import AUTO, AnchorConfig, InterestConfig
from priors.constants import choose_constants
from semantic_ids.trie import Trie

TOP_INTERESTS = 5
"""Interests that a forecast lists, as many as the paper's."""
_USUAL = "category"
_BATCH = 64


def interest_column(log: Log, cfg: InterestConfig) -> str | None:
    """The ads' column whose values are interests; None where there are none to forecast.

    ``auto`` takes ``category`` where the data config opens it and it has at least two values, and nothing elsewhere.

    Raises:
        UserError: a column is named that the data config does not open, or that has fewer than two values.
    """
    if cfg.column is None:
        return None
    usable = [name for name in log.ad_features if len(log.ad_vocabularies[name]) > 2]  # the first is for missing
    if cfg.column == AUTO:
        return _USUAL if _USUAL in usable else None
    if cfg.column not in usable:
        raise UserError(
            f"prior.interests.column={cfg.column}",
            expected=f"a column of data.ad_columns with at least two values: {', '.join(usable) or 'there is none'}",
            action="name one of them, add the column to data.ad_columns, or set prior.interests.column=null",
        )
    return cfg.column


def index_of_code(vocabulary: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Of each code of a vocabulary, whose first is for none, its place among names; -1 where it is not there."""
    place = {name: index for index, name in enumerate(names)}
    return np.array([-1, *(place.get(name, -1) for name in vocabulary[1:])], dtype=np.int64)


def in_place_of_advertisers(log: Log, thing_N: NDArray[np.integer], n_things: int) -> Log:
    """The log with the thing of each event, -1 for none, where its advertiser was; running ads are of none of them."""
    events = replace(log.events, advertiser=thing_N.astype(np.int32))
    of_none_I = np.full_like(log.ad_advertiser, -1)
    return replace(log, events=events, advertiser_ids=np.arange(n_things), ad_advertiser=of_none_I)


@dataclass(frozen=True)
class InterestSpace:
    """The categories, and what a log says of them.

    Attributes:
        column: the ads' column that they are of.
        names: the categories.
        interest_I: category of each ad, -1 for none.
        counts: conversions and purchases by category.
        targets: categories converted with, by user and period.
    """

    column: str
    names: tuple[str, ...]
    interest_I: NDArray[np.int64]
    counts: Counts
    targets: Targets

    @classmethod
    def of(cls, log: Log, column: str, names: Sequence[str] | None = None) -> InterestSpace:
        """The space of a log.

        Args:
            log: the events.
            column: one of ``log.ad_features``.
            names: the categories, where a forecaster was fitted on them; others than these are then as if missing.
                None: all of the column.

        Raises:
            UserError: the log has no such column.
        """
        if column not in log.ad_features:
            raise UserError(
                f"a log without the ads' column {column}, of which the forecaster's interests are",
                expected=f"{column} among data.ad_columns",
                action=f"add {column} to data.ad_columns, or fit the forecaster anew: train.py stage=prior",
            )
        vocabulary = log.ad_vocabularies[column]
        names = tuple(vocabulary[1:] if names is None else names)
        interest_I = index_of_code(vocabulary, names)[log.ad_features[column]]
        ad = log.events.ad
        of_event = np.where(ad >= 0, interest_I[np.maximum(ad, 0)], -1) if len(interest_I) else np.full(len(ad), -1)
        view = in_place_of_advertisers(log, of_event, len(names))
        last = int(log.events.period.max(initial=1))
        return cls(column, names, interest_I, Counts.of(view), view.advertiser_targets((1, max(1, last))))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def trie(self) -> Trie:
        """The categories as IDs of one code."""
        return Trie.from_codes(np.arange(len(self))[:, None], (len(self),))

    def targets_of(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> Targets:
        """Categories that users converted with in periods; a row may be without any.

        Returns:
            One row a user and period, in their order.
        """
        known, span = self.targets, max(int(self.targets.period.max(initial=0)), int(np.max(period_B, initial=0))) + 1
        key_R = known.user.astype(np.int64) * span + known.period
        key_B = np.asarray(user_B, np.int64) * span + period_B
        row_B = np.searchsorted(key_R, key_B)
        found_B = np.append(key_R, -1)[row_B] == key_B
        some = known.select(row_B[found_B])
        sizes_B = np.zeros(len(key_B), np.int64)
        sizes_B[found_B] = np.diff(some.ptr)
        return Targets(
            user=np.asarray(user_B, np.int32),
            period=np.asarray(period_B, np.int32),
            market=np.full(len(key_B), -1, np.int32),
            ptr=np.concatenate([[0], np.cumsum(sizes_B)]),
            item=some.item,
            weight=some.weight,
            value=some.value,
        )


@dataclass(frozen=True)
class Interests:
    """A forecaster of interests, but for the LM's head.

    Attributes:
        space: the categories.
        base: the tuned anchor over them.
        calibration: weights of the head's scores and of the anchor's.
    """

    space: InterestSpace
    base: TunedAnchor
    calibration: Calibration

    @classmethod
    def untuned(cls, space: InterestSpace, anchor: Anchor) -> Interests:
        """The counting model as it is."""
        return cls(space, TunedAnchor.untuned(anchor, space.trie), Calibration.identity(1))

    def asked(
        self, user_B: NDArray[np.integer], period_B: NDArray[np.integer], end_B: Sequence[int]
    ) -> InterestTargets:
        """What prompts are asked for.

        Args:
            user_B, period_B: of the prompts.
            end_B: last token of each prompt in its row.
        """
        targets = self.space.targets_of(user_B, period_B)
        row_Y = torch.from_numpy(targets.row)
        decisions = Decisions(
            row_N=torch.arange(len(user_B)),
            position_N=torch.tensor(list(end_B), dtype=torch.long),
            base_NV=torch.from_numpy(self.base.child_scores(user_B, period_B)[0].astype(np.float32)),
            target_node_Y=row_Y,
            target_code_Y=torch.from_numpy(targets.item.astype(np.int64)),
        )
        return InterestTargets([decisions], row_Y, torch.from_numpy(shares(targets).astype(np.float32)), len(user_B))

    @torch.inference_mode()
    def log_probs(
        self, model: PriorLM, end_BH: Tensor, user_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities of all interests.

        Args:
            model: the LM.
            end_BH: hidden state at the end of each prompt.
            user_B, period_B: whose prompts they are, and as of when.

        Returns:
            The forecast's and the anchor's, ``(B, C)`` each, in float64; the exponentials of a row sum to 1.
        """
        base_BC = torch.from_numpy(self.base.child_scores(user_B, period_B)[0]).to(end_BH.device)
        score_BC = self.calibration.base_exponent[0] * base_BC
        if model.interest_head is not None:
            score_BC = score_BC + self.calibration.lm_weight[0] * model.interest_head(end_BH, 0).double()
        return score_BC.log_softmax(-1), base_BC.log_softmax(-1)

    def to_plain(self) -> dict[str, Any]:
        """Plain types for ``prior.json``."""
        return {
            "column": self.space.column,
            "names": list(self.space.names),
            "anchor": self.base.to_plain(),
            "calibration": to_plain(self.calibration),
        }

    @classmethod
    def from_plain(cls, plain: dict[str, Any], log: Log) -> Interests:
        """Back from :meth:`to_plain`.

        Raises:
            UserError: the log has no such column.
        """
        space = InterestSpace.of(log, plain["column"], plain["names"])
        base = TunedAnchor.from_plain(plain["anchor"], space.counts, space.trie)
        return cls(space, base, Calibration.from_plain(plain["calibration"]))


def shares(targets: Targets) -> NDArray[np.float64]:
    """Share of each target among the conversions of its row, ``(T,)``."""
    total_R = np.bincount(targets.row, targets.weight, minlength=len(targets))
    return targets.weight / total_R[targets.row]


def fit_interest_anchor(
    space: InterestSpace, train: Targets, select: Targets, cfg: AnchorConfig
) -> tuple[Interests, dict[str, Any]]:
    """The tuned anchor of the interests, made as the advertisers' is.

    Args:
        space: the categories.
        train: user-periods whose interests the biases are fitted on.
        select: user-periods that constants and exponents are chosen on.
        cfg: terms and grid of the advertisers' anchor.

    Returns:
        Interests without a head's say, and the trials.

    Raises:
        UserError: no conversion of the selection rows has a category.
    """
    chosen_on = space.targets_of(select.user, select.period)
    chosen_on = chosen_on.select(np.diff(chosen_on.ptr) > 0)
    if not len(chosen_on):
        raise UserError(
            f"prior.interests.column={space.column}, which no converted ad of data.split.prior_select has",
            expected="categories of conversions to choose by",
            action="name another column, or set prior.interests.column=null",
        )
    chosen = choose_constants(space.counts, chosen_on, cfg, share_T=shares(chosen_on))
    metrics: dict[str, Any] = {**chosen.to_plain(), "anchor_level_trials": []}
    untuned = Interests.untuned(space, Anchor(space.counts, chosen.constants))
    if cfg.kind == "none":
        return replace(untuned, base=TunedAnchor.uniform(untuned.base.anchor, space.trie)), metrics

    def questions(rows: Targets) -> list[InterestTargets]:
        parts = (slice(start, start + _BATCH) for start in range(0, len(rows), _BATCH))
        return [untuned.asked(rows.user[part], rows.period[part], [0] * len(rows.user[part])) for part in parts]

    learned_on = space.targets_of(train.user, train.period)
    learned_on = learned_on.select(np.diff(learned_on.ptr) > 0)
    if not len(learned_on):
        return untuned, metrics
    exponent, bias, level_trials = fit_anchor_levels(questions(learned_on), questions(chosen_on), cfg.bias_penalty)
    base = TunedAnchor(untuned.base.anchor, space.trie, exponent, bias)
    return replace(untuned, base=base), metrics | {"anchor_level_trials": level_trials}
