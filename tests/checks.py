"""One call of nbbn held against the oracle, in every value that it returns."""

import numpy as np

import nbbn
import reference
from reference import column, rows
from twofold import Twofold


def assert_within(name, actual, expected, tolerance):
    """Fail where |actual - expected| > tolerance, NaN included, and say where it is worst."""
    expected = Twofold.of(expected)
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, f"{name}: {actual.shape}, expected {expected.shape}"
    error, tolerance = expected.distance(actual), np.broadcast_to(tolerance, actual.shape)
    wrong = ~(error <= tolerance)
    if wrong.any():
        with np.errstate(all="ignore"):
            excess = np.where(wrong, np.nan_to_num(error / tolerance, nan=np.inf), 0.0)
        at = np.unravel_index(np.argmax(excess), excess.shape)
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} values are off, worst at {[int(i) for i in at]}: "
            f"{actual[at]!r}, expected {expected.rounded()[at]!r}, "
            f"error {error[at]:.3g}, tolerance {tolerance[at]:.3g}"
        )


def bits(a):
    """Return the bytes of an array in the order of its indices: NaN equals NaN, 0 differs from -0."""
    return None if a is None else (a.dtype.str, a.shape, np.ascontiguousarray(a).tobytes())


def assert_same_bits(first, second):
    """Compare two results, arrays or tuples of arrays, bit for bit."""
    if isinstance(first, tuple):
        assert len(first) == len(second)
        for a, b in zip(first, second, strict=True):
            assert_same_bits(a, b)
    elif isinstance(first, np.ndarray):
        different = np.ascontiguousarray(first) != np.ascontiguousarray(second)
        assert bits(first) == bits(second), f"{different.sum()} of {first.size} values differ"
    else:
        assert first == second


class unchanged:
    """Hold these arrays, None among them, to their bits over a block, however it ends."""

    def __init__(self, *arrays):
        self.arrays = arrays

    def __enter__(self):
        self.before = [bits(a) for a in self.arrays]

    def __exit__(self, *_):
        for array, before in zip(self.arrays, self.before, strict=True):
            assert bits(array) == before, "an array was written"


class around:
    """Hold all of the memory that `view` lies in to its bits, but for the view itself."""

    def __init__(self, view):
        self.view = view

    def others(self):
        base = self.view
        while isinstance(base.base, np.ndarray):
            base = base.base
        if not isinstance(base, np.ndarray) or base.base is not None:
            return None  # a whole bytearray: nothing but one byte beside the view
        kept = self.view.copy()
        self.view[...] = 0
        result = bits(base.view(np.uint8)) if base.flags.c_contiguous else None
        self.view[...] = kept
        return result

    def __enter__(self):
        self.before = self.others()

    def __exit__(self, kind, *_):
        if kind is None:
            assert self.others() == self.before, "something beside out was written"


def assert_like(out, x):
    """`out` is an array of x's type, shape and memory layout."""
    assert type(out) is np.ndarray
    assert (out.dtype, out.shape) == (x.dtype, x.shape)
    like = np.empty_like(x, order="K", subok=False)
    lengths = zip(x.shape, out.strides, like.strides, strict=True)
    assert all(a == b for n, a, b in lengths if n > 1), f"{out.strides} for {like.strides}"
    assert out.flags.writeable


def out_of(result, out, x):
    """The array that a call returned: the caller's own, or a fresh one."""
    if out is not None:
        assert result is out
    else:
        assert_like(result, x)
        assert not np.may_share_memory(result, x)


def _chosen(channels, axis, x, *columns):
    """Return x and one-a-channel arrays, of some of the channels only."""
    if channels is None:
        return x, *columns
    return np.take(x, channels, axis), *(None if v is None else v[channels] for v in columns)


def check_statistics(actual, expected, dtype, channels=None):
    """Hold count, mean and var of `actual` against `expected`, a reference.Forward."""
    assert type(actual.count) is int and actual.count == expected.count
    for name, tolerance in (
        ("mean", reference.mean_tolerance(expected)),
        ("var", reference.var_tolerance(expected, dtype)),
    ):
        values = getattr(actual, name)
        assert values.dtype == np.float64 and values.ndim == 1
        values = values if channels is None else values[channels]
        assert_within(name, values[:, None], getattr(expected, name), tolerance)


def check_forward(x, weight=None, bias=None, *, eps=1e-5, axis=1, out=None, channels=None):
    """Call batch_norm_forward and hold all that it returns against the oracle; return it."""
    inputs = (weight, bias) if out is x else (x, weight, bias)
    chosen = _chosen(channels, axis, x, weight, bias)
    expected = reference.forward(*chosen, eps=eps, axis=axis)
    if out is not None and out is not x:
        out[...] = np.nan
    with unchanged(*inputs):
        result = nbbn.batch_norm_forward(x, weight, bias, eps=eps, axis=axis, out=out)
    assert result._fields == ("out", "mean", "var", "invstd", "count")
    out_of(result.out, out, x)
    check_statistics(result, expected, x.dtype, channels)
    assert result.invstd.dtype == np.float64
    invstd, actual = (
        _chosen(channels, 0, result.invstd)[0],
        _chosen(channels, axis, result.out)[0],
    )
    tolerance = reference.invstd_tolerance(expected, x.dtype)
    assert_within("invstd", invstd[:, None], expected.invstd, tolerance)
    tolerance = reference.out_tolerance(expected, x.dtype)
    assert_within("out", rows(actual, axis), expected.out, tolerance)
    return result


