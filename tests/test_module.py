"""class BatchNorm: modes, parameters, gradients, state, and copies."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest

import nbbn
import reference
from cases import DTYPES, Shape, activations, channels_last, columns_for, running_statistics, type_id
from checks import assert_same_bits, assert_within, check_running, unchanged
from reference import rows

SHAPE = Shape((4, 5, 7))
KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]


def randomized(rng, channels=5, **options):
    """Return a BatchNorm whose parameters and statistics are not the initial ones."""
    bn = nbbn.BatchNorm(channels, **options)
    if bn.weight is not None:
        bn.weight[...], bn.bias[...] = rng.normal(size=(2, channels))
    if bn.running_mean is not None:
        bn.running_mean[...], bn.running_var[...] = running_statistics(rng, channels)
    return bn


def state_bits(bn):
    return {name: (v.dtype, v.tobytes()) for name, v in bn.state_dict().items()}


@pytest.mark.parametrize("dtype", ["float32", "float64", np.float64], ids=str)
def test_initial_values(dtype):
    bn = nbbn.BatchNorm(3, dtype=dtype)
    for array, values in ((bn.weight, 1), (bn.bias, 0), (bn.running_mean, 0), (bn.running_var, 1)):
        assert array.dtype == np.dtype(dtype)
        assert array.tolist() == [values] * 3
    assert bn.num_batches_tracked == 0
    assert bn.training and (bn.eps, bn.momentum) == (1e-5, 0.1)
    assert bn.grad_weight is None and bn.grad_bias is None


@pytest.mark.parametrize("own, dtype", [(own, d) for d in DTYPES for own in columns_for(d)], ids=type_id)
@pytest.mark.parametrize("axis", [1, 0, -1])
def test_training(rng, axis, own, dtype):
    """Output, gradients and running statistics of three steps, for inputs of either type."""
    shape = Shape((5, 5, 5), axis)
    bn = randomized(rng, axis=axis, dtype=own, momentum=0.3, eps=1e-3)
    for step in range(1, 4):
        x, dy = activations(rng, shape, dtype, offset=step), activations(rng, shape, dtype)
        old = bn.running_mean.copy(), bn.running_var.copy()
        expected = reference.forward(x, bn.weight, bn.bias, eps=1e-3, axis=axis)
        with unchanged(x, bn.weight, bn.bias):
            out = bn(x)
        tolerance = reference.out_tolerance(expected, dtype)
        assert_within("out", rows(out, axis), expected.out, tolerance)
        mean_bound = reference.mean_tolerance(expected)
        check_running("running_mean", bn.running_mean, old[0], expected.mean, mean_bound, 0.3)
        var_bound = 25 / 24 * reference.var_tolerance(expected, dtype)
        unbiased = reference.unbiased(expected.var, 25)
        check_running("running_var", bn.running_var, old[1], unbiased, var_bound, 0.3)
        assert bn.num_batches_tracked == step

        # The gradient is of what the forward pass used: its mean and invstd, as it returned them.
        used = nbbn.batch_norm_forward(x, eps=1e-3, axis=axis)
        with unchanged(*bn.state_dict().values(), dy, x):
            grad_x = bn.backward(dy)
        gradients = nbbn.batch_norm_backward(dy, x, bn.weight, mean=used.mean, invstd=used.invstd, axis=axis)
        assert_same_bits(grad_x, gradients.x)
        for name in ("weight", "bias"):
            gradient = getattr(bn, f"grad_{name}")
            assert gradient.dtype == own
            assert_same_bits(gradient, getattr(gradients, name).astype(own))


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_evaluation(rng, dtype):
    bn = randomized(rng, eps=0.01).eval()
    x, dy = activations(rng, SHAPE, dtype), activations(rng, SHAPE, dtype)
    before = state_bits(bn)
    expected = reference.evaluate(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=0.01)
    out = bn(x)
    assert_within("out", rows(out), expected.out, reference.out_tolerance(expected, dtype))
    backward = reference.backward(
        dy, x, bn.weight, mean=expected.mean, invstd=expected.invstd, training=False
    )
    grad_x = bn.backward(dy)
    # invstd itself is rounded, to float64.
    bound = reference.grad_x_tolerance(backward, dtype)
    assert_within("grad_x", rows(grad_x), backward.x, bound)
    for name, scale in (("weight", backward.grad_out * backward.x_hat.hi), ("bias", backward.grad_out)):
        bound = (reference.depth(28) + 1) * reference.unit(np.float32)
        bound = bound * np.abs(scale).sum(axis=1, keepdims=True)
        assert_within(name, getattr(bn, f"grad_{name}")[:, None], getattr(backward, name), bound)
    assert state_bits(bn) == before


def test_modes(rng):
    bn = randomized(rng)
    x = activations(rng, SHAPE, np.float32)
    assert bn.eval() is bn and not bn.training
    evaluated = bn(x)
    assert bn.train() is bn and bn.training
    trained = bn(x)
    assert bn.train(False) is bn and not bn.training
    assert np.abs(evaluated - trained).max() > 1e-3
    assert_same_bits(trained, nbbn.batch_norm_forward(x, bn.weight, bn.bias).out)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_evaluation_gradient_uses_the_statistics_of_its_own_forward(rng, dtype):
    """A training step between an evaluation's forward and its backward does not reach into it."""
    bn = randomized(rng, dtype=dtype).eval()
    x, dy = activations(rng, SHAPE, np.float32), activations(rng, SHAPE, np.float32)
    bn(x)
    expected = bn.backward(dy), bn.grad_weight
    bn(x)
    bn.running_mean += 1
    bn.running_var *= 3
    assert_same_bits((bn.backward(dy), bn.grad_weight), expected)


