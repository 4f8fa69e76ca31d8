"""How much of what can be known about the simulated log counts alone find out.

    python -m benchmarks.simulator                 the log of configs/data/simulator.yaml
    python -m benchmarks.simulator data.seed=1     with any overrides of the configuration

The log is written to a temporary directory. On its validation span: popularity, the tuned anchor, fitted as
`priors.fit` does it but for the prompts' words, which no anchor reads, and the oracle, `Truth.score`. Prints one JSON
object a row; the rows that say ``share`` are (popularity - anchor) / (popularity - oracle) in NLL, and the same
in recall.

Shapes: R user-weeks, A advertisers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from benchmarks.measure import row
from data.log import Log, load_log
from data.prepare import prepare
from data.tables import KINDS
from data.truth import TRUTH, Truth
from pipeline.config import AdsidConfig, compose
from pipeline.quiet import quiet_libraries
from priors.anchor import Anchor, Counts, TunedAnchor, mean_target_nll
from priors.config import PriorConfig
from priors.dataset import PromptDataset
from priors.fit import fit_anchor, sample_rows
from priors.metrics import recall_at_k, target_ranks
from priors.prompt import Wordless
from semantic_ids.tokenize import build_ids
from semantic_ids.trie import Trie

Float = NDArray[np.float64]
K = 10


def main(overrides: list[str]) -> None:
    """Simulate, fit and print."""
    quiet_libraries()
    config = compose(["data=simulator", "trainer.progress_bar=false", *overrides])
    with TemporaryDirectory() as directory:
        began = perf_counter()
        counts = prepare(config.data, Path(directory))
        row("simulator: preparing the tables", perf_counter() - began, "s")
        row("simulator: events", counts["events"], "rows")
        log = load_log(Path(directory), config.data, evaluate="validation")
        truth = Truth.load(Path(directory) / TRUTH)
        _describe(log)
        _compare(log, truth, _anchor(log, config, Path(directory)))


def _describe(log: Log) -> None:
    impressions = int((log.events.kind == KINDS.index("impression")).sum())
    periods = int(np.ptp(log.events.period)) + 1
    row("simulator: conversions of an impression", log.is_label.sum() / impressions, "share")
    row("simulator: purchases of a user", log.is_purchase.sum() / len(log.user_ids) / periods * 4, "a 4 weeks")


def _anchor(log: Log, config: AdsidConfig, work_dir: Path) -> TunedAnchor:
    """The tuned anchor as `priors.fit.fit_prior` has it."""
    prior: PriorConfig = config.prior
    ids = build_ids(log, config.semantic_ids, work_dir=work_dir / "ids").ids
    trie, counts = Trie.from_codes(ids.codes_AL, ids.level_sizes), Counts.of(log)
    train = sample_rows(log.advertiser_targets(prior.prompt_span(log.split.prior_fit)), prior.prompts, prior.seed)
    select = sample_rows(log.advertiser_targets("prior_select"), prior.anchor.select_rows, prior.seed)
    prompts = Wordless()
    tuned, _ = fit_anchor(counts, trie, PromptDataset(train, prompts), PromptDataset(select, prompts), prior.anchor)
    return tuned


def _compare(log: Log, truth: Truth, tuned: TunedAnchor) -> None:
    targets = log.advertiser_targets("validation")
    alone = replace(tuned.anchor.constants, own_weight=0.0)
    popularity = Anchor(tuned.anchor.counts, alone)
    arms: dict[str, Callable[[NDArray, NDArray], Float]] = {
        "popularity": popularity.probabilities,
        "anchor": lambda user, period: np.exp(tuned.log_probs(user, period)),
        "oracle": truth.score_all,
    }
    oracle_RA = truth.score_all(targets.user, targets.period)
    row("simulator: user-weeks with a conversion", len(targets), "rows")
    for among, allowed_RA in (("all", np.ones(oracle_RA.shape, bool)), ("active", oracle_RA > 0)):
        nll, recall = {}, {}
        for name, arm in arms.items():
            probability_RA = arm(targets.user, targets.period) * allowed_RA
            probability_RA /= probability_RA.sum(1, keepdims=True)
            log_prob_T = np.log(probability_RA[targets.row, targets.item])
            nll[name] = float(mean_target_nll(log_prob_T, targets).mean())
            recall[name] = float(recall_at_k(target_ranks(probability_RA, targets), targets, K).mean())
            row(f"simulator: nll of {name} among {among}", nll[name], "nat")
            row(f"simulator: recall@{K} of {name} among {among}", recall[name], "share")
        for measure, value in (("nll", nll), (f"recall@{K}", recall)):
            share = (value["popularity"] - value["anchor"]) / (value["popularity"] - value["oracle"])
            row(f"simulator: {measure} gain of the oracle that counts reach among {among}", share, "share")


if __name__ == "__main__":
    main(sys.argv[1:])
