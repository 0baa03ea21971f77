"""Layer, RMS, instance and group normalization: batch normalization of other values together.

What is normalized together, and which parameters it has, is a view of the array and a `nbbn.problem.Form`;
all else is as in `nbbn.functional`, whose conventions about arrays and errors hold here.

- J. L. Ba, J. R. Kiros and G. E. Hinton, "Layer Normalization", arXiv 1607.06450.
- B. Zhang and R. Sennrich, "Root Mean Square Layer Normalization", arXiv 1910.07467.
- D. Ulyanov, A. Vedaldi and V. Lempitsky, "Instance Normalization", arXiv 1607.08022.
- Y. Wu and K. He, "Group Normalization", arXiv 1803.08494.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nbbn import arrays
from nbbn.arrays import ABSENT, Parameter, address
from nbbn.compiler import Step, in_one
from nbbn.dispatch import find
from nbbn.dtypes import STATISTICS, storage_of
from nbbn.frameworks import CPU, HOST, Array, Place, place
from nbbn.functional import evaluate, run_of, threads_again, threads_for
from nbbn.geometry import Strides
from nbbn.problem import Form
from nbbn.repeats import Repeats

INSTANCE_DIMENSIONS = 3  # of x, at least: samples, channels, and what is normalized
# Small calls that have been made before.
_rows_normalized, _rows_differentiated = Repeats("normalize"), Repeats("backward")
_channels_normalized, _channels_differentiated = Repeats("normalize"), Repeats("backward")
_EPS, _GROUPS = frozenset({float, type(None)}), frozenset({int, type(None)})
MANY = 16  # rows that a walk of its own is worth while for, where others would have to be copied


class NormForward(NamedTuple):
    """A normalized array, and what it was normalized with.

    Attributes
    ----------
    out : array
        Of x's kind, shape, dtype and memory layout.
    mean, var, invstd : array
        float64 (in JAX without x64: float32): mean, biased variance, and 1 / sqrt(var + eps) of all that
        is normalized together. Of RMS normalization the mean is 0, and var the mean square. The shape is
        that of x without its last dimensions, for layer and RMS normalization; (N, num_groups) for group
        and (N, C) for instance normalization.
    count : int
        How many values are normalized together; 0 where x is empty.
    """

    out: Array
    mean: Array
    var: Array
    invstd: Array
    count: int  # type: ignore[assignment]  # tuple.count is given up for the usual name


class NormGradients(NamedTuple):
    """The gradients of a loss with respect to the inputs of a normalization.

    Attributes
    ----------
    x : array
        Of x's kind, shape, dtype and memory layout.
    weight, bias : array or None
        float64 (in JAX without x64: float32), of the parameters' shape. RMS normalization has no bias.
    """

    x: Array
    weight: Array
    bias: Array | None


# --- which values are normalized together ------------------------------------------------------------


class _Walk(NamedTuple):
    """How the arrays of a call are gone through: some equal problems, which differ in where they begin."""

    shape: tuple[int, ...]
    strides: tuple[Strides, ...]  # of each array
    offsets: list[tuple[int, ...]]  # of each problem: where each array begins, in bytes
    form: Form
    sets: int  # of a problem: how many there are that are normalized together
    runs: dict[tuple[np.dtype, int, str], Any]  # what runs it: by type, number of threads and device


@functools.lru_cache(maxsize=1024)
def _channel_walk(
    shape: tuple[int, ...], strides: tuple[Strides, ...], axis: int, groups: int | None
) -> _Walk:
    """The channels of each sample; so many groups of them a sample, or each for itself."""
    sample = 0 if axis != 0 else 1
    samples, channels = shape[sample], shape[axis]
    pool = 1 if groups is None else channels // groups
    form = Form(pool=pool, period=channels)
    rest = [d for d in range(len(shape)) if d not in (sample, axis)]
    sizes = tuple(shape[d] for d in rest)
    steps = [(of[sample], of[axis]) for of in strides]
    inner = [tuple(of[d] for d in rest) for of in strides]
    if samples == 1 or channels == 1 or all(outer == channels * step for outer, step in steps):
        joined = tuple(
            ((step if channels > 1 else outer), *more)
            for (outer, step), more in zip(steps, inner, strict=True)
        )
        origin = (0,) * len(steps)
        return _Walk((samples * channels, *sizes), joined, [origin], form, samples * channels // pool, {})
    apart = tuple((step, *more) for (_, step), more in zip(steps, inner, strict=True))
    offsets = [tuple(n * outer for outer, _ in steps) for n in range(samples)]
    return _Walk((channels, *sizes), apart, offsets, form, channels // pool, {})


def _by_channel(x: np.ndarray, others: Sequence[np.ndarray], axis: int, groups: int | None) -> _Walk:
    return _channel_walk(x.shape, (x.strides, *(a.strides for a in others)), axis, groups)


def _side_by_side(shape: tuple[int, ...], strides: Strides, itemsize: int) -> bool:
    """Whether elements follow each other in memory, in C order."""
    step = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


@functools.lru_cache(maxsize=1024)
def _row_walk(
    shape: tuple[int, ...], strides: tuple[Strides, ...], itemsize: int, dims: int, centered: bool
) -> _Walk | None:
    """The last `dims` dimensions together; None where they are too scattered to be gone through."""
    if not all(_side_by_side(shape[-dims:], of[-dims:], itemsize) for of in strides):
        return None
    leading = [(size, tuple(of[d] for of in strides)) for d, size in enumerate(shape[:-dims]) if size > 1]
    columns = math.prod(shape[-dims:])
    rows, steps = leading.pop() if leading else (1, (columns * itemsize,) * len(strides))
    while leading and all(a == rows * b for a, b in zip(leading[-1][1], steps, strict=True)):
        rows *= leading.pop()[0]
    walks = math.prod(size for size, _ in leading)
    if walks > 1 and rows < MANY:
        return None
    offsets = [
        tuple(
            sum(n * step[k] for n, (_, step) in zip(index, leading, strict=True)) for k in range(len(strides))
        )
        for index in itertools.product(*(range(size) for size, _ in leading))
    ]
    row_strides = tuple((step, itemsize) for step in steps)
    return _Walk((rows, columns), row_strides, offsets, Form(along=True, centered=centered), rows, {})


def _by_row(x: np.ndarray, others: Sequence[np.ndarray], dims: int, centered: bool) -> _Walk | None:
    strides = x.strides, *(a.strides for a in others)
    return _row_walk(x.shape, strides, x.itemsize, dims, centered)


def _near(here: Place, a: np.ndarray) -> np.ndarray:
    """Return an array whose elements follow each other in C order: this one or a copy."""
    return a if _side_by_side(a.shape, a.strides, a.itemsize) else _copied(here, a)


def _copy(here: Place, source: np.ndarray, target: np.ndarray) -> None:
    """Copy, where the arrays are: what is normalized with a mean of 0 and a variance of 1 is what it was."""
    if source.ndim == 0:
        source, target = source.reshape(1), target.reshape(1)
    run = run_of(source, 0, (source.strides, target.strides), here)
    run.evaluate(address(source), address(target), ABSENT, ABSENT, ABSENT, ABSENT, 0.0)


def _copied(here: Place, source: np.ndarray) -> np.ndarray:
    """Return a copy in C order."""
    room = here.room(source.shape, source.dtype)
    _copy(here, source, room)
    return room


def _plainly(normalized_shape: Any) -> bool:
    """Whether it is an int or a tuple of ints, and nothing that is merely equal to one."""
    kind = type(normalized_shape)
    return kind is int or (kind is tuple and {*map(type, normalized_shape)} == {int})


def _parameter(
    name: str, value: Any, shape: tuple[int, ...], x: np.ndarray, here: Place, held: list[np.ndarray]
) -> Parameter:
    """Check a parameter of that shape and return how to find its elements in C order.

    A copy is `held` if they are not at equal distances.
    """
    if value is None:
        return ABSENT
    code = arrays.parameter_storage(name, value, shape, x).code
    if value.size == 0:
        return ABSENT
    stride, size = 0, 1
    for length, step in zip(value.shape[::-1], value.strides[::-1], strict=True):
        if length == 1:
            continue
        if size > 1 and step != size * stride:
            value = _copied(here, value)
            held.append(value)
            return address(value), value.itemsize, code
        if size == 1:
            stride = step
        size *= length
    return address(value), stride, code


def _run(here: Place, walk: _Walk, dtype: np.dtype) -> Any:
    threads = threads_for(here, math.prod(walk.shape), len(walk.strides))
    key = dtype, threads, here.device
    if (run := walk.runs.get(key)) is None:
        run = walk.runs[key] = find(walk.shape, 0, walk.strides, dtype, threads, here.device, walk.form)
    return here.on_stream(run)


def _forward(
    here: Place,
    walk: _Walk,
    run: Any,
    x: np.ndarray,
    out: np.ndarray,
    stats: np.ndarray,
    weight: Parameter,
    bias: Parameter,
    eps: float,
) -> None:
    """Normalize; statistics into float64[3, …] `stats`."""
    walks = len(walk.offsets)
    room = stats if walks == 1 else here.room((walks, 3, walk.sets), STATISTICS)
    for k, (at_x, at_out) in enumerate(walk.offsets):
        run.forward(
            address(x) + at_x, address(out) + at_out, address(room) + k * 24 * walk.sets, weight, bias,
            ABSENT, ABSENT, eps, 0.0, 1.0, (),
        )  # fmt: skip
    if walks > 1:
        _copy(here, room, np.moveaxis(stats.reshape(3, walks, walk.sets), 0, 1))


def _backward(
    walk: _Walk,
    run: Any,
    x: np.ndarray,
    grad_out: np.ndarray,
    grad_x: np.ndarray,
    gradients: np.ndarray,
    weight: Parameter,
    mean: Parameter,
    invstd: Parameter,
) -> None:
    """Gradients; those of weight and bias into float64[`_rows` of the walk, …] `gradients`."""
    several = len(walk.offsets) > 1
    for k, (at_x, at_grad_out, at_grad_x) in enumerate(walk.offsets):
        run.backward(
            address(x) + at_x, address(grad_out) + at_grad_out, address(grad_x) + at_grad_x,
            address(gradients), weight, _moved(mean, k * walk.sets), _moved(invstd, k * walk.sets),
            True, several + (k > 0),
        )  # fmt: skip


def _rows(walk: _Walk) -> int:
    """Return how many numbers the gradients of a parameter take; those of several calls are two."""
    return 2 if len(walk.offsets) == 1 else 4


def _moved(parameter: Parameter, elements: int) -> Parameter:
    at, stride, code = parameter
    return parameter if parameter is ABSENT else (at + elements * stride, stride, code)


# --- the two ways, with everything that is checked ---------------------------------------------------


def _viewed(x: Any, arguments: dict[str, Any]) -> tuple[Place, list[Any]]:
    own = type(x) is np.ndarray and all(
        value is None or type(value) is np.ndarray for value in arguments.values()
    )
    here, views = (HOST, [x, *arguments.values()]) if own else place(x, arguments, written=("out",))
    views[0] = arrays.checked("x", views[0])
    return here, views


def _finish(here: Place, out: np.ndarray, given: Any) -> Any:
    return here.result(out) if given is None else given


def _nothing(here: Place, shape: tuple[int, ...], eps: float) -> np.ndarray:
    """The statistics of no values."""
    stats = np.zeros((3, *shape))
    with np.errstate(divide="ignore"):
        stats[2] = 1.0 / np.sqrt(np.float64(eps))
    return here.put(stats)


def normalize_rows(
    x: Any, normalized_shape: Any, weight: Any, bias: Any, eps: Any, out: Any, centered: bool
) -> tuple[Any, np.ndarray, int, Place]:
    """Check, and normalize the last dimensions together.

    Return the output, float64[3, …] (mean, var, invstd) as the place of the call has it, how many values
    are normalized together, and that place.
    """
    key = None
    if (threads := threads_again(x, 2)) and _plainly(normalized_shape) and type(eps) in _EPS:
        key = threads, x.shape, normalized_shape, eps, centered
        if (again := _rows_normalized.again(key, x, out, weight, bias)) is not None:
            return *again[:2], 3 * x.size // again[1].size, HOST
    given = out
    here, (x, weight, bias, out) = _viewed(x, {"weight": weight, "bias": bias, "out": out})
    shape = _normalized(x, normalized_shape)
    held: list[np.ndarray] = []
    gamma = _parameter("weight", weight, shape, x, here, held)
    beta = _parameter("bias", bias, shape, x, here, held)
    if eps is None and not centered:
        eps = _epsilon(x.dtype)
    eps = arrays.number("eps", eps, 0.0, math.inf)
    if out is None:
        out = here.empty_like(x)
    else:
        arrays.output(out, x, weight=weight, bias=bias)
    lead = x.shape[: -len(shape)]
    if x.size == 0:
        return _finish(here, out, given), _nothing(here, lead, eps), 0, here
    stats = here.empty((3, *lead))
    walk = _by_row(x, (out,), len(shape), centered)
    if walk is None:
        near = _near(here, x)
        room = here.room(x.shape, x.dtype)
        walk = _by_row(near, (room,), len(shape), centered)
        assert walk is not None
        _forward(here, walk, _run(here, walk, x.dtype), near, room, stats, gamma, beta, eps)
        _copy(here, room, out)
    else:
        run = _rows_normalized.recorder(key, _run(here, walk, x.dtype))
        _forward(here, walk, run, x, out, stats, gamma, beta, eps)
        _rows_normalized.keep(key, run, out, x, weight, bias, stats)
    return _finish(here, out, given), stats, math.prod(shape), here


def differentiate_rows(
    grad_out: Any,
    x: Any,
    normalized_shape: Any,
    weight: Any,
    mean: Any,
    invstd: Any,
    out: Any,
    centered: bool,
) -> tuple[Any, np.ndarray, Place]:
    """Check, and compute the gradients.

    Return that of x, float64[2, …] (weight, bias) as the place of the call has it, and that place.
    """
    key = None
    if (threads := threads_again(x, 3)) and _plainly(normalized_shape):
        key = threads, x.shape, normalized_shape, centered
        again = _rows_differentiated.again(key, x, out, weight, None, mean, invstd, grad_out, None)
        if again is not None:
            return *again[:2], HOST
    given = out
    here, (x, grad_out, weight, mean, invstd, out) = _viewed(
        x, {"grad_out": grad_out, "weight": weight, "mean": mean, "invstd": invstd, "out": out}
    )
    shape = _normalized(x, normalized_shape)
    lead = x.shape[: -len(shape)]
    held: list[np.ndarray] = []
    grad_out = arrays.like("grad_out", grad_out, x)
    gamma = _parameter("weight", weight, shape, x, here, held)
    mu = _needed("mean", mean, lead, x, here, held) if centered else ABSENT
    sigma = _needed("invstd", invstd, lead, x, here, held)
    if out is None:
        out = here.empty_like(x)
    else:
        arrays.output(out, x, grad_out=grad_out, weight=weight, mean=mean, invstd=invstd)
    if x.size == 0:
        return _finish(here, out, given), here.put(np.zeros((2, *shape))), here
    near, dy, grad_x = x, grad_out, out
    walk = _by_row(near, (dy, grad_x), len(shape), centered)
    if walk is None:
        near, dy, grad_x = _near(here, x), _near(here, grad_out), here.room(x.shape, x.dtype)
        walk = _by_row(near, (dy, grad_x), len(shape), centered)
        assert walk is not None
        key = None  # what is copied is no argument's
    gradients = here.room((_rows(walk), *shape), STATISTICS)  # they may be many
    run = _rows_differentiated.recorder(key, _run(here, walk, x.dtype))
    _backward(walk, run, near, dy, grad_x, gradients, gamma, mu, sigma)
    _rows_differentiated.keep(key, run, out, x, weight, None, mean, invstd, grad_out, None, gradients)
    if grad_x is not out:
        _copy(here, grad_x, out)
    return _finish(here, out, given), gradients, here


def normalize_channels(
    x: Any, groups: Any, weight: Any, bias: Any, eps: Any, axis: Any, out: Any, features: int | None = None
) -> tuple[Any, np.ndarray, int, Place]:
    """Check, and normalize the channels of each sample, in groups or each for itself (`groups` None).

    Return as `normalize_rows`.
    """
    key = None
    threads = threads_again(x, 2)
    if threads and type(axis) is int and type(groups) in _GROUPS and type(eps) is float:
        key = threads, x.shape, axis, groups, eps, features
        if (again := _channels_normalized.again(key, x, out, weight, bias)) is not None:
            return *again[:2], 3 * x.size // again[1].size, HOST
    given = out
    here, (x, weight, bias, out) = _viewed(x, {"weight": weight, "bias": bias, "out": out})
    axis, shape, count = _grouped(x, groups, axis, features)
    channels = x.shape[axis]
    held: list[np.ndarray] = []
    gamma = _parameter("weight", weight, (channels,), x, here, held)
    beta = _parameter("bias", bias, (channels,), x, here, held)
    eps = arrays.number("eps", eps, 0.0, math.inf)
    if out is None:
        out = here.empty_like(x)
    else:
        arrays.output(out, x, weight=weight, bias=bias)
    if x.size == 0:
        return _finish(here, out, given), _nothing(here, shape, eps), 0, here
    stats = here.empty((3, *shape))
    walk = _by_channel(x, (out,), axis, groups)
    run = _channels_normalized.recorder(key, _run(here, walk, x.dtype))
    _forward(here, walk, run, x, out, stats, gamma, beta, eps)
    _channels_normalized.keep(key, run, out, x, weight, bias, stats)
    return _finish(here, out, given), stats, count, here


def differentiate_channels(
    grad_out: Any, x: Any, groups: Any, weight: Any, mean: Any, invstd: Any, axis: Any, out: Any
) -> tuple[Any, np.ndarray, Place]:
    """Check, and compute the gradients; return as `differentiate_rows`."""
    key = None
    if (threads := threads_again(x, 3)) and type(axis) is int and type(groups) in _GROUPS:
        key = threads, x.shape, axis, groups
        again = _channels_differentiated.again(key, x, out, weight, None, mean, invstd, grad_out, None)
        if again is not None:
            return *again[:2], HOST
    given = out
    here, (x, grad_out, weight, mean, invstd, out) = _viewed(
        x, {"grad_out": grad_out, "weight": weight, "mean": mean, "invstd": invstd, "out": out}
    )
    axis, shape, _ = _grouped(x, groups, axis, None)
    channels = x.shape[axis]
    held: list[np.ndarray] = []
    grad_out = arrays.like("grad_out", grad_out, x)
    gamma = _parameter("weight", weight, (channels,), x, here, held)
    mu = _needed("mean", mean, shape, x, here, held)
    sigma = _needed("invstd", invstd, shape, x, here, held)
    if out is None:
        out = here.empty_like(x)
    else:
        arrays.output(out, x, grad_out=grad_out, weight=weight, mean=mean, invstd=invstd)
    if x.size == 0:
        return _finish(here, out, given), here.put(np.zeros((2, channels))), here
    walk = _by_channel(x, (grad_out, out), axis, groups)
    gradients = here.empty((_rows(walk), channels))
    run = _channels_differentiated.recorder(key, _run(here, walk, x.dtype))
    _backward(walk, run, x, grad_out, out, gradients, gamma, mu, sigma)
    _channels_differentiated.keep(key, run, out, x, weight, None, mean, invstd, grad_out, None, gradients)
    return _finish(here, out, given), gradients, here


def _needed(
    name: str, value: Any, shape: tuple[int, ...], x: np.ndarray, here: Place, held: list[np.ndarray]
) -> Parameter:
    if value is None:
        raise ValueError(f"{name} must be given, got None")
    return _parameter(name, value, shape, x, here, held)


def _epsilon(dtype: np.dtype) -> float:
    """From 1 to the next number of the type that is computed with: RMS normalization's, as PyTorch has it."""
    return 2.0**-52 if dtype == np.float64 else 2.0**-23


