"""What a BatchNorm may do otherwise: renormalization, virtual batches, frozen statistics, and bad batches."""

import copy
import dataclasses
import math
import pickle
import re
import sys

import numpy as np
import pytest

import nbbn
import reference
from cases import Shape, activations, channels_last, type_id
from checks import assert_same_bits, assert_within, bits, check_running
from reference import column, rows
from test_faults import POINTS, at_points
from test_module import KEYS, randomized, state_bits

EPS = 1e-3
SHAPES = [Shape((2, 5)), Shape((3, 5)), Shape((6, 5, 4, 3)), Shape((5, 3, 5), -1), Shape((5, 7), 0)]
TYPES = [np.float32, np.float64, np.float16]


def as_is(a):
    return a


def layouts(shape):
    return [as_is, channels_last] if shape.axis == 1 and len(shape.dims) == 4 else [as_is]


CASES = [(shape, layout) for shape in SHAPES for layout in layouts(shape)]


def case_id(case):
    return f"{case[0]}-{case[1].__name__}" if isinstance(case, tuple) else None


def data(rng, shape, of_x, /, **options):
    """Return a module with parameters and statistics that are not the initial ones, x and grad_out."""
    bn = randomized(rng, axis=shape.axis, eps=EPS, **options)
    x = activations(rng, shape, of_x)
    return bn, x, rng.normal(size=x.shape).astype(of_x)


def differences(loss, array, step=1e-5):
    """Return the gradient of a function of an array, by central differences."""
    gradient = np.zeros(array.shape)
    for at in np.ndindex(array.shape):
        kept = array[at]
        array[at] = kept + step
        above = loss()
        array[at] = kept - step
        gradient[at] = (above - loss()) / (2 * step)
        array[at] = kept
    return gradient


# Of losses of some 10 values of size 1, at a step of 1e-5: its square, and rounding over it.
DIFFERENCES = {"rtol": 1e-6, "atol": 1e-7}


# --- batch renormalization -------------------------------------------------------------------------


def r_and_d(bn, x):
    """Return r and d from their definition, (C, 1) of float64, and the bound of what rounding makes of d."""
    _, mean, var = reference.statistics(x, bn.axis)
    running_mean, running_var = (column(a, 0.0, 5) for a in (bn.running_mean, bn.running_var))
    sigma = np.sqrt(running_var + bn.eps)
    r = np.sqrt(var.hi + bn.eps) / sigma
    d = (mean - running_mean).hi / sigma
    largest = np.abs(rows(x, bn.axis).astype(np.float64)).max(axis=1, keepdims=True)
    off = 8 * 2.0**-53 * (largest + np.abs(running_mean)) / sigma
    return np.clip(r, 1 / bn.r_max, bn.r_max), np.clip(d, -bn.d_max, bn.d_max), off


GRADIENT_TOLERANCES = reference.grad_weight_tolerance, reference.grad_bias_tolerance


def check_renorm(bn, x, dy):
    """Hold a step with renormalization, and its gradients, against the oracle."""
    r, d, off = r_and_d(bn, x)
    weight, bias = column(bn.weight, 1.0, 5), column(bn.bias, 0.0, 5)
    old = bn.running_mean.copy(), bn.running_var.copy()
    expected = reference.forward(x, eps=bn.eps, axis=bn.axis)
    out = (expected.x_hat * r + d) * weight + bias
    expected = dataclasses.replace(expected, weight=weight * r, bias=weight * d + bias, out=out)
    # r is off by what the variance is; and there is a rounding, to float64, in each of four operations.
    of_r = reference.invstd_tolerance(expected, x.dtype) / expected.invstd.hi + 4 * 2.0**-53
    slack = np.abs(weight) * (np.abs(expected.x_hat.hi) * r * of_r + off + 4 * 2.0**-53 * np.abs(d))
    actual = bn(x)
    assert actual.strides == np.empty_like(x).strides
    assert_within("out", rows(actual, bn.axis), out, reference.out_tolerance(expected, x.dtype) + slack)
    tolerance = reference.mean_tolerance(expected)
    check_running("running_mean", bn.running_mean, old[0], expected.mean, tolerance, bn.momentum)
    tolerance = expected.count / (expected.count - 1) * reference.var_tolerance(expected, x.dtype)
    unbiased = reference.unbiased(expected.var, expected.count)
    check_running("running_var", bn.running_var, old[1], unbiased, tolerance, bn.momentum)

    used = nbbn.batch_norm_forward(x, eps=bn.eps, axis=bn.axis)
    scaled = (bn.weight.astype(np.float64) if bn.affine else 1.0) * r[:, 0]
    backward = reference.backward(dy, x, scaled, mean=used.mean, invstd=used.invstd, axis=bn.axis)
    tolerance = reference.grad_x_tolerance(backward, x.dtype)
    assert_within("grad_x", rows(bn.backward(dy), bn.axis), backward.x, tolerance + 2 * of_r * backward.slope)
    if not bn.affine:
        assert bn.grad_weight is None
        return
    # The two sums, as far as they are known, may cancel; d is off as well, and float32 is rounded to.
    of_weight, of_bias = (f(backward, x.dtype) for f in GRADIENT_TOLERANCES)
    total = backward.weight * r + backward.bias * d
    bound = r * (of_weight + of_r * np.abs(backward.weight.hi)) + np.abs(d) * of_bias
    bound += (off + 4 * 2.0**-53 * np.abs(d)) * np.abs(backward.bias.hi)
    for name, value, tolerance in (
        ("grad_weight", total, bound),
        ("grad_bias", backward.bias, of_bias),
    ):
        rounding = 2.0**-24 * np.abs(value.hi)
        assert_within(name, getattr(bn, name)[:, None], value, tolerance + rounding)


