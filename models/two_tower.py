"""Two towers whose inner product says how well an ad suits a user.

A user is what they bought: the user tower reads the ads of the user's history through the *same*
encoder as the ad tower, so that an ad bought before lies near the user from the first step on, and an
ad never seen lies near through its advertiser, semantic-ID prefix, category and text.

    ad ids, advertiser, ID prefixes, categories ── EmbeddingBagCollection ─┐
    text of the advertiser ────────────────────── linear ──────────────────┴─ sum ── x_ND ─┬─ MLP ── ad vector
                                                                                           │
    history: x of each ad + how long ago + how often                                       │ (the same x)
        └─ transformer layers, by config ──────────── attention pooling ───┐               │
    profile, context ── EmbeddingBagCollection ────────────────────────────┴─ MLP ── user vector

Both vectors have unit length; the score is their inner product over a temperature, plus a learned weight times
the log of the ad's conversions so far. Popularity is counted anew for every request, in training as in serving, so
the towers learn what it does not tell and the index never ages by it.

Training is a softmax over sampled candidates: the targets of the whole batch plus ads drawn uniformly
from the batch's own placements (mixed negatives: Yang et al., *Mixed Negative Sampling for Learning
Two-tower Neural Networks in Recommendations*, WWW 2020). The expected count of each candidate is taken
out of its logit (log-Q correction: Yi et al., *Sampling-Bias-Corrected Neural Modeling for Large Corpus
Item Recommendations*, RecSys 2019). A row's candidates are those its request could have shown, less
its other targets, so the softmax estimates the choice among the ads active in the visited market.

By config an **advertiser tower** is trained with them: the user vector and an advertiser's embedding go each through a
layer of their own, and the same softmax runs over the advertisers of the batch's candidates. It says which advertisers
a user converts with, as a forecast does, from the towers alone.

An epoch of a large catalogue reads few rows of its embedding tables, so their gradients are sparse, and Adam moves
the rows that a batch has read and no others.

Shapes: B users, H history, N items, C candidates, P (user, target) pairs, F features, D width, K heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

import lightning as L
import torch
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor

from data.errors import UserError
from data.rules import DROPOUT, NOT_NEGATIVE, POSITIVE, at_least, broken

NO_ITEM = -1
CONTEXT = ("market",)
"""What a user tower can read of a request beside its user."""


@dataclass
class TwoTowerConfig:
    """Size and training of the two towers.

    Attributes:
        dim: width of embeddings and vectors.
        hidden: width of the hidden layer of each tower.
        heads: attention queries that pool the history.
        layers: transformer layers over the history before it is pooled; 0 pools the items as they are.
        context: what the user tower reads of the request, out of `CONTEXT`: ``market`` is the store or region of the
            visit. A value that no training request had reads as unknown and adds nothing.
        dropout: applied to the embedded items in training.
        id_dropout: share of training items whose own id is hidden, so that their other features have to serve.
        popularity_weight: of the log of an ad's conversions so far, where training begins; null leaves them out.
        advertiser_weight: of the loss over advertisers beside that over ads; null trains no advertiser tower.
        temperature: divides the inner product of unit vectors.
        learning_rate: of Adam.
        weight_decay: of the layers; embeddings have none.
    """

    dim: int = 64
    hidden: int = 128
    heads: int = 4
    layers: int = 0
    context: list[str] = field(default_factory=list)
    dropout: float = 0.1
    id_dropout: float = 0.0
    popularity_weight: float | None = 0.3
    advertiser_weight: float | None = None
    temperature: float = 0.07
    learning_rate: float = 3e-3
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        section = "retrieval.model"
        errors = broken(
            self,
            section,
            {
                **dict.fromkeys(("dim", "hidden", "heads"), at_least(1)),
                "layers": at_least(0),
                **dict.fromkeys(("dropout", "id_dropout"), DROPOUT),
                "advertiser_weight": POSITIVE.or_null(),
                **dict.fromkeys(("temperature", "learning_rate"), POSITIVE),
                "weight_decay": NOT_NEGATIVE,
            },
        )
        if not set(self.context) <= set(CONTEXT) or len(set(self.context)) < len(self.context):
            errors.append(
                UserError(
                    f"{section}.context={list(self.context)}",
                    expected=f"distinct names out of {', '.join(CONTEXT)}",
                    action=f"correct {section}.context; [] reads nothing of the request",
                )
            )
        if self.layers > 0 and self.dim > 0 and self.heads > 0 and self.dim % self.heads:
            errors.append(
                UserError(
                    f"{section}.layers={self.layers} with dim={self.dim} and heads={self.heads}",
                    expected="heads that divide dim, where layers read the history",
                    action="change one of them, e.g. dim=64 heads=4",
                )
            )
        if errors:
            raise UserError.collect(errors)


@dataclass(frozen=True)
class TwoTowerShape:
    """Sizes that come from the data.

    Attributes:
        item_features: name → number of codes of each categorical item feature, ids included.
        user_features: the same of the profile.
        text_dim: width of the advertiser's text embedding; 0 where there is none.
        ages: number of buckets of "how long ago".
        counts: number of buckets of "how often".
        context: name → values of a request's feature, those of codes 1, 2, ...; 0 is any other value, or none. Towers
            saved before there was a context have none.
    """

    item_features: dict[str, int]
    user_features: dict[str, int]
    text_dim: int
    ages: int
    counts: int
    context: dict[str, list[Any]] = field(default_factory=dict)

    def asdict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint or a JSON file."""
        return asdict(self)