def shape_of(normalized_shape: Any) -> tuple[int, ...]:
    """Return the shape of what is normalized together, or raise."""
    if isinstance(normalized_shape, np.ndarray) and normalized_shape.ndim:
        raise TypeError("normalized_shape must be an int or a sequence of ints, got an array")
    if isinstance(normalized_shape, (str, bytes)) or not isinstance(normalized_shape, Sequence):
        return (_length(normalized_shape),)
    if not normalized_shape:
        raise ValueError("normalized_shape must have at least one dimension, got none")
    return tuple(_length(size) for size in normalized_shape)


def _length(size: Any) -> int:
    length = arrays.integer("normalized_shape", size)
    if length < 0:
        raise ValueError(f"normalized_shape must have no negative dimension, got {length}")
    return length


def _normalized(x: np.ndarray, normalized_shape: Any) -> tuple[int, ...]:
    shape = shape_of(normalized_shape)
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"x must have a shape that ends with normalized_shape {shape}, got {x.shape}")
    return shape


def _grouped(x: np.ndarray, groups: Any, axis: Any, features: int | None) -> tuple[int, tuple[int, int], int]:
    """Return the channel axis, the shape of the statistics, and how many values are normalized together."""
    axis = arrays.channel_axis(x, axis, INSTANCE_DIMENSIONS if groups is None else 2)
    samples, channels = x.shape[0 if axis != 0 else 1], x.shape[axis]
    if features is not None and channels != features:
        raise ValueError(f"x must have {features} channels on axis {axis}, got {channels} (shape {x.shape})")
    if groups is None:
        count = x.size // (samples * channels) if x.size else 0
        if x.size and count < 2:
            raise ValueError(
                "x must have more than one value per channel of a sample, "
                f"got shape {x.shape} with axis {axis}"
            )
        return axis, (samples, channels), count
    groups = arrays.integer("num_groups", groups)
    if groups < 1 or channels % groups:
        raise ValueError(
            f"num_groups must be at least 1 and divide the {channels} channels of x, got {groups}"
        )
    return axis, (samples, groups), x.size // (samples * groups) if x.size else 0


