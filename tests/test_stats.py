"""batch_stats and BatchStats.merge."""

import itertools

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
    some_channels,
    type_id,
)
from checks import assert_same_bits, assert_within, check_statistics, unchanged
from reference import unit


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", SMALL + ONE_VALUE + LARGE, ids=str)
def test_every_shape(rng, shape, dtype):
    x = activations(rng, shape, dtype, offset=3.0)
    channels = some_channels(rng, shape)
    expected = reference.forward(np.take(x, channels, shape.axis), axis=shape.axis)
    with unchanged(x):
        actual = nbbn.batch_stats(x, axis=shape.axis)
    assert actual._fields == ("count", "mean", "var")
    check_statistics(actual, expected, dtype, channels)


def test_one_value_has_no_variance():
    stats = nbbn.batch_stats(np.array([[1.5, -2.5e30]], np.float32))
    assert (stats.count, stats.mean.tolist()) == (1, [1.5, float(np.float32(-2.5e30))])
    assert stats.var.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dims", [(0, 3, 4), (2, 3, 0), (0, 3)], ids=str)
def test_empty_input(dims):
    stats = nbbn.batch_stats(np.zeros(dims, np.float32))
    assert stats.count == 0
    assert stats.mean.tolist() == stats.var.tolist() == [0.0] * 3


# --- pooling ---------------------------------------------------------------------------------------


def of(x):
    return nbbn.batch_stats(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("offset", [0.0, 1e5, 1e7])
def test_merged_parts_are_the_whole(rng, offset, dtype):
    x = activations(rng, Shape((30, 4, 9)), dtype, offset=offset)
    x[10:17] += dtype(20)  # the parts have means of their own
    expected = reference.forward(x)
    merged = of(x[:10]).merge(of(x[10:17])).merge(of(x[17:]))
    assert merged.count == expected.count and isinstance(merged, type(of(x)))
    # Three means, each right to 2 u, and what the pooling rounds: 3 more.
    mean_bound = 6 * reference.mean_tolerance(expected)
    assert_within("mean", merged.mean[:, None], expected.mean, mean_bound)
    # A difference of means with an error d moves the variance by d · |difference| and d².
    deviation = np.sqrt(expected.var.hi)
    bound = reference.var_tolerance(expected, dtype) + 2 * deviation * mean_bound + mean_bound**2
    assert_within("var", merged.var[:, None], expected.var, bound)


def test_merge_in_any_order():
    parts = [np.array(v, np.float64)[:, None] for v in ([1, 3], [5, 7], [9, 11, 13, 15])]
    for order in itertools.permutations(parts):
        merged = of(order[0]).merge(of(order[1])).merge(of(order[2]))
        assert merged.count == 8
        # Two poolings, each of some four roundings.
        assert abs(merged.mean[0] - 8) <= 8 * 4 * unit(np.float64)
        assert abs(merged.var[0] - 21) <= 21 * 8 * unit(np.float64)


@pytest.mark.parametrize("dtype", [np.float16, np.float32], ids=type_id)
def test_merge_of_narrow_columns(dtype):
    """count · var, and m2 of both, are beyond 16 bits; and the result is in float64."""
    narrow = nbbn.BatchStats(40_000, np.array([1.0], dtype), np.array([4.0], dtype))
    wide = nbbn.BatchStats(40_000, np.array([3.0]), np.array([4.0]))
    for merged in (narrow.merge(wide), wide.merge(narrow), narrow.merge(narrow._replace(mean=wide.mean))):
        assert (merged.count, merged.mean.tolist(), merged.var.tolist()) == (80_000, [2.0], [5.0])
        assert merged.mean.dtype == merged.var.dtype == np.float64


def test_a_constant_stays_a_constant():
    parts = [of(np.full((n, 2), 0.1, np.float32)) for n in (2, 3, 1000)]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.mean.tolist() == [float(np.float32(0.1))] * 2
    assert merged.var.tolist() == [0.0, 0.0]


def test_empty_is_the_identity(rng):
    x = activations(rng, Shape((5, 3, 4)), np.float32)
    stats, empty = of(x), of(x[:0])
    for merged in (stats.merge(empty), empty.merge(stats)):
        assert_same_bits(tuple(merged), tuple(stats))
    assert_same_bits(tuple(empty.merge(empty)), tuple(empty))


def test_merge_leaves_its_arguments(rng):
    a, b = (of(activations(rng, Shape((5, 3, 4)), np.float32)) for _ in range(2))
    with unchanged(a.mean, a.var, b.mean, b.var):
        merged = a.merge(b)
    assert not any(np.shares_memory(m, v) for m in merged[1:] for v in (*a[1:], *b[1:]))


def test_merge_of_large_counts():
    """m² would overflow a 64-bit integer: two sets of 2⁴⁰ values."""
    stats = of(np.array([[1.0], [3.0]]))
    many = stats._replace(count=2**40)
    merged = many.merge(many._replace(mean=many.mean + 2.0))
    assert (merged.count, merged.mean.tolist(), merged.var.tolist()) == (2**41, [3.0], [2.0])
