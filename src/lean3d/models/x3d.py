"""X3D (Feichtenhofer, CVPR 2020, arXiv 2004.04730): an inverted bottleneck net, grown axis by axis from a tiny one.

    stem    1x3x3, stride (1, 2, 2), then 5x1x1 by channel          H / 2
    res2    24 channels                                             H / 4
    res3    48                                                      H / 8
    res4    96                                                      H / 16
    res5    192                                                     H / 32
    head    1x1x1 to 432, average, 1x1x1 to 2048, linear

Time is never strided. XS, S and M have the same weights and differ in the clip.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.blocks import (
    Chain,
    Conv3d,
    ConvBN,
    Head,
    Recent,
    ResidualBlock,
    SqueezeExcitation,
    Stream,
    Streaming,
    together,
)
from lean3d.models.registry import VideoNet, register_model, scaled
from lean3d.models.resnet3d import init_convs

CHANNELS, DEPTHS = (24, 48, 96, 192), (3, 5, 11, 7)
BOTTLENECK, EXCITATION, HIDDEN = 2.25, 1 / 16, 2048


class X3DStem(Streaming, nn.Module):
    """1x3x3 at stride (1, 2, 2), then 5x1x1 by channel, BN, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.spatial = Conv3d(in_channels, out_channels, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1), bias=False)
        self.temporal = ConvBN(out_channels, out_channels, (5, 1, 1), groups=out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, out_channels, T, H / 2, W / 2)`, rounded up."""
        return F.relu(self.temporal(self.spatial(x)))

    def stream(self) -> Stream:
        """See `Streaming`."""
        return Chain(self.spatial, self.temporal, F.relu)


class X3DBlock(ResidualBlock):
    """1x1x1, 3x3x3 by channel, squeeze-and-excitation, swish, 1x1x1, and the shortcut.

    Args:
        in_channels, channels, out_channels: of the input, the middle, the result.
        stride: in height and width.
        excite: whether it has the squeeze-and-excitation.
    """

    def __init__(self, in_channels: int, channels: int, out_channels: int, *, stride: int, excite: bool):
        units = [
            ConvBN(in_channels, channels, 1),
            ConvBN(channels, channels, 3, stride=(1, stride, stride), groups=channels),
            ConvBN(channels, out_channels, 1),
        ]
        super().__init__(units, in_channels=in_channels, out_channels=out_channels, stride=stride)
        self.excite = SqueezeExcitation(channels, _rounded(channels * EXCITATION)) if excite else nn.Identity()
        if stride != 1 and in_channels == out_channels:  # so in the published nets: this one has no BN
            self.shortcut = Conv3d(in_channels, out_channels, 1, stride=(1, stride, stride), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, out_channels, T, H / stride, W / stride)`, rounded up."""
        widen, depthwise, narrow = self.units
        y = F.silu(self.excite(depthwise(F.relu(widen(x)))))
        return F.relu(narrow(y) + self.shortcut(x))

    def stream(self) -> Stream:
        """See `Streaming`."""
        widen, depthwise, narrow = self.units
        units = Chain(widen, F.relu, depthwise, self.excite, F.silu, narrow)
        return together(lambda y, x: F.relu(y + x), units, self.shortcut)


class X3DHead(Head):
    """1x1x1 with BN, average over a window, a hidden layer, dropout, linear classifier, average of the scores.

    The window is as large as the features of the clips that the net is trained on. Features that are larger are
    averaged window by window and each window is classified, as the published nets are tested; smaller ones are
    averaged as a whole.

    Args:
        in_channels, channels, hidden: of the features, the averages, the hidden layer.
        window: size of the window in time, height, width.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        hidden: int,
        num_classes: int,
        *,
        dropout: float,
        window: tuple[int, int, int],
    ):
        super().__init__(hidden, num_classes, dropout=dropout)
        self.widen = ConvBN(in_channels, channels, 1)
        self.hidden = Conv3d(channels, hidden, 1, bias=False)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, num_classes)`."""
        return self._classify(self._averages(F.relu(self.widen(x))))

    def stream(self, frames: int) -> Stream:
        """The head frame by frame: the scores of the last `frames` frames of features, those that there are."""
        return Chain(self.widen, F.relu, self._averages, Recent(frames, "mean"), self._classify)

    def _averages(self, x: Tensor) -> Tensor:
        window = [min(k, size) for k, size in zip(self.window, x.shape[2:], strict=True)]
        return F.avg_pool3d(x, window, stride=1)

    def _classify(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden(x))
        return self.linear(self.dropout(x.permute(0, 2, 3, 4, 1))).mean((1, 2, 3))


def _rounded(channels: float) -> int:
    """A multiple of 8, at least 8 and at least 90 % of `channels`."""
    near = max(8, int(channels + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels else near


def _x3d(num_classes: int, in_channels: int, width: float, dropout: float, window: tuple[int, int, int]) -> VideoNet:
    channels = scaled(CHANNELS[0], width)
    stem = X3DStem(in_channels, channels)
    stages, middle = [], 0
    for stage_channels, depth in zip(CHANNELS, DEPTHS, strict=True):
        out_channels = scaled(stage_channels, width)
        middle = int(BOTTLENECK * out_channels)
        blocks = []
        for i in range(depth):
            stride = 2 if i == 0 else 1
            blocks.append(X3DBlock(channels, middle, out_channels, stride=stride, excite=i % 2 == 0))
            channels = out_channels
        stages.append(nn.Sequential(*blocks))
    head = X3DHead(channels, middle, scaled(HIDDEN, width), num_classes, dropout=dropout, window=window)
    return init_convs(VideoNet(stem, stages, head))


@register_model(sampling_rate=12, size=182)
def x3d_xs(
    *,
    num_classes: int = 400,
    num_frames: int = 4,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    head_size: int = 5,
) -> VideoNet:
    """X3D-XS: 4 frames, 12 apart; trained at 160 pixels, tested at 182.

    Args:
        head_size: height and width of the head's window; the default is that of clips of 160 pixels.
    """
    return _x3d(num_classes, in_channels, width, dropout, (num_frames, head_size, head_size))


@register_model(sampling_rate=6, size=182)
def x3d_s(
    *,
    num_classes: int = 400,
    num_frames: int = 13,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    head_size: int = 5,
) -> VideoNet:
    """X3D-S: 13 frames, 6 apart; trained at 160 pixels, tested at 182.

    Args:
        head_size: height and width of the head's window; the default is that of clips of 160 pixels.
    """
    return _x3d(num_classes, in_channels, width, dropout, (num_frames, head_size, head_size))


@register_model(sampling_rate=5, size=224)
def x3d_m(
    *,
    num_classes: int = 400,
    num_frames: int = 16,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    head_size: int = 7,
) -> VideoNet:
    """X3D-M: 16 frames, 5 apart, at 224 pixels.

    Args:
        head_size: height and width of the head's window; the default is that of clips of 224 pixels.
    """
    return _x3d(num_classes, in_channels, width, dropout, (num_frames, head_size, head_size))
