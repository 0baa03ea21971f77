"""The bug bank: faults that shipped in other people's batch normalization, and what is right instead.

The rows are numbered. Each has a test that names it and where it was seen, or stands in ELSEWHERE with the
tests that prove it. PT is pytorch/pytorch, TF tensorflow/tensorflow, MX apache/mxnet, NB numba/numba, MIO
ROCm/MIOpen, ORT microsoft/onnxruntime.

What a row runs on is in bank.py, for the CPU and the simulated CUDA kernels alike: on the CPU in every
layout, on both in every mode and type. The types of half precision are those in cases.HALF.
"""

import ctypes
import itertools
import operator
import pathlib
import re
import types

import numba
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

import bank
import nbbn
import reference
from bank import call, largest, simulated
from cases import (
    CHANNELS,
    DTYPES,
    LAYOUTS,
    READ_LAYOUTS,
    STRADDLING,
    Shape,
    activations,
    in_every_layout,
    odd_strides_of_ones,
    permutations,
    read_only,
    running_statistics,
    some_channels,
    type_id,
)
from checks import (
    assert_same_bits,
    assert_within,
    check_backward,
    check_evaluation,
    check_forward,
    check_statistics,
    check_updates,
    unchanged,
)
from nbbn import compiler
from nbbn.cuda import target
from reference import column, finfo, rows

ELSEWHERE = {
    1: (  # on larger arrays than here, and with one value that outweighs all others
        "test_accuracy::test_offsets",
        "test_accuracy::test_one_outlier",
        "test_evaluation::test_large_means",
        "test_cuda_kernels::test_properties",
    ),
    12: (  # symengine#1453: an import turned on flush-to-zero for the whole process
        "test_processes::test_subnormal_numbers_stay_numbers",
        "test_accuracy::test_subnormal_values",
    ),
    14: (  # PT#12013, #120803, PR95324: an empty batch gave NaN statistics, or SIGFPE
        "test_forward::test_empty_input",
        "test_evaluation::test_empty_input",
        "test_backward::test_empty_input",
        "test_stats::test_empty_input",
        "test_running::test_empty_batch_changes_nothing",
    ),
    15: (  # cupy#2104, NB#4140, #5017: an empty array on a GPU, a null pointer, a launch of no blocks
        "test_devices::test_empty",
        "test_devices::test_module_empty_batch",
    ),
    16: ("test_errors::test_module_with_other_channels",),  # PT#72821: num_features=5 took C=0
    17: (  # PT#194798, #169208, #85217: short or empty statistics or parameters, read out of bounds
        "test_errors::test_one_bad_argument",
        "test_errors::test_module_state",
    ),
    18: ("test_errors::test_one_bad_argument",),  # PT#141203, #194014: evaluation without statistics crashed
    19: (  # PT#105458: rank 1
        "test_errors::test_one_bad_argument",
        "test_errors::test_module_input",
    ),
    25: ("test_layouts::test_x_in_every_layout",),  # PT#63224: a permuted input, a reordered output
    26: (  # PT#62594: channels-last float16 in evaluation was wrong, and nothing else
        "test_layouts::test_x_in_every_layout",
        "test_layouts::test_out_in_every_layout",
    ),
    28: ("test_layouts::test_x_in_every_layout",),  # PT#133520: x[1:], x[:, 2:5], x[..., ::2]
    30: (  # inplace_abn#155: in place, over an input that something else still read
        "test_out::test_out_that_overlaps_x",
        "test_out::test_out_that_is_grad_out",
        "test_out::test_out_that_overlaps_a_column",
        "test_out::test_out_of_backward_that_overlaps_a_column",
        "test_out::test_out_is_x_and_overlaps_a_parameter",
    ),
    32: ("test_running::test_a_buffer_that_is_also_a_parameter",),  # ORT#29790; on CUDA: test_cuda_properties
    34: (  # PT#15298: momentum's meaning was turned round
        "test_running::test_update",
        "test_running::test_momentum_zero_keeps_every_bit",
        "test_running::test_momentum_one_replaces",
        "test_running::test_cumulative_average",
        "test_cuda_kernels::test_properties",
    ),
    38: (  # NNlib.jl#435, NB#2919: NaN became 0 in a fused relu, or was left out by fastmath
        "test_reproducible::test_poison_stays_in_its_channel",
        "test_reproducible::test_poison_in_grad_out_stays_in_its_channel",
        "test_reproducible::test_poison_in_a_parameter_stays_in_its_channel",
        "test_cuda_kernels::test_properties",
    ),
    39: (  # PT#110361, PR115285: a state without the counter reset it; old pickles
        "test_module::test_state_without_the_counter",
        "test_module::test_state_round_trip",
        "test_module::test_copies",
        "test_torch::test_state_in_both_directions",
        "test_errors::test_module_state",
    ),
    41: (  # NB#8563, #9288, #7872: workqueue aborts on two threads, and hangs after a fork
        "test_processes::test_threads_at_once",
        "test_processes::test_first_calls_at_once",
        "test_processes::test_fork",
        "test_processes::test_workers",
    ),
    42: (  # NB PR8359, #4807, #10128: stale code of callees in other files; writers at the same time
        "test_cache::test_edited_helper_is_compiled_anew",
        "test_cache::test_processes_with_one_fresh_cache",
        "test_cache::test_killed_process_leaves_a_usable_cache",
    ),
    44: (  # TF#22398, neon#193: float atomics, other bits on each run
        "test_reproducible::test_twenty_runs",
        "test_cuda_kernels::test_properties",
        "test_gpu::test_twenty_runs_give_equal_bits",
    ),
    45: (  # NB PR5162, #7706: which stream an array's producer is on, and who waits for whom
        "test_devices::test_current_stream_of_the_library",
        "test_devices::test_stream_of_a_numba_array",
        "test_devices::test_arrays_of_other_libraries_are_waited_for",
        "test_devices::test_numba_arrays_of_two_streams",
        "test_devices::test_busy_array_without_a_driver_to_order_it",
    ),
}
"""Row → where it is seen, and the tests that prove it, of these and of a part of the rows below."""


