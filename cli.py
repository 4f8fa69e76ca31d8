"""The `adsid` command. Heavy imports wait until a command runs, so that help is quick."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands import ablate, bench, data, ids, priors, rank, results, tune
from pipeline.commands.terminal import Debug, guarded, path_argument, terminal_overrides

app = typer.Typer(
    name="adsid",
    help="An LLM forecasts which advertisers a user converts with; retrieval and ranking use the forecast.",
    epilog="Examples:\n\n  adsid run experiment=quickstart\n\n  adsid report runs/quickstart\n\n  adsid doctor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(data.app)
app.add_typer(ids.app)
app.add_typer(priors.app)
app.add_typer(ablate.app)
app.add_typer(bench.app)


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

        asked = overrides or []
        config = compose([*terminal_overrides(), *asked])
        console = Console(soft_wrap=True)
        run_stages(config, console=console, overrides=asked)
        report = run_directory(config) / REPORT
        if report.exists() and config.run.until in (None, "report"):
            console.print(f"report: {report}", highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@app.command(epilog="Example:\n\n  adsid report runs/quickstart")
def report(
    context: typer.Context,
    directory: Annotated[Path, path_argument("RUN_DIR", "The folder of a finished run.")],
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


app.command(epilog=tune.EPILOG)(tune.tune)
app.command(epilog=results.EPILOG)(results.results)
app.command(epilog="Example:\n\n  adsid rank --user 1")(rank.rank)
app.command(epilog="Example:\n\n  adsid export runs/quickstart --out serving")(rank.export)


def main() -> None:
    """Entry point of the `adsid` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn after every fork of a loader
    app()


if __name__ == "__main__":
    main()
