"""Normalisation and what follows it, as one operator in training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch.nn.functional as F
from torch import Tensor, nn

from lean3d import ops
from lean3d.ops import native


def normalise(bn: nn.Module, x: Tensor, *, add: Sequence[Tensor] = (), relu: bool = False) -> Tensor:
    """`relu(bn(x) + sum(add))`: in training on a CPU two passes over memory instead of five, and as written elsewhere.

    Args:
        bn: a `torch.nn.BatchNorm3d` or what stands in its place. In eval mode, with hooks, converted to another class
            (for several processes), traced or without native kernels it is called as it is.
        x: `(N, C, T, H, W)`.
        add: what is added to the normalised x: shaped like it, or with one frame, which then stands for all.
        relu: whether a ReLU follows.
    """
    if fuses(bn, x):
        assert bn.num_batches_tracked is not None and bn.running_mean is not None and bn.running_var is not None
        bn.num_batches_tracked.add_(1)
        return ops.batch_norm(
            x,
            bn.running_mean,
            bn.running_var,
            bn.weight,
            bn.bias,
            momentum=1.0 / bn.num_batches_tracked.item() if bn.momentum is None else bn.momentum,
            eps=bn.eps,
            add=add,
            relu=relu,
        )
    y = bn(x)
    for other in add:
        y = y + other
    return F.relu(y) if relu else y


def fuses(bn: nn.Module, x: Tensor) -> TypeGuard[nn.BatchNorm3d]:
    """Whether `normalise` calls the operator in place of the module: in training, where there is a kernel."""
    return (
        type(bn) is nn.BatchNorm3d
        and bn.training
        and bn.affine
        and bn.track_running_stats
        and not (bn._forward_hooks or bn._forward_pre_hooks or bn._backward_hooks or bn._backward_pre_hooks)
        and native.takes(x)
    )


class NormReLU(nn.Sequential):
    """Batch normalisation and ReLU, or one of them, or nothing: what stands behind a convolution.

    Args:
        channels: of the input.
        norm: whether there is a `torch.nn.BatchNorm3d`.
        activation: whether there is a ReLU.
    """

    def __init__(self, channels: int, *, norm: bool = True, activation: bool = True):
        super().__init__(*[nn.BatchNorm3d(channels)] * norm, *[nn.ReLU(inplace=True)] * activation)
        self.both = norm and activation

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> the same."""
        return normalise(self[0], x, relu=True) if self.both and fuses(self[0], x) else super().forward(x)
