"""The parts that nets are made of. All take and give `(N, C, T, H, W)`, of any length and size."""

from lean3d.blocks.conv import CausalConv3d, Conv3d, ConvBN
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
from lean3d.blocks.streaming import (
    Chain,
    Frames,
    Recent,
    SlidingMax,
    State,
    Stream,
    Streaming,
    Timing,
    Windows,
    map_state,
    split_state,
    stack_states,
    state_batch,
    state_layout,
    stream_of,
    together,
)
from lean3d.blocks.temporal_shift import ShiftConvBN, TemporalShift
from lean3d.blocks.trg import TemporalResidualGradient, TRGPlaces, trg_places

__all__ = [
    "FIGURE_BLOCKS",
    "BlockPlan",
    "CausalConv3d",
    "Chain",
    "Conv3d",
    "ConvBN",
    "ConvStem",
    "ConversionReport",
    "FastConv3d",
    "Frames",
    "FullySeparableBlock",
    "Head",
    "NonLocalBlock",
    "Pool3d",
    "Recent",
    "ResNetStem",
    "ResidualBlock",
    "ShiftConvBN",
    "SlidingMax",
    "SmallBigExtra",
    "SmallBigUnit",
    "SqueezeExcitation",
    "State",
    "Stream",
    "Streaming",
    "TRGPlaces",
    "TemporalMaxPool",
    "TemporalResidualGradient",
    "TemporalShift",
    "Timing",
    "Windows",
    "basic",
    "block_plan",
    "bottleneck",
    "convert_to_fsb",
    "fsb_basic",
    "fsb_bottleneck",
    "map_state",
    "smallbig_basic",
    "smallbig_bottleneck",
    "split_state",
    "stack_states",
    "state_batch",
    "state_layout",
    "stream_of",
    "together",
    "trg_places",
    "use_fast_convs",
]
