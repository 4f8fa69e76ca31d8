"""An ablation (`pipeline.ablation`) as tables on the terminal, as Markdown, as JSON, and as a page with plots.

All show the same grids: the figures of every arm, its differences with the first arm, differences within each arm, and
what the arms cost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Group
from rich.text import Text

from data.artifacts import atomic_write_text, to_plain
from data.statistics import LEVEL, Interval, Row
from pipeline import figures, verdict
from pipeline.ablation import Recommendation, Result, Shown, Study
from pipeline.grids import NONE, Grid, Section, sections_to_console, sections_to_markdown
from pipeline.pages import template
from pipeline.verdict import DIFFERENCE, Outcome, number

_ARMS = 4
JSON, MARKDOWN, PAGE = "ablation.json", "ablation.md", "ablation.html"


@dataclass(frozen=True)
class ForestLine:
    """The difference of one arm with the first."""

    arm: str
    value: str
    interval: str
    plot: Markup
    outcome: str
    style: str


@dataclass(frozen=True)
class Forest:
    """The differences of one figure on a common axis."""

    label: str
    axis: Markup
    lines: list[ForestLine]


def write_ablation(result: Result, out: Path) -> None:
    """Write ``ablation.json``, ``ablation.md`` and ``ablation.html`` into a folder."""
    atomic_write_text(out / JSON, json.dumps(to_plain(_document(result)), indent=1, allow_nan=False) + "\n")
    atomic_write_text(out / MARKDOWN, to_markdown(result))
    atomic_write_text(out / PAGE, render(result))


def render(result: Result) -> str:
    """The text of the page."""
    return template("ablation.html.j2").render(
        study=result.study,
        scope=scope(result),
        sections=sections(result),
        forests=forests(result),
        level=f"{LEVEL:.0%}",
    )


def to_console(result: Result) -> Group:
    """The tables for the terminal."""
    return Group(Text(), sections_to_console(scope(result), sections(result)))


def to_markdown(result: Result) -> str:
    """The tables for a page of the docs."""
    return "\n".join([result.study.about, "", scope(result), "", sections_to_markdown(sections(result))])


def scope(result: Result) -> str:
    """What the figures are of."""
    study = result.study
    seeds = ", ".join(map(str, study.seeds))
    given = " ".join(one for one in (*study.overrides, *result.overrides) if not one.startswith("trainer."))
    return (
        f"Ablation {study.name} of the {result.kind.name}: {len(study.arms)} arms, training seed"
        f"{'' if len(study.seeds) == 1 else 's'} {seeds}{f', {given}' if given else ''}."
    )


def sections(result: Result) -> tuple[Section, ...]:
    """All figures, as text."""
    kind, arms = result.kind, list(result.study.arms)
    first, rows = arms[0], {(row.metric, row.arm, row.segment, row.k): row for row in result.rows}

    def grids(wanted: Sequence[Shown], of_arms: Sequence[str], base: str | None = None) -> tuple[Grid, ...]:
        """Figures by line, arms by column, a few arms at a time so that a line fits."""
        found = []
        for start in range(0, len(of_arms), _ARMS):
            some = of_arms[start : start + _ARMS]
            lines = tuple((shown.title, *(_cell(rows, arm, shown, base) for arm in some)) for shown in wanted)
            found.append(Grid(("", *some), lines))
        return tuple(found)

    overrides = tuple((arm, " ".join(own) or "as it is") for arm, own in result.study.arms.items())
    cost = tuple((arm, *(number(cost.seconds[name], 0) for name in kind.stages)) for arm, cost in result.costs.items())
    found = [
        Section("arms", "Arms", ("Overrides of each.",), (Grid(("arm", "overrides"), overrides),)),
        Section("figures", "Figures", ("Means over user-periods and seeds.",), grids(kind.levels, arms)),
    ]
    if len(arms) > 1:
        with_intervals = any(row.ci_low is not None for row in result.rows)
        note = (
            f"Paired, with {LEVEL:.0%} intervals over users and seeds; ▲ better, ▼ worse, no mark where zero is inside."
            if with_intervals
            else "Means over seeds; a run has one such figure, so there is no interval."
        )
        found.append(Section("against", f"Less {first}", (note,), grids(kind.levels, arms[1:], first)))
    if kind.within:
        found.append(Section("within", "Within each arm", ("Paired in the same way.",), grids(kind.within, arms)))
    if kind.choose is not None:
        found.append(_best(result, kind.choose))
    if result.recommendation is not None:
        found.append(_recommendation(result.recommendation, result.study))
    note = "Seconds of each stage, a mean over seeds; a stage taken over from another run costs what it cost there."
    found.append(Section("cost", "Cost", (note,), (Grid(("arm", *kind.stages), cost),)))
    return tuple(found)


def best_arm(result: Result, choose: Shown) -> str:
    """The arm whose figure is the best."""
    rows = {(row.metric, row.arm, row.segment, row.k): row for row in result.rows}
    values = {arm: row.value for arm in result.study.arms if (row := _find(rows, arm, choose, None)) is not None}
    return (min if verdict.metric_of(choose.metric).better == "lower" else max)(values, key=values.__getitem__)


def _best(result: Result, choose: Shown) -> Section:
    arm = best_arm(result, choose)
    notes = (
        f"Take {arm}: {' '.join(result.study.arms[arm])}",
        f"Chosen by {choose.title}; nothing of the evaluated span was read for it.",
    )
    return Section("best", "The best setting", notes, ())


def _recommendation(found: Recommendation, study: Study) -> Section:
    limit = "" if found.max_tokens is None else f" with at most {found.max_tokens:g} tokens on average"
    if found.arm is None:
        notes: tuple[str, ...] = (f"No arm has prompts{limit}.",)
    else:
        overrides = " ".join((*study.overrides, *study.arms[found.arm])) or "no overrides: the prompt as it is"
        notes = (
            f"Take {found.arm}{limit}: {overrides}",
            "The shortest prompts of those whose interval does not lie above the best one's, by the NLL of the "
            "selection prompts as trained. What these prompts do not tell apart is not shown to be the same.",
        )
    lines = tuple(
        (
            ("→ " if arm == found.arm else "") + arm,
            number(tokens, 1),
            _difference(None if arm not in found.less_best else _row_of(found.less_best[arm])),
        )
        for arm, tokens in found.tokens.items()
    )
    return Section("prompt", "Which prompt", notes, (Grid(("arm", "tokens", "selection NLL − best"), lines),))


def _row_of(interval: Interval) -> Row:
    return Row.of(interval, section="forecast", metric="select_nll", arm=f"lm{DIFFERENCE}best")


def forests(result: Result) -> list[Forest]:
    """The differences with the first arm, figure by figure."""
    arms = list(result.study.arms)
    rows = {(row.metric, row.arm, row.segment, row.k): row for row in result.rows}
    found = []
    for shown in result.kind.levels:
        own = {arm: row for arm in arms[1:] if (row := _find(rows, arm, shown, arms[0])) is not None}
        if not own:
            continue
        scale, metric = figures.forest_scale(list(own.values())), verdict.metric_of(shown.metric)
        lines = []
        for arm, row in own.items():
            outcome, digits = verdict.judge(row), metric.difference_digits
            interval = verdict.interval(row, digits, signed=True)
            plot = figures.forest_cell(row, scale)
            words = f"{figures.outcome_mark(outcome)} {outcome.value}"
            value = number(row.value, digits, signed=True)
            lines.append(ForestLine(arm, value, interval, plot, words, outcome.name.lower()))
        found.append(Forest(shown.title, figures.forest_axis(scale, metric.better), lines))
    return found


def _find(rows: dict[tuple[Any, ...], Row], arm: str, shown: Shown, base: str | None) -> Row | None:
    parts = [f"{arm} / {of}" for of in shown.of.split(DIFFERENCE, 1)]
    if base is not None:
        parts.append(f"{base} / {shown.of}")
    return rows.get((shown.metric, DIFFERENCE.join(parts), shown.segment, shown.k))


def _cell(rows: dict[tuple[Any, ...], Row], arm: str, shown: Shown, base: str | None) -> str:
    row = _find(rows, arm, shown, base)
    return _difference(row) if base or DIFFERENCE in shown.of else _level(row)


def _level(row: Row | None) -> str:
    return NONE if row is None else number(row.value, verdict.metric_of(row.metric).digits)


def _difference(row: Row | None) -> str:
    if row is None:
        return NONE
    mark = {Outcome.GAIN: " ▲", Outcome.LOSS: " ▼"}.get(verdict.judge(row), "")
    return verdict.figure(row) + mark


def _document(result: Result) -> dict[str, Any]:
    study = result.study
    return {
        "study": study.name,
        "about": study.about,
        "kind": result.kind.name,
        "overrides": [*study.overrides, *result.overrides],
        "arms": study.arms,
        "seeds": study.seeds,
        "recommendation": result.recommendation,
        "seconds": {arm: cost.seconds for arm, cost in result.costs.items()},
        "rows": result.rows,
    }
