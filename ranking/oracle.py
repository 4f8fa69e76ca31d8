"""What the simulator knows: the best forecast there is, and the true chance of every row.

``OracleForecast`` answers as a forecast does, with the exact P(advertiser | user, period) of `data.truth`; a ranker
that is given it shows how much a perfect forecast can be worth to it. ``true_chance`` is the probability that the
labels were drawn with: no ranker can do better.

Shapes: B user-periods, A advertisers, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.log import Log
from data.tables import KINDS
from data.truth import Truth
from priors.forecast import Forecast, distribution_features
from ranking.rows import Rows
from ranking.tasks import LABEL, kinds_of
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.trie import Trie

_FLOOR = 1e-12
"""Probability of an advertiser that cannot be met: its logarithm must be a number."""
_BLOCK_CELLS = 1 << 20


class OracleForecast:
    """The truth of a simulated log as a forecast.

    Args:
        truth: of the log.
        log: the simulated log, or a part of its users.
        ids: semantic IDs of its advertisers.
        anchor: what the lift is against, and whose interests stand in: the truth is of advertisers.
        top: advertisers that the forecast counts as named.
        share: of what the anchor lacks, in log-odds: 1 is the truth, 0.5 half way from the anchor to it.
    """

    def __init__(
        self, truth: Truth, log: Log, ids: AdvertiserIds, *, anchor: Forecast, top: int, share: float = 1.0
    ) -> None:
        self.truth, self.anchor, self.share = truth, anchor, share
        self.trie = Trie.from_codes(ids.codes_AL, ids.level_sizes)
        self.top = min(top, self.trie.n_advertisers)
        self._user_U, self._advertiser_A = log.user_ids.astype(np.int64), log.advertiser_ids.astype(np.int64)

    @property
    def n_advertisers(self) -> int:
        """A."""
        return self.trie.n_advertisers

    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        """Log-probabilities of the very period, ``(B, A)``."""
        prob_BA = self.truth.score_all(self._user_U[user_B], np.asarray(period_B))[:, self._advertiser_A]
        prob_BA = np.maximum(prob_BA, _FLOOR)
        if self.share < 1:
            prob_BA = prob_BA**self.share * np.exp((1 - self.share) * self.anchor.log_probs(user_B, period_B))
        return np.log(prob_BA / prob_BA.sum(1, keepdims=True)).astype(np.float32)

    def features(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], advertiser_N: NDArray[np.integer]
    ) -> dict[str, NDArray[np.float32]]:
        """Prior features of each row, ``(N,)`` each; the truth is never old and never missing."""
        user_N, period_N, advertiser_N = (np.asarray(x, np.int64) for x in (user_N, period_N, advertiser_N))
        asked, row_N = np.unique(np.stack([user_N, period_N]), axis=1, return_inverse=True)
        row_N, has_N = row_N.reshape(-1), advertiser_N >= 0
        order = np.argsort(row_N, kind="stable")
        values: dict[str, NDArray[np.float32]] = {}
        step = max(1, _BLOCK_CELLS // self.n_advertisers)
        for start in range(0, asked.shape[1], step):
            part = slice(start, start + step)
            rows = order[slice(*np.searchsorted(row_N, [start, start + step], sorter=order))]
            rows = rows[has_N[rows]]
            said = distribution_features(
                self.log_probs(*asked[:, part]).astype(np.float64),
                self.anchor.log_probs(*asked[:, part]).astype(np.float64),
                self.trie,
                top=self.top,
                row_N=row_N[rows] - start,
                advertiser_N=advertiser_N[rows],
            )
            for name, column in said.items():
                values.setdefault(name, np.zeros(len(row_N), np.float32))[rows] = column
        age = np.zeros(len(row_N), np.float32)
        return {**values, "prior_age": age, "prior_missing": (~has_N).astype(np.float32)}

    @property
    def has_interests(self) -> bool:
        """Whether the anchor has interests."""
        return self.anchor.has_interests

    def interest_match(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], ad_N: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Each ad's category among the interests by the anchor, ``(N,)``."""
        return self.anchor.interest_match(user_N, period_N, ad_N)


def true_chance(truth: Truth, log: Log, rows: Rows, *, tasks: Sequence[str] = (LABEL,)) -> NDArray[np.float64]:
    """The chance of each task's outcome that each row of a simulated log was drawn with.

    Args:
        truth: of the log.
        log: the simulated log, or a part of its users.
        rows: impressions of it.
        tasks: of `ranking.tasks.TASKS`.

    Returns:
        Probabilities, shape ``(N, T)``.
    """
    position_D = np.array([int(name.rpartition(" ")[2] or 1) for name in log.display_names], np.int64)
    user, advertiser = log.user_ids.astype(np.int64)[rows.user], log.advertiser_ids.astype(np.int64)[rows.advertiser]
    chances = [
        truth.conversion_probability(
            user,
            advertiser,
            position_D[rows.display],
            rows.period,
            kinds=kinds_of_truth(log, task),
        )
        for task in tasks
    ]
    return np.stack(chances, axis=1).astype(np.float64)


def kinds_of_truth(log: Log, task: str = LABEL) -> tuple[str, ...]:
    """A task's kinds of events by their names, as the truth knows them."""
    return tuple(KINDS[kind] for kind in kinds_of(task, log))
