"""Gradients in training and in evaluation: batch_norm_backward."""

import numpy as np
import pytest

import nbbn
import reference
from cases import (
    DTYPES,
    LARGE,
    ONE_VALUE,
    SMALL,
    activations,
    channels_last,
    parameter,
    some_channels,
    type_id,
)
from checks import check_backward

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def own_statistics(x, axis, dtypes=(np.float64, np.float64), eps=1e-5):
    """Return mean and invstd of x as a forward pass would give them, in these types."""
    forward = reference.forward(x, eps=eps, axis=axis)
    return tuple(
        value.rounded()[:, 0].astype(dtype)
        for value, dtype in zip((forward.mean, forward.invstd), dtypes, strict=True)
    )


@TRAINING
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", SMALL, ids=str)
def test_every_shape(rng, shape, dtype, training):
    x, dy = activations(rng, shape, dtype, offset=3.0), activations(rng, shape, dtype)
    mean, invstd = own_statistics(x, shape.axis)
    weight = parameter(rng, shape.channels, dtype)
    check_backward(dy, x, weight, mean=mean, invstd=invstd, axis=shape.axis, training=training)


@TRAINING
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_every_large_shape(rng, shape, dtype, training):
    x, dy = activations(rng, shape, dtype, offset=3.0), activations(rng, shape, dtype)
    # NumPy's own statistics, rounded as they are: the oracle is given the same.
    others = tuple(d for d in range(x.ndim) if d != shape.axis % x.ndim)
    mean, invstd = x.mean(others, np.float64), 1 / np.sqrt(x.var(others, np.float64) + 1e-5)
    check_backward(
        dy,
        x,
        parameter(rng, shape.channels, dtype),
        mean=mean,
        invstd=invstd,
        axis=shape.axis,
        training=training,
        channels=some_channels(rng, shape),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", ONE_VALUE, ids=str)
def test_one_value_a_channel_in_evaluation(rng, shape, dtype):
    x, dy = activations(rng, shape, dtype), activations(rng, shape, dtype)
    mean, invstd = rng.normal(size=(2, shape.channels))
    check_backward(dy, x, mean=mean, invstd=np.abs(invstd), axis=shape.axis, training=False)


@TRAINING
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("dims", [(0, 3, 4), (2, 3, 0), (0, 3), (4, 0, 5)], ids=str)
def test_empty_input(dims, dtype, training):
    x, columns = np.zeros(dims, dtype), np.ones(dims[1])
    result = nbbn.batch_norm_backward(x, x, columns, mean=columns, invstd=columns, training=training)
    assert (result.x.shape, result.x.dtype) == (dims, dtype)
    assert result.weight.tolist() == [0.0] * dims[1]
    assert result.bias.tolist() == [0.0] * dims[1]


@pytest.mark.parametrize("turn", [np.copy, channels_last], ids=["as_x", "channels_last"])
def test_calls_in_turn(rng, turn):
    """What a call reads beside x, wherever it lies, is no other call's x."""
    x, dy = rng.normal(size=(2, 3, 20, 4, 5)).astype(np.float32)
    mean, invstd = rng.normal(size=20), rng.uniform(1, 2, 20)
    for training in (False, True, False, False, True):
        check_backward(turn(dy), x, mean=mean, invstd=invstd, training=training)


def test_one_value_a_channel_in_training(rng):
    """No forward pass in training gives such statistics; the gradient of a lone value is zero."""
    x, dy = rng.normal(size=(2, 1, 3))
    mean = x[0].copy()
    try:
        result = nbbn.batch_norm_backward(dy, x, mean=mean, invstd=np.ones(3))
    except ValueError as error:
        assert "x" in str(error)
    else:
        assert result.x.tolist() == [[0.0] * 3]
        assert result.bias.tolist() == dy[0].tolist()
        assert result.weight.tolist() == [0.0] * 3
