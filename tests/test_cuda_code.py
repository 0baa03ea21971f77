"""The CUDA kernels as machine code, for GPUs that need not be there."""

import json
import pathlib
from importlib import metadata

import numpy as np
import pytest

from nbbn.cuda import kernels, target
from nbbn.cuda.call import Arrays, Cut, Numbers, Operand, Parameter
from nbbn.cuda.plan import FINISHERS, RESIDENT_THREADS, THREADS, Form, Plan
from nbbn.geometry import canonical

pytest.importorskip("numba_cuda", reason="the CUDA kernels are compiled with numba-cuda")

ARCHITECTURES = [(8, 0), (9, 0), (10, 0)]
RECORD = pathlib.Path(__file__).with_name("cuda_registers.json")

_operand, _parameter = Operand(0, 0, 0, 0, 0), Parameter(0, 0, 0)
_arrays = Arrays(_operand, _operand, _operand, 0, *[_parameter] * 4, 0, 0, 0, 0)
_cut, _numbers = Cut(*[0] * 11), Numbers(0.0, 0.0, 0.0)
RESIDENT = [threads for _, threads in RESIDENT_THREADS]

# Kernel, what it takes beside arrays and cut, how wide its blocks are, and how many vectors a thread loads
# and stores at once.
KERNELS = [
    (kernels.collect_rows, (), [THREADS], 4, 0),
    (kernels.collect_columns, (), [THREADS], 4, 0),
    (kernels.finish_stats, (_numbers,), FINISHERS, 0, 0),
    (kernels.use_running_stats, (_numbers,), [THREADS], 0, 0),
    (kernels.normalize_rows, (), [THREADS], 4, 4),
    (kernels.normalize_columns, (), [THREADS], 4, 4),
    (kernels.reduce_rows, (), [THREADS], 8, 0),
    (kernels.reduce_columns, (), [THREADS], 8, 0),
    (kernels.finish_backward, (), FINISHERS, 0, 0),
    (kernels.apply_rows, (), [THREADS], 8, 4),
    (kernels.apply_columns, (), [THREADS], 8, 4),
    (kernels.forward_rows, (_numbers,), RESIDENT[-1:], 4, 4),
    (kernels.backward_rows, (), RESIDENT[-1:], 8, 4),
]
RESIDENT_KERNELS = (kernels.forward_rows, kernels.backward_rows)  # also with several blocks a channel


class Variant:
    """What decides on a kernel's code: the type, and whether whole vectors lie at multiples of 16 bytes."""

    def __init__(self, real, vectors):
        self.real = real
        self.vectors = vectors

    def names(self, kernel, threads, teams, monkeypatch):
        device = target.Properties((9, 0), 132, 232448, True)
        monkeypatch.setattr(target, "properties", lambda number: device)
        size = np.dtype(self.real).itemsize
        width = 64 if self.vectors else 63
        strides = (64 * width * size, width * size, size)
        plan = Plan(canonical((8, 64, width), 1, strides, strides), self.real, 0)
        assert (plan.width > 1) == self.vectors
        team = 2 if teams else 1
        cut = _cut._replace(team=team, teams=2)
        form = Form(threads, 1, cut, 1024 if kernel in RESIDENT_KERNELS else 0)
        return plan.names(form, True)

    def __str__(self):
        return f"{np.dtype(self.real)}-{'vectors' if self.vectors else 'elements'}"


VARIANTS = [Variant(real, vectors) for real in (np.float32, np.float64) for vectors in (True, False)]


# A kernel that touches no array of x's size knows of one variant only.
CASES = [
    pytest.param(*case, variant, teams, id=f"{case[0].__name__}-{variant}{'-teams' if teams else ''}")
    for case in KERNELS
    for variant in (VARIANTS if case[3] else VARIANTS[:1])
    for teams in ([False, True] if case[0] in RESIDENT_KERNELS else [False])
]


def versions():
    """What decides on the number of registers besides the source."""
    return {name: metadata.version(name) for name in ("numba-cuda", "nvidia-nvvm", "nvidia-nvjitlink")}


def registers_allowed(key):
    record = json.loads(RECORD.read_text())
    # Another compiler may take a few more; 128 are what the blocks are made for.
    return record["registers"][key] if record["versions"] == versions() else 128


def compiled(kernel, numbers, threads, variant, teams, monkeypatch):
    """Return a kernel's PTX, and its name in the record."""
    kinds = target.signature((_arrays, _cut, *numbers))
    names = variant.names(kernel, threads, teams, monkeypatch)
    text = target.ptx(target.specialize(kernel, names), kinds, ARCHITECTURES[0], threads)
    return text, f"{kernel.__name__} {variant} {threads}{' teams' if teams else ''}"


@pytest.mark.parametrize(("kernel", "numbers", "blocks", "loads", "stores", "variant", "teams"), CASES)
def test_machine_code(monkeypatch, kernel, numbers, blocks, loads, stores, variant, teams):
    for threads in blocks:
        text, key = compiled(kernel, numbers, threads, variant, teams, monkeypatch)
        assert f".visible .entry {kernel.__name__}(" in text
        # One function, everything inlined, all divisions exact.
        assert ".func" not in text and "call" not in text and "approx" not in text
        vector = "v4.f32" if variant.real is np.float32 else "v2.f64"
        expected = (loads, stores) if variant.vectors else (0, 0)
        assert (text.count(f"ld.global.{vector}"), text.count(f"st.global.{vector}")) == expected
        # What teams tell each other is never read by way of the read-only cache.
        assert ("ld.acquire.gpu" in text) == ("atom.add.acq_rel.gpu" in text) == teams
        assert not teams or "ld.global.nc" not in text
        for architecture in ARCHITECTURES:
            machine = target.link(text, architecture)
            assert machine.spills == 0 and machine.stack == 0
            assert machine.registers <= registers_allowed(f"{key} sm_{architecture[0]}{architecture[1]}")


def record():
    """Write down the registers of all kernels: python -c "import test_cuda_code as t; t.record()"."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for case in CASES:
            kernel, numbers, blocks, _, _, variant, teams = case.values
            for threads in blocks:
                text, key = compiled(kernel, numbers, threads, variant, teams, patch)
                for a in ARCHITECTURES:
                    found[f"{key} sm_{a[0]}{a[1]}"] = target.link(text, a).registers
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
            names = t.VARIANTS[0].names(kernels.use_running_stats, 256, False, patch)
        kinds = target.signature((t._arrays, t._cut, t._numbers))
        if {compiled}:
            target.ptx = None  # must not be called
        print(len(target.machine_code(kernels.use_running_stats, names, kinds, (9, 0))))
        """
    environment = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    first = python(code.format(compiled=False), **environment)
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    assert python(code.format(compiled=True), **environment) == first


def test_without_a_gpu_there_is_a_reason(python):
    reason = python("from nbbn.cuda import target; print(target.why_not())").strip()
    if reason != "None":
        assert "NVIDIA" in reason
