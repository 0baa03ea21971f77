"""Evaluation: batch_norm with given statistics."""

import numpy as np
import pytest

import nbbn
from cases import (
    DTYPES,
    LARGE,
    ONE_VALUE,
    PARAMETER_TYPES,
    SMALL,
    Shape,
    activations,
    parameter,
    running_statistics,
    some_channels,
    type_id,
)
from checks import assert_same_bits, check_evaluation


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", SMALL + ONE_VALUE + LARGE, ids=str)
def test_every_shape(rng, shape, dtype):
    check_evaluation(
        activations(rng, shape, dtype),
        *running_statistics(rng, shape.channels),
        parameter(rng, shape.channels, dtype),
        parameter(rng, shape.channels, dtype),
        axis=shape.axis,
        channels=some_channels(rng, shape),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("parameters", PARAMETER_TYPES, ids=type_id)
@pytest.mark.parametrize(
    "statistics",
    [(a, b) for a in DTYPES for b in DTYPES],
    ids=type_id,
)
def test_parameters_and_statistics_of_every_type(rng, statistics, parameters, dtype):
    shape = Shape((4, 5, 7))
    mean, var = running_statistics(rng, 5, statistics)
    weight, bias = (parameter(rng, 5, kind) for kind in parameters)
    check_evaluation(activations(rng, shape, dtype), mean, var, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.1])
@pytest.mark.parametrize("var", [1e-10, 1e-6, 1.0, 1e5])
def test_eps_is_added_to_the_variance(rng, var, eps, dtype):
    x = activations(rng, Shape((4, 5, 7)), dtype)
    mean = rng.normal(size=5).astype(np.float32)
    check_evaluation(x, mean, np.full(5, var, np.float32), eps=eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("statistics", DTYPES, ids=type_id)
@pytest.mark.parametrize("offset", [10.0, 1e3, 1e5, 1e7])
def test_large_means(rng, offset, statistics, dtype):
    """x - mean first: folded into a · x + b, the difference of two large numbers would be left."""
    x = activations(rng, Shape((4, 5, 7)), dtype, offset=offset)
    mean, var = running_statistics(rng, 5, (statistics, statistics))
    check_evaluation(x, (mean + statistics(offset)).astype(statistics), var)


def test_order_of_the_products_does_not_overflow():
    """weight · invstd first: weight · (x - mean) alone is more than a float32 holds."""
    for dims in ((2, 1, 3), (2, 3, 1)):
        x = np.full(dims, -6.8e35, np.float32)
        channels = dims[1]
        weight = np.full(channels, -2282.0, np.float32)
        var = np.full(channels, 1 / 0.117**2, np.float32)
        out = check_evaluation(x, np.zeros(channels, np.float32), var, weight, eps=0)
        assert np.isfinite(out).all() and (out > 1.8e38).all()


def test_statistics_are_read_and_never_written(rng):
    x = activations(rng, Shape((4, 5, 7)), np.float32)
    mean, var = running_statistics(rng, 5)
    mean.flags.writeable = var.flags.writeable = False
    check_evaluation(x, mean, var)


def test_zero_variance_without_eps_is_infinite_in_its_channel(rng):
    """As IEEE 754 has it: 1/0 is inf, inf · 0 is NaN."""
    x = activations(rng, Shape((4, 3, 7)), np.float32)
    mean, var = np.zeros(3), np.array([1.0, 0.0, 2.0])
    x[1, 1, 2] = 0
    out = nbbn.batch_norm(x, mean, var, eps=0)
    assert np.isnan(out[1, 1, 2])
    others = out[:, 1][x[:, 1] != 0]
    assert (others == np.sign(x[:, 1][x[:, 1] != 0]) * np.inf).all()
    assert_same_bits(out[:, [0, 2]], nbbn.batch_norm(x, mean, var + [0, 1, 0], eps=0)[:, [0, 2]])


def test_empty_input():
    for dims in ((0, 3, 4), (2, 3, 0), (4, 0, 5)):
        mean, var = np.zeros(dims[1]), np.ones(dims[1])
        out = nbbn.batch_norm(np.zeros(dims, np.float32), mean, var)
        assert (out.shape, out.dtype) == (dims, np.float32)
