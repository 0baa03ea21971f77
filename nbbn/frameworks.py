"""Arrays of other libraries: what they are, where they lie, and how results of their kind are made.

A library is looked for among those that the program has imported (`sys.modules`); none is imported here.
An array is read through ``__dlpack__``, or, where it has none, through ``__cuda_array_interface__``. What
comes out is a `View`: a NumPy array over the same memory, so that all below needs to know one kind only.

A new framework: a class here, and its place in FRAMEWORKS.
"""

import ctypes
import functools
import importlib
import itertools
import math
import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from nbbn import dlpack, memory
from nbbn.dlpack import LEGACY_STREAM, NO_ORDER, all_memory
from nbbn.dtypes import BFLOAT16, NAMES, STORAGES, Storage, storage_of
from nbbn.errors import DeviceError

Array = Any  # of one of these libraries, or of another one with `__dlpack__`
CPU = "cpu"
SUPPORTED = "an array of NumPy, PyTorch, JAX, CuPy or Numba"

# All memory, as a buffer, which must not begin at 0: NumPy would take that for no buffer.
_BEGIN = 64
_buffer = (ctypes.c_char * ((1 << 48) - _BEGIN)).from_address(_BEGIN)


class View(np.ndarray):
    """Another library's memory. On a GPU it says where and how it lies, and is never to be read.

    Attributes
    ----------
    owner : object
        Keeps the memory alive. Of a result it is the array that the caller gets.
    """

    owner: Any

    def __repr__(self) -> str:
        return f"View(shape={self.shape}, strides={self.strides}, dtype={type_name(self.dtype)})"

    __str__ = __repr__


def view(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, owner: Any
) -> np.ndarray:
    """Return a view of memory at an address; strides in bytes. Without elements it may lie at 0."""
    array = View(shape, dtype, _buffer, max(address - _BEGIN, 0), strides)  # type: ignore[arg-type]
    array.owner = owner
    return array


def kind_of(value: Any) -> str:
    """Return how a value's type is called in an error."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def strides_like(x: np.ndarray) -> tuple[int, ...]:
    """Return the strides of an array without gaps that has x's order of axes in memory (order "K")."""
    strides = [0] * x.ndim
    step = x.itemsize
    # From the fastest axis to the slowest.
    for d in sorted(range(x.ndim), key=lambda d: (abs(x.strides[d]), -d)):
        strides[d] = step
        step *= max(x.shape[d], 1)
    return tuple(strides)


# --- reading an array ------------------------------------------------------------------------------

# DLPack's types: a code, the bits of an element, and the lanes of a vector, in 8, 8 and 16 bits.
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_STORAGES = {s.dlpack | 8 * s.dtype.itemsize << 8 | 1 << 16: s for s in STORAGES}
_KINDS: dict[Storage | None, int] = {storage: kind for kind, storage in _STORAGES.items()}
_READ_ONLY, _COPIED = 1, 2  # DLPack's flags
# Where DLPack's devices are for nbbn. Pinned memory (3) is the host's, managed memory (13) a GPU's.
_DEVICES = {dlpack.CPU: CPU, dlpack.CUDA: "cuda", 3: CPU, 13: "cuda"}


@functools.cache
def _named(kind: Any) -> np.dtype | None:
    """Return NumPy's type for a library's own (``torch.float32``), if it is computed with."""
    return next((s.dtype for s in STORAGES if s.name == str(kind).rpartition(".")[2]), None)


def type_name(dtype: np.dtype) -> str:
    """Return how the type of an array's elements is called."""
    storage = storage_of(dtype)
    return str(dtype) if storage is None else storage.name


def unsupported(name: str, dtype: Any) -> TypeError:
    """Return the error for an array of a type that is not computed with."""
    return TypeError(f"{name} must be {NAMES} in native byte order, got dtype {dtype}")


def _refused(name: str, value: Any, error: object) -> TypeError:
    reason = " ".join(str(error).split())
    return TypeError(f"{name} cannot be used where it lies, got {kind_of(value)}: {reason}")


