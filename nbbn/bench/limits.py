"""The machine's own limit: how fast its memory is read and written by whoever does nothing else.

A forward pass reads an array and writes one, and so does a copy; a backward pass reads two and writes one,
and so does a triad, out = x + y. Both run here on the threads that nbbn uses, past the caches or through
them, whichever is faster on arrays of that size.
"""

from collections.abc import Callable

import numpy as np

from nbbn.arrays import address
from nbbn.compiler import entry, kernel, pool
from nbbn.cpu.call import CALL, read
from nbbn.cpu.simd import LANES, fence, load, pointer, store, stored_as, stream

BLOCK = 4 * LANES  # elements of a task
GRAIN = 256  # bytes that an array's size must be a multiple of: a block of float32
LARGE = 100 << 20  # bytes that the caches do not hold


@kernel
def copy(first, last, at, real):
    """out = x. Tasks: blocks."""
    call = read(at)
    x = pointer(call.x, real)
    out = pointer(call.out, real)
    streams = call.stream
    for i in range(first * BLOCK, last * BLOCK, 4 * LANES):
        for j in range(i, i + 4 * LANES, LANES):
            if streams:
                stream(out, j, load(x, j))
            else:
                store(out, j, load(x, j))
    fence()


@kernel
def triad(first, last, at, real):
    """out = x + grad_out. Tasks: blocks."""
    call = read(at)
    x = pointer(call.x, real)
    y = pointer(call.grad_out, real)
    out = pointer(call.out, real)
    streams = call.stream
    for i in range(first * BLOCK, last * BLOCK, 4 * LANES):
        for j in range(i, i + 4 * LANES, LANES):
            if streams:
                stream(out, j, load(x, j) + load(y, j))
            else:
                store(out, j, load(x, j) + load(y, j))
    fence()


ARRAYS = {copy: 2, triad: 3}
"""How many arrays are read and written."""


def aligned(shape: tuple[int, ...], dtype: np.dtype | type = np.float32) -> np.ndarray:
    """Return an array on a cache line, its pages touched, with `GRAIN` bytes that are whole behind it."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.full(size + GRAIN + 64, 0, np.uint8)  # np.zeros touches nothing
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


def limits(name: str, x: np.ndarray, y: np.ndarray, out: np.ndarray) -> dict[str, Callable[[], None]]:
    """Return the ways of copying, or of adding, arrays made by `aligned`, on as many threads as are set.

    Parameters
    ----------
    name : {"copy", "triad"}
    x, y : array
        What is read; `y` by the triad only.
    out : array
        What is written.
    """
    compiled = entry(name, stored_as("float32"))
    tasks = -(-x.nbytes // GRAIN)

    def way(stream: bool, alone: bool) -> Callable[[], None]:
        record = np.zeros(1, CALL)
        record["x"], record["grad_out"], record["out"] = address(x), address(y), address(out)
        record["stream"] = stream
        held = record, x, y, out  # the record has no more than their addresses

        def call() -> None:
            pool.run(compiled, 1 if alone else pool.threads(), tasks, address(held[0]))

        return call

    return {
        f"streaming {name}": way(stream=True, alone=False),
        f"cached {name}": way(stream=False, alone=False),
        # Of arrays so small that waking the others takes longer.
        f"cached {name}, one thread": way(stream=False, alone=True),
    }
