"""The `adsid` command. Heavy imports wait until a command runs, so that help is quick."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from data.errors import UserError

USER_MISTAKE, OUR_MISTAKE, INTERRUPTED = 2, 1, 130

app = typer.Typer(
    name="adsid",
    help="An LLM forecasts which advertisers a user converts with; retrieval and ranking use the forecast.",
    epilog="Examples:\n\n  adsid run experiment=quickstart\n\n  adsid report runs/quickstart\n\n  adsid doctor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

data_app = typer.Typer(
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
ids_app = typer.Typer(
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
app.add_typer(data_app)
app.add_typer(ids_app)

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and every message of the libraries.")]


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(f"adsid {importlib.metadata.version('adsid')}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    debug: Debug = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    context.obj = debug


@app.command(
    epilog="Examples:\n\n"
    "  adsid run                                        experiment=quickstart, in runs/quickstart\n\n"
    "  adsid run experiment=smoke run.dir=/tmp/smoke    every stage, small and quick\n\n"
    "  adsid run prior.prompts=2000 seed=1              other values\n\n"
    "  adsid run prior=tiny run.until=forecasts         another choice of a group, and only so far\n\n"
    "A second run does only what is not up to date; an interrupted one goes on where it was."
)
def run(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="group=choice or key=value; see configs/ for groups and keys.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run every stage that is not up to date, from the data to the report."""

    def work() -> None:
        from rich.console import Console

        from pipeline.config import compose, run_directory
        from pipeline.run import REPORT, run_stages

        config = compose([*terminal_overrides(), *(overrides or [])])
        console = Console(soft_wrap=True)
        run_stages(config, console=console)
        report = run_directory(config) / REPORT
        if report.exists() and config.run.until in (None, "report"):
            console.print(f"report: {report}", highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@app.command(epilog="Example:\n\n  adsid report runs/quickstart")
def report(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a finished run.")],
    debug: Debug = False,
) -> None:
    """Write the report of a finished run anew, from its artifacts."""

    def work() -> None:
        from rich.console import Console

        from pipeline.run import report_again

        console = Console(soft_wrap=True)
        console.print(f"report: {report_again(directory.absolute(), console=console)}", highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@app.command(epilog="Examples:\n\n  adsid doctor\n\n  adsid doctor --json")
def doctor(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    debug: Debug = False,
) -> None:
    """Say what this machine has and how long the quickstart takes here."""

    def work() -> None:
        from pipeline.doctor import examine, to_json, to_text

        findings = examine()
        typer.echo(to_json(findings) if json else to_text(findings))

    guarded(work, debug=debug or bool(context.obj))


DataDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the five tables.")]
DataOverrides = Annotated[
    list[str] | None, typer.Argument(help="data.key=value, or evaluate=test, beside what the folder's manifest says.")
]


@data_app.command(
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
        Path | None, typer.Option(help="Folder to write; runs/data/<source> where none is given.", show_default=False)
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
        directory = (out or Path("runs/data") / config.data.source).expanduser().absolute()
        console = Console(soft_wrap=True)
        manifest = prepare_directory(config.data, directory, track=progress_bars(console))
        console.print(f"tables: {directory}", highlight=False)
        console.print(f"{figures_line(manifest.metrics)}  in {manifest.seconds:.0f} s", highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@data_app.command(
    "validate",
    epilog="Examples:\n\n"
    "  adsid data validate runs/data/complete_journey\n\n"
    "  adsid data validate /data/my_tables data.label_kinds=[click] data.split.by=quantiles\n\n"
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

        figures = check_directory(directory.expanduser(), overrides or [])
        Console(soft_wrap=True).print(f"sound: {figures_line(figures)}", highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@data_app.command(
    "describe",
    epilog="Examples:\n\n"
    "  adsid data describe runs/data/complete_journey\n\n"
    "  adsid data describe runs/quickstart/data --page log.html\n\n"
    "  adsid data describe runs/data/complete_journey evaluate=test    the test span too, which is closed else\n\n"
    "  adsid data describe /data/my_tables --json",
)
def data_describe(
    context: typer.Context,
    directory: DataDirectory,
    overrides: DataOverrides = None,
    page: Annotated[
        Path | None,
        typer.Option(help="HTML page with plots to write; <DIR>.html where none is given.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON, and write no page.")] = False,
    debug: Debug = False,
) -> None:
    """Counts, sparsity, head and tail, new advertisers, label rate and text coverage: a table and plots."""

    def work() -> None:
        import json as encoder

        from rich.console import Console

        from data.artifacts import to_plain
        from data.describe import describe
        from pipeline.dataset import open_directory
        from pipeline.description import to_console, write_description

        folder = directory.expanduser()
        tables, config = open_directory(folder, overrides or [])
        description = describe(tables, config.data, evaluate=config.evaluate)
        if json:
            typer.echo(encoder.dumps(to_plain(description), indent=1, allow_nan=False))
            return
        target = page or folder.absolute().with_suffix(".html")
        write_description(description, target)
        console = Console()
        console.print(to_console(description))
        console.print(f"page: {target}", highlight=False, soft_wrap=True)

    guarded(work, debug=debug or bool(context.obj))


@ids_app.command(
    "report",
    epilog="Examples:\n\n"
    "  adsid ids report runs/quickstart/semantic_ids\n\n"
    "  adsid ids report runs/quickstart/semantic_ids --page ids.html\n\n"
    "  adsid ids report runs/quickstart/semantic_ids --json",
)
def ids_report(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of the stage semantic_ids.")],
    page: Annotated[
        Path | None,
        typer.Option(help="HTML page with plots to write; <DIR>.html where none is given.", show_default=False),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON, and write no page.")] = False,
    debug: Debug = False,
) -> None:
    """Collisions, use of the codes, neighbours, and what shares a prefix in words: a table and plots."""

    def work() -> None:
        import json as encoder

        from rich.console import Console

        from data.artifacts import to_plain
        from pipeline.ids_quality import quality_of
        from pipeline.ids_report import to_console, write_ids_report

        folder = directory.expanduser()
        found = quality_of(folder)
        if json:
            typer.echo(encoder.dumps(to_plain(found), indent=1, allow_nan=False))
            return
        target = page or folder.absolute().with_suffix(".html")
        write_ids_report(found, target)
        console = Console()
        console.print(to_console(found))
        console.print(f"page: {target}", highlight=False, soft_wrap=True)

    guarded(work, debug=debug or bool(context.obj))


IdsDirectory = Annotated[
    Path, typer.Option("--ids", metavar="DIR", help="The old IDs: the folder of the stage semantic_ids, or of its run.")
]
IdsOutput = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; the old IDs stay where they are.")]


@ids_app.command(
    "assign",
    epilog="Examples:\n\n"
    "  adsid ids assign new.parquet --ids runs/quickstart --out ids/today\n\n"
    "  adsid ids assign runs/data/mine/advertisers.parquet --skip-known --ids ids/yesterday --out ids/today\n\n"
    "A prior LM fitted on the old IDs takes the new table as it is: no ID that was there changes.",
)
def ids_assign(
    context: typer.Context,
    new: Annotated[
        Path, typer.Argument(metavar="NEW.parquet", help="The new ones: advertiser_id, name and text, one row each.")
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

        target = out.expanduser().absolute()
        manifest = assign_file(new.expanduser(), ids.expanduser(), target, skip_known=skip_known)
        Console(soft_wrap=True).print(to_console(manifest, target), highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@ids_app.command(
    "refit",
    epilog="Examples:\n\n"
    "  adsid ids refit --ids runs/quickstart --data runs/data/complete_journey --out ids/refit\n\n"
    "  adsid ids refit --ids ids/refit --data /data/today --out ids/next semantic_ids.trainer.max_epochs=10\n\n"
    "A prior LM fitted on the old IDs refuses those of a refit that changed any of them.",
)
def ids_refit(
    context: typer.Context,
    ids: IdsDirectory,
    data: Annotated[Path, typer.Option(metavar="DIR", help="The five tables of today.")],
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

        target = out.expanduser().absolute()
        quiet = [f"semantic_ids.{override}" for override in terminal_overrides()]
        share = TOLERANCE if tolerance is None else tolerance
        manifest = refit_directory(
            ids.expanduser(), data.expanduser(), target, [*quiet, *(overrides or [])], tolerance=share
        )
        Console(soft_wrap=True).print(to_console(manifest, target), highlight=False)

    guarded(work, debug=debug or bool(context.obj))


def guarded(work: Callable[[], None], *, debug: bool) -> None:
    """Run something and end the process as a command line should.

    Exit code 2 for a mistake of the user's, 1 for one of ours, 130 after Ctrl-C; a traceback only with ``debug``.
    """
    from pipeline.quiet import quiet_libraries

    try:
        if not debug:
            quiet_libraries()
        work()
    except UserError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"{error}", err=True)
        raise SystemExit(USER_MISTAKE) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        hint = "" if debug else "; --debug shows where"
        typer.echo(f"adsid failed: {type(error).__name__}: {first_line}{hint}", err=True)
        raise SystemExit(OUR_MISTAKE) from None


def terminal_overrides() -> list[str]:
    """No progress bars where nobody watches them."""
    return [] if sys.stderr.isatty() else ["trainer.progress_bar=false"]


def main() -> None:
    """Entry point of the `adsid` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn after every fork of a loader
    app()


if __name__ == "__main__":
    main()
