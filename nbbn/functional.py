"""Batch normalization as functions on arrays: what is asked, checked, and passed on.

An array is one of NumPy, PyTorch, JAX, CuPy or Numba's CUDA target, or any that has ``__dlpack__`` and
lies in the memory of the host. It is read where it lies. All arrays of a call are on one device, and there
it is computed; on a GPU on the stream that is current for x's library, which the host does not wait for.
The results are of x's kind; the other arguments may be of other kinds.

The mathematics is that of S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network
Training by Reducing Internal Covariate Shift", arXiv 1502.03167. Every function validates all of its
arguments before it computes, and computes before it writes any state.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nbbn import arrays, repeats
from nbbn.arrays import ABSENT, Parameter, address
from nbbn.columns import columns_on
from nbbn.compiler import Step, pool
from nbbn.dispatch import cpu, find
from nbbn.dtypes import FLOAT64
from nbbn.frameworks import CPU, HOST, Array, Place, place
from nbbn.fusion import ALONE, SLOPE, Fusion, fusion
from nbbn.geometry import Strides
from nbbn.masks import counted, seen
from nbbn.problem import BATCH, NOTHING, Extras, Form, Marks
from nbbn.stats import BatchStats

# Up to this many elements, of all arrays together, waking the threads costs more than they save.
SERIAL_ELEMENTS = 3 << 17

# With these alone there is nothing to find out about a call. Asked in line: a small call takes few µs.
_Array = np.ndarray
_OWN = frozenset({np.ndarray, type(None)})


class BatchNormForward(NamedTuple):
    """What a training step computes.

    Attributes
    ----------
    out : array
        The normalized array, of x's kind, shape, dtype and memory layout.
    mean, var, invstd : array
        float64 (in JAX without x64: float32), shape (C,): mean, biased variance, and 1 / sqrt(var + eps).
    count : int
        Values per channel.
    """

    out: Array
    mean: Array
    var: Array
    invstd: Array
    count: int  # type: ignore[assignment]  # tuple.count is given up for the usual name


class BatchNormGradients(NamedTuple):
    """The gradients of a loss with respect to the inputs of batch normalization.

    Attributes
    ----------
    x : array
        Of x's kind, shape, dtype and memory layout.
    weight, bias : array
        float64 (in JAX without x64: float32), shape (C,).
    """

    x: Array
    weight: Array
    bias: Array


class BatchNormResidualGradients(NamedTuple):
    """The same where a residual was added.

    Attributes
    ----------
    x : array
        Of x's kind, shape, dtype and memory layout.
    weight, bias : array
        float64 (in JAX without x64: float32), shape (C,).
    residual : array
        As ``x``.
    """

    x: Array
    weight: Array
    bias: Array
    residual: Array


_trained, _evaluated = repeats.Repeats("forward"), repeats.Repeats("evaluate")
_differentiated = repeats.Repeats("backward")
_NOTHING_ALONG = None, None, None  # as `Fusion.kind`, a mask and a residual


def threads_again(x: Any, operands: int, fused: Fusion = ALONE) -> int:
    """Return how many threads may work on so many arrays as large as x in a call to be made again, or 0.

    That is one of NumPy's arrays, also a mask and a residual; and not with a slope of 0, which is equal to
    -0.
    """
    if type(x) is not _Array:
        return 0
    if fused is not ALONE:
        where = fused.where
        if where is not None and (type(where.mask) is not _Array or where.lengths is not None):
            return 0
        if type(fused.residual) not in _OWN or fused.slope == 0.0:
            return 0
        operands += (where is not None) + (fused.residual is not None)
    return 1 if x.size * operands <= SERIAL_ELEMENTS else pool.threads()


def threads_for(here: Place, size: int, operands: int) -> int:
    """Return how many threads may work on so many arrays, of so many elements each."""
    return 1 if size * operands <= SERIAL_ELEMENTS or here.device != CPU else pool.threads()


def run_of(x: np.ndarray, axis: int, strides: tuple[Strides, ...], here: Place, form: Form = BATCH) -> Any:
    """Return what runs the stages on x and other arrays of its shape; `strides` are x's and theirs."""
    threads = threads_for(here, x.size, len(strides))
    if form is BATCH:  # to look a form up takes time, of which a small call takes little
        return here.on_stream(find(x.shape, axis, strides, x.dtype, threads, here.device))
    return here.on_stream(find(x.shape, axis, strides, x.dtype, threads, here.device, form))


def fused_forward(
    x: np.ndarray,
    axis: int,
    out: np.ndarray,
    here: Place,
    fused: Fusion,
    counting: bool = True,
    recording: Callable[[Any], Any] | None = None,
) -> tuple[Any, Extras, int]:
    """Return what runs a forward pass with what goes along, what that is given, and how many values count.

    What runs it is what `recording` makes of that, if given.
    """
    operands, residual = [x, out], 0
    if fused.residual is not None:
        operands, residual = [x, fused.residual, out], address(fused.residual)
    run, marks, count = _with_mask(x, axis, operands, here, fused, counting, recording)
    return run, Extras(residual, slope=fused.slope, marks=marks), count


