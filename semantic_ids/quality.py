"""Whether IDs are good: used evenly, few collisions, near advertisers near in the tree.

A collapsed tokenizer improves none of these figures: use, coverage and collisions are those of the *greedy* codes,
before collisions are resolved (resolving them hands out codes that the tokenizer never uses), and neighbours are
counted beyond chance, so that one code for all scores zero there, as random codes do.

Random codes are used evenly and collide rarely, so they may win on use, coverage and collisions, and on nothing
else: what they would reach stands beside these figures, and neighbours and explained variance give them zero.

Shapes: A advertisers, L levels, P prefix lengths, D features of the embedding, V codes of a level, G groups,
Q advertisers whose neighbours are looked up, N neighbours of one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from data.statistics import Row

NEIGHBOURS = 10
MOST_QUERIES, FEWEST_QUERIES, MOST_PAIRS = 5000, 1000, 2_000_000_000
"""Neighbours of all advertisers up to the first number; of fewer where they would take more distances than the last."""
_BLOCK = 65_536


@dataclass(frozen=True)
class LevelUse:
    """How evenly the tokenizer uses the codes of one level.

    Attributes:
        codes: of the level.
        dead: codes that nobody has.
        perplexity: codes that an even use of the same entropy would have.
        entropy_ratio: entropy over the largest possible with as many codes and advertisers.
        gini: of the codes' members, 0 even, towards 1 all on one.
        usage: members of each code, most first.
    """

    codes: int
    dead: int
    perplexity: float
    entropy_ratio: float
    gini: float
    usage: tuple[int, ...]


@dataclass(frozen=True)
class PrefixUse:
    """How many of the prefixes of one length are in use.

    Attributes:
        possible: prefixes that the level sizes allow.
        used: prefixes that an advertiser has.
        used_by_random: how many random codes would use, on average.
        of_possible: used over possible.
        per_advertiser: used over advertisers; 1 where no two share a prefix.
        coverage: used over the most that could be used, the smaller of possible and advertisers.
        largest: members of the largest one.
        median: members of the middle one by size.
    """

    possible: int
    used: int
    used_by_random: float
    of_possible: float
    per_advertiser: float
    coverage: float
    largest: int
    median: float


def quality(
    embeddings_AD: NDArray[np.floating],
    codes_AL: NDArray[np.integer],
    greedy_AL: NDArray[np.integer],
    reconstruction_AD: NDArray[np.floating],
    level_sizes: Sequence[int],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of an ID table.

    Args:
        embeddings_AD: what was tokenised.
        codes_AL: unique codes; one level more than the greedy ones where collisions took it.
        greedy_AL: codes before collisions were resolved.
        reconstruction_AD: decoded embeddings of the greedy codes.
        level_sizes: codes of each level, with or without that extra one.
        seed: of the sample of advertisers whose neighbours are looked up in a large catalogue.

    Returns:
        ``collision_rate``: share of advertisers whose greedy ID another one has too; ``largest_collision``;
        ``moved_share``: advertisers whose ID is not the greedy one alone; ``extra_share``: those told apart by the
        extra level; ``reconstruction_error``: squared error over the embeddings' variance; and lists by level. Of
        the greedy codes: ``dead_codes``, ``perplexity``, ``entropy_ratio`` (entropy over the largest possible),
        ``gini`` of the codes' use, ``usage`` (members of each code, most used first), ``prefixes`` (how many of
        each length are in use), ``prefix_coverage`` (over as many as could be). Of the unique codes, by proper
        prefix: ``neighbour_share`` (how many of the ten nearest advertisers share the prefix up to that level),
        ``neighbour_share_random`` (the same with the IDs dealt out at random), ``neighbour_preservation`` (the
        share beyond chance: 1 all, 0 as random) and ``prefix_explained`` (share of the embeddings' variance that
        lies between prefixes, beyond chance). NaN stands where there is no neighbour or no variance.
    """
    levels = greedy_AL.shape[1]
    sizes = list(level_sizes[:levels])
    counts_G = np.bincount(last_group(greedy_AL))
    uses = [level_use(greedy_AL[:, level], size) for level, size in enumerate(sizes)]
    prefixes = prefix_use(greedy_AL, sizes)
    proper_AP = codes_AL[:, :-1]  # whole IDs are unique, so none is shared
    share, random = neighbour_share(embeddings_AD, proper_AP, seed=seed), chance_share(proper_AP)
    return {
        "advertisers": len(codes_AL),
        "collision_rate": collision_rate(counts_G),
        "largest_collision": int(counts_G.max()),
        "moved_share": float(moved(codes_AL, greedy_AL).any(1).mean()),
        "extra_share": float((codes_AL[:, levels:] != 0).any(1).mean()),
        "reconstruction_error": reconstruction_error(embeddings_AD, reconstruction_AD),
        "dead_codes": [use.dead for use in uses],
        "perplexity": [use.perplexity for use in uses],
        "entropy_ratio": [use.entropy_ratio for use in uses],
        "gini": [use.gini for use in uses],
        "usage": [list(use.usage) for use in uses],
        "prefixes": [use.used for use in prefixes],
        "prefix_coverage": [use.coverage for use in prefixes],
        "neighbour_share": share,
        "neighbour_share_random": random,
        "neighbour_preservation": [beyond_chance(one, chance) for one, chance in zip(share, random, strict=True)],
        "prefix_explained": [explained_variance(embeddings_AD, group_A) for group_A in groups(proper_AP)],
    }


