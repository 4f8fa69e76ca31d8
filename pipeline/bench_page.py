"""The retrieval benchmark as a page with plots, and as tables on the terminal: the same figures from the same grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup
from rich.console import Group

from data.statistics import Row
from pipeline.bench import swapped
from pipeline.config import AdsidConfig
from pipeline.figures import Panel, SweepPoint, quota_sweep, round_axis, svg
from pipeline.grids import NONE, Grid, Plot, Section, count, sections_to_console
from pipeline.pages import template
from pipeline.report import DATASET_NOTES
from pipeline.verdict import DIFFERENCE, arm_label, figure, is_known, judge, number
from retrieval.benchmark import ADVERTISERS, ALL, ALONE, BLEND, PRODUCT, RIVALS, WITHOUT, RetrievalBenchmark
from retrieval.evaluate import SECTION, TIERS
from retrieval.factors import RANKED, TOP

Key = tuple[str, str, str, str, int | None]


def render(config: AdsidConfig, found: RetrievalBenchmark) -> str:
    """The text of the page."""
    return template("sections.html.j2").render(
        title="adsid bench: retrieval",
        heading="Retrieval, part by part",
        json="adsid bench retrieval --json",
        scope=scope(config, found),
        caveats=DATASET_NOTES.get(config.data.source, ())[:1],
        sections=sections(found),
        plots=_plots(found),
    )


def to_console(config: AdsidConfig, found: RetrievalBenchmark) -> Group:
    """The figures for the terminal."""
    return sections_to_console(scope(config, found), sections(found))


def scope(config: AdsidConfig, found: RetrievalBenchmark) -> str:
    """What the figures are of."""
    facts = found.facts
    first, last = facts["periods"]
    return (
        f"{count(facts['requests'])} requests with a conversion of {count(facts['users'])} users, periods "
        f"{first}-{last} ({facts['evaluate']}), {number(facts.get('active_ads', 0), 0)} active ads a request. "
        f"{swapped(config.retrieval)}. Shares, quotas and blends were chosen on periods "
        f"{facts['tuned_on'][0]}-{facts['tuned_on'][1]}. 95 % intervals by bootstrap over users."
    )


def sections(found: RetrievalBenchmark) -> tuple[Section, ...]:
    """All figures, as text."""
    rows = _Rows(found.rows)
    return (
        _arms(found, rows),
        _segments(found, rows),
        _alone(found, rows),
        _without(found, rows),
        _blends(found, rows),
        _factors(found, rows),
        _plans(found),
        _latency(found),
    )


class _Rows:
    """Rows by section, measure, arm, segment and k."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows: dict[Key, Row] = {(r.section, r.metric, r.arm, r.segment, r.k): r for r in rows}
        self.rows = rows

    def find(self, section: str, metric: str, arm: str, segment: str = "all", k: int | None = None) -> Row | None:
        return self._rows.get((section, metric, arm, segment, k))

    def text(self, section: str, metric: str, arm: str, segment: str = "all", k: int | None = None) -> str:
        row = self.find(section, metric, arm, segment, k)
        return NONE if row is None or not is_known(row.value) else number(row.value)

    def interval(self, section: str, metric: str, arm: str, segment: str = "all", k: int | None = None) -> str:
        row = self.find(section, metric, arm, segment, k)
        return NONE if row is None or not is_known(row.value) else figure(row, 3)

    def arms(self, section: str) -> list[str]:
        return list(dict.fromkeys(row.arm for row in self.rows if row.section == section))


def _arms(found: RetrievalBenchmark, rows: _Rows) -> Section:
    arms = rows.arms(SECTION)
    ks = sorted({row.k for row in found.rows if row.section == SECTION and row.metric == "recall" and row.k})
    top = found.facts["k"]
    lines = [
        *((f"recall@{k}", *(rows.interval(SECTION, "recall", arm, k=k) for arm in arms)) for k in ks),
        *(
            (f"NDCG@{k}", *(rows.interval(SECTION, "ndcg", arm, k=k) for arm in arms))
            for k in sorted({*ks[:1], *ks[-1:]})
        ),
        ("MRR", *(rows.interval(SECTION, "mrr", arm, k=found.facts["budget"]) for arm in arms)),
        (f"value-weighted recall@{top}", *(rows.interval(SECTION, "value_recall", arm, k=top) for arm in arms)),
        (f"recall@{top} of new advertisers", *(rows.interval(SECTION, "recall", arm, "new", top) for arm in arms)),
        ("advertiser coverage", *(rows.text(SECTION, "coverage", arm) for arm in arms)),
        ("Gini of advertisers", *(rows.text(SECTION, "gini", arm) for arm in arms)),
    ]
    notes = (
        f"Every arm gets {found.facts['budget']} candidates. New: the user never bought from the advertiser before. "
        "Coverage and Gini are over the advertisers that ran an ad in a visited market.",
    )
    return Section("arms", "What the forecast adds", notes, (Grid(("", *map(arm_label, arms)), tuple(lines)),))


