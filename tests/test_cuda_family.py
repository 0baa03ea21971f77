"""Layer, RMS, instance and group normalization in the CUDA kernels, without a GPU."""

import pytest

from test_cuda_fused import SHARED


@pytest.mark.parametrize("shared", SHARED)
def test_against_the_oracle(simulate, seed, shared):
    simulate(f"check_cases({seed}, {shared})", seed)


def test_in_the_simulator(simulate, seed):
    simulate(f"check_simulator({seed})")


def test_the_cases_go_all_ways(simulate):
    ways = set().union(*(simulate(f"all_ways({shared})", 0) for shared in SHARED))
    kept = {"resident", "teams", "parts", "one part"}
    for form, columns in (("along", "rows"), ("period", "rows"), ("period", "columns"), ("pool", "rows"),
                          ("pool", "columns")):  # fmt: skip
        found = {(way[1], way[3]) for way in ways if way[0] == form and way[2] == columns}
        places = {"parts", "one part"} if form == "pool" else kept
        assert {place for _, place in found} == places, (form, columns, found)
        assert {kind for kind, _ in found} == {"vectors", "elements"}


@pytest.mark.parametrize(
    "check", ["constants()", "offsets({0})", "isolation({0})", "in_place({0})", "bits({0})"]
)
def test_properties(simulate, seed, check):
    simulate(f"check_{check.format(seed)}", seed)
