"""The paths that large arrays, small caches and many threads take, on arrays small enough to check.

How a call is cut up and scheduled depends on a few constants of `nbbn.cpu.plan`; these tests shrink them.
"""

import itertools

import numpy as np
import pytest

import nbbn
import nbbn.functional
import reference
from cases import (
    DTYPES,
    LAYOUTS,
    READ_LAYOUTS,
    Shape,
    activations,
    in_range,
    parameter,
    permutations,
    running_statistics,
    type_id,
)
from checks import around, assert_same_bits, assert_within, check_backward, check_evaluation, check_forward
from family import CASES, Case, check
from family import check_backward as check_rows_backward
from family import check_forward as check_rows_forward
from nbbn import dispatch, family, repeats
from nbbn.cpu import plan
from test_reproducible import THREADS, threads

__all__ = ["threads"]  # a fixture

# Only when and where something is computed: the same bits as ever.
SCHEDULES = {
    "threads": {"functional.SERIAL_ELEMENTS": 0, "plan.SERIAL_MASK": 0},
    "streaming": {"plan.STREAM_BYTES": 0, "plan.STREAM_PLANES_BYTES": 0},
    "no_streaming": {"plan.STREAM_BYTES": 1 << 62, "plan.STREAM_PLANES_BYTES": 1 << 62},
    "no_cache": {"functional.SERIAL_ELEMENTS": 0, "plan.L2_BYTES": 0, "plan.L3_BYTES": 0},
    "endless_cache": {"functional.SERIAL_ELEMENTS": 0, "plan.L2_BYTES": 1 << 62, "plan.L3_BYTES": 1 << 62},
    "phases": {"functional.SERIAL_ELEMENTS": 0, "plan.SMALL_BYTES": 0},
    "narrow": {
        "functional.SERIAL_ELEMENTS": 0,
        "plan.SMALL_BYTES": 0,
        "plan.SHORTEST_COLUMNS": 1,
        "plan.TASKS": 1000,
    },
    "together": {
        "functional.SERIAL_ELEMENTS": 0,
        "plan.TASKS": 0,
        "plan.SMALL_BYTES": 1 << 62,
        "plan.L2_BYTES": 1 << 62,
    },
    "together_streaming": {
        "functional.SERIAL_ELEMENTS": 0,
        "plan.TASKS": 0,
        "plan.SMALL_BYTES": 1 << 62,
        "plan.L2_BYTES": 1 << 62,
        "plan.STREAM_BYTES": 0,
    },
    "short_slabs": {"functional.SERIAL_ELEMENTS": 0, "plan.SLAB_ROWS": 1},
    "streaming_without_cache": {
        "functional.SERIAL_ELEMENTS": 0,
        "plan.SERIAL_MASK": 0,
        "plan.STREAM_BYTES": 0,
        "plan.STREAM_PLANES_BYTES": 0,
        "plan.L2_BYTES": 0,
        "plan.L3_BYTES": 0,
        "plan.SLAB_ROWS": 3,
    },
}

# What is added to what: other bits, as good as the first.
CUTS = {
    "small_blocks": {"plan.BLOCK_ELEMENTS": 128},
    "one_chunk": {"plan.BLOCK_ELEMENTS": 128, "plan.MAX_CHUNKS": 1},
    "three_chunks": {"plan.BLOCK_ELEMENTS": 1, "plan.MAX_CHUNKS": 3},
    "many_chunks": {"plan.BLOCK_ELEMENTS": 1, "plan.MAX_CHUNKS": 256},
    "side_by_side": {
        "functional.SERIAL_ELEMENTS": 0,
        "plan.SHORT_VALUES": 1 << 30,
        "plan.SHORT_BYTES": 1 << 30,
        "plan.SHORT_CHANNELS": 1,
        "plan.BLOCK_ELEMENTS": 128,
        "plan.TURNED_ELEMENTS": 2048,
    },
}

