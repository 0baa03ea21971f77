"""The loops over the rows and columns of a tile.

Sums run downwards, a column at a time, so a row needs no particular length or alignment; the columns
of a channel are added up at the end of a block. Rows of one long channel are read one after the other;
where each column has sums of its own, eight are read together, from eight far-apart places.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba.core import types

from nbbn.compiler import by_type, fma, in_line, like, loop, out_of_line, variant
from nbbn.cpu.fused import (
    activated,
    activated_aside,
    incoming,
    joined,
    keep_residual,
    normalizing,
    note_residual,
    passed,
    precisely_joined,
    shift_beside,
    with_residual,
)
from nbbn.cpu.masks import advanced, both, lanes, note_bits, noted_bits, only, operands, row_bits
from nbbn.cpu.parameters import (
    FLOAT32_BYTES,
    NOTED,
    ROWS,
    deviation,
    finished,
    note_beside,
    precisely_finished,
    precisely_scaled,
    scaled,
    weighted,
)
from nbbn.cpu.rows import (
    AHEAD,
    COLUMNS,
    ROOM,
    extent,
    fill,
    locate,
    row_address,
    row_of,
    scatter,
    some,
    to_columns,
)
from nbbn.cpu.simd import (
    LANES,
    STREAM_BYTES,
    Half,
    address,
    after,
    ask_to_write,
    below,
    choose,
    fold,
    keep_first,
    line_of,
    load,
    lowest,
    number,
    plain,
    pointer,
    prefetch,
    rarely,
    scratch,
    set_number,
    size_of,
    splat,
    store,
    store_both,
    store_first,
    stream,
    stream_both,
    wide,
    widen,
)
from nbbn.formulas import (
    add_squared_deviation,
    gradient,
    gradient_doubt,
    normalized,
    normalized_doubt,
    squared_deviation,
    two_sum,
)

SHARED_COLUMNS = (
    512  # a row is at most this long, where several channels share it: their sums must stay in L1
)
TABLES = 6  # what a column of grad_x is computed with at most; of out, three of them

AT_ONCE = ROWS // 2  # rows that are looked at together, or twice as many, where each column has its own sums
SPAN = 16 * LANES  # columns whose squares are summed up in x's type before they are added to the rest


class Look(NamedTuple):
    """What columns of x are looked at with, and where their sums are.

    Attributes
    ----------
    guesses : real[columns]
        At the means.
    sums, squares : pair of float64[columns]
        Of x and of (x - guess)², and what they lost.
    one : float64
        1.0, which the compiler does not know: see `plus`.
    ahead : int
        How many bytes ahead memory is asked for.
    bits_mask : int
        What the index of a column is masked with for that of its bit.
    """

    guesses: Any
    sums: Any
    squares: Any
    one: Any
    ahead: Any
    bits_mask: Any


class LookAtBoth(NamedTuple):
    """What columns of dy and x are looked at with, and where their sums are.

    Attributes
    ----------
    means : float64[columns]
        Of x.
    sums, products : pair of float64[columns]
        Of dy and of dy · (x - mean), and what they lost.
    one, ahead, bits_mask
        As in `Look`.
    before : real[3, ROOM]
        What the columns were normalized with, where dy goes through an activation.
    slope : real
        Of that.
    numbers : float64[ROWS]
        What rows have of their own, see `nbbn.cpu.parameters.deviation`.
    """

    means: Any
    sums: Any
    products: Any
    one: Any
    ahead: Any
    bits_mask: Any
    before: Any
    slope: Any
    numbers: Any


class Lines(NamedTuple):
    """Some of the whole lines of a row of another tile.

    Attributes
    ----------
    out : pointer
        The row that they are of.
    end : int
        The column after the last one.
    read, numbers
        What the results are computed from, and what with, where all are of one channel.
    place
        The channels, see `precise_normalized`.
    streaming : bool
        Whether they are written past the caches.
    """

    out: Any
    end: Any
    read: Any
    numbers: Any
    place: Any
    streaming: Any


class Work(NamedTuple):
    """What is written meanwhile: lines of some rows of another tile.

    Attributes
    ----------
    call, tile
        That of which they are, see `tile_of`.
    rows : int64[ROWS]
        Which ones.
    outs, xs, seconds : int64[ROWS]
        The addresses of their columns, in each array.
    begins, ends : int64[ROWS]
        The column that the first whole line begins at, and that after the last one.
    written : int64[ROWS]
        Up to where, from there on, they have been written.
    """

    call: Any
    tile: Any
    rows: Any
    outs: Any
    xs: Any
    seconds: Any
    begins: Any
    ends: Any
    written: Any


def exact(real):
    """Whether sums of `real` in float64 must be compensated to be good to their last bit."""
    raise NotImplementedError("exists in compiled code only")


@by_type(exact)
def _exact(real):
    # A float64 holds the sum of 2²⁹ float32 of like size without rounding.
    compensate = real.dtype == types.float64
    return (lambda real: True) if compensate else (lambda real: False)


# --- sums over rows, a column at a time ------------------------------------------------------------


@loop
def plus(total, lost, x, one, real):
    """Return total + x, and what the sums lost; of float32, nothing that a few rows can lose.

    `one` is 1.0, which the compiler does not know: an fma runs on other ports than the conversions do.
    """
    if exact(real):
        total, more = two_sum(total, widen(x))
        return total, lost + more
    return fma(widen(x), one, total), lost


@loop
def load_sums(sums, j, both):
    """Return a sum of each of the columns j … and, if there is `both`, what it lost."""
    return load(sums[0], j), load(sums[1], j) if both else splat(0.0)


@loop
def store_sums(sums, j, total, both):
    store(sums[0], j, total[0])
    if both:
        store(sums[1], j, total[1])


@loop
def add_to(total, x, rest):
    """Return total + x + rest, with what the sums lost."""
    high, more = two_sum(total[0], x)
    return high, total[1] + (more + rest)


@loop
def add_up(total, x, rest, real):
    """The same where float32 needs no compensation: sums whose tolerance is that of x's type."""
    if exact(real):
        return add_to(total, x, rest)
    return total[0] + x, total[1]