@pytest.mark.parametrize("row", range(1, 47))
def test_every_row_has_its_tests(row):
    own = [name for name in globals() if name.startswith(f"test_row_{row:02}_")]
    assert own or row in ELSEWHERE
    for test in ELSEWHERE.get(row, ()):
        file, name = test.split("::")
        source = pathlib.Path(__file__).with_name(f"{file}.py").read_text()
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), test


# --- a row in every mode ---------------------------------------------------------------------------


def check(call, layout=np.ascontiguousarray):
    """Hold a call against the oracle in every mode, with x, grad_out and out in a layout."""
    x, dy, out = (layout(a) for a in (call.x, call.grad_out, np.zeros_like(call.x)))
    out = out if out.flags.writeable else None
    common = {"axis": call.axis, "out": out}
    mean, var = call.running_mean, call.running_var
    check_evaluation(x, mean, var, call.weight, call.bias, eps=call.eps, **common)
    invstd = 1 / np.sqrt(var.astype(np.float64) + call.eps)
    check_backward(dy, x, call.weight, mean=mean, invstd=invstd, training=False, **common)
    if call.count < 2:
        return
    result = check_forward(x, call.weight, call.bias, eps=call.eps, **common)
    values = rows(x, call.axis)
    constant = (values == values[:, :1]).all(axis=1)
    assert not result.var[constant].any()
    bias = column(call.bias, 0.0, call.channels).astype(x.dtype)
    assert (rows(result.out, call.axis) == bias)[constant].all()
    old = mean.copy(), var.copy()
    nbbn.batch_norm(x, mean, var, call.weight, call.bias, True, 0.3, call.eps, **common)
    check_updates((mean, var), old, result[1:3], call.count, 0.3)
    mean[...], var[...] = old
    used = {"mean": result.mean, "invstd": result.invstd}
    gradients = check_backward(dy, x, call.weight, **used, **common)
    assert not gradients.weight[constant].any()


def check_row(row, rng, dtype, layout):
    for one in bank.ROWS[row](rng, dtype):
        check(one, LAYOUTS[layout])


IN_EVERY_TYPE = pytest.mark.parametrize("dtype", DTYPES, ids=type_id)


@pytest.mark.parametrize("row", bank.ROWS, ids="row_{:02}".format)
def test_cuda(python, seed, row):
    pytest.importorskip("greenlet")
    simulated(python, seed, f"row({seed}, {row})")


@pytest.mark.parametrize(
    "check",
    [
        pytest.param("aliases({seed})", id="row_32"),
        pytest.param("calls({seed})", id="row_36"),
        pytest.param("pairs({seed})", id="row_27"),
    ],
)
def test_cuda_properties(python, seed, check):
    pytest.importorskip("greenlet")
    simulated(python, seed, check.format(seed=seed))


# --- statistics ------------------------------------------------------------------------------------


@in_every_layout
def test_row_01_offsets(rng, layout, dtype):
    """TF#118701, flax#1491, keras PR18795, TF#3290: E[x²] - E[x]² is negative far from zero."""
    check_row(1, rng, dtype, layout)


