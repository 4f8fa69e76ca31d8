"""The PriorTable: what was forecast, for whom and when.

One row a user and as-of time; Parquet, ``period=<period>/<shard>.parquet``, rows of a shard in order of users:

    user_id, period, as_of           the forecast may be used from the start of ``period`` on
    decoded_period                   when it was decoded: before ``period`` where nothing happened since
    advertiser_id, log_prob          the advertisers found, best first, with exact log-probabilities
    anchor_log_prob                  what the tuned anchor gives the same advertisers
    level1_log_prob                  every level-1 prefix, in trie order
    frontier_depth, frontier_node,   pruned prefixes above the floor; what remains of a level-1 prefix
    frontier_log_prob                  is its mass without its advertisers and its listed prefixes
    remainder                        mass of neither an advertiser nor a prefix below level 1 that is listed
    mass                             probability covered by the advertisers found
    bound, certified                 likeliest pruned prefix, and whether the list is proven to be the best of all
    interest, interest_log_prob,     the likeliest interests, best first, with exact log-probabilities, and what
    interest_anchor_log_prob           their anchor gives them; empty where the forecaster has none
    tokens                           tokens computed for the row
    model, trie                      fingerprints of the forecaster and of the trie that the nodes are numbered in

A shard written before there were interests is read as one without any.

Shapes: R rows, K advertisers and I interests of a row at the most, N level-1 prefixes, F pruned prefixes at the most.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.artifacts import fingerprint, make_directory, storage_errors
from data.errors import LineageError, UserError
from data.log import Log
from priors.decode import Decoded
from semantic_ids.trie import Trie

_KEY = "adsid_shard"
_LISTS = {
    "advertiser_id": pl.List(pl.Int64),
    "log_prob": pl.List(pl.Float64),
    "anchor_log_prob": pl.List(pl.Float64),
    "level1_log_prob": pl.List(pl.Float64),
    "frontier_depth": pl.List(pl.Int8),
    "frontier_node": pl.List(pl.Int32),
    "frontier_log_prob": pl.List(pl.Float64),
}
_INTERESTS = {
    "interest": pl.List(pl.String),
    "interest_log_prob": pl.List(pl.Float64),
    "interest_anchor_log_prob": pl.List(pl.Float64),
}


@dataclass(frozen=True)
class PriorTable:
    """Forecasts in memory, with indexes of the log in place of ids.

    Attributes:
        user_R: user index; rows are sorted by user, then period.
        period_R: as-of period.
        decoded_R: period of decoding, the same or an earlier one.
        advertiser_RK: advertiser indexes, best first; -1 pads.
        log_prob_RK: their log-probabilities; ``-inf`` pads.
        level1_log_prob_RN: of every level-1 prefix.
        frontier_depth_RF, frontier_node_RF: pruned prefixes; depth 0 pads.
        frontier_log_prob_RF: their log-probabilities.
        trie: fingerprint of the trie that the nodes are numbered in.
        interests: the categories that any row lists.
        interest_RI: their indexes, best first; -1 pads.
        interest_log_prob_RI: their log-probabilities; ``-inf`` pads.
    """

    user_R: NDArray[np.int64]
    period_R: NDArray[np.int64]
    decoded_R: NDArray[np.int64]
    advertiser_RK: NDArray[np.int64]
    log_prob_RK: NDArray[np.float64]
    level1_log_prob_RN: NDArray[np.float64]
    frontier_depth_RF: NDArray[np.int64]
    frontier_node_RF: NDArray[np.int64]
    frontier_log_prob_RF: NDArray[np.float64]
    trie: str | None = None
    interests: tuple[str, ...] = ()
    interest_RI: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))
    interest_log_prob_RI: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    def __len__(self) -> int:
        return len(self.user_R)

    @cached_property
    def _key(self) -> tuple[int, NDArray[np.int64]]:
        span = int(self.period_R.max(initial=0)) + 2
        return span, self.user_R * span + self.period_R

    def find(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.int64]:
        """Row of each user's newest forecast with an as-of period at or before the given one; -1 for none."""
        span, key_R = self._key
        key_B = np.asarray(user_B, dtype=np.int64) * span + np.minimum(period_B, span - 1)
        row_B = np.searchsorted(key_R, key_B, side="right") - 1
        same_user = (
            (row_B >= 0) & (self.user_R[np.maximum(row_B, 0)] == user_B) if len(self) else np.zeros(len(key_B), bool)
        )
        return np.where(same_user, row_B, -1)

    def newest(
        self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], NDArray[np.integer]]:
        """What answers each user and period, and when it was made.

        Returns:
            Row of the newest forecast as of :meth:`find`, and the period it was decoded in; where there is no row, the
            period itself.
        """
        row_B = self.find(user_B, period_B)
        if not len(self):
            return row_B, period_B
        return row_B, np.where(row_B >= 0, self.decoded_R[np.maximum(row_B, 0)], period_B)

    def check_trie(self, trie: Trie) -> None:
        """Refuse another trie than the one the forecasts were decoded in: growing IDs numbers its nodes anew.

        Raises:
            LineageError: it is another.
        """
        if self.trie not in (None, trie_version(trie)):
            raise LineageError(
                f"forecasts decoded with other advertiser IDs than the {trie.n_advertisers} given",
                expected="the very IDs of the forecasts: they do not outlive a table that grew, as the prior LM does",
                action="make the forecasts again: adsid run run.until=forecasts",
            )

    @classmethod
    def load(cls, directory: Path, log: Log) -> PriorTable:
        """Read all as-of files of a directory.

        Raises:
            UserError: there is no table, or it is damaged.
            LineageError: its files were made with different IDs, or of advertisers that the log does not have.
        """
        frame = read_frame(directory)
        tries = frame["trie"].unique().to_list()
        if len(tries) > 1:
            raise LineageError(
                f"priors in {directory}, decoded with {len(tries)} different tables of advertiser IDs",
                expected="forecasts of one table",
                action="remove the directory and make the forecasts again: adsid run run.until=forecasts",
            )
        users = pl.DataFrame({"user_id": log.user_ids, "user": np.arange(len(log.user_ids))})
        frame = frame.join(users, on="user_id", how="inner").sort("user", "period")
        advertiser = {id_: index for index, id_ in enumerate(log.advertiser_ids.tolist())}
        unread = ("anchor_log_prob", "interest_anchor_log_prob")
        lists = {name: frame[name].to_list() for name in (*_LISTS, *_INTERESTS) if name not in unread}
        interests = sorted({name for row in lists["interest"] for name in row})
        place = {name: index for index, name in enumerate(interests)}
        unknown = set(frame["advertiser_id"].explode().unique().drop_nulls()) - advertiser.keys()
        if unknown:
            raise LineageError(
                f"priors in {directory} of advertiser {min(unknown)!r}, which the log does not have",
                expected="forecasts of this log's advertisers",
                action="name the forecasts of this run, or make them again: adsid run run.until=forecasts",
            )
        indexes = [[advertiser[id_] for id_ in row] for row in lists["advertiser_id"]]
        return cls(
            user_R=frame["user"].to_numpy().astype(np.int64),
            period_R=frame["period"].to_numpy().astype(np.int64),
            decoded_R=frame["decoded_period"].to_numpy().astype(np.int64),
            advertiser_RK=_pad(indexes, -1).astype(np.int64),
            log_prob_RK=_pad(lists["log_prob"], -np.inf),
            level1_log_prob_RN=_pad(lists["level1_log_prob"], -np.inf),
            frontier_depth_RF=_pad(lists["frontier_depth"], 0).astype(np.int64),
            frontier_node_RF=_pad(lists["frontier_node"], 0).astype(np.int64),
            frontier_log_prob_RF=_pad(lists["frontier_log_prob"], -np.inf),
            trie=tries[0] if tries else None,
            interests=tuple(interests),
            interest_RI=_pad([[place[name] for name in row] for row in lists["interest"]], -1).astype(np.int64),
            interest_log_prob_RI=_pad(lists["interest_log_prob"], -np.inf),
        )


