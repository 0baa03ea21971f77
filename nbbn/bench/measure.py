"""Who is timed on what, in which order; each answer is checked before it is timed."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numba
import numpy as np

from nbbn.bench.cases import Case, Data
from nbbn.bench.contenders import Contender, Group, Nbbn, Prepared, Unsupported, WrongAnswer, nothing
from nbbn.bench.limits import ARRAYS, LARGE, aligned, limits
from nbbn.bench.shapes import Shape
from nbbn.bench.timing import Clock, Spread, Turn, device, rounds, wall
from nbbn.compiler import compilations
from nbbn.cuda.target import SIMULATED

LIMIT = "limit"
NBBN = Nbbn()


@dataclass(frozen=True)
class Settings:
    """What is asked for.

    Attributes
    ----------
    shapes : tuple of Shape
    layouts, dtypes, modes : tuple of str
    groups : tuple of Group
        The paths, and on how many threads.
    peers : tuple of Contender
    rounds : int
        How often each takes its turn.
    cold : bool
        Whether caches are filled with something else before each call.
    new_outputs : bool
        Whether results go into new arrays instead of one that is there.
    seed : int
        Of the data.
    """

    shapes: tuple[Shape, ...]
    layouts: tuple[str, ...]
    dtypes: tuple[str, ...]
    modes: tuple[str, ...]
    groups: tuple[Group, ...]
    peers: tuple[Contender, ...]
    rounds: int
    cold: bool
    new_outputs: bool
    seed: int

    def cases(self) -> list[Case]:
        """Return what is timed, in order: the modes of a shape one after the other, on the same data."""
        return [
            Case(mode, layout, dtype, shape)
            for layout in self.layouts
            for shape in self.shapes
            for dtype in self.dtypes
            for mode in self.modes
        ]


@dataclass
class Result:
    """How long one contender took for one case.

    Attributes
    ----------
    name : str
        A contender's, or `LIMIT`.
    seconds : list of float
        One per round; NaN where it was left out.
    nbytes : int
        What it had to read and write.
    first : float
        Seconds of its first call for this case, with whatever it compiles.
    how : str
        Of a limit: which way was the fastest. Of nbbn: whether its first call compiled kernels.
    """

    case: Case
    group: Group
    name: str
    seconds: list[float]
    nbytes: int
    first: float = 0.0
    how: str = ""

    @property
    def spread(self) -> Spread:
        """The median and the quartiles of the rounds it took part in."""
        return Spread.of([s for s in self.seconds if s == s])

    @property
    def rate(self) -> float:
        """GB/s of the bytes that must move."""
        return self.nbytes / self.spread.median / 1e9


@dataclass
class Report:
    """What came out so far.

    Attributes
    ----------
    results : list of Result
    memory : dict of (Group, str) to float
        GB/s of a copy and of a triad of arrays that no cache holds, before anything else ran.
    wrong : list of str
        Which contenders gave a wrong answer, and which. They were not timed.
    left_out : dict of str to str
        Who was left out, and why.
    interrupted : bool
        Whether there was to be more.
    """

    results: list[Result] = field(default_factory=list)
    memory: dict[tuple[Group, str], float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False


Progress = Callable[[str, float], None]
"""Is told what is being done, and how many cases that brings to an end: 1, or a part."""


def measure(settings: Settings, progress: Progress) -> Report:
    """Time everything, or as much as Ctrl-C leaves time for."""
    report = Report()
    try:
        for group in settings.groups:
            progress(f"memory, {group.text}", 0)
            report.memory |= {(group, name): rate for name, rate in _memory(group)}
        data: Data | None = None
        for case in settings.cases():
            progress(case.text, 0)
            if data is None or (data.shape, data.layout, data.name) != (case.shape, case.layout, case.dtype):
                data = None  # its memory is needed for the next
            try:
                data = data or Data(
                    case.shape, case.layout, case.dtype, settings.seed, not settings.new_outputs
                )
                _case(case, data, settings, report, progress)
            except MemoryError as error:
                report.left_out[case.text] = f"there is not enough memory: {error}"
    except KeyboardInterrupt:
        report.interrupted = True
    return report


def _memory(group: Group) -> Iterator[tuple[str, float]]:
    """Yield GB/s of a copy and of a triad of large arrays."""
    if group.cuda:
        from numba import cuda

        x = cuda.to_device(np.zeros(LARGE, np.uint8))
        y = cuda.device_array_like(x)
        ways = {"copy": ({"device copy": lambda: y.copy_to_device(x)}, 2, cuda.synchronize)}
    else:
        host = [aligned((LARGE // 4,)) for _ in range(3)]
        ways = {name: (limits(name, *host), count, nothing) for name, count in ARRAYS.items()}
    for name, (calls, count, wait) in ways.items():
        turns = {way: Turn(call, _entering(NBBN, group), wait, _clock(group)) for way, call in calls.items()}
        *_, taken = rounds(turns, 5)
        yield name, count * LARGE / min(map(statistics.median, taken.values())) / 1e9


def _limit(case: Case, data: Data, group: Group) -> tuple[str, Callable[[], None], int, Callable[[], None]]:
    """Return the fastest way to move the arrays of a case: its name, itself, its bytes, how to wait."""
    if group.cuda:
        from numba import cuda

        x = cuda.to_device(data.x.reshape(-1).view(np.uint8))
        y = cuda.device_array_like(x)
        return "device copy", lambda: y.copy_to_device(x), 2 * data.x.nbytes, cuda.synchronize
    out = aligned(data.x.shape, data.dtype) if data.out is None else data.out
    calls = limits("triad" if case.mode == "backward" else "copy", data.x, data.grad_out, out)
    *_, taken = rounds(
        {way: Turn(call, _entering(NBBN, group), nothing, wall) for way, call in calls.items()}, 3
    )
    best = min(calls, key=lambda way: statistics.median(taken[way]))
    return best, calls[best], case.nbytes, nothing


def _disturbance(settings: Settings, group: Group) -> Callable[[], None] | None:
    """Return what fills the caches with something else, if that is asked for."""
    if not settings.cold:
        return None
    if group.cuda:
        from numba import cuda

        x = cuda.to_device(np.zeros(2 * LARGE, np.uint8))
        y = cuda.device_array_like(x)
        return lambda: y.copy_to_device(x)
    host = [aligned((LARGE // 4,)) for _ in range(2)]
    return limits("copy", host[0], host[0], host[1])["cached copy"]


@dataclass
class _Field:
    """Who takes turns at a case, what will be known of each, and who stands for another group as well."""

    turns: dict[str, Turn] = field(default_factory=dict)
    found: dict[str, Result] = field(default_factory=dict)
    again: list[tuple[Result, Group]] = field(default_factory=list)


def _line_up(case: Case, data: Data, settings: Settings, report: Report) -> _Field:
    """Return those who gave the right answer, and the limit; report the others."""
    lined = _Field()
    for group in settings.groups:
        disturb, clock = _disturbance(settings, group), _clock(group)
        for contender in (NBBN, *settings.peers):
            if not contender.threaded and not group.cuda:
                others = (r for r in lined.found.values() if r.name == contender.name and not r.group.cuda)
                if (same := next(others, None)) is not None:
                    lined.again.append((same, group))
                    continue
            before = compilations()
            try:
                prepared, first = ready(contender, case, data, group)
            except Unsupported as error:
                report.left_out.setdefault(f"{contender.name}, {case.heading}, {group.text}", str(error))
                continue
            except WrongAnswer as error:
                report.wrong.append(str(error))
                continue
            how = "compiled" if compilations() > before else ""
            key = f"{group.text}, {contender.name}"
            lined.turns[key] = Turn(prepared.call, _entering(contender, group), prepared.wait, clock, disturb)
            lined.found[key] = Result(case, group, contender.name, [], case.nbytes, first, how)
        way, move, nbytes, wait = _limit(case, data, group)
        key = f"{group.text}, {LIMIT}"
        lined.turns[key] = Turn(move, _entering(NBBN, group), wait, clock, disturb)
        lined.found[key] = Result(case, group, LIMIT, [], nbytes, how=way)
    return lined


def _case(case: Case, data: Data, settings: Settings, report: Report, progress: Progress) -> None:
    """Time a case, and add what came out to the report."""
    lined = _line_up(case, data, settings, report)
    found = lined.found.values()
    try:
        for taken in rounds(lined.turns, settings.rounds):
            for key, seconds in taken.items():
                lined.found[key].seconds = seconds
            progress(case.text, 1 / settings.rounds)
    finally:  # Ctrl-C leaves what has been measured of this case, if everybody has had a turn
        if all(result.seconds for result in found):
            report.results += found
            report.results += [replace(same, group=group) for same, group in lined.again]


def _clock(group: Group) -> Clock:
    return device if group.cuda and not SIMULATED else wall  # the simulator's events all take no time


def _entering(contender: Contender, group: Group) -> Callable[[], None]:
    return lambda: contender.enter(group)


def ready(contender: Contender, case: Case, data: Data, group: Group) -> tuple[Prepared, float]:
    """Return what does a case, and the seconds that its first call took; its answer has been checked.

    Raises
    ------
    Unsupported
        If the contender cannot do this.
    WrongAnswer
        If what it returned is not what the oracle says.
    """
    if data.out is not None:
        data.out.fill(np.nan)
    who = f"{contender.name}, {case.text}, {group.text}"
    try:
        prepared = contender.prepare(case, data, group)
        contender.enter(group)
        begin = time.perf_counter()
        value = prepared.call()
        prepared.wait()
        first = time.perf_counter() - begin
        results = prepared.read(value)
    except (MemoryError, Unsupported):
        raise
    except Exception as error:  # whatever another library raises where it cannot do this
        reason = f"it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if contender is NBBN:
            raise WrongAnswer(f"{who}: {reason}") from error
        raise Unsupported(reason) from error
    if fault := data.oracle.fault(case.mode, results):
        raise WrongAnswer(f"{who}: {fault}")
    return prepared, first


def most_threads() -> int:
    """Return how many threads Numba has at most."""
    return int(numba.config.NUMBA_NUM_THREADS)
