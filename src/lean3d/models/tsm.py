"""TSM (Lin et al., ICCV 2019, arXiv 1811.08383): a 2D ResNet whose blocks shift channels between frames."""

from __future__ import annotations

from functools import partial

from lean3d.blocks import ConvBN, ResidualBlock, ShiftConvBN
from lean3d.models.registry import VideoNet, register_model
from lean3d.models.resnet3d import DEPTHS_50, Block, resnet3d


def shift_bottleneck(
    in_channels: int, channels: int, out_channels: int, *, stride: int = 1, share: float = 0.125
) -> ResidualBlock:
    """The 2D bottleneck with a temporal shift before its first convolution; the shortcut is not shifted."""
    units = [
        ShiftConvBN(in_channels, channels, 1, share=share),
        ConvBN(channels, channels, (1, 3, 3), stride=(1, stride, stride)),
        ConvBN(channels, out_channels, 1),
    ]
    return ResidualBlock(units, in_channels=in_channels, out_channels=out_channels, stride=stride)


@register_model(sampling_rate=8, size=224)
def tsm_r50(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    share: float = 0.125,
) -> VideoNet:
    """TSM-50: a 2D ResNet-50 whose blocks shift an eighth of the channels each way in time (residual placement).

    Meant for one frame from each of 8 segments (`--data.sampling segments`).

    Args:
        share: share of the channels that is shifted each way.
    """
    blocks: list[Block] = [partial(shift_bottleneck, share=share)] * 4
    return resnet3d(blocks, DEPTHS_50, 4, num_classes, in_channels, width, dropout)
