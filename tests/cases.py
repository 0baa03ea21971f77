"""What the tests run on: shapes, data, memory layouts, and mixes of parameter types."""

import itertools
import math
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided, sliding_window_view

import reference

HALF = (np.float16, ml_dtypes.bfloat16)
DTYPES = (np.float32, np.float64, *HALF)
"""What the elements of x may be."""

POISON = np.nan  # around every view: whoever reads a neighbour shows it


# --- shapes ----------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """The shape of an activation and its channel axis."""

    dims: tuple[int, ...]
    axis: int = 1

    def __str__(self):
        return "x".join(map(str, self.dims)) + f"@{self.axis}"

    @property
    def channels(self):
        return self.dims[self.axis]

    @property
    def count(self):
        """Values in a channel."""
        return math.prod(self.dims) // self.channels


# Two and three values in a channel: m/(m-1) is 2 and 1.5 there, and no reduction has a whole vector.
FEW_VALUES = [
    Shape((2, 3)),
    Shape((3, 3)),
    Shape((1, 5, 2)),
    Shape((1, 4, 3)),
    Shape((2, 1, 1, 1)),
    Shape((3, 17, 1, 1)),
    Shape((1, 2, 1, 3)),
    Shape((1, 2, 9), axis=-1),
    Shape((3, 1, 33), axis=-1),
]

# One value in a channel has no variance: evaluation only.
ONE_VALUE = [Shape((1, 1, 1, 1)), Shape((1, 16, 1)), Shape((1, 7)), Shape((1, 1, 5), axis=-1)]

# Vectors have 4 to 16 lanes, and blocks of channels are powers of two.
CHANNELS = [
    Shape(dims, axis)
    for c in (1, 2, 3, 31, 33, 63, 65, 127, 129, 251)
    for dims, axis in (((5, c), 1), ((3, c, 7), 1), ((2, 3, 4, c), -1))
]

# Positions in a plane that straddle the sizes of vectors and blocks, in both orders.
STRADDLING = [
    Shape(dims, axis)
    for block in (16, 256, 512, 1024, 2048)
    for n in (block - 1, block, block + 1)
    for dims, axis in (((2, 3, n), 1), ((n, 5), 1))
]

RANKS = [
    Shape((33, 17)),
    Shape((33, 17), axis=0),
    Shape((4, 3, 50)),
    Shape((4, 3, 50), axis=0),
    Shape((4, 5, 6, 7), axis=2),
    Shape((2, 3, 4, 5, 6)),
    *(Shape((2, 3, 4, 3, 2, 5), axis) for axis in range(-3, 3)),
]

# Awkward sizes from models, and counts beyond what fits a block, a thread or 16 bits.
AWKWARD = [
    Shape((12, 4, 8, 8)),
    Shape((1, 24, 14, 14)),
    Shape((1, 32, 30)),
    Shape((32, 27, 7)),
    Shape((9, 128, 1)),
    Shape((1025, 3, 2)),
    Shape((1025, 4)),
    Shape((20000, 1)),
    Shape((30001, 2)),
    Shape((16, 1, 41, 43)),
    Shape((1, 3, 130, 131)),
    Shape((2, 2048)),
    Shape((4, 8, 8, 32), axis=-1),
]

SMALL = FEW_VALUES + CHANNELS + STRADDLING + RANKS + AWKWARD

# Checked in a sample of their channels.
LARGE = [
    Shape((2, 251, 28, 28)),
    Shape((1, 257, 28, 28)),
    Shape((8, 322, 16, 16)),
    Shape((2, 64, 224, 224)),
    Shape((2, 112, 112, 64), axis=-1),
    Shape((1, 16, 40, 40, 40)),
    Shape((3136, 256)),
    Shape((128, 8192)),
    Shape((65536, 2, 3)),
    Shape((131071, 3)),
    Shape((1, 1, 600, 701)),
    Shape((300, 2, 27, 31)),
    Shape((300, 27, 31, 3), axis=-1),
    Shape((40, 61, 60, 5), axis=-1),
    Shape((2, 70000)),
    Shape((3, 65536, 1)),
    Shape((3, 65535)),
]


