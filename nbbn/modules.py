"""class LayerNorm, RMSNorm, GroupNorm and InstanceNorm, with the arguments and states of PyTorch's."""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from nbbn import arrays
from nbbn.base import Module, Tracking, checked, sized, weight_of_a_batch
from nbbn.family import (
    INSTANCE_DIMENSIONS,
    differentiate_channels,
    differentiate_rows,
    normalize_channels,
    normalize_instances,
    normalize_rows,
    shape_of,
)
from nbbn.functional import differentiate, evaluate


class _Saved(NamedTuple):
    """What the last forward call left for the backward one."""

    x: Any
    mean: Any
    invstd: Any
    training: bool = True


class _RowNorm(Module):
    """What is normalized together are the last dimensions."""

    normalized_shape: tuple[int, ...]
    eps: float | None
    _centered: bool

    @property
    def _shape(self) -> tuple[int, ...]:
        return self.normalized_shape

    def __call__(self, x: Any) -> Any:
        """Normalize x.

        Parameters
        ----------
        x : array
            On this module's device, of any kind and type (`nbbn.batch_norm`), any strides; its shape ends
            with `normalized_shape`.

        Returns
        -------
        array
            A new one of x's kind, shape, dtype and memory layout.

        Raises
        ------
        TypeError
            If `x` is not an array of a type that goes with the module's.
        ValueError
            If x's shape does not fit.
        nbbn.DeviceError
            If `x` lies on another device.
        """
        out, stats, _, here = normalize_rows(
            x, self.normalized_shape, self.weight, self.bias, self.eps, None, self._centered
        )
        kept = here.kept_rows(stats)
        self._saved = _Saved(x, kept[0], kept[2])
        return out

    def backward(self, grad_out: Any) -> Any:
        """Return the gradient with respect to the last call's x; set those of the parameters.

        Parameters
        ----------
        grad_out : array
            The gradient with respect to the last call's output: of its shape and dtype.

        Returns
        -------
        array
            grad_x, of x's kind, shape, dtype and memory layout.

        Raises
        ------
        RuntimeError
            If there was no call before.
        TypeError, ValueError
            If `grad_out` is not an array of x's shape and dtype.
        nbbn.DeviceError
            If `grad_out` lies on another device.
        """
        x, mean, invstd, _ = self._last_call()
        grad_x, gradients, here = differentiate_rows(
            grad_out, x, self.normalized_shape, self.weight, mean, invstd, None, self._centered
        )
        self._keep_gradients(gradients, here)
        return grad_x


def _shape(normalized_shape: Any) -> tuple[int, ...]:
    shape = shape_of(normalized_shape)
    for size in shape:
        sized("normalized_shape", size)
    return shape


class LayerNorm(_RowNorm):
    """Layer normalization with parameters, as ``torch.nn.LayerNorm``.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The last dimensions of x, which are normalized together.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    elementwise_affine : bool, default True
        Whether there are parameters.
    bias : bool, default True
        Whether there is a bias among them.
    dtype : str or numpy.dtype, default "float32"
        Of the parameters: float32 or float64, for inputs of any type; or float16 or bfloat16, for inputs of
        the same type.
    device : str, default "cpu"
        Where parameters live, and inputs must: "cpu", "cuda:N", or "cuda" for the current GPU.

    Attributes
    ----------
    weight, bias : numpy.ndarray, Numba device array, or None
        Of shape `normalized_shape`.
    grad_weight, grad_bias : numpy.ndarray, Numba device array, or None
        Of the last `backward`, in the module's dtype; not accumulated.
    training : bool
        The mode. It changes nothing here.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If an argument is out of range.
    nbbn.DeviceError
        If `device` is not to be had.

    See Also
    --------
    nbbn.layer_norm : The mathematics and its source.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> norm = nbbn.LayerNorm(2, eps=0.0)
    >>> norm(np.array([[1.0, 3.0], [10.0, 30.0]]))
    array([[-1.,  1.],
           [-1.,  1.]])
    >>> norm.backward(np.ones((2, 2)))
    array([[0., 0.],
           [0., 0.]])
    >>> norm.grad_bias
    array([2., 2.], dtype=float32)
    """

    _centered = True

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: Any = "float32",
        device: str = "cpu",
    ) -> None:
        self.normalized_shape = _shape(normalized_shape)
        self.eps = arrays.number("eps", eps, 0.0, float("inf"))
        self.elementwise_affine = arrays.flag("elementwise_affine", elementwise_affine)
        has_bias = arrays.flag("bias", bias) and self.elementwise_affine
        super().__init__(dtype, device)
        self._fill(self.elementwise_affine, has_bias)

    def __repr__(self) -> str:
        bias = self.bias is not None or not self.elementwise_affine
        return (
            f"LayerNorm({self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, bias={bias}, dtype='{self.dtype}', "
            f"device='{self.device}')"
        )


