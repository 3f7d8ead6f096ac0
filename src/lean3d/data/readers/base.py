"""What every reader offers, and the one converter that they share."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter

from lean3d.errors import ConfigError

FORMATS = {1: "gray8", 3: "rgb24"}

# Without the second flag, colour would be shared by pairs of pixels, but only where the new width is even.
SHRINK = Interpolation.AREA | Interpolation.FULL_CHR_H_INT


class Reader(Protocol):
    """A video whose frames are asked for by number.

    Attributes:
        path: Where it lies.
        num_frames: Frames that there are, exactly.
        fps: Frames per second, on average over the video.
        timestamps: Seconds from the first frame, for each frame.
        size: Height and width of a frame as it is shown, in pixels.
    """

    path: str

    @property
    def num_frames(self) -> int: ...
    @property
    def fps(self) -> float: ...
    @property
    def timestamps(self) -> tuple[float, ...]: ...
    @property
    def size(self) -> tuple[int, int]: ...

    def get_frames(
        self, indices: Sequence[int] | torch.Tensor, *, size: tuple[int, int] | None = None, channels: int = 3
    ) -> torch.Tensor:
        """The frames of these numbers, as uint8 (T, H, W, C), in the order asked for.

        Args:
            indices: Numbers from 0 to num_frames - 1; they may repeat and need no order.
            size: Height and width to scale to (None: the video's own `size`).
            channels: 3 for RGB, 1 for grey.

        Raises:
            DecodeError: A frame can't be decoded.
            ConfigError: A number that is out of range, or another argument that makes no sense.
        """
        ...

    def check(self) -> None:
        """Decode everything and keep nothing.

        Raises:
            DecodeError: Any frame can't be decoded, though `get_frames` might never come across it.
        """
        ...

    def close(self) -> None:
        """Give files and decoder back; harmless when done twice."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ClosesItself:
    """`with open_video(path) as video:`"""

    def close(self) -> None:
        """Nothing to give back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Scaler:
    """Turns decoded frames into RGB or grey pixels of a size, in one pass of one reused converter."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, frame: av.VideoFrame, height: int, width: int, channels: int) -> np.ndarray:
        """Pixels as uint8 (height, width, channels); a view that the next call leaves alone.

        Shrinking averages over areas, so that nothing aliases; enlarging is bilinear.
        """
        shrinks = height * width < frame.height * frame.width
        done = self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format=FORMATS[channels],
            interpolation=SHRINK if shrinks else Interpolation.BILINEAR,
            threads=1,  # a loader has a process for each core already
        )
        plane = done.planes[0]
        lines = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        return lines[:height, : width * channels].reshape(height, width, channels)


def places_of(
    indices: Sequence[int] | torch.Tensor,
    num_frames: int,
    size: tuple[int, int] | None,
    channels: int,
) -> dict[int, list[int]]:
    """Where each wanted frame goes in the answer, in the order of the frames; the arguments are checked here.

    >>> places_of([7, 2, 7], 10, None, 3)
    {2: [1], 7: [0, 2]}
    """
    if channels not in FORMATS:
        raise ConfigError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ConfigError(f"size must be (height, width) in pixels, got {size}")
    places: dict[int, list[int]] = {}
    for place, index in enumerate(int(i) for i in indices):
        if not 0 <= index < num_frames:
            raise ConfigError(f"frame {index} is out of range: the video has frames 0 to {num_frames - 1}")
        places.setdefault(index, []).append(place)
    return dict(sorted(places.items()))
