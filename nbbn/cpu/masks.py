"""Which columns of a row count: a table with a bit for each, and how many values come before a row.

Each part here is nothing, in kernels that are compiled without (`nbbn.cpu.simd.Way`). What goes for one
channel goes for all, so tiles share the bits: those of the columns of the first one. The pieces of a step
have theirs one after the other; where all columns of a row are of one position, it has LANES times the same.
"""

import numpy as np
from numba.core import types

from nbbn.compiler import by_type, like, loop, out_of_line
from nbbn.cpu.parameters import WEIGHTS, beside
from nbbn.cpu.rows import ROWS, extent, locate, position, row_address
from nbbn.cpu.simd import (
    LANES,
    choose,
    nonzero,
    nonzero_of_long,
    ones,
    pointer,
    set_long,
    set_longs,
    set_word,
    way_of,
    wide,
    word,
)

AT_BITS = 4 * ROWS  # where, among the addresses of rows, those of their bits are
WORD_BITS = 32
LONG_BITS = 64
SPREAD_CHANNELS = 7  # eight times as many are bits of a number that is not negative


@loop
def bits_at(call, row):
    """Return where the bits of a row begin; pieces end with whole bytes, but for the last."""
    if call.pieces == 1:
        return call.bits + row * call.bits_pitch
    return call.bits + row // call.pieces * call.bits_pitch + (row % call.pieces * call.width >> 3)


@loop
def follow(call):
    """Whether the bits of a row of steps of one position follow at once on those of the row before."""
    return call.bits_pitch * 8 == call.fold * call.channels


def row_bits(call, row, stored):
    """Return where the bits of a row are, what an index is masked with, and the first index; or nothing."""
    raise NotImplementedError("exists in compiled code only")


@by_type(row_bits)
def _row_bits(call, row, stored):
    if way_of(stored).masked:
        return lambda call, row, stored: (bits_at(call, row), call.bits_mask, 0)
    return lambda call, row, stored: ()


def note_bits(call, rows, k, row, stored):
    """Note where the bits of row k of those that are read at once are."""
    raise NotImplementedError("exists in compiled code only")


@by_type(note_bits)
def _note_bits(call, rows, k, row, stored):
    def note(call, rows, k, row, stored):
        rows[AT_BITS + k] = row_bits(call, row, stored)[0]

    def nothing(call, rows, k, row, stored):
        pass

    return note if way_of(stored).masked else nothing


def noted_bits(rows, k, bits_mask, stored):
    """Return the same of row k as `row_bits`."""
    raise NotImplementedError("exists in compiled code only")


@by_type(noted_bits)
def _noted_bits(rows, k, bits_mask, stored):
    if way_of(stored).masked:
        return lambda rows, k, bits_mask, stored: (rows[AT_BITS + k], bits_mask, 0)
    return lambda rows, k, bits_mask, stored: ()


def run_from(call, step, stored):
    """Return which row a run that begins with an outer step begins in, and after how many steps of it."""
    raise NotImplementedError("exists in compiled code only")


