"""What is written of a tile, and in what pieces: a row, a part of one, a run of many, or some lines of one.

Whole lines of memory are written past the caches where a plan says so; what they leave over is stored.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from nbbn.compiler import by_type, in_line, like, loop, out_of_line, variant
from nbbn.cpu.fused import (
    activated,
    activated_aside,
    joined,
    passed,
    precisely_joined,
    shift_beside,
    with_residual,
)
from nbbn.cpu.masks import (
    both,
    counting,
    lanes,
    noted_bits,
    operands,
    repeated_after,
    row_bits,
    run_end,
    run_from,
)
from nbbn.cpu.parameters import (
    FLOAT32_BYTES,
    WEIGHTS,
    begun_at,
    finished,
    part_in_doubt,
    precisely_finished,
    precisely_scaled,
    scaled,
)
from nbbn.cpu.rows import (
    AHEAD,
    AT_ONCE,
    ROOM,
    TOGETHER,
    alike,
    extent,
    gather_apart,
    locate,
    row_in,
    row_room,
    scatter_apart,
    some,
    to_columns,
)
from nbbn.cpu.simd import (
    BFLOAT16,
    LANES,
    SMALLEST_NORMAL,
    STREAM_BYTES,
    Half,
    address,
    after,
    at_most,
    below,
    either_below,
    line_of,
    load,
    lowest,
    narrow,
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
    way_of,
    widen,
)
from nbbn.formulas import gradient, gradient_doubt, normalized, normalized_doubt, offset_doubt

ALL_LANES = (1 << LANES) - 1
TABLES = 6  # what a column of grad_x is computed with at most; of out, three of them


class Lines(NamedTuple):
    """Some of the whole lines of a row of another tile.

    Attributes
    ----------
    out : pointer
        The row that they are of.
    end : int
        The column after the last one.
    read, numbers
        What the results are computed from; and what with, those of a long channel.
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
    before : int64[ROWS]
        How many columns before the first whole line are to be written, too.
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
    before: Any


# --- what is written -------------------------------------------------------------------------------


@loop
def tile_of(call, channel, group, number, spread, real):
    """Return a tile that is ready to be written.

    That is its first channel, how many it has, and the tables of what its columns are written with, made in
    `spread`: their address, how far apart they lie, and how long the channels are that have LANES places in
    each of them; 0: each column has a place. See `table_at`.
    """
    tables = after(pointer(call.tables, real), channel)
    room = call.room
    width = min(call.width, call.inner)
    if width == 1 and call.fold == 1:
        return channel, group, tables, room, plain(0)
    long = width if call.single == 1 or (group == 1 and call.fold == 1) else plain(0)
    places = plain(LANES) if long > 0 else width
    for k in range(number):
        to_columns(call, group, places, after(tables, k * room), after(spread, k * ROOM))
    return channel, group, spread, ROOM, long


@loop
def one_of(channel, group, tile, turn, turns):
    """Return the first channel, the number of channels, and the tile to be written, of one turn."""
    if turns == 1:
        return channel, group, tile
    its_tile = tile[0] + turn, min(1, max(0, tile[1] - turn)), tile[2], tile[3], tile[4]
    return channel + turn, min(1, max(0, group - turn)), its_tile


@loop
def with_tables_of(tile, number):
    """Return a tile of one channel with its tables, where they are those of a tile of several long ones."""
    return tile[0], tile[1], after(tile[2], number * LANES), tile[3], tile[4]


@loop
def channel_of(tile, j):
    """Return which of the long channels of a tile column j is of."""
    return plain(0) if tile[1] == 1 else j // tile[4]


@loop
def border_at(place, j, last):
    """Return where in a tile's tables the numbers of the columns j … are, near the end of a long channel.

    The channel ends with column last - 1, and its numbers are at `place`. A vector that it shares with the
    next one has some of both, which lie side by side.
    """
    return place + min(LANES, max(0, j + LANES - last))


@loop
def table_at(tile, j):
    """Return where in a tile's tables the numbers of the columns j … are."""
    long = tile[4]
    if long == 0:
        return j
    if tile[1] == 1:  # its row may go on behind its end, in the next piece
        return plain(0)
    channel = channel_of(tile, j)
    return border_at(channel * LANES, j, (channel + 1) * long)


