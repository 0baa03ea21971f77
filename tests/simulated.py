"""The CUDA kernels, run by Numba's simulator on arrays in host memory, against the oracle.

Imported in a process of its own, with NUMBA_ENABLE_CUDASIM=1: see test_cuda_kernels.py. Blocks are shrunk, so
that small arrays are cut into several parts and sums go through several steps; the simulator takes
milliseconds for every barrier.
"""

import numpy as np

import reference
from cases import POISON
from checks import assert_same_bits, assert_within
from nbbn.cuda import plan, target
from nbbn.cuda.run import Run
from nbbn.dispatch import Problem
from reference import rows

plan.THREADS, plan.LANES, plan.RADIX, plan.WARP = 8, 2, 2, 2
plan.BLOCKS, plan.FINISHERS = 6, (1, 2, 4)
plan.RESIDENT_THREADS = ((1 << 9, 4), (1 << 62, 8))
plan.TILE_BYTES, plan.TEAM_BYTES = 16, 64

ABSENT = (0, 0, 0)


def _address(array):
    return array.__array_interface__["data"][0]


def _parameter(array):
    return ABSENT if array is None else (_address(array), array.strides[0], array.itemsize)


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

    def __init__(self, rng, shape, axis, dtype, layouts, offset=0.0):
        self.axis = axis
        self.channels = channels = shape[axis]
        self.x, self.dy, self.out = (LAYOUTS[name](shape, axis, dtype) for name in layouts)
        self.x[...] = rng.standard_normal(shape) + offset
        self.dy[...] = rng.standard_normal(shape) + 0.5
        self.weight = rng.standard_normal(channels).astype(np.float32)
        self.bias = rng.standard_normal(2 * channels)[::-2]
        self.count = self.x.size // channels

    def run(self, *arrays):
        """Return what runs the stages on x and these arrays."""
        strides = tuple(a.strides for a in (self.x, *arrays))
        return Run(Problem(self.x.shape, self.axis, strides, self.x.dtype, 1, "cuda:0"))

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
        run.forward(_address(self.x), _address(self.out), _address(found), *parameters, 1e-5, momentum, 1.0)
        return found

    def evaluate(self, mean, var, weight=None, bias=None):
        """Evaluation."""
        self.out[...] = np.nan
        parameters = (_parameter(a) for a in (weight, bias, mean, var))
        self.run(self.out).evaluate(_address(self.x), _address(self.out), *parameters, 1e-5)

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
        dtype = self.x.dtype
        weight, bias = (self.weight, self.bias) if parameters else (None, None)
        before = self.x.copy()
        expected = reference.forward(self.x, weight, bias, axis=self.axis)
        self.check_statistics(self.stats(), expected)
        mean, var = np.zeros(self.channels, np.float32), np.ones(self.channels)
        found = self.forward(mean, var, weight, bias)
        self.check_statistics(found, expected)
        tolerance = reference.invstd_tolerance(expected, dtype)
        assert_within("invstd", found[2][:, None], expected.invstd, tolerance)
        tolerance = reference.out_tolerance(expected, dtype)
        assert_within("out", rows(self.out, self.axis), expected.out, tolerance)
        np.testing.assert_allclose(mean, 0.1 * found[0], rtol=1e-6, atol=1e-300)
        new = found[1] * self.count / (self.count - 1)
        np.testing.assert_allclose(var, 0.9 + 0.1 * new, rtol=1e-12)

        self.evaluate(mean, var, weight, bias)
        evaluated = reference.evaluate(self.x, mean, var, weight, bias, axis=self.axis)
        tolerance = reference.out_tolerance(evaluated, dtype)
        assert_within("out", rows(self.out, self.axis), evaluated.out, tolerance)

        for training in (True, False):
            gradients = self.backward(found[0], found[2], weight, training)
            expected = reference.backward(
                self.dy, self.x, weight, mean=found[0], invstd=found[2], axis=self.axis, training=training
            )
            tolerance = reference.grad_weight_tolerance(expected, dtype)
            assert_within("grad_weight", gradients[0][:, None], expected.weight, tolerance)
            tolerance = reference.grad_bias_tolerance(expected, dtype)
            assert_within("grad_bias", gradients[1][:, None], expected.bias, tolerance)
            tolerance = reference.grad_x_tolerance(expected, dtype)
            assert_within("grad_x", rows(self.out, self.axis), expected.x, tolerance)
        assert_same_bits(self.x, before)


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
        for dtype in (np.float32, np.float64):
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
    """Check all of them, in both types."""
    for index in range(len(SHAPES)):
        for dtype in ("float32", "float64"):
            check_shape(seed, index, dtype)


def all_forms():
    """Return the forms that the shapes go through where all arrays have the same layout."""
    rng = np.random.default_rng(0)
    return set().union(
        *(
            forms(Case(rng, shape, axis % len(shape), dtype, [layout] * 3))
            for shape, axis in SHAPES
            for layout in LAYOUTS
            for dtype in (np.float32, np.float64)
        )
    )


def check_constants():
    """A constant channel has variance 0 and gives its bias, exactly, at any mean."""
    for shape, layout in (
        ((3, 3, 5, 7), "contiguous"),
        ((13, 3, 1, 1), "last"),
        ((2, 2, 9, 11), "contiguous"),
    ):
        for dtype in (np.float32, np.float64):
            case = Case(np.random.default_rng(0), shape, 1, dtype, [layout] * 3)
            values = (1e7 + np.arange(case.channels) / 3).astype(dtype)
            case.x[...] = values[:, None, None]
            found = case.forward(bias=values)
            assert not found[1].any()
            assert_same_bits(case.out, np.broadcast_to(values[:, None, None], shape).copy())


def check_offsets(seed):
    """Accurate at any mean, and with one value that outweighs all others."""
    for dtype in (np.float32, np.float64):
        for layout in ("contiguous", "last"):
            for offset in (10.0, 1e5, 1e7):
                rng = np.random.default_rng([seed, int(offset)])
                case = Case(rng, (4, 3, 6, 5), 1, dtype, [layout] * 3, offset)
                case.x[rng.integers(4), 1, 2, 3] *= 1e4
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
    for dtype in (np.float32, np.float64):
        found = []
        for layout in ("contiguous", "contiguous", "shifted"):
            case = Case(np.random.default_rng(seed), (3, 4, 4, 8), 1, dtype, [layout] * 3, 100.0)
            stats = case.forward()
            out = case.out.copy()
            gradients = case.backward(stats[0], stats[2])
            found.append((stats, out, gradients, np.ascontiguousarray(case.out)))
        assert {form[:2] for form in forms(case)} == {("rows", "vectors")}
        assert_same_bits(found[0], found[1])
        assert_same_bits(found[0], found[2])


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
