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

from lean3d.blocks import (
    Chain,
    ConvBN,
    Head,
    Recent,
    ResNetStem,
    State,
    Stream,
    Streaming,
    Timing,
    TRGPlaces,
    Windows,
    bottleneck,
    stream_of,
)
from lean3d.blocks.streaming import merged, step_all
from lean3d.errors import ConfigError
from lean3d.models.registry import VideoNet, register_model, scaled
from lean3d.models.resnet3d import DEPTHS_50, Block, init_convs, res_stage

Pair = tuple[Tensor, Tensor]
FramePair = tuple[Tensor | None, Tensor | None]


class Lateral(ConvBN):
    """time x 1 x 1 convolution at stride alpha in time, BN, ReLU: T frames of the fast pathway onto T / alpha."""

    def __init__(self, in_channels: int, *, time: int, alpha: int):
        super().__init__(in_channels, 2 * in_channels, (time, 1, 1), stride=(alpha, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """`(N, C, T, H, W)` -> `(N, 2 C, T / alpha, H, W)`, rounded up."""
        return super().forward(x, relu=True)

    def stream(self) -> Stream:
        """See `Streaming`."""
        return Chain(super().stream(), F.relu)


class SlowFastStage(Streaming, nn.Module):
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

    def stream(self) -> Stream:
        """See `Streaming`; a frame is a pair, either of which may be None."""
        return _TwoRates(self.slow, self.fast, self.lateral)


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

    def stream(self) -> Stream:
        """See `Streaming`."""
        return Chain(_Split(self.alpha), super().stream())


class SlowFastHead(Head):
    """The averages of both pathways side by side, dropout, linear classifier.

    Args:
        in_channels, num_classes, dropout: as in `Head`.
        alpha: frames of the fast pathway for one of the slow one.
    """

    def __init__(self, in_channels: int, num_classes: int, *, dropout: float, alpha: int):
        super().__init__(in_channels, num_classes, dropout=dropout)
        self.alpha = alpha

    def forward(self, pair: Pair) -> Tensor:  # type: ignore[override]
        """(`(N, C, T', H, W)`, `(N, C', T, H, W)`) -> `(N, num_classes)`."""
        return self.linear(self.dropout(torch.cat([x.mean((2, 3, 4)) for x in pair], 1)))

    def stream(self, frames: int) -> Stream:
        """The head frame by frame: the scores of the last `frames` frames of the slow pathway's features, those that
        there are, and of the fast one's that belong to them, alpha to one."""
        return Chain(_Sums(self.alpha), Recent(frames, "mean"), lambda x: self.linear(x[:, 0, 0, 0] / x[:, 0, 0, 1]))


class _Split(Stream):
    """Frame by frame, what the pathways get: (frame or None, frame)."""

    def __init__(self, alpha: int):
        self.alpha = alpha

    def timing(self, before: Timing) -> tuple[Timing, Timing]:
        """See `Stream`."""
        return before.window(0, 0, self.alpha), before

    def init_state(self) -> State:
        """How many frames there were since the slow pathway's last one."""
        return 0

    def step(self, x: Tensor, state: State) -> tuple[FramePair, State]:
        """See `Stream`."""
        return (None if state else x, x), (state + 1) % self.alpha


class _TwoRates(Stream):
    """Both pathways of a stage; what is ahead waits where the lateral connection joins them."""

    def __init__(self, slow: nn.Module, fast: nn.Module, lateral: nn.Module | None):
        self.slow, self.fast = stream_of(slow), stream_of(fast)
        self.lateral = None if lateral is None else stream_of(lateral)

    def timing(self, before: tuple[Timing, Timing]) -> tuple[Timing, Timing]:
        """See `Stream`."""
        slow, fast = self.slow.timing(before[0]), self.fast.timing(before[1])
        return merged([slow, self.lateral.timing(fast)]) if self.lateral else slow, fast

    def init_state(self) -> State:
        """States of slow, fast and lateral, and the frames of the first and of the last that wait for each other."""
        lateral = self.lateral.init_state() if self.lateral else None
        return (self.slow.init_state(), self.fast.init_state(), lateral), ((), ())

    def step(self, pair: FramePair, state: State) -> tuple[FramePair | None, State]:
        """See `Stream`."""
        (slow_state, fast_state, lateral_state), waiting = state
        slows, slow_state = step_all(self.slow, _there(pair[0]), slow_state)
        fasts, fast_state = step_all(self.fast, _there(pair[1]), fast_state)
        if self.lateral:
            laterals, lateral_state = step_all(self.lateral, fasts, lateral_state)
            slows, waiting = _joined(waiting, slows, laterals)
        state = (slow_state, fast_state, lateral_state), waiting
        return (_only(slows), _only(fasts)) if slows or fasts else None, state

    def flush(self, state: State) -> list[FramePair]:
        """See `Stream`."""
        (slow_state, fast_state, lateral_state), waiting = state
        slows, fasts = self.slow.flush(slow_state), self.fast.flush(fast_state)
        if self.lateral:
            laterals, lateral_state = step_all(self.lateral, fasts, lateral_state)
            slows, _ = _joined(waiting, slows, laterals + self.lateral.flush(lateral_state))
        return [*((slow, None) for slow in slows), *((None, fast) for fast in fasts)]


class _Sums(Stream):
    """Sums of what both pathways have, and of how many frames, for each frame of the slow one: `(N, 1, 1, 2, C + C')`.

    A sum of such sums over several frames gives both averages over them, also where the last one is not complete.
    """

    def __init__(self, alpha: int):
        self.fast = Windows(_sum_and_count, alpha, stride=alpha, right=alpha - 1)

    def timing(self, before: tuple[Timing, Timing]) -> Timing:
        """See `Stream`."""
        return merged([before[0], self.fast.timing(before[1])])

    def init_state(self) -> State:
        """The state of the fast pathway's groups of alpha frames; what waits for the other pathway."""
        return self.fast.init_state(), ((), ())

    def step(self, pair: FramePair, state: State) -> tuple[Tensor | None, State]:
        """See `Stream`."""
        fast_state, waiting = state
        slows = [_sum_and_count(x) for x in _plane_means(pair[0])]
        fasts, fast_state = step_all(self.fast, _plane_means(pair[1]), fast_state)
        sums, waiting = _joined(waiting, slows, fasts, 4)
        return _only(sums), (fast_state, waiting)

    def flush(self, state: State) -> list[Tensor]:
        """See `Stream`."""
        fast_state, waiting = state
        return _joined(waiting, [], self.fast.flush(fast_state), 4)[0]


def _there(x: Tensor | None) -> list[Tensor]:
    return [] if x is None else [x]


def _only(frames: list[Tensor]) -> Tensor | None:
    return frames[0] if frames else None


def _plane_means(x: Tensor | None) -> list[Tensor]:
    return [] if x is None else [x.mean((3, 4), keepdim=True)]


def _sum_and_count(frames: Tensor) -> Tensor:
    """`(N, C, T, 1, 1)` -> `(N, 1, 1, 2, C)`: the sum over T, and T."""
    total = frames.sum((2, 3, 4))
    return torch.stack((total, torch.full_like(total, frames.shape[2])), 1)[:, None, None]


def _joined(waiting: State, slows: list[Tensor], fasts: list[Tensor], dim: int = 1) -> tuple[list[Tensor], State]:
    """Frames of both that belong together, joined along `dim`; and what waits for the other."""
    slow, fast = [*waiting[0], *slows], [*waiting[1], *fasts]
    count = min(len(slow), len(fast))
    joined = [torch.cat(pair, dim) for pair in zip(slow[:count], fast[:count], strict=True)]
    return joined, (tuple(slow[count:]), tuple(fast[count:]))


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
    return init_convs(VideoNet(stem, stages, SlowFastHead(slow + fast, num_classes, dropout=dropout, alpha=alpha)))


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
