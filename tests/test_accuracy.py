"""The tolerances of the design where they are hard to keep: large means, outliers, long sums, extreme
magnitudes, and constants, which must be exact."""

import numpy as np
import pytest

import nbbn
import reference
from cases import DTYPES, Shape, activations, channels_last, in_range, type_id, with_types
from checks import check_backward, check_forward, check_statistics
from reference import rows

OFFSETS = [0.0, 10.0, 1e3, 1e5, 1e7]
GRID = [
    Shape((8, 3, 100)),
    Shape((700, 5)),
    Shape((10, 11, 13, 7), -1),
    Shape((2, 3, 2500)),
    Shape((30, 2, 60, 61)),
    Shape((40, 50, 60, 3), -1),
]


def statistics_of(result):
    return {"mean": result.mean, "invstd": result.invstd}


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("sigma", [1.0, 0.01])
@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("shape", GRID, ids=str)
def test_offsets(rng, shape, offset, sigma, dtype):
    """A float32 near 1e7 is an integer: there, what is normalized well is the rounded input."""
    x = activations(rng, shape, dtype, offset, sigma)
    dy = activations(rng, shape, dtype)
    weight, bias = rng.normal(size=(2, shape.channels)).astype(dtype)
    result = check_forward(x, weight, bias, axis=shape.axis)
    check_backward(dy, x, weight, axis=shape.axis, **statistics_of(result))


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("offset", OFFSETS)
def test_offset_gradients(rng, offset, dtype):
    """A gradient with a mean far from zero: its sum cancels in grad_x."""
    shape = Shape((16, 3, 90))
    x, dy = activations(rng, shape, dtype, 3.0), activations(rng, shape, dtype, offset)
    check_backward(dy, x, **statistics_of(nbbn.batch_norm_forward(x)))


# --- constants -------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, dtype", with_types(0.1, 100.0, -1e10, 1e-30, 1e30, 0.0), ids=type_id)
@pytest.mark.parametrize("count", [2, 3, 9, 49, 1000, 4099, 150_000])
def test_constant_channels_are_exact(rng, count, value, dtype):
    """var is 0 and out is the bias, exactly; the next channel is not a constant."""
    bias = np.array([0.3, -7.7], dtype)
    for axis in (1, -1):
        x = np.empty((count, 2) if axis == -1 else (1, 2, count), dtype)
        constant, other = np.moveaxis(x, axis, 0)
        constant[...] = value
        other[...] = rng.normal(size=other.shape)
        result = nbbn.batch_norm_forward(x, bias=bias, axis=axis)
        assert result.var[0] == 0
        assert result.mean[0] == dtype(value)
        assert (np.moveaxis(result.out, axis, 0)[0] == bias[0]).all()
        assert result.var[1] > 0
        stats = nbbn.batch_stats(x, axis=axis)
        assert (stats.mean[0], stats.var[0]) == (dtype(value), 0)


def test_constant_channels_have_no_gradient_of_weight(rng):
    x = np.full((9, 3, 31), 0.7, np.float32)
    dy = rng.normal(size=x.shape).astype(np.float32)
    result = nbbn.batch_norm_forward(x)
    gradients = check_backward(dy, x, **statistics_of(result))
    assert gradients.weight.tolist() == [0.0] * 3


# --- outliers, plateaus, cancellation --------------------------------------------------------------


