"""What a kernel is told: named tuples of numbers, which Numba passes as so many separate parameters."""

from collections import namedtuple
from typing import Any, NamedTuple


class Operand(NamedTuple):
    """An array: x, grad_out, or the result."""

    address: int  # of the walk's first element
    channel: int  # bytes from a channel to the next
    inner: int  # bytes from an inner element to the next
    outer: int  # bytes from an outer step to the next, where there is one outer dimension
    strides: int  # address of int64[dims]: bytes per step of each outer dimension


class Parameter(NamedTuple):
    """A number per channel."""

    address: int  # 0: not given
    stride: int  # bytes
    code: int  # what an element is stored as: see `nbbn.dtypes`


class Arrays(NamedTuple):
    """What differs from call to call."""

    x: Operand
    grad_out: Operand
    out: Operand  # also grad_x
    # float64[3, pools]: mean, var, invstd; backward: grad_weight, grad_bias, and what is lost of both where
    # they are added to others
    stats: int
    weight: Parameter
    bias: Parameter
    mean: Parameter  # backward: the batch mean; otherwise the running mean
    var: Parameter  # backward: invstd; otherwise the running variance
    partials: int  # float64[parts, 4, channels]; of teams: float64[2, teams, team, 4, channels of a tile]
    tables: int  # real[5, channels]: what the result is computed with
    barriers: int  # uint32[teams], 0 at first
    training: int

    def flat(self) -> tuple[int, ...]:
        """Return all the integers, in the order in which a kernel takes them."""
        return (
            *self.x, *self.grad_out, *self.out, self.stats, *self.weight, *self.bias, *self.mean, *self.var,
            self.partials, self.tables, self.barriers, self.training,
        )  # fmt: skip

    @property
    def together(self) -> int:
        """The arrays' addresses in one, which is a multiple of what all of them are multiples of."""
        return self.x.address | self.grad_out.address | self.out.address


def _with(base: Any, *fields: str) -> Any:
    """Return a named tuple with more fields than another one."""
    return namedtuple(f"_{base.__name__}", [*base._fields, *fields])


class MaskedArrays(_with(Arrays, "mask", "counts", "counted")):  # type: ignore[misc]
    """`Arrays`, of whose elements only some count, of all channels the same ones.

    Elements are numbered in the order of the walk. Apart from Arrays, so that batch norm's kernels are told
    nothing that they do not use.

    Attributes
    ----------
    mask : int
        Address of uint64[words]: a bit for each element, lowest first.
    counts : int
        Address of int64[words]: how many count before the first of each word.
    counted : int
        How many count.
    """

    __slots__ = ()

    def flat(self) -> tuple[int, ...]:
        """As that of `Arrays`."""
        return (*Arrays(*self[: len(Arrays._fields)]).flat(), self.mask, self.counts, self.counted)

    together = Arrays.together


class FusedArrays(_with(MaskedArrays, "residual", "grad_residual", "slope")):  # type: ignore[misc]
    """The same, and what goes along with batch norm; without a mask nothing is asked about it.

    Attributes
    ----------
    residual, grad_residual : Operand
        x where there is none.
    slope : float
        Of the activation.
    """

    __slots__ = ()

    def flat(self) -> tuple[float, ...]:
        """As that of `Arrays`."""
        return (*MaskedArrays(*self[:-3]).flat(), *self.residual, *self.grad_residual, self.slope)

    @property
    def together(self) -> int:
        """As that of `Arrays`."""
        beside: int = self.residual.address | self.grad_residual.address
        return Arrays(*self[: len(Arrays._fields)]).together | beside


# One of these three; mypy knows no fields of the latter two.
AnyArrays = Any


class Cut(NamedTuple):
    """How the work is cut up: what a plan knows ahead."""

    channels: int
    inner: int  # elements
    outer: int  # steps: the product of the outer dimensions
    dims: int  # outer dimensions
    sizes: int  # address of int64[dims]
    part: int  # elements that a block takes of each of its channels
    parts: int
    step_outer: int  # from one access of a thread to its next: outer steps,
    step_inner: int  # and inner elements
    team: int  # blocks that share a tile of channels, each of which keeps a part of it
    teams: int


class FormCut(_with(Cut, "pool", "period")):  # type: ignore[misc]
    """`Cut`, of another normalization. Apart from it, as the arrays are.

    Attributes
    ----------
    pool : int
        So many channels share statistics.
    period : int
        There are so many parameters: channel c has those with number c % period.
    """

    __slots__ = ()


class Numbers(NamedTuple):
    """The numbers that are not integers."""

    eps: float
    momentum: float
    correction: float
