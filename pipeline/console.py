"""What the user sees while stages run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from data.writer import Advance, Tracker
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
        metrics = manifest.metrics
        told = figures_line({name: metrics[name] for name in stage.headline if metrics.get(name) is not None})
        if outcome.status == "skipped":
            self.console.print(f"[bold]{outcome.stage:<13}[/] [dim]up to date, skipped  {told}[/]", highlight=False)
        else:
            cost = f"{manifest.seconds:.0f} s, {manifest.peak_memory_mb / 1024:.1f} GiB"
            self.console.print(f"[bold]{outcome.stage:<13}[/] [green]done[/] in {cost}  {told}", highlight=False)


def figures_line(figures: Mapping[str, Any]) -> str:
    """Figures by name on one line, as the console shows them."""
    return "  ".join(f"{name} {escape(_short(value))}" for name, value in figures.items())


def progress_bars(console: Console) -> Tracker:
    """Progress bars of long work: how much is done, and for how long it has been going on."""

    @contextmanager
    def track(what: str, total: int | None) -> Iterator[Advance]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            task = bars.add_task(what, total=total)
            yield lambda steps: bars.advance(task, steps)

    return track


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return " ".join(f"{key}={_short(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        return "/".join(_short(item) for item in value)
    return f"{value:,}" if isinstance(value, int) else str(value)
