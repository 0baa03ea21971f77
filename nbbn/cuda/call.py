"""What a kernel is told: named tuples of integers, which Numba passes as so many separate parameters."""

from collections import namedtuple
from typing import NamedTuple


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
    stats: int  # float64[3, pools]: mean, var, invstd; backward: grad_weight, grad_bias
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


class FusedArrays(NamedTuple):
    """`Arrays`, and what goes along with batch norm.

    Apart from these, so that batch norm's kernels are told nothing that they do not use.
    """

    x: Operand
    grad_out: Operand
    out: Operand
    stats: int
    weight: Parameter
    bias: Parameter
    mean: Parameter
    var: Parameter
    partials: int
    tables: int
    barriers: int
    training: int
    residual: Operand  # x where there is none, as its gradient
    grad_residual: Operand
    slope: float  # of the activation

    def flat(self) -> tuple[float, ...]:
        """Return all the numbers, in the order in which a kernel takes them."""
        return (*Arrays(*self[:-3]).flat(), *self.residual, *self.grad_residual, self.slope)

    @property
    def together(self) -> int:
        """As that of `Arrays`."""
        return Arrays(*self[:-3]).together | self.residual.address | self.grad_residual.address


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


# Of another normalization. So many channels share statistics; and there are so many parameters, of which
# channel c has those with number c % period. Apart from Cut, so that batch norm's kernels are told nothing
# that they do not use.
FormCut = namedtuple("FormCut", [*Cut._fields, "pool", "period"])  # type: ignore[misc]


class Numbers(NamedTuple):
    """The numbers that are not integers."""

    eps: float
    momentum: float
    correction: float
