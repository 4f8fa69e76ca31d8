"""A source's text files line by line, with everything that is wrong in them told at once."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data.errors import UserError
from data.writer import Tracker, untracked

_STEP = 10_000
"""Lines between two steps of a progress bar."""
_SHOWN = 80
"""Characters of an offending value that a message shows."""


@dataclass
class _Finding:
    """Lines that break one rule so far."""

    lines: int
    example: str


class Findings:
    """What is wrong in one file: each broken rule once, with the number of its lines and one of them.

    Args:
        path: the file.
        unit: what a number of :meth:`note` counts.
    """

    def __init__(self, path: Path, *, unit: str = "line") -> None:
        self.path, self.unit = path, unit
        self._found: dict[tuple[str, str], _Finding] = {}

    def __bool__(self) -> bool:
        return bool(self._found)

    def note(self, column: str, rule: str, number: int, value: object = None) -> None:
        """A line breaks a rule.

        Args:
            column: the column or field concerned, ``""`` for the whole line.
            rule: what must hold.
            number: of the line.
            value: the offending value, where it does not identify a person.
        """
        if (column, rule) in self._found:
            self._found[column, rule].lines += 1
            return
        shown = "" if value is None else f": {value!r}"
        if len(shown) > _SHOWN:
            shown = f"{shown[:_SHOWN]}…"
        self._found[column, rule] = _Finding(1, f"e.g. {self.unit} {number}{shown}")

    def tell(self, column: str, rule: str, given: str) -> None:
        """The file as a whole breaks a rule.

        Args:
            column: the column or field concerned, ``""`` for the file.
            rule: what must hold.
            given: what is there instead.
        """
        self._found.setdefault((column, rule), _Finding(0, given))

    def errors(self) -> list[UserError]:
        """One error for each broken rule."""
        errors = []
        for (column, rule), finding in self._found.items():
            where = f"{self.path}, {column}" if column else str(self.path)
            units = self.unit if finding.lines == 1 else f"{self.unit}s"
            count = f"{finding.lines} offending {units}, " if finding.lines else ""
            subject = column or (f"the {self.unit}" if finding.lines else "the file")
            errors.append(
                UserError(
                    f"{where}: {count}{finding.example}",
                    expected=f"{subject} {rule}",
                    action=f"mend {self.path.name}, or get it again from where it is published",
                )
            )
        return errors


def read_lines(path: Path, findings: Findings, *, track: Tracker = untracked) -> Iterator[tuple[int, str]]:
    """Lines of a UTF-8 file with their numbers, without their ends; ``.gz`` is unpacked on the way.

    Args:
        path: the file.
        findings: told of lines that are no UTF-8 or hold a NUL, which are left out, and of a file that is empty or
            cannot be read to its end.
        track: makes a progress bar.

    Yields:
        Number, counted from 1, and text; only ``\\n`` ends a line.
    """
    number = 0
    try:
        with path.open("rb") as raw, track(f"reading {path.name}", path.stat().st_size) as advance:
            stream: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
            done = 0
            for number, line in enumerate(stream, 1):
                if number % _STEP == 0:
                    advance(raw.tell() - done)
                    done = raw.tell()
                if b"\0" in line:
                    findings.note("", "must not hold a NUL character", number)
                    continue
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    findings.note("", "must be UTF-8", number, line[error.start : error.end])
                    continue
                yield number, text.rstrip("\r\n")
            advance(raw.tell() - done)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        findings.tell("", "must be a whole gzip file", f"after {number} lines: {error}")
    except OSError as error:
        findings.tell("", "must be readable", error.strerror or str(error))
    else:
        if not number:
            findings.tell("", "must have lines", "it is empty")
