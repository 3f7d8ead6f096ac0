"""Frame by frame: what a block computes on a clip, computed on a stream.

    forward     clip   f0 f1 f2 f3 ...     ->  y0 y1 y2 ...
    step        frame  (f_t, state)        ->  (y, state), or (None, state) where none is due yet
    flush       the end of the stream      ->  the outputs that were still to come

The outputs of all steps and of the flush, joined, are those of `forward` on all frames as one clip: a frame's output
comes as soon as the frames of the future that it needs have come (`lookahead`), and the flush takes the end of the
stream for the end of the clip. A block says how it works in time by its method `stream`, made of the parts below; they
hold settings and modules, and nothing of a stream:

    Frames      a function of each frame alone
    Chain       one part after another
    together    the same frames through several parts, whose outputs are combined as they belong together
    Windows     a function of a few neighbouring frames: convolution, pooling, strides (a ring buffer)
    SlidingMax  the maximum over the last T frames, in three comparisons a frame however large T is
    Recent      the mean or the maximum of the last T frames of something small

States are plain values, nested tuples of tensors, ints and None: `torch.save` writes them, `torch.load` reads them with
`weights_only`. Streams share a model, and states that are alike in shape run as one batch (`stack_states`). No step
writes into a tensor of a state, so an old state stays what it was. The words are those of continual inference
(Hedegaard & Iosifidis 2021, arXiv 2106.00050).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lean3d.errors import StreamingError

State = Any
"""Nested tuples of tensors, ints and None. The first dimension of every tensor is the batch."""


@dataclass(frozen=True)
class Timing:
    """Which frames of a stream an output needs: output j those from j * stride - past to j * stride + lookahead."""

    stride: int = 1
    """Frames between two outputs."""
    lookahead: int = 0
    """Frames after the output's own one."""
    past: int = 0
    """Frames before it."""

    @property
    def receptive_field(self) -> int:
        """How many frames that is."""
        return self.past + 1 + self.lookahead

    def window(self, past: int, lookahead: int, stride: int = 1) -> Timing:
        """The timing of a window over such outputs."""
        return Timing(self.stride * stride, self.lookahead + self.stride * lookahead, self.past + self.stride * past)


def merged(timings: Sequence[Timing]) -> Timing:
    """The timing of what is made of outputs with these timings.

    Raises:
        StreamingError: Their strides differ.
    """
    if len({timing.stride for timing in timings}) != 1:
        raise StreamingError(f"branches must have one stride in time, got {[timing.stride for timing in timings]}")
    return Timing(
        timings[0].stride, max(timing.lookahead for timing in timings), max(timing.past for timing in timings)
    )


class Stream:
    """A part that works frame by frame: the base of those below, and itself the one that changes nothing."""

    def timing(self, before: Any) -> Any:
        """The timing of its outputs, given that of its inputs."""
        return before

    def init_state(self) -> State:
        """The state before the first frame, from which it takes batch, size, dtype and device."""
        return ()

    def step(self, x: Any, state: State) -> tuple[Any, State]:
        """One frame `(N, C, 1, H, W)` and the state -> the output that is due, or None, and the next state."""
        return x, state

    def flush(self, state: State) -> list[Any]:
        """The outputs still to come when the stream ends here. The state itself stays good to go on from."""
        return []

    @property
    def lookahead(self) -> int:
        """Frames of the future that an output needs."""
        return self.timing(Timing()).lookahead

    @property
    def stride(self) -> int:
        """Frames between two outputs."""
        return self.timing(Timing()).stride

    @property
    def receptive_field(self) -> int:
        """Frames that an output needs."""
        return self.timing(Timing()).receptive_field


class Streaming:
    """Modules with a form for streams. As it is here: a module that works on each frame alone."""

    def stream(self) -> Stream:
        """The module frame by frame. Keep it where there are many frames: the methods below make it anew each time."""
        return Frames(self)  # type: ignore[arg-type]

    @property
    def lookahead(self) -> int:
        """Frames of the future that an output needs."""
        return self.stream().lookahead

    def init_state(self) -> State:
        """The state before the first frame."""
        return self.stream().init_state()

    def step(self, x: Tensor, state: State) -> tuple[Any, State]:
        """One frame `(N, C, 1, H, W)` and the state -> the output that is due, or None, and the next state."""
        return self.stream().step(x, state)

    def flush(self, state: State) -> list[Any]:
        """The outputs still to come when the stream ends here."""
        return self.stream().flush(state)


FRAMEWISE = (nn.Identity, nn.BatchNorm3d, nn.ReLU, nn.SiLU, nn.Sigmoid, nn.Dropout, nn.Dropout3d)
"""torch's own layers that work on each frame alone, in eval mode."""


