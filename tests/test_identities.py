"""What stays the same, or is known, whatever the numbers are: to the bit, or to rounding."""

import numpy as np
import pytest

import nbbn
import reference
from bank import simulated
from cases import LAYOUTS, Shape, activations, in_every_layout, parameter, running_statistics
from checks import assert_same_bits, assert_within
from reference import column, finfo, rows, unit

# --- identities that hold to the bit ---------------------------------------------------------------
#
# Another: poison in one channel leaves the others' bits (test_reproducible.py).

IDENTITY_SHAPES = [
    Shape((8, 5, 49)),
    Shape((40, 33)),
    Shape((30, 40, 65), -1),
    Shape((6, 3, 2049)),
    Shape((20, 5, 60, 61)),
]


def normal(values):
    """Return the values without those that are too small to have all of their bits."""
    wide = np.abs(values.astype(np.float64))
    return np.where(wide < 2.0**20 * float(finfo(values.dtype).smallest_normal), 0, values)


@in_every_layout
def test_scaling_by_a_power_of_two(rng, layout, dtype):
    """x → 2ᵏx with eps → 4ᵏ eps: BN(aWu) = BN(Wu), arXiv 1502.03167 §3.3."""
    for shape in IDENTITY_SHAPES:
        axis = shape.axis
        x, dy = (activations(rng, shape, dtype, offset=9) for _ in range(2))
        x[np.abs(x) < 2.0**-10] = 1  # in float16, 2ᵏ times that is subnormal, and rounded
        x, dy = (LAYOUTS[layout](values) for values in (x, dy))
        weight = parameter(rng, shape.channels, np.float32)
        plain = nbbn.batch_norm_forward(x, weight, weight, eps=1e-5, axis=axis)
        used = {"mean": plain.mean, "invstd": plain.invstd, "axis": axis}
        gradients = nbbn.batch_norm_backward(dy, x, weight, **used)
        for k in [-20, -7, 6, 20] if float(finfo(dtype).max) > 1e30 else [-3, -1]:
            two = dtype(2.0**k)
            twice = LAYOUTS[layout](x * two)
            scaled = nbbn.batch_norm_forward(twice, weight, weight, eps=1e-5 * 4.0**k, axis=axis)
            assert_same_bits(np.ascontiguousarray(scaled.out), np.ascontiguousarray(plain.out))
            assert_same_bits(scaled.mean, plain.mean * 2.0**k)
            assert_same_bits(scaled.var, plain.var * 4.0**k)
            assert_same_bits(scaled.invstd, plain.invstd * 2.0**-k)
            used = {"mean": scaled.mean, "invstd": scaled.invstd, "axis": axis}
            others = nbbn.batch_norm_backward(dy, twice, weight, **used)
            assert_same_bits(normal(others.x * two), normal(gradients.x))
            assert_same_bits(others[1:], gradients[1:])


@in_every_layout
def test_negation(rng, layout, dtype):
    """x → -x with bias 0 gives -out; equal as numbers, since -0 is 0."""
    for shape in IDENTITY_SHAPES:
        axis = shape.axis
        x, dy = (LAYOUTS[layout](activations(rng, shape, dtype, offset=9)) for _ in range(2))
        opposite = LAYOUTS[layout](-x)
        weight = parameter(rng, shape.channels, np.float32)
        plain = nbbn.batch_norm_forward(x, weight, axis=axis)
        negated = nbbn.batch_norm_forward(opposite, weight, axis=axis)
        np.testing.assert_array_equal(negated.out, -plain.out)
        np.testing.assert_array_equal(negated.mean, -plain.mean)
        assert_same_bits(negated.var, plain.var)
        one, other = (
            nbbn.batch_norm_backward(dy, v, weight, mean=f.mean, invstd=f.invstd, axis=axis)
            for v, f in ((x, plain), (opposite, negated))
        )
        np.testing.assert_array_equal(other.x, one.x)  # x_hat and grad_weight change sign together
        np.testing.assert_array_equal(other.weight, -one.weight)
        assert_same_bits(other.bias, one.bias)
        mean, var = running_statistics(rng, shape.channels)
        np.testing.assert_array_equal(
            nbbn.batch_norm(opposite, -mean, var, weight, axis=axis),
            -nbbn.batch_norm(x, mean, var, weight, axis=axis),
        )


@in_every_layout
def test_scaling_the_gradient_by_a_power_of_two(rng, layout, dtype):
    x, dy = (activations(rng, Shape((8, 5, 49)), dtype) for _ in range(2))
    dy[np.abs(dy.astype(np.float32)) < 2.0**-10] = 0  # an eighth of any other is a normal float16
    x, dy = LAYOUTS[layout](x), LAYOUTS[layout](dy)
    forward = nbbn.batch_norm_forward(x)
    for training in (True, False):
        used = {"mean": forward.mean, "invstd": forward.invstd, "training": training}
        plain = nbbn.batch_norm_backward(dy, x, **used)
        scaled = nbbn.batch_norm_backward(LAYOUTS[layout](dy * dtype(0.125)), x, **used)
        assert_same_bits(normal(scaled.x * dtype(8)), normal(plain.x))
        assert_same_bits(scaled[1:], tuple(v / 8 for v in plain[1:]))


# --- identities that hold to rounding --------------------------------------------------------------
#
# Another: the merged statistics of the parts are those of the whole (test_stats.py).


