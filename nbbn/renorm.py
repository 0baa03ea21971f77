"""Batch renormalization: the constants r and d, and the gradient with them.

S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models", arXiv
1702.03275. No kernel knows of it: weight · (x_hat · r + d) + bias is batch normalization with another weight
and another bias.
"""

from typing import Any, NamedTuple

import numpy as np

from nbbn.columns import Columns
from nbbn.dtypes import widened
from nbbn.frameworks import Place
from nbbn.functional import differentiate, take_stats
from nbbn.fusion import Fusion
from nbbn.options import Renorm


class Renormalized(NamedTuple):
    """What a training step with renormalization is computed with.

    Attributes
    ----------
    r, d : numpy.ndarray
        float64, shape (C,), in the memory of the host.
    weight, bias : array
        weight · r and weight · d + bias, float64: columns on the module's device.
    columns : Columns
        What made them.
    """

    r: np.ndarray
    d: np.ndarray
    weight: Any
    bias: Any
    columns: Columns

    def differentiate(
        self,
        grad_out: Any,
        x: Any,
        weight: Any,
        bias: Any,
        mean: Any,
        invstd: Any,
        axis: int,
        fused: Fusion,
    ) -> tuple[Any, np.ndarray, Any, Place]:
        """Return the gradients as `nbbn.functional.differentiate` does, with r and d as constants.

        With the sums of batch normalization, Σ dy · x_hat and Σ dy::

            grad_weight = Σ dy · (x_hat · r + d) = r · Σ dy · x_hat + d · Σ dy
        """
        grad_x, gradients, grad_residual, here = differentiate(
            grad_out, x, self.weight, self.bias, mean, invstd, axis, True, fused=fused
        )
        scaled, total = self.columns.numbers(gradients, here)
        return grad_x, here.put(np.stack([self.r * scaled + self.d * total, total])), grad_residual, here


def renormalize(
    x: np.ndarray,
    axis: int,
    here: Place,
    fused: Fusion,
    bounds: Renorm,
    eps: float,
    columns: Columns,
    running: tuple[Any, Any],
    weight: Any,
    bias: Any,
) -> Renormalized | None:
    """Return what to normalize x with, a view that is not empty; None: as batch normalization does.

    `fused` says which of its values count.
    """
    if bounds == (1.0, 0.0):
        return None
    channels = x.shape[axis]
    stats = here.empty((3, channels))
    take_stats(x, axis, here, fused, stats)
    mean, var = columns.numbers(stats[:2], here)
    running_mean, running_var = (widened(columns.host(column)) for column in running)
    gamma = np.ones(channels) if weight is None else widened(columns.host(weight))
    beta = np.zeros(channels) if bias is None else widened(columns.host(bias))
    with np.errstate(all="ignore"):  # of what is not finite in x
        sigma = np.sqrt(running_var + eps)
        r = np.clip(np.sqrt(var + eps) / sigma, 1.0 / bounds.r_max, bounds.r_max)
        d = np.clip((mean - running_mean) / sigma, -bounds.d_max, bounds.d_max)
        scaled, shifted = columns.new(gamma * r), columns.new(gamma * d + beta)
    return Renormalized(r, d, scaled, shifted, columns)
