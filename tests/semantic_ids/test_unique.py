"""Collisions are settled optimally within the prefix, and only where there must be; new IDs touch no old one."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.errors import UserError
from semantic_ids import unique
from semantic_ids.unique import check_capacity, n_shared, place_new, resolve_collisions, sizes_that_hold

Codes = NDArray[np.int64]
Books = list[NDArray[np.float64]]
Latent = NDArray[np.float64]


def books_of(sizes: tuple[int, ...], seed: int = 0, dim: int = 3) -> Books:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(size, dim)) * 0.5**level for level, size in enumerate(sizes)]


def greedy(latent: Latent, books: Books) -> Codes:
    residual, codes = latent.copy(), []
    for book in books:
        nearest = ((residual[:, None] - book[None]) ** 2).sum(-1).argmin(1)
        codes.append(nearest)
        residual = residual - book[nearest]
    return np.stack(codes, axis=1)


def distortion(latent: Latent, codes: Codes, books: Books) -> float:
    total = sum(book[codes[:, level]] for level, book in enumerate(books))
    return float(((latent - total) ** 2).sum())


def copies(codes: Codes) -> NDArray[np.int64]:
    """How many rows equal each row."""
    _, row, count = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return count[row.reshape(-1)]


def capacity(sizes: tuple[int, ...]) -> int:
    return int(np.prod(sizes))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Latent, Codes, Books]:
    """Entities from scattered to all equal, from few to as many as there are IDs."""
    sizes = draw(st.sampled_from([(4,), (2, 3), (3, 4), (2, 2, 2), (3, 2, 4), (3, 3, 8)]))
    seed, spread = draw(st.integers(0, 1000)), draw(st.sampled_from([0.0, 0.01, 0.3, 1.0]))
    n = draw(st.integers(1, capacity(sizes)))
    books = books_of(sizes, seed)
    latent = np.random.default_rng(seed).normal(size=(n, 3)) * spread
    twins = draw(st.integers(0, n // 2))
    latent[:twins] = latent[n - twins : n]
    return latent, greedy(latent, books), books


@settings(max_examples=200, deadline=None)
@given(cases())
def test_codes_are_unique_and_belong_to_their_codebooks(case: tuple[Latent, Codes, Books]) -> None:
    latent, before, books = case
    codes, all_books = resolve_collisions(latent, before, books)
    assert codes.shape == (len(latent), len(all_books))
    assert len(np.unique(codes, axis=0)) == len(latent)
    assert (codes >= 0).all()
    assert (codes < np.array([len(book) for book in all_books])).all()
    for book, given_book in zip(all_books, books, strict=False):
        np.testing.assert_array_equal(book, given_book.astype(np.float32))


@settings(max_examples=200, deadline=None)
@given(cases())
def test_prefixes_stay_and_so_does_what_does_not_collide(case: tuple[Latent, Codes, Books]) -> None:
    latent, before, books = case
    codes, _ = resolve_collisions(latent, before, books)
    n_levels = len(books)
    assert (codes[:, : n_levels - 1] == before[:, :-1]).all()
    alone = copies(before) == 1
    assert (codes[alone, :n_levels] == before[alone]).all()
    assert not codes[alone, n_levels:].any()
    # A code that several want goes to one of them.
    for row in before[~alone]:
        assert (codes[:, :n_levels] == row).all(1).any()


@settings(max_examples=200, deadline=None)
@given(cases())
def test_the_extra_level_is_there_only_where_needed_and_as_small_as_can_be(case: tuple[Latent, Codes, Books]) -> None:
    latent, before, books = case
    codes, all_books = resolve_collisions(latent, before, books)
    n_levels, n_last = len(books), len(books[-1])
    members = copies(before[:, :-1])
    needed = -(-int(members.max()) // n_last)
    if needed == 1:
        assert len(all_books) == n_levels
        return
    assert len(all_books) == n_levels + 1
    assert len(all_books[-1]) == needed
    assert not all_books[-1].any()
    assert not codes[members <= n_last, -1].any()
    for prefix in np.unique(before[:, :-1], axis=0):
        rows = (before[:, :-1] == prefix).all(1)
        assert (codes[rows, -1] > 0).sum() == max(0, rows.sum() - n_last)


@settings(max_examples=100, deadline=None)
@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_entities_does_not_matter(case: tuple[Latent, Codes, Books], random: object) -> None:
    latent, before, books = case
    distinct = np.unique(latent, axis=0, return_index=True)[1]
    latent, before = latent[distinct], before[distinct]
    shuffle = np.array(random.sample(range(len(latent)), len(latent)))  # type: ignore[attr-defined]
    codes, _ = resolve_collisions(latent, before, books)
    shuffled, _ = resolve_collisions(latent[shuffle], before[shuffle], books)
    assert (shuffled == codes[shuffle]).all()


@pytest.mark.parametrize("step", [1.0, 0.5])
def test_order_does_not_matter_even_where_distances_tie(step: float) -> None:
    """Points of a grid around codes of a grid: every distance occurs several times."""
    grid = np.array(list(itertools.product((-1.0, 0.0, 1.0), repeat=2)))
    books = [np.zeros((1, 2)), grid]
    latent = step * np.array([(1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (0.2, 0.2), (-0.2, 0.2)])
    before = np.zeros((6, 2), dtype=np.int64)
    codes, _ = resolve_collisions(latent, before, books)
    for shuffle in itertools.islice(itertools.permutations(range(6)), 0, 720, 37):
        rows = np.array(shuffle)
        assert (resolve_collisions(latent[rows], before[rows], books)[0] == codes[rows]).all()


def best_of_all(latent: Latent, before: Codes, books: Books, n_extra: int) -> float:
    """Least distortion, by trying all, with what does not collide where it is and the last codes used first."""
    n_last, alone = len(books[-1]), copies(before) == 1
    free = [
        (code, extra)
        for code, extra in itertools.product(range(n_last), range(n_extra))
        if not (extra == 0 and code in before[alone, -1])
    ]
    moving = np.flatnonzero(~alone)
    fewest = max(0, len(latent) - n_last)
    best = np.inf
    for slots in itertools.permutations(free, len(moving)):
        if sum(extra > 0 for _, extra in slots) == fewest:
            codes = before.copy()
            codes[moving, -1] = [code for code, _ in slots]
            best = min(best, distortion(latent, codes, books))
    return best


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 5), n_last=st.integers(2, 5), seed=st.integers(0, 1000))
def test_the_assignment_is_the_best_of_all(n: int, n_last: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    books = [np.zeros((3, 3)), rng.normal(size=(n_last, 3))]
    latent = rng.normal(size=(n, 3)) * 0.7
    before = np.column_stack([np.zeros(n, dtype=np.int64), greedy(latent, books[1:])])
    codes, _ = resolve_collisions(latent, before, books)
    assert distortion(latent, codes, books) == pytest.approx(best_of_all(latent, before, books, -(-n // n_last)))


def test_a_large_group_in_parts_is_nearly_as_good_as_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    books = [np.zeros((8, 3)), np.random.default_rng(0).normal(size=(16, 3))]
    latent = np.random.default_rng(3).normal(size=(100, 3))
    latent[:50] = latent[0]
    before = greedy(latent, books)
    whole, _ = resolve_collisions(latent, before, books)
    monkeypatch.setattr(unique, "PART", 20)
    parts, all_books = resolve_collisions(latent, before, books)
    assert len(all_books[-1]) == 7
    assert n_shared(parts) == 0
    scattered = np.random.default_rng(0).permutation(100)
    at_random = np.column_stack([before[:, 0], scattered % 16])
    best, dealt, random = (distortion(latent, codes, books) for codes in (whole, parts, at_random))
    assert best <= dealt < best + 0.25 * (random - best)


def test_thousands_of_equal_embeddings_take_seconds_and_stay_together() -> None:
    books = books_of((32, 32, 32))
    latent = np.concatenate([np.zeros((5000, 3)), np.random.default_rng(0).normal(size=(300, 3))])
    before = greedy(latent, books)
    start = time.perf_counter()
    codes, all_books = resolve_collisions(latent, before, books)
    assert time.perf_counter() - start < 30
    assert n_shared(codes) == 0
    assert len(np.unique(codes[:5000, :2], axis=0)) == 1
    assert len(all_books[-1]) == -(-int(copies(before[:, :2]).max()) // 32)


def test_the_code_space_can_be_filled_to_the_last_id() -> None:
    books = books_of((2, 3, 4))
    codes = np.stack(np.unravel_index(np.arange(24), (2, 3, 4)), axis=1)
    latent = np.sum([book[codes[:, level]] for level, book in enumerate(books)], axis=0)
    after, all_books = resolve_collisions(latent, codes, books)
    assert (after == codes).all()
    assert len(all_books) == 3


def test_codes_of_many_levels_and_many_prefixes_do_not_run_into_each_other() -> None:
    sizes = (1024,) * 8
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1024, size=(500, 8))
    codes[250:, :-1] = codes[:250, :-1]
    books = [rng.normal(size=(size, 3)) for size in sizes]
    latent = np.sum([book[codes[:, level]] for level, book in enumerate(books)], axis=0)
    assert (resolve_collisions(latent, codes, books)[0] == codes).all()
    latent[250:], codes[250:] = latent[:250], codes[:250]
    after, all_books = resolve_collisions(latent, codes, books)
    assert len(all_books) == 8
    assert n_shared(after) == 0
    assert ((after == codes).all(1).reshape(2, 250).sum(0) == 1).all()


def test_no_entity_at_all_is_no_error() -> None:
    none = np.zeros((0, 3)), np.zeros((0, 2), dtype=np.int64)
    codes, books = resolve_collisions(*none, books_of((2, 2)))
    assert codes.shape == (0, 2)
    assert len(books) == 2
    assert place_new(*none, books, np.array([[0, 1]])).shape == (0, 2)


# New entities


@st.composite
def grown(draw: st.DrawFn) -> tuple[Latent, Codes, Books, int]:
    """A case and how many of its entities are there from the start."""
    latent, before, books = draw(cases())
    return latent, before, books, draw(st.integers(0, len(latent)))


@settings(max_examples=200, deadline=None)
@given(grown())
def test_new_ids_are_unique_and_touch_no_old_one(case: tuple[Latent, Codes, Books, int]) -> None:
    latent, before, books, n_old = case
    old, all_books = resolve_collisions(latent[:n_old], before[:n_old], books)
    unchanged = old.copy()
    new = place_new(latent[n_old:], before[n_old:], all_books, old)
    assert (old == unchanged).all()
    assert new.shape == (len(latent) - n_old, len(all_books))
    assert n_shared(np.concatenate([old, new])) == 0
    assert (new >= 0).all()
    assert (new < np.array([len(book) for book in all_books])).all()


@settings(max_examples=200, deadline=None)
@given(grown())
def test_new_ones_keep_what_is_free_and_their_prefix_while_it_has_room(case: tuple[Latent, Codes, Books, int]) -> None:
    latent, before, books, n_old = case
    n_levels = len(books)
    old, all_books = resolve_collisions(latent[:n_old], before[:n_old], books)
    new = place_new(latent[n_old:], before[n_old:], all_books, old)
    codes, room = np.concatenate([old, new]), len(books[-1]) * (len(all_books[-1]) if len(all_books) > n_levels else 1)
    asked = copies(before[:, :-1])[n_old:]
    if (asked <= room).all():
        assert (new[:, : n_levels - 1] == before[n_old:, :-1]).all()
        wanted = copies(np.concatenate([before[n_old:], old[old[:, n_levels:].sum(1) == 0, :n_levels]]))
        free = wanted[: len(new)] == 1
        assert (new[free, :n_levels] == before[n_old:][free]).all()
    used_first = codes[:, n_levels:].sum(1) == 0
    for row in new[new[:, n_levels:].sum(1) > 0]:
        siblings = (codes[:, : n_levels - 1] == row[: n_levels - 1]).all(1) & used_first
        assert siblings.sum() == len(books[-1])  # the extra level only once every last code is in use


@settings(max_examples=100, deadline=None)
@given(grown(), st.randoms(use_true_random=False))
def test_the_order_of_new_ones_does_not_matter(case: tuple[Latent, Codes, Books, int], random: object) -> None:
    latent, before, books, n_old = case
    old, all_books = resolve_collisions(latent[:n_old], before[:n_old], books)
    rows = n_old + np.unique(latent[n_old:], axis=0, return_index=True)[1]
    shuffle = np.array(random.sample(rows.tolist(), len(rows)), dtype=np.int64)  # type: ignore[attr-defined]
    back = np.argsort(shuffle)
    new = place_new(latent[np.sort(rows)], before[np.sort(rows)], all_books, old)
    shuffled = place_new(latent[shuffle], before[shuffle], all_books, old[::-1])
    assert (shuffled[back] == new).all()


def test_a_full_prefix_sends_those_that_lose_least_to_the_nearest_sibling() -> None:
    books: Books = [np.array([[0.0], [100.0]]), np.array([[0.0], [1.0], [5.0]]), np.array([[0.0], [0.1]])]
    latent = np.array([[0.01], [0.05], [0.3]])
    taken = np.array([[0, 0, 1], [1, 1, 0]])
    new = place_new(latent, np.zeros((3, 3), dtype=np.int64), books, taken)
    assert new.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]
    # The nearest sibling is full too: one goes on to the next.
    crowded = np.array([[0, 0, 1], [0, 1, 0]])
    assert sorted(place_new(latent, np.zeros((3, 3), dtype=np.int64), books, crowded)[:, 1].tolist()) == [0, 1, 2]
    # No sibling has room: the first code changes.
    full = np.array([[0, b, c] for b in range(3) for c in range(2)])
    assert (place_new(latent, np.zeros((3, 3), dtype=np.int64), books, full)[:, 0] == 1).all()


def test_a_full_prefix_takes_the_extra_level_first() -> None:
    books: Books = [np.array([[0.0], [9.0]]), np.array([[0.0], [1.0]]), np.zeros((2, 1))]
    taken = np.array([[0, 0, 0], [0, 1, 0]])
    latent = np.array([[0.1], [0.9], [0.2]])
    zeros = np.zeros((3, 2), dtype=np.int64)
    assert place_new(latent[:2], zeros[:2], books, taken).tolist() == [[0, 0, 1], [0, 1, 1]]
    three = place_new(latent, zeros, books, taken)
    assert sorted(three[:, 0].tolist()) == [0, 0, 1]
    assert three[1, 0] == 1  # the nearest to the other prefix


def test_moving_out_is_the_best_of_all() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        books = [rng.normal(size=(4, 2)), rng.normal(size=(2, 2)) * 0.1]
        latent = books[0][0] + rng.normal(size=(5, 2)) * 0.3
        taken = np.array([[0, 0], [1, 1], [2, 0]])
        new = place_new(latent, np.zeros((5, 2), dtype=np.int64), books, taken)
        room = [1, 1, 1, 2]
        best = min(
            distortion(latent, np.array(prefix)[:, None], books[:1])
            for prefix in itertools.product(range(4), repeat=5)
            if (np.bincount(prefix, minlength=4) <= room).all()
        )
        assert distortion(latent, new[:, :1], books[:1]) == pytest.approx(best)


def test_filling_a_table_with_new_ones_to_the_last_id() -> None:
    books = books_of((4, 8, 16))
    latent = np.random.default_rng(0).normal(size=(512, 3)) * 0.2
    before = greedy(latent, books)
    taken = np.stack(np.unravel_index(np.random.default_rng(1).permutation(512)[:100], (4, 8, 16)), axis=1)
    new = place_new(latent[100:], before[100:], books, taken)
    assert n_shared(np.concatenate([taken, new])) == 0
    with pytest.raises(UserError, match="with 0 free IDs"):
        place_new(latent[:1], before[:1], books, np.concatenate([taken, new]))


# Bad input


@pytest.mark.parametrize(
    ("n", "sizes", "holds"),
    [(9, (2, 4), False), (8, (2, 4), True), (5, (4,), False), (0, (2,), True), (2**31, (1024, 1024, 1024), False)],
)
def test_the_capacity_is_the_product_of_the_sizes(n: int, sizes: tuple[int, ...], holds: bool) -> None:
    if holds:
        check_capacity(n, sizes)
        return
    with pytest.raises(UserError) as refused:
        check_capacity(n, sizes)
    assert refused.value.given == f"{n} entities for level sizes {list(sizes)}"
    assert f"at most {capacity(sizes)} entities" in refused.value.expected
    assert f"set level_sizes={sizes_that_hold(n, len(sizes))}" in refused.value.action


@pytest.mark.parametrize(("n", "levels"), [(1, 1), (2, 3), (3385, 3), (70_000, 2), (1_000_000, 3), (10**7, 4)])
def test_the_sizes_proposed_hold_with_room_to_spare(n: int, levels: int) -> None:
    sizes = sizes_that_hold(n, levels)
    assert len(sizes) == levels
    assert 16 * n <= np.prod(sizes, dtype=float)
    check_capacity(n, sizes)


def test_more_entities_than_ids_are_refused_with_sizes_that_would_do() -> None:
    with pytest.raises(UserError) as refused:
        resolve_collisions(np.zeros((9, 3)), np.zeros((9, 2), dtype=np.int64), books_of((2, 4)))
    assert f"level_sizes={sizes_that_hold(9, 2)}" in refused.value.action


def test_more_new_ones_than_free_ids_are_refused_with_sizes_that_would_do() -> None:
    taken = np.array([[0, 0], [1, 3]])
    with pytest.raises(UserError) as refused:
        place_new(np.zeros((7, 3)), np.zeros((7, 2), dtype=np.int64), books_of((2, 4)), taken)
    assert "7 new entities for an ID table with 6 free IDs" in refused.value.given
    assert f"level_sizes={sizes_that_hold(9, 2)}" in refused.value.action


BAD = [
    pytest.param(np.full((2, 3), np.nan), np.zeros((2, 2), int), "2 of 2 latents with NaN", id="NaN"),
    pytest.param(np.array([[0, 0, np.inf], [0, 0, 0]]), np.zeros((2, 2), int), "1 of 2 latents with NaN", id="inf"),
    pytest.param(np.zeros((2, 3)), np.array([[0, 4], [0, 0]]), "codes outside their codebooks", id="too large"),
    pytest.param(np.zeros((2, 3)), np.array([[0, -1], [0, 0]]), "codes outside their codebooks", id="negative"),
    pytest.param(np.zeros((2, 3)), np.zeros((3, 2), int), "for 2 latents and 2 codebooks", id="another length"),
]


@pytest.mark.parametrize(("latent", "codes", "message"), BAD)
def test_what_cannot_be_made_unique_is_told(latent: Latent, codes: Codes, message: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve_collisions(latent, codes, books_of((2, 4)))
    assert message in refused.value.given
    with pytest.raises(UserError) as refused:
        place_new(latent, codes, books_of((2, 4)), np.array([[1, 1]]))
    assert message in refused.value.given


@pytest.mark.parametrize(("levels", "taken_levels"), [(1, 3), (3, 3), (2, 3), (4, 2)])
def test_levels_that_do_not_belong_together_are_told(levels: int, taken_levels: int) -> None:
    taken = np.zeros((1, taken_levels), dtype=np.int64)
    with pytest.raises(UserError, match="taken IDs with one level a codebook"):
        place_new(np.zeros((2, 3)), np.zeros((2, levels), dtype=np.int64), books_of((2, 4)), taken)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_repeats_are_counted(rows: list[tuple[int, int]]) -> None:
    assert n_shared(np.array(rows, dtype=np.int64).reshape(-1, 2)) == len(rows) - len(set(rows))
