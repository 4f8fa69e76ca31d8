"""IDs of a changed catalogue: new entities get one beside the old, a refit after drift keeps what it can.

    assign   NEW ─► embedding (text; what no source knows is zero) ─► the tokenizer as it is ─► nearest free ID
             old IDs, codebooks and tokens stay as they are, so that a prior LM fitted on them goes on

    refit    log of today ─► embeddings, turned onto the axes of the old ones
                                │
             old tokenizer ─────┴─► trained on ─► codes renumbered to match the old ─► old IDs kept where the
                                                                                       geometry allows

*Turning.* Co-conversion features are singular vectors, whose signs and order are arbitrary from fit to fit. The
best rotation onto the old ones (orthogonal Procrustes, Schönemann 1966) changes no distance, and makes the old
tokenizer a start for the new.

*Matching.* Level by level, coarse first: an old code's place in the new latent space is the mean of what its old
members leave to this level there (the old vector, where nobody has the code any more). The assignment of old places
to new vectors with the least total squared distance of the members (Kuhn 1955) gives each new vector the number of
its old code.

*Keeping.* An entity keeps its whole old ID if that is its greedy ID after matching, or if describing it by the old
ID costs at most ``tolerance`` more squared error of its embedding (over the sources that know it), as a share of
the embeddings' variance. Else it keeps the longest prefix of the old ID for which the same holds with greedy codes
below it. Whole IDs that are kept are fixed; everybody else is placed beside them like a new entity.

Shapes: A entities, N new ones, C in both tables, L levels, P prefix lengths, V codes of a level, E latent features,
D features of the embedding, S sources, B rows of a block, K neighbours or columns.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

from data.artifacts import to_plain
from data.errors import UserError
from data.log import Log
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.config import COLLABORATIVE, NAMES, TEXT, PrecomputedConfig, SemanticIdsConfig
from semantic_ids.embeddings import Embeddings, text_embeddings, unit_rows
from semantic_ids.quality import (
    FEWEST_QUERIES,
    MOST_PAIRS,
    MOST_QUERIES,
    NEIGHBOURS,
    chance_share,
    moved,
    quality,
    quality_rows,
    reconstruction_error,
)
from semantic_ids.tokenize import (
    ENTITIES,
    FACTS,
    TOKENIZER,
    VECTORS,
    embed_new,
    entities,
    entity_embeddings,
    save_embeddings,
)
from semantic_ids.tokenizer import (
    RQKMeansTokenizer,
    RQVAETokenizer,
    Tokenizer,
    fit_tokenizer,
    load_tokenizer,
    quantize,
)
from semantic_ids.unique import place_new, resolve_collisions

TOLERANCE = 0.1
"""Extra squared error that keeping an old ID may cost, as a share of the embeddings' variance."""
ID, AD_ID, TEXTS = "advertiser_id", "ad_id", ("name", "text")
TEXT_VECTORS, ROWS = "text_embeddings.safetensors", "rows.json"
AGAIN = "make the IDs again: adsid run run.until=semantic_ids"
_PROBES, _APART = 8, 1e-2
"""Old texts that are embedded again, and how far apart a feature of the same text may lie by rounding."""
_BLOCK = 8192


# What an ID table became


@dataclass(frozen=True)
class Comparison:
    """An ID table beside an earlier one.

    Attributes:
        n_old: entities of the earlier table.
        n_added: entities of the later one alone.
        n_gone: entities of the earlier one alone.
        n_changed: entities of both whose codes differ.
        example: one of those that changed, or else of those that are gone, in words.
        books_changed: levels, from 1, whose codebooks differ in size or in any vector.
        kinds: what has the IDs, before and after, e.g. ``("advertiser", "advertiser")``.
    """

    n_old: int
    n_added: int
    n_gone: int
    n_changed: int
    example: str
    books_changed: tuple[int, ...]
    kinds: tuple[str, str]

    @property
    def only_grew(self) -> bool:
        """Every old entity has its old codes, and codes mean what they did."""
        return not (self.n_gone or self.n_changed or self.books_changed or self.kinds[0] != self.kinds[1])

    def in_words(self) -> str:
        """What is different, with an example."""
        parts = []
        if self.n_changed:
            parts.append(f"{self.n_changed:,} of {self.n_old:,} existing IDs changed")
        if self.n_gone:
            parts.append(f"{self.n_gone:,} of {self.n_old:,} entities are gone")
        if self.example:
            parts[-1] += f", e.g. {self.example}"
        if self.books_changed:
            parts.append(f"other codebooks at level {', '.join(map(str, self.books_changed))}")
        if self.kinds[0] != self.kinds[1]:
            parts.append(f"IDs of {self.kinds[0]}s became those of {self.kinds[1]}s")
        return "; ".join(parts) or f"{self.n_added:,} new entities, nothing else"


