"""Squeeze-and-excitation (Hu et al., CVPR 2018, arXiv 1709.01507), over whole clips."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.blocks.conv import Conv3d


class SqueezeExcitation(nn.Module):
    """`x * sigmoid(W2 relu(W1 mean(x)))`: channels weighted by what the clip as a whole shows.

    Args:
        channels: channels of x.
        reduced: channels between W1 and W2.
    """

    def __init__(self, channels: int, reduced: int):
        super().__init__()
        self.reduce = Conv3d(channels, reduced, 1)
        self.expand = Conv3d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> the same."""
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3, 4), keepdim=True)))).sigmoid()
