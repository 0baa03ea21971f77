"""Masks and lengths: what does not count is nowhere in the result, whatever it is.

The oracle is that of batch normalization, of the values that count, taken out of the array and put together.
"""

import itertools

import ml_dtypes
import numpy as np
import pytest

import nbbn
import reference
from cases import LAYOUTS, Shape, activations, running_statistics
from checks import assert_same_bits, assert_within, bits, check_running, unchanged
from reference import rows
from test_gradients import assert_gradient

BFLOAT16 = ml_dtypes.bfloat16
DTYPES = [np.float32, np.float64, np.float16, BFLOAT16]
SHAPES = [
    Shape((2, 3)),
    Shape((3, 3)),
    Shape((5, 5, 2)),
    Shape((33, 17)),
    Shape((40, 300)),  # as wide as a row, and wider than a vector
    Shape((70, 3), axis=-1),
    Shape((3, 17, 1, 3), axis=-1),
    Shape((4, 3, 50)),
    Shape((4, 3, 50), axis=0),
    Shape((9, 6, 7, 7)),
    Shape((2, 5, 23, 29)),  # a channel by itself
    Shape((2, 3, 1301)),  # in pieces
    Shape((2, 40, 9, 21)),
]


def _columns(rng, channels):
    return rng.normal(size=(2, channels)).astype(np.float32)


def _without_channels(shape):
    axis = shape.axis % len(shape.dims)
    return tuple(n for d, n in enumerate(shape.dims) if d != axis)


def _mask(rng, shape, share):
    """Return a mask, perhaps one that has to be broadcast, and what it is for each position."""
    positions = _without_channels(shape)
    dims = tuple(1 if rng.random() < 0.2 else n for n in positions)
    mask = rng.random(dims) < share
    mask.flat[0] = True
    return mask, np.broadcast_to(mask, positions)


def _with_junk(rng, values, everywhere, axis):
    """Set what does not count to anything."""
    out = np.moveaxis(values, axis, 0)
    out[:, ~everywhere] = rng.choice([np.nan, np.inf, -np.inf, 6e4]).astype(values.dtype)
    return values


def _counting(values, everywhere, axis):
    """Return what counts, (C, n)."""
    return np.moveaxis(values, axis, 0)[:, everywhere]


def _assert_zeros(values, everywhere, axis):
    rest = np.moveaxis(values, axis, 0)[:, ~everywhere]
    assert not rest.astype(np.float64).any(), "not 0 where it does not count"


