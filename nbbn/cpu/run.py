"""The stages of each operation, in order, on the CPU: which kernels run, over how many tasks."""

import itertools
import struct
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from nbbn.arrays import ABSENT, Parameter, address
from nbbn.compiler import Entry, Step, entry, pool
from nbbn.cpu import copies, kernels
from nbbn.cpu.call import CALL
from nbbn.cpu.plan import Plan, is_mixed, is_short, way_for
from nbbn.cpu.simd import ACROSS, ALONG, DOWN, LANES, Way, stored_as
from nbbn.dtypes import STATISTICS, Storage
from nbbn.geometry import Geometry, Layout, canonical
from nbbn.memory import empty_aligned
from nbbn.problem import BATCH, NOTHING, Extras, Form, Marks, Problem


def _field(name: str) -> slice:
    """Return where a field of the record is."""
    assert CALL.fields is not None
    kind, offset = CALL.fields[name][:2]
    return slice(offset, offset + kind.itemsize)


_MASK = struct.Struct("q")  # see nbbn.cpu.call
_ARGUMENTS = struct.Struct("7q12q5d4q")
_ROOMS = struct.Struct("5q")
_ROOMS_AT = _MASK.size + _ARGUMENTS.size
_CALLED = struct.Struct("3q")
_CALLED_AT = _ROOMS_AT + _ROOMS.size
_X, _SECOND, _AT_X, _AT_SECOND = (_field(name) for name in ("x", "second", "at_x", "at_second"))
_COUNT, _COUNT_AT = struct.Struct("d"), _field("count").start
SERIAL_PARTIALS = 1 << 13  # numbers to merge, below which one thread is as fast as several
OWN_WORDS = 1024  # a call that works in no more keeps them: few bytes beside its plan's own
KEPT_WORDS = 1 << 18  # what a larger one worked in is kept for others up to here


_COPIES = copies.gather, copies.scatter
_KERNELS = {
    "training": (
        kernels.forward,
        kernels.collect_stats,
        kernels.finish_stats,
        kernels.normalize,
        kernels.normalize_columns,
        kernels.normalize_planes,
        kernels.update_running_stats,
    ),
    "evaluation": (
        kernels.use_running_stats,
        kernels.normalize,
        kernels.normalize_columns,
        kernels.normalize_planes,
    ),
    "backward": (
        kernels.backward,
        kernels.backward_reduce,
        kernels.finish_backward,
        kernels.backward_apply,
        kernels.apply_columns,
    ),
}
# Of sets that are one short row each, none masked.
_SHORT = {"training": (kernels.forward_short,), "evaluation": (), "backward": (kernels.backward_short,)}
# Of short channels, and nothing that goes along.
_TURNED = {"training": (kernels.forward_turned,), "evaluation": (), "backward": (kernels.backward_turned,)}
# Where the statistics are constants, grad_x is computed through an activation, or it is scale · dy.
_CONSTANT = kernels.apply_constant, kernels.apply_constant_columns
_SCALED = kernels.normalize, kernels.normalize_columns

_ROW_KERNELS: dict[str, dict[Way, tuple[str, ...]]] = {
    "forward": {
        Way(ALONG): (
            kernels.set_along,
            kernels.forward,
            kernels.forward_short,
            kernels.collect_stats,
            kernels.finish_stats,
            kernels.normalize,
        ),
        Way(DOWN): (kernels.set_along, kernels.forward_turned),
    },
    "backward": {
        Way(ALONG): (
            kernels.set_along,
            kernels.backward,
            kernels.backward_short,
            kernels.backward_reduce,
            kernels.finish_backward,
            kernels.backward_apply,
        ),
        Way(DOWN): (kernels.set_along, kernels.backward_turned),
        Way(ACROSS): (kernels.backward_reduce, kernels.finish_across, kernels.sum_parameters),
    },
}