class Candidates(TypedDict):
    """(Request, target) pairs and what they are scored against: ads, or advertisers, each once.

    Attributes:
        item_C: the pairs' targets and sampled ones.
        pair_row_P: the user row of each pair.
        pair_column_P: its target among the candidates.
        log_q_C: logarithm of each candidate's expected count in a batch.
        log_count_C: logarithm of its count in this one.
        legal_BC: True where a candidate is a negative of the row: active in its market, no target of it.
        popularity_BC: log of each candidate's conversions before the row's request; 0 where it is not scored.
    """

    item_C: Tensor
    pair_row_P: Tensor
    pair_column_P: Tensor
    log_q_C: Tensor
    log_count_C: Tensor
    legal_BC: Tensor
    popularity_BC: Tensor


class Batch(TypedDict):
    """Training requests and the candidates they are scored against.

    Attributes:
        history_BH: items of the history, ``NO_ITEM`` where it is shorter.
        age_BH: bucket of how long ago each was bought last.
        count_BH: bucket of how often it was bought.
        profile_BF: profile codes, 0 = unknown.
        context_BF: codes of the request's context, 0 = unknown; F is 0 without one.
        ads: candidates of the ad tower.
        advertisers: of the advertiser tower; None without one, and where no target has an advertiser.
    """

    history_BH: Tensor
    age_BH: Tensor
    count_BH: Tensor
    profile_BF: Tensor
    context_BF: Tensor
    ads: Candidates
    advertisers: Candidates | None


class ValidationBatch(TypedDict):
    """Requests scored against every ad they could have shown.

    Attributes:
        history_BH, age_BH, count_BH, profile_BF, context_BF: as in :class:`Batch`.
        active_BN: True where an ad was active in the request's market.
        target_BN: True where it was bought.
        popularity_BN: log of its conversions before the request, 0 where it is not active.
    """

    history_BH: Tensor
    age_BH: Tensor
    count_BH: Tensor
    profile_BF: Tensor
    context_BF: Tensor
    active_BN: Tensor
    target_BN: Tensor
    popularity_BN: Tensor


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
        # Sizes are known: told, they need not be added up from the lengths, which waits for the device.
        stride=n_rows,
        length_per_key=[n_rows] * n_features,
        offset_per_key=[n_rows * feature for feature in range(n_features + 1)],
    )


def added_up(pooled: KeyedTensor) -> Tensor:
    """The sum of a row's embeddings, all of one width, ``(N, D)``."""
    values_NE, features = pooled.values(), len(pooled.keys())
    return values_NE if features == 1 else values_NE.unflatten(1, (features, -1)).sum(1)


def summed_bags(features: dict[str, int], dim: int, *, std: float | None = None) -> EmbeddingBagCollection:
    """One table a feature, all of the same width, so that a row's embeddings can be added; gradients are sparse.

    Args:
        features: name → number of codes.
        dim: width D.
        std: of the embeddings that training starts from; half of ``1 / sqrt(D)`` where none is given.
    """
    bags = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=name,
                embedding_dim=dim,
                num_embeddings=size,
                feature_names=[name],
                init_fn=lambda weight: nn.init.normal_(weight, std=dim**-0.5 / 2 if std is None else std),
            )
            for name, size in features.items()
        ]
    )
    for bag in bags.embedding_bags.values():
        bag.sparse = True
    return bags


