"""What goes wrong in the middle of a call: interrupts, exceptions from elsewhere, no memory."""

import gc
import sys
import threading

import numpy as np
import pytest

import nbbn
from cases import Shape, activations
from checks import bits

# --- interrupts ------------------------------------------------------------------------------------

# Calls that write something of their caller's, each as a function that makes new state and returns what
# calls, and the arrays it may change.
CALLS = """
import os, signal, sys, threading, time
from functools import partial
import nbbn, numpy as np
from checks import bits
from nbbn import functional, memory
from nbbn.cpu import plan
from nbbn.dispatch import find

def make(shape):
    global x, dy, C, CALLS
    x, dy = np.random.default_rng(0).normal(3, 2, (2, *shape)).astype(np.float32)
    C = x.shape[1]
    CALLS = [module, backward_of_module, with_out, evaluation, backward]
    CALLS += [instance_norm, module_of_instances, backward_of_group_norm, backward_with_residual]
    CALLS += [loading, resetting]

def module():
    bn = nbbn.BatchNorm(C)
    return lambda: bn(x), [bn.running_mean, bn.running_var, bn.num_batches_tracked]

def backward_of_module():
    bn = nbbn.BatchNorm(C)
    bn(x)
    bn.grad_weight = bn.grad_bias = np.zeros(C)
    state = Attributes(bn, "grad_weight", "grad_bias")
    return lambda: bn.backward(dy), state

def loading():
    bn, new = nbbn.BatchNorm(C), nbbn.BatchNorm(C)
    new(x)
    state = {name: value + 1 for name, value in new.state_dict().items()}
    written = [bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.num_batches_tracked]
    return lambda: bn.load_state_dict(state), written

def resetting():
    bn = nbbn.BatchNorm(C)
    bn(x)
    bn.weight[:] = bn.bias[:] = 7.0
    names = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
    return bn.reset_parameters, Attributes(bn, *names)

def instance_norm():
    state = statistics()
    return lambda: nbbn.instance_norm(x, *state), state

def module_of_instances():
    norm = nbbn.InstanceNorm(C, track_running_stats=True)
    return lambda: norm(x), [norm.running_mean, norm.running_var, norm.num_batches_tracked]

def backward_of_group_norm():
    norm = nbbn.GroupNorm(2, C)
    norm(x)
    norm.grad_weight = norm.grad_bias = np.zeros(C)
    return lambda: norm.backward(dy), Attributes(norm, "grad_weight", "grad_bias")

def backward_with_residual():
    bn = nbbn.BatchNorm(C, activation="relu")
    bn(x, residual=dy)
    bn.grad_weight = bn.grad_bias = bn.grad_residual = np.zeros(C)
    return lambda: bn.backward(dy), Attributes(bn, "grad_weight", "grad_bias", "grad_residual")

class Attributes:
    def __init__(self, owner, *names):
        self.owner, self.names = owner, names
    def __iter__(self):
        return (getattr(self.owner, name) for name in self.names)

def statistics():
    return [np.zeros(C, np.float32), np.ones(C)]

def with_out():
    state = [*statistics(), x.copy()]
    return lambda: nbbn.batch_norm(state[2], *state[:2], training=True, out=state[2]), state

def evaluation():
    state = [*statistics(), x.copy()]
    return lambda: nbbn.batch_norm(state[2], *state[:2], out=state[2]), state

def backward():
    columns, state = {"mean": np.zeros(C), "invstd": np.ones(C)}, [x.copy()]
    return lambda: nbbn.batch_norm_backward(dy, state[0], out=state[0], **columns), state

def snapshot(state):
    return [bits(array) for array in state]

def before_and_after(make_call):
    call, state = make_call()
    before = snapshot(state)
    call()
    after = snapshot(state)
    assert before != after
    return before, after

def whole(make_call, state, before, after, when):
    now = snapshot(state)
    assert now in (before, after), (make_call.__name__, when, [a != b for a, b in zip(now, before)])
    return now == after
"""

