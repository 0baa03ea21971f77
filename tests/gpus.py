"""GPUs that are none: memory of the host that only a kernel may touch, and libraries that have arrays there.

The memory is closed (``mprotect``) but while a kernel runs, or while a test copies into it or out of it:
whatever reads it elsewhere ends the process. Two devices share it. A kernel here is the CPU's.
"""

import contextlib
import ctypes
import math
import mmap
import sys
import types

import ml_dtypes
import numpy as np

import streams
from nbbn import dlpack, frameworks
from nbbn.cpu.run import Run as CpuRun
from nbbn.dtypes import BFLOAT16, storage_of

SIZE = 1 << 26
_NOT_AT_ALL, _READ_AND_WRITE = 0, 3


class Memory:
    """Where the arrays lie. Nothing is freed."""

    def __init__(self):
        self._map = mmap.mmap(-1, SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._used = 0
        self._protect = ctypes.CDLL(None, use_errno=True).mprotect
        self._protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        assert self._protect(self.address, SIZE, _NOT_AT_ALL) == 0

    @contextlib.contextmanager
    def open(self):
        assert self._protect(self.address, SIZE, _READ_AND_WRITE) == 0
        try:
            yield
        finally:
            assert self._protect(self.address, SIZE, _NOT_AT_ALL) == 0

    def take(self, nbytes):
        address = self.address + self._used
        self._used += -(-nbytes // 256) * 256
        assert self._used <= SIZE
        return address


class Array:
    """What all these libraries' arrays have in common."""

    read_only = False

    def __init__(self, gpus, index, address, shape, strides, dtype):
        self.gpus, self.index, self.address = gpus, index, address
        self.shape, self.strides, self.dtype = tuple(shape), tuple(strides), np.dtype(dtype)

    def lies(self):
        return frameworks.view(self.address, self.shape, self.strides, self.dtype, self)

    def get(self):
        """Return a copy in the memory of the host."""
        with self.gpus.memory.open():
            return np.array(self.lies().view(np.ndarray), order="K")

    def put(self, values):
        with self.gpus.memory.open():
            self.lies()[...] = values

    def like(self, view):
        """Return an array of this kind over a view of its memory."""
        at = view.__array_interface__["data"][0]
        return type(self)(self.gpus, self.index, at, view.shape, view.strides, view.dtype)

    def __getitem__(self, index):
        return self.like(self.lies()[index])

    def transpose(self, axes):
        return self.like(self.lies().transpose(axes))


class WithDlpack:
    def __dlpack_device__(self):
        return 2, self.index

    def __dlpack__(self, *, stream=None, max_version=None):
        self.gpus.asked.append((type(self).__name__, stream))
        view = self.lies().view(np.ndarray)
        view.flags.writeable = not self.read_only
        if storage_of(view.dtype) is BFLOAT16:  # which NumPy does not export
            bits, kind = view.view(np.uint16), frameworks._KINDS[BFLOAT16]
            return dlpack.Exporter(bits, kind).__dlpack__(max_version=max_version)
        return view.__dlpack__(max_version=max_version)


class WithInterface:
    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.shape,
            "strides": self.strides,
            "typestr": self.dtype.str,
            "data": (self.address, self.read_only),
            "stream": None,
            "version": 3,
        }


class CupyArray(WithDlpack, WithInterface, Array):
    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.address)


class Tensor(WithDlpack, Array):
    requires_grad = False

    @property
    def device(self):
        return types.SimpleNamespace(type="cuda", index=self.index)

    layout = "strided"
    cpu = Array.get

    def is_neg(self):
        return False

    def data_ptr(self):
        return self.address

    def storage_offset(self):
        return 0

    def untyped_storage(self):
        return types.SimpleNamespace(nbytes=lambda: SIZE)

    def stride(self):
        return tuple(step // self.dtype.itemsize for step in self.strides)


class NumbaArray(WithInterface, Array):
    __cuda_ndarray__ = True
    stream = None

    @property
    def gpu_data(self):
        device = types.SimpleNamespace(id=self.index)
        return types.SimpleNamespace(context=types.SimpleNamespace(device=device))

    @property
    def __cuda_array_interface__(self):
        return {**super().__cuda_array_interface__, "stream": self.stream}

    def copy_to_host(self):
        return self.get()

    def copy_to_device(self, values):
        self.put(values)


class JaxArray(WithDlpack, Array):
    """What JAX computes it computes on a stream of its own: see `Jax`."""

    ready = None  # the places in streams after which it has its values
    deleter = None  # of memory that is not JAX's

    def __dlpack__(self, *, stream=None, max_version=None, dl_device=None, copy=None):
        assert stream not in (None, -1), "JAX waits on the host, or takes this for a stream"
        with self.gpus.driver.on(self.index):
            self.gpus.driver.add(stream, self.ready)
        return super().__dlpack__(stream=stream)

    def is_deleted(self):
        return False

    def block_until_ready(self):
        raise AssertionError("the host waits")

    def get(self):
        self.gpus.driver.run()
        return super().get()

    def __iter__(self):
        return iter([self.gpus.jax.computed(self, lambda a, k=k: a[k]) for k in range(self.shape[0])])

    def __del__(self):
        # Though JAX's stream may not have come so far as to read it.
        if self.deleter is not None:
            self.deleter()
        elif self.gpus.driver is not None:
            self.gpus.jax.take_memory_of(self)


class Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    )