class ItemEncoder(nn.Module):
    """Items (ads, and advertisers of purchases without an ad) as the sum of their features' embeddings.

    Args:
        codes_NF: the features of every item; stays with the module, so that items are named by row.
        advertiser_N: row of ``text_AE`` of every item, -1 for an item without advertiser.
        text_AE: text embedding of every advertiser.
        shape: sizes of the features.
        dim: width D.
        id_dropout: share of items whose first feature, their own id, is hidden in training.
    """

    codes_NF: Tensor
    advertiser_N: Tensor
    text_AE: Tensor

    def __init__(
        self,
        codes_NF: Tensor,
        advertiser_N: Tensor,
        text_AE: Tensor,
        *,
        shape: TwoTowerShape,
        dim: int,
        id_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.id_dropout = id_dropout
        # Saved with the weights, so that a trained encoder needs nothing else.
        self.register_buffer("codes_NF", codes_NF.int())
        self.register_buffer("advertiser_N", advertiser_N.int())
        self.register_buffer("text_AE", text_AE.float())
        self.names = list(shape.item_features)
        self.bags = summed_bags(shape.item_features, dim)
        self.text = nn.Linear(shape.text_dim, dim, bias=False) if shape.text_dim else None

    def forward(self, items_N: Tensor) -> Tensor:
        """Embeddings of items, shape ``(N, D)``."""
        codes_NF = self.codes_NF[items_N].long()
        if self.training and self.id_dropout:
            hidden_N = torch.rand(len(codes_NF), device=codes_NF.device) < self.id_dropout
            codes_NF[:, 0] = codes_NF[:, 0].masked_fill(hidden_N, 0)
        x_ND = added_up(self.bags(single_valued(codes_NF, self.names)))
        if self.text is None:
            return x_ND
        row_N = self.advertiser_N[items_N].long()
        rows, position_N = row_N.clamp_min(0).unique(return_inverse=True)
        text_ND = self.text(self.text_AE[rows])[position_N]
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


def unit(x: Tensor) -> Tensor:
    """Vectors of the last dimension with length 1; fewer steps back than ``nn.functional.normalize``."""
    return x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-12)


class AdTower(nn.Module):
    """Item embeddings → unit ad vectors."""

    def __init__(self, cfg: TwoTowerConfig) -> None:
        super().__init__()
        self.body = Residual(cfg.dim, cfg.hidden)

    def forward(self, x_ND: Tensor) -> Tensor:
        return unit(self.body(x_ND))


class UserTower(nn.Module):
    """Embedded history, profile and context of the request → unit user vectors.

    The history goes through transformer layers, if the config has any, and is pooled by learned queries (K heads
    over whole embeddings; their outputs are mixed by learned weights). A user without history is represented by a
    learned vector and the profile. What the context says starts at nothing, and stays so for values not trained on.
    """

    def __init__(self, shape: TwoTowerShape, cfg: TwoTowerConfig) -> None:
        super().__init__()
        self.age = nn.Embedding(shape.ages, cfg.dim)
        self.count = nn.Embedding(shape.counts, cfg.dim)
        self.score = nn.Sequential(
            nn.LayerNorm(cfg.dim), nn.Linear(cfg.dim, cfg.dim), nn.GELU(), nn.Linear(cfg.dim, cfg.heads)
        )
        self.sequence = _sequence_encoder(cfg) if cfg.layers else None
        self.mix = nn.Parameter(torch.full((cfg.heads,), 1.0 / cfg.heads))
        self.empty = nn.Parameter(torch.randn(cfg.dim) * cfg.dim**-0.5)
        self.names = list(shape.user_features)
        self.profile = summed_bags(shape.user_features, cfg.dim) if self.names else None
        self.context_names = list(shape.context)
        sizes = {name: len(values) + 1 for name, values in shape.context.items()}
        self.context = summed_bags(sizes, cfg.dim, std=0.0) if sizes else None
        self.body = Residual(cfg.dim, cfg.hidden)
        for table in (self.age, self.count):
            nn.init.normal_(table.weight, std=cfg.dim**-0.5 / 2)

    def forward(
        self,
        x_BHD: Tensor,
        age_BH: Tensor,
        count_BH: Tensor,
        there_BH: Tensor,
        profile_BF: Tensor,
        context_BF: Tensor,
    ) -> Tensor:
        """Unit vectors of users.

        Args:
            x_BHD: embedded history.
            age_BH: bucket of how long ago.
            count_BH: bucket of how often.
            there_BH: False where the history is shorter.
            profile_BF: profile codes.
            context_BF: codes of the request's context.

        Returns:
            Shape ``(B, D)``.
        """
        u_BD = self._pooled(x_BHD, age_BH, count_BH, there_BH) if x_BHD.shape[1] else self.empty.expand(len(x_BHD), -1)
        if self.profile is not None:
            u_BD = u_BD + added_up(self.profile(single_valued(profile_BF, self.names)))
        if self.context is not None:
            u_BD = u_BD + added_up(self.context(single_valued(context_BF, self.context_names)))
        return unit(self.body(u_BD))

    def _pooled(self, x_BHD: Tensor, age_BH: Tensor, count_BH: Tensor, there_BH: Tensor) -> Tensor:
        context_BHD = self.age(age_BH) + self.count(count_BH)
        if self.sequence is not None:
            absent_BH = ~there_BH
            absent_BH[:, 0] = False  # attention over nothing is not a number; what it says there is not read
            x_BHD = self.sequence(x_BHD + context_BHD, src_key_padding_mask=absent_BH)
        logits_BHK = self.score(x_BHD + context_BHD)
        logits_BHK = logits_BHK.masked_fill(~there_BH.unsqueeze(-1), torch.finfo(logits_BHK.dtype).min)
        weights_BH = (logits_BHK.softmax(1) * self.mix).sum(-1)
        pooled_BD = torch.einsum("bh,bhd->bd", weights_BH, x_BHD)
        return torch.where(there_BH.any(1, keepdim=True), pooled_BD, self.empty)


