"""The machine's own limit: a copy and a triad past the caches, on the threads that nbbn uses."""


import numpy as np

from nbbn.arrays import address
from nbbn.compiler import entry, kernel, pool
from nbbn.cpu.call import CALL, read
from nbbn.cpu.simd import LANES, STREAM_BYTES, fence, load, pointer, stream

BLOCK = 4096  # elements of a task


@kernel
def copy(first, last, at, real):
    """out = x. Tasks: blocks."""
    call = read(at)
    x = pointer(call.x, real)
    out = pointer(call.out, real)
    for i in range(first * BLOCK, last * BLOCK, 4 * LANES):
        for j in range(i, i + 4 * LANES, LANES):
            stream(out, j, load(x, j))
    fence()


@kernel
def triad(first, last, at, real):
    """out = x + grad_out, two reads and a write. Tasks: blocks."""
    call = read(at)
    x = pointer(call.x, real)
    y = pointer(call.grad_out, real)
    out = pointer(call.out, real)
    for i in range(first * BLOCK, last * BLOCK, 4 * LANES):
        for j in range(i, i + 4 * LANES, LANES):
            stream(out, j, load(x, j) + load(y, j))
    fence()


class Limit:
    """A call of `copy` or `triad` on arrays of one size, aligned to 64 bytes."""

    def __init__(self, name: str, out: np.ndarray, x: np.ndarray, y: np.ndarray | None = None) -> None:
        if address(out) % STREAM_BYTES or x.size % BLOCK:
            raise ValueError(f"out must lie on a cache line and have a multiple of {BLOCK} elements")
        record = np.zeros(1, CALL)
        record["x"], record["out"] = address(x), address(out)
        record["grad_out"] = 0 if y is None else address(y)
        self._record = record
        self._arrays = out, x, y
        self._kernel = entry(name, x.dtype.type)
        self._tasks = x.size // BLOCK

    def __call__(self) -> None:
        at = self._record.ctypes.data
        threads = pool.threads()
        if threads == 1:
            self._kernel.run(0, self._tasks, at)
        else:
            pool.run(self._kernel, threads, self._tasks, at)
