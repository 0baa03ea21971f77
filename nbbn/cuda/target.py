"""The only place that knows Numba's CUDA target, its intrinsics and the driver.

A kernel is a plain function of a module, which calls parts (`part`), formulas and the intrinsics below.
`specialize` makes it a kernel for one type and one width of access: Numba compiles that to PTX, the
linker of `cuda.core` to machine code, which is kept on disk and launched. No step before the launch
needs a device.

Under Numba's CUDA simulator (NUMBA_ENABLE_CUDASIM=1) the same functions run as Python. Addresses are
then those of host memory, and every intrinsic has a twin that reads and writes there.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import re
import sys
import tempfile
import threading
import types as python
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.core.dispatcher import Dispatcher

from nbbn import formulas
from nbbn.compiler import MAGIC32, MAGIC64, no_garbage_collection, sources_version
from nbbn.errors import DeviceError

log = logging.getLogger("nbbn")

SIMULATED = bool(numba.config.ENABLE_CUDASIM)

Names = tuple[tuple[str, Any], ...]  # what a kernel is compiled for

# What tells the intrinsics below that elements are stored in 16 bits: as float16, and, for want of such a
# type in NumPy, as bfloat16. In registers they are float32.
HALVES = (np.float16, np.uint16)

# --- intrinsics, and what stands for them in the simulator -------------------------------------------

if SIMULATED:
    _CELLS: dict[Any, Any] = {
        np.float32: ctypes.c_float,
        np.float64: ctypes.c_double,
        np.int64: ctypes.c_int64,
        np.uint32: ctypes.c_uint32,
        np.uint16: ctypes.c_uint16,
        np.uint8: ctypes.c_uint8,
    }

    def load(address: int, stored: Any) -> Any:
        """Return the number at an address; float32 if it is stored in 16 bits."""
        bits = stored if stored not in HALVES else np.uint16
        return widened(bits(_CELLS[bits].from_address(int(address)).value), stored)

    def store(address: int, value: Any) -> None:
        """Write a number, or the bits of one, to an address."""
        _CELLS[type(value)].from_address(int(address)).value = value

    def load_vector(address: int, stored: Any, count: int) -> tuple[Any, ...]:
        """Return `count` numbers side by side; the address is a multiple of the bytes that they take."""
        size = np.dtype(stored).itemsize
        assert address % (count * size) == 0
        return tuple(load(address + k * size, stored) for k in range(count))

    def store_vector(address: int, values: tuple[Any, ...]) -> None:
        """Write numbers, or their bits, side by side at a multiple of the bytes that they take."""
        size = values[0].itemsize
        assert address % (len(values) * size) == 0 and len(values) * size in (8, 16)
        for k, value in enumerate(values):
            store(address + k * size, value)

    def widened(bits: Any, stored: Any) -> Any:
        """Return the number that is stored so."""
        if stored is np.float16:
            return np.float32(bits.view(np.float16))
        if stored is np.uint16:
            return np.uint32(int(bits) << 16).view(np.float32)
        return bits

    def rounded(value: Any, stored: Any) -> Any:
        """Return what is stored of a float32, or of a float64 where that is stored: the nearest number."""
        if stored is np.float16:
            return np.float16(value).view(np.uint16)
        if stored is np.uint16:
            word = int(np.float32(value).view(np.uint32))
            if value != value:
                return np.uint16(word >> 16 | 0x40)
            return np.uint16((word + 0x7FFF + (word >> 16 & 1)) >> 16)
        return stored(value)

    def unrounded(value: Any, stored: Any) -> Any:
        """Return the same of a number that was loaded: nothing has to be rounded."""
        return rounded(value, stored)

    def carried(value: Any, stored: Any) -> Any:
        """Return a result as it is carried to where it is stored: for 16 bits a float32, rounded to odd."""
        if stored not in HALVES:
            return value
        near = np.float32(value)
        if near == value or near != near:
            return near
        if abs(float(near)) > abs(float(value)):
            near = np.nextafter(near, np.float32(0))
        return np.uint32(int(near.view(np.uint32)) | 1).view(np.float32)

    def add_release(address: int, value: Any) -> Any:
        """Add to a uint32 that other blocks read, after all that was stored before; return the old one."""
        before = load(address, np.uint32)
        store(address, np.uint32((int(before) + int(value)) & 0xFFFFFFFF))
        return before

    def load_acquire(address: int) -> Any:
        """Return a uint32 that other blocks write; what they stored before can be read after."""
        return load(address, np.uint32)

else:
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic

    _GLOBAL = 1  # the address space of global memory

    def _place(builder, address, element):
        return builder.inttoptr(address, element.as_pointer(_GLOBAL))

    def _is_half(stored):
        return stored.dtype in (types.float16, types.uint16)

    def _value_type(stored):
        return types.float32 if _is_half(stored) else stored.dtype

    def _bits_type(stored):
        return types.uint16 if _is_half(stored) else stored.dtype

    def _number(value):
        return ir.Constant(ir.IntType(32), value)

    def _widened(builder, bits, stored):
        """Return the number that is stored so."""
        if stored.dtype == types.float16:
            return builder.fpext(builder.bitcast(bits, ir.HalfType()), ir.FloatType())
        if stored.dtype == types.uint16:
            word = builder.shl(builder.zext(bits, ir.IntType(32)), _number(16))
            return builder.bitcast(word, ir.FloatType())
        return bits

    def _lane(builder, vector, k):
        return builder.extract_element(vector, _number(k))

    @intrinsic
    def load(typingctx, address, stored):
        """Return the number at an address; float32 if it is stored in 16 bits."""

        def codegen(context, builder, signature, args):
            place = _place(builder, args[0], context.get_data_type(_bits_type(stored)))
            return _widened(builder, builder.load(place), stored)

        return _value_type(stored)(types.int64, stored), codegen

    @intrinsic
    def store(typingctx, address, value):
        """Write a number, or the bits of one, to an address."""

        def codegen(context, builder, signature, args):
            builder.store(args[1], _place(builder, args[0], context.get_data_type(value)))
            return context.get_dummy_value()

        return types.void(types.int64, value), codegen

    # Elements of 16 bits are moved in pairs: no access takes eight of anything.

    @intrinsic(prefer_literal=True)
    def load_vector(typingctx, address, stored, count):
        """Return `count` numbers side by side; the address is a multiple of the bytes that they take."""
        if not isinstance(count, types.IntegerLiteral):
            return None
        number = count.literal_value
        size = _bits_type(stored).bitwidth // 8
        result = types.UniTuple(_value_type(stored), number)

        def codegen(context, builder, signature, args):
            if _is_half(stored):
                kind = ir.VectorType(ir.IntType(32), number // 2)
            else:
                kind = ir.VectorType(context.get_data_type(stored.dtype), number)
            vector = builder.load(_place(builder, args[0], kind), align=number * size)
            lanes = [_lane(builder, vector, k) for k in range(kind.count)]
            if _is_half(stored):
                halves = [builder.lshr(lane, _number(16 * h)) for lane in lanes for h in range(2)]
                bits = [builder.trunc(half, ir.IntType(16)) for half in halves]
                lanes = [_widened(builder, one, stored) for one in bits]
            return context.make_tuple(builder, result, lanes)

        return result(types.int64, stored, count), codegen

    @intrinsic
    def store_vector(typingctx, address, values):
        """Write numbers, or their bits, side by side at a multiple of the bytes that they take."""
        # float64 by mistake would write 32 bytes
        if not isinstance(values, types.UniTuple) or values.count * values.dtype.bitwidth not in (64, 128):
            return None
        size = values.count * values.dtype.bitwidth // 8

        def codegen(context, builder, signature, args):
            lanes = [builder.extract_value(args[1], k) for k in range(values.count)]
            if values.dtype == types.uint16:
                words = [builder.zext(lane, ir.IntType(32)) for lane in lanes]
                pairs = zip(words[::2], words[1::2], strict=True)
                lanes = [builder.or_(low, builder.shl(high, _number(16))) for low, high in pairs]
            kind = ir.VectorType(lanes[0].type, len(lanes))
            vector = ir.Constant(kind, ir.Undefined)
            for k, lane in enumerate(lanes):
                vector = builder.insert_element(vector, lane, _number(k))
            builder.store(vector, _place(builder, args[0], kind), align=size)
            return context.get_dummy_value()

        return types.void(types.int64, values), codegen

    @intrinsic
    def widened(typingctx, bits, stored):
        """Return the number that is stored so."""

        def codegen(context, builder, signature, args):
            return _widened(builder, args[0], stored)

        return _value_type(stored)(_bits_type(stored), stored), codegen

    @intrinsic
    def rounded(typingctx, value, stored):
        """Return what is stored of a float32, or of a float64 where that is stored: the nearest number."""

        def codegen(context, builder, signature, args):
            value = args[0]
            if stored.dtype == types.float16:
                return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
            if stored.dtype == types.uint16:
                # Ties to even; a NaN stays one. Not all GPUs have an instruction for it.
                word = builder.bitcast(value, ir.IntType(32))
                odd = builder.and_(builder.lshr(word, _number(16)), _number(1))
                near = builder.add(word, builder.add(odd, _number(0x7FFF)))
                nan = builder.fcmp_unordered("uno", value, value)
                near = builder.select(nan, builder.or_(word, _number(0x400000)), near)
                return builder.trunc(builder.lshr(near, _number(16)), ir.IntType(16))
            return value

        return _bits_type(stored)(_value_type(stored), stored), codegen

    @intrinsic
    def unrounded(typingctx, value, stored):
        """Return the same of a number that was loaded: nothing has to be rounded."""

        def codegen(context, builder, signature, args):
            value = args[0]
            if stored.dtype == types.float16:
                return builder.bitcast(builder.fptrunc(value, ir.HalfType()), ir.IntType(16))
            if stored.dtype == types.uint16:
                word = builder.bitcast(value, ir.IntType(32))
                return builder.trunc(builder.lshr(word, _number(16)), ir.IntType(16))
            return value

        return _bits_type(stored)(_value_type(stored), stored), codegen

    @intrinsic
    def carried(typingctx, value, stored):
        """Return a result as it is carried to where it is stored: for 16 bits a float32, rounded to odd.

        Such a one is rounded to 16 bits as the float64 itself would be.
        """

        def codegen(context, builder, signature, args):
            if not _is_half(stored):
                return args[0]
            wide = ir.IntType(64)
            kind = ir.FunctionType(ir.FloatType(), [ir.DoubleType()])
            toward_zero = ir.InlineAsm(kind, "cvt.rz.f32.f64 $0, $1;", "=f,d")
            near = builder.call(toward_zero, args[:1])
            # What a float32 has no room for; where it is subnormal that is more, and rounded twice.
            rest = builder.and_(builder.bitcast(args[0], wide), ir.Constant(wide, (1 << 29) - 1))
            inexact = builder.zext(builder.icmp_unsigned("!=", rest, ir.Constant(wide, 0)), ir.IntType(32))
            return builder.bitcast(
                builder.or_(builder.bitcast(near, ir.IntType(32)), inexact), ir.FloatType()
            )

        return _value_type(stored)(types.float64 if _is_half(stored) else stored.dtype, stored), codegen

    @intrinsic
    def add_release(typingctx, address, value):
        """Add to a uint32 that other blocks read, after all that was stored before; return the old one."""

        def codegen(context, builder, signature, args):
            word = ir.IntType(32)
            kind = ir.FunctionType(word, [ir.IntType(64), word])
            text, constraints = "atom.add.acq_rel.gpu.global.u32 $0, [$1], $2;", "=r,l,r,~{memory}"
            return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), args)

        return types.uint32(types.int64, types.uint32), codegen

    @intrinsic
    def load_acquire(typingctx, address):
        """Return a uint32 that other blocks write; what they stored before can be read after."""

        def codegen(context, builder, signature, args):
            kind = ir.FunctionType(ir.IntType(32), [ir.IntType(64)])
            text, constraints = "ld.acquire.gpu.global.u32 $0, [$1];", "=r,l,~{memory}"
            return builder.call(ir.InlineAsm(kind, text, constraints, side_effect=True), args)

        return types.uint32(types.int64), codegen


# --- kernels for one type ----------------------------------------------------------------------------


def part(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as a part of kernels."""
    function.is_part = True  # type: ignore[attr-defined]
    return function


