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
    Shape,
    activations,
    parameter,
    some_channels,
    type_id,
)
from checks import assert_same_bits, assert_within, check_backward
from reference import column, rows, unit

TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
STATISTIC_TYPES = [(a, b) for a in (np.float32, np.float64) for b in (np.float32, np.float64)]


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
    mean, invstd = x.mean(others, np.float64), 1 / x.std(others, np.float64)
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
@pytest.mark.parametrize("weight_type", [None, np.float32, np.float64], ids=type_id)
@pytest.mark.parametrize("statistics", STATISTIC_TYPES, ids=type_id)
@pytest.mark.parametrize("shape", [Shape((4, 5, 7)), Shape((9, 4, 19), -1)], ids=str)
def test_weight_and_statistics_of_every_type(rng, shape, statistics, weight_type, dtype, training):
    x, dy = activations(rng, shape, dtype, offset=10), activations(rng, shape, dtype)
    mean, invstd = own_statistics(x, shape.axis, statistics)
    weight = parameter(rng, shape.channels, weight_type)
    check_backward(dy, x, weight, mean=mean, invstd=invstd, axis=shape.axis, training=training)


def test_the_two_formulas_differ(rng):
    """Evaluation's gradient is weight · invstd · dy, whatever x is; training's is not."""
    shape = Shape((6, 3, 8))
    x, dy = activations(rng, shape, np.float64), activations(rng, shape, np.float64)
    weight = rng.normal(size=3)
    mean, invstd = own_statistics(x, 1)
    arguments = {"weight": weight, "mean": mean, "invstd": invstd}
    evaluation = nbbn.batch_norm_backward(dy, x, training=False, **arguments)
    scaled = rows(dy) * (weight * invstd)[:, None]
    assert_within("grad_x", rows(evaluation.x), scaled, 4 * unit(np.float64) * np.abs(scaled))
    training = nbbn.batch_norm_backward(dy, x, **arguments)
    assert np.abs(training.x - evaluation.x).max() > 1e-3
    assert_same_bits(training[1:], evaluation[1:])


def test_sums_of_the_gradient_vanish(rng):
    """Σ grad_x = 0, and Σ grad_x · x_hat = (γ/s) · grad_weight · eps / (var + eps)"""
    shape, eps = Shape((16, 4, 30)), 0.3
    x, dy = activations(rng, shape, np.float64), activations(rng, shape, np.float64)
    weight = rng.normal(size=4)
    forward = reference.forward(x, eps=eps)
    mean, invstd = own_statistics(x, 1, eps=eps)
    result = nbbn.batch_norm_backward(dy, x, weight, mean=mean, invstd=invstd)
    grad_x, x_hat = rows(result.x), forward.x_hat.hi
    # Each of the 480 terms may be off by some 24 u of the largest.
    bound = 480 * 24 * unit(np.float64) * np.abs(weight * invstd)[:, None] * 5
    assert_within("Σ grad_x", grad_x.sum(1, keepdims=True), column(None, 0.0, 4), bound)
    sums = (grad_x * x_hat).sum(1, keepdims=True)
    share = eps / (forward.var.hi[:, 0] + eps)
    expected = weight * invstd * result.weight * share
    assert_within("Σ grad_x · x_hat", sums, expected[:, None], 5 * bound)


def test_gradient_of_a_constant_is_zero(rng):
    """dy = 1: Σ out = m · bias does not depend on x."""
    x = activations(rng, Shape((5, 3, 20)), np.float64)
    mean, invstd = own_statistics(x, 1)
    result = nbbn.batch_norm_backward(np.ones_like(x), x, mean=mean, invstd=invstd)
    assert result.bias.tolist() == [100.0] * 3
    bound = 8 * unit(np.float64) * invstd[:, None] * 2
    assert_within("grad_x", rows(result.x), np.zeros((3, 100)), bound)


def test_backward_is_linear_in_grad_out(rng):
    shape = Shape((5, 3, 20))
    x, a, b = (activations(rng, shape, np.float64) for _ in range(3))
    mean, invstd = own_statistics(x, 1)
    of_a, of_b, of_both = (
        nbbn.batch_norm_backward(dy, x, mean=mean, invstd=invstd) for dy in (a, b, a + 2 * b)
    )
    for one, other, both in zip(of_a, of_b, of_both, strict=True):
        # Sums of 100 terms of size 10 at most, each right to some u.
        np.testing.assert_allclose(both, one + 2 * other, rtol=0, atol=1e-12)
    # Scaling by a power of two is exact.
    doubled = nbbn.batch_norm_backward(2 * a, x, mean=mean, invstd=invstd)
    assert_same_bits(tuple(doubled), tuple(2 * v for v in of_a))


def test_nothing_accumulates_across_calls(rng):
    shape = Shape((5, 3, 20))
    x, dy = activations(rng, shape, np.float32), activations(rng, shape, np.float32)
    mean, invstd = own_statistics(x, 1)
    first = nbbn.batch_norm_backward(dy, x, mean=mean, invstd=invstd)
    nbbn.batch_norm_backward(x, dy, mean=mean, invstd=invstd)
    again = nbbn.batch_norm_backward(dy, x, mean=mean, invstd=invstd)
    assert_same_bits(tuple(first), tuple(again))


@TRAINING
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("dims", [(0, 3, 4), (2, 3, 0), (0, 3), (4, 0, 5)], ids=str)
def test_empty_input(dims, dtype, training):
    x, columns = np.zeros(dims, dtype), np.ones(dims[1])
    result = nbbn.batch_norm_backward(x, x, columns, mean=columns, invstd=columns, training=training)
    assert (result.x.shape, result.x.dtype) == (dims, dtype)
    assert result.weight.tolist() == [0.0] * dims[1]
    assert result.bias.tolist() == [0.0] * dims[1]


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
