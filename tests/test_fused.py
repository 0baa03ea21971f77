"""Activations and residuals in the same pass: values, gradients, bits, memory, errors, and the module.

The oracle applies each activation in float64, from its definition, to what the oracle of batch normalization
returns, and differentiates it by hand.
"""

import itertools
import math
import pickle

import ml_dtypes
import mpmath
import numpy as np
import pytest

import nbbn
import reference
from cases import LAYOUTS, Shape, activations, columns_for, running_statistics
from checks import assert_same_bits, assert_within, bits, unchanged
from reference import rows
from test_gradients import assert_gradient
from twofold import Twofold

SLOPE = 0.2
BFLOAT16 = ml_dtypes.bfloat16


def _sigmoid(z):
    return np.where(z >= 0, 1 / (1 + np.exp(-np.abs(z))), 1 - 1 / (1 + np.exp(-np.abs(z))))


_erfc = np.vectorize(math.erfc, otypes=[float])


def _phi(z):
    return np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def _inner(z):
    return 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


def _gelu_tanh_gradient(z):
    s = _sigmoid(_inner(z))
    return s + z * s * (1 - s) * 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)


# Each activation with its derivative.
ORACLE = {
    None: (lambda z: z, np.ones_like),
    "relu": (lambda z: np.maximum(z, 0), lambda z: np.where(z > 0, 1.0, 0.0)),
    "leaky_relu": (lambda z: np.where(z > 0, z, SLOPE * z), lambda z: np.where(z > 0, 1.0, SLOPE)),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
    "gelu": (
        lambda z: z * _erfc(-z / math.sqrt(2)) / 2,
        lambda z: _erfc(-z / math.sqrt(2)) / 2 + z * _phi(z),
    ),
    "gelu_tanh": (lambda z: z * _sigmoid(_inner(z)), _gelu_tanh_gradient),
}
STEEPEST = 1.13  # |derivative| is nowhere more; the second derivative is at most 1.1 in absolute value

# Every activation, every type, with a residual and without; each is a kernel to compile.
KINDS = [
    (np.float32, "relu", False),
    (np.float32, "relu", True),
    (np.float32, "leaky_relu", False),
    (np.float32, "silu", False),
    (np.float32, "gelu", True),
    (np.float32, "gelu_tanh", False),
    (np.float32, None, True),
    (np.float64, "leaky_relu", True),
    (np.float64, "silu", True),
    (np.float64, "gelu", False),
    (np.float64, "gelu_tanh", True),
    (np.float16, "relu", True),
    (np.float16, "gelu", False),
    (BFLOAT16, "relu", False),
    (BFLOAT16, "silu", True),
]
SHAPES = [
    Shape((2, 3)),
    Shape((3, 3)),
    Shape((1, 5, 2)),
    Shape((2, 1, 1, 1)),
    Shape((33, 17)),
    Shape((3, 17, 1, 3), axis=-1),
    Shape((4, 3, 50)),
    Shape((4, 3, 50), axis=0),
    Shape((2, 5, 23, 29)),
    Shape((2, 3, 1301)),
    Shape((37, 130)),
]


def kind_id(kind):
    dtype, activation, residual = kind
    return f"{np.dtype(dtype).name}-{activation}{'+residual' if residual else ''}"


kinds = pytest.mark.parametrize("kind", KINDS, ids=kind_id)


def _layouts():
    """Layouts that can be written, one after the other, for ever."""
    return itertools.cycle(LAYOUTS.values())


def _problem(rng, kind, shape, layouts):
    """Return x, grad_out, weight, bias and the arguments of what follows."""
    dtype, activation, with_residual = kind
    x, grad_out = (next(layouts)(activations(rng, shape, dtype)) for _ in range(2))
    kinds_of_columns = [t for t in columns_for(dtype) if t is not None]
    weight, bias = (
        rng.normal(size=shape.channels).astype(kinds_of_columns[rng.integers(len(kinds_of_columns))])
        for _ in range(2)
    )
    given = {"activation": activation, "negative_slope": SLOPE, "axis": shape.axis}
    if with_residual:
        given["residual"] = next(layouts)(activations(rng, shape, dtype))
    return x, grad_out, weight, bias, given


