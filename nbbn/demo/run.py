"""The demo from its first line to its last: train twice, compare, draw, save, load and check."""

from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from nbbn.demo.data import Digits, load_digits
from nbbn.demo.network import Network, load_norms, random_weights, save_norms, with_new_norms
from nbbn.demo.plots import plot_accuracy, plot_inputs
from nbbn.demo.settings import Settings
from nbbn.demo.train import History, accuracy, scores, train, typical_channel

WITHOUT = "without batch norm"
WITH = "with batch norm"

ACCURACY_PNG = "nbbn-demo-accuracy.png"
INPUTS_PNG = "nbbn-demo-inputs.png"
STATE_NPZ = "nbbn-demo-batch-norm.npz"

GOAL = 0.95
"""The test accuracy whose first record is looked up."""


def run(settings: Settings, output: Path, console: Console, *, progress: bool = True) -> bool:
    """Train with and without batch norm, print a table and write two pictures and a state.

    Parameters
    ----------
    settings : Settings
    output : Path
        An existing directory for the files.
    console : rich.console.Console
        Where to print.
    progress : bool
        Whether to show progress bars.

    Returns
    -------
    bool
        Whether the saved batch norm, loaded again, gave the same scores for every test image.
    """
    digits = load_digits(settings.seed)
    console.print(
        f"{len(digits.train_images)} images of handwritten digits to learn from, "
        f"{len(digits.test_images)} to test on.",
        highlight=False,
    )
    networks = build(settings)
    histories = train_all(networks, digits, settings, console, progress)
    console.print(comparison(histories, settings))
    plot_accuracy(histories, settings, output / ACCURACY_PNG)
    plot_inputs(histories, typical_channel(histories[WITHOUT]), output / INPUTS_PNG)
    same = reload_and_compare(networks[WITH], digits, output / STATE_NPZ, console)
    for name in (ACCURACY_PNG, INPUTS_PNG, STATE_NPZ):
        console.print(f"Wrote {output / name}", highlight=False, soft_wrap=True)
    return same


def build(settings: Settings) -> dict[str, Network]:
    """Return the two networks, with the same weights."""
    weights = random_weights(settings.seed)
    return {WITHOUT: Network(weights, batch_norm=False), WITH: Network(weights, batch_norm=True)}


def train_all(
    networks: dict[str, Network], digits: Digits, settings: Settings, console: Console, progress: bool
) -> dict[str, History]:
    """Train one network after the other, on the same mini-batches, each with a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    histories = {}
    with Progress(*columns, console=console, disable=not progress) as bars:
        for name, network in networks.items():
            bar = bars.add_task(f"{name:18}", total=settings.steps)
            histories[name] = train(network, digits, settings, on_step=partial(bars.advance, bar))
    return histories


def comparison(histories: dict[str, History], settings: Settings) -> Table:
    """Return the table of results."""
    table = Table(title=f"{settings.steps} steps at learning rate {settings.learning_rate:g}")
    table.add_column("network")
    table.add_column("test accuracy", justify="right")
    table.add_column(f"first at {GOAL:.0%}", justify="right")
    for name, history in histories.items():
        step = history.steps_to(GOAL)
        table.add_row(name, f"{history.accuracy[-1]:.1%}", "never" if step is None else f"step {step}")
    return table


def reload_and_compare(network: Network, digits: Digits, path: Path, console: Console) -> bool:
    """Save the trained batch norm, load it into new objects, and say whether every score is the same.

    The new objects are tried before loading too: were they as good, the comparison would prove nothing.
    """
    save_norms(network, path)
    loaded = with_new_norms(network)
    table = Table(title="Saved and loaded again")
    table.add_column("batch norm")
    table.add_column("test accuracy", justify="right")
    table.add_row("as trained", f"{accuracy(network, digits):.1%}")
    table.add_row("new", f"{accuracy(loaded, digits):.1%}")
    load_norms(loaded, path)
    table.add_row("new, state loaded", f"{accuracy(loaded, digits):.1%}")
    console.print(table)
    same = np.array_equal(
        scores(loaded, digits.test_images), scores(network, digits.test_images), equal_nan=True
    )
    console.print("Every score is the same, bit for bit." if same else "The scores differ: a bug in nbbn.")
    return same
