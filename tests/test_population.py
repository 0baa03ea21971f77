"""Statistics of many batches: population_stats, BatchNorm.calibrate, BatchStats in files and processes."""

import importlib.util
import io
import itertools
import pickle
import sys
import threading
import zipfile

import numpy as np
import pytest

import nbbn
import reference
from cases import DTYPES, Shape, activations, channels_last, type_id
from checks import assert_same_bits, assert_within, bits, unchanged
from gpus import CupyArray, Gpus, NumbaArray, Tensor
from nbbn.dispatch import find
from reference import finfo, unit
from test_errors import names
from test_frameworks import LIBRARIES

SHAPE = Shape((31, 4, 3))
CUTS = {
    "one": [31],
    "ones": [1] * 31,
    "twos": [2] * 15 + [1],
    "threes": [3] * 10 + [1],
    "ragged": [8, 8, 8, 7],
    "empty": [0, 10, 0, 0, 20, 1, 0],
}


def cut(x, sizes, axis=0):
    return np.split(x, np.cumsum(sizes)[:-1], axis)


def check(actual, x, batches, axis=1):
    """Hold the statistics of the batches against the oracle's of all values at once.

    Each batch has a mean right to 2 u₆₄ of its own mean |x|, so that of all is right to that of the largest
    of them, and rounded once. An error d of a batch's mean moves the variance by d² and by d times its
    distance from the mean of all, twice. Each batch's variance is rounded twice more, in float64, that of
    all three times; what pooling them loses is carried along, so it does not go by how many they are.
    """
    assert type(actual) is nbbn.BatchStats
    assert type(actual.count) is int
    expected = reference.forward(x, axis=axis)
    assert actual.count == expected.count
    assert [type(a) for a in actual[1:]] == [np.ndarray] * 2
    assert [a.dtype for a in actual[1:]] == [np.float64] * 2
    used = [b for b in batches if b.size]
    largest = max(np.abs(reference.rows(b, axis).astype(np.float64)).mean(1).max() for b in used)
    mean_bound = reference.mean_tolerance(expected) + 3 * unit(np.float64) * largest
    assert_within("mean", actual.mean[:, None], expected.mean, mean_bound)
    spread = np.sqrt(expected.var.hi)
    bound = reference.var_tolerance(expected, x.dtype) + 2 * spread * mean_bound + mean_bound**2
    bound = bound + 5 * unit(np.float64) * expected.var.hi
    assert_within("var", actual.var[:, None], expected.var, bound)


@pytest.mark.parametrize("offset", [0.0, 1e5])
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_batches_are_the_whole(rng, dtype, cuts, offset):
    x = activations(rng, SHAPE, dtype, offset=offset)
    x[5:9] += dtype(16)  # batches have means of their own
    batches = cut(x, CUTS[cuts])
    with unchanged(*batches):
        actual = nbbn.population_stats(iter(batches))
    check(actual, x, batches)


@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_thousands_of_batches(rng, dtype):
    x = activations(rng, Shape((8000, 16)), dtype, offset=3)
    batches = cut(x, [3, 1] * 2000)
    check(nbbn.population_stats(batches), x, batches)


@pytest.mark.parametrize("axis", [0, -1, 2])
def test_any_axis(rng, axis):
    x = activations(rng, Shape((6, 5, 12, 7), axis), np.float32)
    batches = cut(x, [4, 4, 4] if axis != 2 else [3, 2], axis=2 if axis != 2 else 1)
    check(nbbn.population_stats(batches, axis=axis), x, batches, axis)


def test_batches_of_any_rank_and_layout(rng):
    """What they have to agree in are the channels."""
    x = activations(rng, Shape((40, 3)), np.float64)
    first = np.moveaxis(x[:24].reshape(2, 3, 4, 3), -1, 1)
    batches = [first, x[24:30], channels_last(np.moveaxis(x[30:].reshape(5, 2, 1, 3), -1, 1))]
    check(nbbn.population_stats(batches), x, batches)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_few_values(size):
    """The variance is the biased one: of 1, 2 and 3 values, 0, 1 and 8/3 - exactly."""
    x = np.array([[1.0], [3.0], [5.0]])[:size]
    stats = nbbn.population_stats(x[k : k + 1] for k in range(size))
    assert (stats.count, stats.mean.tolist()) == (size, [[1.0], [2.0], [3.0]][size - 1])
    assert abs(stats.var[0] - [0, 1, 8 / 3][size - 1]) <= 4 * unit(np.float64) * 8 / 3


