"""DeepFM: a factorisation machine and an MLP over the same embeddings, added up.

The factorisation machine takes the first order (a weight an id and number) and the second (the dot product
of every pair of features) without any hidden layer; the MLP takes what is beyond.

    sparse ─► SparseArch ─► (B, F, D) ─┬─► FM: pairs ──────┐
    dense  ─► DenseArch  ─► (B, 1, D) ─┴─► deep: MLP ──────┼─► logit
    sparse, dense ─────────► LogisticRegression ───────────┘

With several tasks the two terms of the factorisation machine stand beside the embeddings as two numbers, from which
each task takes what it needs.

Guo et al., DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, 2017,
https://arxiv.org/abs/1703.04247, eq. 1 to 4.

Shapes: B rows, N dense features, F sparse features, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, OverArch, SparseArch
from torchrec.modules import deepfm as torchrec_deepfm
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.logistic import LogisticRegression
from models.pointwise import Heads, SparseTable, check_sizes, embedding_bags


@dataclass
class DeepFMConfig:
    """Sizes of a DeepFM.

    Attributes:
        embedding_dim: width D of every embedding and of the projected dense features.
        dense_layers: hidden widths of the dense features' MLP; a last layer of width D follows.
        deep_layers: hidden widths of the MLP over all embeddings, at least one; one logit follows.
    """

    embedding_dim: int = 16
    dense_layers: list[int] = field(default_factory=lambda: [64])
    deep_layers: list[int] = field(default_factory=lambda: [64, 32])


class DeepFM(nn.Module):
    """Sparse and dense features to one logit a row.

    Args:
        tables: embedding tables and the features that use them.
        n_dense: number N of dense features, at least one.
        cfg: sizes.
        base_rate: share of rows that convert; the untrained model's logit is about its log-odds.
        heads: of several tasks, in place of the one above.

    Raises:
        ValueError: a size is not positive, or the base rate is no probability strictly inside (0, 1).

    Example:
        >>> ranker = DeepFM([SparseTable("ad", 100, ("ad",))], n_dense=3, cfg=DeepFMConfig(embedding_dim=8))
        >>> sparse = KeyedJaggedTensor(keys=["ad"], values=torch.tensor([7, 42]), lengths=torch.tensor([1, 1]))
        >>> ranker(torch.zeros(2, 3), sparse).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        tables: Sequence[SparseTable],
        *,
        n_dense: int,
        cfg: DeepFMConfig,
        base_rate: float = 0.5,
        heads: Heads | None = None,
    ) -> None:
        super().__init__()
        check_sizes(cfg, [cfg.embedding_dim, *cfg.dense_layers, *(cfg.deep_layers or [0])], n_dense=n_dense)
        self.sparse_arch = SparseArch(embedding_bags(tables, cfg.embedding_dim))
        self.dense_arch = DenseArch(n_dense, [*cfg.dense_layers, cfg.embedding_dim])
        self.first_order = LogisticRegression(tables, n_dense=n_dense, base_rate=base_rate)
        self.pairs = torchrec_deepfm.FactorizationMachine()
        width = (self.sparse_arch.F + 1) * cfg.embedding_dim
        self.several = heads is not None
        self.deep = heads(width + 2) if heads else torchrec_deepfm.DeepFM(OverArch(width, [*cfg.deep_layers, 1]))

    def forward(self, dense_BN: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Logits of a batch.

        Args:
            dense_BN: standardised dense features, float32.
            sparse: one bag of row numbers a row and key; the keys are those of ``tables``, in any order.

        Returns:
            Log-odds of a conversion, or of each task's outcome, shape ``(B, T)``.
        """
        dense_B1D = self.dense_arch(dense_BN).unsqueeze(1)
        field_BFD = torch.cat([dense_B1D, self.sparse_arch(sparse)], dim=1)
        first_B1, pairs_B1 = self.first_order(dense_BN, sparse), self._pairs(field_BFD)
        if self.several:
            logits_BT: Tensor = self.deep(torch.cat([field_BFD.flatten(1), first_B1, pairs_B1], dim=1))
            return logits_BT
        return first_B1 + pairs_B1 + self.deep([field_BFD])

    def _pairs(self, field_BFD: Tensor) -> Tensor:
        """Sum of the dot products of all pairs of fields, ``(B, 1)``.

        TorchRec's module multiplies every number of a row with every other; given one coordinate of the fields
        at a time, that is the paper's dot product.
        """
        rows, fields, width = field_BFD.shape
        of_coordinate = self.pairs([field_BFD.transpose(1, 2).reshape(rows * width, fields, 1)])
        return of_coordinate.view(rows, width).sum(1, keepdim=True)
