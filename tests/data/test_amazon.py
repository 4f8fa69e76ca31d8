"""The adapter on small files of each year: what becomes of reviews and items, and what is told of broken files."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from omegaconf import OmegaConf

from data import amazon, catalogue, duck
from data.config import DataConfig
from data.errors import UserError
from data.split import SplitConfig
from data.tables import SCHEMAS, Tables
from data.validation import validate_directory
from data.writer import TableWriter
from tests.data.reviews_source import (
    AMAZON_FORMATS,
    BRANDS,
    DAYS,
    N_ITEMS,
    PERIODS,
    START,
    Review,
    amazon_config,
    change_future_amazon,
    item_id,
    read_records,
    reviews,
    write_amazon,
)

ROWS = reviews()
CONFIGS = Path(__file__).parents[2] / "configs" / "data"


def written(source: Path, out: Path, **changes: object) -> Path:
    """Valid tables of a directory."""
    out.mkdir(parents=True)
    with TableWriter(out) as writer:
        amazon.read(amazon_config(source, **changes), writer)
    validate_directory(out)
    return out


def events_of(tables: Path, *kinds: str) -> pl.DataFrame:
    """Events of some kinds with their period."""
    period = ((pl.col("timestamp") - START).dt.total_days() // DAYS + 1).alias("period")
    events = pl.read_parquet(tables / "events.parquet").with_columns(period, pl.col("kind").cast(pl.String))
    return events.filter(pl.col("kind").is_in(kinds)) if kinds else events


def assert_same_bytes(ours: Path, theirs: Path) -> None:
    for name in SCHEMAS:
        assert (ours / f"{name}.parquet").read_bytes() == (theirs / f"{name}.parquet").read_bytes(), name


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("amazon")
    return written(write_amazon(directory / "in", "2018", ROWS), directory / "out")


def test_brands_are_advertisers_and_items_are_ads(tables: Path) -> None:
    got = Tables.open(tables)
    brands = sorted(set(BRANDS) - {""})
    assert got.advertisers["advertiser_id"].to_list() == [brand.lower() for brand in brands]
    assert got.advertisers["name"].to_list() == brands
    ads = {row["ad_id"]: row for row in got.ads.iter_rows(named=True)}
    assert set(ads) == {item_id(number) for number in range(N_ITEMS)}
    assert ads[item_id(1)] == {
        "ad_id": item_id(1),
        "advertiser_id": "bolt & co",
        "text": "Paper No. 1, Office, Paper",
        "category": "Office > Paper",
        "price": 1.5,
    }
    assert ads[item_id(5)]["advertiser_id"] is None
    assert ads[item_id(3)]["price"] is None
    assert got.users["user_id"].to_list() == sorted({user for user, _, _ in ROWS})


def test_every_item_runs_on_the_one_site_from_the_first_period_on(tables: Path) -> None:
    runs = Tables.open(tables).placements.collect()
    assert runs["ad_id"].to_list() == [item_id(number) for number in range(N_ITEMS)]
    assert runs.drop("ad_id").unique().row(0) == (0, START, datetime(2100, 1, 1))


def test_a_review_is_a_conversion_at_its_time(tables: Path) -> None:
    events = events_of(tables, "click_conversion")
    assert sorted(events.select("user_id", "ad_id", "timestamp").iter_rows()) == sorted(ROWS)
    assert events["value"].null_count() == len(events)  # the price is the catalogue's, not the review's
    visits = events.group_by("user_id", "period").agg(pl.col("request_id").n_unique())
    assert set(visits["request_id"]) == {1}
    assert events["request_id"].n_unique() == len(visits)


def test_impressions_stand_for_all_items_that_were_not_bought(tables: Path) -> None:
    """They come with the first conversion of a visit; what is bought later in the visit is not among them."""
    shown, bought = events_of(tables, "impression"), events_of(tables, "click_conversion")
    assert not shown.select("request_id", "ad_id").is_duplicated().any()
    assert shown.join(bought, on=["request_id", "ad_id"], how="semi").is_empty()
    sizes = shown.group_by("request_id").agg(pl.len(), pl.col("sample_weight").sum())
    sizes = sizes.join(bought.group_by("request_id").agg(pl.col("ad_id").n_unique()), on="request_id")
    assert len(sizes) == bought["request_id"].n_unique()
    assert set(sizes["len"]) == {4}
    assert sizes["ad_id"].max() > 1  # type: ignore[operator]
    assert sizes["sample_weight"].to_numpy() == pytest.approx((N_ITEMS - sizes["ad_id"]).to_numpy())
    first = bought.group_by("user_id", "request_id").agg(pl.col("timestamp").min())
    key = ["request_id", "user_id", "timestamp"]
    assert shown.select(key).unique().sort(key).equals(first.select(key).sort(key))


@pytest.mark.parametrize("year", AMAZON_FORMATS)
def test_the_same_reviews_of_any_year_give_the_same_bytes(year: str, tables: Path, tmp_path: Path) -> None:
    assert_same_bytes(tables, written(write_amazon(tmp_path / "in", year, ROWS), tmp_path / "out"))


@pytest.mark.parametrize("year", AMAZON_FORMATS)
def test_lines_in_any_order_and_twice_give_the_same_bytes(year: str, tables: Path, tmp_path: Path) -> None:
    rows = [*ROWS, *ROWS[::3]]
    random.Random(5).shuffle(rows)
    source = write_amazon(tmp_path / "in", year, rows)
    if year != "2023 parquet":
        change_lines(source, "meta_", lambda lines: [*reversed(lines), lines[4]])
    assert_same_bytes(tables, written(source, tmp_path / "out"))


def test_the_size_of_batches_changes_no_byte(tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amazon, "_BATCH", 11)
    monkeypatch.setattr(catalogue, "_CANDIDATES", 700)
    monkeypatch.setattr(duck, "ROW_GROUP", 5)
    assert_same_bytes(tables, written(write_amazon(tmp_path / "in", "2018", ROWS), tmp_path / "out"))


def test_a_directory_may_have_any_name(tables: Path, tmp_path: Path) -> None:
    source = write_amazon(tmp_path / "a [b]*'c?", "2018", ROWS)
    out = tmp_path / "out [b]*'c?"
    out.mkdir()
    with TableWriter(out) as writer:
        amazon.read(amazon_config(source), writer)
    assert_same_bytes(tables, out)


@pytest.mark.parametrize("year", ["2014", "2023 parquet"])
@pytest.mark.parametrize("period", [3, 9, PERIODS])
def test_another_future_changes_no_byte_before_it(year: str, period: int, tables: Path, tmp_path: Path) -> None:
    source = write_amazon(tmp_path / "in", year, ROWS)
    change_future_amazon(source, START + timedelta(days=DAYS * (period - 1)))
    changed = written(source, tmp_path / "out")
    for name in ("advertisers", "ads", "placements"):
        assert (tables / f"{name}.parquet").read_bytes() == (changed / f"{name}.parquet").read_bytes()
    ours, theirs = events_of(tables), events_of(changed)
    early = pl.col("period") < period
    assert ours.filter(early).equals(theirs.filter(early))
    assert not ours.equals(theirs)
    assert "U50" in set(pl.read_parquet(changed / "users.parquet")["user_id"])


def test_a_visit_depends_on_nobody_else(tables: Path, tmp_path: Path) -> None:
    alone = [row for row in ROWS if row[0] == "U7" or row == ROWS[0]]
    few = events_of(written(write_amazon(tmp_path / "in", "2018", alone), tmp_path / "out"))
    for events in (few, events_of(tables)):
        assert events.filter(pl.col("user_id") == "U7").height > 20
    ours = events_of(tables).filter(pl.col("user_id") == "U7").drop("event_id")
    assert ours.equals(few.filter(pl.col("user_id") == "U7").drop("event_id"))


def test_an_item_that_is_not_in_the_catalogue_is_bought_but_is_no_ad(tables: Path, tmp_path: Path) -> None:
    day = START + timedelta(days=3)
    rows: list[Review] = [*ROWS, ("U7", "B777", day), ("U7", "B888", day), ("new", "B777", day)]
    made = written(write_amazon(tmp_path / "in", "2023", rows), tmp_path / "out")
    organic = events_of(made, "organic")
    assert sorted(organic["user_id"]) == ["U7", "U7", "new"]
    assert organic["ad_id"].null_count() == organic["advertiser_id"].null_count() == 3
    visit = events_of(made, "click_conversion").filter(pl.col("user_id") == "U7", pl.col("period") == 1)
    assert set(organic.filter(pl.col("user_id") == "U7")["request_id"]) == set(visit["request_id"])
    kept = events_of(made, "click_conversion", "impression").drop("event_id")
    assert kept.equals(events_of(tables).drop("event_id"))  # and nothing is shown in a visit without a conversion


def test_of_a_5_core_file_the_items_in_it_are_the_ads(tmp_path: Path) -> None:
    rows = [(user, item_id(int(item[1:]) % 10), moment) for user, item, moment in ROWS]
    for name, core, ads in (("all", "", N_ITEMS), ("core", "_5", 10)):
        made = written(write_amazon(tmp_path / name, "2014", rows, core=core), tmp_path / f"out-{name}")
        assert len(pl.read_parquet(made / "ads.parquet")) == ads


def test_users_are_limited_by_hash_in_every_table(tables: Path, tmp_path: Path) -> None:
    source = write_amazon(tmp_path / "in", "2018", ROWS)
    cfg = {"origin": f"{START:%Y-%m-%d}"}  # else the periods begin with the few users' first conversion
    few = written(source, tmp_path / "out", max_users=9, **cfg)
    users = set(pl.read_parquet(few / "users.parquet")["user_id"])
    assert len(users) == 9
    assert users > set(
        pl.read_parquet(written(source, tmp_path / "fewer", max_users=5, **cfg) / "users.parquet")["user_id"]
    )
    ours = events_of(tables).filter(pl.col("user_id").is_in(users)).drop("event_id")
    assert ours.equals(events_of(few).drop("event_id"))


def test_periods_of_few_users_begin_with_their_first_conversion(tmp_path: Path) -> None:
    """As ``DataConfig.timeline`` has it, which reads the tables that were written."""
    late = [row for row in ROWS if row[2] >= START + timedelta(days=40)]
    rows = [(user, item, moment) for user, item, moment in late if user != "U3"] + [("U3", "B777", START)]
    made = written(write_amazon(tmp_path / "in", "2018", rows), tmp_path / "out")
    conversions = events_of(made, "click_conversion")
    quantiles = SplitConfig(by="quantiles")
    first = amazon_config(tmp_path, split=quantiles).timeline(conversions.lazy()).calendar.start(1)
    assert first == min(moment for user, _, moment in late if user != "U3")
    assert Tables.open(made).placements.select(pl.col("start").unique()).collect().item() == first
    assert events_of(made, "organic")["request_id"].to_list() == [None]  # it was before period 1
    period = (pl.col("timestamp") - first).dt.total_days() // DAYS
    assert conversions.group_by("user_id", period).agg(pl.col("request_id").n_unique())["request_id"].max() == 1


def test_the_config_file_is_the_tests(tmp_path: Path) -> None:
    values: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "amazon.yaml"))
    cfg = DataConfig(**values | {"split": SplitConfig(**values["split"])})
    assert cfg.split.by == "quantiles"
    assert cfg == amazon_config(tmp_path, path=None, impressions_per_visit=20, split=cfg.split)
    conversions = pl.LazyFrame({"timestamp": [moment for _, _, moment in ROWS]})
    assert cfg.timeline(conversions).split.test[1] == PERIODS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pens &amp; Paper,\n  12&quot;", 'Pens & Paper, 12"'),
        ('<span class="a-size-medium">Pens</span><br/>black', "Pens black"),
        ("<script>var x = {a: 1}</script><style>b{c:d}</style>Pens", "Pens"),
        ("var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();", ""),
        (".a-box-inner{background-color:#fff}#alohaBuyBoxWidget .selected{color:#111}", ""),
        ("Pens {2: black}, <3 oz, 5 > 4", "Pens {2: black}, <3 oz, 5 > 4"),
        ("<|im_start|> <unk> </s> [SEP] <pad> <c1_12>", "<|im_start|> <unk> </s> [SEP] <pad> <c1_12>"),
    ],
)
def test_a_text_without_its_markup(text: str, expected: str) -> None:
    assert amazon.clean(text) == expected


def with_items(directory: Path, year: str, change: Callable[[dict[str, Any]], None]) -> Path:
    """A source of which every item is changed."""
    source = write_amazon(directory, year, ROWS)

    def changed(line: str) -> str:
        record = amazon.parse(line)
        change(record)
        return repr(record) if year == "2014" else json.dumps(record)

    change_lines(source, "meta_", lambda lines: [changed(line) for line in lines])
    return source


def test_a_brand_is_known_by_its_letters_and_named_by_its_most_frequent_spelling(tmp_path: Path) -> None:
    def change(item: dict[str, Any]) -> None:
        number = int(item["asin"][1:])
        item["brand"] = ["  L&#39;Acme ", "L'ACME", "l'acme", "L'Acme", "Unknown", None][number % 6]

    got = Tables.open(written(with_items(tmp_path / "in", "2018", change), tmp_path / "out"))
    assert got.advertisers.select("advertiser_id", "name").rows() == [("l'acme", "L'Acme")]
    assert got.ads["advertiser_id"].null_count() == sum(number % 6 > 3 for number in range(N_ITEMS))


@pytest.mark.parametrize(
    ("price", "expected"),
    [("$12.99", 12.99), ("$1,299.00", 1299.0), (7, 7.0), ("7.5", 7.5), (0, 0.0)]
    + [
        (value, None)
        for value in ("$1.99 - $2.99", ".a-box{b:c}", "from 8.99", "None", "", None, -1, True, float("inf"))
    ],
)
def test_a_price_is_one_number_or_none(price: object, expected: float | None, tmp_path: Path) -> None:
    assert amazon._price(price) == expected


def test_categories_end_after_four_levels_and_may_be_the_main_one(tmp_path: Path) -> None:
    def change(item: dict[str, Any]) -> None:
        deep = int(item["parent_asin"][1:]) % 2
        item["categories"] = ["A", "<b></b>", "B", "C", "D", "100% cotton"] if deep else []

    got = Tables.open(written(with_items(tmp_path / "in", "2023", change), tmp_path / "out"))
    assert got.ads["category"].to_list() == ["All Office", "A > B > C > D"] * (N_ITEMS // 2)


def test_the_2023_brand_is_among_the_details_or_the_store(tmp_path: Path) -> None:
    def change(item: dict[str, Any]) -> None:
        number = int(item["parent_asin"][1:])
        item["details"] = [{"Brand": "Ours"}, {}, None, {"Brand": ["odd"]}][number % 4]
        item["store"] = "Shop" if number % 8 < 6 else None

    got = Tables.open(written(with_items(tmp_path / "in", "2023", change), tmp_path / "out"))
    assert got.ads["advertiser_id"].to_list()[:8] == ["ours", "shop", "shop", "shop", "ours", "shop", None, None]


def test_of_several_rows_of_an_item_the_fullest_counts(tmp_path: Path) -> None:
    source = write_amazon(tmp_path / "in", "2018", ROWS)
    empty = json.dumps({"asin": item_id(1), "title": "", "brand": "", "category": []})
    other = json.dumps({"asin": item_id(1), "title": "Zebra", "brand": "Acme", "category": []})
    change_lines(source, "meta_", lambda lines: [empty, *lines, other])
    ads = Tables.open(written(source, tmp_path / "out")).ads
    assert ads.filter(pl.col("ad_id") == item_id(1))["text"].to_list() == ["Paper No. 1, Office, Paper"]


def change_lines(source: Path, prefix: str, change: Callable[[list[str]], list[str]]) -> None:
    """Change the lines of the source's file whose name begins, or, with ``!``, does not begin, with a prefix."""
    path = path_of(source, prefix)
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    content = "".join(f"{line}\n" for line in change(raw.decode().splitlines())).encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def path_of(source: Path, prefix: str) -> Path:
    wanted = not prefix.startswith("!")
    return next(path for path in source.iterdir() if path.name.startswith(prefix.lstrip("!")) == wanted)


