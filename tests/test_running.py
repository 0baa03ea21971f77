"""Running statistics: what batch_norm and BatchNorm track over training."""

import numpy as np
import pytest

import nbbn
import reference
from cases import (
    DTYPES,
    FEW_VALUES,
    VECTOR_LAYOUTS,
    Shape,
    activations,
    channels_last,
    columns_for,
    parameter,
    running_statistics,
    type_id,
)
from checks import assert_same_bits, bits, check_training, unchanged

SHAPE = Shape((4, 5, 7))


@pytest.mark.parametrize(
    "types, dtype", [((a, b), d) for d in DTYPES for a in columns_for(d) for b in columns_for(d)], ids=type_id
)
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
def test_update(rng, momentum, types, dtype):
    """Biased variance normalizes, unbiased is tracked; each in the type of its buffer."""
    x = activations(rng, SHAPE, dtype, offset=3)
    check_training(x, *running_statistics(rng, 5, types), momentum=momentum)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
@pytest.mark.parametrize("shape", [s for s in FEW_VALUES if s.axis == 1], ids=str)
def test_few_values(rng, shape, dtype):
    """m / (m - 1) is 2 for two values, and 1.5 for three."""
    x = activations(rng, shape, dtype)
    check_training(x, *running_statistics(rng, shape.channels), momentum=0.3)


def test_channels_last(rng):
    x = channels_last(activations(rng, Shape((40, 65, 30, 3)), np.float32))
    check_training(x, *running_statistics(rng, 65), momentum=0.3)


@pytest.mark.parametrize("given", ["mean", "var"])
def test_one_without_the_other(rng, given):
    x = activations(rng, SHAPE, np.float32)
    mean, var = running_statistics(rng, 5)
    check_training(x, mean if given == "mean" else None, var if given == "var" else None, momentum=0.1)


def test_output_does_not_depend_on_them(rng):
    x = activations(rng, SHAPE, np.float32)
    out = check_training(x, *running_statistics(rng, 5), momentum=0.1)
    assert_same_bits(out, nbbn.batch_norm_forward(x).out)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, None], ids=str)
def test_momentum_zero_keeps_every_bit(rng, poison):
    """Also for a batch of NaN; and of the statistics that were there: -0.0, NaN, subnormals."""
    x = activations(rng, SHAPE, np.float32)
    if poison is not None:
        x[0, 1, 2] = poison
    mean = np.array([-0.0, np.nan, 5e-324, np.inf, 1.0])
    var = np.array([-0.0, np.nan, 1e-45, np.inf, 1.0], np.float32)
    with unchanged(mean, var):
        nbbn.batch_norm(x, mean, var, training=True, momentum=0.0)


@pytest.mark.parametrize("old", [np.nan, np.inf, 1e300])
def test_momentum_one_replaces(rng, old):
    """Whatever was there: (1 - momentum) · old would be NaN for a NaN or an inf."""
    x = activations(rng, SHAPE, np.float64)
    mean, var = np.full(5, old), np.full(5, old)
    nbbn.batch_norm(x, mean, var, training=True, momentum=1.0)
    result = nbbn.batch_norm_forward(x)
    assert_same_bits(mean, result.mean)
    unbiased = result.var * 28 / 27
    np.testing.assert_allclose(var, unbiased, rtol=2**-51)  # two roundings, in either order


@pytest.mark.parametrize("layout", [n for n in VECTOR_LAYOUTS if n not in ("read_only", "broadcast")])
def test_buffers_of_any_stride_are_updated(rng, layout):
    """Where they lie, and not in a copy; their neighbours keep their bits."""
    x = activations(rng, SHAPE, np.float32)
    mean, var = (VECTOR_LAYOUTS[layout](v) for v in running_statistics(rng, 5))
    check_training(x, mean, var, momentum=0.25)


