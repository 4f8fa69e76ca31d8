"""From a log to unique advertiser IDs: embed, train the RQ-VAE, make the codes unique.

Only conversions of the prior's fit span are read, so an ID never knows what came after it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.log import Log
from models.rqvae import RQVAEModule
from models.training import EpochSampler, fit
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.config import EmbeddingConfig, SemanticIdsConfig
from semantic_ids.embeddings import Embeddings, collaborative_embeddings, join_sources, text_embeddings
from semantic_ids.quality import quality
from semantic_ids.unique import check_capacity, resolve_collisions

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


def build_ids(
    log: Log, cfg: SemanticIdsConfig, *, work_dir: Path, cache_dir: Path | None = None
) -> tuple[AdvertiserIds, Embeddings, dict[str, Any]]:
    """Train the tokenizer and give every advertiser its ID.

    Args:
        log: the advertisers and the fit span.
        cfg: embeddings, RQ-VAE, training.
        work_dir: checkpoints of the training.
        cache_dir: folder of earlier text embeddings.

    Returns:
        IDs, embeddings, and the quality report.

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
    codebooks = [book.weight.detach().numpy().copy() for book in model.books]
    codes_AL = resolve_collisions(latent_AE.numpy(), greedy_AL.numpy(), codebooks)
    ids = AdvertiserIds(log.advertiser_ids, codes_AL, codebooks)
    report = quality(
        embeddings.vectors_AD, codes_AL, greedy_AL.numpy(), reconstruction_AD, ids.level_sizes, seed=cfg.seed
    )
    report |= {"epochs": result.epochs, "known": embeddings.known()}
    return ids, embeddings, report


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
