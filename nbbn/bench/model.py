"""How the time grows with the size: time = bytes / bandwidth + call cost, fitted to what was measured."""

from dataclasses import dataclass
from itertools import groupby

import numpy as np

from nbbn.bench.cases import Case
from nbbn.bench.contenders import Group
from nbbn.bench.record import Row
from nbbn.bench.shapes import written

FEWEST = 4  # sizes of which two constants can be told


@dataclass(frozen=True)
class Model:
    """The two constants of some shapes that differ in the batch only.

    Attributes
    ----------
    what : str
    call : float
        Seconds that a call costs on nothing.
    rate : float or None
        Bytes a second; none where the time does not grow.
    off : float
        How far the worst measurement is from the model, as a part of it.
    points : int
        How many sizes were measured.
    """

    what: str
    group: Group
    call: float
    rate: float | None
    off: float
    points: int

    def seconds(self, nbytes: float) -> float:
        """Return the time that it foretells."""
        return self.call + (0.0 if self.rate is None else nbytes / self.rate)


def series(case: Case) -> str:
    """Return what stays the same in a sweep."""
    return f"{case.heading}, N×{written(case.shape[1:])}"


def sweeps(found: list[Row]) -> dict[tuple[str, Group], list[Row]]:
    """Return the rows that differ in the batch only, where there are several, by size."""

    def key(row: Row) -> tuple[str, str, int]:
        return series(row.case), row.group.path, row.group.threads

    several = {}
    for _, some in groupby(sorted(found, key=key), key):
        same = sorted(some, key=lambda row: row.case.nbytes)
        if len({row.case.nbytes for row in same}) >= FEWEST:
            several[series(same[0].case), same[0].group] = same
    return several


def models(found: list[Row]) -> list[Model]:
    """Fit the model to each sweep, with errors counted as parts of the time: each size weighs the same."""
    return [
        _fitted(
            what,
            group,
            np.array([row.case.nbytes for row in same], float),
            np.array([row.own.spread.median for row in same]),
        )
        for (what, group), same in sweeps(found).items()
    ]


def _fitted(what: str, group: Group, nbytes: np.ndarray, seconds: np.ndarray) -> Model:
    columns = np.stack([np.ones_like(nbytes), nbytes], axis=1)
    (call, slope), *_ = np.linalg.lstsq(columns / seconds[:, None], np.ones_like(seconds), rcond=None)
    if call < 0:  # a call does not cost less than nothing
        call, slope = 0.0, float((nbytes / seconds).sum() / np.square(nbytes / seconds).sum())
    model = Model(what, group, float(call), 1 / slope if slope > 0 else None, 0.0, len(nbytes))
    foretold = np.array([model.seconds(n) for n in nbytes])
    off = float(np.max(np.abs(foretold / seconds - 1)))
    return Model(what, group, model.call, model.rate, off, model.points)