class RMSNorm(_RowNorm):
    """RMS normalization with a weight, as ``torch.nn.RMSNorm``.

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The last dimensions of x, which are normalized together.
    eps : float, optional
        Added to the mean square; at least 0. Without it, 2⁻⁵² of float64, and 2⁻²³, about 1.2e-7, of others.
    elementwise_affine : bool, default True
        Whether there is a weight.
    dtype : str or numpy.dtype, default "float32"
        Of the parameters: float32 or float64, for inputs of any type; or float16 or bfloat16, for inputs of
        the same type.
    device : str, default "cpu"
        Where they live: "cpu", "cuda" or "cuda:N".

    Attributes
    ----------
    weight : numpy.ndarray, Numba device array, or None
        Of shape `normalized_shape`.
    grad_weight : numpy.ndarray, Numba device array, or None
        Of the last `backward`, in the module's dtype; not accumulated.
    training : bool
        The mode. It changes nothing here.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If an argument is out of range.
    nbbn.DeviceError
        If `device` is not to be had.

    See Also
    --------
    nbbn.rms_norm : The mathematics and its source.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.RMSNorm(2, eps=0.0)(np.array([[3.0, 4.0]])).round(4)
    array([[0.8485, 1.1314]])
    """

    _centered = False

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        *,
        dtype: Any = "float32",
        device: str = "cpu",
    ) -> None:
        self.normalized_shape = _shape(normalized_shape)
        self.eps = None if eps is None else arrays.number("eps", eps, 0.0, float("inf"))
        self.elementwise_affine = arrays.flag("elementwise_affine", elementwise_affine)
        super().__init__(dtype, device)
        self._fill(self.elementwise_affine, False)

    def __repr__(self) -> str:
        return (
            f"RMSNorm({self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, dtype='{self.dtype}', device='{self.device}')"
        )


