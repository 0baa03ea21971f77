"""Statistics of more values than fit in memory: those of batch after batch, pooled."""

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nbbn import arrays, formulas
from nbbn.compiler import interpreted
from nbbn.errors import DeviceError
from nbbn.frameworks import FRAMEWORKS, Array, kind_of
from nbbn.functional import batch_stats
from nbbn.stats import BatchStats, on_host


def population_stats(batches: Iterable[Array], *, axis: int = 1, progress: bool = False) -> BatchStats:
    """Count, mean and biased variance of each channel over all values of many batches.

    Those of one batch after the other are pooled as `BatchStats.merge` does it [2]_: with n_a values of mean
    mean_a so far, n_b in the batch, n = n_a + n_b and delta = mean_b - mean_a::

        mean = mean_a + delta · n_b / n
        var  = (n_a · var_a + n_b · var_b + delta² · n_a · n_b / n) / n

    What rounding loses is carried along, so that the result is, to rounding, that of all values at once,
    however many batches there are. Their sizes do not matter.
    This is the population that algorithm 2 of the paper [1]_ has in mind; `BatchNorm.calibrate` takes the
    running statistics from it.

    Parameters
    ----------
    batches : iterable of array
        Each one as `batch_stats` takes it, and all with as many channels. It is gone through once, and no
        batch is kept.
    axis : int, default 1
        The channel axis of every batch, of length C.
    progress : bool, default False
        Whether to show a progress bar on stderr. It needs the package rich.

    Returns
    -------
    BatchStats
        ``count`` (int), ``mean`` and ``var``: NumPy arrays of float64, shape (C,), wherever the batches are.
        So for batches on a GPU the host waits for one after the other. If all batches are empty, all three
        are 0.

    Raises
    ------
    TypeError
        If `batches` is not an iterable of arrays, or is a single array; or `axis` is not an int, or
        `progress` not a bool.
    ValueError
        If there are no batches, or one has fewer than two dimensions, or another number of channels than
        those before it. Errors name the batch: ``batches[2]`` is the third.
    nbbn.DeviceError
        If a batch is on a device that cannot be computed with.
    ModuleNotFoundError
        If there is to be a progress bar, and no rich.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, arXiv 1502.03167, algorithm 2.
    .. [2] T. F. Chan, G. H. Golub and R. J. LeVeque, "Updating formulae and a pairwise algorithm for
       computing sample variances", 1979.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> data = np.array([[1.0, 10.0], [3.0, 30.0], [8.0, 80.0]])
    >>> stats = nbbn.population_stats(data[k : k + 2] for k in range(0, 3, 2))
    >>> stats.count, stats.mean
    (3, array([ 4., 40.]))
    """
    return pooled(batches, axis, progress)[0]


def pooled(
    batches: Iterable[Any], axis: Any, progress: Any, features: int | None = None
) -> tuple[BatchStats, int]:
    """Return the statistics of all batches, and how many of these were not empty, or raise.

    `features` is how many channels they must have, if it is known ahead.
    """
    merge = interpreted(formulas.merge)
    axis = arrays.integer("axis", axis)
    progress = arrays.flag("progress", progress)
    if any(framework.owns(batches) for framework in FRAMEWORKS):
        # Its items along axis 0 would have another channel axis.
        raise TypeError(
            f"batches must be an iterable of arrays, got one array ({kind_of(batches)}): give [x]"
        )
    try:
        rest = iter(batches)
    except TypeError:
        raise TypeError(f"batches must be an iterable of arrays, got {kind_of(batches)}") from None
    first, count, used = None, 0, 0
    known: Any = None
    with _bar(batches) if progress else contextlib.nullcontext(_no_step) as step:
        for k, x in enumerate(rest):
            stats = _of_batch(f"batches[{k}]", x, axis)
            channels = stats.mean.shape[0]
            if features is None:
                features = channels
            elif channels != features:
                raise ValueError(
                    f"batches[{k}] must have {features} channels on axis {axis}, got {channels} "
                    f"(shape {tuple(x.shape)})"
                )
            if used == 0 and (first is None or stats.count > 0):
                first = stats
            if stats.count > 0:
                its = stats.mean, 0.0, stats.var * stats.count, 0.0
                known = its if used == 0 else merge(float(count), known, float(stats.count), its)
                count += stats.count
                used += 1
            step()
    if first is None:
        raise ValueError("batches must have at least one array, got none")
    if used <= 1:
        return first, used
    mean, rest, m2, lost = known
    return BatchStats(count, mean + rest, (m2 + lost) / count), used


def _of_batch(name: str, x: Any, axis: int) -> BatchStats:
    """Return the statistics of a batch in NumPy's arrays, or raise what says which batch it is."""
    try:
        return on_host("stats", batch_stats(x, axis=axis))
    except (DeviceError, TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _no_step() -> None:
    pass


@contextlib.contextmanager
def _bar(batches: Iterable[Any]) -> Iterator[Callable[[], None]]:
    """Show a progress bar; give what moves it on by one batch."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'progress=True needs the package rich, which is not installed: pip install "rich>=13"',
            name=error.name,
        ) from None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        # A length that is not known is 0 to length_hint, and None to rich.
        bar = bars.add_task("batches", total=operator.length_hint(batches) or None)
        yield lambda: bars.advance(bar)
