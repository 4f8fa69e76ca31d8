"""Tokenizers side by side: the same embeddings, level sizes and splits, judged on entities that training did not see.

    python -m benchmarks.semantic_ids --data complete_journey --data sequences data.path=/data/amazon_beauty
    python -m benchmarks.semantic_ids --data complete_journey semantic_ids.rqvae.level_sizes=[32,32,64] --seeds 1

Words after a ``--data`` are overrides of its configuration. ``sequences`` and ``amazon`` give IDs to items, the other
sources to advertisers, unless ``semantic_ids.entity`` says it. ``--work DIR`` keeps tables and encoded texts for the
next time (DIR/<data>, where tables that are there already are used as they are); ``--out results.json`` writes all
figures of all seeds. Needs the extra ``bench`` (``pip install 'adsid[bench]'``).

In a seed's run a tenth of the entities is held out, drawn by the seed, and each tokenizer is trained with the seed:

rqvae
    this project's, as configured
rqkmeans
    this project's, at the RQ-VAE's level sizes
faiss, greedy
    ``faiss.ResidualQuantizer`` with ``max_beam_size=1``, in training and encoding
faiss, beam
    the same with its default beam
ResidualVQ
    of vector-quantize-pytorch, on the embeddings themselves, without an autoencoder: started by its own k-means on the
    whole set, then its moving averages (decay 0.8, its default) and its replacement of codes with fewer than 2 averaged
    members a batch, for as many epochs and of batches as large as the RQ-VAE's; codes are taken in evaluation mode

Of the held-out: squared reconstruction error over their variance; collisions before resolving, the share whose code is
that of another entity, trained or held-out; neighbour preservation, the share of its ten nearest trained entities that
share its prefix, beyond chance (0 as random, 1 all), by length of the prefix and as the mean over the lengths. Of the
trained: dead codes of all levels, and the entropy ratio of level 1. Times are of training and of encoding all, alone on
the machine. ``ratio`` is the RQ-VAE's figure over the peer's, both means over the seeds.

Bars: no dead code; entropy ratio of level 1 at least 0.9; error at most ResidualVQ's and at most 1.05 of greedy FAISS;
fewer collisions and higher neighbour preservation than both; no collision after resolving.

Shapes: A entities, T trained, H held out, D features, E of a latent, L levels, N neighbours.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measure import row
from data.artifacts import to_plain
from data.log import load_log
from data.prepare import prepare
from pipeline.config import AdsidConfig, compose
from pipeline.quiet import quiet_libraries
from semantic_ids import quality
from semantic_ids.config import SemanticIdsConfig
from semantic_ids.embeddings import Embeddings
from semantic_ids.tokenize import entity_embeddings
from semantic_ids.tokenizer import Tokenizer, fit_tokenizer, quantize
from semantic_ids.unique import n_shared, place_new, resolve_collisions

Floats = NDArray[np.float32]
Codes = NDArray[np.int64]
OURS, PEERS = "rqvae", ("ResidualVQ", "faiss, greedy")
OF_ITEMS = ("sequences", "amazon")
HELD_OUT = 0.1
LOWER, HIGHER = ("reconstruction_error", "collisions"), ("neighbour_preservation",)


class Trained(NamedTuple):
    """A trained tokenizer.

    Attributes:
        encode: greedy codes and reconstruction of embeddings.
        tokenizer: of this project's, whose codes can be made unique.
    """

    encode: Callable[[Floats], tuple[Codes, Floats]]
    tokenizer: Tokenizer | None = None


class Split(NamedTuple):
    """Rows trained on, rows held out, and the nearest trained entities of the latter, as places among the trained."""

    trained_T: NDArray[np.int64]
    held_H: NDArray[np.int64]
    nearest_HN: NDArray[np.int64]


Fit = Callable[[Embeddings, SemanticIdsConfig], Trained]


def main(arguments: list[str]) -> None:
    """Run the data sets that the command line names."""
    options, data = _parse(arguments)
    quiet_libraries()
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = [_benchmark(name, overrides, work, options.seeds) for name, overrides in data]
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _parse(arguments: list[str]) -> tuple[argparse.Namespace, list[tuple[str, list[str]]]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.semantic_ids", allow_abbrev=False)
    parser.add_argument("--data", nargs="+", action="append", required=True, metavar=("NAME", "OVERRIDE"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    return options, [(words[0], words[1:]) for words in options.data]


def _benchmark(name: str, overrides: list[str], work: Path, seeds: int) -> dict[str, Any]:
    entity = "item" if name in OF_ITEMS else "advertiser"
    fixed = [f"data={name}", "experiment=full", "trainer.progress_bar=false", f"semantic_ids.entity={entity}"]
    config = compose([*fixed, *overrides])
    embeddings, seconds = _embeddings(config, work / name, work / "cache")
    cfg = config.semantic_ids
    row(f"{name}: {cfg.entity}s", len(embeddings.vectors_AD), "entities")
    row(f"{name}: {cfg.entity}s with the embedding of another", quality.identical_share(embeddings.vectors_AD), "share")
    row(f"{name}: embedding, from the tables", seconds, "s")
    figures: dict[str, list[dict[str, float]]] = {tokenizer: [] for tokenizer in TOKENIZERS}
    for seed in range(seeds):
        split = _split(embeddings.vectors_AD, seed)
        for tokenizer, fit in TOKENIZERS.items():
            figures[tokenizer].append(_measure(fit, embeddings, split, replace(cfg, seed=seed)))
    means = {tokenizer: _means(rows) for tokenizer, rows in figures.items()}
    for tokenizer, mean in means.items():
        for figure, value in mean.items():
            ratio = means[OURS][figure] / value if _compared(figure) and tokenizer in PEERS and value else None
            row(f"{name}: {figure} of {tokenizer}", value, _unit(figure), ratio=ratio)
    bars = _bars(figures[OURS], means)
    for bar, reached in bars.items():
        row(f"{name}: {bar}", float(reached), "reached")
    return {
        "data": name, "overrides": overrides, "config": to_plain(cfg), "entities": len(embeddings.vectors_AD),
        "sources": dict(zip(embeddings.source_names, embeddings.source_dims, strict=True)), "means": means,
        "seeds": figures, "bars": bars,
    }  # fmt: skip


def _embeddings(config: AdsidConfig, tables: Path, cache_dir: Path) -> tuple[Embeddings, float]:
    if not (tables / "events.parquet").is_file():
        tables.mkdir(parents=True, exist_ok=True)
        prepare(config.data, tables)
    log = load_log(tables, config.data, evaluate="validation")
    began = perf_counter()
    cache_dir.mkdir(parents=True, exist_ok=True)
    return entity_embeddings(log, config.semantic_ids, cache_dir=cache_dir), perf_counter() - began


def _split(vectors_AD: Floats, seed: int) -> Split:
    order_A = np.random.default_rng(seed).permutation(len(vectors_AD))
    n = round(HELD_OUT * len(vectors_AD))
    held_H, trained_T = np.sort(order_A[:n]), np.sort(order_A[n:])
    index = faiss.IndexFlatL2(vectors_AD.shape[1])
    index.add(vectors_AD[trained_T])
    _, nearest_HN = index.search(vectors_AD[held_H], quality.NEIGHBOURS)
    return Split(trained_T, held_H, nearest_HN.astype(np.int64))


def _measure(fit: Fit, embeddings: Embeddings, split: Split, cfg: SemanticIdsConfig) -> dict[str, float]:
    trained = replace(embeddings, vectors_AD=np.ascontiguousarray(embeddings.vectors_AD[split.trained_T]))
    began = perf_counter()
    made = fit(trained, cfg)
    fitted = perf_counter()
    codes_AL, reconstruction_AD = made.encode(embeddings.vectors_AD)
    ended = perf_counter()
    sizes = cfg.rqvae.level_sizes
    codes_TL, codes_HL = codes_AL[split.trained_T], codes_AL[split.held_H]
    uses = [quality.level_use(codes_TL[:, level], size) for level, size in enumerate(sizes)]
    same_HNL = np.logical_and.accumulate(codes_HL[:, None] == codes_TL[split.nearest_HN], axis=2)
    preserved = []
    for length, group_A in enumerate(list(quality.groups(codes_AL))[:-1], 1):
        share_G = np.bincount(group_A[split.trained_T], minlength=group_A.max() + 1) / len(codes_TL)
        chance = float(share_G[group_A[split.held_H]].mean())
        preserved.append(quality.beyond_chance(float(same_HNL[:, :, length - 1].mean()), chance))
    group_A = quality.last_group(codes_AL)
    figures = {
        "reconstruction_error": quality.reconstruction_error(
            embeddings.vectors_AD[split.held_H], reconstruction_AD[split.held_H]
        ),
        "collisions": float((np.bincount(group_A)[group_A[split.held_H]] > 1).mean()),
        "neighbour_preservation": float(np.mean(preserved)),
        **{f"neighbour_preservation of {length}": value for length, value in enumerate(preserved, 1)},
        "entropy_ratio": uses[0].entropy_ratio,
        "dead_codes": float(sum(use.dead for use in uses)),
        "fit_seconds": fitted - began,
        "encode_seconds": ended - fitted,
    }
    if made.tokenizer is not None:
        figures["collisions_after"] = float(_collisions_after(made.tokenizer, embeddings.vectors_AD, split))
    return figures


def _collisions_after(tokenizer: Tokenizer, vectors_AD: Floats, split: Split) -> int:
    """Trained entities made unique, then the held-out placed beside them as new ones."""
    latent_AE = tokenizer.latent(vectors_AD)
    greedy_AL, _ = quantize(latent_AE, tokenizer.codebooks)
    trained_T, held_H = split.trained_T, split.held_H
    codes_TL, books = resolve_collisions(latent_AE[trained_T], greedy_AL[trained_T], tokenizer.codebooks)
    codes_HL = place_new(latent_AE[held_H], greedy_AL[held_H], books, codes_TL)
    return n_shared(np.concatenate([codes_TL, codes_HL]))


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {figure: float(np.mean([one[figure] for one in rows])) for figure in rows[0]}


def _compared(figure: str) -> bool:
    return figure.startswith((*LOWER, *HIGHER, "fit_seconds"))


def _unit(figure: str) -> str:
    if figure.endswith("seconds"):
        return "s"
    return {"dead_codes": "codes", "collisions_after": "entities", "reconstruction_error": "of variance"}.get(
        figure, "share"
    )


def _bars(ours: list[dict[str, float]], means: dict[str, dict[str, float]]) -> dict[str, bool]:
    mean, others = means[OURS], {peer: means[peer] for peer in PEERS}
    return {
        "no dead code": all(one["dead_codes"] == 0 for one in ours),
        "entropy ratio of level 1 at least 0.9": min(one["entropy_ratio"] for one in ours) >= 0.9,
        "error at most ResidualVQ's": mean["reconstruction_error"] <= others["ResidualVQ"]["reconstruction_error"],
        "error at most 1.05 of greedy FAISS": mean["reconstruction_error"]
        <= 1.05 * others["faiss, greedy"]["reconstruction_error"],
        "fewer collisions than both": all(mean["collisions"] < other["collisions"] for other in others.values()),
        "higher neighbour preservation than both": all(
            mean["neighbour_preservation"] > other["neighbour_preservation"] for other in others.values()
        ),
        "no collision after resolving": all(one["collisions_after"] == 0 for one in ours),
    }


# The tokenizers


def _rqvae(embeddings: Embeddings, cfg: SemanticIdsConfig) -> Trained:
    return _ours(embeddings, replace(cfg, tokenizer="rqvae"))


def _rqkmeans(embeddings: Embeddings, cfg: SemanticIdsConfig) -> Trained:
    same = replace(cfg.rqkmeans, level_sizes=cfg.rqvae.level_sizes)
    return _ours(embeddings, replace(cfg, tokenizer="rqkmeans", rqkmeans=same))


def _ours(embeddings: Embeddings, cfg: SemanticIdsConfig) -> Trained:
    with tempfile.TemporaryDirectory() as work_dir:
        tokenizer = fit_tokenizer(embeddings, cfg, work_dir=Path(work_dir))

    def encode(vectors_AD: Floats) -> tuple[Codes, Floats]:
        codes_AL, quantized_AE = quantize(tokenizer.latent(vectors_AD), tokenizer.codebooks)
        return codes_AL, tokenizer.decode(quantized_AE)

    return Trained(encode, tokenizer)


def _faiss(beam: int | None) -> Fit:
    def fit(embeddings: Embeddings, cfg: SemanticIdsConfig) -> Trained:
        bits = [int(math.log2(size)) for size in cfg.rqvae.level_sizes]
        if [2**bit for bit in bits] != list(cfg.rqvae.level_sizes):
            raise SystemExit(f"level sizes {cfg.rqvae.level_sizes}: faiss.ResidualQuantizer needs powers of two")
        vector = faiss.UInt64Vector()
        for bit in bits:
            vector.push_back(bit)
        quantizer = faiss.ResidualQuantizer(embeddings.vectors_AD.shape[1], vector)
        quantizer.cp.seed = cfg.seed + 1234  # its default is 1234
        if beam is not None:
            quantizer.max_beam_size = beam
        quantizer.train(embeddings.vectors_AD)

        def encode(vectors_AD: Floats) -> tuple[Codes, Floats]:
            packed = quantizer.compute_codes(vectors_AD)
            bits_AB = np.unpackbits(packed, axis=1, bitorder="little")
            ends = np.cumsum(bits)
            levels = [bits_AB[:, end - bit : end] @ (1 << np.arange(bit)) for bit, end in zip(bits, ends, strict=True)]
            return np.stack(levels, axis=1).astype(np.int64), quantizer.decode(packed)

        return Trained(encode)

    return fit


def _residual_vq(embeddings: Embeddings, cfg: SemanticIdsConfig) -> Trained:
    try:
        from vector_quantize_pytorch import ResidualVQ
    except ImportError as error:
        raise SystemExit("vector-quantize-pytorch is not installed: pip install 'adsid[bench]'") from error
    torch.manual_seed(cfg.seed)
    x_AD, sizes = torch.from_numpy(embeddings.vectors_AD), list(cfg.rqvae.level_sizes)
    model = ResidualVQ(
        dim=x_AD.shape[1], num_quantizers=len(sizes), codebook_size=sizes[0] if len(set(sizes)) == 1 else tuple(sizes),
        kmeans_init=True, kmeans_iters=cfg.rqvae.kmeans_iterations, decay=0.8, threshold_ema_dead_code=2,
    )  # fmt: skip
    model.train()
    with torch.no_grad():
        model(x_AD[None])
        for _ in range(cfg.trainer.max_epochs):
            for rows_B in torch.randperm(len(x_AD)).split(cfg.rqvae.batch_size):
                model(x_AD[rows_B][None])
    model.eval()

    @torch.no_grad()
    def encode(vectors_AD: Floats) -> tuple[Codes, Floats]:
        quantized_1AD, codes_1AL, _ = model(torch.from_numpy(vectors_AD)[None])
        return codes_1AL[0].numpy(), quantized_1AD[0].numpy()

    return Trained(encode)


TOKENIZERS: dict[str, Fit] = {
    OURS: _rqvae,
    "rqkmeans": _rqkmeans,
    "faiss, greedy": _faiss(1),
    "faiss, beam": _faiss(None),
    "ResidualVQ": _residual_vq,
}


if __name__ == "__main__":
    main(sys.argv[1:])
