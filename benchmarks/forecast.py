"""What forecasts advertisers without a language model, on a data set's validation span.

    python -m benchmarks.forecast                                        The Complete Journey, in a temporary folder
    python -m benchmarks.forecast runs/data/complete_journey             tables prepared before
    python -m benchmarks.forecast /data/beauty prior.baselines.names=[ease]    with any overrides of the configuration
    python -m benchmarks.forecast runs/beauty                            a run whose stage prior is done

Popularity, the counting anchors of each `prior.anchor.kind` with their constants chosen on the selection span (and what
co-conversions change there, by which ``auto`` chooses), own frequency, EASE, item-kNN and SASRec: all user-periods, the
same as-of rule, the same measures. Of a run, whose own configuration holds, it is the run's tuned anchor instead, and
the forecast by anchor and history vector alone, of which the probabilities of everything are as cheap as the anchor's:
those of the users of ``prior.panel``. Prints one JSON object a row, and on the error stream what was chosen and the
table of `docs/results/forecast.md`.
"""

from __future__ import annotations

import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.measure import row
from data.log import Log, load_log
from data.prepare import prepare
from data.statistics import Row
from pipeline.config import CONFIG_FILE, AdsidConfig, compose
from pipeline.dataset import config_of
from pipeline.forecasts import PANEL, open_prior
from pipeline.quiet import quiet_libraries
from priors.anchor import Anchor, Counts
from priors.artifact import PriorModel
from priors.baselines import fit_baselines
from priors.config import ANCHORS, AUTO_ANCHORS, BASELINES
from priors.constants import ChosenConstants, change_of_nll, choose_constants
from priors.evaluate import constant_log_probs
from priors.fit import rows_of, sample_rows
from priors.judge import Measure, RequestValues, Scorer, compared, judge_lists

SHOWN = (
    *(Measure("recall", "", "all", k) for k in (1, 5, 10, 20, 50)),
    Measure("ndcg", "", "all", 10),
    Measure("ndcg", "", "all", 20),
    Measure("listed_nll", ""),
    Measure("ece", ""),
    *(Measure("recall", "", "new", k) for k in (10, 20, 50)),
    Measure("ndcg", "", "new", 10),
    Measure("listed_nll", "", "new"),
    Measure("recall", "", "active", 10),
    Measure("listed_nll", "", "active"),
    Measure("recall", "", "sparse users", 10),
    Measure("recall", "", "busy users", 10),
)


def main(arguments: list[str]) -> None:
    """Measure and print."""
    quiet_libraries()
    folders = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    with tempfile.TemporaryDirectory() as temporary:
        if folders and (Path(folders[0]) / CONFIG_FILE).exists():
            config, log, prior = open_prior(Path(folders[0]), overrides, read=(*PANEL, "prior.baselines.", "evaluate"))
            return measure(log, config, Path(temporary), prior)
        config = _config(Path(folders[0]) if folders else None, overrides)
        tables = Path(folders[0]) if folders else Path(temporary) / "tables"
        if not folders:
            tables.mkdir()
            prepare(config.data, tables)
        entity = config.semantic_ids.entity
        return measure(load_log(tables, config.data, evaluate=config.evaluate, entity=entity), config, Path(temporary))


def _config(folder: Path | None, overrides: list[str]) -> AdsidConfig:
    """The folder's own data config, where a manifest tells it; else that of The Complete Journey."""
    config = compose(
        [
            "data=complete_journey",
            "trainer.progress_bar=false",
            f"prior.baselines.names=[{','.join(BASELINES)}]",
            *overrides,
        ]
    )
    if folder is not None and (folder / "manifest.json").exists():
        config.data = config_of(folder, [one for one in overrides if one.startswith("data.")]).data
    return config


