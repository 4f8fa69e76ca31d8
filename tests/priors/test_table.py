"""The table on disk, its memory-mapped lookup, and a forecast among the active."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from data.errors import LineageError, UserError
from priors.forecast import TableForecast, among_active
from priors.lookup import PriorLookup, write_lookup
from priors.table import PriorTable, is_shard, read_frame, shard_files, write_shard
from tests.priors.conftest import Fitted


def test_any_reader_of_parquet_reads_it_in_place(directory: Path) -> None:
    frame = pl.read_parquet(directory / "period=*" / "*.parquet", hive_partitioning=True)
    assert frame["as_of"].n_unique() == frame["period"].n_unique() == 3
    assert pq.read_table(directory / "period=0007").num_rows == 20
    np.testing.assert_allclose(
        frame["mass"] + frame["remainder"] + frame["frontier_log_prob"].list.eval(pl.element().exp()).list.sum(), 1.0
    )
    assert frame["certified"].dtype == pl.Boolean
    assert (frame["anchor_log_prob"].list.len() == frame["advertiser_id"].list.len()).all()
    assert frame["model"].n_unique() == frame["trie"].n_unique() == 1


def test_the_lookup_finds_the_newest_row_before_a_time(fitted: Fitted, directory: Path) -> None:
    lookup, table = PriorLookup(directory), PriorTable.load(directory, fitted.log)
    assert len(lookup) == len(table)
    calendar, frame = fitted.log.calendar, read_frame(directory)
    for user in np.unique(table.user_R):
        user_id = str(fitted.log.user_ids[user])
        assert lookup.find(user_id, calendar.start(7) - timedelta(seconds=1)) is None
        for period, expected in ((7, 7), (8, 7), (9, 9), (12, 10)):
            found = lookup.find(user_id, calendar.start(period))
            row = int(table.find(np.array([user]), np.array([period]))[0])
            assert found is not None
            assert found.as_of == calendar.start(expected)
            ids = fitted.log.advertiser_ids[table.advertiser_RK[row][table.advertiser_RK[row] >= 0]]
            np.testing.assert_array_equal(found.advertiser_ids, ids)
            np.testing.assert_array_equal(found.log_prob_K, table.log_prob_RK[row, : len(ids)])
            stored = frame.row(by_predicate=(pl.col("user_id") == user_id) & (pl.col("period") == expected), named=True)
            np.testing.assert_array_equal(found.anchor_log_prob_K, stored["anchor_log_prob"])
            assert found.mass == pytest.approx(np.exp(found.log_prob_K).sum())
    assert lookup.find("nobody", calendar.start(9)) is None
    assert lookup.find("", calendar.start(9)) is None
    with pytest.raises(UserError, match=r"(?s)user 5.*as in the table"):
        lookup.find(5, calendar.start(9))


def test_a_lookup_takes_less_than_a_millisecond_among_many_users(tmp_path: Path) -> None:
    n = 50_000
    frame = pl.DataFrame(
        {
            "user_id": np.arange(n) * 3,
            "as_of": [datetime(2024, 1, 1)] * n,
            "advertiser_id": pl.Series([[1, 2]] * n, dtype=pl.List(pl.Int64)),
            "log_prob": [[-1.0, -2.0]] * n,
            "anchor_log_prob": [[-1.0, -2.0]] * n,
            "mass": [0.5] * n,
            "remainder": [0.5] * n,
            "certified": [True] * n,
        },
        schema_overrides={"as_of": pl.Datetime("us")},
    )
    write_shard(tmp_path / "period=0001" / "00000.parquet", frame, key="")
    write_lookup(tmp_path)
    lookup, moment = PriorLookup(tmp_path), datetime(2024, 2, 1)
    seconds = []
    for user in range(0, 3 * n, 301):
        began = time.perf_counter()
        found = lookup.find(user, moment)
        seconds.append(time.perf_counter() - began)
        assert (found is not None) == (user % 3 == 0)
    assert np.median(seconds) < 1e-3  # the bar


def test_a_lookup_of_another_state_of_the_table_is_refused(directory: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not of the table as it is now"):
        PriorLookup(tmp_path)
    frame = pl.read_parquet(shard_files(directory)[0])
    write_shard(tmp_path / "period=0007" / "00000.parquet", frame, key="")
    write_lookup(tmp_path)
    write_shard(tmp_path / "period=0008" / "00000.parquet", frame, key="")
    with pytest.raises(UserError, match="not of the table as it is now"):
        PriorLookup(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_shard_cut_short_is_noticed(fitted: Fitted, directory: Path, tmp_path: Path, share: float) -> None:
    path = tmp_path / "period=0007" / "00000.parquet"
    write_shard(path, pl.read_parquet(shard_files(directory)[0]), key="mine")
    assert is_shard(path, key="mine")
    assert not is_shard(path, key="another's")
    assert not is_shard(path.with_name("none.parquet"), key="mine")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert not is_shard(path, key="mine")
    with pytest.raises(UserError, match=r"00000\.parquet, which cannot be read"):
        PriorTable.load(tmp_path, fitted.log)


def test_forecasts_of_another_catalogue_are_told(fitted: Fitted, directory: Path) -> None:
    other = replace(fitted.log, advertiser_ids=np.array([f"x{id_}" for id_ in fitted.log.advertiser_ids]))
    with pytest.raises(LineageError, match=r"(?s)which the log does not have.*make them again"):
        PriorTable.load(directory, other)


def test_no_table_is_told(fitted: Fitted, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="priors in"):
        PriorTable.load(tmp_path, fitted.log)


def test_among_active_advertisers_the_forecast_is_what_is_left_of_it(fitted: Fitted, directory: Path) -> None:
    table = PriorTable.load(directory, fitted.log)
    forecast = TableForecast(table, fitted.prior.base, arm="lm")
    log_prob_BA = forecast.log_probs(table.user_R, table.period_R)
    active_BA = np.random.default_rng(0).random(log_prob_BA.shape) < 0.4
    active_BA[0] = False
    among_BA = among_active(log_prob_BA, active_BA)
    assert np.isneginf(among_BA[~active_BA]).all()
    np.testing.assert_allclose(np.exp(among_BA[1:]).sum(1), 1.0)
    first, second = np.flatnonzero(active_BA[1])[:2]
    assert among_BA[1, first] - among_BA[1, second] == pytest.approx(
        log_prob_BA[1, first] - log_prob_BA[1, second], abs=1e-5
    )
    np.testing.assert_allclose(among_active(log_prob_BA, np.ones(30, bool)), log_prob_BA, atol=1e-4)
