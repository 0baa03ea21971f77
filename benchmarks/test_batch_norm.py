"""pytest benchmarks/ --benchmark-only: every path and every peer on the cases of `nbbn bench`.

    pytest benchmarks/ --benchmark-only --shapes resnet50 --mode forward --benchmark-autosave

An answer is checked before it is timed. Unlike in `nbbn bench`, one contender follows the other here: on a
machine that is not quiet, compare with that command.
"""

import pytest

pytest.importorskip("pytest_benchmark")


def test_batch_norm(benchmark, call, case, group, contender):
    benchmark.group = f"{case.text}, {group.text}"
    benchmark.extra_info.update(
        contender=contender.name, version=contender.version(), bytes=case.nbytes, threads=group.threads
    )
    benchmark(call)
    if benchmark.stats is not None:  # none with --benchmark-disable
        benchmark.extra_info["GB/s"] = case.nbytes / benchmark.stats.stats.median / 1e9
