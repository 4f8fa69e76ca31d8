"""Fingerprints of what forecasts of a period are made of: the events before it, and the plan of campaigns up to it.

    events of period 1 ─► digest ─► with those of period 2 ─► digest ─► …      everything before a period: one look-up

Both are hashed once, period after period, column by column. Users, ads, advertisers, markets and categories are told by
their ids, not by their numbers in the log, which change when others come in; ads and advertisers by their words and
features too, which prompts and interests read. An ad without an event before a period has no say in it.

Shapes: P periods, A advertisers, E events of one period.
"""

from __future__ import annotations

from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from data.artifacts import fingerprint
from data.log import Log
from data.sampling import hash_ids
from priors.anchor import Anchor

_NONE = np.zeros(1, np.uint64)


class Sources:
    """What a log and its plan say at the start of periods.

    Args:
        log: the events.
        anchor: gives the plan, weighed as its forecasts are.
    """

    def __init__(self, log: Log, anchor: Anchor) -> None:
        self._log, self._anchor = log, anchor

    def before(self, period: int) -> str:
        """Fingerprint of all events before a period, and of the plan up to the period itself.

        The same for two logs that differ in later events or later placements alone. An event is its user, kind, ad,
        advertiser, market, category and time, and what is known of ad and advertiser.
        """
        period_P, events_P = self._events
        last = int(np.searchsorted(period_P, period))
        plan = self._plan[min(max(period, 0), len(self._plan) - 1)]
        return fingerprint([list(self._log.label_kinds), events_P[last], plan])

    def profiles(self, user_R: NDArray[np.integer]) -> dict[str, list[str]]:
        """What prompts read of users, in words."""
        log = self._log
        return {
            column: np.array(log.user_vocabularies[column], dtype=np.str_)[code_U[user_R]].tolist()
            for column, code_U in sorted(log.user_features.items())
        }

    @cached_property
    def _events(self) -> tuple[NDArray[np.integer], list[bytes]]:
        """Periods with an event, rising; and a digest of nothing, then of the events up to the end of each of them."""
        log, events = self._log, self._log.events
        columns = [
            (events.user, _by_code(log.user_ids)),
            (events.ad, _by_code(self._ads())),
            (events.advertiser, _by_code(_told(log.tables.advertisers.select("advertiser_id", "name", "text")))),
            (events.market, _by_code(log.market_ids)),
            (events.category, _by_code(np.array(log.category_names, dtype=np.str_))),
        ]
        order = np.argsort(events.period, kind="stable")
        period_P, start_P = np.unique(events.period[order], return_index=True)
        digest = blake2b()
        found = [digest.digest()]
        for period, row_E in zip(period_P.tolist(), np.split(order, start_P[1:]), strict=False):
            digest.update(np.array([period, len(row_E)]).tobytes())
            for code_N, id_C in columns:
                digest.update(id_C[code_N[row_E]].tobytes())
            for value_N in (events.kind, events.timestamp):
                digest.update(value_N[row_E].tobytes())
            found.append(digest.digest())
        return period_P, found

    def _ads(self) -> NDArray[Any]:
        """What is known of each ad."""
        features = {
            f"feature {column}": pl.Series(self._log.ad_vocabularies[column]).gather(code_I)
            for column, code_I in sorted(self._log.ad_features.items())
        }
        return _told(self._log.tables.ads.select("ad_id", "text").with_columns(**features))

    @cached_property
    def _plan(self) -> list[bytes]:
        """Digest of the plan up to each period; a period without a plan adds nothing, as where there is none at all."""
        digest, found = blake2b(), []
        for period in range(len(self._anchor.counts.promoted_PA) + 1):
            plan_A = self._anchor.plan(np.array([period]))[0]
            if plan_A.any():
                digest.update(np.array([period]).tobytes())
                digest.update(plan_A.tobytes())
            found.append(digest.digest())
        return found


def _told(frame: pl.DataFrame) -> NDArray[Any]:
    """Each row as one word."""
    parts = pl.all().cast(pl.String).fill_null("\0")
    return frame.select(pl.concat_str(parts, separator="\x1f").alias("told"))["told"].to_numpy()


def _by_code(ids: NDArray[Any]) -> NDArray[np.uint64]:
    """What stands for each code of a column; the last, which -1 finds, for none."""
    return np.concatenate([hash_ids(ids, seed=0), _NONE])
