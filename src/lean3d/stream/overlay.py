"""What a stream shows, with what the model says: scores, and a timeline of the last seconds; written or on screen."""

from __future__ import annotations

import colorsys
import re
from collections import deque
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from lean3d.config import WHOLE_FRAME, Region
from lean3d.data.drawing import VideoWriter, draw_region, draw_scores, drawn_size, fitting, font_of, score_bars
from lean3d.data.readers.base import Scaler
from lean3d.errors import ConfigError
from lean3d.stream.events import Event, EventTracker
from lean3d.stream.sources import shown_pixels, shown_size

TIMELINE = 10.0
"""Seconds that the timeline shows."""

TOP = 3
"""Classes whose scores are shown."""


class Overlay:
    """Draws on one stream's frames: the best classes on bars as long as their scores, and below them the timeline.

    ```
    | dances             0.83 |
    | walks      0.11         |
    |====walks====   ==dances==|        the last ten seconds, now at the right
    ```

    Args:
        region: What the model looks at; a line is drawn around it.
    """

    def __init__(self, region: Region = WHOLE_FRAME) -> None:
        self._region = region
        self._scaler = Scaler()
        self._size: tuple[int, int] | None = None
        self._past: deque[Event] = deque()

    def draw(self, frame: av.VideoFrame, tracker: EventTracker, ended: list[Event], seconds: float) -> np.ndarray:
        """A frame with what is known now: uint8 (H, W, 3), of the first frame's size, or larger if that is tiny.

        Args:
            frame: As decoded.
            tracker: The stream's.
            ended: Events that ended since the last call.
            seconds: The frame's time.
        """
        self._size = self._size or drawn_size(shown_size(frame))
        pixels = shown_pixels(frame, self._scaler, self._size, 3)
        draw_region(pixels, self._region)
        self._past += ended
        while self._past and (self._past[0].end or 0.0) < seconds - TIMELINE:
            self._past.popleft()
        events = [*self._past, *([tracker.current] if tracker.current else [])]
        strip = self._timeline(events, tracker.classes, seconds)
        pixels[-len(strip) :] = strip
        if tracker.smoothed is not None:
            scores, places = tracker.smoothed.topk(min(TOP, len(tracker.classes)))
            labels = [tracker.classes[place] for place in places.tolist()]
            draw_scores(pixels, score_bars(labels, scores.tolist(), *self._size), len(pixels) - len(strip))
        return pixels

    def _timeline(self, events: list[Event], classes: tuple[str, ...], now: float) -> np.ndarray:
        assert self._size is not None
        height, width = self._size
        line = max(16, height // 18)
        picture = Image.new("RGB", (width, line), (30, 30, 30))
        draw = ImageDraw.Draw(picture)
        font = font_of(round(line * 0.7))
        for event in events:
            left, right = (
                round(width * (1 + (time - now) / TIMELINE))
                for time in (event.start, now if event.end is None else event.end)
            )
            left, right = max(left, 0), min(right, width)
            if right <= left:
                continue
            draw.rectangle((left, 1, right - 1, line - 2), fill=_colour(classes.index(event.label)))
            text = fitting(event.label, right - left - line // 2, font)
            if font.getlength(text) <= right - left - line // 2:
                draw.text((left + line // 4, line // 2), text, (255, 255, 255), font, anchor="lm")
        return np.asarray(picture)


class Window:
    """A window on the screen.

    Args:
        title: Stands on it.

    Raises:
        ConfigError: There is no screen, or Python has no tkinter; says what to do.
    """

    def __init__(self, title: str):
        cure = "write the video in place of it: --video OUT.mp4"
        try:
            import tkinter

            from PIL import ImageTk
        except ImportError as error:
            raise ConfigError(
                f"showing needs tkinter ({error}): install it, as python3-tk on Debian, or {cure}"
            ) from error
        try:
            self._root = tkinter.Tk()
        except tkinter.TclError as error:
            raise ConfigError(f"there is no screen to show anything on ({error}): {cure}") from error
        self._photo = ImageTk.PhotoImage
        self._root.title(title)
        self._label = tkinter.Label(self._root, borderwidth=0)
        self._label.pack()
        self.closed = False
        """Whether the user closed it."""
        self._root.protocol("WM_DELETE_WINDOW", self._on_close)

    def show(self, pixels: np.ndarray) -> None:
        """Show a frame, uint8 (H, W, 3)."""
        if self.closed:
            return
        self._image = self._photo(Image.fromarray(pixels), master=self._root)  # tkinter keeps no reference
        self._label.configure(image=self._image)
        self._root.update()

    def close(self) -> None:
        """Take it away."""
        if not self.closed:
            self._on_close()

    def _on_close(self) -> None:
        self.closed = True
        self._root.destroy()


class Recorder:
    """Writes a stream's overlay; the file begins with the first frame."""

    def __init__(self, path: Path, fps: float):
        self._path, self._fps = path, fps
        self._writer: VideoWriter | None = None

    def write(self, pixels: np.ndarray, seconds: float) -> None:
        """Add a frame, uint8 (H, W, 3)."""
        if self._writer is None:
            self._writer = VideoWriter(self._path, (pixels.shape[0], pixels.shape[1]), self._fps)
        self._writer.write(pixels, seconds)

    def close(self) -> None:
        """Finish the file."""
        if self._writer is not None:
            self._writer.close()


def file_name(source: str) -> str:
    """A name for a source's video: its own, without what files can't have in theirs."""
    return (re.sub(r"[^\w.-]+", "-", source).strip("-.") or "stream") + ".mp4"


def _colour(number: int) -> tuple[int, int, int]:
    """Colours that differ for neighbouring numbers, dark enough for white text."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.75, 0.65)
    return round(red * 255), round(green * 255), round(blue * 255)