def _argument(expected, given, axis):
    """Return z in float64, as (C, m), and how far off nbbn's may be where it is of type `dtype`."""
    z = expected.out.rounded()
    if "residual" in given:
        z = z + rows(given["residual"], axis).astype(np.float64)
    return z


def _z_tolerance(expected, given, axis, dtype):
    """How far z may be off before it is rounded to 16 bits, if it is: the arithmetic is float32's."""
    wide = np.float32 if reference.is_half(dtype) else dtype
    tolerance = reference.out_tolerance(expected, wide)
    if "residual" in given:
        size = np.abs(rows(given["residual"], axis).astype(np.float64)) + np.abs(expected.out.rounded())
        tolerance = tolerance + 2 * reference.unit(wide) * size
    return tolerance


def _check_out(out, expected, given, axis, dtype):
    apply, _ = ORACLE[given["activation"]]
    z = _argument(expected, given, axis)
    result = apply(z)
    # z's error goes through the activation; that itself is good to a few units of the type computed with,
    # and what is stored is rounded once more. The oracle's own tails are good to 1e-16 of z.
    wide = np.float32 if reference.is_half(dtype) else dtype
    tolerance = STEEPEST * _z_tolerance(expected, given, axis, dtype) + 1e-15 * (1 + np.abs(z))
    tolerance = tolerance + 6 * reference.unit(wide) * np.abs(result)
    tolerance = tolerance + reference.ulp_tolerance(Twofold.of(result), dtype)
    assert_within("out", rows(out, axis), result, tolerance)


def _at_kinks(z, tolerance, activation):
    """Where it is not known whether z is above 0."""
    return (np.abs(z) <= 4 * tolerance) if activation in ("relu", "leaky_relu") else np.zeros(z.shape, bool)


def _check_gradients(gradients, x, grad_out, weight, bias, mean, invstd, given, training, dtype):
    axis = given["axis"]
    channels = x.shape[axis]
    ones = reference.column(None, 1.0, channels)
    with np.errstate(all="ignore"):
        scale = reference.column(weight, 1.0, channels) * reference.column(invstd, 1.0, channels)
        x_hat = rows(x, axis).astype(np.float64) - reference.column(mean, 0.0, channels)
        z = x_hat * scale + reference.column(bias, 0.0, channels)
    wide = np.float32 if reference.is_half(dtype) else dtype
    size = np.abs(x_hat * scale) + np.abs(reference.column(bias, 0.0, channels)) + np.abs(z)
    if "residual" in given:
        residual = rows(given["residual"], axis).astype(np.float64)
        z, size = z + residual, size + np.abs(residual) + np.abs(z + residual)
    z_error = 8 * reference.unit(wide) * size
    dy = rows(grad_out, axis).astype(np.float64)
    slope = ORACLE[given["activation"]][1](z)
    incoming = dy * slope
    error = np.abs(dy) * (STEEPEST * z_error + 8 * reference.unit(wide))
    undecided = _at_kinks(z, z_error, given["activation"])
    if "residual" in given:
        kept = rows(gradients.residual, axis).astype(np.float64)
        tolerance = error + reference.ulp_tolerance(Twofold.of(incoming), dtype) + undecided * np.abs(dy)
        assert_within("grad_residual", kept, incoming, tolerance)
        incoming, error = kept, 0.0 * error  # grad_x is that of what was stored, to the bit: see below
        undecided = np.zeros_like(undecided)
    error = error + undecided * np.abs(dy)
    like = np.moveaxis(incoming.reshape(np.moveaxis(x, axis, 0).shape), 0, axis)
    expected = reference.backward(like, x, weight, mean=mean, invstd=invstd, axis=axis, training=training)
    hat = np.abs(expected.x_hat.rounded())
    sums = error.sum(axis=1, keepdims=True), (error * hat).sum(axis=1, keepdims=True)
    tolerance = reference.grad_bias_tolerance(expected, dtype) + sums[0]
    assert_within("grad_bias", gradients.bias[:, None], expected.bias, tolerance)
    tolerance = reference.grad_weight_tolerance(expected, dtype) + sums[1]
    assert_within("grad_weight", gradients.weight[:, None], expected.weight, tolerance)
    tolerance = reference.grad_x_tolerance(expected, dtype)
    through = error + (sums[0] + hat * sums[1]) / expected.count * training
    assert_within("grad_x", rows(gradients.x, axis), expected.x, tolerance + np.abs(scale * ones) * through)


