"""fold: one layer in the place of a layer and the batch norm after it."""

import math

import ml_dtypes
import numpy as np
import pytest

import nbbn
import reference
from cases import DTYPES, HALF, READ_LAYOUTS, VECTOR_LAYOUTS, running_statistics, type_id
from checks import assert_like, assert_same_bits, assert_within, unchanged
from reference import column, finfo, rows
from test_errors import names
from test_frameworks import LIBRARIES, as_jax, as_torch
from twofold import Twofold

U = reference.unit(np.float64)


def module(rng, channels, *, affine=True, eps=1e-5, dtype="float64"):
    """Return a module with something in everything that it has."""
    bn = nbbn.BatchNorm(channels, affine=affine, eps=eps, dtype=dtype)
    bn.running_mean[...], bn.running_var[...] = running_statistics(rng, channels)
    if affine:
        bn.weight[...], bn.bias[...] = rng.normal(size=(2, channels))
    return bn


# --- layers, from their definitions, in float64 ----------------------------------------------------


def dense(x, weight, bias, groups=1):
    """out[n, o] = Σ_i x[n, i] · weight[o, i] + bias[o]"""
    return x @ weight.T + bias


def convolution(x, weight, bias, groups=1):
    """out[n, o, p] = Σ_{i, k} x[n, first + i, p + k] · weight[o, i, k] + bias[o]

    with o's group from input channel `first` on; p and k have as many axes as they like.
    """
    (batch, _, *size), (outputs, per_group, *kernel) = x.shape, weight.shape
    steps = [n - k + 1 for n, k in zip(size, kernel, strict=True)]
    out = np.zeros((batch, outputs, *steps))
    for o in range(outputs):
        first = o // (outputs // groups) * per_group
        for i in range(per_group):
            for k in np.ndindex(*kernel):
                window = tuple(slice(a, a + n) for a, n in zip(k, steps, strict=True))
                out[:, o] += x[(slice(None), first + i, *window)] * weight[(o, i, *k)]
        out[:, o] += bias[o]
    return out


def transposed(x, weight, bias, groups=1):
    """out[n, first + j, p + k] += x[n, i, p] · weight[i, j, k], and bias, with i's group from `first` on."""
    (batch, inputs, *size), (_, per_group, *kernel) = x.shape, weight.shape
    out = np.zeros((batch, per_group * groups, *(n + k - 1 for n, k in zip(size, kernel, strict=True))))
    for i in range(inputs):
        first = i // (inputs // groups) * per_group
        for j in range(per_group):
            for k in np.ndindex(*kernel):
                window = tuple(slice(a, a + n) for a, n in zip(k, size, strict=True))
                out[(slice(None), first + j, *window)] += x[:, i] * weight[(i, j, *k)]
    return out + np.reshape(bias, (-1, *[1] * len(size)))


