"""The only place that holds Numba's options: what is compiled, how, when, and where it is cached.

A kernel is a function `(first, last, call, stored)`: it does the tasks first … last - 1 of the call
described at the address `call`, for arrays whose elements are stored as type `stored`. It holds the GIL at
no time and compiles at its first use, once for each type, to a C function `(first, last, call)`. That one
function serves both ways of running it: called as it is, and from the one parallel loop of this module.
"""

import collections
import contextlib
import ctypes
import functools
import gc
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import FunctionType
from typing import Any, TypeVar

import numba
from llvmlite import binding, ir
from numba.core import cgutils, types
from numba.core.caching import FunctionCache, NullCache
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.runtime import rtsys
from numba.extending import intrinsic, overload

from nbbn.pipeline import HelperCompiler, KernelCompiler

log = logging.getLogger("nbbn")

# `contract` lets a product and a sum become one fma, which is faster and more accurate. Nothing else:
# `reassoc` would undo the compensated sums, `nnan` and `ninf` would fold away NaN and Inf.
CONTRACT = ("contract",)
_OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": set(CONTRACT)}


# Helpers are only ever called from compiled code: they need no way in from Python or C.
_HELPER: dict[str, Any] = {
    **_OPTIONS,
    "_nrt": False,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "pipeline_class": HelperCompiler,
}

# Always inlined: a call would move its vectors, and its constants, to memory and back.
formula = numba.njit(**_HELPER, forceinline=True)
"""Decorates a formula: of numbers, or of vectors of numbers, for any target."""

loop = numba.njit(**_HELPER)
"""Decorates a part of a CPU kernel."""


def by_type(stub: Callable[..., Any]) -> Any:
    """Decorate a function that returns, for the types of its arguments, what `stub` does in a CPU kernel."""
    return overload(stub, jit_options=_HELPER)


def variant(name: str) -> Callable[[FunctionType], Any]:
    """Decorate a part of a CPU kernel of which there are several by the same name.

    A kernel from the cache brings the names of its parts along, which another process made up: one
    kernel's part could be taken for another's of the same name and types.
    """

    def decorate(function: FunctionType) -> Any:
        function.__qualname__ = f"{function.__name__}_{name}"
        return loop(function)

    return decorate


@intrinsic
def fma(typingctx, a, b, c):
    """Return a · b + c, rounded once. Numbers or vectors, a and c of one type."""
    if a != c:
        return None

    def codegen(context, builder, signature, args):
        a, b, c = args
        kind = a.type
        if b.type != kind:
            b = broadcast(builder, b, kind)
        width = f"v{kind.count}" if isinstance(kind, ir.VectorType) else ""
        element = kind.element if isinstance(kind, ir.VectorType) else kind
        name = f"llvm.fma.{width}f{64 if element == ir.DoubleType() else 32}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(function, [a, b, c])

    return a(a, b, c), codegen


# What formulas of activations need, of numbers or vectors z.

MAGIC32 = 1.5 * 2.0**23
"""Added to a float32 of up to 2²² it leaves the nearest integer in the lowest bits; see `two_to`."""
MAGIC64 = 1.5 * 2.0**52
"""The same of float64."""


def _element(kind):
    return kind.element if isinstance(kind, ir.VectorType) else kind


@intrinsic
def at_most_zero(typingctx, z, a, b):
    """Return a where z <= 0, b elsewhere, also where z is NaN."""
    if not z == a == b:
        return None

    def codegen(context, builder, signature, args):
        zero = ir.Constant(_element(args[0].type), 0.0)
        if isinstance(args[0].type, ir.VectorType):
            zero = ir.Constant(args[0].type, [0.0] * args[0].type.count)
        return builder.select(builder.fcmp_ordered("<=", args[0], zero), args[1], args[2])

    return z(z, a, b), codegen


@intrinsic
def like(typingctx, z, value):
    """Return a number as z is one: of its type, in each lane."""

    def codegen(context, builder, signature, args):
        kind, value = args[0].type, args[1]
        if _element(kind) != value.type:
            value = builder.fptrunc(value, _element(kind))
        return broadcast(builder, value, kind) if isinstance(kind, ir.VectorType) else value

    return z(z, types.float64), codegen


@intrinsic
def is_double(typingctx, z):
    """Whether z is of float64."""

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(1), int(_element(args[0].type) == ir.DoubleType()))

    return types.boolean(z), codegen


