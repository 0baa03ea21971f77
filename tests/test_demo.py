"""The demo: its layers against finite differences, its fairness, and what it saves."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from rich.console import Console

import nbbn
from nbbn.demo import run as demo
from nbbn.demo.data import TEST_IMAGES, batches, load_digits
from nbbn.demo.layers import Convolution, Dense, Rectifier, softmax_cross_entropy
from nbbn.demo.network import Network, load_norms, random_weights, save_norms, with_new_norms
from nbbn.demo.settings import Settings
from nbbn.demo.train import History, accuracy, input_percentiles, parameters, scores, train, typical_channel

SHORT = Settings(steps=12, batch_size=32)


@pytest.fixture(scope="module")
def digits():
    return load_digits(seed=0)


def numerical_gradient(function, array, step):
    """Return the gradient of a number by each element of an array, by central differences."""
    gradient = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        array[index] = kept + step
        above = function()
        array[index] = kept - step
        below = function()
        array[index] = kept
        gradient[index] = (above - below) / (2 * step)
    return gradient


def assert_gradients_match(layer, x, rng, step):
    """Compare `backward` with the differences of Σ out · cotangent, by x and by every parameter."""
    cotangent = rng.normal(size=layer(x).shape)

    def weighted_sum():
        return float((layer(x) * cotangent).sum())

    layer(x)
    grad_x = layer.backward(cotangent)
    # Without truncation error what is left is rounding: at most about 1e4 terms of size 10 in the sum, so
    # 1e-16 · 1e5 of it, divided by the step of at least 1e-2.
    tolerance = {"rtol": 0, "atol": 1e-9}
    np.testing.assert_allclose(grad_x, numerical_gradient(weighted_sum, x, step), **tolerance)
    for name in ("weight", "bias"):
        values = getattr(layer, name, None)
        if values is not None:
            expected = numerical_gradient(weighted_sum, values, step)
            np.testing.assert_allclose(getattr(layer, f"grad_{name}"), expected, **tolerance, err_msg=name)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 1, 1), (3, 2, 2, 6)])
def test_gradients_of_the_convolution(rng, shape, size):
    weight = rng.normal(size=(4, shape[1], size, size))
    # The sum is linear in each number by itself: a large step has no truncation error.
    assert_gradients_match(Convolution(weight, rng.normal(size=4)), rng.normal(size=shape), rng, step=1)


def test_convolution_follows_the_definition(rng):
    x, weight, bias = rng.normal(size=(2, 3, 5, 4)), rng.normal(size=(4, 3, 3, 3)), rng.normal(size=4)
    out = Convolution(weight, bias)(x)
    padded = np.zeros((2, 3, 7, 6))
    padded[:, :, 1:-1, 1:-1] = x
    for n, o, row, column in np.ndindex(2, 4, 5, 4):
        expected = (padded[n, :, row : row + 3, column : column + 3] * weight[o]).sum() + bias[o]
        assert out[n, o, row, column] == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_gradients_of_the_dense_layer(rng):
    layer = Dense(rng.normal(size=(4, 12)), rng.normal(size=4))
    assert_gradients_match(layer, rng.normal(size=(5, 3, 2, 2)), rng, step=1)


def test_gradients_of_the_rectifier(rng):
    x = rng.normal(size=(3, 2, 4, 4))
    x[np.abs(x) < 0.02] = 1  # no difference across the kink
    assert_gradients_match(Rectifier(), x, rng, step=0.01)


def test_gradient_of_the_loss(rng):
    outputs, labels = rng.normal(size=(6, 10)), rng.integers(0, 10, 6)
    _, gradient = softmax_cross_entropy(outputs, labels)
    expected = numerical_gradient(lambda: softmax_cross_entropy(outputs, labels)[0], outputs, step=1e-5)
    # The loss is a few units: the differences round at 1e-15 / 1e-5 and are cut off at (1e-5)².
    np.testing.assert_allclose(gradient, expected, atol=1e-9)


def test_loss_of_large_scores_is_finite():
    loss, gradient = softmax_cross_entropy(np.array([[1e4, 0.0]]), np.array([1]))
    assert loss == 1e4
    np.testing.assert_array_equal(gradient, [[1, -1]])


def test_gradient_of_the_whole_network(rng):
    """Batch norm among the layers: the loss falls as the gradient says, by every parameter at once."""
    weights = random_weights(seed=3)
    network = Network(type(weights)(*(w.astype(np.float64) for w in weights)), batch_norm=True)
    for name in network.norms:
        network.layers[name] = nbbn.BatchNorm(network.norms[name].num_features, dtype="float64")
    images, labels = rng.random((6, 1, 8, 8)), rng.integers(0, 10, 6)
    _, gradient = softmax_cross_entropy(network(images), labels)
    network.backward(gradient)
    pairs = [(values, gradient.copy()) for values, gradient in parameters(network)]
    assert len(pairs) == 8  # two convolutions without bias, two norms and a dense layer with
    step = 1e-7
    losses = []
    for sign in (1, -1):
        for values, gradient in pairs:
            values += sign * step * gradient
        losses.append(softmax_cross_entropy(network(images), labels)[0])
        for values, gradient in pairs:
            values -= sign * step * gradient
    slope = (losses[0] - losses[1]) / (2 * step)
    # A loss of about 2 rounds at 4e-16 / 1e-7, relative to a slope of about 10; few rectifiers change sign.
    assert slope == pytest.approx(sum((gradient**2).sum() for _, gradient in pairs), rel=1e-5)


def test_digits_are_split_without_overlap(digits):
    assert len(digits.test_images) == TEST_IMAGES
    assert len(digits.train_images) + TEST_IMAGES == 1797
    assert digits.train_images.dtype == np.float32
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1
    assert set(digits.train_labels) == set(digits.test_labels) == set(range(10))
    train_bytes = {image.tobytes() for image in digits.train_images}
    assert not any(image.tobytes() in train_bytes for image in digits.test_images)


def test_a_round_of_batches_shows_every_image_once(digits):
    stream = batches(digits, 64, seed=0)
    seen = np.concatenate([next(stream)[0] for _ in range(len(digits.train_images) // 64)])
    assert len({image.tobytes() for image in seen}) == len(seen)


def test_both_networks_start_from_the_same_weights():
    plain, normed = demo.build(SHORT).values()
    for name in ("convolution1", "convolution2", "dense"):
        first, second = plain.layers[name].weight, normed.layers[name].weight
        np.testing.assert_array_equal(first, second)
        assert not np.shares_memory(first, second)
    assert list(normed.norms) == ["norm1", "norm2"]
    assert not plain.norms
    # The biases that only one of them has start where they do nothing.
    assert not plain.layers["convolution1"].bias.any()
    assert not normed.norms["norm1"].bias.any()


def test_training_is_reproducible(digits):
    histories = []
    for _ in range(2):
        network = Network(random_weights(0), batch_norm=True)
        histories.append(train(network, digits, SHORT, on_step=lambda: None))
    assert histories[0].accuracy == histories[1].accuracy
    np.testing.assert_array_equal(histories[0].percentiles, histories[1].percentiles)


def test_training_learns_and_records(digits):
    steps = []
    history = train(
        Network(random_weights(0), batch_norm=True), digits, SHORT, on_step=lambda: steps.append(None)
    )
    assert len(steps) == SHORT.steps
    assert history.steps == [1, 5, 10, 12]
    assert len(history.accuracy) == len(history.percentiles) == 4
    # Ten classes: guessing gets a tenth. Twelve steps of this seed get far more.
    assert history.accuracy[-1] > 0.7
    assert history.steps_to(history.accuracy[-1]) in history.steps
    assert history.steps_to(1.1) is None


def test_percentiles_are_of_the_last_rectifier(digits):
    network = Network(random_weights(0), batch_norm=True)
    network(digits.train_images[:64])
    x = network.layers["rectifier2"].x
    actual = input_percentiles(network)
    assert actual.shape == (3, x.shape[1])
    for channel in (0, 17):
        expected = np.percentile(x[:, channel], (15, 50, 85))
        np.testing.assert_allclose(actual[:, channel], expected, rtol=1e-6, atol=1e-6)  # float32 data


def test_typical_channel_is_the_middle_one():
    history = History(percentiles=[np.zeros((3, 5)), np.array([[0.0] * 5, [4, 1, 9, 2, 7], [0.0] * 5])])
    assert typical_channel(history) == 0


def test_diverging_is_a_result_and_no_error(digits):
    network = Network(random_weights(0), batch_norm=False)
    history = train(network, digits, Settings(steps=12, learning_rate=1e3), on_step=lambda: None)
    assert history.accuracy[-1] < 0.3


def test_saved_batch_norm_gives_equal_scores(digits, tmp_path):
    network = Network(random_weights(0), batch_norm=True)
    train(network, digits, SHORT, on_step=lambda: None)
    expected = scores(network, digits.test_images)
    save_norms(network, tmp_path / "state.npz")
    loaded = with_new_norms(network)
    assert not np.array_equal(scores(loaded, digits.test_images), expected)
    load_norms(loaded, tmp_path / "state.npz")
    np.testing.assert_array_equal(scores(loaded, digits.test_images), expected)
    assert accuracy(loaded, digits) == accuracy(network, digits)
    assert loaded.norms["norm1"].num_batches_tracked == SHORT.steps
    assert loaded.norms["norm1"] is not network.norms["norm1"]


def test_evaluation_leaves_the_network_in_training_mode(digits):
    network = Network(random_weights(0), batch_norm=True)
    before = [norm.state_dict() for norm in network.norms.values()]
    accuracy(network, digits)
    for norm, state in zip(network.norms.values(), before, strict=True):
        assert norm.training
        for key, value in norm.state_dict().items():
            np.testing.assert_array_equal(value, state[key])


def run_short(output: Path) -> tuple[bool, str]:
    printed = io.StringIO()
    console = Console(file=printed, width=100)
    return demo.run(SHORT, output, console, progress=False), printed.getvalue()


def test_run_writes_two_pictures_and_a_state(tmp_path):
    same, printed = run_short(tmp_path)
    assert same
    assert "bit for bit" in printed
    assert "without batch norm" in printed
    for name in (demo.ACCURACY_PNG, demo.INPUTS_PNG):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000
    assert zipfile.is_zipfile(tmp_path / demo.STATE_NPZ)


def test_run_tells_when_a_loaded_state_gives_other_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_norms", lambda network, path: None)
    same, printed = run_short(tmp_path)
    assert not same
    assert "The scores differ" in printed
