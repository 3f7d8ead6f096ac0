"""Weights and clips that are the same wherever they are made: every tensor's numbers follow from its name."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def seeded_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Numbers for a state dict's entries: He's scale for kernels, BN statistics that keep activations near 1."""
    return {name: _numbers(name, tuple(shape)) for name, shape in shapes.items()}


def seeded_clip(shape: Sequence[int]) -> Tensor:
    """A clip of noise, normal."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(1))


def digest(shapes: Mapping[str, Sequence[int]]) -> str:
    """A fingerprint of a state dict's names and shapes."""
    lines = [f"{name} {list(shape)}" for name, shape in sorted(shapes.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.int64)
    if name.endswith("running_var"):
        return 0.5 + torch.rand(shape, generator=generator)
    if len(shape) > 1:
        return torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
    if name.endswith("weight"):
        return 0.3 + 0.4 * torch.rand(shape, generator=generator)
    return 0.1 * torch.randn(shape, generator=generator)
