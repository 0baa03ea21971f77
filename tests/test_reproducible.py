"""The same bits: on every run, for every number of threads, and beside NaN and Inf."""

import numba
import numpy as np
import pytest

import nbbn
from cases import DTYPES, LAYOUTS, Shape, activations, running_statistics, type_id
from checks import assert_same_bits

SHAPES = [
    Shape((8, 32, 8, 8)),
    Shape((32, 3, 112, 112)),
    Shape((32, 64, 29, 31)),
    Shape((2, 3, 512, 513)),
    Shape((1, 1, 1000, 1001)),
    Shape((5, 700, 20, 21)),
    Shape((32, 30, 31, 64), -1),
    Shape((300, 300, 3), -1),
    Shape((20, 17, 2048), -1),
    Shape((3136, 256)),
    Shape((65536, 5)),
    Shape((3, 40000)),
    Shape((40, 41, 42, 5), 2),
    Shape((270, 11, 33)),
    Shape((400, 5, 40)),
    Shape((300, 37, 9)),
]
THREADS = [n for n in (1, 2, 3, 4) if n <= numba.config.NUMBA_NUM_THREADS]


@pytest.fixture
def threads():
    before = numba.get_num_threads()
    yield numba.set_num_threads
    numba.set_num_threads(before)


def everything(x, dy, weight, statistics, axis):
    """Return the results of all functions: new arrays, written once."""
    forward = nbbn.batch_norm_forward(x, weight, weight, axis=axis)
    mean, var = (v.copy() for v in statistics)
    arguments = {"mean": forward.mean, "invstd": forward.invstd, "axis": axis}
    return (
        tuple(forward),
        nbbn.batch_norm(x, mean, var, weight, weight, True, axis=axis),
        mean,
        var,
        nbbn.batch_norm(x, *statistics, weight, weight, axis=axis),
        tuple(nbbn.batch_stats(x, axis=axis)),
        tuple(nbbn.batch_norm_backward(dy, x, weight, **arguments)),
        tuple(nbbn.batch_norm_backward(dy, x, weight, training=False, **arguments)),
    )


def inputs(rng, shape, dtype, layout="contiguous"):
    x, dy = (LAYOUTS[layout](activations(rng, shape, dtype, offset=9)) for _ in range(2))
    weight = rng.normal(size=shape.channels).astype(dtype)
    return x, dy, weight, running_statistics(rng, shape.channels), shape.axis


@pytest.mark.skipif(len(THREADS) < 2, reason="needs two threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_number_of_threads(rng, threads, shape, dtype):
    arguments = inputs(rng, shape, dtype)
    threads(1)
    alone = everything(*arguments)
    for count in THREADS[1:]:
        threads(count)
        assert_same_bits(everything(*arguments), alone)


MORE_THREADS = """
import numba, numpy as np
from cases import Shape
from checks import assert_same_bits
from test_reproducible import SHAPES, everything, inputs

for shape in SHAPES[:1] + SHAPES[5:]:
    for dtype in (np.float32, np.float64):
        rng = np.random.default_rng({seed})
        x, dy, *others = inputs(rng, shape, dtype)
        for array in (x, dy):
            # Magnitudes far apart: whatever is added in another order, shows.
            array *= np.exp(3 * rng.normal(size=array.shape)).astype(dtype)
        numba.set_num_threads(1)
        alone = everything(x, dy, *others)
        for count in (2, 3, 5, 8, 16):
            numba.set_num_threads(count)
            try:
                assert_same_bits(everything(x, dy, *others), alone)
            except AssertionError as error:
                raise AssertionError(f"{{shape}} {{dtype.__name__}}, {{count}} threads: {{error}}")
"""


def test_more_threads_than_cores(python, seed):
    python(MORE_THREADS.format(seed=seed), NUMBA_NUM_THREADS="16")


@pytest.mark.skipif(len(THREADS) < 2, reason="needs two threads")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_of_threads_in_every_layout(rng, threads, layout):
    arguments = inputs(rng, Shape((9, 11, 30, 33)), np.float32, layout)
    threads(1)
    alone = everything(*arguments)
    threads(2)
    assert_same_bits(everything(*arguments), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[6], SHAPES[9]], ids=str)
def test_twenty_runs(rng, shape, dtype):
    arguments = inputs(rng, shape, dtype)
    first = everything(*arguments)
    for _ in range(19):
        assert_same_bits(everything(*arguments), first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "fortran", "every_second"])
def test_where_the_memory_lies_does_not_matter(rng, layout):
    """The same strides at another address, at any alignment: the same bits."""
    x, dy, weight, statistics, axis = inputs(rng, Shape((9, 11, 30, 33)), np.float32, layout)
    first = everything(x, dy, weight, statistics, axis)
    span = sum((n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)) + x.itemsize
    for offset in (4, 20, 36, 60, 3):
        moved = []
        for array in (x, dy):
            buffer = bytearray(span + 128)
            copy = np.ndarray(x.shape, x.dtype, buffer, offset, x.strides)
            copy[...] = array
            moved.append(copy)
        assert_same_bits(everything(*moved, weight, statistics, axis), first)


# --- isolation -------------------------------------------------------------------------------------


def poison(x, axis, channel, values, rng):
    """Put `values` into one channel of a copy of x, at its first, its last, and random places."""
    x = x.copy(order="K")
    rows = np.moveaxis(x, axis, 0)[channel]
    places = [0, rows.size - 1, *(1 + rng.choice(rows.size - 2, len(values), replace=False))]
    for place, value in zip(places, values, strict=False):
        rows[np.unravel_index(place, rows.shape)] = value
    return x