def _with_mask(
    x: np.ndarray,
    axis: int,
    operands: list[np.ndarray],
    here: Place,
    fused: Fusion,
    counting: bool = True,
    recording: Callable[[Any], Any] | None = None,
) -> tuple[Any, Marks | None, int]:
    """Return what runs the stages on such operands, what a mask leaves, and how many values that is.

    That is of a channel; without a mask, all. Where nobody asks how many count, they are not counted.
    """
    strides = tuple(a.strides for a in operands)
    if fused.counted is not None:
        of_mask = fused.counted.strides
        strides += ((*of_mask[:axis], 0, *of_mask[axis:]),)
    run = run_of(x, axis, strides, here, fused.form)
    if recording is not None:
        run = recording(run)
    if fused.counted is None:
        return run, None, x.size // x.shape[axis]
    marks = run.mark(address(fused.counted), counting)
    return run, marks, marks.values


def with_x(fused: Fusion, x: np.ndarray, residual: Any, axis: int, here: Place) -> Fusion:
    """Return what goes along, checked against x; `residual` is NumPy's view of the one that there is."""
    if residual is not None:
        residual = arrays.like("residual", residual, x)
    which = None if fused.where is None else counted(fused.where, x, axis, here.device)
    return Fusion(fused.activation, fused.slope, residual, fused.where, which)


def values_of(fused: Fusion, x: np.ndarray, axis: int) -> int:
    """Return how many values of a channel count, where nothing else looks at x."""
    if fused.counted is not None:
        return int(np.count_nonzero(fused.counted))
    return x.size // x.shape[axis] if x.size else 0


def _clear(array: np.ndarray | None, x: np.ndarray, axis: int, here: Place, fused: Fusion) -> None:
    """Set a result to 0 of which no element counts; it may be x itself."""
    if array is None or not array.size:
        return
    if here.device == CPU:
        array[...] = 0
    else:  # evaluation sets to 0 what does not count
        alone = Fusion(counted=fused.counted)
        run, extras, _ = fused_forward(x, axis, array, here, alone, counting=False)
        run.evaluate(address(x), address(array), ABSENT, ABSENT, ABSENT, ABSENT, 0.0, extras)


def _enough(count: int, x: np.ndarray, axis: int, fused: Fusion) -> None:
    """Raise where there is one value per channel, which has no variance."""
    if count == 1 and fused.counted is not None:
        raise ValueError("mask must leave more than one value per channel in training, got one that counts")
    if count == 1:
        raise ValueError(
            f"x must have more than one value per channel in training, got shape {x.shape} with axis {axis}"
        )


def _channels(x: np.ndarray, axis: int, features: int | None) -> int:
    """Return the length of the channel axis, which may have to be the number of a module's features."""
    channels: int = x.shape[axis]
    if features is not None and channels != features:
        raise ValueError(
            f"x must have {features} channels (num_features) on axis {axis}, got {channels} (shape {x.shape})"
        )
    return channels


def batch_stats(
    x: Array,
    *,
    axis: int = 1,
    mask: Any = None,
    lengths: Any = None,
    lengths_axis: int | None = None,
) -> BatchStats:
    """Count, mean and biased variance of each channel.

    Parameters
    ----------
    x : array
        Of any kind and type (see `batch_norm`), at least two dimensions, any strides.
    axis : int, default 1
        The channel axis, of length C.
    mask, lengths, lengths_axis : optional
        Which positions of x count: see `batch_norm`.

    Returns
    -------
    BatchStats
        ``count`` (int), ``mean`` and ``var`` (of x's kind, float64, shape (C,)). An empty array has
        count, mean and variance 0, which changes nothing that it is merged with.

    Raises
    ------
    TypeError
        If `x` is not an array of one of these types, or `axis` not an int.
    ValueError
        If `x` has fewer than two dimensions, or `axis` is out of range, or a mask does not fit.
    nbbn.DeviceError
        If the arrays are on different devices, or on one that cannot be computed with.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.batch_stats(np.array([[1.0, 10.0], [3.0, 30.0]]))
    BatchStats(count=2, mean=array([ 2., 20.]), var=array([  1., 100.]))
    """
    here = HOST
    if type(x) is not _Array:
        here, (x,) = place(x, {})
    x = arrays.checked("x", x)
    axis = arrays.channel_axis(x, axis)
    channels = x.shape[axis]
    fused = ALONE
    if not (mask is lengths is lengths_axis is None):
        fused = fusion(mask=mask, lengths=lengths, lengths_axis=lengths_axis)
    stats = here.empty((3, channels))
    count = take_stats(x, axis, here, with_x(fused, x, None, axis, here), stats)
    stats = here.rows(stats if count else here.put(np.zeros((2, channels))))
    return BatchStats(count, stats[0], stats[1])


