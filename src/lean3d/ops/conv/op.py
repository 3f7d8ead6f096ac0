"""The same convolution by kernel shape, each as the operator that runs near the machine's peak.

On a CPU, PyTorch runs `conv3d` with a flat kernel far below what the machine can do. The forms below compute the same
numbers, without copies as long as activations stay in `torch.channels_last_3d`, where (N, T, H, W, C) lie in this
order in memory and all reshapes are views:

    kernel (1, 1, 1), no groups     a matrix product over channels                  F.linear
    kernel (1, R, S), any groups    time folded into the batch                      F.conv2d on (N * T, C, H, W)
    kernel (K, 1, 1), any groups    time as the height, the plane as the width      F.conv2d on (N, C, T, H * W)
    depthwise (K, R, S), trained    the sum of K flat ones, each moved in time      F.conv2d on (N * T, C, H, W)
    everything else                 well served already                             F.conv3d
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lean3d.ops.conv.reference import Triple


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Triple = (1, 1, 1),
    padding: Triple = (0, 0, 0),
    dilation: Triple = (1, 1, 1),
    groups: int = 1,
) -> Tensor:
    """3D convolution, equal to `conv3d_reference`, forward and backward.

    Args:
        x: `(N, C, T, H, W)`; fastest in `torch.channels_last_3d`, any layout is accepted.
        weight: `(O, C / groups, K, R, S)`, as `torch.nn.Conv3d` keeps it.
        bias: `(O,)` or None.
        stride, padding, dilation: in time, height, width.
        groups: as in `torch.nn.Conv3d`.

    Returns:
        `(N, O, T', H', W')`, in `torch.channels_last_3d`.
    """
    kt, kh, kw = weight.shape[2:]
    if (kt, kh, kw) == (1, 1, 1) and groups == 1 and padding == (0, 0, 0):
        st, sh, sw = stride
        if stride != (1, 1, 1):
            x = x[:, :, ::st, ::sh, ::sw]
        return F.linear(x.permute(0, 2, 3, 4, 1), weight.flatten(1), bias).permute(0, 4, 1, 2, 3)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    if kt == 1 and padding[0] == 0:
        if stride[0] != 1:
            x = x[:, :, :: stride[0]]
        y = F.conv2d(_innermost(fold_time(x)), weight.squeeze(2), bias, stride[1:], padding[1:], dilation[1:], groups)
        return unfold_time(y, x.shape[0])
    if (kh, kw) == (1, 1) and padding[1:] == (0, 0):
        _, sh, sw = stride
        if (sh, sw) != (1, 1):
            x = x[:, :, :, ::sh, ::sw]
        n, c, t, h, w = x.shape
        y = F.conv2d(
            _innermost(x.reshape(n, c, t, h * w)),
            weight.squeeze(4),
            bias,
            (stride[0], 1),
            (padding[0], 0),
            (dilation[0], 1),
            groups,
        )
        return y.unflatten(3, (h, w))
    if groups == x.shape[1] == weight.shape[0] and x.device.type == "cpu" and _wants_gradient(x, weight):
        return _sum_of_flat(x, weight, bias, stride, padding, dilation)
    return F.conv3d(_innermost(x), weight, bias, stride, padding, dilation, groups)


def _innermost(x: Tensor) -> Tensor:
    """`(N, C, ...)` with the strides of channels that lie innermost, where there is one channel.

    One channel lies alike in both layouts; PyTorch tells them by strides, and would give its result in the other one.
    """
    alike = x.shape[1] == 1 and not torch.compiler.is_compiling()
    return x.squeeze(1).unsqueeze(-1).movedim(-1, 1) if alike else x


def _wants_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _sum_of_flat(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Triple, padding: Triple, dilation: Triple
) -> Tensor:
    """A depthwise convolution; `F.conv3d` is faster forward, and several times slower backward."""
    n, channels, t = x.shape[:3]
    span = t + 2 * padding[0] - dilation[0] * (weight.shape[2] - 1)  # outputs at stride 1
    frames, moved = fold_time(x), []
    for k, flat in enumerate(weight.unbind(2)):
        y = F.conv2d(frames, flat, None, stride[1:], padding[1:], dilation[1:], channels)
        first = k * dilation[0] - padding[0]  # the frame that the first output sees through this part of the kernel
        moved.append(F.pad(unfold_time(y, n), (0, 0, 0, 0, -first, first + span - t)))
    y = sum(moved[1:], start=moved[0])
    if bias is not None:
        y = y + bias.view(-1, 1, 1, 1)
    return y[:, :, :: stride[0]]


def fold_time(x: Tensor) -> Tensor:
    """`(N, C, T, H, W)` -> `(N * T, C, H, W)`; a view where x is in `torch.channels_last_3d`."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold_time(x: Tensor, n: int) -> Tensor:
    """`(N * T, C, H, W)` -> `(N, C, T, H, W)`; the inverse of `fold_time`."""
    if x.shape[0] == n:
        # The general form would give the single frame a stride for which torch's batch norm takes the tensor for
        # another layout and computes wrong gradients of its weight and bias.
        return x.unsqueeze(2)
    return x.unflatten(0, (n, -1)).transpose(1, 2)
