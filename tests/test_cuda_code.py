"""The CUDA kernels as machine code, for GPUs that need not be there."""

import contextlib
import json
import pathlib
import re
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest

from nbbn.cuda import kernels, target
from nbbn.cuda.call import Arrays, FusedArrays, MaskedArrays, Numbers, Operand, Parameter
from nbbn.cuda.plan import FINISHERS, Plan
from nbbn.cuda.run import Run
from nbbn.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, STORAGES
from nbbn.geometry import canonical
from nbbn.problem import Form, Problem

pytest.importorskip("numba_cuda", reason="the CUDA kernels are compiled with numba-cuda")

ARCHITECTURES = [(8, 0), (9, 0), (10, 0)]
RECORD = pathlib.Path(__file__).with_name("cuda_registers.json")

DEVICE = target.Properties((9, 0), 132, 232448, True)

_operand, _parameter = Operand(0, 0, 0, 0, 0), Parameter(0, 0, 0)
_arrays = Arrays(_operand, _operand, _operand, 0, *[_parameter] * 4, 0, 0, 0, 0)
_masked = MaskedArrays(*_arrays, 0, 0, 0)
_fused = FusedArrays(*_masked, _operand, _operand, 0.0)
_numbers = Numbers(0.0, 0.0, 0.0)

# Shapes that lead to every form: of whole vectors, and not; and whether channels are last.
SHAPES = {
    "rows": ((32, 256, 16, 16), (32, 256, 13, 13), False),
    "rows in teams": ((32, 256, 80, 80), (32, 256, 79, 79), False),
    "tiny rows": ((256, 512, 2, 4), (64, 2048, 1, 7), False),
    "columns": ((32, 4096, 7, 7), (32, 4097, 7, 7), True),
    "columns in teams": ((32, 512, 28, 28), (32, 511, 28, 28), True),
}
# Kernel, form, its arguments, where it is looked at, and how many vectors of an array a thread loads and
# stores in one go.
GENERAL = ("rows", "columns")
KERNELS = [
    (kernels.collect, "general", GENERAL, 1, 0),
    (kernels.normalize, "general", GENERAL, 1, 1),
    (kernels.reduce, "general", GENERAL, 2, 0),
    (kernels.apply, "general", GENERAL, 2, 1),
    (kernels.forward, "resident", SHAPES, 1, 1),
    (kernels.backward, "resident", SHAPES, 2, 1),
]
NUMBERED = (kernels.finish_stats, kernels.use_running_stats, kernels.forward)


def plan(way, vectors, storage, arrays=2):
    """Return how one of the shapes is cut on an H100."""
    whole, odd, last = SHAPES[way]
    shape = whole if vectors else odd
    order = [0, 2, 3, 1] if last else [0, 1, 2, 3]
    strides, step = [0] * 4, storage.dtype.itemsize
    for d in reversed(order):
        strides[d] = step
        step *= shape[d]
    found = Plan(canonical(shape, 1, *[tuple(strides)] * arrays), storage, 0)
    width = 8 if last and storage.dtype.itemsize == 2 else 16  # bytes of a vector
    assert (found.access, found.columns) == (width if vectors else storage.dtype.itemsize, last)
    form = found.resident
    assert ("teams" in way) == (form.teams > 0)
    assert form.lanes == 1 or "tiny" in way or last
    return found