def test_without_parameters(rng):
    bn = nbbn.BatchNorm(5, affine=False)
    assert bn.weight is None and bn.bias is None
    assert list(bn.state_dict()) == KEYS[2:]
    x, dy = activations(rng, SHAPE, np.float32), activations(rng, SHAPE, np.float32)
    result = nbbn.batch_norm_forward(x)
    assert_same_bits(bn(x), result.out)
    gradients = nbbn.batch_norm_backward(dy, x, mean=result.mean, invstd=result.invstd)
    assert_same_bits(bn.backward(dy), gradients.x)
    assert bn.grad_weight is None and bn.grad_bias is None


def test_without_running_statistics(rng):
    """Evaluation then normalizes with the batch's own statistics, as PyTorch does."""
    bn = nbbn.BatchNorm(5, track_running_stats=False)
    assert bn.running_mean is bn.running_var is bn.num_batches_tracked is None
    assert list(bn.state_dict()) == KEYS[:2]
    x, dy = activations(rng, SHAPE, np.float32), activations(rng, SHAPE, np.float32)
    result = nbbn.batch_norm_forward(x)
    gradients = nbbn.batch_norm_backward(dy, x, mean=result.mean, invstd=result.invstd)
    for mode in (True, False):
        bn.train(mode)
        assert_same_bits(bn(x), result.out)
        assert_same_bits(bn.backward(dy), gradients.x)
    assert bn.running_mean is None


def test_gradients_do_not_accumulate(rng):
    bn = nbbn.BatchNorm(5)
    x, dy = activations(rng, SHAPE, np.float32), activations(rng, SHAPE, np.float32)
    bn(x)
    bn.backward(dy)
    first = bn.grad_weight.copy(), bn.grad_bias.copy()
    bn.backward(dy)
    assert_same_bits((bn.grad_weight, bn.grad_bias), first)


def test_outputs_are_not_shared_between_calls(rng):
    bn = nbbn.BatchNorm(5)
    x = activations(rng, SHAPE, np.float32)
    first = bn(x)
    kept = first.copy()
    bn(x + 1)
    assert_same_bits(first, kept)


def test_layout_of_x_is_kept(rng):
    bn = nbbn.BatchNorm(33)
    x = channels_last(activations(rng, Shape((3, 33, 5, 7)), np.float32))
    assert bn(x).strides == x.strides
    assert bn.backward(np.ascontiguousarray(x)).strides == x.strides


def test_resets(rng):
    bn = randomized(rng)
    bn(activations(rng, SHAPE, np.float32))
    weight = bn.weight.copy()
    bn.reset_running_stats()
    assert_same_bits(bn.weight, weight)
    assert (bn.running_mean.tolist(), bn.running_var.tolist()) == ([0] * 5, [1] * 5)
    assert bn.num_batches_tracked == 0
    bn(activations(rng, SHAPE, np.float32))
    bn.reset_parameters()
    assert (bn.weight.tolist(), bn.bias.tolist()) == ([1] * 5, [0] * 5)
    assert bn.running_mean.tolist() == [0] * 5


def test_to_the_device_that_it_is_on():
    bn = nbbn.BatchNorm(2)
    assert bn.to("cpu") is bn


# --- state -----------------------------------------------------------------------------------------


