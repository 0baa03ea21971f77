"""What follows the normalization in the same pass: a residual that is added, and an activation.

Each part here is nothing, in kernels that are compiled without (`nbbn.cpu.simd.Way`). The gradient of the
activation needs its argument z, which is computed again from x. Where a residual is in it, that is done once:
the sums leave that gradient behind, which is the gradient of the residual, and grad_x is computed from it.
"""

import numpy as np
from numba.core import types

from nbbn.compiler import by_type, like, loop, out_of_line
from nbbn.cpu.masks import only
from nbbn.cpu.parameters import affine_of, parameter, part_in_doubt
from nbbn.cpu.rows import (
    AHEAD,
    AT_ONCE,
    ROOM,
    ROWS,
    gather_apart,
    row_in,
    row_room,
    scatter_apart,
    some,
    to_columns,
)
from nbbn.cpu.simd import (
    LANES,
    address,
    after,
    at_most,
    choose,
    load,
    narrow,
    number,
    pointer,
    prefetch,
    splat,
    store,
    store_first,
    way_of,
    wide,
    widen,
)
from nbbn.formulas import ACTIVATIONS, normalized, normalized_doubt, shift_of

# Where, among the addresses of rows, those of the residual and of its gradient are.
AT_RESIDUAL, AT_GRAD_RESIDUAL = 2 * ROWS, 3 * ROWS
NUMBERS_ROOM = 3 * ROOM  # for what columns are normalized with


def quieted(value, real):
    """Return a float64 as type `real`, a vector or a number; of NaN the one whose lower half is zero.

    As vectors of 16 bits must have it.
    """
    raise NotImplementedError("exists in compiled code only")


def doubled(value):
    """Return a vector or a number as float64."""
    raise NotImplementedError("exists in compiled code only")


@by_type(quieted)
def _quieted(value, real):
    if isinstance(value, types.Float):
        return lambda value, real: real(value) if value == value else real(np.nan)
    return lambda value, real: choose(at_most(value, value), narrow(value, real), splat(real(np.nan)))


@by_type(doubled)
def _doubled(value):
    if isinstance(value, types.Float):
        return lambda value: np.float64(value)
    return lambda value: widen(value)


@loop
def normalization(mean, rest, scale, bias, real):
    """Return what x is normalized with, in its type: mean, scale and shift; of a channel, or of some."""
    rounded = quieted(mean, real)
    lost = (mean - doubled(rounded)) + rest
    return rounded, quieted(scale, real), quieted(shift_of(bias, lost, scale), real)


def _constant(stub, of_way):
    """Let a function of `stored` return, in compiled code, what `of_way` returns of its way."""

    @by_type(stub)
    def overloaded(stored):
        value = of_way(way_of(stored))
        return lambda stored: value


def with_residual(stored):
    """Whether there is a residual."""
    raise NotImplementedError("exists in compiled code only")


def gradient_tables(stored):
    """How many tables grad_x is computed with: one more where z is needed, its shift."""
    raise NotImplementedError("exists in compiled code only")


_constant(with_residual, lambda way: way.residual)
_constant(gradient_tables, lambda way: 6 if way.through else 5)


# --- forward ---------------------------------------------------------------------------------------


def joined(row, j, end, value, doubt):
    """Return columns j … of a row with the residual added, and what they are in doubt below."""
    raise NotImplementedError("exists in compiled code only")


@by_type(joined)
def _joined(row, j, end, value, doubt):
    def with_it(row, j, end, value, doubt):
        prefetch(row[0], j, AHEAD)
        residual = some(row[0], j, end)
        return value + residual, normalized_doubt(residual, part_in_doubt(row), doubt)

    return with_it if way_of(row[2]).residual else (lambda row, j, end, value, doubt: (value, doubt))


def precisely_joined(row, j, value):
    """Return column j of a row with the residual added."""
    raise NotImplementedError("exists in compiled code only")


@by_type(precisely_joined)
def _precisely_joined(row, j, value):
    if way_of(row[2]).residual:
        return lambda row, j, value: value + np.float64(number(row[0], j))
    return lambda row, j, value: value


def activated(row, z):
    """Return the activation's result of z, a number or a vector."""
    raise NotImplementedError("exists in compiled code only")


def activated_aside(row, z):
    """Return the same where that is seldom wanted: what is long is not compiled in line once more."""
    raise NotImplementedError("exists in compiled code only")


@by_type(activated)
def _activated(row, z):
    name = way_of(row[2]).activation
    if not name:
        return lambda row, z: z
    apply = ACTIVATIONS[name].apply
    return lambda row, z: apply(z, row[3])


@by_type(activated_aside)
def _activated_aside(row, z):
    name = way_of(row[2]).activation
    if not name:
        return lambda row, z: z
    apply, _, is_long = ACTIVATIONS[name]

    def aside(row, z):
        out_of_line()
        return apply(z, row[3])

    return aside if is_long else (lambda row, z: apply(z, row[3]))


# --- backward --------------------------------------------------------------------------------------


def shift_beside(row, tables, c):
    """Return the shift of columns c … where `passed` needs it, in a tuple, or none."""
    raise NotImplementedError("exists in compiled code only")


@by_type(shift_beside)
def _shift_beside(row, tables, c):
    needed = way_of(row[2]).through
    return (lambda row, tables, c: (load(tables, c),)) if needed else (lambda row, tables, c: ())


def passed(row, grad_out, x, numbers):
    """Return the gradient at z, of numbers or vectors; `numbers` are those that grad_x is computed with."""
    raise NotImplementedError("exists in compiled code only")