def measure(log: Log, config: AdsidConfig, work_dir: Path, run: PriorModel | None = None) -> None:
    """All forecasters, one after the other; those of a run in place of the anchors where there is one."""
    prior, targets = config.prior, log.advertiser_targets(log.evaluate)
    seconds: dict[str, float] = {}
    scorers: dict[str, Scorer] = {}
    if run is None:
        counts = Counts.of(log)
        select = sample_rows(log.advertiser_targets("prior_select"), prior.anchor.select_rows, prior.seed)
        chosen: dict[str, ChosenConstants] = {}
        for kind in ANCHORS[1:]:
            began = time.perf_counter()
            prior.anchor.kind = kind
            chosen[kind] = choose_constants(counts, select, prior.anchor)
            anchor = Anchor(counts, chosen[kind].constants)
            scorers[kind] = _log_of(anchor)
            seconds[kind] = time.perf_counter() - began
            nll = chosen[kind].nll_R.mean()
            print(f"{kind}: {chosen[kind].constants}, NLL of {len(select)} selection rows {nll:.4f}", file=sys.stderr)
        without, with_co = (chosen[kind] for kind in AUTO_ANCHORS)
        gain = change_of_nll(with_co, without, select)
        print(f"co-conversions there: {gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]", file=sys.stderr)
    else:
        targets, anchor = rows_of(targets, log.panel(prior.panel, prior.seed)), run.base.anchor
        scorers = {"popularity": _log_of(anchor.popularity_alone()), "anchor": run.base.log_probs}
        if run.compiler.history is not None:
            scorers["history alone"] = partial(constant_log_probs, run, own_history=True)
    best = list(scorers)[-1]
    popularity = anchor.popularity_alone()
    for name in list(prior.baselines.names):
        began = time.perf_counter()
        prior.baselines.names = [name]
        baselines, chosen = fit_baselines(log, popularity, prior.baselines, seed=prior.seed, work_dir=work_dir)
        scorers[name] = baselines[name].log_probs
        seconds[name] = time.perf_counter() - began
        print(f"{name}: {chosen[name]}", file=sys.stderr)
    lists, _, errors = judge_lists(scorers, log, targets)
    rows = [*compared(lists, best, tuple(scorers)), *errors]
    _print(lists, rows, list(scorers), best=best, seconds=seconds)


def _log_of(anchor: Anchor) -> Scorer:
    return lambda user_B, period_B: np.log(anchor.probabilities(user_B, period_B))


def _print(lists: RequestValues, rows: list[Row], scorers: list[str], *, best: str, seconds: dict[str, float]) -> None:
    values = {(one.metric, one.arm, one.segment, one.k): one for one in rows}
    lines = [["", *map(_title, SHOWN)], ["---"] * (1 + len(SHOWN))]
    for arm in scorers:
        found = [values.get((m.metric, arm, m.segment, m.k)) for m in SHOWN]
        lines.append([arm, *("" if one is None else f"{one.value:.3f}" for one in found)])
        for measure, one in zip(SHOWN, found, strict=True):
            if one is not None:
                row(f"{arm}: {_title(measure)}", one.value, "nat" if "nll" in measure.metric else "share")
            difference = values.get((measure.metric, f"{best} - {arm}", measure.segment, measure.k))
            if difference is not None:
                low, high = difference.ci_low, difference.ci_high
                row(f"{best} - {arm}: {_title(measure)} [{low:+.4f}, {high:+.4f}]", difference.value, "difference")
        if arm in seconds:
            row(f"{arm}: fit", seconds[arm], "s")
    print(f"\n{len(lists.user_R)} user-periods of {len(set(lists.user_R.tolist()))} users\n", file=sys.stderr)
    print("\n".join(f"| {' | '.join(line)} |" for line in lines), file=sys.stderr)


def _title(measure: Measure) -> str:
    name = {"listed_nll": "NLL", "ece": "ECE", "ndcg": "NDCG"}.get(measure.metric, measure.metric)
    at = "" if measure.k is None else f"@{measure.k}"
    return f"{'' if measure.segment == 'all' else measure.segment + ' '}{name}{at}"


if __name__ == "__main__":
    main(sys.argv[1:])
