"""What nets cost, side by side. Nothing is computed: they are counted on the meta device, see `lean3d.models.cost`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from lean3d.bench.nets import Net
from lean3d.blocks.counting import TILES
from lean3d.errors import ConfigError
from lean3d.models import Cost, cost
from lean3d.version import __version__


@dataclass(frozen=True)
class Measured:
    """A net and what it costs."""

    net: Net
    cost: Cost
    """On its clip."""

    def to_dict(self, layers: bool = False) -> dict[str, Any]:
        """As plain JSON data, with each layer where asked."""
        price = self.cost
        numbers = {"weights": price.weights, "macs": price.macs, "multiplications": price.multiplications}
        return {
            "name": self.net.name,
            "model": self.net.spec["name"],
            "arguments": self.net.spec["arguments"],
            "clip": list(self.net.clip),
            **numbers,
            **({"layers": [vars(layer) for layer in price.layers]} if layers else {}),
        }


def measure(nets: Sequence[Net], tiles: Sequence[int] = TILES) -> list[Measured]:
    """Count nets, each on its clip.

    Args:
        nets: See `lean3d.bench.nets.find_nets`.
        tiles: The m of the F(m, r) that convolutions may use, each above 1.
    """
    return [Measured(net, cost(net.build("meta"), net.clip, tiles=tiles)) for net in nets]


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
        _, _, frames, height, width = net.net.clip
        price = net.cost
        numbers = (price.weights / 1e6, price.macs / 1e9, price.multiplications / 1e9)
        table.add_row(net.net.name, f"{frames} x {height}x{width}", *(f"{number:.2f}" for number in numbers))
    return table


def ratio_table(nets: Sequence[Measured]) -> Table:
    """How many times less than the first net the others need."""
    first = nets[0].cost
    table = Table(f"fewer than {nets[0].net.name}", box=None, pad_edge=False, header_style="bold")
    for title in ("weights", "MACs", "its MACs / fast", "fast / fast"):
        table.add_column(title, justify="right", no_wrap=True)
    for net in nets[1:]:
        table.add_row(net.net.name, *(f"{ratio:.2f}x" for ratio in ratios(first, net.cost)))
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
