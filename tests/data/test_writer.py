"""Tables written batch by batch: the same rows give the same bytes, whatever the batches."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import writer
from data.tables import Tables
from data.writer import TableWriter, write_tables
from tests.logs import tiny_tables

SOUND = tiny_tables(n_users=8, n_advertisers=10, n_ads=40, n_markets=2)
EVENTS = SOUND.events.collect()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, len(EVENTS)), max_size=6).map(sorted), st.integers(50, 3 * len(EVENTS)))
def test_the_bytes_do_not_depend_on_where_batches_end(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], group: int
) -> None:
    directory = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "ROW_GROUP", group)
        for name, ends in (("whole", []), ("parts", cuts)):
            (directory / name).mkdir()
            with TableWriter(directory / name) as out:
                for start, end in zip([0, *ends], [*ends, len(EVENTS)], strict=True):
                    out.write("events", EVENTS[start:end])
    whole, parts = (directory / name / "events.parquet" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    assert pl.read_parquet(parts).equals(EVENTS)
    sizes = [pq.ParquetFile(parts).metadata.row_group(n).num_rows for n in range(pq.ParquetFile(parts).num_row_groups)]
    assert all(size == group for size in sizes[:-1])


def test_events_without_a_number_get_one(tmp_path: Path) -> None:
    with TableWriter(tmp_path) as out:
        for start in range(0, len(EVENTS), 100):
            out.write("events", EVENTS[start : start + 100].drop("event_id"))
    assert pl.read_parquet(tmp_path / "events.parquet")["event_id"].to_list() == list(range(len(EVENTS)))


def test_nothing_is_left_of_what_was_discarded(tmp_path: Path) -> None:
    out = TableWriter(tmp_path)
    with out:
        out.write("events", EVENTS)
        (out.scratch / "part").write_text("unsorted")
        out.beside("truth.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.parquet", "truth.json"]
    out.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_caller_that_changes_its_mind_is_stopped(tmp_path: Path) -> None:
    with TableWriter(tmp_path) as out:
        with pytest.raises(ValueError, match="no table 'clicks'"):
            out.write("clicks", EVENTS)
        out.write("events", EVENTS)
        with pytest.raises(ValueError, match="was begun with"):
            out.write("events", EVENTS.cast({"value": pl.Float64}))


def test_empty_tables_keep_their_columns(tmp_path: Path) -> None:
    write_tables(Tables(SOUND.advertisers, SOUND.ads, SOUND.users, SOUND.events, SOUND.placements.limit(0)), tmp_path)
    assert pl.read_parquet_schema(tmp_path / "placements.parquet") == SOUND.placements.collect_schema()
