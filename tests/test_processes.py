"""Imports, threads, forks, workers and the end of the interpreter: each in a process of its own."""

import importlib.metadata
import importlib.util
import os

import pytest

LAYERS = ["tbb", "omp", "workqueue"]

WORK = """
import os, signal, sys, threading, time
import nbbn, numpy as np
from workload import arrays, batch, work, work_of_others
"""

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


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


SUBNORMAL = (
    WORK
    + """
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

# As the threads of the kernels see them.
x = np.full((64, 8, 4000), tiny)
out = nbbn.batch_norm(x, np.zeros(8), np.ones(8), eps=0.0)
assert (out == x).all() and (out != 0).all()
"""
)


def test_subnormal_numbers_stay_numbers(python, layer):
    """No flush-to-zero: after import, after use, and in every thread."""
    python(SUBNORMAL, NUMBA_THREADING_LAYER=layer)


# --- threads ---------------------------------------------------------------------------------------

THREADS = (
    WORK
    + """
inputs = [arrays(k) for k in range(8)]
expected = [work(*pair) for pair in inputs]
assert len(set(expected)) == 8
failures = []

def run(k, count):
    for _ in range(count):
        gate.wait()
        if work(*inputs[k]) != expected[k]:
            failures.append(k)

for together, count in (2, 20), (8, 4):
    gate = threading.Barrier(together)
    threads = [threading.Thread(target=run, args=(k, count)) for k in range(together)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not failures, failures
"""
)

FIRST_CALLS = (
    WORK
    + """
gate, found = threading.Barrier(4), []

def run():
    gate.wait()
    found.append(work(*arrays()))

threads = [threading.Thread(target=run) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 4 and len(set(found)) == 1, found
assert work(*arrays()) == found[0]
"""
)


def test_threads_at_once(python, layer):
    """Two, and eight, each with arrays of its own, whose bits are those of one thread alone."""
    python(THREADS + CHECK_LAYER.format(layer=layer), NUMBA_THREADING_LAYER=layer)


def test_threads_at_once_of_others(python, layer):
    """The other normalizations, an activation with a residual, and a mask."""
    code = THREADS.replace("inputs =", "work = work_of_others\ninputs =")
    python(code + CHECK_LAYER.format(layer=layer), NUMBA_THREADING_LAYER=layer)


def test_first_calls_at_once(python, layer):
    """Four threads that all find nothing compiled and no pool started; then the main thread."""
    python(FIRST_CALLS + CHECK_LAYER.format(layer=layer), NUMBA_THREADING_LAYER=layer)


def test_same_bits_under_every_layer(python):
    code = WORK + "print(work(*arrays()))"
    found = {python(code, NUMBA_THREADING_LAYER=name) for name in ("omp", "workqueue")}
    found.add(python(code))
    found.add(python(code, NUMBA_NUM_THREADS="1"))
    assert len(found) == 1


def test_layer_that_is_not_there(python):
    """Asked for by the environment, but its library is missing: nbbn computes all the same."""
    code = WORK + "print(work(*arrays()))"
    missing = "import sys; sys.modules['numba.np.ufunc.tbbpool'] = None\n"
    assert python(missing + code, NUMBA_THREADING_LAYER="tbb") == python(code)


# --- forks -----------------------------------------------------------------------------------------

# A child that does not end is a failure, long before this process runs into its own limit.
FORK = (
    WORK
    + """
def fork(run, *arguments):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        good = False
        try:
            good = run(*arguments)
        finally:
            os._exit(0 if good else 1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        print("child:", status, file=sys.stderr)
    return status == 0
"""
)

AFTER_USE = (
    FORK
    + """
from nbbn.compiler import pool
expected = work(*arrays())
bn = nbbn.BatchNorm(8)
out = bn(arrays()[0])

def child(depth=0):
    good = work(*arrays()) == expected and work(*arrays(1)) != expected
    good = good and (bn(arrays()[0]) == out).all()
    return good and (depth == 1 or fork(child, 1))  # and a child of the child

assert fork(child), "after use"
assert work(*arrays()) == expected, "in the parent, after a fork"

# Beside a thread of which nobody knows what it does with Numba's threads.
leave = threading.Event()
thread = threading.Thread(target=leave.wait)
thread.start()
assert fork(lambda: child() and pool.threads() == 1), "beside a thread"
leave.set()
thread.join()

# While another thread computes.
done, wrong = threading.Event(), []

def background():
    while not done.is_set():
        if work(*arrays()) != expected or not (bn(arrays()[0]) == out).all():
            wrong.append(1)

thread = threading.Thread(target=background)
thread.start()
try:
    assert all(fork(child) for _ in range(3)), "beside a thread that computes"
finally:
    done.set()
    thread.join()
assert not wrong
"""
)

