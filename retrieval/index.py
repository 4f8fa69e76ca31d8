"""A FAISS index of ads that can be searched among chosen ads only.

Rows are ads; the index, the row-to-ad map and the metric are saved together, so that an index cannot be
read with another map or searched by a vector of another width. Scores are inner products.

A search restricted to few ads (the active ads of one market, of twenty advertisers) is exact whatever
the index: walking a graph or probing lists for the few rows that pass a filter finds little, while
scoring just those rows costs less than the walk.

On a GPU (``faiss-gpu`` and a device that FAISS sees) unrestricted searches run there and restricted ones
on the CPU copy, since FAISS's GPU indexes take no selector. The GPU path has not been run on a GPU.

Shapes: N rows, D width, B queries, K results.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from data.artifacts import atomic_directory
from data.errors import UserError

METRIC: Literal["inner_product"] = "inner_product"
KINDS = ("exact", "hnsw", "ivf")
NO_AD = -1


@dataclass
class IndexConfig:
    """Which FAISS index holds the ads.

    Attributes:
        kind: ``exact`` compares with every ad, ``hnsw`` walks a graph, ``ivf`` probes clusters.
        hnsw_neighbours: links of a node (FAISS's M).
        hnsw_ef_construction: width of the search that links a new node.
        hnsw_ef_search: width of the search that answers a query.
        ivf_lists: number of clusters.
        ivf_probes: clusters looked into by a query.
        exact_up_to: a search restricted to at most so many ads compares with each of them.
        device: ``auto`` searches on a GPU where FAISS sees one, ``cpu`` never does.
    """

    kind: str = "exact"
    hnsw_neighbours: int = 32
    hnsw_ef_construction: int = 80
    hnsw_ef_search: int = 128
    ivf_lists: int = 256
    ivf_probes: int = 16
    exact_up_to: int = 8192
    device: str = "auto"

    def __post_init__(self) -> None:
        errors = []
        if self.kind not in KINDS:
            errors.append(
                UserError(
                    f"retrieval.index.kind={self.kind}",
                    expected=f"one of {', '.join(KINDS)}",
                    action="choose one of them.",
                )
            )
        if self.device not in ("auto", "cpu"):
            errors.append(
                UserError(
                    f"retrieval.index.device={self.device}",
                    expected="auto or cpu",
                    action="choose one of them.",
                )
            )
        for name in ("hnsw_neighbours", "hnsw_ef_construction", "hnsw_ef_search", "ivf_lists", "ivf_probes"):
            if getattr(self, name) < 1:
                errors.append(
                    UserError(
                        f"retrieval.index.{name}={getattr(self, name)}",
                        expected="a positive whole number",
                        action="raise it.",
                    )
                )
        if errors:
            raise UserError.collect(errors)


class AdIndex:
    """Ads by vector; made with :meth:`build` or :meth:`load`.

    Attributes:
        ads: ad of every row, ascending.
        dim: width of the vectors.
    """

    def __init__(self, index: Any, ads_N: NDArray[np.int32], cfg: IndexConfig) -> None:
        self._index, self.ads, self.cfg = index, ads_N, cfg
        self.dim = int(index.d)
        # A filter names ads, FAISS wants rows.
        self._row = np.full(int(ads_N[-1]) + 1 if len(ads_N) else 0, -1, dtype=np.int64)
        self._row[ads_N] = np.arange(len(ads_N))
        self._gpu = _on_gpu(index, cfg)

    def __len__(self) -> int:
        return len(self.ads)

    @classmethod
    def build(cls, vectors_ND: NDArray[np.float32], ads_N: NDArray[np.int32], cfg: IndexConfig) -> Self:
        """Index ads.

        Args:
            vectors_ND: one vector an ad.
            ads_N: the ads, ascending and distinct.
            cfg: kind of index.

        Raises:
            ValueError: rows and ads do not match, or a vector is not finite.
        """
        vectors_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
        ads_N = np.ascontiguousarray(ads_N, dtype=np.int32)
        if vectors_ND.ndim != 2 or len(vectors_ND) != len(ads_N):
            raise ValueError(f"{vectors_ND.shape} vectors for {len(ads_N)} ads; expected one vector an ad")
        if len(ads_N) and (ads_N[0] < 0 or (np.diff(ads_N) <= 0).any()):
            raise ValueError("the ads of an index must be distinct, ascending and not negative")
        bad = ~np.isfinite(vectors_ND).all(1)
        if bad.any():
            raise ValueError(
                f"{int(bad.sum())} ads have a vector with NaN or infinity, the first is ad {ads_N[bad][0]}"
            )
        index = _new_index(vectors_ND.shape[1], len(ads_N), cfg)
        if len(ads_N):
            if not index.is_trained:
                index.train(vectors_ND)
            index.add(vectors_ND)
        return cls(index, ads_N, cfg)

    def search(
        self, queries_BD: NDArray[np.float32], k: int, *, among: NDArray[np.int32] | None = None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The ads with the largest inner product.

        Args:
            queries_BD: query vectors.
            k: results a query.
            among: search these ads only; ads the index does not hold are passed over. None searches all.

        Returns:
            Ads, best first, shape ``(B, K)``, and their scores. Where fewer than ``k`` ads are there, the
            rest is ``NO_AD`` with score ``-inf``.

        Raises:
            ValueError: the queries have another width or are not finite, or ``k`` is not positive.
        """
        queries_BD = np.ascontiguousarray(queries_BD, dtype=np.float32)
        if queries_BD.ndim != 2 or queries_BD.shape[1] != self.dim:
            raise ValueError(
                f"queries of shape {queries_BD.shape} for an index of width {self.dim}; expected (B, {self.dim})"
            )
        if not np.isfinite(queries_BD).all():
            raise ValueError("a query vector holds NaN or infinity; no ad is near or far from it")
        if k < 1:
            raise ValueError(f"k={k}; expected at least 1")
        ads_BK = np.full((len(queries_BD), k), NO_AD, dtype=np.int32)
        scores_BK = np.full((len(queries_BD), k), -np.inf, dtype=np.float32)
        rows_M = None if among is None else self.rows(among)
        found = min(k, len(self) if rows_M is None else len(rows_M))
        if found and len(queries_BD):
            scores_BF, rows_BF = self._search_rows(queries_BD, found, rows_M)
            ads_BK[:, :found] = np.where(rows_BF >= 0, self.ads[rows_BF], NO_AD)
            scores_BK[:, :found] = np.where(rows_BF >= 0, scores_BF, -np.inf)
        return ads_BK, scores_BK

    def vectors(self, ads_M: NDArray[np.int32]) -> NDArray[np.float32]:
        """Vectors of ads, shape ``(M, D)``.

        Raises:
            ValueError: the index does not hold an ad.
        """
        rows_M = self._rows_of(ads_M)
        if (rows_M < 0).any():
            raise ValueError(f"ad {np.asarray(ads_M)[rows_M < 0][0]} has no vector in this index")
        if not len(rows_M):
            return np.empty((0, self.dim), dtype=np.float32)
        return self._index.reconstruct_batch(rows_M)

    def holds(self, ads: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of the ads have a vector here."""
        return self._rows_of(ads) >= 0

    def rows(self, ads: NDArray[np.int32]) -> NDArray[np.int64]:
        """Distinct rows of those of the ads that the index holds, ascending."""
        rows = np.unique(self._rows_of(ads))
        return rows[rows >= 0]

    def save(self, directory: Path) -> None:
        """Write the index, the row-to-ad map and the metric, whole or not at all."""
        with atomic_directory(directory) as temporary:
            faiss.write_index(self._index, str(temporary / "index.faiss"))
            np.save(temporary / "ads.npy", self.ads)
            facts = {"metric": METRIC, "dim": self.dim, "rows": len(self), "kind": self.cfg.kind}
            (temporary / "index.json").write_text(json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, cfg: IndexConfig, *, dim: int) -> Self:
        """Read an index back.

        Args:
            directory: where :meth:`save` wrote it.
            cfg: search settings; its kind must be the saved one.
            dim: width of the vectors it will be searched with.

        Raises:
            UserError: a file is missing or damaged, or kind, width or metric are others.
        """
        again = "build the two-tower artifact again: delete its directory and run the stage."
        try:
            facts = json.loads((directory / "index.json").read_text())
            ads_N = np.load(directory / "ads.npy", allow_pickle=False)
            index = faiss.read_index(str(directory / "index.faiss"))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"the ad index in {directory}", expected=f"a readable index ({error})", action=again
            ) from error
        expected = {"metric": METRIC, "dim": dim, "rows": len(ads_N), "kind": cfg.kind}
        if facts != expected or index.ntotal != len(ads_N) or index.d != dim:
            raise UserError(f"an ad index with {facts} in {directory}", expected=f"one with {expected}", action=again)
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise UserError(f"an index of another metric in {directory}", expected=METRIC, action=again)
        return cls(_with_search_settings(index, cfg), ads_N, cfg)

    def _rows_of(self, ads: NDArray[np.int32]) -> NDArray[np.int64]:
        ads = np.asarray(ads, dtype=np.int64)
        known = (ads >= 0) & (ads < len(self._row))
        return np.where(known, self._row[np.where(known, ads, 0)] if len(self._row) else -1, -1)

    def _search_rows(
        self, queries_BD: NDArray[np.float32], k: int, rows_M: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if rows_M is None:
            return (self._gpu or self._index).search(queries_BD, k)
        if len(rows_M) <= self.cfg.exact_up_to:
            return self._search_exactly(queries_BD, k, rows_M)
        mask_N = np.zeros(len(self), dtype=bool)
        mask_N[rows_M] = True
        selector = faiss.IDSelectorBitmap(np.packbits(mask_N, bitorder="little"))
        return self._index.search(queries_BD, k, params=self._parameters(selector))

    def _search_exactly(
        self, queries_BD: NDArray[np.float32], k: int, rows_M: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self.cfg.kind == "ivf":  # its vectors lie by list: look into all of them
            mask_N = np.zeros(len(self), dtype=bool)
            mask_N[rows_M] = True
            selector = faiss.IDSelectorBitmap(np.packbits(mask_N, bitorder="little"))
            everywhere = faiss.SearchParametersIVF(sel=selector, nprobe=self._index.nlist)
            return self._index.search(queries_BD, k, params=everywhere)
        flat = self._index if self.cfg.kind == "exact" else faiss.downcast_index(self._index.storage)
        # A flat index scores just the rows of an IDSelectorArray instead of testing every row.
        return flat.search(queries_BD, k, params=faiss.SearchParameters(sel=faiss.IDSelectorArray(rows_M)))

    def _parameters(self, selector: Any) -> Any:
        if self.cfg.kind == "hnsw":
            return faiss.SearchParametersHNSW(sel=selector, efSearch=self.cfg.hnsw_ef_search)
        if self.cfg.kind == "ivf":
            return faiss.SearchParametersIVF(sel=selector, nprobe=self.cfg.ivf_probes)
        return faiss.SearchParameters(sel=selector)


def _new_index(dim: int, n_ads: int, cfg: IndexConfig) -> Any:
    metric = faiss.METRIC_INNER_PRODUCT
    if cfg.kind == "exact":
        return faiss.IndexFlat(dim, metric)
    if cfg.kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, cfg.hnsw_neighbours, metric)
        index.hnsw.efConstruction = cfg.hnsw_ef_construction
        return _with_search_settings(index, cfg)
    lists = max(1, min(cfg.ivf_lists, n_ads))
    index = faiss.index_factory(dim, f"IVF{lists},Flat", metric)
    index.cp.min_points_per_centroid = 1  # small catalogues are fine: a filter decides, not the clusters
    return _with_search_settings(index, cfg)


def _with_search_settings(index: Any, cfg: IndexConfig) -> Any:
    if cfg.kind == "hnsw":
        index.hnsw.efSearch = cfg.hnsw_ef_search
    if cfg.kind == "ivf":
        index.nprobe = cfg.ivf_probes
        index.make_direct_map()
    return index


def _on_gpu(index: Any, cfg: IndexConfig) -> Any | None:
    """A copy on all GPUs that FAISS sees; None where it sees none or its GPUs know no such index."""
    if cfg.device == "cpu" or cfg.kind == "hnsw" or faiss.get_num_gpus() < 1:
        return None
    return faiss.index_cpu_to_all_gpus(index)
