"""TorchCodec as the decoder behind the same reader, where it is installed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from lean3d.data.readers.base import places_of
from lean3d.data.readers.video import VideoReader
from lean3d.errors import BackendError, DecodeError, MissingDependencyError

UPRIGHT = (False, False, False)


class TorchCodecReader(VideoReader):
    """A video file whose frames TorchCodec decodes, and whose table of frames, size and checks are `VideoReader`'s.

    The frames are those of a `VideoReader`, pixel by pixel at the video's own size (FFmpeg decodes in both); scaled
    ones differ by the rounding of colours, which here comes before the scaling. TorchCodec patches damaged pictures
    without a word: only `check` tells of damage.

    Where TorchCodec would number or turn frames in another way (packets don't tell the frames, a display matrix), the
    frames are decoded as `VideoReader` does it; `decoder` says who decodes a file.

    Args:
        path: The file.
        seconds: Longest time that opening it, or one call of `check`, may take.

    Raises:
        DecodeError: See `VideoReader`.
        MissingDependencyError: TorchCodec is not installed.
        BackendError: TorchCodec is installed, but can't be loaded.
    """

    def __init__(self, path: str | Path, seconds: float = math.inf):
        video_decoder = _video_decoder()
        super().__init__(path, seconds)
        self.decoder = "torchcodec" if self._table.by_pts and self._shown()[1] == UPRIGHT else "pyav"
        """Who decodes this file: torchcodec or pyav."""
        self._torchcodec: Any = None
        if self.decoder == "torchcodec":
            with self._errors():
                try:
                    self._torchcodec = video_decoder(
                        self.path, stream_index=self._stream.index, dimension_order="NHWC", num_ffmpeg_threads=1
                    )
                except RuntimeError as error:
                    raise DecodeError(path, _first_line(error)) from error

    def get_frames(
        self, indices: Sequence[int] | torch.Tensor, *, size: tuple[int, int] | None = None, channels: int = 3
    ) -> torch.Tensor:
        """See `Reader.get_frames`."""
        places = places_of(indices, self.num_frames, size, channels)
        if self._torchcodec is None or not places:
            return super().get_frames(indices, size=size, channels=channels)
        height, width = size or self.size
        try:
            batch = self._torchcodec.get_frames_at(list(places))
        except (RuntimeError, IndexError) as error:
            raise DecodeError(self.path, f"damaged ({_first_line(error)})") from error
        wanted = self._table.pts[list(places)] * float(self._table.time_base)
        if not np.allclose(batch.pts_seconds.numpy(), wanted, rtol=0, atol=1e-5):
            raise DecodeError(self.path, "TorchCodec gives frames of other times; use --data.decoder pyav")
        if (
            channels == 3
            and (height, width) == tuple(batch.data.shape[1:3])
            and list(places) == list(map(int, indices))
        ):
            return batch.data
        out = np.empty((len(indices), height, width, channels), np.uint8)
        for pixels, rows in zip(batch.data.numpy(), places.values(), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            out[rows] = self._scaler(frame, height, width, channels)
        return torch.from_numpy(out)


def _video_decoder() -> Any:
    try:
        from torchcodec.decoders import VideoDecoder
    except ImportError as error:
        raise MissingDependencyError("torchcodec", "torchcodec") from error
    except (RuntimeError, OSError) as error:  # FFmpeg's libraries are not there, or another PyTorch
        raise BackendError(
            f"torchcodec can't be loaded ({_first_line(error)}); it needs FFmpeg's libraries (apt install ffmpeg) and "
            "the PyTorch that it was built for; or decode with --data.decoder pyav"
        ) from error
    return VideoDecoder


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
