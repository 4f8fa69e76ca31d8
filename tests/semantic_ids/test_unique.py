"""Collisions are settled optimally within the prefix, and only where there must be."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from data.errors import UserError
from semantic_ids.unique import check_capacity, resolve_collisions, sizes_that_hold

Codes = NDArray[np.int64]
Books = list[NDArray[np.float64]]


def books_of(sizes: tuple[int, ...], seed: int = 0, dim: int = 3) -> Books:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(size, dim)) * 0.5**level for level, size in enumerate(sizes)]


def greedy(latent: NDArray[np.float64], books: Books) -> Codes:
    residual, codes = latent.copy(), []
    for book in books:
        nearest = ((residual[:, None] - book[None]) ** 2).sum(-1).argmin(1)
        codes.append(nearest)
        residual = residual - book[nearest]
    return np.stack(codes, axis=1)


def distortion(latent: NDArray[np.float64], codes: Codes, books: Books) -> float:
    total = sum(book[codes[:, level]] for level, book in enumerate(books))
    return float(((latent - total) ** 2).sum())


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.sampled_from([(4,), (2, 3), (3, 4), (2, 2, 2), (3, 2, 4)]),
    fill=st.floats(0.05, 1.0),
    spread=st.sampled_from([0.0, 0.01, 1.0]),
    seed=st.integers(0, 50),
)
def test_codes_are_unique_and_inside_their_levels(
    sizes: tuple[int, ...], fill: float, spread: float, seed: int
) -> None:
    books = books_of(sizes, seed)
    n = max(1, int(fill * np.prod(sizes)))
    latent = np.random.default_rng(seed).normal(size=(n, 3)) * spread
    codes = resolve_collisions(latent, greedy(latent, books), books)
    assert codes.shape == (n, len(sizes))
    assert len(np.unique(codes, axis=0)) == n
    assert (codes >= 0).all()
    assert (codes < np.array(sizes)).all()


def test_what_does_not_collide_stays() -> None:
    books = books_of((8, 8, 8))
    latent = np.random.default_rng(1).normal(size=(60, 3))
    before = greedy(latent, books)
    after = resolve_collisions(latent, before, books)
    _, group, count = np.unique(before[:, :-1], axis=0, return_inverse=True, return_counts=True)
    _, ids, copies = np.unique(before, axis=0, return_inverse=True, return_counts=True)
    collides = np.zeros(len(count), bool)
    collides[group.reshape(-1)[copies[ids.reshape(-1)] > 1]] = True
    untouched = ~collides[group.reshape(-1)]
    assert untouched.any()
    assert (after[untouched] == before[untouched]).all()


def test_a_collision_keeps_its_prefix_while_that_has_room() -> None:
    books = books_of((4, 4, 8))
    latent = np.repeat(np.random.default_rng(0).normal(size=(3, 3)), 5, axis=0)
    before = greedy(latent, books)
    after = resolve_collisions(latent, before, books)
    assert (after[:, :-1] == before[:, :-1]).all()


def test_the_assignment_is_the_best_of_all() -> None:
    books = books_of((1, 5))
    latent = np.random.default_rng(3).normal(size=(4, 3)) * 0.1
    after = resolve_collisions(latent, np.zeros((4, 2), dtype=np.int64), books)
    best = min(
        distortion(latent, np.array([[0, code] for code in codes]), books)
        for codes in itertools.permutations(range(5), 4)
    )
    assert distortion(latent, after, books) == pytest.approx(best)


def test_a_full_prefix_spills_to_the_nearest_one_under_the_same_parent() -> None:
    books: Books = [np.array([[0.0], [100.0]]), np.array([[0.0], [1.0], [5.0]]), np.array([[0.0], [0.1]])]
    latent = np.array([[0.0], [0.01], [0.05], [0.3]])
    after = resolve_collisions(latent, np.zeros((4, 3), dtype=np.int64), books)
    assert (after[:, 0] == 0).all()
    assert sorted(after[:, 1].tolist()) == [0, 0, 1, 1]
    assert after[3, 1] == after[2, 1] == 1  # those nearest to the other prefix lose least


def test_the_order_of_advertisers_does_not_matter() -> None:
    books = books_of((3, 3, 4))
    latent = np.random.default_rng(5).normal(size=(30, 3)) * 0.3
    before = greedy(latent, books)
    shuffle = np.random.default_rng(6).permutation(30)
    after = resolve_collisions(latent, before, books)
    assert (resolve_collisions(latent[shuffle], before[shuffle], books) == after[shuffle]).all()


def test_the_code_space_can_be_filled_to_the_last_id() -> None:
    books = books_of((2, 3, 4))
    latent = np.zeros((24, 3))
    codes = resolve_collisions(latent, greedy(latent, books), books)
    assert len(np.unique(codes, axis=0)) == 24


def test_thousands_of_equal_embeddings_take_seconds_and_stay_together() -> None:
    books = books_of((32, 32, 32))
    latent = np.concatenate([np.zeros((3000, 3)), np.random.default_rng(0).normal(size=(300, 3))])
    before = greedy(latent, books)
    start = time.perf_counter()
    codes = resolve_collisions(latent, before, books)
    assert time.perf_counter() - start < 30
    assert len(np.unique(codes, axis=0)) == len(codes)
    # 3,000 fill three first codes of 32 · 32 IDs each; more are touched only by neighbours they displace.
    assert len(np.unique(codes[:3000, 0])) <= 4


def test_no_advertiser_at_all_is_no_error() -> None:
    assert resolve_collisions(np.zeros((0, 3)), np.zeros((0, 2), dtype=np.int64), books_of((2, 2))).shape == (0, 2)


@pytest.mark.parametrize(("n", "levels"), [(1, 1), (2, 3), (3385, 3), (70_000, 2), (1_000_000, 3), (10**7, 4)])
def test_the_sizes_proposed_hold_with_room_to_spare(n: int, levels: int) -> None:
    sizes = sizes_that_hold(n, levels)
    assert len(sizes) == levels
    assert 16 * n <= np.prod(sizes, dtype=float)
    check_capacity(n, sizes)


def test_too_many_advertisers_are_refused_with_sizes_that_would_do() -> None:
    with pytest.raises(UserError) as refused:
        resolve_collisions(np.zeros((9, 3)), np.zeros((9, 2), dtype=np.int64), books_of((2, 4)))
    assert "9 advertisers" in str(refused.value)
    assert "level_sizes=[2, 4]" in refused.value.given
    assert f"level_sizes={sizes_that_hold(9, 2)}" in refused.value.action
