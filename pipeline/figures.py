"""The plots of the report, as SVG text that stands inside an HTML page.

Written by hand rather than drawn by a plotting library: the page's style sheet then colours every mark by its
class, so that one figure reads in light, in dark and on paper, its text is in the page's own font, and no
figure carries a font, a script or a reference of its own. Every text that comes from data is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

from markupsafe import Markup, escape

from data.statistics import Row
from pipeline.verdict import AGAINST, CONTROLS, DIFFERENCE, MINUS, Outcome, is_known, judge, number


class SweepPoint(TypedDict):
    """Retrieval under one quota of the forecast channel, at the same total budget."""

    arm: str
    quota: float  # share of the budget that the forecast channel may fill, 0 to 1
    recall: float
    ci_low: NotRequired[float | None]
    ci_high: NotRequired[float | None]
    gini: NotRequired[float | None]  # concentration of the candidates on few advertisers


class LearningPoint(TypedDict):
    """NLL of the LM and of the anchor on the same prompts."""

    step: int  # prompts seen in training
    lm: float
    anchor: float


class ReliabilityCurve(TypedDict):
    """Mean forecast probability and observed share of each equal-mass bin; the lists are of one length."""

    predicted: Sequence[float]
    observed: Sequence[float]


@dataclass
class Panel:
    """One pair of axes: data coordinates on a rectangle of the page.

    Attributes:
        left, top, width, height: the rectangle in pixels.
        x, y: data range of each axis.
        log: both axes are logarithmic.
        parts: the SVG elements drawn so far.
    """

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool = False
    parts: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        """Horizontal pixel of a data value."""
        return self.left + self.width * self._share(value, self.x)

    def py(self, value: float) -> float:
        """Vertical pixel of a data value."""
        return self.top + self.height * (1 - self._share(value, self.y))

    def _share(self, value: float, span: tuple[float, float]) -> float:
        low, high = span
        if self.log:
            value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
        return (value - low) / (high - low)

    def axes(self, x_label: str, y_label: str, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> None:
        """Grid lines, tick labels and the two names."""
        bottom = self.top + self.height
        for tick, text in zip(y_ticks, _tick_texts(y_ticks), strict=True):
            y = self.py(tick)
            self.line(self.left, y, self.left + self.width, y, "grid")
            self.text(self.left - 8, y + 4, text, "tick end")
        for tick, text in zip(x_ticks, _tick_texts(x_ticks), strict=True):
            self.line(self.px(tick), bottom, self.px(tick), bottom + 4, "axis")
            self.text(self.px(tick), bottom + 18, text, "tick mid")
        self.line(self.left, bottom, self.left + self.width, bottom, "axis")
        if x_label:
            self.text(self.left + self.width / 2, bottom + 36, x_label, "name mid")
        self.text(self.left, self.top - 10, y_label, "name")

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """A straight line in pixels."""
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>')

    def text(self, x: float, y: float, text: str, style: str) -> None:
        """A text at a pixel; it is escaped."""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{style}">{escape(text)}</text>')

    def path(self, points: Iterable[tuple[float, float]], style: str) -> None:
        """A line through data points."""
        drawn = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{drawn}" class="line {style}"/>')

    def band(self, points: Sequence[tuple[float, float, float]], style: str) -> None:
        """The area between (x, low, high) points."""
        outline = [(x, high) for x, _, high in points] + [(x, low) for x, low, _ in reversed(points)]
        drawn = " ".join(f"{self.px(x):.1f},{self.py(y):.1f}" for x, y in outline)
        self.parts.append(f'<polygon points="{drawn}" class="band {style}"/>')

    def bar(self, x: float, width: float, value: float, style: str = "bar") -> None:
        """A bar from the horizontal axis to a data value; its place and width are in pixels."""
        y = self.py(value)
        height = self.top + self.height - y
        self.parts.append(f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:.1f}" class="{style}"/>')

    def dot(self, x: float, y: float, style: str, radius: float = 3.2) -> None:
        """A mark at a data point."""
        self.parts.append(f'<circle cx="{self.px(x):.1f}" cy="{self.py(y):.1f}" r="{radius}" class="dot {style}"/>')


def svg(width: float, height: float, label: str, parts: Iterable[str], style: str = "figure") -> Markup:
    """A whole figure with its text alternative.

    Args:
        width: of the drawing, in its own units; the page scales it.
        height: of the drawing.
        label: what the figure shows, for readers who do not see it.
        parts: SVG elements, already escaped.
        style: class of the element.
    """
    name = escape(label)
    opening = f'<svg class="{style}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{name}">'
    return Markup(opening + "".join(parts) + "</svg>")


FOREST_WIDTH = 300.0
_FOREST_HEIGHT = 26.0
_FOREST_RANGE = 4
"""A difference more than this many times as large as those of the verdict is cut off."""


def forest_scale(rows: Sequence[Row]) -> float:
    """The value at the ends of a forest plot's axis, the same on both sides of zero.

    The axis is made for the differences of the verdict. One far beyond them, from popularity say, would squeeze
    the rest into the zero line; it is cut off, with an arrow.

    Args:
        rows: the differences that share the axis.
    """
    reach = {row: max((abs(end) for end in _ends(row)), default=0.0) for row in rows}
    close = {f"lm{DIFFERENCE}{against}" for against in (*AGAINST, *CONTROLS)}
    near = max((reach[row] for row in rows if row.arm in close), default=0.0)
    shown = [value for value in reach.values() if not near or value <= _FOREST_RANGE * near]
    return _nice_ceiling(max(shown, default=0.0))


def forest_cell(row: Row, scale: float) -> Markup:
    """A difference and its interval about the zero line: one row of a forest plot.

    Args:
        row: the difference.
        scale: of `forest_scale` over the rows above and below.
    """
    middle, center = FOREST_WIDTH / 2, _FOREST_HEIGHT / 2
    panel = Panel(8, 0, FOREST_WIDTH - 16, _FOREST_HEIGHT, (-scale, scale), (0, 1))
    panel.line(middle, 0, middle, _FOREST_HEIGHT, "zero")
    style = judge(row).name.lower()
    low, high = min(_ends(row), default=0.0), max(_ends(row), default=0.0)
    inside_low, inside_high = max(-scale, min(scale, low)), max(-scale, min(scale, high))
    if inside_low < inside_high:
        panel.line(panel.px(inside_low), center, panel.px(inside_high), center, f"whisker {style}")
    for beyond, side in ((low < -scale, -1), (high > scale, 1)):
        if beyond:
            tip = middle + side * (FOREST_WIDTH / 2 - 1)
            corners = (
                f"{tip:.1f},{center:.1f} {tip - side * 8:.1f},{center - 5:.1f} {tip - side * 8:.1f},{center + 5:.1f}"
            )
            panel.parts.append(f'<polygon points="{corners}" class="arrow {style}"/>')
    if is_known(row.value) and abs(row.value) <= scale:
        panel.dot(row.value, 0.5, f"point {style}", radius=4.2)
    return svg(FOREST_WIDTH, _FOREST_HEIGHT, f"difference {number(row.value, 4, signed=True)}", panel.parts, "forest")


def forest_axis(scale: float, better: Literal["higher", "lower"] | None) -> Markup:
    """The axis above a group of forest rows: its ends, zero, and on which side better lies."""
    panel = Panel(8, 0, FOREST_WIDTH - 16, 20, (-scale, scale), (0, 1))
    for value, style in ((-scale, ""), (0.0, "mid"), (scale, "end")):
        panel.text(panel.px(value), 14, difference_tick(value), f"tick {style}")
    if better == "higher":
        panel.text(panel.px(0) + 14, 14, "better →", "tick")
    elif better == "lower":
        panel.text(panel.px(0) - 14, 14, "← better", "tick end")
    return svg(FOREST_WIDTH, 20, "axis of the differences", panel.parts, "forest")


def difference_tick(value: float) -> str:
    """A tick of an axis of differences, with its sign."""
    return "0" if value == 0 else f"{'+' if value > 0 else MINUS}{abs(value):g}"


def _ends(row: Row) -> list[float]:
    return [end for end in (row.value, row.ci_low, row.ci_high) if end is not None and is_known(end)]


def quota_sweep(points: Sequence[SweepPoint]) -> Markup | None:
    """Recall, and below it the concentration on advertisers, by the channel's quota; None without a point."""
    known = [point for point in points if is_known(point["recall"]) and is_known(point["quota"])]
    if not known:
        return None
    arms = list(dict.fromkeys(point["arm"] for point in known))
    ends = [
        end
        for point in known
        for end in (point["recall"], point.get("ci_low"), point.get("ci_high"))
        if end is not None and is_known(end)
    ]
    with_gini = [point for point in known if is_known(point.get("gini"))]
    quotas = (min(point["quota"] for point in known), max(point["quota"] for point in known))
    x_span, x_ticks = round_axis(quotas)
    y_span, y_ticks = round_axis((min(ends), max(ends)))
    recall = Panel(56, 30, 500, 190, x_span, y_span)
    recall.axes("" if with_gini else "quota of the forecast channel", "recall at the same budget", x_ticks, y_ticks)
    panels = [recall]
    if with_gini:
        ginis = [point.get("gini") or 0.0 for point in with_gini]
        g_span, g_ticks = round_axis((min(ginis), max(ginis)), count=3)
        gini = Panel(56, 276, 500, 80, x_span, g_span)
        gini.axes("quota of the forecast channel", "Gini of the candidates' advertisers", x_ticks, g_ticks)
        panels.append(gini)
    ends_y: list[list[tuple[float, str, str]]] = [[] for _ in panels]
    for arm in arms:
        style = arm_class(arm)
        own = sorted((point for point in known if point["arm"] == arm), key=lambda point: point["quota"])
        banded = [
            (point["quota"], low, high)
            for point in own
            if (low := point.get("ci_low")) is not None
            and (high := point.get("ci_high")) is not None
            and is_known(low)
            and is_known(high)
        ]
        if len(banded) > 1:
            recall.band(banded, style)
        series = [[(point["quota"], point["recall"]) for point in own]]
        if with_gini:
            series.append([(p["quota"], g) for p in own if (g := p.get("gini")) is not None and is_known(g)])
        for panel, drawn, labels in zip(panels, series, ends_y, strict=True):
            if drawn:
                panel.path(drawn, style)
                for x, y in drawn:
                    panel.dot(x, y, style)
                labels.append((panel.py(drawn[-1][1]), _arm_name(arm), style))
    for panel, labels in zip(panels, ends_y, strict=True):
        _end_labels(panel, labels)
    height = 404 if with_gini else 268
    return svg(680, height, "recall against the quota of the forecast channel", _all_parts(panels))