@by_type(passed)
def _passed(row, grad_out, x, numbers):
    way = way_of(row[2])
    if not way.through:
        return lambda row, grad_out, x, numbers: grad_out
    gradient = ACTIVATIONS[way.activation].gradient

    def through(row, grad_out, x, numbers):
        return gradient(grad_out, normalized(x, numbers[0], numbers[1], numbers[-1]), row[3])

    return through


def before_activation(call, channel, group, width, values, columns, stored):
    """Return the tables, ROOM apart, of what the columns of a tile were normalized with, made in the buffers.

    For the sums of a backward pass that goes through an activation.
    """
    raise NotImplementedError("exists in compiled code only")


@by_type(before_activation)
def _before_activation(call, channel, group, width, values, columns, stored):
    def tables(call, channel, group, width, values, columns, stored):
        real = wide(stored)
        for g in range(group):
            c = channel + g
            weight, bias = affine_of(call, c, stored)
            mean, scale = parameter(call.mean, c, 0.0), weight * parameter(call.var, c, 1.0)
            numbers = normalization(mean, 0.0, scale, bias, real)
            values[g], values[ROOM + g], values[2 * ROOM + g] = numbers
        for k in range(3):
            filled = to_columns(call, group, width, after(values, k * ROOM), after(columns, k * ROOM))
        return after(filled, -2 * ROOM)

    def nothing(call, channel, group, width, values, columns, stored):
        return columns

    return tables if way_of(stored).activation else nothing


def normalizing(tables, c, stored):
    """Return what the columns c … were normalized with, if that is needed."""
    raise NotImplementedError("exists in compiled code only")


@by_type(normalizing)
def _normalizing(tables, c, stored):
    if way_of(stored).activation:
        return lambda tables, c, stored: (
            load(tables, c),
            load(tables, c + ROOM),
            load(tables, c + 2 * ROOM),
        )
    return lambda tables, c, stored: ()


# Where, in the room for rows, those of the residual are, and those of its gradient.
RESIDUALS, GRAD_RESIDUALS = ROWS, ROWS + AT_ONCE


@loop
def gather_residual(call, row, number, channel, group, buffer):
    """Copy rows of the residual, from this one on, to their room in `buffer`, if their columns lie apart."""
    room, at_residual = row_room(buffer), call.at_residual
    there = after(buffer, RESIDUALS * room)
    gather_apart(call, call.residual, at_residual, row, number, channel, group, there, room)


@loop
def note_residual(call, rows, k, step, piece, channel, buffer, stored):
    """Note where row k of those read at once is of the residual, and where its gradient goes to."""
    room, at_residual, at_second = row_room(buffer), call.at_residual, call.at_second
    there = after(buffer, (RESIDUALS + k) * room)
    its = row_in(call, call.residual, at_residual, step, piece, channel, there, stored)
    rows[AT_RESIDUAL + k] = address(its)
    there = after(buffer, (GRAD_RESIDUALS + k) * room)
    its = row_in(call, call.second, at_second, step, piece, channel, there, stored)
    rows[AT_GRAD_RESIDUAL + k] = address(its)


@loop
def scatter_residual(call, row, number, channel, group, buffer):
    """Copy rows of the gradient of the residual to where they go to, if their columns lie apart."""
    room, at_second = row_room(buffer), call.at_second
    there = after(buffer, GRAD_RESIDUALS * room)
    scatter_apart(call, call.second, at_second, row, number, channel, group, there, room)


def incoming(rows, k, j, last, grad_out, x, bits, numbers, slope, stored):
    """Return the gradient at columns j … of row k of what was normalized, from that at the result.

    With a residual it is the residual's too, and written for it; then it is what was written, rounded. `bits`
    are of the columns that count; elsewhere x and grad_out are zeros.
    """
    raise NotImplementedError("exists in compiled code only")


@by_type(incoming)
def _incoming(rows, k, j, last, grad_out, x, bits, numbers, slope, stored):
    way = way_of(stored)
    if not (way.activation or way.residual):
        return lambda rows, k, j, last, grad_out, x, bits, numbers, slope, stored: grad_out
    if not way.residual:
        gradient = ACTIVATIONS[way.activation].gradient

        def through(rows, k, j, last, grad_out, x, bits, numbers, slope, stored):
            passed_on = gradient(grad_out, normalized(x, numbers[0], numbers[1], numbers[2]), slope)
            return only(bits, passed_on, like(passed_on, 0.0))

        return through
    if not way.activation:

        def same(rows, k, j, last, grad_out, x, bits, numbers, slope, stored):
            keep(pointer(rows[AT_GRAD_RESIDUAL + k], stored), j, last, grad_out)
            return grad_out

        return same
    gradient_there = ACTIVATIONS[way.activation].gradient

    def through_sum(rows, k, j, last, grad_out, x, bits, numbers, slope, stored):
        residual = pointer(rows[AT_RESIDUAL + k], stored)
        prefetch(residual, j, AHEAD)
        z = normalized(x, numbers[0], numbers[1], numbers[2]) + some(residual, j, last)
        kept = pointer(rows[AT_GRAD_RESIDUAL + k], stored)
        gradient = gradient_there(grad_out, z, slope)
        keep(kept, j, last, only(bits, gradient, like(gradient, 0.0)))
        return some(kept, j, last)

    return through_sum


@loop
def keep(out, j, last, value):
    """Write the columns j … of a row that ends before column `last`."""
    if j + LANES <= last:
        store(out, j, value)
    else:
        store_first(out, j, value, last - j)
