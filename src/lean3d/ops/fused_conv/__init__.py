"""Convolutions at inference on a CPU, with bias, residual and ReLU in one pass over memory."""

from lean3d.ops.fused_conv.op import (
    PackedConv,
    PackedSmallBig,
    PackedStageTwo,
    TemporalConv,
    algorithms,
    pack,
    pack_small_big,
    pack_stage_two,
)
from lean3d.ops.fused_conv.reference import conv_reference, small_big_reference, stage_two_reference

__all__ = [
    "PackedConv",
    "PackedSmallBig",
    "PackedStageTwo",
    "TemporalConv",
    "algorithms",
    "conv_reference",
    "pack",
    "pack_small_big",
    "pack_stage_two",
    "small_big_reference",
    "stage_two_reference",
]
