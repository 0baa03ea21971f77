"""The recurrent network of docs/how-to: its gradients, its steps, and sequences that end."""

import copy
import importlib.util
import pathlib

import numpy as np
import pytest

pytest.importorskip("sklearn")

PROGRAM = pathlib.Path(__file__).parent.parent / "docs" / "how-to" / "recurrent_networks.py"
_spec = importlib.util.spec_from_file_location("recurrent_networks", PROGRAM)
program = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(program)

LENGTHS = (6, 4, 4, 2, 1)  # the longest runs alone for two steps


@pytest.fixture
def batch(rng):
    sequences = [rng.normal(size=(length, 3)) for length in rng.permutation(LENGTHS)]
    x, lengths, _ = program.padded(sequences, np.float64)
    return x, lengths


def small(rng, steps):
    """Return a network of float64; where it has batch norm, each step has seen some batches."""
    network = program.Recurrent(0, features=3, hidden=4, classes=3, steps=steps, dtype=np.float64)
    for value in network.parameters.values():
        value += rng.normal(0, 0.3, value.shape)
    if steps:
        x = rng.normal(size=(max(LENGTHS), 8, 3))
        for _ in range(3):
            network.forward(x, np.full(8, len(x)), training=True)
    return network


# None: no batch norm; 3: later steps share the last statistics, which differ from step to step otherwise.
@pytest.mark.parametrize("steps", [None, 3, 6])
def test_gradients(rng, batch, steps):
    network = small(rng, steps)
    cotangent = rng.normal(size=(len(LENGTHS), 3))

    for norm in (network.norm_x, network.norm_h):
        # Running statistics, which a sequence that runs alone is normalized with, are constants to the
        # gradient. So they must not move, not even by what steps before have just seen: 1e-12 of it.
        norm.momentum, norm.batches = 0.0, np.full(steps or 1, 10**12)

    def loss():
        return float((copy.deepcopy(network).forward(*batch, training=True) * cotangent).sum())

    twin = copy.deepcopy(network)
    twin.forward(*batch, training=True)
    for name, gradient in twin.backward(cotangent).items():
        value = network.parameters[name]
        expected = np.empty_like(value)
        for index in np.ndindex(value.shape):
            kept = value[index]
            value[index] = kept + 1e-6
            above = loss()
            value[index] = kept - 1e-6
            expected[index] = (above - loss()) / 2e-6
            value[index] = kept
        # Rounding of a loss of size 10 over the step, and the step squared times some third derivative,
        # which normalizing two values makes large.
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_statistics_are_of_running_sequences(rng, batch):
    network = small(rng, None)
    network.norm_x = norm = program.StepNorm(8, 4, np.float64)
    x, lengths = batch
    network.forward(x, lengths, training=True)
    for t in range(4):
        values = x[t, lengths > t] @ network.parameters["w_x"]
        np.testing.assert_allclose(norm.running_mean[t], values.mean(axis=0), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(norm.running_var[t], values.var(axis=0, ddof=1), rtol=1e-12)
    # One sequence runs on, and then none.
    assert norm.batches.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_later_steps_have_the_last_statistics(rng):
    norm = program.StepNorm(5, 4, np.float64)
    for t in range(3):
        norm.forward(rng.normal(t, 1 + t, (8, 4)), t, training=True)
    x = rng.normal(size=(6, 4))
    of = [norm.forward(x, t, training=False)[0] for t in range(9)]
    for t in range(3):
        expected = 0.1 * (x - norm.running_mean[t]) / np.sqrt(norm.running_var[t] + 1e-5)
        np.testing.assert_allclose(of[t], expected, rtol=1e-12, atol=1e-14)
    assert all(np.array_equal(later, of[2]) for later in of[3:])
    # So has a sequence that runs alone in training, and it changes nothing.
    before = norm.running_mean.copy(), norm.running_var.copy(), norm.batches.copy()
    assert np.array_equal(norm.forward(x[:1], 7, training=True)[0], of[2][:1])
    for now, then in zip((norm.running_mean, norm.running_var, norm.batches), before, strict=True):
        assert np.array_equal(now, then)


def test_sequences_that_have_ended_do_not_matter(rng, batch):
    """What stands in x after the end of a sequence changes no bit."""
    x, lengths = batch
    network = small(rng, 6)
    other = x.copy()
    for place, length in enumerate(lengths):
        other[length:, place] = np.nan
    for training in (True, False):
        a, b = (copy.deepcopy(network).forward(values, lengths, training) for values in (x, other))
        assert np.array_equal(a, b)
        assert np.isfinite(a).all()
