"""A FAISS index of ads that can be searched among chosen ads only, and that changes while it serves.

    exact   compares with every ad                     hnsw   walks a graph of near ads
    ivf     looks into the clusters near the query     pq     the same, of product-quantised vectors

Rows are ads; the index, the row-to-ad map and the metric are saved together, so that an index cannot be
read with another map or searched by a vector of another width. Scores are inner products.

A search restricted to few ads (the active ads of one market, of twenty advertisers) is exhaustive whatever
the index: walking a graph or probing lists for the few rows that pass a filter finds little, while
scoring just those rows costs less than the walk. Under ``pq`` it scores the quantised vectors.

Ads come and go without a rebuild: an added ad is a new row, and a removed or expired one keeps its row,
which every search then passes over. Any number of searches run at once; a change waits for those under way.

On a GPU (``faiss-gpu`` and a device that FAISS sees) unrestricted searches run there and restricted ones
on the CPU copy, since FAISS's GPU indexes take no selector. They are no more thread-safe for reading either, so
those searches take turns. The GPU path has not been run on a GPU.

Shapes: N rows, D width, B queries, K results.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from data.artifacts import atomic_directory
from data.errors import UserError

METRIC: Literal["inner_product"] = "inner_product"
KINDS = ("exact", "hnsw", "ivf", "pq")
BUILT_BY = {
    "exact": (),
    "hnsw": ("hnsw_neighbours", "hnsw_ef_construction"),
    "ivf": ("ivf_lists",),
    "pq": ("ivf_lists", "pq_segments", "pq_bits"),
}
"""Settings of each kind that cannot be changed once it is built."""
NO_AD = -1
FOREVER = np.iinfo(np.int64).max
_GPU_MAX_K = 2048  # neighbours that FAISS's GPU indexes select at the most


@dataclass
class IndexConfig:
    """Which FAISS index holds the ads.

    Attributes:
        kind: ``exact``, ``hnsw``, ``ivf`` or ``pq``.
        hnsw_neighbours: links of a node (FAISS's M).
        hnsw_ef_construction: width of the search that links a new node.
        hnsw_ef_search: width of the search that answers a query.
        ivf_lists: number of clusters.
        ivf_probes: clusters looked into by a query.
        pq_segments: parts of a vector that are quantised each on its own; they divide its width.
        pq_bits: size of a part's code.
        exact_up_to: a search restricted to at most so many ads compares with each of them.
        mapped: leave the vectors of a loaded index on disk, shared by all processes; it cannot be changed then.
        device: ``auto`` searches on a GPU where FAISS sees one, ``cpu`` never does.
    """

    kind: str = "exact"
    hnsw_neighbours: int = 32
    hnsw_ef_construction: int = 80
    hnsw_ef_search: int = 128
    ivf_lists: int = 256
    ivf_probes: int = 16
    pq_segments: int = 16
    pq_bits: int = 8
    exact_up_to: int = 8192
    mapped: bool = False
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
        counts = ("hnsw_neighbours", "hnsw_ef_construction", "hnsw_ef_search", "ivf_lists", "ivf_probes")
        for name in (*counts, "pq_segments", "pq_bits"):
            if getattr(self, name) < 1:
                errors.append(
                    UserError(
                        f"retrieval.index.{name}={getattr(self, name)}",
                        expected="a positive whole number",
                        action="raise it.",
                    )
                )
        if self.pq_bits > 16:
            errors.append(
                UserError(f"retrieval.index.pq_bits={self.pq_bits}", expected="at most 16", action="lower it.")
            )
        if errors:
            raise UserError.collect(errors)

    @property
    def build(self) -> dict[str, Any]:
        """What a built index is bound to."""
        return {"kind": self.kind, **{name: getattr(self, name) for name in BUILT_BY[self.kind]}}


class AdIndex:
    """Ads by vector; made with :meth:`build` or :meth:`load`.

    Attributes:
        dim: width of the vectors.
    """

    def __init__(
        self, index: Any, ads_N: NDArray[np.int32], until_N: NDArray[np.int64], cfg: IndexConfig, *, mapped: bool
    ) -> None:
        self._index, self.cfg, self._mapped = index, cfg, mapped
        self.dim = int(index.d)
        self._gate, self._gpu_turn = _Gate(), threading.Lock()
        self._set_rows(ads_N, until_N)

    def __len__(self) -> int:
        return self._alive

    @property
    def ads(self) -> NDArray[np.int32]:
        """The ads that can be found, rising."""
        with self._gate:
            return np.sort(self._ads_N[self._ads_N != NO_AD])

    @classmethod
    def build(cls, vectors_ND: NDArray[np.float32], ads_N: NDArray[np.int32], cfg: IndexConfig) -> Self:
        """Index ads.

        Args:
            vectors_ND: one vector an ad.
            ads_N: the ads, distinct.
            cfg: kind of index.

        Raises:
            ValueError: rows and ads do not match, or a vector is not finite.
            UserError: the settings do not fit the vectors' width.
        """
        vectors_ND, ads_N = _checked(vectors_ND, ads_N)
        index = _new_index(vectors_ND.shape[1], len(ads_N), cfg)
        if len(ads_N):
            index.train(vectors_ND)
            index.add(vectors_ND)
        return cls(index, ads_N, np.full(len(ads_N), FOREVER), cfg, mapped=False)

    def add(self, vectors_MD: NDArray[np.float32], ads_M: NDArray[np.int32], *, until: int = FOREVER) -> None:
        """Add ads, or give ads that are there another vector.

        An index that never held an ad is made anew for these, where its kind is trained: its clusters and codes are
        theirs. One that was built from few ads keeps the few clusters and codes they were enough for, however many are
        added; build it again once it has grown.

        Args:
            vectors_MD: one vector an ad.
            ads_M: the ads, distinct.
            until: :meth:`expire` removes them from this time on; any clock that rises will do.

        Raises:
            ValueError: rows and ads do not match, a vector is not finite or of another width.
            UserError: the index is memory-mapped.
        """
        vectors_MD, ads_M = _checked(vectors_MD, ads_M)
        if vectors_MD.shape[1] != self.dim:
            raise ValueError(f"vectors of width {vectors_MD.shape[1]} for an index of width {self.dim}")
        self._check_writable()
        if not len(ads_M):
            return
        with self._gate.changing():
            if not self._index.ntotal:
                index = _new_index(self.dim, len(ads_M), self.cfg)
                index.train(vectors_MD)
                self._index = index
            self._index.add(vectors_MD)
            rows_M = self._rows_of(ads_M)
            self._ads_N[rows_M[rows_M >= 0]] = NO_AD
            until_N = np.concatenate([self._until_N, np.full(len(ads_M), until, np.int64)])
            self._set_rows(np.concatenate([self._ads_N, ads_M]), until_N)

    def remove(self, ads: NDArray[np.int32]) -> int:
        """Take ads out; those that are not there are passed over.

        Returns:
            How many were there.
        """
        with self._gate.changing():
            return self._take_out(ads)

    def expire(self, now: int) -> NDArray[np.int32]:
        """Take out the ads whose time is over (``until <= now``), and return them."""
        with self._gate.changing():  # looked up within: an ad that is added again meanwhile stays
            expired = np.sort(self._ads_N[(self._until_N <= now) & (self._ads_N != NO_AD)])
            self._take_out(expired)
        return expired

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
        # The sum of squares tells in one call; only where it is none does each value have to be looked at.
        if not math.isfinite(np.vdot(queries_BD, queries_BD)) and not np.isfinite(queries_BD).all():
            raise ValueError("a query vector holds NaN or infinity; no ad is near or far from it")
        if k < 1:
            raise ValueError(f"k={k}; expected at least 1")
        with self._gate:
            rows_M = None if among is None else self._rows(among)
            found = min(k, len(self) if rows_M is None else len(rows_M))
            if not found or not len(queries_BD):
                return _nothing(len(queries_BD), k)
            scores_BF, rows_BF = self._search_rows(queries_BD, found, rows_M)
            ads_BF = self._ads_N.take(rows_BF)
        if rows_BF.min() < 0:  # the index looked at fewer
            ads_BF, scores_BF = np.where(rows_BF < 0, NO_AD, ads_BF), np.where(rows_BF < 0, -np.inf, scores_BF)
        if found == k:
            return ads_BF, scores_BF
        ads_BK, scores_BK = _nothing(len(queries_BD), k)
        ads_BK[:, :found], scores_BK[:, :found] = ads_BF, scores_BF
        return ads_BK, scores_BK

    def vectors(self, ads_M: NDArray[np.int32]) -> NDArray[np.float32]:
        """Vectors of ads, shape ``(M, D)``; under ``pq`` what is left of them.

        Raises:
            ValueError: the index does not hold an ad.
        """
        with self._gate:
            rows_M = self._rows_of(ads_M)
            if (rows_M < 0).any():
                raise ValueError(f"ad {np.asarray(ads_M)[rows_M < 0][0]} has no vector in this index")
            return self._vectors(rows_M)

    def held(self, ads_M: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Those of the ads that have a vector here, and the vectors, at one moment, whatever is removed meanwhile."""
        with self._gate:
            rows_M = self._rows_of(ads_M)
            there_M = rows_M >= 0
            return ads_M[there_M], self._vectors(rows_M[there_M])

    def holds(self, ads: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of the ads have a vector here."""
        with self._gate:
            return self._rows_of(ads) >= 0

    def _take_out(self, ads: NDArray[np.int32]) -> int:
        rows = self._rows(ads)
        self._ads_N[rows] = NO_AD
        self._set_rows(self._ads_N, self._until_N)
        return len(rows)

    def _rows(self, ads: NDArray[np.int32]) -> NDArray[np.int64]:
        """Distinct rows of those of the ads that the index holds, ascending."""
        rows = self._rows_of(ads)
        rows = rows[rows >= 0]
        return rows if (np.diff(rows) > 0).all() else np.unique(rows)  # active ads rise already, as a rule

    def save(self, directory: Path) -> None:
        """Write the index, the row-to-ad map and the metric, whole or not at all."""
        with self._gate, atomic_directory(directory) as temporary:
            faiss.write_index(self._index, str(temporary / "index.faiss"))
            np.save(temporary / "ads.npy", self._ads_N)
            np.save(temporary / "until.npy", self._until_N)
            facts = {"metric": METRIC, "dim": self.dim, "rows": len(self._ads_N), "build": self.cfg.build}
            (temporary / "index.json").write_text(json.dumps(facts, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path, cfg: IndexConfig, *, dim: int) -> Self:
        """Read an index back.

        Args:
            directory: where :meth:`save` wrote it.
            cfg: search settings; those it was built by must be the saved ones.
            dim: width of the vectors it will be searched with.

        Raises:
            UserError: a file is missing or damaged, or build, width or metric are others.
        """
        facts, path = _facts(directory), directory / "index.faiss"
        flags = 0
        if cfg.mapped:  # FAISS maps inverted lists and whole indexes by different flags
            inverted = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY
            flags = inverted if cfg.kind in ("ivf", "pq") else faiss.IO_FLAG_MMAP_IFC
        try:
            ads_N = np.load(directory / "ads.npy", allow_pickle=False)
            until_N = np.load(directory / "until.npy", allow_pickle=False)
            index = faiss.read_index(str(path), flags)
        except (OSError, ValueError, RuntimeError) as error:
            raise _unreadable(directory, error) from error
        expected = {"metric": METRIC, "dim": dim, "rows": len(ads_N), "build": cfg.build}
        if facts != expected or index.ntotal != len(ads_N) or index.d != dim or len(until_N) != len(ads_N):
            raise UserError(f"an ad index with {facts} in {directory}", expected=f"one with {expected}", action=AGAIN)
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise UserError(f"an index of another metric in {directory}", expected=METRIC, action=AGAIN)
        return cls(_with_search_settings(index, cfg), ads_N, until_N, cfg, mapped=cfg.mapped)

    @staticmethod
    def saved_build(directory: Path) -> dict[str, Any]:
        """`IndexConfig.build` of a saved index.

        Raises:
            UserError: it cannot be read.
        """
        build: dict[str, Any] = _facts(directory).get("build", {})
        return build

    def _set_rows(self, ads_N: NDArray[np.int32], until_N: NDArray[np.int64]) -> None:
        """Take over the row-to-ad map and what follows from it."""
        self._ads_N, self._until_N = ads_N, until_N
        live_N = np.flatnonzero(ads_N != NO_AD)
        self._alive = len(live_N)
        # A filter names ads, FAISS wants rows.
        self._row = np.full(int(ads_N.max(initial=-1)) + 1, -1, dtype=np.int64)
        self._row[ads_N[live_N]] = live_N
        self._passing = None if self._alive == len(ads_N) else _Rows(live_N, len(ads_N))
        self._gpu = _on_gpu(self._index, self.cfg) if self._passing is None else None

    def _check_writable(self) -> None:
        if self._mapped:
            raise UserError(
                "ads to add to a memory-mapped index",
                expected="an index in memory",
                action="load it with retrieval.index.mapped=false",
            )

    def _rows_of(self, ads: NDArray[np.int32]) -> NDArray[np.int64]:
        ads = np.asarray(ads, dtype=np.int64)
        known = (ads >= 0) & (ads < len(self._row))
        return np.where(known, self._row[np.where(known, ads, 0)] if len(self._row) else -1, -1)

    def _vectors(self, rows_M: NDArray[np.int64]) -> NDArray[np.float32]:
        if not len(rows_M):
            return np.empty((0, self.dim), dtype=np.float32)
        return self._index.reconstruct_batch(rows_M)

    def _search_rows(
        self, queries_BD: NDArray[np.float32], k: int, rows_M: NDArray[np.int64] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if rows_M is None:
            if self._gpu is not None and k <= _GPU_MAX_K:
                with self._gpu_turn:
                    return self._gpu.search(queries_BD, k)
            if self._passing is None:
                return self._index.search(queries_BD, k)
            return self._index.search(queries_BD, k, params=self._parameters(self._passing.selector))
        if len(rows_M) <= self.cfg.exact_up_to:
            return self._search_exhaustively(queries_BD, k, rows_M)
        passing = _Rows(rows_M, len(self._ads_N))
        return self._index.search(queries_BD, k, params=self._parameters(passing.selector))

    def _search_exhaustively(
        self, queries_BD: NDArray[np.float32], k: int, rows_M: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self.cfg.kind in ("ivf", "pq"):  # vectors lie by list, and a selector would be asked about every one
            scores_BM = queries_BD @ self._vectors(rows_M).T
            order_BK = np.argsort(-scores_BM, axis=1, kind="stable")[:, :k]
            return np.take_along_axis(scores_BM, order_BK, axis=1), rows_M[order_BK]
        flat = self._index if self.cfg.kind == "exact" else faiss.downcast_index(self._index.storage)
        # A flat index scores just the rows of an IDSelectorArray instead of testing every row.
        return flat.search(queries_BD, k, params=faiss.SearchParameters(sel=faiss.IDSelectorArray(rows_M)))

    def _parameters(self, selector: Any) -> Any:
        if self.cfg.kind == "hnsw":
            return faiss.SearchParametersHNSW(sel=selector, efSearch=self.cfg.hnsw_ef_search)
        if self.cfg.kind in ("ivf", "pq"):
            return faiss.SearchParametersIVF(sel=selector, nprobe=self.cfg.ivf_probes)
        return faiss.SearchParameters(sel=selector)


class _Rows:
    """A FAISS selector of rows, with the bits that it points to."""

    def __init__(self, rows_M: NDArray[np.int64], n_rows: int) -> None:
        mask_N = np.zeros(n_rows, dtype=bool)
        mask_N[rows_M] = True
        self._bits = np.packbits(mask_N, bitorder="little")
        self.selector = faiss.IDSelectorBitmap(self._bits)


class _Gate:
    """Any number of searches, or one change: FAISS allows no search while an index grows.

    ``with gate:`` is a search. A change that waits keeps new searches out, else a busy service would never let it in.
    """

    def __init__(self) -> None:
        self._lock, self._searches, self._changes = threading.Lock(), 0, 0
        self._moved = threading.Condition(self._lock)

    def __enter__(self) -> None:
        with self._lock:
            while self._changes:
                self._moved.wait()
            self._searches += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._searches -= 1
            if self._changes:
                self._moved.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        with self._lock:
            self._changes += 1
            try:
                self._moved.wait_for(lambda: self._searches == 0)
                yield
            finally:
                self._changes -= 1
                self._moved.notify_all()


AGAIN = "build the two-tower artifact again: delete its directory and run the stage."


def _facts(directory: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((directory / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(directory, error) from error
    return facts


def _nothing(queries: int, k: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Lists without any ad."""
    return np.full((queries, k), NO_AD, dtype=np.int32), np.full((queries, k), -np.inf, dtype=np.float32)


def _unreadable(directory: Path, error: Exception) -> UserError:
    return UserError(f"the ad index in {directory}", expected=f"a readable index ({error})", action=AGAIN)


def _checked(
    vectors_ND: NDArray[np.float32], ads_N: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Vectors and ads that an index can take."""
    vectors_ND = np.ascontiguousarray(vectors_ND, dtype=np.float32)
    ads_N = np.array(ads_N, dtype=np.int32)  # a copy: rows are marked in it
    if vectors_ND.ndim != 2 or len(vectors_ND) != len(ads_N):
        raise ValueError(f"{vectors_ND.shape} vectors for {len(ads_N)} ads; expected one vector an ad")
    if len(ads_N) and (ads_N.min() < 0 or len(np.unique(ads_N)) < len(ads_N)):
        raise ValueError("the ads of an index must be distinct and not negative")
    bad = ~np.isfinite(vectors_ND).all(1)
    if bad.any():
        raise ValueError(f"{int(bad.sum())} ads have a vector with NaN or infinity, the first is ad {ads_N[bad][0]}")
    return vectors_ND, ads_N


def _new_index(dim: int, n_ads: int, cfg: IndexConfig) -> Any:
    metric = faiss.METRIC_INNER_PRODUCT
    if cfg.kind == "exact":
        return faiss.IndexFlat(dim, metric)
    if cfg.kind == "hnsw":
        index = faiss.IndexHNSWFlat(dim, cfg.hnsw_neighbours, metric)
        index.hnsw.efConstruction = cfg.hnsw_ef_construction
        return _with_search_settings(index, cfg)
    lists = max(1, min(cfg.ivf_lists, n_ads))
    if cfg.kind == "ivf":
        index = faiss.index_factory(dim, f"IVF{lists},Flat", metric)
    else:
        if dim % cfg.pq_segments:
            raise UserError(
                f"retrieval.index.pq_segments={cfg.pq_segments} for vectors of width {dim}",
                expected="a number of segments that divides the width",
                action="choose another, e.g. a power of two",
            )
        bits = max(1, min(cfg.pq_bits, max(n_ads, 2).bit_length() - 1))  # no more codes than ads to learn them from
        # "np": no polysemous training, which takes a hundred times longer and serves Hamming search alone.
        index = faiss.index_factory(dim, f"IVF{lists},PQ{cfg.pq_segments}x{bits}np", metric)
        index.pq.cp.min_points_per_centroid = 1
    index.cp.min_points_per_centroid = 1  # small catalogues are fine: a filter decides, not the clusters
    return _with_search_settings(index, cfg)


def _with_search_settings(index: Any, cfg: IndexConfig) -> Any:
    if cfg.kind == "hnsw":
        index.hnsw.efSearch = cfg.hnsw_ef_search
    if cfg.kind in ("ivf", "pq"):
        index.nprobe = cfg.ivf_probes
        index.make_direct_map()
    return index


def _on_gpu(index: Any, cfg: IndexConfig) -> Any | None:
    """A copy on all GPUs that FAISS sees; None where it sees none or its GPUs know no such index."""
    if cfg.device == "cpu" or cfg.kind == "hnsw" or faiss.get_num_gpus() < 1:
        return None
    try:
        return faiss.index_cpu_to_all_gpus(index)
    except RuntimeError:  # e.g. codes of 3 bits; the index on the CPU answers alone
        return None
