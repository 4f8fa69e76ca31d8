"""Each rule of the five tables, broken one at a time, at random, and all at once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import validation
from data.errors import UserError
from data.tables import KINDS, SCHEMAS, Tables
from data.validation import Problem, validate, validate_directory
from data.validation import find_problems as find_problems_in
from data.writer import write_tables
from tests.logs import tiny_tables

SOUND = tiny_tables(n_users=8, n_advertisers=10, n_ads=40, n_markets=2)
Frames = dict[str, pl.DataFrame]


def frames() -> Frames:
    return {schema.name: frame.collect() for schema, frame in SOUND}


def tables_of(parts: Frames) -> Tables:
    return Tables(
        parts["advertisers"], parts["ads"], parts["users"], parts["events"].lazy(), parts["placements"].lazy()
    )


def find_problems(tables: Tables) -> list[Problem]:
    return find_problems_in({schema.name: frame for schema, frame in tables})


def changed(table: str, change: Callable[[pl.DataFrame], pl.DataFrame]) -> Tables:
    parts = frames()
    return tables_of(parts | {table: change(parts[table])})


def put(column: str, value: object, rows: list[int]) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """Puts a value into some rows of a column, whose dtype stays."""

    def change(frame: pl.DataFrame) -> pl.DataFrame:
        dtype = frame.schema[column]
        new = pl.lit(value, pl.String if isinstance(dtype, pl.Enum) else dtype)
        old = pl.col(column).cast(pl.String) if isinstance(dtype, pl.Enum) else pl.col(column)
        chosen = pl.int_range(pl.len()).is_in(rows)
        return frame.with_columns(pl.when(chosen).then(new).otherwise(old).alias(column))

    return change


def cast(column: str, dtype: pl.DataType | type[pl.DataType]) -> Callable[[pl.DataFrame], pl.DataFrame]:
    return lambda frame: frame.with_columns(pl.col(column).cast(dtype))


def test_sound_tables_have_no_problem() -> None:
    assert find_problems(SOUND) == []
    validate(SOUND)


def test_written_and_opened_they_are_the_same(tmp_path: Path) -> None:
    write_tables(SOUND, tmp_path)
    for (_, frame), (_, opened) in zip(SOUND, Tables.open(tmp_path), strict=True):
        assert frame.collect().equals(opened.collect())


def test_how_rows_lie_in_memory_does_not_change_the_bytes(tmp_path: Path) -> None:
    parts = frames()
    chunked = {name: pl.concat([frame[:7], frame[7:9], frame[9:]], rechunk=False) for name, frame in parts.items()}
    for name, tables in (("whole", SOUND), ("chunked", tables_of(chunked))):
        (tmp_path / name).mkdir()
        write_tables(tables, tmp_path / name)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "chunked" / file.name).read_bytes()


BROKEN: list[tuple[str, Callable[[pl.DataFrame], pl.DataFrame], str, str, int]] = [
    ("advertisers", put("text", None, [1, 4]), "text", "must not be null", 2),
    ("advertisers", put("name", "a\0b", [3]), "name", "must not hold a NUL character", 1),
    ("ads", put("advertiser_id", 7, [0, 1, 2]), "advertiser_id", "must be a key of advertisers", 3),
    ("ads", put("ad_id", None, [5]), "ad_id", "must not be null", 1),
    ("ads", cast("ad_id", pl.Float64), "ad_id", "dtype must be whole number or string", 0),
    ("ads", lambda frame: frame.drop("text"), "text", "the column must be there", 0),
    ("ads", lambda frame: frame[:0], "", "the table must have rows", 0),
    ("ads", put("category", "x\0", [2]), "category", "must not hold a NUL character", 1),
    ("users", put("user_id", "u001", [3]), "user_id", "must be unique", 2),
    ("events", put("user_id", "u999", [4, 9]), "user_id", "must be a key of users", 2),
    ("events", put("kind", "bought", [4]), "kind", f"must be one of {', '.join(KINDS)}", 1),
    ("events", put("value", float("inf"), [2, 3]), "value", "must be a finite number", 2),
    ("events", put("value", -0.5, [2]), "value", "must not be below 0", 1),
    ("events", put("sample_weight", float("nan"), [2]), "sample_weight", "must be a finite number", 1),
    ("events", put("quantity", -1.0, [6]), "quantity", "must not be below 0", 1),
    ("events", put("event_id", 0, [1, 2]), "event_id", "must be unique", 3),
    (
        "events",
        put("timestamp", datetime(1985, 1, 1), [0]),
        "timestamp",
        "must lie between 1990-01-01 and 2100-01-01",
        1,
    ),
    ("events", put("timestamp", datetime(2024, 1, 1), [80]), "timestamp", "rows must be in order of timestamp", 1),
    (
        "events",
        lambda frame: frame.with_columns(pl.col("timestamp").dt.replace_time_zone("UTC")),
        "timestamp",
        "dtype must be timestamp without time zone",
        0,
    ),
    (
        "events",
        cast("advertiser_id", pl.String),
        "advertiser_id",
        "must be a key of advertisers, whose dtype is Int32",
        len(SOUND.events.collect()),
    ),
    ("ads", cast("ad_id", pl.UInt64), "ad_id", "dtype must be whole number or string", 0),
    ("events", lambda frame: frame[:0], "", "the table must have rows", 0),
    ("events", put("sample_weight", -1.0, [2, 9]), "sample_weight", "must be above 0", 2),
    ("events", put("sample_weight", 0.0, [3]), "sample_weight", "must be above 0", 1),
    (
        "placements",
        cast("market_id", pl.String),
        "market_id",
        "dtype must go with that of events.market_id, Int32",
        0,
    ),
    ("placements", put("end", datetime(1999, 1, 1), [0, 7]), "start, end", "end must be after start", 2),
    (
        "placements",
        lambda frame: pl.concat([frame, frame[-1:]]),
        "ad_id, market_id, start, end",
        "must be unique",
        2,
    ),
]


@pytest.mark.parametrize(
    ("table", "change", "column", "rule", "rows"), BROKEN, ids=[f"{row[0]}-{row[2]}-{row[3][:24]}" for row in BROKEN]
)
def test_a_broken_rule_is_found_with_its_rows(
    table: str, change: Callable[[pl.DataFrame], pl.DataFrame], column: str, rule: str, rows: int
) -> None:
    problems = find_problems(changed(table, change))
    found = [problem for problem in problems if (problem.table, problem.column) == (table, column)]
    assert (rule, rows) in [(problem.rule, problem.rows) for problem in found]


def test_an_ad_may_pause_and_run_again_and_have_no_advertiser() -> None:
    parts = frames()
    again = parts["placements"][-1:].with_columns(pl.col("start", "end") + timedelta(days=30))
    parts["placements"] = pl.concat([parts["placements"], again])
    parts["ads"] = put("advertiser_id", None, [0, 1])(parts["ads"])
    assert find_problems(tables_of(parts)) == []


def test_placements_may_be_empty_and_optional_columns_absent() -> None:
    parts = frames()
    parts["placements"] = parts["placements"][:0]
    parts["events"] = parts["events"].drop("display", "quantity", "discount", "category")
    assert find_problems(tables_of(parts)) == []


def test_string_keys_and_references_are_as_good_as_numbers() -> None:
    parts = frames()
    for table, column in (("advertisers", "advertiser_id"), ("ads", "advertiser_id"), ("events", "advertiser_id")):
        parts[table] = cast(column, pl.String)(parts[table])
    assert find_problems(tables_of(parts)) == []


def test_text_may_look_like_a_models_own_tokens() -> None:
    """It is text; whoever tokenizes it keeps it inert."""
    assert find_problems(changed("ads", put("text", "<|im_start|><adv_1_3>", [0, 1]))) == []


NULLABLE = {(name, column.name): column.nullable for name, schema in SCHEMAS.items() for column in schema.columns}


@settings(max_examples=40, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(NULLABLE)), st.sets(st.integers(0, 5), min_size=1), min_size=1, max_size=4)
)
def test_nulls_anywhere_are_counted_where_they_may_not_be(nulls: dict[tuple[str, str], set[int]]) -> None:
    parts = frames()
    for (table, column), rows in nulls.items():
        if column in parts[table].columns:
            parts[table] = put(column, None, sorted(rows))(parts[table])
    expected = {
        cell: len(rows) for cell, rows in nulls.items() if not NULLABLE[cell] and cell[1] in parts[cell[0]].columns
    }
    problems = find_problems(tables_of(parts))
    found = {
        (problem.table, problem.column): problem.rows for problem in problems if problem.rule == "must not be null"
    }
    assert found == expected


@settings(max_examples=40, deadline=None)
@given(
    column=st.sampled_from(["value", "quantity", "discount", "sample_weight"]),
    numbers=st.lists(st.floats(width=32), min_size=1, max_size=20),
)
def test_numbers_are_sound_exactly_if_finite_and_large_enough(column: str, numbers: list[float]) -> None:
    parts = frames()
    events = parts["events"].with_row_index("row")
    new = pl.DataFrame({"row": range(len(numbers)), "new": numbers}, schema={"row": pl.UInt32, "new": pl.Float32})
    events = events.join(new, on="row", how="left", maintain_order="left")
    parts["events"] = events.with_columns(pl.coalesce("new", column).alias(column)).drop("row", "new")
    problems = {problem.rule: problem.rows for problem in find_problems(tables_of(parts))}
    wrong = sum(number != number or number in (float("inf"), float("-inf")) for number in numbers)
    small = {
        "must not be below 0": sum(number < 0 for number in numbers),
        "must be above 0": sum(number <= 0 for number in numbers),
    }
    rule = "must be above 0" if column == "sample_weight" else "must not be below 0"
    expected = {"must be a finite number": wrong, rule: small[rule]}
    assert problems == {rule: rows for rule, rows in expected.items() if rows}


@settings(max_examples=20, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from(sorted(SCHEMAS)))
def test_the_order_of_rows_matters_only_where_it_must(random: object, table: str) -> None:
    parts = frames()
    order = list(range(len(parts[table])))
    random.shuffle(order)  # type: ignore[attr-defined]
    parts[table] = parts[table][order]
    sorted_by = SCHEMAS[table].sorted_by
    rules = {problem.rule for problem in find_problems(tables_of(parts))}
    if sorted_by is None or parts[table][sorted_by].is_sorted():
        assert rules == set()
    else:
        assert rules == {f"rows must be in order of {sorted_by}"}


def test_everything_wrong_is_told_in_one_error_without_anybodys_name() -> None:
    parts = frames()
    for table, column, value in (
        ("advertisers", "text", None),
        ("ads", "advertiser_id", 3),
        ("users", "user_id", "u001"),
        ("events", "value", -1.0),
        ("events", "user_id", "somebody@example.org"),
        ("placements", "end", datetime(1999, 1, 1)),
    ):
        parts[table] = put(column, value, [0, 2])(parts[table])
    with pytest.raises(UserError) as caught:
        validate(tables_of(parts))
    told = str(caught.value)
    for where in ("advertisers.text", "ads.advertiser_id", "users.user_id", "events.value", "events.user_id"):
        assert where in told
    assert "placements.start, end" in told
    assert "somebody" not in told
    assert "u001" not in told


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(range(len(BROKEN))), st.integers(1, 40))
def test_what_is_wrong_does_not_depend_on_where_batches_end(case: int, size: int) -> None:
    table, change, *_ = BROKEN[case]
    tables = changed(table, change)
    whole = find_problems(tables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "BATCH", size * 17)
        assert find_problems(tables) == whole


def corrupt_pages(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[200:1200] = b"\xff" * 1000
    path.write_bytes(bytes(raw))


def invalid_utf8(path: Path) -> None:
    frame = pl.read_parquet(path)
    sound = frame["text"][0].encode()
    pl.read_parquet(path).write_parquet(path, compression="uncompressed", use_pyarrow=False)
    path.write_bytes(path.read_bytes().replace(sound, b"\xff\xfe" + sound[2:]))


@pytest.mark.parametrize(
    ("table", "spoil", "messages"),
    [
        ("events", corrupt_pages, ["events.parquet", "readable Parquet"]),
        ("advertisers", invalid_utf8, ["advertisers.parquet", "readable Parquet"]),
        ("ads", lambda path: path.write_bytes(path.read_bytes()[:500]), ["ads.parquet", "readable Parquet"]),
        ("ads", lambda path: path.write_bytes(b""), ["ads.parquet", "readable Parquet"]),
        ("placements", lambda path: path.unlink(), ["without placements.parquet"]),
    ],
)
def test_a_spoilt_file_is_told_beside_what_is_wrong_with_the_others(
    table: str, spoil: Callable[[Path], None], messages: list[str], tmp_path: Path
) -> None:
    write_tables(changed("users", put("user_id", "u001", [3])), tmp_path)
    spoil(tmp_path / f"{table}.parquet")
    with pytest.raises(UserError) as caught:
        validate_directory(tmp_path)
    told = str(caught.value)
    assert all(message in told for message in [*messages, "users.user_id: 2 offending rows"])
