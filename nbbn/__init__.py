"""Batch normalization for arrays, outside any deep-learning framework."""

from nbbn.errors import DeviceError
from nbbn.folding import Folded, fold
from nbbn.functional import (
    BatchNormForward,
    BatchNormGradients,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    batch_stats,
    warmup,
)
from nbbn.memory import set_recycling
from nbbn.module import BatchNorm
from nbbn.options import Renorm
from nbbn.population import population_stats
from nbbn.stats import BatchStats

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNormForward",
    "BatchNormGradients",
    "BatchStats",
    "DeviceError",
    "Folded",
    "Renorm",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_stats",
    "fold",
    "population_stats",
    "set_recycling",
    "warmup",
]
