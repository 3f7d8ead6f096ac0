"""The first layers of a residual net."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lean3d import ops
from lean3d.blocks.conv import ConvBN
from lean3d.blocks.streaming import Chain, Stream, Streaming, Windows


class SpatialMaxPool(Streaming, nn.Module):
    """Max pooling 1 x 3 x 3 at stride (1, 2, 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, C, T, H / 2, W / 2)`, rounded up."""
        return ops.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))


class TemporalMaxPool(Streaming, nn.Module):
    """Max pooling 2 x 1 x 1 at stride (2, 1, 1); a last odd frame is kept."""

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, C, T / 2, H, W)`, rounded up."""
        return ops.max_pool3d(x, (2, 1, 1), (2, 1, 1), ceil_mode=True)

    def stream(self) -> Stream:
        """See `Streaming`."""
        return Windows(lambda frames: frames.amax(2, keepdim=True), 2, stride=2, right=1)


class ConvStem(ConvBN):
    """time x 7 x 7 convolution at stride (1, 2, 2), BN, ReLU: the stem of nets without max pooling.

    Args:
        in_channels: 3 for RGB, 1 for grey.
        out_channels: channels of the result.
        time: length of the kernel in time.
    """

    def __init__(self, in_channels: int, out_channels: int, *, time: int = 1):
        super().__init__(in_channels, out_channels, (time, 7, 7), stride=(1, 2, 2))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """`(N, C, T, H, W)` -> `(N, out_channels, T, H / 2, W / 2)`, rounded up."""
        return super().forward(x, relu=True)

    def stream(self) -> Stream:
        """See `Streaming`."""
        return Chain(super().stream(), F.relu)


class ResNetStem(ConvStem):
    """time x 7 x 7 convolution at stride (1, 2, 2), BN, ReLU, max pooling 1 x 3 x 3 at stride (1, 2, 2).

    Args:
        in_channels: 3 for RGB, 1 for grey.
        out_channels: channels of the result.
        time: length of the kernel in time.
    """

    def __init__(self, in_channels: int, out_channels: int, *, time: int = 1):
        super().__init__(in_channels, out_channels, time=time)
        self.pool: nn.Module = SpatialMaxPool()

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """`(N, C, T, H, W)` -> `(N, out_channels, T, H / 4, W / 4)`, rounded up."""
        return self.pool(super().forward(x))

    def stream(self) -> Stream:
        """See `Streaming`."""
        return Chain(super().stream(), self.pool)
