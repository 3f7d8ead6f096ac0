"""The same in two passes over memory, forward and backward, where PyTorch takes five and eight (cpu.cpp).

In a light net's training step normalisation and ReLU take more time than the convolutions between them: hardly any
arithmetic, all memory. Fused, x is read for the statistics and once more for the result; the ReLU leaves no tensor of
its own, its mask is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lean3d.ops import native
from lean3d.ops.norm.reference import batch_norm_reference


def batch_norm(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    add: Sequence[Tensor] = (),
    relu: bool = False,
) -> Tensor:
    """`batch_norm_reference`: `relu(batch_norm(x) + sum(add))` in training, with the same arguments.

    The native form takes float32 tensors in `torch.channels_last_3d` on a CPU and at most two to add; all else, and
    what `torch.compile` or an export traces, is the reference. Statistics are summed in double precision above blocks
    of some thousand values. A second derivative is the reference's alone.
    """
    if not _fits(x, (running_mean, running_var, weight, bias), add):
        native.ran("batch_norm", "torch")
        return batch_norm_reference(
            x, running_mean, running_var, weight, bias, momentum=momentum, eps=eps, add=add, relu=relu
        )
    native.ran("batch_norm", "native")
    a, b = [*add, None, None][:2]
    return _BatchNorm.apply(x, running_mean, running_var, weight, bias, momentum, eps, a, b, relu)


def _fits(x: Tensor, parameters: Sequence[Tensor], add: Sequence[Tensor]) -> bool:
    if torch.compiler.is_compiling() or not native.takes(x, *parameters, *add) or x.ndim != 5 or len(add) > 2:
        return False
    n, c, t, h, w = x.shape
    return (
        n * t * h * w > 1
        and all(other.shape in ((n, c, t, h, w), (n, c, 1, h, w)) for other in add)
        and all(tensor.is_contiguous(memory_format=torch.channels_last_3d) for tensor in (x, *add))
        and all(parameter.is_contiguous() for parameter in parameters)
    )


def _one_frame(other: Tensor | None, x: Tensor) -> bool:
    return other is not None and other.shape[2] != x.shape[2]


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    n, c, t, h, w = x.shape
    return n, t, h * w, c


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        weight: Tensor,
        bias: Tensor,
        momentum: float,
        eps: float,
        a: Tensor | None,
        b: Tensor | None,
        relu: bool,
    ) -> Tensor:
        y, mean, rstd = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        address = native.address
        native.kernels().norm_forward(
            _shape(x),
            *map(address, (x, weight, bias)),
            *(address(a), _one_frame(a, x)),
            *(address(b), _one_frame(b, x)),
            *(relu, eps, momentum),
            *map(address, (running_mean, running_var, mean, rstd, y)),
            torch.get_num_threads(),
        )
        ctx.relu = relu
        ctx.one_frame = tuple(_one_frame(other, x) for other in (a, b))
        masks_by_y = relu and not (a is None and b is None)
        ctx.save_for_backward(x, weight, bias, mean, rstd, y if masks_by_y else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd, y = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last_3d)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        masked = None if y is None else torch.empty_like(x)
        dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
        native.kernels().norm_backward(
            _shape(x),
            *map(native.address, (x, y, gradient, weight, bias)),
            ctx.relu,
            *map(native.address, (mean, rstd, masked, dx, dweight, dbias)),
            torch.get_num_threads(),
        )
        added = gradient if masked is None else masked
        da, db = (
            (added.sum(2, keepdim=True) if one_frame else added) if needed else None
            for needed, one_frame in zip(ctx.needs_input_grad[7:9], ctx.one_frame, strict=True)
        )
        return dx, None, None, dweight, dbias, None, None, da, db, None
