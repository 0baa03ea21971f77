"""Memory in DLPack's capsules: what is common to looking into one and making one."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

# All memory, as words.
all_memory = (ctypes.c_ssize_t * (1 << 45)).from_address(0)

pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))

CPU, CUDA = 1, 2  # DLPack's types of devices
LEGACY_STREAM = 1  # what DLPack calls the default stream 0, which it reserves
NO_ORDER = -1  # asks a producer for no ordering: what is to read the array runs on the producer's stream


class Exporter:
    """Memory anywhere, for the ``from_dlpack`` of any library.

    NumPy makes the capsule, of an array that claims to lie in the memory of the host, and the two words that
    are not true of it are set. So what a capsule needs in C is NumPy's: a destructor, and a deleter that may
    be called in any thread and when the interpreter ends.

    Parameters
    ----------
    array : numpy.ndarray
        Over the memory, which it keeps alive, of any type of the elements' size that NumPy exports.
    kind : int
        The type of the elements: DLPack's code, the bits and the number of lanes, in 8, 8 and 16 bits.
    device : tuple of int, default (1, 0)
        DLPack's type of device, and the number of the device.
    order : callable, optional
        Lets a stream, given as DLPack numbers it, wait for the work on the memory.
    """

    def __init__(
        self,
        array: np.ndarray,
        kind: int,
        device: tuple[int, int] = (CPU, 0),
        order: Callable[[int], None] | None = None,
    ) -> None:
        self._array, self._kind, self._device, self._order = array, kind, device, order

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if copy or (dl_device is not None and tuple(dl_device) != self._device):
            raise BufferError(f"this memory is handed over where it lies, on DLPack's device {self._device}")
        if self._order is None and stream is not None:
            raise BufferError(f"there are no streams where this memory lies, got stream {stream}")
        capsule = self._capsule(max_version)
        if self._order is not None and stream != NO_ORDER:
            self._order(LEGACY_STREAM if stream is None else stream)
        return capsule

    def _capsule(self, max_version: tuple[int, int] | None) -> Any:
        try:
            capsule = self._array.__dlpack__(max_version=max_version)
        except TypeError:
            capsule = self._array.__dlpack__()  # NumPy before 2.1 knows no versions
        tag = name(capsule)
        at = pointer(capsule, tag) >> 3
        if tag == b"dltensor_versioned":
            at += 4
        all_memory[at + 1] = self._device[0] | self._device[1] << 32
        all_memory[at + 2] = all_memory[at + 2] & 0xFFFFFFFF | self._kind << 32  # the other half: ndim
        return capsule
