"""What some rows of the bug bank run on, on the CPU and on the simulated kernels for GPUs alike.

A row is a function `(rng, dtype)` that yields calls, small enough for the emulator. What each row is about
is said in test_bugbank.py.
"""

import itertools
from typing import NamedTuple

import numpy as np

from cases import Shape, activations, columns_for, parameter, running_statistics
from reference import finfo


class Call(NamedTuple):
    """The arguments of batch normalization in all of its modes."""

    x: np.ndarray
    grad_out: np.ndarray
    weight: np.ndarray | None
    bias: np.ndarray | None
    running_mean: np.ndarray
    running_var: np.ndarray
    eps: float = 1e-5
    axis: int = 1

    @property
    def channels(self):
        return self.x.shape[self.axis]

    @property
    def count(self):
        return self.x.size // self.channels


def call(rng, x, axis=1, **given):
    """Return a call on x, random in all that is not given."""
    channels = x.shape[axis]
    mean, var = running_statistics(rng, channels)
    others = {
        "grad_out": activations(rng, Shape(x.shape, axis), x.dtype),
        "weight": parameter(rng, channels, np.float32),
        "bias": parameter(rng, channels, np.float32),
        "running_mean": mean,
        "running_var": var,
    }
    return Call(x=x, axis=axis, **others | given)


def simulated(python, seed, check):
    """Run a check of simulated.py, with all blocks of a kernel under way at once."""
    code = f"import simulated\nsimulated.emulate({seed})\nsimulated.check_{check}"
    python(code, timeout=600, NUMBA_ENABLE_CUDASIM="1")


def largest(dtype):
    return float(finfo(dtype).max)


def columns_and_planes(lines, dtype):
    """Yield arrays whose channels are these lines of numbers: side by side, and one after the other."""
    lines = np.asarray(lines, np.float64).astype(dtype)
    yield np.ascontiguousarray(lines.T)
    yield lines[None].copy()


def offsets(rng, dtype):
    for offset, sigma in [*itertools.product((10.0, 1e3, 1e5, 1e7), (1.0, 0.01)), (5.0, 0.1)]:
        if offset < largest(dtype):
            x = activations(rng, Shape((5, 3, 4, 9)), dtype, offset, sigma)
            mean = offset + sigma * rng.normal(size=3)
            yield call(rng, x, running_mean=mean, running_var=sigma**2 * rng.uniform(0.5, 2, 3))


def small_steps(rng, dtype):
    ramp = 100 + 1e-3 * np.arange(16)
    for x in columns_and_planes([ramp, -ramp, ramp[::-1]], dtype):
        yield call(rng, x, running_mean=np.array([100.0, -100.0, 100.01]), running_var=np.full(3, 2e-5))
    # The smallest steps that there are: the mean lies between two neighbours, and is neither.
    steps = np.tile([0, 1, 1, 0, 1], 8)
    step = 64 * float(finfo(dtype).eps)
    for x in columns_and_planes([100 + step * steps, 100 - step * steps, 100 + step * (steps + 1)], dtype):
        yield call(rng, x, running_mean=np.full(3, 100.0), running_var=np.full(3, step**2), eps=step**2 / 8)
    # And the first values far from all others, in such steps: no guess at the mean.
    far = np.where(np.arange(100) < 8, 0, 10 + np.arange(100) % 2)
    for x in columns_and_planes([100 + step * far, 100 - step * far, 100 + step * far[::-1]], dtype):
        yield call(rng, x, running_mean=np.full(3, 100.0), running_var=np.full(3, step**2), eps=step**2 / 8)


def constants(rng, dtype):
    values = np.array([c for c in (0.1, 100.0, 1e10) if c < largest(dtype)])
    for count in (2, 3, 9, 49, 1000):
        for x in columns_and_planes(np.repeat(values[:, None], count, axis=1), dtype):
            given = values.astype(dtype).astype(np.float64)
            yield call(rng, x, running_mean=given, running_var=given**2)


def uniform(rng, dtype, count=1000):
    for x in columns_and_planes(rng.random((2, count)), dtype):
        yield call(rng, x)


def large_sums(rng, dtype, count=200):
    signs = np.where(np.arange(count) % 2, -1.0, 1.0)
    for x in columns_and_planes([200 * signs, -200 * signs], dtype):
        yield call(rng, x, grad_out=np.full_like(x, 300))


def large_variances(rng, dtype):
    for x in columns_and_planes(rng.choice([-300.0, 0.0, 300.0], (3, 50)), dtype):
        for types in itertools.product((np.float32, np.float64), repeat=2):
            mean, var = np.array([7e4, -7e4, 0], types[0]), np.full(3, 1e5, types[1])
            yield call(rng, x, running_mean=mean, running_var=var)


def order_of_products(rng, dtype):
    """In float32: x = -6.8e35, and weight · x more than there is, but weight · invstd · x is 1.8e38."""
    if dtype == np.float64:
        return  # its squares are too much for the oracle
    x = np.full((2, 3, 4), -0.002 * largest(dtype), dtype)
    x[:, :, ::2] *= -1
    weight, var = np.full(3, -2282, np.float32), np.full(3, 1 / 0.117**2)
    nothing = np.zeros(3)
    yield call(rng, x, grad_out=x, weight=weight, running_mean=nothing, running_var=var, eps=0.0)
    near = np.zeros_like(x)  # and with such an invstd in training
    near[:1], near[1:] = 1 / 0.117, -1 / 0.117
    yield call(rng, near, grad_out=x, weight=weight, running_mean=nothing, running_var=var, eps=0.0)


