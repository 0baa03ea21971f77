"""The oracle itself, against programs that share nothing with it: mpmath, and PyTorch in float64."""

import math

import mpmath
import numpy as np
import pytest

import reference
from cases import DTYPES, Shape, activations, parameter, type_id
from twofold import Twofold

TINY = 2.0**-98
"""What a few operations on numbers of 106 bits may lose, relative to |x| / deviation, with room."""


@pytest.fixture
def mp():
    with mpmath.workprec(400):
        yield mpmath


def exact(mp, value):
    """A Twofold of one element as an mpf."""
    return mp.mpf(float(value.hi)) + mp.mpf(float(value.lo))


@pytest.mark.parametrize("magnitude", [1e-30, 1.0, 1e30])
def test_twofold_operations(rng, mp, magnitude):
    a, b = (
        Twofold(v, v * 2.0**-54 * rng.uniform(-1, 1, 40))
        for v in rng.uniform(0.1, 1.0, (2, 40)) * magnitude * rng.choice([-1, 1], (2, 40))
    )
    for name, result in (
        ("a + b", a + b),
        ("a - b", a - b),
        ("a * b", a * b),
        ("a / b", a / b),
        ("mp.sqrt(abs(a))", abs(a).sqrt()),
        ("3 - a", 3.0 - a),
        ("1 / a", 1.0 / a),
    ):
        for i in range(40):
            values = {"a": exact(mp, Twofold(a.hi[i], a.lo[i]))}
            values["b"] = exact(mp, Twofold(b.hi[i], b.lo[i]))
            expected = eval(name, {"mp": mp}, values)
            scale = abs(expected) + (abs(values["a"]) + abs(values["b"])) * ("-" in name or "+" in name)
            error = abs(exact(mp, Twofold(result.hi[i], result.lo[i])) - expected)
            assert error <= scale * 2.0**-100, name


def test_row_sums_are_exact_where_floats_are_not(mp):
    values = np.array([[1e16, 1.0, -1e16, 1e-20], [1.0, 1e100, 1.0, -1e100]])
    sums = Twofold(values).row_sums()
    assert sums.hi.tolist() == [[1.0], [2.0]]
    assert sums.lo.tolist() == [[1e-20], [0.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_oracle_against_mpmath(rng, mp, dtype, offset):
    shape = Shape((4, 2, 5))
    x, dy = activations(rng, shape, dtype, offset), activations(rng, shape, dtype)
    weight, bias = parameter(rng, 2, dtype), parameter(rng, 2, np.float64)
    forward = reference.forward(x, weight, bias)
    backward = reference.backward(dy, x, weight, mean=forward.mean, invstd=forward.invstd)
    for c in range(2):
        values = [mp.mpf(float(v)) for v in x[:, c].ravel()]
        grads = [mp.mpf(float(v)) for v in dy[:, c].ravel()]
        gamma, beta, m = mp.mpf(float(weight[c])), mp.mpf(float(bias[c])), len(values)
        mean = sum(values) / m
        var = sum((v - mean) ** 2 for v in values) / m
        s = mp.sqrt(var + mp.mpf(1e-5))
        x_hat = [(v - mean) / s for v in values]
        grad_bias, grad_weight = sum(grads), sum(g * h for g, h in zip(grads, x_hat, strict=True))
        out = [gamma * h + beta for h in x_hat]
        grads_of_x = zip(grads, x_hat, strict=True)
        grad_x = [gamma / s * (g - grad_bias / m - h * grad_weight / m) for g, h in grads_of_x]
        for actual, expected, scale in (
            (forward.mean, [mean], offset + 1),
            (forward.var, [var], 1),
            (forward.invstd, [1 / s], 1),
            (forward.out, out, 10 * (offset + 1)),
            (backward.bias, [grad_bias], m),
            (backward.weight, [grad_weight], m * (offset + 1)),
            (backward.x, grad_x, 10 * (offset + 1)),
        ):
            for hi, lo, value in zip(actual.hi[c], actual.lo[c], expected, strict=True):
                assert abs(exact(mp, Twofold(hi, lo)) - value) <= scale * TINY


def test_oracle_against_torch(rng):
    torch = pytest.importorskip("torch")
    shape = Shape((3, 4, 5, 2))
    x, dy = activations(rng, shape, np.float64), activations(rng, shape, np.float64)
    weight, bias = parameter(rng, 4, np.float64), parameter(rng, 4, np.float64)
    mean, var = rng.normal(size=4), rng.uniform(1, 2, 4)
    for training in (True, False):
        tx, tw, tb = (torch.tensor(v, requires_grad=True) for v in (x, weight, bias))
        tm, tv = torch.tensor(mean), torch.tensor(var)
        out = torch.nn.functional.batch_norm(tx, tm, tv, tw, tb, training, 0.3, 1e-3)
        out.backward(torch.tensor(dy))
        if training:
            forward = reference.forward(x, weight, bias, eps=1e-3)
            unbiased = reference.unbiased(forward.var, forward.count)
            for new, old, actual in ((forward.mean, mean, tm), (unbiased, var, tv)):
                expected = reference.running(old, new, 0.3).rounded()[:, 0]
                np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-13)
        else:
            forward = reference.evaluate(x, mean, var, weight, bias, eps=1e-3)
        backward = reference.backward(
            dy, x, weight, mean=forward.mean, invstd=forward.invstd, training=training
        )
        # PyTorch's own rounding, over 30 values a channel.
        for actual, expected in (
            (out.detach().numpy(), forward.out),
            (tx.grad.numpy(), backward.x),
        ):
            np.testing.assert_allclose(reference.rows(actual), expected.rounded(), rtol=1e-11, atol=1e-12)
        for actual, expected in ((tw.grad, backward.weight), (tb.grad, backward.bias)):
            np.testing.assert_allclose(actual.numpy(), expected.rounded()[:, 0], rtol=1e-11)


def test_tolerances_scale_with_the_type():
    x = np.arange(12.0).reshape(3, 2, 2)
    expected = reference.forward(x)
    assert reference.depth(expected.count) == 4 + math.log2(6)
    ratio = reference.out_tolerance(expected, np.float32) / reference.out_tolerance(expected, np.float64)
    np.testing.assert_allclose(ratio, 2.0**29, rtol=1e-12)  # what the mean is known to does not scale


def test_one_unit_in_the_last_place_of_float16(rng):
    """The nearest number and its neighbours are within, and the ones after those are not."""
    values = np.concatenate([rng.normal(size=300), 2.0 ** rng.integers(-24, 15, 100), [0.0, 6e-8, 60000.0]])
    values[:300] *= 10.0 ** rng.integers(-7, 5, 300)
    values = values[np.abs(values) < 6e4]
    exact = Twofold(values)
    tolerance = reference.ulp_tolerance(exact, np.float16)
    nearest = values.astype(np.float16)
    for direction in (np.float16(np.inf), np.float16(-np.inf)):
        neighbour = np.nextafter(nearest, direction)
        second = np.nextafter(neighbour, direction)
        assert (exact.distance(neighbour) <= tolerance).all()
        # Below a power of two the steps are half as large: a second that lies there may be one unit away.
        smaller = (np.frexp(np.abs(nearest))[0] == 0.5) | (np.frexp(np.abs(neighbour))[0] == 0.5)
        beyond = exact.distance(second) > tolerance
        assert (beyond | smaller).all()
    assert reference.ulp_tolerance(Twofold([1e6]), np.float16) == np.inf
