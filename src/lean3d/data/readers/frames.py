"""Folders of pictures, one for each frame."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from lean3d.data.readers.base import MEMORY, ClosesItself, Scaler, places_of
from lean3d.errors import ConfigError, DecodeError

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
"""File name endings of pictures."""


class FrameReader(ClosesItself):
    """A video that lies as pictures in a folder.

    The frames are the files that fit the template, by their number; it may start anywhere and go in equal steps
    (every fifth frame), but a hole is a lost frame and an error. Where nothing fits, pictures that differ in one
    number alone (frame1.png ... frame10.png) are taken by that number. The first picture gives the size; another
    size is scaled to it.

    Args:
        path: The folder.
        template: A file's name with one number in it, as in ``"img_{:05d}.jpg"``; leading zeros are no matter.
        fps: Frames per second, which a folder can't tell.

    Raises:
        DecodeError: No frames, or one is missing.
        ConfigError: A template without one number.
    """

    def __init__(self, path: str | Path, template: str = "{:05d}.jpg", fps: float = 25.0):
        self.path = str(path)
        self.fps = float(fps)
        pattern = _pattern(template)
        try:
            names = sorted(entry.name for entry in Path(path).iterdir() if not entry.name.startswith("."))
        except OSError as error:
            raise DecodeError(path, error.strerror or "can't be listed") from error
        numbered = sorted((int(match[1]), name) for name in names if (match := pattern.fullmatch(name)))
        if not numbered:
            numbered = self._guess([n for n in names if Path(n).suffix.lower() in PICTURES], template)
        self._names = [name for _, name in numbered]
        self._check_holes([number for number, _ in numbered])
        self.num_frames = len(self._names)
        self.ending = Path(self._names[0]).suffix.lower().lstrip(".")
        self._scaler = Scaler()
        self._size: tuple[int, int] | None = None

    def _guess(self, pictures: list[str], template: str) -> list[tuple[int, str]]:
        families: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for name in pictures:
            if match := re.fullmatch(r"(.*?)(\d+)(\D*)", name):
                families.setdefault((match[1], match[3]), []).append((int(match[2]), name))
        if len(families) == 1:
            return sorted(next(iter(families.values())))
        if not pictures:
            raise DecodeError(self.path, "no pictures in the folder")
        raise DecodeError(self.path, f"no picture fits the template {template!r}; there are {', '.join(pictures[:3])}")

    def _check_holes(self, numbers: list[int]) -> None:
        steps = np.diff(numbers)
        if len(steps) and steps.min() != steps.max():
            hole = int(np.argmax(steps != steps.min()))
            after, before = self._names[hole], self._names[hole + 1]
            raise DecodeError(self.path, f"frames between {after} and {before} are missing")

    @property
    def timestamps(self) -> tuple[float, ...]:
        return tuple(i / self.fps for i in range(self.num_frames))

    @property
    def size(self) -> tuple[int, int]:
        if self._size is None:
            self._size = self._picture(0).shape[:2]
        return self._size

    def get_frames(
        self, indices: Sequence[int] | torch.Tensor, *, size: tuple[int, int] | None = None, channels: int = 3
    ) -> torch.Tensor:
        """See `Reader.get_frames`."""
        places = places_of(indices, self.num_frames, size, channels)
        height, width = size or self.size
        out = MEMORY.empty(len(indices), height, width, channels)
        for index, rows in places.items():
            frame = av.VideoFrame.from_ndarray(self._picture(index), format="rgb24")
            out[rows] = self._scaler(frame, height, width, channels)
        return torch.from_numpy(out)

    def check(self) -> None:
        """See `Reader.check`."""
        for index in range(self.num_frames):
            self._picture(index)

    def _picture(self, index: int) -> np.ndarray:
        name = self._names[index]
        try:
            with Image.open(Path(self.path, name)) as picture:
                return np.array(picture.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            kind = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
            raise DecodeError(self.path, f"{name}: {kind}") from error


def _pattern(template: str) -> re.Pattern[str]:
    """What the names of a template look like, with the number as its group."""
    try:
        parts = list(string.Formatter().parse(template))
        template.format(1)
    except (ValueError, IndexError, KeyError):
        parts = []
    if sum(field is not None for _, field, _, _ in parts) != 1:
        raise ConfigError(
            f"a frame template has one number in it, as in '{{:05d}}.jpg' or 'img_{{:d}}.png'; got {template!r}"
        )
    return re.compile("".join(re.escape(text) + ("" if field is None else r"(\d+)") for text, field, _, _ in parts))
