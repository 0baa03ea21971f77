"""Where the rows of a tile lie, and how their columns are read and written."""

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from nbbn.compiler import invoke, loop, out_of_line
from nbbn.cpu.call import COPY, copy_at
from nbbn.cpu.simd import (
    LANES,
    address,
    after,
    load,
    load_first,
    on_stack,
    plain,
    pointer,
    scratch,
    splat,
    store,
)

COLUMNS = 1024  # a row is at most this long, of each channel where several long ones share it;
HALF_COLUMNS = 2 * COLUMNS  # the same of elements of 16 bits;
ROWS = 16  # of all operands, that are read at a time at most;
AT_ONCE = ROWS // 2  # of those where each column has sums of its own, which are looked at together
SHARED_COLUMNS = 512  # where several shorter ones do: their sums must stay in L1
ROOM = HALF_COLUMNS + LANES  # for a number of each column; vectors may be stored whole at its end
# How the columns of a row lie in an array: side by side; each for itself; or, of columns that are each for
# themselves, those of several rows side by side, or those of several channels.
TOGETHER, APART, BY_ROWS, BY_CHANNELS = 0, 1, 2, 4
AHEAD = 2048  # bytes: how far ahead of what is written its memory is asked for
COPY_WORDS = COPY.itemsize // 8


def columns_of(size):
    """Return how long a row is at most, of elements of `size` bytes."""
    return HALF_COLUMNS if size < 4 else COLUMNS


@intrinsic(prefer_literal=True)
def row_buffers(typingctx, number, stored):
    """Return a pointer to room on the stack for `number` (a literal) rows, each `row_room` from the next."""
    if not isinstance(number, types.IntegerLiteral):
        return None
    kind = types.CPointer(stored.dtype)

    def codegen(context, builder, signature, args):
        return on_stack(context, builder, number.literal_value * _row_room(kind), kind)

    return kind(number, stored), codegen


def _row_room(pointer):
    return columns_of(pointer.dtype.bitwidth // 8) + LANES


@intrinsic
def row_room(typingctx, pointer):
    """Return how many elements a buffer for a row has; vectors may be stored whole at its end."""
    number = _row_room(pointer)
    return types.int64(pointer), lambda context, builder, signature, args: context.get_constant(
        types.int64, number
    )


@loop
def locate(call, row):
    """Return the outer step and the piece of a row; rows are in the order of memory."""
    if call.pieces == 1:
        return row * call.fold, 0
    return row // call.pieces, row % call.pieces


@loop
def position(call, row):
    """Return how many values of a channel come before `row`."""
    out_of_line()
    if call.pieces == 1:
        return min(call.outer, row * call.fold) * call.inner
    return row // call.pieces * call.inner + row % call.pieces * call.width


@loop
def extent(call, step, piece):
    """Return how many outer steps make a row, and how many elements of a channel each has."""
    if call.pieces == 1:
        return min(call.fold, call.outer - step), call.inner
    return 1, min(call.width, call.inner - piece * call.width)


@loop
def alike(call, row):
    """Return how many rows from this one on are as wide as it is."""
    if call.pieces == 1:
        return max(1, call.outer // call.fold - row)
    if call.pieces * call.width == call.inner:
        return call.rows - row
    return max(1, call.pieces - 1 - row % call.pieces)


@loop
def row_address(call, base, operand, step, piece, channel):
    """Return the address of the first element of a row in a tile that begins at `channel`."""
    at = base + channel * operand.channel + piece * call.width * operand.inner
    if call.dims == 1:
        return at + step * pointer(operand.strides, np.int64)[0]
    return step_address(call, at, operand, step)


@loop
def step_address(call, at, operand, step):
    """Return the address `step` steps after `at`, over several outer dimensions."""
    out_of_line()
    strides = pointer(operand.strides, np.int64)
    sizes = pointer(call.sizes, np.int64)
    for d in range(call.dims - 1, -1, -1):
        at += step % sizes[d] * strides[d]
        step //= sizes[d]
    return at


@loop
def copy_rows(kernel, call, base, operand, row, number, channel, group, buffer, apart):
    """Have a kernel (`nbbn.cpu.copies`) copy `number` rows of a tile, from this one on.

    In the buffer they are `apart` elements apart, and their columns lie together.
    """
    out_of_line()
    job = copy_at(address(scratch(COPY_WORDS, np.int64)))
    job.call, job.operand = address(call), address(operand)
    job.base, job.channel, job.group = base, channel, group
    job.buffer, job.apart = address(buffer), apart
    invoke(kernel, row, row + number, address(job))


@loop
def gather_apart(call, base, operand, row, number, channel, group, buffer, apart):
    """Copy rows to a buffer, but for those whose columns lie together: they are read where they are."""
    if operand.gather != TOGETHER:
        copy_rows(call.gather, call, base, operand, row, number, channel, group, buffer, apart)


@loop
def scatter_apart(call, base, operand, row, number, channel, group, buffer, apart):
    """Copy them back, but for those that have been written where they are."""
    if operand.gather != TOGETHER:
        copy_rows(call.scatter, call, base, operand, row, number, channel, group, buffer, apart)


@loop
def row_in(call, base, operand, step, piece, channel, buffer, stored):
    """Return a pointer to a row's columns: to `buffer`, where they do not lie together and were copied to."""
    if operand.gather == TOGETHER:
        return pointer(row_address(call, base, operand, step, piece, channel), stored)
    return buffer


@loop
def row_of(call, base, operand, step, piece, channel, group, buffer, stored):
    """Return the same of a row that is copied to `buffer` now."""
    row = step // call.fold if call.pieces == 1 else step * call.pieces + piece
    gather_apart(call, base, operand, row, plain(1), channel, group, buffer, plain(0))
    return row_in(call, base, operand, step, piece, channel, buffer, stored)


@loop
def some(p, j, count):
    """Return the vector at column j, with zeros from column `count` on."""
    if j + LANES <= count:
        return load(p, j)
    return load_first(p, j, count - j)


@loop
def up(count):
    """Return `count`, rounded up to whole vectors."""
    return -(-count // LANES) * LANES


@loop
def fill(p, count, value):
    """Set p[0 : count], and up to LANES - 1 elements more."""
    out_of_line()
    vector = splat(value)
    for j in range(0, count, LANES):
        store(p, j, vector)


@loop
def to_columns(call, group, width, values, columns):
    """columns[column] = values[its channel]; return the buffer that holds them."""
    out_of_line()
    if width == 1 and call.fold == 1:
        return values
    for f in range(call.fold):
        if width == 1:
            for g in range(0, group, LANES):
                store(columns, f * group + g, load(values, g))
        elif width == LANES:
            for g in range(group):
                store(columns, (f * group + g) * LANES, splat(values[g]))
        else:
            for g in range(group):
                fill(after(columns, (f * group + g) * width), width, values[g])
    return columns
