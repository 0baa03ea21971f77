"""Arrays on GPUs: where a call runs, on which stream, what it gives back, and what it refuses.

The GPUs are those of gpus.py, so that all but the kernels is tested on any machine.
"""

import contextlib
import copy
import enum
import gc
import logging
import pickle
import sys
import types
import weakref

import numpy as np
import pytest

import nbbn
from cases import DTYPES, HALF, type_id
from checks import assert_same_bits
from gpus import CupyArray, Gpus, JaxArray, NumbaArray, Tensor, Unknown, UnknownWithDlpack
from nbbn import family, frameworks
from nbbn.cuda import target
from nbbn.cuda.warmup import warm_up
from nbbn.dispatch import find
from nbbn.dtypes import storage_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")

KINDS = [CupyArray, Tensor, NumbaArray]
# Which library has which types: Numba's device arrays have no bfloat16.
TYPES = [(kind, dtype) for kind in KINDS for dtype in (DTYPES if kind is not NumbaArray else DTYPES[:3])]
DIMS = (4, 5, 6, 7)


def kind_id(kind):
    return kind.__name__


def forget_runs():
    """Runs of other GPUs are not found any more."""
    for cached in (find, family._channel_walk, family._row_walk):
        cached.cache_clear()


@pytest.fixture
def gpus(monkeypatch):
    forget_runs()
    yield Gpus(monkeypatch)
    forget_runs()


@pytest.fixture
def host(rng):
    """The arguments of all functions, in the memory of the host."""
    numbers = {n: rng.normal(size=5) for n in ("weight", "bias", "running_mean", "mean")}
    return {
        "x": rng.normal(size=DIMS).astype(np.float32),
        "grad_out": rng.normal(size=DIMS).astype(np.float32),
        **numbers,
        "running_var": rng.uniform(1, 2, 5).astype(np.float32),
        "invstd": rng.uniform(1, 2, 5),
    }


NAMES = {
    "stats": ("x",),
    "forward": ("x", "weight", "bias"),
    "training": ("x", "running_mean", "running_var", "weight", "bias"),
    "evaluate": ("x", "running_mean", "running_var", "weight", "bias"),
    "backward": ("grad_out", "x", "weight", "mean", "invstd"),
}
CALLS = {
    "stats": nbbn.batch_stats,
    "forward": nbbn.batch_norm_forward,
    "training": lambda **arguments: nbbn.batch_norm(training=True, **arguments),
    "evaluate": lambda **arguments: nbbn.batch_norm(**arguments),
    "backward": nbbn.batch_norm_backward,
}
ON_DEVICE = {name: name for name in CALLS} | {"training": "forward"}


def arguments_of(operation, host, make):
    return {name: make(host[name]) for name in NAMES[operation]}


def results(value, kind=None):
    """Return the arrays of a result, on the host; all are of the given kind."""
    arrays = value if isinstance(value, tuple) else (value,)
    arrays = [array for array in arrays if not isinstance(array, int)]
    if kind is None:
        return tuple(arrays)
    assert {type(array) for array in arrays} == {kind}
    return tuple(array.get() for array in arrays)


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
@pytest.mark.parametrize("index", [0, 1])
def test_runs_on_the_device_and_returns_the_kind(gpus, host, kind, operation, index):
    on_host = arguments_of(operation, host, np.copy)
    expected = results(CALLS[operation](**on_host))
    on_gpu = arguments_of(operation, host, lambda a: gpus.array(kind, a, index))
    result = CALLS[operation](**on_gpu)
    assert_same_bits(results(result, kind), expected)
    assert {a.index for a in (result if isinstance(result, tuple) else (result,)) if type(a) is kind} == {
        index
    }
    for name, value in on_host.items():
        assert_same_bits(on_gpu[name].get(), value)  # the running statistics were updated, all else was not
    stream = 0 if kind is NumbaArray else index
    assert gpus.ran == [(ON_DEVICE[operation], f"cuda:{index}", stream)]


@pytest.mark.parametrize("operation", ["forward", "training", "evaluate", "backward"])
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_out(gpus, host, kind, operation):
    expected = results(CALLS[operation](**arguments_of(operation, host, np.copy)))
    arguments = arguments_of(operation, host, lambda a: gpus.array(kind, a))
    out = gpus.empty(kind, DIMS, np.empty(DIMS, np.float32).strides, np.float32)
    result = CALLS[operation](**arguments, out=out)
    assert (result if operation in ("training", "evaluate") else result[0]) is out
    assert_same_bits(out.get(), expected[0])


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_masks_are_copied_to_the_host(gpus, host, kind):
    """From x's device, on which the work is then done; from no other one."""
    values = np.random.default_rng(0).random((DIMS[0], *DIMS[2:])) < 0.6
    expected = nbbn.batch_stats(host["x"], mask=values)
    for mask in (values, values.tolist(), gpus.array(kind, values, 1)):
        found = nbbn.batch_stats(gpus.array(kind, host["x"], 1), mask=mask)
        assert found.count == expected.count == values.sum()
        assert_same_bits(found.mean.get(), expected.mean)
    lengths = np.full(DIMS[0], 2)
    found = nbbn.batch_stats(gpus.array(kind, host["x"], 1), lengths=gpus.array(kind, lengths, 1))
    assert found.count == nbbn.batch_stats(host["x"], lengths=lengths).count
    for x in (gpus.array(kind, host["x"], 1), host["x"]):
        with pytest.raises(
            nbbn.DeviceError, match=r"^mask must be .* or on x's device, c.*, got .* on cuda:0"
        ):
            nbbn.batch_stats(x, mask=gpus.array(kind, values, 0))


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_in_place(gpus, host, kind):
    x = gpus.array(kind, host["x"])
    expected = nbbn.batch_norm_forward(host["x"]).out
    assert nbbn.batch_norm_forward(x, out=x.like(x.lies())).out.address == x.address
    assert_same_bits(x.get(), expected)


