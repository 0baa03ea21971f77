"""What a report looks like: tables on a terminal, in a pipe, and in Markdown."""

import math
import re
import statistics
from collections.abc import Iterable, Iterator
from itertools import groupby

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nbbn.bench.model import Model, models
from nbbn.bench.record import Record, Row, rows
from nbbn.bench.shapes import written

Cells = list[str]
NOTE = (
    "A peer's column is its time divided by nbbn's: above 1, nbbn is faster. MB is one array; GB/s counts x, "
    "the result and grad_out once each; 100 % of the limit is a copy (backward: out = x + y) of the same "
    "arrays on the same threads, or on a GPU a device copy, in the same rounds."
)


def number(value: float | None, digits: int = 3) -> str:
    """Return so many digits of a number, without an exponent; nothing for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def heading(row: Row) -> str:
    """Return which table a row belongs to."""
    return row.case.heading


def peers(found: Iterable[Row]) -> list[str]:
    """Return whom nbbn is compared with in some rows."""
    return list(dict.fromkeys(name for row in found for name in row.others))


def head(names: list[str]) -> Cells:
    """Return the titles of a table's columns."""
    return ["shape", "MB", "path", "ms", "± %", "GB/s", "% of limit", *names]


def cells(row: Row, names: list[str]) -> Cells:
    """Return a line of a table."""
    spread = row.own.spread
    return [
        written(row.case.shape),
        number(row.case.nbytes / row.case.arrays / 1e6),
        row.group.text,
        number(1e3 * spread.median),
        number(spread.percent, 2),
        number(row.own.rate),
        number(row.percent),
        *[number(row.ratio(name)) for name in names],
    ]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the geometric mean of those that are there."""
    there = [value for value in values if value is not None]
    return statistics.geometric_mean(there) if there else None


def means(found: list[Row], names: list[str]) -> Iterator[Cells]:
    """Yield the geometric means of a table's rows, a line for each path."""
    for group in dict.fromkeys(row.group for row in found):
        own = [row for row in found if row.group == group]
        if len(own) > 1:
            yield [
                "geometric mean", "", group.text, "", "", number(mean(row.own.rate for row in own)),
                number(mean(row.percent for row in own)),
                *[number(mean(row.ratio(name) for row in own)) for name in names],
            ]  # fmt: skip


def tables(record: Record) -> Iterator[tuple[str, Cells, list[Cells], list[Cells]]]:
    """Yield each table's title, its head, its lines, and its last lines."""
    for title, some in groupby(rows(record.report), heading):
        found = list(some)
        names = peers(found)
        yield title, head(names), [cells(row, names) for row in found], list(means(found, names))


def facts(record: Record) -> Iterator[str]:
    """Yield what comes before the tables: the machine, and what its memory can do."""
    told = dict(record.machine)
    yield f"{told.pop('date', '')}: {record.command}"
    yield ", ".join(f"{name} {value}" for name, value in told.items() if value not in ("", "not installed"))
    for (group, what), rate in record.report.memory.items():
        yield f"memory, {what}, {group.text}: {number(rate)} GB/s read and written"


def firsts(record: Record) -> Iterator[str]:
    """Yield how long the first calls took that compiled something."""
    for row in rows(record.report):
        if row.own.how == "compiled":
            what = f"{row.case.text}, {row.group.text}"
            yield f"compiled: the first call of {what} took {number(row.own.first)} s"


def remarks(record: Record) -> Iterator[str]:
    """Yield what comes after the tables."""
    report = record.report
    yield from firsts(record)
    yield from (f"left out: {who}: {why}" for who, why in _joined(report.left_out))
    yield from (f"WRONG, and not timed: {text}" for text in report.wrong)
    if report.interrupted:
        yield "Interrupted: these are the cases that were measured until then."


def _joined(left_out: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each contender once for each reason."""
    seen: dict[tuple[str, str], int] = {}
    for who, why in left_out.items():
        name = who.partition(",")[0]
        seen[name, why] = seen.get((name, why), 0) + 1
    for (name, why), times in seen.items():
        yield (name if times == 1 else f"{name} ({times} times)"), why


def model_cells(model: Model) -> Cells:
    """Return a line of the table of models."""
    bandwidth = "–" if model.rate is None else number(model.rate / 1e9)
    return [
        model.what,
        model.group.text,
        number(1e6 * model.call),
        bandwidth,
        number(100 * model.off, 2),
        str(model.points),
    ]


MODEL_TITLE = "time = bytes / bandwidth + call cost"
MODEL_HEAD = ["what", "path", "call cost, µs", "bandwidth, GB/s", "worst miss, %", "sizes"]


def show(record: Record, console: Console) -> None:
    """Print a report, with rules and colours on a terminal and without in a pipe."""

    def line(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=not console.is_terminal)

    for fact in facts(record):
        line(fact)
    for title, top, body, last in tables(record):
        print_table(title, top, body, last, console)
    fitted = models(rows(record.report))
    if fitted:
        print_table(MODEL_TITLE, MODEL_HEAD, [model_cells(model) for model in fitted], [], console)
    if record.report.results:
        line(NOTE)
    for remark in remarks(record):
        line(remark)


def print_table(title: str, top: Cells, body: list[Cells], last: list[Cells], console: Console) -> None:
    """Print one table, with rules on a terminal and without in a pipe; `last` is what sums it up."""
    if console.is_terminal:
        table = Table(title=title, title_justify="left")
        for name in top:
            table.add_column(name, justify="left" if name in ("shape", "path", "what") else "right")
        for cells_ in body:
            table.add_row(*cells_)
        table.add_section()
        for cells_ in last:
            table.add_row(*cells_, style="bold")
        console.print(table)
        return
    lines = [top, *body, *last]
    widths = [max(len(cells_[k]) for cells_ in lines) for k in range(len(top))]
    console.print(f"\n{title}", highlight=False, soft_wrap=True)
    for cells_ in lines:
        text = "  ".join(
            cell.ljust(width) if top[k] in ("shape", "path", "what") else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells_, widths, strict=True))
        )
        console.print(escape(text.rstrip()), highlight=False, soft_wrap=True)


def asked(record: Record) -> str:
    """Return the command without the files that it writes."""
    return re.sub(r" --(json|markdown|plot)[ =]\S+", "", record.command)


def markdown(record: Record) -> str:
    """Return a report as Markdown."""
    told = record.machine
    where = f"{told.get('processor', 'an unknown processor')}, {told.get('cores', '?')} cores"
    lines = [
        f"# {where}: `{asked(record)}`",
        "",
        f"`{record.command}`",
        "",
        f"Measured on {told.get('date', 'an unknown day')}:",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in told.items() if name != "date"]
    for (group, what), rate in record.report.memory.items():
        lines.append(f"- memory, {what}, {group.text}: {number(rate)} GB/s read and written")
    lines += ["", NOTE]
    every = [(title, top, body + last) for title, top, body, last in tables(record)]
    fitted = models(rows(record.report))
    if fitted:
        every.append((MODEL_TITLE, MODEL_HEAD, [model_cells(model) for model in fitted]))
    for title, top, body in every:
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        lines += [f"| {' | '.join(cells_)} |" for cells_ in (top, ["---"] * len(top), *body)]
    after = list(remarks(record))
    if after:
        lines += ["", "## Remarks", ""] + [f"- {remark}" for remark in after]
    return "\n".join(lines) + "\n"