def test_state_dict_is_a_copy_in_torch_order(rng):
    bn = randomized(rng)
    bn(activations(rng, SHAPE, np.float32))
    state = bn.state_dict()
    assert list(state) == KEYS
    assert state["num_batches_tracked"].shape == ()
    assert state["num_batches_tracked"].dtype == np.int64
    before = state_bits(bn)
    for value in state.values():
        value[...] = 7
    assert state_bits(bn) == before


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_state_round_trip(rng, affine, tracked):
    options = {"affine": affine, "track_running_stats": tracked}
    source, target = randomized(rng, **options), nbbn.BatchNorm(5, **options)
    x = activations(rng, SHAPE, np.float32)
    source(x)
    target.load_state_dict(source.state_dict())
    assert state_bits(target) == state_bits(source)
    assert_same_bits(target.eval()(x), source.eval()(x))
    # The target has its own memory.
    target.train()(x + 1)
    assert tracked is False or state_bits(target) != state_bits(source)


def test_state_through_npz(rng, tmp_path):
    source, target = randomized(rng), nbbn.BatchNorm(5)
    source(activations(rng, SHAPE, np.float32))
    np.savez(tmp_path / "bn.npz", **source.state_dict())
    with np.load(tmp_path / "bn.npz") as state:
        target.load_state_dict(state)
    assert state_bits(target) == state_bits(source)


def test_state_without_the_counter(rng):
    """As old ones are: the counter stays as it was."""
    source, target = randomized(rng), nbbn.BatchNorm(5)
    for _ in range(3):
        target(activations(rng, SHAPE, np.float32))
    state = source.state_dict()
    del state["num_batches_tracked"]
    target.load_state_dict(state)
    assert target.num_batches_tracked == 3
    assert_same_bits(target.running_mean, source.running_mean)


def test_state_of_lists_and_of_another_type(rng):
    values = rng.normal(size=5)
    state = {
        "weight": values.tolist(),
        "bias": values.astype(np.float64),
        "running_mean": values.astype(np.float32)[::-1],
        "running_var": np.abs(values),
        "num_batches_tracked": 12,
    }
    bn = nbbn.BatchNorm(5)
    bn.load_state_dict(state)
    assert_same_bits(bn.weight, values.astype(np.float32))
    assert_same_bits(bn.bias, values.astype(np.float32))
    assert_same_bits(bn.running_mean, values.astype(np.float32)[::-1])
    assert bn.num_batches_tracked == 12 and bn.num_batches_tracked.dtype == np.int64
    bn(activations(rng, SHAPE, np.float32))
    assert bn.num_batches_tracked == 13


def test_loading_writes_into_the_arrays_that_are_there(rng):
    """Whoever holds bn.weight, an optimizer for one, goes on holding it."""
    bn, weight = nbbn.BatchNorm(5), None
    weight = bn.weight
    bn.load_state_dict(randomized(rng).state_dict())
    assert bn.weight is weight


def with_copy(bn):
    return copy.copy(bn)


def with_deepcopy(bn):
    return copy.deepcopy(bn)


def with_pickle(bn):
    return pickle.loads(pickle.dumps(bn))


@pytest.mark.parametrize("duplicate", [with_copy, with_deepcopy, with_pickle])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_copies(rng, duplicate, momentum):
    bn = randomized(rng, momentum=momentum, eps=1e-3, axis=-1, correction=0, dtype="float64")
    shape = Shape((4, 7, 5), -1)
    x, dy = activations(rng, shape, np.float64), activations(rng, shape, np.float64)
    bn(x)
    bn.backward(dy)
    bn.eval()
    twin = duplicate(bn)
    assert state_bits(twin) == state_bits(bn)
    assert_same_bits(twin.grad_weight, bn.grad_weight)
    assert not twin.training
    assert_same_bits(twin(x), bn(x))
    assert_same_bits(twin.backward(dy), bn.backward(dy))
    for name in ("eps", "momentum", "affine", "track_running_stats", "axis", "correction"):
        assert getattr(twin, name) == getattr(bn, name)
    if duplicate is not with_copy:  # a shallow one shares its arrays
        with unchanged(*bn.state_dict().values(), bn.running_mean):
            twin.train()(x + 1)
        assert twin.num_batches_tracked == bn.num_batches_tracked + 1
        twin.weight[...] = 0
        assert (bn.weight != 0).all()


def test_x_is_kept_for_backward_and_no_longer(rng):
    bn = nbbn.BatchNorm(5)
    x = activations(rng, SHAPE, np.float32)
    seen = weakref.ref(x)
    bn(x)
    del x
    gc.collect()
    assert seen() is not None
    bn(activations(rng, SHAPE, np.float32))
    gc.collect()
    assert seen() is None


def test_repr_names_the_options():
    text = repr(nbbn.BatchNorm(7, eps=0.25, affine=False))
    assert "BatchNorm(7" in text and "eps=0.25" in text and "affine=False" in text
