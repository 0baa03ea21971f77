"""What is added up of a tile: the sums of its columns, and those of its channels.

A column is added up downwards, so a row needs no particular length or alignment; the columns of a
channel are added up at the end of a block.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba.core import types

from nbbn.compiler import by_type, fma, in_line, like, loop, out_of_line
from nbbn.cpu.call import PARTIALS
from nbbn.cpu.fused import incoming
from nbbn.cpu.masks import counting, lanes, noted_bits, only
from nbbn.cpu.parameters import deviation, weighted
from nbbn.cpu.rows import some
from nbbn.cpu.simd import (
    LANES,
    after,
    at_most,
    fold,
    keep_first,
    load,
    plain,
    pointer,
    prefetch,
    size_of,
    splat,
    store,
    wide,
    widen,
)
from nbbn.formulas import add_squared_deviation, squared_deviation, two_sum

LARGEST = float(np.finfo(np.float64).max)


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
    ahead_of_dy : int
        The same as `ahead`, of dy.
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
    ahead_of_dy: Any
    bits_mask: Any
    before: Any
    slope: Any
    numbers: Any


@loop
def look_at_both(call, means, sums, products, before, numbers, real):
    """Return a `LookAtBoth` for a call."""
    slope = real(call.slope)
    return LookAtBoth(
        means, sums, products, call.one, call.ahead, call.ahead_of_dy, call.bits_mask, before, slope, numbers
    )


def exact(real):
    """Whether sums of `real` in float64 must be compensated to be good to their last bit."""
    raise NotImplementedError("exists in compiled code only")


@by_type(exact)
def _exact(real):
    # A float64 holds the sum of 2²⁹ float32 of like size without rounding.
    compensate = real.dtype == types.float64
    return (lambda real: True) if compensate else (lambda real: False)


# --- of a column -----------------------------------------------------------------------------------


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
    return total, rest, only(bits, add_squared_deviation(square, x, guess), square)


@loop
def ask_ahead(row, j, ahead):
    """Ask for what lies ahead of two vectors of a row, from column j on: of 16 bits, both are in one line."""
    prefetch(row, j, ahead)
    if size_of(row) > 2:
        prefetch(row, j + LANES, ahead)


@loop
def look_at_two(row, its, j, guess, then, sums, state, real):
    """Look at two vectors of a row, from column j on, which have guesses and sums of their own."""
    in_line()
    total, rest, square, other, others, more = sums
    ask_ahead(row, j, state.ahead)
    x, bits = load(row, j), lanes(its, j)
    total, rest, square = look_at(x, bits, guess, total, rest, square, state.one, real)
    x, bits = load(row, j + LANES), lanes(its, j + LANES)
    other, others, more = look_at(x, bits, then, other, others, more, state.one, real)
    return total, rest, square, other, others, more


@loop
def add_columns(state, c, total, rest, square, real):
    """Add sums of a few rows to those of the columns c …."""
    both, always = plain(exact(real)), plain(True)
    store_sums(state.sums, c, add_to(load_sums(state.sums, c, always), total, rest), always)
    squares = add_up(load_sums(state.squares, c, both), widen(square), splat(0.0), real)
    store_sums(state.squares, c, squares, both)


@loop
def partials_of(call, chunk, channel):
    """Return where a chunk leaves what it knows of a channel; PARTIALS numbers, `channels` apart."""
    return after(pointer(call.partials, np.float64), chunk * PARTIALS * call.channels + channel)


@loop
def trusted(count, squares, offset, guess, real):
    """Return the lanes whose sum of squared deviations from a guess is good to the last bits.

    It is not where the guess was more than twice as far from the mean as the values are (`offset` is
    n · (mean - guess)², and 5 offset > 4 squares; for float64, whose squares are no better than the result
    has to be, √2 times as far and 3 offset > 2 squares), or where the squares left the range of x's type.
    Where there are none at all, the channel is constant; but next to 0 values may be so close that each is 0.
    """
    smallest = splat(count * (2.0**-900 if exact(real) else 2.0**-96))
    finite = at_most(squares, splat(LARGEST))
    least = offset * (1.5 if exact(real) else 1.25)
    near = at_most(least, squares) & at_most(smallest, squares) & finite
    apart = splat(2.0**-480 if exact(real) else 2.0**-48)  # from here on, other values are far enough off
    constant = at_most(squares, splat(0.0)) & at_most(offset, splat(0.0)) & at_most(apart, math.fabs(guess))
    return near | constant


@loop
def square_row(row, bits, first, last, state, base, sums_mask):
    """Add up (x - mean)², in float64, of the columns first … last - 1."""
    means, squares = state
    for j in range(first, last, LANES):
        c = base + ((j - first) & sums_mask)
        mean = load(means, c)
        x = only(lanes(bits, j), widen(some(row, j, last)), mean)
        square = squared_deviation(x, mean)
        if j + LANES > last:
            square = keep_first(square, last - j)
        always = plain(True)
        store_sums(squares, c, add_to(load_sums(squares, c, always), square, splat(0.0)), always)


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
def multiply_at(rows, k, j, last, whole, mean, those, here, state, stored):
    """Add dy and dy · (x - mean) of the columns j … of row k, of dy and x in turn, to sums.

    They are a `whole` vector, or what there is before column `last`.
    """
    in_line()
    row = pointer(rows[2 * k], stored), pointer(rows[2 * k + 1], stored)
    bits = lanes(noted_bits(rows, 2 * k, state.bits_mask, stored), j)
    if whole:
        dy, x = counting(bits, load(row[0], j)), counting(bits, load(row[1], j))
    else:
        dy, x = counting(bits, some(row[0], j, last)), counting(bits, some(row[1], j, last))
    dy = incoming(rows, k, j, last, dy, x, bits, those, state.slope, stored)
    dy = weighted(rows, 2 * k, j, dy, stored)
    off = deviation(x, mean, state.numbers, 2 * k, stored)
    if not whole:
        off = keep_first(off, last - j)  # dy is 0 beyond, but a mean may be infinite
    total, rest, product, product_rest = here
    return multiply(dy, off, total, rest, product, product_rest, state.one, wide(stored))


# --- of a channel ----------------------------------------------------------------------------------


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
    if width == LANES and call.fold == 1:
        for g in range(group):
            high, small = fold(load(sums, g * LANES))
            low, _ = fold(load(lost, g * LANES))
            sums[g] = high
            lost[g] = low + small
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