# Which sets are one row, looked at twice: none, or all that may. It concerns batches of one, and the family.
NO_ROWS = {"plan.LEAST_VALUES": 1 << 62}
ALL_ROWS = {"plan.LEAST_VALUES": 1, "plan.MOST_VALUES": 1 << 62, "plan.MOST_SAVING": 1 << 62}
ROWS = {
    "no_rows": NO_ROWS,
    "rows": ALL_ROWS,
    "rows_by_threads": ALL_ROWS | {"functional.SERIAL_ELEMENTS": 0},
}

SHAPES = [
    Shape((3, 5, 4, 7)),
    Shape((7, 3, 5, 6)),
    Shape((5, 18, 1, 1)),
    Shape((4, 2, 9, 61)),
    Shape((9, 6, 11, 13)),
    Shape((3, 7, 2, 131)),
    Shape((2, 3, 5, 211)),
    Shape((2, 2, 3, 1031)),
    Shape((9, 33, 2, 3)),
    Shape((5, 70, 3, 2)),
    Shape((3, 70, 5, 13)),
    Shape((1, 67, 3, 11)),
    Shape((1, 135, 3, 5)),
    Shape((1, 37, 9, 11)),
    Shape((1, 3, 5, 331)),
    Shape((2, 301, 2, 3)),
    Shape((11, 3, 37, 5), -1),
    Shape((3, 5, 4, 77), -1),
    Shape((2, 3, 4, 1030), -1),
]

MEMORY = LAYOUTS | {name: permutations(4)[name] for name in ("memory1023", "memory2301", "memory3120")}


@pytest.fixture
def schedule(monkeypatch):
    """Set these constants, and no others, for the plans that are made from now on."""

    def use(constants):
        monkeypatch.undo()
        for name, value in constants.items():
            module, constant = name.split(".")
            monkeypatch.setattr({"plan": plan, "functional": nbbn.functional}[module], constant, value)
        for cache in (dispatch.find, family._channel_walk, family._row_walk):
            cache.cache_clear()
        repeats.forget()

    yield use
    use({})


def operations(rng, shape, layout, dtype):
    """Return out and the calls that write into it: x in this layout, the others in this or another."""
    dy_layout, out_layout = (layout if rng.random() < 0.5 else rng.choice(list(MEMORY)) for _ in range(2))
    x = MEMORY[layout](activations(rng, shape, dtype, offset=4))
    dy = MEMORY[dy_layout](activations(rng, shape, dtype, offset=1))
    weight, bias = (parameter(rng, shape.channels, dtype) for _ in range(2))
    mean, var = running_statistics(rng, shape.channels, DTYPES)
    out = MEMORY[out_layout](np.zeros(shape.dims, dtype))
    common = {"axis": shape.axis, "out": out}
    own = reference.forward(x, axis=shape.axis)
    used = {"mean": own.mean.rounded()[:, 0], "invstd": own.invstd.rounded()[:, 0]}
    return out, (
        ("forward", (x, weight, bias), common),
        ("evaluation", (x, mean, var, weight, bias), common),
        ("backward", (dy, x, weight), common | used),
        ("backward", (dy, x, weight), common | used | {"training": False}),
    )


CHECKS = {"forward": check_forward, "evaluation": check_evaluation, "backward": check_backward}
CALLS = {
    "forward": nbbn.batch_norm_forward,
    "evaluation": nbbn.batch_norm,
    "backward": nbbn.batch_norm_backward,
}


def check_operations(rng, shape, layout, dtype):
    """Hold all of them against the oracle."""
    out, calls = operations(rng, shape, layout, dtype)
    with around(out):
        for operation, arguments, options in calls:
            CHECKS[operation](*arguments, **options)


def results(out, calls):
    """Return the results of all calls, each copied before the next one overwrites it."""
    found = []
    for name, arguments, options in calls:
        out[...] = np.nan
        result = CALLS[name](*arguments, **options)
        found.append(tuple(np.array(v) for v in (result if isinstance(result, tuple) else (result,))))
    return tuple(found)


