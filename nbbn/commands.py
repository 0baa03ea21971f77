"""The commands. They need the extra `demo` or `bench`, so only `nbbn.cli.main` imports this module."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nbbn.demo.settings import Settings
from nbbn.info import tell

app = typer.Typer(
    help="Batch normalization for arrays, compiled by Numba.",
    epilog="Examples: `nbbn info`, `nbbn demo`, `nbbn bench --quick --plot bench.png`.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)

# What a bad command line raises. typer does not export this class, and takes it from click or from its own
# copy of click, depending on the version; it is the base of BadParameter in all of them.
UsageError: Any = typer.BadParameter.__mro__[1]


_arguments: list[str] = []


def arguments() -> tuple[str, ...]:
    """Return the command line, for the record."""
    return tuple(_arguments)


def invoke(arguments: list[str]) -> int | str:
    """Run one command and return the exit status, or what is wrong with the command line."""
    _arguments[:] = arguments
    commands = [command.callback.__name__ for command in app.registered_commands if command.callback]
    if arguments[0] not in commands and not arguments[0].startswith("-"):
        return f"got the command {arguments[0]!r}, needs one of {', '.join(commands)}."
    try:
        status: int | None = app(arguments, prog_name="nbbn", standalone_mode=False)
    except UsageError as error:
        message: str = error.format_message()
        return message
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


@app.command(epilog="Example: `nbbn demo --steps 100 --output pictures`")
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


@app.command(epilog="Example: `nbbn info`")
def info() -> int:
    """Print versions, threads, vector width, the kernel cache and whether CUDA is there."""
    return tell()


# A blank line between examples, or Markdown makes a paragraph of them.
BENCH_EXAMPLES = """Examples:

`nbbn bench --quick --plot bench.png` : the first look, under a minute

`nbbn bench --shapes 8,64,32,32 --layout all` : your own shape, in both layouts

`nbbn bench --shapes resnet50 --peer torch --json before.json` : a model's layers against PyTorch

`nbbn bench --shapes resnet50 --threads 1,2,4` : how it scales

`nbbn bench --shapes 1,64,28,28 --batch 1,2,4,8,16,32,64` : how the time grows with the size

`nbbn bench --compare before.json after.json` : what changed beyond the noise"""


@app.command(epilog=BENCH_EXAMPLES)
def bench(
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHAPES",
            help="resnet50, inception3, small, dense; a shape, channels second, as 8,64,32,32; or a file "
            "with a shape on each line. May be given several times. [default: resnet50]",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N…]", help="The first dimension, instead of the usual one. Several: a sweep."
        ),
    ] = None,
    layout: Annotated[
        str, typer.Option(metavar="LAYOUT", help="channels-first, channels-last, or all.")
    ] = "channels-first",
    dtype: Annotated[
        str, typer.Option(metavar="DTYPE", help="float32, float64, float16, bfloat16, with commas, or all.")
    ] = "float32",
    mode: Annotated[
        str, typer.Option(metavar="MODE", help="forward, evaluation, backward, with commas, or all.")
    ] = "all",
    path: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="serial, parallel, cuda, with commas. [default: all there are]"),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(metavar="N[,N…]", help="Threads on the CPU, for everybody. [default: 1, and all]"),
    ] = None,
    peer: Annotated[
        str,
        typer.Option(
            metavar="PEER",
            help="numpy, torch, jax, onnxruntime, cupy, with commas; none; or all that are installed.",
        ),
    ] = "all",
    rounds: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="How often each takes its turn. [default: 15, quick 5]",
            parser=whole_number(1),
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three shapes, few rounds.")] = False,
    cold: Annotated[
        bool, typer.Option("--cold", help="Fill the caches with something else before each call.")
    ] = False,
    new_outputs: Annotated[
        bool, typer.Option("--new-outputs", help="Results go into new arrays, not into one that is there.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of the data. [default: a fresh one]", parser=whole_number(0)),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all of it as JSON.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the tables as Markdown.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw it, as .png or .svg: percent of the limit; of four batches, times."
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="Measure nothing; show what changed from A to B."),
    ] = None,
) -> int:
    """Time batch norm on every path and beside every library that is installed, on shapes of yours.

    Each answer is checked before it is timed. Then everybody takes a turn, round after round; a figure is the
    median of the turns. Beside it stand the bytes that must move in a second, and how near that comes to what
    the memory can do, which is measured in the same rounds. Ends with status 1 if an answer was wrong.
    """
    from nbbn.bench import request
    from nbbn.bench.run import compare_files, run

    # Rich would fold lines at 80 columns in a pipe, where others read them.
    console = Console()
    try:
        if compare is not None:
            for name, file in (("json", json), ("markdown", markdown), ("plot", plot)):
                if file is not None:
                    raise request.Refused(f"--{name}", "got a file with --compare, which writes none")
            compare_files(*compare, console)
            return 0
        files = {
            name: None if file is None else request.writable_file(f"--{name}", file, endings)
            for name, file, endings in (
                ("json", json, ()),
                ("markdown", markdown, ()),
                ("plot", plot, (".png", ".svg")),
            )
        }
        if plot is not None:
            import matplotlib  # noqa: F401, or its lack would be found out after all has been measured
        settings = request.settings(
            texts=shapes or (),
            batches=batch,
            layout=layout,
            dtype=dtype,
            mode=mode,
            path=path,
            threads=threads,
            peer=peer,
            rounds=rounds,
            cold=cold,
            new_outputs=new_outputs,
            quick=quick,
            seed=seed,
        )
    except request.Refused as error:
        raise typer.BadParameter(f"{error}.", param_hint=f"'{error.option}'") from error
    except ValueError as error:
        raise typer.BadParameter(f"{error}.", param_hint="'--compare'") from error
    return run(settings, arguments(), console, **files)
