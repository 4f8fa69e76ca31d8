"""Unique codes: collisions are settled at the least total distance, within the prefix wherever it has room.

An RQ-VAE gives near advertisers the same codes. From the root down, each node of the prefix tree makes sure
that none of its children is asked to hold more advertisers than there are IDs below it; at the last level
every advertiser of a colliding prefix gets a code of its own:

    prefix (17, 3)        greedy last codes       assigned                   an assignment problem a prefix:
      a ─ residual          40                      40                       squared distances of residuals to
      b ─ residual          40  ◄─ collision        12  nearest free code    all codes of the last level
      c ─ residual           7                       7

    prefix (17, 3) with more advertisers than last codes: those that lose least by it move to the next
    nearest code of the level above, (17, *), and are quantised anew below it.

So the number of levels is fixed, and near advertisers keep the longest prefix that the code space allows.
Nothing depends on the order of advertisers except between equal embeddings.

Shapes: A advertisers, L levels, V codes of a level, E features, N members of one prefix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from data.errors import UserError


def check_capacity(n_advertisers: int, level_sizes: Sequence[int]) -> None:
    """Refuse a code space that is too small.

    Raises:
        UserError: fewer IDs than advertisers; the message names sizes that would do.
    """
    capacity = math.prod(level_sizes)
    if n_advertisers > capacity:
        raise UserError(
            f"{n_advertisers} advertisers for semantic_ids.rqvae.level_sizes={list(level_sizes)}",
            expected=f"at most {capacity} advertisers, as many as these sizes have IDs",
            action=f"set semantic_ids.rqvae.level_sizes={sizes_that_hold(n_advertisers, len(level_sizes))}",
        )


def sizes_that_hold(n_advertisers: int, n_levels: int) -> list[int]:
    """Equal level sizes, a power of two, with at least sixteen times as many IDs as advertisers."""
    bits = math.log2(16 * max(n_advertisers, 1)) / n_levels
    return [2 ** max(1, math.ceil(bits - 1e-9))] * n_levels


def resolve_collisions(
    latent_AE: NDArray[np.floating], codes_AL: NDArray[np.integer], codebooks: Sequence[NDArray[np.floating]]
) -> NDArray[np.int64]:
    """Unique codes near the given ones.

    Args:
        latent_AE: what was quantised.
        codes_AL: greedy codes, not unique.
        codebooks: vectors of each level, ``(V_l, E)``.

    Returns:
        ``(A, L)``, no two rows equal. A row changes only where its prefix holds a collision or is over-full.

    Raises:
        UserError: more advertisers than the code space holds.
    """
    sizes = [len(book) for book in codebooks]
    check_capacity(len(codes_AL), sizes)
    codes = np.array(codes_AL, dtype=np.int64)
    residual_AE = np.array(latent_AE, dtype=np.float64)
    books = [np.asarray(book, dtype=np.float64) for book in codebooks]
    for level, book in enumerate(books[:-1]):
        room = math.prod(sizes[level + 1 :])
        for members in _groups(codes[:, :level]):
            if len(members) > room and np.bincount(codes[members, level]).max() > room:
                old = codes[members, level]
                new = _spill(_squared(residual_AE[members], book), old, room)
                codes[members, level] = new
                moved = members[new != old]
                _quantize(residual_AE[moved] - book[codes[moved, level]], codes, moved, books, level + 1)
        residual_AE -= book[codes[:, level]]
    for members in _groups(codes[:, :-1]):
        if len(np.unique(codes[members, -1])) < len(members):
            _, codes[members, -1] = linear_sum_assignment(_squared(residual_AE[members], books[-1]))
    return codes


def _groups(prefix_AP: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Rows of each distinct prefix, rising, for prefixes of two rows and more."""
    if not len(prefix_AP):
        return
    order = np.lexsort(prefix_AP.T[::-1]) if prefix_AP.shape[1] else np.arange(len(prefix_AP))
    sorted_AP = prefix_AP[order]
    starts = np.flatnonzero((sorted_AP[1:] != sorted_AP[:-1]).any(axis=1)) + 1
    for members in np.split(order, starts):
        if len(members) > 1:
            yield np.sort(members)


def _spill(distance_NV: NDArray[np.float64], codes_N: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Codes with at most ``room`` members each: those move that lose least by it, to the nearest with room."""
    codes, n_codes = codes_N.copy(), distance_NV.shape[1]
    free_V = room - np.bincount(codes, minlength=n_codes)
    over = free_V[codes] < 0
    while over.any():
        open_NV = np.where(free_V > 0, distance_NV, np.inf)
        target = open_NV.argmin(axis=1)
        rows = np.arange(len(codes))
        loss = np.where(over, open_NV[rows, target] - distance_NV[rows, codes], np.inf)
        for row in np.argsort(loss, kind="stable")[: int(over.sum())]:
            if free_V[codes[row]] < 0 and free_V[target[row]] > 0:
                free_V[codes[row]] += 1
                free_V[target[row]] -= 1
                codes[row] = target[row]
        over = free_V[codes] < 0
    return codes


def _quantize(
    residual_NE: NDArray[np.float64],
    codes_AL: NDArray[np.int64],
    rows_N: NDArray[np.int64],
    books: Sequence[NDArray[np.float64]],
    first: int,
) -> None:
    """Greedy codes of some rows from a level on, written into ``codes_AL``."""
    for level in range(first, len(books)):
        codes_AL[rows_N, level] = _squared(residual_NE, books[level]).argmin(axis=1)
        residual_NE = residual_NE - books[level][codes_AL[rows_N, level]]


def _squared(a_NE: NDArray[np.float64], b_VE: NDArray[np.float64]) -> NDArray[np.float64]:
    cross_NV = a_NE @ b_VE.T
    return np.maximum((a_NE**2).sum(1)[:, None] - 2 * cross_NV + (b_VE**2).sum(1)[None], 0.0)
