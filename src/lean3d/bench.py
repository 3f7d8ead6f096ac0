"""What nets cost, side by side.

    names, patterns, runs -> Net (a model's spec) -> Measured (its cost on a clip) -> tables, or one line of JSON

Nothing is computed: nets are counted on the meta device, see `lean3d.models.cost`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lean3d import checkpoint
from lean3d.blocks.counting import TILES
from lean3d.errors import ConfigError, UnknownModelError, did_you_mean
from lean3d.models import Cost, cost, create_model, list_models
from lean3d.version import __version__


@dataclass(frozen=True)
class Measured:
    """A net and what it costs."""

    name: str
    """As it was asked for: a model's name, or a path."""
    spec: dict[str, Any]
    """What it takes to build it."""
    clip: tuple[int, ...]
    """(1, C, T, H, W)."""
    cost: Cost
    """On that clip."""

    def to_dict(self, layers: bool = False) -> dict[str, Any]:
        """As plain JSON data, with each layer where asked."""
        price = self.cost
        numbers = {"weights": price.weights, "macs": price.macs, "multiplications": price.multiplications}
        return {
            "name": self.name,
            "model": self.spec["name"],
            "arguments": self.spec["arguments"],
            "clip": list(self.clip),
            **numbers,
            **({"layers": [vars(layer) for layer in price.layers]} if layers else {}),
        }


def measure(
    nets: Sequence[str],
    *,
    tiles: Sequence[int] = TILES,
    num_frames: int | None = None,
    size: tuple[int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[Measured]:
    """Count nets, each on one clip.

    Args:
        nets: Names or patterns of models, run folders, checkpoints.
        tiles: The m of the F(m, r) that convolutions may use, each above 1.
        num_frames: Frames in the clip; default: the net's.
        size: Its height and width; default: the net's.
        options: Further arguments of the models' functions.

    Raises:
        ConfigError: No net is named, or a model has no such argument.
        UnknownModelError: A name that is no model, no pattern of models and no path.
        CheckpointError: A path at which no model is.
    """
    if not nets:
        raise ConfigError(
            "which net? Name a model, a pattern, a run or a checkpoint: lean3d bench c3d c3d_light --cost"
        )
    found = []
    for name, spec in (net for word in nets for net in _specs(word)):
        arguments = {**spec["arguments"], **(options or {})}
        if num_frames is not None:
            arguments["num_frames"] = num_frames
        with torch.device("meta"):
            model = create_model(
                spec["name"], size=size or spec["size"], sampling_rate=spec["sampling_rate"], **arguments
            )
        want = model.input_spec
        clip = (1, want.channels, want.num_frames, *want.size)
        found.append(Measured(name, model.spec, clip, cost(model, clip, tiles=tiles)))
    return found


def _specs(word: str) -> list[tuple[str, dict[str, Any]]]:
    """The nets that a word names, with their specs."""
    models = list_models(word)
    if models:
        return [(name, {"name": name, "arguments": {}, "size": None, "sampling_rate": None}) for name in models]
    if Path(word).exists() or word.endswith(".safetensors"):
        return [(word, checkpoint.load(word).model.spec)]
    raise UnknownModelError(
        f"{word!r} is neither a model ({did_you_mean(word, list_models())}) nor a run or checkpoint that exists"
    )


def parse_tiles(text: str) -> tuple[int, ...]:
    """ "2,4" -> (2, 4).

    Raises:
        ConfigError: Not whole numbers above 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 1 for part in parts):
        raise ConfigError(f"--tiles are the m of F(m, r), whole numbers above 1 with commas, such as 2,4; got {text!r}")
    return tuple(map(int, parts))


def cost_table(nets: Sequence[Measured]) -> Table:
    """A row a net: weights in millions, the others in billions."""
    table = Table("net", "clip", box=None, pad_edge=False, header_style="bold")
    for title in ("weights (M)", "GMACs", "fast (G)"):
        table.add_column(title, justify="right", no_wrap=True)
    for net in nets:
        _, _, frames, height, width = net.clip
        price = net.cost
        numbers = (price.weights / 1e6, price.macs / 1e9, price.multiplications / 1e9)
        table.add_row(net.name, f"{frames} x {height}x{width}", *(f"{number:.2f}" for number in numbers))
    return table


def ratio_table(nets: Sequence[Measured]) -> Table:
    """How many times less than the first net the others need."""
    first = nets[0].cost
    table = Table(f"fewer than {nets[0].name}", box=None, pad_edge=False, header_style="bold")
    for title in ("weights", "MACs", "its MACs / fast", "fast / fast"):
        table.add_column(title, justify="right", no_wrap=True)
    for net in nets[1:]:
        table.add_row(net.name, *(f"{ratio:.2f}x" for ratio in ratios(first, net.cost)))
    return table


def ratios(full: Cost, light: Cost) -> tuple[float, float, float, float]:
    """How many times less `light` needs than `full`.

    Returns:
        Weights; MACs; full's MACs by light's multiplications under the fast algorithm; multiplications under the fast
        algorithm on both sides.
    """
    return (
        full.weights / light.weights,
        full.macs / light.macs,
        full.macs / light.multiplications,
        full.multiplications / light.multiplications,
    )


def to_json(nets: Sequence[Measured], tiles: Sequence[int], *, layers: bool = False) -> str:
    """All nets as one line."""
    versions = {"lean3d": __version__, "torch": torch.__version__}
    content = {"bench": "cost", "tiles": list(tiles), "nets": [net.to_dict(layers) for net in nets], **versions}
    return json.dumps(content)
