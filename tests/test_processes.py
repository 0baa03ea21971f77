"""Threads, forks, imports and the cache on disk: each in a process of its own."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import pytest

import nbbn
from nbbn import formulas
from nbbn.cpu import kernels, tiles

PACKAGE = Path(nbbn.__file__).parent
LAYERS = ["tbb", "omp", "workqueue"]

# In every process: some calls, large enough for several threads, and a digest of all their bits.
WORK = """
import hashlib, numpy as np, nbbn

def arrays(k=0):
    rng = np.random.default_rng(k)
    x, dy = rng.normal(3, 2, (2, 16, 8, 60, 61)).astype(np.float32)
    return x, dy

def work(x, dy):
    mean, var = np.zeros(x.shape[1]), np.ones(x.shape[1])
    out = nbbn.batch_norm(x, mean, var, training=True)
    forward = nbbn.batch_norm_forward(x)
    backward = nbbn.batch_norm_backward(dy, x, mean=forward.mean, invstd=forward.invstd)
    evaluated = nbbn.batch_norm(x, mean, var)
    digest = hashlib.sha256()
    for array in (out, mean, var, *forward[:4], *backward, evaluated):
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
"""


# --- import ----------------------------------------------------------------------------------------

IMPORT = """
import os, sys, threading

def threads():
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.isdir(tasks) else threading.active_count()

import numpy, numba
before, modules, environment = threads(), set(sys.modules), dict(os.environ)
affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
import nbbn
assert threads() == before, "threads were started"
cuda = [name for name in set(sys.modules) - modules if name.split(".")[-1] == "cuda" or "numba_cuda" in name]
assert not cuda, cuda
others = {name.split(".")[0] for name in set(sys.modules) - modules} - set(sys.stdlib_module_names)
assert others <= {"nbbn", "numba", "numpy", "llvmlite", "yaml"}, others
assert dict(os.environ) == environment
assert affinity is None or os.sched_getaffinity(0) == affinity
try:
    layer = numba.threading_layer()
except ValueError:
    layer = None
assert layer is None, layer
"""


def test_import_has_no_side_effects(python):
    """No threads, no CUDA, no framework, nothing in the environment."""
    python(IMPORT)


def test_import_writes_nothing(python, tmp_path):
    cache, package = tmp_path / "cache", copy_of_package(tmp_path / "a")
    cache.mkdir()
    python("import nbbn", package=package, NUMBA_CACHE_DIR=str(cache))
    assert not list(cache.rglob("*"))
    assert not list(package.rglob("*.nb[ci]"))


SUBNORMAL = (
    WORK
    + """
import threading
tiny = 5e-324

def check(when):
    numbers = np.array([tiny, 1.0])
    assert numbers[0] * numbers[1] != 0 and numbers[0] + 0 != 0, when
    assert (np.full(100, tiny) * 1.0 != 0).all(), when
    assert np.float32(1e-45) * np.float32(1) != 0, when

check("after import")
work(*arrays())
check("after use")
thread = threading.Thread(target=lambda: (work(*arrays()), check("in a thread")))
thread.start(); thread.join()
check("after use in a thread")
"""
)


def test_subnormal_numbers_stay_numbers(python):
    """No flush-to-zero: after import, after use, and in every thread."""
    python(SUBNORMAL)


def test_subnormal_numbers_stay_numbers_in_the_workers(python):
    """As the threads of the kernels see them: every element of a large array of subnormals is kept."""
    python(
        """
import numpy as np, nbbn
x = np.full((64, 8, 4000), 5e-324)
assert (nbbn.batch_norm(x, np.zeros(8), np.ones(8), eps=0.0) == x).all()
assert (nbbn.batch_norm(x, np.zeros(8), np.ones(8), eps=0.0) != 0).all()
"""
    )


# --- threading layers ------------------------------------------------------------------------------


@pytest.fixture(params=LAYERS)
def layer(request):
    """A threading layer; skipped only if its library, or Numba's part of it, is not installed at all."""
    if request.param == "tbb":
        try:
            importlib.metadata.version("tbb")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("tbb is not installed")
    elif request.param == "omp" and importlib.util.find_spec("numba.np.ufunc.omppool") is None:
        pytest.skip("this Numba has no omp")
    return request.param


