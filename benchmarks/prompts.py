"""Prompts compiled a second, by one process: with the default sections, and with all of them.

    python -m benchmarks.prompts /data/tables                          tables that `adsid data prepare` wrote
    python -m benchmarks.prompts /data/tables prior=titles             with any overrides of the configuration

The prompts are those of conversions of the fit span, 3,000 of them, drawn by seed: the first time, when words are
tokenised as they come up, and again. IDs are random, for none is read. Prints one JSON object a row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import transformers

from benchmarks.measure import row
from data.log import Log, Targets, load_log
from pipeline.config import compose
from pipeline.dataset import config_of
from pipeline.quiet import quiet_libraries
from priors.base_model import BaseModel, load_base_model
from priors.fit import sample_rows
from priors.prompt import PromptCompiler
from priors.prompt_config import EventsConfig, PromptConfig
from semantic_ids.advertiser_ids import AdvertiserIds

PROMPTS = 3000
LEVEL = 256


def main(directory: Path, overrides: Sequence[str]) -> None:
    """Measure and print."""
    quiet_libraries()
    transformers.utils.logging.disable_progress_bar()
    data = config_of(directory, [one for one in overrides if one.startswith("data.")]).data
    prior = compose([one for one in overrides if not one.startswith("data.")]).prior
    log, base_model = load_log(directory, data, evaluate="validation"), load_base_model(prior.base)
    targets = sample_rows(log.advertiser_targets("prior_fit"), PROMPTS, 0)
    _measure("as configured", log, base_model, prior.prompt, targets)
    _measure("all sections", log, base_model, _all_sections(), targets)


def _all_sections() -> PromptConfig:
    cfg = PromptConfig(max_tokens=512)
    for section in vars(cfg).values():
        if isinstance(section, EventsConfig):
            section.show = section.ids = True
    return cfg


def _measure(name: str, log: Log, base_model: BaseModel, cfg: PromptConfig, targets: Targets) -> None:
    began = perf_counter()
    compiler = PromptCompiler(log, _ids(log), base_model.tokenizer, cfg, window=base_model.window)
    row(f"prompts, {name}: making the compiler", perf_counter() - began, "s")
    rows = list(zip(targets.user.tolist(), targets.period.tolist(), strict=True))
    for time in ("first time", "again"):
        began = perf_counter()
        prompts = [compiler.compile(user, period) for user, period in rows]
        row(f"prompts, {name}: {time}", len(prompts) / (perf_counter() - began), "prompts/s")
    row(f"prompts, {name}: length", float(np.mean([len(prompt.token_ids) for prompt in prompts])), "tokens")


def _ids(log: Log) -> AdvertiserIds:
    number = np.arange(len(log.advertiser_ids))
    codes = np.stack([number // LEVEL**2, number // LEVEL % LEVEL, number % LEVEL], axis=1)
    return AdvertiserIds(log.advertiser_ids, codes, [np.zeros((LEVEL, 1), np.float32)] * 3)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
