"""The CUDA kernels, run by Numba's simulator on arrays in host memory, against the oracle.

Imported in a process of its own, with NUMBA_ENABLE_CUDASIM=1: see test_cuda_kernels.py. Blocks are shrunk, so
that small arrays are cut into several parts and sums go through several steps; the simulator takes
milliseconds for every barrier.
"""

import itertools

import numpy as np

import bank
import reference
from cases import DTYPES, HALF, POISON, in_range, type_id, with_types
from checks import assert_same_bits, assert_within, check_updates
from nbbn.cuda import plan, target
from nbbn.cuda.run import Run
from nbbn.dtypes import storage_of
from nbbn.problem import Problem
from reference import rows

plan.THREADS, plan.LANES, plan.RADIX, plan.WARP = 8, 2, 2, 2
plan.BLOCKS, plan.FINISHERS = 6, (1, 2, 4)
plan.RESIDENT_THREADS = ((1 << 9, 4), (1 << 62, 8))
plan.TILE_BYTES, plan.TEAM_BYTES = 16, 64

ABSENT = (0, 0, 0)


def _address(array):
    return array.__array_interface__["data"][0]


def _parameter(array):
    return ABSENT if array is None else (_address(array), array.strides[0], storage_of(array.dtype).code)


def _last(shape, axis, dtype):
    """Channels side by side in memory."""
    others = [n for d, n in enumerate(shape) if d != axis]
    return np.moveaxis(np.full([*others, shape[axis]], POISON, dtype), -1, axis)


def _inside(shape, axis, dtype):
    """Part of a larger array, in every dimension."""
    whole = np.full([n + 2 for n in shape], POISON, dtype)
    return whole[tuple(slice(1, n + 1) for n in shape)]


def _backwards(shape, axis, dtype):
    """Every other element, from the end to the beginning."""
    return np.full([*shape[:-1], 2 * shape[-1]], POISON, dtype)[..., ::-2]


def _shifted(shape, axis, dtype):
    """At no multiple of 16 bytes."""
    return np.full(np.prod(shape) + 1, POISON, dtype)[1:].reshape(shape)


LAYOUTS = {
    "contiguous": lambda shape, axis, dtype: np.full(shape, POISON, dtype),
    "last": _last,
    "inside": _inside,
    "backwards": _backwards,
    "shifted": _shifted,
}