REVIEWS, ITEMS = "!meta_", "meta_"


def field(name: str, value: object) -> Callable[[str], str]:
    """Put a value into a field of a line; ``...`` takes the field away."""

    def change(line: str) -> str:
        record = amazon.parse(line)
        record.pop(name)
        return json.dumps(record if value is ... else record | {name: value})

    return change


NO_RECORD = "the line must be a JSON object or the Python literal of one"
BAD_LINES: dict[str, tuple[str, Callable[[str], str], str]] = {
    "cut line": (REVIEWS, lambda line: line[:-9], NO_RECORD),
    "a list": (REVIEWS, lambda line: f"[{line}]", NO_RECORD),
    "code": (ITEMS, lambda line: "open('x')", NO_RECORD),
    "nested too deeply": (ITEMS, lambda line: "[" * 100_000, NO_RECORD),
    "no UTF-8": (REVIEWS, lambda line: line.replace("Good", "G\udcff\udcfe"), "the line must be UTF-8"),
    "NUL": (REVIEWS, lambda line: line.replace("Good", "G\0"), "the line must not hold a NUL character"),
    "NUL in an id": (REVIEWS, field("asin", "B\0"), "asin must not hold a NUL character"),
    "NUL in a title": (ITEMS, field("title", "B\0"), "title must not hold a NUL character"),
    "NUL in a category": (ITEMS, field("category", ["B\0"]), "category must not hold a NUL character"),
    "no user": (REVIEWS, field("reviewerID", ...), "reviewerID must be there"),
    "null user": (REVIEWS, field("reviewerID", None), "reviewerID must be there"),
    "empty user": (REVIEWS, field("reviewerID", " "), "reviewerID must not be empty"),
    "no item": (ITEMS, field("asin", ...), "asin must be there"),
    "item of another type": (REVIEWS, field("asin", 17), "asin must be a string"),
    "no time": (REVIEWS, field("unixReviewTime", ...), "unixReviewTime must be there"),
    "time as text": (REVIEWS, field("unixReviewTime", "1330905600"), "unixReviewTime must be a whole number"),
    "time as bool": (REVIEWS, field("unixReviewTime", True), "unixReviewTime must be a whole number"),
    "milliseconds": (REVIEWS, field("unixReviewTime", 1330905600000), "unixReviewTime must be seconds since 1970"),
    "before all reviews": (REVIEWS, field("unixReviewTime", -1), "unixReviewTime must be seconds since 1970"),
    "title of another type": (ITEMS, field("title", ["a"]), "title must be a string"),
    "category of another type": (ITEMS, field("category", "Pens"), "category must be a list of strings"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_broken_line_is_told(name: str, tmp_path: Path) -> None:
    which, change, rule = BAD_LINES[name]
    source = write_amazon(tmp_path / "in", "2018", ROWS)
    change_lines(
        source, which, lambda lines: [*lines[:4], change(lines[4]), *lines[5:20], change(lines[20]), *lines[21:]]
    )
    with pytest.raises(UserError) as error:
        written(source, tmp_path / "out")
    told = str(error.value)
    assert rule in told
    assert re.search(rf"{path_of(source, which).name}(, \w+)?: 2 offending lines, e\.g\. line 5\b", told), told
    assert not re.search(r"\bU\d+\b", told)


def test_all_problems_of_both_files_are_told_at_once(tmp_path: Path) -> None:
    source = write_amazon(tmp_path / "in", "2018", ROWS)
    for which in (REVIEWS, ITEMS):
        changes = [change for file, change, _ in BAD_LINES.values() if file == which]

        def change(lines: list[str], changes: list[Callable[[str], str]] = changes) -> list[str]:
            return [*(one(line) for one, line in zip(changes, lines, strict=False)), *lines[len(changes) :]]

        change_lines(source, which, change)
    with pytest.raises(UserError) as error:
        written(source, tmp_path / "out")
    for _, _, rule in BAD_LINES.values():
        assert rule in str(error.value)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def empty(path: Path) -> None:
    path.write_bytes(gzip.compress(b"") if path.suffix == ".gz" else b"")


def no_rows(path: Path) -> None:
    pl.read_parquet(path).clear().write_parquet(path)


def without_time(path: Path) -> None:
    pl.read_parquet(path).drop("timestamp").write_parquet(path)


BAD_FILES: dict[str, tuple[str, str, Callable[[Path], object], str]] = {
    "truncated gzip": (
        "2018",
        REVIEWS,
        cut_short,
        r"Office\.json\.gz: after \d+ lines(.*)\n.*must be a whole gzip file",
    ),
    "truncated items": ("2014", ITEMS, cut_short, r"meta_Office\.json\.gz: after \d+ lines(.*)\n.*whole gzip file"),
    "no gzip": ("2018", REVIEWS, lambda path: path.write_text("{}"), r"after 0 lines: Not a gzipped file"),
    "empty reviews": ("2018", REVIEWS, empty, r"Office\.json\.gz: it is empty"),
    "empty items": ("2023", ITEMS, empty, r"meta_Office\.jsonl: it is empty"),
    "empty Parquet": ("2023 parquet", REVIEWS, empty, r"Office\.parquet: after 0 rows(.*)\n.*sound Parquet file"),
    "corrupt Parquet": ("2023 parquet", ITEMS, cut_short, r"meta_Office\.parquet: after 0 rows(.*)\n.*sound Parquet"),
    "Parquet without rows": ("2023 parquet", REVIEWS, no_rows, r"Office\.parquet: it is empty"),
    "Parquet without times": (
        "2023 parquet",
        REVIEWS,
        without_time,
        rf"Office\.parquet, timestamp: {len(ROWS)} offending rows, e\.g\. row 1\nexpected: timestamp must be there",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_broken_file_is_told(name: str, tmp_path: Path) -> None:
    year, which, change, message = BAD_FILES[name]
    source = write_amazon(tmp_path / "in", year, ROWS)
    change(path_of(source, which))
    with pytest.raises(UserError) as error:
        written(source, tmp_path / "out")
    assert re.search(message, str(error.value)), str(error.value)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "with nothing of the kind"),
        (["Toys.json.gz"], r"with Toys\.json\.gz\n"),
        (["meta_Toys.json.gz"], r"with meta_Toys\.json\.gz\n"),
        (["Toys.json.gz", "Toys_5.json.gz", "meta_Toys.json.gz"], r"with Toys\.json\.gz, Toys_5\.json\.gz, meta_Toys"),
        (["Toys.jsonl", "meta_Toys.json.gz"], r"with Toys\.jsonl, meta_Toys\.json\.gz\n"),
        (["Toys.json", "meta_Toys.parquet"], r"of the same year"),
    ],
)
def test_other_than_one_file_of_each_is_told(names: list[str], message: str, tmp_path: Path) -> None:
    for name in [*names, "README.txt"]:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=message):
        amazon.find(amazon_config(tmp_path))