class Case:
    """A kernel as it is compiled for one type, width and form."""

    def __init__(self, kernel, way, vectors, storage, which, loads=0, stores=0, finishers=0):
        self.kernel, self.way, self.vectors, self.storage = kernel, way, vectors, storage
        self.which, self.loads, self.stores, self.finishers = which, loads, stores, finishers
        kind = f"{storage.name}-{'vectors' if vectors else 'elements'}"
        self.key = f"{kernel.__name__} {finishers or f'{way} {kind}'}"

    def prepare(self, monkeypatch):
        """Look the plan up, as if there were a device."""
        monkeypatch.setattr(target, "properties", lambda number: DEVICE)
        arrays = 3 if self.kernel in (kernels.reduce, kernels.apply, kernels.backward) else 2
        self.plan = plan(self.way, self.vectors, self.storage, arrays)
        if self.finishers:
            self.plan.general = self.plan.general._replace(
                cut=self.plan.general.cut._replace(parts=self.finishers)
            )
            self.form = self.plan._finish()
        else:
            self.form = getattr(self.plan, self.which)
        self.names = self.plan.names(self.form, True)
        numbers = (_numbers,) if self.kernel in NUMBERED else ()
        self.kinds = target.signature((_arrays, self.form.cut, *numbers))

    def ptx(self, monkeypatch):
        """Compile it."""
        self.prepare(monkeypatch)
        special = target.specialize(self.kernel, self.names)
        return target.ptx(special, self.kinds, ARCHITECTURES[0], self.form.threads)


# The 16-bit types differ in a few instructions only: what one shows, the other need not.
SIXTEEN = {
    FLOAT16: {"rows", "columns", "rows in teams", "columns in teams", "tiny rows"},
    BFLOAT16: {"rows", "columns", "columns in teams"},
}
COUNTING = (kernels.collect, kernels.forward, kernels.finish_stats)
FINISHING = (kernels.finish_stats, kernels.finish_backward)
# The cases of each way of a kernel, which differ in a few instructions.
WAYS = {
    f"{kernel.__name__}-{way}": [
        Case(kernel, way, vectors, storage, which, loads, stores)
        for storage in STORAGES
        for vectors in (True, False)
        if way in SIXTEEN.get(storage, SHAPES) and (vectors or storage not in SIXTEEN or way == "rows")
    ]
    for kernel, which, ways, loads, stores in KERNELS
    for way in ways
}
# A kernel that touches no array of x's size knows of one type only.
for _kernel in FINISHING:
    WAYS[_kernel.__name__] = [Case(_kernel, "rows", True, FLOAT32, "", finishers=f) for f in FINISHERS]
WAYS["use_running_stats"] = [Case(kernels.use_running_stats, "rows", True, FLOAT32, "general")]
CASES = [case for cases in WAYS.values() for case in cases]


def versions():
    """What decides on the number of registers besides the source."""
    return {name: metadata.version(name) for name in ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink")}


def registers_allowed(key):
    record = json.loads(RECORD.read_text())
    # Another compiler may take a few more, as may a form of which nothing is recorded; 128 are what the
    # blocks are made for.
    if record["versions"] != versions():
        return 128
    return min(128, record["registers"].get(key, 128) + 8)


@pytest.mark.drawn(0.5)
@pytest.mark.parametrize("cases", WAYS.values(), ids=WAYS)
def test_machine_code(monkeypatch, rng, cases):
    """Of each way that is drawn, one case, which is another one in the next run."""
    check_machine_code(monkeypatch, cases[rng.integers(len(cases))])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key.replace(" ", "-"))
def test_all_machine_code(monkeypatch, case):
    check_machine_code(monkeypatch, case)


def check_machine_code(monkeypatch, case):
    text = case.ptx(monkeypatch)
    assert f".visible .entry {case.kernel.__name__}(" in text
    # One function, everything inlined, all divisions exact.
    assert ".func" not in text and "call" not in text and "approx" not in text
    pairs = "v2.u32" if "columns" in case.way else "v4.u32"
    vector = {FLOAT32: "v4.f32", FLOAT64: "v2.f64"}.get(case.storage, pairs)
    each = dict(case.names)["UNROLLED"] if case.vectors else 0
    found = text.count(f"ld.global.{vector}"), text.count(f"st.global.{vector}")
    assert found == (each * case.loads, each * case.stores), case.key
    # What teams tell each other is never read by way of the read-only cache.
    teams = case.form.teams > 0
    assert ("ld.acquire.gpu" in text) == ("atom.add.acq_rel.gpu" in text) == teams
    assert not teams or "ld.global.nc" not in text
    # A block fits on a multiprocessor with what it keeps: those of a team have one each.
    shared = sum(map(int, re.findall(r"\.shared \.align \d+ \.b8 \w+\[(\d+)\]", text)))
    assert shared + case.form.shared <= DEVICE.shared
    assert not teams or case.form.blocks <= DEVICE.multiprocessors
    for architecture in ARCHITECTURES:
        machine = target.link(text, architecture)
        assert machine.spills == 0 and machine.stack == 0, case.key
        assert machine.registers <= registers_allowed(f"{case.key} sm_{architecture[0]}{architecture[1]}")


