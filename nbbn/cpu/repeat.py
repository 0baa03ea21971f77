"""Calls again: what has been found out about one need not be found out about the next.

The kernels of a small call take a few µs, and Python several times as long to find out what its arguments
are; of a larger one it is still a part. But most calls are like one before, except for where their arrays
lie. That one's record is kept here (`Repeat`), with what its arrays were like; compiled code (`_alike`)
compares others with them, and puts into the record where they lie. It reads an array as NumPy's C interface
lays it out: where this Python has them in another way, nothing is kept.
"""

import ctypes
import itertools
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numba.core import types

from nbbn.arrays import address
from nbbn.compiler import Entry, Step, compiled, in_one, pool, undisturbed
from nbbn.cpu.call import CALL, LIKE, SETTING, like_at, setting_at
from nbbn.cpu.plan import Plan
from nbbn.cpu.run import Call, Room, Run, room
from nbbn.cpu.simd import pointer
from nbbn.memory import SMALLEST, empty_aligned, empty_like
from nbbn.problem import Marks

OWN_WORDS = 1 << 13  # a call that works in no more keeps them
LIKE_BYTES, SETTING_BYTES = LIKE.itemsize, SETTING.itemsize


class Role(NamedTuple):
    """What an argument of a call is there for.

    Attributes
    ----------
    fields : tuple of str
        Which fields of a record have its address: see `nbbn.cpu.call`.
    written : bool
        Whether it is written.
    apart : tuple of int
        The numbers of arguments that it must have no memory in common with, two at most.
    same : bool
        Whether it may be the first of these instead.
    """

    fields: tuple[str, ...]
    written: bool = False
    apart: tuple[int, ...] = ()
    same: bool = False


_OUT, _STATS = Role(("out",), written=True), Role(("stats", "channel_stats"), written=True)
_X, _X_ALONE = Role(("x", "second"), apart=(0,), same=True), Role(("x",), apart=(0,), same=True)
_WEIGHT, _BIAS, _MEAN, _VAR, _MASK = (
    Role((name,), apart=(0,)) for name in ("weight", "bias", "mean", "var", "mask")
)
_RESIDUAL = Role(("second",), apart=(0,), same=True)
ROLES = {
    # out, x, weight, bias, stats
    "normalize": (_OUT, _X, _WEIGHT, _BIAS, _STATS),
    # out, x, weight, bias, running_mean, running_var, mask, residual, stats
    "forward": (
        *(_OUT, _X, _WEIGHT, _BIAS),
        Role(("mean",), written=True, apart=(0,)),
        Role(("var",), written=True, apart=(0, 4)),
        *(_MASK, _RESIDUAL, _STATS),
    ),
    # out, x, weight, bias, running_mean, running_var, mask, residual, and none
    "evaluate": (_OUT, _X, _WEIGHT, _BIAS, _MEAN, _VAR, _MASK, _RESIDUAL, _STATS),
    # grad_x, x, weight, bias, mean, invstd, grad_out, mask, gradients
    "backward": (
        *(_OUT, _X_ALONE, _WEIGHT, _BIAS, _MEAN, _VAR),
        Role(("grad_out", "second"), apart=(0,)),
        _MASK,
        _STATS,
    ),
}
# Of these a field may have another address, where what they say is not the same.
_ELSEWHERE = "second", "channel_stats"
_IN_ROOM = "channel_stats"  # of a call, where it is no argument's

# The words of an array, two of which are of 32 bits; and the flag of one that may be written.
_TYPE, _DATA, _NDIM, _SHAPE, _STRIDES, _DTYPE, _FLAGS = 1, 2, 3, 4, 5, 7, 8
_HALF = (1 << 32) - 1
_WRITEABLE = 0x400


def _alike(about, objects):
    """Compare the objects of a tuple with what is known of them, and put where they lie to where it belongs.

    `about` is where it says how many there are and what each is like, how many addresses are to be set and
    which, and which word of a tuple its first object is. Return whether they are as it says; otherwise
    nothing has been put anywhere.
    """
    words = pointer(about, np.int64)
    number, likes, settings, setting = words[0], words[1], words[2], words[3]
    objects += words[4] * 8
    for k in range(number):
        its, found = like_at(likes + k * LIKE_BYTES), pointer(objects, np.int64)[k]
        if its.dtype == 0:
            if found != its.type:
                return 0
            continue
        array = pointer(found, np.int64)
        if array[_TYPE] != its.type or array[_DTYPE] != its.dtype or array[_NDIM] & _HALF != its.ndim:
            return 0
        if array[_FLAGS] & its.flags != its.flags:
            return 0
        known, ndim = pointer(its.shape, np.int64), its.ndim
        shape, strides = pointer(array[_SHAPE], np.int64), pointer(array[_STRIDES], np.int64)
        for axis in range(ndim):
            if shape[axis] != known[axis] or strides[axis] != known[ndim + axis]:
                return 0
        its.data = array[_DATA]
    for k in range(number):
        its = like_at(likes + k * LIKE_BYTES)
        for other in (its.apart, its.apart_too):
            if its.dtype == 0 or other < 0:
                continue
            that = like_at(likes + other * LIKE_BYTES)
            ahead = that.data - its.data
            same = its.same == 1 and ahead == 0
            if that.dtype != 0 and not same and its.begin - that.end < ahead < its.end - that.begin:
                return 0
    for k in range(settings):
        it = setting_at(setting + k * SETTING_BYTES)
        pointer(it.at, np.int64)[0] = like_at(likes + it.argument * LIKE_BYTES).data + it.more
    return 1


