"""How good the forecast is, on the evaluated span: LM, tuned anchor, controls and baselines.

*Likelihood* is exact: the targets are forced through the tree of their own prompt, as of the start of
their own period. The controls, those named in ``prior.controls``, answer whether the LM has read anything:
``other prompt`` shows another user's prompt, and history, with one's own anchor, ``constant hidden`` gives the head the
mean of what it reads. Where there are history vectors (`priors.history`), ``history alone`` gives it the user's own
beside the mean hidden state: what the forecaster says without the LM. *Lists* are those that retrieval and ranking get:
the newest forecast of the schedule, and at the same times that of every baseline, all with the plan of campaigns of the
period asked for.

    evaluation prompts ─► exact log-probability of every target ─► nll
                       ─► lists of the controls ─────────────────► recall, ndcg     as of the own period
    all user-periods ───► lists of LM, anchor, baselines ────────► recall, ndcg, listed_nll, ece

Interests, where the forecaster has any, are judged on the evaluation prompts: ``interest_nll``, exact, over the
categories converted with, and ``interest_recall`` of the likeliest ones.

Measures and segments are those of `priors.judge`.

Shapes: R user-periods, T targets, A advertisers, B user-periods of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data.errors import UserError
from data.log import Log, Targets
from data.statistics import Row
from models.prior_lm import PriorLM, TreeBatch, with_history
from priors.anchor import TunedAnchor, mean_target_nll, path_log_probs
from priors.artifact import PriorModel
from priors.calibration import Calibration, calibrated_log_prob
from priors.config import PriorConfig
from priors.dataset import PromptDataset
from priors.decode import TreeDecoder
from priors.fit import batches, rows_of, sample_rows
from priors.forecast import TableForecast
from priors.interests import TOP_INTERESTS, shares
from priors.judge import (
    CONSTANT_HIDDEN,
    CONTROL_ARMS,
    CONTROLS,
    HEADLINE,
    HISTORY_ALONE,
    KS,
    OTHER_PROMPT,
    Measure,
    RequestValues,
    Scorer,
    Segments,
    compared,
    judge_lists,
)
from priors.metrics import chunks, ndcg_at_k, recall_at_k, target_ranks
from priors.tree_reader import reader_of

Float = NDArray[np.float64]

DatedScorer = Callable[[NDArray[np.integer], NDArray[np.integer], NDArray[np.integer]], NDArray[np.floating]]
"""A `Scorer` that is asked as of other periods, the second, than those it forecasts, the third."""

AGAINST = (HEADLINE, *CONTROLS)
"""What the LM is compared with, beside popularity and the baselines."""
_SAMPLE = 0


@dataclass
class ForecastEvaluation:
    """Figures of the forecast.

    Attributes:
        rows: tidy rows of section ``forecast``.
        curves: reliability of each arm, for the plot.
        requests: the values behind the rows: of the evaluation prompts, and of all user-periods.
    """

    rows: list[Row] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict)
    requests: list[RequestValues] = field(default_factory=list)


def evaluate_forecast(
    prior: PriorModel,
    forecasts: Mapping[str, TableForecast],
    log: Log,
    cfg: PriorConfig,
    baselines: Mapping[str, DatedScorer] | None = None,
) -> ForecastEvaluation:
    """Measure the forecast on the evaluated span of the panel.

    Args:
        prior: the fitted forecaster.
        forecasts: arms ``anchor`` and ``lm``.
        log: the events.
        cfg: panel and number of prompts.
        baselines: other forecasters by name.

    Returns:
        Rows, curves and the values behind them.

    Raises:
        UserError: as of :func:`evaluated_rows`.
    """
    targets = evaluated_rows(log, cfg)
    # Drawn by a seed of its own: forecasters of other training seeds are judged on the same prompts.
    prompts = sample_rows(targets, cfg.evaluation_prompts, _SAMPLE)
    popularity = TunedAnchor.untuned(prior.base.anchor.popularity_alone(), prior.base.trie)
    as_of = _Schedule(forecasts, targets)
    scorers: dict[str, Scorer] = {name: forecast.log_probs for name, forecast in forecasts.items()}

    def of_popularity(user_B: NDArray, as_of_B: NDArray, period_B: NDArray) -> NDArray[np.floating]:
        return popularity.anchor.replanned(popularity.log_probs(user_B, as_of_B), as_of_B, period_B)

    others: dict[str, DatedScorer] = {"popularity": of_popularity, **(baselines or {})}
    scorers |= {name: as_of.kept(scorer) for name, scorer in others.items()}
    lists, curves, errors = judge_lists(scorers, log, targets, curves_of=tuple(forecasts))
    exact = RequestValues(prompts.user, prompts.period, {})
    exact.values.update(_likelihood(prior, popularity, log, prompts, cfg))
    exact.values.update(_control_lists(prior, prompts, cfg))
    exact.values.update(judge_interests(prior, prompts, cfg))
    against = (*AGAINST, "popularity", *(baselines or {}))
    rows = [*compared(exact, "lm", against), *compared(lists, "lm", against), *errors]
    found: dict[tuple[str, str, str, int | None], Row] = {}
    for row in rows:  # where a figure is of both, the exact prompts' is only there to be compared with
        found[row.metric, row.arm, row.segment, row.k] = row
    return ForecastEvaluation(list(found.values()), {"reliability": curves}, [exact, lists])


def evaluated_rows(log: Log, cfg: PriorConfig) -> Targets:
    """User-periods of the panel that a forecast is judged by.

    Raises:
        UserError: nobody of the panel converts in the evaluated span.
    """
    targets = rows_of(log.advertiser_targets(log.evaluate), log.panel(cfg.panel, cfg.seed))
    if not len(targets):
        raise UserError(
            f"prior.panel={cfg.panel}, of whose users none converts in the {log.evaluate} span",
            expected="somebody to judge the forecast by",
            action=f"raise prior.panel (null takes all users), or widen data.split.{log.evaluate}",
        )
    return targets


# --- likelihood and controls, on the evaluation prompts ----------------------------------------------------


def _likelihood(
    prior: PriorModel, popularity: TunedAnchor, log: Log, targets: Targets, cfg: PriorConfig
) -> dict[Measure, Float]:
    """Exact NLL of LM, anchors and controls on the same prompts, by segment."""
    own, controls = PromptDataset(targets, prior.compiler), _controls(prior, cfg)
    untuned = TunedAnchor.untuned(prior.base.anchor, prior.base.trie)
    tree_batches = list(batches(own, prior.collator, cfg.batch_size))
    log_prob_T = {
        "lm": exact_log_prob(prior.model, tree_batches, prior.calibration),
        "anchor": anchor_log_prob(prior.base, targets),
        "anchor, untuned": anchor_log_prob(untuned, targets),
        "popularity": anchor_log_prob(popularity, targets),
    }
    if OTHER_PROMPT in controls:
        other = PromptDataset(targets, prior.compiler, prompt_of=another_user(targets))
        other_batches = list(batches(other, prior.collator, cfg.batch_size))
        log_prob_T[OTHER_PROMPT] = exact_log_prob(prior.model, other_batches, prior.calibration)
    if CONSTANT_HIDDEN in controls:
        log_prob_T[CONSTANT_HIDDEN] = exact_log_prob(
            prior.model, tree_batches, prior.calibration, constant_LH=prior.constant_LH
        )
    if HISTORY_ALONE in controls:
        log_prob_T[HISTORY_ALONE] = exact_log_prob(
            prior.model, tree_batches, prior.calibration, constant_LH=prior.constant_hidden, own_history=True
        )
    segments = Segments(log, targets)
    return {
        Measure("nll", arm, name): segments.mean_over_targets(-values_T, name)
        for name in segments.masks
        for arm, values_T in log_prob_T.items()
    }


def _controls(prior: PriorModel, cfg: PriorConfig) -> set[str]:
    """The arms of the configured controls; without history vectors there is one less."""
    asked = {CONTROL_ARMS[name] for name in cfg.controls}
    return asked - {HISTORY_ALONE} if prior.compiler.history is None else asked


def exact_log_prob(
    model: PriorLM,
    tree_batches: list[TreeBatch],
    calibration: Calibration,
    *,
    constant_LH: torch.Tensor | None = None,
    own_history: bool = False,
) -> Float:
    """Calibrated log-probability of each target by teacher forcing.

    Args:
        model, tree_batches, constant_LH, own_history: as of :func:`head_logits`.
        calibration: weights of logits and base.

    Returns:
        ``(T,)``, in the order of the prompts' targets.
    """
    logits = head_logits(model, tree_batches, constant_LH=constant_LH, own_history=own_history)
    weight, exponent = torch.tensor(calibration.lm_weight), torch.tensor(calibration.base_exponent)
    return torch.cat(calibrated_log_prob(tree_batches, logits, weight, exponent)).double().numpy()


@torch.no_grad()  # not inference_mode: calibrations are fitted on it
def head_logits(
    model: PriorLM,
    tree_batches: Iterable[TreeBatch],
    *,
    constant_LH: torch.Tensor | None = None,
    own_history: bool = False,
) -> list[list[torch.Tensor]]:
    """The head's scores at the decisions of prompts with their targets, ``(N, V)`` a level, for each batch.

    Args:
        model: the LM.
        tree_batches: the prompts.
        constant_LH: what to give the head at each level instead of what it reads.
        own_history: the constants stand for hidden states alone, with the prompts' own history vectors beside them.
    """
    model.eval()
    logits = []
    for batch in tree_batches:
        if constant_LH is None:
            hidden = model.hidden_read(batch)
            at = [batch.states(hidden, decisions) for decisions in batch.levels]
        else:
            history_BF = batch.history_BF if own_history else None
            at = [
                _same_for_all(constant_LH[level], len(d.row_N), None if history_BF is None else history_BF[d.row_N])
                for level, d in enumerate(batch.levels)
            ]
        read = enumerate(zip(at, batch.levels, strict=True))
        logits.append([model.scores(state_NS, level, decisions) for level, (state_NS, decisions) in read])
    return logits


def _same_for_all(constant_H: torch.Tensor, n: int, history_NF: torch.Tensor | None) -> torch.Tensor:
    """A constant as what the head reads of ``n`` prompts, with their own history vectors beside it where given."""
    constant_NH = constant_H.expand(n, -1)
    return constant_NH if history_NF is None else with_history(constant_NH, history_NF)


def judge_interests(prior: PriorModel, targets: Targets, cfg: PriorConfig) -> dict[Measure, Float]:
    """NLL and recall of the interests by LM, their anchor and popularity; NaN where no conversion has a category."""
    interests = prior.interests
    if interests is None:
        return {}
    wanted = interests.space.targets_of(targets.user, targets.period)
    popularity = TunedAnchor.untuned(interests.base.anchor.popularity_alone(), interests.base.trie)
    reader, size = reader_of(prior.model), cfg.decode.batch_size
    parts: dict[str, list[Float]] = {"lm": [], "anchor": [], "popularity": []}
    for start in range(0, len(targets), size):
        user, period = targets.user[start : start + size], targets.period[start : start + size]
        prompts = [prior.compiler.compile(int(u), int(p)) for u, p in zip(user, period, strict=True)]
        with torch.inference_mode():
            end_BH = reader.prefill(prompts).end_BH
        ours, anchors = interests.log_probs(prior.model, end_BH, user, period)
        for arm, log_prob_BC in (("lm", ours.cpu().numpy()), ("anchor", anchors.cpu().numpy())):
            parts[arm].append(log_prob_BC)
        parts["popularity"].append(popularity.log_probs(user, period))
    found: dict[Measure, Float] = {}
    some_R, share_T = np.diff(wanted.ptr) > 0, shares(wanted)
    for arm, blocks in parts.items():
        log_prob_RC = np.concatenate(blocks) if blocks else np.zeros((0, len(interests.space)))
        nll_R = mean_target_nll(log_prob_RC[wanted.row, wanted.item], wanted, share_T)
        found[Measure("interest_nll", arm)] = np.where(some_R, nll_R, np.nan)
        rank_T = target_ranks(log_prob_RC, wanted)
        found[Measure("interest_recall", arm, "all", TOP_INTERESTS)] = recall_at_k(rank_T, wanted, TOP_INTERESTS)
    return found


def another_user(targets: Targets) -> NDArray[np.int64]:
    """For each row another user of the same targets, the next one in a fixed order."""
    users = np.unique(targets.user)
    return users[(np.searchsorted(users, targets.user) + 1) % len(users)].astype(np.int64)


def anchor_log_prob(base: TunedAnchor, targets: Targets) -> Float:
    """Log-probability of each target by an anchor alone, ``(T,)``."""
    parts = [base.log_probs(part.user, part.period)[part.row, part.item] for part in chunks(targets)]
    return np.concatenate(parts) if parts else np.zeros(0)


def _control_lists(prior: PriorModel, targets: Targets, cfg: PriorConfig) -> dict[Measure, Float]:
    """Recall and NDCG of the LM and its controls, all as of the period asked for; without a control there is none."""
    decoder = TreeDecoder(prior.model, prior.base, prior.calibration, cfg.decode)
    ranks: dict[str, list[NDArray[np.int64]]] = {}
    controls = _controls(prior, cfg)
    reader: dict[str, NDArray[np.integer]] = {"lm": targets.user}
    if OTHER_PROMPT in controls:
        reader[OTHER_PROMPT] = another_user(targets)
    for start in range(0, len(targets), cfg.decode.batch_size):
        rows = np.arange(start, min(start + cfg.decode.batch_size, len(targets)))
        part = targets.select(rows)
        anchor_BA = prior.base.log_probs(part.user, part.period)
        scores = {"anchor": anchor_BA}
        if CONSTANT_HIDDEN in controls:
            scores[CONSTANT_HIDDEN] = constant_log_probs(prior, part.user, part.period)
        if HISTORY_ALONE in controls:
            scores[HISTORY_ALONE] = constant_log_probs(prior, part.user, part.period, own_history=True)
        for arm, user_R in reader.items():
            prompts = [
                prior.compiler.compile(int(user), int(period))
                for user, period in zip(user_R[rows], part.period, strict=True)
            ]
            # Beyond the list, where no probability was decoded, the anchor decides the order.
            scores[arm] = anchor_BA - 1e6
            for row, decoded in enumerate(decoder.decode(prompts, part.user, part.period)):
                scores[arm][row, decoded.advertiser_K] = decoded.log_prob_K
        for arm, score_BA in scores.items():
            ranks.setdefault(arm, []).append(target_ranks(score_BA, part))
    rank_T = {arm: np.concatenate(parts) for arm, parts in ranks.items()}
    return {
        Measure(metric, arm, "all", k): at_k(rank_T[arm], targets, k)
        for arm in rank_T
        for metric, at_k in (("recall", recall_at_k), ("ndcg", ndcg_at_k))
        for k in KS
    }


def constant_log_probs(
    prior: PriorModel,
    user_B: NDArray[np.integer],
    period_B: NDArray[np.integer],
    *,
    own_history: bool = False,
) -> Float:
    """Log-probabilities where the head is given the mean of what it reads, ``(B, A)``: a bias a code on the anchor.

    Args, Raises:
        As of :func:`constant_scores`.
    """
    trie, scores = prior.base.trie, constant_scores(prior, user_B, period_B, own_history=own_history)
    return path_log_probs(trie, scores)[-1][:, trie.advertiser_leaf]


@torch.inference_mode()
def constant_scores(
    prior: PriorModel,
    user_B: NDArray[np.integer],
    period_B: NDArray[np.integer],
    *,
    own_history: bool = False,
) -> list[Float]:
    """Score of every node given its parent, before the softmax, where the head is given the mean of what it reads.

    Args:
        prior: the forecaster.
        user_B, period_B: whose anchor is the base, and as of when.
        own_history: give it the users' own history vectors beside the mean hidden state.

    Returns:
        ``(B, N_{d+1})`` for each depth d.

    Raises:
        ValueError: it is asked for history vectors, and the forecaster has none.
    """
    trie, scores, calibration = prior.base.trie, [], prior.calibration
    history_BF, constant_LH = None, prior.constant_LH
    if own_history:
        if prior.compiler.history is None:
            raise ValueError("own_history=True of a forecaster without history vectors")
        history_BF, constant_LH = torch.from_numpy(prior.compiler.history(user_B, period_B)), prior.constant_hidden
    repeats = prior.base.repeat_shares(user_B, period_B) if prior.model.head.repeats else None
    for level, base_BN in enumerate(prior.base.child_scores(user_B, period_B)):
        state_BS = _same_for_all(constant_LH[level], 1 if history_BF is None else len(history_BF), history_BF)
        logit_BV, change_BV = prior.model.head.apart(state_BS, level)
        code_N = trie.child_code[level]
        logit_BN = logit_BV.double().numpy()[:, code_N]
        if repeats is not None and change_BV is not None:
            logit_BN = logit_BN + repeats[level] * change_BV.double().numpy()[:, code_N]
        scores.append(calibration.base_exponent[level] * base_BN + calibration.lm_weight[level] * logit_BN)
    return scores


class _Schedule:
    """Baselines are asked at the times the forecasts were made at, so that no arm is fresher, with the same plan."""

    def __init__(self, forecasts: Mapping[str, TableForecast], targets: Targets) -> None:
        table = next(iter(forecasts.values())).table
        _, as_of = table.newest(targets.user, targets.period)
        self._made = dict(
            zip(zip(targets.user.tolist(), targets.period.tolist(), strict=True), as_of.tolist(), strict=True)
        )

    def kept(self, scorer: DatedScorer) -> Scorer:
        """The scorer, as of the newest forecast."""

        def score(user_B: NDArray[np.integer], period_B: NDArray[np.integer]) -> NDArray[np.floating]:
            pairs = zip(user_B.tolist(), period_B.tolist(), strict=True)
            return scorer(user_B, np.array([self._made[pair] for pair in pairs], dtype=np.int64), period_B)

        return score
