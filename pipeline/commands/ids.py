"""``adsid ids``: semantic IDs of advertisers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.terminal import (
    Debug,
    Page,
    PageJson,
    guarded,
    path_argument,
    path_option,
    print_json,
    show_page,
    terminal_overrides,
)

app = typer.Typer(
    name="ids",
    help="Semantic IDs of advertisers: how good they are, new ones beside them, and what is kept after drift.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples:\n\n"
    "  adsid ids report runs/quickstart/semantic_ids\n\n"
    "  adsid ids assign new.parquet --ids runs/quickstart --out ids/today\n\n"
    "  adsid ids refit --ids runs/quickstart --data runs/data/complete_journey --out ids/refit",
)


@app.command(
    "report",
    epilog="Examples:\n\n"
    "  adsid ids report runs/quickstart/semantic_ids\n\n"
    "  adsid ids report runs/quickstart/semantic_ids --page ids.html\n\n"
    "  adsid ids report runs/quickstart/semantic_ids --json",
)
def ids_report(
    context: typer.Context,
    directory: Annotated[Path, path_argument("DIR", "The folder of the stage semantic_ids.")],
    page: Page = None,
    json: PageJson = False,
    debug: Debug = False,
) -> None:
    """Collisions, use of the codes, neighbours, and what shares a prefix in words: a table and plots."""

    def work() -> None:
        from pipeline.ids_quality import quality_of
        from pipeline.ids_report import to_console, write_ids_report

        found = quality_of(directory)
        if json:
            print_json(found)
            return
        show_page(found, directory, page, write=write_ids_report, to_console=to_console)

    guarded(work, debug=debug or bool(context.obj))


IdsDirectory = Annotated[
    Path,
    path_option("DIR", "The old IDs: the folder of the stage semantic_ids, or of its run.", "--ids"),
]
IdsOutput = Annotated[Path, path_option("DIR", "Folder to write; the old IDs stay where they are.")]


@app.command(
    "assign",
    epilog="Examples:\n\n"
    "  adsid ids assign new.parquet --ids runs/quickstart --out ids/today\n\n"
    "  adsid ids assign runs/data/mine/advertisers.parquet --skip-known --ids ids/yesterday --out ids/today\n\n"
    "A prior LM fitted on the old IDs takes the new table as it is: no ID that was there changes.",
)
def ids_assign(
    context: typer.Context,
    new: Annotated[
        Path,
        path_argument("NEW.parquet", "The new ones: advertiser_id, name and text, one row each."),
    ],
    ids: IdsDirectory,
    out: IdsOutput,
    skip_known: Annotated[
        bool, typer.Option("--skip-known", help="Leave out those that have an ID already; else they are an error.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Give new advertisers IDs beside the old ones, none of which changes."""

    def work() -> None:
        from rich.console import Console

        from pipeline.ids import assign_file, to_console

        target = out.absolute()
        manifest = assign_file(new, ids, target, skip_known=skip_known)
        Console(soft_wrap=True).print(to_console(manifest, target), highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@app.command(
    "refit",
    epilog="Examples:\n\n"
    "  adsid ids refit --ids runs/quickstart --data runs/data/complete_journey --out ids/refit\n\n"
    "  adsid ids refit --ids ids/refit --data /data/today --out ids/next semantic_ids.trainer.max_epochs=10\n\n"
    "A prior LM fitted on the old IDs refuses those of a refit that changed any of them.",
)
def ids_refit(
    context: typer.Context,
    ids: IdsDirectory,
    data: Annotated[Path, path_option("DIR", "The five tables of today.")],
    out: IdsOutput,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="semantic_ids.key=value and data.key=value, beside what the two folders say."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Squared error that keeping an old ID may add, as a share of the embeddings' variance; "
            "0.1 where none is given.",
            show_default=False,
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Fit the tokenizer to a changed log, keep old IDs wherever the geometry allows, and say how many."""

    def work() -> None:
        from rich.console import Console

        from pipeline.ids import TOLERANCE, refit_directory, to_console

        target = out.absolute()
        quiet = [f"semantic_ids.{override}" for override in terminal_overrides()]
        share = TOLERANCE if tolerance is None else tolerance
        manifest = refit_directory(ids, data, target, [*quiet, *(overrides or [])], tolerance=share)
        Console(soft_wrap=True).print(to_console(manifest, target), highlight=False)

    guarded(work, debug=debug or bool(context.obj))
