"""The commands. They need the extra `demo`, so only `nbbn.cli.main` imports this module."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nbbn import cli
from nbbn.demo.settings import Settings
from nbbn.info import facts

app = typer.Typer(
    help="Batch normalization for arrays, compiled by Numba.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

# What a bad command line raises. typer does not export this class, and takes it from click or from its own
# copy of click, depending on the version; it is the base of BadParameter in all of them.
UsageError: Any = typer.BadParameter.__mro__[1]


def invoke(arguments: list[str]) -> int:
    """Run one command and return the exit status; tell in one line what is wrong with the command line."""
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    if arguments[0] not in commands and not arguments[0].startswith("-"):
        return cli.refuse(f"got the command {arguments[0]!r}, needs one of {', '.join(commands)}.")
    try:
        status: int | None = app(arguments, prog_name="nbbn", standalone_mode=False)
    except UsageError as error:
        return cli.refuse(error.format_message())
    except typer.Abort:
        return 130  # what a shell reports for a program that Ctrl-C ended
    return status or 0


def whole_number(least: int) -> Callable[[str], int]:
    """Return a function that reads a whole number of at least `least`, or raises."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise typer.BadParameter(f"got {text!r}, needs a whole number of at least {least}.")
        return value

    return read


def above_zero(text: str) -> float:
    """Read a finite number above 0, or raise."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise typer.BadParameter(f"got {text!r}, needs a finite number above 0.")
    return value


def writable(directory: Path) -> Path:
    """Return a directory in which a file can be made; make the directory if need be, or raise."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            return directory
    except OSError as error:
        raise typer.BadParameter(
            f"got {str(directory)!r}, needs a directory that files can be written to ({error.strerror})."
        ) from error


@app.command()
def demo(
    output: Annotated[
        Path, typer.Option(metavar="DIRECTORY", help="Where the files go.", callback=writable)
    ] = Path(),
    steps: Annotated[
        int, typer.Option(metavar="N", help="Mini-batches to train on.", parser=whole_number(1))
    ] = Settings.steps,
    learning_rate: Annotated[
        float,
        typer.Option(metavar="RATE", help="A parameter moves by this times its gradient.", parser=above_zero),
    ] = Settings.learning_rate,
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="Decides first weights, split and order.", parser=whole_number(0)),
    ] = Settings.seed,
    progress: Annotated[bool, typer.Option(help="Show progress bars.")] = True,
) -> int:
    """Train a small network on handwritten digits, with batch norm and without.

    Writes two pictures and the trained batch norm. Ends with status 1 if batch norm that was saved and
    loaded again gives other scores.
    """
    from nbbn.demo.run import run  # scikit-learn and matplotlib take a second to import

    settings = Settings(steps=steps, learning_rate=learning_rate, seed=seed)
    return 0 if run(settings, output, Console(), progress=progress) else 1


@app.command()
def info() -> int:
    """Print versions, threads, vector width, the kernel cache and whether CUDA is there."""
    for name, value in facts().items():
        typer.echo(f"{name:<17}{value}")
    return 0