# --- layer normalization -----------------------------------------------------------------------------


def layer_norm_forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    out: Array | None = None,
) -> NormForward:
    """Layer normalization, with what its backward pass needs.

    Parameters
    ----------
    x : array
        As in `nbbn.layer_norm`.
    normalized_shape : int or sequence of int
        As in `nbbn.layer_norm`.
    weight, bias : array, optional
        As in `nbbn.layer_norm`.
    eps : float, default 1e-5
        As in `nbbn.layer_norm`.
    out : array, optional
        As in `nbbn.layer_norm`.

    Returns
    -------
    NormForward
        ``out``, and ``mean``, ``var`` and ``invstd`` of the shape of x without its last dimensions.

    Raises
    ------
    TypeError, ValueError, nbbn.DeviceError
        As `layer_norm`.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> forward = nbbn.layer_norm_forward(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, eps=0.0)
    >>> forward.mean, forward.var, forward.count
    (array([ 2., 20.]), array([  1., 100.]), 2)
    """
    out, stats, count, here = normalize_rows(x, normalized_shape, weight, bias, eps, out, True)
    mean, var, invstd = here.rows(stats)
    return NormForward(out, mean, var, invstd, count)


def layer_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> Array:
    """Layer normalization, with the arguments of ``torch.nn.functional.layer_norm``.

    Over the last dimensions of x, those of `normalized_shape`, and with parameters for each of their
    elements [1]_::

        out = (x - mean) / sqrt(var + eps) · weight + bias

    Parameters
    ----------
    x : array
        Of any kind and type (see `nbbn.batch_norm`), any strides; its shape ends with `normalized_shape`.
    normalized_shape : int or sequence of int
        The shape of what is normalized together.
    weight, bias : array, optional
        float32, float64 or x's type, of shape `normalized_shape`, any strides. Without them, 1 and 0.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    out : array, optional
        Where to write the result: of x's shape and dtype, any strides. May be x itself.

    Returns
    -------
    array
        `out`, or a new array of x's kind, shape, dtype and memory layout.

    Raises
    ------
    TypeError
        If an array is not one, or not of such a type, or a number not a number.
    ValueError
        If a shape or a value does not fit, or `out` overlaps an input without being x.
    nbbn.DeviceError
        If the arrays are on different devices, or on one that cannot be computed with.

    Notes
    -----
    Rows, the values that are normalized together, are read where they lie if their elements follow each
    other in memory; others are copied.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, arXiv 1607.06450, section 3.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.layer_norm(np.array([[1.0, 3.0], [10.0, 30.0]]), 2, bias=np.array([0.0, 1.0]), eps=0.0)
    array([[-1.,  2.],
           [-1.,  2.]])
    """
    return normalize_rows(x, normalized_shape, weight, bias, eps, out, True)[0]


