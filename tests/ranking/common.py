"""A log, its semantic IDs and a forecast that knows what the users like, small enough for every test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.log import Log
from models.dcn_v2 import DCNv2Config
from models.deepfm import DeepFMConfig
from models.dlrm import DLRMConfig
from models.training import TrainerConfig
from priors.forecast import PRIOR_FEATURES
from ranking.config import FeatureConfig, RankerConfig
from semantic_ids.advertiser_ids import AdvertiserIds


def tiny_ids(log: Log) -> AdvertiserIds:
    """IDs whose first code is the good that an advertiser of the tiny log sells."""
    number = np.arange(len(log.advertiser_ids))
    codes_AL = np.stack([number % 10, number // 10], axis=1).astype(np.int64)
    books = [np.zeros((10, 2), np.float32), np.zeros((codes_AL[:, 1].max() + 1, 2), np.float32)]
    return AdvertiserIds(log.advertiser_ids, codes_AL, books)


def tiny_ranker(**changes: object) -> RankerConfig:
    """A ranker that trains in about a second."""
    values: dict[str, object] = {
        "dlrm": DLRMConfig(embedding_dim=4, dense_layers=[8], over_layers=[8]),
        "dcn_v2": DCNv2Config(embedding_dim=4, dense_layers=[8], cross_layers=1, cross_rank=4, over_layers=[8]),
        "deepfm": DeepFMConfig(embedding_dim=4, dense_layers=[8], deep_layers=[8]),
        "features": FeatureConfig(min_count=2, history_length=3, recent_periods=3),
        "trainer": TrainerConfig(max_epochs=2, patience=None, progress_bar=False),
        "batch_size": 256,
        "seeds": [0],
        "draws": 20,
    }
    return RankerConfig(**(values | changes))  # type: ignore[arg-type]


class KnownForecast:
    """A forecast from a matrix of log-probabilities, the same in all periods.

    Args:
        log_prob_UA: log-probability of each advertiser for each user.
        covered: users that it covers; None covers all.
        interest_UI: log-probability of each ad's category for each user; None: it has no interests.
    """

    def __init__(
        self,
        log_prob_UA: NDArray[np.float32],
        *,
        covered: NDArray[np.bool_] | None = None,
        interest_UI: NDArray[np.float32] | None = None,
    ) -> None:
        self.log_prob_UA, self.interest_UI = log_prob_UA, interest_UI
        self.covered_U = np.ones(len(log_prob_UA), bool) if covered is None else covered

    @property
    def n_advertisers(self) -> int:
        return self.log_prob_UA.shape[1]

    def log_probs(self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.float32]:
        return self.log_prob_UA[user_B]

    def features(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], advertiser_N: NDArray[np.integer]
    ) -> dict[str, NDArray[np.float32]]:
        columns = {name: np.zeros(len(user_N), np.float32) for name in PRIOR_FEATURES}
        columns["prior_log_prob"] = self.log_prob_UA[user_N, advertiser_N].astype(np.float32)
        columns["prior_missing"] = (~self.covered_U[user_N] | (advertiser_N < 0)).astype(np.float32)
        return columns

    @property
    def has_interests(self) -> bool:
        return self.interest_UI is not None

    def interest_match(
        self, user_N: NDArray[np.integer], period_N: NDArray[np.integer], ad_N: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        return np.full(len(ad_N), np.nan, np.float32) if self.interest_UI is None else self.interest_UI[user_N, ad_N]


def tastes(log: Log, *, strength: float = 8.0) -> KnownForecast:
    """What `tests.logs.tiny_tables` draws from: user ``u`` likes goods ``u % 10`` and ``(u + 1) % 10``."""
    good_A = np.arange(len(log.advertiser_ids)) % 10
    user_U = np.arange(len(log.user_ids))[:, None]
    liked_UA = (good_A == user_U % 10) | (good_A == (user_U + 1) % 10)
    mass_UA = np.where(liked_UA, strength, 1.0)
    log_prob_UA = np.log(mass_UA / mass_UA.sum(1, keepdims=True)).astype(np.float32)
    return KnownForecast(
        log_prob_UA, interest_UI=np.where(liked_UA, -1.2, -3.0).astype(np.float32)[:, log.ad_advertiser]
    )
