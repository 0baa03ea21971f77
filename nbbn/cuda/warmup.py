"""What `nbbn.warmup` does on a GPU: it runs the operations on arrays of usual shapes.

Which kernels an array needs depends on its shape; those of others are compiled at first use.
"""

import math
from collections.abc import Collection, Iterator

import numpy as np

from nbbn.arrays import ABSENT
from nbbn.cuda import target
from nbbn.cuda.run import Run
from nbbn.dtypes import FLOAT64, Storage
from nbbn.problem import Problem

# Channels, height and width of the layers of ResNet-50, which batches of images are cut like.
LAYERS = (
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28),
    (256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
)  # fmt: skip
BATCH = 32
DENSE = ((256, 512), (4096, 1024))
STATISTICS = 1 << 16  # bytes for those of a call


def _shapes() -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield shapes, and which axis the channels are on."""
    for channels, side in LAYERS:
        yield (BATCH, channels, side, side), 1
        yield (BATCH, side, side, channels), 3
    for shape in DENSE:
        yield shape, 1


def warm_up(device: str, storages: Collection[Storage], operations: Collection[str]) -> None:
    """Compile what the operations run on arrays of these types, or load it from the cache on disk."""
    if target.SIMULATED or not operations:
        return  # in the simulator nothing is compiled, and large arrays take hours
    largest = max(math.prod(shape) for shape, _ in _shapes())
    room = largest * max((s.dtype.itemsize for s in storages), default=0) + STATISTICS
    memory = target.Shared(room, int(device.partition(":")[2]), 0)
    for storage in storages:
        for shape, axis in _shapes():
            _run(device, memory.address, storage, shape, axis, operations)
    if "evaluation" in operations or "backward" in operations:
        # What a BatchNorm keeps is converted by evaluation, from and to float64.
        for storage in {*storages, FLOAT64}:
            for channels in (255, 256):
                _run(device, memory.address, storage, (1, channels), 1, ["evaluation"])


def _run(
    device: str,
    address: int,
    storage: Storage,
    shape: tuple[int, ...],
    axis: int,
    operations: Collection[str],
) -> None:
    strides = np.empty(shape, storage.dtype).strides

    def run(arrays: int) -> Run:
        return Run(Problem(shape, axis, (strides,) * arrays, storage, 1, device))

    # One array for all: what is in it does not matter.
    stats, x = address, address + STATISTICS
    some = stats, 8, 8
    if "training" in operations:
        run(1).stats(x, stats)
        run(2).forward(x, x, stats, ABSENT, ABSENT, ABSENT, ABSENT, 1e-5, 0.0, 1.0)
    if "evaluation" in operations:
        run(2).evaluate(x, x, ABSENT, ABSENT, some, some, 1e-5)
    if "backward" in operations:
        for training in (True, False):
            run(3).backward(x, x, x, stats, ABSENT, some, some, training)
