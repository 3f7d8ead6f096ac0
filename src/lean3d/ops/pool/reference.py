"""The definition: what every form of the pooling must equal, forward and backward."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lean3d.errors import ConfigError

Window = tuple[int | None, int | None, int | None]
Mode = Literal["max", "average"]


def check_window(window: Window, mode: str) -> None:
    """Refuse what the pooling is not defined for."""
    if len(window) != 3 or any(k is not None and (k < 1 or k % 2 == 0) for k in window):
        raise ConfigError(f"a pooling window is three odd sizes, or None for a whole axis; got {window}")
    if mode not in ("max", "average"):
        raise ConfigError(f"pooling mode must be max or average, got {mode!r}")


def pool3d_reference(x: Tensor, window: Window, mode: Mode = "max") -> Tensor:
    """Pooling at stride 1 with the middle of the window on each place.

    Along an axis of odd size k the result is as long as x, and places outside x don't count (a maximum and an
    average over those inside). Along an axis of None the window is the whole axis and the result has length 1.

    Args:
        x: `(N, C, T, H, W)`.
        window: sizes in time, height, width; None for a whole axis.
        mode: "max" or "average".
    """
    check_window(window, mode)
    kernel = [size if k is None else k for k, size in zip(window, x.shape[2:], strict=True)]
    padding = [0 if k is None else k // 2 for k in window]
    if mode == "max":
        return F.max_pool3d(x, kernel, 1, padding)
    border = [p for p in reversed(padding) for _ in range(2)]  # avg_pool3d refuses inputs shorter than its window
    inside = F.avg_pool3d(F.pad(torch.ones_like(x[:1, :1]), border), kernel, 1)
    return F.avg_pool3d(F.pad(x, border), kernel, 1) / inside
