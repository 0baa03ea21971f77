"""Which weight and bias, and which statistics, the kernels use for what: see `nbbn.problem.Form`.

Parameters go by channel, or along the elements of a channel. In the second case a row is read beside the
weights and biases of its columns, from a table in the type that is computed with.
"""

import numpy as np

from nbbn.compiler import by_type, loop, out_of_line
from nbbn.cpu.rows import ROWS
from nbbn.cpu.simd import (
    ACROSS,
    ALONG,
    BFLOAT16,
    DOWN,
    LANES,
    Vector,
    address,
    after,
    bfloat16,
    float16,
    load,
    load_first,
    number,
    plain,
    pointer,
    scratch,
    set_number,
    size_of,
    splat,
    way_of,
    wide,
    widen,
)
from nbbn.dtypes import FLOAT16, FLOAT32, FLOAT64
from nbbn.formulas import affine, affine_doubt

CODE16, CODE32, CODE64 = FLOAT16.code, FLOAT32.code, FLOAT64.code
FLOAT32_BYTES = FLOAT32.dtype.itemsize
NOTED = 5 * ROWS  # after their addresses come notes of what they are read beside


@loop
def parameter(where, index, missing):
    """Return element `index` of a parameter, of whatever type, or `missing`."""
    if where.address == 0:
        return missing
    at = where.address + index * where.stride
    if where.code == CODE64:
        return number(pointer(at, np.float64), 0)
    if where.code == CODE32:
        return np.float64(number(pointer(at, np.float32), 0))
    return half_parameter(at, where.code)


@loop
def several(where, first, here, period, missing):
    """Return the elements first % period … of a parameter, `here` of them, as a vector; or `missing`."""
    out_of_line()
    if where.address == 0:
        return splat(missing)
    index = first % period
    if index + here <= period:
        at = where.address + index * where.stride
        if where.code == CODE32 and where.stride == FLOAT32_BYTES:
            return widen(load_first(pointer(at, np.float32), plain(0), here))
        if where.code == CODE64 and where.stride == 2 * FLOAT32_BYTES:
            return load_first(pointer(at, np.float64), plain(0), here)
    values = scratch(LANES, np.float64)
    for i in range(here):
        values[i] = parameter(where, (first + i) % period, missing)
    return load_first(values, plain(0), here)


@loop
def half_parameter(at, code):
    """Return a parameter of 16 bits."""
    out_of_line()
    if code == CODE16:
        return np.float64(number(pointer(at, float16()), 0))
    return np.float64(number(pointer(at, bfloat16()), 0))


@loop
def set_parameter(where, index, value):
    at = where.address + index * where.stride
    if where.code == CODE64:
        set_number(pointer(at, np.float64), 0, value)
    elif where.code == CODE32:
        set_number(pointer(at, np.float32), 0, value)
    elif where.code == CODE16:
        set_number(pointer(at, float16()), 0, value)
    else:
        set_number(pointer(at, bfloat16()), 0, value)


# --- by channel --------------------------------------------------------------------------------------


@loop
def set_of(call, channel):
    """Return which set of statistics a channel belongs to."""
    return channel if call.pool == 1 else channel // call.pool


@loop
def index_of(call, channel):
    """Return which parameters a channel has."""
    return channel if channel < call.parameters else channel % call.parameters


def affine_of(call, channel, stored):
    """Return weight and bias of a channel; where they go along its elements, it is not scaled as a whole."""
    raise NotImplementedError("exists in compiled code only")


@by_type(affine_of)
def _affine_of(call, channel, stored):
    def of_channel(call, channel, stored):
        index = index_of(call, channel)
        return parameter(call.weight, index, 1.0), parameter(call.bias, index, 0.0)

    return (lambda call, channel, stored: (1.0, 0.0)) if way_of(stored).parameters else of_channel


def affines_of(call, channel, here, stored):
    """Return the same of the channels from this one on, `here` of them, as vectors."""
    raise NotImplementedError("exists in compiled code only")


@by_type(affines_of)
def _affines_of(call, channel, here, stored):
    def of_channels(call, channel, here, stored):
        weight = several(call.weight, channel, here, call.parameters, 1.0)
        return weight, several(call.bias, channel, here, call.parameters, 0.0)

    if way_of(stored).parameters:
        return lambda call, channel, here, stored: (splat(1.0), splat(0.0))
    return of_channels


def across(stored):
    """Whether the sums are those of columns, in rows that have statistics of their own."""
    raise NotImplementedError("exists in compiled code only")


@by_type(across)
def _across(stored):
    return (lambda stored: True) if way_of(stored).parameters == ACROSS else (lambda stored: False)


def mean_of_row(call, channel, stored):
    """Return what is subtracted from x of a channel, for the gradients of its parameters."""
    raise NotImplementedError("exists in compiled code only")