@pytest.mark.parametrize("dtype", TYPES, ids=type_id)
@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize("bounds", [(3.0, 5.0), (1.1, 0.3), (1.0, 5.0), (3.0, 0.0)], ids=str)
def test_renorm(rng, case, dtype, bounds):
    shape, layout = case
    bn, x, dy = data(rng, shape, dtype, renorm=nbbn.Renorm(*bounds))
    for _ in range(2):
        check_renorm(bn, layout(x), dy)


def test_renorm_clips_some(rng):
    """Channels within the bounds, at the upper ones, and at the lower ones."""
    bn, x, dy = data(rng, Shape((6, 5, 4)), np.float32, renorm=nbbn.Renorm(1.5, 0.5))
    x = nbbn.batch_norm_forward(rng.normal(size=x.shape)).out  # so that nothing is clipped by chance
    x = (x * np.array([1, 9, 0.1, 1, 1])[:, None]).astype(np.float32)
    x += np.float32([0, 0, 0, 9, -9])[:, None]
    bn.running_mean[...], bn.running_var[...] = 0.0, 1.0
    r, d, _ = r_and_d(bn, x)
    assert (r[1], r[2]) == (1.5, 1 / 1.5) and (d[3], d[4]) == (0.5, -0.5)
    assert 1 / 1.5 < r[0] < 1.5 and abs(d[0]) < 0.5
    check_renorm(bn, x, dy)


def test_renorm_without_parameters(rng):
    bn, x, dy = data(rng, Shape((6, 5, 4)), np.float32, renorm=True, affine=False)
    check_renorm(bn, x, dy)


@pytest.mark.parametrize("dtype", TYPES[:2], ids=type_id)
def test_renorm_far_from_zero(rng, dtype):
    """A mean of 1e7 and a deviation of 1, in the data and in the statistics."""
    shape = Shape((64, 5, 4))
    bn, x, dy = data(rng, shape, dtype, renorm=True, dtype="float64")
    x = activations(rng, shape, dtype, offset=1e7)
    bn.running_mean[...], bn.running_var[...] = 1e7 + rng.normal(size=5), 1.5
    check_renorm(bn, x, dy)


@pytest.mark.parametrize("dtype", TYPES, ids=type_id)
def test_renorm_that_is_batch_norm(rng, dtype):
    """At r_max = 1 and d_max = 0, and where the batch has the statistics that are tracked."""
    bn, x, dy = data(rng, Shape((8, 5, 4)), dtype, dtype="float64")
    first = nbbn.batch_norm_forward(x, eps=EPS)
    for bounds in ((1.0, 0.0), (3.0, 5.0)):
        one, other = copy.deepcopy(bn), copy.deepcopy(bn)
        one.renorm = nbbn.Renorm(*bounds)
        if bounds != (1.0, 0.0):
            for module in (one, other):
                module.running_mean[...], module.running_var[...] = first.mean, first.var
        assert_same_bits(one(x), other(x))
        assert_same_bits(one.backward(dy), other.backward(dy))
        assert_same_bits((one.grad_weight, one.grad_bias), (other.grad_weight, other.grad_bias))
        assert state_bits(one) == state_bits(other)


