"""The stages of each operation, in order, on the CPU: which kernels run, over how many tasks."""

import ctypes
import struct
from collections.abc import Iterable

import numpy as np

from nbbn.arrays import ABSENT, Parameter, address
from nbbn.compiler import entry, pool
from nbbn.cpu import kernels
from nbbn.cpu.call import CALL
from nbbn.cpu.plan import Plan
from nbbn.cpu.simd import LANES
from nbbn.dispatch import Problem, Update
from nbbn.geometry import canonical

# See nbbn.cpu.call.ADDRESSES: six addresses, four parameters, four numbers, two flags.
_RECORD = struct.Struct("6q12q4d2q")


_KERNELS = {
    "training": (
        kernels.forward,
        kernels.collect_stats,
        kernels.finish_stats,
        kernels.normalize,
        kernels.update_running_stats,
    ),
    "evaluation": (kernels.use_running_stats, kernels.normalize, kernels.normalize_planes),
    "backward": (
        kernels.backward,
        kernels.backward_reduce,
        kernels.finish_backward,
        kernels.backward_apply,
        kernels.normalize,
    ),
}


def compile_for(real: type, operations: Iterable[str]) -> None:
    """Compile all that the operations may run on arrays of type `real`."""
    for operation in operations:
        for name in _KERNELS[operation]:
            entry(name, real)


class _Call:
    """One call: the record that the kernels read, and the memory that it points to."""

    def __init__(
        self,
        plan: Plan,
        x: int,
        grad_out: int = 0,
        out: int = 0,
        stats: int = 0,
        weight: Parameter = ABSENT,
        bias: Parameter = ABSENT,
        mean: Parameter = ABSENT,
        var: Parameter = ABSENT,
        eps: float = 0.0,
        momentum: float = 0.0,
        correction: float = 1.0,
        training: bool = True,
        updates: bool = False,
    ) -> None:
        self.plan = plan
        self._scratch = np.empty(plan.words)
        partials = address(self._scratch)
        tables = partials + 8 * plan.partial_words
        tables += -tables % 64
        self.record = (
            _RECORD.pack(
                x + plan.offset_x,
                grad_out + plan.offset_grad_out,
                out + plan.offset_out,
                stats,
                partials,
                tables,
                *weight,
                *bias,
                *mean,
                *var,
                eps,
                momentum,
                correction,
                1.0,
                training,
                updates,
            )
            + plan.record
        )

    def normalize_grad_out(self) -> None:
        """From here on, grad_out takes the place of x."""
        record = np.frombuffer(bytearray(self.record), CALL)
        record["x"] = record["grad_out"]
        record["at_x"] = record["at_grad_out"]
        self.record = record.tobytes()

    def __call__(self, kernel: str, tasks: int, threads: int | None = None) -> None:
        """Run a kernel over its tasks, on as many threads as the plan is for."""
        compiled = entry(kernel, self.plan.real)
        shares = min(self.plan.threads if threads is None else threads, tasks)
        if shares == 1:
            compiled.run(0, tasks, self.record)
            return
        at = ctypes.cast(ctypes.c_char_p(self.record), ctypes.c_void_p).value
        assert at is not None
        pool.run(compiled, shares, tasks, at)


class Run:
    """Runs the operations on one problem. All arrays are given by their addresses."""

    def __init__(self, problem: Problem) -> None:
        geometry = canonical(problem.shape, problem.axis, *problem.strides)
        self.plan = Plan(geometry, problem.dtype.type, problem.threads)
        self._blocks = -(-self.plan.channels // LANES)
        self._groups = self.plan.groups
        self._tiles = self.plan.chunks * self.plan.groups
        self._slabs = self.plan.slabs * self.plan.groups
        # Few channels are not worth waking the threads for.
        self._finishers = 1 if self.plan.channels < 512 else self.plan.threads

    def _compile(self, *names: str) -> None:
        """Compile all that a call will run before any of it runs: what raises has changed nothing."""
        for name in names:
            entry(name, self.plan.real)

    def stats(self, x: int, stats: int) -> None:
        """Mean, var and (not used) invstd into float64[3, C] at `stats`."""
        call = _Call(self.plan, x, stats=stats)
        self._compile(kernels.collect_stats, kernels.finish_stats)
        call(kernels.collect_stats, self._tiles)
        call(kernels.finish_stats, self._blocks, self._finishers)

    def forward(
        self,
        x: int,
        out: int,
        stats: int,
        weight: Parameter,
        bias: Parameter,
        eps: float,
        update: Update | None = None,
    ) -> None:
        """Training: normalize with x's own statistics, which go to float64[3, C] at `stats`."""
        plan = self.plan
        # One share alone updates the running statistics itself, after all else.
        alone = plan.resident and min(plan.threads, self._groups) == 1
        if update is None:
            call = _Call(plan, x, 0, out, stats, weight, bias, eps=eps)
        else:
            mean, var, momentum, correction = update
            call = _Call(
                plan, x, 0, out, stats, weight, bias, mean, var, eps, momentum, correction, updates=alone
            )
            if not alone:
                self._compile(kernels.update_running_stats)
        if plan.resident:
            call(kernels.forward, self._groups)
        else:
            self._compile(kernels.collect_stats, kernels.finish_stats, kernels.normalize)
            call(kernels.collect_stats, self._tiles)
            call(kernels.finish_stats, self._blocks, self._finishers)
            call(kernels.normalize, self._slabs)
        if update is not None and not alone:
            call(kernels.update_running_stats, 1)

    def evaluate(
        self,
        x: int,
        out: int,
        weight: Parameter,
        bias: Parameter,
        mean: Parameter,
        var: Parameter,
        eps: float,
    ) -> None:
        """Evaluation: normalize with the running statistics."""
        call = _Call(self.plan, x, 0, out, 0, weight, bias, mean, var, eps)
        kernel, tasks = kernels.normalize, self._slabs
        if self.plan.by_planes:
            kernel, tasks = kernels.normalize_planes, self.plan.planes
        self._compile(kernels.use_running_stats, kernel)
        call(kernels.use_running_stats, self._blocks, self._finishers)
        call(kernel, tasks)

    def backward(
        self,
        x: int,
        grad_out: int,
        grad_x: int,
        gradients: int,
        weight: Parameter,
        mean: Parameter,
        invstd: Parameter,
        training: bool,
    ) -> None:
        """grad_x, and grad_weight and grad_bias into float64[2, C] at `gradients`."""
        plan = self.plan
        call = _Call(plan, x, grad_out, grad_x, gradients, weight, mean=mean, var=invstd, training=training)
        if plan.resident and training:
            call(kernels.backward, self._groups)
            return
        last = kernels.backward_apply if training else kernels.normalize
        self._compile(kernels.backward_reduce, kernels.finish_backward, last)
        call(kernels.backward_reduce, self._tiles)
        call(kernels.finish_backward, self._blocks, self._finishers)
        if not training:
            call.normalize_grad_out()
        call(last, self._slabs)