def compare(old: AdvertiserIds, new: AdvertiserIds) -> Comparison:
    """What became of the entities of an ID table."""
    row_of = {id_: row for row, id_ in enumerate(new.advertiser_ids.tolist())}
    row_A = np.array([row_of.get(id_, -1) for id_ in old.advertiser_ids.tolist()], dtype=np.int64)
    stayed = np.flatnonzero(row_A >= 0)
    levels = min(old.codes_AL.shape[1], new.codes_AL.shape[1])
    differs = (old.codes_AL[stayed, :levels] != new.codes_AL[row_A[stayed], :levels]).any(1)
    if old.codes_AL.shape[1] != new.codes_AL.shape[1]:
        differs[:] = True
    example = ""
    if len(gone := np.flatnonzero(row_A < 0)):
        example = f"{old.advertiser_ids[gone[0]]} with {' '.join(old.tokens(int(gone[0])))}"
    elif differs.any():
        before = int(stayed[np.argmax(differs)])
        after = int(row_A[before])
        example = f"{old.advertiser_ids[before]} from {' '.join(old.tokens(before))} to {' '.join(new.tokens(after))}"
    books = range(max(len(old.codebooks), len(new.codebooks)))
    return Comparison(
        n_old=len(old),
        n_added=len(new) - len(stayed),
        n_gone=len(gone),
        n_changed=int(differs.sum()),
        example=example,
        books_changed=tuple(level + 1 for level in books if not _same_book(old.codebooks, new.codebooks, level)),
        kinds=(old.entity, new.entity),
    )


def _same_book(old: Sequence[NDArray[np.float32]], new: Sequence[NDArray[np.float32]], level: int) -> bool:
    return level < min(len(old), len(new)) and np.array_equal(old[level], new[level])


# The artifact


@dataclass(frozen=True)
class IdArtifact:
    """The whole directory of an ID table.

    Attributes:
        ids: the table.
        tokenizer: embeds and quantises.
        cfg: what it was made with.
        embeddings: of its entities, in the table's order.
        greedy_AL: codes before collisions were resolved, without the extra level.
        reconstruction_AD: decoded embeddings of the greedy codes.
        entities: ``advertiser_id``, ``name``, ``text``, in the table's order.
        text_AE: sentence embeddings of the texts; None where the artifact has none.
    """

    ids: AdvertiserIds
    tokenizer: Tokenizer
    cfg: SemanticIdsConfig
    embeddings: Embeddings
    greedy_AL: NDArray[np.int64]
    reconstruction_AD: NDArray[np.float32]
    entities: pl.DataFrame
    text_AE: NDArray[np.float32] | None

    @property
    def books(self) -> list[NDArray[np.float32]]:
        """Codebooks of the levels that quantise, without the extra one."""
        return self.ids.codebooks[: self.ids.n_quantised]

    @classmethod
    def load(cls, directory: Path) -> IdArtifact:
        """Read everything.

        Raises:
            UserError: files are missing, as of an older adsid's table, damaged, or do not belong together.
        """
        ids = AdvertiserIds.load(directory)
        needed = (TOKENIZER, VECTORS, FACTS, ENTITIES)
        missing = [name for name in needed if not (directory / name).exists()]
        if missing:
            raise UserError(
                f"advertiser IDs in {directory} without {', '.join(missing)}",
                expected=f"an artifact with {', '.join(needed)}, which older versions of adsid did not write",
                action=AGAIN,
            )
        try:
            facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
            cfg, arrays = _config(facts["config"]), load_file(directory / VECTORS)
            embeddings = Embeddings(arrays["vectors_AD"], tuple(facts["source_names"]), tuple(facts["source_dims"]))
            greedy_AL, reconstruction_AD = arrays["greedy_AL"], arrays["reconstruction_AD"]
            frame = pl.read_parquet(directory / ENTITIES).select(ID, *TEXTS)
            texts = load_file(directory / TEXT_VECTORS) if (directory / TEXT_VECTORS).exists() else {}
            text_AE = texts["text_AE"] if texts else None
        except (
            KeyError, ValueError, TypeError, OSError, SafetensorError, OmegaConfBaseException, pl.exceptions.PolarsError
        ) as error:  # fmt: skip
            raise UserError(
                f"{directory} ({type(error).__name__}: {error})",
                expected=f"{VECTORS}, {FACTS} and {ENTITIES} as they were written",
                action=AGAIN,
            ) from error
        lengths = {VECTORS: len(embeddings.vectors_AD), ENTITIES: len(frame)}
        lengths |= {TEXT_VECTORS: len(text_AE)} if text_AE is not None else {}
        wrong = [f"{name} of {length} rows" for name, length in lengths.items() if length != len(ids)]
        if wrong or frame[ID].to_list() != ids.advertiser_ids.tolist():
            raise UserError(
                f"{directory} with {', '.join(wrong) or f'other ids in {ENTITIES}'} beside {len(ids)} IDs",
                expected="one row an ID in every file, in one order",
                action=AGAIN,
            )
        return cls(
            ids=ids,
            tokenizer=load_tokenizer(directory / TOKENIZER),
            cfg=cfg,
            embeddings=embeddings,
            greedy_AL=greedy_AL.astype(np.int64),
            reconstruction_AD=reconstruction_AD.astype(np.float32),
            entities=frame,
            text_AE=text_AE,
        )

    def save(self, directory: Path, *, tokenizer_from: Path | None = None) -> dict[str, Any]:
        """Write everything into an existing directory.

        Args:
            directory: to write into.
            tokenizer_from: a saved tokenizer to copy, byte by byte, in place of writing this one anew.

        Returns:
            The quality of the table; its rows are among the files.
        """
        self.ids.save(directory)
        if tokenizer_from is None:
            self.tokenizer.save(directory / TOKENIZER)
        else:
            shutil.copytree(tokenizer_from, directory / TOKENIZER)
        save_embeddings(
            directory,
            self.embeddings,
            self.greedy_AL,
            self.reconstruction_AD,
            cfg=self.cfg,
            frame=self.entities,
        )
        if self.text_AE is not None:
            save_file({"text_AE": np.ascontiguousarray(self.text_AE)}, directory / TEXT_VECTORS)
        report = quality(
            self.embeddings.vectors_AD,
            self.ids.codes_AL,
            self.greedy_AL,
            self.reconstruction_AD,
            self.ids.level_sizes,
            seed=self.cfg.seed,
        )
        rows = [to_plain(row) for row in quality_rows(report)]
        (directory / ROWS).write_text(json.dumps(rows, indent=0, allow_nan=False) + "\n", encoding="utf-8")
        return report | {"known": self.embeddings.known()}