_USED = b"used_dltensor"


class Jax:
    """The module jax, as far as it is used, and what it does on its streams.

    As JAX does, it asks for DLPack of before version 1.0, on one of four streams that it keeps for that.
    When nobody has an array any more, it gives memory of others back at once, whatever is still to be done
    with it, and takes its own for another array, in the order of its own stream.
    """

    Array = JaxArray
    COMPUTES, READY = 0xC0, (0xE0, 0xE1, 0xE2, 0xE3)

    def __init__(self, gpus):
        self._gpus = gpus
        self._taken = 0
        self.config = types.SimpleNamespace(jax_enable_x64=True)
        self.dlpack = types.SimpleNamespace(from_dlpack=self.from_dlpack)

    def new(self, index, shape, strides, dtype):
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        return JaxArray(self._gpus, index, self._gpus.memory.take(nbytes), shape, strides, dtype)

    def _compute(self, array, work):
        driver = self._gpus.driver
        with driver.on(array.index):
            driver.add(self.COMPUTES, work)
            array.ready = self._after(self.COMPUTES)

    def _after(self, stream):
        event = streams.Event()
        self._gpus.driver.cuEventRecord(event, stream)
        return event.places

    @staticmethod
    def _memory_of(array):
        """Return a view that does not keep the array."""
        return frameworks.view(array.address, array.shape, array.strides, array.dtype, None)

    def put(self, values, index):
        array = self.new(index, values.shape, frameworks.strides_like(values), values.dtype)
        memory, values = self._memory_of(array), np.array(values)
        self._compute(array, lambda: np.copyto(memory, values))
        return array

    def computed(self, source, function, dtype=None):
        dtype = dtype or source.dtype
        shape = function(np.broadcast_to(0.0, source.shape)).shape
        array = self.new(source.index, shape, np.empty(shape, dtype).strides, dtype)
        read, written = self._memory_of(source), self._memory_of(array)
        with self._gpus.driver.on(source.index):
            self._gpus.driver.add(self.COMPUTES, source.ready)
        self._compute(array, lambda: np.copyto(written, function(read), casting="unsafe"))
        return array

    def take_memory_of(self, array):
        address, nbytes = array.address, array.dtype.itemsize * math.prod(array.shape)
        with self._gpus.driver.on(array.index):
            self._gpus.driver.add(self.COMPUTES, lambda: ctypes.memset(address, 0x7A, nbytes))

    def from_dlpack(self, exporter):
        kind, index = exporter.__dlpack_device__()
        assert kind == 2
        stream = self.READY[self._taken % len(self.READY)]
        self._taken += 1
        capsule = exporter.__dlpack__(stream=stream)
        at = frameworks.dlpack.pointer(capsule, b"dltensor")
        tensor = Managed.from_address(at)
        assert tuple(tensor.device) == (2, index) and tensor.lanes == 1
        name = f"{ {2: 'float', 4: 'bfloat'}[tensor.code] }{tensor.bits}"
        dtype = np.dtype(getattr(ml_dtypes, name, name))
        shape = tensor.shape[: tensor.ndim]
        steps = tensor.strides[: tensor.ndim]
        ctypes.pythonapi.PyCapsule_SetName(ctypes.py_object(capsule), _USED)
        ctypes.pythonapi.PyCapsule_SetDestructor(ctypes.py_object(capsule), None)
        array = JaxArray(self._gpus, index, tensor.data + tensor.offset, shape,
                         [step * dtype.itemsize for step in steps], dtype)  # fmt: skip
        assert 0 in shape or array.strides == frameworks.strides_like(array.lies())
        array.deleter = lambda: tensor.deleter(at)
        with self._gpus.driver.on(index):
            array.ready = self._after(stream)
        if dtype == np.float64 and not self.config.jax_enable_x64:
            return self.computed(array, lambda a: a, np.float32)
        return array


class Unknown(WithInterface, Array):
    """Of a library that nbbn knows nothing of."""


class UnknownWithDlpack(WithDlpack, Array):
    """The same, with the other protocol."""


