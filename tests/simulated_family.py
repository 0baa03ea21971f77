"""The other normalizations in the simulated kernels (see simulated.py), against an oracle of about 106 bits.

Everything in the oracle is in rows of values that share statistics (G, m), and each value has its weight and
its bias: what reference.py has for the channels of batch normalization.
"""

import itertools

import numpy as np

import reference
import simulated
from cases import DTYPES, HALF, POISON, columns_for, in_range
from checks import assert_same_bits, assert_within
from nbbn.cuda.run import Run
from nbbn.dtypes import storage_of
from nbbn.problem import Form, Problem
from reference import rows
from simulated import ABSENT, _address, _parameter
from twofold import Twofold


def _rows(gap, step=1, first=0):
    """Rows of elements side by side, `gap` elements from the end of one to the next."""

    def make(shape, axis, dtype):
        count, length = shape
        whole = np.full((count * abs(step), length + gap), POISON, dtype)
        return whole[::step, first : first + length]

    return make


ALONG = {
    "contiguous": _rows(0),
    "padded": _rows(3, first=1),
    "vectors": _rows(16),
    "backwards": _rows(0, step=-1),
    "every other": _rows(8, step=-2),
    "shifted": simulated._shifted,
}


class Case:
    """Arrays of one shape, the parameters that a form has, and the operations on them."""

    def __init__(self, rng, shape, axis, form, dtype, layouts, offset=0.0, eps=1e-5):
        self.rng, self.axis, self.form, self.eps = rng, axis, form, eps
        make = ALONG if form.along else simulated.LAYOUTS
        self.x, self.dy, self.out = (make[name](shape, axis, dtype) for name in layouts)
        self.x[...] = rng.standard_normal(shape) + in_range(offset, dtype)
        self.dy[...] = rng.standard_normal(shape) + 0.5
        self.channels = shape[axis]
        self.pools = self.channels // form.pool
        self.parameters = shape[1] if form.along else form.period or self.channels
        self.weight, self.bias = self.parameter(self.parameters), self.parameter(self.parameters)

    def parameter(self, count):
        """Return a column of any type and stride, or none."""
        kind = self.rng.integers(5)
        if kind == 0:
            return None
        dtype = np.float32 if kind < 3 else self.rng.choice(columns_for(self.x.dtype))
        step = self.rng.choice([-2, 2, 3]) if kind == 2 else 1
        values = (self.rng.standard_normal(count * abs(step)) + 0.5).astype(dtype)
        return values[::step]

    def run(self, *arrays):
        """Return what runs the stages on x and these arrays."""
        strides = tuple(a.strides for a in (self.x, *arrays))
        storage = storage_of(self.x.dtype)
        return Run(Problem(self.x.shape, self.axis, strides, storage, 1, "cuda:0", self.form))

    def forward(self, out=None):
        """Return the statistics; the result is in out."""
        out = self.out if out is None else out
        found = np.full((3, self.pools), np.nan)
        self.run(out).forward(
            _address(self.x), _address(out), _address(found), _parameter(self.weight), _parameter(self.bias),
            ABSENT, ABSENT, self.eps, 0.0, 1.0,
        )  # fmt: skip
        return found

    def backward(self, mean, invstd, adds=None, out=None):
        """Return the gradients of weight and bias; that of x is in out."""
        out = self.out if out is None else out
        found = np.full((2, self.parameters), np.nan) if adds is None else np.concatenate([adds, 0 * adds])
        self.run(self.dy, out).backward(
            _address(self.x), _address(self.dy), _address(out), _address(found), _parameter(self.weight),
            _parameter(mean), _parameter(invstd), True, adds=0 if adds is None else 2,
        )  # fmt: skip
        return found[:2]

    # --- the oracle: rows (G, m) ---

    def pooled(self, values):
        """Return an array's values, those that share statistics in a row."""
        return rows(values, self.axis).reshape(self.pools, -1)

    def spread(self, parameter, missing):
        """Return the parameter of each value."""
        count = self.x.size // self.channels
        values = np.full(self.parameters, missing) if parameter is None else parameter.astype(np.float64)
        if self.form.along:
            each = np.broadcast_to(values, (self.channels, count))
        else:
            its = values[np.arange(self.channels) % self.parameters]
            each = np.broadcast_to(its[:, None], (self.channels, count))
        return each.reshape(self.pools, -1)

    def gathered(self, values):
        """Return rows of the values that have a parameter in common."""
        each = np.arange(self.x.size).reshape(self.channels, -1)
        order = each.T if self.form.along else each.reshape(-1, self.parameters, each.shape[1]).swapaxes(0, 1)
        order = order.reshape(self.parameters, -1)
        values = Twofold.of(values)
        return Twofold(values.hi.ravel()[order], np.array(values.lo).ravel()[order])

    def expected_forward(self):
        """The result, and all that its tolerances need."""
        x = self.pooled(self.x).astype(np.float64)
        count = x.shape[1]
        sizes = np.abs(x)
        mean = Twofold(x).row_sums() / count
        if not self.form.centered:
            mean = Twofold(np.zeros((self.pools, 1)))
        deviation = Twofold(x) - mean
        var = (deviation * deviation).row_sums() / count
        invstd = 1.0 / (var + self.eps).sqrt()
        x_hat = deviation * invstd
        weight, bias = self.spread(self.weight, 1.0), self.spread(self.bias, 0.0)
        expected = reference.Forward(
            count, sizes.mean(axis=1, keepdims=True), mean, var, self.eps, invstd, x_hat, weight, bias,
            x_hat * weight + bias,
        )  # fmt: skip
        if self.x.dtype != np.float64:
            expected.largest = sizes.max(axis=1, keepdims=True)
        return expected

    def expected_backward(self, mean, invstd):
        """Gradients in the form of batch normalization's: of g = dy · weight, with a weight of 1."""
        x, dy = (Twofold(self.pooled(a).astype(np.float64)) for a in (self.x, self.dy))
        count = x.shape[1]
        mean, invstd = (Twofold(reference.column(v, 0.0, self.pools)) for v in (mean, invstd))
        x_hat = (x - mean) * invstd
        g = dy * self.spread(self.weight, 1.0)
        total, product = g.row_sums(), (g * x_hat).row_sums()
        if not self.form.centered:
            total = Twofold(np.zeros((self.pools, 1)))
        grad_x = (g - total / count - x_hat * (product / count)) * invstd
        return reference.Backward(count, True, grad_x, product, total, invstd.hi, g.hi, x_hat), dy

    def expected_gradients(self, dy, x_hat):
        """Those of the parameters: sums over all values that have them."""
        dy, x_hat = self.gathered(dy), self.gathered(x_hat)
        return reference.Backward(
            dy.shape[1], True, None, (dy * x_hat).row_sums(), dy.row_sums(), None, dy.hi, x_hat
        )

    # --- checks ---

    def check(self):
        """Hold the results of both operations against the oracle."""
        before = self.x.copy(), self.dy.copy()
        found = self.check_forward()
        mean, invstd = found[0], found[2]
        if not self.form.centered:
            mean = None
        elif self.rng.random() < 0.3:  # of another type, from the end
            mean, invstd = (np.repeat(v[::-1].astype(np.float32), 2)[::-2] for v in (mean, invstd))
        self.check_backward(mean, invstd)
        if self.form.pool == 1 and not self.form.along:
            self.check_evaluation()
        assert_same_bits((self.x, self.dy), before)

    def check_forward(self):
        """Hold statistics and output against the oracle."""
        dtype = self.x.dtype
        expected = self.expected_forward()
        self.out[...] = np.nan
        found = self.forward()
        if self.form.centered:
            assert_within("mean", found[0][:, None], expected.mean, reference.mean_tolerance(expected))
        else:
            assert_same_bits(found[0], np.zeros(self.pools))
        assert_within("var", found[1][:, None], expected.var, reference.var_tolerance(expected, dtype))
        tolerance = reference.invstd_tolerance(expected, dtype)
        assert_within("invstd", found[2][:, None], expected.invstd, tolerance)
        # The mean is a sum of two float64: right to u² or so, which shows where it is a value of x.
        twofold = 8 * reference.unit(np.float64) ** 2 * expected.mean_abs
        tolerance = reference.out_tolerance(expected, dtype)
        tolerance = tolerance + np.abs(expected.weight) * expected.invstd.hi * twofold
        assert_within("out", self.pooled(self.out), expected.out, tolerance)
        self.check_around()
        constant = expected.var.hi[:, 0] == 0
        assert not found[1][constant].any()
        assert (self.pooled(self.out) == reference.rounded_once(expected.bias, dtype))[constant].all()
        return found

    def check_backward(self, mean, invstd):
        """Hold the gradients against the oracle."""
        dtype = self.x.dtype
        adds = self.rng.standard_normal((2, self.parameters)) if self.rng.random() < 0.5 else None
        self.out[...] = np.nan
        found = self.backward(mean, invstd, adds)
        expected, dy = self.expected_backward(mean, invstd)
        tolerance = reference.grad_x_tolerance(expected, dtype)
        # g is rounded once, to float64, in every term of Σ g · x_hat, as x - mean is.
        x_hat = np.abs(expected.x_hat.hi)
        products = np.abs(expected.grad_out * x_hat).mean(axis=1, keepdims=True)
        tolerance = tolerance + reference.unit(np.float64) * expected.slope * x_hat * products
        assert_within("grad_x", self.pooled(self.out), expected.x, tolerance)
        self.check_around()
        expected = self.expected_gradients(dy, expected.x_hat)
        weight, bias = expected.weight, expected.bias
        slack = 0.0
        if adds is not None:
            weight, bias = weight + adds[0][:, None], bias + adds[1][:, None]
            slack = reference.unit(np.float64) * (np.abs(found)[:, :, None] + np.abs(adds)[:, :, None])
        tolerances = np.array([reference.grad_weight_tolerance(expected, dtype),
                               reference.grad_bias_tolerance(expected, dtype)]) + slack  # fmt: skip
        assert_within("grad_weight", found[0][:, None], weight, tolerances[0])
        assert_within("grad_bias", found[1][:, None], bias, tolerances[1])

    def check_around(self):
        """What lies around the result has not been written."""
        whole = self.out
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        assert np.isnan(whole).sum() == whole.size - self.out.size

    def check_evaluation(self):
        """Hold the output with given statistics, a pair for each of the parameters, against batch norm's."""
        mean = self.rng.standard_normal(self.parameters)
        var = self.rng.uniform(0.5, 2.0, self.parameters).astype(np.float32)
        self.out[...] = np.nan
        arrays = (self.weight, self.bias, mean, var)
        run = self.run(self.out)
        run.evaluate(_address(self.x), _address(self.out), *(_parameter(a) for a in arrays), self.eps)
        copies = self.channels // self.parameters
        arrays = [None if a is None else np.tile(a, copies) for a in (mean, var, self.weight, self.bias)]
        expected = reference.evaluate(self.x, *arrays, eps=self.eps, axis=self.axis)
        tolerance = reference.out_tolerance(expected, self.x.dtype)
        assert_within("out", rows(self.out, self.axis), expected.out, tolerance)

    def results(self):
        """Return the bits of both operations."""
        found = self.forward()
        out = self.out.copy()
        mean = found[0] if self.form.centered else None
        gradients = self.backward(mean, found[2])
        return found, out, gradients, self.out.copy()


