"""Which calls are made again as they were (`nbbn.cpu.repeat`), without all that precedes a kernel."""

import contextlib
import functools
import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from nbbn.compiler import Step, undisturbed

MOST = 64  # calls that are kept


@functools.cache
def _repeat() -> Any:
    return undisturbed(functools.partial(importlib.import_module, "nbbn.cpu.repeat"))


def warm_up() -> None:
    """Compile what looks at the arrays of a call that may be a repetition."""
    _repeat().native_alike()


_all: list["Repeats"] = []


def forget() -> None:
    """Keep no call of any operation: for a change of what plans are made by."""
    for repeats in _all:
        repeats.forget()


class Repeats:
    """The calls of an operation that have come more than once, each by what tells it from others at once.

    A call that is no repetition of the one with its key takes its place when it is the second of them, the
    fourth, the eighth …: those that take turns, laid out in several ways, cost little more than they did.
    """

    def __init__(self, operation: str) -> None:
        _all.append(self)
        self._operation = operation
        self._known: dict[tuple[Any, ...], Any] = {}
        self._came: dict[tuple[Any, ...], int] = {}

    def again(
        self, key: tuple[Any, ...], x: np.ndarray, out: Any, *others: Any, then: tuple[Step, ...] = ()
    ) -> tuple[Any, Any, int] | None:
        """Make a call again and take further steps, if there is one with this key and arrays like these.

        Return its result, `out` or a new array, a new array of its statistics or gradients, if it has any,
        and how many values of a channel a mask leaves; None where it was not made.
        """
        repeat = self._known.get(key)
        return None if repeat is None else repeat(x, out, others, then)

    def recorder(self, key: tuple[Any, ...] | None, run: Any) -> Any:
        """Return the run, or what does the same and can be kept; where there is no key, it is not."""
        if key is None:
            return run
        if key not in self._came and len(self._came) >= MOST:
            self.forget()
        times = self._came[key] = self._came.get(key, 0) + 1
        return run if times == 1 or times & (times - 1) else _repeat().Recorder(run)

    def forget(self) -> None:
        """Keep none of those that there are."""
        self._came.clear()
        self._known.clear()

    def keep(
        self,
        key: tuple[Any, ...] | None,
        run: Any,
        *arguments: np.ndarray | None,
        then: Sequence[Step] = (),
        above: float = 1.0,
    ) -> None:
        """Keep what `recorder` returned, which has been run with these arguments, if it is to be and can be.

        Not with the steps that came `then`: they are another call's each time. Where a mask does not leave
        `above` so many values, it is not to be made again.
        """
        if key is None:
            return
        with contextlib.suppress(MemoryError):  # the call itself is over, and was right
            repeat = run.repeat(self._operation, then, above, *arguments)
            if repeat is not None:
                self._known[key] = repeat
