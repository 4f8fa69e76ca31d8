"""A forecaster fitted on fewer advertisers: it goes on with a table that grew, and with no other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from numpy.typing import NDArray

from data.errors import LineageError
from data.log import Log, load_log
from data.writer import write_tables
from priors.anchor import Anchor, TunedAnchor
from priors.artifact import PriorModel
from priors.calibration import Calibration
from priors.config import DecodeConfig
from priors.decode import TreeDecoder
from priors.forecast import TableForecast
from priors.generate import generate_priors
from priors.table import PriorTable
from semantic_ids.advertiser_ids import AdvertiserIds
from semantic_ids.trie import Trie
from tests.logs import tiny_config, tiny_tables
from tests.priors.conftest import Fitted

NEW = (50, 99, 400, 401)
"""Ids before and after those of the tiny log, so that the indexes of the old advertisers move."""
PERIOD = 9


@dataclass
class Grown:
    log: Log
    ids: AdvertiserIds
    prior: PriorModel
    old: NDArray[np.int64]
    """Index in the grown log of each advertiser of the smaller one."""


@pytest.fixture(scope="module")
def saved(fitted: Fitted, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prior") / "artifact"
    directory.mkdir()
    fitted.prior.save(directory)
    return directory


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    """The tiny log with four advertisers more, whom nobody has bought from."""
    tables, directory = tiny_tables(), tmp_path_factory.mktemp("grown")
    new = pl.DataFrame({"advertiser_id": NEW, "name": ["new"] * len(NEW), "text": ["organic coffee"] * len(NEW)})
    both = pl.concat([tables.advertisers, new.cast(tables.advertisers.schema)])
    write_tables(replace(tables, advertisers=both), directory)
    return load_log(directory, tiny_config(), evaluate="validation")


def grow(old: AdvertiserIds, log: Log) -> AdvertiserIds:
    """The old table with the first free IDs for the new ones."""
    taken = {tuple(codes) for codes in old.codes_AL.tolist()}
    free = [codes for codes in np.ndindex(*old.level_sizes) if codes not in taken][: len(NEW)]
    code_of = dict(zip([*old.advertiser_ids.tolist(), *NEW], [*old.codes_AL.tolist(), *free], strict=True))
    codes = np.array([code_of[id_] for id_ in log.advertiser_ids.tolist()])
    return replace(old, advertiser_ids=log.advertiser_ids, codes_AL=codes)


@pytest.fixture(scope="module")
def grown(fitted: Fitted, saved: Path, log: Log) -> Grown:
    ids = grow(fitted.ids, log)
    prior = PriorModel.load(saved, log, ids, fitted.cfg)
    return Grown(log, ids, prior, np.searchsorted(log.advertiser_ids, fitted.log.advertiser_ids))


def decoded(prior: PriorModel, users: NDArray[np.int64]) -> NDArray[np.float64]:
    """Probability of every advertiser by a beam that holds all, ``(B, A)``."""
    decoder = TreeDecoder(prior.model, prior.base, prior.calibration, DecodeConfig(beam=64, top_k=100))
    prompts = [prior.compiler.compile(int(user), PERIOD) for user in users]
    found = np.zeros((len(users), prior.base.trie.n_advertisers))
    for row, one in enumerate(decoder.decode(prompts, users, np.full(len(users), PERIOD))):
        found[row, one.advertiser_K] = np.exp(one.log_prob_K)
    return found


def test_forecasts_are_over_all_advertisers_and_sum_to_one(grown: Grown) -> None:
    prob_BA = decoded(grown.prior, np.arange(12))
    assert prob_BA.shape[1] == 34
    assert (prob_BA > 0).all()
    np.testing.assert_allclose(prob_BA.sum(1), 1.0, atol=1e-5)


def test_what_the_lm_reads_is_what_it_read(fitted: Fitted, grown: Grown) -> None:
    for user in range(12):
        ours, theirs = (prior.compiler.compile(user, PERIOD) for prior in (grown.prior, fitted.prior))
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()


class RestOf:
    """The counts of the grown log, over the old advertisers alone."""

    def __init__(self, grown: Grown) -> None:
        self.grown = grown

    def parts(
        self, user_B: NDArray[np.integer], period_B: NDArray[np.integer]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        whole_BA, own_BA = self.grown.prior.base.anchor.parts(user_B, period_B)
        return whole_BA[:, self.grown.old], own_BA[:, self.grown.old]


def test_siblings_among_old_ones_have_the_ratio_of_the_smaller_table(fitted: Fitted, grown: Grown) -> None:
    """Below a prefix that no new one has, LM, biases and exponents say what they said, of the counts of today."""
    users = np.arange(12)
    base = replace(fitted.prior.base, anchor=RestOf(grown))  # type: ignore[arg-type]
    before = decoded(replace(fitted.prior, base=base), users)
    after = decoded(grown.prior, users)[:, grown.old]
    new = np.setdiff1d(np.arange(34), grown.old)
    compared = 0
    for depth in (1, 2):
        touched = {tuple(codes[:depth]) for codes in grown.ids.codes_AL[new].tolist()}
        prefixes = [tuple(codes[:depth]) for codes in fitted.ids.codes_AL.tolist()]
        for prefix in {*prefixes} - touched:
            rows = [row for row, one in enumerate(prefixes) if one == prefix]
            ours, theirs = (prob_BA[:, rows] / prob_BA[:, rows].sum(1, keepdims=True) for prob_BA in (after, before))
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
            compared += len(rows) > 1
    assert compared > 3


def test_the_untuned_forecast_is_the_counts_of_the_grown_log(fitted: Fitted, grown: Grown) -> None:
    """A new advertiser has the smoothing alone, and all old ones make room for it in the same proportion."""
    base = TunedAnchor.untuned(grown.prior.base.anchor, grown.prior.base.trie)
    users, periods = np.arange(12), np.full(12, PERIOD)
    q_BA = np.exp(base.log_probs(users, periods))
    np.testing.assert_allclose(q_BA, base.anchor.probabilities(users, periods), rtol=1e-9)
    np.testing.assert_allclose(q_BA.sum(1), 1.0, rtol=1e-9)
    before = fitted.prior.base.anchor.popularity(periods[:1])[0]
    after = grown.prior.base.anchor.popularity(periods[:1])[0]
    np.testing.assert_allclose(after[grown.old] / after[grown.old].sum(), before, rtol=1e-9)
    new = np.setdiff1d(np.arange(34), grown.old)
    assert np.ptp(after[new]) == 0
    assert 0 < after[new[0]] <= after[grown.old].min()


def test_own_history_is_that_of_the_same_advertisers(fitted: Fitted, grown: Grown) -> None:
    users, periods = np.arange(12), np.full(12, PERIOD)
    before, after = (prior.base.anchor.own(users, periods) for prior in (fitted.prior, grown.prior))
    np.testing.assert_allclose(after[:, grown.old], before, rtol=1e-9)
    assert after.sum() == pytest.approx(before.sum())


def test_biases_follow_codes_and_not_advertisers(fitted: Fitted, grown: Grown) -> None:
    for ours, theirs in zip(grown.prior.base.bias_LV, fitted.prior.base.bias_LV, strict=True):
        assert np.array_equal(ours, theirs)
    rng = np.random.default_rng(0)
    bias = [rng.normal(size=size) for size in grown.ids.level_sizes]
    q_A = np.full((1, 34), 1 / 34)
    scores = replace(grown.prior.base, exponent_L=np.zeros(3), bias_LV=bias).scores_of(q_A)
    trie = grown.prior.base.trie
    for level, score in enumerate(scores):
        for advertiser in range(34):
            node = trie.path_AL[advertiser, level]
            assert score[0, node] == bias[level][grown.ids.codes_AL[advertiser, level]]


def test_the_lm_scores_a_prefix_as_it_did(fitted: Fitted, grown: Grown) -> None:
    """Without counts, level 1 is the LM's alone: a new advertiser takes of its prefix's mass, and none of another's."""
    level1: list[NDArray[np.float64]] = []
    for prior, ids in ((fitted.prior, fitted.ids), (grown.prior, grown.ids)):
        anchor = Anchor(prior.base.anchor.counts, replace(prior.base.anchor.constants, own_weight=0.0))
        flat = TunedAnchor(anchor, prior.base.trie, np.zeros(3), [np.zeros(4)] * 3)
        prob_BA = decoded(replace(prior, base=flat, calibration=Calibration.identity(3)), np.arange(6))
        level1.append(np.stack([prob_BA[:, ids.codes_AL[:, 0] == code].sum(1) for code in range(4)]))
    np.testing.assert_allclose(level1[0], level1[1], atol=1e-5)