@in_every_layout
def test_row_02_small_steps(rng, layout, dtype):
    """burn#5607: 100 + i · 1e-3, 16 values: finite, and wrong by 1.03. No NaN is not enough."""
    check_row(2, rng, dtype, layout)


@in_every_layout
def test_row_03_constants(rng, layout, dtype):
    """caffe#3963, PT#8283, PT#5410: a constant channel gave small garbage, not its bias."""
    check_row(3, rng, dtype, layout)


@in_every_layout
def test_row_03_constants_of_a_plane(layout, dtype):
    """Exact: the mean, the variance, and the bias as output; each channel a constant of its own."""
    constants = [c for c in (0.1, 1e7 + 1, -3.3, 1e-20, 7e20, 1 / 3) if abs(c) < largest(dtype)]
    values = np.array(constants, dtype)
    x = LAYOUTS[layout](np.broadcast_to(values[:, None, None], (5, len(values), 11, 13)).astype(dtype))
    result = nbbn.batch_norm_forward(x, bias=values.astype(np.float64))
    assert result.mean.tolist() == values.astype(float).tolist()
    assert not result.var.any()
    assert (rows(result.out) == values[:, None]).all()


@in_every_layout
def test_row_04_uniform(rng, layout, dtype):
    check_row(4, rng, dtype, layout)


@pytest.mark.parametrize("form", ["planes", "columns"])
def test_row_04_forty_million_values(form):
    """PT#54293, #54921, #59987: the output is off by 0.012 for 3.8e7 uniform values a channel.

    In steps of 2⁻¹⁶, for which mean and variance are known: (n - 1)/2 and (n² - 1)/12.
    """
    line = np.arange(65536, dtype=np.float32) / 65536
    x = np.broadcast_to(line, (600, 1, 65536))
    if form == "columns":
        x = np.broadcast_to(np.stack([line, line[::-1]], axis=1), (600, 65536, 2)).transpose(0, 2, 1)
    stats = nbbn.batch_stats(x)
    assert stats.count == 39_321_600
    assert (np.abs(stats.mean - 65535 / 131072) <= 2**-53).all()
    var = (65536**2 - 1) / 12 / 65536**2
    bound = reference.depth(stats.count) * 2**-24 * var
    assert (np.abs(stats.var - var) <= bound).all()
    if form == "planes":
        dy = np.broadcast_to(np.float32(0.1), x.shape)
        out = np.full_like(x, np.nan, subok=False)
        invstd = 1 / np.sqrt(stats.var)
        result = nbbn.batch_norm_backward(dy, x, mean=stats.mean, invstd=invstd, out=out)
        assert result.bias[0] == 39_321_600 * float(np.float32(0.1))
        assert np.abs(out).max() <= 8 * 2**-24 * invstd[0]  # dy - grad_bias/m is 0
        nbbn.batch_norm_forward(x, eps=0.0, out=out)
        expected = (line.astype(float) - 65535 / 131072) / np.sqrt(var)
        assert np.abs(out - expected).max() <= 25 * 2**-24 * 1.8


@IN_EVERY_TYPE
@pytest.mark.parametrize("form", [0, 1], ids=["columns", "planes"])
def test_row_05_large_sums(rng, form, dtype):
    """PT#126525, #195701: x = ±200 and dy = 300, 1e5 times; sums in float16 overflow."""
    one = list(bank.large_sums(rng, dtype, count=100_000))[form]
    check(one)
    result = nbbn.batch_norm_forward(one.x)
    assert (result.mean.tolist(), result.var.tolist()) == ([0.0] * 2, [40_000.0] * 2)
    used = {"mean": result.mean, "invstd": result.invstd}
    assert nbbn.batch_norm_backward(one.grad_out, one.x, **used).bias.tolist() == [3e7] * 2


@in_every_layout
def test_row_06_large_variances(rng, layout, dtype):
    """coreai-torch#54: a running_var above 65504, cast to float16, is infinite."""
    check_row(6, rng, dtype, layout)


@IN_EVERY_TYPE
@pytest.mark.parametrize(
    "shape", [Shape((70_000, 2)), Shape((7, 2, 10_000)), Shape((7, 10_000, 2), -1)], ids=str
)
def test_row_07_counts(rng, shape, dtype):
    """TF PR30230, PT#70901: a count of 70000 held in float16 is infinite, and the mean NaN."""
    x = activations(rng, shape, dtype)
    one = call(rng, x, shape.axis)
    check(one)
    result = nbbn.batch_norm_forward(x, axis=shape.axis)
    assert type(result.count) is int and result.count == 70_000


