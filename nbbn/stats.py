"""BatchStats: what is known of a set of values per channel, and how two such sets are pooled."""

from typing import NamedTuple

import numpy as np

from nbbn import arrays, formulas
from nbbn.compiler import interpreted
from nbbn.frameworks import Array, framework_of


class BatchStats(NamedTuple):
    """Count, mean and biased variance of the values of each channel.

    Attributes
    ----------
    count : int
        Values per channel.
    mean, var : array
        Of the values' kind, float64 (in JAX without x64: float32), shape (C,). The variance is the biased
        one, Σ (x - mean)² / count.
    """

    count: int  # type: ignore[assignment]  # tuple.count is given up for the usual name
    mean: Array
    var: Array

    def merge(self, other: "BatchStats") -> "BatchStats":
        """Return the statistics of both sets of values together.

        Parameters
        ----------
        other : BatchStats
            Of other values of the same channels, and of the same kind. Numba's device arrays have no
            arithmetic: copy them to the host before.

        Returns
        -------
        BatchStats
            Equal to those of all the values at once, to rounding.

        Raises
        ------
        TypeError
            If `other` is not a BatchStats, or its arrays are not such, or have no arithmetic.
        ValueError
            If it has another number of channels, or a count or a shape that no such statistics have.

        References
        ----------
        T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a pairwise algorithm for
        computing sample variances", 1979.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> x = np.arange(12.0).reshape(4, 3)
        >>> nbbn.batch_stats(x[:1]).merge(nbbn.batch_stats(x[1:])).mean
        array([4.5, 5.5, 6.5])
        """
        if not isinstance(other, BatchStats):
            raise TypeError(f"other must be a BatchStats, got {type(other).__name__}")
        for name, stats in (("self", self), ("other", other)):
            _check(name, stats)
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other must have {self.mean.shape[0]} channels, got {other.mean.shape[0]}")
        if other.count == 0 or self.count == 0:
            return self if other.count == 0 else other
        count = self.count + other.count
        mean, rest, m2 = interpreted(formulas.merge)(
            float(self.count),
            self.mean,
            0.0,
            self.var * self.count,
            float(other.count),
            other.mean,
            0.0,
            other.var * other.count,
        )
        return BatchStats(count, mean + rest, m2 / count)


def _check(name: str, stats: BatchStats) -> None:
    """Raise if these are no statistics: a BatchStats can be made of anything."""
    arrays.number(f"{name}.count", arrays.integer(f"{name}.count", stats.count), 0.0, 2.0**63)
    for field in ("mean", "var"):
        value = getattr(stats, field)
        framework_of(f"{name}.{field}", value)
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name}.{field} must be an array without a mask, got a masked one")
        if isinstance(value, np.ndarray):
            arrays.checked(f"{name}.{field}", value)
        if len(value.shape) != 1 or value.shape != stats.mean.shape:
            raise ValueError(f"{name}.{field} must have shape (C,), got {value.shape}")
