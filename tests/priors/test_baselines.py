"""Each baseline against a plain computation of what it says it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

import priors.baselines
from data.errors import UserError
from data.log import Log
from models.sasrec import SasRecConfig
from models.training import TrainerConfig
from priors.anchor import Anchor, AnchorConstants, Counts
from priors.baselines import Scored, ease, fit_baselines, item_knn
from priors.config import BASELINES, BaselineConfig
from priors.sasrec import Sequences, WindowDataset, collate, fit_sasrec
from tests.logs import tiny_log

SASREC = SasRecConfig(
    width=16, layers=1, max_length=6, batch_size=16, learning_rate=5e-3,
    trainer=TrainerConfig(max_epochs=4, patience=None, progress_bar=False),
)  # fmt: skip
CFG = BaselineConfig(list(BASELINES), [10.0, 100.0], [5, 20], [0.0, 0.2], 60, SASREC)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Log:
    return tiny_log(tmp_path_factory.mktemp("baselines"))


def popularity_of(log: Log) -> Anchor:
    return Anchor(Counts.of(log), AnchorConstants(own_weight=0.0))


@pytest.fixture(scope="module")
def fitted(log: Log, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    return fit_baselines(log, popularity_of(log), CFG, seed=0, work_dir=tmp_path_factory.mktemp("work"))


def bought(log: Log, user: int, period: int) -> np.ndarray:
    """Purchases of a user before a period, counted by advertiser."""
    rows = log.history(user, period)
    advertiser = log.events.advertiser[rows][log.is_purchase[rows]]
    return np.bincount(advertiser[advertiser >= 0], minlength=len(log.advertiser_ids))


@pytest.mark.parametrize("name", BASELINES)
def test_every_forecast_sums_to_one(fitted: tuple[dict[str, Any], dict[str, Any]], name: str) -> None:
    users = np.arange(30)
    log_prob_BA = fitted[0][name].log_probs(users, np.full(30, 10))
    np.testing.assert_allclose(np.exp(log_prob_BA.astype(float)).sum(1), 1.0, atol=1e-5)


@pytest.mark.parametrize("name", BASELINES)
def test_nothing_of_the_period_or_later_is_read(
    log: Log, fitted: tuple[dict[str, Any], dict[str, Any]], name: str, tmp_path: Path
) -> None:
    """Fitted on a log that ends with the selection span, a baseline is the same; as of 10 it forecasts the same."""
    last = log.split.prior_select[1]
    early = replace(log, events=log.events.select(log.events.period <= last))
    cfg = replace(CFG, names=[name])
    again, chosen = fit_baselines(early, popularity_of(early), cfg, seed=0, work_dir=tmp_path)
    assert chosen[name] == fitted[1][name]
    users, when = np.arange(30), np.full(30, last + 1)
    np.testing.assert_array_equal(again[name].log_probs(users, when), fitted[0][name].log_probs(users, when))


def test_own_is_the_order_of_the_users_purchases(log: Log, fitted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    popular_A = popularity_of(log).popularity(np.array([9]))[0]
    for user in range(10):
        counts_A = bought(log, user, 9)
        order = np.argsort(-fitted[0]["own"].log_probs(np.array([user]), np.array([9]))[0], kind="stable")
        np.testing.assert_array_equal(order, np.lexsort((-popular_A, -counts_A)))


def test_ease_solves_its_own_problem() -> None:
    """B minimises |X - X B|² + λ |B|² with a zero diagonal: column by column, a ridge without the column itself."""
    rng, penalty = np.random.default_rng(0), 3.0
    customers_UA = (rng.random((40, 6)) < 0.4).astype(float)
    weight_AA = ease(csr_array(customers_UA), penalty)
    for column in range(6):
        others = [a for a in range(6) if a != column]
        x = customers_UA[:, others]
        ridge = np.linalg.solve(x.T @ x + penalty * np.eye(5), x.T @ customers_UA[:, column])
        np.testing.assert_allclose(weight_AA[others, column], ridge, atol=1e-9)
        assert weight_AA[column, column] == 0.0


def test_item_knn_keeps_the_nearest_cosines() -> None:
    customers_UA = (np.random.default_rng(0).random((40, 6)) < 0.4).astype(float)
    unit = customers_UA / np.linalg.norm(customers_UA, axis=0)
    cosine_AA = unit.T @ unit
    np.fill_diagonal(cosine_AA, 0.0)
    found_AA = item_knn(csr_array(customers_UA), 2).toarray()
    for row in range(6):
        nearest = np.argsort(-cosine_AA[row])[:2]
        np.testing.assert_allclose(found_AA[row, nearest], cosine_AA[row, nearest])
        assert (found_AA[row] > 0).sum() == (cosine_AA[row] >= cosine_AA[row, nearest[1]]).sum()


def test_linear_scores_add_up_over_what_was_bought(log: Log, fitted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    first, last = log.split.prior_fit
    users = range(len(log.user_ids))
    fit_UA = np.stack([(bought(log, u, last + 1) - bought(log, u, first) > 0).astype(float) for u in users])
    weight_AA = ease(csr_array(fit_UA), fitted[1]["ease"]["penalty"])
    scores_BA = fitted[0]["ease"].scores(np.array([2, 5]), np.array([10, 8]))
    own = fitted[1]["ease"]["own_count"]
    histories = [bought(log, user, period) for user, period in ((2, 10), (5, 8))]
    expected = [(history_A > 0) @ weight_AA + own * history_A for history_A in histories]
    np.testing.assert_allclose(scores_BA, expected, atol=1e-9)


def test_the_temperature_changes_no_order_and_is_the_best(
    log: Log, fitted: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    targets, best = log.advertiser_targets("prior_select"), fitted[0]["item_knn"]

    def nll(scored: Scored) -> float:
        log_prob_BA = scored.log_probs(targets.user, targets.period)
        weights = 1 / np.diff(targets.ptr)[targets.row]
        return float(-(log_prob_BA[targets.row, targets.item] * weights).sum() / len(targets))

    for factor in (0.5, 2.0):
        other = replace(best, inverse_temperature=best.inverse_temperature * factor)
        order = [
            np.argsort(-one.log_probs(targets.user[:9], targets.period[:9]), kind="stable") for one in (best, other)
        ]
        np.testing.assert_array_equal(order[0], order[1])
        assert nll(best) < nll(other)


def test_a_user_without_a_history_gets_popularity(log: Log, fitted: tuple[dict[str, Any], dict[str, Any]]) -> None:
    first = np.array([1])
    for name in ("own", "ease", "item_knn"):
        log_prob_BA = fitted[0][name].log_probs(np.array([0]), first)
        np.testing.assert_allclose(np.exp(log_prob_BA), popularity_of(log).popularity(first))
    assert np.isfinite(fitted[0]["sasrec"].log_probs(np.array([0]), first)).all()


class TestSasRec:
    def test_every_decision_is_made_once_with_what_came_before(self, log: Log) -> None:
        """Windows of 6 items: what a decision sees ends with the user's last purchase before its period."""
        sequences, targets = Sequences.of(log), log.advertiser_targets("prior_fit")
        dataset, made = WindowDataset(sequences, targets, 6), []
        for index, ((user, start), decisions) in enumerate(dataset._windows):
            window, begin = dataset[index], sequences.ptr[user]
            for (place, row), wanted in zip(decisions, window.targets, strict=True):
                before = sequences.advertiser_S[begin : begin + sequences.before(user, int(targets.period[row]))]
                np.testing.assert_array_equal(window.items[:place], before[start:] + 1)
                np.testing.assert_array_equal(wanted, targets.of(row))
                assert user == targets.user[row]
                assert (0 if start == 0 else 3) <= place <= 6
                made.append(row)
        assert sorted(made) == list(range(len(targets)))
        assert any(start for (_, start), _ in dataset._windows)

    def test_a_sequence_has_each_advertiser_once_a_period_in_order(self, log: Log) -> None:
        sequences = Sequences.of(log)
        for user in range(len(log.user_ids)):
            rows = slice(sequences.ptr[user], sequences.ptr[user + 1])
            pairs = list(zip(sequences.period_S[rows].tolist(), sequences.advertiser_S[rows].tolist(), strict=True))
            assert len(set(pairs)) == len(pairs)
            assert [period for period, _ in pairs] == sorted(period for period, _ in pairs)
            assert {a for _, a in pairs} == set(np.flatnonzero(bought(log, user, 99)).tolist())

    def test_company_and_padding_change_nothing(self, log: Log, fitted: tuple[dict[str, Any], dict[str, Any]]) -> None:
        forecast, users = fitted[0]["sasrec"], np.arange(12)
        together = forecast.log_probs(users, np.full(12, 9))
        for user in users:
            alone = forecast.log_probs(np.array([user]), np.array([9]))
            np.testing.assert_allclose(alone[0], together[user], atol=1e-5)

    def test_the_loss_is_the_likelihood_of_its_own_forecast(
        self, log: Log, fitted: tuple[dict[str, Any], dict[str, Any]]
    ) -> None:
        """Where a whole history fits a window, training and forecasting see the same."""
        from models.sasrec import SasRecModule

        targets = log.advertiser_targets("prior_fit")
        sequences, forecast = Sequences.of(log), fitted[0]["sasrec"].forecast
        short = [
            row
            for row in range(len(targets))
            if sequences.before(int(targets.user[row]), int(targets.period[row])) <= 6
        ]
        some = targets.select(np.array(short[:20]))
        dataset = WindowDataset(sequences, some, 6)
        batch = collate([dataset[index] for index in range(len(dataset))])
        module = SasRecModule(forecast.model, learning_rate=1e-3)
        with torch.no_grad():
            nll = float(module.decision_nll(batch).mean())
        log_prob = forecast.log_probs(some.user, some.period)[some.row, some.item]
        assert nll == pytest.approx(float(np.mean(-np.bincount(some.row, log_prob) / np.diff(some.ptr))), abs=1e-4)

    def test_it_learns(self, fitted: tuple[dict[str, Any], dict[str, Any]]) -> None:
        assert fitted[1]["sasrec"]["epochs"] == 4
        assert fitted[1]["sasrec"]["best_epoch"] > 0

    def test_a_killed_fit_ends_like_an_undisturbed_one(
        self, log: Log, fitted: tuple[dict[str, Any], dict[str, Any]], tmp_path: Path
    ) -> None:
        half = replace(SASREC, trainer=replace(SASREC.trainer, max_epochs=2))
        fit_sasrec(log, half, seed=0, work_dir=tmp_path)
        resumed, result = fit_sasrec(log, SASREC, seed=0, work_dir=tmp_path)
        assert result.epochs == 4
        users, when = np.arange(10), np.full(10, 10)
        undisturbed = fitted[0]["sasrec"].forecast
        np.testing.assert_array_equal(resumed.log_probs(users, when), undisturbed.log_probs(users, when))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BaselineConfig(names=["ease", "svd"]), r"names=\['ease', 'svd'\]"),
        (lambda: BaselineConfig(names=["own", "own"]), "each once"),
        (lambda: BaselineConfig(ease_penalty=[]), r"ease_penalty=\[\]"),
        (lambda: BaselineConfig(neighbours=[0], select_rows=0), r"(?s)neighbours=\[0\].*select_rows=0"),
        (lambda: BaselineConfig(own_count=[-1.0]), r"own_count=\[-1\.0\]"),
        (lambda: SasRecConfig(width=0, layers=0), r"(?s)sasrec\.width=0.*sasrec\.layers=0"),
        (lambda: SasRecConfig(width=10, heads=3), "heads divide"),
    ],
)
def test_a_bad_config_is_told(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


def test_ease_of_too_many_advertisers_is_refused(log: Log, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(priors.baselines, "LARGEST_EASE", 10)
    with pytest.raises(UserError, match=r"leave it out of prior\.baselines\.names"):
        fit_baselines(log, popularity_of(log), replace(CFG, names=["ease"]), seed=0, work_dir=tmp_path)


def test_sasrec_without_conversions_is_refused(log: Log, tmp_path: Path) -> None:
    empty = replace(log, events=log.events.select(log.events.period > log.split.prior_fit[1]))
    with pytest.raises(UserError, match=r"data\.split\.prior_fit without any conversion"):
        fit_sasrec(empty, SASREC, seed=0, work_dir=tmp_path)
