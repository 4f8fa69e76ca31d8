"""Samples that depend on ids and a seed alone: users of a trial, and the ads a visit was not converted by.

Nothing is drawn from a generator whose state depends on what came before, so neither a later event nor another
user's changes a draw.

Shapes: V visits, C candidates.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.config import DataConfig


def hash_ids(ids: NDArray[Any], *, seed: int) -> NDArray[np.uint64]:
    """Hashes of ids that depend on nothing but the id and the seed, the same on every machine."""
    key = seed.to_bytes(8, "little", signed=True)
    digests = (blake2b(str(value).encode(), digest_size=8, key=key).digest() for value in ids.tolist())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def choose_users(ids: pl.Series, n: int, *, seed: int) -> pl.Series:
    """The ``n`` users with the smallest hashes.

    Args:
        ids: ids of the users to choose from, repeated at will.
        n: how many; all where there are fewer.
        seed: of the hash.
    """
    distinct = ids.drop_nulls().unique().sort()
    order = np.argsort(hash_ids(distinct.to_numpy(), seed=seed), kind="stable")[:n]
    return distinct[np.sort(order)]


def trial_users(cfg: DataConfig, labels: pl.LazyFrame, events: pl.LazyFrame) -> pl.Series:
    """The users of ``cfg.max_users``: those seen in the prior's fit span with the smallest hashes.

    Args:
        cfg: says how many, and the split.
        labels: ``timestamp`` of the log's conversions.
        events: ``user_id`` and ``timestamp`` of what counts as having been seen.

    Raises:
        UserError: the split does not fit the log.
    """
    if cfg.max_users is None:
        raise ValueError("data.max_users is null: all users stay")
    calendar, split = cfg.timeline(labels)
    first, last = calendar.start(split.prior_fit[0]), calendar.start(split.prior_fit[1] + 1)
    seen = events.filter(pl.col("timestamp").is_between(first, last, closed="left"))
    ids = seen.select(pl.col("user_id").unique()).collect(engine="streaming").to_series()
    return choose_users(ids, cfg.max_users, seed=cfg.seed)


def sample_impressions(
    visits: pl.DataFrame, pool: pl.Series, bought: pl.DataFrame, *, per_visit: int, seed: int
) -> pl.DataFrame:
    """Ads a visit could have shown and was not converted by, without replacement.

    The draw of a visit depends on the seed, its request and its eligible ads alone.

    Args:
        visits: one row a visit: ``request_id`` (whole number), and its eligible ads as ``first`` and ``eligible``,
            the rows ``pool[first : first + eligible]``.
        pool: ids of ads; within a visit's rows each stands once.
        bought: ``request_id`` and ``ad_id`` of conversions, among the eligible ads.
        per_visit: how many to draw; fewer where no more are left.
        seed: of the draws.

    Returns:
        ``visit`` (row of ``visits``), ``row`` (of the pool) and ``sample_weight``: eligible ads that were not
        converted, over those drawn.
    """
    first_V, eligible_V = visits["first"].to_numpy(), visits["eligible"].to_numpy()
    salt = hash_ids(np.array([seed]), seed=0)[0]
    base_V = _mix(visits["request_id"].to_numpy().astype(np.uint64) ^ salt)
    bought = bought.unique()
    bought_V = visits.join(bought.group_by("request_id").len("n"), on="request_id", how="left", maintain_order="left")
    free_V = eligible_V - bought_V["n"].fill_null(0).cast(pl.Int64).to_numpy()

    # Where few ads run all are candidates; elsewhere positions are drawn, with some to spare for duplicates.
    draws = 2 * per_visit + 16
    few = eligible_V <= 4 * draws
    candidates = [
        _candidates(np.flatnonzero(few), eligible_V[few], None, base_V),
        _candidates(np.flatnonzero(~few), eligible_V[~few], draws, base_V),
    ]
    visit_C, position_C, rank_C = (np.concatenate(part) for part in zip(*candidates, strict=True))
    row_C = first_V[visit_C] + position_C
    drawn = (
        pl.DataFrame(
            {
                "visit": visit_C,
                "rank": rank_C,
                "row": row_C,
                "ad_id": pool.gather(row_C),
                "request_id": visits["request_id"].gather(visit_C),
            }
        )
        .join(bought, on=["request_id", "ad_id"], how="anti")
        .sort("visit", "rank")
        .unique(("visit", "ad_id"), keep="first", maintain_order=True)
        .group_by("visit", maintain_order=True)
        .head(per_visit)
    )
    drawn = drawn.join(drawn.group_by("visit").len("sampled"), on="visit", how="left", maintain_order="left")
    weight = free_V[drawn["visit"].to_numpy()] / drawn["sampled"].to_numpy()
    return drawn.select("visit", "row", pl.Series("sample_weight", weight.astype(np.float32)))


def _candidates(
    visit_V: NDArray[np.int64], eligible_V: NDArray[np.int64], draws: int | None, base_V: NDArray[np.uint64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
    """Candidates of some visits: visit, position among its eligible ads, order of choice.

    Args:
        visit_V: visits, as rows of ``base_V``.
        eligible_V: number of eligible ads of each.
        draws: positions drawn with replacement; None takes all of them, in random order.
        base_V: hash of each visit.
    """
    count_V = eligible_V if draws is None else np.full(len(visit_V), draws)
    visit_C = np.repeat(visit_V, count_V)
    number_C = np.arange(count_V.sum()) - np.repeat(np.cumsum(count_V) - count_V, count_V)
    hash_C = _mix(base_V[visit_C] + number_C.astype(np.uint64))
    if draws is None:
        return visit_C, number_C, hash_C
    return (
        visit_C,
        (hash_C % np.repeat(eligible_V, count_V).astype(np.uint64)).astype(np.int64),
        number_C.astype(np.uint64),
    )


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea & Flood 2014)."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
