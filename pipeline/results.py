"""Headline figures of several runs on one page: tables as Markdown, and their differences as a picture beside them.

    adsid results "Amazon Beauty=runs/beauty" "The Complete Journey=runs/full" --out docs/results
        │   rows that the runs' stages left, `data.statistics.Row`, and their manifests
        ▼
    headline.md     all runs at a glance, a table a run, and what each cost
    headline.svg    forecast − anchor of every run, a panel a measure

Nothing on the page is typed in: it can say no other thing than its runs. Which measures are on it is fixed here, before
any figure is seen; one that a run did not measure is left out of its table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.artifacts import MANIFEST, Manifest, atomic_write_text
from data.errors import LineageError, UserError
from data.statistics import LEVEL, Row
from pipeline.engine import check_inputs
from pipeline.figures import Panel, difference_tick, forest_scale, outcome_mark, svg
from pipeline.grids import Grid, Section, sections_to_markdown
from pipeline.stages import read_rows
from pipeline.verdict import (
    AGAINST,
    DIFFERENCE,
    MINUS,
    SEGMENT,
    Headline,
    figure,
    is_known,
    judge,
    metric_label,
    metric_of,
    number,
)

MARKDOWN, PICTURE = "headline.md", "headline.svg"
NEEDED, MORE = ("prior", "forecasts"), ("retrieval", "ranker", "ranker_ablation")
"""Stages that are read, the second ones as far as they are there; of the rankers the ablation leads, which has more."""
PACKAGES = ("adsid", "torch", "transformers", "torchrec", "faiss-cpu", "lightning")


@dataclass(frozen=True)
class Claim:
    """A measure of the page.

    Attributes:
        headline: section, measure and list length.
        segment: of the targets.
        baseline: arm that stands for no forecast.
        control: arm that the forecast, or what stands for none, is compared with to see that the gain is the user's.
    """

    headline: Headline
    segment: str = SEGMENT
    baseline: str = "none"
    control: str | None = None


def _label(row: Row) -> str:
    """A measure with its section and segment, where they are not the first ones."""
    section = "" if row.section == "forecast" else f"{row.section}, "
    return f"{section}{metric_label(row)}{'' if row.segment == SEGMENT else f', {row.segment}'}"


def _forecast(metric: str, k: int | None = None, segment: str = SEGMENT) -> Claim:
    control = f"lm{DIFFERENCE}lm, other prompt" if metric == "nll" else None
    return Claim(Headline("forecast", metric, k), segment, "popularity", control)


def _ranking(metric: str) -> Claim:
    return Claim(Headline("ranking", metric), control=f"shuffled prior{DIFFERENCE}none")


CLAIMS = (
    _forecast("nll"),
    _forecast("nll", segment="new"),
    _forecast("recall", 10),
    _forecast("recall", 20),
    _forecast("recall", 10, "new"),
    _forecast("recall", 10, "active"),
    Claim(Headline("retrieval", "recall", 100)),
    Claim(Headline("retrieval", "recall", 100), "new"),
    _ranking("auc"),
    _ranking("pr_auc"),
    _ranking("normalized_entropy"),
)


@dataclass(frozen=True)
class Run:
    """A run directory that was read.

    Attributes:
        name: as on the page.
        rows: of all its stages.
        manifests: of its stages, by name.
    """

    name: str
    rows: list[Row]
    manifests: Mapping[str, Manifest]

    def find(self, claim: Claim, arm: str) -> Row | None:
        """The row of a measure; None where this list length was not measured."""
        wanted = claim.headline
        key = (wanted.section, wanted.metric, arm, claim.segment, wanted.k)
        rows = (row for row in self.rows if (row.section, row.metric, row.arm, row.segment, row.k) == key)
        return next((row for row in rows if is_known(row.value)), None)

    def difference(self, claim: Claim, against: str) -> Row | None:
        """The forecast less an arm."""
        return self.find(claim, f"lm{DIFFERENCE}{against}")


def read_runs(named: Sequence[str]) -> list[Run]:
    """Runs given as ``NAME=RUN_DIR``.

    Raises:
        UserError: one is not of that form, two have one name, or a directory holds no figures, or such as were made
            from others than lie beside them; all at once.
    """
    errors: list[UserError] = []
    runs: dict[str, Run] = {}
    for one in named:
        name, equals, folder = (part.strip() for part in one.partition("="))  # a run's path may have one more
        if not (name and equals and folder) or name in runs:
            errors.append(
                UserError(
                    f"the run {one!r}",
                    expected="NAME=RUN_DIR, each name once",
                    action='write e.g. "Amazon Beauty=runs/beauty"',
                )
            )
            continue
        directory = Path(folder).expanduser()
        manifests = {
            stage: Manifest.read(directory / stage)
            for stage in (*NEEDED, *MORE)
            if (directory / stage / MANIFEST).exists()
        }
        errors += _choose_rankers(directory, manifests)
        if not manifests.keys() >= set(NEEDED):
            errors.append(
                UserError(
                    f"{directory}, which holds no figures of a forecast",
                    expected="the directory of a run that got as far as the stage forecasts",
                    action="make one with `adsid run`, or correct the path",
                )
            )
        runs[name] = Run(name, [row for stage in manifests for row in read_rows(directory / stage)], manifests)
    if errors:
        raise UserError.collect(errors)
    return list(runs.values())


def _choose_rankers(directory: Path, manifests: dict[str, Manifest]) -> list[UserError]:
    """Leave one stage of rankers, the ablation unless it is of other forecasts; what else does not fit together."""
    errors: dict[str, UserError] = {}
    for stage in manifests:
        try:
            check_inputs(directory, stage)
        except LineageError as error:
            errors[stage] = error
    if "ranker" in manifests and "ranker_ablation" in manifests:
        dropped = "ranker_ablation" if "ranker_ablation" in errors else "ranker"
        manifests.pop(dropped)
        errors.pop(dropped, None)
    return list(errors.values())


def write_results(runs: Sequence[Run], out: Path) -> None:
    """Write ``headline.md`` and ``headline.svg`` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    atomic_write_text(out / PICTURE, picture(runs))
    note = (
        f"Differences are paired, with {LEVEL:.0%} intervals by bootstrap over users (and seeds, where there are "
        "several). The anchor is what counts alone forecast, tuned on the forecaster's own data; without a forecast "
        "there is popularity in its place. The control of a forecast shows another user's prompt and history, that of "
        "a ranker gives each user another's forecast. *New* are targets that the user never bought from; their NLL is "
        "that of the whole distribution, of which popularity keeps nothing back for what was bought before."
    )
    page = f"# Headline figures\n\n{note}\n\n![Forecast less anchor, by measure and run]({PICTURE})\n\n"
    atomic_write_text(out / MARKDOWN, page + sections_to_markdown(sections(runs)))


