"""Everything there is to find out on a machine with a GPU, in one go of under ten minutes.

    python benchmarks/gpu.py --json gpu.json

The tests on the GPU (`pytest -m gpu`), compute-sanitizer's memcheck, racecheck and synccheck over a few of
them where it is installed, and the times: the GPU's, as by `nbbn bench --path cuda --cold`, beside a device
copy and whatever else is installed for GPUs, and the host's for a repeated call.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from nbbn.bench.cases import DTYPES, Data
from nbbn.bench.contenders import Unsupported
from nbbn.bench.measure import NBBN, Settings, measure, ready
from nbbn.bench.record import dumped, recorded
from nbbn.bench.request import settings
from nbbn.cuda import target

ROOT = Path(__file__).parent.parent
# One of each form: general, resident, several channels a block, and in teams.
SANITIZED = (
    "test_against_the_oracle and Numba and float32 and "
    "(2x3@1 or 32x27x7 or 5x33@1 or 8x32x8x8 or 8x3x224x224 or 4x7x7x2048 or 32x28x28x128)"
)
# Beside ResNet-50: arrays on which a call costs more than the work, short channels, of which blocks take
# several, and dense layers.
FURTHER = ("small", "dense", "256,512,2,2", "64,2048,1,7", "4096,1024", "65536,64")


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


def host_times(settings: Settings) -> list[dict[str, Any]]:
    """Return the host's time for a call that is repeated, in microseconds: nothing waits for the GPU."""
    from numba import cuda

    found = []
    for case in settings.cases():
        data = Data(case.shape, case.layout, case.dtype, settings.seed)
        try:
            prepared, _ = ready(NBBN, case, data, settings.groups[0])
        except Unsupported:
            continue
        times = []
        for _ in range(20):
            cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(20):
                prepared.call()
            times.append(1e6 * (time.perf_counter() - begin) / 20)
        found.append({"case": case.text, "microseconds": statistics.median(times)})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Run all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--batch", default="32,256", help="images a batch, with commas between")
    parser.add_argument("--dtype", default="float32,float16,bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-checks", action="store_true", help="only the times")
    arguments = parser.parse_args()
    if target.SIMULATED or (reason := target.why_not()) is not None:
        raise SystemExit(f"there is no GPU to measure: {'simulated' if target.SIMULATED else reason}")
    found: dict[str, Any] = {} if arguments.no_checks else {"checks": checks()}
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")  # what there is, should the rest fail
    asked = {
        "layout": "all",
        "dtype": arguments.dtype,
        "path": "cuda",
        "rounds": arguments.rounds,
        "cold": True,
    }
    for name, wanted in (
        ("resnet50", settings(texts=["resnet50"], batches=arguments.batch, **asked)),
        ("further", settings(texts=FURTHER, **asked)),
    ):
        report = measure(wanted, lambda what, part: None)
        found[name] = json.loads(dumped(recorded(wanted, report, sys.argv)))
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")
        for result in report.results:
            times = f"{1e6 * result.spread.median:.1f} µs  {result.rate:.0f} GB/s"
            print(f"{result.case.text}  {result.name}  {times}")
        print("\n".join(report.wrong), flush=True)
    found["host"] = host_times(settings(texts=["small", "dense"], path="cuda", peer="none"))
    arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
