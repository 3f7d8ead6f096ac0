"""Several processes that act as one: batch normalisation over all of them, weights that are spread over them."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from lean3d.models import VideoNet

M = TypeVar("M", bound=nn.Module)


def world_size() -> int:
    """How many processes train together; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class SyncBatchNorm(_BatchNorm):
    """Batch normalisation with the statistics of the batches of all processes together.

    Names, shapes and meaning of parameters and buffers are `nn.BatchNorm3d`'s, so state dicts fit both ways. In eval
    mode, or in one process, it is `nn.BatchNorm3d`. Unlike `torch.nn.SyncBatchNorm` it runs on a CPU (gloo) too.
    Inputs are (N, C, ...) with any number of further axes; processes may hold different numbers of elements.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected an input (N, C, ...), got shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        use_batch = self.training or self.running_mean is None
        if not use_batch or world_size() == 1:
            return super().forward(input)
        self._check_input_dim(input)
        output, mean, var, count = _SyncNorm.apply(input, self.weight, self.bias, self.eps)
        if self.training and self.track_running_stats:
            self._update_statistics(mean, var, count)
        return output

    @torch.no_grad()
    def _update_statistics(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = var * (count / (count - 1).clamp(min=1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)


class _SyncNorm(torch.autograd.Function):
    """Normalisation over (N, ...) of all processes. Two small all-reduces: statistics forth, two sums back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        exact = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean = torch.var_mean(exact, dims, correction=0)
        # Means and spreads of parts are combined as in Chan et al., 1979; a sum of squares would cancel.
        parts = mean.new_zeros(world_size(), 2 * len(mean) + 1)
        parts[dist.get_rank()] = torch.cat([mean, var, mean.new_tensor([x.numel() // x.shape[1]])])
        dist.all_reduce(parts)
        means, variances, counts = parts[:, : len(mean)], parts[:, len(mean) : -1], parts[:, -1:]
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((variances + (means - mean).square()) * counts).sum(0) / total
        output = F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, torch.rsqrt(var + eps), total)
        ctx.mark_non_differentiable(mean, var, total)
        return output, mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, mean, rstd, total = ctx.saved_tensors
        dy = gradients[0]
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        exact = dy.to(mean.dtype)
        normal = (x.to(mean.dtype) - mean.view(shape)) * rstd.view(shape)
        sums = torch.stack([exact.sum(dims), (exact * normal).sum(dims)])
        own_bias, own_weight = sums.clone().unbind()
        dx = None
        if ctx.needs_input_grad[0]:
            dist.all_reduce(sums)
            sums /= total
            scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
            dx = exact - sums[0].view(shape) - normal * sums[1].view(shape)
            dx = (dx * scale.view(shape)).to(x.dtype)
        if weight is None:
            return dx, None, None, None
        return dx, own_weight.to(weight.dtype), own_bias.to(weight.dtype), None


def convert_sync_batchnorm(model: M) -> M:
    """Put a `SyncBatchNorm` in the place of every batch normalisation, in place, with the same parameters and buffers.

    Returns:
        The model. It is `SyncBatchNorm` itself where `model` is a batch normalisation.
    """
    made: dict[_BatchNorm, SyncBatchNorm] = {}  # one that is used at two places stays one

    def convert(module: nn.Module) -> nn.Module:
        if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
            if module not in made:
                made[module] = _converted(module)
            return made[module]
        for name, child in module.named_children():
            converted = convert(child)
            if converted is not child:
                setattr(module, name, converted)
        return module

    return cast(M, convert(model))


def _converted(norm: _BatchNorm) -> SyncBatchNorm:
    sync = SyncBatchNorm(
        norm.num_features, norm.eps, norm.momentum, affine=norm.affine, track_running_stats=norm.track_running_stats
    )
    for name, parameter in norm.named_parameters(recurse=False):
        sync.register_parameter(name, parameter)
    for name, buffer in norm.named_buffers(recurse=False):
        sync.register_buffer(name, buffer)
    return sync.train(norm.training)


def shard(model: VideoNet, mesh: DeviceMesh) -> VideoNet:
    """Spread a model's parameters over processes, in place: each holds a part, and a stage is whole while it computes.

    Args:
        model: Equal in all processes, on their devices. Buffers stay whole in each.
        mesh: The processes, one axis.

    Source: Zhao et al., "PyTorch FSDP", 2023, section 3; here `torch.distributed.fsdp.fully_shard`.
    """
    for stage in model.stages:
        fully_shard(stage, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def whole(values: Any) -> Any:
    """Dicts and lists of tensors with those that are spread over processes made whole; all processes must call it."""
    return apply_to_collection(values, DTensor, lambda tensor: tensor.full_tensor())


def spread_like(value: Any, parameter: Tensor) -> Any:
    """This process's part of what belongs to a parameter, equal in all processes; what has no such parts as it is."""
    if not (isinstance(parameter, DTensor) and isinstance(value, Tensor) and value.shape == parameter.shape):
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


@torch.no_grad()
def gather(model: nn.Module, into: M) -> M:
    """Fill a plain model with the weights and buffers of one that is spread; all processes must call it."""
    into.load_state_dict(whole(model.state_dict()))
    return into


def load_spread(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Fill a model that is spread, or plain, from a whole state dict."""
    own = model.state_dict()
    model.load_state_dict({name: spread_like(value, own[name]) for name, value in state.items()})


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Fill an optimizer, whose parameters are spread or plain, from a whole state dict."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {name: spread_like(value, parameters[number]) for name, value in entries.items()}
        for number, entries in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})
