"""Whatever the shape, the axis, the strides and the types: all the results, against the oracle."""

import numpy as np
from hypothesis import assume, given
from hypothesis import strategies as st

import nbbn
import reference
from cases import DTYPES, Shape, activations, parameter, running_statistics
from checks import assert_same_bits, check_backward, check_evaluation, check_forward, check_statistics

OPTIONAL_TYPES = st.sampled_from([None, np.float32, np.float64])
TYPES = st.sampled_from(DTYPES)


@st.composite
def shapes(draw, smallest_count=2):
    """Any rank from 2 to 5, any axis, a length now and then large or 1."""
    length = st.one_of(st.integers(1, 6), st.sampled_from([1, 2, 3, 16, 17, 31, 33, 64, 100]))
    dims = tuple(draw(st.lists(length, min_size=2, max_size=5)))
    assume(np.prod(dims) <= 40_000)
    shape = Shape(dims, draw(st.integers(-len(dims), len(dims) - 1)))
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


def laid(draw, a):
    return draw(layouts(a.ndim))(a)


@given(st.data(), shapes(), TYPES, numbers(), OPTIONAL_TYPES, OPTIONAL_TYPES, st.booleans())
def test_training(data, shape, dtype, numbers, weight_type, bias_type, into):
    rng, offset, eps = numbers
    x = laid(data.draw, activations(rng, shape, dtype, offset))
    weight = parameter(rng, shape.channels, weight_type)
    bias = parameter(rng, shape.channels, bias_type)
    out = laid(data.draw, np.zeros(shape.dims, dtype)) if into else None
    result = check_forward(x, weight, bias, eps=eps, axis=shape.axis, out=out)
    # The same call with running statistics, into the same strides: the same bits.
    first = result.out.copy()
    mean, var = running_statistics(rng, shape.channels, (np.float64, np.float64))
    again = nbbn.batch_norm(x, mean, var, weight, bias, True, 1.0, eps, axis=shape.axis, out=out)
    assert_same_bits(np.array(again), first)
    assert_same_bits(mean, result.mean)


@given(st.data(), shapes(), TYPES, numbers(), OPTIONAL_TYPES, st.booleans(), st.booleans())
def test_backward(data, shape, dtype, numbers, weight_type, training, into):
    rng, offset, eps = numbers
    x = laid(data.draw, activations(rng, shape, dtype, offset))
    dy = laid(data.draw, activations(rng, shape, dtype))
    forward = nbbn.batch_norm_forward(x, eps=eps, axis=shape.axis)
    check_backward(
        dy,
        x,
        parameter(rng, shape.channels, weight_type),
        mean=forward.mean,
        invstd=forward.invstd,
        axis=shape.axis,
        training=training,
        out=laid(data.draw, np.zeros(shape.dims, dtype)) if into else None,
    )


@given(
    st.data(),
    shapes(smallest_count=1),
    TYPES,
    numbers(),
    st.tuples(TYPES, TYPES),
    OPTIONAL_TYPES,
    OPTIONAL_TYPES,
    st.booleans(),
)
def test_evaluation(data, shape, dtype, numbers, types, weight_type, bias_type, into):
    rng, offset, eps = numbers
    x = laid(data.draw, activations(rng, shape, dtype, offset))
    mean, var = running_statistics(rng, shape.channels, types)
    check_evaluation(
        x,
        (mean + offset).astype(types[0]),
        var,
        parameter(rng, shape.channels, weight_type),
        parameter(rng, shape.channels, bias_type),
        eps=eps,
        axis=shape.axis,
        out=laid(data.draw, np.zeros(shape.dims, dtype)) if into else None,
    )


@given(st.data(), shapes(smallest_count=1), TYPES, numbers())
def test_stats(data, shape, dtype, numbers):
    rng, offset, _ = numbers
    x = laid(data.draw, activations(rng, shape, dtype, offset))
    check_statistics(nbbn.batch_stats(x, axis=shape.axis), reference.forward(x, axis=shape.axis), dtype)