@by_type(mean_of_row)
def _mean_of_row(call, channel, stored):
    if way_of(stored).parameters == ACROSS:
        return lambda call, channel, stored: 0.0
    return lambda call, channel, stored: parameter(call.mean, set_of(call, channel), 0.0)


# --- along the elements of a channel -----------------------------------------------------------------


# Where, in what the results of a row are computed from, the weights and the biases of its columns are, if
# each has its own.
WEIGHTS, BIASES = 5, 6


def beside(call, row, stored):
    """Return what a row is read beside: nothing, or the weights and the biases of its columns."""
    raise NotImplementedError("exists in compiled code only")


@by_type(beside)
def _beside(call, row, stored):
    def columns(call, row, stored):
        first = row % call.pieces * call.width
        weights = after(pointer(call.along, wide(stored)), first)
        return weights, after(weights, call.along_room)

    def one(call, row, stored):
        weight = after(pointer(call.along, wide(stored)), row)
        return weight, after(weight, call.along_room)

    return {ALONG: columns, DOWN: one}.get(way_of(stored).parameters, lambda call, row, stored: ())


def begun_at(row, first):
    """Return what the results of a row are computed from where its weights and biases begin at a column."""
    raise NotImplementedError("exists in compiled code only")


@by_type(begun_at)
def _begun_at(row, first):
    def there(row, first):
        return row[:WEIGHTS] + (after(row[WEIGHTS], -first), after(row[BIASES], -first))

    return there if len(row) > WEIGHTS else (lambda row, first: row)


def note_beside(call, rows, numbers, k, row, stored):
    """Note for the sums of a backward pass what row k of those that are read at once is read beside.

    That is where its weights are, or the mean and the inverse deviation that it was normalized with.
    """
    raise NotImplementedError("exists in compiled code only")


@by_type(note_beside)
def _note_beside(call, rows, numbers, k, row, stored):
    def weights(call, rows, numbers, k, row, stored):
        rows[ROWS + k] = address(beside(call, row, stored)[0])

    def statistics(call, rows, numbers, k, row, stored):
        numbers[k] = parameter(call.mean, row, 0.0)
        numbers[k + 1] = parameter(call.var, row, 1.0)

    def nothing(call, rows, numbers, k, row, stored):
        pass

    return {ALONG: weights, DOWN: weights, ACROSS: statistics}.get(way_of(stored).parameters, nothing)


def pass_channel(call, rows, k, stored):
    """Note that the weights beside row k begin again behind a channel."""
    raise NotImplementedError("exists in compiled code only")


@by_type(pass_channel)
def _pass_channel(call, rows, k, stored):
    def begin_again(call, rows, k, stored):
        weights = pointer(rows[ROWS + k], wide(stored))
        rows[ROWS + k] = address(after(weights, -call.inner))

    def nothing(call, rows, k, stored):
        pass

    return begin_again if way_of(stored).parameters == ALONG else nothing


def weighted(rows, k, j, grad_out, stored):
    """Return grad_out at column j of row k times the weights there, if there are any beside it."""
    raise NotImplementedError("exists in compiled code only")


@by_type(weighted)
def _weighted(rows, k, j, grad_out, stored):
    def by_weight(rows, k, j, grad_out, stored):
        # In float64, for the sums: where they cancel, a product rounded to float32 would be all that is left.
        return widen(grad_out) * widen(load(pointer(rows[ROWS + k], wide(stored)), j))

    def by_one_weight(rows, k, j, grad_out, stored):
        return widen(grad_out) * np.float64(number(pointer(rows[ROWS + k], wide(stored)), 0))

    ways = {ALONG: by_weight, DOWN: by_one_weight}
    return ways.get(way_of(stored).parameters, lambda rows, k, j, grad_out, stored: grad_out)


@loop
def standardized(x, mean, invstd):
    """Return x_hat in float64, of the mean and the inverse deviation that a row was normalized with."""
    return (widen(x) - mean) * invstd


def deviation(x, mean, numbers, k, stored):
    """Return what grad_out at row k is multiplied with: x - mean; or that over the row's own deviation."""
    raise NotImplementedError("exists in compiled code only")


@by_type(deviation)
def _deviation(x, mean, numbers, k, stored):
    def by_row(x, mean, numbers, k, stored):
        return standardized(x, numbers[k], numbers[k + 1])

    return (
        by_row
        if way_of(stored).parameters == ACROSS
        else (lambda x, mean, numbers, k, stored: widen(x) - mean)
    )


def part_in_doubt(row):
    """Return which part of its terms a result of 16 bits must not be below, see `normalized_doubt`."""
    raise NotImplementedError("exists in compiled code only")


