"""What `nbbn.warmup` does on a GPU: it runs the operations on arrays that between them need all kernels.

Those for arrays without gaps, that is; others are compiled at first use.
"""

from collections.abc import Collection, Iterator

import numpy as np

from nbbn.arrays import ABSENT
from nbbn.cuda import target
from nbbn.cuda.run import Run
from nbbn.dtypes import FLOAT64, Storage
from nbbn.problem import Problem

# Channels and bytes of a channel: one that stays in shared memory, of each number of threads; that several
# blocks share; and that is too large for that.
ROWS = ((256, 4 << 10), (256, 16 << 10), (256, 66 << 10), (4, 384 << 10), (1, 24 << 20))
# Values of each of so many channels side by side: few, and many parts.
COLUMNS = ((256, 64), (256, 8192))
LARGEST = 24 << 20  # bytes of an array


def _shapes(size: int) -> Iterator[tuple[int, ...]]:
    """Yield shapes, with the channels on axis 1, of elements of so many bytes."""
    # Whole vectors, half ones of elements of 16 bits, and none.
    for odd in (0, 1) if size > 2 else (0, 4, 1):
        for channels, nbytes in ROWS:
            yield 3, channels, nbytes // size // 24 * 8 - odd
        for channels, count in COLUMNS:
            yield count, channels - odd


def warm_up(device: str, storages: Collection[Storage], operations: Collection[str]) -> None:
    """Compile what the operations run on arrays of these types, or load it from the cache on disk."""
    if target.SIMULATED or not operations:
        return  # in the simulator nothing is compiled, and large arrays take hours
    memory = target.Shared(LARGEST + (1 << 16), int(device.partition(":")[2]), 0)
    for storage in storages:
        for shape in _shapes(storage.dtype.itemsize):
            _run(device, memory.address, storage, shape, operations)
    if "evaluation" in operations or "backward" in operations:
        # What a BatchNorm keeps is converted by evaluation, from and to float64.
        for storage in {*storages, FLOAT64}:
            for channels in (255, 256):
                _run(device, memory.address, storage, (1, channels), ["evaluation"])


def _run(
    device: str, address: int, storage: Storage, shape: tuple[int, ...], operations: Collection[str]
) -> None:
    strides = np.empty(shape, storage.dtype).strides

    def run(arrays: int) -> Run:
        return Run(Problem(shape, 1, (strides,) * arrays, storage, 1, device))

    # One array for all: what is in it does not matter.
    x, stats = address, address + LARGEST
    some = stats, 8, 8
    if "training" in operations:
        run(1).stats(x, stats, 0)
        run(2).forward(x, x, stats, ABSENT, ABSENT, ABSENT, ABSENT, 1e-5, 0.0, 1.0, (), 0)
    if "evaluation" in operations:
        run(2).evaluate(x, x, ABSENT, ABSENT, some, some, 1e-5, 0)
    if "backward" in operations:
        for training in (True, False):
            run(3).backward(x, x, x, stats, ABSENT, some, some, training, 0)
