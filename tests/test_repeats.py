"""Calls that are made again: the bits of one that is not, and what is not like it is looked at anew."""

import contextlib
import functools
import gc
import threading
import weakref

import numba
import numpy as np
import pytest

import nbbn
import nbbn.repeats
from checks import assert_same_bits
from nbbn import compiler, functional
from nbbn.cpu import repeat


@pytest.fixture(autouse=True)
def nothing_known():
    """What other tests called is not known here, nor what is called here to others."""
    nbbn.repeats.forget()


@pytest.fixture
def repeated(monkeypatch):
    """A list that gets one True for each call that was made again."""
    found = []
    call = repeat.Repeat.__call__

    def counting(self, *arguments, **options):
        made = call(self, *arguments, **options)
        found.append(made is not None)
        return made

    monkeypatch.setattr(repeat.Repeat, "__call__", counting)
    return found


@contextlib.contextmanager
def anew():
    """No call is made again."""
    with pytest.MonkeyPatch.context() as patch:
        for repeats in nbbn.repeats._all:
            patch.setattr(repeats, "again", lambda *_, **__: None)
            patch.setattr(repeats, "recorder", lambda key, run: run)
        yield


SHAPE = (6, 8, 5, 3)  # samples, channels, …
CHANNELS, LAST = SHAPE[1], SHAPE[2:]
LARGE = (11, 8, 90, 50)  # so large that a call is several threads'


def draw(rng, dtype, shape=SHAPE):
    """Return arrays for any of the operations."""
    last = shape[2:]
    return {
        "x": rng.normal(size=shape).astype(dtype),
        "grad_out": rng.normal(size=shape).astype(dtype),
        "out": np.full(shape, np.nan, dtype),
        "weight": rng.normal(size=CHANNELS).astype(np.float32),
        "bias": rng.normal(size=CHANNELS),
        "running_mean": rng.normal(size=CHANNELS),
        "running_var": rng.uniform(1, 2, CHANNELS).astype(np.float32),
        "mask": rng.random((shape[0], *last)) < 0.7,
        "residual": rng.normal(size=shape).astype(dtype),
        "last_weight": rng.normal(size=last).astype(np.float32),
        "last_bias": rng.normal(size=last),
    }


def copies(arguments, layout=np.asarray):
    """Return copies of them all, x and what is like it laid out as they are to be."""
    return {
        name: value
        if not isinstance(value, np.ndarray)
        else layout(value.copy())
        if value.shape == arguments["x"].shape
        else value.copy()
        for name, value in arguments.items()
    }


def last(a):
    """Return the shape of what layer norm normalizes together."""
    return a["x"].shape[2:]


def batch_norm(a, **options):
    statistics = a["running_mean"], a["running_var"]
    return nbbn.batch_norm(a["x"], *statistics, a["weight"], a["bias"], **options)


def gradients(function, forward, a, *shape, **options):
    found = forward(a["x"], *shape)
    centered = {} if function is nbbn.rms_norm_backward else {"mean": found.mean}
    return function(a["grad_out"], a["x"], *shape, invstd=found.invstd, **centered, **options)


