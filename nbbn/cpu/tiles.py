"""The loops over the rows of a tile: each is looked at, and meanwhile another tile is written.

Rows of one long channel are read one after the other; where each column has sums of its own, several are
read together, from far-apart places.

What the loops here are told, beside a call's record and what elements are stored as:

- `rows`: int64[NOTED], the addresses of the rows that are looked at together, of x, or of dy and x in turn;
  behind them what is noted of each, see `nbbn.cpu.parameters.note_beside` and others like it. And their
  `number`.
- `first`, `last`: the columns to look at, from the first to before the last.
- `state`: what they are looked at with, and their sums, see `nbbn.cpu.sums.Look` and `LookAtBoth`. Those of
  column j are at `base` + (j & `sums_mask`): a place for each column, or LANES for all those of a channel.
- `tile`: another one, to be written meanwhile, as `nbbn.cpu.results.tile_of` returns it, and `work`: rows of
  it, see `nbbn.cpu.results.Work`. `place` is where its numbers are in its tables.
- `buffer`: room for copies of rows whose columns do not lie together.
"""

import numpy as np

from nbbn.compiler import in_line, loop, variant
from nbbn.cpu.fused import gather_residual, normalizing, note_residual, scatter_residual, with_residual
from nbbn.cpu.masks import lanes, note_bits, noted_bits, row_bits
from nbbn.cpu.parameters import NOTED, note_beside, pass_channel
from nbbn.cpu.results import (
    Work,
    gradient_lines,
    normalized_lines,
    one_of,
    operands_of,
    whole_lines,
    with_tables_of,
    write_gradient_border,
    write_gradient_columns,
    write_gradient_lines,
    write_gradient_part,
    write_gradient_rows,
    write_normalized_border,
    write_normalized_columns,
    write_normalized_lines,
    write_normalized_part,
    write_normalized_rows,
)
from nbbn.cpu.rows import (
    AT_ONCE,
    COLUMNS,
    HALF_COLUMNS,
    ROWS,
    TOGETHER,
    alike,
    extent,
    gather_apart,
    locate,
    row_address,
    row_in,
    row_of,
    row_room,
    some,
)
from nbbn.cpu.simd import (
    LANES,
    STREAM_BYTES,
    address,
    after,
    ask_to_write,
    choose,
    keep_first,
    load,
    plain,
    pointer,
    prefetch,
    scratch,
    size_of,
    splat,
    wide,
    widen,
)
from nbbn.cpu.sums import (
    add_columns,
    add_to,
    add_up,
    ask_ahead,
    exact,
    load_sums,
    look_at,
    look_at_two,
    multiply_at,
    plus_sum,
    square_row,
    store_sums,
)

SPAN = 16 * LANES  # columns whose squares are summed up in x's type before they are added to the rest


# --- looking at a few rows -------------------------------------------------------------------------


@loop
def look_at_channel(rows, number, first, last, state, base, place, work, stored):
    """Look at `number` rows of one channel, one after the other, with one vector of sums, at `base`.

    In the tables of the tile that is written its numbers are at `place`.
    """
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
        lines = normalized_lines(work, rows, k, first, last, place, stored)
        at = work.written[k]
        j = first
        while j < last:
            end = min(last, j + SPAN)
            found = total, rest, none, other, others, none
            while j + 2 * LANES <= end:
                found = look_at_two(row, its, j, guess, guess, found, state, real)
                at = write_normalized_lines(work, lines, at, at + 2 * LANES)
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
        work.written[k] = write_normalized_lines(work, lines, at, lines.end)
    total, rest = plus_sum(total, rest, other, others, real)
    store_sums(sums, base, add_to(sum_x, total, rest), always)
    store_sums(squares, base, sum_squares, both)