def test_sizes_are_weights():
    """The mean of 99 zeros and a hundred is 1, not the mean of the batches' means; and the variance is 99."""
    stats = nbbn.population_stats([np.zeros((99, 2)), np.full((1, 2), 100.0)])
    assert (stats.count, stats.mean.tolist()) == (100, [1.0, 1.0])
    np.testing.assert_allclose(stats.var, 99.0, rtol=4 * unit(np.float64))


def test_a_constant_stays_a_constant():
    stats = nbbn.population_stats(np.full((n, 2), 0.1, np.float32) for n in (1, 7, 1, 300))
    assert stats.mean.tolist() == [float(np.float32(0.1))] * 2
    assert stats.var.tolist() == [0.0, 0.0]


def test_empty_batches_only():
    stats = nbbn.population_stats([np.zeros((0, 3)), np.zeros((4, 3, 0))])
    assert (stats.count, stats.mean.tolist(), stats.var.tolist()) == (0, [0.0] * 3, [0.0] * 3)


def test_odd_channels_stay_apart(rng):
    x = activations(rng, SHAPE, np.float32)
    expected = nbbn.population_stats(cut(x, CUTS["ragged"]))
    x[9, 1, 0] = np.nan
    stats = nbbn.population_stats(cut(x, CUTS["ragged"]))
    assert np.isnan([stats.mean[1], stats.var[1]]).all()
    others = [0, 2, 3]
    assert_same_bits((stats.mean[others], stats.var[others]), (expected.mean[others], expected.var[others]))


def test_no_batch_is_kept(rng):
    """A loader may write the next batch over the last."""
    x = activations(rng, SHAPE, np.float32)
    buffer = np.empty_like(x[:8])

    def loader():
        for batch in cut(x, CUTS["ragged"]):
            buffer[...] = np.nan
            buffer[: len(batch)] = batch
            yield buffer[: len(batch)]

    assert_same_bits(nbbn.population_stats(loader()), nbbn.population_stats(cut(x, CUTS["ragged"])))


@pytest.mark.parametrize("kind", LIBRARIES)
def test_libraries(rng, kind):
    """Of one library or of several: the statistics are NumPy's."""
    library = LIBRARIES[kind]()
    batches = cut(activations(rng, SHAPE, np.float32), CUTS["ragged"])
    expected = nbbn.population_stats(batches)
    assert_same_bits(nbbn.population_stats(map(library.of, batches)), expected)
    assert_same_bits(nbbn.population_stats([batches[0], *map(library.of, batches[1:])]), expected)


# --- a module's running statistics -----------------------------------------------------------------


def state(bn):
    return tuple(bits(a) for a in bn.state_dict().values())


