"""What is timed: one operation on one shape, and the arrays that every contender reads and writes."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nbbn.bench.limits import aligned
from nbbn.bench.oracle import Oracle
from nbbn.bench.shapes import Shape, written
from nbbn.dtypes import BFLOAT16, STORAGES

MODES = ("forward", "evaluation", "backward")
LAYOUTS = ("channels-first", "channels-last")
DTYPES = tuple(storage.name for storage in STORAGES)
EPS = float(np.float32(1e-5))  # as ONNX has it, whatever the arrays are of
MOMENTUM = 0.1


def numpy_dtype(name: str) -> np.dtype:
    """Return NumPy's type of a name in `DTYPES`; bfloat16 is that of the package ml_dtypes."""
    if name == BFLOAT16.name:
        import ml_dtypes

        found: np.dtype = np.dtype(ml_dtypes.bfloat16)
        return found
    return np.dtype(name)


class Data:
    """Arrays of one shape, for all modes.

    Parameters
    ----------
    shape : tuple of int
        Channels second.
    layout : str
        One of `LAYOUTS`: the order in memory.
    dtype : str
        That of x, grad_out and out. Parameters and running statistics are float32, of float64 float64.
    seed : int
    output : bool
        Whether there is an array for results.
    """

    def __init__(self, shape: Shape, layout: str, dtype: str, seed: int, output: bool = True) -> None:
        self.shape, self.layout, self.name = shape, layout, dtype
        self.dtype = numpy_dtype(dtype)
        # A dense layer, batch and channels, is of both layouts.
        self.last = layout == "channels-last" and len(shape) > 2
        stored = (shape[0], *shape[2:], shape[1]) if self.last else shape
        self.axis = len(shape) - 1 if self.last else 1
        rng = np.random.default_rng(seed)
        self.x, self.grad_out = aligned(stored, self.dtype), aligned(stored, self.dtype)
        for array in (self.x, self.grad_out):
            array[...] = rng.standard_normal(stored, np.float32)
        self.out = aligned(stored, self.dtype) if output else None
        own = np.float64 if self.dtype == np.float64 else np.float32
        channels = shape[1]
        self.weight, self.bias, self.running_mean = rng.standard_normal((3, channels)).astype(own)
        self.running_var = rng.uniform(0.5, 2.0, channels).astype(own)

    @cached_property
    def oracle(self) -> Oracle:
        """What the results should be."""
        return Oracle(
            self.x, self.axis, EPS, MOMENTUM,
            grad_out=self.grad_out, weight=self.weight, bias=self.bias,
            running_mean=self.running_mean, running_var=self.running_var,
        )  # fmt: skip

    @property
    def parameters(self) -> tuple[np.ndarray, ...]:
        """A copy of the running statistics, which calls update, and weight and bias."""
        return self.running_mean.copy(), self.running_var.copy(), self.weight, self.bias


@dataclass(frozen=True)
class Case:
    """One operation on one shape.

    Attributes
    ----------
    mode : str
        One of `MODES`. ``forward`` and ``backward`` are those of training.
    """

    mode: str
    layout: str
    dtype: str
    shape: Shape

    @property
    def heading(self) -> str:
        """Where it belongs."""
        return f"{self.mode}, {self.layout}, {self.dtype}"

    @property
    def text(self) -> str:
        """What it is."""
        return f"{self.heading}, {written(self.shape)}"

    @property
    def itemsize(self) -> int:
        """Bytes of a value."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def arrays(self) -> int:
        """How many of the large arrays are read or written at least."""
        return 3 if self.mode == "backward" else 2

    @property
    def nbytes(self) -> int:
        """Bytes that must move: x, and grad_out, are read once, and the result is written once."""
        return self.arrays * math.prod(self.shape) * self.itemsize
