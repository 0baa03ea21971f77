"""Which calls are good: what the documentation asks of the arguments, without a word of nbbn's own code.

`fault` says what is wrong with a call, None where it must be computed. Overlaps are found byte by byte.
"""

import math
import numbers
import operator
from decimal import Decimal

import numpy as np

from cases import DTYPES

COLUMNS = ("running_mean", "running_var", "weight", "bias", "mean", "invstd")  # a number a channel


def is_array(value):
    """Whether it is a NumPy array that can be computed with; a mask or a matrix means something else."""
    if not isinstance(value, np.ndarray) or isinstance(value, (np.matrix, np.ma.MaskedArray)):
        return False
    return any(value.dtype == np.dtype(dtype) for dtype in DTYPES)  # `in` would compare types by name


def is_int(value):
    if isinstance(value, (bool, np.bool_)):
        return False
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def is_number(value, low=0.0, high=math.inf):
    """Whether it is a finite real number in [low, high]."""
    if isinstance(value, np.ndarray):
        if value.ndim or value.dtype.kind == "O" or isinstance(value, np.ma.MaskedArray):
            return False
        value = value[()]
    if isinstance(value, (bool, np.timedelta64)):  # to NumPy, the latter is an integer
        return False
    if not isinstance(value, (numbers.Real, Decimal)) and not is_int(value):
        return False
    try:
        value = float(value)
    except (OverflowError, ValueError):
        return False
    return math.isfinite(value) and low <= value <= high


def is_bool(value):
    return isinstance(value, (bool, np.bool_))


def cells(array):
    """The addresses of all bytes of an array, one for each byte of each element."""
    at = np.array(array.__array_interface__["data"][0])
    for size, stride in zip(array.shape, array.strides, strict=True):
        at = np.add.outer(at, stride * np.arange(size))
    return np.add.outer(at, np.arange(array.itemsize)).reshape(-1)


def overlap(a, b):
    return a is not None and b is not None and bool(np.isin(cells(a), cells(b)).any())


def overlaps_itself(array):
    at = cells(array)
    return len(np.unique(at)) < len(at)


def same_view(a, b):
    """Whether they are the same elements in the same order; the stride of a single one says nothing."""
    return all(
        a.__array_interface__[key] == b.__array_interface__[key] for key in ("data", "shape", "typestr")
    ) and all(n == 1 or step == other for n, step, other in zip(a.shape, a.strides, b.strides, strict=True))


def _column_fault(name, value, channels, x, updated):
    if value is None:
        return None
    if not is_array(value):
        return f"{name} is no array of numbers"
    if value.itemsize < 4 and value.dtype != x.dtype:
        return f"{name} is of 16 bits, and x of another type"
    if value.shape != (channels,):
        return f"{name} has not one number a channel"
    if updated and not value.flags.writeable:
        return f"{name} cannot be written"
    if updated and overlaps_itself(value):
        return f"{name} overlaps itself"
    return None


def _out_fault(out, x, others):
    if not is_array(out):
        return "out is no array of numbers"
    if (out.shape, out.dtype) != (x.shape, x.dtype):
        return "out is not like x"
    if not out.flags.writeable:
        return "out cannot be written"
    if overlaps_itself(out):
        return "out overlaps itself"
    if overlap(out, x) and not same_view(out, x):
        return "out overlaps x"
    in_place = same_view(out, x)
    overlapped = (name for name, other in others.items() if overlap(out, other))
    wrong = (f"out overlaps {name}" for name in overlapped if not (in_place and same_view(out, others[name])))
    return next(wrong, None)


def fault(function, arguments):
    """Return what is wrong with a call of a function of nbbn, by name; None if nothing is."""
    given = {"axis": 1, "eps": 1e-5, "momentum": 0.1, "out": None} | arguments
    training = given.get("training", function == "batch_norm_backward")
    x, axis = given["x"], given["axis"]
    if not is_bool(training):
        return "training is no bool"
    training = bool(training) or function == "batch_norm_forward"
    if not is_array(x):
        return "x is no array of numbers"
    if x.ndim < 2:
        return "x has no channel axis"
    if not is_int(axis) or not -x.ndim <= operator.index(axis) < x.ndim:
        return "axis is none of x's"
    channels = x.shape[operator.index(axis)]
    others = {name: given[name] for name in ("grad_out", *COLUMNS) if given.get(name) is not None}
    if function == "batch_norm_backward":
        dy = given["grad_out"]
        if not is_array(dy) or (dy.shape, dy.dtype) != (x.shape, x.dtype):
            return "grad_out is not like x"
        needed = "mean", "invstd"
    else:
        needed = ("running_mean", "running_var") if function == "batch_norm" and not training else ()
    for name in needed:
        if name not in others:
            return f"{name} is missing"
    updates = function == "batch_norm" and training
    for name in COLUMNS:
        wrong = _column_fault(name, others.get(name), channels, x, updates and name.startswith("running"))
        if wrong:
            return wrong
    if updates and overlap(others.get("running_mean"), others.get("running_var")):
        return "running_mean overlaps running_var"
    if not is_number(given["eps"]):
        return "eps is no number of its range"
    if (updates or given["momentum"] is not None) and not is_number(given["momentum"], high=1.0):
        return "momentum is no number of its range"
    if training and function != "batch_stats" and x.size and x.size == channels:
        return "x has one value a channel"
    return None if given["out"] is None else _out_fault(given["out"], x, others)