@in_every_layout
def test_row_08_order_of_products(rng, layout, dtype):
    """PT#106941: weight · (x - mean) first is more than there is; weight · invstd first is not."""
    check_row(8, rng, dtype, layout)
    weight, invstd = -2282.0, 0.117
    # What is to be had of 1.8e38 in float32: right to the three roundings that there are.
    x = LAYOUTS[layout](np.full((3, 2, 5), -0.00199 * largest(dtype), dtype))
    gamma, var = np.full(2, weight, np.float32), np.full(2, 1 / invstd**2)
    expected = float(x[0, 0, 0]) * (weight * invstd)
    out = nbbn.batch_norm(x, np.zeros(2), var, gamma, eps=0.0)
    gradient = nbbn.batch_norm_backward(
        x, x, gamma, mean=np.zeros(2), invstd=np.full(2, invstd), training=False
    ).x
    for values in (out, gradient):
        assert np.unique(values).size == 1
        assert abs(float(values[0, 0, 0]) / expected - 1) <= 4 * float(finfo(dtype).eps)


@in_every_layout
def test_row_09_magnitudes(rng, layout, dtype):
    """Paddle PR16545: fixed-point atomics overflow at 1e15."""
    check_row(9, rng, dtype, layout)


# --- eps -------------------------------------------------------------------------------------------


@in_every_layout
def test_row_10_eps(rng, layout, dtype):
    """chainer PR2214, nntrainer#677, jax PR443: eps left out in evaluation, or kept in running_var."""
    check_row(10, rng, dtype, layout)


@in_every_layout
def test_row_11_zero_eps(rng, layout, dtype):
    """TF#8090, #37768, PT PR1742: eps below 1e-5 was refused or changed. 1/0 is inf, inf · 0 is NaN.

    For what is refused, negative and NaN, see test_errors.py.
    """
    x = activations(rng, Shape((4, 3, 7)), dtype)
    x[1, 1, 2] = 0
    signs = np.sign(x[:, 1].astype(float))
    x = LAYOUTS[layout](x)
    mean, var = np.zeros(3), np.array([1.0, 0.0, 2.0])
    out = nbbn.batch_norm(x, mean, var, eps=0)
    assert np.isnan(out[1, 1, 2])
    assert (out[:, 1][signs != 0] == np.copysign(np.inf, signs)[signs != 0]).all()
    assert_same_bits(out[:, [0, 2]], nbbn.batch_norm(x, mean, var + [0, 1, 0], eps=0)[:, [0, 2]])
    # A constant in training has no scale either.
    plain = nbbn.batch_norm_forward(x, eps=0)
    x[:, 1] = 3
    result = nbbn.batch_norm_forward(x, eps=0)
    assert result.invstd[1] == np.inf and result.var[1] == 0
    assert np.isnan(result.out[:, 1]).all()
    assert_same_bits(result.out[:, [0, 2]], plain.out[:, [0, 2]])


# --- shapes ----------------------------------------------------------------------------------------


@in_every_layout
def test_row_13_one_value(rng, layout, dtype):
    """PT#1381, PR2961, TF#34062: one value a channel in training made running_var NaN.

    Refused, before anything is written; evaluation works, and so does one image of several values.
    """
    check_row(13, rng, dtype, layout)
    for one in bank.one_value(rng, dtype):
        check(one, LAYOUTS[layout])
        x, out = LAYOUTS[layout](one.x), np.full_like(one.x, np.nan)
        with (
            unchanged(x, out, one.running_mean, one.running_var),
            pytest.raises(ValueError, match=r"\bx\b.*one value per channel"),
        ):
            nbbn.batch_norm(x, one.running_mean, one.running_var, training=True, out=out)


FLAT = ("contiguous", "fortran", "every_second", "reversed")


def check_some(rng, shape, dtype, layout):
    """Check every mode in a sample of the channels."""
    channels = some_channels(rng, shape)
    one = call(rng, activations(rng, shape, dtype, offset=3), shape.axis)
    x, dy, out = (LAYOUTS[layout](a) for a in (one.x, one.grad_out, np.zeros_like(one.x)))
    common = {"axis": shape.axis, "out": out, "channels": channels}
    result = check_forward(x, one.weight, one.bias, **common)
    check_evaluation(x, one.running_mean, one.running_var, one.weight, one.bias, **common)
    for training in (True, False):
        used = {"mean": result.mean, "invstd": result.invstd, "training": training}
        check_backward(dy, x, one.weight, **used, **common)


