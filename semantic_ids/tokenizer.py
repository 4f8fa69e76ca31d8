"""Tokenizers: from an embedding to a latent, to one code a level, and back.

    x_AD ──► latent ──► z_AE ──► quantize with the codebooks ──► codes_AL, ẑ_AE ──► decode ──► x̂_AD

Three of them behind one interface, chosen by ``semantic_ids.tokenizer``: the RQ-VAE (`models.rqvae`), residual
k-means by FAISS on the embeddings as they are, and the words of names (`semantic_ids.names`): codebooks like those of
k-means, but not fitted. All are quantised by `quantize`, greedy from the coarse level to the fine. On disk a tokenizer
is a folder::

    tokenizer.json         format, kind, what the kind needs to know of its shape
    weights.safetensors    all its numbers

Shapes: A entities, B of a block, D features of an embedding, E of a latent, L levels, V codes of a level.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.errors import UserError
from models.rqvae import RQVAE, RQVAEConfig, RQVAEModule
from models.training import EpochSampler, fit
from semantic_ids.config import COLLABORATIVE, NAMES, RQKMeansConfig, SemanticIdsConfig
from semantic_ids.embeddings import Embeddings
from semantic_ids.names import word_codebooks

FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS = "tokenizer.json", "weights.safetensors"
_BLOCK = 1 << 16
_AGAIN = "make the IDs again: adsid run run.until=semantic_ids"

Floats = NDArray[np.float32]


class Tokenizer(Protocol):
    """What makes codes of embeddings.

    Attributes:
        codebooks: vectors of each level, ``(V_l, E)``, coarse to fine.
    """

    @property
    def codebooks(self) -> list[Floats]:
        """Vectors of each level, ``(V_l, E)``, coarse to fine."""
        ...

    def latent(self, x_AD: Floats) -> Floats:
        """What is quantised, ``(A, E)``."""
        ...

    def decode(self, quantized_AE: Floats) -> Floats:
        """The embedding of a quantised latent, ``(A, D)``."""
        ...

    def save(self, directory: Path) -> None:
        """Write all it takes to encode further embeddings; the folder is made."""
        ...


@dataclass(frozen=True)
class RQVAETokenizer:
    """A trained RQ-VAE.

    Args:
        model: in evaluation mode, on the CPU.
    """

    model: RQVAE

    @property
    def codebooks(self) -> list[Floats]:
        """Copies of the codebooks."""
        return [book.weight.detach().numpy().copy() for book in self.model.books]

    @torch.no_grad()
    def latent(self, x_AD: Floats) -> Floats:
        """The encoder's output."""
        _check_width(x_AD, self.model.mean_D.shape[0], "embeddings")
        latent_AE = np.empty((len(x_AD), self.model.project.out_features), dtype=np.float32)
        for part in _blocks(len(x_AD)):
            latent_AE[part] = self.model.latent(_tensor(x_AD[part])).numpy()
        return latent_AE

    @torch.no_grad()
    def decode(self, quantized_AE: Floats) -> Floats:
        """The decoder's output."""
        x_AD = np.empty((len(quantized_AE), self.model.mean_D.shape[0]), dtype=np.float32)
        for part in _blocks(len(quantized_AE)):
            x_AD[part] = self.model.decode(_tensor(quantized_AE[part])).numpy()
        return x_AD

    def save(self, directory: Path) -> None:
        """Write the folder."""
        state = {name: np.ascontiguousarray(value.detach().numpy()) for name, value in self.model.state_dict().items()}
        _write(directory, "rqvae", {"source_dims": self.model.source_dims, "config": asdict(self.model.cfg)}, state)

    @classmethod
    def read(cls, facts: dict[str, Any], weights: dict[str, NDArray[Any]]) -> RQVAETokenizer:
        """From what `save` wrote."""
        model = RQVAE(sum(facts["source_dims"]), RQVAEConfig(**facts["config"]), facts["source_dims"])
        model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in weights.items()})
        return cls(model.eval())


@dataclass(frozen=True)
class RQKMeansTokenizer:
    """Codebooks of residual k-means, or of words: the latent is the embedding about the mean.

    Args:
        mean_D: mean of the embeddings; zero for words.
        books: vectors of each level.
    """

    mean_D: Floats
    books: tuple[Floats, ...]

    @property
    def codebooks(self) -> list[Floats]:
        """Copies of the codebooks."""
        return [book.copy() for book in self.books]

    def latent(self, x_AD: Floats) -> Floats:
        """The embedding about the mean."""
        _check_width(x_AD, len(self.mean_D), "embeddings")
        return np.asarray(x_AD, dtype=np.float32) - self.mean_D

    def decode(self, quantized_AE: Floats) -> Floats:
        """The mean and the vectors' sum."""
        return np.asarray(quantized_AE, dtype=np.float32) + self.mean_D

    def save(self, directory: Path) -> None:
        """Write the folder."""
        weights = {f"level_{level}": book for level, book in enumerate(self.books, 1)} | {"mean_D": self.mean_D}
        _write(directory, "rqkmeans", {"levels": len(self.books)}, weights)

    @classmethod
    def read(cls, facts: dict[str, Any], weights: dict[str, NDArray[Any]]) -> RQKMeansTokenizer:
        """From what `save` wrote."""
        return cls(weights["mean_D"], tuple(weights[f"level_{level + 1}"] for level in range(facts["levels"])))