def trie_version(trie: Trie) -> str:
    """What tells one numbering of nodes and leaves from another."""
    return fingerprint([trie.level_sizes, trie.child_code, trie.leaf_ptr, trie.leaf_advertiser])


def shard_files(directory: Path, folder: str = "period=*") -> list[Path]:
    """The shards of a table, or of one of its folders, in order of as-of and number."""
    return sorted(directory.glob(f"{folder}/*.parquet"))


def read_frame(directory: Path, folder: str = "period=*") -> pl.DataFrame:
    """All rows of a table, or of one of its folders, by shard.

    Raises:
        UserError: there is no table, or a shard is damaged.
    """
    files = shard_files(directory, folder)
    if not files:
        raise UserError(
            f"priors in {directory}",
            expected="files period=<period>/<shard>.parquet",
            action="make the forecasts first: adsid priors generate, or adsid run run.until=forecasts",
        )
    frames = []
    for file in files:
        try:
            frame = pl.read_parquet(file)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise UserError(
                f"{file}, which cannot be read",
                expected="a whole Parquet file; it was cut short or overwritten",
                action="run the job that wrote it again: it makes such shards anew and keeps all others",
            ) from error
        older = [pl.lit([], dtype).alias(name) for name, dtype in _INTERESTS.items() if name not in frame.columns]
        frames.append(frame.with_columns(older))
    return pl.concat(frames, how="diagonal")


