"""SlowFast networks (Feichtenhofer et al., ICCV 2019, arXiv 1812.03982).

Two residual nets over one clip: the slow one sees every alpha-th frame with all channels, the fast one sees every
frame with a share beta of the channels. After the stem and after res2 to res4, a lateral connection hands the fast
one's features to the slow one, whose channels they join:

    clip (T frames) ── every alpha-th frame ──> slow: stem ─┬─ res2 ─┬─ res3 ─┬─ res4 ─┬─ res5 ──┐
          │                                              lateral  lateral  lateral  lateral      ├─ averages, linear
          └────────────────────────────────────> fast: stem ─┴─ res2 ─┴─ res3 ─┴─ res4 ─┴─ res5 ─┘

Stages pass on the pair (slow, fast).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.blocks import ConvBN, Head, ResNetStem, TRGPlaces, bottleneck
from lean3d.errors import ConfigError
from lean3d.models.registry import VideoNet, register_model, scaled
from lean3d.models.resnet3d import DEPTHS_50, Block, init_convs, res_stage

Pair = tuple[Tensor, Tensor]


class Lateral(ConvBN):
    """time x 1 x 1 convolution at stride alpha in time, BN, ReLU: T frames of the fast pathway onto T / alpha."""

    def __init__(self, in_channels: int, *, time: int, alpha: int):
        super().__init__(in_channels, 2 * in_channels, (time, 1, 1), stride=(alpha, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, 2 C, T / alpha, H, W)`, rounded up."""
        return F.relu(super().forward(x))


class SlowFastStage(nn.Module):
    """One stage of both pathways, and the lateral connection after it.

    Args:
        slow, fast: the stage of each.
        lateral: None after the last stage.
    """

    def __init__(self, slow: nn.Module, fast: nn.Module, lateral: nn.Module | None):
        super().__init__()
        self.slow, self.fast, self.lateral = slow, fast, lateral

    def forward(self, pair: Pair) -> Pair:
        """(`(N, C, T / alpha, H, W)`, `(N, C', T, H, W)`) -> the same of the next stage."""
        slow, fast = self.slow(pair[0]), self.fast(pair[1])
        if self.lateral is not None:
            slow = torch.cat((slow, self.lateral(fast)), 1)
        return slow, fast


class SlowFastStem(SlowFastStage):
    """The stems of both pathways; takes the clip and splits it.

    Args:
        alpha: the slow pathway gets frames 0, alpha, 2 alpha, ...
    """

    def __init__(self, slow: nn.Module, fast: nn.Module, lateral: nn.Module, *, alpha: int):
        super().__init__(slow, fast, lateral)
        self.alpha = alpha

    def forward(self, clip: Tensor) -> Pair:  # type: ignore[override]
        """`(N, C, T, H, W)` -> both pathways' features."""
        return super().forward((clip[:, :, :: self.alpha], clip))


class SlowFastHead(Head):
    """The averages of both pathways side by side, dropout, linear classifier."""

    def forward(self, pair: Pair) -> Tensor:  # type: ignore[override]
        """(`(N, C, T', H, W)`, `(N, C', T, H, W)`) -> `(N, num_classes)`."""
        return self.linear(self.dropout(torch.cat([x.mean((2, 3, 4)) for x in pair], 1)))


def slowfast(
    slow_blocks: Sequence[Block | Sequence[Block]],
    fast_blocks: Sequence[Block | Sequence[Block]],
    depths: Sequence[int],
    num_classes: int,
    in_channels: int,
    width: float,
    dropout: float,
    alpha: int,
    beta: float,
    lateral_time: int,
    trg: TRGPlaces | None = None,
) -> VideoNet:
    """A SlowFast net of bottlenecks.

    Args:
        slow_blocks, fast_blocks: as in `resnet3d`, for each pathway.
        depths: number of blocks in res2 to res5.
        alpha: frame ratio.
        beta: channel ratio.
        lateral_time: length in time of the lateral connections' kernels, odd.
        trg: where the temporal residual gradient sits, in each pathway on its own frames; blocks get theirs from
            their own functions.
    """
    if alpha < 1 or beta <= 0 or lateral_time < 1 or lateral_time % 2 == 0:
        raise ConfigError(
            "alpha must be at least 1, beta above 0 and lateral_time odd; "
            f"got alpha {alpha}, beta {beta}, lateral_time {lateral_time}"
        )
    trg = trg or TRGPlaces()
    slow, fast = scaled(64, width), scaled(round(64 * beta), width)
    clip_channels = trg.channels("input", in_channels)
    slow_stem: nn.Module = ResNetStem(clip_channels, slow)
    fast_stem: nn.Module = ResNetStem(clip_channels, fast, time=5)
    if trg.modules("input"):
        slow_stem, fast_stem = (nn.Sequential(*trg.modules("input"), stem) for stem in (slow_stem, fast_stem))
    stem = SlowFastStem(
        slow_stem,
        fast_stem,
        Lateral(fast, time=lateral_time, alpha=alpha),
        alpha=alpha,
    )
    stages = []
    for number, (slow_block, fast_block, depth) in enumerate(zip(slow_blocks, fast_blocks, depths, strict=True)):
        stride = 2 if number > 0 else 1
        slow_inner, fast_inner = scaled(64 * 2**number, width), scaled(round(64 * beta) * 2**number, width)
        place = f"stage{number + 1}"
        slow_stage = res_stage(slow_block, depth, slow + 2 * fast, slow_inner, 4, stride, trg, place)
        fast_stage = res_stage(fast_block, depth, fast, fast_inner, 4, stride, trg, place)
        slow, fast = 4 * slow_inner, 4 * fast_inner
        last = number == len(depths) - 1
        lateral = None if last else Lateral(fast, time=lateral_time, alpha=alpha)
        stages.append(SlowFastStage(slow_stage, fast_stage, lateral))
    return init_convs(VideoNet(stem, stages, SlowFastHead(slow + fast, num_classes, dropout=dropout)))


SLOW_BLOCKS: Sequence[Block] = (bottleneck, bottleneck, partial(bottleneck, time=3), partial(bottleneck, time=3))
FAST_BLOCKS: Sequence[Block] = (partial(bottleneck, time=3),) * 4


@register_model(sampling_rate=2, size=224)
def slowfast_r50(
    *,
    num_classes: int = 400,
    num_frames: int = 32,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    alpha: int = 4,
    beta: float = 0.125,
    lateral_time: int = 7,
) -> VideoNet:
    """SlowFast-50 8x8: the slow pathway sees 8 frames of 32, 8 frames of the video apart.

    Args:
        alpha: frame ratio, fast to slow.
        beta: channel ratio, fast to slow.
        lateral_time: length of the lateral kernels in time; the paper has 5, the published 8x8 nets 7.
    """
    return slowfast(
        SLOW_BLOCKS, FAST_BLOCKS, DEPTHS_50, num_classes, in_channels, width, dropout, alpha, beta, lateral_time
    )


@register_model(sampling_rate=2, size=224)
def slowfast_r50_4x16(
    *,
    num_classes: int = 400,
    num_frames: int = 32,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    alpha: int = 8,
    beta: float = 0.125,
    lateral_time: int = 5,
) -> VideoNet:
    """SlowFast-50 4x16: the slow pathway sees 4 frames of 32, 16 frames of the video apart.

    Args:
        alpha: frame ratio, fast to slow.
        beta: channel ratio, fast to slow.
        lateral_time: length of the lateral kernels in time.
    """
    return slowfast(
        SLOW_BLOCKS, FAST_BLOCKS, DEPTHS_50, num_classes, in_channels, width, dropout, alpha, beta, lateral_time
    )
