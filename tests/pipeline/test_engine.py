"""The stage engine, on stages that write one small file each."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from data.artifacts import Manifest
from data.errors import LineageError, UserError
from pipeline.engine import LOCK, WORK, Context, Observer, Run, Stage, locked


@dataclass
class Settings:
    first: int = 1
    second: int = 2
    third: int = 3
    progress_bar: bool = True
    fail: list[str] = field(default_factory=list)


def stage(name: str, *inputs: str, calls: list[str]) -> Stage[Settings]:
    def settings(config: Settings) -> dict[str, Any]:
        return {"value": getattr(config, name), "progress_bar": config.progress_bar}

    def run(context: Context[Settings]) -> dict[str, Any]:
        calls.append(name)
        (context.work / "checkpoint").write_text(name)
        if name in context.config.fail:
            raise RuntimeError(f"{name} failed")
        texts = [(context.inputs[needed] / "out").read_text() for needed in inputs]
        (context.output / "out").write_text("+".join([*texts, str(getattr(context.config, name))]))
        return {"length": len(texts)}

    return Stage(name, inputs, settings, run)


def make_of(source: Path, directory: Path, calls: list[str], **values: Any) -> Run[Settings]:
    """As `make`, and the first stage reads a file from outside the run."""

    def outside(config: Settings) -> dict[str, str] | None:
        return {"source/file": source.read_text()} if source.exists() else None

    first, *others = make(directory, calls, **values).stages.values()
    return Run(directory, [replace(first, outside=outside), *others], Settings(**values))


def make(directory: Path, calls: list[str], **values: Any) -> Run[Settings]:
    stages = [
        stage("first", calls=calls),
        stage("second", "first", calls=calls),
        stage("third", "first", "second", calls=calls),
    ]
    return Run(directory, stages, Settings(**values))


def statuses(run: Run[Settings], until: str | None = None) -> str:
    return " ".join(outcome.status for outcome in run.execute(until=until))


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    calls: list[str] = []
    assert statuses(make(tmp_path, calls)) == "done done done"
    assert (tmp_path / "third" / "out").read_text() == "1+1+2+3"
    assert statuses(make(tmp_path, calls, progress_bar=False)) == "skipped skipped skipped"
    assert calls == ["first", "second", "third"]
    assert list((tmp_path / WORK).iterdir()) == []


def test_a_change_reruns_what_depends_on_it(tmp_path: Path) -> None:
    calls: list[str] = []
    statuses(make(tmp_path, calls))
    assert statuses(make(tmp_path, calls, second=5)) == "skipped done done"
    assert (tmp_path / "third" / "out").read_text() == "1+1+5+3"
    assert statuses(make(tmp_path, calls, second=5, third=4)) == "skipped skipped done"


def test_artifacts_that_fit_are_taken_over(tmp_path: Path) -> None:
    calls: list[str] = []
    statuses(make(tmp_path / "one", calls))
    statuses(make(tmp_path / "two", calls, second=7), until="second")
    calls.clear()
    run = make(tmp_path / "new", calls, second=7)
    assert run.take_over([tmp_path / "nowhere", tmp_path / "one", tmp_path / "two"]) == ["first", "second"]
    assert statuses(run) == "skipped skipped done"
    assert calls == ["third"]
    assert (tmp_path / "new" / "third" / "out").read_text() == "1+1+7+3"
    assert run.take_over([tmp_path / "one"]) == []


def test_a_damaged_or_stale_artifact_is_not_taken_over(tmp_path: Path) -> None:
    calls: list[str] = []
    statuses(make(tmp_path / "one", calls))
    (tmp_path / "one" / "second" / "out").write_text("other")
    assert make(tmp_path / "new", calls).take_over([tmp_path / "one"]) == ["first"]
    # `second` is there but made with another value: `third` would be read beside it, so it stays where it is.
    statuses(make(tmp_path / "mixed", calls, second=9), until="second")
    assert make(tmp_path / "mixed", calls).take_over([tmp_path / "one"]) == []


def test_why_a_stage_runs_is_told(tmp_path: Path) -> None:
    def reasons(**values: Any) -> list[str]:
        told: list[str] = []
        run = make(tmp_path, [], **values)
        run.observer.on_start = lambda name, why: told.append(f"{name} {why}")
        run.execute()
        return told

    assert reasons() == ["first starts", "second starts", "third starts"]
    assert reasons(second=5) == ["second starts again: value was 2, is 5", "third starts again: second changed"]


def test_until_runs_what_is_needed_only(tmp_path: Path) -> None:
    calls: list[str] = []
    assert statuses(make(tmp_path, calls), until="second") == "done done"
    assert calls == ["first", "second"]


def test_several_last_stages_run_what_each_needs_once(tmp_path: Path) -> None:
    calls: list[str] = []
    make(tmp_path, calls).execute(until=["second", "first"])
    assert calls == ["first", "second"]


def test_an_unknown_stage_lists_the_stages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one of first, second, third"):
        make(tmp_path, []).execute(until="fourth")


def test_a_damaged_artifact_is_made_again(tmp_path: Path) -> None:
    calls: list[str] = []
    statuses(make(tmp_path, calls))
    (tmp_path / "second" / "out").write_text("damaged")
    assert statuses(make(tmp_path, calls)) == "skipped done skipped"
    (tmp_path / "first" / "manifest.json").write_text("{")
    assert statuses(make(tmp_path, calls)) == "done skipped skipped"


def test_a_failure_keeps_earlier_artifacts_and_the_checkpoints(tmp_path: Path) -> None:
    calls: list[str] = []
    statuses(make(tmp_path, calls))
    with pytest.raises(RuntimeError, match="second failed"):
        make(tmp_path, calls, second=5, fail=["second"]).execute()
    assert (tmp_path / "second" / "out").read_text() == "1+2"
    assert [(path / "checkpoint").read_text() for path in (tmp_path / WORK).iterdir()] == ["second"]
    assert statuses(make(tmp_path, calls, second=5)) == "skipped done done"
    assert list((tmp_path / WORK).iterdir()) == []


def test_what_begins_a_run_happens_before_its_first_stage_and_not_where_it_is_refused(tmp_path: Path) -> None:
    calls: list[str] = []

    def begun(**values: Any) -> Run[Settings]:
        run = make(tmp_path, calls, **values)
        return Run(tmp_path, list(run.stages.values()), run.config, on_begin=lambda: calls.append("begun"))

    with pytest.raises(RuntimeError, match="second failed"):
        begun(fail=["second"]).execute()
    assert calls == ["begun", "first", "second"]
    with pytest.raises(LineageError):
        begun(first=9).execute_one("second")
    assert calls == ["begun", "first", "second"]


def test_time_of_earlier_attempts_counts(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        make(tmp_path, [], fail=["first"]).execute()
    work = next((tmp_path / WORK).iterdir())
    later = time.time() + 100
    os.utime(work / "checkpoint", (later, later))
    told: list[str] = []
    run = make(tmp_path, [])
    run.observer.on_start = lambda name, why: told.append(why)
    run.execute(until="first")
    assert told == ["goes on where it was interrupted"]
    assert 99 < Manifest.read(tmp_path / "first").seconds < 110


def test_one_stage_alone_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"first, second missing(?s:.*)run\.until=second") as caught:
        make(tmp_path, []).execute_one("third")
    assert not isinstance(caught.value, LineageError)
    make(tmp_path, []).execute(until="second")
    assert make(tmp_path, []).execute_one("third").status == "done"


def test_one_stage_alone_refuses_inputs_of_another_configuration(tmp_path: Path) -> None:
    make(tmp_path, []).execute()
    with pytest.raises(LineageError, match="value was 2, is 7") as caught:
        make(tmp_path, [], second=7).execute_one("third")
    assert str(tmp_path / "second") in str(caught.value)


def test_one_stage_alone_refuses_inputs_of_another_lineage(tmp_path: Path) -> None:
    make(tmp_path, []).execute()
    make(tmp_path, [], first=9).execute(until="first")
    with pytest.raises(LineageError) as caught:
        make(tmp_path, [], first=9).execute_one("third")
    assert str(tmp_path / "first") in str(caught.value)
    assert str(tmp_path / "second") in str(caught.value)


def test_one_stage_alone_refuses_a_damaged_input(tmp_path: Path) -> None:
    make(tmp_path, []).execute()
    (tmp_path / "first" / "out").write_text("damaged")
    with pytest.raises(UserError, match="whose files are not those its manifest names"):
        make(tmp_path, []).execute_one("second")


def test_manifest_holds_time_memory_config_and_lineage(tmp_path: Path) -> None:
    make(tmp_path, []).execute()
    manifests = make(tmp_path, []).manifests()
    third = manifests["third"]
    assert third.inputs == {name: manifests[name].content_hash for name in ("first", "second")}
    assert third.config == {"value": 3, "progress_bar": True}
    assert third.metrics == {"length": 2}
    assert third.seconds >= 0
    assert third.peak_memory_mb > 10
    assert third.versions["numpy"]


def test_full_disk_in_a_stage_is_a_user_error(tmp_path: Path) -> None:
    def run(context: Context[Settings]) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match="no space left"):
        Run(tmp_path, [Stage("full", (), lambda config: {}, run)], Settings()).execute()
    assert not (tmp_path / "full").exists()


def test_a_graph_out_of_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not come before"):
        Run(tmp_path, [stage("second", "first", calls=[])], Settings())


def test_a_run_directory_is_worked_in_by_one_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.engine import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} is working"), locked(tmp_path):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / LOCK).read_text() == f"{holder.pid}\n"
    with locked(tmp_path):
        assert (tmp_path / LOCK).read_text() == f"{os.getpid()}\n"


def test_killed_between_checkpoints_a_stage_goes_on(tmp_path: Path) -> None:
    """A stage that writes a checkpoint a step is killed in the middle; the next run starts from there."""
    code = """
