"""Convolution with the fast forms of `lean3d.ops`, alone and with its normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from lean3d import ops
from lean3d.blocks.norm import normalise
from lean3d.blocks.streaming import Chain, Frames, Stream, Streaming, Windows
from lean3d.ops.conv.reference import Triple


def triple(value: int | Triple) -> Triple:
    """A size in time, height, width; one number stands for all three."""
    return (value, value, value) if isinstance(value, int) else value


class Conv3d(Streaming, nn.Conv3d):
    """`torch.nn.Conv3d` with the same arguments, weights and results, computed by `lean3d.ops.conv3d`.

    Flat kernels run several times faster on a CPU, forward and backward, when activations are in
    `torch.channels_last_3d`. Zero padding only.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, O, T', H', W')`."""
        return ops.conv3d(
            x,
            self.weight,
            self.bias,
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
        )

    def time_padding(self) -> tuple[int, int]:
        """Frames of zeros before the first and after the last one."""
        return self.padding[0], self.padding[0]  # type: ignore[return-value]

    def stream(self) -> Stream:
        """See `Streaming`."""
        left, right = self.time_padding()
        size = (self.kernel_size[0] - 1) * self.dilation[0] + 1
        window = Conv3d.of(self, padding=(0, *self.padding[1:]))  # type: ignore[arg-type]
        if (size, self.stride[0], left, right) == (1, 1, 0, 0):
            return Frames(window)
        return Windows(window, size, stride=self.stride[0], left=left, right=right, fill=0.0)

    @classmethod
    def of(cls, conv: Conv3d, padding: Triple | None = None) -> Self:
        """Such a convolution with another's settings and its very parameters.

        Args:
            conv: the other.
            padding: in time, height, width, where it is not the other's.
        """
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            padding=padding or conv.padding,  # type: ignore[arg-type]
            dilation=conv.dilation,  # type: ignore[arg-type]
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)


class CausalConv3d(Conv3d):
    """`Conv3d` that doesn't wait: as many frames of zeros, but before the first frame rather than after the last one.

    At stride 1 an output sees its own frame and those before it. At stride s in time, output j sees frames up to
    j * s + s - 1 and comes with that frame, the last one before the next output's; a kernel that doesn't reach further
    stays where it was.
    """

    def time_padding(self) -> tuple[int, int]:
        """Frames of zeros before the first and after the last one."""
        left, right = super().time_padding()
        without_future = (self.kernel_size[0] - 1) * self.dilation[0] + 1 - self.stride[0]
        moved = max(0, min(right, without_future - left))
        return left + moved, right - moved

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, O, T', H', W')`, the shape that `Conv3d` gives."""
        return ops.conv3d(
            F.pad(x, (0, 0, 0, 0, *self.time_padding())),
            self.weight,
            self.bias,
            stride=self.stride,  # type: ignore[arg-type]
            padding=(0, *self.padding[1:]),  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            groups=self.groups,
        )


class ConvBN(Streaming, nn.Module):
    """`BN(conv(x))`, padded so that stride 1 keeps the size.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size, stride: in time, height, width; odd kernels.
        groups: as in `torch.nn.Conv3d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        *,
        stride: int | Triple = 1,
        groups: int = 1,
    ):
        super().__init__()
        k, r, s = triple(kernel_size)
        self.conv = Conv3d(
            in_channels,
            out_channels,
            (k, r, s),
            stride=stride,
            padding=(k // 2, r // 2, s // 2),
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm3d(out_channels)

    def forward(self, x: Tensor, *, add: Sequence[Tensor] = (), relu: bool = False) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, O, T', H', W')`; what is added to it and a ReLU behind are as in `normalise`."""
        return normalise(self.bn, self.conv(x), add=add, relu=relu)

    def stream(self) -> Stream:
        """See `Streaming`."""
        return Chain(self.conv, self.bn)
