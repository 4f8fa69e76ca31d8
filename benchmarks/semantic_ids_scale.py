"""A million advertisers: time and memory of training, quantising, making unique, the trie, and further ones.

    python -m benchmarks.semantic_ids_scale                 all
    python -m benchmarks.semantic_ids_scale rqkmeans_256    one of rqkmeans_256, rqkmeans_1024, rqvae_256, rqvae_1024

Embeddings: 384 features of unit length, in 4,000 clusters whose sizes fall off as a power law (the largest has 4 % of
all), each with sub-clusters of heavy-tailed sizes of its own; the variance falls off over the features as in a text
encoder. Tokenizers: `semantic_ids.tokenizer.fit_tokenizer` with its defaults, but for a training that suits a million:
k-means in 20 iterations on 65,536 samples a level, the RQ-VAE in five epochs of 131,072 in batches of 2,048. (The
defaults, 50 iterations and 30 epochs in batches of 512, are for a few thousand advertisers.)
Level sizes: three levels of 256, what `semantic_ids.unique.sizes_that_hold` proposes for a million, and of 1024, which
suits clusters as uneven as these: a fifth of the advertisers needs the extra level with the former, next to none with
the latter. The trie, 100,000 new advertisers and 50,000 equal embeddings are measured on the IDs of each.

Bars, on two cores: trained, quantised and made unique, with the table built and written, in 15 minutes and 8 GiB; the
trie in 10 s and 100 MB (STATIC, arXiv 2602.22647, reports about 90 MB). Every part runs in a process of its own;
making the embeddings is in no figure, reading them is.

Shapes: A advertisers, D features of an embedding, E of a latent, L levels.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import in_own_process, row, serve
from models.rqvae import RQVAEConfig
from models.training import TrainerConfig
from pipeline.quiet import quiet_libraries
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.config import RQKMeansConfig, SemanticIdsConfig
from semantic_ids.embeddings import Embeddings
from semantic_ids.tokenizer import fit_tokenizer, quantize
from semantic_ids.trie import Trie
from semantic_ids.unique import place_new, resolve_collisions

N, DIM, CLUSTERS = 1_000_000, 384, 4000
LEVELS, NEW, EQUAL = 3, N // 10, N // 20
SAMPLES = 65_536

Floats = NDArray[np.float32]
Codes = NDArray[np.int64]


def main() -> None:
    """Run the tokenizers that the command line names."""
    tokenizers: dict[str, Callable[[str], dict[str, Any]]] = {
        f"{kind}_{size}": partial(_tokenize, kind=kind, size=size)
        for kind in ("rqvae", "rqkmeans")
        for size in (256, 1024)
    }
    if serve({**tokenizers, "trie": _trie, "new": _new, "equal": _equal}):
        return
    for name in sys.argv[1:]:
        if name not in tokenizers:
            raise SystemExit(f"no tokenizer {name}, only {', '.join(tokenizers)}")
    with tempfile.TemporaryDirectory() as directory:
        np.save(Path(directory) / "embeddings.npy", clustered(N, seed=0))
        for name in sys.argv[1:] or tokenizers:
            _report(name, directory)


def clustered(n: int, *, seed: int) -> Floats:
    """Embeddings of ``n`` advertisers, float32 ``(A, D)``."""
    rng = np.random.default_rng(seed)
    scale_D = (1 / np.sqrt(np.arange(1, DIM + 1))).astype(np.float32)

    def draw(rows: int) -> Floats:
        return rng.standard_normal((rows, DIM), dtype=np.float32) * scale_D

    share_C = np.arange(1, CLUSTERS + 1) ** -0.8
    size_C, centre_CD, x_AD, start = rng.multinomial(n, share_C / share_C.sum()), draw(CLUSTERS), draw(n), 0
    for size, centre_D in zip(size_C.tolist(), centre_CD, strict=True):
        n_sub = max(1, int(size**0.5))
        sub_A = np.minimum(rng.pareto(1.0, size).astype(np.int64), n_sub - 1)
        x_AD[start : start + size] *= 0.25
        x_AD[start : start + size] += (centre_D + 0.5 * draw(n_sub))[sub_A]
        start += size
    x_AD /= np.linalg.norm(x_AD, axis=1, keepdims=True)
    return x_AD[rng.permutation(n)]


def _report(tokenizer: str, directory: str) -> None:
    name = f"{N // 1_000_000}M {tokenizer}"
    made = _measure(tokenizer, directory)
    row(f"{name}, trained, quantised and unique", made["seconds"], "s")
    row(f"{name}, peak memory", made["peak_gib"], "GiB")
    for part in ("train", "quantise", "unique", "table"):
        row(f"{name}, of which {part}", made[part], "s")
    row(f"{name}, collisions before", made["collisions"], "share")
    row(f"{name}, prefixes with more than last codes", made["overfull"], "prefixes")
    row(f"{name}, codes of the extra level", made["extra_codes"], "codes")
    row(f"{name}, advertisers that the extra level tells apart", made["extra_share"], "share")
    row(f"{name}, collisions after", made["shared"], "advertisers")
    trie = _measure("trie", directory)
    row(f"{name}, trie, time to build", trie["build"], "s")
    row(f"{name}, trie, memory", trie["nbytes"] / 1e6, "MB")
    row(f"{name}, trie, peak memory of its process", trie["peak_gib"], "GiB")
    new = _measure("new", directory)
    row(f"{name}, {NEW // 1000}k new beside {(N - NEW) // 1000}k, time", new["place"], "s")
    row(f"{name}, {NEW // 1000}k new beside {(N - NEW) // 1000}k, peak memory", new["peak_gib"], "GiB")
    row(f"{name}, {NEW // 1000}k new, with their greedy prefix", new["prefix_kept"], "share")
    row(f"{name}, {NEW // 1000}k new, collisions after", new["shared"], "advertisers")
    equal = _measure("equal", directory)
    row(f"{name}, {EQUAL // 1000}k of them equal, made unique", equal["unique"], "s")
    row(f"{name}, {EQUAL // 1000}k of them equal, peak memory", equal["peak_gib"], "GiB")


def _measure(case: str, directory: str) -> dict[str, float]:
    return in_own_process("benchmarks.semantic_ids_scale", case, directory)


def _tokenize(directory: str, *, kind: str, size: int) -> dict[str, Any]:
    """From embeddings to a table on disk; leaves there what the other cases start from."""
    quiet_libraries()
    figures: dict[str, Any] = {}
    sizes = [size] * LEVELS
    cfg = SemanticIdsConfig(
        tokenizer=kind,
        rqvae=RQVAEConfig(level_sizes=sizes, batch_size=2048),
        rqkmeans=RQKMeansConfig(level_sizes=sizes, iterations=20, samples_per_code=SAMPLES // size),
        trainer=TrainerConfig(max_epochs=5, patience=None, progress_bar=False),
    )
    embeddings = Embeddings(_load(directory), ("text",), (DIM,))
    with _timed(figures, "train"), tempfile.TemporaryDirectory() as work_dir:
        tokenizer = fit_tokenizer(embeddings, cfg, work_dir=Path(work_dir))
    with _timed(figures, "quantise"):
        latent_AE, codebooks = tokenizer.latent(embeddings.vectors_AD), tokenizer.codebooks
        greedy_AL, _ = quantize(latent_AE, codebooks)
    with _timed(figures, "unique"):
        codes_AL, all_books = resolve_collisions(latent_AE, greedy_AL, codebooks)
    extra = len(all_books) > len(codebooks)
    with _timed(figures, "table"):
        ids = AdvertiserIds(np.arange(len(codes_AL)), codes_AL, all_books, extra_level=extra)
        ids.save(Path(directory))
        for name, array in (("latent", latent_AE), ("greedy", greedy_AL)):
            np.save(Path(directory) / f"{name}.npy", array)
    members = np.unique(np.ravel_multi_index(tuple(greedy_AL[:, :-1].T), sizes[:-1]), return_counts=True)[1]
    alone = np.unique(np.ravel_multi_index(tuple(greedy_AL.T), sizes), return_counts=True)[1]
    return figures | {
        "collisions": 1 - int((alone == 1).sum()) / len(greedy_AL),
        "overfull": int((members > size).sum()),
        "extra_codes": len(all_books[-1]) if extra else 0,
        "extra_share": float((codes_AL[:, LEVELS:] > 0).any(1).mean()),
        "shared": _n_shared(codes_AL),
    }


def _trie(directory: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    ids = AdvertiserIds.load(Path(directory))
    with _timed(figures, "build"):
        trie = Trie.from_codes(ids.codes_AL, ids.level_sizes)
    return figures | {"nbytes": trie.nbytes}


def _new(directory: str) -> dict[str, Any]:
    """The last tenth anew, beside the IDs of all others."""
    figures: dict[str, Any] = {}
    ids = AdvertiserIds.load(Path(directory))
    latent_NE, greedy_NL = _load(directory, "latent")[-NEW:], _load(directory, "greedy")[-NEW:]
    taken_AL = ids.codes_AL[:-NEW]
    with _timed(figures, "place"):
        codes_NL = place_new(latent_NE, greedy_NL, ids.codebooks, taken_AL)
    kept_N = (codes_NL[:, : LEVELS - 1] == greedy_NL[:, :-1]).all(1)
    return figures | {
        "prefix_kept": float(kept_N.mean()),
        "shared": _n_shared(np.concatenate([taken_AL, codes_NL])),
    }


def _equal(directory: str) -> dict[str, Any]:
    """Many with the embedding of one, as where texts are empty."""
    figures: dict[str, Any] = {}
    codebooks = AdvertiserIds.load(Path(directory)).codebooks[:LEVELS]
    latent_AE, greedy_AL = _load(directory, "latent"), _load(directory, "greedy")
    latent_AE[:EQUAL], greedy_AL[:EQUAL] = latent_AE[0], greedy_AL[0]
    with _timed(figures, "unique"):
        codes_AL, _ = resolve_collisions(latent_AE, greedy_AL, codebooks)
    return figures | {"shared": _n_shared(codes_AL)}


def _n_shared(codes_AL: Codes) -> int:
    """IDs given twice, counted without the code under test."""
    rows = np.ascontiguousarray(codes_AL.astype(">i4")).view(f"V{4 * codes_AL.shape[1]}")
    return len(rows) - len(np.unique(rows))


def _load(directory: str, name: str = "embeddings") -> NDArray[Any]:
    return np.load(Path(directory) / f"{name}.npy")


@contextmanager
def _timed(figures: dict[str, Any], name: str) -> Iterator[None]:
    began = perf_counter()
    yield
    figures[name] = perf_counter() - began


if __name__ == "__main__":
    main()
