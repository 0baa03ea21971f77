"""The bug bank's rows that layer, RMS, instance and group norm owe: each test says its row.

See test_bugbank.py for what the rows are about, where they were seen, and what the threads' names mean. Rows
of batch normalization's own state and formulas, and those of caches, threads and processes, which the kernels
share, are there alone.
"""

import itertools
import pathlib
import re

import numpy as np
import pytest

import nbbn
from bank import largest
from cases import (
    DTYPES,
    LAYOUTS,
    permutations,
    read_only,
    running_statistics,
    type_id,
)
from checks import assert_same_bits, bits, unchanged
from family import ONE_OF_EACH, Case, check, check_backward, check_forward, check_updates

IN_EVERY_TYPE = pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
EACH = pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.norm)
FEW_LAYOUTS = ["contiguous", "channels_last", "every_second", "reversed"]

ELSEWHERE = {
    1: ("test_family::test_offsets",),
    3: ("test_family::test_constant_rows", "test_family::test_one_value"),
    10: ("test_family::test_eps",),
    14: ("test_family::test_empty", "test_family::test_empty_batch_changes_no_running_statistics"),
    16: ("test_family_errors::test_shapes_of_modules",),
    17: ("test_family_errors::test_one_bad_argument",),
    18: ("test_family_errors::test_one_bad_argument",),
    19: ("test_family_errors::test_one_bad_argument",),
    25: ("test_family::test_x_and_grad_out_in_every_layout",),
    26: ("test_family::test_x_and_grad_out_in_every_layout", "test_family::test_out_in_every_layout"),
    28: ("test_family::test_x_and_grad_out_in_every_layout",),
    30: (
        "test_family_errors::test_out_that_overlaps_x",
        "test_family_errors::test_out_that_is_grad_out",
        "test_family_errors::test_out_that_overlaps_a_parameter",
    ),
    31: ("test_family::test_strided_running_statistics",),
    34: ("test_family::test_running_statistics",),
    36: ("test_family::test_nothing_accumulates",),
    37: ("test_family::test_types_of_parameters", "test_family::test_running_statistics"),
    38: (
        "test_family::test_poison_in_x",
        "test_family::test_poison_in_grad_out",
        "test_family::test_poison_in_a_parameter",
        "test_family::test_poison_in_a_statistic",
    ),
    39: ("test_family_torch::test_states_in_both_directions", "test_family_errors::test_states_of_modules"),
    44: ("test_family::test_twenty_runs",),
}
HERE = (2, 4, 5, 7, 8, 9, 11, 13, 20, 21, 23, 24, 27, 29, 32, 33, 43, 46)


@pytest.mark.parametrize("row", sorted({*ELSEWHERE, *HERE}))
def test_every_row_has_its_tests(row):
    own = [name for name in globals() if name.startswith(f"test_row_{row:02}_")]
    assert bool(own) == (row in HERE)
    for test in ELSEWHERE.get(row, ()):
        file, name = test.split("::")
        source = pathlib.Path(__file__).with_name(f"{file}.py").read_text()
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), test