# --- data ------------------------------------------------------------------------------------------


def columns_for(dtype):
    """Return the types that parameters and statistics may be of, for x of a type."""
    return (np.float32, np.float64, *([dtype] if dtype in HALF else ()))


def in_range(value, dtype):
    """Return the value, or the nearest that the type has room around: float16 ends at 65504."""
    info = reference.finfo(dtype)
    size = min(abs(value), float(info.max) / 64)
    return float(np.copysign(max(size, 8 * float(info.smallest_normal)) if value else 0.0, value))


def with_types(*values):
    """Return pairs of a value and a type, each value in the type's range, and none twice."""
    return [(v, d) for d in DTYPES for v in dict.fromkeys(in_range(v, d) for v in values)]


def activations(rng, shape, dtype, offset=0.0, sigma=1.0):
    """Return normal values; mean and deviation differ between channels, so that a mix-up shows.

    An offset beyond the type's range is brought back into it.
    """
    offset = in_range(offset, dtype)
    across = [1] * len(shape.dims)
    across[shape.axis] = shape.channels
    mean = offset + sigma * rng.normal(size=across)
    deviation = sigma * rng.uniform(0.5, 2.0, size=across)
    return (mean + deviation * rng.normal(size=shape.dims)).astype(dtype)


def parameter(rng, channels, dtype):
    """Return a weight or a bias, of both signs; None for the type None."""
    return None if dtype is None else rng.normal(size=channels).astype(dtype)


def running_statistics(rng, channels, dtypes=(np.float32, np.float32)):
    """Return a running_mean and a running_var."""
    mean, var = rng.normal(size=channels), rng.uniform(0.5, 3.0, size=channels)
    return mean.astype(dtypes[0]), var.astype(dtypes[1])


PARAMETER_TYPES = list(itertools.product((None, np.float32, np.float64), repeat=2))


def type_id(dtype):
    """Name a type, a tuple of types, or None in the id of a test; a number names itself."""
    if isinstance(dtype, float):
        return f"{dtype:g}"
    if isinstance(dtype, tuple):
        return "-".join(map(type_id, dtype))
    return "None" if dtype is None else np.dtype(dtype).name


def some_channels(rng, shape, limit=100_000):
    """Return which channels to check: all of a small array, ends and a random few of a large one."""
    if math.prod(shape.dims) <= limit or shape.channels <= 12:
        return np.arange(shape.channels)
    middle = rng.choice(np.arange(2, shape.channels - 2), size=8, replace=False)
    return np.sort([0, 1, *middle, shape.channels - 2, shape.channels - 1])


# --- memory layouts --------------------------------------------------------------------------------
#
# A layout takes an array and returns one of the same shape that lies otherwise in memory, with the
# same values (a broadcast one repeats its first). What lies around it in its buffer is POISON.


def embedded(a, extend, view):
    """Return `a` as `view` of a poisoned buffer with the shape `extend(a.shape)`."""
    buffer = np.full(extend(a.shape), POISON, a.dtype)
    result = buffer[view]
    result[...] = a
    return result


def permuted(order):
    """Return the layout in which the axes lie in memory in this order, the last one nearest."""

    def layout(a):
        return a.transpose(order).copy(order="C").transpose(np.argsort(order))

    return layout


def channels_last(a):
    return permuted((0, *range(2, a.ndim), 1))(a)


def from_second(a):
    return embedded(a, lambda s: (s[0] + 2, *s[1:]), np.s_[1:-1])


def some_of_the_channels(a):
    return embedded(a, lambda s: (s[0], s[1] + 5, *s[2:]), np.s_[:, 2:-3])


def every_second(a):
    return embedded(a, lambda s: (*s[:-1], 2 * s[-1]), np.s_[..., ::2])


def every_third_channel(a):
    return embedded(a, lambda s: (s[0], 3 * s[1], *s[2:]), np.s_[:, 1::3])


