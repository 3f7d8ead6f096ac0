"""C3D (Tran et al., ICCV 2015, arXiv 1412.0767) and its light form (arXiv 1905.13388).

Eight 3x3x3 convolutions, a max pooling after the 1st, 2nd, 4th, 6th and 8th. The light form may have five, as many as
the nets on which C3D's authors compare kernels, before they settle on eight.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from lean3d import ops
from lean3d.blocks import (
    Chain,
    ConvBN,
    FullySeparableBlock,
    Head,
    Stream,
    Streaming,
    TRGPlaces,
    Windows,
    stream_of,
    trg_places,
)
from lean3d.blocks.fsb import STEPS
from lean3d.blocks.smallbig import BIG_VIEW
from lean3d.errors import ConfigError
from lean3d.models.registry import VideoNet, register_model, scaled
from lean3d.ops.conv.reference import Triple

STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))
"""Channels of each stage's convolutions."""


class Layer(Protocol):
    """Makes a convolution with what belongs to it."""

    def __call__(self, in_channels: int, out_channels: int, *, stride: Triple = ...) -> nn.Module: ...


class ShrinkPool(Streaming, nn.Module):
    """Max pooling that halves height and width, and time too where asked; a last odd row or frame is kept.

    Args:
        time: whether time is halved.
    """

    def __init__(self, time: bool):
        super().__init__()
        self.window = (2 if time else 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, C, T or T / 2, H / 2, W / 2)`, rounded up."""
        return ops.max_pool3d(x, self.window, self.window, ceil_mode=True)

    def stream(self) -> Stream:
        """See `Streaming`."""
        time = self.window[0]
        return stream_of(self.forward) if time == 1 else Windows(self.forward, time, stride=time, right=time - 1)


class ConvReLU(ConvBN):
    """`relu(BN(conv(x)))`."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """`(N, C, T, H, W)` -> `(N, O, T, H, W)`."""
        return super().forward(x, relu=True)

    def stream(self) -> Stream:
        """See `Streaming`."""
        return Chain(super().stream(), F.relu)


def _c3d(
    layer: Layer,
    num_classes: int,
    in_channels: int,
    width: float,
    dropout: float,
    *,
    trg: TRGPlaces | None = None,
    first: Callable[[int, int], nn.Module] | None = None,
    plan: tuple[tuple[int, ...], ...] = STAGES,
    pooled: bool = True,
    halve_time_from: int = 2,
) -> VideoNet:
    """C3D's plan with `layer` for each convolution; `first` takes the place of the first one and its pooling.

    `pooled`: max pooling at the end of a stage; if not, a stride of its last convolution.
    """
    trg = trg or TRGPlaces()
    stages: list[nn.Module] = []
    channels = trg.channels("input", in_channels)
    for number, widths in enumerate(plan):
        place = f"stage{number + 1}"
        parts = trg.modules(place)
        channels = trg.channels(place, channels)
        if number == 0 and first is not None:
            out_channels = scaled(widths[0], width)
            layer_1 = first(channels, out_channels)
            stages.append(nn.Sequential(*parts, layer_1) if parts else layer_1)
            channels = out_channels
            continue
        halves_time = number + 1 >= halve_time_from
        for place_in_stage, out_channels in enumerate(scaled(c, width) for c in widths):
            strided = not pooled and place_in_stage == len(widths) - 1
            stride = (2 if halves_time else 1, 2, 2) if strided else (1, 1, 1)
            parts += [*trg.modules("blocks"), layer(trg.channels("blocks", channels), out_channels, stride=stride)]
            channels = out_channels
        stages.append(nn.Sequential(*parts, *[ShrinkPool(time=halves_time)] * pooled))
    stem = nn.Sequential(*trg.modules("input"))
    return VideoNet(stem, stages, Head(channels, num_classes, dropout=dropout))


@register_model(sampling_rate=2, size=112)
def c3d(
    *,
    num_classes: int = 400,
    num_frames: int = 16,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    trg: str = "none",
    trg_mode: Literal["replace", "beside"] = "replace",
) -> VideoNet:
    """C3D: eight dense 3x3x3 convolutions, with BN, and a global average in place of its two hidden linear layers.

    The linear layers hold 50 of the original's 78 million weights and fix the clip's length and size; without BN the
    net hardly trains from scratch. Its convolutions are the original's: 27.7M weights, 38.5 GMACs.

    Args:
        trg, trg_mode: as in `c3d_light`, to tell what the temporal residual gradient does from what its blocks do.
    """
    layer = partial(ConvReLU, kernel_size=3)
    places = trg_places(trg, trg_mode, len(STAGES))
    return _c3d(layer, num_classes, in_channels, width, dropout, trg=places)


@register_model(sampling_rate=2, size=112)
def c3d_light(
    *,
    num_classes: int = 400,
    num_frames: int = 16,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    expansion: float = 0.5,
    trg: str = "input",
    trg_mode: Literal["replace", "beside"] = "replace",
    stem: Literal["separable", "conv"] = "separable",
    layers: Literal[8, 5] = 8,
    shrink: Literal["pool", "stride"] = "pool",
    halve_time_from: int = 2,
    big_view: str = "none",
) -> VideoNet:
    """Light C3D: every convolution a Fully Separable Block, the Temporal Residual Gradient at the input.

    Args:
        expansion: alpha of all blocks. 0.5: 12.9 times fewer weights than C3D's convolutions, and 15.0 times fewer
            multiplications with F(4, 3) and F(4x4, 3x3).
        trg: where the temporal residual gradient sits: "none", or some of "input", "stage1" to "stage5", "blocks"
            (before every Fully Separable Block), with commas.
        trg_mode: whether it stands in place of its input or beside it, as further channels.
        stem: the first layer. "separable": a block like the others, then its pooling. "conv": a dense 3x5x5 convolution
            at stride (1, 2, 2) in place of both. With so few input channels a dense kernel costs little, and nothing is
            computed at full resolution, where a separable block spends most of a training step moving memory.
        layers: 8: C3D's. 5: the first of each stage, for small data: fewer normalisations and ReLUs in a row.
        shrink: what makes a stage's output smaller. "pool": C3D's max pooling. "stride": strides of the stage's last
            block, which then doesn't compute what pooling throws away: a training step is about twice as fast.
        halve_time_from: the first stage that halves time, 2 to 5; 6: none does. Late keeps short events apart, for more
            work.
        big_view: the steps of all blocks that are SmallBig units with 3x3x3 pooling: "none", or some of "temporal",
            "depthwise", "pointwise", with commas.

    Raises:
        ConfigError: An argument has another value.
    """
    for name, value, accepted in (
        ("stem", stem, ("separable", "conv")),
        ("layers", layers, (8, 5)),
        ("shrink", shrink, ("pool", "stride")),
        ("halve_time_from", halve_time_from, (2, 3, 4, 5, 6)),
    ):
        if value not in accepted:
            raise ConfigError(f"{name} must be one of {', '.join(map(str, accepted))}; got {value!r}")
    steps = [] if big_view == "none" else [step.strip() for step in big_view.split(",")]
    if not set(steps) <= set(STEPS):
        raise ConfigError(f"big_view must be none or some of {', '.join(STEPS)}, such as 'depthwise'; got {big_view!r}")
    views = dict.fromkeys(steps, BIG_VIEW)
    return _c3d(
        partial(FullySeparableBlock, kernel_size=3, expansion=expansion, big_views=views),
        num_classes,
        in_channels,
        width,
        dropout,
        trg=trg_places(trg, trg_mode, len(STAGES)),
        first=partial(ConvReLU, kernel_size=(3, 5, 5), stride=(1, 2, 2)) if stem == "conv" else None,
        plan=STAGES if layers == 8 else tuple(widths[:1] for widths in STAGES),
        pooled=shrink == "pool",
        halve_time_from=halve_time_from,
    )
