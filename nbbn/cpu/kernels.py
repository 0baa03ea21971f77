"""The kernels: the stages of batch normalization, each over a range of tasks.

A task of a *resident* kernel (`forward`, `backward`) is a group of channels whose slice stays in cache
from the statistics to the result: memory is read once. Where a slice is too large, or there are fewer
groups than cores, the same work is done in phases whose tasks are tiles: `collect_stats`,
`finish_stats`, `normalize`. The chunks are the same, so the bits are.
"""

import numpy as np

from nbbn.compiler import by_type, in_line, invoke, kernel, loop, out_of_line
from nbbn.cpu.call import copied, read
from nbbn.cpu.fused import NUMBERS_ROOM, before_activation, gradient_tables, normalization, quieted
from nbbn.cpu.masks import (
    SPREAD_CHANNELS,
    lanes,
    none_counts,
    operands,
    repeated_after,
    row_bits,
    set_bit_of_step,
    set_bits,
    set_bits_of_steps,
    spread_bits,
    step_bits,
    values_before,
)
from nbbn.cpu.parameters import (
    across,
    affines_of,
    mean_of_row,
    parameter,
    set_parameter,
    several,
    spread_along,
)
from nbbn.cpu.results import (
    TABLES,
    ask_for_x,
    line_from,
    normalized_at,
    set_precise_tables,
    shift_doubt,
    tile_of,
    write_constant_rows,
    write_constant_run,
    write_gradient_rows,
    write_gradient_run,
    write_normalized,
    write_normalized_rows,
    write_normalized_run,
)
from nbbn.cpu.rows import (
    ROOM,
    ROWS,
    TOGETHER,
    copy_rows,
    extent,
    fill,
    gather_apart,
    locate,
    row_address,
    row_buffers,
    row_in,
    row_of,
    row_room,
    to_columns,
)
from nbbn.cpu.short import add_columns_of, short_gradients, short_stats
from nbbn.cpu.simd import (
    LANES,
    address,
    after,
    choose,
    fence,
    fold,
    line_of,
    load,
    load_apart,
    load_first,
    narrow,
    number,
    plain,
    pointer,
    scratch,
    size_of,
    splat,
    store,
    store_first,
    stream,
    way_of,
    wide,
    widen,
)
from nbbn.cpu.sums import (
    Look,
    add_to,
    exact,
    look_at_both,
    partials_of,
    plus_product,
    to_channels,
    trusted,
)
from nbbn.cpu.tiles import (
    look_down,
    look_down_both,
    square_down,
)
from nbbn.formulas import (
    LARGEST_UNIT32,
    LARGEST_UNIT64,
    about_mean,
    gradient_parameters,
    inverse_deviation,
    mean_of,
    mean_square,
    merge,
    power_of_two,
    running,
    shift_of,
    two_sum,
    unbiased,
    variance,
)

ALL_ROWS = 2 * ROWS  # with those of a residual and its gradient
TABLES_ROOM = TABLES * ROOM
# A guess at a block's mean goes by so many values: one in 10⁸ is too far off, of normal deviates.
PILOT_VALUES = 8
LINE = 1 << 12  # elements of a table that are set together


@loop
def chunk_rows(call, chunk):
    """Return the first row of a chunk, and that after its last."""
    begin = chunk * call.chunk
    return begin, min(call.rows, begin + call.chunk)


@loop
def group_of(call, number):
    """Return the first channel of a group, and how many it has."""
    channel = number * call.group
    return channel, min(call.group, call.channels - channel)


@loop
def set_at(call, task):
    """Return the first channel of a task of a resident kernel, and that after its last."""
    channel = task * call.tiles * call.group
    return channel, min(call.channels, channel + call.tiles * call.group)


@loop
def parts_of(call, task):
    """Return how many tiles a task of a resident kernel has; the last may have fewer than the others."""
    return min(call.tiles, call.groups - task * call.tiles)


@loop
def tile_before(call, task, part, number, tables, real):
    """Return a part of what the task before took statistics of, ready to be written."""
    channel, group = group_of(call, (task - 1) * call.tiles + part)
    return tile_of(call, channel, group, number, tables, real)


@loop
def load_partials(call, partials, c, here):
    """Return all numbers of `here` channels, from channel c on of those whose partials begin there."""
    in_line()
    apart = call.channels
    return (
        load_first(partials, c, here),
        load_first(partials, apart + c, here),
        load_first(partials, 2 * apart + c, here),
        load_first(partials, 3 * apart + c, here),
    )


@loop
def store_partials(call, partials, c, numbers, here):
    in_line()
    apart = call.channels
    store_first(partials, c, numbers[0], here)
    store_first(partials, apart + c, numbers[1], here)
    store_first(partials, 2 * apart + c, numbers[2], here)
    store_first(partials, 3 * apart + c, numbers[3], here)


# --- forward ---------------------------------------------------------------------------------------


@loop
def no_tile(tables):
    """Return a tile without channels."""
    return plain(0), plain(0), tables, plain(0), plain(0)


