"""The kernels that copy rows of a tile: from an array, where their columns do not lie together, and back.

They are called from others, which do the rest with the copies: see `nbbn.cpu.rows.copy_rows`. Tasks: rows.
"""

import numpy as np

from nbbn.compiler import kernel, loop, out_of_line, variant
from nbbn.cpu.call import copy_at, operand_at, read
from nbbn.cpu.rows import BY_CHANNELS, BY_ROWS, extent, locate, row_address
from nbbn.cpu.simd import LANES, TURNED, after, pointer, pointer_like, size_of, turn_in, turn_out


@loop
def move_in(at, across, columns, buffer):
    """Copy `columns` elements, `across` bytes apart, to a buffer."""
    for j in range(columns):
        buffer[j] = pointer_like(buffer, at + j * across)[0]


@loop
def move_out(at, across, columns, buffer):
    """Copy them back."""
    for j in range(columns):
        pointer_like(buffer, at + j * across)[0] = buffer[j]


def _copy(name, turn, move):
    """Return what copies between an array, where columns do not lie together, and a buffer, where they do."""

    @variant(name)
    def copy(at, across, along, columns, number, buffer, apart):
        """Copy `number` rows of `columns` columns.

        In the array they are `along` and `across` bytes apart; in the buffer the rows are, `apart` elements.
        """
        out_of_line()
        if along == size_of(buffer) and number > 1 and columns >= LANES:
            for j in range(0, columns, LANES):
                j = min(j, columns - LANES)  # the last ones a second time
                for k in range(0, number, TURNED):
                    here = min(TURNED, number - k)
                    turn(at + j * across + k * along, across, here, after(buffer, k * apart + j), apart)
            return
        for k in range(number):
            move(at + k * along, across, columns, after(buffer, k * apart))

    return copy


def _each_row(name, copy):
    """Return a loop that copies rows of a tile."""

    @variant(name)
    def each_row(job, first, last, stored):
        """Copy the rows first … last - 1.

        Elements that lie side by side are copied at once: those of several rows, or of several channels.
        """
        call, operand = read(job.call), operand_at(job.operand)
        group, apart, buffer = job.group, job.apart, pointer(job.buffer, stored)
        outer = pointer(operand.strides, np.int64)[call.dims - 1]
        steps_of_last = pointer(call.sizes, np.int64)[call.dims - 1]
        row = first
        while row < last:
            step, piece = locate(call, row)
            steps, count = extent(call, step, piece)
            at = row_address(call, job.base, operand, step, piece, job.channel)
            together = 1
            if operand.gather == BY_ROWS:
                together = min(last - row, steps_of_last - step % steps_of_last)
            for f in range(steps):
                here = after(buffer, (row - first) * apart + f * group * count)
                if count == 1:
                    copy(at + f * outer, operand.channel, outer, group, together, here, apart)
                elif operand.gather == BY_CHANNELS:
                    copy(at + f * outer, operand.inner, operand.channel, count, group, here, count)
                else:
                    for g in range(group):
                        there = at + f * outer + g * operand.channel
                        copy(there, operand.inner, outer, count, together, after(here, g * count), apart)
            row += together

    return each_row


_gather = _each_row("gather", _copy("in", turn_in, move_in))
_scatter = _each_row("scatter", _copy("out", turn_out, move_out))


@kernel
def gather(first, last, job, stored):
    """Copy rows of an array to a buffer."""
    _gather(copy_at(job), first, last, stored)


@kernel
def scatter(first, last, job, stored):
    """Copy them back."""
    _scatter(copy_at(job), first, last, stored)
