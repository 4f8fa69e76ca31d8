"""The page and the terminal's tables of a described log: whole, self-contained, and silent about people."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console

from data.describe import Description, SpanCounts, describe
from data.split import SplitConfig
from pipeline.description import (
    CLOSED,
    MAX_BARS,
    NONE,
    conversions_by_period,
    cumulative_share,
    label_rate,
    render_description,
    sections,
    share_of_new,
    to_console,
    write_description,
)
from tests.logs import tiny_config, tiny_tables
from tests.pipeline.test_report import Elements, text_of

TABLES = tiny_tables()
FOUND = describe(TABLES, tiny_config())
SPAN_NAMES = ("prior fit", "prior select", "ranker fit", "ranker stop", "validation", "test")
LETTER = 5.8
"""Width of a letter of a span's name, measured in Chromium with DejaVu Sans at 11.5 px: about 6 on average."""


def console_text(description: Description, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(to_console(description))
    return console.export_text()


def without(what: str) -> Description:
    """A description of a log that lacks something."""
    tables = TABLES
    if what == "impressions":
        tables = replace(tables, events=tables.events.filter(pl.col("kind") != "impression"))
    elif what == "markets":
        tables = replace(tables, events=tables.events.with_columns(market_id=pl.lit(None, pl.Int32)))
    elif what == "advertisers":
        tables = replace(tables, events=tables.events.with_columns(advertiser_id=pl.lit(None, pl.Int32)))
    if what in ("placements", "markets"):
        tables = replace(tables, placements=tables.placements.limit(0))
    if what == "profiles":
        return describe(replace(tables, users=tables.users.select("user_id")), tiny_config(profile_columns=[]))
    return describe(tables, tiny_config())


LACKING = ("impressions", "markets", "placements", "advertisers", "profiles")


def test_every_figure_is_on_the_page_and_on_the_terminal() -> None:
    page, terminal = text_of(render_description(FOUND)), " ".join(console_text(FOUND).split())
    for section in sections(FOUND):
        assert section.title in page
        for text in (*section.notes, *(" ".join(filter(None, line)) for grid in section.grids for line in grid.lines)):
            assert " ".join(text.split()) in page
            assert " ".join(text.split()) in terminal
    for figure in (f"{FOUND.targets:,}", f"{FOUND.baskets:,}", f"{FOUND.rows['placements']:,}", "2024-01-01"):
        assert figure in page


def test_the_page_stands_on_its_own() -> None:
    page = render_description(FOUND)
    assert page.startswith("<!DOCTYPE html>")
    elements = Elements(page)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in elements.tags}
    assert not any(
        name in ("src", "xlink:href") or name.startswith("on") for _, given in elements.tags for name in given
    )
    assert all((given.get("href") or "#").startswith("#") for _, given in elements.tags)
    assert not re.search(r"url\(|@import|https?:", page)
    assert "default-src 'none'" in page
    anchors = {given["href"] for tag, given in elements.tags if tag == "a"}
    assert anchors == {f"#{given['id']}" for tag, given in elements.tags if tag == "section"}
    assert page.count('<svg class="figure') == 4


def test_nobody_is_named() -> None:
    for text in (render_description(FOUND), console_text(FOUND)):
        assert not any(user in text for user in TABLES.users["user_id"])
        assert not re.search(r"group \d", text)  # values of the profile column
        assert "age" in text


def test_names_of_columns_are_escaped() -> None:
    name = "<script>alert(1)</script>[bold]"
    users = TABLES.users.with_columns(pl.lit("x").alias(name))
    found = describe(replace(TABLES, users=users), tiny_config())
    assert "<script>" not in render_description(found)
    assert "[bold]" in text_of(render_description(found))
    assert name in console_text(found)


@pytest.mark.parametrize("what", LACKING)
def test_what_a_log_lacks_is_none_and_never_nan(what: str) -> None:
    found = without(what)
    for text in (text_of(render_description(found)), console_text(found)):
        assert NONE in text.split()
        assert not re.search(r"\b(nan|None|inf)\b", text)
    assert not re.search(r'="-?(nan|inf)', render_description(found))


def test_what_is_lacking_has_no_plot() -> None:
    assert label_rate(without("impressions")) is None
    assert share_of_new(without("advertisers")) is None
    assert cumulative_share(without("advertisers")) is None
    assert conversions_by_period(without("advertisers")) is not None
    assert "Label rate by period: none." in text_of(render_description(without("impressions")))