@loop
def guess_all(call, first, last, channel, group, buffer, guesses, stored):
    """Set a guess where all values count, from PILOT_VALUES of them, or from a few more.

    `group` is how many there are of what has a sum: channels, or sets of them.
    """
    out_of_line()
    real = wide(stored)
    a_row = call.fold * min(call.width, call.inner)
    last = min(last, first + 1 + (PILOT_VALUES - 1) // a_row)
    room = row_room(buffer)
    gather_apart(call, call.x, call.at_x, first, last - first, channel, group, buffer, room)
    fill(guesses, group, real(0.0))
    count = 0
    for row in range(first, last):
        step, piece = locate(call, row)
        steps, width = extent(call, step, piece)
        its_room = after(buffer, (row - first) * room)
        x = row_in(call, call.x, call.at_x, step, piece, channel, its_room, stored)
        if width == 1:
            for f in range(steps):
                for g in range(0, group, LANES):
                    here = load_first(x, f * group + g, group - g)
                    store(guesses, g, load(guesses, g) + here)
            count += steps
        else:
            values = min(width, PILOT_VALUES)
            pitch = call.shared * width // values  # from all over the row: its ends may be a border
            for f in range(steps):
                for g in range(group):
                    its = (f * group + g) * call.shared * call.inner
                    for i in range(values):
                        guesses[g] += number(x, its + i * pitch)
            count += steps * values
    for g in range(0, group, LANES):
        store(guesses, g, load(guesses, g) / real(count))


@loop
def guess_counting(call, first, last, channel, group, buffer, guesses, stored):
    """Set a guess where only some values count, from the first PILOT_VALUES of them that there are."""
    out_of_line()
    real = wide(stored)
    fill(guesses, group, real(0.0))
    count = 0
    for row in range(first, last):
        step, piece = locate(call, row)
        steps, width = extent(call, step, piece)
        bits = row_bits(call, row, stored)
        if none_counts(bits, steps * width * group):
            continue
        x = row_of(call, call.x, call.at_x, step, piece, channel, group, buffer, stored)
        for f in range(steps):
            for i in range(width):
                j = f * group * width + i
                if count < PILOT_VALUES and lanes(bits, j) & 1 != 0:
                    for g in range(group):
                        guesses[g] += number(x, j + g * width)
                    count += 1
        if count == PILOT_VALUES:
            break
    for g in range(0, group if count > 0 else 0, LANES):
        store(guesses, g, load(guesses, g) / real(count))


def guess_means(call, first, last, channel, group, buffer, guesses, stored):
    """Set a guess at the mean of each channel of a tile, from a few of its values that count."""
    raise NotImplementedError("exists in compiled code only")


@by_type(guess_means)
def _guess_means(call, first, last, channel, group, buffer, guesses, stored):
    guess = guess_counting if way_of(stored).masked else guess_all

    def of_some(call, first, last, channel, group, buffer, guesses, stored):
        guess(call, first, last, channel, group, buffer, guesses, stored)

    return of_some


@loop
def chunk_stats(call, chunk, channel, group, tile, buffer, stored):
    """Statistics of one chunk of one tile into its place among the partials.

    Each block is looked at once: x is summed exactly, and (x - guess)² along with it, the guess being
    the mean of what came before. Where that guess was too far off for a channel, and only there, the
    squares are taken again around the block's own mean. Meanwhile `tile`, another one, is written.
    """
    real = wide(stored)
    # Long channels are summed one by one, each into LANES columns, or a whole set of them.
    single = call.single == 1
    width = LANES if single else call.inner
    sums_mask = 0 if single else -1
    shared = call.shared
    channels, group = group, group // shared
    span = call.fold * group * width
    known = partials_of(call, chunk, channel // shared)
    guesses = scratch(ROOM, real)  # of columns
    guess_of = scratch(ROOM, real)  # of channels
    sums = scratch(ROOM, np.float64)
    lost = scratch(ROOM, np.float64)
    squares = scratch(ROOM, np.float64)
    squares_lost = scratch(ROOM, np.float64)
    again = scratch(ROOM, np.float64)
    columns = scratch(ROOM, np.float64)
    trust = scratch(ROOM, np.int64)

    begin, end = chunk_rows(call, chunk)
    guess_means(call, begin, end, channel, group, buffer, guess_of, stored)
    for first in range(begin, end, call.block):
        last = min(end, first + call.block)
        count = float(values_before(call, last, stored) - values_before(call, first, stored)) * shared
        fill(sums, span, 0.0)
        fill(squares, span, 0.0)
        fill(lost, span, 0.0)
        fill(squares_lost, span, 0.0)
        column_guesses = to_columns(call, group, width, guess_of, guesses)
        state = Look(
            column_guesses, (sums, lost), (squares, squares_lost), call.one, call.ahead, call.bits_mask
        )
        look_down(call, first, last, channel, channels, buffer, state, sums_mask, tile, stored)
        if count == 0.0:
            continue
        to_channels(call, group, width, sums, lost, real)
        to_channels(call, group, width, squares, squares_lost, real)
        bad = False
        for g in range(0, group, LANES):
            mean, rest = mean_of(load(sums, g), load(lost, g), count)
            guess = widen(load(guess_of, g))
            off = (mean - guess) + rest
            offset = off * off * count
            good = trusted(count, load(squares, g), offset, guess, real)
            trust[g] = good
            bad = bad or good | (-1 << min(LANES, group - g)) != -1
            store(sums, g, mean)
            store(lost, g, rest)
            store(squares, g, load(squares, g) - offset + load(squares_lost, g))
        if bad:
            fill(again, span, 0.0)
            fill(squares_lost, span, 0.0)
            state = to_columns(call, group, width, sums, columns), (again, squares_lost)
            square_down(call, first, last, channel, channels, buffer, state, sums_mask, stored)
            to_channels(call, group, width, again, squares_lost, real)
            for g in range(0, group, LANES):
                anew = about_mean(load(again, g) + load(squares_lost, g), load(lost, g), count)
                store(squares, g, choose(trust[g], load(squares, g), anew))
        before = float(values_before(call, first, stored) - values_before(call, begin, stored)) * shared
        for g in range(0, group, LANES):
            here = min(LANES, group - g)
            new = load(sums, g), load(lost, g), load(squares, g), splat(0.0)
            if before > 0.0:
                new = merge(before, load_partials(call, known, g, here), count, new)
            store_partials(call, known, g, new, here)
            store(guess_of, g, narrow(new[0], real))


@loop
def pool_chunks(call, first, last, stored):
    """Merge the partials of the channels first … last - 1, in the order of the chunks; or of sets of them.

    The mean goes to its place among the statistics and so does the variance; the mean's low part
    goes to invstd's for the time being.
    """
    stats = pointer(call.channel_stats, np.float64)
    apart = call.channels // call.shared
    for c in range(first, last, LANES):
        here = min(LANES, last - c)
        nothing = splat(0.0)
        known = nothing, nothing, nothing, nothing
        count = 0.0
        for chunk in range(call.chunks):
            begin, end = chunk_rows(call, chunk)
            more = float(values_before(call, end, stored) - values_before(call, begin, stored)) * call.shared
            if more == 0.0:
                continue
            new = load_partials(call, partials_of(call, chunk, c), 0, here)
            known = new if count == 0.0 else merge(count, known, more, new)
            count += more
        mean, rest, m2, lost = known
        m2 = m2 + lost
        store_first(stats, c, mean, here)
        store_first(stats, apart + c, variance(m2, count), here)
        store_first(stats, 2 * apart + c, rest, here)


@loop
def pool_sets(call, first, last):
    """Merge the statistics of the channels of the sets first … last - 1, in their order."""
    channels = pointer(call.channel_stats, np.float64)
    stats = pointer(call.stats, np.float64)
    sets, pool, each = call.channels // call.pool, call.pool, call.count
    for s in range(first, last, LANES):
        here = min(LANES, last - s)
        nothing = splat(0.0)
        known = nothing, nothing, nothing, nothing
        for c in range(pool):
            its_mean = load_apart(channels, s * pool + c, pool, here)
            its_var = load_apart(channels, call.channels + s * pool + c, pool, here)
            its_rest = load_apart(channels, 2 * call.channels + s * pool + c, pool, here)
            new = its_mean, its_rest, its_var * each, nothing
            known = new if c == 0 else merge(c * each, known, each, new)
        mean, rest, m2, lost = known
        store_first(stats, s, mean, here)
        store_first(stats, sets + s, variance(m2 + lost, pool * each), here)
        store_first(stats, 2 * sets + s, rest, here)


@loop
def set_tables(call, c, here, what, known, stored):
    """Set what the channels from c on, `here` of them, are written with.

    That is what(call, tables, c, here, known, real), of vectors of what is known of them.
    """
    in_line()
    what(call, pointer(call.tables, wide(stored)), c, here, known, wide(stored))
    set_precise_tables(call, c, here, what, known, stored)


@loop
def set_table(call, tables, number, c, value, here):
    """Set one table of some channels; the first ones stand behind the last again, for a vector of both."""
    at = number * call.room
    store_first(tables, at + c, value, here)
    if c == 0:
        store_first(tables, at + call.channels, value, here)


@loop
def for_normalize(call, tables, c, here, known, real):
    """What `normalize` needs of some channels."""
    mean, rest, invstd, weight, bias = known
    mean, scale, shift = normalization(mean, rest, weight * invstd, bias, real)
    set_table(call, tables, plain(0), c, mean, here)
    set_table(call, tables, plain(1), c, scale, here)
    set_table(call, tables, plain(2), c, shift, here)


@loop
def set_normalization(call, c, here, mean, rest, invstd, stored):
    """Set what the channels from c on, `here` of them, are normalized with."""
    in_line()
    weight, bias = affines_of(call, c, here, stored)
    set_tables(call, c, here, for_normalize, (mean, rest, invstd, weight, bias), stored)


@loop
def finish_channels(call, first, last, stored):
    """From partials to mean, var, invstd and the tables of normalization."""
    pool_chunks(call, first // call.shared, last // call.shared, stored)
    finish_pooled(call, first, last, stored)


@loop
def finish_pooled(call, first, last, stored):
    """The same from mean, var and the mean's low part, in invstd's place."""
    if call.pool > 1:
        invoke(call.finish, first // call.pool, last // call.pool, address(call))
        return
    for c in range(first, last, LANES):
        here = min(LANES, last - c)
        mean, rest, invstd = finished(call, c, here)
        set_normalization(call, c, here, mean, rest, invstd, stored)


@loop
def finished(call, s, here):
    """From mean, var and the mean's low part, in invstd's place, to that; of some sets.

    Return the mean, its low part and invstd.
    """
    stats, sets = pointer(call.stats, np.float64), call.channels // call.pool
    mean, var = load_first(stats, s, here), load_first(stats, sets + s, here)
    rest = load_first(stats, 2 * sets + s, here)
    if call.centered == 0:
        var = mean_square(var, mean)
        mean = rest = splat(0.0)
        store_first(stats, s, mean, here)
        store_first(stats, sets + s, var, here)
    invstd = inverse_deviation(var, call.eps)
    store_first(stats, 2 * sets + s, invstd, here)
    return mean, rest, invstd


@loop
def finish_several(call, begin, end, stored):
    """As `finish_channels`, from the statistics of sets of several channels."""
    stats, sets = pointer(call.stats, np.float64), call.channels // call.pool
    rests = scratch(LANES, np.float64)
    for first in range(begin, end, LANES):
        last = min(end, first + LANES)
        _, rest, _ = finished(call, first, last - first)
        store(rests, 0, rest)
        for s in range(first, last):
            mean, rest, invstd = splat(stats[s]), splat(rests[s - first]), splat(stats[2 * sets + s])
            for c in range(s * call.pool, (s + 1) * call.pool, LANES):
                here = min(LANES, (s + 1) * call.pool - c)
                set_normalization(call, c, here, mean, rest, invstd, stored)


@kernel
def finish_sets(first, last, call_at, stored):
    """The same, from those of the channels, where they are not the sets' already. Tasks: sets."""
    call = read(call_at)
    if call.pool > call.shared:
        pool_sets(call, first, last)
    finish_several(call, first, last, stored)


@kernel
def update_running_stats(first, last, call_at, stored):
    """Of all channels, after all that reads a running statistic or writes what may lie over one. One task."""
    call = read(call_at)
    stats = pointer(call.stats, np.float64)
    count = call.count
    for c in range(call.channels):
        if call.mean.address != 0:
            mean = running(parameter(call.mean, c, 0.0), stats[c], call.momentum)
            set_parameter(call.mean, c, mean)
        if call.var.address != 0:
            var = unbiased(stats[call.channels + c], count, call.correction)
            set_parameter(call.var, c, running(parameter(call.var, c, 0.0), var, call.momentum))


@kernel
def forward(first, last, call_at, stored):
    """Training forward, resident. Tasks: groups of channels, or sets of several.

    While the statistics of one are taken, the one before is written.
    """
    call = read(call_at)
    real = wide(stored)
    tables = scratch(TABLES_ROOM, real)
    buffer = row_buffers(ROWS, stored)
    nothing = no_tile(tables)
    for task in range(first, last):
        parts = parts_of(call, task)
        for part in range(parts):
            tile = tile_before(call, task, part, 3, tables, real) if task > first else nothing
            channel, group = group_of(call, task * call.tiles + part)
            for chunk in range(call.chunks):
                chunk_stats(call, chunk, channel, group, tile, buffer, stored)
        for part in range(parts if task > first else call.tiles, call.tiles):
            tile = tile_before(call, task, part, 3, tables, real)
            write_normalized_rows(call, plain(0), call.rows, tile, buffer, stored)
        begin, end = set_at(call, task)
        finish_channels(call, begin, end, stored)
    for part in range(parts_of(call, last - 1)):
        tile = tile_before(call, last, part, 3, tables, real)
        write_normalized_rows(call, plain(0), call.rows, tile, buffer, stored)
    if call.stream == 1:
        fence()
    if call.updates != 0:
        invoke(call.updates, 0, 1, address(call))  # there is no other share


@loop
def turn(its, buffer, strides):
    """Make a record that of a call about what lies in a buffer, in rows of an element of each channel."""
    strides[0] = its.group * size_of(buffer)
    its.dims = 1
    its.stream = 0
    its.ahead = 0
    for operand in (its.at_x, its.at_grad_out, its.at_out, its.at_second):
        operand.channel = size_of(buffer)
        operand.strides = address(strides)
        operand.gather = TOGETHER


@loop
def turned_in(call, base, operand, channel, group, buffer):
    """Copy a tile of an array to a buffer.

    Return where the array would begin that the tile in the buffer is of, and how far from there the next
    tile is, which is to be asked for meanwhile.
    """
    copy_rows(call.gather, call, base, operand, plain(0), call.rows, channel, group, buffer, call.group)
    ahead = base + (channel + group) * operand.channel - address(buffer)
    return address(buffer) - channel * size_of(buffer), ahead


@loop
def turned_back(call, channel, group, buffer):
    """Copy a tile of the result back."""
    copy_rows(
        call.scatter, call, call.out, call.at_out, plain(0), call.rows, channel, group, buffer, call.group
    )


@kernel
def forward_turned(first, last, call_at, stored):
    """Training forward of short channels. Tasks: groups of them.

    A group is copied to a buffer, where a row has an element of each channel, and its results are copied
    back: so LANES channels are looked at, and finished, at once, and no lanes are added up.
    """
    call = read(call_at)
    real = wide(stored)
    tables = scratch(TABLES_ROOM, real)
    buffer = row_buffers(ROWS, stored)
    strides = scratch(1, np.int64)
    its = copied(call)
    turn(its, buffer, strides)
    nothing = no_tile(tables)
    for task in range(first, last):
        channel, group = group_of(call, task)
        its.x, its.ahead = turned_in(call, call.x, call.at_x, channel, group, buffer)
        its.second = its.x
        its.out = its.x
        for chunk in range(call.chunks):
            chunk_stats(its, chunk, channel, group, nothing, buffer, stored)
        finish_channels(its, channel, channel + group, stored)
        tile = tile_of(its, channel, group, 3, tables, real)
        write_normalized_rows(its, plain(0), call.rows, tile, buffer, stored)
        turned_back(call, channel, group, buffer)
    if call.updates != 0:
        invoke(call.updates, 0, 1, address(call))  # there is no other share


@kernel
def forward_short(first, last, call_at, stored):
    """Training forward of sets that are one short row each. Tasks: LANES of them."""
    call = read(call_at)
    real = wide(stored)
    tables = scratch(TABLES_ROOM, real)
    buffer = row_buffers(ROWS, stored)
    runs = call.runs == 1
    for task in range(first, last):
        begin, end = set_at(call, task)
        short_stats(call, begin // call.shared, end // call.shared, stored)
        finish_pooled(call, begin, end, stored)
        if runs:
            normalize_plane(call, plain(0), begin, end, stored)
            continue
        for channel in range(begin, end, call.group):
            tile = tile_of(call, channel, min(call.group, end - channel), 3, tables, real)
            write_normalized_rows(call, plain(0), call.rows, tile, buffer, stored)
    if call.stream == 1:
        fence()
    if call.updates != 0:
        invoke(call.updates, 0, 1, address(call))  # there is no other share


@kernel
def collect_stats(first, last, call_at, stored):
    """Statistics of tiles into the partials. Tasks: chunks × groups."""
    call = read(call_at)
    nothing = no_tile(pointer(call.tables, wide(stored)))
    buffer = row_buffers(ROWS, stored)
    for task in range(first, last):
        channel, group = group_of(call, task % call.groups)
        chunk_stats(call, task // call.groups, channel, group, nothing, buffer, stored)


@kernel
def finish_stats(first, last, call_at, stored):
    """Partials into mean, var, invstd and the tables. Tasks: blocks of LANES sets."""
    call = read(call_at)
    block = LANES * call.pool
    finish_channels(call, first * block, min(last * block, call.channels), stored)


@kernel
def pool_stats(first, last, call_at, stored):
    """Partials into mean, var and the mean's low part, in invstd's place. Tasks: blocks of LANES channels."""
    call = read(call_at)
    pool_chunks(call, first * LANES, min(last * LANES, call.channels), stored)


@kernel
def use_stats(first, last, call_at, stored):
    """Those of sets into invstd and the tables of their channels. Tasks: blocks of LANES sets."""
    call = read(call_at)
    finish_several(call, first * LANES, min(last * LANES, call.channels // call.pool), stored)


@kernel
def use_running_stats(first, last, call_at, stored):
    """The tables from the running statistics, for evaluation. Tasks: blocks of LANES channels."""
    call = read(call_at)
    for c in range(first * LANES, min(last * LANES, call.channels), LANES):
        here = min(LANES, call.channels - c)
        invstd = inverse_deviation(several(call.var, c, here, call.channels, 1.0), call.eps)
        mean = several(call.mean, c, here, call.channels, 0.0)
        set_normalization(call, c, here, mean, splat(0.0), invstd, stored)


@kernel
def normalize(first, last, call_at, stored):
    """Tasks: slabs of rows × groups, in the order of memory."""
    call = read(call_at)
    real = wide(stored)
    tables = scratch(TABLES_ROOM, real)
    buffer = row_buffers(ROWS, stored)
    for task in range(first, last):
        channel, group = group_of(call, task % call.groups)
        tile = tile_of(call, channel, group, 3, tables, real)
        slab = task // call.groups * call.slab
        until = min(call.rows, slab + call.slab)
        write_normalized_rows(call, slab, until, tile, buffer, stored)
    if call.stream == 1:
        fence()


@loop
def splat_tables(row, tables, channel, room):
    """What one channel is normalized with, in every lane, as `nbbn.cpu.results.tables_of_x` has it."""
    shift = splat(tables[2 * room + channel])
    return splat(tables[channel]), splat(tables[room + channel]), shift, shift_doubt(row, shift)


@loop
def normalize_run(call, channel, last, row, out, real):
    """Normalize and write the channels channel … last - 1 of one outer step, which lie side by side.

    They are written as one run of whole lines; a vector that several channels share is normalized with
    the numbers of each.
    """
    tables = pointer(call.tables, real)
    place = plain(0), call.channels, call.inner
    numbers = splat_tables(row, tables, channel, call.room)
    j = channel * call.inner
    row = repeated_after(row, j)
    end = last * call.inner
    border = j + call.inner  # where the next channel begins
    streaming = call.stream_planes == 1 and address(out) % size_of(out) == 0
    line = line_of(out)
    while j < end:
        here = line_from(out, j) - j
        whole = here == 0 or not streaming
        if not whole or j + line > border:
            here = min(end - j, here if 0 < here < LANES else LANES)
            value = normalized_at(call, place, row, j, j + here, numbers)
            while border < j + here:
                channel += 1
                numbers = splat_tables(row, tables, channel, call.room)
                row = repeated_after(row, call.inner)
                more = normalized_at(call, place, row, j, j + here, numbers)
                value = choose((1 << (border - j)) - 1, value, more)
                border += call.inner
            if here < LANES:
                store_first(out, j, value, here)
            elif streaming and whole:
                stream(out, j, value)
            else:
                store(out, j, value)
            j += here
        else:
            while j + line <= border:
                ask_for_x(row, j)
                write_normalized(call, place, out, row, j, numbers, numbers, streaming)
                j += line


@loop
def normalize_plane(call, step, channel, last, stored):
    """Normalize and write the channels channel … last - 1 of one outer step, which lie side by side."""
    x = pointer(row_address(call, call.x, call.at_x, step, 0, 0), stored)
    second = pointer(row_address(call, call.second, call.at_second, step, 0, 0), stored)
    out = pointer(row_address(call, call.out, call.at_out, step, 0, 0), stored)
    row = operands(call, second, x, step_bits(call, step, stored), 0, stored)
    normalize_run(call, channel, last, row, out, wide(stored))


@kernel
def normalize_planes(first, last, call_at, stored):
    """The same where all channels of an outer step lie side by side. Tasks: channels of outer steps.

    So it is written in the order of memory, and no tables are spread over columns.
    """
    call = read(call_at)
    plane = first
    while plane < last:
        step = plane // call.channels
        channel = plane % call.channels
        until = min(call.channels, channel + last - plane)
        normalize_plane(call, step, channel, until, stored)
        plane += until - channel
    if call.stream_planes == 1:
        fence()


@loop
def repeated_tables(call, number, repeated, real):
    """Return tables that begin again after call.period columns, a vector more to read beyond; how far apart.

    They are made in `repeated`, or are those of the channels where all vectors are of different ones.
    """
    out_of_line()
    tables = pointer(call.tables, real)
    if call.period == call.channels:
        return tables, call.room
    for k in range(number):
        table = after(repeated, k * ROOM)
        c = 0
        for column in range(call.once):
            table[column] = tables[k * call.room + c]
            c = 0 if c + 1 == call.channels else c + 1
        for column in range(call.once, call.period + LANES, LANES):
            store(table, column, load(table, column - call.once))
    return repeated, ROOM


@kernel
def normalize_columns(first, last, call_at, stored):
    """The same where channels lie side by side, and so do outer steps. Tasks: outer steps."""
    call = read(call_at)
    real = wide(stored)
    tables = repeated_tables(call, 3, scratch(TABLES_ROOM, real), real)
    streaming = (call.stream if call.training == 1 else call.stream_planes) == 1
    write_normalized_run(call, first, last, tables, streaming, stored)
    if streaming:
        fence()


# --- backward --------------------------------------------------------------------------------------


@loop
def chunk_gradients(call, chunk, channel, group, tile, buffer, stored):
    """Σ dy and Σ dy · (x - mean) of one chunk of one tile into its place among the partials.

    Or, where one chunk is all and they are the gradients of parameters, into those' place.

    Meanwhile `tile`, another one, is written.
    """
    real = wide(stored)
    single = call.single == 1
    width = LANES if single else call.inner
    sums_mask = 0 if single else -1
    span = call.fold * group * width
    partials = partials_of(call, chunk, channel)
    mean_of_channel = scratch(ROOM, np.float64)
    sums = scratch(ROOM, np.float64)
    lost = scratch(ROOM, np.float64)
    products = scratch(ROOM, np.float64)
    products_lost = scratch(ROOM, np.float64)
    for g in range(group):
        mean_of_channel[g] = mean_of_row(call, channel + g, stored)
    means = to_columns(call, group, width, mean_of_channel, scratch(ROOM, np.float64))
    begin, end = chunk_rows(call, chunk)
    fill(sums, span, 0.0)
    fill(lost, span, 0.0)
    fill(products, span, 0.0)
    fill(products_lost, span, 0.0)
    tables, spread = scratch(NUMBERS_ROOM, real), scratch(NUMBERS_ROOM, real)
    before = before_activation(call, channel, group, width, tables, spread, stored)
    numbers = scratch(ROWS, np.float64)
    state = look_at_both(call, means, (sums, lost), (products, products_lost), before, numbers, real)
    look_down_both(call, begin, end, channel, group, buffer, state, sums_mask, tile, stored)
    to_channels(call, group, width, sums, lost, real)
    to_channels(call, group, width, products, products_lost, real)
    if across(stored) and call.chunks == 1:  # nothing to be added to: as `pool_gradients` leaves them
        gradients = after(pointer(call.channel_stats, np.float64), channel)
        for g in range(0, group, LANES):
            here = min(LANES, group - g)
            store_first(gradients, g, load(products, g) + load(products_lost, g), here)
            store_first(gradients, call.channels + g, load(sums, g) + load(lost, g), here)
        return
    for g in range(0, group, LANES):
        here = min(LANES, group - g)
        new = load(sums, g), load(lost, g), load(products, g), load(products_lost, g)
        store_partials(call, partials, g, new, here)


@loop
def pool_gradients(call, first, last):
    """Add up the partials of the channels first … last - 1, in the order of the chunks.

    Σ dy goes to grad_bias's place, Σ dy · (x - mean) to grad_weight's for the time being.
    """
    stats = pointer(call.channel_stats, np.float64)
    for c in range(first, last, LANES):
        here = min(LANES, last - c)
        total = splat(0.0), splat(0.0)
        product = splat(0.0), splat(0.0)
        for chunk in range(call.chunks):
            more = load_partials(call, partials_of(call, chunk, c), 0, here)
            total = add_to(total, more[0], more[1])
            product = add_to(product, more[2], more[3])
        store_first(stats, c, product[0] + product[1], here)
        store_first(stats, call.channels + c, total[0] + total[1], here)


@loop
def finish_gradients(call, first, last, stored):
    """From partials to the gradients of each channel's parameters, and the tables of grad_x."""
    pool_gradients(call, first, last)
    finish_pooled_gradients(call, first, last, stored)


@loop
def finish_pooled_gradients(call, first, last, stored):
    """The same from Σ dy and Σ dy · (x - mean), in the places of the gradients."""
    gradients = pointer(call.channel_stats, np.float64)
    if call.pool > 1:
        invoke(call.finish, first // call.pool, last // call.pool, address(call))
        return
    for c in range(first, last, LANES):
        here = min(LANES, last - c)
        mean = several(call.mean, c, here, call.channels, 0.0)
        invstd = several(call.var, c, here, call.channels, 1.0)
        product, total = (
            load_first(gradients, c, here) * invstd,
            load_first(gradients, call.channels + c, here),
        )
        store_first(gradients, c, product, here)
        if call.centered == 0:
            total = splat(0.0)
        weight, _ = affines_of(call, c, here, stored)
        scale = weight * invstd
        known = mean, invstd, scale, scale, product, total, call.count
        set_tables(call, c, here, for_apply, known, stored)


@loop
def folded(total):
    """Return the lanes' sum, of what was added up and what that lost."""
    high, small = fold(total[0])
    low, _ = fold(total[1])
    return high + (low + small)


@kernel
def finish_set_gradients(first, last, call_at, stored):
    """The same of sets of several channels: their weights are in the sums that they have in common.

    Tasks: sets.
    """
    call = read(call_at)
    for s in range(first, last):
        set_gradients(call, s, stored)


@loop
def set_gradients(call, s, stored):
    """From the sums of a set's channels to the gradients of their parameters, and the tables of grad_x."""
    gradients = pointer(call.channel_stats, np.float64)
    mean, invstd = parameter(call.mean, s, 0.0), parameter(call.var, s, 1.0)
    total, product = (splat(0.0), splat(0.0)), (splat(0.0), splat(0.0))
    begin, end = s * call.pool, (s + 1) * call.pool
    for c in range(begin, end, LANES):
        here = min(LANES, end - c)
        weight, _ = affines_of(call, c, here, stored)
        its = load_first(gradients, c, here) * invstd
        store_first(gradients, c, its, here)
        product = plus_product(product[0], product[1], weight, its, np.float64)
        its = load_first(gradients, call.channels + c, here)
        total = plus_product(total[0], total[1], weight, its, np.float64)
    product, total = folded(product), folded(total)
    if call.centered == 0:
        total = 0.0
    mean, factor = splat(mean), splat(invstd)
    product, total = splat(product), splat(total)
    for c in range(begin, end, LANES):
        here = min(LANES, end - c)
        weight, _ = affines_of(call, c, here, stored)
        known = mean, factor, weight * factor, factor, product, total, call.count * call.pool
        set_tables(call, c, here, for_apply, known, stored)


@loop
def for_apply(call, tables, c, here, known, real):
    """What `backward_apply` needs of some channels.

    Or, where the statistics are constants, `apply_constant`; or `normalize` of dy, as grad_x = scale · dy.
    """
    mean, invstd, scale, factor, grad_weight, grad_bias, count = known
    rounded = quieted(mean, real)
    lost = mean - widen(rounded)
    unit = power_of_two(invstd, LARGEST_UNIT64 if exact(real) else LARGEST_UNIT32)
    slope, offset = gradient_parameters(factor, lost, grad_bias, grad_weight, invstd, unit, count)
    third = quieted(slope, real)
    if call.activates == 1:
        bias = several(call.bias, c, here, call.parameters, 0.0)
        shift = quieted(shift_of(bias, lost, scale), real)
        set_table(call, tables, plain(5), c, shift, here)
        if call.training == 0:
            third = shift
    elif call.training == 0:
        rounded = third = splat(real(0.0))
    set_table(call, tables, plain(0), c, rounded, here)
    set_table(call, tables, plain(1), c, quieted(scale, real), here)
    set_table(call, tables, plain(2), c, third, here)
    set_table(call, tables, plain(3), c, quieted(offset, real), here)
    set_table(call, tables, plain(4), c, narrow(unit, real), here)


@kernel
def backward(first, last, call_at, stored):
    """Training backward, resident. Tasks and writing as in `forward`."""
    call = read(call_at)
    real = wide(stored)
    tables = scratch(TABLES_ROOM, real)
    buffer = row_buffers(ALL_ROWS, stored)
    nothing = no_tile(tables)
    count = gradient_tables(stored)
    for task in range(first, last):
        parts = parts_of(call, task)
        for part in range(parts):
            tile = tile_before(call, task, part, count, tables, real) if task > first else nothing
            channel, group = group_of(call, task * call.tiles + part)
            for chunk in range(call.chunks):
                chunk_gradients(call, chunk, channel, group, tile, buffer, stored)
        for part in range(parts if task > first else call.tiles, call.tiles):
            tile = tile_before(call, task, part, count, tables, real)
            write_gradient_rows(call, plain(0), call.rows, tile, buffer, stored)
        begin, end = set_at(call, task)
        finish_gradients(call, begin, end, stored)
    for part in range(parts_of(call, last - 1)):
        tile = tile_before(call, last, part, count, tables, real)
        write_gradient_rows(call, plain(0), call.rows, tile, buffer, stored)
    if call.stream == 1:
        fence()


@kernel
def backward_turned(first, last, call_at, stored):
    """Training backward of short channels. Tasks and copies as in `forward_turned`."""
    call = read(call_at)
    real = wide(stored)
    tables = scratch(TABLES_ROOM, real)
    buffer = row_buffers(ALL_ROWS, stored)
    of_dy = after(buffer, ROWS * row_room(buffer))
    strides = scratch(1, np.int64)
    its = copied(call)
    turn(its, buffer, strides)
    nothing = no_tile(tables)
    count = gradient_tables(stored)
    for task in range(first, last):
        channel, group = group_of(call, task)
        its.x, its.ahead = turned_in(call, call.x, call.at_x, channel, group, buffer)
        its.grad_out, its.ahead_of_dy = turned_in(
            call, call.grad_out, call.at_grad_out, channel, group, of_dy
        )
        its.second = its.grad_out
        its.out = its.grad_out
        for chunk in range(call.chunks):
            chunk_gradients(its, chunk, channel, group, nothing, buffer, stored)
        finish_gradients(its, channel, channel + group, stored)
        tile = tile_of(its, channel, group, count, tables, real)
        write_gradient_rows(its, plain(0), call.rows, tile, buffer, stored)
        turned_back(call, channel, group, of_dy)


@kernel
def backward_short(first, last, call_at, stored):
    """Training backward of channels that are one short row each. Tasks: some times LANES of them."""
    call = read(call_at)
    real = wide(stored)
    tables = scratch(TABLES_ROOM, real)
    buffer = row_buffers(ALL_ROWS, stored)
    count = gradient_tables(stored)
    for task in range(first, last):
        begin, end = set_at(call, task)
        for c in range(begin, end, call.together):
            until = min(end, c + call.together)
            short_gradients(call, c, until, buffer, stored)
            finish_pooled_gradients(call, c, until, stored)
            add_columns_of(call, task, c == begin, c, until, stored)
            for channel in range(c, until, call.group):
                tile = tile_of(call, channel, min(call.group, until - channel), count, tables, real)
                write_gradient_rows(call, plain(0), call.rows, tile, buffer, stored)
    if call.stream == 1:
        fence()


@kernel
def backward_reduce(first, last, call_at, stored):
    """Tasks: chunks × groups."""
    call = read(call_at)
    nothing = no_tile(pointer(call.tables, wide(stored)))
    buffer = row_buffers(ALL_ROWS, stored)
    for task in range(first, last):
        channel, group = group_of(call, task % call.groups)
        chunk_gradients(call, task // call.groups, channel, group, nothing, buffer, stored)


@kernel
def finish_backward(first, last, call_at, stored):
    """Partials into grad_weight, grad_bias and the tables. Tasks: blocks of LANES sets."""
    call = read(call_at)
    block = LANES * call.pool
    finish_gradients(call, first * block, min(last * block, call.channels), stored)


@kernel
def finish_across(first, last, call_at, stored):
    """Partials into the gradients of each column's parameters. Tasks: blocks of LANES columns."""
    call = read(call_at)
    pool_gradients(call, first * LANES, min(last * LANES, call.channels))


@kernel
def sum_parameters(first, last, call_at, stored):
    """The gradients of parameters that several channels, or several calls, have. Tasks: parameters."""
    call = read(call_at)
    of_channels = pointer(call.channel_stats, np.float64)
    gradients = pointer(call.stats, np.float64)
    kept = after(gradients, 2 * call.parameters)
    for row in range(2):
        for p in range(first, last, LANES):
            here = min(LANES, last - p)
            at = row * call.parameters + p
            total, lost = splat(0.0), splat(0.0)
            if call.adds == 2:
                total, lost = load_first(gradients, at, here), load_first(kept, at, here)
            for c in range(p, call.channels, call.parameters):
                total, more = two_sum(total, load_first(of_channels, row * call.channels + c, here))
                lost = lost + more
            total, lost = two_sum(total, lost)
            store_first(gradients, at, total, here)
            if call.adds > 0:
                store_first(kept, at, lost, here)


@kernel
def set_mask(first, last, call_at, stored):
    """The bits of rows, and how many values each has that count.

    Tasks: rows; steps of several pieces; or blocks of rows of several steps of one position.
    """
    call = read(call_at)
    if call.inner == 1 and call.fold > 1:
        spread = scratch(256, np.int64)
        if call.channels <= SPREAD_CHANNELS:
            spread_bits(call.channels, spread)
        for task in range(first, last):
            row = task * call.block
            set_bits_of_steps(call, row, min(row + call.block, call.rows), spread)
        return
    for task in range(first, last):
        if call.inner == 1:
            set_bit_of_step(call, task)
        else:
            set_bits(call, task)


@kernel
def add_up_counts(first, last, call_at, stored):
    """From how many values of each row count to how many come before each. One task."""
    call = read(call_at)
    counts = pointer(call.counts, np.int64)
    counts[0] = 0
    for row in range(call.rows):
        counts[row + 1] += counts[row]


@kernel
def set_along(first, last, call_at, stored):
    """The table of weights and biases, where they go along rows. Tasks: LINE elements of it."""
    call = read(call_at)
    spread_along(call, first * LINE, min(last * LINE, call.along_room), stored)


@kernel
def backward_apply(first, last, call_at, stored):
    """Tasks: slabs of rows × groups, in the order of memory."""
    call = read(call_at)
    real = wide(stored)
    tables = scratch(TABLES_ROOM, real)
    buffer = row_buffers(ROWS, stored)
    for task in range(first, last):
        channel, group = group_of(call, task % call.groups)
        tile = tile_of(call, channel, group, gradient_tables(stored), tables, real)
        slab = task // call.groups * call.slab
        until = min(call.rows, slab + call.slab)
        write_gradient_rows(call, slab, until, tile, buffer, stored)
    if call.stream == 1:
        fence()


@kernel
def apply_columns(first, last, call_at, stored):
    """The same where channels lie side by side, and so do outer steps. Tasks: outer steps."""
    call = read(call_at)
    real = wide(stored)
    tables = repeated_tables(call, gradient_tables(stored), scratch(TABLES_ROOM, real), real)
    streaming = call.stream == 1
    write_gradient_run(call, first, last, tables, streaming, stored)
    if streaming:
        fence()


@kernel
def apply_constant(first, last, call_at, stored):
    """As `backward_apply`, through an activation, where the statistics are constants."""
    call = read(call_at)
    real = wide(stored)
    tables = scratch(TABLES_ROOM, real)
    buffer = row_buffers(ROWS, stored)
    for task in range(first, last):
        channel, group = group_of(call, task % call.groups)
        tile = tile_of(call, channel, group, 3, tables, real)
        slab = task // call.groups * call.slab
        until = min(call.rows, slab + call.slab)
        write_constant_rows(call, slab, until, tile, buffer, stored)
    if call.stream == 1:
        fence()


@kernel
def apply_constant_columns(first, last, call_at, stored):
    """As `apply_columns`, through an activation, where the statistics are constants."""
    call = read(call_at)
    real = wide(stored)
    tables = repeated_tables(call, 3, scratch(TABLES_ROOM, real), real)
    streaming = call.stream == 1
    write_constant_run(call, first, last, tables, streaming, stored)
    if streaming:
        fence()