def test_renorm_gradient_by_differences(rng):
    """With r and d as they are at the step."""
    bn, x, dy = data(rng, Shape((4, 5, 2)), np.float64, renorm=nbbn.Renorm(1.5, 0.7), dtype="float64")
    r, d, _ = r_and_d(bn, x)
    out = bn(x)

    def loss():
        mean = x.mean(axis=(0, 2), keepdims=True)
        x_hat = (x - mean) / np.sqrt(((x - mean) ** 2).mean(axis=(0, 2), keepdims=True) + EPS)
        return (dy * (bn.weight[:, None] * (x_hat * r + d) + bn.bias[:, None])).sum()

    assert math.isclose(loss(), (dy * out).sum(), rel_tol=1e-10, abs_tol=1e-10)
    np.testing.assert_allclose(bn.backward(dy), differences(loss, x), **DIFFERENCES)
    np.testing.assert_allclose(bn.grad_weight, differences(loss, bn.weight), **DIFFERENCES)
    np.testing.assert_allclose(bn.grad_bias, differences(loss, bn.bias), **DIFFERENCES)


def test_renorm_is_off_in_evaluation_and_frozen(rng):
    bn, x, dy = data(rng, Shape((4, 5, 2)), np.float32, renorm=True)
    plain = nbbn.BatchNorm(5, eps=EPS)
    plain.load_state_dict(bn.state_dict())
    plain.eval()
    for mode in (lambda: bn.eval(), lambda: bn.freeze().train()):
        mode()
        assert_same_bits(bn(x), plain(x))
        assert_same_bits(bn.backward(dy), plain.backward(dy))
    bn.unfreeze().eval().use_running_stats = False
    assert_same_bits(bn(x), nbbn.batch_norm_forward(x, bn.weight, bn.bias, eps=EPS).out)


def test_renorm_bounds_are_raised(rng):
    """Between steps, as the paper has it."""
    bn, x, dy = data(rng, Shape((6, 5, 4)), np.float32, renorm=nbbn.Renorm(1.0, 0.0))
    for r_max, d_max in ((1.0, 0.0), (1.0, 0.5), (2.0, 0.5), (3.0, 5.0)):
        bn.r_max, bn.d_max = r_max, d_max
        assert bn.renorm == (r_max, d_max)
        check_renorm(bn, x, dy)
    for name, value, error in (
        ("r_max", 0.5, ValueError),
        ("r_max", math.inf, ValueError),
        ("r_max", "3", TypeError),
        ("d_max", -1, ValueError),
        ("d_max", None, TypeError),
    ):
        with pytest.raises(error, match=f"^{name} must be .*got"):
            setattr(bn, name, value)
        assert bn.renorm == (3.0, 5.0)
    plain = nbbn.BatchNorm(5)
    assert plain.r_max is plain.d_max is None
    with pytest.raises(ValueError, match=r"^d_max can only be set with renorm"):
        plain.d_max = 1.0


# --- virtual batches -------------------------------------------------------------------------------

# Samples on an axis, of how many values per channel, in parts of so many: what the parts are.
CUTS = [
    (Shape((7, 5, 2)), 2, [2, 2, 2, 1]),
    (Shape((6, 5, 4, 3)), 3, [3, 3]),
    (Shape((6, 5)), 2, [2, 2, 2]),
    (Shape((9, 5)), 3, [3, 3, 3]),
    (Shape((7, 5)), 3, [3, 4]),  # one value would have no variance
    (Shape((8, 5)), 3, [3, 3, 2]),
    (Shape((4, 5)), 9, [4]),
    (Shape((4, 5, 2)), 1, [1, 1, 1, 1]),
    (Shape((5, 4, 5), -1), 2, [2, 2, 1]),
    (Shape((5, 7, 3), 0), 3, [3, 3, 1]),
]


def split(x, shape, sizes):
    ends = np.cumsum(sizes)
    return np.split(x, ends[:-1], axis=1 if shape.axis == 0 else 0)


@pytest.mark.parametrize("dtype", TYPES, ids=type_id)
@pytest.mark.parametrize("momentum", [0.3, None, 0.0], ids=str)
@pytest.mark.parametrize("case", CUTS, ids=lambda case: f"{case[0]}-{case[1]}")
def test_virtual_batches(rng, case, dtype, momentum):
    """Parts are normalized, and tracked, as a module without the option does one after the other."""
    shape, size, sizes = case
    bn, x, dy = data(rng, shape, dtype, momentum=momentum)
    plain = copy.deepcopy(bn)
    bn.virtual_batch_size = size
    for layout in layouts(shape):
        x = layout(x)
        out, axis = bn(x), 1 if shape.axis == 0 else 0
        assert out.strides == np.empty_like(x).strides
        parts, gradients, weights = [], [], []
        for part, dy_part in zip(split(x, shape, sizes), split(dy, shape, sizes), strict=True):
            expected = reference.forward(part, bn.weight, bn.bias, eps=EPS, axis=shape.axis)
            parts.append(plain(part))
            tolerance = reference.out_tolerance(expected, dtype)
            assert_within("out", rows(parts[-1], shape.axis), expected.out, tolerance)
            gradients.append(plain.backward(dy_part))
            used = nbbn.batch_norm_forward(part, eps=EPS, axis=shape.axis)
            weights.append(
                nbbn.batch_norm_backward(
                    dy_part, part, bn.weight, mean=used.mean, invstd=used.invstd, axis=shape.axis
                )[1:]
            )
        assert_same_bits(out, np.concatenate(parts, axis))
        assert state_bits(bn) == state_bits(plain)
        assert_same_bits(bn.backward(dy), np.concatenate(gradients, axis))
        for name, values in zip(("grad_weight", "grad_bias"), zip(*weights, strict=True), strict=True):
            # Sums of few parts in float64, rounded once to float32.
            total = np.sum(values, axis=0)
            slack = 2.0**-50 * np.abs(values).sum(axis=0) + 2.0**-23 * np.abs(total)
            assert_within(name, getattr(bn, name), total, slack)