def test_saved_again_it_still_names_the_ids_it_was_fitted_on(fitted: Fitted, grown: Grown, tmp_path: Path) -> None:
    grown.prior.save(tmp_path)
    again = PriorModel.load(tmp_path, fitted.log, fitted.ids, fitted.cfg)
    assert again.fitted_ids.version == fitted.ids.version
    with torch.no_grad():
        np.testing.assert_allclose(decoded(again, np.arange(3)), decoded(fitted.prior, np.arange(3)), atol=1e-6)


def swapped(ids: AdvertiserIds, rows: list[int]) -> AdvertiserIds:
    codes = ids.codes_AL.copy()
    codes[rows] = codes[rows[::-1]]
    return replace(ids, codes_AL=codes)


def test_ids_whose_codes_changed_are_refused_with_how_many_and_an_example(
    fitted: Fitted, saved: Path, grown: Grown
) -> None:
    for ids, log, total in (
        (swapped(fitted.ids, [3, 7]), fitted.log, 30),
        (swapped(grown.ids, [10, 20]), grown.log, 30),
    ):
        with pytest.raises(LineageError, match=rf"2 of {total} existing IDs changed, e\.g\. \d+ from <adv_1_\d> .* to"):
            PriorModel.load(saved, log, ids, fitted.cfg)


