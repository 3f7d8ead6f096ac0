"""Weights of pytorchvideo's hub models, as models of the zoo.

    state = torch.load("SLOWFAST_8x8_R50.pyth", weights_only=True)
    model = from_pytorchvideo(state)

The nets are equal in eval mode. What the hub's model functions leave to their callers stays so: clips are normalised
with mean 0.45 and deviation 0.225, and SlowFast's slow pathway gets frames 0, alpha, 2 alpha, ... here, where
pytorchvideo's tutorial spreads them from the first to the last frame.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lean3d.errors import CheckpointError
from lean3d.models.registry import VideoNet, create_model

_SAME_WEIGHTS = {"x3d_m": ("x3d_m", "x3d_s", "x3d_xs")}

# our module -> theirs, tried in this order on what follows the block's place
_IN_BLOCK = (
    (r"shortcut\.conv", "branch1_conv"),
    (r"shortcut\.bn", "branch1_norm"),
    (r"shortcut", "branch1_conv"),
    (r"units\.1\.0\.conv", "branch2.conv_b.conv_t"),
    (r"units\.1\.0\.bn", "branch2.conv_b.norm"),
    (r"units\.1\.2\.conv", "branch2.conv_b.conv_xy"),
    (r"units\.1\.2\.bn", "branch2.norm_b"),
    (r"excite\.reduce", "branch2.norm_b.1.block.0"),
    (r"excite\.expand", "branch2.norm_b.1.block.2"),
    (r"units\.0\.(conv|bn)", r"branch2.\1_a"),
    (r"units\.1\.(conv|bn)", r"branch2.\1_b"),
    (r"units\.2\.(conv|bn)", r"branch2.\1_c"),
)
_AROUND = (
    (r"stem\.spatial", "blocks.0.conv.conv_t"),
    (r"stem\.temporal\.conv", "blocks.0.conv.conv_xy"),
    (r"stem\.temporal\.bn", "blocks.0.norm"),
    (r"stem\.slow\.", "blocks.0.multipathway_blocks.0."),
    (r"stem\.fast\.", "blocks.0.multipathway_blocks.1."),
    (r"stem\.lateral\.conv", "blocks.0.multipathway_fusion.conv_fast_to_slow"),
    (r"stem\.lateral\.", "blocks.0.multipathway_fusion."),
    (r"stem\.", "blocks.0."),
    (r"head\.widen\.conv", "blocks.{head}.pool.pre_conv"),
    (r"head\.widen\.bn", "blocks.{head}.pool.pre_norm"),
    (r"head\.hidden", "blocks.{head}.pool.post_conv"),
    (r"head\.linear", "blocks.{head}.proj"),
)


def pytorchvideo_names(model: VideoNet) -> dict[str, str]:
    """For each entry of a model's state dict, its name in pytorchvideo's model of the same kind."""
    kind, arguments = model.spec["name"], model.spec["arguments"]
    pooled = bool(arguments.get("temporal_pool"))
    head = len(model.stages) + (2 if pooled or kind.startswith("slowfast") else 1)  # the blocks before it

    def theirs(name: str) -> str:
        if lateral := re.fullmatch(r"stages\.(\d)\.lateral\.(\w+)\.(.+)", name):
            part = "conv_fast_to_slow" if lateral[2] == "conv" else "norm"
            return f"blocks.{int(lateral[1]) + 1}.multipathway_fusion.{part}.{lateral[3]}"
        if block := re.fullmatch(r"stages\.(\d)\.(?:(slow|fast)\.)?(\d+)\.(.+)", name):
            stage = int(block[1]) + (2 if pooled and block[1] != "0" else 1)
            way = {"slow": "multipathway_blocks.0.", "fast": "multipathway_blocks.1.", None: ""}[block[2]]
            inside = _renamed(block[4], _IN_BLOCK).replace("branch2.bn_", "branch2.norm_")
            if kind.startswith("x3d"):
                inside = inside.replace("norm_b.", "norm_b.0.") if "block" not in inside else inside
            return f"blocks.{stage}.{way}res_blocks.{block[3]}.{inside}"
        return _renamed(name, _AROUND).replace(".bn.", ".norm.").format(head=head)

    return {name: theirs(name) for name in model.state_dict()}


def from_pytorchvideo(state_dict: Mapping[str, Any], *, name: str | None = None) -> VideoNet:
    """A model of the zoo, in eval mode, with the weights of one of pytorchvideo's hub models.

    Known are c2d_r50, i3d_r50, slow_r50, slowfast_r50, x3d_xs, x3d_s, x3d_m, csn_r101 and r2plus1d_r50, of any number
    of classes.

    Args:
        state_dict: their state dict, or the file's content with the state dict under "model_state".
        name: which one, where several have the same weights: x3d_xs, x3d_s or x3d_m (the default).

    Raises:
        CheckpointError: The weights are of no such model.
    """
    state: Mapping[str, Tensor] = state_dict.get("model_state", state_dict)
    guess, arguments = _recognise(state)
    if name not in (None, *_SAME_WEIGHTS.get(guess, (guess,))):
        raise CheckpointError(f"these weights are of {guess}, not of {name}: leave the name away")
    with torch.device("meta"):  # fresh weights would be thrown away
        model = create_model(name or guess, **arguments)
    names = pytorchvideo_names(model)
    wanted = model.state_dict()
    missing = [theirs for theirs in names.values() if theirs not in state]
    unused = sorted(set(state) - set(names.values()))
    other = [theirs for ours, theirs in names.items() if theirs in state and state[theirs].shape != wanted[ours].shape]
    for problem, keys in (("lack", missing), ("have no place for", unused), ("have another shape of", other)):
        if keys:
            raise CheckpointError(
                f"taken for {guess} of pytorchvideo's hub, these weights {problem} {keys[0]} and {len(keys) - 1} more"
            )
    model.load_state_dict({ours: state[theirs].clone() for ours, theirs in names.items()}, assign=True)
    return model.eval()


def _recognise(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """The model of the zoo that has these weights, and its arguments."""
    classes = [value.shape[0] for key, value in state.items() if key.endswith(".proj.bias")]
    stem = [state[key] for key in _STEMS if key in state]
    if len(classes) != 1 or not stem:
        few = ", ".join(list(state)[:3]) or "none"
        raise CheckpointError(f"no classifier of pytorchvideo's hub in these weights; their first names are: {few}")
    arguments: dict[str, Any] = {"num_classes": classes[0], "in_channels": stem[0].shape[1]}
    if "blocks.0.multipathway_fusion.conv_fast_to_slow.weight" in state:
        lateral = state["blocks.0.multipathway_fusion.conv_fast_to_slow.weight"].shape[2]
        return "slowfast_r50" if lateral == 7 else "slowfast_r50_4x16", arguments
    if "blocks.0.conv.conv_t.weight" in state:
        return "x3d_m", arguments
    if "blocks.1.res_blocks.0.branch2.conv_b.conv_t.weight" in state:
        return "r2plus1d_r50", arguments
    if state["blocks.1.res_blocks.0.branch2.conv_b.weight"].shape[1] == 1:
        return "csn_r101" if any(key.startswith("blocks.3.res_blocks.6.") for key in state) else "csn_r50", arguments
    if not any(key.startswith("blocks.2.") for key in state):  # a pooling has no weights
        arguments["temporal_pool"] = True
    if stem[0].shape[2] == 5:
        return "i3d_r50", {"temporal_pool": False, **arguments}
    inflated = any(key.endswith("conv_a.weight") and value.shape[2] == 3 for key, value in state.items())
    return "slow_r50" if inflated else "c2d_r50", arguments


_STEMS = ("blocks.0.conv.weight", "blocks.0.conv.conv_t.weight", "blocks.0.multipathway_blocks.0.conv.weight")


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    """The name with the first entry of the table that its beginning matches."""
    for ours, theirs in table:
        if re.match(ours, name):
            return re.sub(f"^{ours}", theirs, name)
    return name
