"""What `adsid ablate ranker` shows: the figures of `ranking.ablation` as a page, as JSON and on the terminal.

    ranker_ablation/rows.json        every figure, see `data.statistics.Row`
    ranker_ablation/ablation.html    the same as tables and forest plots

What is claimed is told first and in words: the forecast's gain over the anchor and over none, and whether the control
holds. The words follow from the intervals alone (`pipeline.verdict`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.artifacts import atomic_write_text
from data.statistics import LEVEL, Row
from pipeline import report, verdict
from pipeline.config import AdsidConfig
from pipeline.grids import Grid, console_parts
from pipeline.grids import Section as TextSection
from pipeline.pages import template
from pipeline.verdict import DIFFERENCE, Outcome, number
from ranking.ablation import SHUFFLED

PAGE = "ablation.html"
CLAIMED = ("auc", "gauc", "pr_auc", "normalized_entropy")
"""Metrics that the words and the terminal are of; the page has all."""


@dataclass(frozen=True)
class Part:
    """Figures that are compared with each other."""

    id: str
    title: str
    note: str
    rows: tuple[Row, ...]


def write_ablation(rows: Sequence[Row], config: AdsidConfig, directory: Path) -> None:
    """Write the page.

    Args:
        rows: of `ranking.ablation.compare`.
        config: that they were made with.
        directory: gets `PAGE`.

    Raises:
        UserError: the file cannot be written.
    """
    page = template("ranker_ablation.html.j2").render(
        level=f"{LEVEL:.0%}",
        scope=scope(rows, config),
        findings=findings(rows),
        parts=[(part, report.measures(part.rows)) for part in parts(rows)],
    )
    atomic_write_text(directory / PAGE, page)


def to_console(rows: Sequence[Row], config: AdsidConfig) -> Group:
    """The main figures for the terminal: all rows, no segments."""
    shown: list[Text | Table] = [Text(scope(rows, config)), *(Text(f"· {finding}") for finding in findings(rows))]
    for part in parts(rows):
        shown += console_parts(_as_text(part))
    return Group(*shown)


def scope(rows: Sequence[Row], config: AdsidConfig) -> str:
    """What the figures are of."""
    row = next(row for row in rows if row.segment == verdict.SEGMENT)
    seeds = f"{row.seeds} seed{'' if row.seeds == 1 else 's'}"
    return (
        f"{config.data.source}, span {config.evaluate}, {number(row.n, 0)} rows, ranker {config.ranker.model}, "
        f"{seeds}; {LEVEL:.0%} intervals over users{' and seeds' if row.seeds > 1 else ''}."
    )


def findings(rows: Sequence[Row]) -> list[str]:
    """What the arms show, in words; the control last, by every measure."""
    found = []
    for metric in CLAIMED:
        for against in verdict.AGAINST:
            row = verdict.find(rows, "ranking", metric, f"lm{DIFFERENCE}{against}")
            if row is not None:
                found.append(f"{verdict.metric_of(metric).label}, {_told(row)}")
    for metric in CLAIMED:
        control = verdict.find(rows, "ranking", metric, f"{SHUFFLED}{DIFFERENCE}none")
        if control is not None:
            holds = verdict.judge(control) is not Outcome.GAIN
            found.append(
                f"Control, another user's forecast, {verdict.metric_of(metric).label}: {_told(control)}"
                + ("" if holds else " The control gains: of what the other arms gain, so much is not the user's own.")
            )
    return found


def parts(rows: Sequence[Row]) -> list[Part]:
    """The rows of the arms, of the groups of prior features and of the models."""

    def kind(arm: str) -> str:
        names = arm.split(DIFFERENCE)
        if any(", without " in name or ", only " in name for name in names):
            return "groups"
        return "models" if any(", " in name for name in names) else "arms"

    titles = {
        "arms": ("Arms", "The same ranker with no forecast, the anchor's, the LM's, and another user's."),
        "groups": (
            "Groups of prior features",
            "LM − LM without a group: what the group adds to the others. LM only a group − none: what it brings alone.",
        ),
        "models": ("Models", "Each other model in three arms, and against the first model."),
    }
    found = []
    for name, (title, note) in titles.items():
        own = tuple(row for row in rows if kind(row.arm) == name)
        if own:
            found.append(Part(name, title, note, own))
    return found


def _as_text(part: Part) -> TextSection:
    rows = [row for row in part.rows if row.segment == verdict.SEGMENT]
    names = list(dict.fromkeys(row.arm for row in rows))
    metrics = list(dict.fromkeys(row.metric for row in rows))
    value = {(row.arm, row.metric): row for row in rows}
    levels = Grid(
        ("", *(verdict.metric_of(metric).label for metric in metrics)),
        tuple(
            (
                verdict.arm_label(arm),
                *(number(value[arm, metric].value, verdict.metric_of(metric).digits) for metric in metrics),
            )
            for arm in names
            if DIFFERENCE not in arm
        ),
    )
    claimed = [metric for metric in CLAIMED if metric in metrics]
    differences = Grid(
        ("", *(verdict.metric_of(metric).label for metric in claimed)),
        tuple(
            (verdict.arm_label(arm), *(verdict.figure(value[arm, metric]) for metric in claimed))
            for arm in names
            if DIFFERENCE in arm
        ),
    )
    return TextSection(part.id, part.title, (part.note,), (levels, differences))


def _told(row: Row) -> str:
    return f"{verdict.arm_label(row.arm)}: {verdict.figure(row)}, {verdict.judge(row).value}."
