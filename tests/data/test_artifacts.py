"""Artifacts appear whole or not at all, and their hashes depend on what matters only."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import artifacts
from data.artifacts import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    atomic_directory,
    atomic_write_text,
    fingerprint,
    hash_directory,
    make_directory,
)
from data.errors import UserError

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=10,
)


@dataclass
class Part:
    name: str
    rate: float


@given(PLAIN)
def test_fingerprint_does_not_depend_on_key_order(value: object) -> None:
    mapping = {"b": value, "a": 1}
    assert fingerprint(mapping) == fingerprint({"a": 1, "b": value})


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = "from data.artifacts import fingerprint; print(fingerprint({'x': {1.5, 'q'}, 'y': [None, True]}))"
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert other.stdout.strip() == fingerprint({"x": {1.5, "q"}, "y": [None, True]})


@pytest.mark.parametrize(
    ("left", "right"),
    [(1, 1.0), (1, True), (1, "1"), (None, "None"), (["ab", "c"], ["a", "bc"]), ({"a": 1}, [["a", 1]])],
)
def test_fingerprint_tells_types_and_borders_apart(left: object, right: object) -> None:
    assert fingerprint(left) != fingerprint(right)


def test_fingerprint_of_arrays_and_dataclasses() -> None:
    array = np.arange(6, dtype=np.int32)
    assert fingerprint(array) != fingerprint(array.astype(np.int64))
    assert fingerprint(array) != fingerprint(array.reshape(2, 3))
    assert fingerprint(array[::2]) == fingerprint(array[::2].copy())
    assert fingerprint(Part("a", 1.0)) != fingerprint(Part("a", 2.0))


def test_fingerprint_refuses_objects() -> None:
    with pytest.raises(TypeError, match="no stable fingerprint of object"):
        fingerprint(object())


def test_content_hash_ignores_place_and_manifest(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "sub").mkdir(parents=True)
        (tmp_path / name / "sub" / "a.txt").write_text("a")
    (tmp_path / "two" / MANIFEST).write_text("{}")
    assert hash_directory(tmp_path / "one") == hash_directory(tmp_path / "two")
    (tmp_path / "two" / "sub" / "a.txt").rename(tmp_path / "two" / "sub" / "b.txt")
    assert hash_directory(tmp_path / "one") != hash_directory(tmp_path / "two")


def test_atomic_directory_replaces_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with atomic_directory(target) as directory:
        (directory / "x").write_text("1")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), atomic_directory(target) as directory:  # noqa: PT012
        (directory / "x").write_text("2")
        _ = 1 / 0
    assert (target / "x").read_text() == "1"
    with atomic_directory(target) as directory:
        (directory / "y").write_text("3")
    assert [path.name for path in target.iterdir()] == ["y"]
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".artifact.{dead.pid}-00000000.tmp").mkdir()
    mine = tmp_path / f".artifact.{os.getpid()}-00000000.tmp"
    mine.mkdir()
    with atomic_directory(tmp_path / "artifact"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [mine.name, "artifact"]


def test_an_artifact_set_aside_by_a_killed_process_returns(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    aside = tmp_path / f".artifact.{dead.pid}-00000000.old"
    aside.mkdir()
    (aside / "x").write_text("1")
    with pytest.raises(ZeroDivisionError), atomic_directory(tmp_path / "artifact"):
        _ = 1 / 0
    assert (tmp_path / "artifact" / "x").read_text() == "1"


def test_full_disk_is_a_user_error_and_leaves_the_older_artifact(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    with atomic_directory(target) as directory:
        (directory / "x").write_text("1")
    with pytest.raises(UserError, match="no space left"), atomic_directory(target) as directory:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (target / "x").read_text() == "1"


def test_full_disk_is_noticed_behind_a_library_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "_disk_is_full", lambda path: True)
    with pytest.raises(UserError, match="no space left"), atomic_directory(tmp_path / "artifact"):
        raise RuntimeError("PytorchStreamWriter failed writing file")


def test_a_file_in_the_way_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="a file is in the way"):
            make_directory(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_a_user_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        atomic_write_text(tmp_path / "x" / "y", "text")


def test_manifest_round_trip(tmp_path: Path) -> None:
    manifest = Manifest("ids", "k", config={"a": 1}, inputs={"data": "h"}, metrics={"x": [0.5, 2]}, seconds=1.5)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    replace(manifest, metrics={"x": np.float32(0.5), "y": float("nan")}).write(tmp_path)
    assert Manifest.read(tmp_path).metrics == {"x": 0.5, "y": None}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "has no manifest.json"),
        ("{", "cannot be understood"),
        ('{"kind": "x"}', "cannot be understood"),
        (json.dumps({"kind": "x", "key": "k", "format_version": FORMAT_VERSION + 1}), "has format version"),
    ],
)
def test_bad_manifest_is_a_user_error(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=message):
        Manifest.read(tmp_path)