@loop
def look_at_columns(rows, number, j, last, state, base, stored):
    """Look at the next columns of `number` rows, from column j on, each with sums of its own at base + j.

    x is added up in float64, and (x - guess)², of the rows in x's type first. Return the column after them.
    """
    in_line()
    real = wide(stored)
    c, zero, none = base + j, splat(0.0), splat(real(0.0))
    guess = load(state.guesses, c)
    if number == AT_ONCE and j + 2 * LANES <= last:
        then, found = load(state.guesses, c + LANES), (zero, zero, none, zero, zero, none)
        for k in range(AT_ONCE):
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
def multiply_channel(rows, number, first, last, state, base, place, work, stored):
    """The same of `number` rows of one channel, one after the other, with one vector of sums, at `base`."""
    sums, products, real = state.sums, state.products, wide(stored)
    both, whole = plain(exact(real)), plain(True)
    mean, those = load(state.means, base), normalizing(state.before, base, stored)
    sum_dy, sum_products = load_sums(sums, base, both), load_sums(products, base, both)
    here = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    summed = 0  # columns
    for k in range(number):
        if summed + (last - first) > COLUMNS:
            sum_dy = add_up(sum_dy, here[0], here[1], real)
            sum_products = add_up(sum_products, here[2], here[3], real)
            here = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
            summed = 0
        summed += last - first
        dy, x = pointer(rows[2 * k], stored), pointer(rows[2 * k + 1], stored)
        lines = gradient_lines(work, rows, k, first, last, place, stored)
        at = work.written[k]
        j = first
        while j + 2 * LANES <= last:
            ask_ahead(dy, j, state.ahead_of_dy)
            ask_ahead(x, j, state.ahead)
            here = multiply_at(rows, k, j, last, whole, mean, those, here, state, stored)
            here = multiply_at(rows, k, j + LANES, last, whole, mean, those, here, state, stored)
            at = write_gradient_lines(work, lines, at, at + 2 * LANES)
            j += 2 * LANES
        while j < last:
            here = multiply_at(rows, k, j, last, not whole, mean, those, here, state, stored)
            j += LANES
        work.written[k] = write_gradient_lines(work, lines, at, lines.end)
    store_sums(sums, base, add_up(sum_dy, here[0], here[1], real), both)
    store_sums(products, base, add_up(sum_products, here[2], here[3], real), both)


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
            prefetch(pointer(rows[2 * k], stored), j, state.ahead_of_dy)
            prefetch(pointer(rows[2 * k + 1], stored), j, state.ahead)
            here = multiply_at(rows, k, j, last, whole, mean, those, here, state, stored)
    else:
        for k in range(number):
            here = multiply_at(rows, k, j, last, not whole, mean, those, here, state, stored)
    total, rest, product, product_rest = here
    store_sums(sums, c, add_up(load_sums(sums, c, both), total, rest, real), both)
    more = add_up(load_sums(products, c, both), product, product_rest, real)
    store_sums(products, c, more, both)
    return min(last, j + LANES)


def _look(name, look_at_channel, look_at_columns, lines_of, write_columns):
    """Return a loop over some columns of a few rows, which writes what there is to be meanwhile."""

    @variant(name)
    def look(rows, number, first, last, state, base, place, sums_mask, work, stored):
        """Look at the columns first … last - 1 of `number` rows.

        Where each column has sums of its own, the rows take turns at being written, many lines at a time.
        """
        if sums_mask == 0:
            look_at_channel(rows, number, first, last, state, base, place, work, stored)
            return
        k = plain(0)
        j = first
        while j < last:
            begin, j = j, look_at_columns(rows, number, j, last, state, base, stored)
            if work.tile[1] > 0:
                lines = lines_of(work, rows, k, begin, j, place, stored)
                work.written[k] = write_columns(work, lines, work.written[k])
                k = 0 if k + 1 == number else k + 1

    return look