@pytest.mark.parametrize(("kind", "dtype"), TYPES, ids=lambda one: getattr(one, "__name__", one))
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0), (1, 3, 0, 2)], ids=str)
def test_layout_of_x_is_kept(gpus, host, kind, order, dtype):
    values = host["x"].astype(dtype).transpose(order).copy().transpose(np.argsort(order))
    x = gpus.array(kind, values)
    assert x.strides == values.strides
    out = nbbn.batch_norm_forward(x).out
    assert (out.strides, out.dtype) == (values.strides, dtype)
    assert_same_bits(out.get(), nbbn.batch_norm_forward(values).out)


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_views(gpus, rng, kind):
    """Sliced, reversed and broadcast, in x and in a parameter."""
    values = rng.normal(size=(6, 11, 8))
    x = gpus.array(kind, values)
    column = gpus.array(kind, rng.normal(size=10))
    for at in (np.s_[1:5, ::2, 3:], np.s_[::-1, 4::-1], np.s_[:, 1:6, ::-2]):
        channels = values[at].shape[1]
        weight = column.like(column.lies()[-1::-1][:channels])
        result = nbbn.batch_norm_forward(x.like(x.lies()[at]), weight)
        assert_same_bits(results(result, kind), results(nbbn.batch_norm_forward(values[at], weight.get())))
    repeated = x.like(np.broadcast_to(x.lies()[:1], (3, 11, 8)))
    expected = nbbn.batch_norm_forward(np.broadcast_to(values[:1], (3, 11, 8)))
    assert_same_bits(results(nbbn.batch_norm_forward(repeated), kind), results(expected))


@pytest.mark.parametrize("operation", CALLS)
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_empty(gpus, host, kind, operation):
    host |= {name: host[name][:0] for name in ("x", "grad_out")}
    expected = results(CALLS[operation](**arguments_of(operation, host, np.copy)))
    result = CALLS[operation](**arguments_of(operation, host, lambda a: gpus.array(kind, a)))
    assert_same_bits(results(result, kind), expected)
    assert not gpus.ran


# --- streams ---------------------------------------------------------------------------------------


def test_current_stream_of_the_library(gpus, host):
    gpus.streams = {"cupy": 0x1000, "torch": 0x2000}
    for kind, stream, asked in (
        (CupyArray, 0x1001, [("CupyArray", -1)]),  # nothing to wait for: it is on that stream already
        (Tensor, 0x2001, []),  # nor is DLPack asked where a tensor itself can tell
    ):
        nbbn.batch_stats(gpus.array(kind, host["x"], 1))
        assert gpus.ran.pop() == ("stats", "cuda:1", stream)
        assert gpus.asked == asked
        gpus.asked.clear()


def test_tensor_beside_an_array_of_another_library(gpus, host):
    gpus.streams = {"cupy": 0x1000, "torch": 0x2000}
    nbbn.batch_norm_forward(gpus.array(CupyArray, host["x"]), gpus.array(Tensor, host["weight"]))
    assert gpus.asked == [("CupyArray", -1), ("Tensor", 0x1000)]


def test_stream_of_a_numba_array(gpus, host):
    x = gpus.array(NumbaArray, host["x"])
    x.stream = 0x3000
    nbbn.batch_stats(x)
    assert gpus.ran == [("stats", "cuda:0", 0x3000)]


@pytest.mark.parametrize(("current", "told"), [(0, 1), (0x2000, 0x2000)])
def test_arrays_of_other_libraries_are_waited_for(gpus, host, current, told):
    """Their producers are told of x's stream; DLPack calls the default one 1."""
    gpus.streams["torch"] = current
    x, weight = gpus.array(Tensor, host["x"]), gpus.array(CupyArray, host["weight"])
    bias = gpus.array(NumbaArray, host["bias"])
    result = nbbn.batch_norm_forward(x, weight, bias)
    expected = nbbn.batch_norm_forward(host["x"], host["weight"], host["bias"])
    assert_same_bits(results(result, Tensor), results(expected))
    assert gpus.asked == [("CupyArray", told)]
    assert gpus.ran == [("forward", "cuda:0", current)]


def test_producer_that_forbids_the_stream(gpus, host):
    class Forbidding(CupyArray):
        def __dlpack__(self, **options):
            raise BufferError("this array is bound to stream 7")

    with pytest.raises(TypeError, match=r"^weight .*Forbidding.*bound to stream 7"):
        nbbn.batch_norm_forward(gpus.array(Tensor, host["x"]), gpus.array(Forbidding, host["weight"]))
    assert not gpus.ran


def test_numba_arrays_of_two_streams(gpus, host, monkeypatch):
    waits = []
    monkeypatch.setattr("nbbn.frameworks._wait", lambda *arguments: waits.append(arguments))
    x, weight, bias = (gpus.array(NumbaArray, host[name]) for name in ("x", "weight", "bias"))
    x.stream, bias.stream = 0x3000, 0x4000
    nbbn.batch_norm_forward(x, weight, bias)
    assert waits == [("bias", 0x4000, 0x3000)]
    assert gpus.ran == [("forward", "cuda:0", 0x3000)]


def test_busy_array_without_a_driver_to_order_it(gpus, host):
    x, weight = gpus.array(Tensor, host["x"]), gpus.array(NumbaArray, host["weight"])
    weight.stream = 0x3000
    with pytest.raises(nbbn.DeviceError, match="weight is in use on stream 12288"):
        nbbn.batch_norm_forward(x, weight)


# --- what is refused -------------------------------------------------------------------------------


