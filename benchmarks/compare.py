"""Times nbbn against PyTorch and against the machine's own limit, on the CPU.

    python benchmarks/compare.py --json results.json

Every figure is the median of interleaved repetitions in one process, on the same number of threads,
outputs preallocated on both sides. A contender's turn begins with calls that are not timed, for at
least `SETTLE` seconds: the threads of the one before spin on for a while and would be timed with it.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import ml_dtypes
import numba
import numpy as np
from limits import Limit, aligned, copy, triad
from shapes import DENSE, SMALL, resnet50

import nbbn
from nbbn.compiler import pool

SETTLE = 0.01  # seconds
TIMED = 1e-3  # seconds: shorter calls are timed several at a time
LARGE = 50e6  # bytes of an output from which the machine's limit is the yardstick

SUMMARY = (
    "torch/nbbn, geometric mean",
    "torch/nbbn, least",
    "nbbn/limit, most, from 50 MB",
    "nbbn/float32, most, from 50 MB in float32",
    "nbbn/float32, geometric mean, from 50 MB in float32",
)

Contender = Callable[[], Any]


def turn(call: Contender) -> float:
    """Return the seconds that a call takes, once what ran before has died down."""
    begin = time.perf_counter()
    calls = 0
    while (spent := time.perf_counter() - begin) < SETTLE or calls < 2:
        call()
        calls += 1
    repeat = max(1, round(TIMED * calls / spent))
    begin = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - begin) / repeat


def medians(contenders: dict[str, Contender], repetitions: int) -> dict[str, dict[str, float]]:
    """Time each contender once a round, and return its median and quartiles in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, call in contenders.items():
            times[name].append(1e3 * turn(call))
    return {
        name: dict(zip(("low", "median", "high"), statistics.quantiles(taken, n=4), strict=True))
        for name, taken in times.items()
    }


class Case:
    """One operation on one shape in one layout: the arrays, and who does it how.

    Of 16 bits, PyTorch's arrays are bfloat16, its fast type on CPUs, whatever nbbn's are.
    """

    def __init__(self, operation: str, shape: tuple[int, ...], last: bool, dtype: Any = np.float32) -> None:
        self.operation, self.shape, self.last, self.dtype = operation, shape, last, np.dtype(dtype)
        rng = np.random.default_rng(0)
        stored = (shape[0], *shape[2:], shape[1]) if last and len(shape) > 2 else shape
        self.axis = len(shape) - 1 if last else 1
        self.x, self.grad_out, self.out = (aligned(stored, dtype) for _ in range(3))
        self.x[...] = rng.standard_normal(stored, np.float32)
        self.grad_out[...] = rng.standard_normal(stored, np.float32)
        channels = shape[1]
        self.weight = rng.standard_normal(channels).astype(np.float32)
        self.bias = rng.standard_normal(channels).astype(np.float32)
        self.mean, self.var = np.zeros(channels, np.float32), np.ones(channels, np.float32)

    def nbbn(self) -> Contender:
        x, out, axis = self.x, self.out, self.axis
        state = self.mean.copy(), self.var.copy(), self.weight, self.bias
        if self.operation == "backward":
            _, mean, _, invstd, _ = nbbn.batch_norm_forward(x, axis=axis)
            return lambda: nbbn.batch_norm_backward(
                self.grad_out, x, self.weight, mean=mean, invstd=invstd, axis=axis, out=out
            )
        training = self.operation == "forward"
        return lambda: nbbn.batch_norm(x, *state, training, 0.1, 1e-5, axis=axis, out=out)

    def tensor(self, array: np.ndarray) -> Any:
        """Return one of the arrays as PyTorch's."""
        import torch

        if array.dtype.itemsize == 2:
            bits = array.astype(ml_dtypes.bfloat16).view(np.int16)
            shared = torch.from_numpy(bits).view(torch.bfloat16)
        else:
            shared = torch.from_numpy(array)
        return shared.movedim(-1, 1) if self.last else shared

    def torch(self) -> Contender:
        import torch

        x, out = self.tensor(self.x), self.tensor(self.out)
        weight, bias = torch.from_numpy(self.weight), torch.from_numpy(self.bias)
        mean, var = torch.from_numpy(self.mean.copy()), torch.from_numpy(self.var.copy())
        saved = torch.empty_like(mean), torch.empty_like(var)
        if self.operation == "backward":
            own = nbbn.batch_norm_forward(self.x, axis=self.axis)
            own_mean = torch.from_numpy(own.mean).float()
            own_invstd = torch.from_numpy(own.invstd).float()
            function = torch.ops.aten.native_batch_norm_backward.out
            grad_out = self.tensor(self.grad_out)
            everything = [True, True, True]
            return lambda: function(
                grad_out, x, weight, mean, var, own_mean, own_invstd, True, 1e-5, everything,
                out0=out, out1=saved[0], out2=saved[1],
            )  # fmt: skip
        function = torch.ops.aten.native_batch_norm.out
        training = self.operation == "forward"
        return lambda: function(
            x, weight, bias, mean, var, training, 0.1, 1e-5,
            out=out, save_mean=saved[0], save_invstd=saved[1],
        )  # fmt: skip

    def limit(self) -> Contender:
        words = [array.reshape(-1).view(np.float32) for array in (self.out, self.x, self.grad_out)]
        if self.operation == "backward":
            return Limit(triad, *words)
        return Limit(copy, *words[:2])

    def check(self, contenders: dict[str, Contender]) -> None:
        """Raise where nbbn and PyTorch do not agree: a wrong answer is not worth timing."""
        results = []
        for name in ("nbbn", "torch"):
            if name in contenders:
                self.out.fill(np.nan)
                result = contenders[name]()
                if name == "torch" and self.dtype.itemsize == 2:  # into a tensor of its own
                    result = result[0].movedim(1, -1) if self.last else result[0]
                    results.append(result.float().numpy())
                else:
                    results.append(self.out.astype(np.float32))
        close = 1e-3 if self.dtype.itemsize > 2 else 0.1
        np.testing.assert_allclose(results[0], results[-1], rtol=close, atol=close)


