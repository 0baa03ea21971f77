"""Batch normalization by the book, in float64: what every result is held against before it is timed.

It knows nothing of nbbn's formulas and kernels. The tolerances are generous to libraries that add up in
float32: what is looked for here are wrong answers, not last places, which are the tests' business.
"""

import math
from collections.abc import Iterator

import numpy as np

Arrays = dict[str, np.ndarray]

PART = 1 << 22
"""How many values of out or grad_x are looked at; where there are more, in slices of the first axis."""

_EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # of what is stored in 16 bits
_SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133}  # the steps of their subnormal numbers
_SUMS = {"float64": 2.0**-44}  # what sums may be off by, of the sum of absolute values
_SUMS_32 = 2.0**-15


def _slabs(x: np.ndarray, axis: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield parts of the first axis in float64, channels first and all else in one dimension."""
    step = max(1, PART // max(1, x[0].size))
    for begin in range(0, len(x), step):
        part = slice(begin, begin + step)
        yield part, _rows(x[part], axis)


def _rows(x: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).astype(np.float64)


class Oracle:
    """The results for one input, computed once for whoever is to be checked.

    Parameters
    ----------
    x, grad_out : array
        Stored as `axis`, the channel axis, says; the first axis must not be it.
    weight, bias, running_mean, running_var : array, shape (channels,)
    eps, momentum : float
    """

    def __init__(self, x: np.ndarray, axis: int, eps: float, momentum: float, **others: np.ndarray) -> None:
        self.x, self.axis, self.eps, self.momentum = x, axis, eps, momentum
        self.others = others
        self.count = x.size // x.shape[axis]
        total = sum(rows.sum(axis=1) for _, rows in _slabs(x, axis))
        self.mean: np.ndarray = total / self.count
        squares = sum(np.square(rows - self.mean[:, None]).sum(axis=1) for _, rows in _slabs(x, axis))
        self.var: np.ndarray = squares / self.count
        self.invstd: np.ndarray = 1.0 / np.sqrt(self.var + eps)
        self._sums: tuple[np.ndarray, ...] | None = None

    @property
    def sums(self) -> tuple[np.ndarray, ...]:
        """Σ dy, Σ dy · x_hat, and the same of their absolute values."""
        if self._sums is None:
            total = np.zeros((4, len(self.mean)))
            for part, rows in _slabs(self.x, self.axis):
                dy = _rows(self.others["grad_out"][part], self.axis)
                product = dy * self._normalized(rows)
                total += [dy.sum(1), product.sum(1), np.abs(dy).sum(1), np.abs(product).sum(1)]
            self._sums = tuple(total)
        return self._sums

    def _normalized(self, rows: np.ndarray) -> np.ndarray:
        x_hat: np.ndarray = (rows - self.mean[:, None]) * self.invstd[:, None]
        return x_hat

    def fault(self, mode: str, results: Arrays) -> str:
        """Return what is wrong with the results of a mode, or nothing.

        Parameters
        ----------
        mode : str
            ``forward`` and ``backward`` are those of training; ``evaluation`` uses the running statistics.
        results : dict of str to array
            ``out``, ``running_mean``, ``running_var``, ``grad_x``, ``grad_weight``, ``grad_bias``: what
            there is of them. The large ones have the shape of `x`.
        """
        for name, result in results.items():
            whole = name in ("out", "grad_x")
            fault = self._large(mode, name, result) if whole else self._small(name, result)
            if fault:
                return f"{name}{fault}"
        return ""

    def _small(self, name: str, result: np.ndarray) -> str:
        bessel = self.count / (self.count - 1)
        old, new = 1 - self.momentum, self.momentum
        off = _SUMS.get(self.x.dtype.name, _SUMS_32)
        if name == "running_mean":
            value = old * self.others["running_mean"] + new * self.mean
            scale = np.abs(self.others["running_mean"]) + np.sqrt(self.var + self.mean**2)
        elif name == "running_var":
            value = old * self.others["running_var"] + new * self.var * bessel
            scale = np.abs(value)
        else:
            at = 0 if name == "grad_bias" else 1
            value, scale = self.sums[at], self.sums[at + 2]
        return _difference(np.asarray(result, np.float64), value, off * scale, ("channel",))

    def _large(self, mode: str, name: str, result: np.ndarray) -> str:
        if result.shape != self.x.shape:
            return f" has shape {result.shape}, not {self.x.shape}"
        if np.isnan(result).any():
            return f" is not a number in {int(np.isnan(result).sum())} places"
        kind = self.x.dtype.name
        unit, off = 4 * _EPSILON.get(kind, 0.0), _SUMS.get(kind, _SUMS_32)
        gamma = self.others["weight"].astype(np.float64)[:, None]
        beta = self.others["bias"].astype(np.float64)[:, None]
        for n in self._looked_at():
            part = slice(n, n + 1)
            rows = _rows(self.x[part], self.axis)
            if mode == "evaluation":
                centre = self.others["running_mean"].astype(np.float64)[:, None]
                spread = self.others["running_var"].astype(np.float64)[:, None]
                x_hat = (rows - centre) / np.sqrt(spread + self.eps)
            else:
                x_hat = self._normalized(rows)
            if name == "out":
                value = gamma * x_hat + beta
                scale = np.abs(gamma) * (1 + np.abs(x_hat)) + np.abs(beta)
            else:
                dy = _rows(self.others["grad_out"][part], self.axis)
                bias, weight, bias_scale, weight_scale = (s[:, None] / self.count for s in self.sums)
                value = gamma * self.invstd[:, None] * (dy - bias - x_hat * weight)
                scale = np.abs(gamma) * self.invstd[:, None]
                scale = scale * (np.abs(dy) + bias_scale + np.abs(x_hat) * weight_scale)
            tolerance = unit * np.abs(value) + off * scale + _SMALLEST.get(kind, 0.0)
            fault = _difference(_rows(result[part], self.axis), value, tolerance, ("channel", "value"))
            if fault:
                return f"[{n}]{fault}"
        return ""

    def _looked_at(self) -> list[int]:
        """Return steps of the first axis: all, or the first, the last, and some between."""
        most = max(2, PART // max(1, self.x[0].size))
        count = len(self.x)
        return sorted({round(k) for k in np.linspace(0, count - 1, min(count, most))})


def _difference(result: np.ndarray, value: np.ndarray, off: np.ndarray, names: tuple[str, ...]) -> str:
    if result.shape != value.shape:
        return f" has shape {result.shape}, not {value.shape}"
    wrong = ~(np.abs(result - value) <= off + math.ulp(0.0))
    if not wrong.any():
        return ""
    at = tuple(int(k) for k in np.argwhere(wrong)[0])
    where = ", ".join(f"{name} {k}" for name, k in zip(names, at, strict=True))
    return (
        f", {where}: {result[at]:.16g}, should be {value[at]:.16g} ± {off[at]:.1g}; "
        f"so {int(wrong.sum())} of {wrong.size}"
    )
