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

from nbbn.compiler import fma, formula


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
def about_mean(squares, rest, count):
    """Σ (x - mean - rest)² = Σ (x - mean)² - count · rest²

    Where values are a few units in their last place apart, rest is as large as they are.
    """
    return squares - rest * rest * count


@formula
def merge(count_a, mean_a, rest_a, m2_a, count_b, mean_b, rest_b, m2_b):
    """Pool two sets of statistics (Chan et al.); a constant channel keeps m2 == 0 exactly.

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
    return mean, rest, m2_a + m2_b + delta * (delta * (count_a * share))


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
def normalized_doubt(shift):
    """Below this |out| is not known to the last place of a float16, if it was computed in float32.

    There (x - mean) · scale and shift cancel: u = 2⁻²⁴ of each is 3 u · |shift| at most, of the result 2⁻¹³.
    """
    return math.fabs(shift) * 2.0**-11


@formula
def affine(x_hat, weight, bias):
    """out = weight · x_hat + bias, where each element of what is normalized has parameters of its own."""
    return x_hat * weight + bias


@formula
def affine_doubt(doubt, weight, bias):
    """Below this |out| is not known to the last place of a float16, if x_hat is not below `doubt`."""
    return doubt * math.fabs(weight) + math.fabs(bias) * 2.0**-11


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
    if lost == 0.0:
        return bias  # also where scale is infinite
    return bias - lost * scale


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


@formula
def power_of_two(invstd):
    """Return a power of two near invstd: x - mean is scaled with it into range, without rounding."""
    if not 2.0**-120 < invstd < 2.0**120:
        return 1.0
    return math.ldexp(1.0, math.frexp(invstd)[1])


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
def gradient_doubt(x, mean, unit, slope, offset):
    """Below this |grad_x| is not known to the last place of a float16, if it was computed in float32.

    Where a result is that small, no term is larger than the other two together, which this is 2⁻¹⁰ of.
    """
    return (math.fabs(slope * ((x - mean) * unit) + offset) + math.fabs(offset)) * 2.0**-10