def test_other_vectors_and_gone_advertisers_are_refused(fitted: Fitted, saved: Path, grown: Grown) -> None:
    moved = replace(grown.ids, codebooks=[grown.ids.codebooks[0] + 1, *grown.ids.codebooks[1:]])
    with pytest.raises(LineageError, match="other codebooks at level 1"):
        PriorModel.load(saved, grown.log, moved, fitted.cfg)
    fewer = replace(fitted.ids, advertiser_ids=fitted.ids.advertiser_ids[1:], codes_AL=fitted.ids.codes_AL[1:])
    with pytest.raises(LineageError, match=r"1 of 30 entities are gone, e\.g\. 100"):
        PriorModel.load(saved, fitted.log, fewer, fitted.cfg)


def test_a_prior_without_a_copy_of_its_ids_takes_those_alone(
    fitted: Fitted, saved: Path, grown: Grown, tmp_path: Path
) -> None:
    older = tmp_path / "older"
    shutil.copytree(saved, older)
    shutil.rmtree(older / "ids")
    PriorModel.load(older, fitted.log, fitted.ids, fitted.cfg)
    with pytest.raises(LineageError, match="of an older adsid"):
        PriorModel.load(older, grown.log, grown.ids, fitted.cfg)


def test_ids_of_other_advertisers_than_the_logs_are_refused(fitted: Fitted, saved: Path, grown: Grown) -> None:
    with pytest.raises(LineageError, match=r"4 with an ID but not in the log, e\.g\. 50"):
        PriorModel.load(saved, fitted.log, grown.ids, fitted.cfg)
    with pytest.raises(LineageError, match=r"4 of the log without an ID, e\.g\. 50"):
        PriorModel.load(saved, grown.log, fitted.ids, fitted.cfg)


def test_forecasts_made_before_are_refused_and_made_anew_they_cover_all(
    fitted: Fitted, grown: Grown, tmp_path: Path
) -> None:
    """Growing numbers the nodes of the trie anew, so a frontier of before would name other prefixes."""
    tables = {}
    for name, prior, log in (("before", fitted.prior, fitted.log), ("after", grown.prior, grown.log)):
        (tmp_path / name).mkdir()
        cfg = replace(fitted.cfg, panel=4)
        generate_priors(prior, log, cfg, out_dir=tmp_path / name, work_dir=tmp_path / f"{name}.work")
        tables[name] = PriorTable.load(tmp_path / name, log)
    with pytest.raises(LineageError, match="other advertiser IDs than the 34 given"):
        TableForecast(tables["before"], grown.prior.base, arm="lm")
    forecast = TableForecast(tables["after"], grown.prior.base, arm="lm")
    log_prob_BA = forecast.log_probs(tables["after"].user_R, tables["after"].period_R)
    assert log_prob_BA.shape[1] == 34
    np.testing.assert_allclose(np.exp(log_prob_BA).sum(1), 1.0, atol=1e-4)
    for folder in (tmp_path / "before").iterdir():
        shutil.copytree(folder, tmp_path / "after" / f"period=9{folder.name[-3:]}")
    with pytest.raises(LineageError, match="2 different tables"):
        PriorTable.load(tmp_path / "after", grown.log)


def test_the_trie_of_the_grown_table_is_the_old_one_with_more_leaves(fitted: Fitted, grown: Grown) -> None:
    trie = Trie.from_codes(grown.ids.codes_AL, grown.ids.level_sizes)
    assert trie.n_advertisers == 34
    assert set(fitted.prior.base.trie.child_code[0]) <= set(trie.child_code[0])
