"""Batch normalisation in training, with the sum and the ReLU behind it."""

from lean3d.ops.norm.op import batch_norm
from lean3d.ops.norm.reference import batch_norm_reference

__all__ = ["batch_norm", "batch_norm_reference"]
