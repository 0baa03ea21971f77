"""Layer, RMS, instance and group norm: what their tests run on, and one call held against the oracle."""

import math
from typing import NamedTuple

import numpy as np

import nbbn
import reference
from cases import Shape, activations, parameter
from checks import assert_same_bits, assert_within, check_running, out_of, unchanged

NORMS = ("layer", "rms", "instance", "group")


class Case(NamedTuple):
    """A normalization, and the shape of its arrays.

    `option` is how many of the last axes layer norm and RMS norm take together, and the number of groups.
    """

    norm: str
    dims: tuple[int, ...]
    option: int = 1
    axis: int = 1

    def __str__(self):
        of = f"last{self.option}" if self.along else f"@{self.axis}"
        groups = f"-{self.option}groups" if self.norm == "group" else ""
        return f"{self.norm}-{'x'.join(map(str, self.dims))}-{of}{groups}"

    @property
    def along(self):
        """Whether parameters go along what is normalized."""
        return self.norm in ("layer", "rms")

    @property
    def centered(self):
        return self.norm != "rms"

    @property
    def channels(self):
        return self.dims[self.axis]

    @property
    def normalized_shape(self):
        return self.dims[len(self.dims) - self.option :]

    @property
    def rows(self):
        """Which values share statistics, as the oracle has it."""
        if self.along:
            return reference.layers(self.dims, self.option)
        return reference.groups(self.dims, self.option if self.norm == "group" else self.channels, self.axis)

    @property
    def count(self):
        """Values that share statistics."""
        return self.rows.places.shape[1]

    @property
    def parameters(self):
        """The shape of a weight."""
        return self.normalized_shape if self.along else (self.channels,)

    @property
    def positional(self):
        """What comes after x."""
        if self.along:
            return (self.normalized_shape,)
        return (self.option,) if self.norm == "group" else ()

    @property
    def keywords(self):
        return {} if self.along else {"axis": self.axis}

    def affine(self, weight, bias):
        """Weight and bias by name; RMS norm has no bias."""
        return {"weight": weight} if self.norm == "rms" else {"weight": weight, "bias": bias}

    def call(self, x, weight=None, bias=None, **options):
        """The function that returns out alone."""
        function = getattr(nbbn, f"{self.norm}_norm")
        return function(x, *self.positional, **self.affine(weight, bias), **self.keywords, **options)

    def forward(self, x, weight=None, bias=None, **options):
        function = getattr(nbbn, f"{self.norm}_norm_forward")
        return function(x, *self.positional, **self.affine(weight, bias), **self.keywords, **options)

    def backward(self, grad_out, x, weight=None, *, mean, invstd, out=None):
        function = getattr(nbbn, f"{self.norm}_norm_backward")
        statistics = {"mean": mean, "invstd": invstd} if self.centered else {"invstd": invstd}
        return function(grad_out, x, *self.positional, weight, **statistics, **self.keywords, out=out)

    def data(self, rng, dtype, offset=0.0, sigma=1.0):
        """Return normal values; mean and deviation differ between channels, so that a mix-up shows."""
        rank = len(self.dims)
        if rank < 2:
            return activations(rng, Shape((1, *self.dims)), dtype, offset, sigma)[0]
        return activations(rng, Shape(self.dims, self.axis), dtype, offset, sigma)

    def parameter(self, rng, dtype):
        """Return a weight or a bias, of both signs; None for the type None, and for the bias of RMS norm."""
        if dtype is None:
            return None
        return parameter(rng, math.prod(self.parameters), dtype).reshape(self.parameters)

    def pair(self, rng, dtype=np.float32):
        """Return a weight and a bias, None where there is none."""
        weight, bias = (self.parameter(rng, dtype) for _ in range(2))
        return weight, None if self.norm == "rms" else bias


# Two and three values together, one layer, one group of all channels and groups of one; channels that are no
# multiple of a vector, and layers whose sizes straddle one; the channel axis first, in the middle and last.
CASES = [
    *(
        Case(norm, dims, normalized)
        for norm in ("layer", "rms")
        for dims, normalized in (
            ((5, 2), 1),
            ((4, 3), 1),
            ((3, 1), 1),
            ((7,), 1),
            ((1, 2), 1),
            ((3, 5), 2),
            ((2, 3, 17), 1),
            ((4, 3, 5), 2),
            ((2, 3, 4, 5), 3),
            ((2, 1, 3, 33), 1),
            ((33, 31), 1),
            ((2, 65), 1),
            ((3, 129), 1),
            # So many of so few values are looked at side by side.
            ((130, 2), 1),
            ((128, 3), 1),
            ((150, 4, 24), 2),
        )
    ),
    *(
        Case("instance", dims, axis=axis)
        for dims, axis in (
            ((2, 3, 2), 1),
            ((1, 2, 3), 1),
            ((3, 1, 2), 1),
            ((4, 5, 7), 1),
            ((4, 7, 5), -1),
            ((5, 4, 7), 0),
            ((2, 3, 4, 5), 1),
            ((2, 4, 5, 3), -1),
            ((2, 4, 3, 5), 2),
            ((3, 2, 2, 3, 2), 1),
            ((2, 33, 31), 1),
            ((2, 17, 65), 2),
            ((3, 50, 2), 1),
            ((2, 65, 3), 1),
            ((5, 53, 3, 8), 1),
        )
    ),
    *(
        Case("group", dims, num_groups, axis)
        for dims, num_groups, axis in (
            ((5, 2), 1, 1),
            ((4, 6), 2, 1),
            ((4, 6), 6, 1),
            ((6, 4), 3, 0),
            ((2, 2, 1), 1, 1),
            ((1, 3, 1), 1, 1),
            ((2, 6, 7), 1, 1),
            ((2, 6, 7), 2, 1),
            ((2, 6, 7), 6, 1),
            ((43, 6, 3), 3, 1),
            ((5, 60, 2, 9), 4, 1),
            ((3, 7, 6), 3, -1),
            ((6, 3, 7), 2, 0),
            ((2, 4, 3, 5), 2, 1),
            ((2, 3, 5, 4), 4, -1),
            ((2, 3, 8, 2), 4, 2),
            ((2, 6, 2, 3, 2), 3, 1),
            ((2, 66, 5), 3, 1),
            ((5, 54, 3), 3, 1),
            ((9, 40, 5, 7), 8, 1),
            ((3, 40, 9, 15), 5, 1),
        )
    ),
]