@pytest.mark.parametrize("layout", MEMORY)
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_keep_the_bits(rng, schedule, name, layout):
    for shape in SHAPES:
        for dtype in DTYPES:
            out, calls = operations(rng, shape, layout, dtype)
            schedule({})
            expected = results(out, calls)
            schedule(SCHEDULES[name])
            with around(out):
                actual = results(out, calls)
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("number", THREADS)
@pytest.mark.parametrize("dtype", [*DTYPES, np.float16], ids=type_id)
@pytest.mark.parametrize("several", [3, 5])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_keep_the_bits_of_layer_norm(rng, schedule, threads, name, dtype, number, several):
    """Rows in pieces, the last one shorter, and parameters that may be read once for many rows.

    More rows than are finished together, and not a multiple of that; of the shorter ones several make a tile.
    """
    shape = (several, 1031)
    x = (rng.normal(size=(37, *shape)) * np.exp(rng.normal(size=(37, *shape)))).astype(dtype)
    grad_out = rng.normal(size=x.shape).astype(dtype)
    weight, bias = rng.normal(size=(2, *shape))
    expected = nbbn.layer_norm_forward(x, shape, weight, bias)
    given = {"mean": expected.mean, "invstd": expected.invstd}
    gradients = nbbn.layer_norm_backward(grad_out, x, shape, weight, **given)
    schedule(SCHEDULES[name])
    threads(number)
    out = np.full_like(x, np.nan)
    assert_same_bits(nbbn.layer_norm_forward(x, shape, weight, bias, out=out), expected)
    out = np.full_like(x, np.nan)
    assert_same_bits(nbbn.layer_norm_backward(grad_out, x, shape, weight, **given, out=out), gradients)