@kinds
def test_training(rng, kind):
    layouts = _layouts()
    for shape in SHAPES:
        x, grad_out, weight, bias, given = _problem(rng, kind, shape, layouts)
        expected = reference.forward(x, weight, bias, axis=shape.axis)
        out = next(layouts)(np.full(shape.dims, np.nan, kind[0]))
        inputs = x, grad_out, weight, bias, given.get("residual")
        with unchanged(*inputs):
            result = nbbn.batch_norm_forward(x, weight, bias, out=out, **given)
        assert result.out is out
        _check_out(out, expected, given, shape.axis, kind[0])
        found = {"mean": result.mean, "invstd": result.invstd}
        with unchanged(*inputs):
            gradients = nbbn.batch_norm_backward(grad_out, x, weight, bias=bias, **found, **given)
        assert len(gradients) == 3 + kind[2]
        _check_gradients(
            gradients, x, grad_out, weight, bias, *found.values(), given, training=True, dtype=kind[0]
        )


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_each_in_another_layout(rng, activation):
    """Channels side by side in some arrays and not in others: one decides how all are gone through."""
    shape, kind = Shape((5, 20, 3, 11)), (np.float32, activation, True)
    both = LAYOUTS["contiguous"], LAYOUTS["channels_last"]
    for layouts in itertools.product(both, repeat=4):
        x, grad_out, weight, bias, given = _problem(rng, kind, shape, iter(layouts[:3]))
        out = layouts[3](np.full(shape.dims, np.nan, np.float32))
        result = nbbn.batch_norm_forward(x, weight, bias, out=out, **given)
        _check_out(out, reference.forward(x, weight, bias, axis=1), given, 1, np.float32)
        found = {"mean": result.mean, "invstd": result.invstd}
        out = layouts[3](np.full(shape.dims, np.nan, np.float32))
        gradients = nbbn.batch_norm_backward(grad_out, x, weight, bias=bias, out=out, **found, **given)
        _check_gradients(
            gradients, x, grad_out, weight, bias, *found.values(), given, training=True, dtype=np.float32
        )


