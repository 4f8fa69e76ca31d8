"""DCN-v2: a ranker whose cross layers multiply the input with a low-rank map of itself, again and again.

Embeddings of the sparse features and a projection of the dense ones are put side by side as ``x_0``. Each
cross layer raises the degree of the interactions by one, between single coordinates instead of whole
features; an MLP over the last layer gives the logit. All parts are TorchRec's own.

    sparse ─► SparseArch ─► (B, F, D) ─┐
                                       ├─► x_0 (B, (F + 1) D) ─► LowRankCrossNet ─► OverArch ─► logit
    dense  ─► DenseArch  ─► (B, D) ────┘                         x_l+1 = x_0 * (W_l V_l x_l + b_l) + x_l

Wang et al., DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank
Systems, 2021, https://arxiv.org/abs/2008.13535, eq. 1 and section 3.4 (low rank), in the stacked form.

Shapes: B rows, N dense features, F sparse features, D width of an embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch, InteractionDCNArch, SparseArch
from torchrec.modules.crossnet import LowRankCrossNet
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from models.pointwise import Heads, SparseTable, check_sizes, embedding_bags, single_head


@dataclass
class DCNv2Config:
    """Sizes of a DCN-v2.

    Attributes:
        embedding_dim: width D of every embedding and of the projected dense features.
        dense_layers: hidden widths of the dense features' MLP; a last layer of width D follows.
        cross_layers: number of cross layers, at least one.
        cross_rank: rank of each cross layer's map; a quarter of (F + 1) D keeps most of a full one's quality.
        over_layers: hidden widths of the MLP over the crosses, at least one; one logit follows.
    """

    embedding_dim: int = 16
    dense_layers: list[int] = field(default_factory=lambda: [64])
    cross_layers: int = 2
    cross_rank: int = 32
    over_layers: list[int] = field(default_factory=lambda: [64, 32])


class DCNv2(nn.Module):
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
        >>> import torch
        >>> ranker = DCNv2([SparseTable("ad", 100, ("ad",))], n_dense=3, cfg=DCNv2Config(embedding_dim=8))
        >>> sparse = KeyedJaggedTensor(keys=["ad"], values=torch.tensor([7, 42]), lengths=torch.tensor([1, 1]))
        >>> ranker(torch.zeros(2, 3), sparse).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        tables: Sequence[SparseTable],
        *,
        n_dense: int,
        cfg: DCNv2Config,
        base_rate: float = 0.5,
        heads: Heads | None = None,
    ) -> None:
        super().__init__()
        sizes = [cfg.embedding_dim, *cfg.dense_layers, cfg.cross_layers, cfg.cross_rank, *(cfg.over_layers or [0])]
        check_sizes(cfg, sizes, n_dense=n_dense)
        self.sparse_arch = SparseArch(embedding_bags(tables, cfg.embedding_dim))
        self.dense_arch = DenseArch(n_dense, [*cfg.dense_layers, cfg.embedding_dim])
        n_sparse = self.sparse_arch.F
        width = (n_sparse + 1) * cfg.embedding_dim
        crosses = LowRankCrossNet(width, num_layers=cfg.cross_layers, low_rank=cfg.cross_rank)
        self.inter_arch = InteractionDCNArch(n_sparse, crosses)
        self.over_arch = (heads or single_head(cfg.over_layers, base_rate))(width)

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