LAYER, RMS = Form(along=True), Form(along=True, centered=False)
INSTANCE, GROUP = Form(period=64), Form(pool=8, period=64)
LONG, PLANES = (4096, 1024), (2048, 14, 14)


@pytest.mark.drawn(0.5)
@pytest.mark.parametrize(
    ("kernel", "which", "form", "shape", "storage"),
    [
        (kernels.forward, "resident", LAYER, LONG, FLOAT32),
        (kernels.forward, "resident", RMS, LONG, FLOAT16),
        (kernels.backward, "resident", LAYER, LONG, BFLOAT16),
        (kernels.apply, "general", LAYER, LONG, FLOAT64),
        (kernels.reduce, "across", LAYER, LONG, FLOAT16),
        (kernels.sum_gradients, "gradients", INSTANCE, PLANES, FLOAT32),
        (kernels.backward, "resident", INSTANCE, PLANES, FLOAT32),
        (kernels.reduce, "general", GROUP, PLANES, FLOAT16),
        (kernels.finish_stats, "finish", GROUP, PLANES, FLOAT32),
        (kernels.finish_backward, "finish", GROUP, PLANES, FLOAT32),
    ],
)
def test_machine_code_of_other_forms(monkeypatch, kernel, which, form, shape, storage):
    monkeypatch.setattr(target, "properties", lambda number: DEVICE)
    monkeypatch.setattr(target, "current", contextlib.nullcontext)
    strides = np.empty(shape, storage.dtype).strides
    run = Run(Problem(shape, 0, (strides,) * 3, storage, 1, "cuda:0", form))
    plan = run.plan if which != "across" else run.across
    way = plan.general if which == "across" else getattr(plan, which)
    names = plan.names(way, True)
    if form.along and which != "across":
        parameter = Parameter(256, 4, FLOAT32.code)
        names += plan.affine_names(parameter, parameter)
    numbers = (_numbers,) if kernel in NUMBERED else ()
    kinds = target.signature((_arrays, way.cut, *numbers))
    text = target.ptx(target.specialize(kernel, names), kinds, ARCHITECTURES[0], way.threads)
    assert ".func" not in text and "call" not in text and "approx" not in text
    if form.along and which != "across":
        # Parameters are read as vectors, beside those of x and grad_out.
        arrays = {kernels.forward: 1, kernels.backward: 2, kernels.apply: 2}[kernel]
        vectors = len(re.findall(r"ld\.global\.v\d", text))
        assert vectors > arrays * dict(names)["UNROLLED"]
    for architecture in ARCHITECTURES:
        machine = target.link(text, architecture)
        assert machine.spills == 0 and machine.stack == 0 and machine.registers <= 128


MASKED, GELU = Form(masked=True), Form(activation="gelu")
RESIDUAL, ALL = Form(activation="relu", residual=True), Form(activation="silu", residual=True, masked=True)


