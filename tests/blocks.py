"""The code blocks of the documentation, run as tests by Sybil: `pytest README.md docs`.

A block is a test, and the blocks of a page share names and a directory. Python is executed, as a doctest
where it has prompts; a block of `sh` is run by `bash -e` in a copy of the tree, in an environment of the
page's own, so that what a page installs and writes is gone with it. What needs a GPU is, where there is none,
run in a process of its own, on arrays of Numba's CUDA simulator and with the kernels in the tests' emulator.
"""

import doctest
import functools
import importlib.util
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import unittest
import venv
import xml.etree.ElementTree as ElementTree

import sybil.evaluators.doctest
import sybil.evaluators.skip
from sybil import Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.example import SybilFailure
from sybil.parsers.markdown import CodeBlockParser, SkipParser

from nbbn.cuda import target

ROOT = pathlib.Path(__file__).parent.parent
RUN = ("python", "sh")
SHOWN = ("text", "console", "json", "dockerfile")
SECONDS = (
    300  # for a block of sh: hundreds are too many, but kernels may have to be compiled, and wheels fetched
)

# --- Python ------------------------------------------------------------------------------------------

_execute = PythonEvaluator()


def _examples(source):
    return doctest.DocTestParser().get_examples(source)


def run_python(example):
    """Execute a block: example by example if it has prompts."""
    if not example.parsed.startswith(">>>"):
        return _execute(example)
    # Not that of other blocks: doctest looks up the lines of whatever is called in this one's.
    name = f"{pathlib.Path(example.path).name}:{example.line}"
    test = sybil.evaluators.doctest.DocTest(
        _examples(example.parsed), example.namespace, name, example.path, example.line, None
    )
    said = []
    # Sybil's: it keeps the names of one test for the next.
    runner = sybil.evaluators.doctest.DocTestRunner(doctest.REPORT_NDIFF)
    runner.run(test, clear_globs=False, out=said.append)
    return "".join(said)


class Python(CodeBlockParser):
    """Finds blocks of Python. All of them must compile, those that are skipped too."""

    language = "python"

    def __call__(self, document):
        for region in super().__call__(document):
            if region.parsed.startswith(">>>"):
                for one in _examples(region.parsed):
                    compile(one.source, document.path, "single")
            else:
                compile(region.parsed, document.path, "exec")
            yield region

    def evaluate(self, example):
        return run_python(example)


def _skip(example, reason):
    return unittest.SkipTest(f"{pathlib.Path(example.path).relative_to(ROOT)}, line {example.line}: {reason}")


class Skipper(sybil.evaluators.skip.Skipper):
    """Skips a block, unless it can be run in the simulator."""

    def evaluate_other_example(self, example):
        try:
            super().evaluate_other_example(example)
        except unittest.SkipTest as skipped:
            if has_gpu() or "HAS_GPU" not in example.document.text:
                raise _skip(example, skipped) from None
        else:
            return
        how, why = simulated(example.path)[PAGES.identify(example)]
        if how == "skipped":
            raise unittest.SkipTest(why.splitlines()[0])
        if how != "passed":
            raise SybilFailure(example, f"in Numba's CUDA simulator:\n{why}")


class Skip(SkipParser):
    """Finds what says that the next block is skipped. Without a reason Sybil would count it as passed."""

    def __init__(self):
        super().__init__()
        self.skipper = Skipper(self.directive)

    def __call__(self, document):
        for region in super().__call__(document):
            action, reason = region.parsed
            if action != "end" and not reason:
                raise ValueError(f"{document.path}: every skip needs a reason")
            yield region


# --- sh ----------------------------------------------------------------------------------------------