@pytest.mark.parametrize("layout", FLAT)
@pytest.mark.parametrize("count", [1025, 65536, 131071])
def test_row_20_long_batches(rng, count, layout):
    """PT#2917, #19911, ORT#7095, MX#4997: N beyond 1024, 65535, 131070."""
    shape = Shape((count, 2)) if rng.random() < 0.5 else Shape((count, 1, 2))
    check_some(rng, shape, DTYPES[rng.integers(len(DTYPES))], layout)


@pytest.mark.parametrize("layout", FLAT)
@pytest.mark.parametrize("channels", [65535, 65536, 70_000])
def test_row_21_many_channels(rng, channels, layout):
    """cunn#298: a launch of 65536 blocks."""
    for shape in (Shape((3, channels)), Shape((2, channels, 1, 2)), Shape((2, 2, channels), -1)):
        check_some(rng, shape, DTYPES[rng.integers(len(DTYPES))], layout)


LAUNCHES = """
import math, numpy as np
from nbbn.cuda.run import Run
from nbbn.dtypes import STORAGES
from nbbn.problem import Problem
for dims in {dims}:
    for storage in STORAGES:
        for order in (range(len(dims)), (0, *range(2, len(dims)), 1)):
            steps, strides = storage.dtype.itemsize, [0] * len(dims)
            for d in reversed(list(order)):
                strides[d], steps = steps, steps * dims[d]
            run = Run(Problem(dims, 1, (tuple(strides),) * 3, storage, 1, "cuda:0"))
            plan = run.plan
            forms = [plan.general, plan.finish, run._channels] + [plan.resident] * (plan.resident is not None)
            for form in forms:
                assert 0 < form.blocks < 2**31 and 0 < form.threads <= 1024, (dims, form)
            cut = plan.general.cut
            tiles, rest = divmod(plan.general.blocks, cut.parts)
            wide = plan.general.lanes * plan.general.own
            assert rest == 0 and tiles * wide >= dims[1], (dims, plan.general)
            covered = cut.part * cut.parts
            assert covered >= (plan.outer if plan.columns else plan.outer * plan.inner), (dims, cut)
            assert cut.parts <= plan.finish.threads // plan.finish.lanes
            assert plan.finish.blocks * plan.finish.lanes >= dims[1]
            assert run._channels.blocks * run._channels.threads >= dims[1]
"""


@pytest.mark.parametrize(
    "dims",
    [
        pytest.param([(n, 3, 2) for n in (1025, 65536, 131071)], id="row_20"),
        pytest.param([(2, c, 3) for c in (65535, 65536, 70_000)], id="row_21"),
        pytest.param([(512 * 397, 1, 10565), (512 * 397, 5, 2113), (3, 2**22, 1031)], id="row_22"),
    ],
)
def test_cuda_launches(python, dims):
    """In one dimension of at most 2³¹ - 1 blocks, which together come to every element."""
    python(LAUNCHES.format(dims=dims), NUMBA_ENABLE_CUDASIM="1")


BEYOND = (512 * 397, 1, 10565)  # 2³¹ + 512


@pytest.mark.parametrize("form", ["planes", "columns"])
def test_row_22_statistics_of_more_values_than_32_bits_count(rng, form):
    """PT PR181600, MX#19065, NB#9229: 2³¹ + 512 values, of which only some are in memory."""
    line = rng.normal(size=(5, 2113)).astype(np.float32) + np.float32(3)
    x, lines = np.broadcast_to(line.reshape(-1), BEYOND), line.reshape(1, 1, -1)
    if form == "columns":
        x, lines = np.broadcast_to(line.T, (512 * 397, 2113, 5)).transpose(0, 2, 1), line[None]
    stats = nbbn.batch_stats(x)
    expected = reference.forward(lines)
    expected.count = 2**31 + 512 if form == "planes" else (2**31 + 512) // 5
    check_statistics(stats, expected, np.float32)


@IN_EVERY_TYPE
@pytest.mark.parametrize("shape", [Shape((2, 3, 4)), Shape((2, 5), 0), Shape((3, 2, 17), 1)], ids=str)
def test_row_22_strides_beyond_32_bits(rng, tmp_path, shape, dtype):
    """Elements 2³¹ apart, in files of which only a few pages exist."""
    step = 2**31 + 24
    names = itertools.count()
    far = shape.dims.index(2)

    def sparse(a):
        file = np.memmap(tmp_path / str(next(names)), dtype, "w+", shape=(step + a.size,))
        near = np.empty([1 if d == far else n for d, n in enumerate(a.shape)], dtype).strides
        strides = [step * a.itemsize if d == far else near[d] for d in range(a.ndim)]
        view = as_strided(np.asarray(file), a.shape, strides)
        view[...] = a
        return view

    check(call(rng, activations(rng, shape, dtype), shape.axis), sparse)