@cache
def native_alike() -> tuple[Any, Any]:
    """Return `_alike`, called with the GIL: nobody may change an array meanwhile. And what keeps it alive."""
    machine_code = undisturbed(partial(compiled, _alike, types.int64(types.int64, types.int64)))
    function = ctypes.PYFUNCTYPE(ctypes.c_ssize_t, ctypes.c_ssize_t, ctypes.py_object)
    return function(machine_code.address), machine_code


def _words(thing: Any, number: int = _FLAGS + 1) -> list[int]:
    return list((ctypes.c_int64 * number).from_address(id(thing)))


@cache
def _first_of_tuple() -> int:
    """Return which word of a tuple is its first object; 0: none is."""
    things = tuple(object() for _ in range(8))
    words, ids = _words(things, len(things)), [id(thing) for thing in things]
    return next((k for k in range(1, len(words)) if words[k:] == ids[: len(words) - k]), 0)


@cache
def can_read_arrays() -> bool:
    """Whether arrays are laid out in this Python as `_alike` reads them."""
    if sys.implementation.name != "cpython" or sys.byteorder != "little" or object.__basicsize__ != 16:
        return False
    if _first_of_tuple() == 0:
        return False
    whole = np.zeros((2, 3, 5), np.float32)
    read_only = np.zeros(7)
    read_only.flags.writeable = False
    for array in (whole, whole[::-1, :, 1::2], whole.T, read_only, np.ones(2, np.float32)):
        words, sizes = _words(array), array.ndim * 8
        if (
            words[_TYPE] != id(np.ndarray)
            or words[_DATA] != array.__array_interface__["data"][0]
            or words[_NDIM] & _HALF != array.ndim
            or ctypes.string_at(words[_SHAPE], sizes) != np.array(array.shape, np.int64).tobytes()
            or ctypes.string_at(words[_STRIDES], sizes) != np.array(array.strides, np.int64).tobytes()
            or words[_DTYPE] != id(array.dtype)
            or bool(words[_FLAGS] & _WRITEABLE) != array.flags.writeable
        ):
            return False
    return True


class _Steps:
    """What calls did, one after the other."""

    def __init__(self) -> None:
        self.calls: list[_Recorded] = []
        self.taken: list[Step] = []
        self.whole = True
        """Whether that is all, by records that did not change in between."""
        self.parallel = False
        """Whether on several threads."""
        self.counting = 0
        """How many of them end with a count, of a mask's values, that decides on the others."""


class _Recorded(Call):
    """A call that notes its steps."""

    def __init__(self, plan: Plan, steps: _Steps) -> None:
        super().__init__(plan)
        self.borrows = plan.words > OWN_WORDS
        """Whether it works in what is others' between its calls."""
        self.enter(room(plan.words) if self.borrows else Room(plan.words))
        self._steps = steps
        steps.calls.append(self)

    def normalize_second(self) -> None:
        super().normalize_second()
        self._steps.whole = False

    def run(self, kernel: Entry, threads: int, tasks: int, then: tuple[Step, ...]) -> None:
        super().run(kernel, threads, tasks, then)
        self._steps.taken += pool.step(kernel, threads, tasks, self.at), *then
        self._steps.parallel |= threads > 1


class Recorder(Run):
    """Does what another run does, once, and notes what has to be done to do it again."""

    def __init__(self, run: Run, steps: _Steps | None = None) -> None:
        self.__dict__.update(run.__dict__)
        self._steps = steps or _Steps()
        for name in ("_given", "_across"):
            if (part := run.__dict__.get(name)) is not None:
                setattr(self, name, Recorder(part, self._steps))
        if run.__dict__.get("_merged") is not None:
            self._steps.whole = False  # what it does besides is not noted

    def _take(self) -> _Recorded:
        return _Recorded(self.plan, self._steps)

    def _give_back(self, call: Call) -> None:
        if call.plan.words > OWN_WORDS:
            call.leave()

    def mark(self, mask: int, counting: bool = True) -> Marks:
        """As that of a run."""
        marks = super().mark(mask, counting)
        if counting:
            self._steps.counting = len(self._steps.taken)
        return marks

    def repeat(
        self, operation: str, then: Sequence[Step], above: float, *arguments: np.ndarray | None
    ) -> "Repeat | None":
        """Return what does it again, if that can be kept, but for the steps that came `then`.

        `arguments` were its, see `ROLES`. Of a mask it must leave `above` so many values.
        """
        steps = self._steps
        if not steps.calls or not steps.whole or not can_read_arrays():
            return None
        if steps.parallel and pool.layer == "workqueue":  # which may be busy
            return None
        taken = [step for step in steps.taken if not any(step is other for other in then)]
        steps.taken.clear()  # what came then has arrays of the caller's
        settings = _settings(steps.calls, ROLES[operation], arguments)
        if settings is None:
            return None
        return Repeat(steps, taken, above, settings, ROLES[operation], arguments)


