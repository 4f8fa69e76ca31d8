"""Training the two-tower: it learns, it resumes, its artifact is itself, and its histories end in time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.errors import LineageError, UserError
from data.log import Log
from models.training import TrainerConfig
from models.two_tower import TwoTowerConfig
from retrieval.config import ForecastChannelConfig, PairsConfig, RetrievalConfig
from retrieval.index import IndexConfig
from retrieval.two_tower import TrainedTwoTower
from retrieval.two_tower_data import TrainingBatches
from tests.logs import tiny_log
from tests.retrieval.common import tiny_retrieval, train_tiny


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("log"))


def test_training_beats_chance(log: Log, tmp_path: Path) -> None:
    cfg = tiny_retrieval(trainer=TrainerConfig(max_epochs=6, patience=None, progress_bar=False))
    _, result = train_tiny(log, cfg, tmp_path)
    active = np.mean([len(log.active_ads(market, 6).ad) for market in range(3)])
    assert result.best_score > 1.3 * cfg.budget / active  # type: ignore[operator]


def test_a_killed_fit_ends_like_an_undisturbed_one(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = tiny_retrieval(trainer=TrainerConfig(max_epochs=3, patience=None, progress_bar=False))
    whole, expected = train_tiny(log, cfg, tmp_path / "whole")
    collate, calls = TrainingBatches.__call__, 0

    def dies(self: TrainingBatches, rows: object) -> object:
        nonlocal calls
        calls += 1
        if calls > 1.5 * expected.steps / expected.epochs:
            raise RuntimeError("killed")
        return collate(self, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingBatches, "__call__", dies)
    with pytest.raises(RuntimeError, match="killed"):
        train_tiny(log, cfg, tmp_path / "killed")
    monkeypatch.setattr(TrainingBatches, "__call__", collate)
    resumed, result = train_tiny(log, cfg, tmp_path / "killed")
    assert result == expected
    ads = np.arange(len(log.ad_ids), dtype=np.int32)
    np.testing.assert_array_equal(resumed.index.vectors(ads), whole.index.vectors(ads))


def test_saved_and_loaded_it_embeds_the_same(log: Log, tmp_path: Path) -> None:
    cfg = tiny_retrieval()
    towers, _ = train_tiny(log, cfg, tmp_path / "work")
    towers.save(tmp_path / "towers")
    again = TrainedTwoTower.load(tmp_path / "towers", IndexConfig())
    users, periods = np.arange(20), np.full(20, 8)
    ours, theirs = (one.embedder(log, cfg.pairs)(users, periods) for one in (towers, again))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, rtol=1e-5)
    (tmp_path / "towers" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="two-tower"):
        TrainedTwoTower.load(tmp_path / "towers", IndexConfig())


def test_vectors_read_nothing_of_the_period_or_later(log: Log, tmp_path: Path) -> None:
    cfg = tiny_retrieval()
    towers, _ = train_tiny(log, cfg, tmp_path)
    early = replace(log, events=log.events.select(log.events.period < 8))
    users, periods = np.arange(40), np.full(40, 8)
    np.testing.assert_array_equal(
        towers.embedder(early, cfg.pairs)(users, periods), towers.embedder(log, cfg.pairs)(users, periods)
    )
    assert np.isnan(towers.embedder(log, cfg.pairs)(users[:3], np.ones(3, dtype=int))).all()


def test_a_log_with_other_ads_is_refused(log: Log, tmp_path: Path) -> None:
    towers, _ = train_tiny(log, tiny_retrieval(), tmp_path / "work")
    (tmp_path / "other").mkdir()
    with pytest.raises(LineageError, match="150 ads"):
        towers.embedder(tiny_log(tmp_path / "other", n_ads=150), tiny_retrieval().pairs)


BAD = [
    (lambda: RetrievalConfig(budget=0), "retrieval.budget=0"),
    (lambda: RetrievalConfig(ks=[500]), r"retrieval.ks=\[500\]"),
    (lambda: RetrievalConfig(quotas=[]), r"retrieval.quotas=\[\]"),
    (lambda: RetrievalConfig(quota_requests=0), "retrieval.quota_requests=0"),
    (lambda: PairsConfig(history=10, window=5), "window=5 below history=10"),
    (lambda: ForecastChannelConfig(advertisers=0, prior_weights=[-1.0]), "(?s)advertisers=0.*prior_weights"),
    (lambda: ForecastChannelConfig(seeded_share=1.5), "seeded_share"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_configuration_is_told(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


def test_sizes_of_the_towers_are_positive() -> None:
    with pytest.raises(ValueError, match="dim=0"):
        TwoTowerConfig(dim=0)
