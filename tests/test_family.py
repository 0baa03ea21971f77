"""Layer, RMS, instance and group norm against the oracle: values, gradients, layouts, types, bits.

First the oracle itself, against PyTorch and against differences.
"""

import itertools

import numpy as np
import pytest

import nbbn
import reference
from cases import (
    DTYPES,
    HALF,
    LAYOUTS,
    READ_LAYOUTS,
    VECTOR_LAYOUTS,
    columns_for,
    in_range,
    odd_strides_of_ones,
    permutations,
    running_statistics,
    type_id,
    with_types,
)
from checks import around, assert_same_bits, assert_within, bits, unchanged
from family import CASES, ONE_OF_EACH, Case, check, check_backward, check_forward, check_updates
from test_gradients import assert_gradient
from test_reproducible import THREADS, threads

__all__ = ["threads"]  # a fixture

IN_EVERY_TYPE = pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=str)
ONE_CASE_EACH = pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.norm)
CENTERED = [case for case in ONE_OF_EACH if case.centered]


# --- the oracle ------------------------------------------------------------------------------------


@EVERY_CASE
def test_oracle_against_torch(rng, case):
    torch = pytest.importorskip("torch")
    x, dy = case.data(rng, np.float64), rng.normal(size=case.dims)
    values = x, *case.pair(rng, np.float64)
    leaves = [None if v is None else torch.tensor(v, requires_grad=True) for v in values]
    tx, weight, bias = leaves
    if case.norm == "layer":
        out = torch.nn.functional.layer_norm(tx, case.normalized_shape, weight, bias, 1e-3)
    elif case.norm == "rms":
        out = torch.nn.functional.rms_norm(tx, case.normalized_shape, weight, 1e-3)
    else:
        groups = case.option if case.norm == "group" else case.channels
        first = torch.movedim(torch.movedim(tx, case.axis, 0), 1, 0)  # samples, channels, and the others
        out = torch.nn.functional.group_norm(first, groups, weight, bias, 1e-3)
        out = torch.movedim(torch.movedim(out, 0, 1), 0, case.axis)
    out.backward(torch.tensor(dy))
    of = case.rows
    forward = reference.forward_rows(of, *values, eps=1e-3, centered=case.centered)
    used = {"mean": forward.mean, "invstd": forward.invstd, "centered": case.centered}
    backward = reference.backward_rows(of, dy, x, values[1], **used)
    # PyTorch's own rounding, and where two values are close to one another it is large beside them.
    scale = 1 + np.abs(forward.invstd.hi).max()
    for actual, expected in ((out.detach(), forward.out), (tx.grad, backward.x)):
        assert_within("out or grad_x", of.of(actual.numpy()), expected, 1e-12 * scale)
    for leaf, expected in zip(leaves[1:], (backward.weight, backward.bias), strict=True):
        if leaf is not None:
            assert_within("a parameter's", leaf.grad.numpy().reshape(-1, 1), expected, 1e-11 * scale)


@EVERY_CASE
def test_oracle_against_differences(rng, case):
    x, cotangent = case.data(rng, np.float64), rng.normal(size=case.dims)
    weight, bias = case.pair(rng, np.float64)
    of, options = case.rows, {"centered": case.centered}

    def loss():
        out = reference.forward_rows(of, x, weight, bias, eps=0.1, **options).out
        return float((of.of(cotangent) * out).row_sums().rounded().sum())

    forward = reference.forward_rows(of, x, weight, eps=0.1, **options)
    used = {"mean": forward.mean, "invstd": forward.invstd}
    gradients = reference.backward_rows(of, cotangent, x, weight, **used, **options)
    grad_x = np.empty(case.dims)
    grad_x.reshape(-1)[of.places] = gradients.x.rounded()
    for values, gradient in ((x, grad_x), (weight, gradients.weight), (bias, gradients.bias)):
        if values is not None:
            gradient = gradient if values is x else gradient.rounded().reshape(values.shape)
            assert_gradient(loss, values, gradient, rng, places=6)


# --- values ----------------------------------------------------------------------------------------


@IN_EVERY_TYPE
@EVERY_CASE
def test_values(rng, case, dtype):
    check(case, case.data(rng, dtype), case.data(rng, dtype), *case.pair(rng))


@pytest.mark.parametrize(("offset", "dtype"), with_types(0.0, 10.0, 1e3, 1e5, 1e7), ids=type_id)
@pytest.mark.parametrize("sigma", [1.0, 0.01])
@ONE_CASE_EACH
def test_offsets(rng, case, sigma, offset, dtype):
    """Far from zero the variance is as right as near it, and so is the output."""
    x, dy = case.data(rng, dtype, offset, sigma), case.data(rng, dtype)
    check(case, x, dy, *case.pair(rng))


