"""Batch normalization as functions on arrays: what is asked, checked, and passed on.

The mathematics is that of S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network
Training by Reducing Internal Covariate Shift", arXiv 1502.03167. Every function validates all of its
arguments before it computes, and computes before it writes any state.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from nbbn import arrays, memory
from nbbn.arrays import ABSENT, Parameter, address
from nbbn.compiler import pool
from nbbn.dispatch import find
from nbbn.geometry import Strides
from nbbn.stats import BatchStats

# Below this many elements, waking the threads costs more than they save.
SERIAL_ELEMENTS = 1 << 15


class BatchNormForward(NamedTuple):
    """What a training step computes.

    Attributes
    ----------
    out : numpy.ndarray
        The normalized array, of x's shape, dtype and memory layout.
    mean, var, invstd : numpy.ndarray
        float64, shape (C,): mean, biased variance, and 1 / sqrt(var + eps).
    count : int
        Values per channel.
    """

    out: np.ndarray
    mean: np.ndarray
    var: np.ndarray
    invstd: np.ndarray
    count: int  # type: ignore[assignment]  # tuple.count is given up for the usual name


class BatchNormGradients(NamedTuple):
    """The gradients of a loss with respect to the inputs of batch normalization.

    Attributes
    ----------
    x : numpy.ndarray
        Of x's shape, dtype and memory layout.
    weight, bias : numpy.ndarray
        float64, shape (C,).
    """

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray


def _run(x: np.ndarray, axis: int, strides: tuple[Strides, ...]) -> Any:
    """Return what runs the stages on x and other arrays of its shape; `strides` are x's and theirs."""
    threads = 1 if x.size < SERIAL_ELEMENTS else pool.threads()
    return find(x.shape, axis, strides, x.dtype, threads)