def own(bn):
    """A state that no batches lead to."""
    bn.running_mean[:], bn.running_var[:] = 7.0, 9.0
    bn.num_batches_tracked.fill(41)
    return bn


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("correction", [0, 1, 2.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=type_id)
def test_calibrate(rng, dtype, correction, training):
    x = activations(rng, SHAPE, dtype, offset=2.0)
    bn = own(nbbn.BatchNorm(4, correction=correction, dtype=dtype, momentum=0.3)).train(training)
    mean, var = bn.running_mean, bn.running_var
    parameters = bits(bn.weight), bits(bn.bias)
    assert bn.calibrate(iter(cut(x, CUTS["empty"]))) is bn
    assert bn.running_mean is mean and bn.running_var is var  # written where they are
    assert bn.training is training and (bits(bn.weight), bits(bn.bias)) == parameters
    assert bn.num_batches_tracked == 3 and bn.num_batches_tracked.dtype == np.int64
    expected = reference.forward(x)
    # u of the module's type; 20 u₆₄ for what three poolings, and the last product, round before; and what the
    # statistics of x are right to.
    u = float(finfo(dtype).eps) / 2
    tolerance = 10 * reference.mean_tolerance(expected) + u * np.abs(expected.mean.hi)
    assert_within("running_mean", mean.astype(np.float64)[:, None], expected.mean, tolerance)
    unbiased = reference.unbiased(expected.var, expected.count, correction)
    tolerance = (u + 20 * unit(np.float64)) * unbiased.hi + 2 * reference.var_tolerance(expected, dtype)
    assert_within("running_var", var.astype(np.float64)[:, None], unbiased, tolerance)


def test_evaluation_after_it(rng):
    x = activations(rng, SHAPE, np.float64)
    bn = nbbn.BatchNorm(4, dtype="float64", correction=0).calibrate(cut(x, CUTS["ragged"]))
    out = bn.eval()(x)
    # The whole is normalized with what are its own statistics: as in training.
    np.testing.assert_allclose(out, nbbn.batch_norm_forward(x).out, rtol=0, atol=1e-13)


def test_cumulative_average_goes_on(rng):
    """Like after as many batches in training: the next one weighs 1 / (number + 1)."""
    x = activations(rng, Shape((12, 4, 5)), np.float64)
    bn = nbbn.BatchNorm(4, momentum=None, dtype="float64", correction=0)
    bn.calibrate(cut(x[:9], [3, 3, 3]))
    bn(x[9:])
    assert bn.num_batches_tracked == 4
    # Batches of one size: the mean of their means is the mean of all.
    np.testing.assert_allclose(bn.running_mean, x.mean(axis=(0, 2)), rtol=0, atol=1e-14)


def test_axis_of_the_module(rng):
    x = activations(rng, Shape((8, 3, 5), -1), np.float32)
    bn = nbbn.BatchNorm(5, axis=-1).calibrate([x[:3], x[3:]])
    np.testing.assert_allclose(bn.running_mean, x.astype(np.float64).mean(axis=(0, 1)), rtol=1e-6)


def test_too_large_for_the_module():
    bn = nbbn.BatchNorm(1, dtype="float16").calibrate([np.array([[-6e4], [6e4]], np.float32)])
    assert (bn.running_mean.tolist(), bn.running_var.tolist()) == ([0.0], [np.inf])


class Interrupted(Exception):
    pass


def failing(batches):
    yield from batches
    raise Interrupted


GOOD = np.ones((3, 4)) * np.arange(3.0)[:, None]


@pytest.mark.parametrize(
    ("error", "says", "batches"),
    [
        (Interrupted, None, lambda: failing([GOOD, GOOD])),
        (KeyboardInterrupt, None, lambda: (GOOD for _ in Stops(2))),
        (ValueError, r"batches\[1\] .*4 channels on axis 1, got 5", lambda: [GOOD, np.ones((3, 5))]),
        (ValueError, r"batches\[0\] .*4 channels", lambda: [np.ones((3, 5))]),
        (ValueError, r"batches\[2\] .*4 channels", lambda: [GOOD, GOOD, np.ones((0, 3))]),
        (ValueError, r"batches\[1\]: x .*at least 2 dimensions", lambda: [GOOD, np.ones(4)]),
        (TypeError, r"batches\[1\]: x must be", lambda: [GOOD, GOOD.astype(int)]),
        (TypeError, r"batches\[0\]: x must be", lambda: [(GOOD, np.zeros(3))]),
        (ValueError, "batches .*more than 1 values per channel.*got 1", lambda: [GOOD[:1]]),
        (ValueError, "batches .*got 0", lambda: [GOOD[:0]]),
        (ValueError, "batches .*none", lambda: []),
        (ValueError, "batches .*none", lambda: iter(())),
        (TypeError, r"batches .*one array .*\[x\]", lambda: GOOD),
        (TypeError, "batches .*int", lambda: 3),
        (TypeError, "batches .*NoneType", lambda: None),
    ],
)
def test_what_fails_changes_nothing(error, says, batches):
    bn = own(nbbn.BatchNorm(4))
    before = state(bn)
    with pytest.raises(error, match=says):
        bn.calibrate(batches())
    assert state(bn) == before


class Stops:
    """Ctrl-C after some steps."""

    def __init__(self, after):
        self.after = after

    def __iter__(self):
        yield from range(self.after)
        raise KeyboardInterrupt


@pytest.mark.parametrize("batches", [GOOD, 3, None, [], [np.ones(4)], [GOOD, np.ones((3, 5))]])
def test_what_population_stats_refuses(batches):
    with pytest.raises((TypeError, ValueError)) as raised:
        nbbn.population_stats(batches)
    assert names("batches", raised)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("axis", 1.0, TypeError),
        ("axis", None, TypeError),
        ("progress", 1, TypeError),
        ("axis", 2, ValueError),
    ],
)
def test_options_are_checked(name, value, error):
    with pytest.raises(error) as raised:
        nbbn.population_stats([GOOD], **{name: value})
    assert names(name, raised)


