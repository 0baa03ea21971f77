"""The one table of storage types. A new type is a row here, a load and a store on each target.

Elements of 16 bits are a format to store numbers in: each is widened as it is loaded, computed with in
float32, summed in float64, and rounded once as it is stored.
"""

import contextlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Storage:
    """How the elements of an array are stored.

    Attributes
    ----------
    name : str
        As NumPy, PyTorch and others call it.
    real : type
        What they are computed with: numpy.float32 or numpy.float64.
    code : int
        Tells the kernels which type a parameter is of: its number of bytes, but for bfloat16.
    dtype : numpy.dtype
        What NumPy stores them as.
    dlpack : int
        DLPack's code for the kind of number.
    """

    name: str
    real: type
    code: int
    dtype: np.dtype
    dlpack: int = 2


FLOAT64 = Storage("float64", np.float64, 8, np.dtype(np.float64))
FLOAT32 = Storage("float32", np.float32, 4, np.dtype(np.float32))
FLOAT16 = Storage("float16", np.float32, 2, np.dtype(np.float16))
# NumPy has no bfloat16 of its own, and the package that adds one is not needed: this dtype stands in for
# it where the arrays are another library's.
BFLOAT16 = Storage("bfloat16", np.float32, 3, np.dtype([("bfloat16", np.uint16)]), dlpack=4)

STORAGES = (FLOAT32, FLOAT64, FLOAT16, BFLOAT16)
NAMES = "float32, float64, float16 or bfloat16"
STATISTICS = FLOAT64.dtype

_known: dict[np.dtype, Storage] = {storage.dtype: storage for storage in STORAGES}


def storage_of(dtype: np.dtype) -> Storage | None:
    """Return how elements of a NumPy dtype are stored, or None if nothing is computed with them."""
    found = _known.get(dtype)
    if found is None and dtype.name == BFLOAT16.name and dtype == dtype.newbyteorder("="):
        found = _known[dtype] = BFLOAT16  # that of ml_dtypes
    return found


def bfloat16_as_float32(values: np.ndarray) -> np.ndarray:
    """Return elements of bfloat16, of whatever dtype they are known by, in float32, which has them all."""
    return (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def widened(values: np.ndarray) -> np.ndarray:
    """Return values of a supported type in float64, which has them all."""
    if storage_of(values.dtype) is BFLOAT16:
        values = bfloat16_as_float32(values)
    return np.asarray(values.astype(np.float64))


def narrowed(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return float64 values in a supported type, rounded once; as in a kernel, no warning where it ends."""
    if storage_of(dtype) is not BFLOAT16:
        with np.errstate(all="ignore"):
            return np.asarray(values.astype(dtype))
    # Rounded to 8 bits here: by way of float32, as ml_dtypes does it, they would be rounded twice.
    exponent = np.frexp(values)[1]
    exponent = np.maximum(exponent, -125)  # below, numbers are subnormal, and have fewer bits
    with np.errstate(all="ignore"):
        rounded = np.ldexp(np.rint(np.ldexp(values, 8 - exponent)), exponent - 8).astype(np.float32)
    return np.asarray((rounded.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(dtype))


def named(dtype: object) -> Storage | None:
    """Return the same for anything that NumPy takes for a dtype, and for "bfloat16"."""
    if isinstance(dtype, str) and dtype == BFLOAT16.name:
        return BFLOAT16
    if dtype is not None:  # float64 to NumPy
        # NumPy reads a small language here, and raises what its parser does: SyntaxError, for one.
        with contextlib.suppress(Exception):
            return storage_of(np.dtype(dtype))  # type: ignore[call-overload]
    return None