def take_stats(x: np.ndarray, axis: int, here: Place, fused: Fusion, stats: np.ndarray) -> int:
    """Take the statistics of those values of a channel that count, if any do, into float64[3, C].

    Return how many these are.
    """
    if not x.size:
        return 0
    run, marks, count = _with_mask(x, axis, [x], here, Fusion(counted=fused.counted))
    if count:
        run.stats(address(x), address(stats), Extras(marks=marks))
    return count


def train(
    x: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    axis: int,
    out: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    momentum: float = 0.0,
    correction: float = 1.0,
    features: int | None = None,
    then: tuple[Step, ...] = (),
    fused: Fusion = ALONE,
    repeating: bool = True,
) -> tuple[Any, np.ndarray, int, Place]:
    """Check, normalize with x's own statistics, update the running ones, and take further steps.

    In this order; the steps if x is not empty. On the CPU, state is written by all of this or none, also
    where a signal's handler raises. With another momentum each time, no call is `repeating` one.

    Return the output, float64[3, C] (mean, var, invstd) as the place of the call has it, the number of
    values per channel, and that place.
    """
    key = None
    if repeating and (threads := threads_again(x, 2, fused)) and type(axis) is int and type(eps) is float:
        kind, mask, more = _NOTHING_ALONG if fused is ALONE else (fused.kind, fused.mask, fused.residual)
        key = threads, x.shape, axis, eps, momentum, correction, features, kind
        again = _trained.again(key, x, out, weight, bias, running_mean, running_var, mask, more, then=then)
        if again is not None:
            result, stats, count = again
            return result, stats, count or x.size // x.shape[axis], HOST
    here, result, residual = HOST, out, fused.residual
    if not (
        type(x) is _Array
        and type(weight) in _OWN
        and type(bias) in _OWN
        and type(out) in _OWN
        and type(residual) in _OWN
        and type(running_mean) in _OWN
        and type(running_var) in _OWN
    ):
        here, (x, weight, bias, running_mean, running_var, residual, out) = place(
            x,
            {
                "weight": weight,
                "bias": bias,
                "running_mean": running_mean,
                "running_var": running_var,
                "residual": residual,
                "out": out,
            },
            written=("running_mean", "running_var", "out"),
        )
    x = arrays.checked("x", x)
    axis = arrays.channel_axis(x, axis)
    channels = _channels(x, axis, features)
    gamma = arrays.parameter("weight", weight, channels, x)
    beta = arrays.parameter("bias", bias, channels, x)
    mean = arrays.parameter("running_mean", running_mean, channels, x, updated=True)
    var = arrays.parameter("running_var", running_var, channels, x, updated=True)
    if fused is not ALONE:
        fused = with_x(fused, x, residual, axis, here)
    arrays.both_updated(running_mean, running_var)
    if here.device != CPU:
        # There a channel's are written while others are still read; on the CPU, after all else.
        arrays.apart(
            {"running_mean": running_mean, "running_var": running_var},
            x=x,
            weight=weight,
            bias=bias,
            residual=residual,
        )
    eps = arrays.number("eps", eps, 0.0, math.inf)
    if out is None:
        out = here.empty_like(x)
    else:
        arrays.output(out, x, residual, **seen(fused.where, here.device))
        arrays.beside(
            out, (gamma, beta, mean, var), channels,
            weight=weight, bias=bias, running_mean=running_mean, running_var=running_var,
        )  # fmt: skip
    count = 0
    recording = partial(_trained.recorder, key)
    if x.size and fused is ALONE:
        run, extras = recording(run_of(x, axis, (x.strides, out.strides), here)), NOTHING
        count = x.size // channels
    elif x.size:
        run, extras, count = fused_forward(x, axis, out, here, fused, recording=recording)
    _enough(count, x, axis, fused)
    if count and running_var is not None and count <= correction:
        raise ValueError(f"x must have more than {correction:g} values per channel (correction), got {count}")
    if count == 0:
        _clear(out, x, axis, here, fused)
        stats = np.zeros((3, channels))
        with np.errstate(divide="ignore"):
            stats[2] = 1.0 / np.sqrt(np.float64(eps))
        return (
            (out if here is HOST else here.result(out)) if result is None else result,
            here.put(stats),
            0,
            here,
        )
    stats = here.empty((3, channels))
    if momentum == 0.0:
        mean = var = ABSENT  # they keep their bits
    run.forward(
        address(x), address(out), address(stats), gamma, beta, mean, var, eps, momentum, correction, then,
        extras,
    )  # fmt: skip
    # With fewer values than that it would have been refused.
    _trained.keep(
        key, run, out, x, weight, bias, running_mean, running_var, fused.mask, residual, stats,
        then=then, above=max(1.0, correction),
    )  # fmt: skip
    return (out if here is HOST else here.result(out)) if result is None else result, stats, count, here