def _fma(a: Any, b: Any, c: Any) -> Any:
    """A · b + c, rounded once."""
    single = type(a) is type(b) is type(c) is np.float32
    try:
        (x, u), (y, v), (z, w) = (float(number).as_integer_ratio() for number in (a, b, c))
        near = (x * y * w + z * u * v) / (u * v * w)  # the float64 that is nearest to the fraction
        return np.float32(near) if single else np.float64(near)
    except (OverflowError, ValueError):  # infinite or NaN, which fractions are not
        return a * b + c


def _two_to(z: Any) -> Any:
    if z != z:
        return z
    exponent = int(z - (MAGIC32 if type(z) is np.float32 else MAGIC64))
    return type(z)(2.0**exponent if exponent > (-127 if type(z) is np.float32 else -1023) else 0.0)


# Python's own functions raise where the machine returns an infinity or NaN.
_SIMULATED_NAMES = {
    "fma": _fma,
    "at_most_zero": lambda z, a, b: a if z <= 0 else b,
    "like": lambda z, value: type(z)(value),
    "is_double": lambda z: type(z) is not np.float32,
    "two_to": _two_to,
    "power_above": lambda z: np.ldexp(type(z)(1.0), np.frexp(z)[1]),
    "int32": int,  # NumPy's would stay one in a sum with an address
    "math": python.SimpleNamespace(sqrt=np.sqrt, ldexp=np.ldexp, frexp=np.frexp, fabs=np.abs),
}


