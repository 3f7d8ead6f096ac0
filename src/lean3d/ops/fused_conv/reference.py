"""The definitions: what the packed convolutions must equal."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lean3d.ops.conv.reference import Triple, conv3d_reference
from lean3d.ops.pool.reference import Window, pool3d_reference


def conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    groups: int = 1,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`relu(conv(x) + bias + residual)`: x `(N, C, T, H, W)`, weight `(O, C / groups, K, R, S)`."""
    return _finish(conv3d_reference(x, weight, bias, stride=stride, padding=padding, groups=groups), residual, relu)


def stage_two_reference(
    x: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor | None,
    pointwise: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    middle_relu: bool = True,
    shrink: Triple = (1, 1, 1),
    ceil_mode: bool = False,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`max_pool(relu(pointwise(relu(depthwise(x))) + residual), shrink)`: weights `(C, 1, K, R, S)`, `(O, C, 1, 1, 1)`.

    A convolution in time before it is `conv_reference`.
    """
    middle = conv_reference(
        x, depthwise, depthwise_bias, stride=stride, padding=padding, groups=x.shape[1], relu=middle_relu
    )
    y = conv_reference(middle, pointwise, bias, residual=residual, relu=relu)
    return F.max_pool3d(y, shrink, shrink, ceil_mode=ceil_mode)


def small_big_reference(
    x: Tensor,
    small: Tensor,
    big: Tensor,
    bias: Tensor | None = None,
    *,
    window: Window,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """`relu(conv(x, small) + conv(max_pool(x, window), big) + bias + residual)`, the second term broadcast over time.

    The unit of arXiv 2006.14582 with its normalisations folded into both weights, `(O, C, 1, R, S)`.
    """
    y = conv3d_reference(x, small, bias, stride=stride, padding=padding)
    return _finish(
        y + conv3d_reference(pool3d_reference(x, window), big, stride=stride, padding=padding), residual, relu
    )


def _finish(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        y = y + residual
    return F.relu(y) if relu else y
