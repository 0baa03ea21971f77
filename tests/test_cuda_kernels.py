"""The CUDA kernels without a GPU: in Numba's simulator, and in an emulator whose blocks can wait."""

import ast

import pytest

from cases import DTYPES, type_id

# Of the shapes in simulated.py; the emulator, which is fast, takes them all.
SIMULATED = (0, 2, 5, 8)


@pytest.fixture
def simulate(python):
    """Run a line of Python beside the simulated kernels, and return the value that it prints."""

    def run(line):
        code = f"import numpy as np, simulated\nfrom simulated import Case, LAYOUTS\n{line}"
        return ast.literal_eval(python(code, timeout=600, NUMBA_ENABLE_CUDASIM="1"))

    return run


def interleaved(simulate, seed, check):
    """Run a check in the emulator, where a seed decides on the order of the blocks."""
    pytest.importorskip("greenlet")
    return simulate(f"simulated.emulate({seed})\nsimulated.check_{check}\nprint(True)")


@pytest.mark.parametrize("index", SIMULATED)
def test_against_the_oracle(simulate, seed, index):
    dtype = type_id(DTYPES[(SIMULATED.index(index) + seed) % len(DTYPES)])
    assert simulate(f"simulated.check_shape({seed}, {index}, {dtype!r})\nprint(True)")


@pytest.mark.parametrize("check", ["teams({seed})", "shapes({seed})"])
def test_interleaved_blocks(simulate, seed, check):
    assert interleaved(simulate, seed, check.format(seed=seed))


def test_the_shapes_go_through_all_forms(simulate):
    forms = simulate("print(simulated.all_forms())")
    for way in ("columns", "rows"):
        for kind in ("general", "resident"):
            of_it = [form for form in forms if form[0] == way and form[4] == kind]
            assert {form[1] for form in of_it} == {"vectors", "elements"}
            channels = {"several channels"} if way == "columns" else {"several channels", "one channel"}
            assert {form[3] for form in of_it} == channels
        parts = {form[2] for form in forms if form[0] == way and form[4] == "general"}
        assert parts == {"parts", "one part"}


@pytest.mark.parametrize(
    "check", ["constants()", "offsets({seed})", "isolation({seed})", "bits({seed})", "running({seed})"]
)
def test_properties(simulate, seed, check):
    assert interleaved(simulate, seed, check.format(seed=seed))


@pytest.mark.parametrize("check", ["roundings", "cancellation"])
def test_sixteen_bits(simulate, seed, check):
    assert interleaved(simulate, seed, f"{check}({seed})")
