"""SASRec: a small causal transformer over the advertisers a user bought from (Kang & McAuley 2018, arXiv 1808.09781).

The baseline that reads the same sequences as the LM, without words:

    <start> a7 a3 | a9 a3 | a1        advertisers in order of time, each once a period
       │     │  ╰───┤    ╰─┤          the last position before a period forecasts that period's advertisers
       ▼     ▼      ▼      ▼
    softmax over all advertisers of  item vector · hidden + bias

Two things differ from the paper, both in its favour here: the loss is the full softmax against *all* target advertisers
of the next period, the very likelihood that forecasts are judged by (Klenitskiy & Vasilev 2023, arXiv 2309.07602, show
that cross-entropy is what SASRec lacks), and the bias starts at the advertisers' popularity.

Shapes: B sequences, T positions, H width, A advertisers, N decisions, Y targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from data.errors import UserError
from data.rules import DROPOUT, POSITIVE, at_least, broken
from models.training import TrainerConfig


@dataclass
class SasRecConfig:
    """Size and training of the baseline.

    Attributes:
        width: H.
        layers: transformer blocks.
        heads: of the attention; divides the width.
        max_length: advertisers read at the most, the newest.
        dropout: of embeddings and blocks.
        learning_rate: Adam's.
        batch_size: sequences of a step.
        trainer: epochs and patience; each epoch ends with a look at the selection span.
    """

    width: int = 64
    layers: int = 2
    heads: int = 2
    max_length: int = 128
    dropout: float = 0.2
    learning_rate: float = 1e-3
    batch_size: int = 32
    trainer: TrainerConfig = field(default_factory=lambda: TrainerConfig(max_epochs=40, patience=3))

    def __post_init__(self) -> None:
        sizes = dict.fromkeys(("width", "layers", "heads", "max_length", "batch_size"), at_least(1))
        errors = broken(self, "prior.baselines.sasrec", {**sizes, "dropout": DROPOUT, "learning_rate": POSITIVE})
        if self.width > 0 and self.heads > 0 and self.width % self.heads:
            errors.append(
                UserError(
                    f"prior.baselines.sasrec.width={self.width}, heads={self.heads}",
                    expected="a width that the heads divide",
                    action="change one of them, e.g. width=64 heads=2",
                )
            )
        if errors:
            raise UserError.collect(errors)


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences, where they decide, and what was decided.

    Attributes:
        item_BT: advertiser + 1; 0 is the start, and padding behind the end.
        row_N, position_N: decisions: the hidden state there forecasts.
        decision_Y: decision of each target.
        advertiser_Y: the target.
        weight_Y: 1 / number of targets of that decision.
    """

    item_BT: Tensor
    row_N: Tensor
    position_N: Tensor
    decision_Y: Tensor
    advertiser_Y: Tensor
    weight_Y: Tensor

    def to(self, device: torch.device) -> SequenceBatch:
        """The batch on another device."""
        return SequenceBatch(**{name: value.to(device) for name, value in vars(self).items()})


class SasRec(nn.Module):
    """Log-probabilities of the next advertisers from those before.

    Args:
        n_advertisers: A.
        cfg: sizes.
        log_popularity_A: what the bias starts at; zeros where None.

    Example:
        >>> model = SasRec(5, SasRecConfig(width=8))
        >>> model(torch.tensor([[0, 3, 1]])).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, n_advertisers: int, cfg: SasRecConfig, log_popularity_A: Tensor | None = None) -> None:
        super().__init__()
        self.items = nn.Embedding(n_advertisers + 1, cfg.width)
        self.positions = nn.Embedding(cfg.max_length + 1, cfg.width)
        self.blocks = nn.ModuleList(_Block(cfg) for _ in range(cfg.layers))
        self.dropout, self.norm = nn.Dropout(cfg.dropout), nn.LayerNorm(cfg.width)
        self.bias = nn.Parameter(torch.zeros(n_advertisers) if log_popularity_A is None else log_popularity_A.clone())
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, item_BT: Tensor) -> Tensor:
        """Hidden states, ``(B, T, H)``; a position sees itself and those before it."""
        place_T = torch.arange(item_BT.shape[1], device=item_BT.device)
        hidden_BTH = self.dropout(self.items(item_BT) + self.positions(place_T))
        for block in self.blocks:
            hidden_BTH = block(hidden_BTH)
        return self.norm(hidden_BTH)

    def log_probs(self, hidden_NH: Tensor) -> Tensor:
        """Log-probabilities of all advertisers, ``(N, A)``."""
        return (hidden_NH @ self.items.weight[1:].T + self.bias).log_softmax(-1)


class _Block(nn.Module):
    """Attention, then a feed-forward layer, each normalised before and added to what comes in."""

    def __init__(self, cfg: SasRecConfig) -> None:
        super().__init__()
        self.heads, self.drop = cfg.heads, cfg.dropout
        self.norm_attention, self.norm_mlp = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.qkv, self.out = nn.Linear(cfg.width, 3 * cfg.width), nn.Linear(cfg.width, cfg.width)
        self.mlp = nn.Sequential(nn.Linear(cfg.width, 4 * cfg.width), nn.GELU(), nn.Linear(4 * cfg.width, cfg.width))
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x_BTH: Tensor) -> Tensor:
        batch, length, width = x_BTH.shape
        split = self.qkv(self.norm_attention(x_BTH)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        dropout = self.drop if self.training else 0.0
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True, dropout_p=dropout)
        x_BTH = x_BTH + self.dropout(self.out(mixed.transpose(1, 2).reshape(batch, length, width)))
        return x_BTH + self.dropout(self.mlp(self.norm_mlp(x_BTH)))


class SasRecModule(L.LightningModule):
    """Fits a :class:`SasRec` by the likelihood of what each decision is followed by.

    Args:
        model: the network.
        learning_rate: Adam's.
    """

    def __init__(self, model: SasRec, *, learning_rate: float) -> None:
        super().__init__()
        self.model, self.learning_rate = model, learning_rate

    def decision_nll(self, batch: SequenceBatch) -> Tensor:
        """NLL of every decision, the mean over its targets, ``(N,)``."""
        hidden_NH = self.model(batch.item_BT)[batch.row_N, batch.position_N]
        log_prob_Y = self.model.log_probs(hidden_NH)[batch.decision_Y, batch.advertiser_Y]
        nll_N = torch.zeros(len(batch.row_N), device=log_prob_Y.device)
        return nll_N.index_add(0, batch.decision_Y, -log_prob_Y * batch.weight_Y)

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        nll_N = self.decision_nll(batch)
        self.log("train_nll", nll_N.mean(), batch_size=len(nll_N), prog_bar=True)
        return nll_N.mean()

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        nll_N = self.decision_nll(batch)
        self.log("select_nll", nll_N.mean(), batch_size=len(nll_N), prog_bar=True)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)
