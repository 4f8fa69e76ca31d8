"""Unique codes: collisions are settled at the least total distance, within the prefix.

A tokenizer gives near entities the same codes. All but the last code stay as they are; at the last level the
entities that share a greedy code with another one are dealt out among it and the codes that nobody holds:

    prefix (17, 3)        greedy last codes       assigned                   an assignment problem a prefix:
      a ─ residual          40                      40                       squared distances of residuals to
      b ─ residual          40  ◄─ collision        12  nearest free code    the codes that are free
      c ─ residual           7                       7  alone on it, stays

    prefix (17, 3) with more entities than last codes: each of its codes is used once, and who is left over
    stays as near as can be on one more level, (17, 3, 40, 1). Its codebook vectors are zero, and everybody
    else has code 0 on it.

So near entities share the longest prefix that the code space allows, and the extra level is there only where
a prefix is over-full; it is as small as that allows. Nothing depends on the order of the entities except
between equal embeddings. New entities find their place in the same way beside those that have an ID already.

An assignment is exact up to `PART` colliding entities of one prefix (or as many as there are last codes);
larger groups, thousands of equal embeddings among them, are dealt out in parts of that size that each get
their share of the codes.

Shapes: A entities, N new entities, T entities that have an ID, L levels, V codes of a level, E features,
M members that are dealt out together, S slots (last code, extra code) that they may take.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from data.errors import UserError

PART = 1024
"""Colliding entities of one prefix that are assigned together."""
_BLOCK = 4096
_GOLDEN = (math.sqrt(5) - 1) / 2

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def check_capacity(n_entities: int, level_sizes: Sequence[int]) -> None:
    """Refuse a code space that is too small.

    Raises:
        UserError: fewer IDs than entities; the message names sizes that would do.
    """
    capacity = math.prod(level_sizes)
    if n_entities > capacity:
        raise UserError(
            f"{n_entities} entities for level sizes {list(level_sizes)}",
            expected=f"at most {capacity} entities, as many as these sizes have IDs",
            action=f"set level_sizes={sizes_that_hold(n_entities, len(level_sizes))} in the tokenizer's section of "
            "semantic_ids",
        )


def sizes_that_hold(n_entities: int, n_levels: int) -> list[int]:
    """Equal level sizes, a power of two, with at least sixteen times as many IDs as entities."""
    bits = math.log2(16 * max(n_entities, 1)) / n_levels
    return [2 ** max(1, math.ceil(bits - 1e-9))] * n_levels


def resolve_collisions(
    latent_AE: NDArray[np.floating], greedy_AL: NDArray[np.integer], codebooks: Sequence[NDArray[np.floating]]
) -> tuple[Ints, list[NDArray[np.float32]]]:
    """Unique codes near the greedy ones.

    Args:
        latent_AE: what was quantised.
        greedy_AL: greedy codes, not unique.
        codebooks: vectors of each level, ``(V_l, E)``.

    Returns:
        Codes, no two rows equal, and the codebooks they belong to. Both have one more level, of zero vectors,
        where some prefix has more entities than last codes. The first L - 1 codes are the greedy ones, and so is
        the last code of a row that shares its greedy codes with no other.

    Raises:
        UserError: more entities than the code space holds, or latents that are no numbers.
    """
    sizes = [len(book) for book in codebooks]
    greedy = _checked(latent_AE, greedy_AL, sizes)
    check_capacity(len(greedy), sizes)
    books = [np.asarray(book, dtype=np.float32) for book in codebooks]
    prefix_A, _ = _prefixes(greedy[:, :-1], greedy[:0, :-1])
    fullest = int(np.bincount(prefix_A).max()) if len(greedy) else 0
    n_extra = max(1, -(-fullest // sizes[-1]))
    codes, extra_A = _settle(latent_AE, greedy, codebooks, prefix_A, _Taken.nobody(), n_extra)
    if n_extra == 1:
        return codes, books
    zeros = np.zeros((n_extra, books[-1].shape[1]), dtype=np.float32)
    return np.column_stack([codes, extra_A]), [*books, zeros]


def place_new(
    latent_NE: NDArray[np.floating],
    greedy_NL: NDArray[np.integer],
    codebooks: Sequence[NDArray[np.floating]],
    taken_AL: NDArray[np.integer],
) -> Ints:
    """IDs for new entities beside those that are taken.

    A new entity whose greedy codes are free and its own keeps them. The others share out the free last codes of
    their prefix; where these do not suffice, the free codes of the extra level, if the table has one; and where
    a prefix has no ID left at all, those that lose least by it move to the nearest prefixes with room under the
    longest prefix they can keep, and are quantised anew below it.

    Args:
        latent_NE: what was quantised.
        greedy_NL: greedy codes of the levels that quantise, that is without the extra level.
        codebooks: of the table; one more than ``greedy_NL`` has levels where the table has the extra level.
        taken_AL: IDs of the table, as many levels as codebooks.

    Returns:
        Codes with as many levels as the table has, unique and none of them taken.

    Raises:
        UserError: not enough free IDs, latents that are no numbers, or arrays that do not belong together.
    """
    sizes = [len(book) for book in codebooks]
    taken = np.asarray(taken_AL, dtype=np.int64)
    n_levels = np.shape(greedy_NL)[-1]
    if taken.ndim != 2 or taken.shape[1] != len(sizes) or len(sizes) - n_levels not in (0, 1):
        raise UserError(
            f"greedy codes of {n_levels} levels, taken IDs of shape {taken.shape}, {len(sizes)} codebooks",
            expected="taken IDs with one level a codebook; greedy codes with as many, or one less (the extra level)",
            action="use the tokenizer and the ID table of one directory",
        )
    codes = _checked(latent_NE, greedy_NL, sizes[:n_levels])
    n_free = math.prod(sizes) - len(taken)
    if len(codes) > n_free:
        total = len(codes) + len(taken)
        raise UserError(
            f"{len(codes)} new entities for an ID table with {n_free} free IDs (level sizes {sizes})",
            expected=f"at most {n_free} new ones",
            action=f"make all IDs again with level_sizes={sizes_that_hold(total, n_levels)} in the tokenizer's "
            "section of semantic_ids",
        )
    for level in range(n_levels - 1):
        n_below = min(math.prod(sizes[level + 1 :]), 1 << 40)  # more than there are entities; int64 holds its sums
        _make_room(latent_NE, codes, codebooks[:n_levels], taken, level, n_below)
    prefix_N, prefix_T = _prefixes(codes[:, :-1], taken[:, : n_levels - 1])
    near = np.isin(prefix_T, prefix_N)
    extra = taken[near, n_levels] if len(sizes) > n_levels else np.zeros(int(near.sum()), dtype=np.int64)
    held = _Taken(prefix_T[near], taken[near, n_levels - 1], extra)
    n_extra = math.prod(sizes[n_levels:])
    codes, extra_N = _settle(latent_NE, codes, codebooks[:n_levels], prefix_N, held, n_extra)
    return np.column_stack([codes, extra_N]) if len(sizes) > n_levels else codes


def number_collisions(
    greedy_AL: NDArray[np.integer], codebooks: Sequence[NDArray[np.floating]]
) -> tuple[Ints, list[NDArray[np.float32]]]:
    """Greedy codes as they are, and a number on one more level where several entities share them.

    For codes that say something of their own, as the words of a name do: a neighbouring code would say something else.

    Args:
        greedy_AL: greedy codes, not unique.
        codebooks: vectors of each level, ``(V_l, E)``.

    Returns:
        As of `resolve_collisions`; entities with the same greedy codes are numbered in the order given.
    """
    greedy = np.asarray(greedy_AL, dtype=np.int64)
    books = [np.asarray(book, dtype=np.float32) for book in codebooks]
    word_A, _ = _prefixes(greedy, greedy[:0])
    count = np.bincount(word_A)
    if count.max(initial=0) <= 1:
        return greedy, books
    order = np.argsort(word_A, kind="stable")
    number_A = np.empty(len(greedy), dtype=np.int64)
    number_A[order] = np.arange(len(greedy)) - np.repeat(np.cumsum(count) - count, count)
    zeros = np.zeros((int(count.max()), books[-1].shape[1]), dtype=np.float32)
    return np.column_stack([greedy, number_A]), [*books, zeros]


def n_shared(codes_AL: NDArray[np.integer]) -> int:
    """How many rows repeat an earlier one."""
    codes = np.asarray(codes_AL, dtype=np.int64)
    row_A, _ = _prefixes(codes, codes[:0])
    return len(codes) - (int(row_A.max()) + 1 if len(row_A) else 0)


def _checked(latent_AE: NDArray[np.floating], greedy_AL: NDArray[np.integer], sizes: Sequence[int]) -> Ints:
    """A copy of the greedy codes, after a look at what was given."""
    codes = np.array(greedy_AL, dtype=np.int64)
    if codes.ndim != 2 or codes.shape != (len(latent_AE), len(sizes)):
        raise UserError(
            f"codes of shape {codes.shape} for {len(latent_AE)} latents and {len(sizes)} codebooks",
            expected="one row a latent, one code a codebook",
            action="quantise the latents with these codebooks",
        )
    if (codes < 0).any() or (codes >= np.array(sizes)).any():
        raise UserError(
            "codes outside their codebooks",
            expected=f"codes below {list(sizes)}",
            action="quantise the latents with these codebooks",
        )
    bad = sum(int((~np.isfinite(latent_AE[part]).all(1)).sum()) for part in _blocks(len(codes)))
    if bad:
        raise UserError(
            f"{bad} of {len(codes)} latents with NaN or infinity",
            expected="numbers only",
            action="look for such values in the embeddings, and train the tokenizer again",
        )
    return codes


def _blocks(n: int, size: int = 1 << 16) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _prefixes(codes_NP: Ints, codes_TP: Ints) -> tuple[Ints, Ints]:
    """Number of each row's prefix, the same for equal rows of both, in lexicographic order from 0."""
    codes = np.concatenate([codes_NP, codes_TP])
    node = np.zeros(len(codes), dtype=np.int64)
    if len(codes):
        for column in codes.T:
            _, node = np.unique(node * (int(codes.max()) + 1) + column, return_inverse=True)
    return node[: len(codes_NP)], node[len(codes_NP) :]


