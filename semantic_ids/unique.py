"""Makes codes unique without moving an advertiser farther than it must.

Advertisers that share all codes keep their prefix and share out the last level's codes among them, at
the least total distance (an assignment problem a prefix). Where a prefix has more advertisers than the
last level has codes, those that lose least move to the nearest prefix with room. Nothing depends on the
order of the advertisers except ties.

Shapes: A advertisers, L levels, V codes of a level, E features, P prefixes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from data.errors import UserError


def resolve_collisions(
    latent_AE: NDArray[np.floating], codes_AL: NDArray[np.integer], codebooks: list[NDArray[np.floating]]
) -> NDArray[np.int64]:
    """Unique codes near the given ones.

    Args:
        latent_AE: what was quantised.
        codes_AL: greedy codes, not unique.
        codebooks: vectors of each level, ``(V_l, E)``.

    Returns:
        ``(A, L)``, no two rows equal. A row changes only where its prefix holds a collision.

    Raises:
        UserError: more advertisers than the code space holds.
    """
    codes = np.array(codes_AL, dtype=np.int64)
    sizes = [len(codebook) for codebook in codebooks]
    if len(codes) > np.prod(sizes, dtype=float):
        fitting = int(np.ceil(len(codes) ** (1 / len(sizes))))
        raise UserError(
            f"{len(codes)} advertisers for semantic_ids.rqvae.level_sizes={sizes}",
            expected=f"at most {int(np.prod(sizes))}, the IDs that these sizes hold",
            action=f"set level_sizes to at least {[fitting] * len(sizes)}, better twice that",
        )
    latent = np.asarray(latent_AE, dtype=np.float64)
    books = [np.asarray(book, dtype=np.float64) for book in codebooks]
    _make_room(latent, codes, books)
    prefix_A = _numbers(codes[:, :-1], sizes[:-1])
    _, collides_A = np.unique(_numbers(codes, sizes), return_inverse=True)
    for prefix in np.unique(prefix_A[np.bincount(collides_A)[collides_A] > 1]):
        members = np.flatnonzero(prefix_A == prefix)
        residual = latent[members] - _sum(codes[members, :-1], books[:-1])
        _, codes[members, -1] = linear_sum_assignment(_squared(residual, books[-1]))
    return codes


def _make_room(latent: NDArray, codes: NDArray[np.int64], books: list[NDArray]) -> None:
    """Move advertisers out of prefixes that have more of them than last codes, in place."""
    sizes, room = [len(book) for book in books], len(books[-1])
    if codes.shape[1] == 1:
        return
    prefix_A = _numbers(codes[:, :-1], sizes[:-1])
    n_prefixes = int(np.prod(sizes[:-1]))
    count_P = np.bincount(prefix_A, minlength=n_prefixes)
    for prefix in np.flatnonzero(count_P > room):
        members = np.flatnonzero(prefix_A == prefix)
        free = np.flatnonzero(count_P < room)
        free_codes = np.stack(np.unravel_index(free, sizes[:-1]), axis=1)
        # Prefixes that differ in the deepest code alone come first: the neighbourhood stays whole.
        own = np.stack(np.unravel_index(prefix, sizes[:-1]))
        elsewhere = (free_codes[:, :-1] != own[:-1]).any(1)
        distance = _squared(latent[members], _sum(free_codes, books[:-1]))
        distance = distance + elsewhere * (distance.max(initial=0.0) + 1.0)
        here = _squared(latent[members], _sum(own[None], books[:-1]))
        loss = distance.min(1) - here[:, 0]
        for member in np.argsort(loss, kind="stable")[: len(members) - room]:
            order = np.argsort(distance[member], kind="stable")
            target = next(int(i) for i in order if count_P[free[i]] < room)
            codes[members[member], :-1] = free_codes[target]
            residual = latent[members[member]] - _sum(free_codes[target][None], books[:-1])[0]
            codes[members[member], -1] = int(_squared(residual[None], books[-1])[0].argmin())
            prefix_A[members[member]] = free[target]
            count_P[free[target]] += 1
            count_P[prefix] -= 1


def _numbers(codes: NDArray[np.int64], sizes: list[int]) -> NDArray[np.int64]:
    number = np.zeros(len(codes), dtype=np.int64)
    for level, size in enumerate(sizes):
        number = number * size + codes[:, level]
    return number


def _sum(codes: NDArray[np.int64], books: list[NDArray]) -> NDArray:
    return sum((book[codes[:, level]] for level, book in enumerate(books)), np.zeros((len(codes), books[0].shape[1])))


def _squared(a: NDArray, b: NDArray) -> NDArray:
    return np.maximum((a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None], 0.0)
