"""Whatever the shape, the axis, the strides, the types and the memory: all results against the oracle."""

import math

import numpy as np
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from numpy.lib.stride_tricks import as_strided

import contract
import nbbn
import reference
from cases import DTYPES, Shape, activations, columns_for, parameter, running_statistics
from checks import (
    assert_same_bits,
    bits,
    check_backward,
    check_evaluation,
    check_forward,
    check_statistics,
    check_training,
    unchanged,
)

TYPES = st.sampled_from(DTYPES)
OPTIONAL_TYPES = st.sampled_from([None, *DTYPES])
WIDE = st.sampled_from([np.float32, np.float64])
MOMENTA = st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.floats(0.0, 1.0))


def fitting(kinds, dtype):
    """Return drawn types of parameters; of 16 bits they can only be x's own."""
    return tuple(k if k is None or k in columns_for(dtype) else dtype for k in kinds)


def examples(factor):
    """So many times as many examples as the profile has: for properties that are soon checked."""
    return settings(max_examples=factor * settings().max_examples)


@st.composite
def shapes(draw, smallest_count=2, largest=40_000):
    """Any rank from 2 to 5, any axis, a length now and then large or 1."""
    length = st.one_of(st.integers(1, 6), st.sampled_from([1, 2, 3, 16, 17, 31, 33, 64, 100]))
    dims = draw(st.lists(length, min_size=2, max_size=5))
    while math.prod(dims) > largest:
        longest = dims.index(max(dims))
        dims[longest] = -(-dims[longest] // 2)
    shape = Shape(tuple(dims), draw(st.integers(-len(dims), len(dims) - 1)))
    assume(shape.count >= smallest_count)
    return shape


@st.composite
def layouts(draw, rank):
    """Any order of the axes in memory, any steps, any direction, within a poisoned buffer."""
    order = draw(st.permutations(range(rank)))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3, -1, -2])) for _ in range(rank)]
    before = [draw(st.integers(0, 2)) for _ in range(rank)]
    shift = draw(st.sampled_from([0, 0, 1, 4, 7]))  # bytes: most of these are unaligned

    def layout(a):
        extents = [b + n * abs(s) for b, n, s in zip(before, a.shape, steps, strict=True)]
        outside = np.ndarray(
            [extents[d] for d in order],
            a.dtype,
            bytearray(int(np.prod(extents)) * a.itemsize + shift),
            shift,
        )
        outside[...] = np.nan
        view = tuple(
            np.s_[b : b + n * s : s] if s > 0 else np.s_[b : b + n * -s : -s]
            for b, n, s in zip(before, a.shape, steps, strict=True)
        )
        back = tuple(np.s_[::-1] if s < 0 else np.s_[:] for s in steps)
        result = outside.transpose(np.argsort(order))[view][back]
        result[...] = a
        return result

    return layout


