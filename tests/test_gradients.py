"""Gradients against differences of the function itself, in float64.

The loss is Σ cotangent · out with a random cotangent: the sum of the outputs would not do, its gradient
is zero whatever is computed.
"""

import numpy as np
import pytest

import nbbn
from cases import LAYOUTS, Shape, activations

STEP = 1e-4
# A central difference of fourth order: errors of step⁴ · f⁽⁵⁾ = 1e-16 · 10⁴ and of u · |loss| / step =
# 1e-16 · 100 / 1e-4. Both stay below 1e-9 for these sizes, where a gradient is of size 1.
TOLERANCE = 1e-8


def difference(loss, values, index):
    """Return ∂loss/∂values[index], to fourth order."""
    kept = values[index]
    at = []
    for step in (-2, -1, 1, 2):
        values[index] = kept + step * STEP
        at.append(loss())
    values[index] = kept
    return (at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * STEP)


def assert_gradient(loss, values, gradient, rng, places=40):
    """Hold a gradient against differences, everywhere or in random places."""
    indices = list(np.ndindex(values.shape))
    if len(indices) > places:
        indices = [indices[i] for i in rng.choice(len(indices), places, replace=False)]
    for index in indices:
        expected = difference(loss, values, index)
        assert abs(gradient[index] - expected) <= TOLERANCE * (1 + abs(expected)), index


SHAPES = [
    Shape((2, 3)),
    Shape((3, 2)),
    Shape((1, 2, 3)),
    Shape((4, 3, 5)),
    Shape((2, 3, 4, 5)),
    Shape((3, 4, 18), -1),
    Shape((17, 5), 0),
]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_training(rng, shape, eps, affine):
    # At least this far apart, so that two values in a channel are no near-singular case.
    x = (
        activations(rng, shape, np.float64)
        + 3 * rng.permutation(shape.count * shape.channels).reshape(shape.dims) / shape.count
    )
    cotangent = rng.normal(size=shape.dims)
    weight, bias = rng.normal(size=(2, shape.channels)) if affine else (None, None)

    def loss():
        out = nbbn.batch_norm_forward(x, weight, bias, eps=eps, axis=shape.axis).out
        return float((cotangent * out).sum())

    forward = nbbn.batch_norm_forward(x, weight, bias, eps=eps, axis=shape.axis)
    gradients = nbbn.batch_norm_backward(
        cotangent, x, weight, mean=forward.mean, invstd=forward.invstd, axis=shape.axis
    )
    assert_gradient(loss, x, gradients.x, rng)
    if affine:
        assert_gradient(loss, weight, gradients.weight, rng)
        assert_gradient(loss, bias, gradients.bias, rng)


@pytest.mark.parametrize("shape", [*SHAPES, Shape((1, 4))], ids=str)
def test_evaluation(rng, shape):
    x, cotangent = activations(rng, shape, np.float64), rng.normal(size=shape.dims)
    weight, bias, mean = rng.normal(size=(3, shape.channels))
    var, eps = rng.uniform(0.5, 2, shape.channels), 1e-3

    def loss():
        out = nbbn.batch_norm(x, mean, var, weight, bias, eps=eps, axis=shape.axis)
        return float((cotangent * out).sum())

    gradients = nbbn.batch_norm_backward(
        cotangent, x, weight, mean=mean, invstd=1 / np.sqrt(var + eps), axis=shape.axis, training=False
    )
    for values, gradient in ((x, gradients.x), (weight, gradients.weight), (bias, gradients.bias)):
        assert_gradient(loss, values, gradient, rng)


@pytest.mark.parametrize("layout", ["channels_last", "fortran", "every_second", "reversed"])
def test_other_layouts(rng, layout):
    x = LAYOUTS[layout](activations(rng, Shape((3, 4, 5, 6)), np.float64))
    cotangent = rng.normal(size=x.shape)
    weight = rng.normal(size=4)

    def loss():
        return float((cotangent * nbbn.batch_norm_forward(x, weight).out).sum())

    forward = nbbn.batch_norm_forward(x, weight)
    gradients = nbbn.batch_norm_backward(cotangent, x, weight, mean=forward.mean, invstd=forward.invstd)
    assert_gradient(loss, x, gradients.x, rng)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_module(rng, training):
    """In float64, through bn(x) and bn.backward, with a loss that is not linear in the output."""
    bn = nbbn.BatchNorm(3, dtype="float64", momentum=0.0, eps=0.01).train(training)
    bn.weight[...], bn.bias[...], bn.running_mean[...] = rng.normal(size=(3, 3))
    x, cotangent = activations(rng, Shape((5, 3, 4)), np.float64), rng.normal(size=(5, 3, 4))

    def loss():
        return float((cotangent * np.tanh(bn(x))).sum())

    out = bn(x)
    grad_x = bn.backward(cotangent * (1 - np.tanh(out) ** 2))
    gradients = grad_x, bn.grad_weight.copy(), bn.grad_bias.copy()
    for values, gradient in zip((x, bn.weight, bn.bias), gradients, strict=True):
        assert_gradient(loss, values, gradient, rng)


def test_two_layers(rng):
    """The gradient of one is the cotangent of the other."""
    first, second = (nbbn.BatchNorm(4, dtype="float64") for _ in range(2))
    x, cotangent = activations(rng, Shape((6, 4, 3)), np.float64), rng.normal(size=(6, 4, 3))
    # None near zero: behind the maximum hardly a value would differ from the others, and the loss curves so
    # much there that differences are off by more than the gradient is.
    first.weight[...], second.weight[...] = rng.uniform(0.5, 2, (2, 4)) * rng.choice([-1, 1], (2, 4))

    def loss():
        return float((cotangent * second(np.maximum(first(x), 0.1) * 2)).sum())

    hidden = first(x)
    second(np.maximum(hidden, 0.1) * 2)
    grad_x = first.backward(2 * second.backward(cotangent) * (hidden > 0.1))
    weight = first.grad_weight.copy()
    # The kink of the maximum: where a value lies within a few steps of it, no difference is right.
    assert (np.abs(hidden - 0.1) > 1e-2).mean() > 0.9
    near = (np.abs(hidden - 0.1) < 1e-2).any(axis=(0, 2))
    for c in np.flatnonzero(~near):
        assert_gradient(loss, x[:, c], grad_x[:, c], rng, places=8)
        assert_gradient(loss, first.weight[c : c + 1], weight[c : c + 1], rng)
