"""What a kernel is told: one record of addresses and integers, the same for every kernel.

The array is seen as rows of columns. A *tile* is `group` channels wide and `rows` high:

* span: a row is one step of the outer dimensions; its columns are `group` channels × `inner` elements.
* split (`pieces` > 1): a channel's inner dimension is too long for one row and is cut into pieces of
  `width`; every piece is a row. The channels of a tile, where it has several, take turns at each.
* fold (`fold` > 1): all channels of one outer step are too short for a row; `fold` steps make a row.

Rows are summed in *blocks* that stay in cache between two looks at them; blocks make a *chunk*, the
unit of partial results. Blocks and chunks come from the shape alone; `group` does not touch any bit of
the result.
"""

import numpy as np
from llvmlite import ir
from numba import from_dtype
from numba.core import cgutils, types
from numba.extending import intrinsic

_WORD = np.int64

OPERAND = np.dtype(
    [
        ("channel", _WORD),  # bytes from a channel to the next
        ("inner", _WORD),  # bytes from an inner element to the next
        ("strides", _WORD),  # address of int64[dims]: bytes per step of each outer dimension
        ("gather", _WORD),  # how a row's columns lie: see nbbn.cpu.rows.TOGETHER
    ]
)

PARAMETER = np.dtype(
    [
        ("address", _WORD),  # of element 0; 0: not given
        ("stride", _WORD),  # bytes
        ("code", _WORD),  # of its storage type: nbbn.dtypes
    ]
)

# What differs from call to call: set before all else,
MASK = [("mask", _WORD)]  # a byte for each element of a channel: 0 where it does not count

# and set then.
ARGUMENTS = [
    ("x", _WORD),  # addresses
    ("grad_out", _WORD),
    ("out", _WORD),  # also grad_x
    ("second", _WORD),  # what is read beside x as `out` is written: the residual, or the gradient there
    ("residual", _WORD),  # what that gradient is computed with
    # float64[3, sets]: mean, var, invstd. Backward: float64[2, parameters], gradients of weight and bias, and
    # two rows more of what these sums have lost, where others are added to them.
    ("stats", _WORD),
    ("channel_stats", _WORD),  # the same of each channel; `stats` where that is the same
    ("weight", PARAMETER),
    ("bias", PARAMETER),
    ("mean", PARAMETER),  # backward: the batch mean; otherwise the running mean
    ("var", PARAMETER),  # backward: invstd; otherwise the running variance
    ("eps", np.float64),
    ("momentum", np.float64),
    ("correction", np.float64),
    ("slope", np.float64),  # of leaky_relu
    ("count", np.float64),  # of the values of a channel that count
    ("training", _WORD),
    ("adds", _WORD),  # to gradients of parameters: 1, others will be added; 2, they are added to those there
    ("columns", _WORD),  # address of the record that gets the sums of columns, where rows are channels; or 0
    ("updates", _WORD),  # address of what updates the running statistics, if `forward` is one share; or 0
]

PARTIALS = 4  # numbers of a channel that a chunk leaves behind

# The memory that it works in.
ROOMS = [
    ("partials", _WORD),  # float64[chunks, PARTIALS, channels]: mean, rest, m2, lost; Σ dy, lost, Σ dy · …
    # real[TABLES, room]: what normalize and backward_apply need of a channel. Where elements are of 16 bits,
    # the same in float64 comes after it: see nbbn.cpu.results.precise_tables.
    ("tables", _WORD),
    ("bits", _WORD),  # of the rows: see nbbn.cpu.masks
    ("counts", _WORD),  # int64[rows + 1]: values of a channel that count before each row
    ("along", _WORD),  # real[2, along_room]: weight and bias of each element of a row, where they go along
]

# Addresses of kernels that others call, for what few problems need: the others are compiled in less time.
CALLED = [
    ("gather", _WORD),  # copies rows whose columns do not lie together (nbbn.cpu.copies); 0: all do
    ("scatter", _WORD),  # copies them back
    ("finish", _WORD),  # finishes sets of several channels; 0: each has its own statistics
]

