"""Every way in which an array can lie in memory, read and written where it lies."""

import numpy as np
import pytest

import nbbn
import reference
from cases import (
    DTYPES,
    HALF,
    LAYOUTS,
    READ_LAYOUTS,
    VECTOR_LAYOUTS,
    Shape,
    activations,
    channels_last,
    odd_strides_of_ones,
    parameter,
    permutations,
    running_statistics,
    type_id,
)
from checks import around, assert_same_bits, check_backward, check_evaluation, check_forward

SMALL = Shape((3, 5, 4, 7))
WIDE = Shape((2, 33, 3, 35))  # more than a vector along every axis that matters
LONG = Shape((4, 3, 2, 1031))  # rows too long for a buffer, in two pieces
ONE = Shape((3, 1, 4, 7))  # whose channels lie side by side, however far apart the others do
ALL_READ = READ_LAYOUTS | permutations(4)
ALL_WRITE = LAYOUTS | permutations(4)


def statistics_of(x, axis=1):
    forward = reference.forward(x, axis=axis)
    return {"mean": forward.mean.rounded()[:, 0], "invstd": forward.invstd.rounded()[:, 0]}


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("layout", ALL_READ)
@pytest.mark.parametrize("shape", [SMALL, WIDE, LONG, ONE], ids=str)
def test_x_in_every_layout(rng, shape, layout, dtype):
    x = ALL_READ[layout](activations(rng, shape, dtype, offset=5))
    weight, bias = rng.normal(size=(2, shape.channels))
    check_forward(x, weight, bias)
    check_evaluation(x, *running_statistics(rng, shape.channels), weight, bias)
    dy = activations(rng, shape, dtype)
    for training in (True, False):
        check_backward(dy, x, weight, training=training, **statistics_of(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("layout", ALL_READ)
def test_every_channel_axis_in_every_layout(rng, layout, dtype):
    x = ALL_READ[layout](activations(rng, SMALL, dtype, offset=5))
    dy = ALL_READ[layout](activations(rng, SMALL, dtype))
    for axis in (0, 2, -1):
        check_forward(x, axis=axis)
        check_backward(dy, x, axis=axis, **statistics_of(x, axis))


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("layout", ALL_WRITE)
def test_out_in_every_layout(rng, layout, dtype):
    """What lies around `out` in its buffer keeps its bits."""
    for shape in (SMALL, WIDE, LONG):
        x, dy = activations(rng, shape, dtype, offset=5), activations(rng, shape, dtype)
        for x_layout in ("contiguous", "channels_last", layout):
            out = ALL_WRITE[layout](np.zeros(shape.dims, dtype))
            laid = ALL_READ[x_layout](x)
            with around(out):
                check_forward(laid, out=out)
                check_evaluation(laid, *running_statistics(rng, shape.channels), out=out)
                check_backward(dy, laid, out=out, **statistics_of(x))


@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
def test_parameters_in_every_layout(rng, layout):
    laid = VECTOR_LAYOUTS[layout]
    for dtype in DTYPES:
        of_x = dtype if dtype in HALF else np.float32
        x, dy = (activations(rng, SMALL, of_x) for _ in range(2))
        weight, bias = (laid(parameter(rng, 5, dtype)) for _ in range(2))
        mean, var = (laid(v) for v in running_statistics(rng, 5, (dtype, dtype)))
        check_forward(x, weight, bias)
        check_evaluation(x, mean, var, weight, bias)
        check_backward(dy, x, weight, mean=mean, invstd=var)


@pytest.mark.parametrize(
    "shape",
    [
        Shape((1, 5, 4, 7)),
        Shape((3, 1, 4, 7)),
        Shape((3, 5, 1, 7)),
        Shape((3, 5, 4, 1)),
        Shape((2, 5, 1, 1)),
        Shape((1, 1, 1, 6)),
        Shape((1, 5, 1, 6), -1),
    ],
    ids=str,
)
def test_axes_of_length_one(rng, shape):
    """Their strides mean nothing, and are often odd."""
    for dtype in DTYPES:
        x, dy = activations(rng, shape, dtype), activations(rng, shape, dtype)
        for layout in (odd_strides_of_ones, channels_last, np.asfortranarray):
            for grad_layout in (odd_strides_of_ones, np.ascontiguousarray):
                laid = layout(x)
                check_forward(laid, axis=shape.axis)
                statistics = statistics_of(laid, shape.axis)
                check_backward(grad_layout(dy), laid, axis=shape.axis, **statistics)


LARGE_LAYOUTS = {
    **{name: LAYOUTS[name] for name in ("contiguous", "channels_last", "fortran", "from_second")},
    **{name: LAYOUTS[name] for name in ("some_channels", "every_second", "reversed", "unaligned")},
    "memory2301": permutations(4)["memory2301"],
    "broadcast_batch": READ_LAYOUTS["broadcast_batch"],
}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape((9, 11, 75, 77)), np.float32),
        (Shape((90, 7, 33, 29)), np.float32),
        (Shape((90, 7, 33, 29)), np.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", LARGE_LAYOUTS)
def test_large_arrays(rng, layout, shape, dtype):
    """Enough of them for several threads, streaming stores, and sums in blocks."""
    x = LARGE_LAYOUTS[layout](activations(rng, shape, dtype, offset=5))
    dy = activations(rng, shape, dtype)
    channels = np.array([rng.integers(shape.channels - 1), shape.channels - 1])
    check_forward(x, channels=channels)
    check_evaluation(x, *running_statistics(rng, shape.channels), channels=channels)
    result = nbbn.batch_norm_forward(x)
    statistics = {"mean": result.mean, "invstd": result.invstd}
    for grad_layout in sorted({"contiguous", layout}):
        check_backward(LARGE_LAYOUTS[grad_layout](dy), x, channels=channels, **statistics)
    if layout != "broadcast_batch":
        out = LARGE_LAYOUTS[layout](np.zeros_like(dy))
        with around(out):
            check_forward(x, out=out, channels=channels)
            check_backward(dy, x, out=out, channels=channels, **statistics)


def test_memmap(rng, tmp_path):
    """Taken as the array that it is."""
    x = activations(rng, SMALL, np.float32)
    mapped = np.memmap(tmp_path / "x", np.float32, "w+", shape=SMALL.dims)
    mapped[...] = x
    result = check_forward(mapped)
    assert_same_bits(result.out, nbbn.batch_norm_forward(x).out)
    out = np.memmap(tmp_path / "out", np.float32, "w+", shape=SMALL.dims)
    assert nbbn.batch_norm_forward(x, out=out).out is out
    assert_same_bits(np.array(out), result.out)


def test_subclasses_are_taken_as_arrays(rng):
    class Tagged(np.ndarray):
        def __array_finalize__(self, other):
            self.tag = "tagged"

    x = activations(rng, SMALL, np.float64)
    result = nbbn.batch_norm_forward(x.view(Tagged), np.ones(5).view(Tagged))
    assert type(result.out) is np.ndarray
    assert_same_bits(result.out, nbbn.batch_norm_forward(x).out)