@pytest.mark.parametrize("share", [0.1, 0.6, 0.97])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_against_what_counts(rng, dtype, share):
    layouts = itertools.cycle(LAYOUTS.values())
    for shape in SHAPES:
        mask, everywhere = _mask(rng, shape, share)
        count = int(everywhere.sum())
        axis = shape.axis
        x, grad_out = (
            _with_junk(rng, next(layouts)(activations(rng, shape, dtype, offset=4.0)), everywhere, axis)
            for _ in range(2)
        )
        weight, bias = _columns(rng, shape.channels)
        given = {"mask": mask, "axis": axis}
        if count == 1:
            with pytest.raises(ValueError, match=r"^mask must leave more than one value"):
                nbbn.batch_norm_forward(x, **given)
            continue
        compact = _counting(x, everywhere, axis)
        expected = reference.forward(compact, weight, bias, axis=0)
        out = next(layouts)(np.full(shape.dims, np.nan, dtype))
        with unchanged(x, weight, bias, mask):
            result = nbbn.batch_norm_forward(x, weight, bias, out=out, **given)
        assert result.out is out and result.count == count
        for name, tolerance in (
            ("mean", reference.mean_tolerance(expected)),
            ("var", reference.var_tolerance(expected, dtype)),
            ("invstd", reference.invstd_tolerance(expected, dtype)),
        ):
            assert_within(name, getattr(result, name)[:, None], getattr(expected, name), tolerance)
        tolerance = reference.out_tolerance(expected, dtype)
        assert_within("out", rows(_counting(out, everywhere, axis), 0), expected.out, tolerance)
        _assert_zeros(out, everywhere, axis)
        stats = nbbn.batch_stats(x, **given)
        assert stats.count == count
        assert_within("mean", stats.mean[:, None], expected.mean, reference.mean_tolerance(expected))

        found = {"mean": result.mean, "invstd": result.invstd}
        with unchanged(x, grad_out, weight, mask):
            gradients = nbbn.batch_norm_backward(grad_out, x, weight, **found, **given)
        dy = _counting(grad_out, everywhere, axis)
        expected = reference.backward(dy, compact, weight, **found, axis=0)
        for name, tolerance in (
            ("bias", reference.grad_bias_tolerance(expected, dtype)),
            ("weight", reference.grad_weight_tolerance(expected, dtype)),
        ):
            assert_within(name, getattr(gradients, name)[:, None], getattr(expected, name), tolerance)
        actual = rows(_counting(gradients.x, everywhere, axis), 0)
        assert_within("grad_x", actual, expected.x, reference.grad_x_tolerance(expected, dtype))
        _assert_zeros(gradients.x, everywhere, axis)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_evaluation(rng, dtype):
    layouts = itertools.cycle(LAYOUTS.values())
    for shape in SHAPES:
        mask, everywhere = _mask(rng, shape, 0.6)
        axis = shape.axis
        x = _with_junk(rng, next(layouts)(activations(rng, shape, dtype)), everywhere, axis)
        weight, bias = _columns(rng, shape.channels)
        mean, var = running_statistics(rng, shape.channels)
        out = nbbn.batch_norm(x, mean, var, weight, bias, mask=mask, axis=axis)
        expected = reference.evaluate(_counting(x, everywhere, axis), mean, var, weight, bias, axis=0)
        tolerance = reference.out_tolerance(expected, dtype)
        assert_within("out", rows(_counting(out, everywhere, axis), 0), expected.out, tolerance)
        _assert_zeros(out, everywhere, axis)
        invstd = 1 / np.sqrt(var.astype(np.float64) + 1e-5)
        gradients = nbbn.batch_norm_backward(
            x, x, weight, mean=mean, invstd=invstd, training=False, mask=mask, axis=axis
        )
        _assert_zeros(gradients.x, everywhere, axis)
        compact = _counting(x, everywhere, axis)
        expected = reference.backward(
            compact, compact, weight, mean=mean, invstd=invstd, axis=0, training=False
        )
        actual = rows(_counting(gradients.x, everywhere, axis), 0)
        assert_within("grad_x", actual, expected.x, reference.grad_x_tolerance(expected, dtype))


