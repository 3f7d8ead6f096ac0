"""The Fully Separable Block (arXiv 1905.13388)."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, nn

from lean3d.blocks.conv import Conv3d, triple
from lean3d.errors import ConfigError
from lean3d.ops.conv.reference import Triple

STEPS = ("temporal", "depthwise", "pointwise")


class FullySeparableBlock(nn.Module):
    """A dense K x R x S convolution taken apart into time, plane and channels.

    With N output channels, C input channels and alpha the `expansion` of the middle:

        stage one   temporal     (alpha N, C, K, 1, 1)          mixes channels, carries the stride in time
        stage two   depthwise    (alpha N, 1, 1, R, S)          one kernel a channel, carries the strides in space
                    pointwise    (N, alpha N, 1, 1, 1)          mixes channels

    `alpha N C K + alpha N R S + alpha N N` weights, against `N C K R S`.

    The paper does not say where normalisation and activation sit, which alphas it used, or what happens to strides.
    Chosen here: batch normalisation and ReLU after every step (separable nets trained from scratch want each step
    normalised), strides where the kernel that spans their axis is.

    Args:
        in_channels: C.
        out_channels: N.
        kernel_size: (K, R, S), odd; one number stands for all three.
        stride: in time, height, width.
        expansion: alpha; the middle has `max(1, round(alpha * N))` channels.
        norm: the steps that are followed by batch normalisation; the others have a bias.
        activation: the steps that are followed by ReLU (after the normalisation).

    Raises:
        ConfigError: Even kernels, an expansion that is not positive, an unknown step.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple = 3,
        *,
        stride: int | Triple = 1,
        expansion: float = 1.0,
        norm: Collection[str] = STEPS,
        activation: Collection[str] = STEPS,
    ):
        super().__init__()
        k, r, s = triple(kernel_size)
        stride_t, stride_h, stride_w = triple(stride)
        if not all(size % 2 for size in (k, r, s)):
            raise ConfigError(f"FullySeparableBlock needs odd kernel sizes, got {(k, r, s)}")
        if expansion <= 0:
            raise ConfigError(f"expansion must be above 0, got {expansion}")
        for name, steps in (("norm", norm), ("activation", activation)):
            if isinstance(steps, str) or not set(steps) <= set(STEPS):
                raise ConfigError(f"{name} must be some of {STEPS}, got {steps!r}")
        middle = max(1, round(expansion * out_channels))

        self.temporal = Conv3d(
            in_channels, middle, (k, 1, 1), stride=(stride_t, 1, 1), padding=(k // 2, 0, 0), bias="temporal" not in norm
        )
        self.depthwise = Conv3d(
            middle,
            middle,
            (1, r, s),
            stride=(1, stride_h, stride_w),
            padding=(0, r // 2, s // 2),
            groups=middle,
            bias="depthwise" not in norm,
        )
        self.pointwise = Conv3d(middle, out_channels, 1, bias="pointwise" not in norm)
        after = {
            step: nn.Sequential(
                *[nn.BatchNorm3d(out_channels if step == "pointwise" else middle)] * (step in norm),
                *[nn.ReLU(inplace=True)] * (step in activation),
            )
            for step in STEPS
        }
        self.after_temporal = after["temporal"]
        self.after_depthwise = after["depthwise"]
        self.after_pointwise = after["pointwise"]

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, out_channels, T', H', W')`."""
        x = self.after_temporal(self.temporal(x))
        x = self.after_depthwise(self.depthwise(x))
        return self.after_pointwise(self.pointwise(x))
