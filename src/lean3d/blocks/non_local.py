"""The non-local block (Wang et al., CVPR 2018, arXiv 1711.07971)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.blocks.conv import Conv3d
from lean3d.errors import ConfigError

Affinity = Literal["embedded_gaussian", "dot_product"]


class NonLocalBlock(nn.Module):
    """`x + BN(W_out y)`, where each place of y is a mean of all places of `g(x)`, weighted by likeness.

    The likeness of places i and j is `theta(x_i) . phi(x_j)`. Keys and values, `phi` and `g`, are taken from x after
    a max pooling 1 x 2 x 2, the paper's subsampling. The BN starts at weight 0: the block starts as the identity, so
    it can be put into a trained net.

    Args:
        channels: channels of x; half as many inside.
        affinity: "embedded_gaussian": softmax over j of the likeness over the square root of the inner channels (the
            published code's scale; the paper's formula has none). "dot_product": the likeness over the number of j.
        subsample: whether keys and values are pooled.
    """

    def __init__(self, channels: int, *, affinity: Affinity = "embedded_gaussian", subsample: bool = True):
        super().__init__()
        if affinity not in ("embedded_gaussian", "dot_product"):
            raise ConfigError(f"affinity must be embedded_gaussian or dot_product, got {affinity!r}")
        inner = max(1, channels // 2)
        self.affinity, self.subsample = affinity, subsample
        self.theta = Conv3d(channels, inner, 1)
        self.phi = Conv3d(channels, inner, 1)
        self.g = Conv3d(channels, inner, 1)
        self.out = Conv3d(inner, channels, 1)
        self.bn = nn.BatchNorm3d(channels)
        nn.init.zeros_(self.bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> the same. Work and memory grow with the square of T H W."""
        t, h, w = x.shape[2:]
        source = x
        if self.subsample:
            window = (1, min(2, h), min(2, w))
            source = F.max_pool3d(x.contiguous(memory_format=torch.channels_last_3d), window, window)
        queries, keys, values = (
            y.flatten(2).transpose(1, 2) for y in (self.theta(x), self.phi(source), self.g(source))
        )  # (N, places, inner)
        likeness = queries @ keys.transpose(1, 2)
        if self.affinity == "embedded_gaussian":
            weights = (likeness / keys.shape[2] ** 0.5).softmax(2)
        else:
            weights = likeness / keys.shape[1]
        y = (weights @ values).transpose(1, 2).unflatten(2, (t, h, w))
        return x + self.bn(self.out(y))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"affinity={self.affinity!r}, subsample={self.subsample}"
