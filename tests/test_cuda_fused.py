"""Activations and residuals in the CUDA kernels, without a GPU."""

import pytest

# Bytes of shared memory: as usual; so few that channels are shared by teams, or kept nowhere. And of how many
# types.
SHARED = {None: 4, 1200: 2, 1: 2}


@pytest.mark.parametrize("shared", SHARED)
def test_against_the_oracle(simulate, seed, shared):
    simulate(f"check_cases({seed}, {shared}, {SHARED[shared]})", seed)


def test_in_the_simulator(simulate, seed):
    simulate(f"check_simulator({seed})")


def test_the_cases_go_all_ways(simulate):
    ways = set().union(*(simulate(f"all_ways({shared})", 0) for shared in SHARED))
    for residual in (False, True):
        for columns in ("columns", "rows"):
            found = {way[2:] for way in ways if way[:2] == (residual, columns)}
            assert {place for _, place in found} == {"general", "resident", "teams"}, (
                residual,
                columns,
                found,
            )
            assert {width for width, _ in found} == {"vectors", "elements"}


@pytest.mark.parametrize(
    "check", ["bits({0})", "bits({0}, 1)", "in_place({0})", "in_place({0}, 1)", "special_values()"]
)
def test_properties(simulate, seed, check):
    simulate(f"check_{check.format(seed)}", seed)


def test_functions(simulate, seed):
    simulate(f"check_functions({seed})", seed)