def sections(runs: Sequence[Run]) -> list[Section]:
    """All runs at a glance, a table a run, and one of what they cost."""
    columns = ("", "anchor", "forecast", f"forecast {MINUS} anchor", f"forecast {MINUS} none", "control")
    found = []
    for run in runs:
        lines = [line for claim in CLAIMS if (line := _line(run, claim)) is not None]
        found.append(Section(run.name, run.name, (_scope(run),), (Grid(columns, tuple(lines)),)))
    costs = ("", "prompts", "LM", "fit", "memory", "forecasts", "a forecast", "rankers")
    versions = {name: version for run in runs for name, version in run.manifests["forecasts"].versions.items()}
    told = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    table = Grid(costs, tuple(_cost(run) for run in runs))
    return [_glance(runs), *found, Section("cost", "What it cost", (f"Versions: {told}.",), (table,))]


def _glance(runs: Sequence[Run]) -> Section:
    """What the forecast brings over the anchor and over none, a line a run; of all users and advertisers."""
    grids = []
    for against in AGAINST:
        columns: list[list[str]] = []
        for claim in (claim for claim in CLAIMS if claim.segment == SEGMENT):
            arm = claim.baseline if against == "none" else against
            found = [run.difference(claim, arm) for run in runs]
            measured = next((row for row in found if row is not None), None)
            if measured is not None:
                columns.append([_label(measured), *map(_marked, found)])
        names = [f"forecast {MINUS} {against}", *(run.name for run in runs)]
        head, *lines = zip(names, *columns, strict=True)
        grids.append(Grid(head, tuple(lines)))
    legend = "▲ better, ▼ worse, ○ the interval includes zero; NLL and NE are better when lower."
    return Section("glance", "At a glance", (legend,), tuple(grids))


def _marked(row: Row | None) -> str:
    if row is None:
        return ""
    digits = metric_of(row.metric).difference_digits
    return f"{number(row.value, digits, signed=True)} {outcome_mark(judge(row))}"


def _line(run: Run, claim: Claim) -> tuple[str, ...] | None:
    headline = run.difference(claim, AGAINST[0])
    if headline is None:
        return None
    digits = metric_of(claim.headline.metric).digits
    levels = (run.find(claim, arm) for arm in (AGAINST[0], "lm"))
    control = None if claim.control is None else run.find(claim, claim.control)
    return (
        _label(headline),
        *("" if row is None else number(row.value, digits) for row in levels),
        figure(headline),
        *("" if row is None else figure(row) for row in (run.difference(claim, claim.baseline), control)),
    )


def _scope(run: Run) -> str:
    config, forecasts = run.manifests["forecasts"].config, run.manifests["forecasts"].metrics
    prompts = run.find(CLAIMS[0], "lm")
    parts = [
        f"{config['data']['source']}, span {config['evaluate']}",
        f"forecasts of {number(forecasts['users'], 0)} users",
        *([] if prompts is None else [f"NLL of {number(prompts.n, 0)} user-periods"]),
    ]
    ranking = run.difference(_ranking("auc"), AGAINST[0])
    if ranking is not None:
        parts.append(f"rankers of {ranking.seeds} seeds on {number(ranking.n, 0)} rows")
    return ", ".join(parts) + "."


