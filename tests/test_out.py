"""out=: written where it lies, in place, and refused where it overlaps an input otherwise."""

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import nbbn
import reference
from cases import DTYPES, LAYOUTS, Shape, activations, running_statistics, type_id
from checks import (
    assert_same_bits,
    bits,
    check_backward,
    check_evaluation,
    check_forward,
)

SHAPES = [Shape((4, 5, 7)), Shape((1025, 3)), Shape((20, 33, 40, 41)), Shape((50, 50, 65), -1)]


def statistics_of(x, axis):
    result = nbbn.batch_norm_forward(x, axis=axis)
    return {"mean": result.mean, "invstd": result.invstd, "axis": axis}


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_out_filled_with_nan(rng, shape, dtype):
    """`check_…` fills it; each element must have been written."""
    x, dy = activations(rng, shape, dtype), activations(rng, shape, dtype)
    out = np.empty_like(x)
    channels = np.array([0, shape.channels - 1])
    check_forward(x, axis=shape.axis, out=out, channels=channels)
    assert_same_bits(out, nbbn.batch_norm_forward(x, axis=shape.axis).out)
    statistics = running_statistics(rng, shape.channels)
    check_evaluation(x, *statistics, axis=shape.axis, out=out, channels=channels)
    assert_same_bits(out, nbbn.batch_norm(x, *statistics, axis=shape.axis))
    arguments = statistics_of(x, shape.axis)
    for training in (True, False):
        check_backward(dy, x, out=out, training=training, channels=channels, **arguments)
        fresh = nbbn.batch_norm_backward(dy, x, training=training, **arguments)
        assert_same_bits(out, fresh.x)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place(rng, shape, dtype):
    """The same bits as beside."""
    x, dy = activations(rng, shape, dtype), activations(rng, shape, dtype)
    weight, bias = rng.normal(size=(2, shape.channels))
    beside = nbbn.batch_norm_forward(x, weight, bias, axis=shape.axis)
    inside = x.copy()
    result = nbbn.batch_norm_forward(inside, weight, bias, axis=shape.axis, out=inside)
    assert result.out is inside
    assert_same_bits(tuple(result), tuple(beside))

    statistics = running_statistics(rng, shape.channels)
    inside = x.copy()
    nbbn.batch_norm(inside, *statistics, weight, bias, axis=shape.axis, out=inside)
    assert_same_bits(inside, nbbn.batch_norm(x, *statistics, weight, bias, axis=shape.axis))

    arguments = statistics_of(x, shape.axis)
    for training in (True, False):
        beside = nbbn.batch_norm_backward(dy, x, weight, training=training, **arguments)
        inside = x.copy()
        result = nbbn.batch_norm_backward(dy, inside, weight, training=training, out=inside, **arguments)
        assert result.x is inside
        assert_same_bits(tuple(result), tuple(beside))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_in_every_layout(rng, layout):
    x = LAYOUTS[layout](activations(rng, Shape((3, 5, 4, 7)), np.float32))
    values = x.copy(order="C")
    result = nbbn.batch_norm_forward(x, out=x)
    assert result.out is x
    expected = reference.forward(values)
    error = expected.out.distance(reference.rows(x))
    assert (error <= reference.out_tolerance(expected, np.float32)).all()


def test_in_place_through_another_object(rng):
    """The same memory, shape and strides: as good as the same object."""
    x = activations(rng, Shape((4, 5, 7)), np.float32)
    expected = nbbn.batch_norm_forward(x).out
    view = x[:]
    assert nbbn.batch_norm_forward(x, out=view).out is view
    assert_same_bits(x, expected)


