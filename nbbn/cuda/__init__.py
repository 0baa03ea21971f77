"""The CUDA path: the stages of the CPU path, with loops for GPUs over the same formulas."""
