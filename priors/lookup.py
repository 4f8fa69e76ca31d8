"""One user's newest forecast before a time, in well under a millisecond, from memory-mapped files.

    <table>/period=0043/00000.parquet …       the table, readable in place by anything that reads Parquet
    <table>/lookup/users.npy                 user ids, rising
    <table>/lookup/ptr.npy, as_of.npy        rows of each user, by as-of time (microseconds since 1970)
    <table>/lookup/rows.arrow                the rows in that order, uncompressed

:func:`write_lookup` sorts the rows by user once; :class:`PriorLookup` maps the four files and searches twice: for the
user, and for the time among the user's rows. Nothing is read but the pages of one row. An index from before there were
interests (format 1) is refused, and written again by the job that made the table.

Shapes: U users, R rows, K advertisers and I interests of a row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data.artifacts import atomic_directory
from data.errors import UserError
from priors.table import read_frame, shard_files

LOOKUP = "lookup"
_SOURCE = "source.json"
_FORMAT = 2
_LISTS = (
    "advertiser_id",
    "log_prob",
    "anchor_log_prob",
    "interest",
    "interest_log_prob",
    "interest_anchor_log_prob",
)


@dataclass(frozen=True)
class Prior:
    """A forecast as it was stored.

    Attributes:
        user_id: whose.
        as_of: it may be used from then on.
        advertiser_ids: advertisers found, best first.
        log_prob_K, anchor_log_prob_K: of them.
        mass: probability they cover.
        remainder: probability of neither an advertiser nor a listed prefix below level 1.
        certified: whether the list is proven to be the best of all.
        interests: the likeliest ones, best first.
        interest_log_prob_I, interest_anchor_log_prob_I: of them.
    """

    user_id: Any
    as_of: datetime
    advertiser_ids: NDArray[Any]
    log_prob_K: NDArray[np.float64]
    anchor_log_prob_K: NDArray[np.float64]
    mass: float
    remainder: float
    certified: bool
    interests: NDArray[Any]
    interest_log_prob_I: NDArray[np.float64]
    interest_anchor_log_prob_I: NDArray[np.float64]


class PriorLookup:
    """A table's rows by user and time.

    Args:
        directory: of the table, with the files of :func:`write_lookup`.

    Raises:
        UserError: they are not there, or the table has changed since.
    """

    def __init__(self, directory: Path) -> None:
        folder = directory / LOOKUP
        if not (folder / _SOURCE).exists() or json.loads((folder / _SOURCE).read_text()) != _source(directory):
            raise UserError(
                f"{folder}, which is not of the table as it is now",
                expected="the index of this table",
                action="write it again: adsid priors generate does at its end",
            )
        self._users, self._ptr, self._as_of = (
            np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("users", "ptr", "as_of")
        )
        self._rows = pa.ipc.open_file(pa.memory_map(str(folder / "rows.arrow"))).read_all()

    def __len__(self) -> int:
        return len(self._as_of)

    def find(self, user_id: Any, at: datetime) -> Prior | None:
        """A user's newest forecast with an as-of at or before a time; None where there is none.

        Args:
            user_id: as in the table.
            at: in the table's own clock, without a time zone.

        Raises:
            UserError: ids of the table are numbers and this one is text, or the other way round.
        """
        if len(self._users) and isinstance(user_id, str) != (self._users.dtype.kind not in "iu"):
            raise UserError(
                f"user {user_id!r}",
                expected=f"an id as in the table, e.g. {self._users[0].item()!r}",
                action="give it as the log does: a number without quotes, or text",
            )
        wanted = np.array(user_id, dtype=self._users.dtype) if not isinstance(user_id, str) else user_id
        user = int(np.searchsorted(self._users, wanted))
        if user == len(self._users) or self._users[user] != user_id:
            return None
        first, last = int(self._ptr[user]), int(self._ptr[user + 1])
        moment = np.datetime64(at, "us").astype(np.int64)
        row = first + int(np.searchsorted(self._as_of[first:last], moment, side="right")) - 1
        if row < first:
            return None
        lists = {name: self._rows[name][row].values.to_numpy(zero_copy_only=False) for name in _LISTS}
        values = {name: self._rows[name][row].as_py() for name in ("as_of", "mass", "remainder", "certified")}
        return Prior(
            user_id=user_id,
            as_of=values["as_of"],
            advertiser_ids=lists["advertiser_id"],
            log_prob_K=lists["log_prob"],
            anchor_log_prob_K=lists["anchor_log_prob"],
            mass=values["mass"],
            remainder=values["remainder"],
            certified=values["certified"],
            interests=lists["interest"],
            interest_log_prob_I=lists["interest_log_prob"],
            interest_anchor_log_prob_I=lists["interest_anchor_log_prob"],
        )


def write_lookup(directory: Path) -> None:
    """Sort a table's rows by user and time into memory-mapped files beside it.

    Args:
        directory: of the table; its ``lookup`` is written whole or not at all.

    Raises:
        UserError: there is no table, a shard is damaged, or the disk is full.
    """
    source = _source(directory)
    frame = read_frame(directory).sort("user_id", "as_of").rechunk()
    users, counts = np.unique(frame["user_id"].to_numpy(), return_counts=True)
    if users.dtype == object:
        users = users.astype(np.str_)
    with atomic_directory(directory / LOOKUP) as folder:
        np.save(folder / "users.npy", users)
        np.save(folder / "ptr.npy", np.concatenate([[0], np.cumsum(counts)]))
        np.save(folder / "as_of.npy", frame["as_of"].dt.epoch("us").to_numpy())
        table = frame.to_arrow()
        with pa.ipc.new_file(str(folder / "rows.arrow"), table.schema) as writer:
            writer.write_table(table)
        (folder / _SOURCE).write_text(json.dumps(source))


def _source(directory: Path) -> dict[str, Any]:
    """The index's format, and the shards it is of: name, bytes and time of change."""
    files = [(file.relative_to(directory).as_posix(), file.stat()) for file in shard_files(directory)]
    return {"format": _FORMAT, "shards": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]}
