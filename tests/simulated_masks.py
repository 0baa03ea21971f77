"""Masks in the simulated kernels (see simulated.py), by the oracle of what counts, as in test_masks.py."""

import itertools

import numpy as np

import nbbn
import reference
from cases import DTYPES, HALF
from checks import assert_same_bits, assert_within, unchanged
from nbbn.cuda.run import Run
from nbbn.dtypes import storage_of
from nbbn.masks import Where, counted
from nbbn.problem import Form, Marks, Problem
from reference import rows
from simulated import LAYOUTS, _address
from simulated_family import limit
from simulated_fused import SHAPES, Case
from test_fused import ORACLE
from test_masks import _assert_zeros, _counting, _with_junk

MORE = [*SHAPES, ((2, 3, 7, 19), 1), ((70, 5), -1)]  # more than 64 elements of a channel


class MaskedCase(Case):
    """Arrays of one shape of whose positions only some count."""

    def __init__(self, rng, shape, axis, dtype, kind, layouts, share):
        super().__init__(rng, shape, axis, dtype, kind, layouts)
        positions = tuple(n for d, n in enumerate(shape) if d != self.axis)
        self.mask = rng.random(positions) < share
        self.mask.flat[rng.permutation(self.mask.size)[:2]] = True
        for values in (self.x, self.dy, *self.beside[:1]):
            _with_junk(rng, values, self.mask, self.axis)

    def look(self):
        """Return the mask as a call has it: in the order of x in memory."""
        return counted(Where(self.mask), self.x, self.axis, "cuda:0")

    def run(self, *arrays, form=None):
        """Return what runs the stages on x, these arrays and the mask."""
        if form is None:
            form = Form(activation=self.activation or "", residual=bool(self.beside), masked=True)
        of_mask = self.look().strides
        strides = [a.strides for a in (self.x, *arrays)]
        strides.append((*of_mask[: self.axis], 0, *of_mask[self.axis :]))
        problem = Problem(
            self.x.shape, self.axis, tuple(strides), storage_of(self.x.dtype), 1, "cuda:0", form
        )
        return Run(problem)

    def extras(self):
        """Return what the operations are given beside the arguments of batch normalization."""
        self.looked = self.look()  # which the address does not keep alive
        return super().extras()._replace(marks=Marks(_address(self.looked), int(self.mask.sum())))

    def only(self, values):
        """Return what counts of an array, (C, n)."""
        return _counting(values, self.mask, self.axis)

    def check(self):
        """Hold statistics, results and gradients of what counts against the oracle; elsewhere they are 0."""
        dtype = self.x.dtype
        x, dy = self.only(self.x), self.only(self.dy)
        given = self.weight, self.bias
        with unchanged(self.x, self.dy, *self.beside[:1]):
            found = self.forward()
            expected = reference.forward(x, *given, eps=self.eps, axis=0)
            for name, row, tolerance in (
                ("mean", 0, reference.mean_tolerance(expected)),
                ("var", 1, reference.var_tolerance(expected, dtype)),
            ):
                assert_within(name, found[row][:, None], getattr(expected, name), tolerance)
            self.check_out(expected)
            stats = np.full_like(found, np.nan)
            self.run(form=Form(masked=True)).stats(_address(self.x), _address(stats), self.extras())
            assert_within("mean", stats[0][:, None], expected.mean, reference.mean_tolerance(expected))
            constants = self.mean, 1 / np.sqrt(self.var)
            for mean, invstd, training in ((found[0], found[2], True), (*constants, False)):
                gradients = self.backward(mean, invstd, training)
                for values in (gradients.x, gradients.residual):
                    if values is not None:
                        _assert_zeros(values, self.mask, self.axis)
                if self.activation is None:
                    if self.beside:
                        assert np.array_equal(self.only(gradients.residual), dy)
                    self.check_gradients(gradients, dy, x, mean, invstd, training)
            self.evaluate()
            self.check_out(reference.evaluate(x, self.mean, self.var, *given, eps=self.eps, axis=0))

    def check_out(self, expected):
        """Hold out against the oracle, where nothing comes after batch normalization."""
        _assert_zeros(self.out, self.mask, self.axis)
        if self.activation is None and not self.beside:
            tolerance = reference.out_tolerance(expected, self.x.dtype)
            assert_within("out", rows(self.only(self.out), 0), expected.out, tolerance)

    def check_gradients(self, gradients, dy, x, mean, invstd, training):
        """Hold gradients against the oracle."""
        dtype = self.x.dtype
        expected = reference.backward(dy, x, self.weight, mean=mean, invstd=invstd, axis=0, training=training)
        for name, tolerance in (
            ("bias", reference.grad_bias_tolerance(expected, dtype)),
            ("weight", reference.grad_weight_tolerance(expected, dtype)),
        ):
            assert_within(name, getattr(gradients, name)[:, None], getattr(expected, name), tolerance)
        tolerance = reference.grad_x_tolerance(expected, dtype)
        assert_within("grad_x", rows(self.only(gradients.x), 0), expected.x, tolerance)


def cases(rng, kinds, dtypes, shapes=MORE):
    """Yield cases of all shapes, each kind and type in its turn: in one layout, or in a mix."""
    turns = itertools.cycle(itertools.product(kinds, [dtypes[k] for k in rng.permutation(len(dtypes))]))
    for shape in shapes:
        mix = rng.choice(list(LAYOUTS), 5)
        if rng.random() < 0.6:
            mix[:] = mix[0]
        yield MaskedCase(rng, *shape, *next(turns)[::-1], mix, rng.choice([0.1, 0.6, 0.97]))