class Case:
    """Arrays of one shape, each in a layout, and the operations on them."""

    eps = 1e-5

    def __init__(self, rng, shape, axis, dtype, layouts, offset=0.0):
        self.axis = axis
        self.channels = channels = shape[axis]
        self.x, self.dy, self.out = (LAYOUTS[name](shape, axis, dtype) for name in layouts)
        self.x[...] = rng.standard_normal(shape) + offset
        self.dy[...] = rng.standard_normal(shape) + 0.5
        self.weight = rng.standard_normal(channels).astype(np.float32)
        self.bias = rng.standard_normal(2 * channels)[::-2]
        self.running_mean, self.running_var = np.zeros(channels, np.float32), np.ones(channels)
        self.count = self.x.size // channels

    def run(self, *arrays):
        """Return what runs the stages on x and these arrays."""
        strides = tuple(a.strides for a in (self.x, *arrays))
        return Run(Problem(self.x.shape, self.axis, strides, storage_of(self.x.dtype), 1, "cuda:0"))

    def stats(self):
        """Statistics alone."""
        found = np.full((3, self.channels), np.nan)
        self.run().stats(_address(self.x), _address(found))
        return found

    def forward(self, mean=None, var=None, weight=None, bias=None, momentum=0.1):
        """Training; the running statistics, if any, are updated."""
        self.out[...] = np.nan
        found = np.full((3, self.channels), np.nan)
        parameters = (_parameter(a) for a in (weight, bias, mean, var))
        run = self.run(self.out)
        numbers = self.eps, momentum, 1.0
        run.forward(_address(self.x), _address(self.out), _address(found), *parameters, *numbers)
        return found

    def evaluate(self, mean, var, weight=None, bias=None):
        """Evaluation."""
        self.out[...] = np.nan
        parameters = (_parameter(a) for a in (weight, bias, mean, var))
        self.run(self.out).evaluate(_address(self.x), _address(self.out), *parameters, self.eps)

    def backward(self, mean, invstd, weight=None, training=True):
        """Gradients of weight and bias; that of x is in out."""
        self.out[...] = np.nan
        found = np.full((2, self.channels), np.nan)
        parameters = (_parameter(a) for a in (weight, mean, invstd))
        run = self.run(self.dy, self.out)
        run.backward(
            _address(self.x), _address(self.dy), _address(self.out), _address(found), *parameters, training
        )
        return found

    def check_statistics(self, found, expected):
        """Hold mean and var against the oracle."""
        dtype = self.x.dtype
        assert_within("mean", found[0][:, None], expected.mean, reference.mean_tolerance(expected))
        assert_within("var", found[1][:, None], expected.var, reference.var_tolerance(expected, dtype))

    def check(self, parameters=True):
        """Run every operation and hold all results against the oracle."""
        weight, bias = (self.weight, self.bias) if parameters else (None, None)
        before = self.x.copy()
        self.check_evaluation(self.running_mean, self.running_var, weight, bias)
        mean, invstd = self.running_mean, 1 / np.sqrt(self.running_var.astype(float) + self.eps)
        self.check_backward(mean, invstd, weight, training=False)
        if self.count > 1:
            found = self.check_training(weight, bias)
            self.check_backward(found[0], found[2], weight, training=True)
            self.check_backward(found[0], found[2], weight, training=False)
        assert_same_bits(self.x, before)

    def check_training(self, weight, bias):
        """Hold statistics and output against the oracle, and the update of the running statistics."""
        dtype = self.x.dtype
        expected = reference.forward(self.x, weight, bias, eps=self.eps, axis=self.axis)
        self.check_statistics(self.stats(), expected)
        kept = [v.copy() for v in (self.running_mean, self.running_var)]
        found = self.forward(self.running_mean, self.running_var, weight, bias)
        self.check_statistics(found, expected)
        tolerance = reference.invstd_tolerance(expected, dtype)
        assert_within("invstd", found[2][:, None], expected.invstd, tolerance)
        tolerance = reference.out_tolerance(expected, dtype)
        assert_within("out", rows(self.out, self.axis), expected.out, tolerance)
        constant = expected.var.hi[:, 0] == 0
        assert not found[1][constant].any()
        assert (rows(self.out, self.axis) == reference.rounded_once(expected.bias, dtype))[constant].all()
        check_updates((self.running_mean, self.running_var), kept, found, self.count, 0.1)
        self.running_mean[...], self.running_var[...] = kept
        return found

    def check_evaluation(self, mean, var, weight, bias):
        """Hold the output against the oracle."""
        self.evaluate(mean, var, weight, bias)
        expected = reference.evaluate(self.x, mean, var, weight, bias, eps=self.eps, axis=self.axis)
        tolerance = reference.out_tolerance(expected, self.x.dtype)
        assert_within("out", rows(self.out, self.axis), expected.out, tolerance)

    def check_backward(self, mean, invstd, weight, training):
        """Hold the gradients against the oracle."""
        dtype = self.x.dtype
        gradients = self.backward(mean, invstd, weight, training)
        expected = reference.backward(
            self.dy, self.x, weight, mean=mean, invstd=invstd, axis=self.axis, training=training
        )
        tolerance = reference.grad_weight_tolerance(expected, dtype)
        assert_within("grad_weight", gradients[0][:, None], expected.weight, tolerance)
        tolerance = reference.grad_bias_tolerance(expected, dtype)
        assert_within("grad_bias", gradients[1][:, None], expected.bias, tolerance)
        tolerance = reference.grad_x_tolerance(expected, dtype)
        assert_within("grad_x", rows(self.out, self.axis), expected.x, tolerance)


def forms(case):
    """Return which of the ways through the arrays its plans take."""
    plans = [case.run(case.out).plan, case.run(case.dy, case.out).plan]
    return {
        (
            "columns" if one.columns else "rows",
            "vectors" if one.width > 1 else "elements",
            "parts" if one.general.cut.parts > 1 else "one part",
            "several channels" if form.lanes * form.own > 1 else "one channel",
            "general" if form is one.general else "team" if form.teams else "resident",
        )
        for one in plans
        for form in {one.general, one.resident} - {None}
    }