def batch_stats(x: np.ndarray, *, axis: int = 1) -> BatchStats:
    """Count, mean and biased variance of each channel.

    Parameters
    ----------
    x : numpy.ndarray
        float32 or float64, at least two dimensions, any strides.
    axis : int, default 1
        The channel axis, of length C.

    Returns
    -------
    BatchStats
        ``count`` (int), ``mean`` and ``var`` (float64, shape (C,)). An empty array has count, mean
        and variance 0, which changes nothing that it is merged with.

    Raises
    ------
    TypeError
        If `x` is not a NumPy array of float32 or float64, or `axis` not an int.
    ValueError
        If `x` has fewer than two dimensions, or `axis` is out of range.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.batch_stats(np.array([[1.0, 10.0], [3.0, 30.0]]))
    BatchStats(count=2, mean=array([ 2., 20.]), var=array([  1., 100.]))
    """
    x = arrays.checked("x", x)
    axis = arrays.channel_axis(x, axis)
    channels = x.shape[axis]
    if x.size == 0:
        return BatchStats(0, np.zeros(channels), np.zeros(channels))
    stats = np.empty((3, channels))
    _run(x, axis, (x.strides,)).stats(address(x), address(stats))
    return BatchStats(x.size // channels, stats[0], stats[1])


def train(
    x: np.ndarray,
    weight: Any,
    bias: Any,
    eps: Any,
    axis: int,
    out: Any = None,
    running_mean: Any = None,
    running_var: Any = None,
    momentum: float = 0.0,
    correction: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Check, normalize with x's own statistics, and update the running ones, in this order.

    Return the output, float64[3, C] (mean, var, invstd), and the number of values per channel.
    """
    x = arrays.checked("x", x)
    axis = arrays.channel_axis(x, axis)
    channels = x.shape[axis]
    gamma = arrays.parameter("weight", weight, channels)
    beta = arrays.parameter("bias", bias, channels)
    mean = arrays.parameter("running_mean", running_mean, channels, updated=True)
    var = arrays.parameter("running_var", running_var, channels, updated=True)
    eps = arrays.number("eps", eps, 0.0, math.inf)
    count = x.size // channels if x.size else 0
    if x.size and count < 2:
        raise ValueError(
            f"x must have more than one value per channel in training, got shape {x.shape} with axis {axis}"
        )
    if x.size and running_var is not None and count <= correction:
        raise ValueError(f"x must have more than {correction:g} values per channel (correction), got {count}")
    if out is None:
        out = memory.empty_like(x)
    else:
        arrays.output(out, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if x.size == 0:
        stats = np.zeros((3, channels))
        with np.errstate(divide="ignore"):
            stats[2] = 1.0 / np.sqrt(np.float64(eps))
        return out, stats, 0
    stats = np.empty((3, channels))
    if momentum == 0.0:
        mean = var = ABSENT  # they keep their bits
    run = _run(x, axis, (x.strides, out.strides))
    run.forward(address(x), address(out), address(stats), gamma, beta, mean, var, eps, momentum, correction)
    return out, stats, count


def batch_norm_forward(
    x: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    eps: float = 1e-5,
    axis: int = 1,
    out: np.ndarray | None = None,
) -> BatchNormForward:
    """Normalize x with its own statistics, as in training; touches no state.

    out = weight · (x - mean) / sqrt(var + eps) + bias, with mean and biased variance of each channel
    [1]_.

    Parameters
    ----------
    x : numpy.ndarray
        float32 or float64, at least two dimensions, any strides; more than one value per channel.
    weight, bias : numpy.ndarray, optional
        float32 or float64, shape (C,). Without them, 1 and 0.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    axis : int, default 1
        The channel axis, of length C.
    out : numpy.ndarray, optional
        Where to write the result: of x's shape and dtype, any strides. May be x itself.

    Returns
    -------
    BatchNormForward
        ``out``, and what `batch_norm_backward` and the running statistics need: ``mean``, ``var``,
        ``invstd`` (float64, shape (C,)) and ``count`` (int). If x is empty, so is ``out``, and count,
        mean and var are 0.

    Raises
    ------
    TypeError
        If an array is not a NumPy array of float32 or float64, or a number not a number.
    ValueError
        If a shape or a value does not fit, `x` has one value per channel, or `out` overlaps an input
        without being x.

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
    out, (mean, var, invstd), count = train(x, weight, bias, eps, axis, out)
    return BatchNormForward(out, mean, var, invstd, count)


def batch_norm(
    x: np.ndarray,
    running_mean: np.ndarray | None = None,
    running_var: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    axis: int = 1,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """Batch normalization, with the positional arguments of ``torch.nn.functional.batch_norm``.

    In training, x is normalized with its own mean and biased variance, and the running statistics
    that were passed are updated in place, last, after everything else has succeeded [1]_::

        running_mean ← (1 - momentum) · running_mean + momentum · mean
        running_var  ← (1 - momentum) · running_var  + momentum · var · m / (m - 1)

    with m values per channel. In evaluation, x is normalized with the running statistics.

    Parameters
    ----------
    x : numpy.ndarray
        float32 or float64, at least two dimensions, any strides.
    running_mean, running_var : numpy.ndarray, optional
        float32 or float64, shape (C,), any stride. Both are needed in evaluation; in training each
        is updated if it is given.
    weight, bias : numpy.ndarray, optional
        float32 or float64, shape (C,). Without them, 1 and 0.
    training : bool, default False
        Whether to normalize with x's own statistics.
    momentum : float, default 0.1
        The weight of the new observation, in [0, 1]. At 0 the running statistics keep their bits, at
        1 they are replaced.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    axis : int, default 1
        The channel axis, of length C.
    out : numpy.ndarray, optional
        Where to write the result: of x's shape and dtype, any strides. May be x itself.

    Returns
    -------
    numpy.ndarray
        `out`, or a new array of x's shape, dtype and memory layout.

    Raises
    ------
    TypeError
        If an array is not a NumPy array of float32 or float64, or a number not a number.
    ValueError
        If a shape or a value does not fit, running statistics are missing in evaluation or cannot be
        written in training, x has one value per channel in training, or `out` overlaps an input
        without being x. Nothing has been written then.

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
    """
    if arrays.flag("training", training):
        if momentum is None:
            raise ValueError(
                "momentum must be a number in [0, 1], got None: a cumulative average needs the count "
                "of batches that nbbn.BatchNorm keeps"
            )
        momentum = arrays.number("momentum", momentum, 0.0, 1.0)
        return train(x, weight, bias, eps, axis, out, running_mean, running_var, momentum)[0]
    if momentum is not None:
        arrays.number("momentum", momentum, 0.0, 1.0)
    x = arrays.checked("x", x)
    axis = arrays.channel_axis(x, axis)
    channels = x.shape[axis]
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is None:
            raise ValueError(f"{name} must be given in evaluation (training=False), got None")
    mean = arrays.parameter("running_mean", running_mean, channels)
    var = arrays.parameter("running_var", running_var, channels)
    gamma = arrays.parameter("weight", weight, channels)
    beta = arrays.parameter("bias", bias, channels)
    eps = arrays.number("eps", eps, 0.0, math.inf)
    if out is None:
        out = memory.empty_like(x)
    else:
        arrays.output(out, x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    if x.size:
        run = _run(x, axis, (x.strides, out.strides))
        run.evaluate(address(x), address(out), gamma, beta, mean, var, eps)
    return out


def batch_norm_backward(
    grad_out: np.ndarray,
    x: np.ndarray,
    weight: np.ndarray | None = None,
    *,
    mean: np.ndarray,
    invstd: np.ndarray,
    axis: int = 1,
    training: bool = True,
    out: np.ndarray | None = None,
) -> BatchNormGradients:
    """The gradients of batch normalization.

    With x_hat = (x - mean) · invstd and m values per channel [1]_::

        grad_bias   = Σ grad_out
        grad_weight = Σ grad_out · x_hat
        grad_x      = weight · invstd · (grad_out - grad_bias / m - x_hat · grad_weight / m)

    In evaluation (``training=False``) the statistics are constants: grad_x = weight · invstd · grad_out.

    Parameters
    ----------
    grad_out : numpy.ndarray
        The gradient with respect to the output: of x's shape and dtype, any strides.
    x : numpy.ndarray
        What was normalized: float32 or float64, at least two dimensions, any strides.
    weight : numpy.ndarray, optional
        float32 or float64, shape (C,). Without it, 1.
    mean, invstd : numpy.ndarray
        float32 or float64, shape (C,): what x was normalized with, as `batch_norm_forward` returns
        it; in evaluation running_mean and 1 / sqrt(running_var + eps).
    axis : int, default 1
        The channel axis, of length C.
    training : bool, default True
        Whether mean and invstd are x's own statistics, and depend on it.
    out : numpy.ndarray, optional
        Where to write grad_x: of x's shape and dtype, any strides. May be x itself.

    Returns
    -------
    BatchNormGradients
        ``x`` (of x's shape, dtype and memory layout), ``weight`` and ``bias`` (float64, shape (C,);
        computed whether or not there are such parameters). If x is empty, so is ``x``, and the other
        two are 0.

    Raises
    ------
    TypeError
        If an array is not a NumPy array of float32 or float64, or `grad_out` not of x's dtype.
    ValueError
        If a shape or a value does not fit, `x` has one value per channel in training, or `out`
        overlaps an input without being x.

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
    training = arrays.flag("training", training)
    x = arrays.checked("x", x)
    axis = arrays.channel_axis(x, axis)
    channels = x.shape[axis]
    grad_out = arrays.checked("grad_out", grad_out)
    arrays.same_kind("grad_out", grad_out, x)
    gamma = arrays.parameter("weight", weight, channels)
    mu = _needed("mean", mean, channels)
    sigma = _needed("invstd", invstd, channels)
    count = x.size // channels if x.size else 0
    if training and x.size and count < 2:
        raise ValueError(
            f"x must have more than one value per channel in training, got shape {x.shape} with axis {axis}"
        )
    if out is None:
        out = memory.empty_like(x)
    else:
        arrays.output(out, x, grad_out=grad_out, weight=weight, mean=mean, invstd=invstd)
    if x.size == 0:
        return BatchNormGradients(out, np.zeros(channels), np.zeros(channels))
    gradients = np.empty((2, channels))
    run = _run(x, axis, (x.strides, grad_out.strides, out.strides))
    run.backward(address(x), address(grad_out), address(out), address(gradients), gamma, mu, sigma, training)
    return BatchNormGradients(out, gradients[0], gradients[1])


def _needed(name: str, value: Any, channels: int) -> Parameter:
    if value is None:
        raise ValueError(f"{name} must be given, got None")
    return arrays.parameter(name, value, channels)


def warmup(
    dtypes: Iterable[Any] = ("float32",),
    *,
    training: bool = True,
    evaluation: bool = True,
    backward: bool = True,
) -> None:
    """Compile ahead of first use what the operations run, or load it from the cache on disk.

    Also starts the threads. Nothing is compiled twice: a second call costs nothing.

    Parameters
    ----------
    dtypes : iterable of str or numpy.dtype, default ("float32",)
        The types of the arrays to come.
    training, evaluation, backward : bool, default True
        The operations to come.

    Raises
    ------
    TypeError
        If a dtype is neither float32 nor float64.

    Examples
    --------
    >>> import nbbn
    >>> nbbn.warmup(["float32"], training=False, backward=False)
    """
    reals = [arrays.real(dtype) for dtype in dtypes]
    wanted = {
        "training": arrays.flag("training", training),
        "evaluation": arrays.flag("evaluation", evaluation),
        "backward": arrays.flag("backward", backward),
    }
    from nbbn.cpu.run import compile_for

    pool.threads()
    for real in reals:
        compile_for(real, [operation for operation, is_wanted in wanted.items() if is_wanted])