def learning_curve(points: Sequence[LearningPoint]) -> Markup | None:
    """NLL of LM and anchor on the same prompts, and below it their difference; None without a point."""
    known = sorted(
        (point for point in points if is_known(point["lm"]) and is_known(point["anchor"])),
        key=lambda point: point["step"],
    )
    if not known:
        return None
    levels = [point[arm] for point in known for arm in ("lm", "anchor")]
    differences = [point["lm"] - point["anchor"] for point in known]
    x_span, x_ticks = round_axis((known[0]["step"], known[-1]["step"]))
    y_span, y_ticks = round_axis((min(levels), max(levels)))
    d_span, d_ticks = round_axis((min(0.0, *differences), max(0.0, *differences)), count=3)
    level = Panel(56, 30, 500, 150, x_span, y_span)
    level.axes("", "NLL, nat", x_ticks, y_ticks)
    labels = []
    for arm in ("anchor", "lm"):
        drawn = [(float(point["step"]), point[arm]) for point in known]
        level.path(drawn, arm_class(arm))
        level.dot(*drawn[-1], arm_class(arm))
        labels.append((level.py(drawn[-1][1]), _arm_name(arm), arm_class(arm)))
    _end_labels(level, labels)
    gap = Panel(56, 236, 500, 90, x_span, d_span)
    gap.axes("prompts seen in training", f"LM {MINUS} anchor, nat (below zero: the LM is better)", x_ticks, d_ticks)
    gap.line(gap.left, gap.py(0), gap.left + gap.width, gap.py(0), "zero")
    drawn = [(float(point["step"]), value) for point, value in zip(known, differences, strict=True)]
    gap.path(drawn, arm_class("lm"))
    for x, y in drawn:
        gap.dot(x, y, arm_class("lm"))
    return svg(680, 374, "NLL of LM and anchor over training", _all_parts([level, gap]))


