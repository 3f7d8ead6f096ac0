"""R3D and R(2+1)D (Tran et al., CVPR 2018, arXiv 1711.11248).

The 18-layer nets have basic blocks of two 3x3x3 convolutions, whole (R3D) or taken apart into a 1x3x3 and a 3x1x1
(R(2+1)D); time is halved with height and width in res3 to res5. The 50-layer R(2+1)D has bottlenecks whose middle
convolution is taken apart, time first; res2 halves height and width too, and time is halved in res4 and res5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from lean3d.blocks import ConvBN, ConvStem, ResidualBlock
from lean3d.models.registry import VideoNet, register_model, scaled
from lean3d.models.resnet3d import DEPTHS_18, DEPTHS_50, Block, resnet3d

Layer = Callable[[int, int, int, int], nn.Module]


def full_conv(in_channels: int, out_channels: int, middle: int, stride: int) -> nn.Module:
    """3x3x3 with BN."""
    return ConvBN(in_channels, out_channels, 3, stride=stride)


def split_conv(in_channels: int, out_channels: int, middle: int, stride: int) -> nn.Module:
    """1x3x3 to `middle` channels, BN, ReLU, 3x1x1, BN."""
    return nn.Sequential(
        ConvBN(in_channels, middle, (1, 3, 3), stride=(1, stride, stride)),
        nn.ReLU(inplace=True),
        ConvBN(middle, out_channels, (3, 1, 1), stride=(stride, 1, 1)),
    )


def r3d_basic(in_channels: int, channels: int, out_channels: int, *, layer: Layer, stride: int = 1) -> ResidualBlock:
    """Two layers; the middle of both has as many channels as give the first one a 3x3x3 convolution's weights."""
    middle = in_channels * channels * 27 // (in_channels * 9 + 3 * channels)
    units = [layer(in_channels, channels, middle, stride), layer(channels, out_channels, middle, 1)]
    return ResidualBlock(units, in_channels=in_channels, out_channels=out_channels, stride=stride, time_stride=stride)


def r2plus1d_bottleneck(
    in_channels: int, channels: int, out_channels: int, *, stride: int = 1, strided_time: bool = False
) -> ResidualBlock:
    """1x1x1, 3x1x1 and 1x3x3, 1x1x1; `strided_time` says whether the stride is time's too."""
    time_stride = stride if strided_time else 1
    middle = nn.Sequential(
        ConvBN(channels, channels, (3, 1, 1), stride=(time_stride, 1, 1)),
        nn.ReLU(inplace=True),
        ConvBN(channels, channels, (1, 3, 3), stride=(1, stride, stride)),
    )
    units = [ConvBN(in_channels, channels, 1), middle, ConvBN(channels, out_channels, 1)]
    return ResidualBlock(
        units, in_channels=in_channels, out_channels=out_channels, stride=stride, time_stride=time_stride
    )


@register_model(sampling_rate=2, size=112)
def r3d_18(
    *, num_classes: int = 400, num_frames: int = 16, in_channels: int = 3, width: float = 1.0, dropout: float = 0.0
) -> VideoNet:
    """R3D-18: a ResNet-18 of 3x3x3 convolutions."""
    blocks: list[Block] = [partial(r3d_basic, layer=full_conv)] * 4
    stem = ConvStem(in_channels, scaled(64, width), time=3)
    return resnet3d(blocks, DEPTHS_18, 1, num_classes, in_channels, width, dropout, stem=stem)


@register_model(sampling_rate=2, size=112)
def r2plus1d_18(
    *, num_classes: int = 400, num_frames: int = 16, in_channels: int = 3, width: float = 1.0, dropout: float = 0.0
) -> VideoNet:
    """R(2+1)D-18: R3D-18 with each 3x3x3 convolution taken apart into 1x3x3 and 3x1x1."""
    blocks: list[Block] = [partial(r3d_basic, layer=split_conv)] * 4
    middle = scaled(45, width)
    stem = nn.Sequential(
        ConvStem(in_channels, middle),
        ConvBN(middle, scaled(64, width), (3, 1, 1)),
        nn.ReLU(inplace=True),
    )
    return resnet3d(blocks, DEPTHS_18, 1, num_classes, in_channels, width, dropout, stem=stem)


@register_model(sampling_rate=4, size=224)
def r2plus1d_r50(
    *, num_classes: int = 400, num_frames: int = 16, in_channels: int = 3, width: float = 1.0, dropout: float = 0.5
) -> VideoNet:
    """R(2+1)D-50: bottlenecks with 3x1x1 and 1x3x3 in the middle, as pytorchvideo has it."""
    plain: Block = r2plus1d_bottleneck
    strided: Block = partial(r2plus1d_bottleneck, strided_time=True)
    stem = ConvStem(in_channels, scaled(64, width))
    return resnet3d(
        [plain, plain, strided, strided],
        DEPTHS_50,
        4,
        num_classes,
        in_channels,
        width,
        dropout,
        stem=stem,
        first_stride=2,
    )
