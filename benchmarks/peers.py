"""Runs batch norm's hard cases on nbbn, PyTorch, Flax and ONNX Runtime, each against a float64 oracle.

    python benchmarks/peers.py --large --json results.json --markdown results.md

A case is one or more calls on data that some batch normalization got wrong once, or that nbbn makes a
promise about. Each contender runs each case in a process of its own, so that a crash is a result, in the
way that its documentation says; what it returns is held against tests/reference.py. What is not installed
is left out.
"""

import argparse
import importlib.metadata
import json
import re
import signal
import subprocess
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import reference
from reference import column, rows

Arrays = dict[str, np.ndarray]


# --- a call, and its result against the oracle -----------------------------------------------------


class NotApplicable(Exception):
    """The contender has no such thing, by its documentation."""


@dataclass
class Call:
    """Batch normalization of x, with the gradients if grad_out is given.

    Running statistics are replaced (momentum 1), so that they show the mean and the variance of x.
    """

    x: np.ndarray
    grad_out: np.ndarray | None = None
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None
    running_mean: np.ndarray | None = None
    running_var: np.ndarray | None = None
    training: bool = True
    momentum: float = 1.0
    eps: float = 1e-5
    axis: int = 1
    name: str = ""

    def __post_init__(self) -> None:
        kind = np.float64 if self.x.dtype == np.float64 else np.float32
        if self.running_mean is None:
            self.running_mean = np.zeros(self.channels, kind)
        if self.running_var is None:
            self.running_var = np.ones(self.channels, kind)

    @property
    def channels(self) -> int:
        return self.x.shape[self.axis]

    @property
    def arrays(self) -> Arrays:
        every = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: a for name, a in every.items() if isinstance(a, np.ndarray)}

    def copy(self, **changes: Any) -> "Call":
        """Return the same call on arrays of their own, in the order of their indices."""
        own = {name: np.array(a, order="C") for name, a in self.arrays.items()}
        return Call(**{f.name: getattr(self, f.name) for f in fields(self)} | own | changes)


WORST = ["n/a", "right", "refused", "near", "off", "other bits", "raises", "wrong", "not finite", "crashes"]
"""What may become of a result, from good to bad."""

NEAR, WRONG = 16, 0.01
"""Beyond the tolerance: near, up to so many units in the last place of the largest term; wrong, from so
large a part of it on; and off between them. In half precision, of which a percent is a unit or two: 2
units, and 8."""


@dataclass
class Finding:
    """What became of one result.

    `units` is the largest error in units of the tolerance, `share` as a part of the largest of the terms
    that the result is the sum of, in its channel.
    """

    verdict: str
    what: str = ""
    units: float = 0.0
    share: float = 0.0
    said: str = ""

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """What there is to say, for dict()."""
        for name, value in asdict(self).items():
            if value:
                yield name, float(f"{value:.3g}") if isinstance(value, float) else value


def hold(
    what: str, found: np.ndarray, expected: Any, tolerance: np.ndarray, scale: np.ndarray, dtype: Any
) -> Finding:
    """Hold numbers against the oracle's."""
    if found.shape != expected.shape:
        return Finding("wrong", what, said=f"shape {found.shape} for {expected.shape}")
    lost = ~np.isfinite(found.astype(np.float64)) & np.isfinite(expected.hi)
    if lost.any():
        return Finding("not finite", what, said=f"{lost.sum()} of {lost.size} values")
    error = expected.distance(found)
    if not error.any():
        return Finding("right", what)
    with np.errstate(divide="ignore", invalid="ignore"):
        units = float(np.nanmax(np.where(error > 0, error / tolerance, 0.0)))
        share = float(np.nanmax(np.where(error > 0, error / scale, 0.0)))
    eps = float(reference.finfo(dtype).eps)
    near, wrong = (2 * eps, max(WRONG, 8 * eps)) if reference.is_half(dtype) else (NEAR * eps, WRONG)
    verdict = "right" if units <= 1 else "near" if share <= near else "off" if share < wrong else "wrong"
    return Finding(verdict, what, units, share)


def against_oracle(call: Call, results: Arrays, correction: int) -> list[Finding]:
    """Hold all results of a call against the oracle. `correction` is that of the running variance."""
    assert call.running_mean is not None and call.running_var is not None
    common = {"eps": call.eps, "axis": call.axis}
    statistics = (call.running_mean, call.running_var)
    if call.training:
        expected = reference.forward(call.x, call.weight, call.bias, **common)
    else:
        expected = reference.evaluate(call.x, *statistics, call.weight, call.bias, **common)
    dtype = call.x.dtype
    terms = np.abs(expected.weight * expected.x_hat.hi) + np.abs(expected.bias)
    largest = terms.max(axis=1, keepdims=True)
    tolerance = reference.out_tolerance(expected, dtype)
    findings = [hold("out", rows(results["out"], call.axis), expected.out, tolerance, largest, dtype)]
    if call.training:
        count = expected.count
        factor = count / (count - correction)
        news = {
            "running_mean": (expected.mean, reference.mean_tolerance(expected), expected.mean_abs),
            "running_var": (
                reference.unbiased(expected.var, count, correction),
                factor * reference.var_tolerance(expected, dtype),
                factor * (expected.var.hi + call.eps),
            ),
        }
        for old, (name, (new, tolerance, scale)) in zip(statistics, news.items(), strict=True):
            wanted = reference.running(old, new, call.momentum)
            kind = results[name].dtype
            tolerance = reference.running_tolerance(old, new, call.momentum, wanted, kind, tolerance)
            scale = (1 - call.momentum) * np.abs(column(old, 0.0, len(old))) + call.momentum * scale
            found = column(results[name], 0.0, call.channels)
            findings.append(hold(name, found, wanted, tolerance, scale, kind))
    if call.grad_out is None or "grad_x" not in results:
        return findings
    used = {"mean": expected.mean, "invstd": expected.invstd, "axis": call.axis}
    back = reference.backward(call.grad_out, call.x, call.weight, training=call.training, **used)
    dy = np.abs(back.grad_out)
    scale = back.slope * dy.max(axis=1, keepdims=True)
    tolerance = reference.grad_x_tolerance(back, dtype)
    findings.append(hold("grad_x", rows(results["grad_x"], call.axis), back.x, tolerance, scale, dtype))
    for name, wanted, tolerance, products in (
        (
            "grad_weight",
            back.weight,
            reference.grad_weight_tolerance(back, dtype),
            dy * np.abs(back.x_hat.hi),
        ),
        ("grad_bias", back.bias, reference.grad_bias_tolerance(back, dtype), dy),
    ):
        if name in results:
            found, kind = column(results[name], 0.0, call.channels), results[name].dtype
            if reference.is_half(kind):  # a parameter of x's type: its gradient is rounded to it
                tolerance = tolerance + reference.ulp_tolerance(wanted, kind)
            scale = products.sum(axis=1, keepdims=True)
            findings.append(hold(name, found, wanted, tolerance, scale, kind))
    return findings


