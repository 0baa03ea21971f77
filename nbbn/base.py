"""What all modules have in common: columns of numbers on a device, a mode, states, copies and pickles."""

import logging
import math
import operator
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np

from nbbn import arrays
from nbbn.columns import Columns, columns_on
from nbbn.compiler import Step, in_one
from nbbn.dtypes import BFLOAT16, bfloat16_as_float32, narrowed
from nbbn.errors import DeviceError
from nbbn.frameworks import CPU, Place, read

log = logging.getLogger("nbbn")

NEUTRAL = {"weight": 1.0, "bias": 0.0}
PARAMETERS = tuple(NEUTRAL)
STATISTICS = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"
GRADIENTS = ("grad_weight", "grad_bias")
COLUMNS = (*PARAMETERS, *STATISTICS, *GRADIENTS)  # what lies on the device; the counter never does
_MOST_ELEMENTS = 1 << 59  # of float64, NumPy has no larger array
_MOST_BATCHES = 1 << 62  # counting on from here, nobody arrives where int64 ends

_modules: weakref.WeakSet["Module"] = weakref.WeakSet()


def _renew_locks() -> None:
    """A thread that held a lock when this process was forked is not in it.

    Those that had one in common, as shallow copies do, still have.
    """
    renewed: dict[Any, Any] = {}
    for module in list(_modules):
        module._lock = renewed.setdefault(module._lock, threading.RLock())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_locks)


def checked(name: str, check: Callable[[str, Any], Any]) -> Any:
    """Return an attribute that is checked whenever it is set, as the argument of its name is."""
    kept = f"_{name}"

    def set_checked(module: Any, value: Any) -> None:
        setattr(module, kept, check(name, value))

    return property(operator.attrgetter(kept), set_checked)


def weight_of_a_batch(name: str, value: Any) -> float | None:
    """Return a momentum: a number, or None for a cumulative average; or raise."""
    return None if value is None else arrays.number(name, value, 0.0, 1.0)


def values_lost(name: str, value: Any) -> float:
    """Return a correction, or raise."""
    return arrays.number(name, value, 0.0, math.inf)


def number_of_batches(name: str, value: Any) -> np.ndarray | None:
    """Return a counter, the array itself where it can be counted in, or raise."""
    if value is None:
        return None
    array = np.asarray(value)
    if array.shape != ():
        raise ValueError(f"{name} must be a single int, got shape {array.shape}")
    count = _count(name, array)
    in_place = type(value) is np.ndarray and array.dtype == count.dtype and array.flags.writeable
    return array if in_place else count


