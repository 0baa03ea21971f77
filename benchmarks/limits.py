"""What the memory can do, past the caches, and the arithmetic units, on the threads that nbbn uses.

    python benchmarks/limits.py

prints how fast the memory is read, written and copied by one thread and by two, and while one reads
and another writes; and how many vectors they multiply and add. Two threads that do no more than one share
a core, whatever the system says of it.
"""

import statistics
import time
from collections.abc import Callable

import numba
import numpy as np

from nbbn.arrays import address
from nbbn.bench.limits import BLOCK, aligned, limits
from nbbn.compiler import entry, fma, kernel, pool
from nbbn.cpu.call import CALL, read
from nbbn.cpu.simd import LANES, fence, load, pointer, splat, store, stored_as, stream


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


@kernel
def multiply_only(first, last, at, real):
    """Multiply and add in registers, two of each for each vector of a block. Tasks: blocks."""
    call = read(at)
    scale = splat(real(call.slope))
    a = b = c = d = e = f = g = h = splat(real(1.0))
    for _ in range(first, last):
        a, b, c, d = fma(a, scale, scale), fma(b, scale, scale), fma(c, scale, scale), fma(d, scale, scale)
        e, f, g, h = fma(e, scale, scale), fma(f, scale, scale), fma(g, scale, scale), fma(h, scale, scale)
    store(pointer(call.out, real), first * BLOCK, a + b + c + d + e + f + g + h)


def way(name: str, x: np.ndarray, out: np.ndarray) -> Callable[[], None]:
    """Return a call of a kernel on all blocks of x and out."""
    record = np.zeros(1, CALL)
    record["x"], record["out"], record["slope"] = address(x), address(out), 0.5
    compiled = entry(name, stored_as("float32"))
    return lambda: pool.run(compiled, pool.threads(), x.size // BLOCK, address(record))


def main(size: int = 25 << 20, rounds: int = 21) -> None:
    x, out = aligned((size,)), aligned((size,))
    x[...] = 1
    out[...] = 1
    calls = {"copy": limits("copy", x, x, out)["streaming copy"]}
    calls |= {name: way(name, x, out) for name in (read_only, write_only, read_beside_write, multiply_only)}
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
        billionths = statistics.median(spent) * 1e9
        if name == multiply_only:
            what = f"{size / BLOCK * 8 / billionths:5.2f} billion vectors a second"
        else:
            what = f"{size * 4 * (2 if name == 'copy' else 1) / billionths:5.1f} GB/s read and written"
        print(f"{name:20} {threads} thread{'s' * (threads > 1):1}  {what}")


if __name__ == "__main__":
    main()