def frame_of(
    log: Log,
    user_R: NDArray[np.integer],
    period: int,
    decoded: Sequence[Decoded],
    *,
    trie: str,
    model: str,
    interests: Sequence[str] = (),
) -> pl.DataFrame:
    """Forecasts of one as-of period as rows of a table.

    Args:
        log: gives the ids.
        user_R: user of each forecast.
        period: its start is the as-of time.
        decoded: the forecasts.
        trie: :func:`trie_version` of the trie they were decoded in.
        model: what tells the forecaster from others.
        interests: names of the forecaster's interests.
    """
    ids = log.advertiser_ids
    columns = {
        "advertiser_id": [ids[one.advertiser_K].tolist() for one in decoded],
        "log_prob": [one.log_prob_K.tolist() for one in decoded],
        "anchor_log_prob": [one.anchor_log_prob_K.tolist() for one in decoded],
        "level1_log_prob": [one.level1_log_prob_N.tolist() for one in decoded],
        "frontier_depth": [one.frontier_depth_F.tolist() for one in decoded],
        "frontier_node": [one.frontier_node_F.tolist() for one in decoded],
        "frontier_log_prob": [one.frontier_log_prob_F.tolist() for one in decoded],
        "interest": [[interests[index] for index in one.interest_I] for one in decoded],
        "interest_log_prob": [one.interest_log_prob_I.tolist() for one in decoded],
        "interest_anchor_log_prob": [one.interest_anchor_log_prob_I.tolist() for one in decoded],
    }
    schema = {**_LISTS, **_INTERESTS, "advertiser_id": pl.List(log.tables.advertisers.schema["advertiser_id"])}
    n = len(decoded)
    return pl.DataFrame(
        [
            pl.Series("user_id", log.user_ids[user_R], dtype=log.tables.users.schema["user_id"]),
            pl.Series("period", [period] * n, dtype=pl.Int32),
            pl.Series("as_of", [log.calendar.start(period)] * n, dtype=pl.Datetime("us")),
            pl.Series("decoded_period", [period] * n, dtype=pl.Int32),
            *(pl.Series(name, values, dtype=schema[name]) for name, values in columns.items()),
            pl.Series("remainder", [one.remainder for one in decoded], dtype=pl.Float64),
            pl.Series("mass", [one.mass for one in decoded], dtype=pl.Float64),
            pl.Series("bound", [one.bound for one in decoded], dtype=pl.Float64),
            pl.Series("certified", [one.certified for one in decoded], dtype=pl.Boolean),
            pl.Series("tokens", [one.tokens for one in decoded], dtype=pl.Int32),
            pl.Series("model", [model] * n, dtype=pl.String),
            pl.Series("trie", [trie] * n, dtype=pl.String),
        ]
    )


def write_shard(path: Path, frame: pl.DataFrame, *, key: str) -> None:
    """Write rows whole or not at all.

    Args:
        path: the Parquet file; its folder is made.
        frame: the rows.
        key: what the shard was made of, for :func:`is_shard`.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    make_directory(path.parent)
    temporary = path.with_suffix(".tmp")
    with storage_errors(path):
        try:
            frame.write_parquet(temporary, metadata={_KEY: key})
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def is_shard(path: Path, *, key: str) -> bool:
    """Whether a file is a whole shard made of just that."""
    try:
        whole = pl.read_parquet_metadata(path).get(_KEY) == key
        return whole and pl.scan_parquet(path).select(pl.len()).collect().item() >= 0
    except (pl.exceptions.PolarsError, OSError):
        return False


def _pad(rows: Sequence[Sequence[float]], value: float) -> NDArray[np.float64]:
    width = max((len(row) for row in rows), default=0)
    padded = np.full((len(rows), max(width, 1)), value)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded
