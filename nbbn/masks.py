"""Which positions of x count: from a mask, or from how long each sample is."""

import operator
from typing import Any, NamedTuple

import numpy as np

from nbbn import arrays
from nbbn.errors import DeviceError
from nbbn.frameworks import CPU, on_host

_BOOL = np.dtype(np.bool_)


class Where(NamedTuple):
    """What a caller says about the positions that count; checked against x (`counted`), not before.

    Attributes
    ----------
    mask, lengths : array or None
        See `nbbn.batch_norm`. One of them is given.
    lengths_axis : int or None
        Of x.
    """

    mask: Any = None
    lengths: Any = None
    lengths_axis: Any = None


def counted(where: Where, x: np.ndarray, axis: int, device: str) -> np.ndarray:
    """Return for each position of x, its elements without the channel axis, whether it counts.

    That is in the memory of the host, whatever the device that x is on.
    """
    if where.mask is not None and where.lengths is not None:
        raise ValueError("mask and lengths must not both be given")
    shape = x.shape[:axis] + x.shape[axis + 1 :]
    mask: np.ndarray = where.mask
    if where.lengths is not None:
        mask = _from_lengths(where, x, axis, device)
    elif type(mask) is not np.ndarray or mask.dtype != _BOOL or mask.shape != shape:
        mask = _mask(mask, shape, device)
    if mask.flags.c_contiguous and (x.flags.c_contiguous or _in_order(x.strides, axis)):
        return mask
    # Its axes in the order in which x has them.
    one = np.empty_like(x, dtype=np.bool_, subok=False, shape=(*x.shape[:axis], 1, *x.shape[axis + 1 :]))
    found = one[(slice(None),) * axis + (0,)]
    if mask.strides == found.strides:
        return mask
    found[...] = mask
    return found


def _in_order(strides: tuple[int, ...], axis: int) -> bool:
    """Whether the axes of an array but one lie in its memory as in C order."""
    steps = [abs(step) for d, step in enumerate(strides) if d != axis]
    return all(map(operator.ge, steps, steps[1:]))


def seen(where: Where | None, device: str) -> dict[str, np.ndarray]:
    """Return the arrays that say which positions count, where a result could lie over them: on the CPU."""
    if where is None or device != CPU:
        return {}
    arrays_of_it = {"mask": where.mask, "lengths": where.lengths}
    return {name: on_host(name, value, device) for name, value in arrays_of_it.items() if value is not None}


def _given(name: str, value: Any, numbers: str, device: str) -> np.ndarray:
    try:
        return on_host(name, value, device)
    except DeviceError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be an array of {numbers}: {error}") from None


def _mask(value: Any, shape: tuple[int, ...], device: str) -> np.ndarray:
    mask = _given("mask", value, "bools", device)
    if (mask.dtype != _BOOL and mask.size) or isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"mask must be an array of bools, got {type(value).__name__} of {mask.dtype}")
    if mask.shape == shape:
        return mask
    try:
        return np.broadcast_to(mask, shape)
    except ValueError:
        raise ValueError(
            f"mask must broadcast to {shape}, x's shape without the channel axis, got {mask.shape}"
        ) from None


def _from_lengths(where: Where, x: np.ndarray, axis: int, device: str) -> np.ndarray:
    """Return True for the first lengths[n] positions of sample n."""
    others = [d for d in range(x.ndim) if d != axis]
    if len(others) < 2:
        raise ValueError(
            f"lengths need an x of at least 3 dimensions, got shape {x.shape}; a mask takes one of 2"
        )
    samples = others[0]
    along = others[-1] if where.lengths_axis is None else arrays.integer("lengths_axis", where.lengths_axis)
    if not -x.ndim <= along < x.ndim:
        raise ValueError(
            f"lengths_axis must be in [-{x.ndim}, {x.ndim}) for x of shape {x.shape}, got {along}"
        )
    along %= x.ndim
    if along in (axis, samples):
        what = "channel" if along == axis else "samples'"
        raise ValueError(f"lengths_axis must not be the {what} axis, got {along} for x of shape {x.shape}")
    lengths = _given("lengths", where.lengths, "ints", device)
    if lengths.dtype.kind not in "iu" and lengths.size:  # NumPy takes an empty list for floats
        raise TypeError(f"lengths must be an array of ints, got {lengths.dtype}")
    if isinstance(where.lengths, np.ma.MaskedArray):
        raise TypeError("lengths must be an array of ints without a mask, got a masked one")
    if lengths.shape != x.shape[samples : samples + 1]:
        raise ValueError(
            f"lengths must have shape ({x.shape[samples]},), a number per sample, got {lengths.shape}"
        )
    if lengths.size and (lengths.min() < 0 or lengths.max() > x.shape[along]):
        raise ValueError(
            f"lengths must be in [0, {x.shape[along]}], the length of axis {along}, got "
            f"{lengths.min()} to {lengths.max()}"
        )
    mask = np.arange(x.shape[along]) < lengths[:, None]
    shape = [1] * len(others)
    shape[0], shape[others.index(along)] = mask.shape
    return np.broadcast_to(mask.reshape(shape), [x.shape[d] for d in others])