CHECK_LAYER = """
import numba
if numba.config.NUMBA_NUM_THREADS > 1:
    assert numba.threading_layer() == "{layer}", numba.threading_layer()
"""

TWO_THREADS = (
    WORK
    + """
import threading
inputs = [arrays(k) for k in range(2)]
expected = [work(*pair) for pair in inputs]
failures, gate = [], threading.Barrier(2)

def run(k):
    gate.wait()
    for _ in range(20):
        if work(*inputs[k]) != expected[k]:
            failures.append(k)

threads = [threading.Thread(target=run, args=(k,)) for k in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not failures, failures
print(expected[0])
"""
)

FIRST_CALLS = (
    WORK
    + """
import threading
gate, results = threading.Barrier(4), []

def run():
    gate.wait()
    results.append(work(*arrays()))

threads = [threading.Thread(target=run) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(results) == 4 and len(set(results)) == 1, results
print(results[0])
"""
)

FORK = (
    WORK
    + """
import os, signal, sys, threading
expected = work(*arrays())

def child(depth=0):
    signal.alarm(60)  # a hang is a failure
    good = work(*arrays()) == expected and work(*arrays(1)) != expected
    if good and depth == 0:  # and a child of the child
        good = fork(lambda: child(1))
    os._exit(0 if good else 1)

def fork(run):
    pid = os.fork()
    if pid == 0:
        run()
    status = os.waitpid(pid, 0)[1]
    if status:
        print("child:", os.waitstatus_to_exitcode(status), file=sys.stderr)
    return status == 0

assert fork(child), "after use"
assert work(*arrays()) == expected, "in the parent, after a fork"

# While another thread computes.
done, wrong = threading.Event(), []

def background():
    while not done.is_set():
        if work(*arrays()) != expected:
            wrong.append(1)

thread = threading.Thread(target=background)
thread.start()
try:
    assert all(fork(child) for _ in range(3)), "beside a thread that computes"
finally:
    done.set()
    thread.join()
assert not wrong
print(expected)
"""
)

FORK_FIRST = (
    WORK
    + """
import os, signal
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    work(*arrays())
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(work(*arrays()))
"""
)


def test_two_threads_at_once(python, layer):
    python(TWO_THREADS + CHECK_LAYER.format(layer=layer), NUMBA_THREADING_LAYER=layer)


def test_first_calls_at_once(python, layer):
    """Four threads that all find nothing compiled and no pool started."""
    python(FIRST_CALLS + CHECK_LAYER.format(layer=layer), NUMBA_THREADING_LAYER=layer)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize("code", [FORK, FORK_FIRST], ids=["after_use", "before_use"])
def test_fork(python, layer, code):
    python(code, NUMBA_THREADING_LAYER=layer, PYTHONWARNINGS="ignore::DeprecationWarning")


def test_same_bits_under_every_layer(python):
    codes = {
        python(WORK + "print(work(*arrays()))", NUMBA_THREADING_LAYER=name) for name in ("omp", "workqueue")
    }
    codes.add(python(WORK + "print(work(*arrays()))"))
    codes.add(python(WORK + "print(work(*arrays()))", NUMBA_NUM_THREADS="1"))
    assert len(codes) == 1


def test_layer_that_is_not_there(python):
    """Asked for by the environment, but its library is missing: nbbn computes all the same."""
    code = WORK + "print(work(*arrays()))"
    missing = "import sys; sys.modules['numba.np.ufunc.tbbpool'] = None\n"
    assert python(missing + code, NUMBA_THREADING_LAYER="tbb") == python(code)