def layer_norm_backward(
    grad_out: Array,
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    *,
    mean: Array,
    invstd: Array,
    out: Array | None = None,
) -> NormGradients:
    """The gradients of layer normalization [1]_.

    With x_hat = (x - mean) · invstd, g = grad_out · weight, and means over what is normalized together::

        grad_x      = invstd · (g - mean(g) - x_hat · mean(g · x_hat))
        grad_weight = Σ grad_out · x_hat,   grad_bias = Σ grad_out   over the other dimensions

    Parameters
    ----------
    grad_out : array
        The gradient with respect to the output: of x's shape and dtype, any strides.
    x : array
        As in `nbbn.layer_norm`.
    normalized_shape : int or sequence of int
        As in `nbbn.layer_norm`.
    weight : array, optional
        As in `nbbn.layer_norm`.
    mean, invstd : array
        What x was normalized with, as `layer_norm_forward` returns it: float32, float64 or x's type, of the
        shape of x without its last dimensions.
    out : array, optional
        Where to write grad_x: of x's shape and dtype, any strides. May be x itself.

    Returns
    -------
    NormGradients
        ``weight`` and ``bias`` are computed whether or not there are such parameters.

    Raises
    ------
    TypeError, ValueError, nbbn.DeviceError
        As `layer_norm`.

    References
    ----------
    .. [1] J. L. Ba, J. R. Kiros and G. E. Hinton, arXiv 1607.06450, section 3, differentiated.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0, 2.0, 6.0]])
    >>> forward = nbbn.layer_norm_forward(x, 3, eps=0.0)
    >>> gradients = nbbn.layer_norm_backward(
    ...     np.array([[1.0, 0.0, 0.0]]), x, 3, mean=forward.mean, invstd=forward.invstd
    ... )
    >>> gradients.x.round(4)
    array([[ 0.1763, -0.2204,  0.0441]])
    """
    grad_x, gradients, here = differentiate_rows(
        grad_out, x, normalized_shape, weight, mean, invstd, out, True
    )
    grad_weight, grad_bias, *_ = here.rows(gradients)
    return NormGradients(grad_x, grad_weight, grad_bias)


