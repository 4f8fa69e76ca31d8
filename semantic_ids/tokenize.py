"""From a log to unique advertiser IDs: embed, train the RQ-VAE, make the codes unique.

Only conversions of the prior's fit span are read, so an ID never knows what came after it.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.artifacts import to_plain
from data.log import Log
from models.rqvae import RQVAEModule
from models.training import EpochSampler, fit
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.config import EmbeddingConfig, SemanticIdsConfig
from semantic_ids.embeddings import Embeddings, collaborative_embeddings, join_sources, text_embeddings
from semantic_ids.quality import quality
from semantic_ids.unique import check_capacity, resolve_collisions

VECTORS, FACTS, ENTITIES = "embeddings.safetensors", "embeddings.json", "entities.parquet"
logger = logging.getLogger(__name__)


def advertiser_embeddings(log: Log, cfg: EmbeddingConfig, *, cache_dir: Path | None = None) -> Embeddings:
    """What each advertiser sells, joined with who else its customers converted with in the fit span.

    Args:
        log: texts of the advertisers, and conversions up to the end of ``prior_fit``, with an ad or without: an ad
            makes no difference to what an advertiser sells, and more than twice as many advertisers are known so.
        cfg: encoder and weights.
        cache_dir: folder of earlier text embeddings.

    Returns:
        ``(A, D)`` in the log's order.
    """
    sources = {}
    if cfg.text_weight > 0:
        texts = log.tables.advertisers["text"].fill_null("").to_list()
        sources["text"] = (text_embeddings(texts, cfg.encoder, cache_dir=cache_dir), cfg.text_weight)
    if cfg.collaborative_weight > 0:
        _, last = log.split.prior_fit
        events = log.events.select(log.is_purchase & (log.events.advertiser >= 0) & (log.events.period <= last))
        vectors = collaborative_embeddings(
            events.user, events.advertiser, n_advertisers=len(log.advertiser_ids), dim=cfg.collaborative_dim,
            context_smoothing=cfg.context_smoothing,
        )  # fmt: skip
        sources["collaborative"] = (vectors, cfg.collaborative_weight)
    return join_sources(sources)


@dataclass(frozen=True)
class BuiltIds:
    """Advertiser IDs, and what they were made of.

    Attributes:
        ids: the unique IDs.
        embeddings: what was tokenised.
        greedy_AL: codes before collisions were resolved.
        reconstruction_AD: decoded embeddings.
        report: of `semantic_ids.quality.quality`.
    """

    ids: AdvertiserIds
    embeddings: Embeddings
    greedy_AL: NDArray[np.int64]
    reconstruction_AD: NDArray[np.float32]
    report: dict[str, Any]

    def save(self, directory: Path, log: Log, cfg: SemanticIdsConfig) -> None:
        """Write the IDs and, for reports on them, their embeddings and words, into an existing directory."""
        self.ids.save(directory)
        arrays: dict[str, NDArray[Any]] = {
            "vectors_AD": np.ascontiguousarray(self.embeddings.vectors_AD),
            "greedy_AL": self.greedy_AL.astype(np.int32),
            "reconstruction_AD": self.reconstruction_AD.astype(np.float16),
        }
        save_file(arrays, directory / VECTORS)
        facts = {
            "source_names": list(self.embeddings.source_names),
            "source_dims": list(self.embeddings.source_dims),
            "entity": self.ids.entity,
            "config": to_plain(cfg),
        }
        (directory / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        log.tables.advertisers.select("advertiser_id", "name", "text").write_parquet(directory / ENTITIES)


def build_ids(log: Log, cfg: SemanticIdsConfig, *, work_dir: Path, cache_dir: Path | None = None) -> BuiltIds:
    """Train the tokenizer and give every advertiser its ID.

    Args:
        log: the advertisers and the fit span.
        cfg: embeddings, RQ-VAE, training.
        work_dir: checkpoints of the training.
        cache_dir: folder of earlier text embeddings.

    Returns:
        The IDs and what they were made of.

    Raises:
        UserError: more advertisers than the code space holds, or embeddings that are no numbers.

    With fewer advertisers than codes a level, the codes left over stay unused (a warning says so, the report
    counts them as dead). Equal embeddings, those of advertisers nothing is known about among them, get
    neighbouring IDs.
    """
    sizes = cfg.rqvae.level_sizes
    check_capacity(len(log.advertiser_ids), sizes)
    if len(log.advertiser_ids) < max(sizes):
        fitting = [min(size, len(log.advertiser_ids)) for size in sizes]
        logger.warning(
            "%d advertisers cannot use all of %s codes a level; semantic_ids.rqvae.level_sizes=%s would fit",
            len(log.advertiser_ids), list(sizes), fitting,
        )  # fmt: skip
    embeddings = advertiser_embeddings(log, cfg.embedding, cache_dir=cache_dir)
    x_AD = torch.from_numpy(embeddings.vectors_AD)
    module = RQVAEModule.of(x_AD, list(embeddings.source_dims), cfg.rqvae, seed=cfg.seed)
    loader: DataLoader[Tensor] = DataLoader(
        _Rows(x_AD),
        batch_size=cfg.rqvae.batch_size,
        sampler=EpochSampler(len(x_AD), seed=cfg.seed),
        collate_fn=_as_is,
    )
    result = fit(module, loader, None, cfg.trainer, work_dir=work_dir, seed=cfg.seed)
    model = module.model
    model.settle(x_AD)
    with torch.no_grad():
        latent_AE = model.latent(x_AD)
        greedy_AL, quantized_AE, _ = model.quantize(latent_AE)
        reconstruction_AD = model.decode(quantized_AE).numpy()
    quantising = [book.weight.detach().numpy().copy() for book in model.books]
    codes_AL, codebooks = resolve_collisions(latent_AE.numpy(), greedy_AL.numpy(), quantising)
    ids = AdvertiserIds(log.advertiser_ids, codes_AL, codebooks, extra_level=len(codebooks) > len(quantising))
    report = quality(embeddings.vectors_AD, codes_AL, greedy_AL.numpy(), reconstruction_AD, sizes, seed=cfg.seed)
    report |= {"epochs": result.epochs, "known": embeddings.known()}
    return BuiltIds(ids, embeddings, greedy_AL.numpy(), reconstruction_AD, report)


class _Rows(Dataset[Tensor]):
    """Rows of a matrix, a batch at a time."""

    def __init__(self, x_AD: Tensor) -> None:
        self.x_AD = x_AD

    def __len__(self) -> int:
        return len(self.x_AD)

    def __getitem__(self, row: int) -> Tensor:
        return self.x_AD[row]

    def __getitems__(self, rows: list[int]) -> Tensor:  # the loader's own hook for whole batches
        return self.x_AD[rows]


def _as_is(batch: Any) -> Any:
    return batch
