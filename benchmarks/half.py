"""What 16 bits save: each call in float16 and in bfloat16 over the same call in float32.

    python benchmarks/half.py

prints the ratios as a table, of medians of interleaved calls, on the threads that nbbn uses: of the layers of
ResNet-50 whose arrays have 50 MB or more in float32, or of all of them (`--all`).
"""

import itertools
import json
import math
import pathlib
from collections.abc import Callable
from functools import partial
from statistics import geometric_mean
from typing import Annotated, Any

import typer
from fused import medians

import nbbn
from nbbn.bench.cases import LAYOUTS, Data
from nbbn.bench.shapes import SHAPES

LARGE = 50e6  # bytes in float32


def operations(data: Data) -> dict[str, Callable[[], Any]]:
    """Return the calls that are timed."""
    x, columns, given = data.x, (data.weight, data.bias), {"axis": data.axis, "out": data.out}
    found = nbbn.batch_norm_forward(x, *columns, **given)
    used = {"mean": found.mean, "invstd": found.invstd}
    return {
        "forward": partial(nbbn.batch_norm_forward, x, *columns, **given),
        "evaluation": partial(nbbn.batch_norm, x, found.mean, found.var, *columns, **given),
        "backward": partial(nbbn.batch_norm_backward, data.grad_out, x, data.weight, **used, **given),
    }


def main(
    rounds: Annotated[int, typer.Option(help="How often each is called.")] = 15,
    every: Annotated[bool, typer.Option("--all", help="Take the small layers, too.")] = False,
    to: Annotated[pathlib.Path | None, typer.Option("--json", help="Write the figures there too.")] = None,
) -> None:
    """Measure what 16 bits save."""
    rows: list[dict[str, Any]] = []
    print("| shape | layout | operation | float32, ms | float16 | bfloat16 |\n|---|---|---|---:|---:|---:|")
    shapes = [shape for shape in SHAPES["resnet50"] if every or 4 * math.prod(shape) >= LARGE]
    for layout, shape in itertools.product(LAYOUTS, shapes):
        calls = [operations(Data(shape, layout, dtype, 0)) for dtype in ("float32", "float16", "bfloat16")]
        for name in calls[0]:
            plain, *others = medians([call[name] for call in calls], rounds)
            ratios = [took / plain for took in others]
            rows.append(
                {"shape": shape, "layout": layout, "operation": name, "float32": plain, "ratios": ratios}
            )
            figures = f"{plain * 1e3:.3f} | {ratios[0]:.2f} | {ratios[1]:.2f}"
            print(f"| {' × '.join(map(str, shape))} | {layout} | {name} | {figures} |")
    for layout, name in itertools.product(LAYOUTS, calls[0]):
        its = [row["ratios"] for row in rows if (row["layout"], row["operation"]) == (layout, name)]
        means = [geometric_mean(column) for column in zip(*its, strict=True)]
        print(f"{layout}, {name}: float16 {means[0]:.2f}, bfloat16 {means[1]:.2f} of float32, geometric mean")
    if to is not None:
        to.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
