"""The SmallBig unit, its block plans, and its attention (CVPR 2020, arXiv 2006.14582)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lean3d import ops
from lean3d.blocks.conv import Conv3d, ConvBN
from lean3d.blocks.norm import normalise
from lean3d.blocks.streaming import (
    Chain,
    Frames,
    Recent,
    SlidingMax,
    Stream,
    Streaming,
    Windows,
    sliding_max,
    sliding_mean,
    together,
    whole_clip,
)
from lean3d.errors import ConfigError
from lean3d.ops.conv.reference import Triple
from lean3d.ops.pool.reference import Mode, Window, check_window

BIG_VIEW: Window = (3, 3, 3)
GLOBAL_TIME_VIEW: Window = (None, 3, 3)


class Pool3d(Streaming, nn.Module):
    """Pooling at stride 1 that keeps the size; see `lean3d.ops.pool3d`.

    With a `horizon`, the window in time is the last so many frames, those that there are, in place of `window[0]`; the
    result is as long as x. `limit_time` sets it: the clip's length for a window over the whole clip, and in the causal
    form the window's own for the others.

    Args:
        window: odd sizes in time, height, width; None for a whole axis, which then has length 1.
        mode: "max" or "average".
    """

    def __init__(self, window: Window, mode: Mode = "max"):
        super().__init__()
        check_window(window, mode)
        self.window, self.mode = window, mode
        self.horizon: int | None = None

    def limit_time(self, frames: int, *, causal: bool) -> None:
        """No more than `frames` frames of the past, and with `causal` none of the future."""
        if self.window[0] is None or causal:
            self.horizon = self.window[0] or frames

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> the same, or 1 along the axes whose window is None."""
        if self.horizon is None:
            return ops.pool3d(x, self.window, self.mode)
        return (sliding_max if self.mode == "max" else sliding_mean)(self._in_plane(x), self.horizon)

    def stream(self) -> Stream:
        """See `Streaming`."""
        time = self.window[0]
        if time is None:
            frames = whole_clip(self.horizon, f"Pool3d {self.window} takes a {self.mode} over the whole clip")
            return Chain(self._in_plane, SlidingMax(frames) if self.mode == "max" else Recent(frames, "mean"))
        if time == 1:
            return Frames(self)
        left, right = (time // 2, time // 2) if self.horizon is None else (time - 1, 0)
        return Chain(self._in_plane, Windows(self._in_time, time, left=left, right=right))

    def _in_plane(self, x: Tensor) -> Tensor:
        return ops.pool3d(x, (1, *self.window[1:]), self.mode)

    def _in_time(self, x: Tensor) -> Tensor:
        return x.amax(2, keepdim=True) if self.mode == "max" else x.mean(2, keepdim=True)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"window={self.window}, mode={self.mode!r}, horizon={self.horizon}"


class SmallBigUnit(ConvBN):
    """`y = BN(conv(x)) + BN_big(conv(pool(x)))`: a small and a big view through one convolution.

    The pooling picks the strongest context around each place, so a 1x1x1 convolution sees 3x3x3 places at no extra
    weight but a second BN. That BN starts at weight 0 and bias 0: a net that starts from 2D weights starts as that
    2D net. With a window of None along an axis the big view has length 1 there (a 3x3 convolution sees zeros around
    it) and is broadcast.

    Args:
        in_channels, out_channels: channels of input and output.
        kernel_size, stride: of the convolution, in time, height, width.
        groups: as in `torch.nn.Conv3d`.
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
        groups: int = 1,
        pool: Window = BIG_VIEW,
        pool_mode: Mode = "max",
        shared: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, groups=groups)
        self.pool = Pool3d(pool, pool_mode)
        self.big_conv = (
            None if shared else ConvBN(in_channels, out_channels, kernel_size, stride=stride, groups=groups).conv
        )
        self.big_bn = nn.BatchNorm3d(out_channels)
        nn.init.zeros_(self.big_bn.weight)

    def forward(self, x: Tensor, *, add: Sequence[Tensor] = (), relu: bool = False) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, O, T, H', W')`, any length and size; `add` and `relu` as in `normalise`."""
        big_conv = self.big_conv or self.conv
        big = normalise(self.big_bn, big_conv(self.pool(x)))
        return normalise(self.bn, self.conv(x), add=(big, *add), relu=relu)

    def stream(self) -> Stream:
        """See `Streaming`."""
        return together(torch.add, super().stream(), Chain(self.pool, self.big_conv or self.conv, self.big_bn))


class SmallBigExtra(Streaming, nn.Module):
    """`x + BN(W2(W1 x * sigmoid(W1 max(x))))`: one more step, with the whole clip as the big view, as an attention.

    It stands before a block. W1 takes C channels to C / 4, W2 back. The BN starts at 0, and the step as x. With a
    `horizon` the big view at each time is that of its last so many frames.

    Args:
        channels: C.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = max(1, channels // 4)
        self.reduce = Conv3d(channels, inner, 1, bias=False)
        self.expand = ConvBN(inner, channels, 1)
        nn.init.zeros_(self.expand.bn.weight)
        self.horizon: int | None = None

    def limit_time(self, frames: int, *, causal: bool) -> None:
        """No more than `frames` frames of the past, and none of the future."""
        self.horizon = frames

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, C, T, H, W)`."""
        if self.horizon is None:
            return self._gated(x, self._gate(x.amax((2, 3, 4), keepdim=True)))
        return self._gated(x, self._gate(sliding_max(x.amax((3, 4), keepdim=True), self.horizon)))

    def stream(self) -> Stream:
        """See `Streaming`."""
        maximum = Recent(whole_clip(self.horizon, "SmallBigExtra takes a maximum over the whole clip"), "max")
        gate = Chain(lambda x: x.amax((3, 4), keepdim=True), maximum, self._gate)
        return together(self._gated, nn.Identity(), gate)

    def _gate(self, maximum: Tensor) -> Tensor:
        return torch.sigmoid(self.reduce(maximum))

    def _gated(self, x: Tensor, gate: Tensor) -> Tensor:
        return x + self.expand(self.reduce(x) * gate)


@dataclass(frozen=True)
class BlockPlan:
    """What a bottleneck of SmallBigNet is made of; `block_plan` makes one from text."""

    pools: tuple[Window | None, ...] = (None, None, None)
    """The big view's window of each convolution, None where it has none."""
    time: int = 1
    """Length of the first kernel in time."""
    extra: bool = False
    """Whether a `SmallBigExtra` stands before it."""


FIGURE_BLOCKS = {
    "a": BlockPlan(),
    "b": BlockPlan(time=3),
    "c": BlockPlan((None, BIG_VIEW, None)),
    "d": BlockPlan((BIG_VIEW, BIG_VIEW, None)),
    "e": BlockPlan((BIG_VIEW, BIG_VIEW, GLOBAL_TIME_VIEW)),
    "f": BlockPlan((BIG_VIEW, BIG_VIEW, GLOBAL_TIME_VIEW), extra=True),
}
"""The blocks of the paper's figure: (a) plain 2D, (b) plain 3D, (c) to (e) one, two, three SmallBig units, (f) three
and the extra one. Which two (d) has isn't known; here the first two, as the third's window is another one."""


def block_plan(text: str, convolutions: int = 3) -> BlockPlan:
    """The plan of a block from its text.

    A letter is a block of the paper's figure (see `FIGURE_BLOCKS`). Otherwise the windows of the block's convolutions,
    "-" for none, sizes in time, height, width, T, H, W for a whole axis; "+ extra" behind them adds the attention:

        "-, 3x3x3, -"                       one unit, on the 3x3 convolution
        "3x3x3, 3x3x3, Tx1x1"               three, the last one's window as some read the paper's figure
        "Tx3x3, Tx3x3, TxHxW + extra"

    Args:
        text: the plan.
        convolutions: how many the block has: 3 in bottlenecks, 2 in basic blocks (which have no letters).

    Raises:
        ConfigError: Says what came and what is accepted.
    """
    if convolutions == 3 and text in FIGURE_BLOCKS:
        return FIGURE_BLOCKS[text]
    windows, plus, extra = (part.strip() for part in text.partition("+"))
    parts = windows.split(",")
    if len(parts) != convolutions or (plus and extra != "extra"):
        letters = f"one of the letters {', '.join(FIGURE_BLOCKS)}, or " if convolutions == 3 else ""
        example = ", ".join(["3x3x3"] * (convolutions - 1) + ["Tx3x3"])
        raise ConfigError(
            f'block must be {letters}{convolutions} windows such as {example!r} ("-" for none, "+ extra" behind them '
            f"for the attention); got {text!r}"
        )
    return BlockPlan(tuple(_window(part.strip()) for part in parts), extra=bool(plus))


def _window(text: str) -> Window | None:
    if text == "-":
        return None
    match = re.fullmatch(r"(T|\d+)x(H|\d+)x(W|\d+)", text.replace(" ", ""))
    if match is None:
        raise ConfigError(
            f"a window is three odd sizes such as 3x3x3, or T, H, W for a whole axis (Tx3x3); got {text!r}"
        )
    t, h, w = (None if part in "THW" else int(part) for part in match.groups())
    check_window((t, h, w), "max")
    return t, h, w