# --- RMS normalization -------------------------------------------------------------------------------


def rms_norm_forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    *,
    eps: float | None = None,
    out: Array | None = None,
) -> NormForward:
    """RMS normalization, with what its backward pass needs.

    Parameters
    ----------
    x : array
        As in `nbbn.rms_norm`.
    normalized_shape : int or sequence of int
        As in `nbbn.rms_norm`.
    weight : array, optional
        As in `nbbn.rms_norm`.
    eps : float, optional
        As in `nbbn.rms_norm`.
    out : array, optional
        As in `nbbn.rms_norm`.

    Returns
    -------
    NormForward
        ``out``; ``var``, the mean square, and ``invstd`` of the shape of x without its last dimensions;
        ``mean`` is 0.

    Raises
    ------
    TypeError, ValueError, nbbn.DeviceError
        As `rms_norm`.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.rms_norm_forward(np.array([[3.0, 4.0]]), 2, eps=0.0).var
    array([12.5])
    """
    out, stats, count, here = normalize_rows(x, normalized_shape, weight, None, eps, out, False)
    mean, var, invstd = here.rows(stats)
    return NormForward(out, mean, var, invstd, count)


def rms_norm(
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    eps: float | None = None,
    *,
    out: Array | None = None,
) -> Array:
    """RMS normalization, with the arguments of ``torch.nn.functional.rms_norm``.

    Layer normalization that subtracts no mean [1]_::

        out = x / sqrt(mean(x²) + eps) · weight

    Parameters
    ----------
    x : array
        As in `nbbn.layer_norm`.
    normalized_shape : int or sequence of int
        As in `nbbn.layer_norm`.
    weight : array, optional
        As in `nbbn.layer_norm`.
    eps : float, optional
        Added to the mean square; at least 0. Without it, 2⁻⁵² of float64, and 2⁻²³, about 1.2e-7, of others.
    out : array, optional
        As in `nbbn.layer_norm`.

    Returns
    -------
    array
        `out`, or a new array of x's kind, shape, dtype and memory layout.

    Raises
    ------
    TypeError, ValueError, nbbn.DeviceError
        As `nbbn.layer_norm`.

    References
    ----------
    .. [1] B. Zhang and R. Sennrich, arXiv 1910.07467, equation 4.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.rms_norm(np.array([[3.0, 4.0]]), 2, eps=0.0).round(4)
    array([[0.8485, 1.1314]])
    """
    return normalize_rows(x, normalized_shape, weight, None, eps, out, False)[0]


