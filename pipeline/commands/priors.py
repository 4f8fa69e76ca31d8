"""``adsid priors``: what the language model reads and forecasts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.terminal import Debug, guarded

app = typer.Typer(
    name="priors",
    help="The forecaster: what it reads about a user, and the fitted one as a plain causal LM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples:\n\n"
    "  adsid priors prompt --run runs/quickstart --user 1 --as-of 43\n\n"
    "  adsid priors export --run runs/quickstart --out exported",
)

RunDirectory = Annotated[
    Path, typer.Option("--run", metavar="DIR", help="The folder of a run whose stages data and semantic_ids are done.")
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
    user: Annotated[str, typer.Option(help="Id of the user, as in the tables.")],
    as_of: Annotated[str, typer.Option("--as-of", metavar="T", help="A date, e.g. 2017-10-16, or a period's number.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="prior.prompt.key=value, beside what the run's config.yaml says.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    debug: Debug = False,
) -> None:
    """Show a user's prompt: text, token ids, and the tokens each section takes of its budget."""

    def work() -> None:
        import json as encoder

        from rich.console import Console

        from data.artifacts import to_plain
        from pipeline.prompts import prompt_of, to_console

        shown = prompt_of(run.expanduser(), user, as_of, overrides or [])
        if json:
            typer.echo(encoder.dumps(to_plain(shown), indent=1, ensure_ascii=False))
            return
        Console(soft_wrap=True).print(to_console(shown), highlight=False)

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
        Path, typer.Option("--run", metavar="DIR", help="The folder of the stage prior, or of a run that has it.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to write.")],
    debug: Debug = False,
) -> None:
    """Write the fine-tuned LM as a plain Hugging Face model, ID tokens as ordinary rows, with a model card."""

    def work() -> None:
        from priors.export import export_prior

        folder, target = run.expanduser(), out.expanduser().absolute()
        export_prior(folder / "prior" if (folder / "prior").is_dir() else folder, target)
        typer.echo(f"{target}: load it as README.md says")

    guarded(work, debug=debug or bool(context.obj))