def test_options_are_checked_before_the_first_batch():
    batches = iter([GOOD])
    with pytest.raises(TypeError):
        nbbn.population_stats(batches, progress=None)
    with pytest.raises(ValueError, match="track_running_stats"):
        nbbn.BatchNorm(4, track_running_stats=False).calibrate(batches)
    assert len(list(batches)) == 1


def test_threads():
    """Each reads statistics that belong together, and so does who folds."""
    bn = nbbn.BatchNorm(2, dtype="float64", correction=0, eps=0.0)
    parts = [np.array([[-s, -s], [s, s]]) + s for s in (1.0, 2.0, 4.0)]
    bn.calibrate([parts[0]])
    threads = [threading.Thread(target=lambda p=p: [bn.calibrate([p]) for _ in range(50)]) for p in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (bn.running_mean**2).tolist() == bn.running_var.tolist()
    assert bn.num_batches_tracked == 1


# --- on GPUs, which are those of gpus.py -----------------------------------------------------------


@pytest.fixture
def gpus(monkeypatch):
    if sys.platform == "win32":
        pytest.skip("needs mprotect")
    find.cache_clear()
    yield Gpus(monkeypatch)
    find.cache_clear()


KINDS = pytest.mark.parametrize("kind", [CupyArray, Tensor, NumbaArray], ids=lambda kind: kind.__name__)


@KINDS
def test_batches_on_gpus(rng, gpus, kind, tmp_path):
    """The statistics are NumPy's, also where the batches are on different devices."""
    batches = cut(activations(rng, SHAPE, np.float32), CUTS["ragged"])
    expected = nbbn.population_stats(batches)
    on_gpus = [gpus.array(kind, batch, k % 2) for k, batch in enumerate(batches[1:])]
    assert_same_bits(nbbn.population_stats([batches[0], *on_gpus]), expected)
    nbbn.batch_stats(on_gpus[1]).save(tmp_path / "f")
    assert_same_bits(nbbn.BatchStats.load(tmp_path / "f"), nbbn.batch_stats(batches[2]))


@KINDS
def test_module_on_a_gpu(rng, gpus, kind):
    batches = cut(activations(rng, SHAPE, np.float32), CUTS["empty"])
    expected = nbbn.BatchNorm(4).calibrate(batches)
    bn = own(nbbn.BatchNorm(4))
    bn.to("cuda:1").calibrate(gpus.array(kind, batch, 1) for batch in batches)
    assert type(bn.running_mean) is NumbaArray
    assert_same_bits(tuple(bn.state_dict().values()), tuple(expected.state_dict().values()))
    weight = rng.normal(size=(4, 3))
    assert_same_bits(nbbn.fold(weight, None, bn), nbbn.fold(weight, None, expected))
    with pytest.raises(nbbn.DeviceError, match=r"weight .*cuda:1"):
        nbbn.fold(gpus.array(kind, weight, 1), None, bn)
    with pytest.raises(nbbn.DeviceError, match="bias is on cuda:0"):
        nbbn.fold(weight, gpus.array(kind, np.ones(4), 0), bn)
    before = state(bn)
    with pytest.raises(Interrupted):
        bn.calibrate(failing([batches[1]]))
    assert state(bn) == before


# --- the progress bar ------------------------------------------------------------------------------

needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="needs rich")


@needs_rich
@pytest.mark.parametrize("known", [True, False])
def test_progress(rng, capfd, known):
    batches = cut(activations(rng, SHAPE, np.float32), CUTS["ragged"])
    given = batches if known else (batch for batch in batches)
    stats = nbbn.population_stats(given, progress=True)
    assert_same_bits(stats, nbbn.population_stats(batches))
    out, err = capfd.readouterr()
    assert out == ""
    assert ("4/4" if known else "4/?") in err


@needs_rich
def test_progress_of_what_fails(capfd):
    bn = own(nbbn.BatchNorm(4))
    before = state(bn)
    with pytest.raises(Interrupted):
        bn.calibrate(failing([GOOD]), progress=True)
    assert state(bn) == before
    for thread in threading.enumerate():  # rich tells its thread to end and does not wait for it
        if "rich" in type(thread).__module__:
            thread.join(timeout=30)
            assert not thread.is_alive()


