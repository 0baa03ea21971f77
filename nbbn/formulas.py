"""The mathematics of batch normalization, each formula once, for every target.

Source: S. Ioffe and C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", arXiv 1502.03167; pooling of partial statistics: T. F. Chan, G. H. Golub
and R. J. LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979;
exact sums of two: D. E. Knuth, TAOCP vol. 2, 4.2.2.

A formula knows nothing of arrays, loops or targets: its arguments are numbers, or vectors of numbers
that the CPU kernels carry in registers. Nothing here may be compiled with fastmath's `reassoc`: the
compensated sums would be folded away.

A mean is carried as `mean + rest`, a high and a low part, so that it is known better than its own
rounding; `m2` is the sum of squared deviations from it.
"""

import math
from typing import Any, NamedTuple

from nbbn.compiler import MAGIC32, MAGIC64, at_most_zero, fma, formula, is_double, like, power_above, two_to


@formula
def two_sum(a, b):
    """Return the rounded sum of a and b, and exactly what the rounding lost."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


@formula
def mean_of(total, lost, count):
    """Return (total + lost) / count as mean, rest; exact where the quotient is a number."""
    mean = total / count
    return two_sum(mean, (fma(-mean, count, total) + lost) / count)


@formula
def squared_deviation(x, mean):
    """(x - mean)²"""
    deviation = x - mean
    return deviation * deviation


@formula
def add_squared_deviation(total, x, mean):
    """total + (x - mean)², rounded once: which product is fused must not be the compiler's choice"""
    deviation = x - mean
    return fma(deviation, deviation, total)


@formula
def about_mean(squares, rest, count):
    """Σ (x - mean - rest)² = Σ (x - mean)² - count · rest²

    Where values are a few units in their last place apart, rest is as large as they are.
    """
    return squares - rest * rest * count


@formula
def pooled(count_a, mean_a, rest_a, count_b, mean_b, rest_b):
    """Return the mean of two sets of values as mean, rest, and what their m2 have less than m2 of all.

    mean = mean_a + delta · n_b/n        m2 = m2_a + m2_b + delta² · n_a · n_b/n

    The mean is computed in twice the precision: what each step loses goes into `rest`.
    """
    count = count_a + count_b
    share = count_b / count
    share_lost = fma(-share, count, count_b) / count
    delta, delta_lost = two_sum(mean_b, -mean_a)
    delta_lost = delta_lost + (rest_b - rest_a)
    step = delta * share
    step_lost = fma(delta, share, -step) + (delta * share_lost + delta_lost * share)
    mean, lost = two_sum(mean_a, step)
    mean, rest = two_sum(mean, rest_a + lost + step_lost)
    delta = delta + delta_lost
    # delta · (delta · weight), in this order, so that large means do not overflow delta².
    return mean, rest, delta * (delta * (count_a * share))


@formula
def merge(count_a, a, count_b, b):
    """Pool two sets of statistics (Chan et al.); a constant channel keeps m2 == 0 exactly.

    Of each there are mean, rest, m2 and what the sums in m2 have lost: many are merged, one after the other.
    """
    mean_a, rest_a, m2_a, lost_a = a
    mean_b, rest_b, m2_b, lost_b = b
    mean, rest, between = pooled(count_a, mean_a, rest_a, count_b, mean_b, rest_b)
    m2, lost = two_sum(m2_a, m2_b)
    m2, more = two_sum(m2, between)
    return mean, rest, m2, (lost_a + lost_b) + (lost + more)


@formula
def variance(m2, count):
    """The biased variance, the one that normalizes."""
    return m2 / count


@formula
def inverse_deviation(var, eps):
    """invstd = 1 / sqrt(var + eps)"""
    return 1.0 / math.sqrt(var + eps)


@formula
def normalized(x, mean, scale, shift):
    """out = (x - mean) · scale + shift, with scale = weight · invstd and shift = bias.

    `mean` is the mean rounded to x's type; what that rounding lost is in `shift` (`shift_of`).
    """
    return (x - mean) * scale + shift


@formula
def normalized_doubt(shift, part, doubt):
    """Below this |out| is not known to the last place of 16 bits, if it was computed in float32.

    There (x - mean) · scale and shift cancel: u = 2⁻²⁴ of each is 3 u · |shift| at most. Of a result that is
    `part` of |shift|, this is three quarters of the last place: with 2⁻¹¹ for float16, whose last place is as
    much of a number at least, and 2⁻¹⁴ for bfloat16. What was in `doubt` before still is.
    """
    return fma(math.fabs(shift), like(shift, part), doubt)