@IN_EVERY_TYPE
@pytest.mark.parametrize("value", [0.0, 0.1, 100.0, -3.3, 1e10, 1 / 3])
@pytest.mark.parametrize("case", [*CENTERED, Case("layer", (9, 49)), Case("layer", (5, 1000))], ids=str)
def test_constant_rows(rng, case, value, dtype):
    """Exact: the mean, a variance of 0, the bias as output; and the rows beside them as they were."""
    value = dtype(in_range(value, dtype))
    x, dy, (weight, bias), of = case.data(rng, dtype), case.data(rng, dtype), case.pair(rng), case.rows
    constant = np.arange(len(of.places)) % 2 == 0
    x.reshape(-1)[of.places[constant]] = value
    forward, gradients = check(case, x, dy, weight, bias)
    assert (forward.mean.reshape(-1)[constant] == float(value)).all()
    assert (forward.var.reshape(-1)[constant] == 0).all()
    expected = of.spread(bias, 0.0).astype(dtype)
    assert_same_bits(of.of(forward.out)[constant], expected[constant])
    x[...] = value
    forward, gradients = check(case, x, dy, weight, bias)
    assert_same_bits(of.of(forward.out), expected)
    assert not forward.var.any() and not gradients.weight.any()


@IN_EVERY_TYPE
@pytest.mark.parametrize("case", [Case("layer", (5, 1)), Case("group", (5, 3), 3)], ids=str)
def test_one_value(rng, case, dtype):
    """Nothing is left of it: out is the bias."""
    x, dy, (weight, bias) = case.data(rng, dtype, 100.0), case.data(rng, dtype), case.pair(rng)
    forward, gradients = check(case, x, dy, weight, bias)
    assert forward.count == 1 and not forward.var.any()
    assert_same_bits(forward.out, np.broadcast_to(bias, x.shape).astype(dtype))
    assert_same_bits(forward.mean.reshape(x.shape), x.astype(np.float64))
    assert not gradients.weight.any()


@IN_EVERY_TYPE
def test_rms_of_zeros_and_constants(rng, dtype):
    """Nothing is subtracted: zeros stay zeros, and a constant becomes 1."""
    x = np.zeros((3, 8), dtype)
    x[1], x[2] = 2, -0.5
    result = nbbn.rms_norm_forward(x, 8, eps=0.25)
    assert (result.mean.tolist(), result.var.tolist()) == ([0, 0, 0], [0, 4, 0.25])
    assert (result.out[0] == 0).all()
    check(Case("rms", (3, 8)), x, rng.normal(size=(3, 8)).astype(dtype), eps=0.25)


@IN_EVERY_TYPE
@pytest.mark.parametrize("eps", [0.0, 1e-300, 1e-12, 1e-5, 0.1, 10.0])
@ONE_CASE_EACH
def test_eps(rng, case, eps, dtype):
    for sigma in (1e-5, 1e-3, 1.0, 30.0):
        check(case, case.data(rng, dtype, sigma=sigma), case.data(rng, dtype), *case.pair(rng), eps=eps)


@IN_EVERY_TYPE
def test_rms_eps_of_the_type(rng, dtype):
    """Without an eps it is that of the type that is computed with, for values so small that it shows."""
    case = Case("rms", (3, 16))
    eps = float(np.finfo(np.float64 if dtype == np.float64 else np.float32).eps)
    x = case.data(rng, dtype, sigma=eps**0.5)
    result = check_forward(case, x, eps=eps)
    for given in ({}, {"eps": None}):
        assert_same_bits(nbbn.rms_norm(x, 16, **given), result.out)
        assert_same_bits(tuple(nbbn.rms_norm_forward(x, 16, **given)), tuple(result))


@IN_EVERY_TYPE
@ONE_CASE_EACH
def test_types_of_parameters(rng, case, dtype):
    """None, float32, float64, and x's own; statistics likewise."""
    kinds = columns_for(dtype)
    x, dy = case.data(rng, dtype, 3.0), case.data(rng, dtype)
    for weight, bias in itertools.product((None, *kinds), (None, *kinds)):
        bias = None if case.norm == "rms" else bias
        check(case, x, dy, case.parameter(rng, weight), case.parameter(rng, bias))
    forward = case.forward(x)
    for kind, other in itertools.product(kinds, kinds):
        used = {"mean": forward.mean.astype(kind), "invstd": forward.invstd.astype(other)}
        check_backward(case, dy, x, **used)