def _cost(run: Run) -> tuple[str, ...]:
    prior, forecasts = run.manifests["prior"], run.manifests["forecasts"]
    rankers = run.manifests.get("ranker_ablation") or run.manifests.get("ranker")
    return (
        run.name,
        number(prior.metrics["prompts"], 0),
        f"{_base(prior.config)}, {'kept' if prior.metrics['best_part'] >= 0 else 'not kept'}",
        _seconds(prior.seconds),
        f"{number(prior.peak_memory_mb / 1024, 1)} GiB",
        number(forecasts.metrics["forecasts_made"], 0),
        _seconds(forecasts.metrics["seconds_per_forecast"], 3),
        "" if rankers is None else f"{rankers.metrics.get('rankers', '')}, {_seconds(rankers.seconds)}",
    )


def _base(config: Mapping[str, Any]) -> str:
    base = config["prior"]["base"]
    random = ", random weights" if base["random_weights"] else ""
    return str(base["name"]).removeprefix("packaged:") + random


def _seconds(value: Any, digits: int = 0) -> str:
    return "" if value is None else f"{number(value, digits)} s"


# --- the picture --------------------------------------------------------------------------------------------

_STYLE = """
text { font: 12.5px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #3a434b; }
.name { font-weight: 650; fill: #1c2127; } .end { text-anchor: end; } .mid { text-anchor: middle; }
.axis { font-size: 11px; fill: #5c6670; } .zero { stroke: #b9c1c7; stroke-width: 1; } .whisker { stroke-width: 2; }
.gain { stroke: #12734a; fill: #12734a; } .loss { stroke: #b03a2e; fill: #b03a2e; }
.not_shown, .no_interval, .undirected { stroke: #68727c; fill: #fdfdfb; } .paper { fill: #fdfdfb; }
@media (prefers-color-scheme: dark) {
  text { fill: #c9d0d6; } .name { fill: #e4e7e9; } .axis { fill: #9aa5ae; } .zero { stroke: #4a535b; }
  .gain { stroke: #5cc795; fill: #5cc795; } .loss { stroke: #ee8577; fill: #ee8577; }
  .not_shown, .no_interval, .undirected { stroke: #97a2ab; fill: #14181c; } .paper { fill: #14181c; }
}
"""
_LABELS, _WIDTH, _STEP, _HEAD, _FOOT, _ACROSS = 150.0, 250.0, 22.0, 26.0, 30.0, 2


def picture(runs: Sequence[Run]) -> str:
    """The differences with the anchor as a picture of its own, a panel a measure."""
    panels = []
    for claim in CLAIMS:
        measured = [(run.name, row) for run in runs if (row := run.difference(claim, AGAINST[0])) is not None]
        if measured:
            panels.append(measured)
    heights = [
        _HEAD + _STEP * max(map(len, panels[start : start + _ACROSS])) + _FOOT
        for start in range(0, len(panels), _ACROSS)
    ]
    column = _LABELS + _WIDTH + 40
    width, height = _ACROSS * column, sum(heights) + 20
    parts = [f"<style>{_STYLE}</style>", f'<rect class="paper" width="{width:g}" height="{height:g}"/>']
    for place, measured in enumerate(panels):
        down, across = divmod(place, _ACROSS)
        parts += _panel(measured, across * column + 10, sum(heights[:down]) + 10)
    drawing = svg(width, height, f"Forecast less anchor, with {LEVEL:.0%} intervals", parts)
    return str(drawing).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _panel(measured: Sequence[tuple[str, Row]], left: float, top: float) -> list[str]:
    """A line a run about the zero line of the measure, as SVG elements."""
    scale = forest_scale([row for _, row in measured])
    panel = Panel(left + _LABELS, top + _HEAD, _WIDTH, _STEP * len(measured), (-scale, scale), (0.0, len(measured)))
    bottom = panel.top + panel.height
    panel.text(left, top + 14, _label(measured[0][1]), "name")
    panel.line(panel.px(0), panel.top - 4, panel.px(0), bottom, "zero")
    for place, (name, row) in enumerate(measured):
        y, style = panel.top + _STEP * (place + 0.5), judge(row).name.lower()
        panel.text(panel.left - 10, y + 4, name, "end")
        low, high = (row.value if end is None or not is_known(end) else end for end in (row.ci_low, row.ci_high))
        low, high = (min(max(end, -scale), scale) for end in (low, high))
        panel.line(panel.px(low), y, panel.px(high), y, f"whisker {style}")
        if abs(row.value) <= scale:
            panel.dot(row.value, len(measured) - place - 0.5, style, radius=4)
    better = metric_of(measured[0][1].metric).better
    for value in (-scale, 0.0, scale):
        panel.text(panel.px(value), bottom + 14, difference_tick(value), "axis mid")
    if better is not None:
        at, told = (panel.px(scale / 2), "better →") if better == "higher" else (panel.px(-scale / 2), "← better")
        panel.text(at, bottom + 14, told, "axis mid")
    return panel.parts
