"""Evaluation folded away: the layer before a batch norm takes over its scale and its shift."""

import math
from typing import Any, NamedTuple

import numpy as np

from nbbn import arrays
from nbbn.arrays import checked
from nbbn.base import COUNTER, PARAMETERS, STATISTICS
from nbbn.dtypes import narrowed, widened
from nbbn.errors import DeviceError
from nbbn.frameworks import CPU, Array, Place, place
from nbbn.module import BatchNorm


class Folded(NamedTuple):
    """The parameters of a layer that does what it and the batch norm after it did.

    Attributes
    ----------
    weight : array
        Of the kind, shape, dtype and memory layout of the layer's own weight.
    bias : array
        Of the same kind and dtype, shape (C,).
    """

    weight: Array
    bias: Array


def fold(weight: Array, bias: Array | None, bn: BatchNorm, *, axis: int = 0, groups: int = 1) -> Folded:
    """Fold a batch norm in evaluation into the dense or convolution layer before it.

    In evaluation a batch norm is a linear function of its input. So bn(layer(x)) is one linear layer [1]_,
    with one weight and one bias for each output channel c::

        scale   = bn.weight / sqrt(bn.running_var + bn.eps)
        weight' = weight · scale
        bias'   = (bias - bn.running_mean) · scale + bn.bias

    Parameters
    ----------
    weight : array
        The layer's weight, of NumPy, PyTorch or JAX, or any that `batch_norm` takes, in the memory of the
        host; float32, float64, float16 or bfloat16, at least one dimension, any strides.
    bias : array or None
        The layer's bias, of any of these kinds and types, shape (C,). None: 0.
    bn : BatchNorm
        What follows the layer, with C = ``bn.num_features``, on any device. It has to have running
        statistics. Whether it has parameters does not matter, nor its mode. It is not changed. An activation
        cannot be folded: it follows the folded layer.
    axis : int, default 0
        The axis of `weight` that has the output channels. In PyTorch it is 0 for a dense layer (out, in) and
        a convolution (out, in / groups, ...), and 1 for a transposed one (in, out / groups, ...). In Keras
        and Flax it is -1 for a dense layer and a convolution.
    groups : int, default 1
        The layer's groups. They matter where that axis has the output channels of one group only, which is
        so for a transposed convolution. Then axis 0 has the input channels, group after group. Where the
        axis is as long as `bn` has channels, they make no difference.

    Returns
    -------
    Folded
        ``weight`` and ``bias``, new arrays of weight's kind and dtype. A float64 computation, rounded once.

    Raises
    ------
    TypeError
        If `weight` or `bias` is not an array of one of these types, `bn` is not a `BatchNorm`, or `axis` or
        `groups` not an int.
    ValueError
        If `bn` has no running statistics, or a shape, `axis` or `groups` does not fit.
    nbbn.DeviceError
        If `weight` or `bias` is on a GPU.

    Notes
    -----
    The result differs from the two layers one after the other by rounding: that of the weights replaces that
    of the layer's output. Where a channel's running variance is tiny, its weights become large, and float16,
    which ends at 65504, may have no room for them: they are infinite then.

    The batch norm has to come directly after the layer. Before it, it could not be folded into a convolution
    that pads with zeros: they are padded after the batch norm, which would not leave them 0.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, arXiv 1502.03167, section 3.1 and algorithm 2, step 11.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> bn = nbbn.BatchNorm(2, eps=0.0)
    >>> bn.running_mean[:], bn.running_var[:] = [1.0, 2.0], [4.0, 0.25]
    >>> weight = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])  # a dense layer of 3 inputs and 2 outputs
    >>> folded = nbbn.fold(weight, None, bn)
    >>> folded.weight
    array([[ 0.5,  1. ,  1.5],
           [ 8. , 10. , 12. ]])
    >>> folded.bias
    array([-0.5, -4. ])
    """
    here, (view, own_bias) = place(weight, {"bias": bias}, called="weight")
    if here.device != CPU:
        raise DeviceError(
            f"weight must lie in the memory of the host, got an array on {here.device}: copy it"
        )
    view = checked("weight", view)
    if view.ndim == 0:
        raise ValueError("weight must have at least 1 dimension, got 0")
    if not isinstance(bn, BatchNorm):
        raise TypeError(f"bn must be a BatchNorm, got {type(bn).__name__}")
    if bn.running_mean is None or bn.running_var is None:
        raise ValueError("bn must have running statistics (track_running_stats=True), got a module without")
    for name in (*PARAMETERS, *STATISTICS):
        if (column := getattr(bn, name)) is not None:
            bn._columns.checked(name, column, (bn.num_features,), written=False)
    eps = arrays.number("eps", bn.eps, 0.0, math.inf)
    channels = bn.num_features
    axis = arrays.integer("axis", axis)
    if not -view.ndim <= axis < view.ndim:
        raise ValueError(f"axis must be in [-{view.ndim}, {view.ndim}), got {axis} (weight {view.shape})")
    groups = _checked_groups(groups, view.shape, axis % view.ndim, channels)
    if own_bias is not None:
        own_bias = checked("bias", own_bias)
        if own_bias.shape != (channels,):
            raise ValueError(f"bias must have shape ({channels},), got {own_bias.shape}")
    with np.errstate(all="ignore"):  # NaN and infinity go their way, as they do in evaluation
        mean, var, gamma, beta = _statistics_and_parameters(bn)
        scale = gamma / np.sqrt(var + eps)
        shift = (0.0 if own_bias is None else widened(own_bias)) - mean
        product = widened(view) * _along(scale, view.shape, axis % view.ndim, groups)
        return Folded(
            _result(here, view, product),
            _result(here, np.empty(channels, view.dtype), shift * scale + beta),
        )


