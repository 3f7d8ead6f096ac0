"""Frames by their number, from video files, from folders of pictures and from memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

from lean3d.data.readers.array import ArrayReader
from lean3d.data.readers.base import Reader
from lean3d.data.readers.frames import PICTURES, FrameReader
from lean3d.data.readers.video import VideoReader
from lean3d.data.shards import ShardCache, member_of

__all__ = ["PICTURES", "ArrayReader", "FrameReader", "Reader", "VideoReader", "open_video"]


def open_video(
    path: str | Path,
    frame_template: str = "{:05d}.jpg",
    *,
    decoder: Literal["pyav", "torchcodec"] = "pyav",
    seconds: float = math.inf,
    shards: ShardCache | None = None,
) -> Reader:
    """The reader that fits what `path` is: a folder of pictures, a clip in a shard, or a video file.

    Args:
        path: A video file in any container and codec that PyAV has, a folder of pictures, or a path into a shard, as
            in ``set/train-000003.tar/1536+20480/jumps/0012.mp4`` (see `lean3d.data.shards`).
        frame_template: How the pictures in a folder are named.
        decoder: What decodes video files; clips in shards are PyAV's.
        seconds: Longest time that opening a video file, or one call of its reader, may take.
        shards: Where shards from object stores are kept; default: the user's cache folder.

    Raises:
        DecodeError: The file is missing, is no video, has no frames, or is cut off; or its shard is.
        MissingDependencyError: TorchCodec is asked for and not installed; or the shard is in an object store, and
            webdataset is not installed.
        BackendError: TorchCodec is installed, but can't be loaded.
    """
    if (member := member_of(path)) is not None:
        return VideoReader(path, seconds, (shards or ShardCache()).read(member))
    if Path(path).is_dir():
        return FrameReader(path, frame_template)
    if decoder == "torchcodec":
        from lean3d.data.readers.torchcodec import TorchCodecReader  # not until it is asked for

        return TorchCodecReader(path, seconds)
    return VideoReader(path, seconds)