def unrounded(row):
    """Return what a result must not be below, but for 0, to be rounded to 16 bits in the quickest way."""
    raise NotImplementedError("exists in compiled code only")


@by_type(unrounded)
def _unrounded(row):
    way = way_of(row[2])
    # What an activation or weights make of a result may be much smaller than it.
    as_it_is = not way.activation and len(row) <= WEIGHTS
    smallest = SMALLEST_NORMAL if row[0].dtype == BFLOAT16 and as_it_is else 0.0
    return lambda row: smallest


@loop
def shift_doubt(row, shift):
    """Return what results that `shift` was added to are in doubt below."""
    return normalized_doubt(shift, part_in_doubt(row), like(shift, unrounded(row)))


@loop
def doubted(row, value, doubt):
    """Return the lanes that are in doubt; not those that are 0 where nothing was added up."""
    size, least = math.fabs(value), like(doubt, unrounded(row))
    return below(size, doubt) & ~(at_most(size, like(doubt, 0.0)) & at_most(doubt, least))


@loop
def tables_of_constant(row, tables, c, room):
    """What the columns c … were normalized with: mean, scale and shift."""
    return load(tables, c), load(tables, c + room), load(tables, c + 2 * room)


@loop
def tables_of_x(row, tables, c, room):
    """What the columns c … are normalized with: mean, scale, shift, and what results are in doubt below."""
    mean, scale, shift = tables_of_constant(row, tables, c, room)
    return mean, scale, shift, shift_doubt(row, shift)


@loop
def normalized_columns(row, j, end, numbers):
    """The normalized columns j … of a row of x, which has `end`, and what they are in doubt below."""
    mean, scale, shift, doubt = numbers
    value = normalized(some(row[1], j, end), mean, scale, shift)
    value, doubt = finished(row, j, value, doubt)
    return joined(row, j, end, value, doubt)


@loop
def tables_of_gradient(row, tables, c, room):
    """What the columns c … of grad_x are computed with: mean, scale, slope, offset, unit and a doubt.

    And, where it is computed through an activation, the shift that x was normalized with.
    """
    mean, scale, slope = tables_of_constant(row, tables, c, room)
    offset, unit = load(tables, c + 3 * room), load(tables, c + 4 * room)
    doubt = offset_doubt(offset, part_in_doubt(row), like(offset, unrounded(row)))
    return (mean, scale, slope, offset, unit, doubt) + shift_beside(row, tables, c + 5 * room)


@loop
def gradient_columns(row, j, end, numbers):
    """The columns j … of grad_x, and what they are in doubt below."""
    mean, scale, slope, offset, unit, doubt = numbers[:6]
    x = some(row[1], j, end)
    dy, scale = passed(row, some(row[0], j, end), x, numbers), scaled(row, j, scale)
    grad_x = gradient(dy, x, mean, unit, scale, slope, offset)
    return grad_x, gradient_doubt(x, mean, unit, slope, offset, part_in_doubt(row), doubt)


@loop
def constant_columns(row, j, end, numbers):
    """The columns j … of grad_x through an activation where the statistics are constants; never in doubt."""
    dy = passed(row, some(row[0], j, end), some(row[1], j, end), numbers)
    return dy * numbers[1], like(dy, unrounded(row))


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


def precise_gradient(call, place, row, j, doubtful, grad_x):
    """Return `grad_x`, the columns j … of a row of it, with those in doubt computed in float64."""
    raise NotImplementedError("exists in compiled code only")


@by_type(precise_gradient)
def _precise_gradient(call, place, row, j, doubtful, grad_x):
    def at_once(call, place, row, j, doubtful, grad_x):
        # Often all are: where grad_out is a constant, or is like x_hat, only roundings are left of it.
        channel, group, width = place
        columns = group if width == 1 else width  # that follow each other in the tables, or have one number
        step = j // columns
        begin = j - step * columns
        if doubtful != ALL_LANES or begin + LANES > columns:
            return precise_gradient_by_lanes(call, place, row, j, doubtful, grad_x)
        c = channel + (begin if width == 1 else step if step < group else step % group)
        return precise_gradient_of_all(call, c, width, row, j)

    def by_lanes(call, place, row, j, doubtful, grad_x):
        return precise_gradient_by_lanes(call, place, row, j, doubtful, grad_x)

    return by_lanes if way_of(row[2]).activation else at_once