@loop
def plus_sum(total, lost, other, others, real):
    """Return the sum of two sums; of float32, nothing that a few rows can lose."""
    if exact(real):
        total, more = two_sum(total, other)
        return total, lost + (others + more)
    return total + other, lost


@loop
def look_at(x, bits, guess, total, rest, square, one, real):
    """Return the sums with those of x and of (x - guess)² added that count."""
    total, rest = plus(total, rest, only(bits, x, like(x, 0.0)), one, real)
    return total, rest, add_squared_deviation(square, only(bits, x, guess), guess)


@loop
def look_at_two(row, its, j, guess, then, sums, state, real):
    """Look at two vectors of a row, from column j on, which have guesses and sums of their own."""
    in_line()
    total, rest, square, other, others, more = sums
    prefetch(row, j, state.ahead)
    if size_of(row) > 2:  # of 16 bits both are in one line
        prefetch(row, j + LANES, state.ahead)
    x, bits = load(row, j), lanes(its, j)
    total, rest, square = look_at(x, bits, guess, total, rest, square, state.one, real)
    x, bits = load(row, j + LANES), lanes(its, j + LANES)
    other, others, more = look_at(x, bits, then, other, others, more, state.one, real)
    return total, rest, square, other, others, more


@loop
def look_at_channel(rows, number, first, last, state, base, work, stored):
    """Look at `number` rows of one channel, one after the other, with one vector of sums, at `base`."""
    sums, squares, real = state.sums, state.squares, wide(stored)
    both, always = plain(exact(real)), plain(True)
    guess, none = load(state.guesses, base), splat(real(0.0))
    total, rest, other, others = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    sum_x, sum_squares = load_sums(sums, base, always), load_sums(squares, base, both)
    summed = 0  # columns
    for k in range(number):
        if summed + (last - first) > COLUMNS:
            total, rest = plus_sum(total, rest, other, others, real)
            sum_x = add_to(sum_x, total, rest)
            total, rest, other, others = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
            summed = 0
        summed += last - first
        row, its = pointer(rows[k], stored), noted_bits(rows, k, state.bits_mask, stored)
        lines = normalized_lines(work, rows, k, last, stored)
        at = work.written[k]
        j = first
        while j < last:
            end = min(last, j + SPAN)
            found = total, rest, none, other, others, none
            while j + 2 * LANES <= end:
                found = look_at_two(row, its, j, guess, guess, found, state, real)
                at = write_normalized_lines(work, lines, at, at + 2 * LANES, stored)
                j += 2 * LANES
            total, rest, square, other, others, more = found
            while j < end:
                prefetch(row, j, state.ahead)
                before = square
                x, bits = some(row, j, end), lanes(its, j)
                total, rest, square = look_at(x, bits, guess, total, rest, square, state.one, real)
                if j + LANES > end:
                    square = choose((1 << (end - j)) - 1, square, before)
                j += LANES
            sum_squares = add_up(sum_squares, widen(square + more), splat(0.0), real)
        work.written[k] = write_normalized_lines(work, lines, at, lines.end, stored)
    total, rest = plus_sum(total, rest, other, others, real)
    store_sums(sums, base, add_to(sum_x, total, rest), always)
    store_sums(squares, base, sum_squares, both)


@loop
def add_columns(state, c, total, rest, square, real):
    """Add sums of a few rows to those of the columns c …."""
    both, always = plain(exact(real)), plain(True)
    store_sums(state.sums, c, add_to(load_sums(state.sums, c, always), total, rest), always)
    squares = add_up(load_sums(state.squares, c, both), widen(square), splat(0.0), real)
    store_sums(state.squares, c, squares, both)


