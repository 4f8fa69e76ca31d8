"""How a command ends, and what all commands take. Heavy imports wait until a command runs, so that help is quick."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from data.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

T = TypeVar("T")
USER_MISTAKE, OUR_MISTAKE, INTERRUPTED = 2, 1, 130


def user_path(text: str | Path) -> Path:
    """A path of a command line; ``~`` is the home folder, which shells expand at the start of a word alone."""
    return Path(text).expanduser()


def path_argument(metavar: str, text: str) -> Any:
    """An argument that is a path."""
    return typer.Argument(parser=user_path, metavar=metavar, help=text)


def path_option(metavar: str, text: str, *names: str) -> Any:
    """An option that is a path, which may be left out where its default is None."""
    return typer.Option(*names, parser=user_path, metavar=metavar, help=text, show_default=False)


Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and every message of the libraries.")]
Page = Annotated[
    Path | None,
    path_option("FILE", "HTML page with plots to write; <DIR>.html where none is given."),
]
FiguresJson = Annotated[bool, typer.Option("--json", help="Print all figures as JSON instead of the tables.")]
PageJson = Annotated[bool, typer.Option("--json", help="Print all figures as JSON, and write no page.")]


def guarded(work: Callable[[], None], *, debug: bool) -> None:
    """Run something and end the process as a command line should.

    Exit code 2 for a mistake of the user's, 1 for one of ours, 130 after Ctrl-C; a traceback only with ``debug``.
    """
    from pipeline.quiet import quiet_libraries

    try:
        if not debug:
            quiet_libraries()
        work()
    except UserError as error:
        if debug:
            traceback.print_exc()
        typer.echo(f"{error}", err=True)
        raise SystemExit(USER_MISTAKE) from None
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        hint = "" if debug else "; --debug shows where"
        typer.echo(f"adsid failed: {type(error).__name__}: {first_line}{hint}", err=True)
        raise SystemExit(OUR_MISTAKE) from None


def terminal_overrides() -> list[str]:
    """No progress bars where nobody watches them."""
    return [] if sys.stderr.isatty() else ["trainer.progress_bar=false"]


def print_json(value: Any, *, ensure_ascii: bool = True) -> None:
    """Print plain data, or a dataclass of it, as JSON."""
    import json

    from data.artifacts import to_plain

    typer.echo(json.dumps(to_plain(value), indent=1, ensure_ascii=ensure_ascii, allow_nan=False))


def folder_option(files: str, folder: str) -> Any:
    """An option for the folder that a command writes into, by default one in the run directory."""
    text = f"Folder of {files}; {folder} in the run directory where none is given."
    return path_option("DIR", text)


def show_figures(tables: RenderableType, page: Path) -> None:
    """Print tables, and where their page is."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    console.print(tables)
    console.print(f"page: {page}", highlight=False)


def show_page(
    found: T,
    directory: Path,
    page: Path | None,
    *,
    write: Callable[[T, Path], None],
    to_console: Callable[[T], RenderableType],
) -> None:
    """Print what was found in a folder, and write it as a page beside the folder if not elsewhere."""
    from rich.console import Console

    folder = Path(os.path.abspath(directory))  # noqa: PTH100 (of "..", the name that it stands for)
    target = page or folder.with_name(f"{folder.name}.html")  # a name may have a dot: v1.5
    write(found, target)
    console = Console()
    console.print(to_console(found))
    console.print(f"page: {target}", highlight=False, soft_wrap=True)
