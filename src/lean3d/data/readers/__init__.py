"""Frames by their number, from video files, from folders of pictures and from memory."""

from __future__ import annotations

from pathlib import Path

from lean3d.data.readers.array import ArrayReader
from lean3d.data.readers.base import Reader
from lean3d.data.readers.frames import PICTURES, FrameReader
from lean3d.data.readers.video import VideoReader

__all__ = ["PICTURES", "ArrayReader", "FrameReader", "Reader", "VideoReader", "open_video"]


def open_video(path: str | Path, frame_template: str = "{:05d}.jpg") -> Reader:
    """The reader that fits what `path` is: a folder of pictures or a video file.

    Args:
        path: A video file in any container and codec that PyAV has, or a folder of pictures.
        frame_template: How the pictures in a folder are named.

    Raises:
        DecodeError: The file is missing, is no video, has no frames, or is cut off.
    """
    return FrameReader(path, frame_template) if Path(path).is_dir() else VideoReader(path)