def _twins(scope: dict[str, Any]) -> dict[str, Any]:
    """Return the names of a module with its formulas and parts made callable from a kernel.

    Numba takes a helper's `fastmath`, whatever it holds, to permit inexact division on CUDA: the twins have
    none. They are inlined by Numba, since anything else it compiles for the device that there is.
    """
    twin = dict(scope)
    for name, value in scope.items():
        if isinstance(value, Dispatcher):
            function = _formulas()[value.__name__]
        elif getattr(value, "is_part", False):
            function = python.FunctionType(value.__code__, twin, value.__name__, value.__defaults__)
        else:
            continue
        twin[name] = function if SIMULATED else numba.njit(inline="always")(function)
    return twin


@functools.cache
def _formulas() -> dict[str, Any]:
    scope: dict[str, Any] = {**vars(formulas), **(_SIMULATED_NAMES if SIMULATED else {})}
    names = [name for name, value in scope.items() if isinstance(value, Dispatcher)]
    functions = {name: python.FunctionType(scope[name].py_func.__code__, scope, name) for name in names}
    for name in names:
        scope[name] = functions[name] if SIMULATED else numba.njit(inline="always")(functions[name])
    return functions


def specialize(kernel: Callable[..., Any], names: Names) -> Callable[..., Any]:
    """Return a kernel with some of its module's names set to other values: a type, a number of threads."""
    scope = _scope(kernel.__module__, names)
    return python.FunctionType(kernel.__code__, scope, kernel.__name__)


