"""The images: scikit-learn's handwritten digits."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn import datasets

from nbbn.demo.layers import Array

TEST_IMAGES = 500
"""Of 1797. One image more or less is 0.2 % of the test accuracy."""

Labels = NDArray[np.int64]


class Digits(NamedTuple):
    """Images and what they show, in two parts that share no image.

    Attributes
    ----------
    train_images, test_images : array of float32, shape (n, 1, 8, 8)
        Grey levels from 0 (paper) to 1 (ink).
    train_labels, test_labels : array of int64, shape (n,)
        The digit, 0 to 9.
    """

    train_images: Array
    train_labels: Labels
    test_images: Array
    test_labels: Labels


def load_digits(seed: int) -> Digits:
    """Return the 1797 digits that scikit-learn ships, split at random.

    Parameters
    ----------
    seed : int
        Decides which images are held back for the test.
    """
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(seed).permutation(len(images))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])


def batches(digits: Digits, size: int, seed: int) -> Iterator[tuple[Array, Labels]]:
    """Yield mini-batches of the training images for ever, in a new random order each time round.

    The same seed gives the same mini-batches. Images left over at the end of a round, fewer than
    `size`, wait for a later one.
    """
    random = np.random.default_rng(seed)
    while True:
        order = random.permutation(len(digits.train_images))
        for start in range(0, len(order) - size + 1, size):
            chosen = order[start : start + size]
            yield digits.train_images[chosen], digits.train_labels[chosen]