@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("channels", [3, 40])
def test_large(rng, layout, channels):
    """In phases and streamed, on several threads; stretches without anything that counts among them."""
    dims = (16 * 40 // channels, channels, 80, 81)
    x, grad_out = (activations(rng, Shape(dims), np.float32) for _ in range(2))
    if layout == "channels-last":
        x, grad_out = (
            np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for a in (x, grad_out)
        )
    mask = rng.random((dims[0], 80, 81)) < rng.random((dims[0], 80, 1))
    mask[2:7] = False
    mask[-1, 40:] = False
    weight, bias = _columns(rng, channels)
    result = nbbn.batch_norm_forward(x, weight, bias, mask=mask)
    compact = _counting(x, mask, 1)
    expected = reference.forward(compact[:2], weight[:2], bias[:2], axis=0)
    tolerance = reference.out_tolerance(expected, np.float32)
    assert_within("out", _counting(result.out, mask, 1)[:2], expected.out, tolerance)
    _assert_zeros(result.out, mask, 1)
    found = {"mean": result.mean, "invstd": result.invstd}
    gradients = nbbn.batch_norm_backward(grad_out, x, weight, mask=mask, **found)
    found = {name: value[:2] for name, value in found.items()}
    dy = _counting(grad_out, mask, 1)[:2]
    expected = reference.backward(dy, compact[:2], weight[:2], **found, axis=0)
    actual = _counting(gradients.x, mask, 1)[:2]
    assert_within("grad_x", actual, expected.x, reference.grad_x_tolerance(expected, np.float32))
    _assert_zeros(gradients.x, mask, 1)
    out = nbbn.batch_norm(x, result.mean, result.var, weight, bias, mask=mask)
    assert_within("out", _counting(out, mask, 1), _counting(result.out, mask, 1), 1e-5)
    _assert_zeros(out, mask, 1)


def test_with_what_follows(rng):
    """The mask is of the whole: of a residual and its gradient, and of an activation."""
    for shape in SHAPES:
        mask, everywhere = _mask(rng, shape, 0.7)
        if everywhere.sum() < 2:
            continue
        axis = shape.axis
        x, grad_out, residual = (
            _with_junk(rng, activations(rng, shape, np.float32), everywhere, axis) for _ in range(3)
        )
        weight, bias = _columns(rng, shape.channels)
        alone = {"mask": mask, "axis": axis}
        given = alone | {"activation": "relu", "residual": residual}
        plain = nbbn.batch_norm_forward(x, weight, bias, **alone)
        z = np.where(np.expand_dims(everywhere, axis), plain.out + residual, 0)
        result = nbbn.batch_norm_forward(x, weight, bias, **given)
        assert_same_bits(result.out, np.maximum(z, np.float32(0)))
        found = {"mean": plain.mean, "invstd": plain.invstd}
        gradients = nbbn.batch_norm_backward(grad_out, x, weight, bias=bias, **found, **given)
        incoming = np.where((z > 0) & np.expand_dims(everywhere, axis), grad_out, 0)
        assert np.array_equal(gradients.residual, incoming)
        expected = nbbn.batch_norm_backward(incoming, x, weight, **found, **alone)
        assert_same_bits(gradients[:3], tuple(expected))


@pytest.mark.parametrize(
    ("dims", "axis", "along"),
    [((5, 3, 11), 1, None), ((5, 11, 3), -1, None), ((5, 11, 3), 2, 1), ((3, 5, 11, 4), 0, 2)],
)
def test_lengths(rng, dims, axis, along):
    x = activations(rng, Shape(dims, axis), np.float32)
    lengths = rng.integers(0, 12, 5)
    lengths[0] = 11
    mask = np.arange(11) < lengths[:, None]
    if len(dims) == 4:
        mask = mask[:, :, None]
    given = {"lengths": lengths.tolist() if along is None else lengths, "lengths_axis": along, "axis": axis}
    result = nbbn.batch_norm_forward(x, **given)
    assert_same_bits(tuple(result), tuple(nbbn.batch_norm_forward(x, mask=mask, axis=axis)))
    positions = np.prod([n for d, n in enumerate(dims) if d not in (axis % len(dims),)])
    assert result.count == int(lengths.sum()) * positions // 55


def test_differences(rng):
    x = rng.permutation(60).reshape(5, 3, 4) / 10 + 0.1 * rng.normal(size=(5, 3, 4))
    arrays = {"x": x, "weight": rng.normal(size=3), "bias": rng.normal(size=3)}
    mask = rng.random((5, 4)) < 0.7
    mask[:2, 0] = True
    cotangent = rng.normal(size=x.shape)

    def loss():
        return float((cotangent * nbbn.batch_norm_forward(**arrays, mask=mask, activation="silu").out).sum())

    forward = nbbn.batch_norm_forward(**arrays, mask=mask)
    gradients = nbbn.batch_norm_backward(
        cotangent, mean=forward.mean, invstd=forward.invstd, mask=mask, activation="silu", **arrays
    )
    for name, values in arrays.items():
        assert_gradient(loss, values, getattr(gradients, name), rng, places=20)


def test_threads(python):
    code = """
import hashlib
import numpy as np, nbbn
rng = np.random.default_rng(7)
x, dy = rng.normal(size=(2, 6, 24, 40, 41)).astype(np.float32)
digest = hashlib.sha256()
last = [np.ascontiguousarray(v.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2) for v in (x, dy)]
for a, b in ((x, dy), last):
    mask = rng.random((6, 40, 41)) < 0.5
    f = nbbn.batch_norm_forward(a, mask=mask)
    g = nbbn.batch_norm_backward(b, a, mean=f.mean, invstd=f.invstd, mask=mask)
    for array in (*f[:4], *g):
        digest.update(np.ascontiguousarray(array).tobytes())
print(digest.hexdigest())
"""
    once = [python(code, NUMBA_NUM_THREADS=str(threads)) for threads in (1, 2)]
    assert once[0] == once[1]


def test_nothing_counts(rng):
    """Like an empty batch: no statistics, zeros, and running statistics that keep their bits."""
    x = activations(rng, Shape((4, 3, 5)), np.float32)
    nothing = np.zeros((4, 5), bool)
    mean, var = np.full(3, 5.0), np.full(3, 7.0)
    with unchanged(mean, var):
        out = nbbn.batch_norm(x, mean, var, training=True, mask=nothing)
    assert not out.any()
    result = nbbn.batch_norm_forward(x, mask=nothing)
    assert result.count == 0 and not result.out.any() and not result.mean.any() and not result.var.any()
    for training in (True, False):
        gradients = nbbn.batch_norm_backward(
            x, x, mean=mean, invstd=var, mask=nothing, residual=x, training=training
        )
        assert not any(np.asarray(a).any() for a in gradients)
    assert not nbbn.batch_norm(x, mean, var, mask=nothing).any()
    assert nbbn.batch_stats(x, mask=nothing).count == 0
    bn = nbbn.BatchNorm(3)
    assert not bn(x, mask=nothing).any() and not bn.backward(x).any()
    assert int(bn.num_batches_tracked) == 0 and not bn.running_mean.any()
    assert nbbn.batch_norm_forward(x[:0], mask=nothing[:0]).count == 0


def test_torch(rng):
    torch = pytest.importorskip("torch")
    x = torch.tensor(rng.normal(size=(4, 3, 5)), dtype=torch.float32)
    mask = torch.tensor(rng.random((4, 5)) < 0.6)
    result = nbbn.batch_norm_forward(x, mask=mask)
    assert isinstance(result.out, torch.Tensor)
    assert_same_bits(result.out.numpy(), nbbn.batch_norm_forward(x.numpy(), mask=mask.numpy()).out)
    lengths = torch.tensor([5, 1, 0, 3])
    result = nbbn.batch_norm_forward(x, lengths=lengths)
    assert result.count == 9


# --- the module --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"momentum": None}], ids=str)
def test_module(rng, options):
    bn = nbbn.BatchNorm(3, **options)
    shape = Shape((4, 3, 5))
    for step in range(1, 3):
        x, grad_out = (activations(rng, shape, np.float32) for _ in range(2))
        lengths = np.array([5, 2, 0, 3])
        mask = np.arange(5) < lengths[:, None]
        old = bn.running_mean.copy(), bn.running_var.copy()
        out = bn(x, lengths=lengths)
        assert_same_bits(out, nbbn.batch_norm_forward(x, bn.weight, bn.bias, mask=mask).out)
        expected = reference.forward(_counting(x, mask, 1), axis=0)
        momentum = 1 / step if "momentum" in options else 0.1
        tolerance = reference.mean_tolerance(expected)
        check_running("running_mean", bn.running_mean, old[0], expected.mean, tolerance, momentum)
        new = reference.unbiased(expected.var, 10)
        tolerance = 10 / 9 * reference.var_tolerance(expected, np.float32)
        check_running("running_var", bn.running_var, old[1], new, tolerance, momentum)
        assert int(bn.num_batches_tracked) == step
        grad_x = bn.backward(grad_out)
        _assert_zeros(grad_x, mask, 1)
    evaluated = bn.eval()(x, mask=mask)
    _assert_zeros(evaluated, mask, 1)


def test_renorm(rng):
    """Batch renormalization with a mask is that of what counts."""
    x, grad_out = rng.normal(size=(2, 6, 3, 5))
    mask = np.ones((6, 5), bool)
    mask[4:] = False
    one, other = (nbbn.BatchNorm(3, dtype="float64", renorm=True) for _ in range(2))
    for _ in range(2):
        out = one(x, mask=mask)
        assert np.allclose(out[:4], other(np.ascontiguousarray(x[:4])), rtol=1e-12, atol=1e-12)
        assert np.allclose(one.backward(grad_out)[:4], other.backward(np.ascontiguousarray(grad_out[:4])))
        assert np.allclose(one.grad_weight, other.grad_weight)
        assert np.allclose(one.running_var, other.running_var, rtol=1e-12)


# --- errors ------------------------------------------------------------------------------------------

X = np.arange(60, dtype=np.float32).reshape(4, 3, 5)
ERRORS = [
    ({"mask": np.ones((4, 5))}, TypeError, "mask must be an array of bools, got .*float64"),
    ({"mask": "yes"}, TypeError, "mask must be an array of bools"),
    ({"mask": np.ma.array(np.ones((4, 5), bool))}, TypeError, "mask must be an array of bools"),
    ({"mask": np.ones((4, 3, 5), bool)}, ValueError, r"mask must broadcast to \(4, 5\), .* got \(4, 3, 5\)"),
    ({"mask": np.ones((5, 4), bool)}, ValueError, r"mask must broadcast to \(4, 5\), .* got \(5, 4\)"),
    ({"lengths": [1, 2, 3]}, ValueError, r"lengths must have shape \(4,\), .* got \(3,\)"),
    ({"lengths": [1, 2, 3, 6]}, ValueError, r"lengths must be in \[0, 5\], .* got 1 to 6"),
    ({"lengths": [1, 2, 3, -1]}, ValueError, r"lengths must be in \[0, 5\], .* got -1 to 3"),
    ({"lengths": [1.0, 2, 3, 4]}, TypeError, "lengths must be an array of ints, got float64"),
    (
        {"lengths": [1, 2, 3, 4], "lengths_axis": 1},
        ValueError,
        "lengths_axis must not be the channel axis, got 1",
    ),
    ({"lengths": [1, 2, 3, 4], "lengths_axis": 0}, ValueError, "lengths_axis must not be the samples' axis"),
    ({"lengths": [1, 2, 3, 4], "lengths_axis": 3}, ValueError, r"lengths_axis must be in \[-3, 3\)"),
    ({"lengths": [1, 2, 3, 4], "lengths_axis": 1.5}, TypeError, "lengths_axis must be an int, got float"),
    ({"lengths_axis": 1}, ValueError, "lengths_axis must be None without lengths, got 1"),
    (
        {"lengths_axis": "one", "mask": np.ones((4, 5), bool)},
        ValueError,
        "lengths_axis must be None without lengths, got 'one'",
    ),
    ({"lengths": np.ma.array([1, 2, 3, 4])}, TypeError, "lengths must be an array of ints without a mask"),
    ({"lengths": [1, 2, 3, 4], "mask": np.ones((4, 5), bool)}, ValueError, "mask and lengths must not both"),
]


def test_lengths_need_a_position_that_is_neither_sample_nor_channel():
    x = np.ones((4, 3), np.float32)
    with pytest.raises(ValueError, match=r"^lengths need an x of at least 3 dimensions, got shape \(4, 3\)"):
        nbbn.batch_norm_forward(x, lengths=[1, 0, 1, 1])
    assert nbbn.batch_norm_forward(x, mask=np.array([1, 0, 1, 1], bool)).count == 3


@pytest.mark.parametrize("shape", [(4, 0, 5), (0, 3, 5), (4, 3, 0), (0, 0, 0)], ids=str)
def test_nothing_at_all(shape):
    """Of an empty x, whatever its mask is laid out like."""
    samples, channels, length = shape
    masks = [
        {"mask": np.ones(length, bool)},
        {"mask": np.ones((length, samples), bool).T},
        {"mask": np.ones((samples, length), bool)},
        {"lengths": [length] * samples},
        {"lengths": np.full(samples, length)},
    ]
    if samples == 0:
        masks.append({"mask": np.empty((0, length))})  # what NumPy makes of an empty list
    for x in (np.zeros(shape, np.float32), np.zeros(shape[::-1], np.float32).T):
        for given in masks:
            result = nbbn.batch_norm_forward(x, **given)
            assert result.out.shape == shape and result.count == 0
            stats = nbbn.batch_stats(x, **given)
            assert stats.count == 0 and stats.mean.shape == (channels,)
            out = nbbn.batch_norm(x, np.zeros(channels), np.ones(channels), **given)
            assert out.shape == shape
            gradients = nbbn.batch_norm_backward(x, x, mean=result.mean, invstd=result.invstd, **given)
            assert gradients.x.shape == shape and not gradients.weight.any()


@pytest.mark.parametrize("name", ["mask", "lengths"])
def test_out_is_not_what_says_which_count(rng, name):
    """It would be written over, and a backward pass be told something else."""
    x = rng.normal(size=(8, 6, 9)).astype(np.float32)
    out = np.zeros_like(x)
    if name == "mask":
        given = out.view(np.bool_).reshape(-1)[: 8 * 9].reshape(8, 9)
        given[...] = rng.random((8, 9)) < 0.7
    else:
        given = out.view(np.int32)[:, 0, 0]
        given[...] = 9
    before = out.tobytes()
    mean, var = np.zeros(6), np.ones(6)
    for call in (
        lambda: nbbn.batch_norm_forward(x, out=out, **{name: given}),
        lambda: nbbn.batch_norm(x, mean, var, out=out, **{name: given}),
        lambda: nbbn.batch_norm_backward(x, x, mean=mean, invstd=var, out=out, **{name: given}),
    ):
        with pytest.raises(ValueError, match=f"^out must not overlap {name}, unless it is x itself"):
            call()
    assert out.tobytes() == before


@pytest.mark.parametrize(("given", "error", "message"), ERRORS)
def test_errors(given, error, message):
    mean, var = np.zeros(3), np.ones(3)
    out = np.full_like(X, 7)
    bn = nbbn.BatchNorm(3)
    state = {name: bits(value) for name, value in bn.state_dict().items()}
    with unchanged(X, mean, var, out):
        for call in (
            lambda: nbbn.batch_norm_forward(X, out=out, **given),
            lambda: nbbn.batch_norm(X, mean, var, training=True, out=out, **given),
            lambda: nbbn.batch_norm(X, mean, var, out=out, **given),
            lambda: nbbn.batch_norm_backward(X, X, mean=mean, invstd=var, out=out, **given),
            lambda: nbbn.batch_stats(X, **given),
            lambda: bn(X, **given),
        ):
            with pytest.raises(error, match=f"^{message}"):
                call()
    assert state == {name: bits(value) for name, value in bn.state_dict().items()}


def test_one_value():
    one = np.zeros((4, 5), bool)
    one[2, 3] = True
    bn = nbbn.BatchNorm(3)
    state = {name: bits(value) for name, value in bn.state_dict().items()}
    for call in (
        lambda: nbbn.batch_norm_forward(X, mask=one),
        lambda: nbbn.batch_norm_backward(X, X, mean=np.zeros(3), invstd=np.ones(3), mask=one),
        lambda: bn(X, mask=one),
    ):
        with pytest.raises(ValueError, match=r"^mask must leave more than one value per channel in training"):
            call()
    assert state == {name: bits(value) for name, value in bn.state_dict().items()}
    running = nbbn.BatchNorm(3, single_value="running")
    _assert_zeros(running(X, mask=one), one, 1)
    assert nbbn.batch_stats(X, mask=one).count == 1


def test_no_mask_with_virtual_batches():
    bn = nbbn.BatchNorm(3, virtual_batch_size=2)
    with pytest.raises(ValueError, match=r"^mask and lengths must be None with virtual_batch_size"):
        bn(X, lengths=[5, 5, 5, 5])
    assert int(bn.num_batches_tracked) == 0