@by_type(run_from)
def _run_from(call, step, stored):
    if way_of(stored).masked:
        return lambda call, step, stored: (step // call.fold, step % call.fold)
    return lambda call, step, stored: (0, 0)


def step_bits(call, step, stored):
    """Return the same as `row_bits` of an outer step, which may be one of several in a row."""
    raise NotImplementedError("exists in compiled code only")


@by_type(step_bits)
def _step_bits(call, step, stored):
    def of_step(call, step, stored):
        number, into = run_from(call, step, stored)
        at, bits_mask, _ = row_bits(call, number * call.pieces, stored)
        return at, bits_mask, -(into * call.channels * call.inner)

    return of_step if way_of(stored).masked else (lambda call, step, stored: ())


def run_end(call, start, last, stored):
    """Return up to which step, `last` at most, the bits go on: to the end of the row that begins at `start`.

    But all the way where nothing has any, or where those of the next row follow at once.
    """
    raise NotImplementedError("exists in compiled code only")


@by_type(run_end)
def _run_end(call, start, last, stored):
    def of_rows(call, start, last, stored):
        return last if follow(call) else min(last, start + call.fold)

    return of_rows if way_of(stored).masked else (lambda call, start, last, stored: last)


@loop
def none_counts(bits, columns):
    """Whether a row of so many columns has bits of which none is set; never where one of theirs is."""
    at, bits_mask, _ = bits
    for i in range((columns - 1 & bits_mask) // WORD_BITS + 1):
        if word(at + i * (WORD_BITS // 8)) != 0:
            return False
    return True


def repeated_after(row, columns):
    """Return what the results of a row are computed from where its bits begin so many columns later."""
    raise NotImplementedError("exists in compiled code only")


@by_type(repeated_after)
def _repeated_after(row, columns):
    def later(row, columns):
        at, bits_mask, first = row[4]
        return row[:4] + ((at, bits_mask, first + columns),) + row[WEIGHTS:]

    return later if len(row[4]) > 0 else (lambda row, columns: row)


def lanes(bits, j):
    """Return a bit for each of the columns j …, of a row whose bits are these; or nothing."""
    raise NotImplementedError("exists in compiled code only")


@by_type(lanes)
def _lanes(bits, j):
    def of_row(bits, j):
        at, bits_mask, first = bits
        i = (j - first) & bits_mask
        return (word(at + (i >> 3)) >> (i & 7)) & ((1 << LANES) - 1)

    return of_row if len(bits) > 0 else (lambda bits, j: ())


def only(bits, vector, otherwise):
    """Return a vector with the lanes of another where the bit is not set."""
    raise NotImplementedError("exists in compiled code only")


@by_type(only)
def _only(bits, vector, otherwise):
    if isinstance(bits, types.BaseTuple):
        return lambda bits, vector, otherwise: vector
    return lambda bits, vector, otherwise: choose(bits, vector, otherwise)


@loop
def counting(bits, vector):
    """Return a vector with zeros where the bit is not set."""
    return only(bits, vector, like(vector, 0.0))


def both(bits, more):
    """Return `more` bits, without those that `bits` leaves out."""
    raise NotImplementedError("exists in compiled code only")


@by_type(both)
def _both(bits, more):
    if isinstance(bits, types.BaseTuple):
        return lambda bits, more: more
    return lambda bits, more: bits & more


def values_before(call, row, stored):
    """Return how many values of a channel that count come before a row; it begins a block, or is the end."""
    raise NotImplementedError("exists in compiled code only")


@by_type(values_before)
def _values_before(call, row, stored):
    if way_of(stored).masked:
        return lambda call, row, stored: pointer(call.counts, np.int64)[row]
    return lambda call, row, stored: position(call, row)


@loop
def operands(call, second, x, bits, row, stored):
    """Return what the results of a row are computed from.

    That is what is read beside x, x, the type that it is stored as, the slope of an activation, the row's
    bits and, from WEIGHTS on, the weights and the biases of its columns, where each has its own.
    """
    return (second, x, stored, wide(stored)(call.slope), bits) + beside(call, row, stored)


# --- the tables ------------------------------------------------------------------------------------


@loop
def append(state, bits, number):
    """Append so many bits, WORD_BITS at most, to what is written; return where, the rest, and its length."""
    at, left, filled = state
    left |= bits << filled
    filled += number
    if filled >= WORD_BITS:
        set_word(at, left)
        return at + WORD_BITS // 8, left >> WORD_BITS, filled - WORD_BITS
    return at, left, filled


@loop
def all_ones(at):
    """Return -1 if a byte is not 0, and otherwise 0; without a branch, which nothing could foretell."""
    return -np.int64(pointer(at, np.uint8)[0]) >> 63


@loop
def some_bits(at, stride, number):
    """Return a bit for each of so many bytes, WORD_BITS at most."""
    if stride == 1 and number == WORD_BITS:
        return nonzero(at) | nonzero(at + LANES) << LANES
    bits = 0
    for k in range(number):
        bits |= (all_ones(at + k * stride) & 1) << k
    return bits


@loop
def append_run(state, at, stride, count):
    """Append a bit for each of `count` bytes; return the state, and how many of them are set."""
    total = i = 0
    to, left, filled = state
    while stride == 1 and filled == 0 and i + LONG_BITS <= count:  # most of what there is
        bits = nonzero_of_long(at + i)
        total += ones(bits)
        set_long(to, bits)
        to += LONG_BITS // 8
        i += LONG_BITS
    state = to, left, filled
    while i < count:
        number = min(WORD_BITS, count - i)
        bits = some_bits(at + i * stride, stride, number)
        total += ones(bits)
        state = append(state, bits, number)
        i += number
    return state, total


@loop
def spread_bits(channels, spread):
    """Set for each byte its bits, each of them `channels` times."""
    spread[0] = 0
    for byte in range(1, 256):
        spread[byte] = (spread[byte >> 1] << channels) | ((byte & 1) * ((1 << channels) - 1))


@loop
def set_before(end, to, bits):
    """Write 64 bits to an address, but nothing to `end` or behind it: there are the bits of other rows."""
    if to + 8 <= end:
        set_long(to, bits)
    else:
        set_few_bytes(to, end - to, bits)


@loop
def set_few_bytes(to, number, bits):
    out_of_line()
    for k in range(number):
        pointer(to + k, np.uint8)[0] = np.uint8(bits >> 8 * k & 255)


@loop
def set_few(to, end, at, stride, steps, channels, spread):
    """Set a bit for each of so many bytes, as many times as there are channels, SPREAD_CHANNELS at most.

    Eight of them make a byte for each channel. Return how many of them are not 0.
    """
    total = f = 0
    while stride == 1 and f + LONG_BITS <= steps and to + 7 * channels + 8 <= end:
        bits = nonzero_of_long(at + f)
        for k in range(8):
            set_long(to + k * channels, spread[bits >> 8 * k & 255])
        total += ones(bits)
        to += 8 * channels
        f += LONG_BITS
    while f < steps:
        bits = some_bits(at + f * stride, stride, min(8, steps - f))
        set_before(end, to, spread[bits])
        total += ones(bits)
        to += channels
        f += 8
    return total


@loop
def set_bytes(to, end, at, stride, steps, channels):
    """The same where the bits of a step are whole bytes."""
    size = channels >> 3
    total = f = 0
    while stride == 1 and size == 8 and f + LANES <= steps:
        bits = nonzero(at + f)
        set_longs(to + 8 * f, bits)
        total += ones(bits)
        f += LANES
    # More is written at a time than a step has, but for the last ones: of whole long words, or many.
    at_once = 8 if size < 8 else 8 * LANES
    until = steps - (at_once - 1) // size - 1
    while f < until:
        bits = all_ones(at + f * stride)
        if size < 8:
            set_long(to + f * size, bits)
        else:
            for i in range(0, size, 8 * LANES):
                set_longs(to + f * size + i, bits)
        total -= bits
        f += 1
    while f < steps:
        bits = all_ones(at + f * stride)
        for i in range(0, size, 8):
            set_before(end, to + f * size + i, bits)
        total -= bits
        f += 1
    return total


@loop
def set_many(to, end, at, stride, steps, channels):
    """The same of any number of channels."""
    out_of_line()
    state = to, 0, 0
    total = 0
    for f in range(steps):
        bits = all_ones(at + f * stride)
        total -= bits
        for i in range(0, channels, WORD_BITS):
            number = min(WORD_BITS, channels - i)
            state = append(state, bits & ((1 << number) - 1), number)
    set_before(end, state[0], state[1])
    return total


@loop
def set_bits_of_steps(call, first, last, spread):
    """Set the bits of the rows first … last - 1, each of several steps of one position.

    How many count is known of all of them, with the last one: nobody asks for less than a block.
    """
    stride = pointer(call.at_mask.strides, np.int64)[0]
    begin = call.mask + first * call.fold * stride
    # As one row where the bits of one follow those of the other.
    together = last - first if follow(call) else 1
    total = 0
    for row in range(first, last, together):
        at = begin + (row - first) * call.fold * stride
        steps = min(together * call.fold, call.outer - row * call.fold)
        to = bits_at(call, row)
        end = to + together * call.bits_pitch
        if call.channels <= SPREAD_CHANNELS:
            total += set_few(to, end, at, stride, steps, call.channels, spread)
        elif call.channels % 8 == 0:
            total += set_bytes(to, end, at, stride, steps, call.channels)
        else:
            total += set_many(to, end, at, stride, steps, call.channels)
    counts = pointer(call.counts, np.int64)
    for row in range(first, last):
        counts[row + 1] = 0
    counts[last] = total


@loop
def set_bit_of_step(call, row):
    """Set the bits of a row of one position, LANES times the same, and whether it counts."""
    step, _ = locate(call, row)
    bits = all_ones(row_address(call, call.mask, call.at_mask, step, 0, 0))
    set_long(bits_at(call, row), bits)
    pointer(call.counts, np.int64)[row + 1] = -bits


@loop
def set_bits(call, task):
    """Set the bits of a row of longer steps, or of all pieces of a step, and how many of each count.

    The latter goes where how many come before the next row will be.
    """
    counts = pointer(call.counts, np.int64)
    state = call.bits + task * call.bits_pitch, 0, 0
    stride = call.at_mask.inner
    if call.pieces > 1:
        for piece in range(call.pieces):
            at = row_address(call, call.mask, call.at_mask, task, piece, 0)
            _, count = extent(call, task, piece)
            state, total = append_run(state, at, stride, count)
            counts[task * call.pieces + piece + 1] = total
    else:
        step, piece = locate(call, task)
        steps, count = extent(call, step, piece)
        at = row_address(call, call.mask, call.at_mask, step, piece, 0)
        outer = pointer(call.at_mask.strides, np.int64)[call.dims - 1]
        total = 0
        for f in range(steps):
            here = 0
            for _ in range(call.group):
                state, here = append_run(state, at + f * outer, stride, count)
            total += here
        counts[task + 1] = total
    set_long(state[0], state[1])
