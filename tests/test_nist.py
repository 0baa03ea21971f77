"""NIST's reference data sets for univariate statistics (StRD), which some libraries get wrong."""

import numpy as np
import pytest

import nbbn
import reference
from bank import MAVRO, NIST, SIDE_BY_SIDE, nist_side_by_side, simulated
from cases import LAYOUTS, permutations, type_id
from checks import bits, check_forward
from reference import unit

NIST_TYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=type_id)


def assert_certified(stats, c, certified, count, dtype):
    """The mean is held to two units of float64, the variance to the depth of its sum."""
    mean, var = certified[dtype]
    u, depth = unit(np.float64), reference.depth(count)
    assert abs(stats.mean[c] - mean) <= 4 * u * mean
    assert abs(stats.var[c] - var) <= depth * unit(dtype) * var + (depth * u * mean) ** 2


@NIST_TYPES
@pytest.mark.parametrize("name", NIST)
def test_nist_sets(name, dtype):
    data, certified = NIST[name]
    for x in (np.array(data, dtype)[:, None], np.array(data, dtype)[None, None]):
        assert_certified(nbbn.batch_stats(x), 0, certified, len(data), dtype)


def test_nist_mavro():
    """Certified to 15 digits for decimals that round when stored: s to 1e-9 relative, at mean / s 5e3."""
    stats = nbbn.batch_stats(np.array(MAVRO)[:, None])
    assert len(MAVRO) == stats.count == 50
    assert abs(stats.mean[0] - 2.001856) <= 1e-15
    s = np.sqrt(stats.var[0] * 50 / 49)
    assert abs(s - 0.000429123454003053) <= 1e-9 * s


@NIST_TYPES
@pytest.mark.parametrize("layout", LAYOUTS | permutations(4))
def test_nist_sets_side_by_side(layout, dtype):
    x = (LAYOUTS | permutations(4))[layout](nist_side_by_side(dtype))
    result = check_forward(x)
    for c, name in enumerate(SIDE_BY_SIDE):
        assert_certified(result, c, NIST[name][1], 1001, dtype)
    if dtype is np.float32:
        assert bits(result.out[:, 2]) == bits(np.zeros((7, 11, 13), dtype))  # a constant, as stored


def test_cuda(python, seed):
    pytest.importorskip("greenlet")
    simulated(python, seed, "nist()")