class _Taken:
    """IDs that are taken: by prefix, last code and extra code."""

    def __init__(self, prefix_T: Ints, code_T: Ints, extra_T: Ints) -> None:
        order = np.lexsort((code_T, prefix_T))
        self.prefix_T, self.code_T, self.extra_T = prefix_T[order], code_T[order], extra_T[order]

    @classmethod
    def nobody(cls) -> _Taken:
        none = np.zeros(0, dtype=np.int64)
        return cls(none, none, none)

    def of(self, prefix: int) -> tuple[Ints, Ints]:
        """Last and extra codes taken below a prefix."""
        rows = slice(*np.searchsorted(self.prefix_T, [prefix, prefix + 1]))
        return self.code_T[rows], self.extra_T[rows]


def _residual(
    latent_AE: NDArray[np.floating],
    codes_AL: Ints,
    books: Sequence[NDArray[np.floating]],
    rows_M: Ints,
    level: int,
) -> Floats:
    """What some rows leave to a level."""
    residual_ME = np.asarray(latent_AE[rows_M], dtype=np.float64)
    for above in range(level):
        residual_ME = residual_ME - np.asarray(books[above], dtype=np.float64)[codes_AL[rows_M, above]]
    return residual_ME


def _settle(
    latent_AE: NDArray[np.floating],
    codes_AL: Ints,
    books: Sequence[NDArray[np.floating]],
    prefix_A: Ints,
    taken: _Taken,
    n_extra: int,
) -> tuple[Ints, Ints]:
    """Unique last and extra codes; each prefix has room for its rows beside what is taken.

    Returns:
        The codes with the last level changed, and the extra code of each row.
    """
    n_codes, codes, extra_A = len(books[-1]), codes_AL.copy(), np.zeros(len(codes_AL), dtype=np.int64)
    id_A = prefix_A * n_codes + codes[:, -1]
    base_taken = taken.extra_T == 0
    id_T = (taken.prefix_T * n_codes + taken.code_T)[base_taken]
    ids, place_A, count = np.unique(id_A, return_inverse=True, return_counts=True)
    collides_A = ((count > 1) | np.isin(ids, id_T))[place_A]
    if not collides_A.any():
        return codes, extra_A
    held = np.sort(np.concatenate([id_A[~collides_A], id_T]))
    rows = np.flatnonzero(collides_A)
    rows = rows[np.lexsort((_own_number(latent_AE, rows), prefix_A[rows]))]
    starts = np.flatnonzero(np.diff(prefix_A[rows], prepend=-1))
    stops = np.append(starts[1:], len(rows))
    groups = prefix_A[rows[starts]]
    held_start, held_stop = np.searchsorted(held, groups * n_codes), np.searchsorted(held, (groups + 1) * n_codes)
    fits = stops - starts <= n_codes - (held_stop - held_start)
    last_VE = np.asarray(books[-1], dtype=np.float64)

    def distances(rows_M: Ints) -> Floats:
        return _squared(_residual(latent_AE, codes, books, rows_M, len(books) - 1), last_VE)

    # The many small groups: their distances by the block, since a product of matrices likes it large.
    for block in _runs(np.flatnonzero(fits), (stops - starts)[fits]):
        rows_M = np.concatenate([rows[starts[group] : stops[group]] for group in block])
        distance_MV, new_M, first = distances(rows_M), np.empty(len(rows_M), dtype=np.int64), 0
        for group in block:
            part = slice(first, first + stops[group] - starts[group])
            first = part.stop
            distance_MV[part, held[held_start[group] : held_stop[group]] - groups[group] * n_codes] = np.inf
            _, new_M[part] = linear_sum_assignment(distance_MV[part])
        codes[rows_M, -1] = new_M
    for group in np.flatnonzero(~fits):
        rows_M = rows[starts[group] : stops[group]]
        used = held[held_start[group] : held_stop[group]] - groups[group] * n_codes
        code_T, extra_T = taken.of(groups[group])
        above = extra_T > 0
        slots = _slots(len(rows_M), n_codes, n_extra, np.append(used, code_T[above]), extra_T[above])
        for members, code_S, extra_S in _parts(rows_M, *slots, size=max(PART, n_codes)):
            distance_MS = distances(members)[:, code_S]
            # Weighs more than all distances together: the extra level only once every last code is in use.
            distance_MS[:, extra_S > 0] += 1.0 + len(members) * distance_MS.max()
            _, slot_M = linear_sum_assignment(distance_MS)
            codes[members, -1], extra_A[members] = code_S[slot_M], extra_S[slot_M]
    return codes, extra_A


