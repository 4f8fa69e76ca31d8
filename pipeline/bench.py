"""``adsid bench``: the artifacts of a run, another configuration of what is measured, and what is written.

configuration ─► stages up to the towers and forecasts ─► `retrieval.benchmark` ─► retrieval.json, retrieval.html
run directory ─► its artifacts as they are ─┬───────────┘
                                            └─► `ranking.simulated_ab` ─► ab.json, ab.html
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from data.artifacts import MANIFEST, atomic_write_text, make_directory, package_versions, to_plain
from data.errors import UserError
from pipeline import config as configuration
from pipeline.config import AdsidConfig, compose, recompose, run_directory
from pipeline.engine import Context, check_inputs
from pipeline.run import run_stages
from pipeline.stages import TRAINED, ab_bench, retrieval_bench
from ranking.simulated_ab import SimulatedAB
from retrieval.benchmark import PARTS, RetrievalBenchmark, check_parts
from retrieval.config import RetrievalConfig

FOLDER, JSON_FILE, PAGE = "bench", "retrieval.json", "retrieval.html"
AB_JSON, AB_PAGE, AB_RANKERS = "ab.json", "ab.html", "rankers"
GROUP, AUCTION = "retrieval", "auction"
AB_ARTIFACTS = ("data", "semantic_ids", "prior", "forecasts", "two_tower", "retrieval", "ranker")
_RUN = "give the folder of a run, e.g. runs/quickstart"


def bench_of_configuration(
    overrides: Sequence[str], *, console: Console, parts: Sequence[str] = PARTS
) -> tuple[AdsidConfig, RetrievalBenchmark]:
    """Bring the stages that retrieval reads up to date, then measure.

    Args:
        overrides: of the whole configuration, as `adsid run` takes them.
        console: told what the stages do.
        parts: what is measured.

    Raises:
        UserError: no such part; as of `pipeline.run.run_stages`.
    """
    check_parts(parts)
    config, shared = compose(overrides), dict[Any, Any]()
    run_stages(config, console=console, until=_needed(config), shared=shared)
    return config, _measure(config, shared, parts)


def bench_of_run(
    run: Path, overrides: Sequence[str], parts: Sequence[str] = PARTS
) -> tuple[AdsidConfig, RetrievalBenchmark]:
    """Measure a retrieval configuration beside the artifacts of a finished run.

    Args:
        run: the run directory; nothing in it is changed.
        overrides: ``retrieval=choice`` and ``retrieval.key=value``; what the towers were trained by stays.
        parts: what is measured.

    Raises:
        UserError: no such part or run, an artifact is missing, or an override that would need training.
    """
    check_parts(parts)
    config = config_beside(run, overrides)
    _check_artifacts(run, _artifacts(config), hint=", or take channels that need none: retrieval=counts")
    return config, _measure(config, {}, parts)


def ab_of_run(run: Path, overrides: Sequence[str], out: Path) -> tuple[AdsidConfig, SimulatedAB]:
    """Let the stacks of a finished run on simulated data compete.

    Args:
        run: the run directory; its artifacts are taken as they are.
        overrides: ``auction.key=value``.
        out: folder for the rankers that are trained on the exact forecast.

    Raises:
        UserError: no such run, an artifact is missing, another override, or data that is not simulated.
    """
    saved = configuration.load_run(run, overrides, action=_RUN, read=(f"{AUCTION}.",))  # the stacks are the run's
    config = replace(saved, run=replace(saved.run, dir=str(run)))
    _check_artifacts(run, AB_ARTIFACTS)
    make_directory(out / AB_RANKERS)
    return config, ab_bench(_context(config, AB_ARTIFACTS, {}), out / AB_RANKERS)


def write_ab(config: AdsidConfig, found: SimulatedAB, folder: Path) -> Path:
    """Write ``ab.json`` and ``ab.html``, and return the path of the page."""
    from pipeline.ab_page import render

    atomic_write_text(folder / AB_JSON, ab_json(config, found))
    atomic_write_text(folder / AB_PAGE, render(config, found))
    return folder / AB_PAGE


def ab_json(config: AdsidConfig, found: SimulatedAB) -> str:
    """All figures, the market and the versions."""
    return _document(config, {**to_plain(asdict(found)), AUCTION: to_plain(config.auction)})


def _check_artifacts(run: Path, names: Sequence[str], hint: str = "") -> None:
    missing = [stage for stage in names if not (run / stage / MANIFEST).exists()]
    if missing:
        raise UserError(
            f"{run} without {', '.join(missing)}",
            expected=f"finished artifacts of {', '.join(names)}",
            action=f"make them with `adsid run`{hint}",
        )
    for stage in names:
        check_inputs(run, stage)


def config_beside(run: Path, overrides: Sequence[str]) -> AdsidConfig:
    """The configuration of a run with another retrieval.

    Raises:
        UserError: no such run, or an override of anything but what can be swapped without training.
    """
    saved = configuration.load_run(run, action=f"{_RUN}, or no --run and an experiment")
    foreign = [one for one in overrides if not one.startswith((f"{GROUP}=", f"{GROUP}."))]
    trained = [one for one in overrides if one.startswith(tuple(f"{GROUP}.{key}" for key in TRAINED))]
    if foreign or trained:
        raise UserError(
            f"{' '.join([*foreign, *trained])} beside the artifacts of {run}",
            expected="retrieval=choice and retrieval.key=value of channels, blend, index, budget, ks or quotas",
            action="leave it out, or leave out --run so that what it changes is made",
        )
    if any(one.startswith(f"{GROUP}=") for one in overrides):
        asked = compose([f"experiment={saved.experiment}", *overrides]).retrieval
    else:
        asked = recompose(to_plain(asdict(saved)), overrides).retrieval
    kept = {key: getattr(saved.retrieval, key) for key in TRAINED}
    return replace(saved, retrieval=replace(asked, **kept), run=replace(saved.run, dir=str(run)))


def write_bench(config: AdsidConfig, found: RetrievalBenchmark, folder: Path) -> Path:
    """Write ``retrieval.json`` and ``retrieval.html``, and return the path of the page."""
    from pipeline.bench_page import render

    folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / JSON_FILE, to_json(config, found))
    atomic_write_text(folder / PAGE, render(config, found))
    return folder / PAGE


def to_json(config: AdsidConfig, found: RetrievalBenchmark) -> str:
    """All figures, the configuration and the versions."""
    return _document(config, {**to_plain(asdict(found)), GROUP: to_plain(config.retrieval)})


def _document(config: AdsidConfig, found: dict[str, Any]) -> str:
    about = {"experiment": config.experiment, "data": config.data.source, "versions": package_versions()}
    return json.dumps({**found, **about}, indent=1, allow_nan=False) + "\n"


def default_folder(config: AdsidConfig) -> Path:
    """``bench`` in the run directory."""
    return run_directory(config) / FOLDER


def _needed(config: AdsidConfig) -> list[str]:
    """The last stages that retrieval reads."""
    return ["two_tower", "forecasts"] if config.retrieval.forecast_channels else ["two_tower"]


def _artifacts(config: AdsidConfig) -> list[str]:
    forecasting = ["prior", "forecasts"] if config.retrieval.forecast_channels else []
    return ["data", "semantic_ids", "two_tower", *forecasting]


def _measure(config: AdsidConfig, shared: dict[Any, Any], parts: Sequence[str]) -> RetrievalBenchmark:
    return retrieval_bench(_context(config, _artifacts(config), shared), parts)


def _context(config: AdsidConfig, artifacts: Sequence[str], shared: dict[Any, Any]) -> Context[AdsidConfig]:
    directory = run_directory(config)
    inputs = {name: directory / name for name in artifacts}
    return Context(config, inputs, directory, directory / ".work", shared)


def swapped(cfg: RetrievalConfig) -> str:
    """What of a configuration can be swapped, in one line."""
    return f"{', '.join(cfg.channels)}; blend {cfg.blend.kind}; budget {cfg.budget}; index {cfg.index.kind}"
