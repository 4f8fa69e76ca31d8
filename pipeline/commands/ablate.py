"""``adsid ablate``: what each part of the system adds, measured by leaving it out."""

from __future__ import annotations

import typer

from pipeline.commands import ablate_ranker

app = typer.Typer(
    name="ablate",
    help="What each part adds, measured by leaving it out: arms, seeds, controls, intervals.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example:\n\n  adsid ablate ranker experiment=quickstart --seeds 3",
)


@app.callback()
def _group() -> None:
    """A group even while it has one command."""


app.command("ranker", epilog=ablate_ranker.EPILOG)(ablate_ranker.ablate_ranker)