def ageing(
    series: Mapping[str, Sequence[tuple[float, float, float, float]]], style: Mapping[str, str]
) -> Markup | None:
    """Differences from a common base over time, each with its interval; None without a point.

    Args:
        series: of each arm.
        style: class of each arm's marks.
    """
    points = [point for own in series.values() for point in own]
    if not points:
        return None
    x_span, x_ticks = round_axis((min(point[0] for point in points), max(point[0] for point in points)))
    y_span, y_ticks = round_axis((min(0.0, *(p[2] for p in points)), max(0.0, *(p[3] for p in points))))
    panel = Panel(56, 30, 470, 240, x_span, y_span)
    panel.axes("period", f"NLL {MINUS} that of the frozen anchor, nat", x_ticks, y_ticks)
    panel.line(panel.left, panel.py(0), panel.left + panel.width, panel.py(0), "zero")
    labels = []
    for arm, own in series.items():
        if len(own) > 1:
            panel.band([(x, low, high) for x, _, low, high in own], style[arm])
        panel.path([(x, value) for x, value, _, _ in own], style[arm])
        for x, value, _, _ in own:
            panel.dot(x, value, style[arm])
        if own:
            labels.append((panel.py(own[-1][1]), arm, style[arm]))
    _end_labels(panel, labels)
    return svg(700, 318, "NLL of each arm less the frozen anchor's, over time", panel.parts)


