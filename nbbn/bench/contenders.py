"""Who is timed: nbbn on each of its paths, and the libraries that do the same.

A contender says what it needs installed, and prepares a call on a case's arrays. A new one: a class, and
its place in `PEERS` (`nbbn.bench.peers`).
"""

import importlib.metadata
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np

import nbbn
from nbbn.bench.cases import EPS, MOMENTUM, Case, Data, numpy_dtype
from nbbn.bench.oracle import Arrays
from nbbn.cuda import target

PATHS = ("serial", "parallel", "cuda")
"""nbbn on one thread of the CPU, on several, and on a GPU."""


class Unsupported(Exception):
    """What a contender cannot do; says why."""


class WrongAnswer(Exception):
    """What is wrong with a contender's answer."""


@dataclass(frozen=True)
class Group:
    """Those that are compared with each other: one path, and as many threads for everybody."""

    path: str
    threads: int

    @property
    def cuda(self) -> bool:
        """Whether it is about GPUs."""
        return self.path == "cuda"

    @property
    def text(self) -> str:
        """What it is."""
        return f"parallel, {self.threads} threads" if self.path == "parallel" else self.path


def nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Prepared:
    """What does a case once.

    Attributes
    ----------
    call : callable
        Does it, and returns whatever it returns.
    read : callable
        Takes what `call` returned, and returns the results as NumPy arrays by name: those that
        `nbbn.bench.oracle.Oracle.fault` knows, the large ones in the order of memory.
    wait : callable
        Waits for what `call` has begun.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Arrays]
    wait: Callable[[], None] = nothing


class Contender(ABC):
    """Someone who is timed.

    Attributes
    ----------
    name : str
        As on the command line and in tables.
    packages : tuple of str
        What must be installed; the first one's version is told.
    threaded : bool
        Whether it makes a difference how many threads there are.
    """

    name: str
    packages: tuple[str, ...]
    threaded = True

    def missing(self) -> str | None:
        """Return the package that is needed and not installed."""
        return next((p for p in self.packages if importlib.util.find_spec(p) is None), None)

    def version(self) -> str:
        """Return the version that is timed."""
        return importlib.metadata.version(self.packages[0])

    def enter(self, group: Group) -> None:
        """Set what the process has only one of, such as the number of threads."""
        return None

    @abstractmethod
    def prepare(self, case: Case, data: Data, group: Group) -> Prepared:
        """Return what does a case, or raise `Unsupported`."""


class Nbbn(Contender):
    """nbbn itself."""

    name, packages = "nbbn", ("numba",)

    def version(self) -> str:
        """Return nbbn's version."""
        return nbbn.__version__

    def enter(self, group: Group) -> None:
        """Set Numba's threads."""
        numba.set_num_threads(group.threads)

    def prepare(self, case: Case, data: Data, group: Group) -> Prepared:
        """Return a call of `nbbn.batch_norm` or `nbbn.batch_norm_backward`."""
        move, back, wait = cuda_arrays(case) if group.cuda else (_itself, _itself, nothing)
        axis = data.axis
        x = move(data.x)
        running_mean, running_var, weight, bias = map(move, data.parameters)
        out = None if data.out is None else move(data.out)
        if case.mode == "backward":
            grad_out = move(data.grad_out)
            saved = {"mean": move(data.oracle.mean), "invstd": move(data.oracle.invstd)}
            return Prepared(
                lambda: nbbn.batch_norm_backward(grad_out, x, weight, **saved, axis=axis, out=out),
                lambda found: {
                    "grad_x": back(found.x),
                    "grad_weight": back(found.weight),
                    "grad_bias": back(found.bias),
                },
                wait,
            )
        training = case.mode == "forward"
        state = running_mean, running_var, weight, bias

        def read(found: Any) -> Arrays:
            results = {"out": back(found)}
            if training:
                results |= {"running_mean": back(running_mean), "running_var": back(running_var)}
            return results

        return Prepared(
            lambda: nbbn.batch_norm(x, *state, training, MOMENTUM, EPS, axis=axis, out=out), read, wait
        )


def _itself(array: Any) -> Any:
    return array


Move = Callable[[Any], Any]


def cuda_arrays(case: Case) -> tuple[Move, Move, Callable[[], None]]:
    """Return how an array gets to the GPU, how it comes back, and how to wait for the GPU.

    Arrays are Numba's; of bfloat16, which Numba does not have, they are PyTorch's.
    """
    from numba import cuda

    if case.dtype != "bfloat16":
        return cuda.to_device, lambda array: array.copy_to_host(), cuda.synchronize
    try:
        import torch
    except ModuleNotFoundError as error:
        raise Unsupported("bfloat16 on a GPU needs PyTorch's arrays, and PyTorch is not installed") from error
    if not torch.cuda.is_available():
        raise Unsupported("bfloat16 on a GPU needs PyTorch's arrays, and this PyTorch finds no GPU")

    def move(array: np.ndarray) -> Any:
        if array.dtype.itemsize > 2:
            return torch.from_numpy(array).cuda()
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)

    def back(tensor: Any) -> np.ndarray:
        host = tensor.cpu()
        if host.dtype == torch.bfloat16:
            return np.asarray(host.view(torch.int16).numpy()).view(numpy_dtype("bfloat16"))
        return np.asarray(host.numpy())

    return move, back, cuda.synchronize


def no_cuda() -> str | None:
    """Return why there is no GPU to time."""
    return target.why_not()