@loop
def precise_number(table, c, width):
    """Return a number of channel c in each lane; or, where each column is a channel, those of c …."""
    return load(table, c) if width == 1 else splat(table[c])


@loop
def precise_gradient_of_all(call, c, width, row, j):
    """Return the columns j … of a row of grad_x, of one channel or each of the next, by way of float64."""
    tables, room = precise_tables(call), call.room
    dy, x = widen(load(row[0], j)), widen(load(row[1], j))
    mean, scale = precise_number(tables, c, width), precise_number(tables, c + room, width)
    slope, offset = precise_number(tables, c + 2 * room, width), precise_number(tables, c + 3 * room, width)
    unit = precise_number(tables, c + 4 * room, width)
    return narrow(gradient(dy, x, mean, unit, precisely_scaled(row, j, scale), slope, offset), np.float32)


@loop
def precise_gradient_by_lanes(call, place, row, j, doubtful, grad_x):
    """Return the same where not all are in doubt, or whatever channels the columns are of."""
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
        scale = precisely_scaled(row, j + k, scale)
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
            doubtful = both(bits, doubted(row, value, doubt))
            result = counting(bits, aside(row, value))
            if rarely(doubtful != 0):
                inside = (1 << min(LANES, end - j)) - 1
                return precisely(call, place, row, j, doubtful & inside, result)
            return result

        return refined if isinstance(row[0].dtype, Half) else sure

    def write_refined(call, place, out, row, j, numbers, then, streaming):
        raise NotImplementedError("exists in compiled code only")

    @by_type(write_refined)
    def _write_refined(call, place, out, row, j, numbers, then, streaming):
        def of_two(call, place, out, row, j, numbers, then, streaming):
            out_of_line()
            k = j + LANES
            first = result_at(call, place, row, j, k, numbers)
            second = result_at(call, place, row, k, k + LANES, then)
            if streaming:
                stream_both(out, j, first, second, False)
            else:
                store_both(out, j, first, second, False)

        return of_two

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
            some_below = rarely(either_below(first, second, doubt, more_doubt))
            if some_below and doubted(row, first, doubt) | doubted(row, second, more_doubt) != 0:
                write_refined(call, place, out, row, j, numbers, then, streaming)
                return
            first = counting(lanes(row[4], j), followed(row, first))
            second = counting(lanes(row[4], k), followed(row, second))
            sure = unrounded(row) > 0.0
            if streaming:
                stream_both(out, j, first, second, sure)
            else:
                store_both(out, j, first, second, sure)

        return two if isinstance(out.dtype, Half) else one

    return result_at, write_line


# --- whole rows, and parts of them -----------------------------------------------------------------


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
        channel, group, tables, room, long = tile
        place = channel, group, min(call.width, call.inner)
        j = first
        end = min(last, count)
        line = line_of(out)
        streaming = streaming and address(out) % size_of(out) == 0
        if streaming:
            j = min(line_from(out, first), count)
            for k in range(0, j if first == 0 else 0, LANES):
                here = min(LANES, j - k)
                numbers = numbers_at(row, tables, table_at(tile, k), room)
                store_first(out, k, value(call, place, row, k, k + here, numbers), here)
            if last < count:
                end = min(line_from(out, last), count)
        its = row
        while j < end:
            numbers = numbers_at(row, tables, table_at(tile, j), room)
            if long > 0:
                its_first = channel_of(tile, j) * long
                its = begun_at(row, its_first)
                same = min(end, its_first + long)
                while j + line <= same:
                    ask(row, j)
                    write_line(call, place, out, its, j, numbers, numbers, streaming)
                    j += line
                if j == end:
                    break
                numbers = numbers_at(row, tables, table_at(tile, j), room)
            ask(row, j)
            if j + line <= end:
                then = numbers_at(row, tables, table_at(tile, j + LANES), room)
                write_line(call, place, out, its, j, numbers, then, streaming)
                j += line
            else:
                here = min(LANES, end - j)
                store_first(out, j, value(call, place, its, j, j + here, numbers), here)
                j += here

    return write_part


