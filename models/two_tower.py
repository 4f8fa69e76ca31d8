"""Two towers whose inner product says how well an ad suits a user.

A user is what they bought: the user tower reads the ads of the user's history through the *same*
encoder as the ad tower, so that an ad bought before lies near the user from the first step on, and an
ad never seen lies near through its advertiser, semantic-ID prefix, category and text.

    ad ids, advertiser, ID prefixes, categories ── EmbeddingBagCollection ─┐
    text of the advertiser ────────────────────── linear ──────────────────┴─ sum ── x_ND ─┬─ MLP ── ad vector
                                                                                           │
    history: x of each ad + how long ago + how often ── attention pooling ─┐               │ (the same x)
    profile ── EmbeddingBagCollection ─────────────────────────────────────┴─ MLP ── user vector

Both vectors have unit length; the score is their inner product over a temperature.

Training is a softmax over sampled candidates: the targets of the whole batch plus ads drawn uniformly
from the batch's own placements (mixed negatives: Yang et al., *Mixed Negative Sampling for Learning
Two-tower Neural Networks in Recommendations*, WWW 2020). The expected count of each candidate is taken
out of its logit (log-Q correction: Yi et al., *Sampling-Bias-Corrected Neural Modeling for Large Corpus
Item Recommendations*, RecSys 2019). A row's candidates are those its request could have shown, less
its other targets, so the softmax estimates the choice among the ads active in the visited market.

Shapes: B users, H history, N items, C candidates, P (user, target) pairs, F features, D width, K heads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import lightning as L
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

NO_ITEM = -1


@dataclass
class TwoTowerConfig:
    """Size and training of the two towers.

    Attributes:
        dim: width of embeddings and vectors.
        hidden: width of the hidden layer of each tower.
        heads: attention queries that pool the history.
        dropout: applied to the embedded items in training.
        temperature: divides the inner product of unit vectors.
        learning_rate: of Adam.
        weight_decay: of the layers; embeddings have none.
    """

    dim: int = 64
    hidden: int = 128
    heads: int = 4
    dropout: float = 0.1
    temperature: float = 0.07
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("dim", "hidden", "heads", "temperature", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected a positive number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}; expected a share in [0, 1)")


@dataclass(frozen=True)
class TwoTowerShape:
    """Sizes that come from the data.

    Attributes:
        item_features: name → number of codes of each categorical item feature, ids included.
        user_features: the same of the profile.
        text_dim: width of the advertiser's text embedding.
        ages: number of buckets of "how long ago".
        counts: number of buckets of "how often".
    """

    item_features: dict[str, int]
    user_features: dict[str, int]
    text_dim: int
    ages: int
    counts: int

    def asdict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint or a JSON file."""
        return asdict(self)


class Batch(TypedDict):
    """Training requests and the candidates they are scored against.

    Attributes:
        history_BH: items of the history, ``NO_ITEM`` where it is shorter.
        age_BH: bucket of how long ago each was bought last.
        count_BH: bucket of how often it was bought.
        profile_BF: profile codes, 0 = unknown.
        candidates_C: ads; the pairs' targets first, in the order of the pairs, then sampled ones.
        pair_row_P: the user row of each pair; its target is candidate ``p``.
        log_q_C: logarithm of each candidate's expected count in a batch.
        legal_BC: True where a candidate is a negative of the row: active in its market, no target of it.
    """

    history_BH: Tensor
    age_BH: Tensor
    count_BH: Tensor
    profile_BF: Tensor
    candidates_C: Tensor
    pair_row_P: Tensor
    log_q_C: Tensor
    legal_BC: Tensor


class ValidationBatch(TypedDict):
    """Requests scored against every ad they could have shown.

    Attributes:
        history_BH, age_BH, count_BH, profile_BF: as in :class:`Batch`.
        active_BN: True where an ad was active in the request's market.
        target_BN: True where it was bought.
    """

    history_BH: Tensor
    age_BH: Tensor
    count_BH: Tensor
    profile_BF: Tensor
    active_BN: Tensor
    target_BN: Tensor


def single_valued(codes_NF: Tensor, names: list[str]) -> KeyedJaggedTensor:
    """A KeyedJaggedTensor of categorical features with exactly one code each.

    Example:
        >>> single_valued(torch.tensor([[1, 7], [2, 8]]), ["ad", "advertiser"]).to_dict()["ad"].values()
        tensor([1, 2])
    """
    n_rows, n_features = codes_NF.shape
    return KeyedJaggedTensor(
        keys=names,
        values=codes_NF.t().reshape(-1),
        lengths=torch.ones(n_rows * n_features, dtype=torch.int64, device=codes_NF.device),
    )


def summed_bags(features: dict[str, int], dim: int) -> EmbeddingBagCollection:
    """One table a feature, all of the same width, so that a row's embeddings can be added."""
    return EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                embedding_dim=dim,
                num_embeddings=size,
                feature_names=[name],
                init_fn=lambda weight: nn.init.normal_(weight, std=dim**-0.5 / 2),
            )
            for name, size in features.items()
        ]
    )


