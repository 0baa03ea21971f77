"""Stands for the CUDA driver: work on streams is done late, and in the worst order that is allowed.

There is no function that waits for a stream: whoever calls one fails.
"""

import contextlib
import ctypes
import enum

LEGACY = 1  # the handle of the default stream, which is also called 0


class CUresult(enum.IntEnum):
    """What all functions return first."""

    CUDA_SUCCESS = 0


class CUevent_flags(enum.IntEnum):
    """Of cuEventCreate."""

    CU_EVENT_DISABLE_TIMING = 2


class Event:
    """A place in each of some streams."""

    def __init__(self):
        self.places = {}


class Driver:
    """Takes the place of cuda.bindings.driver. Contexts are numbers of devices.

    Parameters
    ----------
    memory : gpus.Memory
        Where arrays lie.
    first : {"ours", "theirs"}
        Whose work is done first if either may be: that of the default stream, or that of the others.
    """

    CUresult, CUevent_flags = CUresult, CUevent_flags

    def __init__(self, memory, first):
        self._memory, self.first = memory, first
        self._queues = {}  # device and stream: functions, and events to wait for
        self._done = {}  # how many of them are done
        self._held = []  # what streams that are used for the first time wait for
        self._device = None
        self.live = {}  # address, bytes

    @contextlib.contextmanager
    def on(self, device):
        """Make a device the current one."""
        before, self._device = self._device, device
        yield
        self._device = before

    def run(self):
        """Do all work."""
        while pending := [key for key in self._queues if self._done[key] < len(self._queues[key])]:
            ready = [key for key in pending if self._may_run(self._queues[key][self._done[key]])]
            assert ready, "streams wait for each other"
            key = min(ready, key=lambda key: (key[1] == LEGACY) != (self.first == "ours"))
            work = self._queues[key][self._done[key]]
            if not isinstance(work, dict):
                with self._memory.open():
                    work()
            self._done[key] += 1

    def _may_run(self, work):
        return not isinstance(work, dict) or all(self._done[key] >= place for key, place in work.items())

    def add(self, stream, work):
        """Put work on a stream of the current device: a function, or the places to wait for."""
        assert self._device is not None, "there is no current context"
        key = self._device, int(stream) or LEGACY
        if key not in self._queues:
            self._queues[key], self._done[key] = [places for on, places in self._held if on == key[0]], 0
        self._queues[key].append(work)

    def forget(self):
        """Forget all work, and what it keeps alive."""
        self._queues.clear()

    def _places(self):
        return {key: len(queue) for key, queue in self._queues.items() if key[0] == self._device}

    # --- what the driver has ---------------------------------------------------------------------------

    def cuCtxGetCurrent(self):
        return CUresult.CUDA_SUCCESS, self._device

    def cuCtxSetCurrent(self, context):
        self._device = context
        return (CUresult.CUDA_SUCCESS,)

    def cuEventCreate(self, flags):
        assert self._device is not None
        return CUresult.CUDA_SUCCESS, Event()

    def cuEventRecord(self, event, stream):
        key = self._device, int(stream) or LEGACY
        event.places = {key: len(self._queues[key])} if key in self._queues else {}
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxRecordEvent(self, context, event):
        assert context == self._device is not None
        event.places = self._places()
        return (CUresult.CUDA_SUCCESS,)

    def cuStreamWaitEvent(self, stream, event, flags):
        self.add(stream, dict(event.places))
        return (CUresult.CUDA_SUCCESS,)

    def cuCtxWaitEvent(self, context, event):
        assert context == self._device is not None
        for device, stream in list(self._places()):
            assert device == context
            self.add(stream, dict(event.places))
        self._held.append((context, dict(event.places)))
        return (CUresult.CUDA_SUCCESS,)

    def cuEventDestroy(self, event):
        del event.places
        return (CUresult.CUDA_SUCCESS,)

    def cuMemAllocAsync(self, nbytes, stream):
        assert nbytes > 0
        address = self._memory.take(nbytes)
        self.live[address] = nbytes
        self.add(stream, lambda: ctypes.memset(address, 0xFF, nbytes))
        return CUresult.CUDA_SUCCESS, address

    def cuMemFreeAsync(self, address, stream):
        nbytes = self.live.pop(address)
        self.add(stream, lambda: ctypes.memset(address, 0x7B, nbytes))
        return (CUresult.CUDA_SUCCESS,)

    def cuMemcpyHtoDAsync(self, address, source, nbytes, stream):
        values = ctypes.string_at(source, nbytes)
        self.add(stream, lambda: ctypes.memmove(address, values, nbytes))
        return (CUresult.CUDA_SUCCESS,)