def reliability_diagram(arms: Mapping[str, ReliabilityCurve]) -> Markup | None:
    """Observed share against forecast probability, logarithmic; the diagonal is perfect. None without a point."""
    points = {arm: list(zip(curve["predicted"], curve["observed"], strict=True)) for arm, curve in arms.items()}
    values = [value for pairs in points.values() for pair in pairs for value in pair if is_known(value) and value > 0]
    if not values:
        return None
    low = 10.0 ** math.floor(math.log10(min(values)))
    high = 10.0 ** math.ceil(math.log10(max(values)))
    low, high = min(low, high / 10), max(high, low * 10)
    decades = range(round(math.log10(low)), round(math.log10(high)) + 1)
    ticks = [10.0**decade for decade in decades]
    panel = Panel(64, 30, 340, 340, (low, high), (low, high), log=True)
    panel.axes("forecast probability (mean of the bin)", "observed share", ticks, ticks)
    panel.line(panel.px(low), panel.py(low), panel.px(high), panel.py(high), "zero")
    labels = []
    for arm, pairs in points.items():
        style = arm_class(arm)
        drawn = sorted((x, y) for x, y in pairs if is_known(x) and is_known(y) and x > 0)
        panel.path([(x, y) for x, y in drawn if y > 0], style)
        for x, y in drawn:
            panel.dot(x, y, style if y > 0 else f"{style} hollow")
        if drawn:
            labels.append((panel.py(drawn[-1][1]), _arm_name(arm), style))
    _end_labels(panel, labels)
    return svg(500, 424, "observed share against forecast probability", panel.parts, "figure square")


