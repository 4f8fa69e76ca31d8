"""From a log to unique advertiser IDs: embed, train the RQ-VAE, make the codes unique.

Only conversions of the prior's fit span are read, so an ID never knows what came after it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.errors import UserError
from data.log import Log
from models.rqvae import RQVAEModule
from models.training import EpochSampler, fit
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.config import EmbeddingConfig, SemanticIdsConfig
from semantic_ids.embeddings import Embeddings, collaborative_embeddings, join_sources, text_embeddings
from semantic_ids.quality import quality
from semantic_ids.unique import resolve_collisions


def advertiser_embeddings(log: Log, cfg: EmbeddingConfig, *, cache_dir: Path | None = None) -> Embeddings:
    """What each advertiser sells, joined with who else its customers converted with in the fit span.

    Args:
        log: texts of the advertisers, and label conversions up to the end of ``prior_fit``.
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
        events = log.events.select(log.is_label & (log.events.advertiser >= 0) & (log.events.period <= last))
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
    """
    embeddings = advertiser_embeddings(log, cfg.embedding, cache_dir=cache_dir)
    capacity = int(np.prod(cfg.rqvae.level_sizes))
    if len(embeddings.vectors_AD) > capacity:
        fitting = int(np.ceil(len(embeddings.vectors_AD) ** (1 / len(cfg.rqvae.level_sizes))))
        raise UserError(
            f"{len(embeddings.vectors_AD)} advertisers for level_sizes={list(cfg.rqvae.level_sizes)}",
            expected=f"at most {capacity}, the IDs that these sizes hold",
            action=f"set semantic_ids.rqvae.level_sizes to at least {[fitting] * len(cfg.rqvae.level_sizes)}",
        )
    x_AD = torch.from_numpy(embeddings.vectors_AD)
    module = RQVAEModule.of(x_AD, list(embeddings.source_dims), cfg.rqvae, seed=cfg.seed)
    loader: DataLoader = DataLoader(
        x_AD,  # type: ignore[arg-type]
        batch_size=cfg.rqvae.batch_size,
        sampler=EpochSampler(len(x_AD), seed=cfg.seed),
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