@loop
def look_at_columns(rows, number, j, last, state, base, stored):
    """Look at the next columns of `number` rows, from column j on, each with sums of its own at base + j.

    x is added up in float64, and (x - guess)², of the rows in x's type first. Return the column after them.
    """
    in_line()
    real = wide(stored)
    c, zero, none = base + j, splat(0.0), splat(real(0.0))
    guess = load(state.guesses, c)
    if number % AT_ONCE == 0 and j + 2 * LANES <= last:
        then, found = load(state.guesses, c + LANES), (zero, zero, none, zero, zero, none)
        for first in range(0, number, AT_ONCE):
            for i in range(AT_ONCE):
                k = first + i
                row, its = pointer(rows[k], stored), noted_bits(rows, k, state.bits_mask, stored)
                found = look_at_two(row, its, j, guess, then, found, state, real)
        total, rest, square, other, others, more = found
        add_columns(state, c, total, rest, square, real)
        add_columns(state, c + LANES, other, others, more, real)
        return j + 2 * LANES
    total, rest, square = zero, zero, none
    for k in range(number):
        row, its = pointer(rows[k], stored), noted_bits(rows, k, state.bits_mask, stored)
        prefetch(row, j, state.ahead)
        x, bits = some(row, j, last), lanes(its, j)
        total, rest, square = look_at(x, bits, guess, total, rest, square, state.one, real)
    if j + LANES > last:
        square = keep_first(square, last - j)
    add_columns(state, c, total, rest, square, real)
    return min(last, j + LANES)


@loop
def square_row(row, bits, first, last, state, base, mask):
    """Add up (x - mean)², in float64, of the columns first … last - 1."""
    means, squares = state
    for j in range(first, last, LANES):
        c = base + ((j - first) & mask)
        mean = load(means, c)
        x = only(lanes(bits, j), widen(some(row, j, last)), mean)
        square = squared_deviation(x, mean)
        if j + LANES > last:
            square = keep_first(square, last - j)
        always = plain(True)
        store_sums(squares, c, add_to(load_sums(squares, c, always), square, splat(0.0)), always)