@st.composite
def numbers(draw):
    """A generator of its own for each example, an offset, and an eps."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    offset = draw(st.sampled_from([0.0, -3.0, 1e3, 1e6]))
    return rng, offset, draw(st.sampled_from([1e-5, 1e-3, 0.1, 1e-12]))


def near(offset, *dtypes):
    """A smaller offset where a type has 16 bits, which could not tell values about the larger ones apart."""
    return offset if all(np.dtype(t).itemsize > 2 for t in dtypes) else min(offset, 30.0)


def laid(draw, a):
    """`a` in any layout, to be written."""
    return None if a is None else draw(layouts(a.ndim))(a)


def read_laid(draw, a):
    """`a` in any layout, to be read: its first values repeated along some axes, or not to be written."""
    if a is None:
        return None
    repeated = draw(st.one_of(st.just(set()), st.sets(st.integers(0, a.ndim - 1))))
    first = a[tuple(np.s_[:1] if d in repeated else np.s_[:] for d in range(a.ndim))]
    result = np.broadcast_to(laid(draw, first), a.shape) if repeated else laid(draw, a)
    result.flags.writeable = not repeated and draw(st.booleans())
    return result


def room(draw, shape, dtype):
    """An output to be written, or None."""
    return laid(draw, np.zeros(shape.dims, dtype)) if draw(st.booleans()) else None


@given(st.data(), shapes(), TYPES, numbers(), st.tuples(*[OPTIONAL_TYPES] * 4), MOMENTA)
def test_training(data, shape, dtype, numbers, types, momentum):
    rng, offset, eps = numbers
    types = fitting(types, dtype)
    x = read_laid(data.draw, activations(rng, shape, dtype, near(offset, dtype)))
    weight, bias = (read_laid(data.draw, parameter(rng, shape.channels, t)) for t in types[:2])
    mean, var = (
        None if t is None else laid(data.draw, v.astype(t))
        for t, v in zip(types[2:], running_statistics(rng, shape.channels, (np.float64,) * 2), strict=True)
    )
    out = room(data.draw, shape, dtype)
    before = bits(mean), bits(var)
    options = {"eps": eps, "axis": shape.axis, "out": out}
    result = check_training(x, mean, var, weight, bias, momentum=momentum, **options)
    if momentum == 0.0:
        assert (bits(mean), bits(var)) == before
    # The same call without running statistics, into the same strides: the same bits.
    first = result.copy()
    forward = check_forward(x, weight, bias, **options)
    assert_same_bits(np.array(forward.out), first)
    if momentum == 1.0 and mean is not None:
        assert_same_bits(mean.copy(), forward.mean.astype(mean.dtype))


@given(st.data(), shapes(), TYPES, numbers(), OPTIONAL_TYPES, st.tuples(WIDE, WIDE), st.booleans())
def test_backward(data, shape, dtype, numbers, weight_type, types, training):
    rng, offset, eps = numbers
    x = read_laid(data.draw, activations(rng, shape, dtype, near(offset, dtype)))
    forward = nbbn.batch_norm_forward(x, eps=eps, axis=shape.axis)
    check_backward(
        read_laid(data.draw, activations(rng, shape, dtype)),
        x,
        read_laid(data.draw, parameter(rng, shape.channels, *fitting([weight_type], dtype))),
        mean=laid(data.draw, forward.mean.astype(types[0])),
        invstd=laid(data.draw, forward.invstd.astype(types[1])),
        axis=shape.axis,
        training=training,
        out=room(data.draw, shape, dtype),
    )


@given(st.data(), shapes(smallest_count=1), TYPES, numbers(), st.tuples(TYPES, TYPES, *[OPTIONAL_TYPES] * 2))
def test_evaluation(data, shape, dtype, numbers, types):
    rng, offset, eps = numbers
    types = fitting(types, dtype)
    offset = near(offset, dtype, types[0])
    x = read_laid(data.draw, activations(rng, shape, dtype, offset))
    mean, var = running_statistics(rng, shape.channels, (np.float64, types[1]))
    check_evaluation(
        x,
        read_laid(data.draw, (mean + offset).astype(types[0])),
        read_laid(data.draw, var),
        *(read_laid(data.draw, parameter(rng, shape.channels, t)) for t in types[2:]),
        eps=eps,
        axis=shape.axis,
        out=room(data.draw, shape, dtype),
    )


@given(st.data(), shapes(smallest_count=1), TYPES, numbers())
def test_stats(data, shape, dtype, numbers):
    rng, offset, _ = numbers
    x = read_laid(data.draw, activations(rng, shape, dtype, near(offset, dtype)))
    check_statistics(nbbn.batch_stats(x, axis=shape.axis), reference.forward(x, axis=shape.axis), dtype)


@given(
    st.data(),
    st.lists(st.integers(0, 5), min_size=2, max_size=5).filter(lambda dims: 0 in dims),
    TYPES,
    st.tuples(*[OPTIONAL_TYPES] * 4),
)
def test_empty(data, dims, dtype, types):
    """Empty outputs, gradients and statistics of 0, and nothing written."""
    types = fitting(types, dtype)
    axis = data.draw(st.integers(-len(dims), len(dims) - 1))
    shape = Shape(tuple(dims), axis)
    x = np.zeros(dims, dtype)
    weight, bias, mean, var = columns = [None if t is None else np.ones(shape.channels, t) for t in types]
    out = data.draw(st.sampled_from([None, x, np.zeros(dims, dtype)]))
    zeros = np.zeros(shape.channels)
    with unchanged(*columns):
        result = nbbn.batch_norm_forward(x, weight, bias, axis=axis, out=out)
        trained = nbbn.batch_norm(x, mean, var, weight, bias, True, 1.0, axis=axis, out=out)
        evaluated = nbbn.batch_norm(x, zeros, zeros, weight, bias, axis=axis, out=out)
        training = data.draw(st.booleans())
        gradients = nbbn.batch_norm_backward(
            x, x, weight, mean=zeros, invstd=zeros, axis=axis, training=training, out=out
        )
        stats = nbbn.batch_stats(x, axis=axis)
    for array in (result.out, trained, evaluated, gradients.x):
        assert (array.shape, array.dtype) == (x.shape, x.dtype)
        assert out is None or array is out
    assert result.count == stats.count == 0 and zeros.tolist() == [0.0] * shape.channels
    for column in (result.mean, result.var, gradients.weight, gradients.bias, *stats[1:]):
        assert_same_bits(column, zeros)


@given(st.data(), shapes(largest=5000), TYPES, numbers(), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_isolation(data, shape, dtype, numbers, poison):
    """One value that is not finite: the other channels keep their bits, in every result."""
    rng, offset, eps = numbers
    x = laid(data.draw, activations(rng, shape, dtype, near(offset, dtype)))
    dy = laid(data.draw, activations(rng, shape, dtype))
    of_dy = data.draw(st.booleans())
    at = tuple(data.draw(st.integers(0, n - 1)) for n in shape.dims)
    channel, axis = at[shape.axis], shape.axis
    stats = running_statistics(rng, shape.channels)

    def results():
        forward = nbbn.batch_norm_forward(x, eps=eps, axis=axis)
        used = {"mean": forward.mean, "invstd": forward.invstd, "axis": axis}
        trained = tuple(v.copy() for v in stats)
        nbbn.batch_norm(x, *trained, training=True, eps=eps, axis=axis)
        evaluated = nbbn.batch_norm(x, *stats, eps=eps, axis=axis)
        gradients = [nbbn.batch_norm_backward(dy, x, **used, training=t) for t in (True, False)]
        whole = (forward.out, evaluated, *(g.x for g in gradients))
        columns = (*forward[1:4], *trained, *(g[1] for g in gradients), *(g[2] for g in gradients))
        return tuple(np.delete(a, channel, axis) for a in whole) + tuple(
            np.delete(v, channel) for v in columns
        )

    clean = results()
    (dy if of_dy else x)[at] = poison
    assert_same_bits(results(), clean)


# --- arguments that share memory -------------------------------------------------------------------


@st.composite
def places(draw, dims, length):
    """Where an activation lies in a buffer: the function that finds it there."""
    order = draw(st.permutations(range(len(dims))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, -1])) for _ in dims]
    if np.prod(dims) * np.prod(np.abs(steps)) > length:
        steps = [int(np.sign(s)) for s in steps]
    extents = [n * abs(s) for n, s in zip(dims, steps, strict=True)]
    size = int(np.prod(extents))
    start = draw(st.one_of(st.integers(0, min(2, length - size)), st.integers(0, length - size)))

    def find(buffer):
        inside = buffer[start : start + size].reshape([extents[d] for d in order])
        return inside.transpose(np.argsort(order))[tuple(np.s_[::s] for s in steps)]

    return find


@st.composite
def column_places(draw, channels, length):
    """Where one number a channel lies in a buffer, at any stride, 0 among them."""
    step = draw(st.sampled_from([1, 1, 2, 3, -1, -2, 0]))
    reach = (channels - 1) * abs(step)
    last = length - 1 - reach
    start = draw(st.one_of(st.integers(0, min(2, last)), st.integers(0, last)))
    start += reach if step < 0 else 0
    return lambda buffer: as_strided(buffer[start:], (channels,), (step * buffer.itemsize,))


FORWARD = ("x", "weight", "bias", "out")
CALLS = {
    "training": ("batch_norm", (*FORWARD, "running_mean", "running_var"), {"training": True}, check_training),
    "evaluation": ("batch_norm", (*FORWARD, "running_mean", "running_var"), {}, check_evaluation),
    "forward": ("batch_norm_forward", FORWARD, {}, check_forward),
    "backward": (
        "batch_norm_backward",
        ("x", "grad_out", "weight", "mean", "invstd", "out"),
        {"training": True},
        check_backward,
    ),
    "backward_of_evaluation": (
        "batch_norm_backward",
        ("x", "grad_out", "weight", "mean", "invstd", "out"),
        {"training": False},
        check_backward,
    ),
}


@pytest.mark.parametrize("call", CALLS)
@given(st.data(), shapes(largest=200), TYPES, st.integers(0, 2**32 - 1))
def test_shared_memory(call, data, shape, dtype, seed):
    """All arguments in one buffer, or some: computed as if each had memory of its own, or refused.

    What is computed has the bits of the same call on arrays of the same strides that share nothing, which
    is held against the oracle; and nothing but `out` and the running statistics is written.
    """
    function, names, options, check = CALLS[call]
    options = options | {"axis": shape.axis}
    size = int(np.prod(shape.dims))
    length = 3 * size + 3 * shape.channels
    shift = data.draw(st.sampled_from([0, 0, 1]))
    memory = np.ndarray(length, dtype, bytearray(length * np.dtype(dtype).itemsize + 8), shift)
    memory[...] = np.random.default_rng(seed).uniform(0.5, 3.0, length)
    start = memory.copy()

    finders, separate = {}, set()
    for name in names:
        if name in ("weight", "bias", "out") and data.draw(st.booleans(), f"no {name}"):
            continue
        is_column = name in contract.COLUMNS
        same = [n for n in finders if (n in contract.COLUMNS) == is_column]
        how = data.draw(st.sampled_from(["shared", "shared", "separate", *same]), name)
        if how in same:
            finders[name] = finders[how]
            separate |= {name} & ({how} & separate)
        else:
            finders[name] = data.draw(
                column_places(shape.channels, length) if is_column else places(shape.dims, length)
            )
        if how == "separate":
            separate.add(name)
    # What is separate keeps its strides, but lies in a copy of the buffer.
    buffers = {name: start.copy() if name in separate else memory for name in finders}
    shared = {name: find(buffers[name]) for name, find in finders.items()}

    arguments = shared | options
    wrong = contract.fault(function, arguments)
    event(wrong or "computed")
    if wrong:
        with unchanged(*buffers.values()), pytest.raises(ValueError):
            getattr(nbbn, function)(**arguments)
        return

    alone = {name: find(start.copy()) for name, find in finders.items()}
    if "out" in shared and contract.overlap(shared["out"], shared["x"]):
        alone["out"] = alone["x"]
    spared = options if check is check_backward else {"axis": shape.axis}
    expected = check(**alone, **spared)
    result = getattr(nbbn, function)(**arguments)
    assert_same_bits(_copied(result), _copied(expected))
    written = [n for n in ("out", "running_mean", "running_var") if n in shared]
    written = written if call == "training" else [n for n in written if n == "out"]
    for name in written:
        assert_same_bits(shared[name].copy(), alone[name].copy())
    for name, buffer in buffers.items():
        for other in written:
            if buffers[other] is buffer:
                finders[other](buffer)[...] = finders[other](start)
        assert bits(buffer) == bits(start), f"something beside {written} was written, in {name}'s memory"


def _copied(result):
    """A result whose arrays lie in order."""
    if isinstance(result, tuple):
        return tuple(map(_copied, result))
    return result.copy() if isinstance(result, np.ndarray) else result
