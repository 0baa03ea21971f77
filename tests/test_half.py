"""float16 and bfloat16: how elements are widened and rounded, and which types go together.

All other tests take these types along with the wider ones.
"""

import io
import platform
import sys

import llvmlite.binding
import ml_dtypes
import numpy as np
import pytest

import nbbn
import reference
from cases import HALF, type_id
from checks import assert_same_bits, check_backward, check_evaluation, unchanged


def patterns(dtype):
    """All 65536 numbers of a type, and whatever is none."""
    return np.arange(1 << 16, dtype=np.uint16).view(dtype)


def scaled(x, weight):
    """What evaluation makes of x with mean 0 and variance 1: x · weight, in float32 and then rounded."""
    zeros, ones = np.zeros(len(weight)), np.ones(len(weight))
    out = np.full_like(x, np.nan)
    return nbbn.batch_norm(x, zeros, ones, weight, eps=0.0, out=out)


def assert_same_numbers(actual, expected):
    """Equal as numbers and in sign, infinite or not; where NaN is expected, any NaN will do."""
    nan = np.isnan(expected.astype(np.float32))
    assert np.isnan(actual.astype(np.float32))[nan].all()
    assert np.array_equal(actual[~nan].view(np.uint16), expected[~nan].view(np.uint16))


def check_conversions():
    """Every number survives, and every rounding is to nearest, ties to even: also what is subnormal."""
    rng = np.random.default_rng()
    for dtype in HALF:
        with np.errstate(all="ignore"):
            x = patterns(dtype)[patterns(dtype).astype(np.float32) != 0]  # 0 + -0 gives up the sign
            x = x.reshape(1, 1, -1)
            assert_same_numbers(scaled(x, np.ones(1)), x)
            for weight in (1 / 3, -0.7, 2.0**-9, 1.0 + 2.0**-11, 1.0 + 2.0**-8, 300.0):
                weights = np.array([weight], np.float32)
                expected = (x.astype(np.float32) * weights[0]).astype(dtype)
                assert_same_numbers(scaled(x, weights), expected)
            # What lies between: halves of units, and a little more or less; too large, too small.
            numbers = patterns(dtype).astype(np.float64)
            finite = np.sort(numbers[np.isfinite(numbers)])
            between = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
            near = [np.nextafter(between, np.float32(side)) for side in (-np.inf, np.inf)]
            others = rng.normal(size=5000) * 10.0 ** rng.integers(-45, 38, 5000)
            weights = np.concatenate([between, *near, others.astype(np.float32), [np.inf, -np.inf]])
            weights = weights[weights != 0]
            ones = np.ones((1, len(weights), 1), dtype)
            assert_same_numbers(scaled(ones, weights)[0, :, 0], weights.astype(dtype))


def test_conversions():
    check_conversions()


AVX2 = "+avx,+avx2,+fma"
AVX512 = AVX2 + ",+f16c,+avx512f,+avx512cd,+avx512bw,+avx512vl"
HOST = {name for name, has in llvmlite.binding.get_host_cpu_features().items() if has}


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="there are other CPUs elsewhere")
@pytest.mark.parametrize("features", ["", AVX2, AVX2 + ",+f16c", AVX512, AVX512 + ",+avx512dq,+avx512bf16"])
def test_conversions_of_other_processors(python, tmp_path, features):
    """Without F16C nothing may call for functions that are not there; with AVX2, vectors are cut in two.

    And what AVX-512 has more of, on one processor or another, is used where it is there.
    """
    missing = [f for f in features.split(",") if f and f[1:] not in HOST]
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")
    code = """
import numba, test_half
test_half.check_conversions()
print(numba.core.registry.cpu_target.target_context.codegen()._tm_features)
"""
    environment = {"NUMBA_CPU_NAME": "x86-64", "NUMBA_CPU_FEATURES": "+sse,+sse2," + features}
    used = python(code, NUMBA_CACHE_DIR=str(tmp_path), **environment)
    assert ("+f16c" in used) == ("+f16c" in features)