def device_of(name: str, value: Any) -> str:
    """Return "cpu" or "cuda:N" for anything that says where it is."""
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        try:
            kind, index = value.__dlpack_device__()
        except Exception as error:
            raise _refused(name, value, error) from error
        device = _DEVICES.get(int(kind))
        if device is None:
            raise DeviceError(
                f"{name} must lie on the CPU or on a CUDA device, got {kind_of(value)} on a device "
                f"of DLPack's type {int(kind)}"
            )
        return device if device == CPU else f"{device}:{int(index)}"
    if hasattr(value, "__cuda_array_interface__"):
        return f"cuda:{_device_at(name, value)}"
    raise TypeError(f"{name} must be {SUPPORTED}, got {kind_of(value)}")


def _device_at(name: str, value: Any) -> int:
    """Return which GPU the memory of an array is on that does not say so."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
        attribute = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        code, index = driver.cuPointerGetAttribute(attribute, value.__cuda_array_interface__["data"][0])
    except Exception as error:
        raise DeviceError(
            f"{name} does not say on which device it is, nor does the driver: {error}"
        ) from error
    if code != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(f"{name} does not say on which device it is, nor does the driver: {code}")
    return int(index)


def read(name: str, value: Any, stream: int | None) -> np.ndarray:
    """Return a view of an array, which keeps it alive, or raise.

    `stream` is where it will be used, as DLPack numbers streams; None on the CPU.
    """
    if hasattr(value, "__dlpack__"):
        return _read_dlpack(name, value, stream)
    return _read_cuda_array_interface(name, value, stream)


def _dtype_named(value: Any, kind: int) -> str:
    """Return how the type of an array's elements is called, which DLPack has numbered."""
    code = _CODES.get(kind & 0xFF)
    return str(getattr(value, "dtype", "unknown")) if code is None else f"{code}{kind >> 8 & 0xFF}"


def _read_dlpack(name: str, value: Any, stream: int | None) -> np.ndarray:
    options = {} if stream is None else {"stream": stream}
    try:
        try:
            capsule = value.__dlpack__(max_version=(1, 0), **options)
        except TypeError:
            capsule = value.__dlpack__(**options)  # a producer of before version 1.0
        # The capsule is looked into and not consumed: when it dies, it gives the array back by itself.
        tag = dlpack.name(capsule)
        at, flags = dlpack.pointer(capsule, tag) >> 3, 0
    except Exception as error:
        raise _refused(name, value, error) from error
    if tag == b"dltensor_versioned":
        version, _, _, flags = all_memory[at : at + 4]
        at += 4
        if version & 0xFFFFFFFF != 1:
            raise _refused(name, value, f"it speaks version {version & 0xFFFFFFFF} of DLPack, not 1")
    elif tag != b"dltensor":
        raise _refused(name, value, f"its __dlpack__ returns a capsule named {tag!r}")
    data, _, kind, shape_at, strides_at, offset = all_memory[at : at + 6]
    ndim, kind = kind & 0xFFFFFFFF, kind >> 32 & 0xFFFFFFFF
    storage = _STORAGES.get(kind)
    if storage is None:
        raise unsupported(name, _dtype_named(value, kind))
    dtype = storage.dtype
    if flags & _COPIED:
        raise _refused(name, value, "its memory can only be had as a copy")
    shape = tuple(all_memory[shape_at >> 3 : (shape_at >> 3) + ndim])
    if strides_at:
        steps = all_memory[strides_at >> 3 : (strides_at >> 3) + ndim]
        strides = tuple([dtype.itemsize * step for step in steps])
    else:
        strides = _contiguous(shape, dtype)
    if not data and 0 not in shape:
        raise _refused(name, value, "it has no memory")
    array = view(data + offset, shape, strides, dtype, (value, capsule))
    if flags & _READ_ONLY:
        array.flags.writeable = False
    return array


