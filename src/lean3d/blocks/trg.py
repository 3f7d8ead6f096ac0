"""The Temporal Residual Gradient (arXiv 1905.13388), and where in a net it sits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.blocks.streaming import State, Stream, Streaming, Timing, per_stream
from lean3d.errors import ConfigError, StreamingError


class TemporalResidualGradient(Streaming, nn.Module):
    """T frames as their T - 1 differences and their mean: T slices again, no weights, channel by channel.

        frames       f0    f1    f2    ...    fT-1
        slices          d1    d2    ...   dT-1    mean          d_t = f_t - f_t-1

    The mean keeps what differences lose: the distribution of the values. In the paper's figure the differences come
    in the order of time and the mean takes the remaining slot, which is the default here.

    A stream has no end before which all frames are known. Its forms have a `horizon` of T frames, and any T of their
    slices in a row hold one mean, over T frames:

        windowed, differences first    d1    d2   ...  dT-1   mean |  dT+1  ...   every T frames are a clip: one of T
                                                                                 frames is as it always was
        causal, differences first      d0    d1   ...  dT-2   mean |  dT    ...   the mean of frames 0 ... T - 1
        mean first, in both forms      mean  d1   ...  dT-2   dT-1 |  mean  ...   the mean of the last T frames

    with d0 = f0 (before the first frame are zeros) and fewer frames in the mean where there are fewer.

    Args:
        order: "differences_first" (the paper's) or "mean_first".
        beside: whether the slices stand beside the frames, as further channels, rather than in their place.
    """

    def __init__(
        self, order: Literal["differences_first", "mean_first"] = "differences_first", *, beside: bool = False
    ):
        super().__init__()
        if order not in ("differences_first", "mean_first"):
            raise ConfigError(f"order must be differences_first or mean_first, got {order!r}")
        self.order, self.beside = order, beside
        self.horizon: int | None = None
        self.waits = order == "differences_first"
        """Whether a slice is the difference to the next frame, for which it has to wait."""

    def limit_time(self, frames: int, *, causal: bool) -> None:
        """No more than `frames` frames of the past, and with `causal` none of the future."""
        self.horizon = frames
        self.waits = self.waits and not causal

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, C, T, H, W)`, or 2 C where beside; a single frame is its own mean."""
        if self.horizon is None:
            gradient = self._of_clip(x)
        elif self.waits:
            gradient = torch.cat([self._of_clip(block) for block in x.split(self.horizon, 2)], 2)
        else:
            gradient = self._of_past(x, self.horizon)
        return torch.cat((x, gradient), 1) if self.beside else gradient

    def _of_clip(self, x: Tensor) -> Tensor:
        mean = x.mean(2, keepdim=True)
        differences = x[:, :, 1:] - x[:, :, :-1]
        return torch.cat((differences, mean) if self.order == "differences_first" else (mean, differences), 2)

    def _of_past(self, x: Tensor, horizon: int) -> Tensor:
        differences = x - F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0))
        slots = range(self.mean_slot(horizon), x.shape[2], horizon)
        if not slots:
            return differences
        means = [x[:, :, max(0, t + 1 - horizon) : t + 1].mean(2) for t in slots]
        return differences.index_copy(2, torch.tensor(slots, device=x.device), torch.stack(means, 2))

    def mean_slot(self, horizon: int) -> int:
        """The first slot of a mean."""
        return horizon - 1 if self.order == "differences_first" else 0

    def stream(self) -> Stream:
        """See `Streaming`; without a horizon the mean, over the whole stream, comes with the flush.

        Raises:
            StreamingError: The mean comes first and there is no horizon.
        """
        if self.waits:
            return _WaitingGradient(self)
        if self.horizon is None:
            raise StreamingError(
                "TemporalResidualGradient begins with the mean over the whole clip, so nothing is known before the "
                "clip ends: take differences_first, or limit_time(frames, causal=...) for the mean of the last ones"
            )
        return _PastGradient(self, self.horizon)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"order={self.order!r}, beside={self.beside}, horizon={self.horizon}, waits={self.waits}"


