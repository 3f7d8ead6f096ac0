"""The definition: what the fused form must equal, forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def batch_norm_reference(
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
    """`relu(batch_norm(x) + sum(add))` with the batch's own statistics, as `torch.nn.BatchNorm3d` in training.

    Args:
        x: `(N, C, T, H, W)`, more than one value a channel.
        running_mean, running_var: `(C,)`, moved towards the batch's mean and its unbiased variance by `momentum`.
        weight, bias: `(C,)`.
        eps: added to the variance.
        add: what is added to the normalised x: shaped like it, or with one frame, which then stands for all.
        relu: whether what is negative becomes 0 in the end.
    """
    y = F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)
    for other in add:
        y = y + other
    return F.relu(y) if relu else y