def test_neighbours_in_a_buffer_are_left(rng):
    x = activations(rng, SHAPE, np.float32)
    buffer = rng.normal(size=(2, 12))
    mean, var = buffer[0, 1:11:2], buffer[1, 10:0:-2]
    var[...] = np.abs(var)
    others = np.r_[buffer[0, ::2], buffer[1, 1::2], buffer[:, 11], buffer[1, 0]].copy()
    check_training(x, mean, var, momentum=0.25)
    now = np.r_[buffer[0, ::2], buffer[1, 1::2], buffer[:, 11], buffer[1, 0]]
    assert_same_bits(now, others)


@pytest.mark.parametrize("parameter_name", ["weight", "bias"])
@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_a_buffer_that_is_also_a_parameter(rng, statistic, parameter_name):
    """Statistics are written last: the output is computed with the parameter as it was."""
    x = activations(rng, SHAPE, np.float32)
    shared = rng.uniform(0.5, 2.0, size=5).astype(np.float32)
    old = shared.copy()
    arguments = {statistic: shared, parameter_name: shared}
    out = nbbn.batch_norm(x, training=True, momentum=0.5, **arguments)
    assert_same_bits(out, nbbn.batch_norm_forward(x, **{parameter_name: old}).out)
    alone = old.copy()
    nbbn.batch_norm(x, training=True, momentum=0.5, **{statistic: alone})
    assert_same_bits(shared, alone)


@pytest.mark.parametrize("momentum", [0.1, 1.0])
def test_constant_batches_converge_without_error(momentum):
    """(1 - momentum) · old + momentum · new, where both are equal, may round but not drift."""
    x = np.full((4, 2, 3), 0.1, np.float64)
    mean, var = np.full(2, 0.1), np.zeros(2)
    for _ in range(100):
        nbbn.batch_norm(x, mean, var, training=True, momentum=momentum)
    np.testing.assert_allclose(mean, 0.1, rtol=100 * 2**-53)
    assert var.tolist() == [0.0, 0.0]


def test_cumulative_average(rng):
    """momentum=None: the running statistics are the mean of those of all batches so far."""
    bn = nbbn.BatchNorm(5, momentum=None, dtype="float64")
    means, variances = [], []
    for count in range(1, 6):
        x = activations(rng, SHAPE, np.float64, offset=count)
        bn(x)
        expected = reference.forward(x)
        means.append(expected.mean.rounded()[:, 0])
        variances.append(reference.unbiased(expected.var, 28).rounded()[:, 0])
        assert bn.num_batches_tracked == count
        # Five updates of a few roundings each, of numbers below 10.
        np.testing.assert_allclose(bn.running_mean, np.mean(means, 0), rtol=0, atol=1e-14)
        np.testing.assert_allclose(bn.running_var, np.mean(variances, 0), rtol=1e-14)


@pytest.mark.parametrize("correction", [0, 1, 2, 0.5])
def test_correction(rng, correction):
    """running_var tracks var · m / (m - correction)."""
    x = activations(rng, SHAPE, np.float64)
    bn = nbbn.BatchNorm(5, momentum=1.0, correction=correction, dtype="float64")
    bn(x)
    var = reference.unbiased(reference.forward(x).var, 28, correction).rounded()[:, 0]
    np.testing.assert_allclose(bn.running_var, var, rtol=1e-14)  # c u = 9 u, and three roundings


def test_empty_batch_changes_nothing(rng):
    for momentum in (0.1, 1.0, None):
        bn = nbbn.BatchNorm(3, momentum=momentum)
        bn(activations(rng, Shape((4, 3)), np.float32))
        with unchanged(bn.running_mean, bn.running_var):
            bn(np.zeros((0, 3), np.float32))
        assert np.isfinite(bn.running_mean).all()


def test_same_buffers_over_many_batches(rng):
    """An exponential average of 20 batches, in float32 as PyTorch keeps it."""
    mean, var = np.zeros(5, np.float32), np.ones(5, np.float32)
    for _ in range(20):
        check_training(activations(rng, SHAPE, np.float32), mean, var, momentum=0.1)
    assert bits(mean) != bits(np.zeros(5, np.float32))
    evaluated = nbbn.batch_norm(parameter(rng, 20, np.float32).reshape(4, 5), mean, var)
    assert np.isfinite(evaluated).all()
