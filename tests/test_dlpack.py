"""Memory of nbbn's own in the hands of other libraries: its bits, and when it is given back."""

import gc

import numpy as np
import pytest

from cases import type_id
from checks import assert_same_bits
from gpus import Managed
from nbbn import dlpack, frameworks
from nbbn.dtypes import storage_of

WIDE = (np.float32, np.float64)  # bfloat16 by way of libraries: test_frameworks.py


class Memory:
    """What an exporter keeps alive, and how often it was given back."""

    freed = 0

    def __init__(self, values):
        self.values = values

    def __del__(self):
        Memory.freed += 1


@pytest.fixture(autouse=True)
def nothing_freed():
    gc.collect()
    Memory.freed = 0


def exporter(values):
    """Export an array of the host as one on a GPU is exported: as integers that are said to be floats."""
    integers = np.dtype(f"u{values.itemsize}")
    at = values.__array_interface__["data"][0]
    array = frameworks.view(at, values.shape, values.strides, integers, Memory(values))
    return dlpack.Exporter(array, frameworks._KINDS[storage_of(values.dtype)])


def numpy_takes(one):
    return np.from_dlpack(one), lambda array: array


def torch_takes(one):
    torch = pytest.importorskip("torch")
    return torch.from_dlpack(one), lambda array: array.numpy()


def jax_takes(one):
    jax = pytest.importorskip("jax")
    jax.config.update("jax_enable_x64", True)
    return jax.dlpack.from_dlpack(one), np.asarray


TAKERS = [numpy_takes, torch_takes, jax_takes]


def aligned(values):
    """JAX copies what does not begin on a cache line."""
    array = np.empty(values.size + 16, values.dtype)
    start = -array.__array_interface__["data"][0] % 64 // values.itemsize
    array = array[start : start + values.size].reshape(values.shape)
    array[...] = values
    return array


@pytest.mark.parametrize("shape", [(2,), (3,), (2, 3), (4, 5, 6), (3, 1, 4), (0, 5)], ids=str)
@pytest.mark.parametrize("dtype", WIDE, ids=type_id)
@pytest.mark.parametrize("takes", TAKERS)
def test_bits_and_lifetime(rng, takes, dtype, shape):
    """It is the memory itself, given back once, when neither the exporter nor the array is there."""
    values = aligned(rng.normal(size=shape).astype(dtype))
    one = exporter(values)
    array, numpy = takes(one)
    assert_same_bits(np.array(numpy(array)), values.copy())
    values[...] = rng.normal(size=shape)
    assert_same_bits(np.array(numpy(array)), values.copy())
    del one
    gc.collect()
    assert Memory.freed == 0 or not values.size  # of nothing, JAX takes nothing
    del array
    gc.collect()
    assert Memory.freed == 1


@pytest.mark.parametrize("takes", TAKERS)
def test_exported_twice(rng, takes):
    one = exporter(aligned(rng.normal(size=(3, 4))))
    first, second = takes(one)[0], takes(one)[0]
    del first
    gc.collect()
    assert Memory.freed == 0
    del second
    gc.collect()
    assert Memory.freed == 0
    del one
    assert Memory.freed == 1


@pytest.mark.parametrize("order", ["F", "strided"])
@pytest.mark.parametrize("takes", TAKERS[:2])
def test_strides(rng, takes, order):
    values = rng.normal(size=(4, 5, 6))
    values = np.asfortranarray(values) if order == "F" else values[::2, :, 1:]
    array, numpy = takes(exporter(values))
    assert numpy(array).strides == values.strides
    assert_same_bits(np.array(numpy(array)), np.array(values))


VERSIONED = np.lib.NumpyVersion(np.__version__) >= "2.1.0"  # from which on NumPy speaks DLPack 1


@pytest.mark.parametrize(
    ("max_version", "tag"),
    [
        (None, b"dltensor"),
        ((0, 8), b"dltensor"),
        ((1, 0), b"dltensor_versioned" if VERSIONED else b"dltensor"),
    ],
)
def test_capsule_that_nobody_takes(rng, max_version, tag):
    """It has the version that was asked for, and gives the memory back by itself."""
    capsule = exporter(rng.normal(size=5)).__dlpack__(max_version=max_version)
    assert dlpack.name(capsule) == tag
    assert Memory.freed == 0
    del capsule
    assert Memory.freed == 1


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_where_it_says_to_lie(rng, max_version):
    """Read back as any library's array is."""
    values = rng.normal(size=(3, 4)).astype(np.float32)
    waits = []
    host = exporter(values)
    one = dlpack.Exporter(host._array, host._kind, (dlpack.CUDA, 3), waits.append)
    assert frameworks.device_of("x", one) == "cuda:3"
    capsule = one.__dlpack__(max_version=max_version, stream=0x2000)
    tag = dlpack.name(capsule)
    tensor = Managed.from_address(dlpack.pointer(capsule, tag) + 32 * tag.endswith(b"versioned"))
    assert tuple(tensor.device) == (2, 3) and tensor.ndim == 2
    assert (tensor.code, tensor.bits, tensor.lanes) == (2, 32, 1)
    view = frameworks.read("x", one, 0x3000)
    assert (view.shape, view.strides, view.dtype) == (values.shape, values.strides, values.dtype)
    assert view.__array_interface__["data"] == values.__array_interface__["data"]
    assert waits == [0x2000, 0x3000]
    for stream, told in ((None, 1), (1, 1), (2, 2)):
        one.__dlpack__(stream=stream)
        assert waits.pop() == told
    one.__dlpack__(stream=-1)
    assert waits == [0x2000, 0x3000]


def test_what_is_refused(rng):
    one = exporter(rng.normal(size=3))
    for options in ({"copy": True}, {"dl_device": (2, 0)}, {"dl_device": (1, 1)}, {"stream": 1}):
        with pytest.raises(BufferError):
            one.__dlpack__(**options)
    assert one.__dlpack__(copy=False, dl_device=(1, 0)) is not None
    del one
    assert Memory.freed == 1


ENDS = """
import os, sys
os.dup2(1, 2)
import numpy as np
import test_dlpack
values = test_dlpack.aligned(np.arange(12.0).reshape(3, 4))
kept = [test_dlpack.exporter(values) for _ in range(2)]
kept.append(kept[0].__dlpack__())
kept.append(kept[0].__dlpack__(max_version=(1, 0)))
for takes in test_dlpack.TAKERS:
    try:
        kept.append(takes(kept[1])[0])
    except BaseException as error:
        assert type(error).__name__ == "Skipped", error
kept.append(kept)  # and in a circle
sys.kept = kept  # for longer than any module of Python's
print(len(kept) > 4)
"""


def test_interpreter_ends_while_there_are_arrays(python):
    """Nothing is called that is not there any more, whoever has the memory."""
    assert python(ENDS).split() == ["True"]