@ONE_CASE_EACH
def test_given_statistics(rng, case):
    """The gradient is computed with the statistics that are given, whatever x's are."""
    shape = case.rows.statistics
    x, dy, weight = case.data(rng, np.float64), case.data(rng, np.float64), case.parameter(rng, np.float64)
    check_backward(case, dy, x, weight, mean=rng.normal(size=shape), invstd=rng.uniform(0.5, 2, shape))


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=type_id)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_normalized_shape(rng, norm, dtype):
    """An int, any sequence of ints; of the last axis, of some, of all of them."""
    x = rng.normal(size=(2, 3, 4)).astype(dtype)
    function = getattr(nbbn, f"{norm}_norm")
    for normalized, forms in (
        (1, (4, (4,), [4], np.int64(4), (np.int32(4),))),
        (2, ((3, 4), [3, 4], np.array([3, 4]).tolist())),
        (3, ((2, 3, 4), x.shape)),
    ):
        expected = check_forward(Case(norm, (2, 3, 4), normalized), x).out
        for form in forms:
            eps = {"eps": 1e-5}
            assert_same_bits(function(x, form, **eps), expected)


@ONE_CASE_EACH
def test_large_rows_and_many_rows(rng, case):
    """More than fits a block, a vector or a thread: long rows, and many short ones."""
    some = {
        "layer": [((3, 5000), 1), ((700, 3), 1), ((2, 37, 61), 2), ((513, 17), 1)],
        "rms": [((3, 5000), 1), ((700, 3), 1), ((2, 37, 61), 2), ((513, 17), 1)],
        "instance": [((2, 3, 1500), 1), ((40, 33, 3), 1), ((2, 41, 43, 3), -1)],
        "group": [((2, 6, 700), 2), ((2, 6, 700), 1), ((40, 33, 3), 11), ((2, 100, 7), 1)],
    }[case.norm]
    for (dims, *option), dtype in itertools.product(some, (np.float32, np.float64)):
        axis = option[0] if case.norm == "instance" else 1
        one = Case(case.norm, dims, *(option if case.norm != "instance" else [1]), axis=axis)
        check(one, one.data(rng, dtype, 10.0), one.data(rng, dtype), *one.pair(rng))


@IN_EVERY_TYPE
@pytest.mark.parametrize("magnitude", [-20, -7, 6, 20])
@ONE_CASE_EACH
def test_scaling_by_a_power_of_two(rng, case, magnitude, dtype):
    """Exact: x · 2ᵏ with eps · 4ᵏ leaves out, and gives mean · 2ᵏ, var · 4ᵏ and grad_x · 2⁻ᵏ."""
    magnitude = np.sign(magnitude) * 2 if dtype == np.float16 else magnitude
    x, dy, (weight, bias) = case.data(rng, dtype), case.data(rng, dtype), case.pair(rng)
    # No x near zero, where float16 has other steps.
    x = (np.sign(x) * np.maximum(np.abs(x), dtype(0.25))).astype(dtype)
    factor = 2.0**magnitude
    first = case.forward(x, weight, bias, eps=2.0**-10)
    scaled = (x * dtype(factor)).astype(dtype)
    second = case.forward(scaled, weight, bias, eps=2.0**-10 * factor**2)
    assert_same_bits(second.out, first.out)
    assert_same_bits(second.mean, first.mean * factor)
    assert_same_bits(second.var, first.var * factor**2)
    if dtype in HALF:
        return  # grad_x may be subnormal there
    gradients = [
        case.backward(dy, values, weight, mean=result.mean, invstd=result.invstd)
        for values, result in ((x, first), (scaled, second))
    ]
    assert_same_bits(gradients[1].x, (gradients[0].x / dtype(factor)).astype(dtype))
    assert_same_bits(gradients[1].weight, gradients[0].weight)


@IN_EVERY_TYPE
@ONE_CASE_EACH
def test_sign(rng, case, dtype):
    """-x gives -out where there is no bias, and a bias alone adds itself."""
    x, weight = case.data(rng, dtype), case.parameter(rng, np.float32)
    assert_same_bits(case.call(-x, weight), -case.call(x, weight))


# --- nothing to do ---------------------------------------------------------------------------------