def _segments(found: RetrievalBenchmark, rows: _Rows) -> Section:
    arms, top = rows.arms(SECTION), found.facts["k"]
    lines = tuple((tier, *(rows.interval(SECTION, "recall", arm, tier, top) for arm in arms)) for tier in TIERS)
    channels = sorted({row.segment for row in found.rows if row.metric == "hits_found_alone"})
    plain = [arm for arm in arms if DIFFERENCE not in arm]
    alone = tuple((name, *(rows.text(SECTION, "hits_found_alone", arm, name) for arm in plain)) for name in channels)
    notes = (
        "Users by purchases before the evaluated span; below, the share of an arm's hits that one channel alone found.",
    )
    grids = (
        Grid((f"recall@{top}", *map(arm_label, arms)), lines),
        Grid(("found by this channel alone", *map(arm_label, plain)), alone or ((NONE,) * (len(plain) + 1),)),
    )
    return Section("segments", "By user activity, and who found the hits", notes, grids)


def _alone(found: RetrievalBenchmark, rows: _Rows) -> Section:
    notes = ["Each channel with the whole budget; popularity fills what it leaves free. The last column is the gap."]
    names = [arm for arm in rows.arms(ALONE) if DIFFERENCE not in arm]
    rival = rows.find(ALONE, "recall", DIFFERENCE.join(RIVALS), k=found.facts["k"])
    if rival is not None:
        notes.append(
            f"One rule for both, {RIVALS[0]} by the head arm's forecast and {RIVALS[1]} by the advertiser tower: "
            f"{arm_label(rival.arm)} {figure(rival, 3)} in recall@{rival.k}, {judge(rival).value}."
        )
    grid = _study(found, rows, ALONE, names, lambda name: f"{ALL}{DIFFERENCE}{name}")
    return Section("alone", "Channels alone", tuple(notes), (grid,))


def _without(found: RetrievalBenchmark, rows: _Rows) -> Section:
    notes = ("All channels but one, tuned again: the last column is what that one adds at the same budget.",)
    names = [arm for arm in rows.arms(WITHOUT) if DIFFERENCE not in arm]
    grid = _study(found, rows, WITHOUT, names, lambda name: f"{ALL}{DIFFERENCE}{name}", prefix="without ")
    return Section("without", "Without a channel", notes, (grid,))


def _blends(found: RetrievalBenchmark, rows: _Rows) -> Section:
    chosen = found.facts["blend"]
    names = [arm for arm in rows.arms(BLEND) if DIFFERENCE not in arm]
    notes = (f"The same channels merged in other ways, each tuned; the last column is against {chosen}.",)
    return Section(
        "blends", "Blends", notes, (_study(found, rows, BLEND, names, lambda name: f"{name}{DIFFERENCE}{chosen}"),)
    )


def _factors(found: RetrievalBenchmark, rows: _Rows) -> Section:
    arms, budget = rows.arms(ADVERTISERS), found.facts["budget"]
    advertisers = tuple(
        (arm_label(arm), *(rows.interval(ADVERTISERS, RANKED, arm, segment, TOP) for segment in ("all", "new")))
        for arm in arms
    )
    products = tuple((arm_label(arm), rows.interval(PRODUCT, "recall", arm, k=budget)) for arm in rows.arms(PRODUCT))
    notes = (
        "Advertisers of a visit among those active there: by each forecast, and by the two-tower's scores, summed by "
        "advertiser, which know the market and what runs. Below, ads by P(advertiser) · P(ad | advertiser), the second "
        "a softmax of the two-tower's scores; then the same with either factor known.",
    )
    grids = (
        Grid(("", f"recall@{TOP} of advertisers", "of new"), advertisers or ((NONE,) * 3,)),
        Grid(("", f"recall@{budget} of ads"), products or ((NONE,) * 2,)),
    )
    return Section("factors", "Advertiser, and ad of the advertiser", notes, grids)


