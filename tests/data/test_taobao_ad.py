"""The adapter on a small source: what becomes of a row, and what is told of files that are not as published."""

from __future__ import annotations

import gzip
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from benchmarks.taobao_source import write_log
from data import taobao_ad
from data.errors import UserError
from data.log import load_log
from data.prepare import prepare
from data.sampling import choose_users
from data.tables import SCHEMAS
from data.writer import TableWriter
from pipeline.config import compose
from tests.data.taobao_source import (
    FIRST_USER,
    N_ADS,
    N_USERS,
    PLACES,
    change_future,
    second_of,
    taobao_config,
    taobao_frames,
    write_frames,
    write_taobao,
)

FRAMES = taobao_frames()


def prepared(source: Path, out: Path, **changes: object) -> Path:
    out.mkdir()
    prepare(taobao_config(source, **changes), out)
    return out


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_taobao(tmp_path_factory.mktemp("taobao"))


@pytest.fixture(scope="module")
def tables(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(source, tmp_path_factory.mktemp("out") / "tables")


@pytest.fixture(scope="module")
def events(tables: Path) -> pl.DataFrame:
    return pl.read_parquet(tables / "events.parquet")


def test_every_row_is_one_event(events: pl.DataFrame) -> None:
    shown, behaviour = FRAMES["raw_sample"], FRAMES["behavior_log"]
    assert len(events) == len(shown) + len(behaviour)
    kinds = dict(events.group_by("kind").len().iter_rows())
    assert kinds["click"] == shown["clk"].sum()
    assert kinds["impression"] == shown["nonclk"].sum()
    assert kinds["organic"] == (behaviour["btag"] == "buy").sum()
    assert kinds["visit"] == (behaviour["btag"] != "buy").sum()
    assert events["event_id"].to_list() == list(range(len(events)))
    assert events["market_id"].unique().to_list() == [taobao_ad.MARKET]


def test_what_an_impression_says(events: pl.DataFrame) -> None:
    ads = FRAMES["ad_feature"].rename({"adgroup_id": "ad_id"})
    clock = pl.from_epoch(pl.col("time_stamp") + 8 * 3600, time_unit="s").cast(pl.Datetime("us"))
    expected = (
        FRAMES["raw_sample"]
        .rename({"user": "user_id", "adgroup_id": "ad_id", "pid": "display"})
        .join(ads, on="ad_id")
        .select(
            "user_id",
            clock.alias("timestamp"),
            pl.when(pl.col("clk") == 1).then(pl.lit("click")).otherwise(pl.lit("impression")).alias("kind"),
            "ad_id",
            pl.col("customer").alias("advertiser_id"),
            "display",
            pl.format("category {}", "cate_id").alias("category"),
        )
    )
    shown = events.filter(pl.col("ad_id").is_not_null())
    same = shown.select(expected.columns).cast({"kind": pl.String, "display": pl.String})
    assert same.sort(pl.all()).equals(expected.sort(pl.all()).cast(same.schema))
    assert shown["display"].dtype == pl.Enum(PLACES)
    assert shown["action"].null_count() == len(shown)
    of_request = shown.group_by("request_id").agg(pl.struct("user_id", "timestamp").n_unique())
    assert of_request["user_id"].to_list() == [1] * len(of_request)
    assert len(of_request) == shown.select("user_id", "timestamp").n_unique() < len(shown)


def test_what_behaviour_says(events: pl.DataFrame) -> None:
    owners: dict[int, set[int]] = {}
    for brand, customer in FRAMES["ad_feature"].select("brand", "customer").drop_nulls().iter_rows():
        owners.setdefault(brand, set()).add(customer)
    owner = {brand: customers.pop() if len(customers) == 1 else None for brand, customers in owners.items()}
    assert owner[95_099] is None
    expected = sorted(
        (user, second, "organic" if btag == "buy" else "visit", f"category {cate}", btag, owner.get(brand) or 0)
        for user, second, btag, cate, brand in FRAMES["behavior_log"].iter_rows()
    )
    behaviour = events.filter(pl.col("ad_id").is_null())
    second = (pl.col("timestamp").dt.epoch("s") - 8 * 3600).alias("second")
    told = behaviour.select(
        "user_id",
        second,
        *(pl.col(name).cast(pl.String) for name in ("kind", "category", "action")),
        pl.col("advertiser_id").fill_null(0),
    )
    assert sorted(told.iter_rows()) == expected
    assert 0 < behaviour["advertiser_id"].null_count() < len(behaviour)
    for column in ("value", "display", "request_id"):
        assert behaviour[column].null_count() == len(behaviour)


def test_the_clock_is_the_site_s(tmp_path: Path) -> None:
    """1494032110 stands for 2017-05-06 08:55:10 in the publisher's description of the files."""
    frames = dict(FRAMES)
    row = FRAMES["raw_sample"][:1].with_columns(
        user=pl.lit(FIRST_USER + 77, pl.Int64), time_stamp=pl.lit(1494032110, pl.Int64)
    )
    frames["raw_sample"] = FRAMES["raw_sample"].vstack(row)
    out = prepared(write_frames(tmp_path / "source", frames), tmp_path / "out")
    of_user = pl.scan_parquet(out / "events.parquet").filter(pl.col("user_id") == FIRST_USER + 77).collect()
    assert of_user["timestamp"].to_list() == [datetime(2017, 5, 6, 8, 55, 10)]


def test_catalogue_and_profiles(tables: Path) -> None:
    ads = pl.read_parquet(tables / "ads.parquet")
    ad = ads.row(by_predicate=pl.col("ad_id") == 1, named=True)
    row = FRAMES["ad_feature"].row(0, named=True)
    assert ad["text"] == f"category {row['cate_id']}, brand {row['brand']}"
    assert (ad["advertiser_id"], ad["price"], ad["campaign"]) == (row["customer"], row["price"], "campaign 70000")
    assert ads.row(by_predicate=pl.col("ad_id") == 4, named=True)["text"] == "category 4003"  # its brand is NULL
    advertisers = pl.read_parquet(tables / "advertisers.parquet")
    assert advertisers["advertiser_id"].to_list() == list(range(1, 13))
    texts = dict(advertisers.select("advertiser_id", "text").iter_rows())
    sells = FRAMES["ad_feature"].filter(customer=2)
    assert set(texts[2].split(", ")) == {
        *(f"category {cate}" for cate in sells["cate_id"]),
        *(f"brand {brand}" for brand in sells["brand"].drop_nulls()),
    }
    counts = [
        (sells[{"category": "cate_id", "brand": "brand"}[column]] == int(value)).sum()
        for column, value in map(str.split, texts[2].split(", "))
    ]
    assert counts == sorted(counts, reverse=True)
    placements = pl.read_parquet(tables / "placements.parquet")
    assert len(placements) == N_ADS
    spans = placements.select("start", "end").unique()
    assert spans.rows() == [(datetime(2017, 5, 6), datetime(2017, 5, 14))]
    users = pl.read_parquet(tables / "users.parquet")
    assert users["user_id"].to_list() == list(range(FIRST_USER, FIRST_USER + N_USERS))
    assert users["age_level"].to_list() == [*FRAMES["user_profile"]["age_level"].cast(pl.String), *[None] * 6]
    assert users["pvalue_level"].null_count() == 6 + (N_USERS - 6) // 2


def test_as_the_log_reads_it(source: Path, tables: Path) -> None:
    log = load_log(tables, taobao_config(source), evaluate="validation")
    shown = FRAMES["raw_sample"].filter(pl.col("time_stamp") < second_of(datetime(2017, 5, 13)))
    assert log.events.period.max() == 21
    assert int(log.is_label.sum()) == shown["clk"].sum()
    assert len(log.outcomes((15, 21))[0]) <= len(shown)
    assert len(log.active_ads(0, 15).ad) == N_ADS
    assert len(log.active_ads(0, 14).ad) == 0
    for span in ("prior_fit", "prior_select", "ranker_fit", "ranker_stop", "validation"):
        assert len(log.advertiser_targets(span)) > 0
    assert len(log.panel(None)) > 20


def test_the_config_file_is_as_here(tmp_path: Path) -> None:
    cfg, ours = compose(["data=taobao_ad"]).data, taobao_config(tmp_path)
    assert (cfg.source, cfg.origin, cfg.split) == (ours.source, ours.origin, ours.split)
    assert set(cfg.profile_columns) <= set(taobao_ad.PROFILE)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_the_same_rows_in_any_order_give_the_same_bytes(packed: bool, tables: Path, tmp_path: Path) -> None:
    shuffled = {name: frame.sample(fraction=1.0, shuffle=True, seed=5) for name, frame in FRAMES.items()}
    source = write_frames(tmp_path / "source", shuffled)
    if packed:
        for path in list(source.iterdir()):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    again = prepared(source, tmp_path / "out")
    for name in SCHEMAS:
        assert (tables / f"{name}.parquet").read_bytes() == (again / f"{name}.parquet").read_bytes()


@pytest.mark.parametrize("end", ["\r\n", "no last"])
def test_line_ends_change_nothing(end: str, source: Path, tables: Path, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for path in source.iterdir():
        content = path.read_bytes()
        content = content.replace(b"\n", b"\r\n") if end == "\r\n" else content.removesuffix(b"\n")
        (tmp_path / "source" / path.name).write_bytes(content)
    again = prepared(tmp_path / "source", tmp_path / "out")
    assert (tables / "events.parquet").read_bytes() == (again / "events.parquet").read_bytes()


def test_spellings_change_nothing(source: Path, tables: Path, tmp_path: Path) -> None:
    """The published header of profiles has a blank at its end, and brands that are missing are spelled NULL."""
    again = write_frames(tmp_path / "source", FRAMES)
    for name, old, new in (("user_profile", b"class_level \n", b"class_level\n"), ("ad_feature", b",NULL,", b",,")):
        path = again / f"{name}.csv"
        assert old in path.read_bytes()
        path.write_bytes(path.read_bytes().replace(old, new))
    out = prepared(again, tmp_path / "out")
    for name in SCHEMAS:
        assert (tables / f"{name}.parquet").read_bytes() == (out / f"{name}.parquet").read_bytes()


def test_the_synthetic_log_of_the_benchmark_is_sound(tmp_path: Path) -> None:
    write_log(tmp_path / "source", behaviours=3_000, impressions=2_000)
    out = prepared(tmp_path / "source", tmp_path / "out")
    assert len(pl.read_parquet(out / "events.parquet")) == 5_000


def test_users_are_limited_by_hash_among_those_seen_early(source: Path, tmp_path: Path) -> None:
    few = prepared(source, tmp_path / "few", max_users=7, seed=3)
    users = pl.read_parquet(few / "users.parquet")["user_id"]
    until = second_of(datetime(2017, 5, 8))
    early = [FRAMES[name].filter(pl.col("time_stamp") < until)["user"] for name in ("raw_sample", "behavior_log")]
    assert users.to_list() == choose_users(pl.concat(early), 7, seed=3).to_list()
    shown = FRAMES["raw_sample"].filter(pl.col("user").is_in(users.implode()))
    done = FRAMES["behavior_log"].filter(pl.col("user").is_in(users.implode()))
    assert len(pl.read_parquet(few / "events.parquet")) == len(shown) + len(done) > 0
    assert len(pl.read_parquet(few / "ads.parquet")) == N_ADS


@pytest.mark.parametrize("max_users", [None, 20])
def test_what_comes_later_changes_no_event_before(max_users: int | None, tmp_path: Path) -> None:
    """Users who are only seen later, or no longer, make no difference to what others, or they, did before."""
    cut = datetime(2017, 5, 9, 12)
    source = write_taobao(tmp_path / "source")
    before = pl.read_parquet(prepared(source, tmp_path / "a", max_users=max_users) / "events.parquet")
    change_future(source, cut)
    after = pl.read_parquet(prepared(source, tmp_path / "b", max_users=max_users) / "events.parquet")
    early, early_after = (frame.filter(pl.col("timestamp") < cut) for frame in (before, after))
    assert early.equals(early_after)
    late, late_after = (frame.filter(pl.col("timestamp") >= cut) for frame in (before, after))
    assert 100 < len(late_after) < len(late)


def test_few_strays_are_left_out_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The published log has negative times; one in 2,000 lines is left out, as many as 1 in 900 are an error."""
    frames = taobao_frames(behaviours=2_000)
    clean = prepared(write_frames(tmp_path / "clean", frames), tmp_path / "a")
    stray = frames["behavior_log"][:1].with_columns(time_stamp=pl.lit(-2_082_825_423, pl.Int64))
    frames["behavior_log"] = pl.concat([stray, frames["behavior_log"]])
    with caplog.at_level(logging.WARNING):
        again = prepared(write_frames(tmp_path / "stray", frames), tmp_path / "b")
    assert (clean / "events.parquet").read_bytes() == (again / "events.parquet").read_bytes()
    assert "behavior_log.csv: left out 1 lines" in caplog.text
    assert str(FIRST_USER)[:4] not in caplog.text


@pytest.mark.parametrize("value", ["yesterday", "", "1493740800.5"])
def test_what_is_no_time_is_never_tolerated(value: str, tmp_path: Path) -> None:
    source = write_taobao(tmp_path / "source", behaviours=2_000)
    path = source / "behavior_log.csv"
    head, row, rest = path.read_text().split("\n", 2)
    cells = row.split(",")
    cells[1] = value
    path.write_text("\n".join((head, ",".join(cells), rest)))
    with pytest.raises(UserError, match=r"column time_stamp: 1 offending row, e\.g\. line 2"):
        prepared(source, tmp_path / "out")


Change = Callable[[Path], object]


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Change:
    def apply(directory: Path) -> None:
        path = directory / f"{name}.csv"
        path.write_bytes(change(path.read_bytes()))

    return apply


def lines(name: str, *changes: tuple[int, Callable[[bytes], bytes]]) -> Change:
    """Change lines, counted from 1, of a file."""

    def change(content: bytes) -> bytes:
        rows = content.split(b"\n")
        for number, of_line in changes:
            rows[number - 1] = of_line(rows[number - 1])
        return b"\n".join(rows)

    return rewrite(name, change)


def cell(column: int, value: bytes) -> Callable[[bytes], bytes]:
    """Put a value into a column, counted from 0, of a line."""

    def change(line: bytes) -> bytes:
        cells = line.split(b",")
        cells[column] = value
        return b",".join(cells)

    return change


def packed(name: str, change: Callable[[bytes], bytes]) -> Change:
    def apply(directory: Path) -> None:
        path = directory / f"{name}.csv"
        path.with_name(f"{path.name}.gz").write_bytes(change(gzip.compress(path.read_bytes())))
        path.unlink()

    return apply


def drop_column(content: bytes) -> bytes:
    return b"\n".join(line.partition(b",")[2] for line in content.split(b"\n"))


def swap_first_two(content: bytes) -> bytes:
    return b"\n".join(re.sub(rb"^([^,]*),([^,]*),", rb"\2,\1,", line) for line in content.split(b"\n"))


BAD: dict[str, tuple[Change, list[str]]] = {
    "missing files": (
        lambda path: [path.joinpath(name).rename(path / "x") for name in ("ad_feature.csv", "behavior_log.csv")],
        [r"without ad_feature\.csv, behavior_log\.csv", r"raw_sample\.csv, ad_feature\.csv, user_profile\.csv"],
    ),
    "a missing file and bad values in another": (
        lambda path: [
            path.joinpath("ad_feature.csv").rename(path / "x"),
            lines("behavior_log", (2, cell(2, b"ipv")))(path),
        ],
        [r"\[1\].*without ad_feature\.csv", r"\[2\].*column btag"],
    ),
    "empty file": (rewrite("behavior_log", lambda _: b""), [r"behavior_log\.csv: it is empty"]),
    "only a header": (rewrite("behavior_log", lambda c: c.split(b"\n")[0] + b"\n"), [r"no line after the header"]),
    "no header": (
        rewrite("raw_sample", lambda c: c.split(b"\n", 1)[1]),
        [r"raw_sample\.csv: its first line is no header", r"user,time_stamp,adgroup_id,pid,nonclk,clk"],
    ),
    "missing column": (rewrite("behavior_log", drop_column), [r"behavior_log\.csv: a header without user"]),
    "one column more": (
        rewrite("ad_feature", lambda c: c.replace(b"\n", b",1\n").replace(b"price,1", b"price,colour")),
        [r"ad_feature\.csv: a header with colour"],
    ),
    "shifted header": (
        lines("behavior_log", (1, lambda _: b"time_stamp,user,btag,cate,brand")),
        [r"behavior_log\.csv: the header time_stamp,user,btag,cate,brand"],
    ),
    "shifted columns": (
        rewrite("raw_sample", lambda c: swap_first_two(c).replace(b"time_stamp,user", b"user,time_stamp")),
        [r"column time_stamp: \d+ offending rows, e\.g\. line 2\n", r"2017-05-06 to 2017-05-13"],
    ),
    "another delimiter": (
        rewrite("raw_sample", lambda c: c.replace(b",", b";")),
        [r"raw_sample\.csv: its first line is no header"],
    ),
    "too few and too many values": (
        lines("behavior_log", (3, lambda line: line.rpartition(b",")[0]), (9, lambda line: line + b",1")),
        [r"behavior_log\.csv: 2 offending rows, e\.g\. line 3\n", "5 values in every line"],
    ),
    "a last line that breaks off": (
        rewrite("behavior_log", lambda c: c[:-12]),
        [r"behavior_log\.csv: 1 offending row, e\.g\. line 912\n"],
    ),
    "no number": (
        lines("ad_feature", (4, cell(3, b"Nike"))),
        [r"ad_feature\.csv, column customer: 1 offending row, e\.g\. line 4: 'Nike'", "whole number"],
    ),
    "numbers that a database would round": (
        lines(
            "ad_feature", (4, cell(0, b"3.5")), (5, cell(1, b"4_000")), (6, cell(1, b" 4000")), (7, cell(1, b"04000"))
        ),
        [r"column adgroup_id: 1 offending row, e\.g\. line 4: '3\.5'", r"column cate_id: 3 .*line 5: '4_000'"],
    ),
    "an id that overflows": (
        lines("raw_sample", (2, cell(0, b"94000019400001")), (4, cell(2, b"2147483648")), (5, cell(2, b"9" * 30))),
        [
            r"column user: 1 offending row, e\.g\. line 2\n",
            r"adgroup_id: 2 offending rows, e\.g\. line 4\n",
            "2147483647",
        ],
    ),
    "a missing value before a bad one": (
        lines("ad_feature", (7, cell(3, b"")), (9, cell(3, b"x"))),
        [r"column customer: 2 offending rows, e\.g\. line 7: it is missing"],
    ),
    "a missing id": (
        lines("raw_sample", (7, cell(0, b""))),
        [r"column user: 1 offending row, e\.g\. line 7: it is missing"],
    ),
    "an unknown ad": (
        lines("raw_sample", (7, cell(2, b"4711")), (8, cell(2, b"4711"))),
        [r"raw_sample\.csv, column adgroup_id: 2 offending rows, e\.g\. 4711", r"an adgroup_id of ad_feature"],
    ),
    "an unknown btag": (
        lines("behavior_log", (2, cell(2, b"ipv")), (3, cell(2, b"PV"))),
        [r"column btag: 2 offending rows, e\.g\. line 2: 'ipv'", "pv, cart, fav, buy"],
    ),
    "times outside the log": (
        lines("behavior_log", (2, cell(1, b"-2082825423")), (3, cell(1, b"1494691200"))),
        [r"column time_stamp: 2 offending rows, e\.g\. line 2: '-2082825423'", r"2017-04-22 to 2017-05-13"],
    ),
    "an impression before the days of impressions": (
        lines("raw_sample", (2, cell(1, b"1493740800"))),
        [r"raw_sample\.csv, column time_stamp: 1 offending row, e\.g\. line 2\n", r"2017-05-06 to 2017-05-13"],
    ),
    "a click that is neither 0 nor 1": (
        lines("raw_sample", (2, cell(5, b"2")), (3, cell(4, b"yes"))),
        [r"column nonclk: 1 offending row, e\.g\. line 3: 'yes'", r"column clk: 1 offending row, e\.g\. line 2\n"],
    ),
    "clicked and not clicked": (
        lines("raw_sample", (2, lambda line: cell(4, b"1")(cell(5, b"1")(line)))),
        [r"column nonclk, clk: 1 offending row", "one of the two"],
    ),
    "prices": (
        lines("ad_feature", (2, cell(5, b"-1.5")), (3, cell(5, b"nan")), (4, cell(5, b"inf")), (5, cell(5, b"1e999"))),
        [r"column price: 4 offending rows, e\.g\. line 2: '-1\.5'", "finite"],
    ),
    "an ad twice": (
        rewrite("ad_feature", lambda c: c + c.split(b"\n")[2] + b"\n"),
        [r"ad_feature\.csv, column adgroup_id: 2 offending rows, e\.g\. 2\n", "unique"],
    ),
    "a profile twice": (
        rewrite("user_profile", lambda c: c + c.split(b"\n")[2] + b"\n"),
        [r"user_profile\.csv, column userid: 2 offending rows\n", "unique"],
    ),
    "a truncated packed file": (
        packed("behavior_log", lambda c: c[: len(c) // 2]),
        [r"behavior_log\.csv\.gz: Compressed file ended"],
    ),
    "a packed file with another checksum": (
        packed("behavior_log", lambda c: c[:-8] + bytes(4) + c[-4:]),
        [r"behavior_log\.csv\.gz: CRC check failed"],
    ),
    "no packed file": (packed("user_profile", lambda c: b"PK" + c), [r"user_profile\.csv\.gz: Not a gzipped file"]),
    "no UTF-8": (
        lines("raw_sample", (6, cell(3, b"430548\xff1007")), (8, cell(0, b"94\xff"))),
        [r"raw_sample\.csv: 2 offending rows, e\.g\. line 6\n", "UTF-8"],
    ),
    "NUL": (
        lines("raw_sample", (6, cell(3, b"430548\0")), (8, cell(0, b"9400001\0"))),
        [
            r"column pid: 1 offending row, e\.g\. line 6: '430548\\x00'",
            r"column user: 1 offending row, e\.g\. line 8\n",
        ],
    ),
    "line ends of two kinds": (
        lines("raw_sample", (5, lambda line: line.replace(b",", b"\r", 1))),
        [r"raw_sample\.csv: it is no sound CSV", "LF"],
    ),
    "quoted values": (
        rewrite("behavior_log", lambda c: re.sub(rb",(pv|buy),", rb',"\1",', c)),
        [r"column btag: \d+ offending rows, e\.g\. line \d+: '\"(pv|buy)\"'"],
    ),
    "line numbers below lines that are none": (
        lines("behavior_log", (3, lambda _: b"1,2"), (5, lambda _: b"1,2"), (9, cell(3, b"x"))),
        [r"2 offending rows, e\.g\. line 3\n", r"column cate: 1 offending row, e\.g\. line 9: 'x'"],
    ),
    "all at once": (
        lambda path: [
            lines("ad_feature", (4, cell(3, b"Nike")))(path),
            lines("user_profile", (4, cell(4, b"old")))(path),
            rewrite("behavior_log", lambda _: b"")(path),
            packed("raw_sample", lambda c: c[:-9])(path),
        ],
        [r"\[1\].*raw_sample", r"\[2\].*Nike", r"\[3\].*line 4: 'old'", r"\[4\].*it is empty"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_told_together_and_leave_nothing(case: str, tmp_path: Path) -> None:
    change, patterns = BAD[case]
    source = write_taobao(tmp_path / "source")
    change(source)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError) as caught, TableWriter(out) as writer:
        taobao_ad.read(taobao_config(source), writer)
    message = str(caught.value)
    for pattern in patterns:
        assert re.search(pattern, message), message
    assert "what to do: " in message
    users = {str(user) for user in range(FIRST_USER, FIRST_USER + N_USERS)}
    assert not users & set(re.findall(r"\d{7}", message)), message
    assert list(out.iterdir()) == []


def test_no_path_is_told(tmp_path: Path) -> None:
    for path, given in ((None, "without a path"), (str(tmp_path / "nowhere"), r"nowhere without raw_sample\.csv")):
        with pytest.raises(UserError, match=given), TableWriter(tmp_path) as writer:
            taobao_ad.read(replace(taobao_config(tmp_path), path=path), writer)


def test_memory_that_runs_out_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.writer.SORT_MEMORY", "1MB")
    with pytest.raises(UserError, match="free disk space"), TableWriter(tmp_path) as writer:
        taobao_ad.read(taobao_config(source), writer)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_may_have_any_name(tables: Path, tmp_path: Path) -> None:
    out = prepared(write_taobao(tmp_path / "Bob's [2017]* data"), tmp_path / "o'ut")
    assert (tables / "events.parquet").read_bytes() == (out / "events.parquet").read_bytes()


def test_batches_do_not_show(source: Path, tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.duck.ROW_GROUP", 100)
    again = prepared(source, tmp_path / "out")
    assert (tables / "events.parquet").read_bytes() == (again / "events.parquet").read_bytes()
    times = pl.read_parquet(again / "events.parquet")["timestamp"].to_numpy()
    assert (np.diff(times) >= np.timedelta64(0)).all()