# Two and three values in a channel, channels of whole vectors and not, few channels and many.
SHAPES = [
    ((2, 3), 1),
    ((1, 3, 3), 1),
    ((3, 4, 1, 1), 1),
    ((3, 2, 9, 5), 1),
    ((2, 2, 8, 12), 1),
    ((3, 5, 4, 4), 1),
    ((5, 3, 7, 1), 1),
    ((21, 8), 1),
    ((37, 3), -1),
    ((2, 3, 4, 5), 2),
    # One channel, and numbers of channels at which the last block has few of them.
    ((7, 1), 1),
    ((9, 2), 1),
    ((5, 31), 1),
    ((3, 33, 2, 1), 1),
    ((2, 65), 1),
    ((3, 129), 1),
    # Many short channels, of which a block takes several.
    ((3, 33, 1, 2), 1),
    ((2, 65, 3), 1),
    ((1, 31, 2, 2), 1),
    ((4, 17, 2, 4), 1),
]


def emulate(seed):
    """From now on, run kernels in the emulator, whose blocks can wait for each other."""
    import functools

    import emulator

    emulator.EMULATOR.order.seed(seed)
    device = target.properties(0)._replace(cooperative=True, multiprocessors=7)
    target.properties = lambda number: device
    target._launcher = functools.cache(emulator.Launcher)


