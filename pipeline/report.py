"""The report of a run: ``report.json``, tidy, for machines, and a self-contained ``report.html`` for people.

The page opens with the verdict in words (`pipeline.verdict`), then shows every figure of the run: what has no
place of its own is listed at the end, and what was not measured is said to be missing. Nothing is loaded from
anywhere: style and figures stand in the page, and its content policy forbids the rest. Texts of the data set,
prompts and titles of ads, are escaped by the template engine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from markupsafe import Markup

from data.artifacts import atomic_write_text, to_plain
from data.statistics import LEVEL, Row
from pipeline import figures, verdict
from pipeline.pages import template
from pipeline.verdict import DIFFERENCE, HEADLINES, METRICS, number


class Stage(TypedDict):
    """What one stage cost."""

    name: str
    seconds: float | None  # None: the stage was not run
    peak_memory_mb: float | None  # MiB
    reused: NotRequired[bool]  # up to date already; its cost is that of the run that made it


class RunInfo(TypedDict):
    """Where the figures come from; stands in ``report.json`` as ``run``."""

    config: Mapping[str, Any]
    versions: Mapping[str, str]
    stages: Sequence[Stage]
    dataset: str  # name of the data config, e.g. "complete_journey"
    evaluate: str  # "validation" or "test"
    command: NotRequired[str]  # what was typed
    caveats: NotRequired[Sequence[str]]  # sentences a reader must know before the figures


class ForecastAdvertiser(TypedDict):
    """One forecast advertiser of the example."""

    advertiser: str
    lm: float | None
    anchor: float | None
    converted: NotRequired[bool]


class Candidate(TypedDict):
    """One candidate ad of the example and the channels that found it."""

    ad: str
    advertiser: str | None
    channels: Sequence[str]
    converted: NotRequired[bool]


class RankedAd(TypedDict):
    """One ad of the final ranking of the example."""

    ad: str
    advertiser: str | None
    score: float
    converted: NotRequired[bool]


class UserExample(TypedDict):
    """One user's way through the system; without ``user`` it names nobody."""

    as_of: str  # e.g. "start of week 43"
    prompt: str
    forecast: Sequence[ForecastAdvertiser]
    candidates: Sequence[Candidate]
    ranking: Sequence[RankedAd]
    user: NotRequired[str]


class Curves(TypedDict, total=False):
    """Points of the plots; a missing key is said to be missing in the report."""

    learning: Sequence[figures.LearningPoint]
    reliability: Mapping[str, figures.ReliabilityCurve]  # by arm
    quota_sweep: Sequence[figures.SweepPoint]
    code_usage: Sequence[Sequence[int]]  # by level, the number of advertisers under each code, in any order


SECTIONS = {
    "forecast": "Forecast",
    "retrieval": "Retrieval",
    "ranking": "Ranking",
    "semantic_ids": "Semantic IDs",
    "data": "Data",
    "cost": "Cost",
}
INTERESTS = ("interest_nll", "interest_recall")  # of the forecast; a table of their own
CALIBRATION = ("ece", "calibration")  # of the forecast; shown beside the reliability diagram
ARMS = ("none", "popularity", "anchor", "lm", *verdict.CONTROLS)
DATASET_NOTES = {
    "complete_journey": (
        "The Complete Journey is simulated, based on real grocery patterns, as its own package says. The "
        "figures show what the method does on such a log, not what it earns in a live ads system.",
        "Advertiser: the manufacturer of a national brand. Ad: one of its products on promotion. Impression: "
        "the product was placed in a store in a week in which the household shopped there. Conversion: it "
        "bought the promoted product on that occasion.",
    ),
    "simulator": ("Users, advertisers and conversions are simulated; the true probabilities are known.",),
}
SHOWN = 25
"""Rows of a list of the example that are shown before the rest is folded away."""


