"""The batch job: what is there stays, what is missing is made, and rows are carried over."""

from __future__ import annotations

import copy
import errno
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from data.errors import UserError
from data.log import Log
from priors.anchor import Anchor
from priors.artifact import PriorModel
from priors.config import DecodeConfig
from priors.decode import TreeDecoder
from priors.generate import Shard, ShardMaker, common_beginning, merged, model_version, run_job
from priors.prompt import Prompt
from priors.table import PriorTable, shard_files
from tests.priors.conftest import Fitted

USERS, PERIODS = np.arange(14), [7, 8]
SMALL = DecodeConfig(beam=3, top_k=5, batch_size=4, shard_users=5)


def maker_of(fitted: Fitted, *, incremental: bool = False, **changes: Any) -> ShardMaker:
    cfg = replace(fitted.cfg, decode=replace(SMALL, **changes))
    return ShardMaker(fitted.prior, fitted.log, cfg, incremental)


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in shard_files(directory)}


@pytest.fixture(scope="module")
def whole(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    cost = run_job(maker_of(fitted), USERS, PERIODS, directory)
    assert (cost.decoded, cost.carried, cost.kept, cost.damaged) == (28, 0, 0, 0)
    assert cost.tokens > 28
    return directory


def test_shards_are_of_so_many_users_and_all_are_there(fitted: Fitted, whole: Path) -> None:
    names = [f"period=000{period}/0000{number}.parquet" for period in PERIODS for number in range(3)]
    assert [*bytes_of(whole)] == names
    table = PriorTable.load(whole, fitted.log)
    np.testing.assert_array_equal(table.user_R, np.repeat(USERS, 2))
    np.testing.assert_array_equal(table.decoded_R, table.period_R)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_what_is_missing_or_cut_short_is_made_again_with_the_same_bytes(
    fitted: Fitted, whole: Path, tmp_path: Path, share: float
) -> None:
    run_job(maker_of(fitted), USERS, PERIODS, tmp_path)
    files = shard_files(tmp_path)
    files[1].unlink()
    files[4].write_bytes(files[4].read_bytes()[: int(share * files[4].stat().st_size)])
    (files[0].with_suffix(".tmp")).write_bytes(b"what a killed job left")
    cost = run_job(maker_of(fitted), USERS, PERIODS, tmp_path)
    assert (cost.kept, cost.damaged) == (4, 1)
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_shards_of_another_decoding_or_of_other_events_are_made_anew(fitted: Fitted, tmp_path: Path) -> None:
    run_job(maker_of(fitted), USERS[:5], [7], tmp_path)
    assert run_job(maker_of(fitted), USERS[:5], [7], tmp_path).kept == 1
    assert run_job(maker_of(fitted, beam=4), USERS[:5], [7], tmp_path).damaged == 1
    late = replace(fitted.log, events=fitted.log.events.select(np.arange(3, len(fitted.log.events))))
    assert run_job(replace(maker_of(fitted, beam=4), log=late), USERS[:5], [7], tmp_path).damaged == 1


def other_words(log: Log, table: str, column: str, rows: np.ndarray) -> Log:
    """The log with other words in some rows of a table of its catalogue."""
    frame = getattr(log.tables, table)
    words = pl.when(pl.Series(np.isin(np.arange(len(frame)), rows))).then(pl.lit("other")).otherwise(column)
    return replace(log, tables=replace(log.tables, **{table: frame.with_columns(words.alias(column))}))


def changed_logs(log: Log) -> dict[str, tuple[Log, bool]]:
    """Logs whose prompts, interests or labels differ as of period 7, and some that do not."""
    before = log.events.period < 7
    seen, bought = np.unique(log.events.ad[before]), np.unique(log.events.advertiser[before])
    column, codes_U = next(iter(log.user_features.items()))
    others_U = np.where(np.arange(len(codes_U)) == USERS[3], 1 - np.minimum(codes_U, 1), codes_U).astype(np.int32)
    strangers_U = np.where(np.arange(len(codes_U)) > USERS[-1], 1, codes_U).astype(np.int32)
    return {
        "text of an ad": (other_words(log, "ads", "text", seen[seen >= 0][:1]), True),
        "text of an ad that nobody saw": (
            other_words(log, "ads", "text", np.setdiff1d(np.arange(len(log.ad_ids)), seen)),
            False,
        ),
        "name of an advertiser": (other_words(log, "advertisers", "name", bought[bought >= 0][:1]), True),
        "profile of a user": (replace(log, user_features={**log.user_features, column: others_U}), True),
        "profiles of others": (replace(log, user_features={**log.user_features, column: strangers_U}), False),
        "label kinds": (replace(log, label_kinds=log.label_kinds[:-1]), True),
    }


@pytest.mark.parametrize(
    "what",
    ["text of an ad", "text of an ad that nobody saw", "name of an advertiser", "profile of a user",
     "profiles of others", "label kinds"],
)  # fmt: skip
def test_a_shard_is_of_all_that_its_prompts_read(fitted: Fitted, what: str) -> None:
    log, stale = changed_logs(fitted.log)[what]
    shard, nowhere = Shard(7, 0, USERS), Path("nowhere")
    assert (replace(maker_of(fitted), log=log).key(shard, nowhere) != maker_of(fitted).key(shard, nowhere)) == stale


def told(fitted: Fitted, plan_PA: np.ndarray | None, *, exponent: float = 0.5) -> PriorModel:
    """The forecaster with another plan of campaigns."""
    base = fitted.prior.base
    constants = replace(base.anchor.constants, plan_exponent=exponent)
    anchor = Anchor(replace(base.anchor.counts, plan_PA=plan_PA), constants)
    return replace(fitted.prior, base=replace(base, anchor=anchor))


PLANS = [
    (7, 0.5, True),  # a leaflet that was booked late
    (3, 0.5, True),  # what a row carried over may be of
    (8, 0.5, False),
    (7, 0.0, False),  # the forecaster does not read the plan
]


@pytest.mark.parametrize(("period", "exponent", "stale"), PLANS)
def test_a_shard_is_of_the_plan_up_to_its_period(fitted: Fitted, period: int, exponent: float, stale: bool) -> None:
    counts, shard = fitted.prior.base.anchor.counts, Shard(7, 0, USERS)
    assert counts.plan_PA is not None
    later_PA = counts.plan_PA.copy()
    later_PA[period, 3] += 0.1

    def key(plan_PA: np.ndarray | None) -> str:
        prior = told(fitted, plan_PA, exponent=exponent)
        return replace(maker_of(fitted), prior=prior).key(shard, Path("nowhere"))

    assert (key(later_PA) != key(counts.plan_PA)) == stale
    assert (key(None) != key(counts.plan_PA)) == (exponent > 0)
    assert key(None) == key(np.zeros_like(counts.plan_PA)), "a plan of nothing is none"


def test_a_plan_that_came_late_makes_shards_anew(fitted: Fitted, tmp_path: Path) -> None:
    counts = fitted.prior.base.anchor.counts
    assert counts.plan_PA is not None
    makers = [
        replace(maker_of(fitted), prior=told(fitted, plan_PA)) for plan_PA in (counts.plan_PA, counts.plan_PA[::-1])
    ]
    run_job(makers[0], USERS[:5], [7], tmp_path)
    before = bytes_of(tmp_path)
    assert run_job(makers[0], USERS[:5], [7], tmp_path).kept == 1
    assert run_job(makers[1], USERS[:5], [7], tmp_path).damaged == 1
    assert bytes_of(tmp_path) != before


EVENTS = [
    ("user", 5, True),
    ("kind", 5, True),
    ("ad", 5, True),
    ("advertiser", 5, True),
    ("market", 5, True),
    ("category", 5, True),
    ("timestamp", 5, True),
    ("advertiser", 7, False),
    ("timestamp", 8, False),
]


@pytest.mark.parametrize(("column", "period", "stale"), EVENTS)
def test_a_shard_is_of_what_happened_before(fitted: Fitted, column: str, period: int, stale: bool) -> None:
    """Two events change places in one column, so that their number and the sum of their times stay."""
    log, shard = fitted.log, Shard(7, 0, USERS)
    values = getattr(log.events, column).copy()
    one = np.flatnonzero(log.events.period == period)[0]
    other = np.flatnonzero((log.events.period == period) & (values != values[one]))[0]
    values[[one, other]] = values[[other, one]]
    changed = replace(log, events=replace(log.events, **{column: values}))
    maker = maker_of(fitted)
    assert (replace(maker, log=changed).key(shard, Path("nowhere")) != maker.key(shard, Path("nowhere"))) == stale


def test_who_comes_in_later_leaves_shards_as_they_are(fitted: Fitted) -> None:
    """The numbers of users in the log change, and the events of the past do not."""
    log, events = fitted.log, fitted.log.events
    gone = int(events.user[events.period >= 9][0])
    without = events.select((events.user != gone) | (events.period >= 9))
    new = replace(log, events=without)
    before = replace(
        log,
        events=replace(without.select(without.user != gone), user=_without(without.user[without.user != gone], gone)),
        user_ids=np.delete(log.user_ids, gone),
        user_features={column: np.delete(codes_U, gone) for column, codes_U in log.user_features.items()},
    )
    others = np.array([user for user in USERS if user != gone])
    keys = [
        replace(maker_of(fitted), log=one).key(Shard(7, 0, users), Path("nowhere"))
        for one, users in ((new, others), (before, _without(others, gone)))
    ]
    assert keys[0] == keys[1]


def _without(user_N: np.ndarray, gone: int) -> np.ndarray:
    """Numbers of users where one is not there."""
    return user_N - (user_N > gone)


def test_an_incremental_job_decodes_those_with_new_events_and_carries_over_the_others(
    fitted: Fitted, whole: Path, tmp_path: Path
) -> None:
    run_job(maker_of(fitted), USERS, PERIODS[:1], tmp_path)
    cost = run_job(maker_of(fitted, incremental=True), USERS, PERIODS[1:], tmp_path)
    events = fitted.log.events
    active = np.intersect1d(USERS, events.user[events.period == 7])
    assert 0 < len(active) < len(USERS)
    assert (cost.decoded, cost.carried) == (len(active), len(USERS) - len(active))
    table, every = PriorTable.load(tmp_path, fitted.log), PriorTable.load(whole, fitted.log)
    np.testing.assert_array_equal(table.user_R, every.user_R)
    for user in USERS:
        row = int(table.find(np.array([user]), np.array([8]))[0])
        assert table.decoded_R[row] == (8 if user in active else 7)
        source = int(every.find(np.array([user]), table.decoded_R[[row]])[0])
        np.testing.assert_array_equal(table.advertiser_RK[row], every.advertiser_RK[source])
        np.testing.assert_allclose(
            table.log_prob_RK[row], every.log_prob_RK[source], atol=1e-3
        )  # other company in the batch
    again = bytes_of(tmp_path)
    shard_files(tmp_path)[-1].unlink()
    assert run_job(maker_of(fitted, incremental=True), USERS, PERIODS[1:], tmp_path).kept == 2
    assert bytes_of(tmp_path) == again


def test_a_user_who_was_not_in_the_last_table_is_decoded(fitted: Fitted, tmp_path: Path) -> None:
    run_job(maker_of(fitted), USERS[:5], [7], tmp_path)
    cost = run_job(maker_of(fitted, incremental=True), USERS, [8], tmp_path)
    assert cost.decoded + cost.carried == 14
    assert cost.carried < 5


def test_a_table_made_again_holds_those_asked_for_once(fitted: Fitted, tmp_path: Path) -> None:
    run_job(maker_of(fitted, shard_users=3), USERS, PERIODS[:1], tmp_path)
    run_job(maker_of(fitted), USERS[:7], PERIODS[:1], tmp_path)
    np.testing.assert_array_equal(PriorTable.load(tmp_path, fitted.log).user_R, USERS[:7])
    renamed = replace(fitted.log, user_ids=np.array([f"x{one}" for one in fitted.log.user_ids]))
    cost = run_job(ShardMaker(fitted.prior, renamed, maker_of(fitted).cfg, False), USERS[:7], PERIODS[:1], tmp_path)
    assert cost.kept == 0  # the same numbers are other users


def test_a_full_disk_is_told_and_loses_nothing(
    fitted: Fitted, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = pl.DataFrame.write_parquet, 0

    def full(self: pl.DataFrame, file: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "no space left on device")
        write(self, file, **options)

    monkeypatch.setattr(pl.DataFrame, "write_parquet", full)
    with pytest.raises(UserError, match="no space left"):
        run_job(maker_of(fitted), USERS, PERIODS, tmp_path)
    done = bytes_of(tmp_path)
    assert len(done) == 3
    assert not [*tmp_path.rglob("*.tmp")]
    assert run_job(maker_of(fitted), USERS, PERIODS, tmp_path).kept == 3
    assert bytes_of(tmp_path) == bytes_of(whole)


def test_a_shared_beginning_is_read_once(fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts of one as-of time begin with the month."""
    seen: list[int] = []
    begin = TreeDecoder.decode

    def decode(self: TreeDecoder, prompts: Sequence[Prompt], *rest: Any, **options: Any) -> Any:
        seen.append(len(self.reader._prefix_of(prompts)[0]))  # type: ignore[union-attr]
        return begin(self, prompts, *rest, **options)

    monkeypatch.setattr(TreeDecoder, "decode", decode)
    run_job(maker_of(fitted), USERS[:5], [7], tmp_path)
    assert min(seen) > 0


def test_a_merged_adapter_forecasts_the_same(fitted: Fitted) -> None:
    model = copy.deepcopy(fitted.prior.model).float()
    for name, parameter in model.decoder.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompts = [fitted.prior.compiler.compile(user, 9) for user in range(5)]
    ours, theirs = (
        TreeDecoder(one, fitted.prior.base, fitted.prior.calibration, SMALL).decode(prompts, USERS[:5], np.full(5, 9))
        for one in (model, merged(model))
    )
    assert merged(merged(model)).decoder is not model.decoder
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.advertiser_K, other.advertiser_K)
        np.testing.assert_allclose(one.log_prob_K, other.log_prob_K, atol=1e-4)


PREFIXES = [
    ([[1, 2, 3], [1, 2, 4], [1, 2, 3, 4]], [1, 2]),
    ([[1, 2], [1, 2]], [1]),
    ([[1], [1, 2]], []),
    ([[5, 6], [7, 6]], []),
    ([[5, 6]], []),
    ([], []),
]


@pytest.mark.parametrize(("prompts", "expected"), PREFIXES)
def test_the_common_beginning_leaves_every_prompt_a_token(prompts: list[list[int]], expected: list[int]) -> None:
    assert common_beginning([np.array(prompt) for prompt in prompts]).tolist() == expected


def test_another_forecaster_has_another_version(fitted: Fitted) -> None:
    version = model_version(fitted.prior)
    assert model_version(fitted.prior) == version
    cooler = replace(fitted.prior.calibration, lm_weight=(0.5, 0.5, 0.5))
    assert model_version(replace(fitted.prior, calibration=cooler)) != version