def without(result, channel, axis):
    """Return the results of all channels but one."""
    if isinstance(result, tuple):
        return tuple(without(part, channel, axis) for part in result)
    if not isinstance(result, np.ndarray):
        return result
    return np.delete(result, channel, axis if result.ndim > 1 else 0)


POISONS = {
    "nan": [np.nan],
    "inf": [np.inf],
    "minus_inf": [-np.inf],
    "both": [np.inf, -np.inf],
    "all": [np.nan, np.inf, -np.inf, np.nan],
    "largest": [np.inf, 3e38, -3e38],
}


@pytest.mark.parametrize("poisons", POISONS)
@pytest.mark.parametrize(
    "shape",
    [
        Shape((6, 5, 7)),
        Shape((40, 9)),
        Shape((40, 70)),
        Shape((12, 5, 60, 61)),
        Shape((40, 41, 19), -1),
        Shape((50, 60, 65), -1),
        Shape((2, 3, 1100)),
    ],
    ids=str,
)
def test_poison_stays_in_its_channel(rng, shape, poisons):
    """In x: all of the channel's outputs and gradients are NaN, and no other bit changes."""
    x, dy, weight, statistics, axis = inputs(rng, shape, np.float32)
    clean = everything(x, dy, weight, statistics, axis)
    for channel in {0, shape.channels // 2, shape.channels - 1}:
        dirty_x = poison(x, axis, channel, POISONS[poisons], rng)
        with np.errstate(all="ignore"):
            dirty = everything(dirty_x, dy, weight, statistics, axis)
        assert_same_bits(without(dirty, channel, axis), without(clean, channel, axis))
        forward, gradients = dirty[0], dirty[6]
        assert np.isnan(np.take(forward[0], channel, axis)).all()
        assert np.isnan(forward[2][channel])  # var
        assert np.isnan(np.take(gradients[0], channel, axis)).all()
        assert np.isnan(gradients[1][channel])  # of weight
        assert np.isfinite(gradients[2][channel])  # of bias: Σ dy
        # Evaluation: where x is NaN or infinite, and nowhere else.
        evaluated, before = (np.take(r[4], channel, axis) for r in (dirty, clean))
        values = np.take(dirty_x, channel, axis)
        finite = np.isfinite(values) & (np.abs(values) < 1e38)
        assert_same_bits(evaluated[finite], before[finite])
        assert np.isnan(evaluated[np.isnan(values)]).all()
        infinite = np.isinf(values)
        assert (evaluated[infinite] == values[infinite] * np.sign(weight[channel])).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize(
    "shape", [Shape((6, 5, 7)), Shape((40, 41, 19), -1), Shape((12, 5, 60, 61))], ids=str
)
def test_poison_in_grad_out_stays_in_its_channel(rng, shape, value):
    x, dy, weight, statistics, axis = inputs(rng, shape, np.float32)
    clean = everything(x, dy, weight, statistics, axis)
    dirty = everything(x, poison(dy, axis, 1, [value], rng), weight, statistics, axis)
    assert_same_bits(without(dirty, 1, axis), without(clean, 1, axis))
    gradients = dirty[6]
    assert not np.isfinite(np.take(gradients[0], 1, axis)).any()
    assert not np.isfinite(gradients[1][1]) and not np.isfinite(gradients[2][1])


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "mean", "invstd"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_poison_in_a_parameter_stays_in_its_channel(rng, name, value):
    shape = Shape((6, 21, 7))
    x, dy, weight, (mean, var), _ = inputs(rng, shape, np.float32)
    names = ("weight", "bias", "running_mean", "running_var", "mean", "invstd")
    columns = dict(zip(names, (weight, weight, mean, var, mean, var), strict=True))
    spoilt = columns | {name: columns[name].copy()}
    spoilt[name][20] = value
    results = []
    for c in (columns, spoilt):
        forward = nbbn.batch_norm_forward(x, c["weight"], c["bias"]).out
        evaluated = nbbn.batch_norm(x, *(c[n] for n in ("running_mean", "running_var", "weight", "bias")))
        backward = nbbn.batch_norm_backward(dy, x, c["weight"], mean=c["mean"], invstd=c["invstd"])
        results.append((forward, evaluated, tuple(backward)))
    assert_same_bits(without(results[0], 20, 1), without(results[1], 20, 1))
    used = {"weight": (0, 1, 2), "bias": (0, 1), "running_mean": (1,), "running_var": (1,)}
    for k in used.get(name, (2,)):
        result = results[1][k][0] if k == 2 else results[1][k]
        if not (name == "running_var" and value == np.inf):  # 1/inf is 0: out is the bias
            assert not np.isfinite(result[:, 20]).any()


def test_dropping_channels_leaves_the_others(rng):
    """What lies beside a channel has no say in it: one channel alone has the same statistics."""
    x, _, weight, _, _ = inputs(rng, Shape((6, 21, 70)), np.float64)
    full = nbbn.batch_norm_forward(x, weight)
    for channel in (0, 7, 20):
        alone = nbbn.batch_norm_forward(x[:, channel : channel + 1], weight[channel : channel + 1])
        np.testing.assert_allclose(alone.out[:, 0], full.out[:, channel], rtol=0, atol=1e-14)