@pytest.mark.parametrize("kind", KINDS[::4], ids=kind_id)
def test_evaluation(rng, kind):
    layouts = _layouts()
    for shape in SHAPES:
        x, grad_out, weight, bias, given = _problem(rng, kind, shape, layouts)
        mean, var = running_statistics(rng, shape.channels)
        expected = reference.evaluate(x, mean, var, weight, bias, axis=shape.axis)
        out = nbbn.batch_norm(x, mean, var, weight, bias, **given)
        _check_out(out, expected, given, shape.axis, kind[0])
        invstd = 1 / np.sqrt(var.astype(np.float64) + 1e-5)
        gradients = nbbn.batch_norm_backward(
            grad_out, x, weight, mean=mean, invstd=invstd, bias=bias, training=False, **given
        )
        _check_gradients(
            gradients, x, grad_out, weight, bias, mean, invstd, given, training=False, dtype=kind[0]
        )


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])
def test_large(rng, layout, with_residual):
    """Too much for the caches: in phases, streamed, on several threads."""
    shape = Shape((16, 40, 80, 81))
    x, grad_out, residual = (activations(rng, shape, np.float32).astype(np.float32) for _ in range(3))
    if layout == "channels-last":
        x, grad_out, residual = (
            np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
            for a in (x, grad_out, residual)
        )
    weight, bias = rng.normal(size=(2, 40)).astype(np.float32)
    given = {"activation": "relu", "residual": residual if with_residual else None}
    plain = nbbn.batch_norm_forward(x, weight, bias)
    z = plain.out + residual if with_residual else plain.out
    result = nbbn.batch_norm_forward(x, weight, bias, **given)
    assert_same_bits(result.out, np.maximum(z, 0))
    found = {"mean": plain.mean, "invstd": plain.invstd}
    gradients = nbbn.batch_norm_backward(grad_out, x, weight, bias=bias, **found, **given)
    expected = nbbn.batch_norm_backward(np.where(z > 0, grad_out, 0), x, weight, **found)
    assert_same_bits(gradients[:3], tuple(expected))
    evaluated = nbbn.batch_norm(x, plain.mean, plain.var, weight, bias, **given)
    z = nbbn.batch_norm(x, plain.mean, plain.var, weight, bias)
    z = z + residual if with_residual else z
    assert_same_bits(evaluated, np.maximum(z, 0))
    gradients = nbbn.batch_norm_backward(grad_out, x, weight, bias=bias, training=False, **found, **given)
    z = nbbn.batch_norm(x, plain.mean, plain.invstd**-2.0, weight, bias, eps=0.0)
    z = z + residual if with_residual else z
    incoming = np.where(z > 0, grad_out, 0)
    expected = nbbn.batch_norm_backward(incoming, x, weight, training=False, **found)
    # invstd ** -2 is rounded: z may be on the other side of 0 where it is next to it.
    sure = np.abs(z) > 1e-5
    assert np.array_equal(gradients.x[sure], expected.x[sure])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[2]], ids=kind_id)
def test_gradient_of_the_residual(rng, kind):
    """grad_x and the gradients of parameters are, to the bit, those from the stored gradient."""
    # The order of sums goes with the layouts, of which there is one here.
    layouts = itertools.repeat(np.ascontiguousarray)
    for shape in SHAPES:
        x, grad_out, weight, bias, given = _problem(rng, kind, shape, layouts)
        axis = given.pop("axis")
        forward = nbbn.batch_norm_forward(x, weight, bias, axis=axis)
        found = {"mean": forward.mean, "invstd": forward.invstd, "axis": axis}
        gradients = nbbn.batch_norm_backward(grad_out, x, weight, bias=bias, **found, **given)
        expected = nbbn.batch_norm_backward(gradients.residual, x, weight, **found)
        assert_same_bits(gradients[:3], tuple(expected))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_relu_is_exact(rng, dtype):
    """A relu rounds nothing: its results are those of two passes, to the bit."""
    layouts = itertools.repeat(np.ascontiguousarray)
    for shape in SHAPES:
        x, grad_out, weight, bias, _ = _problem(rng, (dtype, "relu", False), shape, layouts)
        plain = nbbn.batch_norm_forward(x, weight, bias, axis=shape.axis)
        fused = nbbn.batch_norm_forward(x, weight, bias, axis=shape.axis, activation="relu")
        assert_same_bits(fused.out, np.maximum(plain.out, 0).astype(dtype))
        found = {"mean": plain.mean, "invstd": plain.invstd, "axis": shape.axis}
        gradients = nbbn.batch_norm_backward(grad_out, x, weight, bias=bias, activation="relu", **found)
        incoming = np.where(plain.out > 0, grad_out, 0).astype(dtype)
        assert_same_bits(tuple(gradients), tuple(nbbn.batch_norm_backward(incoming, x, weight, **found)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_parameters_that_are_not_given(rng, dtype, training):
    """What the activation's gradient is taken at has a weight of one and a bias of zero then."""
    layouts = itertools.repeat(np.ascontiguousarray)
    for shape in SHAPES:
        x, grad_out, _, _, beside = _problem(rng, (dtype, "silu", True), shape, layouts)
        ones, zeros = np.ones(shape.channels, np.float32), np.zeros(shape.channels, np.float32)
        plain = nbbn.batch_norm_forward(x, axis=shape.axis)
        given = beside | {"mean": plain.mean, "invstd": plain.invstd, "training": training}
        for residual in (beside["residual"], None):
            given["residual"] = residual
            expected = nbbn.batch_norm_backward(grad_out, x, ones, bias=zeros, **given)
            for weight, bias in ((None, None), (None, zeros), (ones, None)):
                gradients = nbbn.batch_norm_backward(grad_out, x, weight, bias=bias, **given)
                assert_same_bits(gradients.x, expected.x)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] is np.float64], ids=kind_id)
