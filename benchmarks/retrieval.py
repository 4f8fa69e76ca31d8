"""How fast ads are found and towers are trained, and how good the retrievers are on a public data set.

    python -m benchmarks.retrieval                        ann, candidates, training
    python -m benchmarks.retrieval ann hnsw               one of them; of another kind of index
    python -m benchmarks.retrieval beauty /data/tables    quality, of tables that `adsid data prepare` wrote

*ann*: 1M ads of 100,000 simulated advertisers, single queries on one thread. Bars: recall@100 of at least 0.95 against
exact search at 20 times its speed, this code within 1.1 times FAISS's own call on the same index, and a search among
50 advertisers within twice an unrestricted one. *candidates*: one user's candidates from three channels; bar: p99 at
most 1.5 times the user tower's forward and FAISS's own searches; every request comes several times, and its fastest
answer is free of what else the machine did. *training*: samples a second beside a two-tower of TorchRec's parts,
trained as its ``examples/retrieval`` does, on the same tables, layers and batches; bar: as many.

*beauty*: Amazon Beauty, leave-one-out, full ranking, beside published figures. Every model reads what was before the
item it is asked for; constants and epochs are chosen on the last but one item, and the figures are of the last.

Shapes: N ads, D width, U users, I items, B pairs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from torch import distributed, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.mlp import MLP

from benchmarks.measure import row
from data.log import Log, Targets, load_log
from data.prepare import prepare
from data.truth import SimulatorConfig, Truth
from models.two_tower import (
    Batch,
    Candidates,
    ItemEncoder,
    TwoTower,
    TwoTowerConfig,
    TwoTowerModule,
    TwoTowerShape,
    ad_vectors,
    single_valued,
)
from pipeline.config import compose
from pipeline.quiet import quiet_libraries
from retrieval.blend import QuotaBlend
from retrieval.config import FORECAST, SEEDED, TWO_TOWER, RetrievalConfig
from retrieval.counts import Purchases
from retrieval.index import AdIndex, IndexConfig
from retrieval.metrics import hits, ndcg_at_k, recall_at_k
from retrieval.neighbours import Neighbours
from retrieval.retriever import Retriever
from retrieval.tuning import Plan
from retrieval.two_tower import TrainedTwoTower, build_model, index_ads, train_two_tower

N_ADS, N_ADVERTISERS, DIM, K = 1_000_000, 100_000, 64, 100
QUERIES, CHOSEN_ADVERTISERS = 300, 50
ROUNDS = 4
INDEXES = {
    "ivf": IndexConfig(kind="ivf", ivf_lists=2048, ivf_probes=72),
    "hnsw": IndexConfig(kind="hnsw", hnsw_ef_search=192),
}
ROWS, PAIRS, LAYERS, STEPS = 1024**2, 32, [128, 64], 200
PUBLISHED = {"TIGER": (0.0648, 0.0384), "SASRec": (0.0605, 0.0318)}
"""Recall@10 and NDCG@10 on Amazon Beauty: Rajput et al., NeurIPS 2023, table 1."""


def main() -> None:
    """Run the benchmarks that the command line names."""
    quiet_libraries()
    words = sys.argv[1:]
    kinds = [word for word in words if word in INDEXES] or ["ivf"]
    folders = [Path(word) for word in words if "/" in word]
    benchmarks: dict[str, Callable[[], None]] = {
        "ann": lambda: ann(kinds),
        "candidates": candidates,
        "training": training,
        "beauty": lambda: beauty(folders[0] if folders else None),
    }
    unknown = [word for word in words if word not in benchmarks and word not in INDEXES and "/" not in word]
    if unknown:
        raise SystemExit(f"no benchmark {unknown[0]}, only {', '.join(benchmarks)}")
    for name in [word for word in words if word in benchmarks] or ["ann", "candidates", "training"]:
        benchmarks[name]()


# --- ann -------------------------------------------------------------------------------------------------------


def ann(kinds: Sequence[str]) -> None:
    """Search of a million ads, one query after another."""
    vectors_ND, queries_QD = simulated_vectors()
    for kind in kinds:
        _ann(kind, vectors_ND, queries_QD)


def _ann(kind: str, vectors_ND: NDArray[np.float32], queries_QD: NDArray[np.float32]) -> None:
    ads = np.arange(N_ADS, dtype=np.int32)
    began = perf_counter()
    index = AdIndex.build(vectors_ND, ads, INDEXES[kind])
    row(f"ann {kind}: building an index of 1M ads", perf_counter() - began, "s")
    exact = AdIndex.build(vectors_ND, ads, IndexConfig())
    faiss.omp_set_num_threads(1)
    raw = index._index  # the very same one: a copy lies elsewhere in memory, and is slower or faster by that
    truth = exact.search(queries_QD[:50], K)[0]
    found = index.search(queries_QD[:50], K)[0]
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(found, truth, strict=True)])
    row(f"ann {kind}: recall@{K} against exact search", float(recall), "share")
    exact_ms = timed(lambda query: exact.search(query, K), queries_QD[:30])
    ours_ms, raw_ms = alternated(lambda query: index.search(query, K), lambda query: raw.search(query, K), queries_QD)
    row(f"ann {kind}: a query, exact search over it", ours_ms, "ms", ratio=exact_ms / ours_ms)
    row(f"ann {kind}: a query, over FAISS's own call", ours_ms, "ms", ratio=ours_ms / raw_ms)
    rng = np.random.default_rng(1)
    among = [
        np.flatnonzero(np.isin(ads // (N_ADS // N_ADVERTISERS), rng.integers(0, N_ADVERTISERS, CHOSEN_ADVERTISERS)))
        for _ in range(20)
    ]
    place = iter(range(10**9))
    chosen_ms, free_ms = alternated(
        lambda query: index.search(query, K, among=among[next(place) % 20].astype(np.int32)),
        lambda query: index.search(query, K),
        queries_QD,
    )
    row(f"ann {kind}: among {CHOSEN_ADVERTISERS} advertisers, over all", chosen_ms, "ms", ratio=chosen_ms / free_ms)


def simulated_vectors() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unit vectors of ads and users of a simulated world: what they sell and like, with an ad's own part."""
    cfg = SimulatorConfig(users=2000, advertisers=N_ADVERTISERS)
    latents = Truth.draw(cfg, seed=0, period_days=7).latents
    rng = np.random.default_rng(0)
    taste_KD = rng.normal(size=(cfg.tastes, DIM)) / DIM**0.5
    advertiser_AD = np.einsum("at,atd->ad", latents.membership_AT, taste_KD[latents.taste_AT])
    own_AD = rng.normal(size=(N_ADVERTISERS, DIM)) / DIM**0.5
    owner_N = np.arange(N_ADS) // (N_ADS // N_ADVERTISERS)
    ads_ND = (advertiser_AD + 0.5 * own_AD)[owner_N].astype(np.float32)
    ads_ND += rng.normal(size=ads_ND.shape).astype(np.float32) * np.float32(0.4 / DIM**0.5)
    users_UD = np.einsum("ut,utd->ud", latents.theta_UT, taste_KD[latents.taste_UT])
    loyal_U = latents.loyal_UL[:, 0]
    users_UD += np.where(loyal_U[:, None] >= 0, 0.5 * own_AD[loyal_U.clip(0)], 0.0)
    return unit(ads_ND), unit(users_UD[:QUERIES].astype(np.float32))


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """The same directions with length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def timed(search: Callable[[NDArray[np.float32]], Any], queries_QD: NDArray[np.float32]) -> float:
    """Median milliseconds of single queries."""
    seconds = []
    for query in queries_QD:
        began = perf_counter()
        search(query[None])
        seconds.append(perf_counter() - began)
    return float(np.median(seconds) * 1e3)


def alternated(
    ours: Callable[[NDArray[np.float32]], Any],
    theirs: Callable[[NDArray[np.float32]], Any],
    queries_QD: NDArray[np.float32],
) -> tuple[float, float]:
    """Median milliseconds of two searches, by turns, so that what else the machine does falls on both."""
    seconds: list[list[float]] = [[], []]
    for number, query in enumerate(queries_QD):
        for side in (0, 1) if number % 2 else (1, 0):
            began = perf_counter()
            (ours, theirs)[side](query[None])
            seconds[side].append(perf_counter() - began)
    return tuple(float(np.median(values) * 1e3) for values in seconds)  # type: ignore[return-value]


# --- candidates ------------------------------------------------------------------------------------------------


class TableOfForecasts:
    """A forecast a user, looked up; its values are drawn."""

    def __init__(self, n_users: int, n_advertisers: int) -> None:
        mass_UA = np.random.default_rng(0).exponential(size=(n_users, n_advertisers)) ** 3
        self.log_prob_UA = np.log(mass_UA / mass_UA.sum(1, keepdims=True)).astype(np.float32)

    @property
    def n_advertisers(self) -> int:
        return self.log_prob_UA.shape[1]

    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        """The same in all periods."""
        return self.log_prob_UA[user_B]

    def features(self, *_: NDArray[np.integer]) -> dict[str, NDArray[np.float32]]:
        """Retrieval reads none."""
        return {}

    has_interests = False

    def interest_match(self, *asked: NDArray[np.integer]) -> NDArray[np.float32]:
        """It has none."""
        return np.full(len(asked[-1]), np.nan, np.float32)


def candidates() -> None:
    """One user's candidates from three channels, over the parts that no code could leave out."""
    config = compose(["data=simulator", "data.simulator.users=1000", "data.simulator.days=182"])
    with tempfile.TemporaryDirectory() as folder:
        prepare(config.data, Path(folder))
        log = load_log(Path(folder), config.data, evaluate="validation")
    cfg = replace(config.retrieval, channels=[TWO_TOWER, FORECAST, SEEDED])
    codes_AL = np.stack(np.unravel_index(np.arange(len(log.advertiser_ids)), (16, 16, 16)), axis=1)
    towers = untrained(log, codes_AL, replace(cfg.model, popularity_weight=None))
    retriever = Retriever(log, towers, codes_AL, cfg)
    forecast = TableOfForecasts(len(log.user_ids), len(log.advertiser_ids))
    plan = Plan(QuotaBlend({TWO_TOWER: 0.6, FORECAST: 0.3, SEEDED: 0.1}), 0.4, 0.0)
    targets = log.ad_targets("validation")
    targets = targets.select(np.random.default_rng(0).permutation(len(targets))[:QUERIES])
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    ours, parts = _candidate_times(retriever, towers, forecast, plan, targets)
    row("candidates: one user, three channels, p50", float(np.percentile(ours, 50)), "ms")
    ratio = np.percentile(ours, 99) / np.percentile(parts, 99)
    row("candidates: p99 over user tower and raw searches", float(np.percentile(ours, 99)), "ms", ratio=float(ratio))
    ratio = np.percentile(ours, 50) / np.percentile(parts, 50)
    row("candidates: p50 over the same", float(np.percentile(ours, 50)), "ms", ratio=float(ratio))
    fastest = [float(np.percentile(np.reshape(times, (ROUNDS, -1)).min(0), 99)) for times in (ours, parts)]
    name = f"candidates: p99 over the same, each request's fastest of {ROUNDS}"
    row(name, fastest[0], "ms", ratio=fastest[0] / fastest[1])


