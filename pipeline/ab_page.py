"""The simulated A/B test as a page with a plot, and as tables on the terminal: the same figures from the same grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Group

from data.statistics import Row
from pipeline.bench_page import intervals
from pipeline.config import AdsidConfig
from pipeline.grids import NONE, Grid, Plot, Section, count, percent, sections_to_console
from pipeline.pages import template
from pipeline.report import DATASET_NOTES
from pipeline.verdict import DIFFERENCE, SEGMENT, arm_label, is_known, number
from ranking.ablation import ORACLE, TRUE_CHANCE
from ranking.simulated_ab import ALL_ADS, RECOVERED, SimulatedAB, differences

_LEVELS = (
    ("impressions", "impressions", 0),
    ("conversions", "conversions, expected", 1),
    ("value", "their value, expected", 0),
    ("spend", "spend", 0),
    ("cpa", "CPA", 3),
    ("roas", "RoAS", 3),
    ("drawn_conversions", "conversions, drawn", 1),
    ("drawn_value", "their value, drawn", 0),
    ("gini", "Gini of advertisers", 3),
    ("coverage", "advertiser coverage", 3),
    ("new_share", "share of advertisers new to the user", 3),
)
_CHANGES = (("conversions", "conversions"), ("value", "value"), ("spend", "spend"), ("cpa", "CPA"), ("roas", "RoAS"))
_SHARES = (("gini", "Gini"), ("coverage", "coverage"), ("new_share", "share new to the user"))
_CALIBRATION = (
    ("calibration", "predicted / true, shown"),
    ("offered_calibration", "predicted / true, all entrants"),
    ("agreement", "correlation of predicted and true"),
    ("divergence", "forecast's divergence from the truth"),
)


def render(config: AdsidConfig, found: SimulatedAB) -> str:
    """The text of the page."""
    figures = _Figures(found.rows)
    drawn = [row for pair in figures.pairs if (row := figures.find("value_change", pair))]
    plot = intervals(drawn, reference=0.0, label="relative change of value")
    return template("sections.html.j2").render(
        title="adsid bench: simulated A/B",
        heading="Stacks before the same simulated users",
        json="adsid bench ab --json",
        scope=scope(config, found),
        caveats=DATASET_NOTES.get(config.data.source, ())[:1],
        sections=sections(found),
        plots={"differences": [Plot(plot, "value", "Relative change of the value of conversions; dashed: no change.")]},
    )


def to_console(config: AdsidConfig, found: SimulatedAB) -> Group:
    """The figures for the terminal."""
    return sections_to_console(scope(config, found), sections(found))


def scope(config: AdsidConfig, found: SimulatedAB) -> str:
    """What the figures are of."""
    facts, cfg = found.facts, config.auction
    first, last = facts["periods"]
    return (
        f"{count(facts['visits'])} visits of {count(facts['users'])} users, periods {first}-{last} "
        f"({facts['evaluate']}), {facts['slots']} slots each, {number(facts['entrants'], 0)} advertisers in an auction "
        f"of {number(facts['running'], 0)} that run. Generalised second price on bids of {cfg.bid_share[0]:g} to "
        f"{cfg.bid_share[1]:g} of a conversion's value, the same budgets for all arms. Means of "
        f"{facts['ranker_seeds']} ranker seeds and {len(cfg.seeds)} draws of the market; 95 % intervals by bootstrap "
        f"over users and both. {_retrieval(found)}"
    )


def _retrieval(found: SimulatedAB) -> str:
    """Whether the arms differ in their candidates at all."""
    differ = found.facts["other_candidates"]
    if not any(differ[arm] for arm in ("anchor", "lm")):
        return "Retrieval gives the forecast no place, so arms have the same candidates and only the ranker differs."
    told = ", ".join(f"{arm_label(arm)} {percent(differ[arm])}" for arm in ("anchor", "lm"))
    return f"Requests with other candidates than without a forecast: {told}."


def sections(found: SimulatedAB) -> tuple[Section, ...]:
    """All figures, as text."""
    figures = _Figures(found.rows)
    return (
        _levels(figures),
        _differences(figures),
        _budgets(found, figures),
        _recovered(figures),
        _calibration(figures),
    )


class _Figures:
    """Rows by measure, arm and segment."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = {(row.metric, row.arm, row.segment): row for row in rows}
        self.arms = list(dict.fromkeys(row.arm for row in rows if DIFFERENCE not in row.arm))
        self.pairs = [f"{a}{DIFFERENCE}{b}" for a, b in differences(self.arms)]

    def find(self, metric: str, arm: str, segment: str = SEGMENT) -> Row | None:
        return self._rows.get((metric, arm, segment))

    def value(self, metric: str, arm: str, digits: int) -> str:
        return self._told(self.find(metric, arm), lambda x: number(x, digits), intervals=False)

    def interval(self, metric: str, arm: str) -> str:
        return self._told(self.find(metric, arm), lambda x: number(x, 3, signed=DIFFERENCE in arm))

    def share(self, metric: str, arm: str, segment: str = SEGMENT) -> str:
        """A share in percent, with its sign."""
        return self._told(self.find(metric, arm, segment), lambda x: number(100 * x, 1, signed=True), unit=" %")

    @staticmethod
    def _told(row: Row | None, text: Callable[[float], str], *, unit: str = "", intervals: bool = True) -> str:
        if row is None or not is_known(row.value):
            return NONE
        if not intervals or row.ci_low is None or row.ci_high is None or not is_known(row.ci_low):
            return f"{text(row.value)}{unit}"
        return f"{text(row.value)} [{text(row.ci_low)}, {text(row.ci_high)}]{unit}"


