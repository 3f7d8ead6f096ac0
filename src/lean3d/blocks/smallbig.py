"""The SmallBig unit (CVPR 2020, arXiv 2006.14582)."""

from __future__ import annotations

from torch import Tensor, nn

from lean3d import ops
from lean3d.blocks.conv import ConvBN
from lean3d.ops.conv.reference import Triple
from lean3d.ops.pool.reference import Mode, Window, check_window

BIG_VIEW: Window = (3, 3, 3)
GLOBAL_TIME_VIEW: Window = (None, 3, 3)


class Pool3d(nn.Module):
    """Pooling at stride 1 that keeps the size; see `lean3d.ops.pool3d`.

    Args:
        window: odd sizes in time, height, width; None for a whole axis, which then has length 1.
        mode: "max" or "average".
    """

    def __init__(self, window: Window, mode: Mode = "max"):
        super().__init__()
        check_window(window, mode)
        self.window, self.mode = window, mode

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> the same, or 1 along the axes whose window is None."""
        return ops.pool3d(x, self.window, self.mode)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"window={self.window}, mode={self.mode!r}"


class SmallBigUnit(ConvBN):
    """`y = BN(conv(x)) + BN_big(conv(pool(x)))`: a small and a big view through one convolution.

    The pooling picks the strongest context around each place, so a 1x1x1 convolution sees 3x3x3 places at no extra
    weight but a second BN. That BN starts at weight 0 and bias 0: a net that starts from 2D weights starts as that
    2D net. With a window of None along time the big view is one time step, broadcast over all.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size, stride: of the convolution, in time, height, width.
        pool: the pooling's window: odd sizes in time, height, width, None for a whole axis. The paper's are
            `BIG_VIEW` (3, 3, 3) and, for the last convolution of a block, `GLOBAL_TIME_VIEW` (None, 3, 3).
        pool_mode: "max" (the paper's) or "average".
        shared: whether both views go through the same convolution (the paper's); if not, the big one has its own.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Triple,
        *,
        stride: int | Triple = 1,
        pool: Window = BIG_VIEW,
        pool_mode: Mode = "max",
        shared: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride)
        self.pool = Pool3d(pool, pool_mode)
        self.big_conv = None if shared else ConvBN(in_channels, out_channels, kernel_size, stride=stride).conv
        self.big_bn = nn.BatchNorm3d(out_channels)
        nn.init.zeros_(self.big_bn.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, O, T, H', W')`, any length and size."""
        big_conv = self.big_conv or self.conv
        return self.bn(self.conv(x)) + self.big_bn(big_conv(self.pool(x)))
