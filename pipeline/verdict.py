"""What a difference says: gain, loss, or no gain shown.

A claim of this project is a difference between two arms with its interval. The words are made here, from the
figures alone and by one rule, so that no report can read more into a run than its intervals allow. Which
measures count as the headline is fixed here too, before any figure is seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from data.statistics import LEVEL, Row
from priors.judge import CONTROLS, HISTORY_ALONE

NOT_SHOWN = "no gain shown: the interval includes zero"
MINUS = "\N{MINUS SIGN}"
DIFFERENCE = " - "  # "lm - anchor" in the arm of a row


class Outcome(Enum):
    """What one difference shows; the value is the word of the report."""

    GAIN = "gain"
    LOSS = "loss"
    NOT_SHOWN = "no gain shown"
    NO_INTERVAL = "no interval"
    UNDIRECTED = "differs"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Metric:
    """How a measure is named, written and judged.

    Attributes:
        label: its name in tables.
        better: the direction that is an improvement; None where neither is.
        digits: decimals of a value.
        unit: unit of a difference in a sentence, empty for shares and ratios.
    """

    label: str
    better: Literal["higher", "lower"] | None
    digits: int = 3
    unit: str = ""

    @property
    def difference_digits(self) -> int:
        """Decimals of a difference: one more than a value has, up to four."""
        return max(self.digits, min(self.digits + 1, 4))


METRICS: dict[str, Metric] = {
    "nll": Metric("NLL", "lower", unit="nat"),
    "select_nll": Metric("NLL of the selection prompts", "lower", unit="nat"),
    "val_recall": Metric("recall of the tuning span", "higher", digits=4),
    "val_loss": Metric("log loss of the tuning span", "lower", digits=4),
    "listed_nll": Metric("NLL of the list", "lower", unit="nat"),
    "ece": Metric("ECE", "lower", digits=4),
    "recall": Metric("recall", "higher"),
    "value_recall": Metric("value-weighted recall", "higher"),
    "interest_nll": Metric("NLL of interests", "lower", unit="nat"),
    "interest_recall": Metric("recall of interests", "higher"),
    "ndcg": Metric("NDCG", "higher"),
    "mrr": Metric("MRR", "higher"),
    "coverage": Metric("advertiser coverage", "higher"),
    "gini": Metric("Gini", "lower"),
    "hits_found_alone": Metric("hits that no other channel found", None),
    "auc": Metric("AUC", "higher", digits=4),
    "gauc": Metric("GAUC", "higher", digits=4),
    "pr_auc": Metric("PR-AUC", "higher", digits=4),
    "normalized_entropy": Metric("NE", "lower", digits=4),
    "log_loss": Metric("log loss", "lower", digits=4),
    "calibration": Metric("predicted / observed", None),
    "collision_rate": Metric("collision rate before resolving", "lower", digits=4),
    "largest_collision": Metric("largest collision group", "lower", digits=0),
    "dead_codes": Metric("dead codes", "lower", digits=0),
    "perplexity": Metric("perplexity", "higher", digits=1),
    "entropy_ratio": Metric("entropy ratio", "higher"),
    "reconstruction_error": Metric("reconstruction error", "lower", digits=4),
    "prefix_coverage": Metric("prefixes in use, of as many as could be", "higher"),
    "neighbour_share": Metric("nearest neighbours with the same prefix", "higher"),
    "neighbour_preservation": Metric("nearest neighbours with the same prefix, beyond chance", "higher"),
    "prefix_explained": Metric("variance of the embeddings between prefixes, beyond chance", "higher"),
    "moved_share": Metric("moved to resolve collisions", None),
    "extra_share": Metric("told apart by an extra level", None),
    "seconds_per_forecast": Metric("seconds per forecast", "lower", digits=4),
    "tokens_per_forecast": Metric("tokens per forecast", None, digits=1),
    "mass_in_list": Metric("probability of the advertisers on the list", None),
    "users_per_hour": Metric("users per hour", "higher", digits=0),
    "users": Metric("users", None, digits=0),
    "advertisers": Metric("advertisers", None, digits=0),
    "ads": Metric("ads", None, digits=0),
    "markets": Metric("markets", None, digits=0),
    "events": Metric("events", None, digits=0),
    "purchases": Metric("purchases", None, digits=0),
    "conversions": Metric("conversions", None, digits=0),
    "user_periods": Metric("user-periods with targets", None, digits=0),
    "targets": Metric("targets", None, digits=0),
    "new_advertiser_share": Metric("targets new to the user", None),
}


@dataclass(frozen=True)
class Headline:
    """A measure of the verdict.

    Attributes:
        section: section of its rows.
        metric: name of its rows.
        k: list length; where a run has other lengths only, the longest of them stands in under its own name.
    """

    section: str
    metric: str
    k: int | None = None


HEADLINES = (
    Headline("forecast", "nll"),
    Headline("forecast", "recall", k=10),
    Headline("retrieval", "recall", k=100),
    Headline("ranking", "auc"),
    Headline("ranking", "pr_auc"),
    Headline("ranking", "normalized_entropy"),
)
AGAINST = ("anchor", "none")  # the first is the headline
SEGMENT = "all"


@dataclass(frozen=True)
class Finding:
    """One comparison of the verdict, in words.

    Attributes:
        section: ``forecast``, ``retrieval`` or ``ranking``.
        metric: the measure with its k, as a reader sees it.
        comparison: the two arms, e.g. ``LM − anchor``.
        outcome: what it shows.
        figures: the difference, its interval and its relative size, as far as known; empty where not measured.
        words: what they show, in words.
        row: the difference it is read from; None where it was not measured.
    """

    section: str
    metric: str
    comparison: str
    outcome: Outcome
    figures: tuple[str, ...]
    words: str
    row: Row | None

    @property
    def sentence(self) -> str:
        """The whole finding."""
        value, *details = self.figures or ("",)
        figures = f"{value} ({'; '.join(details)})" if details else value
        return ": ".join(filter(None, [f"{self.metric}, {self.comparison}", figures, self.words])) + "."


def metric_of(name: str) -> Metric:
    """How to write a measure; one that is not in `METRICS` is shown by its own name and never judged."""
    return METRICS.get(name, Metric(name.replace("_", " "), None))


def metric_label(row: Row) -> str:
    """The measure of a row with its list length, e.g. ``recall@10``."""
    label = metric_of(row.metric).label
    return label if row.k is None else f"{label}@{row.k}"


def arm_label(arm: str) -> str:
    """An arm or a difference of arms as a reader sees it: ``lm - anchor`` becomes ``LM − anchor``."""
    parts = arm.split(DIFFERENCE)
    if len(parts) == 2:
        parts[1] = parts[1].removeprefix("lm, ")  # LM − other prompt
    names = [f"LM{part[2:]}" if part.split(",")[0] == "lm" else part.replace("_", " ") for part in parts]
    return f" {MINUS} ".join(names)


def is_known(value: float | None) -> bool:
    """Whether there is a figure: neither None nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


