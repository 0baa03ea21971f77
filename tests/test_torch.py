"""PyTorch's batch norm: the same outputs, gradients, running statistics and state.

PyTorch's own rounding is part of every difference, so the bounds are not those of the oracle: in float64
some 1e3 u; in float32 the same multiple of float32's.
"""

import itertools

import numpy as np
import pytest

import nbbn
from cases import type_id

torch = pytest.importorskip("torch")
functional = torch.nn.functional

BOUND = {np.float32: 1e-5, np.float64: 1e-13}
WIDE = tuple(BOUND)
EVERY_RANK = {
    2: torch.nn.BatchNorm1d,
    3: torch.nn.BatchNorm1d,
    4: torch.nn.BatchNorm2d,
    5: torch.nn.BatchNorm3d,
}
DIMS = {2: (23, 6), 3: (5, 6, 11), 4: (4, 6, 7, 5), 5: (3, 6, 4, 5, 2)}


def close(actual, expected, dtype, scale=1.0):
    """Compare with a bound relative to the largest value: sums cancel, and not alike."""
    expected = expected.detach().numpy()
    bound = BOUND[dtype] * scale * (1 + np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=bound)


def tensor(array, memory_format="contiguous"):
    """Return a tensor of its own memory."""
    result = torch.from_numpy(np.array(array))
    if memory_format == "channels_last":
        kind = torch.channels_last if result.ndim == 4 else torch.channels_last_3d
        result = result.contiguous(memory_format=kind)
    return result


@pytest.mark.parametrize("dtype", WIDE, ids=type_id)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("rank", DIMS)
def test_function(rng, rank, training, eps, momentum, dtype):
    """torch.nn.functional.batch_norm, with arguments by position, over what may be left out."""
    x, cotangent = (rng.normal(2.0, 3.0, DIMS[rank]).astype(dtype) for _ in range(2))
    for affine, tracked in itertools.product((True, False), repeat=2):
        if not (training or tracked):
            continue
        weight, bias = rng.normal(size=(2, 6)).astype(dtype) if affine else (None, None)
        mean, var = (rng.uniform(1, 2, (2, 6)).astype(dtype)) if tracked else (None, None)
        tx = tensor(x).requires_grad_()
        parameters = [None if v is None else tensor(v).requires_grad_() for v in (weight, bias)]
        statistics = [None if v is None else tensor(v) for v in (mean, var)]
        expected = functional.batch_norm(tx, *statistics, *parameters, training, momentum, eps)
        (expected * tensor(cotangent)).sum().backward()
        actual = nbbn.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        close(actual, expected, dtype)
        if tracked:
            close(mean, statistics[0], dtype)
            close(var, statistics[1], dtype)
        if training:
            forward = nbbn.batch_norm_forward(x, weight, bias, eps=eps)
            used = {"mean": forward.mean, "invstd": forward.invstd}
        else:
            used = {"mean": mean, "invstd": 1 / np.sqrt(var + dtype(eps))}
        gradients = nbbn.batch_norm_backward(cotangent, x, weight, training=training, **used)
        close(gradients.x, tx.grad, dtype, scale=4)
        if affine:
            close(gradients.weight, parameters[0].grad, dtype, scale=10)
            close(gradients.bias, parameters[1].grad, dtype, scale=10)