# --- all rows of a tile ----------------------------------------------------------------------------


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
def square_down(call, first, last, channel, group, buffer, state, sums_mask, stored):
    """Add up the squares of the rows first … last - 1 of a tile."""
    for row in range(first, last):
        step, piece = locate(call, row)
        steps, count = extent(call, step, piece)
        x = row_of(call, call.x, call.at_x, step, piece, channel, group, buffer, stored)
        together = 1 if call.single == 1 else group  # channels
        width = steps * count
        for g in range(0, group, together):
            bits = row_bits(call, row, stored)
            its = after(x, g * (call.inner - count))  # the channels of a piece do not lie side by side
            base = g // call.shared * LANES
            square_row(its, bits, g * width, (g + together) * width, state, base, sums_mask)


@loop
def ask_for_ends(at, size, begins, ends):
    """Ask for the line that a row of `size` bytes begins in the middle of, and for that it ends in.

    They are stored to, not streamed, and what is streamed after them would wait until they are there.
    """
    if begins:
        ask_to_write(at)
    if ends and (at + size) % STREAM_BYTES != 0:
        ask_to_write(at + size)


def _down(name, reads, look, write_border, write_part, write_rows):
    """Return a loop over the rows of a tile that looks at them, and writes those of another one."""

    @variant(name)
    def find_rows(call, row, pitch, number, channel, group, buffer, rows, state, work, direct, stored):
        """Note where `number` rows are, from `row` on, and those of the other tile. Return how wide they are.

        That is of each channel.
        """
        in_line()
        tile, streaming = work.tile, call.stream == 1
        to_x = (tile[0] - channel) * call.at_x.channel
        to_second = (tile[0] - channel) * call.at_second.channel
        width, room = plain(0), row_room(buffer)
        gather_apart(call, call.x, call.at_x, row, number, channel, group, buffer, room)
        dys = after(buffer, AT_ONCE * room)
        if reads > 1:
            at_grad_out = call.at_grad_out
            gather_apart(call, call.grad_out, at_grad_out, row, number, channel, group, dys, room)
            if with_residual(stored):
                gather_residual(call, row, number, channel, group, buffer)
        for k in range(number):
            work.rows[k] = row + k * pitch
            step, piece = locate(call, work.rows[k])
            steps, count = extent(call, step, piece)
            width = steps * count
            x = row_in(call, call.x, call.at_x, step, piece, channel, after(buffer, k * room), stored)
            rows[reads * k + reads - 1] = address(x)
            note_bits(call, rows, reads * k, work.rows[k], stored)
            if reads > 1:
                its_room = after(dys, k * room)
                dy = row_in(call, call.grad_out, call.at_grad_out, step, piece, channel, its_room, stored)
                rows[reads * k] = address(dy)
                note_beside(call, rows, state[-1], reads * k, work.rows[k], stored)
                if with_residual(stored):
                    note_residual(call, rows, k, step, piece, channel, buffer, stored)
            if direct:
                work.xs[k] = rows[reads * k + reads - 1] + to_x
                work.seconds[k] = rows[reads * k] + to_second
                if with_residual(stored):
                    work.seconds[k] = row_address(call, call.second, call.at_second, step, piece, tile[0])
                work.outs[k] = row_address(call, call.out, call.at_out, step, piece, tile[0])
                out, count = pointer(work.outs[k], stored), width * tile[1]
                goes_on = piece + 1 < call.pieces
                work.begins[k], work.ends[k] = whole_lines(out, count, goes_on, streaming)
                work.written[k] = work.begins[k]
                # What comes before is a row's own, or has been written with the piece before.
                work.before[k] = work.begins[k] if piece == 0 else 0
                if streaming:
                    ask_for_ends(work.outs[k], count * size_of(x), work.before[k] > 0, not goes_on)
        return width

    @variant(name)
    def write_ends(call, rows, number, width, work, tile, stored):
        """Write what is left over of rows of another tile: their ends, or all where nothing was looked at."""
        in_line()
        streaming = call.stream == 1
        for k in range(number):
            out, count = pointer(work.outs[k], stored), max(width * tile[1], work.ends[k])
            read = operands_of(work, rows, reads, k, stored)
            if work.before[k] > 0:
                write_part(call, out, read, plain(0), work.begins[k], count, streaming, tile)
            if work.written[k] < count:
                write_part(call, out, read, work.written[k], count, count, streaming, tile)

    @variant(name)
    def down(call, first, last, channel, group, buffer, state, sums_mask, tile, stored):
        """Look at the rows first … last - 1 of a tile, and write those of `tile`, if it has channels."""
        rows = scratch(NOTED, np.int64)
        numbers = scratch(ROWS, np.int64)
        outs = scratch(ROWS, np.int64)
        xs = scratch(ROWS, np.int64)
        seconds = scratch(ROWS, np.int64)
        begins = scratch(ROWS, np.int64)
        ends = scratch(ROWS, np.int64)
        written = scratch(ROWS, np.int64)
        before = scratch(ROWS, np.int64)
        writing = tile[1] > 0
        gathers = call.at_x.gather | call.at_grad_out.gather | call.at_second.gather | call.at_out.gather
        direct = writing and gathers == TOGETHER
        # Channels that come in pieces take turns, piece by piece.
        turns = max(group, tile[1]) if call.pieces > 1 else 1
        apiece = call.single == 1 and group > 1 and turns == 1  # a part is a channel, with sums of its own
        span = call.inner if apiece else HALF_COLUMNS
        for k in range(ROWS):
            begins[k] = ends[k] = written[k] = 0
        # Squares of as many rows as are looked at together are summed in x's type.
        at_once = ROWS if reads == 1 and sums_mask == 0 else AT_ONCE
        # What is gathered are rows that follow each other: there elements may lie side by side.
        follow = sums_mask == 0 or gathers | call.at_residual.gather != TOGETHER
        far = 0 if follow else apart(call, first, last, at_once)
        row = first
        while row < last:
            many = row < first + far
            number = at_once if many else min(at_once, min(last - row, alike(call, row)))
            number = number if turns == 1 else 1
            pitch = far if many else 1
            for turn in range(turns):
                its, count, its_tile = one_of(channel, group, tile, turn, turns)
                work = Work(call, its_tile, numbers, outs, xs, seconds, begins, ends, written, before)
                width = find_rows(
                    call, row, pitch, number, its, count, buffer, rows, state, work, direct, stored
                )
                columns = width * count
                for part in range(-(-columns // span)):
                    begin = part * span
                    end = min(begin + span, columns)
                    place = part * LANES if apiece else turn * LANES
                    base = part // call.shared * LANES if apiece else place
                    look(rows, number, begin, end, state, base, place, sums_mask, work, stored)
                    for k in range(number if apiece else 0):
                        write_border(work, rows, k, begin, end, place, stored)
                        if reads > 1:
                            pass_channel(call, rows, reads * k, stored)
                if direct:
                    its_tile = with_tables_of(its_tile, turn)
                    write_ends(call, rows, number, width, work, its_tile, stored)
                if reads > 1 and with_residual(stored):
                    scatter_residual(call, row, number, its, count, buffer)
            # Only now: what is gathered or scattered goes through the buffer that held the rows above.
            if writing and not direct:
                write_rows(call, row, row + number, tile, buffer, stored)
            row += 1 if many else number
            if many and row == first + far:
                row = first + at_once * far

    return down


_look_at_rows = _look("forward", look_at_channel, look_at_columns, normalized_lines, write_normalized_columns)
_multiply_rows = _look("backward", multiply_channel, multiply_columns, gradient_lines, write_gradient_columns)
look_down = _down(
    "forward", 1, _look_at_rows, write_normalized_border, write_normalized_part, write_normalized_rows
)
look_down_both = _down(
    "backward", 2, _multiply_rows, write_gradient_border, write_gradient_part, write_gradient_rows
)
