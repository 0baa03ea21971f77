"""Where the rows of a tile lie, and how their columns are read and written."""

import numpy as np
from numba.core import types
from numba.extending import intrinsic

from nbbn.compiler import loop, out_of_line, variant
from nbbn.cpu.simd import (
    LANES,
    TURNED,
    after,
    load,
    load_first,
    on_stack,
    plain,
    pointer,
    pointer_like,
    size_of,
    splat,
    store,
    turn_in,
    turn_out,
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


def _copy(name, turn, move):
    """Return what copies between an array, where columns do not lie together, and a buffer, where they do."""

    @variant(name)
    def copy(at, across, along, columns, number, buffer, apart):
        """Copy `number` rows of `columns` columns.

        In the array they are `along` and `across` bytes apart; in the buffer the rows are, `apart` elements.
        """
        out_of_line()
        if along == size_of(buffer) and number > 1 and columns >= LANES:
            for j in range(0, columns, LANES):
                j = min(j, columns - LANES)  # the last ones a second time
                for k in range(0, number, TURNED):
                    here = min(TURNED, number - k)
                    turn(at + j * across + k * along, across, here, after(buffer, k * apart + j), apart)
            return
        for k in range(number):
            move(at + k * along, across, columns, after(buffer, k * apart))

    return copy


@loop
def move_in(at, across, columns, buffer):
    """Copy `columns` elements, `across` bytes apart, to a buffer."""
    for j in range(columns):
        buffer[j] = pointer_like(buffer, at + j * across)[0]


@loop
def move_out(at, across, columns, buffer):
    """Copy them back."""
    for j in range(columns):
        pointer_like(buffer, at + j * across)[0] = buffer[j]


def _each_row(name, copy):
    """Return a loop that copies rows of a tile between an array and a buffer; and one where that needs be."""

    @variant(name)
    def copy_rows(call, base, operand, row, number, channel, group, buffer, apart):
        """Copy `number` rows, from this one on, which are `apart` elements apart in the buffer.

        Elements that lie side by side are copied at once: those of several rows, or of several channels.
        """
        out_of_line()
        outer = pointer(operand.strides, np.int64)[call.dims - 1]
        steps_of_last = pointer(call.sizes, np.int64)[call.dims - 1]
        k = 0
        while k < number:
            step, piece = locate(call, row + k)
            steps, count = extent(call, step, piece)
            at = row_address(call, base, operand, step, piece, channel)
            together = 1
            if operand.gather == BY_ROWS:
                together = min(number - k, steps_of_last - step % steps_of_last)
            for f in range(steps):
                here = after(buffer, k * apart + f * group * count)
                if count == 1:
                    copy(at + f * outer, operand.channel, outer, group, together, here, apart)
                elif operand.gather == BY_CHANNELS:
                    copy(at + f * outer, operand.inner, operand.channel, count, group, here, count)
                else:
                    for g in range(group):
                        there = at + f * outer + g * operand.channel
                        copy(there, operand.inner, outer, count, together, after(here, g * count), apart)
            k += together

    @variant(name)
    def copy_apart(call, base, operand, row, number, channel, group, buffer, apart):
        """The same, but for rows whose columns lie together: they are read, or written, where they are."""
        if operand.gather != TOGETHER:
            copy_rows(call, base, operand, row, number, channel, group, buffer, apart)

    return copy_rows, copy_apart


gather_rows, gather_apart = _each_row("gather", _copy("in", turn_in, move_in))
scatter_rows, scatter_apart = _each_row("scatter", _copy("out", turn_out, move_out))


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
