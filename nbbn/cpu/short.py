"""What is added up of sets, or channels, that are one short row each: it stays in cache from look to look.

So a mean is known before deviations from it are squared, and there is nothing to guess. LANES rows are
looked at, and then finished at once, in as many lanes.
"""

import numpy as np

from nbbn.compiler import by_type, in_line, loop, out_of_line
from nbbn.cpu.call import read
from nbbn.cpu.fused import NUMBERS_ROOM, before_activation, normalizing, note_residual, with_residual
from nbbn.cpu.parameters import NOTED, mean_of_row, note_beside, parameter, standardized
from nbbn.cpu.rows import COLUMNS, ROWS, fill, row_address, some, to_columns
from nbbn.cpu.simd import (
    ALONG,
    LANES,
    choose,
    keep_first,
    load,
    load_first,
    narrow,
    plain,
    pointer,
    scratch,
    splat,
    store,
    store_first,
    unzipped,
    way_of,
    wide,
    widen,
)
from nbbn.cpu.sums import (
    add_to,
    add_up,
    ask_ahead,
    exact,
    load_sums,
    look_at_both,
    multiply,
    multiply_at,
    partials_of,
    plus,
    plus_sum,
    square_row,
    store_sums,
    trusted,
)
from nbbn.cpu.tiles import SPAN
from nbbn.formulas import (
    about_mean,
    add_squared_deviation,
    mean_of,
    two_sum,
    variance,
)

SQUARE, PAIRS = LANES * LANES, 2 * LANES


@loop
def row_of_set(call, s, stored):
    """Return a pointer to the values of a set, which lie side by side."""
    at = row_address(call, call.x, call.at_x, plain(0), plain(0), s * call.shared)
    return pointer(at, stored)


@loop
def add_across(sums, lost, both):
    """Add up the lanes of LANES vectors, in place: lane k of the first is the sum of vector k.

    And, if there is `both`, what they lost.
    """
    out_of_line()
    number = LANES // 2
    while number > 0:
        for i in range(number):
            j = 2 * i * LANES
            a, b = unzipped(load(sums, j), load(sums, j + LANES))
            if both:
                total, more = two_sum(a, b)
                rest, other = unzipped(load(lost, j), load(lost, j + LANES))
                store(sums, i * LANES, total)
                store(lost, i * LANES, (rest + other) + more)
            else:
                store(sums, i * LANES, a + b)
        number //= 2


@loop
def sum_of_part(call, row, first, last, real):
    """Return the sums of the columns first … last - 1, in LANES lanes, and what they lost."""
    in_line()
    total, rest, other, others = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    j = first
    while j + 2 * LANES <= last:
        ask_ahead(row, j, call.ahead)
        total, rest = plus(total, rest, load(row, j), call.one, real)
        other, others = plus(other, others, load(row, j + LANES), call.one, real)
        j += 2 * LANES
    while j < last:
        total, rest = plus(total, rest, some(row, j, last), call.one, real)
        j += LANES
    return plus_sum(total, rest, other, others, real)


@loop
def sum_of_row(call, row, count, real):
    """Return the sums of `count` values in the same way."""
    in_line()
    total = sum_of_part(call, row, plain(0), min(count, COLUMNS), real)
    for j in range(COLUMNS, count, COLUMNS):
        more = sum_of_part(call, row, j, min(count, j + COLUMNS), real)
        total = add_to(total, more[0], more[1])
    return total


@loop
def squares_of_row(row, count, mean, real):
    """Return the sums of (x - mean)² in the same way."""
    in_line()
    none = splat(real(0.0))
    total = splat(0.0), splat(0.0)
    j = 0
    while j < count:
        end = min(count, j + SPAN)
        square, more = none, none
        while j + 2 * LANES <= end:
            square = add_squared_deviation(square, load(row, j), mean)
            more = add_squared_deviation(more, load(row, j + LANES), mean)
            j += 2 * LANES
        while j < end:
            here = add_squared_deviation(none, some(row, j, end), mean)
            square = square + (keep_first(here, end - j) if j + LANES > end else here)
            j += LANES
        total = add_up(total, widen(square + more), splat(0.0), real)
    return total


@loop
def short_stats(call, first, last, stored):
    """Mean, variance and the mean's low part, in invstd's place, of the sets first … last - 1."""
    real = wide(stored)
    stats, sets = pointer(call.stats, np.float64), call.channels // call.pool
    values = call.inner * call.shared
    count = float(values)
    sums, lost = scratch(SQUARE, np.float64), scratch(SQUARE, np.float64)
    both, always = plain(exact(real)), plain(True)
    means, guesses = scratch(LANES, np.float64), scratch(LANES, real)
    columns = scratch(SQUARE, np.float64)
    for s in range(first, last, LANES):
        here = min(LANES, last - s)
        for g in range(here):
            total, rest = sum_of_row(call, row_of_set(call, s + g, stored), values, real)
            store(sums, g * LANES, total)
            store(lost, g * LANES, rest)
        add_across(sums, lost, always)
        mean, rest = mean_of(load(sums, 0), load(lost, 0), count)
        guess = narrow(mean, real)
        store(guesses, 0, guess)
        for g in range(here):
            total, more = squares_of_row(row_of_set(call, s + g, stored), values, splat(guesses[g]), real)
            store_sums((sums, lost), g * LANES, (total, more), both)
        add_across(sums, lost, both)
        off = (mean - widen(guess)) + rest
        offset = off * off * count
        good = trusted(count, load(sums, 0), offset, widen(guess), real)
        m2 = load(sums, 0) - offset
        if both:
            m2 = m2 + load(lost, 0)
        if good | (-1 << here) != -1:
            store(means, 0, mean)
            fill(sums, SQUARE, 0.0)
            fill(lost, SQUARE, 0.0)
            state = to_columns(call, here, LANES, means, columns), (sums, lost)
            for g in range(here):
                square_row(row_of_set(call, s + g, stored), (), 0, values, state, g * LANES, plain(0))
            add_across(sums, lost, always)
            m2 = choose(good, m2, about_mean(load(sums, 0) + load(lost, 0), rest, count))
        store_first(stats, s, mean, here)
        store_first(stats, sets + s, variance(m2, count), here)
        store_first(stats, 2 * sets + s, rest, here)