def check_teams(seed):
    """Several blocks share a tile: too long for one block, or one of few."""
    device = target.properties(0)._replace(shared=1200)
    target.properties = lambda number: device
    rng = np.random.default_rng(seed)
    teams = set()
    for shape, layout in (
        ((2, 9, 8, 8), "contiguous"),
        ((4, 3, 7, 7), "contiguous"),
        ((3, 2, 6, 8), "contiguous"),
        ((1, 1, 9, 20), "inside"),
        ((5, 2, 1, 31), "backwards"),
        ((4, 2, 4, 8), "shifted"),
        ((2, 16, 9, 4), "last"),
        ((3, 33, 5, 7), "last"),
        ((70, 10), "shifted"),
        ((61, 12), "inside"),
        ((129, 2), "contiguous"),
    ):
        for dtype in (np.float32, np.float64, HALF[rng.integers(2)]):
            case = Case(rng, shape, 1, dtype, [layout] * 3, offset=rng.choice([0.0, 1e3]))
            case.check()
            for one in (case.run(case.out), case.run(case.dy, case.out)):
                form = one.plan.resident
                if form is not None and form.teams:
                    tiles = -(-case.channels // (form.lanes * form.own))
                    ragged = case.channels % (form.lanes * form.own) > 0
                    several = "several tiles" if form.teams < tiles else "one tile"
                    teams.add((form.columns, form.own > 1, several, "ragged" if ragged else "whole"))
            first = case.forward()
            out = case.out.copy()
            assert_same_bits((case.forward(), case.out.copy()), (first, out))
    columns = {team[1:] for team in teams if team[0]}
    assert {team[2] for team in teams if not team[0]} == {"several tiles", "one tile"}, teams
    assert {(True, "several tiles", "whole"), (False, "several tiles", "ragged")} <= columns, teams


def check_shape(seed, index, dtype):
    """Check one shape in all layouts, x's among them."""
    shape, axis = SHAPES[index]
    axis %= len(shape)
    rng = np.random.default_rng([seed, index])
    for layout in LAYOUTS:
        others = rng.choice(list(LAYOUTS), 2) if rng.random() < 0.4 else (layout, layout)
        case = Case(rng, shape, axis, np.dtype(dtype), (layout, *others), offset=rng.choice([0.0, 1e3]))
        case.check(parameters=bool(rng.random() < 0.8))


def check_shapes(seed):
    """Check all of them, each in one of the types."""
    for index in range(len(SHAPES)):
        check_shape(seed, index, type_id(DTYPES[(index + seed) % len(DTYPES)]))


def all_forms():
    """Return the forms that the shapes go through where all arrays have the same layout."""
    rng = np.random.default_rng(0)
    return set().union(
        *(
            forms(Case(rng, shape, axis % len(shape), dtype, [layout] * 3))
            for shape, axis in SHAPES
            for layout in LAYOUTS
            for dtype in DTYPES
        )
    )


def check_constants():
    """A constant channel has variance 0 and gives its bias, exactly, at any mean."""
    for shape, layout in (
        ((3, 3, 5, 7), "contiguous"),
        ((13, 3, 1, 1), "last"),
        ((2, 2, 9, 11), "contiguous"),
    ):
        for dtype in DTYPES:
            case = Case(np.random.default_rng(0), shape, 1, dtype, [layout] * 3)
            values = (in_range(1e7, dtype) + np.arange(case.channels) / 3).astype(dtype)
            case.x[...] = values[:, None, None]
            found = case.forward(bias=values)
            assert not found[1].any()
            assert_same_bits(case.out, np.broadcast_to(values[:, None, None], shape).copy())


def check_offsets(seed):
    """Accurate at any mean, and with one value that outweighs all others."""
    for layout in ("contiguous", "last"):
        for offset, dtype in with_types(10.0, 1e5, 1e7):
            rng = np.random.default_rng([seed, int(offset)])
            case = Case(rng, (4, 3, 6, 5), 1, dtype, [layout] * 3, offset)
            case.x[rng.integers(4), 1, 2, 3] = in_range(1e4 * offset, dtype)
            case.check()


def check_isolation(seed):
    """What is not finite stays in its channel; the others keep their bits."""
    for layout in ("contiguous", "last"):
        rng = np.random.default_rng(seed)
        case = Case(rng, (3, 3, 4, 5), 1, np.float32, [layout] * 3)
        results = []
        for value in (1.0, np.nan, np.inf):
            case.x[1, 1, 2, 3] = value
            found = case.forward()
            out = case.out.copy()
            gradients = case.backward(found[0], found[2])
            others = np.array([0, 2])
            results.append((found[:, others], out[:, others], gradients[:, others], case.out[:, others]))
            if not np.isfinite(value):
                assert np.isnan(out[:, 1]).all() and np.isnan(found[1, 1])
        assert_same_bits(results[0], results[1])
        assert_same_bits(results[0], results[2])


def check_bits(seed):
    """The same bits on every run, wherever the arrays begin."""
    for dtype in DTYPES:
        for shape, way in (((3, 4, 4, 8), "rows"), ((9, 16), "columns")):
            found = []
            for layout in ("contiguous", "contiguous", "shifted"):
                case = Case(np.random.default_rng(seed), shape, 1, dtype, [layout] * 3, 100.0)
                stats = case.forward()
                out = case.out.copy()
                gradients = case.backward(stats[0], stats[2])
                found.append((stats, out, gradients, np.ascontiguousarray(case.out)))
            assert {form[:2] for form in forms(case)} == {(way, "vectors")}
            assert_same_bits(found[0], found[1])
            assert_same_bits(found[0], found[2])


def check_roundings(seed):
    """Of 16 bits, every number survives, and what lies between two goes to the nearer one, ties to even.

    The last place of a float64 decides, which a float32 in between would lose.
    """
    rng = np.random.default_rng(seed)
    for dtype in HALF:
        patterns = np.arange(rng.integers(1, 97), 1 << 16, 97).astype(np.uint16)
        with np.errstate(all="ignore"):
            patterns = patterns[patterns.view(dtype).astype(np.float32) != 0]  # 0 + -0 gives up the sign
            finite = np.isfinite([patterns.view(dtype), (patterns + np.uint16(1)).view(dtype)]).all(axis=0)
        low = patterns[finite]
        near, far = (pattern.view(dtype).astype(np.float64) for pattern in (low, low + np.uint16(1)))
        ties = (near + far) / 2
        weight = np.concatenate([ties, np.nextafter(ties, near), np.nextafter(ties, far)])
        expected = np.concatenate([low + low % np.uint16(2), low, low + np.uint16(1)])
        for x, weights, result in (
            (patterns.view(dtype), np.ones(len(patterns)), patterns),
            (np.ones(len(weight), dtype), weight, expected),
        ):
            for count in (1, 8):  # elements and vectors
                case = Case(rng, (1, len(x), count), 1, dtype, ["contiguous"] * 3)
                case.x[...], case.eps = x[:, None], 0.0
                case.evaluate(np.zeros(len(x)), np.ones(len(x)), weights)
                with np.errstate(invalid="ignore"):
                    found, nan = case.out[0], np.isnan(result.view(dtype))
                    assert np.isnan(found[nan]).all()
                assert (found.view(np.uint16)[~nan] == result[~nan, None]).all()


def check_cancellation(seed):
    """Where terms all but cancel, results of 16 bits are as good as others: see test_half.py."""
    rng = np.random.default_rng(seed)
    for dtype, layout in itertools.product(HALF, ("contiguous", "last")):
        case = Case(rng, (4, 5, 2, 8), 1, dtype, [layout] * 3, offset=3.0)
        case.x[0] = 1e-3 * case.x[0].astype(np.float32)
        found = case.stats()
        weight = np.sqrt(found[1] + case.eps)
        for sign in (1, -1):  # out = x, and -x
            expected = reference.forward(case.x, sign * weight, sign * found[0], eps=case.eps)
            case.forward(weight=sign * weight, bias=sign * found[0])
            tolerance = reference.out_tolerance(expected, case.x.dtype)
            assert_within("out", rows(case.out), expected.out, tolerance)
        # dy is a line of x, but for a little: so is grad_x, around 0.
        case.dy[...] = case.x.astype(np.float32) * (1 + 1e-3 * rng.standard_normal(case.x.shape))
        case.check_backward(found[0], 1 / weight, None, training=True)


def check_running(seed):
    """At momentum 1 the old statistics are gone, NaN or not; each may be missing."""
    rng = np.random.default_rng(seed)
    for layout in ("contiguous", "last"):
        case = Case(rng, (3, 3, 4, 5), 1, np.float32, [layout] * 3)
        mean, var = np.full(3, np.nan), np.full(3, np.nan, np.float32)
        found = case.forward(mean, None, momentum=1.0)
        assert_same_bits(mean, found[0].copy())
        case.forward(None, var, momentum=1.0)
        assert_same_bits(var, (found[1] * (60 / 59)).astype(np.float32))
    # Of 16 bits, rounded once: these means lie beside a tie, by less than a float32 shows.
    for dtype in HALF:
        eps = float(reference.finfo(dtype).eps)
        odd, sign = np.array([0, 0, 1, 1]), np.array([1, -1, 1, -1])
        case = Case(rng, (4, 4), 1, dtype, ["contiguous"] * 3)
        case.x[...] = [4 + 4 * eps * odd, np.full(4, 2 * eps), sign * 2.0**-24, np.zeros(4)]
        mean = np.zeros(4, dtype)
        case.forward(mean, None, momentum=1.0)
        assert (mean.astype(float) == 1 + eps * (odd + (sign > 0))).all()


# --- the bug bank: see test_bugbank.py ---------------------------------------------------------------


class BankCase(Case):
    """A call of the bank, each of its arrays in a layout."""

    def __init__(self, call, layouts):
        shape, self.axis = call.x.shape, call.axis
        self.channels, self.count, self.eps = call.channels, call.count, call.eps
        self.x, self.dy, self.out = (LAYOUTS[name](shape, call.axis, call.x.dtype) for name in layouts)
        self.x[...], self.dy[...] = call.x, call.grad_out
        self.weight, self.bias = call.weight, call.bias
        self.running_mean, self.running_var = call.running_mean, call.running_var


def check_row(seed, row):
    """Check some calls of a row of the bank, in every mode and two types: in one layout, and in a mix."""
    rng = np.random.default_rng([seed, row])
    for dtype in (DTYPES[k] for k in rng.permutation(len(DTYPES))[:2]):
        calls = list(bank.ROWS[row](rng, dtype))
        for call in (calls[k] for k in rng.permutation(len(calls))[:7]):
            layout, *mix = rng.choice(list(LAYOUTS), 4)
            for layouts in ([layout] * 3, mix):
                BankCase(call, layouts).check()


def small_shapes(rng, dtypes=(np.float32, np.float64)):
    """Rows in parts and resident, columns, and teams if there are any."""
    for shape, layout in (((3, 5, 4, 4), "contiguous"), ((37, 3), "contiguous"), ((3, 4, 9, 5), "inside")):
        for dtype in dtypes:
            yield Case(rng, shape, 1, dtype, [layout] * 3, offset=rng.choice([0.0, 1e3]))


def check_aliases(seed):
    """Row 32: a parameter that is also a running statistic is read before the statistic is written."""
    rng = np.random.default_rng(seed)
    for shared in (1 << 10, (16 << 10) - 512, (16 << 10) - 1):  # one block holds a channel, a team does, none
        target.RESERVED = shared
        for case in small_shapes(rng, (np.float32, HALF[seed % 2])):
            for statistic, parameter in itertools.product(("mean", "var"), ("weight", "bias")):
                values = rng.uniform(0.5, 2.0, case.channels).astype(np.float32)
                alone = values.copy()
                expected = case.forward(**{statistic: alone, parameter: values.copy()}, momentum=0.5)
                out = case.out.copy()
                found = case.forward(**{statistic: values, parameter: values}, momentum=0.5)
                assert_same_bits((found, case.out.copy(), values), (expected, out, alone))


def check_calls(seed):
    """Row 36: nothing is left of one call in the next."""
    rng = np.random.default_rng(seed)
    for case in small_shapes(rng, (np.float32, HALF[seed % 2])):
        mean, invstd = rng.standard_normal(case.channels), rng.uniform(0.5, 2, case.channels)
        for training in (True, False):
            first = case.backward(mean, invstd, training=training)
            grad_x = case.out.copy()
            case.dy, case.x = case.x, case.dy
            case.backward(mean, invstd, training=training)
            case.dy, case.x = case.x, case.dy
            again = case.backward(mean, invstd, training=training)
            assert_same_bits((again, case.out.copy()), (first, grad_x))


def check_pairs(seed):
    """Rows 27 and 29: x and grad_out in all pairs of layouts; grad_out with stride 0."""
    rng = np.random.default_rng(seed)
    for k, pair in enumerate(itertools.product(LAYOUTS, repeat=2)):
        dtype = DTYPES[rng.integers(len(DTYPES))]
        case = Case(rng, (2, 3, 2, 4), 1, dtype, (*pair, rng.choice(list(LAYOUTS))))
        if k % 5 == 4:
            case.dy = np.broadcast_to(case.dy[:1, :, :1, :1], case.x.shape)
        case.check()


def check_identities(seed):
    """x → 2ᵏx with eps → 4ᵏ eps leaves the output, and x → -x with bias 0 turns it round, to the bit."""
    rng = np.random.default_rng(seed)
    for case in small_shapes(rng):
        results = {}
        for factor in (1.0, -1.0, 2.0**-20, 2.0**6):
            case.x *= case.x.dtype.type(factor)
            case.eps = 1e-5 * factor**2
            found = case.forward(weight=case.weight)
            out = case.out.copy()
            gradients = case.backward(found[0], found[2], case.weight)
            units = np.array([factor, factor**2, 1 / abs(factor)])
            plain = found / units[:, None], out * np.sign(factor), case.out * abs(factor)
            results[factor] = (*plain, gradients * np.array([[np.sign(factor)], [1]]))
            case.x /= case.x.dtype.type(factor)
        for factor, result in results.items():
            for one, other in zip(result, results[1.0], strict=True):
                np.testing.assert_array_equal(one, other, err_msg=f"{factor}")


def check_nist():
    """The sets whose mean is up to 2³⁰ times their deviation, a set a channel."""
    for dtype in (np.float32, np.float64):
        values = bank.nist_side_by_side(dtype)
        for layout in ("contiguous", "last"):
            case = Case(np.random.default_rng(0), values.shape, 1, dtype, [layout] * 3)
            case.x[...] = values
            case.check_training(case.weight, case.bias)
