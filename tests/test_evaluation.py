"""Evaluation: batch_norm with given statistics."""

import numpy as np
import pytest

import nbbn
from cases import (
    DTYPES,
    LARGE,
    ONE_VALUE,
    SMALL,
    Shape,
    activations,
    columns_for,
    in_range,
    parameter,
    running_statistics,
    some_channels,
    type_id,
)
from checks import check_evaluation


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


@pytest.mark.parametrize("statistics, dtype", [(s, d) for d in DTYPES for s in columns_for(d)], ids=type_id)
@pytest.mark.parametrize("offset", [10.0, 1e3, 1e5, 1e7])
def test_large_means(rng, offset, statistics, dtype):
    """x - mean first: folded into a · x + b, the difference of two large numbers would be left."""
    offset = in_range(offset, dtype)
    x = activations(rng, Shape((4, 5, 7)), dtype, offset=offset)
    mean, var = running_statistics(rng, 5, (statistics, statistics))
    check_evaluation(x, (mean + statistics(offset)).astype(statistics), var)


def test_empty_input():
    for dims in ((0, 3, 4), (2, 3, 0), (4, 0, 5)):
        mean, var = np.zeros(dims[1]), np.ones(dims[1])
        out = nbbn.batch_norm(np.zeros(dims, np.float32), mean, var)
        assert (out.shape, out.dtype) == (dims, np.float32)
