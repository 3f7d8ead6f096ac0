"""What a model of the zoo costs on the clip that it is meant for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lean3d.blocks.counting import TILES, Cost, LayerCost, count
from lean3d.errors import ConfigError
from lean3d.models.registry import VideoNet

__all__ = ["Cost", "LayerCost", "cost"]


def cost(model: nn.Module, input_shape: Sequence[int] | None = None, *, tiles: Sequence[int] = TILES) -> Cost:
    """Weights, multiply-accumulates, and multiplications under the hybrid fast algorithm (arXiv 1905.13388).

    The model may be on any device, the meta device included: `with torch.device("meta")` around `create_model` makes
    a model that costs no memory and is counted in a moment.

    Args:
        model: a model of the zoo, or any module that takes one tensor.
        input_shape: of its input, such as (1, 3, 16, 112, 112); by default one clip as the model wants it.
        tiles: the m of the F(m, r) that convolutions may use, each axis the one with the fewest multiplications. By
            default F(2, r) and F(4, r); (2,) alone is numerically as exact as the direct form.

    Raises:
        ConfigError: No input_shape for a model that has no `input_spec`.
    """
    if input_shape is None:
        if not isinstance(model, VideoNet):
            raise ConfigError(
                f"{type(model).__name__} has no input_spec: give input_shape, such as (1, 3, 16, 112, 112)"
            )
        spec = model.input_spec
        input_shape = (1, spec.channels, spec.num_frames, *spec.size)
    return count(model, input_shape, tiles=tiles)