@pytest.mark.parametrize("dtype", WIDE, ids=type_id)
@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0], ids=str)
@pytest.mark.parametrize("parameters", ["affine", "weight", "plain"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
@pytest.mark.parametrize("rank", DIMS)
def test_module(rng, rank, tracked, parameters, momentum, dtype):
    """BatchNorm1d, 2d and 3d over three steps of training and one of evaluation."""
    affine, bias = parameters != "plain", parameters == "affine"
    options = {"eps": 1e-4, "momentum": momentum, "affine": affine, "bias": bias}
    options["track_running_stats"] = tracked
    theirs = EVERY_RANK[rank](6, dtype=getattr(torch, np.dtype(dtype).name), **options)
    ours = nbbn.BatchNorm(6, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_()
    ours.load_state_dict(theirs.state_dict())
    formats = ["contiguous", "channels_last"] if rank >= 4 else ["contiguous"]
    for step, memory_format in itertools.product(range(4), formats):
        ours.train(step < 3)
        theirs.train(step < 3)
        theirs.zero_grad()
        x, cotangent = (tensor(rng.normal(1, 2, DIMS[rank]).astype(dtype), memory_format) for _ in range(2))
        x.requires_grad_()
        expected = theirs(x)
        expected.backward(cotangent)
        actual = ours(x.detach().numpy())
        assert actual.strides == tuple(s * actual.itemsize for s in expected.stride())
        close(actual, expected, dtype)
        close(ours.backward(cotangent.numpy()), x.grad, dtype, scale=4)
        if affine:
            close(ours.grad_weight, theirs.weight.grad, dtype, scale=10)
        if bias:
            close(ours.grad_bias, theirs.bias.grad, dtype, scale=10)
        assert_same_state(ours.state_dict(), theirs.state_dict(), dtype)


def assert_same_state(ours, theirs, dtype):
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert ours[name].shape == tuple(value.shape)
        assert str(ours[name].dtype) == str(value.dtype).removeprefix("torch.")
        close(ours[name], value, dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=type_id)
@pytest.mark.parametrize("kind", [torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d])
def test_state_in_both_directions(rng, kind, dtype):
    """Through the values alone, and a counter that goes on counting."""
    theirs = kind(6, dtype=getattr(torch, np.dtype(dtype).name))
    shape = {"BatchNorm1d": (9, 6), "BatchNorm2d": (9, 6, 2, 3), "BatchNorm3d": (9, 6, 2, 1, 3)}[
        kind.__name__
    ]
    for _ in range(3):
        theirs(torch.from_numpy(rng.normal(size=shape).astype(dtype)))
    ours = nbbn.BatchNorm(6, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(ours.state_dict()[name], value.numpy())
    x = rng.normal(size=shape).astype(dtype)
    close(ours.eval()(x), theirs.eval()(torch.from_numpy(x)), dtype)

    ours.train()(x)
    again = kind(6, dtype=getattr(torch, np.dtype(dtype).name))
    again.load_state_dict({k: torch.from_numpy(v) for k, v in ours.state_dict().items()})
    assert int(again.num_batches_tracked) == 4
    close(ours.eval()(x), again.eval()(torch.from_numpy(x)), dtype)


def test_state_of_another_precision(rng):
    theirs = torch.nn.BatchNorm2d(6, dtype=torch.float64)
    theirs(torch.from_numpy(rng.normal(size=(5, 6, 2, 2))))
    ours = nbbn.BatchNorm(6)
    ours.load_state_dict(theirs.state_dict())
    np.testing.assert_array_equal(ours.running_mean, theirs.running_mean.numpy().astype(np.float32))


def test_state_of_parameters_that_need_gradients():
    """state.items() of a module's parameters, not of its state_dict: tensors on the tape."""
    theirs = torch.nn.BatchNorm2d(6, track_running_stats=False)
    ours = nbbn.BatchNorm(6, track_running_stats=False)
    ours.load_state_dict({k: v.detach() for k, v in theirs.named_parameters()})
    np.testing.assert_array_equal(ours.weight, theirs.weight.detach().numpy())


@pytest.mark.parametrize("dtype", WIDE, ids=type_id)
@pytest.mark.parametrize("offset", [0, 1e3, 1e5])
def test_large_means(rng, offset, dtype):
    """Against PyTorch in float64: what is right, and not what PyTorch's float32 says."""
    x = (offset + rng.normal(size=(32, 3, 20, 20))).astype(dtype)
    expected = functional.batch_norm(torch.from_numpy(x).double(), None, None, training=True)
    actual = nbbn.batch_norm(x, training=True)
    # PyTorch's float64 mean is off by a hundred u · offset at times, where nbbn's is by less than one.
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=BOUND[dtype] + 5e-14 * offset)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_state_of_bfloat16(rng, dtype):
    """As networks are often saved; NumPy has no such arrays."""
    theirs = torch.nn.BatchNorm2d(6).train()
    theirs(torch.from_numpy(rng.normal(3, 2, (4, 6, 5, 5)).astype(np.float32)))
    theirs = theirs.to(torch.bfloat16)
    ours = nbbn.BatchNorm(6, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        np.testing.assert_array_equal(np.asarray(getattr(ours, name), np.float64), value.double().numpy())


def test_agreement_on_errors(rng):
    """What PyTorch refuses, nbbn refuses with the same kind of error."""
    one_value = rng.normal(size=(1, 6)).astype(np.float32)
    for call in (
        lambda: functional.batch_norm(torch.from_numpy(one_value), None, None, training=True),
        lambda: nbbn.batch_norm(one_value, training=True),
    ):
        with pytest.raises(ValueError, match=r"more than (1|one) value"):
            call()


def test_statistics_of_different_kinds(rng):
    x = rng.normal(size=(4, 3))
    stats, of_torch = nbbn.batch_stats(x), nbbn.batch_stats(torch.from_numpy(x))
    for one, other in ((stats, of_torch), (of_torch, stats)):
        with pytest.raises(TypeError, match=r"^other must have arrays of these statistics' kind"):
            one.merge(other)


def test_nested_tensor():
    with pytest.warns(UserWarning, match="nested"):
        x = torch.nested.nested_tensor([torch.randn(3, 4)])
    with pytest.raises(TypeError, match=r"^x cannot be used where it lies, got torch.Tensor"):
        nbbn.batch_norm(x, training=True)