def _kernels_of(norm: str, operations: Collection[str], form: Form) -> Iterator[tuple[Way, tuple[str, ...]]]:
    """Yield what the operations of a normalization may run; those of batch norm, in a form of it."""
    if norm == "batch":
        way = way_for(form)
        for operation in operations:
            yield way, _KERNELS[operation]
            if not form.masked:
                yield way, _SHORT[operation]
            if form == BATCH:
                yield way, _TURNED[operation]
        if form.masked:
            yield way, (kernels.set_mask, kernels.add_up_counts)
        if "backward" in operations:
            yield (way, _CONSTANT) if form.through else (way.alone, _SCALED)
        return
    of_rows = norm in ("layer", "rms")
    if "training" in operations or "evaluation" in operations:  # there is no difference
        yield Way(), _KERNELS["evaluation"]  # copies what is too scattered
        plain = Way(), (*_KERNELS["training"], *_SHORT["training"], *_TURNED["training"])
        yield from _ROW_KERNELS["forward"].items() if of_rows else (plain,)
        if norm == "group":
            yield Way(), (kernels.finish_sets, kernels.pool_stats, kernels.use_stats)
    if "backward" in operations:
        names = (
            _KERNELS["backward"],
            _SHORT["backward"],
            _TURNED["backward"],
            _SCALED,
            (kernels.sum_parameters,),
        )
        plain = Way(), tuple(itertools.chain(*names))
        yield from _ROW_KERNELS["backward"].items() if of_rows else (plain,)
        if norm == "group":
            yield Way(), (kernels.finish_set_gradients,)


def compile_for(
    storage: Storage, norms: Iterable[str], operations: Collection[str], form: Form = BATCH
) -> None:
    """Compile all that the operations of these normalizations may run on arrays that are stored so."""
    for name in _COPIES:
        entry(name, stored_as(storage.name))
    for norm in norms:
        for way, names in _kernels_of(norm, operations, form):
            for name in names:
                entry(name, stored_as(storage.name, way))


def _called(plan: Plan) -> tuple[int, int, int]:
    """Return nbbn.cpu.call.CALLED."""
    gather = scatter = finish = 0
    if plan.copies:
        gather, scatter = (entry(name, plan.elements).address for name in _COPIES)
    if plan.sets < plan.channels and not plan.merges:
        name = kernels.finish_set_gradients if plan.backward else kernels.finish_sets
        finish = entry(name, plan.stored).address
    return gather, scatter, finish


def _finishers(plan: Plan) -> int:
    """Return how many threads merge partial results: few are not worth waking any for."""
    return 1 if plan.channels * (plan.chunks + 4) < SERIAL_PARTIALS else plan.threads


class Room:
    """Memory that a call works in."""

    def __init__(self, words: int) -> None:
        self.words = words
        self.memory = empty_aligned((words,), STATISTICS)
        self.integers = self.memory.view(np.int64)
        self.address = address(self.memory)


_rooms: list[Room] = []  # nobody works in; as many as there ever were calls at once


def room(words: int) -> Room:
    """Return memory of at least so many words, which `Call.leave` leaves to others."""
    try:
        room = _rooms.pop()
    except IndexError:
        return Room(words)
    return room if room.words >= words else Room(words)


