"""The whole configuration as one typed dataclass, composed from ``configs/`` and checked in one go.

Hydra picks one file a group; the result is merged into `AdsidConfig`, so every key, type and value comes from a
dataclass. Overrides are checked one by one against that schema: all problems are told together, each with the
valid choices and the nearest names.
"""

from __future__ import annotations

import difflib
import importlib.resources
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data.artifacts import atomic_write_text, to_plain
from data.config import DataConfig
from data.errors import UserError
from data.rules import SEED, at_least, broken, check
from data.split import EVALUATE
from priors.config import PriorConfig
from ranking.auction import AuctionConfig
from ranking.config import RankerConfig
from retrieval.config import RetrievalConfig
from semantic_ids.config import SemanticIdsConfig

CONFIGS = "configs"
CONFIG_FILE = "config.yaml"
"""Of a run directory: what it was made with."""
_COMMENT = "# "
STUDIES = "ablation"
"""Folder of ``configs/`` that holds ablations (`pipeline.ablation`) and is no group."""


@dataclass
class RunConfig:
    """Where a run writes and how far it goes.

    Attributes:
        dir: the run directory; ``~`` is the home folder.
        until: the last stage wanted, with all it needs; None for all stages.
    """

    dir: str = "runs/${experiment}"
    until: str | None = None

    def __post_init__(self) -> None:
        if not self.dir.strip():
            raise UserError("run.dir is empty", expected="a folder", action="name one, e.g. run.dir=runs/mine")


@dataclass
class DeviceConfig:
    """What all stages are trained on; every component's ``trainer`` takes these values unless it has its own.

    Attributes:
        accelerator: Lightning's name; ``auto`` takes the GPU where there is one.
        precision: Lightning's name; ``auto`` is bf16 autocast on a GPU and fp32 on a CPU.
        devices: number of devices.
        progress_bar: show progress bars.
    """

    accelerator: str = "auto"
    precision: str = "auto"
    devices: int = 1
    progress_bar: bool = True

    def __post_init__(self) -> None:
        check(self, "trainer", {"devices": at_least(1)})