def stream_of(module: Stream | nn.Module | Callable[[Tensor], Tensor]) -> Stream:
    """Anything that nets are made of, frame by frame; a plain function is taken for one of each frame alone.

    Raises:
        StreamingError: A module that doesn't say how it works in time, or that can't work frame by frame.
    """
    if isinstance(module, Stream):
        stream = module
    elif isinstance(module, Streaming):
        stream = module.stream()
    elif isinstance(module, nn.Sequential):
        stream = Chain(*module)
    elif isinstance(module, FRAMEWISE) or not isinstance(module, nn.Module):
        stream = Frames(module)
    else:
        raise StreamingError(
            f"{type(module).__name__} doesn't say how it works frame by frame: give it the base "
            "lean3d.blocks.Streaming and a method stream()"
        )
    return stream.parts[0] if isinstance(stream, Chain) and len(stream.parts) == 1 else stream


def whole_clip(horizon: int | None, what: str) -> int:
    """How many frames stand for the whole clip.

    Raises:
        StreamingError: None do; says `what` needs it.
    """
    if horizon is None:
        raise StreamingError(
            f"{what}, so none of its results is known before the clip ends; models have a form in which the last "
            "frames stand for the clip: create_model(..., windowed=True), or causal=True, to be trained as such"
        )
    return horizon


class Frames(Stream):
    """Functions of each frame alone, one after another."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]):
        self.functions = functions

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Stream`."""
        for function in self.functions:
            x = function(x)
        return x, state


class Chain(Stream):
    """One part after another.

    Args:
        parts: whatever `stream_of` takes.
    """

    def __init__(self, *parts: Any):
        self.parts: list[Stream] = []
        for part in map(stream_of, parts):
            for piece in part.parts if isinstance(part, Chain) else [part]:
                if self.parts and isinstance(piece, Frames) and isinstance(self.parts[-1], Frames):
                    self.parts[-1] = Frames(*self.parts[-1].functions, *piece.functions)
                else:
                    self.parts.append(piece)

    def timing(self, before: Any) -> Any:
        """See `Stream`."""
        return functools.reduce(lambda timing, part: part.timing(timing), self.parts, before)

    def init_state(self) -> State:
        """See `Stream`."""
        return tuple(part.init_state() for part in self.parts)

    def step(self, x: Any, state: State) -> tuple[Any, State]:
        """See `Stream`."""
        states = list(state)
        for i, part in enumerate(self.parts):
            x, states[i] = part.step(x, states[i])
            if x is None:
                break
        return x, tuple(states)

    def flush(self, state: State) -> list[Any]:
        """What each part still has goes through those behind it, before they are at their end too."""
        frames: list[Any] = []
        for part, part_state in zip(self.parts, state, strict=True):
            frames, part_state = step_all(part, frames, part_state)
            frames += part.flush(part_state)
        return frames


def step_all(stream: Stream, frames: Sequence[Any], state: State) -> tuple[list[Any], State]:
    """Several frames, one after another: the outputs that were due, and the next state."""
    outputs = []
    for x in frames:
        y, state = stream.step(x, state)
        if y is not None:
            outputs.append(y)
    return outputs, state


def together(combine: Callable[..., Tensor], *branches: Any) -> Stream:
    """The same frames through several branches; `combine` gets one output of each, those that belong together.

    Args:
        combine: as many frames as there are branches -> a frame.
        branches: whatever `stream_of` takes.

    Raises:
        StreamingError: Their strides in time differ.
    """
    streams = [stream_of(branch) for branch in branches]
    if all(isinstance(stream, Frames) for stream in streams):
        return Frames(lambda x: combine(*(stream.step(x, ())[0] for stream in streams)))
    return _Together(combine, streams)


class _Together(Stream):
    """The output of a branch that is ahead of the others waits for theirs."""

    def __init__(self, combine: Callable[..., Tensor], branches: Sequence[Stream]):
        self.combine, self.branches = combine, branches
        merged([branch.timing(Timing()) for branch in branches])  # refuses strides that differ

    def timing(self, before: Timing) -> Timing:
        """See `Stream`."""
        return merged([branch.timing(before) for branch in self.branches])

    def init_state(self) -> State:
        """See `Stream`."""
        return tuple(branch.init_state() for branch in self.branches), ((),) * len(self.branches)

    def step(self, x: Tensor, state: State) -> tuple[Tensor | None, State]:
        """See `Stream`."""
        states, waiting = [], []
        for branch, branch_state, queue in zip(self.branches, *state, strict=True):
            y, branch_state = branch.step(x, branch_state)
            states.append(branch_state)
            waiting.append(queue if y is None else (*queue, y))
        if not all(waiting):
            return None, (tuple(states), tuple(waiting))
        y = self.combine(*(queue[0] for queue in waiting))
        return y, (tuple(states), tuple(queue[1:] for queue in waiting))

    def flush(self, state: State) -> list[Tensor]:
        """See `Stream`."""
        rest = [
            [*queue, *branch.flush(branch_state)]
            for branch, branch_state, queue in zip(self.branches, *state, strict=True)
        ]
        return [self.combine(*frames) for frames in zip(*rest, strict=True)]