@loop
def apart(call, first, last, wanted):
    """Return how far apart the rows lie that are read together, `wanted` at a time.

    Rows that follow each other in memory would be `wanted` short streams. So the rows are read from
    that many places of the block at once; what is left over, and a last row that is not full, is read
    in the order of memory.
    """
    full = last if call.pieces > 1 else min(last, call.outer // call.fold)
    return max(0, full - first) // wanted


@loop
def square_down(call, first, last, channel, group, buffer, state, mask, stored):
    """Add up the squares of the rows first … last - 1 of a tile."""
    for row in range(first, last):
        step, piece = locate(call, row)
        steps, count = extent(call, step, piece)
        x = row_of(call, call.x, call.at_x, step, piece, channel, group, buffer, stored)
        together = 1 if call.single == 1 else group  # channels
        width = steps * count
        for g in range(0, group, together):
            bits = row_bits(call, row, stored)
            square_row(x, bits, g * width, (g + together) * width, state, g * LANES, mask)


@loop
def plus_product(total, lost, a, b, real):
    """Return total + a · b in float64, and what the sums lost."""
    if exact(real):
        product = a * b
        total, more = two_sum(total, product)
        return total, lost + (more + fma(a, b, -product))
    return fma(a, b, total), lost


@loop
def multiply(dy, off, total, rest, product, product_rest, one, real):
    """Return the sums with dy and dy · off added, off being x - mean."""
    total, rest = plus(total, rest, dy, one, real)
    product, product_rest = plus_product(product, product_rest, widen(dy), off, real)
    return total, rest, product, product_rest


@loop
def counting(bits, vector):
    """Return a vector with zeros where the bit is not set."""
    return only(bits, vector, like(vector, 0.0))


@loop
def multiply_at(rows, k, j, last, whole, mean, those, here, state, stored):
    """Add dy and dy · (x - mean) of the columns j … of row k, of dy and x in turn, to sums.

    They are a `whole` vector, or what there is before column `last`.
    """
    in_line()
    row = pointer(rows[2 * k], stored), pointer(rows[2 * k + 1], stored)
    bits = lanes(noted_bits(rows, 2 * k, state.bits_mask, stored), j)
    prefetch(row[0], j, state.ahead)
    prefetch(row[1], j, state.ahead)
    if whole:
        dy, x = counting(bits, load(row[0], j)), counting(bits, load(row[1], j))
    else:
        dy, x = counting(bits, some(row[0], j, last)), counting(bits, some(row[1], j, last))
    dy = incoming(rows, 2 * k, j, last, dy, x, bits, those, state.slope, stored)
    dy = weighted(rows, 2 * k, j, dy, stored)
    off = deviation(x, mean, state.numbers, 2 * k, stored)
    if not whole:
        off = keep_first(off, last - j)  # dy is 0 beyond, but a mean may be infinite
    total, rest, product, product_rest = here
    return multiply(dy, off, total, rest, product, product_rest, state.one, wide(stored))


@loop
def multiply_channel(rows, number, first, last, state, base, work, stored):
    """The same of `number` rows of one channel, one after the other, with one vector of sums, at `base`."""
    sums, products, real = state.sums, state.products, wide(stored)
    both, whole = plain(exact(real)), plain(True)
    mean, those = load(state.means, base), normalizing(state.before, base, stored)
    here = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    for k in range(number):
        lines = gradient_lines(work, rows, k, last, stored)
        at = work.written[k]
        j = first
        while j + 2 * LANES <= last:
            here = multiply_at(rows, k, j, last, whole, mean, those, here, state, stored)
            here = multiply_at(rows, k, j + LANES, last, whole, mean, those, here, state, stored)
            at = write_gradient_lines(work, lines, at, at + 2 * LANES, stored)
            j += 2 * LANES
        while j < last:
            here = multiply_at(rows, k, j, last, not whole, mean, those, here, state, stored)
            j += LANES
        work.written[k] = write_gradient_lines(work, lines, at, lines.end, stored)
    total, rest, product, product_rest = here
    sum_dy, sum_products = load_sums(sums, base, both), load_sums(products, base, both)
    store_sums(sums, base, add_up(sum_dy, total, rest, real), both)
    store_sums(products, base, add_up(sum_products, product, product_rest, real), both)


@loop
def multiply_columns(rows, number, j, last, state, base, stored):
    """Add up dy and dy · (x - mean) of the next columns of `number` rows of dy and x in turn, from j on.

    That is the dy before what follows the normalization. The sums of column j are at base + j, in float64.
    Return the column after them.
    """
    in_line()
    sums, products, real = state.sums, state.products, wide(stored)
    both, whole = plain(exact(real)), plain(True)
    here = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    c = base + j
    mean, those = load(state.means, c), normalizing(state.before, c, stored)
    if number == AT_ONCE and j + LANES <= last:
        for k in range(AT_ONCE):
            here = multiply_at(rows, k, j, last, whole, mean, those, here, state, stored)
    else:
        for k in range(number):
            here = multiply_at(rows, k, j, last, not whole, mean, those, here, state, stored)
    total, rest, product, product_rest = here
    store_sums(sums, c, add_up(load_sums(sums, c, both), total, rest, real), both)
    more = add_up(load_sums(products, c, both), product, product_rest, real)
    store_sums(products, c, more, both)
    return min(last, j + LANES)


# --- between columns and channels ------------------------------------------------------------------


@loop
def to_channels(call, group, width, sums, lost, real):
    """Add up each channel's columns, in place: sums[channel] + lost[channel]."""
    out_of_line()
    if width == 1 and call.fold == 1:
        return
    if width == 1:
        for g in range(0, group, LANES):
            total = load(sums, g)
            rest = load(lost, g)
            for f in range(1, call.fold):
                total, more = two_sum(total, load(sums, f * group + g))
                rest = rest + (load(lost, f * group + g) + more)
            store(sums, g, total)
            store(lost, g, rest)
        return
    for g in range(group):
        total = splat(0.0)
        rest = splat(0.0)
        for f in range(call.fold):
            first = (f * group + g) * width
            for j in range(first, first + width, LANES):
                x = some(sums, j, first + width)
                rest = rest + some(lost, j, first + width)
                if exact(real):
                    total, more = two_sum(total, x)
                    rest = rest + more
                else:
                    total = total + x
        high, small = fold(total)
        low, _ = fold(rest)
        sums[g] = high
        lost[g] = low + small


# --- writing ---------------------------------------------------------------------------------------


@loop
def tile_of(call, channel, group, number, spread, real):
    """Return a tile that is ready to be written.

    That is its first channel, how many it has, and the tables of what its columns are written with:
    their address, how far apart they lie, and what a column's index is masked with. They are spread
    over the columns, into `spread`; where all columns are of one channel, over LANES of them.
    """
    tables = after(pointer(call.tables, real), channel)
    room = call.room
    width = min(call.width, call.inner)
    if width == 1 and call.fold == 1:
        return channel, group, tables, room, -1
    single = group == 1 and call.fold == 1
    for k in range(number):
        to = after(spread, k * ROOM)
        if single:
            fill(to, plain(LANES), tables[k * room])
        else:
            to_columns(call, group, width, after(tables, k * room), to)
    return channel, group, spread, ROOM, 0 if single else -1


@loop
def tables_of_constant(row, tables, c, room):
    """What the columns c … were normalized with: mean, scale and shift."""
    return load(tables, c), load(tables, c + room), load(tables, c + 2 * room)


@loop
def tables_of_x(row, tables, c, room):
    """What the columns c … are normalized with: mean, scale, shift, and what results are in doubt below."""
    mean, scale, shift = tables_of_constant(row, tables, c, room)
    return mean, scale, shift, normalized_doubt(shift)


@loop
def normalized_columns(row, j, end, numbers):
    """The normalized columns j … of a row of x, which has `end`, and what they are in doubt below."""
    mean, scale, shift, doubt = numbers
    value = normalized(some(row[1], j, end), mean, scale, shift)
    value, doubt = finished(row, j, value, doubt)
    return joined(row, j, end, value, doubt)


@loop
def tables_of_gradient(row, tables, c, room):
    """What the columns c … of grad_x are computed with: mean, scale, slope, offset and unit.

    And, where it is computed through an activation, the shift that x was normalized with.
    """
    mean, scale, slope = tables_of_constant(row, tables, c, room)
    offset, unit = load(tables, c + 3 * room), load(tables, c + 4 * room)
    return (mean, scale, slope, offset, unit) + shift_beside(row, tables, c + 5 * room)


@loop
def gradient_columns(row, j, end, numbers):
    """The columns j … of grad_x, and what they are in doubt below."""
    mean, scale, slope, offset, unit = numbers[:5]
    x = some(row[1], j, end)
    dy, scale = passed(row, some(row[0], j, end), x, numbers), scaled(row, j, scale)
    grad_x = gradient(dy, x, mean, unit, scale, slope, offset)
    return grad_x, gradient_doubt(x, mean, unit, slope, offset)


@loop
def constant_columns(row, j, end, numbers):
    """The columns j … of grad_x through an activation where the statistics are constants; never in doubt."""
    dy = passed(row, some(row[0], j, end), some(row[1], j, end), numbers)
    return dy * numbers[1], like(dy, 0.0)


@loop
def precise_tables(call):
    """Return the tables in float64 that results of 16 bits are computed with where they are in doubt."""
    return pointer(call.tables + TABLES * call.room * FLOAT32_BYTES, np.float64)


def set_precise_tables(call, c, here, what, known, stored):
    """Set them for channel c, where elements are of 16 bits."""
    raise NotImplementedError("exists in compiled code only")


@by_type(set_precise_tables)
def _set_precise_tables(call, c, here, what, known, stored):
    if not isinstance(stored.dtype, Half):
        return lambda call, c, here, what, known, stored: None

    def set_them(call, c, here, what, known, stored):
        in_line()
        what(call, precise_tables(call), c, here, known, np.float64)

    return set_them


@loop
def precise_normalized(call, place, row, j, doubtful, out):
    """Return `out`, the normalized columns j … of a row of x, with those in doubt computed in float64."""
    out_of_line()
    tables, room = precise_tables(call), call.room
    channel, group, width = place
    results = scratch(LANES, np.float32)
    store(results, 0, out)
    while doubtful != 0:
        k = lowest(doubtful)
        doubtful &= doubtful - 1
        c = channel + (j + k) // width % group
        x = np.float64(number(row[1], j + k))
        result = normalized(x, tables[c], tables[c + room], tables[c + 2 * room])
        result = precisely_joined(row, j + k, precisely_finished(call, row, j + k, result))
        set_number(results, k, activated_aside(row, result))
    return load(results, 0)


@loop
def precise_gradient(call, place, row, j, doubtful, grad_x):
    """Return `grad_x`, the columns j … of a row of it, with those in doubt computed in float64."""
    out_of_line()
    tables, room = precise_tables(call), call.room
    channel, group, width = place
    results = scratch(LANES, np.float32)
    store(results, 0, grad_x)
    while doubtful != 0:
        k = lowest(doubtful)
        doubtful &= doubtful - 1
        c = channel + (j + k) // width % group
        dy, x = np.float64(number(row[0], j + k)), np.float64(number(row[1], j + k))
        mean, scale, slope = tables[c], tables[c + room], tables[c + 2 * room]
        offset, unit = tables[c + 3 * room], tables[c + 4 * room]
        dy = passed(row, dy, x, (mean, scale, tables[c + 5 * room]))
        scale = precisely_scaled(call, row, j + k, scale)
        set_number(results, k, gradient(dy, x, mean, unit, scale, slope, offset))
    return load(results, 0)


@loop
def concluded(row, value):
    """Return a gradient, which nothing follows."""
    return value


def _results(columns, precisely, followed, aside):
    """Return what has the columns j … of a row, and what writes a line of them.

    That is what `columns` computes, and what it is `followed` by in lines, which are most of what there is,
    and `aside` elsewhere. Results to be stored in 16 bits are computed again by `precisely` where they are in
    doubt: lane by lane, as which columns make a vector must not show.
    """

    def result_at(call, place, row, j, end, numbers):
        raise NotImplementedError("exists in compiled code only")

    @by_type(result_at)
    def _result_at(call, place, row, j, end, numbers):
        def sure(call, place, row, j, end, numbers):
            return counting(lanes(row[4], j), aside(row, columns(row, j, end, numbers)[0]))

        def refined(call, place, row, j, end, numbers):
            value, doubt = columns(row, j, end, numbers)
            bits = lanes(row[4], j)
            doubtful = both(bits, below(math.fabs(value), doubt))
            result = counting(bits, aside(row, value))
            if rarely(doubtful != 0):
                inside = (1 << min(LANES, end - j)) - 1
                return precisely(call, place, row, j, doubtful & inside, result)
            return result

        return refined if isinstance(row[0].dtype, Half) else sure

    def write_line(call, place, out, row, j, numbers, then, streaming):
        raise NotImplementedError("exists in compiled code only")

    @by_type(write_line)
    def _write_line(call, place, out, row, j, numbers, then, streaming):
        def one(call, place, out, row, j, numbers, then, streaming):
            result = counting(lanes(row[4], j), followed(row, columns(row, j, j + LANES, numbers)[0]))
            if streaming:
                stream(out, j, result)
            else:
                store(out, j, result)

        def two(call, place, out, row, j, numbers, then, streaming):
            k = j + LANES
            first, doubt = columns(row, j, k, numbers)
            second, more_doubt = columns(row, k, k + LANES, then)
            bits, more_bits = lanes(row[4], j), lanes(row[4], k)
            doubtful = both(bits, below(math.fabs(first), doubt))
            more = both(more_bits, below(math.fabs(second), more_doubt))
            first = counting(bits, followed(row, first))
            second = counting(more_bits, followed(row, second))
            if rarely(doubtful | more != 0):
                first = precisely(call, place, row, j, doubtful, first)
                second = precisely(call, place, row, k, more, second)
            if streaming:
                stream_both(out, j, first, second)
            else:
                store_both(out, j, first, second)

        return two if isinstance(out.dtype, Half) else one

    return result_at, write_line


@loop
def line_from(out, j):
    """Return the first column from j on that begins a line of memory."""
    return j + -(address(out) + j * size_of(out)) % STREAM_BYTES // size_of(out)


@loop
def whole_lines(out, count, goes_on, streaming):
    """Return where the first and after the last line of a row of `count` columns that can be written whole.

    Where it is not streamed, a line may begin anywhere. Where the row goes on in the next one, the last line
    is the one that both have a part of.
    """
    line = line_of(out)
    begin = 0
    if streaming:
        if address(out) % size_of(out) != 0:
            return 0, 0
        begin = min(line_from(out, plain(0)), count)
        if goes_on:
            return begin, begin - (begin - count) // line * line
    return begin, begin + (count - begin) // line * line


@loop
def ask_for_x(row, j):
    """Ask for what lies ahead of column j of what the results of a row are computed from."""
    prefetch(row[1], j, AHEAD)


@loop
def ask_for_both(row, j):
    """The same of x and of what is read beside it."""
    prefetch(row[0], j, AHEAD)
    prefetch(row[1], j, AHEAD)


def _write_part(name, ask, numbers_at, value, write_line):
    """Return a loop that writes a part of a row with what value(…, row, column, end, numbers) returns."""

    @variant(name)
    def write_part(call, out, row, first, last, count, streaming, tile):
        """Write the columns first … last - 1 of `count`.

        Where lines are streamed, both ends are moved on to where the next line begins. The numbers stay
        in registers for as long as the columns are those of one channel.
        """
        channel, group, tables, room, mask = tile
        place = channel, group, min(call.width, call.inner)
        j = first
        end = min(last, count)
        c = j & mask
        numbers = numbers_at(row, tables, c, room)
        line = line_of(out)
        streaming = streaming and address(out) % size_of(out) == 0
        if streaming:
            j = min(line_from(out, first), count)
            for k in range(0, j if first == 0 else 0, LANES):
                here = min(LANES, j - k)
                beginning = value(call, place, row, k, k + here, numbers_at(row, tables, k & mask, room))
                store_first(out, k, beginning, here)
            if last < count:
                end = min(line_from(out, last), count)
        if mask == 0:
            while j + line <= end:
                ask(row, j)
                write_line(call, place, out, row, j, numbers, numbers, streaming)
                j += line
        while j < end:
            ask(row, j)
            if c != j & mask:
                c = j & mask
                numbers = numbers_at(row, tables, c, room)
            if j + line <= end:
                then = numbers_at(row, tables, c + LANES, room)
                write_line(call, place, out, row, j, numbers, then, streaming)
                j += line
                continue
            if j + LANES > end:
                store_first(out, j, value(call, place, row, j, end, numbers), end - j)
            else:
                store(out, j, value(call, place, row, j, j + LANES, numbers))
            j += LANES

    return write_part


@loop
def operands_of(work, rows, reads, k, stored):
    """Return what the results of a row are computed from; `rows` has the same rows of the tile looked at."""
    bits = noted_bits(rows, reads * k, work.call.bits_mask, stored)
    x, second = pointer(work.xs[k], stored), pointer(work.seconds[k], stored)
    return operands(work.call, second, x, bits, work.rows[k], stored)


def _write_lines(name, reads, numbers_at, write_line):
    """Return what has whole lines of a row, and what writes them: the work of who looks at another tile.

    A few lines are written after a few that are looked at, so that the memory is read and written at once,
    as a copy does.
    """

    @variant(name)
    def lines_of(work, rows, k, last, stored):
        """Return the lines that begin before column `last` of a row, counted from its first line."""
        in_line()
        call, out, begin = work.call, pointer(work.outs[k], stored), work.begins[k]
        channel, group, tables, room, _ = work.tile
        line = line_of(out)
        end = min(work.ends[k], begin + -(-last // line) * line)
        read = operands_of(work, rows, reads, k, stored)
        numbers = numbers_at(read, tables, plain(0), room)
        place = channel, group, min(call.width, call.inner)
        return Lines(out, end, read, numbers, place, call.stream == 1)

    @variant(name)
    def write_lines(work, lines, j, end, stored):
        """Write those from column j on that begin before column `end`; return where the next one begins."""
        in_line()
        _, _, tables, room, mask = work.tile
        end = min(end, lines.end)
        while j < end:
            numbers, then = lines.numbers, lines.numbers
            if mask != 0:
                numbers = numbers_at(lines.read, tables, j, room)
                then = numbers_at(lines.read, tables, j + LANES, room)
            write_line(work.call, lines.place, lines.out, lines.read, j, numbers, then, lines.streaming)
            j += line_of(lines.out)
        return j

    return lines_of, write_lines


def _look(name, look_at_channel, look_at_columns, lines_of, write_lines):
    """Return a loop over some columns of a few rows, which writes what there is to be meanwhile."""

    @variant(name)
    def look(rows, number, first, last, state, base, mask, work, stored):
        """Look at the columns first … last - 1 of `number` rows.

        The sums of column j are at base + (j & mask). Where each column has its own, the rows take turns at
        being written, many lines at a time.
        """
        if mask == 0:
            look_at_channel(rows, number, first, last, state, base, work, stored)
            return
        k = 0
        j = first
        while j < last:
            j = look_at_columns(rows, number, j, last, state, base, stored)
            if work.tile[1] > 0:
                lines = lines_of(work, rows, k, j, stored)
                work.written[k] = write_lines(work, lines, work.written[k], lines.end, stored)
                k = 0 if k + 1 == number else k + 1

    return look


def _write_run(name, ask, numbers_at, value, write_line):
    """Return a loop that writes many rows that follow each other in memory, as one."""

    @variant(name)
    def write_run(call, out, row, first, last, tables, streaming):
        """Write the columns first … last - 1 of all; the tables begin again after call.period of them.

        They are those and how far apart they lie.
        """
        tables, room = tables
        place = plain(0), call.channels, plain(1)
        period = call.period
        line = line_of(out)
        streaming = streaming and address(out) % size_of(out) == 0
        j = first
        c = 0
        begin = min(last, line_from(out, j)) if streaming else j  # of the first whole line
        while j < last:
            row = advanced(row, j)
            ask(row, j)
            numbers = numbers_at(row, tables, c, room)
            end = begin if j < begin else last
            if j + line <= end:
                then = numbers_at(row, tables, c + LANES - period if c + LANES >= period else c + LANES, room)
                write_line(call, place, out, row, j, numbers, then, streaming)
                here = line
            elif j + LANES <= end:
                store(out, j, value(call, place, row, j, j + LANES, numbers))
                here = LANES
            else:
                here = end - j
                store_first(out, j, value(call, place, row, j, end, numbers), here)
            j += here
            c += here
            while c >= period:
                c -= period

    return write_run


def _write_rows(name, reads, write_part):
    """Return a loop that writes rows of a tile, wherever their columns lie."""

    @variant(name)
    def write_rows(call, first, last, tile, buffer, stored):
        out_of_line()
        channel = tile[0]
        group = tile[1]
        direct = call.at_out.gather == 0
        streaming = direct and call.stream == 1
        for row in range(first, last):
            step, piece = locate(call, row)
            steps, count = extent(call, step, piece)
            count *= steps * group
            x = row_of(call, call.x, call.at_x, step, piece, channel, group, buffer, stored)
            second = x
            if reads > 1 or with_residual(stored):
                room = after(buffer, ROOM)
                second = row_of(call, call.second, call.at_second, step, piece, channel, group, room, stored)
            out = after(buffer, 2 * ROOM)
            if direct:
                out = pointer(row_address(call, call.out, call.at_out, step, piece, channel), stored)
            read = operands(call, second, x, row_bits(call, row, stored), row, stored)
            write_part(call, out, read, plain(0), count, count, streaming, tile)
            if not direct:
                scatter(call, call.out, call.at_out, step, piece, channel, group, out, stored)

    return write_rows


# --- looking at one tile while another is written ----------------------------------------------------


@loop
def ask_for_ends(at, size, begins, ends):
    """Ask for the line that a row of `size` bytes begins in the middle of, and for that it ends in.

    They are stored to, not streamed, and what is streamed after them would wait until they are there.
    """
    if begins:
        ask_to_write(at)
    if ends and (at + size) % STREAM_BYTES != 0:
        ask_to_write(at + size)


def _down(name, reads, look, write_part, write_rows):
    """Return a loop over the rows of a tile that looks at them, and writes those of another one."""

    @variant(name)
    def down(call, first, last, channel, group, buffer, state, mask, tile, stored):
        """Look at the rows first … last - 1 of a tile, and write those of `tile`, if it has channels."""
        rows = scratch(NOTED, np.int64)
        numbers = scratch(ROWS, np.int64)
        outs = scratch(ROWS, np.int64)
        xs = scratch(ROWS, np.int64)
        seconds = scratch(ROWS, np.int64)
        widths = scratch(ROWS, np.int64)
        begins = scratch(ROWS, np.int64)
        ends = scratch(ROWS, np.int64)
        written = scratch(ROWS, np.int64)
        befores = scratch(ROWS, np.int64)
        none = scratch(ROWS, np.int64)
        writing = tile[1] > 0
        gathers = call.at_x.gather | call.at_grad_out.gather | call.at_second.gather | call.at_out.gather
        direct = writing and gathers == 0
        streaming = call.stream == 1
        apiece = call.single == 1 and group > 1  # a part is a channel, with sums of its own
        span = call.inner if apiece else COLUMNS
        for k in range(ROWS):
            begins[k] = ends[k] = written[k] = none[k] = 0
        work = Work(call, tile, numbers, outs, xs, seconds, begins, ends, written)
        no_work = Work(call, tile, numbers, outs, xs, seconds, none, none, none)
        to_x = (tile[0] - channel) * call.at_x.channel
        to_second = (tile[0] - channel) * call.at_second.channel
        # Whole rows of memory that lie far apart are better read as fewer streams.
        at_once = ROWS if reads == 1 and call.inner > 1 else AT_ONCE
        far = 0 if mask == 0 else apart(call, first, last, at_once)
        row = first
        while row < last:
            many = row < first + far
            number = at_once if many else min(at_once, last - row)
            pitch = far if many else 1
            shared = plain(COLUMNS)
            longest = plain(0)
            for k in range(number):
                numbers[k] = row + k * pitch
                step, piece = locate(call, numbers[k])
                steps, count = extent(call, step, piece)
                width = steps * count
                shared = min(shared, width * group)
                longest = max(longest, width)
                widths[k] = width
                room = after(buffer, reads * k * ROOM)
                x = row_of(call, call.x, call.at_x, step, piece, channel, group, room, stored)
                rows[reads * k + reads - 1] = address(x)
                note_bits(call, rows, reads * k, numbers[k], stored)
                if reads > 1:
                    room = after(room, ROOM)
                    dy = row_of(
                        call, call.grad_out, call.at_grad_out, step, piece, channel, group, room, stored
                    )
                    rows[reads * k] = address(dy)
                    note_beside(call, rows, state[-1], reads * k, numbers[k], stored)
                    note_residual(call, rows, reads * k, step, piece, channel, group, buffer, stored)
                if direct:
                    xs[k] = rows[reads * k + reads - 1] + to_x
                    seconds[k] = rows[reads * k] + to_second
                    if with_residual(stored):
                        seconds[k] = row_address(call, call.second, call.at_second, step, piece, tile[0])
                    outs[k] = row_address(call, call.out, call.at_out, step, piece, tile[0])
                    out, count = pointer(outs[k], stored), width * tile[1]
                    goes_on = piece + 1 < call.pieces
                    begins[k], ends[k] = whole_lines(out, count, goes_on, streaming)
                    written[k] = begins[k]
                    befores[k] = begins[k] if piece == 0 else 0  # otherwise the row before has written it
                    if streaming:
                        ask_for_ends(outs[k], count * size_of(x), befores[k] > 0, not goes_on)
            parts = -(-shared // span)
            for part in range(parts):
                begin = part * span
                end = min(begin + span, shared)
                look(rows, number, begin, end, state, part * LANES if apiece else 0, mask, work, stored)
            for k in range(number if longest * group > shared else 0):  # rows that are longer than all
                here = after(rows, reads * k)
                look(here, plain(1), shared, widths[k] * group, state, plain(0), mask, no_work, stored)
            for k in range(number if direct else 0):
                out, count = pointer(outs[k], stored), max(widths[k] * tile[1], ends[k])
                read = operands_of(work, rows, reads, k, stored)
                if befores[k] > 0:
                    write_part(call, out, read, plain(0), begins[k], count, streaming, tile)
                if written[k] < count:
                    write_part(call, out, read, written[k], count, count, streaming, tile)
            for k in range(number if reads > 1 and with_residual(stored) else 0):
                step, piece = locate(call, numbers[k])
                keep_residual(call, rows, reads * k, step, piece, channel, group, stored)
            # Only now: what is gathered or scattered goes through the buffer that held the rows above.
            for k in range(number if writing and not direct else 0):
                write_rows(call, numbers[k], numbers[k] + 1, tile, buffer, stored)
            row += 1 if many else number
            if many and row == first + far:
                row = first + at_once * far

    return down


normalized_at, write_normalized = _results(normalized_columns, precise_normalized, activated, activated_aside)
_gradient_at, _write_gradient = _results(gradient_columns, precise_gradient, concluded, concluded)
_constant_at, _write_constant = _results(constant_columns, precise_gradient, concluded, concluded)
_write_normalized_part = _write_part("normalized", ask_for_x, tables_of_x, normalized_at, write_normalized)
_write_gradient_part = _write_part(
    "gradient", ask_for_both, tables_of_gradient, _gradient_at, _write_gradient
)
_write_constant_part = _write_part(
    "constant", ask_for_both, tables_of_constant, _constant_at, _write_constant
)
write_normalized_rows = _write_rows("normalized", 1, _write_normalized_part)
write_gradient_rows = _write_rows("gradient", 2, _write_gradient_part)
write_constant_rows = _write_rows("constant", 2, _write_constant_part)
write_normalized_run = _write_run("normalized", ask_for_x, tables_of_x, normalized_at, write_normalized)
write_gradient_run = _write_run("gradient", ask_for_both, tables_of_gradient, _gradient_at, _write_gradient)
write_constant_run = _write_run("constant", ask_for_both, tables_of_constant, _constant_at, _write_constant)
normalized_lines, write_normalized_lines = _write_lines("normalized", 1, tables_of_x, write_normalized)
gradient_lines, write_gradient_lines = _write_lines("gradient", 2, tables_of_gradient, _write_gradient)
_look_at_rows = _look("forward", look_at_channel, look_at_columns, normalized_lines, write_normalized_lines)
_multiply_rows = _look("backward", multiply_channel, multiply_columns, gradient_lines, write_gradient_lines)
look_down = _down("forward", 1, _look_at_rows, _write_normalized_part, write_normalized_rows)
look_down_both = _down("backward", 2, _multiply_rows, _write_gradient_part, write_gradient_rows)