LAYER = nbbn.layer_norm_backward, nbbn.layer_norm_forward
RMS = nbbn.rms_norm_backward, nbbn.rms_norm_forward
GROUP = nbbn.group_norm_backward, nbbn.group_norm_forward
INSTANCE = nbbn.instance_norm_backward, nbbn.instance_norm_forward
BATCH = nbbn.batch_norm_backward, nbbn.batch_norm_forward
OPERATIONS = {
    "forward": lambda a: nbbn.batch_norm_forward(a["x"], a["weight"], a["bias"], out=a["out"]),
    "training": lambda a: batch_norm(a, training=True, out=a["out"]),
    "training, nothing beside": lambda a: nbbn.batch_norm(a["x"], training=True),
    "training, momentum 0": lambda a: batch_norm(a, training=True, momentum=0.0),
    "training, in place": lambda a: batch_norm(a, training=True, out=a["x"]),
    "evaluation": lambda a: batch_norm(a, out=a["out"]),
    "backward": lambda a: gradients(*BATCH, a, weight=a["weight"], out=a["out"]),
    "backward, evaluation": lambda a: gradients(*BATCH, a, weight=a["weight"], training=False),
    "relu": lambda a: batch_norm(a, training=True, activation="relu"),
    "relu, evaluation": lambda a: batch_norm(a, activation="relu"),
    "relu backward": lambda a: gradients(*BATCH, a, weight=a["weight"], bias=a["bias"], activation="relu"),
    "residual": lambda a: batch_norm(
        a, training=True, activation="relu", residual=a["residual"], out=a["out"]
    ),
    "residual, into it": lambda a: batch_norm(a, training=True, residual=a["residual"], out=a["residual"]),
    "residual, evaluation": lambda a: batch_norm(a, residual=a["residual"]),
    "residual, masked": lambda a: batch_norm(a, residual=a["residual"], mask=a["mask"], training=True),
    "masked": lambda a: nbbn.batch_norm_forward(a["x"], a["weight"], a["bias"], mask=a["mask"], out=a["out"]),
    "masked training": lambda a: batch_norm(a, training=True, mask=a["mask"]),
    "masked relu": lambda a: batch_norm(a, training=True, mask=a["mask"], activation="relu"),
    "masked evaluation": lambda a: batch_norm(a, mask=a["mask"], out=a["out"]),
    "masked backward": lambda a: gradients(*BATCH, a, weight=a["weight"], mask=a["mask"], out=a["out"]),
    "layer": lambda a: nbbn.layer_norm_forward(a["x"], last(a), a["last_weight"], a["last_bias"]),
    "layer, last": lambda a: nbbn.layer_norm(a["x"], last(a)[-1], out=a["out"]),
    "layer backward": lambda a: gradients(*LAYER, a, last(a), weight=a["last_weight"]),
    "layer backward, last": lambda a: gradients(*LAYER, a, last(a)[-1]),
    "rms": lambda a: nbbn.rms_norm_forward(a["x"], last(a), a["last_weight"]),
    "rms backward": lambda a: gradients(*RMS, a, last(a), weight=a["last_weight"]),
    "group": lambda a: nbbn.group_norm_forward(a["x"], 2, a["weight"], a["bias"], out=a["out"]),
    "group backward": lambda a: gradients(*GROUP, a, 2, weight=a["weight"]),
    "instance": lambda a: nbbn.instance_norm(a["x"], None, None, a["weight"], a["bias"], out=a["out"]),
    "instance backward": lambda a: gradients(*INSTANCE, a, weight=a["weight"]),
}
# What changes its record between two kernels.
NOT_KEPT = ("backward, evaluation",)
LAYOUTS = {
    "contiguous": np.asarray,
    "channels last": lambda a: np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1),
    "backwards": lambda a: np.ascontiguousarray(a[::-1, :, ::-1])[::-1, :, ::-1],
}


def made(operation, arguments):
    """Return all that a call returned and wrote, or what it raised, with the arrays as they are then."""
    try:
        found = operation(arguments)
    except (TypeError, ValueError) as error:
        found = f"{type(error).__name__}: {error}"
    found = found if isinstance(found, tuple) else (found,)
    return [*found, *(arguments.values() if isinstance(arguments, dict) else ())]


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert type(a) is type(b)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype
            assert_same_bits(a, b)
        else:
            assert a is b or a == b


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_the_same_bits(rng, repeated, operation, layout, dtype):
    """From the third call on; of what must be copied first, and of a backward pass in evaluation, none."""
    for _ in range(5):
        arguments = draw(rng, dtype)
        found = made(operation, copies(arguments, layout))
        with anew():
            assert_same(found, made(operation, copies(arguments, layout)))
    if layout is np.asarray and operation is not OPERATIONS["backward, evaluation"]:
        assert repeated and all(repeated)
    assert not any(isinstance(part, str) for part in found)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_the_same_bits_on_several_threads(rng, repeated, operation, layout):
    """Of what one thread may, and may not, have; and of as many threads as are set."""
    threads = numba.get_num_threads()
    given = draw(rng, np.float32, LARGE)
    with anew():
        expected = made(operation, copies(given, layout))
    try:
        for number in (threads, 1, threads):
            numba.set_num_threads(number)
            for _ in range(3):
                assert_same(made(operation, copies(given, layout)), expected)
    finally:
        numba.set_num_threads(threads)
    assert layout is not np.asarray or repeated or operation in map(OPERATIONS.get, NOT_KEPT)


