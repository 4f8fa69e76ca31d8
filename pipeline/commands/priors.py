"""``adsid priors``: what the language model reads and forecasts."""

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
    print_json,
    show_figures,
    terminal_overrides,
)

app = typer.Typer(
    name="priors",
    help="The forecaster: what it reads about a user, what it forecasts, for many users, and the LM by itself.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples:\n\n"
    "  adsid priors prompt --run runs/quickstart --user 1 --as-of 43\n\n"
    "  adsid priors explain --run runs/quickstart --user 1 --as-of 43\n\n"
    "  adsid priors generate --run runs/quickstart --out priors/today\n\n"
    "  adsid priors export --run runs/quickstart --out exported",
)

User = Annotated[str, typer.Option(help="Id of the user, as in the tables.")]
AsOf = Annotated[str, typer.Option("--as-of", metavar="T", help="A date, e.g. 2017-10-16, or a period's number.")]
RunDirectory = Annotated[
    Path,
    path_option("DIR", "The folder of a run whose stages data and semantic_ids are done.", "--run"),
]


@app.command(
    "prompt",
    epilog="Examples:\n\n"
    "  adsid priors prompt --run runs/quickstart --user 1 --as-of 43\n\n"
    "  adsid priors prompt --run runs/quickstart --user 1 --as-of 2017-10-16 --json\n\n"
    "  adsid priors prompt --run runs/quickstart --user 1 --as-of 43 prior.prompt.categories.show=true\n\n"
    "Nothing from the as-of time on is read: it is the start of a period, or a date, which means the last start of a "
    "period up to then.",
)
def priors_prompt(
    context: typer.Context,
    run: RunDirectory,
    user: User,
    as_of: AsOf,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="prior.prompt.key=value, beside what the run's config.yaml says.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    debug: Debug = False,
) -> None:
    """Show a user's prompt: text, token ids, and the tokens each section takes of its budget."""

    def work() -> None:
        from rich.console import Console

        from pipeline.prompts import prompt_of, to_console

        shown = prompt_of(run, user, as_of, overrides or [])
        if json:
            print_json(shown, ensure_ascii=False)
            return
        Console(soft_wrap=True).print(to_console(shown), highlight=False)

    guarded(work, debug=debug or bool(context.obj))


FittedRun = Annotated[Path, path_option("DIR", "The folder of a run whose stage prior is done.", "--run")]