def load_tokenizer(directory: Path) -> Tokenizer:
    """Read a tokenizer's folder.

    Raises:
        UserError: files are missing or damaged, or of another format.
    """
    kinds: dict[str, type[RQVAETokenizer] | type[RQKMeansTokenizer]] = {
        "rqvae": RQVAETokenizer,
        "rqkmeans": RQKMeansTokenizer,
    }
    try:
        facts = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        if facts["format"] != FORMAT_VERSION or facts["kind"] not in kinds:
            raise UserError(
                f"a tokenizer {facts['kind']} of format {facts['format']} in {directory}",
                expected=f"{' or '.join(kinds)} of format {FORMAT_VERSION}",
                action=_AGAIN,
            )
        tokenizer = kinds[facts["kind"]].read(facts, load_file(directory / WEIGHTS))
    except UserError:
        raise
    except Exception as error:  # each of the two readers has errors of its own
        raise UserError(
            f"the tokenizer in {directory} ({error})",
            expected=f"{DESCRIPTION} and {WEIGHTS} as they were written",
            action=_AGAIN,
        ) from error
    return tokenizer


def fit_tokenizer(
    embeddings: Embeddings, cfg: SemanticIdsConfig, *, work_dir: Path, start: Tokenizer | None = None
) -> Tokenizer:
    """Train the tokenizer that the config names, or take its codebooks from the words of names.

    Args:
        embeddings: all entities.
        cfg: tokenizer, its settings, training and seed.
        work_dir: checkpoints of the training, which goes on where an earlier attempt stopped.
        start: begin from this one instead of from scratch.

    Returns:
        The tokenizer.

    Raises:
        UserError: there are no embeddings, or ``start`` is of another kind or shape.
        ValueError: a start for names, which are not trained.
    """
    if not len(embeddings.vectors_AD):
        raise UserError(
            "no entities to make semantic IDs for",
            expected="at least one",
            action="check the tables advertisers and ads of the data",
        )
    if cfg.tokenizer == NAMES:
        if start is not None:
            raise ValueError("names are not trained, so there is no start")
        return RQKMeansTokenizer(np.zeros(embeddings.vectors_AD.shape[1], np.float32), (*word_codebooks(embeddings),))
    if start is not None:
        _check_start(start, embeddings, cfg)
    if cfg.tokenizer == "rqkmeans":
        return _fit_rqkmeans(embeddings.vectors_AD, cfg.rqkmeans, cfg.seed, cast("RQKMeansTokenizer | None", start))
    return _fit_rqvae(embeddings, cfg, work_dir, cast("RQVAETokenizer | None", start))


def _fit_rqvae(
    embeddings: Embeddings, cfg: SemanticIdsConfig, work_dir: Path, start: RQVAETokenizer | None
) -> RQVAETokenizer:
    x_AD = torch.from_numpy(np.ascontiguousarray(embeddings.vectors_AD))
    names, dims = embeddings.source_names, list(embeddings.source_dims)
    collaborative = names.index(COLLABORATIVE) if COLLABORATIVE in names else None
    if start is None:
        module = RQVAEModule.of(x_AD, dims, cfg.rqvae, seed=cfg.seed, collaborative=collaborative)
    else:
        module = RQVAEModule(x_AD.shape[1], dims, asdict(cfg.rqvae), len(x_AD), collaborative)
        module.model.load_state_dict(start.model.state_dict())
    loader: DataLoader[Tensor] = DataLoader(
        _Rows(x_AD),
        batch_size=cfg.rqvae.batch_size,
        sampler=EpochSampler(len(x_AD), seed=cfg.seed, per_epoch=min(len(x_AD), cfg.rqvae.samples_per_epoch)),
        collate_fn=_as_is,
    )
    fit(module, loader, None, cfg.trainer, work_dir=work_dir, seed=cfg.seed)
    model = module.model.cpu().eval()
    model.settle(x_AD)
    return RQVAETokenizer(model)


_FAISS_SEEDS = 1 << 31
"""So many seeds faiss takes."""