def _write_run(name, ask, numbers_at, value, write_line):
    """Return a loop that writes many rows that follow each other in memory, as one."""

    @variant(name)
    def write_from(call, out, row, j, last, tables, streaming):
        """Write the columns j … last - 1 of a run; the tables begin with those of column j."""
        tables, room = tables
        place = plain(0), call.channels, plain(1)
        period = call.period
        line = line_of(out)
        begin = min(last, line_from(out, j)) if streaming else j  # of the first whole line
        c = 0
        while j < last:
            end = begin if j < begin else last
            stop = min(end - line + 1, j + period - c)  # up to where the tables begin again
            while j < stop:
                ask(row, j)
                other = c + LANES - period if c + LANES >= period else c + LANES
                numbers, then = numbers_at(row, tables, c, room), numbers_at(row, tables, other, room)
                write_line(call, place, out, row, j, numbers, then, streaming)
                j += line
                c += line
            if c < period and j < end:
                here = min(LANES, end - j)
                numbers = numbers_at(row, tables, c, room)
                store_first(out, j, value(call, place, row, j, j + here, numbers), here)
                j += here
                c += here
            while c >= period:
                c -= period

    @variant(name)
    def write_run(call, first, last, tables, streaming, stored):
        """Write the outer steps first … last - 1; the tables begin again after call.period columns.

        They are those and how far apart they lie.
        """
        out = pointer(call.out, stored)
        x, second = pointer(call.x, stored), pointer(call.second, stored)
        streaming = streaming and address(out) % size_of(out) == 0
        step = first
        number, into = run_from(call, step, stored)
        while step < last:
            start = step - into
            until = run_end(call, start, last, stored)
            row = operands(call, second, x, row_bits(call, number, stored), 0, stored)
            row = repeated_after(row, start * call.channels)
            write_from(call, out, row, step * call.channels, until * call.channels, tables, streaming)
            step = until
            number += 1
            into = 0

    return write_run


def _write_rows(name, reads, write_part):
    """Return a loop that writes rows of a tile, wherever their columns lie."""

    @variant(name)
    def write_rows(call, first, last, tile, buffer, stored):
        out_of_line()
        streaming = call.at_out.gather == TOGETHER and call.stream == 1
        beside = reads > 1 or with_residual(stored)
        turns = tile[1] if call.pieces > 1 else 1
        room = row_room(buffer)
        seconds = after(buffer, AT_ONCE * room)
        row = first
        while row < last:
            number = min(AT_ONCE, min(last - row, alike(call, row))) if turns == 1 else 1
            for turn in range(turns):
                channel, group, its = one_of(tile[0], tile[1], tile, turn, turns)
                its = with_tables_of(its, turn)
                gather_apart(call, call.x, call.at_x, row, number, channel, group, buffer, room)
                if beside:
                    at_second = call.at_second
                    gather_apart(call, call.second, at_second, row, number, channel, group, seconds, room)
                for k in range(number):
                    step, piece = locate(call, row + k)
                    steps, count = extent(call, step, piece)
                    count *= steps * group
                    its_room = after(buffer, k * room)
                    x = row_in(call, call.x, call.at_x, step, piece, channel, its_room, stored)
                    second = x
                    if beside:
                        its_second = after(seconds, k * room)
                        second = row_in(
                            call, call.second, call.at_second, step, piece, channel, its_second, stored
                        )
                    out = row_in(call, call.out, call.at_out, step, piece, channel, its_room, stored)
                    read = operands(call, second, x, row_bits(call, row + k, stored), row + k, stored)
                    write_part(call, out, read, plain(0), count, count, streaming, its)
                scatter_apart(call, call.out, call.at_out, row, number, channel, group, buffer, room)
            row += number

    return write_rows


