"""Residual blocks: a row of units and a shortcut (He et al., CVPR 2016), whatever the units are."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.blocks.conv import ConvBN
from lean3d.blocks.fsb import FullySeparableBlock
from lean3d.blocks.smallbig import BIG_VIEW, GLOBAL_TIME_VIEW, SmallBigExtra, SmallBigUnit
from lean3d.blocks.streaming import Chain, Stream, Streaming, together
from lean3d.blocks.trg import TRGPlaces
from lean3d.ops.conv.reference import Triple
from lean3d.ops.pool.reference import Mode, Window


class ResidualBlock(Streaming, nn.Module):
    """`relu(shortcut(x) + u_n(... relu(u_1(x))))`, each unit a convolution with its normalisation.

    Args:
        units: the units, in order.
        in_channels, out_channels: where they differ, or where the stride is not 1, the shortcut is a 1x1x1
            convolution with BN; else x itself.
        stride: the block's stride in height and width, which one of the units carries.
        time_stride: its stride in time.
        before: a module that x goes through first, for the units and the shortcut.
    """

    def __init__(
        self,
        units: Sequence[nn.Module],
        *,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        time_stride: int = 1,
        before: nn.Module | None = None,
    ):
        super().__init__()
        self.before = before or nn.Identity()
        self.units = nn.ModuleList(units)
        self.shortcut: nn.Module = nn.Identity()
        if (time_stride, stride) != (1, 1) or in_channels != out_channels:
            self.shortcut = ConvBN(in_channels, out_channels, 1, stride=(time_stride, stride, stride))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, out_channels, T / time_stride, H / stride, W / stride)`, rounded up."""
        y = x = self.before(x)
        for unit in self.units[:-1]:
            y = relu_after(unit, y)
        return relu_after(self.units[-1], y, add=[self.shortcut(x)])

    def stream(self) -> Stream:
        """See `Streaming`."""
        units = [part for unit in self.units[:-1] for part in (unit, F.relu)]
        return Chain(self.before, together(lambda y, x: F.relu(y + x), Chain(*units, self.units[-1]), self.shortcut))


def relu_after(unit: nn.Module, x: Tensor, *, add: Sequence[Tensor] = ()) -> Tensor:
    """`relu(unit(x) + sum(add))`, left to the unit where it knows how to do it in one with its normalisation."""
    if isinstance(unit, ConvBN):
        return unit(x, add=add, relu=True)
    y = unit(x)
    for other in add:
        y = y + other
    return F.relu(y)


def bottleneck(
    in_channels: int, channels: int, out_channels: int, *, stride: int = 1, time: int = 1, extra: bool = False
) -> ResidualBlock:
    """time x 1 x 1, 1 x 3 x 3, 1 x 1 x 1: C2D's block at time 1, SlowOnly's and I3D's at time 3.

    With `extra` a `SmallBigExtra` stands before it.
    """
    units = [
        ConvBN(in_channels, channels, (time, 1, 1)),
        ConvBN(channels, channels, (1, 3, 3), stride=(1, stride, stride)),
        ConvBN(channels, out_channels, 1),
    ]
    before = SmallBigExtra(in_channels) if extra else None
    return ResidualBlock(units, in_channels=in_channels, out_channels=out_channels, stride=stride, before=before)


def basic(in_channels: int, channels: int, out_channels: int, *, stride: int = 1, time: int = 1) -> ResidualBlock:
    """time x 3 x 3, 1 x 3 x 3: the block of the 18-layer nets; it has no 1 x 1 convolution to widen in time."""
    units = [
        ConvBN(in_channels, channels, (time, 3, 3), stride=(1, stride, stride)),
        ConvBN(channels, out_channels, (1, 3, 3)),
    ]
    return ResidualBlock(units, in_channels=in_channels, out_channels=out_channels, stride=stride)