def _own_number(latent_AE: NDArray[np.floating], rows_M: Ints) -> Floats:
    """A number of each row that depends on its embedding alone: it orders entities whatever order they came in."""
    weight_E = np.sqrt(np.arange(2, latent_AE.shape[1] + 2))
    parts = [(latent_AE[rows_M[part]] * weight_E).sum(1) for part in _blocks(len(rows_M))]
    return np.concatenate(parts)


def _runs(groups: Ints, sizes: Ints) -> Iterator[Ints]:
    """Consecutive groups of about `_BLOCK` rows together."""
    cuts = np.flatnonzero(np.diff((np.cumsum(sizes) - sizes) // _BLOCK)) + 1
    return (run for run in np.split(groups, cuts) if len(run))


def _slots(n: int, n_codes: int, n_extra: int, used_code: Ints, used_extra: Ints) -> tuple[Ints, Ints]:
    """The free slots of a prefix, on the fewest values of the extra level that hold ``n``.

    Args:
        n: rows to hold.
        n_codes: last codes.
        n_extra: codes of the extra level.
        used_code: last codes of the slots in use.
        used_extra: extra codes of the last ones of these; those before have extra code 0.

    Returns:
        Last and extra code of each slot, ordered by the extra code.
    """
    extra = np.concatenate([np.zeros(len(used_code) - len(used_extra), dtype=np.int64), used_extra])
    free = np.cumsum(n_codes - np.bincount(extra, minlength=n_extra))
    n_layers = int(np.searchsorted(free, n)) + 1
    open_KV = np.ones((n_layers, n_codes), dtype=bool)
    inside = extra < n_layers
    open_KV[extra[inside], used_code[inside]] = False
    extra_S, code_S = np.nonzero(open_KV)
    return code_S, extra_S


def _parts(rows_M: Ints, code_S: Ints, extra_S: Ints, *, size: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Rows with the slots they share out; more than ``size`` rows in parts that are alike, each with its own slots."""
    if len(rows_M) > size:
        # Multiples of the golden ratio scatter neighbours evenly over the parts.
        rows_M = rows_M[np.argsort((np.arange(len(rows_M)) * _GOLDEN) % 1.0, kind="stable")]
    for start in range(0, len(rows_M), size):
        stop = start + size if start + size < len(rows_M) else len(code_S)
        yield rows_M[start : start + size], code_S[start:stop], extra_S[start:stop]


def _make_room(
    latent_NE: NDArray[np.floating],
    codes_NL: Ints,
    books: Sequence[NDArray[np.floating]],
    taken_AL: Ints,
    level: int,
    n_below: int,
) -> None:
    """Move rows out of prefixes that are asked to hold more than they have free IDs; writes ``codes_NL``.

    Args:
        latent_NE: what was quantised.
        codes_NL: codes, changed from this level on for the rows that move.
        books: codebooks of the levels that quantise.
        taken_AL: IDs that are taken.
        level: whose codes may change.
        n_below: IDs below one code of this level.
    """
    n_codes = len(books[level])
    parent_N, parent_T = _prefixes(codes_NL[:, :level], taken_AL[:, :level])
    node_N, node_T = parent_N * n_codes + codes_NL[:, level], parent_T * n_codes + taken_AL[:, level]
    asked, asked_count = np.unique(node_N, return_counts=True)
    held, held_count = np.unique(node_T, return_counts=True)
    room = np.full(len(asked), n_below)
    _, at, of = np.intersect1d(asked, held, assume_unique=True, return_indices=True)
    room[at] -= held_count[of]
    crowded = np.unique(asked[asked_count > room] // n_codes)
    if not len(crowded):
        return
    by_parent_N, by_parent_T = np.argsort(parent_N, kind="stable"), np.argsort(parent_T, kind="stable")
    for parent in crowded:
        rows, others = (
            order[slice(*np.searchsorted(parents, [parent, parent + 1], sorter=order))]
            for order, parents in ((by_parent_N, parent_N), (by_parent_T, parent_T))
        )
        room_V = n_below - np.bincount(taken_AL[others, level], minlength=n_codes)
        full_V = np.bincount(codes_NL[rows, level], minlength=n_codes) > room_V
        leaves = full_V[codes_NL[rows, level]]
        room_V = room_V - np.bincount(codes_NL[rows[~leaves], level], minlength=n_codes)
        rows = rows[leaves]
        rows = rows[np.argsort(_own_number(latent_NE, rows), kind="stable")]
        residual_ME = _residual(latent_NE, codes_NL, books, rows, level)
        new = _share_out(_squared(residual_ME, np.asarray(books[level], dtype=np.float64)), room_V)
        moved = rows[new != codes_NL[rows, level]]
        codes_NL[rows, level] = new
        for below in range(level + 1, len(books)):
            residual_ME = _residual(latent_NE, codes_NL, books, moved, below)
            codes_NL[moved, below] = _squared(residual_ME, np.asarray(books[below], dtype=np.float64)).argmin(1)


def _share_out(distance_MV: Floats, room_V: Ints) -> Ints:
    """A code for each row, each code taken at most as often as it has room, at the least total distance."""
    new_M, room_V, size = np.empty(len(distance_MV), dtype=np.int64), room_V.copy(), PART // 4
    order = np.argsort((np.arange(len(distance_MV)) * _GOLDEN) % 1.0, kind="stable")
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        share_V = -(-room_V * len(rows) // (len(order) - start))
        # The nearest codes that hold all rows of this part suffice: the others cannot fill them all.
        near_MV = np.argsort(distance_MV[rows], axis=1, kind="stable")
        before_MV = np.cumsum(share_V[near_MV], axis=1) - share_V[near_MV]
        wanted = near_MV[(before_MV < len(rows)) & (share_V[near_MV] > 0)]
        slots_V = np.minimum(share_V, np.bincount(wanted, minlength=len(room_V)))
        code_S = np.repeat(np.arange(len(room_V)), slots_V)
        _, slot_M = linear_sum_assignment(distance_MV[rows][:, code_S])
        new_M[rows] = code_S[slot_M]
        room_V -= np.bincount(new_M[rows], minlength=len(room_V))
    return new_M


def _squared(a_NE: Floats, b_VE: Floats) -> Floats:
    cross_NV = a_NE @ b_VE.T
    return np.maximum((a_NE**2).sum(1)[:, None] - 2 * cross_NV + (b_VE**2).sum(1)[None], 0.0)