@loop
def short_gradients(call, first, last, buffer, stored):
    """Σ dy and Σ dy · (x - mean) of the channels first … last - 1, in the places of their gradients."""
    real = wide(stored)
    both, whole, values = plain(exact(real)), plain(True), call.inner
    gradients = pointer(call.channel_stats, np.float64)
    sums, lost = scratch(SQUARE, np.float64), scratch(SQUARE, np.float64)
    products, products_lost = scratch(SQUARE, np.float64), scratch(SQUARE, np.float64)
    tables, spread = scratch(NUMBERS_ROOM, real), scratch(NUMBERS_ROOM, real)
    means, numbers = scratch(LANES, np.float64), scratch(ROWS, np.float64)
    rows = scratch(NOTED, np.int64)
    for c in range(first, last, LANES):
        here = min(LANES, last - c)
        for g in range(here):
            means[g] = mean_of_row(call, c + g, stored)
        before = before_activation(call, c, here, LANES, tables, spread, stored)
        state = look_at_both(call, means, (sums, lost), (products, products_lost), before, numbers, real)
        for g in range(here):
            x = row_address(call, call.x, call.at_x, plain(0), plain(0), c + g)
            dy = row_address(call, call.grad_out, call.at_grad_out, plain(0), plain(0), c + g)
            rows[0], rows[1] = dy, x
            note_beside(call, rows, numbers, plain(0), plain(0), stored)
            if with_residual(stored):
                note_residual(call, rows, plain(0), plain(0), plain(0), c + g, buffer, stored)
            mean, those = splat(means[g]), normalizing(before, g * LANES, stored)
            found = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
            j = 0
            while j + 2 * LANES <= values:
                ask_ahead(pointer(dy, stored), j, call.ahead_of_dy)
                ask_ahead(pointer(x, stored), j, call.ahead)
                found = multiply_at(rows, plain(0), j, values, whole, mean, those, found, state, stored)
                found = multiply_at(
                    rows, plain(0), j + LANES, values, whole, mean, those, found, state, stored
                )
                j += 2 * LANES
            while j < values:
                found = multiply_at(rows, plain(0), j, values, not whole, mean, those, found, state, stored)
                j += LANES
            store_sums((sums, lost), g * LANES, found[:2], both)
            store_sums((products, products_lost), g * LANES, found[2:], both)
        add_across(sums, lost, both)
        add_across(products, products_lost, both)
        total, product = load_sums((sums, lost), 0, both), load_sums((products, products_lost), 0, both)
        store_first(gradients, c, product[0] + product[1], here)
        store_first(gradients, call.channels + c, total[0] + total[1], here)


def add_columns_of(call, chunk, begins, first, last, stored):
    """Add Σ dy and Σ dy · x_hat of each column of the rows first … last - 1 to the sums of a chunk.

    That is where each column has a weight and a bias of its own; `begins`: these rows are its first.
    """
    raise NotImplementedError("exists in compiled code only")


@by_type(add_columns_of)
def _add_columns_of(call, chunk, begins, first, last, stored):
    def of_rows(call, chunk, begins, first, last, stored):
        out_of_line()
        count, number = call.inner, last - first
        its = read(call.columns)
        sums = partials_of(its, chunk, plain(0))
        rows = scratch(PAIRS, np.int64)
        means, invstds = scratch(LANES, np.float64), scratch(LANES, np.float64)
        for g in range(number):
            rows[2 * g] = row_address(call, call.grad_out, call.at_grad_out, plain(0), plain(0), first + g)
            rows[2 * g + 1] = row_address(call, call.x, call.at_x, plain(0), plain(0), first + g)
            means[g], invstds[g] = parameter(call.mean, first + g, 0.0), parameter(call.var, first + g, 1.0)
        for j in range(0, count - LANES + 1, LANES):
            add_columns_at(call, sums, begins, rows, number, j, plain(LANES), means, invstds, stored)
        if count % LANES != 0:
            j = count // LANES * LANES
            add_columns_at(call, sums, begins, rows, number, j, count - j, means, invstds, stored)

    def nothing(call, chunk, begins, first, last, stored):
        pass

    return of_rows if way_of(stored).parameters == ALONG else nothing


@loop
def add_columns_at(call, sums, begins, rows, number, j, here, means, invstds, stored):
    """The same of the columns j …, `here` of them."""
    real, apart = wide(stored), call.inner
    both = exact(real)
    total, rest, product, more = splat(0.0), splat(0.0), splat(0.0), splat(0.0)
    if not begins:
        total, product = load_first(sums, j, here), load_first(sums, 2 * apart + j, here)
        if both:
            rest, more = load_first(sums, apart + j, here), load_first(sums, 3 * apart + j, here)
    for g in range(number):
        dy = some(pointer(rows[2 * g], stored), j, j + here)
        x_hat = standardized(some(pointer(rows[2 * g + 1], stored), j, j + here), means[g], invstds[g])
        total, rest, product, more = multiply(dy, x_hat, total, rest, product, more, call.one, real)
    store_first(sums, j, total, here)
    store_first(sums, 2 * apart + j, product, here)
    if both or begins:  # otherwise they are zeros, and stay so
        store_first(sums, apart + j, rest, here)
        store_first(sums, 3 * apart + j, more, here)
