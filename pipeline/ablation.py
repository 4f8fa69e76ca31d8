"""An ablation: arms that differ in a few overrides, run side by side and compared request by request.

    configs/ablation/<study>.yaml     arms by name, each a list of overrides; the first is what others are compared with
            │
            ▼  for every seed and arm
    <out>/<arm>/seed=<seed>/          a run directory like any other: what is up to date is skipped, what was killed
            │                         goes on; artifacts that coincide with those of another arm are taken over
            ▼
    <out>/ablation.json, .md, .html   figures, and paired differences over users and seeds

What is run and measured is told by a `Kind`: `pipeline.ablation_prior` for the forecaster.
"""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import transformers
import yaml
from rich.console import Console

from data.artifacts import MANIFEST, Manifest
from data.errors import UserError
from data.rules import SEED
from data.statistics import Interval, Row
from pipeline import config as configuration
from pipeline.config import CONFIG_FILE, CONFIGS, STUDIES, AdsidConfig, compose, nearest
from pipeline.console import ConsoleObserver
from pipeline.engine import Run
from pipeline.stages import stages

_NAME = re.compile(r"[\w+.,=()-][\w+.,=() -]*")


@dataclass(frozen=True)
class Shown:
    """One figure of the tables.

    Attributes:
        title: its column.
        metric, segment, k: which rows.
        of: the forecast it is of, e.g. ``lm``, or a difference within the arm, e.g. ``lm - anchor``.
    """

    title: str
    metric: str
    of: str = "lm"
    segment: str = "all"
    k: int | None = None


@dataclass(frozen=True)
class Kind:
    """What an ablation of one part of the pipeline runs and measures.

    Attributes:
        name: of the part.
        until: the last stage that an arm needs.
        stages: those whose cost is shown.
        seed: the override that sets an arm's seed, with braces for its number.
        compare: from the run directories of each arm, one a seed and the first arm first, to rows whose arms are
            ``<arm> / <forecast>`` and differences of two such.
        levels: figures of each arm, and their differences with the first arm.
        within: differences within each arm.
        recommend: from the same run directories, which arm to take; None where that is no question.
        choose: the figure by which an arm is the best, where the arms are settings to choose from.
    """

    name: str
    until: str
    stages: tuple[str, ...]
    seed: str
    compare: Callable[[Mapping[str, Sequence[Path]]], list[Row]]
    levels: tuple[Shown, ...]
    within: tuple[Shown, ...]
    recommend: Callable[[Mapping[str, Sequence[Path]]], Recommendation | None]
    choose: Shown | None = None


@dataclass(frozen=True)
class Recommendation:
    """Which arm to take, by selection prompts and length.

    Attributes:
        arm: the one with the shortest prompts of those that are not shown to be worse than the best; None where no
            arm's prompts are short enough.
        max_tokens: how long prompts may be on average; None: any length.
        tokens: mean length of each arm's prompts.
        less_best: NLL of the selection prompts of each arm that is short enough, less the best one's, paired.
    """

    arm: str | None
    max_tokens: float | None
    tokens: dict[str, float]
    less_best: dict[str, Interval]


@dataclass(frozen=True)
class Study:
    """Arms to compare.

    Attributes:
        name: of the study.
        about: the question, in a sentence.
        overrides: of all arms.
        arms: overrides of each; the first is compared with.
        seeds: of training.
    """

    name: str
    about: str
    overrides: tuple[str, ...]
    arms: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Cost:
    """Seconds that the stages of an arm took, a mean over its seeds; those taken over cost what they cost first."""

    seconds: dict[str, float]


@dataclass(frozen=True)
class Result:
    """What an ablation found.

    Attributes:
        study, kind: what was compared, and how.
        overrides: of the command line.
        rows: figures and differences.
        costs: of each arm.
        recommendation: which arm to take, where that is a question.
    """

    study: Study
    kind: Kind
    overrides: tuple[str, ...]
    rows: list[Row]
    costs: dict[str, Cost]
    recommendation: Recommendation | None = None


def load_study(name: str) -> Study:
    """Read a study.

    Args:
        name: of a file in ``configs/ablation``, or the path of a YAML file.

    Raises:
        UserError: there is no such file, or it is no study; all that is wrong with it is told at once.
    """
    folder = importlib.resources.files(CONFIGS) / STUDIES
    if name.endswith((".yaml", ".yml")):
        path: Any = Path(name).expanduser()
    else:
        known = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        if name not in known:
            raise UserError(
                f"the study {name}",
                expected=f"one of {', '.join(known)}, or the path of a YAML file",
                action=f"name one of them{nearest(name, known)}",
            )
        path = folder / f"{name}.yaml"
    try:
        plain = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"{path} ({str(error).splitlines()[0]})",
            expected="a YAML file with about, arms, and if need be overrides and seeds",
            action="correct the path or the file",
        ) from error
    return _study(Path(name).stem, plain)