def of_lines(lines, dtype):
    """Yield cases whose rows are these lines of numbers, and their x."""
    lines = np.asarray(lines, np.float64).astype(dtype)
    rows, length = lines.shape
    yield Case("layer", lines.shape), lines
    yield Case("rms", lines.shape), lines
    yield Case("instance", (1, rows, length)), lines[None]
    yield Case("instance", (1, length, rows), axis=-1), lines.T[None].copy()
    if length % 2 == 0:
        yield Case("group", (rows, 2, length // 2)), lines.reshape(rows, 2, -1)
        yield Case("group", (rows, length // 2, 2), axis=-1), lines.reshape(rows, -1, 2)


def check_lines(rng, lines, dtype, grad_out=None, **options):
    for case, x in of_lines(lines, dtype):
        dy = case.data(rng, dtype) if grad_out is None else np.full_like(x, grad_out)
        check(case, x, dy, *case.pair(rng), **options)


@IN_EVERY_TYPE
def test_row_02_small_steps(rng, dtype):
    """burn#5607: 100 + i · 1e-3, 16 values; and values far from the first ones, in the smallest steps."""
    ramp = 100 + 1e-3 * np.arange(16)
    check_lines(rng, [ramp, -ramp, ramp[::-1]], dtype)
    step = 64 * float(np.spacing(np.array(1, np.float32)) if dtype == np.float32 else 2.0**-10)
    far = np.where(np.arange(100) < 8, 0, 10 + np.arange(100) % 2)
    lines = [100 + step * far, 100 - step * far, 100 + step * far[::-1]]
    check_lines(rng, lines, dtype, eps=step**2 / 8)


@IN_EVERY_TYPE
def test_row_04_many_uniform_values(rng, dtype):
    """PT#54293, #54921, #59987: the longer the row, the further off was the sum of it."""
    check_lines(rng, rng.random((1, 10_000)), dtype)


@IN_EVERY_TYPE
def test_row_05_large_sums(rng, dtype):
    """PT#126525, #195701: ±200, and gradients of 300: float16 ends at 65504."""
    signs = np.where(np.arange(5000) % 2, -1.0, 1.0)
    lines = [200 * signs, -200 * signs]
    check_lines(rng, lines, dtype, grad_out=300)
    for case, x in of_lines(lines, dtype):
        result = case.forward(x)
        assert (result.mean.any(), set(result.var.reshape(-1))) == (False, {40_000.0})
        dy = np.full_like(x, 300)
        gradients = case.backward(dy, x, mean=result.mean, invstd=result.invstd)
        if case.norm != "rms":
            assert gradients.bias.sum() == 300 * x.size


def test_row_07_counts(rng):
    """TF PR30230, PT#70901: a count of 70000 held in float16 is infinite, and the mean NaN."""
    x = rng.normal(size=(1, 70_000)).astype(np.float16)
    assert check_forward(Case("layer", x.shape), x).count == 70_000
    for case, lines in of_lines(x, np.float16):
        result = case.forward(lines)
        assert result.count == 70_000 and abs(result.var.item() - 1) < 0.1


@pytest.mark.parametrize("norm", ["layer", "rms", "instance", "group"])
def test_row_08_order_of_products(norm):
    """PT#106941: weight · (x - mean) first is more than there is in float32; weight · invstd first is not."""
    dims = (2, 3, 4)
    case = Case(norm, dims, {"layer": 1, "rms": 1, "instance": 1, "group": 3}[norm])
    x = np.full(dims, -0.00199 * largest(np.float32), np.float32)
    x[..., ::2] *= -1
    weight = np.full(case.parameters, -2282, np.float32)
    shape = case.rows.statistics
    used = {"mean": np.zeros(shape), "invstd": np.full(shape, 0.117)}
    # The gradient of a constant times x, where nothing is subtracted but x_hat's share: Σ g = 0.
    gradients = case.backward(np.ones_like(x), x / np.float32(2.0**120), weight, **used)
    assert np.isfinite(gradients.x).all()
    near = (np.sign(x) / np.float32(0.117)).astype(np.float32)
    check_backward(case, x, near, weight, **used)


@IN_EVERY_TYPE
def test_row_09_magnitudes(rng, dtype):
    """Paddle PR16545: from 1e-5 to 1e15, or as far as half of the type's range goes."""
    top = min(15.0, np.log10(largest(dtype)) / 2)
    lines = rng.choice([-1, 1], (6, 40)) * 10 ** rng.uniform(-5, top, (6, 40))
    check_lines(rng, lines, dtype)


@IN_EVERY_TYPE
@EACH
def test_row_11_zero_eps(rng, case, dtype):
    """TF#8090, #37768, PT PR1742: eps = 0 is honoured: a constant row is 0/0, and no other is touched."""
    x, of = case.data(rng, dtype), case.rows
    constant = 0.0 if case.norm == "rms" else 0.5
    clean = case.call(x, eps=0.0)
    x.reshape(-1)[of.places[1]] = constant
    with np.errstate(all="ignore"):
        result = case.forward(x, eps=0.0)
    assert result.invstd.reshape(-1)[1] == np.inf and result.var.reshape(-1)[1] == 0
    assert np.isnan(of.of(result.out)[1]).all()
    assert_same_bits(np.delete(of.of(result.out), 1, 0), np.delete(of.of(clean), 1, 0))


@pytest.mark.parametrize("dims", [(1, 5, 1), (3, 4, 1, 1)], ids=str)
def test_row_13_one_value(dims):
    """PT#1381, PR2961, TF#34062: an instance of one value is an error before any write."""
    x, out = np.ones(dims), np.full(dims, np.nan)
    channels = dims[1]
    mean, var = np.zeros(channels), np.ones(channels)
    with unchanged(x, out, mean, var), pytest.raises(ValueError, match=r"\bx\b"):
        nbbn.instance_norm(x, mean, var, out=out)
    case = Case("instance", (1, 5, 1, 3))
    check_updates(case, np.random.default_rng(1).normal(size=case.dims), np.zeros(5), np.ones(5))


@pytest.mark.parametrize(
    "case",
    [
        *(Case(norm, (1025, 3)) for norm in ("layer", "rms")),
        *(Case(norm, (1025, 2, 2)) for norm in ("instance", "group")),
        Case("layer", (65536, 2)),
        Case("instance", (65536, 1, 2)),
    ],
    ids=str,
)
def test_row_20_many_samples(rng, case):
    """PT#2917, #19911, ORT#7095, MX#4997: N > 1024, > 65535."""
    check(case, case.data(rng, np.float32), case.data(rng, np.float32), *case.pair(rng))


@pytest.mark.parametrize("case", [Case("layer", (1, 65537)), Case("group", (1, 65538, 2), 3)], ids=str)
def test_row_21_many_channels(rng, case):
    """cunn#298: 65536 and more."""
    check(case, case.data(rng, np.float32), case.data(rng, np.float32), *case.pair(rng))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16], ids=type_id)
@pytest.mark.parametrize("length", [15, 16, 17, 31, 33, 255, 256, 257, 511, 513, 1023, 1025, 2049])
def test_row_23_tails(rng, length, dtype):
    """MIO PR916, #1109: rows whose ends were not read. Outputs are full of NaN before."""
    lines = rng.normal(size=(3, length))
    for case, x in of_lines(lines, dtype):
        dy = case.data(rng, dtype)
        check(case, x, dy, *case.pair(rng), out=np.empty_like(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "reversed_channels"])
@pytest.mark.parametrize("channels", [1, 2, 3, 31, 33, 63, 65, 129])
def test_row_24_channels(rng, channels, layout):
    """apex#1768, PT PR57077: channels last, C = 65, and all channels from 64 on wrong."""
    dims = (3, channels, 2, 3)
    groups = [g for g in (1, 3, channels) if channels % g == 0]
    cases = [Case("layer", dims, 3), Case("rms", dims, 3), Case("instance", dims)]
    for case in cases + [Case("group", dims, g) for g in dict.fromkeys(groups)]:
        lay = LAYOUTS[layout]
        x, dy = lay(case.data(rng, np.float32)), lay(case.data(rng, np.float32))
        check(case, x, dy, *case.pair(rng))


@pytest.mark.parametrize("layout", [*FEW_LAYOUTS, "memory2301"])
@pytest.mark.parametrize("of_gradient", ["contiguous", "channels_last", "memory1320"])
@EACH
def test_row_27_pairs_of_layouts(rng, case, layout, of_gradient):
    """PT#64039, PR64100, #115940: x channels-first and grad_out channels-last, or the other way round."""
    lay = LAYOUTS | permutations(4)
    for dtype in (np.float32, np.float16):
        x, dy = lay[layout](case.data(rng, dtype)), lay[of_gradient](case.data(rng, dtype))
        forward = case.forward(x)
        check_backward(case, dy, x, case.parameter(rng, np.float32), mean=forward.mean, invstd=forward.invstd)


@IN_EVERY_TYPE
@EACH
def test_row_29_broadcast_gradients(rng, case, dtype):
    """PT#1866: the gradient of a sum has stride 0."""
    x = case.data(rng, dtype)
    one = np.broadcast_to(np.ones((), dtype), x.shape)
    forward = case.forward(x)
    used = {"mean": forward.mean, "invstd": forward.invstd}
    gradients = check_backward(case, one, x, **used)
    check_backward(case, one, x, case.parameter(rng, np.float32), **used)
    if case.norm != "rms":
        shared = x.size // np.prod(case.parameters)
        assert (gradients.bias == shared).all()
    per_sample = np.broadcast_to(rng.normal(size=(3, 1, 1, 1)).astype(dtype), x.shape)
    check_backward(case, per_sample, x, **used)


@pytest.mark.parametrize(
    "aliased", list(itertools.product(("running_mean", "running_var"), ("weight", "bias"))), ids="-".join
)
def test_row_32_a_running_statistic_that_is_a_parameter(rng, aliased):
    """ORT#29790: it was written before out was computed with it."""
    x = rng.normal(size=(3, 4, 5))
    arguments = {name: rng.uniform(1, 2, 4) for name in ("running_mean", "running_var", "weight", "bias")}
    statistic, parameter = aliased
    arguments[parameter] = arguments[statistic].copy()
    expected = nbbn.instance_norm(x, **{k: v.copy() for k, v in arguments.items()})
    updated = {k: v.copy() for k, v in arguments.items()}
    nbbn.instance_norm(x, **updated)
    arguments[parameter] = arguments[statistic]
    assert_same_bits(nbbn.instance_norm(x, **arguments), expected)
    assert_same_bits(arguments[statistic], updated[statistic])


@IN_EVERY_TYPE
@pytest.mark.parametrize("layout", FEW_LAYOUTS)
def test_row_33_biased_and_unbiased(rng, layout, dtype):
    """MX#14357, mlx PR3817, tinygrad PR807: n = 2 and 3, where the factor is 2 and 1.5."""
    for dims in ((4, 3, 2), (2, 3, 3), (1, 2, 1, 3)):
        case = Case("instance", dims)
        mean, var = running_statistics(rng, case.channels)
        check_updates(case, LAYOUTS[layout](case.data(rng, dtype)), mean, var, momentum=1.0)


@IN_EVERY_TYPE
@EACH
def test_row_43_read_only(rng, case, dtype):
    """NB#4511: read-only arrays are read; as `out` they are an error."""
    x, dy = (read_only(case.data(rng, dtype)) for _ in range(2))
    weight, bias = (None if v is None else read_only(v) for v in case.pair(rng))
    forward = check_forward(case, x, weight, bias)
    used = {"mean": read_only(forward.mean), "invstd": read_only(forward.invstd)}
    check_backward(case, dy, x, weight, **used)
    before = bits(x)
    for call in (
        lambda: case.call(x, out=x),
        lambda: case.forward(x, out=x),
        lambda: case.backward(dy, x, out=x, **used),
    ):
        with pytest.raises(ValueError, match=r"\bout\b"):
            call()
    assert bits(x) == before


@IN_EVERY_TYPE
@pytest.mark.parametrize("poison", [np.inf, -np.inf, np.nan])
def test_row_46_batches_that_are_not_finite(rng, dtype, poison):
    """PT#88474, #115500: what is not finite is passed on, in its channel; momentum 1 brings that back."""
    batch = Case("instance", (4, 5, 7)).data(rng, dtype)
    dirty = batch.copy()
    dirty[1, 3, 3] = poison
    clean = running_statistics(rng, 5)
    spoilt = tuple(v.copy() for v in clean)
    with np.errstate(all="ignore"):
        outs = [nbbn.instance_norm(batch, *clean), nbbn.instance_norm(dirty, *spoilt)]
    others = [0, 1, 2, 4]
    assert_same_bits(outs[1][:, others], outs[0][:, others])
    assert_same_bits(outs[1][[0, 2, 3], 3], outs[0][[0, 2, 3], 3])  # the other instances of this channel
    for before, after in zip(clean, spoilt, strict=True):
        assert not np.isfinite(after[3])
        assert_same_bits(after[others], before[others])
    for statistics in (clean, spoilt):
        nbbn.instance_norm(batch, *statistics, momentum=1.0)
    assert_same_bits(spoilt, clean)