def batch_norm_forward(
    x: Array,
    weight: Array | None = None,
    bias: Array | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    activation: str | None = None,
    negative_slope: float = SLOPE,
    residual: Array | None = None,
    mask: Any = None,
    lengths: Any = None,
    lengths_axis: int | None = None,
    out: Array | None = None,
) -> BatchNormForward:
    """Normalize x with its own statistics, as in training; touches no state.

    out = activation(weight · (x - mean) / sqrt(var + eps) + bias + residual), with mean and biased variance
    of each channel [1]_, in one pass over memory.

    Parameters
    ----------
    x : array
        Of any kind and type (see `batch_norm`), at least two dimensions, any strides; more than
        one value per channel.
    weight, bias : array, optional
        float32, float64 or x's type, shape (C,). Without them, 1 and 0.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    axis : int, default 1
        The channel axis, of length C.
    activation : str, optional
        What is applied to the result: "relu", "leaky_relu", "silu", "gelu" (with the normal distribution's Φ)
        or "gelu_tanh" (with its approximation by tanh).
    negative_slope : float, default 0.01
        Of "leaky_relu": what values below 0 are multiplied with.
    residual : array, optional
        Added before the activation: of x's shape and dtype, any strides.
    mask : array of bool, optional
        True where positions count: of a shape that broadcasts to x's without the channel axis. What does not
        count is left out of the statistics, and ``out`` is 0 there. In the memory of the host, or on x's
        device; from a GPU it is copied to the host, which waits for it.
    lengths : array of int, optional
        Instead of a mask: how many positions of each sample count, its first ones, shape (N,). Samples are on
        the first axis that is not `axis`.
    lengths_axis : int, optional
        The axis along which `lengths` count; by default the last one that is not `axis`.
    out : array, optional
        Where to write the result: of x's shape and dtype, any strides. May be x itself, or the residual.

    Returns
    -------
    BatchNormForward
        ``out``, and what `batch_norm_backward` and the running statistics need: ``mean``, ``var``,
        ``invstd`` (float64, shape (C,)) and ``count`` (int). If x is empty, so is ``out``, and count,
        mean and var are 0.

    Raises
    ------
    TypeError
        If an array is not one, or not of such a type, or a number not a number.
    ValueError
        If a shape or a value does not fit, `x` has one value per channel, or `out` overlaps an input
        without being x or the residual.
    nbbn.DeviceError
        If the arrays are on different devices, or on one that cannot be computed with.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, arXiv 1502.03167, algorithm 1.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> out, mean, var, invstd, count = nbbn.batch_norm_forward(x, eps=0.0)
    >>> out
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> mean, count
    (array([ 2., 20.]), 2)
    """
    fused = ALONE
    if not (activation is residual is mask is lengths is lengths_axis is None and negative_slope is SLOPE):
        fused = fusion(activation, negative_slope, residual, mask, lengths, lengths_axis)
    out, stats, count, here = train(x, weight, bias, eps, axis, out, fused=fused)
    stats = here.rows(stats)
    return BatchNormForward(out, stats[0], stats[1], stats[2], count)