@pytest.mark.slow
def test_row_22_more_elements_than_32_bits_count(rng):
    """All of them in memory, 9 GB, and written: in place, forwards and backwards."""
    line = rng.normal(size=10565).astype(np.float32) + np.float32(3)
    x = np.empty(BEYOND, np.float32)
    x[...] = line
    nbbn.set_recycling(0)
    few = np.broadcast_to(line, (2, 1, 10565))
    expected = reference.forward(few)
    places = [0, 1, 512 * 397 // 2, 512 * 397 - 2, 512 * 397 - 1]
    result = nbbn.batch_norm_forward(x, out=x)
    assert result.count == 2**31 + 512
    for place in places:
        tolerance = reference.out_tolerance(expected, np.float32)[:, :10565]
        assert (expected.out.distance(np.tile(x[place], 2))[:, :10565] <= tolerance).all()
    x[...] = line
    used = {"mean": result.mean, "invstd": result.invstd}
    dy = rng.normal(size=10565).astype(np.float32)
    gradients = nbbn.batch_norm_backward(np.broadcast_to(dy, BEYOND), x, out=x, **used)
    oracle = reference.backward(np.broadcast_to(dy, few.shape), few, **used)
    for place in places:
        tolerance = reference.grad_x_tolerance(oracle, np.float32)[:, :10565]
        assert (oracle.x.distance(np.tile(x[place], 2))[:, :10565] <= tolerance).all()
    share = (2**31 + 512) / (2 * 10565)
    for name in ("weight", "bias"):
        tolerance = getattr(reference, f"grad_{name}_tolerance")(oracle, np.float32) * share * 3
        assert abs(getattr(gradients, name)[0] - getattr(oracle, name).hi[0, 0] * share) <= tolerance[0, 0]


@pytest.mark.gpu
@pytest.mark.skipif(target.SIMULATED or target.why_not() is not None, reason="no GPU")
def test_row_22_more_elements_than_32_bits_count_on_a_gpu(rng):
    """In place, in the smallest type that there is."""
    cuda = numba.cuda
    dtype = min(DTYPES, key=lambda t: np.dtype(t).itemsize)
    line = (rng.normal(size=10565) + 3).astype(dtype)
    x = cuda.device_array(BEYOND, dtype)
    some = np.broadcast_to(line, (397, 1, 10565)).copy()
    for first in range(0, BEYOND[0], 397):
        x[first : first + 397].copy_to_device(some)
    expected = reference.forward(np.broadcast_to(line, (2, 1, 10565)))
    assert nbbn.batch_norm_forward(x, out=x).count == 2**31 + 512
    tolerance = reference.out_tolerance(expected, dtype)[:, :10565]
    for place in (0, 1, BEYOND[0] // 2, BEYOND[0] - 1):
        found = x[place : place + 1].copy_to_host().reshape(1, -1)
        assert (expected.out.distance(np.tile(found, 2))[:, :10565] <= tolerance).all()


@IN_EVERY_TYPE
@pytest.mark.parametrize("layout", FLAT + ("channels_last",))
def test_row_23_tails(rng, layout, dtype):
    """MIO PR916, #1109: planes of 257 to 512, whose ends were not read; N > 768.

    Outputs are full of NaN before: see checks.py.
    """
    planes = [Shape((3, 2, n)) for n in (257, 289, 300, 383, 449, 511)]
    for shape in [*STRADDLING[::2], *planes, Shape((769, 3, 5)), Shape((2, 3, 17, 19))]:
        check(call(rng, activations(rng, shape, dtype), shape.axis), LAYOUTS[layout])


@IN_EVERY_TYPE
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "some_channels", "reversed_channels"])
def test_row_24_channels(rng, layout, dtype):
    """apex#1768, PT PR57077: channels last, C = 65, and all channels from 64 on wrong."""
    for channels in {shape.channels for shape in CHANNELS}:
        shape = Shape((3, channels, 2, 4))
        check(call(rng, activations(rng, shape, dtype), shape.axis), LAYOUTS[layout])


# --- layouts ---------------------------------------------------------------------------------------

PAIRS = READ_LAYOUTS | {name: permutations(4)[name] for name in ("memory2301", "memory1320")}


