"""Weights that the code published with SmallBigNet saved, as models of the zoo.

    state = torch.load("best.pth", map_location="cpu", weights_only=True)
    model = from_smallbig(state)

The nets are equal in eval mode, at the clip length that the published net was built for. It can't take another one;
ours can.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lean3d.errors import CheckpointError
from lean3d.models.registry import VideoNet, create_model

PUBLISHED_NAMES = {
    "c2d_r50": "res50",
    "slow_r50": "slowonly50",
    "slow_r50_extra": "slowonly50_extra",
    "smallbig23": "smallbig23_no_extra",
    "smallbig50": "smallbig50_no_extra",
    "smallbig50_extra": "smallbig50_extra",
    "smallbig101": "smallbig101_no_extra",
}
"""Our names of the published code's seven models, and its own."""

# blocks in res2 to res5, SmallBig units, attention, first kernel's length in time in res5
_KINDS: dict[tuple[tuple[int, ...], bool, bool, int], str] = {
    ((3, 4, 6, 3), False, False, 1): "c2d_r50",
    ((3, 4, 6, 3), False, False, 3): "slow_r50",
    ((3, 4, 6, 3), False, True, 3): "slow_r50_extra",
    ((1, 2, 3, 1), True, False, 1): "smallbig23",
    ((3, 4, 6, 3), True, False, 1): "smallbig50",
    ((3, 4, 6, 3), True, True, 1): "smallbig50_extra",
    ((3, 4, 23, 3), True, False, 1): "smallbig101",
}

# ours -> theirs, of a block's parts
_IN_BLOCK = {
    "before.reduce": "big4_1",
    "before.expand.conv": "big4_2.0",
    "before.expand.bn": "big4_2.1",
    "shortcut.conv": "downsample.0",
    "shortcut.bn": "downsample.1",
    **{f"units.{i}.conv": f"conv{i + 1}" for i in range(3)},
    **{f"units.{i}.bn": f"bn{i + 1}" for i in range(3)},
    **{f"units.{i}.big_bn": f"big{i + 1}.1" for i in range(3)},
}
_AROUND = {"stem.conv": "conv1", "stem.bn": "bn1", "head.linear": "fc"}


def from_smallbig(state_dict: Mapping[str, Any], *, num_frames: int = 8) -> VideoNet:
    """The model of the zoo, in eval mode, that the published code's weights belong to.

    Args:
        state_dict: as in `convert_smallbig`.
        num_frames: frames in a clip; they leave no trace in the weights.

    Raises:
        CheckpointError: See `convert_smallbig`.
    """
    name, converted = convert_smallbig(state_dict)
    model = create_model(name, num_classes=len(converted["head.linear.bias"]), num_frames=num_frames)
    model.load_state_dict(converted)
    return model.eval()


def convert_smallbig(state_dict: Mapping[str, Any], name: str | None = None) -> tuple[str, dict[str, Tensor]]:
    """Find out which of the published code's seven models weights are of, and give them our names.

    Args:
        state_dict: what the published code saved: a state dict, or a checkpoint that has one under "state_dict"; a
            `module.` in front of all names is fine.
        name: our name of the model that it must be; by default it is found from the entries.

    Returns:
        Our name of the model, and its state dict.

    Raises:
        CheckpointError: These are not weights of one of the seven models, or not of `name`.
    """
    inner = state_dict.get("state_dict", state_dict)
    source: dict[str, Tensor] = {key.removeprefix("module."): value for key, value in inner.items()}
    found = _kind(source)
    if found is None:
        few = ", ".join(list(source)[:3]) or "none"
        raise CheckpointError(
            "these are not weights of one of the published SmallBigNet's models "
            f"({', '.join(PUBLISHED_NAMES.values())}); their first entries are: {few}"
        )
    if name not in (None, found):
        raise CheckpointError(f"these are weights of {PUBLISHED_NAMES[found]}, our {found}, not of {name}")
    classes = source.get("fc.bias")
    if classes is None:
        raise CheckpointError(f"these weights of {found} have no classifier (fc): it was built with --feat")
    with torch.device("meta"):
        model = create_model(found, num_classes=len(classes))
    names = smallbig_names(model)
    shapes = model.state_dict()
    missing = [theirs for theirs in names.values() if theirs not in source]
    unexpected = sorted(source.keys() - set(names.values()))
    if missing or unexpected:
        raise CheckpointError(
            f"weights of {found} must have just its entries; missing: {', '.join(missing[:3]) or 'none'}; "
            f"unexpected: {', '.join(unexpected[:3]) or 'none'}"
        )
    for ours, theirs in names.items():
        if source[theirs].shape != shapes[ours].shape:
            raise CheckpointError(
                f"{theirs} has the shape {tuple(source[theirs].shape)}; {found} needs {tuple(shapes[ours].shape)}"
            )
    return found, {ours: source[theirs] for ours, theirs in names.items()}


def smallbig_names(model: VideoNet) -> dict[str, str]:
    """For each entry of a model's state dict, its name in the published code."""
    names = {}
    for ours in model.state_dict():
        module, _, entry = ours.rpartition(".")
        match = re.fullmatch(r"stages\.(\d)\.(\d+)\.(.+)", module)
        if match:
            stage, block, part = match.groups()
            names[ours] = f"layer{int(stage) + 1}.{block}.{_IN_BLOCK[part]}.{entry}"
        else:
            names[ours] = f"{_AROUND[module]}.{entry}"
    return names


def _kind(source: Mapping[str, Tensor]) -> str | None:
    blocks = [
        {int(match[1]) for key in source if (match := re.match(rf"layer{stage}\.(\d+)\.conv1\.weight", key))}
        for stage in (1, 2, 3, 4)
    ]
    first = source.get("layer4.0.conv1.weight")
    if first is None or first.ndim != 5:
        return None
    big, extra = "layer4.0.big1.1.weight" in source, "layer4.0.big4_1.weight" in source
    return _KINDS.get((tuple(map(len, blocks)), big, extra, first.shape[2]))