def untrained(log: Log, codes_AL: NDArray[np.int64], cfg: TwoTowerConfig) -> TrainedTwoTower:
    """Towers with the weights that they start with."""
    text_AE = np.random.default_rng(0).normal(size=(len(log.advertiser_ids), 64)).astype(np.float32)
    model, shape = build_model(log, codes_AL, text_AE, cfg)
    return TrainedTwoTower(model.eval(), index_ads(model, shape, IndexConfig()), shape, cfg)


def _candidate_times(
    retriever: Retriever, towers: TrainedTwoTower, forecast: TableOfForecasts, plan: Plan, targets: Targets
) -> tuple[list[float], list[float]]:
    """Milliseconds of each request by this code, and of the user tower's forward with FAISS's own searches."""
    ours, parts = [], []
    requests, embed = retriever.requests(targets), retriever.embed
    cfg = retriever.cfg
    flat, seeds_SD = towers.index._index, towers.index.vectors(np.arange(cfg.forecast.seed_advertisers, dtype=np.int32))
    for request in requests * ROUNDS:  # a 99th percentile of few is the work of chance
        user, market, period = request.user, request.market, request.period
        began = perf_counter()
        retriever.candidates(user, market, period, plan, forecast)
        ours.append((perf_counter() - began) * 1e3)
        selectors = [
            _rows_of_channel(retriever, replace(request, log_prob_A=forecast.log_prob_UA[user]), name)
            for name in (TWO_TOWER, FORECAST, TWO_TOWER)
        ]
        inputs = embed.inputs(np.array([user]), np.array([market]), np.array([period]))
        began = perf_counter()
        vector = embed.forward(inputs)
        for rows, queries in zip(selectors, (vector, vector, seeds_SD), strict=True):
            flat.search(queries, 2 * K, params=faiss.SearchParameters(sel=faiss.IDSelectorArray(rows)))
        parts.append((perf_counter() - began) * 1e3)
    return ours, parts


