"""Where the rows of a tile lie, and the loops over its rows and columns.

Sums run downwards, a column at a time, so a row needs no particular length or alignment; the columns
of a channel are added up at the end of a block. Eight rows are read at a time, from eight far-apart
places: eight long streams keep the memory busier than one.
"""

import numpy as np
from numba.core import types
from numba.extending import overload

from nbbn.compiler import fma, loop, out_of_line
from nbbn.cpu.simd import (
    LANES,
    STREAM_BYTES,
    address,
    after,
    fold,
    keep_first,
    load,
    load_first,
    pointer,
    prefetch,
    scratch,
    splat,
    store,
    store_first,
    stream,
    widen,
)
from nbbn.formulas import gradient, normalized, squared_deviation, two_sum

COLUMNS = 1024  # a row is at most this long
SHARED_COLUMNS = 512  # and this, where several channels share it: their sums must stay in L1
ROOM = COLUMNS + LANES  # a buffer for a row; vectors may be stored whole at its end
ROWS = 8  # that are read at a time
AHEAD = 4 * LANES  # how far ahead of a row's column its memory is asked for


def exact(real):
    """Whether sums of `real` in float64 must be compensated to be good to their last bit."""
    raise NotImplementedError("exists in compiled code only")


@overload(exact)
def _exact(real):
    # A float64 holds the sum of 2²⁹ float32 of like size without rounding.
    compensate = real.dtype == types.float64
    return (lambda real: True) if compensate else (lambda real: False)


# --- rows ------------------------------------------------------------------------------------------


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
def row_address(call, base, operand, step, piece, channel):
    """Return the address of the first element of a row in a tile that begins at `channel`."""
    out_of_line()
    at = base + channel * operand.channel + piece * call.width * operand.inner
    strides = pointer(operand.strides, np.int64)
    if call.dims == 1:
        return at + step * strides[0]
    sizes = pointer(call.sizes, np.int64)
    for d in range(call.dims - 1, -1, -1):
        at += step % sizes[d] * strides[d]
        step //= sizes[d]
    return at


@loop
def row_of(call, base, operand, step, piece, channel, group, buffer, real):
    """Return a pointer to a row's columns; to a copy in `buffer` where they do not lie together."""
    at = row_address(call, base, operand, step, piece, channel)
    if operand.gather == 0:
        return pointer(at, real)
    gather(call, at, operand, step, piece, group, buffer, real)
    return buffer


@loop
def gather(call, at, operand, step, piece, group, buffer, real):
    out_of_line()
    steps, count = extent(call, step, piece)
    outer = pointer(operand.strides, np.int64)[call.dims - 1]
    j = 0
    for f in range(steps):
        for g in range(group):
            there = at + f * outer + g * operand.channel
            for i in range(count):
                buffer[j] = pointer(there + i * operand.inner, real)[0]
                j += 1


@loop
def some(p, j, count):
    """Return the vector at column j, with zeros from column `count` on."""
    if j + LANES <= count:
        return load(p, j)
    return load_first(p, j, count - j)


@loop
def fill(p, count, value):
    """Set p[0 : count], and up to LANES - 1 elements more."""
    out_of_line()
    vector = splat(value)
    for j in range(0, count, LANES):
        store(p, j, vector)


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
def add_to(sums, lost, j, x, rest):
    """sums[j : j + LANES] += x + rest, with what the sums lost."""
    total, more = two_sum(load(sums, j), x)
    store(sums, j, total)
    store(lost, j, load(lost, j) + (more + rest))


@loop
def add_up(sums, lost, j, x, rest, real):
    """The same where float32 needs no compensation: sums whose tolerance is that of x's type."""
    if exact(real):
        add_to(sums, lost, j, x, rest)
    else:
        store(sums, j, load(sums, j) + x)


@loop
def write_column(written, j, count, streaming, real):
    """Normalize and write column j of ROWS rows of another tile, past the caches or not."""
    rows, outs, means, scales, shifts, mask = written
    c = j & mask
    mean = load(means, c)
    scale = load(scales, c)
    shift = load(shifts, c)
    for k in range(ROWS):
        out = pointer(outs[k], real)
        value = normalized(some(pointer(rows[k], real), j, count), mean, scale, shift)
        if j + LANES > count:
            store_first(out, j, value, count - j)
        elif streaming:
            stream(out, j, value)
        else:
            store(out, j, value)


