"""The stages of each operation, in order, on a GPU: which kernels run, in how many blocks.

Nothing here waits for the GPU: the work, and the memory that it works in, are put in order on the
caller's stream.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nbbn.arrays import ABSENT
from nbbn.compiler import Step
from nbbn.cuda import kernels, target
from nbbn.cuda.call import AnyArrays, Arrays, FusedArrays, MaskedArrays, Numbers, Operand, Parameter
from nbbn.cuda.plan import THREADS, Grid, Plan
from nbbn.frameworks import view
from nbbn.geometry import Geometry, Layout, canonical
from nbbn.problem import NOTHING, Extras, Marks, Problem

Kernel = Callable[..., Any]
Where = tuple[int, int, int]  # a parameter: address, stride in bytes and code of the storage


ADDING: tuple[target.Names, ...] = ((), (("ADDS", 1),), (("ADDS", 2),))
CONSTANT: target.Names = (("CONSTANT", True),)


class _Call:
    """The launches of one operation, all of them compiled before the first is launched.

    Within `with`: the memory that they work in is freed at its end, in the order of the stream.
    """

    def __init__(self, run: "Run", stream: int, extras: Extras) -> None:
        self._run = run
        self._stream = stream
        self._slope = float(extras.slope)
        self._memory = target.Memory(run.nbytes, run.plan.barriers, stream)
        self.sums = self._memory.address + run.plan.sums
        self._mask = (0, 0, 0)
        self._launches: list[tuple[target.Launcher, Grid, tuple[Any, ...]]] = []
        if run.mask is not None and extras.marks is not None:
            try:
                self._take_mask(run.mask.words(extras.marks.kept), extras.marks.values)
            except BaseException:
                self._memory.free()
                raise

    def _take_mask(self, mask: np.ndarray, values: int) -> None:
        """Copy a mask, of which so many values count, to the end of the memory."""
        at = self._memory.address + self._run.nbytes - mask.nbytes
        target.write(at, mask, self._run.device, self._stream)
        self._mask = at, at + mask.nbytes // 2, values

    def __enter__(self) -> "_Call":
        return self

    def __exit__(self, *raised: object) -> None:
        self._memory.free()

    def arrays(
        self,
        operands: Sequence[Operand],
        stats: int,
        weight: Where = ABSENT,
        bias: Where = ABSENT,
        mean: Where = ABSENT,
        var: Where = ABSENT,
        training: bool = True,
        plan: Plan | None = None,
    ) -> AnyArrays:
        """Return what the kernels of this call have to know of its arrays, by the run's plan or another.

        The operands are x, grad_out and the result.
        """
        memory = self._memory.address
        if plan is None:
            plan = self._run.plan
        else:
            memory += self._run.plan.partials  # the barriers stay as they are
        x, grad_out, out = operands
        parameters = Parameter(*weight), Parameter(*bias), Parameter(*mean), Parameter(*var)
        arrays = Arrays(
            x,
            grad_out,
            out,
            stats,
            *parameters,
            partials=memory + plan.partials,
            tables=memory + plan.tables,
            barriers=memory,
            training=int(training),
        )
        return arrays if self._run.mask is None else MaskedArrays(*arrays, *self._mask)

    def fused(self, arrays: AnyArrays, *beside: Operand) -> AnyArrays:
        """Return the same with what goes along: the residual and, in a backward pass, its gradient."""
        form = self._run.plan.form
        if not (form.activation or form.residual):
            return arrays
        alone = Arrays(*arrays[: len(Arrays._fields)])
        residual, grad_residual = (*beside, alone.x, alone.x)[:2]
        return FusedArrays(*alone, *self._mask, residual, grad_residual, self._slope)

    def add(
        self,
        kernel: Kernel,
        grid: Grid,
        arrays: AnyArrays,
        *numbers: Numbers,
        plan: Plan | None = None,
        names: target.Names = (),
    ) -> None:
        """Launch a kernel after those that were added before, compiled for these names too."""
        arguments = (arrays, grid.cut, *numbers)
        plan = plan or self._run.plan
        if plan.form.along and kernel in ELEMENTWISE:
            names += plan.affine_names(arrays.weight, arrays.bias)
        if isinstance(arrays, FusedArrays):
            names += plan.fused_names(grid)
        aligned = arrays.together % plan.access == 0
        launcher = self._run.launcher(kernel, plan, grid, aligned, names, arguments)
        self._launches.append((launcher, grid, arguments))

    def launch(self) -> None:
        """Launch them all."""
        for launcher, grid, arguments in self._launches:
            launcher(grid.blocks, grid.shared, self._stream, *arguments)


# What reads the parameters of elements.
ELEMENTWISE = (kernels.normalize, kernels.reduce, kernels.apply, kernels.forward, kernels.backward)


def _across(problem: Problem) -> Geometry:
    """Return the walk over rows whose elements are the channels, and the rows the steps, in their order."""
    rows, elements = problem.shape
    size = problem.storage.dtype.itemsize
    layouts = tuple(Layout(0, (strides[0],), size, 0) for strides in problem.strides)
    return Geometry((rows,), elements, 1, layouts)


class _Mask:
    """How a mask lies in the memory of the host, and what of it a kernel is given.

    Parameters
    ----------
    sizes : tuple of int
        Of the walk over the elements of a channel: its outer dimensions and the inner one.
    layout : Layout
        Of the mask, a byte for each element.
    """

    def __init__(self, sizes: tuple[int, ...], layout: Layout) -> None:
        self._sizes = sizes
        self._layout = layout
        self._words = math.prod(sizes) // 64 + 1  # one more than are full: a count for each end of a part
        self.nbytes = 16 * self._words

    def seen(self, address: int) -> np.ndarray:
        """Return the mask at an address."""
        layout = self._layout
        steps = (*layout.outer, layout.inner)
        return view(address + layout.offset, self._sizes, steps, np.dtype(np.bool_), None)

    def words(self, address: int) -> np.ndarray:
        """Return the bits of the mask at an address, and the counts before each word: int64[2, words]."""
        counted = self.seen(address)
        found = np.zeros((2, self._words), np.int64)
        bits = np.zeros(64 * self._words, np.bool_)
        bits[: counted.size] = counted.reshape(-1)
        found[0].view(np.uint8)[:] = np.packbits(bits, bitorder="little")
        np.cumsum(bits.reshape(-1, 64).sum(1)[:-1], out=found[1, 1:])
        return found


class Run:
    """Runs the operations on one problem. All arrays are given by their addresses on the device.

    Only a mask lies in the memory of the host, and goes along with each call.
    """

    def __init__(self, problem: Problem) -> None:
        self.device = int(problem.device.partition(":")[2] or 0)
        geometry = canonical(problem.shape, problem.axis, *problem.strides)
        self.mask = None
        if problem.form.masked:
            *layouts, mask = geometry.layouts
            geometry = replace(geometry, layouts=tuple(layouts))
            self.mask = _Mask((*geometry.sizes, geometry.inner), mask)
        with target.current(self.device):
            self.plan = plan = Plan(geometry, problem.storage, self.device, problem.form)
            self.nbytes = plan.nbytes
            self.across = None
            if problem.form.along and len(problem.strides) == 3:
                self.across = Plan(_across(problem), problem.storage, self.device, across=True)
                self.nbytes = max(plan.nbytes, plan.partials + self.across.nbytes)
        if self.mask is not None:
            self.nbytes = -(-self.nbytes // 16) * 16 + self.mask.nbytes
        self._channels = plan.general._replace(threads=THREADS, blocks=-(-plan.channels // THREADS))
        self._launchers: dict[tuple[Any, ...], target.Launcher] = {}

    def launcher(
        self,
        kernel: Kernel,
        plan: Plan,
        grid: Grid,
        aligned: bool,
        names: target.Names,
        arguments: tuple[Any, ...],
    ) -> target.Launcher:
        """Return a kernel of this problem, compiled."""
        key = kernel, plan is self.plan, grid.threads, grid.teams > 0, aligned, names
        try:
            return self._launchers[key]
        except KeyError:
            names = plan.names(grid, aligned) + names
            found = target.launcher(kernel, names, target.signature(arguments), self.device)
            self._launchers[key] = found
            return found

    def mark(self, mask: int, counting: bool = True) -> Marks:
        """Count the elements that a mask at an address leaves, if asked."""
        assert self.mask is not None
        return Marks(mask, int(np.count_nonzero(self.mask.seen(mask))) if counting else 0)

    def stats(self, x: int, stats: int, extras: Extras = NOTHING, stream: int = 0) -> None:
        """Mean, var and (not used) invstd into float64[3, C] at `stats`."""
        plan = self.plan
        with target.current(self.device), _Call(self, stream, extras) as call:
            (of_x,) = plan.operands(x)
            arrays = call.arrays((of_x, of_x, of_x), stats)
            call.add(kernels.collect, plan.general, arrays)
            call.add(kernels.finish_stats, plan.finish, arrays, Numbers(0.0, 0.0, 0.0))
            call.launch()

    def forward(
        self,
        x: int,
        out: int,
        stats: int,
        weight: Where,
        bias: Where,
        mean: Where,
        var: Where,
        eps: float,
        momentum: float,
        correction: float,
        then: tuple[Step, ...] = (),
        extras: Extras = NOTHING,
        stream: int = 0,
    ) -> None:
        """Training: normalize with x's own statistics, which go to float64[3, C] at `stats`.

        The running statistics, those that there are, are updated; and then some steps are taken, here.
        """
        plan = self.plan
        numbers = Numbers(float(eps), float(momentum), float(correction))
        with target.current(self.device), _Call(self, stream, extras) as call:
            residual = [extras.residual] * plan.form.residual
            of_x, *beside, of_out = plan.operands(x, *residual, out)
            arrays = call.arrays((of_x, of_x, of_out), stats, weight, bias, mean, var)
            fused = call.fused(arrays, *beside)
            if plan.resident is not None:
                call.add(kernels.forward, plan.resident, fused, numbers)
            else:
                call.add(kernels.collect, plan.general, arrays)
                call.add(kernels.finish_stats, plan.finish, arrays, numbers)
                call.add(kernels.normalize, plan.general, fused)
            call.launch()
        for step in then:
            step()

    def evaluate(
        self,
        x: int,
        out: int,
        weight: Where,
        bias: Where,
        mean: Where,
        var: Where,
        eps: float,
        extras: Extras = NOTHING,
        stream: int = 0,
    ) -> None:
        """Evaluation: normalize with the running statistics."""
        plan = self.plan
        with target.current(self.device), _Call(self, stream, extras) as call:
            residual = [extras.residual] * plan.form.residual
            of_x, *beside, of_out = plan.operands(x, *residual, out)
            arrays = call.arrays((of_x, of_x, of_out), 0, weight, bias, mean, var)
            call.add(kernels.use_running_stats, self._channels, arrays, Numbers(float(eps), 0.0, 0.0))
            call.add(kernels.normalize, plan.general, call.fused(arrays, *beside))
            call.launch()

    def backward(
        self,
        x: int,
        grad_out: int,
        grad_x: int,
        gradients: int,
        weight: Where,
        mean: Where,
        invstd: Where,
        training: bool,
        adds: int = 0,
        extras: Extras = NOTHING,
        stream: int = 0,
    ) -> None:
        """grad_x, and the gradients of weight and bias into float64[2, parameters] at `gradients`.

        With a residual, its gradient too. Of the first of several calls whose gradients are added up, `adds`
        is 1, and then 2: there are two rows more, for what the sums have lost.
        """
        plan, across = self.plan, self.across
        names = ADDING[adds]
        with target.current(self.device), _Call(self, stream, extras) as call:
            residual = [extras.residual, extras.grad_residual] * plan.form.residual
            of_x, of_grad_out, *beside, of_grad_x = plan.operands(x, grad_out, *residual, grad_x)
            operands = [of_x, of_grad_out, of_grad_x]
            arrays = call.arrays(operands, gradients, weight, extras.bias, mean, invstd, training)
            fused = call.fused(arrays, *beside)
            if across is not None:  # before grad_x is written, which may be where x or grad_out is
                operands = across.operands(x, grad_out, grad_x)
                rows = call.arrays(operands, gradients, mean=mean, var=invstd, plan=across)
                call.add(kernels.reduce, across.general, rows, plan=across)
                call.add(kernels.sum_gradients, across.gradients, rows, plan=across, names=names)
            if plan.resident is not None and training:
                if plan.shares:
                    summed = arrays._replace(partials=call.sums)
                    call.add(kernels.backward, plan.resident, arrays._replace(stats=call.sums))
                    call.add(kernels.sum_gradients, plan.gradients, summed, names=names)
                else:
                    call.add(kernels.backward, plan.resident, fused, names=names)
            else:
                call.add(kernels.reduce, plan.general, fused)
                call.add(kernels.finish_backward, plan.finish, arrays, names=names)
                if plan.shares:
                    call.add(kernels.sum_gradients, plan.gradients, arrays, names=names)
                # What the first pass has left of a residual takes the place of grad_out.
                incoming = beside[-1] if beside else of_grad_out
                if plan.form.through:
                    call.add(kernels.apply, plan.general, fused, names=() if training else CONSTANT)
                elif training:
                    call.add(kernels.apply, plan.general, arrays._replace(grad_out=incoming))
                else:  # grad_x = scale · g: g takes the place of x
                    call.add(kernels.normalize, plan.general, arrays._replace(x=incoming))
            call.launch()
