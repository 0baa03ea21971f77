"""The network: (convolution → batch norm → rectifier) twice, then a dense layer."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import nbbn
from nbbn.demo.layers import Array, Convolution, Dense, Layer, Rectifier

CHANNELS = (16, 32)
"""How many channels the first and the second convolution give."""

KERNEL = 3
IMAGE = 8
CLASSES = 10


class Weights(NamedTuple):
    """What a network starts from, with batch norm or without.

    Attributes
    ----------
    convolution1, convolution2 : array of float32, shape (channels out, channels in, 3, 3)
    dense : array of float32, shape (10, channels · 8 · 8)
    """

    convolution1: Array
    convolution2: Array
    dense: Array


def random_weights(seed: int) -> Weights:
    """Draw weights from a normal distribution of variance 2 / inputs.

    This is He's rule: with it, a network of rectifiers learns well without batch norm too.
    """
    random = np.random.default_rng(seed)

    def draw(outputs: int, *inputs: int) -> Array:
        deviation = np.sqrt(2 / np.prod(inputs))
        return random.normal(0, deviation, (outputs, *inputs)).astype(np.float32)

    first, second = CHANNELS
    return Weights(
        convolution1=draw(first, 1, KERNEL, KERNEL),
        convolution2=draw(second, first, KERNEL, KERNEL),
        dense=draw(CLASSES, second * IMAGE * IMAGE),
    )


class Network:
    """A small network for 8×8 images of digits.

    Parameters
    ----------
    weights : Weights
        Copied, so that two networks can start from the same.
    batch_norm : bool
        Whether batch norm follows each convolution. If not, the convolution has a bias in its place.

    Attributes
    ----------
    layers : dict of str to Layer
        In the order in which they run.
    """

    def __init__(self, weights: Weights, *, batch_norm: bool) -> None:
        self.layers: dict[str, Layer] = {}
        for i, weight in enumerate((weights.convolution1, weights.convolution2), start=1):
            channels = len(weight)
            bias = None if batch_norm else np.zeros(channels, np.float32)
            self.layers[f"convolution{i}"] = Convolution(weight.copy(), bias)
            if batch_norm:
                self.layers[f"norm{i}"] = nbbn.BatchNorm(channels)
            self.layers[f"rectifier{i}"] = Rectifier()
        self.layers["dense"] = Dense(weights.dense.copy(), np.zeros(CLASSES, np.float32))

    def __call__(self, images: Array) -> Array:
        """Return a score for each digit: shape (n, 10) for images of shape (n, 1, 8, 8)."""
        out = images
        for layer in self.layers.values():
            out = layer(out)
        return out

    def backward(self, grad_scores: Array) -> None:
        """Leave in every layer the gradients by its weight and its bias."""
        grad = grad_scores
        for layer in reversed(self.layers.values()):
            grad = layer.backward(grad)

    @property
    def norms(self) -> dict[str, nbbn.BatchNorm]:
        """The batch norm layers, by name; none in a network without."""
        return {name: layer for name, layer in self.layers.items() if isinstance(layer, nbbn.BatchNorm)}

    def train(self) -> None:
        """Normalize by each batch's own statistics from now on, and track them."""
        for norm in self.norms.values():
            norm.train()

    def eval(self) -> None:
        """Normalize by the tracked statistics from now on: an image's scores depend on that image alone."""
        for norm in self.norms.values():
            norm.eval()


def save_norms(network: Network, path: Path) -> None:
    """Write the state of all batch norm layers to a .npz file, under names such as norm1.running_mean."""
    state: dict[str, Any] = {
        f"{name}.{key}": value
        for name, norm in network.norms.items()
        for key, value in norm.state_dict().items()
    }
    np.savez(path, **state)


def load_norms(network: Network, path: Path) -> None:
    """Read what `save_norms` wrote into the batch norm layers of the same names."""
    with np.load(path) as file:
        for name, norm in network.norms.items():
            keys = [key for key in file if key.startswith(f"{name}.")]
            norm.load_state_dict({key.removeprefix(f"{name}."): file[key] for key in keys})


def with_new_norms(network: Network) -> Network:
    """Return a network of the same other layers, with batch norm as it is before training."""
    copied = copy.copy(network)
    copied.layers = {
        name: nbbn.BatchNorm(layer.num_features) if isinstance(layer, nbbn.BatchNorm) else layer
        for name, layer in network.layers.items()
    }
    return copied
