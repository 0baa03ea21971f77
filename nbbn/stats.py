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
        own, others = _checked_count("self", self), _checked_count("other", other)
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other must have {self.mean.shape[0]} channels, got {other.mean.shape[0]}")
        if others == 0 or own == 0:
            return self if others == 0 else other
        count = own + others
        mean, rest, m2 = interpreted(formulas.merge)(
            float(own),
            self.mean,
            0.0,
            self.var * own,
            float(others),
            other.mean,
            0.0,
            other.var * others,
        )
        return BatchStats(count, mean + rest, m2 / count)


def _checked_count(name: str, stats: BatchStats) -> int:
    """Return the count, or raise if these are no statistics: a BatchStats can be made of anything."""
    count = arrays.integer(f"{name}.count", stats.count)
    arrays.number(f"{name}.count", count, 0.0, 2.0**63)
    shape = None
    for field in ("mean", "var"):
        value = getattr(stats, field)
        framework_of(f"{name}.{field}", value)
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name}.{field} must be an array without a mask, got a masked one")
        if isinstance(value, np.ndarray):
            arrays.checked(f"{name}.{field}", value)
        if not isinstance(getattr(value, "shape", None), tuple):
            raise TypeError(f"{name}.{field} must be an array with a shape, got {type(value).__name__}")
        if len(value.shape) != 1 or shape not in (None, value.shape):
            raise ValueError(
                f"{name}.{field} must have shape (C,), as mean and var both have, got {value.shape}"
            )
        shape = value.shape
    return count