class Gpus:
    """Two GPUs, what ran on them, and the libraries that have arrays there."""

    def __init__(self, monkeypatch):
        self.memory = Memory()
        self.ran = []  # operation, device, stream
        self.asked = []  # kind of array, the stream that its __dlpack__ was told
        self.streams = {"cupy": 0, "torch": 0}
        self.current = 0
        self.driver = None
        self.jax = Jax(self)
        self._monkeypatch = monkeypatch
        gpus = self

        class Run:
            def __init__(self, problem):
                self._problem = problem
                self._run = CpuRun(problem._replace(device="cpu"))

            def mark(self, mask, counting=True):  # in the memory of the host
                return self._run.mark(mask, counting)

            def __getattr__(self, operation):
                def start(*arguments, stream=0):
                    gpus.ran.append((operation, self._problem.device, stream))
                    index = int(self._problem.device[5:])
                    gpus.launch(index, stream, lambda: getattr(self._run, operation)(*arguments))

                return start

        monkeypatch.setattr("nbbn.cuda.warmup.Run", Run)  # before its module is read with the one below
        run = types.ModuleType("nbbn.cuda.run")
        run.Run = Run
        monkeypatch.setitem(sys.modules, "nbbn.cuda.run", run)
        monkeypatch.setattr("nbbn.cuda.target.why_not", lambda: None)
        for name, module in (
            ("cupy", self._cupy()),
            ("torch", self._torch()),
            ("numba.cuda", self._numba()),
            ("jax", self.jax),
        ):
            monkeypatch.setitem(sys.modules, name, module)

    def run_late(self, first):
        """From now on, do what is launched when somebody looks: see streams.Driver."""
        self.driver = driver = streams.Driver(self.memory, first)

        class Device:
            def __init__(self, index):
                self._index = index

            def set_current(self):
                driver.cuCtxSetCurrent(self._index)

        for name, module in (
            ("cuda.bindings", types.SimpleNamespace(driver=driver)),
            ("cuda.core", types.SimpleNamespace(Device=Device)),
        ):
            self._monkeypatch.setitem(sys.modules, name, module)

    def launch(self, index, stream, work):
        """Do what a kernel does, now or late."""
        if self.driver is None:
            with self.memory.open():
                work()
        else:
            with self.driver.on(index):
                self.driver.add(stream, work)

    def array(self, kind, values, index=0):
        """Return an array of a kind, with these values in the same order in memory."""
        if kind is JaxArray:
            return self.jax.put(values, index)
        strides = frameworks.strides_like(values)
        array = kind(self, index, self.memory.take(values.nbytes), values.shape, strides, values.dtype)
        array.put(values)
        return array

    def empty(self, kind, shape, strides, dtype, index=None):
        nbytes = math.prod(shape) * np.dtype(dtype).itemsize
        index = self.current if index is None else index
        array = kind(self, index, self.memory.take(nbytes), shape, strides, dtype)
        if nbytes:
            array.put(np.nan)
        return array

    @contextlib.contextmanager
    def device(self, index):
        assert index in (0, 1)
        before, self.current = self.current, index
        yield
        self.current = before

    def _cupy(self):
        def empty(shape, dtype):
            return self.empty(CupyArray, shape, np.empty(shape, dtype).strides, dtype)

        def current_stream():
            return types.SimpleNamespace(ptr=self.streams["cupy"] + self.current)

        return types.SimpleNamespace(
            ndarray=CupyArray,
            empty=empty,
            asarray=lambda values: self.array(CupyArray, values, self.current),
            cuda=types.SimpleNamespace(Device=self.device, get_current_stream=current_stream),
        )

    def _torch(self):
        def empty_strided(shape, steps, *, dtype, device):
            strides = [step * dtype.itemsize for step in steps]
            return self.empty(Tensor, shape, strides, dtype, int(device[5:]))

        def on_host(values):
            return types.SimpleNamespace(to=lambda device: self.array(Tensor, values, int(device[5:])))

        def current_stream(index):
            return types.SimpleNamespace(cuda_stream=self.streams["torch"] + index)

        def without_tangent(tensor):
            return types.SimpleNamespace(primal=tensor, tangent=None)

        return types.SimpleNamespace(
            Tensor=Tensor,
            strided="strided",
            float32=np.dtype(np.float32),
            float64=np.dtype(np.float64),
            float16=np.dtype(np.float16),
            bfloat16=np.dtype(ml_dtypes.bfloat16),
            empty_strided=empty_strided,
            from_dlpack=on_host,
            cuda=types.SimpleNamespace(current_stream=current_stream),
            autograd=types.SimpleNamespace(forward_ad=types.SimpleNamespace(unpack_dual=without_tangent)),
        )

    def _numba(self):
        def device_array(shape, dtype, *, strides):
            return self.empty(NumbaArray, shape, strides, dtype)

        def as_cuda_array(array):
            assert array.index == self.current
            return NumbaArray(self, array.index, array.address, array.shape, array.strides, array.dtype)

        return types.SimpleNamespace(
            gpus=[_Selected(self, 0), _Selected(self, 1)],
            device_array=device_array,
            as_cuda_array=as_cuda_array,
            to_device=lambda values: self.array(NumbaArray, values, self.current),
            get_current_device=lambda: types.SimpleNamespace(id=self.current),
            synchronize=lambda: None,
        )


class _Selected:
    def __init__(self, gpus, index):
        self._gpus, self._index = gpus, index

    def __enter__(self):
        self._device = self._gpus.device(self._index)
        self._device.__enter__()

    def __exit__(self, *error):
        self._device.__exit__(*error)