def batch_norm(
    x: Array,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    weight: Array | None = None,
    bias: Array | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    activation: str | None = None,
    negative_slope: float = SLOPE,
    residual: Array | None = None,
    mask: Any = None,
    lengths: Any = None,
    lengths_axis: int | None = None,
    out: Array | None = None,
) -> Array:
    """Batch normalization, with the positional arguments of ``torch.nn.functional.batch_norm``.

    In training, x is normalized with its own mean and biased variance, and the running statistics
    that were passed are updated in place, last, after everything else has succeeded [1]_::

        running_mean ← (1 - momentum) · running_mean + momentum · mean
        running_var  ← (1 - momentum) · running_var  + momentum · var · m / (m - 1)

    with m values per channel. In evaluation, x is normalized with the running statistics. What often follows,
    ``activation(batch_norm(x) + residual)``, can be had in the same pass over memory.

    Parameters
    ----------
    x : array
        Of NumPy, PyTorch, CuPy, JAX or Numba's CUDA target, or any array in the memory of the host that has
        ``__dlpack__`` and the namespace of the array API standard. float32, float64, float16 or bfloat16
        (of ``ml_dtypes`` in NumPy), at least two dimensions, any strides. Elements of 16 bits are computed
        with in float32, summed in float64, and rounded once. It is read where it lies, on the CPU or a GPU,
        and computed with there; on a GPU on the stream that is current for x's library, and the host does
        not wait.
    running_mean, running_var : array, optional
        float32, float64 or x's type, shape (C,), any stride; like all other arrays on x's device,
        of x's kind or another. Both are needed in evaluation; in training each is updated if it is
        given, which JAX's, being immutable, cannot be: `batch_norm_forward` does without.
    weight, bias : array, optional
        float32, float64 or x's type, shape (C,). Without them, 1 and 0.
    training : bool, default False
        Whether to normalize with x's own statistics.
    momentum : float, default 0.1
        The weight of the new observation, in [0, 1]. At 0 the running statistics keep their bits, at
        1 they are replaced.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    axis : int, default 1
        The channel axis, of length C.
    activation : str, optional
        What is applied to the result: "relu", "leaky_relu", "silu", "gelu" (with the normal distribution's Φ)
        or "gelu_tanh" (with its approximation by tanh).
    negative_slope : float, default 0.01
        Of "leaky_relu": what values below 0 are multiplied with.
    residual : array, optional
        Added before the activation: of x's shape and dtype, any strides.
    mask : array of bool, optional
        True where positions count: of a shape that broadcasts to x's without the channel axis. What does not
        count is left out of the statistics, and ``out`` is 0 there. In the memory of the host, or on x's
        device; from a GPU it is copied to the host, which waits for it.
    lengths : array of int, optional
        Instead of a mask: how many positions of each sample count, its first ones, shape (N,). Samples are on
        the first axis that is not `axis`.
    lengths_axis : int, optional
        The axis along which `lengths` count; by default the last one that is not `axis`.
    out : array, optional
        Where to write the result: of x's shape and dtype, any strides. May be x itself, or the residual.

    Returns
    -------
    array
        `out`, or a new array of x's kind, shape, dtype and memory layout.

    Raises
    ------
    TypeError
        If an array is not one, or not of such a type, or a number not a number.
    ValueError
        If a shape or a value does not fit, running statistics are missing in evaluation, or cannot be
        written in training or overlap each other (on a GPU: or `x`, `weight` or `bias`), x has one value
        per channel in training, or `out` overlaps an input without being x or the residual. Nothing has been
        written then.
    nbbn.DeviceError
        If the arrays are on different devices, or on one that cannot be computed with.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, arXiv 1502.03167, algorithms 1 and 2.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> running_mean, running_var = np.zeros(2), np.ones(2)
    >>> nbbn.batch_norm(x, running_mean, running_var, training=True, eps=0.0)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> running_mean
    array([0.2, 2. ])
    >>> nbbn.batch_norm(x, running_mean, running_var).round(2)
    array([[0.76, 1.75],
           [2.67, 6.12]])
    >>> nbbn.batch_norm(x, training=True, eps=0.0, activation="relu", residual=np.full_like(x, 0.5))
    array([[0. , 0. ],
           [1.5, 1.5]])
    """
    fused = ALONE
    if not (activation is residual is mask is lengths is lengths_axis is None and negative_slope is SLOPE):
        fused = fusion(activation, negative_slope, residual, mask, lengths, lengths_axis)
    if arrays.flag("training", training):
        if momentum is None:
            raise ValueError(
                "momentum must be a number in [0, 1], got None: a cumulative average needs the count "
                "of batches that nbbn.BatchNorm keeps"
            )
        momentum = arrays.number("momentum", momentum, 0.0, 1.0)
        return train(x, weight, bias, eps, axis, out, running_mean, running_var, momentum, fused=fused)[0]
    if momentum is not None:
        arrays.number("momentum", momentum, 0.0, 1.0)
    return evaluate(x, running_mean, running_var, weight, bias, eps, axis, out, fused=fused)[0]


def evaluate(
    x: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    axis: Any,
    out: Any = None,
    features: int | None = None,
    fused: Fusion = ALONE,
    least: int = 2,
    asked: str = "training=False",
) -> tuple[Any, Place]:
    """Check, and normalize with the running statistics; return the output, and where that was.

    x has at least `least` dimensions; `asked` is what the caller was told.
    """
    key = None
    if (threads := threads_again(x, 2, fused)) and type(axis) is int and type(eps) is float:
        kind, mask, more = _NOTHING_ALONG if fused is ALONE else (fused.kind, fused.mask, fused.residual)
        key = threads, x.shape, axis, eps, features, least, kind
        again = _evaluated.again(key, x, out, weight, bias, running_mean, running_var, mask, more)
        if again is not None:
            return again[0], HOST
    here, result, residual = HOST, out, fused.residual
    if not (
        type(x) is _Array
        and type(running_mean) in _OWN
        and type(running_var) in _OWN
        and type(weight) in _OWN
        and type(bias) in _OWN
        and type(out) in _OWN
        and type(residual) in _OWN
    ):
        here, (x, running_mean, running_var, weight, bias, residual, out) = place(
            x,
            {
                "running_mean": running_mean,
                "running_var": running_var,
                "weight": weight,
                "bias": bias,
                "residual": residual,
                "out": out,
            },
            written=("out",),
        )
    x = arrays.checked("x", x)
    axis = arrays.channel_axis(x, axis, least)
    channels = _channels(x, axis, features)
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is None:
            raise ValueError(f"{name} must be given with {asked}, got None")
    mean = arrays.parameter("running_mean", running_mean, channels, x)
    var = arrays.parameter("running_var", running_var, channels, x)
    gamma = arrays.parameter("weight", weight, channels, x)
    beta = arrays.parameter("bias", bias, channels, x)
    if fused is not ALONE:
        fused = with_x(fused, x, residual, axis, here)
    eps = arrays.number("eps", eps, 0.0, math.inf)
    if out is None:
        out = here.empty_like(x)
    else:
        arrays.output(out, x, residual, **seen(fused.where, here.device))
        arrays.beside(
            out, (gamma, beta, mean, var), channels,
            weight=weight, bias=bias, running_mean=running_mean, running_var=running_var,
        )  # fmt: skip
    if x.size:
        recording = partial(_evaluated.recorder, key)
        if fused is ALONE:
            run, extras = recording(run_of(x, axis, (x.strides, out.strides), here)), NOTHING
        else:
            run, extras, _ = fused_forward(x, axis, out, here, fused, counting=False, recording=recording)
        run.evaluate(address(x), address(out), gamma, beta, mean, var, eps, extras)
        columns = weight, bias, running_mean, running_var
        _evaluated.keep(key, run, out, x, *columns, fused.mask, residual, None)
    return (out if here is HOST else here.result(out)) if result is None else result, here


