"""From decoded frames to the clip that a model wants: crop, resize, flip, change, normalise, mix.

Transforms work on whole clips as uint8 tensors, with one random draw a clip, and all randomness comes from the
`torch.Generator` that is handed in. A crop is a slice, so the only work on the full frame is one antialiased bilinear
resize, done in the frames' own layout: torch has a native uint8 path for it, nine times faster than floats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from lean3d.config import AugmentConfig, InputSpec, Region
from lean3d.data.clip_ops import RandAugment, adjust_colour, erase, integer, uniform
from lean3d.errors import ConfigError, did_you_mean

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""


class Appearance:
    """What a training clip looks like once it has its place: colour, RandAugment, erasing, in this order.

    Args:
        augment: What to do.
        input_spec: Has the colour of what is erased.

    Raises:
        ConfigError: A setting of RandAugment is out of its range.
    """

    def __init__(self, augment: AugmentConfig, input_spec: InputSpec):
        self.augment = augment
        self.fill = input_spec.mean
        self.rand_augment = RandAugment(augment.rand_augment, augment.rand_augment_magnitude)

    def __call__(self, clip: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The changed clip.

        Args:
            clip: uint8 (C, T, h, w), on any device.
            generator: On the CPU; source of every random choice.

        Returns:
            uint8 (C, T, h, w), contiguous.
        """
        augment = self.augment
        if augment.color_jitter > 0:
            low, high = max(0.0, 1 - augment.color_jitter), 1 + augment.color_jitter
            brightness, contrast, saturation = (uniform(generator, low, high) for _ in range(3))
            clip = adjust_colour(clip, brightness=brightness, contrast=contrast, saturation=saturation)
        clip = self.rand_augment(clip, generator)
        if augment.erasing > 0 and uniform(generator, 0, 1) < augment.erasing:
            clip = erase(clip, self.fill, generator)
        return clip.contiguous()


