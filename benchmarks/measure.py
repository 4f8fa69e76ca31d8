"""What all benchmarks share: one JSON object a row, and measurements in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.engine import PeakMemory

_CHILD = "--child"


def row(name: str, value: float, unit: str, *, ratio: float | None = None) -> None:
    """Print one row.

    Args:
        name: what was measured.
        value: the figure.
        unit: its unit.
        ratio: where the row compares two sides of one run: this side over the other.
    """
    fields: dict[str, Any] = {"name": name, "value": round(value, 4), "unit": unit}
    if ratio is not None:
        fields["ratio"] = round(ratio, 4)
    print(json.dumps(fields), flush=True)


def in_own_process(module: str, case: str, argument: str, *, processes: int = 1) -> dict[str, float]:
    """Run one case of a benchmark alone, so that its peak memory is its own.

    Args:
        module: of the benchmark, whose ``main`` calls `serve`.
        case: name of the case.
        argument: handed to it.
        processes: several are started by ``torchrun``; the figures are those of one of them.

    Returns:
        Its figures, ``seconds`` and ``peak_gib`` among them.

    Raises:
        RuntimeError: the case failed.
    """
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(torchrun if processes > 1 else ()), "-m", module, _CHILD, case, argument]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def serve(cases: Mapping[str, Callable[[str], dict[str, Any]]]) -> bool:
    """Run the case that the command line asks for, if it does.

    Args:
        cases: take the argument and return figures by name.

    Returns:
        Whether one was asked for; then its figures have been printed.
    """
    if sys.argv[1:2] != [_CHILD]:
        return False
    case, argument = sys.argv[2:4]
    memory, started = PeakMemory(), time.monotonic()
    figures = cases[case](argument)
    figures |= {"seconds": time.monotonic() - started, "peak_gib": memory.peak_mb() / 1024}
    print(json.dumps(figures))
    return True
