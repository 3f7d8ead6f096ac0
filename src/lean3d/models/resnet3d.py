"""Residual nets over clips: C2D and SlowOnly here, SmallBigNet and others beside, which differ in their blocks alone.

    stem    1x7x7, stride (1, 2, 2); max pooling 1x3x3, stride (1, 2, 2)        H / 4
    res2    64 channels (x 4 in bottlenecks)                                    H / 4
    res3    128                                                                 H / 8
    res4    256                                                                 H / 16
    res5    512                                                                 H / 32
    head    global average, dropout, linear

Time is strided only by a pooling after res2, where asked. Sources: Wang et al. 2018 (C2D, arXiv 1711.07971),
Feichtenhofer et al. 2019 (SlowOnly, arXiv 1812.03982).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from lean3d.blocks import (
    Conv3d,
    Head,
    ResidualBlock,
    ResNetStem,
    TemporalMaxPool,
    TRGPlaces,
    basic,
    bottleneck,
)
from lean3d.models.registry import VideoNet, register_model, scaled

Block = Callable[..., ResidualBlock]


def resnet3d(
    blocks: Sequence[Block | Sequence[Block]],
    depths: Sequence[int],
    block_expansion: int,
    num_classes: int,
    in_channels: int,
    width: float,
    dropout: float,
    *,
    stem: nn.Module | None = None,
    first_stride: int = 1,
    temporal_pool: bool = False,
    trg: TRGPlaces | None = None,
) -> VideoNet:
    """A residual net from one block function and one depth a stage.

    Args:
        blocks: for res2 to res5, a function (in_channels, channels, out_channels, *, stride) -> block, or several
            that take turns.
        depths: number of blocks in res2 to res5.
        block_expansion: out_channels / channels: 4 for bottlenecks, 1 for basic blocks.
        stem: `(N, in_channels, T, H, W)` -> `scaled(64, width)` channels (default: 1x7x7 and max pooling).
        first_stride: res2's stride in height and width, 2 in nets without max pooling.
        temporal_pool: whether max pooling halves time after res2.
        trg: where the temporal residual gradient sits; blocks get theirs from their own functions.
    """
    trg = trg or TRGPlaces()
    channels = scaled(64, width)
    stem = stem or ResNetStem(trg.channels("input", in_channels), channels)
    stem = nn.Sequential(*trg.modules("input"), stem) if trg.modules("input") else stem
    stages: list[nn.Module] = []
    for number, (block, depth) in enumerate(zip(blocks, depths, strict=True)):
        stride = first_stride if number == 0 else 2
        inner = scaled(64 * 2**number, width)
        stages.append(res_stage(block, depth, channels, inner, block_expansion, stride, trg, f"stage{number + 1}"))
        channels = inner * block_expansion
    if temporal_pool:
        stages[0].append(TemporalMaxPool())  # type: ignore[operator]
    return init_convs(VideoNet(stem, stages, Head(channels, num_classes, dropout=dropout)))


def res_stage(
    block: Block | Sequence[Block],
    depth: int,
    in_channels: int,
    channels: int,
    block_expansion: int,
    stride: int,
    trg: TRGPlaces | None = None,
    place: str = "",
) -> nn.Sequential:
    """`depth` blocks, the first of which carries the stride; several block functions take turns.

    With `trg`, the temporal residual gradient stands before them where it names this `place`.
    """
    turns = [block] if callable(block) else list(block)
    out_channels = channels * block_expansion
    trg = trg or TRGPlaces()
    return nn.Sequential(
        *trg.modules(place),
        turns[0](trg.channels(place, in_channels), channels, out_channels, stride=stride),
        *[turns[i % len(turns)](out_channels, channels, out_channels, stride=1) for i in range(1, depth)],
    )


def init_convs(net: VideoNet) -> VideoNet:
    """He's initialisation of all convolutions (arXiv 1502.01852)."""
    for module in net.modules():
        if isinstance(module, Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


DEPTHS_18, DEPTHS_23, DEPTHS_50, DEPTHS_101 = (2, 2, 2, 2), (1, 2, 3, 1), (3, 4, 6, 3), (3, 4, 23, 3)


@register_model(sampling_rate=8, size=224)
def c2d_r18(
    *, num_classes: int = 400, num_frames: int = 8, in_channels: int = 3, width: float = 1.0, dropout: float = 0.5
) -> VideoNet:
    """C2D-18: a 2D ResNet-18 on every frame, scores from the average over frames. It can't see order."""
    blocks: list[Block] = [basic] * 4
    return resnet3d(blocks, DEPTHS_18, 1, num_classes, in_channels, width, dropout)


@register_model(sampling_rate=8, size=224)
def c2d_r50(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    temporal_pool: bool = False,
) -> VideoNet:
    """C2D-50: a 2D ResNet-50 on every frame, scores from the average over frames. It can't see order.

    Args:
        temporal_pool: whether max pooling halves time after res2, as Wang et al. 2018 and pytorchvideo have it.
    """
    blocks: list[Block] = [bottleneck] * 4
    return resnet3d(blocks, DEPTHS_50, 4, num_classes, in_channels, width, dropout, temporal_pool=temporal_pool)


@register_model(sampling_rate=8, size=224)
def slow_r18(
    *, num_classes: int = 400, num_frames: int = 8, in_channels: int = 3, width: float = 1.0, dropout: float = 0.5
) -> VideoNet:
    """SlowOnly-18: the first convolution of res4's and res5's blocks is 3x3x3."""
    blocks: list[Block] = [basic, basic, partial(basic, time=3), partial(basic, time=3)]
    return resnet3d(blocks, DEPTHS_18, 1, num_classes, in_channels, width, dropout)


@register_model(sampling_rate=8, size=224)
def slow_r50(
    *, num_classes: int = 400, num_frames: int = 8, in_channels: int = 3, width: float = 1.0, dropout: float = 0.5
) -> VideoNet:
    """SlowOnly-50: the first convolution of res4's and res5's blocks is 3x1x1."""
    blocks: list[Block] = [bottleneck, bottleneck, partial(bottleneck, time=3), partial(bottleneck, time=3)]
    return resnet3d(blocks, DEPTHS_50, 4, num_classes, in_channels, width, dropout)


@register_model(sampling_rate=8, size=224)
def slow_r50_extra(
    *, num_classes: int = 400, num_frames: int = 8, in_channels: int = 3, width: float = 1.0, dropout: float = 0.5
) -> VideoNet:
    """SlowOnly-50 with SmallBigNet's attention before every block of res4 and res5: that paper's baseline."""
    slow: Block = partial(bottleneck, time=3, extra=True)
    return resnet3d([bottleneck, bottleneck, slow, slow], DEPTHS_50, 4, num_classes, in_channels, width, dropout)