@pytest.mark.parametrize(
    ("shape", "along"), [(LARGE, ()), ((11, 8, 45, 45), ("mask",)), ((11, 8, 45, 45), ("residual",))]
)
def test_as_many_threads_as_are_set(rng, repeated, monkeypatch, shape, along):
    """Another number than before: who is asked for so many is looked at, not what they do."""
    compiler.pool.start()
    asked = set()
    over = compiler._parallel_loop().over

    def noted(kernel, threads, *rest):
        asked.add(threads)
        return over(kernel, threads, *rest)

    monkeypatch.setattr(compiler._parallel_loop(), "over", noted)
    given = draw(rng, np.float64, shape)
    before = numba.get_num_threads()
    try:
        for number in (before, 1):
            numba.set_num_threads(number)
            for _ in range(4):
                nbbn.batch_norm(given["x"], training=True, **{name: given[name] for name in along})
            assert asked == ({number} if number > 1 else set())
            asked.clear()
    finally:
        numba.set_num_threads(before)
    assert repeated == [True] * (2 + (2 if before > 1 else 4))


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


def beside(a, b):
    """Return a copy of a, and one of b whose memory begins in the middle of it."""
    memory = np.zeros(a.nbytes + b.nbytes, np.uint8)
    first, second = memory[: a.nbytes].view(a.dtype), memory[a.nbytes // 2 :][: b.nbytes].view(b.dtype)
    first, second = first.reshape(a.shape), second.reshape(b.shape)
    second[...] = b
    first[...] = a
    return first, second


COLUMNS = "weight", "bias", "running_mean", "running_var"
OTHERS = {
    "of float64": lambda a: a.astype(np.float64),
    "of float32": lambda a: a.astype(np.float32),
    "of int": lambda a: np.nan_to_num(a).astype(np.int64),
    "of the other byte order": lambda a: a.astype(a.dtype.newbyteorder()),
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: a[::-1],
    "one for all": lambda a: np.broadcast_to(a[:1], a.shape),
    "longer": lambda a: np.concatenate([a, a]),
    "with an axis more": lambda a: a[None],
    "masked": np.ma.array,
    "a list": np.ndarray.tolist,
    "read-only": read_only,
    "missing": lambda a: None,
}
CHANGES = {
    f"{name} {what}": lambda a, name=name, other=other: a.update({name: other(a[name])})
    for name in ("x", "out", *COLUMNS)
    for what, other in OTHERS.items()
}
CHANGES |= {
    f"{name} in the middle of out": lambda a, name=name: a.update(
        zip(("out", name), beside(a["out"], a[name]), strict=True)
    )
    for name in ("x", *COLUMNS)
}
CHANGES |= {
    "running_var in the middle of running_mean": lambda a: a.update(
        zip(("running_mean", "running_var"), beside(a["running_mean"], a["running_var"]), strict=True)
    ),
    "out is x": lambda a: a.update(out=a["x"]),
    "out is x backwards": lambda a: a.update(out=a["x"][::-1]),
    "out is x with two axes swapped": lambda a: a.update(out=a["x"].swapaxes(0, 1)),
    "weight is bias": lambda a: a.update(weight=a["bias"]),
    "running_mean is weight": lambda a: a.update(running_mean=a["weight"]),
}
for name, values in {
    "axis": (1.0, True, -3, np.int64(1), 2, None),
    "eps": (True, 0, np.float32(1e-5), float("nan"), -1.0, "1e-5", None),
    "momentum": (True, 1, np.float32(0.1), float("nan"), 1.5, None),
    "training": (1, 0, False, np.True_, None),
    "activation": ("relu", "gelu", "none", 1),
    "negative_slope": (0.2, True, float("inf")),
    "residual": (np.ones(SHAPE, np.float32), 1.0),
    "mask": (np.arange(SHAPE[0] * 15).reshape(SHAPE[0], *LAST) % 3 > 0, np.ones(3, bool)),
    "lengths": (np.arange(SHAPE[0]) % 3, [1.5]),
}.items():
    CHANGES |= {
        f"{name}={value!r}": lambda a, name=name, value=value: a.update({name: value}) for value in values
    }


MASKS = {
    f"mask {what}": lambda a, other=other: a.update(mask=other(a["mask"])) for what, other in OTHERS.items()
}
MASKS |= {
    "mask in the middle of out": lambda a: a.update(
        zip(("out", "mask"), beside(a["out"], a["mask"]), strict=True)
    ),
    "mask of one position": lambda a: a.update(mask=a["mask"][:1, :1, :1]),
    "mask in another order": lambda a: a.update(mask=np.asfortranarray(a["mask"])),
}
for count in (0, 1, 2, 5):
    MASKS[f"mask leaves {count}"] = lambda a, count=count: a["mask"].put(
        np.arange(a["mask"].size), np.arange(a["mask"].size) < count
    )


RESIDUALS = {
    f"residual {what}": lambda a, other=other: a.update(residual=other(a["residual"]))
    for what, other in OTHERS.items()
}
RESIDUALS |= {
    "residual in the middle of out": lambda a: a.update(
        zip(("out", "residual"), beside(a["out"], a["residual"]), strict=True)
    ),
    "out is the residual": lambda a: a.update(out=a["residual"]),
    "out is the residual backwards": lambda a: a.update(out=a["residual"][::-1]),
    "the residual is x": lambda a: a.update(residual=a["x"]),
    "all is x": lambda a: a.update(residual=a["x"], out=a["x"]),
}
ALONG = {(): {}, ("mask",): MASKS, ("residual",): RESIDUALS, ("mask", "residual"): MASKS | RESIDUALS}


@pytest.mark.parametrize("along", ALONG, ids=lambda along: " and ".join(along) or "alone")
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("training", [True, False])
def test_what_is_not_alike(rng, repeated, training, activation, along):
    """Each is done, or refused, as if it came first; and so is what comes after it."""
    others = {"grad_out", "last_weight", "last_bias", "mask", "residual"} - {*along}
    changes = CHANGES | ALONG[along]

    def operation(a):
        return nbbn.batch_norm(**a)

    def arguments():
        options = {"axis": 1, "eps": 1e-5, "momentum": 0.1, "training": training, "activation": activation}
        drawn = {**draw(rng, np.float32), "out": np.full(SHAPE, -7, np.float32), **options}
        return {name: value for name, value in drawn.items() if name not in others}

    for name, change in changes.items():
        for _ in range(3):
            operation(arguments())
        given = arguments()
        found = []
        for context in (contextlib.nullcontext(), anew()):
            here = copies(given)
            change(here)
            with context:
                found.append(made(operation, here))
        try:
            assert_same(*found)
        except AssertionError as error:
            raise AssertionError(name) from error
    assert sum(repeated) > len(changes)


def test_gradients_of_few_values(rng, repeated):
    """A mask that leaves one is refused, and one that leaves none has gradients of 0."""
    a = draw(rng, np.float32)
    forward = nbbn.batch_norm_forward(a["x"])

    def operation(count):
        mask = np.arange(a["mask"].size).reshape(a["mask"].shape) < count
        found = {"mean": forward.mean, "invstd": forward.invstd}
        return nbbn.batch_norm_backward(a["grad_out"], a["x"], mask=mask, **found)

    for count in (9, 9, 9, 2, 1, 0, 9):
        found = made(operation, count)
        with anew():
            assert_same(found, made(operation, count))
    assert repeated == [True, True, False, False, True]


def test_correction_of_few_values(rng, repeated):
    """Where a mask leaves no more values than are subtracted for the running variance, that is refused."""
    modules = [nbbn.BatchNorm(CHANNELS, correction=3) for _ in range(2)]
    a = draw(rng, np.float32)

    def operation(module, count):
        mask = np.arange(a["mask"].size).reshape(a["mask"].shape) < count
        return module(a["x"], mask=mask)

    for count in (9, 9, 9, 4, 3, 2, 9):
        found = made(functools.partial(operation, modules[0]), count)
        with anew():
            assert_same(found, made(functools.partial(operation, modules[1]), count))
        assert_same(*(list(module.state_dict().values()) for module in modules))
    assert repeated == [True, True, False, False, True]


def test_other_things_than_arrays(rng, repeated):
    """Their memory is not looked at beyond what they are."""
    arguments = draw(rng, np.float32)
    for _ in range(3):
        batch_norm(arguments, training=True)
    assert repeated == [True]
    for thing in (object(), 0, 1.5, "weight", [], lambda: None, type, np.float32(1), np.dtype(np.float32)):
        with pytest.raises((TypeError, ValueError), match=r"^weight must"):
            nbbn.batch_norm(arguments["x"], None, None, thing, None, True)
        with pytest.raises((TypeError, ValueError), match=r"^out must"):
            nbbn.batch_norm(arguments["x"], training=True, out=thing)


def test_modules(rng, repeated):
    """Outputs, gradients, statistics and counters, also of the moving average of all batches."""
    for momentum in (0.1, None):
        modules = [nbbn.BatchNorm(CHANNELS, momentum=momentum) for _ in range(2)]
        found = []
        for _ in range(6):
            a = draw(rng, np.float32)
            first = modules[0](a["x"]), *modules[0].backward(a["grad_out"])[:1]
            with anew():
                second = modules[1](a["x"]), *modules[1].backward(a["grad_out"])[:1]
            assert_same(first, second)
            states = [list(module.state_dict().values()) for module in modules]
            assert_same(*states)
            found.append(int(modules[0].num_batches_tracked))
        assert found == [1, 2, 3, 4, 5, 6]
    assert repeated and all(repeated)


def test_calls_at_once(rng):
    """One of them uses what is kept; the others do without, and all are right."""
    x = [rng.normal(size=(16, 8, 9)).astype(np.float32) for _ in range(8)]
    with anew():
        expected = [nbbn.batch_norm_forward(one) for one in x]
    wrong = []

    def call(k):
        for _ in range(300):
            found = nbbn.batch_norm_forward(x[k])
            if any(a.tobytes() != b.tobytes() for a, b in zip(found[:4], expected[k][:4], strict=True)):
                wrong.append(k)

    threads = [threading.Thread(target=call, args=(k,)) for k in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_within_a_call(rng):
    """As from a signal's handler: what is kept is in use, and is not used."""
    first, second = (rng.normal(size=(16, 8)) for _ in range(2))
    with anew():
        expected = nbbn.batch_norm_forward(second).out
    for _ in range(3):
        nbbn.batch_norm_forward(first)
    (kept,) = functional._trained._known.values()
    mine = kept._idle.pop()
    assert_same_bits(nbbn.batch_norm_forward(second).out, expected)
    kept._idle.append(mine)
    assert_same_bits(nbbn.batch_norm_forward(second).out, expected)


def test_nothing_of_the_caller_is_kept(rng, repeated):
    """Neither arrays nor modules, nor what a module counts in."""
    bn = nbbn.BatchNorm(CHANNELS)
    seen = [weakref.ref(bn)]
    for _ in range(4):
        a = draw(rng, np.float32)
        bn(a["x"])
        for operation in OPERATIONS.values():
            operation(a)
        seen += map(weakref.ref, a.values())
    seen += map(weakref.ref, (bn.weight, bn.running_mean, bn.num_batches_tracked))
    assert any(repeated)
    del a, bn
    gc.collect()
    assert not any(ref() is not None for ref in seen)


def test_no_memory_to_keep_a_call_in(rng, monkeypatch):
    """What was asked for has been done, and is not to be undone."""

    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(repeat, "_settings", fails)
    mean, var = np.zeros(3), np.ones(3)
    for k in range(1, 4):
        nbbn.batch_norm(np.array([[0.0, 1, 2], [2, 3, 4]]), mean, var, training=True, momentum=0.5)
        np.testing.assert_array_equal(mean, np.array([1, 2, 3]) * (1 - 0.5**k))
    assert not functional._trained._known


def test_slopes_of_zero():
    """Equal, and not the same."""
    x = np.array([[-1.0], [1.0]])
    for _ in range(4):
        for slope in (0.0, -0.0):
            out = nbbn.batch_norm_forward(x, activation="leaky_relu", negative_slope=slope).out
            assert np.signbit(out[0, 0]) == (not np.signbit(slope))


def test_few_are_kept(rng):
    """However many shapes there are; and what works in much memory leaves it to others."""
    for rows in range(2, 2 * nbbn.repeats.MOST):
        for _ in range(3):
            nbbn.batch_norm_forward(rng.normal(size=(rows, 3)))
        assert len(functional._trained._known) <= len(functional._trained._came) <= nbbn.repeats.MOST
    wide = rng.normal(size=(2, 20_000))
    for _ in range(5):
        nbbn.batch_norm_forward(wide)
    (kept,) = (kept for key, kept in functional._trained._known.items() if key[1] == wide.shape)
    assert kept._borrowing and all(call.room is None for call in kept._borrowing)


def test_layouts_that_take_turns(rng, repeated):
    """They are kept in turn less and less often, and what they give is right."""
    x = rng.normal(size=(9, 8, 7))
    other = LAYOUTS["backwards"](x[:, :, :, None])[..., 0]
    with anew():
        expected = [nbbn.batch_norm_forward(a).out for a in (x, other)]
    for _ in range(20):
        for a, out in zip((x, other), expected, strict=True):
            assert_same_bits(nbbn.batch_norm_forward(a).out, out)
    assert True in repeated and False in repeated and sum(functional._trained._came.values()) < 40


def test_where_arrays_cannot_be_read(rng, monkeypatch):
    """Where this Python lays them out in another way, everything goes on as it did."""
    monkeypatch.setattr(repeat, "can_read_arrays", lambda: False)
    for _ in range(4):
        nbbn.batch_norm_forward(rng.normal(size=(4, 3)))
    assert not functional._trained._known


def test_arrays_are_read_here():
    assert repeat.can_read_arrays()
