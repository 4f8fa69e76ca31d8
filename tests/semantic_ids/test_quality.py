"""The quality figures against cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from semantic_ids.quality import gini, neighbour_share, quality, quality_rows

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


def test_random_codes_preserve_no_neighbours() -> None:
    embeddings, _, random = two_tokenizers()
    report = quality(embeddings, random, random, embeddings, SIZES)
    assert report["neighbour_preservation"][0] == pytest.approx(0, abs=0.1)


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
