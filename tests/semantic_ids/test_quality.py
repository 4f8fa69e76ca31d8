"""The quality figures against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_ids import quality as module
from semantic_ids.quality import (
    chance_share,
    explained_variance,
    gini,
    groups,
    identical_share,
    neighbour_share,
    prefix_use,
    quality,
    quality_rows,
    reconstruction_error,
    taken_by_random,
)

SIZES = (4, 4, 8)


def two_tokenizers() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Embeddings in four far clusters, codes that follow them, and codes that know nothing."""
    rng = np.random.default_rng(0)
    cluster = np.arange(120) % 4
    embeddings = np.eye(4)[cluster] * 10 + rng.normal(size=(120, 4)) * 0.1
    number = np.arange(120) // 4
    good = np.stack([cluster, number // 8, number % 8], axis=1)
    return embeddings, good, rng.permutation(good)


def test_a_perfect_tokenizer() -> None:
    embeddings, good, _ = two_tokenizers()
    report = quality(embeddings, good, good, embeddings, SIZES)
    assert report["collision_rate"] == report["moved_share"] == report["reconstruction_error"] == 0
    assert report["largest_collision"] == 1
    assert report["dead_codes"] == [0, 0, 0]
    assert report["perplexity"][0] == pytest.approx(4)
    assert report["entropy_ratio"][0] == pytest.approx(1)
    assert report["gini"][0] == pytest.approx(0)
    assert report["neighbour_share"][0] == pytest.approx(1)
    assert report["neighbour_preservation"][0] == pytest.approx(1)
    assert len(report["neighbour_share"]) == 2
    assert report["prefixes"] == [4, 16, 120]
    assert report["prefix_coverage"] == [1, 1, 1]
    assert report["prefix_explained"][0] > 0.99
    assert report["extra_share"] == 0


def test_random_codes_preserve_no_neighbours() -> None:
    embeddings, _, random = two_tokenizers()
    report = quality(embeddings, random, random, embeddings, SIZES)
    assert report["neighbour_preservation"][0] == pytest.approx(0, abs=0.1)
    assert report["prefix_explained"] == pytest.approx([0, 0], abs=0.1)


def test_a_collapsed_tokenizer_improves_no_figure() -> None:
    embeddings, good, _ = two_tokenizers()
    collapsed = good.copy()
    collapsed[:, 0] = 0
    greedy = np.zeros_like(good)
    reconstruction = np.broadcast_to(embeddings.mean(0), embeddings.shape)
    report = quality(embeddings, collapsed, greedy, reconstruction, SIZES)
    assert report["collision_rate"] == 1
    assert report["largest_collision"] == 120
    assert report["dead_codes"] == [3, 3, 7]
    assert report["perplexity"] == pytest.approx([1, 1, 1])
    assert report["entropy_ratio"] == pytest.approx([0, 0, 0])
    assert report["reconstruction_error"] == pytest.approx(1)
    assert report["neighbour_share"][0] == 1
    assert report["neighbour_preservation"][0] == 0
    assert report["prefix_explained"][0] == 0
    assert report["prefixes"] == [1, 1, 1]
    assert report["prefix_coverage"] == pytest.approx([1 / 4, 1 / 16, 1 / 120])
    assert report["moved_share"] > 0.9


def test_a_level_more_counts_as_moved() -> None:
    embeddings, good, _ = two_tokenizers()
    greedy = good.copy()
    greedy[:, 2] = 0
    codes = np.column_stack([greedy, good[:, 2]])
    for sizes in (SIZES, (*SIZES, 8)):
        report = quality(embeddings, codes, greedy, embeddings, sizes)
        assert report["moved_share"] == report["extra_share"] == pytest.approx((good[:, 2] != 0).mean())
        assert len(report["dead_codes"]) == len(report["prefixes"]) == 3
        assert len(report["neighbour_share"]) == 3


def test_use_is_measured_before_collisions_are_resolved() -> None:
    embeddings, good, _ = two_tokenizers()
    greedy = good.copy()
    greedy[:, 2] = 0
    report = quality(embeddings, good, greedy, embeddings, SIZES)
    assert report["dead_codes"] == [0, 0, 7]
    assert report["collision_rate"] == 1
    assert report["moved_share"] == pytest.approx((good[:, 2] != 0).mean())


@pytest.mark.parametrize(
    ("counts", "expected"), [([1, 1, 1, 1], 0.0), ([0, 0, 0, 4], 0.75), ([0, 0], 0.0), ([1, 3], 0.25)]
)
def test_gini(counts: list[int], expected: float) -> None:
    assert gini(np.array(counts)) == pytest.approx(expected)


def test_neighbour_share_equals_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    embeddings, codes = rng.normal(size=(40, 3)), rng.integers(0, 3, size=(40, 2))
    shares = np.zeros(2)
    for row in range(40):
        distance = ((embeddings - embeddings[row]) ** 2).sum(1)
        distance[row] = np.inf
        for other in np.argsort(distance)[:10]:
            same = codes[row] == codes[other]
            shares += [same[0], same.all()]
    assert neighbour_share(embeddings, codes) == pytest.approx((shares / 400).tolist())


def test_neighbours_of_a_sample_are_looked_up_among_all(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, good, _ = two_tokenizers()
    monkeypatch.setattr(module, "MOST_QUERIES", 30)
    _, nearest, query = module.neighbours(embeddings, seed=1)
    assert len(np.unique(query)) == len(nearest) == 30
    distance = ((embeddings[query, None] - embeddings[None]) ** 2).sum(-1)
    distance[np.arange(30), query] = np.inf
    assert np.array_equal(np.sort(nearest), np.sort(np.argsort(distance)[:, :10]))
    assert neighbour_share(embeddings, good)[0] == 1


def test_equal_embeddings_are_neighbours_and_nobody_is_ones_own() -> None:
    known, nearest, query = module.neighbours(np.ones((50, 3)))
    assert len(known) == 50
    assert not (nearest == query[:, None]).any()


def test_who_has_no_embedding_has_no_neighbours_and_is_nobodys() -> None:
    embeddings, good, _ = two_tokenizers()
    embeddings[::3] = 0
    known, nearest, query = module.neighbours(embeddings)
    assert np.array_equal(known, np.flatnonzero(np.arange(120) % 3))
    assert len(query) == 80
    assert nearest.max() < 80
    codes = good.copy()
    codes[::3] = 3
    assert neighbour_share(embeddings, codes) == neighbour_share(embeddings, good)
    assert np.isnan(neighbour_share(np.zeros((9, 3)), good[:9])).all()


def test_chance_equals_a_plain_loop() -> None:
    codes = np.random.default_rng(0).integers(0, 3, size=(30, 2))
    same = [codes[a] == codes[b] for a in range(30) for b in range(30) if a != b]
    assert chance_share(codes) == pytest.approx([np.mean([s[0] for s in same]), np.mean([s.all() for s in same])])


def test_explained_variance_equals_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors, group = rng.normal(size=(90, 5)) + 7, rng.integers(0, 6, 90)
    vectors += group[:, None]
    within = sum(((vectors[group == g] - vectors[group == g].mean(0)) ** 2).sum() for g in range(6))
    total = ((vectors - vectors.mean(0)) ** 2).sum()
    expected = 1 - (within / 84) / (total / 89)
    assert explained_variance(vectors, group) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(module, "_BLOCK", 20)  # some groups fill more than a block, some share one
    assert explained_variance(vectors, group) == pytest.approx(expected, rel=1e-5)
    assert explained_variance(vectors, np.zeros(90, dtype=int)) == 0
    assert np.isnan(explained_variance(vectors, np.arange(90)))
    assert np.isnan(explained_variance(np.ones((90, 5)), group))


def test_groups_number_the_prefixes_of_each_length() -> None:
    codes = np.array([[1, 5], [0, 2], [1, 0], [0, 2], [1, 5]])
    assert [group.tolist() for group in groups(codes)] == [[1, 0, 1, 0, 1], [2, 0, 1, 0, 2]]


def test_prefixes_of_each_length() -> None:
    use = prefix_use(np.array([[0, 0], [0, 1], [0, 1], [2, 0]]), (3, 4))
    assert [(one.possible, one.used, one.largest, one.median) for one in use] == [(3, 2, 3, 2.0), (12, 3, 2, 1.0)]
    assert [one.of_possible for one in use] == pytest.approx([2 / 3, 3 / 12])
    assert [one.per_advertiser for one in use] == pytest.approx([2 / 4, 3 / 4])
    assert [one.coverage for one in use] == pytest.approx([2 / 3, 3 / 4])


@pytest.mark.parametrize(("n", "possible", "expected"), [(0, 5, 0.0), (3, 1, 1.0), (1, 4, 0.25), (2, 4, 7 / 16)])
def test_what_random_codes_take(n: int, possible: int, expected: float) -> None:
    assert taken_by_random(n, possible) == pytest.approx(expected)


def test_identical_embeddings_are_counted() -> None:
    vectors = np.random.default_rng(0).normal(size=(10, 4))
    assert identical_share(vectors) == 0
    vectors[3] = vectors[7]
    vectors[4, 0], vectors[5] = -0.0, vectors[4]
    vectors[5, 0] = 0.0
    assert identical_share(vectors) == pytest.approx(0.4)


def test_reconstruction_is_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors, made = rng.normal(size=(50, 4)), rng.normal(size=(50, 4))
    expected = ((vectors - made) ** 2).sum() / ((vectors - vectors.mean(0)) ** 2).sum()
    monkeypatch.setattr(module, "_BLOCK", 7)
    assert reconstruction_error(vectors, made) == pytest.approx(expected)
    assert reconstruction_error(vectors, made.astype(np.float16)) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("n", [1, 2])
def test_tiny_catalogues_have_a_report(n: int) -> None:
    report = quality(np.eye(2)[:n], np.eye(2, dtype=int)[:n], np.eye(2, dtype=int)[:n], np.eye(2)[:n], (2, 2))
    assert report["advertisers"] == n


def test_rows_are_tidy() -> None:
    embeddings, good, _ = two_tokenizers()
    rows = quality_rows(quality(embeddings, good, good, embeddings, SIZES))
    keys = [(row.metric, row.arm, row.k) for row in rows]
    assert len(set(keys)) == len(keys)
    assert {row.section for row in rows} == {"semantic_ids"}
    by_key = dict(zip(keys, rows, strict=True))
    assert by_key["entropy_ratio", "ids", 1].value == pytest.approx(1)
    assert by_key["neighbour_share", "random", 1].value < by_key["neighbour_share", "ids", 1].value