def test_mixed_devices(gpus, host):
    """The message has the place of every array."""
    here, there = (gpus.array(CupyArray, host["x"], index) for index in (0, 1))
    weight, bias = gpus.array(Tensor, host["weight"], 1), host["bias"]
    for arguments, says in (
        ((here, weight, bias), "x is on cuda:0, weight is on cuda:1, bias is on cpu"),
        ((there, weight, bias), "x is on cuda:1, weight is on cuda:1, bias is on cpu"),
        ((host["x"], None, weight), "x is on cpu, bias is on cuda:1"),
    ):
        with pytest.raises(nbbn.DeviceError, match=says):
            nbbn.batch_norm_forward(*arguments)
    with pytest.raises(nbbn.DeviceError, match="x is on cpu, out is on cuda:0"):
        nbbn.batch_norm_forward(host["x"], out=here)
    assert not gpus.ran


@pytest.mark.parametrize("operation", CALLS)
def test_each_argument_on_another_device(gpus, host, operation):
    for name in NAMES[operation]:
        arguments = arguments_of(operation, host, lambda a: gpus.array(CupyArray, a))
        before = {n: a.get() for n, a in arguments.items()}
        if len(arguments) == 1:
            continue
        arguments[name] = host[name]
        with pytest.raises(nbbn.DeviceError, match=f"{name} is on cpu"):
            CALLS[operation](**arguments)
        assert all(n == name or (a.get() == before[n]).all() for n, a in arguments.items())
    assert not gpus.ran


@pytest.mark.parametrize("kind", [Unknown, UnknownWithDlpack], ids=kind_id)
def test_unknown_kinds(gpus, host, kind, monkeypatch):
    """A result cannot be made; as another argument they will do."""
    monkeypatch.setattr("nbbn.frameworks._device_at", lambda name, value: value.index)
    x, out = (gpus.array(kind, host["x"]) for _ in range(2))
    for options in ({}, {"out": out}):
        with pytest.raises(TypeError, match=rf"^x .*CuPy.*{kind.__name__}.*result cannot be wrapped"):
            nbbn.batch_norm_forward(x, **options)
    weight = gpus.array(kind, host["weight"])
    result = nbbn.batch_norm_forward(gpus.array(CupyArray, host["x"]), weight)
    expected = nbbn.batch_norm_forward(host["x"], host["weight"])
    assert_same_bits(results(result, CupyArray), results(expected))


def test_device_that_cannot_be_found_out(gpus, host):
    with pytest.raises(nbbn.DeviceError, match="x does not say on which device it is"):
        nbbn.batch_stats(gpus.array(Unknown, host["x"]))


@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
def test_other_errors(gpus, host, kind):
    """What is refused of NumPy arrays is refused on a GPU, and nothing is written."""
    x = gpus.array(kind, host["x"])
    column, short = gpus.array(kind, host["weight"]), gpus.array(kind, host["weight"][:3])
    read_only = gpus.array(kind, host["weight"])
    read_only.read_only = True
    buffer = gpus.array(kind, np.zeros(2 * x.lies().size, np.float32))
    one, other = (buffer.like(buffer.lies()[k : k + x.lies().size].reshape(DIMS)) for k in (0, 1))
    integers = gpus.array(kind, host["x"].astype(np.int32))
    double = gpus.array(kind, host["x"].astype(np.float64))
    single = x.like(x.lies()[:1, :, :1, :1])
    before = x.get(), column.get(), buffer.get()
    for error, says, call in (
        (ValueError, "weight", lambda: nbbn.batch_norm_forward(x, short)),
        *([] if kind is Tensor else [  # there are no read-only tensors
            (ValueError, "running_var", lambda: nbbn.batch_norm(x, column, read_only, training=True)),
        ]),
        (ValueError, "axis", lambda: nbbn.batch_norm_forward(x, axis=4)),
        (ValueError, "eps", lambda: nbbn.batch_norm_forward(x, eps=-1.0)),
        (ValueError, "momentum", lambda: nbbn.batch_norm(x, column, column, training=True, momentum=2.0)),
        (ValueError, "out must not overlap x", lambda: nbbn.batch_norm_forward(one, out=other)),
        (ValueError, "out must not overlap weight", lambda: nbbn.batch_norm_forward(
            x, one.like(one.lies()[0, :, 0, 0]), out=one)),
        (ValueError, "running_var must not overlap x on a GPU", lambda: nbbn.batch_norm(
            one, None, one.like(one.lies()[0, :, 0, 0]), training=True)),
        (ValueError, "running_mean must not overlap weight on a GPU", lambda: nbbn.batch_norm(
            x, column, None, column, training=True)),
        (TypeError, "x must be .* or bfloat16.*int32", lambda: nbbn.batch_norm_forward(integers)),
        (TypeError, "out must have x's dtype", lambda: nbbn.batch_norm_forward(x, out=double)),
        (ValueError, "running_mean", lambda: nbbn.batch_norm(x)),
        (ValueError, "one value per channel", lambda: nbbn.batch_norm_forward(single)),
    ):  # fmt: skip
        with pytest.raises(error, match=says):
            call()
    assert_same_bits((x.get(), column.get(), buffer.get()), before)
    assert not gpus.ran


def test_cuda_that_cannot_be_used(gpus, host, monkeypatch):
    monkeypatch.setattr("nbbn.cuda.target.why_not", lambda: "numba-cuda is not installed")
    for kind in KINDS:
        with pytest.raises(nbbn.DeviceError, match=r"cuda:1.*numba-cuda is not installed"):
            nbbn.batch_norm_forward(gpus.array(kind, host["x"], 1))


# --- JAX, whose streams nobody knows ---------------------------------------------------------------


@pytest.fixture(params=["ours", "theirs"])
def jax(gpus, request):
    """Everything is done late: first nbbn's work, if it may be, or JAX's."""
    gpus.run_late(request.param)
    yield gpus.jax
    gpus.driver.forget()
    gc.collect()  # while there is a driver that memory can be given back to