def _study(
    found: RetrievalBenchmark,
    rows: _Rows,
    section: str,
    names: Sequence[str],
    difference: Callable[[str], str],
    *,
    prefix: str = "",
) -> Grid:
    k, budget = found.facts["k"], found.facts["budget"]
    lines = tuple(
        (
            name if name == ALL else f"{prefix}{name}",
            rows.interval(section, "recall", name, k=k),
            rows.text(section, "recall", name, "new", k),
            rows.text(section, "value_recall", name, k=k),
            rows.text(section, "ndcg", name, k=k),
            rows.text(section, "mrr", name, k=budget),
            rows.interval(section, "recall", difference(name), k=k),
        )
        for name in names
    )
    columns = ("", f"recall@{k}", "of new", "by value", f"NDCG@{k}", "MRR", "difference of recall")
    return Grid(columns, lines or ((NONE,) * len(columns),))


def _plans(found: RetrievalBenchmark) -> Section:
    lines = []
    for name, plan in found.plans.items():
        blend = plan["blend"]
        weights = blend.get("shares") or blend.get("weights") or blend.get("found") or {}
        told = ", ".join(f"{channel} {number(value, 2)}" for channel, value in weights.items())
        quota = NONE if plan["quota"] is None else number(plan["quota"], 2)
        lines.append((arm_label(name), blend["kind"], quota, number(plan["prior_weight"], 2), told))
    notes = (
        "Shares of quota, weights of rrf, log-odds that a channel adds to what it found in calibrated. Prior weight: "
        "of the forecast in the score of its ads; 0 is the paper's rule.",
    )
    return Section(
        "plans",
        "What was chosen",
        notes,
        (Grid(("", "blend", "quota", "prior weight", "of each channel"), tuple(lines)),),
    )


def _latency(found: RetrievalBenchmark) -> Section:
    lines = tuple(
        (step, *(number(figures[p], 2) for p in ("p50", "p95", "p99"))) for step, figures in found.latency.items()
    )
    per_second = found.latency.get("request", {}).get("per_second")
    notes = (
        f"Milliseconds of single requests on one thread, {count(found.facts.get('latency_requests'))} of them"
        + (f"; {number(per_second, 1)} requests a second." if per_second else "."),
    )
    return Section("latency", "Latency", notes, (Grid(("", "p50", "p95", "p99"), lines or ((NONE,) * 4,)),))


def _plots(found: RetrievalBenchmark) -> dict[str, list[Plot]]:
    k = found.facts["k"]
    points: list[SweepPoint] = found.sweep  # type: ignore[assignment]
    plots = {"arms": [Plot(quota_sweep(points), "Quota sweep", "Recall and concentration by the forecast's quota.")]}
    for section, title in ((ALONE, "alone"), (WITHOUT, "without")):
        drawn = [
            row for row in found.rows if (row.section, row.metric, row.segment, row.k) == (section, "recall", "all", k)
        ]
        plain = [row for row in drawn if DIFFERENCE not in row.arm]
        caption = f"Recall@{k} with its interval over users; dashed: all channels."
        plots[section] = [Plot(intervals(plain, reference=ALL), f"Channels {title}", caption)]
    return plots


def intervals(rows: Sequence[Row], *, reference: str | float, label: str = "recall") -> Markup | None:
    """A dot and its interval a row; None without a row.

    Args:
        rows: figures of one measure.
        reference: arm whose figure, or number at which a dashed line stands.
        label: of the measure.
    """
    known = [row for row in rows if is_known(row.value)]
    if not known:
        return None
    ends = [end for row in known for end in (row.value, row.ci_low, row.ci_high) if end is not None and is_known(end)]
    at = [reference] if isinstance(reference, float) else [row.value for row in known if row.arm == reference]
    span, ticks = round_axis((min(ends + at), max(ends + at)))
    step = 26
    panel = Panel(190, 16, 440, step * len(known), span, (0.0, float(len(known))))
    panel.axes(label, "", ticks, [])
    for value in at:
        panel.line(panel.px(value), panel.top, panel.px(value), panel.top + panel.height, "zero")
    for place, row in enumerate(known):
        y = panel.top + step * (place + 0.5)
        low = row.ci_low if row.ci_low is not None and math.isfinite(row.ci_low) else row.value
        high = row.ci_high if row.ci_high is not None and math.isfinite(row.ci_high) else row.value
        style = "s-lm" if row.arm == reference else "s-anchor"
        panel.text(panel.left - 10, y + 4, arm_label(row.arm), "tick end")
        panel.line(panel.px(low), y, panel.px(high), y, f"line {style}")
        panel.dot(row.value, len(known) - place - 0.5, style)
    return svg(680, panel.top + panel.height + 46, f"{label} with intervals", panel.parts)
