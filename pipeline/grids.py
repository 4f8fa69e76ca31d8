"""Figures as text in grids: the same ones on a page and on the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipeline.verdict import number

NONE, CLOSED = "none", "closed"
"""What stands for a figure that cannot be had, and for one of the closed test span."""


@dataclass(frozen=True)
class Grid:
    """Figures as text, by line and column; the first cell of a line is its name."""

    columns: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """Grids that belong together."""

    id: str
    title: str
    notes: tuple[str, ...]
    grids: tuple[Grid, ...]


@dataclass(frozen=True)
class Plot:
    """A plot; ``drawing`` is None where the log has nothing to draw."""

    drawing: Markup | None
    name: str
    caption: str


def sections_to_console(scope: str, sections: Iterable[Section]) -> Group:
    """What figures are of, and the figures, for the terminal."""
    return Group(Text(scope), *(part for section in sections for part in console_parts(section)))


def sections_to_markdown(sections: Iterable[Section]) -> str:
    """Figures for a page of the docs."""
    lines = []
    for section in sections:
        lines += [f"**{section.title}.** {' '.join(section.notes)}", ""]
        for grid in section.grids:
            lines += [_line(grid.columns), _line(["---"] * len(grid.columns))]
            lines += [_line(line) for line in grid.lines] + [""]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def console_parts(section: Section) -> list[Text | Table]:
    """A section for the terminal: its title, its notes, its grids."""
    parts: list[Text | Table] = [Text(), Text(section.title, style="bold")]
    parts += [Text(note, style="dim") for note in section.notes]
    for grid in section.grids:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=any(grid.columns))
        for place, column in enumerate(grid.columns):
            table.add_column(Text(column, style="dim"), justify="right" if place else "left", overflow="fold")
        for line in grid.lines:
            table.add_row(*(Text(cell, style="dim" if cell in (NONE, CLOSED) else "") for cell in line))
        parts.append(table)
    return parts


def count(value: int | None) -> str:
    """A whole number with its thousands apart."""
    return NONE if value is None else number(value, 0)


def percent(share: float | None) -> str:
    """A share with one decimal, or two significant digits where it is small."""
    if share is None:
        return NONE
    in_percent = 100 * share
    return f"{number(in_percent, 1)} %" if abs(in_percent) >= 1 or not in_percent else f"{in_percent:.2g} %"