def _study(name: str, plain: Any) -> Study:
    errors = []

    def wrong(given: str, expected: str) -> None:
        errors.append(UserError(f"study {name}: {given}", expected=expected, action="correct the study's file"))

    def overrides_of(where: str, value: Any) -> tuple[str, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            wrong(f"{where}={value!r}", "a list of overrides, e.g. [prior.head.kind=free]")
            return ()
        return tuple(value)

    if not isinstance(plain, dict):
        wrong(f"{plain!r:.60}", "a mapping with about and arms")
        raise UserError.collect(errors)
    unknown = sorted(set(plain) - {"about", "overrides", "arms", "seeds"})
    if unknown:
        wrong(f"the key {', '.join(map(str, unknown))}", "about, overrides, arms, seeds")
    arms = plain.get("arms")
    if not isinstance(arms, dict) or not arms:
        wrong(f"arms={arms!r}", "at least one arm: a name and its overrides")
        arms = {}
    for arm in arms:
        if not isinstance(arm, str) or not _NAME.fullmatch(arm) or " - " in arm:
            wrong(f"an arm named {arm!r}", "a name of letters, digits, spaces and any of + . , = ( ) - _")
    for given, expected in _shared_folders(map(str, arms)):
        wrong(given, expected)
    seeds = plain.get("seeds", [0])
    if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds) or not SEED.each().holds(seeds):
        wrong(f"seeds={seeds!r}", f"a list of seeds: {SEED.each().expected}")
        seeds = [0]
    study = Study(
        name=name,
        about=str(plain.get("about", "")),
        overrides=overrides_of("overrides", plain.get("overrides")),
        arms={str(arm): overrides_of(f"arms.{arm}", value) for arm, value in arms.items()},
        seeds=tuple(seeds),
    )
    if errors:
        raise UserError.collect(errors)
    return study


def run_study(
    study: Study,
    kind: Kind,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    console: Console,
    reuse: Sequence[Path] = (),
) -> Result:
    """Run every arm with every seed, then compare.

    Args:
        study: the arms.
        kind: what is run and measured.
        out: folder of the arms' run directories.
        overrides: of all arms; an arm's own go before them.
        console: told what happens.
        reuse: finished runs whose artifacts are taken where an arm calls for the very same.

    Returns:
        Rows and costs.

    Raises:
        UserError: an override is wrong, in any arm, or a run to take from is none (all are told before anything
            runs), or a stage was given something wrong.
    """
    errors = [
        UserError(
            f"--reuse {run}, which holds no artifact of a run",
            expected="a run directory, or that of an arm: OUT/<ARM>/seed=<SEED>",
            action="correct the path, or leave it out",
        )
        for run in reuse
        if not any((run / stage.name / MANIFEST).exists() for stage in stages())
    ]
    try:
        configs = arm_configs(study, kind, out, overrides)
    except UserError as error:
        errors.append(error)
    if errors:
        raise UserError.collect(errors)
    transformers.utils.logging.disable_progress_bar()
    shared: dict[Any, Any] = {}
    done: list[Path] = []
    for (arm, seed), config in configs.items():
        directory = Path(config.run.dir)
        console.print(f"\n[bold]{arm}[/], seed {seed}: {directory}", highlight=False)
        run = Run(
            directory, stages(), config, observer=ConsoleObserver(console),
            on_begin=partial(configuration.save, config, directory / CONFIG_FILE),
        )  # fmt: skip
        run.shared = shared
        run.take_over([*done, *reuse], until=kind.until)
        run.execute(until=kind.until)
        done.append(directory)
    directories = {arm: [_directory(out, arm, seed) for seed in study.seeds] for arm in study.arms}
    costs = {arm: _cost(kind, runs) for arm, runs in directories.items()}
    rows, recommendation = kind.compare(directories), kind.recommend(directories)
    return Result(study, kind, tuple(overrides), rows, costs, recommendation)


def arm_configs(study: Study, kind: Kind, out: Path, overrides: Sequence[str]) -> dict[tuple[str, int], AdsidConfig]:
    """The configuration of every arm and seed.

    Raises:
        UserError: an override is wrong, in any arm; all are told at once.
    """
    configs: dict[tuple[str, int], AdsidConfig] = {}
    errors = [
        UserError(given, expected=expected, action="name one of them differently")
        for given, expected in _shared_folders(study.arms)
    ]
    if any(override.startswith("run.") for override in overrides):
        errors.append(
            UserError(
                " ".join(override for override in overrides if override.startswith("run.")),
                expected="no run directory: every arm has its own, and runs as far as it is compared",
                action="name the folder of all with --out",
            )
        )
    key = kind.seed.partition("=")[0]
    seeded = [one for one in (*study.overrides, *overrides, *chain(*study.arms.values())) if one.startswith(f"{key}=")]
    if seeded:
        errors.append(
            UserError(
                " ".join(dict.fromkeys(seeded)),
                expected=f"no {key}: every arm is trained with each seed of the study",
                action="leave it out; --seeds N takes 0 .. N-1, and seeds: [...] in a study's file any",
            )
        )
    for seed in study.seeds:
        for arm, own in study.arms.items():
            try:
                config = compose([*study.overrides, *overrides, *own, kind.seed.format(seed)])
            except UserError as error:
                errors.append(
                    UserError(f"arm {arm}: {error}", expected="overrides that compose", action="correct them")
                )
                continue
            config.run.dir = str(_directory(out, arm, seed))
            config.run.until = kind.until
            configs[arm, seed] = config
        if errors:
            raise UserError.collect(errors)
    return configs


def _directory(out: Path, arm: str, seed: int) -> Path:
    return out / _folder(arm) / f"seed={seed}"


def _folder(arm: str) -> str:
    return arm.replace(" ", "_")


def _shared_folders(arms: Iterable[str]) -> list[tuple[str, str]]:
    """Arms that cannot have a folder of their own: what was given, and what was expected."""
    by_folder: dict[str, list[str]] = {}
    for arm in arms:
        by_folder.setdefault(_folder(arm), []).append(arm)
    wrong = [
        (f"the arms {' and '.join(map(repr, same))}", f"one folder each; all of these have {folder}")
        for folder, same in by_folder.items()
        if len(same) > 1
    ]
    wrong += [(f"an arm named {arm!r}", "a name that a folder can have") for arm in by_folder if arm in (".", "..")]
    return wrong


def _cost(kind: Kind, runs: Sequence[Path]) -> Cost:
    seconds = {name: [Manifest.read(run / name).seconds for run in runs] for name in kind.stages}
    return Cost({name: sum(each) / len(each) for name, each in seconds.items()})