@pytest.mark.parametrize("grad_layout", PAIRS)
@pytest.mark.parametrize("layout", PAIRS)
def test_row_27_pairs_of_layouts(rng, layout, grad_layout):
    """PT#64039, PR64100, #115940: x channels-first and grad_out channels-last, or the other way round."""
    shape = Shape((3, 5, 2, 7))
    for dtype in DTYPES:
        x = PAIRS[layout](activations(rng, shape, dtype, offset=5))
        dy = PAIRS[grad_layout](activations(rng, shape, dtype))
        mean, invstd = rng.normal(5, 1, size=5), rng.uniform(0.5, 2, 5)
        for training in (True, False):
            check_backward(dy, x, mean=mean, invstd=invstd, training=training)


@IN_EVERY_TYPE
def test_row_27_axes_of_length_one(rng, dtype):
    """Their strides mean nothing: see also test_layouts.py."""
    for dims in ((1, 5, 1, 6), (4, 1, 3, 1), (2, 5, 1, 1)):
        for layout in (odd_strides_of_ones, LAYOUTS["channels_last"], LAYOUTS["fortran"]):
            check(call(rng, activations(rng, Shape(dims), dtype)), layout)


@IN_EVERY_TYPE
@pytest.mark.parametrize("layout", READ_LAYOUTS)
def test_row_29_broadcast_gradients(rng, layout, dtype):
    """PT#1866: the gradient of a sum has stride 0. Nothing of it is left in grad_x in training."""
    x = READ_LAYOUTS[layout](activations(rng, Shape((4, 5, 3, 7)), dtype))
    one = np.broadcast_to(np.ones((), dtype), x.shape)
    per_channel = np.broadcast_to(rng.normal(size=(5, 1, 1)).astype(dtype), x.shape)
    mean, invstd = rng.normal(size=5), rng.uniform(0.5, 2, 5)
    for dy in (one, per_channel):
        for training in (True, False):
            check_backward(dy, x, mean=mean, invstd=invstd, training=training)
    assert nbbn.batch_norm_backward(one, x, mean=mean, invstd=invstd).bias.tolist() == [84.0] * 5


@in_every_layout
def test_row_31_strided_statistics(rng, layout, dtype):
    """PT#33867: running statistics that are not contiguous were updated in a copy, which was dropped."""
    check_row(31, rng, dtype, layout)


@in_every_layout
def test_row_33_biased_and_unbiased(rng, layout, dtype):
    """MX#14357, mlx PR3817, tinygrad PR807: the biased variance normalizes, the unbiased one is tracked."""
    check_row(33, rng, dtype, layout)
    x = LAYOUTS[layout](np.array([[3.0, -1.0], [5.0, -9.0]], dtype))
    mean, var = np.zeros(2), np.zeros(2)
    assert nbbn.batch_norm(x, mean, var, training=True, momentum=1.0, eps=0).tolist() == [[-1, 1], [1, -1]]
    assert (mean.tolist(), var.tolist()) == ([4.0, -5.0], [2.0, 32.0])


# --- gradients -------------------------------------------------------------------------------------


@in_every_layout
def test_row_35_the_two_formulas(rng, layout, dtype):
    """PT#586, xla#913, MX#18209: training's gradient in evaluation, or the other way round.

    Evaluation's is weight · invstd · dy, whatever x is.
    """
    shape = Shape((6, 3, 8))
    x, dy = (LAYOUTS[layout](activations(rng, shape, dtype)) for _ in range(2))
    weight, invstd = rng.normal(size=3), rng.uniform(0.5, 2, 3)
    arguments = {"weight": weight, "mean": rng.normal(size=3), "invstd": invstd}
    evaluation = nbbn.batch_norm_backward(dy, x, training=False, **arguments)
    scaled = rows(dy).astype(float) * (weight * invstd)[:, None]
    half = float(finfo(dtype).smallest_subnormal) / 2
    bound = 4 * float(finfo(dtype).eps) * np.abs(scaled) + half
    assert_within("grad_x", rows(evaluation.x), scaled, bound)
    training = nbbn.batch_norm_backward(dy, x, **arguments)
    assert np.abs(training.x.astype(float) - evaluation.x.astype(float)).max() > 1e-2
    assert_same_bits(training[1:], evaluation[1:])


