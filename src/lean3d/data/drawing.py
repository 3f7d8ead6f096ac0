"""Frames with words on them, and mp4 files of such frames."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lean3d.config import WHOLE_FRAME, Region
from lean3d.errors import ConfigError

TICKS = 60000
"""Time stamps in a second; mpeg4 takes no finer ones."""
ON_EVERY_CPU = {"x264-params": "cpu-independent=1"}
"""Options of libx264 with which the same frames become the same file on each x86 processor, and each time on one.

Else x264's macroblock tree rounds as the processor's vector units do, and where those are AVX-512 it also reads, past
the end of each row that is not a multiple of 128 pixels, what happens to lie in memory (x264, common/x86/mc-a2.asm).
"""


class VideoWriter:
    """An mp4 file, H.264 where that can be encoded, whose frames have their own times.

    It appears under its name when it is closed; a `with` block that an error ends leaves no file.

    Args:
        path: The file; its folder is made where it is missing.
        size: Height and width of the frames; even numbers.
        fps: Frames per second, about.

    Raises:
        ConfigError: `path` doesn't end in .mp4.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], fps: float):
        self.path = Path(path)
        check_name(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._unfinished = self.path.with_name(f".{self.path.name}")
        self._last = -1
        self._container = av.open(str(self._unfinished), "w", format="mp4")
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        rate = Fraction(fps).limit_denominator(1001)
        stream = self._container.add_stream(codec, rate=rate, options={"crf": "20"} if codec == "libx264" else {})
        assert isinstance(stream, av.VideoStream)  # for type checkers
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if codec == "mpeg4":
            stream.bit_rate = 4 * size[0] * size[1]
        stream.codec_context.time_base = Fraction(1, TICKS)
        self._stream = stream

    def write(self, pixels: np.ndarray, seconds: float) -> None:
        """Add a frame, uint8 (H, W, 3), at its time; times that don't grow are moved a little."""
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        self._last = max(self._last + 1, round(seconds * TICKS))
        frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Finish the file; without a frame there is none."""
        if self._last >= 0:
            self._container.mux(self._stream.encode())
        self._container.close()
        if self._last >= 0:
            self._unfinished.replace(self.path)
        self._unfinished.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._container.close()
            self._unfinished.unlink(missing_ok=True)


def check_name(path: Path, video: str | Path | None = None) -> None:
    """Refuse a name that is no mp4 file's, or that of the video itself.

    Raises:
        ConfigError: It is.
    """
    if path.suffix.lower() != ".mp4" or (video is not None and path.resolve() == Path(video).resolve()):
        raise ConfigError(f"the annotated video must be another file that ends in .mp4, got {path}")


def drawn_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width for a video to draw on: a small one is enlarged so that text is readable; even numbers."""
    enlarge = max(1, round(320 / max(size)))
    return max(2, size[0] * enlarge // 2 * 2), max(2, size[1] * enlarge // 2 * 2)


def draw_region(pixels: np.ndarray, region: Region) -> None:
    """Draw a white line around the part of a frame that a model looks at, in place; none around the whole frame.

    Args:
        pixels: uint8 (H, W, 3).
        region: See `lean3d.config.Region`.
    """
    if region == WHOLE_FRAME:
        return
    height, width = pixels.shape[:2]
    left, right = (round(side * (width - 1)) for side in region[::2])
    top, bottom = (round(side * (height - 1)) for side in region[1::2])
    pixels[[top, bottom], left : right + 1] = 255
    pixels[top : bottom + 1, [left, right]] = 255


def draw_scores(pixels: np.ndarray, bars: np.ndarray, bottom: int | None = None) -> None:
    """Put bars of `score_bars` on a frame, uint8 (H, W, 3), in place; what is under them is dimmed.

    Args:
        pixels: The frame.
        bars: What to draw.
        bottom: The row that they stand on; default: the last.
    """
    bottom = len(pixels) if bottom is None else bottom
    rows = pixels[max(0, bottom - len(bars)) : bottom]
    rows[:] = rows // 4 + bars[len(bars) - len(rows) :]


def score_bars(labels: Sequence[str], scores: Sequence[float], height: int, width: int) -> np.ndarray:
    """Classes, each a line of text on a bar as long as its score: uint8 (rows, width, 3), at most 191.

    Args:
        labels: Their names; longer ones than there is room for are cut.
        scores: In [0, 1].
        height, width: Of the frame that they are for.
    """
    line = max(16, height // 18)
    picture = Image.new("RGB", (width, line * len(labels)))
    draw = ImageDraw.Draw(picture)
    font = font_of(round(line * 0.7))
    for row, (label, score) in enumerate(zip(labels, scores, strict=True)):
        top = row * line
        draw.rectangle((0, top + 1, round(score * (width - 1)), top + line - 2), fill=(20, 90, 170))
        number = f"{score:.2f}"
        room = width - draw.textlength(number, font) - line
        draw.text((line // 4, top + line // 2), fitting(label, room, font), (255, 255, 255), font, anchor="lm")
        draw.text((width - line // 4, top + line // 2), number, (255, 255, 255), font, anchor="rm")
    return (np.asarray(picture) * 0.75).astype(np.uint8)


def fitting(text: str, room: float, font: ImageFont.FreeTypeFont) -> str:
    """The text, or as much of it as `room` pixels hold, with a dot for the rest."""
    while len(text) > 1 and font.getlength(text) > room:
        text = text.removesuffix("…")[:-1] + "…"
    return text


@functools.cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    """A font that matplotlib brings and that has more alphabets than Pillow's own."""
    import matplotlib  # only where a picture is wanted

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", size)