BEFORE_USE = (
    FORK
    + """
assert fork(lambda: work(*arrays()))
assert work(*arrays())
"""
)

# Numba's threads are somebody else's, and nbbn has not been used yet.
OTHERS = (
    FORK
    + """
import numba
from nbbn.compiler import _load_tbb
_load_tbb()
numba.get_num_threads()
assert fork(lambda: work(*arrays()) != work(*arrays(1)))
assert work(*arrays()) != work(*arrays(1))
"""
)


@forks
@pytest.mark.parametrize(
    "code", [AFTER_USE, BEFORE_USE, OTHERS], ids=["after_use", "before_use", "of_others"]
)
def test_fork(python, layer, code):
    code += CHECK_LAYER.format(layer=layer)
    python(code, NUMBA_THREADING_LAYER=layer, PYTHONWARNINGS="ignore::DeprecationWarning")


@forks
def test_fork_of_others(python, layer):
    code = AFTER_USE.replace("expected =", "work = work_of_others\nexpected =", 1)
    code += CHECK_LAYER.format(layer=layer)
    python(code, NUMBA_THREADING_LAYER=layer, PYTHONWARNINGS="ignore::DeprecationWarning")


LOCKED = (
    FORK
    + """
bn, x = nbbn.BatchNorm(8), arrays()[0]
bn(x)
inside, leave = threading.Event(), threading.Event()

class Slow:
    # An array that takes its time to be read, while the module's lock is held.
    def __array_namespace__(self, api_version=None):
        return np
    def __dlpack_device__(self):
        return x.__dlpack_device__()
    def __dlpack__(self, **options):
        inside.set()
        leave.wait()
        return x.__dlpack__(**options)

thread = threading.Thread(target=bn, args=(Slow(),))
thread.start()
assert inside.wait(60)
try:
    assert fork(lambda: bn(x) is not None and int(bn.num_batches_tracked) == 2)
finally:
    leave.set()
    thread.join()
assert int(bn.num_batches_tracked) == 2
"""
)


@forks
def test_fork_while_a_module_is_in_use(python):
    """Its lock is held in the parent, by a thread that the child does not have."""
    python(LOCKED, PYTHONWARNINGS="ignore::DeprecationWarning")


COMPILING = (
    FORK
    + """
from importlib.abc import MetaPathFinder
inside = threading.Event()

class Slow(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "nbbn.cpu.{when}":
            inside.set()
            time.sleep(0.5)

if "{when}" == "compiling":
    from nbbn.compiler import _Cache
    load = _Cache.load_overload

    def slow(*arguments):
        if not inside.is_set():
            inside.set()
            time.sleep(0.5)
        return load(*arguments)

    _Cache.load_overload = slow
sys.meta_path.insert(0, Slow())
found = []
thread = threading.Thread(target=lambda: found.append(work(*arrays())))
thread.start()
assert inside.wait(60)
assert fork(lambda: work(*arrays()))
thread.join()
assert found == [work(*arrays())]
"""
)


@forks
@pytest.mark.parametrize("when", ["kernels", "compiling"])
def test_fork_during_a_first_call(python, when):
    """Another thread imports, or compiles, what the child needs too."""
    python(COMPILING.format(when=when), PYTHONWARNINGS="ignore::DeprecationWarning")


KILLED = (
    FORK
    + """
work(*arrays())
from nbbn.compiler import pool
for _ in range(5):
    pid = os.fork()
    if pid == 0:
        while True:
            pool.threads()
    time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    signal.alarm(60)
    work(*arrays())
"""
)


@forks
def test_killed_child(python, layer):
    """Whatever it was doing, it takes nothing along that the parent waits for."""
    python(KILLED, NUMBA_THREADING_LAYER=layer, PYTHONWARNINGS="ignore::DeprecationWarning")


@forks
def test_fork_and_exec(python):
    code = """
first = work(*arrays())
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    os.execv(sys.executable, [sys.executable, "-c", "from workload import *; print(work(*arrays()))"])
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
print(first)
"""
    child, parent = python(WORK + code, PYTHONWARNINGS="ignore::DeprecationWarning").split()
    assert child == parent


WORKERS = (
    WORK
    + """
import multiprocessing, pickle
expected = [pickle.dumps(batch(k)) for k in range(6)]
for method in multiprocessing.get_all_start_methods():
    with multiprocessing.get_context(method).Pool(3) as pool:
        found = pool.map_async(batch, range(6), chunksize=1).get(timeout=100)
    assert [pickle.dumps(part) for part in found] == expected, method
    assert pickle.dumps(batch(0)) == expected[0], "in the parent, after " + method
"""
)


def test_workers(python, layer):
    """As a data loader has them: several, of each kind that there is, that send arrays back."""
    python(WORKERS, NUMBA_THREADING_LAYER=layer, PYTHONWARNINGS="ignore::DeprecationWarning")