# What a plan knows ahead.
PLAN = [
    ("one", np.float64),  # 1.0, unknown to the compiler: see tiles.plus
    ("at_x", OPERAND),
    ("at_grad_out", OPERAND),
    ("at_out", OPERAND),
    ("at_second", OPERAND),
    ("at_residual", OPERAND),
    ("at_mask", OPERAND),
    ("dims", _WORD),  # outer dimensions
    ("sizes", _WORD),  # address of int64[dims]
    ("outer", _WORD),  # their product
    ("channels", _WORD),
    ("inner", _WORD),
    ("pool", _WORD),  # channels of a set, which has its statistics in common
    ("shared", _WORD),  # channels that are summed up as one: those of a set, or each by itself
    ("parameters", _WORD),  # channel c has the parameters c % parameters
    ("centered", _WORD),  # 1: the mean is subtracted
    ("activates", _WORD),  # 1: grad_x is computed through an activation, from the gradient at its result
    ("bits_pitch", _WORD),  # bytes from the bits of a row, or of all pieces of a step, to the next
    ("bits_mask", _WORD),  # what a column's index is masked with for that of its bit
    ("along_room", _WORD),  # elements from the weights to the biases
    ("fold", _WORD),
    ("pieces", _WORD),
    ("width", _WORD),  # elements of a channel in a row
    ("rows", _WORD),
    ("block", _WORD),  # rows
    ("chunk", _WORD),  # rows
    ("chunks", _WORD),
    ("single", _WORD),  # 1: channels are summed one by one, each into LANES sums; from the shape alone
    ("room", _WORD),  # elements from a table to the next
    ("group", _WORD),  # channels of a tile
    ("groups", _WORD),
    ("tiles", _WORD),  # of a task: a set of several, or short channels that are finished together
    ("together", _WORD),  # channels of a task whose sums are taken before any of them is written
    ("runs", _WORD),  # 1: what channels of a task have is written as one run
    ("slab", _WORD),  # rows that are written together
    ("ahead", _WORD),  # bytes: how far ahead of what is looked at memory is asked for
    ("ahead_of_dy", _WORD),  # the same of grad_out
    ("stream", _WORD),  # 1: write out past the caches
    ("stream_planes", _WORD),  # 1: so does `normalize_planes`
    ("once", _WORD),  # columns after which channels that lie side by side begin a vector again
    ("period", _WORD),  # a multiple, after which the tables of `normalize_columns` begin again
]

CALL = np.dtype(MASK + ARGUMENTS + ROOMS + CALLED + PLAN)

# What one of those is told: see nbbn.cpu.rows.copy_rows.
COPY = np.dtype(
    [
        ("call", _WORD),  # addresses of records
        ("operand", _WORD),
        ("base", _WORD),  # of the array
        ("channel", _WORD),
        ("group", _WORD),
        ("buffer", _WORD),  # its address
        ("apart", _WORD),  # elements from a row in it to the next
    ]
)


# What an argument was like of a call that is made again: see nbbn.cpu.repeat.
LIKE = np.dtype(
    [
        ("type", _WORD),  # the address of its type
        ("dtype", _WORD),  # and of its dtype; 0: it is no array, and `type` is its own
        ("ndim", _WORD),
        ("flags", _WORD),  # that it has
        ("shape", _WORD),  # address of int64[2, ndim]: its shape and strides
        ("begin", _WORD),  # bytes from its first element to where its memory begins
        ("end", _WORD),  # and ends
        ("apart", _WORD),  # the number of an argument that it has no memory in common with, or -1
        ("apart_too", _WORD),
        ("same", _WORD),  # 1: or that it is all the same as
        ("data", _WORD),  # where it lies, once it has been looked at
    ]
)


# And a field of a record that has its address.
SETTING = np.dtype(
    [
        ("argument", _WORD),  # its number
        ("at", _WORD),  # the address of the field
        ("more", _WORD),  # bytes from where the argument lies to what the field says
    ]
)


def _reader(kind, name):
    """Return what takes an address for that of a record."""
    record = from_dtype(kind)
    record.name = name  # not one of all its fields, which would be in that of each function that has one

    @intrinsic
    def read(typingctx, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(record))

        return record(types.int64), codegen

    return read


read = _reader(CALL, "nbbn.CALL")
operand_at = _reader(OPERAND, "nbbn.OPERAND")
copy_at = _reader(COPY, "nbbn.COPY")
like_at = _reader(LIKE, "nbbn.LIKE")
setting_at = _reader(SETTING, "nbbn.SETTING")


@intrinsic
def copied(typingctx, call):
    """Return a copy of a record, on the stack."""

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(ir.IntType(64), CALL.itemsize // 8))
        target = builder.bitcast(room, args[0].type)
        cgutils.raw_memcpy(builder, target, args[0], ir.Constant(ir.IntType(64), CALL.itemsize), 1)
        return target

    return call(call), codegen
