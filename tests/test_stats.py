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
    channels_last,
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


# --- NIST's reference data sets for univariate statistics ------------------------------------------


def numacc(first, low, high):
    return [first] + [low, high] * 500


MAVRO_COUNTS = (3, 5, 9, 4, 3, 5, 4, 3, 2, 1, 1, 2, 2, 4, 2)
MAVRO = [round(2.0013 + 0.0001 * step, 4) for step, times in enumerate(MAVRO_COUNTS) for _ in range(times)]

# Mean and population variance of the data as each type stores them.
NIST = {
    "NumAcc1": (
        [10000001.0, 10000003.0, 10000002.0],
        {np.float64: (10000002.0, 2 / 3), np.float32: (10000002.0, 2 / 3)},
    ),
    "NumAcc2": (
        numacc(1.2, 1.1, 1.3),
        {
            np.float64: (1.2000000000000000665, 0.00999000999000998557),
            np.float32: (1.19999998813861614, 0.00999000284459931016),
        },
    ),
    "NumAcc3": (
        numacc(1000000.2, 1000000.1, 1000000.3),
        {
            np.float64: (1000000.20000000001158, 0.00999000999698793137),
            np.float32: (1000000.21871878121878, 0.00878125683008300390),
        },
    ),
    "NumAcc4": (
        numacc(10000000.2, 10000000.1, 10000000.3),
        {
            np.float64: (10000000.2000000001853, 0.00999001010165705221),
            np.float32: (10000000.0, 0.0),
        },
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("name", NIST)
def test_nist_sets(name, dtype):
    data, certified = NIST[name]
    mean, var = certified[dtype]
    stats = nbbn.batch_stats(np.array(data, dtype)[:, None])
    # The mean is held to two units of float64, the variance to the depth of its sum.
    u, c = unit(np.float64), reference.depth(len(data))
    assert abs(stats.mean[0] - mean) <= 4 * u * mean
    assert abs(stats.var[0] - var) <= c * unit(dtype) * var + (c * u * mean) ** 2


def test_nist_mavro():
    """Certified to 15 digits for decimals that round when stored: s to 1e-9 relative, at mean / s 5e3."""
    stats = nbbn.batch_stats(np.array(MAVRO)[:, None])
    assert len(MAVRO) == stats.count == 50
    assert abs(stats.mean[0] - 2.001856) <= 1e-15
    s = np.sqrt(stats.var[0] * 50 / 49)
    assert abs(s - 0.000429123454003053) <= 1e-9 * s


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("layout", ["first", "last", "strides", "fortran", "reversed"])
def test_nist_sets_side_by_side(layout, dtype):
    """1001 = 7 · 11 · 13: a set a channel, in every layout."""
    names = ["NumAcc2", "NumAcc3", "NumAcc4"]
    x = np.stack([np.array(NIST[n][0], dtype).reshape(7, 11, 13) for n in names], axis=1)
    x, axis = {
        "first": (x, 1),
        "last": (np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1),
        "strides": (channels_last(x), 1),
        "fortran": (np.asfortranarray(x), 1),
        "reversed": (x[::-1, :, ::-1, ::-1].copy()[::-1, :, ::-1, ::-1], 1),
    }[layout]
    result = nbbn.batch_norm_forward(x, axis=axis)
    for c, name in enumerate(names):
        mean, var = NIST[name][1][dtype]
        u, depth = unit(np.float64), reference.depth(1001)
        assert abs(result.mean[c] - mean) <= 4 * u * mean
        assert abs(result.var[c] - var) <= depth * unit(dtype) * var + (depth * u * mean) ** 2
    if dtype is np.float32:
        assert (np.moveaxis(result.out, axis, 0)[2] == 0).all()  # a constant, as stored


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


def test_more_values_than_32_bits_count(rng):
    """2³¹ + 2¹⁹ values a channel, of which only 32776 are in memory."""
    line = rng.normal(size=32776).astype(np.float32) + np.float32(3)
    stats = nbbn.batch_stats(np.broadcast_to(line, (65536, 1, 32776)))
    expected = reference.forward(line[None, None])
    assert stats.count == 65536 * 32776
    expected.count = stats.count
    check_statistics(stats, expected, np.float32)