def all_is_freed(gpus):
    """Whether all memory was given back, after all work was done."""
    gc.collect()
    gpus.driver.run()
    return not gpus.driver.live


@pytest.mark.parametrize("operation", [name for name in CALLS if name != "training"])
@pytest.mark.parametrize("index", [0, 1])
def test_jax(gpus, jax, host, operation, index):
    """Its arrays are not there yet when nbbn is called, and may be gone before nbbn has read them."""
    expected = results(CALLS[operation](**arguments_of(operation, host, np.copy)))
    arguments = arguments_of(operation, host, lambda a: gpus.array(JaxArray, a, index))
    gone = [weakref.ref(a) for a in arguments.values()]
    result = CALLS[operation](**arguments)
    del arguments
    assert not any(array() for array in gone)
    assert gpus.ran == [(ON_DEVICE[operation], f"cuda:{index}", 0)]
    assert {stream for _, stream in gpus.asked} == {1}
    assert_same_bits(results(result, JaxArray), expected)
    assert {array.index for array in results(result)} == {index}
    del result
    assert all_is_freed(gpus)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 2, 1, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_jax_result_that_is_used_and_gone(gpus, jax, host, dtype, order):
    """JAX gives it back before it has read it; it lies as x does."""
    values = host["x"].astype(dtype).transpose(order).copy().transpose(np.argsort(order))
    out = nbbn.batch_norm(gpus.array(JaxArray, values), training=True)
    assert (out.shape, out.strides, out.dtype) == (values.shape, values.strides, values.dtype)
    twice = jax.computed(out, lambda a: a + a)
    del out
    assert not gpus.driver.live
    assert_same_bits(twice.get(), 2 * np.ascontiguousarray(nbbn.batch_norm(values, training=True)))


@pytest.mark.parametrize("n", [2, 3])
def test_jax_call_after_call(gpus, jax, rng, n):
    """Each on the result of the one before, of which nothing is kept."""
    values = rng.normal(size=(n, 5)).astype(np.float32)
    x = gpus.array(JaxArray, values)
    for _ in range(4):
        x = nbbn.batch_norm_forward(x).out
        values = nbbn.batch_norm_forward(values).out
    assert_same_bits(x.get(), values)
    del x
    assert all_is_freed(gpus)


def test_jax_without_float64(gpus, jax, host):
    jax.config.jax_enable_x64 = False
    result = nbbn.batch_norm_forward(gpus.array(JaxArray, host["x"]))
    expected = nbbn.batch_norm_forward(host["x"])
    assert_same_bits(result.out.get(), expected.out)
    for name in ("mean", "var", "invstd"):
        assert_same_bits(getattr(result, name).get(), getattr(expected, name).astype(np.float32))


def test_jax_training(gpus, jax, host):
    """Running statistics cannot be JAX's; those of another library are updated."""
    x = gpus.array(JaxArray, host["x"])
    for name in ("running_mean", "running_var"):
        column = gpus.array(JaxArray, host[name])
        with pytest.raises(TypeError, match=f"^{name} .*immutable.*batch_norm_forward"):
            nbbn.batch_norm(x, **{name: column}, training=True)
        assert_same_bits(column.get(), host[name])
    assert not gpus.ran
    columns = [gpus.array(CupyArray, host[name]) for name in ("running_mean", "running_var")]
    out = nbbn.batch_norm(x, *columns, training=True)
    on_host = [host["running_mean"], host["running_var"]]
    assert_same_bits(out.get(), nbbn.batch_norm(host["x"], *on_host, training=True))
    assert_same_bits(tuple(column.get() for column in columns), tuple(on_host))


@pytest.mark.parametrize("operation", CALLS)
def test_jax_empty(gpus, jax, host, operation):
    host |= {name: host[name][:0] for name in ("x", "grad_out")}
    if operation == "training":
        host |= {"running_mean": None, "running_var": None}
    expected = results(CALLS[operation](**arguments_of(operation, host, lambda a: a)))
    result = CALLS[operation](
        **arguments_of(operation, host, lambda a: None if a is None else gpus.array(JaxArray, a))
    )
    assert_same_bits(results(result, JaxArray), expected)


def test_jax_array_beside_one_of_another_library(gpus, jax, host):
    """It is gone, and its memory in use again, before the other library's stream has come to it."""
    gpus.streams["torch"] = 0x2000
    expected = nbbn.batch_norm_forward(host["x"], host["weight"])
    x = gpus.array(Tensor, host["x"])
    result = nbbn.batch_norm_forward(x, gpus.array(JaxArray, host["weight"]))
    assert gpus.asked == [("JaxArray", 0x2000)] and gpus.ran == [("forward", "cuda:0", 0x2000)]
    gpus.driver.run()
    assert_same_bits(results(result, Tensor), results(expected))


def test_jax_that_takes_no_result(gpus, jax, host, monkeypatch):
    def refuse(exporter):
        raise RuntimeError("UNIMPLEMENTED")

    monkeypatch.setattr(jax.dlpack, "from_dlpack", refuse)
    x = gpus.array(JaxArray, host["x"])
    with pytest.raises(nbbn.DeviceError, match="JAX does not take the result: UNIMPLEMENTED"):
        nbbn.batch_norm_forward(x)
    assert all_is_freed(gpus)


@pytest.mark.parametrize(("told", "used"), [(0xE0, 0xE0), (2, 2), (1, 1), (None, 1), (-1, 1), (-1, 0xE0)])
def test_stream_that_is_told_waits_for_a_result(gpus, jax, host, told, used):
    """As DLPack has it: the stream that it is told, or the default one, and with -1 none."""
    framework = frameworks.framework_of("x", gpus.array(JaxArray, host["x"]))
    values, seen = host["weight"], np.zeros(5)
    exporter = framework.on_gpu(values, 1)
    capsule = exporter.__dlpack__(stream=told)
    memory = frameworks.read("values", exporter, -1).view(np.ndarray)
    with gpus.driver.on(1):
        gpus.driver.add(used, lambda: np.copyto(seen, memory))
    gpus.driver.run()
    assert capsule is not None
    late = told == -1 and used == 0xE0 and gpus.driver.first == "theirs"
    assert (seen.tolist() == values.tolist()) != late


