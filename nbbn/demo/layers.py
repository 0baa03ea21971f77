"""What a small network needs besides `nbbn.BatchNorm`, in plain NumPy.

Every layer here has the interface of `nbbn.BatchNorm`: calling it on x gives out and remembers what the way
back needs; `backward(grad_out)` gives grad_x and leaves `grad_weight` and `grad_bias`. So batch norm
stands among them as it is.
"""

from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]
"""An array of floating-point numbers."""


class Layer(Protocol):
    """What a network asks of a layer."""

    def __call__(self, x: Array) -> Array:
        """Return the layer's output for the input x."""

    def backward(self, grad_out: Array) -> Array:
        """Return the gradient by x, given the gradient by the output of the latest call."""


class Convolution:
    """A convolution with an odd, square kernel, stride 1 and zero padding: out is as large as x.

    Parameters
    ----------
    weight : array, shape (channels out, channels in, size, size)
    bias : array, shape (channels out,), optional
        Left out where batch norm follows: it would subtract any constant again.
    """

    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Array) -> Array:
        """Convolve images of shape (n, channels in, height, width)."""
        self._windows = windows(x, self.weight.shape[-1])
        out = multiply(self.weight, self._windows, x.shape)
        if self.bias is not None:
            out += self.bias[:, None, None]
        return out

    def backward(self, grad_out: Array) -> Array:
        """Return the gradient by x; leave those by the weight and by the bias."""
        n, channels, height, width = grad_out.shape
        by_position = grad_out.reshape(n, channels, height * width)
        of_each_image = by_position @ self._windows.swapaxes(1, 2)
        self.grad_weight = of_each_image.sum(axis=0).reshape(self.weight.shape)
        self.grad_bias = grad_out.sum(axis=(0, 2, 3))
        # A pixel of x meets the kernel's entries in the reverse order, once for each channel of the output:
        # the way back is a convolution too, with the kernel turned by 180° and its channels swapped.
        turned = self.weight[:, :, ::-1, ::-1].swapaxes(0, 1)
        return multiply(turned, windows(grad_out, turned.shape[-1]), grad_out.shape)


def windows(x: Array, size: int) -> Array:
    """Return what a kernel sees at each pixel: shape (n, channels · size · size, height · width)."""
    n, channels, height, width = x.shape
    margin = size // 2
    padded = np.pad(x, ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    seen = sliding_window_view(padded, (size, size), axis=(2, 3))
    return seen.transpose(0, 1, 4, 5, 2, 3).reshape(n, channels * size * size, height * width)


def multiply(weight: Array, seen: Array, image_shape: tuple[int, ...]) -> Array:
    """Return weight · seen for each image: shape (n, channels out, height, width)."""
    n, _, height, width = image_shape
    out = weight.reshape(len(weight), -1) @ seen
    return out.reshape(n, len(weight), height, width)


class Rectifier:
    """max(x, 0), element by element. `x` is the input of the latest call."""

    def __call__(self, x: Array) -> Array:
        """Return max(x, 0)."""
        self.x = x
        return np.maximum(x, 0)

    def backward(self, grad_out: Array) -> Array:
        """Return grad_out where x was positive, and 0 elsewhere."""
        return grad_out * (self.x > 0)


class Dense:
    """A linear map of all values of an image.

    Parameters
    ----------
    weight : array, shape (outputs, inputs)
    bias : array, shape (outputs,)
    """

    def __init__(self, weight: Array, bias: Array) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Array) -> Array:
        """Return an array of shape (n, outputs) for images of any shape (n, …)."""
        self._shape = x.shape
        self._flat = x.reshape(len(x), -1)
        return self._flat @ self.weight.T + self.bias

    def backward(self, grad_out: Array) -> Array:
        """Return the gradient by x; leave those by the weight and by the bias."""
        self.grad_weight = grad_out.T @ self._flat
        self.grad_bias = grad_out.sum(axis=0)
        return (grad_out @ self.weight).reshape(self._shape)


def softmax_cross_entropy(scores: Array, labels: NDArray[np.int64]) -> tuple[float, Array]:
    """Return the mean cross-entropy of softmax(scores) with the labels, and its gradient by the scores.

    Parameters
    ----------
    scores : array, shape (n, classes)
    labels : array of int, shape (n,)
        The right class of each.
    """
    rows = np.arange(len(labels))
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_probability = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    loss = -float(log_probability[rows, labels].mean())
    grad_scores = np.exp(log_probability)
    grad_scores[rows, labels] -= 1
    return loss, grad_scores / len(labels)
