"""``adsid results``: the headline figures of several runs on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.terminal import Debug, guarded, path_option

EPILOG = (
    "Example:\n\n"
    '  adsid results "Amazon Beauty=runs/beauty" "The Complete Journey=runs/full" --out docs/results\n\n'
    "Figures are read from what the stages of each run left; measures that a run does not have are left out."
)


def results(
    context: typer.Context,
    runs: Annotated[list[str], typer.Argument(metavar="NAME=RUN_DIR...", help="Runs, with the names to show.")],
    out: Annotated[Path, path_option("DIR", "Folder to write headline.md and headline.svg in.")],
    debug: Debug = False,
) -> None:
    """Put the headline figures of several runs on one page: one table per run, and a picture of the differences."""

    def work() -> None:
        from rich.console import Console

        from pipeline.grids import sections_to_console
        from pipeline.results import MARKDOWN, read_runs, sections, write_results

        found, folder = read_runs(runs), out.absolute()
        write_results(found, folder)
        console = Console(soft_wrap=True)
        console.print(sections_to_console("", sections(found)), highlight=False)
        console.print(f"page: {folder / MARKDOWN}", highlight=False)

    guarded(work, debug=debug or bool(context.obj))
