"""Gradient descent, and what is recorded on the way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from nbbn.demo.data import Digits, batches
from nbbn.demo.layers import Array, Rectifier, softmax_cross_entropy
from nbbn.demo.network import Network
from nbbn.demo.settings import Settings

PERCENTILES = (15, 50, 85)
"""Those of figure 1 (b, c) of Ioffe & Szegedy."""


@dataclass
class History:
    """What was seen during training, one entry a record.

    Attributes
    ----------
    steps : list of int
        How many steps had been done.
    accuracy : list of float
        The part of the test images that were recognized, 0 to 1.
    percentiles : list of array, shape (3, channels)
        The 15th, 50th and 85th percentile of the inputs of the last rectifier, each channel's over the
        images and positions of the step's mini-batch.
    """

    steps: list[int] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    percentiles: list[Array] = field(default_factory=list)

    def steps_to(self, accuracy: float) -> int | None:
        """Return the first recorded step with at least this test accuracy, or None."""
        reached = (step for step, seen in zip(self.steps, self.accuracy, strict=True) if seen >= accuracy)
        return next(reached, None)


def train(network: Network, digits: Digits, settings: Settings, on_step: Callable[[], None]) -> History:
    """Train a network in place by stochastic gradient descent, without momentum or decay.

    Parameters
    ----------
    network : Network
    digits : Digits
    settings : Settings
    on_step : callable
        Called after every step.

    Returns
    -------
    History
    """
    history = History()
    stream = batches(digits, settings.batch_size, settings.seed)
    # At a high learning rate a network may diverge: that is a result to record, not an error.
    with np.errstate(over="ignore", invalid="ignore"):
        for step in range(1, settings.steps + 1):
            images, labels = next(stream)
            _, grad_scores = softmax_cross_entropy(network(images), labels)
            network.backward(grad_scores)
            for values, gradient in parameters(network):
                values -= settings.learning_rate * gradient
            if settings.records(step):
                history.steps.append(step)
                # Before the accuracy, while the mini-batch is what the rectifier saw last.
                history.percentiles.append(input_percentiles(network))
                history.accuracy.append(accuracy(network, digits))
            on_step()
    return history


def parameters(network: Network) -> Iterator[tuple[Array, Array]]:
    """Yield each weight and each bias of a network with the gradient by it."""
    for layer in network.layers.values():
        for name in ("weight", "bias"):
            values = getattr(layer, name, None)
            if values is not None:
                yield values, getattr(layer, f"grad_{name}")


def input_percentiles(network: Network) -> Array:
    """Return the percentiles of the latest inputs of the last rectifier: shape (3, channels)."""
    last = [layer for layer in network.layers.values() if isinstance(layer, Rectifier)][-1]
    return np.asarray(np.percentile(last.x, PERCENTILES, axis=(0, 2, 3)))


def scores(network: Network, images: Array) -> Array:
    """Return the scores of images in evaluation mode, and leave the network in training mode."""
    network.eval()
    out = network(images)
    network.train()
    return out


def accuracy(network: Network, digits: Digits) -> float:
    """Return the part of the test images that a network recognizes, 0 to 1."""
    recognized = scores(network, digits.test_images).argmax(axis=1) == digits.test_labels
    return float(recognized.mean())


def typical_channel(history: History) -> int:
    """Return the channel whose inputs moved neither much nor little.

    Channels are ranked by how far their median travelled, from its lowest record to its highest; the one
    in the middle is returned.
    """
    medians = np.array([percentiles[1] for percentiles in history.percentiles])
    travel = medians.max(axis=0) - medians.min(axis=0)
    return int(np.argsort(travel)[travel.size // 2])
