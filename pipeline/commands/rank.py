"""``adsid rank`` and ``adsid export``: a trained ranker at work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.terminal import Debug, guarded, path_argument, path_option, print_json

RunDirectory = Annotated[Path, path_argument("RUN_DIR", "The folder of a finished run.")]
DEFAULT_RUN = Path("runs/quickstart")
"""Where `adsid run` without an override leaves its run."""
Arm = Annotated[str, typer.Option(help="Arm of the ranker: none, anchor or lm.")]
Seed = Annotated[int | None, typer.Option(help="Its seed; the first of the run where none is given.")]


def rank(
    context: typer.Context,
    user: Annotated[str, typer.Option(metavar="U", help="Id of the user in the tables.")],
    directory: RunDirectory = DEFAULT_RUN,
    period: Annotated[int | None, typer.Option(help="Period of the visit; by default the last known one.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Ads to show.")] = 10,
    features: Annotated[int, typer.Option(min=0, help="Features to show of each ad.")] = 4,
    arm: Arm = "lm",
    seed: Seed = None,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Rank the ads of a user's last visit, with the feature values that matter to each."""

    def work() -> None:
        from rich.console import Console

        from pipeline.ranked_user import open_run, rank_user, to_console

        opened = open_run(directory.absolute(), arm=arm, seed=seed)
        ranked = rank_user(opened, user, period=period, top=top, features=features)
        if json:
            print_json(ranked)
        else:
            Console(soft_wrap=True).print(to_console(ranked), highlight=False)

    guarded(work, debug=debug or bool(context.obj))


def export(
    context: typer.Context,
    out: Annotated[Path, path_option("DIR", "Folder to write.")],
    directory: RunDirectory = DEFAULT_RUN,
    arm: Arm = "lm",
    seed: Seed = None,
    debug: Debug = False,
) -> None:
    """Write a ranker of a run for inference, checked against the trained one."""

    def work() -> None:
        from pipeline.ranked_user import ranker_of
        from ranking.serving import export as write

        target = out.absolute()
        difference = write(ranker_of(directory.absolute(), arm=arm, seed=seed), target)
        typer.echo(f"{target}: largest difference to the trained ranker {difference:.1g}")

    guarded(work, debug=debug or bool(context.obj))