def _share(channels, groups, centered):
    """Instance, group or batch normalization: samples and channels are one dimension."""
    if groups == 0:
        return Form(centered=centered)
    return Form(1 if groups is None else channels // groups, channels, centered=centered)


# Samples, channels, groups (None: instance normalization; 0: batch), and the other dimensions.
SHARED = [
    (1, 4, 0, (5,)),
    (1, 2, 0, (13, 8)),
    (1, 3, None, (2,)),
    (2, 3, None, (3,)),
    (3, 2, None, (9, 5)),
    (2, 4, None, (8, 8)),
    (5, 1, None, (7,)),
    (3, 11, None, (1, 2)),
    (9, 4, None, (2, 2)),
    (2, 2, 1, (1,)),
    (1, 3, 1, (1,)),
    (2, 6, 2, (2,)),
    (3, 4, 4, (5,)),
    (2, 4, 1, (7, 5)),
    (2, 8, 4, (4, 4)),
    (1, 8, 2, (9, 8)),
    (3, 30, 2, (1,)),
    (1, 12, 3, (3, 1)),
    (7, 4, 2, (2, 4)),
    (1, 4, 2, (13, 12)),
    (1, 2, 1, (14, 17)),
]
# Rows and elements of each.
LONG = [
    (1, 1), (3, 1), (1, 2), (3, 2), (2, 3), (5, 7), (4, 16), (7, 24), (33, 3), (70, 8), (129, 4),
    (2, 150), (3, 160), (1, 333), (2, 512),
]  # fmt: skip


def cases(rng, dtypes):
    """Yield a case of each form, shape and type: in one layout, or in a mix."""
    layouts = list(simulated.LAYOUTS)
    for (samples, channels, groups, others), dtype in itertools.product(SHARED, dtypes):
        last = rng.random() < 0.3
        shape = (*others, samples * channels) if last else (samples * channels, *others)
        form = _share(channels, groups, rng.random() < 0.9)
        if form.pool > 1 and rng.random() < 0.2:
            form = form._replace(period=0)  # each channel has parameters of its own
        mix = rng.choice(layouts, 3) if rng.random() < 0.4 else [rng.choice(layouts)] * 3
        yield Case(rng, shape, len(shape) - 1 if last else 0, form, dtype, mix, rng.choice([0.0, 1e3]))
    layouts = list(ALONG)
    for shape, dtype, centered in itertools.product(LONG, dtypes, (True, False)):
        mix = rng.choice(layouts, 3) if rng.random() < 0.4 else [rng.choice(layouts)] * 3
        form = Form(along=True, centered=centered)
        yield Case(rng, shape, 0, form, dtype, mix, rng.choice([0.0, 1e3]))


def small_cases(rng, dtypes=DTYPES):
    """Yield one of each form and way: rows and columns, of one block, of several, and of teams."""
    shared = [(2, 3, None, (4, 5)), (2, 4, 2, (3, 3)), (2, 4, 1, (1,)), (2, 2, None, (13, 12))]
    for (samples, channels, groups, others), last, dtype in itertools.product(shared, (False, True), dtypes):
        shape = (*others, samples * channels) if last else (samples * channels, *others)
        form = _share(channels, groups, True)
        yield Case(rng, shape, len(shape) - 1 if last else 0, form, dtype, ["contiguous"] * 3)
    for shape, centered, dtype in itertools.product(((5, 7), (3, 160), (70, 8)), (True, False), dtypes):
        yield Case(rng, shape, 0, Form(along=True, centered=centered), dtype, ["contiguous"] * 3)


def way_of(case):
    """Return which way a case goes through its arrays, backwards."""
    plan = case.run(case.dy, case.out).plan
    resident = plan.resident
    general = "parts" if plan.general.cut.parts > 1 else "one part"
    return (
        "along"
        if case.form.along
        else "pool"
        if case.form.pool > 1
        else "period"
        if plan.shares
        else "batch",
        "vectors" if plan.width > 1 else "elements",
        "columns" if plan.columns else "rows",
        general if resident is None else "teams" if resident.teams else "resident",
    )


def limit(shared):
    """From now on, blocks have so many bytes of shared memory, if it is not None."""
    if shared is not None:
        device = simulated.target.properties(0)._replace(shared=shared)
        simulated.target.properties = lambda number: device


def all_ways(shared):
    """Return the ways that the cases go through in any layout."""
    limit(shared)
    return {way_of(case) for seed in range(8) for case in cases(np.random.default_rng(seed), DTYPES)}


def check_cases(seed, shared=None):
    """Check all cases in one of the types, in blocks with so many bytes of shared memory."""
    limit(shared)
    rng = np.random.default_rng([seed, shared or 0])
    for case in cases(rng, [DTYPES[rng.integers(len(DTYPES))]]):
        try:
            case.check()
            if rng.random() < 0.2:
                assert_same_bits(case.results(), case.results())
        except AssertionError as error:
            layouts = [a.strides for a in (case.x, case.dy, case.out)]
            raise AssertionError(f"{case.form} {case.x.shape} {case.x.dtype} {layouts}\n{error}") from error


def check_simulator(seed):
    """Check a few, each in every second run, in Numba's own simulator, which is slow."""
    rng = np.random.default_rng(seed)
    for case in itertools.islice(small_cases(rng, (DTYPES[seed // 2 % len(DTYPES)],)), seed % 2, None, 2):
        case.check()


def check_constants():
    """What is constant has variance 0 and gives its bias, exactly, at any mean; or is not centered at all."""
    for case in small_cases(np.random.default_rng(0)):
        values = (in_range(1e7, case.x.dtype) + np.arange(case.pools) / 3).astype(case.x.dtype)
        across = [1] * case.x.ndim
        across[case.axis] = case.channels
        case.x[...] = np.repeat(values, case.form.pool).reshape(across)
        found = case.check_forward()
        if case.form.centered:
            assert not found[1].any()
        else:
            assert_within("var", found[1], values.astype(float) ** 2, 1e-15 * values.astype(float) ** 2)


def check_offsets(seed):
    """Accurate at any mean, and with one value that outweighs all others."""
    rng = np.random.default_rng(seed)
    for case in small_cases(rng):
        offset = in_range(rng.choice([1e5, 1e7]), case.x.dtype)
        case.x[...] = case.x + case.x.dtype.type(offset)
        case.x.reshape(-1)[rng.integers(case.x.size)] = in_range(1e4 * offset, case.x.dtype)
        case.check()


def check_isolation(seed):
    """What is not finite stays with the values that share its statistics, and its parameters' gradients."""
    rng = np.random.default_rng(seed)
    for case in small_cases(rng, (np.float32, HALF[seed % 2])):
        at = tuple(rng.integers(n) for n in case.x.shape)
        pool = at[case.axis] // case.form.pool
        here = at[1] if case.form.along else at[case.axis] % case.parameters
        results = []
        for value in (1.0, np.nan, np.inf):
            case.x[at] = value
            found, out, gradients, grad_x = case.results()
            out, grad_x = case.pooled(out), case.pooled(grad_x)
            if not np.isfinite(value):
                assert (
                    np.isnan(out[pool]).all()
                    and np.isnan(grad_x[pool]).all()
                    and np.isnan(gradients[0, here])
                )
            its = np.arange(pool * case.form.pool, (pool + 1) * case.form.pool) % case.parameters
            if case.form.along:
                its = slice(None)  # a row has all parameters
            others = np.delete(found, pool, 1), np.delete(out, pool, 0), np.delete(grad_x, pool, 0)
            results.append((*others, np.delete(gradients, its, 1)))
        assert_same_bits(results[0], results[1])
        assert_same_bits(results[0], results[2])


def check_in_place(seed):
    """The result may be written over x, and grad_x over grad_out or x."""
    rng = np.random.default_rng(seed)
    for case in small_cases(rng, (np.float32, HALF[seed % 2])):
        found, out, gradients, grad_x = case.results()
        x, dy = case.x.copy(), case.dy.copy()
        again = case.forward(out=case.x)
        assert_same_bits((again, case.x.copy()), (found, out))
        for name in ("x", "dy"):
            case.x[...], case.dy[...] = x, dy
            target = getattr(case, name)
            mean = found[0] if case.form.centered else None
            again = case.backward(mean, found[2], out=target)
            assert_same_bits((again, target.copy()), (gradients, grad_x))


def check_bits(seed):
    """The same bits wherever the arrays begin; and gradients are added as they are."""
    for dtype in DTYPES:
        for groups in (None, 2):
            found = []
            for layout in ("contiguous", "contiguous", "shifted"):
                rng = np.random.default_rng(seed)
                case = Case(rng, (8, 4, 8), 0, _share(4, groups, True), dtype, [layout] * 3, 100.0)
                found.append(case.results())
            assert_same_bits(found[0], found[1])
            assert_same_bits(found[0], found[2])
        found = []
        for layout, shift in itertools.product(("contiguous", "shifted", "vectors"), (0, 1)):
            rng = np.random.default_rng(seed)
            case = Case(rng, (5, 32), 0, Form(along=True), dtype, [layout] * 3, 100.0)
            # Of parameters too: as vectors, and one by one.
            case.weight, case.bias = (rng.standard_normal(33).astype(np.float32)[shift:] for _ in range(2))
            case.weight[:32], case.bias[:32] = np.arange(32) / 3, 1 / (1 + np.arange(32))
            case.weight, case.bias = case.weight[:32], case.bias[:32]
            found.append(case.results())
        for one in found[1:]:
            assert_same_bits(found[0], one)
        prior = np.random.default_rng(seed).standard_normal((2, 32))
        assert_same_bits(case.backward(found[-1][0][0], found[-1][0][2], adds=prior), found[-1][2] + prior)