@dataclass(frozen=True)
class Cell:
    """A figure of a table, as text."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Table:
    """Figures by line and column.

    Attributes:
        title: what the table is of, e.g. a segment.
        note: how many cases and seeds stand behind it.
        columns: names of the columns.
        lines: name of each line and its cells; None where there is no figure.
    """

    title: str
    note: str
    columns: list[str]
    lines: list[tuple[str, list[Cell | None]]]


@dataclass(frozen=True)
class ForestLine:
    """One difference of a forest plot."""

    comparison: str
    segment: str
    plot: Markup
    value: str
    interval: str
    outcome: str
    mark: str
    style: str
    n: str
    opens: bool  # the first of its segment


@dataclass(frozen=True)
class Forest:
    """The differences of one measure on a common axis."""

    label: str
    axis: Markup
    lines: list[ForestLine]


@dataclass(frozen=True)
class Section:
    """One section of measures: its tables, the headline differences, and all others."""

    tables: list[Table]
    headline: list[Forest]
    others: list[Forest]

    @property
    def n_others(self) -> int:
        """Number of differences that are folded away."""
        return sum(len(forest.lines) for forest in self.others)


def write_report(
    rows: Sequence[Row], *, run: RunInfo, example: UserExample | None, curves: Curves, out_dir: Path
) -> Path:
    """Write ``report.json`` and ``report.html``.

    Args:
        rows: every figure of the run.
        run: where they come from.
        example: one user's prompt, forecast, candidates and ranking; None where no user was shown.
        curves: points of the plots.
        out_dir: made where it is missing.

    Returns:
        The path of ``report.html``.

    Raises:
        ValueError: two rows claim to be the same figure, or two numbers of a curve do not go together.
        UserError: the directory cannot be written to.
    """
    page = render_html(rows, run=run, example=example, curves=curves)
    atomic_write_text(out_dir / "report.json", render_json(rows, run=run))
    atomic_write_text(out_dir / "report.html", page)
    return out_dir / "report.html"


def render_json(rows: Sequence[Row], *, run: RunInfo) -> str:
    """The text of ``report.json``; a figure that is not finite is ``null``."""
    document = {"rows": [to_plain(asdict(row)) for row in rows], "run": to_plain(run)}
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def render_html(rows: Sequence[Row], *, run: RunInfo, example: UserExample | None, curves: Curves) -> str:
    """The text of ``report.html``.

    Args and Raises are those of `write_report`.
    """
    _refuse_duplicates(rows)
    found, controls = verdict.findings(rows), verdict.control_findings(rows)
    calibration = [row for row in rows if row.section == "forecast" and row.metric in CALIBRATION]
    by_section = {name: [row for row in rows if row.section == name] for name in SECTIONS}
    interests = [row for row in by_section["forecast"] if row.metric in INTERESTS]
    by_section["forecast"] = [row for row in by_section["forecast"] if row not in (*calibration, *interests)]
    return template("report.html.j2", number=number).render(
        level=f"{LEVEL:.0%}",
        summary=verdict.summary(found),
        verdict=[(SECTIONS[name], _by_measure(found, name)) for name in ("forecast", "retrieval", "ranking")],
        against=[verdict.arm_label(f"lm{DIFFERENCE}{arm}") for arm in verdict.AGAINST],
        controls=controls,
        control_summary=verdict.control_summary(controls),
        n_headlines=len(HEADLINES),
        mark=figures.outcome_mark,
        run=run,
        notes=DATASET_NOTES.get(run["dataset"], ()),
        sections={name: measures(by_section[name]) for name in ("forecast", "retrieval", "ranking")},
        calibration=measures(calibration),
        interests=measures(interests),
        lists={name: _list_table(by_section[name]) for name in ("semantic_ids", "data", "cost")},
        unplaced=_list_table([row for row in rows if row.section not in SECTIONS]),
        plots=_plots(curves),
        example=_example(example) if example else None,
        stages=_stages(run["stages"]),
        config=list(_flatten(to_plain(run["config"]))),
    )


def _refuse_duplicates(rows: Iterable[Row]) -> None:
    counts = Counter((row.section, row.metric, row.arm, row.segment, row.k) for row in rows)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise ValueError(
            "each figure has one row (section, metric, arm, segment, k); more than one claim to be: "
            + "; ".join(str(key) for key in twice)
        )


def _by_measure(found: Sequence[verdict.Finding], section: str) -> list[list[verdict.Finding]]:
    """The findings of a section, those of one measure together, in the order of `verdict.AGAINST`."""
    own = [finding for finding in found if finding.section == section]
    size = len(verdict.AGAINST)
    return [own[start : start + size] for start in range(0, len(own), size)]


def measures(rows: Sequence[Row]) -> Section | None:
    """Figures and differences of one section, as tables and forest plots; None where there are none."""
    if not rows:
        return None
    levels = [row for row in rows if DIFFERENCE not in row.arm]
    differences = [row for row in rows if DIFFERENCE in row.arm]
    segments = sorted({row.segment for row in levels}, key=_segment_order(levels))
    leading = {
        (row.section, row.metric, row.k)
        for headline in HEADLINES
        for row in differences
        if (row.section, row.metric) == (headline.section, headline.metric)
        and (row.k == headline.k or not any(_same_measure(other, row, headline.k) for other in differences))
    }
    is_leading = [
        (row.section, row.metric, row.k) in leading or (row.section, row.metric) == ("forecast", "ece")
        for row in differences
    ]
    return Section(
        tables=[_arm_table(segment, [row for row in levels if row.segment == segment]) for segment in segments],
        headline=_forests([row for row, leads in zip(differences, is_leading, strict=True) if leads]),
        others=_forests([row for row, leads in zip(differences, is_leading, strict=True) if not leads]),
    )


def _same_measure(other: Row, row: Row, k: int | None) -> bool:
    return (other.section, other.metric, other.k) == (row.section, row.metric, k)


def _arm_table(segment: str, rows: Sequence[Row]) -> Table:
    columns = sorted({(row.metric, row.k) for row in rows}, key=_measure_order)
    cells = {(row.arm, row.metric, row.k): row for row in rows}
    return Table(
        title=segment.replace("_", " "),
        note=_support(rows),
        columns=[verdict.metric_label(next(r for r in rows if (r.metric, r.k) == column)) for column in columns],
        lines=[
            (verdict.arm_label(arm), [_cell(cells.get((arm, metric, k))) for metric, k in columns])
            for arm in sorted({row.arm for row in rows}, key=_arm_order)
        ],
    )


def _list_table(rows: Sequence[Row]) -> Table | None:
    """Measures as lines; arms, segments and levels as columns."""
    if not rows:
        return None

    def place(row: Row) -> tuple[str, str, int]:
        return row.arm, row.segment, row.k or 0

    def name(arm: str, segment: str, k: int) -> str:
        parts = [verdict.arm_label(arm), "" if segment == verdict.SEGMENT else segment.replace("_", " ")]
        return ", ".join(part for part in (*parts, f"level {k}" if k else "") if part)

    columns = list(dict.fromkeys(place(row) for row in rows))
    cells = {(row.metric, *place(row)): row for row in rows}
    metrics = sorted({row.metric for row in rows}, key=lambda metric: _measure_order((metric, None)))
    return Table(
        title="",
        note="",
        columns=[name(*column) for column in columns],
        lines=[
            (verdict.metric_of(metric).label, [_cell(cells.get((metric, *column))) for column in columns])
            for metric in metrics
        ],
    )


def _cell(row: Row | None) -> Cell | None:
    if row is None:
        return None
    digits = verdict.metric_of(row.metric).digits
    if row.metric not in METRICS and verdict.is_known(row.value) and float(row.value).is_integer():
        digits = 0
    return Cell(number(row.value, digits), verdict.interval(row, digits))


def _forests(rows: Sequence[Row]) -> list[Forest]:
    forests = []
    for metric, k in sorted({(row.metric, row.k) for row in rows}, key=_measure_order):
        own = [row for row in rows if (row.metric, row.k) == (metric, k)]
        order = _segment_order(own)
        own.sort(key=lambda row: (order(row.segment), _arm_order(row.arm)))
        scale = figures.forest_scale(own)
        first = {row.segment: row for row in reversed(own)}
        lines = [_forest_line(row, scale, opens=row is first[row.segment]) for row in own]
        axis = figures.forest_axis(scale, verdict.metric_of(metric).better)
        forests.append(Forest(verdict.metric_label(own[0]), axis, lines))
    return forests


def _forest_line(row: Row, scale: float, *, opens: bool) -> ForestLine:
    outcome, digits = verdict.judge(row), verdict.metric_of(row.metric).difference_digits
    return ForestLine(
        comparison=verdict.arm_label(row.arm),
        segment=row.segment.replace("_", " "),
        plot=figures.forest_cell(row, scale),
        value=number(row.value, digits, signed=True),
        interval=verdict.interval(row, digits, signed=True) or "no interval",
        outcome=outcome.value,
        mark=figures.outcome_mark(outcome),
        style=outcome.name.lower(),
        n=number(row.n, 0),
        opens=opens,
    )


def _support(rows: Sequence[Row]) -> str:
    cases, seeds = {row.n for row in rows}, {row.seeds for row in rows}
    return f"n = {_range(cases)} · {_range(seeds)} seed{'' if seeds == {1} else 's'}"


def _range(values: set[int]) -> str:
    low, high = number(min(values), 0), number(max(values), 0)
    return low if low == high else f"{low} to {high}"


def _measure_order(measure: tuple[str, int | None]) -> tuple[int, str, int]:
    metric, k = measure
    known = list(METRICS)
    return (known.index(metric) if metric in METRICS else len(known), metric, k or 0)


def _arm_order(arm: str) -> tuple[int, int, str]:
    left, _, right = arm.partition(DIFFERENCE)
    if right:  # the LM's differences first, the headline before all
        preferred = (*verdict.AGAINST, *verdict.CONTROLS)
        place = preferred.index(right) if right in preferred else len(preferred)
        return (0 if left == "lm" else 1, place, arm)
    return (0, ARMS.index(arm), arm) if arm in ARMS else (1, 0, arm)


def _segment_order(rows: Sequence[Row]) -> Any:
    seen = list(dict.fromkeys(row.segment for row in rows))
    return lambda segment: -1 if segment == verdict.SEGMENT else seen.index(segment)


def _plots(curves: Curves) -> dict[str, Markup | None]:
    return {
        "learning": figures.learning_curve(curves.get("learning", ())),
        "reliability": figures.reliability_diagram(curves.get("reliability", {})),
        "quota_sweep": figures.quota_sweep(curves.get("quota_sweep", ())),
        "code_usage": figures.code_usage(curves.get("code_usage", ())),
    }


def _example(example: UserExample) -> dict[str, Any]:
    """The example with its plots, and who found how many of the candidates."""
    known = [p for one in example["forecast"] for p in (one["lm"], one["anchor"]) if p is not None and p == p]
    largest = max(known, default=0.0)
    candidates = example["candidates"]
    by_channel = Counter(channel for one in candidates for channel in one["channels"])
    alone = Counter(one["channels"][0] for one in candidates if len(one["channels"]) == 1)
    outcomes = (*example["forecast"], *candidates, *example["ranking"])
    return {
        "user": example.get("user"),
        "as_of": example["as_of"],
        "prompt": example["prompt"],
        "forecast": [
            {**one, "plot": figures.dumbbell(one["lm"], one["anchor"], largest)} for one in example["forecast"]
        ],
        "candidates": candidates,
        "channels": [(channel, count, alone[channel]) for channel, count in by_channel.most_common()],
        "ranking": example["ranking"],
        "knows_outcome": any("converted" in one for one in outcomes),
        "shown": SHOWN,
    }


def _stages(stages: Sequence[Stage]) -> dict[str, Any]:
    seconds = [stage["seconds"] or 0.0 for stage in stages]
    memory = [stage["peak_memory_mb"] or 0.0 for stage in stages]
    longest = max(seconds, default=0.0) or 1.0
    lines = [
        {**stage, "reused": stage.get("reused", False), "percent": f"{100 * spent / longest:.1f}"}
        for stage, spent in zip(stages, seconds, strict=True)
    ]
    return {"lines": lines, "seconds": sum(seconds), "memory": max(memory, default=0.0)}


def _flatten(value: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix, json.dumps(value, ensure_ascii=False)