def test_the_closed_test_span_is_said_to_be_closed() -> None:
    page = text_of(render_description(FOUND))
    assert "test closed closed closed closed closed closed" in page
    assert "test (closed)" in page
    opened = text_of(render_description(describe(TABLES, tiny_config(), evaluate="test")))
    assert CLOSED not in opened
    assert "evaluate=test" in opened


def test_ordinals_are_no_calendar_time() -> None:
    found = describe(TABLES, tiny_config(split=SplitConfig(by="leave_one_out")))
    assert "no calendar time" in text_of(render_description(found))
    assert "no calendar time" not in text_of(render_description(FOUND))


def test_the_simulated_data_set_is_called_simulated() -> None:
    assert "The Complete Journey is simulated, based on real grocery patterns" in text_of(render_description(FOUND))
    mine = replace(FOUND, source="parquet")
    assert "simulated" not in text_of(render_description(mine))


def test_the_same_log_gives_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.html"
    write_description(FOUND, path)
    assert path.read_text(encoding="utf-8") == render_description(describe(TABLES, tiny_config()))


# Plots

SPLITS = {
    "The Complete Journey": [(1, 30), (31, 34), (35, 41), (42, 42), (43, 46), (47, 53)],
    "one period each at the end": [(1, 200), (201, 201), (202, 202), (203, 203), (204, 204), (205, 205)],
    "one period each": [(n, n) for n in range(1, 7)],
    "a gap between all": [(10 * n, 10 * n + 4) for n in range(1, 7)],
}


@pytest.mark.parametrize("spans", SPLITS.values(), ids=SPLITS)
def test_names_of_spans_cover_neither_each_other_nor_a_pole(spans: list[tuple[int, int]]) -> None:
    made = tuple(
        SpanCounts(old.name, first, last, old.start, old.end, 1, 1, None if old.name == "test" else 1, 0, 1, 0)
        for old, (first, last) in zip(FOUND.spans, spans, strict=True)
    )
    drawing = str(conversions_by_period(replace(FOUND, spans=made)))
    flags = []
    for x, y, style, text in re.findall(
        r'<text x="([\d.]+)" y="([\d.]+)" class="(tick|tick end)">([a-z][^<]*)<', drawing
    ):
        width = LETTER * len(text)
        left = float(x) - width if style == "tick end" else float(x)
        flags.append((left, left + width, float(y), text.removesuffix(" (closed)")))
    assert sorted(text for *_, text in flags) == sorted(SPAN_NAMES)
    assert all(left >= 0 and right <= 680 for left, right, *_ in flags)
    for (left, right, y, _), (other_left, other_right, other_y, _) in combinations(flags, 2):
        assert y != other_y or right <= other_left or other_right <= left
    for x, top in re.findall(r'<line x1="([\d.]+)" y1="([\d.]+)" [^>]*class="border"', drawing):
        assert not any(left < float(x) < right and float(top) < y for left, right, y, _ in flags)


def test_many_periods_are_an_area_and_few_are_bars() -> None:
    few = str(conversions_by_period(FOUND))
    assert few.count('class="bar"') == len([period for period in FOUND.periods if period.conversions])
    one = FOUND.periods[-1]
    many = replace(FOUND, periods=tuple(replace(one, period=number) for number in range(1, MAX_BARS + 2)))
    drawn = str(conversions_by_period(many))
    assert 'class="bar"' not in drawn
    assert "<polygon" in drawn


def test_a_line_breaks_where_there_is_no_value() -> None:
    periods = tuple(
        replace(period, targets=0, new_targets=0) if period.period in (3, 5) else period for period in FOUND.periods
    )
    drawn = str(share_of_new(replace(FOUND, periods=periods)))
    assert drawn.count("<polyline") == 2  # periods 1 and 2, and from 6 on
    assert drawn.count("<circle") == 1  # period 4 alone


def test_the_terminal_has_one_letter_a_period_of_the_new_share() -> None:
    line = next(line for line in console_text(FOUND).splitlines() if line.startswith("new to the user by period"))
    bars = line.split()[-1]
    assert len(bars) == len(FOUND.periods)
    assert bars[0] == "█"  # at first every advertiser is new
    assert bars[-1] < bars[0]


@pytest.mark.parametrize("what", LACKING)
def test_the_terminal_may_be_narrow(what: str) -> None:
    assert max(len(line) for line in console_text(without(what), width=80).splitlines()) <= 80
    assert "…" not in console_text(without(what), width=80)