import os, signal, sys
from pathlib import Path
from pipeline.engine import Run, Stage

def run(context):
    path = context.work / "steps"
    done = len(path.read_text()) if path.exists() else 0
    for step in range(done, 6):
        with path.open("a") as file:
            file.write("x")
        if step == 3 and done == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    (context.output / "out").write_text(path.read_text())
    return {"started_at": done}

outcome, = Run(Path(sys.argv[1]), [Stage("long", (), lambda config: {}, run)], None).execute()
print(outcome.manifest.metrics["started_at"])
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "long").exists()
    second = subprocess.run(command, capture_output=True, text=True, check=True)
    assert second.stdout == "4\n"
    assert (tmp_path / "long" / "out").read_text() == "xxxxxx"


def test_a_process_that_follows_works_on_the_stage_and_keeps_nothing(tmp_path: Path) -> None:
    calls: list[str] = []
    make(tmp_path, calls).execute(until="first")
    follower = make(tmp_path, calls)
    follower.follows = True
    with locked(tmp_path):  # as the first process holds it
        outcome = follower.execute_one("second")
    assert calls == ["first", "second"]
    assert outcome.status == "done"
    assert not (tmp_path / "second").exists()
    assert list((tmp_path / WORK).glob("second-*/checkpoint"))
    make(tmp_path, calls).execute(until="second")
    assert follower.execute_one("second").status == "skipped"