class _WaitingGradient(Stream):
    """A slice comes with the next frame: the difference to it, or the mean where a block of frames is full."""

    def __init__(self, block: TemporalResidualGradient):
        self.beside, self.horizon = block.beside, block.horizon

    def timing(self, before: Timing) -> Timing:
        """See `Stream`."""
        return before.window((self.horizon or 1) - 1, 1)

    def init_state(self) -> State:
        """The last frame; the sum of the block's frames; their number, for each of the batch."""
        return None

    def step(self, x: Tensor, state: State) -> tuple[Tensor | None, State]:
        """See `Stream`."""
        # A stream without blocks may be long: its sum is in float64, so that it doesn't drift.
        summand = x.double() if self.horizon is None else x
        if state is None:
            return None, (x, summand, torch.ones(x.shape[0], dtype=torch.int64, device=x.device))
        last, total, seen = state
        gradient = x - last
        if self.horizon is None:
            total, seen = total + summand, seen + 1
        else:
            full = seen == self.horizon
            gradient = torch.where(per_stream(full), total / self.horizon, gradient)
            total = torch.where(per_stream(full), x, total + x)
            seen = torch.where(full, 1, seen + 1)
        return self._slice(last, gradient), (x, total, seen)

    def flush(self, state: State) -> list[Tensor]:
        """See `Stream`."""
        if state is None:
            return []
        last, total, seen = state
        return [self._slice(last, (total / per_stream(seen)).to(last.dtype))]

    def _slice(self, x: Tensor, gradient: Tensor) -> Tensor:
        return torch.cat((x, gradient), 1) if self.beside else gradient


class _PastGradient(Stream):
    """A slice comes with its frame: the difference to the one before, or every so often the mean."""

    def __init__(self, block: TemporalResidualGradient, horizon: int):
        self.beside, self.horizon, self.slot = block.beside, horizon, block.mean_slot(horizon)

    def timing(self, before: Timing) -> Timing:
        """See `Stream`."""
        return before.window(max(1, self.horizon - 1), 0)

    def init_state(self) -> State:
        """The last frame; the sum of the frames since the last mean; how many frames there were, for each stream."""
        return None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Stream`."""
        last, total, seen = (
            (torch.zeros_like(x), torch.zeros_like(x), torch.zeros(x.shape[0], dtype=torch.int64, device=x.device))
            if state is None
            else state
        )
        total, due = total + x, per_stream(seen % self.horizon == self.slot)
        seen = seen + 1
        gradient = torch.where(due, total / per_stream(seen.clamp(max=self.horizon)), x - last)
        y = torch.cat((x, gradient), 1) if self.beside else gradient
        return y, (x, torch.where(due, 0.0, total), seen)


@dataclass(frozen=True)
class TRGPlaces:
    """Where in a net the Temporal Residual Gradient sits; `trg_places` makes one from a model's arguments.

    The paper doesn't say where it is. A net asks at each of its places whether to put one there.
    """

    places: frozenset[str] = frozenset()
    beside: bool = False

    def channels(self, place: str, channels: int) -> int:
        """How many of `channels` come out at a place: twice as many where the gradient stands beside them."""
        return 2 * channels if self.beside and place in self.places else channels

    def modules(self, place: str) -> list[nn.Module]:
        """What to put at a place: one module or none."""
        return [TemporalResidualGradient(beside=self.beside)] if place in self.places else []


def trg_places(trg: str, mode: str, num_stages: int) -> TRGPlaces:
    """The places that a model's arguments name.

    Args:
        trg: "none", or one or several, with commas, of "input" (the clip), "stage1", "stage2", ... (before that entry
            of the model's `stages`), "blocks" (in every block, before its first convolution, not in its shortcut).
        mode: "replace", the gradient in place of what it is taken of, or "beside", as further channels.
        num_stages: of the model.

    Raises:
        ConfigError: Says what came and what is accepted.
    """
    places = [] if trg == "none" else [place.strip() for place in trg.split(",")]
    known = ["input", *(f"stage{number + 1}" for number in range(num_stages)), "blocks"]
    if not set(places) <= set(known):
        raise ConfigError(f"trg must be none or some of {', '.join(known)}, such as 'input, stage2'; got {trg!r}")
    if mode not in ("replace", "beside"):
        raise ConfigError(f"trg_mode must be replace or beside, got {mode!r}")
    return TRGPlaces(frozenset(places), mode == "beside")
