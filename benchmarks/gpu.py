"""Everything there is to find out on a machine with a GPU, in one go of under ten minutes.

    python benchmarks/gpu.py --json gpu.json

The tests on the GPU (`pytest -m gpu`), compute-sanitizer's memcheck, racecheck and synccheck over a few of
them where it is installed, and the times: device time by events, over buffers that are rotated so that L2 is
cold, and the host's time for a repeated call. PyTorch is timed beside it where it is installed with CUDA,
with cuDNN and without it.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from shapes import DENSE, SMALL, resnet50

import nbbn
from nbbn.cuda import target
from nbbn.cuda.plan import Plan
from nbbn.geometry import canonical

ROOT = Path(__file__).parent.parent
COLD = 128 << 20  # bytes that are gone through before a buffer comes up again: more than L2 holds
DTYPES = ("float32", "float64", "float16", "bfloat16")
OPERATIONS = ("training", "backward", "evaluation")
# One of each form: general, resident, several channels a block, and in teams.
SANITIZED = (
    "test_against_the_oracle and Numba and float32 and "
    "(2x3@1 or 32x27x7 or 5x33@1 or 8x32x8x8 or 8x3x224x224 or 4x7x7x2048 or 32x28x28x128)"
)
# Beside ResNet-50: short channels, of which blocks take several, and dense layers.
FURTHER = [
    *SMALL,
    (256, 512, 2, 2),
    (64, 2048, 1, 7),
    *[(*shape, 1, 1) for shape in (*DENSE, (4096, 1024), (65536, 64))],
]


def run(command: list[str], limit: float) -> dict[str, Any]:
    """Run a command, and return how it ended."""
    begin = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        code, text = done.returncode, done.stdout + done.stderr
    except subprocess.TimeoutExpired as error:
        code, text = 124, str(error)
    taken = time.perf_counter() - begin
    print(f"{' '.join(command)}\n  exit {code} after {taken:.0f} s\n{text[-1500:]}", flush=True)
    return {"command": command, "exit": code, "seconds": taken, "tail": text[-4000:]}


def checks() -> list[dict[str, Any]]:
    """Run the tests, and some of them under compute-sanitizer."""
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-x", "tests/test_gpu.py"]
    found = [run(tests, 300)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not installed: its checks have not been run")
        return found
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *tests, "-k", SANITIZED]
        found.append(run(command, 120))
    return found


def form_of(plan: Plan, operation: str) -> dict[str, Any]:
    """Return which of its forms an operation takes, and the blocks of that."""
    resident = None if operation == "evaluation" else plan.resident
    form = resident or plan.general
    return {
        "form": "general" if resident is None else "team" if form.teams else "resident",
        "way": "columns" if form.columns else "rows",
        "blocks": form.blocks,
        "threads": form.threads,
        "channels": form.lanes * form.own,  # of a block
        "team": form.cut.team,
    }


class Case:
    """One operation on one shape, on as many sets of arrays as it takes to keep L2 cold."""

    def __init__(self, operation: str, shape: tuple[int, ...], last: bool, dtype: str) -> None:
        from numba import cuda

        self.operation = operation
        self.axis = 3 if last else 1
        batch, channels, height, width = shape
        self.shape = (batch, height, width, channels) if last else shape
        self.nbytes = np.dtype(np.uint16 if dtype == "bfloat16" else dtype).itemsize * math.prod(shape)
        rng = np.random.default_rng(0)
        host = rng.standard_normal(self.shape, np.float32)
        sets = max(2, -(-COLD // (2 * self.nbytes)))
        if dtype == "bfloat16":  # which Numba's device arrays do not have
            import torch

            x = torch.from_numpy(host).cuda().bfloat16()
            self.sets = [tuple(x.clone() for _ in range(3)) for _ in range(sets)]
        else:
            host = host.astype(dtype)
            self.sets = [tuple(cuda.to_device(host) for _ in range(3)) for _ in range(sets)]
        ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        self.weight, self.var = cuda.to_device(ones), cuda.to_device(ones)
        self.bias, self.mean = cuda.to_device(zeros), cuda.to_device(zeros)
        strides = self.sets[0][0].strides
        geometry = canonical(self.shape, self.axis, *[strides] * (3 if operation == "backward" else 2))
        with target.current(0):
            self.form = form_of(Plan(geometry, np.float32, 0), operation)
        saved = nbbn.batch_norm_forward(self.sets[0][0], axis=self.axis)
        self.saved = {"mean": saved.mean, "invstd": saved.invstd}

    def nbbn(self, number: int) -> None:
        """Run nbbn on one of the sets."""
        x, dy, out = self.sets[number % len(self.sets)]
        if self.operation == "backward":
            nbbn.batch_norm_backward(dy, x, self.weight, **self.saved, axis=self.axis, out=out)
            return
        statistics_ = (self.mean, self.var, self.weight, self.bias)
        nbbn.batch_norm(x, *statistics_, self.operation == "training", axis=self.axis, out=out)

    def copy(self, number: int) -> None:
        """Copy x to out: one read and one write."""
        x, _, out = self.sets[number % len(self.sets)]
        if hasattr(out, "copy_to_device"):
            out.copy_to_device(x)
        else:
            out.copy_(x)

    def torch(self, cudnn: bool) -> Callable[[int], None]:
        """Return PyTorch on the same memory."""
        import torch

        def tensor(array: Any) -> Any:
            found = torch.as_tensor(array, device="cuda")
            return found.movedim(3, 1) if found.ndim == 4 and self.axis == 3 else found

        sets = [tuple(map(tensor, arrays)) for arrays in self.sets]
        weight, bias, mean, var = map(tensor, (self.weight, self.bias, self.mean, self.var))
        own = {name: tensor(value).float() for name, value in self.saved.items()}

        def call(number: int) -> None:
            x, dy, _ = sets[number % len(sets)]
            with torch.backends.cudnn.flags(enabled=cudnn):
                if self.operation == "backward":
                    torch.ops.aten.native_batch_norm_backward(
                        dy, x, weight, mean, var, own["mean"], own["invstd"], True, 1e-5, [True] * 3
                    )
                else:
                    training = self.operation == "training"
                    torch.nn.functional.batch_norm(x, mean, var, weight, bias, training)

        return call


def device_time(call: Callable[[int], None], repetitions: int) -> float:
    """Return the median device time of a call, in microseconds."""
    from numba import cuda

    for number in range(3):
        call(number)
    cuda.synchronize()
    times = []
    for number in range(repetitions):
        begin, end = cuda.event(), cuda.event()
        begin.record()
        call(number)
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return statistics.median(times)


def host_time(call: Callable[[int], None]) -> float:
    """Return the host's time for a call that is repeated, in microseconds."""
    from numba import cuda

    times = []
    for _ in range(20):
        cuda.synchronize()
        begin = time.perf_counter()
        for number in range(20):
            call(number)
        times.append(1e6 * (time.perf_counter() - begin) / 20)
    cuda.synchronize()
    return statistics.median(times)