def code_usage(levels: Sequence[Sequence[int]]) -> Markup | None:
    """How often each code of each level is used, most used first, with the even use as a line; None without a level."""
    if not levels:
        return None
    gap, left = 34.0, 40.0
    width = (680 - left - gap * (len(levels) - 1)) / len(levels)
    panels = []
    for index, counts in enumerate(levels):
        ordered = sorted(counts, reverse=True)
        total, size = sum(ordered), len(ordered)
        span, ticks = round_axis((0.0, max(ordered, default=1) or 1), count=3)
        span = (0.0, span[1])
        panel = Panel(left + index * (width + gap), 46, width, 120, (0, max(size, 1)), span)
        panel.axes("", "", [], [tick for tick in ticks if tick >= 0])
        for place, count in enumerate(ordered):
            if count:
                panel.bar(panel.px(place), max(panel.width / size - 0.8, 0.4), count)
        panel.line(
            panel.left,
            panel.py(total / max(size, 1)),
            panel.left + width,
            panel.py(total / max(size, 1)),
            "zero",
        )
        shares = [count / total for count in ordered if count] if total else []
        perplexity = math.exp(-sum(share * math.log(share) for share in shares)) if shares else 0.0
        panel.text(panel.left, 16, f"level {index + 1}", "name strong")
        dead = sum(count == 0 for count in ordered)
        panel.text(panel.left, 32, f"{size} codes, {dead} dead, perplexity {perplexity:.1f}", "tick")
        panel.text(panel.left + width / 2, 184, "codes, most used first", "tick mid")
        panels.append(panel)
    return svg(680, 192, "number of advertisers under each code, by level", _all_parts(panels))


def neighbours_by_depth(depths: Sequence[tuple[float, float]]) -> Markup | None:
    """How many of the nearest share the prefix, by its length, beside as many by chance; None without a depth.

    Args:
        depths: for each prefix length the share of the IDs, and of IDs dealt at random.
    """
    if not depths:
        return None
    panel = Panel(40, 46, 420, 170, (0, len(depths)), (0, 1))
    half = min(panel.width / len(depths) / 5, 24)
    panel.axes("", "", [], [0, 0.2, 0.4, 0.6, 0.8, 1])
    panel.text(panel.left, 16, "share of the nearest with the same prefix", "name")
    panel.text(panel.left, 34, "IDs", "series s-lm")
    panel.text(panel.left + 32, 34, "dealt at random", "series s-none")
    for place, (ids, chance) in enumerate(depths):
        middle = panel.px(place + 0.5)
        for value, side, style in ((ids, -1, "bar"), (chance, 1, "bar random")):
            center = middle + side * (half + 2)
            panel.bar(center - half, 2 * half, value, style)
            panel.text(center, panel.py(value) - 5, number(value), "tick mid")
        panel.text(
            middle, panel.top + panel.height + 18, f"levels 1 to {place + 1}" if place else "level 1", "tick mid"
        )
    label = "share of the nearest neighbours with the same prefix, by prefix length"
    return svg(480, 244, label, panel.parts, "figure square")


def group_sizes(sizes: Mapping[int, int]) -> Markup | None:
    """How many have an ID that so many share, before collisions are resolved; None where nobody has one.

    Args:
        sizes: by size of a group with one ID, the number of such groups.
    """
    bins: dict[int, int] = {}
    for size, n_groups in sizes.items():
        power = (size - 1).bit_length()  # 1, 2, 3-4, 5-8, ...
        bins[power] = bins.get(power, 0) + size * n_groups
    if not bins:
        return None
    total, last = sum(bins.values()), max(bins)
    panel = Panel(40, 30, 616, 150, (0, last + 1), (0, 100))
    width = min(0.8 * panel.width / (last + 1), 64.0)
    panel.axes("", "per cent of all", [], [0, 20, 40, 60, 80, 100])
    for power in range(last + 1):
        percent, middle = 100 * bins.get(power, 0) / total, panel.px(power + 0.5)
        low, high = 2 ** (power - 1) + 1 if power > 1 else power + 1, 2**power
        if percent:
            panel.bar(middle - width / 2, width, percent, "bar" if power else "bar random")
            panel.text(middle, panel.py(percent) - 5, number(percent, 1), "tick mid")
        text = _short(low) if low == high else f"{_short(low)}–{_short(high)}"
        panel.text(middle, panel.top + panel.height + 18, text, "tick mid")
    bottom = panel.top + panel.height
    panel.text(panel.left + panel.width / 2, bottom + 38, "members of the group with the same ID", "name mid")
    return svg(680, 228, "per cent of all by the size of their group before resolving", panel.parts)


