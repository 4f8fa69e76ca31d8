"""How the forecaster of a run ages (`priors.drift`), as ``adsid priors drift`` shows and writes it.

<out>/drift.json     every figure, what was learned at each step, seconds, versions
<out>/drift.html     the same as tables and a plot
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group

from data.artifacts import atomic_write_text, package_versions, to_plain
from data.statistics import LEVEL, Row
from pipeline.figures import ageing
from pipeline.forecasts import PANEL, open_prior
from pipeline.grids import NONE, Grid, Plot, Section, count, sections_to_console
from pipeline.pages import template
from pipeline.report import DATASET_NOTES
from pipeline.verdict import DIFFERENCE, arm_label, figure, number
from priors.drift import (
    ANCHOR,
    ANCHOR_REFIT,
    FORECAST,
    LM,
    POPULARITY,
    RECALIBRATED,
    REFIT,
    REWEIGHTED,
    DriftStep,
    follow,
)

FOLDER, JSON_FILE, PAGE = "drift", "drift.json", "drift.html"
_READ = (*PANEL, "prior.prompts", "prior.select_prompts", "prior.max_targets", "prior.batch_size",
         "prior.anchor.", "prior.history.", "prior.head.")  # fmt: skip
"""What is followed, and what a refit reads."""
_FROZEN = tuple(f"{arm}{DIFFERENCE}{ANCHOR}" for arm in (POPULARITY, FORECAST, RECALIBRATED, REFIT))
_FRESH = (
    *(f"{arm}{DIFFERENCE}{FORECAST}" for arm in (REWEIGHTED, RECALIBRATED, REFIT)),
    f"{ANCHOR_REFIT}{DIFFERENCE}{ANCHOR}",
    f"{REFIT}{DIFFERENCE}{ANCHOR_REFIT}",
)
_DRAWN = {FORECAST: "s-lm", RECALIBRATED: "s-none", REFIT: "s-other"}


@dataclass(frozen=True)
class Followed:
    """A forecaster and how it aged.

    Attributes:
        data: source of the log.
        every: periods of a step.
        steps: figures of the selection span and of each step after it.
        versions: of the packages.
    """

    data: str
    every: int
    steps: list[DriftStep]
    versions: dict[str, str]


def follow_run(run: Path, overrides: Sequence[str] = (), *, every: int, lm_prompts: int = 0) -> Followed:
    """Follow the forecaster of a run; nothing in the run is changed.

    Args:
        run: directory of a run whose stage prior is done.
        overrides: of single keys.
        every: periods of a step.
        lm_prompts: prompts of each step that the LM is asked with.

    Raises:
        UserError: no such run, or as of `priors.drift.follow`.
    """
    config, log, prior = open_prior(run, overrides, read=_READ)
    steps = follow(prior, log, every=every, lm_prompts=lm_prompts)
    return Followed(config.data.source, every, steps, package_versions())


def write_drift(found: Followed, out: Path) -> Path:
    """Write ``drift.json`` and ``drift.html``, and return the path of the page."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / JSON_FILE, json.dumps(to_plain(found), indent=1, allow_nan=False) + "\n")
    atomic_write_text(out / PAGE, render(found))
    return out / PAGE


def render(found: Followed) -> str:
    """The text of the page."""
    caption = f"Bands: {LEVEL:.0%} intervals over users. The first point is of the selection span."
    return template("sections.html.j2").render(
        title="adsid priors: drift",
        heading="How the forecast ages",
        json="adsid priors drift --json",
        scope=scope(found),
        caveats=DATASET_NOTES.get(found.data, ())[:1],
        sections=sections(found),
        plots={"nll": [Plot(ageing(_series(found), _DRAWN), "NLL over time", caption)]},
    )


def to_console(found: Followed) -> Group:
    """The figures for the terminal."""
    return sections_to_console(scope(found), sections(found))


def scope(found: Followed) -> str:
    """What the figures are of."""
    requests, users = (sum(step.requests for step in found.steps), max(step.users for step in found.steps))
    return (
        f"{found.data}, {count(requests)} user-periods with a conversion of up to {count(users)} users a step; "
        f"{LEVEL:.0%} intervals by bootstrap over users. "
        "The first line is the selection span, by which all that is frozen was chosen. Counts go up to the start of "
        "each period; what was learned stays."
    )


def sections(found: Followed) -> tuple[Section, ...]:
    """All figures, as text."""
    nll = (
        "Exact, over all advertisers; the forecast is that by anchor and history. What is learned again is learned "
        "from what lies before the step."
    )
    ece = "|predicted - observed| / predicted, a mean over 15 bins of one mass; few user-periods make it larger."
    found_sections = [
        Section("nll", "NLL", (nll,), tuple(_grid(found, "nll", *wanted) for wanted in _TABLES)),
        Section("ece", "Calibration error", (ece,), tuple(_grid(found, "ece", *wanted) for wanted in _TABLES)),
    ]
    if any(row.arm == LM for step in found.steps for row in step.rows):
        wanted = ((LM,), (f"{LM}{DIFFERENCE}{ANCHOR}", f"{LM}{DIFFERENCE}{FORECAST}"))
        note = "Frozen, on prompts drawn from each step; differences are of the same prompts."
        found_sections.append(Section("lm", "The LM", (note,), (_grid(found, "nll", *wanted),)))
    lines = tuple((_periods(step), *(_seconds(step, arm) for arm in (RECALIBRATED, REFIT))) for step in found.steps)
    cost = Grid(("periods", RECALIBRATED, REFIT), lines)
    found_sections.append(Section("cost", "Processor seconds", ("Of learning again before each step.",), (cost,)))
    return tuple(found_sections)


_TABLES = (((ANCHOR,), _FROZEN), ((), _FRESH))


def _grid(found: Followed, metric: str, levels: Sequence[str], differences: Sequence[str]) -> Grid:
    lines = []
    for step in found.steps:
        rows = {row.arm: row for row in step.rows if row.metric == metric}
        cells = (*(_level(rows.get(arm)) for arm in levels), *(_difference(rows.get(arm)) for arm in differences))
        lines.append((_periods(step), *cells))
    return Grid(("periods", *map(arm_label, (*levels, *differences))), tuple(lines))


def _level(row: Row | None) -> str:
    return NONE if row is None else number(row.value, 4)


def _difference(row: Row | None) -> str:
    return NONE if row is None else figure(row, 4)


def _seconds(step: DriftStep, arm: str) -> str:
    return number(step.seconds[arm], 1) if arm in step.seconds else NONE


def _periods(step: DriftStep) -> str:
    first, last = step.periods
    return str(first) if first == last else f"{first}\N{EN DASH}{last}"


def _series(found: Followed) -> dict[str, list[tuple[float, float, float, float]]]:
    series: dict[str, list[tuple[float, float, float, float]]] = {arm: [] for arm in _DRAWN}
    for step in found.steps:
        for row in step.rows:
            arm, _, against = row.arm.partition(DIFFERENCE)
            if row.metric == "nll" and against == ANCHOR and arm in series:
                low, high = (row.value if end is None else end for end in (row.ci_low, row.ci_high))
                series[arm].append((sum(step.periods) / 2, row.value, low, high))
    return series
