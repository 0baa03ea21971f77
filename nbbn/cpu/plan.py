"""How a problem is cut up and scheduled: what the kernels are told of it, computed once per problem."""

import math
import pathlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from nbbn.cpu.call import PARTIALS, PLAN
from nbbn.cpu.parameters import FLOAT32_BYTES
from nbbn.cpu.results import TABLES
from nbbn.cpu.rows import APART, BY_CHANNELS, BY_ROWS, COLUMNS, ROWS, SHARED_COLUMNS, TOGETHER, columns_of
from nbbn.cpu.simd import ACROSS, ALONG, DOWN, LANES, Way, in_line_of, stored_as
from nbbn.dtypes import Storage
from nbbn.geometry import Geometry, Layout
from nbbn.problem import BATCH, Form

BLOCK_ELEMENTS = 128 * COLUMNS  # what is summed up before it is added to the rest
MAX_CHUNKS = 256
PARTIAL_WORDS = 60_000  # bounds the memory of the partial results to two thirds of a megabyte
SHORTEST_ROW = 512  # bytes: of a tile that is read at once
SHORTEST_COLUMNS = 128  # the same in columns, where that is all there is to choose
OWN_COLUMNS = 128  # a channel that is as long as this is summed by itself, into LANES sums
FEW_COLUMNS = 32  # and so is one that is as long as this, where it has few rows
MERGED_COLUMNS = 256  # channels of a set that are no longer have no sums of their own in a forward pass,
MERGED_CHANNELS = 256  # where there are as many,
MERGED_ELEMENTS = 1 << 22  # and of all of them so few: x is read twice
SHORT_VALUES = 128  # channels of no more values, and
SHORT_BYTES = 384  # of no more bytes, are looked at side by side, LANES at a time,
SHORT_CHANNELS = 128  # where there are as many
LEAST_VALUES, MOST_VALUES = 48, 768  # of what is one row, to be looked at twice in L1
# Of a row that saves more by it: a set of several channels, none longer than MERGED_COLUMNS; or where sums of
# columns are taken along with those of rows.
MOST_SAVING = 4096
# Of tasks that each leave sums of all columns behind: how many rows they have at least, and how many tasks
# may be where the sums take more memory than others do: in float32 a quarter of x at most.
TASK_ROWS, ROW_TASKS = 2 * LANES, 64
TURNED_ELEMENTS = ROWS * COLUMNS  # so many of them are copied to be so
SHARED_BYTES = 1 << 18  # a set of no more is summed up as one channel
FEW_VALUES = 4096  # of a channel: below, several channels are looked at before any of them is finished
SMALL_BYTES = 1 << 20  # what is no larger is not worth starting the threads for several times
TASKS = 4  # of every thread at least, where there is a choice
SERIAL_MASK = 1 << 20  # bytes of a mask and its table, which one thread makes as fast as several
SLAB_ROWS = 16  # written together
AHEAD = 4096  # bytes that are asked for before they are looked at


