"""What the two-tower reads: items, histories, and batches of requests.

An *item* is something a history can hold: an ad, or an advertiser of which something was bought that was
no ad. Item ``i`` below the number of ads is ad ``i``; item ``n_ads + a`` is advertiser ``a``.

A history of period ``w`` holds purchases of periods below ``w`` only.

Shapes: B users, H history, W window, N items, I ads, A advertisers, F features, L levels, P (request, target)
pairs, C candidates, M items, L lists of active ads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.log import Log, Targets
from models.two_tower import NO_ITEM, Batch, Candidates, ValidationBatch
from retrieval.config import PairsConfig
from retrieval.counts import Popularity

AGE_EDGES = (1, 2, 4, 8, 16, 32)
COUNT_EDGES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Items:
    """Features of every item.

    Attributes:
        codes_NF: code of each categorical feature, 0 = unknown.
        sizes: name → number of codes, in the order of the columns.
        advertiser_N: advertiser, -1 for none.
    """

    codes_NF: NDArray[np.int32]
    sizes: dict[str, int]
    advertiser_N: NDArray[np.int32]


def build_items(log: Log, codes_AL: NDArray[np.int64]) -> Items:
    """Ad id, advertiser id, every semantic-ID prefix and the ad's categorical columns.

    Args:
        log: gives ads, their advertisers and columns.
        codes_AL: semantic IDs. Their last level is left out: the whole ID names the advertiser.

    Raises:
        ValueError: the IDs are of another number of advertisers.
    """
    n_ads, n_advertisers = len(log.ad_ids), len(log.advertiser_ids)
    if len(codes_AL) != n_advertisers:
        raise ValueError(f"semantic IDs of {len(codes_AL)} advertisers for a log of {n_advertisers}")
    advertiser_N = np.concatenate([log.ad_advertiser, np.arange(n_advertisers)]).astype(np.int32)
    columns = {
        "ad": np.concatenate([np.arange(1, n_ads + 1), np.zeros(n_advertisers)]),
        "advertiser": advertiser_N + 1,
    }
    for level in range(1, codes_AL.shape[1]):
        _, prefix_A = np.unique(codes_AL[:, :level], axis=0, return_inverse=True)
        columns[f"prefix_{level}"] = np.concatenate(([0], prefix_A.reshape(-1) + 1))[advertiser_N + 1]
    for name, codes_I in log.ad_features.items():
        columns[f"ad_{name}"] = np.concatenate([codes_I, np.zeros(n_advertisers)])
    sizes = {name: int(codes.max(initial=0)) + 1 for name, codes in columns.items()}
    return Items(np.stack(list(columns.values()), axis=1).astype(np.int32), sizes, advertiser_N)


@dataclass(frozen=True)
class History:
    """Histories of users; see :class:`models.two_tower.Batch` for the columns."""

    item_BH: NDArray[np.int64]
    age_BH: NDArray[np.int64]
    count_BH: NDArray[np.int64]

    def tensors(self) -> dict[str, torch.Tensor]:
        """The columns under the names of a batch."""
        return {
            "history_BH": torch.from_numpy(self.item_BH),
            "age_BH": torch.from_numpy(self.age_BH),
            "count_BH": torch.from_numpy(self.count_BH),
        }


class Histories:
    """Looks up what users bought before a period: each item once, latest first.

    Args:
        log: the events.
        cfg: length of a history and of the window it is taken from.
    """

    def __init__(self, log: Log, cfg: PairsConfig) -> None:
        events = log.events
        rows = np.flatnonzero(log.is_purchase & ((events.ad >= 0) | (events.advertiser >= 0)))
        user, period = events.user[rows].astype(np.int64), events.period[rows]
        n_ads, n_items = len(log.ad_ids), len(log.ad_ids) + len(log.advertiser_ids)
        self.item = np.where(events.ad[rows] >= 0, events.ad[rows], n_ads + events.advertiser[rows]).astype(np.int64)
        self.period = period
        self.ptr = np.searchsorted(user, np.arange(len(log.user_ids) + 1))
        # Within (user, item), events stay in order of time: the sort is stable.
        order = np.argsort(user * n_items + self.item, kind="stable")
        key = (user * n_items + self.item)[order]
        first = np.flatnonzero(np.diff(key, prepend=-1))
        self.count = np.empty(len(rows), dtype=np.int64)
        self.count[order] = np.arange(len(rows)) - np.repeat(first, np.diff(first, append=len(rows))) + 1
        self.next_period = np.full(len(rows), np.iinfo(np.int32).max, dtype=np.int32)
        same = np.flatnonzero(key[1:] == key[:-1])
        self.next_period[order[same]] = period[order[same + 1]]
        # One sorted key answers "how many events of this user before this period".
        self._span = int(period.max(initial=0)) + 2
        self._key = user * self._span + events.counted_period[rows]
        self.length, self.window = cfg.history, cfg.window

    def sizes(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.int64]:
        """Number of purchases of users before periods, shape ``(B,)``."""
        return self._end(user_B, period_B) - self.ptr[user_B]

    def __call__(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> History:
        """Histories of users at the start of periods, padded at the end with ``NO_ITEM``."""
        end_B, start_B = self._end(user_B, period_B), self.ptr[user_B]
        row_BW = end_B[:, None] - 1 - np.arange(self.window)
        there_BW = row_BW >= start_B[:, None]
        row_BW = np.where(there_BW, row_BW, 0)
        if not len(self.item):
            there_BW[:] = False
            return self._empty(len(user_B))
        latest_BW = there_BW & (self.next_period[row_BW] >= np.asarray(period_B)[:, None])
        place_BW = latest_BW.cumsum(1) - 1
        kept_b, kept_w = np.nonzero(latest_BW & (place_BW < self.length))
        place, row = place_BW[kept_b, kept_w], row_BW[kept_b, kept_w]
        history = self._empty(len(user_B))
        history.item_BH[kept_b, place] = self.item[row]
        ages = np.asarray(period_B)[kept_b] - self.period[row]
        history.age_BH[kept_b, place] = np.searchsorted(AGE_EDGES, ages)
        history.count_BH[kept_b, place] = np.searchsorted(COUNT_EDGES, self.count[row])
        return history

    def _end(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.int64]:
        period = np.clip(np.asarray(period_B, dtype=np.int64), 0, self._span - 1)
        return np.searchsorted(self._key, np.asarray(user_B, dtype=np.int64) * self._span + period)

    def _empty(self, n: int) -> History:
        shape = (n, self.length)
        return History(np.full(shape, NO_ITEM, dtype=np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64))


def profiles(log: Log) -> NDArray[np.int64]:
    """Profile codes of every user, shape ``(U, F)``."""
    columns = [codes.astype(np.int64) for codes in log.user_features.values()]
    return np.stack(columns, axis=1) if columns else np.zeros((len(log.user_ids), 0), dtype=np.int64)


@dataclass(frozen=True)
class ActiveLists:
    """What runs in the markets and periods of a batch's requests; those of one visit the same list, kept once.

    Attributes:
        which_B: list of each request.
        cells: market and period of each list.
        items: what each list holds, rising: ads, or their advertisers.
    """

    which_B: NDArray[np.int64]
    cells: list[tuple[int, int]]
    items: list[NDArray[np.int32]]

    def mask(self, column_of: NDArray[np.int64], n_columns: int) -> NDArray[np.bool_]:
        """Whether each column's item is in each request's list; ``column_of`` has the column of an item, or -1."""
        mask_LC = np.zeros((len(self.items), n_columns), dtype=bool)
        for mask_C, items in zip(mask_LC, self.items, strict=True):
            column = column_of[items]
            mask_C[column[column >= 0]] = True
        return mask_LC[self.which_B]


def context_values(log: Log, targets: Targets, names: Sequence[str]) -> dict[str, list[Any]]:
    """The values of each feature of the context that some requests had; their codes are 1, 2, and so on."""
    seen = np.unique(targets.market)
    return {name: log.market_ids[seen[seen >= 0]].tolist() for name in names}  # market is all there is


class Contexts:
    """Looks up codes of requests' context.

    Codes follow the values that the towers were trained on, not the log's own indexes: a log that goes on can have
    more markets.

    Args:
        log: names its markets.
        values: of `context_values`.
    """

    def __init__(self, log: Log, values: Mapping[str, Sequence[Any]]) -> None:
        markets = log.market_ids.tolist()
        self._codes, self._n_markets = [], len(markets)
        for known in values.values():
            code_of = {value: code for code, value in enumerate(known, 1)}
            # The last is read by -1, no market.
            self._codes.append(np.array([*(code_of.get(market, 0) for market in markets), 0], dtype=np.int64))

    def __call__(self, market_B: NDArray[np.integer]) -> NDArray[np.int64]:
        """Codes at the markets of requests, 0 where one was not trained on, shape ``(B, F)``."""
        known_B = np.where(market_B < self._n_markets, market_B, -1)
        codes = [codes[known_B] for codes in self._codes]
        return np.stack(codes, axis=1) if codes else np.zeros((len(market_B), 0), dtype=np.int64)


class UserInputs:
    """Looks up what the user tower reads of requests, in training and serving alike.

    Args:
        log: the purchases, profiles and markets.
        cfg: length of a history and of the window it is taken from.
        context: values of the context's features that the towers know; none leave it out.
    """

    def __init__(self, log: Log, cfg: PairsConfig, *, context: Mapping[str, Sequence[Any]] | None = None) -> None:
        self.histories = Histories(log, cfg)
        self._profile_UF, self._contexts = profiles(log), Contexts(log, context or {})

    def __call__(
        self, user_B: NDArray[np.integer], market_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> dict[str, torch.Tensor]:
        """The user side of a :class:`~models.two_tower.Batch`."""
        return {
            **self.histories(user_B, period_B).tensors(),
            "profile_BF": torch.from_numpy(self._profile_UF[user_B]),
            "context_BF": torch.from_numpy(self._contexts(market_B)),
        }


class RequestBatches:
    """Collates requests, named by their row, into batches.

    A batch is a pure function of the seed and its rows, so that a resumed run sees the batches of an
    undisturbed one.

    Args:
        log: the log.
        targets: converted ads of requests.
        users: looks up what the user tower reads.
        cfg: sizes.
        seed: of the draws.
    """

    def __init__(self, log: Log, targets: Targets, users: UserInputs, cfg: PairsConfig, *, seed: int) -> None:
        self.log, self.targets, self.users, self.cfg, self.seed = log, targets, users, cfg, seed
        self.popularity = log_popularity(log, cfg)

    def __len__(self) -> int:
        return len(self.targets)

    def inputs(self, rows_B: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """The user side of requests."""
        targets = self.targets
        return self.users(targets.user[rows_B], targets.market[rows_B], targets.period[rows_B])

    def active(self, rows_B: NDArray[np.int64]) -> ActiveLists:
        """Active ads of requests."""
        visits = np.stack([self.targets.market[rows_B], self.targets.period[rows_B]])
        distinct, which_B = np.unique(visits, axis=1, return_inverse=True)
        cells = [(market, period) for market, period in distinct.T.tolist()]
        return ActiveLists(which_B.reshape(-1), cells, [self.log.active_ads(*cell).ad for cell in cells])


def popularities(
    popularity: LogPopularity, active: ActiveLists, items_M: NDArray[np.int32], wanted_BM: NDArray[np.bool_]
) -> NDArray[np.float32]:
    """Log-popularity of rising items at each request, 0 where it is not wanted."""
    popularity_BM = np.zeros(wanted_BM.shape, dtype=np.float32)
    for number, (market, period) in enumerate(active.cells):
        rows = np.flatnonzero(active.which_B == number)
        chosen = np.flatnonzero(wanted_BM[rows].any(0))
        popularity_BM[np.ix_(rows, chosen)] = popularity(items_M[chosen], market, period)
    popularity_BM[~wanted_BM] = 0.0
    return popularity_BM


class LogPopularity:
    """Logarithm of one plus the decayed conversions of an ad, or an advertiser, before a request."""

    def __init__(self, popularity: Popularity) -> None:
        self.popularity = popularity

    def __call__(self, items_M: NDArray[np.int32], market: int, period: int) -> NDArray[np.float32]:
        """Of rising items, ``(M,)``."""
        return np.log1p(self.popularity(items_M, market, period)).astype(np.float32)


def log_popularity(log: Log, cfg: PairsConfig, *, of_advertisers: bool = False) -> LogPopularity:
    """What the bias of the two-tower reads, or that of the advertiser tower."""
    how = cfg.popularity
    return LogPopularity(
        Popularity(log, decay=how.decay, market_weight=how.market_weight, of_advertisers=of_advertisers)
    )


@dataclass(frozen=True)
class Catalogue:
    """What candidates are drawn from: the ads, or the advertisers.

    Attributes:
        log_q: logarithm of how often each is expected among the candidates of a full batch.
        popularity: of each at a request.
    """

    log_q: NDArray[np.float64]
    popularity: LogPopularity


Pairs = tuple[NDArray[np.int64], NDArray[np.int32]]
"""Position of a request in its batch, and an ad or an advertiser; ``(P,)`` each."""


class TrainingBatches(RequestBatches):
    """Batches with targets and sampled candidates.

    Args:
        log, targets, users, cfg, seed: as of :class:`RequestBatches`.
        advertisers: whether an advertiser tower learns from them too.
    """

    def __init__(
        self,
        log: Log,
        targets: Targets,
        users: UserInputs,
        cfg: PairsConfig,
        *,
        seed: int,
        advertisers: bool = False,
    ) -> None:
        super().__init__(log, targets, users, cfg, seed=seed)
        self.ads = Catalogue(np.log(self.expected_counts()), self.popularity)
        self.advertisers = None
        if advertisers:
            popularity = log_popularity(log, cfg, of_advertisers=True)
            self.advertisers = Catalogue(np.log(self.expected_advertisers()), popularity)

    def expected_counts(self) -> NDArray[np.float64]:
        """How often each ad is expected among the candidates of a full batch, shape ``(I,)``.

        Its expected count among the targets plus that among the ads drawn from placements. An ad that can
        be neither has a tiny positive value, for the logarithm.
        """
        as_target_I = np.bincount(self.targets.item, self._target_chances(), len(self.log.ad_ids)) / len(self.targets)
        return self.cfg.batch_size * as_target_I + self.cfg.sampled_negatives * self._drawn_shares() + 1e-9

    def expected_advertisers(self) -> NDArray[np.float64]:
        """The same of every advertiser, shape ``(A,)``; one with several targets of a request stands there once."""
        owner_T, n = self.log.ad_advertiser[self.targets.item], len(self.log.advertiser_ids)
        known_T = owner_T >= 0
        cells, cell_N = np.unique(self.targets.row[known_T] * n + owner_T[known_T], return_inverse=True)
        # At most 1: exact where an advertiser has one target or all are drawn, else a little high.
        chance_C = np.minimum(1.0, np.bincount(cell_N, self._target_chances()[known_T], len(cells)))
        as_target_A = np.bincount(cells % n, chance_C, n) / len(self.targets)
        owned = self.log.ad_advertiser >= 0
        drawn_A = np.bincount(self.log.ad_advertiser[owned], self._drawn_shares()[owned], n)
        return self.cfg.batch_size * as_target_A + self.cfg.sampled_negatives * drawn_A + 1e-9

    def _target_chances(self) -> NDArray[np.float64]:
        """How likely each target is to be among those drawn of its request."""
        chance_R = np.minimum(1.0, self.cfg.targets_per_request / np.maximum(np.diff(self.targets.ptr), 1))
        return chance_R[self.targets.row]

    def _drawn_shares(self) -> NDArray[np.float64]:
        """How likely one ad drawn from placements is to be each ad."""
        targets, drawn_I = self.targets, np.zeros(len(self.log.ad_ids))
        cells, visits = np.unique(np.stack([targets.market, targets.period]), axis=1, return_counts=True)
        for (market, period), n in zip(cells.T.tolist(), visits.tolist(), strict=True):
            ads = self.log.active_ads(market, period).ad
            drawn_I[ads] += n / len(targets) / max(len(ads), 1)
        return drawn_I

    def __call__(self, rows: Sequence[int]) -> Batch:
        """The batch of some requests."""
        rows_B = np.asarray(rows, dtype=np.int64)
        rng = np.random.default_rng([self.seed, len(rows_B), *rows_B[:4].tolist()])
        pairs, every = self._pairs(rows_B, rng)
        active = self.active(rows_B)
        drawn = self._draw_negatives(active, rng)
        advertisers = None
        if self.advertisers is not None:
            own_D = self.log.ad_advertiser[drawn]
            own = self._owners(*pairs)
            if len(own[0]):
                owners = [np.unique(self.log.ad_advertiser[ads]) for ads in active.items]
                active_owners = replace(active, items=[own_A[own_A >= 0] for own_A in owners])
                advertisers = self._candidates(
                    self.advertisers, own, self._owners(*every), active_owners, own_D[own_D >= 0]
                )
        return Batch(
            **self.inputs(rows_B),  # type: ignore[typeddict-item]
            ads=self._candidates(self.ads, pairs, every, active, drawn),
            advertisers=advertisers,
        )

    def _candidates(
        self,
        catalogue: Catalogue,
        pairs: Pairs,
        every: Pairs,
        active: ActiveLists,
        drawn_D: NDArray[np.int32],
    ) -> Candidates:
        """Drawn pairs and negatives, with what each request may score: what is active, and no other target of it."""
        items_C, column_N, count_C = np.unique(
            np.concatenate([pairs[1], drawn_D]), return_inverse=True, return_counts=True
        )
        column_of = np.full(len(catalogue.log_q), -1, dtype=np.int64)
        column_of[items_C] = np.arange(len(items_C))
        legal_BC = active.mask(column_of, len(items_C))
        column = column_of[every[1]]
        scored_BC = legal_BC.copy()
        scored_BC[every[0][column >= 0], column[column >= 0]] = True
        legal_BC[every[0][column >= 0], column[column >= 0]] = False
        popularity_BC = popularities(catalogue.popularity, active, items_C, scored_BC)
        return Candidates(
            item_C=torch.from_numpy(items_C.astype(np.int64)),
            pair_row_P=torch.from_numpy(pairs[0]),
            pair_column_P=torch.from_numpy(column_N[: len(pairs[0])]),
            log_q_C=torch.from_numpy(catalogue.log_q[items_C].astype(np.float32)),
            log_count_C=torch.from_numpy(np.log(count_C).astype(np.float32)),
            legal_BC=torch.from_numpy(legal_BC),
            popularity_BC=torch.from_numpy(popularity_BC),
        )

    def _owners(self, row_P: NDArray[np.int64], ad_P: NDArray[np.int32]) -> Pairs:
        """Distinct (request, advertiser) of (request, ad), those of no advertiser left out."""
        own_P, n = self.log.ad_advertiser[ad_P], len(self.log.advertiser_ids)
        cells = np.unique(row_P[own_P >= 0] * n + own_P[own_P >= 0])
        return cells // n, (cells % n).astype(np.int32)

    def _pairs(self, rows_B: NDArray[np.int64], rng: np.random.Generator) -> tuple[Pairs, Pairs]:
        """Drawn (position, target) pairs, and all of them."""
        targets = self.targets.select(rows_B)
        shuffled = np.lexsort((rng.random(len(targets.item)), targets.row))
        rank = np.arange(len(shuffled)) - np.repeat(targets.ptr[:-1], np.diff(targets.ptr))
        drawn = shuffled[rank < self.cfg.targets_per_request]
        return (targets.row[drawn], targets.item[drawn]), (targets.row, targets.item)

    def _draw_negatives(self, active: ActiveLists, rng: np.random.Generator) -> NDArray[np.int32]:
        """Ads drawn uniformly from the placements of requests drawn uniformly."""
        size_L = np.array([len(ads) for ads in active.items])
        list_D = active.which_B[rng.integers(0, len(active.which_B), self.cfg.sampled_negatives)]
        list_D = list_D[size_L[list_D] > 0]
        place_D = rng.integers(0, size_L[list_D])
        return np.concatenate(active.items)[(np.cumsum(size_L) - size_L)[list_D] + place_D]


class ValidationBatches(RequestBatches):
    """Batches scored against every active ad; arguments as of :class:`RequestBatches`."""

    def __call__(self, rows: Sequence[int]) -> ValidationBatch:
        """The batch of some requests."""
        rows_B = np.asarray(rows, dtype=np.int64)
        ads_I = np.arange(len(self.log.ad_ids), dtype=np.int32)
        active = self.active(rows_B)
        active_BI = active.mask(ads_I.astype(np.int64), len(ads_I))
        target_BI = np.zeros_like(active_BI)
        targets = self.targets.select(rows_B)
        target_BI[targets.row, targets.item] = True
        return ValidationBatch(
            **self.inputs(rows_B),  # type: ignore[typeddict-item]
            active_BN=torch.from_numpy(active_BI),
            target_BN=torch.from_numpy(target_BI),
            popularity_BN=torch.from_numpy(popularities(self.popularity, active, ads_I, active_BI)),
        )
