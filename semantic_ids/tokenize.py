"""From a log to unique IDs: embed, train the tokenizer, make the codes unique.

    log ──► embeddings of advertisers or items ──► tokenizer ──► greedy codes ──► unique codes ──► an artifact

Only conversions of the prior's fit span are read, so an ID never knows what came after it.

Shapes: A entities, N new ones, L levels, D features of an embedding.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import save_file

from data.artifacts import hash_file, to_plain
from data.errors import UserError
from data.log import Log
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.config import COLLABORATIVE, NAMES, TEXT, EmbeddingConfig, EncoderConfig, SemanticIdsConfig
from semantic_ids.embeddings import (
    Embeddings,
    collaborative_embeddings,
    join_sources,
    precomputed_embeddings,
    text_embeddings,
)
from semantic_ids.names import check_named, spell
from semantic_ids.quality import quality
from semantic_ids.tokenizer import Tokenizer, fit_tokenizer, quantize
from semantic_ids.unique import number_collisions, resolve_collisions, sizes_that_hold

VECTORS, FACTS, ENTITIES, TOKENIZER = "embeddings.safetensors", "embeddings.json", "entities.parquet", "tokenizer"
_ID_COLUMNS = {"advertiser": "advertiser_id", "item": "ad_id"}
logger = logging.getLogger(__name__)


def entities(log: Log) -> pl.DataFrame:
    """What has IDs, in the log's order: ``advertiser_id`` (of an item the id of the ad), ``name`` and ``text``."""
    return log.tables.advertisers.select("advertiser_id", "name", pl.col("text").fill_null(""))


def entity_embeddings(log: Log, cfg: SemanticIdsConfig, *, cache_dir: Path | None = None) -> Embeddings:
    """What is said of each entity, joined with who else its customers converted with in the fit span.

    Args:
        log: texts, and conversions up to the end of ``prior_fit``; those of an advertiser with an ad or without: an
            ad makes no difference to what an advertiser sells, and more than twice as many are known so.
        cfg: entity, encoder, weights.
        cache_dir: folder of earlier results.

    Returns:
        ``(A, D)`` in the log's order: text, precomputed sources, co-conversions; for the tokenizer ``names`` the words
        of its name, and nothing else.

    Raises:
        UserError: a precomputed source or the encoder cannot be read, values are no numbers, or no name has a word
            where names are asked for.
    """
    embedding, frame, sources = cfg.embedding, entities(log), {}
    if cfg.tokenizer == NAMES:
        words = spell(frame["name"].to_list(), cfg.names.levels)
        check_named(words)
        return _of_words(words, embedding.encoder, cache_dir)
    if embedding.text_weight > 0:
        vectors = text_embeddings(frame["text"].to_list(), embedding.encoder, cache_dir=cache_dir)
        sources[TEXT] = (vectors, embedding.text_weight)
    sources |= _precomputed(log.advertiser_ids, embedding, _ID_COLUMNS[log.entity], {})
    if embedding.collaborative_weight > 0:
        advertiser_N = log.events.advertiser
        known_N = log.is_purchase & (advertiser_N >= 0) & (log.events.period <= log.split.prior_fit[1])
        vectors = collaborative_embeddings(
            log.events.user[known_N],
            advertiser_N[known_N],
            n_advertisers=len(log.advertiser_ids),
            dim=embedding.collaborative_dim,
            context_smoothing=embedding.context_smoothing,
            cache_dir=cache_dir,
        )
        sources[COLLABORATIVE] = (vectors, embedding.collaborative_weight)
    return join_sources(sources)


