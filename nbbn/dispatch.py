"""From a problem to the implementation that takes it: the first one in the list that supports it.

Each problem is answered once.
"""

import functools
import importlib
from functools import partial
from typing import Any

import numpy as np

from nbbn.compiler import undisturbed
from nbbn.dtypes import storage_of
from nbbn.errors import DeviceError
from nbbn.geometry import Strides
from nbbn.problem import BATCH, Form, Problem


@functools.cache
def cpu() -> Any:
    """Return nbbn.cpu.run: the kernels are only read when they are wanted."""
    return undisturbed(partial(importlib.import_module, "nbbn.cpu.run"))


def _cpu(problem: Problem) -> Any:
    return None if problem.device != "cpu" else cpu().Run(problem)


def _cuda(problem: Problem) -> Any:
    if not problem.device.startswith("cuda:"):
        return None
    from nbbn.cuda.target import why_not

    if (reason := why_not()) is not None:
        raise DeviceError(f"arrays on {problem.device} cannot be computed with: {reason}")
    from nbbn.cuda.run import Run

    return Run(problem)


IMPLEMENTATIONS = [_cpu, _cuda]


@functools.lru_cache(maxsize=1024)
def find(
    shape: tuple[int, ...],
    axis: int,
    strides: tuple[Strides, ...],
    dtype: np.dtype,
    threads: int,
    device: str = "cpu",
    form: Form = BATCH,
) -> Any:
    """Return what runs the stages of a problem, whose parts these are: see `nbbn.cpu.run.Run`.

    On a GPU its methods have one more argument, `stream`: the address of a CUstream.
    """
    storage = storage_of(dtype)
    assert storage is not None
    problem = Problem(shape, axis, strides, storage, threads, device, form)
    for implementation in IMPLEMENTATIONS:
        if (run := implementation(problem)) is not None:
            return run
    raise NotImplementedError(f"nothing here computes {problem}")
