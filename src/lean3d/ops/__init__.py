"""Operators: for each, a plain reference that defines the answer, and an equal form that is fast."""

from lean3d.ops.conv import conv3d, conv3d_reference
from lean3d.ops.fast_conv import fast_conv3d, fast_conv3d_reference
from lean3d.ops.norm import batch_norm, batch_norm_reference
from lean3d.ops.pool import max_pool3d, pool3d, pool3d_reference

__all__ = [
    "batch_norm",
    "batch_norm_reference",
    "conv3d",
    "conv3d_reference",
    "fast_conv3d",
    "fast_conv3d_reference",
    "max_pool3d",
    "pool3d",
    "pool3d_reference",
]