def embed_new(
    frame: pl.DataFrame,
    cfg: SemanticIdsConfig,
    *,
    source_names: Sequence[str],
    source_dims: Sequence[int],
    cache_dir: Path | None = None,
) -> Embeddings:
    """Embeddings of entities that no log knows, beside those of an ID table.

    Args:
        frame: ``advertiser_id`` (of an item the id of the ad) and ``text``, or ``name`` where names are the IDs.
        cfg: of the table.
        source_names: sources of the table's embeddings, in order.
        source_dims: features of each.
        cache_dir: folder of earlier text embeddings.

    Returns:
        ``(N, D)``. Known are the text, or the name, and, as far as their files have the entities, precomputed vectors;
        the block of a source that knows nothing of an entity is zero.

    Raises:
        UserError: the encoder gives other features than the table has, or as of `entity_embeddings`.
    """
    dims = dict(zip(source_names, source_dims, strict=True))
    if cfg.tokenizer == NAMES:
        return _of_words(spell(frame["name"].to_list(), len(dims)), cfg.embedding.encoder, cache_dir)
    sources = {name: (np.zeros((len(frame), dim), dtype=np.float32), 1.0) for name, dim in dims.items()}
    if TEXT in dims:
        texts = frame["text"].fill_null("").to_list()
        vectors = text_embeddings(texts, cfg.embedding.encoder, cache_dir=cache_dir)
        if vectors.shape[1] != dims[TEXT]:
            raise UserError(
                f"texts encoded in {vectors.shape[1]} features by {cfg.embedding.encoder.name}",
                expected=f"{dims[TEXT]} features, as the ID table's embeddings have",
                action="use the encoder the IDs were made with",
            )
        sources[TEXT] = (vectors, cfg.embedding.text_weight)
    allowed = [replace(one, missing="zero") for one in cfg.embedding.precomputed if one.source in dims]
    embedding = replace(cfg.embedding, precomputed=allowed)
    sources |= _precomputed(frame["advertiser_id"].to_numpy(), embedding, _ID_COLUMNS[cfg.entity], dims)
    return join_sources(sources)


def _of_words(words: Sequence[Sequence[str]], encoder: EncoderConfig, cache_dir: Path | None) -> Embeddings:
    """A source a word's place; a word that is not there is a block of zeros."""
    by_level = list(zip(*words, strict=True))
    vectors = text_embeddings([word for level in by_level for word in level], encoder, cache_dir=cache_dir)
    blocks = np.split(vectors, len(by_level))
    return join_sources({f"word_{level}": (block, 1.0) for level, block in enumerate(blocks, 1)})


def _precomputed(
    ids_A: NDArray[Any], cfg: EmbeddingConfig, id_column: str, dims: dict[str, int]
) -> dict[str, tuple[NDArray[np.float32], float]]:
    """Matrix and weight of each precomputed source; what is wrong with any of them is told together."""
    sources, errors = {}, []
    for one in cfg.precomputed:
        try:
            vectors = precomputed_embeddings(ids_A, one, id_column=id_column, width=dims.get(one.source))
            sources[one.source] = (vectors, one.weight)
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserError.collect(errors)
    return sources


def precomputed_content(cfg: EmbeddingConfig) -> list[str | None]:
    """Hash of each precomputed file, None for one that is not there: what a stage's key depends on beside the paths."""
    paths = [Path(one.path).expanduser() for one in cfg.precomputed]
    return [hash_file(path) if path.is_file() else None for path in paths]


@dataclass(frozen=True)
class BuiltIds:
    """IDs, and what they were made of.

    Attributes:
        ids: the unique IDs.
        tokenizer: encodes further embeddings.
        embeddings: what was tokenised.
        greedy_AL: codes before collisions were resolved.
        reconstruction_AD: decoded embeddings.
        report: of `semantic_ids.quality.quality`.
    """

    ids: AdvertiserIds
    tokenizer: Tokenizer
    embeddings: Embeddings
    greedy_AL: NDArray[np.int64]
    reconstruction_AD: NDArray[np.float32]
    report: dict[str, Any]

    def save(self, directory: Path, log: Log, cfg: SemanticIdsConfig) -> None:
        """Write the IDs, their tokenizer and, for reports, their embeddings and words, into an existing directory."""
        self.ids.save(directory)
        self.tokenizer.save(directory / TOKENIZER)
        frame = entities(log)
        save_embeddings(directory, self.embeddings, self.greedy_AL, self.reconstruction_AD, cfg=cfg, frame=frame)