def _levels(figures: _Figures) -> Section:
    arms = [arm for arm in figures.arms if arm == ORACLE or not arm.startswith(ORACLE)]
    lines = tuple((label, *(figures.value(metric, arm, digits) for arm in arms)) for metric, label, digits in _LEVELS)
    notes = (
        "Expected conversions are counted by the simulator's true chance, drawn ones with the same random numbers in "
        "all arms; CPA and RoAS are of expected ones. Shuffled prior: another user's forecast. Oracle: rankers that "
        f"learned with the exact forecast. {TRUE_CHANCE.capitalize()}: the candidates of none, ranked by the true "
        "chance, which is about the best that a ranker can do, and the same over all ads that run. Coverage and Gini "
        "are over the advertisers that ran an ad where somebody came.",
    )
    return Section("arms", "Every stack", notes, (Grid(("", *map(arm_label, arms)), lines),))


def _differences(figures: _Figures) -> Section:
    def grid(metrics: Sequence[tuple[str, str]], told: Callable[[str, str], str]) -> Grid:
        lines = tuple((arm_label(pair), *(told(metric, pair) for metric, _ in metrics)) for pair in figures.pairs)
        return Grid(("", *(label for _, label in metrics)), lines or ((NONE,) * (len(metrics) + 1),))

    expected = [(f"{metric}_change", label) for metric, label in _CHANGES]
    drawn = [(f"drawn_{metric}_change", f"{label}, drawn") for metric, label in _CHANGES if metric != "spend"]
    notes = (
        "Relative changes, as expected and as drawn, and differences of shares. Oracle 0.5: the forecast is half way "
        "from the anchor to the exact one.",
    )
    grids = (grid(expected, figures.share), grid(drawn, figures.share), grid(_SHARES, figures.interval))
    return Section("differences", "What the forecast changes", notes, grids)


def _budgets(found: SimulatedAB, figures: _Figures) -> Section:
    segments = list(dict.fromkeys(row.segment for row in found.rows))
    lines = tuple(
        (f"{arm_label(pair)}, {segment}", *(figures.share(f"{metric}_change", pair, segment) for metric, _ in _CHANGES))
        for segment in segments[1:]
        for pair in figures.pairs
    )
    columns = ("", *(label for _, label in _CHANGES))
    notes = ("Budgets as multiples of what an advertiser's part of the logged traffic is worth at its bid.",)
    return Section("budgets", "On other budgets", notes, (Grid(columns, lines or ((NONE,) * len(columns),)),))


def _recovered(figures: _Figures) -> Section:
    lines = tuple(
        (arm_label(pair), *(figures.share(f"{metric}_recovered", pair) for metric in RECOVERED))
        for pair in figures.pairs
        if figures.find(f"{RECOVERED[0]}_recovered", pair)
    )
    notes = (f"Share of what ranking by the true chance gains on none: {', '.join(RECOVERED)}.",)
    columns = ("", *RECOVERED)
    return Section("recovered", "Of what there is to gain", notes, (Grid(columns, lines or ((NONE,) * len(columns),)),))


def _calibration(figures: _Figures) -> Section:
    ranked = [arm for arm in figures.arms if arm not in (TRUE_CHANCE, ALL_ADS)]
    lines = tuple((arm_label(arm), *(figures.interval(metric, arm) for metric, _ in _CALIBRATION)) for arm in ranked)
    notes = (
        "Prices are predicted chances of others: a stack that predicts too much makes everybody pay more, and buys "
        "fewer conversions for the same money. The correlation is the mean over auctions, of all entrants; the "
        "divergence (Kullback-Leibler, nat) is of the advertisers that run, the mean over visits.",
    )
    return Section(
        "calibration", "Predicted and true chances", notes, (Grid(("", *(label for _, label in _CALIBRATION)), lines),)
    )
