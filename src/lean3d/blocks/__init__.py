"""The parts that nets are made of. All take and give `(N, C, T, H, W)`, of any length and size."""

from lean3d.blocks.conv import Conv3d, ConvBN
from lean3d.blocks.convert import ConversionReport, convert_to_fsb
from lean3d.blocks.fast_conv import FastConv3d, use_fast_convs
from lean3d.blocks.fsb import FullySeparableBlock
from lean3d.blocks.head import Head
from lean3d.blocks.non_local import NonLocalBlock
from lean3d.blocks.residual import (
    ResidualBlock,
    basic,
    bottleneck,
    fsb_basic,
    fsb_bottleneck,
    smallbig_basic,
    smallbig_bottleneck,
)
from lean3d.blocks.smallbig import FIGURE_BLOCKS, BlockPlan, Pool3d, SmallBigExtra, SmallBigUnit, block_plan
from lean3d.blocks.squeeze_excitation import SqueezeExcitation
from lean3d.blocks.stem import ConvStem, ResNetStem, TemporalMaxPool
from lean3d.blocks.temporal_shift import ShiftConvBN, TemporalShift
from lean3d.blocks.trg import TemporalResidualGradient, TRGPlaces, trg_places

__all__ = [
    "FIGURE_BLOCKS",
    "BlockPlan",
    "Conv3d",
    "ConvBN",
    "ConvStem",
    "ConversionReport",
    "FastConv3d",
    "FullySeparableBlock",
    "Head",
    "NonLocalBlock",
    "Pool3d",
    "ResNetStem",
    "ResidualBlock",
    "ShiftConvBN",
    "SmallBigExtra",
    "SmallBigUnit",
    "SqueezeExcitation",
    "TRGPlaces",
    "TemporalMaxPool",
    "TemporalResidualGradient",
    "TemporalShift",
    "basic",
    "block_plan",
    "bottleneck",
    "convert_to_fsb",
    "fsb_basic",
    "fsb_bottleneck",
    "smallbig_basic",
    "smallbig_bottleneck",
    "trg_places",
    "use_fast_convs",
]