def _sequence_encoder(cfg: TwoTowerConfig) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        cfg.dim, cfg.heads, cfg.hidden, cfg.dropout, "gelu", batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, cfg.layers, enable_nested_tensor=False)


class AdvertiserTower(nn.Module):
    """What the user vector and an advertiser's embedding say about the two, each through a layer of its own."""

    def __init__(self, cfg: TwoTowerConfig) -> None:
        super().__init__()
        self.user, self.advertiser = Residual(cfg.dim, cfg.hidden), Residual(cfg.dim, cfg.hidden)
        self.popularity_weight = _popularity_weight(cfg)

    def users(self, user_BD: Tensor) -> Tensor:
        """Unit vectors, of those of the user tower."""
        return unit(self.user(user_BD))

    def advertisers(self, x_AD: Tensor) -> Tensor:
        """Unit vectors, of embedded advertisers."""
        return unit(self.advertiser(x_AD))


def _popularity_weight(cfg: TwoTowerConfig) -> nn.Parameter | None:
    return None if cfg.popularity_weight is None else nn.Parameter(torch.tensor(float(cfg.popularity_weight)))


def biased(scores: Tensor, popularity: Tensor, weight: Tensor | None) -> Tensor:
    """Scores with what popularity adds, both of any one shape; as they are without a weight."""
    return scores if weight is None else scores + weight * popularity


class TwoTower(nn.Module):
    """User tower and ad tower over one item encoder, and by config the advertiser tower."""

    def __init__(self, encoder: ItemEncoder, shape: TwoTowerShape, cfg: TwoTowerConfig) -> None:
        super().__init__()
        self.dim = cfg.dim
        self.encoder = encoder
        self.ad_tower = AdTower(cfg)
        self.user_tower = UserTower(shape, cfg)
        self.dropout = nn.Dropout(cfg.dropout)
        self.popularity_weight = _popularity_weight(cfg)
        self.advertiser_tower = None if cfg.advertiser_weight is None else AdvertiserTower(cfg)

    def users(
        self, history_BH: Tensor, age_BH: Tensor, count_BH: Tensor, profile_BF: Tensor, context_BF: Tensor
    ) -> Tensor:
        """Unit user vectors, shape ``(B, D)``; arguments as in :class:`Batch`."""
        if history_BH.shape[1]:
            items, position_BH = history_BH.clamp_min(0).unique(return_inverse=True)
            x_BHD = self.dropout(self.encoder(items))[position_BH]
        else:  # a user by profile alone
            x_BHD = self.user_tower.empty.new_zeros(*history_BH.shape, self.dim)
        return self.user_tower(x_BHD, age_BH, count_BH, history_BH != NO_ITEM, profile_BF, context_BF)

    def ads(self, ads_N: Tensor) -> Tensor:
        """Unit ad vectors, shape ``(N, D)``."""
        return self.ad_tower(self.dropout(self.encoder(ads_N)))

    def advertisers(self, advertisers_A: Tensor) -> Tensor:
        """Unit advertiser vectors, shape ``(A, D)``.

        Raises:
            ValueError: there is no advertiser tower.
        """
        if self.advertiser_tower is None:
            raise ValueError("no advertiser tower was trained; set retrieval.model.advertiser_weight")
        first = len(self.encoder.codes_NF) - len(self.encoder.text_AE)  # items are the ads, then the advertisers
        return self.advertiser_tower.advertisers(self.dropout(self.encoder(first + advertisers_A)))


