"""The two pictures: how fast each network learns, and what the rectifier of each gets to see."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nbbn.demo.settings import Settings
from nbbn.demo.train import PERCENTILES, History

# Two of Okabe and Ito's colours, which people with any kind of colour blindness tell apart. The line
# styles differ as well, for print in grey.
BLUE = "#0072B2"
VERMILION = "#D55E00"
STYLES = {
    "without batch norm": {"color": VERMILION, "linestyle": "--"},
    "with batch norm": {"color": BLUE, "linestyle": "-"},
}


def plot_accuracy(histories: dict[str, History], settings: Settings, path: Path) -> None:
    """Draw test accuracy against training steps.

    Parameters
    ----------
    histories : dict of str to History
        By a name in `STYLES`.
    settings : Settings
        How they were trained, for the title.
    path : Path
        The PNG to write.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(f"Handwritten digits: the same first weights, learning rate {settings.learning_rate:g}")
    whole, top = figure.subplots(1, 2)
    for axes in (whole, top):
        for name, history in histories.items():
            percent = 100 * np.array(history.accuracy)
            axes.plot(history.steps, percent, label=name, linewidth=1.8, **STYLES[name])
        axes.set_xlabel(f"training steps ({settings.batch_size} images each)")
        axes.set_ylabel("test images recognized (%)")
        axes.set_xlim(0, settings.steps)
        tidy(axes)
    whole.set_title("0 % to 100 %")
    whole.set_ylim(0, 100)
    whole.legend(loc="center right", frameon=False)
    top.set_title("90 % to 100 %")
    top.set_ylim(90, 100)
    figure.savefig(path, dpi=150)


def plot_inputs(histories: dict[str, History], channel: int, path: Path) -> None:
    """Draw the percentiles of one channel's inputs to the last rectifier, as the paper's figure 1 (b, c).

    Parameters
    ----------
    histories : dict of str to History
        By a name in `STYLES`.
    channel : int
        Which channel.
    path : Path
        The PNG to write.
    """
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    figure.suptitle(f"Inputs of the last rectifier during training, channel {channel}")
    panels = figure.subplots(1, len(histories), sharey=True)
    for axes, (name, history) in zip(panels, histories.items(), strict=True):
        low, middle, high = np.array(history.percentiles)[:, :, channel].T
        color = STYLES[name]["color"]
        axes.fill_between(history.steps, low, high, color=color, alpha=0.15, linewidth=0)
        for values, percentile in zip((low, middle, high), PERCENTILES, strict=True):
            axes.plot(history.steps, values, color=color, linewidth=1.8 if percentile == 50 else 1)
            axes.annotate(
                f"{percentile}th",
                (history.steps[-1], values[-1]),
                xytext=(4, 0),
                textcoords="offset points",
                verticalalignment="center",
                color=color,
            )
        axes.set_title(name)
        axes.set_xlim(0, history.steps[-1])
        axes.set_xlabel("training steps")
        axes.set_ylabel("input: 15th, 50th, 85th percentile")
        axes.tick_params(labelleft=True)
        tidy(axes)
    figure.savefig(path, dpi=150)


def tidy(axes: Axes) -> None:
    """Leave out the lines that say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.6)
