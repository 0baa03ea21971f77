"""Activations and residuals in the simulated kernels (see simulated.py), by the oracle of test_fused.py."""

import itertools

import numpy as np

import nbbn
import reference
from cases import DTYPES, HALF
from checks import assert_same_bits, unchanged
from nbbn.cuda.run import Run
from nbbn.dtypes import storage_of
from nbbn.problem import BATCH, Extras, Form, Problem
from simulated import ABSENT, LAYOUTS, _address, _parameter
from simulated_family import limit
from test_fused import ORACLE, SLOPE, _check_gradients, _check_out

KINDS = [kind for kind in itertools.product(ORACLE, (False, True)) if kind != (None, False)]
# Two and three values in a channel; rows and columns, of whole vectors and not, in one part and in several.
SHAPES = [
    ((2, 3), 1),
    ((3, 2), 1),
    ((1, 3, 3), 1),
    ((3, 4, 1, 2), 1),
    ((2, 2, 8, 12), 1),
    ((3, 2, 9, 5), 1),
    ((3, 5, 4, 4), 1),
    ((21, 8), 1),
    ((37, 3), -1),
    ((2, 3, 4, 5), 2),
    ((2, 17), 1),
    ((3, 33, 1, 2), 1),
]


class Case:
    """Arrays of one shape, what goes along with batch normalization, and the operations on them."""

    eps = 1e-5

    def __init__(self, rng, shape, axis, dtype, kind, layouts):
        self.axis, self.activation, with_residual = axis % len(shape), *kind
        channels = shape[axis]
        x, dy, self.out, residual, kept = (LAYOUTS[name](shape, self.axis, dtype) for name in layouts)
        self.x, self.dy = x, dy
        self.beside = (residual, kept) if with_residual else ()
        x[...] = rng.standard_normal(shape) + rng.choice([0.0, 3.0])
        dy[...] = rng.standard_normal(shape) + 0.5
        residual[...] = rng.standard_normal(shape)
        self.weight, self.bias = (self.parameter(rng, channels) for _ in range(2))
        self.mean, self.var = rng.standard_normal(channels).astype(np.float32), rng.uniform(0.5, 2, channels)
        self.given = {"activation": self.activation, "axis": self.axis}
        if with_residual:
            self.given["residual"] = residual

    @staticmethod
    def parameter(rng, channels):
        """Return a column of one type or another, or none."""
        values = rng.standard_normal(2 * channels)
        return [None, values[::-2], values[:channels].astype(np.float32)][rng.integers(3)]

    def run(self, *arrays, form=None):
        """Return what runs the stages on x and these arrays."""
        if form is None:
            form = Form(activation=self.activation or "", residual=bool(self.beside))
        strides = tuple(a.strides for a in (self.x, *arrays))
        return Run(Problem(self.x.shape, self.axis, strides, storage_of(self.x.dtype), 1, "cuda:0", form))

    def extras(self):
        """Return what the operations are given beside the arguments of batch normalization."""
        residual, kept = map(_address, self.beside) if self.beside else (0, 0)
        return Extras(residual, kept, _parameter(self.bias), SLOPE)

    def forward(self, out=None):
        """Return the statistics; the result is in out."""
        out = self.out if out is None else out
        found = np.full((3, self.x.shape[self.axis]), np.nan)
        parameters = (_parameter(a) for a in (self.weight, self.bias))
        self.run(*self.beside[:1], out).forward(
            _address(self.x), _address(out), _address(found), *parameters, ABSENT, ABSENT, self.eps, 0.0, 1.0,
            extras=self.extras(),
        )  # fmt: skip
        return found

    def evaluate(self):
        """Evaluation."""
        parameters = (_parameter(a) for a in (self.weight, self.bias, self.mean, self.var))
        self.run(*self.beside[:1], self.out).evaluate(
            _address(self.x), _address(self.out), *parameters, self.eps, extras=self.extras()
        )

    def backward(self, mean, invstd, training, form=None, dy=None):
        """Return all gradients; that of x is in out too."""
        found = np.full((2, self.x.shape[self.axis]), np.nan)
        dy = self.dy if dy is None else dy
        parameters = (_parameter(a) for a in (self.weight, mean, invstd))
        self.run(dy, *self.beside if form is None else (), self.out, form=form).backward(
            _address(self.x), _address(dy), _address(self.out), _address(found), *parameters, training,
            extras=self.extras(),
        )  # fmt: skip
        return nbbn.BatchNormResidualGradients(self.out, *found, *self.beside[1:] or (None,))

    def check(self):
        """Run every operation and hold all results against the oracle."""
        with unchanged(self.x, self.dy, *self.beside[:1]):
            dtype = self.x.dtype
            self.evaluate()
            columns = self.mean, self.var, self.weight, self.bias
            expected = reference.evaluate(self.x, *columns, eps=self.eps, axis=self.axis)
            _check_out(self.out, expected, self.given, self.axis, dtype)
            found = self.forward()
            expected = reference.forward(self.x, self.weight, self.bias, eps=self.eps, axis=self.axis)
            _check_out(self.out, expected, self.given, self.axis, dtype)
            self.check_backward(found[0], found[2], training=True)
            self.check_backward(self.mean, 1 / np.sqrt(self.var), training=False)

    def check_backward(self, mean, invstd, training):
        """Hold the gradients against the oracle."""
        gradients = self.backward(mean, invstd, training)
        _check_gradients(
            gradients,
            self.x,
            self.dy,
            self.weight,
            self.bias,
            mean,
            invstd,
            self.given,
            training,
            self.x.dtype,
        )

    def __repr__(self):
        strides = [a.strides for a in (self.x, self.dy, self.out, *self.beside)]
        return f"{self.activation} {self.x.shape} {self.axis} {self.x.dtype} {strides}"


