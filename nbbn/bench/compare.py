"""What is different between two reports, beyond the noise."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from nbbn.bench import tables
from nbbn.bench.measure import LIMIT, Result
from nbbn.bench.record import Record
from nbbn.bench.shapes import written
from nbbn.bench.timing import Spread

LEAST = 0.02
"""A difference that is smaller, as a part, is none."""


@dataclass(frozen=True)
class Change:
    """One contender on one case, in both.

    Attributes
    ----------
    ratio : float
        The second time divided by the first.
    adjusted : float
        The same of the times divided by that of the machine's limit in the same rounds: what is left when
        the whole machine was slower.
    verdict : str
        ``slower`` or ``faster`` where the quartiles of the adjusted times lie apart, and nothing otherwise.
    """

    before: Result
    after: Result
    ratio: float
    adjusted: float
    verdict: str


def changes(first: Record, second: Record) -> list[Change]:
    """Return what both have measured, in the order of the first.

    Raises
    ------
    ValueError
        If there is nothing.
    """
    before, after = _by_key(first), _by_key(second)
    found = []
    for key in before.keys() & after.keys():
        a, b = (_adjusted(side[key], side.get((*key[:2], LIMIT))) for side in (before, after))
        ratio = after[key].spread.median / before[key].spread.median
        adjusted = b.median / a.median
        verdict = ""
        if abs(adjusted - 1) > LEAST:
            if b.low > a.high:
                verdict = "slower"
            elif b.high < a.low:
                verdict = "faster"
        found.append(Change(before[key], after[key], ratio, adjusted, verdict))
    if not found:
        raise ValueError("got two files that have measured no case in common")
    order = {id(result): k for k, result in enumerate(first.report.results)}
    return sorted(found, key=lambda change: order[id(change.before)])


def _by_key(record: Record) -> dict[tuple[object, ...], Result]:
    return {(r.case, r.group, r.name): r for r in record.report.results}


def _adjusted(result: Result, limit: Result | None) -> Spread:
    """Return a result's times divided by the limit's of the same rounds."""
    if limit is None or result.name == LIMIT:
        return result.spread
    pairs = zip(result.seconds, limit.seconds, strict=False)
    quotients = [a / b for a, b in pairs if a == a and b == b]
    return Spread.of(quotients) if quotients else result.spread


def differences(first: Record, second: Record) -> Iterator[str]:
    """Yield what the two were not measured alike with."""
    for what, a, b in (
        ("machine", first.machine, second.machine),
        ("setting", first.settings, second.settings),
    ):
        for name in dict.fromkeys((*a, *b)):
            if a.get(name) != b.get(name) and name not in ("date", "seed"):
                yield f"{what}, {name}: {a.get(name, 'none')} → {b.get(name, 'none')}"


def show(first: Record, second: Record, console: Console) -> None:
    """Print what changed."""
    found = changes(first, second)
    for text in differences(first, second):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    apart = [change for change in found if change.verdict]
    head = ["case", "path", "who", "before, ms", "after, ms", "ratio", "of limit", "verdict"]
    body = [
        [
            f"{change.before.case.heading}, {written(change.before.case.shape)}",
            change.before.group.text,
            change.before.name,
            tables.number(1e3 * change.before.spread.median),
            tables.number(1e3 * change.after.spread.median),
            tables.number(change.ratio),
            tables.number(change.adjusted),
            change.verdict,
        ]
        for change in apart
    ]
    if body:
        tables.print_table("Changed beyond the noise", head, body, [], console)
    console.print(
        f"{len(apart)} of {len(found)} changed beyond the noise: the quartiles of the times, divided by the "
        f"machine's limit in the same rounds, lie apart by more than {LEAST:.0%}.",
        highlight=False,
        soft_wrap=True,
    )
