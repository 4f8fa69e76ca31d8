"""``adsid bench retrieval``: the artifacts of a run, any retrieval configuration beside them, and what is written.

configuration ─► stages up to the towers and forecasts ─► `retrieval.benchmark` ─► retrieval.json, retrieval.html
run directory ─► its artifacts as they are             ─┘
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from data.artifacts import MANIFEST, atomic_write_text, package_versions, to_plain
from data.errors import UserError
from pipeline import config as configuration
from pipeline.config import AdsidConfig, compose, recompose, run_directory
from pipeline.engine import Context
from pipeline.run import run_stages
from pipeline.stages import TRAINED, retrieval_bench
from retrieval.benchmark import PARTS, RetrievalBenchmark, check_parts
from retrieval.config import RetrievalConfig

FOLDER, JSON_FILE, PAGE = "bench", "retrieval.json", "retrieval.html"
GROUP = "retrieval"


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
    missing = [stage for stage in _artifacts(config) if not (run / stage / MANIFEST).exists()]
    if missing:
        raise UserError(
            f"{run} without {', '.join(missing)}",
            expected=f"finished artifacts of {', '.join(_artifacts(config))}",
            action="make them with `adsid run`, or take channels that need none: retrieval=counts",
        )
    return config, _measure(config, {}, parts)


def config_beside(run: Path, overrides: Sequence[str]) -> AdsidConfig:
    """The configuration of a run with another retrieval.

    Raises:
        UserError: no such run, or an override of anything but what can be swapped without training.
    """
    action = "give the folder of a run, e.g. runs/quickstart, or no --run and an experiment"
    saved = configuration.load_run(run, action=action)
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
    document: dict[str, Any] = {
        **to_plain(asdict(found)),
        "retrieval": to_plain(config.retrieval),
        "experiment": config.experiment,
        "data": config.data.source,
        "versions": package_versions(),
    }
    return json.dumps(document, indent=1, allow_nan=False) + "\n"


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
    directory = run_directory(config)
    inputs = {name: directory / name for name in _artifacts(config)}
    return retrieval_bench(Context(config, inputs, directory, directory / ".work", shared), parts)


def swapped(cfg: RetrievalConfig) -> str:
    """What of a configuration can be swapped, in one line."""
    return f"{', '.join(cfg.channels)}; blend {cfg.blend.kind}; budget {cfg.budget}; index {cfg.index.kind}"
