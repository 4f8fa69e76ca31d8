"""A forecast given as a table, for tests of what reads one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from priors.forecast import PRIOR_FEATURES


class DenseForecast:
    """The same distribution for a user in every period.

    Args:
        log_prob_UA: log-probabilities of each user.
    """

    def __init__(self, log_prob_UA: NDArray[np.floating]) -> None:
        shifted = log_prob_UA - log_prob_UA.max(1, keepdims=True)
        self.log_prob_UA = (shifted - np.log(np.exp(shifted).sum(1, keepdims=True))).astype(np.float32)

    @property
    def n_advertisers(self) -> int:
        return self.log_prob_UA.shape[1]

    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        return self.log_prob_UA[user_B]

    def features(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], advertiser_N: NDArray[np.integer]
    ) -> dict[str, NDArray[np.float32]]:
        known = advertiser_N >= 0
        values = {name: np.zeros(len(user_N), dtype=np.float32) for name in PRIOR_FEATURES}
        values["prior_log_prob"][known] = self.log_prob_UA[user_N[known], advertiser_N[known]]
        values["prior_missing"][~known] = 1.0
        return values
