"""Tuning: one stage at the points of a grid, chosen by the figure that the stage itself stops by.

    adsid tune ranker "ranker.learning_rate=1e-3,3e-3" ranker=dlrm,dcn_v2
        │   Hydra's sweeps: values apart by commas, choice(...), range(...); their product, or so many points of it
        ▼
    an ablation (`pipeline.ablation`) of one arm a point, that ends at the stage
        ▼
    the point with the best figure of the stage's own selection span

The choice reads no figure of the evaluated span: the forecaster is chosen by its selection prompts, the towers and the
rankers by the span that their epochs are chosen on. A ranker's figure is the mean over the arms none, anchor and LM, so
that one setting serves all three and none is favoured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from hydra.core.override_parser.types import Glob, IntervalSweep, Override

from data.artifacts import Manifest
from data.errors import UserError
from data.statistics import Row
from pipeline.ablation import Kind, Shown, Study
from pipeline.ablation_prior import PRIOR, compare_forecasts
from pipeline.config import parse_overrides
from pipeline.stages import RANKERS
from pipeline.verdict import DIFFERENCE

ARMS = ("none", "anchor", "lm")
"""Whose rankers choose a ranker's setting."""
MEAN = "mean of the arms"
_DRAW = 0
_UNSAFE = re.compile(r"[^\w+.,=() -]")
_EXAMPLE = '"ranker.learning_rate=0.001,0.003"'


def grid_study(stage: str, overrides: Sequence[str], *, trials: int | None = None) -> tuple[Study, list[str]]:
    """The points of a grid as the arms of a study.

    Args:
        stage: one of `TUNED`.
        overrides: of which some have several values, as Hydra's sweeps are written.
        trials: draw so many of the points; None takes all.

    Returns:
        The study, and the overrides with one value, which all points share.

    Raises:
        UserError: another stage; no override has several values, one has values without end or is a pattern, or an
            override cannot be read. All of it is told at once.
    """
    errors = []
    if stage not in TUNED:
        errors.append(
            UserError(f"the stage {stage}", expected=f"one of {', '.join(TUNED)}", action="name a stage that trains")
        )
    parsed, unread = parse_overrides(overrides, sweeps=True)
    errors += unread
    swept = [one for one in parsed if one.is_sweep_override()]
    for one in swept:
        if isinstance(one.value(), (Glob, IntervalSweep)):
            errors.append(
                UserError(
                    f"the override {one.input_line}",
                    expected="values that can be counted: a,b,c or choice(a,b,c) or range(1,4)",
                    action="name the values to try",
                )
            )
    if not swept and not errors:
        errors.append(
            UserError(
                " ".join(overrides) or "no override",
                expected=f"at least one with several values, e.g. {_EXAMPLE}",
                action="give the values to choose from, with commas between them",
            )
        )
    if errors:
        raise UserError.collect(errors)
    points = list(product(*([f"{one.get_key_element()}={value}" for value in _values(one)] for one in swept)))
    n_points = len(points)
    if trials is not None and trials < n_points:
        drawn = np.random.default_rng(_DRAW).choice(n_points, trials, replace=False)
        points = [points[place] for place in sorted(drawn.tolist())]
    names = _names([one.get_key_element() for one in swept], points)
    about = f"Which setting of the stage {stage}: {len(points)} of {n_points} points of the grid"
    study = Study(f"tune_{stage}", about, (), dict(zip(names, points, strict=True)))
    return study, [one.input_line for one in parsed if one not in swept and one.input_line is not None]


def _values(one: Override) -> list[str]:
    return list(one.sweep_string_iterator())


def _names(keys: Sequence[str], points: Sequence[tuple[str, ...]]) -> list[str]:
    """A short name for each point that can be a folder's: the last part of each key where that is unique."""
    short = [key.split(".")[-1] for key in keys]
    shown = [last if short.count(last) == 1 else key for key, last in zip(keys, short, strict=True)]
    names: list[str] = []
    for point in points:
        values = (_UNSAFE.sub("", one.partition("=")[2].replace("/", "-")) or "none" for one in point)
        name = ", ".join(f"{key}={value}" for key, value in zip(shown, values, strict=True))
        names.append(name if name not in names else f"{name} ({len(names) + 1})")
    return names


# --- what is tuned, and by what -----------------------------------------------------------------------------


def _of_manifests(
    runs: Mapping[str, Sequence[Path]], section: str, metric: str, read: Callable[[Path], dict[str, float]]
) -> list[Row]:
    """Rows of a figure that a run has one of, by what it is of: its mean over seeds, and less the first arm's."""
    rows: list[Row] = []
    means: dict[str, dict[str, float]] = {}
    for arm, of_seeds in runs.items():
        found = [read(run) for run in of_seeds]
        means[arm] = {of: float(np.mean([one[of] for one in found])) for of in found[0]}

    def row(arm: str, value: float, n: int) -> None:
        rows.append(Row(section, metric, arm, "all", None, value, None, None, n, n))

    first = next(iter(runs))
    for arm, of in means.items():
        for name, value in of.items():
            row(f"{arm} / {name}", value, len(runs[arm]))
            if arm != first:
                row(f"{arm} / {name}{DIFFERENCE}{first} / {name}", value - means[first][name], len(runs[arm]))
    return rows


def _val_recall(run: Path) -> dict[str, float]:
    return {"towers": float(Manifest.read(run / "two_tower").metrics["val_recall"])}


def _val_loss(run: Path) -> dict[str, float]:
    """Of each arm's rankers, a mean over those of all seeds, and of the arms."""
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for directory in sorted((run / "ranker" / RANKERS).iterdir()):
        arm = directory.name.rpartition("-")[0]
        if arm in losses:
            losses[arm].append(float(Manifest.read(directory).metrics["val_loss"]))
    of_arms = {arm: float(np.mean(values)) for arm, values in losses.items()}
    return {MEAN: float(np.mean(list(of_arms.values())))} | of_arms


def _kind(stage: str, seed: str, compare: Callable[[Mapping[str, Sequence[Path]]], list[Row]], *shown: Shown) -> Kind:
    return Kind(
        name=stage,
        until=stage,
        stages=(stage,),
        seed=seed,
        compare=compare,
        levels=shown,
        within=tuple(one for one in PRIOR.within if one.metric == "select_nll") if stage == "prior" else (),
        recommend=lambda runs: None,
        choose=shown[0],
    )


TUNED: dict[str, Kind] = {
    "prior": _kind(
        "prior",
        "prior.seed={}",
        partial(compare_forecasts, stages=("prior",)),
        Shown("selection NLL, as trained", "select_nll"),
    ),
    "two_tower": _kind(
        "two_tower",
        "retrieval.seed={}",
        partial(_of_manifests, section="retrieval", metric="val_recall", read=_val_recall),
        Shown("recall of the tuning span", "val_recall", of="towers"),
    ),
    "ranker": _kind(
        "ranker",
        "ranker.seeds=[{}]",
        partial(_of_manifests, section="ranking", metric="val_loss", read=_val_loss),
        Shown("log loss of the tuning span, mean of the arms", "val_loss", of=MEAN),
        *(Shown(f"log loss of the tuning span, {arm}", "val_loss", of=arm) for arm in ARMS),
    ),
}
"""By stage."""