def whole_calls(shape: tuple[int, ...], last: bool, dtype: Any = np.float32) -> dict[str, Contender]:
    """A training call through the public functions, with a new output, as a user would write it."""
    import torch

    case = Case("forward", shape, last, dtype)
    state = case.mean.copy(), case.var.copy(), case.weight, case.bias
    x = case.tensor(case.x)
    tensors = [torch.from_numpy(array.copy()) for array in state]
    function = torch.nn.functional.batch_norm
    return {
        "nbbn": lambda: nbbn.batch_norm(case.x, *state, True, 0.1, 1e-5, axis=case.axis),
        "torch": lambda: function(x, *tensors, True, 0.1, 1e-5),
    }


def fresh_outputs(shape: tuple[int, ...]) -> dict[str, Contender]:
    """The same call with `out=` and without."""
    case = Case("forward", shape, False)
    state = case.mean.copy(), case.var.copy(), case.weight, case.bias
    return {
        "out=": lambda: nbbn.batch_norm(case.x, *state, True, 0.1, 1e-5, out=case.out),
        "new": lambda: nbbn.batch_norm(case.x, *state, True, 0.1, 1e-5),
    }


def row(table: str, shape: tuple[int, ...], times: dict[str, dict[str, float]], size: int) -> dict[str, Any]:
    """Return and print one line of the results."""
    mine = times["nbbn"]["median"] if "nbbn" in times else times["new"]["median"]
    line = {"table": table, "shape": shape, "bytes": size, "milliseconds": times}
    text = f"{table:28} {'×'.join(map(str, shape)):16} {size / 1e6:7.1f} MB"
    for name, taken in times.items():
        text += f"   {name} {taken['median']:8.4f}"
    if "torch" in times:
        line["torch/nbbn"] = times["torch"]["median"] / mine
        text += f"   torch/nbbn {line['torch/nbbn']:5.2f}"
    if "limit" in times:
        line["nbbn/limit"] = mine / times["limit"]["median"]
        text += f"   nbbn/limit {line['nbbn/limit']:5.2f}"
    if "float32" in times:
        line["nbbn/float32"] = mine / times["float32"]["median"]
        text += f"   nbbn/float32 {line['nbbn/float32']:5.2f}"
    if "out=" in times:
        line["new/out="] = mine / times["out="]["median"]
        text += f"   new/out= {line['new/out=']:5.2f}"
    print(text, flush=True)
    return line