def same_bits(first: Arrays, second: Arrays) -> list[Finding]:
    """Compare the results of two calls that ought to have the same bits."""
    findings = []
    for name, a in first.items():
        b = second[name]
        numbers = a.astype(np.float64), b.astype(np.float64)
        equal = a.tobytes() == b.tobytes()
        with np.errstate(invalid="ignore"):
            largest = float(np.nan_to_num(np.abs(numbers[0] - numbers[1]).max(initial=0.0)))
        said = "" if equal else f"up to {largest:.1e} apart"
        findings.append(Finding("right" if equal else "other bits", name, said=said))
    return findings


# --- the contenders --------------------------------------------------------------------------------


class Contender:
    """A batch normalization. Nothing of it is imported before it is made."""

    package = ""
    also: tuple[str, ...] = ()  # packages whose versions matter as well
    correction = 1  # of the running variance
    strides = True  # reads arrays where they lie

    def run(self, call: Call) -> Arrays:
        raise NotImplementedError

    def threads(self, number: int) -> None:
        raise NotApplicable("no number of threads")

    def overlapping(self, x: np.ndarray, out: np.ndarray) -> None:
        raise NotApplicable("no out=")


class Nbbn(Contender):
    package, also = "nbbn", ("numba", "numpy")

    def __init__(self) -> None:
        import nbbn

        self.nbbn = nbbn

    def run(self, call: Call) -> Arrays:
        statistics = call.running_mean, call.running_var
        rest = (call.weight, call.bias, call.training, call.momentum, call.eps)
        results = {}
        if call.grad_out is not None and call.training:
            forward = self.nbbn.batch_norm_forward(
                call.x, call.weight, call.bias, eps=call.eps, axis=call.axis
            )
            mean, invstd = forward.mean, forward.invstd
        elif call.grad_out is not None:
            mean, invstd = call.running_mean, 1 / np.sqrt(call.running_var.astype(np.float64) + call.eps)
        results["out"] = self.nbbn.batch_norm(call.x, *statistics, *rest, axis=call.axis)
        if call.training:
            results |= {"running_mean": call.running_mean, "running_var": call.running_var}
        if call.grad_out is not None:
            gradients = self.nbbn.batch_norm_backward(
                call.grad_out, call.x, call.weight,
                mean=mean, invstd=invstd, axis=call.axis, training=call.training,
            )  # fmt: skip
            results |= {f"grad_{name}": value for name, value in gradients._asdict().items()}
        return results

    def threads(self, number: int) -> None:
        import numba

        from nbbn.compiler import pool

        pool.threads()
        numba.set_num_threads(number)

    def overlapping(self, x: np.ndarray, out: np.ndarray) -> None:
        self.nbbn.batch_norm_forward(x, out=out)


