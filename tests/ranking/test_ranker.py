"""A ranker learns, resumes as if undisturbed, and is loaded exactly as it was trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ranking.ranker as ranker_module
from data.artifacts import Manifest
from data.errors import LineageError, UserError
from models.dlrm import DLRMConfig
from ranking.config import MODELS
from ranking.features import FeatureBuilder
from ranking.metrics import Sample, evaluate
from ranking.prior import GROUPS
from ranking.rank import influences, rank
from ranking.ranker import SPEC, WEIGHTS, ArmRows, Ranker, RankerSpans, predict, train_ranker
from tests.logs import tiny_log
from tests.ranking.common import KnownForecast, tastes, tiny_ids, tiny_ranker

CFG = tiny_ranker()


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> RankerSpans:
    log = tiny_log(tmp_path_factory.mktemp("log"))
    return RankerSpans.of(FeatureBuilder(log, tiny_ids(log), CFG.features), None)


@pytest.fixture(scope="module")
def trained(spans: RankerSpans, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ranker, Path]:
    directory = tmp_path_factory.mktemp("rankers") / "lm-0"
    return train_ranker(ArmRows.of(spans, tastes(spans.log), CFG), seed=0, cfg=CFG, directory=directory), directory


def test_it_beats_the_base_rate_and_is_calibrated(spans: RankerSpans, tmp_path: Path) -> None:
    trainer = replace(CFG.trainer, max_epochs=8, patience=2)
    cfg = replace(CFG, trainer=trainer, learning_rate=1e-2, embedding_learning_rate=1e-2, batch_size=128)
    ranker = train_ranker(ArmRows.of(spans, tastes(spans.log), cfg), seed=0, cfg=cfg, directory=tmp_path / "lm-0")
    rows = spans.evaluation.rows
    probability = ranker.probabilities(spans.evaluation.with_prior(tastes(spans.log), GROUPS))
    figures = evaluate(Sample.of(rows.label, rows.weight, rows.user, draws=1, seed=0), probability)
    assert figures["auc"][0] > 0.75
    assert figures["normalized_entropy"][0] < 0.95
    predicted = np.average(probability, weights=rows.weight)
    assert predicted == pytest.approx(np.average(rows.label, weights=rows.weight), rel=0.25)


def test_its_level_is_that_of_the_stopping_rows(spans: RankerSpans, trained: tuple[Ranker, Path]) -> None:
    rows = spans.stop.rows
    probability = trained[0].probabilities(spans.stop.with_prior(tastes(spans.log), GROUPS))
    expected = np.average(rows.label, weights=rows.weight)
    assert np.average(probability, weights=rows.weight) == pytest.approx(expected, rel=1e-4)


def test_training_leaves_the_arithmetic_of_the_process_as_it_was(trained: tuple[Ranker, Path]) -> None:
    assert torch.full((), 1e-40) * torch.ones(()) != 0  # a denormal number


def test_loaded_it_predicts_exactly_the_same(spans: RankerSpans, trained: tuple[Ranker, Path]) -> None:
    ranker, directory = trained
    features = spans.evaluation.with_prior(tastes(spans.log), GROUPS)
    np.testing.assert_array_equal(Ranker.load(directory).probabilities(features), ranker.probabilities(features))
    assert sorted(path.name for path in directory.parent.iterdir()) == [directory.name]  # no checkpoints left


def test_a_finished_ranker_is_not_trained_again_and_a_changed_one_is(
    spans: RankerSpans, trained: tuple[Ranker, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "lm-0"
    shutil.copytree(trained[1], directory)

    def no_training(*args: object, **kwargs: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(ranker_module, "fit", no_training)
    quiet = replace(CFG, draws=7, trainer=replace(CFG.trainer, progress_bar=True))
    train_ranker(ArmRows.of(spans, tastes(spans.log), quiet), seed=0, cfg=quiet, directory=directory)
    for change in ({"learning_rate": 1e-4}, {"dlrm": DLRMConfig(embedding_dim=2)}, {"model": "logistic"}):
        with pytest.raises(AssertionError, match="trained again"):
            train_ranker(
                ArmRows.of(spans, tastes(spans.log), replace(CFG, **change)),
                seed=0,
                cfg=replace(CFG, **change),
                directory=directory,
            )
    with pytest.raises(AssertionError, match="trained again"):
        train_ranker(ArmRows.of(spans, None, CFG), seed=0, cfg=CFG, directory=directory)
    monkeypatch.setattr(ranker_module, "VERSION", ranker_module.VERSION + 1)
    with pytest.raises(AssertionError, match="trained again"):
        train_ranker(ArmRows.of(spans, tastes(spans.log), CFG), seed=0, cfg=CFG, directory=directory)


def test_it_trains_under_autocast_as_on_a_gpu(spans: RankerSpans, tmp_path: Path) -> None:
    cfg = replace(CFG, trainer=replace(CFG.trainer, precision="bf16-mixed", max_epochs=1, gradient_clip=1.0))
    ranker = train_ranker(ArmRows.of(spans, tastes(spans.log), cfg), seed=0, cfg=cfg, directory=tmp_path / "lm-0")
    probability = ranker.probabilities(spans.evaluation.with_prior(tastes(spans.log), GROUPS))
    assert np.isfinite(probability).all()
    assert probability.std() > 0


def test_several_devices_by_themselves_are_refused(spans: RankerSpans, tmp_path: Path) -> None:
    cfg = replace(CFG, trainer=replace(CFG.trainer, devices=2))
    with pytest.raises(UserError, match=r"(?s)devices=2 with strategy=auto.*torchrun --nproc-per-node 2 train\.py"):
        train_ranker(ArmRows.of(spans, None, cfg), seed=0, cfg=cfg, directory=tmp_path / "none-0")


def test_killed_and_started_again_it_equals_an_undisturbed_run(
    spans: RankerSpans, trained: tuple[Ranker, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "lm-0"
    validate = ranker_module.PointwiseModule.on_validation_epoch_end
    ended = []

    def die_in_epoch_2(self: ranker_module.PointwiseModule) -> None:
        ended.append(1)
        if len(ended) == 2:
            raise KeyboardInterrupt
        validate(self)

    with monkeypatch.context() as patch:
        patch.setattr(ranker_module.PointwiseModule, "on_validation_epoch_end", die_in_epoch_2)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            train_ranker(ArmRows.of(spans, tastes(spans.log), CFG), seed=0, cfg=CFG, directory=directory)
    assert not directory.exists()
    assert list(tmp_path.glob(".lm-0.fit-*/checkpoints/last.ckpt"))
    resumed = train_ranker(ArmRows.of(spans, tastes(spans.log), CFG), seed=0, cfg=CFG, directory=directory)
    for name, tensor in trained[0].module.state_dict().items():
        torch.testing.assert_close(resumed.module.state_dict()[name], tensor, rtol=0, atol=0)


def test_seeds_differ_and_arms_of_a_seed_begin_alike(spans: RankerSpans) -> None:
    def state(forecast: object, seed: int) -> torch.Tensor:
        features = spans.fit.with_prior(forecast, GROUPS)  # type: ignore[arg-type]
        spec = ranker_module.FeatureSpec.fit(features, CFG.features, semantic_ids="v")
        module = ranker_module.build_module(spec, CFG, base_rates=[0.1], seed=seed)
        return torch.cat([tensor.flatten() for tensor in module.ranker.state_dict().values()])

    torch.testing.assert_close(state(None, 0), state(tastes(spans.log), 0), rtol=0, atol=0)
    assert not torch.equal(state(None, 0), state(None, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec["tables"]["ad"].pop(),
        lambda spec: spec["tables"]["ad"].reverse(),
        lambda spec: spec["mean"].reverse(),
        lambda spec: spec["config"].update(history_length=5),
        lambda spec: spec.update(semantic_ids="others"),
    ],
    ids=["fewer ids", "other ids", "other means", "other features", "other semantic IDs"],
)
def test_weights_with_another_feature_spec_are_refused(
    trained: tuple[Ranker, Path], tmp_path: Path, change: Callable[[dict], None]
) -> None:
    """Those of the same shapes too, which the weights would fit."""
    directory = tmp_path / "mixed"
    shutil.copytree(trained[1], directory)
    spec = json.loads((directory / SPEC).read_text())
    change(spec)
    (directory / SPEC).write_text(json.dumps(spec))
    with pytest.raises(LineageError, match="keep the files of one ranker together"):
        Ranker.load(directory)


@pytest.mark.parametrize("name", [WEIGHTS, SPEC])
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_damaged_files_are_an_error_that_says_so(
    trained: tuple[Ranker, Path], tmp_path: Path, name: str, damage: str
) -> None:
    directory = tmp_path / "damaged"
    shutil.copytree(trained[1], directory)
    if damage == "missing":
        (directory / name).unlink()
    else:
        (directory / name).write_bytes((directory / name).read_bytes()[:40])
    with pytest.raises(UserError, match=r"cannot be (read|understood)"):
        Ranker.load(directory)


def test_another_artifact_is_no_ranker(tmp_path: Path) -> None:
    Manifest(kind="two_tower", key="k").write(tmp_path)
    with pytest.raises(UserError, match="holds two_tower"):
        Ranker.load(tmp_path)


@pytest.mark.parametrize("covered", ["everybody", "half of the users"])
def test_on_a_day_whose_users_have_no_forecast_its_features_are_at_their_training_mean(
    spans: RankerSpans, tmp_path: Path, covered: str
) -> None:
    """With the flag set where training had users without; where it had none, the flag was constant and is silent."""
    forecast, users = tastes(spans.log), np.arange(len(spans.log.user_ids))
    cfg = replace(CFG, learning_rate=1e-2)
    of_training = KnownForecast(
        forecast.log_prob_UA, covered=np.full(len(users), True) if covered == "everybody" else users % 2 == 0
    )
    rows = ArmRows.of(spans, of_training, cfg)
    ranker = train_ranker(rows, seed=0, cfg=cfg, directory=tmp_path / "lm-0")
    nobody = KnownForecast(forecast.log_prob_UA, covered=np.zeros(len(users), bool))
    day = spans.evaluation.with_prior(nobody, GROUPS)
    design, flag = ranker.spec.apply(day), ranker.spec.dense.index("prior_missing")
    prior = np.array([name.startswith("prior_") for name in ranker.spec.dense])
    prior[flag] = False
    assert (design.dense_NF[:, prior] == 0).all()
    assert (design.dense_NF[:, flag] > 0).all() == (covered != "everybody")
    probability = ranker.probabilities(day)
    told = evaluate(Sample.of(day.rows.label, day.rows.weight, day.rows.user, draws=1, seed=0), probability)
    assert told["auc"][0] > 0.55
    actual = np.average(day.rows.label, weights=day.rows.weight)
    assert np.average(probability, weights=day.rows.weight) == pytest.approx(actual, rel=0.5)


def test_batches_and_a_stopping_day_of_one_class_are_learned_from(spans: RankerSpans, tmp_path: Path) -> None:
    """Many a batch of sixteen holds no conversion; a day without one says nothing of the level, which stays."""
    cfg = tiny_ranker(model="logistic", batch_size=16, trainer=replace(CFG.trainer, max_epochs=1))
    rows = ArmRows.of(spans, None, cfg)
    stop = replace(rows.stop, label_NT=np.zeros_like(rows.stop.label_NT))
    ranker = train_ranker(replace(rows, stop=stop), seed=0, cfg=cfg, directory=tmp_path / "none-0")
    assert ranker.module.intercept.tolist() == [0.0]
    assert np.isfinite(Manifest.read(tmp_path / "none-0").metrics["val_loss"])
    day = spans.evaluation.rows
    sample = Sample.of(day.label, day.weight, day.user, draws=1, seed=0)
    assert evaluate(sample, predict(ranker.module, rows.evaluation)[:, 0])["auc"][0] > 0.6


def test_a_request_is_ranked_by_probability(spans: RankerSpans, trained: tuple[Ranker, Path]) -> None:
    log = spans.log
    ads = log.active_ads(1, 10).ad
    ranking = rank(trained[0], spans.builder, tastes(log), ads, user=4, market=1, period=10)
    assert sorted(ranking.ad_N.tolist()) == sorted(ads.tolist())
    assert (np.diff(ranking.probability_N) <= 0).all()
    reverse = rank(trained[0], spans.builder, tastes(log), ads[::-1], user=4, market=1, period=10)
    np.testing.assert_allclose(reverse.probability_N, ranking.probability_N, rtol=1e-6)
    best = int(ranking.ad_N[0])
    known = tastes(log).log_prob_UA[4, log.ad_advertiser[best]]
    assert ranking.dense["prior_log_prob"][0] == pytest.approx(known)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ads": np.array([], dtype=np.int32)}, "no candidate"),
        ({"ads": np.array([0, 10_000])}, "ad 10000"),
        ({"user": -1}, "user -1"),
        ({"market": 99}, "market 99"),
    ],
)
def test_requests_outside_the_log_are_refused(
    spans: RankerSpans, trained: tuple[Ranker, Path], change: dict, message: str
) -> None:
    request = {"ads": np.array([0, 1]), "user": 0, "market": 0, "period": 10} | change
    with pytest.raises(UserError, match=message):
        rank(trained[0], spans.builder, None, **request)


def test_features_of_another_config_are_refused(spans: RankerSpans, trained: tuple[Ranker, Path]) -> None:
    other = FeatureBuilder(spans.log, spans.builder.ids, replace(CFG.features, history_length=5))
    with pytest.raises(LineageError, match="another config"):
        rank(trained[0], other, None, np.array([0]), user=0, market=0, period=10)


@pytest.mark.parametrize("model", MODELS)
def test_every_model_is_trained_saved_and_loaded_by_a_config_swap(
    spans: RankerSpans, tmp_path: Path, model: str
) -> None:
    cfg = tiny_ranker(model=model, trainer=replace(CFG.trainer, max_epochs=1))
    ranker = train_ranker(ArmRows.of(spans, tastes(spans.log), cfg), seed=0, cfg=cfg, directory=tmp_path / "lm-0")
    again = Ranker.load(tmp_path / "lm-0")
    assert again.model == model
    features = spans.evaluation.with_prior(tastes(spans.log), GROUPS)
    np.testing.assert_array_equal(again.probabilities(features), ranker.probabilities(features))


def test_a_feature_matters_as_far_as_the_log_odds_change_without_it(
    spans: RankerSpans, trained: tuple[Ranker, Path]
) -> None:
    log, ranker = spans.log, trained[0]
    ranking = rank(ranker, spans.builder, tastes(log), log.active_ads(1, 10).ad, user=4, market=1, period=10)
    found = influences(ranker, ranking, candidates=3, features=100)
    assert len(found) == 3
    for place, of_ad in enumerate(found):
        effects = [abs(influence.effect) for influence in of_ad]
        assert effects == sorted(effects, reverse=True)
        assert {influence.feature for influence in of_ad} <= {*ranker.spec.dense, *ranker.spec.features}
        known = next(influence for influence in of_ad if influence.feature == "prior_log_prob")
        row = int(ranking.order_N[place])
        mean = ranker.spec.mean[ranker.spec.dense.index("prior_log_prob")]
        column = ranking.features.dense["prior_log_prob"].copy()
        column[row] = mean
        without = replace(ranking.features, dense={**ranking.features.dense, "prior_log_prob": column})
        odds = [np.log(p / (1 - p)) for p in (ranking.probability_N[place], ranker.probabilities(without)[row])]
        assert known.effect == pytest.approx(odds[0] - odds[1], abs=1e-4)
        assert known.value == pytest.approx(ranking.dense["prior_log_prob"][place])
