"""Runs a CUDA kernel as Python: every thread a greenlet, and they take turns at barriers.

Numba's simulator runs one block to its end before the next begins, so blocks cannot wait for each other
in it. Here all of them are under way at once, in an order that is shuffled; what depends on the order, a
barrier that not all threads come to, and blocks that wait for ever are found.
"""

import random
import sys

import greenlet
import numpy as np

from nbbn.cuda import target


class _Axis:
    def __init__(self, get):
        self._get = get

    @property
    def x(self):
        return self._get()


class _Allocator:
    def __init__(self, array):
        self.array = array


class Emulator:
    """What kernels call `cuda`."""

    def __init__(self):
        here = greenlet.getcurrent
        self.threadIdx = _Axis(lambda: here().thread)
        self.blockIdx = _Axis(lambda: here().block)
        self.blockDim = _Axis(lambda: self._threads)
        self.gridDim = _Axis(lambda: self._blocks)
        self.popc = lambda word: int(word).bit_count()
        self.local = _Allocator(lambda size, dtype: np.full(size, np.nan, dtype))
        self.shared = _Allocator(self._shared_array)
        self.order = random.Random(0)

    def launch(self, kernel, blocks, threads, shared, arguments):
        """Run all threads of all blocks to their ends."""
        self._blocks, self._threads, self._shared = blocks, threads, shared
        self._arrived, self._passed = [0] * blocks, [0] * blocks
        self._arrays = {}
        self._main, ready = greenlet.getcurrent(), []
        for block in range(blocks):
            for thread in range(threads):
                one = greenlet.greenlet(kernel)
                one.block, one.thread, one.wait, one.seen = block, thread, None, None
                ready.append(one)
        self.order.shuffle(ready)
        while ready:
            # Some blocks get far ahead of the others, until they have to wait for them or for a while.
            some = set(self.order.sample(range(blocks), self.order.randint(1, blocks)))
            for _ in range(self.order.randint(1, 60)):
                if not self._advance([one for one in ready if one.block in some], arguments):
                    break
                ready = [one for one in ready if not one.dead]
            if ready:
                assert self._advance(ready, arguments), "every thread waits for another one"
                ready = [one for one in ready if not one.dead]

    @staticmethod
    def _advance(threads, arguments):
        """Let each thread run that can, up to where it waits; return whether there was any."""
        moved = False
        for one in threads:
            if one.wait is None or one.wait():
                one.wait, moved = None, True
                if one:
                    one.switch()
                else:  # not begun yet
                    one.switch(*arguments)
        return moved

    def _wait_until(self, condition):
        greenlet.getcurrent().wait = condition
        self._main.switch()

    def syncthreads(self):
        """Wait for the other threads of the block."""
        block = greenlet.getcurrent().block
        passed = self._passed[block]
        self._arrived[block] += 1
        if self._arrived[block] == self._threads:
            self._arrived[block] = 0
            self._passed[block] += 1
        else:
            self._wait_until(lambda: self._passed[block] != passed)

    def load_acquire(self, address):
        """Let others run before another block's word is looked at; again, when it is another one."""
        here = greenlet.getcurrent()
        seen = here.seen
        self._wait_until(lambda: (address, target.load_acquire(address)) != seen)
        here.seen = address, target.load_acquire(address)
        return here.seen[1]

    def _shared_array(self, size, dtype):
        """One array for each block and place in the source."""
        place = greenlet.getcurrent().block, sys._getframe(1).f_lineno
        if place not in self._arrays:
            dtype = np.dtype(dtype)
            size = size or self._shared // dtype.itemsize
            filled = np.nan if dtype.kind == "f" else np.iinfo(dtype).max  # of 16 bits: NaN too
            self._arrays[place] = np.full(size, filled, dtype)
        return self._arrays[place]


EMULATOR = Emulator()


class Launcher(target.Launcher):
    """Stands for target.Launcher, and runs kernels here."""

    def __init__(self, kernel, names, kinds, device):
        replaced = (("cuda", EMULATOR), ("load_acquire", EMULATOR.load_acquire))
        self._kernel = target.specialize(kernel, (*names, *replaced))
        self._threads = dict(names)["THREADS"]

    def __call__(self, blocks, shared, stream, *arguments):
        with np.errstate(all="ignore"):
            EMULATOR.launch(self._kernel, blocks, self._threads, shared, target._numbers(arguments))