MULTIPROCESSING = (
    WORK
    + """
import multiprocessing
def job(k):
    return work(*arrays(k))
if __name__ == "__main__":
    expected = [job(k) for k in range(2)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(job, range(2)).get(timeout=100) == expected
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_multiprocessing_pool(python):
    python(MULTIPROCESSING, PYTHONWARNINGS="ignore::DeprecationWarning")


# --- the cache on disk -----------------------------------------------------------------------------


def copy_of_package(directory):
    """Return a folder with a copy of nbbn, without anything compiled."""
    ignored = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc", "demo")
    shutil.copytree(PACKAGE, directory / "nbbn", ignore=ignored)
    return directory


def files_of(cache):
    """Return the files of a cache, and what would change if they were written again."""
    files = [path for path in Path(cache).rglob("*") if path.is_file()]
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


# Evaluation: the quickest to compile.
EVALUATE = """
import numpy as np, nbbn
x = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
print(nbbn.batch_norm(x, np.ones(3), np.full(3, 4.0), eps=0.0).tolist())
"""


@pytest.fixture(scope="module")
def compiled(python, tmp_path_factory):
    """A copy of the package, its cache after one process, and what that process printed."""
    package = copy_of_package(tmp_path_factory.mktemp("package"))
    cache = tmp_path_factory.mktemp("cache")
    return package, cache, python(EVALUATE, package=package, NUMBA_CACHE_DIR=str(cache))


def test_second_process_loads_from_the_cache(python, compiled):
    """It writes nothing, since it compiles nothing."""
    package, cache, first = compiled
    files = files_of(cache)
    assert any(name.endswith(".nbc") for name in files)
    assert python(EVALUATE, package=package, NUMBA_CACHE_DIR=str(cache)) == first
    assert files_of(cache) == files


PHASES = """
import numpy as np, nbbn
from nbbn import functional
functional.SERIAL_ELEMENTS = 1  # threads: the operations that take several kernels
rng = np.random.default_rng(0)
x, dy = rng.normal(3, 2, (2, 300, 8))
deviation = x - x.mean(0)
invstd = 1 / np.sqrt(x.var(0))
x_hat = deviation * invstd
for name in "{order}".split():
    if name == "evaluation":
        out = nbbn.batch_norm(x, x.mean(0), x.var(0), eps=0.0)
        assert abs(out - x_hat).max() < 1e-12, name
    if name == "forward":
        assert abs(nbbn.batch_norm_forward(x, eps=0.0).out - x_hat).max() < 1e-12, name
    if name == "backward":
        got = nbbn.batch_norm_backward(dy, x, mean=x.mean(0), invstd=invstd).x
        expected = invstd * (dy - dy.mean(0) - x_hat * (dy * x_hat).mean(0))
        assert abs(got - expected).max() < 1e-12, name
"""


def test_kernels_of_several_processes_do_not_mix(python, tmp_path):
    """What one process compiled and another loads is not taken for what that one compiles itself."""
    orders = ["evaluation", "evaluation backward", "backward evaluation forward", "forward backward"]
    for order in orders:
        python(PHASES.format(order=order), NUMBA_CACHE_DIR=str(tmp_path))


def test_parts_of_kernels_have_names_of_their_own():
    """Two of one name and the same types could be taken for each other: see nbbn.compiler.variant."""
    parts = [part for module in (tiles, kernels, formulas) for part in vars(module).values()]
    dispatchers = {id(part): part for part in parts if isinstance(part, numba.core.dispatcher.Dispatcher)}
    names = [part.py_func.__qualname__ for part in dispatchers.values()]
    assert len(names) > 40
    assert sorted(set(names)) == sorted(names)


def test_edited_helper_is_compiled_anew(python, compiled, tmp_path):
    """An edit to a formula, in another file than the kernels', shows in the results, and undone too."""
    package, cache = (shutil.copytree(path, tmp_path / path.name) for path in compiled[:2])
    environment = {"package": package, "NUMBA_CACHE_DIR": str(cache)}
    helper = package / "nbbn" / "formulas.py"
    source, times = helper.read_text(), helper.stat()
    edited = source.replace("return 1.0 / math.sqrt(var + eps)", "return 2.0 / math.sqrt(var + eps)")
    assert edited != source, "the formula of invstd is written differently now: edit this test"
    before = eval(python(EVALUATE, **environment))
    helper.write_text(edited)
    os.utime(helper, ns=(times.st_atime_ns, times.st_mtime_ns))  # as a copy or a checkout may have it
    after = eval(python(EVALUATE, **environment))
    assert after == [[[2 * v for v in row] for row in plane] for plane in before]
    helper.write_text(source)
    assert eval(python(EVALUATE, **environment)) == before


def unwritable(path):
    """Return a path below which nobody can make a folder, whoever runs the tests."""
    path.write_text("a file, not a folder")
    return path / "cache"


def test_unwritable_cache(python, tmp_path):
    """It only means another one, or none: see the next tests for a package that has nowhere to write."""
    code = WORK + "print(work(*arrays()))"
    nowhere = unwritable(tmp_path / "file")
    assert python(code, NUMBA_CACHE_DIR=str(nowhere)) == python(code)


@pytest.mark.parametrize("pattern", ["*.nbc", "*.nbi"])
def test_broken_cache(python, compiled, tmp_path, pattern):
    """Files that were cut short, are empty, or are something else, are not believed."""
    package, cache, expected = compiled
    broken = shutil.copytree(cache, tmp_path / "cache")
    paths = sorted(broken.rglob(pattern))
    assert len(paths) >= 2
    for k, path in enumerate(paths):
        data = path.read_bytes()
        path.write_bytes((data[: len(data) // 2], bytes(len(data)), b"")[k % 3])
    environment = {"package": package, "NUMBA_CACHE_DIR": str(broken)}
    assert python(EVALUATE, **environment) == expected
    assert python(EVALUATE, **environment) == expected


def test_processes_with_one_fresh_cache(python, compiled, tmp_path):
    """Two that compile the same kernels at the same time, into the same files; then one that loads."""
    package, _, expected = compiled
    environment = {"package": package, "NUMBA_CACHE_DIR": str(tmp_path)}
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda _: python(EVALUATE, **environment), range(2)))
    assert results == [expected] * 2
    assert python(EVALUATE, **environment) == expected


def test_package_in_a_folder_that_is_read_only(python, compiled, tmp_path):
    """And no home either: where Numba would cache beside the sources, and cannot."""
    package = shutil.copytree(compiled[0], tmp_path / "package")
    for folder in [package / "nbbn", *(p for p in (package / "nbbn").rglob("*") if p.is_dir())]:
        (folder / "__pycache__").write_text("a file, so that no folder can be made here")
    home = str(unwritable(tmp_path / "home"))
    environment = {"HOME": home, "XDG_CACHE_HOME": home, "LOCALAPPDATA": home}
    parallel = """
stats = nbbn.batch_stats(np.broadcast_to(np.arange(100.0), (4, 100, 100)), axis=-1)
assert stats.mean.tolist() == list(range(100)) and not stats.var.any()
"""
    assert python(EVALUATE + parallel, package=package, **environment) == compiled[2]


def test_warmup_compiles_all_that_is_used(python):
    """After it, calls of these types load and compile nothing more; nor does a second warm-up."""
    python(
        """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
"""
        + WORK
        + """
def kernels():
    return sum(name.endswith((".nbi", ".nbc")) for name in opened)

nbbn.warmup(["float32"])
before = kernels()
assert before
work(*arrays())
work(*(v[:2, :3, :4] for v in arrays()))
nbbn.batch_stats(arrays()[0])
nbbn.warmup(["float32"])
assert kernels() == before, opened
nbbn.batch_norm(arrays()[0].astype(float), np.zeros(8), np.ones(8))
assert kernels() > before, "this test does not see what is loaded"
"""
    )


def test_killed_process_leaves_a_usable_cache(python, compiled, tmp_path):
    """Killed while it compiles or writes: the next one must not believe half a file."""
    package, _, expected = compiled
    for seconds in (0.7, 1.1):
        process = subprocess.Popen(
            [sys.executable, "-c", EVALUATE],
            cwd=package,
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
            stdout=subprocess.DEVNULL,
        )
        time.sleep(seconds)
        process.kill()
        process.wait()
    assert python(EVALUATE, package=package, NUMBA_CACHE_DIR=str(tmp_path)) == expected
