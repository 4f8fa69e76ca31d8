"""How long sources take to become the five tables, and how much memory.

    python -m benchmarks.data                     all, in a temporary folder
    python -m benchmarks.data complete_journey    one of complete_journey, simulator, taobao_ad

Bars: The Complete Journey in 60 s and 4 GiB; a simulated log of 1M users, 100k advertisers and 50M events in 15
minutes and 6 GiB; a Taobao-shaped log of 30M behaviour rows within 4 GiB, with time and peak memory a row that do not
grow from 1M to 30M rows.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import in_own_process, row, serve
from benchmarks.taobao_source import write_log
from data.config import DataConfig
from data.prepare import prepare
from pipeline.config import compose

SIMULATOR = ("data.simulator.users=1000000", "data.simulator.advertisers=100000", "data.simulator.visits_per_week=0.26")
TAOBAO_ROWS, IMPRESSIONS = (1_000_000, 30_000_000), 1_000_000


def main() -> None:
    """Run the benchmarks that the command line names."""
    if serve({"complete_journey": _prepare_journey, "simulator": _prepare_simulator, "taobao_ad": _prepare_taobao}):
        return
    benchmarks: dict[str, Callable[[], None]] = {
        "complete_journey": complete_journey,
        "simulator": simulator,
        "taobao_ad": taobao_ad,
    }
    for name in sys.argv[1:] or benchmarks:
        if name not in benchmarks:
            raise SystemExit(f"no benchmark {name}, only {', '.join(benchmarks)}")
        benchmarks[name]()


def complete_journey() -> None:
    """All 53 weeks of it."""
    _report("complete_journey", _measure("complete_journey", ""))


def simulator() -> None:
    """A million users."""
    _report("simulator", _measure("simulator", ""))


def taobao_ad() -> None:
    """A small and a large log of the same shape."""
    figures: dict[int, dict[str, float]] = {}
    for rows in TAOBAO_ROWS:
        with tempfile.TemporaryDirectory() as directory:
            write_log(Path(directory), behaviours=rows, impressions=IMPRESSIONS)
            figures[rows] = _measure("taobao_ad", directory)
        _report(f"taobao_ad, {rows // 1_000_000}M behaviours", figures[rows])
    small, large = (figures[rows] for rows in TAOBAO_ROWS)
    for name, unit, scale in (("seconds", "µs/row", 1e6), ("peak_gib", "bytes/row", 2**30)):
        per_row = [scale * one[name] / rows for rows, one in zip(TAOBAO_ROWS, (small, large), strict=True)]
        row(f"taobao_ad, {name} a row, 30M over 1M", per_row[1], unit, ratio=per_row[1] / per_row[0])


def _measure(case: str, argument: str) -> dict[str, float]:
    return in_own_process("benchmarks.data", case, argument)


def _report(name: str, figures: dict[str, float]) -> None:
    row(f"{name}, time", figures["seconds"], "s")
    row(f"{name}, peak memory", figures["peak_gib"], "GiB")
    row(f"{name}, events", figures["events"], "rows")


def _prepare_journey(_: str) -> dict[str, Any]:
    return _prepare(compose(["data=complete_journey", "experiment=full"]).data)


def _prepare_simulator(_: str) -> dict[str, Any]:
    return _prepare(compose(["data=simulator", "experiment=full", *SIMULATOR]).data)


def _prepare_taobao(directory: str) -> dict[str, Any]:
    return _prepare(compose(["data=taobao_ad", "experiment=full", f'data.path="{directory}"']).data)


def _prepare(cfg: DataConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        return {"events": prepare(cfg, Path(directory))["events"]}


if __name__ == "__main__":
    main()
