"""Train one stage with Lightning: python train.py stage=prior experiment=quickstart [overrides]

Checkpoints lie in the run directory's .work folder, so the same command goes on where it was interrupted. The stages
before must be finished: adsid run experiment=quickstart run.until=semantic_ids makes them.
"""

from __future__ import annotations

import sys

from data.errors import UserError
from pipeline.commands.terminal import guarded, terminal_overrides

TRAINED = ("semantic_ids", "prior", "two_tower", "ranker")


def parse(arguments: list[str]) -> tuple[str, list[str]]:
    """Split the command line into the stage and the overrides.

    Raises:
        UserError: no stage, more than one, or one that trains nothing.
    """
    names = [argument.removeprefix("stage=") for argument in arguments if argument.startswith("stage=")]
    if len(names) != 1 or names[0] not in TRAINED:
        raise UserError(
            " ".join(f"stage={name}" for name in names) or "no stage",
            expected=f"one of {', '.join(f'stage={name}' for name in TRAINED)}",
            action="name one, e.g. python train.py stage=prior experiment=quickstart",
        )
    rest = [argument for argument in arguments if not argument.startswith("stage=") and argument != "--debug"]
    return names[0], rest


def main(arguments: list[str]) -> None:
    """Compose, then train the stage."""

    def work() -> None:
        stage, overrides = parse(arguments)

        from rich.console import Console

        from pipeline.config import compose
        from pipeline.run import run_stages

        config = compose([*terminal_overrides(), *overrides])
        run_stages(config, console=Console(soft_wrap=True), only=stage, overrides=overrides)

    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    guarded(work, debug="--debug" in arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
