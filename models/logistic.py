"""Logistic regression: a weight an id and a weight a number, the floor under every ranker.

What a ranker gains over it, it gains by interactions. It has one task: there is nothing in it that tasks could share.

    sparse ─► EmbeddingBagCollection of weights ─► sum ─┐
                                                        ├─► logit
    dense  ─► Linear ───────────────────────────────────┘

Shapes: B rows, N dense features, F sparse features, W lanes of a weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.pointwise import SparseTable, check_sizes, embedding_bags, start_at_

LANES = 4
"""FBGEMM's kernels want rows in multiples of four numbers; an id's weight is their sum."""


class LogisticRegression(nn.Module):
    """Sparse and dense features to one logit a row, without interactions.

    Args:
        tables: tables and the features that use them; each id has one weight a table.
        n_dense: number N of dense features, at least one.
        base_rate: share of rows that convert; the untrained model's logit is its log-odds.

    Raises:
        ValueError: no dense feature, or the base rate is no probability strictly inside (0, 1).

    Example:
        >>> floor = LogisticRegression([SparseTable("ad", 100, ("ad",))], n_dense=3, base_rate=0.5)
        >>> sparse = KeyedJaggedTensor(keys=["ad"], values=torch.tensor([7, 42]), lengths=torch.tensor([1, 1]))
        >>> floor(torch.zeros(2, 3), sparse).tolist()
        [[0.0], [0.0]]
    """

    def __init__(self, tables: Sequence[SparseTable], *, n_dense: int, base_rate: float = 0.5) -> None:
        super().__init__()
        check_sizes("a logistic regression", [], n_dense=n_dense)
        self.weights = embedding_bags(tables, LANES)
        self.dense = nn.Linear(n_dense, 1)
        with torch.no_grad():
            for parameter in (*self.weights.parameters(), self.dense.weight):
                parameter.zero_()
        start_at_(self.dense.bias, base_rate)

    def forward(self, dense_BN: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Logits of a batch.

        Args:
            dense_BN: standardised dense features, float32.
            sparse: one bag of row numbers a row and key; the keys are those of ``tables``, in any order.

        Returns:
            Log-odds of a conversion, shape ``(B, 1)``.
        """
        weight_BFW = self.weights(sparse).values()
        return self.dense(dense_BN) + weight_BFW.sum(-1, keepdim=True)