class Call:
    """The record that the kernels of one call read."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.room: Room | None = None
        self._buffer = bytearray(_CALLED_AT + _CALLED.size) + plan.record
        _CALLED.pack_into(self._buffer, _CALLED_AT, *_called(plan))
        self.record = np.frombuffer(self._buffer, np.uint8)
        self.at = address(self.record)
        self._at_x = self._buffer[_AT_X]
        self.set_mask = partial(_MASK.pack_into, self._buffer, 0)
        """Sets nbbn.cpu.call.MASK."""
        self.set = partial(_ARGUMENTS.pack_into, self._buffer, _MASK.size)
        """Sets nbbn.cpu.call.ARGUMENTS, all that differs from call to call."""
        self.set_count = partial(_COUNT.pack_into, self._buffer, _COUNT_AT)
        """Sets of these only how many values of a channel count."""

    def enter(self, room: Room) -> None:
        """Work in this room from now on."""
        self.room = room
        tables = room.address + 8 * self.plan.partial_words
        along = room.address + 8 * self.plan.along_at
        bits = room.address + 8 * self.plan.bits_at
        counts = room.address + 8 * self.plan.counts_at
        _ROOMS.pack_into(
            self._buffer,
            _ROOMS_AT,
            room.address,
            tables + -tables % 64,
            bits,
            counts,
            along + -along % 64,
        )

    @property
    def channel_stats(self) -> int:
        """Where statistics of each channel are, where they are not those of a set."""
        assert self.room is not None
        return self.room.address + 8 * self.plan.channel_stats_at

    @property
    def count(self) -> int:
        """How many values of a channel count, once those before each row have been counted."""
        assert self.room is not None
        return int(self.room.integers[self.plan.counts_at + self.plan.rows])

    def leave(self) -> None:
        """Leave the room to the next call."""
        if self.room is not None and self.room.words <= KEPT_WORDS:
            _rooms.append(self.room)
        self.room = None

    def normalize_second(self) -> None:
        """From here on, what is read beside x, a gradient, takes the place of x."""
        self._buffer[_X] = self._buffer[_SECOND]
        self._buffer[_AT_X] = self._buffer[_AT_SECOND]

    def normalize_x(self) -> None:
        """From the next call on, it is x again."""
        self._buffer[_AT_X] = self._at_x

    def __call__(
        self,
        kernel: str,
        tasks: int,
        threads: int | None = None,
        then: tuple[Step, ...] = (),
        plain: bool = False,
    ) -> None:
        """Run a kernel, or the plain one, over its tasks, on as many threads as the plan is for.

        And `then` take some steps.
        """
        threads = min(self.plan.threads if threads is None else threads, tasks)
        stored = self.plan.plain if plain else self.plan.stored
        self.run(entry(kernel, stored), threads, tasks, then)

    def run(self, kernel: Entry, threads: int, tasks: int, then: tuple[Step, ...]) -> None:
        """Run a compiled kernel, and then some steps."""
        pool.run(kernel, threads, tasks, self.at, *then)

    def step(self, kernel: str) -> Step:
        """Return what runs the only task of a kernel."""
        return partial(entry(kernel, self.plan.stored).run, 0, 1, self.at)


class Run:
    """Runs the operations on one problem. All arrays are given by their addresses."""

    def __init__(self, problem: Problem, turns: bool = True) -> None:
        geometry = canonical(problem.shape, problem.axis, *problem.strides)
        self.form = form = problem.form
        size = problem.storage.dtype.itemsize
        turned = turns and is_short(geometry, form, size, len(problem.strides))
        if turned or is_mixed(geometry, form, size):
            geometry = geometry.downwards()
        self._plain = form.alone == BATCH
        self.plan = plan = Plan(geometry, problem.storage, problem.threads, form, turned=turned)
        self._forward = kernels.forward_turned if turned else kernels.forward
        self._backward = kernels.backward_turned if turned else kernels.backward
        if plan.by_rows:
            self._forward, self._backward = kernels.forward_short, kernels.backward_short
        self._sets = -(-plan.sets // LANES)  # blocks of them
        self._tiles = plan.chunks * plan.groups
        self._slabs = plan.slabs * plan.groups
        # What writes the result where nothing stays in cache, and over how many tasks.
        self._normalizes = kernels.normalize, self._slabs
        self._applies = kernels.backward_apply, self._slabs
        self._applies_constant = kernels.apply_constant, self._slabs
        if plan.by_columns:
            self._normalizes = kernels.normalize_columns, plan.outer
            self._applies = kernels.apply_columns, plan.outer
            self._applies_constant = kernels.apply_constant_columns, plan.outer
        self._normalizes_x = (kernels.normalize_planes, plan.planes) if plan.by_planes else self._normalizes
        self._finishers = _finishers(plan)
        self._alone = plan.resident and min(plan.threads, plan.tasks) == 1
        # Calls that are over, to be used again: a small call is mostly what comes before its kernel.
        self._idle: list[Call] = []
        self._merged = _Sets(problem, geometry) if plan.merges else None
        # Where statistics are given there is nothing to add up.
        self._given = Run(problem, turns=False) if turned and form == BATCH else None
        self._across: Run | None = None
        if form.along and len(problem.strides) == 3:
            self._across = object.__new__(Run)
            self._across._sum_columns_of(problem, plan.of_task if plan.by_rows else 0)

    def _sum_columns_of(self, problem: Problem, chunk: int) -> None:
        """Make this what takes the gradients of parameters that go along the rows of a problem.

        Who goes through these leaves the sums of so many rows in each chunk; 0: nobody does.
        """
        rows, columns = problem.shape
        layouts = tuple(Layout(0, (outer,), inner, 0) for outer, inner in problem.strides)
        geometry = Geometry((rows,), columns, 1, layouts)
        self.plan = plan = Plan(geometry, problem.storage, problem.threads, across=True, chunk=chunk)
        self._finishers = _finishers(plan)
        self._idle = []

    def repeat(
        self, operation: str, then: Sequence[Step], above: float, *arguments: np.ndarray | None
    ) -> Any:
        """Return what does again what has been done: nothing here, see `nbbn.cpu.repeat.Recorder`."""
        return None

    def _take(self) -> Call:
        try:
            call = self._idle.pop()  # no other thread gets the same one
        except IndexError:
            call = Call(self.plan)
        if call.room is None:
            call.enter(room(self.plan.words))
        return call

    def _give_back(self, call: Call) -> None:
        if self.plan.words > OWN_WORDS:
            call.leave()
        self._idle.append(call)

    def _begin(self, extras: Extras) -> tuple[Call, int]:
        """Return the call to make, and how many values of a channel count in it."""
        if extras.marks is None:
            return self._take(), self.plan.count
        call: Call = extras.marks.kept
        return call, extras.marks.values

    def mark(self, mask: int, counting: bool = True) -> Marks:
        """Make the tables of a mask at an address, for one operation, and count if asked."""
        plan = self.plan
        call = self._take()
        call.set_mask(mask + plan.offset_mask)
        call(kernels.set_mask, plan.mask_tasks, plan.mask_threads)
        if not counting:
            return Marks(call, 0)
        call(kernels.add_up_counts, 1)
        return Marks(call, call.count)

    def _compile(self, *names: str) -> None:
        """Compile all that a call will run before any of it runs: what raises has changed nothing."""
        for name in names:
            entry(name, self.plan.stored)

    def stats(self, x: int, stats: int, extras: Extras = NOTHING) -> None:
        """Mean, var and (not used) invstd into float64[3, C] at `stats`."""
        self._take_stats(x, stats, extras, kernels.finish_stats)

    def _take_stats(self, x: int, stats: int, extras: Extras, last: str) -> None:
        self._compile(kernels.collect_stats, last)
        plan = self.plan
        call, count = self._begin(extras)
        call.set(
            x + plan.offset_x, 0, 0, 0, 0, stats, stats,
            *ABSENT, *ABSENT, *ABSENT, *ABSENT, 0.0, 0.0, 0.0, 0.0, count, 1, 0, 0, 0,
        )  # fmt: skip
        call(kernels.collect_stats, self._tiles)
        call(last, self._sets, self._finishers)
        self._give_back(call)

    def forward(
        self,
        x: int,
        out: int,
        stats: int,
        weight: Parameter,
        bias: Parameter,
        mean: Parameter,
        var: Parameter,
        eps: float,
        momentum: float,
        correction: float,
        then: tuple[Step, ...] = (),
        extras: Extras = NOTHING,
    ) -> None:
        """Training: normalize with x's own statistics, which go to float64[3, sets] at `stats`.

        Then update the running statistics, those that there are, and take further steps. All that is
        written for the caller is written in one: see nbbn.compiler.in_one.
        """
        plan = self.plan
        x += plan.offset_x
        out += plan.offset_out
        if self._merged is not None:
            self._compile(kernels.use_stats, self._normalizes_x[0])
            self._merged.take_stats(x, stats)
        second = extras.residual + plan.offset_second if self.form.residual else x
        updating = mean is not ABSENT or var is not ABSENT
        # One share alone updates the running statistics itself, after all else.
        update = entry(kernels.update_running_stats, plan.stored).address if updating and self._alone else 0
        call, count = self._begin(extras)
        channel_stats = stats if plan.shared == self.form.pool else call.channel_stats
        call.set(
            x, 0, out, second, 0, stats, channel_stats, *weight, *bias, *mean, *var,
            eps, momentum, correction, extras.slope, count, 1, 0, 0, update,
        )  # fmt: skip
        if updating and not update:
            then = (call.step(kernels.update_running_stats), *then)
        if self.form.along:
            self._compile(kernels.set_along, self._forward)
            self._set_along(call)
        if plan.resident:
            call(self._forward, plan.tasks, then=then)
        else:
            kernel, tasks = self._normalizes_x
            if self._merged is not None:
                call(kernels.use_stats, self._sets, self._finishers)
            else:
                self._compile(kernels.collect_stats, kernels.finish_stats, kernel)
                call(kernels.collect_stats, self._tiles)
                call(kernels.finish_stats, self._sets, self._finishers)
            call(kernel, tasks, then=then)
        self._give_back(call)

    def _set_along(self, call: Call) -> None:
        call(kernels.set_along, -(-self.plan.along_room // kernels.LINE))

    def evaluate(
        self,
        x: int,
        out: int,
        weight: Parameter,
        bias: Parameter,
        mean: Parameter,
        var: Parameter,
        eps: float,
        extras: Extras = NOTHING,
    ) -> None:
        """Evaluation: normalize with the running statistics."""
        if self._given is not None:
            self._given.evaluate(x, out, weight, bias, mean, var, eps, extras)
            return
        plan = self.plan
        kernel, tasks = self._normalizes_x
        self._compile(kernels.use_running_stats, kernel)
        call, _ = self._begin(extras)
        x += plan.offset_x
        out += plan.offset_out
        second = extras.residual + plan.offset_second if self.form.residual else x
        call.set(
            x, 0, out, second, 0, 0, 0, *weight, *bias, *mean, *var,
            eps, 0.0, 0.0, extras.slope, 0.0, 0, 0, 0, 0,
        )  # fmt: skip
        call(kernels.use_running_stats, self._sets, self._finishers)
        call(kernel, tasks)
        self._give_back(call)

    def backward(
        self,
        x: int,
        grad_out: int,
        grad_x: int,
        gradients: int,
        weight: Parameter,
        mean: Parameter,
        invstd: Parameter,
        training: bool,
        adds: int = 0,
        extras: Extras = NOTHING,
    ) -> None:
        """grad_x, and the gradients of weight and bias into float64[2, parameters] at `gradients`.

        With a residual, its gradient too. Of the first of several calls whose gradients are added up, `adds`
        is 1, and then 2: there are two rows more, for what the sums have lost.
        """
        if self._given is not None and not training:
            self._given.backward(x, grad_out, grad_x, gradients, weight, mean, invstd, training, adds, extras)
            return
        plan = self.plan
        columns = None
        if self._across is not None:
            columns = self._across._begin_columns(x, grad_out, gradients, mean, invstd, adds)
            if not plan.by_rows:  # they are not summed up along with the rows
                columns(kernels.backward_reduce, columns.plan.chunks * columns.plan.groups)
        x += plan.offset_x
        grad_out += plan.offset_grad_out
        grad_x += plan.offset_out
        second, residual = grad_out, 0
        if self.form.residual:
            second = extras.grad_residual + plan.offset_second
            residual = extras.residual + plan.offset_residual
        call, count = self._begin(extras)
        direct = self._plain and not adds
        call.set(
            x, grad_out, grad_x, second, residual,
            gradients, gradients if direct else call.channel_stats, *weight, *extras.bias, *mean, *invstd,
            0.0, 0.0, 0.0, extras.slope, count, training, adds, columns.at if columns else 0, 0,
        )  # fmt: skip
        if self.form.along:
            self._set_along(call)
        elif not direct:
            self._compile(kernels.sum_parameters)
        if plan.resident and training:
            call(self._backward, plan.tasks)
        else:
            self._compile(kernels.backward_reduce, kernels.finish_backward)
            scales = not (training or self.form.through)  # grad_x = scale · dy, and no more
            last, tasks = self._applies if training else self._applies_constant
            if scales:
                last, tasks = self._normalizes
            entry(last, plan.plain if scales else plan.stored)
            call(kernels.backward_reduce, self._tiles)
            call(kernels.finish_backward, self._sets, self._finishers)
            if scales:
                call.normalize_second()
                call(last, tasks, plain=True)
                call.normalize_x()
            else:
                call(last, tasks)
        if not (direct or self.form.along):
            call(kernels.sum_parameters, plan.parameters, 1)
        self._give_back(call)
        if self._across is not None and columns is not None:
            self._across._finish_columns(columns, adds, direct=not plan.by_rows)

    def _begin_columns(
        self, x: int, grad_out: int, gradients: int, mean: Parameter, invstd: Parameter, adds: int
    ) -> Call:
        """Return the call for the gradients of the parameters of each column of rows that are channels."""
        plan = self.plan
        self._compile(kernels.finish_across, kernels.sum_parameters)
        call = self._take()
        call.set(
            x + plan.offset_x, grad_out + plan.offset_grad_out, 0, 0, 0, gradients,
            call.channel_stats if adds else gradients, *ABSENT, *ABSENT, *mean, *invstd, 0.0, 0.0, 0.0, 0.0,
            plan.count, 1, adds, 0, 0,
        )  # fmt: skip
        return call

    def _finish_columns(self, call: Call, adds: int, direct: bool) -> None:
        """From the sums of chunks to these gradients; those of a single one may be in their place already."""
        plan = self.plan
        if plan.chunks > 1 or not direct:
            call(kernels.finish_across, -(-plan.channels // LANES), self._finishers)
        if adds:
            call(kernels.sum_parameters, plan.parameters, 1)
        self._give_back(call)


class _Sets(Run):
    """Takes the statistics of sets of channels that follow each other, as if each were one channel."""

    def __init__(self, problem: Problem, geometry: Geometry) -> None:
        pool, x = problem.form.pool, geometry.layouts[0]
        shape = geometry.channels // pool, pool * geometry.inner
        strides = ((pool * x.channel, x.inner),)
        super().__init__(problem._replace(shape=shape, axis=0, strides=strides, form=BATCH))

    def take_stats(self, x: int, stats: int) -> None:
        """Mean, var and the mean's low part into float64[3, sets] at `stats`."""
        self._take_stats(x, stats, NOTHING, kernels.pool_stats)
