"""All that is known of a call before the numbers are."""

from typing import NamedTuple

from nbbn.dtypes import Storage
from nbbn.geometry import Strides


class Problem(NamedTuple):
    """What does not change from one call to the next on arrays of one kind.

    Attributes
    ----------
    shape : tuple of int
        Of all arrays; no dimension is 0.
    axis : int
        The channel axis.
    strides : tuple of tuple of int
        In bytes, of each array: x; x and out; or x, grad_out and out.
    storage : Storage
        Of all arrays.
    threads : int
        How many may work on it. Never changes the result.
    device : str
        Where the arrays lie: "cpu" or "cuda:N".
    """

    shape: tuple[int, ...]
    axis: int
    strides: tuple[Strides, ...]
    storage: Storage
    threads: int
    device: str = "cpu"
