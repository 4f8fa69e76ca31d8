"""The exported ranker says what the trained one says, for any number of rows, and is refused where it does not."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ranking.serving as serving
from data.errors import LineageError, UserError
from ranking.config import MODELS
from ranking.features import FeatureBuilder
from ranking.prior import GROUPS
from ranking.ranker import SPEC, Ranker, RankerSpans, build_module
from ranking.serving import PROGRAM, ServedRanker, export
from ranking.spec import FeatureSpec
from tests.logs import tiny_log
from tests.ranking.common import tastes, tiny_ids, tiny_ranker


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> RankerSpans:
    log = tiny_log(tmp_path_factory.mktemp("log"))
    return RankerSpans.of(FeatureBuilder(log, tiny_ids(log), tiny_ranker().features), None)


def ranker_of(spans: RankerSpans, model: str) -> Ranker:
    """With random weights, large enough to matter."""
    cfg = tiny_ranker(model=model)
    features = spans.fit.with_prior(tastes(spans.log), GROUPS)
    spec = FeatureSpec.fit(features, cfg.features, semantic_ids="v")
    module = build_module(spec, cfg, base_rates=[0.1], seed=0).eval()
    torch.manual_seed(1)
    for parameter in module.ranker.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    module.intercept.fill_(-0.7)
    return Ranker(module, spec, model)


@pytest.mark.parametrize("model", MODELS)
def test_it_says_what_the_trained_one_says(spans: RankerSpans, tmp_path: Path, model: str) -> None:
    ranker = ranker_of(spans, model)
    assert export(ranker, tmp_path / "served") <= 1e-5
    features = spans.evaluation.with_prior(tastes(spans.log), GROUPS)
    served = ServedRanker.load(tmp_path / "served").probabilities(features)
    np.testing.assert_allclose(served, ranker.probabilities(features), atol=1e-5)
    assert served.std() > 0.001


def test_a_program_that_says_something_else_is_not_kept(
    spans: RankerSpans, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = serving._run
    monkeypatch.setattr(serving, "_run", lambda program, batch: run(program, batch) + 1e-3)
    with pytest.raises(ValueError, match=r"differs by 0\.001"):
        export(ranker_of(spans, "logistic"), tmp_path / "served")
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_export_is_an_error_that_says_so(spans: RankerSpans, tmp_path: Path, damage: str) -> None:
    export(ranker_of(spans, "logistic"), tmp_path / "served")
    program = tmp_path / "served" / PROGRAM
    if damage == "missing":
        program.unlink()
    else:
        program.write_bytes(program.read_bytes()[:200])
    with pytest.raises(UserError, match="export the ranker again"):
        ServedRanker.load(tmp_path / "served")


@pytest.mark.parametrize("name", [PROGRAM, SPEC])
def test_files_of_two_exports_are_not_served_together(spans: RankerSpans, tmp_path: Path, name: str) -> None:
    """Though the shapes are the same."""
    ranker = ranker_of(spans, "logistic")
    export(ranker, tmp_path / "served")
    ids = {table: ids[::-1] for table, ids in ranker.spec.tables.items()}
    ranker.module.intercept.fill_(0.3)
    export(replace(ranker, spec=replace(ranker.spec, tables=ids)), tmp_path / "other")
    shutil.copy(tmp_path / "other" / name, tmp_path / "served" / name)
    with pytest.raises(LineageError, match=f"another {name} than serving.json"):
        ServedRanker.load(tmp_path / "served")
