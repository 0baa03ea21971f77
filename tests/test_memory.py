"""Recycled outputs: returned when nothing can see them, and not before; and what a call takes beside."""

import gc
import pickle
import threading
import tracemalloc

import numpy as np
import pytest

import nbbn
from cases import LAYOUTS, Shape, activations
from checks import assert_like, assert_same_bits, bits

LARGE = Shape((4, 8, 96, 100))  # 1.2 MB of float32
SMALLEST = 1 << 20


@pytest.fixture(autouse=True)
def recycling():
    """Start from an empty pool with room for a few arrays; leave the limit as it was."""
    before = nbbn.set_recycling(0)
    nbbn.set_recycling(1 << 26)
    yield nbbn.set_recycling
    nbbn.set_recycling(0)
    nbbn.set_recycling(before)


@pytest.fixture
def x(rng):
    return activations(rng, LARGE, np.float32)


def normalize(x):
    return nbbn.batch_norm(x, training=True)


def place(array):
    """The address of the first element."""
    return array.__array_interface__["data"][0]


def test_limit_is_returned(recycling):
    assert recycling(123) == 1 << 26
    assert recycling(0) == 123
    assert recycling(1 << 26) == 0


def test_memory_is_used_again(x):
    for call in (
        normalize,
        lambda x: nbbn.batch_norm_forward(x).out,
        lambda x: nbbn.batch_norm(x, np.zeros(8), np.ones(8)),
        lambda x: nbbn.batch_norm_backward(x, x, mean=np.zeros(8), invstd=np.ones(8)).x,
        nbbn.BatchNorm(8),
    ):
        first = call(x)
        expected, address = first.copy(), place(first)
        del first
        second = call(x)
        assert place(second) == address
        assert_same_bits(second, expected)
        del second


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_are_ordinary_arrays(rng, layout):
    """Of x's layout, writable, aligned, picklable, whether their memory is fresh or used."""
    x = LAYOUTS[layout](activations(rng, Shape((4, 8, 128, 130)), np.float32))
    for _ in range(3):
        out = normalize(x)
        assert_like(out, x)
        assert out.flags.aligned
        out[...] = 7
        assert (pickle.loads(pickle.dumps(out)) == 7).all()
        assert out.sum() == 7 * out.size
        assert (out.reshape(-1) == 7).all() and (out.copy() == 7).all()
        del out


HOLDERS = {
    "element": lambda out: out[1:2, 3:4, :1, :1],
    "row": lambda out: out[0, 0],
    "transposed": lambda out: out.transpose(3, 2, 1, 0),
    "reshaped": lambda out: out.reshape(-1),
    "flat_iterator": lambda out: out.flat,
    "other_type": lambda out: out.view(np.uint32),
    "subclass": lambda out: out.view(np.recarray),
    "memoryview": memoryview,
    "sliced_memoryview": lambda out: memoryview(out)[1:],
    "from_memoryview": lambda out: np.asarray(memoryview(out)),
    "frombuffer": lambda out: np.frombuffer(out, np.float32),
    "dlpack": np.from_dlpack,
    "broadcast": lambda out: np.broadcast_to(out, (2, *out.shape)),
    "base": lambda out: np.asarray(out.base) if out.base is not None else out,
    "list_of_views": lambda out: list(out),
    "interface": lambda out: np.asarray(Interface(out)),
    "torch": lambda out: pytest.importorskip("torch").from_numpy(out),
    "torch_view": lambda out: pytest.importorskip("torch").from_numpy(out)[0, 0, 0],
    "torch_dlpack": lambda out: pytest.importorskip("torch").from_dlpack(out),
}


class Interface:
    """Another library's array, which knows the memory by the array interface."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = array.__array_interface__


def content(holder):
    """The bytes that can be seen through a holder."""
    if isinstance(holder, list):
        return [bits(part) for part in holder]
    if isinstance(holder, np.flatiter):
        return bits(np.asarray(holder))
    if isinstance(holder, memoryview):
        return holder.tobytes()
    return bits(holder if isinstance(holder, np.ndarray) else holder.numpy())


@pytest.mark.parametrize("name", HOLDERS)
def test_memory_that_is_seen_is_not_used(x, name):
    out = normalize(x)
    start, end = place(out), place(out) + out.nbytes
    holder = HOLDERS[name](out)
    del out
    gc.collect()
    before = content(holder)
    others = [normalize(x * np.float32(k)) for k in range(1, 5)]
    assert content(holder) == before
    assert all(place(other) + other.nbytes <= start or place(other) >= end for other in others)
    del holder, others
    gc.collect()
    # Now it is: of the arrays that come next, one lies where the first did.
    assert any(place(other) == start for other in [normalize(x) for _ in range(6)])


def test_arrays_in_a_cycle(x):
    """Their memory returns when the cycle is collected."""
    node = {"out": normalize(x)}
    node["self"] = node
    address, before = place(node["out"]), bits(node["out"])
    other = normalize(2 * x)
    assert place(other) != address and bits(node["out"]) == before
    del node
    gc.collect()
    assert place(normalize(x)) == address


def test_off(recycling, x):
    """With 0 nothing is kept: the memory of a dead array is the allocator's."""
    recycling(0)
    out = normalize(x)
    expected = out.copy()
    del out
    assert_same_bits(normalize(x), expected)
    assert kept_bytes(x, count=4) == 0