def inside(a):
    return embedded(a, lambda s: tuple(n + 3 for n in s), (np.s_[1:-2],) * a.ndim)


def reversed_along(*axes):
    """Return the layout with negative strides along these axes; along all, if none is named."""

    def layout(a):
        view = tuple(np.s_[::-1] if not axes or d in axes else np.s_[:] for d in range(a.ndim))
        return a[view].copy()[view]

    return layout


def backwards_in_steps(a):
    return embedded(a, lambda s: (*s[:-1], 2 * s[-1]), np.s_[..., ::-2])


def broadcast_along(*axes):
    """Return the layout that repeats the first value along these axes, with stride 0."""

    def layout(a):
        view = tuple(np.s_[:1] if d % a.ndim in axes else np.s_[:] for d in range(a.ndim))
        return np.broadcast_to(a[view].copy(), a.shape)

    return layout


def overlapping_windows(a):
    """Windows that share memory: the last axis walks along the one before it."""
    line = np.zeros((*a.shape[:-2], a.shape[-2] + a.shape[-1] - 1), a.dtype)
    line[...] = a.reshape(*a.shape[:-2], -1)[..., : line.shape[-1]]
    return sliding_window_view(line, a.shape[-1], axis=-1)


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def unaligned(a):
    """One byte off."""
    result = np.ndarray(a.shape, a.dtype, buffer=bytearray(a.nbytes + 1), offset=1)
    result[...] = a
    return result


def record_field(a):
    """A field of a packed record: an odd stride, and unaligned."""
    records = np.zeros(a.shape, [("tag", "u1"), ("value", a.dtype)])
    records["tag"] = 0xFF
    records["value"] = a
    return records["value"]


def complex_part(a):
    """As the imaginary part of a complex array lies: one of each pair, from the second number on."""
    pairs = np.full((*a.shape, 2), POISON, a.dtype)
    pairs[..., 1] = a
    return pairs[..., 1]


def odd_strides_of_ones(a):
    """Axes of length 1 with strides that mean nothing."""
    a = a.copy()
    strides = [7 * a.itemsize + 1 if n == 1 else step for n, step in zip(a.shape, a.strides, strict=True)]
    return as_strided(a, a.shape, strides)


LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "fortran": np.asfortranarray,
    "channels_last": channels_last,
    "from_second": from_second,
    "some_channels": some_of_the_channels,
    "every_second": every_second,
    "third_channel": every_third_channel,
    "inside": inside,
    "reversed": reversed_along(),
    "reversed_batch": reversed_along(0),
    "reversed_channels": reversed_along(1),
    "reversed_last": lambda a: reversed_along(a.ndim - 1)(a),
    "backwards": backwards_in_steps,
    "unaligned": unaligned,
    "record_field": record_field,
    "complex_part": complex_part,
}
"""For any array of rank 2 or more, to read or to write."""

READ_LAYOUTS = {
    **LAYOUTS,
    "read_only": read_only,
    "broadcast_batch": broadcast_along(0),
    "broadcast_channels": broadcast_along(1),
    "broadcast_last": broadcast_along(3),
    "broadcast_plane": broadcast_along(2, 3),
    "broadcast_all": broadcast_along(0, 1, 2, 3),
    "windows": overlapping_windows,
}
"""For any array of rank 4, to read: some repeat their values, so that they cannot be written."""


def permutations(rank):
    """Return all the orders in memory of `rank` axes, by name."""
    orders = itertools.permutations(range(rank))
    return {"memory" + "".join(map(str, order)): permuted(order) for order in orders}


VECTOR_LAYOUTS = {
    "contiguous": np.ascontiguousarray,
    "every_second": every_second,
    "reversed": lambda a: a[::-1].copy()[::-1],
    "read_only": read_only,
    "unaligned": unaligned,
    "record_field": record_field,
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
}
"""For weight, bias and statistics."""


def in_every_layout(test):
    """Parametrize by the types of x and the layouts that any array can have."""
    types = pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
    return types(pytest.mark.parametrize("layout", LAYOUTS)(test))
