"""Prompts with their target advertisers, and how they become tree batches.

Several targets of one prompt share prefixes, so each distinct prefix is one token. A prefix that only
one advertiser continues decides nothing and is left out:

    targets  (7, 2, 5), (7, 2, 9), (4, 0, 1)     decisions: root; after 7; after 7 2
    tokens   <prompt…> <adv_1_7> <adv_2_2>       (4, …) is a single path: its token is not needed

Shapes: B prompts, T tokens, A advertisers, L levels, Y targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from data.errors import UserError
from data.log import Targets
from models.prior_lm import Decisions, TreeBatch
from priors.anchor import TunedAnchor
from priors.interests import Interests
from priors.prompt import Prompt, PromptCompiler


@dataclass(frozen=True)
class Example:
    """One prompt and what it is asked for.

    Attributes:
        user: whose anchor is the base.
        period: the as-of time is its start.
        token_ids: the prompt.
        targets: distinct advertisers converted with in the period.
        history_F: the history vector read beside the prompt; None: the forecaster has none.
    """

    user: int
    period: int
    token_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    history_F: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)


class PromptDataset(Dataset[Example]):
    """Examples of the rows of some targets, compiled when asked for.

    Args:
        targets: user-periods and their advertisers.
        compiler: writes the prompts.
        max_targets: of more targets so many are drawn; None keeps all.
        seed: of that draw, which depends on the row alone.
        prompt_of: user whose prompt is shown, for the control that reads another user's; None: one's own.
    """

    def __init__(
        self,
        targets: Targets,
        compiler: PromptCompiler,
        *,
        max_targets: int | None = None,
        seed: int = 0,
        prompt_of: NDArray[np.integer] | None = None,
    ) -> None:
        self.targets, self.compiler, self.max_targets, self.seed = targets, compiler, max_targets, seed
        self.prompt_of = targets.user if prompt_of is None else prompt_of

    def __len__(self) -> int:
        return len(self.targets.user)

    def __getitem__(self, row: int) -> Example:
        period = int(self.targets.period[row])
        wanted = self.targets.item[self.targets.ptr[row] : self.targets.ptr[row + 1]].astype(np.int64)
        if self.max_targets is not None and len(wanted) > self.max_targets:
            wanted = np.random.default_rng((self.seed, row)).choice(wanted, self.max_targets, replace=False)
        prompt = self.compiler.compile(int(self.prompt_of[row]), period)
        return Example(int(self.targets.user[row]), period, prompt.token_ids, np.sort(wanted), prompt.history_F)


def history_of(read: Sequence[Prompt | Example]) -> torch.Tensor | None:
    """History vectors of some prompts, ``(B, F)``; None where they have none.

    Raises:
        ValueError: some have one and some have none.
    """
    vectors = [one.history_F for one in read if one.history_F is not None]
    if vectors and len(vectors) < len(read):
        raise ValueError(f"{len(vectors)} of {len(read)} prompts with a history vector: all or none have one")
    return torch.from_numpy(np.stack(vectors)) if vectors else None


@dataclass
class _Choices:
    """The decisions of one level while a batch is built, as of :class:`~models.prior_lm.Decisions`."""

    row: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    node: list[int] = field(default_factory=list)
    target_node: list[int] = field(default_factory=list)
    target_code: list[int] = field(default_factory=list)

    def add(self, row: int, position: int, node: int) -> int:
        """Number of a new decision."""
        self.row.append(row)
        self.position.append(position)
        self.node.append(node)
        return len(self.row) - 1


class TreeCollator:
    """Builds :class:`~models.prior_lm.TreeBatch` from examples.

    Args:
        base: scores that the LM's logits are added to, and the trie.
        first_id_token: number of the first ID token.
        interests: what else the prompts are asked for; None: nothing.
        repeats: tell of each code what part of it is the user's own purchases.
    """

    def __init__(
        self,
        base: TunedAnchor,
        *,
        first_id_token: int,
        interests: Interests | None = None,
        repeats: bool = False,
    ) -> None:
        self.base, self.trie, self.interests, self.repeats = base, base.trie, interests, repeats
        self.id_offset = first_id_token + np.concatenate([[0], np.cumsum(self.trie.level_sizes[:-1])])
        # A prefix decides something if more than one advertiser lies below it.
        self._decides = [np.diff(self.trie.child_ptr[depth]) > 1 for depth in range(self.trie.n_levels)]
        self._has_decision = [np.diff(self.trie.leaf_ptr[depth]) > 1 for depth in range(self.trie.n_levels)]

    def length(self, example: Example) -> int:
        """Tokens of one row before padding: the prompt's and the tree's."""
        return len(example.token_ids) + len(self._tree(example.targets))

    def __call__(self, examples: Sequence[Example]) -> TreeBatch:
        """One batch.

        Raises:
            UserError: an example has no target.
        """
        trie, n_levels = self.trie, self.trie.n_levels
        user = np.array([example.user for example in examples])
        period = np.array([example.period for example in examples])
        for example in examples:
            if not len(example.targets):
                raise UserError(
                    f"a prompt without a target: user {example.user}, period {example.period}",
                    expected="at least one advertiser converted with",
                    action="leave out user-periods without a conversion",
                )
        whole_BA, own_BA = self.base.anchor.parts(user, period)
        scores = self.base.scores_of(whole_BA)
        repeats = self.base.shares_of(whole_BA, own_BA) if self.repeats else [None] * n_levels
        trees = [self._tree(example.targets) for example in examples]
        length = max(len(example.token_ids) + len(tree) for example, tree in zip(examples, trees, strict=True))

        input_ids = np.zeros((len(examples), length), dtype=np.int64)
        positions = np.zeros_like(input_ids)
        visible = np.zeros((len(examples), length, length), dtype=bool)
        visible[:, np.arange(length), np.arange(length)] = True  # padding sees itself: no empty softmax
        decisions = [_Choices() for _ in range(n_levels)]
        for row, (example, tree) in enumerate(zip(examples, trees, strict=True)):
            n_prompt = len(example.token_ids)
            input_ids[row, :n_prompt] = example.token_ids
            positions[row, :n_prompt] = np.arange(n_prompt)
            visible[row, :n_prompt, :n_prompt] = np.tri(n_prompt, dtype=bool)
            place = {(0, 0): n_prompt - 1}
            for token, (depth, node) in enumerate(tree, n_prompt):
                place[depth, node] = token
                input_ids[row, token] = self.id_offset[depth - 1] + trie.child_code[depth - 1][node]
                positions[row, token] = n_prompt + depth - 1
                above = place[depth - 1, int(trie.parent[depth - 1][node])]
                visible[row, token, : token + 1] |= visible[row, above, : token + 1]
            index: dict[tuple[int, int], int] = {}
            for depth, node in [(0, 0), *tree]:
                if depth < n_levels and self._decides[depth][node]:
                    index[depth, node] = decisions[depth].add(row, place[depth, node], node)
            for path in trie.path_AL[example.targets].tolist():
                for depth, (above, node) in enumerate(zip([0, *path], path, strict=False)):
                    decisions[depth].target_node.append(index.get((depth, above), -1))
                    decisions[depth].target_code.append(int(trie.child_code[depth][node]))
        n_targets = np.array([len(example.targets) for example in examples])
        ends = [len(example.token_ids) - 1 for example in examples]
        return TreeBatch(
            user_B=torch.from_numpy(user),
            period_B=torch.from_numpy(period),
            input_ids_BT=torch.from_numpy(input_ids),
            position_ids_BT=torch.from_numpy(positions),
            visible_BTT=torch.from_numpy(visible),
            levels=[
                self._decisions(depth, scores[depth], repeats[depth], decisions[depth]) for depth in range(n_levels)
            ],
            target_row_Y=torch.from_numpy(np.repeat(np.arange(len(examples)), n_targets)),
            target_weight_Y=torch.from_numpy(np.repeat(1.0 / n_targets, n_targets).astype(np.float32)),
            interests=None if self.interests is None else self.interests.asked(user, period, ends),
            history_BF=history_of(examples),
        )

    def _decisions(self, depth: int, scores_BN: NDArray, repeat_BN: NDArray | None, choices: _Choices) -> Decisions:
        row_N, node_N = np.array(choices.row, dtype=np.int64), np.array(choices.node, dtype=np.int64)
        return Decisions(
            row_N=torch.from_numpy(row_N),
            position_N=torch.tensor(choices.position, dtype=torch.long),
            base_NV=self._of_codes(depth, scores_BN, row_N, node_N, illegal=-np.inf),
            target_node_Y=torch.tensor(choices.target_node, dtype=torch.long),
            target_code_Y=torch.tensor(choices.target_code, dtype=torch.long),
            repeat_NV=None if repeat_BN is None else self._of_codes(depth, repeat_BN, row_N, node_N, illegal=0.0),
        )

    def _tree(self, targets: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Prefixes (depth, node) that need a token, parents before children."""
        trie = self.trie
        return [
            (depth, int(node))
            for depth in range(1, trie.n_levels)
            for node in np.unique(trie.path_AL[targets, depth - 1])
            if self._has_decision[depth][node]
        ]

    def _of_codes(
        self, depth: int, value_BN: NDArray, row_N: NDArray, node_N: NDArray, *, illegal: float
    ) -> torch.Tensor:
        """What nodes have, for each code at prefixes of one depth, ``(N, V)``; ``illegal`` where it leads nowhere."""
        trie = self.trie
        value_NV = np.full((len(node_N), trie.level_sizes[depth]), illegal, dtype=np.float32)
        start_N, stop_N = trie.child_ptr[depth][node_N], trie.child_ptr[depth][node_N + 1]
        count_N = stop_N - start_N
        decision_C = np.repeat(np.arange(len(node_N)), count_N)
        child_C = np.arange(count_N.sum()) - np.repeat(np.cumsum(count_N) - count_N, count_N) + start_N[decision_C]
        value_NV[decision_C, trie.child_code[depth][child_C]] = value_BN[row_N[decision_C], child_C]
        return torch.from_numpy(value_NV)
