"""Compiled kernels on disk: loaded, never stale, and missed by nothing but time where they cannot be."""

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
from nbbn.cpu import copies, fused, kernels, masks, parameters, results, rows, short, sums, tiles

PACKAGE = Path(nbbn.__file__).parent
WORK = """
import nbbn, numpy as np
from workload import arrays, work
"""


def copy_of_package(directory):
    """Return a folder with a copy of nbbn, without anything compiled."""
    ignored = shutil.ignore_patterns("__pycache__", "*.nbi", "*.nbc", "demo")
    shutil.copytree(PACKAGE, directory / "nbbn", ignore=ignored)
    return directory


def files_of(cache):
    """Return the files of a cache, and what would change if they were written again."""
    files = [path for path in Path(cache).rglob("*") if path.is_file()]
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def test_import_writes_nothing(python, tmp_path):
    cache, package = tmp_path / "cache", copy_of_package(tmp_path / "a")
    cache.mkdir()
    python("import nbbn", package=package, NUMBA_CACHE_DIR=str(cache))
    assert not list(cache.rglob("*"))
    assert not list(package.rglob("*.nb[ci]"))


# What is loaded from the cache, and what is written to it.
WATCH = """
import sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import numpy as np, nbbn

def kernels():
    return sum(name.endswith((".nbi", ".nbc")) for name in opened)
"""
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


def test_second_process_needs_no_compiler(python, compiled, tmp_path):
    """What Numba compiles with takes half a second to be imported."""
    package, cache, _ = compiled
    code = EVALUATE + "import sys; print('numba.np.linalg' in sys.modules)"
    assert python(code, package=package, NUMBA_CACHE_DIR=str(cache)).split()[-1] == "False"
    assert python(code, package=package, NUMBA_CACHE_DIR=str(tmp_path)).split()[-1] == "True"


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


FEW = """
import numpy as np, nbbn
from nbbn import compiler
x = np.ones((2, 6, 4, 8), np.float32)
compiled = set()
def new_after(result):
    global compiled
    before, compiled = compiled, {name for name, _ in compiler._entries}
    return compiled - before
assert new_after(nbbn.batch_norm_forward(x)) == {"forward"}
assert new_after(nbbn.batch_norm_forward(x[..., ::2])) == {"gather", "scatter"}
assert new_after(nbbn.group_norm_forward(x, 2)) == {"forward_short", "finish_sets"}
"""


def test_first_calls_compile_nothing_for_others(python):
    """Neither copies of elements that lie apart nor sets of channels, which few arrays need."""
    python(FEW)


OTHERS = """
import operator
import numpy as np, numba, nbbn

@numba.njit
def of_all_sorts(x, counts):
    total = sum([k ** 2 for k in counts])
    add = lambda a, b: a + b
    known = {k: str(k) for k in counts}
    if len(known) < 2:
        raise ValueError("too few")
    return add(total, 1) + operator.sub(1, 2), np.sort(x + 1)[0], known[3]

nbbn.batch_norm(np.ones((2, 3, 4)), training=True)
x = np.array([4.0, 3.0])
assert of_all_sorts(x, [1, 3, 3]) == (19, 4.0, "3")
try:
    of_all_sorts(x, [1])
except ValueError as error:
    assert str(error) == "too few"
else:
    raise AssertionError("nothing raised")
assert np.isnan(nbbn.batch_norm_forward(np.full((2, 3), np.nan, np.float32)).mean).all()
"""


def test_numba_compiles_others_functions_as_before(python, tmp_path):
    """What kernels are compiled without, others are not; and kernels can be compiled after them."""
    python(OTHERS, NUMBA_CACHE_DIR=str(tmp_path))


def test_parts_of_kernels_have_names_of_their_own():
    """Two of one name and the same types could be taken for each other: see nbbn.compiler.variant."""
    modules = copies, formulas, fused, kernels, masks, parameters, results, rows, short, sums, tiles
    parts = [part for module in modules for part in vars(module).values()]
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


