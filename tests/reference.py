"""The oracle: batch normalization from its definition, and how far nbbn may be from it.

Imports nothing of nbbn and shares no formula with it. It takes the arrays as they are, rounded as they
are, in any layout, and computes in two passes with exact sums and about 106 bits (`twofold.py`), for
float32 and float64 alike; a result is rounded when it is compared, and only then.

Everything here has its channels first and all else second: rows (C, m), and a column (C, 1) of one
number a channel. `rows` brings an array into that form.

S. Ioffe and C. Szegedy, "Batch Normalization", arXiv 1502.03167.
"""

import importlib
import math
from dataclasses import dataclass

import numpy as np

from twofold import Twofold

STATISTICS = np.float64
"""The type that mean, var and the gradients of weight and bias come back in."""


def rows(x, axis=1):
    """Return x as (C, m), in the order of its indices, in x's own type."""
    x = np.moveaxis(np.asarray(x), axis, 0)
    return x.reshape(len(x), math.prod(x.shape[1:]))


def column(values, default, channels):
    """Return one number a channel as (C, 1), float64; `default` for None."""
    if values is None:
        return np.full((channels, 1), default)
    return np.asarray(values).astype(np.float64).reshape(channels, 1)


# --- the mathematics -------------------------------------------------------------------------------


@dataclass
class Forward:
    """The result of `forward` and of `evaluate`, with what the tolerances need."""

    count: int
    mean_abs: np.ndarray | None  # (C, 1): mean |x|
    mean: Twofold  # (C, 1)
    var: Twofold  # (C, 1), biased
    eps: float
    invstd: Twofold  # (C, 1)
    x_hat: Twofold  # (C, m)
    weight: np.ndarray  # (C, 1)
    bias: np.ndarray  # (C, 1)
    out: Twofold  # (C, m)
    largest: np.ndarray | float = 0.0  # (C, 1): max |x| of inputs narrower than float64


def statistics(x, axis=1):
    """Return count, mean and var: mean = Σ x / m and var = Σ (x - mean)² / m."""
    values = Twofold(rows(x, axis))
    count = values.shape[1]
    mean = values.row_sums() / count
    deviation = values - mean
    return count, mean, (deviation * deviation).row_sums() / count


def forward(x, weight=None, bias=None, *, eps=1e-5, axis=1):
    """Training: x is normalized with its own statistics."""
    count, mean, var = statistics(x, axis)
    sizes = np.abs(rows(x, axis).astype(np.float64))
    mean_abs = sizes.mean(axis=1, keepdims=True)
    expected = _normalize(x, count, mean_abs, mean, var, weight, bias, eps, axis)
    if x.dtype != np.float64:
        expected.largest = sizes.max(axis=1, keepdims=True)
    return expected