def test_in_place_through_other_strides(rng):
    """Of a dimension of one element a stride says nothing."""
    x = rng.normal(size=(6, 3, 1)).astype(np.float32)
    expected = nbbn.batch_norm_forward(x).out
    out = as_strided(x, x.shape, (*x.strides[:2], 999))
    assert nbbn.batch_norm_forward(x, out=out).out is out
    assert_same_bits(x, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_in_place_where_x_is_grad_out(rng, training, dtype):
    """Every input that lies where x does is written over with it."""
    x = activations(rng, Shape((4, 5, 7, 30)), dtype)
    arguments = {**statistics_of(x, 1), "training": training}
    expected = nbbn.batch_norm_backward(x.copy(), x, **arguments)
    for grad_out, inside, out in [(0, 0, 0), (0, 1, 2), (0, 0, 1)]:
        views = [x.copy()]
        views += [views[0][:], views[0][:]]
        result = nbbn.batch_norm_backward(views[grad_out], views[inside], out=views[out], **arguments)
        assert_same_bits(tuple(result), tuple(expected))


def test_running_update_in_place(rng):
    x = activations(rng, Shape((4, 5, 7)), np.float32)
    one, other = running_statistics(rng, 5), None
    other = tuple(v.copy() for v in one)
    expected = nbbn.batch_norm(x, *one, training=True)
    assert nbbn.batch_norm(x, *other, training=True, out=x) is x
    assert_same_bits(x, expected)
    assert_same_bits(one, other)


# --- overlaps --------------------------------------------------------------------------------------

DIMS = (4, 5, 6)
SIZE = 120


def overlapping_x(buffer):
    """Views of one buffer that overlap and are not the same, as pairs x, out."""
    return {
        "one_element_on": (buffer[:SIZE].reshape(DIMS), buffer[1 : SIZE + 1].reshape(DIMS)),
        "one_element_back": (buffer[1 : SIZE + 1].reshape(DIMS), buffer[:SIZE].reshape(DIMS)),
        "last_element": (buffer[:SIZE].reshape(DIMS), buffer[SIZE - 1 : 2 * SIZE - 1].reshape(DIMS)),
        "reversed": (buffer[:SIZE].reshape(DIMS), buffer[:SIZE].reshape(DIMS)[::-1]),
        "reversed_channels": (buffer[:SIZE].reshape(DIMS), buffer[:SIZE].reshape(DIMS)[:, ::-1]),
        "other_strides": (buffer[: 2 * SIZE : 2].reshape(DIMS), buffer[:SIZE].reshape(DIMS)),
        "transposed": (
            buffer[:125].reshape(5, 5, 5),
            buffer[:125].reshape(5, 5, 5).transpose(2, 1, 0),
        ),
    }


OVERLAPS = list(overlapping_x(np.zeros(3 * SIZE)))


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("function", ["forward", "training", "evaluation", "backward", "grad_out"])
def test_out_that_overlaps_x(rng, name, function):
    buffer = rng.normal(size=3 * SIZE)
    x, out = overlapping_x(buffer)[name]
    other = rng.normal(size=x.shape)
    mean, var = rng.normal(size=5), rng.uniform(1, 2, 5)
    before = bits(buffer), bits(mean), bits(var)
    with pytest.raises(ValueError, match=r"\bout\b"):
        if function == "forward":
            nbbn.batch_norm_forward(x, out=out)
        elif function == "backward":
            nbbn.batch_norm_backward(other, x, mean=mean, invstd=var, out=out)
        elif function == "grad_out":
            nbbn.batch_norm_backward(x, other, mean=mean, invstd=var, out=out)
        else:
            nbbn.batch_norm(x, mean, var, training=function == "training", out=out)
    assert (bits(buffer), bits(mean), bits(var)) == before


def test_out_that_is_grad_out(rng):
    """Only x may be written over."""
    x, dy = rng.normal(size=(2, *DIMS))
    before = bits(dy)
    with pytest.raises(ValueError, match=r"\bout\b.*\bgrad_out\b"):
        nbbn.batch_norm_backward(dy, x, mean=np.zeros(5), invstd=np.ones(5), out=dy)
    assert bits(dy) == before


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("place", ["first", "last", "strided"])
def test_out_that_overlaps_a_column(rng, place, name, training):
    out = rng.normal(size=DIMS)
    flat = out.reshape(-1)
    column = {"first": flat[:5], "last": flat[-5:], "strided": flat[3:103:20]}[place]
    column[...] = np.abs(column)
    columns = {n: np.ones(5) for n in ("running_mean", "running_var")} | {name: column}
    before = bits(out)
    with pytest.raises(ValueError, match=rf"\bout\b.*\b{name}\b"):
        nbbn.batch_norm(rng.normal(size=DIMS), training=training, out=out, **columns)
    assert bits(out) == before
    assert all(v.tolist() == [1.0] * 5 for n, v in columns.items() if n != name)


@pytest.mark.parametrize("name", ["weight", "mean", "invstd"])
def test_out_of_backward_that_overlaps_a_column(rng, name):
    out = rng.normal(size=DIMS)
    columns = {n: np.ones(5) for n in ("mean", "invstd")} | {name: out[0, :, 0]}
    before = bits(out)
    with pytest.raises(ValueError, match=rf"\bout\b.*\b{name}\b"):
        nbbn.batch_norm_backward(*rng.normal(size=(2, *DIMS)), out=out, **columns)
    assert bits(out) == before


def test_out_is_x_and_overlaps_a_parameter(rng):
    x = rng.normal(size=DIMS)
    before = bits(x)
    with pytest.raises(ValueError, match=r"\bweight\b"):
        nbbn.batch_norm_forward(x, x[0, :, 0], out=x)
    assert bits(x) == before


def test_neighbours_do_not_overlap(rng):
    """Interleaved, side by side, one inside the gaps of the other: all of these are good."""
    buffer = rng.normal(size=(2, *DIMS, 3))
    for x, out in (
        (buffer[0, ..., 0], buffer[1, ..., 0]),
        (buffer[0, ..., 0], buffer[0, ..., 1]),
        (buffer[0, ..., 2], buffer[0, ..., 1]),
    ):
        expected = nbbn.batch_norm_forward(x.copy()).out
        kept = buffer.copy()
        nbbn.batch_norm_forward(x, out=out)
        assert_same_bits(out.copy(), expected)
        out[...] = 0
        written = buffer != kept
        out[...] = 1
        assert (written <= (buffer == 1)).all(), "something beside out was written"


def test_parameter_inside_x(rng):
    """Inputs may overlap one another: they are only read."""
    x = activations(rng, Shape(DIMS), np.float64)
    column = x[0, :, 0]
    expected = nbbn.batch_norm_forward(x, column.copy(), column.copy()).out
    assert_same_bits(nbbn.batch_norm_forward(x, column, column).out, expected)