def number(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """A figure as text: true minus sign, thousands apart, ``–`` where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:{'+' if signed else ''},.{digits}f}"
    if not any(character in "123456789" for character in text):
        text = text.lstrip("+-")  # neither +0.000 nor -0.000
    return text.replace("-", MINUS)


def interval(row: Row, digits: int = 3, *, signed: bool = False) -> str:
    """The interval of a row as text, ``[low, high]``; empty where it has none."""
    if not (is_known(row.ci_low) and is_known(row.ci_high)):
        return ""
    return f"[{number(row.ci_low, digits, signed=signed)}, {number(row.ci_high, digits, signed=signed)}]"


def figure(row: Row, digits: int | None = None) -> str:
    """A row's value with its interval, as far as it has one; of a difference with its sign, and a decimal more.

    Args:
        row: the figure.
        digits: decimals; None for those of its measure.
    """
    signed, metric = DIFFERENCE in row.arm, metric_of(row.metric)
    if digits is None:
        digits = metric.difference_digits if signed else metric.digits
    return f"{number(row.value, digits, signed=signed)} {interval(row, digits, signed=signed)}".rstrip()


def judge(row: Row | None) -> Outcome:
    """What a difference shows at the level of its interval.

    Args:
        row: a row whose arm is a difference, the arm to be judged on the left; None where there is none.

    Returns:
        Gain or loss only where the whole interval lies on one side of zero, in the measure's own direction.
    """
    if row is None or not is_known(row.value):
        return Outcome.NOT_MEASURED
    low, high = row.ci_low, row.ci_high
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return Outcome.NO_INTERVAL
    if low <= 0 <= high:
        return Outcome.NOT_SHOWN
    better = metric_of(row.metric).better
    if better is None:
        return Outcome.UNDIRECTED
    return Outcome.GAIN if (low > 0) == (better == "higher") else Outcome.LOSS


def find(
    rows: Iterable[Row], section: str, metric: str, arm: str, *, segment: str = SEGMENT, k: int | None = None
) -> Row | None:
    """The row of a figure, or None; without a row at this k, the one with the longest list."""
    found = [row for row in rows if (row.section, row.metric, row.arm, row.segment) == (section, metric, arm, segment)]
    exact = [row for row in found if row.k == k]
    return exact[0] if exact else max(found, key=lambda row: row.k or 0, default=None)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """The verdict: every headline measure, LM against the anchor and against no forecast.

    The forecast itself has no arm without one; there, popularity stands in for ``none``, under its own name.

    Args:
        rows: all rows of a run.

    Returns:
        Two findings a headline measure, in the order of `HEADLINES`; what was not measured says so.
    """
    found = []
    for headline in HEADLINES:
        for against in AGAINST:
            row = _difference(rows, headline, against)
            if row is None and (headline.section, against) == ("forecast", "none"):
                row = _difference(rows, headline, "popularity")
            found.append(_finding(rows, headline, against, row))
    return found


def control_findings(rows: Sequence[Row]) -> list[Finding]:
    """LM against its controls.

    Another user's prompt, a hidden state that is the same for all, and, where there are history vectors, the user's own
    without the LM.
    """
    headline = HEADLINES[0]
    against = {control: _difference(rows, headline, control) for control in CONTROLS}
    return [
        _finding(rows, headline, control, row)
        for control, row in against.items()
        if row is not None or control != HISTORY_ALONE
    ]


def summary(found: Sequence[Finding]) -> str:
    """The first sentence of a report: LM against the anchor in all headline measures.

    Args:
        found: of `findings`.
    """
    by_outcome: dict[Outcome, list[str]] = {}
    for finding in found:
        if finding.comparison == arm_label(f"lm{DIFFERENCE}{AGAINST[0]}"):
            name = f"{finding.metric} ({finding.section})"
            by_outcome.setdefault(finding.outcome, []).append(name)
    words = {
        Outcome.GAIN: "gain in",
        Outcome.LOSS: "loss in",
        Outcome.NOT_SHOWN: "no gain shown in",
        Outcome.NO_INTERVAL: "no interval for",
        Outcome.UNDIRECTED: "differs in",
        Outcome.NOT_MEASURED: "not measured:",
    }
    parts = [f"{words[outcome]} {_join(by_outcome[outcome])}" for outcome in words if outcome in by_outcome]
    return "LM against the tuned anchor: " + "; ".join(parts) + "."


def control_summary(found: Sequence[Finding]) -> str:
    """Whether the LM has read anything of the user: only where it beats all its controls.

    Args:
        found: of `control_findings`.
    """
    outcomes = [finding.outcome for finding in found]
    if all(outcome is Outcome.GAIN for outcome in outcomes):
        return f"The LM beats {_all(found)}: it has read something in the user's own prompt."
    if any(outcome in (Outcome.NOT_MEASURED, Outcome.NO_INTERVAL) for outcome in outcomes):
        return "Whether the LM reads the user's own prompt was not tested in full: a control is missing."
    short = [finding.comparison for finding in found if finding.outcome is not Outcome.GAIN]
    return (
        f"It is not shown that the LM reads the user's own prompt: it does not beat {_all(found)} "
        f"({_join(short)}: {_NO_GAIN.get(len(short), 'no gain in any')})."
    )


_NO_GAIN = {1: "no gain", 2: "no gain in either"}


def _all(controls: Sequence[Finding]) -> str:
    return "both controls" if len(controls) == 2 else f"all {len(controls)} controls"


def _difference(rows: Sequence[Row], headline: Headline, against: str) -> Row | None:
    arm = f"lm{DIFFERENCE}{against}"
    return find(rows, headline.section, headline.metric, arm, k=headline.k)


def _finding(rows: Sequence[Row], headline: Headline, against: str, row: Row | None) -> Finding:
    metric, outcome = metric_of(headline.metric), judge(row)
    if row is None or outcome is Outcome.NOT_MEASURED:
        label = metric.label if headline.k is None else f"{metric.label}@{headline.k}"
        comparison = arm_label(f"lm{DIFFERENCE}{against}")
        return Finding(headline.section, label, comparison, outcome, (), "not measured in this run", None)
    words = {
        Outcome.GAIN: f"gain ({metric.better} is better)",
        Outcome.LOSS: f"loss ({metric.better} is better)",
        Outcome.NOT_SHOWN: NOT_SHOWN,
        Outcome.NO_INTERVAL: "nothing is claimed: no interval was computed",
    }.get(outcome, outcome.value)
    figures = _figures(row, base=_base(rows, row))
    return Finding(row.section, metric_label(row), arm_label(row.arm), outcome, figures, words, row)


def _base(rows: Sequence[Row], difference: Row) -> Row | None:
    """The figure of the arm that a difference is taken from."""
    arm = difference.arm.split(DIFFERENCE)[1]
    base = find(rows, difference.section, difference.metric, arm, segment=difference.segment, k=difference.k)
    return base if base is not None and base.k == difference.k and is_known(base.value) and base.value else None


def _figures(row: Row, *, base: Row | None) -> tuple[str, ...]:
    metric = metric_of(row.metric)
    digits = metric.difference_digits
    parts = [" ".join(filter(None, [number(row.value, digits, signed=True), metric.unit]))]
    if is_known(row.ci_low) and is_known(row.ci_high):
        low, high = number(row.ci_low, digits, signed=True), number(row.ci_high, digits, signed=True)
        parts.append(f"{LEVEL:.0%} interval {low} to {high}")
    if base is not None:
        percent = number(100 * row.value / base.value, 2, signed=True)
        parts.append(f"{percent}% of {number(base.value, metric.digits)}")
    return tuple(parts)


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
