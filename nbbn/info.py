"""What `python -m nbbn info` tells: all that decides which code runs on this machine, and how fast."""

import importlib.metadata
import platform
from typing import Any

from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target

import nbbn
from nbbn.compiler import pool


def tell() -> int:
    """Print the facts, and return the exit status."""
    for name, value in facts().items():
        print(f"{name:<17}{value}")
    return 0


def facts() -> dict[str, str]:
    """Return what there is to know about this installation and this machine, by name.

    Starts the threads.
    """
    threads = pool.threads()
    return {
        "nbbn": nbbn.__version__,
        "Python": f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        "NumPy": version("numpy"),
        "Numba": version("numba"),
        "llvmlite": version("llvmlite"),
        "tbb": version("tbb"),
        "threads": str(threads),
        "threading layer": pool.layer,
        "CPU": cpu_name(),
        "vector width": vector_width(),
        "kernel cache": kernel_cache(),
        "CUDA": cuda(),
    }


def version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """Return the processor that LLVM compiles for."""
    _, name, _ = cpu_target.target_context.codegen().magic_tuple()
    return str(name)


def vector_width() -> str:
    """Return how wide the vector registers are that LLVM may use, and by which feature of the processor."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    enabled = {feature[1:] for feature in features.split(",") if feature.startswith("+")}
    for feature, bits in (("avx512f", 512), ("avx2", 256), ("avx", 256), ("sse2", 128), ("neon", 128)):
        if feature in enabled:
            fused = ", fma" if "fma" in enabled else ""
            return f"{bits} bits ({feature}{fused})"
    return "unknown"


def kernel_cache() -> str:
    """Return the directory in which compiled kernels are kept for the next process."""
    from nbbn.cpu.run import compile_for

    try:
        # Numba chooses the directory by the file that a function stands in: any one of nbbn.cpu will do.
        return str(FunctionCache(compile_for).cache_path)
    except RuntimeError:
        return "none, for want of a directory to write to: every process compiles its kernels anew"


def cuda() -> str:
    """Return which CUDA devices there are, or why there is none."""
    from nbbn.cuda.target import SIMULATED, why_not

    if SIMULATED:
        return "Numba's simulator (NUMBA_ENABLE_CUDASIM)"
    if (reason := why_not()) is not None:
        return f"no: {reason}"
    from numba import cuda  # 0.1 s, so only here

    return "; ".join(_device(device) for device in cuda.gpus)


def _device(device: Any) -> str:
    name = device.name.decode() if isinstance(device.name, bytes) else device.name
    major, minor = device.compute_capability
    return f"{name}, compute capability {major}.{minor}"