@intrinsic
def two_to(typingctx, z):
    """Return 2ⁿ where z is an integer n, of the exponents of normal numbers, plus `MAGIC32` or `MAGIC64`.

    At one less than the least of them it is 0.
    """

    def codegen(context, builder, signature, args):
        kind = args[0].type
        double = _element(kind) == ir.DoubleType()
        word = ir.IntType(64 if double else 32)
        bits, bias = (52, 1023) if double else (23, 127)
        shift, one = ir.Constant(word, bits), ir.Constant(word, bias << bits)
        if isinstance(kind, ir.VectorType):
            word = ir.VectorType(word, kind.count)
            shift, one = (ir.Constant(word, [value.constant] * kind.count) for value in (shift, one))
        return builder.bitcast(builder.add(builder.shl(builder.bitcast(args[0], word), shift), one), kind)

    return z(z), codegen


@intrinsic
def power_above(typingctx, z):
    """Return the least power of two that is more than z, a normal number that is positive."""

    def codegen(context, builder, signature, args):
        kind = args[0].type
        double = _element(kind) == ir.DoubleType()
        word = ir.IntType(64 if double else 32)
        bits, ones = (52, 0x7FF) if double else (23, 0xFF)
        exponent, step = ir.Constant(word, ones << bits), ir.Constant(word, 1 << bits)
        if isinstance(kind, ir.VectorType):
            word = ir.VectorType(word, kind.count)
            exponent, step = (ir.Constant(word, [value.constant] * kind.count) for value in (exponent, step))
        below = builder.and_(builder.bitcast(args[0], word), exponent)
        return builder.bitcast(builder.add(below, step), kind)

    return z(z), codegen


@intrinsic
def out_of_line(typingctx):
    """As a helper's first statement: compile it once, small, and call it, rather than inline it."""

    def codegen(context, builder, signature, args):
        for attribute in ("noinline", "optsize"):
            builder.function.attributes.add(attribute)
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def in_line(typingctx):
    """As the first statement of a helper that is given a function: inline it, whatever it costs.

    What is called and not inlined is passed the address of the function's object, and a kernel with an
    address of this process in it is not cached.
    """

    def codegen(context, builder, signature, args):
        builder.function.attributes.add("alwaysinline")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def invoke(typingctx, kernel, first, last, call):
    """Do the tasks first … last - 1 with the kernel at an address (`Entry.address`)."""

    def codegen(context, builder, signature, args):
        integer = ir.IntType(64)
        element = ir.IntType(8).as_pointer()  # the kernel's `stored`, which carries nothing
        function = ir.FunctionType(ir.VoidType(), [integer] * 3 + [element])
        builder.call(
            builder.inttoptr(args[0], function.as_pointer()), [*args[1:], ir.Constant(element, None)]
        )
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


@functools.cache
def interpreted(function: Any) -> Callable[..., Any]:
    """Return a formula as a plain Python function, of numbers or of whole arrays."""
    compiled = function.py_func.__globals__
    scope: dict[str, Any] = {**compiled, "fma": lambda a, b, c: a * b + c}
    for name, value in compiled.items():
        if isinstance(value, numba.core.dispatcher.Dispatcher):
            scope[name] = FunctionType(value.py_func.__code__, scope)
    return FunctionType(function.py_func.__code__, scope)


def broadcast(builder, scalar, kind):
    """Return an LLVM vector of type `kind` whose every lane is `scalar`."""
    index = ir.IntType(32)
    undefined = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(index, 0))
    lanes = ir.Constant(ir.VectorType(index, kind.count), [0] * kind.count)
    return builder.shuffle_vector(first, undefined, lanes)


# --- kernels ---------------------------------------------------------------------------------------

_kernels: dict[str, Callable[..., None]] = {}


def kernel(function: Callable[..., None]) -> str:
    """Register `function(first, last, call, stored)` and return its name, for `entry`."""
    _kernels[function.__name__] = function
    return function.__name__


