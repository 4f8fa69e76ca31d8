"""The trie against its codes: paths there and back, ranges of leaves, mass below every prefix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semantic_ids.trie import Trie


@st.composite
def unique_codes(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, ...]]:
    sizes = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    capacity = int(np.prod(sizes))
    numbers = draw(st.lists(st.integers(0, capacity - 1), min_size=1, max_size=40, unique=True))
    return np.stack(np.unravel_index(numbers, sizes), axis=1), sizes


@given(unique_codes())
@settings(max_examples=100, deadline=None)
def test_every_path_leads_to_its_advertiser_and_back(case: tuple[np.ndarray, tuple[int, ...]]) -> None:
    codes, sizes = case
    trie = Trie.from_codes(codes, sizes)
    for advertiser, code in enumerate(codes):
        node = 0
        for depth in range(len(sizes)):
            children = np.arange(trie.child_ptr[depth][node], trie.child_ptr[depth][node + 1])
            (child,) = children[trie.child_code[depth][children] == code[depth]]
            assert trie.parent[depth][child] == node
            assert trie.path_AL[advertiser, depth] == child
            leaves = trie.leaf_advertiser[trie.leaf_ptr[depth + 1][child] : trie.leaf_ptr[depth + 1][child + 1]]
            assert set(leaves) == set(np.flatnonzero((codes[:, : depth + 1] == code[: depth + 1]).all(1)))
            node = int(child)
        assert trie.leaf_advertiser[node] == advertiser
        assert trie.advertiser_leaf[advertiser] == node


@given(unique_codes(), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_mass_is_kept_at_every_depth(case: tuple[np.ndarray, tuple[int, ...]], seed: int) -> None:
    codes, sizes = case
    trie = Trie.from_codes(codes, sizes)
    mass = np.random.default_rng(seed).random((3, len(codes)))
    for depth in range(len(sizes) + 1):
        below = trie.node_mass(mass, depth)
        assert below.shape == (3, trie.n_nodes(depth))
        np.testing.assert_allclose(below.sum(1), mass.sum(1))
    first = trie.node_mass(mass, 1)
    for node, code in enumerate(trie.child_code[0]):
        np.testing.assert_allclose(first[:, node], mass[:, codes[:, 0] == code].sum(1))


@given(unique_codes(), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_mass_below_every_prefix_is_that_of_its_advertisers(
    case: tuple[np.ndarray, tuple[int, ...]], seed: int
) -> None:
    codes, sizes = case
    trie = Trie.from_codes(codes, sizes)
    mass = np.random.default_rng(seed).random((2, len(codes)))
    for depth in range(len(sizes) + 1):
        prefixes, row = np.unique(codes[:, :depth], axis=0, return_inverse=True)
        below = np.stack([mass[:, row.reshape(-1) == node].sum(1) for node in range(len(prefixes))], axis=1)
        np.testing.assert_allclose(trie.node_mass(mass, depth), below)


@given(unique_codes())
@settings(max_examples=50, deadline=None)
def test_the_codes_can_be_read_back(case: tuple[np.ndarray, tuple[int, ...]]) -> None:
    codes, sizes = case
    trie = Trie.from_codes(codes.astype(np.int32), sizes)
    read = [trie.child_code[level][trie.path_AL[:, level]] for level in range(len(sizes))]
    assert (np.stack(read, axis=1) == codes).all()
    assert (trie.leaf_advertiser[trie.advertiser_leaf] == np.arange(len(codes))).all()


def test_what_torch_gathers_by_has_64_bits_and_all_else_32() -> None:
    trie = Trie.from_codes(np.array([[0, 1], [1, 0]]), (2, 2))
    assert trie.leaf_advertiser.dtype == np.int64
    assert {array.dtype for array in trie.child_code} == {np.dtype(np.int64)}
    assert {array.dtype for array in (*trie.child_ptr, *trie.parent, *trie.leaf_ptr)} == {np.dtype(np.int32)}
    assert trie.path_AL.dtype == trie.advertiser_leaf.dtype == np.int32


@pytest.mark.parametrize("sizes", [(64, 64, 64), (256, 256, 256, 4)])
def test_the_memory_of_an_advertiser_is_bounded(sizes: tuple[int, ...]) -> None:
    n, n_levels = 20_000, len(sizes)
    numbers = np.random.default_rng(0).choice(int(np.prod(sizes)), n, replace=False)
    trie = Trie.from_codes(np.stack(np.unravel_index(numbers, sizes), axis=1), sizes)
    # At most a node a level and advertiser: two pointers, code and parent; and its path, and its leaf.
    assert trie.nbytes <= n * (n_levels * (4 + 4 + 8 + 4 + 4) + 8) + 64 * n_levels


BAD = [
    (np.zeros((0, 2), int), (3, 3), "advertisers >= 1"),
    (np.zeros((2, 3), int), (3, 3), "2 levels"),
    (np.array([[0, 3]]), (3, 3), "outside its level"),
    (np.array([[0, -1]]), (3, 3), "outside its level"),
    (np.array([[0, 1], [2, 2], [0, 1]]), (3, 3), "shares its ID"),
]


@pytest.mark.parametrize(("codes", "sizes", "message"), BAD)
def test_bad_codes_are_told(codes: np.ndarray, sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trie.from_codes(codes, sizes)
