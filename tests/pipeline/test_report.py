"""The report: what it says of a figure, what it says of a missing one, and that a page stands on its own."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from data.statistics import Row
from pipeline.figures import forest_scale
from pipeline.report import SHOWN, Curves, RunInfo, UserExample, render_html, render_json, write_report
from pipeline.verdict import (
    NOT_SHOWN,
    Outcome,
    arm_label,
    control_findings,
    control_summary,
    figure,
    findings,
    interval,
    judge,
    number,
)
from pipeline.verdict import summary as summary_of

RUN: RunInfo = {
    "config": {"data": {"name": "complete_journey"}, "learning_rate": 1e-3},
    "versions": {"torch": "2.13.0"},
    "stages": [
        {"name": "data", "seconds": 30.0, "peak_memory_mb": 2048.0, "reused": True},
        {"name": "prior", "seconds": None, "peak_memory_mb": None},
    ],
    "dataset": "complete_journey",
    "evaluate": "validation",
}
CURVES: Curves = {
    "learning": [{"step": 0, "lm": 5.0, "anchor": 5.0}, {"step": 800, "lm": 4.95, "anchor": 4.97}],
    "reliability": {"lm": {"predicted": [1e-3, 0.1], "observed": [0.0, 0.12]}},
    "quota_sweep": [
        {"arm": "lm", "quota": 0.0, "recall": 0.40, "ci_low": 0.38, "ci_high": 0.42, "gini": 0.5},
        {"arm": "lm", "quota": 0.5, "recall": 0.44, "ci_low": 0.42, "ci_high": math.nan, "gini": None},
    ],
    "code_usage": [[3, 2, 1, 0], [2, 2, 1, 1]],
}
MARKUP = "<script>alert('x')</script>"


def example(**more: Any) -> UserExample:
    made: Any = {
        "as_of": "start of week 43",
        "prompt": f"bought {MARKUP}",
        "forecast": [{"advertiser": f"soup {MARKUP}", "lm": 0.2, "anchor": math.nan, "converted": True}],
        "candidates": [{"ad": MARKUP, "advertiser": None, "channels": ["two-tower", f"forecast {MARKUP}"]}],
        "ranking": [{"ad": MARKUP, "advertiser": "soup", "score": 0.3}],
        **more,
    }
    return made


def difference(
    low: float | None,
    high: float | None,
    *,
    metric: str = "nll",
    section: str = "forecast",
    arm: str = "lm - anchor",
    k: int | None = None,
) -> Row:
    value = (low + high) / 2 if low is not None and high is not None else 0.01
    return Row(section, metric, arm, "all", k, value, low, high, 100, 3)


def level(
    value: float, *, metric: str = "nll", section: str = "forecast", arm: str = "lm", k: int | None = None
) -> Row:
    return Row(section, metric, arm, "all", k, value, None, None, 100)


def html(rows: list[Row], *, shown: UserExample | None = None, curves: Curves | None = None) -> str:
    return render_html(rows, run=RUN, example=shown, curves=curves or {})


class Elements(HTMLParser):
    """Start tags with their attributes, and the text outside of the style sheet."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._hidden = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._hidden = tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._hidden else f" {data} "


def text_of(page: str) -> str:
    return " ".join(Elements(page).text.split())


# What a difference shows


@pytest.mark.parametrize(
    ("metric", "low", "high", "outcome"),
    [
        ("nll", -0.02, -0.01, Outcome.GAIN),
        ("nll", 0.01, 0.02, Outcome.LOSS),
        ("normalized_entropy", -0.02, -0.01, Outcome.GAIN),
        ("log_loss", 0.01, 0.02, Outcome.LOSS),
        ("ece", -0.02, -0.01, Outcome.GAIN),
        ("recall", 0.01, 0.02, Outcome.GAIN),
        ("auc", -0.02, -0.01, Outcome.LOSS),
        ("pr_auc", -0.01, 0.02, Outcome.NOT_SHOWN),
        ("nll", -0.01, 0.0, Outcome.NOT_SHOWN),
        ("recall", 0.0, 0.0, Outcome.NOT_SHOWN),
        ("calibration", 0.01, 0.02, Outcome.UNDIRECTED),
        ("a measure nobody declared", 0.01, 0.02, Outcome.UNDIRECTED),
        ("nll", None, None, Outcome.NO_INTERVAL),
    ],
)
def test_a_gain_needs_a_whole_interval_on_the_better_side(
    metric: str, low: float | None, high: float | None, outcome: Outcome
) -> None:
    assert judge(difference(low, high, metric=metric)) is outcome


