"""``adsid tune``: settings of one stage, chosen by a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.ablate import Reuse, ablate
from pipeline.commands.terminal import Debug, guarded, path_option

EPILOG = (
    "Examples:\n\n"
    '  adsid tune ranker "ranker.learning_rate=0.001,0.003" ranker=dlrm,dcn_v2\n\n'
    '  adsid tune prior experiment=full "prior.lora.learning_rate=1e-4,3e-4" "prior.lora.rank=8,16" --trials 3\n\n'
    '  adsid tune two_tower "retrieval.model.layers=range(0,3)" --seeds 3 --reuse runs/quickstart\n\n'
    "Values with commas between them, choice(...) and range(...) are Hydra's sweeps; their product is tried. The "
    "choice is by the span that the stage stops by, so the evaluated span is not read for it. The same command goes on "
    "where it was interrupted."
)


def tune(
    context: typer.Context,
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="prior, two_tower or ranker.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="group=choice or key=value; at least one with several values.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Number of grid points to sample; by default all.", metavar="N")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Train each point with seeds 0 .. N-1; else with 0.", metavar="N")
    ] = None,
    out: Annotated[
        Path | None,
        path_option("DIR", "Folder to write; runs/tune/<STAGE> where none is given."),
    ] = None,
    reuse: Reuse = None,
    debug: Debug = False,
) -> None:
    """Choose settings of one stage on its selection span, by a sweep of values."""

    def work() -> None:
        from pipeline.tuning import TUNED, grid_study

        study, shared = grid_study(stage, overrides or [], trials=trials)
        ablate(TUNED[stage], study, shared, seeds=seeds, out=out or Path("runs/tune") / stage, reuse=reuse or [])

    guarded(work, debug=debug or bool(context.obj))