# layer, shape of x, shape of weight, output channels, options of fold
LAYERS = {
    "dense": (dense, (5, 7), (3, 7), 3, {}),
    "dense-1": (dense, (5, 1), (2, 1), 2, {"axis": -2}),
    "conv1d": (convolution, (2, 3, 9), (4, 3, 2), 4, {}),
    "conv2d": (convolution, (2, 3, 6, 5), (4, 3, 3, 2), 4, {}),
    "conv3d": (convolution, (1, 2, 3, 4, 3), (3, 2, 2, 1, 2), 3, {}),
    "conv2d-2-groups": (convolution, (2, 6, 5, 4), (4, 3, 2, 2), 4, {"groups": 2}),
    "conv1d-3-groups": (convolution, (2, 6, 5), (9, 2, 2), 9, {"groups": 3}),
    "depthwise": (convolution, (2, 4, 5, 5), (4, 1, 3, 3), 4, {"groups": 4}),
    "depthwise-twice": (convolution, (2, 3, 5), (6, 1, 2), 6, {"groups": 3}),
    "transposed1d": (transposed, (2, 3, 4), (3, 5, 2), 5, {"axis": 1}),
    "transposed2d": (transposed, (2, 4, 3, 3), (4, 4, 2, 3), 4, {"axis": 1}),
    "transposed2d-2-groups": (transposed, (2, 4, 3, 3), (4, 3, 2, 2), 6, {"axis": 1, "groups": 2}),
    "transposed1d-2-groups-of-3": (transposed, (2, 6, 4), (6, 2, 3), 4, {"axis": -2, "groups": 2}),
    "transposed1d-3-groups": (transposed, (2, 6, 4), (6, 1, 2), 3, {"axis": 1, "groups": 3}),
    "transposed-depthwise": (transposed, (2, 3, 4, 4), (3, 1, 2, 2), 3, {"axis": 1, "groups": 3}),
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("name", LAYERS)
def test_one_layer_in_the_place_of_two(rng, name, dtype, affine, with_bias):
    """Its weights are right to u, half a unit in the last place, and so is each of its products.

    With A = Σ |weight · x| + |bias| over the n products of an output, all that is added in it is at most
    |scale| (A + |mean|) + |beta| in sum. In float64, both layers add up n + 1 numbers, each sum with an error
    of u₆₄; the scale takes three roundings, the weight one more, the bias three more: 2 n + 16 do for all. A
    subnormal weight is right to half the smallest one.
    """
    layer, x_shape, weight_shape, channels, options = LAYERS[name]
    groups = options.get("groups", 1)
    x = rng.normal(size=x_shape)
    weight = rng.normal(size=weight_shape).astype(dtype)
    bias = rng.normal(size=channels).astype(dtype) if with_bias else None
    bn = module(rng, channels, affine=affine)
    before = bn.state_dict()
    with unchanged(weight, bias):
        folded = nbbn.fold(weight, bias, bn, **options)
    assert folded._fields == ("weight", "bias")
    assert_like(folded.weight, weight)
    assert (folded.bias.dtype, folded.bias.shape) == (weight.dtype, (channels,))
    assert_same_bits(tuple(bn.state_dict().values()), tuple(before.values()))

    def through(weight, bias, x=x):
        return layer(x, weight.astype(np.float64), np.asarray(bias, np.float64), groups)

    own_bias = np.zeros(channels) if bias is None else bias
    parameters = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    expected = reference.evaluate(through(weight, own_bias), *parameters, eps=bn.eps)
    scale = np.abs(expected.weight) * expected.invstd.hi
    sums = rows(through(np.abs(weight), np.abs(own_bias), np.abs(x)))
    sums = scale * (sums + np.abs(column(bn.running_mean, 0.0, channels))) + np.abs(expected.bias)
    info = finfo(dtype)
    products = math.prod(weight_shape)  # more than there are in one output
    tolerance = (float(info.eps) / 2 + (2 * products + 16) * U) * sums
    tolerance += float(info.smallest_subnormal) / 2 * (np.abs(x).sum() + 1)
    assert_within("out", rows(through(*folded)), expected.out, tolerance)


@pytest.mark.parametrize("name", [name for name in LAYERS if "dense" not in name])
def test_the_layers_are_what_torch_has(rng, name):
    """The convolutions above, in float64: groups and axes are PyTorch's."""
    torch = pytest.importorskip("torch")
    layer, x_shape, weight_shape, channels, options = LAYERS[name]
    arguments = [rng.normal(size=shape) for shape in (x_shape, weight_shape, channels)]
    kind = "conv_transpose" if layer is transposed else "conv"
    function = getattr(torch.nn.functional, f"{kind}{len(x_shape) - 2}d")
    groups = options.get("groups", 1)
    expected = function(*map(torch.from_numpy, arguments), groups=groups).numpy()
    # Sums of at most 100 products of normal numbers.
    np.testing.assert_allclose(layer(*arguments, groups), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_every_number(rng, dtype):
    """Each is right to half a unit in the last place, and what float64 rounds before.

    That is 4 u₆₄ for a weight: of var + eps, its root, the quotient and the product, the first counts half.
    """
    weight = rng.normal(size=(7, 5, 3)).astype(dtype)
    bias = rng.normal(size=7).astype(dtype)
    bn = module(rng, 7)
    folded = nbbn.fold(weight, bias, bn)
    scale = Twofold(column(bn.weight, 1.0, 7)) / (Twofold(column(bn.running_var, 1.0, 7)) + bn.eps).sqrt()
    half, least = float(finfo(dtype).eps) / 2, float(finfo(dtype).smallest_subnormal) / 2
    expected = scale * rows(weight, 0).astype(np.float64)
    assert_within("weight", rows(folded.weight, 0), expected, (half + 4 * U) * np.abs(expected.hi) + least)
    shifted = (Twofold(column(bias, 0.0, 7)) - column(bn.running_mean, 0.0, 7)) * scale
    expected = shifted + column(bn.bias, 0.0, 7)
    tolerance = (half + U) * np.abs(expected.hi) + 5 * U * np.abs(shifted.hi) + least
    assert_within("bias", folded.bias[:, None], expected, tolerance)


def test_exact_numbers():
    """Powers of two and small integers: nothing is rounded."""
    bn = nbbn.BatchNorm(2, eps=0.25)
    bn.running_mean[:], bn.running_var[:] = [3, -1], [3.75, 0.0]
    bn.weight[:], bn.bias[:] = [4, -8], [0.5, 7]
    weight = np.array([[1, 2, 3], [5, -6, 0.5]], np.float16)
    folded = nbbn.fold(weight, np.array([5.0, 1.0], np.float32), bn)
    assert folded.weight.tolist() == [[2, 4, 6], [-80, 96, -8]]
    assert folded.bias.tolist() == [4.5, -25]
    assert nbbn.fold(weight, None, bn).bias.tolist() == [-5.5, -9]


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_rounded_once(dtype):
    """Just above the middle of two numbers; by way of another type it would be the middle, and go down."""
    eps = float(finfo(dtype).eps)
    bn = nbbn.BatchNorm(2, eps=0.0, dtype="float64")
    near = 1 + eps / 2 + (2.0**-50 if dtype is not np.float64 else 0.0)
    bn.weight[:] = bn.bias[:] = [near, -near]
    folded = nbbn.fold(np.ones(2, dtype), None, bn)
    up = 1.0 if dtype is np.float64 else 1 + eps  # there, the parameter itself has been rounded to even
    assert folded.weight.astype(float).tolist() == folded.bias.astype(float).tolist() == [up, -up]


@pytest.mark.parametrize("dtype", HALF, ids=type_id)
def test_any_number_in_half_precision(rng, dtype):
    """Rounded as float32 is: normal, subnormal, too large, infinite, NaN. The weight has one dimension."""
    count = 40_000
    values = rng.integers(0, 2**32, count, np.uint32).view(np.float32)
    values[np.isnan(values)] = np.nan
    values[: count // 2] = np.ldexp(rng.normal(size=count // 2), rng.integers(-30, 20, count // 2))
    values[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, np.nextafter(np.float32(np.inf), 0)]
    # Around the smallest number, and around the largest.
    small, large = (float(getattr(finfo(dtype), n)) for n in ("smallest_subnormal", "max"))
    values[6:12] = [small / 2, small * 0.50001, small * 1.5, small * 2.5, large, large * (1 + 2.0**-13)]
    bn = nbbn.BatchNorm(count, eps=0.0, dtype="float64")
    bn.weight[:] = values
    with np.errstate(all="ignore"):
        expected = values.astype(dtype)
    folded = nbbn.fold(np.ones(count, dtype), None, bn)
    nan = np.isnan(values)
    assert np.isnan(folded.weight[nan]).all()
    assert_same_bits(folded.weight[~nan], expected[~nan])


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_parameters_of_half_precision(rng, dtype):
    """They are widened, and so is a bias of any type."""
    weight = rng.normal(size=(3, 4))
    bn = nbbn.BatchNorm(3, dtype=dtype)
    wide = nbbn.BatchNorm(3, dtype="float64")
    for name in ("running_mean", "running_var", "weight", "bias"):
        values = rng.uniform(0.5, 2.0, size=3).astype(dtype)
        getattr(bn, name)[...] = values
        getattr(wide, name)[...] = values.astype(np.float64)
    bias = rng.normal(size=3).astype(dtype)
    assert_same_bits(nbbn.fold(weight, bias, bn), nbbn.fold(weight, bias.astype(np.float64), wide))


@pytest.mark.parametrize("layout", READ_LAYOUTS)
def test_layouts_of_the_weight(rng, layout):
    weight = READ_LAYOUTS[layout](rng.normal(size=(4, 6, 3, 5)).astype(np.float32))
    bn = module(rng, 6)
    with unchanged(weight):
        folded = nbbn.fold(weight, None, bn, axis=1)
    assert_same_bits(folded.weight, nbbn.fold(weight.copy("C"), None, bn, axis=1).weight)
    if layout not in ("unaligned", "record_field", "complex_part"):
        assert_like(folded.weight, weight)


@pytest.mark.parametrize("layout", VECTOR_LAYOUTS)
def test_layouts_of_the_bias(rng, layout):
    bias = VECTOR_LAYOUTS[layout](rng.normal(size=6).astype(np.float32))
    bn, weight = module(rng, 6), rng.normal(size=(6, 2))
    with unchanged(bias):
        folded = nbbn.fold(weight, bias, bn)
    assert_same_bits(folded.bias, nbbn.fold(weight, bias.copy(), bn).bias)


def test_keras_and_flax_have_channels_last(rng):
    weight, bn = rng.normal(size=(3, 2, 4, 5)), module(rng, 5)
    last = nbbn.fold(weight, None, bn, axis=-1)
    first = nbbn.fold(np.moveaxis(weight, -1, 0), None, bn)
    assert_same_bits(np.moveaxis(last.weight, -1, 0), first.weight)
    assert_same_bits(last.bias, first.bias)


def test_any_mode_and_a_copy(rng):
    """What is folded does not change when the module goes on learning."""
    bn, weight = module(rng, 3), rng.normal(size=(3, 2))
    folded = nbbn.fold(weight, None, bn)
    assert_same_bits(nbbn.fold(weight, None, bn.eval()), folded)
    with unchanged(*folded):
        bn.train()(rng.normal(size=(4, 3)))
        weight[...] = np.nan


def test_odd_channels_stay_apart(rng):
    """No variance and eps = 0, or NaN, spoils its own channel."""
    bn, weight = module(rng, 4, eps=0.0), rng.normal(size=(4, 3))
    expected = nbbn.fold(weight, None, bn)
    bn.running_var[:2] = [0.0, np.nan]
    signaling = np.array([0, 0x7F800001, 0, 0], np.uint32).view(
        np.float32
    )  # a NaN that warns when it is cast
    folded = nbbn.fold(weight, signaling, bn)
    assert np.isnan(folded.bias[1])
    assert np.isinf(folded.weight[0]).all() and np.isnan(folded.weight[1]).all()
    assert_same_bits(tuple(a[2:] for a in folded), tuple(a[2:] for a in expected))


# --- arrays of other libraries ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", LIBRARIES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=type_id)
def test_libraries(rng, kind, dtype):
    library = LIBRARIES[kind]()
    weight, bias = rng.normal(size=(3, 4, 2)).astype(dtype), rng.normal(size=3).astype(np.float32)
    bn = module(rng, 3)
    folded = nbbn.fold(library.of(weight), library.of(bias), bn)
    assert isinstance(folded.weight, library.kind) and isinstance(folded.bias, library.kind)
    expected = nbbn.fold(weight, bias, bn)
    assert_same_bits(tuple(library.numpy(a).view(np.ndarray) for a in folded), tuple(expected))
    mixed = nbbn.fold(weight, library.of(bias), bn)
    assert_same_bits(tuple(mixed), tuple(expected))


@pytest.mark.parametrize("to", [as_torch, as_jax])
def test_bfloat16(rng, to):
    weight = rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16)
    bn = module(rng, 3)
    tensor, kind = to(weight)
    folded = nbbn.fold(tensor, None, bn)
    for actual, expected in zip(folded, nbbn.fold(weight, None, bn), strict=True):
        assert actual.dtype == kind
        wide = np.asarray(actual.float() if to is as_torch else actual.astype("float32"))
        assert_same_bits(wide, expected.astype(np.float32))


def test_a_layer_of_torch(rng):
    """A whole convolution with its batch norm, in PyTorch and folded here."""
    torch = pytest.importorskip("torch")
    conv = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2).double()
    norm = torch.nn.BatchNorm2d(6).double()
    with torch.no_grad():
        for _ in range(3):
            norm(conv(torch.from_numpy(rng.normal(2, 3, (4, 4, 5, 5)))))
    bn = nbbn.BatchNorm(6, dtype="float64")
    bn.load_state_dict(norm.state_dict())
    weight, bias = nbbn.fold(conv.weight.detach(), conv.bias.detach(), bn, axis=1, groups=2)
    x = torch.from_numpy(rng.normal(size=(2, 4, 5, 5)))
    with torch.no_grad():
        expected = norm.eval()(conv(x))
        conv.weight.copy_(weight)
        conv.bias.copy_(bias)
        # Sums of some 20 products, in float64.
        np.testing.assert_allclose(conv(x).numpy(), expected.numpy(), rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match=r"weight .*detach\(\)"):
        nbbn.fold(conv.weight, None, bn, axis=1, groups=2)


# --- what is refused -------------------------------------------------------------------------------


WEIGHT, GOOD = np.ones((6, 4, 3), np.float32), {"axis": 0, "groups": 1}
NO_STATISTICS = nbbn.BatchNorm(6, track_running_stats=False)


@pytest.mark.parametrize(
    ("argument", "changes", "error"),
    [
        ("weight", {"weight": None}, TypeError),
        ("weight", {"weight": [[1.0] * 3] * 6}, TypeError),
        ("weight", {"weight": WEIGHT.astype(int)}, TypeError),
        ("weight", {"weight": WEIGHT.astype(">f4")}, TypeError),
        ("weight", {"weight": np.ma.array(WEIGHT)}, TypeError),
        ("weight", {"weight": np.float64(1.0)}, TypeError),
        ("weight", {"weight": np.array(1.0)}, ValueError),
        ("weight", {"weight": WEIGHT[:5]}, ValueError),
        ("weight", {"axis": 1}, ValueError),
        ("weight", {"axis": 1, "groups": 3}, ValueError),
        ("weight", {"weight": np.ones((6, 2)), "axis": 1, "groups": 1}, ValueError),
        ("weight", {"weight": np.ones((6, 2)), "axis": 1, "groups": 2}, ValueError),
        ("groups", {"weight": np.ones((4, 2)), "axis": 1, "groups": 3}, ValueError),
        ("axis", {"weight": np.ones((2, 6)), "axis": 0, "groups": 3}, ValueError),
        ("bias", {"bias": 1.0}, TypeError),
        ("bias", {"bias": np.ones(6, bool)}, TypeError),
        ("bias", {"bias": np.ones(5)}, ValueError),
        ("bias", {"bias": np.ones((6, 1))}, ValueError),
        ("bias", {"bias": np.array(1.0)}, ValueError),
        ("bn", {"bn": None}, TypeError),
        ("bn", {"bn": nbbn.BatchNorm}, TypeError),
        ("bn", {"bn": NO_STATISTICS}, ValueError),
        ("axis", {"axis": 3}, ValueError),
        ("axis", {"axis": -4}, ValueError),
        ("axis", {"axis": 0.0}, TypeError),
        ("axis", {"axis": True}, TypeError),
        ("groups", {"groups": 0}, ValueError),
        ("groups", {"groups": -2}, ValueError),
        ("groups", {"groups": 4}, ValueError),
        ("groups", {"groups": 2.0}, TypeError),
        ("groups", {"groups": None}, TypeError),
    ],
)
def test_what_is_refused(argument, changes, error):
    arguments = {"weight": WEIGHT, "bias": None, "bn": nbbn.BatchNorm(6), **GOOD, **changes}
    with pytest.raises(error) as raised:
        nbbn.fold(**arguments)
    assert type(raised.value) is error
    assert names(argument, raised)


def test_what_is_refused_is_told_apart():
    with pytest.raises(ValueError, match=r"6, or 2 in each of the groups, .* axis 1, got 4"):
        nbbn.fold(WEIGHT, None, nbbn.BatchNorm(6), axis=1, groups=3)
