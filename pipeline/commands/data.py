"""``adsid data``: bring a log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.terminal import Debug, Page, PageJson, guarded, path_argument, path_option, print_json, show_page

app = typer.Typer(
    name="data",
    help="Bring a log: write it as the five tables, check them, and see what is in them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples:\n\n"
    "  adsid data prepare data=complete_journey\n\n"
    "  adsid data validate runs/data/complete_journey\n\n"
    "  adsid data describe runs/data/complete_journey",
)

DataDirectory = Annotated[Path, path_argument("DIR", "The folder of the five tables.")]
DataOverrides = Annotated[
    list[str] | None, typer.Argument(help="data.key=value, or evaluate=test, beside what the folder's manifest says.")
]


@app.command(
    "prepare",
    epilog="Examples:\n\n"
    "  adsid data prepare data=complete_journey\n\n"
    "  adsid data prepare data=amazon data.path=/data/beauty --out /data/beauty-tables\n\n"
    "  adsid data prepare data=simulator data.simulator.users=20000 data.seed=1\n\n"
    "Use it with: adsid run data=parquet data.path=<the folder written>, or name the source in adsid run itself.",
)
def data_prepare(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="data=<source> and data.key=value; see configs/data/.")
    ] = None,
    out: Annotated[
        Path | None,
        path_option("DIR", "Folder to write; runs/data/<source> where none is given."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Write a source as the five tables, checked, with a manifest."""

    def work() -> None:
        from rich.console import Console

        from pipeline.config import compose
        from pipeline.console import figures_line, progress_bars
        from pipeline.dataset import prepare_directory

        config = compose(["experiment=full", *(overrides or [])])
        directory = (out or Path("runs/data") / config.data.source).absolute()
        console = Console(soft_wrap=True)
        manifest = prepare_directory(config.data, directory, track=progress_bars(console))
        console.print(f"tables: {directory}", highlight=False)
        console.print(f"{figures_line(manifest.metrics)}  in {manifest.seconds:.0f} s", highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@app.command(
    "validate",
    epilog="Examples:\n\n"
    "  adsid data validate runs/data/complete_journey\n\n"
    "  adsid data validate /data/my_tables data.label_kinds=\\[click] data.split.by=quantiles\n\n"
    "Exit code 2 and every problem at once, where something is wrong.",
)
def data_validate(
    context: typer.Context, directory: DataDirectory, overrides: DataOverrides = None, debug: Debug = False
) -> None:
    """Check five tables, and that the split and the columns of their config fit them."""

    def work() -> None:
        from rich.console import Console

        from pipeline.console import figures_line
        from pipeline.dataset import check_directory

        figures = check_directory(directory, overrides or [])
        Console(soft_wrap=True).print(f"sound: {figures_line(figures)}", highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@app.command(
    "describe",
    epilog="Examples:\n\n"
    "  adsid data describe runs/data/complete_journey\n\n"
    "  adsid data describe runs/quickstart/data --page log.html\n\n"
    "  adsid data describe runs/data/complete_journey evaluate=test    the test span too, otherwise closed\n\n"
    "  adsid data describe /data/my_tables --json",
)
def data_describe(
    context: typer.Context,
    directory: DataDirectory,
    overrides: DataOverrides = None,
    page: Page = None,
    json: PageJson = False,
    debug: Debug = False,
) -> None:
    """Counts, sparsity, head and tail, new advertisers, label rate and text coverage: a table and plots."""

    def work() -> None:
        from data.describe import describe
        from pipeline.dataset import open_directory
        from pipeline.description import to_console, write_description

        tables, config = open_directory(directory, overrides or [])
        description = describe(tables, config.data, evaluate=config.evaluate)
        if json:
            print_json(description)
            return
        show_page(description, directory, page, write=write_description, to_console=to_console)

    guarded(work, debug=debug or bool(context.obj))