@by_type(part_in_doubt)
def _part_in_doubt(row):
    part = 2.0**-14 if row[0].dtype == BFLOAT16 else 2.0**-11
    return lambda row: part


def at_column(row, values, j):
    """Return the weights, or the biases, of the columns j … of a row that is read beside some."""
    raise NotImplementedError("exists in compiled code only")


@by_type(at_column)
def _at_column(row, values, j):
    if way_of(row[2]).parameters == DOWN:
        return lambda row, values, j: splat(number(values, 0))
    return lambda row, values, j: load(values, j)


def finished(row, j, out, doubt):
    """Return the result of columns j … of a row, and what it is in doubt below, from those before weights."""
    raise NotImplementedError("exists in compiled code only")


@by_type(finished)
def _finished(row, j, out, doubt):
    def with_affine(row, j, out, doubt):
        weight, bias = at_column(row, row[WEIGHTS], j), at_column(row, row[BIASES], j)
        return affine(out, weight, bias), affine_doubt(doubt, weight, bias, part_in_doubt(row))

    return with_affine if len(row) > WEIGHTS else (lambda row, j, out, doubt: (out, doubt))


def scaled(row, j, scale):
    """Return what grad_out is scaled with in columns j … of a row: times the weights beside it.

    Not grad_out times a weight, which may be more than there is where the product of all three is not.
    """
    raise NotImplementedError("exists in compiled code only")


@by_type(scaled)
def _scaled(row, j, scale):
    return (
        (lambda row, j, scale: scale * at_column(row, row[WEIGHTS], j))
        if len(row) > WEIGHTS
        else (lambda row, j, scale: scale)
    )


def precisely_finished(call, row, j, out):
    """Return the result of column j of a row from that before weights, with those that were given."""
    raise NotImplementedError("exists in compiled code only")


@by_type(precisely_finished)
def _precisely_finished(call, row, j, out):
    def with_affine(call, row, j, out):
        index = element_of(call, row, j)
        return affine(out, parameter(call.weight, index, 1.0), parameter(call.bias, index, 0.0))

    return with_affine if len(row) > WEIGHTS else (lambda call, row, j, out: out)


def precisely_scaled(row, j, scale):
    """Return what grad_out is scaled with in column j of a row: times the weight that the sums have there.

    Of a vector of float64, in the columns j ….
    """
    raise NotImplementedError("exists in compiled code only")


@by_type(precisely_scaled)
def _precisely_scaled(row, j, scale):
    def by_weight(row, j, scale):
        return scale * np.float64(number(row[WEIGHTS], 0 if down else j))

    def by_weights(row, j, scale):
        return scale * widen(at_column(row, row[WEIGHTS], j))

    down = way_of(row[2]).parameters == DOWN
    if isinstance(scale, Vector) and len(row) > WEIGHTS:
        return by_weights
    return by_weight if len(row) > WEIGHTS else (lambda row, j, scale: scale)


def element_of(call, row, j):
    """Return which element of its channel column j of a row is, that is read beside weights."""
    raise NotImplementedError("exists in compiled code only")


@by_type(element_of)
def _element_of(call, row, j):
    if way_of(row[2]).parameters == DOWN:
        return lambda call, row, j: (address(row[WEIGHTS]) - call.along) // size_of(row[WEIGHTS])
    return lambda call, row, j: (
        ((address(row[WEIGHTS]) - call.along) // size_of(row[WEIGHTS]) + j) % call.inner
    )


def elements(call, stored):
    """Return how many elements of a channel have weights of their own."""
    raise NotImplementedError("exists in compiled code only")


@by_type(elements)
def _elements(call, stored):
    down = way_of(stored).parameters == DOWN
    return (lambda call, stored: call.outer) if down else (lambda call, stored: call.inner)


@loop
def spread(where, missing, table, first, last, inner):
    """Set table[first : last] to the elements of a parameter; they begin again after `inner` of them."""
    out_of_line()
    j = first
    while j < last:
        i = j % inner
        end = min(last, j + inner - i)
        if where.address != 0 and where.code == CODE32 and where.stride == FLOAT32_BYTES:
            source = pointer(where.address + FLOAT32_BYTES * (i - j), np.float32)
            for k in range(j, end):  # a loop that the compiler makes vectors of
                set_number(table, k, np.float64(source[k]))
        else:
            for k in range(j, end):
                set_number(table, k, parameter(where, i + k - j, missing))
        j = end


@loop
def spread_along(call, first, last, stored):
    """Set the elements first … last - 1 of the table of weights and, but for gradients, of biases."""
    weights = pointer(call.along, wide(stored))
    spread(call.weight, 1.0, weights, first, last, elements(call, stored))
    if call.grad_out == 0:
        biases = after(weights, call.along_room)
        spread(call.bias, 0.0, biases, first, last, elements(call, stored))
