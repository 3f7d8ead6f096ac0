"""Whole nets frame by frame, and the forms of nets that are made for it.

    model = create_model("c3d_light", causal=True)      # trained like any other
    stream = model.eval().stream()
    state = stream.init_state()
    for frame in frames:                                # (N, C, 1, H, W), normalised, N streams
        scores, state = stream.step(frame, state)       # (N, num_classes), or None between two results

A net's scores at a time are its head over the last `num_frames` frames' features, so those that a stream has after its
first `num_frames` frames (and its flush, where the net sees the future) are the clip net's on these frames.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lean3d.blocks import CausalConv3d, Chain, Conv3d, State, Stream, Timing, state_batch
from lean3d.errors import StreamingError

if TYPE_CHECKING:
    from lean3d.models.registry import VideoNet


class NetStream(Stream):
    """A net frame by frame; `VideoNet.stream` makes one.

    Args:
        net: in eval mode; it may be moved and loaded anew, but its layers must stay. Its weights are laid out anew in
            memory, channels last: a convolution of one frame would spend as long on that as on its arithmetic.

    Raises:
        StreamingError: The net has an operation over whole clips and not its windowed form.
    """

    period: int
    """Frames between two results: the net's stride in time."""
    delay: int
    """How many frames late a result is: 0 where it comes with the last of the `period` frames that are new in it."""
    window: int
    """Frames of features that the head averages: those of a clip of `num_frames`."""

    def __init__(self, net: VideoNet):
        name, num_frames = net.spec["name"], net.input_spec.num_frames
        try:
            body = Chain(net.stem, net.stages)
        except StreamingError as error:
            raise StreamingError(f"{name} can't run frame by frame as it is: {error}") from error
        features: Any = body.timing(Timing())
        timing: Timing = features[0] if isinstance(features, tuple) else features
        net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self.net, self.window = net, math.ceil(num_frames / timing.stride)
        self.chain = Chain(body, net.head.stream(self.window))  # type: ignore[operator]
        self.period = self.stride
        self.delay = max(0, self.lookahead - (self.period - 1))

    def timing(self, before: Any) -> Any:
        """See `Stream`."""
        return self.chain.timing(before)

    def init_state(self) -> State:
        """Height and width, once there was a frame; the state of the parts."""
        return (), self.chain.init_state()

    def step(self, x: Tensor, state: State) -> tuple[Tensor | None, State]:
        """The next frame of each stream of the batch.

        Args:
            x: `(N, C, 1, H, W)`, normalised as a clip's frames; N, H and W as in all frames before.
            state: of the frames before.

        Returns:
            Scores before the softmax `(N, num_classes)`, or None where no result is due; the state of the frames so
            far. The scores are those of the frames up to `lookahead` frames ago.

        Raises:
            StreamingError: The net is in training mode; the frame doesn't fit those before it.
            ConfigError: The frame is none for this net.
        """
        size, parts = state
        self._check(x, size, parts)
        with torch.inference_mode():
            y, parts = self.chain.step(x, parts)
        return y, (tuple(x.shape[3:]), parts)

    def flush(self, state: State) -> list[Tensor]:
        """The scores still to come if the stream ends here; the last ones are those of all its frames."""
        with torch.inference_mode():
            return self.chain.flush(state[1])

    def _check(self, x: Tensor, size: tuple[int, ...], parts: State) -> None:
        name = self.net.spec["name"]
        if self.net.training:
            raise StreamingError(f"{name} is in training mode, in which frames depend on each other: call model.eval()")
        self.net.check_input(x)
        batch = state_batch(parts)
        if x.shape[2] != 1:
            raise StreamingError(f"a stream takes one frame at a time, (N, C, 1, H, W); got {tuple(x.shape)}")
        if (size and size != x.shape[3:]) or (batch and batch != x.shape[0]):
            raise StreamingError(
                f"this state is of {batch} streams of {size[0]}x{size[1]} pixels, the frame of {x.shape[0]} of "
                f"{x.shape[3]}x{x.shape[4]}: begin with init_state(), or see stack_states and split_state"
            )


def limit_time(net: VideoNet, *, causal: bool) -> None:
    """Take over the last `num_frames` frames, at each time, what a net takes over whole clips.

    With `causal`, nothing sees the future either: convolutions and poolings are padded in the past only. Names and
    shapes of parameters stay.

    Args:
        net: changed in place.
        causal: whether the future is out of reach too.
    """
    limited = [module for module in net.modules() if hasattr(module, "limit_time")]
    for module, frames in _frames_at(net, limited):
        module.limit_time(frames, causal=causal)  # type: ignore[operator]
    if causal:
        for parent in list(net.modules()):
            for name, child in parent.named_children():
                if type(child) is Conv3d:
                    setattr(parent, name, CausalConv3d.of(child))


def _frames_at(net: VideoNet, modules: list[nn.Module]) -> list[tuple[nn.Module, int]]:
    """How many frames of a clip arrive at each of the modules: seen by a pass on the meta device."""
    found: list[tuple[nn.Module, int]] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: found.append((module, args[0].shape[2])))
        for module in modules
    ]
    tensors = itertools.chain(net.named_parameters(), net.named_buffers())
    shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    spec, training = net.input_spec, net.training
    functional_call(net.eval(), shapes, torch.empty(1, spec.channels, spec.num_frames, *spec.size, device="meta"))
    net.train(training)
    for hook in hooks:
        hook.remove()
    return found