def test_virtual_batches_gradient_by_differences(rng):
    bn, x, dy = data(rng, Shape((5, 5, 2)), np.float64, virtual_batch_size=2, dtype="float64")
    out = bn(x)

    def loss():
        total = 0.0
        for part, dy_part in ((x[a:b], dy[a:b]) for a, b in ((0, 2), (2, 4), (4, 5))):
            mean = part.mean(axis=(0, 2), keepdims=True)
            x_hat = (part - mean) / np.sqrt(((part - mean) ** 2).mean(axis=(0, 2), keepdims=True) + EPS)
            total += (dy_part * (bn.weight[:, None] * x_hat + bn.bias[:, None])).sum()
        return total

    assert math.isclose(loss(), (dy * out).sum(), rel_tol=1e-10, abs_tol=1e-10)
    np.testing.assert_allclose(bn.backward(dy), differences(loss, x), **DIFFERENCES)
    np.testing.assert_allclose(bn.grad_weight, differences(loss, bn.weight), **DIFFERENCES)
    np.testing.assert_allclose(bn.grad_bias, differences(loss, bn.bias), **DIFFERENCES)


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_virtual_batches_are_off_in_evaluation(rng, tracked):
    bn, x, dy = data(rng, Shape((5, 5, 2)), np.float32, virtual_batch_size=2, track_running_stats=tracked)
    plain = nbbn.BatchNorm(5, eps=EPS, track_running_stats=tracked)
    plain.load_state_dict(bn.state_dict())
    assert_same_bits(bn.eval()(x), plain.eval()(x))
    assert_same_bits(bn.backward(dy), plain.backward(dy))
    # Without running statistics, training has virtual batches all the same.
    assert_same_bits(bn.train()(x)[:2], nbbn.batch_norm_forward(x[:2], bn.weight, bn.bias, eps=EPS).out)


def test_virtual_batches_of_too_few_values(rng):
    bn, x, _ = data(rng, Shape((4, 5)), np.float32, virtual_batch_size=1)
    before = state_bits(bn)
    with pytest.raises(ValueError, match=r"^virtual_batch_size must .*more than 1 value.*got 1 .*\(4, 5\)"):
        bn(x)
    bn.correction, bn.virtual_batch_size = 3.0, 3
    with pytest.raises(ValueError, match=r"^virtual_batch_size must .*more than 3 values"):
        bn(x)
    with pytest.raises(ValueError, match=r"^x must have more than one value per channel"):
        bn(x[:1])
    assert state_bits(bn) == before
    with pytest.raises(RuntimeError):
        bn.backward(x)
    # Nothing is corrected where nothing is tracked.
    bn(x, update_running_stats=False)
    assert state_bits(bn) == before


def test_virtual_batches_with_momentum_0(rng):
    """The running statistics keep their bits, whatever is in x."""
    bn, x, _ = data(rng, Shape((5, 5, 2)), np.float32, virtual_batch_size=2, momentum=0.0)
    x[0, 0, 0] = np.nan
    before = bits(bn.running_mean), bits(bn.running_var)
    bn(x)
    assert (bits(bn.running_mean), bits(bn.running_var)) == before
    assert bn.num_batches_tracked == 3


def test_virtual_batches_bad_grad_out(rng):
    bn, x, dy = data(rng, Shape((4, 5, 3)), np.float32, virtual_batch_size=2)
    bn(x)
    for bad, error in ((dy[:3], ValueError), (dy.astype(np.float64), TypeError), (None, TypeError)):
        with pytest.raises(error, match=r"^grad_out must"):
            bn.backward(bad)
    assert bn.grad_weight is None