def test_jax_and_a_driver_that_frees_nothing(gpus, jax, host, monkeypatch, caplog):
    """As while a graph is captured."""
    out = nbbn.batch_norm(gpus.array(JaxArray, host["x"]), training=True)
    refused = enum.IntEnum("CUresult", {"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": 900})(900)
    monkeypatch.setattr(gpus.driver, "cuCtxRecordEvent", lambda context, event: (refused,))
    with caplog.at_level(logging.WARNING, "nbbn"):
        del out
    assert "memory on GPU 0 is not freed" in caplog.text and "CAPTURE" in caplog.text


@pytest.mark.parametrize("x64", [True, False])
def test_jax_module(gpus, jax, host, x64):
    """The same as on the CPU, bit by bit: between its calls it keeps float64 statistics."""
    jax.config.jax_enable_x64 = x64
    cpu, gpu = module_on("cpu", host), module_on("cuda:1", host)
    empty = gpus.array(JaxArray, host["x"][:0], 1)
    assert gpu(empty).shape == gpu.backward(empty).shape == (0, 5, 6, 7)
    for mode in (True, True, False):
        cpu.train(mode)
        gpu.train(mode)
        out = gpu(gpus.array(JaxArray, host["x"], 1))
        assert_same_bits(out.get(), cpu(host["x"]))
        grad_x = gpu.backward(gpus.array(JaxArray, host["grad_out"], 1))
        assert_same_bits(grad_x.get(), cpu.backward(host["grad_out"]))
        for name in ("grad_weight", "grad_bias"):
            assert_same_bits(getattr(gpu, name).get(), getattr(cpu, name))
        same_state(gpu, cpu)


# --- BatchNorm -------------------------------------------------------------------------------------


def module_on(device, host, **options):
    bn = nbbn.BatchNorm(5, eps=1e-3, device=device, **options)
    names = [n for n in ("weight", "bias", "running_mean", "running_var") if n in bn.state_dict()]
    bn.load_state_dict({n: host[n] for n in names} | {"num_batches_tracked": 3})
    return bn


def same_state(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name in first:
        assert type(first[name]) is np.ndarray
        assert_same_bits(first[name], second[name])


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=type_id)
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_module(gpus, host, device, kind, dtype, momentum):
    """The same as on the CPU, bit by bit: here the kernels are the same.

    But for gradients of float16, which the kernels round by way of float32.
    """
    if dtype in HALF:
        host |= {name: host[name].astype(dtype) for name in ("x", "grad_out")}
    cpu = module_on("cpu", host, dtype=dtype, momentum=momentum)
    gpu = module_on(device, host, dtype=dtype, momentum=momentum)
    index = int(device == "cuda:1")
    assert gpu.device == f"cuda:{index}" and f"device='{gpu.device}'" in repr(gpu)
    x, grad_out = (gpus.array(kind, host[name], index) for name in ("x", "grad_out"))
    for mode in (True, True, False):
        cpu.train(mode)
        gpu.train(mode)
        out = gpu(x)
        assert type(out) is kind
        assert_same_bits(out.get(), cpu(host["x"]))
        grad_x = gpu.backward(grad_out)
        assert type(grad_x) is kind
        assert_same_bits(grad_x.get(), cpu.backward(host["grad_out"]))
        for name in ("grad_weight", "grad_bias"):
            gradient = getattr(gpu, name)
            assert type(gradient) is NumbaArray and gradient.index == index
            assert gradient.dtype == dtype
            np.testing.assert_array_max_ulp(gradient.get(), getattr(cpu, name), int(dtype in HALF))
        same_state(gpu, cpu)
    assert type(gpu.num_batches_tracked) is np.ndarray


@pytest.mark.parametrize("kind", [CupyArray, Tensor], ids=kind_id)
def test_bfloat16_on_a_gpu(gpus, host, kind):
    """Of the arrays that have it, with a module of float32; Numba's device arrays do not."""
    host |= {name: host[name].astype(DTYPES[3]) for name in ("x", "grad_out")}
    cpu, gpu = module_on("cpu", host), module_on("cuda", host)
    assert_same_bits(gpu(gpus.array(kind, host["x"])).get(), cpu(host["x"]))
    grad_x = gpu.backward(gpus.array(kind, host["grad_out"]))
    assert type(grad_x) is kind and grad_x.dtype == DTYPES[3]
    assert_same_bits(grad_x.get(), cpu.backward(host["grad_out"]))
    same_state(gpu, cpu)
    refused = r"^dtype must be float32, float64 or float16 .*cuda:0.*got bfloat16; inputs of bfloat16 go with"
    with pytest.raises(TypeError, match=refused):
        nbbn.BatchNorm(5, device="cuda", dtype="bfloat16")
    stays = nbbn.BatchNorm(5, dtype="bfloat16")
    with pytest.raises(TypeError, match=refused):
        stays.to("cuda")
    assert stays.device == "cpu" and type(stays.weight) is np.ndarray
    with pytest.raises(TypeError, match=r"^x must be float32, float64, float16"):
        nbbn.batch_norm_forward(gpus.array(NumbaArray, host["x"]))


def test_module_evaluation_gradient_after_a_training_step(gpus, host):
    """It is that of the statistics of its own call."""
    x, grad_out = gpus.array(Tensor, host["x"]), gpus.array(Tensor, host["grad_out"])
    bn = module_on("cuda", host).eval()
    bn(x)
    expected = bn.backward(grad_out).get()
    bn(x)
    bn.running_mean.put(7.0)
    bn.running_var.put(7.0)
    assert_same_bits(bn.backward(grad_out).get(), expected)