def rms_norm_backward(
    grad_out: Array,
    x: Array,
    normalized_shape: int | Sequence[int],
    weight: Array | None = None,
    *,
    invstd: Array,
    out: Array | None = None,
) -> NormGradients:
    """The gradients of RMS normalization [1]_: of layer normalization with a mean of 0 that is a constant.

    With x_hat = x · invstd, g = grad_out · weight, and means over what is normalized together::

        grad_x      = invstd · (g - x_hat · mean(g · x_hat))
        grad_weight = Σ grad_out · x_hat   over the other dimensions

    Parameters
    ----------
    grad_out : array
        As in `nbbn.layer_norm_backward`.
    x : array
        As in `nbbn.layer_norm_backward`.
    normalized_shape : int or sequence of int
        As in `nbbn.layer_norm_backward`.
    weight : array, optional
        As in `nbbn.layer_norm_backward`.
    invstd : array
        What x was normalized with, as `rms_norm_forward` returns it: float32, float64 or x's type, of the
        shape of x without its last dimensions.
    out : array, optional
        As in `nbbn.layer_norm_backward`.

    Returns
    -------
    NormGradients
        Its ``bias`` is None.

    Raises
    ------
    TypeError, ValueError, nbbn.DeviceError
        As `rms_norm`.

    References
    ----------
    .. [1] B. Zhang and R. Sennrich, arXiv 1910.07467, equation 4, differentiated.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[3.0, 4.0]])
    >>> forward = nbbn.rms_norm_forward(x, 2, eps=0.0)
    >>> nbbn.rms_norm_backward(np.array([[1.0, 0.0]]), x, 2, invstd=forward.invstd).x.round(4)
    array([[ 0.181 , -0.1358]])
    """
    grad_x, gradients, here = differentiate_rows(
        grad_out, x, normalized_shape, weight, None, invstd, out, False
    )
    grad_weight, *_ = here.rows(gradients)
    return NormGradients(grad_x, grad_weight, None)


# --- group normalization -----------------------------------------------------------------------------


def group_norm_forward(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
) -> NormForward:
    """Group normalization, with what its backward pass needs.

    Parameters
    ----------
    x : array
        As in `nbbn.group_norm`.
    num_groups : int
        As in `nbbn.group_norm`.
    weight, bias : array, optional
        As in `nbbn.group_norm`.
    eps : float, default 1e-5
        As in `nbbn.group_norm`.
    axis : int, default 1
        As in `nbbn.group_norm`.
    out : array, optional
        As in `nbbn.group_norm`.

    Returns
    -------
    NormForward
        ``out``, and ``mean``, ``var`` and ``invstd`` of shape (N, num_groups).

    Raises
    ------
    TypeError, ValueError, nbbn.DeviceError
        As `group_norm`.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.group_norm_forward(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0).mean
    array([[ 2., 20.]])
    """
    out, stats, count, here = normalize_channels(x, _some(num_groups), weight, bias, eps, axis, out)
    mean, var, invstd = here.rows(stats)
    return NormForward(out, mean, var, invstd, count)


def _some(num_groups: Any) -> Any:
    if num_groups is None:
        raise TypeError("num_groups must be an int, got NoneType")
    return num_groups