def _rows_of_channel(retriever: Retriever, request: Any, name: str) -> NDArray[np.int64]:
    """Rows that a channel searches."""
    if name == TWO_TOWER:
        return request.active.astype(np.int64)
    log, n = retriever.log, retriever.cfg.forecast.advertisers
    own = log.ad_advertiser[request.active]
    best = np.argsort(-request.log_prob_A, kind="stable")
    chosen = best[np.isin(best, own)][:n]
    return request.active[np.isin(own, chosen)].astype(np.int64)


# --- training --------------------------------------------------------------------------------------------------


def training() -> None:
    """Samples a second of two tables of 1M rows, layers of 128 and 64, batches of 32 pairs."""
    ours, theirs = _our_step(), _torchrec_step()
    for step in (ours, theirs):
        for number in range(10):
            step(number)
    seconds: list[list[float]] = [[], []]
    for number in range(STEPS):
        for side, step in enumerate((ours, theirs)):
            began = perf_counter()
            step(number)
            seconds[side].append(perf_counter() - began)
    distributed.destroy_process_group()
    per_second = [PAIRS / float(np.median(values)) for values in seconds]
    row("training: samples a second, torchrec's parts", per_second[1], "1/s")
    row("training: samples a second, over torchrec's", per_second[0], "1/s", ratio=per_second[0] / per_second[1])