def _cache_bytes(level: int, otherwise: int) -> int:
    """Return the size of the cache of that level that a core sees, or a guess where the system is silent."""
    for index in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            if (
                int((index / "level").read_text()) == level
                and "Instruction" not in (index / "type").read_text()
            ):
                return int((index / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return otherwise


L2_BYTES = _cache_bytes(2, 1 << 20)
L3_BYTES = _cache_bytes(3, 8 << 20)
MESH_BYTES = 64 << 20  # an L3 of more is spread over a mesh, and not much faster to write to than memory is


def _stream_bytes(l3_share: int) -> int:
    """Return from which size on an output is written past the caches.

    On a mesh that takes 0.6 of the time from twice L2 on, 0.8 from L2 on. Where L3 is near, it pays from a
    part of L3 on.
    """
    return L2_BYTES if L3_BYTES > MESH_BYTES else L3_BYTES // l3_share


# The sooner the better where memory is read again or written meanwhile; `normalize_planes` alone may find
# both x and out in the cache.
STREAM_BYTES = _stream_bytes(4)
STREAM_PLANES_BYTES = _stream_bytes(2)


@dataclass(frozen=True)
class Tiling:
    """Rows, blocks and chunks, from the shape and the strides alone. See `nbbn.cpu.call`."""

    outer: int
    fold: int
    pieces: int
    width: int
    rows: int
    block: int
    chunk: int
    chunks: int


class Operands(NamedTuple):
    """The layouts of a problem's arrays; of those that it does not have, another's.

    Attributes
    ----------
    x, grad_out, out : Layout
        Of these; `out` also of grad_x.
    second : Layout
        Of what is read beside x as `out` is written: the residual, its gradient, or grad_out.
    residual : Layout
        Of what is added.
    mask : Layout
        In bytes, of the mask.
    backward : bool
        Whether this is a backward pass.
    """

    x: Layout
    grad_out: Layout
    out: Layout
    second: Layout
    residual: Layout
    mask: Layout
    backward: bool

    @staticmethod
    def of(layouts: tuple[Layout, ...], form: Form) -> "Operands":
        """Return them from the layouts of the arrays that there are, as `nbbn.problem.Problem` has them."""
        mask = layouts[-1]
        if form.masked:
            layouts = layouts[:-1]
        x, out, beside = layouts[0], layouts[-1], layouts[1:-1]
        if not form.residual:
            second = beside[0] if beside else x
            return Operands(x, second, out, second, x, mask, len(beside) == 1)
        if len(beside) == 1:
            return Operands(x, x, out, beside[0], x, mask, False)
        grad_out, residual, grad_residual = beside
        return Operands(x, grad_out, out, grad_residual, residual, mask, True)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """In the order in which the record of a call has them."""
        return self[:6]


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _joined(layout: Layout, geometry: Geometry, size: int) -> bool:
    """Whether the channels and inner elements of one outer step lie side by side."""
    inner = geometry.inner == 1 or layout.inner == size
    return inner and (geometry.channels == 1 or layout.channel == geometry.inner * size)


def _follow(geometry: Geometry, operands: "Operands", size: int) -> bool:
    """Whether channels follow each other in memory, in all arrays but the mask."""
    return all(_joined(layout, geometry, size) for layout in operands.layouts[:5])


def _alone(outer: int, inner: int) -> bool:
    """Whether channels of so many rows of this length are summed by themselves, into LANES sums each.

    Otherwise each column has a sum. That takes no vectors that are full in part; but the sums of a channel's
    columns are added up, and what it is written with is spread over them: as much, if rows are few, as the
    looks at them.
    """
    return inner >= OWN_COLUMNS or (inner >= FEW_COLUMNS and outer <= 1 << (inner - FEW_COLUMNS) // 8)


def is_row(geometry: Geometry, form: Form, size: int) -> bool:
    """Whether what has sums of its own is one short row, whose values lie side by side: see `nbbn.cpu.short`.

    That is a set; in a backward pass, a channel.
    """
    operands = Operands.of(geometry.layouts, form)
    pool = 1 if operands.backward else form.pool
    saves = (form.along and operands.backward) or (pool > 1 and geometry.inner <= MERGED_COLUMNS)
    most = MOST_SAVING if saves else MOST_VALUES
    return (
        geometry.steps == 1
        and geometry.inner > 1
        and LEAST_VALUES <= geometry.inner * pool <= most
        and not form.masked
        and all(layout.inner == size for layout in operands.layouts[:5])
        and (pool == 1 or _joined(operands.x, geometry, size))
    )


def is_short(geometry: Geometry, form: Form, size: int, arrays: int) -> bool:
    """Whether channels are so many and of so few values that they are better looked at LANES at a time.

    Rows then have an element of each of many channels, which are copied to where they lie side by side.
    """
    values = geometry.steps * geometry.inner
    return (
        geometry.inner > 1
        and values <= min(SHORT_VALUES, SHORT_BYTES // size)
        and values * _up(form.pool, LANES) <= TURNED_ELEMENTS
        and form.pool <= COLUMNS
        and geometry.channels >= SHORT_CHANNELS
        and form == form.alone
        and (arrays == 3 or (arrays == 2 and form.pool == 1))
        and not is_row(geometry, form, size)
        and geometry.layouts[0].inner == size
    )


def is_mixed(geometry: Geometry, form: Form, size: int) -> bool:
    """Whether x has its inner elements side by side, and another array its channels.

    All are then looked at as the other one is: x is copied, many channels at a time.
    """
    x, *others = geometry.layouts
    return (
        geometry.channels >= LANES
        and not form.along
        and x.inner == size
        and any(other.channel == size for other in others)
    )


def _piece(inner: int, size: int) -> int:
    """Return the length of the pieces that an inner dimension is cut into: equal, if that can be."""
    least = -(-inner // columns_of(size))
    line = in_line_of(size)
    for pieces in range(least, 2 * least):
        if inner % (pieces * line) == 0:
            return inner // pieces
    return _up(-(-inner // least), line)


def tile(geometry: Geometry, size: int, folds: bool = True) -> Tiling:
    """Cut a problem of elements of `size` bytes into blocks and chunks of rows, each of several steps."""
    channels, inner = geometry.channels, geometry.inner
    outer = geometry.steps
    fold, pieces, width, rows = 1, 1, inner, outer
    first = geometry.layouts[0]
    if inner > SHARED_COLUMNS:
        width = _piece(inner, size)
        pieces = -(-inner // width)
        rows = outer * pieces
    elif folds and len(geometry.sizes) == 1 and outer > 1 and channels * inner <= SHARED_COLUMNS // 2:
        side_by_side = _joined(first, geometry, size) and first.outer[0] == channels * inner * size
        if side_by_side or channels * inner < 4 * LANES:
            fold = min(outer, SHARED_COLUMNS // (channels * inner))
            whole = LANES // math.gcd(LANES, channels * inner)
            fold = fold // whole * whole or fold  # rows that begin where lines do, if the first one does
            rows = -(-outer // fold)
    columns = width if inner > SHARED_COLUMNS else min(SHARED_COLUMNS, fold * channels * inner)
    block = -(-BLOCK_ELEMENTS // columns)
    limit = max(1, min(MAX_CHUNKS, PARTIAL_WORDS // (3 * channels)))
    chunk = _up(-(-rows // limit), block)
    return Tiling(outer, fold, pieces, width, rows, block, chunk, -(-rows // chunk))


def way_for(form: Form, across: bool = False, down: bool = False) -> Way:
    """Return what kernels are compiled for, for a form."""
    parameters = ACROSS if across else (DOWN if down else ALONG) if form.along else ""
    return Way(parameters, form.activation, form.residual, form.masked)


class Plan:
    """A problem, cut and scheduled: the plan part of every call record, and what runs in which order.

    Parameters
    ----------
    geometry : Geometry
        Of the arrays, as `nbbn.problem.Problem` has them.
    storage : Storage
        Of the arrays' elements.
    threads : int
        How many threads may work on it. Changes the schedule, never the result.
    form : Form
        What is normalized together.
    across : bool
        Whether this is about the gradients of parameters that go along rows: of columns, the channels here.
    turned : bool
        Whether the geometry has been turned: see `is_short`.
    chunk : int
        How many rows a chunk has; 0: as many as are best.
    """

    def __init__(
        self,
        geometry: Geometry,
        storage: Storage,
        threads: int,
        form: Form = BATCH,
        across: bool = False,
        turned: bool = False,
        chunk: int = 0,
    ) -> None:
        way = way_for(form, across, turned)
        self.stored = stored_as(storage.name, way)
        self.plain = stored_as(storage.name, way.alone)
        self.elements = stored_as(storage.name)
        self.threads = threads
        self.channels = geometry.channels
        self.sets = self.channels // form.pool
        self.parameters = form.period or self.channels
        self._geometry, self._form, self._across, self._turned = geometry, form, across, turned
        self._size = storage.dtype.itemsize
        self._operands = Operands.of(geometry.layouts, form)
        self.backward = self._operands.backward
        self._tiling = tiling = tile(geometry, self._size, not (across or turned))
        if chunk:
            self._tiling = tiling = replace(tiling, chunk=chunk, chunks=-(-tiling.rows // chunk))
        self._single = tiling.fold == 1 and (self.channels == 1 or _alone(tiling.outer, geometry.inner))
        self.outer, self.rows, self.chunks = tiling.outer, tiling.rows, tiling.chunks
        self.count = tiling.outer * geometry.inner
        self.planes = tiling.outer * self.channels
        offsets = (layout.offset for layout in self._operands.layouts)
        self.offset_x, self.offset_grad_out, self.offset_out, *more = offsets
        self.offset_second, self.offset_residual, self.offset_mask = more
        values = self._tasks() | self._rooms() | self._orders()
        # The record holds addresses in this: kept alive with the plan.
        self._strides = np.array([geometry.sizes, *(a.outer for a in self._operands.layouts)], np.int64)
        self.record = self._record(values)

    def _tasks(self) -> dict[str, int]:
        """Decide what is a task, and whether a task's channels stay in cache until they are written."""
        geometry, tiling, form, size = self._geometry, self._tiling, self._form, self._size
        backward = self.backward
        self.by_rows = not (self._turned or self._across) and is_row(geometry, form, size)
        # x, and in a backward pass grad_out; a residual is read along with them, in one pass or the other.
        element = size * (1 + backward + form.residual)
        group, self.resident = self._schedule(element)
        # Weights and biases that fill half of L2 are read once for many rows, not once for each.
        beside = 2 * max(size, FLOAT32_BYTES) * geometry.inner
        if form.along and not backward and beside >= L2_BYTES // 2:
            self.resident = False
        follow = _follow(geometry, self._operands, size)
        if self.resident and follow:
            group = max(group, self._several(element))
        # Whether a set is summed up as one channel, and only what is written goes by channel; other bits.
        shares = (
            form.pool > 1
            and not backward
            and self._single
            and tiling.rows == 1
            and form.pool * LANES <= SHARED_COLUMNS
            and size * self.count * form.pool <= SHARED_BYTES
            and follow
        )
        self.shared = form.pool if shares else 1
        tiles, together = 1, 0
        if self.by_rows:
            group, tiles, together = self._of_rows(follow)
            self.shared, self.resident = 1 if backward else form.pool, True
        elif shares or self._turned:
            group = max(group // form.pool, 1) * form.pool
            self.resident = self._turned or self.threads == 1 or self.sets >= self.threads
        elif form.pool > 1:
            group, tiles, self.resident = self._pooled(group, element * self.count * form.pool)
        elif group == 1 and self.resident:
            tiles = self._together(element * self.count)
        # Whether a set's statistics are taken as those of one channel, ahead of all else; other bits.
        self.merges = (
            form.pool > 1
            and not (backward or self.by_rows)
            and self.channels >= MERGED_CHANNELS
            and 1 < geometry.inner <= MERGED_COLUMNS
            and tiling.outer == 1
            and _joined(self._operands.x, geometry, size)
            and self.count * self.channels <= MERGED_ELEMENTS
        )
        self.resident = self.resident and not self.merges
        self.group = group
        self.groups = -(-self.channels // group)
        self.of_task = group * tiles
        self.tasks = -(-self.groups // tiles)
        slab = self._slab()
        self.slabs = -(-tiling.rows // slab)
        return {
            "shared": self.shared,
            "group": group,
            "groups": self.groups,
            "tiles": tiles,
            "together": together,
            "slab": slab,
            "runs": self.by_rows and follow and not (form.along or backward),
        }

    def _rooms(self) -> dict[str, int]:
        """Lay out the memory that a call works in, in words of eight bytes: see `nbbn.cpu.call.ROOMS`."""
        geometry, tiling, form = self._geometry, self._tiling, self._form
        self.partial_words = PARTIALS * self.channels * tiling.chunks
        room = (self.channels // LANES + 2) * LANES  # of a table: whole lines, a vector more to read beyond
        self.words = self.partial_words + TABLES * (room + (room // 2 if self._size < 4 else 0)) + LANES
        # Beside that, what forms other than batch normalization need.
        self.along_at = self.words
        self.along_room = 0
        if form.along:
            together = 1 if self._single else self.group
            columns = tiling.pieces * tiling.width if together == 1 else together * geometry.inner
            if self._turned:
                columns = tiling.rows  # a weight for each
            self.along_room = _up(columns, LANES) + 2 * LANES  # they begin again behind a channel
            self.words += 2 * self.along_room + LANES
        self.bits_at = self.words
        columns = geometry.inner * (1 if tiling.pieces > 1 else tiling.fold * self.group)
        bits_pitch = -(-columns // 32) * 4 + 16  # eight bytes are written at a time, and zeros behind
        steps_of_one = geometry.inner == 1 and tiling.fold > 1
        if steps_of_one and columns % 8 == 0:
            bits_pitch = columns // 8  # one row's follow the other's, so that many are written as one
        bit_rows = tiling.rows // tiling.pieces
        self.mask_tasks = -(-tiling.rows // tiling.block) if steps_of_one else bit_rows
        self.mask_threads = 1 if self.count + bits_pitch * bit_rows < SERIAL_MASK else self.threads
        if form.masked:
            self.words += -(-bits_pitch * bit_rows // 8) + 1  # more are read at the end
        self.counts_at = self.words
        if form.masked:
            self.words += tiling.rows + 1
        self.channel_stats_at = self.words
        if self._across or form.alone != BATCH:
            self.words += 3 * self.channels
        return {"room": room, "along_room": self.along_room, "bits_pitch": bits_pitch}

    def _orders(self) -> dict[str, int]:
        """Decide in which orders the result may be written, and whether past the caches."""
        geometry, form, size, threads = self._geometry, self._form, self._size, self.threads
        x, second, out = self._operands.x, self._operands.second, self._operands.out
        joined = all(_joined(a, geometry, size) for a in (x, second, out))
        # Whether it is gone over in the order of memory, see kernels.normalize_planes.
        self.by_planes = (
            geometry.inner > 1 and not form.along and (threads == 1 or self.planes >= 8 * threads) and joined
        )
        row = self.channels * size
        once = self.channels * (LANES // math.gcd(LANES, self.channels))
        period = once * max(1, SHARED_COLUMNS // once)  # to begin again seldom
        # Or as one run, see kernels.normalize_columns.
        self.by_columns = (
            geometry.inner == 1
            and not (form.along or self._across)
            and len(geometry.sizes) == 1
            and (period <= COLUMNS or period == self.channels)
            and (threads == 1 or self.outer >= 8 * threads)
            and joined
            and all(a.outer[0] == row for a in (x, second, out))
        )
        out_bytes = size * self.count * self.channels
        return {
            "once": once,
            "period": period,
            "stream": out_bytes >= STREAM_BYTES,
            "stream_planes": out_bytes >= STREAM_PLANES_BYTES,
        }

    def _record(self, values: dict[str, Any]) -> bytes:
        """Return the plan part of a record, of these values and all others."""
        geometry, tiling, form = self._geometry, self._tiling, self._form
        dims, at = len(geometry.sizes), self._strides.ctypes.data
        self.copies = self._turned
        for k, (name, layout) in enumerate(
            zip(Operands._fields, self._operands.layouts, strict=False), start=1
        ):
            gather = self._gather(layout)
            self.copies |= gather != TOGETHER and name != "mask"
            values[f"at_{name}"] = layout.channel, layout.inner, at + 8 * dims * k, gather
        ahead = self._ahead()
        values |= vars(tiling) | {
            "one": 1.0,
            "dims": dims,
            "sizes": at,
            "channels": self.channels,
            "inner": geometry.inner,
            "pool": form.pool,
            "parameters": self.parameters,
            "centered": form.centered,
            "activates": form.through,
            "bits_mask": 0 if geometry.inner == 1 and tiling.fold == 1 else -1,
            "single": self._single,
            "ahead": ahead,
            "ahead_of_dy": ahead,
        }
        record = np.zeros((), PLAN)
        assert record.dtype.names is not None and values.keys() == set(record.dtype.names)
        for name, value in values.items():
            record[name] = value
        return record.tobytes()

    def _gather(self, layout: Layout) -> int:
        """Return how the columns of a row lie in an array: see `nbbn.cpu.rows.TOGETHER`."""
        geometry, tiling, size = self._geometry, self._tiling, self._size
        joined = _joined(layout, geometry, size) or (
            self.group == 1 and tiling.fold == 1 and (geometry.inner == 1 or layout.inner == size)
        )
        if tiling.fold > 1:
            joined = joined and layout.outer[0] == self.channels * geometry.inner * size
        if joined:
            return TOGETHER
        if tiling.fold == 1 and tiling.pieces == 1 and geometry.sizes[-1] > 1 and layout.outer[-1] == size:
            return BY_ROWS
        return BY_CHANNELS if geometry.inner > 1 and layout.channel == size else APART

    def _schedule(self, element: int) -> tuple[int, bool]:
        """Return how many channels a tile is wide, and whether a group stays in cache.

        All that is read and written with an element of x are `element` bytes.
        """
        geometry, tiling, size = self._geometry, self._tiling, self._size
        channels = geometry.channels
        if tiling.fold > 1:
            return channels, self.threads == 1
        slice_bytes = element * tiling.outer * geometry.inner
        if self._turned:
            shared = -(-channels // max(1, TASKS * self.threads))
            fits = min(COLUMNS, TURNED_ELEMENTS // tiling.outer, shared)
            return min(channels, max(LANES, fits // LANES * LANES)), True
        columns = COLUMNS if geometry.inner == 1 else SHARED_COLUMNS
        widest = max(1, columns // geometry.inner)
        # Tiles as wide as whole cache lines, where that can be: streaming stores need them.
        line = in_line_of(size)
        whole = line // math.gcd(line, geometry.inner)
        if whole * geometry.inner <= (columns_of(size) if self._single else COLUMNS):
            widest = max(whole, widest // whole * whole)
        if self.threads == 1:
            return min(widest, channels), True
        if geometry.inner == 1 and slice_bytes * channels > SMALL_BYTES:
            # Whole rows, read twice in the order of memory, take two thirds of the time of parts of them.
            groups = -(-TASKS * self.threads // tiling.chunks)
            return min(channels, widest, max(SHORTEST_COLUMNS, _up(-(-channels // groups), LANES))), False
        # Enough groups for every thread to have two, where the channels suffice and all is not in L2 anyway.
        each = 1 if slice_bytes * channels <= L2_BYTES // 2 * self.threads else 2
        shared = max(1, min(widest, channels // (each * self.threads)))
        cached = min(shared, L2_BYTES // 2 // slice_bytes)
        cached = cached // whole * whole or cached
        if widest == 1 and 2 * slice_bytes * self.threads <= L3_BYTES * 3 // 4:
            cached = 1  # read from memory once all the same: it is found in L3 when it is written
        # Rows shorter than this are read at a fraction of the memory's speed. (Larger groups do not
        # stay in L3 either: a power of two of channels puts their rows into a few of its sets.)
        shortest = -(-SHORTEST_ROW // (geometry.inner * element))
        if cached >= min(shortest, channels) and -(-channels // cached) >= self.threads:
            return cached, True
        return min(widest, channels), False

    def _pooled(self, group: int, nbytes: int) -> tuple[int, int, bool]:
        """Return the same for sets of channels, of so many bytes; and how many tiles a set has."""
        pool = self._form.pool
        if group >= pool:
            return group // pool * pool, 1, self.resident
        tiles = next(tiles for tiles in range(-(-pool // group), pool + 1) if pool % tiles == 0)
        fits = nbytes <= L2_BYTES // 2 or 2 * nbytes * self.threads <= L3_BYTES * 3 // 4
        return pool // tiles, tiles, self.threads == 1 or (fits and self.sets >= self.threads)

    def _of_rows(self, follow: bool) -> tuple[int, int, int]:
        """Return how many channels a tile has, and how many tiles a task, where sets are rows.

        And the sums of how many channels are taken before any is written: of LANES sets, or of fewer.
        """
        pool, inner = self._form.pool, self._geometry.inner
        sets = -(-LANES // pool) if self.backward else LANES
        while sets > 1 and self.sets < sets * self.threads:
            sets //= 2
        together = sets * pool
        fits = COLUMNS // (LANES if self._single else inner) if follow else 1
        tiles = next(n for n in range(1, together + 1) if together % n == 0 and together // n <= fits)
        group = together // tiles
        if self._form.along and self.backward:
            # Each task leaves sums of all columns: where it ends may not depend on the number of threads.
            most = max(ROW_TASKS, min(MAX_CHUNKS, PARTIAL_WORDS // (3 * inner)))
            tiles = _up(-(-self.channels // most), TASK_ROWS) // group
        return group, tiles, together

    def _several(self, element: int) -> int:
        """Return how many long channels make a tile, where they are of few values each; or 0.

        What is done for a tile, in as many lanes as there are, takes as long as to look at 500 columns.
        """
        geometry, tiling, form, size = self._geometry, self._tiling, self._form, self._size
        if not self._single or geometry.inner == 1 or self.count > FEW_VALUES or form.masked:
            return 0
        # One piece is added up at a time then: with two as one, the sums would be other ones.
        if tiling.pieces > 1 and 2 * tiling.width <= COLUMNS:
            return 0
        line = in_line_of(size)
        group = _up(max(LANES, line // math.gcd(line, geometry.inner)), form.pool)
        return group if group * LANES <= SHARED_COLUMNS and self._few(group, element * self.count) else 0

    def _together(self, slice_bytes: int) -> int:
        """Return how many short channels are finished together, in as many lanes as there are."""
        return LANES if self._few(LANES, slice_bytes) else 1

    def _few(self, number: int, slice_bytes: int) -> bool:
        """Whether so many channels of so many bytes stay in L2, and leave tasks for all threads."""
        return number * slice_bytes <= L2_BYTES // 4 and self.channels >= TASKS * number * self.threads

    def _ahead(self) -> int:
        """Return how far ahead memory is asked for; from row to row where rows are short and far apart."""
        geometry, x = self._geometry, self._operands.x
        if self._tiling.pieces > 1 and self.group > 1:
            return x.channel  # the next channel's piece
        row = self.group * geometry.inner * self._size
        if geometry.inner == 1 and self.group < self.channels and len(geometry.sizes) == 1:
            return x.outer[0] * -(-AHEAD // 2 // row)
        return AHEAD

    def _slab(self) -> int:
        """Return how many rows are written together."""
        tiling = self._tiling
        if self.group == 1 and tiling.fold == 1:
            return min(SLAB_ROWS, tiling.pieces)  # in the order of memory
        # A group's tables are made once for a slab.
        share = tiling.rows // (8 * self.threads)
        return max(SLAB_ROWS, share) if self._geometry.inner == 1 else SLAB_ROWS
