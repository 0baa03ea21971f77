"""BatchStats: what is known of a set of values per channel, and how two such sets are pooled."""

import contextlib
import os
from typing import IO, Any, NamedTuple

import numpy as np

from nbbn import arrays, formulas
from nbbn.columns import columns_on
from nbbn.compiler import interpreted
from nbbn.dtypes import widened
from nbbn.frameworks import CPU, Array, framework_of


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
            If `other` is not a BatchStats, or its arrays are not such, or of another kind, or without
            arithmetic.
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
        if framework_of("other.mean", other.mean) is not framework_of("self.mean", self.mean):
            raise TypeError(
                f"other must have arrays of these statistics' kind, {type(self.mean).__name__}, got "
                f"{type(other.mean).__name__}: copy one of them to the other's kind"
            )
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other must have {self.mean.shape[0]} channels, got {other.mean.shape[0]}")
        if others == 0 or own == 0:
            return self if others == 0 else other
        count = own + others
        a, b = _widened(self), _widened(other)
        mean, rest, between = interpreted(formulas.pooled)(
            float(own), a.mean, 0.0, float(others), b.mean, 0.0
        )
        return BatchStats(count, mean + rest, (a.var * own + b.var * others + between) / count)

    def save(self, file: "str | os.PathLike[str] | IO[bytes]") -> None:
        """Write these statistics to a file, in the format of ``numpy.savez``.

        Parameters
        ----------
        file : str, path or binary file
            Where to: a name, which is taken as it is, or a file that is open for writing.

        Raises
        ------
        TypeError, ValueError
            If these are no statistics that `load` would take. Nothing has been written then.

        Examples
        --------
        >>> import pathlib, tempfile
        >>> import numpy as np, nbbn
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "stats.npz"
        >>> nbbn.batch_stats(np.array([[1.0, 10.0], [3.0, 30.0]])).save(path)
        >>> nbbn.BatchStats.load(path)
        BatchStats(count=2, mean=array([ 2., 20.]), var=array([  1., 100.]))
        """
        own = on_host("self", self)
        _checked_count("self", own)
        if own.count >= 2**63:
            raise ValueError(f"self.count must be less than 2**63, got {own.count}")
        if (own.var < 0).any():
            raise ValueError("self.var must be at least 0, got negative numbers")
        mean, var = (np.asarray(column, np.float64) for column in own[1:])
        with _opened(file, "wb") as opened:
            np.savez(opened, count=np.int64(own.count), mean=mean, var=var)

    @classmethod
    def load(cls, file: "str | os.PathLike[str] | IO[bytes]") -> "BatchStats":
        """Return statistics that `save` has written.

        Parameters
        ----------
        file : str, path or binary file
            A name, or a file that is open for reading.

        Returns
        -------
        BatchStats
            ``mean`` and ``var`` are NumPy arrays, whatever they were when they were saved.

        Raises
        ------
        OSError
            If there is no such file, or it cannot be read.
        ValueError
            If it is not such a file, or what it has are no statistics. Nothing in it is executed.
        """
        try:
            with _opened(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
                found = {name: archive[name] for name in archive.files}
        except OSError:
            raise
        except Exception as error:  # whatever zipfile, zlib and NumPy's parser raise of what is no such file
            raise ValueError("file must be an .npz file that BatchStats.save wrote, got another") from error
        found = {name: array for name, array in found.items() if isinstance(array, np.ndarray)}
        if sorted(found) != ["count", "mean", "var"]:
            raise ValueError(
                f"file must have count, mean and var, as BatchStats.save wrote them, got {list(found)}"
            )
        count = found["count"]
        if count.shape != () or count.dtype.kind not in "iu" or not 0 <= count < 2**63:
            raise ValueError(f"file must have an int in [0, 2**63) as count, got {count!r}")
        for name in ("mean", "var"):
            if found[name].dtype.kind != "f" or found[name].dtype.itemsize > 8:
                raise ValueError(f"file must have float64 numbers as {name}, got dtype {found[name].dtype}")
            if found[name].ndim != 1 or found[name].shape != found["mean"].shape:
                raise ValueError(
                    f"file must have a number per channel as mean and as var, got shapes "
                    f"{found['mean'].shape} and {found['var'].shape}"
                )
        if (found["var"] < 0).any():
            raise ValueError("file must have numbers that are at least 0 as var, got negative ones")
        return cls(int(count), found["mean"].astype(np.float64), found["var"].astype(np.float64))


def _opened(
    file: "str | os.PathLike[str] | IO[bytes]", mode: str
) -> "contextlib.AbstractContextManager[Any]":
    """Open a file by its name as it is; numpy.savez would add to it, and numpy.load leave a bad file open."""
    return open(file, mode) if isinstance(file, (str, os.PathLike)) else contextlib.nullcontext(file)


def on_host(name: str, stats: BatchStats) -> BatchStats:
    """Return statistics with NumPy arrays: their own, or float64 copies of others."""

    def copied(field: str, column: Array) -> np.ndarray:
        if isinstance(column, np.ndarray):
            return column
        framework = framework_of(f"{name}.{field}", column)
        device = framework.device(f"{name}.{field}", column)
        if device != CPU:
            column = columns_on(device).host(column)
        else:
            column = framework.read(f"{name}.{field}", column, None)
        return np.array(column, np.float64)

    return BatchStats(stats.count, copied("mean", stats.mean), copied("var", stats.var))


def _widened(stats: BatchStats) -> BatchStats:
    """Return statistics whose NumPy arrays are of float64: of 16 bits, a sum of squares could overflow."""
    mean, var = (widened(a) if isinstance(a, np.ndarray) else a for a in stats[1:])
    return BatchStats(stats.count, mean, var)


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
