"""Training the two-tower on a log, and the trained towers as an artifact.

    directory/model.safetensors   weights and the items' features
    directory/two_tower.json      sizes and config
    directory/index/              the ad index

Shapes: B users, I ads, A advertisers, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from data.artifacts import atomic_directory
from data.errors import LineageError, UserError
from data.log import Log
from data.split import Span
from models.training import EpochSampler, FitResult, fit
from models.two_tower import (
    NO_ITEM,
    ItemEncoder,
    TwoTower,
    TwoTowerConfig,
    TwoTowerModule,
    TwoTowerShape,
    ad_vectors,
)
from retrieval.config import PairsConfig, RetrievalConfig
from retrieval.index import AdIndex, IndexConfig
from retrieval.two_tower_data import (
    AGE_EDGES,
    COUNT_EDGES,
    LogPopularity,
    TrainingBatches,
    UserInputs,
    ValidationBatches,
    build_items,
    context_values,
    log_popularity,
)

ITEMS_AT_ONCE = 8192


@dataclass
class TrainedTwoTower:
    """Trained towers, ready to embed users of a log and to search its ads.

    Attributes:
        model: the towers.
        index: the ads.
        shape: sizes from the data.
        cfg: sizes of the towers.
    """

    model: TwoTower
    index: AdIndex
    shape: TwoTowerShape
    cfg: TwoTowerConfig

    @property
    def popularity_weight(self) -> float:
        """Of the log of an ad's conversions, beside similarity over temperature; 0 where the towers have none."""
        weight = self.model.popularity_weight
        return 0.0 if weight is None else float(weight.detach())

    def embedder(self, log: Log, cfg: PairsConfig) -> UserEmbedder:
        """Embeds users of a log.

        Raises:
            LineageError: the log has other ads or profile columns than the one trained on.
        """
        expected = (self.shape.item_features["ad"] - 1, self.shape.user_features)
        given = (len(log.ad_ids), _user_features(log))
        if given != expected:
            raise LineageError(
                f"a log with {given[0]} ads and profile columns {given[1]}",
                expected=f"{expected[0]} ads and {expected[1]}, which the two-tower was trained on",
                action="train the two-tower on this log.",
            )
        return UserEmbedder(self.model, log, cfg, context=self.shape.context)

    def advertiser_scores(self, log: Log, cfg: PairsConfig) -> AdvertiserScores:
        """What the advertiser tower says of a user.

        Raises:
            UserError: these towers were trained without it.
        """
        if self.model.advertiser_tower is None:
            raise UserError(
                "a two-tower without an advertiser tower",
                expected="one trained with it, which the channel advertiser reads",
                action="set retrieval.model.advertiser_weight=0.3 and train it again, or leave the channel out.",
            )
        popularity = log_popularity(log, cfg, of_advertisers=True)
        return AdvertiserScores(self.model, popularity, temperature=self.cfg.temperature)

    def save(self, directory: Path) -> None:
        """Write weights, sizes and index, whole or not at all."""
        with atomic_directory(directory) as temporary:
            state = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
            save_file(state, temporary / "model.safetensors")
            facts = {"shape": asdict(self.shape), "config": asdict(self.cfg), "rows": self._rows()}
            (temporary / "two_tower.json").write_text(json.dumps(facts, indent=2) + "\n")
            self.index.save(temporary / "index")

    @classmethod
    def load(cls, directory: Path, index_cfg: IndexConfig) -> Self:
        """Read trained towers back.

        Args:
            directory: where :meth:`save` wrote them.
            index_cfg: the index wanted; one of another kind or build than the saved is made of the towers.

        Raises:
            UserError: a file is missing or damaged.
        """
        try:
            facts = json.loads((directory / "two_tower.json").read_text())
            state = load_file(directory / "model.safetensors")
            # Towers saved before there was a context were trained without.
            shape, cfg = TwoTowerShape(**facts["shape"]), TwoTowerConfig(**{"context": [], **facts["config"]})
            model = TwoTower(_blank_encoder(facts["rows"], shape, cfg), shape, cfg)
            model.load_state_dict(state)
        except Exception as error:
            raise UserError(
                f"the two-tower in {directory}",
                expected=f"a readable artifact ({type(error).__name__}: {error})",
                action="delete the directory and run the stage again.",
            ) from error
        model.eval()
        if AdIndex.saved_build(directory / "index") != index_cfg.build:
            return cls(model, index_ads(model, shape, index_cfg), shape, cfg)
        return cls(model, AdIndex.load(directory / "index", index_cfg, dim=cfg.dim), shape, cfg)

    def _rows(self) -> dict[str, int]:
        return {"items": len(self.model.encoder.codes_NF), "advertisers": len(self.model.encoder.text_AE)}


