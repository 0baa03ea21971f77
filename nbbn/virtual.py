"""Ghost batch normalization: a batch in parts, each normalized with its own statistics.

E. Hoffer, I. Hubara and D. Soudry, "Train longer, generalize better", arXiv 1705.08741. The parts are views
of one array, and so is what is written.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from nbbn import arrays
from nbbn.arrays import ABSENT, Parameter, address
from nbbn.dtypes import FLOAT64
from nbbn.frameworks import CPU, Place, place
from nbbn.functional import fused_backward, fused_forward, run_of
from nbbn.fusion import Fusion

Part = tuple[slice, ...]


def cut(shape: tuple[int, ...], axis: int, size: int, least: float) -> tuple[Part, ...]:
    """Return the parts of so many samples; each must have more than `least` values per channel.

    Samples are on the first axis that is not that of the channels. A last part that would have too few values
    is one with the part before it.
    """
    samples = 1 if axis == 0 else 0
    total = shape[samples]
    per_sample = math.prod(shape) // (shape[axis] * total)
    if total > size and size * per_sample <= least:
        raise ValueError(
            f"virtual_batch_size must be such that parts have more than {least:g} values per channel, got "
            f"{size} for x of shape {shape} with axis {axis}"
        )
    starts = list(range(0, total, size))
    if len(starts) > 1 and (total - starts[-1]) * per_sample <= least:
        del starts[-1]
    before = (slice(None),) * samples
    return tuple(
        (*before, slice(first, last)) for first, last in zip(starts, [*starts[1:], total], strict=True)
    )


class Parts(NamedTuple):
    """What the backward pass needs of a batch in parts.

    Attributes
    ----------
    parts : tuple of tuple of slice
        Which samples were normalized together.
    stats : numpy.ndarray
        float64[3 · parts, C]: mean, var and invstd of one part after the other, as the place of the call has
        it.
    """

    parts: tuple[Part, ...]
    stats: np.ndarray

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
        """Return the gradients as `nbbn.functional.differentiate` does; those of parameters are sums."""
        here, (x, grad_out, weight, bias, residual) = place(
            x, {"grad_out": grad_out, "weight": weight, "bias": bias, "residual": fused.residual}
        )
        x = arrays.checked("x", x)
        axis = arrays.channel_axis(x, axis)
        channels = x.shape[axis]
        grad_out = arrays.like("grad_out", grad_out, x)
        gamma = arrays.parameter("weight", weight, channels, x)
        beta = arrays.parameter("bias", bias, channels, x)
        fused = fused._replace(residual=residual)
        grad_x = here.empty_like(x)
        grad_residual = None if residual is None else here.empty_like(x)
        gradients = here.empty((len(self.parts), 2 * channels))
        for k, part in enumerate(self.parts):
            mine, its, result = x[part], grad_out[part], grad_x[part]
            kept = None if grad_residual is None else grad_residual[part]
            run, extras, _ = fused_backward(mine, its, result, kept, axis, here, _of(fused, part), beta)
            run.backward(
                address(mine), address(its), address(result), address(gradients[k]), gamma,
                _row(self.stats, 3 * k), _row(self.stats, 3 * k + 2), True, False, extras,
            )  # fmt: skip
        total = _sum(gradients, here).reshape(2, channels)
        kept = None if grad_residual is None else here.result(grad_residual)
        return here.result(grad_x), total, kept, here


def train_parts(
    x: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    axis: int,
    parts: tuple[Part, ...],
    running_mean: Any,
    running_var: Any,
    momenta: Sequence[float],
    correction: float,
    fused: Fusion,
) -> tuple[Any, np.ndarray, Place]:
    """Normalize each part with its own statistics, and update the running ones with one after the other.

    x is known to have the right shape. Return the output, float64[3 · parts, C] as `Parts` has it, and the
    place of the call.
    """
    here, (x, weight, bias, running_mean, running_var, residual) = place(
        x,
        {
            "weight": weight,
            "bias": bias,
            "running_mean": running_mean,
            "running_var": running_var,
            "residual": fused.residual,
        },
    )
    axis = arrays.channel_axis(x, axis)
    channels = x.shape[axis]
    gamma = arrays.parameter("weight", weight, channels, x)
    beta = arrays.parameter("bias", bias, channels, x)
    running = (
        arrays.parameter("running_mean", running_mean, channels, x),
        arrays.parameter("running_var", running_var, channels, x),
    )
    if residual is not None:
        fused = fused._replace(residual=arrays.like("residual", residual, x))
    eps = arrays.number("eps", eps, 0.0, math.inf)
    out = here.empty_like(x)
    stats = here.empty((3 * len(parts), channels))
    for k, (part, momentum) in enumerate(zip(parts, momenta, strict=True)):
        mine = x[part]
        mean, var = running if momentum else (ABSENT, ABSENT)
        result = out[part]
        run, extras, _ = fused_forward(mine, axis, result, here, _of(fused, part))
        run.forward(
            address(mine), address(result), address(stats[3 * k :]), gamma, beta, mean, var, eps, momentum,
            correction, (), extras,
        )  # fmt: skip
    return here.result(out), stats, here


def _of(fused: Fusion, part: Part) -> Fusion:
    """Return what follows the normalization of a part."""
    return fused if fused.residual is None else fused._replace(residual=fused.residual[part])


def _row(rows: np.ndarray, index: int) -> Parameter:
    row = rows[index]
    return address(row), row.strides[0], FLOAT64.code


def _sum(rows: np.ndarray, here: Place) -> np.ndarray:
    """Return the sum of rows of float64, as the place of the call has it."""
    if here.device == CPU:
        total: np.ndarray = rows.sum(axis=0)
        return total
    # It is the gradient of a bias, if these are that of the output.
    scratch, sums = here.empty(rows.shape), here.empty((2, rows.shape[1]))
    at = address(rows)
    run = run_of(rows, 1, (rows.strides, rows.strides, scratch.strides), here)
    run.backward(at, at, address(scratch), address(sums), ABSENT, ABSENT, ABSENT, False)
    of_bias: np.ndarray = sums[1]
    return of_bias