class GroupNorm(Module):
    """Group normalization with parameters, as ``torch.nn.GroupNorm``.

    Parameters
    ----------
    num_groups : int
        How many groups the channels of a sample are cut into; it divides `num_channels`.
    num_channels : int
        C, the length of the channel axis.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    affine : bool, default True
        Whether there are a weight and a bias.
    bias : bool, default True
        Whether there is a bias among them.
    axis : int, default 1
        The channel axis.
    dtype : str or numpy.dtype, default "float32"
        Of the parameters: float32 or float64, for inputs of any type; or float16 or bfloat16, for inputs of
        the same type.
    device : str, default "cpu"
        Where they live: "cpu", "cuda" or "cuda:N".

    Attributes
    ----------
    weight, bias : numpy.ndarray, Numba device array, or None
        Shape (C,).
    grad_weight, grad_bias : numpy.ndarray, Numba device array, or None
        Of the last `backward`, in the module's dtype; not accumulated.
    training : bool
        The mode. It changes nothing here.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If an argument is out of range.
    nbbn.DeviceError
        If `device` is not to be had.

    See Also
    --------
    nbbn.group_norm : The mathematics and its source.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.GroupNorm(2, 4, eps=0.0)(np.array([[1.0, 3.0, 10.0, 30.0]]))
    array([[-1.,  1., -1.,  1.]])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        bias: bool = True,
        axis: int = 1,
        dtype: Any = "float32",
        device: str = "cpu",
    ) -> None:
        self.num_groups = sized("num_groups", num_groups)
        self.num_channels = sized("num_channels", num_channels)
        if self.num_channels % self.num_groups:
            raise ValueError(
                f"num_groups must divide num_channels, got {self.num_groups} for {self.num_channels}"
            )
        self.eps = arrays.number("eps", eps, 0.0, float("inf"))
        self.affine = arrays.flag("affine", affine)
        self.axis = arrays.integer("axis", axis)
        has_bias = arrays.flag("bias", bias) and self.affine
        super().__init__(dtype, device)
        self._fill(self.affine, has_bias)

    def __repr__(self) -> str:
        return (
            f"GroupNorm({self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"axis={self.axis}, dtype='{self.dtype}', device='{self.device}'{self._without_bias()})"
        )

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.num_channels,)

    def __call__(self, x: Any) -> Any:
        """Normalize x.

        Parameters
        ----------
        x : array
            On this module's device, of any kind and type (`nbbn.batch_norm`), with `num_channels` channels;
            any strides.

        Returns
        -------
        array
            A new one of x's kind, shape, dtype and memory layout.

        Raises
        ------
        TypeError
            If `x` is not an array of a type that goes with the module's.
        ValueError
            If x's shape does not fit.
        nbbn.DeviceError
            If `x` lies on another device.
        """
        out, stats, _, here = normalize_channels(
            x, self.num_groups, self.weight, self.bias, self.eps, self.axis, None, self.num_channels
        )
        kept = here.kept_rows(stats)
        self._saved = _Saved(x, kept[0], kept[2])
        return out

    def backward(self, grad_out: Any) -> Any:
        """Return the gradient with respect to the last call's x; set grad_weight and grad_bias.

        Parameters
        ----------
        grad_out : array
            The gradient with respect to the last call's output: of its shape and dtype.

        Returns
        -------
        array
            grad_x, of x's kind, shape, dtype and memory layout.

        Raises
        ------
        RuntimeError
            If there was no call before.
        TypeError, ValueError
            If `grad_out` is not an array of x's shape and dtype.
        nbbn.DeviceError
            If `grad_out` lies on another device.
        """
        x, mean, invstd, _ = self._last_call()
        grad_x, gradients, here = differentiate_channels(
            grad_out, x, self.num_groups, self.weight, mean, invstd, self.axis, None
        )
        self._keep_gradients(gradients, here)
        return grad_x


class InstanceNorm(Tracking):
    """Instance normalization, as ``torch.nn.InstanceNorm*d``: parameters and running statistics optional.

    x has a batch dimension, always: a single sample is given as ``x[None]``.

    Parameters
    ----------
    num_features : int
        C, the length of the channel axis.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    momentum : float or None, default 0.1
        The weight of the new observation in the running statistics, in [0, 1]; None: they are the
        average over all batches so far, as in `nbbn.BatchNorm`; in PyTorch they would keep what they are.
    affine : bool, default False
        Whether there are a weight and a bias.
    track_running_stats : bool, default False
        Whether there are running statistics, which evaluation uses.
    bias : bool, default True
        Whether there is a bias, where there is a weight.
    axis : int, default 1
        The channel axis.
    dtype : str or numpy.dtype, default "float32"
        Of parameters and running statistics: float32 or float64, for inputs of any type; or float16 or
        bfloat16, for inputs of the same type.
    device : str, default "cpu"
        Where they live: "cpu", "cuda" or "cuda:N".

    Attributes
    ----------
    weight, bias : numpy.ndarray, Numba device array, or None
        Shape (C,).
    grad_weight, grad_bias : numpy.ndarray, Numba device array, or None
        Of the last `backward`, in the module's dtype; not accumulated.
    running_mean, running_var : numpy.ndarray, Numba device array, or None
        Shape (C,): averages over the samples of their means and unbiased variances.
    num_batches_tracked : numpy.ndarray or None
        0-d, int64: how many batches there were that were not empty. PyTorch has it, and does not count.
    training : bool
        The mode: see `train` and `eval`.

    Raises
    ------
    TypeError
        If an argument is of the wrong type.
    ValueError
        If an argument is out of range.
    nbbn.DeviceError
        If `device` is not to be had.

    See Also
    --------
    nbbn.instance_norm : The mathematics and its source.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> nbbn.InstanceNorm(2, eps=0.0)(np.array([[[1.0, 3.0], [10.0, 30.0]]]))
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """

    momentum = checked("momentum", weight_of_a_batch)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        *,
        bias: bool = True,
        axis: int = 1,
        dtype: Any = "float32",
        device: str = "cpu",
    ) -> None:
        self.num_features = sized("num_features", num_features)
        self.eps = arrays.number("eps", eps, 0.0, float("inf"))
        self.momentum = momentum
        self.affine = arrays.flag("affine", affine)
        self.track_running_stats = arrays.flag("track_running_stats", track_running_stats)
        self.axis = arrays.integer("axis", axis)
        has_bias = arrays.flag("bias", bias) and self.affine
        super().__init__(dtype, device)
        self._fill(self.affine, has_bias)

    def __repr__(self) -> str:
        return (
            f"InstanceNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, axis={self.axis}, "
            f"dtype='{self.dtype}', device='{self.device}'{self._without_bias()})"
        )

    def __call__(self, x: Any) -> Any:
        """Normalize x.

        Parameters
        ----------
        x : array
            On this module's device, of any kind and type (`nbbn.batch_norm`), with `num_features` channels;
            at least three dimensions, any strides. More than one value per channel of a sample, but in
            evaluation with running statistics.

        Returns
        -------
        array
            A new one of x's kind, shape, dtype and memory layout.

        Raises
        ------
        TypeError
            If `x` is not an array of a type that goes with the module's.
        ValueError
            If x's shape does not fit.
        nbbn.DeviceError
            If `x` lies on another device. In all three cases the running statistics are unchanged.
        """
        tracks = self._tracks
        if tracks and not self.training:
            mean, var = self._snapshots()
            out, here = evaluate(
                x,
                mean,
                var,
                self.weight,
                self.bias,
                self.eps,
                self.axis,
                features=self.num_features,
                least=INSTANCE_DIMENSIONS,
            )
            self._saved = _Saved(x, *self._columns.constants(mean, var, self.eps, here), training=False)
            return out
        with self._lock if tracks else contextlib.nullcontext():
            out, stats, _, here = normalize_instances(
                x,
                self.running_mean if tracks else None,
                self.running_var if tracks else None,
                self.weight,
                self.bias,
                self._momenta()[0] if tracks else 0.0,
                self.eps,
                self.axis,
                None,
                self.num_features,
                self._counting() if tracks else (),
            )
        kept = here.kept_rows(stats)
        self._saved = _Saved(x, kept[0], kept[2])
        return out

    def backward(self, grad_out: Any) -> Any:
        """Return the gradient with respect to the last call's x; set grad_weight and grad_bias.

        Parameters
        ----------
        grad_out : array
            The gradient with respect to the last call's output: of its shape and dtype.

        Returns
        -------
        array
            grad_x, of x's kind, shape, dtype and memory layout.

        Raises
        ------
        RuntimeError
            If there was no call before.
        TypeError, ValueError
            If `grad_out` is not an array of x's shape and dtype.
        nbbn.DeviceError
            If `grad_out` lies on another device.
        """
        x, mean, invstd, training = self._last_call()
        if training:
            grad_x, gradients, here = differentiate_channels(
                grad_out, x, None, self.weight, mean, invstd, self.axis, None
            )
        else:
            grad_x, gradients, _, here = differentiate(
                grad_out, x, self.weight, None, mean, invstd, self.axis, False
            )
        self._keep_gradients(gradients, here)
        return grad_x
