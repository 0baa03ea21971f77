"""Whether an argument will do: an array of its shape, type and place in memory, a number of its range.

All arrays are NumPy arrays here, or NumPy's views of other arrays (`nbbn.frameworks`). Of a view of a
GPU's memory nothing is read but where and how it lies.
"""

import ctypes
import importlib
import math
import operator
import sys
from typing import Any, cast

import numpy as np

from nbbn.dlpack import all_memory
from nbbn.dtypes import BFLOAT16, FLOAT32, FLOAT64, NAMES, Storage, named, storage_of
from nbbn.frameworks import SUPPORTED, kind_of, type_name, unsupported

# Of what is no number, float() takes some all the same: text in a 0-d array, a complex number's real part.
_NO_NUMBERS = (np.bool_, np.complexfloating, np.flexible, np.object_, np.datetime64, np.timedelta64)

Parameter = tuple[int, int, int]  # address, stride in bytes, code of the storage; all 0: not given
ABSENT: Parameter = (0, 0, 0)


# The codes of what a parameter may be stored as, whatever x is.
_WIDE = {storage.dtype: storage.code for storage in (FLOAT32, FLOAT64)}

# Where, after the head of every object, a NumPy array has its data pointer.
_DATA = object.__basicsize__


def _read_address(array: np.ndarray) -> int:
    return all_memory[(id(array) + _DATA) >> 3]


def _ask_address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def _reads_addresses() -> bool:
    """Whether arrays are laid out in this Python as NumPy's C interface has them in CPython."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    probe = np.zeros(3, np.float32)
    return all(_read_address(array) == _ask_address(array) for array in (probe, probe[1:], probe[::-1]))


# Where element 0 of an array lies. Asking for it takes several times as long as reading it does, and a
# call on a small array needs eight such addresses.
address = _read_address if _reads_addresses() else _ask_address


def checked(name: str, value: Any) -> np.ndarray:
    """Return an array, if it is one of a supported type, or raise."""
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be {SUPPORTED}, got {kind_of(value)}")
    if storage_of(value.dtype) is None:
        raise unsupported(name, value.dtype)
    return value


def channel_axis(x: np.ndarray, axis: Any, least: int = 2) -> int:
    """Return the channel axis of x, which must have `least` dimensions; not negative."""
    ndim = x.ndim
    if ndim < least:
        raise ValueError(f"x must have at least {least} dimensions, got {ndim} (shape {x.shape})")
    channel = integer("axis", axis)
    if not -ndim <= channel < ndim:
        raise ValueError(f"axis must be in [-{ndim}, {ndim}) for x of shape {x.shape}, got {channel}")
    return channel % ndim


def parameter(name: str, value: Any, channels: int, x: np.ndarray, updated: bool = False) -> Parameter:
    """Check a number per channel, one that is to be `updated` in place perhaps; return how to find it.

    It is the caller who keeps it alive. Of 16 bits it may only be if x is of the same type.
    """
    if value is None:
        return ABSENT
    code = _WIDE.get(value.dtype)
    if code is None or value.shape != (channels,):
        code = parameter_storage(name, value, (channels,), x, ", a number per channel").code
    stride = value.strides[0]
    if updated:
        if not value.flags.writeable:
            raise ValueError(
                f"{name} must be writable, since training updates it, got a read-only array; "
                "the functions whose names end with _forward write to nothing"
            )
        if channels > 1 and abs(stride) < value.itemsize:
            raise ValueError(f"{name} must not overlap itself, got stride {stride}")
    return address(value), stride, code


def parameter_storage(
    name: str, value: Any, shape: tuple[int, ...], x: np.ndarray, which_is: str = ""
) -> Storage:
    """Check the type and the shape of a parameter; return how its elements are stored."""
    storage = storage_of(value.dtype)
    if storage is None:
        raise unsupported(name, value.dtype)
    if value.itemsize < 4 and storage is not storage_of(x.dtype):
        wide = "float32 or float64"
        allowed = f"{wide}, or of x's type," if x.itemsize < 4 else wide
        raise TypeError(f"{name} must be {allowed} for x of {type_name(x.dtype)}, got {storage.name}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}{which_is}, got {value.shape}")
    return storage


def like(name: str, value: Any, x: np.ndarray) -> np.ndarray:
    """Return an array, if it has the shape and the type of x, or raise."""
    if type(value) is np.ndarray and value.dtype is x.dtype and value.shape == x.shape:
        return value
    array = checked(name, value)
    if array.shape != x.shape:
        raise ValueError(f"{name} must have x's shape {x.shape}, got {array.shape}")
    if array.dtype != x.dtype and storage_of(array.dtype) is not storage_of(x.dtype):
        raise TypeError(f"{name} must have x's dtype {type_name(x.dtype)}, got {type_name(array.dtype)}")
    return array


def output(out: Any, x: np.ndarray, replaced: Any = None, **inputs: Any) -> None:
    """Check that `out` can take a result of x's shape and type; it may be x itself, or what is `replaced`."""
    array = like("out", out, x)
    if not array.flags.writeable:
        raise ValueError("out must be writable, got a read-only array")
    if _overlaps_itself(array):
        raise ValueError(f"out must not overlap itself, got strides {array.strides} for shape {array.shape}")
    for name, other in (("x", x), ("residual", replaced), *inputs.items()):
        if other is None or other is x is array or not overlap(array, other):
            continue
        # Where out is x, an input that lies there too is x itself.
        if _same(array, other) and (other is replaced or _same(array, x)):
            continue
        itself = name if other is x or other is replaced else "x"
        raise ValueError(f"out must not overlap {name}, unless it is {itself} itself")