def batch_norm_backward(
    grad_out: Array,
    x: Array,
    weight: Array | None = None,
    *,
    mean: Array,
    invstd: Array,
    bias: Array | None = None,
    axis: int = 1,
    training: bool = True,
    activation: str | None = None,
    negative_slope: float = SLOPE,
    residual: Array | None = None,
    mask: Any = None,
    lengths: Any = None,
    lengths_axis: int | None = None,
    out: Array | None = None,
) -> BatchNormGradients | BatchNormResidualGradients:
    """The gradients of batch normalization.

    With x_hat = (x - mean) · invstd and m values per channel [1]_::

        grad_bias   = Σ grad_out
        grad_weight = Σ grad_out · x_hat
        grad_x      = weight · invstd · (grad_out - grad_bias / m - x_hat · grad_weight / m)

    In evaluation (``training=False``) the statistics are constants: grad_x = weight · invstd · grad_out.

    Of ``activation(batch_norm(x) + residual)`` grad_out is first multiplied with the activation's derivative
    at z = weight · x_hat + bias + residual, which is computed again from x; that is the residual's gradient.

    Parameters
    ----------
    grad_out : array
        The gradient with respect to the output: of x's shape and dtype, any strides.
    x : array
        What was normalized: of any kind and type (see `batch_norm`), at least two dimensions, any
        strides.
    weight : array, optional
        float32, float64 or x's type, shape (C,). Without it, 1.
    mean, invstd : array
        float32, float64 or x's type, shape (C,): what x was normalized with, as `batch_norm_forward` returns
        it; in evaluation running_mean and 1 / sqrt(running_var + eps).
    bias : array, optional
        As `weight`; without it, 0. Only with an activation does anything depend on it.
    axis : int, default 1
        The channel axis, of length C.
    training : bool, default True
        Whether mean and invstd are x's own statistics, and depend on it.
    activation, negative_slope, residual, mask, lengths, lengths_axis : optional
        As in the forward pass: see `batch_norm`. Where x does not count, its gradient is 0.
    out : array, optional
        Where to write grad_x: of x's shape and dtype, any strides. May be x itself.

    Returns
    -------
    BatchNormGradients or BatchNormResidualGradients
        ``x`` (of x's shape, dtype and memory layout), ``weight`` and ``bias`` (float64, shape (C,);
        computed whether or not there are such parameters), and, with a residual, ``residual`` (as ``x``). If
        x is empty, so is ``x``, and the gradients of the parameters are 0.

    Raises
    ------
    TypeError
        If an array is not one, or not of such a type, or `grad_out` not of x's dtype.
    ValueError
        If a shape or a value does not fit, `x` has one value per channel in training, or `out`
        overlaps an input without being x.
    nbbn.DeviceError
        If the arrays are on different devices, or on one that cannot be computed with.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, arXiv 1502.03167, section 3.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> x = np.array([[1.0], [2.0], [6.0]])
    >>> forward = nbbn.batch_norm_forward(x, eps=0.0)
    >>> grad_out = np.array([[1.0], [0.0], [0.0]])
    >>> gradients = nbbn.batch_norm_backward(grad_out, x, mean=forward.mean, invstd=forward.invstd)
    >>> gradients.bias, gradients.weight.round(4)
    (array([1.]), array([-0.9258]))
    >>> gradients.x.round(4)
    array([[ 0.1763],
           [-0.2204],
           [ 0.0441]])
    """
    fused = ALONE
    if not (activation is residual is mask is lengths is lengths_axis is None and negative_slope is SLOPE):
        fused = fusion(activation, negative_slope, residual, mask, lengths, lengths_axis)
    grad_x, gradients, grad_residual, here = differentiate(
        grad_out, x, weight, bias, mean, invstd, axis, training, out, fused
    )
    gradients = here.rows(gradients)
    if residual is None:
        return BatchNormGradients(grad_x, gradients[0], gradients[1])
    return BatchNormResidualGradients(grad_x, gradients[0], gradients[1], grad_residual)


