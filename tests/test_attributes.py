"""Attributes that were set to something else: honoured, or refused before anything is written."""

import threading

import numpy as np
import pytest

import nbbn
from checks import assert_same_bits, unchanged

COUNTS = pytest.mark.parametrize("module", ["BatchNorm", "InstanceNorm"])


def made(module, **options):
    track = {} if module == "BatchNorm" else {"track_running_stats": True, "affine": True}
    return getattr(nbbn, module)(2, **track | options)


def batches(rng, number=4):
    return [rng.normal(5 + k, 1, (6, 2, 3)).astype(np.float32) for k in range(number)]


def state_of(module):
    return {name: value.tobytes() for name, value in module.state_dict().items()}


@COUNTS
@pytest.mark.parametrize("momentum", [None, 0.25])
def test_a_counter_that_was_set_counts_on(rng, module, momentum):
    """Whatever the same number comes in: also what arithmetic with a 0-d array makes of it."""
    torch = pytest.importorskip("torch")
    first, *others = batches(rng)
    plain = made(module, momentum=momentum)
    same = [made(module, momentum=momentum) for _ in range(6)]
    for norm in (plain, *same):
        norm(first)
    for norm, value in zip(
        same,
        (
            1,
            np.int64(1),
            np.float32(1),
            np.array(1, np.int32),
            torch.tensor(1),
            same[-1].num_batches_tracked + 0,
        ),
        strict=True,
    ):
        norm.num_batches_tracked = value
    same[0].num_batches_tracked -= 1
    same[0].num_batches_tracked += 1
    for norm in (plain, *same):
        for x in others:
            norm(x)
        assert isinstance(norm.num_batches_tracked, np.ndarray)
        assert norm.num_batches_tracked == 4 and norm.num_batches_tracked.dtype == np.int64
    for norm in same:
        assert state_of(norm) == state_of(plain)
        norm.load_state_dict(made(module).state_dict())
        assert norm.num_batches_tracked == 0


@COUNTS
def test_a_counter_is_kept_where_it_can_be_counted_in(rng, module):
    norm, counter = made(module), np.array(3)
    norm.num_batches_tracked = counter
    norm(batches(rng)[0])
    assert norm.num_batches_tracked is counter and counter == 4


@COUNTS
@pytest.mark.parametrize(
    "value, error",
    [
        (-1, ValueError),
        (1.5, ValueError),
        (1 << 63, (ValueError, TypeError)),
        ("1", TypeError),
        ([1], ValueError),
    ],
)
def test_a_counter_is_checked(module, value, error):
    norm = made(module)
    norm.num_batches_tracked = 7
    with pytest.raises(error, match=r"^num_batches_tracked must be"):
        norm.num_batches_tracked = value
    assert norm.num_batches_tracked == 7


@COUNTS
def test_without_a_counter(rng, module):
    """Running statistics need none, with a momentum; a cumulative average does."""
    x = batches(rng)[0]
    norm, plain = made(module), made(module)
    norm.num_batches_tracked = None
    norm(x), plain(x)
    assert list(norm.state_dict()) == ["weight", "bias", "running_mean", "running_var"]
    for name in ("running_mean", "running_var"):
        assert getattr(norm, name).tobytes() == getattr(plain, name).tobytes()
    norm.momentum = None
    with (
        unchanged(norm.running_mean, norm.running_var),
        pytest.raises(ValueError, match=r"^momentum must be"),
    ):
        norm(x)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_loading_into_what_is_read_only(name):
    norm = nbbn.BatchNorm(2)
    setattr(norm, name, np.broadcast_to(np.float32(3), 2))
    before = state_of(norm)
    state = {key: value + 1 for key, value in norm.state_dict().items()}
    with pytest.raises(ValueError, match=f"^{name} of this module must be writable"):
        norm.load_state_dict(state)
    assert state_of(norm) == before


