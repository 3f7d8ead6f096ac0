"""The definition: what every form of the convolution must equal, forward and backward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

Triple = tuple[int, int, int]


def conv3d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    dilation: Triple = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv3d`: x `(N, C, T, H, W)`, weight `(O, C / groups, K, R, S)` -> `(N, O, T', H', W')`."""
    return F.conv3d(x, weight, bias, stride, padding, dilation, groups)
