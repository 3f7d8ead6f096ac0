"""Which videos the gallery shows, and each as a small mp4 inside the page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av

from lean3d.data.readers import open_video
from lean3d.errors import DecodeError

SECONDS = 5.0
"""Longest piece of a video, from its middle."""
FPS = 15.0
"""More frames a second than this are thinned out."""
SIDE = 192
"""Longest side in pixels."""

Video = dict[str, Any]
"""One entry of `videos` in results.json."""


def choose(videos: Sequence[Video], count: int) -> list[Video]:
    """Videos for the gallery: the wrong ones first, the surest mistake leading, then right ones of all classes in turn.

    Wrong ones take no more than half of the places as long as there are right ones for the other half.

    Args:
        videos: Entries of results.json; those without a label are left out.
        count: How many, at most.
    """
    known = [video for video in videos if video["label"] is not None]
    wrong = sorted((v for v in known if not is_right(v)), key=lambda v: -v["top"][0]["score"])
    by_class: dict[str, list[Video]] = {}
    for video in known:
        if is_right(video):
            by_class.setdefault(video["label"], []).append(video)
    turns = [(turn, video) for videos in by_class.values() for turn, video in enumerate(videos)]
    right = [video for _, video in sorted(turns, key=lambda entry: entry[0])]
    num_wrong = max(count // 2, count - len(right))
    shown = wrong[:num_wrong]
    return shown + right[: count - len(shown)]


def is_right(video: Video) -> bool:
    """Whether the best class is the label."""
    return video["top"][0]["label"] == video["label"]


def small_mp4(path: str, frame_template: str) -> bytes:
    """The middle of a video as a small H.264 mp4 that every browser plays.

    Raises:
        DecodeError: The video can't be decoded, or this PyAV has no H.264 encoder.
    """
    if "libx264" not in av.codecs_available:
        raise DecodeError(path, "this PyAV has no H.264 encoder, see lean3d doctor")
    with open_video(path, frame_template) as reader:
        step = max(1, round(reader.fps / FPS))
        length = min(reader.num_frames, max(1, round(SECONDS * reader.fps)))
        first = (reader.num_frames - length) // 2
        scale = min(1.0, SIDE / max(reader.size))
        height, width = (max(2, round(side * scale) // 2 * 2) for side in reader.size)  # yuv420p needs even sides
        frames = reader.get_frames(range(first, first + length, step), size=(height, width)).numpy()
        rate = Fraction(reader.fps / step).limit_denominator(1000)
    memory = io.BytesIO()
    with av.open(memory, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "26", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return memory.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Bytes as an address that needs no file, for example of kind ``video/mp4``."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"
