"""C3D (Tran et al., ICCV 2015, arXiv 1412.0767) and its light form (arXiv 1905.13388).

Eight 3x3x3 convolutions, a max pooling after the 1st, 2nd, 4th, 6th and 8th.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.blocks import ConvBN, FullySeparableBlock, Head, TRGPlaces, trg_places
from lean3d.models.registry import VideoNet, register_model, scaled

STAGES = ((64,), (128,), (256, 256), (512, 512), (512, 512))


class ShrinkPool(nn.Module):
    """Max pooling that halves height and width, and time too where asked; a last odd row or frame is kept.

    Args:
        time: whether time is halved.
    """

    def __init__(self, time: bool):
        super().__init__()
        self.window = (2 if time else 1, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, C, T or T / 2, H / 2, W / 2)`, rounded up."""
        x = x.contiguous(memory_format=torch.channels_last_3d)
        return F.max_pool3d(x, self.window, self.window, ceil_mode=True)


class ConvReLU(ConvBN):
    """`relu(BN(conv(x)))`."""

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, O, T, H, W)`."""
        return F.relu(super().forward(x))


def _c3d(
    layer: Callable[[int, int], nn.Module],
    num_classes: int,
    in_channels: int,
    width: float,
    dropout: float,
    *,
    trg: TRGPlaces | None = None,
    first: Callable[[int, int], nn.Module] | None = None,
) -> VideoNet:
    """C3D's plan with `layer` for each convolution; `first` takes the place of the first one and its pooling."""
    trg = trg or TRGPlaces()
    stages: list[nn.Module] = []
    channels = trg.channels("input", in_channels)
    for number, widths in enumerate(STAGES):
        place = f"stage{number + 1}"
        parts = trg.modules(place)
        channels = trg.channels(place, channels)
        if number == 0 and first is not None:
            out_channels = scaled(widths[0], width)
            layer_1 = first(channels, out_channels)
            stages.append(nn.Sequential(*parts, layer_1) if parts else layer_1)
            channels = out_channels
            continue
        for out_channels in (scaled(c, width) for c in widths):
            parts += [*trg.modules("blocks"), layer(trg.channels("blocks", channels), out_channels)]
            channels = out_channels
        stages.append(nn.Sequential(*parts, ShrinkPool(time=number > 0)))
    stem = nn.Sequential(*trg.modules("input"))
    return VideoNet(stem, stages, Head(channels, num_classes, dropout=dropout))


@register_model(sampling_rate=2, size=112)
def c3d(
    *, num_classes: int = 400, num_frames: int = 16, in_channels: int = 3, width: float = 1.0, dropout: float = 0.5
) -> VideoNet:
    """C3D: eight dense 3x3x3 convolutions, with BN, and a global average in place of its two hidden linear layers.

    The linear layers hold 50 of the original's 78 million weights and fix the clip's length and size; without BN the
    net hardly trains from scratch. Its convolutions are the original's: 27.7M weights, 38.5 GMACs.
    """
    layer = partial(ConvReLU, kernel_size=3)
    return _c3d(layer, num_classes, in_channels, width, dropout)


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
    """
    layer = partial(FullySeparableBlock, kernel_size=3, expansion=expansion)
    first = partial(ConvReLU, kernel_size=(3, 5, 5), stride=(1, 2, 2)) if stem == "conv" else None
    places = trg_places(trg, trg_mode, len(STAGES))
    return _c3d(layer, num_classes, in_channels, width, dropout, trg=places, first=first)