def _fit_rqkmeans(x_AD: Floats, cfg: RQKMeansConfig, seed: int, start: RQKMeansTokenizer | None) -> RQKMeansTokenizer:
    import faiss

    mean_D = x_AD.mean(0) if start is None else start.mean_D
    residual_AD = np.asarray(x_AD, dtype=np.float32) - mean_D
    books = []
    for level, size in enumerate(cfg.level_sizes):
        kmeans = faiss.Kmeans(
            residual_AD.shape[1], min(size, len(residual_AD)), niter=cfg.iterations, nredo=cfg.restarts,
            seed=(seed + 1 + level) % _FAISS_SEEDS, max_points_per_centroid=cfg.samples_per_code,
            min_points_per_centroid=1,
        )  # fmt: skip
        kmeans.train(residual_AD, init_centroids=None if start is None else start.books[level])
        book = np.zeros((size, residual_AD.shape[1]), dtype=np.float32)
        book[: len(kmeans.centroids)] = kmeans.centroids
        book[len(kmeans.centroids) :] = kmeans.centroids[0]  # fewer entities than codes: these stay without members
        books.append(book)
        for part in _blocks(len(residual_AD)):
            residual_AD[part] -= book[_nearest(residual_AD[part], book)]
    return RQKMeansTokenizer(mean_D, tuple(books))


def _check_start(start: Tokenizer, embeddings: Embeddings, cfg: SemanticIdsConfig) -> None:
    kind = "rqvae" if isinstance(start, RQVAETokenizer) else "rqkmeans"
    sizes = [len(book) for book in start.codebooks]
    width = len(start.model.mean_D if isinstance(start, RQVAETokenizer) else cast(RQKMeansTokenizer, start).mean_D)
    given: list[Any] = [kind, sizes, width]
    wanted: list[Any] = [cfg.tokenizer, cfg.level_sizes, embeddings.vectors_AD.shape[1]]
    if isinstance(start, RQVAETokenizer):
        shape = ("latent", "hidden", "encoder", "codebook", "distance")
        given += [start.model.source_dims, *(getattr(start.model.cfg, name) for name in shape)]
        wanted += [list(embeddings.source_dims), *(getattr(cfg.rqvae, name) for name in shape)]
    if given != wanted:
        raise UserError(
            f"a tokenizer to start from of kind, level sizes, features and shape {given}",
            expected=f"{wanted}, as the configuration and the embeddings of today have them",
            action="use the configuration the tokenizer was trained with, or train from scratch",
        )


def quantize(
    latent_AE: NDArray[np.floating], codebooks: Sequence[NDArray[np.floating]]
) -> tuple[NDArray[np.int64], Floats]:
    """Greedy residual quantisation: the nearest vector of each level to what the levels before left over.

    Args:
        latent_AE: latents, any number.
        codebooks: vectors of each level, ``(V_l, E)``.

    Returns:
        Codes ``(A, L)``, of equally near vectors the first, and the sums of their vectors ``(A, E)``.
    """
    books = [np.ascontiguousarray(book, dtype=np.float32) for book in codebooks]
    codes_AL = np.empty((len(latent_AE), len(books)), dtype=np.int64)
    quantized_AE = np.empty((len(latent_AE), books[0].shape[1]), dtype=np.float32)
    for part in _blocks(len(latent_AE)):
        latent_BE = np.asarray(latent_AE[part], dtype=np.float32)
        residual_BE = latent_BE.copy()
        for level, book in enumerate(books):
            codes_AL[part, level] = _nearest(residual_BE, book)
            residual_BE -= book[codes_AL[part, level]]
        quantized_AE[part] = sum(book[codes_AL[part, level]] for level, book in enumerate(books))
    return codes_AL, quantized_AE


def _nearest(residual_BE: Floats, book: Floats) -> NDArray[np.int64]:
    distance_BV = residual_BE @ (-2 * book.T)
    distance_BV += (book**2).sum(1)
    return distance_BV.argmin(1)


def _blocks(n: int) -> Iterator[slice]:
    for start in range(0, n, _BLOCK):
        yield slice(start, min(start + _BLOCK, n))


def _check_width(x_AD: Floats, width: int, what: str) -> None:
    if x_AD.ndim != 2 or x_AD.shape[1] != width:
        raise UserError(
            f"{what} of shape {x_AD.shape}",
            expected=f"{width} features, as the tokenizer was trained on",
            action="make them from the same sources and encoder, or train the tokenizer again",
        )


def _tensor(x_AD: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x_AD, dtype=np.float32))


def _write(directory: Path, kind: str, facts: dict[str, Any], weights: dict[str, NDArray[Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, directory / WEIGHTS)
    text = json.dumps({"format": FORMAT_VERSION, "kind": kind, **facts}, indent=1)
    (directory / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


class _Rows(Dataset[Tensor]):
    """Rows of a matrix, a batch at a time."""

    def __init__(self, x_AD: Tensor) -> None:
        self.x_AD = x_AD

    def __len__(self) -> int:
        return len(self.x_AD)

    def __getitem__(self, row: int) -> Tensor:
        return self.x_AD[row]

    def __getitems__(self, rows: list[int]) -> Tensor:  # the loader's own hook for whole batches
        return self.x_AD[rows]


def _as_is(batch: Any) -> Any:
    return batch