def magnitudes(rng, dtype):
    """From 1e-5 to 1e15, or as far as half of the type's range goes."""
    top = min(15.0, np.log10(largest(dtype)) / 2)
    for shape in (Shape((6, 3, 9)), Shape((40, 4))):
        size = [rng.choice([-1, 1], shape.dims) * 10 ** rng.uniform(-5, top, shape.dims) for _ in range(2)]
        yield call(rng, size[0].astype(dtype), grad_out=size[1].astype(dtype))


def epsilons(rng, dtype):
    """The variance from far below eps to far above."""
    for eps in (0.0, 1e-300, 1e-12, 1e-5, 0.1, 10.0):
        for var in (1e-10, 1e-6, 1.0, 1e3):
            x = activations(rng, Shape((3, 4, 11)), dtype, sigma=var**0.5)
            yield call(rng, x, running_var=np.full(4, var, np.float32), eps=eps)


def one_image(rng, dtype):
    for dims in ((1, 5, 2), (1, 4, 1, 3), (1, 2, 5, 7)):
        yield call(rng, activations(rng, Shape(dims), dtype))


def one_value(rng, dtype):
    """For evaluation; in training it is an error."""
    for dims in ((1, 5), (1, 4, 1, 1)):
        yield call(rng, activations(rng, Shape(dims), dtype))


def two_values(rng, dtype):
    """And three: m/(m - 1) is 2 and 1.5."""
    for dims in ((2, 5), (1, 4, 2), (3, 5), (1, 4, 1, 3)):
        yield call(rng, activations(rng, Shape(dims), dtype))


def strided_statistics(rng, dtype):
    mean, var = np.zeros(10), np.full(10, np.nan, np.float32)
    var[::2] = 1
    x = activations(rng, Shape((4, 5, 6)), dtype)
    yield call(rng, x, running_mean=mean[::-2], running_var=var[::2])


def types_of_parameters(rng, dtype):
    """None, float32, float64, and x's own."""
    kinds = columns_for(dtype)
    for shape in (Shape((4, 5, 7)), Shape((9, 4, 19), 2)):
        for weight, bias in itertools.product((None, *kinds), repeat=2):
            for statistics in itertools.product(kinds, repeat=2):
                mean, var = running_statistics(rng, shape.channels, statistics)
                yield call(
                    rng,
                    activations(rng, shape, dtype, offset=10),
                    shape.axis,
                    weight=parameter(rng, shape.channels, weight),
                    bias=parameter(rng, shape.channels, bias),
                    running_mean=mean,
                    running_var=var,
                )


ROWS = {
    1: offsets,
    2: small_steps,
    3: constants,
    4: uniform,
    5: large_sums,
    6: large_variances,
    8: order_of_products,
    9: magnitudes,
    10: epsilons,
    13: one_image,
    31: strided_statistics,
    33: two_values,
    37: types_of_parameters,
}
"""Rows that are nothing but such calls, held against the oracle in every mode."""


# --- NIST's reference data sets for univariate statistics ------------------------------------------


def numacc(first, low, high):
    return [first] + [low, high] * 500


MAVRO_COUNTS = (3, 5, 9, 4, 3, 5, 4, 3, 2, 1, 1, 2, 2, 4, 2)
MAVRO = [round(2.0013 + 0.0001 * step, 4) for step, times in enumerate(MAVRO_COUNTS) for _ in range(times)]

# Mean and population variance of the data as each type stores them.
NIST = {
    "NumAcc1": (
        [10000001.0, 10000003.0, 10000002.0],
        {np.float64: (10000002.0, 2 / 3), np.float32: (10000002.0, 2 / 3)},
    ),
    "NumAcc2": (
        numacc(1.2, 1.1, 1.3),
        {
            np.float64: (1.2000000000000000665, 0.00999000999000998557),
            np.float32: (1.19999998813861614, 0.00999000284459931016),
        },
    ),
    "NumAcc3": (
        numacc(1000000.2, 1000000.1, 1000000.3),
        {
            np.float64: (1000000.20000000001158, 0.00999000999698793137),
            np.float32: (1000000.21871878121878, 0.00878125683008300390),
        },
    ),
    "NumAcc4": (
        numacc(10000000.2, 10000000.1, 10000000.3),
        {
            np.float64: (10000000.2000000001853, 0.00999001010165705221),
            np.float32: (10000000.0, 0.0),
        },
    ),
}
SIDE_BY_SIDE = ["NumAcc2", "NumAcc3", "NumAcc4"]


def nist_side_by_side(dtype):
    """A set a channel: 1001 = 7 · 11 · 13."""
    return np.stack([np.array(NIST[name][0], dtype).reshape(7, 11, 13) for name in SIDE_BY_SIDE], axis=1)
