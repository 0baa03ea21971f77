"""The kernels: the stages of batch normalization, each over a range of tasks.

A task of a *resident* kernel (`forward`, `backward`) is a group of channels whose slice stays in cache
from the statistics to the result: memory is read once. Where a slice is too large, or there are fewer
groups than cores, the same work is done in phases whose tasks are tiles: `collect_stats`,
`finish_stats`, `normalize`. The chunks are the same, so the bits are.
"""

import numpy as np

from nbbn.compiler import kernel, loop, out_of_line
from nbbn.cpu.call import PARTIALS, read
from nbbn.cpu.simd import (
    LANES,
    STREAM_BYTES,
    address,
    after,
    at_most,
    choose,
    fence,
    load,
    load_first,
    narrow,
    plain,
    pointer,
    scratch,
    splat,
    store,
    store_first,
    stream,
    widen,
)
from nbbn.cpu.tiles import (
    ROOM,
    ROWS,
    add_to,
    exact,
    extent,
    fill,
    locate,
    look_down,
    look_down_both,
    position,
    row_address,
    row_of,
    square_down,
    tile_of,
    to_channels,
    to_columns,
    write_gradient_rows,
    write_gradient_run,
    write_normalized_rows,
    write_normalized_run,
)
from nbbn.formulas import (
    about_mean,
    gradient_parameters,
    inverse_deviation,
    mean_of,
    merge,
    normalized,
    power_of_two,
    running,
    shift_of,
    two_sum,
    unbiased,
    variance,
)

ROW_BUFFERS = ROWS * ROOM
TABLES_ROOM = 5 * ROOM
# A guess at a block's mean goes by so many values: one in 10⁸ is too far off, of normal deviates.
PILOT_VALUES = 8
LARGEST = float(np.finfo(np.float64).max)


@loop
def parameter(where, index, missing):
    """Return element `index` of a parameter of either float type, or `missing`."""
    if where.address == 0:
        return missing
    at = where.address + index * where.stride
    if where.size == 8:
        return pointer(at, np.float64)[0]
    return np.float64(pointer(at, np.float32)[0])


@loop
def set_parameter(where, index, value):
    at = where.address + index * where.stride
    if where.size == 8:
        pointer(at, np.float64)[0] = value
    else:
        pointer(at, np.float32)[0] = np.float32(value)


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
def partials_of(call, chunk, channel):
    """Return where a chunk leaves what it knows of a channel; PARTIALS numbers, `channels` apart."""
    return after(pointer(call.partials, np.float64), chunk * PARTIALS * call.channels + channel)


# --- forward ---------------------------------------------------------------------------------------


@loop
def no_tile(tables):
    """Return a tile without channels."""
    return plain(0), plain(0), tables, plain(0), plain(0)


@loop
def trusted(count, squares, offset, real):
    """Return the lanes whose sum of squared deviations from a guess is good to the last bits.

    It is not where the guess was more than twice as far from the mean as the values are (`offset` is
    n · (mean - guess)², and 5 offset > 4 squares), or where the squares left the range of x's type.
    """
    smallest = splat(count * (2.0**-900 if exact(real) else 2.0**-96))
    finite = at_most(squares, splat(LARGEST))
    near = at_most(offset * 1.25, squares) & at_most(smallest, squares) & finite
    constant = at_most(squares, splat(0.0)) & at_most(offset, splat(0.0))
    return near | constant


