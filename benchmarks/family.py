"""Layer, group and instance norm beside PyTorch's, and beside a copy of the same bytes.

    pip install torch
    python benchmarks/family.py

prints a table of medians of interleaved calls, in float32, on as many threads on both sides. Every call makes
its outputs, since PyTorch's functions have no `out`. The limit is a copy of the same bytes, or, for the
backward pass, out = x + y, past the caches or through them, whichever is faster, into an array that is there.
With `--short` the same of shapes of which few values are normalized together.
"""

import itertools
import json
import pathlib
import time
from collections.abc import Callable
from statistics import geometric_mean, median
from typing import Annotated, Any

import numpy as np
import torch
import typer

import nbbn
from nbbn.bench.limits import aligned, limits
from nbbn.compiler import pool

SHAPES = [(8192, 1024), (4096, 4096), (32, 64, 56, 56), (32, 512, 28, 28), (8, 3, 512, 512)]
SHORT = [(8192, 16), (8192, 64), (16384, 256), (32, 512, 4, 4), (32, 512, 7, 7), (32, 512, 14, 14)]
GROUPS = 32
EPS = 1e-5


def medians(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Return the median time of each call, in seconds; they take turns, of which the first call is not timed.

    For the threads of whoever was before spin on for a while.
    """
    times: list[list[float]] = [[] for _ in calls]
    for _, (call, its) in itertools.product(range(rounds), zip(calls, times, strict=True)):
        call()
        time.sleep(0.002)
        call()
        start = time.perf_counter()
        call()
        its.append(time.perf_counter() - start)
    return [median(its) for its in times]


def calls(norm: str, x: np.ndarray, grad_out: np.ndarray) -> dict[str, tuple[Callable[[], Any], ...]]:
    """Return for each operation what nbbn calls, and what PyTorch does."""
    rng = np.random.default_rng(0)
    at, dy_at = torch.from_numpy(x), torch.from_numpy(grad_out)
    n, channels = x.shape[:2]
    shape = x.shape[1:] if norm == "layer" else (channels,)
    weight, bias = rng.normal(size=(2, *shape)).astype(np.float32)
    w_at, b_at = torch.from_numpy(weight), torch.from_numpy(bias)
    aten, everything = torch.ops.aten, [True] * 3
    if norm == "layer":
        mine = nbbn.layer_norm_forward(x, shape, weight, bias)
        _, mean, invstd = aten.native_layer_norm(at, shape, w_at, b_at, EPS)
        found = {"mean": mine.mean, "invstd": mine.invstd}
        return {
            "forward": (
                lambda: nbbn.layer_norm(x, shape, weight, bias),
                lambda: aten.native_layer_norm(at, shape, w_at, b_at, EPS),
            ),
            "backward": (
                lambda: nbbn.layer_norm_backward(grad_out, x, shape, weight, **found),
                lambda: aten.native_layer_norm_backward(
                    dy_at, at, shape, mean, invstd, w_at, b_at, everything
                ),
            ),
        }
    inner = x[0, 0].size
    if norm == "group":
        groups = GROUPS if channels % GROUPS == 0 else 1
        mine = nbbn.group_norm_forward(x, groups, weight, bias)
        _, mean, invstd = aten.native_group_norm(at, w_at, b_at, n, channels, inner, groups, EPS)
        found = {"mean": mine.mean, "invstd": mine.invstd}
        return {
            "forward": (
                lambda: nbbn.group_norm(x, groups, weight, bias),
                lambda: aten.native_group_norm(at, w_at, b_at, n, channels, inner, groups, EPS),
            ),
            "backward": (
                lambda: nbbn.group_norm_backward(grad_out, x, groups, weight, **found),
                lambda: aten.native_group_norm_backward(
                    dy_at, at, mean, invstd, w_at, n, channels, inner, groups, everything
                ),
            ),
        }
    # As torch.nn.functional.instance_norm does it: a batch norm of N · C channels.
    joined = (1, n * channels, *x.shape[2:])
    mine = nbbn.instance_norm_forward(x, weight, bias)
    found = {"mean": mine.mean, "invstd": mine.invstd}
    of_all = w_at.repeat(n)
    _, mean, invstd = aten.native_batch_norm(at.view(joined), of_all, None, None, None, True, 0.0, EPS)

    def backward() -> Any:
        grad_x, grad_weight, grad_bias = aten.native_batch_norm_backward(
            dy_at.view(joined),
            at.view(joined),
            w_at.repeat(n),
            None,
            None,
            mean,
            invstd,
            True,
            EPS,
            everything,
        )
        return grad_x, grad_weight.view(n, -1).sum(0), grad_bias.view(n, -1).sum(0)

    return {
        "forward": (
            lambda: nbbn.instance_norm(x, weight=weight, bias=bias),
            lambda: torch.nn.functional.instance_norm(at, weight=w_at, bias=b_at),
        ),
        "backward": (lambda: nbbn.instance_norm_backward(grad_out, x, weight, **found), backward),
    }


def main(
    rounds: Annotated[int, typer.Option(help="How often each is called.")] = 21,
    short: Annotated[bool, typer.Option("--short", help="Of few values that go together.")] = False,
    to: Annotated[pathlib.Path | None, typer.Option("--json", help="Write the figures there too.")] = None,
) -> None:
    """Measure the other normalizations."""
    torch.set_num_threads(pool.threads())
    rows = []
    print("| norm | shape | operation | nbbn, ms | nbbn / limit | PyTorch / nbbn |")
    print("|---|---|---|---:|---:|---:|")
    for norm, shape in itertools.product(("layer", "group", "instance"), SHORT if short else SHAPES):
        if norm != "layer" and len(shape) == 2:
            continue  # one value in each channel of a sample
        x, grad_out, out = (aligned(shape) for _ in range(3))
        for array in (x, grad_out):
            array[...] = np.random.default_rng(0).standard_normal(shape, np.float32)
        for operation, (mine, theirs) in calls(norm, x, grad_out).items():
            ways = limits("copy" if operation == "forward" else "triad", x, grad_out, out)
            ours, peers, *found = medians([mine, theirs, *ways.values()], rounds)
            limit = min(found)
            row = {"norm": norm, "shape": shape, "operation": operation, "nbbn": ours, "torch": peers}
            rows.append(row | {"limit": limit})
            text = " × ".join(map(str, shape))
            numbers = f"{ours * 1e3:.2f} | {ours / limit:.2f} | {peers / ours:.2f}"
            print(f"| {norm} | {text} | {operation} | {numbers} |", flush=True)
    print()
    for norm, operation in itertools.product(("layer", "group", "instance"), ("forward", "backward")):
        ratios = [r["torch"] / r["nbbn"] for r in rows if (r["norm"], r["operation"]) == (norm, operation)]
        print(f"{norm} {operation}: {geometric_mean(ratios):.2f} x PyTorch, geometric mean")
    if to is not None:
        to.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