class ItemEncoder(nn.Module):
    """Items (ads, and advertisers of purchases without an ad) as the sum of their features' embeddings.

    Args:
        codes_NF: the features of every item; stays with the module, so that items are named by row.
        advertiser_N: row of ``text_AE`` of every item, -1 for an item without advertiser.
        text_AE: text embedding of every advertiser.
        shape: sizes of the features.
        dim: width D.
    """

    codes_NF: Tensor
    advertiser_N: Tensor
    text_AE: Tensor

    def __init__(
        self, codes_NF: Tensor, advertiser_N: Tensor, text_AE: Tensor, *, shape: TwoTowerShape, dim: int
    ) -> None:
        super().__init__()
        # Saved with the weights, so that a trained encoder needs nothing else.
        self.register_buffer("codes_NF", codes_NF.int())
        self.register_buffer("advertiser_N", advertiser_N.int())
        self.register_buffer("text_AE", text_AE.float())
        self.names = list(shape.item_features)
        self.bags = summed_bags(shape.item_features, dim)
        self.text = nn.Linear(shape.text_dim, dim, bias=False)

    def forward(self, items_N: Tensor) -> Tensor:
        """Embeddings of items, shape ``(N, D)``."""
        pooled = self.bags(single_valued(self.codes_NF[items_N].long(), self.names))
        x_ND = torch.stack([pooled[name] for name in self.names]).sum(0)
        row_N = self.advertiser_N[items_N].long()
        text_ND = self.text(self.text_AE)[row_N.clamp_min(0)]
        return x_ND + text_ND * (row_N >= 0).unsqueeze(1)