@functools.cache
def _scope(module: str, names: Names) -> dict[str, Any]:
    simulated = _SIMULATED_NAMES if SIMULATED else {}
    scope = {**vars(sys.modules[module]), **simulated, **dict(names)}
    if activation := scope["ACTIVATION"]:
        scope["ACTIVATES"] = True
        scope["activation"], scope["activation_gradient"], _ = formulas.ACTIVATIONS[activation]
    return _twins(scope)


# --- machine code ------------------------------------------------------------------------------------


def signature(arguments: tuple[Any, ...]) -> Any:
    """Return the types of arguments: ints, floats, and named tuples of them."""
    return numba.core.types.void(*[_type(argument) for argument in arguments])


def _type(argument: Any) -> Any:
    from numba.core import types

    if isinstance(argument, tuple):
        members = [_type(member) for member in argument]
        if all(member == members[0] for member in members):
            return types.NamedUniTuple(members[0], len(members), type(argument))
        return types.NamedTuple(members, type(argument))
    return types.float64 if isinstance(argument, float) else types.int64


# PTX for this compute capability is linked for any later one; nothing here needs more.
PORTABLE = (8, 0)
RESIDENT = 512  # threads of a multiprocessor for which there must be registers: 128 for each


@no_garbage_collection()
def ptx(kernel: Callable[..., Any], kinds: Any, compute: tuple[int, int], threads: int) -> str:
    """Compile a specialized kernel to PTX, under its own name. Needs no device."""
    from numba import cuda

    text, _ = cuda.compile(
        kernel,
        kinds,
        cc=min(compute, PORTABLE),
        device=False,
        abi="numba",
        output="ptx",
        launch_bounds=(threads, max(1, RESIDENT // threads)),
    )
    entry = re.search(r"\.visible \.entry (\w+)", text)
    assert entry is not None
    text = text.replace(entry[1], kernel.__name__)
    return re.sub(r"^\.common \.global .*NumbaEnv.*;\n", "", text, flags=re.M)


class Machine(NamedTuple):
    """Machine code, and what it takes to run."""

    code: bytes
    registers: int
    stack: int
    spills: int


def link(text: str, compute: tuple[int, int]) -> Machine:
    """Turn PTX into machine code for GPUs of one compute capability. Needs no device."""
    from cuda.core import Linker, LinkerOptions, ObjectCode

    options = LinkerOptions(arch=f"sm_{compute[0]}{compute[1]}", ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(text.encode()), options=options)
    code = bytes(linker.link("cubin").code)
    found = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        linker.get_info_log(),
        re.S,
    )
    assert found is not None
    stack, stores, loads, registers = map(int, found.groups())
    return Machine(code, registers, stack, stores + loads)


def _directory() -> pathlib.Path | None:
    from numba.core.caching import FunctionCache

    try:
        return pathlib.Path(FunctionCache(_directory).cache_path)
    except (OSError, RuntimeError) as error:
        log.info("CUDA kernels are not cached on disk: %s", error)
        return None


def machine_code(kernel: Callable[..., Any], names: Names, kinds: Any, compute: tuple[int, int]) -> bytes:
    """Return a kernel's machine code, from the cache on disk where it is there."""
    threads = dict(names)["THREADS"]
    versions = [importlib.metadata.version(package) for package in ("numba", "numba-cuda", "cuda-core")]
    about = repr((sources_version(), versions, kernel.__name__, names, str(kinds), compute))
    directory = _directory()
    file = None
    if directory is not None:
        file = directory / f"nbbn-{hashlib.sha256(about.encode()).hexdigest()[:32]}.cubin"
        with contextlib.suppress(OSError):
            return file.read_bytes()
    code = link(ptx(specialize(kernel, names), kinds, compute, threads), compute).code
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=directory, delete=False) as written:
                written.write(code)
            os.replace(written.name, file)  # all of it, or nothing
        except OSError as error:
            log.info("%s is not cached on disk: %s", kernel.__name__, error)
    return code