def sampled_softmax(scores_BC: Tensor, among: Candidates) -> Tensor:
    """Mean loss of (user, target) pairs against the candidates of a batch.

    A candidate's expected count is taken out of its logit (log-Q correction); as a negative it counts as often as it
    was drawn.

    Args:
        scores_BC: inner products over the temperature.
        among: the candidates.

    Returns:
        A scalar.
    """
    logits_BC = scores_BC - among["log_q_C"]
    positive_P = logits_BC[among["pair_row_P"], among["pair_column_P"]]
    negatives_B = torch.where(among["legal_BC"], logits_BC + among["log_count_C"], -torch.inf).logsumexp(1)
    # softplus(n - p) is log(exp(p) + exp(n)) - p
    return nn.functional.softplus(negatives_B[among["pair_row_P"]] - positive_P).mean()


class TwoTowerModule(L.LightningModule):
    """Training of the towers; ``val_recall`` is recall@k among the ads active in each request's market.

    Where fewer than ``2 k`` are active the list has half of them.

    It is the mean over the requests of all processes that train together, so that all of them choose the same epoch.

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
        self._validated = torch.zeros(3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True, batch_size=len(batch["history_BH"]))
        return loss

    def loss(self, batch: Batch) -> Tensor:
        """Of a batch of training requests."""
        model = self.model
        user_BD = self._users(batch)
        loss = self._softmax(user_BD, model.ads, batch["ads"], model.popularity_weight)
        tower, among, weight = model.advertiser_tower, batch["advertisers"], self.cfg.advertiser_weight
        if tower is None or among is None or weight is None:
            return loss
        return loss + weight * self._softmax(tower.users(user_BD), model.advertisers, among, tower.popularity_weight)

    def _users(self, batch: Batch | ValidationBatch) -> Tensor:
        return self.model.users(
            batch["history_BH"], batch["age_BH"], batch["count_BH"], batch["profile_BF"], batch["context_BF"]
        )

    def _softmax(
        self, user_BD: Tensor, embed: Callable[[Tensor], Tensor], among: Candidates, popularity_weight: Tensor | None
    ) -> Tensor:
        scores_BC = user_BD @ embed(among["item_C"]).t() / self.cfg.temperature
        return sampled_softmax(biased(scores_BC, among["popularity_BC"], popularity_weight), among)

    def on_validation_epoch_start(self) -> None:
        self._ad_vectors_ND = ad_vectors(self.model, self.n_ads)
        # Sums of nll and recall, and the requests counted.
        self._validated = torch.zeros(3, dtype=torch.float32, device=self.device)

    def validation_step(self, batch: ValidationBatch, batch_idx: int) -> None:
        user_BD = self._users(batch)
        assert self._ad_vectors_ND is not None
        active_BN, target_BN = batch["active_BN"], batch["target_BN"] & batch["active_BN"]
        scores_BN = biased(
            user_BD @ self._ad_vectors_ND.t() / self.cfg.temperature,
            batch["popularity_BN"],
            self.model.popularity_weight,
        ).masked_fill(~active_BN, -torch.inf)
        targets_B = target_BN.sum(1)
        nll_B = scores_BN.logsumexp(1) - scores_BN.masked_fill(~target_BN, 0).sum(1) / targets_B.clamp_min(1)
        top_BK = scores_BN.topk(min(self.k, self.n_ads), dim=1).indices
        # Among as many places as there are ads any order recalls all.
        k_B = ((active_BN.sum(1) + 1) // 2).clamp(1, top_BK.shape[1])
        listed_BK = torch.arange(top_BK.shape[1], device=top_BK.device) < k_B[:, None]
        recall_B = (target_BN.gather(1, top_BK) & listed_BK).sum(1) / targets_B.clamp_min(1).minimum(k_B)
        counted = targets_B > 0
        n = int(counted.sum())
        if n:
            means = torch.stack([nll_B[counted].mean(), recall_B[counted].mean(), nll_B.new_ones(())])
            self._validated += n * means

    def on_validation_epoch_end(self) -> None:
        """Logs ``val_nll`` and ``val_recall``; nothing where no process has counted a request."""
        self._ad_vectors_ND = None
        # One sum over the processes, which those without a counted request take part in.
        nll, recall, n = self.trainer.strategy.reduce(self._validated, reduce_op="sum")
        if n:
            self.log("val_nll", nll / n)
            self.log("val_recall", recall / n, prog_bar=True)

    def configure_optimizers(self) -> RowsAndLayers:
        tables = {id(p) for name, p in self.named_parameters() if "embedding_bags" in name}
        return RowsAndLayers(
            [p for p in self.parameters() if id(p) in tables],
            [p for p in self.parameters() if id(p) not in tables],
            lr=self.cfg.learning_rate,
            weight_decay=self.cfg.weight_decay,
        )

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        if gradient_clip_val is not None:
            clip_gradients(self.parameters(), float(gradient_clip_val))


class RowAdam:
    """Adam of tables with sparse gradients; a row moves, and its moments decay, in the steps that have read it.

    The rule of ``torch.optim.SparseAdam``, whose sums of sparse tensors take several times as long as the few rows that
    are read and written here. A part of `RowsAndLayers`, whose step it shares.

    Args:
        tables: parameters whose gradients are sparse.
        lr, betas, eps: as of Adam.
    """

    def __init__(
        self, tables: list[nn.Parameter], *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        self.tables, self.lr, self.betas, self.eps = tables, lr, betas, eps
        self.states: list[dict[str, Any]] = [{} for _ in tables]

    @torch.no_grad()
    def step(self) -> None:
        """Move the rows that have a gradient."""
        for table, state in zip(self.tables, self.states, strict=True):
            if table.grad is not None:
                self._move(table, table.grad.coalesce(), state)

    def state_dict(self) -> dict[str, Any]:
        """Moments and steps of each table."""
        return {"states": self.states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Back from :meth:`state_dict`."""
        self.states = [
            {name: value.to(table.device) if isinstance(value, Tensor) else value for name, value in state.items()}
            for table, state in zip(self.tables, state_dict["states"], strict=True)
        ]

    def _move(self, table: nn.Parameter, gradient: Tensor, state: dict[str, Any]) -> None:
        betas = self.betas
        rows_R, gradient_RD = gradient.indices()[0], gradient.values()
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(table), "exp_avg_sq": torch.zeros_like(table)}
        state["step"] += 1
        mean_RD = state["exp_avg"].index_select(0, rows_R).lerp_(gradient_RD, 1 - betas[0])
        square_RD = state["exp_avg_sq"].index_select(0, rows_R).mul_(betas[1])
        square_RD.addcmul_(gradient_RD, gradient_RD, value=1 - betas[1])
        state["exp_avg"].index_copy_(0, rows_R, mean_RD)
        state["exp_avg_sq"].index_copy_(0, rows_R, square_RD)
        size = self.lr * (1 - betas[1] ** state["step"]) ** 0.5 / (1 - betas[0] ** state["step"])
        table.index_add_(0, rows_R, mean_RD.div_(square_RD.sqrt_().add_(self.eps)), alpha=-size)


class RowsAndLayers(torch.optim.Optimizer):
    """Adam that moves only the rows of a table that have a gradient, and AdamW of everything else.

    Args:
        tables: parameters with sparse gradients; they have no weight decay.
        layers: the others.
        lr: learning rate of both.
        weight_decay: of the layers.
    """

    def __init__(
        self, tables: list[nn.Parameter], layers: list[nn.Parameter], *, lr: float, weight_decay: float
    ) -> None:
        self.parts: list[RowAdam | torch.optim.Optimizer] = [RowAdam(tables, lr=lr)] if tables else []
        self.parts.append(torch.optim.AdamW(layers, lr=lr, weight_decay=weight_decay, fused=True))
        super().__init__([*tables, *layers], {"lr": lr})

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def clip_gradients(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scale gradients, sparse ones too, so that their norm in all is at most ``largest``."""
    values = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()  # a row that was read twice counts once, with its sum
            values.append(parameter.grad._values())
        else:
            values.append(parameter.grad)
    if not values:
        return
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(value) for value in values]))
    scale = (largest / (norm + 1e-6)).clamp(max=1.0)
    for value in values:
        value.mul_(scale)


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
