"""The one table of storage types. A new type is a row here, a load and a store in `cpu.simd`."""

import numpy as np

# Storage type → the scalar type that the kernels are compiled for. Sums are float64 for both.
REALS: dict[np.dtype, type] = {
    np.dtype(np.float32): np.float32,
    np.dtype(np.float64): np.float64,
}
NAMES = " or ".join(str(dtype) for dtype in REALS)
STATISTICS = np.dtype(np.float64)