def test_module_runs_on_the_stream_of_x(gpus, host):
    gpus.streams["torch"] = 0x2000
    bn = module_on("cuda:1", host)
    x = gpus.array(Tensor, host["x"], 1)
    for mode in (True, False):
        bn.train(mode)(x)
        bn.backward(x)
    assert {run[1:] for run in gpus.ran} == {("cuda:1", 0x2001)}


def test_module_empty_batch(gpus, host):
    bn, cpu = module_on("cuda", host), module_on("cpu", host)
    empty = gpus.array(CupyArray, host["x"][:0])
    assert bn(empty).shape == (0, 5, 6, 7)
    assert bn.backward(empty).shape == (0, 5, 6, 7)
    assert bn.grad_weight.get().tolist() == [0] * 5
    same_state(bn, cpu)


def test_module_moves(gpus, host):
    bn, expected = module_on("cpu", host), module_on("cpu", host)
    bn(host["x"])
    bn.backward(host["grad_out"])
    expected(host["x"])
    gradient = bn.grad_weight.copy()
    for device, kind in (("cuda:1", NumbaArray), ("cuda:0", NumbaArray), ("cpu", np.ndarray)):
        assert bn.to(device) is bn and bn.device == device
        columns = [bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.grad_weight, bn.grad_bias]
        assert {type(column) for column in columns} == {kind}
        if kind is NumbaArray:
            assert {column.index for column in columns} == {int(device[-1])}
        same_state(bn, expected)
        with pytest.raises(RuntimeError, match="backward needs a call"):
            bn.backward(host["grad_out"])
    assert_same_bits(bn.grad_weight, gradient)
    weight = bn.weight
    assert bn.to("cpu").weight is weight


def test_module_without_parameters(gpus, host):
    bn = nbbn.BatchNorm(5, affine=False, track_running_stats=False, device="cuda")
    x = gpus.array(CupyArray, host["x"])
    assert_same_bits(bn(x).get(), nbbn.batch_norm_forward(host["x"]).out)
    bn.backward(x)
    assert bn.grad_weight is None and bn.to("cpu").weight is None


OTHER_MODULES = {
    "layer": lambda device: nbbn.LayerNorm((3, 4), device=device),
    "layer, last dimension": lambda device: nbbn.LayerNorm(4, bias=False, device=device),
    "rms": lambda device: nbbn.RMSNorm((3, 4), device=device),
    "rms, three dimensions": lambda device: nbbn.RMSNorm((6, 3, 4), device=device),
    "group": lambda device: nbbn.GroupNorm(3, 6, device=device),
    "instance": lambda device: nbbn.InstanceNorm(6, affine=True, track_running_stats=True, device=device),
}


@pytest.mark.parametrize("samples", [2, 0])
@pytest.mark.parametrize("kind", KINDS, ids=kind_id)
@pytest.mark.parametrize("name", OTHER_MODULES)
def test_other_modules(gpus, rng, kind, name, samples):
    """The same as on the CPU, bit by bit, with gradients in the parameters' own shape."""
    cpu, gpu = (OTHER_MODULES[name](device) for device in ("cpu", "cuda"))
    state = {key: np.abs(value + rng.normal(size=value.shape)) for key, value in cpu.state_dict().items()}
    for module in (cpu, gpu):
        module.load_state_dict(state | ({"num_batches_tracked": 3} if "num_batches_tracked" in state else {}))
    x, grad_out = rng.normal(size=(2, samples, 6, 3, 4)).astype(np.float32)
    there = [gpus.array(kind, array) for array in (x, grad_out)]
    for mode in (True, False):
        assert_same_bits(gpu.train(mode)(there[0]).get(), cpu.train(mode)(x))
        assert_same_bits(gpu.backward(there[1]).get(), cpu.backward(grad_out))
        for gradient in ("grad_weight", "grad_bias"):
            expected = getattr(cpu, gradient)
            assert (expected is None) == (getattr(gpu, gradient) is None)
            if expected is not None:
                assert_same_bits(getattr(gpu, gradient).get(), expected)
        same_state(gpu, cpu)


def test_module_and_x_on_different_devices(gpus, host):
    bn = module_on("cuda:1", host)
    before = module_on("cpu", host)
    for x, says in (
        (host["x"], "x is on cpu, .*weight is on cuda:1"),
        (gpus.array(Tensor, host["x"]), "x is on cuda:0, .*weight is on cuda:1"),
    ):
        for mode in (True, False):
            with pytest.raises(nbbn.DeviceError, match=says):
                bn.train(mode)(x)
    bn.train()(gpus.array(Tensor, host["x"], 1))
    before(host["x"])
    with pytest.raises(nbbn.DeviceError, match="grad_out is on cpu"):
        bn.backward(host["grad_out"])
    same_state(bn, before)


def test_module_on_a_device_that_is_not_there(gpus, host, monkeypatch):
    bn, before = module_on("cpu", host), module_on("cpu", host)
    for device, says in (
        ("cuda:2", "the number of GPUs here is 2"),
        ("gpu", "'cuda:N'"),
        ("cuda:-1", "'cuda:N'"),
    ):
        with pytest.raises(nbbn.DeviceError, match=f"device.*{says}"):
            bn.to(device)
    monkeypatch.setattr("nbbn.cuda.target.why_not", lambda: "there is no NVIDIA GPU")
    for device in ("cuda", "cuda:0"):
        for call in (bn.to, lambda device: nbbn.BatchNorm(5, device=device)):
            with pytest.raises(nbbn.DeviceError, match=f"device '{device}'.*there is no NVIDIA GPU"):
                call(device)
    assert bn.device == "cpu" and bn.weight.tolist() == before.weight.tolist()
    same_state(bn, before)


