"""Several tasks: their labels are what happened, each is learned and reported, and one is a ranker as ever."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.errors import UserError
from data.log import KINDS, Log, load_log
from data.prepare import prepare
from data.truth import TRUTH, Truth
from models.mmoe import MMoEConfig
from models.shared_bottom import SharedBottomConfig
from pipeline.config import compose
from ranking.ablation import arms, compare, grid, predictions_of, run_ablation
from ranking.config import MULTI_TASK, TASKS_SHARE, RankerConfig
from ranking.features import FeatureBuilder
from ranking.metrics import Sample, auc
from ranking.oracle import true_chance
from ranking.prior import GROUPS
from ranking.ranker import ArmRows, Ranker, RankerSpans, predict, train_ranker
from ranking.rows import Rows
from ranking.serving import ServedRanker, export
from ranking.tasks import TASKS, check_tasks, labels_of
from tests.logs import tiny_log
from tests.ranking.common import tastes, tiny_ids, tiny_ranker

SEVERAL = ["label", "click", "click_conversion"]
SIZES = {
    "shared_bottom": SharedBottomConfig(bottom_layers=[8], tower_layers=[4]),
    "mmoe": MMoEConfig(experts=2, expert_layers=[8], tower_layers=[4]),
}


def ranker_of(**changes: object) -> RankerConfig:
    return tiny_ranker(**(SIZES | changes))


@pytest.fixture(scope="module")
def clicked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Log, Truth]:
    """A simulated log, which has clicks and both kinds of conversions."""
    directory = tmp_path_factory.mktemp("simulated")
    cfg = compose(["data=simulator", "data.simulator.users=300", "data.simulator.advertisers=30"]).data
    prepare(cfg, directory)
    return load_log(directory, cfg, evaluate="validation"), Truth.load(directory / TRUTH)


@pytest.fixture(scope="module")
def spans(clicked: tuple[Log, Truth]) -> RankerSpans:
    log = clicked[0]
    return RankerSpans.of(FeatureBuilder(log, tiny_ids(log), ranker_of().features), None, tasks=SEVERAL)


def test_labels_are_what_happened_in_the_visit(clicked: tuple[Log, Truth]) -> None:
    log = clicked[0]
    rows = Rows.of_span(log, "validation", tasks=TASKS)
    first, last = log.split.validation
    events = log.events
    within = (events.period >= first) & (events.period <= last) & (events.ad >= 0)
    assert not np.isnan(rows.label_NT).any()
    label, click, click_conversion, view_conversion = rows.label_NT.T
    for name, column in zip(TASKS[1:], (click, click_conversion, view_conversion), strict=True):
        of_kind = within & (events.kind == KINDS.index(name))
        assert column.sum() == np.unique(np.stack([events.request, events.ad])[:, of_kind], axis=1).shape[1] > 50
    assert (click >= click_conversion).all()
    np.testing.assert_array_equal(label, np.maximum(click_conversion, view_conversion))
    alone = Rows.of_span(log, "validation")
    assert len(rows) < len(alone)  # a click stands for its impression, and an ad may be shown twice in a visit
    assert rows.label.sum() == alone.label.sum()


def test_labels_before_the_log_recorded_an_outcome_are_unknown(clicked: tuple[Log, Truth]) -> None:
    log = clicked[0]
    late = log.events.select(
        ~np.isin(log.events.kind, [KINDS.index("click"), KINDS.index("click_conversion")]) | (log.events.period >= 19)
    )
    poor = replace(log, events=late)
    period = np.array([18, 19, 20], np.int32)
    bits = np.full(3, 1 << KINDS.index("impression"), np.int32)
    found = labels_of(TASKS, poor, bits, period)
    np.testing.assert_array_equal(np.isnan(found[:, 1]), [True, False, False])
    np.testing.assert_array_equal(found[:, [0, 3]], 0.0)
    Rows.of_span(poor, "ranker_fit", tasks=TASKS)
    check_tasks(TASKS, poor)


@pytest.mark.parametrize("head", MULTI_TASK)
@pytest.mark.parametrize("model", TASKS_SHARE)
def test_every_head_over_every_ranker_is_a_config_swap(
    spans: RankerSpans, tmp_path: Path, head: str, model: str
) -> None:
    cfg = ranker_of(tasks=SEVERAL, multi_task=head, model=model, trainer=replace(ranker_of().trainer, max_epochs=1))
    rows = ArmRows.of(spans, None, cfg)
    ranker = train_ranker(rows, seed=0, cfg=cfg, directory=tmp_path / "none-0")
    found = predict(ranker.module, rows.evaluation)
    assert found.shape == (len(rows.evaluation), 3)
    again = Ranker.load(tmp_path / "none-0")
    assert again.tasks == tuple(SEVERAL)
    np.testing.assert_array_equal(predict(again.module, rows.evaluation), found)
    features = spans.evaluation.with_prior(None, GROUPS)
    np.testing.assert_array_equal(again.probabilities(features), found[:, 0])
    if (model, head) == ("dlrm", "mmoe"):  # an export takes long
        assert export(again, tmp_path / "served") <= 1e-5
        served = ServedRanker.load(tmp_path / "served").probabilities(features)
        np.testing.assert_allclose(served, found[:, 0], atol=1e-5)


@pytest.mark.parametrize("head", MULTI_TASK)
def test_every_task_is_learned_at_its_own_level(spans: RankerSpans, tmp_path: Path, head: str) -> None:
    trainer = replace(ranker_of().trainer, max_epochs=6)
    cfg = ranker_of(tasks=SEVERAL, multi_task=head, trainer=trainer, learning_rate=1e-2, embedding_learning_rate=1e-2)
    rows = ArmRows.of(spans, None, cfg)
    ranker = train_ranker(rows, seed=0, cfg=cfg, directory=tmp_path / "none-0")
    stopped, found = predict(ranker.module, rows.stop), predict(ranker.module, rows.evaluation)
    of, areas = spans.evaluation.rows, []
    for task in range(3):
        expected = np.average(rows.stop.label_NT[:, task], weights=rows.stop.weight_N)
        assert np.average(stopped[:, task], weights=rows.stop.weight_N) == pytest.approx(expected, rel=1e-3)
        of_task = Sample.of(rows.evaluation.label_NT[:, task], rows.evaluation.weight_N, of.user, draws=1, seed=0)
        areas.append(float(auc(of_task, found[:, task])[0]))
    assert np.mean(areas) > 0.6, areas


def test_one_task_is_the_ranker_of_one_task(clicked: tuple[Log, Truth], tmp_path: Path) -> None:
    """Whatever the head of several would be; and another name of the same outcome is the same ranker."""
    log = tiny_log(tmp_path)  # its labels are view conversions
    predictions = []
    variants: list[dict[str, object]] = [{}, {"multi_task": "mmoe"}, {"tasks": ["view_conversion"]}]
    for number, changes in enumerate(variants):
        cfg = ranker_of(**changes)
        spans = RankerSpans.of(FeatureBuilder(log, tiny_ids(log), cfg.features), None, tasks=cfg.tasks)
        rows = ArmRows.of(spans, tastes(log), cfg)
        ranker = train_ranker(rows, seed=0, cfg=cfg, directory=tmp_path / f"ranker-{number}")
        predictions.append(predict(ranker.module, rows.evaluation))
    np.testing.assert_array_equal(predictions[1], predictions[0])
    np.testing.assert_array_equal(predictions[2], predictions[0])


def test_each_task_has_its_metrics_and_the_truth_ranks_each_best(
    clicked: tuple[Log, Truth], spans: RankerSpans, tmp_path: Path
) -> None:
    cfg = ranker_of(tasks=SEVERAL, shuffled_control=False)
    rows = run_ablation(spans, {"none": None}, cfg, tmp_path)
    assert {"all", "click", "click_conversion"} <= {row.segment for row in rows}
    truth = true_chance(clicked[1], clicked[0], spans.evaluation.rows, tasks=SEVERAL)
    trained = predictions_of(arms(spans, {"none": None}, cfg)[0], spans, [0], tmp_path)
    both = {"none": trained, "true chance": [truth]}
    compared = compare(spans, both, cfg, pairs=[("true chance", "none")])
    for segment in ("all", "click", "click_conversion"):
        (row,) = [r for r in compared if (r.metric, r.arm, r.segment) == ("auc", "true chance - none", segment)]
        assert row.value > 0


def test_rankers_without_anything_to_share_are_no_part_of_the_grid(spans: RankerSpans) -> None:
    forecasts = {"none": None, "anchor": tastes(spans.log), "lm": tastes(spans.log)}
    variants, _ = grid(spans, forecasts, ranker_of(tasks=SEVERAL))
    assert {variant.cfg.model for variant in variants} == set(TASKS_SHARE)


@pytest.mark.parametrize(
    ("tasks", "lacking", "valid"),
    [
        (["click"], "names click,", "label, view_conversion"),
        (["label", "click", "click_conversion"], "names click, click_conversion,", "label, view_conversion"),
    ],
)
def test_a_task_that_the_data_lacks_is_told_with_those_it_has(
    tmp_path: Path, tasks: list[str], lacking: str, valid: str
) -> None:
    log = tiny_log(tmp_path)
    builder = FeatureBuilder(log, tiny_ids(log), ranker_of().features)
    with pytest.raises(UserError, match=lacking) as error:
        RankerSpans.of(builder, None, tasks=tasks)
    assert f"some of {valid}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": []}, "ranker.tasks="),
        ({"tasks": ["clicks"]}, "some of label, click, click_conversion, view_conversion"),
        ({"tasks": ["click", "click"]}, "each named once"),
        ({"tasks": ["click"], "task_weights": [1.0, 2.0]}, "a positive number for each of 1 tasks"),
        ({"tasks": ["label", "click"], "task_weights": [1.0, 0.0]}, "a positive number for each of 2 tasks"),
        ({"multi_task": "ple"}, "one of shared_bottom, mmoe"),
        ({"tasks": ["label", "click"], "model": "logistic"}, "one of dlrm, dcn_v2, deepfm with several tasks"),
        ({"mmoe": MMoEConfig(experts=0)}, "ranker.mmoe.experts=0"),
        ({"mmoe": MMoEConfig(expert_layers=[])}, "ranker.mmoe.expert_layers="),
        ({"shared_bottom": SharedBottomConfig(tower_layers=[0])}, r"ranker.shared_bottom.tower_layers\[0\]=0"),
    ],
)
def test_impossible_settings_are_told_with_their_key(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RankerConfig(**changes)


@pytest.mark.parametrize("head", MULTI_TASK)
def test_a_head_is_chosen_by_its_name_alone(head: str) -> None:
    cfg = compose(["experiment=smoke", "data=simulator", f"ranker={head}"]).ranker
    assert (cfg.multi_task, cfg.tasks[0]) == (head, "label")
    assert len(cfg.tasks) == 4
