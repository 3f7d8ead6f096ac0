"""What every reader offers, and the one converter that they share."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

import av
import numpy as np
import torch
from av.video.reformatter import Interpolation, VideoReformatter

from lean3d.errors import ConfigError

FORMATS = {1: "gray8", 3: "rgb24"}

SMALL_BYTES = 2**17
"""Memory below this size is never given back to the system by the allocator, so that there is nothing to gain."""

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


class FrameMemory:
    """Memory for decoded frames, taken back when the array that was given dies, and given again.

    The system zeroes fresh memory page by page, which takes a sixth of the time in which a whole video is decoded.

    Args:
        limit: Bytes that are kept for the next time, at most.
    """

    def __init__(self, limit: int = 128 * 2**20):
        self._limit = limit
        self._free: dict[int, np.ndarray] = {}

    def empty(self, *shape: int) -> np.ndarray:
        """An uninitialised uint8 array."""
        size = math.prod(shape)
        if size < SMALL_BYTES:
            return np.empty(shape, np.uint8)
        fits = [block for block in list(self._free.values()) if size <= block.nbytes <= 2 * size]
        block = self._free.pop(id(fits[0]), None) if fits else None  # None also if another thread was faster
        if block is None:
            block = np.empty(size, np.uint8)
        array = block[:size].reshape(shape)
        weakref.finalize(array, self._take_back, block).atexit = False
        return array

    def _take_back(self, block: np.ndarray) -> None:
        self._free[id(block)] = block
        kept = list(self._free.items())
        while sum(other.nbytes for _, other in kept) > self._limit:
            self._free.pop(kept.pop(0)[0], None)


MEMORY = FrameMemory()
"""What readers take memory for frames from."""


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