def evaluate(x, running_mean, running_var, weight=None, bias=None, *, eps=1e-5, axis=1):
    """Evaluation: x is normalized with given statistics."""
    channels = x.shape[axis]
    mean = Twofold(column(running_mean, 0.0, channels))
    var = Twofold(column(running_var, 1.0, channels))
    return _normalize(x, x.size // channels, None, mean, var, weight, bias, eps, axis)


def _normalize(x, count, mean_abs, mean, var, weight, bias, eps, axis):
    """x_hat = (x - mean) / sqrt(var + eps) and out = weight · x_hat + bias."""
    channels = x.shape[axis]
    weight, bias = column(weight, 1.0, channels), column(bias, 0.0, channels)
    invstd = 1.0 / (var + eps).sqrt()
    x_hat = (rows(x, axis) - mean) * invstd
    out = x_hat * weight + bias
    return Forward(count, mean_abs, mean, var, eps, invstd, x_hat, weight, bias, out)


@dataclass
class Backward:
    """The result of `backward`, with what the tolerances need."""

    count: int
    training: bool
    x: Twofold  # (C, m): the gradient of x
    weight: Twofold  # (C, 1)
    bias: Twofold  # (C, 1)
    slope: np.ndarray  # (C, 1): |weight| · invstd
    grad_out: np.ndarray  # (C, m)
    x_hat: Twofold  # (C, m)


def backward(grad_out, x, weight=None, *, mean, invstd, axis=1, training=True):
    """The gradients of Σ grad_out · out with respect to x, weight and bias.

    grad_bias = Σ dy                  grad_weight = Σ dy · x_hat
    grad_x = weight · invstd · (dy - grad_bias/m - x_hat · grad_weight/m)      in training
    grad_x = weight · invstd · dy                                              in evaluation
    """
    channels, count = x.shape[axis], x.size // x.shape[axis]
    weight = column(weight, 1.0, channels)
    mean, invstd = (
        v if isinstance(v, Twofold) else Twofold(column(v, 0.0, channels)) for v in (mean, invstd)
    )
    dy = Twofold(rows(grad_out, axis))
    x_hat = (rows(x, axis) - mean) * invstd
    grad_bias = dy.row_sums()
    grad_weight = (dy * x_hat).row_sums()
    grad_x = dy
    if training:
        grad_x = dy - grad_bias / count - x_hat * (grad_weight / count)
    return Backward(
        count,
        training,
        x=grad_x * invstd * weight,
        weight=grad_weight,
        bias=grad_bias,
        slope=np.abs(weight) * invstd.hi,
        grad_out=dy.hi,
        x_hat=x_hat,
    )


def running(old, new, momentum):
    """running ← (1 - momentum) · running + momentum · new, for columns of numbers."""
    return (1.0 - Twofold(momentum)) * column(old, 0.0, len(old)) + momentum * Twofold.of(new)


def unbiased(var, count, correction=1):
    """var · m / (m - correction), the variance that is tracked."""
    return var * count / (count - correction)


# --- how far the result may be from it -------------------------------------------------------------
#
# u is half a unit in the last place of the type that computes, c = 4 + log2(m): the depth of a tree of m
# terms, and four roundings. Each bound is scaled by sums of absolute values, never by a result that may
# cancel. The types of half precision only store: they are computed with in float32 at least, and a result
# is rounded to them once.


def finfo(dtype):
    """Return what NumPy, or ml_dtypes for its own types, knows of a floating type."""
    dtype = np.dtype(dtype)
    return np.finfo(dtype) if dtype.kind == "f" else importlib.import_module("ml_dtypes").finfo(dtype)


def is_half(dtype):
    """Whether this is float16 or bfloat16."""
    return np.dtype(dtype).itemsize == 2


def unit(dtype):
    """u: 2⁻²⁴ for float32 and all that is narrower, 2⁻⁵³ for float64."""
    return float(finfo(np.float32 if is_half(dtype) else dtype).eps) / 2


def rounded_once(values, dtype):
    """Return float64 numbers in another type: ml_dtypes goes to bfloat16 by way of float32, and rounds twice.

    So that float32 is odd where it is not the number, which no tie and no number of bfloat16 is.
    """
    if np.dtype(dtype).name != "bfloat16":
        return values.astype(dtype)
    single = values.astype(np.float32)
    beyond = np.abs(single.astype(np.float64)) > np.abs(values)
    single = np.where(beyond, np.nextafter(single, np.float32(0)), single)
    bits = single.view(np.uint32) | (single.astype(np.float64) != values)
    return bits.view(np.float32).astype(dtype)


def ulp_tolerance(expected, dtype):
    """One unit in the last place, at the nearest number of the type: that one and its two neighbours will do

    Where the nearest is infinite, anything will do but NaN.
    """
    with np.errstate(over="ignore"):
        nearest = expected.rounded().astype(dtype).astype(np.float64)
    info = finfo(dtype)
    exponent = np.frexp(np.maximum(np.abs(nearest), float(info.smallest_normal)))[1] - 1
    return np.ldexp(float(info.eps), exponent) + expected.distance(nearest)


def depth(count):
    """c = 4 + log2(m)"""
    return 4.0 + math.log2(count)


def out_tolerance(expected, dtype):
    """|γ| u (8 |x_hat| + 2 (|x - mean|/s + |x_hat|)) + u (|out| + |β|), with |x - mean|/s = |x_hat|

    Half precision: `ulp_tolerance`, this with float64's u, and what the variance's own tolerance adds.
    And |γ|/s · 8 u_stat² · mean|x|: a mean of x's own is known to twice float64's precision, which is all
    there is to see where x is the mean.

    A subnormal result is rounded twice to the smallest number that there is, each time by half of it: the
    channel's shift, which is as small where the result is, and its sum with what goes with x.
    """
    if is_half(dtype):
        bound = ulp_tolerance(expected.out, dtype) + out_tolerance(expected, np.float64)
        if expected.mean_abs is not None:  # the variance is x's own, and known to its tolerance
            share = invstd_tolerance(expected, dtype) / expected.invstd.hi
            bound = bound + np.abs(expected.weight * expected.x_hat.hi) * share
        return bound
    u, x_hat = unit(dtype), np.abs(expected.x_hat.hi)
    weight = np.abs(expected.weight)
    bound = u * weight * (8 * x_hat + 2 * (x_hat + x_hat)) + u * (
        np.abs(expected.out.hi) + np.abs(expected.bias)
    )
    bound = bound + float(np.finfo(dtype).smallest_subnormal)
    if expected.mean_abs is not None:
        bound = bound + weight * expected.invstd.hi * 8 * unit(STATISTICS) ** 2 * expected.mean_abs
    return bound


def mean_tolerance(expected):
    """2 u_stat · mean|x|, with u_stat = 2⁻⁵³: the mean comes back as float64

    And 8 u_stat · max|x| / m for inputs that are narrower: eight values at a time are added in plain
    float64. It shows only where one value outweighs all the others together.
    """
    slack = 8 * unit(STATISTICS) * expected.largest / expected.count
    return 2 * unit(STATISTICS) * expected.mean_abs + slack


def var_tolerance(expected, dtype):
    """c u · var + (c u_stat · mean|x|)²

    The square is what an error of the mean adds to the variance, and the mean is right to u_stat: with
    x's own u there, nothing would be tested of a float32 input whose mean is 1e7.
    """
    c = depth(expected.count)
    return c * unit(dtype) * expected.var.hi + (c * unit(STATISTICS) * expected.mean_abs) ** 2


def invstd_tolerance(expected, dtype):
    """invstd · (½ · (var's tolerance) / (var + eps) + 4 u_stat), as (var + eps)^-½ passes errors on"""
    share = var_tolerance(expected, dtype) / (expected.var.hi + expected.eps)
    return expected.invstd.hi * (share / 2 + 4 * unit(STATISTICS))


def grad_bias_tolerance(expected, dtype):
    """c u Σ|dy|"""
    scale = np.abs(expected.grad_out).sum(axis=1, keepdims=True)
    return depth(expected.count) * unit(dtype) * scale


def grad_weight_tolerance(expected, dtype):
    """c u Σ|dy · x_hat|"""
    scale = np.abs(expected.grad_out * expected.x_hat.hi).sum(axis=1, keepdims=True)
    return depth(expected.count) * unit(dtype) * scale


def grad_x_tolerance(expected, dtype):
    """8 u |γ|/s · (|dy| + |grad_bias|/m + |x_hat · grad_weight|/m); evaluation has the first term only

    And u_stat |γ|/s · |x_hat| Σ|dy · x_hat|/m: x - mean is rounded once, to float64, in every term of
    grad_weight, which may cancel in the sum. It shows in float64 only, where all three terms above are
    small at once. Half precision: `ulp_tolerance`, and this with float64's u, where grad_bias and
    grad_weight are plain sums in float64, within c u_stat of the sums of absolute values.

    A subnormal result is rounded three times to the smallest number that there is, each time by half of it:
    the channel's offset, its sum with what goes with x, and that with what goes with dy.
    """
    if is_half(dtype):
        bound = ulp_tolerance(expected.x, dtype) + grad_x_tolerance(expected, np.float64)
        if expected.training:
            sums = grad_bias_tolerance(expected, np.float64)
            sums = sums + np.abs(expected.x_hat.hi) * grad_weight_tolerance(expected, np.float64)
            bound = bound + expected.slope * sums / expected.count
        return bound
    dy, x_hat = np.abs(expected.grad_out), np.abs(expected.x_hat.hi)
    bound = 8 * unit(dtype) * dy
    if expected.training:
        sums = np.abs(expected.bias.hi) + x_hat * np.abs(expected.weight.hi)
        products = (dy * x_hat).sum(axis=1, keepdims=True)
        bound = bound + (8 * unit(dtype) * sums + unit(STATISTICS) * x_hat * products) / expected.count
    return expected.slope * bound + 1.5 * float(np.finfo(dtype).smallest_subnormal)


def running_tolerance(old, new, momentum, expected, dtype, new_tolerance):
    """u |running| + 4 u_stat ((1 - momentum) |old| + momentum |new|) + momentum · (new's tolerance)

    One rounding to the type of the buffer, four at most in float64, and what `new` brings with it. A
    subnormal number is rounded to the smallest number that there is, by half of it.
    """
    old = column(old, 0.0, len(old))
    parts = (1 - momentum) * np.abs(old) + momentum * np.abs(new.hi)
    rounding = (float(finfo(dtype).eps) * np.abs(expected.hi) + float(finfo(dtype).smallest_subnormal)) / 2
    return rounding + 4 * unit(STATISTICS) * parts + momentum * new_tolerance


# --- the other normalizations ------------------------------------------------------------------------
#
# The same mathematics over other sets of values: a row is one layer, instance or group of a sample, and each
# value has the weight and the bias of its place in the layer, or of its channel.
#
# J. L. Ba et al., "Layer Normalization", arXiv 1607.06450. B. Zhang and R. Sennrich, "Root Mean Square Layer
# Normalization", arXiv 1910.07467. D. Ulyanov et al., "Instance Normalization", arXiv 1607.08022. Y. Wu and
# K. He, "Group Normalization", arXiv 1803.08494.


@dataclass
class Rows:
    """Which values of an array share statistics, and which parameter each of them has."""

    places: np.ndarray  # (R, m): where row r's values are, in the order of the array's indices
    owners: np.ndarray  # (R, m): which of the parameters they have, in the order of the parameters' indices
    statistics: tuple[int, ...]  # the shape of a statistic: R numbers
    parameters: tuple[int, ...]  # the shape of a weight
    along: bool  # whether a row has each parameter once, or one and the same for all of a channel

    def of(self, array):
        """Return an array's values as (R, m), in its own type."""
        return np.asarray(array).reshape(-1)[self.places]

    def spread(self, values, default):
        """Return the parameter of each value, (R, m) in float64; `default` for None."""
        if values is None:
            return np.full(self.places.shape, default)
        return np.asarray(values).astype(np.float64).reshape(-1)[self.owners]

    def gathered(self, terms):
        """Return Σ of the terms, a Twofold (R, m), of each parameter: (P, 1)."""
        order = np.argsort(self.owners, axis=None, kind="stable").reshape(math.prod(self.parameters), -1)
        return Twofold(terms.hi.reshape(-1)[order], terms.lo.reshape(-1)[order]).row_sums()


def layers(dims, normalized):
    """The last `normalized` axes together, for layer norm and RMS norm: a parameter for each place there."""
    leading, shape = dims[: len(dims) - normalized], dims[len(dims) - normalized :]
    places = np.arange(math.prod(dims)).reshape(math.prod(leading), math.prod(shape))
    owners = np.broadcast_to(np.arange(math.prod(shape)), places.shape)
    return Rows(places, owners, leading, shape, along=True)


def groups(dims, num_groups, axis=1):
    """Each sample's channels in so many groups, a parameter a channel; as many groups as channels: instances.

    Samples are along the first other axis than the channels'.
    """
    places = np.moveaxis(np.moveaxis(np.arange(math.prod(dims)).reshape(dims), axis, 0), 1, 0)
    samples, channels, *others = places.shape
    owners = np.arange(channels).reshape(channels, *[1] * len(others))
    owners = np.broadcast_to(owners, places.shape)
    shape = samples * num_groups, channels // max(num_groups, 1) * math.prod(others)
    statistics = samples, num_groups
    return Rows(places.reshape(shape), owners.reshape(shape), statistics, (channels,), along=False)


def forward_rows(of, x, weight=None, bias=None, *, eps=1e-5, centered=True):
    """As `forward`, with the statistics of each row; not centered: mean = 0 and var = Σ x² / m."""
    values = of.of(x)
    count, mean, var = statistics(values, axis=0)
    sizes = np.abs(values.astype(np.float64))
    if not centered:
        mean, sizes = Twofold(np.zeros(mean.shape)), np.zeros_like(sizes)
        var = (Twofold(values) * Twofold(values)).row_sums() / count
    weight, bias = of.spread(weight, 1.0), of.spread(bias, 0.0)
    invstd = 1.0 / (var + eps).sqrt()
    x_hat = (values - mean) * invstd
    expected = Forward(
        count,
        sizes.mean(axis=1, keepdims=True),
        mean,
        var,
        eps,
        invstd,
        x_hat,
        weight,
        bias,
        x_hat * weight + bias,
    )
    if values.dtype != np.float64:
        expected.largest = sizes.max(axis=1, keepdims=True)
    return expected


@dataclass
class BackwardRows:
    """The result of `backward_rows`, with what the tolerances need. P: parameters, k: values of each."""

    count: int  # m
    shared: int  # k
    x: Twofold  # (R, m): the gradient of x
    weight: Twofold  # (P, 1)
    bias: Twofold  # (P, 1)
    sums: tuple[np.ndarray, np.ndarray]  # (R, 1): |Σ g| and |Σ g · x_hat|, the first 0 if not centered
    sizes: tuple[np.ndarray, np.ndarray]  # (R, 1): Σ|g| and Σ|g · x_hat|
    scales: tuple[np.ndarray, np.ndarray]  # (P, 1): Σ|dy · x_hat| and Σ|dy|
    invstd: np.ndarray  # (R, 1)
    slope: np.ndarray  # (R, m): |g|, with g = dy · weight
    x_hat: np.ndarray  # (R, m): |x_hat|
    weights: float  # the unit that weights are rounded to before the sums, which they are not where it is 0


def backward_rows(of, grad_out, x, weight=None, *, mean=None, invstd, centered=True):
    """The gradients of Σ grad_out · out with respect to x, weight and bias, with g = dy · weight.

    grad_bias = Σ dy                  grad_weight = Σ dy · x_hat       over the values that have the parameter
    grad_x = invstd · (g - Σ g / m - x_hat · Σ g · x_hat / m)          over the row; not centered: no Σ g
    """
    dy, gamma = Twofold(of.of(grad_out)), of.spread(weight, 1.0)
    count = of.places.shape[1]
    zeros = np.zeros((len(of.places), 1))
    mean = Twofold(zeros) if mean is None else mean
    mean, invstd = (
        v if isinstance(v, Twofold) else Twofold(np.asarray(v).astype(np.float64).reshape(-1, 1))
        for v in (mean, invstd)
    )
    x_hat = (of.of(x) - mean) * invstd
    g = dy * gamma
    sum_g = g.row_sums() if centered else Twofold(zeros)
    products = g * x_hat
    sum_products = products.row_sums()
    terms = dy * x_hat

    def sizes(a):
        return np.abs(a.hi).sum(axis=1, keepdims=True)

    return BackwardRows(
        count,
        x_hat.hi.size // max(math.prod(of.parameters), 1),
        x=(g - sum_g / count - x_hat * (sum_products / count)) * invstd,
        weight=of.gathered(terms),
        bias=of.gathered(dy),
        sums=(np.abs(sum_g.hi), np.abs(sum_products.hi)),
        sizes=(sizes(g) * centered, sizes(products)),
        scales=(of.gathered(abs(terms)).hi, of.gathered(abs(dy)).hi),
        invstd=np.abs(invstd.hi),
        slope=np.abs(g.hi),
        x_hat=np.abs(x_hat.hi),
        weights=_rounding_of_weights(of, x, weight),
    )


def _rounding_of_weights(of, x, weight):
    """Along a layer they are read as what x is computed in: float64 for a narrower x is rounded to that.

    By channel they multiply sums, in float64.
    """
    wide = weight is not None and weight.dtype == np.float64 and x.dtype != np.float64
    return unit(np.float32) if of.along and wide else 0.0


def parameter_tolerance(expected, scale, dtype):
    """c u Σ|dy · x_hat| for a weight, c u Σ|dy| for a bias: their `scale`, of as many terms as share one"""
    return depth(expected.shared) * unit(dtype) * scale


def out_rows_tolerance(expected, dtype):
    """`out_tolerance`, and c u_stat² |γ| mean|x| / s

    The mean of a group is merged from those of its channels with two-fold arithmetic: where x is the mean,
    what that rounds is all there is.
    """
    lost = depth(expected.count) * unit(STATISTICS) ** 2 * expected.mean_abs * expected.invstd.hi
    return out_tolerance(expected, dtype) + np.abs(expected.weight) * lost


def rows_tolerance(expected, dtype):
    """8 u / s · (|g| + |Σ g|/m + |x_hat · Σ g · x_hat|/m)

    And u_stat / s · (Σ|g| + 2 |x_hat| Σ|g · x_hat|)/m: in every term of the sums dy · weight is rounded once
    to float64, and x - mean is in the second, and the terms may cancel; where the weights themselves are
    rounded, their unit times the same. Half precision: `ulp_tolerance`, this with float64's u, and c u_stat
    of those sums of absolute values, which are plain sums in float64.
    """
    (sum_g, sum_products), (size_g, size_products) = expected.sums, expected.sizes
    x_hat, m, u = expected.x_hat, expected.count, unit(np.float64 if is_half(dtype) else dtype)
    bound = 8 * u * (expected.slope + sum_g / m + x_hat * sum_products / m)
    lost = unit(STATISTICS) * (size_g + 2 * x_hat * size_products) / m
    rounded = expected.weights * (size_g + x_hat * size_products) / m
    if is_half(dtype):
        return ulp_tolerance(expected.x, dtype) + expected.invstd * (bound + depth(m) * lost + rounded)
    return expected.invstd * (bound + lost + rounded)


def of_instances(values, tolerance, of):
    """Return Σ over samples / N of what each instance has, (C, 1), and of how far it may be off."""
    samples, channels = of.statistics
    hi, lo, tolerance = (
        np.broadcast_to(v, (samples * channels, 1)).reshape(samples, channels).T
        for v in (values.hi, values.lo, tolerance)
    )
    return Twofold(hi, lo).row_sums() / samples, tolerance.mean(axis=1, keepdims=True)
