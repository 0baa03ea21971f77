"""The command from its first line to its last: measure, show, write."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nbbn.bench import compare, tables
from nbbn.bench.measure import Settings, measure
from nbbn.bench.record import dumped, load, recorded

FAILED, INTERRUPTED = 1, 130


def run(
    settings: Settings,
    arguments: Sequence[str],
    console: Console,
    *,
    json: Path | None = None,
    markdown: Path | None = None,
    plot: Path | None = None,
) -> int:
    """Measure what is asked for, show it and write it; return the exit status.

    Returns
    -------
    int
        0; 1 if an answer was wrong; 130 if Ctrl-C came before the end.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=len(settings.cases()))

        def progress(what: str, part: float) -> None:
            bars.update(bar, description=what, advance=part)

        report = measure(settings, progress)
    record = recorded(settings, report, arguments)
    tables.show(record, console)
    for path, text in ((json, dumped), (markdown, tables.markdown)):
        if path is not None:
            _replace(path, text(record).encode())
            console.print(f"Wrote {path}", highlight=False, soft_wrap=True)
    if plot is not None:
        from nbbn.bench.plot import draw  # matplotlib takes a second to import

        with tempfile.TemporaryDirectory() as directory:
            drawn = Path(directory) / plot.name
            draw(record, drawn)
            _replace(plot, drawn.read_bytes())
        console.print(f"Wrote {plot}", highlight=False, soft_wrap=True)
    if report.wrong:
        return FAILED
    return INTERRUPTED if report.interrupted else 0


def compare_files(first: Path, second: Path, console: Console) -> None:
    """Show what changed between two files; ValueError if they cannot be read or have nothing in common."""
    compare.show(load(first), load(second), console)


def _replace(path: Path, content: bytes) -> None:
    """Write a file at once, so that nobody finds half of it."""
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(beside, path.stat().st_mode if path.exists() else 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