# --- the end of the interpreter --------------------------------------------------------------------

# What is said on stderr is seen, too: exceptions that are ignored do not show in the exit status.
END = "import os; os.dup2(1, 2)\n" + WORK + "x = np.random.default_rng(0).normal(size=(64, 8, 4000))\n"

ENDS = {
    # Several threads are in a kernel, or between two, when the main thread is through.
    "daemons": """
def loop():
    while True:
        nbbn.batch_norm(x, training=True)
        started.set()

started = threading.Event()
for _ in range(3):
    threading.Thread(target=loop, daemon=True).start()
started.wait()
time.sleep(np.random.default_rng().uniform(0, 0.02))
""",
    # nbbn was used in another thread only, which leaves recycled arrays wherever they may be found late.
    "arrays": """
kept = []

def run():
    outs = [nbbn.batch_norm(x, training=True) for _ in range(6)]
    kept.append(outs[0])
    kept.append(kept)
    np.kept, sys.kept, threading.kept = outs[1][1:], outs[2][:, 1], memoryview(outs[3])
    bn = nbbn.BatchNorm(8)
    np.module, bn.out = bn, bn(x)

threading.Thread(target=run).start()
""",
}


@pytest.mark.parametrize("name", ENDS)
def test_end(python, layer, name):
    """Nothing is said, and the exit status is 0."""
    assert python(END + ENDS[name], NUMBA_THREADING_LAYER=layer) == ""


LOOK = {
    "state_dict": "looked = bn.state_dict()['running_mean']",
    "pickle": "looked = pickle.loads(pickle.dumps(bn)).running_mean",
    "deepcopy": "looked = copy.deepcopy(bn).running_mean",
    "evaluation": "looked = still(zeros)[0]",
}


@pytest.mark.parametrize("how", LOOK)
def test_what_is_seen_of_a_module_in_training_is_of_one_batch(python, how):
    """Its running mean is 0 everywhere or 1 everywhere, and so is all that is made of it."""
    out = python(
        f"""
import copy, pickle, threading
import numpy as np, nbbn
bn = nbbn.BatchNorm(4096, momentum=1.0, affine=False, eps=1.0)
still = copy.copy(bn).eval()  # of the same statistics
zeros = np.zeros((1, 4096), np.float32)
batches = [np.full((4, 4096), k, np.float32) for k in (0, 1)]
bn(batches[0]), still(zeros)
ended, steps = threading.Event(), 0

def train():
    global steps
    while not ended.is_set():
        steps += 1
        bn(batches[steps % 2])

thread = threading.Thread(target=train)
thread.start()
looks = torn = 0
while looks < 1500 or steps < 200:
    {LOOK[how]}
    looks += 1
    torn += len(np.unique(looked)) > 1
ended.set()
thread.join()
print(torn)
""",
        NUMBA_NUM_THREADS="1",
    )
    assert int(out) == 0


def test_a_shallow_copy_counts_with_the_original(python):
    """They share their statistics: no batch of the one gets lost in one of the other."""
    python(
        """
import copy, threading
import numpy as np, nbbn
bn = nbbn.BatchNorm(8)
twin = copy.copy(bn)
x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
bn(x)
threads = [threading.Thread(target=lambda norm=norm: [norm(x) for _ in range(2000)]) for norm in (bn, twin)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert bn.num_batches_tracked is twin.num_batches_tracked
assert bn.num_batches_tracked == 4001, bn.num_batches_tracked
"""
    )


@forks
def test_a_shallow_copy_counts_with_the_original_after_a_fork(python):
    """Each child has a lock of its own, which the two have in common there as well."""
    python(
        """
import copy, os
import nbbn
bn, other = nbbn.BatchNorm(8), nbbn.BatchNorm(8)
twin, held = copy.copy(bn), bn._lock
with bn._lock:
    if not (child := os.fork()):
        alike = twin._lock is bn._lock and bn._lock is not held and other._lock is not bn._lock
        os._exit(0 if alike and bn._lock.acquire(timeout=1) else 1)
assert os.waitpid(child, 0)[1] == 0
assert twin._lock is bn._lock is held
"""
    )


def test_a_signals_handler_may_look_at_a_module_that_works(python):
    """In the thread that is in the middle of a training step."""
    python(
        """
import signal
import numpy as np, nbbn
bn = nbbn.BatchNorm(8, nonfinite="skip")
x = np.random.default_rng(0).normal(size=(64, 8, 20)).astype(np.float32)
bn(x)
looked = []
signal.signal(signal.SIGALRM, lambda *_: looked.append(bn.state_dict()))
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
while len(looked) < 200:
    bn(x)
signal.setitimer(signal.ITIMER_REAL, 0)
"""
    )
