"""Interleaved timing: each contender takes its turn in every round; a figure is the median of its turns."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

SETTLE = 0.01  # seconds: for which the threads of the contender before spin on
LONG_ENOUGH = 1e-3  # seconds: shorter calls are timed several at a time
SLOW = 0.1  # seconds: a turn from which on a contender takes its turn in every fifth round only
FEWEST = 3  # turns of a contender that is slow


@dataclass(frozen=True)
class Turn:
    """How a contender takes its turn.

    Attributes
    ----------
    call : callable
        Does it once.
    enter : callable
        What comes first, such as setting a number of threads.
    wait : callable
        Waits for what calls have begun; for those that return before they are done.
    clock : callable
        Takes what is to be timed and returns the seconds it took.
    disturb : callable, optional
        Puts something else into the caches; each call is then timed by itself.
    """

    call: Callable[[], object]
    enter: Callable[[], None]
    wait: Callable[[], None]
    clock: "Clock"
    disturb: Callable[[], None] | None = None

    def __call__(self) -> float:
        """Return the seconds that a call takes, once what ran before has died down."""
        self.enter()
        begin = time.perf_counter()
        calls = 0
        while (spent := time.perf_counter() - begin) < SETTLE or calls < 1:
            self.call()
            self.wait()
            calls += 1
        repeat = 1
        if self.disturb is None:
            repeat = max(1, round(LONG_ENOUGH * calls / spent))
        else:
            self.disturb()
            self.wait()

        def timed() -> None:
            for _ in range(repeat):
                self.call()
            self.wait()

        return self.clock(timed) / repeat


Clock = Callable[[Callable[[], None]], float]


def wall(timed: Callable[[], None]) -> float:
    """Return how long it takes by the clock on the wall."""
    begin = time.perf_counter()
    timed()
    return time.perf_counter() - begin


def device(timed: Callable[[], None]) -> float:
    """Return how long the GPU works on it: without what it costs to start, and to wait for the end."""
    from numba import cuda

    begin, end = cuda.event(), cuda.event()
    begin.record()
    timed()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of some turns, in whatever unit they are."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, taken: list[float]) -> "Spread":
        """Return those of some turns, of which there is at least one."""
        if len(taken) == 1:
            return cls(*taken * 3)
        return cls(*statistics.quantiles(taken, n=4, method="inclusive"))

    @property
    def percent(self) -> float:
        """Half of what lies between the quartiles, in percent of the median."""
        return 50 * (self.high - self.low) / self.median


def rounds(turns: Mapping[str, Callable[[], float]], count: int) -> Iterator[dict[str, list[float]]]:
    """Let each take its turn, round after round; yield after each what all have taken so far.

    A turn that was not taken, by a slow one, is NaN, so that the turns of a round have one index.
    """
    taken: dict[str, list[float]] = {name: [] for name in turns}
    slow: dict[str, bool] = dict.fromkeys(turns, False)
    for number in range(count):
        for name, turn in turns.items():
            if slow[name] and number % 5 and number >= FEWEST:
                taken[name].append(float("nan"))
                continue
            begin = time.perf_counter()
            taken[name].append(turn())
            slow[name] = time.perf_counter() - begin > SLOW
        yield taken