@dataclass
class AdsidConfig:
    """Everything a run depends on.

    Attributes:
        experiment: name of the experiment's config; part of the default run directory.
        seed: of every stage that has no seed of its own.
        evaluate: span that figures are of, ``validation`` or ``test``; see `data.split.TimeSplit`.
        strategy: ``auto``, or ``torchrec`` for a ranker that several processes train together.
        run: where the run writes.
        trainer: device of all stages.
        data, semantic_ids, prior, retrieval, ranker: the components.
        auction: the market of `adsid bench ab`; no stage looks at it.
    """

    experiment: str = "quickstart"
    seed: int = 0
    evaluate: str = "validation"
    strategy: str = "auto"
    run: RunConfig = field(default_factory=RunConfig)
    trainer: DeviceConfig = field(default_factory=DeviceConfig)
    data: DataConfig = field(default_factory=DataConfig)
    semantic_ids: SemanticIdsConfig = field(default_factory=SemanticIdsConfig)
    prior: PriorConfig = field(default_factory=PriorConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    ranker: RankerConfig = field(default_factory=RankerConfig)
    auction: AuctionConfig = field(default_factory=AuctionConfig)

    def __post_init__(self) -> None:
        errors = []
        if self.evaluate not in EVALUATE:
            errors.append(
                UserError(
                    f"evaluate={self.evaluate}",
                    expected=" or ".join(EVALUATE),
                    action=f"set evaluate to one of them{nearest(self.evaluate, EVALUATE)}",
                )
            )
        errors += broken(self, "", {"seed": SEED})
        if self.semantic_ids.entity == "item" and self.data.source == "simulator":
            errors.append(
                UserError(
                    "semantic_ids.entity=item with data=simulator",
                    expected="advertisers: they are what the simulator knows the truth of",
                    action="set semantic_ids.entity=advertiser, or forecast the items of another log",
                )
            )
        if errors:
            raise UserError.collect(errors)


def groups() -> dict[str, list[str]]:
    """The config groups and the choices of each."""
    root = importlib.resources.files(CONFIGS)
    found = {}
    for entry in sorted(root.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith("_") and entry.name != STUDIES:
            names = sorted(file.name.removesuffix(".yaml") for file in entry.iterdir() if file.name.endswith(".yaml"))
            if names:
                found[entry.name] = names
    return found


def compose(overrides: Sequence[str] = ()) -> AdsidConfig:
    """Compose the configuration of a run.

    Args:
        overrides: Hydra overrides: ``group=choice`` or ``path.to.key=value``.

    Returns:
        The typed configuration, all interpolations resolved.

    Raises:
        UserError: an override names an unknown group, choice or key, has a value of another type or out of range,
            or cannot be parsed; all such problems at once.
    """
    picked, values, schema = _checked(overrides)
    with initialize_config_module(CONFIGS, version_base="1.3"):
        try:
            composed = hydra_compose("config", overrides=[f"{one.key_or_group}={one.value()}" for one in picked])
        except HydraException as error:
            raise UserError(
                f"overrides {' '.join(overrides)}",
                expected=f"choices of {CONFIGS}/ that fit together",
                action=f"correct the config files named here: {error}",
            ) from error
    return _overridden(_merge(schema, composed), values)


def recompose(plain: Mapping[str, Any], overrides: Sequence[str] = ()) -> AdsidConfig:
    """A configuration from plain data, e.g. of a manifest, with overrides of single keys.

    Args:
        plain: nested keys of `AdsidConfig`, as many as are known.
        overrides: ``path.to.key=value``.

    Raises:
        UserError: as of `compose`; or a choice of a group, which would mean another configuration than the one given.
    """
    picked, values, schema = _checked(overrides)
    if picked:
        raise UserError(
            " ".join(f"{one.key_or_group}={one.value()}" for one in picked),
            expected="overrides of single keys, for the choices were made when it was written",
            action="leave it out",
        )
    return _overridden(_merge(schema, OmegaConf.create(dict(plain))), values)


def _checked(overrides: Sequence[str]) -> tuple[list[Override], list[Override], DictConfig]:
    """Overrides that choose of a group, those that set a value, and the schema they were checked against."""
    parsed, errors = parse_overrides(overrides)
    choices = groups()
    picked = [one for one in parsed if one.key_or_group in choices and isinstance(one.value(), str)]
    values = [one for one in parsed if one not in picked]
    for one in picked:
        errors += _unknown_choice(one, choices[one.key_or_group])
    schema = _writable(OmegaConf.structured(AdsidConfig))
    errors += [error for one in values for error in _check_value(one, schema, choices)]
    if errors:
        raise UserError.collect(errors)
    return picked, values, schema


def _overridden(merged: DictConfig, values: Sequence[Override]) -> AdsidConfig:
    for one in values:
        OmegaConf.update(merged, one.key_or_group, one.value(), merge=True)
    return _instantiate(merged)


def parse_overrides(overrides: Sequence[str], *, sweeps: bool = False) -> tuple[list[Override], list[UserError]]:
    """Overrides as Hydra reads them, and what is wrong with the others.

    Args:
        overrides: of a command line.
        sweeps: whether one may have several values.
    """
    parser = OverridesParser.create()
    parsed, errors = [], []
    for text in overrides:
        try:
            one = parser.parse_override(text)
            if not one.key_or_group:
                raise HydraException("no key")
        except HydraException:
            errors.append(
                UserError(
                    f"the override {text!r}",
                    expected="key=value, e.g. experiment=smoke or prior.prompts=2000",
                    action="correct it; quote values with special characters: 'run.dir=\"my runs\"'",
                )
            )
            continue
        known = one.type in (OverrideType.CHANGE, OverrideType.FORCE_ADD, OverrideType.ADD)
        if not known or (one.is_sweep_override() and not sweeps):
            errors.append(
                UserError(
                    f"the override {text!r}",
                    expected="one value for one key, e.g. seed=1",
                    action="give a single value (a list is written in brackets, e.g. ranker.seeds=[0,1,2]), or several "
                    "to `adsid tune`, which chooses among them",
                )
            )
            continue
        parsed.append(one)
    return parsed, errors


def _unknown_choice(one: Override, choices: Sequence[str]) -> list[UserError]:
    if one.value() in choices:
        return []
    return [
        UserError(
            f"{one.key_or_group}={one.value()}",
            expected=f"{one.key_or_group} is one of {', '.join(choices)}",
            action=f"choose one of them{nearest(str(one.value()), choices)}",
        )
    ]


def _check_value(one: Override, schema: DictConfig, choices: dict[str, list[str]]) -> list[UserError]:
    """Whether a value override names a key of the schema and has its type."""
    key, value = one.key_or_group, one.value()
    parent = key.rpartition(".")[0]
    if key not in set(_keys(AdsidConfig())):
        known, where = AdsidConfig(), ""
        for part in parent.split(".") if parent else []:
            if not is_dataclass(known) or not hasattr(known, part):
                break
            known, where = getattr(known, part), f"{where}.{part}" if where else part
        siblings = [entry.name for entry in fields(known)] if is_dataclass(known) else []
        kind = "keys" if where else "keys and groups"
        every = sorted({*_keys(AdsidConfig()), *choices})
        return [
            UserError(
                f"the unknown key {key}",
                expected=f"one of the {kind}{' of ' + where if where else ''}: "
                + ", ".join(siblings or sorted({entry.split(".")[0] for entry in every})),
                action=f"correct the name{nearest(key, every)}",
            )
        ]
    try:
        OmegaConf.update(schema.copy(), key, value, merge=True)
    except OmegaConfBaseException:
        node = OmegaConf.select(schema, key, throw_on_missing=False)
        if isinstance(node, DictConfig):
            expected = f"a mapping with some of {', '.join(str(entry) for entry in node)}" + (
                f", or one of the choices {', '.join(choices[key])}" if key in choices else ""
            )
        else:
            expected = _type_name(key)
        return [
            UserError(
                f"{key}={value!r}, of type {type(value).__name__}",
                expected=expected,
                action=f"give {key} such a value",
            )
        ]
    return []


def _type_name(key: str) -> str:
    owner: Any = AdsidConfig
    *path, name = key.split(".")
    for part in path:
        owner = get_type_hints(owner)[part]
    return _words(get_type_hints(owner)[name])


def _words(kind: Any) -> str:
    """A type as a user would say it."""
    plain = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}
    if kind in plain:
        return plain[kind]
    inner = get_args(kind)
    if get_origin(kind) is tuple:
        return "[" + ", ".join(_words(part) for part in inner) + "]"
    if get_origin(kind) is list:
        return f"a list in brackets, each {_words(inner[0])}"
    return " or ".join(_words(part) for part in inner) if inner else str(kind)


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for entry in fields(node):
        value, key = getattr(node, entry.name), f"{prefix}{entry.name}"
        yield key
        if is_dataclass(value):
            yield from _keys(value, f"{key}.")


def _merge(schema: DictConfig, composed: DictConfig | ListConfig) -> DictConfig:
    """The composed files in the schema; a file's mistake is told with its key."""
    try:
        OmegaConf.set_struct(composed, False)
        merged = OmegaConf.merge(schema, composed)
    except OmegaConfBaseException as error:
        raise UserError(
            f"{error.full_key or 'a key'} in a config file ({str(error).splitlines()[0]})",
            expected="keys and types of the component's config dataclass",
            action="correct the YAML file",
        ) from error
    assert isinstance(merged, DictConfig)
    return merged


def _writable(node: DictConfig) -> DictConfig:
    """Lets a schema be merged into where frozen dataclasses made it read-only."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_interpolation():
            _writable(child)
    return node


def _instantiate(merged: DictConfig) -> AdsidConfig:
    """Dataclasses with their own checks; the problems of all components are told together, each once."""
    errors: dict[str, UserError] = {}
    config = _build(merged, AdsidConfig(), "", errors)
    if errors:
        raise UserError.collect(list(errors.values()))
    assert isinstance(config, AdsidConfig)
    return config


def _build(node: DictConfig, default: Any, key: str, errors: dict[str, UserError]) -> Any:
    """The dataclass of a node, its parts first, each checked by itself.

    Args:
        node: values of the dataclass.
        default: the same dataclass with values that are sound; stands in for what is not.
        key: of the node; empty for the root.
        errors: takes what is wrong, by what was given.
    """
    values: dict[str, Any] = {}
    failed: list[str] = []
    for entry in fields(default):
        known = len(errors)
        part, path = getattr(default, entry.name), f"{key}.{entry.name}" if key else entry.name
        try:
            value = node[entry.name]
            if is_dataclass(part) and isinstance(value, DictConfig):
                values[entry.name] = _build(value, part, path, errors)
            else:
                values[entry.name] = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        except UserError as error:
            errors.update((problem.given, problem) for problem in error.problems)
        except OmegaConfBaseException as error:
            errors[path] = _unfit(path, error)
        if len(errors) > known:
            failed.append(path)
    try:
        return type(default)(**values)  # a part that failed has its default here, and its error above
    except UserError as error:
        for problem in error.problems:
            located = _located(problem, node, key)
            if not any(f"{path}." in located.given for path in failed):  # it would be told of the default
                errors.setdefault(located.given, located)
    except ValueError as error:
        if not failed:
            errors[key] = _unfit(key, error)
    return default


def _unfit(key: str, error: Exception) -> UserError:
    return UserError(
        f"{key}: {str(error).splitlines()[0]}",
        expected=f"values that fit together in {key}",
        action=f"correct the overrides of {key}",
    )


def _located(error: UserError, node: DictConfig, key: str) -> UserError:
    """An error with the key that a user sets.

    A part that several components have, as their trainers, names its own keys by its last name, ``trainer.patience``:
    the component is put before it. A key that follows another, as seeds follow ``seed``, is told as that one.
    """
    given = error.given.partition("=")[0]
    parent, _, name = given.rpartition(".")
    if not key.endswith(parent):
        return error  # of a part's part, or of two keys
    full = f"{key}.{name}" if key else name
    raw = OmegaConf.to_container(node, resolve=False).get(name)  # type: ignore[union-attr]
    if isinstance(raw, str) and raw.startswith("${") and raw.endswith("}"):
        full = raw[2:-1]
    return UserError(
        full + error.given.removeprefix(given),
        expected=error.expected,
        action=re.sub(rf"{re.escape(given)}\b", lambda _: full, error.action),
    )


def nearest(given: str, valid: Sequence[str]) -> str:
    """``"; did you mean ...?"`` where something valid is near."""
    near = difflib.get_close_matches(given, valid, n=3, cutoff=0.5)
    tail = given.rpartition(".")[2]
    near += [key for key in valid if key.rpartition(".")[2] == tail and key not in near]
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def run_directory(config: AdsidConfig) -> Path:
    """The run directory, absolute."""
    return Path(config.run.dir).expanduser().absolute()


def save(config: AdsidConfig, path: Path, overrides: Sequence[str] | None = None) -> None:
    """Write a configuration as YAML, every value in it.

    Args:
        config: what to write.
        path: the file.
        overrides: of the command that asked for it, which the file opens with; None where there was none.
    """
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    command = None if overrides is None else shlex.join(["adsid", "run", *overrides])
    if command is not None and command.isprintable():
        text = f"{_COMMENT}{command}\n{text}"
    atomic_write_text(path, text)


def made_by(directory: Path) -> str:
    """The command that made a run, for a shell; where it is not known, words that name the configuration.

    Args:
        directory: of the run.
    """
    path = directory / CONFIG_FILE
    with suppress(OSError, UnicodeDecodeError):
        first, _, _ = path.read_text(encoding="utf-8").partition("\n")
        if first.startswith(_COMMENT):
            return first.removeprefix(_COMMENT)
    return f"adsid run, as configured in {path}"


def load_run(
    directory: Path, overrides: Sequence[str] = (), *, action: str, read: Sequence[str] | None = None
) -> AdsidConfig:
    """The configuration of a run directory.

    Args:
        directory: of the run.
        action: what to do where it is none.
        overrides, read: as of `load`.

    Raises:
        UserError: it is none, and everything `load` raises.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise UserError(f"{directory}", expected=f"a run directory, with a {CONFIG_FILE}", action=action)
    return load(directory / CONFIG_FILE, overrides, read=read)


def load(path: Path, overrides: Sequence[str] = (), *, read: Sequence[str] | None = None) -> AdsidConfig:
    """Read a configuration that `save` wrote.

    Args:
        path: the file.
        overrides: of single keys, beside what it says.
        read: keys that whoever asks has a use for, or their beginnings up to a dot; None for all.

    Raises:
        UserError: the file is missing, is no YAML, or does not fit this adsid's schema; an override that would change
            nothing; and as of `recompose`.
    """
    try:
        plain = OmegaConf.load(path)
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(
            f"{path} ({type(error).__name__})",
            expected=f"the {CONFIG_FILE} of a run directory",
            action="give the folder of a run, or make one with `adsid run`",
        ) from error
    config = _instantiate(_merge(_writable(OmegaConf.structured(AdsidConfig)), plain))
    if read is not None:
        _check_read(path.parent, overrides, read)
    return recompose(to_plain(config), overrides) if overrides else config


def _check_read(run: Path, overrides: Sequence[str], read: Sequence[str]) -> None:
    """Raise UserError for overrides of other keys than those of `load`."""

    def is_read(override: str) -> bool:
        key = override.partition("=")[0].lstrip("+~")
        return any(key == one or (one.endswith(".") and key.startswith(one)) for one in read)

    if idle := [one for one in overrides if not is_read(one)]:
        keys = ", ".join(f"{one}*" if one.endswith(".") else one for one in read)
        raise UserError(
            f"{' '.join(idle)} beside {run}",
            expected=f"overrides of single keys that are read here: {keys}",
            action="leave it out; what was trained is changed by another run",
        )
