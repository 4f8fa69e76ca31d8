"""Forecasters that the LM is compared with, on the same user-periods and by the same as-of rule.

    own        the user's own purchases, counted; popularity decides among equals
    ease       EASE (Steck 2019, arXiv 1905.03375): X B with B = I - P / diag(P), P = (XᵀX + λ I)⁻¹, zero diagonal
    item_knn   cosine of two advertisers' customers, the nearest K (Sarwar et al. 2001)
    sasrec     a transformer over the sequence of advertisers, see `priors.sasrec`

EASE and item-kNN learn from who bought from whom in the fit span, and read what a user had bought before the as-of
time. They never say that a user comes back to the same advertiser, so each own purchase adds something to its score.
λ, K and what is added are those with the best recall@10 on the selection span. What comes out are scores; one inverse
temperature, fitted on the selection span, makes them probabilities without a change of order, so that they have an NLL
too. A user without a history gets popularity. They all are told what the anchor knows of the plan of campaigns: what
speaks for an advertiser, a score above 0, is multiplied by it.

Shapes: B user-periods, U users, A advertisers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize_scalar
from scipy.sparse import csr_array, diags_array
from scipy.special import log_softmax

from data.errors import UserError
from data.log import Log, Targets
from priors.anchor import Anchor, Counts, mean_target_nll
from priors.config import BaselineConfig
from priors.fit import sample_rows
from priors.metrics import chunks, recall_at_k, target_ranks
from priors.sasrec import SasRecForecast, fit_sasrec

Float = NDArray[np.float64]
Scores = Callable[[NDArray[np.integer], NDArray[np.integer]], Float]

LARGEST_EASE = 20_000
"""Advertisers of which a dense matrix of pairs is still worth having, 3 GB."""
_K, _SAMPLE, _TIE = 10, 0, 1e-6


@dataclass(frozen=True)
class Scored:
    """Scores made a distribution.

    Attributes:
        scores: ``(B, A)`` of users and periods.
        popularity: what users without a history get, and what decides among equal scores.
        inverse_temperature: of the softmax.
    """

    scores: Scores
    popularity: Anchor
    inverse_temperature: float = 1.0

    def log_probs(
        self,
        user_B: NDArray[np.integer],
        period_B: NDArray[np.integer],
        planned_B: NDArray[np.integer] | None = None,
    ) -> Float:
        """Log-probabilities of all advertisers at the start of each period, ``(B, A)``.

        Args:
            user_B, period_B: whose, and as of when.
            planned_B: periods whose plan holds; None: the same.
        """
        planned_B = period_B if planned_B is None else planned_B
        return self.distribution(self.scores(user_B, period_B), user_B, period_B, planned_B)

    def distribution(
        self,
        score_BA: Float,
        user_B: NDArray[np.integer],
        period_B: NDArray[np.integer],
        planned_B: NDArray[np.integer],
    ) -> Float:
        """:meth:`log_probs` of scores that are there."""
        log_popularity_BA = np.log(self.popularity.probabilities(user_B, period_B))
        log_popularity_BA = self.popularity.replanned(log_popularity_BA, period_B, planned_B)
        score_BA = np.where(score_BA > 0, score_BA * np.exp(self.popularity.plan(planned_B)), score_BA)
        log_prob_BA = log_softmax(self.inverse_temperature * (score_BA + _TIE * np.exp(log_popularity_BA)), axis=1)
        has_history_B = np.isin(np.arange(len(user_B)), self.popularity.counts.history(user_B, period_B)[0])
        return np.where(has_history_B[:, None], log_prob_BA, log_popularity_BA)


@dataclass(frozen=True)
class Planned:
    """A forecaster that knows nothing of the plan of campaigns, told it.

    Attributes:
        forecast: the forecaster.
        popularity: whose plan counts.
    """

    forecast: SasRecForecast
    popularity: Anchor

    def log_probs(
        self,
        user_B: NDArray[np.integer],
        period_B: NDArray[np.integer],
        planned_B: NDArray[np.integer] | None = None,
    ) -> Float:
        """As of :meth:`Scored.log_probs`."""
        plan_BA = self.popularity.plan(period_B if planned_B is None else planned_B)
        found: Float = log_softmax(self.forecast.log_probs(user_B, period_B) + plan_BA, axis=1)
        return found


def fit_baselines(
    log: Log, popularity: Anchor, cfg: BaselineConfig, *, seed: int, work_dir: Path
) -> tuple[dict[str, Scored | Planned], dict[str, Any]]:
    """Fit the baselines that the config names.

    Args:
        log: they learn from its fit span and are tuned on its selection span.
        popularity: an anchor of popularity alone, with the counts of the log; they are told the plan by its exponent.
        cfg: which, and what they choose from.
        seed: of SASRec.
        work_dir: SASRec's checkpoints.

    Returns:
        Forecasters by name, each with ``log_probs`` of users, periods and the periods whose plan holds; and what was
        chosen for each.

    Raises:
        UserError: EASE of too many advertisers, or a span without conversions.
    """
    found: dict[str, Scored | Planned] = {}
    chosen: dict[str, Any] = {}
    select = sample_rows(log.advertiser_targets("prior_select"), cfg.select_rows, _SAMPLE)
    counts = popularity.counts
    for name in cfg.names:
        if name == "sasrec":
            sasrec, result = fit_sasrec(log, cfg.sasrec, seed=seed, work_dir=work_dir / name)
            found[name] = Planned(sasrec, popularity)
            chosen[name] = {"epochs": result.epochs, "best_epoch": result.best_epoch, "select_nll": result.best_score}
            continue
        best: tuple[float, dict[str, float], Scores] | None = None
        for setting, scores in _candidates(name, log, counts, cfg):
            recall = _recall(Scored(scores, popularity), select)
            if best is None or recall > best[0]:
                best = recall, setting, scores
        assert best is not None
        beta = _temperature(Scored(best[2], popularity), select)
        found[name] = Scored(best[2], popularity, beta)
        chosen[name] = {**best[1], "select_recall": best[0], "inverse_temperature": beta}
    return found, chosen


def _candidates(name: str, log: Log, counts: Counts, cfg: BaselineConfig) -> Iterator[tuple[dict[str, float], Scores]]:
    """Scores of a baseline at each setting it chooses from."""
    if name == "own":
        yield {}, lambda user_B, period_B: _history(counts, user_B, period_B).toarray()
        return
    fit_UA = _customers(log)
    if name == "ease" and fit_UA.shape[1] > LARGEST_EASE:
        raise UserError(
            f"the baseline ease of {fit_UA.shape[1]} advertisers",
            expected=f"at most {LARGEST_EASE}: it inverts a matrix of all pairs",
            action="leave it out of prior.baselines.names",
        )
    key, values = ("penalty", cfg.ease_penalty) if name == "ease" else ("neighbours", cfg.neighbours)
    for value in values:
        weight_AA = ease(fit_UA, value) if name == "ease" else item_knn(fit_UA, int(value))
        for own in cfg.own_count:
            yield {key: value, "own_count": own}, _linear(counts, weight_AA, own)


def ease(customers_UA: csr_array, penalty: float) -> Float:
    """EASE's weights, ``(A, A)``; what is bought from the row speaks for the column.

    Args:
        customers_UA: 1 where the user bought from the advertiser.
        penalty: λ.
    """
    gram_AA = (customers_UA.T @ customers_UA).toarray() + penalty * np.eye(customers_UA.shape[1])
    inverse_AA = cho_solve(cho_factor(gram_AA, overwrite_a=True), np.eye(len(gram_AA)))
    weight_AA = -inverse_AA / np.diag(inverse_AA)
    np.fill_diagonal(weight_AA, 0.0)
    return weight_AA


def item_knn(customers_UA: csr_array, neighbours: int) -> csr_array:
    """Cosines of the advertisers' customers, the nearest of each row and those as near as the last, without itself.

    Args:
        customers_UA: as for :func:`ease`.
        neighbours: K.
    """
    length_A = np.sqrt(np.maximum(customers_UA.sum(0), 1e-12))
    unit_UA = customers_UA @ diags_array(1 / length_A)
    cosine_AA = unit_UA.T @ unit_UA
    cosine_AA = (cosine_AA - diags_array(cosine_AA.diagonal())).tocsr()
    cosine_AA.eliminate_zeros()
    for row in range(cosine_AA.shape[0]):
        values = cosine_AA.data[cosine_AA.indptr[row] : cosine_AA.indptr[row + 1]]
        if len(values) > neighbours:
            values[values < np.partition(values, -neighbours)[-neighbours]] = 0.0
    cosine_AA.eliminate_zeros()
    return csr_array(cosine_AA)


def _customers(log: Log) -> csr_array:
    """1 where a user bought from an advertiser in the fit span, ``(U, A)``."""
    first, last = log.split.prior_fit
    events = log.events
    kept = log.is_purchase & (events.advertiser >= 0) & (events.period >= first) & (events.period <= last)
    pairs = np.unique(np.stack([events.user[kept], events.advertiser[kept]]), axis=1)
    shape = (len(log.user_ids), len(log.advertiser_ids))
    return csr_array((np.ones(pairs.shape[1]), (pairs[0], pairs[1])), shape=shape)


def _linear(counts: Counts, weight_AA: Float | csr_array, own_count: float) -> Scores:
    """Scores that add up over what the user had bought, and a little for every own purchase of the advertiser."""

    def scores(user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> Float:
        history_BA = _history(counts, user_B, period_B)
        bought_BA = csr_array((np.ones_like(history_BA.data), history_BA.indices, history_BA.indptr), history_BA.shape)
        score_BA = bought_BA @ weight_AA
        dense_BA = score_BA.toarray() if isinstance(score_BA, csr_array) else np.asarray(score_BA)
        return dense_BA + own_count * history_BA.toarray() if own_count else dense_BA

    return scores


def _history(counts: Counts, user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> csr_array:
    """Purchases before each period, ``(B, A)``."""
    row_R, index_R, _ = counts.history(user_B, period_B)
    cells = (row_R, counts.advertiser_R[index_R])
    return csr_array((counts.count_R[index_R], cells), shape=(len(user_B), counts.n_advertisers))


def _recall(candidate: Scored, targets: Targets) -> float:
    found = []
    for part in chunks(targets):
        score_BA = candidate.log_probs(part.user, part.period)
        found.append(recall_at_k(target_ranks(score_BA, part), part, _K))
    return float(np.mean(np.concatenate(found)))


def _temperature(candidate: Scored, targets: Targets) -> float:
    """The inverse temperature with the lowest NLL on the selection span."""
    parts = [(part, candidate.scores(part.user, part.period)) for part in chunks(targets)]

    def nll(log_beta: float) -> float:
        sharper = replace(candidate, inverse_temperature=float(np.exp(log_beta)))
        found = []
        for part, score_BA in parts:
            log_prob_BA = sharper.distribution(score_BA, part.user, part.period, part.period)
            found.append(mean_target_nll(log_prob_BA[part.row, part.item], part))
        return float(np.mean(np.concatenate(found)))

    return float(np.exp(minimize_scalar(nll, bounds=(-6.0, 6.0), method="bounded", options={"xatol": 0.02}).x))