@pytest.mark.parametrize("which", ["mean", "var", "weight", "bias"])
@pytest.mark.parametrize("dtype", HALF, ids=type_id)
def test_no_nan_is_rounded_to_a_number(dtype, which):
    """Whatever a parameter's NaN says in its lower bits: rounded as numbers are, some would overflow to 0."""
    bits = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8000, 0x7F800001], np.uint32)
    channels = len(bits) + 1
    mean, var, weight, bias = (np.ones(channels, np.float32) for _ in range(4))
    {"mean": mean, "var": var, "weight": weight, "bias": bias}[which][1:] = bits.view(np.float32)
    x = np.full((3, channels, 37), 2.0, dtype)
    out = nbbn.batch_norm(x, mean, var, weight, bias, eps=0.0, out=np.zeros_like(x))
    assert np.array_equal(
        np.isnan(out.astype(np.float32)), np.arange(channels)[:, None] > np.zeros((3, 1, 37))
    )
    assert (out[:, 0] == 2.0).all()
    if which == "bias":
        return
    grad_x = nbbn.batch_norm_backward(x, x, weight, mean=mean, invstd=var, out=np.zeros_like(x)).x
    assert np.isnan(grad_x[:, 1:].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", HALF, ids=type_id)
def test_running_statistics_are_rounded_once(dtype):
    """From float64 to 16 bits: by way of float32, what is just beside a tie would be taken for one."""
    count = 1 << 19
    low = np.array([1.0], dtype)
    high = (low.view(np.uint16) + np.uint16(1)).view(dtype)
    for number, rounded in ((count // 2 - 1, low), (count // 2, low), (count // 2 + 1, high)):
        x = np.repeat(low, count)
        x[:number] = high
        running_mean = np.zeros(1, dtype)
        nbbn.batch_norm(x[:, None], running_mean, training=True, momentum=1.0)
        assert running_mean == rounded


@pytest.mark.parametrize("dtype", HALF, ids=type_id)
@pytest.mark.parametrize("count", [2, 3, 1000])
def test_terms_that_cancel(rng, dtype, count):
    """Where (x - mean) · scale and bias all but cancel, float32 would be off by more than a last place."""
    x = (rng.normal(size=(count, 40)) * 2.0 ** rng.integers(-6, 6, 40) + rng.normal(size=40)).astype(dtype)
    x[0, ::3] = 1e-3 * x[0, ::3].astype(np.float32)
    own = reference.forward(x, eps=1e-5)
    deviation = np.sqrt(own.var.hi + 1e-5)[:, 0]
    mean = own.mean.hi[:, 0]
    # weight and bias undo it all: out = x, to the last place; and with one off, out is small where x is.
    for weight, bias in ((deviation, mean), (deviation * 2, mean), (-deviation, mean * (1 + 2.0**-20))):
        out = np.full_like(x, np.nan)
        nbbn.batch_norm_forward(x, weight, bias, out=out)
        expected = reference.forward(x, weight, bias)
        tolerance = reference.out_tolerance(expected, dtype)
        assert (expected.out.distance(reference.rows(out)) <= tolerance).all()
    # In evaluation the statistics are given: out is right to its last place, however small.
    bias = (mean - x[0].astype(np.float64)) * (1 + 2.0**-18 * rng.normal(size=40))
    check_evaluation(x, mean, deviation**2 - 1e-5, deviation, bias)


@pytest.mark.parametrize("dtype", HALF, ids=type_id)
@pytest.mark.parametrize("count", [2, 3, 1000])
def test_gradient_terms_that_cancel(rng, dtype, count):
    """Where dy is all but a line of x, grad_x is what is left of three terms that are as large as dy."""
    x = (rng.normal(size=(count, 40)) * 2.0 ** rng.integers(-6, 6, 40) + rng.normal(size=40)).astype(dtype)
    wide = x.astype(np.float64)
    slope, offset = rng.normal(size=(2, 40))
    dy = ((wide * slope + offset) * (1 + 2.0**-9 * rng.normal(size=x.shape))).astype(dtype)
    mean, invstd = wide.mean(axis=0), 1 / np.sqrt(wide.var(axis=0) + 1e-5)
    check_backward(dy, x, rng.normal(size=40), mean=mean, invstd=invstd)


@pytest.mark.parametrize("dtype", HALF, ids=type_id)
@pytest.mark.parametrize("shape", [(3, 40, 37), (200, 64), (70, 5), (2, 5, 700), (40, 3, 2)])
def test_gradients_that_are_nothing_but_roundings(rng, dtype, shape):
    """A constant dy, or one like x_hat: all of grad_x is in doubt, in vectors of one channel and of several.

    Which columns make a vector does not show, and that is where memory begins a line.
    """
    columns = [1, shape[1]] + [1] * (len(shape) - 2)
    scale, center = 2.0 ** rng.integers(-6, 6, columns), rng.normal(size=columns)
    x = (rng.normal(size=shape) * scale + center).astype(dtype)
    weight = rng.normal(size=shape[1])
    found = nbbn.batch_norm_forward(x)
    for dy in (np.ones_like(x), x, (x.astype(np.float32) * 3 - 1).astype(dtype), found.out):
        used = {"mean": found.mean, "invstd": found.invstd}
        expected = check_backward(dy, x, weight, **used)
        for first in rng.choice(64, 3, replace=False):
            out = np.empty(x.size + 64, dtype)[first : first + x.size].reshape(shape)
            out[...] = np.nan
            assert_same_bits(nbbn.batch_norm_backward(dy, x, weight, **used, out=out).x, expected.x)


@pytest.mark.parametrize("dtype", HALF, ids=type_id)
def test_gradients_of_rows_that_are_nothing_but_roundings(rng, dtype):
    """The same of layer norm, which is batch norm of what lies the other way, weights beside the elements."""
    x = (rng.normal(size=(9, 700)) + rng.normal(size=(9, 1))).astype(dtype)
    found = nbbn.batch_norm_forward(x, axis=0)
    used = {"mean": found.mean, "invstd": found.invstd}
    for dy in (np.ones_like(x), found.out):
        expected = check_backward(dy, x, np.full(9, -2.0), **used, axis=0)
        weight = np.full(700, -2.0, np.float32)
        gradients = nbbn.layer_norm_backward(dy, x, (700,), weight, **used)
        assert_same_bits(gradients.x, expected.x)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", HALF, ids=type_id)
def test_terms_that_cancel_beside_poison(rng, dtype, poison):
    """What is looked at together for doubt does not hide it: not NaN in the other half of a line."""
    x = rng.normal(size=(200, 64)).astype(dtype)
    mean, deviation = rng.normal(size=(2, 64))
    bias = (mean - x[0].astype(np.float64)) / deviation * (1 + 2.0**-20)
    given = mean, deviation**2, None, bias
    expected = nbbn.batch_norm(x, *given, eps=0.0)
    check_evaluation(x, *given, eps=0.0)
    dy, count = (x.astype(np.float32) * (1 + 2.0**-9)).astype(dtype), x.shape[0]
    used = {"mean": x.astype(float).sum(0) / count, "invstd": 1 / x.astype(float).std(0)}
    gradients = check_backward(dy, x, **used)
    for channels in (slice(0, 16), slice(16, 32), slice(40, 47)):
        spoiled, poisoned, others = x.copy(), bias.copy(), np.delete(np.arange(64), channels)
        spoiled[:, channels] = poisoned[channels] = poison
        for arguments in ((spoiled, *given), (x, *given[:-1], poisoned)):
            after = nbbn.batch_norm(*arguments, eps=0.0)
            assert_same_bits(after[:, others], expected[:, others])
        after = nbbn.batch_norm_backward(dy, spoiled, **used)
        assert_same_bits(after.x[:, others], gradients.x[:, others])


@pytest.mark.parametrize("dtype", HALF, ids=type_id)
def test_a_constant_channel_is_its_bias(dtype):
    values = np.array([0.1, 100, -3e4, 6.1e-5, 5.9e-8, 0]).astype(dtype)
    for count in (2, 3, 9, 49, 1000, 70_001):
        x = np.repeat(values[None], count, axis=0)
        bias = np.array([0.5, -1, 3e-5, 100, 0, 2]).astype(dtype)
        out, _, var, _, _ = nbbn.batch_norm_forward(x, bias=bias)
        assert not var.any()
        assert np.array_equal(out, np.repeat(bias[None], count, axis=0))


# --- which types go together -----------------------------------------------------------------------

PARAMETERS = ("weight", "bias", "running_mean", "running_var")


def call(x, training, **columns):
    return nbbn.batch_norm(x, training=training, **columns)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("x_type, other", [HALF, HALF[::-1], (np.float32, HALF[0]), (np.float64, HALF[1])])
def test_parameters_of_another_short_type(x_type, other, name, training):
    columns = {"running_mean": np.zeros(3, np.float32), "running_var": np.ones(3, np.float32)}
    columns[name] = np.ones(3, other)
    x = np.ones((4, 3), x_type)
    names = np.dtype(x_type).name, np.dtype(other).name
    with (
        unchanged(*columns.values()),
        pytest.raises(
            TypeError, match=rf"^{name} must be float32 or float64.* for x of {names[0]}, got {names[1]}"
        ),
    ):
        call(x, training, **columns)


@pytest.mark.parametrize("dtype", HALF, ids=type_id)
def test_out_of_another_type(dtype):
    x = np.ones((4, 3), dtype)
    for other in {np.float32, *HALF} - {dtype}:
        out = np.full((4, 3), 7, other)
        with unchanged(out), pytest.raises(TypeError, match=r"^out must have x's dtype"):
            nbbn.batch_norm_forward(x, out=out)
        with pytest.raises(TypeError, match=r"^grad_out must have x's dtype"):
            nbbn.batch_norm_backward(out, x, mean=np.zeros(3), invstd=np.ones(3))


@pytest.mark.parametrize("dtype", HALF, ids=type_id)
def test_large_outputs_are_recycled(rng, dtype):
    """Memory that was another type's before."""
    x = rng.normal(size=(16, 64, 32, 33)).astype(dtype)
    expected = nbbn.batch_norm_forward(x).out
    before = expected.astype(np.float32)
    for _ in range(3):
        nbbn.batch_norm_forward(x.astype(np.float32)[:, :, :16])
        result = nbbn.batch_norm_forward(x).out
        assert result.dtype == x.dtype and np.array_equal(result.astype(np.float32), before)


# --- modules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_module(rng, dtype):
    bn = nbbn.BatchNorm(5, dtype=dtype)
    x = rng.normal(3, 2, (40, 5)).astype(bn.dtype)
    dy = rng.normal(size=(40, 5)).astype(bn.dtype)
    out, grad_x = bn(x), bn.backward(dy)
    expected = reference.forward(x)
    assert (expected.out.distance(reference.rows(out)) <= reference.out_tolerance(expected, x.dtype)).all()
    back = reference.backward(dy, x, mean=expected.mean, invstd=expected.invstd)
    assert (back.x.distance(reference.rows(grad_x)) <= reference.grad_x_tolerance(back, x.dtype)).all()
    for name in ("weight", "bias", "grad_weight", "grad_bias", "running_mean", "running_var"):
        assert getattr(bn, name).dtype == bn.dtype
    assert np.array_equal(bn.grad_bias, back.bias.hi[:, 0].astype(bn.dtype))
    twin = nbbn.BatchNorm(5, dtype=dtype)
    twin.load_state_dict(bn.state_dict())
    assert np.array_equal(twin.eval()(x), bn.eval()(x))
    twin.load_state_dict({k: np.asarray(v, np.float64) for k, v in bn.state_dict().items()})
    assert np.array_equal(twin(x), bn(x))
    # numpy.load knows nothing of ml_dtypes.
    memory = io.BytesIO()
    np.savez(memory, **bn.state_dict())
    memory.seek(0)
    reloaded = nbbn.BatchNorm(5, dtype=dtype)
    reloaded.load_state_dict(np.load(memory))
    for name, value in bn.state_dict().items():
        np.testing.assert_array_equal(getattr(reloaded, name), value)
    wide = nbbn.BatchNorm(5)
    assert wide(x).dtype == x.dtype  # of float32, which inputs of any type go with
    with pytest.raises(TypeError, match=r"must be float32 or float64 for x of float32"):
        bn(x.astype(np.float32))


def test_without_ml_dtypes(python):
    """nbbn neither imports it nor needs it, but for NumPy arrays of bfloat16, which it makes."""
    python("""
import sys
import numpy as np, nbbn
assert "ml_dtypes" not in sys.modules
sys.modules["ml_dtypes"] = None
nbbn.warmup(["bfloat16"], backward=False)
nbbn.BatchNorm(3, dtype="float16")(np.ones((4, 3), np.float16))
try:
    nbbn.BatchNorm(3, dtype="bfloat16")
except TypeError as error:
    assert "pip install ml_dtypes" in str(error), error
else:
    raise AssertionError
""")


def test_the_other_byte_order_is_refused(rng):
    """ml_dtypes has bfloat16 in both; the numbers are the same, and not where they lie."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    swapped = bfloat16.newbyteorder(">" if sys.byteorder == "little" else "<")
    x = rng.normal(2, 3, (8, 6, 9)).astype(bfloat16)
    column = np.ones(6, bfloat16)
    refused = pytest.raises(TypeError, match=r"must be .*bfloat16")
    for call in (
        lambda: nbbn.batch_norm_forward(x.astype(swapped)),
        lambda: nbbn.layer_norm(x.astype(swapped), 9),
        lambda: nbbn.batch_norm_forward(x, column.astype(swapped)),
        lambda: nbbn.batch_norm(x, column.astype(swapped), column),
        lambda: nbbn.batch_norm_forward(x, out=np.empty_like(x, swapped)),
        lambda: nbbn.BatchNorm(6, dtype=swapped),
    ):
        with refused:
            call()
    explicit = bfloat16.newbyteorder("<" if sys.byteorder == "little" else ">")
    assert_same_bits(
        nbbn.batch_norm_forward(x.view(explicit)).out.view(np.uint16),
        nbbn.batch_norm_forward(x).out.view(np.uint16),
    )


def test_modules_of_float16_say_nothing_where_it_ends():
    """As kernels do not: gradients and states become infinite, or 0, whatever NumPy is told about errors."""
    norm = nbbn.BatchNorm(1, dtype="float16")
    x = np.ones((70_000, 1), np.float16)
    with np.errstate(all="raise"):
        norm(x)
        norm.backward(x)
        assert norm.grad_bias.tolist() == [np.inf]
        norm.backward(x * np.float16(2.0**-24))
        for dtype in (np.float32, np.float64):
            norm.load_state_dict({**norm.state_dict(), "running_var": np.array([1e5], dtype)})
            assert norm.running_var.tolist() == [np.inf]
        norm.load_state_dict({**norm.state_dict(), "running_mean": np.array([1e-9])})
        assert norm.running_mean.tolist() == [0.0]


def test_modules_of_bfloat16_round_once():
    """By way of float32 the first of these would be a tie, and go to 1."""
    above = 1 + 2.0**-8 + 2.0**-30
    norm = nbbn.BatchNorm(1, dtype="bfloat16")
    norm.load_state_dict({**norm.state_dict(), "weight": np.array([above])})
    assert float(norm.weight[0]) == 1.0078125
    x = np.array([[1.0], [2.0**-8], [2.0**-30]]).astype(ml_dtypes.bfloat16)
    norm(x)
    norm.backward(x)
    assert float(norm.grad_bias[0]) == 1.0078125
    norm.calibrate([np.array([[2.0], [2.0**-7 + 2.0**-29]])])
    assert float(norm.running_mean[0]) == 1.0078125