# One of each, of rank 4, for tests that vary something else.
ONE_OF_EACH = [
    Case("layer", (3, 4, 5, 6), 2),
    Case("rms", (3, 4, 5, 6), 2),
    Case("instance", (3, 4, 5, 6)),
    Case("group", (3, 4, 5, 6), 2),
]


def in_rows(case, array, values):
    """Return numbers that each row has one of as the oracle has them: (R, 1)."""
    values = np.asarray(values)
    assert values.shape == case.rows.statistics, f"{array}: {values.shape}, not {case.rows.statistics}"
    assert values.dtype == np.float64, f"{array} is of {values.dtype}"
    return values.reshape(-1, 1)


def check_forward(case, x, weight=None, bias=None, *, eps=1e-5, out=None):
    """Call both functions and hold all that they return against the oracle; return …_forward's result."""
    of = case.rows
    expected = reference.forward_rows(of, x, weight, bias, eps=eps, centered=case.centered)
    if out is not None and out is not x:
        out[...] = np.nan
    before = x.copy()
    with unchanged(weight, bias, *(() if out is x else (x,))):
        result = case.forward(x, weight, bias, eps=eps, out=out)
    assert result._fields == ("out", "mean", "var", "invstd", "count")
    out_of(result.out, out, x)
    assert type(result.count) is int and result.count == expected.count
    tolerances = {
        "mean": reference.mean_tolerance(expected),
        "var": reference.var_tolerance(expected, x.dtype),
        "invstd": reference.invstd_tolerance(expected, x.dtype),
    }
    for name, tolerance in tolerances.items():
        values = in_rows(case, name, getattr(result, name))
        assert_within(name, values, getattr(expected, name), tolerance)
    assert_within("out", of.of(result.out), expected.out, reference.out_rows_tolerance(expected, x.dtype))
    # The other function, into the same strides: the same bits.
    values = result.out.copy()
    if out is not None:
        x = out if out is x else x
        if out is x:
            x[...] = before
        else:
            out[...] = np.nan
    alone = case.call(x, weight, bias, eps=eps, out=out)
    out_of(alone, out, x)
    assert_same_bits(alone.copy(), values)
    return result


def check_backward(case, grad_out, x, weight=None, *, mean, invstd, out=None):
    """Call …_backward and hold all gradients against the oracle; return them."""
    of = case.rows
    used = {"mean": mean if case.centered else None, "invstd": invstd}
    expected = reference.backward_rows(of, grad_out, x, weight, centered=case.centered, **used)
    inputs = [a for a in (grad_out, x) if a is not out]
    if out is not None and len(inputs) == 2:
        out[...] = np.nan
    with unchanged(*inputs, weight, mean, invstd):
        result = case.backward(grad_out, x, weight, mean=mean, invstd=invstd, out=out)
    assert result._fields == ("x", "weight", "bias")
    out_of(result.x, out, x)
    for name, scale in zip(("weight", "bias"), expected.scales, strict=True):
        values = getattr(result, name)
        if case.norm == "rms" and name == "bias":
            assert values is None
            continue
        assert values.dtype == np.float64 and values.shape == case.parameters
        tolerance = reference.parameter_tolerance(expected, scale, x.dtype)
        assert_within(f"grad_{name}", values.reshape(-1, 1), getattr(expected, name), tolerance)
    assert_within("grad_x", of.of(result.x), expected.x, reference.rows_tolerance(expected, x.dtype))
    return result


def check(case, x, grad_out, weight=None, bias=None, *, eps=1e-5, out=None):
    """Hold a call and its gradients against the oracle; return both results, outputs copied."""
    forward = check_forward(case, x, weight, bias, eps=eps, out=out)
    forward = forward._replace(out=forward.out.copy())
    used = {"mean": forward.mean, "invstd": forward.invstd}
    return forward, check_backward(case, grad_out, x, weight, **used, out=out)


def check_updates(case, x, running_mean, running_var, weight=None, bias=None, *, momentum=0.1, **options):
    """Call instance_norm in training; hold out and running statistics against the oracle; return out."""
    of = case.rows
    expected = reference.forward_rows(of, x, weight, bias, eps=options.get("eps", 1e-5))
    old = [None if v is None else v.copy() for v in (running_mean, running_var)]
    with unchanged(x, weight, bias):
        out = nbbn.instance_norm(
            x, running_mean, running_var, weight, bias, True, momentum, axis=case.axis, **options
        )
    assert_within("out", of.of(out), expected.out, reference.out_rows_tolerance(expected, x.dtype))
    if running_mean is not None:
        new = reference.of_instances(expected.mean, reference.mean_tolerance(expected), of)
        check_running("running_mean", running_mean, old[0], *new, momentum)
    if running_var is not None:
        share = expected.count / (expected.count - 1)
        tolerance = share * reference.var_tolerance(expected, x.dtype)
        new = reference.of_instances(reference.unbiased(expected.var, expected.count), tolerance, of)
        check_running("running_var", running_var, old[1], *new, momentum)
    return out