def _pairs(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return tuple(torch.randint(0, ROWS, (PAIRS,), generator=generator) for _ in range(2))  # type: ignore[return-value]


def _our_step() -> Callable[[int], None]:
    """Adam, softmax over the batch; the user is its id alone, without a history; no dropout, as theirs has none."""
    cfg = TwoTowerConfig(dim=LAYERS[1], hidden=LAYERS[0], dropout=0.0, popularity_weight=None)
    shape = TwoTowerShape({"ad": ROWS}, {"user": ROWS}, text_dim=0, ages=1, counts=1)
    ids_N1, nobody_N = torch.arange(ROWS).unsqueeze(1), torch.full((ROWS,), -1)
    encoder = ItemEncoder(ids_N1, nobody_N, torch.zeros(0, 0), shape=shape, dim=cfg.dim)
    module = TwoTowerModule(TwoTower(encoder, shape, cfg), cfg, n_ads=ROWS)
    optimizer, nothing_B0 = module.configure_optimizers(), torch.zeros(PAIRS, 0, dtype=torch.int64)
    every_P, nothing_P, nothing_PP = torch.arange(PAIRS), torch.zeros(PAIRS), torch.zeros(PAIRS, PAIRS)
    others_PP = ~torch.eye(PAIRS, dtype=torch.bool)

    def step(number: int) -> None:
        user_B, ad_B = _pairs(number)
        batch = Batch(
            history_BH=nothing_B0,
            age_BH=nothing_B0,
            count_BH=nothing_B0,
            profile_BF=user_B.unsqueeze(1),
            context_BF=nothing_B0,
            ads=Candidates(
                item_C=ad_B,
                pair_row_P=every_P,
                pair_column_P=every_P,
                log_q_C=nothing_P,
                log_count_C=nothing_P,
                legal_BC=others_PP,
                popularity_BC=nothing_PP,
            ),
            advertisers=None,
        )
        optimizer.zero_grad()
        module.loss(batch).backward()
        optimizer.step()

    return step


def _torchrec_step() -> Callable[[int], None]:
    """Row-wise Adagrad fused into the sharded tables, Adam of the layers, a binary loss of labelled pairs."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
    from torchrec.distributed.model_parallel import DistributedModelParallel
    from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
    from torchrec.optim.keyed import KeyedOptimizerWrapper

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    names = ["user", "ad"]
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=LAYERS[1], num_embeddings=ROWS, feature_names=[name])
        for name in names
    ]
    sharder = EmbeddingBagCollectionSharder({"learning_rate": 0.01, "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD})
    towers = _UserAndAd(EmbeddingBagCollection(tables=tables, device=torch.device("meta")))
    planner = EmbeddingShardingPlanner(topology=Topology(world_size=1, compute_device="cpu"))
    plan = planner.collective_plan(towers, [sharder], distributed.GroupMember.WORLD)
    model = DistributedModelParallel(towers, device=torch.device("cpu"), plan=plan, sharders=[sharder])
    optimizer = KeyedOptimizerWrapper(dict(model.named_parameters()), lambda params: torch.optim.Adam(params, lr=0.01))
    label_B = torch.randint(0, 2, (PAIRS,)).float()

    def step(number: int) -> None:
        optimizer.zero_grad()
        logits_B = model(single_valued(torch.stack(_pairs(number), dim=1), names))
        nn.functional.binary_cross_entropy_with_logits(logits_B, label_B).backward()
        optimizer.step()

    return step


class _UserAndAd(nn.Module):
    """Two ids, embedded, each through its own layers; the score is their inner product."""

    def __init__(self, bags: EmbeddingBagCollection) -> None:
        super().__init__()
        self.bags = bags
        self.user, self.ad = (MLP(in_size=LAYERS[1], layer_sizes=LAYERS) for _ in range(2))

    def forward(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        pooled = self.bags(ids)
        return (self.user(pooled["user"]) * self.ad(pooled["ad"])).sum(1)


# --- beauty ----------------------------------------------------------------------------------------------------


BEAUTY = (
    "experiment=full", "retrieval=sequences", "retrieval.pairs.recall_at=10", "trainer.progress_bar=false",
    "data=parquet", "data.origin='2000-01-01'", "data.label_kinds=[click_conversion]", "data.label_window_days=1",
    "data.split.by=leave_one_out", "data.ad_columns=[category]",
)  # fmt: skip
TOP = 10
EASE_RIDGES, KNN_DECAYS = (200.0, 500.0), (1.0, 0.8, 0.6, 0.4)
Scores = Callable[[Targets], NDArray[np.floating]]


def beauty(folder: Path | None) -> None:
    """Recall and NDCG at 10 of the last item, every item ranked but those bought before."""
    if folder is None:
        raise SystemExit("name the tables: python -m benchmarks.retrieval beauty /data/beauty-tables")
    config = compose([*BEAUTY, f"data.path={folder}"])
    log = load_log(folder, config.data, evaluate="test")
    last = log.split.test[0]
    choose, final = (log.ad_targets((period, period)) for period in (last - 1, last))
    models: dict[str, Callable[[], Scores]] = {
        "popularity": lambda: popularity_scores(log),
        "item-kNN": lambda: best_of([knn_scores(log, last - 1, decay) for decay in KNN_DECAYS], log, choose),
        "EASE": lambda: best_of([ease_scores(log, last - 1, ridge) for ridge in EASE_RIDGES], log, choose),
        "two-tower": lambda: two_tower_scores(log, config.retrieval, last),
    }
    for name, make in models.items():
        recall, ndcg = measured(make(), log, final)
        row(f"beauty {name}: recall@{TOP}, over TIGER's", recall, "share", ratio=recall / PUBLISHED["TIGER"][0])
        row(f"beauty {name}: NDCG@{TOP}, over TIGER's", ndcg, "share", ratio=ndcg / PUBLISHED["TIGER"][1])
    for name, (recall, ndcg) in PUBLISHED.items():
        row(f"beauty {name}, published: recall@{TOP}", recall, "share")
        row(f"beauty {name}, published: NDCG@{TOP}", ndcg, "share")


def measured(scores: Scores, log: Log, targets: Targets) -> tuple[float, float]:
    """Mean recall and NDCG at 10."""
    lists, purchases = [], Purchases(log)
    for rows in np.array_split(np.arange(len(targets)), 64):
        part = targets.select(rows)
        score_RI = np.array(scores(part), dtype=np.float64)
        for place in range(len(part)):
            bought = purchases.of(int(part.user[place]), int(part.period[place])).ad  # not what was only shown
            score_RI[place, bought[bought >= 0]] = -np.inf
        top = np.argpartition(-score_RI, TOP, axis=1)[:, :TOP]
        order = np.argsort(-np.take_along_axis(score_RI, top, axis=1), axis=1, kind="stable")
        lists.append(np.take_along_axis(top, order, axis=1))
    hit_RK, count_R = hits(np.concatenate(lists).astype(np.int32), targets.ptr, targets.item), np.diff(targets.ptr)
    return float(np.nanmean(recall_at_k(hit_RK, count_R, TOP))), float(np.nanmean(ndcg_at_k(hit_RK, count_R, TOP)))


def best_of(models: Sequence[Scores], log: Log, targets: Targets) -> Scores:
    """The one with the best recall on the items that constants are chosen by."""
    return max(models, key=lambda scores: measured(scores, log, targets)[0])


def bought_matrix(log: Log, before: int, *, decay: float = 1.0) -> csr_array:
    """Users by items of purchases before a period, weighted by how many purchases ago."""
    events = log.events
    rows = np.flatnonzero(log.is_label & (events.ad >= 0) & (events.period < before))
    weight = decay ** (before - 1.0 - events.period[rows])
    shape = (len(log.user_ids), len(log.ad_ids))
    matrix = csr_array((weight, (events.user[rows], events.ad[rows])), shape=shape)
    matrix.sum_duplicates()
    return matrix


def popularity_scores(log: Log) -> Scores:
    """How often each item was bought before the period."""

    def scores(targets: Targets) -> NDArray[np.floating]:
        counts_I = np.asarray(bought_matrix(log, int(targets.period.max())).sum(0)).reshape(-1)
        return np.tile(counts_I, (len(targets), 1))

    return scores


def knn_scores(log: Log, before: int, decay: float) -> Scores:
    """Cosine neighbours of a user's items, the latest counting most."""
    ones = bought_matrix(log, before)
    ones.data = np.ones_like(ones.data, dtype=np.float32)
    near = Neighbours.of(csr_array(ones.astype(np.float32)), neighbours=200, shrinkage=2.0)
    near_II = csr_array((near.similarity, near.ad, near.ptr), shape=(ones.shape[1],) * 2)

    def scores(targets: Targets) -> NDArray[np.floating]:
        return (bought_matrix(log, int(targets.period.max()), decay=decay)[targets.user] @ near_II).toarray()

    return scores


def ease_scores(log: Log, before: int, ridge: float) -> Scores:
    """EASE (Steck, WWW 2019): the linear item-item model with a zero diagonal, in closed form."""
    ones = bought_matrix(log, before).astype(np.float32)
    gram_II = (ones.T @ ones).toarray()
    gram_II[np.diag_indices_from(gram_II)] += ridge
    inverse_II = np.linalg.inv(gram_II)
    weights_II = inverse_II / -np.diag(inverse_II)
    np.fill_diagonal(weights_II, 0.0)

    def scores(targets: Targets) -> NDArray[np.floating]:
        return bought_matrix(log, int(targets.period.max())).astype(np.float32)[targets.user] @ weights_II

    return scores


def two_tower_scores(log: Log, cfg: RetrievalConfig, last: int) -> Scores:
    """Trained on all but the last two items, its epoch chosen by the last but one."""
    codes_AL = np.arange(len(log.advertiser_ids))[:, None]
    text_AE = np.zeros((len(log.advertiser_ids), 0), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        spans: dict[str, Any] = {"fit_span": (1, last - 2), "select_span": (last - 1, last - 1)}
        towers, _ = train_two_tower(log, codes_AL, text_AE, cfg, work_dir=Path(folder), **spans)
    embed = towers.embedder(log, cfg.pairs)
    vectors_ID = ad_vectors(towers.model, len(log.ad_ids)).numpy()

    def scores(targets: Targets) -> NDArray[np.floating]:
        score_RI = (
            np.nan_to_num(embed(targets.user, targets.market, targets.period)) @ vectors_ID.T / towers.cfg.temperature
        )
        counts_I = np.asarray(bought_matrix(log, int(targets.period.max())).sum(0)).reshape(-1)
        return score_RI + towers.popularity_weight * np.log1p(counts_I)

    return scores


if __name__ == "__main__":
    main()
