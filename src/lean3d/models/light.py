"""Light 3D ConvNets after Wang, Lin, Wang 2019 (arXiv 1905.13388): known nets of Fully Separable Blocks, with TRG.

C3D's is beside C3D. The paper doesn't say which values of alpha it used, nor where the Temporal Residual Gradient sits;
arguments of all of them:

    expansion   alpha of the blocks
    trg         "none", or some of "input", "stage1" to "stage4" (before res2 to res5), "blocks" (in every block,
                before its first convolution, the shortcut sees the plain features), with commas
    trg_mode    "replace": the gradient in place of its input; "beside": as further channels
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn

from lean3d.blocks import FullySeparableBlock, fsb_basic, fsb_bottleneck, trg_places
from lean3d.models.registry import VideoNet, register_model, scaled
from lean3d.models.resnet3d import DEPTHS_18, DEPTHS_50, Block, resnet3d
from lean3d.models.slowfast import slowfast

TRGMode = Literal["replace", "beside"]


@register_model(sampling_rate=2, size=112)
def r3d_18_light(
    *,
    num_classes: int = 400,
    num_frames: int = 16,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    expansion: float = 0.5,
    trg: str = "input",
    trg_mode: TRGMode = "replace",
) -> VideoNet:
    """Light R3D-18: every 3x3x3 convolution and the stem a Fully Separable Block.

    Args:
        expansion, trg, trg_mode: see the top of this file.
    """
    places = trg_places(trg, trg_mode, len(DEPTHS_18))
    stem: nn.Module = FullySeparableBlock(
        places.channels("input", in_channels),
        scaled(64, width),
        (3, 7, 7),
        stride=(1, 2, 2),
        expansion=expansion,
    )
    blocks: list[Block] = [partial(fsb_basic, expansion=expansion, trg=places)] * 4
    return resnet3d(blocks, DEPTHS_18, 1, num_classes, in_channels, width, dropout, stem=stem, trg=places)


@register_model(sampling_rate=8, size=224)
def slow_r50_light(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    expansion: float = 0.125,
    trg: str = "input",
    trg_mode: TRGMode = "replace",
) -> VideoNet:
    """Light SlowOnly-50: every bottleneck a Fully Separable Block, 1x3x3 in res2 and res3, 3x3x3 in res4 and res5.

    Args:
        expansion, trg, trg_mode: see the top of this file. The bottlenecks of SlowOnly-50 have 0.25.
    """
    places = trg_places(trg, trg_mode, len(DEPTHS_50))
    plane: Block = partial(fsb_bottleneck, expansion=expansion, trg=places)
    space: Block = partial(fsb_bottleneck, expansion=expansion, trg=places, time=3)
    blocks = [plane, plane, space, space]
    return resnet3d(blocks, DEPTHS_50, 4, num_classes, in_channels, width, dropout, trg=places)


@register_model(sampling_rate=2, size=224)
def slowfast_r50_light(
    *,
    num_classes: int = 400,
    num_frames: int = 32,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    alpha: int = 4,
    beta: float = 0.125,
    lateral_time: int = 7,
    expansion: float = 0.09375,
    fast_expansion: float = 0.125,
    trg: str = "input",
    trg_mode: TRGMode = "replace",
) -> VideoNet:
    """Light SlowFast-50: every bottleneck of both pathways a Fully Separable Block.

    Against SlowFast-50 8x8 it has 2.9 times fewer weights and needs 3.6 times fewer multiplications (those of this net
    by the fast algorithm, F(2, r) and F(4, r), against multiply-accumulates of that one).

    Args:
        alpha, beta: ratio of the pathways' frames and channels.
        lateral_time: length of the lateral kernels in time.
        expansion: the slow pathway's alpha of the Fully Separable Blocks (0.25 is SlowFast's own bottlenecks'): 24 to
            192 channels in the middle.
        fast_expansion: the fast pathway's, which is narrow as it is: 4 to 32 channels in the middle.
        trg, trg_mode: see the top of this file; each pathway takes the gradient of its own frames.
    """
    places = trg_places(trg, trg_mode, len(DEPTHS_50))
    plane: Block = partial(fsb_bottleneck, expansion=expansion, trg=places)
    space: Block = partial(fsb_bottleneck, expansion=expansion, trg=places, time=3)
    fast: Block = partial(fsb_bottleneck, expansion=fast_expansion, trg=places, time=3)
    return slowfast(
        [plane, plane, space, space],
        [fast] * 4,
        DEPTHS_50,
        num_classes,
        in_channels,
        width,
        dropout,
        alpha,
        beta,
        lateral_time,
        places,
    )