# --- one value per channel -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=type_id)
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 4}], ids=str)
def test_one_value_with_the_running_statistics(rng, dtype, options):
    bn, x, dy = data(rng, Shape((3, 5)), dtype, single_value="running", **options)
    before = state_bits(bn)
    expected = reference.evaluate(x[:1], bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=EPS)
    out = bn(x[:1])
    assert_within("out", rows(out), expected.out, reference.out_tolerance(expected, dtype))
    grad_x = bn.backward(dy[:1])
    assert state_bits(bn) == before and bn.training
    plain = copy.deepcopy(bn).eval()
    plain(x[:1])
    assert_same_bits(grad_x, plain.backward(dy[:1]))
    assert_same_bits(bn.grad_weight, plain.grad_weight)
    bn(x[:2])  # two are a batch like any other
    assert bn.num_batches_tracked == 1
    bn(x[:0])
    assert bn.num_batches_tracked == 1


def test_one_value_is_an_error_by_default(rng):
    bn, x, _ = data(rng, Shape((3, 5)), np.float32, nonfinite="skip")
    before = state_bits(bn)
    with pytest.raises(ValueError, match=r"^x must have more than one value per channel in training"):
        bn(x[:1])
    assert state_bits(bn) == before


# --- batches that are not finite -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TYPES, ids=type_id)
@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 2}], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("nonfinite", ["propagate", "skip", "raise"])
def test_nonfinite(rng, nonfinite, bad, options, dtype):
    bn, x, dy = data(rng, Shape((6, 5, 2)), dtype, **options)
    plain = copy.deepcopy(bn)
    bn.nonfinite = nonfinite
    # A finite batch is one like any other.
    assert_same_bits(bn(x), plain(x))
    assert state_bits(bn) == state_bits(plain)
    before, saved = state_bits(bn), bits(bn.backward(dy))
    x = x.copy()
    x[3, 1, 1] = bad
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match=r"^x must have a finite mean and variance"):
            bn(x)
        assert state_bits(bn) == before
        assert bits(bn.backward(dy)) == saved
        return
    out, expected = bn(x), plain(x)
    assert_same_bits(out, expected)
    assert np.isnan(out[3, 1]).all() and np.isfinite(out[:, [0, 2, 3, 4]]).all()
    assert_same_bits(bn.backward(dy), plain.backward(dy))
    assert state_bits(bn) == (before if nonfinite == "skip" else state_bits(plain))


def test_nonfinite_in_the_type_of_the_statistics(rng):
    """float16 ends at 65504: a variance of 1e6 would be infinite there."""
    x = (1000 * rng.normal(size=(50, 5))).astype(np.float16)
    bn = nbbn.BatchNorm(5, dtype="float16", nonfinite="raise", momentum=1.0)
    with pytest.raises(FloatingPointError, match="float16"):
        bn(x)
    bn.nonfinite = "propagate"
    bn(x)
    assert np.isinf(bn.running_var).all()
    # The biased variance would do, by a hair, and what is tracked would not.
    bn = nbbn.BatchNorm(1, dtype="float16", nonfinite="skip", momentum=1.0)
    bn(np.array([[-200.0], [200.0]], np.float16))
    assert bn.num_batches_tracked == 0
    bn(np.array([[-150.0], [150.0]], np.float16))
    assert bn.num_batches_tracked == 1 and bn.running_var == 45000


def test_mean_that_is_not_finite_in_the_type_of_the_statistics():
    """The variance is 0."""
    bn = nbbn.BatchNorm(2, nonfinite="skip")
    bn(np.full((4, 2), 1e39))
    assert bn.num_batches_tracked == 0 and bn.running_mean.tolist() == [0, 0]


def test_nonfinite_where_nothing_is_updated(rng):
    bn, x, _ = data(rng, Shape((6, 5)), np.float32, nonfinite="raise")
    x[0, 0] = np.nan
    before = state_bits(bn)
    assert np.isnan(bn(x, update_running_stats=False)[:, 0]).all()
    assert np.isnan(bn.eval()(x)[0, 0])
    assert state_bits(bn) == before


# --- which statistics are used, and which updated --------------------------------------------------