def group_norm(
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Group normalization, with the arguments of ``torch.nn.functional.group_norm``.

    The channels of each sample are cut into groups of as many, one after the other, and the values of a
    group are normalized together; weight and bias are of each channel [1]_.

    Parameters
    ----------
    x : array
        Of any kind and type (see `nbbn.batch_norm`), at least two dimensions, any strides. Its samples are
        along the first axis that is not the channels'.
    num_groups : int
        How many groups; it divides C.
    weight, bias : array, optional
        float32, float64 or x's type, shape (C,). Without them, 1 and 0.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    axis : int, default 1
        The channel axis, of length C.
    out : array, optional
        Where to write the result: of x's shape and dtype, any strides. May be x itself.

    Returns
    -------
    array
        `out`, or a new array of x's kind, shape, dtype and memory layout.

    Raises
    ------
    TypeError
        If an array is not one, or not of such a type, or a number not a number.
    ValueError
        If a shape or a value does not fit, or `out` overlaps an input without being x.
    nbbn.DeviceError
        If the arrays are on different devices, or on one that cannot be computed with.

    References
    ----------
    .. [1] Y. Wu and K. He, arXiv 1803.08494, section 3.1.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.group_norm(np.array([[1.0, 3.0, 10.0, 30.0]]), 2, eps=0.0)
    array([[-1.,  1., -1.,  1.]])
    """
    return normalize_channels(x, _some(num_groups), weight, bias, eps, axis, out)[0]


def group_norm_backward(
    grad_out: Array,
    x: Array,
    num_groups: int,
    weight: Array | None = None,
    *,
    mean: Array,
    invstd: Array,
    axis: int = 1,
    out: Array | None = None,
) -> NormGradients:
    """The gradients of group normalization [1]_.

    As those of `layer_norm_backward`, with means over the values of a group, and grad_weight and grad_bias
    sums over all values of a channel.

    Parameters
    ----------
    grad_out : array
        The gradient with respect to the output: of x's shape and dtype, any strides.
    x : array
        As in `nbbn.group_norm`.
    num_groups : int
        As in `nbbn.group_norm`.
    weight : array, optional
        As in `nbbn.group_norm`.
    mean, invstd : array
        What x was normalized with, as `group_norm_forward` returns it: float32, float64 or x's type, of
        shape (N, num_groups).
    axis : int, default 1
        As in `nbbn.group_norm`.
    out : array, optional
        Where to write grad_x: of x's shape and dtype, any strides. May be x itself.

    Returns
    -------
    NormGradients
        ``weight`` and ``bias`` have shape (C,).

    Raises
    ------
    TypeError, ValueError, nbbn.DeviceError
        As `group_norm`.

    References
    ----------
    .. [1] Y. Wu and K. He, arXiv 1803.08494, section 3.1, differentiated.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0, 2.0, 6.0]])
    >>> forward = nbbn.group_norm_forward(x, 1, eps=0.0)
    >>> gradients = nbbn.group_norm_backward(
    ...     np.array([[1.0, 0.0, 0.0]]), x, 1, mean=forward.mean, invstd=forward.invstd
    ... )
    >>> gradients.x.round(4), gradients.bias
    (array([[ 0.1763, -0.2204,  0.0441]]), array([1., 0., 0.]))
    """
    grad_x, gradients, here = differentiate_channels(
        grad_out, x, _some(num_groups), weight, mean, invstd, axis, out
    )
    grad_weight, grad_bias, *_ = here.rows(gradients)
    return NormGradients(grad_x, grad_weight, grad_bias)


# --- instance normalization --------------------------------------------------------------------------


def instance_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: Array | None = None,
) -> NormForward:
    """Instance normalization, with what its backward pass needs; touches no state.

    Parameters
    ----------
    x : array
        As in `nbbn.instance_norm`.
    weight, bias : array, optional
        As in `nbbn.instance_norm`.
    eps : float, default 1e-5
        As in `nbbn.instance_norm`.
    axis : int, default 1
        As in `nbbn.instance_norm`.
    out : array, optional
        As in `nbbn.instance_norm`.

    Returns
    -------
    NormForward
        ``out``, and ``mean``, ``var`` and ``invstd`` of shape (N, C).

    Raises
    ------
    TypeError, ValueError, nbbn.DeviceError
        As `instance_norm`.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.instance_norm_forward(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0).mean
    array([[ 2., 20.]])
    """
    out, stats, count, here = normalize_channels(x, None, weight, bias, eps, axis, out)
    mean, var, invstd = here.rows(stats)
    return NormForward(out, mean, var, invstd, count)


def instance_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: Array | None = None,
) -> Array:
    """Instance normalization, with the arguments of ``torch.nn.functional.instance_norm``.

    Each channel of each sample is normalized for itself; weight and bias are of each channel [1]_. The
    running statistics that are passed are updated in place, last, with the averages over the samples of
    their means and of their unbiased variances.

    Parameters
    ----------
    x : array
        Of any kind and type (see `nbbn.batch_norm`), at least three dimensions, any strides. Its samples are
        along the first axis that is not the channels'.
    running_mean, running_var : array, optional
        float32, float64 or x's type, shape (C,), any stride. Both are needed if `use_input_stats` is False.
    weight, bias : array, optional
        float32, float64 or x's type, shape (C,). Without them, 1 and 0.
    use_input_stats : bool, default True
        Whether to normalize with x's own statistics. If not, this is `nbbn.batch_norm` in evaluation.
    momentum : float, default 0.1
        The weight of the new observation in the running statistics, in [0, 1].
    eps : float, default 1e-5
        Added to the variance; at least 0.
    axis : int, default 1
        The channel axis, of length C.
    out : array, optional
        Where to write the result: of x's shape and dtype, any strides. May be x itself.

    Returns
    -------
    array
        `out`, or a new array of x's kind, shape, dtype and memory layout.

    Raises
    ------
    TypeError
        If an array is not one, or not of such a type, or a number not a number.
    ValueError
        If a shape or a value does not fit, running statistics are missing or cannot be written, a channel
        of a sample has one value, or `out` overlaps an input without being x. Nothing has been written then.
    nbbn.DeviceError
        If the arrays are on different devices, or on one that cannot be computed with.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi and V. Lempitsky, arXiv 1607.08022, equation 2.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.instance_norm(np.array([[[1.0, 3.0], [10.0, 30.0]]]), eps=0.0)
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """
    if arrays.flag("use_input_stats", use_input_stats) and momentum is None:
        raise ValueError(
            "momentum must be a number in [0, 1], got None: a cumulative average needs the count "
            "of batches that nbbn.InstanceNorm keeps"
        )
    if momentum is not None:
        momentum = arrays.number("momentum", momentum, 0.0, 1.0)
    if not use_input_stats:
        running = running_mean, running_var
        asked = "use_input_stats=False"
        return evaluate(x, *running, weight, bias, eps, axis, out, least=INSTANCE_DIMENSIONS, asked=asked)[0]
    return normalize_instances(x, running_mean, running_var, weight, bias, momentum, eps, axis, out)[0]


def normalize_instances(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    momentum: float,
    eps: Any,
    axis: Any,
    out: Any = None,
    features: int | None = None,
    then: tuple[Step, ...] = (),
) -> tuple[Any, np.ndarray, int, Place]:
    """Check, normalize each channel of each sample, update the running statistics, and take further steps.

    In this order; the steps if x is not empty. On the CPU the running statistics and what the steps write
    are written by all of this or none, also where a signal's handler raises. Return as `normalize_rows`.
    """
    running: list[Any] = [None, None]
    if running_mean is not None or running_var is not None:
        running = _checked_running(x, running_mean, running_var, weight, bias, axis, out, features)
    result = normalize_channels(x, None, weight, bias, eps, axis, out, features)
    _, stats, count, here = result
    if count:
        if momentum != 0.0:
            then = (*_update_running(here, stats, count, momentum, running), *then)
        in_one(*then)
    return result


def _checked_running(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    axis: Any,
    out: Any,
    features: int | None,
) -> list[Any]:
    """Check running statistics that will be updated, and return them as the place of the call has them."""
    here, (view, mean, var, gamma, beta, result) = place(
        x,
        {
            "running_mean": running_mean,
            "running_var": running_var,
            "weight": weight,
            "bias": bias,
            "out": out,
        },
        written=("running_mean", "running_var", "out"),
    )
    view = arrays.checked("x", view)
    channels = view.shape[_grouped(view, None, axis, features)[0]]
    for name, value in (("running_mean", mean), ("running_var", var)):
        arrays.parameter(name, value, channels, view, updated=True)
    arrays.both_updated(mean, var)
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is not None and result is not None and arrays.overlap(result, value):
            raise ValueError(f"out must not overlap {name}, unless it is x itself")
    if here.device != CPU:
        arrays.apart({"running_mean": mean, "running_var": var}, x=view, weight=gamma, bias=beta)
    return [mean, var]


def _update_running(
    here: Place, stats: np.ndarray, count: int, momentum: float, running: list[Any]
) -> list[Step]:
    """Update the running statistics: those of a batch of means, and of a batch of unbiased variances.

    On the CPU copies of them are updated; return the steps that take these over.
    """
    mean, var = stats[0], stats[1]
    run = run_of(mean, 1, (mean.strides, mean.strides), here)
    room = here.room(mean.shape, STATISTICS)
    unused = here.room((3, mean.shape[1]), STATISTICS)
    unbiased = here.room(mean.shape, STATISTICS)
    factor = count / (count - 1)
    # Normalized with a variance of 1 and this eps, a number is multiplied with the factor.
    run.evaluate(address(var), address(unbiased), ABSENT, ABSENT, ABSENT, ABSENT, factor**-2 - 1.0)
    steps: list[Step] = []
    for values, column in zip((mean, unbiased), running, strict=True):
        if column is None:
            continue
        storage = storage_of(column.dtype)
        assert storage is not None
        updated = column
        if here.device == CPU:
            updated = column.copy()
            steps.append(partial(column.__setitem__, ..., updated))
        found = address(updated), updated.strides[0], storage.code
        run.forward(
            address(values), address(room), address(unused), ABSENT, ABSENT, found, ABSENT, 0.0, momentum,
            0.0, (),
        )  # fmt: skip
    return steps


def instance_norm_backward(
    grad_out: Array,
    x: Array,
    weight: Array | None = None,
    *,
    mean: Array,
    invstd: Array,
    axis: int = 1,
    out: Array | None = None,
) -> NormGradients:
    """The gradients of instance normalization [1]_.

    Those of `nbbn.batch_norm_backward` in training, of each sample for itself; grad_weight and grad_bias are
    sums over the samples. If x was normalized with running statistics, `nbbn.batch_norm_backward` with
    ``training=False`` has the gradients.

    Parameters
    ----------
    grad_out : array
        The gradient with respect to the output: of x's shape and dtype, any strides.
    x : array
        As in `nbbn.instance_norm`.
    weight : array, optional
        As in `nbbn.instance_norm`.
    mean, invstd : array
        What x was normalized with, as `instance_norm_forward` returns it: float32, float64 or x's type, of
        shape (N, C).
    axis : int, default 1
        As in `nbbn.instance_norm`.
    out : array, optional
        Where to write grad_x: of x's shape and dtype, any strides. May be x itself.

    Returns
    -------
    NormGradients
        ``weight`` and ``bias`` have shape (C,).

    Raises
    ------
    TypeError, ValueError, nbbn.DeviceError
        As `instance_norm`.

    References
    ----------
    .. [1] D. Ulyanov, A. Vedaldi and V. Lempitsky, arXiv 1607.08022, equation 2, differentiated.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[[1.0, 2.0, 6.0]]])
    >>> forward = nbbn.instance_norm_forward(x, eps=0.0)
    >>> gradients = nbbn.instance_norm_backward(
    ...     np.array([[[1.0, 0.0, 0.0]]]), x, mean=forward.mean, invstd=forward.invstd
    ... )
    >>> gradients.x.round(4)
    array([[[ 0.1763, -0.2204,  0.0441]]])
    """
    grad_x, gradients, here = differentiate_channels(grad_out, x, None, weight, mean, invstd, axis, out)
    grad_weight, grad_bias, *_ = here.rows(gradients)
    return NormGradients(grad_x, grad_weight, grad_bias)
