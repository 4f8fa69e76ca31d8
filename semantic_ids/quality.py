"""Whether IDs are good: used evenly, few collisions, near advertisers near in the tree.

A collapsed tokenizer improves none of these figures: use is measured before collisions are resolved (resolving
them hands out codes that the tokenizer never uses), and neighbours are counted beyond chance, so that one code
for all scores zero there, as random codes do.

Shapes: A advertisers, L levels, D features of the embedding, V codes of a level.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.statistics import Row

NEIGHBOURS = 10
_SAMPLE = 5000


def quality(
    embeddings_AD: NDArray[np.floating],
    codes_AL: NDArray[np.integer],
    greedy_AL: NDArray[np.integer],
    reconstruction_AD: NDArray[np.floating],
    level_sizes: tuple[int, ...],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Figures of an ID table.

    Args:
        embeddings_AD: what was tokenised.
        codes_AL: unique codes.
        greedy_AL: codes before collisions were resolved.
        reconstruction_AD: decoded embeddings.
        level_sizes: codes of each level.
        seed: of the random assignment that neighbour preservation is compared with, and of the sample of at
            most 5,000 advertisers it is measured on.

    Returns:
        ``collision_rate``: share of advertisers whose greedy ID another one has too; ``largest_collision``;
        ``moved_share``: advertisers whose ID differs from the greedy one; ``reconstruction_error``: squared error
        over the embeddings' variance; and lists by level. Of the greedy codes: ``dead_codes``, ``perplexity``,
        ``entropy_ratio`` (entropy over the largest possible), ``gini`` of the codes' use, ``usage`` (members of
        each code, most used first). Of the unique codes, by proper prefix: ``neighbour_share`` (how many of the
        ten nearest advertisers share the prefix up to that level), ``neighbour_share_random`` (the same with the
        IDs dealt out at random) and ``neighbour_preservation`` (the share beyond chance: 1 all, 0 as random).
    """
    _, group, counts = np.unique(greedy_AL, axis=0, return_inverse=True, return_counts=True)
    error = ((embeddings_AD - reconstruction_AD) ** 2).sum()
    spread = ((embeddings_AD - embeddings_AD.mean(0)) ** 2).sum()
    report: dict[str, Any] = {
        "advertisers": len(codes_AL),
        "collision_rate": float((counts[group.reshape(-1)] > 1).mean()),
        "largest_collision": int(counts.max()),
        "moved_share": float((codes_AL != greedy_AL).any(1).mean()),
        "reconstruction_error": float(error / max(spread, 1e-12)),
        "dead_codes": [],
        "perplexity": [],
        "entropy_ratio": [],
        "gini": [],
        "usage": [],
    }
    for level, size in enumerate(level_sizes):
        used = np.bincount(greedy_AL[:, level], minlength=size)
        share = used[used > 0] / used.sum()
        entropy = float(-(share * np.log(share)).sum())
        report["dead_codes"].append(int((used == 0).sum()))
        report["perplexity"].append(float(np.exp(entropy)))
        report["entropy_ratio"].append(entropy / float(np.log(max(min(size, len(codes_AL)), 2))))
        report["gini"].append(gini(used))
        report["usage"].append(np.sort(used)[::-1].tolist())
    rng = np.random.default_rng(seed)
    rows = np.sort(rng.permutation(len(codes_AL))[:_SAMPLE])
    prefixes_AP = codes_AL[:, :-1]  # whole IDs are unique, so none is shared
    share = neighbour_share(embeddings_AD[rows], prefixes_AP[rows])
    random = neighbour_share(embeddings_AD[rows], rng.permutation(prefixes_AP)[rows])
    report["neighbour_share"], report["neighbour_share_random"] = share, random
    report["neighbour_preservation"] = [
        (here - chance) / (1 - chance) if chance < 1 else 0.0 for here, chance in zip(share, random, strict=True)
    ]
    return report


def gini(counts_V: NDArray[np.integer]) -> float:
    """Gini coefficient of counts: 0 all equal, towards 1 all on one."""
    ordered = np.sort(np.asarray(counts_V, dtype=np.float64))
    n, total = len(ordered), ordered.sum()
    if total == 0:
        return 0.0
    return float((2 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))


def neighbour_share(embeddings_AD: NDArray[np.floating], codes_AL: NDArray[np.integer]) -> list[float]:
    """Share of each advertiser's ten nearest ones (Euclidean) that share its prefix, by prefix length."""
    vectors = np.asarray(embeddings_AD, dtype=np.float32)
    n = min(NEIGHBOURS, len(vectors) - 1)
    if n < 1:
        return [float("nan")] * codes_AL.shape[1]
    squared = (vectors**2).sum(1)
    shared = np.zeros(codes_AL.shape[1])
    for start in range(0, len(vectors), 1024):
        part = slice(start, min(start + 1024, len(vectors)))
        distance = squared[part, None] - 2 * vectors[part] @ vectors.T + squared[None]
        distance[np.arange(distance.shape[0]), np.arange(part.start, part.stop)] = np.inf
        nearest = np.argpartition(distance, n - 1, axis=1)[:, :n]
        same = codes_AL[part, None] == codes_AL[nearest]
        shared += np.logical_and.accumulate(same, axis=2).sum((0, 1))
    return (shared / (len(vectors) * n)).tolist()


def quality_rows(report: dict[str, Any]) -> list[Row]:
    """The report as tidy rows of section ``semantic_ids``; ``k`` is the level."""
    n = report["advertisers"]
    rows = [
        Row("semantic_ids", metric, "ids", "all", None, float(report[metric]), None, None, n)
        for metric in ("collision_rate", "largest_collision", "moved_share", "reconstruction_error")
    ]
    by_level = ("dead_codes", "perplexity", "entropy_ratio", "gini")
    by_prefix = ("neighbour_share", "neighbour_share_random", "neighbour_preservation")
    for metric in (*by_level, *by_prefix):
        arm = "random" if metric.endswith("_random") else "ids"
        for level, value in enumerate(report[metric], 1):
            name = metric.removesuffix("_random")
            rows.append(Row("semantic_ids", name, arm, "all", level, float(value), None, None, n))
    return rows
