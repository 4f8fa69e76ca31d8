"""Composing the configuration: every choice and key is checked, and all mistakes are told together."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from data.errors import UserError
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


def test_the_simulator_has_no_items() -> None:
    with pytest.raises(UserError, match="entity=item with data=simulator"):
        compose(["data=simulator", "semantic_ids=items"])


def test_several_mistakes_are_told_together() -> None:
    with pytest.raises(UserError) as caught:
        compose(["experiment=smok", "prior.promts=3", "seed=abc"])
    for part in ("smok", "prior.promts", "seed='abc'"):
        assert part in str(caught.value)
    with pytest.raises(UserError) as caught:
        compose(["prior.prompts=0", "ranker.batch_size=0", "evaluate=x"])
    for part in ("prior.prompts=0", "ranker.batch_size=0", "evaluate=x"):
        assert part in str(caught.value)


def test_a_saved_config_is_read_back(tmp_path: Path) -> None:
    config = compose(["experiment=smoke", "data.split.test=[47,49]"])
    configuration.save(config, tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml") == config
    (tmp_path / "config.yaml").write_text("nothing: 1\n")
    with pytest.raises(UserError, match="nothing"):
        configuration.load(tmp_path / "config.yaml")
    with pytest.raises(UserError, match=r"none\.yaml"):
        configuration.load(tmp_path / "none.yaml")