@pytest.mark.drawn(0.5)
@pytest.mark.parametrize(
    ("kernel", "form", "way", "storage"),
    [
        (kernels.collect, MASKED, "rows", FLOAT32),
        (kernels.collect, MASKED, "columns", FLOAT16),
        (kernels.reduce, ALL, "rows", FLOAT32),
        (kernels.apply, GELU, "columns", FLOAT32),
        (kernels.apply, ALL, "rows", BFLOAT16),
        (kernels.normalize, ALL, "rows", FLOAT64),
        (kernels.finish_stats, MASKED, "rows", FLOAT32),
        (kernels.forward, MASKED, "rows in teams", FLOAT32),
        (kernels.forward, GELU, "rows", FLOAT16),
        (kernels.forward, ALL, "columns", FLOAT32),
        (kernels.backward, MASKED, "columns", FLOAT32),
        (kernels.backward, RESIDUAL, "rows in teams", FLOAT32),
        (kernels.backward, ALL, "rows", FLOAT16),
    ],
)
def test_machine_code_of_what_goes_along(monkeypatch, kernel, form, way, storage):
    """One function, without a stack; what an activation or a bit needs is in registers."""
    monkeypatch.setattr(target, "properties", lambda number: DEVICE)
    monkeypatch.setattr(target, "current", contextlib.nullcontext)
    monkeypatch.setattr(target, "upload", lambda array: SimpleNamespace(address=256))
    shape, _, last = SHAPES[way]
    order = [0, 2, 3, 1] if last else [0, 1, 2, 3]
    laid_out = np.empty([shape[d] for d in order], storage.dtype).transpose(np.argsort(order))
    backward = kernel in (kernels.reduce, kernels.apply, kernels.backward)
    strides = [laid_out.strides] * ((3 if backward else 2) + (2 if backward else 1) * form.residual)
    if form.masked:
        of_mask = np.empty(shape[2:], np.bool_)
        strides.append((of_mask.size, 0, *of_mask.strides))
    plan = Run(Problem(shape, 1, tuple(strides), storage, 1, "cuda:0", form)).plan
    which = "resident" if kernel in (kernels.forward, kernels.backward) else "general"
    cut = plan.finish if kernel is kernels.finish_stats else getattr(plan, which)
    names, arrays = plan.names(cut, True), _masked
    if form.activation or form.residual:
        names, arrays = names + plan.fused_names(cut), _fused
    kinds = target.signature((arrays, cut.cut, *[_numbers] * (kernel in NUMBERED)))
    text = target.ptx(target.specialize(kernel, names), kinds, ARCHITECTURES[0], cut.threads)
    assert ".func" not in text and "call" not in text
    assert ("popc" in text) == (form.masked and kernel in COUNTING)
    for architecture in ARCHITECTURES:
        machine = target.link(text, architecture)
        assert machine.spills == 0 and machine.stack == 0 and machine.registers <= 128


def record():
    """Write down the registers of all kernels: python -c "import test_cuda_code as t; t.record()"."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for case in CASES:
            text = case.ptx(patch)
            for a in ARCHITECTURES:
                found[f"{case.key} sm_{a[0]}{a[1]}"] = target.link(text, a).registers
    RECORD.write_text(json.dumps({"versions": versions(), "registers": found}, indent=1) + "\n")


def test_numbers_are_passed_in_the_order_that_kernels_take_them():
    numbers = iter(range(100))
    operands = [Operand(*(next(numbers) for _ in Operand._fields)) for _ in range(3)]
    stats = next(numbers)
    parameters = [Parameter(*(next(numbers) for _ in Parameter._fields)) for _ in range(4)]
    arrays = Arrays(*operands, stats, *parameters, *(next(numbers) for _ in range(4)))
    assert arrays.flat() == tuple(range(next(numbers)))


def test_machine_code_is_kept_on_disk(python, tmp_path):
    """A second process compiles nothing."""
    code = """if True:
        import test_cuda_code as t, pytest
        from nbbn.cuda import kernels, target
        with pytest.MonkeyPatch.context() as patch:
            case = t.CASES[-1]
            case.prepare(patch)
        if {compiled}:
            target.ptx = None  # must not be called
        print(len(target.machine_code(case.kernel, case.names, case.kinds, (9, 0))))
        """
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = python(code.format(compiled=False), **environment)
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    assert python(code.format(compiled=True), **environment) == first


def test_without_a_gpu_there_is_a_reason(python):
    reason = python("from nbbn.cuda import target; print(target.why_not())").strip()
    if reason != "None":
        assert "NVIDIA" in reason