def differentiate(
    grad_out: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    invstd: Any,
    axis: Any,
    training: Any,
    out: Any = None,
    fused: Fusion = ALONE,
) -> tuple[Any, np.ndarray, Any, Place]:
    """Check, and compute the gradients.

    Return that of x, float64[2, C] (weight, bias) as the place of the call has it, that of the residual, if
    there is one, and that place.
    """
    training = arrays.flag("training", training)
    key = None
    if fused.residual is None and (threads := threads_again(x, 3, fused)) and type(axis) is int:
        kind, mask, _ = _NOTHING_ALONG if fused is ALONE else (fused.kind, fused.mask, None)
        key = threads, x.shape, axis, training, kind
        again = _differentiated.again(key, x, out, weight, bias, mean, invstd, grad_out, mask)
        if again is not None:
            return *again[:2], None, HOST
    here, result, residual = HOST, out, fused.residual
    if not (
        type(x) is _Array
        and type(grad_out) in _OWN
        and type(weight) in _OWN
        and type(bias) in _OWN
        and type(mean) in _OWN
        and type(invstd) in _OWN
        and type(residual) in _OWN
        and type(out) in _OWN
    ):
        here, (x, grad_out, weight, bias, mean, invstd, residual, out) = place(
            x,
            {
                "grad_out": grad_out,
                "weight": weight,
                "bias": bias,
                "mean": mean,
                "invstd": invstd,
                "residual": residual,
                "out": out,
            },
            written=("out",),
        )
    x = arrays.checked("x", x)
    axis = arrays.channel_axis(x, axis)
    channels = x.shape[axis]
    grad_out = arrays.like("grad_out", grad_out, x)
    gamma = arrays.parameter("weight", weight, channels, x)
    beta = ABSENT if bias is None else arrays.parameter("bias", bias, channels, x)
    mu = _needed("mean", mean, channels, x)
    sigma = _needed("invstd", invstd, channels, x)
    if fused is not ALONE:
        fused = with_x(fused, x, residual, axis, here)
    if out is None:
        out = here.empty_like(x)
    else:
        arrays.output(out, x, grad_out=grad_out, residual=residual, **seen(fused.where, here.device))
        columns = {"weight": weight, "bias": bias, "mean": mean, "invstd": invstd}
        arrays.beside(out, (gamma, beta, mu, sigma), channels, **columns)
    grad_residual = None if fused.residual is None else here.empty_like(x)
    count = 0
    recording = partial(_differentiated.recorder, key)
    if x.size and fused is ALONE:
        run, extras = recording(run_of(x, axis, (x.strides, grad_out.strides, out.strides), here)), NOTHING
        count = x.size // channels
    elif x.size:
        run, extras, count = fused_backward(
            x, grad_out, out, grad_residual, axis, here, fused, beta, recording
        )
    if training:
        _enough(count, x, axis, fused)
    if count == 0:
        gradients = here.put(np.zeros((2, channels)))
        for array in (out, grad_residual):
            _clear(array, x, axis, here, fused)
    else:
        gradients = here.empty((2, channels))
        run.backward(
            address(x), address(grad_out), address(out), address(gradients), gamma, mu, sigma, training,
            False, extras,
        )  # fmt: skip
        _differentiated.keep(key, run, out, x, weight, bias, mean, invstd, grad_out, fused.mask, gradients)
    grad_x = (out if here is HOST else here.result(out)) if result is None else result
    if grad_residual is not None:
        grad_residual = here.result(grad_residual)
    return grad_x, gradients, grad_residual, here


def fused_backward(
    x: np.ndarray,
    grad_out: np.ndarray,
    grad_x: np.ndarray,
    grad_residual: np.ndarray | None,
    axis: int,
    here: Place,
    fused: Fusion,
    bias: Parameter,
    recording: Callable[[Any], Any] | None = None,
) -> tuple[Any, Extras, int]:
    """Return the same as `fused_forward` of a backward pass and what comes before it."""
    operands, residuals = [x, grad_out, grad_x], (0, 0)
    if grad_residual is not None:
        operands[2:2] = fused.residual, grad_residual
        residuals = address(fused.residual), address(grad_residual)
    run, marks, count = _with_mask(x, axis, operands, here, fused, recording=recording)
    return run, Extras(*residuals, bias, fused.slope, marks), count


