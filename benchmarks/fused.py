"""What an activation, a residual and a mask cost in the same pass: each call over the same call without.

    python benchmarks/fused.py

prints the ratios as a table, of medians of interleaved calls, on the threads that nbbn uses.
"""

import itertools
import json
import pathlib
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer

import nbbn

SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (8, 3, 512, 512), (64, 128, 200), (3136, 256)]
LAYOUTS = ("channels first", "channels last")
ACTIVATIONS = ("relu", "leaky_relu", "silu", "gelu", "gelu_tanh")


def medians(calls: list[Callable[[], Any]], rounds: int) -> list[float]:
    """Return the median time of each call, in seconds; they take turns."""
    for call in calls:
        call()  # compiles
    times: list[list[float]] = [[] for _ in calls]
    for _, (call, its) in itertools.product(range(rounds), zip(calls, times, strict=True)):
        start = time.perf_counter()
        call()
        its.append(time.perf_counter() - start)
    return [median(its) for its in times]


def measured(shape: tuple[int, ...], layout: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each operation: the time of the plain call, and what the others take of it."""
    rng = np.random.default_rng(0)
    x, grad_out, residual = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    if layout == "channels last":
        arrays = (np.ascontiguousarray(np.moveaxis(a, 1, -1)) for a in (x, grad_out, residual))
        x, grad_out, residual = (np.moveaxis(a, -1, 1) for a in arrays)
    out = np.empty_like(x)
    channels = shape[1]
    weight, bias = rng.normal(size=(2, channels)).astype(np.float32)
    forward = nbbn.batch_norm_forward(x, weight, bias)
    found = {"mean": forward.mean, "invstd": forward.invstd}
    cases: dict[str, dict[str, Any]] = {"plain": {}}
    cases |= {name: {"activation": name} for name in ACTIVATIONS}
    cases["relu, residual"] = {"activation": "relu", "residual": residual}
    cases["mask"] = {"mask": rng.random((shape[0], *shape[2:])) < 0.7}
    operations: dict[str, Callable[[dict[str, Any]], Any]] = {
        "forward": lambda given: nbbn.batch_norm_forward(x, weight, bias, out=out, **given),
        "evaluation": lambda given: nbbn.batch_norm(
            x, forward.mean, forward.var, weight, bias, out=out, **given
        ),
        "backward": lambda given: nbbn.batch_norm_backward(
            grad_out, x, weight, bias=bias, out=out, **found, **given
        ),
    }
    rows = []
    for name, operation in operations.items():
        times = medians([partial(operation, given) for given in cases.values()], rounds)
        ratios = {case: took / times[0] for case, took in zip(cases, times, strict=True)}
        del ratios["plain"]
        rows.append(
            {"shape": shape, "layout": layout, "operation": name, "plain": times[0], "ratios": ratios}
        )
    return rows


def main(
    rounds: Annotated[int, typer.Option(help="How often each is called.")] = 31,
    to: Annotated[pathlib.Path | None, typer.Option("--json", help="Write the figures there too.")] = None,
) -> None:
    """Measure what goes along with batch norm."""
    rows = []
    for shape, layout in itertools.product(SHAPES, LAYOUTS):
        if len(shape) == 2 and layout == LAYOUTS[1]:
            continue  # the same
        for row in measured(shape, layout, rounds):
            if not rows:
                names = " | ".join(row["ratios"])
                print(f"| shape | layout | operation | plain, ms | {names} |")
                print("|---|---|---|" + "---:|" * (1 + len(row["ratios"])))
            rows.append(row)
            ratios = " | ".join(f"{ratio:.2f}" for ratio in row["ratios"].values())
            shape_text = " × ".join(map(str, shape))
            print(f"| {shape_text} | {layout} | {row['operation']} | {row['plain'] * 1e3:.3f} | {ratios} |")
    if to is not None:
        to.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
