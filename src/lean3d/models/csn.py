"""Channel-separated networks (Tran et al., ICCV 2019, arXiv 1904.02811), the interaction-reduced kind.

ResNets whose only convolution with an extent in time and plane, the bottleneck's 3x3x3, works channel by channel.
Time is halved with height and width in res3, res4 and res5.
"""

from __future__ import annotations

from collections.abc import Sequence

from lean3d.blocks import ConvBN, ResidualBlock, ResNetStem
from lean3d.models.registry import VideoNet, register_model, scaled
from lean3d.models.resnet3d import DEPTHS_50, DEPTHS_101, Block, resnet3d


def csn_bottleneck(in_channels: int, channels: int, out_channels: int, *, stride: int = 1) -> ResidualBlock:
    """1x1x1, 3x3x3 by channel with the stride on all three axes, 1x1x1."""
    units = [
        ConvBN(in_channels, channels, 1),
        ConvBN(channels, channels, 3, stride=stride, groups=channels),
        ConvBN(channels, out_channels, 1),
    ]
    return ResidualBlock(units, in_channels=in_channels, out_channels=out_channels, stride=stride, time_stride=stride)


def _csn(depths: Sequence[int], num_classes: int, in_channels: int, width: float, dropout: float) -> VideoNet:
    blocks: list[Block] = [csn_bottleneck] * 4
    stem = ResNetStem(in_channels, scaled(64, width), time=3)
    return resnet3d(blocks, depths, 4, num_classes, in_channels, width, dropout, stem=stem)


@register_model(sampling_rate=2, size=224)
def csn_r50(
    *, num_classes: int = 400, num_frames: int = 32, in_channels: int = 3, width: float = 1.0, dropout: float = 0.0
) -> VideoNet:
    """ir-CSN-50: ResNet-50 with 3x3x3 convolutions by channel."""
    return _csn(DEPTHS_50, num_classes, in_channels, width, dropout)


@register_model(sampling_rate=2, size=224)
def csn_r101(
    *, num_classes: int = 400, num_frames: int = 32, in_channels: int = 3, width: float = 1.0, dropout: float = 0.0
) -> VideoNet:
    """ir-CSN-101: ResNet-101 with 3x3x3 convolutions by channel."""
    return _csn(DEPTHS_101, num_classes, in_channels, width, dropout)