class UserEmbedder:
    """User vectors of visits at the start of a period, from purchases before it.

    Args:
        model: the towers.
        log: the purchases and profiles.
        cfg: length of the history.
        context: values of the context's features that the towers were trained on.
    """

    def __init__(self, model: TwoTower, log: Log, cfg: PairsConfig, *, context: Mapping[str, Sequence[Any]]) -> None:
        self.model, self.users = model, UserInputs(log, cfg, context=context)
        self._x_ND = self._embed_items()

    def __call__(
        self, user_B: NDArray[np.integer], market_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Unit vectors, shape ``(B, D)``; NaN for a user without any purchase before the period.

        The towers have a vector for such a user too, but it was learned from almost no example.
        """
        parts = []
        for start in range(0, len(user_B), 512):
            user, market, period = (values[start : start + 512] for values in (user_B, market_B, period_B))
            vectors = self.forward(self.inputs(user, market, period))
            vectors[self.users.histories.sizes(user, period) == 0] = np.nan
            parts.append(vectors)
        return np.concatenate(parts) if parts else np.empty((0, self.model.dim), dtype=np.float32)

    def inputs(
        self, user_B: NDArray[np.integer], market_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> dict[str, Tensor]:
        """What the user tower reads, but for the embeddings of the history."""
        found = self.users(user_B, market_B, period_B)
        return {name: tensor.to(self._x_ND.device) for name, tensor in found.items()}

    @torch.no_grad()
    def forward(self, inputs: dict[str, Tensor]) -> NDArray[np.float32]:
        """The user tower alone, on `inputs`."""
        item_BH = inputs["history_BH"]
        vectors_BD: Tensor = self.model.user_tower(
            self._x_ND[item_BH.clamp_min(0)],
            inputs["age_BH"],
            inputs["count_BH"],
            item_BH != NO_ITEM,
            inputs["profile_BF"],
            inputs["context_BF"],
        )
        return vectors_BD.cpu().numpy()

    @torch.no_grad()
    def _embed_items(self) -> Tensor:
        """Embeddings of all items, looked up by every request instead of made anew."""
        self.model.eval()
        codes_NF = self.model.encoder.codes_NF
        items = torch.arange(len(codes_NF), device=codes_NF.device)
        return torch.cat([self.model.encoder(part) for part in items.split(ITEMS_AT_ONCE)])


class AdvertiserScores:
    """Log-probability of each advertiser, by the advertiser tower.

    Args:
        model: towers with an advertiser tower.
        popularity: of advertisers at a request.
        temperature: of the towers' softmax.
    """

    def __init__(self, model: TwoTower, popularity: LogPopularity, *, temperature: float) -> None:
        assert model.advertiser_tower is not None
        self.tower, self.popularity, self.temperature = model.advertiser_tower, popularity, temperature
        self._advertisers = np.arange(len(model.encoder.text_AE), dtype=np.int32)
        self._vectors_AD = self._embed(model.eval())

    @torch.no_grad()
    def __call__(self, vector_D: NDArray[np.float32], market: int, period: int) -> NDArray[np.float32]:
        """Of a user by the user tower's vector, ``(A,)``."""
        user_D = self.tower.users(torch.from_numpy(vector_D).to(self._vectors_AD.device))
        score_A = (self._vectors_AD @ user_D).cpu() / self.temperature
        weight = self.tower.popularity_weight
        if weight is not None:
            score_A += float(weight) * torch.from_numpy(self.popularity(self._advertisers, market, period))
        log_prob_A: NDArray[np.float32] = score_A.log_softmax(0).numpy()
        return log_prob_A

    @torch.no_grad()
    def _embed(self, model: TwoTower) -> Tensor:
        rows_A = torch.from_numpy(self._advertisers).to(model.encoder.codes_NF.device)
        return torch.cat([model.advertisers(part) for part in rows_A.split(ITEMS_AT_ONCE)])


def train_two_tower(
    log: Log,
    codes_AL: NDArray[np.int64],
    text_AE: NDArray[np.float32],
    cfg: RetrievalConfig,
    *,
    work_dir: Path,
    fit_span: str | Span = "prior_fit",
    select_span: str | Span | None = "prior_select",
) -> tuple[TrainedTwoTower, FitResult]:
    """Train on one span, choose the epoch on another, index the ads.

    Args:
        log: the log.
        codes_AL: semantic IDs of the log's advertisers.
        text_AE: text embedding of each advertiser.
        cfg: towers, requests, trainer, index.
        work_dir: checkpoints; a fit that was cut off resumes from here.
        fit_span: requests trained on.
        select_span: requests that the epoch is chosen by; None trains for all epochs of ``cfg.trainer``.

    Returns:
        The trained towers with their index, and what the fit did.

    Raises:
        UserError: the fit span has no converted ad, or several GPUs are asked for.
    """
    if cfg.trainer.devices > 1 and cfg.trainer.on_gpu:
        raise UserError(
            f"retrieval.trainer.devices={cfg.trainer.devices} on GPUs",
            expected="one GPU, for NCCL does not reduce the sparse gradients of the towers' tables, or CPU processes",
            action="set retrieval.trainer.devices=1, or retrieval.trainer.accelerator=cpu",
        )
    targets = log.ad_targets(fit_span)
    if not len(targets):
        raise UserError(
            f"{fit_span} without a converted ad",
            expected="at least one conversion that names an ad and the market it was made in",
            action="check data.label_kinds, data.split.prior_fit, and ad_id and market_id of the events; a log without "
            "markets has one for all.",
        )
    # torch's generator is left alone: Lightning seeds what is drawn later, this seeds the weights.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        context = context_values(log, targets, cfg.model.context)
        model, shape = build_model(log, codes_AL, text_AE, cfg.model, context=context)
    module = TwoTowerModule(model, cfg.model, n_ads=len(log.ad_ids), k=cfg.pairs.recall_at)
    users = UserInputs(log, cfg.pairs, context=context)
    with_advertisers = cfg.model.advertiser_weight is not None
    train = TrainingBatches(log, targets, users, cfg.pairs, seed=cfg.seed, advertisers=with_advertisers)
    per_epoch = min(cfg.pairs.requests_per_epoch or len(train), len(train))
    train_loader: DataLoader = DataLoader(
        range(len(train)),  # type: ignore[arg-type]
        batch_size=cfg.pairs.batch_size,
        sampler=EpochSampler(len(train), seed=cfg.seed, per_epoch=per_epoch),
        collate_fn=train,
    )
    val_loader = None if select_span is None else _selection(log, select_span, users, cfg)
    result = fit(
        module,
        train_loader,
        val_loader,
        cfg.trainer,
        work_dir=work_dir,
        seed=cfg.seed,
        monitor=None if val_loader is None else "val_recall",
        mode="max",
    )
    model.cpu().eval()
    return TrainedTwoTower(model, index_ads(model, shape, cfg.index), shape, cfg.model), result


def _selection(log: Log, span: str | Span, users: UserInputs, cfg: RetrievalConfig) -> DataLoader | None:
    """A sample of the requests of a span; None where none of them converted with an ad that runs there."""
    select = log.ad_targets(span)
    rng = np.random.default_rng(cfg.seed)
    chosen = np.sort(rng.permutation(len(select))[: cfg.pairs.validation_requests])

    def runs(row: int) -> bool:
        return bool(np.isin(select.of(row), log.active_ads(int(select.market[row]), int(select.period[row])).ad).any())

    if not any(runs(row) for row in chosen.tolist()):
        return None
    validation = ValidationBatches(log, select, users, cfg.pairs, seed=cfg.seed)
    return DataLoader(chosen.tolist(), batch_size=128, collate_fn=validation)


def index_ads(model: TwoTower, shape: TwoTowerShape, cfg: IndexConfig) -> AdIndex:
    """An index of all ads of the log that towers were trained on."""
    n_ads = shape.item_features["ad"] - 1
    return AdIndex.build(ad_vectors(model, n_ads).numpy(), np.arange(n_ads, dtype=np.int32), cfg)


def build_model(
    log: Log,
    codes_AL: NDArray[np.int64],
    text_AE: NDArray[np.float32],
    cfg: TwoTowerConfig,
    *,
    context: Mapping[str, list[Any]] | None = None,
) -> tuple[TwoTower, TwoTowerShape]:
    """Untrained towers of a log, and their sizes; ``context`` is of `context_values`, none leaves it out.

    Raises:
        ValueError: semantic IDs or text embeddings are of another number of advertisers.
    """
    if len(text_AE) != len(log.advertiser_ids):
        raise ValueError(f"text embeddings of {len(text_AE)} advertisers for a log of {len(log.advertiser_ids)}")
    items = build_items(log, codes_AL)
    shape = TwoTowerShape(
        item_features=items.sizes,
        user_features=_user_features(log),
        text_dim=text_AE.shape[1],
        ages=len(AGE_EDGES) + 1,
        counts=len(COUNT_EDGES) + 1,
        context=dict(context or {}),
    )
    encoder = ItemEncoder(
        torch.from_numpy(items.codes_NF),
        torch.from_numpy(items.advertiser_N),
        torch.from_numpy(np.ascontiguousarray(text_AE, dtype=np.float32)),
        shape=shape,
        dim=cfg.dim,
        id_dropout=cfg.id_dropout,
    )
    return TwoTower(encoder, shape, cfg), shape


def _blank_encoder(rows: dict[str, Any], shape: TwoTowerShape, cfg: TwoTowerConfig) -> ItemEncoder:
    """An encoder of the right sizes whose values are about to be loaded."""
    n_items = int(rows["items"])
    return ItemEncoder(
        torch.zeros(n_items, len(shape.item_features), dtype=torch.int32),
        torch.zeros(n_items, dtype=torch.int32),
        torch.zeros(int(rows["advertisers"]), shape.text_dim),
        shape=shape,
        dim=cfg.dim,
    )


def _user_features(log: Log) -> dict[str, int]:
    return {f"user_{name}": len(values) for name, values in log.user_vocabularies.items()}