WITHOUT_RICH = """
import sys
sys.modules["rich"] = sys.modules["rich.console"] = None
import numpy as np, nbbn
batches = iter([np.eye(3)])
try:
    nbbn.population_stats(batches, progress=True)
except ModuleNotFoundError as error:
    print(error)
print(nbbn.population_stats(batches).count)
"""


def test_without_rich(python):
    said = python(WITHOUT_RICH).splitlines()
    assert len(said) == 2 and "rich" in said[0] and "pip install" in said[0]
    assert said[1] == "3"


# --- statistics from one process to another --------------------------------------------------------

SPAWN = """
import multiprocessing
import numpy as np
import nbbn

def work(part):
    return nbbn.population_stats(part)

if __name__ == "__main__":
    x = np.random.default_rng(5).normal(3, 2, (24, 3, 4)).astype(np.float32)
    parts = [[x[:5], x[5:10]], [x[10:21]], [x[21:]]]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        stats = pool.map(work, parts)
    total = stats[0].merge(stats[1]).merge(stats[2])
    here = [nbbn.population_stats(part) for part in parts]
    same = here[0].merge(here[1]).merge(here[2])
    assert type(total) is nbbn.BatchStats and total.count == same.count == 96
    assert total.mean.tobytes() == same.mean.tobytes() and total.var.tobytes() == same.var.tobytes()
    assert np.allclose(total.mean, x.astype(float).mean((0, 2)), rtol=1e-14)
    print("equal")
"""


def test_spawned_processes(tmp_path, python):
    """Workers need the code in a file, which they import."""
    script = tmp_path / "work.py"
    script.write_text(SPAWN)
    run = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    assert python(run) == "equal\n"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(rng, protocol):
    stats = nbbn.batch_stats(activations(rng, SHAPE, np.float32))
    again = pickle.loads(pickle.dumps(stats, protocol))
    assert type(again) is nbbn.BatchStats
    assert_same_bits(again, stats)


# --- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stats.npz", "stats", "stats.bin"])
@pytest.mark.parametrize("kind", [str, lambda p: p], ids=["str", "path"])
def test_files(rng, tmp_path, name, kind):
    """The name is taken as it is."""
    stats = nbbn.batch_stats(activations(rng, SHAPE, np.float32))
    path = kind(tmp_path / name)
    assert stats.save(path) is None
    assert [p.name for p in tmp_path.iterdir()] == [name]
    again = nbbn.BatchStats.load(path)
    assert type(again) is nbbn.BatchStats and type(again.count) is int
    assert_same_bits(again, stats)


def test_an_open_file(rng):
    stats = nbbn.batch_stats(activations(rng, SHAPE, np.float32))
    file = io.BytesIO()
    stats.save(file)
    assert not file.closed
    file.seek(0)
    assert_same_bits(nbbn.BatchStats.load(file), stats)


@pytest.mark.parametrize(
    "stats",
    [
        nbbn.BatchStats(0, np.zeros(3), np.zeros(3)),
        nbbn.BatchStats(2**62, np.array([np.nan, -0.0]), np.array([np.inf, np.nan])),
        nbbn.BatchStats(5, np.zeros(0), np.zeros(0)),
    ],
    ids=["empty", "odd", "no channels"],
)
def test_odd_statistics(tmp_path, stats):
    stats.save(tmp_path / "f")
    assert_same_bits(nbbn.BatchStats.load(tmp_path / "f"), stats)


@pytest.mark.parametrize("kind", LIBRARIES)
def test_statistics_of_other_libraries(rng, tmp_path, kind):
    x = activations(rng, SHAPE, np.float32)
    nbbn.batch_stats(LIBRARIES[kind]().of(x)).save(tmp_path / "f")
    assert_same_bits(nbbn.BatchStats.load(tmp_path / "f"), nbbn.batch_stats(x))