def cases(rng, dtypes=DTYPES, kinds=KINDS, shapes=SHAPES):
    """Yield a case of each kind and type, each shape in its turn: in one layout, or in a mix."""
    turns = itertools.cycle(rng.permutation(len(shapes)))
    for kind, dtype in itertools.product(kinds, dtypes):
        mix = rng.choice(list(LAYOUTS), 5)
        if rng.random() < 0.6:
            mix[:] = mix[0]
        yield Case(rng, *shapes[next(turns)], dtype, kind, mix)


def check_cases(seed, shared=None, some=4):
    """Check them in some of the types, in blocks with so many bytes of shared memory."""
    limit(shared)
    rng = np.random.default_rng([seed, shared or 0])
    for case in cases(rng, [DTYPES[k] for k in rng.permutation(len(DTYPES))[:some]]):
        try:
            case.check()
        except AssertionError as error:
            raise AssertionError(f"{case}\n{error}") from error


def check_simulator(seed):
    """Check a few in Numba's own simulator, which is slow."""
    rng = np.random.default_rng(seed)
    kinds = [KINDS[k] for k in rng.permutation(len(KINDS))[:4]]
    for case in cases(rng, [DTYPES[seed % len(DTYPES)]], kinds, [((3, 5, 2, 4), 1), ((9, 4), 1)]):
        case.check()


def all_ways(shared):
    """Return the ways that backward passes go through the arrays of all shapes, in one layout."""
    limit(shared)
    found = set()
    for (shape, axis), layout, kind in itertools.product(SHAPES, LAYOUTS, (("relu", False), ("relu", True))):
        for dtype in (np.float32, np.float16):
            case = Case(np.random.default_rng(0), shape, axis, dtype, kind, [layout] * 5)
            plan = case.run(case.dy, *case.beside, case.out).plan
            resident = plan.resident
            place = "general" if resident is None else "teams" if resident.teams else "resident"
            width = "vectors" if plan.width > 1 else "elements"
            found.add((kind[1], "columns" if plan.columns else "rows", width, place))
    return found


def small_cases(rng, dtypes, kinds=KINDS):
    """Yield a case of rows and one of columns, of all kinds."""
    shapes = [((3, 3, 4, 4), 1), ((9, 8), 1)]
    for shape, kind, dtype in itertools.product(shapes, kinds, dtypes):
        yield Case(rng, *shape, dtype, kind, ["contiguous"] * 5)


