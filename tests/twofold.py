"""Numbers of about 106 bits: the unevaluated sum hi + lo of two float64 arrays.

float64 inputs want an oracle of more than 53 bits. mpmath takes microseconds for each operation and
`fractions` more; two-fold arithmetic on NumPy arrays takes nanoseconds, so that every element of every
case can be checked. Sums are `math.fsum`'s, exact; each other operation is right to 2⁻¹⁰⁴ or so
(`test_reference.py` holds it against mpmath). Valid while no square overflows or falls below 2⁻⁹⁶⁹:
any float32, and float64 between 1e-140 and 1e140.

T. J. Dekker, "A floating-point technique for extending the available precision", 1971.
"""

import math

import numpy as np


def two_sum(a, b):
    """Return a + b rounded, and exactly what the rounding lost."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def halves(a):
    """Split a into two parts of 26 bits each, whose products are exact."""
    big = (2.0**27 + 1) * a
    high = big - (big - a)
    return high, a - high


def two_product(a, b):
    """Return a · b rounded, and exactly what the rounding lost."""
    product = a * b
    (a1, a0), (b1, b0) = halves(a), halves(b)
    return product, ((a1 * b1 - product) + a1 * b0 + a0 * b1) + a0 * b0


class Twofold:
    """An array of numbers hi + lo, with |lo| at most half a unit in the last place of hi."""

    __array_ufunc__ = None  # array - Twofold is the Twofold's business

    def __init__(self, hi, lo=0.0):
        self.hi = np.asarray(hi, np.float64)
        self.lo = np.broadcast_to(np.asarray(lo, np.float64), self.hi.shape)

    @staticmethod
    def of(value):
        """Return `value`, a number, an array or a Twofold, as a Twofold."""
        return value if isinstance(value, Twofold) else Twofold(value)

    @property
    def shape(self):
        return self.hi.shape

    def __neg__(self):
        return Twofold(-self.hi, -self.lo)

    def __abs__(self):
        return Twofold(np.abs(self.hi), np.where(np.signbit(self.hi), -self.lo, self.lo))

    def __add__(self, other):
        other = Twofold.of(other)
        hi, lo = two_sum(self.hi, other.hi)
        low, lower = two_sum(self.lo, other.lo)
        hi, lo = two_sum(hi, lo + low)
        return Twofold(*two_sum(hi, lo + lower))

    def __sub__(self, other):
        return self + -Twofold.of(other)

    def __mul__(self, other):
        other = Twofold.of(other)
        hi, lo = two_product(self.hi, other.hi)
        return Twofold(*two_sum(hi, lo + (self.hi * other.lo + self.lo * other.hi)))

    def __truediv__(self, other):
        other = Twofold.of(other)
        quotient = self.hi / other.hi
        rest = self - other * quotient
        return Twofold(*two_sum(quotient, rest.hi / other.hi))

    def __rsub__(self, other):
        return Twofold.of(other) - self

    def __rtruediv__(self, other):
        return Twofold.of(other) / self

    __radd__ = __add__
    __rmul__ = __mul__

    def sqrt(self):
        root = np.sqrt(self.hi)
        rest = self - Twofold(root) * root
        correction = np.divide(rest.hi, 2 * root, out=np.zeros_like(root), where=root > 0)
        return Twofold(*two_sum(root, correction))

    def row_sums(self):
        """Return Σ over the second of two axes, exact before it is rounded to hi + lo: (C, 1)."""
        sums = []
        for row, low in zip(self.hi, self.lo, strict=True):
            terms = row.tolist() + (low.tolist() if low.any() else [])
            total = math.fsum(terms)
            sums.append((total, math.fsum([*terms, -total])))
        hi, lo = np.array(sums).reshape(-1, 2, 1).transpose(1, 0, 2)
        return Twofold(hi, lo)

    def rounded(self):
        """Return the nearest float64 array."""
        return self.hi + self.lo

    def distance(self, values):
        """Return |values - self|, for values (any floating type) that are meant to be near."""
        return np.abs((np.asarray(values, np.float64) - self.hi) - self.lo)
