"""Non-local nets (Wang et al., CVPR 2018, arXiv 1711.07971): a residual net with non-local blocks between its blocks.

Five of them in a 50-layer net, after every other block: two in res3, three in res4.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from lean3d.blocks import NonLocalBlock
from lean3d.blocks.non_local import Affinity
from lean3d.models.i3d import i3d_r50
from lean3d.models.registry import VideoNet, register_model
from lean3d.models.resnet3d import c2d_r50, slow_r50

RES3, RES4 = 1, 2


def add_non_local(net: VideoNet, affinity: Affinity) -> VideoNet:
    """Put a non-local block after every other block of res3 and res4.

    The residual blocks keep their names ("0", "1", ...), so weights of the net without non-local blocks load; the
    block after "1" is "1_non_local".
    """
    for number in (RES3, RES4):
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for name, block in net.stages[number].named_children():
            modules[name] = block
            if int(name) % 2 == 1:
                channels = block.units[-1].bn.num_features  # type: ignore[union-attr, index]
                modules[f"{name}_non_local"] = NonLocalBlock(channels, affinity=affinity)
        net.stages[number] = nn.Sequential(modules)
    return net


@register_model(sampling_rate=8, size=224)
def c2d_r50_nl(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    temporal_pool: bool = True,
    affinity: Affinity = "embedded_gaussian",
) -> VideoNet:
    """C2D-50 with five non-local blocks.

    Args:
        temporal_pool: whether max pooling halves time after res2.
        affinity: "embedded_gaussian" or "dot_product".
    """
    net = c2d_r50(
        num_classes=num_classes,
        num_frames=num_frames,
        in_channels=in_channels,
        width=width,
        dropout=dropout,
        temporal_pool=temporal_pool,
    )
    return add_non_local(net, affinity)


@register_model(sampling_rate=8, size=224)
def i3d_r50_nl(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    temporal_pool: bool = True,
    affinity: Affinity = "embedded_gaussian",
) -> VideoNet:
    """I3D-50 with five non-local blocks.

    Args:
        temporal_pool: whether max pooling halves time after res2.
        affinity: "embedded_gaussian" or "dot_product".
    """
    net = i3d_r50(
        num_classes=num_classes,
        num_frames=num_frames,
        in_channels=in_channels,
        width=width,
        dropout=dropout,
        temporal_pool=temporal_pool,
    )
    return add_non_local(net, affinity)


@register_model(sampling_rate=8, size=224)
def slow_r50_nl(
    *,
    num_classes: int = 400,
    num_frames: int = 8,
    in_channels: int = 3,
    width: float = 1.0,
    dropout: float = 0.5,
    affinity: Affinity = "embedded_gaussian",
) -> VideoNet:
    """SlowOnly-50 with five non-local blocks.

    Args:
        affinity: "embedded_gaussian" or "dot_product".
    """
    net = slow_r50(
        num_classes=num_classes, num_frames=num_frames, in_channels=in_channels, width=width, dropout=dropout
    )
    return add_non_local(net, affinity)
