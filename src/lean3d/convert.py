"""Weights that others published, as a checkpoint of lean3d.

What a file of weights doesn't say is the clip that its net was trained on, how pixels were normalised, and what the
classes are called. The normalisation is that of the published code; the clip and the names are yours to give.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lean3d.checkpoint import load_pickle, read_file, save_model
from lean3d.errors import CheckpointError, ConfigError
from lean3d.models import VideoNet, from_pytorchvideo, model_from_spec
from lean3d.models.weights_smallbig import from_smallbig

Source = Literal["smallbig", "pytorchvideo"]

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_KINETICS = ((0.45, 0.45, 0.45), (0.225, 0.225, 0.225))


@dataclass(frozen=True)
class Conversion:
    """What `run` found and wrote."""

    path: Path
    """The checkpoint."""
    model: VideoNet
    """In eval mode."""
    classes: tuple[str, ...]
    """The label of each output."""

    def __str__(self) -> str:
        spec = self.model.input_spec
        return (
            f"{self.model.spec['name']}, {len(self.classes)} classes, {spec.num_frames} frames {spec.sampling_rate} "
            f"apart of {spec.size[0]} x {spec.size[1]} pixels"
        )


def run(
    source: Source,
    file: str | Path,
    *,
    out: str | Path | None = None,
    model: str | None = None,
    num_frames: int | None = None,
    sampling_rate: int | None = None,
    labels: str | Path | None = None,
) -> Conversion:
    """Find out which net weights are of, and write it as a checkpoint that eval, predict and train take.

    Args:
        source: Who published the code that saved the file.
        file: `.safetensors`, or what `torch.save` wrote: a state dict, or a checkpoint that holds one. Pickles are
            read with `weights_only=True`: no code in them runs.
        out: The checkpoint to write; default: beside the file, under its name with `.lean3d.safetensors`.
        model: Which model it is, where several have the same weights (x3d_xs, x3d_s, x3d_m).
        num_frames, sampling_rate: The clip that the net was trained on; default: the model's own.
        labels: A file with the classes' names, see `read_labels`; default: their numbers, "0", "1", ..., as lists that
            number their classes have them.

    Raises:
        CheckpointError: The file is missing, damaged, or of none of the source's models.
        ConfigError: There are not as many labels as classes, or `out` would not be a safetensors file.
    """
    file = Path(file)
    out = file.with_name(f"{file.name.split('.')[0]}.lean3d.safetensors") if out is None else Path(out)
    if out.suffix != ".safetensors" or out.resolve() == file.resolve():
        raise ConfigError(f"the checkpoint must be another file that ends in .safetensors, got --out {out}")
    read, (mean, std) = _SOURCES[source]
    net = _for_clips(read(_state_dict(file), model), num_frames, sampling_rate)
    if net.input_spec.channels == len(mean):
        net.input_spec = dataclasses.replace(net.input_spec, mean=mean, std=std)
    count = net.head.linear.out_features  # type: ignore[union-attr]
    classes = tuple(map(str, range(count))) if labels is None else read_labels(labels)  # type: ignore[arg-type]
    if len(classes) != count:
        raise ConfigError(f"{labels} has {len(classes)} names; {net.spec['name']} in {file} has {count} classes")
    return Conversion(save_model(out, net, classes, {}), net, classes)


def read_labels(path: str | Path) -> tuple[str, ...]:
    """The names of classes in their order.

    Args:
        path: Text with a name in each line, or JSON: a list of names, an object of names with numbers (as
            Something-Something and pytorchvideo have it), or of numbers with names.

    Raises:
        ConfigError: The file is missing or damaged, or names come twice.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _json_names(json.loads(text)) if path.suffix == ".json" else text.splitlines()
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--labels {path} holds no names of classes, one a line or as JSON: {error}") from error
    names = [name.strip().strip('"') for name in names if name.strip()]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"--labels {path} has {twice[0]!r} twice; classes need different names")
    return tuple(names)


def _json_names(content: Any) -> list[str]:
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return content
    if not isinstance(content, dict):
        raise ValueError("expected a list, or an object of names and numbers")
    if not all(re.fullmatch(r"\d+", str(number)) for number in content.values()):
        content = {name: number for number, name in content.items()}
    numbers = {int(number): name for name, number in content.items()}
    if sorted(numbers) != list(range(len(content))):
        raise ValueError(f"its numbers are not 0 to {len(content) - 1}")
    return [numbers[number] for number in range(len(content))]


def _state_dict(file: Path) -> dict[str, Tensor]:
    """The tensors in a file, unwrapped."""
    if file.suffix == ".safetensors":
        header, tensors = read_file(file)
        if header is not None:
            raise CheckpointError(f"{file} is a checkpoint of lean3d already: lean3d eval {file}")
        return tensors
    content: Mapping[str, Any] = load_pickle(file)
    for key in ("state_dict", "model_state"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _smallbig(state: dict[str, Tensor], model: str | None) -> VideoNet:
    found = from_smallbig(state)
    if model not in (None, found.spec["name"]):
        raise CheckpointError(f"these weights are of {found.spec['name']}, not of {model}: leave --model away")
    return found


def _pytorchvideo(state: dict[str, Tensor], model: str | None) -> VideoNet:
    return from_pytorchvideo(state, name=model)


_Reader = Callable[[dict[str, Tensor], str | None], VideoNet]
_Normalisation = tuple[tuple[float, ...], tuple[float, ...]]
_SOURCES: dict[Source, tuple[_Reader, _Normalisation]] = {
    "smallbig": (_smallbig, _IMAGENET),
    "pytorchvideo": (_pytorchvideo, _KINETICS),
}
"""How the weights of each source are read, and the mean and deviation of its code's pixels."""


def _for_clips(model: VideoNet, num_frames: int | None, sampling_rate: int | None) -> VideoNet:
    """The model with another clip in its spec; clips leave no trace in the weights."""
    spec = model.spec
    arguments = {**spec["arguments"], **({"num_frames": num_frames} if num_frames is not None else {})}
    with torch.device("meta"):
        twin = model_from_spec(
            {**spec, "arguments": arguments, "sampling_rate": sampling_rate or spec["sampling_rate"]}
        )
    twin.load_state_dict(model.state_dict(), assign=True)
    return twin.eval()
