"""Changes of a whole clip, as tensor code: colour, geometry, RandAugment, erasing.

A clip is uint8 (C, T, h, w) with C = 3 (RGB) or 1 (grey). Every operation does the same to each frame: what it
measures (a mean, a histogram) it measures over the whole clip, so that nothing flickers. An operation returns a new
clip, or the same one where there is nothing to do, and never writes into its input. All work where the clip
is, on a GPU too; what is random is drawn on the CPU, so both do the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lean3d.errors import ConfigError

_FILL = 128.0  # mid grey, for what a geometric operation brings in from outside the frame


def adjust_colour(
    clip: torch.Tensor, *, brightness: float = 1.0, contrast: float = 1.0, saturation: float = 1.0
) -> torch.Tensor:
    """Scale brightness, contrast (about the clip's mean grey) and saturation (about each pixel's grey); 1 keeps.

    Without clamping in between the three commute, so they are one linear map of a pixel and its grey.
    Saturation does nothing to a grey clip.

    Args:
        clip: uint8 (C, T, h, w).
        brightness: Factor, 0 is black.
        contrast: Factor, 0 is the mean grey everywhere.
        saturation: Factor, 0 is a grey clip.

    Returns:
        uint8 (C, T, h, w).
    """
    pixels = clip.float()
    grey = _luma(pixels)
    gain = brightness * contrast
    offset = brightness * (1 - contrast) * grey.mean()
    if len(clip) == 1:
        pixels = pixels.mul_(gain).add_(offset)
    else:
        pixels = pixels.mul_(gain * saturation).add_(grey.mul_(gain * (1 - saturation)).add_(offset))
    return _to_uint8(pixels)


def autocontrast(clip: torch.Tensor) -> torch.Tensor:
    """Stretch each channel so that its darkest value becomes 0 and its brightest 255."""
    tables = []
    for channel in clip:
        low, high = (int(value) for value in channel.aminmax())
        values = torch.arange(256, device=clip.device)
        tables.append(((values - low) * 255 // (high - low)).clamp(0, 255) if high > low else values)
    return _look_up(clip, torch.stack(tables).byte())


def equalize(clip: torch.Tensor) -> torch.Tensor:
    """Make each channel's histogram as flat as a mapping of values can."""
    tables = []
    for channel in clip.flatten(1):
        histogram = torch.bincount(channel, minlength=256)
        step = (len(channel) - int(histogram[int(channel.max())])) // 255
        if step == 0:
            tables.append(torch.arange(256, device=clip.device))
        else:
            below = histogram.cumsum(0) - histogram
            tables.append(((below + step // 2) // step).clamp(max=255))
    return _look_up(clip, torch.stack(tables).byte())


def posterize(clip: torch.Tensor, bits: int) -> torch.Tensor:
    """Keep the `bits` (1 to 8) highest bits of each value."""
    return clip & (256 - 2 ** (8 - bits))


def solarize(clip: torch.Tensor, threshold: float) -> torch.Tensor:
    """Invert values of at least `threshold`."""
    values = torch.arange(256, device=clip.device)
    return _look_up(clip, torch.where(values >= threshold, 255 - values, values).byte().expand(len(clip), 256))


def sharpen(clip: torch.Tensor, factor: float) -> torch.Tensor:
    """Sharpen (factor above 1) or smooth (below 1) against a 3x3 blur; the outermost pixels stay."""
    if min(clip.shape[-2:]) < 3:
        return clip
    pixels = clip.float()
    inner = pixels[..., 1:-1, 1:-1]
    rows = pixels[..., :-2, :] + pixels[..., 1:-1, :] + pixels[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]
    blurred = box.add_(inner, alpha=4).div_(13)  # the kernel 1 1 1 / 1 5 1 / 1 1 1
    inner.copy_(blurred.lerp_(inner, factor))
    return _to_uint8(pixels)


def affine(
    clip: torch.Tensor, matrix: tuple[float, float, float, float], shift: tuple[float, float] = (0, 0)
) -> torch.Tensor:
    """Move the picture: the output at (x, y) from the middle shows the input at (ax + by + tx, cx + dy + ty).

    Args:
        clip: uint8 (C, T, h, w).
        matrix: (a, b, c, d).
        shift: (tx, ty) in pixels.

    Returns:
        uint8 (C, T, h, w), bilinear; mid grey comes in from outside.
    """
    channels, frames, height, width = clip.shape
    (a, b, c, d), (tx, ty) = matrix, shift
    rows = [a, b * height / width, 2 * tx / width], [c * width / height, d, 2 * ty / height]
    theta = torch.tensor([rows], device=clip.device)
    grid = F.affine_grid(theta, [1, 1, height, width], align_corners=False)
    planes = clip.reshape(1, channels * frames, height, width).float() - _FILL
    moved = F.grid_sample(planes, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return _to_uint8(moved.add_(_FILL)).view_as(clip)


def rotate(clip: torch.Tensor, degrees: float) -> torch.Tensor:
    """Turn the picture about its middle, counter-clockwise as one looks at it."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return affine(clip, (cos, -sin, sin, cos))


def erase(
    clip: torch.Tensor,
    fill: tuple[float, ...],
    generator: torch.Generator,
    area: tuple[float, float] = (0.02, 0.33),
    aspect: tuple[float, float] = (0.3, 3.3),
) -> torch.Tensor:
    """Cover one random box through all frames (Zhong et al., Random Erasing, arXiv:1708.04896).

    Args:
        clip: uint8 (C, T, h, w).
        fill: Colour of the box by channel, in [0, 1].
        generator: Source of the box.
        area: Range of the box's area, relative to the frame.
        aspect: Range of the box's height by its width, drawn on a log scale.

    Returns:
        uint8 (C, T, h, w).
    """
    height, width = clip.shape[-2:]
    share = uniform(generator, *area)
    ratio = math.exp(uniform(generator, math.log(aspect[0]), math.log(aspect[1])))
    box_height = min(max(round(math.sqrt(share * height * width * ratio)), 1), height)
    box_width = min(max(round(math.sqrt(share * height * width / ratio)), 1), width)
    top = integer(generator, height - box_height + 1)
    left = integer(generator, width - box_width + 1)
    clip = clip.clone()
    colour = torch.tensor([round(255 * value) for value in fill], dtype=torch.uint8, device=clip.device)
    clip[:, :, top : top + box_height, left : left + box_width] = colour[:, None, None, None]
    return clip


class RandAugment:
    """A few random operations, all at one strength (Cubuk et al., arXiv:1909.13719), the same on every frame.

    Args:
        number: Operations a clip, each drawn from `RandAugment.OPERATIONS` with equal chance.
        magnitude: Strength of them all, 0 (hardly any change) to 10.

    Raises:
        ConfigError: `magnitude` is out of range or `number` is negative.
    """

    def __init__(self, number: int, magnitude: float):
        if number < 0 or not 0 <= magnitude <= 10:
            raise ConfigError(
                f"rand_augment must be at least 0 and rand_augment_magnitude in 0 to 10, got {number} and {magnitude}"
            )
        self.number = number
        self.level = magnitude / 10

    def __call__(self, clip: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The changed clip, uint8 (C, T, h, w)."""
        names = list(self.OPERATIONS)
        for _ in range(self.number):
            name = names[integer(generator, len(names))]
            sign = 1 if integer(generator, 2) else -1
            clip = self.OPERATIONS[name](clip, self.level, sign)
        return clip

    OPERATIONS: dict[str, Callable[[torch.Tensor, float, int], torch.Tensor]] = {  # noqa: RUF012
        "identity": lambda clip, level, sign: clip,
        "autocontrast": lambda clip, level, sign: autocontrast(clip),
        "equalize": lambda clip, level, sign: equalize(clip),
        "posterize": lambda clip, level, sign: posterize(clip, 8 - round(4 * level)),
        "solarize": lambda clip, level, sign: solarize(clip, 256 * (1 - level)),
        "brightness": lambda clip, level, sign: adjust_colour(clip, brightness=1 + sign * 0.9 * level),
        "contrast": lambda clip, level, sign: adjust_colour(clip, contrast=1 + sign * 0.9 * level),
        "saturation": lambda clip, level, sign: adjust_colour(clip, saturation=1 + sign * 0.9 * level),
        "sharpness": lambda clip, level, sign: sharpen(clip, 1 + sign * 0.9 * level),
        "rotate": lambda clip, level, sign: rotate(clip, sign * 30 * level),
        "shear_x": lambda clip, level, sign: affine(clip, (1, sign * 0.3 * level, 0, 1)),
        "shear_y": lambda clip, level, sign: affine(clip, (1, 0, sign * 0.3 * level, 1)),
        "translate_x": lambda clip, level, sign: affine(clip, (1, 0, 0, 1), (sign * 0.45 * level * clip.shape[-1], 0)),
        "translate_y": lambda clip, level, sign: affine(clip, (1, 0, 0, 1), (0, sign * 0.45 * level * clip.shape[-2])),
    }
    """The fourteen operations by name: (clip, level in [0, 1], sign of +1 or -1) -> clip."""


def uniform(generator: torch.Generator, low: float, high: float) -> float:
    """One number from [low, high)."""
    return low + (high - low) * torch.rand((), generator=generator).item()


def integer(generator: torch.Generator, end: int) -> int:
    """One integer from 0 to `end` - 1."""
    return int(torch.randint(end, (), generator=generator))


def _luma(pixels: torch.Tensor) -> torch.Tensor:
    """Grey of float (C, T, h, w), by the weights of ITU-R BT.601, as a new (T, h, w)."""
    if len(pixels) == 1:
        return pixels[0].clone()
    return pixels[0].mul(0.299).add_(pixels[1], alpha=0.587).add_(pixels[2], alpha=0.114)


def _look_up(clip: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Replace each value of channel c by `table` (C, 256) [c, value]."""
    channels = [row.index_select(0, channel.flatten().int()) for row, channel in zip(table, clip, strict=True)]
    return torch.stack(channels).view_as(clip)


def _to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.round_().clamp_(0, 255).byte()
