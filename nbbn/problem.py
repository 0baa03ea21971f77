"""All that is known of a call before the numbers are."""

from typing import Any, NamedTuple

from nbbn.arrays import ABSENT, Parameter
from nbbn.dtypes import Storage
from nbbn.geometry import Strides


class Form(NamedTuple):
    """Which values share statistics, and which of the parameters each value has.

    The default is batch normalization: statistics of each channel, and a weight and a bias for it.

    Attributes
    ----------
    pool : int
        So many channels, one after the other, have their statistics in common.
    period : int
        Channel c has the parameters c % period; 0: as many parameters as channels.
    along : bool
        Parameters go along the elements of a channel, instead: each has one for every element, and all
        channels have the same. The arrays are then of two dimensions, the channels the first, and the
        elements of a channel lie side by side.
    centered : bool
        Whether the mean is subtracted. If not it is 0, and the variance the mean square.
    activation : str
        What is applied to the result, of `nbbn.formulas.ACTIVATIONS`; "": nothing.
    residual : bool
        Whether an array is added to the result, before the activation.
    masked : bool
        Whether only some elements count, of all channels the same ones.
    """

    pool: int = 1
    period: int = 0
    along: bool = False
    centered: bool = True
    activation: str = ""
    residual: bool = False
    masked: bool = False

    @property
    def through(self) -> bool:
        """Whether grad_x is computed from the gradient at an activation's result, not at its argument."""
        return self.activation != "" and not self.residual

    @property
    def alone(self) -> "Form":
        """The same without what goes along with batch normalization."""
        return self._replace(activation="", residual=False, masked=False)


BATCH = Form()


class Problem(NamedTuple):
    """What does not change from one call to the next on arrays of one kind.

    Attributes
    ----------
    shape : tuple of int
        Of all arrays; no dimension is 0.
    axis : int
        The channel axis.
    strides : tuple of tuple of int
        In bytes, of each array: x; x and out; or x, grad_out and out. With a residual: x, residual and out;
        or x, grad_out, residual, grad_residual and out. With a mask, last, those of its bytes too.
    storage : Storage
        Of all arrays.
    threads : int
        How many may work on it. Never changes the result.
    device : str
        Where the arrays lie: "cpu" or "cuda:N".
    form : Form
        What is normalized together.
    """

    shape: tuple[int, ...]
    axis: int
    strides: tuple[Strides, ...]
    storage: Storage
    threads: int
    device: str = "cpu"
    form: Form = BATCH


class Marks(NamedTuple):
    """Which elements of a channel count, and how many of them: what `mark` of an implementation returns.

    Attributes
    ----------
    kept : object
        What the implementation has of them, for one operation.
    values : int
        How many elements of a channel count; where nobody asks, any number.
    """

    kept: Any
    values: int


class Extras(NamedTuple):
    """What a call is given beside the arguments of batch normalization, of what its `Form` says there is.

    Attributes
    ----------
    residual, grad_residual : int
        Where the array that is added lies, and where its gradient goes to.
    bias : Parameter
        What a backward pass computes the argument of the activation with, as it was in the forward one.
    slope : float
        Of leaky_relu.
    marks : Marks or None
        Which elements count; None: all.
    """

    residual: int = 0
    grad_residual: int = 0
    bias: Parameter = ABSENT
    slope: float = 0.0
    marks: Marks | None = None


NOTHING = Extras()
