"""What other libraries call the state of a batch norm, and what they mean by its options: the one table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbbn import arrays


@dataclass(frozen=True)
class Convention:
    """One library: its names for the state of `nbbn.BatchNorm`, and the defaults of its layer."""

    weight: str  # "outer/inner" is what state["outer"]["inner"] holds
    bias: str
    running_mean: str
    running_var: str
    num_batches_tracked: str | None
    lone_parameter: bool  # whether there are layers with a weight and no bias, or the other way round
    momentum: float  # as the library writes it
    momentum_of_new: bool  # what it is the weight of in the running statistics: the new value or the old
    eps: float
    correction: int  # of the running variance: 1 is unbiased, 0 is biased
    axis: int

    def flat(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a state with "outer/inner" for what is in a mapping of its own."""
        if "/" not in self.weight:
            return state
        flat: dict[str, Any] = {}
        for outer, value in state.items():
            if isinstance(value, Mapping):
                flat.update({f"{outer}/{name}": inner for name, inner in value.items()})
            else:
                flat[outer] = value
        return flat

    def named(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state with this library's names for nbbn's."""
        named: dict[str, Any] = {}
        for own, value in state.items():
            *outer, name = (getattr(self, own) or "").split("/")
            if name:
                (named.setdefault(outer[0], {}) if outer else named)[name] = value
        return named


CONVENTIONS = {
    "torch": Convention(
        weight="weight",
        bias="bias",
        running_mean="running_mean",
        running_var="running_var",
        num_batches_tracked="num_batches_tracked",
        lone_parameter=False,
        momentum=0.1,
        momentum_of_new=True,
        eps=1e-5,
        correction=1,
        axis=1,
    ),
    "keras": Convention(
        weight="gamma",
        bias="beta",
        running_mean="moving_mean",
        running_var="moving_variance",
        num_batches_tracked=None,
        lone_parameter=True,
        momentum=0.99,
        momentum_of_new=False,
        eps=1e-3,
        correction=0,
        axis=-1,
    ),
    "flax": Convention(
        weight="params/scale",
        bias="params/bias",
        running_mean="batch_stats/mean",
        running_var="batch_stats/var",
        num_batches_tracked=None,
        lone_parameter=True,
        momentum=0.99,
        momentum_of_new=False,
        eps=1e-5,
        correction=0,
        axis=-1,
    ),
    "onnx": Convention(
        weight="scale",
        bias="B",
        running_mean="input_mean",
        running_var="input_var",
        num_batches_tracked=None,
        lone_parameter=False,
        momentum=0.9,
        momentum_of_new=False,
        eps=1e-5,
        correction=0,
        axis=1,
    ),
}


def find(convention: str) -> Convention:
    """Return a row of the table, or raise."""
    if not isinstance(convention, str):
        raise TypeError(f"convention must be a str, got {type(convention).__name__}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {list(CONVENTIONS)}, got {convention!r}")
    return CONVENTIONS[convention]


LEFT_OUT: Any = type("LeftOut", (), {"__repr__": lambda self: "the library's"})()


def options(
    convention: str,
    *,
    momentum: float | None = LEFT_OUT,
    eps: float | None = None,
    axis: int | None = None,
) -> dict[str, Any]:
    """Return the options of a `nbbn.BatchNorm` that computes, and trains on, as a layer of another library.

    They are no part of a state: give what the layer was made with.

    Parameters
    ----------
    convention : str
        "torch", "keras", "flax" or "onnx".
    momentum : float or None, optional
        As the library means it: that of "keras", "flax" and "onnx" is the weight of the old value, and is
        turned into nbbn's, that of the new one. None, which only "torch" has, is a cumulative average. Left
        out, it is the default of the library.
    eps : float or None, default None
        None: the default of the library.
    axis : int or None, default None
        The channel axis. None: the default of the library.

    Returns
    -------
    dict of str to float, int or None
        ``eps``, ``momentum``, ``correction`` and ``axis``.

    Raises
    ------
    TypeError
        If `convention` is not a str, `momentum` or `eps` not a number, or `axis` not an int.
    ValueError
        If `convention` is unknown, or `momentum` or `eps` out of range.

    Examples
    --------
    >>> import nbbn
    >>> nbbn.conventions.options("keras", momentum=0.75)
    {'eps': 0.001, 'momentum': 0.25, 'correction': 0, 'axis': -1}
    >>> bn = nbbn.BatchNorm(3, **nbbn.conventions.options("keras", momentum=0.75), dtype="float64")
    """
    theirs = find(convention)
    weight: float | None = None
    if momentum is not None or not theirs.momentum_of_new:
        given = theirs.momentum if momentum is LEFT_OUT else momentum
        weight = arrays.number("momentum", given, 0.0, 1.0)
        weight = weight if theirs.momentum_of_new else 1.0 - weight
    return {
        "eps": theirs.eps if eps is None else arrays.number("eps", eps, 0.0, float("inf")),
        "momentum": weight,
        "correction": theirs.correction,
        "axis": theirs.axis if axis is None else arrays.integer("axis", axis),
    }