def save_embeddings(
    directory: Path,
    embeddings: Embeddings,
    greedy_AL: NDArray[np.integer],
    reconstruction_AD: NDArray[np.floating],
    *,
    cfg: SemanticIdsConfig,
    frame: pl.DataFrame,
) -> None:
    """Write what IDs were made of, and in words for whom.

    Args:
        directory: an existing one.
        embeddings: what was tokenised.
        greedy_AL: codes before collisions were resolved.
        reconstruction_AD: decoded embeddings.
        cfg: what made them.
        frame: of `entities`, in the same order.
    """
    arrays: dict[str, NDArray[Any]] = {
        "vectors_AD": np.ascontiguousarray(embeddings.vectors_AD, dtype=np.float32),
        "greedy_AL": np.ascontiguousarray(greedy_AL, dtype=np.int32),
        "reconstruction_AD": np.ascontiguousarray(reconstruction_AD, dtype=np.float16),
    }
    save_file(arrays, directory / VECTORS)
    facts = {
        "source_names": list(embeddings.source_names),
        "source_dims": list(embeddings.source_dims),
        "entity": cfg.entity,
        "config": to_plain(cfg),
    }
    (directory / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    frame.select("advertiser_id", "name", "text").write_parquet(directory / ENTITIES)


def build_ids(log: Log, cfg: SemanticIdsConfig, *, work_dir: Path, cache_dir: Path | None = None) -> BuiltIds:
    """Train the tokenizer and give every advertiser, or item, its ID.

    Args:
        log: the entities, and the fit span.
        cfg: entity, embeddings, tokenizer, training.
        work_dir: checkpoints of the training.
        cache_dir: folder of earlier embeddings.

    Returns:
        The IDs and what they were made of.

    Raises:
        UserError: none of the entities or more than the code space holds, embeddings that are no numbers, or a
            source that cannot be read.
        ValueError: the log was loaded with another entity.

    With fewer entities than codes a level, the codes left over stay unused (a warning says so, the report counts them
    as dead). Equal embeddings, those of entities nothing is known about among them, get neighbouring IDs.
    """
    if log.entity != cfg.entity:
        raise ValueError(f"IDs of {cfg.entity}s from a log of {log.entity}s; load it with entity={cfg.entity!r}")
    if cfg.level_sizes:
        _check_sizes(len(log.advertiser_ids), cfg)
    embeddings = entity_embeddings(log, cfg, cache_dir=cache_dir)
    tokenizer = fit_tokenizer(embeddings, cfg, work_dir=work_dir)
    quantising = tokenizer.codebooks
    latent_AE = tokenizer.latent(embeddings.vectors_AD)
    greedy_AL, quantized_AE = quantize(latent_AE, quantising)
    reconstruction_AD = tokenizer.decode(quantized_AE)
    if cfg.tokenizer == NAMES:
        codes_AL, codebooks = number_collisions(greedy_AL, quantising)
    else:
        codes_AL, codebooks = resolve_collisions(latent_AE, greedy_AL, quantising)
    extra = len(codebooks) > len(quantising)
    ids = AdvertiserIds(log.advertiser_ids, codes_AL, codebooks, extra_level=extra, entity=log.entity)
    sizes = [len(book) for book in quantising]
    report = quality(embeddings.vectors_AD, codes_AL, greedy_AL, reconstruction_AD, sizes, seed=cfg.seed)
    report |= {"known": embeddings.known()}
    return BuiltIds(ids, tokenizer, embeddings, greedy_AL, reconstruction_AD, report)


def _check_sizes(n: int, cfg: SemanticIdsConfig) -> None:
    """Refuse a code space that is too small before any work, and warn of codes that cannot be used."""
    sizes, key = cfg.level_sizes, f"semantic_ids.{cfg.tokenizer}.level_sizes"
    if n > (capacity := math.prod(sizes)):
        raise UserError(
            f"{n} {cfg.entity}s for {key}={sizes}",
            expected=f"at most {capacity} {cfg.entity}s, as many as these sizes have IDs",
            action=f"set {key}={sizes_that_hold(n, len(sizes))}",
        )
    if n < max(sizes):
        fitting = [min(size, n) for size in sizes]
        logger.warning("%d %ss cannot use all of %s codes a level; %s=%s would fit", n, cfg.entity, sizes, key, fitting)