@pytest.mark.parametrize("number", THREADS)
@pytest.mark.parametrize("dtype", [*DTYPES, np.float16], ids=type_id)
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm", "instance_norm", "group_norm"])
def test_channels_that_share_lines(rng, schedule, threads, norm, dtype, number):
    """Several long channels make a tile, at whose borders a line of memory, or a vector, is of both.

    Or each is cut into pieces, which take turns. One thread writes a tile while it looks at the next one.
    """
    threads(number)
    forward, backward = (getattr(nbbn, f"{norm}_{way}") for way in ("forward", "backward"))
    for inner in (32, 33, int(rng.integers(34, 128)), 128, 131, 260, 515, 1301, 3137):
        along = norm in ("layer_norm", "rms_norm")
        x = activations(rng, Shape((37, inner) if along else (5, 12, inner)), dtype, offset=1)
        grad_out = activations(rng, Shape(x.shape), dtype)
        which = {"layer_norm": (inner,), "rms_norm": (inner,), "group_norm": (4,), "instance_norm": ()}[norm]
        weight, bias = rng.normal(size=(2, inner if along else 12))
        affine = (weight,) if norm == "rms_norm" else (weight, bias)
        given = ("invstd",) if norm == "rms_norm" else ("mean", "invstd")
        expected = {}
        for name, cut in itertools.product(("no_cache", "together", "together_streaming"), ({}, NO_ROWS)):
            schedule(SCHEDULES[name] | cut)
            for first in (0, 3, 11):
                out, grad_x = (
                    np.full(x.size + 16, np.nan, dtype)[first : first + x.size].reshape(x.shape)
                    for _ in range(2)
                )
                result = forward(x, *which, *affine, out=out)
                found = {field: getattr(result, field) for field in given}
                gradients = backward(grad_out, x, *which, weight, **found, out=grad_x)
                actual = tuple(map(np.copy, (*result[:-1], *(g for g in gradients if g is not None))))
                assert_same_bits(actual, expected.setdefault(len(cut), actual))


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("name", [*SCHEDULES, *CUTS])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_oracle(rng, schedule, shape, name, dtype):
    schedule((SCHEDULES | CUTS)[name])
    for layout in ("contiguous", "channels_last", "inside", "record_field"):
        check_operations(rng, shape, layout, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("name", ROWS)
def test_batches_of_one_as_rows(rng, schedule, name, dtype):
    schedule(ROWS[name])
    for shape in SHAPES:
        for layout in ("contiguous", "inside", "record_field") if shape.dims[0] == 1 else ():
            check_operations(rng, shape, layout, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("name", ROWS)
def test_sets_as_rows(rng, schedule, name, dtype):
    """Whether a set is one row, looked at twice, or not: of as many values as there may be, and of few."""
    schedule(ROWS[name])
    for case in (
        *CASES,
        Case("group", (3, 60, 2, 100), 2),
        Case("instance", (2, 19, 2100)),
        Case("layer", (18, 99)),
    ):
        check(case, case.data(rng, dtype, 2.0), case.data(rng, dtype), *case.pair(rng))


@pytest.mark.parametrize("layout", READ_LAYOUTS | permutations(4))
@pytest.mark.parametrize("name", ["layer", "rms", "instance", "group"])
def test_rows_in_every_layout(rng, name, layout):
    """Sets that would be rows, wherever their values lie; the result elsewhere, and in the place of x."""
    case = Case(name, (3, 8, 5, 11), 4 if name == "group" else 2)
    lay, elsewhere = (READ_LAYOUTS | permutations(4))[layout], LAYOUTS[rng.choice(list(LAYOUTS))]
    for dtype in (np.float32, np.float64):
        x, dy = lay(case.data(rng, dtype, 5.0)), lay(case.data(rng, dtype))
        weight, bias = case.pair(rng)
        out = elsewhere(np.full(case.dims, np.nan, dtype))
        with around(out):
            forward, _ = check(case, x, dy, weight, bias, out=out)
        if layout in LAYOUTS:
            used = {"mean": forward.mean, "invstd": forward.invstd}
            inside, grad_x = lay(np.array(x)), lay(np.array(x))
            with around(inside), around(grad_x):
                check_rows_forward(case, inside, weight, bias, out=inside)
                check_rows_backward(case, dy, grad_x, weight, out=grad_x, **used)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=type_id)
def test_rows_that_are_looked_at_again(rng, dtype):
    """Squares of float32 that are no numbers, or are zeros, among rows where they are as they should be."""
    scales = np.array([1.0, 1e30, 1e-30, 1e-3, 1e15, 1e-15])
    offsets = np.array([0.0, 1e38, 1e-28, 1e6, 1e18, 0.0])
    for values in (48, 77, 300):
        which = rng.integers(len(scales), size=(1, 41, 1))
        x = (rng.normal(size=(1, 41, values)) * scales[which] + offsets[which]).astype(dtype)
        check_forward(x, eps=1e-38)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_many_blocks(rng, schedule, layout):
    """Thousands of them one after the other: what a variance's sum loses in float64 is not forgotten."""
    schedule({"plan.BLOCK_ELEMENTS": 1, "plan.MAX_CHUNKS": 1})
    x = MEMORY[layout](activations(rng, Shape((2500, 64, 3, 3)), np.float64, offset=4))
    check_forward(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_side_by_side_in_other_layouts(rng, dtype):
    """Short channels, and mixed arrays: x with one dimension side by side, others with another one."""
    layouts = ("contiguous", "channels_last", "memory2301", "memory3120", "inside", "every_second")
    for shape in (
        Shape((1, 131, 3, 5)),
        Shape((3, 129, 2, 2)),
        Shape((2, 34, 9, 13)),
        Shape((1, 24, 11, 90)),
    ):
        for of_x, of_dy, of_out in itertools.product(("contiguous", "channels_last"), layouts, layouts):
            x = MEMORY[of_x](activations(rng, shape, dtype, offset=3))
            dy = MEMORY[of_dy](activations(rng, shape, dtype, offset=1))
            out, grad_x = (MEMORY[of_out](np.full(shape.dims, np.nan, dtype)) for _ in range(2))
            weight, bias = (parameter(rng, shape.channels, dtype) for _ in range(2))
            with around(out), around(grad_x):
                result = check_forward(x, weight, bias, axis=1, out=out)
                used = {"mean": result.mean, "invstd": result.invstd}
                check_backward(dy, x, weight, **used, axis=1, out=grad_x)
                check_backward(dy, x, weight, **used, axis=1, out=grad_x, training=False)


@pytest.mark.parametrize("name", [*SCHEDULES, *CUTS])
def test_constants(schedule, name):
    """Exact in every schedule and every cut."""
    schedule((SCHEDULES | CUTS)[name])
    for shape in SHAPES:
        for dtype in DTYPES:
            values = (in_range(1e7, dtype) + np.arange(shape.channels) / 3).astype(dtype)
            across = [1] * 4
            across[shape.axis] = shape.channels
            x = np.broadcast_to(values.reshape(across), shape.dims).copy()
            result = nbbn.batch_norm_forward(x, bias=values, axis=shape.axis)
            assert not result.var.any()
            assert_same_bits(result.out, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("channels", [16, 1040])
def test_lines_of_the_last_and_the_first_channel(rng, schedule, channels, dtype):
    """A line of memory may begin anywhere in a row, and go on in the next one."""
    x, grad_out = (activations(rng, Shape((5, channels)), dtype) for _ in range(2))
    results = []
    for name in ("no_streaming", "streaming"):
        schedule(SCHEDULES[name])
        for first in range(0, 32, 5):
            for operation in ("training", "evaluation", "backward"):
                out = np.full(x.size + 32, np.nan, dtype)[first : first + x.size].reshape(x.shape)
                if operation == "training":
                    result = nbbn.batch_norm_forward(x, out=out)
                elif operation == "evaluation":
                    nbbn.batch_norm(x, result.mean, result.var, out=out)
                else:
                    nbbn.batch_norm_backward(grad_out, x, mean=result.mean, invstd=result.invstd, out=out)
                results.append((operation, out))
    for operation in ("training", "evaluation", "backward"):
        outs = [out for name, out in results if name == operation]
        for out in outs[1:]:
            assert_same_bits(out, outs[0])


@pytest.mark.parametrize("name", ["threads", "streaming_without_cache"])
def test_masks_where_channels_lie_side_by_side(rng, schedule, name):
    """Rows of several steps, whose bits are made in one way or another; a share may begin inside of one."""
    schedule(SCHEDULES[name])
    widths = [*range(1, 20), 24, 33, 64, 100, 255, 520]
    of_several_blocks = rng.choice([*range(1, 8), 8, 24, 64, 520], 3)
    for channels in widths:
        steps, first = int(rng.integers(33, 400)), int(rng.integers(16))
        if channels in of_several_blocks:
            steps += 3 * plan.BLOCK_ELEMENTS // channels
        x, grad_out = rng.normal(size=(2, steps, channels)).astype(np.float32)
        mask = (rng.random(2 * steps) < 0.6)[:: int(rng.choice([1, 2, -1, -2]))][:steps]
        weight = rng.normal(size=channels)
        out, grad_x, again = (
            np.full(x.size + 16, np.nan, np.float32)[first : first + x.size].reshape(x.shape)
            for _ in range(3)
        )
        result = nbbn.batch_norm_forward(x, weight, mask=mask, out=out)
        found = {"mean": result.mean, "invstd": result.invstd}
        gradients = nbbn.batch_norm_backward(grad_out, x, weight, mask=mask, out=grad_x, **found)
        assert result.count == mask.sum() and not out[~mask].any() and not grad_x[~mask].any()
        expected = reference.forward(x[mask], weight, axis=1)
        assert_within("mean", result.mean[:, None], expected.mean, reference.mean_tolerance(expected))
        assert_within("out", out[mask].T, expected.out, reference.out_tolerance(expected, x.dtype))
        expected = reference.backward(grad_out[mask], x[mask], weight, **found, axis=1)
        assert_within("grad_x", grad_x[mask].T, expected.x, reference.grad_x_tolerance(expected, x.dtype))
        tolerance = reference.grad_bias_tolerance(expected, x.dtype)
        assert_within("grad_bias", gradients.bias[:, None], expected.bias, tolerance)
        nbbn.batch_norm(x, result.mean, result.var, weight, mask=mask, out=again)
        assert not again[~mask].any()
        np.testing.assert_allclose(again[mask], out[mask], rtol=1e-5, atol=1e-5)  # of statistics as stored