def _not_copied(directory, names):
    """Return what git ignores, but for compiled kernels, which are taken while the sources are the same."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    ignored = [line.rstrip("/") for line in lines if line and not line.startswith("#")]
    kept = {"__pycache__", "*.nbi", "*.nbc"}
    return shutil.ignore_patterns(".git", *(set(ignored) - kept))(directory, names)


def _environment(directory):
    """Make a virtual environment that has all that this one has, and keep to itself what is installed."""
    home = directory / "environment"
    venv.create(home, symlinks=True)
    purelib = sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)})
    # A directory that is added so has its own .pth files read, in which editable installations are.
    lines = [
        f"import site; site.addsitedir({p!r})\n"
        for p in dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))
    ]
    (pathlib.Path(purelib) / "outer.pth").write_text("".join(lines))
    pip = home / "bin" / "pip"
    pip.write_text('#!/bin/sh\nexec "$(dirname "$0")/python" -m pip "$@"\n')
    pip.chmod(0o755)
    paths = [str(home / "bin"), sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    own = {"PATH": os.pathsep.join(paths), "VIRTUAL_ENV": str(home), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    # Matplotlib and others would look for a screen, or leave files at home.
    # What these tests are run with is not for those that a block runs.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**outer, **own, "MPLBACKEND": "agg", "COLUMNS": "100"}


def run_sh(example):
    """Run a block by bash, in a copy of the tree."""
    if target.SIMULATED:
        return ""  # it has been run outside
    if "python3 -m venv .venv" in example.parsed:
        raise _skip(example, "makes an environment of the reader's own: .ci/run runs this line")
    names = example.namespace
    if "_tree" not in names:
        names["_tree"] = names["_scratch"] / "tree"
        shutil.copytree(ROOT, names["_tree"], ignore=_not_copied)
        names["_environment"] = _environment(names["_scratch"])
    process = subprocess.Popen(
        ["bash", "-e", "-c", example.parsed],
        cwd=names["_tree"],
        env=names["_environment"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        return f"no end after {SECONDS} s:\n{example.parsed}\n{said}"
    return f"exit status {process.returncode}:\n{example.parsed}\n{said}" if process.returncode else ""


# --- without a GPU -----------------------------------------------------------------------------------


def emulate():
    """From now on, run kernels in the emulator, in blocks so small that it takes no minutes."""
    import emulator
    from nbbn.cuda import plan

    plan.THREADS, plan.LANES, plan.RADIX, plan.WARP = 8, 2, 2, 2
    plan.BLOCKS, plan.FINISHERS = 6, (1, 2, 4)
    plan.RESIDENT_THREADS = ((1 << 9, 4), (1 << 62, 8))
    device = target.properties(0)._replace(cooperative=True, multiprocessors=7)
    target.properties = lambda number: device
    target._launcher = functools.cache(emulator.Launcher)


@functools.cache
def simulated(page):
    """Run a page in the simulator; return how each of its blocks ended and why, by name."""
    with tempfile.TemporaryDirectory() as directory:
        report = pathlib.Path(directory) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", str(page)],
            cwd=ROOT,
            env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTEST_ADDOPTS": ""},
            capture_output=True,
            text=True,
        )
        if not report.exists():
            raise RuntimeError(done.stdout + done.stderr)
        ends = {}
        for case in ElementTree.parse(report).iter("testcase"):
            ended = next((one for one in case if one.tag in ("skipped", "failure", "error")), None)
            ends[case.get("name")] = (
                ("passed", "")
                if ended is None
                else (ended.tag, f"{ended.get('message')}\n{ended.text or ''}")
            )
        return ends


# --- pages -------------------------------------------------------------------------------------------


@functools.cache
def has_gpu():
    """Whether GPU arrays can be computed with: on a GPU, or in the simulator."""
    return target.why_not() is None


def _flags():
    flags = {"HAS_GPU": has_gpu()}
    for name in ("torch", "jax", "cupy", "safetensors"):
        # These know nothing of a GPU that is simulated; their blocks for the CPU are run outside.
        known = not (target.SIMULATED and name != "safetensors")
        flags[f"HAS_{name.upper()}"] = known and importlib.util.find_spec(name) is not None
    return flags


def _set_up(names):
    names.update(_flags(), _scratch=pathlib.Path(tempfile.mkdtemp()), _from=os.getcwd())
    here = names["_scratch"] / "here"
    here.mkdir()
    os.chdir(here)


def _tear_down(names):
    os.chdir(names["_from"])
    shutil.rmtree(names["_scratch"], ignore_errors=True)


PAGES = Sybil(
    parsers=[Python(), CodeBlockParser("sh", run_sh), Skip()],
    path=str(ROOT),
    patterns=["README.md", "docs/*.md", "docs/**/*.md"],
    excludes=["docs/_build/**"],
    setup=_set_up,
    teardown=_tear_down,
)
collect = PAGES.pytest()
if target.SIMULATED:
    emulate()