# Use, coverage, collisions


def level_use(codes_A: NDArray[np.integer], size: int) -> LevelUse:
    """How evenly the codes of a level are used."""
    used_V = np.bincount(codes_A, minlength=size)
    share = used_V[used_V > 0] / max(used_V.sum(), 1)
    entropy = max(float(-(share * np.log(share)).sum()), 0.0)  # not minus zero
    largest = math.log(max(min(size, len(codes_A)), 2))
    return LevelUse(
        codes=size,
        dead=int((used_V == 0).sum()),
        perplexity=math.exp(entropy),
        entropy_ratio=entropy / largest,
        gini=gini(used_V),
        usage=tuple(np.sort(used_V)[::-1].tolist()),
    )


def gini(counts_V: NDArray[np.integer]) -> float:
    """Gini coefficient of counts: 0 all equal, towards 1 all on one."""
    ordered = np.sort(np.asarray(counts_V, dtype=np.float64))
    n, total = len(ordered), ordered.sum()
    if total == 0:
        return 0.0
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))


def prefix_use(codes_AL: NDArray[np.integer], level_sizes: Sequence[int]) -> list[PrefixUse]:
    """How many prefixes of each length are in use."""
    n = len(codes_AL)
    uses = []
    for depth, group_A in enumerate(groups(codes_AL), 1):
        counts_G, possible = np.bincount(group_A), math.prod(level_sizes[:depth])
        used = len(counts_G)
        uses.append(
            PrefixUse(
                possible=possible,
                used=used,
                used_by_random=possible * taken_by_random(n, possible),
                of_possible=used / possible,
                per_advertiser=used / max(n, 1),
                coverage=used / max(min(possible, n), 1),
                largest=int(counts_G.max(initial=0)),
                median=float(np.median(counts_G)) if used else 0.0,
            )
        )
    return uses


def taken_by_random(n: int, possible: int) -> float:
    """Share of ``possible`` IDs that one of ``n`` random draws takes, on average.

    Of ``n`` advertisers with random codes, ``taken_by_random(n - 1, possible)`` share their ID with another.
    """
    if n <= 0:
        return 0.0
    return 1.0 if possible <= 1 else -math.expm1(n * math.log1p(-1 / possible))


def collision_rate(counts_G: NDArray[np.integer]) -> float:
    """Share of advertisers whose group has another one, from the groups' sizes."""
    return float(counts_G[counts_G > 1].sum() / max(counts_G.sum(), 1))


