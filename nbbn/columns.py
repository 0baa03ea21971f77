"""Columns: what modules keep, parameters and statistics, in NumPy arrays or, on a GPU, Numba's device arrays.

They are of one number a channel, or a parameter for each element of one, in the shape that it has.
"""

import importlib
import math
import re
from typing import Any

import numpy as np

from nbbn.arrays import ABSENT, Parameter, address
from nbbn.dispatch import find
from nbbn.dlpack import NO_ORDER
from nbbn.dtypes import BFLOAT16, FLOAT64, NAMES, narrowed, storage_of, widened
from nbbn.errors import DeviceError
from nbbn.frameworks import CPU, NUMBA_CUDA, Place, read


class Columns:
    """Makes, reads and writes columns; here on the CPU."""

    device = CPU

    def new(self, values: np.ndarray) -> Any:
        """Return a new column of these values."""
        return np.array(values)

    def view(self, name: str, column: Any) -> np.ndarray:
        """Return a view of a column, which may be anything that was put in the place of one."""
        return column if isinstance(column, np.ndarray) else read(name, column, None)

    def checked(self, name: str, column: Any, shape: tuple[int, ...], written: bool = True) -> np.ndarray:
        """Return a view of a column, or raise: if it has another shape, or is to be written and cannot be."""
        view = self.view(name, column)
        if storage_of(view.dtype) is None:
            raise TypeError(f"{name} of this module must be {NAMES}, got dtype {view.dtype}")
        if view.shape != shape:
            raise ValueError(f"{name} of this module must have shape {shape}, got {view.shape}")
        if written and not view.flags.writeable:
            raise ValueError(f"{name} of this module must be writable, got a read-only array")
        return view

    def host(self, column: Any) -> np.ndarray:
        """Return a copy in the memory of the host."""
        return np.array(self.view("column", column))

    def snapshot(self, column: Any) -> Any:
        """Return a column that no other thread changes meanwhile, where this is NumPy's."""
        return column.copy() if isinstance(column, np.ndarray) else column

    def write(self, column: Any, values: np.ndarray) -> None:
        """Set a column."""
        self.view("column", column)[...] = values

    def copied(self, column: Any, here: Place) -> Any:
        """Return a copy that a call at a place can work on."""
        return self.host(column)

    def assign(self, column: Any, source: Any, here: Place) -> None:
        """Set a column to what `copied` returned."""
        column[...] = source

    def numbers(self, rows: np.ndarray, here: Place) -> np.ndarray:
        """Return the float64 result of a call in the memory of the host."""
        return rows

    def constants(self, mean: Any, var: Any, eps: float, here: Place) -> tuple[Any, Any]:
        """Return a mean, and invstd = 1 / sqrt(var + eps), that do not change when `mean` and `var` do."""
        invstd = widened(self.view("running_var", var))
        invstd += eps
        with np.errstate(divide="ignore", invalid="ignore"):
            np.divide(1.0, np.sqrt(invstd, out=invstd), out=invstd)
        return widened(self.view("running_mean", mean)), invstd

    def rounded(self, rows: np.ndarray, row: int, dtype: np.dtype, here: Place) -> Any:
        """Return a row of the float64 result of a call as a column of another type."""
        return narrowed(rows[row], dtype)