class Residual(nn.Module):
    """``x + MLP(norm(x))``, which starts as the identity: embeddings match before the layers have learned."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class AdTower(nn.Module):
    """Item embeddings → unit ad vectors."""

    def __init__(self, cfg: TwoTowerConfig) -> None:
        super().__init__()
        self.body = Residual(cfg.dim, cfg.hidden)

    def forward(self, x_ND: Tensor) -> Tensor:
        return nn.functional.normalize(self.body(x_ND), dim=-1)


class UserTower(nn.Module):
    """Embedded history and profile → unit user vectors.

    The history is pooled by learned queries (K heads over whole embeddings; their outputs are mixed by
    learned weights). A user without history is represented by a learned vector and the profile.
    """

    def __init__(self, shape: TwoTowerShape, cfg: TwoTowerConfig) -> None:
        super().__init__()
        self.age = nn.Embedding(shape.ages, cfg.dim)
        self.count = nn.Embedding(shape.counts, cfg.dim)
        self.score = nn.Sequential(
            nn.LayerNorm(cfg.dim), nn.Linear(cfg.dim, cfg.dim), nn.GELU(), nn.Linear(cfg.dim, cfg.heads)
        )
        self.mix = nn.Parameter(torch.full((cfg.heads,), 1.0 / cfg.heads))
        self.empty = nn.Parameter(torch.randn(cfg.dim) * cfg.dim**-0.5)
        self.names = list(shape.user_features)
        self.profile = summed_bags(shape.user_features, cfg.dim) if self.names else None
        self.body = Residual(cfg.dim, cfg.hidden)
        for table in (self.age, self.count):
            nn.init.normal_(table.weight, std=cfg.dim**-0.5 / 2)

    def forward(self, x_BHD: Tensor, age_BH: Tensor, count_BH: Tensor, there_BH: Tensor, profile_BF: Tensor) -> Tensor:
        """Unit vectors of users.

        Args:
            x_BHD: embedded history.
            age_BH: bucket of how long ago.
            count_BH: bucket of how often.
            there_BH: False where the history is shorter.
            profile_BF: profile codes.

        Returns:
            Shape ``(B, D)``.
        """
        logits_BHK = self.score(x_BHD + self.age(age_BH) + self.count(count_BH))
        logits_BHK = logits_BHK.masked_fill(~there_BH.unsqueeze(-1), -1e9)
        weights_BH = (logits_BHK.softmax(1) * self.mix).sum(-1)
        pooled_BD = torch.einsum("bh,bhd->bd", weights_BH, x_BHD)
        u_BD = torch.where(there_BH.any(1, keepdim=True), pooled_BD, self.empty)
        if self.profile is not None:
            pooled = self.profile(single_valued(profile_BF, self.names))
            u_BD = u_BD + torch.stack([pooled[name] for name in self.names]).sum(0)
        return nn.functional.normalize(self.body(u_BD), dim=-1)


class TwoTower(nn.Module):
    """User tower and ad tower over one item encoder."""

    def __init__(self, encoder: ItemEncoder, shape: TwoTowerShape, cfg: TwoTowerConfig) -> None:
        super().__init__()
        self.dim = cfg.dim
        self.encoder = encoder
        self.ad_tower = AdTower(cfg)
        self.user_tower = UserTower(shape, cfg)
        self.dropout = nn.Dropout(cfg.dropout)

    def users(self, history_BH: Tensor, age_BH: Tensor, count_BH: Tensor, profile_BF: Tensor) -> Tensor:
        """Unit user vectors, shape ``(B, D)``; arguments as in :class:`Batch`."""
        there_BH = history_BH != NO_ITEM
        items, position_BH = history_BH.clamp_min(0).unique(return_inverse=True)
        x_BHD = self.dropout(self.encoder(items))[position_BH]
        return self.user_tower(x_BHD, age_BH, count_BH, there_BH, profile_BF)

    def ads(self, ads_N: Tensor) -> Tensor:
        """Unit ad vectors, shape ``(N, D)``."""
        return self.ad_tower(self.dropout(self.encoder(ads_N)))


def sampled_softmax(scores_BC: Tensor, pair_row_P: Tensor, log_q_C: Tensor, legal_BC: Tensor) -> Tensor:
    """Mean loss of (user, target) pairs against the candidates of a batch.

    Args:
        scores_BC: inner products over the temperature.
        pair_row_P: row of each pair; its target is candidate ``p``.
        log_q_C: logarithm of each candidate's expected count, which is subtracted (log-Q correction).
        legal_BC: True where the candidate is a negative of the row.

    Returns:
        A scalar.
    """
    logits_BC = scores_BC - log_q_C
    n_pairs = len(pair_row_P)
    positive_P = logits_BC[pair_row_P, torch.arange(n_pairs, device=logits_BC.device)]
    negatives_B = logits_BC.masked_fill(~legal_BC, -torch.inf).logsumexp(1)
    return (torch.logaddexp(positive_P, negatives_B[pair_row_P]) - positive_P).mean()


class TwoTowerModule(L.LightningModule):
    """Training of the towers; ``val_recall`` is recall@k among the ads active in each request's market.

    Args:
        model: the towers.
        cfg: their config.
        n_ads: items below this number are ads.
        k: list length of ``val_recall``.
    """

    def __init__(self, model: TwoTower, cfg: TwoTowerConfig, *, n_ads: int, k: int = 100) -> None:
        super().__init__()
        self.model, self.cfg, self.n_ads, self.k = model, cfg, n_ads, k
        self._ad_vectors_ND: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        user_BD = self.model.users(batch["history_BH"], batch["age_BH"], batch["count_BH"], batch["profile_BF"])
        ads, position_C = batch["candidates_C"].unique(return_inverse=True)
        ad_CD = self.model.ads(ads)[position_C]
        scores_BC = user_BD @ ad_CD.t() / self.cfg.temperature
        loss = sampled_softmax(scores_BC, batch["pair_row_P"], batch["log_q_C"], batch["legal_BC"])
        self.log("train_loss", loss, prog_bar=True, batch_size=len(user_BD))
        return loss

    def on_validation_epoch_start(self) -> None:
        self._ad_vectors_ND = ad_vectors(self.model, self.n_ads)

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> None:
        user_BD = self.model.users(batch["history_BH"], batch["age_BH"], batch["count_BH"], batch["profile_BF"])
        assert self._ad_vectors_ND is not None
        active_BN, target_BN = batch["active_BN"], batch["target_BN"] & batch["active_BN"]
        scores_BN = (user_BD @ self._ad_vectors_ND.t() / self.cfg.temperature).masked_fill(~active_BN, -torch.inf)
        targets_B = target_BN.sum(1)
        nll_B = scores_BN.logsumexp(1) - scores_BN.masked_fill(~target_BN, 0).sum(1) / targets_B.clamp_min(1)
        top_BK = scores_BN.topk(min(self.k, self.n_ads), dim=1).indices
        recall_B = target_BN.gather(1, top_BK).sum(1) / targets_B.clamp(1, self.k)
        counted = targets_B > 0
        n = int(counted.sum())
        if n:
            self.log("val_nll", nll_B[counted].mean(), on_epoch=True, batch_size=n)
            self.log("val_recall", recall_B[counted].mean(), on_epoch=True, prog_bar=True, batch_size=n)

    def on_validation_epoch_end(self) -> None:
        self._ad_vectors_ND = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        tables = [p for name, p in self.named_parameters() if "bags" in name or "profile" in name]
        known = {id(p) for p in tables}
        layers = [p for p in self.parameters() if id(p) not in known]
        return torch.optim.AdamW(
            [
                {"params": tables, "weight_decay": 0.0},
                {"params": layers, "weight_decay": self.cfg.weight_decay},
            ],
            lr=self.cfg.learning_rate,
        )


@torch.no_grad()
def ad_vectors(model: TwoTower, n_ads: int, *, chunk: int = 8192) -> Tensor:
    """Unit vectors of all ads without dropout, shape ``(n_ads, D)``."""
    was_training = model.training
    model.eval()
    device = model.encoder.codes_NF.device
    parts = [
        model.ads(torch.arange(start, min(start + chunk, n_ads), device=device)) for start in range(0, n_ads, chunk)
    ]
    model.train(was_training)
    return torch.cat(parts)