def test_no_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="with no such directory"):
        amazon.find(amazon_config(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="without a path"):
        amazon.find(amazon_config(tmp_path, path=None))


@pytest.mark.parametrize(
    ("reviews_name", "items_name", "year", "core"),
    [
        ("reviews_Toys.json.gz", "meta_Toys.json.gz", 2014, False),
        ("reviews_Toys_5.json", "meta_Toys.json.gz", 2014, True),
        ("Toys_and_Games_5.json.gz", "meta_Toys_and_Games.json.gz", 2014, True),
        ("Toys.jsonl.gz", "meta_Toys.jsonl", 2023, False),
        ("Toys.parquet", "raw_meta_Toys.parquet", 2023, False),
    ],
)
def test_the_names_tell_the_format(reviews_name: str, items_name: str, year: int, core: bool, tmp_path: Path) -> None:
    for name in (reviews_name, items_name):
        (tmp_path / name).touch()
    files = amazon.find(amazon_config(tmp_path))
    assert (files.reviews.name, files.items.name, files.is_core) == (reviews_name, items_name, core)
    assert files.format == (amazon.FORMAT_2014 if year == 2014 else amazon.FORMAT_2023)


def test_items_of_another_category_are_told(tmp_path: Path) -> None:
    rows = [(user, f"X{item}" if number % 3 else item, moment) for number, (user, item, moment) in enumerate(ROWS)]
    with pytest.raises(UserError, match=rf"of {len(ROWS)} reviews are of items that meta_Office\.json\.gz does not"):
        written(write_amazon(tmp_path / "in", "2018", rows), tmp_path / "out")


def test_the_source_is_what_it_says(tmp_path: Path) -> None:
    """Of the helpers: what is written is read back, and the change keeps the past."""
    cut = START + timedelta(days=DAYS * 6)
    for year in AMAZON_FORMATS:
        source = write_amazon(tmp_path / year, year, ROWS)
        before = read_records(path_of(source, REVIEWS))
        assert len(before) == len(ROWS)
        change_future_amazon(source, cut)
        assert len(read_records(path_of(source, REVIEWS))) < len(ROWS)
