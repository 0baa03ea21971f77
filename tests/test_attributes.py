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


# --- columns that are another's --------------------------------------------------------------------


@pytest.mark.parametrize("case", ["evaluation", "frozen", "renorm", "instances", "fold"])
def test_columns_of_bfloat16_of_another_library(rng, case):
    """Its numbers are read, not its bits."""
    torch = pytest.importorskip("torch")
    columns = {
        "running_mean": [1.0, -2.0],
        "running_var": [1.5, 4.0],
        "weight": [3.0, 0.5],
        "bias": [1.0, -1.0],
    }
    x, dy = (torch.tensor(rng.normal(size=(4, 2, 3))).bfloat16() for _ in range(2))
    results = []
    for kind in (lambda values: torch.tensor(values).bfloat16(), lambda values: np.array(values, np.float32)):
        norm = made("InstanceNorm" if case == "instances" else "BatchNorm")
        for name, values in columns.items():
            setattr(norm, name, kind(values))
        if case == "fold":
            results.append(nbbn.fold(np.eye(2), None, norm))
            continue
        if case == "renorm":
            norm.renorm = True
        elif case == "frozen":
            norm.freeze()
        else:
            norm.eval()
        update = {} if case == "instances" else {"update_running_stats": False}
        results.append((norm(x, **update).float().numpy(), norm.backward(dy).float().numpy()))
    assert_same_bits(tuple(results[0]), tuple(results[1]))


@pytest.mark.parametrize("what", ["training", "options", "instances", "calibrate", "load"])
def test_a_counter_that_cannot_be_written_to(rng, what):
    """It is an error before anything is written."""
    x = batches(rng)[0]
    norm = made("InstanceNorm" if what == "instances" else "BatchNorm")
    state = {name: value + 1 for name, value in norm.state_dict().items()}
    norm.num_batches_tracked.flags.writeable = False
    if what == "options":
        norm.nonfinite = "skip"
    calls = {"calibrate": lambda: norm.calibrate([x]), "load": lambda: norm.load_state_dict(state)}
    before = state_of(norm)
    with pytest.raises(ValueError, match=r"^num_batches_tracked of this module must be writable"):
        calls.get(what, lambda: norm(x))()
    assert state_of(norm) == before


def test_a_counter_that_counts_no_further(rng):
    """Its state can be loaded again."""
    norm = made("BatchNorm")
    norm.num_batches_tracked = 2**62
    norm(batches(rng)[0])
    norm.load_state_dict(norm.state_dict())
    assert norm.num_batches_tracked == 2**62


BAD_COLUMNS = {
    "longer": (np.ones(3, np.float32), ValueError, r"must have shape \(2,\)"),
    "shorter": (np.ones(1, np.float32), ValueError, r"must have shape \(2,\)"),
    "one number": (np.array(1.0), ValueError, r"must have shape \(2,\)"),
    "a row": (np.ones((1, 2)), ValueError, r"must have shape \(2,\)"),
    "int": (np.ones(2, np.int32), TypeError, "float32"),
    "the other byte order": (np.ones(2, ">f4"), TypeError, "float32"),
}


@pytest.mark.parametrize("name", ["weight", "running_mean", "running_var"])
@pytest.mark.parametrize("bad", BAD_COLUMNS)
def test_columns_that_do_not_fit(rng, name, bad):
    """Whoever uses them, or writes to them, says so, and writes nothing."""
    column, error, says = BAD_COLUMNS[bad]
    x, norm = batches(rng)[0], made("BatchNorm")
    setattr(norm, name, column)
    state = norm.state_dict()
    calls = [lambda: nbbn.fold(np.ones((2, 3)), None, norm), lambda: norm(x)]
    if name != "weight":
        calls.append(lambda: norm.calibrate([x]))
    if error is ValueError:
        calls.append(lambda: norm.load_state_dict(state))
    before = state_of(norm)
    for call in calls:
        with pytest.raises(error, match=f"^(state.*)?{name}.*{says}"):
            call()
    norm.renorm = True
    with pytest.raises(error, match=f"^{name}.*{says}"):
        norm(x)
    assert state_of(norm) == before


def test_statistics_that_are_one_array(rng):
    norm = made("BatchNorm")
    norm.running_var = norm.running_mean
    for call in (lambda: norm(batches(rng)[0]), lambda: norm.calibrate(batches(rng))):
        with pytest.raises(ValueError, match=r"^running_var must not overlap running_mean"):
            call()
    assert (norm.running_mean == 0).all()


@pytest.mark.parametrize("eps", [-1.0, np.nan, "none"])
def test_an_eps_that_is_none(eps):
    norm = made("BatchNorm")
    norm.eps = eps
    with pytest.raises((TypeError, ValueError), match=r"^eps must be"):
        nbbn.fold(np.ones((2, 3)), None, norm)


def test_a_dtype_that_was_set(rng):
    """Gradients have it from then on."""
    norm = made("BatchNorm")
    norm.dtype = "f8"
    norm(batches(rng)[0])
    norm.backward(batches(rng)[0])
    assert norm.dtype == norm.grad_weight.dtype == np.float64
    with pytest.raises(TypeError, match=r"^dtype must be float32"):
        norm.dtype = "i4"
    assert norm.dtype == np.float64
