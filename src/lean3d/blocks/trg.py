"""The Temporal Residual Gradient (arXiv 1905.13388)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lean3d.errors import ConfigError


class TemporalResidualGradient(nn.Module):
    """T frames as their T - 1 differences and their mean: T slices again, no weights, channel by channel.

        frames       f0    f1    f2    ...    fT-1
        slices          d1    d2    ...   dT-1    mean          d_t = f_t - f_t-1

    The mean keeps what differences lose: the distribution of the values. In the paper's figure the differences come
    in the order of time and the mean takes the remaining slot, which is the default here.

    Args:
        order: "differences_first" (the paper's) or "mean_first".
    """

    def __init__(self, order: Literal["differences_first", "mean_first"] = "differences_first"):
        super().__init__()
        if order not in ("differences_first", "mean_first"):
            raise ConfigError(f"order must be differences_first or mean_first, got {order!r}")
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, C, T, H, W)`; a single frame is its own mean."""
        mean = x.mean(2, keepdim=True)
        differences = x[:, :, 1:] - x[:, :, :-1]
        slices = (differences, mean) if self.order == "differences_first" else (mean, differences)
        return torch.cat(slices, 2)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"order={self.order!r}"