@pytest.mark.parametrize(
    "stats",
    [
        nbbn.BatchStats(2.5, np.zeros(3), np.zeros(3)),
        nbbn.BatchStats(-1, np.zeros(3), np.zeros(3)),
        nbbn.BatchStats(4, np.zeros(3), np.zeros(2)),
        nbbn.BatchStats(4, [0.0], np.zeros(1)),
        nbbn.BatchStats(4, np.zeros(3, int), np.zeros(3)),
        nbbn.BatchStats(4, np.ma.zeros(3), np.zeros(3)),
        nbbn.BatchStats(4, np.zeros((1, 3)), np.zeros((1, 3))),
        nbbn.BatchStats(4, np.zeros(3), np.full(3, -1.0)),
        nbbn.BatchStats(2**63, np.zeros(3), np.zeros(3)),
    ],
)
def test_what_is_not_saved(tmp_path, stats):
    """What would not be loaded; and the file that was there is as it was."""
    path = tmp_path / "f"
    path.write_text("kept")
    with pytest.raises((TypeError, ValueError), match="self"):
        stats.save(path)
    assert path.read_text() == "kept"


class Harm:
    """What must not be executed."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def archive(**values):
    good = {"count": np.array(4), "mean": np.zeros(3), "var": np.ones(3)}
    file = io.BytesIO()
    np.savez(file, **{k: v for k, v in {**good, **values}.items() if v is not None})
    return file.getvalue()


def members(content):
    """What zipfile makes of the names that there are, each with some bytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for name in ("count", "mean", "var"):
            opened.writestr(f"{name}.npy", content)
    return file.getvalue()


def npy(header):
    """A file of NumPy's with a header and no numbers."""
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def unknown_compression(content):
    """Of all members, in the central directory (APPNOTE.TXT, 4.3.12)."""
    first, *entries = content.split(b"PK\x01\x02")
    return b"PK\x01\x02".join([first, *(entry[:6] + b"\x63\x00" + entry[8:] for entry in entries)])


def single():
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    {
        "nothing": b"",
        "text": b"mean = 1\n",
        "pickle": pickle.dumps(Harm()),
        "npy": single(),
        "cut": archive()[:-30],
        "flipped": archive().replace(np.ones(3).tobytes(), np.full(3, 2.0).tobytes()),
        "no arrays": members(b"hello"),
        "no header": members(npy("('")),
        "endless": members(npy("{'descr': '<f8', 'fortran_order': False, 'shape': (3 * 10**9,) * 3}")),
        "more than memory": members(npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10**15,)}")),
        "compressed in no known way": unknown_compression(archive()),
        "missing": archive(var=None),
        "more": archive(weight=np.ones(3)),
        "harm": archive(mean=np.array([Harm()] * 3, object)),
        "float count": archive(count=np.array(4.0)),
        "bool count": archive(count=np.array(True)),
        "negative count": archive(count=np.array(-1)),
        "large count": archive(count=np.array(2**63, np.uint64)),
        "counts": archive(count=np.array([4])),
        "int mean": archive(mean=np.zeros(3, int)),
        "complex var": archive(var=np.ones(3, complex)),
        "text mean": archive(mean=np.array(["0"] * 3)),
        "shapes": archive(var=np.ones(4)),
        "matrix": archive(mean=np.zeros((3, 1)), var=np.zeros((3, 1))),
        "numbers": archive(mean=np.array(0.0), var=np.array(1.0)),
        "negative var": archive(var=np.array([1.0, -1e-300, 1.0])),
    }.items(),
    ids=lambda content: content[0],
)
def test_what_is_not_loaded(tmp_path, content):
    path = tmp_path / "f"
    path.write_bytes(content[1])
    with pytest.raises(ValueError, match="file must"):
        nbbn.BatchStats.load(path)
    path.unlink()  # which an open file prevents, on some systems


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        nbbn.BatchStats.load(tmp_path / "f")


def test_narrow_and_foreign_numbers_are_loaded(tmp_path):
    (tmp_path / "f").write_bytes(archive(mean=np.ones(3, np.float32), var=np.full(3, 2.0, ">f8")))
    stats = nbbn.BatchStats.load(tmp_path / "f")
    assert_same_bits(stats, nbbn.BatchStats(4, np.ones(3), np.full(3, 2.0)))


def test_order_of_files(rng, tmp_path):
    """Statistics of parts, saved by whoever computed them, are pooled in any order."""
    x = activations(rng, Shape((12, 3)), np.float64)
    for k, part in enumerate(cut(x, [3, 7, 2])):
        nbbn.batch_stats(part).save(tmp_path / f"{k}.npz")
    for order in itertools.permutations(range(3)):
        first, *rest = (nbbn.BatchStats.load(tmp_path / f"{k}.npz") for k in order)
        for stats in rest:
            first = first.merge(stats)
        check(first, x, cut(x, [3, 7, 2]))