@formula
def affine(x_hat, weight, bias):
    """out = weight · x_hat + bias, where each element of what is normalized has parameters of its own."""
    return x_hat * weight + bias


@formula
def affine_doubt(doubt, weight, bias, part):
    """Below this |out| is not known to the last place of 16 bits, if x_hat is not below `doubt`."""
    return doubt * math.fabs(weight) + math.fabs(bias) * like(bias, part)


@formula
def mean_square(var, mean):
    """Σ x² / m = var + mean², what is normalized with where the mean is not subtracted."""
    return var + mean * mean


@formula
def shift_of(bias, lost, scale):
    """The shift that makes up for `lost`, the part of the mean that its rounding lost.

    No x of that type lies nearer to the mean than its rounding does, so |lost| <= |x - mean| and
    the correction costs no accuracy: at x == mean exactly, lost == 0 and out == bias.
    """
    # Also where scale is infinite.
    return at_most_zero(math.fabs(lost), bias, bias - lost * scale)


@formula
def running(old, new, momentum):
    """running ← (1 - momentum) · running + momentum · new; at momentum 1 the old is gone, NaN or not."""
    if momentum == 1.0:
        return new
    return (1.0 - momentum) * old + momentum * new


@formula
def unbiased(var, count, correction):
    """var · m / (m - correction), the variance that is tracked."""
    return var * (count / (count - correction))


LARGEST_UNIT32, LARGEST_UNIT64 = 2.0**126, 2.0**1000  # twice as much is a number, and so is one over it


@formula
def power_of_two(invstd, largest):
    """Return a power of two near invstd: x - mean is scaled with it into range, without rounding.

    It is between 1 / largest and 2 · largest, which are numbers of x's type.
    """
    most, least = like(invstd, largest), like(invstd, 1.0 / largest)
    near = at_most_zero(invstd - most, power_above(invstd), most)
    return at_most_zero(least - invstd, near, least)


@formula
def gradient_parameters(scale, lost, grad_bias, grad_weight, invstd, unit, count):
    """Return slope and offset of grad_x = scale · dy + slope · (x - mean) · unit + offset.

    grad_x = weight · invstd · (dy - grad_bias/m - x_hat · grad_weight/m), scale = weight · invstd;
    `lost` is the part of the mean that its rounding to x's type lost. Where values that share statistics
    have different weights, `scale` is invstd here, and the sums are those of weight · dy.
    """
    slope = -scale * (grad_weight / count * (invstd / unit))
    return slope, -scale * (grad_bias / count) - slope * (lost * unit)


@formula
def gradient(grad_out, x, mean, unit, scale, slope, offset):
    """grad_x = scale · dy + slope · (x - mean) · unit + offset"""
    return scale * grad_out + (slope * ((x - mean) * unit) + offset)


@formula
def gradient_doubt(x, mean, unit, slope, offset, part, doubt):
    """Below this |grad_x| is not known to the last place of 16 bits, if it was computed in float32.

    Where a result is that small, no term is larger than the other two together; this is twice `part` of them
    (see `normalized_doubt`). Here is one with offset; `doubt` is that of offset alone (`offset_doubt`).
    """
    return fma(math.fabs(slope * ((x - mean) * unit) + offset), like(x, 2.0 * part), doubt)


@formula
def offset_doubt(offset, part, doubt):
    """The part of `gradient_doubt` that is one for a channel, and what is in `doubt` at any rate."""
    return fma(math.fabs(offset), like(offset, 2.0 * part), doubt)


# --- activations -----------------------------------------------------------------------------------
#
# Each is applied to z = batch_norm(x) + residual, and its gradient is that of the loss with respect to z.
# The coefficients are minimax fits, made with mpmath: of exp(r) for |r| <= ln(2) / 2, the relative error is
# 2e-9 in float32 and 3e-18 in float64; of the ratio in `_upper_tail`, 6e-9 and 9e-19.