@IN_EVERY_TYPE
@pytest.mark.parametrize(
    "case",
    [
        *(Case(norm, dims, k) for norm in ("layer", "rms") for dims, k in (((0, 5), 1), ((3, 0), 1))),
        *(Case(norm, (2, 0, 4), 2) for norm in ("layer", "rms")),
        *(Case("instance", dims) for dims in ((0, 3, 5), (2, 3, 0), (2, 0, 5), (0, 3, 0))),
        Case("instance", (2, 0, 3), axis=-1),
        *(Case("group", dims, 3) for dims in ((0, 6, 5), (2, 6, 0), (0, 6), (2, 0, 3))),
    ],
    ids=str,
)
def test_empty(case, dtype):
    """Empty outputs, statistics and gradients of 0."""
    of = case.rows
    x = np.zeros(case.dims, dtype)
    weight = np.ones(case.parameters)
    bias = None if case.norm == "rms" else weight
    zeros = np.zeros(of.statistics)
    for out in (None, x, np.zeros_like(x)):
        with unchanged(weight):
            result = case.forward(x, weight, bias, eps=0.25, out=out)
            alone = case.call(x, weight, bias, out=out)
            gradients = case.backward(x, x, weight, mean=zeros, invstd=zeros, out=out)
        for array in (result.out, alone, gradients.x):
            assert (array.shape, array.dtype) == (x.shape, x.dtype)
            assert out is None or array is out
        assert result.count == 0
        assert_same_bits(result.mean, zeros)
        assert_same_bits(result.var, zeros)
        assert_same_bits(result.invstd, np.full(of.statistics, 2.0))
        assert_same_bits(gradients.weight, np.zeros(case.parameters))
        if bias is not None:
            assert_same_bits(gradients.bias, np.zeros(case.parameters))


@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("dims", [(0, 3, 5), (2, 3, 0)], ids=str)
def test_empty_batch_changes_no_running_statistics(rng, dims, momentum):
    statistics = running_statistics(rng, 3)
    with unchanged(*statistics):
        out = nbbn.instance_norm(np.zeros(dims), *statistics, momentum=momentum)
    assert out.shape == dims


# --- layouts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", READ_LAYOUTS | permutations(4))
@ONE_CASE_EACH
def test_x_and_grad_out_in_every_layout(rng, case, layout):
    """Each, and both, in every type."""
    lay = (READ_LAYOUTS | permutations(4))[layout]
    weight, bias = case.pair(rng)
    for dtype in DTYPES:
        x, dy = case.data(rng, dtype, 5.0), case.data(rng, dtype)
        check(case, lay(x), lay(dy), weight, bias)
        if dtype == np.float32:
            forward = case.forward(x)
            used = {"mean": forward.mean, "invstd": forward.invstd}
            check_backward(case, lay(dy), x, weight, **used)
            check_backward(case, dy, lay(x), weight, **used)


@pytest.mark.parametrize("layout", [*LAYOUTS, "memory2301", "memory1320", "memory3021"])
@ONE_CASE_EACH
def test_out_in_every_layout(rng, case, layout):
    """Filled with NaN before, and nothing beside it is written."""
    lay = (LAYOUTS | permutations(4))[layout]
    weight, bias = case.pair(rng)
    for dtype in DTYPES:
        x, dy = case.data(rng, dtype), LAYOUTS["channels_last"](case.data(rng, dtype))
        out = lay(np.zeros_like(x))
        with around(out):
            check(case, x, dy, weight, bias, out=out)


@pytest.mark.parametrize("layout", ["every_second", "reversed", "channels_last", "inside"])
@pytest.mark.parametrize("of_out", ["every_second", "reversed", "channels_last", "inside"])
@ONE_CASE_EACH
def test_pairs_of_layouts(rng, case, layout, of_out):
    x, dy = LAYOUTS[layout](case.data(rng, np.float32)), LAYOUTS[of_out](case.data(rng, np.float32))
    check(case, x, dy, *case.pair(rng), out=LAYOUTS[of_out](np.zeros(case.dims, np.float32)))


@pytest.mark.parametrize(
    "case",
    [
        Case("layer", (3, 4, 1, 6), 2),
        Case("rms", (3, 1, 5), 2),
        Case("instance", (4, 3, 1, 2)),
        Case("group", (1, 4, 1, 5), 2),
    ],
    ids=str,
)
def test_axes_of_length_one(rng, case):
    """Their strides mean nothing."""
    x, dy = (odd_strides_of_ones(case.data(rng, np.float32)) for _ in range(2))
    check(case, x, dy, *case.pair(rng))
    check(case, np.asfortranarray(x), dy, *case.pair(rng))


@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
@ONE_CASE_EACH
def test_parameters_in_every_layout(rng, case, layout):
    """A weight of one axis along it, and one of more along the first."""
    lay = VECTOR_LAYOUTS[layout]
    x, dy = case.data(rng, np.float32), case.data(rng, np.float32)
    weight, bias = (None if v is None else lay(v) for v in case.pair(rng))
    forward = check_forward(case, x, weight, bias)
    check_backward(case, dy, x, weight, mean=lay(forward.mean), invstd=lay(forward.invstd))