def test_a_changed_file_from_outside_makes_its_stage_run_and_no_other_that_got_the_same(tmp_path: Path) -> None:
    source, directory, calls = tmp_path / "source", tmp_path / "run", list[str]()
    source.write_text("a")
    assert statuses(make_of(source, directory, calls)) == "done done done"
    assert statuses(make_of(source, directory, calls)) == "skipped skipped skipped"
    source.write_text("b")
    why: list[str] = []
    run = make_of(source, directory, calls)
    run.observer = Observer(on_start=lambda stage, reason: why.append(f"{stage} {reason}"))
    assert statuses(run) == "done skipped skipped"
    assert why == ["first starts again: source/file changed"]
    assert Manifest.read(directory / "first").inputs == {"source/file": "b"}


def test_an_artifact_outlives_the_files_it_was_made_of(tmp_path: Path) -> None:
    """A run can be carried to another machine without its source; one stage is trained there, or the report written."""
    source, directory, calls = tmp_path / "source", tmp_path / "run", list[str]()
    source.write_text("a")
    make_of(source, directory, calls).execute()
    for text in (None, "b"):
        source.unlink() if text is None else source.write_text(text)
        outcome = make_of(source, directory, calls, third=4 if text is None else 5).execute_one("third")
        assert outcome.status == "done", "artifacts beside it fit each other, whatever became of the source"
    source.unlink()
    assert statuses(make_of(source, directory, calls, third=5)) == "skipped skipped skipped"
    assert statuses(make_of(source, tmp_path / "another", calls), until="first") == "done"


def test_an_artifact_from_before_files_were_watched_is_made_again_once(tmp_path: Path) -> None:
    source, directory, calls = tmp_path / "source", tmp_path / "run", list[str]()
    source.write_text("a")
    make(directory, calls).execute()
    assert make_of(source, directory, calls, third=4).execute_one("third").status == "done"
    assert statuses(make_of(source, directory, calls, third=4)) == "done skipped skipped"