def check_evaluation(
    x,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    *,
    eps=1e-5,
    axis=1,
    out=None,
    channels=None,
):
    """Call batch_norm in evaluation and hold its output against the oracle; return it."""
    inputs = (running_mean, running_var, weight, bias)
    chosen = _chosen(channels, axis, x, *inputs)
    expected = reference.evaluate(*chosen, eps=eps, axis=axis)
    if out is not None and out is not x:
        out[...] = np.nan
    with unchanged(None if out is x else x, *inputs):
        result = nbbn.batch_norm(x, *inputs, eps=eps, axis=axis, out=out)
    out_of(result, out, x)
    actual = _chosen(channels, axis, result)[0]
    tolerance = reference.out_tolerance(expected, x.dtype)
    assert_within("out", rows(actual, axis), expected.out, tolerance)
    return result


def check_backward(
    grad_out,
    x,
    weight=None,
    *,
    mean,
    invstd,
    axis=1,
    training=True,
    out=None,
    channels=None,
):
    """Call batch_norm_backward and hold all gradients against the oracle; return them."""
    dy = _chosen(channels, axis, grad_out)[0]
    chosen_x, *columns = _chosen(channels, axis, x, weight, mean, invstd)
    expected = reference.backward(
        dy, chosen_x, columns[0], mean=columns[1], invstd=columns[2], axis=axis, training=training
    )
    inputs = [a for a in (grad_out, x) if a is not out]
    if out is not None and len(inputs) == 2:
        out[...] = np.nan
    with unchanged(*inputs, weight, mean, invstd):
        result = nbbn.batch_norm_backward(
            grad_out, x, weight, mean=mean, invstd=invstd, axis=axis, training=training, out=out
        )
    assert result._fields == ("x", "weight", "bias")
    out_of(result.x, out, x)
    for name, tolerance in (
        ("bias", reference.grad_bias_tolerance(expected, x.dtype)),
        ("weight", reference.grad_weight_tolerance(expected, x.dtype)),
    ):
        values = getattr(result, name)
        assert values.dtype == np.float64 and values.ndim == 1
        values = _chosen(channels, 0, values)[0]
        assert_within(f"grad_{name}", values[:, None], getattr(expected, name), tolerance)
    actual = _chosen(channels, axis, result.x)[0]
    tolerance = reference.grad_x_tolerance(expected, x.dtype)
    assert_within("grad_x", rows(actual, axis), expected.x, tolerance)
    return result


def check_running(name, buffer, old, new, new_tolerance, momentum):
    """Hold a running statistic against the oracle's update of `old` with `new`."""
    expected = reference.running(old, new, momentum)
    tolerance = reference.running_tolerance(old, new, momentum, expected, buffer.dtype, new_tolerance)
    assert_within(name, column(buffer, 0.0, len(buffer)), expected, tolerance)


def check_training(
    x,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    *,
    momentum=0.1,
    eps=1e-5,
    axis=1,
    out=None,
):
    """Call batch_norm in training and hold output and running statistics against the oracle; return it."""
    expected = reference.forward(x, weight, bias, eps=eps, axis=axis)
    old = [None if v is None else v.copy() for v in (running_mean, running_var)]
    if out is not None and out is not x:
        out[...] = np.nan
    with unchanged(None if out is x else x, weight, bias):
        result = nbbn.batch_norm(
            x, running_mean, running_var, weight, bias, True, momentum, eps, axis=axis, out=out
        )
    out_of(result, out, x)
    assert_within("out", rows(result, axis), expected.out, reference.out_tolerance(expected, x.dtype))
    if running_mean is not None:
        tolerance = reference.mean_tolerance(expected)
        check_running("running_mean", running_mean, old[0], expected.mean, tolerance, momentum)
    if running_var is not None:
        new = reference.unbiased(expected.var, expected.count)
        tolerance = expected.count / (expected.count - 1) * reference.var_tolerance(expected, x.dtype)
        check_running("running_var", running_var, old[1], new, tolerance, momentum)
    return result


def check_updates(buffers, old, found, count, momentum):
    """Hold running statistics against the oracle's update of `old` with the mean and var that were found."""
    mean = Twofold.of(found[0][:, None])
    check_running("running_mean", buffers[0], old[0], mean, 0.0, momentum)
    var = reference.unbiased(Twofold.of(found[1][:, None]), count)
    tolerance = 4 * reference.unit(reference.STATISTICS) * var.hi
    check_running("running_var", buffers[1], old[1], var, tolerance, momentum)
