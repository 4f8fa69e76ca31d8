"""DLRM: a ranker that lets every pair of features meet in a dot product.

Embeddings of the sparse features and a projection of the dense ones are vectors of one width; the
dot products of all pairs, beside the projected dense features, go through an MLP to one logit. The
four parts are TorchRec's own, so that its planner can shard the tables.

    sparse ─► SparseArch ─► (B, F, D) ─┐
                                       ├─► InteractionArch ─► (B, D + F + F(F-1)/2) ─► OverArch ─► logit
    dense  ─► DenseArch  ─► (B, D) ────┘

Naumov et al., Deep Learning Recommendation Model for Personalization and Recommendation Systems,
2019, https://arxiv.org/abs/1906.00091

Shapes: B rows, N dense features, F sparse features, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import comb

from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, InteractionArch, SparseArch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.pointwise import Heads, SparseTable, check_sizes, embedding_bags, single_head


@dataclass
class DLRMConfig:
    """Sizes of a DLRM.

    Attributes:
        embedding_dim: width D of every embedding and of the projected dense features.
        dense_layers: hidden widths of the dense features' MLP; a last layer of width D follows.
        over_layers: hidden widths of the MLP over the interactions, at least one; one logit follows.
    """

    embedding_dim: int = 16
    dense_layers: list[int] = field(default_factory=lambda: [64])
    over_layers: list[int] = field(default_factory=lambda: [64, 32])


class DLRM(nn.Module):
    """Sparse and dense features to one logit a row.

    Args:
        tables: embedding tables and the features that use them.
        n_dense: number N of dense features, at least one.
        cfg: sizes.
        base_rate: share of rows that convert; the untrained model's logit is about its log-odds, so
            that no step is spent on learning the mean.

    Raises:
        ValueError: a size is not positive, or the base rate is no probability strictly inside (0, 1).

    Example:
        >>> import torch
        >>> ranker = DLRM(
        ...     [SparseTable("ad", 100, ("ad",)), SparseTable("advertiser", 20, ("advertiser", "history"))],
        ...     n_dense=3,
        ...     cfg=DLRMConfig(embedding_dim=8, dense_layers=[16], over_layers=[16]),
        ... )
        >>> sparse = KeyedJaggedTensor(  # two rows; the second has no history
        ...     keys=["ad", "advertiser", "history"],
        ...     values=torch.tensor([7, 42, 3, 5, 3, 9]),
        ...     lengths=torch.tensor([1, 1, 1, 1, 2, 0]),
        ... )
        >>> ranker(torch.zeros(2, 3), sparse).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        tables: Sequence[SparseTable],
        *,
        n_dense: int,
        cfg: DLRMConfig,
        base_rate: float = 0.5,
        heads: Heads | None = None,
    ) -> None:
        super().__init__()
        check_sizes(cfg, [cfg.embedding_dim, *cfg.dense_layers, *(cfg.over_layers or [0])], n_dense=n_dense)
        self.sparse_arch = SparseArch(embedding_bags(tables, cfg.embedding_dim))
        n_sparse = self.sparse_arch.F
        self.dense_arch = DenseArch(n_dense, [*cfg.dense_layers, cfg.embedding_dim])
        self.inter_arch = InteractionArch(n_sparse)
        interactions = cfg.embedding_dim + n_sparse + comb(n_sparse, 2)
        self.over_arch = (heads or single_head(cfg.over_layers, base_rate))(interactions)

    def forward(self, dense_BN: Tensor, sparse: KeyedJaggedTensor) -> Tensor:
        """Logits of a batch.

        Args:
            dense_BN: standardised dense features, float32.
            sparse: one bag of row numbers a row and key; the keys are those of ``tables``, in any order.

        Returns:
            Log-odds of a conversion, or of each task's outcome, shape ``(B, T)``.
        """
        dense_BD = self.dense_arch(dense_BN)
        sparse_BFD = self.sparse_arch(sparse)
        found: Tensor = self.over_arch(self.inter_arch(dense_BD, sparse_BFD))
        return found