LOG2_E = 1.4426950408889634
LN2_HIGH32, LN2_LOW32 = 0.693145751953125, 1.4286068203094172e-06
LN2_HIGH64, LN2_LOW64 = 0.6931471803691238, 1.9082149292705877e-10
SQRT_HALF_PI_INVERSE = 0.3989422804014327  # 1 / sqrt(2 π)


@formula
def _exp(t):
    """exp(t) of t <= 0; 0 where that is less than the smallest normal number."""
    if is_double(t):
        t = at_most_zero(t + like(t, 709.0), like(t, -709.0), t)
        near = fma(t, like(t, LOG2_E), like(t, MAGIC64))
        n = near - like(t, MAGIC64)
        r = fma(n, like(t, -LN2_LOW64), fma(n, like(t, -LN2_HIGH64), t))
        s = r * r
        even = fma(s, like(t, 2.7632366971624938e-07), like(t, 2.480148632357033e-05))
        even = fma(s, even, like(t, 0.0013888888951407364))
        even = fma(s, even, like(t, 0.041666666666492086))
        even = fma(s, even, like(t, 0.5000000000000018))
        even = fma(s, even, like(t, 1.0))
        odd = fma(s, like(t, 2.4994180903238927e-08), like(t, 2.7557623341947247e-06))
        odd = fma(s, odd, like(t, 0.0001984126943122838))
        odd = fma(s, odd, like(t, 0.008333333333560281))
        odd = fma(s, odd, like(t, 0.16666666666666166))
        odd = fma(s, odd, like(t, 1.0))
    else:
        t = at_most_zero(t + like(t, 88.0), like(t, -88.0), t)
        near = fma(t, like(t, LOG2_E), like(t, MAGIC32))
        n = near - like(t, MAGIC32)
        r = fma(n, like(t, -LN2_LOW32), fma(n, like(t, -LN2_HIGH32), t))
        s = r * r
        even = fma(s, like(t, 0.0013836812771698448), like(t, 0.041668228353715136))
        even = fma(s, even, like(t, 0.49999992057431575))
        even = fma(s, even, like(t, 1.0))
        odd = fma(s, like(t, 0.008374857019919996), like(t, 0.16666419681765752))
        odd = fma(s, odd, like(t, 1.0))
    return fma(r, odd, even) * two_to(near)


@formula
def _sigmoid(z):
    """Return s = 1 / (1 + exp(-z)) and s · (1 - s)."""
    one = like(z, 1.0)
    e = _exp(-math.fabs(z))
    inverse = one / (one + e)
    small = e * inverse
    return at_most_zero(z, small, inverse), small * inverse


@formula
def _upper_tail(z):
    """Return Q(|z|), the normal distribution's upper tail, and its density φ(z).

    Q(a) = exp(-a² / 2) · P(a) / R(a), with polynomials whose coefficients are all positive.
    """
    a = math.fabs(z)
    half = like(z, 0.5)
    if is_double(z):
        a = at_most_zero(like(z, 38.5) - a, like(z, 38.5), a)
        s = a * a
        e = _exp(-half * s)
        e = fma(-half * fma(a, a, -s), e, e)
        even = fma(s, like(z, 2.240279979226386e-07), like(z, 0.00010652038117908208))
        even = fma(s, even, like(z, 0.007120424762130152))
        even = fma(s, even, like(z, 0.13201640932130998))
        even = fma(s, even, like(z, 0.6795293083765969))
        even = fma(s, even, half)
        odd = fma(s, like(z, 6.971907573566466e-06), like(z, 0.00103928634125473408))
        odd = fma(s, odd, like(z, 0.0356577269842689712))
        odd = fma(s, odd, like(z, 0.357283782907063481))
        odd = fma(s, odd, like(z, 0.8278733294256484))
        below = fma(s, like(z, 1.7475980652045745e-05), like(z, 0.00262258050928422895))
        below = fma(s, below, like(z, 0.0919508195284302283))
        below = fma(s, below, like(z, 0.979922990826070512))
        below = fma(s, below, like(z, 2.81677308481914612))
        below = fma(s, below, like(z, 1.0))
        beside = fma(s, like(z, 5.61554913901731657e-07), like(z, 0.0002675685541986778))
        beside = fma(s, beside, like(z, 0.01811414191652621))
        beside = fma(s, beside, like(z, 0.348235916654187585))
        beside = fma(s, beside, like(z, 2.00117323191703818))
        beside = fma(s, beside, like(z, 2.45363121965416233))
    else:
        a = at_most_zero(like(z, 14.0) - a, like(z, 14.0), a)
        s = a * a
        e = _exp(-half * s)
        e = fma(-half * fma(a, a, -s), e, e)
        even = fma(s, like(z, 0.00407570104320755067), like(z, 0.182425846683483445))
        even = fma(s, even, half)
        odd = fma(s, like(z, 0.0403601740420248653), like(z, 0.437203481509925056))
        below = fma(s, like(z, 0.10117477612139705), like(z, 1.19914309846031357))
        below = fma(s, below, like(z, 1.0))
        beside = fma(s, like(z, 0.0102161384254385918), like(z, 0.467333888599897046))
        beside = fma(s, beside, like(z, 1.67229191626748065))
    tail = e * (fma(a, odd, even) / fma(a, beside, below))
    return tail, e * like(z, SQRT_HALF_PI_INVERSE)


