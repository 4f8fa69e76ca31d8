"""``adsid ablate ranker``: what the forecast adds to the ranker."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.terminal import Debug, guarded, print_json, terminal_overrides

EPILOG = (
    "Examples:\n\n"
    "  adsid ablate ranker experiment=quickstart\n\n"
    "  adsid ablate ranker experiment=quickstart ranker=dcn_v2 --seeds 5\n\n"
    "  adsid ablate ranker experiment=quickstart ranker.ablation.groups=false ranker.ablation.models=\\[logistic]\n\n"
    "The forecasts must be there: adsid run run.until=forecasts, with the same overrides. Interrupted, it goes on "
    "where it was; another seed, group or model later trains that one alone."
)


def ablate_ranker(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="group=choice or key=value, those of the run; see configs/.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Train each variant with seeds 0 .. N-1; else those of ranker.seeds.", metavar="N"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    debug: Debug = False,
) -> None:
    """None, anchor and LM, a shuffled control, each group of prior features and each model, with every seed."""

    def work() -> None:
        from rich.console import Console

        from pipeline.config import compose
        from pipeline.ranker_ablation import PAGE, to_console
        from pipeline.run import run_ablation

        chosen = [] if seeds is None else [f"ranker.seeds={list(range(seeds))}"]
        config = compose([*terminal_overrides(), *(overrides or []), *chosen])
        console = Console(soft_wrap=True, stderr=json)
        rows, directory = run_ablation(config, "ranker_ablation", console=console)
        if json:
            print_json(rows)
            return
        Console().print(to_console(rows, config))
        console.print(f"page: {directory / PAGE}", highlight=False)

    guarded(work, debug=debug or bool(context.obj))