@app.command(
    "explain",
    epilog="Examples:\n\n"
    "  adsid priors explain --run runs/quickstart --user 1 --as-of 43\n\n"
    "  adsid priors explain --run runs/quickstart --user 1 --as-of 2017-10-16 --top-k all --json\n\n"
    "The list is proven to hold the most probable advertisers of all; probabilities are exact.",
)
def priors_explain(
    context: typer.Context,
    run: FittedRun,
    user: User,
    as_of: AsOf,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="prior.decode.key=value, beside what the run's config.yaml says.")
    ] = None,
    top_k: Annotated[str, typer.Option("--top-k", metavar="K|all", help="Length of the list.")] = "10",
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    debug: Debug = False,
) -> None:
    """Show a user's forecast: prompt, token ids, advertisers with IDs and probabilities, the LM's part in them."""

    def work() -> None:
        from rich.console import Console

        from pipeline.explain import explain, to_console

        explained = explain(run, user, as_of, top_k, overrides or [])
        if json:
            print_json(explained, ensure_ascii=False)
            return
        Console(soft_wrap=True).print(to_console(explained), highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@app.command(
    "generate",
    epilog="Examples:\n\n"
    "  adsid priors generate --run runs/quickstart --out priors/all\n\n"
    "  adsid priors generate --run runs/quickstart --out priors/today --as-of 46 --incremental prior.panel=null\n\n"
    "  adsid priors generate --run runs/quickstart --out priors/all --engine ray --workers 2\n\n"
    "Killed at any moment, the same command goes on and ends with the same files.",
)
def priors_generate(
    context: typer.Context,
    run: FittedRun,
    out: Annotated[Path, path_option("DIR", "Folder of the table; as-of periods it has stay.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="prior.decode.key=value, prior.panel=null for all users; beside the run's config.yaml."),
    ] = None,
    as_of: Annotated[
        list[str] | None,
        typer.Option("--as-of", metavar="T", help="A date or a period, as often as wanted; else the run's schedule."),
    ] = None,
    incremental: Annotated[
        bool, typer.Option("--incremental", help="Carry over users without an event since the last as-of in the table.")
    ] = False,
    engine: Annotated[str, typer.Option(help="local, or ray (pip install 'adsid\\[ray]').")] = "local",
    workers: Annotated[int, typer.Option(help="Workers of Ray.")] = 2,
    price: Annotated[float, typer.Option(help="Price of one machine hour, for the cost sheet.")] = 1.0,
    json: Annotated[bool, typer.Option("--json", help="Print the cost sheet as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Forecast the users of a run shard by shard into a table, and say what it cost."""

    def work() -> None:
        from rich.console import Console

        from pipeline.forecasts import JobConfig, cost_to_console, generate

        job = JobConfig(
            out=out,
            as_of=tuple(as_of or ()),
            engine=engine,
            workers=workers,
            incremental=incremental,
            price=price,
            progress_bar=not terminal_overrides(),
        )
        sheet = generate(run, job, overrides or [])
        if json:
            print_json(sheet)
            return
        Console(soft_wrap=True).print(cost_to_console(sheet, job), highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@app.command(
    "export",
    epilog="Example:\n\n"
    "  adsid priors export --run runs/quickstart --out exported\n\n"
    "The folder's README.md says how transformers and peft load it.",
)
def priors_export(
    context: typer.Context,
    run: Annotated[
        Path,
        path_option("DIR", "The folder of the stage prior, or of a run that has it.", "--run"),
    ],
    out: Annotated[Path, path_option("DIR", "Folder to write.", "--out")],
    debug: Debug = False,
) -> None:
    """Write the fine-tuned LM as a plain Hugging Face model, ID tokens as ordinary rows, with a model card."""

    def work() -> None:
        from priors.export import export_prior

        target = out.absolute()
        export_prior(run / "prior" if (run / "prior").is_dir() else run, target)
        typer.echo(f"{target}: load it as README.md says")

    guarded(work, debug=debug or bool(context.obj))


@app.command(
    "monitor",
    epilog="Examples:\n\n"
    "  adsid priors monitor --run runs/quickstart --priors priors/all\n\n"
    "  adsid priors monitor --run runs/quickstart --priors runs/quickstart/forecasts --json\n\n"
    "A period has drifted where predicted and observed mass differ by more than chance gives once in a thousand.",
)
def priors_monitor(
    context: typer.Context,
    run: FittedRun,
    priors: Annotated[Path, path_option("DIR", "The table: of adsid priors generate, or of a run.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="prior.evaluation_prompts=N or prior.seed=N, beside what the run's config.yaml says."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable, with the reliability curves.")] = False,
    debug: Debug = False,
) -> None:
    """Compare predicted and observed mass period by period, and calibration before and after its fit."""

    def work() -> None:
        from rich.console import Console

        from pipeline.monitor import monitor, to_console

        found = monitor(run, priors, overrides or [])
        if json:
            print_json(found)
            return
        Console(soft_wrap=True).print(to_console(found), highlight=False)

    guarded(work, debug=debug or bool(context.obj))


@app.command(
    "drift",
    epilog="Examples:\n\n"
    "  adsid priors drift --run runs/quickstart\n\n"
    "  adsid priors drift --run runs/full --every 2 --lm 200 prior.panel=null\n\n"
    "Every step is served by what was learned from the periods before it; the test span is never read.",
)
def priors_drift(
    context: typer.Context,
    run: FittedRun,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, e.g. prior.panel=null for all users, beside the run's config.yaml."),
    ] = None,
    every: Annotated[
        int, typer.Option(min=1, metavar="N", help="Periods of a step, after which it is learned again.")
    ] = 4,
    lm: Annotated[
        int, typer.Option(min=0, metavar="N", help="Prompts of each step that the LM is asked with; 0 leaves it out.")
    ] = 0,
    out: Annotated[Path | None, folder_option("drift.json and drift.html", "drift")] = None,
    json: FiguresJson = False,
    debug: Debug = False,
) -> None:
    """Track how a frozen forecaster ages, and what recalibrating or refitting it recovers."""

    def work() -> None:
        from pipeline.drift import FOLDER, follow_run, to_console, write_drift

        found = follow_run(run, overrides or [], every=every, lm_prompts=lm)
        page = write_drift(found, (out or run / FOLDER).absolute())
        if json:
            print_json(found)
        else:
            show_figures(to_console(found), page)

    guarded(work, debug=debug or bool(context.obj))
