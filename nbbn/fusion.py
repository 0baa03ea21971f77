"""What goes along with batch normalization in the same pass: a residual, an activation, a mask."""

import math
from typing import Any, NamedTuple

import numpy as np

from nbbn import arrays
from nbbn.masks import Where
from nbbn.problem import Form

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
    where : Where or None
        Not checked: which positions count.
    counted : numpy.ndarray or None
        Which positions count, where that is checked (`nbbn.masks.counted`).
    """

    activation: str = ""
    slope: float = SLOPE
    residual: Any = None
    where: Where | None = None
    counted: np.ndarray | None = None

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tells it from others before any array is looked at."""
        return self.activation, self.slope, self.where is None, self.residual is None

    @property
    def mask(self) -> Any:
        """What the caller gives as a mask, or None."""
        return None if self.where is None else self.where.mask

    @property
    def form(self) -> Form:
        """The form of batch normalization with these."""
        return Form(
            activation=self.activation,
            residual=self.residual is not None,
            masked=self.counted is not None,
        )


ALONE = Fusion()


def fusion(
    activation: Any = None,
    negative_slope: Any = SLOPE,
    residual: Any = None,
    mask: Any = None,
    lengths: Any = None,
    lengths_axis: Any = None,
) -> Fusion:
    """Return what goes along with a batch normalization, or raise."""
    slope = negative_slope
    if slope is not SLOPE:
        slope = arrays.number("negative_slope", slope, -math.inf, math.inf)
    if lengths_axis is not None and lengths is None:
        raise ValueError(f"lengths_axis must be None without lengths, got {lengths_axis!r}")
    where = None if mask is lengths is None else Where(mask, lengths, lengths_axis)
    if activation is None:
        alone = residual is None and where is None and slope == SLOPE
        return ALONE if alone else Fusion("", slope, residual, where)
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a str or None, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        known = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"activation must be None or one of {known}, got {activation!r}")
    return Fusion(activation, slope, residual, where)
