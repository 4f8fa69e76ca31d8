"""A described log (`data.describe`) as a page with plots, and as tables on the terminal.

Both show the same figures from the same grids. The page stands on its own, in the look of the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from rich.console import Group
from rich.table import Table
from rich.text import Text

from data.artifacts import atomic_write_text
from data.describe import Description, Distribution, Period, SpanCounts, Texts
from pipeline.figures import Panel, round_axis, svg
from pipeline.grids import CLOSED, NONE, Grid, Plot, Section, console_parts, count, percent
from pipeline.pages import template
from pipeline.report import DATASET_NOTES
from pipeline.verdict import number

MAX_BARS = 200
"""Periods that are drawn as bars; more are drawn as an area."""
_WIDTH, _LEFT, _PLOT_WIDTH = 680.0, 60.0, 606.0
_LETTER = 6.2
"""Width of a letter of a tick, about, in the units of a figure."""
_SPARKS, _SPARK_WIDTH = "▁▂▃▄▅▆▇█", 80


def write_description(description: Description, path: Path) -> None:
    """Write the page, whole or not at all.

    Args:
        description: of `data.describe.describe`.
        path: of the HTML file; missing folders are made.

    Raises:
        UserError: the file cannot be written.
    """
    atomic_write_text(path, render_description(description))


def render_description(description: Description) -> str:
    """The text of the page."""
    return template("description.html.j2").render(
        source=description.source,
        scope=scope(description),
        caveats=DATASET_NOTES.get(description.source, ())[:1],
        sections=sections(description),
        plots=_plots(description),
    )


def to_console(description: Description) -> Group:
    """The figures for the terminal."""
    parts: list[Text | Table] = [Text(scope(description))]
    for section in sections(description):
        parts += console_parts(section)
        if section.id == "targets":
            parts.append(_sparks(description.periods))
    return Group(*parts)


def scope(description: Description) -> str:
    """Which part of the log the figures are of."""
    if description.evaluate == "test":
        return "The figures are of the whole log, the test span included (evaluate=test)."
    return (
        "The figures are of what lies before the test span, which is closed; only the rows of the tables and the log's "
        "first and last day are of the whole log."
    )


def sections(description: Description) -> tuple[Section, ...]:
    """All figures, as text."""
    return (
        _rows(description),
        _who(description),
        _time(description),
        _events(description),
        _targets(description),
        _spread(description),
        _texts(description.texts),
    )


def _rows(d: Description) -> Section:
    lines = tuple((name, number(rows, 0)) for name, rows in d.rows.items())
    notes = (*DATASET_NOTES.get(d.source, ()), f"Whole log, from {d.first_day} to {d.last_day}.")
    return Section("tables", "Tables", notes, (Grid(("", "rows"), lines),))


def _who(d: Description) -> Section:
    users, advertisers, ads = d.users, d.advertisers, d.ads
    lines = (
        ("users", number(users.total, 0), ""),
        _line("with a profile", users.with_profile, users.total),
        _line("with a conversion", users.with_conversion, users.total),
        ("advertisers", number(advertisers.total, 0), ""),
        _line("with an ad", advertisers.with_ad, advertisers.total),
        _line("with a running ad", advertisers.with_running_ad, advertisers.total),
        _line("with a conversion", advertisers.with_conversion, advertisers.total),
        ("ads", number(ads.total, 0), ""),
        _line("of a known advertiser", ads.with_advertiser, ads.total),
        _line("running", ads.running, ads.total),
        ("markets", count(d.markets or None), ""),
    )
    profile = tuple((name, percent(share)) for name, share in users.profile.items())
    return Section(
        "who",
        "Users, advertisers, ads",
        ("A running ad has a placement; a profile has a value in any column of users beside the id.",),
        (
            Grid(("", "number", "share"), lines),
            Grid(("profile column", "users with a value"), profile or (("no profile column", NONE),)),
        ),
    )


def _time(d: Description) -> Section:
    names = [span.name.replace("_", " ") for span in d.spans]
    when = [
        (name, f"{span.first}–{span.last}" if span.last > span.first else f"{span.first}", span.start, span.end)
        for name, span in zip(names, d.spans, strict=True)
    ]
    what = [(name, *_span_counts(span)) for name, span in zip(names, d.spans, strict=True)]
    day = "one day" if d.period_days == 1 else f"{d.period_days} days"
    notes = [
        f"Period 1 begins {d.origin}, a period lasts {day}; the split has {number(d.spans[-1].last, 0)} periods, and "
        f"{number(sum(period.events > 0 for period in d.periods), 0)} of the periods {_reach(d.periods)} have events.",
        "Cold: advertisers with a conversion in the span and none before it.",
    ]
    if d.ordinal:
        notes.insert(0, "Timestamps are the order of each user's events: days and periods are no calendar time.")
    counts = ("conversions", "user-periods", "targets", "new", "advertisers", "cold")
    grids = Grid(("", "periods", "first day", "last day"), tuple(when)), Grid(("", *counts), tuple(what))
    return Section("time", "Periods and split", tuple(notes), grids)


def _span_counts(span: SpanCounts) -> tuple[str, ...]:
    if span.targets is None:
        return (CLOSED,) * 6
    return (
        count(span.conversions),
        count(span.user_periods),
        count(span.targets),
        _share(span.new_targets, span.targets),
        count(span.advertisers),
        _share(span.cold_advertisers, span.advertisers),
    )


def _events(d: Description) -> Section:
    total = sum(d.events.values())
    role = dict.fromkeys(d.purchase_kinds, "purchase") | dict.fromkeys(d.label_kinds, "conversion")
    kinds = tuple(
        (kind.replace("_", " "), number(count, 0), _share(count, total), role.get(kind, ""))
        for kind, count in d.events.items()
    )
    visits, users, advertisers = d.visits, d.users.conversions, d.advertisers.conversions
    lines = (
        ("visits", count(visits.total if visits else None), ""),
        _line("without an eligible ad", visits.without_ads if visits else None, visits.total if visits else 0),
        ("baskets", count(d.baskets or None), ""),
    )
    spread = (
        _distribution("eligible ads per visit", visits.eligible_ads if visits else None),
        _distribution("active advertisers per visit", visits.active_advertisers if visits else None),
        _distribution("conversions per user with one", users),
        _distribution("conversions per advertiser with one", advertisers),
    )
    return Section(
        "events",
        "Events and visits",
        (
            "Purchases are conversions and organic events. A visit is a user in a market in a period, a basket a "
            "user's purchases of one moment. Eligible ads run in the market of the visit at a time of its period.",
        ),
        (
            Grid(("kind", "events", "share", "counts as"), kinds or (("no event", NONE, NONE, ""),)),
            Grid(("", "number", "share"), lines),
            Grid(("", "cases", "mean", "p10", "median", "p90", "p99"), spread),
        ),
    )


def _targets(d: Description) -> Section:
    validation = next(span for span in d.spans if span.name == "validation")
    lines = (
        ("conversions", number(d.conversions, 0), ""),
        ("label rate", "", percent(d.label_rate)),
        ("user-periods", number(d.user_periods, 0), ""),
        ("targets", number(d.targets, 0), ""),
        _line("new to the user", d.new_targets, d.targets),
        _line("new to the user, validation", validation.new_targets, validation.targets),
    )
    return Section(
        "targets",
        "Conversions and targets",
        (
            "A target is an advertiser a user converts with in a period; it is new where the user has no purchase of "
            "any kind with the advertiser before the period. The label rate is conversions over impressions and "
            "conversions, weighted by sample_weight.",
        ),
        (Grid(("", "number", "share"), lines),),
    )


def _spread(d: Description) -> Section:
    head = d.concentration
    lines = (
        ("user-advertiser pairs with a conversion", number(d.pairs, 0)),
        ("density: pairs over users × advertisers", percent(d.density)),
        ("conversions held by the top 1 % of advertisers", percent(head.top_1_percent if head else None)),
        ("conversions held by the top 10 %", percent(head.top_10_percent if head else None)),
        ("Gini of conversions over advertisers", number(head.gini) if head else NONE),
        ("advertisers with exactly one conversion", count(d.advertisers.with_one_conversion)),
        (
            "advertisers without a conversion",
            _share(d.advertisers.total - d.advertisers.with_conversion, d.advertisers.total),
        ),
    )
    note = "Shares are of all advertisers of the table, those without a conversion included."
    return Section("spread", "Sparsity, head and tail", (note,), (Grid(("", ""), lines),))


def _texts(texts: dict[str, Texts]) -> Section:
    lines = tuple(
        (
            table,
            number(one.total, 0),
            _share(one.filled, one.total),
            NONE if one.mean_words is None else number(one.mean_words, 1),
            _share(one.shared, one.filled),
        )
        for table, one in texts.items()
    )
    columns = ("", "rows", "with a text", "words, mean", "text shared with another")
    note = "Mean and share are of the rows with a text."
    return Section("texts", "Texts", (note,), (Grid(columns, lines),))


# Text of figures


def _line(name: str, part: int | None, whole: int | None) -> tuple[str, str, str]:
    return f"· {name}", count(part), NONE if part is None else _share(part, whole)


def _share(part: int | None, whole: int | None) -> str:
    return percent(part / whole) if whole and part is not None else NONE


def _distribution(name: str, values: Distribution | None) -> tuple[str, ...]:
    if values is None:
        return (name, *(NONE,) * 6)
    levels = (values.p10, values.median, values.p90, values.p99)
    digits = 1 if values.mean < 1000 else 0
    return (name, number(values.n, 0), number(values.mean, digits), *(number(level, 0) for level in levels))


def _reach(periods: Sequence[Period]) -> str:
    return f"{number(periods[0].period, 0)} to {number(periods[-1].period, 0)}" if periods else NONE


def _sparks(periods: Sequence[Period]) -> Text:
    """The share of new targets over time, in one line."""
    drawn = _since_conversions(periods)
    size = -(-len(drawn) // _SPARK_WIDTH) or 1
    bars = ""
    for start in range(0, len(drawn), size):
        part = drawn[start : start + size]
        targets, new = sum(period.targets for period in part), sum(period.new_targets for period in part)
        bars += _SPARKS[min(new * len(_SPARKS) // targets, len(_SPARKS) - 1)] if targets else " "
    return Text.assemble(("new to the user by period  ", "dim"), bars or NONE)


# Plots


def _plots(d: Description) -> dict[str, list[Plot]]:
    """The plots by section."""
    return {
        "time": [
            Plot(
                conversions_by_period(d),
                "Conversions by period",
                "Conversions by period and the spans of the split."
                + ("" if d.evaluate == "test" else " The test span is closed: nothing of it was counted."),
            )
        ],
        "targets": [
            Plot(
                share_of_new(d),
                "Share of new targets by period",
                "Targets whose user had no purchase with the advertiser before the period, as a share of all. It falls "
                "from one in any log: at its beginning every advertiser is new.",
            ),
            Plot(label_rate(d), "Label rate by period", "Conversions over impressions and conversions, weighted."),
        ],
        "spread": [
            Plot(
                cumulative_share(d),
                "Cumulative share of conversions",
                "Conversions held by the advertisers with the most of them; dashed: all advertisers have the same.",
            )
        ],
    }


def conversions_by_period(d: Description) -> Markup | None:
    """Bars of conversions over time, the spans marked; None without a conversion."""
    drawn = _since_conversions(d.periods)
    if not drawn:
        return None
    span, ticks = round_axis((0, max(period.conversions for period in drawn)), count=3)
    panel = _time_panel(d, "conversions", span, ticks, height=150, names=True)
    if len(drawn) <= MAX_BARS:
        width = panel.px(1) - panel.px(0)
        for period in drawn:
            panel.bar(panel.px(period.period) - 0.42 * width, 0.84 * width, period.conversions)
    else:
        panel.band([(period.period, 0, period.conversions) for period in drawn], "s-lm")
        panel.path([(period.period, period.conversions) for period in drawn], "s-lm")
    return _figure(panel, "conversions by period")


def share_of_new(d: Description) -> Markup | None:
    """Share of the targets that are new to their user, over time; None without a target."""
    points = [(period.period, period.new_targets / period.targets if period.targets else None) for period in d.periods]
    return _line_plot(d, points, "share of targets new to the user", top=1.0)


def label_rate(d: Description) -> Markup | None:
    """The label rate over time; None without an impression."""
    return _line_plot(d, [(period.period, period.label_rate) for period in d.periods], "label rate")


def cumulative_share(d: Description) -> Markup | None:
    """Share of conversions by share of advertisers, most conversions first; None without a conversion."""
    if d.concentration is None:
        return None
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    panel = Panel(_LEFT, 30, 360, 300, (0, 1), (0, 1))
    panel.axes("share of advertisers", "share of conversions", ticks, ticks)
    panel.line(panel.px(0), panel.py(0), panel.px(1), panel.py(1), "zero")
    panel.path(d.concentration.curve, "s-lm")
    for share, held in ((0.01, d.concentration.top_1_percent), (0.1, d.concentration.top_10_percent)):
        panel.dot(share, held, "s-lm", radius=4)
        panel.text(
            panel.px(share) + 12, panel.py(held) + 14, f"top {100 * share:.0f} %: {percent(held)}", "series s-lm"
        )
    return svg(
        _LEFT + 380, 376, "cumulative share of conversions by share of advertisers", panel.parts, "figure square"
    )


def _line_plot(
    d: Description, points: Sequence[tuple[int, float | None]], name: str, *, top: float | None = None
) -> Markup | None:
    """A line over time that breaks where there is no value."""
    runs: list[list[tuple[float, float]]] = [[]]
    for period, value in points:
        if value is not None:
            runs[-1].append((period, value))
        elif runs[-1]:
            runs.append([])
    runs = [run for run in runs if run]
    if not runs:
        return None
    span, ticks = round_axis((0, top or max(value for run in runs for _, value in run)), count=3)
    panel = _time_panel(d, name, span, ticks, height=110, names=False)
    for run in runs:
        if len(run) > 1:
            panel.path(run, "s-lm")
        else:
            panel.dot(*run[0], "s-lm", radius=2)
    return _figure(panel, f"{name} by period")


def _time_panel(
    d: Description, name: str, span: tuple[float, float], ticks: Sequence[float], *, height: float, names: bool
) -> Panel:
    """Axes over all periods with every other span shaded, and the spans' names above."""
    first = min([1, *(period.period for period in _since_conversions(d.periods))])
    last = max([first, *(period.period for period in d.periods), *(span.last for span in d.spans)])
    panel = Panel(_LEFT, 30, _PLOT_WIDTH, height, (first - 0.5, last + 0.5), span)
    labels = _span_labels(d, panel, names=names)
    panel.top += 15 * max(label.row for label in labels)
    for place, one in enumerate(d.spans):
        closed = one.targets is None
        if place % 2 or closed:
            left = panel.px(one.first - 0.5)
            width = panel.px(one.last + 0.5) - left
            panel.bar(left, width, span[1], "region closed" if closed else "region")
    x_ticks = [tick for tick in round_axis((first, last), count=8)[1] if first <= tick <= last and tick == int(tick)]
    panel.axes(f"period of {d.period_days} days", "", x_ticks, ticks)
    panel.text(panel.left, 14, name, "name")
    for label in labels:
        top = panel.top - 15 * label.row
        panel.line(label.pole, top, label.pole, panel.top + height, "border")
        if label.row:
            panel.text(label.pole + 4 * label.side, top + 10, label.text, "tick" if label.side > 0 else "tick end")
    return panel