@loop
def look_at_rows(rows, count, state, writing, streaming, written, real):
    """Add up x of ROWS rows, in float64, and (x - guess)², those of ROWS rows in x's type first.

    If `writing`, ROWS rows of another tile are written along with it, column by column, so that the
    memory is read and written at once, as a copy does.
    """
    guesses, sums, lost, squares, squares_lost, one = state
    for j in range(0, count, LANES):
        guess = load(guesses, j)
        total = splat(0.0)
        rest = splat(0.0)
        square = splat(real(0.0))
        for k in range(ROWS):
            prefetch(pointer(rows[k], real), j + AHEAD)
            x = some(pointer(rows[k], real), j, count)
            total, rest = plus(total, rest, x, one, real)
            square = square + squared_deviation(x, guess)
        if j + LANES > count:
            square = keep_first(square, count - j)
        add_to(sums, lost, j, total, rest)
        add_up(squares, squares_lost, j, widen(square), splat(0.0), real)
        if writing:
            write_column(written, j, count, streaming, real)


@loop
def look_at_channel(rows, count, state, writing, streaming, written, real):
    """The same for rows of one channel, whose sums stay in registers."""
    guesses, sums, lost, squares, squares_lost, one = state
    guess = load(guesses, 0)
    total = load(sums, 0)
    rest = load(lost, 0)
    total_square = load(squares, 0)
    square_rest = load(squares_lost, 0)
    for j in range(0, count, LANES):
        even = splat(0.0)
        odd = splat(0.0)
        small = splat(0.0)
        square = splat(real(0.0))
        for k in range(0, ROWS, 2):
            prefetch(pointer(rows[k], real), j + AHEAD)
            prefetch(pointer(rows[k + 1], real), j + AHEAD)
            x = some(pointer(rows[k], real), j, count)
            even, small = plus(even, small, x, one, real)
            square = square + squared_deviation(x, guess)
            x = some(pointer(rows[k + 1], real), j, count)
            odd, small = plus(odd, small, x, one, real)
            square = square + squared_deviation(x, guess)
        if j + LANES > count:
            square = keep_first(square, count - j)
        if exact(real):
            odd, more = two_sum(even, odd)
            small = small + more
            total_square, more = two_sum(total_square, widen(square))
            square_rest = square_rest + more
        else:
            odd = even + odd
            total_square = total_square + widen(square)
        total, more = two_sum(total, odd)
        rest = rest + (more + small)
        if writing:
            write_column(written, j, count, streaming, real)
    store(sums, 0, total)
    store(lost, 0, rest)
    store(squares, 0, total_square)
    store(squares_lost, 0, square_rest)


@loop
def look_at_row(row, first, count, state, mask, real):
    """The same for one row from column `first` on, squared in float64."""
    guesses, sums, lost, squares, squares_lost, _ = state
    for j in range(first, count, LANES):
        c = j & mask
        x = widen(some(row, j, count))
        square = squared_deviation(x, widen(load(guesses, c)))
        if j + LANES > count:
            square = keep_first(square, count - j)
        add_to(sums, lost, c, x, splat(0.0))
        add_up(squares, squares_lost, c, square, splat(0.0), real)


@loop
def square_row(row, count, state, mask, real):
    """Add up (x - mean)², in float64."""
    means, squares, squares_lost = state
    for j in range(0, count, LANES):
        c = j & mask
        square = squared_deviation(widen(some(row, j, count)), load(means, c))
        if j + LANES > count:
            square = keep_first(square, count - j)
        add_up(squares, squares_lost, c, square, splat(0.0), real)


