"""Frames that are in memory already."""

from __future__ import annotations

from collections.abc import Sequence

import av
import numpy as np
import torch

from lean3d.data.readers.base import FORMATS, MEMORY, ClosesItself, Scaler, places_of
from lean3d.errors import ConfigError


class ArrayReader(ClosesItself):
    """A video in memory.

    Args:
        frames: uint8 (T, H, W, C), a numpy array, a tensor, or what numpy makes an array of; C is 3 (RGB) or 1 (grey).
        fps: Frames per second.

    Raises:
        ConfigError: Another shape or number type; the message says how to convert.
    """

    def __init__(self, frames: np.ndarray | torch.Tensor | Sequence[np.ndarray], fps: float = 25.0):
        array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
        if array.dtype != np.uint8:
            cure = "(frames * 255).round().astype('uint8') for values in [0, 1]"
            if array.dtype.kind in "iu":
                cure = "frames.astype('uint8') for values from 0 to 255"
            raise ConfigError(f"frames must be uint8, got {array.dtype}; convert with {cure}")
        if array.ndim != 4 or array.shape[-1] not in FORMATS:
            cure = ""
            if array.ndim == 3:
                cure = (
                    "; for grey frames without a channel axis: frames[..., None]; for a single picture: picture[None]"
                )
            elif array.ndim == 4 and array.shape[1] in FORMATS:
                cure = "; channels come last: frames.transpose(0, 2, 3, 1)"
            elif array.ndim == 4 and array.shape[0] in FORMATS:
                cure = "; channels come last: frames.transpose(1, 2, 3, 0)"
            elif array.ndim == 4 and array.shape[-1] == 4:
                cure = "; leave the alpha channel away: frames[..., :3]"
            raise ConfigError(f"frames must be (T, H, W, C) with C = 3 or 1, got shape {array.shape}{cure}")
        if 0 in array.shape:
            raise ConfigError(f"frames must hold at least one frame of at least one pixel, got shape {array.shape}")
        if not fps > 0:
            raise ConfigError(f"fps must be positive, got {fps}")
        self.path = "array"
        self.num_frames = len(array)
        self.fps = float(fps)
        self.size: tuple[int, int] = (array.shape[1], array.shape[2])
        self._frames = array
        self._scaler = Scaler()

    @property
    def timestamps(self) -> tuple[float, ...]:
        return tuple(i / self.fps for i in range(self.num_frames))

    def get_frames(
        self, indices: Sequence[int] | torch.Tensor, *, size: tuple[int, int] | None = None, channels: int = 3
    ) -> torch.Tensor:
        """See `Reader.get_frames`."""
        places = places_of(indices, self.num_frames, size, channels)
        height, width = size or self.size
        out = MEMORY.empty(len(indices), height, width, channels)
        own = self._frames.shape[-1]
        for index, rows in places.items():
            pixels = np.ascontiguousarray(self._frames[index])
            frame = av.VideoFrame.from_ndarray(pixels[..., 0] if own == 1 else pixels, format=FORMATS[own])
            out[rows] = self._scaler(frame, height, width, channels)
        return torch.from_numpy(out)

    def check(self) -> None:
        """Nothing can be wrong with frames in memory."""
