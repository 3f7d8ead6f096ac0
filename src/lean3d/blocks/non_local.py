"""The non-local block (Wang et al., CVPR 2018, arXiv 1711.07971)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.blocks.conv import Conv3d
from lean3d.blocks.streaming import State, Stream, Streaming, Timing, whole_clip
from lean3d.errors import ConfigError

Affinity = Literal["embedded_gaussian", "dot_product"]


class NonLocalBlock(Streaming, nn.Module):
    """`x + BN(W_out y)`, where each place of y is a mean of all places of `g(x)`, weighted by likeness.

    The likeness of places i and j is `theta(x_i) . phi(x_j)`. Keys and values, `phi` and `g`, are taken from x after
    a max pooling 1 x 2 x 2, the paper's subsampling. The BN starts at weight 0: the block starts as the identity, so
    it can be put into a trained net. With a `horizon` T, "all places" are those of the last T frames, so far as there
    are so many.

    Args:
        channels: channels of x; half as many inside.
        affinity: "embedded_gaussian": softmax over j of the likeness over the square root of the inner channels (the
            published code's scale; the paper's formula has none). "dot_product": the likeness over the number of j.
        subsample: whether keys and values are pooled.
    """

    def __init__(self, channels: int, *, affinity: Affinity = "embedded_gaussian", subsample: bool = True):
        super().__init__()
        if affinity not in ("embedded_gaussian", "dot_product"):
            raise ConfigError(f"affinity must be embedded_gaussian or dot_product, got {affinity!r}")
        inner = max(1, channels // 2)
        self.affinity, self.subsample = affinity, subsample
        self.theta = Conv3d(channels, inner, 1)
        self.phi = Conv3d(channels, inner, 1)
        self.g = Conv3d(channels, inner, 1)
        self.out = Conv3d(inner, channels, 1)
        self.bn = nn.BatchNorm3d(channels)
        nn.init.zeros_(self.bn.weight)
        self.horizon: int | None = None

    def limit_time(self, frames: int, *, causal: bool) -> None:
        """No more than `frames` frames of the past, and none of the future."""
        self.horizon = frames

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> the same. Work and memory grow with the square of T H W."""
        keys, values = self.memory(x)
        seen = None
        if self.horizon is not None:
            time = torch.arange(x.shape[2], device=x.device)
            age = time[:, None] - time
            seen = (age >= 0) & (age < self.horizon)
            queries, places = x[0, 0, 0].numel(), keys.shape[1] // len(time)
            seen = seen.repeat_interleave(queries, 0).repeat_interleave(places, 1)
        return self.attend(x, keys, values, seen)

    def memory(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a clip or a frame is looked at for: keys and values, `(N, places, inner)` in the order of time."""
        if self.subsample:
            window = (1, min(2, x.shape[3]), min(2, x.shape[4]))
            x = F.max_pool3d(x.contiguous(memory_format=torch.channels_last_3d), window, window)
        return _places(self.phi(x)), _places(self.g(x))

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
        """The result for x. `seen`: which places of the memory each place of x looks at (by default at all)."""
        likeness = _places(self.theta(x)) @ keys.transpose(1, 2)
        if self.affinity == "embedded_gaussian":
            likeness = likeness / keys.shape[2] ** 0.5
            weights = (likeness if seen is None else likeness.masked_fill(~seen, -torch.inf)).softmax(2)
        elif seen is None:
            weights = likeness / keys.shape[1]
        else:
            weights = likeness * seen / seen.sum(1, keepdim=True)
        y = (weights @ values).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.bn(self.out(y))

    def stream(self) -> Stream:
        """See `Streaming`."""
        return _Attention(self, whole_clip(self.horizon, "NonLocalBlock looks at the whole clip"))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"affinity={self.affinity!r}, subsample={self.subsample}, horizon={self.horizon}"


class _Attention(Stream):
    """Each frame looks at the last frames, of which keys and values are kept."""

    def __init__(self, block: NonLocalBlock, frames: int):
        self.block, self.frames = block, frames

    def timing(self, before: Timing) -> Timing:
        """See `Stream`."""
        return before.window(self.frames - 1, 0)

    def init_state(self) -> State:
        """Keys and values of the last frames."""
        return None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Stream`."""
        new = self.block.memory(x)
        most = self.frames * new[0].shape[1]
        kept = new if state is None else tuple(torch.cat(pair, 1)[:, -most:] for pair in zip(state, new, strict=True))
        return self.block.attend(x, *kept), kept


def _places(x: Tensor) -> Tensor:
    """`(N, inner, T, H, W)` -> `(N, T * H * W, inner)`."""
    return x.flatten(2).transpose(1, 2)