class Module:
    """A normalization with parameters, and perhaps with running statistics."""

    weight: Any
    bias: Any
    running_mean: Any = None
    running_var: Any = None
    dtype = checked("dtype", lambda name, value: arrays.numpy_dtype(value))
    num_batches_tracked = checked("num_batches_tracked", number_of_batches)
    momentum: Any = None
    track_running_stats = False
    _num_batches_tracked: np.ndarray | None = None
    # Arrays of the last call and the last backward pass, which stay behind where a module goes.
    _of_last: Mapping[str, None] = {"_saved": None}

    def __init__(self, dtype: Any, device: str) -> None:
        self.dtype = dtype
        self._columns = columns_on(device)
        self.training = True
        self.grad_weight: Any = None
        self.grad_bias: Any = None
        self._saved: Any = None  # what the last call left for `backward`
        self._renew_lock()

    @property
    def device(self) -> str:
        """Where parameters and statistics live: "cpu" or "cuda:N"."""
        return self._columns.device

    # What cannot be copied or pickled is made anew; the x of the last call stays behind.
    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = {**self._of_last, "_lock": None, "_columns": self.device}
        with self._lock:
            if self.device != CPU:
                return self.__dict__ | kept | self._moved(self._columns.host)
            # Copies of what another thread may be about to update.
            for name in (*STATISTICS, f"_{COUNTER}"):
                kept[name] = self._columns.snapshot(getattr(self, name))
            return self.__dict__ | kept

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _columns=Columns())
        self._renew_lock()
        try:
            self.to(state["_columns"])
        except DeviceError as error:
            log.warning("a %s comes back on the CPU: %s", type(self).__name__, error)

    def __copy__(self) -> Any:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, **self._of_last)  # the lock is of the arrays, which it shares
        _modules.add(twin)
        return twin

    def _renew_lock(self) -> None:
        self._lock = threading.RLock()  # a signal's handler may come in between, and look at the module
        _modules.add(self)

    def _moved(self, move: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the columns that there are, moved."""
        columns = {name: getattr(self, name) for name in COLUMNS}
        return {name: move(column) for name, column in columns.items() if column is not None}

    @property
    def _shape(self) -> tuple[int, ...]:
        """That of the columns."""
        raise NotImplementedError

    def _fill(self, weight: bool, bias: bool) -> None:
        """Set parameters, those that there are, to what changes nothing, and statistics to the first ones."""
        new, shape = self._columns.new, self._shape
        filled = {
            "weight": new(np.ones(shape, self.dtype)) if weight else None,
            "bias": new(np.zeros(shape, self.dtype)) if bias else None,
        }
        vars(self).update(filled | self._first_statistics())

    def _first_statistics(self) -> dict[str, Any]:
        """Return the running statistics of a module that has seen nothing, if it is to have any."""
        return {}

    def reset_parameters(self) -> None:
        """Set weight to 1 and bias to 0, those that there are, and reset the running statistics, if any."""
        self._fill(self.weight is not None, self.bias is not None)

    @property
    def _has_running(self) -> bool:
        return not (self.running_mean is self.running_var is None)

    @property
    def _tracks(self) -> bool:
        return self.track_running_stats and self._has_running

    def _snapshots(self) -> tuple[Any, Any]:
        """Return running mean and variance of one batch, whatever other threads do."""
        with self._lock:
            return self._columns.snapshot(self.running_mean), self._columns.snapshot(self.running_var)

    def _without_bias(self) -> str:
        """Return what a repr says where there is a weight alone."""
        return ", bias=False" if self.weight is not None and self.bias is None else ""

    def _momenta(self, batches: int = 1) -> list[float]:
        """Return the weights of the next batches in the running statistics."""
        if self.momentum is not None:
            return [self.momentum] * batches
        if self.num_batches_tracked is None:
            raise ValueError("momentum must be a number where num_batches_tracked is None, got None")
        tracked = int(self.num_batches_tracked)
        return [1.0 / (tracked + k) for k in range(1, batches + 1)]

    def _counting(self, batches: int = 1) -> tuple[Step, ...]:
        """Return what counts the next batches."""
        tracked = int(self.num_batches_tracked or 0)
        return self._counting_to(min(tracked + batches, _MOST_BATCHES))

    def _counting_to(self, batches: int) -> tuple[Step, ...]:
        """Return what sets the counter, if there is one, or raise."""
        counter = self.num_batches_tracked
        if counter is None:
            return ()
        if not counter.flags.writeable:
            raise ValueError(f"{COUNTER} of this module must be writable, got a read-only array")
        return (partial(counter.fill, batches),)

    def train(self, mode: bool = True) -> Any:
        """Set the mode, which only a module with running statistics goes by; return self.

        Parameters
        ----------
        mode : bool, default True
            False sets the mode of `eval`.

        Raises
        ------
        TypeError
            If `mode` is not a bool.
        """
        self.training = arrays.flag("mode", mode)
        return self

    def eval(self) -> Any:
        """Set the mode: the running statistics, if there are any, are used and not updated; return self."""
        return self.train(False)

    def to(self, device: str) -> Any:
        """Move parameters, running statistics and gradients to a device; return self.

        `backward` then needs a call on the new device before it.

        Parameters
        ----------
        device : str
            "cpu", "cuda" or "cuda:N".

        Raises
        ------
        TypeError
            If `device` is not a str.
        nbbn.DeviceError
            If the device is not to be had. Nothing has changed then.
        """
        columns = columns_on(device)
        if columns.device != self.device:
            moved = self._moved(lambda column: columns.new(self._columns.host(column)))
            self.__dict__.update(moved, _columns=columns, **self._of_last)
        return self

    def _last_call(self) -> Any:
        if self._saved is None:
            raise RuntimeError(f"backward needs a call of this {type(self).__name__} before it")
        return self._saved

    def _keep_gradients(self, gradients: np.ndarray, here: Place, **others: Any) -> None:
        """Set those of the parameters that there are, from float64[2, …], and others; all of them or none."""
        kept = {
            f"grad_{name}": self._columns.rounded(gradients, row, self.dtype, here)
            for row, name in enumerate(PARAMETERS)
            if getattr(self, name) is not None
        }
        vars(self).update(others | kept)

    def _state_names(self) -> tuple[str, ...]:
        """Return the names of what there is, in the order of PyTorch's."""
        return tuple(name for name in (*PARAMETERS, *STATISTICS, COUNTER) if getattr(self, name) is not None)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of parameters and running statistics, those that there are.

        Returns
        -------
        dict of str to numpy.ndarray
            With the keys of PyTorch's module of this name. Always in the memory of the host.
        """
        return self._state()

    def _state(self) -> dict[str, Any]:
        with self._lock:
            return {
                name: getattr(self, name).copy()
                if name == COUNTER
                else self._columns.host(getattr(self, name))
                for name in self._state_names()
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set parameters and running statistics.

        Parameters
        ----------
        state : mapping of str to array
            As `state_dict` returns it, or that of PyTorch's module of this name.

        Raises
        ------
        TypeError
            If `state` is not a mapping, or a value not of numbers.
        ValueError
            If keys are missing or unexpected, or a shape does not fit. Nothing has changed then.
        """
        self._load(mapping(state), {name: name for name in self._state_names()})

    def _load(self, state: Mapping[str, Any], keys: dict[str, str], lone: bool = False) -> None:
        """Set what a state has, under the key of each name; all of it, on the CPU, or nothing.

        Where there may be a `lone` parameter, the other one is set to what changes nothing.
        """
        absent = {name for name, key in keys.items() if key not in state and name != COUNTER}
        parameters = keys.keys() & NEUTRAL
        neutral = parameters & absent if lone and not parameters <= absent else set()
        missing = [key for name, key in keys.items() if name in absent - neutral]
        unexpected = [key for key in state if key not in keys.values()]
        if missing or unexpected:
            wanted = list(keys.values())
            raise ValueError(
                f"state must have the keys {wanted}; missing: {missing}, unexpected: {unexpected}"
            )
        loaded = {name: self._loadable(name, key, state[key]) for name, key in keys.items() if key in state}
        loaded |= {name: np.full(self._shape, NEUTRAL[name], self.dtype) for name in neutral}
        columns = {name: getattr(self, name) for name in loaded if name != COUNTER}
        for name, column in columns.items():
            self._columns.checked(name, column, self._shape)
        with self._lock:
            counting = self._counting_to(int(loaded[COUNTER])) if COUNTER in loaded else ()
            written = [(column, loaded[name]) for name, column in columns.items()]
            self._set(written, counting, self._columns.write)

    def _set(
        self,
        columns: Iterable[tuple[Any, Any]],
        counting: tuple[Step, ...],
        write: Callable[[Any, Any], None],
    ) -> None:
        """Set columns, each to what is beside it, and the counter; on the CPU all of them or none."""
        if self.device == CPU:
            views = ((self._columns.view("column", column), values) for column, values in columns)
            in_one(*(partial(view.__setitem__, ..., values) for view, values in views), *counting)
        else:
            in_one(*(partial(write, column, values) for column, values in columns), *counting)

    def _loadable(self, name: str, key: str, value: Any) -> np.ndarray:
        """Return what a state has under `key` as an array that can be stored under `name`, or raise."""
        own: np.ndarray = getattr(self, name)
        if name != COUNTER:
            own = self._columns.view(name, own)
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"state[{key!r}] must be an array of numbers, got a masked array")
        try:
            array = _numbers(key, value)
            if name != COUNTER:
                array = _stored(array, own.dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"state[{key!r}] must be an array of numbers: {error}") from None
        # Some savers make a 1-element array of the 0-d counter.
        if name == COUNTER and array.size == 1:
            array = array.reshape(())
        if array.shape != own.shape:
            raise ValueError(f"state[{key!r}] must have shape {own.shape}, got {array.shape}")
        return _count(f"state[{key!r}]", array) if name == COUNTER else array


