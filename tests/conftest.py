"""Fresh random data for every run, which can be had again: --seed, or NBBN_TEST_SEED."""

import ast
import gc
import os
import pathlib
import subprocess
import sys
import zlib

import hypothesis
import numpy as np
import pytest

pytest.register_assert_rewrite("checks")

TESTS = pathlib.Path(__file__).parent

# Examples of each property. How long one takes says nothing on a machine that has other things to do.
PROFILES = {"short": 100, "long": 10_000}
for _name, _examples in PROFILES.items():
    hypothesis.settings.register_profile(
        _name,
        deadline=None,
        max_examples=_examples,
        print_blob=True,
        report_multiple_bugs=False,  # one is enough, and each is made small at length
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile(os.environ.get("NBBN_TEST_PROFILE", "short"))


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="the seed of all random data (default: a fresh one)")


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its seed
def pytest_configure(config):
    of_all_processes = getattr(config, "workerinput", {}).get("nbbn_seed")
    seed = config.getoption("--seed") if of_all_processes is None else of_all_processes
    if seed is None:
        seed = os.environ.get("NBBN_TEST_SEED")
    config.nbbn_seed = int.from_bytes(os.urandom(4), "little") if seed is None else int(seed)
    if config.getoption("--hypothesis-seed") is None:
        config.option.hypothesis_seed = config.nbbn_seed


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_configure_node(node):
    node.workerinput["nbbn_seed"] = node.config.nbbn_seed


def pytest_collection_modifyitems(config, items):
    """Of tests that are drawn, take this run's share; all of them in a long run, and those that are named."""
    if os.environ.get("NBBN_TEST_PROFILE") == "long" or any("::" in argument for argument in config.args):
        return
    left = []
    for item in items:
        if (drawn := item.get_closest_marker("drawn")) is not None:
            lot = np.random.default_rng([config.nbbn_seed, zlib.crc32(item.nodeid.encode())]).random()
            if lot >= drawn.args[0]:
                left.append(item)
    if left:
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)


def pytest_report_header(config):
    return f"nbbn: --seed={config.nbbn_seed}"


def pytest_terminal_summary(terminalreporter, config):
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"nbbn: --seed={config.nbbn_seed} repeats the random data of this run")


@pytest.fixture
def seed(request):
    """The seed of this run, printed when a test fails."""
    print(f"--seed={request.config.nbbn_seed}")
    return request.config.nbbn_seed


@pytest.fixture
def rng(request, seed):
    """Random numbers of this test's own: the same whether it runs alone or with the others."""
    return np.random.default_rng([seed, zlib.crc32(request.node.name.encode())])


@pytest.fixture(scope="module", autouse=True)
def _garbage_of_others():
    """Keep what earlier modules left, compiled kernels above all, out of each collection from here on."""
    gc.collect()
    gc.freeze()


def _run_python(code, *, package=None, timeout=120, **environment):
    """Run code in a fresh interpreter that can import nbbn and the tests' helpers; return its output."""
    import nbbn

    package = package or pathlib.Path(nbbn.__file__).parent.parent
    path = os.pathsep.join([str(package), str(TESTS)])
    try:
        done = subprocess.run(
            [sys.executable, "-X", "faulthandler", "-c", code],
            cwd=package,  # `python -c` looks there first
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"no end after {timeout} s\n{expired.stdout}\n{expired.stderr}")
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def python():
    """The function that runs code in a fresh interpreter."""
    return _run_python


@pytest.fixture
def simulate(request, python):
    """Run a check of simulated_X.py, for test_cuda_X.py, and return what it does.

    In the emulator, where a seed decides on the order of the blocks, or else in Numba's simulator.
    """
    module = request.module.__name__.replace("test_cuda", "simulated")

    def run(check, seed=None):
        pytest.importorskip("greenlet")
        emulate = "" if seed is None else f"simulated.emulate({seed})"
        code = f"import simulated, {module} as checks\n{emulate}\nprint(checks.{check})"
        return ast.literal_eval(python(code, timeout=600, NUMBA_ENABLE_CUDASIM="1"))

    return run