@in_every_layout
def test_row_36_nothing_accumulates(rng, layout, dtype):
    """MX#16297: grad_bias grew from call to call."""
    x, dy = (LAYOUTS[layout](activations(rng, Shape((5, 3, 20)), dtype)) for _ in range(2))
    used = {"mean": rng.normal(size=3), "invstd": rng.uniform(0.5, 2, 3)}
    for training in (True, False):
        first = nbbn.batch_norm_backward(dy, x, training=training, **used)
        nbbn.batch_norm_backward(x, dy, training=training, **used)
        assert_same_bits(tuple(nbbn.batch_norm_backward(dy, x, training=training, **used)), tuple(first))


# --- types, threads, memory ------------------------------------------------------------------------


@IN_EVERY_TYPE
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_second"])
def test_row_37_types_of_parameters(rng, layout, dtype):
    """PT#61924, #193698, #156513: mixed precision with affine off, and statistics of two types."""
    check_row(37, rng, dtype, layout)


@pytest.mark.parametrize("tasks", [1, 2, 7, 16, 100])
def test_row_40_every_task_is_done_once(tasks):
    """NB#3681, #9829: += in a prange, into one cell, loses updates. There is one loop, and no sum in it.

    Compared with the same function as Python. For the bits on several threads: test_reproducible.py.
    """
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3, ctypes.c_void_p)
    threads = compiler.pool.threads()
    for shares in range(1, tasks + 1):
        done, expected = [], []
        task = signature(lambda *arguments, done=done: done.append(arguments[:3]))
        at = ctypes.cast(task, ctypes.c_void_p).value
        compiler._parallel_loop().over(at, min(threads, shares), shares, tasks, 77)()
        names = {
            "_number_at": operator.getitem,
            "invoke": lambda _, *arguments, to=expected: to.append(arguments),
        }
        share = types.FunctionType(compiler._share.__code__, names)
        share([0], [shares], None, [at, shares, tasks, 77])
        assert sorted(done) == expected
        assert [k for first, last, _ in sorted(done) for k in range(first, last)] == list(range(tasks))


@IN_EVERY_TYPE
def test_row_43_read_only(rng, dtype):
    """NB#4511: read-only arrays were refused. They are read; as `out` or to be updated they are an error."""
    one = call(rng, activations(rng, Shape((4, 5, 6)), dtype))
    arrays = [read_only(a) for a in one[:6]]
    x, dy, weight, bias, mean, var = arrays
    with unchanged(*arrays):
        result = check_forward(x, weight, bias)
        check_evaluation(x, mean, var, weight, bias)
        for training in (True, False):
            used = {"mean": read_only(result.mean), "invstd": read_only(result.invstd)}
            check_backward(dy, x, weight, training=training, **used)
        for wrong in (
            lambda: nbbn.batch_norm_forward(one.x, out=x),
            lambda: nbbn.batch_norm(one.x, mean, var, out=x),
            lambda: nbbn.batch_norm_backward(one.grad_out, one.x, out=x, **used),
            lambda: nbbn.batch_norm(one.x, mean, one.running_var, training=True),
            lambda: nbbn.batch_norm(one.x, one.running_mean, var, training=True),
        ):
            with pytest.raises(ValueError, match=r"out|running_mean|running_var"):
                wrong()


@in_every_layout
@pytest.mark.parametrize("poison", [np.inf, -np.inf, np.nan])
def test_row_46_batches_that_are_not_finite(rng, layout, dtype, poison):
    """PT#88474, #115500: one Inf, and the running statistics are lost for ever.

    In its channel they are: what is not finite is passed on, and there is no option to skip it or to raise
    an error. No other channel is touched, then or later, and momentum 1 brings the lost one back.
    """
    batches = [activations(rng, Shape((4, 5, 7)), dtype) for _ in range(3)]
    clean = running_statistics(rng, 5)
    spoilt = tuple(v.copy() for v in clean)
    others = [0, 1, 2, 4]
    for k, batch in enumerate(batches):
        dirty = batch.copy()
        if k == 1:
            dirty[1, 3, 3] = poison
        outs = [
            nbbn.batch_norm(LAYOUTS[layout](x), *statistics, training=True)
            for x, statistics in ((batch, clean), (dirty, spoilt))
        ]
        outs += [nbbn.batch_norm(batch, *statistics) for statistics in (clean, spoilt)]
        assert_same_bits(outs[1][:, others], outs[0][:, others])
        assert_same_bits(outs[3][:, others], outs[2][:, others])
        for before, after in zip(clean, spoilt, strict=True):
            assert np.isfinite(after[3]) == (k == 0)
            assert_same_bits(after[others], before[others])
    for statistics in (clean, spoilt):
        nbbn.batch_norm(batches[0], *statistics, training=True, momentum=1.0)
    assert_same_bits(spoilt, clean)