def test_differences(rng, kind):
    _, activation, residual = kind
    shape = Shape((5, 3, 4))
    x = 3 * rng.permutation(60).reshape(shape.dims) / 20 + 0.1 * rng.normal(size=shape.dims)
    arrays = {"x": x, "weight": rng.normal(size=3), "bias": rng.normal(size=3)}
    if residual:
        arrays["residual"] = rng.normal(size=shape.dims)
    cotangent = rng.normal(size=shape.dims)

    def loss():
        return float((cotangent * nbbn.batch_norm_forward(**arrays, activation=activation).out).sum())

    forward = nbbn.batch_norm_forward(**arrays)
    if activation == "leaky_relu" and np.abs(forward.out).min() < 1e-2:
        arrays["bias"] += 0.05  # not at the kink, where there is no derivative
    gradients = nbbn.batch_norm_backward(
        cotangent, mean=forward.mean, invstd=forward.invstd, activation=activation, **arrays
    )
    near = np.abs(nbbn.batch_norm_forward(**arrays).out).min()
    for name, values in arrays.items():
        if activation == "leaky_relu" and near < 2e-3:
            continue
        assert_gradient(loss, values, getattr(gradients, name), rng, places=12)


def _exact(activation, z):
    """Return the activation of a number and its derivative, with 40 digits."""
    with mpmath.workdps(40):
        z = mpmath.mpf(float(z))
        if activation == "gelu":
            above = mpmath.erfc(-z / mpmath.sqrt(2)) / 2
            return z * above, above + z * mpmath.npdf(z)
        inner, rise = z, mpmath.mpf(1)
        if activation == "gelu_tanh":
            factor, cubic = 2 * mpmath.sqrt(2 / mpmath.pi), mpmath.mpf("0.044715")
            inner, rise = factor * (z + cubic * z**3), factor * (1 + 3 * cubic * z**2)
        s = 1 / (1 + mpmath.exp(-inner))
        return z * s, s + z * s / (1 + mpmath.exp(inner)) * rise


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
def test_accuracy(rng, activation, dtype):
    """A few units in the last place, also far out, where others have nothing left."""
    far = -110 if dtype == np.float32 else -760  # where nothing is left of an exponential
    z = [3 * rng.normal(size=150), rng.uniform(-12, 12, 100), 10.0 ** rng.uniform(-9, 1, 50)]
    z = np.concatenate([*z, rng.uniform(-40, -12, 50), rng.uniform(far, -40, 50)])
    x = z.astype(dtype)[:, None]
    nothing = {"mean": np.zeros(1), "invstd": np.ones(1), "training": False}
    out = nbbn.batch_norm(x, np.zeros(1), np.ones(1), eps=0.0, activation=activation)
    slope = nbbn.batch_norm_backward(np.ones_like(x), x, activation=activation, **nothing).x
    unit = float(reference.unit(dtype))
    for k, value in enumerate(x[:, 0]):
        expected, derivative = _exact(activation, value)
        # In millions of values silu was 5.2 off at most, gelu 7.4. exp(2 u) has the roundings of 2 u, times
        # |2 u|: z · (c · z² + d) has those of c, of z², of their product, of the sum and of its product.
        units = 9 + (5 * abs(float(_inner(float(value)))) if activation == "gelu_tanh" else 0)
        tiny = 1e3 * float(np.finfo(dtype).tiny)
        assert abs(mpmath.mpf(float(out[k, 0])) - expected) <= units * unit * abs(expected) + tiny, value
        assert abs(mpmath.mpf(float(slope[k, 0])) - derivative) <= (6 + units) * unit, value


