"""What each operation is by definition, in float64: what algorithms are held against.

Convolutions are sums over the places of their kernels, each a matrix product: PyTorch has no fast convolution in
float64, but its products are.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lean3d.fast.graph import Affine, Call, Concat, Conv, Elementwise, Gradient, MaxPool, Op, Value
from lean3d.fast.passes import split

_FUNCTIONS: dict[str, Any] = {
    "relu": torch.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "add": torch.add,
    "mul": torch.mul,
}


def exact(op: Op, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of an operation in float64; 5-axed ones in `torch.channels_last_3d`."""
    if isinstance(op, Call):
        return _call(op, inputs)
    parts = split(op)
    if len(parts) > 1:
        values = dict(zip(op.inputs, inputs, strict=True))
        for part in parts:
            values[part.output] = exact(part, [values[v] for v in part.inputs])[0]
        return [values[op.output]]
    x = inputs[0]
    if isinstance(op, Conv):
        y = _conv(x, op.weight.double(), op.output.shape, op.stride, op.padding, op.groups)
        if op.bias is not None:
            y += op.bias.double()[:, None, None, None]
        if len(inputs) > 1:
            y += inputs[1]
        return [y.relu_() if op.relu else y]
    if isinstance(op, MaxPool):
        return [_max_pool(x, op)]
    if isinstance(op, Elementwise):
        return [_FUNCTIONS[op.function](*inputs)]
    if isinstance(op, Concat):
        return [_laid_out(torch.cat(list(inputs), 1))]
    if isinstance(op, Gradient):
        slices = [x.diff(dim=2), x.mean(2, keepdim=True)]
        gradient = torch.cat(slices[::-1] if op.mean_first else slices, 2)
        return [_laid_out(torch.cat((x, gradient), 1) if op.beside else gradient)]
    assert isinstance(op, Affine)
    shape = (-1, *[1] * (x.ndim - 2))
    return [x * op.scale.double().view(shape) + op.shift.double().view(shape)]


def _conv(
    x: Tensor, weight: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int], groups: int
) -> Tensor:
    pt, ph, pw = padding
    x = F.pad(x, (pw, pw, ph, ph, pt, pt)).permute(0, 2, 3, 4, 1)  # N, T, H, W, C
    n, o, *places = shape
    y = torch.zeros(n, *places, o, dtype=torch.float64)
    matrix = y.view(-1, o)
    for t in range(weight.shape[2]):
        for h in range(weight.shape[3]):
            for w in range(weight.shape[4]):
                ends = [k + (size - 1) * s + 1 for k, size, s in zip((t, h, w), places, stride, strict=True)]
                taken = x[:, t : ends[0] : stride[0], h : ends[1] : stride[1], w : ends[2] : stride[2]]
                tap = weight[:, :, t, h, w]  # (O, C / groups)
                if tap.shape[1] == 1 and groups == o:
                    y.addcmul_(taken, tap[:, 0])
                elif groups == 1:
                    matrix.addmm_(taken.reshape(-1, taken.shape[4]), tap.t())
                else:
                    parts = zip(y.chunk(groups, 4), taken.chunk(groups, 4), tap.chunk(groups), strict=True)
                    for out, part, kernel in parts:
                        out += part @ kernel.t()
    return y.permute(0, 4, 1, 2, 3)


def _max_pool(x: Tensor, op: MaxPool) -> Tensor:
    """One axis after another; places outside of x never win."""
    for dim, k, s, p, n in zip((2, 3, 4), op.kernel, op.stride, op.padding, op.output.shape[2:], strict=True):
        size = x.shape[dim]
        k = size if k is None else k
        y = None
        for i in range(k):
            places = (torch.arange(n) * s + i - p).clamp_(0, size - 1)
            inside = places == torch.arange(n) * s + i - p
            taken = x.index_select(dim, places)
            if not inside.all():
                view = [1] * 5
                view[dim] = n
                taken = taken.masked_fill(~inside.view(view), -torch.inf)
            y = taken if y is None else torch.maximum(y, taken)
        assert y is not None
        x = y
    return _laid_out(x)


def _call(op: Call, inputs: Sequence[Tensor]) -> list[Tensor]:
    values: dict[Value, Any] = dict(zip(op.inputs, inputs, strict=True))
    args, kwargs = tree_map_only(Tensor, _double, (op.args, op.kwargs))
    function = op.function
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).double()
    return [_laid_out(y) for y in Call([], [], function, args, kwargs, op.name).run(values)]


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _laid_out(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 else x