# --- devices -----------------------------------------------------------------------------------------


@functools.cache
def why_not() -> str | None:
    """Return why there is no computing on a GPU here; None where there is."""
    if SIMULATED:
        return None
    try:
        importlib.metadata.version("numba-cuda")
    except importlib.metadata.PackageNotFoundError:
        return "numba-cuda is not installed (it comes with nbbn's extra 'cuda')"
    try:
        from cuda.bindings import driver

        # Asked first: cuda.core, without a driver, would hang later on.
        status = driver.cuInit(0)[0]
        count = driver.cuDeviceGetCount()[1] if status == driver.CUresult.CUDA_SUCCESS else 0
    except (ImportError, RuntimeError) as error:
        return f"there is no NVIDIA driver, or it is not found ({' '.join(str(error).split())[:200]})"
    if status != driver.CUresult.CUDA_SUCCESS:
        return f"the NVIDIA driver reports {status.name}"
    return None if count else "there is no NVIDIA GPU"


class Properties(NamedTuple):
    """What a plan has to know of a device."""

    compute: tuple[int, int]
    multiprocessors: int
    shared: int  # bytes of shared memory that a block may have
    cooperative: bool  # whether blocks that all run at once can be launched


@functools.cache
def properties(device: int) -> Properties:
    """Return what there is to know of device number `device`."""
    if SIMULATED:
        return Properties((9, 0), 4, 1 << 14, False)  # it runs one block after the other
    if (reason := why_not()) is not None:
        raise DeviceError(f"nbbn cannot compute on a GPU here: {reason}")
    from cuda.core import Device

    found = Device(device)
    known = found.properties
    return Properties(
        tuple(found.compute_capability),
        known.multiprocessor_count,
        known.max_shared_memory_per_block_optin,
        bool(known.cooperative_launch),
    )


