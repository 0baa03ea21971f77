"""class BatchNorm: parameters, running statistics, modes, and what a backward pass needs."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from nbbn import arrays, conventions
from nbbn.base import (
    PARAMETERS,
    STATISTICS,
    Tracking,
    checked,
    mapping,
    sized,
    values_lost,
    weight_of_a_batch,
)
from nbbn.compiler import Step
from nbbn.dtypes import narrowed
from nbbn.frameworks import Place, place
from nbbn.functional import _channels, differentiate, evaluate, train, values_of, with_x
from nbbn.fusion import ALONE, SLOPE, Fusion, fusion
from nbbn.options import DEFAULT, Option, Options, Renorm, checked_options
from nbbn.population import pooled
from nbbn.renorm import Renormalized, renormalize
from nbbn.virtual import Part, Parts, cut, train_parts


class _Saved(NamedTuple):
    """What the last forward call left for the backward one."""

    x: Any
    mean: Any
    invstd: Any
    training: bool
    step: Renormalized | Parts | None = None  # None: a plain one
    fused: Fusion = ALONE


class BatchNorm(Tracking):
    """Batch normalization [1]_ with parameters and running statistics, as ``torch.nn.BatchNorm*d``.

    Parameters
    ----------
    num_features : int
        C, the length of the channel axis.
    eps : float, default 1e-5
        Added to the variance; at least 0.
    momentum : float or None, default 0.1
        The weight of the new observation in the running statistics, in [0, 1]; None: they are the
        average over all batches so far.
    affine : bool, default True
        Whether there are a weight and a bias.
    bias : bool, default True
        Whether there is a bias among them.
    track_running_stats : bool, default True
        Whether there are running statistics. Without them, evaluation uses the batch's own.
    axis : int, default 1
        The channel axis.
    correction : float, default 1
        The running variance tracks var · m / (m - correction), with m values per channel.
    dtype : str or numpy.dtype, default "float32"
        Of parameters and running statistics: float32 or float64, for inputs of any type; or float16 or
        bfloat16, for inputs of the same type. bfloat16 needs the package ml_dtypes, and is for the CPU only.
    device : str, default "cpu"
        Where parameters and statistics live, and inputs must: "cpu", "cuda:N", or "cuda" for the GPU
        that Numba has as its current one.
    renorm : bool or Renorm, default False
        Batch renormalization [2]_ in training, with these bounds; True: with those of ``Renorm()``. In
        evaluation it is off. On a GPU the host waits for each step.
    virtual_batch_size : int or None, default None
        Ghost batch normalization [3]_: in training the samples, on the first axis that is not `axis`, are cut
        into parts of so many, in order, each normalized with its own statistics. The last one may be smaller;
        if it had no more than one value per channel, or `correction`, it is one with the part before it.
        The running statistics and ``num_batches_tracked`` count each part as a batch. In evaluation it is
        off.
    single_value : str, default "error"
        What is done with a batch that has one value per channel and is to be normalized with its own
        statistics: "error", a ValueError; "running", it is normalized with the running statistics as in
        evaluation, and these and the counter stay as they are.
    nonfinite : str, default "propagate"
        What a batch does to the running statistics whose mean or variance, in this module's dtype, is NaN or
        infinite in any channel, or in any virtual batch: "propagate", it updates them like any other;
        "skip", none of them, in no channel, is updated, nor is the counter; "raise", FloatingPointError,
        and nothing at all has changed. The output is the same for the first two. On a GPU, for the
        last two the host waits for each step.
    use_running_stats, update_running_stats : bool or None, default None
        Whether a batch is normalized with the running statistics, and whether its own update them. None: by
        the mode, the first in evaluation, the second in training. See `freeze`.
    activation : str or None, default None
        What is applied to the result, in the same pass over memory: see `nbbn.batch_norm`.
    negative_slope : float, default 0.01
        Of the activation "leaky_relu".

    Attributes
    ----------
    weight, bias : numpy.ndarray, Numba device array, or None
        Shape (C,). On a GPU Numba device arrays, which CuPy, PyTorch and others take as they are.
    grad_weight, grad_bias : numpy.ndarray, Numba device array, or None
        Of the last `backward`, in the module's dtype; not accumulated.
    grad_residual : array or None
        Of the last `backward`, where its call had a residual: of x's kind, shape and dtype.
    running_mean, running_var : numpy.ndarray, Numba device array, or None
        Shape (C,).
    num_batches_tracked : numpy.ndarray or None
        0-d, int64: how many batches there were that were not empty. It can be set to an int.
    training : bool
        The mode; see `train` and `eval`.
    renorm, virtual_batch_size, single_value, nonfinite, use_running_stats, update_running_stats
        As above. They can be set between calls, and are checked as those are.
    activation, negative_slope
        As above; they cannot be changed.
    r_max, d_max : float or None
        The bounds in `renorm`; None without it. The paper [2]_ begins with 1 and 0, and raises them to 3 and
        5 in the course of training.

    Raises
    ------
    TypeError
        If an argument is of the wrong type, or the dtype is bfloat16 on a GPU.
    ValueError
        If an argument is out of range, or arguments do not go together: `renorm` and `virtual_batch_size`, or
        what needs running statistics and ``track_running_stats=False``.
    nbbn.DeviceError
        If `device` is not to be had.

    Notes
    -----
    `backward` belongs to the last call: it needs the x of that call unchanged, and keeps it alive.
    Calls from several threads are safe as far as the running statistics go. On a GPU a call works on the
    stream that is current for x's library: calls on several streams have to be put in order by the caller.

    A deep copy or a pickle holds copies in the memory of the host. It comes back on its device, or, where
    there is no such device, on the CPU, with a warning in the log. A shallow copy, of ``copy.copy``, shares
    its arrays with the original.

    References
    ----------
    .. [1] S. Ioffe and C. Szegedy, arXiv 1502.03167.
    .. [2] S. Ioffe, arXiv 1702.03275: batch renormalization.
    .. [3] E. Hoffer, I. Hubara and D. Soudry, arXiv 1705.08741: ghost batch normalization.

    Examples
    --------
    >>> import numpy as np, nbbn
    >>> bn = nbbn.BatchNorm(2, dtype="float64", eps=0.0)
    >>> bn(np.array([[1.0, 10.0], [3.0, 30.0]]))
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> bn.running_mean
    array([0.2, 2. ])
    >>> bn.eval()(np.array([[0.2, 2.0]]))
    array([[0., 0.]])
    """

    renorm = Option()
    virtual_batch_size = Option()
    single_value = Option()
    nonfinite = Option()
    use_running_stats = Option()
    update_running_stats = Option()
    _options: Options | None = None  # None: the default ones
    _of_last = {"_saved": None, "grad_residual": None}  # noqa: RUF012

    momentum = checked("momentum", weight_of_a_batch)
    correction = checked("correction", values_lost)

    def __init__(
        self,
        num_features: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        bias: bool = True,
        track_running_stats: bool = True,
        axis: int = 1,
        correction: float = 1,
        dtype: Any = "float32",
        device: str = "cpu",
        renorm: bool | Renorm = False,
        virtual_batch_size: int | None = None,
        single_value: str = "error",
        nonfinite: str = "propagate",
        use_running_stats: bool | None = None,
        update_running_stats: bool | None = None,
        activation: str | None = None,
        negative_slope: float = SLOPE,
    ) -> None:
        self.num_features = sized("num_features", num_features)
        self.eps = arrays.number("eps", eps, 0.0, float("inf"))
        self.momentum = momentum
        self.affine = arrays.flag("affine", affine)
        self.track_running_stats = arrays.flag("track_running_stats", track_running_stats)
        self.axis = arrays.integer("axis", axis)
        self.correction = correction
        self._fused = fusion(activation, negative_slope)
        self.grad_residual: Any = None
        has_bias = arrays.flag("bias", bias) and self.affine
        super().__init__(dtype, device)
        self._set_options(
            renorm=renorm,
            virtual_batch_size=virtual_batch_size,
            single_value=single_value,
            nonfinite=nonfinite,
            use_running_stats=use_running_stats,
            update_running_stats=update_running_stats,
        )
        self._fill(self.affine, has_bias)

    def _set_options(self, **changes: Any) -> None:
        options = (self._options or DEFAULT)._replace(**changes)
        options = checked_options(options, self.track_running_stats)
        self._options = None if options == DEFAULT else options

    @property
    def activation(self) -> str | None:
        """What is applied to the result."""
        return self._fused.activation or None

    @property
    def negative_slope(self) -> float:
        """Of the activation "leaky_relu"."""
        return self._fused.slope

    @property
    def r_max(self) -> float | None:
        """The bound of r in batch renormalization."""
        return self.renorm.r_max if self.renorm else None

    @r_max.setter
    def r_max(self, value: float) -> None:
        self._set_bound("r_max", value)

    @property
    def d_max(self) -> float | None:
        """The bound of d in batch renormalization."""
        return self.renorm.d_max if self.renorm else None

    @d_max.setter
    def d_max(self, value: float) -> None:
        self._set_bound("d_max", value)

    def _set_bound(self, name: str, value: Any) -> None:
        if not self.renorm:
            raise ValueError(f"{name} can only be set with renorm, which is off")
        self.renorm = self.renorm._replace(**{name: value})

    def __repr__(self) -> str:
        options = zip(Options._fields, self._options or DEFAULT, DEFAULT, strict=True)
        changed = "".join(f", {name}={value!r}" for name, value, default in options if value != default)
        changed = self._without_bias() + changed
        if self.activation is not None:
            changed += f", activation={self.activation!r}"
        if self.activation == "leaky_relu":
            changed += f", negative_slope={self.negative_slope}"
        return (
            f"BatchNorm({self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, track_running_stats={self.track_running_stats}, axis={self.axis}, "
            f"correction={self.correction:g}, dtype='{self.dtype}', device='{self.device}'{changed})"
        )

    def train(self, mode: bool = True) -> "BatchNorm":
        """Set the mode: batch statistics, and running ones updated; return self.

        Parameters
        ----------
        mode : bool, default True
            False sets the mode of `eval`.

        Raises
        ------
        TypeError
            If `mode` is not a bool.
        """
        self.training = arrays.flag("mode", mode)
        return self

    def eval(self) -> "BatchNorm":
        """Set the mode: the running statistics are used and not updated; return self."""
        return self.train(False)

    def freeze(self) -> "BatchNorm":
        """Use the running statistics, and do not update them, whatever the mode; return self.

        The weight and the bias go on being trained: `backward` gives the gradients of evaluation. It is the
        same as to set `use_running_stats` to True and `update_running_stats` to False.

        Raises
        ------
        ValueError
            If this module has no running statistics.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> bn = nbbn.BatchNorm(2).freeze().train()
        >>> out = bn(np.array([[1.0, 10.0], [3.0, 30.0]]))
        >>> bn.running_mean
        array([0., 0.], dtype=float32)
        """
        if not self.track_running_stats:
            raise ValueError("freeze needs running statistics (track_running_stats=True)")
        self._set_options(use_running_stats=True, update_running_stats=False)
        return self

    def unfreeze(self) -> "BatchNorm":
        """Use and update the running statistics by the mode again; return self.

        It is the same as to set `use_running_stats` and `update_running_stats` to None.
        """
        self._set_options(use_running_stats=None, update_running_stats=None)
        return self

    def __call__(
        self,
        x: Any,
        *,
        residual: Any = None,
        mask: Any = None,
        lengths: Any = None,
        lengths_axis: int | None = None,
        update_running_stats: bool | None = None,
    ) -> Any:
        """Normalize x, add a residual, if there is one, and apply the activation, if there is one.

        Parameters
        ----------
        x : array
            On this module's device, of any kind and type (`nbbn.batch_norm`), with
            `num_features` channels; any strides. In training more than one value per channel.
        residual : array, optional
            Of x's shape and dtype, any strides. `backward` needs it unchanged too.
        mask, lengths, lengths_axis : optional
            Which positions of x count: see `nbbn.batch_norm`. The running variance is that of the values that
            count, var · m / (m - correction) with m of them per channel; a batch of which nothing counts is
            like an empty one. `backward` needs them unchanged too.
        update_running_stats : bool or None, default None
            Whether x's statistics update the running ones in this call; None: as the module has it. False is
            for a forward pass that is made again: its output, and what it leaves for `backward`, are those of
            the first one. With `renorm` these depend on the running statistics: there the first pass, not the
            second, must be the one that leaves them alone.

        Returns
        -------
        array
            A new one of x's kind, shape, dtype and memory layout.

        Raises
        ------
        TypeError
            If `x` is not an array of a type that goes with the module's.
        ValueError
            If a shape does not fit, there are no running statistics to update, or both a mask and virtual
            batches.
        nbbn.DeviceError
            If `x` lies on another device.
        FloatingPointError
            If `nonfinite` is "raise", and x's statistics would update the running ones and are not finite. In
            all of these cases the running statistics are unchanged.
        """
        fused = self._fused
        if not (residual is mask is lengths is lengths_axis is None):
            fused = fusion(self.activation, self.negative_slope, residual, mask, lengths, lengths_axis)
        if self._options is None and update_running_stats is None:
            if self.training or not self._has_running:
                return self._normalize_with_own(x, fused)
        elif (found := self._normalize_with_options(x, fused, update_running_stats)) is not None:
            return found
        return self._normalize_with_running(x, fused)

    def _normalize_with_running(self, x: Any, fused: Fusion) -> Any:
        """Normalize x with the running statistics."""
        mean, var = self._snapshots()
        out, here = evaluate(
            x, mean, var, self.weight, self.bias, self.eps, self.axis, features=self.num_features, fused=fused
        )
        # Copies, on a GPU too: a later training step must not reach into this call's gradient.
        constants = self._columns.constants(mean, var, self.eps, here)
        self._saved = _Saved(x, *constants, training=False, fused=fused)
        return out

    def _normalize_with_own(self, x: Any, fused: Fusion) -> Any:
        """Normalize x with its own statistics, and update the running ones in training."""
        if not (self.training and self.track_running_stats):
            out, stats, _, here = train(
                x, self.weight, self.bias, self.eps, self.axis, features=self.num_features, fused=fused
            )
        else:
            with self._lock:
                out, stats, _, here = train(
                    x,
                    self.weight,
                    self.bias,
                    self.eps,
                    self.axis,
                    running_mean=self.running_mean,
                    running_var=self.running_var,
                    momentum=self._momenta()[0],
                    correction=self.correction,
                    features=self.num_features,
                    then=self._counting(),
                    fused=fused,
                    repeating=self.momentum is not None,
                )
        kept = here.kept_rows(stats)
        self._saved = _Saved(x, kept[0], kept[2], training=True, fused=fused)
        return out

    def _normalize_with_options(self, x: Any, fused: Fusion, update: bool | None) -> Any:
        """Normalize x as the options have it; None: with the running statistics, and nothing else."""
        options = self._options or DEFAULT
        if update is None:
            update = options.update_running_stats
        elif arrays.flag("update_running_stats", update) and not self._tracks:
            raise ValueError(
                "update_running_stats must be False or None without running statistics "
                "(track_running_stats=False), got True"
            )
        use = options.use_running_stats
        if use is None:
            use = self._has_running and not self.training
        if update is None:
            update = self._tracks and self.training
        if use and not update:
            return None
        with self._lock:
            return self._step(x, fused, options, use, update)

    def _step(self, x: Any, fused: Fusion, options: Options, use: bool, update: bool) -> Any:
        """Normalize x, with the running statistics to `use` or its own, which `update` the running ones.

        None: with the running statistics, and nothing else. All of the caller's state is written at the end.
        """
        here, view, axis = self._looked_at(x, update)
        seen = with_x(fused._replace(residual=None), view, None, axis, here)
        count = values_of(seen, view, axis)
        if (count == 1 and options.single_value == "running") or (use and not count):
            return None
        update = update and count > 0
        parts: tuple[Part, ...] = ()
        if options.virtual_batch_size is not None and self.training and count > 1:
            if seen.counted is not None:
                raise ValueError("mask and lengths must be None with virtual_batch_size")
            parts = cut(view.shape, axis, options.virtual_batch_size, max(1.0, update * self.correction))
        step: Renormalized | Parts | None = None
        weight, bias = self.weight, self.bias
        if isinstance(options.renorm, Renorm) and self.training and not use and count > 1:
            step = self._renormalized(view, axis, here, seen, options.renorm)
            if step is not None:
                weight, bias = step.weight, step.bias
        momenta = [0.0] * max(1, len(parts))
        # The statistics are updated in copies of them, which are then taken over or not.
        mean = var = None
        if update:
            momenta = self._momenta(len(momenta))
            mean, var = (
                None if column is None else self._columns.copied(column, here)
                for column in (self.running_mean, self.running_var)
            )
        if len(parts) > 1:
            out, stats, here = train_parts(
                x, weight, bias, self.eps, self.axis, parts, mean, var, momenta, self.correction, fused
            )
            step = Parts(parts, stats)
        else:
            out, stats, _, here = train(
                x,
                weight,
                bias,
                self.eps,
                self.axis,
                running_mean=mean,
                running_var=var,
                momentum=momenta[0],
                correction=self.correction,
                features=self.num_features,
                fused=fused,
            )
        if use:  # the batch's own statistics, which update the running ones, are all that was wanted of it
            running = self.running_mean, self.running_var
            out, here = evaluate(x, *running, self.weight, self.bias, self.eps, self.axis, fused=fused)
            saved = _Saved(x, *self._columns.constants(*running, self.eps, here), False, None, fused)
        elif len(parts) > 1:
            saved = _Saved(x, None, None, True, step, fused)
        else:
            kept = here.kept_rows(stats)
            saved = _Saved(x, kept[0], kept[2], True, step, fused)
        counts = [view[part].size // self.num_features for part in parts] or [count]
        if update and self._may_update(stats, counts, here, options.nonfinite):
            counting = self._counting(len(momenta))
            self._take_over(mean, var, counting, partial(self._columns.assign, here=here))
        self._saved = saved
        return out

    def _renormalized(
        self, view: np.ndarray, axis: int, here: Place, seen: Fusion, bounds: Renorm
    ) -> Renormalized | None:
        """Return what x is renormalized with, where that is something else than to normalize it."""
        running = self.running_mean, self.running_var
        if any(column is None for column in running):
            raise ValueError("renorm needs both running_mean and running_var, got None for one of them")
        return renormalize(
            view, axis, here, seen, bounds, self.eps, self._columns, running, self.weight, self.bias
        )

    def _looked_at(self, x: Any, update: bool) -> tuple[Place, np.ndarray, int]:
        """Return where a call is computed, a view of x and its channel axis, or raise.

        What `update` writes to has to be as training needs it; copies of it would be, whatever it is.
        """
        columns = {name: getattr(self, name) for name in (*PARAMETERS, *STATISTICS)}
        here, (view, *views) = place(x, columns, written=STATISTICS if update else ())
        view = arrays.checked("x", view)
        axis = arrays.channel_axis(view, self.axis)
        channels = _channels(view, axis, self.num_features)
        for name, column in zip(columns, views, strict=True):
            updated = update and name in STATISTICS
            if updated or self.renorm or name in PARAMETERS:
                arrays.parameter(name, column, channels, view, updated)
        if update:
            arrays.both_updated(*views[-2:])
        return here, view, axis

    def _may_update(self, stats: np.ndarray, counts: list[int], here: Place, nonfinite: str) -> bool:
        """Whether statistics of all parts, of so many values per channel, may update the running ones.

        Or raise, as the option `nonfinite` has it.
        """
        if nonfinite == "propagate" or self._finite(stats, counts, here):
            return True
        if nonfinite == "raise":
            raise FloatingPointError(
                "x must have a finite mean and variance in every channel (nonfinite='raise'), got NaN or "
                f"infinity in {self.dtype}"
            )
        return False

    def _finite(self, stats: np.ndarray, counts: list[int], here: Place) -> bool:
        """Whether what is tracked of all parts, of so many values per channel, is finite."""
        rows = self._columns.numbers(stats, here).reshape(len(counts), 3, -1)
        tracked = []
        with np.errstate(over="ignore", invalid="ignore"):
            if self.running_mean is not None:
                tracked.append(rows[:, 0])
            if self.running_var is not None:
                unbiased = np.array([count / (count - self.correction) for count in counts])
                tracked.append(rows[:, 1] * unbiased[:, None])
            return all(bool(np.isfinite(new.astype(self.dtype)).all()) for new in tracked)

    def _take_over(
        self, mean: Any, var: Any, counting: tuple[Step, ...], write: Callable[[Any, Any], None]
    ) -> None:
        """Set the running statistics that there are, and the counter."""
        both = (self.running_mean, mean), (self.running_var, var)
        self._set([(column, values) for column, values in both if column is not None], counting, write)

    def calibrate(self, batches: Iterable[Any], *, progress: bool = False) -> "BatchNorm":
        """Set the running statistics to those of all values of many batches at once; return self.

        With the mean and the biased variance of all m values of each channel, pooled exactly
        (`nbbn.population_stats`)::

            running_mean ← mean
            running_var  ← var · m / (m - correction)

        In algorithm 2 of the paper [1]_ they are, likewise, estimated over the training data for evaluation
        when training has ended. There the variance is the average of those of the batches. The one here has
        in it how far the batches' means lie apart as well, so it does not depend on how the data are cut into
        batches.

        Parameters
        ----------
        batches : iterable of array
            The inputs of this module, of any kind and type, on any device, with `num_features` channels. It
            is gone through once. Empty batches contribute nothing.
        progress : bool, default False
            Whether to show a progress bar on stderr. It needs the package rich.

        Returns
        -------
        BatchNorm
            This module. Its mode is what it was, and either will do. ``num_batches_tracked`` is the number
            of batches that were not empty, as if the running statistics had been reset and had tracked these
            with ``momentum=None``.

        Raises
        ------
        TypeError
            If `batches` is not an iterable of arrays, or is a single array.
        ValueError
            If this module has no running statistics, or `batches` has no more than `correction` values per
            channel, or an array whose shape does not fit.
        nbbn.DeviceError
            If an array is on a device that cannot be computed with.
        ModuleNotFoundError
            If there is to be a progress bar, and no rich. What iterating raises comes through. In all of
            these cases nothing has changed.

        References
        ----------
        .. [1] S. Ioffe and C. Szegedy, arXiv 1502.03167, algorithm 2, steps 8 to 10.

        Examples
        --------
        >>> import numpy as np, nbbn
        >>> data = np.array([[1.0, 10.0], [3.0, 30.0], [8.0, 80.0]])
        >>> bn = nbbn.BatchNorm(2).calibrate([data[:2], data[2:]])
        >>> bn.running_mean, bn.running_var
        (array([ 4., 40.], dtype=float32), array([  13., 1300.], dtype=float32))
        >>> int(bn.num_batches_tracked)
        2
        """
        if self.running_mean is None or self.running_var is None:
            raise ValueError("calibrate needs running statistics (track_running_stats=True)")
        stats, used = pooled(batches, self.axis, progress, self.num_features)
        if stats.count <= self.correction:
            raise ValueError(
                f"batches must have more than {self.correction:g} values per channel (correction), got "
                f"{stats.count}"
            )
        views = [self._columns.checked(name, getattr(self, name), self._shape) for name in STATISTICS]
        arrays.both_updated(*views)
        with self._lock:
            mean = narrowed(stats.mean, views[0].dtype)
            with np.errstate(over="ignore"):
                var = stats.var * (stats.count / (stats.count - self.correction))
            var = narrowed(var, views[1].dtype)
            self._take_over(mean, var, self._counting_to(used), self._columns.write)
        return self

    def backward(self, grad_out: Any) -> Any:
        """Return the gradient with respect to the last call's x; set those of parameters and residual.

        Parameters
        ----------
        grad_out : array
            The gradient with respect to the last call's output: of its shape and dtype.

        Returns
        -------
        array
            grad_x, of x's kind, shape, dtype and memory layout.

        Raises
        ------
        RuntimeError
            If there was no call before.
        TypeError, ValueError
            If `grad_out` is not an array of x's shape and dtype.
        nbbn.DeviceError
            If `grad_out` lies on another device.
        """
        x, mean, invstd, training, step, fused = self._last_call()
        if step is None:
            grad_x, gradients, grad_residual, here = differentiate(
                grad_out, x, self.weight, self.bias, mean, invstd, self.axis, training, fused=fused
            )
        else:
            grad_x, gradients, grad_residual, here = step.differentiate(
                grad_out, x, self.weight, self.bias, mean, invstd, self.axis, fused
            )
        self._keep_gradients(gradients, here, grad_residual=grad_residual)
        return grad_x

    def state_dict(self, *, convention: str = "torch") -> dict[str, Any]:
        """Return copies of parameters and running statistics, named as a library names them.

        Parameters
        ----------
        convention : str, default "torch"
            "torch", "keras", "flax" or "onnx": see `load_state_dict`.

        Returns
        -------
        dict of str to numpy.ndarray
            For "torch" ``weight``, ``bias`` if affine; ``running_mean``, ``running_var`` and
            ``num_batches_tracked`` if they are tracked. Always in the memory of the host. Only PyTorch has a
            counter. "flax" has a dict of two such dicts, ``params`` and ``batch_stats``.

        Raises
        ------
        TypeError
            If `convention` is not a str.
        ValueError
            If `convention` is unknown.

        Examples
        --------
        >>> import nbbn
        >>> list(nbbn.BatchNorm(3).state_dict())
        ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked']
        >>> list(nbbn.BatchNorm(3).state_dict(convention="keras"))
        ['gamma', 'beta', 'moving_mean', 'moving_variance']
        """
        return conventions.find(convention).named(self._state())

    def load_state_dict(self, state: Mapping[str, Any], *, convention: str = "torch") -> None:
        """Set parameters and running statistics.

        Parameters
        ----------
        state : mapping of str to array
            As `state_dict` returns it for the same convention: that of a torch.nn.BatchNorm*d, of a Keras or
            Flax layer, or the inputs of ONNX's BatchNormalization. A state without ``num_batches_tracked``,
            as that of other libraries and older ones of PyTorch are, leaves the counter as it is.
        convention : str, default "torch"
            Whose names the state has: "torch"; "keras" (``gamma``, ``beta``, ``moving_mean``,
            ``moving_variance``); "flax" (``scale`` and ``bias`` in ``params``, ``mean`` and ``var`` in
            ``batch_stats``: nested, or with keys such as ``params/scale``); "onnx" (``scale``, ``B``,
            ``input_mean``, ``input_var``).

        Raises
        ------
        TypeError
            If `state` is not a mapping, `convention` not a str, or a value not of numbers.
        ValueError
            If `convention` is unknown, keys are missing or unexpected, or a shape does not fit. Nothing has
            changed then.

        Notes
        -----
        A state has neither eps nor momentum in it, and does not say how its running variance was estimated.
        All numbers are stored as they are, and evaluation uses them as they are, with this module's eps:
        Keras has 1e-3. Training goes on with this module's momentum and correction. The running variance of
        "keras", "flax" and "onnx" is biased: a module that is to go on as they would has ``correction=0``.
        Their momentum is the weight of the old value. `nbbn.conventions.options` has the options to make the
        module with. With ``momentum=None`` the next batch is weighed by the counter, so that in a new module
        it replaces the loaded statistics.

        Keras and Flax have layers with only one of the two parameters. Where one is missing from their state,
        a weight of ones or a bias of zeros is set. A state with neither is that of a module with
        ``affine=False``, and an error in any other.
        """
        theirs = conventions.find(convention)
        keys = {own: key for own in self._state_names() if (key := getattr(theirs, own)) is not None}
        self._load(theirs.flat(mapping(state)), keys, theirs.lone_parameter)