@loop
def apart(call, first, last, wanted):
    """Return how far apart the rows lie that are read together, `wanted` at a time.

    Rows that follow each other in memory would be `wanted` short streams. So the rows are read from
    that many places of the block at once; what is left over, and a last row that is not full, is read
    a row at a time.
    """
    full = last if call.pieces > 1 else min(last, call.outer // call.fold)
    return max(0, full - first) // wanted


@loop
def square_down(call, first, last, channel, group, buffer, state, mask, real):
    """Add up the squares of the rows first … last - 1 of a tile."""
    for row in range(first, last):
        step, piece = locate(call, row)
        steps, count = extent(call, step, piece)
        x = row_of(call, call.x, call.at_x, step, piece, channel, group, buffer, real)
        square_row(x, steps * group * count, state, mask, real)


@loop
def plus_product(total, lost, a, b, real):
    """Return total + a · b in float64, and what the sums lost."""
    if exact(real):
        product = a * b
        total, more = two_sum(total, product)
        return total, lost + (more + fma(a, b, -product))
    return fma(a, b, total), lost


@loop
def multiply_rows(rows, number, first, count, state, mask, real):
    """Add up dy and dy · (x - mean), in float64, of so many rows of dy and x in turn."""
    means, sums, lost, products, products_lost, one = state
    for j in range(first, count, LANES):
        c = j & mask
        mean = load(means, c)
        total = splat(0.0)
        rest = splat(0.0)
        product = splat(0.0)
        product_rest = splat(0.0)
        for k in range(0, 2 * number, 2):
            dy = some(pointer(rows[k], real), j, count)
            deviation = widen(some(pointer(rows[k + 1], real), j, count)) - mean
            if j + LANES > count:
                deviation = keep_first(deviation, count - j)
            total, rest = plus(total, rest, dy, one, real)
            product, product_rest = plus_product(product, product_rest, widen(dy), deviation, real)
        add_up(sums, lost, c, total, rest, real)
        add_up(products, products_lost, c, product, product_rest, real)


@loop
def multiply_down(call, first, last, channel, group, buffer, state, mask, real):
    """Multiply the rows first … last - 1 of grad_out and x, some of each at a time."""
    rows = scratch(ROWS, np.int64)
    far = apart(call, first, last, ROWS // 2)
    row = first
    while row < last:
        together = ROWS // 2 if row < first + far else 1
        shared = COLUMNS
        longest = row - row
        for k in range(together):
            step, piece = locate(call, row + k * far)
            steps, count = extent(call, step, piece)
            shared = min(shared, steps * group * count)
            longest = max(longest, steps * group * count)
            room = after(buffer, 2 * k * ROOM)
            rows[2 * k] = address(
                row_of(call, call.grad_out, call.at_grad_out, step, piece, channel, group, room, real)
            )
            room = after(room, ROOM)
            rows[2 * k + 1] = address(
                row_of(call, call.x, call.at_x, step, piece, channel, group, room, real)
            )
        start = row - row
        if together > 1:
            multiply_rows(rows, ROWS // 2, start, shared, state, mask, real)
            start = shared
        for k in range(0 if start == longest else together):
            step, piece = locate(call, row + k * far)
            steps, count = extent(call, step, piece)
            multiply_rows(after(rows, 2 * k), 1, start, steps * group * count, state, mask, real)
        row = first + ROWS // 2 * far if row + 1 == first + far else row + 1


# --- between columns and channels ------------------------------------------------------------------


@loop
def to_channels(call, group, width, sums, lost, real):
    """Add up each channel's columns, in place: sums[channel] + lost[channel]."""
    out_of_line()
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
        else:
            for g in range(group):
                fill(after(columns, (f * group + g) * width), width, values[g])
    return columns


@loop
def spread(call, group, width, values, columns):
    """The same as `to_columns`, but where all columns are of one channel, LANES of them do.

    Return the buffer, and what to mask a column's index with.
    """
    if group == 1 and call.fold == 1:
        fill(columns, LANES, values[0])
        return columns, 0
    return to_columns(call, group, width, values, columns), -1


# --- writing ---------------------------------------------------------------------------------------


@loop
def normalized_at(state, j, count):
    x, means, scales, shifts, mask = state
    t = j & mask
    return normalized(some(x, j, count), load(means, t), load(scales, t), load(shifts, t))


@loop
def gradient_at(state, j, count):
    dy, x, means, units, scales, slopes, offsets, mask = state
    t = j & mask
    return gradient(
        some(dy, j, count),
        some(x, j, count),
        load(means, t),
        load(units, t),
        load(scales, t),
        load(slopes, t),
        load(offsets, t),
    )


def _write(value):
    """Return a loop that writes value(state, column) into a row."""

    @loop
    def write_row(row, count, streaming, state, real):
        j = 0
        size = 8 if exact(real) else 4
        ahead = -address(row) % STREAM_BYTES
        if streaming and ahead % size == 0:
            head = min(count, ahead // size)
            for j in range(0, head, LANES):
                store_first(row, j, value(state, j, head), head - j)
            j = head
            while j + LANES <= count:
                stream(row, j, value(state, j, count))
                j += LANES
        while j + LANES <= count:
            store(row, j, value(state, j, count))
            j += LANES
        if j < count:
            store_first(row, j, value(state, j, count), count - j)

    return write_row


write_normalized = _write(normalized_at)
write_gradient = _write(gradient_at)


@loop
def scatter(call, step, piece, channel, group, buffer, real):
    """Write the columns in `buffer` to where they lie in `out`."""
    out_of_line()
    at = row_address(call, call.out, call.at_out, step, piece, channel)
    steps, count = extent(call, step, piece)
    outer = pointer(call.at_out.strides, np.int64)[call.dims - 1]
    j = 0
    for f in range(steps):
        for g in range(group):
            there = at + f * outer + g * call.at_out.channel
            for i in range(count):
                pointer(there + i * call.at_out.inner, real)[0] = buffer[j]
                j += 1


# --- looking at one tile while another is written ----------------------------------------------------


@loop
def look_down(call, first, last, channel, group, buffer, state, mask, pending, real):
    """Look at the rows first … last - 1 of a tile, and write those of the tile `pending`.

    `pending` is the first channel of that tile, how many it has (0: none), and its tables.
    """
    pending_channel, pending_group, means, scales, shifts, table_mask = pending
    rows = scratch(ROWS, np.int64)
    pending_rows = scratch(ROWS, np.int64)
    outs = scratch(ROWS, np.int64)
    written = pending_rows, outs, means, scales, shifts, table_mask
    streaming = call.stream == 1
    direct = call.at_x.gather == 0 and call.at_out.gather == 0
    far = apart(call, first, last, ROWS)
    row = first
    while row < last:
        together = ROWS if row < first + far else 1
        shared = COLUMNS
        longest = row - row
        misaligned = row - row
        writing = together == ROWS and direct and pending_group == group
        for k in range(together):
            step, piece = locate(call, row + k * far)
            steps, count = extent(call, step, piece)
            shared = min(shared, steps * group * count)
            longest = max(longest, steps * group * count)
            room = after(buffer, k * ROOM)
            rows[k] = address(row_of(call, call.x, call.at_x, step, piece, channel, group, room, real))
            if writing:
                pending_rows[k] = row_address(call, call.x, call.at_x, step, piece, pending_channel)
                outs[k] = row_address(call, call.out, call.at_out, step, piece, pending_channel)
                misaligned |= outs[k]
        writing = writing and shared == longest and (not streaming or misaligned % STREAM_BYTES == 0)
        start = row - row
        if together == ROWS:
            if mask == 0:
                look_at_channel(rows, shared, state, writing, streaming, written, real)
            else:
                look_at_rows(rows, shared, state, writing, streaming, written, real)
            start = shared
        for k in range(0 if start == longest else together):
            step, piece = locate(call, row + k * far)
            steps, count = extent(call, step, piece)
            look_at_row(pointer(rows[k], real), start, steps * group * count, state, mask, real)
        # Only now: a row that is gathered or scattered goes through the buffer that held those above.
        for k in range(together if pending_group > 0 and not writing else 0):
            step, piece = locate(call, row + k * far)
            write_normalized_row(call, step, piece, pending, buffer, real)
        row = first + ROWS * far if row + 1 == first + far else row + 1


@loop
def write_normalized_row(call, step, piece, tile, buffer, real):
    """Normalize and write one row of a tile."""
    channel, group, means, scales, shifts, mask = tile
    steps, count = extent(call, step, piece)
    x = row_of(call, call.x, call.at_x, step, piece, channel, group, buffer, real)
    out = after(buffer, ROOM)
    if call.at_out.gather == 0:
        out = pointer(row_address(call, call.out, call.at_out, step, piece, channel), real)
    streaming = call.at_out.gather == 0 and call.stream == 1
    write_normalized(out, steps * group * count, streaming, (x, means, scales, shifts, mask), real)
    if call.at_out.gather == 1:
        scatter(call, step, piece, channel, group, out, real)
