"""The other normalizations, whatever the shape, the groups, the axis, the strides and the types."""

import math

import numpy as np
from hypothesis import assume, event, given
from hypothesis import strategies as st

import nbbn
from cases import running_statistics
from checks import assert_same_bits, bits
from family import NORMS, Case, check, check_backward, check_forward, check_updates
from test_properties import (
    MOMENTA,
    OPTIONAL_TYPES,
    TYPES,
    WIDE,
    fitting,
    laid,
    near,
    numbers,
    read_laid,
)


@st.composite
def cases(draw, norms=NORMS, smallest_count=1, largest=2000):
    """Any rank that there is, a length now and then large or 1; any axis, any number of groups."""
    norm = draw(st.sampled_from(norms))
    least = {"layer": 1, "rms": 1, "instance": 3, "group": 2}[norm]
    length = st.one_of(st.integers(1, 6), st.sampled_from([1, 2, 3, 16, 17, 31, 33, 64, 100]))
    dims = draw(st.lists(length, min_size=least, max_size=5))
    while math.prod(dims) > largest:
        longest = dims.index(max(dims))
        dims[longest] = -(-dims[longest] // 2)
    option, axis = 1, 1
    if norm in ("layer", "rms"):
        option = draw(st.integers(1, len(dims)))
    else:
        axis = draw(st.integers(-len(dims), len(dims) - 1))
    if norm == "group":
        option = draw(st.sampled_from([g for g in range(1, dims[axis] + 1) if dims[axis] % g == 0]))
    case = Case(norm, tuple(dims), option, axis)
    assume(case.count >= (2 if norm == "instance" else smallest_count))
    event(f"{norm}, {'one value' if case.count == 1 else 'several'}")
    return case


def room(draw, case, dtype):
    """An output to be written, or None."""
    return laid(draw, np.zeros(case.dims, dtype)) if draw(st.booleans()) else None


def parameters(draw, rng, case, kinds):
    """A weight and a bias of these types, or None, in any layout."""
    weight, bias = (read_laid(draw, case.parameter(rng, kind)) for kind in kinds)
    return weight, None if case.norm == "rms" else bias


@given(st.data(), cases(), TYPES, numbers(), st.tuples(*[OPTIONAL_TYPES] * 2))
def test_all(data, case, dtype, numbers, kinds):
    rng, offset, eps = numbers
    x = read_laid(data.draw, case.data(rng, dtype, near(offset, dtype)))
    dy = read_laid(data.draw, case.data(rng, dtype))
    given = parameters(data.draw, rng, case, fitting(kinds, dtype))
    check(case, x, dy, *given, eps=eps, out=room(data.draw, case, dtype))


@given(st.data(), cases(), TYPES, numbers(), st.tuples(*[OPTIONAL_TYPES] * 2))
def test_in_place(data, case, dtype, numbers, kinds):
    """Over x, in any layout that can be written."""
    rng, offset, eps = numbers
    x = laid(data.draw, case.data(rng, dtype, near(offset, dtype)))
    given = parameters(data.draw, rng, case, fitting(kinds, dtype))
    kept, plain = x.copy(order="K"), x.copy()
    forward = check_forward(case, x, *given, eps=eps, out=x)
    used = {"mean": forward.mean, "invstd": forward.invstd}
    x[...] = plain
    dy = read_laid(data.draw, case.data(rng, dtype))
    gradients = check_backward(case, dy, x, given[0], out=x, **used)
    beside = case.backward(dy, kept, given[0], out=np.empty_like(kept), **used)
    if kept.strides == x.strides:
        assert_same_bits(np.array(gradients.x), np.array(beside.x))


@given(st.data(), cases(), TYPES, numbers(), OPTIONAL_TYPES, st.tuples(WIDE, WIDE))
def test_backward_with_any_statistics(data, case, dtype, numbers, kind, types):
    """In any layout, of any type, and not x's own."""
    rng, _, _ = numbers
    shape = case.rows.statistics
    mean, invstd = rng.normal(size=shape).astype(types[0]), rng.uniform(0.5, 2, shape).astype(types[1])
    check_backward(
        case,
        read_laid(data.draw, case.data(rng, dtype)),
        read_laid(data.draw, case.data(rng, dtype)),
        read_laid(data.draw, case.parameter(rng, *fitting([kind], dtype))),
        mean=read_laid(data.draw, mean) if shape else mean,
        invstd=read_laid(data.draw, invstd) if shape else invstd,
        out=room(data.draw, case, dtype),
    )


@given(st.data(), cases(["instance"]), TYPES, numbers(), st.tuples(*[OPTIONAL_TYPES] * 4), MOMENTA)
def test_running_statistics(data, case, dtype, numbers, kinds, momentum):
    rng, offset, eps = numbers
    kinds = fitting(kinds, dtype)
    x = read_laid(data.draw, case.data(rng, dtype, near(offset, dtype)))
    given = parameters(data.draw, rng, case, kinds[:2])
    drawn = running_statistics(rng, case.channels, (np.float64,) * 2)
    mean, var = (
        None if k is None else laid(data.draw, v.astype(k)) for k, v in zip(kinds[2:], drawn, strict=True)
    )
    before = bits(mean), bits(var)
    options = {"eps": eps, "out": room(data.draw, case, dtype)}
    out = check_updates(case, x, mean, var, *given, momentum=momentum, **options)
    if momentum == 0.0:
        assert (bits(mean), bits(var)) == before
    alone = nbbn.instance_norm(x, None, None, *given, eps=eps, axis=case.axis, out=options["out"])
    assert_same_bits(np.array(alone), np.array(out))


@given(st.data(), cases(largest=500), TYPES, numbers(), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_isolation(data, case, dtype, numbers, poison):
    """One value that is not finite: the other rows keep their bits; and so do the parameters not theirs."""
    rng, offset, eps = numbers
    x = laid(data.draw, case.data(rng, dtype, near(offset, dtype)))
    dy = laid(data.draw, case.data(rng, dtype))
    weight, of = case.parameter(rng, np.float32), case.rows
    row = data.draw(st.integers(0, len(of.places) - 1))
    place = of.places[row, data.draw(st.integers(0, case.count - 1))]

    def results():
        forward = case.forward(x, weight, eps=eps)
        gradients = case.backward(dy, x, weight, mean=forward.mean, invstd=forward.invstd)
        touched = np.unique(of.owners[row])
        return (
            *(np.delete(of.of(a), row, 0) for a in (forward.out, gradients.x)),
            *(np.delete(a.reshape(-1), row) for a in forward[1:4]),
            *(np.delete(a.reshape(-1), touched) for a in gradients[1:] if a is not None),
        )

    clean = results()
    spoilt = data.draw(st.sampled_from([x, dy]))
    spoilt[np.unravel_index(place, case.dims)] = poison
    with np.errstate(all="ignore"):
        assert_same_bits(results(), clean)


@given(
    st.data(),
    st.sampled_from(NORMS),
    st.lists(st.integers(0, 4), min_size=3, max_size=5).filter(lambda dims: 0 in dims),
    TYPES,
)
def test_empty(data, norm, dims, dtype):
    """Empty outputs, gradients and statistics of 0."""
    axis = data.draw(st.integers(-len(dims), len(dims) - 1))
    option = 1
    if norm in ("layer", "rms"):
        option, axis = data.draw(st.integers(1, len(dims))), 1
    elif norm == "group":
        assume(dims[axis] > 0)
        option = data.draw(st.sampled_from([g for g in range(1, dims[axis] + 1) if dims[axis] % g == 0]))
    case = Case(norm, tuple(dims), option, axis)
    x, zeros = np.zeros(dims, dtype), np.zeros(case.rows.statistics)
    out = data.draw(st.sampled_from([None, x, np.zeros(dims, dtype)]))
    result = case.forward(x, out=out)
    gradients = case.backward(x, x, mean=zeros, invstd=zeros, out=out)
    for array in (result.out, case.call(x, out=out), gradients.x):
        assert (array.shape, array.dtype) == (x.shape, x.dtype)
        assert out is None or array is out
    assert result.count == 0
    assert_same_bits((result.mean, result.var), (zeros, zeros))
    for gradient in gradients[1:]:
        assert gradient is None or bits(gradient) == bits(np.zeros(case.parameters))