def _read_cuda_array_interface(name: str, value: Any, stream: int | None) -> np.ndarray:
    try:
        told = value.__cuda_array_interface__
        dtype, shape, (data, read_only) = np.dtype(told["typestr"]), tuple(told["shape"]), told["data"]
        strides, mask, theirs = told.get("strides"), told.get("mask"), told.get("stream")
    except Exception as error:
        raise _refused(name, value, error) from error
    if storage_of(dtype) is None:
        raise unsupported(name, dtype)
    if mask is not None:
        raise _refused(name, value, "it is masked")
    if not data and 0 not in shape:
        raise _refused(name, value, "it has no memory")
    if theirs is not None and stream is not None and stream not in (NO_ORDER, theirs):
        _wait(name, theirs, stream)
    array = view(data or 0, shape, tuple(strides or _contiguous(shape, dtype)), dtype, value)
    if read_only:
        array.flags.writeable = False
    return array


def _lies(array: np.ndarray) -> tuple[int, tuple[int, ...], tuple[int, ...], np.dtype]:
    return array.__array_interface__["data"][0], array.shape, array.strides, array.dtype


def _contiguous(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, ...]:
    strides = [dtype.itemsize]
    for size in shape[:0:-1]:
        strides.append(strides[-1] * size)
    return tuple(strides[::-1]) if shape else ()


def _wait(name: str, theirs: int, stream: int) -> None:
    """Let what comes on one stream wait for what is on another one; the host waits for neither."""
    from nbbn.cuda import target

    try:
        target.wait(stream, theirs)
    except Exception as error:
        raise DeviceError(
            f"{name} is in use on stream {theirs}, which cannot be waited for: {error}"
        ) from error


# --- the frameworks --------------------------------------------------------------------------------


class Framework:
    """A kind of array: how it is told from others, and how one is made.

    This one knows nothing but the array API standard: it has results in the memory of the host, by the
    ``from_dlpack`` of an array's own namespace.
    """

    immutable = False
    has_current_stream = True  # on which all its arrays are; otherwise each one has its own
    has_hidden_streams = False  # that others cannot wait for, nor let them wait

    def owns(self, value: Any) -> bool:
        """Whether a value is an array of this framework."""
        return hasattr(value, "__dlpack__") or hasattr(value, "__cuda_array_interface__")

    def device(self, name: str, value: Any) -> str:
        """Return "cpu" or "cuda:N"."""
        return device_of(name, value)

    def check(self, name: str, value: Any) -> None:
        """Raise if an array has something about it that its memory does not tell."""

    def read(self, name: str, value: Any, stream: int | None) -> np.ndarray:
        """Return a view of an array, or raise; see `read`."""
        return read(name, value, stream)

    def stream(self, x: Any, index: int) -> int:
        """Return the stream on which x is used now: the address of a CUstream, 0 for the default one."""
        raise TypeError(f"x must be {SUPPORTED} on a GPU, got {kind_of(x)}: the result cannot be wrapped")

    def wrapper(self, x: Any) -> Any:
        """Return what makes an array of x's kind from a NumPy array, without copying, or raise."""
        try:
            return x.__array_namespace__().from_dlpack
        except AttributeError:
            raise TypeError(
                f"x must be {SUPPORTED}, or have the __array_namespace__ of the array API standard, got "
                f"{kind_of(x)}: the result cannot be wrapped"
            ) from None

    def empty_like(self, x: np.ndarray) -> np.ndarray:
        """Return an array in the memory of the host that `wrapper` takes, of x's shape and dtype."""
        return memory.empty_like(x)

    def host(self, value: Any) -> np.ndarray:
        """Return few numbers, of any type, in the memory of the host; those of a GPU are waited for."""
        return np.asarray(value)

    def statistics(self, values: np.ndarray) -> np.ndarray:
        """Return float64 numbers in the type that this framework has them in."""
        return values

    def empty(
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, index: int
    ) -> tuple[Any, int]:
        """Return a new array on a GPU, and its address. The strides, in bytes, leave no gaps."""
        raise NotImplementedError

    def on_gpu(self, values: np.ndarray, index: int) -> Any:
        """Return a copy of few values on a GPU."""
        raise NotImplementedError

    def given(self, array: Any) -> Any:
        """Return what the caller gets, of what `empty` or `on_gpu` returned, when the work is under way."""
        return array

    def rows(self, array: np.ndarray) -> Iterable[Any]:
        """Return the rows of a view of what `empty` or `on_gpu` returned, as arrays for the caller."""
        assert isinstance(array, View)
        return [array.owner[k] for k in range(array.shape[0])]

    def kept_rows(self, array: np.ndarray) -> Iterable[Any]:
        """Return the rows as float64 arrays for a later call."""
        return self.rows(array)


