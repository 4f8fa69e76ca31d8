"""Composing the configuration: every choice and key is checked, and all mistakes are told together."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from data.errors import UserError
from data.rules import MAX_SEED
from pipeline import config as configuration
from pipeline.config import AdsidConfig, compose, groups

ROOT = Path(__file__).parents[2]


def test_every_component_has_a_group_of_configs() -> None:
    components = {entry.name for entry in fields(AdsidConfig)} - {"experiment", "seed", "evaluate", "strategy", "run"}
    assert set(groups()) == components | {"experiment"}


@pytest.mark.parametrize(("group", "choice"), [(group, choice) for group in groups() for choice in groups()[group]])
def test_every_config_file_composes(group: str, choice: str) -> None:
    assert isinstance(compose([f"{group}={choice}"]), AdsidConfig)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_file_opens_with_a_command_that_is_valid(path: Path) -> None:
    text = path.read_text().replace("\\\n#", " ")  # a command may go on in the next line
    comments = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    commands = [line for line in comments if line.startswith(("adsid ", "python train.py "))]
    assert commands, f"{path} shows no command"
    for command in commands:
        compose([word for word in command.split()[2:] if "=" in word and not word.startswith("stage=")])


def test_values_and_choices() -> None:
    config = compose(["experiment=smoke", "prior.prompts=7", "data.split.test=[47,50]", "ranker.seeds=[4]", "seed=3"])
    assert config.experiment == "smoke"
    assert config.prior.base.name == "packaged:tiny"
    assert config.prior.prompts == 7
    assert config.data.split.test == (47, 50)
    assert config.ranker.seeds == [4]
    assert config.semantic_ids.seed == config.prior.seed == config.retrieval.seed == 3
    assert config.run.dir == "runs/smoke"


def test_one_device_for_all_components_and_another_for_one() -> None:
    config = compose(["trainer=cpu", "prior.trainer.accelerator=gpu", "trainer.progress_bar=false"])
    assert (
        config.trainer.accelerator == config.ranker.trainer.accelerator == config.retrieval.trainer.accelerator == "cpu"
    )
    assert config.prior.trainer.accelerator == "gpu"
    assert not config.semantic_ids.trainer.progress_bar


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("experiment=smok", ["experiment is one of full, quickstart, smoke", "did you mean smoke"]),
        ("prior=smollm", ["prior is one of items, smollm2, tiny"]),
        ("prior.promts=3", ["unknown key prior.promts", "keys of prior: base,", "did you mean prior.prompts"]),
        ("priors.prompts=3", ["unknown key priors.prompts", "did you mean prior.prompts"]),
        ("prompts=3", ["did you mean prior.prompts"]),
        ("prior.prompts.x=3", ["unknown key prior.prompts.x"]),
        ("seed=abc", ["seed='abc', of type str", "a whole number"]),
        ("prior.panel=x", ["a whole number or null"]),
        ("ranker.seeds=3", ["a list in brackets, each a whole number"]),
        ("data.split.test=x", ["[a whole number, a whole number]"]),
        ("prior.trainer=3", ["a mapping with some of max_epochs"]),
        ("trainer.progress_bar=perhaps", ["true or false"]),
        ("prior.prompts=-3", ["prior.prompts=-3", "at least 1"]),
        ("evaluate=tset", ["validation or test", "did you mean test"]),
        ("seed=1,2", ["one value for one key"]),
        ("~seed", ["one value for one key"]),
        ("seed", ["key=value"]),
        ("=3", ["key=value"]),
        ("run.dir=''", ["run.dir is empty"]),
    ],
)
def test_a_mistake_names_what_is_valid(override: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose([override])
    for part in parts:
        assert part in str(caught.value)


IMPOSSIBLE = {
    "data.seed": ["-1", str(MAX_SEED + 1)],
    "data.impressions_per_visit": ["0"],
    "data.max_users": ["0"],
    "data.simulator.users": ["0"],
    "data.simulator.cold_share": ["1.5", "nan"],
    "semantic_ids.seed": ["-5"],
    "semantic_ids.trainer.patience": ["-1"],
    "semantic_ids.rqvae.source_dropout": ["1.0"],
    "prior.seed": ["-5"],
    "prior.first_period": ["0"],
    "prior.prompt.max_tokens": ["0"],
    "prior.probe.prompts": ["-1"],
    "prior.probe.epochs": ["0"],
    "prior.probe.batch_size": ["0"],
    "prior.probe.weight_decay": ["-0.1"],
    "prior.history.learning_rate": ["0"],
    "prior.history.dropout": ["1.0", "nan"],
    "prior.head.kind": ["bound"],
    "prior.head.dropout": ["1.5", "-0.1", "nan"],
    "prior.head.learning_rate": ["-1", "0", "inf"],
    "prior.head.period_learning_rate": ["-1"],
    "prior.lora.rank": ["-4"],
    "prior.lora.layers": ["-1", "0"],
    "prior.lora.alpha": ["-1", "0"],
    "prior.lora.learning_rate": ["0"],
    "prior.decode.frontier_floor": ["-1", "0", "2"],
    "prior.decode.beam": ["0"],
    "prior.baselines.sasrec.dropout": ["1"],
    "prior.baselines.sasrec.learning_rate": ["-1"],
    "prior.baselines.sasrec.trainer.patience": ["-1"],
    "prior.trainer.patience": ["-1"],
    "prior.trainer.gradient_clip": ["-1", "0"],
    "prior.trainer.max_epochs": ["0"],
    "retrieval.seed": ["-5"],
    "retrieval.model.dim": ["0"],
    "retrieval.pairs.batch_size": ["0"],
    "retrieval.pairs.requests_per_epoch": ["0"],
    "retrieval.pairs.popularity.decay": ["0", "nan"],
    "retrieval.popularity.market_weight": ["-1"],
    "retrieval.own.decay": ["2"],
    "retrieval.item_knn.neighbours": ["0"],
    "retrieval.forecast.seeded_share": ["1.5"],
    "retrieval.advertiser.prior_weight": ["-1"],
    "retrieval.sparse_quantile": ["-0.1"],
    "ranker.seeds": ["[-1]", "[]", "[1,1]"],
    "ranker.learning_rate": ["nan"],
    "ranker.trainer.gradient_clip": ["-1"],
    "auction.seeds": ["[-1]"],
    "seed": ["-1"],
    "trainer.devices": ["0"],
}


@pytest.mark.parametrize("turn", range(max(map(len, IMPOSSIBLE.values()))))
def test_values_that_cannot_work_are_told_together_by_their_full_keys(turn: int) -> None:
    given = {key: values[turn] for key, values in IMPOSSIBLE.items() if turn < len(values)}
    with pytest.raises(UserError) as caught:
        compose([f"{key}={value}" for key, value in given.items()])
    told = {problem.given.partition("=")[0]: problem.action for problem in caught.value.problems}
    assert told.keys() == given.keys()
    assert all(key in action for key, action in told.items())


def test_what_all_components_take_over_is_told_once_and_by_the_key_that_was_set() -> None:
    with pytest.raises(UserError) as caught:
        compose(["seed=-1", "trainer.accelerator=abacus", "prior.trainer.devices=0"])
    told = [problem.given for problem in caught.value.problems]
    assert sorted(told) == ["prior.trainer.devices=0", "seed=-1", "trainer.accelerator=abacus"]


def test_a_part_that_failed_is_not_judged_with_others_by_its_default() -> None:
    with pytest.raises(UserError) as caught:
        compose(["retrieval=advertiser_tower", "retrieval.model.advertiser_weight=-1"])
    assert [problem.given for problem in caught.value.problems] == ["retrieval.model.advertiser_weight=-1.0"]


def test_the_simulator_has_no_items() -> None:
    with pytest.raises(UserError, match="entity=item with data=simulator"):
        compose(["data=simulator", "semantic_ids=items"])


def test_several_mistakes_are_told_together() -> None:
    with pytest.raises(UserError) as caught:
        compose(["experiment=smok", "prior.promts=3", "seed=abc"])
    for part in ("smok", "prior.promts", "seed='abc'"):
        assert part in str(caught.value)
    with pytest.raises(UserError) as caught:
        compose(["prior.prompts=0", "prior.probe.epochs=0", "prior.lora.rank=-1", "ranker.batch_size=0", "evaluate=x"])
    for part in ("prior.prompts=0", "prior.probe.epochs=0", "prior.lora.rank=-1", "ranker.batch_size=0", "evaluate=x"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "command"),
    [
        ([], "adsid run"),
        (["experiment=smoke", "seed=1"], "adsid run experiment=smoke seed=1"),
        (["experiment=smoke", "data.split.test=[47,49]"], "adsid run experiment=smoke 'data.split.test=[47,49]'"),
        (["run.dir='my runs'"], """adsid run 'run.dir='"'"'my runs'"'"''"""),
        (["prior.prompt.next='a\nb'"], None),
        (None, None),
    ],
)
def test_the_command_of_a_run_is_told_for_a_shell(
    tmp_path: Path, overrides: list[str] | None, command: str | None
) -> None:
    config = compose(["experiment=smoke"])
    configuration.save(config, tmp_path / "config.yaml", overrides)
    told = configuration.made_by(tmp_path)
    assert told == (command or f"adsid run, as configured in {tmp_path / 'config.yaml'}")
    assert command is None or shlex.split(command) == ["adsid", "run", *(overrides or [])]
    assert configuration.load(tmp_path / "config.yaml") == config


def test_a_run_without_a_config_is_made_by_an_unknown_command(tmp_path: Path) -> None:
    assert configuration.made_by(tmp_path) == f"adsid run, as configured in {tmp_path / 'config.yaml'}"


def test_a_saved_config_is_read_back(tmp_path: Path) -> None:
    config = compose(["experiment=smoke", "data.split.test=[47,49]"])
    configuration.save(config, tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text("nothing: 1\n")
    with pytest.raises(UserError, match="nothing"):
        configuration.load(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"none\.yaml"):
        configuration.load(tmp_path / "none.yaml")