def test_nan_is_never_a_gain() -> None:
    assert judge(Row("forecast", "nll", "lm - anchor", "all", None, math.nan, -2.0, -1.0, 0)) is Outcome.NOT_MEASURED
    assert judge(Row("forecast", "nll", "lm - anchor", "all", None, -1.0, math.nan, -0.5, 9)) is Outcome.NO_INTERVAL
    assert judge(None) is Outcome.NOT_MEASURED


def test_verdict_words_follow_the_interval() -> None:
    rows = [
        difference(-0.0174, -0.0082),
        level(4.934, arm="anchor"),
        difference(-0.0028, 0.0104, metric="recall", k=10),
        difference(0.0002, 0.0016, metric="normalized_entropy", section="ranking"),
    ]
    found = {(one.metric, one.comparison): one.sentence for one in findings(rows)}
    assert found["NLL", "LM − anchor"] == (
        "NLL, LM − anchor: −0.0128 nat (95% interval −0.0174 to −0.0082; −0.26% of 4.934): gain (lower is better)."
    )
    assert found["recall@10", "LM − anchor"].endswith(f": {NOT_SHOWN}.")
    assert found["NE", "LM − anchor"].endswith(": loss (lower is better).")
    assert found["AUC", "LM − none"] == "AUC, LM − none: not measured in this run."
    assert summary_of(findings(rows)) == (
        "LM against the tuned anchor: gain in NLL (forecast); loss in NE (ranking); no gain shown in recall@10 "
        "(forecast); not measured: recall@100 (retrieval), AUC (ranking) and PR-AUC (ranking)."
    )


def test_verdict_stands_first_in_the_page() -> None:
    text = text_of(html([difference(-0.01, 0.01)]))
    assert text.index("LM against the tuned anchor") < text.index("The Complete Journey is simulated")
    assert NOT_SHOWN in text


def test_popularity_stands_in_for_no_forecast_under_its_own_name() -> None:
    found = findings([difference(-0.6, -0.5, arm="lm - popularity")])
    assert found[1].comparison == "LM − popularity"
    both = findings([difference(-0.6, -0.5, arm="lm - popularity"), difference(-0.1, 0.1, arm="lm - none")])
    assert both[1].comparison == "LM − none"


def test_a_run_with_shorter_lists_is_judged_under_their_own_length() -> None:
    rows = [difference(0.01, 0.02, metric="recall", section="retrieval", k=k) for k in (10, 50)]
    assert "recall@50" in {finding.metric for finding in findings(rows)}


BETTER, NO_BETTER = (-0.03, -0.02), (-0.03, 0.02)


@pytest.mark.parametrize(
    ("other", "constant", "history", "words"),
    [
        (BETTER, BETTER, None, "beats both controls"),
        (BETTER, BETTER, BETTER, "beats all 3 controls"),
        (BETTER, BETTER, NO_BETTER, "does not beat all 3 controls (LM − history alone: no gain)"),
        (BETTER, NO_BETTER, None, "not shown that the LM reads"),
        (BETTER, None, None, "a control is missing"),
    ],
)
def test_the_lm_has_read_something_only_where_it_beats_all_its_controls(
    other: tuple[float, float], constant: tuple[float, float] | None, history: tuple[float, float] | None, words: str
) -> None:
    rows = [difference(*other, arm="lm - lm, other prompt")]
    if constant:
        rows.append(difference(*constant, arm="lm - lm, constant hidden"))
    if history:
        rows.append(difference(*history, arm="lm - lm, history alone"))
    found = control_findings(rows)
    assert words in control_summary(found)
    assert control_summary(found) in text_of(html(rows))
    assert found[0].comparison == "LM − other prompt"


def test_arms_and_numbers_as_a_reader_sees_them() -> None:
    assert arm_label("lm, other prompt") == "LM, other prompt"
    assert arm_label("anchor - none") == "anchor − none"
    assert number(None) == number(math.nan) == number(math.inf) == "–"
    assert number(-0.00001, 3, signed=True) == "0.000"
    assert number(-1234.5, 1) == "−1,234.5"