class TrainTransform:
    """A training clip out of decoded frames: crop and resize, flip, then its `Appearance`.

    Frames are, here and in a test, the region of the video's frames that the model looks at. Crops (`augment.crop`),
    where *the largest crop* is the largest box with the shape of the model's input that fits (no distortion):

    - ``multi_scale``: the largest crop times one of `scales`, for height and width apart by at most one place in the
      list, in a corner or the centre (Wang et al., TSN, arXiv:1608.00859, section 3.2).
    - ``random_resized``: a random area of the frame and a random aspect ratio (1: that of the model's input), made
      smaller where it does not fit, in a random place (Szegedy et al., arXiv:1409.4842).
    - ``random``: the largest crop in a random place. ``center``: the largest crop in the middle.

    Args:
        augment: What to do.
        input_spec: What the model wants.
        classes: Names of the classes, which say whether a flip exchanges labels; see `flip_labels`.

    Raises:
        ConfigError: A setting is out of its range, or `flip_map` names an unknown class.
    """

    def __init__(self, augment: AugmentConfig, input_spec: InputSpec, classes: Sequence[str]):
        _check_augment(augment)
        self.augment = augment
        self.input_spec = input_spec
        self.labels_flipped: list[int] | None = None
        """The label of each class after a flip; None: clips are never flipped."""
        if augment.flip != "off":
            self.labels_flipped = flip_labels(classes, augment.flip_map, from_names=augment.flip == "auto")
        self.appearance = Appearance(augment, input_spec)

    def __call__(self, frames: torch.Tensor, label: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """One random clip: `place`, with its arguments and errors, then `appearance`."""
        clip, label = self.place(frames, label, generator)
        return self.appearance(clip, generator), label

    def place(self, frames: torch.Tensor, label: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """A random part of the frames, at the size that the model wants, perhaps flipped.

        Args:
            frames: uint8 (T, H, W, C) of any size.
            label: The class, or -1 for none.
            generator: Source of every random choice.

        Returns:
            The clip, uint8 (C, T, h, w), and its label, which a flip may have exchanged.

        Raises:
            ConfigError: The frames have another shape or type.
        """
        _check_frames(frames, self.input_spec)
        frames = _looked_at(frames, self.input_spec.region)
        box = self._draw_box(frames.shape[1], frames.shape[2], generator)
        clip = _crop_and_resize(frames, box, self.input_spec.size)
        if self.labels_flipped is not None and integer(generator, 2):
            clip = clip.flip(-1)
            label = self.labels_flipped[label] if label >= 0 else label
        return clip.contiguous(), label

    def _draw_box(self, height: int, width: int, generator: torch.Generator) -> Box:
        augment = self.augment
        box_height, box_width = _largest_crop(height, width, self.input_spec.size)
        if augment.crop == "center":
            return _centered(height, width, box_height, box_width)
        if augment.crop == "multi_scale":
            first = integer(generator, len(augment.scales))
            near = range(max(first - 1, 0), min(first + 2, len(augment.scales)))
            second = near[integer(generator, len(near))]
            box_height = max(round(box_height * augment.scales[first]), 1)
            box_width = max(round(box_width * augment.scales[second]), 1)
            place = integer(generator, 5)
            if place == 4:
                return _centered(height, width, box_height, box_width)
            return (place // 2) * (height - box_height), (place % 2) * (width - box_width), box_height, box_width
        if augment.crop == "random_resized":
            area = uniform(generator, *augment.area) * height * width
            ratio = math.exp(uniform(generator, math.log(augment.aspect[0]), math.log(augment.aspect[1])))
            ratio *= self.input_spec.size[1] / self.input_spec.size[0]  # width by height
            fit = min(1.0, height / math.sqrt(area / ratio), width / math.sqrt(area * ratio))
            box_height = min(max(round(fit * math.sqrt(area / ratio)), 1), height)
            box_width = min(max(round(fit * math.sqrt(area * ratio)), 1), width)
        top = integer(generator, height - box_height + 1)
        left = integer(generator, width - box_width + 1)
        return top, left, box_height, box_width


class TestTransform:
    """The views of a test in space: the largest crop in the middle, or three along the longer side.

    ```
    num_crops=3      wide frame               tall frame
                     [1  ][ 2 ][  3]          1 at the top, 2 in the middle, 3 at the bottom
    ```

    Three crops of a frame that has the input's own shape are equal, unless they are smaller than the frame.

    Args:
        input_spec: What the model wants.
        num_crops: 1 or 3.
        crop_area: Area of a crop, relative to the largest that fits, in (0, 1].

    Raises:
        ConfigError: Another number of crops.
    """

    __test__ = False  # not a test of pytest's

    def __init__(self, input_spec: InputSpec, num_crops: int = 1, crop_area: float = 1.0):
        if num_crops not in (1, 3):
            raise ConfigError(f"num_crops must be 1 (centre) or 3 (left, centre, right), got {num_crops}")
        self.input_spec = input_spec
        self.num_crops = num_crops
        self.crop_area = crop_area

    def __call__(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 frames (T, H, W, C) of any size -> uint8 (num_crops, C, T, h, w).

        Raises:
            ConfigError: The frames have another shape or type.
        """
        _check_frames(frames, self.input_spec)
        frames = _looked_at(frames, self.input_spec.region)
        height, width = frames.shape[1:3]
        largest = _largest_crop(height, width, self.input_spec.size)
        box_height, box_width = (max(round(side * math.sqrt(self.crop_area)), 1) for side in largest)
        boxes = [_centered(height, width, box_height, box_width)]
        if self.num_crops == 3:
            top, left = boxes[0][:2]
            free_height, free_width = height - box_height, width - box_width
            ends = [(0, left), (free_height, left)] if free_height > free_width else [(top, 0), (top, free_width)]
            boxes = [(*ends[0], box_height, box_width), boxes[0], (*ends[1], box_height, box_width)]
        return torch.stack([_crop_and_resize(frames, box, self.input_spec.size) for box in boxes])


def normalize(clips: torch.Tensor, input_spec: InputSpec, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """(clips / 255 - mean) / std, on whatever device the clips are.

    Args:
        clips: uint8 (N, C, T, H, W) or (C, T, H, W).
        input_spec: Has mean and std by channel.
        dtype: Of the result; the sum itself is done in float32.

    Returns:
        The same shape in `dtype`.

    Raises:
        ConfigError: The clips have another shape or type.
    """
    if clips.dtype != torch.uint8 or clips.ndim not in (4, 5) or clips.shape[-4] != input_spec.channels:
        raise ConfigError(
            f"clips must be uint8 (N, {input_spec.channels}, T, H, W) or ({input_spec.channels}, T, H, W), "
            f"got {_describe(clips)}"
        )
    mean = torch.tensor(input_spec.mean, device=clips.device).view(-1, 1, 1, 1)
    std = torch.tensor(input_spec.std, device=clips.device).view(-1, 1, 1, 1)
    return clips.float().mul_(1 / (255 * std)).sub_(mean / std).to(dtype)


_MIRRORED = {"left": "right", "right": "left", "clockwise": "counterclockwise", "counterclockwise": "clockwise"}
_MIRRORED_WORD = re.compile(
    r"(?<![^\W_])(?:left|right|(?:(?:counter|anti)[-_ ]?)?clockwise)(?![^\W_])",
    re.IGNORECASE,
)


def flip_labels(classes: Sequence[str], flip_map: Mapping[str, str], *, from_names: bool = True) -> list[int] | None:
    """The label that each class has after a horizontal flip, or None where clips must not be flipped.

    A name says a direction when it holds left, right, clockwise or counterclockwise (also counter-clockwise and
    anticlockwise) as a whole word, in any case; spaces, hyphens and underscores end a word. A flip exchanges all of
    them at once: "Left-to-right" becomes "Right-to-left". Every class whose name says a direction needs its
    counterpart among the classes, else the answer is None: a flip would show a class that nobody named. A pair in
    `flip_map` goes before the names; a class paired with itself looks the same after a flip ("raise the right hand"
    where the hand's side does not matter).

    >>> flip_labels(["moves-left", "moves-right", "grows"], {})
    [1, 0, 2]

    Args:
        classes: Names of the classes.
        flip_map: Pairs of classes that a flip exchanges, each pair once or both ways.
        from_names: Whether names are read; if not, only the pairs of `flip_map` are exchanged.

    Returns:
        A permutation of the labels that is its own inverse, or None.

    Raises:
        ConfigError: `flip_map` names an unknown class, or one class in two pairs.
    """
    index = {name: label for label, name in enumerate(classes)}
    flipped: dict[int, int] = {}
    for pair in flip_map.items():
        for name in pair:
            if name not in index:
                raise ConfigError(f"flip_map: no class is named {name!r}; {did_you_mean(name, classes)}")
        for name, other in (pair, pair[::-1]):
            if flipped.setdefault(index[name], index[other]) != index[other]:
                raise ConfigError(f"flip_map: {name!r} is in two pairs; a class has one counterpart")
    free = [label for label in range(len(classes)) if label not in flipped]
    if from_names:
        by_key: dict[str, int] = {}
        for label in free:
            if by_key.setdefault(_direction_key(classes[label]), label) != label:
                return None  # two spellings of one name: which is the counterpart is anyone's guess
        for label in free:
            counterpart = by_key.get(_direction_key(classes[label], mirrored=True))
            if counterpart is None:
                return None
            flipped[label] = counterpart
    return [flipped.get(label, label) for label in range(len(classes))]


class BatchMix:
    """Mixup (Zhang et al., arXiv:1710.09412) and CutMix (Yun et al., arXiv:1905.04899) of a batch of clips.

    Each clip is mixed with another of the batch, all with one share, which is drawn from Beta(alpha, alpha). CutMix
    pastes one box through all frames and corrects the share to the box's true area. Where both are on, each batch has
    one of them with equal chance. Without either the clips stay and the targets are one-hot.

    Args:
        mixup: Alpha of mixup (0: none).
        cutmix: Alpha of CutMix (0: none).
        num_classes: Classes (K).

    Raises:
        ConfigError: A negative alpha.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int):
        if mixup < 0 or cutmix < 0:
            raise ConfigError(f"mixup and cutmix must be at least 0, got {mixup} and {cutmix}")
        self.mixup = mixup
        self.cutmix = cutmix
        self.num_classes = num_classes

    def __call__(
        self, clips: torch.Tensor, labels: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix one batch.

        Args:
            clips: float (N, C, T, H, W), on any device.
            labels: int64 (N,), each in [0, K).
            generator: Source of every random choice, on the CPU.

        Returns:
            The mixed clips (N, C, T, H, W) and soft targets, float32 (N, K), each row's sum 1.

        Raises:
            ConfigError: The clips or labels have another shape or type.
        """
        if not clips.is_floating_point() or clips.ndim != 5:
            raise ConfigError(f"clips must be float (N, C, T, H, W), got {_describe(clips)}")
        if labels.dtype != torch.int64 or labels.shape != clips.shape[:1]:
            raise ConfigError(f"labels must be int64 ({len(clips)},), got {_describe(labels)}")
        targets = F.one_hot(labels, self.num_classes).float()
        alphas = [(alpha, mix) for alpha, mix in ((self.mixup, self._blend), (self.cutmix, self._paste)) if alpha > 0]
        if not alphas:
            return clips, targets
        alpha, mix = alphas[integer(generator, len(alphas))]
        share = _draw_beta(alpha, generator)
        other = torch.randperm(len(clips), generator=generator).to(clips.device)
        clips, share = mix(clips, clips[other], share, generator)
        return clips, targets.lerp(targets[other], 1 - share)

    @staticmethod
    def _blend(
        clips: torch.Tensor, others: torch.Tensor, share: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, float]:
        return clips.lerp(others, 1 - share), share

    @staticmethod
    def _paste(
        clips: torch.Tensor, others: torch.Tensor, share: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, float]:
        height, width = clips.shape[-2:]
        half_height, half_width = (round(side * math.sqrt(1 - share) / 2) for side in (height, width))
        y, x = integer(generator, height), integer(generator, width)
        top, bottom = max(y - half_height, 0), min(y + half_height, height)
        left, right = max(x - half_width, 0), min(x + half_width, width)
        clips = clips.clone()
        clips[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        return clips, 1 - (bottom - top) * (right - left) / (height * width)


def _looked_at(frames: torch.Tensor, region: Region) -> torch.Tensor:
    """The region of frames (T, H, W, C), a view; at least one pixel."""
    left, top, right, bottom = region
    height, width = frames.shape[1:3]
    first_row, first_column = min(round(top * height), height - 1), min(round(left * width), width - 1)
    rows = slice(first_row, max(round(bottom * height), first_row + 1))
    columns = slice(first_column, max(round(right * width), first_column + 1))
    return frames[:, rows, columns]


def _crop_and_resize(frames: torch.Tensor, box: Box, size: tuple[int, int]) -> torch.Tensor:
    """The box of frames (T, H, W, C), resized to (h, w), as (C, T, h, w)."""
    top, left, height, width = box
    clip = frames[:, top : top + height, left : left + width].permute(0, 3, 1, 2)  # a view: channels last in memory
    if (height, width) != tuple(size):
        clip = F.interpolate(clip, size=tuple(size), mode="bilinear", antialias=True)
    return clip.transpose(0, 1).contiguous()


def _largest_crop(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest box with the shape of `size` in a frame of (height, width)."""
    scale = min(height / size[0], width / size[1])
    return max(min(round(size[0] * scale), height), 1), max(min(round(size[1] * scale), width), 1)


def _centered(height: int, width: int, box_height: int, box_width: int) -> Box:
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def _direction_key(name: str, mirrored: bool = False) -> str:
    """A class name with its words of direction in one spelling, as they are or after a flip."""

    def spell(match: re.Match[str]) -> str:
        word = match[0].lower()
        if word.endswith("clockwise"):
            word = "clockwise" if word == "clockwise" else "counterclockwise"
        return f"<{_MIRRORED[word] if mirrored else word}>"

    return _MIRRORED_WORD.sub(spell, name)


def _draw_beta(alpha: float, generator: torch.Generator) -> float:
    """From Beta(alpha, alpha), which torch does not draw from a generator."""
    seed = integer(generator, 2**62)
    return float(np.random.default_rng(seed).beta(alpha, alpha))


def _check_augment(augment: AugmentConfig) -> None:
    if augment.crop not in ("multi_scale", "random_resized", "random", "center"):
        raise ConfigError(f"crop must be multi_scale, random_resized, random or center, got {augment.crop!r}")
    if augment.flip not in ("auto", "on", "off"):
        raise ConfigError(f"flip must be auto, on or off, got {augment.flip!r}")
    if not augment.scales or not all(0 < scale <= 1 for scale in augment.scales):
        raise ConfigError(f"scales must be numbers above 0 and up to 1, got {augment.scales}")
    if not 0 < augment.area[0] <= augment.area[1] <= 1:
        raise ConfigError(f"area must be two growing numbers above 0 and up to 1, got {augment.area}")
    if not 0 < augment.aspect[0] <= augment.aspect[1]:
        raise ConfigError(f"aspect must be two growing numbers above 0, got {augment.aspect}")
    for name, value in (("speed", augment.speed), ("time_shift", augment.time_shift)):
        if value < 0:
            raise ConfigError(f"{name} must be at least 0, got {value}")
    if augment.color_jitter < 0:
        raise ConfigError(f"color_jitter must be at least 0, got {augment.color_jitter}")
    if not 0 <= augment.erasing <= 1:
        raise ConfigError(f"erasing is a probability, 0 to 1, got {augment.erasing}")


def _check_frames(frames: torch.Tensor, input_spec: InputSpec) -> None:
    wanted = f"frames must be uint8 (T, H, W, {input_spec.channels})"
    if not isinstance(frames, torch.Tensor):
        raise ConfigError(f"{wanted} in a torch.Tensor, got {type(frames).__name__}")
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != input_spec.channels or not frames.numel():
        raise ConfigError(f"{wanted}, got {_describe(frames)}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