@functools.cache
def sources_version() -> str:
    """A hash of all of nbbn's sources."""
    digest = hashlib.sha256(numba.__version__.encode())
    for path in sorted(pathlib.Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class _Cache(FunctionCache):
    """Numba's cache on disk, of kernels that were compiled from these sources.

    Numba itself looks at the one file that a kernel stands in, not at the helpers that it calls. And an index
    of other sources cannot even be read, where it is of types that are no more.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file._version += sources_version()

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load a kernel without all that Numba needs to compile one: that takes ten times as long."""
        rtsys.initialize(target_context)  # machine code may refer to it
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Compiling makes millions of objects, and going through them all, time and again, costs a tenth."""
    was_on = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if was_on:
            gc.enable()


@no_garbage_collection()
def compiled(function: Callable[..., None], signature: Any) -> CFunc:
    """Return a kernel as a C function: compile it, or load it from the cache."""
    types_of_it = signature.args, signature.return_type
    made = CFunc(function, types_of_it, {}, dict(_OPTIONS), pipeline_class=KernelCompiler)
    try:
        made._cache = _Cache(function)
    except (OSError, RuntimeError) as error:  # Numba's RuntimeError: no directory can be written to
        log.info("kernels are not cached on disk: %s", error)
    try:
        made.compile()
    except (OSError, EOFError, ValueError, pickle.PickleError) as error:
        # A full disk, or a file that is no cache: compile without one.
        log.info("kernels are not cached on disk: %s", error)
        made._cache = NullCache()
        made.compile()
    return made


if hasattr(os, "register_at_fork"):
    # A fork waits: what another thread is about to compile could not be finished in a child, without it.
    os.register_at_fork(
        before=global_compiler_lock.acquire,
        after_in_parent=global_compiler_lock.release,
        after_in_child=global_compiler_lock.release,
    )

T = TypeVar("T")


def undisturbed(make: Callable[[], T]) -> T:
    """Return what `make` returns, called in a thread of its own with Numba's lock; wait for it.

    No signal's handler raises there, where it would leave Numba half of what it was about to register: no
    later compilation would find the other half. It is the waiting that can be interrupted.
    """

    def locked() -> T:
        with global_compiler_lock:
            return make()

    def run() -> None:
        try:
            future.set_result(locked())
        except BaseException as error:
            future.set_exception(error)

    if global_compiler_lock.is_locked():  # by this thread
        return make()
    future: Future[T] = Future()
    try:
        threading.Thread(target=run, name="nbbn compiles").start()
    except RuntimeError:  # no more threads: at the end of the interpreter, or where there are none at all
        return locked()
    return future.result()


Step = partial[Any]


def in_one(*steps: Step) -> None:
    """Run C functions, bound to their arguments by functools.partial, with nothing in between.

    Python handles signals, and raises what another thread sent here, between two of its own instructions.
    There is none between these steps: what they write is written by all of them or by none.
    """
    collections.deque(map(partial.__call__, steps), maxlen=0)


_WORD = ctypes.c_void_p  # what ctypes makes of an int fastest, as wide as an int64, and as good for one


class Entry:
    """A compiled kernel: `run(first, last, call)` in this thread, `address` for the parallel loop."""

    def __init__(self, name: str, stored: types.Type) -> None:
        signature = types.void(types.int64, types.int64, types.int64, stored)
        self._compiled = compiled(_kernels[name], signature)  # keeps the machine code alive
        self.loaded = self._compiled.cache_hits > 0
        """Whether it came from the cache on disk."""
        self.address: int = self._compiled.address
        # ctypes gives up the GIL for as long as the kernel runs. `stored` carries nothing: left out.
        function = ctypes.CFUNCTYPE(None, *[_WORD] * 3)(self.address)
        self.run: Callable[[int, int, int], None] = function
        """Does the tasks first … last - 1 of the call described at an address."""


_entries: dict[tuple[str, str], Entry] = {}


def entry(name: str, stored: types.Type) -> Entry:
    """Return the kernel `name`, compiled for arrays that are stored so (`nbbn.cpu.simd.stored_as`)."""
    try:
        return _entries[name, stored.name]
    except KeyError:
        return undisturbed(partial(_new_entry, name, stored))


def compilations() -> int:
    """Return how many kernels this process has compiled, not counting those loaded from disk."""
    return sum(not entry.loaded for entry in _entries.values())


def _new_entry(name: str, stored: types.Type) -> Entry:
    if (name, stored.name) not in _entries:  # another thread may have been faster
        _entries[name, stored.name] = Entry(name, stored)
    return _entries[name, stored.name]


# --- the parallel loop -----------------------------------------------------------------------------


@intrinsic
def _number_at(typingctx, address, index):
    def codegen(context, builder, signature, args):
        numbers = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load(builder.gep(numbers, [args[1]]))

    return types.int64(types.int64, types.int64), codegen


def _share(begin, number, step, job):
    """Do some shares of a job: what Numba's threads are given to do, as they do the parts of a gufunc.

    The array that they go over has bytes for elements, and lies at address 0: where a part of it begins, is
    which share comes first.
    """
    kernel, shares, tasks, call = (
        _number_at(job, 0),
        _number_at(job, 1),
        _number_at(job, 2),
        _number_at(job, 3),
    )
    first = _number_at(begin, 0)
    for share in range(first, first + _number_at(number, 0)):
        invoke(kernel, share * tasks // shares, (share + 1) * tasks // shares, call)


SHARES = 8  # of each thread: one that wakes late, or whose core does something else, leaves some to others


class _ParallelLoop:
    """Numba's threads at work: its own parallel loop, without the passes that make one of a `prange`."""

    _function = ctypes.CFUNCTYPE(None, *[_WORD] * 8)
    _numbers = ctypes.c_int64 * 7

    def __init__(self) -> None:
        self._compiled = compiled(_share, types.void(*[types.int64] * 4))  # keeps the machine code alive
        # Of (what to do, its arrays, how many elements, how far apart, what it is told; 0 inner dimensions,
        # 1 array, how many threads); gives up the GIL.
        self._run = self._function(binding.address_of_symbol("numba_parallel_for"))

    def over(self, kernel: int, threads: int, shares: int, tasks: int, call: int) -> Step:
        """Return what runs the kernel at an address over so many tasks, in shares, on so many threads."""
        numbers = self._numbers(0, shares, 1, kernel, shares, tasks, call)
        at = ctypes.addressof(numbers)
        return partial(self._run, self._compiled.address, numbers, at + 8, at + 16, at + 24, 0, 1, threads)


_parallel_loop = functools.cache(_ParallelLoop)


def _load_tbb() -> None:
    """Load the tbb wheel's library, which Numba does not find by itself in a virtual environment."""
    if numba.config.THREADING_LAYER not in ("default", "tbb", "safe", "threadsafe", "forksafe"):
        return
    try:
        files = importlib.metadata.files("tbb") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for file in files:
        if file.name in ("libtbb.so.12", "tbb12.dll"):
            try:
                ctypes.CDLL(str(file.locate()), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                log.info("tbb is installed but does not load: %s", error)
            return


def _layer() -> str:
    """Return the threading layer that Numba's threads were started with, by whomever, or nothing."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return ""


class _Pool:
    """Numba's threads, and what may be asked of them: each threading layer has its own limits."""

    def __init__(self) -> None:
        self.layer = "none"  # until the first parallel call
        self._loop: _ParallelLoop | None = None
        self._starting = threading.RLock()
        self._busy = threading.RLock()
        self._users: set[int] = set()  # the threads that have been in the parallel loop; 0: unknown ones
        self._in_company = False  # whether there were other threads at the last fork
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before_fork,
                after_in_parent=self._starting.release,
                after_in_child=self._after_fork,
            )

    def _before_fork(self) -> None:
        self._in_company = len(sys._current_frames()) > 1
        self._starting.acquire()

    def _after_fork(self) -> None:
        """Compute on one thread in a child of a process that had threads of Numba's, with an exception.

        That is where tbb could end its workers before the fork: where the forking thread is the one that
        started them, and no other may have been using them, for nbbn or for anything else. Otherwise the
        child has what they left behind, their locks too, and not them.
        """
        alone = self._users == {threading.get_ident()} and not self._in_company
        layer = _layer()
        if layer and not (layer == "tbb" and alone):
            self.layer = "serial"
        self._starting.release()

    def start(self) -> None:
        """Start the threads, with tbb where it is installed. Not done at import."""
        with self._starting:
            if self.layer == "none":
                self._users.add(0 if _layer() else threading.get_ident())
                _load_tbb()
                try:
                    numba.get_num_threads()
                    self.layer = _layer()
                except ValueError as error:
                    # The layer that NUMBA_THREADING_LAYER asks for is not there.
                    log.warning("nbbn runs on one thread: %s", error)
                    self.layer = "serial"
        if self.layer != "serial":
            self._parallel()

    def _parallel(self) -> _ParallelLoop:
        if self._loop is None:
            self._loop = undisturbed(_parallel_loop)
        return self._loop

    def threads(self) -> int:
        """Return how many threads the next call may use."""
        if self.layer == "none":
            self.start()
        if self.layer == "serial":
            return 1
        # Not numba.get_num_threads, which takes a lock that is shared with all forked processes: one that
        # is killed meanwhile, as workers are, would never give it back.
        return int(numba.np.ufunc.parallel._get_num_threads())

    def run(self, kernel: Entry, threads: int, tasks: int, call: int, *then: Step) -> None:
        """Run `tasks` tasks of `kernel` on so many threads, and `then` some steps, as `in_one`."""
        if threads == 1 and not then:
            kernel.run(0, tasks, call)
            return
        alone = self.layer == "workqueue" and threads > 1
        # workqueue aborts the process when two threads enter it.
        if alone and not self._busy.acquire(blocking=False):
            alone, threads = False, 1
        try:
            in_one(self.step(kernel, threads, tasks, call), *then)
        finally:
            if alone:
                self._busy.release()

    def step(self, kernel: Entry, threads: int, tasks: int, call: int) -> Step:
        """Return what runs `tasks` tasks of `kernel` on so many threads; this thread may be one of them."""
        if threads == 1:
            return partial(kernel.run, 0, tasks, call)
        self.enter()
        # The other layers give each thread its part beforehand.
        shares = min(tasks, threads * SHARES) if self.layer == "tbb" else threads
        return self._parallel().over(kernel.address, threads, shares, tasks, call)

    def enter(self) -> None:
        """Note that this thread runs something on several."""
        self._users.add(threading.get_ident())


pool = _Pool()