class Tracking(Module):
    """A normalization of channels that may have running statistics."""

    num_features: int

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.num_features,)

    def _first_statistics(self) -> dict[str, Any]:
        if not self.track_running_stats:
            return {}
        new = self._columns.new
        return {
            "running_mean": new(np.zeros(self.num_features, self.dtype)),
            "running_var": new(np.ones(self.num_features, self.dtype)),
            f"_{COUNTER}": np.zeros((), np.int64),
        }

    def reset_running_stats(self) -> None:
        """Set running_mean to 0, running_var to 1 and num_batches_tracked to 0, if they are tracked."""
        vars(self).update(self._first_statistics())


def mapping(state: Any) -> Mapping[str, Any]:
    """Return a state that is one, or raise."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state must be a mapping of names to arrays, got {type(state).__name__}")
    return state


def sized(name: str, value: Any) -> int:
    """Return a number of channels, or of elements, that an array can have, or raise."""
    size = arrays.integer(name, value)
    if not 1 <= size <= _MOST_ELEMENTS:
        raise ValueError(f"{name} must be in [1, 2**59], got {size}")
    return size


def _numbers(key: str, value: Any) -> np.ndarray:
    """Return a value of a state as an array of NumPy's, which has no bfloat16: that becomes float32."""
    try:
        array = np.asarray(value)
    except TypeError:
        if not hasattr(value, "__dlpack__"):
            raise
        array = read(f"state[{key!r}]", value, None)
    # As PyTorch's are read, and what numpy.load makes of those of ml_dtypes.
    return bfloat16_as_float32(array) if array.dtype in (BFLOAT16.dtype, np.dtype("V2")) else array


def _stored(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return numbers of any type in a module's, rounded once, or raise a TypeError."""
    if array.dtype == np.float64:
        return narrowed(array, dtype)
    with np.errstate(all="ignore"):
        return array.astype(dtype, casting="same_kind")


def _count(name: str, array: np.ndarray) -> np.ndarray:
    """Return the value of a 0-d array as a number of batches, or raise."""
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be an int, got dtype {array.dtype}")
    count = array.item()
    if not 0 <= count <= _MOST_BATCHES or count != int(count):
        raise ValueError(f"{name} must be an int in [0, 2**62], got {count}")
    return np.array(int(count), np.int64)