def test_turned_off_while_arrays_live(recycling, x):
    out = normalize(x)
    recycling(0)
    view, kept = out[1:], out[1:].copy()
    del out
    normalize(3 * x)
    assert_same_bits(view, kept)
    del view
    assert kept_bytes(x, count=2) == 0


def kept_bytes(x, count):
    """Return how much of the memory of `count` dead outputs is not given back."""
    gc.collect()
    tracemalloc.start()
    try:
        outs = [normalize(x) for _ in range(count)]
        held = tracemalloc.get_traced_memory()[0]
        assert held >= count * x.nbytes
        del outs
        gc.collect()
        return tracemalloc.get_traced_memory()[0] // x.nbytes * x.nbytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("arrays", [0, 1, 3])
def test_no_more_is_kept_than_allowed(recycling, x, arrays):
    recycling(0)
    recycling(arrays * (x.nbytes + 65536))
    assert kept_bytes(x, count=5) == arrays * x.nbytes


def test_small_outputs_are_not_recycled(recycling, rng):
    """Below 1 MiB there is nothing to gain: out owns its memory, as NumPy's own arrays do."""
    small = activations(rng, Shape((4, 8, 90, 90)), np.float32)
    assert small.nbytes < SMALLEST
    assert normalize(small).base is None


def test_outputs_given_by_the_caller_are_not_recycled(x):
    out = np.empty_like(x)
    address = place(out)
    kept = nbbn.batch_norm(x, training=True, out=out)[:1].copy()
    fresh = normalize(x)
    assert place(fresh) != address
    assert_same_bits(kept, out[:1])


def test_many_threads(x):
    """Each sees its own values while all of them take memory from one pool."""
    expected = [normalize(x * np.float32(k)) for k in range(4)]
    failures = []

    def work(k):
        mine = x * np.float32(k)
        for _ in range(25):
            out = normalize(mine)
            if bits(out) != bits(expected[k]):
                failures.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- what a call takes beside its output -----------------------------------------------------------

PEAK = """
import gc, sys, tracemalloc
import numba, numpy as np, nbbn
from cases import LAYOUTS, Shape, activations

dims, axis, layout, dtype = {case!r}
shape = Shape(dims, axis)
x = LAYOUTS[layout](activations(np.random.default_rng(0), shape, np.dtype(dtype).type))
C = shape.channels
dy, out = x.copy(order="K"), np.empty_like(x)
ones = np.ones(C)
calls = {{
    "training": lambda: nbbn.batch_norm(x, ones.copy(), ones.copy(), ones, ones, True, axis=axis, out=out),
    "evaluation": lambda: nbbn.batch_norm(x, ones, ones, ones, ones, axis=axis, out=out),
    "backward": lambda: nbbn.batch_norm_backward(dy, x, ones, mean=ones, invstd=ones, axis=axis, out=out),
    "statistics": lambda: nbbn.batch_stats(x, axis=axis),
}}

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def resident(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before

def traced(call):
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak

limit = (1 << 20) + 64 * C * numba.get_num_threads()
for name, call in calls.items():
    call()  # compiles, starts the threads, touches the output
    gc.collect()
    used = traced(call), resident(call) if sys.platform == "linux" else 0
    assert max(used) <= limit, (name, used, limit)
    assert used[0] > 0, name
"""


@pytest.mark.parametrize(
    "case",
    [
        ((32, 64, 56, 56), 1, "contiguous", "float32"),
        ((16, 56, 56, 64), -1, "contiguous", "float32"),
        ((8, 3, 300, 301), 1, "every_second", "float64"),
        ((20, 100_000), 1, "contiguous", "float32"),
        ((3, 50, 100, 101), 1, "record_field", "float64"),
    ],
    ids=lambda case: "x".join(map(str, case[0])) + f"@{case[1]}-{case[2]}-{case[3]}",
)
def test_peak_memory(python, case):
    """Under 1 MB and 64 bytes a channel a thread, as Python's allocators and the kernel count it.

    malloc is told to give back at once what it is given back, so that nothing hides in its pools.
    """
    python(PEAK.format(case=case), MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")


@pytest.mark.parametrize("value", ["64MB", "1e6", " 5 ", "-1", ""])
def test_a_bound_that_is_no_number_is_told(python, value):
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
import nbbn
print(nbbn.set_recycling(1))
"""
    *told, bound = python(code, NBBN_RECYCLE_BYTES=value).splitlines()
    assert int(bound) == 1 << 30
    expected = f"WARNING NBBN_RECYCLE_BYTES must be a whole number of bytes, got {value!r}: it is passed over"
    assert told == ([expected] if value else [])