def test_a_figure_stands_with_its_interval() -> None:
    level = Row("ranking", "auc", "lm", "all", None, 0.71234, 0.7, 0.72, 9)
    assert figure(level) == "0.7123 [0.7000, 0.7200]"
    assert figure(replace(level, arm="lm - none", value=0.01, ci_low=-0.002, ci_high=0.02), 3) == (
        "+0.010 [−0.002, +0.020]"
    )
    assert figure(replace(level, ci_low=None, ci_high=math.nan), 2) == "0.71"
    assert interval(replace(level, ci_low=None)) == ""


# What the page holds


def test_texts_of_the_data_are_escaped() -> None:
    page = html([level(1.0, arm=MARKUP)], shown=example(), curves=CURVES)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(") >= 6
    assert all(tag != "script" for tag, _ in Elements(page).tags)


def test_an_arm_named_in_a_figure_is_escaped() -> None:
    page = html([], curves={"quota_sweep": [{"arm": MARKUP, "quota": q, "recall": 0.4} for q in (0.0, 0.5)]})
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_page_loads_nothing() -> None:
    page = html([difference(-0.02, -0.01), level(4.9)], shown=example(), curves=CURVES)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", page)
    for tag, attributes in Elements(page).tags:
        assert tag not in {"script", "link", "iframe", "img", "object", "embed", "base"}
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")  # type: ignore[union-attr]
    assert "default-src 'none'" in page


def test_what_was_not_run_is_said() -> None:
    text = text_of(html([]))
    for name in ("the forecast", "the forecast's calibration", "retrieval", "ranking", "the semantic IDs"):
        assert f"Not run: this run holds no figures of {name}." in text
    for name in ("Learning curve", "Reliability diagram", "Quota sweep", "Code usage"):
        assert f"{name}: not recorded in this run." in text
    assert "No user is shown in this report." in text
    assert "No cost per user was measured" in text
    assert "not run" in text[text.index("Time and memory by stage") :]


def test_a_stage_without_differences_claims_nothing() -> None:
    assert "so nothing can be claimed here" in text_of(html([level(4.9), level(4.95, arm="anchor")]))


def test_an_empty_part_of_the_example_is_said() -> None:
    text = text_of(html([], shown=example(forecast=[], candidates=[], ranking=[])))
    for name in ("forecast was", "candidates were", "ranking was"):
        assert f"No {name} recorded for this user." in text


def test_cases_and_seeds_stand_beside_the_figures() -> None:
    one = level(4.9)
    assert "all n = 100 · 1 seed " in text_of(html([one]))
    three = Row("forecast", "recall", "lm", "all", 10, 0.3, None, None, 2000, 3)
    assert "all n = 100 to 2,000 · 1 to 3 seeds" in text_of(html([one, three]))


def test_figures_read_back_from_json_may_be_none() -> None:
    rows = [Row(**{**row, "value": None}) for row in json.loads(render_json([level(4.9)], run=RUN))["rows"]]
    assert "–" in text_of(html([*rows, difference(None, None)]))


def test_every_figure_is_shown_somewhere() -> None:
    rows = [
        level(0.1234567 + index, section=section, metric=f"measure {index}")
        for index, section in enumerate(("data", "semantic_ids", "forecast", "retrieval", "ranking", "cost", "novel"))
    ]
    rows += [
        difference(0.3, 0.4, metric="hit rate", section="retrieval", k=7),
        difference(0.1, 0.2, metric="ece", section="ranking"),
        level(0.0051, metric="ece"),
    ]
    text = text_of(html(rows))
    for index in range(7):
        assert f"measure {index}" in text
        assert f"{index}.123" in text
    assert "hit rate@7" in text
    assert "+0.3500" in text
    assert "0.0051" in text


def test_the_simulated_data_set_is_called_simulated() -> None:
    assert "The Complete Journey is simulated, based on real grocery patterns" in text_of(html([]))


def test_span_and_caveats_are_told() -> None:
    page = render_html([], run={**RUN, "evaluate": "test", "caveats": ["tiny model"]}, example=None, curves={})
    assert "evaluate=test" in page
    assert "tiny model" in page
    assert "the test span was not read" not in page


def test_a_user_is_named_only_when_given() -> None:
    assert "<h2>One user</h2>" in html([], shown=example())
    assert "One user: 1443" in text_of(html([], shown=example(user="1443")))


def test_provenance_counts_what_one_channel_found_alone() -> None:
    candidates = [{"ad": "a", "advertiser": None, "channels": ["forecast"]}] * (SHOWN + 1)
    candidates += [{"ad": "b", "advertiser": None, "channels": ["forecast", "two-tower"]}]
    text = text_of(html([], shown=example(candidates=candidates)))
    assert f"forecast {SHOWN + 2} ({SHOWN + 1} alone)" in text
    assert "two-tower 1 (0 alone)" in text
    assert "2 more" in text


def test_a_missing_number_is_a_dash_and_never_nan() -> None:
    rows = [level(math.nan), Row("ranking", "auc", "lm - none", "all", None, math.nan, math.nan, math.nan, 0)]
    text = text_of(html(rows, shown=example(), curves=CURVES))
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", text)
    assert "–" in text


def test_figures_of_one_point_and_of_constant_values_can_be_drawn() -> None:
    flat: Curves = {
        "learning": [{"step": 0, "lm": 5.0, "anchor": 5.0}],
        "reliability": {"lm": {"predicted": [0.5], "observed": [0.5]}, "anchor": {"predicted": [], "observed": []}},
        "quota_sweep": [{"arm": "lm", "quota": 0.2, "recall": 0.0}],
        "code_usage": [[0, 0], []],
    }
    page = html([difference(0.0, 0.0)], curves=flat)
    assert page.count('class="figure') == 4
    assert not re.search(r'="-?(nan|inf)', page)


def test_curves_without_a_single_number_are_said_to_be_missing() -> None:
    empty: Curves = {
        "learning": [{"step": 0, "lm": math.nan, "anchor": 5.0}],
        "reliability": {"lm": {"predicted": [0.0], "observed": [math.nan]}},
        "quota_sweep": [{"arm": "lm", "quota": 0.2, "recall": math.nan}],
        "code_usage": [],
    }
    text = text_of(html([], curves=empty))
    for name in ("Learning curve", "Reliability diagram", "Quota sweep", "Code usage"):
        assert f"{name}: not recorded in this run." in text


def test_a_large_difference_does_not_squeeze_the_headline() -> None:
    near, far = difference(-0.02, -0.01), difference(-0.6, -0.5, arm="lm - popularity")
    assert forest_scale([near, far]) == pytest.approx(0.02)
    assert forest_scale([far]) >= 0.6
    against_none = difference(0.03, 0.05, arm="lm - none")
    assert forest_scale([difference(-0.001, 0.002), against_none]) == pytest.approx(0.05)
    assert 'class="arrow gain"' in html([near, far])


# What the machine reads


def test_json_is_tidy_and_valid() -> None:
    rows = [difference(-0.02, -0.01, k=None), level(math.nan, metric="recall", k=10)]
    document = json.loads(render_json(rows, run=RUN), parse_constant=pytest.fail)
    assert set(document) == {"rows", "run"}
    assert all(
        list(row) == ["section", "metric", "arm", "segment", "k", "value", "ci_low", "ci_high", "n", "seeds"]
        for row in document["rows"]
    )
    assert document["rows"][1]["value"] is None
    assert document["run"]["config"]["data"]["name"] == "complete_journey"
    assert document["run"]["versions"] == {"torch": "2.13.0"}
    assert document["run"]["stages"][0]["seconds"] == 30.0
    assert document["run"]["stages"][0]["peak_memory_mb"] == 2048.0


def test_both_files_are_written_and_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    rows = [difference(-0.02, -0.01), level(4.9)]
    first = write_report(rows, run=RUN, example=example(), curves=CURVES, out_dir=tmp_path / "a" / "new")
    second = write_report(rows, run=RUN, example=example(), curves=CURVES, out_dir=tmp_path / "b")
    assert sorted(path.name for path in first.parent.iterdir()) == ["report.html", "report.json"]
    for name in ("report.html", "report.json"):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()


def test_two_rows_of_one_figure_are_refused_and_the_older_report_stays(tmp_path: Path) -> None:
    path = write_report([level(4.9)], run=RUN, example=None, curves={}, out_dir=tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="more than one claim"):
        write_report([level(4.9), level(4.8)], run=RUN, example=None, curves={}, out_dir=tmp_path)
    assert path.read_bytes() == before