@contextlib.contextmanager
def current(device: int) -> Iterator[None]:
    """Make a device the current one of this thread."""
    if SIMULATED:
        yield
        return
    from cuda.bindings import driver
    from cuda.core import Device

    before = driver.cuCtxGetCurrent()[1]
    Device(device).set_current()  # its primary context, as all frameworks use it
    try:
        yield
    finally:
        driver.cuCtxSetCurrent(before)


class Memory:
    """Memory on a device that nbbn works in, allocated and freed in the order of a stream."""

    def __init__(self, nbytes: int, zeros: int, stream: int) -> None:
        """Allocate; `zeros` words of 4 bytes at the beginning are 0."""
        self._stream = stream
        if SIMULATED:
            self._kept = np.full(nbytes + 16, 0xFF, np.uint8)  # NaN, to show what is read unwritten
            start = -self._kept.__array_interface__["data"][0] % 16
            self._kept[start : start + 4 * zeros] = 0
            self.address = self._kept[start:].__array_interface__["data"][0]
            return
        from cuda.bindings import driver

        status, pointer = driver.cuMemAllocAsync(nbytes, stream)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise MemoryError(f"{nbytes} bytes on the GPU: {status.name}")
        self.address = int(pointer)
        if zeros:
            try:
                _checked(driver.cuMemsetD32Async(self.address, 0, zeros, stream))
            except DeviceError:
                self.free()
                raise

    def free(self) -> None:
        """Free the memory as soon as the stream has come here."""
        if not SIMULATED:
            from cuda.bindings import driver

            driver.cuMemFreeAsync(self.address, self._stream)


class Shared:
    """Memory on a device that others get too: it is freed when nobody has it any more.

    Others use it on streams of their own, and may be done with it on the host only: what they have given the
    device by then comes first.
    """

    def __init__(self, nbytes: int, device: int, stream: int) -> None:
        self._device, self._stream = device, stream
        with current(device):
            self._memory = Memory(max(nbytes, 1), 0, stream)
        self.address = self._memory.address

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # `_memory` is missing where its allocation failed.
        memory = self.__dict__.pop("_memory", None)
        if SIMULATED or memory is None or ending():
            return
        try:
            from cuda.bindings import driver

            with current(self._device), _event() as event:
                _checked(driver.cuCtxRecordEvent(driver.cuCtxGetCurrent()[1], event))
                _checked(driver.cuStreamWaitEvent(self._stream, event, 0))
                memory.free()
        except Exception as error:  # a graph is being captured, or this process was forked
            log.warning("memory on GPU %d is not freed: %s", self._device, error)


def write(address: int, values: np.ndarray, device: int, stream: int) -> None:
    """Copy few values to a device, in the order of a stream."""
    if SIMULATED:
        ctypes.memmove(address, values.ctypes.data, values.nbytes)
        return
    from cuda.bindings import driver

    if values.nbytes:
        with current(device):
            _checked(driver.cuMemcpyHtoDAsync(address, values.ctypes.data, values.nbytes, stream))


@contextlib.contextmanager
def _event() -> Iterator[Any]:
    from cuda.bindings import driver

    event = _checked(driver.cuEventCreate(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING))
    try:
        yield event
    finally:
        driver.cuEventDestroy(event)  # once nobody waits for it