def _statistics_and_parameters(bn: BatchNorm) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return running_mean, running_var, weight and bias of a module in float64."""
    state = {name: widened(column) for name, column in bn.state_dict().items() if name != COUNTER}
    ones, zeros = np.ones(bn.num_features), np.zeros(bn.num_features)
    return state["running_mean"], state["running_var"], state.get("weight", ones), state.get("bias", zeros)


def _checked_groups(groups: int, shape: tuple[int, ...], axis: int, channels: int) -> int:
    """Return into how many groups of input channels, each with its own outputs, axis 0 falls; or raise."""
    groups = arrays.integer("groups", groups)
    if groups < 1 or channels % groups:
        raise ValueError(f"groups must be at least 1 and divide the {channels} channels of bn, got {groups}")
    if shape[axis] == channels:
        return 1
    if shape[axis] * groups != channels:
        wanted = (
            f"{channels}" if groups == 1 else f"{channels}, or {channels // groups} in each of the groups,"
        )
        raise ValueError(
            f"weight must have {wanted} output channels (bn.num_features) on axis {axis}, got {shape[axis]} "
            f"(shape {shape}, groups={groups})"
        )
    if axis == 0:
        raise ValueError(f"axis must not be 0, where the {groups} groups of input channels are, got {axis}")
    if shape[0] % groups:
        raise ValueError(f"groups must divide weight's {shape[0]} input channels on axis 0, got {groups}")
    return groups


def _along(scale: np.ndarray, shape: tuple[int, ...], axis: int, groups: int) -> np.ndarray:
    """Return the scale of each output channel, to be multiplied with a weight.

    In a weight [i, j] with groups, input channel i is in group g = i // (in / groups), and the output channel
    is g · (out / groups) + j.
    """
    lengths = [1] * len(shape)
    lengths[axis] = shape[axis]
    if groups == 1:
        return scale.reshape(lengths)
    lengths[0] = shape[0]
    return np.repeat(scale.reshape(groups, -1), shape[0] // groups, axis=0).reshape(lengths)


def _result(here: Place, like: np.ndarray, values: np.ndarray) -> Any:
    """Return float64 numbers, rounded once, as an array of the caller's kind that is like another one."""
    out = here.empty_like(like)
    out[...] = narrowed(values, out.dtype)
    return here.result(out)
