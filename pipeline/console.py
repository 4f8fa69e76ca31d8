"""What the user sees while stages run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from pipeline.engine import Observer, Outcome, Stage


class ConsoleObserver(Observer):
    """One line when a stage starts, one when it ends."""

    def __init__(self, console: Console) -> None:
        self.console = console
        super().__init__(self._start, self._end)

    def _start(self, stage: str, why: str) -> None:
        self.console.print(f"[bold]{stage:<13}[/] {escape(why)}", highlight=False)

    def _end(self, outcome: Outcome, stage: Stage[Any]) -> None:
        manifest = outcome.manifest
        told = "  ".join(
            f"{name} {escape(_short(manifest.metrics[name]))}"
            for name in stage.headline
            if manifest.metrics.get(name) is not None
        )
        if outcome.status == "skipped":
            self.console.print(f"[bold]{outcome.stage:<13}[/] [dim]up to date, skipped  {told}[/]", highlight=False)
        else:
            cost = f"{manifest.seconds:.0f} s, {manifest.peak_memory_mb / 1024:.1f} GiB"
            self.console.print(f"[bold]{outcome.stage:<13}[/] [green]done[/] in {cost}  {told}", highlight=False)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{key}={_short(item)}" for key, item in value.items())
    if isinstance(value, list):
        return "/".join(_short(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
