"""The quality of semantic IDs, measured from the artifact alone.

    codes.parquet, codebooks ──────────┐
    embeddings.safetensors, .json ─────┼─► IdsQuality
    entities.parquet (words only) ─────┘

The figures are those of `semantic_ids.quality`, with what random codes would reach beside those that they may win.
What is wrong is said in words.

Shapes: A entities (advertisers or items), L levels of the tokenizer, D features of the embedding, E of the latent,
G groups, N members of one, Q entities whose neighbours are looked up, K entities with an embedding.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from safetensors.numpy import load_file

from data.errors import UserError
from pipeline.grids import count, percent
from pipeline.verdict import number
from semantic_ids import quality
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.quality import LevelUse, PrefixUse
from semantic_ids.tokenize import ENTITIES, FACTS, VECTORS

EVEN = 0.9
"""Entropy ratio of level 1 below which its use is called uneven."""
_EXAMPLES, _MEMBERS, _WORDS = 3, 5, 6
_MOST_TEXTS, _MOST_LETTERS, _SHOWN_LETTERS = 20_000, 400, 120
_WORD = re.compile(r"[^\W\d_]{3,}")
_SEED, _BLOCK = 0, 65_536


@dataclass(frozen=True)
class Level(LevelUse):
    """The use of one level before resolving, and what its codes alone say.

    Attributes:
        explained: share of the embeddings' variance between the level's codes, beyond chance.
    """

    explained: float | None


@dataclass(frozen=True)
class Near:
    """How many of the nearest entities share a prefix.

    Attributes:
        share: by the unique IDs.
        share_greedy: before resolving.
        share_random: with the IDs dealt at random.
        preservation: the share beyond chance, 1 all, 0 as random.
        error: standard error of the preservation, from the sample of entities.
    """

    share: float
    share_greedy: float
    share_random: float
    preservation: float
    error: float


@dataclass(frozen=True)
class Depth(PrefixUse):
    """Prefixes of one length: the tokenizer's, and what the unique IDs make of them.

    Attributes:
        used_after: prefixes in use by the unique IDs.
        largest_after: members of the largest of these.
        near: neighbours; None for a whole ID, and where there are none.
        explained: share of the embeddings' variance between the unique IDs' prefixes, beyond chance.
    """

    used_after: int
    largest_after: int
    near: Near | None
    explained: float | None


@dataclass(frozen=True)
class Resolving:
    """Collisions, and what was done about them.

    Attributes:
        collision_rate: share of entities whose greedy ID another one has too.
        collision_rate_random: the same for random codes, on average.
        identical_share: share of entities whose embedding another one has too; no tokenizer tells these apart.
        largest_collision: entities with the most frequent greedy ID.
        groups: number of greedy IDs by their number of entities.
        moved_share: share of entities whose ID is not the greedy one alone.
        moved_at: the same by the first level that differs; the last entry is the extra level, where there is one.
        extra_codes: codes of the extra level; None where it was not needed.
        extra_share: share of entities told apart by the extra level alone or too.
        displacement: squared distance from the greedy code's vector to the unique one's over the variance of the
            former; None where this is zero.
    """

    collision_rate: float
    collision_rate_random: float
    identical_share: float
    largest_collision: int
    groups: dict[int, int]
    moved_share: float
    moved_at: tuple[float, ...]
    extra_codes: int | None
    extra_share: float
    displacement: float | None


@dataclass(frozen=True)
class Source:
    """One block of the embeddings.

    Attributes:
        name: of the source.
        dims: features.
        known: share of entities whose block is not zero.
        reconstruction_error: squared error of these blocks over their variance.
    """

    name: str
    dims: int
    known: float
    reconstruction_error: float | None


@dataclass(frozen=True)
class Member:
    """An entity in words."""

    name: str
    text: str


@dataclass(frozen=True)
class Example:
    """What shares a prefix.

    Attributes:
        prefix: as tokens, e.g. ``("<adv_1_17>",)``.
        size: its entities.
        chosen: why it is shown, ``largest`` or ``median size``.
        words: more frequent in its texts than in all, the most telling first.
        members: from the one nearest to the prefix's mean embedding to the farthest, at even steps.
    """

    prefix: tuple[str, ...]
    size: int
    chosen: str
    words: tuple[str, ...]
    members: tuple[Member, ...]


@dataclass(frozen=True)
class IdsQuality:
    """Everything the report shows.

    Attributes:
        entity: what has the IDs, ``advertiser`` or ``item``.
        entities: how many.
        version: of the IDs.
        tokenizer: its name; None where the artifact does not say it.
        level_sizes: codes of each level, without the extra one.
        findings: what is wrong, in words; empty where nothing is.
        levels: use of each level before resolving.
        depths: prefixes by length, from 1 on.
        resolving: collisions.
        reconstruction_error: squared error over the embeddings' variance.
        sources: blocks of the embeddings.
        unknown_share: share of entities whose embedding is zero.
        neighbours: nearest entities looked at for each.
        neighbours_of: entities whose nearest were looked at.
        examples: prefixes in words.
    """

    entity: str
    entities: int
    version: str
    tokenizer: str | None
    level_sizes: tuple[int, ...]
    findings: tuple[str, ...]
    levels: tuple[Level, ...]
    depths: tuple[Depth, ...]
    resolving: Resolving
    reconstruction_error: float | None
    sources: tuple[Source, ...]
    unknown_share: float
    neighbours: int
    neighbours_of: int
    examples: tuple[Example, ...]


# From the artifact


@dataclass(frozen=True)
class _Artifact:
    ids: AdvertiserIds
    vectors_AD: NDArray[np.float32]
    greedy_AL: NDArray[np.int64]
    reconstruction_AD: NDArray[np.floating]
    facts: dict[str, Any]
    entities: pl.DataFrame


def quality_of(directory: Path) -> IdsQuality:
    """Measure the IDs of an artifact.

    Neighbours are looked up for a sample of a large catalogue, in the whole of it; everything else is of all
    entities. A million of 384 features take about a minute on two cores.

    Args:
        directory: of the stage ``semantic_ids``.

    Returns:
        Its figures, the same for the same files.

    Raises:
        UserError: files are missing or damaged, or do not belong together.
    """
    artifact = _read(directory)
    ids, vectors_AD, greedy_AL = artifact.ids, artifact.vectors_AD, artifact.greedy_AL
    sizes = ids.level_sizes[: greedy_AL.shape[1]]
    levels = tuple(
        Level(**asdict(quality.level_use(codes_A, size)), explained=_explained(vectors_AD, codes_A))
        for codes_A, size in zip(greedy_AL.T, sizes, strict=True)
    )
    known_K, nearest_QN, query_Q = quality.neighbours(vectors_AD, seed=_SEED)
    depths = _depths(artifact, sizes, known_K, nearest_QN, query_Q)
    resolving = _resolving(artifact)
    sources = _sources(artifact)
    unknown = 1 - len(known_K) / len(ids)
    return IdsQuality(
        entity=ids.entity,
        entities=len(ids),
        version=ids.version,
        tokenizer=_tokenizer(artifact.facts),
        level_sizes=sizes,
        findings=tuple(_findings(ids.entity + "s", len(ids), levels, depths, resolving, unknown)),
        levels=levels,
        depths=depths,
        resolving=resolving,
        reconstruction_error=_finite(_error(vectors_AD, artifact.reconstruction_AD)),
        sources=sources,
        unknown_share=unknown,
        neighbours=nearest_QN.shape[1],
        neighbours_of=len(query_Q),
        examples=tuple(_examples(artifact)),
    )


def _read(directory: Path) -> _Artifact:
    again = "make the IDs again: adsid run run.until=semantic_ids, with the run.dir of before"
    files = ("ids.json", "codes.parquet", "codebooks.safetensors", VECTORS, FACTS, ENTITIES)
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        inside = directory / "semantic_ids"
        raise UserError(
            f"{directory} without {', '.join(missing)}" if directory.is_dir() else f"{directory}, which is no folder",
            expected="the folder of a finished stage semantic_ids, e.g. runs/quickstart/semantic_ids",
            action=f"give {inside}" if inside.is_dir() else again,
        )
    ids = AdvertiserIds.load(directory)
    try:
        arrays = load_file(directory / VECTORS)
        facts = json.loads((directory / FACTS).read_text(encoding="utf-8"))
        artifact = _Artifact(
            ids=ids,
            vectors_AD=np.ascontiguousarray(arrays["vectors_AD"], dtype=np.float32),
            greedy_AL=arrays["greedy_AL"].astype(np.int64),
            reconstruction_AD=arrays["reconstruction_AD"],
            facts=facts,
            entities=pl.read_parquet(directory / ENTITIES).select("advertiser_id", "name", "text"),
        )
        dims = sum(facts["source_dims"]), len(facts["source_names"]), len(facts["source_dims"])
    except Exception as error:  # each of the readers has errors of its own
        raise UserError(
            f"{directory} ({error})", expected=f"{VECTORS}, {FACTS} and {ENTITIES} as they were written", action=again
        ) from error
    problems = list(_mismatches(artifact, dims))
    if problems:
        raise UserError(
            f"{directory}, where {'; '.join(problems)}", expected="files that belong together", action=again
        )
    return artifact


def _mismatches(artifact: _Artifact, dims: tuple[int, int, int]) -> Iterable[str]:
    n, levels = len(artifact.ids), artifact.ids.n_quantised
    greedy_AL, vectors_AD = artifact.greedy_AL, artifact.vectors_AD
    if {len(vectors_AD), len(greedy_AL), len(artifact.reconstruction_AD), len(artifact.entities)} != {n}:
        yield f"{count(n)} IDs stand beside {count(len(vectors_AD))} embeddings"
    elif artifact.entities["advertiser_id"].to_list() != artifact.ids.advertiser_ids.tolist():
        yield f"{ENTITIES} has other entities, or another order"
    if vectors_AD.shape != artifact.reconstruction_AD.shape or dims != (vectors_AD.shape[1], dims[1], dims[1]):
        yield "embeddings, their reconstruction and their sources have different numbers of features"
    if greedy_AL.shape[1] != levels:
        yield f"IDs have {levels} levels of the tokenizer and greedy codes {greedy_AL.shape[1]}"
    elif ((greedy_AL < 0) | (greedy_AL >= artifact.ids.level_sizes[:levels])).any():
        yield "greedy codes lie outside their codebooks"
    if not np.isfinite(vectors_AD).all():
        yield "embeddings hold values that are no numbers"


def _tokenizer(facts: dict[str, Any]) -> str | None:
    config = facts.get("config", {})
    name = config.get("tokenizer") if isinstance(config, dict) else None
    return str(name) if name else None


def _depths(
    artifact: _Artifact,
    sizes: Sequence[int],
    known_K: NDArray[np.int64],
    nearest_QN: NDArray[np.int64],
    query_Q: NDArray[np.int64],
) -> tuple[Depth, ...]:
    codes_AL, greedy_AL = artifact.ids.codes_AL, artifact.greedy_AL
    before = quality.prefix_use(greedy_AL, sizes)
    after = quality.prefix_use(codes_AL[:, : len(sizes)], sizes)
    proper = codes_AL.shape[1] - 1
    chance = quality.chance_share(codes_AL[known_K])
    shared_QL = quality.shared_prefix(codes_AL[known_K], query_Q, nearest_QN) if len(query_Q) else None
    greedy_QL = quality.shared_prefix(greedy_AL[known_K], query_Q, nearest_QN) if len(query_Q) else None
    depths = []
    for place, (use, unique, group_A) in enumerate(zip(before, after, quality.groups(codes_AL), strict=False)):
        near = None
        if shared_QL is not None and greedy_QL is not None and place < proper:
            near = _near(shared_QL[:, place], greedy_QL[:, place], chance[place])
        depths.append(
            Depth(
                **asdict(use),
                used_after=unique.used,
                largest_after=unique.largest,
                near=near,
                explained=_explained(artifact.vectors_AD, group_A) if place < proper else None,
            )
        )
    return tuple(depths)


def _near(shared_Q: NDArray[np.float64], greedy_Q: NDArray[np.float64], chance: float) -> Near:
    share, room = float(shared_Q.mean()), 1 - chance
    return Near(
        share=share,
        share_greedy=float(greedy_Q.mean()),
        share_random=chance,
        preservation=quality.beyond_chance(share, chance),
        error=float(shared_Q.std() / math.sqrt(len(shared_Q)) / room) if room > 0 else 0.0,
    )


def _resolving(artifact: _Artifact) -> Resolving:
    ids, greedy_AL = artifact.ids, artifact.greedy_AL
    n, levels = greedy_AL.shape
    counts_G = np.bincount(quality.last_group(greedy_AL))
    group_size, n_groups = np.unique(counts_G, return_counts=True)
    moved_AL = quality.moved(ids.codes_AL, greedy_AL)
    first_A = np.where(moved_AL.any(1), moved_AL.argmax(1), -1)
    extra = ids.codes_AL.shape[1] > levels
    possible = math.prod(ids.level_sizes[:levels])
    return Resolving(
        collision_rate=quality.collision_rate(counts_G),
        collision_rate_random=quality.taken_by_random(n - 1, possible),
        identical_share=quality.identical_share(artifact.vectors_AD),
        largest_collision=int(counts_G.max(initial=0)),
        groups=dict(zip(group_size.tolist(), n_groups.tolist(), strict=True)),
        moved_share=float(moved_AL.any(1).mean()),
        moved_at=tuple(float((first_A == level).mean()) for level in range(ids.codes_AL.shape[1])),
        extra_codes=ids.level_sizes[levels] if extra else None,
        extra_share=float((ids.codes_AL[:, levels:] != 0).any(1).mean()),
        displacement=_displacement(ids, greedy_AL),
    )


def _displacement(ids: AdvertiserIds, greedy_AL: NDArray[np.int64]) -> float | None:
    """How far resolving moves the vectors that IDs stand for."""
    books = ids.codebooks[: greedy_AL.shape[1]]
    sum_E, squares, moved = np.zeros(books[0].shape[1]), 0.0, 0.0
    for start in range(0, len(ids), _BLOCK):
        rows = slice(start, start + _BLOCK)
        greedy_BE = _summed(books, greedy_AL[rows])
        sum_E += greedy_BE.sum(0)
        squares += float(np.square(greedy_BE).sum())
        changed_B = (ids.codes_AL[rows, : len(books)] != greedy_AL[rows]).any(1)
        unique_BE = _summed(books, ids.codes_AL[rows][changed_B])
        moved += float(np.square(unique_BE - greedy_BE[changed_B]).sum())
    spread = squares - float(sum_E @ sum_E) / max(len(ids), 1)
    return _finite(moved / spread) if spread > 1e-9 * max(squares, 1e-12) else None


def _summed(books: Sequence[NDArray[np.float32]], codes_BL: NDArray[np.int64]) -> NDArray[np.float64]:
    total_BE = np.zeros((len(codes_BL), books[0].shape[1]))
    for level, book in enumerate(books):
        total_BE += book[codes_BL[:, level]]
    return total_BE


def _sources(artifact: _Artifact) -> tuple[Source, ...]:
    ends = np.cumsum(artifact.facts["source_dims"])
    sources = []
    for name, dims, end in zip(artifact.facts["source_names"], artifact.facts["source_dims"], ends, strict=True):
        block_AD = artifact.vectors_AD[:, end - dims : end]
        known_A = block_AD.any(axis=1)
        error = None
        if known_A.any():
            error = _finite(_error(block_AD[known_A], artifact.reconstruction_AD[known_A, end - dims : end]))
        sources.append(Source(str(name), int(dims), float(known_A.mean()), error))
    return tuple(sources)


def _error(vectors_AD: NDArray[np.floating], reconstruction_AD: NDArray[np.floating]) -> float:
    """As of `reconstruction_error`; NaN where all embeddings are equal."""
    if (vectors_AD == vectors_AD[:1]).all():
        return math.nan
    return quality.reconstruction_error(vectors_AD, reconstruction_AD)


def _explained(vectors_AD: NDArray[np.float32], group_A: NDArray[np.integer]) -> float | None:
    return _finite(quality.explained_variance(vectors_AD, group_A))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# In words


def _findings(
    entities: str, n: int, levels: Sequence[Level], depths: Sequence[Depth], resolving: Resolving, unknown: float
) -> Iterable[str]:
    """What a reader must know before the figures, the worst first."""
    for place, level in enumerate(levels, 1):
        if level.codes > 1 and level.codes - level.dead <= 1 and n > 1:
            yield f"Level {place} has collapsed: all {entities} have one code there."
    near = depths[0].near
    if near is not None and near.preservation <= 2 * near.error:
        yield (
            f"Near {entities} share level 1 no more often than by chance ({number(near.preservation)} beyond it, where "
            "all would be 1): the IDs say nothing of what is alike. Even use, wide coverage and few collisions are "
            "then worth nothing; random codes have all three."
        )
    told = {place: level.explained for place, level in enumerate(levels, 1) if level.explained is not None}
    best = max(told, key=lambda place: told[place], default=1)
    if best != 1 and 1 in told and told[best] > told[1] + 0.01:
        yield (
            f"Levels do not go from coarse to fine: level {best} alone explains {percent(told[best])} of the "
            f"embeddings' variance, level 1 alone {percent(told[1])}."
        )
    if levels[0].entropy_ratio < EVEN and levels[0].codes - levels[0].dead > 1:
        yield (
            f"Level 1 is used unevenly: its entropy ratio is {number(levels[0].entropy_ratio)}, below {EVEN}; "
            f"its {count(levels[0].codes)} codes are worth {number(levels[0].perplexity, 1)}."
        )
    for place, level in enumerate(levels, 1):
        if level.dead and n < level.codes:
            yield f"Level {place} has {count(level.codes)} codes for {count(n)} {entities}: some are never used."
        elif level.dead:
            dead = f"{count(level.dead)} of {count(level.codes)}"
            yield f"{dead} codes of level {place} are dead: the tokenizer never uses them."
    if unknown > 0:
        yield (
            f"{percent(unknown)} of the {entities} have a zero embedding: no source knows anything of them, and what "
            "their IDs share is chance."
        )
    if resolving.identical_share > 0.01:
        yield (
            f"{percent(resolving.identical_share)} of the {entities} have the embedding of another one: no tokenizer "
            "tells these apart, their IDs are made different by resolving alone."
        )


def _examples(artifact: _Artifact) -> Iterable[Example]:
    codes_AL, ids = artifact.ids.codes_AL, artifact.ids
    texts = artifact.entities["text"].fill_null("").to_list()
    names = artifact.entities["name"].cast(pl.String).fill_null("").to_list()
    step = -(-len(texts) // _MOST_TEXTS)
    everywhere = _word_counts(texts[::step])
    n_everywhere = len(texts[::step])
    for depth, group_A in enumerate(quality.groups(codes_AL[:, : min(2, codes_AL.shape[1] - 1)]), 1):
        sizes_G = np.bincount(group_A)
        order_A, ends_G = np.argsort(group_A, kind="stable"), np.cumsum(sizes_G)
        for group, chosen in _chosen(sizes_G).items():
            rows_N = order_A[ends_G[group] - sizes_G[group] : ends_G[group]]
            members = [Member(_cut(names[row]), _cut(texts[row])) for row in _spread_out(artifact.vectors_AD, rows_N)]
            own = [texts[row] for row in rows_N[:: -(-len(rows_N) // _MOST_TEXTS)]]
            yield Example(
                prefix=tuple(ids.tokens(int(rows_N[0]))[:depth]),
                size=len(rows_N),
                chosen=chosen,
                words=_telling(own, everywhere, n_everywhere),
                members=tuple(members),
            )


def _chosen(sizes_G: NDArray[np.int64]) -> dict[int, str]:
    """The largest groups and those nearest to the median size, of those with two members or more.

    In ties the largest are the first by their codes, the others those at even steps of the codes.
    """
    shared = np.flatnonzero(sizes_G > 1)
    ordered = shared[np.argsort(-sizes_G[shared], kind="stable")]
    largest, rest = ordered[:_EXAMPLES].tolist(), np.sort(ordered[_EXAMPLES:])
    if len(rest) <= _EXAMPLES:
        return dict.fromkeys(largest, "largest") | dict.fromkeys(rest.tolist(), "median size")
    away = np.abs(sizes_G[rest] - np.median(sizes_G[shared]))
    near = rest[away <= np.sort(away)[_EXAMPLES - 1]]
    places = np.linspace(0, len(near) - 1, _EXAMPLES).round().astype(int)
    return dict.fromkeys(largest, "largest") | dict.fromkeys(near[places].tolist(), "median size")


def _spread_out(vectors_AD: NDArray[np.float32], rows_N: NDArray[np.int64]) -> list[int]:
    """Members from the nearest to the mean to the farthest, at even steps."""
    own_ND = vectors_AD[rows_N]
    distance_N = np.square(own_ND - own_ND.mean(0)).sum(1)
    ordered = rows_N[np.argsort(distance_N, kind="stable")]
    places = np.unique(np.linspace(0, len(ordered) - 1, min(_MEMBERS, len(ordered))).round().astype(int))
    return [int(row) for row in ordered[places]]


def _word_counts(texts: Iterable[str]) -> Counter[str]:
    """In how many texts each word is."""
    return Counter(word for text in texts for word in set(_WORD.findall(text[:_MOST_LETTERS].lower())))


def _telling(own: Sequence[str], everywhere: Counter[str], n_everywhere: int) -> tuple[str, ...]:
    """Words that are in more of these texts than elsewhere: by their share here times the logarithm of the ratio."""
    found = _word_counts(own)
    scores = {}
    for word, n in found.items():
        share, usual = n / len(own), (everywhere[word] + 1) / (n_everywhere + 1)
        if n > 1 and share > 1.5 * usual:
            scores[word] = share * math.log(share / usual)
    return tuple(sorted(scores, key=lambda word: (-scores[word], word))[:_WORDS])


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_LETTERS else text[: _SHOWN_LETTERS - 1].rstrip() + "…"
