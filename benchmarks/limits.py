"""The machine's own limit: a copy and a triad past the caches, on the threads that nbbn uses.

    python benchmarks/limits.py

prints how fast the memory is read, written and copied by one thread and by two, and while one reads
and another writes.
"""

import math
import statistics
import time
from typing import Any

import numba
import numpy as np

from nbbn.arrays import address
from nbbn.compiler import entry, kernel, pool
from nbbn.cpu.call import CALL, read
from nbbn.cpu.simd import ELEMENTS, LANES, STREAM_BYTES, fence, load, pointer, splat, store, stream

BLOCK = 4096  # elements of a task


def aligned(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Return an array on a cache line, its pages touched, as PyTorch's allocator would give it."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    memory = np.zeros(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


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


@kernel
def read_only(first, last, at, real):
    """Read x. Tasks: blocks."""
    call = read(at)
    x = pointer(call.x, real)
    a = splat(real(0.0))
    b = splat(real(0.0))
    for j in range(first * BLOCK, last * BLOCK, 2 * LANES):
        a = a + load(x, j)
        b = b + load(x, j + LANES)
    store(pointer(call.out, real), first * BLOCK, a + b)  # or nothing would be read


@kernel
def write_only(first, last, at, real):
    """Write out. Tasks: blocks."""
    out = pointer(read(at).out, real)
    one = splat(real(1.0))
    for j in range(first * BLOCK, last * BLOCK, LANES):
        stream(out, j, one)
    fence()


@kernel
def read_beside_write(first, last, at, real):
    """Read x in the first half of the tasks, write out in the second: a thread each. Tasks: blocks."""
    call = read(at)
    x = pointer(call.x, real)
    out = pointer(call.out, real)
    total = splat(real(0.0))
    if first == 0:
        for j in range(first * BLOCK, last * BLOCK, LANES):
            total = total + load(x, j)
        store(out, first * BLOCK, total)
    else:
        for j in range(first * BLOCK, last * BLOCK, LANES):
            stream(out, j, total)
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
        self._kernel = entry(name, ELEMENTS[x.dtype.name])
        self._tasks = x.size // BLOCK

    def __call__(self) -> None:
        at = self._record.ctypes.data
        threads = pool.threads()
        if threads == 1:
            self._kernel.run(0, self._tasks, at)
        else:
            pool.run(self._kernel, threads, self._tasks, at)


def main(size: int = 25 << 20, rounds: int = 21) -> None:
    x, out = aligned((size,)), aligned((size,))
    x[...] = 1
    calls = {name: Limit(name, out, x) for name in (copy, read_only, write_only, read_beside_write)}
    pool.start()
    most = min(2, numba.get_num_threads())
    cases = [(name, threads) for name in calls for threads in range(1, most + 1)]
    cases.remove((read_beside_write, 1))
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for name, threads in cases:
            numba.set_num_threads(threads)
            calls[name]()
            begin = time.perf_counter()
            calls[name]()
            times[name, threads].append(time.perf_counter() - begin)
    for (name, threads), spent in times.items():
        moved = size * 4 * (2 if name == copy else 1) / statistics.median(spent) / 1e9
        print(f"{name:20} {threads} thread{'s' * (threads > 1):1}  {moved:5.1f} GB/s read and written")


if __name__ == "__main__":
    main()
