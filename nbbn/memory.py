"""Memory for outputs, recycled.

The first touch of fresh memory costs a page fault a page: for a 100 MB output more time than the work.
So the memory of a large output goes back to a pool here when the last array, view or buffer that can
see it is gone, and the next output of that size takes it from there. Nothing is handed out while
anything can still see it: the memory is owned by an object that every view keeps alive, and it is that
object's end that returns it.

The pool holds at most `set_recycling(max_bytes)` bytes; what was returned longest ago is freed first.
"""

import collections
import logging
import math
import operator
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np

log = logging.getLogger("nbbn")

SMALLEST = 1 << 20  # bytes: malloc recycles what is smaller by itself
ALIGNMENT = 64  # a cache line, for streaming stores
_PAGE = 4096
DEFAULT_BYTES = 1 << 30


def _configured() -> int:
    value = os.environ.get("NBBN_RECYCLE_BYTES", "")
    if value.isdecimal():
        return int(value)
    if value:
        log.warning("NBBN_RECYCLE_BYTES must be a whole number of bytes, got %r: it is passed over", value)
    return DEFAULT_BYTES


class _Pool:
    """Blocks of memory that nobody sees, the one returned longest ago first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._renew_lock()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew_lock)
        self._blocks: collections.deque[np.ndarray] = collections.deque()
        self._bytes = 0

    def _renew_lock(self) -> None:
        # Reentrant: a block can come back from a garbage collection inside the lock. And a new one in a
        # child process, where a thread that held it at the fork does not exist.
        self._lock = threading.RLock()

    # Handlers of signals and the garbage collector come in after calls and between the turns of a loop.
    # So `_blocks` and `_bytes` change together, in one step or with no call between the two.

    def take(self, nbytes: int) -> np.ndarray:
        if (block := self._kept(nbytes)) is not None:
            return block
        try:
            return np.empty(nbytes, np.uint8)
        except MemoryError:
            self.trim(0)  # what is kept here may be what is missing
            return np.empty(nbytes, np.uint8)

    def _kept(self, nbytes: int) -> np.ndarray | None:
        with self._lock:
            for k in range(len(self._blocks) - 1, -1, -1):
                try:
                    block = self._blocks[k]
                except IndexError:  # a collection in this loop has trimmed them
                    continue
                if block.nbytes == nbytes:
                    del self._blocks[k]
                    self._bytes -= nbytes
                    return block
        return None

    def put(self, block: np.ndarray) -> None:
        with self._lock:
            if block.nbytes <= self.limit:
                self._bytes += block.nbytes
                self._blocks.append(block)
            self.trim(self.limit)

    def trim(self, limit: int) -> None:
        with self._lock:
            while self._bytes > limit:
                self._bytes -= self._blocks[0].nbytes
                self._blocks.popleft()


_pool = _Pool(_configured())


class _Owner:
    """Owns a block for as long as any array that was made from it lives."""

    def __init__(self, nbytes: int) -> None:
        self._block = _pool.take(-(-(nbytes + ALIGNMENT) // _PAGE) * _PAGE)
        start = self._block.__array_interface__["data"][0]
        self.__array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (start + -start % ALIGNMENT, False),
            "version": 3,
        }

    # At the end of the interpreter, `_pool` may be gone before the last array is.
    def __del__(self, put: Callable[[np.ndarray], None] = _pool.put) -> None:
        # `_block` is missing where its allocation failed.
        block = self.__dict__.pop("_block", None)
        if block is not None:
            put(block)


def set_recycling(max_bytes: int) -> int:
    """Bound the memory that is kept for the next large outputs; 0 turns recycling off.

    Parameters
    ----------
    max_bytes : int
        How many bytes of returned memory are kept at most. The default is 1 GiB, or what the
        environment variable ``NBBN_RECYCLE_BYTES`` says when nbbn is imported.

    Returns
    -------
    int
        The bound there was before.

    Raises
    ------
    TypeError
        If `max_bytes` is not an integer.
    ValueError
        If `max_bytes` is negative.

    Examples
    --------
    >>> import nbbn
    >>> before = nbbn.set_recycling(0)  # every output is fresh memory
    >>> nbbn.set_recycling(before)
    0
    """
    try:
        if isinstance(max_bytes, (bool, np.bool_)):
            raise TypeError
        max_bytes = operator.index(max_bytes)
    except TypeError:
        raise TypeError(f"max_bytes must be an int, got {type(max_bytes).__name__}") from None
    if max_bytes < 0:
        raise ValueError(f"max_bytes must be at least 0, got {max_bytes}")
    before = _pool.limit
    _pool.limit = max_bytes
    _pool.trim(max_bytes)
    return before


def _recycled(nbytes: int, shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    return np.asarray(_Owner(nbytes)).view(dtype).reshape(shape)


def empty_like(x: np.ndarray) -> np.ndarray:
    """Return a new array of x's shape, dtype and memory layout (order "K"), not set to anything."""
    nbytes = x.nbytes
    if nbytes < SMALLEST or _pool.limit == 0:
        return np.empty_like(x, subok=False)
    if x.flags.c_contiguous:
        return _recycled(nbytes, x.shape, x.dtype)
    # The axes from the slowest to the fastest, as NumPy's order "K" has them.
    axes = sorted(range(x.ndim), key=lambda d: -abs(x.strides[d]))
    return _recycled(nbytes, [x.shape[d] for d in axes], x.dtype).transpose(np.argsort(axes))


def empty_aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return a new C-ordered array that begins on a cache line, not set to anything."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= SMALLEST and _pool.limit:
        return _recycled(nbytes, shape, dtype)
    block = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -block.__array_interface__["data"][0] % ALIGNMENT
    return block[start : start + nbytes].view(dtype).reshape(shape)
