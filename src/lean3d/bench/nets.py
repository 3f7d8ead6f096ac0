"""The nets that a user's words name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lean3d import checkpoint
from lean3d.errors import ConfigError, UnknownModelError, did_you_mean
from lean3d.models import VideoNet, create_model, list_models, model_from_spec


@dataclass(frozen=True)
class Net:
    """A net that is to be looked at."""

    name: str
    """As it was asked for: a model's name, or a path."""
    spec: dict[str, Any]
    """What it takes to build it."""
    clip: tuple[int, ...]
    """(1, C, T, H, W)."""
    weights: Path | None
    """The run or checkpoint whose weights it has; None for a model of the zoo."""

    def build(self, device: str = "cpu") -> VideoNet:
        """The net with fresh weights, on a device such as "cpu" or "meta"."""
        with torch.device(device):
            return model_from_spec(self.spec)


def find_nets(
    words: Sequence[str],
    *,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Net]:
    """The nets that words name, each with one clip.

    Args:
        words: Names or patterns of models, run folders, checkpoints.
        num_frames: Frames in the clip; default: the net's.
        size: Its height and width; default: the net's.
        options: Further arguments of the models' functions.

    Raises:
        ConfigError: No net is named, or a model has no such argument.
        UnknownModelError: A name that is no model, no pattern of models and no path.
        CheckpointError: A path at which no model is.
    """
    if not words:
        raise ConfigError("which net? Name a model, a pattern, a run or a checkpoint: lean3d bench c3d c3d_light")
    found = []
    for name, spec, weights in (net for word in words for net in _specs(word)):
        arguments = {**spec["arguments"], **(options or {})}
        if num_frames is not None:
            arguments["num_frames"] = num_frames
        with torch.device("meta"):
            model = create_model(
                spec["name"], size=size or spec["size"], sampling_rate=spec["sampling_rate"], **arguments
            )
        want = model.input_spec
        found.append(Net(name, model.spec, (1, want.channels, want.num_frames, *want.size), weights))
    return found


def _specs(word: str) -> list[tuple[str, dict[str, Any], Path | None]]:
    """The nets that a word names, with their specs and, of trained ones, where their weights are."""
    models = list_models(word)
    if models:
        return [(name, {"name": name, "arguments": {}, "size": None, "sampling_rate": None}, None) for name in models]
    if Path(word).exists() or word.endswith(".safetensors"):
        return [(word, checkpoint.load(word).model.spec, Path(word))]
    raise UnknownModelError(
        f"{word!r} is neither a model ({did_you_mean(word, list_models())}) nor a run or checkpoint that exists"
    )