def test_freeze(rng):
    bn, x, dy = data(rng, Shape((6, 5, 2)), np.float32)
    plain = copy.deepcopy(bn).eval()
    before = state_bits(bn)
    assert bn.freeze() is bn
    for mode in (True, False, True):
        bn.train(mode)
        assert bn.training is mode
        assert_same_bits(bn(x), plain(x))
        assert_same_bits(bn.backward(dy), plain.backward(dy))
        assert_same_bits((bn.grad_weight, bn.grad_bias), (plain.grad_weight, plain.grad_bias))
    assert_same_bits(bn(x[:1, :, :1]), plain(x[:1, :, :1]))  # one value per channel
    assert state_bits(bn) == before
    assert bn.unfreeze() is bn
    bn(x)
    assert bn.num_batches_tracked == 1
    assert bn.use_running_stats is bn.update_running_stats is None


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("update", [None, True, False], ids=str)
@pytest.mark.parametrize("use", [None, True, False], ids=str)
@pytest.mark.parametrize("per_call", [True, False], ids=["call", "module"])
def test_use_and_update(rng, use, update, mode, per_call):
    """All combinations, of which the plain modes are two."""
    bn, x, dy = data(rng, Shape((6, 5, 2)), np.float32, use_running_stats=use)
    trained = nbbn.BatchNorm(5, eps=EPS)
    trained.load_state_dict(bn.state_dict())
    evaluated = copy.deepcopy(trained).eval()
    before = state_bits(bn)
    like = evaluated if (not mode if use is None else use) else trained
    call = {"update_running_stats": update} if per_call else {}
    if not per_call:
        bn.update_running_stats = update
    assert_same_bits(bn.train(mode)(x, **call), like(x))
    assert_same_bits(bn.backward(dy), like.backward(dy))
    trained.train()(x) if like is evaluated else None
    assert state_bits(bn) == (state_bits(trained) if (mode if update is None else update) else before)


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 4}, {"nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("order", [(None, False), (False, None), (False, False)], ids=str)
def test_recomputation(rng, options, order):
    """Of two passes over the same x one may leave the statistics alone, and either is the other's equal."""
    bn, x, dy = data(rng, Shape((6, 5, 2)), np.float32, **options)
    passes = [(bits(bn(x, update_running_stats=update)), bits(bn.backward(dy))) for update in order]
    assert passes[0] == passes[1]
    parts = 2 if "virtual_batch_size" in options else 1
    assert bn.num_batches_tracked == (parts if None in order else 0)


def test_recomputation_with_renorm(rng):
    """r and d are of the statistics of before: the second pass is the one that updates them."""
    bn, x, dy = data(rng, Shape((6, 5, 2)), np.float32, renorm=True)
    passes = [(bits(bn(x, update_running_stats=update)), bits(bn.backward(dy))) for update in (False, None)]
    assert passes[0] == passes[1]
    assert bn.num_batches_tracked == 1


# --- what all options have in common ---------------------------------------------------------------

ALL = [
    {"renorm": nbbn.Renorm(2.0, 1.5)},
    {"virtual_batch_size": 2},
    {"single_value": "running"},
    {"nonfinite": "skip"},
    {"nonfinite": "raise", "virtual_batch_size": 3},
    {"use_running_stats": True, "update_running_stats": False},
    {"use_running_stats": True, "update_running_stats": True},
]


@pytest.mark.parametrize("options", ALL, ids=str)
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
def test_copies_and_repr(rng, options, duplicate):
    bn, x, dy = data(rng, Shape((7, 5, 2)), np.float32, **options)
    assert list(bn.state_dict()) == KEYS
    text = ", ".join(f"{name}={value!r}" for name, value in options.items())
    assert sorted(re.findall(r"\w+=", text)) == sorted(re.findall(r"\w+=", repr(bn).partition("'cpu', ")[2]))
    assert all(f"{name}={value!r}" in repr(bn) for name, value in options.items())
    bn(x)
    apart, twin = copy.deepcopy(bn), duplicate(bn)
    for name in (*options, "r_max", "d_max"):
        assert getattr(twin, name) == getattr(bn, name)
    with pytest.raises(RuntimeError):  # what a call leaves for backward is not copied
        twin.backward(dy)
    assert_same_bits(twin(x), apart(x))
    assert_same_bits(twin.backward(dy), apart.backward(dy))


def test_defaults_are_no_options():
    """A module whose options were set and set back is as fast as one that never had any."""
    bn = nbbn.BatchNorm(5)
    assert bn._options is None and "renorm" not in repr(bn)
    bn.renorm = True
    assert bn.renorm == (3.0, 5.0)
    bn.renorm = False
    bn.freeze().unfreeze()
    bn.nonfinite = "skip"
    bn.nonfinite = "propagate"
    assert bn._options is None


BAD = [
    ("renorm", "yes", TypeError, r"True, False or an nbbn\.Renorm, got str"),
    ("renorm", (3.0, 5.0), TypeError, r"True, False or an nbbn\.Renorm, got tuple"),
    ("renorm", None, TypeError, "got NoneType"),
    ("virtual_batch_size", 0, ValueError, "at least 1, got 0"),
    ("virtual_batch_size", 2.0, TypeError, "an int, got float"),
    ("virtual_batch_size", True, TypeError, "an int, got bool"),
    ("single_value", "skip", ValueError, "one of 'error', 'running', got 'skip'"),
    ("single_value", None, TypeError, "a str, got NoneType"),
    ("nonfinite", "ignore", ValueError, "one of 'propagate', 'skip', 'raise', got 'ignore'"),
    ("nonfinite", True, TypeError, "a str, got bool"),
    ("use_running_stats", "no", TypeError, "None, True or False, got str"),
    ("update_running_stats", 1, TypeError, "None, True or False, got int"),
]


@pytest.mark.parametrize("name, value, error, says", BAD)
def test_bad_options(name, value, error, says):
    with pytest.raises(error, match=f"^{name} must be .*{says}"):
        nbbn.BatchNorm(5, **{name: value})
    bn = nbbn.BatchNorm(5)
    with pytest.raises(error, match=f"^{name} must be .*{says}"):
        setattr(bn, name, value)
    assert bn._options is None


def test_bad_bounds():
    with pytest.raises(ValueError, match=r"^r_max must be at least 1 .*got 0\.5"):
        nbbn.BatchNorm(5, renorm=nbbn.Renorm(r_max=0.5))
    with pytest.raises(TypeError, match=r"^d_max must be a number, got str"):
        nbbn.BatchNorm(5, renorm=nbbn.Renorm(d_max="5"))


@pytest.mark.parametrize(
    "option",
    [{"renorm": True}, {"single_value": "running"}, {"nonfinite": "skip"}, {"nonfinite": "raise"},
     {"use_running_stats": True}, {"update_running_stats": True}],
    ids=str,
)  # fmt: skip
def test_options_that_need_running_statistics(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name} must be .*track_running_stats=False"):
        nbbn.BatchNorm(5, track_running_stats=False, **option)


def test_options_that_do_not_go_together(rng):
    with pytest.raises(ValueError, match=r"^virtual_batch_size must be None with renorm"):
        nbbn.BatchNorm(5, renorm=True, virtual_batch_size=2)
    bn = nbbn.BatchNorm(5, renorm=True)
    with pytest.raises(ValueError, match=r"^virtual_batch_size must be None with renorm"):
        bn.virtual_batch_size = 2
    assert bn.virtual_batch_size is None and bn.renorm
    untracked = nbbn.BatchNorm(5, track_running_stats=False, use_running_stats=False)
    with pytest.raises(ValueError, match=r"^freeze needs running statistics"):
        untracked.freeze()
    x = rng.normal(size=(4, 5))
    with pytest.raises(ValueError, match=r"^update_running_stats must be False or None without"):
        untracked(x, update_running_stats=True)
    with pytest.raises(TypeError, match=r"^update_running_stats must be"):
        bn(x, update_running_stats="no")
    untracked(x, update_running_stats=False)
    assert bn.num_batches_tracked == 0


@pytest.mark.parametrize("options", ALL, ids=str)
def test_bad_calls_change_nothing(rng, options):
    bn, x, _ = data(rng, Shape((6, 5, 2)), np.float32, **options)
    before = state_bits(bn)
    for bad, error in (
        (x.astype(np.int32), TypeError),
        (None, TypeError),
        (x[:, :4], ValueError),
        (x[0, :, 0], ValueError),
        (np.ma.masked_array(x), TypeError),
    ):
        with pytest.raises(error, match=r"^x must"):
            bn(bad)
    if bn.update_running_stats is not False:
        for name in ("running_mean", "running_var"):
            getattr(bn, name).flags.writeable = False
            with pytest.raises(ValueError, match=f"^{name} must be writable"):
                bn(x)
            getattr(bn, name).flags.writeable = True
        apart, bn.running_var = bn.running_var, bn.running_mean
        with pytest.raises(ValueError, match=r"^running_var must not overlap running_mean"):
            bn(x)
        bn.running_var = apart
    assert state_bits(bn) == before


@pytest.mark.parametrize("options", ALL, ids=str)
def test_empty_batch(options):
    bn = nbbn.BatchNorm(5, **options)
    before = state_bits(bn)
    empty = np.empty((0, 5, 2), np.float32)
    assert bn(empty).shape == bn.backward(empty).shape == (0, 5, 2)
    assert bn.grad_weight.tolist() == [0] * 5
    assert state_bits(bn) == before


@pytest.mark.parametrize("options", ALL, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_tensors(rng, options, dtype):
    """As NumPy's arrays: the same numbers, in tensors, for views of any strides."""
    torch = pytest.importorskip("torch")
    bn, x, dy = data(rng, Shape((7, 5, 4, 3)), np.float32, **options)
    twin = copy.deepcopy(bn)
    tensor = torch.from_numpy(x).to(getattr(torch, dtype)).to(memory_format=torch.channels_last)
    grad_out = torch.from_numpy(dy).to(tensor.dtype)
    out, grad_x = bn(tensor), bn.backward(grad_out)
    assert type(out) is type(grad_x) is torch.Tensor
    assert (out.stride(), out.dtype) == (tensor.stride(), tensor.dtype)
    if dtype == "bfloat16":
        import ml_dtypes

        on_host = [
            t.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            for t in (tensor, grad_out, out, grad_x)
        ]
    else:
        on_host = [t.numpy() for t in (tensor, grad_out, out, grad_x)]
    expected = twin(channels_last(np.ascontiguousarray(on_host[0])))
    assert_same_bits(on_host[2], expected)
    assert_same_bits(on_host[3], twin.backward(on_host[1]))
    assert state_bits(bn) == state_bits(twin)


INTERRUPTED = """
def option(**options):
    def make_call():
        bn = nbbn.BatchNorm(C, **options)
        return lambda: bn(x), [bn.running_mean, bn.running_var, bn.num_batches_tracked]
    make_call.__name__ = str(options)
    return make_call

make((4, 6, 5, 7))
CALLS = [
    option(virtual_batch_size=2),
    option(renorm=True),
    option(nonfinite="skip"),
    option(use_running_stats=True, update_running_stats=True),
]
memory.SMALLEST = 1
LIMIT = 8 * 8192
nbbn.set_recycling(LIMIT)
try_all()
"""


def test_interrupt_at_every_point(python, seed):
    """State is whole wherever an exception comes from a signal's handler."""
    code = at_points(POINTS.partition("\nmake(")[0], seed, 1) + INTERRUPTED
    python(code, timeout=300, NUMBA_NUM_THREADS="1")


# --- on a GPU --------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
@pytest.mark.parametrize("kind", ["CupyArray", "Tensor", "NumbaArray"])
@pytest.mark.parametrize("options", ALL, ids=str)
def test_on_a_gpu(rng, monkeypatch, options, kind):
    """The same as on the CPU, bit by bit: here the kernels are the same."""
    import gpus
    from nbbn.dispatch import find

    kind = getattr(gpus, kind)
    find.cache_clear()
    device = gpus.Gpus(monkeypatch)
    cpu, x, dy = data(rng, Shape((7, 5, 4)), np.float32, **options)
    bn = copy.deepcopy(cpu).to("cuda:1")
    columns = bn.running_mean, bn.running_var
    for mode in (True, True, False):
        out = bn.train(mode)(device.array(kind, x, 1))
        assert type(out) is kind
        assert_same_bits(out.get(), cpu.train(mode)(x))
        assert_same_bits(bn.backward(device.array(kind, dy, 1)).get(), cpu.backward(dy))
        for name in ("grad_weight", "grad_bias"):
            # Parts are added in another order.
            np.testing.assert_allclose(getattr(bn, name).get(), getattr(cpu, name), rtol=1e-6, atol=1e-6)
        assert state_bits(bn) == state_bits(cpu)
    assert (bn.running_mean, bn.running_var) == columns
    with pytest.raises(nbbn.DeviceError, match=r"x is on cuda:0, .*weight is on cuda:1"):
        bn.train()(device.array(kind, x, 0))
    find.cache_clear()


def test_in_the_emulator(python):
    """With the kernels that a GPU runs, emulated."""
    pytest.importorskip("greenlet")
    program = """
import simulated, numpy as np, nbbn
from numba import cuda
simulated.emulate(1)
rng = np.random.default_rng(1)
x, dy = rng.normal(size=(2, 5, 3, 2)).astype(np.float32)
bad = x.copy()
bad[0, 1, 0] = np.nan
for options in (
    {"renorm": nbbn.Renorm(1.2, 0.1)},
    {"virtual_batch_size": 2},
    {"single_value": "running"},
    {"nonfinite": "skip"},
    {"nonfinite": "raise"},
    {"use_running_stats": True, "update_running_stats": False},
    {"use_running_stats": True, "update_running_stats": True},
):
    one, other = nbbn.BatchNorm(3, device="cuda", **options), nbbn.BatchNorm(3, **options)
    for array in (x, x[:1, :, :1].copy(), bad):
        results = []
        for bn, put in ((one, cuda.to_device), (other, np.copy)):
            grad_out = dy[: array.shape[0], :, : array.shape[2]].copy()
            try:
                found = [bn(put(array)), bn.backward(put(grad_out)), bn.grad_weight, bn.grad_bias]
                found = [a.copy_to_host() if bn is one else a for a in found]
                error = None
            except (ValueError, FloatingPointError) as caught:
                found, error = [], str(caught)
            results.append((error, [*found, *bn.state_dict().values()]))
        assert results[0][0] == results[1][0], results
        for actual, expected in zip(results[0][1], results[1][1], strict=True):
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    print(int(one.num_batches_tracked))
"""
    counted = python(program, NUMBA_ENABLE_CUDASIM="1").split()
    assert counted == ["2", "6", "2", "1", "1", "0", "2"]
