"""The Fully Separable Block (arXiv 1905.13388)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lean3d.blocks.conv import Conv3d, triple
from lean3d.blocks.norm import NormReLU
from lean3d.blocks.smallbig import SmallBigUnit
from lean3d.blocks.streaming import Chain, Stream, Streaming
from lean3d.errors import ConfigError
from lean3d.ops.conv.reference import Triple
from lean3d.ops.pool.reference import Window

STEPS = ("temporal", "depthwise", "pointwise")


class FullySeparableBlock(Streaming, nn.Module):
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
        kernel_size: (K, R, S); one number stands for all three.
        stride, dilation: in time, height, width.
        padding: zeros on both sides in time, height, width; by default those that keep the size at stride 1, which
            odd kernels have.
        groups: of stage one and of the pointwise step, where the dense convolution is in groups too.
        expansion: alpha; the middle has `max(1, round(alpha * N / groups)) * groups` channels.
        norm: the steps that are followed by batch normalisation.
        activation: the steps that are followed by ReLU (after the normalisation).
        bias: whether steps without normalisation have a bias.
        big_views: the steps that are SmallBig units (arXiv 2006.14582) in place of plain convolutions, each with its
            pooling's window: they also see the strongest context around each place, by the same weights. With the
            default padding, no dilation, and normalisation behind them.

    Raises:
        ConfigError: Even kernels without padding, an expansion that is not positive, an unknown step, a big view of a
            step that can't have one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple = 3,
        *,
        stride: int | Triple = 1,
        padding: int | Triple | None = None,
        dilation: int | Triple = 1,
        groups: int = 1,
        expansion: float = 1.0,
        norm: Collection[str] = STEPS,
        activation: Collection[str] = STEPS,
        bias: bool = True,
        big_views: Mapping[str, Window] | None = None,
    ):
        super().__init__()
        big_views = dict(big_views or {})
        if not set(big_views) <= set(STEPS):
            raise ConfigError(f"big_views must be of some of {STEPS}, got {sorted(big_views)}")
        if big_views and (padding is not None or triple(dilation) != (1, 1, 1) or not set(big_views) <= set(norm)):
            raise ConfigError("big_views need the default padding, no dilation, and normalisation behind their steps")
        k, r, s = triple(kernel_size)
        stride_t, stride_h, stride_w = triple(stride)
        dilation_t, dilation_h, dilation_w = triple(dilation)
        if padding is None:
            if not all(size % 2 for size in (k, r, s)):
                raise ConfigError(f"FullySeparableBlock needs odd kernel sizes, or padding, got {(k, r, s)}")
            padding = (k // 2 * dilation_t, r // 2 * dilation_h, s // 2 * dilation_w)
        padding_t, padding_h, padding_w = triple(padding)
        if expansion <= 0:
            raise ConfigError(f"expansion must be above 0, got {expansion}")
        for name, steps in (("norm", norm), ("activation", activation)):
            if isinstance(steps, str) or not set(steps) <= set(STEPS):
                raise ConfigError(f"{name} must be some of {STEPS}, got {steps!r}")
        middle = max(1, round(expansion * out_channels / groups)) * groups

        self.temporal: nn.Module = Conv3d(
            in_channels,
            middle,
            (k, 1, 1),
            stride=(stride_t, 1, 1),
            padding=(padding_t, 0, 0),
            dilation=(dilation_t, 1, 1),
            groups=groups,
            bias=bias and "temporal" not in norm,
        )
        self.depthwise: nn.Module = Conv3d(
            middle,
            middle,
            (1, r, s),
            stride=(1, stride_h, stride_w),
            padding=(0, padding_h, padding_w),
            dilation=(1, dilation_h, dilation_w),
            groups=middle,
            bias=bias and "depthwise" not in norm,
        )
        self.pointwise: nn.Module = Conv3d(
            middle, out_channels, 1, groups=groups, bias=bias and "pointwise" not in norm
        )
        for step, window in big_views.items():  # it normalises each view by itself
            conv: Conv3d = getattr(self, step)
            unit = SmallBigUnit(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,  # type: ignore[arg-type]
                stride=conv.stride,  # type: ignore[arg-type]
                groups=conv.groups,
                pool=window,
            )
            setattr(self, step, unit)
        after = {
            step: NormReLU(
                out_channels if step == "pointwise" else middle,
                norm=step in norm and step not in big_views,
                activation=step in activation,
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

    def stream(self) -> Stream:
        """See `Streaming`."""
        return Chain(
            *(self.temporal, self.after_temporal),
            *(self.depthwise, self.after_depthwise),
            *(self.pointwise, self.after_pointwise),
        )
