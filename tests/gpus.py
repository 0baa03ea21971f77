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

import numpy as np

from nbbn import frameworks
from nbbn.cpu.run import Run as CpuRun

SIZE = 1 << 22
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

    def is_neg(self):
        return False

    def data_ptr(self):
        return self.address

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
    def block_until_ready(self):
        return self


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
        gpus = self

        class Run:
            def __init__(self, problem):
                self._problem = problem
                self._run = CpuRun(problem._replace(device="cpu"))

            def __getattr__(self, operation):
                def start(*arguments):
                    *arguments, stream = arguments
                    gpus.ran.append((operation, self._problem.device, stream))
                    with gpus.memory.open():
                        getattr(self._run, operation)(*arguments)

                return start

        run = types.ModuleType("nbbn.cuda.run")
        run.Run = Run
        monkeypatch.setitem(sys.modules, "nbbn.cuda.run", run)
        monkeypatch.setattr("nbbn.cuda.target.why_not", lambda: None)
        for name, module in (
            ("cupy", self._cupy()),
            ("torch", self._torch()),
            ("numba.cuda", self._numba()),
            ("jax", types.SimpleNamespace(Array=JaxArray)),
        ):
            monkeypatch.setitem(sys.modules, name, module)

    def array(self, kind, values, index=0):
        """Return an array of a kind, with these values in the same order in memory."""
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

        return types.SimpleNamespace(
            Tensor=Tensor,
            strided="strided",
            float32=np.dtype(np.float32),
            float64=np.dtype(np.float64),
            empty_strided=empty_strided,
            from_dlpack=on_host,
            cuda=types.SimpleNamespace(current_stream=current_stream),
        )

    def _numba(self):
        def device_array(shape, dtype, *, strides):
            return self.empty(NumbaArray, shape, strides, dtype)

        return types.SimpleNamespace(
            gpus=[_Selected(self, 0), _Selected(self, 1)],
            device_array=device_array,
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