def with_pickle(bn):
    return pickle.loads(pickle.dumps(bn))


def test_module_shallow_copy(gpus, host):
    """It shares its arrays, as on the CPU."""
    bn = module_on("cuda:1", host)
    twin = copy.copy(bn)
    assert twin.device == "cuda:1" and twin.weight is bn.weight
    twin(gpus.array(Tensor, host["x"], 1))
    same_state(twin, bn)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, with_pickle])
def test_module_copies(gpus, host, duplicate):
    bn = module_on("cuda:1", host)
    x = gpus.array(Tensor, host["x"], 1)
    bn(x)
    bn.backward(x)
    twin = duplicate(bn)
    assert twin.device == "cuda:1" and type(twin.weight) is NumbaArray
    same_state(twin, bn)
    assert_same_bits(twin.grad_bias.get(), bn.grad_bias.get())
    twin(x)
    assert twin.num_batches_tracked == bn.num_batches_tracked + 1


def test_pickle_comes_back_where_there_is_no_gpu(gpus, host, monkeypatch, caplog):
    bn = module_on("cuda:1", host)
    pickled = pickle.dumps(bn)
    monkeypatch.setattr("nbbn.cuda.target.why_not", lambda: "there is no NVIDIA GPU")
    with caplog.at_level(logging.WARNING, "nbbn"):
        twin = pickle.loads(pickled)
    assert "there is no NVIDIA GPU" in caplog.text
    assert twin.device == "cpu" and type(twin.weight) is np.ndarray
    same_state(twin, bn)
    assert twin(host["x"]).shape == DIMS


def test_loading_writes_into_the_arrays_that_are_there(gpus, host):
    bn = module_on("cuda", host)
    weight = bn.weight
    bn.load_state_dict(module_on("cpu", host | {"weight": host["bias"]}).state_dict())
    assert bn.weight is weight
    assert_same_bits(weight.get(), host["bias"].astype(np.float32))
    with pytest.raises(ValueError, match="running_var"):
        bn.load_state_dict({**bn.state_dict(), "weight": np.ones(5), "running_var": np.ones(3)})
    assert_same_bits(weight.get(), host["bias"].astype(np.float32))


def test_column_of_another_library(gpus, host):
    """Whoever puts a CuPy array in the place of a parameter has it used."""
    bn, cpu = module_on("cuda", host), module_on("cpu", host)
    bn.weight, bn.running_var = (gpus.array(CupyArray, a) for a in (cpu.weight, cpu.running_var))
    x = gpus.array(CupyArray, host["x"])
    for mode in (True, False):
        assert_same_bits(bn.train(mode)(x).get(), cpu.train(mode)(host["x"]))
        assert_same_bits(bn.backward(x).get(), cpu.backward(host["x"]))


# --- warmup ----------------------------------------------------------------------------------------

OPERATIONS = ["training", "evaluation", "backward"]
RUN_BY = {
    "training": {"stats", "forward"},
    "evaluation": {"evaluate"},
    "backward": {"backward", "evaluate"},  # and the gradients of parameters, rounded
}


@pytest.mark.parametrize("wanted", [OPERATIONS, *([one] for one in OPERATIONS), []], ids=str)
def test_warmup(gpus, monkeypatch, wanted):
    """It runs what is wanted, on memory of its own that it gives back."""
    monkeypatch.setattr("nbbn.cuda.warmup.LAYERS", ((64, 7), (256, 1)))  # these GPUs have little memory
    monkeypatch.setattr("nbbn.cuda.warmup.DENSE", ((16, 32),))
    gpus.run_late("ours")
    with gpus.device(1):
        nbbn.warmup(["float32"], device="cuda", **{name: name in wanted for name in OPERATIONS})
    assert {operation for operation, _, _ in gpus.ran} == set().union(*(RUN_BY[name] for name in wanted))
    assert {run[1:] for run in gpus.ran} <= {("cuda:1", 0)}
    assert all_is_freed(gpus)