def _extent(array: np.ndarray) -> tuple[int, int]:
    """Return how many bytes from its first element the memory of an array begins, and ends."""
    reach = [(n - 1) * step for n, step in zip(array.shape, array.strides, strict=True)]
    return sum(n for n in reach if n < 0), sum(n for n in reach if n > 0) + array.itemsize


def _settings(
    calls: Sequence[_Recorded], roles: Sequence[Role], arguments: Sequence[np.ndarray | None]
) -> list[tuple[int, int, int]] | None:
    """Return which argument's address goes to where, and what is added to it; None: some are not theirs."""
    assert CALL.fields is not None
    settings = []
    for number, (role, array) in enumerate(zip(roles, arguments, strict=True)):
        if array is None:
            continue
        begin, end = _extent(array)
        for name, call in itertools.product(role.fields, calls):
            offset = CALL.fields[name][1]
            found = int(call.record[offset : offset + 8].view(np.int64)[0])
            more = found - address(array)
            if begin <= more < end:
                settings.append((number, call.at + offset, more))
            elif found != 0 and (name not in _ELSEWHERE or (name == _IN_ROOM and call.borrows)):
                return None
    return settings


class Repeat:
    """A call that has been checked and made, to be made again on arrays that are like its were."""

    def __init__(
        self,
        known: _Steps,
        steps: Sequence[Step],
        above: float,
        settings: Sequence[tuple[int, int, int]],
        roles: Sequence[Role],
        arguments: Sequence[np.ndarray | None],
    ) -> None:
        stats = arguments[-1]
        self._room: Callable[[], np.ndarray | None] = lambda: None
        if stats is not None:
            empty = empty_aligned if stats.nbytes >= SMALLEST else np.empty  # recycled, or by malloc
            self._room = partial(empty, stats.shape, stats.dtype)
        self._settings = np.array(settings, SETTING)
        self._likes = np.zeros(len(arguments), LIKE)
        likes, setting = address(self._likes), address(self._settings)
        self._about = np.array([len(arguments), likes, len(settings), setting, _first_of_tuple()])
        # That of which these have addresses, too.
        self._kept = (
            known.calls,
            [
                _set_like(like, role, array, arguments[0])
                for like, role, array in zip(self._likes, roles, arguments, strict=True)
            ],
        )
        alike = partial(native_alike()[0], address(self._about))
        self._parallel = known.parallel
        self._borrowing = [call for call in known.calls if call.borrows]
        # A call with a mask has one record.
        self._counting, self._counted, self._above = known.counting, known.calls[0], above
        self._alone = not (self._parallel or self._borrowing or self._counting)
        # No two threads may use the records at once.
        self._idle = [(alike, steps[0] if len(steps) == 1 else partial(in_one, *steps), steps)]

    def __call__(
        self, x: np.ndarray, out: Any, others: tuple[Any, ...], then: tuple[Step, ...]
    ) -> tuple[Any, Any, int] | None:
        """Make the call, if the arguments are like those that it was made with: see `nbbn.repeats`."""
        result = empty_like(x) if out is None else out
        stats = self._room()
        try:
            mine = self._idle.pop()
        except IndexError:
            return None
        try:
            alike, run, steps = mine
            if not alike((result, x, *others, stats)):
                return None
            count: int | None = 0
            if not self._alone:
                count = self._run(steps, then)
            elif then:
                in_one(*steps, *then)
            else:
                run()
            return None if count is None else (result, stats, count)
        finally:
            self._idle.append(mine)

    def _run(self, steps: Sequence[Step], then: tuple[Step, ...]) -> int | None:
        """Take all steps; return how many values a mask leaves, or 0, or None if these are too few."""
        if self._parallel:
            pool.enter()
        for call in self._borrowing:
            call.enter(room(call.plan.words))
        try:
            if not self._counting:
                in_one(*steps, *then)
                return 0
            in_one(*steps[: self._counting])
            count = self._counted.count
            if count <= self._above:
                return None
            self._counted.set_count(count)
            in_one(*steps[self._counting :], *then)
            return count
        finally:
            for call in self._borrowing:
                call.leave()


def _set_like(like: np.void, role: Role, array: np.ndarray | None, out: np.ndarray | None) -> Any:
    """Set what an argument is like; return what has to be kept alive for it."""
    like["apart"] = like["apart_too"] = -1
    if array is None:
        like["type"] = id(None)
        return None
    shape = np.array([*array.shape, *array.strides], np.int64)
    like["type"], like["dtype"], like["ndim"] = id(np.ndarray), id(array.dtype), array.ndim
    like["flags"] = _WRITEABLE * role.written
    like["shape"] = address(shape)
    like["begin"], like["end"] = _extent(array)
    for name, other in zip(("apart", "apart_too"), role.apart, strict=False):
        like[name] = other
    like["same"] = role.same and out is not None and out.strides == array.strides
    return shape, array.dtype