def timings(batches: list[int], dtypes: list[str], repetitions: int) -> list[dict[str, Any]]:
    """Time every operation on every shape and type."""
    try:
        import torch

        peers = torch.cuda.is_available()
    except ImportError:
        peers = False
    if not peers and "bfloat16" in dtypes:
        print("bfloat16 is not timed without PyTorch: there is nothing else that has it")
        dtypes = [dtype for dtype in dtypes if dtype != "bfloat16"]
    results = []
    for batch, dtype in itertools.product(batches, dtypes):
        # The others have a size of their own.
        for shape in resnet50(batch) + (FURTHER if batch == batches[0] else []):
            for last in (False, True):
                for operation in OPERATIONS:
                    case = Case(operation, shape, last, dtype)
                    contenders: dict[str, Callable[[int], None]] = {"nbbn": case.nbbn, "copy": case.copy}
                    if peers:
                        contenders |= {"torch cudnn": case.torch(True), "torch": case.torch(False)}
                    one: dict[str, Any] = {
                        "operation": operation,
                        "dtype": dtype,
                        "shape": shape,
                        "layout": "channels-last" if last else "channels-first",
                        **case.form,
                        "megabytes": case.nbytes / 1e6,
                        "microseconds": {n: device_time(c, repetitions) for n, c in contenders.items()},
                        "host_microseconds": host_time(case.nbbn),
                    }
                    results.append(one)
                    print(json.dumps(one), flush=True)
    return results


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16", "bfloat16"], choices=DTYPES)
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--no-checks", action="store_true", help="only the times")
    arguments = parser.parse_args()
    if target.SIMULATED or (reason := target.why_not()) is not None:
        raise SystemExit(f"there is no GPU to measure: {'simulated' if target.SIMULATED else reason}")
    from numba import cuda

    device = cuda.get_current_device()
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    packages = ("numba", "numba-cuda", "cuda-core", "numpy", "torch", "cupy", "jax")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": name,
        "compute": device.compute_capability,
        "python": platform.python_version(),
        "nbbn": nbbn.__version__,
        "versions": versions,
    }
    if not arguments.no_checks:
        record["checks"] = checks()
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")  # what there is, should the rest fail
    record["timings"] = timings(arguments.batch, arguments.dtype, arguments.repetitions)
    arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