# New entities


def assign(
    directory: Path, frame: pl.DataFrame, output: Path, *, skip_known: bool = False, cache_dir: Path | None = None
) -> dict[str, Any]:
    """Give new entities IDs beside those of an artifact, and write the grown artifact.

    Args:
        directory: the artifact; only read.
        frame: ``advertiser_id`` (of an item also ``ad_id``), ``name``, ``text``. Vectors of a precomputed source are in
            a column of the source's name, or else in the file that the artifact's config names.
        output: an existing directory for the grown artifact. Its rows rise by id, as a log's do.
        skip_known: leave out entities that have an ID already; else they are an error.
        cache_dir: folder of earlier text embeddings.

    Returns:
        Quality of the grown table, and ``assigned``: how many are new, and the share of the ten nearest old
        entities with the new one's prefix, beside the same among the old ones and by chance.

    Raises:
        UserError: everything that is wrong with the frame, at once; an artifact that lacks what is needed; or fewer
            free IDs than new entities.
    """
    old = IdArtifact.load(directory)
    frame = checked_frame(frame, old, skip_known=skip_known)
    new = _embedded(frame, old, cache_dir)
    latent_NE = old.tokenizer.latent(new.vectors_AD)
    greedy_NL, quantized_NE = quantize(latent_NE, old.books)
    # Words of a name have free numbers before they give way to other words.
    numbered = old.cfg.tokenizer == NAMES and old.ids.extra_level
    wanted_NL = np.pad(greedy_NL, ((0, 0), (0, int(numbered))))
    codes_NL = place_new(latent_NE, wanted_NL, old.ids.codebooks, old.ids.codes_AL)

    both = pl.concat([old.entities, frame.select(ID, *TEXTS)])
    order = np.arange(len(both))
    if old.entities[ID].is_sorted():  # a log's order; a table of another order has the new ones at its end
        order = both[ID].arg_sort().to_numpy().astype(np.int64)

    def grown(old_rows: NDArray[Any], new_rows: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([old_rows, new_rows])[order]

    text_AE = old.text_AE
    if text_AE is not None:
        of_source = [unit_rows(new.vectors_AD[:, part]) for part in _parts(new, (TEXT,))]
        encoder, texts = old.cfg.embedding.encoder, frame["text"].to_list()
        new_AE = of_source[0] if of_source else text_embeddings(texts, encoder, cache_dir=cache_dir)
        text_AE = grown(text_AE, new_AE)
    table = replace(
        old,
        ids=replace(old.ids, advertiser_ids=both[ID].to_numpy()[order], codes_AL=grown(old.ids.codes_AL, codes_NL)),
        embeddings=replace(old.embeddings, vectors_AD=grown(old.embeddings.vectors_AD, new.vectors_AD)),
        greedy_AL=grown(old.greedy_AL, greedy_NL),
        reconstruction_AD=grown(old.reconstruction_AD, old.tokenizer.decode(quantized_NE)),
        entities=both[order],
        text_AE=text_AE,
    )
    proper_AP, proper_NP = old.ids.codes_AL[:, :-1], codes_NL[:, :-1]
    seed = old.cfg.seed
    report = table.save(output, tokenizer_from=directory / TOKENIZER)
    return report | {
        "assigned": {
            "new": len(frame),
            "before": len(old.ids),
            "moved_share": float(moved(codes_NL, greedy_NL).any(1).mean()),
            "nothing_known": int((~new.vectors_AD.any(axis=1)).sum()),
            "neighbour_share": prefix_share(old.embeddings, proper_AP, new.vectors_AD, proper_NP, seed=seed),
            "neighbour_share_before": prefix_share(old.embeddings, proper_AP, seed=seed),
            "neighbour_share_random": chance_share(proper_AP),
        }
    }


def _embedded(frame: pl.DataFrame, old: IdArtifact, cache_dir: Path | None) -> Embeddings:
    """Embeddings of new entities; vectors in the frame stand in for the file of their source.

    A few old texts are embedded with them, since an encoder that changed would put the new ones anywhere.
    """
    names, dims = old.embeddings.source_names, old.embeddings.source_dims
    probe_P = np.flatnonzero((old.entities["text"].fill_null("").str.strip_chars() != "").to_numpy())[:_PROBES]
    both = pl.concat([frame, old.entities[probe_P]], how="diagonal")
    with tempfile.TemporaryDirectory() as folder:
        precomputed: list[PrecomputedConfig] = []
        for one in old.cfg.embedding.precomputed:
            if one.source in frame.columns:
                file = Path(folder) / f"{len(precomputed)}.parquet"
                frame.select(ID, pl.col(one.source)).drop_nulls().write_parquet(file)
                one = replace(one, path=str(file), name=one.source, id_column=ID, vector_column=one.source)
            precomputed.append(one)
        cfg = replace(old.cfg, embedding=replace(old.cfg.embedding, precomputed=precomputed))
        found = embed_new(both, cfg, source_names=names, source_dims=dims, cache_dir=cache_dir)
    for part in _parts(old.embeddings, None if cfg.tokenizer == NAMES else (TEXT,)):
        apart = np.abs(found.vectors_AD[len(frame) :, part] - old.embeddings.vectors_AD[probe_P, part]).max(initial=0.0)
        if apart > _APART:
            raise UserError(
                f"the encoder {cfg.embedding.encoder.name}, which gives the old texts other vectors than it gave",
                expected="the very encoder that the IDs were made with",
                action="bring its files back, or make new IDs: adsid run run.until=semantic_ids",
            )
    return replace(found, vectors_AD=found.vectors_AD[: len(frame)])


def checked_frame(frame: pl.DataFrame, old: IdArtifact, *, skip_known: bool = False) -> pl.DataFrame:
    """New entities as the table can take them.

    Args:
        frame: as given.
        old: the artifact.
        skip_known: leave out entities that have an ID already.

    Returns:
        The frame, its ids of the table's dtype, its texts strings; further columns as they are.

    Raises:
        UserError: everything that is wrong, at once.
    """
    wrong: list[UserError] = []
    if old.ids.entity == "item" and ID not in frame.columns and AD_ID in frame.columns:
        frame = frame.rename({AD_ID: ID})
    missing = [name for name in (ID, *TEXTS) if name not in frame.columns]
    if missing:
        wrong.append(
            UserError(
                f"a table without {', '.join(missing)}, only {', '.join(frame.columns) or 'no column'}",
                expected=f"the columns {', '.join((ID, *TEXTS))}",
                action=f"add {', '.join(missing)}; name and text may be empty where they are not known",
            )
        )
    for name in (name for name in TEXTS if name in frame.columns):
        if frame.schema[name] in (pl.String, pl.Categorical, pl.Enum, pl.Null):
            column = pl.col(name).cast(pl.String)
            frame = frame.with_columns(column.fill_null("") if name == "text" else column)
        else:
            wrong.append(
                UserError(f"{name} of type {frame.schema[name]}", expected="texts", action=f"cast {name} to string")
            )
    sources = {one.source for one in old.cfg.embedding.precomputed} & {*frame.columns}
    wrong += [error for name in sorted(sources) if (error := _no_numbers(frame[name])) is not None]
    if ID in frame.columns:
        ids, errors = _checked_ids(frame[ID], old.entities[ID])
        if not errors:
            has_id = ids.is_in(old.entities[ID].implode())
            frame = frame.with_columns(ids)
            frame = frame.filter(~has_id) if skip_known else frame
            errors = _no_new_ids(ids, has_id, skip_known=skip_known)
        wrong += errors
    if wrong:
        raise UserError.collect(wrong)
    return frame


def _checked_ids(ids: pl.Series, table: pl.Series) -> tuple[pl.Series, list[UserError]]:
    """The ids in the table's dtype, and what is wrong with them."""
    if ids.dtype != table.dtype and not (ids.dtype.is_integer() and table.dtype.is_integer()):
        return ids, [
            UserError(
                f"{ID} of type {ids.dtype}",
                expected=f"{table.dtype}, as the table's ids have, e.g. {table[0]!r}",
                action=f"cast {ID} to {table.dtype}",
            )
        ]
    cast, wrong = ids.cast(table.dtype, strict=False), []
    if ids.null_count():
        wrong.append(
            UserError(f"{ids.null_count():,} rows without {ID}", expected="an id in every row", action="leave them out")
        )
    if cast.null_count() > ids.null_count():
        example = ids.filter(cast.is_null() & ids.is_not_null())[0]
        wrong.append(
            UserError(f"{ID}={example}", expected=f"numbers of the table's type, {table.dtype}", action="give such ids")
        )
    known = cast.drop_nulls()
    repeated = known.filter(known.is_duplicated())
    if len(repeated):
        wrong.append(
            UserError(
                f"{repeated.n_unique():,} ids in more than one row, e.g. {repeated[0]}",
                expected="one row an id",
                action="leave all but one out",
            )
        )
    return cast, wrong


def _no_new_ids(ids: pl.Series, has_id: pl.Series, *, skip_known: bool) -> list[UserError]:
    """What is wrong with which entities are there."""
    if has_id.any() and not skip_known:
        return [
            UserError(
                f"{has_id.sum():,} of {len(ids):,} that have an ID already, e.g. {ids.filter(has_id)[0]}",
                expected="new ones only: an ID that is there never changes",
                action="leave them out with --skip-known; where texts or customers changed use `adsid ids refit`",
            )
        ]
    if has_id.all():  # of an empty table too
        return [
            UserError(
                f"{len(ids):,} rows, none of them new",
                expected="at least one without an ID",
                action="nothing is to be done",
            )
        ]
    return []


def _no_numbers(column: pl.Series) -> UserError | None:
    """What is wrong with a column of vectors; None where nothing is, and for any other column."""
    inner = column.dtype.inner if isinstance(column.dtype, pl.List | pl.Array) else None
    if not isinstance(inner, pl.Float32 | pl.Float64):
        return None
    numbers = column.explode()
    bad = int((numbers.is_nan() | numbers.is_infinite()).sum())
    if not bad:
        return None
    return UserError(
        f"{bad:,} values of {column.name} that are NaN or infinite",
        expected="finite numbers; null in place of a vector that is not known",
        action=f"mend the vectors in {column.name}",
    )


def prefix_share(
    catalogue: Embeddings,
    codes_AP: NDArray[np.integer],
    query_ND: NDArray[np.floating] | None = None,
    query_NP: NDArray[np.integer] | None = None,
    *,
    sources: Sequence[str] | None = None,
    seed: int = 0,
) -> list[float]:
    """Share of the ten nearest entities of a catalogue that have a query's prefix, by prefix length.

    Distances are over the sources that know something of the query, so that a cold one is near its kind and not
    near all those that are as unknown as it is.

    Args:
        catalogue: embeddings that neighbours are looked for in.
        codes_AP: their codes.
        query_ND: embeddings of the queries; None for the catalogue's own entities, each among the others.
        query_NP: codes of the queries.
        sources: go by these alone; None for all.
        seed: of the sample of queries that is looked at where they are many.

    Returns:
        A share a prefix length; NaN without a query that any source knows.
    """
    itself = query_ND is None
    if query_ND is None or query_NP is None:
        query_ND, query_NP = catalogue.vectors_AD, codes_AP
    parts = list(_parts(catalogue, sources))
    known_NS = np.stack([query_ND[:, part].any(axis=1) for part in parts], axis=1)
    sample = min(MOST_QUERIES, max(FEWEST_QUERIES, MOST_PAIRS // max(len(codes_AP), 1)))
    rows_N = np.random.default_rng(seed).permutation(np.flatnonzero(known_NS.any(1)))[:sample]
    n = min(NEIGHBOURS, len(codes_AP) - int(itself))
    if n < 1 or not len(rows_N):
        return [math.nan] * codes_AP.shape[1]
    shared_P = np.zeros(codes_AP.shape[1])
    for known_S in np.unique(known_NS[rows_N], axis=0):
        columns = np.concatenate([np.r_[part] for part, here in zip(parts, known_S, strict=True) if here])
        catalogue_AK = np.ascontiguousarray(catalogue.vectors_AD[:, columns])
        squared_A = (catalogue_AK**2).sum(1)
        alike_N = rows_N[(known_NS[rows_N] == known_S).all(1)]
        size = max(1, (1 << 26) // len(catalogue_AK))
        for start in range(0, len(alike_N), size):
            rows_B = alike_N[start : start + size]
            distance_BA = squared_A - 2 * query_ND[rows_B][:, columns] @ catalogue_AK.T
            if itself:
                distance_BA[np.arange(len(rows_B)), rows_B] = np.inf
            nearest_BK = np.argpartition(distance_BA, n - 1, axis=1)[:, :n]
            same_BKP = query_NP[rows_B, None] == codes_AP[nearest_BK]
            shared_P += np.logical_and.accumulate(same_BKP, axis=2).sum((0, 1))
    return (shared_P / (len(rows_N) * n)).tolist()


def _parts(embeddings: Embeddings, sources: Sequence[str] | None = None) -> Iterator[slice]:
    """The columns of each source."""
    start = 0
    for name, dim in zip(embeddings.source_names, embeddings.source_dims, strict=True):
        if sources is None or name in sources:
            yield slice(start, start + dim)
        start += dim


# After drift


def refit(
    directory: Path,
    log: Log,
    output: Path,
    *,
    work_dir: Path,
    cfg: SemanticIdsConfig | None = None,
    tolerance: float = TOLERANCE,
    cache_dir: Path | None = None,
) -> dict[str, Any]:
    """Fit the tokenizer to a changed log, keep the old IDs wherever the geometry allows, and write the artifact.

    Args:
        directory: the old artifact; only read.
        log: of today. Its entities get IDs; those that are no longer in it have none.
        output: an existing directory for the new artifact.
        work_dir: checkpoints; an interrupted refit goes on from there.
        cfg: of the new fit; None for the old artifact's. Sizes and sources must be the old ones.
        tolerance: see the module.
        cache_dir: folder of earlier text embeddings.

    Returns:
        Quality of the new table, and ``refit``: entities in both, new and gone; the share of the old IDs kept, whole
        and by prefix length (``kept_share``, ``kept_share_by_level``), beside that of a tokenizer fitted from scratch
        for one epoch (``scratch_…``); and the reconstruction error of the greedy codes and of the IDs.

    Raises:
        UserError: another shape than the old artifact's, no common entity, a tolerance below zero, or no ID is left.
    """
    if not tolerance >= 0:
        raise UserError(f"tolerance={tolerance}", expected="a number of at least 0", action="give another tolerance")
    old = IdArtifact.load(directory)
    cfg = cfg or old.cfg
    today = entities(log)
    row_of = {id_: row for row, id_ in enumerate(old.ids.advertiser_ids.tolist())}
    before_A = np.array([row_of.get(id_, -1) for id_ in today[ID].to_list()], dtype=np.int64)
    common_C = np.flatnonzero(before_A >= 0)
    _check_settings(old, cfg, len(common_C))
    raw = entity_embeddings(log, cfg, cache_dir=cache_dir)
    _check_sources(old, raw)
    embeddings = turned(raw, old.embeddings, common_C, before_A[common_C])
    levels, old_CL = old.ids.n_quantised, old.ids.codes_AL[before_A[common_C]]

    tokenizer = fit_tokenizer(embeddings, cfg, work_dir=work_dir / "warm", start=old.tokenizer)
    latent_AE = tokenizer.latent(embeddings.vectors_AD)
    numbers = match_codebooks(latent_AE[common_C], old_CL[:, :levels], old.books, tokenizer.codebooks)
    tokenizer = renumbered(tokenizer, numbers)
    books = tokenizer.codebooks
    greedy_AL, quantized_AE = quantize(latent_AE, books)
    wanted_AL, kept_A = greedy_AL.copy(), np.zeros(len(today), dtype=np.int64)
    common = replace(embeddings, vectors_AD=embeddings.vectors_AD[common_C])
    wanted_AL[common_C], kept_A[common_C] = keep(
        tokenizer, common, latent_AE[common_C], old_CL[:, :levels], tolerance=tolerance
    )
    fixed_A = kept_A == levels
    codebooks = [*books, *old.ids.codebooks[levels:]]
    codes_AL = np.zeros((len(today), len(codebooks)), dtype=np.int64)
    codes_AL[fixed_A] = old.ids.codes_AL[before_A[fixed_A]]
    codes_AL[~fixed_A] = place_new(latent_AE[~fixed_A], wanted_AL[~fixed_A], codebooks, codes_AL[fixed_A])

    texts = today["text"].to_list()
    reconstruction_AD = tokenizer.decode(quantized_AE)
    table = IdArtifact(
        ids=replace(old.ids, advertiser_ids=today[ID].to_numpy(), codes_AL=codes_AL, codebooks=codebooks),
        tokenizer=tokenizer,
        cfg=cfg,
        embeddings=embeddings,
        greedy_AL=greedy_AL,
        reconstruction_AD=reconstruction_AD,
        entities=today,
        text_AE=None if old.text_AE is None else text_embeddings(texts, cfg.embedding.encoder, cache_dir=cache_dir),
    )
    report = table.save(output)
    kept = kept_shares(old_CL, codes_AL[common_C])
    scratch = kept_shares(old_CL, _from_scratch(raw, cfg, work_dir / "scratch")[common_C])
    described_AD = tokenizer.decode(_sum_of(books, codes_AL))
    return report | {
        "refit": {
            "before": len(old.ids),
            "in_both": len(common_C),
            "new": len(today) - len(common_C),
            "gone": len(old.ids) - len(common_C),
            "tolerance": tolerance,
            "kept_share": kept[-1],
            "kept_share_by_level": kept,
            "kept_as_greedy": float((greedy_AL[common_C] == old_CL[:, :levels]).all(1).mean()),
            "scratch_kept_share": scratch[-1],
            "scratch_kept_share_by_level": scratch,
            "renumbered": [int((number_V != np.arange(len(number_V))).sum()) for number_V in numbers],
            "reconstruction_error_greedy": reconstruction_error(embeddings.vectors_AD, reconstruction_AD),
            "reconstruction_error_ids": reconstruction_error(embeddings.vectors_AD, described_AD),
        }
    }


def turned(
    new: Embeddings, old: Embeddings, rows_new: NDArray[np.integer], rows_old: NDArray[np.integer]
) -> Embeddings:
    """Embeddings whose co-conversion part is rotated onto that of earlier embeddings.

    Args:
        new: to rotate.
        old: earlier ones of the same sources.
        rows_new, rows_old: the entities they have in common, row by row.

    Returns:
        The rotated embeddings; all distances are as they were.
    """
    vectors_AD = new.vectors_AD.copy()
    for part in _parts(new, (COLLABORATIVE,)):
        ours, theirs = new.vectors_AD[rows_new, part], old.vectors_AD[rows_old, part]
        left, _, right = np.linalg.svd(ours.T.astype(np.float64) @ theirs.astype(np.float64))
        vectors_AD[:, part] = new.vectors_AD[:, part] @ (left @ right).astype(np.float32)
    return replace(new, vectors_AD=vectors_AD)


def match_codebooks(
    latent_CE: NDArray[np.floating],
    old_CL: NDArray[np.integer],
    old_books: Sequence[NDArray[np.floating]],
    new_books: Sequence[NDArray[np.floating]],
) -> list[NDArray[np.int64]]:
    """Which new vector takes which old code's number, level by level.

    Args:
        latent_CE: new latents of the entities that have an old ID.
        old_CL: their old codes.
        old_books: the old codebooks.
        new_books: the new ones, of the same sizes.

    Returns:
        For each level ``(V,)``: the new vector that becomes old code ``v``.
    """
    residual_CE, numbers = np.array(latent_CE), []
    for level, (before, after) in enumerate(zip(old_books, new_books, strict=True)):
        code_C, after_VE = old_CL[:, level], np.asarray(after, dtype=np.float64)
        count_V1, sum_VE = np.bincount(code_C, minlength=len(before))[:, None], np.zeros(before.shape)
        for part in _blocks(len(code_C)):
            rows = np.arange(part.stop - part.start)
            members_VB = csr_array((np.ones(len(rows)), (code_C[part], rows)), shape=(len(before), len(rows)))
            sum_VE += members_VB @ residual_CE[part].astype(np.float64)
        place_VE = np.where(count_V1 > 0, sum_VE / np.maximum(count_V1, 1), before)
        squared_VV = (place_VE**2).sum(1)[:, None] - 2 * place_VE @ after_VE.T + (after_VE**2).sum(1)
        # The total over members; a code without any comes last but still takes the nearest of what is left.
        _, number_V = linear_sum_assignment(np.maximum(count_V1, 1e-3) * squared_VV)
        numbers.append(number_V.astype(np.int64))
        for part in _blocks(len(code_C)):
            residual_CE[part] -= after_VE[number_V[code_C[part]]]
    return numbers


def renumbered(tokenizer: Tokenizer, numbers: Sequence[NDArray[np.integer]]) -> Tokenizer:
    """The tokenizer with its codes in another order: vector ``numbers[l][v]`` of level ``l`` becomes vector ``v``."""
    if isinstance(tokenizer, RQKMeansTokenizer):
        books = zip(tokenizer.books, numbers, strict=True)
        return replace(tokenizer, books=tuple(book[number_V] for book, number_V in books))
    if isinstance(tokenizer, RQVAETokenizer):
        model = copy.deepcopy(tokenizer.model)
        for book, number_V in zip(model.books, numbers, strict=True):
            order_V = torch.from_numpy(np.asarray(number_V, dtype=np.int64))
            book.load_state_dict({name: value[order_V] for name, value in book.state_dict().items()})
        return RQVAETokenizer(model)
    raise TypeError(f"a {type(tokenizer).__name__} cannot be renumbered")


def keep(
    tokenizer: Tokenizer,
    embeddings: Embeddings,
    latent_CE: NDArray[np.floating],
    old_CL: NDArray[np.integer],
    *,
    tolerance: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Codes that keep as much of the old ones as the tolerance allows.

    Args:
        tokenizer: with matched codebooks.
        embeddings: of the entities that have an old ID.
        latent_CE: their latents.
        old_CL: their old codes, without the extra level.
        tolerance: see the module.

    Returns:
        Codes, and how many of the first levels of the old ID each keeps by the rule: all, some, or none.
    """
    books = tokenizer.codebooks
    codes_CL, kept_C = np.zeros(old_CL.shape, dtype=np.int64), np.zeros(len(old_CL), dtype=np.int64)
    known = _Known(embeddings)
    allowed = tolerance * known.variance()
    for part in _blocks(len(old_CL)):
        start = part.start
        greedy_BL, quantized_BE = quantize(latent_CE[part], books)
        codes_CL[part] = greedy_BL
        limit_B = known.error(part, tokenizer.decode(quantized_BE)) + allowed
        open_B = np.ones(len(greedy_BL), dtype=bool)
        for levels in range(len(books), 0, -1):
            prefix_BL = old_CL[part, :levels]
            described_BE = _sum_of(books[:levels], prefix_BL)
            tail_BL = np.zeros((len(prefix_BL), 0), dtype=np.int64)
            if levels < len(books):
                tail_BL, tail_BE = quantize(latent_CE[part] - described_BE, books[levels:])
                described_BE = described_BE + tail_BE
            within_B = known.error(part, tokenizer.decode(described_BE)) <= limit_B
            within_B |= (greedy_BL[:, :levels] == prefix_BL).all(1)  # whatever rounding says
            rows = np.flatnonzero(open_B & within_B)
            codes_CL[start + rows] = np.column_stack([prefix_BL, tail_BL])[rows]
            kept_C[start + rows] = levels
            open_B[rows] = False
    return codes_CL, kept_C


def _blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK))


class _Known:
    """Embeddings with, for each entity, the sources that know it: a block of zeros is unknown, not wrong."""

    def __init__(self, embeddings: Embeddings) -> None:
        self.x_AD, self.parts = embeddings.vectors_AD, list(_parts(embeddings))

    def variance(self) -> float:
        """Squared distance to the mean of those that a source knows, added over the sources, a mean over entities."""
        total = 0.0
        for part in self.parts:
            x_AK = self.x_AD[self.x_AD[:, part].any(axis=1), part]
            total += float(x_AK.var(axis=0, dtype=np.float64).sum() * len(x_AK)) if len(x_AK) else 0.0
        return total / max(len(self.x_AD), 1)

    def error(self, rows: slice, reconstruction_BD: NDArray[np.floating]) -> NDArray[np.float64]:
        """Squared error of some rows over what is known of them."""
        error_B = np.zeros(len(reconstruction_BD))
        for part in self.parts:
            x_BK = self.x_AD[rows, part]
            squared_B = ((x_BK - reconstruction_BD[:, part]) ** 2).sum(1, dtype=np.float64)
            error_B += np.where(x_BK.any(axis=1), squared_B, 0.0)
        return error_B


def _sum_of(books: Sequence[NDArray[np.float32]], codes_AL: NDArray[np.integer]) -> NDArray[np.float32]:
    """The summed vectors of some first codes."""
    total_AE = books[0][codes_AL[:, 0]]
    for level, book in enumerate(books[1:], 1):
        total_AE = total_AE + book[codes_AL[:, level]]
    return total_AE


def kept_shares(old_CL: NDArray[np.integer], new_CL: NDArray[np.integer]) -> list[float]:
    """Share of entities whose first codes are the old ones, by prefix length; the last is that of whole IDs."""
    levels = max(old_CL.shape[1], new_CL.shape[1])
    old, new = (np.pad(codes, ((0, 0), (0, levels - codes.shape[1]))) for codes in (old_CL, new_CL))
    return np.logical_and.accumulate(old == new, axis=1).mean(0).tolist()


def _from_scratch(embeddings: Embeddings, cfg: SemanticIdsConfig, work_dir: Path) -> NDArray[np.int64]:
    """IDs of a tokenizer that knows nothing of the old one; one epoch, for its start settles the numbering."""
    brief = replace(cfg, trainer=replace(cfg.trainer, max_epochs=1))
    tokenizer = fit_tokenizer(embeddings, brief, work_dir=work_dir)
    latent_AE = tokenizer.latent(embeddings.vectors_AD)
    greedy_AL, _ = quantize(latent_AE, tokenizer.codebooks)
    return resolve_collisions(latent_AE, greedy_AL, tokenizer.codebooks)[0]


def _check_settings(old: IdArtifact, cfg: SemanticIdsConfig, n_common: int) -> None:
    """Refuse, before any work, settings and logs under which no old ID can be kept."""
    before, now = _shape(old.cfg), _shape(cfg)
    wrong = [_refused(name, before[name], now.get(name)) for name in before if now.get(name) != before[name]]
    if old.cfg.tokenizer == NAMES:
        wrong.append(
            UserError(
                "a refit of IDs spelled by names",
                expected="a tokenizer that is fitted to a log: rqvae or rqkmeans",
                action="give new advertisers IDs with `adsid ids assign`, or make all anew: adsid run "
                "run.until=semantic_ids",
            )
        )
    if not n_common:
        wrong.append(
            UserError(
                f"a log with none of the {len(old.ids):,} that have an ID, e.g. {old.entities[ID][0]!r}",
                expected="the log that the IDs were made for, as it is today",
                action="give the folder of that log",
            )
        )
    if wrong:
        raise UserError.collect(wrong)


def _check_sources(old: IdArtifact, new: Embeddings) -> None:
    before, now = (dict(zip(one.source_names, one.source_dims, strict=True)) for one in (old.embeddings, new))
    if before != now:
        raise _refused("the features of the sources", before, now)


def _refused(name: str, before: object, now: object) -> UserError:
    return UserError(
        f"{name}={now} for IDs made with {before}",
        expected="the same: a refit goes on from the old tokenizer",
        action="leave it as it was, or make new IDs: adsid run run.until=semantic_ids",
    )


def _shape(cfg: SemanticIdsConfig) -> dict[str, Any]:
    """What must stay for codes to keep their meaning, and for the old tokenizer to be a start."""
    shape = {
        "semantic_ids.entity": cfg.entity,
        "semantic_ids.tokenizer": cfg.tokenizer,
        f"semantic_ids.{cfg.tokenizer}.level_sizes": cfg.level_sizes,
    }
    if cfg.tokenizer == "rqvae":
        names = ("latent", "hidden", "codebook", "distance")
        shape |= {f"semantic_ids.rqvae.{name}": getattr(cfg.rqvae, name) for name in names}
    return shape


def _config(plain: dict[str, Any]) -> SemanticIdsConfig:
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SemanticIdsConfig), plain))
    assert isinstance(cfg, SemanticIdsConfig)
    return cfg