@pytest.mark.skipif(sys.platform == "win32", reason="there is no such limit")
def test_full_disk(python, compiled, tmp_path):
    """No file can be written beyond its first byte: kernels are compiled for this process alone."""
    full = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
"""
    assert python(full + EVALUATE, package=compiled[0], NUMBA_CACHE_DIR=str(tmp_path)) == compiled[2]
    assert python(EVALUATE, package=compiled[0], NUMBA_CACHE_DIR=str(tmp_path)) == compiled[2]


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
    environment = {"HOME": home, "XDG_CACHE_HOME": home, "LOCALAPPDATA": home, "NUMBA_CACHE_DIR": ""}
    parallel = """
stats = nbbn.batch_stats(np.broadcast_to(np.arange(100.0), (4, 100, 100)), axis=-1)
assert stats.mean.tolist() == list(range(100)) and not stats.var.any()
"""
    assert python(EVALUATE + parallel, package=package, **environment) == compiled[2]


def test_warmup_compiles_all_that_is_used(python):
    """After it, calls of these types load and compile nothing more; nor does a second warm-up."""
    python(
        WATCH
        + WORK
        + """
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


@pytest.mark.parametrize("norm", ["layer", "rms", "group", "instance"])
def test_warmup_of_the_other_normalizations(python, norm):
    """After it a normalization loads and compiles nothing, in any layout, of long rows and of short ones."""
    python(
        WATCH
        + f"""
def work(x):
    shape = x.shape[1:]
    given = {{"layer": (shape,), "rms": (shape,), "group": (2,), "instance": ()}}[{norm!r}]
    forward = getattr(nbbn, "{norm}_norm_forward")(x, *given)
    found = {{"mean": forward.mean, "invstd": forward.invstd}}
    if {norm!r} == "instance":
        nbbn.InstanceNorm(x.shape[1], track_running_stats=True)(x)
    if {norm!r} == "rms":
        del found["mean"]
    backward = getattr(nbbn, "{norm}_norm_backward")
    arguments = (x, x, *given) if {norm!r} != "instance" else (x, x)
    backward(*arguments, **found)

nbbn.warmup(["float32"], norms=[{norm!r}])
before = kernels()
assert before
for dims in ((3, 4, 5), (4, 8, 70, 80), (600, 4, 40), (2, 4, 200_000)):
    x = np.random.default_rng(0).normal(size=dims).astype(np.float32)
    work(x)
    work(np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1))
    work(x[:, :, ::2])
assert kernels() == before, opened[-3:]
nbbn.batch_norm_forward(x.astype(np.float16))
assert kernels() > before, "this test does not see what is loaded"
"""
    )


@pytest.mark.parametrize("along", ["activation", "residual, mask", "activation, residual, mask"])
def test_warmup_of_what_goes_along(python, along):
    """The same with an activation, a residual and lengths, in all modes."""
    python(
        WATCH
        + f"""
along = {along!r}.split(", ")
activation = "relu" if "activation" in along else None
options = {{name: name in along for name in ("residual", "mask")}}
nbbn.warmup(["float32"], activation=activation, **options)
before = kernels()
assert before
for dims in ((3, 4, 5), (16, 8, 70, 80), (600, 4, 40), (2, 4, 200_000)):
    x = np.random.default_rng(0).normal(size=dims).astype(np.float32)
    for x in (x, np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1), x[:, :, ::2]):
        given = {{"residual": x}} if options["residual"] else {{}}
        if options["mask"]:
            given["lengths"] = np.full(len(x), x.shape[-1] - 1)
        norm = nbbn.BatchNorm(x.shape[1], activation=activation)
        for mode in (True, False):
            norm.train(mode)(x, **given)
            norm.backward(x)
assert kernels() == before, opened[-3:]
nbbn.batch_norm_forward(x.astype(np.float16))
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
