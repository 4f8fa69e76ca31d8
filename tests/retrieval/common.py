"""Towers trained for a moment on the tiny log."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.log import Log
from models.training import FitResult, TrainerConfig
from models.two_tower import TwoTowerConfig
from retrieval.config import ForecastChannelConfig, PairsConfig, RetrievalConfig
from retrieval.retriever import Retriever
from retrieval.two_tower import TrainedTwoTower, train_two_tower
from tests.priors.conftest import random_ids


def tiny_retrieval(**changes: object) -> RetrievalConfig:
    """A narrow two-tower, two quotas, lists of twenty."""
    values: dict[str, object] = {
        "model": TwoTowerConfig(dim=16, hidden=32),
        "pairs": PairsConfig(
            history=8, window=16, batch_size=64, sampled_negatives=64, validation_requests=32, recall_at=20
        ),
        "trainer": TrainerConfig(max_epochs=2, progress_bar=False),
        "forecast": ForecastChannelConfig(advertisers=8, prior_weights=[0.0, 0.5], seed_advertisers=4),
        "budget": 20,
        "ks": [5, 20],
        "quotas": [0.0, 0.5, 1.0],
    }
    return RetrievalConfig(**(values | changes))  # type: ignore[arg-type]


def train_tiny(log: Log, cfg: RetrievalConfig, work: Path) -> tuple[TrainedTwoTower, FitResult]:
    """Train on random IDs and texts."""
    text = np.random.default_rng(0).normal(size=(len(log.advertiser_ids), 8)).astype(np.float32)
    return train_two_tower(log, random_ids(log).codes_AL, text, cfg, work_dir=work)


def retriever_of(log: Log, towers: TrainedTwoTower, cfg: RetrievalConfig) -> Retriever:
    """With the random IDs that the towers were trained on."""
    return Retriever(log, towers, random_ids(log).codes_AL, cfg)
