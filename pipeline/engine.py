"""The stage engine: what is up to date is skipped, what changed runs again, what was killed goes on.

    <run>/<stage>/manifest.json      a finished artifact (see `data.artifacts`)
    <run>/.work/<stage>-<key>/       checkpoints of an unfinished one; the key names config and inputs, so a resume
                                     never mixes two configurations
    <run>/.lock                      held while a process works in the run directory

An artifact is up to date when its manifest has the key that config and inputs call for now and its files have the
hash the manifest names. Inputs are the artifacts of other stages, by hash, and files from outside the run.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, Literal, TypeVar

from data.artifacts import (
    MANIFEST,
    Manifest,
    atomic_directory,
    atomic_write_text,
    fingerprint,
    hash_directory,
    make_directory,
    package_versions,
    storage_errors,
    to_plain,
)
from data.errors import LineageError, UserError
from models.training import wait_for_all

WORK = ".work"
LOCK = ".lock"
NO_EFFECT = frozenset({"progress_bar"})
"""Config keys that change no byte of an artifact, so they are left out of its key."""

Config = TypeVar("Config")


@dataclass
class Context(Generic[Config]):
    """What a stage's function works with.

    Attributes:
        config: the whole configuration.
        inputs: directory of each input artifact, by stage name.
        output: an empty directory to fill; it becomes the artifact when the function returns.
        work: directory for checkpoints and caches; it outlives a crash and goes when the stage is done.
        shared: what stages of one process hand on, to spare reading it again; keyed by the caller.
    """

    config: Config
    inputs: Mapping[str, Path]
    output: Path
    work: Path
    shared: dict[Any, Any]


@dataclass(frozen=True)
class Stage(Generic[Config]):
    """One step of the graph.

    Attributes:
        name: of the stage and of its artifact directory.
        inputs: names of the stages whose artifacts it reads.
        settings: the part of the configuration its result depends on, as nested plain data or dataclasses.
        run: fills ``context.output`` and returns the metrics for the manifest.
        headline: metrics shown on the console when it is done.
        version: raised when the stage's code gives other results for the same configuration.
        outside: content of the files from outside the run that it reads, by a name that is no stage's; None where they
            are gone, so that an artifact made of them is kept as it is.
    """

    name: str
    inputs: tuple[str, ...]
    settings: Callable[[Config], Any]
    run: Callable[[Context[Config]], Mapping[str, Any]]
    headline: tuple[str, ...] = ()
    version: int = 1
    outside: Callable[[Config], Mapping[str, str] | None] = field(default=lambda config: {})


def check_inputs(run: Path, name: str) -> None:
    """Refuse an artifact of a run directory that was made from others than lie beside it now.

    Args:
        run: the run directory.
        name: of the artifact's stage.

    Raises:
        LineageError: an input was made anew since, so figures of both would be of different runs.
        UserError: there is no such artifact, or its manifest cannot be read.
    """
    for before, content in Manifest.read(run / name).inputs.items():
        other = run / before
        if (other / MANIFEST).exists() and Manifest.read(other).content_hash != content:
            raise LineageError(
                f"{run / name} (made from {before} {content[:12]}) beside {other} "
                f"({Manifest.read(other).content_hash[:12]})",
                expected=f"a {name} made from this very {before}",
                action=f"make it again with `adsid run run.until={name}` and the same overrides",
            )


@dataclass(frozen=True)
class Outcome:
    """What became of a stage: its manifest, and whether it had to run."""

    stage: str
    status: Literal["done", "skipped"]
    manifest: Manifest


@dataclass
class Observer:
    """Told what happens; the default says nothing. The command line prints lines instead."""

    on_start: Callable[[str, str], None] = field(default=lambda stage, why: None)
    on_end: Callable[[Outcome, Stage[Any]], None] = field(default=lambda outcome, stage: None)


class Run(Generic[Config]):
    """A run directory and the stages that fill it.

    Args:
        directory: the run directory; made when something runs.
        stages: in an order in which each comes after its inputs.
        config: handed to the stages.
        observer: told about starts and ends.
        follows: help another process with its stage: everything is worked on, nothing is kept.
        on_begin: called once the directory is this process's own, before its first stage.

    Raises:
        ValueError: a stage names an input that does not come before it, or a name stands twice.
    """

    def __init__(
        self,
        directory: Path,
        stages: Sequence[Stage[Config]],
        config: Config,
        *,
        observer: Observer | None = None,
        follows: bool = False,
        on_begin: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory, self.follows, self._on_begin = directory, follows, on_begin
        self.stages: dict[str, Stage[Config]] = {}
        for stage in stages:
            missing = [name for name in stage.inputs if name not in self.stages]
            if missing or stage.name in self.stages:
                raise ValueError(f"stage {stage.name}: inputs {missing} do not come before it, or its name is taken")
            self.stages[stage.name] = stage
        self.config = config
        self.observer = observer or Observer()
        self.shared: dict[Any, Any] = {}

    def execute(self, *, until: str | Sequence[str] | None = None) -> list[Outcome]:
        """Bring all stages up to date, in order.

        Args:
            until: the last stage wanted, or several, with everything they need; None for all.

        Returns:
            One outcome a stage.

        Raises:
            UserError: the run directory is in use, cannot be written to, or a stage was given something wrong.
        """
        last = [until] if isinstance(until, str) else until
        wanted = list(self.stages) if last is None else self._needed(*last)
        with locked(self.directory):
            self._on_begin()
            return [self._bring_up_to_date(self.stages[name]) for name in wanted]

    def execute_one(self, name: str, *, again: bool = False) -> Outcome:
        """Bring one stage up to date from artifacts that are there; nothing before it is made.

        Args:
            name: of the stage.
            again: run it even if it is up to date.

        Raises:
            LineageError: an input was made by another configuration, or from other inputs, than called for now.
            UserError: an input is missing or damaged, and everything `execute` raises.
        """
        stage = self._stage(name)
        missing = [needed for needed in stage.inputs if not (self.directory / needed / MANIFEST).exists()]
        if missing:
            raise UserError(
                f"stage {name} with {', '.join(missing)} missing in {self.directory}",
                expected=f"finished artifacts of {', '.join(stage.inputs)}",
                action=f"make them with `adsid run run.until={missing[-1]}` and the same overrides, then start again",
            )
        if self.follows:
            self._check_lineage(stage)
            return self._follow(stage)
        with locked(self.directory):
            self._check_lineage(stage)
            self._on_begin()
            return self._bring_up_to_date(stage, again=again)

    def take_over(self, others: Sequence[Path], *, until: str | None = None) -> list[str]:
        """Take from other run directories the artifacts that this configuration calls for too.

        Files become hard links where the file system has them: an artifact is replaced, never written into.

        Args:
            others: run directories, the first that has an artifact gives it.
            until: as of `execute`.

        Returns:
            Names of the stages whose artifacts were taken.

        Raises:
            UserError: as of `execute`.
        """
        taken: list[str] = []
        fresh: set[str] = set()
        with locked(self.directory):
            for name in self.stages if until is None else self._needed(until):
                stage = self.stages[name]
                if not fresh.issuperset(stage.inputs):
                    continue
                key = self._key(stage, self._inputs(stage))
                if self._finished(self.directory / name, key) is None:
                    found = next((other for other in others if self._finished(other / name, key) is not None), None)
                    if found is None:
                        continue
                    with atomic_directory(self.directory / name) as output:
                        shutil.copytree(found / name, output, dirs_exist_ok=True, copy_function=_link)
                    taken.append(name)
                fresh.add(name)
        return taken

    def manifests(self) -> dict[str, Manifest]:
        """Manifests of the stages that are finished, in order."""
        return {
            name: Manifest.read(self.directory / name)
            for name in self.stages
            if (self.directory / name / MANIFEST).exists()
        }

    def _stage(self, name: str) -> Stage[Config]:
        if name not in self.stages:
            raise UserError(
                f"stage {name}",
                expected=f"one of {', '.join(self.stages)}",
                action="name one of these stages",
            )
        return self.stages[name]

    def _needed(self, *until: str) -> list[str]:
        needed = {self._stage(name).name for name in until}
        for name in reversed(self.stages):
            if name in needed:
                needed.update(self.stages[name].inputs)
        return [name for name in self.stages if name in needed]

    def _inputs(self, stage: Stage[Config]) -> dict[str, str]:
        """Content of all that a stage reads, by name: artifacts of the run, and files from outside."""
        outside = stage.outside(self.config)
        if outside is None:
            try:
                recorded = Manifest.read(self.directory / stage.name).inputs
            except UserError:
                recorded = {}
            outside = {name: content for name, content in recorded.items() if name not in stage.inputs}
        return {**{name: Manifest.read(self.directory / name).content_hash for name in stage.inputs}, **outside}

    def _key(self, stage: Stage[Config], inputs: Mapping[str, str]) -> str:
        settings = _without(to_plain(stage.settings(self.config)), NO_EFFECT)
        return fingerprint([stage.name, stage.version, settings, dict(inputs)])

    def _check_lineage(self, stage: Stage[Config]) -> None:
        """Every artifact before the stage is what the configuration calls for and fits the others."""
        for name in self._needed(stage.name)[:-1]:
            directory = self.directory / name
            if not (directory / MANIFEST).exists():
                continue  # not read by this stage; what was made from it is checked by hash
            check_inputs(self.directory, name)
            manifest = Manifest.read(directory)
            settings = to_plain(self.stages[name].settings(self.config))
            if manifest.key != self._key(self.stages[name], manifest.inputs):
                changed = _differences(manifest.config, settings) or ["the version of the stage's code"]
                raise LineageError(
                    f"{directory}, made with another configuration than stage {stage.name} is asked for: "
                    + "; ".join(changed[:5]),
                    expected=f"a {name} of the same configuration",
                    action="give the same overrides as in the run that made it, another run.dir, "
                    f"or make it again with `adsid run run.until={name}`",
                )
            if hash_directory(directory) != manifest.content_hash:
                raise UserError(
                    f"{directory}, whose files are not those its manifest names",
                    expected="the artifact as its stage wrote it",
                    action=f"make it again with `adsid run run.until={name}` and the same overrides",
                )

    def _bring_up_to_date(self, stage: Stage[Config], *, again: bool = False) -> Outcome:
        inputs = self._inputs(stage)
        key = self._key(stage, inputs)
        manifest = None if again else self._finished(self.directory / stage.name, key)
        if manifest is not None:
            outcome = Outcome(stage.name, "skipped", manifest)
        else:
            outcome = Outcome(stage.name, "done", self._make(stage, inputs, key))
        self.observer.on_end(outcome, stage)
        return outcome

    def _finished(self, directory: Path, key: str) -> Manifest | None:
        try:
            manifest = Manifest.read(directory)
        except UserError:
            return None
        fits = manifest.key == key and hash_directory(directory) == manifest.content_hash
        return manifest if fits else None

    def _why(self, stage: Stage[Config], inputs: Mapping[str, str]) -> str:
        """In words, why a stage runs."""
        directory = self.directory / stage.name
        try:
            manifest = Manifest.read(directory)
        except UserError:
            return "starts"
        changed = _differences(manifest.config, to_plain(stage.settings(self.config)))
        if changed:
            return f"starts again: {'; '.join(changed[:3])}"
        names = dict.fromkeys([*inputs, *manifest.inputs])
        others = [name for name in names if manifest.inputs.get(name) != inputs.get(name)]
        if others:
            return f"starts again: {', '.join(others)} changed"
        return "starts again: " + (
            "its code changed" if manifest.key != self._key(stage, inputs) else "asked to, or its files changed"
        )

    def _make(self, stage: Stage[Config], inputs: dict[str, str], key: str) -> Manifest:
        target = self.directory / stage.name
        work = self.directory / WORK / f"{stage.name}-{key[:16]}"
        make_directory(work)
        earlier = _begin_attempt(work)
        why = self._why(stage, inputs) if earlier is None else "goes on where it was interrupted"
        self.observer.on_start(stage.name, why)
        effort = Effort(earlier or 0.0)
        with atomic_directory(target) as output, storage_errors(work):
            context = Context(
                config=self.config,
                inputs={name: self.directory / name for name in stage.inputs},
                output=output,
                work=work,
                shared=self.shared,
            )
            metrics = stage.run(context)
            wait_for_all()  # those who follow have read what is in the work folder
            config = to_plain(stage.settings(self.config))
            manifest = effort.sign(output, stage.name, key=key, config=config, inputs=inputs, metrics=dict(metrics))
        for leftover in (self.directory / WORK).glob(f"{stage.name}-*"):
            if re.fullmatch(rf"{re.escape(stage.name)}-[0-9a-f]{{16}}", leftover.name):
                shutil.rmtree(leftover, ignore_errors=True)
        gc.collect()
        return manifest

    def _follow(self, stage: Stage[Config]) -> Outcome:
        """Do what the process that holds the run directory does, with its checkpoints, and let the result go."""
        key = self._key(stage, self._inputs(stage))
        manifest = self._finished(self.directory / stage.name, key)
        if manifest is not None:
            return Outcome(stage.name, "skipped", manifest)
        work = self.directory / WORK / f"{stage.name}-{key[:16]}"
        make_directory(work)
        inputs = {name: self.directory / name for name in stage.inputs}
        with TemporaryDirectory() as scratch:
            stage.run(Context(self.config, inputs, Path(scratch), work, self.shared))
            wait_for_all()
        return Outcome(stage.name, "done", Manifest(kind=stage.name, key=key))


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the run directory; the kernel frees it when the process ends, however it ends.

    Raises:
        UserError: another process holds it, or the directory cannot be written to.
    """
    make_directory(directory)
    path = directory / LOCK
    with storage_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 64).decode(errors="replace").strip() or "unknown"
            raise UserError(
                f"{directory}, in which process {holder} is working",
                expected="a run directory that no other adsid works in",
                action="wait until it has ended, or choose another folder with run.dir=<folder>",
            ) from None
        with storage_errors(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


class PeakMemory:
    """Largest resident memory of this process since the object was made.

    Linux lets a process reset its own high-water mark; where that is refused, the mark is that of the whole
    process so far.
    """

    def __init__(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return

    def peak_mb(self) -> float:
        """The peak in MiB."""
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        match = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
        return int(match.group(1)) / 1024 if match else 0.0


class Effort:
    """What making an artifact takes, from the moment the object is made.

    Args:
        earlier: seconds that attempts before this one took.
    """

    def __init__(self, earlier: float = 0.0) -> None:
        self.started, self.memory = time.monotonic() - earlier, PeakMemory()

    def sign(
        self,
        output: Path,
        kind: str,
        *,
        key: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        metrics: Mapping[str, Any],
    ) -> Manifest:
        """Write the manifest of a directory whose files are all there.

        Args:
            output: the directory.
            kind: what it holds.
            key: fingerprint of configuration and inputs.
            config: as plain data.
            inputs: content hash of each input, by its name.
            metrics: of the work.
        """
        manifest = Manifest(
            kind=kind,
            key=key,
            config=dict(config),
            inputs=dict(inputs),
            content_hash=hash_directory(output),
            versions=package_versions(),
            metrics=to_plain(metrics),
            seconds=round(time.monotonic() - self.started, 2),
            peak_memory_mb=round(self.memory.peak_mb(), 1),
        )
        manifest.write(output)
        return manifest


def _begin_attempt(work: Path) -> float | None:
    """Note the start of an attempt.

    Returns:
        Seconds that earlier attempts worked, to their last sign of life in the work directory; None for the first.
    """
    path = work / "attempts.json"
    spent: float | None = None
    if path.exists():
        try:
            last = json.loads(path.read_text())
            newest = max(file.stat().st_mtime for file in work.rglob("*"))
            spent = last["spent"] + max(0.0, newest - last["started"])
        except (ValueError, KeyError, OSError):
            spent = 0.0
    atomic_write_text(path, json.dumps({"spent": spent or 0.0, "started": time.time()}))
    return spent


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)


def _without(value: Any, keys: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    if isinstance(value, list):
        return [_without(item, keys) for item in value]
    return value


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two nested plain values differ, as ``path was X, is Y``."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in [*old, *(key for key in new if key not in old)]:
            if key not in NO_EFFECT:
                found += _differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if old == new else [f"{path} was {old}, is {new}"]
