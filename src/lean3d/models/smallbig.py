"""SmallBigNet (Li et al., CVPR 2020, arXiv 2006.14582): a 2D residual net whose convolutions have a big view too.

The blocks' arguments, so that every row of the paper's studies has a name:

    block       what a block is made of: a letter of the paper's figure ("e": three SmallBig units, "f": those and the
                attention), or its convolutions' windows, such as "-, 3x3x3, -" for one unit; see `blocks.block_plan`
    pooling     "max" (the paper's) or "average"
    shared      whether both views go through one convolution (the paper's); if not, the big view has its own
    stages      those that have such blocks, "res3, res4, res5" in the paper; the others are plain 2D

All that SmallBig units do in time is pooling over windows that reach as far back as ahead, so a clip and the same clip
backwards get the same scores: they are for actions whose direction in time says nothing, or shows in single frames.
"""

from __future__ import annotations

from functools import partial

from lean3d.blocks import basic, block_plan, bottleneck, smallbig_basic, smallbig_bottleneck, trg_places
from lean3d.errors import ConfigError
from lean3d.models.registry import VideoNet, register_model
from lean3d.models.resnet3d import DEPTHS_18, DEPTHS_23, DEPTHS_50, DEPTHS_101, Block, resnet3d
from lean3d.ops.pool.reference import Mode

ALL_STAGES = "res3, res4, res5"
_STAGES = ("res2", "res3", "res4", "res5")


def _smallbig(
    depths: tuple[int, ...],
    block: str,
    pooling: Mode,
    shared: bool,
    stages: str,
    num_classes: int,
    in_channels: int,
    width: float,
    dropout: float,
    trg: str = "none",
) -> VideoNet:
    places = trg_places(trg, "replace", len(depths))
    if "blocks" in places.places:
        raise ConfigError(f"SmallBig's blocks have no gradient: trg must be none, input or a stage; got {trg!r}")
    basic_blocks = depths is DEPTHS_18
    plan = block_plan(block, 2 if basic_blocks else 3)
    big: Block
    if plan.time > 1:
        big = partial(bottleneck, time=plan.time)
    else:
        big = partial(
            smallbig_basic if basic_blocks else smallbig_bottleneck,
            pools=plan.pools,
            pool_mode=pooling,
            shared=shared,
            extra=plan.extra,
        )
    chosen = [stage.strip() for stage in stages.split(",")]
    if not set(chosen) <= set(_STAGES):
        raise ConfigError(f"stages must be some of {', '.join(_STAGES)}, such as {ALL_STAGES!r}; got {stages!r}")
    plain: Block = basic if basic_blocks else bottleneck
    blocks = [big if stage in chosen else plain for stage in _STAGES]
    return resnet3d(blocks, depths, 1 if basic_blocks else 4, num_classes, in_channels, width, dropout, trg=places)


@register_model(sampling_rate=8, size=224)
def smallbig18(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    block: str = "3x3x3, Tx3x3",
    pooling: Mode = "max",
    shared: bool = True,
    stages: str = ALL_STAGES,
    trg: str = "none",
) -> VideoNet:
    """SmallBig-18, ours: basic blocks of two SmallBig units in res3 to res5, for small data.

    Args:
        block, pooling, shared, stages: see the top of this file.
        trg: where the temporal residual gradient stands in place of its input, as in `c3d_light`, but for "blocks".
            The units alone treat past and future alike: such a net cannot tell a clip from the same one backwards.
    """
    return _smallbig(DEPTHS_18, block, pooling, shared, stages, num_classes, in_channels, width, dropout, trg)


@register_model(sampling_rate=8, size=224)
def smallbig23(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    block: str = "e",
    pooling: Mode = "max",
    shared: bool = True,
    stages: str = ALL_STAGES,
) -> VideoNet:
    """SmallBig-23: seven bottlenecks, SmallBig units in res3 to res5.

    Args:
        block, pooling, shared, stages: see the top of this file.
    """
    return _smallbig(DEPTHS_23, block, pooling, shared, stages, num_classes, in_channels, width, dropout)


@register_model(sampling_rate=8, size=224)
def smallbig50(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    block: str = "e",
    pooling: Mode = "max",
    shared: bool = True,
    stages: str = ALL_STAGES,
) -> VideoNet:
    """SmallBig-50: ResNet-50's depth, SmallBig units in res3 to res5.

    Args:
        block, pooling, shared, stages: see the top of this file.
    """
    return _smallbig(DEPTHS_50, block, pooling, shared, stages, num_classes, in_channels, width, dropout)


@register_model(sampling_rate=8, size=224)
def smallbig50_extra(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    block: str = "f",
    pooling: Mode = "max",
    shared: bool = True,
    stages: str = ALL_STAGES,
) -> VideoNet:
    """SmallBig-50 with the attention before every block of res3 to res5.

    Args:
        block, pooling, shared, stages: see the top of this file.
    """
    return _smallbig(DEPTHS_50, block, pooling, shared, stages, num_classes, in_channels, width, dropout)


@register_model(sampling_rate=8, size=224)
def smallbig101(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    block: str = "e",
    pooling: Mode = "max",
    shared: bool = True,
    stages: str = ALL_STAGES,
) -> VideoNet:
    """SmallBig-101: ResNet-101's depth, SmallBig units in res3 to res5.

    Args:
        block, pooling, shared, stages: see the top of this file.
    """
    return _smallbig(DEPTHS_101, block, pooling, shared, stages, num_classes, in_channels, width, dropout)