def _short(count: int) -> str:
    """A whole number in few letters."""
    for unit, sign in ((1_000_000, "M"), (1000, "k")):
        if count >= 10 * unit or (count >= unit and count % unit == 0):
            return f"{count // unit}{sign}"
    return str(count)


def dumbbell(lm: float | None, anchor: float | None, largest: float) -> Markup:
    """Two probabilities of one advertiser on a common axis that starts at zero."""
    panel = Panel(6, 0, 168, 20, (0, largest or 1.0), (0, 1))
    panel.line(6, 10, 174, 10, "grid")
    if is_known(lm) and is_known(anchor):
        panel.line(panel.px(lm or 0.0), 10, panel.px(anchor or 0.0), 10, "link")
    for value, style in ((anchor, "anchor"), (lm, "lm")):
        if is_known(value):
            panel.dot(value or 0.0, 0.5, arm_class(style), radius=4.2)
    label = f"LM {number(lm, 4)}, anchor {number(anchor, 4)}"
    return svg(180, 20, label, panel.parts, "dumbbell")


def arm_class(arm: str) -> str:
    """The style class that gives an arm its colour in every figure."""
    return {"lm": "s-lm", "anchor": "s-anchor", "none": "s-none"}.get(arm, "s-other")


def outcome_mark(outcome: Outcome) -> str:
    """A sign beside the word, so that no outcome is told by colour alone."""
    return {Outcome.GAIN: "▲", Outcome.LOSS: "▼", Outcome.NOT_SHOWN: "○"}.get(outcome, "·")


def _arm_name(arm: str) -> str:
    return "LM" if arm == "lm" else arm


def _end_labels(panel: Panel, labels: list[tuple[float, str, str]]) -> None:
    """Names at the ends of the lines, moved apart where they would overlap."""
    previous = -math.inf
    for y, name, style in sorted(labels):
        previous = max(y, previous + 15)
        panel.text(panel.left + panel.width + 10, previous + 4, name, f"series {style}")


def _all_parts(panels: Iterable[Panel]) -> list[str]:
    return [part for panel in panels for part in panel.parts]


def _nice_ceiling(value: float) -> float:
    if value <= 0:
        return 1.0
    unit = 10.0 ** math.floor(math.log10(value))
    return next(step * unit for step in (1.0, 1.5, 2.0, 3.0, 5.0, 10.0) if step * unit >= value * (1 - 1e-9))


def round_axis(span: tuple[float, float], count: int = 4) -> tuple[tuple[float, float], list[float]]:
    """A range that ends on round numbers, and these numbers.

    Args:
        span: smallest and largest value.
        count: about how many steps to make.
    """
    low, high = span
    if high - low < 1e-12 * max(1.0, abs(high)):
        pad = abs(high) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(size * unit for size in (1.0, 2.0, 2.5, 5.0, 10.0) if size * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [index * step for index in range(first, last + 1)]
    return (ticks[0], ticks[-1]), ticks


def _tick_texts(ticks: Sequence[float]) -> list[str]:
    """Tick labels with as many decimals as tell them apart, the same for all."""
    if ticks and min(ticks) > 0 and max(ticks) / min(ticks) >= 10 and max(ticks) <= 1:
        return [f"{tick:g}" for tick in ticks]  # decades
    for digits in range(7):
        texts = [number(tick, digits) for tick in ticks]
        if all(abs(round(tick, digits) - tick) < 1e-9 for tick in ticks):
            break
    return texts if ticks else []
