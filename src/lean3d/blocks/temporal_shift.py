"""The temporal shift module (Lin et al., ICCV 2019, arXiv 1811.08383)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.blocks.conv import ConvBN
from lean3d.blocks.streaming import Chain, Stream, Streaming, Windows
from lean3d.errors import ConfigError
from lean3d.ops.conv.reference import Triple


class TemporalShift(Streaming, nn.Module):
    """Some channels one frame back, some one frame on: exchange between frames without weights or multiplications.

        channels 0 ... f - 1        frame t gets frame t + 1's, the last one zeros
        channels f ... 2 f - 1      frame t gets frame t - 1's, the first one zeros
        the rest                    stay

    In its causal form the first f channels stay too: the paper's shift for streams (section 4, online models).

    Args:
        share: f is this share of the channels, rounded down.
    """

    def __init__(self, share: float = 0.125):
        super().__init__()
        if not 0 <= share <= 0.5:
            raise ConfigError(f"share must be from 0 to 0.5, got {share}")
        self.share, self.causal = share, False

    def limit_time(self, frames: int, *, causal: bool) -> None:
        """No more than `frames` frames of the past, and with `causal` none of the future."""
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> the same."""
        f = int(x.shape[1] * self.share)
        back = x[:, :f] if self.causal else F.pad(x[:, :f, 1:], (0, 0, 0, 0, 0, 1))
        on = F.pad(x[:, f : 2 * f, :-1], (0, 0, 0, 0, 1, 0))
        return torch.cat((back, on, x[:, 2 * f :]), 1)

    def stream(self) -> Stream:
        """See `Streaming`."""
        return (
            Windows(self._shifted, 2, left=1, fill=0.0)
            if self.causal
            else Windows(self._shifted, 3, left=1, right=1, fill=0.0)
        )

    def _shifted(self, frames: Tensor) -> Tensor:
        """The result for the second one of two or three frames."""
        f = int(frames.shape[1] * self.share)
        before, now, after = frames[:, :, :1], frames[:, :, 1:2], frames[:, :, -1:]
        return torch.cat((after[:, :f], before[:, f : 2 * f], now[:, 2 * f :]), 1)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"share={self.share}, causal={self.causal}"


class ShiftConvBN(ConvBN):
    """`BN(conv(shift(x)))`; weights as `ConvBN` has them, so those of 2D nets load.

    Args:
        in_channels, out_channels, kernel_size: as in `ConvBN`.
        share: as in `TemporalShift`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Triple, *, share: float = 0.125):
        super().__init__(in_channels, out_channels, kernel_size)
        self.shift = TemporalShift(share)

    def forward(self, x: Tensor, *, add: Sequence[Tensor] = (), relu: bool = False) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, O, T, H, W)`; `add` and `relu` as in `normalise`."""
        return super().forward(self.shift(x), add=add, relu=relu)

    def stream(self) -> Stream:
        """See `Streaming`."""
        return Chain(self.shift, super().stream())