def test_special_values():
    """NaN stays NaN; a relu of infinities; and where the statistics are constants, no 0 · ∞."""
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0], np.float32)[:, None]
    mean, one = np.zeros(1), np.ones(1)
    for activation, expected, low in (
        ("relu", [np.nan, np.inf, 0, 0, 0, 1, 0], 0),
        ("leaky_relu", [np.nan, np.inf, -np.inf, 0, 0, 1, -0.25], 0.25),
        ("silu", [np.nan, np.inf, 0, 0, 0], 0),
        ("gelu", [np.nan, np.inf, 0, 0, 0], 0),
        ("gelu_tanh", [np.nan, np.inf, 0, 0, 0], 0),
    ):
        given = {"activation": activation, "negative_slope": 0.25}
        out = nbbn.batch_norm(x, mean, one, eps=0.0, **given)[: len(expected), 0]
        assert np.array_equal(out, np.array(expected, np.float32), equal_nan=True), activation
        gradients = nbbn.batch_norm_backward(
            np.ones_like(x), x, mean=mean, invstd=one, training=False, **given
        )
        assert np.isnan(gradients.x[0, 0]) or "relu" in activation
        assert np.array_equal(gradients.x[1:3, 0], [1, low])


def test_nothing_asked_is_nothing_changed(rng):
    x = activations(rng, Shape((4, 3, 5)), np.float32)
    plain = nbbn.batch_norm_forward(x)
    assert_same_bits(tuple(nbbn.batch_norm_forward(x, activation=None, residual=None)), tuple(plain))
    gradients = nbbn.batch_norm_backward(x, x, bias=np.ones(3), mean=plain.mean, invstd=plain.invstd)
    assert type(gradients) is nbbn.BatchNormGradients
    assert_same_bits(
        tuple(gradients), tuple(nbbn.batch_norm_backward(x, x, mean=plain.mean, invstd=plain.invstd))
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_in_place(rng, dtype):
    """The output may go where x is, or the residual."""
    for dims in [(3, 5), (4, 3, 50), (2, 40, 9, 9)]:
        x, residual = (activations(rng, Shape(dims), dtype) for _ in range(2))
        given = {"activation": "relu", "residual": residual}
        expected = nbbn.batch_norm_forward(x, **given).out
        target = residual.copy()
        assert_same_bits(
            nbbn.batch_norm_forward(x, activation="relu", residual=target, out=target).out, expected
        )
        target = x.copy()
        assert_same_bits(nbbn.batch_norm_forward(target, out=target, **given).out, expected)
        target = x.copy()
        both = nbbn.batch_norm_forward(x, activation="relu", residual=x).out
        assert_same_bits(
            nbbn.batch_norm_forward(target, activation="relu", residual=target, out=target).out, both
        )


def test_threads(python):
    code = """
import numba, numpy as np, nbbn, hashlib
rng = np.random.default_rng(7)
x, dy, r = rng.normal(size=(3, 6, 24, 40, 41)).astype(np.float32)
digest = hashlib.sha256()
for given in ({"activation": "relu"}, {"activation": "relu", "residual": r}):
    f = nbbn.batch_norm_forward(x, **given)
    g = nbbn.batch_norm_backward(dy, x, mean=f.mean, invstd=f.invstd, **given)
    for a in (*f[:4], *g):
        digest.update(np.ascontiguousarray(a).tobytes())
print(digest.hexdigest())
"""
    once = [python(code, NUMBA_NUM_THREADS=str(threads)) for threads in (1, 2)]
    assert once[0] == once[1]


def test_empty():
    x = np.empty((0, 3, 4), np.float32)
    out = nbbn.batch_norm_forward(x, activation="gelu", residual=x).out
    assert out.shape == x.shape
    given = {"mean": np.zeros(3), "invstd": np.ones(3), "activation": "gelu", "residual": x}
    gradients = nbbn.batch_norm_backward(x, x, **given)
    assert gradients.residual.shape == x.shape and not gradients.bias.any()


def test_torch(rng):
    torch = pytest.importorskip("torch")
    x, residual, grad_out = (torch.tensor(rng.normal(size=(4, 3, 5)), dtype=torch.float32) for _ in range(3))
    weight, bias = (torch.tensor(rng.normal(size=3), dtype=torch.float32) for _ in range(2))
    ours = nbbn.batch_norm_forward(x, weight, bias, activation="gelu", residual=residual)
    mine = [a.clone().requires_grad_() for a in (x, residual, weight, bias)]
    theirs = torch.nn.functional.batch_norm(mine[0], None, None, mine[2], mine[3], training=True)
    theirs = torch.nn.functional.gelu(theirs + mine[1])
    assert isinstance(ours.out, torch.Tensor)
    torch.testing.assert_close(ours.out, theirs.detach(), rtol=1e-5, atol=1e-6)
    theirs.backward(grad_out)
    gradients = nbbn.batch_norm_backward(
        grad_out,
        x,
        weight,
        bias=bias,
        mean=ours.mean,
        invstd=ours.invstd,
        activation="gelu",
        residual=residual,
    )
    for actual, expected in zip(gradients, (mine[0], mine[2], mine[3], mine[1]), strict=True):
        assert isinstance(actual, torch.Tensor)
        torch.testing.assert_close(actual.to(torch.float32), expected.grad, rtol=1e-4, atol=1e-5)


# --- errors ------------------------------------------------------------------------------------------

X = np.arange(12, dtype=np.float32).reshape(4, 3)
ERRORS = [
    ({"activation": 3}, TypeError, "activation must be a str or None, got int"),
    (
        {"activation": "tanh"},
        ValueError,
        "activation must be None or one of 'relu', .*'gelu_tanh', got 'tanh'",
    ),
    ({"activation": "relu", "negative_slope": "a"}, TypeError, "negative_slope must be a number, got str"),
    ({"negative_slope": np.inf}, ValueError, "negative_slope must be a finite number, got inf"),
    ({"negative_slope": -np.inf}, ValueError, "negative_slope must be a finite number, got -inf"),
    ({"negative_slope": np.nan}, ValueError, "negative_slope must be"),
    ({"residual": [1.0]}, TypeError, "residual must be"),
    ({"residual": X[:3]}, ValueError, r"residual must have x's shape \(4, 3\), got \(3, 3\)"),
    ({"residual": X.astype(np.float64)}, TypeError, "residual must have x's dtype float32, got float64"),
    ({"residual": X.astype(np.int32)}, TypeError, "residual must be"),
]


@pytest.mark.parametrize(("given", "error", "message"), ERRORS)
def test_errors(given, error, message):
    mean, var = np.zeros(3), np.ones(3)
    out = np.full_like(X, 7)
    bn = nbbn.BatchNorm(3)
    state = {name: bits(value) for name, value in bn.state_dict().items()}
    with unchanged(X, mean, var, out):
        for call in (
            lambda: nbbn.batch_norm_forward(X, out=out, **given),
            lambda: nbbn.batch_norm(X, mean, var, training=True, out=out, **given),
            lambda: nbbn.batch_norm(X, mean, var, out=out, **given),
            lambda: nbbn.batch_norm_backward(X, X, mean=mean, invstd=var, out=out, **given),
            lambda: nbbn.BatchNorm(3, **given) if "residual" not in given else bn(X, **given),
        ):
            with pytest.raises(error, match=f"^{message}"):
                call()
    assert state == {name: bits(value) for name, value in bn.state_dict().items()}


def test_overlaps():
    base = np.zeros((5, 3), np.float32)
    with pytest.raises(ValueError, match=r"^out must not overlap residual, unless it is residual itself"):
        nbbn.batch_norm_forward(X, residual=base[:4], out=base[1:])
    with pytest.raises(ValueError, match=r"^out must not overlap residual, unless it is x itself"):
        nbbn.batch_norm_backward(X, X, mean=np.zeros(3), invstd=np.ones(3), residual=base[:4], out=base[:4])
    with pytest.raises(ValueError, match=r"^bias must have shape"):
        nbbn.batch_norm_backward(X, X, mean=np.zeros(3), invstd=np.ones(3), bias=np.ones(2))


# --- the module --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"virtual_batch_size": 3}, {"renorm": True}, {"nonfinite": "skip"}, {"track_running_stats": False}],
    ids=lambda options: next(iter(options), "plain"),
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_module(rng, options, training):
    """What a module with an activation does is what one without and the activation do one after the other."""
    x, residual, grad_out = rng.normal(size=(3, 7, 4, 5))
    modules = [
        nbbn.BatchNorm(4, dtype="float64", **options, **more)
        for more in ({}, {"activation": "leaky_relu", "negative_slope": 0.2})
    ]
    weight, bias = rng.normal(size=(2, 4))
    for module in modules:
        module.weight[:], module.bias[:] = weight, bias
        module.train(training)
    for added in (None, residual):
        z = modules[0](x) + (0 if added is None else added)
        out = modules[1](x, residual=added)
        assert np.allclose(out, np.where(z > 0, z, 0.2 * z), rtol=1e-14, atol=1e-14)
        incoming = np.where(z > 0, grad_out, 0.2 * grad_out)
        expected = modules[0].backward(incoming)
        assert np.allclose(modules[1].backward(grad_out), expected, rtol=1e-12, atol=1e-13)
        for name in ("grad_weight", "grad_bias"):
            actual, wanted = (getattr(module, name) for module in modules[::-1])
            assert np.allclose(actual, wanted, rtol=1e-12, atol=1e-12)
        if added is None:
            assert modules[1].grad_residual is None
        else:
            assert np.allclose(modules[1].grad_residual, incoming, rtol=1e-14)
    for name, value in modules[0].state_dict().items():
        assert np.array_equal(value, modules[1].state_dict()[name])


def test_module_keeps_what_it_is():
    bn = nbbn.BatchNorm(3, activation="leaky_relu", negative_slope=0.3)
    assert repr(bn).endswith("activation='leaky_relu', negative_slope=0.3)")
    assert bn.activation == "leaky_relu" and bn.negative_slope == 0.3
    assert nbbn.BatchNorm(3).activation is None
    with pytest.raises(AttributeError):
        bn.activation = "tanh"
    out = bn(X, residual=X)
    bn.backward(X)
    assert bn.grad_residual.shape == X.shape
    for twin in (pickle.loads(pickle.dumps(bn)),):
        assert twin.grad_residual is None and twin.activation == "leaky_relu"
        twin.load_state_dict(nbbn.BatchNorm(3).state_dict())
        assert_same_bits(twin(X, residual=X), out)
    with pytest.raises(RuntimeError, match="backward needs a call"):
        pickle.loads(pickle.dumps(bn)).backward(X)