POINTS = (
    CALLS
    + """
import dis, functools, gc, random
draw, EVERY = random.Random({seed}), {every}
PACKAGE = os.path.dirname(nbbn.__file__)
sys.unraisablehook = lambda error: None  # what is raised in __del__ goes there

@functools.cache
def names(code):
    return [dis.opname[byte] for byte in code.co_code]

def disturbed(call, point, disturb):
    # Call, with `disturb()` at one of the places in nbbn where Python handles signals: after a call, at a
    # function's beginning and at the end of a loop's turn. Return whether there are that many places.
    last, reached = {}, -1

    def trace(frame, event, argument):
        nonlocal reached
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes = True
        if event == "call":
            last[id(frame)] = "RESUME"
        elif event == "opcode":
            name = last[id(frame)]
            last[id(frame)] = names(frame.f_code)[frame.f_lasti]
            if name.startswith("CALL") or name in ("RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE"):
                reached += 1
                if reached == point:
                    disturb()
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return reached >= point

def interrupt():
    raise KeyboardInterrupt

def compute():
    # As a handler might that returns: it takes memory and gives it back, also that of a cycle.
    cycle = [nbbn.batch_norm(x, training=True)]
    cycle.append(cycle)
    assert bits(nbbn.batch_norm(x, training=True)) == bits(cycle[0]) == normalized
    del cycle
    gc.collect(0)
    nbbn.set_recycling(0)
    nbbn.set_recycling(LIMIT)

def kept_of_another_size():
    outs = [memory.empty_like(np.empty(2 * x.nbytes, np.uint8)) for _ in range(3)]

def try_all():
    global normalized
    find.cache_clear()
    kept = nbbn.batch_norm(x, training=True)
    normalized = bits(kept)
    for make_call in CALLS:
        before, after = before_and_after(make_call)
        for disturb in (interrupt, compute):
            point, ends = draw.randrange(EVERY), set()
            while True:
                call, state = make_call()
                kept_of_another_size()
                if not disturbed(call, point, disturb):
                    break
                ends.add(whole(make_call, state, before, after, (disturb.__name__, point)))
                outs = [kept, *(nbbn.batch_norm(x, training=True) for _ in range(2))]
                assert all(bits(out) == normalized for out in outs), (make_call.__name__, point)
                assert memory._pool._bytes == sum(block.nbytes for block in memory._pool._blocks)
                point += EVERY
            assert point > 20, "these are not all"
            assert (False in ends) == (disturb is interrupt), (make_call.__name__, disturb.__name__)

make((4, 6, 5, 7))
memory.SMALLEST = 1
LIMIT = 8 * 8192
nbbn.set_recycling(LIMIT)
functional.SERIAL_ELEMENTS = 0
try_all()
plan.L2_BYTES = plan.L3_BYTES = 0  # several kernels, one after another
try_all()
"""
)


def at_points(code, seed, every):
    """Return code that disturbs calls at one in so many points."""
    return code.replace("{seed}", str(seed)).replace("{every}", str(every))


@pytest.mark.parametrize(
    ("environment", "every"),
    [({"NUMBA_THREADING_LAYER": "workqueue"}, 4), ({"NUMBA_NUM_THREADS": "1"}, 2)],
    ids=["workqueue", "one_thread"],
)
def test_interrupt_at_every_point(python, seed, environment, every):
    """State is whole wherever an exception comes from a signal's handler, and wherever one computes.

    On one thread at every second point; on several, which differ in little, at every fourth; others in each
    run.
    """
    python(at_points(POINTS, seed, every), timeout=300, **environment)


SENT = (
    CALLS
    + """
def try_all():
    for make_call in CALLS:
        before, after = before_and_after(make_call)
        call, state = make_call()
        start = time.perf_counter()
        call()
        duration = time.perf_counter() - start
        for k in range(6):
            call, state = make_call()
            finished = False
            timer = threading.Timer(duration * k / 5, send)
            try:
                timer.start()
                call()
                finished = True
                timer.join()
                time.sleep(0.05)  # it is here at the latest
            except KeyboardInterrupt:
                pass
            assert whole(make_call, state, before, after, k) or not finished
            timer.join()
        assert before_and_after(make_call) == (before, after)

make((32, 16, 56, 56))
"""
)

SENDERS = {
    "signal": """
def send():
    os.kill(os.getpid(), signal.SIGINT)

try_all()
""",
    "exception": """
import ctypes

def send():
    who = ctypes.c_ulong(thread.ident)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(who, ctypes.py_object(KeyboardInterrupt))

def run():
    try_all()
    done.append(True)

done = []
thread = threading.Thread(target=run)
thread.start()
thread.join()
assert done
""",
}


@pytest.mark.parametrize("threads", [{}, {"NUMBA_NUM_THREADS": "1"}], ids=["threads", "one_thread"])
@pytest.mark.parametrize("sender", SENDERS)
def test_interrupt_of_a_large_call(python, sender, threads):
    """By SIGINT in the main thread, and by an exception that one thread raises in another."""
    python(SENT + SENDERS[sender], **threads)


def test_interrupt_while_compiling(python, tmp_path):
    """The next call compiles what is missing."""
    python(
        """
import os, signal, threading
import nbbn, numpy as np
x = np.arange(24, dtype=np.float32).reshape(4, 3, 2)
interrupted = 0
for seconds in 0.3, 0.6, 0.9:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        nbbn.batch_norm(x, np.ones(3), np.full(3, 4.0), eps=0.0)
        timer.join()
        import time; time.sleep(0.05)
    except KeyboardInterrupt:
        interrupted += 1
    timer.join()
assert interrupted
out = nbbn.batch_norm(x, np.ones(3), np.full(3, 4.0), eps=0.0)
assert (out == (x - 1) / 2).all()
""",
        NUMBA_CACHE_DIR=str(tmp_path),
    )


# --- memory ----------------------------------------------------------------------------------------

