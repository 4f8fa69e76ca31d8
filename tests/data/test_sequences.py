"""The adapter on small files: when events take place, what becomes of items, and what is told of broken files."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data import sequences
from data.config import DataConfig
from data.errors import UserError
from data.sampling import choose_users
from data.split import SplitConfig, TimeSplit
from data.tables import SCHEMAS, Tables
from data.validation import validate_directory
from data.writer import TableWriter
from tests.data.reviews_source import (
    BRANDS,
    N_ITEMS,
    change_future_sequences,
    item_id,
    sequences_config,
    write_sequences,
)
from tests.data.reviews_source import sequences as small_sequences

ROWS = small_sequences()
CONFIGS = Path(__file__).parents[2] / "configs" / "data"
SHARED = os.environ.get("ADSID_SHARED_DATA")
ORIGIN = datetime(2000, 1, 1)


def written(source: Path, out: Path, **changes: object) -> Path:
    """Valid tables of a directory."""
    out.mkdir(parents=True)
    with TableWriter(out) as writer:
        sequences.read(sequences_config(source, **changes), writer)
    validate_directory(out)
    return out


def events_of(tables: Path) -> pl.DataFrame:
    """Events with their period."""
    period = ((pl.col("timestamp") - ORIGIN).dt.total_days() + 1).alias("period")
    return pl.read_parquet(tables / "events.parquet").with_columns(period)


def conversions_of(tables: Path) -> pl.DataFrame:
    return events_of(tables).filter(pl.col("kind") == "click_conversion")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sequences(tmp_path_factory.mktemp("sequences"), ROWS)


@pytest.fixture(scope="module")
def tables(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(source, tmp_path_factory.mktemp("out") / "tables")


def test_brands_are_advertisers_and_items_are_ads(tables: Path) -> None:
    got = Tables.open(tables)
    assert got.advertisers["advertiser_id"].to_list() == sorted(set(BRANDS) - {""})
    assert got.advertisers["name"].to_list() == got.advertisers["advertiser_id"].to_list()
    ads = {row["ad_id"]: row for row in got.ads.iter_rows(named=True)}
    assert set(ads) == {item_id(number) for number in range(N_ITEMS)}  # those that nobody had, too
    assert ads[item_id(0)] == {
        "ad_id": item_id(0),
        "advertiser_id": "Acme",
        "text": "Pens No. 0, Office, Pens",
        "category": "Office > Pens",
        "description": "The pens you want, 0",
    }
    assert ads[item_id(5)]["advertiser_id"] is None
    assert (ads[item_id(7)]["text"], ads[item_id(7)]["category"]) == ("Labels No. 7", None)
    runs = got.placements.select(pl.struct("market_id", "start", "end").unique()).collect().to_series().to_list()
    assert runs == [{"market_id": 0, "start": ORIGIN, "end": datetime(2100, 1, 1)}]
    assert got.placements.select(pl.col("ad_id").n_unique()).collect().item() == N_ITEMS


def test_what_an_advertiser_sells_in_words(tables: Path) -> None:
    texts = dict(Tables.open(tables).advertisers.select("advertiser_id", "text").iter_rows())
    phrases = texts["Bolt & Co"].split(", ")
    assert phrases[:2] == ["paper", "labels"]  # the most items first
    assert set(phrases[2:]) < {f"{good} No. {number}" for number in range(N_ITEMS) for good in ("Paper", "Labels")}
    assert all(len(text.split(", ")) <= 12 for text in texts.values())


def test_every_interaction_is_a_conversion_in_its_order(tables: Path) -> None:
    conversions = conversions_of(tables)
    got = {user: rows["ad_id"].to_list() for (user,), rows in conversions.sort("period").group_by("user_id")}
    assert got == ROWS
    brands = {item_id(number): BRANDS[number % len(BRANDS)] or None for number in range(N_ITEMS)}
    assert conversions["advertiser_id"].to_list() == [brands[item] for item in conversions["ad_id"]]


def test_impressions_stand_for_all_items_that_were_not_bought(tables: Path) -> None:
    events = events_of(tables)
    shown, bought = (events.filter(pl.col("kind") == kind) for kind in ("impression", "click_conversion"))
    assert not shown.select("request_id", "ad_id").is_duplicated().any()
    assert shown.join(bought, on=["request_id", "ad_id"], how="semi").is_empty()
    visit = ["request_id", "user_id", "timestamp"]
    assert shown.select(visit).unique().sort(visit).equals(bought.select(visit).sort(visit))
    sizes = shown.group_by("request_id").agg(pl.len(), pl.col("sample_weight").sum())
    assert set(sizes["len"]) == {4}
    assert sizes["sample_weight"].to_numpy() == pytest.approx(N_ITEMS - 1)


@st.composite
def any_sequences(draw: st.DrawFn) -> dict[str, list[str]]:
    users = draw(st.lists(st.text("abü1_-", min_size=1, max_size=6), min_size=1, max_size=12, unique=True))
    numbers = st.lists(st.integers(0, N_ITEMS - 1), min_size=1, max_size=15)
    return {user: [item_id(number) for number in draw(numbers)] for user in users}


@given(any_sequences())
@settings(max_examples=25, deadline=None)
def test_the_last_is_the_test_and_no_period_holds_two_events_of_a_user(rows: dict[str, list[str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        conversions = conversions_of(written(write_sequences(Path(directory) / "in", rows), Path(directory) / "out"))
    last = max(6, max(map(len, rows.values())) + 2)
    assert conversions["period"].min() >= 1  # type: ignore[operator]
    for (user,), events in conversions.sort("period").group_by("user_id"):
        periods = events["period"].to_list()
        assert events["ad_id"].to_list() == rows[str(user)]
        assert periods == sorted(set(periods))
        expected = [{last}, {last - 1}, {last - 2, last - 3}, {last - 4, last - 5}]
        expected += [{last - 1 - k} for k in range(5, len(periods) + 1)]
        assert all(period in allowed for period, allowed in zip(reversed(periods), expected, strict=False))


def test_spans_hold_what_the_docstring_says(tmp_path: Path) -> None:
    """Of 2,000 users one in ten stops the ranker and one in ten chooses the prior; the two choices are independent."""
    rows = {f"user-{user}": [item_id(0)] * (5 + user % 3) for user in range(2000)}
    source = write_sequences(tmp_path / "in", rows)
    conversions = conversions_of(written(source, tmp_path / "out", impressions_per_visit=1))
    split = sequences_config(source).timeline(conversions.lazy()).split
    last = 9
    assert split == TimeSplit(
        prior_fit=(1, last - 5),
        prior_select=(last - 4, last - 4),
        ranker_fit=(last - 3, last - 3),
        ranker_stop=(last - 2, last - 2),
        validation=(last - 1, last - 1),
        test=(last, last),
    )
    of_span = {
        name: set(conversions.filter(pl.col("period").is_between(*span))["user_id"])
        for name, span in split.spans().items()
    }
    everybody = set(rows)
    assert of_span["test"] == of_span["validation"] == of_span["prior_fit"] == everybody
    assert of_span["ranker_stop"] == everybody - of_span["ranker_fit"]
    for name in ("ranker_stop", "prior_select"):
        assert len(of_span[name]) / 2000 == pytest.approx(0.1, abs=0.03)
    assert len(of_span["ranker_stop"] & of_span["prior_select"]) / 2000 == pytest.approx(0.01, abs=0.01)


def test_another_last_item_changes_no_byte_before_it(tables: Path, tmp_path: Path) -> None:
    source = write_sequences(tmp_path / "in", ROWS)
    change_future_sequences(source)
    changed = written(source, tmp_path / "out")
    for name in ("advertisers", "ads", "users", "placements"):
        assert (tables / f"{name}.parquet").read_bytes() == (changed / f"{name}.parquet").read_bytes()
    ours, theirs = events_of(tables), events_of(changed)
    before = pl.col("period") < ours["period"].max()
    assert ours.filter(before).equals(theirs.filter(before))
    last = [conversions_of(made).filter(~before)["ad_id"] for made in (tables, changed)]
    assert (last[0] != last[1]).sum() > len(ROWS) / 2


def test_lines_in_any_order_give_the_same_bytes(tables: Path, tmp_path: Path) -> None:
    source = write_sequences(tmp_path / "in", dict(reversed(ROWS.items())))
    header, *items = (source / "items.tsv").read_text(encoding="utf-8").splitlines()
    (source / "items.tsv").write_text("\r\n".join([header, *reversed(items)]), encoding="utf-8")
    shuffled = written(source, tmp_path / "out")
    for name in SCHEMAS:
        assert (tables / f"{name}.parquet").read_bytes() == (shuffled / f"{name}.parquet").read_bytes()


def test_users_are_limited_by_hash_and_their_events_stay_where_they_were(tables: Path, tmp_path: Path) -> None:
    few = written(write_sequences(tmp_path / "in", ROWS), tmp_path / "out", max_users=9)
    users = pl.read_parquet(few / "users.parquet")["user_id"]
    assert users.to_list() == choose_users(pl.Series(list(ROWS)), 9, seed=0).to_list()
    ours = events_of(tables).filter(pl.col("user_id").is_in(users.implode())).drop("event_id")
    assert ours.equals(events_of(few).drop("event_id"))
    for name in ("advertisers", "ads", "placements"):
        assert (tables / f"{name}.parquet").read_bytes() == (few / f"{name}.parquet").read_bytes()


def test_texts_stay_as_they_are(tmp_path: Path) -> None:
    source = write_sequences(tmp_path / "in", {"u": ["1"] * 5})
    title = 'a <|endoftext|> "pen" </s> <unk> &amp; \u2028 [MASK] \x0b 1'
    (source / "items.tsv").write_text(f"\ufeffitem_id\tbrand\tcategories\ttitle\n1\t B \t\t{title}\n", encoding="utf-8")
    got = Tables.open(written(source, tmp_path / "out"))
    assert got.ads["text"].to_list() == [title]
    assert got.ads["advertiser_id"].to_list() == ["B"]


def test_the_config_file_is_the_tests(tmp_path: Path) -> None:
    values: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "sequences.yaml"))
    cfg = DataConfig(**values | {"split": SplitConfig(**values["split"])})
    assert cfg == sequences_config(tmp_path, path=None, impressions_per_visit=20)


def replaced(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = (directory / name).read_bytes()
        encoded = new.encode("latin-1")
        assert old.encode() in content
        (directory / name).write_bytes(content.replace(old.encode(), encoded, 1))

    return change


def with_content(name: str, content: str) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        (directory / name).write_text(content, encoding="utf-8")

    return change


def without(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


BAD = {
    "no sequences": (without("sequences.txt"), r"without sequences\.txt\n"),
    "no items": (without("items.tsv"), r"without items\.tsv\n"),
    "empty sequences": (
        with_content("sequences.txt", ""),
        r"sequences\.txt: it is empty\nexpected: the file",
    ),
    "empty items": (with_content("items.tsv", ""), r"items\.tsv: it is empty"),
    "header alone": (
        with_content("items.tsv", "item_id\tbrand\tcategories\ttitle\n"),
        r"items\.tsv: it has a header alone",
    ),
    "unknown item": (
        replaced("sequences.txt", item_id(3), "B77"),
        r"sequences\.txt, item: 1 offending line, e\.g\. line \d+\nexpected: item must be an item_id of items\.tsv",
    ),
    "user twice": (
        replaced("sequences.txt", "u5 ", "u4 "),
        r"sequences\.txt, user: 1 offending line, e\.g\. line 6\nexpected: user must be unique",
    ),
    "user alone": (
        replaced("sequences.txt", "u1 ", "lonely\n\nu1 "),
        r"sequences\.txt: 2 offending lines, e\.g\. line 2\nexpected: the line must be a user and at least one item",
    ),
    "no UTF-8": (
        replaced("sequences.txt", "u8 ", "u\xff8 "),
        r"sequences\.txt: 1 offending line, e\.g\. line 9: b'\\xff'\nexpected: the line must be UTF-8",
    ),
    "NUL in a title": (
        replaced("items.tsv", "Staplers No. 2\t", "Staplers\0No. 2\t"),
        r"items\.tsv: 1 offending line, e\.g\. line 4\nexpected: the line must not hold a NUL",
    ),
    "shifted columns": (
        replaced("items.tsv", "\tPens No. 4", "\tPens\tNo. 4"),
        r"items\.tsv: 1 offending line, e\.g\. line 6: 6\nexpected: the line must have 5 fields",
    ),
    "columns missing in a line": (
        replaced("items.tsv", "\tPens No. 4\t", " "),
        r"items\.tsv: 1 offending line, e\.g\. line 6: 3\nexpected: the line must have 5 fields",
    ),
    "item twice": (
        replaced("items.tsv", item_id(9), item_id(8)),
        rf"items\.tsv, item_id: 1 offending line, e\.g\. line 11: '{item_id(8)}'\nexpected: item_id must be unique",
    ),
    "item without id": (
        replaced("items.tsv", item_id(9), ""),
        r"items\.tsv, item_id: 1 offending line, e\.g\. line 11: ''\nexpected: item_id must be an id without blanks",
    ),
    "missing column": (
        replaced("items.tsv", "item_id\tbrand\tcategories", "item_id\tmaker\tpath"),
        r"items\.tsv, brand: it has item_id, maker(?s:.*)items\.tsv, categories: it has item_id, maker",
    ),
    "column twice": (
        replaced("items.tsv", "description\n", "title\n"),
        r"items\.tsv, title: it has(.*)\nexpected: title must name every column, each once",
    ),
    "reserved column": (
        replaced("items.tsv", "description\n", "advertiser_id\n"),
        r"items\.tsv, advertiser_id: it has(.*)\nexpected: advertiser_id must not be a column",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_broken_file_is_told_with_its_lines(name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    change(write_sequences(tmp_path / "in", ROWS))
    with pytest.raises(UserError) as error:
        written(tmp_path / "in", tmp_path / "out")
    assert re.search(message, str(error.value)), str(error.value)
    assert not re.search(r"\bu\d+\b|lonely", str(error.value).replace(str(tmp_path), ""))


def test_all_problems_of_both_files_are_told_at_once(tmp_path: Path) -> None:
    source = write_sequences(tmp_path / "in", ROWS)
    for name in ("user twice", "user alone", "no UTF-8", "shifted columns", "NUL in a title", "item twice"):
        BAD[name][0](source)
    with pytest.raises(UserError) as error:
        written(source, tmp_path / "out")
    assert str(error.value).count("what to do") >= 6
    for name in ("user twice", "no UTF-8", "item twice"):
        rule = BAD[name][1].rpartition("expected: ")[2]
        assert re.search(rule, str(error.value)), rule


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": None}, "without a path"),
        ({"path": "/nowhere"}, "without sequences.txt and items.tsv"),
        ({"label_window_days": 10_000}, "a sequence of 12 items"),
    ],
)
def test_a_wrong_config_is_told(changes: dict[str, object], message: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        written(source, tmp_path / "out", **changes)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED, reason="ADSID_SHARED_DATA names no directory with amazon_beauty and amazon_office")
@pytest.mark.parametrize(
    ("name", "users", "items", "interactions", "advertisers", "branded"),
    [("amazon_beauty", 22_363, 12_101, 198_502, 433, 7_454), ("amazon_office", 3_231, 3_459, 21_802, 777, 3_454)],
)
def test_published_figures(
    name: str, users: int, items: int, interactions: int, advertisers: int, branded: int, tmp_path: Path
) -> None:
    """Of the description beside the data, which counts the empty brand of Office among its 778."""
    made = written(Path(SHARED or "") / name, tmp_path / "out", impressions_per_visit=1)
    got = Tables.open(made)
    assert (len(got.users), len(got.ads), len(got.advertisers)) == (users, items, advertisers)
    assert got.ads["advertiser_id"].count() == branded
    assert len(conversions_of(made)) == interactions