def wait(stream: int, other: int) -> None:
    """Let what comes on a stream of the current device wait for what is on another one; the host does not."""
    from cuda.bindings import driver

    with _event() as event:
        _checked(driver.cuEventRecord(event, other))
        _checked(driver.cuStreamWaitEvent(stream, event, 0))


def hold_back(device: int, stream: int) -> None:
    """Let all that comes on any stream of a device wait for what is on this one; the host does not."""
    from cuda.bindings import driver

    with current(device), _event() as event:
        _checked(driver.cuEventRecord(event, stream))
        _checked(driver.cuCtxWaitEvent(driver.cuCtxGetCurrent()[1], event))


def upload(array: np.ndarray) -> Any:
    """Copy a small array to the current device for good; return something that has its `address`."""
    if SIMULATED:
        kept = np.ascontiguousarray(array)
        return python.SimpleNamespace(kept=kept, address=kept.__array_interface__["data"][0])
    from cuda.bindings import driver

    memory = python.SimpleNamespace(address=int(_checked(driver.cuMemAlloc(array.nbytes))))
    _checked(driver.cuMemcpyHtoD(memory.address, array.ctypes.data, array.nbytes))
    return memory


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise DeviceError(f"the NVIDIA driver reports {status.name}")
    return values[0] if values else None


_lock = threading.RLock()


class Launcher:
    """A kernel, ready to be launched on one device."""

    def __init__(self, kernel: Callable[..., Any], names: Names, kinds: Any, device: int) -> None:
        self._threads = dict(names)["THREADS"]
        # Teams wait for each other: all of their blocks have to run at once.
        self._cooperative = bool(dict(names)["TEAMS"])
        if SIMULATED:
            from numba import cuda

            self._simulated = cuda.jit(specialize(kernel, names))
            return
        from cuda.bindings import driver
        from cuda.core import LaunchConfig, ObjectCode, launch

        self._config, self._launch = LaunchConfig, launch
        self._configs: dict[tuple[int, int], Any] = {}
        self._code = ObjectCode.from_cubin(machine_code(kernel, names, kinds, properties(device).compute))
        self._kernel = self._code.get_kernel(kernel.__name__)
        # What the kernel does not have of its own, blocks may have for what they keep.
        attributes, handle = driver.CUfunction_attribute, int(self._kernel.handle)
        own = _checked(
            driver.cuKernelGetAttribute(attributes.CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES, handle, device)
        )
        limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuKernelSetAttribute(limit, properties(device).shared - own, handle, device))

    def __call__(self, blocks: int, shared: int, stream: int, arrays: Any, *others: tuple[Any, ...]) -> None:
        """Launch so many blocks with so many bytes of shared memory each, and return at once.

        The arguments are tuples of numbers, the first of which can give them `flat`.
        """
        if SIMULATED:
            with _simulation, np.errstate(all="ignore"):
                self._simulated[blocks, self._threads, 0, shared](*_numbers((arrays, *others)))
            return
        try:
            config = self._configs[blocks, shared]
        except KeyError:
            config = self._config(
                grid=blocks,
                block=self._threads,
                shmem_size=shared,
                is_cooperative=self._cooperative,
            )
            self._configs[blocks, shared] = config
        numbers = (number for other in others for number in other)
        self._launch(_stream(stream), config, self._kernel, *arrays.flat(), *numbers)


_simulation = threading.Lock()  # the simulator runs one kernel at a time


@functools.lru_cache(maxsize=256)
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


def _numbers(arguments: tuple[Any, ...]) -> list[Any]:
    """Return floats as NumPy has them, which divide by zero without raising."""
    return [
        type(argument)(*_numbers(argument))
        if isinstance(argument, tuple)
        else np.float64(argument)
        if isinstance(argument, float)
        else argument
        for argument in arguments
    ]


def launcher(kernel: Callable[..., Any], names: Names, kinds: Any, device: int) -> Launcher:
    """Return a kernel compiled for these names and argument types, once for each device."""
    with _lock:
        return _launcher(kernel, names, kinds, device)


_launcher = functools.cache(Launcher)
