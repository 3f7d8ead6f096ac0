"""What moves the weights: optimizers, the learning rate's course, moving averages, precise BN, frozen parts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, AdamW, Optimizer

from lean3d.config import InitConfig, OptimConfig
from lean3d.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def build_optimizer(model: nn.Module, config: OptimConfig) -> Optimizer:
    """SGD with Nesterov's momentum, or AdamW, with weight decay on weights alone.

    Norms' scales and shifts and all biases (one-dimensional parameters) are not decayed. Frozen parameters are in it
    too: without a gradient the optimizer leaves them alone, so parts can join in later.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)
    return AdamW(groups, lr=config.lr, betas=(config.momentum, 0.999))


def learning_rate(step: int, *, peak: float, total_steps: int, warmup_steps: int) -> float:
    """The learning rate of one step: linear growth to `peak`, then half a cosine to zero.

        peak      _--_
                 /    `-_
                /        `-_
        0      /            `-.
               0  warmup      total

    Args:
        step: From 0 to total_steps - 1.
        peak: The greatest rate.
        total_steps: Steps of the whole training.
        warmup_steps: Steps of the growth; no more than a fifth of the training is spent on it.

    Source: SGDR (Loshchilov & Hutter, 2017), without restarts; warm-up as in Goyal et al., 2017.
    """
    warmup = min(warmup_steps, total_steps // 5)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Give all parameter groups this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class WeightAverage(Generic[M]):
    """An exponential moving average of a model's weights; buffers (BN's statistics, counters) are copied.

    Early on the decay is smaller, ``(1 + step) / (10 + step)``, so that the average soon forgets the initial weights.

    Args:
        model: Its copy, `self.model`, starts as the average.
        decay: Share of the old average that each step keeps, in [0, 1).
    """

    def __init__(self, model: M, decay: float):
        if not 0 <= decay < 1:
            raise ConfigError(f"optim.ema must be at least 0 and less than 1, got {decay}; 0.999 is usual, 0 is none")
        self.decay = decay
        self.model: M = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights that optimizer step number `step` (from 0) gave."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), [p.detach() for p in model.parameters()], 1.0 - decay)
        for average, value in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(value)


@torch.no_grad()
def precise_bn(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Take BN's statistics anew, as plain means over `batches`, with the weights as they are.

    The running statistics that training leaves belong to a trail of old weights; for a moving average of weights
    they never were right. All other layers run in eval mode, so dropout has no part in it.

    Args:
        model: Changed in place: only running means and variances of its BNs.
        batches: Model inputs (N, C, T, H, W) on the model's device, of equal size.

    Returns:
        How many batches there were. Of none, nothing is changed.

    Source: Wu & Johnson, "Rethinking Batch in BatchNorm", 2021, section 3.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    before = [(norm.momentum, norm.training) for norm in norms]
    was_training = model.training
    model.eval()
    count = 0
    try:
        for norm in norms:
            norm.train()
        for count, batch in enumerate(batches, 1):
            for norm in norms:
                norm.momentum = 1.0 / count  # the first batch replaces, the k-th counts one k-th
            model(batch)
    finally:
        model.train(was_training)
        for norm, (momentum, training) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.train(training)
    return count


def trained_stages(init: InitConfig, epoch: int, num_stages: int) -> int:
    """How many of the last stages learn in an epoch; the classifier always does.

    Returns:
        0 for the head alone, up to num_stages, or num_stages + 1 for the whole model with its stem.
    """
    if init.train == "all":
        return num_stages + 1
    if init.train == "head":
        return 0
    return min(num_stages + 1, epoch // init.stage_epochs)


def freeze(model: nn.Module, stages: int) -> None:
    """Let only the head and the last `stages` stages learn; one more than there are: everything.

    Frozen parts get no gradient, and their BNs keep their statistics: `train_mode` sees to that.
    """
    if not all(isinstance(getattr(model, part, None), nn.Module) for part in ("stem", "stages", "head")):
        raise ConfigError("init.train 'head' and 'staged' need a model with stem, stages and head; use 'all'")
    whole = stages > len(model.stages)  # type: ignore[arg-type]
    model.requires_grad_(whole)
    model.head.requires_grad_(True)  # type: ignore[operator, union-attr]
    for stage in list(model.stages)[::-1][:stages]:  # type: ignore[call-overload, arg-type]
        stage.requires_grad_(True)


def train_mode(model: nn.Module) -> None:
    """Train mode, except for BNs whose parameters are frozen: those stay in eval mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.weight is not None and not module.weight.requires_grad:
            module.eval()


def limit_steps(
    planned: int, seconds_per_step: float, steps_per_epoch: int, seconds_per_validation: float, seconds_left: float
) -> int:
    """How many steps fit into the time, validations at each epoch's end included.

    Args:
        planned: Steps of the whole schedule; never more.
        seconds_per_step: As measured.
        steps_per_epoch: Steps between two validations.
        seconds_per_validation: As estimated.
        seconds_left: For all steps still to come.

    Returns:
        Steps to come, at least 1.
    """
    epoch = steps_per_epoch * seconds_per_step + seconds_per_validation
    return max(1, min(planned, int(steps_per_epoch * seconds_left / epoch)))
