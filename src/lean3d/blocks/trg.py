"""The Temporal Residual Gradient (arXiv 1905.13388), and where in a net it sits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lean3d.errors import ConfigError


class TemporalResidualGradient(nn.Module):
    """T frames as their T - 1 differences and their mean: T slices again, no weights, channel by channel.

        frames       f0    f1    f2    ...    fT-1
        slices          d1    d2    ...   dT-1    mean          d_t = f_t - f_t-1

    The mean keeps what differences lose: the distribution of the values. In the paper's figure the differences come
    in the order of time and the mean takes the remaining slot, which is the default here.

    Args:
        order: "differences_first" (the paper's) or "mean_first".
        beside: whether the slices stand beside the frames, as further channels, rather than in their place.
    """

    def __init__(
        self, order: Literal["differences_first", "mean_first"] = "differences_first", *, beside: bool = False
    ):
        super().__init__()
        if order not in ("differences_first", "mean_first"):
            raise ConfigError(f"order must be differences_first or mean_first, got {order!r}")
        self.order, self.beside = order, beside

    def forward(self, x: Tensor) -> Tensor:
        """`(N, C, T, H, W)` -> `(N, C, T, H, W)`, or 2 C where beside; a single frame is its own mean."""
        mean = x.mean(2, keepdim=True)
        differences = x[:, :, 1:] - x[:, :, :-1]
        slices = (differences, mean) if self.order == "differences_first" else (mean, differences)
        gradient = torch.cat(slices, 2)
        return torch.cat((x, gradient), 1) if self.beside else gradient

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"order={self.order!r}, beside={self.beside}"


@dataclass(frozen=True)
class TRGPlaces:
    """Where in a net the Temporal Residual Gradient sits; `trg_places` makes one from a model's arguments.

    The paper doesn't say where it is. A net asks at each of its places whether to put one there.
    """

    places: frozenset[str] = frozenset()
    beside: bool = False

    def channels(self, place: str, channels: int) -> int:
        """How many of `channels` come out at a place: twice as many where the gradient stands beside them."""
        return 2 * channels if self.beside and place in self.places else channels

    def modules(self, place: str) -> list[nn.Module]:
        """What to put at a place: one module or none."""
        return [TemporalResidualGradient(beside=self.beside)] if place in self.places else []


def trg_places(trg: str, mode: str, num_stages: int) -> TRGPlaces:
    """The places that a model's arguments name.

    Args:
        trg: "none", or one or several, with commas, of "input" (the clip), "stage1", "stage2", ... (before that entry
            of the model's `stages`), "blocks" (in every block, before its first convolution, not in its shortcut).
        mode: "replace", the gradient in place of what it is taken of, or "beside", as further channels.
        num_stages: of the model.

    Raises:
        ConfigError: Says what came and what is accepted.
    """
    places = [] if trg == "none" else [place.strip() for place in trg.split(",")]
    known = ["input", *(f"stage{number + 1}" for number in range(num_stages)), "blocks"]
    if not set(places) <= set(known):
        raise ConfigError(f"trg must be none or some of {', '.join(known)}, such as 'input, stage2'; got {trg!r}")
    if mode not in ("replace", "beside"):
        raise ConfigError(f"trg_mode must be replace or beside, got {mode!r}")
    return TRGPlaces(frozenset(places), mode == "beside")
