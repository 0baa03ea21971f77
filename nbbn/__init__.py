"""Batch normalization for arrays, outside any deep-learning framework."""

from nbbn.errors import DeviceError
from nbbn.family import (
    NormForward,
    NormGradients,
    group_norm,
    group_norm_backward,
    group_norm_forward,
    instance_norm,
    instance_norm_backward,
    instance_norm_forward,
    layer_norm,
    layer_norm_backward,
    layer_norm_forward,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
)
from nbbn.folding import Folded, fold
from nbbn.functional import (
    BatchNormForward,
    BatchNormGradients,
    BatchNormResidualGradients,
    batch_norm,
    batch_norm_backward,
    batch_norm_forward,
    batch_stats,
    warmup,
)
from nbbn.memory import set_recycling
from nbbn.module import BatchNorm
from nbbn.modules import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from nbbn.options import Renorm
from nbbn.population import population_stats
from nbbn.stats import BatchStats

__version__ = "0.1.0"

__all__ = [
    "BatchNorm",
    "BatchNormForward",
    "BatchNormGradients",
    "BatchNormResidualGradients",
    "BatchStats",
    "DeviceError",
    "Folded",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "NormForward",
    "NormGradients",
    "RMSNorm",
    "Renorm",
    "__version__",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_forward",
    "batch_stats",
    "fold",
    "group_norm",
    "group_norm_backward",
    "group_norm_forward",
    "instance_norm",
    "instance_norm_backward",
    "instance_norm_forward",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_forward",
    "population_stats",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "set_recycling",
    "warmup",
]
