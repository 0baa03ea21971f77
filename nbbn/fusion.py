"""What follows batch normalization in the same pass over memory: a residual, and an activation."""

import math
from typing import Any, NamedTuple

from nbbn import arrays
from nbbn.problem import BATCH, Form

# Not nbbn.formulas.ACTIVATIONS: the formulas are only read when a kernel is wanted.
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "gelu_tanh")


SLOPE = 0.01  # of leaky_relu, unless another is given


class Fusion(NamedTuple):
    """Checked arguments.

    Attributes
    ----------
    activation : str
        One of ACTIVATIONS, or "" for none.
    slope : float
        Of leaky_relu.
    residual : array or None
        Not checked: of x's shape and dtype.
    """

    activation: str = ""
    slope: float = 0.0
    residual: Any = None

    @property
    def form(self) -> Form:
        """The form of batch normalization with these."""
        return Form(activation=self.activation, residual=self.residual is not None) if self else BATCH

    def __bool__(self) -> bool:
        return self.activation != "" or self.residual is not None


ALONE = Fusion()


def fusion(activation: Any, negative_slope: Any, residual: Any = None) -> Fusion:
    """Return what follows a batch normalization, or raise."""
    slope = arrays.number("negative_slope", negative_slope, -math.inf, math.inf)
    if activation is None:
        return ALONE if residual is None else Fusion(residual=residual)
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a str or None, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be None or one of {known}, got {activation!r}")
    return Fusion(activation, slope, residual)
