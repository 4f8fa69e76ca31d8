"""A forecaster fitted once on the tiny log, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from data.log import Log
from models.training import TrainerConfig
from priors.artifact import PriorModel
from priors.config import BaseModelConfig, DecodeConfig, PriorConfig
from priors.fit import fit_prior
from priors.generate import generate_priors
from priors.lookup import write_lookup
from semantic_ids.advertiser_ids import AdvertiserIds
from tests.logs import tiny_log


def tiny_prior_config(**changes: object) -> PriorConfig:
    """A forecaster of two random layers that trains in seconds."""
    values: dict[str, object] = {
        "base": BaseModelConfig("packaged:tiny", dtype="float32"),  # bf16 would round by the company of a batch
        "panel": 20,
        "prompts": 48,
        "first_period": 2,
        "select_prompts": 32,
        "evaluation_prompts": 30,
        "trainer": TrainerConfig(max_epochs=2, patience=None, progress_bar=False),
        "decode": DecodeConfig(beam=4, top_k=10, batch_size=8, every=2),
    }
    return PriorConfig(**(values | changes))  # type: ignore[arg-type]


def random_ids(log: Log, sizes: tuple[int, ...] = (4, 4, 4), seed: int = 0) -> AdvertiserIds:
    """Unique codes without a meaning."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(int(np.prod(sizes)), len(log.advertiser_ids), replace=False)
    codes = np.stack(np.unravel_index(chosen, sizes), axis=1)
    return AdvertiserIds(log.advertiser_ids, codes, [rng.normal(size=(n, 8)).astype(np.float32) for n in sizes])


@dataclass
class Fitted:
    log: Log
    ids: AdvertiserIds
    prior: PriorModel
    cfg: PriorConfig
    metrics: dict[str, object]


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """A forecaster whose LM has something to say: training as short as this is not kept, and zeros read no prompt."""
    directory: Path = tmp_path_factory.mktemp("prior")
    log = tiny_log(directory)
    ids, cfg = random_ids(log), tiny_prior_config()
    prior, metrics = fit_prior(log, ids, cfg, work_dir=directory / "work")
    generator = torch.Generator().manual_seed(0)
    for head in (prior.model.head, prior.model.interest_head):
        for weight in [] if head is None else [*head.projections, *head.rows.values()]:
            torch.nn.init.normal_(weight, std=0.3, generator=generator)
    return Fitted(log, ids, prior, cfg, metrics)


@pytest.fixture(scope="module")
def directory(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 20 users at three as-of times, with its lookup."""
    folder = tmp_path_factory.mktemp("table")
    generate_priors(fitted.prior, fitted.log, fitted.cfg, out_dir=folder, work_dir=folder / ".work")
    write_lookup(folder)
    return folder
