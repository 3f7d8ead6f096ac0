"""Initial weights from a 2D ResNet that was trained on pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lean3d.errors import ConfigError

_BLOCK_KEY = re.compile(r"layer(\d+)\.(\d+)\.(?:(conv|bn)(\d)|downsample\.([01]))\.(.+)")
_DEEP_STEM = re.compile(r"conv1\.\d")
_OTHER_SHORTCUT = re.compile(r"layer\d+\.\d+\.downsample\.[2-9]\.")


@dataclass(frozen=True)
class LoadReport:
    """What `load_2d_weights` did; `print` shows it in a line."""

    loaded: tuple[str, ...]
    """Entries of the model that now have the 2D net's values."""
    fresh: tuple[str, ...]
    """Entries of the model that the 2D net has no counterpart for, or whose classes differ: left as they were."""
    unexpected: tuple[str, ...]
    """Entries of the 2D net that the model has no place for."""

    def __str__(self) -> str:
        def some(names: tuple[str, ...]) -> str:
            return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""

        return (
            f"{len(self.loaded)} entries loaded, {len(self.fresh)} left fresh{some(self.fresh)}, "
            f"{len(self.unexpected)} not used{some(self.unexpected)}"
        )


def load_2d_weights(model: nn.Module, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """Start a residual net from a 2D ResNet of the same depth and width.

    A kernel that is K frames long gets the 2D kernel divided by K in each of them, so that it sums to the 2D kernel
    (Carreira & Zisserman, arXiv 1705.07750). What the 2D net doesn't have stays as it is: SmallBig's big BNs at zero,
    so that such a net starts as the 2D net on every frame. A net for grey clips gets the sum over the colours. The
    classifier is taken where it has as many classes.

    Args:
        model: a residual net of the zoo; changed in place.
        state_dict: of torchvision's or timm's resnet18 to resnet152, a `module.` in front of all names is fine.

    Raises:
        ConfigError: The 2D net has another depth or width or a stem of several convolutions, or the model doesn't have
            its convolutions. The model is unchanged then.
    """
    source = {name.removeprefix("module."): value for name, value in state_dict.items()}
    name = getattr(model, "spec", {}).get("name", type(model).__name__)
    if any(_DEEP_STEM.match(key) or _OTHER_SHORTCUT.match(key) for key in source):
        raise ConfigError(
            "these weights are of a ResNet with a deep stem or pooled shortcuts (timm's resnet50d and the like), which "
            f"{name} doesn't have: take those of a plain one, such as resnet50"
        )
    target = model.state_dict()
    names = {key: _ours(key) for key in source}
    theirs, ours = _depths(key for key in names.values() if key), _depths(target)
    if not ours:
        raise ConfigError(f"{name} doesn't have the convolutions of a ResNet: weights of a 2D one don't fit it")
    if not theirs:
        few = ", ".join(list(source)[:3]) or "none"
        raise ConfigError(f"no ResNet in these weights: expected names such as layer1.0.conv1.weight, got {few}")
    if theirs != ours:
        raise ConfigError(
            f"these weights are of a ResNet with {_describe(theirs)}; {name} has {_describe(ours)}: "
            "take those of the ResNet of its depth"
        )

    values: dict[str, Tensor] = {}
    unexpected = []
    for key, value in source.items():
        place = names[key]
        if place not in target:
            unexpected.append(key)
            continue
        fitted = _inflate(value, target[place].shape)
        if fitted is not None:
            values[place] = fitted
        elif not place.startswith("head."):
            raise ConfigError(
                f"{key} has the shape {tuple(value.shape)}, which doesn't fit {name}'s {place}, "
                f"{tuple(target[place].shape)}: width must be 1 and the kernel's height and width the same"
            )
    if values.keys() & {"head.linear.weight", "head.linear.bias"} != {"head.linear.weight", "head.linear.bias"}:
        values = {key: value for key, value in values.items() if not key.startswith("head.")}
    with torch.no_grad():
        for key, value in values.items():
            target[key].copy_(value)
    return LoadReport(tuple(values), tuple(key for key in target if key not in values), tuple(unexpected))


def _ours(key: str) -> str | None:
    """A 2D net's name in our nets, None where there is none."""
    head, _, rest = key.partition(".")
    if head in ("conv1", "bn1"):
        return f"stem.{head[:-1]}.{rest}"
    if head == "fc":
        return f"head.linear.{rest}"
    match = _BLOCK_KEY.fullmatch(key)
    if match is None:
        return None
    layer, block, part, unit, shortcut, rest = match.groups()
    inside = f"units.{int(unit) - 1}.{part}" if part else f"shortcut.{('conv', 'bn')[int(shortcut)]}"
    return f"stages.{int(layer) - 1}.{block}.{inside}.{rest}"


def _depths(keys: Iterable[str]) -> tuple[tuple[int, int], ...]:
    """Of each stage the number of blocks and of convolutions in a block."""
    found: dict[int, set[tuple[int, int]]] = {}
    for key in keys:
        match = re.match(r"stages\.(\d+)\.(\d+)\.units\.(\d+)\.conv\.weight", key)
        if match:
            stage, block, unit = map(int, match.groups())
            found.setdefault(stage, set()).add((block, unit))
    return tuple((len({b for b, _ in found[s]}), len({u for _, u in found[s]})) for s in sorted(found))


def _describe(depths: tuple[tuple[int, int], ...]) -> str:
    blocks = ", ".join(str(blocks) for blocks, _ in depths)
    return f"{blocks} blocks of {depths[0][1]} convolutions"


def _inflate(value: Tensor, shape: torch.Size) -> Tensor | None:
    """A 2D net's value in a 3D net's shape, None if it doesn't fit."""
    if value.ndim == 4 and len(shape) == 5:
        if shape[1] == 1 and value.shape[1] == 3:
            value = value.sum(1, keepdim=True)
        value = value.unsqueeze(2).expand(-1, -1, shape[2], -1, -1) / shape[2]
    return value if value.shape == shape else None