def _needed(name: str, value: Any, channels: int, x: np.ndarray) -> Parameter:
    if value is None:
        raise ValueError(f"{name} must be given, got None")
    return arrays.parameter(name, value, channels, x)


# What `warmup` compiles.
NORMS = ("batch", "layer", "rms", "group", "instance")


def _norms(norms: Any) -> list[str]:
    if isinstance(norms, str) or not isinstance(norms, Iterable):
        raise TypeError(f"norms must be an iterable of str, got {norms!r}")
    chosen = list(norms)
    for norm in chosen:
        if not isinstance(norm, str):
            raise TypeError(f"norms must be an iterable of str, got one of {type(norm).__name__}")
        if norm not in NORMS:
            raise ValueError(f"norms must be among {', '.join(map(repr, NORMS))}, got {norm!r}")
    return chosen


def _plain_on_gpu(norms: list[str], **beside: Any) -> None:
    """Raise where more is to be compiled for a GPU than is compiled ahead there."""
    for name, value in beside.items():
        if value:
            raise ValueError(
                f"{name} must be left out on a GPU, where it is compiled at its first use, got {value!r}"
            )
    if set(norms) - {"batch"}:
        raise ValueError(
            f"norms must be ['batch'] on a GPU, where others are compiled at their first use, got {norms}"
        )


def warmup(
    dtypes: Iterable[Any] = ("float32",),
    *,
    norms: Iterable[str] = ("batch",),
    training: bool = True,
    evaluation: bool = True,
    backward: bool = True,
    activation: str | None = None,
    residual: bool = False,
    mask: bool = False,
    device: str = CPU,
) -> None:
    """Compile ahead of first use what the operations run, or load it from the cache on disk.

    Nothing is compiled twice. On the CPU it also starts the threads, and a second call costs nothing. On a
    GPU, where what is needed depends on the shapes, the operations are run on memory there of the shapes that
    ResNet-50 has at a batch of 32, in both layouts, and of two dense layers; what others need is compiled at
    their first use all the same.

    Parameters
    ----------
    dtypes : iterable of str or numpy.dtype, default ("float32",)
        The types of the arrays to come.
    norms : iterable of str, default ("batch",)
        The normalizations to come: "batch", "layer", "rms", "group" and "instance"; on a GPU "batch" only.
    training, evaluation, backward : bool, default True
        The operations to come.
    activation : str or None, default None
        What is applied to the results of batch norm in the same pass (`nbbn.batch_norm`).
    residual, mask : bool, default False
        Whether a residual, and a mask or lengths, go along with batch norm. What is compiled for them, and
        for an activation, serves calls with just these; each combination is a warm-up of its own. Not on a
        GPU, where they are compiled at their first use.
    device : str, default "cpu"
        Where the arrays will lie: "cpu", "cuda:N", or "cuda" for the GPU that is current.

    Raises
    ------
    TypeError
        If `dtypes` is no iterable, or one of them not float32, float64, float16 or bfloat16, or `device`, a
        norm or an activation not a str, or one of the others not a bool.
    ValueError
        If a norm or an activation is not one of these, or more than plain batch norm is to come on a GPU.
    nbbn.DeviceError
        If there is no such device, or it cannot be computed with; the message says why.

    Examples
    --------
    >>> import contextlib
    >>> import nbbn
    >>> nbbn.warmup(["float32"], training=False, backward=False)
    >>> with contextlib.suppress(nbbn.DeviceError):  # where there is no GPU
    ...     nbbn.warmup(device="cuda", training=False, backward=False)
    """
    if isinstance(dtypes, str) or not isinstance(dtypes, Iterable):
        raise TypeError(f"dtypes must be an iterable of types, got {dtypes!r}")
    storages = [arrays.storage(dtype) for dtype in dtypes]
    chosen = _norms(norms)
    device = columns_on(device).device
    wanted = {
        "training": arrays.flag("training", training),
        "evaluation": arrays.flag("evaluation", evaluation),
        "backward": arrays.flag("backward", backward),
    }
    operations = [operation for operation, is_wanted in wanted.items() if is_wanted]
    form = Form(
        activation=fusion(activation).activation,
        residual=arrays.flag("residual", residual),
        masked=arrays.flag("mask", mask),
    )
    if device != CPU:
        _plain_on_gpu(chosen, activation=activation, residual=residual, mask=mask)
        from nbbn.cuda.warmup import warm_up

        if chosen:
            warm_up(device, storages, operations)
        return
    pool.threads()
    repeats.warm_up()
    for storage in storages:
        cpu().compile_for(storage, chosen, operations, form)
    if storages and set(chosen) - {"batch"}:  # which copy statistics, where they are computed apart
        cpu().compile_for(FLOAT64, ["batch"], ["evaluation"])
    if storages and "instance" in chosen and "training" in operations:  # and update running ones
        cpu().compile_for(FLOAT64, ["batch"], ["training"])
