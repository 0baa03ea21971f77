"""What a BatchNorm may do otherwise than plain batch normalization: its options, and which go together."""

from typing import Any, NamedTuple

from nbbn import arrays


class Renorm(NamedTuple):
    """The bounds of batch renormalization [1]_.

    In training a BatchNorm with them returns out = weight · (x_hat · r + d) + bias, with::

        r = clip(sigma_B / sigma, 1 / r_max, r_max)        sigma_B = sqrt(var + eps)
        d = clip((mean - running_mean) / sigma, -d_max, d_max)    sigma = sqrt(running_var + eps)

    Mean and variance are those of the batch, the running statistics those from before it. In the gradient r
    and d are constants. With r_max = 1 and d_max = 0 this is batch normalization, to the bit; unbounded, it
    would be evaluation.

    Attributes
    ----------
    r_max : float, default 3.0
        At least 1.
    d_max : float, default 5.0
        At least 0.

    References
    ----------
    .. [1] S. Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized
       Models", arXiv 1702.03275.

    Examples
    --------
    >>> import nbbn
    >>> nbbn.BatchNorm(2, renorm=nbbn.Renorm(r_max=1.0, d_max=0.0)).renorm
    Renorm(r_max=1.0, d_max=0.0)
    """

    r_max: float = 3.0
    d_max: float = 5.0


class Options(NamedTuple):
    """See `nbbn.BatchNorm`, which has the same."""

    renorm: Renorm | bool = False
    virtual_batch_size: int | None = None
    single_value: str = "error"
    nonfinite: str = "propagate"
    use_running_stats: bool | None = None
    update_running_stats: bool | None = None


DEFAULT = Options()


class Option:
    """An attribute of a BatchNorm that is one of its options, and is checked when it is set."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, module: Any, owner: type | None = None) -> Any:
        return self if module is None else getattr(module._options or DEFAULT, self._name)

    def __set__(self, module: Any, value: Any) -> None:
        module._set_options(**{self._name: value})


def checked_options(options: Options, tracked: bool) -> Options:
    """Return options that a module can have, with running statistics or without, or raise."""
    renorm, virtual = _renorm(options.renorm), options.virtual_batch_size
    if virtual is not None:
        virtual = arrays.integer("virtual_batch_size", virtual)
        if virtual < 1:
            raise ValueError(f"virtual_batch_size must be None or at least 1, got {virtual}")
    _one_of("single_value", options.single_value, ("error", "running"))
    _one_of("nonfinite", options.nonfinite, ("propagate", "skip", "raise"))
    use, update = (_switch(name, getattr(options, name)) for name in Options._fields[-2:])
    options = Options(renorm, virtual, options.single_value, options.nonfinite, use, update)
    if renorm and virtual is not None:
        raise ValueError(
            f"virtual_batch_size must be None with renorm, which is for small batches itself, got {virtual}"
        )
    if not tracked:
        for name, value, default in zip(Options._fields, options, DEFAULT, strict=True):
            if value != default and value is not False and name != "virtual_batch_size":
                raise ValueError(
                    f"{name} must be {default!r} without running statistics (track_running_stats=False), "
                    f"got {value!r}"
                )
    return options


def _renorm(value: Any) -> Renorm | bool:
    if isinstance(value, Renorm):
        r_max = arrays.number("r_max", value.r_max, 1.0, float("inf"))
        return Renorm(r_max, arrays.number("d_max", value.d_max, 0.0, float("inf")))
    if not isinstance(value, bool):
        raise TypeError(f"renorm must be True, False or an nbbn.Renorm, got {type(value).__name__}")
    return Renorm() if value else False


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a str, got {type(value).__name__}")
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def _switch(name: str, value: Any) -> bool | None:
    if value is None:
        return None
    try:
        return arrays.flag(name, value)
    except TypeError:
        raise TypeError(f"{name} must be None, True or False, got {type(value).__name__}") from None