def check_cases(seed, shared=None):
    """Check batch normalization alone, and with a residual."""
    limit(shared)
    rng = np.random.default_rng([seed, shared or 0])
    for case in cases(rng, [(None, False), (None, False), (None, True)], DTYPES):
        try:
            case.check()
        except AssertionError as error:
            raise AssertionError(f"{case}\n{error}") from error


def check_whole(seed, shared=None):
    """Where everything counts, the results are those without a mask; with what goes along too.

    To the bit: zeros that are added, and parts that are empty, change nothing.
    """
    limit(shared)
    rng = np.random.default_rng(seed)
    kinds = [(name, residual) for name in ORACLE for residual in (False, True)]
    for case in cases(rng, kinds, (np.float32, HALF[seed % 2])):
        case.mask[...] = True
        for values in (case.x, case.dy, *case.beside[:1]):
            values[...] = rng.standard_normal(values.shape)
        runs = []
        for kind in (MaskedCase, Case):
            case.__class__ = kind
            found = case.forward()
            out = case.out.copy()
            gradients = [a if a is None else a.copy() for a in case.backward(found[0], found[2], True)]
            constants = [a if a is None else a.copy() for a in case.backward(case.mean, case.var, False)]
            case.evaluate()
            runs.append((found, out, case.out.copy(), *gradients, *constants))
        for one, other in zip(*runs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_same_bits(one, other)


def check_activations(seed, shared=None):
    """What does not count is nowhere: whatever junk it is, the other results keep their bits."""
    limit(shared)
    rng = np.random.default_rng(seed)
    kinds = [(name, residual) for name in ORACLE if name for residual in (False, True)]
    for case in cases(rng, kinds, (np.float32, HALF[seed % 2])):
        runs = []
        for _ in range(2):
            for values in (case.x, case.dy, *case.beside[:1]):
                _with_junk(rng, values, case.mask, case.axis)
            found = case.forward()
            _assert_zeros(case.out, case.mask, case.axis)
            out = case.out.copy()
            gradients = case.backward(found[0], found[2], True)
            runs.append((found, out, *[a.copy() for a in gradients if a is not None]))
            for values in (gradients.x, gradients.residual):
                if values is not None:
                    _assert_zeros(values, case.mask, case.axis)
        assert np.isfinite(runs[0][1].astype(float)).all()
        for one, other in zip(*runs, strict=True):
            assert_same_bits(one, other)


def check_functions(seed):
    """The public functions and the module take masks and lengths of the host and of the device."""
    from numba import cuda

    rng = np.random.default_rng(seed)
    x, dy = rng.standard_normal((2, 4, 3, 5)).astype(np.float32)
    lengths = np.array([5, 2, 0, 3])
    mask = np.arange(5) < lengths[:, None]
    on_gpu, dy_on_gpu = cuda.to_device(x), cuda.to_device(dy)
    expected = nbbn.batch_norm_forward(x, mask=mask)
    known = {"mean": expected.mean, "invstd": expected.invstd}
    gradients = nbbn.batch_norm_backward(dy, x, mask=mask, **known)
    for given in (
        {"mask": mask},
        {"mask": cuda.to_device(mask)},
        {"lengths": lengths},
        {"lengths": cuda.to_device(lengths)},
    ):
        result = nbbn.batch_norm_forward(on_gpu, **given)
        assert result.count == 10
        assert np.allclose(result.out.copy_to_host(), expected.out, rtol=1e-5, atol=1e-6)
        stats = nbbn.batch_stats(on_gpu, **given)
        assert stats.count == 10
        assert np.allclose(stats.mean.copy_to_host(), expected.mean, rtol=1e-12, atol=1e-12)
        known = {"mean": result.mean, "invstd": result.invstd}
        found = nbbn.batch_norm_backward(dy_on_gpu, on_gpu, **known, **given)
        for one, other in zip(found, gradients, strict=True):
            assert np.allclose(one.copy_to_host(), other, rtol=1e-5, atol=1e-5)
    _check_module(x, on_gpu, dy, dy_on_gpu, mask)
    _check_nothing(on_gpu, mask)


def _check_module(x, on_gpu, dy, dy_on_gpu, mask):
    for options in ({}, {"renorm": True}, {"nonfinite": "skip"}, {"activation": "relu"}):
        one, other = nbbn.BatchNorm(3, **options), nbbn.BatchNorm(3, device="cuda", **options)
        for training in (True, True, False):
            outs = [bn.train(training)(a, mask=mask) for bn, a in ((one, x), (other, on_gpu))]
            grads = [bn.backward(a) for bn, a in ((one, dy), (other, dy_on_gpu))]
            for a, b in (outs, grads):
                assert np.allclose(a, b.copy_to_host(), rtol=1e-4, atol=1e-5), options
        for name, value in one.state_dict().items():
            assert np.allclose(other.state_dict()[name], value, rtol=1e-6), (options, name)


def _check_nothing(on_gpu, mask):
    from numba import cuda

    nothing = np.zeros_like(mask)
    kept = on_gpu.copy_to_host()
    result = nbbn.batch_norm_forward(on_gpu, mask=nothing)
    assert result.count == 0 and not result.out.copy_to_host().any()
    ones = cuda.to_device(np.ones(3))
    gradients = nbbn.batch_norm_backward(
        on_gpu, on_gpu, mean=ones, invstd=ones, mask=nothing, residual=on_gpu
    )
    assert not any(a.copy_to_host().any() for a in gradients)
    assert np.array_equal(on_gpu.copy_to_host(), kept)
    assert not nbbn.batch_norm(on_gpu, training=True, mask=nothing, out=on_gpu).copy_to_host().any()
