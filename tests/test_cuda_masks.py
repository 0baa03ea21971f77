"""Masks in the CUDA kernels, without a GPU."""

import pytest

from test_cuda_fused import SHARED


@pytest.mark.parametrize("check", ["cases", "whole", "activations"])
@pytest.mark.parametrize("shared", SHARED)
def test_kernels(simulate, seed, check, shared):
    simulate(f"check_{check}({seed}, {shared})", seed)


def test_functions(simulate, seed):
    simulate(f"check_functions({seed})", seed)