NO_MEMORY = (
    CALLS
    + """
import resource
MB = 1 << 20

def limit(room):
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))

def unlimited():
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

def calls():
    # Those that return a new array, and what they may change.
    state, columns, more, most = (statistics() for _ in range(4))
    rows, bn = np.ones(len(x)), nbbn.InstanceNorm(C, track_running_stats=True)
    instances = partial(bn, x)
    return {
        "training": (lambda: nbbn.batch_norm(x, *state, training=True), state),
        "module": module(),
        "evaluation": (lambda: nbbn.batch_norm(x, *columns), columns),
        "forward": (lambda: nbbn.batch_norm_forward(x).out, []),
        "backward": (lambda: nbbn.batch_norm_backward(dy, x, mean=columns[0], invstd=columns[1]).x, []),
        "fused": (lambda: nbbn.batch_norm(x, *more, training=True, activation="silu", residual=dy), more),
        "masked": (lambda: nbbn.batch_norm(x, *most, training=True, lengths=np.full(len(x), 3)), most),
        "instance": (instances, [bn.running_mean, bn.running_var, bn.num_batches_tracked]),
        "group": (lambda: nbbn.group_norm(x, 4), []),
        "layer": (lambda: nbbn.layer_norm(x, x.shape[1:]), []),
        "gradients of layer": (
            lambda: nbbn.layer_norm_backward(dy, x, x.shape[1:], mean=rows, invstd=rows).x,
            [],
        ),
    }

make((4, 16, 4, 5))
small = {name: bits(call()) for name, (call, state) in calls().items()}
make((32, 16, 112, 112))
assert x.nbytes > 24 * MB
expected = {name: bits(call()) for name, (call, state) in calls().items()}
x, dy, large = x.copy(), dy.copy(), (x, dy)
nbbn.set_recycling(0)
nbbn.set_recycling(1 << 30)
failed = 0
for name in expected:
    x, dy = large
    call, state = calls()[name]
    before = snapshot(state)
    limit(8 * MB)
    try:
        call()
    except MemoryError:
        failed += 1
    assert snapshot(state) == before, name
    make((4, 16, 4, 5))
    assert bits(calls()[name][0]()) == small[name], name
    unlimited()
    x, dy = large
    assert bits(call()) == expected[name], name
    nbbn.set_recycling(0)
    nbbn.set_recycling(1 << 30)
assert failed == len(expected), "there was memory"

# What is kept of arrays of another size does not stand in the way.
out = nbbn.batch_norm(x, training=True)
del out
x = x[:, :, :-1].copy()
limit(8 * MB)
out = nbbn.batch_norm(x, training=True)
unlimited()
assert bits(out) == bits(nbbn.batch_norm(x, training=True))
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no such limit")
def test_no_memory_for_the_output(python):
    """MemoryError, nothing changed, and a smaller call is still answered; then the same one.

    malloc gives back at once what it is given back, and has no addresses in reserve for other threads.
    """
    python(NO_MEMORY, MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536")


def test_collection_in_another_thread(rng):
    """The garbage collector gives memory back wherever it happens to run."""
    x = activations(rng, Shape((4, 8, 96, 100)), np.float32)
    expected = bits(nbbn.batch_norm(x, training=True))
    done, failures = threading.Event(), []

    def collect():
        while not done.is_set():
            gc.collect()

    def compute():
        for _ in range(40):
            node = {"outs": [nbbn.batch_norm(x, training=True) for _ in range(3)]}
            node["self"] = node
            if any(bits(out) != expected for out in node["outs"]):
                failures.append("overwritten")

    collector = threading.Thread(target=collect)
    workers = [threading.Thread(target=compute) for _ in range(2)]
    for thread in (collector, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    done.set()
    collector.join()
    assert not failures


# --- bounds ----------------------------------------------------------------------------------------

BOUNDS = """
import numba, numpy as np
from cases import FEW_VALUES, LAYOUTS, STRADDLING, Shape, activations, running_statistics
from checks import check_backward, check_evaluation, check_forward
from nbbn import functional
assert numba.config.BOUNDSCHECK

def check(x, dy, axis):
    channels = x.shape[axis]
    result = check_forward(x, axis=axis)
    check_evaluation(x, *running_statistics(rng, channels), axis=axis)
    for training in True, False:
        check_backward(dy, x, mean=result.mean, invstd=result.invstd, axis=axis, training=training)

rng = np.random.default_rng()
for functional.SERIAL_ELEMENTS in 1 << 15, 0:
    for shape in FEW_VALUES + STRADDLING:
        check(*(activations(rng, shape, np.float32) for _ in range(2)), shape.axis)
    for layout in LAYOUTS.values():
        check(*(layout(activations(rng, Shape((3, 5, 4, 7)), np.float32)) for _ in range(2)), 1)
"""


def test_bounds_are_kept(python, pytestconfig, tmp_path):
    """Whatever Numba can check of them. Kernels with these checks have a cache of their own."""
    kept = pytestconfig.pluginmanager.hasplugin("cacheprovider")
    cache = pytestconfig.cache.mkdir("bounds") if kept else tmp_path
    python(BOUNDS, timeout=300, NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(cache))
