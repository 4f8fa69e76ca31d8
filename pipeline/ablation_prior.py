"""Ablations of the forecaster: what each arm's LM forecasts, against the first arm's and against its own anchor.

Every user-period has a value of every measure (`priors.judge`), so arms are compared pair by pair: an interval is
over users, and over training seeds where there are several.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.artifacts import Manifest
from data.errors import UserError
from data.statistics import Interval, Row, bootstrap_over_seeds
from pipeline.ablation import Kind, Recommendation, Shown
from pipeline.verdict import DIFFERENCE
from priors.interests import TOP_INTERESTS
from priors.judge import CONTROLS, Measure, RequestValues, load_requests

STAGE = "forecasts"
FORECASTS, START = ("lm", "anchor"), "start"
EXACT = ("nll", "interest_nll", "interest_recall", "select_nll")
"""Measures of the evaluation prompts, or the selection prompts, that have no like among those of all user-periods.
``select_nll`` is of the LM as it was trained, also where the forecaster went back to its ``start``, and a little
flattering: the best part of the training was chosen on the same prompts."""
SELECT_NLL = Measure("select_nll", "lm")
LISTS = 2
"""Place of the figures of all user-periods."""

Float = NDArray[np.float64]


def compare_forecasts(runs: Mapping[str, Sequence[Path]], stages: Sequence[str] = ("prior", STAGE)) -> list[Row]:
    """Figures of every arm, differences within each, and differences with the first.

    Args:
        runs: run directories of each arm, one a seed, the same seeds in all.
        stages: whose user-periods are compared: the selection prompts of ``prior``, and what ``forecasts`` evaluated.

    Returns:
        Rows whose arms are ``<arm> / lm`` and its like.

    Raises:
        UserError: arms were judged on different user-periods.
    """
    first = next(iter(runs))
    seeds = {
        arm: [[requests for stage in stages for requests in load_requests(run / stage)] for run in of_seeds]
        for arm, of_seeds in runs.items()
    }
    rows: list[Row] = []
    for arm, of_seeds in seeds.items():
        for number, _ in enumerate(of_seeds[0]):  # selection prompts, evaluation prompts, all user-periods
            own = [requests[number] for requests in of_seeds]
            others = [requests[number] for requests in seeds[first]]
            if arm != first:
                _check_same(arm, own, first, others)
            rows += _rows(arm, own, first, others, exact=number < LISTS)
    return rows


def recommend_prompt(runs: Mapping[str, Sequence[Path]], max_tokens: float | None = None) -> Recommendation | None:
    """The prompt to take: the shortest one that is not shown to be worse than the best.

    Judged by the NLL of the selection prompts as trained, so nothing of the evaluated span has a say. Which sections a
    prompt should have under a budget is what the paper leaves to future work as automated prompt design
    (arXiv 2605.27856).

    Args:
        runs: run directories of each arm, one a seed, the same seeds in all.
        max_tokens: how long prompts may be on average; None: any length.

    Returns:
        The recommendation; None where all arms have the same prompts and no length is asked for.
    """
    tokens = {
        arm: float(np.mean([Manifest.read(run / "prior").metrics["prompt_tokens_mean"] for run in of_seeds]))
        for arm, of_seeds in runs.items()
    }
    if max_tokens is None and len(set(tokens.values())) == 1:
        return None
    short = [arm for arm in runs if max_tokens is None or tokens[arm] <= max_tokens]
    if not short:
        return Recommendation(None, max_tokens, tokens, {})
    found = {arm: [load_requests(run / "prior")[0] for run in runs[arm]] for arm in short}
    nll = {arm: [one.values[SELECT_NLL] for one in of_seeds] for arm, of_seeds in found.items()}
    best = min(short, key=lambda arm: float(np.mean(nll[arm])))
    users = [one.user_R for one in found[best]]
    less_best = {
        arm: bootstrap_over_seeds([a - b for a, b in zip(nll[arm], nll[best], strict=True)], users) for arm in short
    }
    as_good = [arm for arm in short if not less_best[arm].low > 0]
    return Recommendation(min(as_good, key=tokens.__getitem__), max_tokens, tokens, less_best)


def _rows(
    arm: str, own: Sequence[RequestValues], first: str, others: Sequence[RequestValues], *, exact: bool
) -> list[Row]:
    users, rows = [one.user_R for one in own], []

    def row(values: Sequence[Float], measure: Measure, name: str) -> None:
        interval: Interval = bootstrap_over_seeds(values, users)
        of = {"metric": measure.metric, "segment": measure.segment, "k": measure.k, "arm": name}
        rows.append(Row.of(interval, section="forecast", seeds=len(own), **of))  # type: ignore[arg-type]

    for measure in own[0].values:
        forecast = measure.arm
        values = [one.values[measure] for one in own]
        # The evaluation prompts' lists are there to be compared with those of the controls alone.
        leads = not exact or measure.metric in EXACT or forecast in CONTROLS
        if forecast in (*FORECASTS, START, *CONTROLS) and leads:
            row(values, measure, f"{arm} / {forecast}")
        if forecast in FORECASTS and leads and arm != first and all(measure in one.values for one in others):
            differences = [a - one.values[measure] for a, one in zip(values, others, strict=True)]
            row(differences, measure, f"{arm} / {forecast}{DIFFERENCE}{first} / {forecast}")
        for against in ("anchor", START, *CONTROLS) if forecast == "lm" else ():
            base = measure._replace(arm=against)
            if (leads or against in CONTROLS) and base in own[0].values:
                differences = [a - one.values[base] for a, one in zip(values, own, strict=True)]
                row(differences, measure, f"{arm} / lm{DIFFERENCE}{arm} / {against}")
    return rows


def _check_same(arm: str, own: Sequence[RequestValues], first: str, others: Sequence[RequestValues]) -> None:
    for one, other in zip(own, others, strict=True):
        same = np.array_equal(one.user_R, other.user_R) and np.array_equal(one.period_R, other.period_R)
        if not same:
            raise UserError(
                f"arms {arm} and {first}, judged on {len(one.user_R)} and {len(other.user_R)} other user-periods",
                expected="the same user-periods in all arms",
                action="leave data and prior.panel, evaluation_prompts and select_prompts the same in all arms",
            )


PRIOR = Kind(
    name="prior",
    until=STAGE,
    stages=("prior", STAGE),
    seed="prior.seed={}",
    compare=compare_forecasts,
    levels=(
        Shown("NLL", "nll"),
        Shown("new NLL", "nll", segment="new"),
        Shown("recall@1", "recall", k=1),
        Shown("recall@5", "recall", k=5),
        Shown("recall@10", "recall", k=10),
        Shown("recall@20", "recall", k=20),
        Shown("recall@50", "recall", k=50),
        Shown("new recall@10", "recall", segment="new", k=10),
        Shown("active recall@10", "recall", segment="active", k=10),
        Shown("anchor's NLL", "nll", of="anchor"),
        Shown("selection NLL, as trained", "select_nll"),
        Shown("interests' NLL", "interest_nll"),
        Shown("interests' recall@5", "interest_recall", k=TOP_INTERESTS),
    ),
    within=(
        Shown("selection NLL, as trained − start", "select_nll", of="lm - start"),
        Shown("NLL, LM − anchor", "nll", of="lm - anchor"),
        Shown("NLL, LM − other prompt", "nll", of="lm - lm, other prompt"),
        Shown("NLL, LM − constant hidden", "nll", of="lm - lm, constant hidden"),
        Shown("NLL, LM − history alone", "nll", of="lm - lm, history alone"),
        Shown("interests' NLL, LM − anchor", "interest_nll", of="lm - anchor"),
        Shown("recall@10, LM − anchor", "recall", of="lm - anchor", k=10),
        Shown("recall@10, LM − other prompt", "recall", of="lm - lm, other prompt", k=10),
    ),
    recommend=recommend_prompt,
)