@loop
def guess_means(call, first, last, channel, group, buffer, guesses, real):
    """Set a guess at the mean of each channel of a tile: that of PILOT_VALUES of them, or of a few more."""
    out_of_line()
    a_row = call.fold * min(call.width, call.inner)
    last = min(last, first + 1 + (PILOT_VALUES - 1) // a_row)
    fill(guesses, group, real(0.0))
    count = 0
    for row in range(first, last):
        step, piece = locate(call, row)
        steps, width = extent(call, step, piece)
        x = row_of(call, call.x, call.at_x, step, piece, channel, group, buffer, real)
        if width == 1:
            for f in range(steps):
                for g in range(0, group, LANES):
                    here = load_first(x, f * group + g, group - g)
                    store(guesses, g, load(guesses, g) + here)
            count += steps
        else:
            values = min(width, PILOT_VALUES)
            pitch = width // values  # from all over the row: its ends may be a border
            for g in range(group):
                for i in range(values):
                    guesses[g] += x[g * width + i * pitch]
            count += values
    for g in range(0, group, LANES):
        store(guesses, g, load(guesses, g) / real(count))


@loop
def chunk_stats(call, chunk, channel, group, tile, buffer, real):
    """Statistics of one chunk of one tile into its place among the partials.

    Each block is looked at once: x is summed exactly, and (x - guess)² along with it, the guess being
    the mean of what came before. Where that guess was too far off for a channel, and only there, the
    squares are taken again around the block's own mean. Meanwhile `tile`, another one, is written.
    """
    # Long channels are summed one by one, each into LANES columns.
    single = call.single == 1
    width = LANES if single else call.inner
    mask = 0 if single else -1
    span = call.fold * group * width
    means = partials_of(call, chunk, channel)
    rests = after(means, call.channels)
    m2s = after(rests, call.channels)
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
    guess_means(call, begin, end, channel, group, buffer, guess_of, real)
    for first in range(begin, end, call.block):
        last = min(end, first + call.block)
        count = float(position(call, last) - position(call, first))
        fill(sums, span, 0.0)
        fill(squares, span, 0.0)
        fill(lost, span, 0.0)
        fill(squares_lost, span, 0.0)
        column_guesses = to_columns(call, group, width, guess_of, guesses)
        state = column_guesses, (sums, lost), (squares, squares_lost), call.one, call.ahead
        look_down(call, first, last, channel, group, buffer, state, mask, tile, real)
        to_channels(call, group, width, sums, lost, real)
        to_channels(call, group, width, squares, squares_lost, real)
        bad = False
        for g in range(0, group, LANES):
            mean, rest = mean_of(load(sums, g), load(lost, g), count)
            off = (mean - widen(load(guess_of, g))) + rest
            offset = off * off * count
            good = trusted(count, load(squares, g), offset, real)
            trust[g] = good
            bad = bad or good | (-1 << min(LANES, group - g)) != -1
            store(sums, g, mean)
            store(lost, g, rest)
            store(squares, g, load(squares, g) - offset + load(squares_lost, g))
        if bad:
            fill(again, span, 0.0)
            fill(squares_lost, span, 0.0)
            state = to_columns(call, group, width, sums, columns), (again, squares_lost)
            square_down(call, first, last, channel, group, buffer, state, mask, real)
            to_channels(call, group, width, again, squares_lost, real)
            for g in range(0, group, LANES):
                anew = about_mean(load(again, g) + load(squares_lost, g), load(lost, g), count)
                store(squares, g, choose(trust[g], load(squares, g), anew))
        before = float(position(call, first) - position(call, begin))
        for g in range(0, group, LANES):
            here = min(LANES, group - g)
            mean = load(sums, g)
            rest = load(lost, g)
            m2 = load(squares, g)
            if first > begin:
                old = load_first(means, g, here), load_first(rests, g, here), load_first(m2s, g, here)
                mean, rest, m2 = merge(before, old[0], old[1], old[2], count, mean, rest, m2)
            store_first(means, g, mean, here)
            store_first(rests, g, rest, here)
            store_first(m2s, g, m2, here)
            store(guess_of, g, narrow(mean, real))


@loop
def pool_chunks(call, first, last):
    """Merge the partials of the channels first … last - 1, in the order of the chunks.

    The mean goes to its place among the statistics and so does the variance; the mean's low part
    goes to invstd's for the time being.
    """
    stats = pointer(call.stats, np.float64)
    for c in range(first, last, LANES):
        here = min(LANES, last - c)
        mean = splat(0.0)
        rest = splat(0.0)
        m2 = splat(0.0)
        lost = splat(0.0)
        nothing = splat(0.0)
        count = 0.0
        for chunk in range(call.chunks):
            begin, end = chunk_rows(call, chunk)
            more = float(position(call, end) - position(call, begin))
            means = partials_of(call, chunk, c)
            rests = after(means, call.channels)
            m2s = after(rests, call.channels)
            new_mean = load_first(means, 0, here)
            new_rest = load_first(rests, 0, here)
            between = nothing
            if chunk == 0:
                mean, rest = new_mean, new_rest
            else:
                mean, rest, between = merge(count, mean, rest, nothing, more, new_mean, new_rest, nothing)
            m2, small = two_sum(m2, load_first(m2s, 0, here))
            lost = lost + small
            m2, small = two_sum(m2, between)
            lost = lost + small
            count += more
        m2 = m2 + lost
        store_first(stats, c, mean, here)
        store_first(stats, call.channels + c, variance(m2, count), here)
        store_first(stats, 2 * call.channels + c, rest, here)


@loop
def set_tables(call, c, mean, rest, invstd, real):
    """What `normalize` needs of channel c."""
    tables = pointer(call.tables, real)
    pad = call.room
    scale = parameter(call.weight, c, 1.0) * invstd
    rounded = real(mean)
    lost = (mean - np.float64(rounded)) + rest
    tables[c] = rounded
    tables[pad + c] = real(scale)
    tables[2 * pad + c] = real(shift_of(parameter(call.bias, c, 0.0), lost, scale))


@loop
def finish_channels(call, first, last, real):
    """From partials to mean, var, invstd and the tables of normalization."""
    pool_chunks(call, first, last)
    stats = pointer(call.stats, np.float64)
    for c in range(first, last):
        rest = stats[2 * call.channels + c]
        invstd = inverse_deviation(stats[call.channels + c], call.eps)
        stats[2 * call.channels + c] = invstd
        set_tables(call, c, stats[c], rest, invstd, real)


@loop
def update_channels(call):
    """Update the running statistics of all channels."""
    out_of_line()
    stats = pointer(call.stats, np.float64)
    count = float(call.outer * call.inner)
    for c in range(call.channels):
        if call.mean.address != 0:
            mean = running(parameter(call.mean, c, 0.0), stats[c], call.momentum)
            set_parameter(call.mean, c, mean)
        if call.var.address != 0:
            var = unbiased(stats[call.channels + c], count, call.correction)
            set_parameter(call.var, c, running(parameter(call.var, c, 0.0), var, call.momentum))


@kernel
def forward(first, last, address, real):
    """Training forward, resident. Tasks: groups of channels.

    While the statistics of a group are taken, the group before is written.
    """
    call = read(address)
    tables = scratch(TABLES_ROOM, real)
    buffer = scratch(ROW_BUFFERS, real)
    tile = no_tile(tables)
    for task in range(first, last):
        channel, group = group_of(call, task)
        for chunk in range(call.chunks):
            chunk_stats(call, chunk, channel, group, tile, buffer, real)
        finish_channels(call, channel, channel + group, real)
        tile = tile_of(call, channel, group, 3, tables, real)
    write_normalized_rows(call, plain(0), call.rows, tile, buffer, real)
    if call.stream == 1:
        fence()
    if call.updates == 1:
        update_channels(call)  # there is no other share


@kernel
def collect_stats(first, last, address, real):
    """Statistics of tiles into the partials. Tasks: chunks × groups."""
    call = read(address)
    buffer = scratch(ROW_BUFFERS, real)
    for task in range(first, last):
        channel, group = group_of(call, task % call.groups)
        chunk_stats(call, task // call.groups, channel, group, no_tile(buffer), buffer, real)


@kernel
def finish_stats(first, last, address, real):
    """Partials into mean, var, invstd and the tables. Tasks: blocks of LANES channels."""
    call = read(address)
    finish_channels(call, first * LANES, min(last * LANES, call.channels), real)


@kernel
def use_running_stats(first, last, address, real):
    """The tables from the running statistics, for evaluation. Tasks: blocks of LANES channels."""
    call = read(address)
    for c in range(first * LANES, min(last * LANES, call.channels)):
        invstd = inverse_deviation(parameter(call.var, c, 1.0), call.eps)
        set_tables(call, c, parameter(call.mean, c, 0.0), 0.0, invstd, real)


@kernel
def normalize(first, last, address, real):
    """Tasks: slabs of rows × groups, in the order of memory."""
    call = read(address)
    tables = scratch(TABLES_ROOM, real)
    buffer = scratch(ROW_BUFFERS, real)
    for task in range(first, last):
        channel, group = group_of(call, task % call.groups)
        tile = tile_of(call, channel, group, 3, tables, real)
        slab = task // call.groups * call.slab
        until = min(call.rows, slab + call.slab)
        write_normalized_rows(call, slab, until, tile, buffer, real)
    if call.stream == 1:
        fence()


@loop
def splat_tables(tables, channel, room):
    """What one channel is normalized with, in every lane."""
    return splat(tables[channel]), splat(tables[room + channel]), splat(tables[2 * room + channel])


@loop
def normalize_run(call, channel, last, x, out, real):
    """Normalize and write the channels channel … last - 1 of one outer step, which lie side by side.

    They are written as one run of whole lines; a vector that several channels share is normalized with
    the numbers of each.
    """
    tables = pointer(call.tables, real)
    room = call.room
    mean, scale, shift = splat_tables(tables, channel, room)
    j = channel * call.inner
    end = last * call.inner
    border = j + call.inner  # where the next channel begins
    size = 8 if exact(real) else 4
    ahead = -(address(out) + j * size) % STREAM_BYTES
    aligned = ahead % size == 0
    streaming = call.stream_planes == 1 and aligned
    here = min(end - j, ahead // size if aligned and ahead > 0 else LANES)
    while j < end:
        if here < LANES or j + LANES > border:
            values = load_first(x, j, here)
            value = normalized(values, mean, scale, shift)
            while border < j + here:
                channel += 1
                mean, scale, shift = splat_tables(tables, channel, room)
                value = choose((1 << (border - j)) - 1, value, normalized(values, mean, scale, shift))
                border += call.inner
            if here < LANES:
                store_first(out, j, value, here)
            elif streaming:
                stream(out, j, value)
            else:
                store(out, j, value)
            j += here
        if streaming:
            while j + LANES <= border:
                stream(out, j, normalized(load(x, j), mean, scale, shift))
                j += LANES
        else:
            while j + LANES <= border:
                store(out, j, normalized(load(x, j), mean, scale, shift))
                j += LANES
        here = min(end - j, LANES)


@kernel
def normalize_planes(first, last, address, real):
    """The same where all channels of an outer step lie side by side. Tasks: channels of outer steps.

    So it is written in the order of memory, and no tables are spread over columns.
    """
    call = read(address)
    plane = first
    while plane < last:
        step = plane // call.channels
        channel = plane % call.channels
        until = min(call.channels, channel + last - plane)
        x = pointer(row_address(call, call.x, call.at_x, step, 0, 0), real)
        out = pointer(row_address(call, call.out, call.at_out, step, 0, 0), real)
        normalize_run(call, channel, until, x, out, real)
        plane += until - channel
    if call.stream_planes == 1:
        fence()


@loop
def repeated_tables(call, number, repeated, real):
    """Return tables that begin again after call.period columns, ROOM apart, a vector more to read beyond."""
    out_of_line()
    tables = pointer(call.tables, real)
    for k in range(number):
        c = 0
        for column in range(call.period + LANES):
            repeated[k * ROOM + column] = tables[k * call.room + c]
            c = 0 if c + 1 == call.channels else c + 1
    return repeated


@kernel
def normalize_columns(first, last, address, real):
    """The same where channels lie side by side, and so do outer steps. Tasks: outer steps."""
    call = read(address)
    tables = repeated_tables(call, 3, scratch(TABLES_ROOM, real), real)
    x = pointer(call.x, real)
    streaming = (call.stream if call.training == 1 else call.stream_planes) == 1
    begin, end = first * call.channels, last * call.channels
    write_normalized_run(pointer(call.out, real), (x, x), begin, end, tables, call.period, streaming, real)
    if streaming:
        fence()


@kernel
def update_running_stats(first, last, address, real):
    """One task, after all that reads a running statistic or writes what may lie over one."""
    update_channels(read(address))


# --- backward --------------------------------------------------------------------------------------


@loop
def chunk_gradients(call, chunk, channel, group, tile, buffer, real):
    """Σ dy and Σ dy · (x - mean) of one chunk of one tile into its place among the partials.

    Meanwhile `tile`, another one, is written.
    """
    single = call.single == 1
    width = LANES if single else call.inner
    mask = 0 if single else -1
    span = call.fold * group * width
    partials = partials_of(call, chunk, channel)
    mean_of_channel = scratch(ROOM, np.float64)
    sums = scratch(ROOM, np.float64)
    lost = scratch(ROOM, np.float64)
    products = scratch(ROOM, np.float64)
    products_lost = scratch(ROOM, np.float64)
    for g in range(group):
        mean_of_channel[g] = parameter(call.mean, channel + g, 0.0)
    means = to_columns(call, group, width, mean_of_channel, scratch(ROOM, np.float64))
    begin, end = chunk_rows(call, chunk)
    fill(sums, span, 0.0)
    fill(lost, span, 0.0)
    fill(products, span, 0.0)
    fill(products_lost, span, 0.0)
    state = means, (sums, lost), (products, products_lost), call.one, call.ahead
    look_down_both(call, begin, end, channel, group, buffer, state, mask, tile, real)
    to_channels(call, group, width, sums, lost, real)
    to_channels(call, group, width, products, products_lost, real)
    for g in range(0, group, LANES):
        here = min(LANES, group - g)
        store_first(partials, g, load(sums, g), here)
        store_first(partials, call.channels + g, load(lost, g), here)
        store_first(partials, 2 * call.channels + g, load(products, g), here)
        store_first(partials, 3 * call.channels + g, load(products_lost, g), here)


@loop
def pool_gradients(call, first, last):
    """Add up the partials of the channels first … last - 1, in the order of the chunks.

    Σ dy goes to grad_bias's place, Σ dy · (x - mean) to grad_weight's for the time being.
    """
    stats = pointer(call.stats, np.float64)
    for c in range(first, last, LANES):
        here = min(LANES, last - c)
        total = splat(0.0), splat(0.0)
        product = splat(0.0), splat(0.0)
        for chunk in range(call.chunks):
            sums = partials_of(call, chunk, c)
            lost = load_first(sums, call.channels, here)
            total = add_to(total, load_first(sums, 0, here), lost)
            lost = load_first(sums, 3 * call.channels, here)
            product = add_to(product, load_first(sums, 2 * call.channels, here), lost)
        store_first(stats, c, product[0] + product[1], here)
        store_first(stats, call.channels + c, total[0] + total[1], here)


@loop
def finish_gradients(call, first, last, real):
    """From partials to grad_weight, grad_bias and the tables of grad_x."""
    pool_gradients(call, first, last)
    stats = pointer(call.stats, np.float64)
    tables = pointer(call.tables, real)
    pad = call.room
    count = float(call.outer * call.inner)
    for c in range(first, last):
        mean = parameter(call.mean, c, 0.0)
        invstd = parameter(call.var, c, 1.0)
        rounded = real(mean)
        lost = mean - np.float64(rounded)
        grad_bias = stats[call.channels + c]
        grad_weight = stats[c] * invstd
        stats[c] = grad_weight
        scale = parameter(call.weight, c, 1.0) * invstd
        unit = power_of_two(invstd)
        slope, offset = gradient_parameters(scale, lost, grad_bias, grad_weight, invstd, unit, count)
        if call.training == 0:
            # The statistics are constants: grad_x = scale · dy, which is `normalize` of dy.
            rounded = real(0.0)
            slope = 0.0
        tables[c] = rounded
        tables[pad + c] = real(scale)
        tables[2 * pad + c] = real(slope)
        tables[3 * pad + c] = real(offset)
        tables[4 * pad + c] = real(unit)


@kernel
def backward(first, last, address, real):
    """Training backward, resident. Tasks: groups of channels, written as in `forward`."""
    call = read(address)
    tables = scratch(TABLES_ROOM, real)
    buffer = scratch(ROW_BUFFERS, real)
    tile = no_tile(tables)
    for task in range(first, last):
        channel, group = group_of(call, task)
        for chunk in range(call.chunks):
            chunk_gradients(call, chunk, channel, group, tile, buffer, real)
        finish_gradients(call, channel, channel + group, real)
        tile = tile_of(call, channel, group, 5, tables, real)
    write_gradient_rows(call, plain(0), call.rows, tile, buffer, real)
    if call.stream == 1:
        fence()


@kernel
def backward_reduce(first, last, address, real):
    """Tasks: chunks × groups."""
    call = read(address)
    buffer = scratch(ROW_BUFFERS, real)
    for task in range(first, last):
        channel, group = group_of(call, task % call.groups)
        chunk_gradients(call, task // call.groups, channel, group, no_tile(buffer), buffer, real)


@kernel
def finish_backward(first, last, address, real):
    """Partials into grad_weight, grad_bias and the tables. Tasks: blocks of LANES channels."""
    call = read(address)
    finish_gradients(call, first * LANES, min(last * LANES, call.channels), real)


@kernel
def backward_apply(first, last, address, real):
    """Tasks: slabs of rows × groups, in the order of memory."""
    call = read(address)
    tables = scratch(TABLES_ROOM, real)
    buffer = scratch(ROW_BUFFERS, real)
    for task in range(first, last):
        channel, group = group_of(call, task % call.groups)
        tile = tile_of(call, channel, group, 5, tables, real)
        slab = task // call.groups * call.slab
        until = min(call.rows, slab + call.slab)
        write_gradient_rows(call, slab, until, tile, buffer, real)
    if call.stream == 1:
        fence()


@kernel
def apply_columns(first, last, address, real):
    """The same where channels lie side by side, and so do outer steps. Tasks: outer steps."""
    call = read(address)
    tables = repeated_tables(call, 5, scratch(TABLES_ROOM, real), real)
    row = pointer(call.grad_out, real), pointer(call.x, real)
    streaming = call.stream == 1
    begin, end = first * call.channels, last * call.channels
    write_gradient_run(pointer(call.out, real), row, begin, end, tables, call.period, streaming, real)
    if streaming:
        fence()