def smallbig_bottleneck(
    in_channels: int,
    channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    pools: Sequence[Window | None] = (BIG_VIEW, BIG_VIEW, GLOBAL_TIME_VIEW),
    pool_mode: Mode = "max",
    shared: bool = True,
    extra: bool = False,
) -> ResidualBlock:
    """The SmallBig block (arXiv 2006.14582): the 2D bottleneck with up to three SmallBig units.

    Args:
        in_channels, channels, out_channels: before, inside, and after the block.
        stride: in height and width, carried by the second convolution.
        pools: each convolution's big window, None for a plain convolution.
        pool_mode, shared: as in `SmallBigUnit`.
        extra: whether a `SmallBigExtra` stands before the block.
    """
    sizes: list[tuple[int, int, Triple, int]] = [
        (in_channels, channels, (1, 1, 1), 1),
        (channels, channels, (1, 3, 3), stride),
        (channels, out_channels, (1, 1, 1), 1),
    ]
    units = _smallbig_units(sizes, pools, pool_mode, shared)
    before = SmallBigExtra(in_channels) if extra else None
    return ResidualBlock(units, in_channels=in_channels, out_channels=out_channels, stride=stride, before=before)


def smallbig_basic(
    in_channels: int,
    channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    pools: Sequence[Window | None] = (BIG_VIEW, GLOBAL_TIME_VIEW),
    pool_mode: Mode = "max",
    shared: bool = True,
    extra: bool = False,
) -> ResidualBlock:
    """Ours, for small data: the 2D basic block with two SmallBig units, the second one's view global in time.

    Arguments as in `smallbig_bottleneck`; the first convolution carries the stride.
    """
    sizes: list[tuple[int, int, Triple, int]] = [
        (in_channels, channels, (1, 3, 3), stride),
        (channels, out_channels, (1, 3, 3), 1),
    ]
    units = _smallbig_units(sizes, pools, pool_mode, shared)
    before = SmallBigExtra(in_channels) if extra else None
    return ResidualBlock(units, in_channels=in_channels, out_channels=out_channels, stride=stride, before=before)


def _smallbig_units(
    sizes: Sequence[tuple[int, int, Triple, int]], pools: Sequence[Window | None], pool_mode: Mode, shared: bool
) -> list[nn.Module]:
    """For each (in_channels, out_channels, kernel, stride in the plane) a unit, plain where its window is None."""
    units: list[nn.Module] = []
    for (before, after, kernel, step), pool in zip(sizes, pools, strict=True):
        stride = (1, step, step)
        if pool is None:
            units.append(ConvBN(before, after, kernel, stride=stride))
        else:
            units.append(
                SmallBigUnit(before, after, kernel, stride=stride, pool=pool, pool_mode=pool_mode, shared=shared)
            )
    return units


def fsb_bottleneck(
    in_channels: int,
    channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    time: int = 1,
    expansion: float = 0.25,
    trg: TRGPlaces | None = None,
) -> ResidualBlock:
    """A Fully Separable Block of time x 3 x 3 with a shortcut: the light form of `bottleneck`.

    At expansion 1/4 it is that bottleneck with a depthwise 1 x 3 x 3: its temporal step is the first convolution, its
    pointwise step the last one. The middle has `expansion * out_channels` channels, `channels` says nothing here.
    """
    unit = _fsb_unit(in_channels, out_channels, time, (1, stride, stride), expansion, trg)
    return ResidualBlock([unit], in_channels=in_channels, out_channels=out_channels, stride=stride)


def fsb_basic(
    in_channels: int,
    channels: int,
    out_channels: int,
    *,
    stride: int = 1,
    expansion: float = 0.5,
    trg: TRGPlaces | None = None,
) -> ResidualBlock:
    """Two Fully Separable Blocks of 3 x 3 x 3 with a shortcut: the light form of R3D's block, strided in time too."""
    units = [
        _fsb_unit(in_channels, channels, 3, (stride, stride, stride), expansion, trg),
        _fsb_unit(channels, out_channels, 3, (1, 1, 1), expansion, None),
    ]
    return ResidualBlock(units, in_channels=in_channels, out_channels=out_channels, stride=stride, time_stride=stride)


def _fsb_unit(
    in_channels: int, out_channels: int, time: int, stride: Triple, expansion: float, trg: TRGPlaces | None
) -> nn.Module:
    """A Fully Separable Block without its last ReLU, which the residual block has; behind a TRG where it is told so."""
    trg = trg or TRGPlaces()
    fsb = FullySeparableBlock(
        trg.channels("blocks", in_channels),
        out_channels,
        (time, 3, 3),
        stride=stride,
        expansion=expansion,
        activation=("temporal", "depthwise"),
    )
    before = trg.modules("blocks")
    return nn.Sequential(*before, fsb) if before else fsb
