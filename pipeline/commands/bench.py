"""``adsid bench``: measure a part of the system under any configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.terminal import (
    Debug,
    FiguresJson,
    folder_option,
    guarded,
    path_option,
    show_figures,
    terminal_overrides,
)

app = typer.Typer(
    name="bench",
    help="Measure a part of the system, configuration by configuration.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples:\n\n"
    "  adsid bench retrieval experiment=quickstart\n\n"
    "  adsid bench retrieval --run runs/quickstart retrieval=calibrated\n\n"
    "  adsid bench ab --run runs/sim",
)


@app.callback()
def _group() -> None:
    """Measure a part of the system, configuration by configuration."""


@app.command(
    "retrieval",
    epilog="Examples:\n\n"
    "  adsid bench retrieval experiment=quickstart                        what it needs is made first\n\n"
    "  adsid bench retrieval --run runs/quickstart                        of artifacts that are there\n\n"
    "  adsid bench retrieval --run runs/quickstart retrieval=paper        another choice of channels and blend\n\n"
    "  adsid bench retrieval --run runs/quickstart --part factors         where the forecast's ads are lost\n\n"
    "  adsid bench retrieval --run runs/quickstart retrieval.channels=\\[own,popularity,forecast]\n\n"
    "  adsid bench retrieval --run runs/quickstart retrieval.blend.per_advertiser=10 retrieval.index.kind=hnsw",
)
def bench_retrieval(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="group=choice or key=value; with --run those of retrieval that need no training."),
    ] = None,
    run: Annotated[
        Path | None,
        path_option("DIR", "A run directory whose artifacts are taken as they are."),
    ] = None,
    out: Annotated[Path | None, folder_option("retrieval.json and retrieval.html", "bench")] = None,
    part: Annotated[
        list[str] | None,
        typer.Option(help="Measure this alone: latency, arms, channels, blends or factors; may be repeated."),
    ] = None,
    json: FiguresJson = False,
    debug: Debug = False,
) -> None:
    """Channels, blends and quotas at one budget, with intervals, and latency: a table, a page and JSON."""

    def work() -> None:
        from rich.console import Console

        from pipeline.bench import bench_of_configuration, bench_of_run, default_folder, to_json, write_bench
        from pipeline.bench_page import to_console
        from retrieval.benchmark import PARTS

        parts = part or PARTS
        if run is None:
            progress = Console(soft_wrap=True, stderr=json)
            asked = [*terminal_overrides(), *(overrides or [])]
            config, found = bench_of_configuration(asked, console=progress, parts=parts)
        else:
            config, found = bench_of_run(run.absolute(), overrides or [], parts)
        page = write_bench(config, found, (out or default_folder(config)).absolute())
        if json:
            typer.echo(to_json(config, found), nl=False)
        else:
            show_figures(to_console(config, found), page)

    guarded(work, debug=debug or bool(context.obj))


@app.command(
    "ab",
    epilog="Examples:\n\n"
    "  adsid run experiment=quickstart data=simulator run.dir=runs/sim    what it needs\n\n"
    "  adsid bench ab --run runs/sim\n\n"
    "  adsid bench ab --run runs/sim auction.budgets=[1] auction.seeds=[0,1] auction.oracle=[]",
)
def bench_ab(
    context: typer.Context,
    run: Annotated[Path, path_option("DIR", "A finished run on simulated data.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="auction.key=value.")] = None,
    out: Annotated[Path | None, folder_option("ab.json and ab.html", "bench")] = None,
    json: FiguresJson = False,
    debug: Debug = False,
) -> None:
    """Stacks with and without the forecast before the same simulated users, in auctions on equal budgets."""

    def work() -> None:
        from pipeline.ab_page import to_console
        from pipeline.bench import FOLDER, ab_json, ab_of_run, write_ab

        directory = run.absolute()
        folder = (out or directory / FOLDER).absolute()
        config, found = ab_of_run(directory, overrides or [], folder)
        page = write_ab(config, found, folder)
        if json:
            typer.echo(ab_json(config, found), nl=False)
        else:
            show_figures(to_console(config, found), page)

    guarded(work, debug=debug or bool(context.obj))