class Numpy(Framework):
    """NumPy: what everything is computed with on the CPU."""

    def owns(self, value: Any) -> bool:  # noqa: D102
        return isinstance(value, np.ndarray)

    def device(self, name: str, value: Any) -> str:  # noqa: D102
        return CPU


class Torch(Framework):
    """PyTorch tensors, on the CPU and on GPUs."""

    def owns(self, value: Any) -> bool:  # noqa: D102
        kind = getattr(sys.modules.get("torch"), "Tensor", None)
        return kind is not None and isinstance(value, kind)

    def device(self, name: str, value: Any) -> str:  # noqa: D102
        device = value.device
        if device.type == "cpu":
            return CPU
        if device.type == "cuda":
            return f"cuda:{device.index}"
        if device.type == "meta":
            raise _refused(name, value, "a meta tensor has no memory")
        raise DeviceError(f"{name} must lie on the CPU or on a CUDA device, got a tensor on {device}")

    def check(self, name: str, value: Any) -> None:  # noqa: D102
        if value.requires_grad:
            raise _refused(name, value, "it requires grad, which nbbn does not record; use its detach()")
        if value.is_neg():
            raise _refused(name, value, "its negative bit is set; use its resolve_neg()")
        if sys.modules["torch"].autograd.forward_ad.unpack_dual(value).tangent is not None:
            raise _refused(name, value, "it has a tangent, which nbbn does not record; use its detach()")

    def read(self, name: str, value: Any, stream: int | None) -> np.ndarray:
        """Return a view of a tensor, or raise.

        Where nothing has to wait for it, its own attributes say in a fifth of the time what DLPack says.
        """
        torch = sys.modules["torch"]
        dtype = _named(value.dtype)
        plain = type(value) is torch.Tensor and value.layout is torch.strided
        if dtype is None or not plain or stream not in (None, NO_ORDER):
            return read(name, value, stream)
        try:
            address, steps = value.data_ptr(), value.stride()
        except RuntimeError as error:  # inside of a transformation, or where there are no strides
            raise _refused(name, value, error) from error
        if not address:
            return read(name, value, stream)
        size, shape = dtype.itemsize, tuple(value.shape)
        last = value.storage_offset() + sum([(n - 1) * step for n, step in zip(shape, steps, strict=True)])
        if 0 not in shape and (last + 1) * size > value.untyped_storage().nbytes():
            raise _refused(name, value, "its storage has been made smaller than it is")
        return view(address, shape, tuple([size * step for step in steps]), dtype, value)

    def stream(self, x: Any, index: int) -> int:  # noqa: D102
        return int(sys.modules["torch"].cuda.current_stream(index).cuda_stream)

    def wrapper(self, x: Any) -> Any:  # noqa: D102
        return sys.modules["torch"].from_dlpack

    def host(self, value: Any) -> np.ndarray:  # noqa: D102
        return np.asarray(value.cpu())

    def empty(  # noqa: D102
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, index: int
    ) -> tuple[Any, int]:
        torch = sys.modules["torch"]
        steps = [stride // dtype.itemsize for stride in strides]
        array = torch.empty_strided(
            shape, steps, dtype=getattr(torch, type_name(dtype)), device=f"cuda:{index}"
        )
        return array, array.data_ptr()

    def on_gpu(self, values: np.ndarray, index: int) -> Any:  # noqa: D102
        return sys.modules["torch"].from_dlpack(values).to(f"cuda:{index}")


class Cupy(Framework):
    """CuPy arrays."""

    def owns(self, value: Any) -> bool:  # noqa: D102
        kind = getattr(sys.modules.get("cupy"), "ndarray", None)
        return kind is not None and isinstance(value, kind)

    def stream(self, x: Any, index: int) -> int:  # noqa: D102
        cuda = sys.modules["cupy"].cuda
        with cuda.Device(index):
            return int(cuda.get_current_stream().ptr)

    def host(self, value: Any) -> np.ndarray:  # noqa: D102
        return np.asarray(value.get())

    def empty(  # noqa: D102
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, index: int
    ) -> tuple[Any, int]:
        cupy = sys.modules["cupy"]
        if storage_of(dtype) is BFLOAT16:
            dtype = sys.modules["ml_dtypes"].bfloat16  # as CuPy has it
        axes = sorted(range(len(shape)), key=lambda d: (-strides[d], d))
        with cupy.cuda.Device(index):
            array = cupy.empty([shape[d] for d in axes], dtype)
        array = array.transpose([int(d) for d in np.argsort(axes)])
        return array, int(array.data.ptr)

    def on_gpu(self, values: np.ndarray, index: int) -> Any:  # noqa: D102
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(index):
            return cupy.asarray(values)


class NumbaCuda(Framework):
    """Numba's device arrays, which are also what a module on a GPU keeps its numbers in."""

    has_current_stream = False

    def owns(self, value: Any) -> bool:  # noqa: D102
        return getattr(type(value), "__cuda_ndarray__", False) is True

    def device(self, name: str, value: Any) -> str:  # noqa: D102
        return "cuda:0" if self._simulated(value) else f"cuda:{int(value.gpu_data.context.device.id)}"

    def read(self, name: str, value: Any, stream: int | None) -> np.ndarray:  # noqa: D102
        if self._simulated(value):
            return view(*_lies(value._ary), value)
        return read(name, value, stream)

    def _simulated(self, value: Any) -> bool:
        """Whether it is an array of Numba's CUDA simulator, which is a NumPy array in a wrapper."""
        return self.owns(value) and not hasattr(value, "gpu_data")

    def stream(self, x: Any, index: int) -> int:  # noqa: D102
        return 0 if self._simulated(x) else int(x.__cuda_array_interface__.get("stream") or 0)

    def host(self, value: Any) -> np.ndarray:  # noqa: D102
        return np.asarray(value.copy_to_host())

    def empty(  # noqa: D102
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, index: int
    ) -> tuple[Any, int]:
        cuda = sys.modules["numba.cuda"]
        with cuda.gpus[index]:
            array = cuda.device_array(shape, dtype, strides=strides)
        at = _lies(array._ary)[0] if self._simulated(array) else array.__cuda_array_interface__["data"][0]
        return array, int(at)

    def on_gpu(self, values: np.ndarray, index: int) -> Any:  # noqa: D102
        cuda = sys.modules["numba.cuda"]
        with cuda.gpus[index]:
            return cuda.to_device(values)


class Jax(Framework):
    """JAX arrays. They are immutable.

    On a GPU, JAX tells neither the streams that it works on nor when it takes memory for another array. Its
    arrays are computed with on the default stream, which JAX lets wait for them. All that comes to the device
    later waits for that, JAX's work too: it may write to the memory of an array that nobody has any more.
    Results lie in memory of nbbn's own, which is exported to JAX.
    """

    immutable = True
    has_current_stream = False
    has_hidden_streams = True

    def owns(self, value: Any) -> bool:  # noqa: D102
        kind = getattr(sys.modules.get("jax"), "Array", None)
        return kind is not None and isinstance(value, kind)

    def device(self, name: str, value: Any) -> str:  # noqa: D102
        if not hasattr(value, "__dlpack_device__"):
            if not isinstance(value, sys.modules["jax"].core.Tracer):
                raise unsupported(name, value.dtype)  # a random key, for one
            raise _refused(
                name, value, "a traced array has no memory; call nbbn outside of jax.jit and jax.grad"
            )
        if value.is_deleted():
            raise _refused(name, value, "it has been deleted, or given away to a call that may reuse it")
        return device_of(name, value)

    def read(self, name: str, value: Any, stream: int | None) -> np.ndarray:  # noqa: D102
        if stream is None:
            try:
                value.block_until_ready()  # on the CPU, DLPack has no stream that could wait for it
            except Exception as error:
                raise _refused(name, value, error) from error
        return read(name, value, stream)

    def stream(self, x: Any, index: int) -> int:  # noqa: D102
        return 0

    def wrapper(self, x: Any) -> Any:  # noqa: D102
        return sys.modules["jax"].dlpack.from_dlpack

    def empty_like(self, x: np.ndarray) -> np.ndarray:  # noqa: D102
        return memory.empty_aligned(x.shape, x.dtype)  # what is not aligned, JAX copies

    def statistics(self, values: np.ndarray) -> np.ndarray:  # noqa: D102
        return values if sys.modules["jax"].config.jax_enable_x64 else values.astype(np.float32)

    def empty(  # noqa: D102
        self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype, index: int
    ) -> tuple[Any, int]:
        from nbbn.cuda import target

        owner = target.Shared(math.prod(shape) * dtype.itemsize, index, 0)
        return self._exporter(owner.address, shape, strides, dtype, owner, index), owner.address

    def _exporter(
        self,
        address: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: np.dtype,
        owner: Any,
        index: int,
    ) -> dlpack.Exporter:
        from nbbn.cuda import target

        def order(stream: int) -> None:
            if stream != LEGACY_STREAM:
                with target.current(index):
                    target.wait(stream, 0)

        # Integers, since NumPy does not export all types.
        array = view(address, shape, strides, np.dtype(f"u{dtype.itemsize}"), owner)
        return dlpack.Exporter(array, _KINDS[storage_of(dtype)], (dlpack.CUDA, index), order)

    def on_gpu(self, values: np.ndarray, index: int) -> Any:  # noqa: D102
        from nbbn.cuda import target

        array, address = self.empty(values.shape, values.strides, values.dtype, index)
        target.write(address, values, index, 0)
        return array

    def given(self, array: Any) -> Any:  # noqa: D102
        try:
            return sys.modules["jax"].dlpack.from_dlpack(array)
        except Exception as error:
            raise DeviceError(f"x is a JAX array, and JAX does not take the result: {error}") from error

    def rows(self, array: np.ndarray) -> Iterable[Any]:
        """Return the rows; JAX rounds them to float32 where it has no float64."""
        assert isinstance(array, View)
        return list(self.given(array.owner))

    def kept_rows(self, array: np.ndarray) -> Iterable[Any]:  # noqa: D102
        assert isinstance(array, View)
        address, (rows, *shape), (step, *strides), dtype = _lies(array)
        index = array.owner.__dlpack_device__()[1]
        return [
            self._exporter(address + k * step, tuple(shape), tuple(strides), dtype, array.owner, index)
            for k in range(rows)
        ]


NUMPY, NUMBA_CUDA = Numpy(), NumbaCuda()
FRAMEWORKS: tuple[Framework, ...] = (NUMPY, Torch(), Cupy(), NUMBA_CUDA, Jax(), Framework())


_known: dict[type, Framework] = {np.ndarray: NUMPY}  # to which framework the types seen so far belong


def framework_of(name: str, value: Any) -> Framework:
    """Return the framework that a value is an array of, or raise."""
    kind = type(value)
    if kind not in _known:
        for framework in FRAMEWORKS:
            if framework.owns(value):
                _known[kind] = framework
                break
        else:
            raise TypeError(f"{name} must be {SUPPORTED}, got {kind_of(value)}")
    return _known[kind]


def on_host(name: str, value: Any, device: str) -> np.ndarray:
    """Return few numbers, of any type, in the memory of the host; or raise.

    They may be in anything that NumPy makes an array of, or in an array on x's device, which is copied.
    """
    if type(value) is np.ndarray:
        return value
    framework = next((framework for framework in FRAMEWORKS if framework.owns(value)), None)
    if framework is None:
        return np.asarray(value)
    where = framework.device(name, value)
    if where not in (CPU, device):
        raise DeviceError(
            f"{name} must be in the memory of the host or on x's device, {device}, got an array on {where}"
        )
    return framework.host(value)


# --- where a call is computed ----------------------------------------------------------------------


def _rows(array: np.ndarray) -> Any:
    """Return what has the rows of an array, as arrays also where they are numbers."""
    return array if array.ndim > 1 else [array[k, ...] for k in range(len(array))]


class Place:
    """Where a call is computed, and what makes its results: here, in NumPy arrays.

    Attributes
    ----------
    device : str
        "cpu" or "cuda:N".
    stream : int or None
        On a GPU the address of a CUstream, 0 for the default one.
    empty_like : callable
        Returns a new array of x's shape, dtype and memory layout, to be written.
    empty : callable
        Returns a new float64 array of a shape (rows, channels), or (rows, …), to be written.
    room : callable
        Returns a new array of a shape and type, in C order, to work in.
    """

    device = CPU
    stream: int | None = None
    empty_like: Callable[[np.ndarray], np.ndarray] = staticmethod(memory.empty_like)
    empty: Callable[[tuple[int, ...]], np.ndarray] = staticmethod(np.empty)  # type: ignore[assignment]
    room: Callable[[tuple[int, ...], np.dtype], np.ndarray] = staticmethod(memory.empty_aligned)

    def on_stream(self, run: Any) -> Any:
        """Return what runs the stages, on this stream."""
        return run

    def put(self, values: np.ndarray) -> np.ndarray:
        """Return few values as what `empty` returns."""
        return values

    def result(self, array: np.ndarray) -> Any:
        """Return what `empty_like` gave as an array of the caller's kind."""
        return array

    def rows(self, array: np.ndarray) -> Any:
        """Return the rows of what `empty` gave as arrays of the caller's kind."""
        return _rows(array)

    def kept_rows(self, array: np.ndarray) -> Any:
        """Return the rows as float64 arrays for a later call, whatever type the library has them in."""
        return _rows(array)


class _Host(Place):
    """On the CPU, with results of another kind, over memory of NumPy's."""

    def __init__(self, framework: Framework, x: Any) -> None:
        self._framework = framework
        self._wrap = framework.wrapper(x)
        self.empty_like = framework.empty_like

    def result(self, array: np.ndarray) -> Any:
        if array.dtype == BFLOAT16.dtype:  # which NumPy itself does not export
            return self._wrap(dlpack.Exporter(array.view(np.uint16), _KINDS[BFLOAT16]))
        return self._wrap(array)

    def rows(self, array: np.ndarray) -> Any:
        return [self._wrap(row) for row in _rows(self._framework.statistics(array))]


class _Gpu(Place):
    """On a GPU. The views are of what the framework makes, which are their owners."""

    def __init__(self, framework: Framework, x: Any, device: str, holds_back: bool) -> None:
        self._framework = framework
        self._index = int(device.partition(":")[2])
        self._holds_back = holds_back
        self.device = device
        self.stream = framework.stream(x, self._index)
        self.empty_like = self._empty_like
        self.empty = self._empty_rows
        self.room = self._room

    def on_stream(self, run: Any) -> Any:
        return _OnStream(run, self.stream, self._index if self._holds_back else None)

    def _empty(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        array, address = self._framework.empty(shape, strides, dtype, self._index)
        return view(address, shape, strides, dtype, array)

    def _empty_like(self, x: np.ndarray) -> np.ndarray:
        return self._empty(x.shape, strides_like(x), x.dtype)

    def _room(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        strides = itertools.accumulate(shape[:0:-1], operator.mul, initial=dtype.itemsize)
        return self._empty(shape, tuple(strides)[::-1], dtype)

    def _empty_rows(self, shape: tuple[int, ...]) -> np.ndarray:
        return self._room(shape, np.dtype(np.float64))

    def put(self, values: np.ndarray) -> np.ndarray:
        array = self._framework.on_gpu(values, self._index)
        result = self._framework.read("values", array, NO_ORDER)
        assert isinstance(result, View)
        result.owner = array
        return result

    def result(self, array: np.ndarray) -> Any:
        assert isinstance(array, View)
        return self._framework.given(array.owner)

    def rows(self, array: np.ndarray) -> Any:
        return self._framework.rows(array)

    def kept_rows(self, array: np.ndarray) -> Any:
        return self._framework.kept_rows(array)


class _OnStream:
    """What runs the stages on a stream.

    All that comes to the device `held_back` later, on whatever stream, waits for them.
    """

    def __init__(self, run: Any, stream: int | None, held_back: int | None) -> None:
        self._run = run
        self._stream = stream
        self._held_back = held_back

    def mark(self, *arguments: Any) -> Any:
        """Look at a mask, in the memory of the host, on no stream."""
        return self._run.mark(*arguments)

    def __getattr__(self, operation: str) -> Callable[..., None]:
        start = getattr(self._run, operation)
        if self._held_back is None:
            return functools.partial(start, stream=self._stream)
        return functools.partial(self._start_and_hold_back, start)

    def _start_and_hold_back(self, start: Callable[..., None], *arguments: Any) -> None:
        from nbbn.cuda import target

        assert self._held_back is not None and self._stream is not None
        start(*arguments, stream=self._stream)
        target.hold_back(self._held_back, self._stream)


HOST = Place()


def place(
    x: Any, arguments: dict[str, Any], written: tuple[str, ...] = (), called: str = "x"
) -> tuple[Place, list[Any]]:
    """Return where a call is to be computed, and views of its arrays; or raise.

    Parameters
    ----------
    x : array
        Decides on the kind of the results.
    arguments : dict of str to array or None
        The others, by name. None stays None.
    written : tuple of str
        Which of them the call writes to.
    called : str
        The name of x.

    Returns
    -------
    Place, list of numpy.ndarray or None
        The views of x and the others.
    """
    named = {called: x, **arguments}
    found = {
        name: framework_of(name, value)
        for name, value in named.items()
        if value is not None or name == called
    }
    devices = {name: framework.device(name, named[name]) for name, framework in found.items()}
    device = devices[called]
    if any(other != device for other in devices.values()):
        where = ", ".join(f"{name} is on {place}" for name, place in devices.items())
        raise DeviceError(f"all arrays must be on one device, got: {where}")
    for name in written:
        if name in found and found[name].immutable:
            raise TypeError(
                f"{name} must be an array that can be written to, got {kind_of(named[name])}, which is "
                "immutable; functions such as batch_norm_forward return the output and the statistics, and "
                "write to nothing"
            )
    here = _place(found, found[called], x, device)
    views: list[Any] = []
    for name, value in named.items():
        if value is None:
            views.append(None)
        elif found[name] is NUMPY:
            views.append(_as_numpy(name, value))
        else:
            found[name].check(name, value)
            views.append(found[name].read(name, value, _stream_for(found[name], found[called], here)))
    return here, views


def _place(found: dict[str, Framework], framework: Framework, x: Any, device: str) -> Place:
    if device != CPU:
        return _Gpu(framework, x, device, any(other.has_hidden_streams for other in found.values()))
    return HOST if framework is NUMPY else _Host(framework, x)


def _stream_for(framework: Framework, of_x: Framework, here: Place) -> int | None:
    """Return the stream to tell a producer of, which makes that stream wait for the array if need be."""
    if here.stream is None:
        return None
    if framework is of_x and framework.has_current_stream:
        return NO_ORDER
    return here.stream or LEGACY_STREAM


def _as_numpy(name: str, value: np.ndarray) -> np.ndarray:
    if isinstance(value, (np.matrix, np.ma.MaskedArray)):
        raise TypeError(f"{name} must be a NumPy array, got {type(value).__name__}, whose arithmetic differs")
    return value if type(value) is np.ndarray else value.view(np.ndarray)
