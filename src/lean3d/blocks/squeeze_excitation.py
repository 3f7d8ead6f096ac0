"""Squeeze-and-excitation (Hu et al., CVPR 2018, arXiv 1709.01507), over whole clips."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.blocks.conv import Conv3d
from lean3d.blocks.streaming import Chain, Recent, Stream, Streaming, sliding_mean, together, whole_clip


class SqueezeExcitation(Streaming, nn.Module):
    """`x * sigmoid(W2 relu(W1 mean(x)))`: channels weighted by what the clip as a whole shows.

    With a `horizon`, at each time by what its last so many frames show.

    Args:
        channels: channels of x.
        reduced: channels between W1 and W2.
    """

    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.reduce = Conv3d(channels, reduced, 1)
        self.expand = Conv3d(reduced, channels, 1)
        self.horizon: int | None = None

    def limit_time(self, frames: int, *, causal: bool) -> None:
        """No more than `frames` frames of the past, and none of the future."""
        self.horizon = frames

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> the same."""
        if self.horizon is None:
            return x * self._gate(x.mean((2, 3, 4), keepdim=True))
        return x * self._gate(sliding_mean(x.mean((3, 4), keepdim=True), self.horizon))

    def stream(self) -> Stream:
        """See `Streaming`."""
        mean = Recent(whole_clip(self.horizon, "SqueezeExcitation takes an average over the whole clip"), "mean")
        gate = Chain(lambda x: x.mean((3, 4), keepdim=True), mean, self._gate)
        return together(lambda x, gate: x * gate, nn.Identity(), gate)

    def _gate(self, mean: Tensor) -> Tensor:
        return self.expand(F.relu(self.reduce(mean))).sigmoid()