class Windows(Stream):
    """A function of `size` neighbouring frames, every `stride` frames; the ring buffer.

        output j    frames j * stride - left  ...  j * stride - left + size - 1

    Frames before the first and after the last one are `fill`, or don't count where that is None.

    Args:
        function: `(N, C, size, H, W)` -> `(N, C', 1, H', W')`; fewer frames at the borders where fill is None.
        size: frames in a window.
        stride: frames between two windows.
        left, right: how many frames before the first and after the last one windows reach.
        fill: the value of such frames.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        size: int,
        *,
        stride: int = 1,
        left: int = 0,
        right: int = 0,
        fill: float | None = None,
    ):
        self.function, self.size, self.window_stride = function, size, stride
        self.left, self.right, self.fill = left, right, fill

    def timing(self, before: Timing) -> Timing:
        """See `Stream`."""
        return before.window(self.left, self.size - 1 - self.left, self.window_stride)

    def init_state(self) -> State:
        """Frames in hand; frames of the window before those that don't count, or, below 0, frames to leave out."""
        return None, self.left

    def step(self, x: Tensor, state: State) -> tuple[Tensor | None, State]:
        """See `Stream`."""
        frames, absent = state
        if absent < 0:
            return None, (frames, absent + 1)
        if frames is not None:
            frames = joined(frames, x)
        elif absent and self.fill is not None:
            border = x.new_full((*x.shape[:2], absent, *x.shape[3:]), self.fill)
            frames, absent = joined(border, x), 0
        else:
            frames = x
        return self._emit(frames, absent, 0)

    def flush(self, state: State) -> list[Tensor]:
        """See `Stream`."""
        frames, absent = state
        outputs: list[Tensor] = []
        for after in range(1, self.right + 1):
            if frames is None:  # nothing but border is left
                break
            if self.fill is None:
                y, (frames, absent) = self._emit(frames, absent, after)
            else:
                y, (frames, absent) = self.step(torch.full_like(frames[:, :, :1], self.fill), (frames, absent))
            outputs += [] if y is None else [y]
        return outputs

    def _emit(self, frames: Tensor, absent: int, after: int) -> tuple[Tensor | None, State]:
        """The window's output where it is full, and what stays of it; `after` frames behind `frames` don't count."""
        have = frames.shape[2]
        if absent + have + after < self.size:
            return None, (frames, absent)
        y = self.function(frames)
        left_out = self.window_stride - absent
        if left_out <= 0:
            return y, (frames, absent - self.window_stride)
        if left_out >= have:
            return y, (None, have - left_out)
        return y, (frames[:, :, left_out:], 0)