@pytest.mark.parametrize("layout", ["fortran", "every_second", "inside", "reversed", "broadcast"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_parameters_of_several_axes(rng, norm, layout):
    case = Case(norm, (3, 4, 5, 6), 3)
    lay = (LAYOUTS | {"broadcast": lambda a: np.broadcast_to(a[..., :1], a.shape)})[layout]
    x, dy = case.data(rng, np.float32), case.data(rng, np.float32)
    weight, bias = (None if v is None else lay(v) for v in case.pair(rng))
    check(case, x, dy, weight, bias)


# --- out -------------------------------------------------------------------------------------------


@IN_EVERY_TYPE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second", "reversed"])
@ONE_CASE_EACH
def test_in_place(rng, case, layout, dtype):
    """Over x itself: the same bits as beside it."""
    lay = LAYOUTS[layout]
    x, dy = lay(case.data(rng, dtype)), lay(case.data(rng, dtype))
    weight, bias = case.pair(rng)
    beside = case.forward(x, weight, bias, eps=1e-5)
    inside = lay(x.copy())
    with around(inside):
        result = check_forward(case, inside, weight, bias, out=inside)
    assert_same_bits(np.array(result.out), np.array(beside.out))
    assert_same_bits(tuple(result[1:]), tuple(beside[1:]))
    used = {"mean": beside.mean, "invstd": beside.invstd}
    fresh = case.backward(dy, x, weight, **used)
    inside = lay(x.copy())
    gradients = check_backward(case, dy, inside, weight, out=inside, **used)
    assert_same_bits(np.array(gradients.x), np.array(fresh.x))
    assert_same_bits(tuple(gradients[1:]), tuple(fresh[1:]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@ONE_CASE_EACH
def test_what_out_held_does_not_matter(rng, case, value):
    x, dy, (weight, bias) = case.data(rng, np.float32), case.data(rng, np.float32), case.pair(rng)
    forward = case.forward(x, weight, bias)
    used = {"mean": forward.mean, "invstd": forward.invstd}
    out = np.full_like(x, value)
    assert_same_bits(case.call(x, weight, bias, out=out), case.call(x, weight, bias))
    out[...] = value
    assert_same_bits(case.backward(dy, x, weight, out=out, **used).x, case.backward(dy, x, weight, **used).x)


# --- gradients against differences -----------------------------------------------------------------


@pytest.mark.parametrize("eps", [1e-2, 0.3])
@pytest.mark.parametrize("case", [case for case in CASES if case.count > 1], ids=str)
def test_gradients(rng, case, eps):
    """The loss is Σ cotangent · out with a random cotangent."""
    # At least this far apart, so that two values are no near-singular case.
    apart = rng.permutation(int(np.prod(case.dims))).reshape(case.dims) / len(case.rows.places)
    x, cotangent = case.data(rng, np.float64) + 3 * apart, rng.normal(size=case.dims)
    x /= max(1.0, np.abs(x).max() / 10)
    weight, bias = case.pair(rng, np.float64)

    def loss():
        return float((cotangent * case.call(x, weight, bias, eps=eps)).sum())

    forward = case.forward(x, weight, bias, eps=eps)
    gradients = case.backward(cotangent, x, weight, mean=forward.mean, invstd=forward.invstd)
    for values, gradient in zip((x, weight, bias), gradients, strict=True):
        if values is not None:
            assert_gradient(loss, values, gradient, rng, places=12)


@pytest.mark.parametrize("layout", ["channels_last", "fortran", "every_second", "reversed"])
@ONE_CASE_EACH
def test_gradients_in_other_layouts(rng, case, layout):
    x, cotangent = LAYOUTS[layout](case.data(rng, np.float64)), rng.normal(size=case.dims)
    weight = case.parameter(rng, np.float64)

    def loss():
        return float((cotangent * case.call(x, weight, eps=0.1)).sum())

    forward = case.forward(x, weight, eps=0.1)
    gradients = case.backward(cotangent, x, weight, mean=forward.mean, invstd=forward.invstd)
    assert_gradient(loss, x, gradients.x, rng, places=12)


# --- running statistics of instance norm -----------------------------------------------------------


@IN_EVERY_TYPE
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("case", [case for case in CASES if case.norm == "instance"], ids=str)
def test_running_statistics(rng, case, momentum, dtype):
    """Of all samples the average of the means, and of the unbiased variances; each if it is given."""
    x, (weight, bias) = case.data(rng, dtype, 3.0), case.pair(rng)
    plain = nbbn.instance_norm(x, None, None, weight, bias, axis=case.axis)
    for kinds in ((np.float32, np.float64), (np.float64, None), (None, np.float32), (dtype, dtype)):
        drawn = running_statistics(rng, case.channels, (np.float64, np.float64))
        mean, var = (None if k is None else v.astype(k) for k, v in zip(kinds, drawn, strict=True))
        before = bits(mean), bits(var)
        out = check_updates(case, x, mean, var, weight, bias, momentum=momentum)
        assert_same_bits(out, plain)
        if momentum == 0.0:
            assert (bits(mean), bits(var)) == before


def test_running_variance_is_unbiased():
    """n = 2: the factor is 2. Two samples with variances 1 and 9: (2 + 18) / 2."""
    x = np.array([[[3.0, 5.0]], [[-1.0, -7.0]]])
    mean, var = np.zeros(1), np.zeros(1)
    out = nbbn.instance_norm(x, mean, var, momentum=1.0, eps=0.0)
    assert out.tolist() == [[[-1, 1]], [[1, -1]]]
    assert (mean.tolist(), var.tolist()) == ([0.0], [10.0])


@IN_EVERY_TYPE
@pytest.mark.parametrize("axis", [1, 0, -1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second", "reversed"])
def test_evaluation(rng, layout, axis, dtype):
    """With the running statistics, as batch norm; one value an instance will do."""
    for dims in ((4, 5, 6), (4, 5, 1), (1, 5, 1)):
        case = Case("instance", dims, axis=axis)
        x = LAYOUTS[layout](case.data(rng, dtype))
        mean, var = running_statistics(rng, case.channels)
        weight, bias = case.pair(rng)
        expected = reference.evaluate(x, mean, var, weight, bias, eps=0.01, axis=axis)
        for out in (None, np.full_like(x, np.nan)):
            with unchanged(x, mean, var, weight, bias):
                actual = nbbn.instance_norm(x, mean, var, weight, bias, False, 0.1, 0.01, axis=axis, out=out)
            tolerance = reference.out_tolerance(expected, dtype)
            assert_within("out", reference.rows(actual, axis), expected.out, tolerance)
            assert out is None or actual is out


@pytest.mark.parametrize("lay", [lambda a: a[::2], lambda a: a[::-1], lambda a: a[1:-1:3]])
def test_strided_running_statistics(rng, lay):
    """They are updated where they lie, and nothing between them."""
    mean, var = np.full(20, 7.0), np.full(20, 7.0, np.float32)
    case = Case("instance", (3, len(lay(mean)), 4))
    with around(lay(mean)), around(lay(var)):
        check_updates(case, case.data(rng, np.float32), lay(mean), lay(var))
    assert (mean != 7.0).sum() == (var != 7.0).sum() == case.channels


# --- bits ------------------------------------------------------------------------------------------

LARGE = [
    Case("layer", (300, 257)),
    Case("layer", (9, 30, 33, 5), 2),
    Case("layer", (3, 40_000)),
    Case("rms", (300, 257)),
    Case("rms", (70_000, 2)),
    Case("instance", (5, 11, 30, 33)),
    Case("instance", (5, 30, 33, 11), axis=-1),
    Case("group", (5, 12, 30, 33), 4),
    Case("group", (5, 12, 30, 33), 1),
    Case("group", (5, 30, 33, 12), 3, -1),
    Case("group", (40, 32, 11, 11), 8),
]
EVERY_LARGE_CASE = pytest.mark.parametrize("case", LARGE, ids=str)


def inputs(rng, case, dtype, layout="contiguous"):
    """Magnitudes far apart: whatever is added in another order, shows."""
    arrays = []
    for _ in range(2):
        values = case.data(rng, np.float64, 3.0) * np.exp(rng.normal(size=case.dims))
        arrays.append(LAYOUTS[layout](values.astype(dtype)))
    return case, *arrays, *case.pair(rng, np.float64)


def everything(case, x, dy, weight, bias):
    """Return the results of all functions: new arrays, written once."""
    forward = case.forward(x, weight, bias)
    used = {"mean": forward.mean, "invstd": forward.invstd}
    results = tuple(forward), tuple(case.backward(dy, x, weight, **used))
    if case.norm != "instance":
        return *results, case.call(x, weight, bias)
    mean, var = np.zeros(case.channels), np.ones(case.channels)
    out = case.call(x, weight, bias, running_mean=mean, running_var=var)
    return *results, out, mean, var


@pytest.mark.skipif(len(THREADS) < 2, reason="needs two threads")
@IN_EVERY_TYPE
@EVERY_LARGE_CASE
def test_every_number_of_threads(rng, threads, case, dtype):
    arguments = inputs(rng, case, dtype)
    threads(1)
    alone = everything(*arguments)
    threads(2)
    assert_same_bits(everything(*arguments), alone)


@pytest.mark.skipif(len(THREADS) < 2, reason="needs two threads")
@pytest.mark.parametrize("layout", ["channels_last", "fortran", "every_second", "reversed", "inside"])
@EVERY_LARGE_CASE
def test_every_number_of_threads_in_other_layouts(rng, threads, case, layout):
    arguments = inputs(rng, case, np.float32, layout)
    threads(1)
    alone = everything(*arguments)
    threads(2)
    assert_same_bits(everything(*arguments), alone)


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=type_id)
@EVERY_LARGE_CASE
def test_twenty_runs(rng, case, dtype):
    arguments = inputs(rng, case, dtype)
    first = everything(*arguments)
    for _ in range(19):
        assert_same_bits(everything(*arguments), first)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second"])
@pytest.mark.parametrize("case", [*ONE_OF_EACH, LARGE[1]], ids=str)
def test_where_the_memory_lies_does_not_matter(rng, case, layout):
    """The same strides at another address, at any alignment: the same bits."""
    arguments = inputs(rng, case, np.float32, layout)
    first = everything(*arguments)
    for offset in (4, 20, 60, 3):
        moved = []
        for array in arguments[1:3]:
            span = sum((n - 1) * step for n, step in zip(array.shape, array.strides, strict=True))
            buffer = bytearray(span + array.itemsize + 128)
            copy = np.ndarray(array.shape, array.dtype, buffer, offset, array.strides)
            copy[...] = array
            moved.append(copy)
        assert_same_bits(everything(case, *moved, *arguments[3:]), first)


@EVERY_CASE
def test_nothing_accumulates(rng, case):
    """Two calls, and others in between, give what one does."""
    first, other = inputs(rng, case, np.float32), inputs(rng, case, np.float32)
    results = everything(*first)
    everything(*other)
    assert_same_bits(everything(*first), results)


# --- isolation -------------------------------------------------------------------------------------

SEVERAL_ROWS = [
    Case("layer", (6, 9)),
    Case("layer", (2, 3, 5, 7), 2),
    Case("layer", (5, 600)),
    Case("rms", (6, 9)),
    Case("rms", (2, 3, 5, 7), 2),
    Case("instance", (3, 4, 6)),
    Case("instance", (3, 5, 7, 4), axis=-1),
    Case("instance", (2, 3, 30, 31)),
    Case("group", (3, 6, 5), 3),
    Case("group", (3, 6, 5), 1),
    Case("group", (2, 5, 3, 8), 4, -1),
    Case("group", (2, 4, 30, 31), 2),
    Case("group", (44, 6, 5), 3),
]
POISONS = {
    "nan": [np.nan],
    "inf": [np.inf],
    "minus_inf": [-np.inf],
    "both": [np.inf, -np.inf],
    "all": [np.nan, np.inf, -np.inf],
}


def poisoned(case, array, row, values, rng):
    """Put `values` into one row of a copy: at its first place, its last, or between; return it, and where."""
    places = case.rows.places[row]
    at = rng.choice(places[[0, len(places) // 2, len(places) - 1]], len(values), replace=False)
    array = array.copy()
    array.reshape(-1)[at] = values
    return array, at


def kept(case, before, after, rows):
    """Hold the results of all rows but these to their bits: out or grad_x, and statistics."""
    others = np.delete(np.arange(len(case.rows.places)), rows)
    for first, second in zip(before, after, strict=True):
        if np.shape(first) == case.dims:
            first, second = case.rows.of(first), case.rows.of(second)
        else:
            first, second = first.reshape(-1), second.reshape(-1)
        assert_same_bits(first[others], second[others])


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("case", SEVERAL_ROWS, ids=str)
def test_poison_in_x(rng, case, poison):
    """In its own layer, group or instance; and in the gradient of the weights that this one has.

    In layer norm and RMS norm these are all of them, since every layer has the same weights; in the others
    they are those of its channels. The gradient of bias has no x in it.
    """
    _, x, dy, weight, bias = inputs(rng, case, np.float32)
    of = case.rows
    clean = everything(case, x, dy, weight, bias)
    for row in {0, len(of.places) // 2, len(of.places) - 1}:
        dirty_x, _ = poisoned(case, x, row, POISONS[poison], rng)
        with np.errstate(all="ignore"):
            dirty = everything(case, dirty_x, dy, weight, bias)
        kept(case, (*clean[0][:4], clean[1][0], clean[2]), (*dirty[0][:4], dirty[1][0], dirty[2]), [row])
        touched = np.unique(of.owners[row])
        weights = [result[1][1].reshape(-1) for result in (clean, dirty)]
        assert_same_bits(np.delete(weights[1], touched), np.delete(weights[0], touched))
        assert case.norm == "rms" or bits(clean[1][2]) == bits(dirty[1][2])
        if case.norm == "instance":  # the running ones are of the channel
            for k in (3, 4):
                assert_same_bits(np.delete(dirty[k], touched), np.delete(clean[k], touched))
                assert not np.isfinite(dirty[k][touched]).any()
        if case.centered or poison in ("nan", "all"):  # without a mean, Inf alone may leave zeros
            assert np.isnan(of.of(dirty[0][0])[row]).all() and np.isnan(dirty[0][2].reshape(-1)[row])
            assert np.isnan(of.of(dirty[1][0])[row]).all()
            assert np.isnan(weights[1][touched]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("case", SEVERAL_ROWS, ids=str)
def test_poison_in_grad_out(rng, case, value):
    """In the gradient of x of its own row, and in those of the weight and the bias of its own place."""
    _, x, dy, weight, bias = inputs(rng, case, np.float32)
    clean = everything(case, x, dy, weight, bias)
    row = len(case.rows.places) // 2
    dirty_dy, at = poisoned(case, dy, row, [value], rng)
    with np.errstate(all="ignore"):
        dirty = everything(case, x, dirty_dy, weight, bias)
    assert_same_bits((dirty[0], *dirty[2:]), (clean[0], *clean[2:]))
    kept(case, clean[1][:1], dirty[1][:1], [row])
    assert not np.isfinite(case.rows.of(dirty[1][0])[row]).any()
    touched = case.rows.owners[row][np.isin(case.rows.places[row], at)]
    for first, second in zip(clean[1][1:], dirty[1][1:], strict=True):
        if first is not None:
            assert_same_bits(np.delete(first, touched), np.delete(second, touched))
            assert not np.isfinite(second.reshape(-1)[touched]).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("case", SEVERAL_ROWS, ids=str)
def test_poison_in_a_parameter(rng, case, name, value):
    """In the outputs that it belongs to, and through the weight in the gradient of x of all their rows.

    In no statistics, and in no gradient of a parameter.
    """
    _, x, dy, weight, bias = inputs(rng, case, np.float32)
    if case.norm == "rms" and name == "bias":
        return
    clean = everything(case, x, dy, weight, bias)
    spoilt = {"weight": weight, "bias": bias}
    spoilt[name] = spoilt[name].copy()
    last = spoilt[name].size - 1
    spoilt[name].reshape(-1)[last] = value
    with np.errstate(all="ignore"):
        dirty = everything(case, x, dy, **spoilt)
    own = case.rows.owners == last
    outs = [case.rows.of(result[0][0]) for result in (clean, dirty)]
    assert_same_bits(outs[1][~own], outs[0][~own])
    assert not np.isfinite(outs[1][own]).any()
    assert_same_bits((dirty[0][1:], dirty[1][1:], *dirty[3:]), (clean[0][1:], clean[1][1:], *clean[3:]))
    rows = np.flatnonzero(own.any(axis=1)) if name == "weight" else []
    kept(case, clean[1][:1], dirty[1][:1], rows)
    assert not np.isfinite(case.rows.of(dirty[1][0])[rows]).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["mean", "invstd"])
@pytest.mark.parametrize("case", SEVERAL_ROWS, ids=str)
def test_poison_in_a_statistic(rng, case, name, value):
    """Given to the backward pass: as poison in x."""
    _, x, dy, weight, _ = inputs(rng, case, np.float32)
    if case.norm == "rms" and name == "mean":
        return
    shape, of = case.rows.statistics, case.rows
    used = {"mean": rng.normal(size=shape), "invstd": rng.uniform(0.5, 2, shape)}
    clean = case.backward(dy, x, weight, **used)
    used[name] = used[name].copy()
    row = len(of.places) - 1
    used[name].reshape(-1)[row] = value
    with np.errstate(all="ignore"):
        dirty = case.backward(dy, x, weight, **used)
    kept(case, clean[:1], dirty[:1], [row])
    assert not np.isfinite(of.of(dirty.x)[row]).any()
    touched = np.unique(of.owners[row])
    assert_same_bits(np.delete(dirty.weight, touched), np.delete(clean.weight, touched))
    assert case.norm == "rms" or bits(clean.bias) == bits(dirty.bias)
