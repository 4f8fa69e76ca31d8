"""Running the stages of a configuration: what `adsid run`, `adsid report` and `train.py` share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console

from data.errors import UserError
from data.statistics import Row
from models.training import starting_helpers
from pipeline import config as configuration
from pipeline.config import CONFIG_FILE, AdsidConfig
from pipeline.console import ConsoleObserver
from pipeline.engine import Outcome, Run
from pipeline.stages import ablations, read_rows, stages
from ranking.config import SHARDED

REPORT = Path("report") / "report.html"


def run_stages(
    config: AdsidConfig,
    *,
    console: Console,
    only: str | None = None,
    until: Sequence[str] = (),
    shared: dict[Any, Any] | None = None,
    overrides: Sequence[str] | None = None,
) -> list[Outcome]:
    """Bring the stages of a run directory up to date.

    Args:
        config: of the run; ``run.until`` ends it early.
        console: told what happens.
        only: run this one stage alone, from artifacts that are there.
        until: the last stages wanted, in the place of ``run.until``.
        shared: takes what the stages hand on to each other, for whoever reads it after them.
        overrides: that the configuration was asked for with; the report tells them. None where they are not known.

    Returns:
        One outcome a stage.

    Raises:
        UserError: a mistake in the configuration, the data or the place to write to.
    """
    follows = _follows(config, only)
    transformers.utils.logging.disable_progress_bar()  # its bars are of seconds, and break the lines of a log
    directory = configuration.run_directory(config)
    if follows:
        console.quiet = True

    def begin() -> None:
        # What only needs some of a run's stages leaves the configuration of the others as it is.
        if overrides is not None or not (directory / CONFIG_FILE).exists():
            configuration.save(config, directory / CONFIG_FILE, overrides)

    run = Run(
        directory, stages(), config, observer=ConsoleObserver(console), follows=follows,
        # Before the first stage: artifacts of a run that stops half-way are read by the configuration that made them.
        on_begin=begin,
    )  # fmt: skip
    if shared is not None:
        run.shared = shared
    console.print(f"run directory [bold]{directory}[/], experiment {config.experiment}", highlight=False)
    if only is not None:
        with starting_helpers():
            outcomes = [run.execute_one(only)]
    else:
        outcomes = run.execute(until=until or config.run.until)
    if all(outcome.status == "skipped" for outcome in outcomes):
        console.print("everything is up to date, nothing was done")
    return outcomes


def _follows(config: AdsidConfig, only: str | None) -> bool:
    """Whether this is one of the processes of ``torchrun``, or of Lightning, that help the first one.

    Raises:
        UserError: several processes for something that one does.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # Lightning starts them with the very command of the first
        return only is not None and os.environ.get("LOCAL_RANK", "0") != "0"
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1" and (only != "ranker" or config.strategy != SHARDED):
        raise UserError(
            f"{started} processes for stage {only} with strategy={config.strategy}",
            expected=f"stage=ranker strategy={SHARDED}, which several processes train together",
            action="name them, or start one process: python train.py",
        )
    return started != "1" and os.environ["RANK"] != "0"


def run_ablation(config: AdsidConfig, name: str, *, console: Console) -> tuple[list[Row], Path]:
    """Bring one ablation of a run directory up to date.

    Args:
        config: of the run whose artifacts it reads.
        name: of the ablation's stage.
        console: told what happens.

    Returns:
        Its figures, and the directory that holds them.

    Raises:
        UserError: a stage that it reads is not finished, or a mistake in the configuration.
    """
    directory = configuration.run_directory(config)
    run = Run(directory, [*stages(), *ablations()], config, observer=ConsoleObserver(console))
    run.execute_one(name)
    return read_rows(directory / name), directory / name


def report_again(directory: Path, *, console: Console) -> Path:
    """Write the report of a finished run anew, from its artifacts.

    Args:
        directory: the run directory.
        console: told what happens.

    Returns:
        Path of ``report.html``.

    Raises:
        UserError: there is no such run, or stages before the report are not finished.
    """
    action = "give the folder of a finished run, e.g. runs/quickstart, or make one with `adsid run`"
    config = configuration.load_run(directory, action=action)
    config.run.dir = str(directory)
    Run(directory, stages(), config, observer=ConsoleObserver(console)).execute_one("report", again=True)
    return directory / REPORT