def check_bits(seed, shared=None):
    """A residual's gradient is what grad_x and the sums are of, and a relu rounds nothing: to the bit."""
    limit(shared)
    rng = np.random.default_rng(seed)
    for case in small_cases(rng, (DTYPES[seed % 2], HALF[seed // 2 % 2])):
        found = case.forward()
        out = case.out.copy()
        assert_same_bits((case.forward(), case.out), (found, out))
        for training in (True, False):
            gradients = case.backward(found[0], found[2], training)
            fused = case.out.copy(), *gradients[1:3]
            if case.beside:
                incoming = gradients.residual
            elif case.activation == "relu":
                incoming = np.where(out > 0, case.dy, 0).astype(case.dy.dtype)
            else:
                continue
            expected = case.backward(found[0], found[2], training, form=BATCH, dy=incoming)
            fused[0][fused[0] == 0] = 0  # not -0, of which evaluation by the way of `normalize` has none
            case.out[case.out == 0] = 0
            assert_same_bits(fused, (case.out.copy(), *expected[1:3]))


def check_in_place(seed, shared=None):
    """The output may go where x is, or the residual; the residual may be x; and grad_x may go where x is."""
    limit(shared)
    rng = np.random.default_rng(seed)
    for case in small_cases(rng, (np.float32, HALF[seed % 2]), [("leaky_relu", False), ("relu", True)]):
        found = case.forward()
        out, x = case.out.copy(), case.x.copy()
        first = case.backward(found[0], found[2], True)
        first = tuple(None if a is None else a.copy() for a in first)
        case.out = case.x
        assert_same_bits(tuple(case.backward(found[0], found[2], True)), first)
        case.x[...] = x
        assert_same_bits((case.forward(), case.x.copy()), (found, out))
        case.x[...] = x
        if case.beside:
            residual = case.beside[0].copy()
            assert_same_bits((case.forward(out=case.beside[0]), case.beside[0].copy()), (found, out))
            case.beside[0][...] = x
            case.out = np.empty_like(x)
            found, out = case.forward(), case.out.copy()
            case.beside = case.x, residual
            assert_same_bits((case.forward(), case.out), (found, out))
            assert_same_bits((case.forward(out=case.x), case.x.copy()), (found, out))


def check_special_values():
    """NaN stays NaN; activations of infinities; and where the statistics are constants, no 0 · ∞."""
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 2.0, -2.0])
    expected = {
        "relu": ([np.nan, np.inf, 0, 0, 0, 2, 0], [None, 1, 0, 0, 0, 1, 0]),
        "leaky_relu": (
            [np.nan, np.inf, -np.inf, 0, 0, 2, -2 * SLOPE],
            [None, 1, SLOPE, SLOPE, SLOPE, 1, SLOPE],
        ),
        **{
            name: ([np.nan, np.inf, 0, 0, 0], [np.nan, 1, 0, 0.5, 0.5])
            for name in ("silu", "gelu", "gelu_tanh")
        },
    }
    for (name, (out, slope)), dtype, with_residual in itertools.product(
        expected.items(), DTYPES, (False, True)
    ):
        case = Case(np.random.default_rng(0), (7, 1), 1, dtype, (name, with_residual), ["contiguous"] * 5)
        case.x[:, 0], case.dy[...], case.weight, case.bias = values, 1.0, None, None
        case.mean, case.var, case.eps = np.zeros(1), np.ones(1), 0.0
        if with_residual:
            case.beside[0][...] = 0.0
        case.evaluate()
        tolerance = {"rtol": 2 * float(reference.finfo(dtype).eps), "equal_nan": True}
        assert np.allclose(case.out[: len(out), 0].astype(float), out, **tolerance), (name, case.out)
        grad_x = case.backward(case.mean, case.var, False).x[:, 0].astype(float)
        for actual, its in zip(grad_x, slope, strict=False):
            assert its is None or np.allclose(actual, its, **tolerance), (name, grad_x)


def check_functions(seed):
    """The public functions and the module take all of it on Numba's device arrays."""
    from numba import cuda

    rng = np.random.default_rng(seed)
    for kind in (("gelu", True), ("leaky_relu", False), (None, True)):
        case = Case(rng, (5, 3, 4), 1, np.float32, kind, ["contiguous"] * 5)
        x, dy, weight, bias = (
            None if a is None else cuda.to_device(a.copy()) for a in (case.x, case.dy, case.weight, case.bias)
        )
        along = {"activation": case.activation, "negative_slope": SLOPE}
        residual = cuda.to_device(case.beside[0]) if case.beside else None
        forward = nbbn.batch_norm_forward(x, weight, bias, residual=residual, **along)
        expected = reference.forward(case.x, case.weight, case.bias)
        _check_out(forward.out.copy_to_host(), expected, case.given, 1, np.float32)
        known = {"mean": forward.mean, "invstd": forward.invstd}
        gradients = nbbn.batch_norm_backward(dy, x, weight, bias=bias, residual=residual, **known, **along)
        assert len(gradients) == 3 + kind[1]
        found = nbbn.BatchNormResidualGradients(
            *(a.copy_to_host() for a in gradients), *(None,) * (not kind[1])
        )
        columns = (a.copy_to_host() for a in known.values())
        _check_gradients(
            found, case.x, case.dy, case.weight, case.bias, *columns, case.given, True, np.float32
        )
        forward = nbbn.batch_norm_forward(x, residual=residual, **along)
        known = {"mean": forward.mean, "invstd": forward.invstd}
        gradients = nbbn.batch_norm_backward(dy, x, residual=residual, **known, **along)
        bn = nbbn.BatchNorm(3, device="cuda", momentum=1.0, correction=0, **along)
        assert_same_bits(bn(x, residual=residual).copy_to_host(), forward.out.copy_to_host())
        assert_same_bits(bn.backward(dy).copy_to_host(), gradients.x.copy_to_host())
        if case.beside:
            assert_same_bits(bn.grad_residual.copy_to_host(), gradients.residual.copy_to_host())
        evaluated = bn.eval()(x, residual=residual).copy_to_host()
        # The running statistics are this batch's, but for their rounding to float32.
        assert np.allclose(evaluated, forward.out.copy_to_host(), rtol=1e-5, atol=1e-5)