@pytest.mark.parametrize("outlier, dtype", with_types(1e8, -1e8, 1e15), ids=type_id)
@pytest.mark.parametrize("place", ["first", "second", "middle", "last"])
@pytest.mark.parametrize("count", [2, 17, 1000, 70_000])
def test_one_outlier(rng, count, place, outlier, dtype):
    """Wherever it stands: a shift by the first value, or by a global guess, would be spoilt by it."""
    at = {"first": 0, "second": 1, "middle": count // 2, "last": count - 1}[place]
    for shape in (Shape((1, 3, count)), Shape((count, 3)), Shape((1, count, 3), -1)):
        x = activations(rng, shape, dtype)
        channel = np.moveaxis(x, shape.axis, 0)[1]
        channel[np.unravel_index(at, channel.shape)] = outlier
        check_forward(x, axis=shape.axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("first", [2, 8])
@pytest.mark.parametrize("shape", [Shape((100, 500)), Shape((13, 500, 8)), Shape((105, 33, 2))], ids=str)
def test_first_values_a_little_off(rng, shape, first, dtype):
    """By 0.5 to 2.5 deviations: squares around a guess made of them are larger than those around the mean.

    What they lose more by rounding is as much as float64's bound allows for, at twice a deviation.
    """
    values = rng.normal(size=(shape.channels, shape.count))
    off = rng.uniform(0.5, 2.5, size=(shape.channels, 1))
    values[:, :first] = off + 0.2 * values[:, :first]
    dims = list(shape.dims)
    dims.insert(0, dims.pop(shape.axis))
    x = np.ascontiguousarray(np.moveaxis(values.reshape(dims), 0, shape.axis)).astype(dtype)
    check_forward(x, axis=shape.axis)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_one_outlier_in_a_large_mean(rng, dtype):
    """The outlier is where everything else is; all else is far off."""
    x = activations(rng, Shape((50, 3, 700)), dtype, offset=1e7)
    x[0, :, 0] = 0
    result = check_forward(x)
    dy = activations(rng, Shape((50, 3, 700)), dtype)
    check_backward(dy, x, **statistics_of(result))


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize(
    "shape", [Shape((30_001, 3)), Shape((3, 2, 20_000)), Shape((60, 500, 7), -1)], ids=str
)
@pytest.mark.parametrize("offset", [0.0, 1e3, 1e7])
def test_two_values_in_turn(shape, offset, dtype):
    """All squares are alike, so that every rounding of a running sum goes the same way."""
    offset = in_range(offset, dtype)
    place = np.indices(shape.dims).sum(0)
    x = np.where(place % 2, dtype(offset + 1.1), dtype(offset - 1.3))
    dy = np.where(place % 3, dtype(0.1), dtype(-0.7))
    result = check_forward(x, axis=shape.axis)
    check_backward(dy, x, axis=shape.axis, **statistics_of(result))


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("step", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("shape", [Shape((300, 3)), Shape((1, 2, 5000)), Shape((100, 200, 3), -1)], ids=str)
def test_drift(shape, step, dtype):
    """x rises from 100 on: what comes first says nothing of what comes last."""
    ramp = 100 + in_range(step * shape.count, dtype) / shape.count * np.arange(shape.count)
    x = np.stack([ramp, -ramp, ramp[::-1]][: shape.channels])
    dims = list(shape.dims)
    dims.insert(0, dims.pop(shape.axis))
    x = np.moveaxis(x.reshape(dims), 0, shape.axis).astype(dtype)
    result = check_forward(np.ascontiguousarray(x), axis=shape.axis)
    assert (result.var > 0).all() or step == 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", GRID[:4], ids=str)
@pytest.mark.parametrize("jump", [1e4, 1e7])
def test_halves_with_means_of_their_own(rng, jump, shape, dtype):
    """What was a good shift for the first half is a bad one for the second."""
    x = activations(rng, shape, dtype)
    x[x.shape[0] // 2 :] += dtype(in_range(jump, dtype))
    result = check_forward(x, axis=shape.axis)
    dy = activations(rng, shape, dtype)
    check_backward(dy, x, axis=shape.axis, **statistics_of(result))


# --- magnitudes ------------------------------------------------------------------------------------


MAGNITUDES = (1e-36, 1e-30, 1e-20, 1e-10, 1e10, 1e18, 1e20, 1e30, 1e37)


@pytest.mark.parametrize("sigma, dtype", with_types(*MAGNITUDES), ids=type_id)
@pytest.mark.parametrize("shape", [*GRID[:2], GRID[3], Shape((12, 13, 40, 3), -1)], ids=str)
def test_tiny_and_huge_values(rng, shape, sigma, dtype):
    """A square of 1e30 is more than a float32 holds, and a square of 1e-30 less; eps 0 shows both."""
    x, dy = activations(rng, shape, dtype, sigma=sigma), activations(rng, shape, dtype)
    for eps in (0.0, 1e-5):
        result = check_forward(x, eps=eps, axis=shape.axis)
        assert (result.var > 0).all() and np.isfinite(result.var).all()
        check_backward(dy, x, axis=shape.axis, **statistics_of(result))


@pytest.mark.parametrize("sigma, dtype", with_types(1e-25, 1e-18), ids=type_id)
@pytest.mark.parametrize(
    "shape", [Shape((2, 3)), Shape((3, 5)), Shape((2, 3, 40)), Shape((64, 7), -1)], ids=str
)
def test_squares_that_are_no_numbers(rng, shape, sigma, dtype):
    """Each is 0 in x's type, and the mean is the guess exactly: that is not a constant channel."""
    x = activations(rng, shape, dtype, sigma=sigma)
    x[1::2] = -x[: len(x) // 2]
    if len(x) % 2:
        x[-1] = 0
    result = check_forward(x, eps=0.0, axis=shape.axis)
    assert (result.var > 0).all()
    constant = np.full_like(x, x.flat[0])
    assert not nbbn.batch_stats(constant, axis=shape.axis).var.any()


@pytest.mark.parametrize("shape", GRID[:3], ids=str)
@pytest.mark.parametrize("sigma", [1e-30, 1e30])
def test_tiny_and_huge_gradients(rng, shape, sigma):
    x = activations(rng, shape, np.float32)
    dy = activations(rng, shape, np.float32, sigma=sigma)
    result = nbbn.batch_norm_forward(x, axis=shape.axis)
    check_backward(dy, x, axis=shape.axis, **statistics_of(result))


@pytest.mark.parametrize("layout", [np.ascontiguousarray, channels_last])
def test_sum_beyond_the_range_of_the_type(layout):
    """1e5 values of 1e35: their sum is no float32."""
    x = layout(np.full((10, 2, 100, 100), 1e35, np.float32))
    x[:, 1] = 3e38
    x[::2, 1] = -3e38
    result = nbbn.batch_norm_forward(x, eps=0.0)
    assert result.mean.tolist() == [float(np.float32(1e35)), 0.0]
    # 1/3e38 is a subnormal float32, with some 20 bits.
    np.testing.assert_allclose(result.out[1::2, 1], 1, rtol=2**-20)
    np.testing.assert_allclose(result.out[::2, 1], -1, rtol=2**-20)


def test_subnormal_values(rng):
    """Not flushed to zero, on the way in or out: right to a unit of the smallest float32."""
    x = (rng.integers(-1000, 1000, (4, 3, 50)) * 1.4e-45).astype(np.float32)
    assert np.count_nonzero(x) > 500
    ones = np.ones(3)
    out = nbbn.batch_norm(x, 0 * ones, ones, eps=0)
    np.testing.assert_array_equal(out, x)
    stats = nbbn.batch_stats(x)
    expected = reference.forward(x)
    check = expected.mean.rounded()[:, 0]
    np.testing.assert_allclose(stats.mean, check, rtol=0, atol=1e-16 * np.abs(x).max() + 5e-324)
    assert stats.mean.any()


# --- long sums -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (Shape((4, 1, 1_000_000)), np.float32),
        (Shape((2_000, 1, 2_000)), np.float32),
        (Shape((4_000_000, 1)), np.float64),
    ],
    ids=str,
)
def test_four_million_uniform_values(rng, shape, dtype):
    """Uniform in [0, 1): added up one by one in float32, they stop growing at 2²⁴."""
    x = rng.random(shape.dims).astype(dtype)
    expected = reference.forward(x)
    result = nbbn.batch_norm_forward(x)
    check_statistics(result, expected, dtype)
    some = rng.choice(x.size, 10_000)
    error = expected.out.distance(rows(result.out))[0, some]
    assert (error <= reference.out_tolerance(expected, dtype)[0, some]).all()


@pytest.mark.parametrize("shape", [Shape((500_000, 3)), Shape((3, 1, 500_000))], ids=str)
def test_long_gradients(rng, shape):
    """Of one sign, so that their sum grows as long as they last."""
    x = activations(rng, shape, np.float32, offset=1e3)
    dy = rng.random(shape.dims).astype(np.float32)
    check_backward(dy, x, **statistics_of(check_forward(x)))