class Torch(Contender):
    """torch.nn.functional.batch_norm, and its gradients by autograd."""

    package = "torch"

    def __init__(self) -> None:
        import torch

        self.torch = torch

    def tensor(self, a: np.ndarray | None) -> Any:
        if a is None:
            return None
        if any(s < 0 for s in a.strides):
            raise NotApplicable("tensors have no negative strides")
        if a.dtype.name == "bfloat16":
            return self.torch.from_numpy(a.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(a)

    def array(self, t: Any) -> np.ndarray:
        t = t.detach()
        if t.dtype == self.torch.bfloat16:
            return t.view(self.torch.int16).numpy().view("bfloat16")
        return t.numpy()

    def run(self, call: Call) -> Arrays:
        import ml_dtypes  # noqa: F401  (NumPy knows "bfloat16" from now on)

        x = self.tensor(np.moveaxis(call.x, call.axis, 1))
        weight, bias = self.tensor(call.weight), self.tensor(call.bias)
        statistics = self.tensor(call.running_mean), self.tensor(call.running_var)
        leaves = {"grad_x": x, "grad_weight": weight, "grad_bias": bias}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        if call.grad_out is not None:
            for leaf in leaves.values():
                leaf.requires_grad_()
        out = self.torch.nn.functional.batch_norm(
            x, *statistics, weight, bias, call.training, call.momentum, call.eps
        )
        results = {"out": np.moveaxis(self.array(out), 1, call.axis)}
        if call.training:
            names = ("running_mean", "running_var")
            results |= dict(zip(names, map(self.array, statistics), strict=True))
        if call.grad_out is not None:
            out.backward(self.tensor(np.moveaxis(call.grad_out, call.axis, 1)))
            results |= {name: self.array(leaf.grad) for name, leaf in leaves.items()}
            results["grad_x"] = np.moveaxis(results["grad_x"], 1, call.axis)
        return results

    def threads(self, number: int) -> None:
        self.torch.set_num_threads(number)


class Flax(Contender):
    """flax.nnx.BatchNorm under nnx.jit, and its gradients by jax.vjp.

    Of half precision, what it computes (float32, as long as its own parameters are) is rounded once.
    """

    package, also = "flax", ("jax", "jaxlib")
    correction = 0
    strides = False
    fast = True

    def __init__(self) -> None:
        import jax
        from flax import nnx

        self.jax, self.nnx = jax, nnx

    def layer(self, call: Call) -> Any:
        jnp = self.jax.numpy
        kind = next((a.dtype for a in (call.weight, call.bias) if a is not None), np.dtype(np.float32))
        if call.x.dtype == np.float64:
            kind = call.x.dtype
        layer = self.nnx.BatchNorm(
            call.channels,
            use_running_average=not call.training,
            axis=call.axis,
            momentum=1 - call.momentum,
            epsilon=call.eps,
            param_dtype=kind,
            use_scale=call.weight is not None,
            use_bias=call.bias is not None,
            use_fast_variance=self.fast,
            rngs=self.nnx.Rngs(0),
        )
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        for theirs, ours in names.items():
            value = getattr(call, ours)
            if value is not None:
                setattr(layer, theirs, type(getattr(layer, theirs))(jnp.asarray(value)))
        return layer

    def run(self, call: Call) -> Arrays:
        jax, nnx = self.jax, self.nnx
        if any(a.dtype == np.float64 for a in call.arrays.values()):
            jax.config.update("jax_enable_x64", True)
        x, layer = jax.numpy.asarray(call.x), self.layer(call)
        graph, parameters, state = nnx.split(nnx.clone(layer), nnx.Param, ...)
        out = nnx.jit(lambda layer, x: layer(x))(layer, x)
        results = {"out": out.astype(x.dtype)}
        if call.training:
            results |= {"running_mean": layer.mean[...], "running_var": layer.var[...]}
        if call.grad_out is not None:

            def gradients(x, parameters, state, dy):
                def forward(x, parameters):
                    return nnx.merge(graph, parameters, state, copy=True)(x).astype(x.dtype)

                return jax.vjp(forward, x, parameters)[1](dy)

            dy = jax.numpy.asarray(call.grad_out)
            grad_x, others = jax.jit(gradients)(x, parameters, state, dy)
            results["grad_x"] = grad_x
            for theirs, ours in (("scale", "grad_weight"), ("bias", "grad_bias")):
                if theirs in others:
                    results[ours] = others[theirs][...]
        return {name: np.asarray(value) for name, value in results.items()}


class FlaxTwoPass(Flax):
    """The same with use_fast_variance=False, which its documentation has for numerical stability."""

    fast = False


class Onnx(Contender):
    """A BatchNormalization node of opset 15 on the CPU provider; it has no gradients."""

    package, also = "onnxruntime", ("onnx",)
    correction = 0
    strides = False
    used = 0

    def __init__(self) -> None:
        import onnx
        import onnxruntime

        self.onnx, self.runtime = onnx, onnxruntime

    def run(self, call: Call) -> Arrays:
        helper, types = self.onnx.helper, self.onnx.TensorProto
        if call.axis != 1:
            raise NotApplicable("the channel axis is 1")
        kind = call.x.dtype if call.x.dtype == np.float64 else np.dtype(np.float32)
        channels = call.channels
        feeds = {
            "x": np.ascontiguousarray(call.x),
            "scale": np.ones(channels, kind) if call.weight is None else call.weight,
            "bias": np.zeros(channels, kind) if call.bias is None else call.bias,
            "mean": call.running_mean,
            "var": call.running_var,
        }
        if feeds["scale"].dtype != feeds["bias"].dtype or feeds["mean"].dtype != feeds["var"].dtype:
            raise NotApplicable("both statistics are of one type")
        inputs = list(feeds)
        if call.bias is not None and call.bias is call.running_mean:
            inputs[3] = "bias"
            del feeds["mean"]
        bfloat16 = call.x.dtype.name == "bfloat16"  # not a type of NumPy's: cast in the graph
        nodes = []
        if bfloat16:
            feeds["x"] = feeds["x"].astype(np.float32)
            nodes = [helper.make_node("Cast", ["x"], ["x16"], to=types.BFLOAT16)]
            inputs[0] = "x16"
        outputs = {"out": call.x.shape}
        if call.training:
            outputs |= {"running_mean": (channels,), "running_var": (channels,)}
        names = list(outputs)
        if bfloat16:
            names[0] = "out16"
        attributes = {"epsilon": call.eps, "momentum": 1 - call.momentum, "training_mode": int(call.training)}
        nodes.append(helper.make_node("BatchNormalization", inputs, names, **attributes))
        if bfloat16:
            nodes.append(helper.make_node("Cast", ["out16"], ["out"], to=types.FLOAT))
        code = helper.np_dtype_to_tensor_dtype
        results = {name: feeds["var" if "running" in name else "x"].dtype for name in outputs}
        graph = helper.make_graph(
            nodes,
            "batch_norm",
            [helper.make_tensor_value_info(n, code(a.dtype), a.shape) for n, a in feeds.items()],
            [helper.make_tensor_value_info(n, code(results[n]), s) for n, s in outputs.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)
        options = self.runtime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = self.used
        try:
            session = self.runtime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            if "NOT_IMPLEMENTED" in str(error):
                raise NotApplicable("no kernel for these types on CPUs") from None
            raise
        found = dict(zip(outputs, session.run(None, feeds), strict=True))
        return found | {"out": found["out"].astype(call.x.dtype)}

    def threads(self, number: int) -> None:
        self.used = number


CONTENDERS: dict[str, type[Contender]] = {
    "nbbn": Nbbn,
    "PyTorch": Torch,
    "Flax": Flax,
    "Flax, use_fast_variance=False": FlaxTwoPass,
    "ONNX Runtime": Onnx,
}


# --- the cases -------------------------------------------------------------------------------------

Check = Callable[[Contender, np.random.Generator], list[Finding]]


@dataclass
class Case:
    """`row` is the place in the list of faults that the tests keep; `promised`, who makes a promise of it."""

    row: str
    text: str
    promised: str
    check: Check
    large: bool = False


CASES: dict[str, Case] = {}


def case(row: str, text: str, promised: str = "nbbn", large: bool = False) -> Callable[[Check], Check]:
    """Add a function to the cases, by its name."""

    def add(check: Check) -> Check:
        name = check.__name__.removeprefix("_").replace("_", "-")
        CASES[name] = Case(row, text, promised, check, large)
        return check

    return add


def judged(contender: Contender, call: Call) -> list[Finding]:
    """Run a call and hold it against the oracle; that no input was written is part of it."""
    before = call.copy()
    if not contender.strides and any(not a.flags.c_contiguous for a in call.arrays.values()):
        raise NotApplicable("arrays have no strides")
    findings = against_oracle(before, contender.run(call), contender.correction)
    updated = ("running_mean", "running_var") if call.training else ()
    for name, array in call.arrays.items():
        aliased = any(array is getattr(call, other) for other in updated)
        if not aliased and np.array(array, order="C").tobytes() != getattr(before, name).tobytes():
            findings.append(Finding("wrong", name, said="was written"))
    if call.name:
        for finding in findings:
            finding.what = f"{call.name}: {finding.what}"
    return findings


def accuracy(row: str, text: str, promised: str = "nbbn") -> Callable[[Callable[..., Iterator[Call]]], Any]:
    """Add a function that yields calls to the cases: each is held against the oracle."""

    def add(calls: Callable[..., Iterator[Call]]) -> Any:
        def check(contender: Contender, rng: np.random.Generator) -> list[Finding]:
            findings: list[Finding] = []
            for call in calls(rng):
                try:
                    findings += judged(contender, call)
                except NotApplicable as reason:
                    findings.append(Finding("n/a", call.name, said=str(reason)))
                except Exception as error:
                    findings.append(raised(error, call.name))
            return findings

        check.__name__ = calls.__name__
        case(row, text, promised)(check)
        return calls

    return add


def raised(error: Exception, what: str = "", verdict: str = "raises") -> Finding:
    lines = str(error).strip().splitlines() or [""]
    return Finding(verdict, what, said=f"{type(error).__name__}: {lines[0][:160]}")


def bfloat16() -> np.dtype:
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def normal(rng: np.random.Generator, shape: tuple[int, ...], mean: float = 0.0, sigma: float = 1.0) -> Any:
    return mean + sigma * rng.normal(size=shape)


def offset(mean: float) -> None:
    @accuracy("1", f"float32, mean {mean:.0e}, deviation 1".replace("e+0", "e"))
    def calls(rng):
        shape = (8, 3, 20, 20)
        x, dy = (normal(rng, shape, m).astype(np.float32) for m in (mean, 0))
        yield Call(x, dy, np.ones(3, np.float32), np.full(3, 0.5, np.float32))

    CASES[f"offset-{mean:.0e}".replace("e+0", "e")] = CASES.pop("calls")


for _mean in (1e4, 1e5, 1e6, 1e7):
    offset(_mean)


@accuracy("1", "float32, mean 1e6, deviation 1, evaluation with these statistics")
def offset_in_evaluation(rng):
    x, dy = (normal(rng, (8, 3, 20, 20), m).astype(np.float32) for m in (1e6, 0))
    mean = np.full(3, 1e6, np.float32)
    yield Call(x, dy, np.ones(3, np.float32), np.full(3, 0.5, np.float32), mean, training=False)


@accuracy("1", "bfloat16, mean 5, deviation 0.1")
def bfloat16_offset(rng):
    x, dy = (a.astype(bfloat16()) for a in (normal(rng, (8, 3, 20, 20), 5, 0.1), normal(rng, (8, 3, 20, 20))))
    yield Call(x, dy, np.ones(3, np.float32), np.full(3, 0.5, np.float32))


@accuracy("1", "float32, one value of 1e6 before 5e4 of deviation 1")
def outlier(rng):
    x, dy = (normal(rng, (50, 2, 1000)).astype(np.float32) for _ in range(2))
    x[0, :, 0] = 1e6
    yield Call(x, dy, np.ones(2, np.float32), np.full(2, 0.5, np.float32))


@accuracy("2", "float32, 16 values 100 + i/1000")
def small_steps(rng):
    x = (100 + np.arange(16)[:, None] * [1e-3, -1e-3]).astype(np.float32)
    yield Call(
        x, normal(rng, (16, 2)).astype(np.float32), np.ones(2, np.float32), np.full(2, 0.5, np.float32)
    )


@accuracy("3", "float32, constant channels of 0.1, 100 and 1e10; n from 2 to 1000: the bias is the output")
def constants(rng):
    bias = np.array([0.5, -1.0, 3.0], np.float32)
    for count in (2, 3, 9, 49, 1000):
        x = np.repeat(np.array([[0.1, 100.0, 1e10]], np.float32), count, axis=0)
        yield Call(x, weight=np.ones(3, np.float32), bias=bias, name=f"n={count}")


@case("4", "float32, 3.9e7 uniform values in a channel", large=True)
def long_channel(contender, rng):
    """600 times the same 65536 values, so that the oracle needs to look at 65536 only."""
    line = rng.permutation(65536).astype(np.float32) / np.float32(65536)
    x = np.broadcast_to(line, (600, 1, 65536)).copy()
    call = Call(x, weight=np.ones(1, np.float32), bias=np.full(1, 0.5, np.float32))
    results = contender.run(call)
    few = Call(line[None, None], weight=call.weight, bias=call.bias)
    lines = results.pop("out")[:, 0]
    factor = 1.0 if contender.correction == 0 else (x.size / (x.size - 1)) * (65535 / 65536)
    results["running_var"] = results["running_var"].astype(np.float64) / factor
    lowest, highest = lines.min(axis=0), lines.max(axis=0)
    findings = []
    for part in (lowest, highest):  # both ends of what 600 equal inputs became
        findings += against_oracle(few, results | {"out": part[None, None]}, contender.correction)
    return findings


@accuracy("5", "float16, 1e5 values of ±200 and gradients of 300: sums beyond 65504")
def large_sums(rng):
    x = np.tile(np.array([[200.0, -200.0], [-200.0, 200.0]], np.float16), (50_000, 1))
    yield Call(x, np.full_like(x, 300), np.ones(2, np.float32), np.full(2, 0.5, np.float32))


@accuracy("6", "float16, evaluation with running_var 1e5")
def large_variance(rng):
    x = rng.choice([-300.0, 0.0, 300.0], (50, 3)).astype(np.float16)
    var = np.full(3, 1e5, np.float32)
    yield Call(x, None, np.ones(3, np.float32), np.full(3, 0.5, np.float32), running_var=var, training=False)


@accuracy("7", "float16, 70000 values in a channel")
def large_count(rng):
    x, dy = (normal(rng, (7, 2, 10_000)).astype(np.float16) for _ in range(2))
    yield Call(x, dy, np.ones(2, np.float32), np.full(2, 0.5, np.float32))


@accuracy("8", "float32, evaluation of -6.8e35 with weight -2282 and invstd 0.117: 1.8e38 is finite")
def order_of_products(rng):
    x = np.full((2, 3, 4, 5), -6.8e35, np.float32)
    for name, layout in (("NCHW", x), ("channels-last strides", channels_last(x))):
        yield Call(
            layout,
            None,
            np.full(3, -2282, np.float32),
            np.zeros(3, np.float32),
            running_var=np.full(3, 1 / 0.117**2, np.float32),
            training=False,
            name=name,
        )


@accuracy("9", "float32, magnitudes from 1e-5 to 1e15")
def magnitudes(rng):
    shape = (40, 4, 5)
    x, dy = (
        (rng.choice([-1, 1], shape) * 10 ** rng.uniform(-5, 15, shape)).astype(np.float32) for _ in range(2)
    )
    yield Call(x, dy, np.ones(4, np.float32), np.full(4, 0.5, np.float32))


@accuracy("10", "float32, variance 1e-10 to 1e3 beside eps 1e-12 to 0.1, training and evaluation", "all")
def eps(rng):
    for value in (1e-12, 1e-5, 0.1):
        value = float(np.float32(value))
        for var in (1e-10, 1e-6, 1.0, 1e3):
            x, dy = (normal(rng, (30, 4, 11), 0, s).astype(np.float32) for s in (var**0.5, 1))
            weight, bias = np.ones(4, np.float32), np.full(4, 0.5, np.float32)
            statistics = np.zeros(4, np.float32), np.full(4, var, np.float32)
            for training in (True, False):
                name = f"eps={value:.0e} var={var:.0e} {'training' if training else 'evaluation'}"
                yield Call(x, dy, weight, bias, *statistics, training, eps=value, name=name)


@accuracy("11", "float32, eps 0 and variance 1e-10")
def eps_of_zero(rng):
    x, dy = (normal(rng, (30, 4, 11), 0, s).astype(np.float32) for s in (1e-5, 1))
    weight, bias = np.ones(4, np.float32), np.full(4, 0.5, np.float32)
    for training in (True, False):
        var = np.full(4, 1e-10, np.float32)
        name = "training" if training else "evaluation"
        yield Call(x, dy, weight, bias, None, var, training, eps=0.0, name=name)


@case("13", "one value a channel in training: refused, or the running statistics stay numbers")
def one_value(contender, rng):
    call = Call(normal(rng, (1, 3)).astype(np.float32), momentum=0.1)
    try:
        results = contender.run(call)
    except Exception as error:
        kept = call.running_mean.tolist() == [0.0] * 3 and call.running_var.tolist() == [1.0] * 3
        return [raised(error, verdict="refused" if kept else "wrong")]
    lost = [name for name, value in results.items() if not np.isfinite(value).all()]
    if lost:
        return [Finding("not finite", ", ".join(lost))]
    return [Finding("right" if not results["out"].any() else "wrong", "out", said="variance 0")]


@case("14", "empty batches: empty output, gradients of 0, running statistics as they were")
def empty(contender, rng):
    findings = []
    for dims in ((0, 3, 4, 4), (2, 3, 0, 4)):
        x = np.zeros(dims, np.float32)
        call = Call(x, x.copy(), np.ones(3, np.float32), np.zeros(3, np.float32), momentum=0.1)
        name = "x".join(map(str, dims))
        try:
            results = contender.run(call)
        except Exception as error:
            findings.append(raised(error, name))
            continue
        wanted = {
            "out": x, "grad_x": x, "grad_weight": np.zeros(3), "grad_bias": np.zeros(3),
            "running_mean": np.zeros(3), "running_var": np.ones(3),
        }  # fmt: skip
        for result, value in results.items():
            verdict = "right" if np.array_equal(value, wanted[result]) else "wrong"
            if not np.isfinite(value).all():
                verdict = "not finite"
            findings.append(Finding(verdict, f"{name}: {result}"))
    return findings


@accuracy("20", "float32, batches of 65536 and 131071", "all")
def long_batches(rng):
    for shape in ((65536, 2, 3), (131071, 3)):
        x, dy = (normal(rng, shape).astype(np.float32) for _ in range(2))
        weight, bias = np.ones(shape[1], np.float32), np.full(shape[1], 0.5, np.float32)
        for training in (True, False):
            name = f"N={shape[0]} {'training' if training else 'evaluation'}"
            yield Call(x, dy, weight, bias, training=training, name=name)


def channels_last(x):
    """The same array with channels-last strides."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


@accuracy("24", "float32, 65 channels, channels-last", "all but ONNX")
def channels_65(rng):
    x, dy = (normal(rng, (3, 6, 7, 65), 3).astype(np.float32) for _ in range(2))
    weight, bias = (normal(rng, (65,)).astype(np.float32) for _ in range(2))
    for training in (True, False):
        name = "training" if training else "evaluation"
        yield Call(x, dy, weight, bias, training=training, axis=3, name=f"axis=-1 {name}")
        strides = (np.moveaxis(a, -1, 1) for a in (x, dy))
        yield Call(*strides, weight, bias, training=training, name=f"channels-last strides {name}")


def views(rng, some):
    x, dy = (normal(rng, (6, 5, 7, 8), 3).astype(np.float32) for _ in range(2))
    for name, view in some.items():
        a, b = view(x), view(dy)
        channels = a.shape[1]
        weight, bias = (normal(rng, (channels,)).astype(np.float32) for _ in range(2))
        for training in (True, False):
            mode = "training" if training else "evaluation"
            yield Call(a, b, weight, bias, training=training, name=f"{name} {mode}")


@accuracy("25, 28", "float32, permuted and sliced views", "nbbn, PyTorch")
def strided_views(rng):
    some = {
        "(0,2,3,1)": lambda a: a.transpose(0, 2, 3, 1),
        "(2,1,3,0)": lambda a: a.transpose(2, 1, 3, 0),
        "(3,2,1,0)": lambda a: a.transpose(3, 2, 1, 0),
        "x[1:]": lambda a: a[1:],
        "x[:, 2:5]": lambda a: a[:, 2:5],
        "x[..., ::2]": lambda a: a[..., ::2],
    }
    yield from views(rng, some)


@accuracy("25", "float32, negative strides")
def negative_strides(rng):
    yield from views(rng, {"x[::-1]": lambda a: a[::-1], "x[:, ::-1, ::-1]": lambda a: a[:, ::-1, ::-1]})


@accuracy("27", "float32, x channels-first and grad_out channels-last, and the reverse", "nbbn, PyTorch")
def pairs_of_layouts(rng):
    x, dy = (normal(rng, (4, 5, 6, 7), 3).astype(np.float32) for _ in range(2))
    weight, bias = (normal(rng, (5,)).astype(np.float32) for _ in range(2))
    for training in (True, False):
        mode = "training" if training else "evaluation"
        first, last = (x, channels_last(dy)), (channels_last(x), dy)
        yield Call(*first, weight, bias, training=training, name=f"grad_out channels-last {mode}")
        yield Call(*last, weight, bias, training=training, name=f"x channels-last {mode}")


@accuracy("29", "float32, grad_out with strides 0, as a sum's gradient has", "nbbn, PyTorch")
def broadcast_gradient(rng):
    x = normal(rng, (4, 5, 6, 7), 3).astype(np.float32)
    weight, bias = (normal(rng, (5,)).astype(np.float32) for _ in range(2))
    per_channel = normal(rng, (5, 1, 1)).astype(np.float32)
    for name, dy in (("of a sum", np.float32(1)), ("a number a channel", per_channel)):
        for training in (True, False):
            mode = "training" if training else "evaluation"
            yield Call(
                x, np.broadcast_to(dy, x.shape), weight, bias, training=training, name=f"{name} {mode}"
            )


@accuracy("31", "float32, running statistics that are views of every second number", "nbbn, PyTorch")
def strided_statistics(rng):
    x = normal(rng, (4, 5, 6), 3).astype(np.float32)
    yield Call(x, None, None, None, np.zeros(10, np.float32)[::2], np.ones(10, np.float32)[::2])


@accuracy("32", "float32, the array of the bias is that of running_mean as well")
def aliased_bias(rng):
    bias = normal(rng, (5,)).astype(np.float32)
    yield Call(normal(rng, (4, 5, 6), 3).astype(np.float32), None, np.ones(5, np.float32), bias, bias)


@accuracy("33", "float32, n = 2: the biased variance normalizes; the unbiased one is tracked", "all")
def two_values(rng):
    x, dy = np.array([[3.0, -1.0], [5.0, -9.0]], np.float32), normal(rng, (2, 2)).astype(np.float32)
    yield Call(x, dy, np.ones(2, np.float32), np.full(2, 0.5, np.float32))


@case("34", "momentum 0 and a batch of NaN: the running statistics keep their bits")
def momentum_zero(contender, rng):
    x = normal(rng, (4, 3, 5)).astype(np.float32)
    x[1, 1] = np.nan
    mean, var = normal(rng, (3,)).astype(np.float32), rng.uniform(1, 2, 3).astype(np.float32)
    before = {"running_mean": mean.copy(), "running_var": var.copy()}
    results = contender.run(Call(x, running_mean=mean, running_var=var, momentum=0.0))
    findings = same_bits(before, {name: results[name] for name in before})
    for finding in findings:
        if not np.isfinite(results[finding.what]).all():
            finding.verdict = "not finite"
    return findings


@accuracy("37", "float16 and bfloat16 with parameters and statistics of float32, or none")
def half_with_float32(rng):
    for dtype in (np.dtype(np.float16), bfloat16()):
        x, dy = (normal(rng, (4, 5, 60), m).astype(dtype) for m in (1, 0))
        weight, bias = (normal(rng, (5,)).astype(np.float32) for _ in range(2))
        for training in (True, False):
            mode = "training" if training else "evaluation"
            yield Call(x, dy, weight, bias, training=training, name=f"{dtype.name} {mode}")
            yield Call(x, dy, training=training, name=f"{dtype.name} {mode}, no parameters")


@accuracy("37", "float32 with parameters or statistics of float64, all or one of them")
def float32_with_float64(rng):
    x, dy = (normal(rng, (4, 5, 60), m).astype(np.float32) for m in (1, 0))
    parameters = [normal(rng, (5,)) for _ in range(2)]
    statistics = [normal(rng, (5,)), rng.uniform(1, 2, 5)]
    kinds = {
        "statistics": (np.float32, np.float32, np.float64, np.float64),
        "running_mean": (np.float32, np.float32, np.float64, np.float32),
        "parameters": (np.float64, np.float64, np.float32, np.float32),
        "all": (np.float64,) * 4,
    }
    for name, types in kinds.items():
        for training in (True, False):
            values = [v.astype(t) for v, t in zip(parameters + statistics, types, strict=True)]
            mode = "training" if training else "evaluation"
            yield Call(x, dy, *values, training=training, name=f"{name} {mode}")


@case("38", "NaN in one channel and infinity in another: the others keep their bits")
def isolation(contender, rng):
    x, dy = (normal(rng, (6, 7, 4, 5)).astype(np.float32) for _ in range(2))
    dirty = x.copy()
    dirty[1, 2, 1, 1], dirty[3, 4, 0, 0] = np.nan, np.inf
    weight, bias = (normal(rng, (7,)).astype(np.float32) for _ in range(2))
    clean, spoilt = (contender.run(Call(a.copy(), dy.copy(), weight, bias)) for a in (x, dirty))
    others = [0, 1, 3, 5, 6]

    def kept(results):
        return {n: v[:, others] if v.ndim > 1 else v[others] for n, v in results.items()}

    findings = same_bits(kept(clean), kept(spoilt))
    lost = np.isnan(spoilt["out"][:, [2, 4]]).all()
    said = "" if lost else "NaN is lost in its own channel"
    return [*findings, Finding("right" if lost else "wrong", "out of the poisoned", said=said)]


def bits_cases(rng):
    for shape in ((32, 64, 28, 28), (8, 3, 112, 112), (3136, 256)):
        x, dy = (normal(rng, shape, 3).astype(np.float32) for _ in range(2))
        weight, bias = (normal(rng, (shape[1],)).astype(np.float32) for _ in range(2))
        yield Call(x, dy, weight, bias, name="x".join(map(str, shape)))


def compared(contender, call, prepare, times):
    first = contender.run(call.copy())
    first = {name: value.copy() for name, value in first.items()}
    findings = []
    for _ in range(times):
        prepare()
        for finding in same_bits(first, contender.run(call.copy())):
            finding.what = f"{call.name}: {finding.what}"
            findings.append(finding)
    return findings


@case("44", "float32, 20 runs: the same bits")
def runs(contender, rng):
    return [f for call in bits_cases(rng) for f in compared(contender, call, lambda: None, 19)]


@case("44", "float32, one thread and two: the same bits")
def threads(contender, rng):
    findings = []
    for call in bits_cases(rng):
        contender.threads(2)
        findings += compared(contender, call, lambda: contender.threads(1), 1)
    return findings


@case("", "float32, x times 2ᵏ and eps times 4ᵏ: the same output, all else scaled exactly")
def power_of_two(contender, rng):
    findings = []
    x, dy = (normal(rng, (6, 5, 70), 3).astype(np.float32) for _ in range(2))
    weight, bias = (normal(rng, (5,)).astype(np.float32) for _ in range(2))
    eps = 2.0**-17
    first = contender.run(Call(x, dy, weight, bias, eps=eps))
    for k in (-20, -3, 10, 20):
        scale = np.float32(2.0**k)
        results = contender.run(Call(x * scale, dy, weight, bias, eps=eps * 4.0**k))
        back = {"running_mean": 1 / scale, "running_var": scale**-2, "grad_x": scale}
        results = {name: value * value.dtype.type(back.get(name, 1)) for name, value in results.items()}
        for finding in same_bits(first, results):
            finding.what = f"k={k}: {finding.what}"
            findings.append(finding)
    return findings


def numacc(first, low, high, dtype):
    return np.array([first] + [low, high] * 500, dtype).reshape(7, 1, 11, 13)


@accuracy("", "float64, NIST's NumAcc3 and NumAcc4: mean 1e6 and 1e7, deviation 0.1")
def nist(rng):
    for name, data in (
        ("NumAcc3", (1000000.2, 1000000.1, 1000000.3)),
        ("NumAcc4", (10000000.2, 10000000.1, 10000000.3)),
    ):
        yield Call(numacc(*data, np.float64), weight=np.ones(1), bias=np.full(1, 0.5), name=name)


@accuracy("", "float32, NIST's NumAcc3 and NumAcc4; the latter is a constant in float32")
def nist_in_float32(rng):
    weight, bias = np.ones(1, np.float32), np.full(1, 0.5, np.float32)
    for name, data in (
        ("NumAcc3", (1000000.2, 1000000.1, 1000000.3)),
        ("NumAcc4", (10000000.2, 10000000.1, 10000000.3)),
    ):
        yield Call(numacc(*data, np.float32), weight=weight, bias=bias, name=name)


@case("30", "out that overlaps x, and is not x: refused, and nothing written")
def overlapping_out(contender, rng):
    buffer = normal(rng, (5, 3, 8)).astype(np.float32)
    before = buffer.copy()
    try:
        contender.overlapping(buffer[:4], buffer[1:])
    except NotApplicable:
        raise
    except Exception as error:
        return [raised(error, verdict="refused" if np.array_equal(buffer, before) else "wrong")]
    return [Finding("wrong", "out", said="not refused")]


def refused(wrong: str) -> None:
    """Add a case: an argument of the wrong length, or none where one is needed."""
    texts = {
        "short-weight": "a weight of one channel too few: refused",
        "short-statistics": "running statistics of one channel too few: refused",
        "empty-statistics": "running statistics of length 0: refused",
    }

    @case("17", texts[wrong])
    def check(contender, rng):
        x = normal(rng, (8, 64, 5, 5)).astype(np.float32)
        findings = []
        for training in (True, False):
            length = {"short-weight": 64, "short-statistics": 63, "empty-statistics": 0}[wrong]
            given = [np.ones(length, np.float32) for _ in range(2)]
            weight = np.ones(63 if wrong == "short-weight" else 64, np.float32)
            call = Call(x, None, weight, np.zeros(64, np.float32), *given, training)
            name = "training" if training else "evaluation"
            try:
                contender.run(call)
            except Exception as error:
                findings.append(raised(error, name, "refused"))
            else:
                findings.append(Finding("wrong", name, said="was taken"))
        return findings

    CASES[wrong] = CASES.pop("check")


for _wrong in ("short-weight", "short-statistics", "empty-statistics"):
    refused(_wrong)


@case("12", "subnormal numbers are still numbers to the process, after import and a call")
def subnormals(contender, rng):
    contender.run(Call(normal(rng, (64, 64, 9, 9)).astype(np.float32)))
    tiny = np.array([5e-324]), np.array([1e-45], np.float32)
    kept = all((a * a.dtype.type(1) != 0).all() for a in tiny)
    return [Finding("right" if kept else "wrong", "process", said="" if kept else "flushed to zero")]


# --- running them ----------------------------------------------------------------------------------


def child(contender: str, name: str, seed: int) -> None:
    """Run one case on one contender and print what became of it."""
    warnings.simplefilter("ignore")
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    try:
        with np.errstate(all="ignore"):
            findings = CASES[name].check(CONTENDERS[contender](), rng)
    except NotApplicable as reason:
        findings = [Finding("n/a", "", said=str(reason))]
    except Exception as error:
        traceback.print_exc()
        findings = [raised(error)]
    print("\n" + json.dumps([asdict(f) for f in findings]))


def run(contender: str, name: str, seed: int) -> list[Finding]:
    """Run a case in a process of its own."""
    command = [sys.executable, __file__, "--child", contender, name, "--seed", str(seed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return [Finding("crashes", "", said="no end after 600 s")]
    if done.returncode < 0:
        return [Finding("crashes", "", said=signal.Signals(-done.returncode).name)]
    if done.returncode:
        return [Finding("crashes", "", said=(done.stderr.strip().splitlines() or ["no message"])[-1])]
    return once([Finding(**finding) for finding in json.loads(done.stdout.splitlines()[-1])])


def worst(findings: list[Finding]) -> Finding:
    return max(findings, key=lambda f: (WORST.index(f.verdict), f.share, f.units))


def once(findings: list[Finding]) -> list[Finding]:
    """Return the worst of what became of each result."""
    return [
        worst([f for f in findings if f.what == what]) for what in dict.fromkeys(f.what for f in findings)
    ]


def number(value: float) -> str:
    if 0.095 <= value < 1e4:
        return f"{value:.{0 if value >= 9.5 else 1 if value >= 0.95 else 2}f}"
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def cell(findings: list[Finding]) -> str:
    """Say what became of a case, by its worst result."""
    found = worst(findings)
    verdict, bad = found.verdict, [f for f in findings if f.verdict == found.verdict]
    names = ", ".join(dict.fromkeys(f.what.rsplit(": ", 1)[-1] for f in bad))
    if verdict == "n/a":
        return f"n/a: {found.said}"
    units = max(f.units for f in findings)
    if verdict in ("right", "near"):
        return f"{verdict} ({number(units)})" if units else verdict
    if verdict in ("refused", "raises"):
        return f"{verdict}: {found.said.split(':')[0]}"
    if verdict == "off" or (verdict == "wrong" and found.share):
        name = found.what.rsplit(": ", 1)[-1]
        return f"{EMPHASIZED.get(verdict, verdict)}: {name} {number(found.share)} ({number(found.units)})"
    said = {f.said for f in bad} if verdict in ("wrong", "crashes") else set()
    return ": ".join(filter(None, (EMPHASIZED.get(verdict, verdict), names, ", ".join(sorted(said)))))


EMPHASIZED = {verdict: f"**{verdict}**" for verdict in ("wrong", "not finite", "crashes")}


def versions(chosen: list[str]) -> dict[str, str]:
    """The versions of what runs, as pip knows them."""
    found = {}
    for name in chosen:
        for package in (CONTENDERS[name].package, *CONTENDERS[name].also):
            if package == "nbbn":
                import nbbn

                found["nbbn"] = nbbn.__version__
            else:
                found[package] = importlib.metadata.version(package)
    return found


def installed(name: str) -> bool:
    package = CONTENDERS[name].package
    try:
        return package == "nbbn" or bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def bad_answers(results: dict[str, Any]) -> list[str]:
    """Say each case in which an answer is wrong or no number, or the process ends."""
    lines = []
    for contender in results["contenders"]:
        version = results["versions"][CONTENDERS[contender].package]
        for name, found in results["cases"].items():
            findings = [Finding(**f) for f in found["results"][contender]]
            verdict = worst(findings).verdict
            if verdict in ("wrong", "not finite", "crashes"):
                lines.append(f"- {contender} ({version}), {name}: {found['text']} → {cell(findings)}.")
    return lines


def table(results: dict[str, Any]) -> list[str]:
    heads = ["case", "row", *results["contenders"], "promised by"]
    text = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for found in results["cases"].values():
        cells = [cell([Finding(**f) for f in found["results"][c]]) for c in results["contenders"]]
        text.append("| " + " | ".join([found["text"], found["row"], *cells, found["promised"]]) + " |")
    return text


def text(results: dict[str, Any]) -> str:
    """Return it as JSON, a line for each result."""
    return re.sub(r'\n {6}(?=")|\n {5}(?=})', " ", json.dumps(results, indent=1, allow_nan=False)) + "\n"


def markdown(results: dict[str, Any]) -> str:
    machine = ", ".join(f"{key}: {value}" for key, value in results["machine"].items())
    packages = ", ".join(f"{key} {value}" for key, value in results["versions"].items())
    text = [
        "# Cases that batch normalizations get wrong",
        "",
        f"`python benchmarks/peers.py {results['options']}`",
        "",
        "[Promises](../promises.md) says what the words mean.",
        "",
        f"Run on {machine}; {packages}.",
        "",
        *table(results),
        "",
        "## Wrong, not finite, or crashed",
        "",
        *(bad_answers(results) or ["None."]),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--markdown", type=Path, help="where to write them as a table")
    parser.add_argument("--large", action="store_true", help="the case of 3.9e7 values in a channel as well")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--contender", choices=CONTENDERS, help="this one alone")
    parser.add_argument("--seed", type=int, default=0, help="of the random data (default 0)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child, options.seed)

    chosen = [name for name in CONTENDERS if options.contender in (None, name) and installed(name)]
    for name in CONTENDERS:
        if not installed(name):
            print(f"{name} is not installed.")
    cases = {}
    for name, one in CASES.items():
        if options.only not in name or (one.large and not options.large):
            continue
        print(f"{name}: {one.text}", flush=True)
        found = {contender: run(contender, name, options.seed) for contender in chosen}
        for contender, findings in found.items():
            print(f"    {contender}: {cell(findings)}", flush=True)
        cases[name] = {
            "row": one.row,
            "text": one.text,
            "promised": one.promised,
            "results": {c: [dict(f) for f in findings] for c, findings in found.items()},
        }

    from compare import machine

    facts = {key: value for key, value in machine().items() if key in ("date", "cpu", "cores", "python")}
    given = sys.argv[1:]
    results = {
        "options": " ".join(given),
        "machine": facts,
        "versions": versions(chosen),
        "contenders": chosen,
        "cases": cases,
    }
    if options.json:
        options.json.write_text(text(results))
    if options.markdown:
        options.markdown.write_text(markdown(results))


if __name__ == "__main__":
    main()