def summary(lines: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Geometric means and worst cases of each table."""
    result: dict[str, dict[str, float]] = {}
    for table in dict.fromkeys(line["table"] for line in lines):
        ratios = [line["torch/nbbn"] for line in lines if line["table"] == table and "torch/nbbn" in line]
        large = [
            line["nbbn/limit"]
            for line in lines
            if line["table"] == table and "nbbn/limit" in line and line["bytes"] >= LARGE
        ]
        entry = {}
        if ratios:
            entry[SUMMARY[0]] = statistics.geometric_mean(ratios)
            entry[SUMMARY[1]] = min(ratios)
        if large:
            entry[SUMMARY[2]] = max(large)
        # The bytes of the same array in float32 say which ones are large.
        halves = [
            line["nbbn/float32"]
            for line in lines
            if line["table"] == table and "nbbn/float32" in line and 2 * line["bytes"] >= LARGE
        ]
        if halves:
            entry[SUMMARY[3]] = max(halves)
            entry[SUMMARY[4]] = statistics.geometric_mean(halves)
        result[table] = entry
    print()
    for table, entry in result.items():
        print(f"{table:28}", "   ".join(f"{name} {value:.2f}" for name, value in entry.items()))
    return result


def markdown(results: dict[str, Any]) -> str:
    """Return the results as tables."""
    facts = results["machine"]
    text = ["Measured on " + ", ".join(f"{name}: {value}" for name, value in facts.items()) + ".", ""]
    text += ["| table | " + " | ".join(SUMMARY) + " |", "|---" * (len(SUMMARY) + 1) + "|"]
    for table, entry in results["summary"].items():
        values = [entry.get(name) for name in SUMMARY]
        if any(values):
            cells = ["" if value is None else f"{value:.2f}" for value in values]
            text.append(f"| {table} | " + " | ".join(cells) + " |")
    table = None
    for line in results["lines"]:
        names = list(line["milliseconds"])
        ratios = [name for name in ("torch/nbbn", "nbbn/limit", "nbbn/float32", "new/out=") if name in line]
        if line["table"] != table:
            table = line["table"]
            heads = ["shape", "MB", *[f"{name}, ms" for name in names], *ratios]
            text += ["", f"## {table[0].upper()}{table[1:]}", "", "| " + " | ".join(heads) + " |"]
            text.append("|---" * len(heads) + "|")
        cells = ["×".join(map(str, line["shape"])), f"{line['bytes'] / 1e6:.1f}"]
        cells += [f"{line['milliseconds'][name]['median']:.3f}" for name in names]
        cells += [f"{line[name]:.2f}" for name in ratios]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    facts = {
        "date": date.today().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": pool.threads(),
        "layer": pool.layer,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "numba": numba.__version__,
        "nbbn": nbbn.__version__,
    }
    try:
        import torch

        facts["torch"] = torch.__version__
    except ImportError:
        pass
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write the results")
    parser.add_argument("--markdown", type=Path, help="where to write them as tables")
    parser.add_argument("--repetitions", type=int, default=15, help="rounds per figure (default 15)")
    parser.add_argument("--threads", type=int, default=2, help="for both sides (default 2)")
    parser.add_argument("--batch", type=int, default=32, help="images per batch (default 32)")
    parser.add_argument(
        "--half", action="store_true", help="time float16 and bfloat16 instead, against float32 and PyTorch"
    )
    parser.add_argument("--only", default="", help="tables whose name contains this")
    options = parser.parse_args()

    pool.threads()
    numba.set_num_threads(options.threads)
    try:
        import torch

        torch.set_num_threads(options.threads)
        has_torch = True
    except ImportError:
        has_torch = False
        print("PyTorch is not installed: no ratios to it.")

    results = {"machine": machine()}
    lines = half(options, has_torch) if options.half else single(options, has_torch)
    results |= {"summary": summary(lines), "lines": lines}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(results))


def half(options: argparse.Namespace, has_torch: bool) -> list[dict[str, Any]]:
    """Time 16-bit arrays beside the same ones in float32."""
    lines = []
    for last in (False, True):
        layout = "channels-last" if last else "channels-first"
        for operation in ("forward", "backward", "evaluation"):
            for dtype in (np.float16, ml_dtypes.bfloat16):
                table = f"{operation}, {layout}, {np.dtype(dtype).name}"
                if options.only not in table:
                    continue
                for shape in resnet50(options.batch):
                    case = Case(operation, shape, last, dtype)
                    wide = Case(operation, shape, last).nbbn()
                    contenders = {"nbbn": case.nbbn(), "limit": case.limit(), "float32": wide}
                    if has_torch:
                        contenders["torch"] = case.torch()
                    case.check(contenders)
                    lines.append(row(table, shape, medians(contenders, options.repetitions), case.x.nbytes))
        table = f"whole calls, {layout}, bfloat16"
        for shape in resnet50(options.batch) if has_torch and options.only in table else ():
            times = medians(whole_calls(shape, last, ml_dtypes.bfloat16), options.repetitions)
            lines.append(row(table, shape, times, 2 * math.prod(shape)))
    return lines


def single(options: argparse.Namespace, has_torch: bool) -> list[dict[str, Any]]:
    """Time float32 arrays."""
    lines = []
    for last in (False, True):
        for operation in ("forward", "backward", "evaluation"):
            table = f"{operation}, {'channels-last' if last else 'channels-first'}"
            if options.only not in table:
                continue
            for shape in resnet50(options.batch):
                case = Case(operation, shape, last)
                contenders = {"nbbn": case.nbbn(), "limit": case.limit()}
                if has_torch:
                    contenders["torch"] = case.torch()
                case.check(contenders)
                lines.append(row(table, shape, medians(contenders, options.repetitions), case.x.nbytes))
    for shape in DENSE:
        for operation in ("forward", "backward"):
            table = f"{operation}, dense"
            if options.only in table and has_torch:
                case = Case(operation, shape, False)
                contenders = {"nbbn": case.nbbn(), "torch": case.torch()}
                case.check(contenders)
                lines.append(row(table, shape, medians(contenders, options.repetitions), case.x.nbytes))
    for shape in SMALL:
        if options.only in "whole calls" and has_torch:
            times = medians(whole_calls(shape, False), options.repetitions)
            lines.append(row("whole calls", shape, times, 4 * math.prod(shape)))
    if options.only in "new output":
        shape = (options.batch, 256, 56, 56)
        times = medians(fresh_outputs(shape), options.repetitions)
        lines.append(row("new output", shape, times, 4 * math.prod(shape)))
    return lines


if __name__ == "__main__":
    main()
