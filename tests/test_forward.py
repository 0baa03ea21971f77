"""Training, forward: batch_norm_forward, and batch_norm with training=True."""

import numpy as np
import pytest

import nbbn
from cases import (
    DTYPES,
    LARGE,
    SMALL,
    Shape,
    activations,
    parameter,
    some_channels,
    type_id,
)
from checks import assert_same_bits, check_forward
from reference import rows


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", SMALL + LARGE, ids=str)
def test_every_shape(rng, shape, dtype):
    x = activations(rng, shape, dtype, offset=3.0)
    weight, bias = parameter(rng, shape.channels, dtype), parameter(rng, shape.channels, dtype)
    channels = some_channels(rng, shape)
    check_forward(x, weight, bias, axis=shape.axis, channels=channels)


@pytest.mark.parametrize("shape", [Shape((4, 5, 7)), Shape((9, 4, 19), -1)], ids=str)
def test_batch_norm_in_training_is_batch_norm_forward(rng, shape):
    x = activations(rng, shape, np.float32)
    weight, bias = rng.normal(size=(2, shape.channels)).astype(np.float32)
    forward = nbbn.batch_norm_forward(x, weight, bias, eps=1e-3, axis=shape.axis)
    # In the order of the arguments of torch.nn.functional.batch_norm.
    out = nbbn.batch_norm(x, None, None, weight, bias, True, 0.1, 1e-3, axis=shape.axis)
    assert_same_bits(out, forward.out)


def test_axis_counts_from_both_ends(rng):
    x = activations(rng, Shape((3, 4, 5)), np.float32)
    for axis in range(3):
        same = nbbn.batch_norm_forward(x, axis=np.int64(axis - 3))
        assert_same_bits(tuple(nbbn.batch_norm_forward(x, axis=axis)), tuple(same))


def test_every_axis_is_the_same_mathematics(rng):
    """The channels of an array do not know where their axis is: equal to rounding."""
    x = activations(rng, Shape((6, 4, 10)), np.float64)
    first = check_forward(x, axis=1)
    for axis in (0, 2):
        moved = check_forward(np.ascontiguousarray(np.moveaxis(x, 1, axis)), axis=axis)
        out = np.moveaxis(moved.out, axis, 1)
        np.testing.assert_allclose(out, first.out, rtol=0, atol=2e-14)  # |out| < 5: 100 u


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("dims", [(0, 3, 4), (2, 3, 0), (2, 3, 0, 5), (0, 3), (0, 3, 0), (4, 0, 5)], ids=str)
def test_empty_input(dims, dtype):
    channels = dims[1]
    weight, bias = np.full(channels, 2.0, dtype), np.full(channels, 3.0, dtype)
    result = nbbn.batch_norm_forward(np.zeros(dims, dtype), weight, bias, eps=0.25)
    assert (result.out.shape, result.out.dtype) == (dims, dtype)
    assert result.mean.tolist() == [0.0] * channels
    assert result.var.tolist() == [0.0] * channels
    assert result.invstd.tolist() == [2.0] * channels
    assert result.count == (0 if channels else result.count)
    mean, var = np.full(channels, 7.0), np.full(channels, 9.0)
    out = np.empty(dims, dtype)
    assert nbbn.batch_norm(out, mean, var, weight, bias, True, out=out) is out
    assert mean.tolist() == [7.0] * channels and var.tolist() == [9.0] * channels


def test_zero_weight_leaves_the_bias(rng):
    x = activations(rng, Shape((4, 3, 50)), np.float32, offset=1e6)
    bias = rng.normal(size=3).astype(np.float32)
    out = nbbn.batch_norm_forward(x, np.zeros(3, np.float32), bias).out
    assert (rows(out) == bias[:, None]).all()