class SlidingMax(Stream):
    """The maximum over the last `frames` frames, those that there are, place by place.

    Time is cut into blocks of so many frames. A window is the end of one block and the beginning of the next:

        block   | a0  a1  a2  a3 | b0  b1  b2  b3 |
        window            [-------------]               max(max(a2, a3), max(b0, b1))

    The maxima of a block's beginnings come one by one with its frames, those of its ends all at once when it is full:
    in all three comparisons a frame, however long the window is, and none of them repeated from frame to frame.
    """

    def __init__(self, frames: int):
        self.frames = frames

    def timing(self, before: Timing) -> Timing:
        """See `Stream`."""
        return before.window(self.frames - 1, 0)

    def init_state(self) -> State:
        """Maxima of the ends of the last block, those still to be used; the block's frames; their maximum."""
        return (), (), None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Stream`."""
        ends, block, beginning = state
        beginning = x if beginning is None else torch.maximum(beginning, x)
        y = torch.maximum(ends[0], beginning) if ends else beginning
        block = (*block, x)
        if len(block) < self.frames:
            return y, (ends[1:], block, beginning)
        ends = []
        for frame in reversed(block[1:]):
            ends.append(torch.maximum(frame, ends[-1]) if ends else frame)
        return y, (tuple(reversed(ends)), (), None)


class Recent(Stream):
    """The mean or the maximum of the last `frames` frames, those that there are, computed anew each time.

    For things as small as spatial averages, where that costs nothing; nothing is ever taken away from a sum, so the
    mean doesn't drift.
    """

    def __init__(self, frames: int, mode: Literal["mean", "max"]):
        self.frames, self.mode = frames, mode

    def timing(self, before: Timing) -> Timing:
        """See `Stream`."""
        return before.window(self.frames - 1, 0)

    def init_state(self) -> State:
        """The last frames, filled up at their beginning; how many there are, for each of the batch."""
        return None

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """See `Stream`."""
        if state is None:
            fill = 0.0 if self.mode == "mean" else -torch.inf
            last = x.new_full((*x.shape[:2], self.frames, *x.shape[3:]), fill)
            seen = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        else:
            last, seen = state
        last = torch.cat((last[:, :, 1:], x), 2)
        seen = (seen + 1).clamp(max=self.frames)
        y = last.sum(2, keepdim=True) / per_stream(seen) if self.mode == "mean" else last.amax(2, keepdim=True)
        return y, (last, seen)


def joined(*frames: Tensor) -> Tensor:
    """One after another in time, in `torch.channels_last_3d`.

    `torch.cat` sees that layout only where no size is 1, and copies far slower where it does not.
    """
    return torch.cat([x.permute(0, 2, 3, 4, 1) for x in frames], 1).permute(0, 4, 1, 2, 3)


def per_stream(numbers: Tensor) -> Tensor:
    """`(N,)` -> `(N, 1, 1, 1, 1)`: a number for each stream of the batch, beside its frame."""
    return numbers.view(-1, 1, 1, 1, 1)


def sliding_max(x: Tensor, frames: int) -> Tensor:
    """The maximum over the last `frames` frames at each time of a clip `(N, C, T, H, W)`: `SlidingMax` on a clip.

    By doubling: from the maxima over 1 frame those over 2, over 4, and so on.
    """
    frames = min(frames, x.shape[2])
    span = 1
    while span < frames:
        shift = min(span, frames - span)
        x = torch.cat((x[:, :, :shift], torch.maximum(x[:, :, shift:], x[:, :, :-shift])), 2)
        span += shift
    return x


def sliding_mean(x: Tensor, frames: int) -> Tensor:
    """The mean over the last `frames` frames, those that there are, at each time of a clip `(N, C, T, H, W)`."""
    frames = min(frames, x.shape[2])
    sums = F.avg_pool3d(F.pad(x, (0, 0, 0, 0, frames - 1, 0)), (frames, 1, 1), 1, divisor_override=1)
    counts = torch.arange(1, x.shape[2] + 1, device=x.device).clamp(max=frames)
    return sums / counts.view(-1, 1, 1)


def map_state(function: Callable[..., Any], *states: State) -> State:
    """The state whose tensors are `function` of the tensors at the same place in `states`.

        on_gpu = map_state(lambda tensor: tensor.to("cuda"), state)

    Raises:
        StreamingError: The states are not alike.
    """
    first = states[0]
    if isinstance(first, Tensor) and all(isinstance(state, Tensor) for state in states):
        return function(*states)
    if isinstance(first, tuple) and all(isinstance(state, tuple) and len(state) == len(first) for state in states):
        return tuple(map_state(function, *parts) for parts in zip(*states, strict=True))
    if isinstance(first, Tensor | tuple) or any(state != first for state in states):
        raise _unlike()
    return first


def _unlike() -> StreamingError:
    return StreamingError(
        "these streams are not at the same point, so they can't run as one batch: stack those with equal state_layout"
    )


def state_layout(state: State) -> Hashable:
    """All of a state but its numbers and its batch: states with equal layouts can be stacked."""
    if isinstance(state, Tensor):
        return (*state.shape[1:], str(state.dtype), str(state.device))
    return tuple(map(state_layout, state)) if isinstance(state, tuple) else state


def stack_states(states: Sequence[State]) -> State:
    """The states of several streams as one state of their batch, in this order.

    Raises:
        StreamingError: They are not at the same point; see `state_layout`.
    """
    if len({state_layout(state) for state in states}) > 1:
        raise _unlike()
    return map_state(lambda *tensors: torch.cat(tensors), *states)


def split_state(state: State, sizes: Sequence[int] | None = None) -> list[State]:
    """The states of a batch's streams, each with its own memory: the inverse of `stack_states`.

    Args:
        state: of the batch.
        sizes: how many of the batch each state gets; by default one.
    """
    sizes = [1] * state_batch(state) if sizes is None else sizes
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        map_state(lambda tensor, start=start, size=size: tensor.narrow(0, start, size).clone(), state)
        for start, size in zip(starts, sizes, strict=True)
    ]


def state_batch(state: State) -> int:
    """The batch that a state is of; 0 where it has no tensors yet."""
    if isinstance(state, Tensor):
        return state.shape[0]
    return next((n for part in state if (n := state_batch(part))), 0) if isinstance(state, tuple) else 0
