"""Names of models and what they stand for.

A variant is one decorated, keyword-only function, named as users type it:

    @register_model(sampling_rate=2, size=112)
    def c3d(*, num_classes=400, num_frames=16, in_channels=3, width=1.0, dropout=0.5) -> VideoNet: ...

`create_model("c3d", width=0.5)` calls it and writes down on the model what it takes to build it again.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lean3d.blocks import Streaming
from lean3d.config import WHOLE_FRAME, InputSpec, ModelConfig, Region
from lean3d.errors import ConfigError, UnknownModelError, did_you_mean
from lean3d.models.streaming import NetStream, limit_time


class VideoNet(Streaming, nn.Module):
    """A clip goes through stem, stages and head; every model of the zoo is one.

    Args:
        stem: `(N, in_channels, T, H, W)` -> features.
        stages: features -> features, in order; staged fine-tuning unfreezes them from the last to the first.
        head: features -> `(N, num_classes)`; its `linear` is the classifier.
    """

    spec: dict[str, Any]
    """What `model_from_spec` needs to build the model again, as plain JSON data."""
    input_spec: InputSpec
    """The clip that the model wants."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], head: nn.Module):
        super().__init__()
        self.stem = stem
        self.stages = nn.Sequential(*stages)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """A normalised clip `(N, C, T, H, W)` -> class scores before the softmax, `(N, num_classes)`."""
        self.check_input(x)
        return self.head(self.stages(self.stem(x)))

    def stream(self) -> NetStream:
        """The net frame by frame; see `lean3d.models.streaming`.

        Raises:
            StreamingError: It has an operation over whole clips and not its windowed form.
        """
        return NetStream(self)

    def check_input(self, x: Tensor) -> None:
        """Refuse anything but `(N, C, T, H, W)` with this model's C.

        Raises:
            ConfigError: Says what came and what is accepted.
        """
        channels = self.input_spec.channels
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            hint = "; put a single clip in a batch with clip[None]" if x.ndim == 4 else ""
            raise ConfigError(f"{self.spec['name']} takes clips (N, {channels}, T, H, W), got {tuple(x.shape)}{hint}")


@dataclass(frozen=True)
class _Entry:
    build: Callable[..., VideoNet]
    sampling_rate: int
    size: tuple[int, int]


_MODELS: dict[str, _Entry] = {}
_TIME_FORMS = {"windowed": False, "causal": False}


def register_model(*, sampling_rate: int, size: int) -> Callable[[Callable[..., VideoNet]], Callable[..., VideoNet]]:
    """Register a function as a model under its own name.

    Args:
        sampling_rate: the distance of frames that the model is meant for.
        size: the height and width that the model is meant for.
    """

    def add(build: Callable[..., VideoNet]) -> Callable[..., VideoNet]:
        name = build.__name__
        if name in _MODELS:
            raise ConfigError(f"a model named {name} is registered already")
        _MODELS[name] = _Entry(build, sampling_rate, (size, size))
        return build

    return add


def list_models(pattern: str = "*") -> list[str]:
    """Names of all models that match a pattern, such as ``"smallbig*"``, sorted."""
    return sorted(fnmatch.filter(_MODELS, pattern))


def model_arguments(name: str) -> dict[str, Any]:
    """The arguments of a model's function, and those that every model has for streams, with their defaults."""
    own = {p.name: p.default for p in inspect.signature(_entry(name).build).parameters.values()}
    return {**own, **_TIME_FORMS}


def model_summary(name: str) -> str:
    """The first line of a model's description."""
    return inspect.getdoc(_entry(name).build).splitlines()[0]  # type: ignore[union-attr]


def create_model(
    name: str,
    *,
    size: int | tuple[int, int] | None = None,
    sampling_rate: int | None = None,
    region: Region | None = None,
    **arguments: Any,
) -> VideoNet:
    """Build a model of the zoo with fresh weights.

    Args:
        name: a name from `list_models()`.
        size: height and width of the clips it will get (one number for both); any other size still works.
        sampling_rate: distance of the frames of the clips it will get.
        region: the part of a video's frames that it will see, see `InputSpec` (default: all).
        arguments: the model's own: num_classes, num_frames, in_channels, width, dropout, ...; and two for nets that
            run on streams, with parameters of the same names and shapes. windowed: what is taken over the whole clip
            is taken, at each time, over the last num_frames frames. causal: that, and no frame sees a later one
            (frames of a group that a stride makes one see each other).

    Raises:
        UnknownModelError: Names the nearest models.
        ConfigError: An unknown argument; names those that the model takes.
    """
    entry = _entry(name)
    accepted = model_arguments(name)
    for argument in arguments:
        if argument not in accepted:
            known = [*accepted, "size", "sampling_rate", "region"]
            raise ConfigError(f"{name} has no argument {argument!r}: {did_you_mean(argument, known)}")
    arguments = {**accepted, **arguments}
    model = entry.build(**{key: value for key, value in arguments.items() if key not in _TIME_FORMS})
    height, width = (size, size) if isinstance(size, int) else size or entry.size
    channels = arguments["in_channels"]
    model.input_spec = InputSpec(
        num_frames=arguments["num_frames"],
        sampling_rate=sampling_rate or entry.sampling_rate,
        size=(height, width),
        region=region or WHOLE_FRAME,
        channels=channels,
        mean=(0.45,) * channels,
        std=(0.225,) * channels,
    )
    model.spec = {
        "name": name,
        "arguments": arguments,
        "size": [height, width],
        "sampling_rate": model.input_spec.sampling_rate,
        "region": list(model.input_spec.region),
    }
    if arguments["windowed"] or arguments["causal"]:
        limit_time(model, causal=arguments["causal"])
    return model


def model_from_spec(spec: dict[str, Any]) -> VideoNet:
    """The model that `model.spec` was taken from, with fresh weights."""
    return create_model(
        spec["name"],
        size=tuple(spec["size"]),
        sampling_rate=spec["sampling_rate"],
        region=tuple(spec.get("region", WHOLE_FRAME)),  # a spec from before there were regions has none
        **spec["arguments"],
    )


def model_from_config(config: ModelConfig, num_classes: int) -> VideoNet:
    """The model that a training's settings describe."""
    named = {
        "num_frames": config.num_frames,
        "in_channels": config.in_channels,
        "width": config.width,
        "dropout": config.dropout,
    }
    arguments = {key: value for key, value in named.items() if value is not None}
    return create_model(
        config.name,
        size=config.size,
        sampling_rate=config.sampling_rate,
        region=config.region,
        num_classes=num_classes,
        **{**arguments, **config.options},
    )


def scaled(channels: int, width: float) -> int:
    """A channel count times the width multiplier, a multiple of 8 where there are that many."""
    if width <= 0:
        raise ConfigError(f"width must be above 0, got {width}")
    if width == 1:
        return channels
    exact = channels * width
    return max(1, round(exact)) if exact < 8 else round(exact / 8) * 8


def _entry(name: str) -> _Entry:
    if name not in _MODELS:
        raise UnknownModelError(f"no model {name!r}: {did_you_mean(name, _MODELS)} (all of them: `lean3d models`)")
    return _MODELS[name]