class CudaColumns(Columns):
    """Makes, reads and writes columns on a GPU.

    What is computed with them there is batch normalization, of one row of zeros or ones in evaluation:
    out = (x - mean) / sqrt(var + eps) + bias, with a mean of 0.
    """

    def __init__(self, index: int) -> None:
        self.device = f"cuda:{index}"
        self._index = index
        self._filled: dict[tuple[int, float, np.dtype], Any] = {}

    def new(self, values: np.ndarray) -> Any:  # noqa: D102
        if storage_of(values.dtype) is BFLOAT16:
            raise TypeError(
                f"dtype must be float32, float64 or float16 for parameters on {self.device}, which are Numba "
                "device arrays, got bfloat16; inputs of bfloat16 go with parameters of float32"
            )
        return NUMBA_CUDA.on_gpu(np.asarray(values), self._index)

    def view(self, name: str, column: Any) -> np.ndarray:  # noqa: D102
        return NUMBA_CUDA.read(name, column, NO_ORDER)

    def host(self, column: Any) -> np.ndarray:  # noqa: D102
        cuda = importlib.import_module("numba.cuda")
        with cuda.gpus[self._index]:
            cuda.synchronize()  # a call on any stream may have written to it last
            return np.array(_device_array(column).copy_to_host())

    def write(self, column: Any, values: np.ndarray) -> None:  # noqa: D102
        cuda = importlib.import_module("numba.cuda")
        with cuda.gpus[self._index]:
            cuda.synchronize()
            _device_array(column).copy_to_device(values)

    def copied(self, column: Any, here: Place) -> Any:  # noqa: D102
        dtype = self.view("column", column).dtype
        return self._evaluate(0.0, dtype, column.shape, self._parameter(column), ABSENT, 0.0, here)

    def assign(self, column: Any, source: Any, here: Place) -> None:  # noqa: D102
        out = self.view("column", column)
        self._evaluate(0.0, out.dtype, out.shape, self._parameter(source), ABSENT, 0.0, here, out)

    def numbers(self, rows: np.ndarray, here: Place) -> np.ndarray:  # noqa: D102
        double = np.dtype(np.float64)
        return np.stack([self.host(self.rounded(rows, k, double, here)) for k in range(len(rows))])

    def constants(self, mean: Any, var: Any, eps: float, here: Place) -> tuple[Any, Any]:  # noqa: D102
        double = np.dtype(np.float64)
        kept = self._evaluate(0.0, double, mean.shape, self._parameter(mean), ABSENT, 0.0, here)
        invstd = self._evaluate(1.0, double, mean.shape, ABSENT, self._parameter(var), eps, here)
        return kept, invstd

    def rounded(self, rows: np.ndarray, row: int, dtype: np.dtype, here: Place) -> Any:  # noqa: D102
        values = address(rows) + row * rows.strides[0], rows.itemsize, FLOAT64.code  # in C order
        return self._evaluate(0.0, dtype, rows.shape[1:], values, ABSENT, 0.0, here)

    def _parameter(self, column: Any) -> Parameter:
        view = self.view("column", column)
        storage = storage_of(view.dtype)
        assert storage is not None
        return address(view), view.strides[0], storage.code

    def _evaluate(
        self,
        x: float,
        dtype: np.dtype,
        shape: tuple[int, ...],
        bias: Parameter,
        var: Parameter,
        eps: float,
        here: Place,
        into: np.ndarray | None = None,
    ) -> Any:
        """Return the normalized row of as many times x, with variance 1 if it is ABSENT, in a shape.

        It is a new one, or goes `into` a view of a column of that type.
        """
        channels = math.prod(shape)
        strides = written = (channels * dtype.itemsize, dtype.itemsize)
        if into is not None:
            written = (channels * dtype.itemsize, into.strides[0])
        run = find((1, channels), 1, (strides, written), dtype, 1, self.device)
        row = self._constant(channels, x, dtype)
        zeros = self._constant(channels, 0.0, dtype)
        ones = self._constant(channels, 1.0, dtype)
        if into is None:
            steps = tuple(dtype.itemsize * math.prod(shape[d + 1 :]) for d in range(len(shape)))
            out, at = NUMBA_CUDA.empty(shape, steps, dtype, self._index)
        else:
            out, at = into, address(into)
        var = self._parameter(ones) if var is ABSENT else var
        run.evaluate(
            self._parameter(row)[0], at, ABSENT, bias, self._parameter(zeros), var, eps, stream=here.stream
        )  # fmt: skip
        return out

    def _constant(self, channels: int, value: float, dtype: np.dtype) -> Any:
        key = channels, value, dtype
        if key not in self._filled:
            self._filled[key] = self.new(np.full(channels, value, dtype))
        return self._filled[key]


def _device_array(column: Any) -> Any:
    """Return a column, which may be anything that was put in the place of one, as an array of Numba's."""
    if NUMBA_CUDA.owns(column):
        return column
    return importlib.import_module("numba.cuda").as_cuda_array(column)


def columns_on(device: Any) -> Columns:
    """Return what makes columns on "cpu", "cuda" or "cuda:N", or raise."""
    if not isinstance(device, str):
        raise TypeError(f"device must be a str, got {type(device).__name__}")
    if device == CPU:
        return Columns()
    if re.fullmatch("cuda(:[0-9]+)?", device) is None:
        raise DeviceError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}")
    from nbbn.cuda.target import SIMULATED, why_not

    if (reason := why_not()) is not None:
        raise DeviceError(f"device {device!r} is not to be had: {reason}")
    cuda = importlib.import_module("numba.cuda")
    count = 1 if SIMULATED else len(cuda.gpus)
    index = int(device[5:] or (0 if SIMULATED else cuda.get_current_device().id))
    if index >= count:
        raise DeviceError(f"device {device!r} is not to be had: the number of GPUs here is {count}")
    return CudaColumns(index)