def beside(out: np.ndarray, parameters: tuple[Parameter, ...], channels: int, **columns: Any) -> None:
    """Check that `out` overlaps none of some columns, which `parameters` are, in their order."""
    if out.flags.c_contiguous:
        begin = address(out)
        before, end = begin - FLOAT64.code * (channels + 1), begin + out.nbytes
        for at, stride, _ in parameters:
            if before < at < end or not 0 <= stride <= FLOAT64.code:
                break
        else:
            return  # all are far away, which is quicker to see than by asking NumPy of each
    for name, column in columns.items():
        if column is not None and overlap(out, column):
            raise ValueError(f"out must not overlap {name}")


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are of one shape and have their elements at the same places."""
    if address(a) != address(b) or a.shape != b.shape:
        return False
    return a.strides == b.strides or all(
        n == 1 or step == other for n, step, other in zip(a.shape, a.strides, b.strides, strict=True)
    )


def apart(written: dict[str, Any], **read: Any) -> None:
    """Check that nothing that is written overlaps what is read."""
    for name, array in written.items():
        for other_name, other in read.items():
            if array is not None and other is not None and overlap(array, other):
                raise ValueError(f"{name} must not overlap {other_name} on a GPU, since training updates it")


def both_updated(running_mean: np.ndarray | None, running_var: np.ndarray | None) -> None:
    """Check that statistics that are updated, those that there are, have no memory in common."""
    if running_mean is not None and running_var is not None and overlap(running_mean, running_var):
        raise ValueError("running_var must not overlap running_mean, since both are updated")


def overlap(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have memory in common."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True  # too entangled to tell: refused


def _overlaps_itself(array: np.ndarray) -> bool:
    """Whether two elements may lie on one another: each stride must step over all smaller ones."""
    if array.flags.c_contiguous or array.flags.f_contiguous:
        return False
    reach = array.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False


def integer(name: str, value: Any) -> int:
    """Return `value` as an int, or raise."""
    if type(value) is int:
        return value
    if not isinstance(value, (bool, np.bool_)):
        try:
            return operator.index(cast(int, value))
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def number(name: str, value: Any, low: float, high: float) -> float:
    """Return `value` as a float in [low, high], or raise."""
    if type(value) is float and low <= value <= high and abs(value) != math.inf:
        return value
    if type(value) is not float:
        if not _has_value(value):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        try:
            value = float(value)
        except OverflowError:
            value = math.inf if value > 0 else -math.inf
        except (TypeError, ValueError, RuntimeError):  # the last one from PyTorch
            raise TypeError(f"{name} must be a number, got {type(value).__name__}") from None
    if not (low <= value <= high) or math.isinf(value):
        if math.isinf(low):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        bound = f"at least {low:g}" if math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {bound} and finite, got {value!r}")
    return float(value)


def _has_value(value: Any) -> bool:
    """Whether `value` is a real number: what float() takes, but for text, bools and what else it reads."""
    if isinstance(value, (np.generic, np.ndarray)):
        masked = isinstance(value, np.ma.MaskedArray)
        return value.ndim == 0 and not masked and not issubclass(value.dtype.type, _NO_NUMBERS)
    return not isinstance(value, bool) and (hasattr(value, "__float__") or hasattr(value, "__index__"))


def storage(dtype: Any) -> Storage:
    """Return how the elements of a supported dtype, however it is named, are stored; or raise."""
    found = named(dtype)
    if found is None:
        raise TypeError(f"dtype must be {NAMES}, as a str or NumPy's, got {dtype!r}")
    return found


def numpy_dtype(dtype: Any) -> np.dtype:
    """Return NumPy's dtype for a supported one, however it is named, or raise."""
    found = storage(dtype)
    if found is not BFLOAT16:
        return found.dtype
    try:
        result: np.dtype = np.dtype(importlib.import_module("ml_dtypes").bfloat16)
        return result
    except ImportError:
        raise TypeError(
            "dtype must be float32, float64 or float16, since NumPy has no bfloat16 without the package "
            f"ml_dtypes (pip install ml_dtypes), got {dtype!r}"
        ) from None


def flag(name: str, value: Any) -> bool:
    """Return `value` as a bool, or raise."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