def rounding(dtype):
    """Half a unit in the last place of a type, which its values are rounded to."""
    return float(finfo(dtype).eps) / 2


def trained(rng, layout, dtype, eps=1e-5):
    """Return x, grad_out, a weight, and what training gives."""
    x, dy = (LAYOUTS[layout](activations(rng, Shape((16, 4, 30)), dtype)) for _ in range(2))
    weight = rng.normal(size=4)
    return x, dy, weight, nbbn.batch_norm_forward(x, weight, eps=eps)


@in_every_layout
def test_shift_of_the_input_leaves_the_output(rng, layout, dtype):
    """A shift by which no value is rounded leaves the variance, and all of the rest to rounding."""
    x = (rng.integers(-64, 64, (8, 3, 25)) / 8).astype(dtype)
    plain, shifted = (nbbn.batch_norm_forward(LAYOUTS[layout](v)) for v in (x, x + dtype(8)))
    bound = 18 * unit(np.float64)  # both are rounded in the end, where units are of 16 u at most
    assert_within("mean", shifted.mean, plain.mean + 8, bound)
    assert_within("var", shifted.var, plain.var, 2 * reference.depth(200) * unit(dtype) * plain.var)
    bound = 2 * 15 * rounding(dtype) * np.abs(plain.out.astype(float)) + 2.0**-50
    assert_within("out", shifted.out, plain.out.astype(float), bound)


@in_every_layout
def test_sums_of_the_gradient_vanish(rng, layout, dtype):
    """Σ grad_x = 0, and Σ grad_x · x_hat = (γ/s) · grad_weight · eps / (var + eps)"""
    eps = 0.3
    x, dy, weight, forward = trained(rng, layout, dtype, eps=eps)
    result = nbbn.batch_norm_backward(dy, x, weight, mean=forward.mean, invstd=forward.invstd)
    grad_x = rows(result.x).astype(float)
    x_hat = (rows(x).astype(float) - forward.mean[:, None]) * forward.invstd[:, None]
    # Each of the 480 terms may be off by some 24 u of the largest.
    bound = 480 * 24 * rounding(dtype) * np.abs(weight * forward.invstd)[:, None] * 5
    assert_within("Σ grad_x", grad_x.sum(1, keepdims=True), column(None, 0.0, 4), bound)
    share = eps / (forward.var + eps)
    expected = weight * forward.invstd * result.weight * share
    sums = (grad_x * x_hat).sum(1, keepdims=True)
    assert_within("Σ grad_x · x_hat", sums, expected[:, None], 5 * bound)


@in_every_layout
def test_gradient_of_a_constant_is_zero(rng, layout, dtype):
    """dy = 1: Σ out = m · bias does not depend on x."""
    x, _, _, forward = trained(rng, layout, dtype)
    result = nbbn.batch_norm_backward(np.ones_like(x), x, mean=forward.mean, invstd=forward.invstd)
    assert result.bias.tolist() == [480.0] * 4
    bound = 8 * unit(dtype) * forward.invstd[:, None] * 2
    assert_within("grad_x", rows(result.x), np.zeros((4, 480)), bound)


@in_every_layout
def test_backward_is_linear_in_grad_out(rng, layout, dtype):
    """In small integers, whose sums are not rounded."""
    x, _, weight, forward = trained(rng, layout, dtype)
    a, b = (rng.integers(-7, 8, x.shape).astype(dtype) for _ in range(2))
    used = {"mean": forward.mean, "invstd": forward.invstd}
    for training in (True, False):
        of_a, of_b, of_both = (
            nbbn.batch_norm_backward(LAYOUTS[layout](dy), x, weight, training=training, **used)
            for dy in (a, b, a + dtype(2) * b)
        )
        # Terms of size 21 at most, 480 of them in a sum, each right to some u.
        scale = 21 * np.abs(weight * forward.invstd)[:, None] * 24 * 4
        parts = (rows(v.x).astype(float) for v in (of_a, of_b))
        assert_within("grad_x", rows(of_both.x), next(parts) + 2 * next(parts), scale * rounding(dtype))
        for one, other, both in zip(of_a[1:], of_b[1:], of_both[1:], strict=True):
            bound = 480 * 21 * 5 * reference.depth(480) * unit(dtype)
            assert_within("sums", both, one + 2 * other, bound)


@in_every_layout
def test_output_has_the_bias_as_mean_and_the_weight_as_deviation(rng, layout, dtype):
    """mean(out) = bias and var(out) = weight² · var / (var + eps)"""
    x = LAYOUTS[layout](activations(rng, Shape((16, 3, 40)), dtype, offset=-5))
    weight, bias, eps = rng.normal(size=3), rng.normal(size=3), 0.5
    result = nbbn.batch_norm_forward(x, weight, bias, eps=eps)
    out, u = rows(result.out).astype(float), rounding(dtype)
    # Each of the 640 values may be off by some 12 u of itself.
    bound = 20 * u * np.abs(out).max(axis=1, keepdims=True)
    assert_within("mean", out.mean(axis=1, keepdims=True), column(bias, 0, 3), bound)
    var = weight**2 * result.var / (result.var + eps)
    assert_within("var", out.var(axis=1), var, 60 * u * (weight**2 + bias**2))


def test_cuda(python, seed):
    """Those that hold to the bit."""
    pytest.importorskip("greenlet")
    simulated(python, seed, f"identities({seed})")