@dataclass(frozen=True)
class _SpanLabel:
    """A span's name as a flag at one end of the span: its pole, 1 right of it and -1 left of it, the row from below."""

    pole: float
    side: int
    text: str
    row: int


def _span_labels(d: Description, panel: Panel, *, names: bool) -> list[_SpanLabel]:
    """Flags of all spans, so high that none covers another or another's pole; row 0 is a pole without a flag."""
    texts = [one.name.replace("_", " ") + (" (closed)" if one.targets is None else "") for one in d.spans]
    starts, ends = [panel.px(one.first - 0.5) for one in d.spans], [panel.px(one.last + 0.5) for one in d.spans]
    widths = [_LETTER * len(text) + 8 for text in texts]
    fits = all(start + width <= _WIDTH for start, width in zip(starts, widths, strict=True))
    side, poles = (1, starts) if fits else (-1, ends)
    labels: list[_SpanLabel] = []
    for pole, text, width in list(zip(poles, texts, widths, strict=True))[::-side]:
        below = [label.row for label in labels if 0 <= (label.pole - pole) * side < width]
        labels.append(_SpanLabel(pole, side, text, 1 + max(below, default=0) if names else 0))
    return labels


def _figure(panel: Panel, label: str) -> Markup:
    return svg(_WIDTH, panel.top + panel.height + 46, label, panel.parts)


def _since_conversions(periods: Sequence[Period]) -> Sequence[Period]:
    """The periods from the first with a conversion on."""
    first = next((place for place, period in enumerate(periods) if period.conversions), len(periods))
    return periods[first:]