@formula
def _bounded(z):
    """Return z; 0 where it is beyond what an exponential of it leaves anything of."""
    return at_most_zero(math.fabs(z) - like(z, 800.0), z, like(z, 0.0))


@formula
def relu(z, slope):
    """max(z, 0)"""
    return at_most_zero(z, like(z, 0.0), z)


@formula
def relu_gradient(grad, z, slope):
    """The gradient of relu: grad where z > 0, otherwise 0."""
    return at_most_zero(z, like(z, 0.0), grad)


@formula
def leaky_relu(z, slope):
    """max(z, 0) + slope · min(z, 0)"""
    return at_most_zero(z, z * slope, z)


@formula
def leaky_relu_gradient(grad, z, slope):
    """The gradient of leaky_relu: grad where z > 0, otherwise slope · grad."""
    return at_most_zero(z, grad * slope, grad)


@formula
def silu(z, slope):
    """silu(z) = z · s(z), with s(z) = 1 / (1 + exp(-z))"""
    return at_most_zero(z, _bounded(z), z) * _sigmoid(z)[0]


@formula
def silu_gradient(grad, z, slope):
    """The gradient of silu: grad · (s + z · s · (1 - s))."""
    s, change = _sigmoid(z)
    return grad * fma(_bounded(z), change, s)


@formula
def gelu(z, slope):
    """gelu(z) = z · Φ(z), with the normal distribution Φ"""
    tail = _bounded(z) * _upper_tail(z)[0]
    return at_most_zero(z, tail, z - tail)


@formula
def gelu_gradient(grad, z, slope):
    """The gradient of gelu: grad · (Φ(z) + z · φ(z))."""
    tail, density = _upper_tail(z)
    whole = at_most_zero(z, tail, like(z, 1.0) - tail)
    return grad * fma(_bounded(z), density, whole)


@formula
def gelu_tanh(z, slope):
    """gelu_tanh(z) = z · (1 + tanh(sqrt(2 / π) · (z + 0.044715 z³))) / 2 = z · s(2 u)"""
    squared = like(z, 0.07135481627260025) * (z * z)
    return at_most_zero(z, _bounded(z), z) * _sigmoid(z * (squared + like(z, 1.5957691216057308)))[0]


@formula
def gelu_tanh_gradient(grad, z, slope):
    """The gradient of gelu_tanh: grad · (s + z · s · (1 - s) · (2 u)')."""
    near = _bounded(z)
    squared = like(z, 0.07135481627260025) * (near * near)
    s, change = _sigmoid(z * (squared + like(z, 1.5957691216057308)))
    rise = fma(like(z, 3.0), squared, like(z, 1.5957691216057308))
    return grad * fma(near * rise, change, s)


class Activation(NamedTuple):
    """A function of z, and its gradient: `apply(z, slope)`, `gradient(grad, z, slope)`.

    `long` are those with an exponential.
    """

    apply: Any
    gradient: Any
    long: bool


ACTIVATIONS = {
    "relu": Activation(relu, relu_gradient, long=False),
    "leaky_relu": Activation(leaky_relu, leaky_relu_gradient, long=False),
    "silu": Activation(silu, silu_gradient, long=True),
    "gelu": Activation(gelu, gelu_gradient, long=True),
    "gelu_tanh": Activation(gelu_tanh, gelu_tanh_gradient, long=True),
}
"""By the names that a user gives them; `slope` is what leaky_relu multiplies with below 0."""