def moved(codes_AL: NDArray[np.integer], greedy_AL: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Where the IDs differ from the greedy ones, ``(A, L)``; of an extra level, all codes but its first."""
    extra = codes_AL.shape[1] - greedy_AL.shape[1]
    return np.asarray(codes_AL != np.pad(greedy_AL, ((0, 0), (0, extra))))


def groups(codes_AL: NDArray[np.integer]) -> Iterator[NDArray[np.int64]]:
    """For each prefix length, the number of every advertiser's prefix, rising with the prefix."""
    group_A = np.zeros(len(codes_AL), dtype=np.int64)
    for codes_A in codes_AL.T:
        key_A = group_A * (int(codes_A.max(initial=0)) + 1) + codes_A
        group_A = np.unique(key_A, return_inverse=True)[1].reshape(-1).astype(np.int64)
        yield group_A


def last_group(codes_AL: NDArray[np.integer]) -> NDArray[np.int64]:
    """The number of every advertiser's whole ID; equal IDs have the same."""
    *_, group_A = [np.zeros(len(codes_AL), dtype=np.int64), *groups(codes_AL)]
    return group_A


# Geometry


def reconstruction_error(embeddings_AD: NDArray[np.floating], reconstruction_AD: NDArray[np.floating]) -> float:
    """Squared error over the embeddings' squared distance to their mean: 0 perfect, 1 as good as the mean alone."""
    mean_D = embeddings_AD.mean(0, dtype=np.float64).astype(embeddings_AD.dtype)
    error = spread = 0.0
    for part in _blocks(len(embeddings_AD)):
        error += _sum_of_squares(embeddings_AD[part] - reconstruction_AD[part])
        spread += _sum_of_squares(embeddings_AD[part] - mean_D)
    return error / max(spread, 1e-12)


def explained_variance(embeddings_AD: NDArray[np.floating], group_A: NDArray[np.integer]) -> float:
    """Share of the embeddings' variance that lies between groups, beyond chance.

    One group explains 0, random groups 0 on average however many they are, groups of equal embeddings 1: the
    adjusted R² of the group means, ``1 - (within / (A - G)) / (total / (A - 1))``.

    Args:
        embeddings_AD: what is explained.
        group_A: group of each advertiser, from 0.

    Returns:
        The share; NaN where each advertiser is a group of its own or all are equal.
    """
    counts_G = np.bincount(group_A)
    counts_G = counts_G[counts_G > 0]
    n = len(group_A)
    mean_D = embeddings_AD.mean(0, dtype=np.float64).astype(np.float32)
    total = sum(_sum_of_squares(embeddings_AD[part] - mean_D) for part in _blocks(n))
    if len(counts_G) >= n or total <= 1e-9 * n:
        return math.nan
    if len(counts_G) == 1:
        return 0.0
    order_A = np.argsort(group_A, kind="stable")
    ends_G = np.cumsum(counts_G)
    between = 0.0
    first = 0
    while first < len(counts_G):  # whole groups, about a block of advertisers at a time
        start = int(ends_G[first] - counts_G[first])
        last = max(first + 1, int(np.searchsorted(ends_G, start + _BLOCK, side="right")))
        rows_B = order_A[start : ends_G[last - 1]]
        between += _between(embeddings_AD, mean_D, rows_B, counts_G[first:last])
        first = last
    within = max(total - between, 0.0)
    return 1.0 - (within / (n - len(counts_G))) / (total / (n - 1))


def _between(
    embeddings_AD: NDArray[np.floating],
    mean_D: NDArray[np.float32],
    rows_B: NDArray[np.int64],
    counts_G: NDArray[np.int64],
) -> float:
    """Squared distance of some groups' means to the mean of all, each as often as it has members."""
    if len(counts_G) == 1:  # of any size
        sum_D = np.zeros(len(mean_D))
        for part in _blocks(len(rows_B)):
            sum_D += (embeddings_AD[rows_B[part]] - mean_D).sum(0, dtype=np.float64)
        return float(sum_D @ sum_D / counts_G[0])
    ends_G = np.concatenate([[0], np.cumsum(counts_G)])
    members_GB = sp.csr_array((np.ones(len(rows_B), np.float32), np.arange(len(rows_B)), ends_G))
    sums_GD = members_GB @ (embeddings_AD[rows_B] - mean_D)
    return float((np.einsum("gd,gd->g", sums_GD, sums_GD, dtype=np.float64) / counts_G).sum())


def neighbour_share(
    embeddings_AD: NDArray[np.floating], codes_AL: NDArray[np.integer], *, seed: int = 0
) -> list[float]:
    """Share of each advertiser's ten nearest ones (Euclidean) that share its prefix, by prefix length.

    An advertiser with a zero embedding, of whom nothing is known, has no neighbours and is nobody's.

    Args:
        embeddings_AD: the catalogue.
        codes_AL: all prefixes are looked at, the whole row among them.
        seed: of the sample of advertisers that is looked at in a large catalogue; their neighbours are those in
            the whole of it.

    Returns:
        A share a prefix length; NaN where there are no two advertisers with an embedding.
    """
    known_K, nearest_QN, query_Q = neighbours(embeddings_AD, seed=seed)
    if not len(query_Q):
        return [math.nan] * codes_AL.shape[1]
    return shared_prefix(codes_AL[known_K], query_Q, nearest_QN).mean(0).tolist()


def neighbours(
    embeddings_AD: NDArray[np.floating], *, seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The nearest advertisers of a sample.

    Args:
        embeddings_AD: the catalogue.
        seed: of the sample.

    Returns:
        The advertisers with an embedding, as rows of the catalogue; and, as places among these, the ten nearest
        ones ``(Q, N)`` of each sampled one ``(Q,)``.
    """
    known_K = np.flatnonzero(_any_nonzero(embeddings_AD))
    everyone = len(known_K) == len(embeddings_AD)
    vectors_KD = np.ascontiguousarray(embeddings_AD if everyone else embeddings_AD[known_K], dtype=np.float32)
    n = min(NEIGHBOURS, len(known_K) - 1)
    if n < 1:
        return known_K, np.zeros((0, 0), dtype=np.int64), np.zeros(0, dtype=np.int64)
    n_queries = min(len(known_K), MOST_QUERIES, max(FEWEST_QUERIES, MOST_PAIRS // len(known_K)))
    query_Q = np.sort(np.random.default_rng(seed).permutation(len(known_K))[:n_queries])
    _, found_QN = faiss.knn(vectors_KD[query_Q], vectors_KD, n + 1)
    # Oneself is among them, but for as many equal ones; then any of them gives way.
    self_QN = found_QN == query_Q[:, None]
    self_QN[~self_QN.any(1), -1] = True
    return known_K, found_QN[~self_QN].reshape(n_queries, n).astype(np.int64), query_Q


def shared_prefix(
    codes_AL: NDArray[np.integer], query_Q: NDArray[np.int64], nearest_QN: NDArray[np.int64]
) -> NDArray[np.float64]:
    """For each of some advertisers the share of its neighbours with the same prefix, by prefix length, ``(Q, L)``."""
    same_QNL = codes_AL[query_Q, None] == codes_AL[nearest_QN]
    return np.logical_and.accumulate(same_QNL, axis=2).mean(1)


def chance_share(codes_AL: NDArray[np.integer]) -> list[float]:
    """Chance that two different advertisers share a prefix, by prefix length: what IDs dealt at random give."""
    n = len(codes_AL)
    if n < 2:
        return [math.nan] * codes_AL.shape[1]
    counts = [np.bincount(group_A).astype(np.float64) for group_A in groups(codes_AL)]
    return [float((counts_G * (counts_G - 1)).sum() / (n * (n - 1))) for counts_G in counts]


def beyond_chance(share: float, chance: float) -> float:
    """A share measured from chance (0) to all (1); 0 where chance gives all."""
    return (share - chance) / (1 - chance) if not chance >= 1 else 0.0


def identical_share(embeddings_AD: NDArray[np.floating]) -> float:
    """Share of advertisers whose embedding another one has too: no tokenizer can tell these apart."""
    vectors_AD = np.ascontiguousarray(embeddings_AD, dtype=np.float32)
    # Sums of products modulo 2^64 with random odd numbers: equal rows, and practically no others, have equal sums.
    factors_D = np.random.default_rng(0).integers(0, 2**63, vectors_AD.shape[1], dtype=np.uint64) * 2 + 1
    hash_A = np.empty(len(vectors_AD), dtype=np.uint64)
    for part in _blocks(len(vectors_AD), size=4096):
        bits_BD = (vectors_AD[part] + np.float32(0)).view(np.uint32)  # minus zero is zero
        hash_A[part] = (bits_BD * factors_D).sum(1, dtype=np.uint64)
    return collision_rate(np.unique(hash_A, return_counts=True)[1])


def _any_nonzero(vectors_AD: NDArray[np.floating]) -> NDArray[np.bool_]:
    parts = [vectors_AD[part].any(axis=1) for part in _blocks(len(vectors_AD))]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=bool)


def _sum_of_squares(values: NDArray[np.floating]) -> float:
    rows = np.einsum("ad,ad->a", values, values)
    return float(rows.sum(dtype=np.float64))


def _blocks(n: int, *, size: int | None = None) -> Iterator[slice]:
    size = size or _BLOCK
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


# Rows of the run's report


def quality_rows(report: dict[str, Any]) -> list[Row]:
    """The report as tidy rows of section ``semantic_ids``; ``k`` is the level."""
    n = report["advertisers"]
    single = ("collision_rate", "largest_collision", "moved_share", "extra_share", "reconstruction_error")
    rows = [Row("semantic_ids", metric, "ids", "all", None, float(report[metric]), None, None, n) for metric in single]
    by_level = ("dead_codes", "perplexity", "entropy_ratio", "gini", "prefix_coverage")
    by_prefix = ("neighbour_share", "neighbour_share_random", "neighbour_preservation", "prefix_explained")
    for metric in (*by_level, *by_prefix):
        arm = "random" if metric.endswith("_random") else "ids"
        for level, value in enumerate(report[metric], 1):
            name = metric.removesuffix("_random")
            rows.append(Row("semantic_ids", name, arm, "all", level, float(value), None, None, n))
    return rows
