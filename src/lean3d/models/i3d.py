"""I3D on a ResNet-50 (Carreira & Zisserman, CVPR 2017, arXiv 1705.07750; Wang et al., CVPR 2018, arXiv 1711.07971)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lean3d.blocks import ResNetStem, bottleneck
from lean3d.models.registry import VideoNet, register_model, scaled
from lean3d.models.resnet3d import DEPTHS_50, Block, resnet3d


@register_model(sampling_rate=8, size=224)
def i3d_r50(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    temporal_pool: bool = True,
) -> VideoNet:
    """I3D-50: a stem of 5x7x7, and 3x1x1 in place of 1x1x1 in all blocks of res2 and every other one after it.

    Args:
        temporal_pool: whether max pooling halves time after res2.
    """
    plain: Block = bottleneck
    inflated: Block = partial(bottleneck, time=3)
    blocks: list[Block | Sequence[Block]] = [inflated, (inflated, plain), (inflated, plain), (plain, inflated)]
    stem = ResNetStem(in_channels, scaled(64, width), time=5)
    return resnet3d(
        blocks, DEPTHS_50, 4, num_classes, in_channels, width, dropout, stem=stem, temporal_pool=temporal_pool
    )