@pytest.mark.parametrize(
    ("name", "value"),
    [("norms", ["batch", "layer"]), ("activation", "relu"), ("residual", True), ("mask", True)],
)
def test_warmup_of_what_a_gpu_compiles_later(gpus, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must .* on a GPU"):
        nbbn.warmup(device="cuda", **{name: value})
    assert not gpus.ran


class Recorder:
    """Stands for target's part of the way to a GPU, and takes note of which kernels are wanted."""

    def __init__(self, monkeypatch, device):
        self.kernels = set()
        for name, value in {
            "properties": lambda number: device,
            "why_not": lambda: None,
            "current": lambda number: contextlib.nullcontext(),
            "upload": lambda array: types.SimpleNamespace(address=1 << 20),
            "Memory": lambda *arguments: types.SimpleNamespace(address=1 << 20, free=lambda: None),
            "Shared": lambda *arguments: types.SimpleNamespace(address=1 << 21),
            "launcher": self.launcher,
        }.items():
            monkeypatch.setattr(target, name, value)

    def launcher(self, kernel, names, kinds, device):
        self.kernels.add((kernel.__name__, names, str(kinds)))
        return lambda *arguments: None

    def wanted_by(self, work, *arguments):
        """Return the kernels that a function wants."""
        self.kernels = set()
        work(*arguments)
        return self.kernels


def operate(shape, axis, dtype):
    """Run all operations on arrays without gaps."""
    strides = np.cumprod([dtype.itemsize, *shape[:0:-1]])[::-1]
    strides = tuple(int(step) for step in strides)
    one, two, three = (find(shape, axis, (strides,) * n, dtype, 1, "cuda:0") for n in (1, 2, 3))
    x, column = 1 << 22, (1 << 21, 8, 8)
    one.stats(x, x)
    two.forward(x, x, x, column, column, column, column, 1e-5, 0.1, 1.0)
    two.evaluate(x, x, column, column, column, column, 1e-5)
    for training in (True, False):
        three.backward(x, x, x, x, column, column, column, training)


# What is known of an H100, a B200, an A100, a GPU with little shared memory, and one without teams.
PROPERTIES = [
    ((9, 0), 132, 232448, True),
    ((10, 0), 148, 232448, True),
    ((8, 0), 108, 166912, True),
    ((8, 9), 128, 101376, True),
    ((9, 0), 132, 232448, False),
]


@pytest.mark.parametrize("properties", PROPERTIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_warmup_compiles_all_that_images_need(monkeypatch, dtype, properties):
    find.cache_clear()
    recorder = Recorder(monkeypatch, target.Properties(*properties))
    dtype = np.dtype(dtype)
    warmed = recorder.wanted_by(warm_up, "cuda:0", [storage_of(dtype)], OPERATIONS)
    assert len(warmed) > 20
    for channels, side in ((64, 112), (256, 56), (128, 28), (1024, 14), (2048, 7)):
        for shape, axis in (((32, channels, side, side), 1), ((32, side, side, channels), 3)):
            kernels = recorder.wanted_by(operate, shape, axis, dtype)
            assert kernels and kernels <= warmed, (shape, axis, [name for name, _, _ in kernels - warmed])
    find.cache_clear()


def test_warmup_keeps_machine_code_on_disk(python, tmp_path):
    """A second process compiles nothing."""
    pytest.importorskip("numba_cuda", reason="the CUDA kernels are compiled with numba-cuda")
    code = """if True:
        import pytest
        from test_devices import Recorder
        from nbbn.cuda import target
        from nbbn.dtypes import storage_of
        from nbbn.cuda.warmup import warm_up
        with pytest.MonkeyPatch.context() as patch:
            recorder = Recorder(patch, target.Properties((9, 0), 132, 232448, True))
            def launcher(kernel, names, kinds, device):
                target.machine_code(kernel, names, kinds, (9, 0))
                return recorder.launcher(kernel, names, kinds, device)
            patch.setattr(target, "launcher", launcher)
            if {compiled}:
                target.ptx = None  # must not be called
            import numpy as np
            warm_up("cuda:0", [storage_of(np.dtype("float32"))], ["evaluation"])
            print(len(recorder.kernels))
        """
    environment = {"NUMBA_CACHE_DIR": str(tmp_path)}
    count = int(python(code.format(compiled=False), **environment))
    assert count == len(list(tmp_path.rglob("*.cubin"))) > 4
    assert int(python(code.format(compiled=True), **environment)) == count


def test_warmup_of_a_device_that_is_not_there(gpus, monkeypatch):
    for device, error, says in (
        ("cuda:2", nbbn.DeviceError, "the number of GPUs here is 2"),
        ("gpu", nbbn.DeviceError, "'cuda:N'"),
        (0, TypeError, "must be a str"),
    ):
        with pytest.raises(error, match=f"device.*{says}"):
            nbbn.warmup(device=device)
    monkeypatch.setattr("nbbn.cuda.target.why_not", lambda: "there is no NVIDIA GPU")
    with pytest.raises(nbbn.DeviceError, match=r"device 'cuda'.*there is no NVIDIA GPU"):
        nbbn.warmup(device="cuda")
    with pytest.raises(TypeError, match="dtype"):
        nbbn.warmup(["int32"], device="cuda")
    assert not gpus.ran


# --- Numba's simulator -----------------------------------------------------------------------------


def test_memory_of_a_call_that_raises_is_given_back(python):
    """Whatever it is that raises: a compiler, a launch."""
    program = """
import numpy as np, nbbn
from numba import cuda
from nbbn.cuda import run, target
had = {"taken": 0, "freed": 0}

class Memory(target.Memory):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        had["taken"] += 1

    def free(self):
        had["freed"] += 1

def fails(*arguments, **options):
    raise RuntimeError("as planned")

target.Memory = Memory
x = cuda.to_device(np.ones((4, 3), np.float32))
mask = np.ones(4, bool)

def forward(mask):
    nbbn.batch_norm_forward(x, mask=mask)

for owner, name in ((run._Call, "add"), (run._Call, "launch"), (target, "write")):
    kept = getattr(owner, name)
    setattr(owner, name, fails)
    try:
        forward(mask)
    except RuntimeError:
        pass
    else:
        raise AssertionError(name)
    setattr(owner, name, kept)
print(had["taken"], had["freed"])
forward(None)
print(had["taken"], had["freed"])
"""
    assert python(program, NUMBA_ENABLE_CUDASIM="1").split() == ["3", "3", "4", "4"]


def test_arrays_of_the_simulator(python):
    """With the kernels that a GPU runs, on arrays of Numba's simulator."""
    program = """
import numpy as np, nbbn
from numba import cuda
x = np.random.default_rng(1).normal(size=(4, 3, 5)).astype(np.float32)
on_gpu = cuda.to_device(x)
one, other = nbbn.BatchNorm(3, device="cuda"), nbbn.BatchNorm(3)
for mode in (True, False):
    one.train(mode)
    other.train(mode)
    for call in ("__call__", "backward"):
        actual, expected = getattr(one, call)(on_gpu), getattr(other, call)(x)
        np.testing.assert_allclose(actual.copy_to_host(), expected, rtol=1e-5, atol=1e-5)
    state = other.state_dict()
    for name, value in one.state_dict().items():
        np.testing.assert_allclose(value, state[name], rtol=1e-6, atol=1e-6)
print(one.device, type(one.weight).__name__)
"""
    assert python(program, NUMBA_ENABLE_CUDASIM="1").split() == ["cuda:0", "FakeCUDAArray"]