# --- lines, between looks at another tile ----------------------------------------------------------


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
    def lines_of(work, rows, k, first, last, base, stored):
        """Return the lines of a row that begin before column `last`; the next begins at `first` or later.

        Long channels come one at a time, without a line that two of them share; `base` is where the numbers
        of this one are in the tables.
        """
        in_line()
        call, out, begin = work.call, pointer(work.outs[k], stored), work.begins[k]
        channel, group, tables, room, long = work.tile
        line = line_of(out)
        end = min(work.ends[k], begin + -(-last // line) * line)
        read = operands_of(work, rows, reads, k, stored)
        if long > 0 and group > 1:
            read = begun_at(read, first)
            end = min(end, begin + (last - begin) // line * line)
        c = plain(0)
        if group > 0:
            c = base if long > 0 else first
        numbers = numbers_at(read, tables, c, room)
        place = channel, group, min(call.width, call.inner)
        return Lines(out, end, read, numbers, place, call.stream == 1)

    @variant(name)
    def write_lines(work, lines, j, end):
        """Write those of one channel from column j on that begin before column `end`.

        Return where the next one begins.
        """
        in_line()
        end, numbers = min(end, lines.end), lines.numbers
        while j < end:
            write_line(work.call, lines.place, lines.out, lines.read, j, numbers, numbers, lines.streaming)
            j += line_of(lines.out)
        return j

    @variant(name)
    def write_border(work, rows, k, first, last, base, stored):
        """Write the line of a row that a long channel, the columns first … last - 1, shares, if it does."""
        j, out = work.written[k], pointer(work.outs[k], stored)
        if j >= min(last, work.ends[k]):
            return
        channel, group, tables, room, _ = work.tile
        place = channel, group, min(work.call.width, work.call.inner)
        read = begun_at(operands_of(work, rows, reads, k, stored), first)
        numbers = numbers_at(read, tables, border_at(base, j, last), room)
        then = numbers_at(read, tables, border_at(base, j + LANES, last), room)
        write_line(work.call, place, out, read, j, numbers, then, work.call.stream == 1)
        work.written[k] = j + line_of(out)

    @variant(name)
    def write_columns(work, lines, j):
        """Write all from column j on, of columns with numbers of their own; return where the next begins."""
        in_line()
        _, _, tables, room, long = work.tile
        while j < lines.end:
            numbers, then = lines.numbers, lines.numbers
            if long == 0:
                numbers = numbers_at(lines.read, tables, j, room)
                then = numbers_at(lines.read, tables, j + LANES, room)
            write_line(work.call, lines.place, lines.out, lines.read, j, numbers, then, lines.streaming)
            j += line_of(lines.out)
        return j

    return lines_of, write_lines, write_border, write_columns


normalized_at, write_normalized = _results(normalized_columns, precise_normalized, activated, activated_aside)
_gradient_at, _write_gradient = _results(gradient_columns, precise_gradient, concluded, concluded)
_constant_at, _write_constant = _results(constant_columns, precise_gradient, concluded, concluded)
write_normalized_part = _write_part("normalized", ask_for_x, tables_of_x, normalized_at, write_normalized)
write_gradient_part = _write_part("gradient", ask_for_both, tables_of_gradient, _gradient_at, _write_gradient)
_write_constant_part = _write_part(
    "constant", ask_for_both, tables_of_constant, _constant_at, _write_constant
)
write_normalized_rows = _write_rows("normalized", 1, write_normalized_part)
write_gradient_rows = _write_rows("gradient", 2, write_gradient_part)
write_constant_rows = _write_rows("constant", 2, _write_constant_part)
write_normalized_run = _write_run("normalized", ask_for_x, tables_of_x, normalized_at, write_normalized)
write_gradient_run = _write_run("gradient", ask_for_both, tables_of_gradient, _gradient_at, _write_gradient)
write_constant_run = _write_run("constant", ask_for_both, tables_of_constant, _constant_at, _write_constant)
normalized_lines, write_normalized_lines, write_normalized_border, write_normalized_columns = _write_lines(
    "normalized", 1, tables_of_x, write_normalized
)
gradient_lines, write_gradient_lines, write_gradient_border, write_gradient_columns = _write_lines(
    "gradient", 2, tables_of_gradient, _write_gradient
)