def test_columns_of_another_library(rng):
    """They are used, updated, saved and loaded into where they are."""
    torch = pytest.importorskip("torch")
    norm, plain = nbbn.BatchNorm(2), nbbn.BatchNorm(2)
    for name in ("weight", "bias", "running_mean", "running_var"):
        setattr(norm, name, torch.from_numpy(getattr(norm, name).copy()))
    kept = norm.running_mean
    for x in batches(rng):
        assert norm(x).tobytes() == plain(x).tobytes()
    norm(x, update_running_stats=False), norm.eval()(x)
    assert state_of(norm) == state_of(plain)
    norm.load_state_dict(nbbn.BatchNorm(2).state_dict())
    assert norm.running_mean is kept and (kept == 0).all()
    norm.calibrate(batches(rng)), plain.calibrate(batches(rng, 1))
    assert norm.running_mean is kept and (kept != 0).all()


def test_tracking_that_was_turned_on(rng):
    """There are no running statistics yet: a batch's own are used, as in PyTorch, until there are some."""
    x = batches(rng)[0]
    norm, plain = nbbn.BatchNorm(2, track_running_stats=False), nbbn.BatchNorm(2)
    norm.track_running_stats = True
    expected = plain(x).tobytes()
    assert norm(x).tobytes() == norm.eval()(x).tobytes() == expected
    assert norm(x, update_running_stats=False).tobytes() == expected
    with pytest.raises(ValueError, match="running statistics"):
        norm.calibrate([x])
    norm.reset_running_stats()
    norm.train()(x)
    assert state_of(norm) == state_of(plain)


@COUNTS
def test_tracking_that_was_turned_off(rng, module):
    """The statistics stay as they are, also where they are reset."""
    x, y = batches(rng, 2)
    norm = made(module)
    norm(x)
    before = state_of(norm)
    norm.track_running_stats = False
    norm(y), norm.eval()(y)
    norm.reset_running_stats()
    assert state_of(norm) == before


def test_instances_that_are_no_longer_tracked_are_normalized_by_themselves(rng):
    x, y = batches(rng, 2)
    norm = made("InstanceNorm")
    norm(x)
    norm.track_running_stats = False
    assert norm.eval()(y).tobytes() == nbbn.instance_norm(y).tobytes()
    dy = np.ones_like(y)
    gradient = nbbn.instance_norm_forward(y)
    expected = nbbn.instance_norm_backward(dy, y, mean=gradient.mean, invstd=gradient.invstd)
    assert norm.backward(dy).tobytes() == expected.x.tobytes()


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_one_running_statistic_is_not_enough(rng, name):
    norm = nbbn.BatchNorm(2).eval()
    setattr(norm, name, None)
    with pytest.raises(ValueError, match=f"^{name} must be given"):
        norm(batches(rng)[0])


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_one_running_statistic_alone_is_tracked(rng, name):
    """Where evaluation, folding and renormalization need both, they say so."""
    x = batches(rng)[0]
    plain, norm = nbbn.BatchNorm(2), nbbn.BatchNorm(2, nonfinite="skip")
    setattr(norm, name, None)
    norm(x), plain(x)
    left = "running_var" if name == "running_mean" else "running_mean"
    assert_same_bits(getattr(norm, left), getattr(plain, left))
    assert norm.num_batches_tracked == 1
    with pytest.raises(ValueError, match=r"^bn must have running statistics"):
        nbbn.fold(np.ones((2, 3)), None, norm)
    before = state_of(norm)
    norm.renorm = True
    with pytest.raises(ValueError, match=r"^renorm needs both running_mean and running_var, got None"):
        norm(x)
    assert state_of(norm) == before


def test_a_correction_of_all_values_where_no_variance_is_tracked():
    norm = nbbn.BatchNorm(2, correction=2, nonfinite="skip")
    norm.running_var = None
    norm(np.array([[1.0, 2.0], [3.0, 4.0]]))
    assert norm.num_batches_tracked == 1
    np.testing.assert_allclose(norm.running_mean, [0.2, 0.3], rtol=1e-6)


@COUNTS
def test_a_module_that_tracks_nothing_does_not_wait(rng, module):
    """For another thread's call: it writes nothing that the two have in common."""
    norm, x = getattr(nbbn, module)(2, track_running_stats=False), batches(rng)[0]
    expected, results = norm(x), []
    thread = threading.Thread(target=lambda: results.append(norm(x)))
    with norm._lock:
        thread.start()
        thread.join(60)
    assert_same_bits(results[0], expected)
