"""A report as a picture: how near each path comes to the machine's limit, and how time grows with size."""

import math
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nbbn.bench.contenders import Group
from nbbn.bench.model import models, sweeps
from nbbn.bench.record import Record, Row, rows
from nbbn.bench.shapes import Shape, written
from nbbn.bench.tables import asked, heading, peers

# Okabe and Ito's colours, which people with any kind of colour blindness tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#999999")
WIDEST = 30  # shapes of a panel


def draw(record: Record, path: Path) -> None:
    """Draw a report to a file; its name says whether as PNG or as SVG."""
    picture(record).savefig(path, dpi=150)


def picture(record: Record) -> Figure:
    """Return a report as a figure: a panel for each table, and one for each sweep."""
    found = rows(record.report)
    swept = {id(row) for same in sweeps(found).values() for row in same}
    bars = [row for row in found if id(row) not in swept]
    panels = [(title, list(some)) for title, some in groupby(bars, heading)]
    panels = [(title, some[k : k + WIDEST]) for title, some in panels for k in range(0, len(some), WIDEST)]
    lines = len({heading(row) for same in sweeps(found).values() for row in same})
    count = len(panels) + lines
    figure = Figure(figsize=(11, 1.2 + 3.3 * max(1, count)), layout="constrained")
    told = record.machine
    figure.suptitle(f"{asked(record)}\n{told.get('processor', '')}, {told.get('date', '')}", fontsize=10)
    every = np.atleast_1d(figure.subplots(max(1, count), 1)).tolist()
    for axes, (title, some) in zip(every, panels, strict=False):
        _bars(axes, title, some)
    for axes, title in zip(
        every[len(panels) :],
        dict.fromkeys(heading(row) for same in sweeps(found).values() for row in same),
        strict=False,
    ):
        _lines(axes, title, found)
    if not count:
        every[0].text(0.5, 0.5, "nothing was measured", ha="center")
    return figure


def _bars(axes: Axes, title: str, some: list[Row]) -> None:
    """Draw percent of the limit, by shape, for each path and each peer."""
    shapes = list(dict.fromkeys(row.case.shape for row in some))
    groups = list(dict.fromkeys(row.group for row in some))
    names = ["nbbn", *peers(some)]
    bars: dict[tuple[str, Group], dict[Shape, float]] = {}
    for name in names:
        for group in groups:
            heights = {
                row.case.shape: row.percent / (1.0 if name == "nbbn" else row.ratio(name) or math.inf)
                for row in some
                if row.group == group and row.percent is not None
            }
            if any(heights.values()):
                bars[name, group] = heights
    width = 0.85 / max(1, len(bars))
    for k, ((name, group), heights) in enumerate(bars.items()):
        at = np.arange(len(shapes)) + (k - (len(bars) - 1) / 2) * width
        values = [heights.get(shape, 0.0) for shape in shapes]
        strength = 1.0 if len(groups) == 1 else 0.45 + 0.55 * groups.index(group) / (len(groups) - 1)
        drawn = axes.bar(
            at,
            values,
            width,
            label=f"{name}, {group.text}",
            color=COLOURS[names.index(name) % len(COLOURS)],
            alpha=strength,
        )
        if name == "nbbn" and len(shapes) * len(bars) <= 120:
            axes.bar_label(drawn, [f"{value:.0f}" for value in values], fontsize=6)
    axes.axhline(100, color="black", linewidth=0.8, linestyle="--")
    axes.set_xticks(
        range(len(shapes)), [written(shape) for shape in shapes], rotation=30, ha="right", fontsize=8
    )
    axes.set_ylabel("% of the limit")
    axes.set_title(title, loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _tidy(axes)


def _lines(axes: Axes, title: str, found: list[Row]) -> None:
    """Draw time against bytes, measured and as the model has it."""
    fitted = {(model.what, model.group): model for model in models(found)}
    own = {key: same for key, same in sweeps(found).items() if heading(same[0]) == title}
    for k, (key, same) in enumerate(own.items()):
        nbytes = np.array([row.case.nbytes for row in same])
        colour = COLOURS[k % len(COLOURS)]
        label = f"{written(same[0].case.shape[1:])}, {key[1].text}"
        axes.plot(nbytes / 1e6, [1e3 * row.own.spread.median for row in same], "o", color=colour, label=label)
        model = fitted[key]
        axes.plot(nbytes / 1e6, [1e3 * model.seconds(n) for n in nbytes], "--", color=colour, linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("MB that must move")
    axes.set_ylabel("ms")
    axes.set_title(f"{title}: dots measured, lines bytes / bandwidth + call cost", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3, linewidth=0.6)
    axes.set_axisbelow(True)
