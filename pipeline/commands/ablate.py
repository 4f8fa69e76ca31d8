"""``adsid ablate``: arms that differ in a few overrides, run and compared by one command."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.commands import ablate_ranker
from pipeline.commands.terminal import Debug, guarded, path_option, terminal_overrides

if TYPE_CHECKING:
    from pipeline.ablation import Kind, Study

app = typer.Typer(
    name="ablate",
    help="What each part is worth: arms that differ in a few overrides, run side by side and compared pair by pair.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Examples:\n\n"
    "  adsid ablate prior prior_head\n\n"
    "  adsid ablate prior prior_sections experiment=smoke --out runs/sections\n\n"
    "  adsid ablate ranker experiment=quickstart --seeds 3",
)

StudyName = Annotated[str, typer.Argument(metavar="STUDY", help="Of configs/ablation/, or the path of a YAML file.")]
StudyOverrides = Annotated[
    list[str] | None, typer.Argument(help="group=choice or key=value of all arms; an arm's own go before them.")
]
Seeds = Annotated[
    int | None,
    typer.Option(min=1, help="Train each arm with seeds 0 .. N-1; else those of the study.", metavar="N"),
]
Out = Annotated[
    Path | None,
    path_option("DIR", "Folder to write; runs/ablation/<STUDY> where none is given."),
]
Reuse = Annotated[
    list[Path] | None,
    path_option("RUN_DIR", "A run whose artifacts are taken where an arm calls for the very same."),
]


MaxTokens = Annotated[
    float | None,
    typer.Option(min=1, help="Recommend a prompt of at most so many tokens on average.", show_default=False),
]


@app.command(
    "prior",
    epilog="Examples:\n\n"
    "  adsid ablate prior prior_head\n\n"
    "  adsid ablate prior prior_anchor --seeds 3 --reuse runs/full experiment=full\n\n"
    "  adsid ablate prior my_study.yaml prior.prompts=2000 --out runs/mine\n\n"
    "  adsid ablate prior prior_sections --max-tokens 60\n\n"
    "The same command goes on where it was interrupted; a finished arm is not trained again.",
)
def ablate_prior(
    context: typer.Context,
    study: StudyName,
    overrides: StudyOverrides = None,
    seeds: Seeds = None,
    out: Out = None,
    reuse: Reuse = None,
    max_tokens: MaxTokens = None,
    debug: Debug = False,
) -> None:
    """Train the forecaster in several arms and compare what they forecast."""

    def work() -> None:
        from pipeline.ablation import load_study
        from pipeline.ablation_prior import PRIOR, recommend_prompt

        kind = replace(PRIOR, recommend=partial(recommend_prompt, max_tokens=max_tokens))
        ablate(kind, load_study(study), overrides or [], seeds=seeds, out=out, reuse=reuse or [])

    guarded(work, debug=debug or bool(context.obj))


def ablate(
    kind: Kind, study: Study, overrides: list[str], *, seeds: int | None, out: Path | None, reuse: list[Path]
) -> None:
    """Run a study, print its tables, and write them with its page.

    Args:
        kind: what is run and measured.
        study: the arms.
        overrides: of all arms.
        seeds: how many, from 0 on; None takes those of the study.
        out: folder to write.
        reuse: finished runs.

    Raises:
        UserError: everything `pipeline.ablation.run_study` raises.
    """
    from rich.console import Console

    from pipeline.ablation import run_study
    from pipeline.ablation_page import PAGE, to_console, write_ablation

    if seeds is not None:
        study = replace(study, seeds=tuple(range(seeds)))
    folder = (out or Path("runs/ablation") / study.name).absolute()
    console = Console(soft_wrap=True)
    result = run_study(
        study, kind, folder, [*terminal_overrides(), *overrides], console=console,
        reuse=[run.absolute() for run in reuse],
    )  # fmt: skip
    write_ablation(result, folder)
    console.print(to_console(result))
    console.print(f"page: {folder / PAGE}", highlight=False)


app.command("ranker", epilog=ablate_ranker.EPILOG)(ablate_ranker.ablate_ranker)
